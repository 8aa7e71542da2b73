//! The pod's address space for DMA: the guest's memory and nothing else, but for [`super::peers`].
//!
//! There is one for all devices of a pod, and each region of memory is mapped in it
//! once. What a device asks for beyond that, the IOMMU refuses. Mapping pins the
//! memory, all of it, which is why a guest with devices neither grows nor gives
//! memory back. A device that comes later joins the others there without a further
//! call; the address space ends with the last one.

use std::io;
use std::os::fd::OwnedFd;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::VfioError;
use super::sys::{self, DmaRange, VfioFile};
use crate::layout::MIB;
use crate::virtio::GuestMemory;

/// The pod's IOMMU, by either of VFIO's interfaces.
pub enum Container {
    /// Group API: everything is attached already.
    Groups {
        /// `/dev/vfio/vfio`.
        container: OwnedFd,
        /// `/dev/vfio/N`, for KVM.
        groups: Vec<OwnedFd>,
    },
    /// `/dev/iommu`.
    Iommufd(OwnedFd),
}

/// An address space the devices are in.
pub enum AddressSpace {
    /// That of the container.
    Container(OwnedFd),
    /// One of `/dev/iommu`'s.
    Ioas(OwnedFd, u32),
}

/// What mapping the memory took.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Mapped {
    /// Calls of the kernel.
    pub calls: u32,
    /// Bytes.
    pub bytes: u64,
}

impl Container {
    /// What KVM is to be told of: the groups, or the devices themselves.
    ///
    /// # Errors
    ///
    /// When there are too many descriptors.
    pub fn kvm_files<'a>(
        &self,
        devices: impl Iterator<Item = &'a OwnedFd>,
    ) -> io::Result<Vec<OwnedFd>> {
        match self {
            Self::Groups { .. } => self.groups(),
            Self::Iommufd(_) => devices.map(OwnedFd::try_clone).collect(),
        }
    }

    /// The groups, none with iommufd.
    ///
    /// # Errors
    ///
    /// Those of dup(2).
    pub fn groups(&self) -> io::Result<Vec<OwnedFd>> {
        match self {
            Self::Groups { groups, .. } => groups.iter().map(OwnedFd::try_clone).collect(),
            Self::Iommufd(_) => Ok(Vec::new()),
        }
    }

    /// A new address space.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn space(self) -> Result<AddressSpace, VfioError> {
        match self {
            Self::Groups { container, .. } => Ok(AddressSpace::Container(container)),
            Self::Iommufd(iommufd) => {
                let ioas = sys::allocate_ioas(&iommufd).map_err(VfioError::Iommufd)?;
                Ok(AddressSpace::Ioas(iommufd, ioas))
            }
        }
    }
}

impl AddressSpace {
    /// Puts devices into it. Groups are in its container already: whoever opened them
    /// has seen to that.
    ///
    /// # Errors
    ///
    /// The kernel's, with the device it is about.
    pub fn join<'a>(
        &self,
        devices: impl Iterator<Item = (&'a str, &'a OwnedFd)>,
    ) -> Result<(), VfioError> {
        if let Self::Ioas(iommufd, ioas) = self {
            for (address, device) in devices {
                VfioFile::bind(device, iommufd, *ioas)
                    .map_err(VfioError::device(address, "bind it to /dev/iommu"))?;
            }
        }
        Ok(())
    }

    /// Lets the devices reach the guest's memory.
    ///
    /// # Errors
    ///
    /// The kernel's, with its usual cause.
    pub fn map(&self, memory: &GuestMemory) -> Result<Mapped, VfioError> {
        map_regions(memory, |range| self.map_range(range))
    }

    /// Lets them reach a range.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn map_range(&self, range: DmaRange) -> io::Result<()> {
        match self {
            Self::Container(container) => sys::map_in_container(container, range),
            Self::Ioas(iommufd, ioas) => sys::map_in_ioas(iommufd, *ioas, range),
        }
    }
}

fn map_regions(
    memory: &GuestMemory,
    mut map: impl FnMut(DmaRange) -> io::Result<()>,
) -> Result<Mapped, VfioError> {
    let mut mapped = Mapped::default();
    for region in memory.iter() {
        let range = DmaRange {
            iova: region.start_addr().0,
            len: region.len(),
            host: region.as_ptr().addr() as u64,
        };
        map(range).map_err(|source| VfioError::Map {
            mib: range.len / MIB,
            iova: range.iova,
            hint: hint(&source),
            source,
        })?;
        mapped.calls += 1;
        mapped.bytes += range.len;
    }
    Ok(mapped)
}

/// What usually is behind an error of mapping.
fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOMEM) => {
            "; the memory of a pod with devices is pinned: it must be free, within the pod's \
             cgroup limit and within RLIMIT_MEMLOCK"
        }
        Some(libc::EINVAL | libc::EADDRINUSE) => {
            "; the host's IOMMU may reserve addresses there, or have fewer address bits"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn each_region_is_mapped_once_where_the_guest_has_it() {
        let memory = memory::allocate(4096, false).unwrap();
        let mut ranges = Vec::new();
        let mapped = map_regions(&memory, |range| {
            ranges.push(range);
            Ok(())
        });
        let expected = Mapped {
            calls: 2,
            bytes: 4096 * MIB,
        };
        assert_eq!(mapped.unwrap(), expected);
        let places: Vec<_> = ranges.iter().map(|range| (range.iova, range.len)).collect();
        assert_eq!(places, memory::regions(4096 * MIB));
        let hosts = memory.iter().map(|region| region.as_ptr().addr() as u64);
        assert!(ranges.iter().map(|range| range.host).eq(hosts));
    }

    #[test]
    fn lock_limit_is_explained() {
        let memory = memory::allocate(64, false).unwrap();
        let refuse = |_| Err(io::Error::from_raw_os_error(libc::ENOMEM));
        let error = map_regions(&memory, refuse).unwrap_err().to_string();
        assert!(error.starts_with("mapping 64 MiB"), "{error}");
        assert!(error.contains("RLIMIT_MEMLOCK"), "{error}");
    }
}
