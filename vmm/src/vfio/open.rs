//! Opens devices that are bound to vfio-pci, and mediated ones. The monitor gets descriptors and opens
//! nothing: this is for the shim, and for programs that have none and are in no jail,
//! the example `boot` and tests.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::Passthrough;
use super::container::Container;
use super::sys;

/// Where functions are, and mediated devices.
const DEVICES: [&str; 2] = ["/sys/bus/pci/devices", "/sys/bus/mdev/devices"];
/// Below the directory of device nodes.
const CONTAINER: &str = "vfio/vfio";
const IOMMU: &str = "iommu";

/// Which of VFIO's interfaces is used.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Api {
    /// Groups, which every kernel with VFIO has had, or iommufd where they were left out.
    #[default]
    Auto,
    /// Groups.
    Group,
    /// iommufd.
    Iommufd,
}

impl Api {
    /// Their names, in the order of the variants.
    pub const NAMES: [&str; 3] = ["auto", "group", "iommufd"];

    /// The one of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "auto" => Some(Self::Auto),
            "group" => Some(Self::Group),
            "iommufd" => Some(Self::Iommufd),
            _ => None,
        }
    }
}

/// Why devices cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The kernel refused a step.
    #[error("cannot {what}: {cause}{}", hint(cause))]
    Step {
        /// What was being done.
        what: String,
        /// Told already.
        cause: io::Error,
    },
    /// The host has not the interface that was asked for.
    #[error(
        "vfio_api in nacre.toml asks for {asked}, and this host has no {}: {remedy}, or leave \
         vfio_api at \"auto\"",
        node.display()
    )]
    Missing {
        /// Its name.
        asked: &'static str,
        /// Its node.
        node: PathBuf,
        /// How a host gets it.
        remedy: &'static str,
    },
}

/// What usually is behind an error.
fn hint(cause: &io::Error) -> &'static str {
    match cause.raw_os_error() {
        Some(libc::EBUSY) => "; another process has it",
        Some(libc::EPERM) => {
            "; the host drives another device of the group, or its IOMMU cannot remap interrupts"
        }
        Some(libc::ENOENT) => "; is the host's kernel module vfio-pci loaded?",
        _ => "",
    }
}

fn failure(what: impl Into<String>) -> impl FnOnce(io::Error) -> OpenError {
    let what = what.into();
    move |cause| OpenError::Step { what, cause }
}

/// A device's address and nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceNodes {
    /// `0000:01:00.0`, or the UUID of a mediated device: its name in its group.
    pub address: String,
    /// `/dev/vfio/N`, its group's.
    pub group: PathBuf,
    /// `/dev/vfio/devices/vfioN`, its own, where the host has iommufd.
    pub own: Option<PathBuf>,
}

impl DeviceNodes {
    /// Those of the device at `address`.
    ///
    /// # Errors
    ///
    /// When there is none, or it is in no IOMMU group.
    pub fn of(address: &str) -> io::Result<Self> {
        let places = DEVICES.map(|dir| Path::new(dir).join(address));
        let device = places.into_iter().find(|place| place.exists());
        let device = device.ok_or(io::ErrorKind::NotFound)?;
        let link = fs::read_link(device.join("iommu_group"))?;
        let number = link.file_name().unwrap_or_default();
        let own = match fs::read_dir(device.join("vfio-dev")) {
            Ok(mut entries) => entries.next().transpose()?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        Ok(Self {
            address: address.to_owned(),
            group: Path::new("/dev/vfio").join(number),
            own: own.map(|entry| Path::new("/dev/vfio/devices").join(entry.file_name())),
        })
    }
}

/// Opens devices by the interface that is asked for. `dev` is the directory of device nodes,
/// `container` what the groups of other devices of the same guest are in.
///
/// # Errors
///
/// `Missing`; the kernel's, with what was being done.
pub fn by(
    api: Api,
    dev: &Path,
    devices: &[DeviceNodes],
    container: Option<&OwnedFd>,
) -> Result<Passthrough, OpenError> {
    let (groups, iommu) = (dev.join(CONTAINER), dev.join(IOMMU));
    match api {
        Api::Group if !groups.exists() => Err(OpenError::Missing {
            asked: "groups",
            node: groups,
            remedy: "load vfio_iommu_type1",
        }),
        Api::Iommufd if !iommu.exists() => Err(OpenError::Missing {
            asked: "iommufd",
            node: iommu,
            remedy: "load iommufd, which a kernel with CONFIG_IOMMUFD has",
        }),
        Api::Auto if !groups.exists() && iommu.exists() => by_iommufd(dev, devices),
        Api::Iommufd => by_iommufd(dev, devices),
        Api::Auto | Api::Group => join_groups(dev, devices, container),
    }
}

/// Opens devices by the group API.
///
/// # Errors
///
/// When one is not there, or not whole groups are bound to vfio-pci.
pub fn by_groups(dev: &Path, devices: &[DeviceNodes]) -> Result<Passthrough, OpenError> {
    join_groups(dev, devices, None)
}

fn join_groups(
    dev: &Path,
    devices: &[DeviceNodes],
    others: Option<&OwnedFd>,
) -> Result<Passthrough, OpenError> {
    let container = match others {
        Some(container) => {
            let again = container.try_clone();
            again.map_err(failure("keep the pod's address space"))?
        }
        None => open(&dev.join(CONTAINER))?,
    };
    let mut groups: Vec<(&Path, OwnedFd)> = Vec::new();
    let mut opened = Vec::new();
    for device in devices {
        let known = groups.iter().position(|(path, _)| *path == device.group);
        let at = match known {
            Some(at) => at,
            None => {
                let is_first = groups.is_empty() && others.is_none();
                let group = open_group(&device.group, &container, is_first)?;
                groups.push((&device.group, group));
                groups.len() - 1
            }
        };
        if let Some((_, group)) = groups.get(at) {
            let what = format!("get PCI device {} from its group", device.address);
            let file = CString::new(device.address.as_str())
                .map_err(io::Error::from)
                .and_then(|name| sys::device_of_group(group, &name))
                .map_err(failure(what))?;
            opened.push((device.address.clone(), file));
        }
    }
    let groups = groups.into_iter().map(|(_, group)| group).collect();
    Ok(Passthrough {
        container: Container::Groups { container, groups },
        devices: opened,
    })
}

/// A group in the container, which gets its type with the first one, and loses it with the
/// last.
fn open_group(path: &Path, container: &OwnedFd, is_first: bool) -> Result<OwnedFd, OpenError> {
    let group = open(path)?;
    let what = format!("attach {} to an address space", path.display());
    let attach = || {
        sys::set_container(&group, container)?;
        match sys::set_iommu(container) {
            // It has its type already.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput && !is_first => Ok(()),
            result => result,
        }
    };
    attach().map_err(failure(what))?;
    Ok(group)
}

/// Opens devices by iommufd.
///
/// # Errors
///
/// When one is not there, or the kernel has no iommufd.
pub fn by_iommufd(dev: &Path, devices: &[DeviceNodes]) -> Result<Passthrough, OpenError> {
    let container = Container::Iommufd(open(&dev.join(IOMMU))?);
    let device = |device: &DeviceNodes| {
        let what = format!("find a node of PCI device {} alone", device.address);
        let own = device.own.as_ref().ok_or(io::ErrorKind::NotFound.into());
        Ok((device.address.clone(), open(own.map_err(failure(what))?)?))
    };
    let devices = devices.iter().map(device).collect::<Result<_, _>>()?;
    Ok(Passthrough { container, devices })
}

fn open(path: &Path) -> Result<OwnedFd, OpenError> {
    let file = File::options().read(true).write(true).open(path);
    file.map(OwnedFd::from)
        .map_err(failure(format!("open {}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nacre_protocol::channel::{Channel, FdList};
    use nacre_protocol::vm;
    use std::os::unix::fs::MetadataExt;

    /// A directory of nodes that are plain files.
    fn dev(files: &[&str]) -> tempfile::TempDir {
        let dev = tempfile::tempdir().unwrap();
        fs::create_dir_all(dev.path().join("vfio/devices")).unwrap();
        for file in files {
            fs::write(dev.path().join(file), "").unwrap();
        }
        dev
    }

    fn device(dev: &Path, address: &str, number: u32) -> DeviceNodes {
        DeviceNodes {
            address: address.into(),
            group: dev.join(format!("vfio/{number}")),
            own: Some(dev.join(format!("vfio/devices/vfio{number}"))),
        }
    }

    fn inode(fd: OwnedFd) -> u64 {
        File::from(fd).metadata().unwrap().ino()
    }

    #[test]
    fn iommufd_is_for_hosts_without_groups() {
        let dev = dev(&["iommu", "vfio/devices/vfio4", "vfio/devices/vfio5"]);
        let devices = [(1, 4), (2, 5)]
            .map(|(bus, number)| device(dev.path(), &format!("0000:0{bus}:00.0"), number));
        let opened = by(Api::Auto, dev.path(), &devices, None).unwrap();

        let (near, mut far) = Channel::pair().unwrap();
        let mut list = FdList::default();
        let config = opened.describe(&mut list);
        near.send(&config, &list).unwrap();
        let (config, mut fds) = far.recv::<vm::Passthrough>().unwrap();
        let taken = Passthrough::take(&config, &mut fds).unwrap();
        let Container::Iommufd(iommu) = taken.container else {
            panic!("groups");
        };
        let of = |path: &Path| fs::metadata(path).unwrap().ino();
        assert_eq!(inode(iommu), of(&dev.path().join("iommu")));
        assert_eq!(taken.devices.len(), devices.len());
        for ((address, fd), device) in taken.devices.into_iter().zip(&devices) {
            assert_eq!(address, device.address);
            assert_eq!(inode(fd), of(device.own.as_ref().unwrap()));
        }
    }

    #[test]
    fn groups_come_first_and_what_fails_is_named() {
        let dev = dev(&["iommu", "vfio/vfio", "vfio/4", "vfio/devices/vfio4"]);
        let error = |number| {
            let device = device(dev.path(), "0000:01:00.0", number);
            by(Api::Auto, dev.path(), &[device], None)
                .err()
                .unwrap()
                .to_string()
        };
        let group = dev.path().join("vfio/4");
        let attach = format!("cannot attach {} to an address space: ", group.display());
        assert!(error(4).starts_with(&attach), "{}", error(4));
        assert!(error(5).contains("vfio/5: No such file"), "{}", error(5));
        assert!(error(5).contains("vfio-pci"), "{}", error(5));
    }

    #[test]
    fn a_host_without_vfio_is_told_so() {
        let dev = dev(&[]);
        let device = device(dev.path(), "0000:01:00.0", 4);
        let error = by(Api::Auto, dev.path(), &[device], None)
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("vfio/vfio") && error.contains("vfio-pci"));
    }

    #[test]
    fn one_interface_can_be_asked_for() {
        let all = [Api::Auto, Api::Group, Api::Iommufd];
        assert_eq!(Api::NAMES.map(Api::named), all.map(Some));
        assert_eq!(Api::named(""), None);
        let both = dev(&["iommu", "vfio/vfio", "vfio/4", "vfio/devices/vfio4"]);
        let of = |api| {
            let device = device(both.path(), "0000:01:00.0", 4);
            by(api, both.path(), &[device], None)
        };
        let opened = of(Api::Iommufd).unwrap();
        assert!(matches!(opened.container, Container::Iommufd(_)));
        // A plain file takes no group.
        let error = of(Api::Group).err().unwrap().to_string();
        assert!(error.contains("vfio/4 to an address space"), "{error}");
    }

    #[test]
    fn an_interface_that_the_host_has_not_is_not_replaced_by_the_other() {
        for (api, has, parts) in [
            (
                Api::Group,
                "iommu",
                ["groups", "no /dev/vfio/vfio", "load vfio_iommu_type1"],
            ),
            (
                Api::Iommufd,
                "vfio/vfio",
                ["iommufd", "no /dev/iommu", "CONFIG_IOMMUFD"],
            ),
        ] {
            let dev = dev(&[has, "vfio/4", "vfio/devices/vfio4"]);
            let device = device(dev.path(), "0000:01:00.0", 4);
            let error = by(api, dev.path(), &[device], None).err().unwrap();
            let root = dev.path().display().to_string();
            let error = error.to_string().replace(&root, "/dev");
            let parts = [&parts[..], &["vfio_api in nacre.toml", "\"auto\""]].concat();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
    }

    #[test]
    fn a_device_without_a_node_of_its_own_is_named() {
        let dev = dev(&["iommu"]);
        let mut device = device(dev.path(), "0000:01:00.0", 4);
        device.own = None;
        let error = by_iommufd(dev.path(), &[device]).err().unwrap().to_string();
        assert!(error.contains("PCI device 0000:01:00.0"), "{error}");
    }
}
