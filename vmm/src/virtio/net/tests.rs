//! The data path over a datagram socket, and the device over real taps where
//! those can be had: root, in a network namespace of the test's own.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use virtio_bindings::virtio_net as spec;
use vmm_sys_util::eventfd::EventFd;

use super::pair::{self, Queues, Receive};
use super::{Net, NetError, control};
use crate::virtio::driver::{Driver, memory};
use crate::virtio::{Activation, GuestMemory, VirtioDevice};
use crate::worker::Worker;

const QUEUE: u16 = 16;
const RX: u64 = 0x10_0000;
const TX: u64 = 0x20_0000;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Local experimental ethertype: the kernel sends none of these by itself.
const ETHERTYPE: u16 = 0x88b5;
const MERGEABLE: u64 = 1 << spec::VIRTIO_NET_F_MRG_RXBUF;

fn header(num_buffers: u8) -> Vec<u8> {
    let mut header = vec![0; 12];
    header[10] = num_buffers;
    header
}

fn packet(payload: &[u8]) -> Vec<u8> {
    [header(0).as_slice(), payload].concat()
}

/// The data path between two drivers and a socket.
struct Path<'m> {
    rx: Driver<'m>,
    tx: Driver<'m>,
    far: UnixDatagram,
    worker: Option<Worker<()>>,
}

impl<'m> Path<'m> {
    fn new(memory: &'m GuestMemory, receive: Receive) -> Self {
        let (near, far) = UnixDatagram::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        Self::over(memory, receive, near, far)
    }

    fn over(
        memory: &'m GuestMemory,
        receive: Receive,
        near: UnixDatagram,
        far: UnixDatagram,
    ) -> Self {
        let rx = Driver::new(memory, 0, QUEUE);
        let tx = Driver::new(memory, 1, QUEUE);
        far.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let queues = Queues {
            rx: rx.active(),
            tx: tx.active(),
        };
        let memory = memory.clone();
        let worker = Worker::spawn("test", move |mut poller| {
            pair::serve(&mut poller, &memory, queues, &near, receive).unwrap();
        });
        Self {
            rx,
            tx,
            far,
            worker: Some(worker.unwrap()),
        }
    }

    fn received(&self) -> Vec<u8> {
        let mut bytes = vec![0; 70_000];
        let len = self.far.recv(&mut bytes).unwrap();
        bytes.truncate(len);
        bytes
    }
}

impl Drop for Path<'_> {
    fn drop(&mut self) {
        self.worker.take().unwrap().stop();
    }
}

fn small(mergeable: bool) -> Receive {
    Receive {
        mergeable,
        max_bytes: 1500,
    }
}

#[test]
fn guests_packets_reach_the_tap_and_malformed_ones_do_not() {
    let memory = memory();
    let mut path = Path::new(&memory, small(true));
    path.tx.store(TX, &packet(b"first"));
    path.tx.store(TX + 0x1000, &packet(b"second"));
    path.tx.add(&[(TX, 12, false)]);
    path.tx.add(&[(u64::MAX - 3, 100, false)]);
    path.tx.add(&[(TX, 100, true)]);
    path.tx.add(&[(TX, 12, false), (TX + 12, 5, false)]);
    path.tx.add(&[(TX + 0x1000, 18, false)]);
    path.tx.kick();
    assert_eq!([0; 5].map(|_| path.tx.wait().0), [0, 1, 2, 3, 5]);
    assert_eq!(path.received(), packet(b"first"));
    assert_eq!(path.received(), packet(b"second"));
}

#[test]
fn packet_waits_for_a_tap_that_is_full() {
    let memory = memory();
    let (near, far) = UnixDatagram::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    let mut queued = 0;
    while near.send(b"queued").is_ok() {
        queued += 1;
    }
    let mut path = Path::over(&memory, small(true), near, far);
    path.tx.store(TX, &packet(b"waits"));
    path.tx.add(&[(TX, 17, false)]);
    path.tx.kick();
    for _ in 0..queued {
        assert_eq!(path.received(), b"queued");
    }
    path.tx.wait();
    assert_eq!(path.received(), packet(b"waits"));
}

#[test]
fn packet_fills_as_many_buffers_as_it_needs() {
    let memory = memory();
    let mut path = Path::new(&memory, small(true));
    for slot in 0..u64::from(QUEUE) {
        path.rx.add(&[(RX + slot * 0x1000, 100, true)]);
    }
    path.rx.kick();
    let payload: Vec<u8> = (0..200).collect();
    path.far.send(&packet(&payload)).unwrap();
    path.far.send(&packet(b"small")).unwrap();

    assert_eq!(
        [0; 3].map(|_| path.rx.wait()),
        [(0, 100), (1, 100), (2, 12)]
    );
    let bytes = [0, 1, 2]
        .map(|slot| path.rx.load(RX + slot * 0x1000, 100))
        .concat();
    assert_eq!(bytes[..212], [header(3), payload].concat());
    // Of 16 buffers 13 are left: fewer than the largest packet may need.
    for slot in 0..3 {
        path.rx.add(&[(RX + slot * 0x1000, 100, true)]);
    }
    path.rx.kick();
    assert_eq!(path.rx.wait(), (3, 17));
    assert_eq!(
        path.rx.load(RX + 0x3000, 17),
        [&header(1), b"small".as_slice()].concat()
    );
}

#[test]
fn without_merging_a_packet_has_one_buffer() {
    let memory = memory();
    let mut path = Path::new(&memory, small(false));
    path.far.send(&packet(b"waits for a buffer")).unwrap();
    path.rx.add(&[(RX, 12, true)]);
    path.rx.add(&[(RX, 12, true), (RX + 12, 1500, true)]);
    path.rx.kick();
    assert_eq!(path.rx.wait(), (0, 0));
    assert_eq!(path.rx.wait(), (1, 30));
    assert_eq!(
        path.rx.load(RX, 30),
        [&header(1), b"waits for a buffer".as_slice()].concat()
    );
}

#[test]
fn control_queue_sets_pairs_and_refuses_the_rest() {
    let memory = memory();
    let mut driver = Driver::new(&memory, 0, QUEUE);
    let asked = Arc::new(Mutex::new(Vec::new()));
    let (log, inside, queue) = (Arc::clone(&asked), memory.clone(), driver.active());
    let worker = Worker::spawn("test", move |mut poller| {
        let mut set_pairs = |wanted: u16| {
            log.lock().unwrap().push(wanted);
            wanted == 2
        };
        control::serve(&mut poller, &inside, queue, &mut set_pairs).unwrap();
    })
    .unwrap();

    let mut command = |bytes: &[u8]| {
        driver.store(TX, bytes);
        driver.store(RX, &[0xff]);
        let len = u32::try_from(bytes.len()).unwrap();
        driver.add(&[(TX, 2, false), (TX + 2, len - 2, false), (RX, 1, true)]);
        driver.kick();
        assert_eq!(driver.wait().1, 1);
        driver.load(RX, 1)[0]
    };
    assert_eq!(command(&[4, 0, 2, 0]), 0);
    assert_eq!(command(&[4, 0, 0, 1]), 1);
    assert_eq!(command(&[4, 1, 2, 0]), 1);
    assert_eq!(command(&[0, 0, 1, 0]), 1);
    assert_eq!(command(&[4, 0, 2]), 1);
    driver.add(&[(TX, 4, false)]);
    driver.add(&[(RX, 1, true)]);
    driver.kick();
    assert_eq!(driver.wait().1, 0);
    assert_eq!((driver.wait().1, driver.load(RX, 1)[0]), (1, 1));
    worker.stop().unwrap();
    assert_eq!(*asked.lock().unwrap(), [2, 256]);
}

#[test]
fn device_refuses_what_is_no_tap() {
    let socket = || -> OwnedFd { UnixDatagram::pair().unwrap().0.into() };
    let new = |mtu, taps, vhost| Net::new(MAC, mtu, taps, vhost).map(|_| ());
    assert!(matches!(new(1500, vec![], vec![]), Err(NetError::Taps(0))));
    assert!(matches!(
        new(67, vec![socket()], vec![]),
        Err(NetError::Mtu(67))
    ));
    assert!(matches!(
        new(1500, vec![socket()], vec![socket(), socket()]),
        Err(NetError::Vhost { taps: 1, vhost: 2 })
    ));
    assert!(matches!(
        new(1500, vec![socket()], vec![]),
        Err(NetError::Tap { .. })
    ));
}

/// A tap in a new network namespace, with one queue.
pub(crate) fn tap() -> Option<OwnedFd> {
    Lab::new(1)?.taps.pop()
}

/// A tap that is up in a new network namespace, and a packet socket on it.
struct Lab {
    taps: Vec<OwnedFd>,
    wire: OwnedFd,
}

impl Lab {
    /// `None`, and a word why, where taps cannot be made.
    fn new(queues: usize) -> Option<Self> {
        match Self::try_new(queues) {
            Ok(lab) => Some(lab),
            Err(error) => {
                eprintln!("skipped: no tap in a new network namespace: {error}");
                None
            }
        }
    }

    fn try_new(queues: usize) -> io::Result<Self> {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
        let mut request = request();
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap();
        let taps = (0..queues)
            .map(|_| {
                let tap = open("/dev/net/tun")?;
                // SAFETY: TUNSETIFF reads and writes one ifreq.
                check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
                Ok(tap.into())
            })
            .collect::<io::Result<Vec<OwnedFd>>>()?;
        let wire = wire()?;
        Ok(Self { taps, wire })
    }

    fn send(&self, payload: &[u8]) {
        let frame = frame(payload);
        // SAFETY: the pointer and the length are those of `frame`.
        let sent =
            unsafe { libc::write(self.wire.as_raw_fd(), frame.as_ptr().cast(), frame.len()) };
        assert_eq!(usize::try_from(sent).unwrap(), frame.len());
    }

    fn receive(&self) -> Vec<u8> {
        let mut bytes = vec![0; 70_000];
        // SAFETY: the pointer and the length are those of `bytes`.
        let len = unsafe {
            libc::read(
                self.wire.as_raw_fd(),
                bytes.as_mut_ptr().cast(),
                bytes.len(),
            )
        };
        bytes.truncate(usize::try_from(len).expect("no packet on the wire"));
        bytes
    }
}

fn open(path: &str) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn request() -> libc::ifreq {
    // SAFETY: an all-zero ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"tap0") {
        *to = libc::c_char::try_from(*from).unwrap();
    }
    request
}

/// Brings the tap up and opens a packet socket on it.
fn wire() -> io::Result<OwnedFd> {
    let protocol = ETHERTYPE.to_be();
    // SAFETY: no pointers; the descriptor is nobody else's.
    let wire = unsafe {
        let fd = check(libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW,
            i32::from(protocol),
        ))?;
        OwnedFd::from_raw_fd(fd)
    };
    let mut request = request();
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP).unwrap();
    // SAFETY: both read or write one ifreq, and ifru_ifindex is what the second writes.
    let index = unsafe {
        check(libc::ioctl(
            wire.as_raw_fd(),
            libc::SIOCSIFFLAGS,
            &raw const request,
        ))?;
        check(libc::ioctl(
            wire.as_raw_fd(),
            libc::SIOCGIFINDEX,
            &raw mut request,
        ))?;
        request.ifr_ifru.ifru_ifindex
    };
    // SAFETY: an all-zero sockaddr_ll is valid, and is passed with its size.
    unsafe {
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
        address.sll_protocol = protocol;
        address.sll_ifindex = index;
        let size = u32::try_from(size_of::<libc::sockaddr_ll>()).unwrap();
        check(libc::bind(
            wire.as_raw_fd(),
            (&raw const address).cast(),
            size,
        ))?;
        let timeout = libc::timeval {
            tv_sec: 20,
            tv_usec: 0,
        };
        let size = u32::try_from(size_of::<libc::timeval>()).unwrap();
        let value = (&raw const timeout).cast();
        let level = libc::SOL_SOCKET;
        check(libc::setsockopt(
            wire.as_raw_fd(),
            level,
            libc::SO_RCVTIMEO,
            value,
            size,
        ))?;
    }
    Ok(wire)
}

fn frame(payload: &[u8]) -> Vec<u8> {
    [
        &[0xff; 6],
        MAC.as_slice(),
        &ETHERTYPE.to_be_bytes(),
        payload,
    ]
    .concat()
}

fn activate(device: &mut Net, memory: &GuestMemory, features: u64, drivers: &[Driver<'_>]) {
    device
        .activate(Activation {
            memory: memory.clone(),
            features,
            queues: drivers.iter().map(|driver| Some(driver.active())).collect(),
            config_interrupt: Arc::new(EventFd::new(0).unwrap()),
        })
        .unwrap();
}

/// Packets both ways, a reset, and again.
fn exchange(lab: &mut Lab, vhost: Vec<OwnedFd>) {
    let memory = memory();
    let mut device = Net::new(MAC, 1400, std::mem::take(&mut lab.taps), vhost).unwrap();
    assert_eq!(device.queue_sizes(), [256, 256]);
    let mut config = [0xff; 14];
    device.read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0x78, 5, 0, 0]);
    let features = device.features() & !(1 << spec::VIRTIO_NET_F_CTRL_VQ);
    let features = features & !crate::virtio::VIRTIO_F_EVENT_IDX;

    for round in 0..2 {
        let mut drivers = [0, 1].map(|index| Driver::new(&memory, index, QUEUE));
        for slot in 0..u64::from(QUEUE) {
            drivers[0].add(&[(RX + slot * 0x1_0000, 0x1_0000, true)]);
        }
        activate(&mut device, &memory, features, &drivers);
        let [rx, tx] = &mut drivers;
        rx.kick();

        let payload = vec![round; 900];
        tx.store(TX, &[header(0), frame(&payload)].concat());
        tx.add(&[(TX, 12, false), (TX + 12, 914, false)]);
        tx.kick();
        assert_eq!(lab.receive(), frame(&payload));
        tx.wait();

        lab.send(&payload);
        // What the kernel sends by itself may come first.
        loop {
            let (slot, len) = rx.wait();
            let bytes = rx.load(RX + u64::from(slot) * 0x1_0000, len as usize);
            if bytes[24..26] == ETHERTYPE.to_be_bytes() {
                assert_eq!(bytes[12..], frame(&payload));
                assert_eq!(bytes[10..12], [1, 0]);
                break;
            }
        }
        device.reset();
        // Nobody takes this one, and the next round must not see it in its
        // own buffers; it is older than that round's packets.
        assert!(rx.poll().is_none_or(|(_, len)| len > 12));
    }
}

#[test]
fn tap_packets_go_both_ways_by_thread() {
    if let Some(mut lab) = Lab::new(1) {
        exchange(&mut lab, Vec::new());
    }
}

#[test]
fn tap_packets_go_both_ways_by_vhost() {
    let vhost = match open("/dev/vhost-net") {
        Ok(vhost) => vhost,
        Err(error) => return eprintln!("skipped: /dev/vhost-net: {error}"),
    };
    if let Some(mut lab) = Lab::new(1) {
        exchange(&mut lab, vec![vhost.into()]);
    }
}

#[test]
fn driver_chooses_how_many_pairs_of_a_real_tap_it_uses() {
    let Some(lab) = Lab::new(3) else {
        return;
    };
    let memory = memory();
    let mut device = Net::new(MAC, 1500, lab.taps, Vec::new()).unwrap();
    assert_eq!(device.queue_sizes().len(), 7);
    let mut config = [0; 2];
    device.read_config(8, &mut config);
    assert_eq!(config, [3, 0]);
    assert_ne!(device.features() & (1 << spec::VIRTIO_NET_F_MQ), 0);

    for _ in 0..2 {
        let mut drivers: Vec<_> = (0..7)
            .map(|index| Driver::new(&memory, index, QUEUE))
            .collect();
        let features = device.features() & !crate::virtio::VIRTIO_F_EVENT_IDX;
        activate(&mut device, &memory, features, &drivers);
        let control = &mut drivers[6];
        let mut set = |pairs: u16| {
            let [low, high] = pairs.to_le_bytes();
            control.store(TX, &[4, 0, low, high]);
            control.add(&[(TX, 4, false), (RX, 1, true)]);
            control.kick();
            control.wait();
            control.load(RX, 1)[0]
        };
        assert_eq!([3, 1, 2, 0, 4, 3].map(&mut set), [0, 0, 0, 1, 1, 0]);
        device.reset();
    }
    // A driver that knows nothing of pairs has its control queue third.
    let drivers: Vec<_> = (0..3)
        .map(|index| Driver::new(&memory, index, QUEUE))
        .collect();
    let features = device.features() & MERGEABLE;
    activate(&mut device, &memory, features, &drivers);
}
