//! The guest of these tests: its driver and as much of a socket layer as a test
//! needs.

use std::io::Read;
use std::num::Wrapping;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use nacre_protocol::guest::GUEST_CID;
use vmm_sys_util::eventfd::EventFd;

use super::super::packet::{HEADER_BYTES, HOST_CID, Header, Operation, TYPE_STREAM};
use super::super::{Dialer, Vsock};
use crate::virtio::driver::{Driver, memory};
use crate::virtio::{Activation, GuestMemory, VIRTIO_F_EVENT_IDX, VirtioDevice};

pub const QUEUE: u16 = 16;
pub const RX_BUFFERS: u64 = 0x10_0000;
pub const RX_BYTES: u32 = 4096;
pub const TX_HEADER: u64 = 0x20_0000;
pub const TX_DATA: u64 = 0x21_0000;
pub const PORT: u32 = 1025;

/// The guest: its driver and as much of a socket layer as a test needs.
pub struct Guest<'m> {
    pub rx: Driver<'m>,
    pub tx: Driver<'m>,
    pub buf_alloc: u32,
    pub fwd_cnt: Wrapping<u32>,
}

impl<'m> Guest<'m> {
    pub fn activate(memory: &'m GuestMemory, device: &mut Vsock) -> Self {
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

    pub fn header(&self, host_port: u32, guest_port: u32, operation: Operation) -> Header {
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
    pub fn send(&mut self, header: Header, data: &[u8]) {
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

    pub fn send_chain(&mut self, chain: &[(u64, u32, bool)]) {
        self.tx.add(chain);
        self.tx.kick();
        self.tx.wait();
    }

    pub fn reply(&mut self, to: &Header, operation: Operation) {
        let header = self.header(to.src_port, to.dst_port, operation);
        self.send(header, b"");
    }

    pub fn send_data(&mut self, to: &Header, data: &[u8]) {
        let mut header = self.header(to.src_port, to.dst_port, Operation::Data);
        header.len = u32::try_from(data.len()).unwrap();
        self.send(header, data);
    }

    pub fn shut_down(&mut self, to: &Header, flags: u32) {
        let mut header = self.header(to.src_port, to.dst_port, Operation::Shutdown);
        header.flags = flags;
        self.send(header, b"");
    }

    /// The next packet for the guest.
    pub fn receive(&mut self) -> (Header, Vec<u8>) {
        let (slot, len) = self.rx.wait();
        self.take(slot, len)
    }

    pub fn take(&mut self, slot: u16, len: u32) -> (Header, Vec<u8>) {
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
    pub fn expect(&mut self, operation: Operation) -> (Header, Vec<u8>) {
        loop {
            let (header, data) = self.receive();
            if header.op == operation as u16 {
                return (header, data);
            }
            assert!(header.op >= Operation::CreditUpdate as u16, "{header:?}");
        }
    }

    /// Accepts the dial of the host to come.
    pub fn accept(&mut self) -> Header {
        let (request, _) = self.expect(Operation::Request);
        assert_eq!(request.dst_port, PORT);
        self.reply(&request, Operation::Response);
        request
    }
}

pub fn parse(bytes: &[u8]) -> Header {
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

pub type Dials = Receiver<(u32, UnixStream)>;

pub fn device() -> (Vsock, Dialer, Dials) {
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
pub fn dial(dialer: &Dialer) -> UnixStream {
    let (near, far) = UnixStream::pair().unwrap();
    near.set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    dialer.connect(PORT, far.into());
    near
}

pub fn read_all(mut stream: &UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

pub fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|index| u8::try_from((index * 7 + index / 251) % 256).unwrap())
        .collect()
}
