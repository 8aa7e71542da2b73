//! The socket between the agent and one container process in the making.
//!
//! ```text
//!   agent                helper                 process (sibling of the helper)
//!     |---- request ------>|                         |
//!     |                    |------- clone3 --------->|
//!     |<--- Pid -----------| exits                   | namespaces, mounts, credentials
//!     |<--- Ready (+ terminal) ----------------------|
//!     |---- go (containers only, at start) --------->| execve
//!     |<--- end of file: executed -------------------|
//!     |<--- Failed: at any point --------------------|
//! ```
//!
//! Two processes report, so `Ready` may overtake `Pid`.
//!
//! A `SOCK_SEQPACKET` pair: one packet is one message. The process's end is
//! close-on-exec, so a successful execve(2) is the end of file.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    recvmsg, sendmsg, socketpair,
};
use serde::{Deserialize, Serialize};

use super::error::Failure;

/// Largest message; error texts are cut to fit.
const MAX_BYTES: usize = 16 * 1024;
const GO: &[u8] = b"go";

/// From the process in the making to the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// The process exists; its PID as the agent sees it.
    Pid(i32),
    /// All is set up; execve is next. Carries the terminal, if there is one.
    Ready,
    /// It will not come to be.
    Failed(Failure),
}

/// Makes a pair, close-on-exec.
///
/// # Errors
///
/// Those of socketpair(2).
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?)
}

/// Sends a report with at most one descriptor.
///
/// Without a descriptor this is a plain write(2): it also runs under the
/// container's seccomp filter.
///
/// # Errors
///
/// Those of the system calls.
pub fn send(socket: impl AsFd, report: &Report, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let body = serde_json::to_vec(report)?;
    if body.len() > MAX_BYTES {
        let cut = Report::Failed(Failure {
            invalid: false,
            message: "error message too long".into(),
        });
        return send(socket, &cut, None);
    }
    match fd {
        None => {
            nix::unistd::write(socket, &body)?;
        }
        Some(fd) => {
            sendmsg::<UnixAddr>(
                socket.as_fd().as_raw_fd(),
                &[IoSlice::new(&body)],
                &[ControlMessage::ScmRights(&[fd.as_raw_fd()])],
                MsgFlags::empty(),
                None,
            )?;
        }
    }
    Ok(())
}

/// Receives one report; `None` at the end of file.
///
/// # Errors
///
/// `WouldBlock` on a non-blocking socket, `InvalidData` for nonsense.
pub fn recv(socket: impl AsFd) -> io::Result<Option<(Report, Option<OwnedFd>)>> {
    let mut body = vec![0; MAX_BYTES];
    let mut control = nix::cmsg_space!(std::os::fd::RawFd);
    let mut fd = None;
    let bytes = {
        let mut slices = [IoSliceMut::new(&mut body)];
        let message = recvmsg::<UnixAddr>(
            socket.as_fd().as_raw_fd(),
            &mut slices,
            Some(&mut control),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        for item in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = item {
                // SAFETY: the kernel installed these descriptors for this
                // message; nothing else knows them.
                let owned = fds
                    .into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
                fd = owned.fold(None, |_, fd| Some(fd));
            }
        }
        message.bytes
    };
    if bytes == 0 {
        return Ok(None);
    }
    let report = serde_json::from_slice(body.get(..bytes).unwrap_or_default())?;
    Ok(Some((report, fd)))
}

/// Lets a process that is `Ready` execute.
///
/// # Errors
///
/// Those of send(2); `BrokenPipe` if the process is gone.
pub fn send_go(socket: impl AsFd) -> io::Result<()> {
    nix::sys::socket::send(socket.as_fd().as_raw_fd(), GO, MsgFlags::MSG_NOSIGNAL)?;
    Ok(())
}

/// Waits for [`send_go`], with read(2) for the sake of seccomp.
///
/// # Errors
///
/// `UnexpectedEof` if the agent is gone.
pub fn wait_go(socket: impl AsFd) -> io::Result<()> {
    let mut buffer = [0; 8];
    loop {
        match nix::unistd::read(&socket, &mut buffer) {
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
            Ok(bytes) if buffer.get(..bytes) == Some(GO) => return Ok(()),
            Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}
