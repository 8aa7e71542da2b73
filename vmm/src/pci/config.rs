//! Configuration space of a PCI function (PCI Express base 7.5): bytes, and
//! which bits of them the guest may write.

use super::registers::{
    BAR0, CACHE_LINE, CAPABILITIES, COMMAND, FIRST_CAPABILITY, HEADER_TYPE, INTERRUPT_LINE,
    INTX_DISABLE, IO_SPACE, MASTER, MEMORY_BITS, MEMORY_SPACE, STATUS, STATUS_LIST, WIDE,
};

/// Bytes of configuration space that exist; extended capabilities do not.
pub const SIZE: usize = 256;

const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
const SUBSYSTEM: usize = 0x2c;

/// Bus numbers and windows of a bridge (PCI Express base 7.5.1.3).
const PRIMARY_BUS: usize = 0x18;
const PORT_BASE: usize = 0x1c;
const MEMORY_BASE: usize = 0x20;
const PREFETCHABLE_BASE: usize = 0x24;
const PREFETCHABLE_BASE_UPPER: usize = 0x28;
/// Base and limit of the prefetchable window: it has 64 bits.
const WINDOW_64: u8 = 1;
/// Above a limit of 0.
const CLOSED_BASE: u64 = 0xfff0_0000;

/// What a bridge passes on to the devices behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BridgeWindow {
    /// Of 32 bits.
    Memory,
    /// Of 64 bits, for BARs that are prefetchable.
    Prefetchable,
    /// Of I/O ports.
    Io,
}

/// Configuration space of one function.
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    next_capability: usize,
    last_pointer: usize,
}

impl ConfigSpace {
    /// A type 0 header; `class` is programming interface, subclass, base class.
    #[must_use]
    pub fn new(vendor: u16, device: u16, class: [u8; 3]) -> Self {
        let mut space = Self::header(vendor, device, class);
        space.allow(CACHE_LINE, &[0xff, 0xff]);
        space
    }

    /// A type 1 header, of a bridge whose windows are closed.
    #[must_use]
    pub fn bridge(vendor: u16, device: u16, class: [u8; 3]) -> Self {
        let mut space = Self::header(vendor, device, class);
        space.put(HEADER_TYPE, &[1]);
        space.allow(PRIMARY_BUS, &[0xff; 3]);
        space.allow(MEMORY_BASE, &[0xf0, 0xff, 0xf0, 0xff]);
        space.allow(PREFETCHABLE_BASE, &[0xf0, 0xff, 0xf0, 0xff]);
        space.allow(PREFETCHABLE_BASE_UPPER, &[0xff; 8]);
        space.set_window(BridgeWindow::Memory, None);
        space.set_window(BridgeWindow::Prefetchable, None);
        space
    }

    fn header(vendor: u16, device: u16, class: [u8; 3]) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            next_capability: FIRST_CAPABILITY,
            last_pointer: CAPABILITIES,
        };
        space.put(0, &vendor.to_le_bytes());
        space.put(2, &device.to_le_bytes());
        space.put(CLASS, &class);
        let command = MEMORY_SPACE | MASTER | INTX_DISABLE;
        space.allow(COMMAND, &command.to_le_bytes());
        space.allow(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Sets revision and subsystem ids.
    pub fn set_identity(&mut self, revision: u8, vendor: u16, device: u16) {
        self.put(REVISION, &[revision]);
        self.put(SUBSYSTEM, &vendor.to_le_bytes());
        self.put(SUBSYSTEM + 2, &device.to_le_bytes());
    }

    /// Makes BAR 0 and 1 a 64-bit memory BAR of `size`, a power of two, at
    /// `address`.
    pub fn set_bar(&mut self, address: u64, size: u64) {
        debug_assert!(size.is_power_of_two());
        self.put(BAR0, &(address | u64::from(WIDE)).to_le_bytes());
        self.allow(BAR0, &(!(size - 1) & !MEMORY_BITS).to_le_bytes());
    }

    /// Sets a bridge's bus numbers: those of its two sides, and the last one behind it.
    pub fn set_buses(&mut self, primary: u8, secondary: u8, subordinate: u8) {
        self.put(PRIMARY_BUS, &[primary, secondary, subordinate]);
    }

    /// The number of the bus behind a bridge.
    #[must_use]
    pub fn secondary_bus(&self) -> u8 {
        self.byte(PRIMARY_BUS + 1)
    }

    /// Opens a bridge's window over `start..end`, whole mebibytes or 4096 ports, or closes it:
    /// its base is above its limit then. One of ports is not there before.
    pub fn set_window(&mut self, window: BridgeWindow, range: Option<(u64, u64)>) {
        let (base, limit) = range.map_or((CLOSED_BASE, 0), |(start, end)| (start, end - 1));
        let word = |address: u64| {
            let [_, _, low, high, ..] = address.to_le_bytes();
            [low & 0xf0, high]
        };
        let [mut base_word, mut limit_word] = [word(base), word(limit)];
        let at = match window {
            BridgeWindow::Io => return self.set_io(range),
            BridgeWindow::Memory => MEMORY_BASE,
            BridgeWindow::Prefetchable => {
                base_word[0] |= WINDOW_64;
                limit_word[0] |= WINDOW_64;
                for (upper, address) in [(0, base), (4, limit)] {
                    let upper = PREFETCHABLE_BASE_UPPER + upper;
                    self.put(upper, &address.to_le_bytes()[4..]);
                }
                PREFETCHABLE_BASE
            }
        };
        self.put(at, &base_word);
        self.put(at + 2, &limit_word);
    }

    /// Its 16 address bits end at each 4096th port.
    fn set_io(&mut self, range: Option<(u64, u64)>) {
        let Some((start, end)) = range else { return };
        let byte = |port: u64| port.to_le_bytes()[1] & 0xf0;
        self.put(PORT_BASE, &[byte(start), byte(end - 1)]);
        self.allow(PORT_BASE, &[0xf0, 0xf0]);
        self.writable[COMMAND] |= IO_SPACE.to_le_bytes()[0];
    }

    /// Appends a capability and returns its offset. `body` is what follows id and
    /// next pointer; `writable` says which bits of it the guest may write.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let offset = self.next_capability;
        debug_assert!(offset + 2 + body.len() <= SIZE);
        self.put(self.last_pointer, &offset.to_le_bytes()[..1]);
        self.put(offset, &[id, 0]);
        self.put(offset + 2, body);
        self.allow(offset + 2, writable);
        self.bytes[STATUS] |= STATUS_LIST;
        self.last_pointer = offset + 1;
        self.next_capability = (offset + 2 + body.len()).next_multiple_of(4);
        offset
    }

    /// Reads; bytes past the end are 0, the header of "no extended capability".
    pub fn read(&self, register: usize, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(register..) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// Writes the bits that may be written.
    pub fn write(&mut self, register: usize, data: &[u8]) {
        for (value, at) in data.iter().zip(register..) {
            if let (Some(byte), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = *byte & !mask | value & mask;
            }
        }
    }

    /// Where BAR 0 answers: nowhere while memory space is disabled.
    #[must_use]
    pub fn bar(&self) -> Option<u64> {
        if self.u16_at(COMMAND) & MEMORY_SPACE == 0 {
            return None;
        }
        let mut bar = [0; 8];
        self.read(BAR0, &mut bar);
        Some(u64::from_le_bytes(bar) & !MEMORY_BITS)
    }

    /// All of it, for a guest that reads without asking us.
    #[must_use]
    pub fn bytes(&self) -> &[u8; SIZE] {
        &self.bytes
    }

    /// A byte of ours, for registers whose bits mean something to the caller.
    #[must_use]
    pub fn byte(&self, register: usize) -> u8 {
        self.bytes.get(register).copied().unwrap_or(0)
    }

    /// Two bytes of ours.
    #[must_use]
    pub fn u16_at(&self, register: usize) -> u16 {
        u16::from_le_bytes([self.byte(register), self.byte(register + 1)])
    }

    /// Sets bytes whatever the guest may write.
    pub fn put(&mut self, at: usize, bytes: &[u8]) {
        copy(&mut self.bytes, at, bytes);
    }

    /// Says which bits the guest may write.
    pub fn allow(&mut self, at: usize, mask: &[u8]) {
        copy(&mut self.writable, at, mask);
    }
}

fn copy(to: &mut [u8; SIZE], at: usize, from: &[u8]) {
    for (to, from) in to.iter_mut().skip(at).zip(from) {
        *to = *from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(space: &ConfigSpace, register: usize) -> u32 {
        let mut bytes = [0; 4];
        space.read(register, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(0x1af4, 0x1042, [0, 0x80, 1]);
        space.set_bar(0xc000_0000, 0x8000);
        space
    }

    #[test]
    fn sizing_a_bar_tells_its_size_and_kind() {
        let mut space = space();
        space.write(BAR0, &[0xff; 4]);
        space.write(BAR0 + 4, &[0xff; 4]);
        assert_eq!(u32_at(&space, BAR0), 0xffff_8004);
        assert_eq!(u32_at(&space, BAR0 + 4), u32::MAX);
        space.write(BAR0 + 8, &[0xff; 4]);
        assert_eq!(u32_at(&space, BAR0 + 8), 0);
    }

    #[test]
    fn bar_answers_only_with_memory_space_enabled() {
        let mut space = space();
        assert_eq!(space.bar(), None);
        space.write(COMMAND, &[0xff, 0xff]);
        assert_eq!(u32_at(&space, COMMAND), 0x0406);
        assert_eq!(space.bar(), Some(0xc000_0000));
        space.write(BAR0, &0xd000_7fff_u32.to_le_bytes());
        assert_eq!(space.bar(), Some(0xd000_0000));
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = space();
        let first = space.add_capability(0x11, &[0, 0, 1], &[0, 0x80]);
        let second = space.add_capability(9, &[0x10; 14], &[]);
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(space.byte(CAPABILITIES), 0x40);
        assert_eq!((space.byte(first), space.byte(first + 1)), (0x11, 0x48));
        assert_eq!((space.byte(second), space.byte(second + 1)), (9, 0));
        space.write(first, &[0xff; 5]);
        assert_eq!(space.byte(first), 0x11);
        assert_eq!(space.byte(first + 3), 0x80);
    }

    #[test]
    fn bridge_windows_open_and_close() {
        let mut bridge = ConfigSpace::bridge(1, 2, [0, 4, 6]);
        bridge.set_window(BridgeWindow::Memory, Some((0xc010_0000, 0xc030_0000)));
        assert_eq!(u32_at(&bridge, MEMORY_BASE), 0xc020_c010);
        let range = Some((0x20_0000_0000, 0x40_0000_0000));
        bridge.set_window(BridgeWindow::Prefetchable, range);
        assert_eq!(u32_at(&bridge, PREFETCHABLE_BASE), 0xfff1_0001);
        assert_eq!(u32_at(&bridge, PREFETCHABLE_BASE_UPPER), 0x20);
        assert_eq!(u32_at(&bridge, PREFETCHABLE_BASE_UPPER + 4), 0x3f);
        bridge.set_window(BridgeWindow::Memory, None);
        bridge.set_window(BridgeWindow::Prefetchable, None);
        assert_eq!(u32_at(&bridge, MEMORY_BASE), 0x0000_fff0);
        assert_eq!(u32_at(&bridge, PREFETCHABLE_BASE), 0x0001_fff1);
        bridge.write(PREFETCHABLE_BASE, &[0xff; 4]);
        assert_eq!(u32_at(&bridge, PREFETCHABLE_BASE), 0xfff1_fff1);
    }

    #[test]
    fn bridge_has_a_window_of_ports_if_it_is_given_one() {
        let mut bridge = ConfigSpace::bridge(1, 2, [0, 4, 6]);
        bridge.set_window(BridgeWindow::Io, None);
        bridge.write(PORT_BASE, &[0xff; 2]);
        bridge.write(COMMAND, &[0xff]);
        assert_eq!(u32_at(&bridge, PORT_BASE), 0, "there is none");
        assert_eq!(bridge.byte(COMMAND), 6);
        bridge.set_window(BridgeWindow::Io, Some((0x2000, 0x4000)));
        assert_eq!(u32_at(&bridge, PORT_BASE), 0x3020);
        bridge.write(PORT_BASE, &[0xff; 2]);
        bridge.write(COMMAND, &[0xff]);
        assert_eq!(u32_at(&bridge, PORT_BASE), 0xf0f0);
        assert_eq!(bridge.byte(COMMAND), 7);
    }

    #[test]
    fn bridge_keeps_the_buses_it_is_given() {
        let mut bridge = ConfigSpace::bridge(1, 2, [0, 4, 6]);
        bridge.set_buses(0, 3, 3);
        assert_eq!(bridge.secondary_bus(), 3);
        assert_eq!(bridge.byte(HEADER_TYPE), 1);
        bridge.write(PRIMARY_BUS, &[0, 7, 9, 0xff]);
        assert_eq!(u32_at(&bridge, PRIMARY_BUS), 0x0009_0700);
    }

    #[test]
    fn accesses_past_the_end_are_harmless() {
        let mut space = space();
        space.write(SIZE - 2, &[1; 8]);
        space.write(usize::MAX - 2, &[1; 2]);
        let mut data = [0xff; 8];
        space.read(SIZE - 2, &mut data);
        assert_eq!(data, [0; 8]);
    }
}
