//! Registers of a device of the host, mapped into the guest: reads and writes
//! reach the device without an exit.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::{Arc, PoisonError};

use kvm_bindings::kvm_userspace_memory_region;

use super::{Vm, VmError};

/// A shared mapping that nothing in this process reads or writes.
#[derive(Debug)]
pub struct Mapping {
    address: NonNull<libc::c_void>,
    len: usize,
}

// SAFETY: this process only passes the address on; it is unmapped on drop alone.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `file` from `offset` on, to be read and written.
    ///
    /// # Errors
    ///
    /// Those of mmap(2).
    pub fn new(file: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<Self> {
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        let len = usize::try_from(len).map_err(io::Error::other)?;
        // SAFETY: a new mapping wherever the kernel has room; nothing else is touched.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                offset,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(address)
            .map(|address| Self { address, len })
            .ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping, whole; no VM points into it any more.
        unsafe { libc::munmap(self.address.as_ptr(), self.len) };
    }
}

/// A memory slot over a [`Mapping`], in the guest's address space or nowhere.
#[derive(Debug)]
pub struct DeviceMemory {
    slot: u32,
    mapping: Arc<Mapping>,
    at: Option<u64>,
}

impl Vm {
    /// A slot for `mapping`, which is nowhere yet.
    pub fn add_device_memory(&self, mapping: Mapping) -> DeviceMemory {
        let mapping = Arc::new(mapping);
        let mut mappings = self.mappings.lock().unwrap_or_else(PoisonError::into_inner);
        mappings.push(mapping.clone());
        DeviceMemory {
            slot: self.new_slot(),
            mapping,
            at: None,
        }
    }

    /// Puts `memory` at an address of the guest, or nowhere.
    ///
    /// # Errors
    ///
    /// KVM's, for one when other memory is there. It is nowhere then.
    pub fn move_device_memory(
        &self,
        memory: &mut DeviceMemory,
        to: Option<u64>,
    ) -> Result<(), VmError> {
        if memory.at == to {
            return Ok(());
        }
        if let Some(address) = memory.at {
            self.remove_slot(memory.slot, address)
                .map_err(VmError::new("remove a device's registers"))?;
            memory.at = None;
        }
        let Some(address) = to else { return Ok(()) };
        let region = kvm_userspace_memory_region {
            slot: memory.slot,
            flags: 0,
            guest_phys_addr: address,
            memory_size: memory.mapping.len as u64,
            userspace_addr: memory.mapping.address.as_ptr().addr() as u64,
        };
        // SAFETY: the mapping stays as long as `self`, which keeps it, and that is
        // longer than the VM it is given to.
        unsafe { self.fd.set_user_memory_region(region) }
            .map_err(VmError::new("add a device's registers"))?;
        memory.at = Some(address);
        Ok(())
    }

    /// Takes `memory` away; its mapping is gone then.
    ///
    /// # Errors
    ///
    /// KVM's. The mapping stays as long as the VM then, which may point into it.
    pub fn remove_device_memory(&self, memory: &mut DeviceMemory) -> Result<(), VmError> {
        self.move_device_memory(memory, None)?;
        let mut mappings = self.mappings.lock().unwrap_or_else(PoisonError::into_inner);
        let before = mappings.len();
        mappings.retain(|mapping| !Arc::ptr_eq(mapping, &memory.mapping));
        if mappings.len() < before {
            self.slots.give_back(memory.slot);
        }
        Ok(())
    }

    /// How many there are.
    #[cfg(test)]
    pub fn mappings(&self) -> usize {
        let mappings = self.mappings.lock().unwrap_or_else(PoisonError::into_inner);
        mappings.len()
    }

    /// From now on KVM refuses to remove what is mapped: it has been, behind our back.
    #[cfg(test)]
    pub fn refuse_removals(&self) {
        for slot in 0..self.new_slot() {
            // Not all of them are in use.
            let _ = self.remove_slot(slot, 0);
        }
    }
}

impl DeviceMemory {
    /// Where its mapping is in this process, and how many bytes it has.
    #[must_use]
    pub fn mapped(&self) -> (u64, u64) {
        let Mapping { address, len } = &*self.mapping;
        (address.as_ptr().addr() as u64, *len as u64)
    }

    /// Where it is in the guest.
    #[must_use]
    pub fn address(&self) -> Option<u64> {
        self.at
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::WINDOW32_START;
    use crate::vm::test_vm;
    use std::os::fd::AsFd;

    #[test]
    fn registers_move_and_never_lie_over_memory() {
        let Some(vm) = test_vm() else {
            return;
        };
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x2000).unwrap();
        let mapping = Mapping::new(file.as_fd(), 0x1000, 0x1000).unwrap();
        let mut memory = vm.add_device_memory(mapping);
        for to in [Some(WINDOW32_START), Some(WINDOW32_START + 0x1000), None] {
            vm.move_device_memory(&mut memory, to).unwrap();
            assert_eq!(memory.address(), to);
        }
        assert!(vm.move_device_memory(&mut memory, Some(0x1000)).is_err());
        assert_eq!(memory.address(), None);
        vm.move_device_memory(&mut memory, Some(WINDOW32_START))
            .unwrap();
    }

    #[test]
    fn what_is_removed_is_not_mapped_and_leaves_its_slot() {
        let Some(vm) = test_vm() else {
            return;
        };
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x1000).unwrap();
        let mut slots = Vec::new();
        for _ in 0..3 {
            let mapping = Mapping::new(file.as_fd(), 0, 0x1000).unwrap();
            let mut memory = vm.add_device_memory(mapping);
            vm.move_device_memory(&mut memory, Some(WINDOW32_START))
                .unwrap();
            slots.push(memory.slot);
            vm.remove_device_memory(&mut memory).unwrap();
            vm.remove_device_memory(&mut memory).unwrap();
            assert_eq!(Arc::strong_count(&memory.mapping), 1);
        }
        assert!(slots.iter().all(|slot| *slot == slots[0]), "{slots:?}");
    }
}
