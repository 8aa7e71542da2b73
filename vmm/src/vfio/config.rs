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
//! sees its BARs depends on the guest's command register alone. It raises its line only while somebody
//! of ours listens. Function-level reset is hidden: it would reset the device and not our half.

use std::io;
use std::ops::Range;

use super::access::{Access, CONFIG_REGION};
use super::capabilities::{self, Layout, MSIX_ENABLE};
use crate::pci::registers::{
    CACHE_LINE, CAPABILITIES, COMMAND, HEADER_TYPE, INTERRUPT_LINE, INTX_DISABLE, IO_SPACE, MASTER,
    MEMORY_SPACE, MSI_ENABLE, STATUS, STATUS_LIST,
};
use crate::pci::root_port::{Link, NO_LINK};

mod bar;

pub use bar::{Bar, ROM_INDEX, is_rom_size};

use bar::{ROM, bars};

/// Configuration space of a PCI Express function.
pub const SIZE: usize = 4096;
/// That of a conventional one.
pub const CONVENTIONAL_SIZE: usize = 256;
/// The header that each has.
pub const HEADER_SIZE: usize = 0x40;
/// The most bytes a guest reads at once.
const MAX_ACCESS: usize = 8;
/// BARs of an endpoint.
pub const BARS: usize = 6;

const LATENCY: usize = 0x0d;
const BIST: usize = 0x0f;
const CIS: usize = 0x28;
const INTERRUPT_PIN: usize = 0x3d;

/// Command register: answer parity errors, report errors.
const PARITY: u16 = 1 << 6;
const SERR: u16 = 1 << 8;
/// Status register: an INTx is pending.
const STATUS_INTX: u8 = 1 << 3;
/// Interrupt pin of a function that is alone in its slot.
const INTA: u8 = 1;
/// Header type: more functions in this slot; what type it is.
const MULTI_FUNCTION: u8 = 1 << 7;
/// The ROM's register: whether it answers.
const ROM_ENABLE: u32 = 1;

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
    /// Its driver would wait for ever.
    #[error(
        "its only interrupt is a line, and the pod has none: this host's KVM makes no I/O APIC \
         (CONFIG_KVM_IOAPIC)"
    )]
    OnlyIntx,
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
    /// Bits that the guest may write, of ours or of what is passed on.
    pub writable: [u8; SIZE],
    /// Whose each byte is.
    pub source: [Source; SIZE],
}

impl Bytes {
    /// Leaves bytes to the device, all bits of them.
    pub fn pass_on(&mut self, range: Range<usize>) {
        self.source[range.clone()].fill(Source::DeviceWritable);
        self.writable[range].fill(0xff);
    }
}

/// The guest's configuration space of one device.
pub struct GuestConfig {
    bytes: Box<Bytes>,
    /// How much of it the device has.
    size: usize,
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
            bytes.writable[COMMAND] |= IO_SPACE.to_le_bytes()[0];
        }
        let size = space.len().min(SIZE);
        let layout = capabilities::filter(&mut bytes, size, &bars);
        bytes.ours[STATUS] &= !(STATUS_INTX | STATUS_LIST);
        if bytes.ours[CAPABILITIES] != 0 {
            bytes.ours[STATUS] |= STATUS_LIST;
        }
        if has_intx {
            bytes.ours[INTERRUPT_PIN] = INTA;
        }
        Ok(Self {
            bytes,
            size,
            bars,
            layout,
            has_intx,
            command: 0,
        })
    }

    /// Shows its expansion ROM of `size` bytes, which are such as [`is_rom_size`] allows.
    pub fn show_rom(&mut self, size: u64) {
        self.bars.push(Bar::rom(size));
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

    /// Hides its interrupt line.
    ///
    /// # Errors
    ///
    /// When it has no messages instead.
    pub fn hide_intx(&mut self) -> Result<(), ConfigError> {
        if self.has_intx && self.layout.msi.is_none() && self.layout.msix.is_none() {
            return Err(ConfigError::OnlyIntx);
        }
        self.has_intx = false;
        self.bytes.ours[INTERRUPT_PIN] = 0;
        Ok(())
    }

    /// What of the device the guest uses: bits of the command register.
    #[must_use]
    pub fn in_use(&self) -> u16 {
        self.u16_at(COMMAND) & (IO_SPACE | MEMORY_SPACE | MASTER)
    }

    /// Whether somebody is to listen to its line: while the guest uses the device and has no
    /// messages instead (PCI Express base 6.1.4.3). That the guest turns the line off changes
    /// nothing here, since drivers may do so at each interrupt.
    #[must_use]
    pub fn wants_intx(&self) -> bool {
        self.has_intx && self.in_use() != 0 && !self.msi_is_on() && !self.msix_is_on()
    }

    /// Whether the guest has turned MSI on,
    #[must_use]
    pub fn msi_is_on(&self) -> bool {
        let msi = self.layout.msi;
        msi.is_some_and(|msi| self.u16_at(msi.control) & MSI_ENABLE != 0)
    }

    /// and whether MSI-X.
    #[must_use]
    pub fn msix_is_on(&self) -> bool {
        let msix = self.layout.msix;
        msix.is_some_and(|msix| self.u16_at(msix.control) & MSIX_ENABLE != 0)
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
            let len = if bar.is_wide() { 8 } else { 4 };
            let value = address | u64::from(bar.flags());
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
        let enable = if bar.is_io() { IO_SPACE } else { MEMORY_SPACE };
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
        let high = if bar.is_wide() {
            self.u32_at(at + 4)
        } else {
            0
        };
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
        let status = (register..register + len).position(|at| self.has_intx && at == STATUS);
        let ours = self
            .sources(register, len)
            .all(|source| source == Source::Ours);
        let result = if ours && status.is_none() {
            Ok(())
        } else {
            // Of a device whose space ends here.
            let there = len.min(self.size.saturating_sub(register));
            device.read(CONFIG_REGION, register as u64, &mut live[..there])
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
        // On a line that is shared it tells whose interrupt it is.
        if let (Ok(()), Some(at)) = (&result, status) {
            data[at] |= live[at] & STATUS_INTX;
        }
        result
    }

    fn sources(&self, register: usize, len: usize) -> impl Iterator<Item = Source> {
        self.bytes.source.iter().skip(register).take(len).copied()
    }

    /// Writes what the guest may; [`Self::sync_command`] is to follow.
    ///
    /// # Errors
    ///
    /// The device's.
    pub fn write(&mut self, device: &dyn Access, register: usize, data: &[u8]) -> io::Result<()> {
        let Bytes { ours, writable, .. } = &mut *self.bytes;
        let mut data = data.to_vec();
        for (value, at) in data.iter_mut().zip(register..SIZE) {
            *value &= writable[at];
            ours[at] = ours[at] & !writable[at] | *value;
        }
        let passed_on = self
            .sources(register, data.len())
            .filter(|source| *source == Source::DeviceWritable)
            .count();
        if passed_on == data.len() {
            return device.write(CONFIG_REGION, register as u64, &data);
        }
        for (value, at) in data.chunks(1).zip(register..SIZE) {
            if self.bytes.source[at] == Source::DeviceWritable {
                device.write(CONFIG_REGION, at as u64, value)?;
            }
        }
        Ok(())
    }

    /// Has the device decode memory and ports, and do what the guest's command register says of
    /// the rest. Its line is let loose only if somebody listens to it (`has_listener`): else it would
    /// interrupt the host, which gives up a line that nobody serves, with all devices that share it.
    ///
    /// # Errors
    ///
    /// The device's.
    pub fn sync_command(&mut self, device: &dyn Access, has_listener: bool) -> io::Result<()> {
        let guest = self.u16_at(COMMAND);
        let is_loose = has_listener && self.wants_intx();
        let no_intx = if is_loose {
            guest & INTX_DISABLE
        } else {
            INTX_DISABLE
        };
        let has_ports = self.bars.iter().any(|bar| bar.is_io());
        let ports = if has_ports { IO_SPACE } else { 0 };
        let command = guest & (MASTER | PARITY | SERR) | MEMORY_SPACE | ports | no_intx;
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
    device.write(CONFIG_REGION, COMMAND as u64, &INTX_DISABLE.to_le_bytes())
}

/// The header: what it hides, and what of it may be written.
fn header(bytes: &mut Bytes) {
    bytes.ours[HEADER_TYPE] = 0;
    for (start, end) in [
        (COMMAND, COMMAND + 2),
        (CACHE_LINE, LATENCY + 1),
        (BIST, CIS + 4),
        (ROM, ROM + 4),
        (INTERRUPT_LINE, HEADER_SIZE),
    ] {
        bytes.ours[start..end].fill(0);
    }
    let command = MEMORY_SPACE | MASTER | PARITY | SERR | INTX_DISABLE;
    copy(&mut bytes.writable, COMMAND, &command.to_le_bytes());
    bytes.writable[CACHE_LINE] = 0xff;
    bytes.writable[INTERRUPT_LINE] = 0xff;
    // Errors of the bus, cleared by writing ones.
    bytes.pass_on(STATUS + 1..STATUS + 2);
}

fn copy(to: &mut [u8; SIZE], at: usize, from: &[u8]) {
    for (to, from) in to.iter_mut().skip(at).zip(from) {
        *to = *from;
    }
}

#[cfg(test)]
mod tests;
