//! All connections of a device, between its queues and their sockets.
//!
//! The muxer belongs to the device's thread. [`Muxer::work`] is one round over
//! the queues: what the guest sent goes to its connections, and connections with
//! something to send get a receive buffer each in turn. A round is bounded, so
//! that a guest that never stops sending keeps the thread neither from its
//! sockets nor from being stopped.

use std::collections::{HashMap, VecDeque};
use std::os::unix::net::UnixStream;

use nacre_protocol::guest::AGENT_PORT;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use vmm_sys_util::epoll::EventSet;

use super::connection::{Connection, Emitted, Fate};
use super::device::Dialed;
use super::packet::{HEADER_BYTES, HOST_CID, Header, Operation, TYPE_STREAM};
use crate::virtio::GuestMemory;
use crate::virtio::buffers::{Buffers, Direction};
use crate::virtio::complaints::Complaints;
use crate::virtio::ring::{Ring, RingError};
use crate::worker::Poller;

/// Token of the receive queue's kick. Connections' tokens are at least 2^32,
/// as no host port is 0.
pub const RX_TOKEN: u64 = 0;
/// Token of the transmit queue's kick.
pub const TX_TOKEN: u64 = 1;

/// Most connections at a time.
pub const MAX_CONNECTIONS: usize = 1024;
/// Most of them that the guest dialled: the agent needs one.
pub const MAX_GUEST_DIALED: usize = 4;
/// Most resets that wait for receive buffers.
const MAX_RESETS: usize = 256;
/// Most chains of a queue in one round.
const BATCH: usize = 256;
/// Our ports of connections we dial, up to the last that is not "any".
const FIRST_EPHEMERAL: u32 = 1 << 31;
const LAST_EPHEMERAL: u32 = u32::MAX - 1;

/// Names a connection: its ports at both ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    host_port: u32,
    guest_port: u32,
}

impl Key {
    fn token(self) -> u64 {
        u64::from(self.host_port) << 32 | u64::from(self.guest_port)
    }

    fn from_token(token: u64) -> Self {
        #[allow(clippy::cast_possible_truncation, reason = "takes both halves")]
        Self {
            host_port: (token >> 32) as u32,
            guest_port: token as u32,
        }
    }
}

struct Entry {
    connection: Connection,
    guest_dialed: bool,
    /// It is in `ready`.
    queued: bool,
    /// epoll watches for `EPOLLOUT`.
    watches_writable: bool,
}

/// All connections.
pub struct Muxer<'m> {
    memory: &'m GuestMemory,
    guest_cid: u64,
    rx: Ring<'m>,
    tx: Ring<'m>,
    buffers: Buffers<'m>,
    dialed: &'m Dialed,
    entries: HashMap<Key, Entry>,
    guest_dialed: usize,
    /// Connections that may have a packet for the guest.
    ready: VecDeque<Key>,
    /// Resets that belong to no connection.
    resets: VecDeque<Header>,
    next_port: u32,
    complaints: Complaints,
}

impl<'m> Muxer<'m> {
    /// A muxer without connections.
    pub fn new(
        memory: &'m GuestMemory,
        guest_cid: u64,
        rx: Ring<'m>,
        tx: Ring<'m>,
        dialed: &'m Dialed,
    ) -> Self {
        Self {
            memory,
            guest_cid,
            rx,
            tx,
            buffers: Buffers::default(),
            dialed,
            entries: HashMap::new(),
            guest_dialed: 0,
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: FIRST_EPHEMERAL,
            complaints: Complaints::new("vsock: the guest's mistake"),
        }
    }

    /// Dials `port` of the guest.
    pub fn dial(&mut self, port: u32, stream: UnixStream, poller: &Poller) {
        if self.entries.len() >= MAX_CONNECTIONS {
            tracing::warn!(port, "too many connections to dial the guest");
            return;
        }
        let key = self.free_key(port);
        self.insert(key, Connection::dial(stream), false, poller);
    }

    /// There are more ephemeral ports than connections, so one is free.
    fn free_key(&mut self, guest_port: u32) -> Key {
        loop {
            let host_port = self.next_port;
            self.next_port = match host_port {
                LAST_EPHEMERAL => FIRST_EPHEMERAL,
                port => port + 1,
            };
            let key = Key {
                host_port,
                guest_port,
            };
            if !self.entries.contains_key(&key) {
                return key;
            }
        }
    }

    /// Returns whether the connection is there.
    fn insert(
        &mut self,
        key: Key,
        connection: Connection,
        guest_dialed: bool,
        poller: &Poller,
    ) -> bool {
        let watched = poller.add(connection.stream(), socket_events(false), key.token());
        if let Err(error) = watched {
            tracing::warn!(%error, ?key, "connection cannot be watched");
            return false;
        }
        self.guest_dialed += usize::from(guest_dialed);
        let entry = Entry {
            connection,
            guest_dialed,
            queued: false,
            watches_writable: false,
        };
        self.entries.insert(key, entry);
        self.settle(key, Fate::Keep, poller);
        true
    }

    fn remove(&mut self, key: Key, poller: &Poller) {
        let Some(entry) = self.entries.remove(&key) else {
            return;
        };
        self.guest_dialed -= usize::from(entry.guest_dialed);
        // Closing the socket is not enough: the shim may still hold a
        // duplicate, and epoll watches the open file.
        if let Err(error) = poller.remove(entry.connection.stream()) {
            tracing::warn!(%error, ?key, "connection cannot be unwatched");
        }
    }

    /// Takes what epoll says of a connection's socket.
    pub fn socket_ready(&mut self, token: u64, events: EventSet, poller: &Poller) {
        let key = Key::from_token(token);
        if let Some(entry) = self.entries.get_mut(&key) {
            let fate = entry.connection.socket_ready(events);
            self.settle(key, fate, poller);
        }
    }

    /// One round over both queues. Returns whether another is due at once.
    ///
    /// # Errors
    ///
    /// When the driver broke a queue.
    pub fn work(&mut self, poller: &Poller) -> Result<bool, RingError> {
        let more_sent = self.transmit(poller)?;
        let more_to_send = self.deliver(poller)?;
        // What stopped `transmit` may be what `deliver` has just removed.
        let unblocked = more_sent && self.resets.len() < MAX_RESETS;
        self.tx.flush()?;
        self.rx.flush()?;
        Ok(unblocked || more_to_send)
    }

    /// Takes the guest's packets. Returns whether some may be left.
    fn transmit(&mut self, poller: &Poller) -> Result<bool, RingError> {
        for _ in 0..BATCH {
            if self.resets.len() >= MAX_RESETS {
                return Ok(true);
            }
            let Some(chain) = self.tx.take()? else {
                if self.tx.await_kick()? {
                    continue;
                }
                return Ok(false);
            };
            let head = chain.head_index();
            self.buffers.clear();
            match self
                .buffers
                .append(self.memory, chain, Direction::FromGuest)
            {
                Ok(_) => self.receive(poller),
                Err(error) => self.complaints.add(&error),
            }
            self.tx.give(head, 0)?;
        }
        Ok(true)
    }

    /// Takes the packet in `buffers`.
    fn receive(&mut self, poller: &Poller) {
        let Some(header) = Header::read(&self.buffers) else {
            return self.complaints.add(&"packet without a header");
        };
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return self.complaints.add(&"packet with a foreign CID");
        }
        let key = Key {
            host_port: header.dst_port,
            guest_port: header.src_port,
        };
        let operation = Operation::from_wire(header.op);
        let complete = header.len as usize <= self.buffers.len() - HEADER_BYTES;
        let valid = header.kind == TYPE_STREAM && (complete || operation != Some(Operation::Data));
        let (Some(operation), true) = (operation, valid) else {
            self.complaints
                .add(&"packet of unknown type or operation, or cut short");
            return self.refuse(key, &header, poller);
        };
        if let Some(entry) = self.entries.get_mut(&key) {
            let fate = entry
                .connection
                .receive(operation, &header, &mut self.buffers);
            return self.settle(key, fate, poller);
        }
        match operation {
            Operation::Request if self.accept(key, &header, poller) => {}
            Operation::Reset => {}
            _ => self.resets.push_back(header.reset()),
        }
    }

    /// Makes a connection of the guest's request, if it may have one.
    fn accept(&mut self, key: Key, request: &Header, poller: &Poller) -> bool {
        if key.host_port != AGENT_PORT
            || key.guest_port == u32::MAX
            || self.guest_dialed >= MAX_GUEST_DIALED
            || self.entries.len() >= MAX_CONNECTIONS
        {
            self.complaints.add(&"guest dials what it may not");
            return false;
        }
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (ours, theirs) = match socketpair(AddressFamily::Unix, SockType::Stream, None, flags) {
            Ok(pair) => pair,
            Err(error) => {
                tracing::warn!(%error, "no socket for the guest's connection");
                return false;
            }
        };
        let connection = Connection::accept(ours.into(), request);
        let accepted = self.insert(key, connection, true, poller);
        if accepted {
            (self.dialed)(key.host_port, theirs);
        }
        accepted
    }

    /// Answers a packet we cannot take with a reset, which also ends its
    /// connection.
    fn refuse(&mut self, key: Key, header: &Header, poller: &Poller) {
        self.remove(key, poller);
        if header.op != Operation::Reset as u16 {
            self.resets.push_back(header.reset());
        }
    }

    /// Brings lists and epoll in line with a connection after an event.
    fn settle(&mut self, key: Key, fate: Fate, poller: &Poller) {
        let Some(entry) = self.entries.get_mut(&key) else {
            return;
        };
        if fate != Fate::Keep {
            let draining = entry.connection.is_draining();
            if fate == Fate::Reset {
                self.resets.push_back(self.header(key, Operation::Reset));
            }
            // The host still gets what came before the guest's reset.
            if fate == Fate::Remove || !draining {
                self.remove(key, poller);
            }
            return;
        }
        if entry.connection.has_packet() && !entry.queued {
            entry.queued = true;
            self.ready.push_back(key);
        }
        let wants_writable = entry.connection.wants_writable();
        if wants_writable == entry.watches_writable {
            return;
        }
        entry.watches_writable = wants_writable;
        let events = socket_events(wants_writable);
        if let Err(error) = poller.modify(entry.connection.stream(), events, key.token()) {
            tracing::warn!(%error, ?key, "connection cannot be watched");
            self.resets.push_back(self.header(key, Operation::Reset));
            self.remove(key, poller);
        }
    }

    /// Fills the guest's receive buffers. Returns whether there is more to send
    /// and a buffer may be there for it.
    fn deliver(&mut self, poller: &Poller) -> Result<bool, RingError> {
        for _ in 0..BATCH {
            if self.resets.is_empty() && self.ready.is_empty() {
                return Ok(false);
            }
            let Some(chain) = self.rx.take()? else {
                if self.rx.await_kick()? {
                    continue;
                }
                return Ok(false);
            };
            let head = chain.head_index();
            self.buffers.clear();
            let room = self.buffers.append(self.memory, chain, Direction::ToGuest);
            match room {
                Ok(room) if room > HEADER_BYTES => match self.emit(poller) {
                    Some(len) => self.rx.give(head, len)?,
                    None => self.rx.put_back(1),
                },
                Ok(_) => {
                    self.complaints.add(&"receive buffer too small");
                    self.rx.give(head, 0)?;
                }
                Err(error) => {
                    self.complaints.add(&error);
                    self.rx.give(head, 0)?;
                }
            }
        }
        Ok(true)
    }

    /// Makes the next packet to the guest in `buffers`: its length.
    fn emit(&mut self, poller: &Poller) -> Option<usize> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(self.buffers.write(0, &reset.to_bytes()));
        }
        while let Some(key) = self.ready.pop_front() {
            let header = self.header(key, Operation::Data);
            let Some(entry) = self.entries.get_mut(&key) else {
                continue;
            };
            entry.queued = false;
            match entry.connection.emit(header, &mut self.buffers) {
                Emitted::Packet(len) => {
                    self.settle(key, Fate::Keep, poller);
                    return Some(len);
                }
                Emitted::Last(len) => {
                    self.remove(key, poller);
                    return Some(len);
                }
                Emitted::Nothing => {}
            }
        }
        None
    }

    fn header(&self, key: Key, operation: Operation) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: key.host_port,
            dst_port: key.guest_port,
            kind: TYPE_STREAM,
            op: operation as u16,
            ..Header::default()
        }
    }
}

/// Edge-triggered: a connection remembers what it is ready for, so a socket
/// whose data must wait for credit wakes nobody.
fn socket_events(writable: bool) -> EventSet {
    let events = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    if writable {
        events | EventSet::OUT
    } else {
        events
    }
}
