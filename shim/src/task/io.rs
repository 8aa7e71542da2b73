//! A process's streams: host FIFOs or files on one side, guest streams on the
//! other.
//!
//! containerd names each stream by a path or URI in the request:
//!
//! | | |
//! |---|---|
//! | empty | no such stream; the guest gives the process `/dev/null` |
//! | path of a FIFO | containerd, `ctr` or the CRI plugin is at its other end |
//! | `file:///path`, path of a file | output is appended to it |
//! | `binary:///program` as stdout | a logger takes both outputs, see [`super::logger`] |
//!
//! FIFOs are opened so that nothing here ever blocks or breaks when the other
//! end comes late or goes away for a while (containerd restarts): for output
//! read-write, so that there is always a reader; for input a writer of our own
//! is held until CloseIO, so that there is no end of file before. Input is
//! opened when the process starts, not before: a client whose input is short
//! would come to its end while Create is under way and have no task yet on which
//! to call CloseIO.
//!
//! A guest stream is one connection (protocol, `Stdio`); its ids are the shim's.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::time::Duration;

use nacre_protocol::agent;
use tokio::io::{AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::task::{AbortHandle, JoinSet};
use tracing::debug;

use super::logger::{self, Owner};
use crate::machine::MachineError;
use crate::sandbox::Sandbox;

/// A pipe's default capacity: larger reads would not be filled.
const BUFFER_BYTES: usize = 64 * 1024;

/// Errors of streams.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// A FIFO or file could not be opened.
    #[error("open {path} as {stream}")]
    Open {
        /// Which stream.
        stream: &'static str,
        /// What containerd named.
        path: String,
        /// The failure.
        source: io::Error,
    },
    /// A URI of a kind nacre does not serve.
    #[error("{stream} {uri:?} is of a kind nacre does not serve; use a FIFO, file:// or binary://")]
    Scheme {
        /// Which stream.
        stream: &'static str,
        /// What containerd named.
        uri: String,
    },
    /// The guest's side could not be connected.
    #[error("connect {stream} to the guest")]
    Connect {
        /// Which stream.
        stream: &'static str,
        /// The failure.
        source: MachineError,
    },
}

/// Where containerd wants a process's streams.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StdioPaths {
    /// Input; empty: none.
    pub stdin: String,
    /// Output; empty: none.
    pub stdout: String,
    /// Errors; empty: none, and unused with a terminal.
    pub stderr: String,
    /// Whether the process gets a terminal.
    pub terminal: bool,
}

/// A process's running streams. Dropping them closes both sides.
pub struct Streams {
    outputs: JoinSet<()>,
    stdin: Option<Stdin>,
}

enum Stdin {
    /// To be opened.
    Waiting {
        path: String,
        guest: UnixStream,
        /// Whether CloseIO came already.
        closed: bool,
    },
    Copied {
        /// Our own writer, which keeps the FIFO open.
        keeper: Option<std::fs::File>,
        _copy: AbortOnDrop,
    },
}

struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Streams {
    /// Connects the guest's ends, opens the host's, and starts to copy output.
    /// Also returns how to name the streams to the agent.
    ///
    /// # Errors
    ///
    /// When an end cannot be opened; nothing stays open then.
    pub async fn open(
        sandbox: &Sandbox,
        paths: &StdioPaths,
        owner: Owner<'_>,
    ) -> Result<(Self, agent::Stdio), StreamError> {
        let mut streams = Self {
            outputs: JoinSet::new(),
            stdin: None,
        };
        let mut ids = agent::Stdio {
            terminal: paths.terminal,
            ..Default::default()
        };
        if !paths.stdin.is_empty() {
            let guest;
            (ids.stdin, guest) = connect(sandbox, "stdin").await?;
            streams.stdin = Some(Stdin::Waiting {
                path: paths.stdin.clone(),
                guest,
                closed: false,
            });
        }
        let (stdout, stderr) = open_outputs(paths, owner).await?;
        if let Some(sink) = stdout {
            let guest;
            (ids.stdout, guest) = connect(sandbox, "stdout").await?;
            streams.outputs.spawn(copy_out(guest, sink, "stdout"));
        }
        if let Some(sink) = stderr {
            let guest;
            (ids.stderr, guest) = connect(sandbox, "stderr").await?;
            streams.outputs.spawn(copy_out(guest, sink, "stderr"));
        }
        Ok((streams, ids))
    }

    /// Opens the input and starts to copy it.
    ///
    /// # Errors
    ///
    /// When it cannot be opened; the process then has no input.
    pub fn start_input(&mut self) -> Result<(), StreamError> {
        self.stdin = match self.stdin.take() {
            Some(Stdin::Waiting {
                path,
                guest,
                closed,
            }) => {
                let (fifo, keeper) = open_input(&path)?;
                let copy = tokio::spawn(copy_in(fifo, guest)).abort_handle();
                Some(Stdin::Copied {
                    keeper: (!closed).then_some(keeper),
                    _copy: AbortOnDrop(copy),
                })
            }
            other => other,
        };
        Ok(())
    }

    /// Lets the input end once containerd has closed its side too.
    pub fn close_stdin(&mut self) {
        match &mut self.stdin {
            Some(Stdin::Waiting { closed, .. }) => *closed = true,
            Some(Stdin::Copied { keeper, .. }) => *keeper = None,
            None => (),
        }
    }

    /// Closes the input and waits until all output has reached the host and its
    /// ends are closed, but no longer than `limit`: a reader that has stopped
    /// reading must not hide the exit. Returns what is still being copied then.
    pub async fn drain(mut self, limit: Duration) -> Option<Self> {
        self.stdin = None;
        let all = async { while self.outputs.join_next().await.is_some() {} };
        match tokio::time::timeout(limit, all).await {
            Ok(()) => None,
            Err(_) => Some(self),
        }
    }
}

async fn connect(
    sandbox: &Sandbox,
    stream: &'static str,
) -> Result<(u64, UnixStream), StreamError> {
    sandbox
        .open_stream()
        .await
        .map_err(|source| StreamError::Connect { stream, source })
}

fn open_input(path: &str) -> Result<(pipe::Receiver, std::fs::File), StreamError> {
    let failed = |source| StreamError::Open {
        stream: "stdin",
        path: path.to_owned(),
        source,
    };
    if path.contains("://") {
        return Err(StreamError::Scheme {
            stream: "stdin",
            uri: path.to_owned(),
        });
    }
    let receiver = pipe::OpenOptions::new()
        .open_receiver(path)
        .map_err(failed)?;
    // Succeeds at once, there being a reader.
    let keeper = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(failed)?;
    Ok((receiver, keeper))
}

type Sink = Box<dyn AsyncWrite + Send + Unpin>;

/// The host's ends of both outputs. A terminal has one output.
async fn open_outputs(
    paths: &StdioPaths,
    owner: Owner<'_>,
) -> Result<(Option<Sink>, Option<Sink>), StreamError> {
    if paths.stdout.starts_with("binary://") {
        let spawned = logger::spawn(&paths.stdout, owner).await;
        let (stdout, stderr) = spawned.map_err(|source| StreamError::Open {
            stream: "stdout",
            path: paths.stdout.clone(),
            source,
        })?;
        let stderr = (!paths.terminal).then(|| Box::new(stderr) as Sink);
        return Ok((Some(Box::new(stdout)), stderr));
    }
    let open = |stream, path: &str| {
        (!path.is_empty())
            .then(|| open_output(stream, path))
            .transpose()
    };
    let stdout = open("stdout", &paths.stdout)?;
    let stderr = if paths.terminal {
        None
    } else {
        open("stderr", &paths.stderr)?
    };
    Ok((stdout, stderr))
}

fn open_output(stream: &'static str, uri: &str) -> Result<Sink, StreamError> {
    let failed = |source| StreamError::Open {
        stream,
        path: uri.to_owned(),
        source,
    };
    let path = match uri.split_once("://") {
        None => uri,
        Some(("file" | "fifo", path)) => path,
        Some(_) => {
            let uri = uri.to_owned();
            return Err(StreamError::Scheme { stream, uri });
        }
    };
    let is_fifo = std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_fifo());
    if is_fifo {
        let fifo = pipe::OpenOptions::new()
            .read_write(true)
            .open_sender(path)
            .map_err(failed)?;
        return Ok(Box::new(fifo));
    }
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o640)
        .open(path)
        .map_err(failed)?;
    Ok(Box::new(tokio::fs::File::from_std(file)))
}

async fn copy_out(guest: UnixStream, mut sink: Sink, stream: &'static str) {
    let mut source = BufReader::with_capacity(BUFFER_BYTES, guest);
    let copied = tokio::io::copy_buf(&mut source, &mut sink).await;
    // A file's writes happen elsewhere; only a flush has them all done.
    let flushed = sink.flush().await;
    match copied.and_then(|bytes| flushed.map(|()| bytes)) {
        Ok(bytes) => debug!(stream, bytes, "end of output"),
        Err(error) => debug!(stream, %error, "output ends early"),
    }
}

async fn copy_in(fifo: pipe::Receiver, mut guest: UnixStream) {
    let mut source = BufReader::with_capacity(BUFFER_BYTES, fifo);
    let copied = tokio::io::copy_buf(&mut source, &mut guest).await;
    let closed = guest.shutdown().await;
    match copied.and_then(|bytes| closed.map(|()| bytes)) {
        Ok(bytes) => debug!(bytes, "end of input"),
        // The process has closed its input or ended: its right.
        Err(error) => debug!(%error, "input no longer wanted"),
    }
    // The guest never writes on an input stream; its close means that nobody
    // reads any more. Keeping ours open until the process ends is harmless.
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;
    use std::path::PathBuf;
    use tokio::io::AsyncReadExt;

    fn fifo(directory: &tempfile::TempDir) -> PathBuf {
        let path = directory.path().join("fifo");
        mkfifo(&path, Mode::from_bits_retain(0o600)).unwrap();
        path
    }

    #[tokio::test]
    async fn output_reaches_a_reader_and_then_ends() {
        let directory = tempfile::tempdir().unwrap();
        let path = fifo(&directory);
        let sink = open_output("stdout", path.to_str().unwrap()).unwrap();
        let mut reader = pipe::OpenOptions::new().open_receiver(&path).unwrap();
        let (guest, mut agent) = UnixStream::pair().unwrap();
        let copy = tokio::spawn(copy_out(guest, sink, "stdout"));
        let sent = vec![7u8; 300_000];
        let writer = tokio::spawn({
            let sent = sent.clone();
            async move { agent.write_all(&sent).await.unwrap() }
        });
        let mut received = Vec::new();
        reader.read_to_end(&mut received).await.unwrap();
        writer.await.unwrap();
        copy.await.unwrap();
        assert_eq!(received, sent);
    }

    #[tokio::test]
    async fn input_ends_only_after_close_io() {
        let directory = tempfile::tempdir().unwrap();
        let path = fifo(&directory);
        let (receiver, keeper) = open_input(path.to_str().unwrap()).unwrap();
        let (guest, mut agent) = UnixStream::pair().unwrap();
        let copy = tokio::spawn(copy_in(receiver, guest));
        for text in ["one", "two"] {
            // A writer comes and goes, as a restarting containerd does.
            let mut writer = pipe::OpenOptions::new().open_sender(&path).unwrap();
            writer.write_all(text.as_bytes()).await.unwrap();
            drop(writer);
            let mut received = [0u8; 3];
            agent.read_exact(&mut received).await.unwrap();
            assert_eq!(received, text.as_bytes());
        }
        drop(keeper);
        copy.await.unwrap();
        assert_eq!(agent.read(&mut [0u8; 1]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn files_are_appended_to_and_unknown_kinds_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        std::fs::write(&path, "old ").unwrap();
        let uri = format!("file://{}", path.display());
        let sink = open_output("stdout", &uri).unwrap();
        let (guest, mut agent) = UnixStream::pair().unwrap();
        agent.write_all(b"new").await.unwrap();
        drop(agent);
        copy_out(guest, sink, "stdout").await;
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "old new");
        assert!(matches!(
            open_output("stdout", "tcp://host:1"),
            Err(StreamError::Scheme { .. })
        ));
        assert!(open_input("/nowhere/at/all").is_err());
    }
}
