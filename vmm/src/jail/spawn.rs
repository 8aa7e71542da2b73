//! Starts a monitor process, for the shim.
//!
//! The shim has many threads, so between clone3(2) and execve(2) the child makes
//! plain system calls on what was prepared before: no allocation, no locks. What
//! fails there comes back through a pipe that a successful execve closes.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;

use super::CONTROL_FD;

/// Descriptors are moved up here first, out of the way of 0 to 4.
const SAFE_FD: RawFd = 16;
/// Where the error pipe ends up, closed by execve.
const ERROR_FD: RawFd = CONTROL_FD + 1;
/// Variables of the environment a monitor keeps.
const KEPT_ENVIRONMENT: [&str; 1] = ["RUST_LOG"];

/// A monitor to be.
pub struct Spawn<'a> {
    /// Program to run.
    pub exe: &'a Path,
    /// Its arguments, the name first.
    pub args: &'a [&'a str],
    /// Its end of the control channel; becomes descriptor [`CONTROL_FD`].
    pub control: OwnedFd,
    /// Its standard error.
    pub stderr: BorrowedFd<'a>,
    /// Network namespace to live in; a new, empty one if `None`.
    pub netns: Option<BorrowedFd<'a>>,
    /// cgroup (v2) directory to be born in; the shim's if `None`.
    pub cgroup: Option<BorrowedFd<'a>>,
}

/// A monitor process.
#[derive(Debug)]
pub struct Child {
    /// Its id, as the caller sees it.
    pub pid: i32,
    /// Readable once it has ended; for waitid(2) and `pidfd_send_signal(2)`.
    pub pidfd: OwnedFd,
}

/// Starts the monitor.
///
/// # Errors
///
/// Those of clone3(2), or of the step in the child that failed.
#[expect(
    clippy::needless_pass_by_value,
    reason = "the control socket is the child's from here on"
)]
pub fn spawn(spawn: Spawn<'_>) -> io::Result<Child> {
    let program = Program::new(spawn.exe, spawn.args)?;
    let (error_read, error_write) = pipe2(OFlag::O_CLOEXEC)?;
    let null = OwnedFd::from(File::options().read(true).write(true).open("/dev/null")?);
    let fds = Descriptors {
        null: move_up(&null)?,
        stderr: move_up(&spawn.stderr)?,
        control: move_up(&spawn.control)?,
        error: move_up(&error_write)?,
        netns: spawn.netns.map(|fd| move_up(&fd)).transpose()?,
    };
    let child = clone(&spawn, || run(&program, &fds))?;
    drop((error_write, fds));
    let mut failure = [0; 4];
    match File::from(error_read).read_exact(&mut failure) {
        Ok(()) => {
            reap(&child);
            Err(io::Error::from_raw_os_error(i32::from_ne_bytes(failure)))
        }
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(child),
        Err(error) => Err(error),
    }
}

/// What execve takes, ready.
struct Program {
    path: CString,
    _strings: Vec<CString>,
    argv: Vec<*const libc::c_char>,
    envp: Vec<*const libc::c_char>,
}

impl Program {
    fn new(exe: &Path, args: &[&str]) -> io::Result<Self> {
        let argv = args.iter().copied().map(CString::new);
        let argv: Vec<CString> = argv.collect::<Result<_, _>>()?;
        let environment: Vec<CString> = KEPT_ENVIRONMENT
            .iter()
            .filter_map(|name| Some((name, std::env::var_os(name)?)))
            .map(|(name, value)| {
                CString::new([OsStr::new(name).as_bytes(), b"=", value.as_bytes()].concat())
            })
            .collect::<Result<_, _>>()?;
        // A CString's bytes stay where they are when it is moved.
        let pointers = |strings: &[CString]| {
            let all = strings.iter().map(|string| string.as_ptr());
            all.chain([ptr::null()]).collect()
        };
        Ok(Self {
            path: CString::new(exe.as_os_str().as_bytes())?,
            argv: pointers(&argv),
            envp: pointers(&environment),
            _strings: argv.into_iter().chain(environment).collect(),
        })
    }
}

/// Descriptors for the child, all at [`SAFE_FD`] or above.
struct Descriptors {
    null: OwnedFd,
    stderr: OwnedFd,
    control: OwnedFd,
    error: OwnedFd,
    netns: Option<OwnedFd>,
}

fn move_up(fd: &impl AsRawFd) -> io::Result<OwnedFd> {
    // SAFETY: the descriptor is open: its owner is borrowed.
    let fd = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
    let moved = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(SAFE_FD))?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(moved) })
}

/// Clones the process; the child runs `child`, which does not return.
fn clone(spawn: &Spawn<'_>, child: impl FnOnce() -> Failure) -> io::Result<Child> {
    let mut pidfd: RawFd = -1;
    let mut flags = libc::CLONE_NEWPID
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_PIDFD;
    if spawn.netns.is_none() {
        flags |= libc::CLONE_NEWNET;
    }
    let mut args = CloneArgs {
        flags: u64::try_from(flags).map_err(io::Error::other)?,
        pidfd: (&raw mut pidfd).addr() as u64,
        exit_signal: u64::try_from(libc::SIGCHLD).map_err(io::Error::other)?,
        ..Default::default()
    };
    if let Some(cgroup) = spawn.cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::try_from(cgroup.as_raw_fd()).map_err(io::Error::other)?;
    }
    // SAFETY: the arguments are a clone_args of the size given. Without CLONE_VM
    // the child has its own copy of memory, on the same stack, as after fork; it
    // calls only `child`, which keeps to async-signal-safe calls.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<CloneArgs>()) };
    match Errno::result(pid)? {
        0 => child().exit(),
        pid => Ok(Child {
            pid: i32::try_from(pid).map_err(io::Error::other)?,
            // SAFETY: the kernel stored a new descriptor there (CLONE_PIDFD).
            pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
        }),
    }
}

const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// `struct clone_args` (clone(2)).
#[repr(C, align(8))]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Why the child did not become the program.
struct Failure {
    errno: Errno,
    report_to: RawFd,
}

impl Failure {
    /// Reports and ends the child.
    fn exit(self) -> ! {
        let bytes = (self.errno as i32).to_ne_bytes();
        // SAFETY: write(2) from a local buffer, and _exit(2).
        unsafe {
            libc::write(self.report_to, bytes.as_ptr().cast(), bytes.len());
            libc::_exit(127)
        }
    }
}

/// The child; returns only when it fails. Async-signal-safe.
fn run(program: &Program, fds: &Descriptors) -> Failure {
    Failure {
        errno: become_program(program, fds),
        report_to: fds.error.as_raw_fd(),
    }
}

fn become_program(program: &Program, fds: &Descriptors) -> Errno {
    if let Err(errno) = prepare(fds) {
        return errno;
    }
    // SAFETY: path, argv and envp are NUL-terminated strings and NULL-terminated
    // arrays that `program` owns.
    unsafe {
        libc::execve(
            program.path.as_ptr(),
            program.argv.as_ptr(),
            program.envp.as_ptr(),
        )
    };
    Errno::last()
}

fn prepare(fds: &Descriptors) -> Result<(), Errno> {
    let null = fds.null.as_raw_fd();
    // SAFETY: system calls on descriptors that `fds` owns and on local values.
    // What is closed here belongs to the parent's copy of the table.
    unsafe {
        if let Some(netns) = &fds.netns {
            Errno::result(libc::setns(netns.as_raw_fd(), libc::CLONE_NEWNET))?;
        }
        Errno::result(libc::setsid())?;
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        Errno::result(libc::sigprocmask(
            libc::SIG_SETMASK,
            &raw const none,
            ptr::null_mut(),
        ))?;
        Errno::result(libc::dup2(null, libc::STDIN_FILENO))?;
        Errno::result(libc::dup2(null, libc::STDOUT_FILENO))?;
        Errno::result(libc::dup2(fds.stderr.as_raw_fd(), libc::STDERR_FILENO))?;
        Errno::result(libc::dup2(fds.control.as_raw_fd(), CONTROL_FD))?;
        Errno::result(libc::dup3(fds.error.as_raw_fd(), ERROR_FD, libc::O_CLOEXEC))?;
        // Not closed but marked, so that the error pipe still works until execve.
        Errno::result(libc::syscall(
            libc::SYS_close_range,
            ERROR_FD,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        ))?;
    }
    Ok(())
}

/// Collects a child that never became a monitor.
fn reap(child: &Child) {
    // SAFETY: waitpid on a child of ours, without a status.
    let result = unsafe { libc::waitpid(child.pid, ptr::null_mut(), 0) };
    if result < 0 {
        tracing::debug!(pid = child.pid, error = %io::Error::last_os_error(), "not reaped");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    fn root() -> bool {
        let root = nix::unistd::Uid::effective().is_root();
        if !root {
            eprintln!("skipped: needs root");
        }
        root
    }

    /// Runs `sh -c script` as a monitor; the control channel is its answer.
    fn shell(script: &str, netns: Option<BorrowedFd<'_>>) -> io::Result<(Child, UnixStream)> {
        let (near, far) = UnixStream::pair()?;
        let child = spawn(Spawn {
            exe: Path::new("/bin/sh"),
            args: &["sh", "-c", script],
            control: far.into(),
            stderr: io::stderr().as_fd(),
            netns,
            cgroup: None,
        })?;
        Ok((child, near))
    }

    fn answer(script: &str, netns: Option<BorrowedFd<'_>>) -> String {
        let (child, mut channel) = shell(script, netns).unwrap();
        let mut text = String::new();
        channel.read_to_string(&mut text).unwrap();
        reap(&child);
        text
    }

    #[test]
    fn child_is_first_in_its_namespace_and_has_four_descriptors() {
        if !root() {
            return;
        }
        let text = answer(
            "echo $$ >&3; [ -e /dev/fd/4 ] && echo open >&3; read -r x || echo eof >&3",
            None,
        );
        assert_eq!(text, "1\neof\n");
    }

    #[test]
    fn network_namespace_is_new_unless_given() {
        if !root() {
            return;
        }
        let ours = std::fs::read_link("/proc/self/ns/net").unwrap();
        let ours = ours.to_str().unwrap();
        // The old /proc still shows the child, as its "self".
        let script = "readlink /proc/self/ns/net >&3";
        assert_ne!(answer(script, None).trim(), ours);
        let netns = File::open("/proc/self/ns/net").unwrap();
        assert_eq!(answer(script, Some(netns.as_fd())).trim(), ours);
    }

    #[test]
    fn channel_works_both_ways() {
        if !root() {
            return;
        }
        let (child, mut channel) = shell("read -r line <&3; echo got $line >&3", None).unwrap();
        channel.write_all(b"word\n").unwrap();
        let mut text = String::new();
        channel.read_to_string(&mut text).unwrap();
        reap(&child);
        assert_eq!(text, "got word\n");
    }

    #[test]
    fn missing_program_is_reported() {
        if !root() {
            return;
        }
        let (_near, far) = UnixStream::pair().unwrap();
        let error = spawn(Spawn {
            exe: Path::new("/nonexistent"),
            args: &["x"],
            control: far.into(),
            stderr: io::stderr().as_fd(),
            netns: None,
            cgroup: None,
        })
        .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
