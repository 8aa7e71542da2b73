//! Registers of configuration space that functions of ours and devices of the host have
//! alike: where they are, and bits of them (PCI Express base 7.5).

/// Command and status; cache line size and header type.
pub const COMMAND: usize = 0x04;
pub const STATUS: usize = 0x06;
pub const CACHE_LINE: usize = 0x0c;
pub const HEADER_TYPE: usize = 0x0e;
/// First base address register.
pub const BAR0: usize = 0x10;
/// The pointer to the first capability, and where the first may be.
pub const CAPABILITIES: usize = 0x34;
pub const FIRST_CAPABILITY: usize = 0x40;
/// What software notes of the interrupt line.
pub const INTERRUPT_LINE: usize = 0x3c;

/// Command register: I/O space, memory space, bus master, interrupt disable.
pub const IO_SPACE: u16 = 1;
pub const MEMORY_SPACE: u16 = 1 << 1;
pub const MASTER: u16 = 1 << 2;
pub const INTX_DISABLE: u16 = 1 << 10;
/// Status register: there is a capability list.
pub const STATUS_LIST: u8 = 1 << 4;

/// Base address register of memory: it is 64 bits wide; all bits that are no address.
pub const WIDE: u8 = 0b100;
pub const MEMORY_BITS: u64 = 0b1111;

/// Capability ids: MSI, vendor-specific, PCI Express, MSI-X.
pub const MSI: u8 = 0x05;
pub const VENDOR_SPECIFIC: u8 = 0x09;
pub const EXPRESS: u8 = 0x10;
pub const MSIX: u8 = 0x11;

/// Message control of MSI (PCI Express base 7.7.1): enable, 64-bit addresses.
pub const MSI_ENABLE: u16 = 1;
pub const MSI_64: u16 = 1 << 7;

/// Offsets in the PCI Express capability (PCI Express base 7.5.3).
pub mod express {
    pub const FLAGS: usize = 0x02;
    pub const DEVICE_CAPABILITIES: usize = 0x04;
    pub const DEVICE_CONTROL: usize = 0x08;
    pub const LINK_CAPABILITIES: usize = 0x0c;
    pub const LINK_CONTROL: usize = 0x10;
    pub const LINK_STATUS: usize = 0x12;
    pub const SLOT_CAPABILITIES: usize = 0x14;
    pub const DEVICE_CAPABILITIES_2: usize = 0x24;
    pub const DEVICE_CONTROL_2: usize = 0x28;
    pub const LINK_CAPABILITIES_2: usize = 0x2c;
    pub const LINK_CONTROL_2: usize = 0x30;
}
