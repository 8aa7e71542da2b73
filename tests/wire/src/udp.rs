//! Over UDP, by a small protocol that loses nothing.
//!
//! ```text
//! sender:   datagrams 0, 1, ... 31 in one call; the last asks for an answer
//! receiver: takes those that are next, in order; answers which is next, and the sum
//! sender:   goes on from there; without an answer in time it sends again
//! ```
//! The kernel cuts a call's bytes into datagrams itself (`UDP_SEGMENT`, udp(7)).
//!
//! ```text
//! datagram: transfer (8 bytes), number (4), flags (4), bytes   answer: transfer (8), next (4), sum (16)
//! ```

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{setsockopt, sockopt::UdpGsoSegment};

use super::data::{self, Source, Sum};

/// Bytes of a datagram: what fits an MTU of 1500 over IPv6 and more, in whole words.
const DATAGRAM: usize = 1400;
const HEADER: usize = 16;
const PAYLOAD: usize = DATAGRAM - HEADER;
/// Datagrams of a call, which are 64 KiB at most.
const BURST: usize = 32;
/// The receiver is to answer.
const ANSWER: u32 = 1;
const ANSWER_LEN: usize = 8 + 4 + Sum::LEN;
/// How long an answer may take,
const ANSWER_TIME: Duration = Duration::from_millis(500);
/// and how often in a row it may not come.
const MAX_SILENCES: u32 = 60;

/// Sends bytes, and has them compared. Returns how many datagrams were sent again.
pub fn send(address: SocketAddr, bytes: u64) -> Result<u64> {
    send_within(address, bytes, ANSWER_TIME)
}

/// The same, where an answer may take so long.
fn send_within(address: SocketAddr, bytes: u64, answer_time: Duration) -> Result<u64> {
    let any: SocketAddr = match address {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).context("make a socket")?;
    socket.connect(address).context("connect")?;
    socket.set_read_timeout(Some(answer_time))?;
    let datagram = i32::try_from(DATAGRAM)?;
    setsockopt(&socket, UdpGsoSegment, &datagram).context("have the kernel cut datagrams")?;
    let mut sender = Sender {
        socket,
        transfer: data::seed(),
        first: 0,
        burst: Vec::with_capacity(BURST * DATAGRAM),
        again: 0,
    };
    let mut source = Source::new(sender.transfer);
    let mut sum = Sum::default();
    let mut arrived = Sum::default();
    while sum.bytes < bytes {
        sender.make_burst(&mut source, &mut sum, bytes);
        arrived = sender.deliver()?;
    }
    data::compare(sum, arrived)?;
    Ok(sender.again)
}

struct Sender {
    socket: UdpSocket,
    transfer: u64,
    /// Number of the first datagram that has not arrived.
    first: u32,
    /// From that one on.
    burst: Vec<u8>,
    again: u64,
}

impl Sender {
    /// Makes the next datagrams of `bytes` in all.
    fn make_burst(&mut self, source: &mut Source, sum: &mut Sum, bytes: u64) {
        self.burst.clear();
        let mut number = self.first;
        while self.burst.len() < BURST * DATAGRAM && sum.bytes < bytes {
            let left = usize::try_from(bytes - sum.bytes).unwrap_or(PAYLOAD);
            let mut payload = [0; PAYLOAD];
            let payload = &mut payload[..left.min(PAYLOAD)];
            source.fill(payload);
            sum.add(payload);
            let is_last = sum.bytes == bytes || self.burst.len() == (BURST - 1) * DATAGRAM;
            let flags = if is_last { ANSWER } else { 0 };
            self.burst.extend(self.transfer.to_le_bytes());
            self.burst.extend(number.to_le_bytes());
            self.burst.extend(flags.to_le_bytes());
            self.burst.extend(&*payload);
            number += 1;
        }
    }

    /// Has the burst arrive; the receiver's sum then.
    fn deliver(&mut self) -> Result<Sum> {
        let end = self.first + u32::try_from(self.burst.len().div_ceil(DATAGRAM))?;
        let mut silences = 0;
        self.transmit()?;
        loop {
            match self.answer().context("hear an answer")? {
                Some((next, sum)) if next == end => {
                    self.first = end;
                    return Ok(sum);
                }
                Some((next, _)) if (self.first + 1..end).contains(&next) => {
                    let arrived = usize::try_from(next - self.first)? * DATAGRAM;
                    self.burst.drain(..arrived);
                    self.first = next;
                    silences = 0;
                }
                // Of a question that came twice. If it were sent again for that, there would be
                // two answers to each burst from then on.
                Some((next, _)) if next <= self.first => continue,
                _ => silences += 1,
            }
            ensure!(silences < MAX_SILENCES, "nothing arrives any more");
            self.again += u64::from(end - self.first);
            self.transmit()?;
        }
    }

    fn transmit(&self) -> Result<()> {
        match self.socket.send(&self.burst) {
            Ok(_) => Ok(()),
            // What an ICMP message said of the one before: the server is not there yet.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
            Err(error) => Err(error).context("send"),
        }
    }

    /// An answer of this transfer; `None` if there is none in time.
    fn answer(&self) -> io::Result<Option<(u32, Sum)>> {
        let mut answer = [0; ANSWER_LEN];
        loop {
            match self.socket.recv(&mut answer) {
                Ok(ANSWER_LEN) => {}
                Ok(_) => continue,
                Err(error) if is_silence(&error) => return Ok(None),
                Err(error) => return Err(error),
            }
            let (transfer, rest) = split::<8>(&answer);
            let (next, rest) = split::<4>(rest);
            let (sum, _) = split::<{ Sum::LEN }>(rest);
            if u64::from_le_bytes(transfer) == self.transfer {
                return Ok(Some((u32::from_le_bytes(next), Sum::of_bytes(sum))));
            }
        }
    }
}

fn is_silence(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, TimedOut, WouldBlock};
    matches!(error.kind(), ConnectionRefused | TimedOut | WouldBlock)
}

/// The first bytes, and the others. There must be as many.
fn split<const N: usize>(bytes: &[u8]) -> ([u8; N], &[u8]) {
    match bytes.split_first_chunk() {
        Some((first, rest)) => (*first, rest),
        None => ([0; N], &[]),
    }
}

pub struct Server(UdpSocket);

/// What has arrived of a transfer.
#[derive(Default)]
struct Arrived {
    next: u32,
    sum: Sum,
}

impl Server {
    pub fn bind(address: SocketAddr) -> Result<Self> {
        Ok(Self(UdpSocket::bind(address).context("listen by UDP")?))
    }

    /// Takes all that comes.
    pub fn serve(&self) -> Result<()> {
        let mut transfers: HashMap<u64, Arrived> = HashMap::new();
        let mut datagram = [0; DATAGRAM];
        loop {
            let (len, from) = self.0.recv_from(&mut datagram).context("receive")?;
            if let Some(answer) = take(&mut transfers, &datagram[..len]) {
                // Lost is lost: the sender asks again.
                if let Err(error) = self.0.send_to(&answer, from) {
                    eprintln!("nacre-wire: UDP: {error}");
                }
            }
        }
    }
}

/// Takes a datagram if it is the next of its transfer; what is to be answered.
fn take(transfers: &mut HashMap<u64, Arrived>, datagram: &[u8]) -> Option<Vec<u8>> {
    if datagram.len() <= HEADER {
        return None;
    }
    let (transfer, rest) = split::<8>(datagram);
    let (number, rest) = split::<4>(rest);
    let (flags, payload) = split::<4>(rest);
    let arrived = transfers.entry(u64::from_le_bytes(transfer)).or_default();
    if u32::from_le_bytes(number) == arrived.next {
        arrived.next += 1;
        arrived.sum.add(payload);
    }
    (u32::from_le_bytes(flags) & ANSWER != 0).then(|| {
        let next = arrived.next.to_le_bytes();
        [&transfer[..], &next, &arrived.sum.to_bytes()].concat()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Also for a receiver that is not scheduled for long.
    const LONG: Duration = Duration::from_secs(5);

    /// A receiver that does not hear each datagram for which `loses` says so.
    fn lossy(loses: impl Fn(u32) -> bool + Send + 'static) -> SocketAddr {
        receiver(loses, 1)
    }

    /// The same, which says all so many times.
    fn receiver(loses: impl Fn(u32) -> bool + Send + 'static, times: usize) -> SocketAddr {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = socket.local_addr().unwrap();
        std::thread::spawn(move || {
            let mut transfers = HashMap::new();
            let mut datagram = [0; DATAGRAM];
            for count in 0.. {
                let (len, from) = socket.recv_from(&mut datagram).unwrap();
                if loses(count) {
                    continue;
                }
                if let Some(answer) = take(&mut transfers, &datagram[..len]) {
                    for _ in 0..times {
                        socket.send_to(&answer, from).unwrap();
                    }
                }
            }
        });
        address
    }

    #[test]
    fn what_is_answered_twice_is_not_sent_again() {
        let address = receiver(|_| false, 2);
        let bytes = 4 * (BURST * PAYLOAD) as u64;
        assert_eq!(send_within(address, bytes, LONG).unwrap(), 0);
    }

    #[test]
    fn bytes_arrive_however_many() {
        let address = lossy(|_| false);
        let burst = (BURST * PAYLOAD) as u64;
        for bytes in [8, burst, 3 * burst + 16] {
            assert_eq!(send_within(address, bytes, LONG).unwrap(), 0);
        }
    }

    #[test]
    fn what_is_lost_is_sent_again() {
        // In the middle of the first burst, and the end of the second with its question.
        let address = lossy(|count| count == 5 || count == 90);
        let again = send_within(address, 4 * (BURST * PAYLOAD) as u64, LONG).unwrap();
        assert_eq!(again, 27 + BURST as u64);
    }

    #[test]
    fn what_is_changed_is_told() {
        let mut transfers = HashMap::new();
        let mut datagram = vec![0; DATAGRAM];
        datagram[12] = 1;
        let [first, second] = [0, 9].map(|byte| {
            datagram[0] = byte;
            datagram[20] = byte;
            take(&mut transfers, &datagram).unwrap()
        });
        assert_ne!(first[12..], second[12..]);
        assert!(take(&mut transfers, &datagram[..HEADER]).is_none());
    }
}
