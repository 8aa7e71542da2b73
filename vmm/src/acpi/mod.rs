//! ACPI tables of a hardware-reduced machine (ACPI 6.5, 4.1): RSDP, XSDT, FADT,
//! MADT, MCFG and DSDT.
//!
//! No PIC, no power-management timer, no CMOS clock, no VGA, no 8042,
//! and each absence is said in the table that has a flag for it, so that Linux
//! does not probe. Interrupts are MSIs, and lines of an I/O APIC where there are root ports;
//! the FADT's sleep and reset registers are
//! those of [`crate::power`].

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::virtio::GuestMemory;
use crate::{layout, power};

mod dsdt;

pub use dsdt::Platform;

const OEM: [u8; 6] = *b"NACRE ";
const OEM_TABLE: [u8; 8] = *b"NACREVM ";
const OEM_REVISION: u32 = 1;

/// FADT `IAPC_BOOT_ARCH`: no VGA, no CMOS clock (ACPI 6.5, table 5.10).
const NO_VGA_NO_CMOS: u16 = 1 << 2 | 1 << 5;
/// Tables start at multiples of this.
const TABLE_ALIGN: usize = 16;

/// Why the tables cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// Too large for their place.
    #[error("{0} bytes of ACPI tables do not fit")]
    TooLarge(usize),
    /// Writing guest memory failed.
    #[error("guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// Writes the tables for `platform` to [`layout::ACPI_TABLES`].
///
/// # Errors
///
/// When they do not fit there.
pub fn write(memory: &GuestMemory, platform: &Platform) -> Result<(), AcpiError> {
    let bytes = Tables::new(platform, layout::ACPI_TABLES).bytes;
    let room = layout::ACPI_TABLES_END - layout::ACPI_TABLES;
    if bytes.len() as u64 > room {
        return Err(AcpiError::TooLarge(bytes.len()));
    }
    memory.write_slice(&bytes, GuestAddress(layout::ACPI_TABLES))?;
    Ok(())
}

/// The tables as they lie in memory, and where each begins.
struct Tables {
    base: u64,
    bytes: Vec<u8>,
}

impl Tables {
    fn new(platform: &Platform, base: u64) -> Self {
        let mut tables = Self {
            base,
            bytes: vec![0; Rsdp::len().next_multiple_of(TABLE_ALIGN)],
        };
        let dsdt = tables.add(&dsdt::dsdt(platform));
        let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
        for entry in [
            tables.add(&fadt(dsdt)),
            tables.add(&madt(platform)),
            tables.add(&mcfg(platform.last_bus)),
        ] {
            xsdt.add_entry(entry);
        }
        let xsdt = tables.add(&xsdt);
        let mut rsdp = Vec::new();
        Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
        tables.bytes.splice(..rsdp.len(), rsdp);
        tables
    }

    /// Appends a table and returns its address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        let offset = self.bytes.len().next_multiple_of(TABLE_ALIGN);
        self.bytes.resize(offset, 0);
        table.to_aml_bytes(&mut self.bytes);
        self.base + offset as u64
    }
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let port = |port: u16| {
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            port.into(),
        )
    };
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        .flag(Flags::Headless)
        .preferred_pm_profile(PmProfile::EnterpriseServer);
    fadt.iapc_boot_arch = NO_VGA_NO_CMOS.into();
    fadt.reset_reg = port(layout::PORT_RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = port(layout::PORT_SLEEP_CONTROL);
    fadt.sleep_status_reg = port(layout::PORT_SLEEP_STATUS);
    fadt.finalize()
}

fn madt(platform: &Platform) -> MADT {
    let address = LocalInterruptController::Address(layout::LAPIC);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, address);
    for id in 0..platform.vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    if platform.last_bus > 0 {
        madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    }
    madt
}

fn mcfg(last_bus: u8) -> MCFG {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM_START, 0, 0, last_bus);
    mcfg
}

#[cfg(test)]
mod tests;
