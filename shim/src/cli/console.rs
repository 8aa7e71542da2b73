//! `nacre console`: the terminal's side of a shell in a pod's guest. The other
//! side is [`crate::task::console`].
//!
//! ```text
//! stdin  --> pipe --+
//! stdout <-- pipe --+-- the pod's shim, which opens them as /proc/PID/fd/N
//! stderr <-- pipe --+
//! ```
//! A terminal is put into raw mode meanwhile: every key goes to the guest, and so
//! does every change of its size. Whatever ends the console, be it the shell,
//! the guest, the shim or a signal, [`session`] returns and the terminal is as before.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::process::ExitCode;

use nacre_protocol::console::{ResizeRequest, RunRequest, RunResponse, Size, Terminal};
use nacre_protocol::console_ttrpc::ConsoleClient;
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy};
use tokio::net::unix::pipe;
use tokio::signal::unix::{SignalKind, signal};
use ttrpc::asynchronous::Client;
use ttrpc::context::Context;

use super::CliError;
use super::pods::Pod;

/// Added to a signal's number it makes a status, as in a shell.
const SIGNAL_STATUS: u8 = 128;

/// Runs a shell in a pod's guest; returns its exit status.
pub(super) fn run(pod: &Pod) -> Result<ExitCode, CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(terminal_error("start the runtime"))?;
    let result = runtime.block_on(session(pod));
    // Reading the standard input cannot be given up; leaving does that.
    runtime.shutdown_background();
    result.map(ExitCode::from)
}

async fn session(pod: &Pod) -> Result<u8, CliError> {
    let gone = |source| CliError::NoShim {
        pod: pod.id.clone(),
        source,
    };
    let socket = pod.state.socket.clone().unwrap_or_default();
    let address = format!("unix://{}", socket.display());
    let client = Client::connect(&address).await.map_err(gone)?;
    let client = ConsoleClient::new(client);
    let pipes = Pipes::new().map_err(terminal_error("make pipes"))?;
    let on_terminal = is_terminal(io::stdin().as_fd()) && is_terminal(io::stdout().as_fd());
    let mut request = pipes.request();
    if on_terminal {
        request.terminal = Some(terminal()).into();
    }
    let raw = on_terminal.then(Raw::enter).transpose();
    let _raw = raw.map_err(terminal_error("set up the terminal"))?;
    let answer = tokio::select! {
        answer = converse(&client, &request, pipes) => answer?,
        never = follow_size(&client, request.pid) => match never? {},
        status = ending_signal() => return status,
    };
    match answer {
        Ok(answer) => Ok(u8::try_from(answer.exit_status).unwrap_or(u8::MAX)),
        Err(ttrpc::Error::RpcStatus(status)) => Err(CliError::Console {
            pod: pod.id.clone(),
            problem: status.message().to_owned(),
        }),
        Err(error) => Err(gone(error)),
    }
}

/// Both ends of the shell's streams.
struct Pipes {
    stdin: (pipe::Sender, pipe::Receiver),
    stdout: (pipe::Sender, pipe::Receiver),
    stderr: (pipe::Sender, pipe::Receiver),
}

impl Pipes {
    fn new() -> io::Result<Self> {
        Ok(Self {
            stdin: pipe::pipe()?,
            stdout: pipe::pipe()?,
            stderr: pipe::pipe()?,
        })
    }

    /// The shim's ends as it finds them.
    fn request(&self) -> RunRequest {
        let number = |fd: &dyn AsRawFd| fd.as_raw_fd().unsigned_abs();
        RunRequest {
            pid: std::process::id(),
            stdin: number(&self.stdin.1),
            stdout: number(&self.stdout.0),
            stderr: number(&self.stderr.0),
            ..Default::default()
        }
    }
}

/// Has the shell run, moves its streams, and returns what the shim answers once
/// all output is written.
async fn converse(
    client: &ConsoleClient,
    request: &RunRequest,
    pipes: Pipes,
) -> Result<ttrpc::Result<RunResponse>, CliError> {
    // The end of the input closes its writing end; the reading one stays open.
    let (to_shell, _stdin) = pipes.stdin;
    let own = |fd: BorrowedFd| own_file(fd).map_err(terminal_error("use the standard streams"));
    tokio::spawn(copy_all(own(io::stdin().as_fd())?, to_shell));
    let running = async {
        let answer = client.run(Context::default(), request).await;
        // The shim has written all it will; with our ends the outputs end.
        drop((pipes.stdout.0, pipes.stderr.0));
        Ok(answer)
    };
    let (answer, (), ()) = tokio::try_join!(
        running,
        copy_all(pipes.stdout.1, own(io::stdout().as_fd())?),
        copy_all(pipes.stderr.1, own(io::stderr().as_fd())?),
    )
    .map_err(CliError::Write)?;
    Ok(answer)
}

fn own_file(fd: BorrowedFd<'_>) -> io::Result<File> {
    Ok(File::from_std(fd.try_clone_to_owned()?.into()))
}

async fn copy_all(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    copy(&mut from, &mut to).await?;
    to.flush().await
}

/// Tells the shim of each new size of the terminal.
async fn follow_size(
    client: &ConsoleClient,
    pid: u32,
) -> Result<std::convert::Infallible, CliError> {
    let mut changes =
        signal(SignalKind::window_change()).map_err(terminal_error("listen for signals"))?;
    loop {
        changes.recv().await;
        let request = ResizeRequest {
            pid,
            size: Some(size()).into(),
            ..Default::default()
        };
        // Fails when the shell, the guest or the shim is gone: what Run tells.
        let _ = client.resize(Context::default(), &request).await;
    }
}

/// Waits for a signal that asks this process to end; returns its status.
async fn ending_signal() -> Result<u8, CliError> {
    let listen = |kind| signal(kind).map_err(terminal_error("listen for signals"));
    let mut hangup = listen(SignalKind::hangup())?;
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    let kind = tokio::select! {
        _ = hangup.recv() => SignalKind::hangup(),
        _ = interrupt.recv() => SignalKind::interrupt(),
        _ = terminate.recv() => SignalKind::terminate(),
    };
    let number = u8::try_from(kind.as_raw_value()).unwrap_or_default();
    Ok(SIGNAL_STATUS + number)
}

fn is_terminal(fd: BorrowedFd<'_>) -> bool {
    nix::unistd::isatty(fd).unwrap_or(false)
}

fn terminal() -> Terminal {
    Terminal {
        kind: std::env::var("TERM").unwrap_or_default(),
        size: Some(size()).into(),
        ..Default::default()
    }
}

nix::ioctl_read_bad!(window_size, libc::TIOCGWINSZ, libc::winsize);

/// The terminal's size; zeros, which change nothing, if it has none.
fn size() -> Size {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the call writes to `size` alone, and that is what it takes.
    let known = unsafe { window_size(io::stdin().as_raw_fd(), &raw mut size) }.is_ok();
    if !known {
        return Size::default();
    }
    Size {
        width: size.ws_col.into(),
        height: size.ws_row.into(),
        ..Default::default()
    }
}

/// The terminal in raw mode (termios(3)), until this is dropped.
struct Raw(Termios);

impl Raw {
    fn enter() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSADRAIN, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Fails only when the terminal is gone.
        let _ = tcsetattr(io::stdin(), SetArg::TCSADRAIN, &self.0);
    }
}

fn terminal_error(what: &'static str) -> impl FnOnce(io::Error) -> CliError {
    move |source| CliError::Terminal { what, source }
}

#[cfg(test)]
mod tests {
    use super::super::pods;
    use super::*;
    use crate::rundir::State;

    #[test]
    fn pod_whose_shim_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let pod = directory.path().join("default").join("abc");
        std::fs::create_dir_all(&pod).unwrap();
        let state = State {
            socket: Some(pod.join("socket")),
            ..State::default()
        };
        let text = serde_json::to_vec(&state).unwrap();
        std::fs::write(pod.join("state.json"), text).unwrap();
        let pod = pods::find(directory.path(), "ab").unwrap();
        let error = run(&pod).unwrap_err();
        assert!(matches!(error, CliError::NoShim { .. }), "{error:?}");
        assert!(error.to_string().contains("pod abc"), "{error}");
    }
}
