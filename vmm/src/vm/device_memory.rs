//! Registers of a device of the host, mapped into the guest: reads and writes
//! reach the device without an exit.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::{Arc, PoisonError};

use kvm_bindings::kvm_userspace_memory_region;

use super::{PAGE_SIZE, Vm, VmError};

/// The processor's large pages, the largest first.
const LARGE_PAGES: [usize; 2] = [1 << 30, 2 << 20];

/// A shared mapping that nothing in this process reads or writes.
///
/// Its address is as far from the start of a large page as what it maps is, because the kernel, KVM and
/// the IOMMU use large pages only then: a BAR of 128 GiB in pages of 4 KiB takes 256 MiB of page tables.
#[derive(Debug)]
pub struct Mapping {
    address: NonNull<libc::c_void>,
    len: usize,
    /// It is in this.
    _room: Room,
}

/// Addresses at which nothing else is.
#[derive(Debug)]
struct Room {
    start: NonNull<libc::c_void>,
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
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        let len = usize::try_from(len).map_err(io::Error::other)?;
        let align = LARGE_PAGES.into_iter().find(|page| *page <= len);
        let align = align.unwrap_or(PAGE_SIZE);
        let room_len = len.checked_add(align - PAGE_SIZE);
        let room_len = room_len.filter(|_| start.is_multiple_of(PAGE_SIZE));
        let room = Room::new(room_len.ok_or(io::ErrorKind::InvalidInput)?)?;
        // Both are multiples of a page, so at most `align - PAGE_SIZE`.
        let before = start.wrapping_sub(room.start.as_ptr().addr()) & (align - 1);
        // SAFETY: only addresses of the room are touched, which nobody else has.
        let address = unsafe {
            libc::mmap(
                room.start.as_ptr().wrapping_byte_add(before),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED,
                file.as_raw_fd(),
                offset,
            )
        };
        let address = mapped(address)?;
        Ok(Self {
            address,
            len,
            _room: room,
        })
    }
}

impl Room {
    fn new(len: usize) -> io::Result<Self> {
        // SAFETY: a new mapping wherever the kernel has room; nothing else is touched.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        let start = mapped(start)?;
        Ok(Self { start, len })
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // SAFETY: our own addresses, with the mapping among them; no VM points into it any more.
        unsafe { libc::munmap(self.start.as_ptr(), self.len) };
    }
}

/// What mmap(2) returned.
fn mapped(address: *mut libc::c_void) -> io::Result<NonNull<libc::c_void>> {
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(address).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
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
        let Mapping { address, len, .. } = &*self.mapping;
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
    fn large_pages_of_the_file_are_large_pages_of_the_mapping() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(3 << 30).unwrap();
        for (offset, len, page) in [
            (0x1000, 0x3000, 0x1000),
            (0, 4 << 20, 2 << 20),
            (0x3000, 4 << 20, 2 << 20),
            (0x1f_f000, 2 << 20, 2 << 20),
            (0x4000_5000, 1 << 30, 1 << 30),
            (0x1000, 2 << 30, 1 << 30),
        ] {
            let mapping = Mapping::new(file.as_fd(), offset, len).unwrap();
            let address = mapping.address.as_ptr().addr() as u64;
            assert_eq!(address % page, offset % page, "{offset:#x}");
            let line = format!("{address:x}-{:x} rw-s {offset:08x} ", address + len);
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            assert!(maps.contains(&line), "{line} in {maps}");
        }
        for (offset, len) in [(1, 4 << 20), (0, u64::MAX), (1 << 63, 4096)] {
            assert!(Mapping::new(file.as_fd(), offset, len).is_err());
        }
    }

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
