//! Descriptors on tokio's reactor: pipes, terminals, vsock and unix sockets
//! alike.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use nix::errno::Errno;
use nix::sys::socket::{Shutdown, shutdown};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;

use crate::engine::spawn::nonblocking;

/// Puts a descriptor on the reactor.
///
/// # Errors
///
/// Those of epoll_ctl(2).
pub fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open descriptor until it is dropped,
    // and the AsyncFd deregisters it before that.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

/// A pollable descriptor, read and written with read(2) and write(2).
#[derive(Debug)]
pub struct Stream(AsyncFd<OwnedFd>);

impl Stream {
    /// Puts a descriptor on the reactor; it becomes non-blocking.
    ///
    /// # Errors
    ///
    /// Those of fcntl(2) and epoll_ctl(2).
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        nonblocking(&fd)?;
        Ok(Self(register(fd)?))
    }

    /// Reads what is there; 0 is the end. Waits if there is nothing.
    ///
    /// # Errors
    ///
    /// Those of read(2).
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut guard = self.0.readable().await?;
            if let Ok(result) = guard.try_io(|fd| read(fd.get_ref(), buffer)) {
                return result;
            }
        }
    }

    /// Reads what is there; `WouldBlock` if there is nothing.
    ///
    /// # Errors
    ///
    /// Those of read(2).
    pub fn read_now(&self, buffer: &mut [u8]) -> io::Result<usize> {
        read(self.0.get_ref(), buffer)
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    ///
    /// Those of write(2).
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut guard = self.0.writable().await?;
            match guard.try_io(|fd| write(fd.get_ref(), bytes)) {
                Ok(written) => bytes = bytes.get(written?..).unwrap_or_default(),
                Err(_not_ready) => {}
            }
        }
        Ok(())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

fn read(fd: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match nix::unistd::read(fd, buffer) {
            Err(Errno::EINTR) => {}
            result => return Ok(result?),
        }
    }
}

fn write(fd: &OwnedFd, bytes: &[u8]) -> io::Result<usize> {
    loop {
        match nix::unistd::write(fd, bytes) {
            Err(Errno::EINTR) => {}
            result => return Ok(result?),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(context))?;
            let space = buffer.initialize_unfilled();
            if let Ok(result) = guard.try_io(|fd| read(fd.get_ref(), space)) {
                return Poll::Ready(result.map(|bytes| buffer.advance(bytes)));
            }
        }
    }
}

/// Its shutdown is that of a socket.
impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(context))?;
            if let Ok(result) = guard.try_io(|fd| write(fd.get_ref(), bytes)) {
                return Poll::Ready(result);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(shutdown(self.0.as_raw_fd(), Shutdown::Write)?))
    }
}

/// The RPC connection: a [`Stream`] that tells when it breaks.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    broken: Arc<Notify>,
}

impl Connection {
    /// Wraps a connected socket; `broken` is notified at its end.
    ///
    /// # Errors
    ///
    /// Those of [`Stream::new`].
    pub fn new(socket: OwnedFd, broken: Arc<Notify>) -> io::Result<Self> {
        Ok(Self {
            stream: Stream::new(socket)?,
            broken,
        })
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let result = ready!(Pin::new(&mut self.stream).poll_read(context, buffer));
        if result.is_err() || buffer.filled().len() == before {
            self.broken.notify_one();
        }
        Poll::Ready(result)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = ready!(Pin::new(&mut self.stream).poll_write(context, bytes));
        if result.is_err() {
            self.broken.notify_one();
        }
        Poll::Ready(result)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
