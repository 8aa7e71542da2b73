//! The kernel's messages about devices (netlink(7), `NETLINK_KOBJECT_UEVENT`).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

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

    /// Returns when something happened to a device since the last call.
    ///
    /// # Errors
    ///
    /// Those of read(2).
    pub async fn happened(&self) -> io::Result<()> {
        let mut message = [0; 4096];
        loop {
            let mut guard = self.0.readable().await?;
            let read =
                guard.try_io(|socket| Ok(nix::unistd::read(socket.get_ref(), &mut message)?));
            match read {
                // Messages were lost, so there were some.
                Ok(Err(error)) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => {
                    return Ok(());
                }
                Ok(result) => return result.map(drop),
                Err(_) => {}
            }
        }
    }
}
