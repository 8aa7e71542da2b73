//! One connection: a unix stream socket on our side, credit on the guest's.
//!
//! A connection does not touch queues or epoll. It is told what the guest sent
//! ([`Connection::receive`]) and what its socket is ready for
//! ([`Connection::socket_ready`]), and it is asked for the next packet to the
//! guest ([`Connection::emit`]).

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use vmm_sys_util::epoll::EventSet;

use super::credit::Credit;
use super::packet::{
    HEADER_BYTES, Header, Operation, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND,
};
use crate::virtio::buffers::Buffers;

/// Most data in one packet, what Linux uses.
const MAX_DATA_BYTES: usize = 64 * 1024;
/// A drained buffer keeps no more memory than this.
const KEPT_BYTES: usize = 16 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// We sent, or will send, a request; the guest has not answered.
    Connecting,
    Established,
    /// Over for the guest; the host's reader still has data to come.
    Draining,
}

/// What becomes of a connection after an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It lives.
    Keep,
    /// It is over, and the guest knows.
    Remove,
    /// It is over, and the guest must be told with a reset.
    Reset,
}

/// What [`Connection::emit`] made of a receive buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Emitted {
    /// A packet of this many bytes, header included.
    Packet(usize),
    /// The last packet of the connection.
    Last(usize),
    /// Nothing: the buffer is untouched.
    Nothing,
}

/// Packets without data that wait for a receive buffer.
#[derive(Debug, Default)]
struct Pending {
    request: bool,
    response: bool,
    reset: bool,
    credit_update: bool,
    credit_request: bool,
}

/// One connection.
pub struct Connection {
    stream: UnixStream,
    state: State,
    pending: Pending,

    credit: Credit,
    /// The guest was asked for credit since it last had any.
    asked_credit: bool,

    /// Data of the guest that the socket has not taken yet.
    buffer: VecDeque<u8>,

    /// The socket may have something to read.
    readable: bool,
    /// The socket's other end will write no more; read until its end.
    hung_up: bool,
    /// No more data will go to the guest.
    host_done: bool,
    /// The socket's other end is closed: nobody reads what the guest sends.
    host_gone: bool,
    /// The guest will send no more.
    guest_done: bool,
    /// The guest will receive no more.
    guest_deaf: bool,
    /// Flags of the last shutdown we sent.
    told_shutdown: u32,
}

impl Connection {
    fn new(stream: UnixStream, state: State) -> Self {
        Self {
            stream,
            state,
            pending: Pending::default(),
            credit: Credit::default(),
            asked_credit: false,
            buffer: VecDeque::new(),
            readable: false,
            hung_up: false,
            host_done: false,
            host_gone: false,
            guest_done: false,
            guest_deaf: false,
            told_shutdown: 0,
        }
    }

    /// A connection we dial: its first packet is a request.
    #[must_use]
    pub fn dial(stream: UnixStream) -> Self {
        let mut connection = Self::new(stream, State::Connecting);
        connection.pending.request = true;
        connection
    }

    /// A connection the guest dialled with `request`: its first packet is a
    /// response.
    #[must_use]
    pub fn accept(stream: UnixStream, request: &Header) -> Self {
        let mut connection = Self::new(stream, State::Established);
        connection.pending.response = true;
        connection.update_credit(request);
        connection
    }

    /// The socket.
    #[must_use]
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Whether the guest still takes part.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.state == State::Draining
    }

    /// Whether it must hear when the socket takes data again.
    #[must_use]
    pub fn wants_writable(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// Whether [`Connection::emit`] may have a packet.
    #[must_use]
    pub fn has_packet(&self) -> bool {
        let pending = &self.pending;
        match self.state {
            State::Draining => false,
            State::Connecting => pending.request || pending.reset,
            State::Established => {
                pending.response
                    || pending.reset
                    || pending.credit_update
                    || pending.credit_request
                    || self.untold_shutdown()
                    || self.may_read() && (self.credit.available() > 0 || !self.asked_credit)
            }
        }
    }

    fn may_read(&self) -> bool {
        self.readable && !self.host_done
    }

    /// The guest must hear of the end of a direction. The end of ours waits
    /// until all data before it was sent.
    fn untold_shutdown(&self) -> bool {
        self.shutdown_flags() & !self.told_shutdown != 0
    }

    fn shutdown_flags(&self) -> u32 {
        let send = if self.host_done { SHUTDOWN_SEND } else { 0 };
        let receive = if self.host_gone { SHUTDOWN_RECEIVE } else { 0 };
        send | receive
    }

    fn update_credit(&mut self, header: &Header) {
        self.credit.hear(header);
        if self.credit.available() > 0 {
            self.asked_credit = false;
        }
    }

    /// Takes a packet of the guest; its data are in `buffers` after the header,
    /// and there are as many as the header says.
    pub fn receive(
        &mut self,
        operation: Operation,
        header: &Header,
        buffers: &mut Buffers<'_>,
    ) -> Fate {
        if self.state == State::Draining {
            return match operation {
                Operation::Reset => Fate::Keep,
                _ => Fate::Reset,
            };
        }
        self.update_credit(header);
        match (operation, self.state) {
            (Operation::Reset, _) => self.drain(),
            (Operation::Response, State::Connecting) => {
                self.state = State::Established;
                Fate::Keep
            }
            (Operation::Data, State::Established) => self.receive_data(header.len, buffers),
            (Operation::Shutdown, State::Established) => self.receive_shutdown(header.flags),
            (Operation::CreditUpdate, State::Established) => Fate::Keep,
            (Operation::CreditRequest, State::Established) => {
                self.pending.credit_update = true;
                Fate::Keep
            }
            _ => Fate::Reset,
        }
    }

    /// The guest has reset the connection: what it sent before still counts.
    fn drain(&mut self) -> Fate {
        if self.state == State::Established && !self.buffer.is_empty() {
            self.state = State::Draining;
            Fate::Keep
        } else {
            Fate::Remove
        }
    }

    fn receive_data(&mut self, len: u32, buffers: &mut Buffers<'_>) -> Fate {
        if self.guest_done || !self.credit.receive(len) {
            return Fate::Reset;
        }
        if self.host_gone {
            self.forward(len as usize);
            return Fate::Keep;
        }
        let mut written = 0;
        if self.buffer.is_empty() {
            written = match buffers.write_to(&self.stream, HEADER_BYTES, len as usize) {
                Ok(written) => written,
                Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
                Err(_) => {
                    self.lose_host();
                    return Fate::Keep;
                }
            };
            self.forward(written);
        }
        self.hold(buffers, written, len as usize);
        Fate::Keep
    }

    /// Copies the data from `written` on, which the socket did not take.
    fn hold(&mut self, buffers: &Buffers<'_>, mut written: usize, len: usize) {
        let mut bytes = [0; 4096];
        while written < len {
            let count = bytes.len().min(len - written);
            let Some(part) = bytes.get_mut(..count) else {
                return;
            };
            // The muxer has checked that the data are there.
            let read = buffers.read(HEADER_BYTES + written, part);
            self.buffer.extend(part.iter().take(read));
            written += count;
        }
    }

    /// Counts bytes that no longer take room.
    fn forward(&mut self, count: usize) {
        self.credit.forward(count);
        self.pending.credit_update |= self.credit.is_news();
    }

    /// Nobody reads the guest's data any more.
    fn lose_host(&mut self) {
        self.host_gone = true;
        self.buffer = VecDeque::new();
        self.credit.forward_all();
    }

    fn receive_shutdown(&mut self, flags: u32) -> Fate {
        if flags & SHUTDOWN_RECEIVE != 0 && !self.guest_deaf {
            self.guest_deaf = true;
            self.host_done = true;
            // The host's writer learns it by EPIPE. A socket whose other end
            // is closed cannot be shut down, nor need it be.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        if flags & SHUTDOWN_SEND != 0 && !self.guest_done {
            self.guest_done = true;
            self.finish_writing();
        }
        self.check_done();
        Fate::Keep
    }

    /// Passes the guest's end of data on, once all data are written.
    fn finish_writing(&mut self) {
        if self.guest_done && self.buffer.is_empty() && !self.host_gone {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    /// Both directions over: a reset makes it final (virtio 1.2, 5.10.6.5).
    fn check_done(&mut self) {
        if self.host_done && self.guest_done && self.buffer.is_empty() {
            self.pending.reset = true;
        }
    }

    /// Takes what epoll says of the socket.
    pub fn socket_ready(&mut self, events: EventSet) -> Fate {
        let gone = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        if gone || events.intersects(EventSet::IN | EventSet::READ_HANG_UP) {
            self.readable = true;
        }
        if gone || events.contains(EventSet::READ_HANG_UP) {
            self.hung_up = true;
        }
        if events.contains(EventSet::OUT) {
            self.flush();
        }
        if gone && !(self.guest_done && self.buffer.is_empty()) {
            self.lose_host();
        }
        self.check_done();
        match self.state {
            State::Draining if self.buffer.is_empty() => Fate::Remove,
            _ => Fate::Keep,
        }
    }

    /// Writes what is held.
    fn flush(&mut self) {
        while !self.buffer.is_empty() {
            let (first, second) = self.buffer.as_slices();
            let parts = [io::IoSlice::new(first), io::IoSlice::new(second)];
            match self.stream.write_vectored(&parts) {
                Ok(0) => return self.lose_host(),
                Ok(count) => {
                    self.buffer.drain(..count);
                    self.forward(count);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => return self.lose_host(),
            }
        }
        self.buffer.shrink_to(KEPT_BYTES);
        self.finish_writing();
    }

    /// Makes the next packet in `buffers`, which have room for a header and a
    /// byte at least. `header` comes with the addresses filled in.
    pub fn emit(&mut self, mut header: Header, buffers: &mut Buffers<'_>) -> Emitted {
        let Some((operation, data)) = self.next_packet(buffers) else {
            return Emitted::Nothing;
        };
        header.op = operation as u16;
        // At most MAX_DATA_BYTES.
        header.len = u32::try_from(data).unwrap_or(0);
        self.credit.tell(&mut header);
        self.pending.credit_update = false;
        if operation == Operation::Shutdown {
            header.flags = self.shutdown_flags();
            self.told_shutdown = header.flags;
        }
        buffers.write(0, &header.to_bytes());
        let len = HEADER_BYTES + data;
        // A guest that knows both directions to be over needs us no longer:
        // what it still sends is answered as for any unknown connection.
        if operation == Operation::Reset || self.told_shutdown == SHUTDOWN_BOTH {
            Emitted::Last(len)
        } else {
            Emitted::Packet(len)
        }
    }

    fn next_packet(&mut self, buffers: &mut Buffers<'_>) -> Option<(Operation, usize)> {
        if self.state == State::Draining {
            return None;
        }
        if self.pending.reset {
            return Some((Operation::Reset, 0));
        }
        if std::mem::take(&mut self.pending.request) {
            return Some((Operation::Request, 0));
        }
        if self.state == State::Connecting {
            return None;
        }
        if std::mem::take(&mut self.pending.response) {
            return Some((Operation::Response, 0));
        }
        if let Some(data) = self.read_data(buffers) {
            return Some((Operation::Data, data));
        }
        self.check_done();
        if self.pending.reset {
            return Some((Operation::Reset, 0));
        }
        if self.untold_shutdown() {
            return Some((Operation::Shutdown, 0));
        }
        if std::mem::take(&mut self.pending.credit_request) {
            return Some((Operation::CreditRequest, 0));
        }
        self.pending
            .credit_update
            .then_some((Operation::CreditUpdate, 0))
    }

    /// Reads from the socket into the packet; `None` if there is nothing, or
    /// no credit.
    fn read_data(&mut self, buffers: &mut Buffers<'_>) -> Option<usize> {
        if !self.may_read() {
            return None;
        }
        let credit = self.credit.available() as usize;
        if credit == 0 {
            self.pending.credit_request |= !std::mem::replace(&mut self.asked_credit, true);
            return None;
        }
        let room = buffers.len().saturating_sub(HEADER_BYTES);
        let want = room.min(credit).min(MAX_DATA_BYTES);
        match buffers.read_from(&self.stream, HEADER_BYTES, want) {
            Ok(0) => self.host_done = true,
            Ok(count) => {
                // A short read empties a stream; its end comes as an event.
                self.readable = count == want || self.hung_up;
                self.credit.send(count);
                return Some(count);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
            Err(_) => {
                self.host_done = true;
                self.lose_host();
            }
        }
        None
    }
}
