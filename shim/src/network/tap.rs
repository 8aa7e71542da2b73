//! Tap and vhost-net descriptors (Documentation/networking/tuntap.rst).

use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};

use super::{NetworkError, system};

const TUN: &str = "/dev/net/tun";
const VHOST_NET: &str = "/dev/vhost-net";
/// `struct virtio_net_hdr_v1`, what virtio 1 puts before each frame.
static VNET_HEADER_BYTES: libc::c_int = 12;

nix::ioctl_write_ptr_bad!(tun_set_iff, libc::TUNSETIFF, libc::ifreq);
nix::ioctl_write_ptr_bad!(tun_set_vnet_hdr_size, libc::TUNSETVNETHDRSZ, libc::c_int);

/// Makes a tap in the calling thread's network namespace and opens its queues. One that is
/// there already is somebody's, with whom the new queues would share its frames.
pub(super) fn open(name: &str, queues: u16) -> Result<Vec<OwnedFd>, NetworkError> {
    let multi_queue = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    let is_new = |queue| if queue == 0 { libc::IFF_TUN_EXCL } else { 0 };
    (0..queues)
        .map(|queue| open_queue(name, multi_queue | is_new(queue)))
        .collect::<io::Result<_>>()
        .map_err(|source| NetworkError::Tap {
            name: name.into(),
            source,
        })
}

fn open_queue(name: &str, flags: libc::c_int) -> io::Result<OwnedFd> {
    let tun = File::options().read(true).write(true).open(TUN)?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | flags;
    let request = interface_request(name, flags)?;
    // SAFETY: both requests read a structure that lives through the call, and
    // the descriptor is a tun device's.
    unsafe {
        tun_set_iff(tun.as_raw_fd(), &raw const request)?;
        tun_set_vnet_hdr_size(tun.as_raw_fd(), &raw const VNET_HEADER_BYTES)?;
    }
    set_nonblocking(&tun)?;
    Ok(tun.into())
}

fn interface_request(name: &str, flags: libc::c_int) -> io::Result<libc::ifreq> {
    // SAFETY: the structure is plain data, for which zero is valid.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    // The last byte stays the terminator.
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::other("interface name too long"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let flags = u16::try_from(flags).map_err(io::Error::other)?;
    request.ifr_ifru.ifru_flags = flags.cast_signed();
    Ok(request)
}

/// The monitor reads taps from an event loop.
fn set_nonblocking(file: &File) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    fcntl(file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Opens vhost-net once per queue pair, where the host has it.
pub(super) fn open_vhost(queues: u16) -> Result<Vec<OwnedFd>, NetworkError> {
    let mut files = Vec::new();
    for _ in 0..queues {
        match File::options().read(true).write(true).open(VHOST_NET) {
            Ok(file) => files.push(file.into()),
            Err(error) if is_absent(&error) => return Ok(Vec::new()),
            Err(error) => return Err(system("open /dev/vhost-net")(error)),
        }
    }
    Ok(files)
}

/// Without the module the node may be there all the same.
fn is_absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO))
}
