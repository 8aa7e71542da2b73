//! Runs one hook (runtime-spec 1.2, config.md, "POSIX-platform Hooks").
//!
//! The shim runs those of the host, a container's first process those inside the
//! container; how a hook is run is the same for both. Everything here blocks, and
//! needs neither threads nor files: in a container there may be no /dev/null.

use std::fs::File;
use std::io::{self, PipeReader, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use oci_spec::runtime::{Hook, State};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

/// Time a hook without a limit of its own gets.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);
/// No hook has more, whatever its own limit: sums of these must be numbers.
const MAX_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);
/// What is kept of a hook's output.
const LAST_WORDS_BYTES: usize = 1024;
/// Of that, the lines that are told.
const LAST_WORDS_LINES: usize = 3;
/// A pipe holds no more (pipe(7)).
const PIPE_BYTES: usize = 64 << 10;

/// A hook failed.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It could not be run.
    #[error("run hook {path}")]
    Run {
        /// The program.
        path: String,
        /// The failure.
        source: io::Error,
    },
    /// It took too long.
    #[error("hook {path} took longer than {seconds} s")]
    Timeout {
        /// The program.
        path: String,
        /// Its limit.
        seconds: u64,
    },
    /// Its container's end does not wait for it any longer.
    #[error("hook {path} was ended with its container's shim")]
    Cancelled {
        /// The program.
        path: String,
    },
    /// It said no.
    #[error("hook {path} failed ({status}): {said}")]
    Failed {
        /// The program.
        path: String,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it said.
        said: String,
    },
}

/// How long a hook may take.
#[must_use]
pub fn timeout(hook: &Hook) -> Duration {
    hook.timeout()
        .and_then(|seconds| u64::try_from(seconds).ok())
        .filter(|seconds| *seconds > 0)
        .map_or(DEFAULT_TIMEOUT, Duration::from_secs)
        .min(MAX_TIMEOUT)
}

/// The hook's program, with its arguments and nothing but its own environment, in a
/// process group of its own.
#[must_use]
pub fn command(hook: &Hook) -> Command {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(hook.path());
    let arguments = hook.args().as_deref().unwrap_or_default();
    // The first argument is the program's own name.
    if let Some(name) = arguments.first() {
        command.arg0(name);
    }
    let environment = hook.env().as_deref().unwrap_or_default();
    let pairs = environment.iter().filter_map(|pair| pair.split_once('='));
    command
        .args(arguments.iter().skip(1))
        .env_clear()
        .envs(pairs)
        .process_group(0);
    command
}

/// Runs `command`, made of `hook`, with the container's state on its standard
/// input, until it has ended, its time is over, or the writer of `cancel` is closed.
/// A hook that is not let end is killed with all that it started, unless that has left
/// its process group.
///
/// # Errors
///
/// When it cannot be run, takes too long, is cancelled, or does not exit with 0.
pub fn run(
    hook: &Hook,
    mut command: Command,
    state: &State,
    cancel: Option<&PipeReader>,
) -> Result<(), HookError> {
    let path = hook.path().display().to_string();
    let failed = |source| HookError::Run {
        path: path.clone(),
        source,
    };
    if !hook.path().is_absolute() {
        return Err(failed(io::Error::other("its path is not absolute")));
    }
    let (output, writer) = io::pipe().map_err(failed)?;
    let errors = writer.try_clone().map_err(failed)?;
    command
        .stdin(input(state).map_err(failed)?)
        .stdout(writer)
        .stderr(errors);
    let mut child = command.spawn().map_err(failed)?;
    // With it go our ends of the hook's output.
    drop(command);
    let mut said = Vec::new();
    let limit = timeout(hook);
    let end = follow(&child, output, limit, cancel, &mut said);
    if !matches!(end, Ok(End::Exit)) {
        // It may have ended this very moment, but its number is its own until the wait.
        let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
    }
    let status = child.wait().map_err(failed)?;
    match end.map_err(failed)? {
        End::Exit => (),
        End::Timeout => {
            let seconds = limit.as_secs();
            return Err(HookError::Timeout { path, seconds });
        }
        End::Cancel => return Err(HookError::Cancelled { path }),
    }
    if status.success() {
        return Ok(());
    }
    let said = last_words(&said);
    Err(HookError::Failed { path, status, said })
}

/// The state as a file: it is there whether the hook reads it or not.
fn input(state: &State) -> io::Result<File> {
    let text = serde_json::to_vec(state)?;
    let mut file = File::from(memfd_create("state", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(&text)?;
    file.rewind()?;
    Ok(file)
}

/// Why a hook is not waited for any longer.
#[derive(Clone, Copy)]
enum End {
    Exit,
    Timeout,
    Cancel,
}

/// Keeps the end of what the hook says until it has ended, or is to end. What it leaves
/// running may go on holding its output.
fn follow(
    child: &Child,
    output: PipeReader,
    limit: Duration,
    cancel: Option<&PipeReader>,
    said: &mut Vec<u8>,
) -> io::Result<End> {
    let ended = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let start = Instant::now();
    let mut output = Some(output);
    loop {
        let left = limit.saturating_sub(start.elapsed());
        if left.is_zero() {
            return Ok(End::Timeout);
        }
        // Rounded up, lest the last millisecond be spent in turns of none.
        let left = PollTimeout::try_from(left + Duration::from_millis(1));
        let left = left.unwrap_or(PollTimeout::MAX);
        let fds = [
            Some(ended.as_fd()),
            cancel.map(AsFd::as_fd),
            output.as_ref().map(AsFd::as_fd),
        ];
        let Some([has_ended, is_cancelled, has_said]) = ready(fds, left)? else {
            continue;
        };
        if has_said
            && let Some(pipe) = &mut output
            && !read_some(pipe, said)?
        {
            output = None;
        }
        if has_ended {
            return Ok(End::Exit);
        }
        if is_cancelled {
            return Ok(End::Cancel);
        }
    }
}

/// Which of these are ready or at their end; `None` after a signal.
fn ready<const N: usize>(
    fds: [Option<BorrowedFd<'_>>; N],
    limit: PollTimeout,
) -> io::Result<Option<[bool; N]>> {
    let mut there: Vec<_> = fds
        .iter()
        .flatten()
        .map(|fd| PollFd::new(*fd, PollFlags::POLLIN))
        .collect();
    match poll(&mut there, limit) {
        Err(Errno::EINTR) => return Ok(None),
        result => result?,
    };
    let mut there = there.iter();
    Ok(Some(fds.map(|fd| {
        fd.and_then(|_| there.next())
            .is_some_and(|fd| fd.any().unwrap_or(false))
    })))
}

/// Reads what is there; `false` at the end.
fn read_some(output: &mut PipeReader, said: &mut Vec<u8>) -> io::Result<bool> {
    let mut buffer = vec![0; PIPE_BYTES];
    let count = output.read(&mut buffer)?;
    said.extend_from_slice(buffer.get(..count).unwrap_or_default());
    let surplus = said.len().saturating_sub(LAST_WORDS_BYTES);
    said.drain(..surplus);
    Ok(count > 0)
}

fn last_words(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    let lines: Vec<&str> = text.lines().collect();
    let start = lines.len().saturating_sub(LAST_WORDS_LINES);
    lines.get(start..).unwrap_or_default().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::{HookBuilder, StateBuilder};

    fn hook(script: &str) -> Hook {
        let args = ["sh", "-c", script].map(String::from);
        HookBuilder::default()
            .path("/bin/sh")
            .args(args)
            .env(vec![
                "PATH=/bin:/usr/bin".to_owned(),
                "GREETING=hello".into(),
            ])
            .timeout(1i64)
            .build()
            .unwrap()
    }

    fn run_script(script: &str) -> Result<(), HookError> {
        let hook = hook(script);
        let state = StateBuilder::default().id("c1").pid(42).build().unwrap();
        run(&hook, command(&hook), &state, None)
    }

    fn complaint(script: &str) -> String {
        run_script(script).unwrap_err().to_string()
    }

    #[test]
    fn a_hook_has_the_state_and_its_own_environment() {
        run_script("grep '\"id\":\"c1\".*\"pid\":42' && test $GREETING = hello").unwrap();
        run_script("test -z \"$HOME\" && test -z \"$CARGO\"").unwrap();
        run_script("true").unwrap();
    }

    #[test]
    fn a_failing_hook_is_quoted() {
        let told = complaint("seq 100000; echo no bridge >&2; exit 3");
        assert_eq!(
            told,
            "hook /bin/sh failed (exit status: 3): 99999; 100000; no bridge"
        );
        let told = complaint("kill -9 $$");
        assert!(told.contains("signal: 9"), "{told}");
    }

    #[test]
    fn a_hook_has_its_time() {
        assert_eq!(
            complaint("exec sleep 60"),
            "hook /bin/sh took longer than 1 s"
        );
        assert_eq!(complaint("exec yes"), "hook /bin/sh took longer than 1 s");
        assert_eq!(
            complaint("exec >/dev/null 2>&1; exec sleep 60"),
            "hook /bin/sh took longer than 1 s"
        );
    }

    /// Reads what a child of the hook's has said last; ends with the last of them.
    fn rest_of(pipe: &std::path::Path) -> String {
        std::fs::read_to_string(pipe).unwrap()
    }

    /// A named pipe, whose end is there once nobody has it open any more.
    fn pipe(directory: &tempfile::TempDir) -> std::path::PathBuf {
        let path = directory.path().join("pipe");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        path
    }

    /// A shell that waits for another program, as scripts do.
    fn waiting(pipe: &std::path::Path) -> String {
        format!(
            "exec >{0} 2>&1; echo began; (sleep 20; echo outlived); true",
            pipe.display()
        )
    }

    #[test]
    fn a_hook_out_of_time_is_killed_with_what_it_waits_for() {
        let directory = tempfile::tempdir().unwrap();
        let pipe = pipe(&directory);
        let script = waiting(&pipe);
        let hook = std::thread::spawn(move || complaint(&script));
        assert_eq!(rest_of(&pipe), "began\n");
        assert_eq!(hook.join().unwrap(), "hook /bin/sh took longer than 1 s");
    }

    #[test]
    fn a_cancelled_hook_is_killed_with_what_it_waits_for() {
        let directory = tempfile::tempdir().unwrap();
        let pipe = pipe(&directory);
        let mut endless = hook(&waiting(&pipe));
        endless.set_timeout(Some(600));
        let (cancelled, cancel) = io::pipe().unwrap();
        let run = std::thread::spawn(move || {
            run(
                &endless,
                command(&endless),
                &State::default(),
                Some(&cancelled),
            )
        });
        let mut said = File::open(&pipe).unwrap();
        said.read_exact(&mut [0; 6]).unwrap();
        drop(cancel);
        assert_eq!(said.read(&mut [0]).unwrap(), 0);
        let error = run.join().unwrap().unwrap_err();
        assert!(matches!(error, HookError::Cancelled { .. }), "{error}");
    }

    /// A daemon that a hook leaves behind has its output, and holds nothing up.
    #[test]
    fn what_a_hook_leaves_running_is_not_waited_for() {
        run_script("sleep 3 & exit 0").unwrap();
    }

    #[test]
    fn hooks_that_cannot_be_run() {
        for (path, cause) in [
            ("/no/such", "No such file"),
            ("sh", "not absolute"),
            ("/etc/passwd", "Permission denied"),
        ] {
            let hook = HookBuilder::default().path(path).build().unwrap();
            let error = run(&hook, command(&hook), &State::default(), None).unwrap_err();
            assert_eq!(error.to_string(), format!("run hook {path}"));
            let source = std::error::Error::source(&error).unwrap().to_string();
            assert!(source.contains(cause), "{path}: {source}");
        }
    }

    #[test]
    fn limits() {
        let with = |seconds| {
            let hook = HookBuilder::default().path("/x").timeout(seconds);
            timeout(&hook.build().unwrap()).as_secs()
        };
        assert_eq!((with(5), with(0), with(-1)), (5, 60, 60));
        assert_eq!(with(i64::MAX), 86400);
        assert_eq!(timeout(&Hook::default()).as_secs(), 60);
    }
}
