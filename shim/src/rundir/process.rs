//! Processes by more than their pid: pids are reused, and cleanup kills.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use tracing::warn;

/// How long a killed process may take to die before cleanup goes on.
const DEATH_WAIT: Duration = Duration::from_secs(2);

/// A process, told apart from later ones with the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proc {
    /// Host pid.
    pub pid: u32,
    /// proc(5) stat field 22.
    pub start_time: u64,
}

impl Proc {
    /// Notes a process that runs now; `None` when it is gone.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The command name may hold spaces and parentheses; the fields resume
        // after its last one, with field 3.
        let fields = stat.rsplit_once(')')?.1;
        let start_time = fields.split_whitespace().nth(19)?.parse().ok()?;
        Some(Self { pid, start_time })
    }

    /// A descriptor of this very process, if it still runs.
    fn open(self) -> Option<OwnedFd> {
        let pidfd = pidfd_open(self.pid).ok()?;
        // The order matters: the descriptor holds one process, whichever had
        // the pid; the start time read afterwards is that one's or a lookalike
        // only if it died in between, and then the signal reaches nobody.
        (Self::of(self.pid)? == self).then_some(pidfd)
    }

    /// Whether this very process still runs.
    pub fn is_alive(self) -> bool {
        self.open()
            .is_some_and(|pidfd| !has_died(pidfd.as_fd(), Duration::ZERO))
    }

    /// Kills this very process and waits for its end, at most [`DEATH_WAIT`].
    pub(super) fn kill(self) {
        let Some(pidfd) = self.open() else { return };
        if let Err(error) = pidfd_kill(pidfd.as_fd())
            && error.raw_os_error() != Some(libc::ESRCH)
        {
            warn!(pid = self.pid, %error, "cannot kill");
            return;
        }
        if !has_died(pidfd.as_fd(), DEATH_WAIT) {
            warn!(pid = self.pid, "still there after SIGKILL");
        }
    }
}

/// Opens a descriptor of a process (pidfd_open(2)), close-on-exec.
///
/// # Errors
///
/// Those of the system call.
pub fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: takes two integers, touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = Errno::result(fd)?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends SIGKILL to the process behind `pidfd`.
///
/// # Errors
///
/// Those of pidfd_send_signal(2); ESRCH when it is dead and reaped.
pub fn pidfd_kill(pidfd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the null siginfo is allowed (pidfd_send_signal(2)); the rest are
    // integers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            libc::SIGKILL,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    Errno::result(result)?;
    Ok(())
}

fn has_died(pidfd: BorrowedFd<'_>, wait: Duration) -> bool {
    let timeout = PollTimeout::try_from(wait).unwrap_or(PollTimeout::ZERO);
    let mut fds = [PollFd::new(pidfd, PollFlags::POLLIN)];
    matches!(poll(&mut fds, timeout), Ok(ready) if ready > 0)
}
