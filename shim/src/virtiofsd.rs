//! The pod's virtio-fs daemon: the one process that serves host files to the
//! guest, and only when a pod really shares some.
//!
//! It is the distribution's `virtiofsd`, spoken to over vhost-user. The shim
//! makes the socket, connects to it and hands the connected end to the monitor;
//! the daemon gets the listening end and finds the connection waiting, so there
//! is neither a path anyone else could connect to nor a moment to wait for.
//!
//! The daemon ends when its connection does. It needs no parent-death signal,
//! which would be worse than useless here: that signal follows the *thread* that
//! started the child, and threads of the runtime's pool come and go.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nacre_protocol::channel::FdList;
use nacre_protocol::guest::SHARED_TAG;
use nacre_protocol::vm::SharedDir;

/// Name of the socket for the moment it has one.
const SOCKET_NAME: &str = "virtiofsd.sock";

/// The daemon's options, besides socket and directory.
///
/// - `--sandbox=chroot`: the shared directory becomes its root. The `namespace`
///   sandbox would also give it mounts of its own, and it would never see those
///   the shim makes when a later container of the pod is created.
/// - `--announce-submounts`: each container's files are a mount of their own in
///   the guest, else equal inode numbers of two file systems are taken for one
///   file.
/// - `--inode-file-handles=never`: file handles open files past any chroot and
///   need `CAP_DAC_READ_SEARCH`.
/// - `--xattr`: file capabilities of images are extended attributes.
/// - `--cache=auto`: close-to-open, so host and guest see each other's changes.
/// - `--modcaps=-mknod`: a guest cannot put device nodes into host directories.
/// - `--log-level=warn`: at `info` it tells of every start and end.
const OPTIONS: [&str; 7] = [
    "--sandbox=chroot",
    "--announce-submounts",
    "--inode-file-handles=never",
    "--xattr",
    "--cache=auto",
    "--modcaps=-mknod",
    "--log-level=warn",
];

/// Errors of this module.
#[derive(Debug, thiserror::Error)]
pub enum VirtiofsdError {
    /// The socket could not be made.
    #[error("cannot make a socket for virtiofsd in {}", dir.display())]
    Socket {
        /// Where.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The daemon did not start.
    #[error("cannot start {}; install virtiofsd or set `virtiofsd` in nacre.toml", exe.display())]
    Spawn {
        /// The program.
        exe: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Starts a daemon for `shared_root`, in `cgroup` if given. Its messages go to
/// `log`. Returns it and the connection for the monitor. The child is the
/// caller's to reap.
///
/// # Errors
///
/// A socket that cannot be made beside `shared_root`, or a program that cannot
/// be executed. A daemon that gives up later closes the connection.
pub fn spawn(
    exe: &Path,
    shared_root: &Path,
    log: File,
    cgroup: Option<BorrowedFd<'_>>,
) -> Result<(Child, UnixStream), VirtiofsdError> {
    let dir = shared_root.parent().unwrap_or(shared_root);
    let (listener, stream) = socket(dir).map_err(|source| VirtiofsdError::Socket {
        dir: dir.into(),
        source,
    })?;
    let failed = |source| VirtiofsdError::Spawn {
        exe: exe.into(),
        source,
    };
    let procs = cgroup
        .map(|dir| procs_file(dir))
        .transpose()
        .map_err(failed)?;
    let errors = log.try_clone().map_err(failed)?;
    let mut command = Command::new(exe);
    command
        .args(OPTIONS)
        .arg("--shared-dir")
        .arg(shared_root)
        .arg(format!("--fd={}", listener.as_raw_fd()))
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors);
    let listener_fd = listener.as_raw_fd();
    let procs_fd = procs.as_ref().map(AsRawFd::as_raw_fd);
    // SAFETY: between fork and exec the closure makes system calls on
    // descriptors that outlive it, and allocates nothing.
    unsafe { command.pre_exec(move || enter(listener_fd, procs_fd)) };
    let child = command.spawn().map_err(failed)?;
    Ok((child, stream))
}

/// The shared directory, in a message that takes the connection along.
pub fn describe<'a>(connection: &'a UnixStream, list: &mut FdList<'a>) -> SharedDir {
    SharedDir {
        tag: SHARED_TAG.into(),
        socket: list.push(connection.as_fd()),
    }
}

/// In the child: joins the cgroup before it allocates anything the pod should
/// be charged for, and keeps the listener open across exec.
fn enter(listener: RawFd, procs: Option<RawFd>) -> io::Result<()> {
    if let Some(procs) = procs {
        crate::cgroup::join(procs)?;
    }
    // SAFETY: F_SETFD takes no pointer; the descriptor is the parent's listener.
    match unsafe { libc::fcntl(listener, libc::F_SETFD, 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn procs_file(cgroup: BorrowedFd<'_>) -> io::Result<File> {
    let path = format!("/proc/self/fd/{}/cgroup.procs", cgroup.as_raw_fd());
    File::options().write(true).open(path)
}

/// A listening socket and a connection that waits in its queue. The socket's
/// name is gone before this returns, and was in a directory of root's alone.
fn socket(dir: &Path) -> io::Result<(UnixListener, UnixStream)> {
    // Through the descriptor, since a socket's path has 108 bytes at most and
    // sandbox ids are long.
    let dir = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECTORY)
        .open(dir)?;
    let fd = dir.as_fd().as_raw_fd();
    let path = PathBuf::from(format!("/proc/self/fd/{fd}/{SOCKET_NAME}"));
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    let stream = UnixStream::connect(&path);
    std::fs::remove_file(&path)?;
    Ok((listener, stream?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};
    use std::os::unix::fs::PermissionsExt;

    /// A stand-in for the daemon that tells what it was given.
    fn stand_in(dir: &Path, script: &str) -> PathBuf {
        let exe = dir.join("virtiofsd");
        std::fs::write(&exe, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&exe, std::fs::Permissions::from_mode(0o755)).unwrap();
        exe
    }

    #[test]
    fn daemon_gets_listener_directory_and_log() {
        let dir = tempfile::tempdir().unwrap();
        let shared = dir.path().join("shared");
        std::fs::create_dir(&shared).unwrap();
        let script = r#"
            for a; do case $a in --fd=*) readlink /proc/self/fd/${a#--fd=} ;; esac; done
            echo "$@""#;
        let exe = stand_in(dir.path(), script);
        let mut log = tempfile::tempfile().unwrap();

        let (mut child, mut stream) = spawn(&exe, &shared, log.try_clone().unwrap(), None).unwrap();

        assert!(child.wait().unwrap().success());
        let mut text = String::new();
        log.rewind().unwrap();
        log.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("socket:["), "{text}");
        assert!(text.contains(&format!("--shared-dir {}", shared.display())));
        // The daemon is gone and with it the listener: so is the connection.
        assert!(matches!(stream.read(&mut [0]), Ok(0) | Err(_)));
        assert!(!dir.path().join(SOCKET_NAME).exists());
    }

    #[test]
    fn missing_program_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let exe = dir.path().join("nowhere");
        let log = tempfile::tempfile().unwrap();
        let error = spawn(&exe, dir.path(), log, None).unwrap_err();
        assert!(error.to_string().contains("nowhere"), "{error}");
    }
}
