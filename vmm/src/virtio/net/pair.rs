//! A queue pair without vhost: packets go between the tap and the guest's
//! buffers, one system call each and no copy of ours.
//!
//! Towards the guest, as many receive buffers are gathered as the largest packet
//! may need, read into at once, and given back as far as the packet filled them;
//! the rest wait for the next. With `VIRTIO_NET_F_MRG_RXBUF` a packet may fill
//! several (virtio 1.2, 5.1.6.4), without it has one buffer.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;

use vmm_sys_util::epoll::EventSet;

use super::tap::HEADER_BYTES;
use crate::virtio::buffers::{Buffers, Direction, MAX_PIECES};
use crate::virtio::complaints::Complaints;
use crate::virtio::ring::{Ring, RingError};
use crate::virtio::{ActiveQueue, GuestMemory};
use crate::worker::Poller;

const RX_TOKEN: u64 = 0;
const TX_TOKEN: u64 = 1;
const TAP_TOKEN: u64 = 2;
/// Most packets of a direction between two looks at the other.
const BATCH: usize = 64;
/// Most pieces gathered, so that the next chain still fits.
const GATHERED_PIECES: usize = MAX_PIECES / 2;
/// Where the header counts the buffers of a packet.
const NUM_BUFFERS_OFFSET: usize = 10;

/// How packets may arrive at the guest.
#[derive(Debug, Clone, Copy)]
pub struct Receive {
    /// A packet may fill several buffers.
    pub mergeable: bool,
    /// Largest packet of the tap, header included.
    pub max_bytes: usize,
}

/// Receive and transmit queue.
pub struct Queues {
    /// To the guest.
    pub rx: ActiveQueue,
    /// From the guest.
    pub tx: ActiveQueue,
}

/// Moves packets until told to stop. `tap` is non-blocking.
///
/// # Errors
///
/// When the driver broke a queue.
pub fn serve<T: AsRawFd>(
    poller: &mut Poller,
    memory: &GuestMemory,
    queues: Queues,
    tap: &T,
    receive: Receive,
) -> Result<(), RingError> {
    let mut pair = Pair {
        memory,
        tap,
        receive,
        rx: Ring::new(memory, queues.rx),
        tx: Ring::new(memory, queues.tx),
        gathered: Buffers::default(),
        chains: VecDeque::new(),
        outgoing: Buffers::default(),
        tap_readable: true,
        tap_writable: true,
        complaints: Complaints::new("net: the guest's mistake"),
    };
    let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
    poller
        .add(pair.rx.kick(), edge, RX_TOKEN)
        .and_then(|()| poller.add(pair.tx.kick(), edge, TX_TOKEN))
        .and_then(|()| poller.add(tap, edge | EventSet::OUT, TAP_TOKEN))
        .map_err(RingError::Poll)?;
    let mut busy = true;
    while let Some(events) = poller
        .wait(if busy { 0 } else { -1 })
        .map_err(RingError::Poll)?
    {
        if events.iter().any(|event| event.data() == TAP_TOKEN) {
            pair.tap_readable = true;
            pair.tap_writable = true;
        }
        let more_to_send = pair.transmit()?;
        let more_to_come = pair.receive()?;
        busy = more_to_send || more_to_come;
        pair.tx.flush()?;
        pair.rx.flush()?;
    }
    Ok(())
}

/// A receive buffer taken from the queue, its pieces in `Pair::gathered`.
struct Gathered {
    head: u16,
    bytes: usize,
    pieces: usize,
}

struct Pair<'m, 't, T> {
    memory: &'m GuestMemory,
    tap: &'t T,
    receive: Receive,
    rx: Ring<'m>,
    tx: Ring<'m>,
    gathered: Buffers<'m>,
    chains: VecDeque<Gathered>,
    outgoing: Buffers<'m>,
    tap_readable: bool,
    tap_writable: bool,
    complaints: Complaints,
}

impl<T: AsRawFd> Pair<'_, '_, T> {
    /// Takes the guest's packets. Returns whether there may be more.
    fn transmit(&mut self) -> Result<bool, RingError> {
        if !self.tap_writable {
            return Ok(false);
        }
        for _ in 0..BATCH {
            let Some(chain) = self.tx.take()? else {
                if self.tx.await_kick()? {
                    continue;
                }
                return Ok(false);
            };
            let head = chain.head_index();
            self.outgoing.clear();
            let len = self
                .outgoing
                .append(self.memory, chain, Direction::FromGuest);
            match len {
                Ok(len) if len > HEADER_BYTES => {
                    if !self.write_packet(len) {
                        self.tx.put_back(1);
                        return Ok(false);
                    }
                }
                Ok(_) => self.complaints.add(&"packet without a header"),
                Err(error) => self.complaints.add(&error),
            }
            self.tx.give(head, 0)?;
        }
        Ok(true)
    }

    /// Returns whether the packet is dealt with: sent, or dropped because the
    /// tap refuses it, as a network may.
    fn write_packet(&mut self, len: usize) -> bool {
        match self.outgoing.write_to(self.tap, 0, len) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.tap_writable = false;
                return false;
            }
            Err(error) => tracing::debug!(%error, len, "tap drops a packet"),
        }
        true
    }

    /// Fills the guest's buffers. Returns whether there may be more to come.
    fn receive(&mut self) -> Result<bool, RingError> {
        for _ in 0..BATCH {
            if !self.tap_readable || !self.gather()? {
                return Ok(false);
            }
            let room = self.room();
            match self.gathered.read_from(self.tap, 0, room) {
                Ok(len) if len > HEADER_BYTES => self.give_packet(len)?,
                Ok(len) => tracing::debug!(len, "tap sends no packet"),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.tap_readable = false;
                }
                // The tap is down, or this queue of it detached: an event says
                // when that changes.
                Err(error) => {
                    tracing::debug!(%error, "tap cannot be read");
                    self.tap_readable = false;
                }
            }
        }
        Ok(true)
    }

    /// Bytes the next packet may have: of one buffer or of all.
    fn room(&self) -> usize {
        match self.chains.front() {
            Some(first) if !self.receive.mergeable => first.bytes,
            _ => self.gathered.len(),
        }
    }

    /// Takes receive buffers until a packet surely fits; whether it does.
    fn gather(&mut self) -> Result<bool, RingError> {
        while !self.has_room() {
            let Some(chain) = self.rx.take()? else {
                if self.rx.await_kick()? {
                    continue;
                }
                return Ok(false);
            };
            let head = chain.head_index();
            let before = self.gathered.pieces();
            let appended = self.gathered.append(self.memory, chain, Direction::ToGuest);
            match appended {
                Ok(bytes) if bytes > HEADER_BYTES => self.chains.push_back(Gathered {
                    head,
                    bytes,
                    pieces: self.gathered.pieces() - before,
                }),
                refused => {
                    match refused {
                        Ok(_) => self.complaints.add(&"receive buffer too small"),
                        Err(error) => self.complaints.add(&error),
                    }
                    self.gathered.truncate(before);
                    self.rx.give(head, 0)?;
                }
            }
        }
        Ok(true)
    }

    /// A driver that gave all the buffers it can has no better to offer.
    fn has_room(&self) -> bool {
        if !self.receive.mergeable {
            return !self.chains.is_empty();
        }
        self.gathered.len() >= self.receive.max_bytes
            || self.gathered.pieces() >= GATHERED_PIECES
            || self.chains.len() >= self.rx.size()
    }

    /// Gives back the buffers that a packet of `len` bytes fills.
    fn give_packet(&mut self, len: usize) -> Result<(), RingError> {
        let mut ends = self.chains.iter().scan(0, |end, chain| {
            *end += chain.bytes;
            Some(*end)
        });
        let count = ends.position(|end| end >= len).map_or(0, |last| last + 1);
        // At most as many as the queue has.
        let num_buffers = u16::try_from(count).unwrap_or(u16::MAX);
        self.gathered
            .write(NUM_BUFFERS_OFFSET, &num_buffers.to_le_bytes());
        let mut left = len;
        let mut pieces = 0;
        for chain in self.chains.drain(..count) {
            let used = left.min(chain.bytes);
            left -= used;
            pieces += chain.pieces;
            self.rx.give(chain.head, used)?;
        }
        self.gathered.discard(pieces);
        Ok(())
    }
}
