//! What this module asks of a VFIO device; its tests put another device there.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;

use vmm_sys_util::eventfd::EventFd;

use crate::vm::Mapping;

/// A region: a BAR, the expansion ROM, or configuration space.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Region {
    /// Bytes; 0 when the device has no such region.
    pub size: u64,
    /// The parts that can be mapped, as offset and length.
    pub mappable: Vec<(u64, u64)>,
}

/// Interrupts of a PCI device, by VFIO's index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Irq {
    /// The line. The host masks it whenever it is raised.
    Intx,
    /// Message signalled.
    Msi,
    /// Message signalled, with a table.
    Msix,
    /// The device had an uncorrectable error.
    Error,
    /// The host wants the device back.
    Request,
}

/// Why interrupts are not what they were to be.
#[derive(Debug, thiserror::Error)]
pub enum IrqError {
    /// The host has not as many vectors as were to be turned on. None is on.
    #[error("the host has only {available} of {asked} interrupt vectors for it")]
    Fewer {
        /// Those it has.
        available: u32,
        /// Those that were to be turned on.
        asked: u32,
    },
    /// The kernel's answer.
    #[error(transparent)]
    Kernel(#[from] io::Error),
}

impl From<IrqError> for io::Error {
    fn from(error: IrqError) -> Self {
        match error {
            IrqError::Kernel(error) => error,
            fewer @ IrqError::Fewer { .. } => Self::other(fewer),
        }
    }
}

/// A function that is reset with another one's bus (`struct vfio_pci_dependent_device`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Neighbor {
    /// PCI segment.
    pub segment: u16,
    /// Bus.
    pub bus: u8,
    /// Device, five bits, and function, three.
    pub devfn: u8,
}

impl fmt::Display for Neighbor {
    /// Its address, as in sysfs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (device, function) = (self.devfn >> 3, self.devfn & 7);
        write!(
            f,
            "{:04x}:{:02x}:{device:02x}.{function}",
            self.segment, self.bus
        )
    }
}

/// Configuration space's place among the regions; those before it are BAR 0 to 5
/// and the ROM.
pub const CONFIG_REGION: u32 = vfio_bindings::bindings::vfio::VFIO_PCI_CONFIG_REGION_INDEX;

/// The expansion ROM's.
pub const ROM_REGION: u32 = vfio_bindings::bindings::vfio::VFIO_PCI_ROM_REGION_INDEX;

/// A VFIO PCI device.
pub trait Access: Send + Sync {
    /// What a region is.
    ///
    /// # Errors
    ///
    /// The kernel's.
    fn region(&self, index: u32) -> io::Result<Region>;

    /// Fills `data` from a region.
    ///
    /// # Errors
    ///
    /// The kernel's, or that it had less.
    fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Writes `data` to a region.
    ///
    /// # Errors
    ///
    /// The kernel's, or that it took less.
    fn write(&self, region: u32, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Maps a part of a region.
    ///
    /// # Errors
    ///
    /// The kernel's.
    fn map(&self, region: u32, offset: u64, len: u64) -> io::Result<Mapping>;

    /// How many interrupts of a kind there are.
    ///
    /// # Errors
    ///
    /// The kernel's.
    fn irq_count(&self, irq: Irq) -> io::Result<u32>;

    /// Has the interrupts from `start` on signal these events, or nothing where
    /// there is `None`. The first call for a kind turns it on, with as many interrupts.
    ///
    /// # Errors
    ///
    /// The kernel's, or how many there are when there are fewer.
    fn set_irqs(&self, irq: Irq, start: u32, events: &[Option<&EventFd>]) -> Result<(), IrqError>;

    /// Has INTx, which is on, unmasked whenever `event` is signalled; `false` if the device takes no
    /// event for that.
    ///
    /// # Errors
    ///
    /// The kernel's.
    fn unmask_on(&self, event: &EventFd) -> io::Result<bool>;

    /// Unmasks INTx, which is on.
    ///
    /// # Errors
    ///
    /// The kernel's.
    fn unmask(&self) -> io::Result<()>;

    /// Turns all interrupts of a kind off.
    ///
    /// # Errors
    ///
    /// The kernel's.
    fn disable_irqs(&self, irq: Irq) -> io::Result<()>;

    /// Resets the device; `false` if there is no way to.
    ///
    /// # Errors
    ///
    /// The kernel's.
    fn reset(&self) -> io::Result<bool>;

    /// All that is reset with its bus, itself included; nothing when the bus cannot be reset.
    ///
    /// # Errors
    ///
    /// The kernel's.
    fn on_bus(&self) -> io::Result<Vec<Neighbor>>;

    /// Resets its bus, with `neighbors` on it. `groups` are those of the pod, none with iommufd.
    ///
    /// # Errors
    ///
    /// The kernel's: somebody else has one of them, for example.
    fn reset_bus(&self, neighbors: &[Neighbor], groups: &[OwnedFd]) -> io::Result<()>;
}
