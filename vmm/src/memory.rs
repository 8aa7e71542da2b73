//! Guest memory: one sealed memfd, mapped shared, in one or two regions around
//! the MMIO hole; and a second for memory that may be added later.
//!
//! A memfd is what a vhost-user back end maps too, so every region keeps its
//! [`FileOffset`]. The seals keep that other process from shrinking the file,
//! which would turn our accesses into SIGBUS.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

use vm_memory::mmap::{FromRangesError, MmapRegionError};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

use crate::layout::{self, MIB, MMIO_HOLE_END, MMIO_HOLE_START};
use crate::virtio::GuestMemory;

/// Smallest memory a kernel and its initramfs are started with.
pub const MIN_MIB: u32 = 32;
const HUGE_PAGE_MIB: u32 = 2;

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is one we do not run with.
    #[error("{0} MiB of memory: at least {MIN_MIB} are needed, whole huge pages if those are used")]
    Size(u32),
    /// No memfd of that size.
    #[error("memory file of {mib} MiB: {source}")]
    File {
        /// Its size.
        mib: u32,
        /// The system's reason.
        source: io::Error,
    },
    /// The host keeps no huge pages for it.
    #[error(
        "{mib} MiB of the host's huge pages: {source}; raise vm.nr_hugepages or set hugepages = \
         false in nacre.toml"
    )]
    HugePages {
        /// How much was asked for.
        mib: u32,
        /// The system's reason.
        source: io::Error,
    },
    /// Not mapped.
    #[error("mapping guest memory: {0}")]
    Map(#[from] FromRangesError),
}

/// Where memory may be added: addresses above those of RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Growth {
    /// Guest physical address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

/// Allocates `size_mib` of guest memory, lazily backed; `hugepages` takes it from
/// the host's 2 MiB pool.
///
/// # Errors
///
/// When the size is refused or the host has no memory to map.
pub fn allocate(size_mib: u32, hugepages: bool) -> Result<GuestMemory, MemoryError> {
    if size_mib < MIN_MIB || (hugepages && !size_mib.is_multiple_of(HUGE_PAGE_MIB)) {
        return Err(MemoryError::Size(size_mib));
    }
    let bytes = u64::from(size_mib) * MIB;
    let file = memory_file(bytes, hugepages).map_err(|source| MemoryError::File {
        mib: size_mib,
        source,
    })?;
    if hugepages {
        reserve(&file, bytes).map_err(|source| MemoryError::HugePages {
            mib: size_mib,
            source,
        })?;
    }
    Ok(map(&file, bytes)?)
}

/// `ram` with a region of `mib` beyond it that holds nothing yet, and where that
/// is. Both share the mapping of `ram`.
///
/// # Errors
///
/// When the host does not map that much.
pub fn with_growth(ram: &GuestMemory, mib: u32) -> Result<(GuestMemory, Growth), MemoryError> {
    let growth = Growth {
        start: layout::growth_start(size(ram)),
        len: u64::from(mib) * MIB,
    };
    let file =
        memory_file(growth.len, false).map_err(|source| MemoryError::File { mib, source })?;
    let len = usize::try_from(growth.len).map_err(|_| MemoryError::Size(mib))?;
    let mapping =
        MmapRegion::from_file(FileOffset::new(file, 0), len).map_err(FromRangesError::from)?;
    let region =
        GuestRegionMmap::new(mapping, GuestAddress(growth.start)).ok_or(MemoryError::Size(mib))?;
    let all = ram
        .insert_region(std::sync::Arc::new(region))
        .map_err(FromRangesError::from)?;
    Ok((all, growth))
}

/// The regions RAM of `bytes` bytes consists of: guest address and length.
#[must_use]
pub fn regions(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(MMIO_HOLE_START);
    let high = bytes - low;
    let mut regions = vec![(0, low)];
    if high > 0 {
        regions.push((MMIO_HOLE_END, high));
    }
    regions
}

/// Bytes of RAM.
#[must_use]
pub fn size(memory: &GuestMemory) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

fn map(file: &File, bytes: u64) -> Result<GuestMemory, FromRangesError> {
    let mut offset = 0;
    let mut ranges = Vec::new();
    for (start, len) in regions(bytes) {
        let clone = file
            .try_clone()
            .map_err(|error| FromRangesError::from(MmapRegionError::Mmap(error)))?;
        let size = usize::try_from(len).map_err(|_| FromRangesError::InvalidGuestRegion)?;
        ranges.push((
            GuestAddress(start),
            size,
            Some(FileOffset::new(clone, offset)),
        ));
        offset += len;
    }
    GuestMemory::from_ranges_with_files(ranges)
}

fn memory_file(bytes: u64, hugepages: bool) -> io::Result<File> {
    let mut flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    if hugepages {
        flags |= libc::MFD_HUGETLB | libc::MFD_HUGE_2MB;
    }
    // SAFETY: the name is a C string; the call touches nothing else.
    let fd = unsafe { libc::memfd_create(c"guest-memory".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: fcntl on a descriptor we own, with an integer argument.
    if unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

/// Has the host keep huge pages for all of the file, for as long as it lives: what a shared
/// mapping reserves belongs to the file (Documentation/mm/hugetlbfs_reserv.rst). The
/// mappings of `vm-memory` reserve nothing (`MAP_NORESERVE`), and a guest that touched
/// a page the pool has not got would be killed.
fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    let len = usize::try_from(bytes).map_err(io::Error::other)?;
    let (protection, fd) = (libc::PROT_READ | libc::PROT_WRITE, file.as_raw_fd());
    // SAFETY: the kernel chooses the address of a mapping that nobody uses.
    let mapping = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            protection,
            libc::MAP_SHARED,
            fd,
            0,
        )
    };
    if mapping == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is the mapping made above.
    if unsafe { libc::munmap(mapping, len) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::GIB;
    use vm_memory::Bytes;

    #[test]
    fn memory_beyond_the_hole_continues_above_it() {
        assert_eq!(regions(2 * GIB), [(0, 2 * GIB)]);
        assert_eq!(regions(5 * GIB), [(0, 3 * GIB), (4 * GIB, 2 * GIB)]);
    }

    #[test]
    fn regions_share_one_sealed_file() {
        let memory = allocate(4096, false).unwrap();
        let offsets: Vec<u64> = memory
            .iter()
            .map(|region| region.file_offset().unwrap().start())
            .collect();
        assert_eq!(offsets, [0, 3 * GIB]);
        memory
            .write_obj(7u64, GuestAddress(MMIO_HOLE_END + 8))
            .unwrap();
        let region = memory.iter().next().unwrap();
        let file = region.file_offset().unwrap().file();
        assert!(file.set_len(4096).is_err(), "the file cannot shrink");
    }

    /// A number of the host's pool (Documentation/admin-guide/mm/hugetlbpage.rst).
    fn pool(name: &str) -> Option<u32> {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}_hugepages");
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    }

    #[test]
    fn huge_pages_that_are_not_there_are_not_waited_for() {
        let (Some(free), Some(promised)) = (pool("free"), pool("resv")) else {
            eprintln!("skipped: a kernel without huge pages");
            return;
        };
        let mib = (free - promised) * HUGE_PAGE_MIB + MIN_MIB;
        let text = allocate(mib, true).unwrap_err().to_string();
        assert!(text.contains("vm.nr_hugepages"), "{text}");
    }

    #[test]
    fn odd_sizes_are_refused() {
        assert!(matches!(allocate(1, false), Err(MemoryError::Size(1))));
        assert!(matches!(allocate(65, true), Err(MemoryError::Size(65))));
    }
}
