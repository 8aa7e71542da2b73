//! The kernel's messages about devices (netlink(7), `NETLINK_KOBJECT_UEVENT`).

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, socket,
};
use tokio::io::unix::AsyncFd;

use crate::io::register;

/// Group of the kernel's own messages.
const KERNEL_GROUP: u32 = 1;

/// Messages from its creation on: check the condition after creating it, then wait.
#[derive(Debug)]
pub struct Uevents(AsyncFd<OwnedFd>);

impl Uevents {
    /// Listens.
    ///
    /// # Errors
    ///
    /// Those of socket(2).
    pub fn listen() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkKObjectUEvent,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_GROUP))?;
        Ok(Self(register(socket)?))
    }

    /// The device of the next message, by its path below /sys; none if messages were
    /// lost.
    ///
    /// # Errors
    ///
    /// Those of read(2).
    pub async fn next(&self) -> io::Result<Option<PathBuf>> {
        let mut message = [0; 4096];
        loop {
            let mut guard = self.0.readable().await?;
            let read =
                guard.try_io(|socket| Ok(nix::unistd::read(socket.get_ref(), &mut message)?));
            match read {
                Ok(Err(error)) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => {
                    return Ok(None);
                }
                Ok(result) => {
                    let len = result?;
                    return Ok(device_of(message.get(..len).unwrap_or_default()));
                }
                Err(_) => {}
            }
        }
    }
}

/// What a message begins with: "add@/devices/...", up to a zero byte.
fn device_of(message: &[u8]) -> Option<PathBuf> {
    let head = message.split(|byte| *byte == 0).next()?;
    let at = head.iter().position(|byte| *byte == b'@')?;
    let path = head.get(at + 1..)?.strip_prefix(b"/")?;
    Some(Path::new(OsStr::from_bytes(path)).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_of_a_message() {
        let message = b"add@/devices/pci0000:00/block/a\0ACTION=add\0DEVPATH=/devices/b\0";
        let device = device_of(message).unwrap();
        assert_eq!(device, Path::new("devices/pci0000:00/block/a"));
        for other in [&b""[..], b"add", b"add@", b"libudev\0\xfe\xed"] {
            assert_eq!(device_of(other), None);
        }
    }
}
