//! The agent's side of making a process: start the helper, follow its reports.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use nix::sys::memfd::{MFdFlags, memfd_create};
use tokio::io::unix::AsyncFd;

use super::init::{COMMAND, REQUEST_FD, Request, SYNC_FD};
use super::sync::{self, Report};
use super::sys;
use crate::error::{Context, Error, Result};
use crate::io::register;

/// The three standard streams of a new process.
pub struct Streams {
    /// Standard input.
    pub stdin: Stdio,
    /// Standard output.
    pub stdout: Stdio,
    /// Standard error.
    pub stderr: Stdio,
}

impl Streams {
    /// /dev/null three times.
    #[must_use]
    pub fn null() -> Self {
        Self {
            stdin: Stdio::null(),
            stdout: Stdio::null(),
            stderr: Stdio::null(),
        }
    }
}

/// A process that is being made.
#[derive(Debug)]
pub struct Spawning {
    socket: AsyncFd<OwnedFd>,
    /// `Ready`, if it overtook `Pid`: two processes report.
    early: Option<(Report, Option<OwnedFd>)>,
}

/// Starts the helper.
///
/// # Errors
///
/// `Io` if it could not be started; what it finds out itself comes by
/// [`Spawning::pid`] and [`Spawning::ready`].
pub fn spawn(request: &Request, streams: Streams) -> Result<Spawning> {
    let body = serde_json::to_vec(request)
        .map_err(io::Error::from)
        .context("encode request")?;
    let memfd = memfd_create("request", MFdFlags::MFD_CLOEXEC).context("memfd_create")?;
    let mut memfd = File::from(memfd);
    memfd.write_all(&body).context("write request")?;
    let (ours, theirs) = sync::pair().context("make sync socket")?;
    let (request_fd, sync_fd) = (memfd.as_raw_fd(), theirs.as_raw_fd());
    let mut command = Command::new("/proc/self/exe");
    command
        .arg(COMMAND)
        .env_clear()
        .stdin(streams.stdin)
        .stdout(streams.stdout)
        .stderr(streams.stderr);
    // SAFETY: the closure runs in the forked child and only makes system calls
    // on descriptors that stay open until after it ran.
    unsafe {
        command.pre_exec(move || pass(request_fd, sync_fd));
    }
    // The reaper collects the helper like every other child.
    drop(command.spawn().context("start helper")?);
    nonblocking(&ours).context("sync socket")?;
    let socket = register(ours).context("sync socket")?;
    Ok(Spawning {
        socket,
        early: None,
    })
}

/// Moves two descriptors to the numbers the helper expects. They may sit on
/// each other's number, so both first move out of the way.
fn pass(request_fd: i32, sync_fd: i32) -> io::Result<()> {
    let move_up = |fd| {
        nix::fcntl::fcntl(
            // SAFETY: open in this child, see `spawn`.
            unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) },
            nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(SYNC_FD + 1),
        )
    };
    let (request, sync) = (move_up(request_fd)?, move_up(sync_fd)?);
    for (from, to) in [(request, REQUEST_FD), (sync, SYNC_FD)] {
        // SAFETY: open in this child, just duplicated.
        let from = unsafe { std::os::fd::BorrowedFd::borrow_raw(from) };
        sys::dup_to(from, to)?;
    }
    Ok(())
}

/// Sets `O_NONBLOCK`.
///
/// # Errors
///
/// Those of fcntl(2).
pub fn nonblocking(fd: &OwnedFd) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

impl Spawning {
    async fn next(&self) -> Result<Option<(Report, Option<OwnedFd>)>> {
        loop {
            let mut guard = self.socket.readable().await.context("sync socket")?;
            if let Ok(result) = guard.try_io(|socket| sync::recv(socket.get_ref())) {
                return match result.context("sync socket")? {
                    Some((Report::Failed(failure), _)) => Err(failure.into()),
                    report => Ok(report),
                };
            }
        }
    }

    /// Waits until the process exists.
    ///
    /// # Errors
    ///
    /// What the helper reports.
    pub async fn pid(&mut self) -> Result<i32> {
        loop {
            match self.next().await? {
                Some((Report::Pid(pid), _)) => return Ok(pid),
                Some(ready) if self.early.is_none() => self.early = Some(ready),
                other => return Err(unexpected(other.map(|(report, _)| report))),
            }
        }
    }

    /// Waits until the process is about to execute; returns its terminal.
    ///
    /// # Errors
    ///
    /// What the process reports: above all a command that is missing.
    pub async fn ready(&mut self) -> Result<Option<OwnedFd>> {
        let report = match self.early.take() {
            Some(early) => Some(early),
            None => self.next().await?,
        };
        match report {
            Some((Report::Ready, terminal)) => Ok(terminal),
            other => Err(unexpected(other.map(|(report, _)| report))),
        }
    }

    /// Tells a container's process to execute.
    ///
    /// # Errors
    ///
    /// `Io` if the process is gone.
    pub fn go(&self) -> Result<()> {
        sync::send_go(self.socket.get_ref()).context("start process")
    }

    /// Waits until the process has executed.
    ///
    /// # Errors
    ///
    /// Those of execve(2), in runc's words.
    pub async fn executed(self) -> Result<()> {
        match self.next().await? {
            None => Ok(()),
            Some((report, _)) => Err(unexpected(Some(report))),
        }
    }
}

fn unexpected(report: Option<Report>) -> Error {
    Error::Internal(match report {
        None => "the process died while it was being made".into(),
        Some(report) => format!("unexpected report {report:?}"),
    })
}
