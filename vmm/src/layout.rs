//! The guest's physical address space and I/O ports.
//!
//! ```text
//!   0            low RAM            0xc000_0000   32-bit window   0xe000_0000 ECAM ... 0xfec0_0000 APICs  4 GiB
//!   |--------------------------------|----------------------------|-----------|-----------------------|
//!   4 GiB        high RAM           added memory    64-bit window (multiple of 64 GiB)    1 << physical bits
//!   |--------------------------------|---------------|------------------------------------------------|
//! ```
//!
//! The first megabyte is RAM, of which the boot data and the ACPI tables keep
//! the places named here. BARs are assigned by us and Linux keeps them: those of
//! virtio devices at the start of the 32-bit window, those of the host's devices
//! after them and in the 64-bit window ([`crate::pci::placement`]).

/// One mebibyte.
pub const MIB: u64 = 1 << 20;
/// One gibibyte.
pub const GIB: u64 = 1 << 30;

/// PVH start info, module list and memory map (boot protocol of Xen's
/// `start_info.h`).
pub const START_INFO: u64 = 0x6000;
/// Module list, after the start info.
pub const MODULE_LIST: u64 = 0x6100;
/// Memory map, after the module list.
pub const MEMORY_MAP: u64 = 0x6200;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// x86 Linux takes no more (`COMMAND_LINE_SIZE`), terminator included.
pub const CMDLINE_MAX: usize = 2048;
/// Where a kernel that ends leaves its last words, see [`crate::pstore`]. Linux
/// uses nothing below one mebibyte but what its trampoline takes, from the end.
pub const PSTORE: u64 = 0x4_0000;
/// A power of two. pstore fills it with the end of the kernel's log.
pub const PSTORE_SIZE: u64 = 0x4000;
/// End of the RAM the kernel may use below the first megabyte.
pub const LOW_RAM_END: u64 = 0xa_0000;
/// ACPI tables, the RSDP first.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// End of the space for ACPI tables.
pub const ACPI_TABLES_END: u64 = 0xf_0000;
/// Where real-mode code would find the firmware's reset entry, `ffff:0000`.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Kernel and everything else start at one mebibyte.
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// End of RAM below 4 GiB, start of the 32-bit window.
pub const MMIO_HOLE_START: u64 = 0xc000_0000;
/// RAM that does not fit below the hole goes here.
pub const MMIO_HOLE_END: u64 = 4 * GIB;

/// 32-bit window for PCI BARs.
pub const WINDOW32_START: u64 = MMIO_HOLE_START;
/// Where the windows of root ports begin; virtio devices are below.
pub const WINDOW32_PORTS: u64 = WINDOW32_START + MIB;
/// End (exclusive) of the 32-bit window.
pub const WINDOW32_END: u64 = 0xe000_0000;

/// PCI Express configuration space (PCI Firmware 3.3, 4.1.2).
pub const ECAM_START: u64 = 0xe000_0000;
/// Room for bus 0 and one for each root port it may have.
pub const ECAM_SIZE: u64 = 32 * ECAM_BUS_SIZE;
/// Configuration space of a bus.
pub const ECAM_BUS_SIZE: u64 = MIB;

/// I/O APIC, of machines that have one (Intel 82093AA).
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local APIC (Intel SDM volume 3, 11.4.1).
pub const LAPIC: u32 = 0xfee0_0000;
/// A page KVM needs on Intel processors without unrestricted guest mode.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages KVM needs on Intel processors.
pub const KVM_TSS: usize = 0xfffb_d000;

/// ACPI sleep control register (ACPI 6.5, 4.8.3.7).
pub const PORT_SLEEP_CONTROL: u16 = 0x600;
/// ACPI sleep status register.
pub const PORT_SLEEP_STATUS: u16 = 0x601;
/// ACPI reset register (ACPI 6.5, 4.8.3.6).
pub const PORT_RESET: u16 = 0x602;
/// Registers from [`PORT_SLEEP_CONTROL`] on.
pub const POWER_PORTS: u16 = 3;
/// NMI status and control, see [`crate::nmi`].
pub const PORT_NMI: u16 = 0x61;
/// pvpanic, at QEMU's customary place.
pub const PORT_PVPANIC: u16 = 0x505;
/// First serial port.
pub const PORT_SERIAL: u16 = 0x3f8;
/// I/O BARs of the host's devices, behind everything of ours (exclusive end).
pub const IO_START: u64 = 0x1000;
/// End of the I/O ports there are.
pub const IO_END: u64 = 0x1_0000;
/// Registers of a serial port.
pub const SERIAL_PORTS: u16 = 8;

/// Alignment of added memory: the largest memory block of Linux on x86.
const GROWTH_ALIGN: u64 = 2 * GIB;
/// Alignment of the 64-bit window.
const WINDOW64_ALIGN: u64 = 64 * GIB;
/// More address bits than any device needs; larger windows only cost the
/// guest page-table levels.
const WINDOW64_MAX_BITS: u8 = 46;

/// Where memory may be added to a guest with `ram_bytes` of RAM.
#[must_use]
pub fn growth_start(ram_bytes: u64) -> u64 {
    let ram_end = ram_bytes.max(MMIO_HOLE_START) + (MMIO_HOLE_END - MMIO_HOLE_START);
    ram_end.next_multiple_of(GROWTH_ALIGN)
}

/// The 64-bit window, `start..end`, above memory that ends at `memory_end`, for a
/// guest with `physical_bits` address bits. `None` when nothing is left there.
#[must_use]
pub fn window64(memory_end: u64, physical_bits: u8) -> Option<(u64, u64)> {
    let start = memory_end
        .max(MMIO_HOLE_END)
        .next_multiple_of(WINDOW64_ALIGN);
    let end = 1u64 << physical_bits.min(WINDOW64_MAX_BITS);
    (start < end).then_some((start, end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn window_lies_above_memory() {
        assert_eq!(window64(GIB, 40), Some((64 * GIB, 1024 * GIB)));
        assert_eq!(window64(64 * GIB, 40), Some((64 * GIB, 1024 * GIB)));
        assert_eq!(window64(65 * GIB, 40), Some((128 * GIB, 1024 * GIB)));
    }

    #[test]
    fn added_memory_lies_above_ram_and_hole() {
        assert_eq!(growth_start(GIB), 4 * GIB);
        assert_eq!(growth_start(4 * GIB), 6 * GIB);
    }

    #[test]
    fn no_window_without_address_bits() {
        assert_eq!(window64(GIB, 36), None);
    }
}
