//! Opens devices that are bound to vfio-pci, for programs that have no shim to do it
//! and are in no jail: the example `boot`, and tests.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::Passthrough;
use super::container::Container;
use super::sys;

const DEVICES: &str = "/sys/bus/pci/devices";

/// Opens the devices at `addresses` by the group API.
///
/// # Errors
///
/// When one is not there, or not whole groups are bound to vfio-pci.
pub fn by_groups(addresses: &[String]) -> io::Result<Passthrough> {
    let container = open(Path::new("/dev/vfio/vfio"))?;
    let mut groups: Vec<(PathBuf, OwnedFd)> = Vec::new();
    let mut devices = Vec::new();
    for address in addresses {
        let link = fs::read_link(Path::new(DEVICES).join(address).join("iommu_group"))?;
        let number = link.file_name().unwrap_or_default();
        let path = Path::new("/dev/vfio").join(number);
        let known = groups.iter().position(|(other, _)| *other == path);
        let known = match known {
            Some(known) => known,
            None => {
                let group = open(&path)?;
                sys::set_container(&group, &container)?;
                if groups.is_empty() {
                    sys::set_iommu(&container)?;
                }
                groups.push((path, group));
                groups.len() - 1
            }
        };
        let name = CString::new(address.as_str())?;
        if let Some((_, group)) = groups.get(known) {
            devices.push((address.clone(), sys::device_of_group(group, &name)?));
        }
    }
    let groups = groups.into_iter().map(|(_, group)| group).collect();
    Ok(Passthrough {
        container: Container::Groups { container, groups },
        devices,
    })
}

/// Opens the devices at `addresses` by iommufd.
///
/// # Errors
///
/// When one is not there, or the kernel has no iommufd.
pub fn by_iommufd(addresses: &[String]) -> io::Result<Passthrough> {
    let container = Container::Iommufd(open(Path::new("/dev/iommu"))?);
    let device = |address: &String| {
        let directory = Path::new(DEVICES).join(address).join("vfio-dev");
        let entry = fs::read_dir(directory)?.next();
        let entry = entry.ok_or(io::ErrorKind::NotFound)??;
        let node = Path::new("/dev/vfio/devices").join(entry.file_name());
        Ok((address.clone(), open(&node)?))
    };
    let devices = addresses.iter().map(device).collect::<io::Result<_>>()?;
    Ok(Passthrough { container, devices })
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    let file = File::options().read(true).write(true).open(path);
    let named = |error| io::Error::other(format!("{}: {error}", path.display()));
    file.map(OwnedFd::from).map_err(named)
}
