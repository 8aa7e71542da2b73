//! The standard streams of a process: pipes or a terminal on its side, stream
//! connections on the shim's, and copying in between.
//!
//! The process does not get the sockets themselves: it could not reopen them as
//! /dev/stdout, and "all output was written" could not be told.
//!
//! When is output complete? At the process's exit everything it wrote is in
//! the pipe. So output is *drained* once, after the exit, a read found the pipe
//! empty or at its end and all before was passed on. No timer is involved, and
//! a grandchild that keeps the pipe open holds nothing up: its output is still
//! copied, afterwards. Only a shim that does not read can delay an exit, by
//! [`DRAIN_LIMIT`].

use std::io;
use std::os::fd::OwnedFd;
use std::process::Stdio as ChildStdio;
use std::sync::Arc;
use std::time::Duration;

use nacre_protocol::agent::Stdio;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::engine::spawn::Streams;
use crate::engine::sys::{self, WindowSize};
use crate::error::{Context, Error, Result};
use crate::io::Stream;
use crate::reaper::ExitWatch;
use crate::streams::StreamHub;

/// Longest an exit status waits for the shim to take the last output. The shim, which tells of
/// an exit within five seconds, spends four more on the readers.
pub const DRAIN_LIMIT: Duration = Duration::from_millis(500);
/// Bytes copied at a time; half a default pipe.
const CHUNK: usize = 32 * 1024;

/// The shim's connections, claimed; by default none.
#[derive(Default)]
pub struct Connections {
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
    terminal: bool,
}

/// The agent's ends of the pipes with the connections they belong to.
pub struct Plumbing {
    connections: Connections,
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

/// Claims the connections a request names.
///
/// # Errors
///
/// `InvalidArgument` for a terminal with a separate standard error,
/// `FailedPrecondition` for connections that do not come.
pub async fn claim(hub: &StreamHub, stdio: &Stdio) -> Result<Connections> {
    if stdio.terminal && stdio.stderr != 0 {
        return Err(Error::InvalidArgument(
            "a terminal has no stderr of its own".into(),
        ));
    }
    Ok(Connections {
        stdin: hub.claim(stdio.stdin).await?,
        stdout: hub.claim(stdio.stdout).await?,
        stderr: hub.claim(stdio.stderr).await?,
        terminal: stdio.terminal,
    })
}

/// Initial size of the terminal, if the request gives one.
#[must_use]
pub fn window(stdio: &Stdio) -> Option<WindowSize> {
    size(stdio.width, stdio.height)
}

/// A window size of a request; `None` for zero.
#[must_use]
pub fn size(width: u32, height: u32) -> Option<WindowSize> {
    let clamp = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
    (width != 0 && height != 0).then(|| WindowSize {
        width: clamp(width),
        height: clamp(height),
    })
}

impl Connections {
    /// Makes the pipes. The process's ends are the first result; with a
    /// terminal there are none, the process opens it itself.
    ///
    /// # Errors
    ///
    /// Those of pipe(2).
    pub fn plumb(self) -> Result<(Streams, Plumbing)> {
        let mut streams = Streams::null();
        let mut plumbing = Plumbing {
            stdin: None,
            stdout: None,
            stderr: None,
            connections: self,
        };
        let connections = &plumbing.connections;
        if connections.terminal {
            return Ok((streams, plumbing));
        }
        let pipe = || pipe2(OFlag::O_CLOEXEC).context("make a pipe");
        if connections.stdin.is_some() {
            let (read, write) = pipe()?;
            (streams.stdin, plumbing.stdin) = (ChildStdio::from(read), Some(write));
        }
        if connections.stdout.is_some() {
            let (read, write) = pipe()?;
            (streams.stdout, plumbing.stdout) = (ChildStdio::from(write), Some(read));
        }
        if connections.stderr.is_some() {
            let (read, write) = pipe()?;
            (streams.stderr, plumbing.stderr) = (ChildStdio::from(write), Some(read));
        }
        Ok((streams, plumbing))
    }
}

impl Plumbing {
    /// Starts copying; `terminal` is the agent's end of it.
    ///
    /// # Errors
    ///
    /// Those of putting descriptors on the reactor.
    pub fn start(self, terminal: Option<OwnedFd>, exit: &ExitWatch) -> Result<ProcessIo> {
        let stream = |fd| Stream::new(fd).map(Arc::new).context("register a stream");
        let mut io = ProcessIo {
            terminal: terminal.map(stream).transpose()?,
            drained: Vec::new(),
            tasks: JoinSet::new(),
        };
        let connections = self.connections;
        let terminal = io.terminal.clone();
        let open = |fd: Option<OwnedFd>| match (fd, &terminal) {
            (Some(fd), _) => stream(fd).map(Some),
            (None, terminal) => Ok(terminal.clone()),
        };
        if let (Some(connection), Some(sink)) = (connections.stdin, open(self.stdin)?) {
            io.tasks.spawn(copy_input(connection, sink));
        }
        let stdout = (connections.stdout, open(self.stdout)?);
        let stderr = (connections.stderr, self.stderr.map(stream).transpose()?);
        for pair in [stdout, stderr] {
            if let (connection, Some(source)) = pair {
                io.copy_output(source, connection, exit.clone());
            }
        }
        Ok(io)
    }
}

/// A process's streams while it runs and until it is forgotten. Dropping it
/// ends the copying.
#[derive(Debug)]
pub struct ProcessIo {
    terminal: Option<Arc<Stream>>,
    drained: Vec<watch::Receiver<bool>>,
    tasks: JoinSet<()>,
}

impl ProcessIo {
    fn copy_output(&mut self, source: Arc<Stream>, sink: Option<Stream>, exit: ExitWatch) {
        let (sender, receiver) = watch::channel(false);
        self.drained.push(receiver);
        self.tasks.spawn(async move {
            // The end of the copying shows as the sender's drop.
            if let Err(error) = copy_output(&source, sink, exit, &sender).await {
                tracing::warn!("output of a process: {error}");
            }
        });
    }

    /// A future that is ready once all output up to the exit was passed on; it
    /// borrows nothing, so the process can be forgotten meanwhile.
    pub fn drained(&self) -> impl Future<Output = ()> + use<> {
        let streams = self.drained.clone();
        async move {
            let all = async {
                for mut stream in streams {
                    // An error is the end of the copying: drained as well.
                    let _ = stream.wait_for(|drained| *drained).await;
                }
            };
            if tokio::time::timeout(DRAIN_LIMIT, all).await.is_err() {
                tracing::warn!("the shim does not take the last output of a process");
            }
        }
    }

    /// Resizes the terminal.
    ///
    /// # Errors
    ///
    /// `FailedPrecondition` if there is none.
    pub fn resize(&self, size: WindowSize) -> Result<()> {
        let terminal = self
            .terminal
            .as_ref()
            .ok_or_else(|| Error::FailedPrecondition("the process has no terminal".into()))?;
        sys::set_window_size(terminal.as_ref(), size).context("resize the terminal")
    }
}

/// Until the shim's half-close, which closes a pipe (by the drop of `sink`)
/// and means nothing to a terminal, or until the process stops reading.
async fn copy_input(connection: Stream, sink: Arc<Stream>) {
    let mut buffer = vec![0; CHUNK];
    while let Ok(bytes @ 1..) = connection.read(&mut buffer).await {
        let chunk = buffer.get(..bytes).unwrap_or_default();
        if sink.write_all(chunk).await.is_err() {
            return;
        }
    }
}

/// Until the last holder of the pipe is gone. A shim that stopped reading does
/// not stop the process: its output is thrown away.
async fn copy_output(
    source: &Stream,
    mut sink: Option<Stream>,
    mut exit: ExitWatch,
    drained: &watch::Sender<bool>,
) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut exited = exit.has_exited();
    loop {
        let read = match source.read_now(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if exited {
                    drained.send_replace(true);
                }
                tokio::select! {
                    read = source.read(&mut buffer) => read,
                    () = exit.wait(), if !exited => {
                        exited = true;
                        continue;
                    }
                }
            }
            read => read,
        };
        match read {
            Ok(0) => return Ok(()),
            // A terminal whose other end was closed by everyone.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(()),
            Err(error) => return Err(error),
            Ok(bytes) => {
                let chunk = buffer.get(..bytes).unwrap_or_default();
                if let Some(connection) = &sink
                    && connection.write_all(chunk).await.is_err()
                {
                    sink = None;
                }
            }
        }
    }
}
