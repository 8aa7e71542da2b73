//! Configuration space of a device of the host as its guest sees it (PCI Express
//! base 7.5).
//!
//! Each byte comes from one of two places:
//!
//! ```text
//!   ours    a copy made at the start: identity, BARs, command, capability list,
//!           MSI and MSI-X. Bits of it may be written, and we act on that
//!   device  read from the device at each access: device control and status, vendor
//!           specific registers. Writes reach the kernel's VFIO, or nothing
//! ```
//!
//! The capability list is short: what is not known to be for the guest to drive is
//! not in it and reads as zero ([`super::capabilities`]). The expansion ROM is hidden too,
//! unless it is asked for. The device itself decodes memory and ports all the time; whether the guest
//! sees its BARs depends on the guest's command register alone.

use std::io;

use super::access::{Access, CONFIG_REGION};
use super::capabilities::{self, Layout};
use crate::pci::config::BridgeWindow;
use crate::pci::placement::BarRequest;
use crate::pci::root_port::{Link, NO_LINK};

/// Configuration space of a PCI Express function.
pub const SIZE: usize = 4096;
/// That of a conventional one.
pub const CONVENTIONAL_SIZE: usize = 256;
/// The most bytes a guest reads at once.
const MAX_ACCESS: usize = 8;
/// BARs of an endpoint.
pub const BARS: usize = 6;
/// The expansion ROM's place after them, as VFIO counts.
pub const ROM_INDEX: usize = 6;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const CACHE_LINE: usize = 0x0c;
const LATENCY: usize = 0x0d;
const HEADER_TYPE: usize = 0x0e;
const BIST: usize = 0x0f;
const BAR0: usize = 0x10;
const CIS: usize = 0x28;
const ROM: usize = 0x30;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
const HEADER_END: usize = 0x40;

/// Command register bits.
const PORTS: u16 = 1;
const MEMORY: u16 = 1 << 1;
const MASTER: u16 = 1 << 2;
const PARITY: u16 = 1 << 6;
const SERR: u16 = 1 << 8;
const NO_INTX: u16 = 1 << 10;
/// Status register: an INTx is pending; there is a capability list.
const STATUS_INTX: u8 = 1 << 3;
const STATUS_LIST: u8 = 1 << 4;
/// Interrupt pin of a function that is alone in its slot.
const INTA: u8 = 1;
/// Header type: more functions in this slot; what type it is.
const MULTI_FUNCTION: u8 = 1 << 7;
/// BAR flags.
const BAR_IO: u8 = 1;
const BAR_IO_FLAGS: u8 = 0b11;
const BAR_MEMORY_FLAGS: u8 = 0b1111;
/// The ROM's register: whether it answers, and bits that are no address.
const ROM_ENABLE: u32 = 1;
const ROM_FLAGS: u64 = 0x7ff;
const BAR_64: u8 = 0b100;
const BAR_PREFETCHABLE: u8 = 0b1000;

/// A device the guest cannot be given.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// Not an endpoint.
    #[error("it is a bridge (header type {0}): only endpoints can be passed on")]
    Bridge(u8),
    /// Its configuration space reads as ones.
    #[error("it does not answer: its configuration space reads as ones")]
    Gone,
    /// VFIO's size of a BAR is not one that hardware has.
    #[error("its BAR {0} has {1:#x} bytes, which is no power of two")]
    BarSize(usize, u64),
}

/// A BAR, or the expansion ROM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// Its number, which is also its VFIO region.
    pub index: usize,
    /// Bytes, a power of two.
    pub size: u64,
    flags: u8,
}

impl Bar {
    /// Whether it is of I/O ports.
    #[must_use]
    pub fn is_io(self) -> bool {
        self.flags & BAR_IO != 0
    }

    /// Whether it is the expansion ROM.
    #[must_use]
    pub fn is_rom(self) -> bool {
        self.index == ROM_INDEX
    }

    fn register(self) -> usize {
        if self.is_rom() {
            ROM
        } else {
            BAR0 + 4 * self.index
        }
    }

    fn is_64(self) -> bool {
        !self.is_io() && self.flags & 0b110 == BAR_64
    }

    /// Bits of its register that are no address.
    fn flag_bits(self) -> u64 {
        match self.flags & BAR_IO {
            _ if self.is_rom() => ROM_FLAGS,
            0 => BAR_MEMORY_FLAGS.into(),
            _ => BAR_IO_FLAGS.into(),
        }
    }

    /// What it asks of the guest's address space.
    #[must_use]
    pub fn request(self) -> BarRequest {
        let prefetchable = self.is_64() && self.flags & BAR_PREFETCHABLE != 0;
        BarRequest {
            size: self.size,
            window: match prefetchable {
                _ if self.is_io() => BridgeWindow::Ports,
                true => BridgeWindow::Prefetchable,
                false => BridgeWindow::Memory,
            },
        }
    }
}

/// Where a byte comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The copy.
    Ours,
    /// The device; writes are dropped.
    Device,
    /// The device, which is written too.
    DeviceWritable,
}

/// The bytes, where they come from, and which bits of ours may be written.
pub struct Bytes {
    /// Ours.
    pub ours: [u8; SIZE],
    /// Bits of ours that the guest may write.
    pub writable: [u8; SIZE],
    /// Whose each byte is.
    pub source: [Source; SIZE],
}

/// The guest's configuration space of one device.
pub struct GuestConfig {
    bytes: Box<Bytes>,
    bars: Vec<Bar>,
    layout: Layout,
    has_intx: bool,
    /// What the device's command register holds.
    command: u16,
}

impl GuestConfig {
    /// From the device's own: `space` is as long as its kind has it, `sizes` are
    /// those of the BARs' regions.
    ///
    /// # Errors
    ///
    /// When the guest cannot be given such a device.
    pub fn new(space: &[u8], sizes: [u64; BARS]) -> Result<Self, ConfigError> {
        let mut bytes = Box::new(Bytes {
            ours: [0; SIZE],
            writable: [0; SIZE],
            source: [Source::Ours; SIZE],
        });
        for (to, from) in bytes.ours.iter_mut().zip(space) {
            *to = *from;
        }
        if bytes.ours[..2] == [0xff; 2] {
            return Err(ConfigError::Gone);
        }
        let kind = bytes.ours[HEADER_TYPE] & !MULTI_FUNCTION;
        if kind != 0 {
            return Err(ConfigError::Bridge(kind));
        }
        let bars = bars(&bytes.ours, sizes)?;
        let has_intx = bytes.ours[INTERRUPT_PIN] != 0;
        header(&mut bytes);
        if bars.iter().any(|bar| bar.is_io()) {
            bytes.writable[COMMAND] |= PORTS.to_le_bytes()[0];
        }
        let layout = capabilities::filter(&mut bytes, space.len().min(SIZE), &bars);
        bytes.ours[STATUS] &= !(STATUS_INTX | STATUS_LIST);
        if bytes.ours[capabilities::POINTER] != 0 {
            bytes.ours[STATUS] |= STATUS_LIST;
        }
        if has_intx {
            bytes.ours[INTERRUPT_PIN] = INTA;
        }
        Ok(Self {
            bytes,
            bars,
            layout,
            has_intx,
            command: 0,
        })
    }

    /// Shows its expansion ROM of `size` bytes, 0 if it has none.
    pub fn show_rom(&mut self, size: u64) {
        if size.is_power_of_two() && size > ROM_FLAGS {
            self.bars.push(Bar {
                index: ROM_INDEX,
                size,
                flags: 0,
            });
        }
    }

    /// Its BARs, and the ROM if that is shown.
    #[must_use]
    pub fn bars(&self) -> &[Bar] {
        &self.bars
    }

    /// Where the capabilities are that we act on.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Whether it has an interrupt line.
    #[must_use]
    pub fn has_intx(&self) -> bool {
        self.has_intx
    }

    /// Whether the device is to raise its line: once the guest has a use for the device, until
    /// it turns the line off or has messages instead (PCI Express base 6.1.4.3).
    #[must_use]
    pub fn wants_intx(&self) -> bool {
        let Layout { msi, msix, .. } = self.layout;
        let on = |control: Option<usize>, bit| {
            control.is_some_and(|control| self.u16_at(control) & bit != 0)
        };
        let command = self.u16_at(COMMAND);
        self.has_intx
            && command & (PORTS | MEMORY | MASTER) != 0
            && command & NO_INTX == 0
            && !on(msi.map(|msi| msi.control), capabilities::MSI_ENABLE)
            && !on(msix.map(|msix| msix.control), capabilities::MSIX_ENABLE)
    }

    /// Its link.
    #[must_use]
    pub fn link(&self) -> Link {
        self.layout.link.unwrap_or(NO_LINK)
    }

    /// Puts the BARs where they have been placed, in their order. An I/O BAR without a place is
    /// not shown.
    pub fn set_bars(&mut self, addresses: &[u64]) {
        let Bytes { ours, writable, .. } = &mut *self.bytes;
        for (bar, address) in self.bars.iter().zip(addresses) {
            if bar.is_io() && *address == 0 {
                continue;
            }
            let at = bar.register();
            let len = if bar.is_64() { 8 } else { 4 };
            let value = address | u64::from(bar.flags);
            copy(ours, at, &value.to_le_bytes()[..len]);
            let enable = if bar.is_rom() { ROM_ENABLE } else { 0 };
            let mask = !(bar.size - 1) & !bar.flag_bits() | u64::from(enable);
            copy(writable, at, &mask.to_le_bytes()[..len]);
        }
    }

    /// Where a BAR is now, by its place among [`Self::bars`]: nowhere while memory space, or
    /// I/O space, is disabled, and the ROM while it is itself.
    #[must_use]
    pub fn bar_address(&self, place: usize) -> Option<u64> {
        let bar = self.bars.get(place)?;
        let enable = if bar.is_io() { PORTS } else { MEMORY };
        if self.u16_at(COMMAND) & enable == 0 {
            return None;
        }
        if bar.is_rom() && self.u32_at(ROM) & ROM_ENABLE == 0 {
            return None;
        }
        let at = bar.register();
        let low = u64::from(self.u32_at(at)) & !bar.flag_bits();
        if bar.is_io() && low == 0 {
            return None;
        }
        let high = if bar.is_64() { self.u32_at(at + 4) } else { 0 };
        Some(u64::from(high) << 32 | low)
    }

    /// Reads. Bytes past the end are 0, the header of "no extended capability".
    ///
    /// # Errors
    ///
    /// The device's; `data` has our bytes then, and ones in place of its own.
    pub fn read(&self, device: &dyn Access, register: usize, data: &mut [u8]) -> io::Result<()> {
        let mut live = [0xff; MAX_ACCESS];
        let len = data.len().min(MAX_ACCESS);
        let ours = self
            .sources(register, len)
            .all(|source| source == Source::Ours);
        let result = if ours {
            Ok(())
        } else {
            device.read(CONFIG_REGION, register as u64, &mut live[..len])
        };
        if result.is_err() {
            live.fill(0xff);
        }
        data.fill(0);
        for ((byte, live), at) in data.iter_mut().zip(live).zip(register..SIZE) {
            *byte = match self.bytes.source[at] {
                Source::Ours => self.bytes.ours[at],
                Source::Device | Source::DeviceWritable => live,
            };
        }
        result
    }

    fn sources(&self, register: usize, len: usize) -> impl Iterator<Item = Source> {
        self.bytes.source.iter().skip(register).take(len).copied()
    }

    /// Writes what the guest may.
    ///
    /// # Errors
    ///
    /// The device's.
    pub fn write(&mut self, device: &dyn Access, register: usize, data: &[u8]) -> io::Result<()> {
        let Bytes { ours, writable, .. } = &mut *self.bytes;
        for (value, at) in data.iter().zip(register..SIZE) {
            ours[at] = ours[at] & !writable[at] | value & writable[at];
        }
        let passed_on = self
            .sources(register, data.len())
            .filter(|source| *source == Source::DeviceWritable)
            .count();
        if passed_on == data.len() {
            device.write(CONFIG_REGION, register as u64, data)?;
        } else {
            for (value, at) in data.chunks(1).zip(register..SIZE) {
                if self.bytes.source[at] == Source::DeviceWritable {
                    device.write(CONFIG_REGION, at as u64, value)?;
                }
            }
        }
        self.sync_command(device)
    }

    /// Has the device decode memory and ports, and do what the guest's command register says of
    /// the rest. To be called once at the start, and after a reset.
    ///
    /// # Errors
    ///
    /// The device's.
    pub fn sync_command(&mut self, device: &dyn Access) -> io::Result<()> {
        let guest = self.u16_at(COMMAND) & (MASTER | PARITY | SERR);
        let no_intx = if self.wants_intx() { 0 } else { NO_INTX };
        let has_ports = self.bars.iter().any(|bar| bar.is_io());
        let ports = if has_ports { PORTS } else { 0 };
        let command = guest | MEMORY | ports | no_intx;
        if command != self.command {
            device.write(CONFIG_REGION, COMMAND as u64, &command.to_le_bytes())?;
            self.command = command;
        }
        Ok(())
    }

    /// Two of our bytes.
    #[must_use]
    pub fn u16_at(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.byte(at), self.byte(at + 1)])
    }

    /// Four of our bytes.
    #[must_use]
    pub fn u32_at(&self, at: usize) -> u32 {
        u32::from(self.u16_at(at + 2)) << 16 | u32::from(self.u16_at(at))
    }

    fn byte(&self, at: usize) -> u8 {
        self.bytes.ours.get(at).copied().unwrap_or(0)
    }
}

/// Has a device forget the guest: no DMA, no memory, no ports, no interrupt.
///
/// # Errors
///
/// The device's.
pub fn silence(device: &dyn Access) -> io::Result<()> {
    device.write(CONFIG_REGION, COMMAND as u64, &NO_INTX.to_le_bytes())
}

/// The header: what it hides, and what of it may be written.
fn header(bytes: &mut Bytes) {
    let Bytes {
        ours,
        writable,
        source,
    } = bytes;
    ours[HEADER_TYPE] = 0;
    for (start, end) in [
        (COMMAND, COMMAND + 2),
        (CACHE_LINE, LATENCY + 1),
        (BIST, CIS + 4),
        (ROM, ROM + 4),
        (INTERRUPT_LINE, HEADER_END),
    ] {
        ours[start..end].fill(0);
    }
    let command = MEMORY | MASTER | PARITY | SERR | NO_INTX;
    copy(writable, COMMAND, &command.to_le_bytes());
    writable[CACHE_LINE] = 0xff;
    writable[INTERRUPT_LINE] = 0xff;
    // Errors of the bus, cleared by writing ones.
    source[STATUS + 1] = Source::DeviceWritable;
}

fn bars(space: &[u8; SIZE], sizes: [u64; BARS]) -> Result<Vec<Bar>, ConfigError> {
    let mut bars = Vec::new();
    let mut upper_half = false;
    for (index, size) in sizes.into_iter().enumerate() {
        if std::mem::take(&mut upper_half) || size == 0 {
            continue;
        }
        let mut flags = space[BAR0 + 4 * index] & BAR_MEMORY_FLAGS;
        if flags & BAR_IO != 0 {
            flags = BAR_IO;
        }
        if !size.is_power_of_two() {
            return Err(ConfigError::BarSize(index, size));
        }
        let bar = Bar { index, size, flags };
        upper_half = bar.is_64() && index + 1 < BARS;
        bars.push(bar);
    }
    Ok(bars)
}

fn copy(to: &mut [u8; SIZE], at: usize, from: &[u8]) {
    for (to, from) in to.iter_mut().skip(at).zip(from) {
        *to = *from;
    }
}

#[cfg(test)]
mod tests;
