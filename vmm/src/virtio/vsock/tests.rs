//! The device against a driver, with real sockets.

mod guest;
mod hostile;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::num::Wrapping;

use nacre_protocol::guest::AGENT_PORT;

use super::Vsock;
use super::credit::BUF_ALLOC;
use super::muxer::MAX_GUEST_DIALED;
use super::packet::{Header, Operation, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use crate::virtio::VirtioDevice;
use crate::virtio::driver::memory;
use guest::*;

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
