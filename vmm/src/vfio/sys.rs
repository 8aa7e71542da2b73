//! The system calls of VFIO and iommufd (`linux/vfio.h`, `linux/iommufd.h`), on
//! descriptors that are open already. All of `vfio`'s unsafe code is here.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_DMA_MAP_FLAG_READ,
    VFIO_DMA_MAP_FLAG_WRITE, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK,
    VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE, VFIO_PCI_ERR_IRQ_INDEX,
    VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
    VFIO_PCI_REQ_IRQ_INDEX, VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_FLAG_CAPS,
    VFIO_REGION_INFO_FLAG_MMAP, VFIO_TYPE, VFIO_TYPE1v2_IOMMU, vfio_device_attach_iommufd_pt,
    vfio_device_bind_iommufd, vfio_device_info, vfio_iommu_type1_dma_map, vfio_irq_info,
    vfio_region_info,
};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{
    ioctl, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref, ioctl_with_val,
};
use vmm_sys_util::ioctl_io_nr;

use super::access::{Access, Irq, IrqError, Neighbor, Region};
use crate::vm::Mapping;

ioctl_io_nr!(VFIO_SET_IOMMU, VFIO_TYPE.into(), VFIO_BASE + 2);
ioctl_io_nr!(VFIO_GROUP_SET_CONTAINER, VFIO_TYPE.into(), VFIO_BASE + 4);
ioctl_io_nr!(VFIO_GROUP_GET_DEVICE_FD, VFIO_TYPE.into(), VFIO_BASE + 6);
ioctl_io_nr!(VFIO_DEVICE_GET_INFO, VFIO_TYPE.into(), VFIO_BASE + 7);
ioctl_io_nr!(VFIO_DEVICE_GET_REGION_INFO, VFIO_TYPE.into(), VFIO_BASE + 8);
ioctl_io_nr!(VFIO_DEVICE_GET_IRQ_INFO, VFIO_TYPE.into(), VFIO_BASE + 9);
ioctl_io_nr!(VFIO_DEVICE_SET_IRQS, VFIO_TYPE.into(), VFIO_BASE + 10);
ioctl_io_nr!(VFIO_DEVICE_RESET, VFIO_TYPE.into(), VFIO_BASE + 11);
ioctl_io_nr!(
    VFIO_DEVICE_GET_PCI_HOT_RESET_INFO,
    VFIO_TYPE.into(),
    VFIO_BASE + 12
);
ioctl_io_nr!(VFIO_DEVICE_PCI_HOT_RESET, VFIO_TYPE.into(), VFIO_BASE + 13);
// The same number, of a container.
ioctl_io_nr!(VFIO_IOMMU_MAP_DMA, VFIO_TYPE.into(), VFIO_BASE + 13);
ioctl_io_nr!(VFIO_DEVICE_BIND_IOMMUFD, VFIO_TYPE.into(), VFIO_BASE + 18);
ioctl_io_nr!(
    VFIO_DEVICE_ATTACH_IOMMUFD_PT,
    VFIO_TYPE.into(),
    VFIO_BASE + 19
);
ioctl_io_nr!(IOMMU_IOAS_ALLOC, VFIO_TYPE.into(), IOMMUFD_BASE + 1);
ioctl_io_nr!(IOMMU_IOAS_MAP, VFIO_TYPE.into(), IOMMUFD_BASE + 5);

/// First command of `linux/iommufd.h`, whose type is VFIO's.
const IOMMUFD_BASE: u32 = 0x80;
/// `IOMMU_IOAS_MAP_FIXED_IOVA`, `_WRITEABLE`, `_READABLE`.
const IOAS_MAP_FLAGS: u32 = 1 | 2 | 4;
/// More than any kernel says of a region.
const MAX_REGION_INFO: u32 = 64 * 1024;
/// `struct vfio_irq_set` without its data: argsz, flags, index, start, count.
const IRQ_SET_WORDS: usize = 5;

/// `struct vfio_pci_hot_reset_info` and `vfio_pci_hot_reset` without what follows: argsz,
/// flags, count.
const HOT_RESET_WORDS: usize = 3;
/// `struct vfio_pci_dependent_device`: group or device, segment, bus, device and function.
const NEIGHBOR_WORDS: usize = 2;
/// Functions that are reset with a bus: a bus has up to 256, and this is four full ones. Of more
/// the kernel says `ENOSPC`, and the device is not passed on.
const MAX_NEIGHBORS: usize = 1024;

/// `struct iommu_ioas_alloc`.
#[repr(C)]
#[derive(Default)]
struct IoasAlloc {
    size: u32,
    flags: u32,
    out_ioas_id: u32,
}

/// `struct iommu_ioas_map`.
#[repr(C)]
#[derive(Default)]
struct IoasMap {
    size: u32,
    flags: u32,
    ioas_id: u32,
    reserved: u32,
    user_va: u64,
    length: u64,
    iova: u64,
}

/// A range of guest memory, or of another device's BAR, for the devices' DMA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DmaRange {
    /// Guest physical address, which is the devices' address too.
    pub iova: u64,
    /// Bytes.
    pub len: u64,
    /// Where it is mapped in this process.
    pub host: u64,
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// What the kernel says to turning `asked` interrupts on: when it has fewer, how many.
fn check_irqs(result: libc::c_int, asked: u32) -> Result<(), IrqError> {
    check(result)?;
    match result.unsigned_abs() {
        0 => Ok(()),
        available => Err(IrqError::Fewer { available, asked }),
    }
}

/// The size of an argument, which begins with it.
#[allow(clippy::cast_possible_truncation)] // structures of a few dozen bytes
const fn size<T>() -> u32 {
    size_of::<T>() as u32
}

/// Maps guest memory in a container of type 1.
///
/// # Errors
///
/// The kernel's.
pub fn map_in_container(container: &OwnedFd, range: DmaRange) -> io::Result<()> {
    let map = vfio_iommu_type1_dma_map {
        argsz: size::<vfio_iommu_type1_dma_map>(),
        flags: VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
        vaddr: range.host,
        iova: range.iova,
        size: range.len,
    };
    // SAFETY: the argument is the structure the call takes. The memory it names is
    // the guest's, whose contents this process trusts no more than a device's.
    check(unsafe { ioctl_with_ref(container, VFIO_IOMMU_MAP_DMA(), &map) })
}

/// Puts a group into a container.
///
/// # Errors
///
/// The kernel's: a device of the group has a driver of the host's.
pub fn set_container(group: &OwnedFd, container: &OwnedFd) -> io::Result<()> {
    let fd = container.as_raw_fd();
    // SAFETY: the argument is a descriptor the call only reads.
    check(unsafe { ioctl_with_ref(group, VFIO_GROUP_SET_CONTAINER(), &fd) })
}

/// Makes a container with a group in it one of type 1, version 2.
///
/// # Errors
///
/// The kernel's.
pub fn set_iommu(container: &OwnedFd) -> io::Result<()> {
    let kind = libc::c_ulong::from(VFIO_TYPE1v2_IOMMU);
    // SAFETY: the argument is a number.
    check(unsafe { ioctl_with_val(container, VFIO_SET_IOMMU(), kind) })
}

/// Opens a device of a group by its address.
///
/// # Errors
///
/// The kernel's.
pub fn device_of_group(group: &OwnedFd, address: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: the argument is a string with its end.
    let fd = unsafe { ioctl_with_ptr(group, VFIO_GROUP_GET_DEVICE_FD(), address.as_ptr()) };
    check(fd)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes an address space of `/dev/iommu`.
///
/// # Errors
///
/// The kernel's.
pub fn allocate_ioas(iommufd: &OwnedFd) -> io::Result<u32> {
    let mut alloc = IoasAlloc {
        size: size::<IoasAlloc>(),
        ..Default::default()
    };
    // SAFETY: the argument is the structure the call takes.
    check(unsafe { ioctl_with_mut_ref(iommufd, IOMMU_IOAS_ALLOC(), &mut alloc) })?;
    Ok(alloc.out_ioas_id)
}

/// Maps guest memory in an address space of `/dev/iommu`.
///
/// # Errors
///
/// The kernel's.
pub fn map_in_ioas(iommufd: &OwnedFd, ioas: u32, range: DmaRange) -> io::Result<()> {
    let mut map = IoasMap {
        size: size::<IoasMap>(),
        flags: IOAS_MAP_FLAGS,
        ioas_id: ioas,
        user_va: range.host,
        length: range.len,
        iova: range.iova,
        ..Default::default()
    };
    // SAFETY: as in `map_in_container`; the kernel writes the address back.
    check(unsafe { ioctl_with_mut_ref(iommufd, IOMMU_IOAS_MAP(), &mut map) })
}

/// A VFIO device.
pub struct VfioFile {
    file: File,
    /// Where each region begins in the file, by index.
    offsets: Vec<u64>,
    can_reset: bool,
}

impl VfioFile {
    /// Binds a device of iommufd, as opened, and puts it into an address space.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn bind(device: &OwnedFd, iommufd: &OwnedFd, ioas: u32) -> io::Result<()> {
        let mut bind = vfio_device_bind_iommufd {
            argsz: size::<vfio_device_bind_iommufd>(),
            iommufd: iommufd.as_raw_fd(),
            ..Default::default()
        };
        // SAFETY: the argument is the structure the call takes.
        check(unsafe { ioctl_with_mut_ref(device, VFIO_DEVICE_BIND_IOMMUFD(), &mut bind) })?;
        let mut attach = vfio_device_attach_iommufd_pt {
            argsz: size::<vfio_device_attach_iommufd_pt>(),
            pt_id: ioas,
            ..Default::default()
        };
        // SAFETY: as above.
        check(unsafe { ioctl_with_mut_ref(device, VFIO_DEVICE_ATTACH_IOMMUFD_PT(), &mut attach) })
    }

    /// A device that is in an address space.
    ///
    /// # Errors
    ///
    /// When it is no PCI device, or the kernel does not say what it is.
    pub fn new(device: OwnedFd) -> io::Result<Self> {
        let mut info = vfio_device_info {
            argsz: size::<vfio_device_info>(),
            ..Default::default()
        };
        // SAFETY: the argument is the structure the call takes.
        check(unsafe { ioctl_with_mut_ref(&device, VFIO_DEVICE_GET_INFO(), &mut info) })?;
        if info.flags & VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(io::Error::other("not a PCI device"));
        }
        let mut this = Self {
            file: device.into(),
            offsets: Vec::new(),
            can_reset: info.flags & VFIO_DEVICE_FLAGS_RESET != 0,
        };
        for index in 0..=super::access::CONFIG_REGION {
            this.offsets.push(this.region_info(index)?.0.offset);
        }
        Ok(this)
    }

    /// The description of a region, and the same with its capabilities as bytes.
    fn region_info(&self, index: u32) -> io::Result<(vfio_region_info, Vec<u8>)> {
        describe(index, |words| {
            let command = VFIO_DEVICE_GET_REGION_INFO();
            // SAFETY: the buffer is as long as the `argsz` in its first word says.
            check(unsafe { ioctl_with_mut_ptr(&self.file, command, words.as_mut_ptr()) })
        })
    }

    fn offset(&self, region: u32, offset: u64) -> io::Result<u64> {
        let start = usize::try_from(region)
            .ok()
            .and_then(|at| self.offsets.get(at));
        start
            .and_then(|start| start.checked_add(offset))
            .ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    fn set_irq(&self, words: &[u32]) -> libc::c_int {
        debug_assert!(words.len() >= IRQ_SET_WORDS);
        // SAFETY: the buffer is a `vfio_irq_set` and as long as its `argsz` says.
        unsafe { ioctl_with_ptr(&self.file, VFIO_DEVICE_SET_IRQS(), words.as_ptr()) }
    }
}

impl Access for VfioFile {
    fn region(&self, index: u32) -> io::Result<Region> {
        let (info, bytes) = self.region_info(index)?;
        Ok(region(&info, &bytes))
    }

    fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(data, self.offset(region, offset)?)
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, self.offset(region, offset)?)
    }

    fn map(&self, region: u32, offset: u64, len: u64) -> io::Result<Mapping> {
        Mapping::new(self.file.as_fd(), self.offset(region, offset)?, len)
    }

    fn irq_count(&self, irq: Irq) -> io::Result<u32> {
        let mut info = vfio_irq_info {
            argsz: size::<vfio_irq_info>(),
            index: index_of(irq),
            ..Default::default()
        };
        // SAFETY: the argument is the structure the call takes.
        let result =
            unsafe { ioctl_with_mut_ref(&self.file, VFIO_DEVICE_GET_IRQ_INFO(), &mut info) };
        match check(result) {
            Ok(()) => Ok(info.count),
            // A kind this device, or this kernel, does not know.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(0),
            Err(error) => Err(error),
        }
    }

    fn set_irqs(&self, irq: Irq, start: u32, events: &[Option<&EventFd>]) -> Result<(), IrqError> {
        let fds = events
            .iter()
            .map(|event| event.map_or(-1, |event| event.as_raw_fd()));
        let count = u32::try_from(events.len()).map_err(io::Error::other)?;
        let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
        let mut words = irq_set(flags, irq, start, count, count);
        words.extend(fds.map(i32::cast_unsigned));
        check_irqs(self.set_irq(&words), count)
    }

    fn unmask_on(&self, event: &EventFd) -> io::Result<bool> {
        match check(self.set_irq(&unmask_on(event))) {
            Ok(()) => Ok(true),
            // So drivers of mediated devices may say.
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn unmask(&self) -> io::Result<()> {
        let flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_UNMASK;
        check(self.set_irq(&irq_set(flags, Irq::Intx, 0, 1, 0)))
    }

    fn disable_irqs(&self, irq: Irq) -> io::Result<()> {
        let flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;
        check(self.set_irq(&irq_set(flags, irq, 0, 0, 0)))
    }

    fn reset(&self) -> io::Result<bool> {
        if self.can_reset {
            // SAFETY: a call without an argument.
            check(unsafe { ioctl(&self.file, VFIO_DEVICE_RESET()) })?;
        }
        Ok(self.can_reset)
    }

    fn on_bus(&self) -> io::Result<Vec<Neighbor>> {
        let mut words = vec![0u32; HOT_RESET_WORDS + MAX_NEIGHBORS * NEIGHBOR_WORDS];
        #[allow(clippy::cast_possible_truncation)] // a few KiB
        let argsz = size_of_val(&*words) as u32;
        words[0] = argsz;
        let command = VFIO_DEVICE_GET_PCI_HOT_RESET_INFO();
        // SAFETY: the buffer is as long as the `argsz` in its first word says.
        match check(unsafe { ioctl_with_mut_ptr(&self.file, command, words.as_mut_ptr()) }) {
            Ok(()) => Ok(neighbors(&words)),
            Err(error) if has_no_bus(&error) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    fn reset_bus(&self, neighbors: &[Neighbor], groups: &[OwnedFd]) -> io::Result<()> {
        let words = hot_reset(&groups_of(neighbors, groups)?);
        let command = VFIO_DEVICE_PCI_HOT_RESET();
        // SAFETY: the buffer is a `vfio_pci_hot_reset` and as long as its `argsz` says.
        check(unsafe { ioctl_with_ptr(&self.file, command, words.as_ptr()) })
    }
}

/// Whether the kernel says so by an error: there is no slot and no bus that could be reset, or, of
/// a mediated device, its driver does not know the question.
fn has_no_bus(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENODEV | libc::ENOTTY | libc::EINVAL)
    )
}

/// The functions in a `struct vfio_pci_hot_reset_info`.
fn neighbors(words: &[u32]) -> Vec<Neighbor> {
    let count = words.get(2).copied().unwrap_or(0);
    let devices = words.get(HOT_RESET_WORDS..).unwrap_or_default();
    let devices = devices.chunks_exact(NEIGHBOR_WORDS);
    let devices = devices.take(usize::try_from(count).unwrap_or(usize::MAX));
    devices
        .filter_map(|device| {
            let [segment_low, segment_high, bus, devfn] = device.get(1)?.to_ne_bytes();
            Some(Neighbor {
                segment: u16::from_ne_bytes([segment_low, segment_high]),
                bus,
                devfn,
            })
        })
        .collect()
}

/// Of `groups` those that have one of the functions: the kernel takes no more groups than
/// there are functions. A function that is asked for by another group's descriptor is not
/// there; one that is, is open already, and stays so.
fn groups_of<'a>(neighbors: &[Neighbor], groups: &'a [OwnedFd]) -> io::Result<Vec<&'a OwnedFd>> {
    let mut found = Vec::new();
    for group in groups {
        for neighbor in neighbors {
            let address = CString::new(neighbor.to_string())?;
            if device_of_group(group, &address).is_ok() {
                found.push(group);
                break;
            }
        }
    }
    Ok(found)
}

/// A `struct vfio_pci_hot_reset`. Without groups it is for devices of iommufd.
fn hot_reset(groups: &[&OwnedFd]) -> Vec<u32> {
    #[allow(clippy::cast_possible_truncation)] // a pod has a few dozen at most
    let [words, count] = [HOT_RESET_WORDS + groups.len(), groups.len()].map(|count| count as u32);
    let descriptors = groups.iter().map(|group| group.as_raw_fd().cast_unsigned());
    [words * 4, 0, count]
        .into_iter()
        .chain(descriptors)
        .collect()
}

fn index_of(irq: Irq) -> u32 {
    match irq {
        Irq::Intx => VFIO_PCI_INTX_IRQ_INDEX,
        Irq::Msi => VFIO_PCI_MSI_IRQ_INDEX,
        Irq::Msix => VFIO_PCI_MSIX_IRQ_INDEX,
        Irq::Error => VFIO_PCI_ERR_IRQ_INDEX,
        Irq::Request => VFIO_PCI_REQ_IRQ_INDEX,
    }
}

/// A `struct vfio_irq_set` that `data` words will follow.
fn irq_set(flags: u32, irq: Irq, start: u32, count: u32, data: u32) -> Vec<u32> {
    #[allow(clippy::cast_possible_truncation)] // five
    let words = IRQ_SET_WORDS as u32 + data;
    vec![words * 4, flags, index_of(irq), start, count]
}

/// A `struct vfio_irq_set` that has INTx unmasked by an event.
fn unmask_on(event: &EventFd) -> Vec<u32> {
    let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_UNMASK;
    let mut words = irq_set(flags, Irq::Intx, 0, 1, 1);
    words.push(event.as_raw_fd().cast_unsigned());
    words
}

/// Has `ask` describe a region, in a buffer that begins with its length. The kernel
/// says at first how long it must be, and in one that is long enough where the
/// capabilities begin.
fn describe(
    index: u32,
    mut ask: impl FnMut(&mut [u64]) -> io::Result<()>,
) -> io::Result<(vfio_region_info, Vec<u8>)> {
    let mut len = size::<vfio_region_info>();
    loop {
        // Words, so that the structure is aligned: argsz and flags, index and cap_offset.
        let mut words = vec![u64::from(len), u64::from(index)];
        words.resize(len.div_ceil(8) as usize, 0);
        ask(&mut words)?;
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let info = region_info_in(&bytes).ok_or(io::ErrorKind::UnexpectedEof)?;
        if info.argsz <= len {
            return Ok((info, bytes));
        }
        if info.argsz > MAX_REGION_INFO {
            let bytes = info.argsz;
            let what = format!("the description of region {index} is {bytes} bytes long");
            return Err(io::Error::other(what));
        }
        len = info.argsz;
    }
}

fn region_info_in(bytes: &[u8]) -> Option<vfio_region_info> {
    Some(vfio_region_info {
        argsz: u32_at(bytes, 0)?,
        flags: u32_at(bytes, 4)?,
        index: u32_at(bytes, 8)?,
        cap_offset: u32_at(bytes, 12)?,
        size: u64_at(bytes, 16)?,
        offset: u64_at(bytes, 24)?,
    })
}

/// What a description says of a region.
fn region(info: &vfio_region_info, bytes: &[u8]) -> Region {
    let mappable = match info.flags {
        flags if flags & VFIO_REGION_INFO_FLAG_MMAP == 0 => Vec::new(),
        flags if flags & VFIO_REGION_INFO_FLAG_CAPS == 0 => vec![(0, info.size)],
        _ => sparse_areas(bytes, info.cap_offset).unwrap_or_else(|| vec![(0, info.size)]),
    };
    Region {
        size: info.size,
        mappable,
    }
}

/// The areas of the sparse mapping capability, if a region's description has it:
/// `bytes` is the description, its capabilities start at `first`.
fn sparse_areas(bytes: &[u8], first: u32) -> Option<Vec<(u64, u64)>> {
    let mut at = usize::try_from(first).ok()?;
    // A chain that comes back to itself ends too.
    for _ in 0..32 {
        let id = u16_at(bytes, at)?;
        if u32::from(id) == VFIO_REGION_INFO_CAP_SPARSE_MMAP {
            let count = usize::try_from(u32_at(bytes, at + 8)?).ok()?;
            let areas = bytes.get(at + 16..)?.chunks_exact(16).take(count);
            return areas
                .map(|area| Some((u64_at(area, 0)?, u64_at(area, 8)?)))
                .collect();
        }
        at = usize::try_from(u32_at(bytes, at + 4)?).ok()?;
        if at == 0 {
            return None;
        }
    }
    None
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_those_of_the_headers() {
        assert_eq!(VFIO_DEVICE_SET_IRQS(), 0x3b6e);
        assert_eq!(VFIO_IOMMU_MAP_DMA(), 0x3b71);
        assert_eq!(VFIO_DEVICE_GET_PCI_HOT_RESET_INFO(), 0x3b70);
        assert_eq!(VFIO_DEVICE_PCI_HOT_RESET(), 0x3b71);
        assert_eq!(VFIO_DEVICE_BIND_IOMMUFD(), 0x3b76);
        assert_eq!(IOMMU_IOAS_MAP(), 0x3b85);
        assert_eq!((size::<IoasAlloc>(), size::<IoasMap>()), (12, 40));
    }

    #[test]
    fn interrupts_are_laid_out_as_the_kernel_reads_them() {
        let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
        assert_eq!(irq_set(flags, Irq::Msix, 3, 2, 2), [28, 0x24, 2, 3, 2]);
        let event = EventFd::new(0).unwrap();
        let fd = event.as_raw_fd().cast_unsigned();
        assert_eq!(unmask_on(&event), [24, 0x14, 0, 0, 1, fd]);
    }

    #[test]
    fn fewer_vectors_than_were_asked_for_are_no_success() {
        assert!(check_irqs(0, 8).is_ok());
        let fewer = check_irqs(3, 8).unwrap_err();
        assert_eq!(
            fewer.to_string(),
            "the host has only 3 of 8 interrupt vectors for it"
        );
        assert!(matches!(check_irqs(-1, 8), Err(IrqError::Kernel(_))));
    }

    #[test]
    fn what_is_reset_with_a_bus_is_read_and_written_as_the_kernel_has_it() {
        let address = |segment: u16, bus, devfn| {
            let [low, high] = segment.to_ne_bytes();
            u32::from_ne_bytes([low, high, bus, devfn])
        };
        let mut words = vec![8204, 0, 2];
        words.extend([41, address(0, 0x65, 0), 41, address(1, 0x65, 1), 9, 9]);
        let named: Vec<_> = neighbors(&words).iter().map(Neighbor::to_string).collect();
        assert_eq!(named, ["0000:65:00.0", "0001:65:00.1"]);
        // More than there is room for.
        words[2] = u32::MAX;
        assert_eq!(neighbors(&words).len(), 3);

        assert_eq!(hot_reset(&[]), [12, 0, 0]);
        let null = OwnedFd::from(File::open("/dev/null").unwrap());
        let fd = null.as_raw_fd().cast_unsigned();
        assert_eq!(hot_reset(&[&null]), [16, 0, 1, fd]);
        let neighbor = Neighbor {
            segment: 0,
            bus: 1,
            devfn: 9,
        };
        assert_eq!(neighbor.to_string(), "0000:01:01.1");
        assert!(groups_of(&[neighbor], &[null]).unwrap().is_empty());
    }

    #[test]
    fn drivers_that_know_no_bus_have_none() {
        for (number, expected) in [
            (libc::ENODEV, true),
            (libc::ENOTTY, true),
            (libc::EINVAL, true),
            (libc::ENOSPC, false),
            (libc::EPERM, false),
        ] {
            let error = io::Error::from_raw_os_error(number);
            assert_eq!(has_no_bus(&error), expected, "{error}");
        }
    }

    /// A description with a capability of type 9 and then a sparse one.
    fn description(areas: &[(u64, u64)]) -> Vec<u8> {
        let mut bytes = vec![0; 32];
        bytes.extend([9u16, 1].map(u16::to_ne_bytes).concat());
        bytes.extend(40u32.to_ne_bytes());
        bytes.extend([1u16, 1].map(u16::to_ne_bytes).concat());
        let count = u32::try_from(areas.len()).unwrap();
        bytes.extend([0, count, 0].map(u32::to_ne_bytes).concat());
        for (offset, len) in areas {
            bytes.extend([*offset, *len].map(u64::to_ne_bytes).concat());
        }
        bytes
    }

    #[test]
    fn sparse_areas_are_found_in_the_chain() {
        let areas = [(0, 0x1000), (0x3000, 0x1000)];
        assert_eq!(sparse_areas(&description(&areas), 32).unwrap(), areas);
    }

    /// Region 2 as `vfio-pci` describes it: without the capabilities, and with nothing
    /// said of where they are, as long as there is no room for them.
    fn kernel(words: &mut [u64], areas: &[(u64, u64)]) {
        let [len, index] = [words[0], words[1]];
        assert_eq!((len.div_ceil(8), index), (words.len() as u64, 2));
        let full = description(areas);
        let enough = len >= full.len() as u64;
        let flags = VFIO_REGION_INFO_FLAG_MMAP | VFIO_REGION_INFO_FLAG_CAPS;
        words[0] = u64::from(flags) << 32 | full.len() as u64;
        words[1] |= if enough { 32 << 32 } else { 0 };
        words[2] = 0x8000;
        words[3] = 2 << 40;
        for (word, bytes) in words.iter_mut().zip(full.chunks(8)).skip(4) {
            *word = u64::from_ne_bytes(bytes.try_into().unwrap());
        }
    }

    #[test]
    fn what_can_be_mapped_is_read_where_the_last_answer_says() {
        let areas = [(0, 0x1000), (0x3000, 0x1000)];
        let mut calls = 0;
        let (info, bytes) = describe(2, |words| {
            calls += 1;
            kernel(words, &areas);
            Ok(())
        })
        .unwrap();
        assert_eq!((calls, info.offset), (2, 2 << 40));
        let region = region(&info, &bytes);
        assert_eq!((region.size, region.mappable), (0x8000, areas.to_vec()));
    }

    #[test]
    fn description_without_an_end_is_refused() {
        let error = describe(2, |words| {
            words[0] = u64::from(MAX_REGION_INFO) + 1;
            Ok(())
        });
        let text = "the description of region 2 is 65537 bytes long";
        assert_eq!(error.unwrap_err().to_string(), text);
    }

    #[test]
    fn chain_that_is_cut_off_or_a_circle_has_no_areas() {
        let mut bytes = description(&[(0, 0x1000)]);
        bytes[36..40].copy_from_slice(&32u32.to_ne_bytes());
        assert_eq!(sparse_areas(&bytes, 32), None);
        assert_eq!(sparse_areas(&bytes[..38], 32), None);
        assert_eq!(sparse_areas(&bytes, u32::MAX), None);
    }

    #[test]
    fn file_that_is_no_device_is_refused() {
        let null = File::open("/dev/null").unwrap();
        assert!(VfioFile::new(null.into()).is_err());
    }
}
