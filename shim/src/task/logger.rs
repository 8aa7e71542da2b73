//! `binary://` streams: a logging program that containerd's client chose.
//!
//! The contract is containerd's (`pkg/shim` logging): the URI's path is the
//! program, each query pair two arguments; `CONTAINER_ID` and
//! `CONTAINER_NAMESPACE` are in its environment; it reads stdout from descriptor
//! 3, stderr from 4, and closes 5 when it is ready. It ends by itself when both
//! outputs have ended. `nerdctl run -d` logs this way.
//!
//! It is the client's program, not the pod's: it runs in containerd's cgroup, so that
//! it can still write what it has read when the pod's is gone.

use std::fs::File;
use std::io::{self, PipeWriter};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::process::Stdio;
use std::time::Duration;

use nix::fcntl::{FcntlArg, fcntl};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::Command;

use crate::cgroup;

/// The program's descriptors: stdout, stderr, ready.
const FIRST_FD: RawFd = 3;
/// Descriptors are moved up here first, out of the way of those.
const SAFE_FD: RawFd = 16;
/// Time the program has to get ready.
const READY_TIMEOUT: Duration = Duration::from_secs(10);

/// For whom a logger works.
#[derive(Debug, Clone, Copy)]
pub struct Owner<'a> {
    /// containerd namespace.
    pub namespace: &'a str,
    /// Container or exec.
    pub id: &'a str,
}

/// A program and its arguments.
#[derive(Debug, PartialEq, Eq)]
struct Program {
    path: String,
    args: Vec<String>,
}

/// Starts a logger and waits until it is ready. Returns the pipes for stdout and
/// stderr.
///
/// # Errors
///
/// When it cannot be started or is not ready in time.
pub async fn spawn(uri: &str, owner: Owner<'_>) -> io::Result<(pipe::Sender, pipe::Sender)> {
    let program = parse(uri)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not a binary:// URI"))?;
    let (stdout_read, stdout) = io::pipe()?;
    let (stderr_read, stderr) = io::pipe()?;
    let (ready_read, ready) = io::pipe()?;
    let inherited = [
        move_up(stdout_read)?,
        move_up(stderr_read)?,
        move_up(ready)?,
    ];
    let raw = [0, 1, 2].map(|index: usize| inherited[index].as_raw_fd());
    let mut command = Command::new(&program.path);
    command
        .args(&program.args)
        .env("CONTAINER_ID", owner.id)
        .env("CONTAINER_NAMESPACE", owner.namespace)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // Before its descriptors are where that of the group may be.
    cgroup::start_outside(command.as_std_mut())?;
    // SAFETY: between fork and exec the closure only duplicates descriptors that
    // the parent keeps open until after the spawn; it allocates nothing.
    unsafe { command.pre_exec(move || inherit(raw)) };
    // Dropped, it is still reaped by the runtime when it ends.
    let mut program = command.spawn()?;
    drop(inherited);
    if let Err(error) = wait_ready(File::from(OwnedFd::from(ready_read))).await {
        // Nobody would end it; it may have ended by itself.
        let _ = program.start_kill();
        return Err(error);
    }
    Ok((sender(stdout)?, sender(stderr)?))
}

fn inherit(fds: [RawFd; 3]) -> io::Result<()> {
    for (fd, target) in fds.into_iter().zip(FIRST_FD..) {
        // SAFETY: two integers; the target is not in use by design of SAFE_FD.
        if unsafe { libc::dup2(fd, target) } == -1 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

fn move_up(fd: impl AsFd) -> io::Result<OwnedFd> {
    let moved = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(SAFE_FD))?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(moved) })
}

fn sender(writer: PipeWriter) -> io::Result<pipe::Sender> {
    pipe::Sender::from_owned_fd(writer.into())
}

async fn wait_ready(ready: File) -> io::Result<()> {
    let mut ready = pipe::Receiver::from_owned_fd(ready.into())?;
    // A byte or the end, both mean ready; a program that dies at once looks the
    // same and shows by its pipes being broken.
    tokio::time::timeout(READY_TIMEOUT, ready.read(&mut [0u8; 1]))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the logger does not get ready"))?
        .map(drop)
}

fn parse(uri: &str) -> Option<Program> {
    let rest = uri.strip_prefix("binary://")?;
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let mut args = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        args.push(decode(key, true)?);
        args.push(decode(value, true)?);
    }
    Some(Program {
        path: decode(path, false)?,
        args,
    })
}

/// Undoes percent-encoding, and in queries "+" for a space (RFC 3986, 2.1).
fn decode(text: &str, query: bool) -> Option<String> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let digit = |byte: u8| char::from(byte).to_digit(16);
                let value = digit(bytes.next()?)? * 16 + digit(bytes.next()?)?;
                u8::try_from(value).ok()?
            }
            b'+' if query => b' ',
            other => other,
        });
    }
    String::from_utf8(decoded).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::path::{Path, PathBuf};

    use nix::sys::stat::Mode;
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

    #[test]
    fn uris_become_programs() {
        let program = parse("binary:///bin/log%20er?_KEY=%2Fvar%2Flib&b=x+y").unwrap();
        assert_eq!(program.path, "/bin/log er");
        assert_eq!(program.args, ["_KEY", "/var/lib", "b", "x y"]);
        assert_eq!(parse("binary:///bin/a").unwrap().args, [""; 0]);
        assert!(parse("binary:///bin/%zz").is_none());
        assert!(parse("file:///bin/a").is_none());
    }

    /// A logger that is a script in `directory`.
    fn script(directory: &Path, lines: &str) -> PathBuf {
        let path = directory.join("logger");
        std::fs::write(&path, format!("#!/bin/sh\n{lines}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    const OWNER: Owner<'static> = Owner {
        namespace: "ns",
        id: "c",
    };

    /// Its client waits no longer than it may; nor does the program then.
    #[tokio::test]
    async fn a_logger_that_does_not_get_ready_is_ended() {
        let directory = tempfile::tempdir().unwrap();
        let pid_file = directory.path().join("pid");
        nix::unistd::mkfifo(&pid_file, Mode::from_bits_retain(0o600)).unwrap();
        let lines = format!("echo $$ > {}; exec sleep 600", pid_file.display());
        let path = script(directory.path(), &lines);
        let mut options = pipe::OpenOptions::new();
        let pid = options.read_write(true).open_receiver(&pid_file).unwrap();
        let uri = format!("binary://{}", path.display());
        let late = async {
            let mut text = String::new();
            BufReader::new(pid).read_line(&mut text).await.unwrap();
            tokio::time::pause();
            tokio::time::advance(READY_TIMEOUT).await;
            tokio::time::resume();
            text
        };
        let (spawned, pid) = tokio::join!(spawn(&uri, OWNER), late);
        let error = spawned.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let process = format!("/proc/{}", pid.trim());
        while Path::new(&process).exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test]
    async fn a_logger_gets_both_outputs_and_its_owner() {
        let directory = tempfile::tempdir().unwrap();
        let done = directory.path().join("done");
        nix::unistd::mkfifo(&done, Mode::from_bits_retain(0o600)).unwrap();
        let lines =
            "exec 5>&-\n{ echo $CONTAINER_NAMESPACE/$CONTAINER_ID $1; cat <&3; cat <&4; } > $2";
        let path = script(directory.path(), lines);
        let mut result = pipe::OpenOptions::new().open_receiver(&done).unwrap();
        let uri = format!("binary://{}?k={}", path.display(), done.display());
        let (mut stdout, mut stderr) = spawn(&uri, OWNER).await.unwrap();
        stdout.write_all(b"out\n").await.unwrap();
        stderr.write_all(b"err\n").await.unwrap();
        drop((stdout, stderr));
        let mut text = String::new();
        result.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "ns/c k\nout\nerr\n");
    }
}
