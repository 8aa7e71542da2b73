//! One queue of a tap, a descriptor of `/dev/net/tun`.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::NetError;

/// Size of the header before each packet, `struct virtio_net_hdr_v1`.
pub const HEADER_BYTES: usize = 12;

/// A queue.
pub struct Tap {
    file: File,
    /// It gets packets of the tap.
    attached: AtomicBool,
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl Tap {
    /// Takes a queue over, and sets it and its tap up for our kind of header.
    ///
    /// # Errors
    ///
    /// When the descriptor is no tap queue.
    pub fn new(fd: OwnedFd) -> Result<Self, NetError> {
        let tap = Self {
            file: fd.into(),
            attached: AtomicBool::new(true),
        };
        let bytes: libc::c_int = 12;
        // SAFETY: TUNSETVNETHDRSZ reads one c_int.
        let result =
            unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const bytes) };
        check(result, "header size")?;
        set_nonblocking(&tap.file)?;
        Ok(tap)
    }

    /// Sets the offloads (`TUN_F_*`) the tap may use towards the guest.
    ///
    /// # Errors
    ///
    /// When the kernel does not know them.
    pub fn set_offload(&self, flags: libc::c_uint) -> Result<(), NetError> {
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        let result = unsafe {
            libc::ioctl(
                self.as_raw_fd(),
                libc::TUNSETOFFLOAD,
                libc::c_ulong::from(flags),
            )
        };
        check(result, "offloads")
    }

    /// Gives the queue its share of the tap's packets, or none.
    ///
    /// # Errors
    ///
    /// When the tap has one queue only, or is gone.
    pub fn set_attached(&self, attached: bool) -> Result<(), NetError> {
        if self.attached.load(Ordering::Relaxed) == attached {
            return Ok(());
        }
        let flag = if attached {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        };
        // SAFETY: an all-zero ifreq is valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(flag).unwrap_or(0);
        // SAFETY: TUNSETQUEUE reads one ifreq.
        let result =
            unsafe { libc::ioctl(self.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) };
        check(result, "attach queue")?;
        self.attached.store(attached, Ordering::Relaxed);
        Ok(())
    }
}

fn check(result: libc::c_int, operation: &'static str) -> Result<(), NetError> {
    if result < 0 {
        let source = io::Error::last_os_error();
        return Err(NetError::Tap { operation, source });
    }
    Ok(())
}

fn set_nonblocking(file: &File) -> Result<(), NetError> {
    let failed = |errno: nix::Error| NetError::Tap {
        operation: "non-blocking",
        source: errno.into(),
    };
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL).map_err(failed)?);
    fcntl(file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map_err(failed)?;
    Ok(())
}
