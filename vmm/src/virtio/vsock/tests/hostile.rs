//! What a guest that keeps to no rule can and cannot do.

use std::io::{Read, Write};
use std::sync::Arc;

use nacre_protocol::guest::AGENT_PORT;
use proptest::prelude::*;
use vmm_sys_util::eventfd::EventFd;

use super::super::packet::Operation;
use super::guest::*;
use crate::virtio::driver::{Driver, memory};
use crate::virtio::{Activation, VirtioDevice};

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
