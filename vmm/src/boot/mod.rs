//! PVH boot: kernel, initramfs and what the kernel is told about its machine.
//!
//! The kernel is an ELF `vmlinux` with a PVH entry note. It starts in 32-bit
//! protected mode with paging off and the address of a start info in EBX (Xen's
//! `docs/misc/pvh.pandoc`); there is no firmware and no real mode.

use std::fs::File;
use std::io::{self, Seek};
use std::path::PathBuf;

use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use crate::virtio::GuestMemory;
use crate::{layout, power};

mod image;

use image::Image;

/// `XEN_HVM_START_MAGIC_VALUE`.
const START_MAGIC: u32 = 0x336e_c578;
/// First version with a memory map.
const START_VERSION: u32 = 1;
/// `XEN_HVM_MEMMAP_TYPE_RAM`.
const TYPE_RAM: u32 = 1;
/// `XEN_HVM_MEMMAP_TYPE_RESERVED`.
const TYPE_RESERVED: u32 = 2;
const PAGE: u64 = 4096;

/// Why the guest cannot boot.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel is no ELF file, cut short, or larger than guest memory.
    #[error("kernel {}: {source}", path.display())]
    Kernel {
        /// Where it is.
        path: PathBuf,
        /// Why it is none.
        source: linux_loader::loader::Error,
    },
    /// The kernel has no PVH entry point.
    #[error("kernel {} has no PVH entry point (CONFIG_PVH)", .0.display())]
    NotPvh(PathBuf),
    /// The initramfs cannot be read.
    #[error("initramfs {}: {source}", path.display())]
    InitrdFile {
        /// Where it is.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Kernel and initramfs exceed guest memory.
    #[error("no room for initramfs {}, {bytes} bytes, above the kernel", path.display())]
    InitrdTooLarge {
        /// Where it is.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// The command line is too long or has a NUL.
    #[error("kernel command line of {0} bytes: too long, or not a C string")]
    Cmdline(usize),
    /// Writing guest memory failed.
    #[error("guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// A file to load.
pub struct NamedFile {
    /// It, open.
    pub file: File,
    /// Where it is on the host, for messages only.
    pub path: PathBuf,
}

/// What to boot.
pub struct Payload<'a> {
    /// Uncompressed kernel.
    pub kernel: &'a mut NamedFile,
    /// initramfs.
    pub initrd: &'a mut NamedFile,
    /// Kernel command line.
    pub cmdline: &'a str,
}

/// What is in guest memory now.
pub struct Loaded {
    /// The kernel's entry point.
    pub entry: u64,
    /// Where kernel and initramfs are, `start..end`, in whole pages: the guest
    /// will touch nearly all of it.
    pub ranges: [(u64, u64); 2],
}

/// Loads `payload` and the boot data.
///
/// # Errors
///
/// When something does not fit, or is not what it should be.
pub fn load(memory: &GuestMemory, payload: &mut Payload<'_>) -> Result<Loaded, BootError> {
    let NamedFile { file, path } = &mut *payload.kernel;
    let kernel = Elf::load(
        memory,
        None,
        &mut Image::new(file, memory),
        Some(GuestAddress(layout::HIGH_RAM_START)),
    )
    .map_err(|source| BootError::Kernel {
        path: path.clone(),
        source,
    })?;
    let PvhBootCapability::PvhEntryPresent(entry) = kernel.pvh_boot_cap else {
        return Err(BootError::NotPvh(path.clone()));
    };
    let module = load_initrd(memory, payload.initrd, kernel.kernel_end)?;
    write_cmdline(memory, payload.cmdline)?;
    write_start_info(memory, module)?;
    memory.write_slice(&reset_code(), GuestAddress(layout::RESET_VECTOR))?;
    // A kernel begins with its entry code.
    let pages = |start: u64, end: u64| (start & !(PAGE - 1), end.next_multiple_of(PAGE));
    Ok(Loaded {
        entry: entry.0,
        ranges: [
            pages(entry.0, kernel.kernel_end),
            pages(module.paddr, module.paddr + module.size),
        ],
    })
}

/// What runs when the kernel jumps to the firmware to reset: a write to the
/// reset register. Linux with EFI support does so on hardware-reduced ACPI,
/// where it takes EFI for granted and, without it, turns to the BIOS.
fn reset_code() -> [u8; 7] {
    const MOV_DX: u8 = 0xba;
    const MOV_AL: u8 = 0xb0;
    const OUT_DX_AL: u8 = 0xee;
    const HLT: u8 = 0xf4;
    let [low, high] = layout::PORT_RESET.to_le_bytes();
    [
        MOV_DX,
        low,
        high,
        MOV_AL,
        power::RESET_VALUE,
        OUT_DX_AL,
        HLT,
    ]
}

/// Puts the initramfs at the top of low memory, out of the kernel's way.
fn load_initrd(
    memory: &GuestMemory,
    NamedFile { file, path }: &mut NamedFile,
    kernel_end: u64,
) -> Result<hvm_modlist_entry, BootError> {
    let unread = |source| BootError::InitrdFile {
        path: path.clone(),
        source,
    };
    let bytes = file.metadata().map_err(unread)?.len();
    let low_end = memory
        .iter()
        .next()
        .map_or(0, |region| region.start_addr().0 + region.len());
    let too_large = || BootError::InitrdTooLarge {
        path: path.clone(),
        bytes,
    };
    let start = low_end.checked_sub(bytes).ok_or_else(too_large)? & !(PAGE - 1);
    if start < kernel_end.max(layout::HIGH_RAM_START) {
        return Err(too_large());
    }
    let len = usize::try_from(bytes).map_err(|_| too_large())?;
    file.rewind().map_err(unread)?;
    let mut image = Image::new(file, memory);
    memory.read_exact_volatile_from(GuestAddress(start), &mut image, len)?;
    Ok(hvm_modlist_entry {
        paddr: start,
        size: bytes,
        ..Default::default()
    })
}

fn write_cmdline(memory: &GuestMemory, cmdline: &str) -> Result<(), BootError> {
    if cmdline.len() >= layout::CMDLINE_MAX || cmdline.contains('\0') {
        return Err(BootError::Cmdline(cmdline.len()));
    }
    let address = GuestAddress(layout::CMDLINE);
    memory.write_slice(cmdline.as_bytes(), address)?;
    // Memory is fresh, but the terminator costs nothing and says so.
    memory.write_obj(0u8, GuestAddress(address.0 + cmdline.len() as u64))?;
    Ok(())
}

fn write_start_info(memory: &GuestMemory, module: hvm_modlist_entry) -> Result<(), BootError> {
    let map = memory_map(memory);
    let mut address = GuestAddress(layout::MEMORY_MAP);
    let mut entries = 0;
    for entry in map {
        memory.write_obj(entry, address)?;
        address.0 += size_of::<hvm_memmap_table_entry>() as u64;
        entries += 1;
    }
    memory.write_obj(module, GuestAddress(layout::MODULE_LIST))?;
    let info = hvm_start_info {
        magic: START_MAGIC,
        version: START_VERSION,
        nr_modules: 1,
        modlist_paddr: layout::MODULE_LIST,
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: layout::ACPI_TABLES,
        memmap_paddr: layout::MEMORY_MAP,
        memmap_entries: entries,
        ..Default::default()
    };
    memory.write_obj(info, GuestAddress(layout::START_INFO))?;
    Ok(())
}

/// RAM, less the legacy hole with the ACPI tables and the place for last words;
/// ECAM is reserved because Linux uses it only then.
fn memory_map(memory: &GuestMemory) -> Vec<hvm_memmap_table_entry> {
    let entry = |start: u64, end: u64, type_| hvm_memmap_table_entry {
        addr: start,
        size: end - start,
        type_,
        reserved: 0,
    };
    let pstore_end = layout::PSTORE + layout::PSTORE_SIZE;
    let mut map = vec![
        entry(0, layout::PSTORE, TYPE_RAM),
        entry(layout::PSTORE, pstore_end, TYPE_RESERVED),
        entry(pstore_end, layout::LOW_RAM_END, TYPE_RAM),
        entry(layout::ACPI_TABLES, layout::HIGH_RAM_START, TYPE_RESERVED),
        entry(
            layout::ECAM_START,
            layout::ECAM_START + layout::ECAM_SIZE,
            TYPE_RESERVED,
        ),
    ];
    map.extend(memory.iter().map(|region| {
        let start = region.start_addr().0;
        let end = start + region.len();
        entry(start.max(layout::HIGH_RAM_START), end, TYPE_RAM)
    }));
    map.sort_by_key(|entry| entry.addr);
    map
}

#[cfg(test)]
mod tests;
