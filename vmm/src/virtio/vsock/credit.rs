//! Credit-based flow control (virtio 1.2, 5.10.6.3), modulo 2^32:
//!
//! ```text
//!   to the guest:    may send  peer_buf_alloc - (sent - peer_fwd_cnt)
//!   from the guest:  may send  BUF_ALLOC - (received - forwarded)
//! ```
//!
//! `forwarded` counts bytes the host's socket took, so the guest cannot make us
//! hold more than [`BUF_ALLOC`] bytes for a reader that does not read.

use std::num::Wrapping;

use super::packet::Header;

/// Most bytes from the guest a connection holds.
pub const BUF_ALLOC: u32 = 256 * 1024;
/// The guest learns of freed room once it is this much; enough not to starve
/// it, rare enough not to cost a packet for each of its own.
const STEP: u32 = BUF_ALLOC / 4;

/// Both directions of a connection.
#[derive(Debug, Default)]
pub struct Credit {
    peer_buf_alloc: u32,
    peer_fwd_cnt: Wrapping<u32>,
    sent: Wrapping<u32>,
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    /// `forwarded` as the guest last heard it.
    advertised: Wrapping<u32>,
}

impl Credit {
    /// Takes what a packet of the guest says of its room.
    pub fn hear(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = Wrapping(header.fwd_cnt);
    }

    /// Puts what the guest must know of our room into a packet.
    pub fn tell(&mut self, header: &mut Header) {
        header.buf_alloc = BUF_ALLOC;
        header.fwd_cnt = self.forwarded.0;
        self.advertised = self.forwarded;
    }

    /// Bytes the guest has room for. A guest that claims to have forwarded what
    /// was never sent has none.
    #[must_use]
    pub fn available(&self) -> u32 {
        let in_flight = (self.sent - self.peer_fwd_cnt).0;
        self.peer_buf_alloc.saturating_sub(in_flight)
    }

    /// Counts bytes sent to the guest.
    pub fn send(&mut self, count: usize) {
        self.sent += wrap(count);
    }

    /// Counts bytes from the guest, if it had credit for them.
    #[must_use]
    pub fn receive(&mut self, count: u32) -> bool {
        let held = (self.received - self.forwarded).0;
        let allowed = held
            .checked_add(count)
            .is_some_and(|total| total <= BUF_ALLOC);
        if allowed {
            self.received += count;
        }
        allowed
    }

    /// Counts bytes from the guest that no longer take room.
    pub fn forward(&mut self, count: usize) {
        self.forwarded += wrap(count);
    }

    /// Counts all bytes from the guest as gone.
    pub fn forward_all(&mut self) {
        self.forwarded = self.received;
    }

    /// Whether the guest should hear of its room without having asked.
    #[must_use]
    pub fn is_news(&self) -> bool {
        (self.forwarded - self.advertised).0 >= STEP
    }
}

#[allow(
    clippy::cast_possible_truncation,
    reason = "counters are modulo 2^32, and a packet has less"
)]
fn wrap(count: usize) -> u32 {
    count as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(buf_alloc: u32, fwd_cnt: u32) -> Header {
        Header {
            buf_alloc,
            fwd_cnt,
            ..Header::default()
        }
    }

    #[test]
    fn credit_to_the_guest_survives_wraparound_and_lies() {
        let mut credit = Credit {
            sent: Wrapping(u32::MAX - 10),
            ..Credit::default()
        };
        credit.hear(&peer(1000, u32::MAX - 10));
        assert_eq!(credit.available(), 1000);
        credit.send(900);
        assert_eq!(credit.available(), 100);
        credit.hear(&peer(1000, 889 - 400));
        assert_eq!(credit.available(), 600);
        credit.hear(&peer(1000, 890));
        assert_eq!(credit.available(), 0, "forwarded what was never sent");
        credit.hear(&peer(100, 889 - 400));
        assert_eq!(credit.available(), 0, "shrank its buffer");
    }

    #[test]
    fn credit_from_the_guest_is_enforced_and_told_in_steps() {
        let mut credit = Credit::default();
        assert!(credit.receive(BUF_ALLOC));
        assert!(!credit.receive(1));
        assert!(!credit.receive(u32::MAX));
        credit.forward(STEP as usize - 1);
        assert!(!credit.is_news());
        credit.forward(1);
        assert!(credit.is_news());
        let mut header = Header::default();
        credit.tell(&mut header);
        assert_eq!((header.buf_alloc, header.fwd_cnt), (BUF_ALLOC, STEP));
        assert!(!credit.is_news());
        assert!(credit.receive(STEP));
        credit.forward_all();
        assert!(credit.receive(BUF_ALLOC));
    }
}
