//! The device against a driver, with real sockets.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use nacre_protocol::guest::{AGENT_PORT, GUEST_CID};
use proptest::prelude::*;
use vmm_sys_util::eventfd::EventFd;

use super::credit::BUF_ALLOC;
use super::muxer::MAX_GUEST_DIALED;
use super::packet::{
    HEADER_BYTES, HOST_CID, Header, Operation, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND,
    TYPE_STREAM,
};
use super::{Dialer, Vsock};
use crate::virtio::driver::{Driver, memory};
use crate::virtio::{Activation, GuestMemory, VIRTIO_F_EVENT_IDX, VirtioDevice};

const QUEUE: u16 = 16;
const RX_BUFFERS: u64 = 0x10_0000;
const RX_BYTES: u32 = 4096;
const TX_HEADER: u64 = 0x20_0000;
const TX_DATA: u64 = 0x21_0000;
const PORT: u32 = 1025;

/// The guest: its driver and as much of a socket layer as a test needs.
struct Guest<'m> {
    rx: Driver<'m>,
    tx: Driver<'m>,
    buf_alloc: u32,
    fwd_cnt: Wrapping<u32>,
}

impl<'m> Guest<'m> {
    fn activate(memory: &'m GuestMemory, device: &mut Vsock) -> Self {
        let mut rx = Driver::new(memory, 0, QUEUE);
        let tx = Driver::new(memory, 1, QUEUE);
        let events = Driver::new(memory, 2, QUEUE);
        for slot in 0..u64::from(QUEUE) {
            let address = RX_BUFFERS + slot * u64::from(RX_BYTES);
            rx.add(&[(address, RX_BYTES, true)]);
        }
        let queues = [&rx, &tx, &events].map(|driver| Some(driver.active()));
        device
            .activate(Activation {
                memory: memory.clone(),
                features: device.features() & !VIRTIO_F_EVENT_IDX,
                queues: queues.into(),
                config_interrupt: Arc::new(EventFd::new(0).unwrap()),
            })
            .unwrap();
        Self {
            rx,
            tx,
            buf_alloc: 64 * 1024,
            fwd_cnt: Wrapping(0),
        }
    }

    fn header(&self, host_port: u32, guest_port: u32, operation: Operation) -> Header {
        Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: guest_port,
            dst_port: host_port,
            kind: TYPE_STREAM,
            op: operation as u16,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt.0,
            ..Header::default()
        }
    }

    /// Sends a packet and waits until the device has taken it.
    fn send(&mut self, header: Header, data: &[u8]) {
        self.tx.store(TX_HEADER, &header.to_bytes());
        self.tx.store(TX_DATA, data);
        // In two pieces, to show that framing does not matter.
        let (first, second) = (data.len() / 2, data.len() - data.len() / 2);
        let chain = [
            (TX_HEADER, 20, false),
            (TX_HEADER + 20, 24, false),
            (TX_DATA, u32::try_from(first).unwrap(), false),
            (
                TX_DATA + u64::try_from(first).unwrap(),
                u32::try_from(second).unwrap(),
                false,
            ),
        ];
        self.send_chain(&chain);
    }

    fn send_chain(&mut self, chain: &[(u64, u32, bool)]) {
        self.tx.add(chain);
        self.tx.kick();
        self.tx.wait();
    }

    fn reply(&mut self, to: &Header, operation: Operation) {
        let header = self.header(to.src_port, to.dst_port, operation);
        self.send(header, b"");
    }

    fn send_data(&mut self, to: &Header, data: &[u8]) {
        let mut header = self.header(to.src_port, to.dst_port, Operation::Data);
        header.len = u32::try_from(data.len()).unwrap();
        self.send(header, data);
    }

    fn shut_down(&mut self, to: &Header, flags: u32) {
        let mut header = self.header(to.src_port, to.dst_port, Operation::Shutdown);
        header.flags = flags;
        self.send(header, b"");
    }

    /// The next packet for the guest.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        let (slot, len) = self.rx.wait();
        self.take(slot, len)
    }

    fn take(&mut self, slot: u16, len: u32) -> (Header, Vec<u8>) {
        let address = RX_BUFFERS + u64::from(slot) * u64::from(RX_BYTES);
        let bytes = self.rx.load(address, len as usize);
        let header = parse(&bytes);
        self.rx.add(&[(address, RX_BYTES, true)]);
        self.rx.kick();
        assert_eq!(bytes.len() - HEADER_BYTES, header.len as usize);
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, GUEST_CID));
        (header, bytes[HEADER_BYTES..].to_vec())
    }

    /// The next packet that is not about credit, which must be this operation.
    fn expect(&mut self, operation: Operation) -> (Header, Vec<u8>) {
        loop {
            let (header, data) = self.receive();
            if header.op == operation as u16 {
                return (header, data);
            }
            assert!(header.op >= Operation::CreditUpdate as u16, "{header:?}");
        }
    }

    /// Accepts the dial of the host to come.
    fn accept(&mut self) -> Header {
        let (request, _) = self.expect(Operation::Request);
        assert_eq!(request.dst_port, PORT);
        self.reply(&request, Operation::Response);
        request
    }
}

fn parse(bytes: &[u8]) -> Header {
    let memory = memory();
    let driver = Driver::new(&memory, 0, QUEUE);
    driver.store(RX_BUFFERS, bytes);
    let mut maker = Driver::new(&memory, 0, QUEUE);
    let mut queue = maker.queue();
    maker.add(&[(RX_BUFFERS, u32::try_from(bytes.len()).unwrap(), false)]);
    let chain = virtio_queue::QueueOwnedT::iter(&mut queue, &memory)
        .unwrap()
        .next()
        .unwrap();
    let mut buffers = crate::virtio::buffers::Buffers::default();
    let direction = crate::virtio::buffers::Direction::FromGuest;
    buffers.append(&memory, chain, direction).unwrap();
    Header::read(&buffers).unwrap()
}

type Dials = Receiver<(u32, UnixStream)>;

fn device() -> (Vsock, Dialer, Dials) {
    let (sender, dials) = channel();
    let (device, dialer) = Vsock::new(GUEST_CID, move |port, stream| {
        let stream = UnixStream::from(stream);
        stream.set_nonblocking(false).unwrap();
        sender.send((port, stream)).unwrap();
    })
    .unwrap();
    (device, dialer, dials)
}

/// A socket whose other end the guest is connected to.
fn dial(dialer: &Dialer) -> UnixStream {
    let (near, far) = UnixStream::pair().unwrap();
    near.set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    dialer.connect(PORT, far.into());
    near
}

fn read_all(mut stream: &UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|index| u8::try_from((index * 7 + index / 251) % 256).unwrap())
        .collect()
}

#[test]
fn config_space_is_the_cid() {
    let (device, _dialer, _dials) = device();
    let mut bytes = [0xff; 12];
    device.read_config(0, &mut bytes);
    assert_eq!(bytes, [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    device.read_config(u64::MAX, &mut bytes);
    assert_eq!(bytes, [0; 12]);
    assert!(Vsock::new(2, |_, _| {}).is_err());
    assert!(Vsock::new(u64::from(u32::MAX), |_, _| {}).is_err());
}

#[test]
fn host_dials_and_each_direction_ends_on_its_own() {
    let memory = memory();
    let (mut device, dialer, _dials) = device();
    let mut near = dial(&dialer);
    let mut guest = Guest::activate(&memory, &mut device);
    let request = guest.accept();

    near.write_all(b"to the guest").unwrap();
    assert_eq!(guest.expect(Operation::Data).1, b"to the guest");
    guest.send_data(&request, b"to the host");
    let mut bytes = [0; 11];
    near.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"to the host");

    near.shutdown(Shutdown::Write).unwrap();
    let (shutdown, _) = guest.expect(Operation::Shutdown);
    assert_eq!(shutdown.flags, SHUTDOWN_SEND);
    guest.send_data(&request, b"the last");
    guest.shut_down(&request, SHUTDOWN_SEND);
    assert_eq!(read_all(&near), b"the last");
    guest.expect(Operation::Reset);
}

#[test]
fn guest_ends_first_and_still_receives() {
    let memory = memory();
    let (mut device, dialer, _dials) = device();
    let mut guest = Guest::activate(&memory, &mut device);
    let mut near = dial(&dialer);
    let request = guest.accept();

    guest.shut_down(&request, SHUTDOWN_SEND);
    assert_eq!(read_all(&near), b"");
    near.write_all(b"more").unwrap();
    assert_eq!(guest.expect(Operation::Data).1, b"more");
    drop(near);
    guest.expect(Operation::Reset);
}

#[test]
fn closed_host_tells_the_guest_after_its_data() {
    let memory = memory();
    let (mut device, dialer, _dials) = device();
    let mut near = dial(&dialer);
    near.write_all(b"fire and forget").unwrap();
    drop(near);
    let mut guest = Guest::activate(&memory, &mut device);
    guest.accept();
    assert_eq!(guest.expect(Operation::Data).1, b"fire and forget");
    let (shutdown, _) = guest.expect(Operation::Shutdown);
    assert_eq!(shutdown.flags, SHUTDOWN_BOTH);
}

#[test]
fn data_of_a_closed_host_wait_for_credit() {
    let memory = memory();
    let (mut device, dialer, _dials) = device();
    let mut near = dial(&dialer);
    near.write_all(b"patience").unwrap();
    drop(near);
    let mut guest = Guest::activate(&memory, &mut device);
    guest.buf_alloc = 0;
    let request = guest.accept();
    let (shutdown, _) = guest.receive();
    assert_eq!(shutdown.op, Operation::Shutdown as u16);
    assert_eq!(shutdown.flags, SHUTDOWN_RECEIVE);
    assert_eq!(guest.receive().0.op, Operation::CreditRequest as u16);
    guest.buf_alloc = 100;
    guest.reply(&request, Operation::CreditUpdate);
    assert_eq!(guest.receive().1, b"patience");
    let (shutdown, _) = guest.receive();
    assert_eq!(shutdown.flags, SHUTDOWN_BOTH);
}

#[test]
fn guest_that_refuses_closes_the_stream() {
    let memory = memory();
    let (mut device, dialer, _dials) = device();
    let mut guest = Guest::activate(&memory, &mut device);
    let near = dial(&dialer);
    let (request, _) = guest.expect(Operation::Request);
    guest.reply(&request, Operation::Reset);
    assert_eq!(read_all(&near), b"");
}

#[test]
fn guest_dials_the_agent_port_only_and_not_too_often() {
    let memory = memory();
    let (mut device, _dialer, dials) = device();
    let mut guest = Guest::activate(&memory, &mut device);

    guest.send(guest.header(AGENT_PORT + 1, 5000, Operation::Request), b"");
    let (reset, _) = guest.expect(Operation::Reset);
    assert_eq!((reset.src_port, reset.dst_port), (AGENT_PORT + 1, 5000));

    let mut accepted = Vec::new();
    for index in 0..u32::try_from(MAX_GUEST_DIALED).unwrap() {
        guest.send(
            guest.header(AGENT_PORT, 5000 + index, Operation::Request),
            b"",
        );
        accepted.push(guest.expect(Operation::Response).0);
    }
    let (port, mut stream) = dials.recv().unwrap();
    assert_eq!(port, AGENT_PORT);
    stream.write_all(b"hello agent").unwrap();
    assert_eq!(guest.expect(Operation::Data).1, b"hello agent");

    guest.send(guest.header(AGENT_PORT, 6000, Operation::Request), b"");
    guest.expect(Operation::Reset);
    guest.reply(&accepted[0], Operation::Reset);
    assert_eq!(read_all(&stream), b"");
    guest.send(guest.header(AGENT_PORT, 6000, Operation::Request), b"");
    guest.expect(Operation::Response);
}

#[test]
fn a_mebibyte_to_the_guest_with_little_credit() {
    let memory = memory();
    let (mut device, dialer, _dials) = device();
    let mut guest = Guest::activate(&memory, &mut device);
    guest.buf_alloc = 5000;
    let mut near = dial(&dialer);
    let request = guest.accept();
    let sent = pattern(1 << 20);
    let bytes = sent.clone();
    let writer = std::thread::spawn(move || near.write_all(&bytes));

    let mut received = Vec::new();
    let mut unread = 0;
    while received.len() < sent.len() {
        let (header, data) = guest.receive();
        if header.op == Operation::Data as u16 {
            unread += data.len();
            assert!(unread <= 5000, "credit is exceeded");
            received.extend(data);
            continue;
        }
        // The writer may be gone by now, its data are not.
        if header.op == Operation::Shutdown as u16 {
            assert_eq!(header.flags, SHUTDOWN_RECEIVE);
            continue;
        }
        assert_eq!(header.op, Operation::CreditRequest as u16);
        guest.fwd_cnt += u32::try_from(std::mem::take(&mut unread)).unwrap();
        guest.reply(&request, Operation::CreditUpdate);
    }
    assert!(received == sent);
    writer.join().unwrap().unwrap();
    assert_eq!(guest.expect(Operation::Shutdown).0.flags, SHUTDOWN_BOTH);
}

#[test]
fn a_mebibyte_to_a_slow_host_stalls_nobody_else() {
    let memory = memory();
    let (mut device, dialer, _dials) = device();
    let mut guest = Guest::activate(&memory, &mut device);
    let slow = dial(&dialer);
    let request = guest.accept();
    let sent = pattern(1 << 20);
    let mut chunks = sent.chunks(32 * 1024);
    let mut credit = Credit::default();

    // Nobody reads: at some point credit is gone, and nothing is lost.
    while credit.take(32 * 1024) {
        guest.send_data(&request, chunks.next().unwrap());
        credit.listen(&mut guest);
    }
    let mut other = dial(&dialer);
    let second = guest.accept();
    guest.send_data(&second, b"quick");
    let mut bytes = [0; 5];
    other.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"quick");

    let reader = std::thread::spawn(move || read_all(&slow));
    for chunk in chunks {
        while !credit.take(u32::try_from(chunk.len()).unwrap()) {
            let (header, _) = guest.receive();
            credit.hear(&header);
        }
        guest.send_data(&request, chunk);
    }
    guest.shut_down(&request, SHUTDOWN_SEND);
    assert!(reader.join().unwrap() == sent);
}

/// The guest's account of what the device can take.
#[derive(Default)]
struct Credit {
    sent: Wrapping<u32>,
    fwd_cnt: Wrapping<u32>,
}

impl Credit {
    fn take(&mut self, len: u32) -> bool {
        let fits = (self.sent - self.fwd_cnt).0 + len <= BUF_ALLOC;
        if fits {
            self.sent += len;
        }
        fits
    }

    fn hear(&mut self, header: &Header) {
        assert_eq!(header.op, Operation::CreditUpdate as u16);
        self.fwd_cnt = Wrapping(header.fwd_cnt);
    }

    /// Takes the updates that are there already.
    fn listen(&mut self, guest: &mut Guest<'_>) {
        while let Some((slot, len)) = guest.rx.poll() {
            let (header, _) = guest.take(slot, len);
            self.hear(&header);
        }
    }
}

#[test]
fn held_data_outlive_the_guests_reset() {
    let memory = memory();
    let (mut device, dialer, _dials) = device();
    let mut guest = Guest::activate(&memory, &mut device);
    let near = dial(&dialer);
    let request = guest.accept();
    let sent = pattern(64 * 1024);
    let mut credit = Credit::default();
    let mut count = 0;
    while credit.take(64 * 1024) {
        guest.send_data(&request, &sent);
        credit.listen(&mut guest);
        count += 1;
    }
    guest.reply(&request, Operation::Reset);
    let received = read_all(&near);
    assert_eq!(received.len(), count * sent.len());
    assert!(received.chunks(sent.len()).all(|chunk| chunk == sent));
}

#[test]
fn guest_that_exceeds_its_credit_is_reset() {
    let memory = memory();
    let (mut device, dialer, _dials) = device();
    let mut guest = Guest::activate(&memory, &mut device);
    let _near = dial(&dialer);
    let request = guest.accept();
    let bytes = pattern(64 * 1024);
    loop {
        guest.send_data(&request, &bytes);
        if let Some((slot, len)) = guest.rx.poll() {
            let (header, _) = guest.take(slot, len);
            if header.op == Operation::Reset as u16 {
                return;
            }
        }
    }
}

#[test]
fn malformed_packets_hurt_only_their_connection() {
    let memory = memory();
    let (mut device, dialer, _dials) = device();
    let mut guest = Guest::activate(&memory, &mut device);
    let near = dial(&dialer);
    let request = guest.accept();

    guest.send_chain(&[(TX_HEADER, 10, false)]);
    guest.send_chain(&[(TX_HEADER, 44, true)]);
    guest.send_chain(&[(u64::MAX - 8, 44, false)]);
    guest.send_chain(&[(TX_HEADER, 44, false), (0xffff_0000, 4096, false)]);
    let mut foreign = guest.header(AGENT_PORT, 1, Operation::Request);
    foreign.src_cid = 77;
    guest.send(foreign, b"");
    let mut seqpacket = guest.header(AGENT_PORT, 1, Operation::Request);
    seqpacket.kind = 2;
    guest.send(seqpacket, b"");
    assert_eq!(guest.expect(Operation::Reset).0.kind, 2);
    let mut unknown = guest.header(AGENT_PORT, 9, Operation::Request);
    unknown.op = 99;
    guest.send(unknown, b"");
    assert_eq!(guest.expect(Operation::Reset).0.dst_port, 9);
    guest.send(guest.header(7, 7, Operation::Data), b"");
    assert_eq!(guest.expect(Operation::Reset).0.dst_port, 7);

    // The connection has not noticed, until it is its turn.
    guest.send_data(&request, b"fine");
    let mut bytes = [0; 4];
    (&near).read_exact(&mut bytes).unwrap();
    let mut short = guest.header(request.src_port, request.dst_port, Operation::Data);
    short.len = 1000;
    guest.send(short, b"not a thousand");
    guest.expect(Operation::Reset);
    assert_eq!(read_all(&near), b"");
}

#[test]
fn receive_buffers_without_room_are_given_back() {
    let memory = memory();
    let (mut device, dialer, _dials) = device();
    let mut rx = Driver::new(&memory, 0, QUEUE);
    rx.add(&[(RX_BUFFERS, 44, true)]);
    rx.add(&[(RX_BUFFERS, 4096, false)]);
    rx.add(&[(u64::MAX, 4096, true)]);
    rx.add(&[(RX_BUFFERS, 20, true), (RX_BUFFERS + 20, 25, true)]);
    let others = [1, 2].map(|index| Driver::new(&memory, index, QUEUE));
    let queues = [&rx, &others[0], &others[1]].map(|driver| Some(driver.active()));
    device
        .activate(Activation {
            memory: memory.clone(),
            features: device.features(),
            queues: queues.into(),
            config_interrupt: Arc::new(EventFd::new(0).unwrap()),
        })
        .unwrap();
    let _near = dial(&dialer);
    assert_eq!([0; 4].map(|_| rx.wait().1), [0, 0, 0, 44]);
}

#[test]
fn reset_closes_connections_and_the_device_works_again() {
    let memory = memory();
    let (mut device, dialer, _dials) = device();
    let mut guest = Guest::activate(&memory, &mut device);
    let near = dial(&dialer);
    guest.accept();
    device.reset();
    assert_eq!(read_all(&near), b"");

    let mut again = dial(&dialer);
    let mut guest = Guest::activate(&memory, &mut device);
    guest.accept();
    again.write_all(b"again").unwrap();
    assert_eq!(guest.expect(Operation::Data).1, b"again");
}

#[test]
fn broken_queue_closes_connections_and_dials() {
    let memory = memory();
    let (mut device, dialer, _dials) = device();
    let mut guest = Guest::activate(&memory, &mut device);
    let near = dial(&dialer);
    guest.accept();
    // An available index further ahead than the queue is long.
    guest.tx.store(0x4000 + 0x2000 + 2, &1000u16.to_le_bytes());
    guest.tx.kick();
    assert_eq!(read_all(&near), b"");
    assert_eq!(read_all(&dial(&dialer)), b"");
    device.reset();
    let mut guest = Guest::activate(&memory, &mut device);
    let _near = dial(&dialer);
    guest.accept();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn no_packet_stops_the_device(
        packets in prop::collection::vec(
            (0u16..10, 0u16..3, prop::sample::select(vec![AGENT_PORT, 1 << 31, 7]),
             prop::sample::select(vec![PORT, 7, u32::MAX]), any::<[u32; 4]>(), 0usize..3000),
            1..60,
        )
    ) {
        let memory = memory();
        let (mut device, dialer, _dials) = device();
        let mut guest = Guest::activate(&memory, &mut device);
        let _near = dial(&dialer);
        guest.accept();
        for (op, kind, host_port, guest_port, fields, len) in packets {
            let mut header = guest.header(host_port, guest_port, Operation::Data);
            (header.op, header.kind) = (op, kind);
            [header.flags, header.buf_alloc, header.fwd_cnt, header.len] = fields;
            if fields[3] % 2 == 0 {
                header.len = u32::try_from(len).unwrap();
            }
            guest.send(header, &vec![1; len]);
            while let Some((slot, len)) = guest.rx.poll() {
                guest.take(slot, len);
            }
        }
        let _near = dial(&dialer);
        loop {
            let (header, _) = guest.receive();
            if header.op == Operation::Request as u16 && header.dst_port == PORT {
                break;
            }
        }
    }
}
