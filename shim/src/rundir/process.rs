//! Processes by more than their pid: pids are reused, and cleanup kills.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use tracing::warn;

/// How long a killed process may take to be gone, if it has no memory to unpin.
pub const DEATH_WAIT: Duration = Duration::from_secs(2);

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

    /// Kills this very process.
    pub(crate) fn kill(self) -> Killed {
        let pidfd = self.open();
        if let Some(pidfd) = &pidfd
            && let Err(error) = pidfd_kill(pidfd.as_fd())
            && error.raw_os_error() != Some(libc::ESRCH)
        {
            warn!(pid = self.pid, %error, "cannot kill");
        }
        Killed {
            pidfd,
            since: Instant::now(),
        }
    }
}

/// A process that was killed, or gone already.
pub(crate) struct Killed {
    pidfd: Option<OwnedFd>,
    since: Instant,
}

impl Killed {
    /// Waits for its end, no longer than so much after it was killed: several that are
    /// killed together are waited for together. Returns whether it is gone.
    pub(crate) fn is_gone_within(&self, limit: Duration) -> bool {
        let rest = limit.saturating_sub(self.since.elapsed());
        let pidfd = self.pidfd.as_ref();
        pidfd.is_none_or(|pidfd| has_died(pidfd.as_fd(), rest))
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
    // Whole milliseconds, none too few.
    let wait = wait.saturating_add(Duration::from_micros(999));
    let timeout = PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX);
    let mut fds = [PollFd::new(pidfd, PollFlags::POLLIN)];
    matches!(poll(&mut fds, timeout), Ok(ready) if ready > 0)
}

/// A process that SIGKILL does not end yet, as one in the middle of a long system call:
/// the first of a PID namespace, which waits for a process in it (pid_namespaces(7)) that
/// nobody reaps as long as its parent outside is stopped.
#[cfg(test)]
pub(crate) mod undying {
    use super::Proc;
    use std::io::{BufRead, BufReader};
    use std::process::{Child, Command, Stdio};

    use nix::sys::signal::{Signal, kill};
    use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
    use nix::unistd::Pid;

    pub(crate) struct Undying {
        outer: Child,
        parent: Child,
        /// The process.
        pub process: Proc,
    }

    impl Undying {
        /// None, with the reason on stderr, where it takes rights that we do not have.
        pub(crate) fn new() -> Option<Self> {
            let mut outer = says("unshare", &["--pid", "--fork"]);
            let Some(pid) = outer.1 else {
                eprintln!("skipped: no PID namespace can be made");
                outer.0.wait().unwrap();
                return None;
            };
            let parent = says("nsenter", &["-p", "-t", &pid.to_string()]);
            parent.1.unwrap();
            let stopped = Pid::from_raw(parent.0.id().try_into().unwrap());
            kill(stopped, Signal::SIGSTOP).unwrap();
            // Until it has stopped it may reap one more child.
            let status = waitpid(stopped, Some(WaitPidFlag::WUNTRACED)).unwrap();
            assert!(matches!(status, WaitStatus::Stopped(..)), "{status:?}");
            let process = Proc::of(pid).unwrap();
            Some(Self {
                outer: outer.0,
                parent: parent.0,
                process,
            })
        }
    }

    impl Drop for Undying {
        /// Lets it die.
        fn drop(&mut self) {
            let first = Pid::from_raw(self.process.pid.try_into().unwrap());
            kill(first, Signal::SIGKILL).unwrap();
            self.parent.kill().unwrap();
            self.parent.wait().unwrap();
            self.outer.wait().unwrap();
        }
    }

    /// Runs a shell in the namespace that `program` makes or enters; its pid out here.
    fn says(program: &str, arguments: &[&str]) -> (Child, Option<u32>) {
        let script = "read -r pid rest < /proc/self/stat; echo $pid; exec sleep 60";
        let mut child = Command::new(program)
            .args(arguments)
            .args(["sh", "-c", script])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        (child, line.trim().parse().ok())
    }
}
