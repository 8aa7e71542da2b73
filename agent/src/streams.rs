//! The connections that carry standard streams, waiting to be claimed by id.
//!
//! The shim opens one connection per stream and sends its id first. It may do
//! so before or after the call that names the id; both sides wait for each
//! other here, for a bounded time.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, listen, socket,
};
use tokio::io::AsyncReadExt;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::time::timeout;

use crate::error::{Context, Error, Result};
use crate::io::{Stream, register};

/// How long a connection may take to say its id, and a call to find its
/// streams.
const LIMIT: Duration = Duration::from_secs(10);

/// Where stream connections come from.
#[derive(Debug)]
pub enum StreamListener {
    /// A port of the guest's vsock.
    Vsock(AsyncFd<OwnedFd>),
    /// A listening unix socket, in `serve` mode.
    Unix(AsyncFd<OwnedFd>),
}

impl StreamListener {
    /// Listens on a port of vsock.
    ///
    /// # Errors
    ///
    /// Those of socket(2), bind(2) and listen(2).
    pub fn vsock(port: u32) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let listener = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
        let any = VsockAddr::new(libc::VMADDR_CID_ANY, port);
        bind(listener.as_raw_fd(), &any)?;
        listen(&listener, Backlog::MAXCONN)?;
        Ok(Self::Vsock(register(listener)?))
    }

    /// Takes a listening unix stream socket.
    ///
    /// # Errors
    ///
    /// Those of fcntl(2) and epoll_ctl(2).
    pub fn unix(listener: OwnedFd) -> io::Result<Self> {
        crate::engine::spawn::nonblocking(&listener)?;
        Ok(Self::Unix(register(listener)?))
    }

    /// The next connection.
    ///
    /// # Errors
    ///
    /// Those of accept4(2).
    pub async fn accept(&self) -> io::Result<OwnedFd> {
        let (Self::Vsock(listener) | Self::Unix(listener)) = self;
        loop {
            let mut guard = listener.readable().await?;
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let accepted = guard.try_io(|fd| Ok(accept4(fd.get_ref().as_raw_fd(), flags)?));
            if let Ok(result) = accepted {
                // SAFETY: accept4 has just installed this descriptor for us.
                return result.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }
}

/// Connections by stream id.
#[derive(Debug, Default)]
pub struct StreamHub {
    waiting: Mutex<HashMap<u64, Stream>>,
    arrived: Notify,
}

impl StreamHub {
    /// Accepts connections for as long as the agent runs.
    pub async fn run(self: Arc<Self>, listener: StreamListener) {
        loop {
            match listener.accept().await {
                Ok(connection) => {
                    let hub = self.clone();
                    tokio::spawn(async move {
                        if let Err(error) = hub.greet(connection).await {
                            tracing::warn!("stream connection: {}", error.full());
                        }
                    });
                }
                Err(error) => {
                    tracing::error!("stream listener: {error}");
                    return;
                }
            }
        }
    }

    /// Reads the id a connection starts with.
    async fn greet(&self, connection: OwnedFd) -> Result<()> {
        let mut stream = Stream::new(connection).context("register")?;
        let id = timeout(LIMIT, stream.read_u64_le())
            .await
            .map_err(|_| Error::Internal("no stream id in time".into()))?
            .context("read stream id")?;
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.insert(id, stream);
        self.arrived.notify_waiters();
        Ok(())
    }

    /// Waits for the connection of stream `id`; `None` for id 0.
    ///
    /// # Errors
    ///
    /// `FailedPrecondition` if it does not come in time.
    pub async fn claim(&self, id: u64) -> Result<Option<Stream>> {
        if id == 0 {
            return Ok(None);
        }
        let arrival = async {
            loop {
                // Before looking, so that no arrival is missed.
                let arrived = self.arrived.notified();
                if let Some(stream) = self.take(id) {
                    return stream;
                }
                arrived.await;
            }
        };
        timeout(LIMIT, arrival)
            .await
            .map(Some)
            .map_err(|_| Error::FailedPrecondition(format!("stream {id} was not connected")))
    }

    fn take(&self, id: u64) -> Option<Stream> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.remove(&id)
    }
}
