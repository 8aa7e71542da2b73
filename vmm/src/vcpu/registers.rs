//! A vCPU's state at the PVH entry point: 32-bit protected mode, flat segments,
//! paging off, EBX pointing to the start info.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use super::VcpuError;
use crate::layout;
use crate::vm::VmError;

/// `MTRRdefType` (Intel SDM volume 3, 12.11.2.1).
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, default type write-back. Left off, Linux maps memory uncached or
/// gives up on PAT.
const MTRR_ON_WRITE_BACK: u64 = 1 << 11 | 6;
/// Bit 1 of EFLAGS is always set.
const EFLAGS_RESERVED: u64 = 2;
/// CR0: protection enable, and the coprocessor type bit that is always set.
const CR0_PE_ET: u64 = 1 | 1 << 4;
/// Segment types (Intel SDM volume 3, 3.4.5.1 and 3.5).
const CODE_READ_ACCESSED: u8 = 0xb;
const DATA_WRITE_ACCESSED: u8 = 3;
const TSS32_BUSY: u8 = 0xb;

/// Sets the MSRs a firmware would have.
pub fn set_msrs(fd: &VcpuFd) -> Result<(), VcpuError> {
    let msrs = Msrs::from_entries(&[kvm_msr_entry {
        index: MSR_MTRR_DEF_TYPE,
        data: MTRR_ON_WRITE_BACK,
        ..Default::default()
    }])
    .map_err(|_| VmError {
        what: "list MSRs",
        source: std::io::ErrorKind::OutOfMemory.into(),
    })?;
    let set = fd.set_msrs(&msrs).map_err(VmError::new("set MSRs"))?;
    if set == 1 {
        return Ok(());
    }
    Err(VcpuError::Kvm(VmError {
        what: "set MTRRdefType",
        source: std::io::ErrorKind::Unsupported.into(),
    }))
}

/// Prepares the boot processor to begin at `entry`.
pub fn set_entry(fd: &VcpuFd, entry: u64) -> Result<(), VcpuError> {
    let mut sregs = fd.get_sregs().map_err(VmError::new("get registers"))?;
    sregs.cs = flat(0x8, CODE_READ_ACCESSED);
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = flat(0x10, DATA_WRITE_ACCESSED);
    }
    sregs.tr = kvm_segment {
        limit: 0x67,
        selector: 0x18,
        type_: TSS32_BUSY,
        present: 1,
        ..Default::default()
    };
    sregs.cr0 = CR0_PE_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
    fd.set_sregs(&sregs)
        .map_err(VmError::new("set segment registers"))?;
    let regs = kvm_regs {
        rip: entry,
        rbx: layout::START_INFO,
        rflags: EFLAGS_RESERVED,
        ..Default::default()
    };
    fd.set_regs(&regs).map_err(VmError::new("set registers"))?;
    Ok(())
}

fn flat(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}
