//! Where the BARs of the host's devices go in the guest's address space.
//!
//! Each device is behind a root port, whose windows cover its BARs and nothing
//! else:
//!
//! ```text
//!   32-bit window:  virtio BARs | port 1 | port 2 | ...      32-bit and non-prefetchable BARs
//!   64-bit window:  port 1      | port 2 | ...               64-bit prefetchable BARs
//!   I/O ports:      port 1      | port 2 | ...               I/O BARs
//! ```
//!
//! A BAR is as aligned as it is large, and a bridge's window is whole mebibytes, or 4096 ports.
//! The largest BARs of a device go first, so that there is no gap between them.
//!
//! There are ports for 15 devices only, and a PCI Express device has to do without (PCI Express base
//! 1.3.2.2): one that finds none left is not shown its I/O BARs.
//!
//! Root ports that wait for a device share what is left of either window. Each share is a power of
//! two and aligned to it, so that a device fits whose BARs do together, in whatever order
//! the guest places them.

use std::fmt;

use super::config::BridgeWindow;
use crate::layout::{self, GIB, MIB};

/// Smallest room for a BAR of memory, so that each is in pages of its own.
const PAGE: u64 = 0x1000;
/// Granularity of a bridge's windows of memory,
const WINDOW_ALIGN: u64 = MIB;
/// and of ports.
const PORTS_ALIGN: u64 = 0x1000;

/// There is no room.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlacementError {
    /// In the window below 4 GiB.
    #[error(
        "the BARs below 4 GiB of the pod's PCI devices need {need} and there are {room}: \
         {missing} too little"
    )]
    Below4Gib {
        /// What they need,
        need: Bytes,
        /// what there is,
        room: Bytes,
        /// and the difference.
        missing: Bytes,
    },
    /// In the window above memory.
    #[error(
        "the 64-bit BARs of the pod's PCI devices need {need} of address space and {bits} physical \
         address bits leave {room}: {missing} too little"
    )]
    Above4Gib {
        /// What they need,
        need: Bytes,
        /// what there is,
        room: Bytes,
        /// and the difference.
        missing: Bytes,
        /// The processor's address bits.
        bits: u8,
    },
    /// In a window of the port of an empty slot.
    #[error(
        "its {kind} BARs need {need}, and each empty slot of the pod has {room} for them: \
         {missing} too little"
    )]
    Slot {
        /// Of which window.
        kind: &'static str,
        /// What they need,
        need: Bytes,
        /// what there is,
        room: Bytes,
        /// and the difference.
        missing: Bytes,
    },
    /// Not a mebibyte for each slot.
    #[error("the pod's PCI devices leave no address space below 4 GiB for {0} empty slots")]
    NoSlots(u8),
}

/// A BAR to be placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarRequest {
    /// Bytes, a power of two.
    pub size: u64,
    /// The window it must lie in.
    pub window: BridgeWindow,
}

/// The places of a device's BARs, and of the windows of its port.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Placed {
    /// Addresses, in the order of the requests; 0 for an I/O BAR that has no place.
    pub bars: Vec<u64>,
    /// What the port's 32-bit window covers, end exclusive.
    pub memory: Option<(u64, u64)>,
    /// What the port's prefetchable window covers, end exclusive.
    pub prefetchable: Option<(u64, u64)>,
    /// The ports it passes on, end exclusive.
    pub ports: Option<(u64, u64)>,
}

/// A window that is filled from its start.
#[derive(Debug, Clone, Copy)]
struct Space {
    start: u64,
    next: u64,
    end: u64,
    window: BridgeWindow,
}

/// All windows.
#[derive(Debug, Clone, Copy)]
pub struct Placement {
    below: Space,
    above: Space,
    ports: Space,
    bits: u8,
}

impl Placement {
    /// Nothing is placed yet; `window64` is the guest's 64-bit window, which its
    /// `physical_bits` address bits have left.
    #[must_use]
    pub fn new(window64: Option<(u64, u64)>, physical_bits: u8) -> Self {
        let (start, end) = window64.unwrap_or_default();
        Self {
            below: Space::new(
                BridgeWindow::Memory,
                layout::WINDOW32_PORTS,
                layout::WINDOW32_END,
            ),
            above: Space::new(BridgeWindow::Prefetchable, start, end),
            ports: Space::new(BridgeWindow::Ports, layout::PCI_PORTS, layout::PORTS_END),
            bits: physical_bits,
        }
    }

    /// The window above 4 GiB, if there is one.
    #[must_use]
    pub fn window64(&self) -> Option<(u64, u64)> {
        (self.above.start < self.above.end).then_some((self.above.start, self.above.end))
    }

    /// Places the BARs of the next device. What does not fit is noticed by
    /// [`Self::check`], when all that is needed is known.
    pub fn place(&mut self, requests: &[BarRequest]) -> Placed {
        let mut placed = Placed {
            bars: vec![0; requests.len()],
            ..Placed::default()
        };
        placed.memory = self.below.place(requests, &mut placed.bars);
        placed.prefetchable = self.above.place(requests, &mut placed.bars);
        placed.ports = self.ports.place_or_leave(requests, &mut placed.bars);
        placed
    }

    /// Shares what is left among `count` ports without a device; the shares' windows.
    ///
    /// # Errors
    ///
    /// When there is none left below 4 GiB. A machine may have no window above.
    pub fn share(&mut self, count: u8) -> Result<Vec<Placed>, PlacementError> {
        if count == 0 {
            return Ok(Vec::new());
        }
        let count_of_shares = u64::from(count);
        let below = self.below.share(count_of_shares);
        let below = below.ok_or(PlacementError::NoSlots(count))?;
        let above = self.above.share(count_of_shares);
        let ports = self.ports.share(count_of_shares);
        let nth = |share: (u64, u64), n: u64| (share.0 + n * share.1, share.0 + (n + 1) * share.1);
        let placed = (0..count_of_shares).map(|n| Placed {
            bars: Vec::new(),
            memory: Some(nth(below, n)),
            prefetchable: above.map(|share| nth(share, n)),
            ports: ports.map(|share| nth(share, n)),
        });
        Ok(placed.collect())
    }

    /// Whether everything that was placed is inside the windows.
    ///
    /// # Errors
    ///
    /// By how much it is not.
    pub fn check(&self) -> Result<(), PlacementError> {
        if let Some([need, room, missing]) = self.below.shortage() {
            return Err(PlacementError::Below4Gib {
                need,
                room,
                missing,
            });
        }
        if let Some([need, room, missing]) = self.above.shortage() {
            return Err(PlacementError::Above4Gib {
                need,
                room,
                missing,
                bits: self.bits,
            });
        }
        Ok(())
    }
}

impl Placed {
    /// Places the BARs of a device in the windows of its root port.
    ///
    /// # Errors
    ///
    /// By how much they do not fit.
    pub fn fit(&self, requests: &[BarRequest]) -> Result<Vec<u64>, PlacementError> {
        let mut bars = vec![0; requests.len()];
        for (window, range, kind) in [
            (BridgeWindow::Memory, self.memory, "32-bit"),
            (BridgeWindow::Prefetchable, self.prefetchable, "64-bit"),
        ] {
            let (start, end) = range.unwrap_or_default();
            // A share is aligned to its size, so that the places in it can be counted from 0.
            let mut space = Space::new(window, 0, end - start);
            space.place(requests, &mut bars);
            if let Some([need, room, missing]) = space.shortage() {
                return Err(PlacementError::Slot {
                    kind,
                    need,
                    room,
                    missing,
                });
            }
            for (_, address) in in_window(requests, &mut bars, window) {
                *address += start;
            }
        }
        let (start, end) = self.ports.unwrap_or_default();
        Space::new(BridgeWindow::Ports, start, end).place_or_leave(requests, &mut bars);
        Ok(bars)
    }
}

impl Space {
    fn new(window: BridgeWindow, start: u64, end: u64) -> Self {
        Self {
            start,
            next: start,
            end,
            window,
        }
    }

    /// What its windows are multiples of.
    fn align(&self) -> u64 {
        match self.window {
            BridgeWindow::Memory | BridgeWindow::Prefetchable => WINDOW_ALIGN,
            BridgeWindow::Ports => PORTS_ALIGN,
        }
    }

    /// The least a BAR gets.
    fn room(&self) -> u64 {
        match self.window {
            BridgeWindow::Memory | BridgeWindow::Prefetchable => PAGE,
            BridgeWindow::Ports => 1,
        }
    }

    fn place(&mut self, requests: &[BarRequest], addresses: &mut [u64]) -> Option<(u64, u64)> {
        let (align, room) = (self.align(), self.room());
        let mut mine: Vec<_> = in_window(requests, addresses, self.window).collect();
        mine.sort_by_key(|(bar, _)| std::cmp::Reverse(bar.size));
        let start = align_up(self.next, mine.first()?.0.size.max(align));
        self.next = start;
        for (bar, address) in mine {
            *address = self.next;
            self.next = self.next.saturating_add(bar.size.max(room));
        }
        self.next = align_up(self.next, align);
        Some((start, self.next))
    }

    /// Places all of a device's, or none of them where there is too little.
    fn place_or_leave(
        &mut self,
        requests: &[BarRequest],
        addresses: &mut [u64],
    ) -> Option<(u64, u64)> {
        let before = *self;
        let placed = self.place(requests, addresses);
        if self.next <= self.end {
            return placed;
        }
        *self = before;
        for (_, address) in in_window(requests, addresses, self.window) {
            *address = 0;
        }
        None
    }

    /// Start and size of the first of `count` shares of what is left, each the largest
    /// power of two there can be.
    fn share(&self, count: u64) -> Option<(u64, u64)> {
        let left = self.end.checked_sub(self.next)?;
        let mut size = 1 << left.checked_div(count)?.checked_ilog2()?;
        while size >= self.align() {
            let start = align_up(self.next, size);
            if start.checked_add(count * size)? <= self.end {
                return Some((start, size));
            }
            size /= 2;
        }
        None
    }

    /// What is needed, what there is, and the difference, when it is too little.
    fn shortage(&self) -> Option<[Bytes; 3]> {
        let sizes = [
            self.next - self.start,
            self.end - self.start,
            self.next.checked_sub(self.end)?,
        ];
        (self.next > self.end).then(|| sizes.map(Bytes))
    }
}

/// The BARs that lie in a window, with their places.
fn in_window<'a>(
    requests: &'a [BarRequest],
    addresses: &'a mut [u64],
    window: BridgeWindow,
) -> impl Iterator<Item = (&'a BarRequest, &'a mut u64)> {
    let all = requests.iter().zip(addresses);
    all.filter(move |(bar, _)| bar.window == window)
}

fn align_up(address: u64, align: u64) -> u64 {
    address
        .checked_next_multiple_of(align)
        .unwrap_or(u64::MAX - (WINDOW_ALIGN - 1))
}

/// A number of bytes, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes if bytes >= GIB => write!(f, "{} GiB", bytes.div_ceil(GIB)),
            bytes => write!(f, "{} MiB", bytes.div_ceil(MIB)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use BridgeWindow::{Memory, Ports, Prefetchable};

    const WINDOW: Option<(u64, u64)> = Some((64 * GIB, 1024 * GIB));

    fn request(size: u64, window: BridgeWindow) -> BarRequest {
        BarRequest { size, window }
    }

    #[test]
    fn bars_are_aligned_and_inside_the_windows_of_their_port() {
        let mut placement = Placement::new(WINDOW, 40);
        let bars = [
            request(0x4000, Memory),
            request(32 * MIB, Prefetchable),
            request(16 * MIB, Memory),
            request(128 * GIB, Prefetchable),
            request(16, Memory),
        ];
        placement.place(&[request(0x1000, Memory)]);
        let placed = placement.place(&bars);
        for (bar, address) in bars.iter().zip(&placed.bars) {
            assert_eq!(address % bar.size, 0);
            let range = match bar.window {
                Memory => placed.memory.unwrap(),
                Prefetchable => placed.prefetchable.unwrap(),
                Ports => unreachable!("none was asked for"),
            };
            assert!(range.0 <= *address && address + bar.size <= range.1);
            assert_eq!((range.0 % MIB, range.1 % MIB), (0, 0));
        }
        assert_eq!(placed.prefetchable.unwrap().0, 128 * GIB);
        assert_eq!(placed.bars[4], placed.bars[0] + 0x4000);
        assert_eq!(placement.check(), Ok(()));
    }

    #[test]
    fn ports_do_not_overlap() {
        let mut placement = Placement::new(WINDOW, 40);
        let bars = [request(0x4000, Memory), request(GIB, Prefetchable)];
        let ports: Vec<_> = (0..8).map(|_| placement.place(&bars)).collect();
        for pair in ports.windows(2) {
            assert!(pair[0].memory.unwrap().1 <= pair[1].memory.unwrap().0);
            assert!(pair[0].prefetchable.unwrap().1 <= pair[1].prefetchable.unwrap().0);
        }
        assert_eq!(ports[0].memory.unwrap().0, layout::WINDOW32_PORTS);
    }

    #[test]
    fn device_without_bars_has_closed_windows() {
        let placed = Placement::new(None, 36).place(&[]);
        assert_eq!(placed, Placed::default());
    }

    #[test]
    fn several_bars_of_128_gib_fit_or_it_is_said_by_how_much_not() {
        let large = [request(128 * GIB, Prefetchable)];
        let mut placement = Placement::new(WINDOW, 40);
        for _ in 0..7 {
            placement.place(&large);
        }
        assert_eq!(placement.check(), Ok(()));
        placement.place(&large);
        let error = placement.check().unwrap_err().to_string();
        let expected = "the 64-bit BARs of the pod's PCI devices need 1088 GiB of address space \
                        and 40 physical address bits leave 960 GiB: 128 GiB too little";
        assert_eq!(error, expected);
    }

    #[test]
    fn no_window_is_no_room() {
        let mut placement = Placement::new(None, 36);
        placement.place(&[request(128 * GIB, Prefetchable)]);
        let error = placement.check().unwrap_err().to_string();
        assert!(error.ends_with("36 physical address bits leave 0 MiB: 128 GiB too little"));
        placement = Placement::new(WINDOW, 40);
        placement.place(&[request(512 * MIB, Memory)]);
        let error = placement.check().unwrap_err();
        assert!(matches!(error, PlacementError::Below4Gib { .. }), "{error}");
    }

    #[test]
    fn empty_ports_share_what_is_left() {
        let mut placement = Placement::new(WINDOW, 40);
        placement.place(&[request(MIB, Memory), request(GIB, Prefetchable)]);
        let shares = placement.share(2).unwrap();
        // 510 MiB and 959 GiB, in halves.
        let memory = [0xc800_0000, 0xd000_0000, 0xd800_0000];
        let prefetchable = [256 * GIB, 512 * GIB, 768 * GIB];
        for (n, share) in shares.iter().enumerate() {
            assert_eq!(share.memory, Some((memory[n], memory[n + 1])));
            let window = (prefetchable[n], prefetchable[n + 1]);
            assert_eq!(share.prefetchable, Some(window));
        }
        assert_eq!(placement.share(0).unwrap(), []);
        let below_only = Placement::new(None, 36).share(1).unwrap();
        assert_eq!(below_only[0].prefetchable, None);
        placement.place(&[request(512 * MIB, Memory)]);
        assert_eq!(placement.share(1), Err(PlacementError::NoSlots(1)));
    }

    #[test]
    fn a_device_fits_into_a_share_or_it_is_said_by_how_much_not() {
        let share = &Placement::new(WINDOW, 40).share(4).unwrap()[1];
        let bars = [
            request(0x4000, Memory),
            request(128 * GIB, Prefetchable),
            request(32 * MIB, Memory),
        ];
        let places = share.fit(&bars).unwrap();
        let (memory, prefetchable) = (share.memory.unwrap().0, share.prefetchable.unwrap().0);
        assert_eq!(places, [memory + 32 * MIB, prefetchable, memory]);
        let error = share.fit(&[bars[1], bars[1]]).unwrap_err().to_string();
        let expected = "its 64-bit BARs need 256 GiB, and each empty slot of the pod has 128 GiB \
                        for them: 128 GiB too little";
        assert_eq!(error, expected);
        let error = share.fit(&[request(256 * MIB, Memory)]).unwrap_err();
        assert!(error.to_string().contains("32-bit BARs need 256 MiB"));
        let none = Placed::default().fit(&[request(16, Memory)]).unwrap_err();
        assert!(none.to_string().contains("has 0 MiB"), "{none}");
        assert_eq!(Placed::default().fit(&[]), Ok(Vec::new()));
    }

    #[test]
    fn devices_that_find_no_ports_left_are_placed_without() {
        let mut placement = Placement::new(WINDOW, 40);
        let bars = [
            request(0x20, Ports),
            request(0x100, Ports),
            request(16, Memory),
        ];
        let placed = placement.place(&bars);
        assert_eq!(placed.bars[..2], [0x1100, 0x1000]);
        assert_eq!(placed.ports, Some((0x1000, 0x2000)));
        let shares = placement.share(2).unwrap();
        assert_eq!(shares[0].ports, Some((0x4000, 0x8000)));
        assert_eq!(shares[1].ports, Some((0x8000, 0xc000)));
        assert_eq!(shares[1].fit(&bars).unwrap()[..2], [0x8100, 0x8000]);
        assert_eq!(shares[1].fit(&[request(0x8000, Ports)]), Ok(vec![0]));
        for start in (0x2000..0x1_0000).step_by(0x1000) {
            let ports = placement.place(&bars).ports;
            assert_eq!(ports, Some((start, start + 0x1000)));
        }
        let last = placement.place(&bars);
        assert_eq!((last.ports, &last.bars[..2]), (None, &[0, 0][..]));
        assert_ne!(last.bars[2], 0);
        assert_eq!(placement.check(), Ok(()));
        assert_eq!(placement.share(1).unwrap()[0].ports, None);
    }

    #[test]
    fn absurd_sizes_do_not_overflow() {
        let mut placement = Placement::new(WINDOW, 40);
        for _ in 0..3 {
            placement.place(&[
                request(1 << 63, Prefetchable),
                request(1 << 63, Memory),
                request(1 << 63, Ports),
            ]);
        }
        assert!(placement.check().is_err());
        assert!(placement.share(3).is_err());
    }
}
