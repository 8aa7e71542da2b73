//! A device's base address registers, and that of its expansion ROM (PCI Local Bus 3.0, 6.2.5).

use super::{BARS, ConfigError, SIZE};
use crate::pci::config::BridgeWindow;
use crate::pci::placement::BarRequest;
use crate::pci::registers::{BAR0, MEMORY_BITS, WIDE};

/// The expansion ROM's place after the BARs, as VFIO counts.
pub const ROM_INDEX: usize = 6;
/// Its register.
pub(super) const ROM: usize = 0x30;
/// Its register cannot ask for fewer bytes, and may not ask for more.
const ROM_MIN: u64 = 0x800;
const ROM_MAX: u64 = 16 << 20;

/// Bits of a BAR that are no address: it is I/O ports; it is 64 bits wide; reads have no side effects.
const IO: u8 = 1;
const TYPE: u8 = 0b110;
const PREFETCHABLE: u8 = 0b1000;
const IO_BITS: u64 = 0b11;
const ROM_BITS: u64 = 0x7ff;

/// A BAR, or the expansion ROM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// Its number, which is also its VFIO region.
    pub index: usize,
    /// Bytes, a power of two.
    pub size: u64,
    kind: BarKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum BarKind {
    Io,
    Memory { wide: bool, prefetchable: bool },
    Rom,
}

impl Bar {
    /// The expansion ROM.
    #[must_use]
    pub fn rom(size: u64) -> Self {
        Self {
            index: ROM_INDEX,
            size,
            kind: BarKind::Rom,
        }
    }

    /// Whether it is of I/O ports.
    #[must_use]
    pub fn is_io(self) -> bool {
        self.kind == BarKind::Io
    }

    /// Whether it is the expansion ROM.
    #[must_use]
    pub fn is_rom(self) -> bool {
        self.kind == BarKind::Rom
    }

    /// Whether its register is two.
    pub(super) fn is_wide(self) -> bool {
        matches!(self.kind, BarKind::Memory { wide: true, .. })
    }

    pub(super) fn register(self) -> usize {
        match self.kind {
            BarKind::Rom => ROM,
            BarKind::Io | BarKind::Memory { .. } => BAR0 + 4 * self.index,
        }
    }

    /// Bits of its register that are no address.
    pub(super) fn flag_bits(self) -> u64 {
        match self.kind {
            BarKind::Io => IO_BITS,
            BarKind::Memory { .. } => MEMORY_BITS,
            BarKind::Rom => ROM_BITS,
        }
    }

    /// And what they are.
    pub(super) fn flags(self) -> u8 {
        match self.kind {
            BarKind::Io => IO,
            BarKind::Memory { wide, prefetchable } => {
                let wide = if wide { WIDE } else { 0 };
                wide | if prefetchable { PREFETCHABLE } else { 0 }
            }
            BarKind::Rom => 0,
        }
    }

    /// What it asks of the guest's address space.
    #[must_use]
    pub fn request(self) -> BarRequest {
        BarRequest {
            size: self.size,
            window: match self.kind {
                BarKind::Io => BridgeWindow::Io,
                BarKind::Memory {
                    wide: true,
                    prefetchable: true,
                } => BridgeWindow::Prefetchable,
                BarKind::Memory { .. } | BarKind::Rom => BridgeWindow::Memory,
            },
        }
    }
}

/// Whether a ROM may have so many bytes (PCI Local Bus 3.0, 6.2.5.2).
#[must_use]
pub fn is_rom_size(size: u64) -> bool {
    size.is_power_of_two() && (ROM_MIN..=ROM_MAX).contains(&size)
}

/// Those of a device whose configuration space is `space`; `sizes` are VFIO's.
pub(super) fn bars(space: &[u8; SIZE], sizes: [u64; BARS]) -> Result<Vec<Bar>, ConfigError> {
    let mut bars = Vec::new();
    let mut upper_half = false;
    for (index, size) in sizes.into_iter().enumerate() {
        if std::mem::take(&mut upper_half) || size == 0 {
            continue;
        }
        if !size.is_power_of_two() {
            return Err(ConfigError::BarSize(index, size));
        }
        let flags = space[BAR0 + 4 * index];
        let kind = if flags & IO == 0 {
            BarKind::Memory {
                wide: flags & TYPE == WIDE,
                prefetchable: flags & PREFETCHABLE != 0,
            }
        } else {
            BarKind::Io
        };
        let bar = Bar { index, size, kind };
        upper_half = bar.is_wide() && index + 1 < BARS;
        bars.push(bar);
    }
    Ok(bars)
}
