//! Control channel between shim and monitor: a `SOCK_SEQPACKET` socket pair on
//! which each packet is one JSON message and its descriptors (`SCM_RIGHTS`,
//! unix(7)).
//!
//! The kernel carries at most [`MAX_FDS_PER_PACKET`] descriptors in a packet, so
//! a message with more is preceded by packets of [`FDS_ONLY`] that hold the
//! rest. Both ends bound what they accept: a packet by [`MAX_MESSAGE_BYTES`], a
//! message's descriptors by [`MAX_FDS`].

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    recvmsg, sendmsg, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::vm::FdIndex;

/// The kernel's `SCM_MAX_FD`.
pub const MAX_FDS_PER_PACKET: usize = 253;
/// Most descriptors one message may carry.
pub const MAX_FDS: usize = 1024;
/// Largest packet; well under the default socket buffer.
pub const MAX_MESSAGE_BYTES: usize = 128 * 1024;
/// Body of a packet that only carries descriptors of the message to come.
pub const FDS_ONLY: &[u8] = b"fds";

/// Errors of [`Channel`].
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The other end is gone.
    #[error("control channel closed by the other end")]
    Closed,
    /// The socket failed. `WouldBlock` on a non-blocking channel means "later".
    #[error("control channel")]
    Io(#[from] io::Error),
    /// A message exceeds what this channel carries.
    #[error("control message of {bytes} bytes with {fds} descriptors exceeds the channel's limits")]
    TooLarge {
        /// Bytes of the message.
        bytes: usize,
        /// Descriptors with it.
        fds: usize,
    },
    /// A packet is not a message of this protocol.
    #[error("malformed control message: {0}")]
    Malformed(String),
}

impl From<Errno> for ChannelError {
    fn from(errno: Errno) -> Self {
        Self::Io(errno.into())
    }
}

/// A message's descriptors; each can be taken once.
#[derive(Debug, Default)]
pub struct Fds(Vec<Option<OwnedFd>>);

impl Fds {
    /// Takes the descriptor at `index`.
    ///
    /// # Errors
    ///
    /// `Malformed` if the index is out of range or was taken before.
    pub fn take(&mut self, index: FdIndex) -> Result<OwnedFd, ChannelError> {
        self.0
            .get_mut(index.0)
            .and_then(Option::take)
            .ok_or_else(|| ChannelError::Malformed(format!("no descriptor {}", index.0)))
    }
}

/// Collects the descriptors of an outgoing message.
#[derive(Debug, Default)]
pub struct FdList<'a>(Vec<BorrowedFd<'a>>);

impl<'a> FdList<'a> {
    /// Adds a descriptor and returns its place.
    pub fn push(&mut self, fd: BorrowedFd<'a>) -> FdIndex {
        self.0.push(fd);
        FdIndex(self.0.len() - 1)
    }
}

/// One end of the control channel.
///
/// Whether calls block is the socket's own `O_NONBLOCK`; one thread at a time
/// may receive.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
    pending: Vec<Option<OwnedFd>>,
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl From<OwnedFd> for Channel {
    fn from(socket: OwnedFd) -> Self {
        Self {
            socket,
            pending: Vec::new(),
        }
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.socket
    }
}

impl Channel {
    /// Makes a connected pair, close-on-exec.
    ///
    /// # Errors
    ///
    /// Those of socketpair(2).
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        Ok((a.into(), b.into()))
    }

    /// Sends a message with its descriptors.
    ///
    /// # Errors
    ///
    /// `TooLarge` before anything was sent; `Closed` if the peer is gone;
    /// `Io` otherwise.
    pub fn send<T: Serialize>(&self, message: &T, fds: &FdList<'_>) -> Result<(), ChannelError> {
        let body = serde_json::to_vec(message)
            .map_err(|error| ChannelError::Malformed(error.to_string()))?;
        if body.len() > MAX_MESSAGE_BYTES || fds.0.len() > MAX_FDS {
            return Err(ChannelError::TooLarge {
                bytes: body.len(),
                fds: fds.0.len(),
            });
        }
        let raw: Vec<RawFd> = fds.0.iter().map(AsRawFd::as_raw_fd).collect();
        let last_start = raw.len().saturating_sub(1) / MAX_FDS_PER_PACKET * MAX_FDS_PER_PACKET;
        let (first, last) = raw.split_at(last_start);
        for chunk in first.chunks(MAX_FDS_PER_PACKET) {
            self.send_packet(FDS_ONLY, chunk)?;
        }
        self.send_packet(&body, last)
    }

    /// Receives the next message and its descriptors.
    ///
    /// # Errors
    ///
    /// `Closed` at the end of the stream, `Malformed` for anything that is not
    /// a `T`, `Io` otherwise (`WouldBlock` on a non-blocking socket).
    pub fn recv<T: DeserializeOwned>(&mut self) -> Result<(T, Fds), ChannelError> {
        loop {
            let mut buffer = vec![0u8; MAX_MESSAGE_BYTES];
            let len = self.recv_packet(&mut buffer)?;
            let body = buffer.get(..len).unwrap_or_default();
            if self.pending.len() > MAX_FDS {
                return Err(ChannelError::TooLarge {
                    bytes: len,
                    fds: self.pending.len(),
                });
            }
            if body == FDS_ONLY {
                continue;
            }
            let fds = Fds(std::mem::take(&mut self.pending));
            let message = serde_json::from_slice(body)
                .map_err(|error| ChannelError::Malformed(error.to_string()))?;
            return Ok((message, fds));
        }
    }

    fn send_packet(&self, body: &[u8], fds: &[RawFd]) -> Result<(), ChannelError> {
        let rights = [ControlMessage::ScmRights(fds)];
        let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
        match sendmsg::<UnixAddr>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(body)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        ) {
            Ok(_) => Ok(()),
            Err(Errno::EPIPE | Errno::ECONNRESET) => Err(ChannelError::Closed),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Receives one packet into `buffer`, its descriptors into `pending`.
    ///
    /// A peer that ends with unread messages of ours resets the connection. The kernel
    /// tells that once, and before it hands out what the peer has sent: its last words
    /// are behind the error.
    fn recv_packet(&mut self, buffer: &mut [u8]) -> Result<usize, ChannelError> {
        match self.next_packet(buffer) {
            Err(ChannelError::Io(error)) if error.kind() == io::ErrorKind::ConnectionReset => {
                self.next_packet(buffer)
            }
            result => result,
        }
    }

    fn next_packet(&mut self, buffer: &mut [u8]) -> Result<usize, ChannelError> {
        let mut control = nix::cmsg_space!([RawFd; MAX_FDS_PER_PACKET]);
        let mut iov = [IoSliceMut::new(buffer)];
        let message = recvmsg::<UnixAddr>(
            self.socket.as_raw_fd(),
            &mut iov,
            Some(&mut control),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = part {
                // SAFETY: the kernel has just installed these descriptors in
                // this process for this message; nothing else knows them.
                let owned = raw
                    .into_iter()
                    .map(|fd| Some(unsafe { OwnedFd::from_raw_fd(fd) }));
                self.pending.extend(owned);
            }
        }
        if message
            .flags
            .intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC)
        {
            return Err(ChannelError::Malformed("truncated packet".into()));
        }
        match message.bytes {
            0 => Err(ChannelError::Closed),
            bytes => Ok(bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use nix::sys::resource::{Resource, getrlimit, setrlimit};

    use crate::vm::{Event, Request, StopReason};

    #[test]
    fn message_and_descriptor_arrive() {
        let (a, mut b) = Channel::pair().unwrap();
        let (mut near, far) = UnixStream::pair().unwrap();
        let mut fds = FdList::default();
        let stream = fds.push(far.as_fd());
        a.send(&Request::Connect { port: 7, stream }, &fds).unwrap();
        drop(far);

        let (request, mut fds) = b.recv::<Request>().unwrap();
        let Request::Connect { port: 7, stream } = request else {
            panic!("not the message sent: {request:?}");
        };
        let mut received = UnixStream::from(fds.take(stream).unwrap());
        received.write_all(b"x").unwrap();
        drop(received);
        let mut text = String::new();
        near.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
        assert!(fds.take(stream).is_err(), "a descriptor can be taken once");
    }

    #[test]
    fn more_descriptors_than_one_packet_holds() {
        let (a, mut b) = Channel::pair().unwrap();
        let (near, _far) = UnixStream::pair().unwrap();
        let mut fds = FdList::default();
        for _ in 0..600 {
            fds.push(near.as_fd());
        }
        let sender = std::thread::spawn(move || {
            let result = a.send(&Event::Booted, &fds_of(600, &near));
            (result, near)
        });
        let (event, mut received) = b.recv::<Event>().unwrap();
        sender.join().unwrap().0.unwrap();
        assert_eq!(event, Event::Booted);
        assert!(received.take(FdIndex(599)).is_ok());
        assert!(received.take(FdIndex(600)).is_err());
    }

    fn fds_of(count: usize, fd: &impl AsFd) -> FdList<'_> {
        let mut fds = FdList::default();
        for _ in 0..count {
            fds.push(fd.as_fd());
        }
        fds
    }

    /// Room for what the largest message carries, twice: sent and received.
    fn allow_descriptors() {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, hard.min(4096), hard).unwrap();
    }

    #[test]
    fn largest_message_arrives_and_a_larger_one_is_not_sent() {
        allow_descriptors();
        let (a, mut b) = Channel::pair().unwrap();
        let (near, _far) = UnixStream::pair().unwrap();
        // Two bytes are its quotation marks.
        let text = "x".repeat(MAX_MESSAGE_BYTES - 2);
        a.send(&text, &fds_of(MAX_FDS, &near)).unwrap();
        let (received, mut fds) = b.recv::<String>().unwrap();
        assert_eq!(received.len(), 131_070);
        assert!(fds.take(FdIndex(1023)).is_ok());

        let longer = format!("{text}x");
        for (text, count) in [(&longer, 0), (&text, MAX_FDS + 1), (&longer, MAX_FDS + 1)] {
            let refused = a.send(text, &fds_of(count, &near));
            assert!(
                matches!(refused, Err(ChannelError::TooLarge { bytes, fds })
                    if bytes == text.len() + 2 && fds == count),
                "{refused:?}"
            );
        }
        drop(a);
        assert!(matches!(b.recv::<String>(), Err(ChannelError::Closed)));
    }

    #[test]
    fn peer_that_sends_more_descriptors_is_refused() {
        allow_descriptors();
        let (a, mut b) = Channel::pair().unwrap();
        for _ in 0..MAX_FDS / MAX_FDS_PER_PACKET {
            let fds = [a.as_fd().as_raw_fd(); MAX_FDS_PER_PACKET];
            a.send_packet(FDS_ONLY, &fds).unwrap();
        }
        let rest = [a.as_fd().as_raw_fd(); MAX_FDS % MAX_FDS_PER_PACKET + 1];
        a.send_packet(FDS_ONLY, &rest).unwrap();
        drop(a);
        let refused = b.recv::<Event>();
        assert!(
            matches!(refused, Err(ChannelError::TooLarge { fds: 1025, .. })),
            "{refused:?}"
        );
    }

    #[test]
    fn last_words_arrive_of_a_peer_that_has_not_read_everything() {
        let (mut a, b) = Channel::pair().unwrap();
        a.send(&Request::Resize { growth_mib: 4 }, &FdList::default())
            .unwrap();
        let last = Event::Stopped(StopReason::Panic);
        for event in [&Event::Booted, &last] {
            b.send(event, &FdList::default()).unwrap();
        }
        drop(b);
        assert_eq!(a.recv::<Event>().unwrap().0, Event::Booted);
        assert_eq!(a.recv::<Event>().unwrap().0, last);
        assert!(matches!(a.recv::<Event>(), Err(ChannelError::Closed)));
    }

    #[test]
    fn closed_and_malformed_are_told_apart() {
        let (a, mut b) = Channel::pair().unwrap();
        a.send(&"nonsense", &FdList::default()).unwrap();
        assert!(matches!(b.recv::<Event>(), Err(ChannelError::Malformed(_))));
        a.send(&Event::Stopped(StopReason::Panic), &FdList::default())
            .unwrap();
        assert_eq!(
            b.recv::<Event>().unwrap().0,
            Event::Stopped(StopReason::Panic)
        );
        drop(a);
        assert!(matches!(b.recv::<Event>(), Err(ChannelError::Closed)));
    }
}
