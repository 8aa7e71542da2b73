//! [`System`]: where the kernel tells of devices, and how to read it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use nacre_vmm::vfio::open::Api;

use super::pci::{self, Function};
use super::{Address, DeviceError, VFIO_DRIVER, mediated};
use crate::cgroup::NumberList;

/// Below sysfs: PCI functions and mediated devices.
const FUNCTIONS: &str = "bus/pci/devices";
const MEDIATED: &str = "bus/mdev/devices";

/// How `driver_override` says that there is none.
const NO_OVERRIDE: &str = "(null)";

/// The kernel's and the administrator's files about devices. Tests make some up.
#[derive(Debug, Clone)]
pub struct System {
    /// sysfs(5).
    pub(super) sys: PathBuf,
    /// proc(5).
    pub(super) proc: PathBuf,
    /// Device nodes.
    pub(super) dev: PathBuf,
    /// How those of VFIO are used.
    pub(super) vfio_api: Api,
    /// CDI's directories, the most important one last.
    pub(super) cdi: Vec<PathBuf>,
    /// Where lists of devices' names may be.
    pub(super) names: Vec<PathBuf>,
    /// Asks the kernel for something by a file of sysfs.
    pub(super) write: fn(&Path, &str) -> io::Result<()>,
}

impl Default for System {
    /// This machine's.
    fn default() -> Self {
        Self {
            sys: "/sys".into(),
            proc: "/proc".into(),
            dev: "/dev".into(),
            vfio_api: Api::default(),
            // CDI specification 1.0.0, "CDI JSON Specification".
            cdi: vec!["/etc/cdi".into(), "/var/run/cdi".into()],
            names: vec![
                "/usr/share/misc/pci.ids".into(),
                "/usr/share/hwdata/pci.ids".into(),
            ],
            write: write_file,
        }
    }
}

/// In one write(2), as attributes of sysfs want it.
fn write_file(path: &Path, text: &str) -> io::Result<()> {
    File::options()
        .write(true)
        .open(path)?
        .write_all(text.as_bytes())
}

impl System {
    /// This machine's, with VFIO used so.
    pub fn with_vfio_api(vfio_api: Api) -> Self {
        Self {
            vfio_api,
            ..Self::default()
        }
    }

    /// A device's directory.
    pub(super) fn device_dir(&self, address: Address) -> PathBuf {
        let devices = match address {
            Address::Function { .. } => FUNCTIONS,
            Address::Mediated(_) => MEDIATED,
        };
        self.sys.join(devices).join(address.to_string())
    }

    /// A PCI driver's directory.
    pub(super) fn driver_dir(&self, driver: &str) -> PathBuf {
        self.sys.join("bus/pci/drivers").join(driver)
    }

    /// Whether vfio-pci is there.
    pub fn has_vfio(&self) -> bool {
        self.driver_dir(VFIO_DRIVER).is_dir()
    }

    /// Asks the kernel for something.
    pub(super) fn write(&self, path: &Path, text: &str) -> Result<(), DeviceError> {
        (self.write)(path, text).map_err(|source| DeviceError::Write {
            text: text.to_owned(),
            path: path.to_owned(),
            source,
        })
    }

    /// The node that the host has for a character device, as the kernel calls it; `None` where
    /// there is no such device.
    ///
    /// # Errors
    ///
    /// What sysfs does not tell.
    pub(super) fn node_of(&self, major: i64, minor: i64) -> Result<Option<PathBuf>, DeviceError> {
        let uevent = self.sys.join(format!("dev/char/{major}:{minor}/uevent"));
        if_there(&uevent, node_in(&uevent))
    }

    /// The device of an address.
    ///
    /// # Errors
    ///
    /// `NoDevice`; what sysfs says that cannot be.
    pub fn function(&self, address: Address) -> Result<Function, DeviceError> {
        self.find(address)?.ok_or(DeviceError::NoDevice(address))
    }

    /// All functions and mediated devices, by address.
    ///
    /// # Errors
    ///
    /// What sysfs says that cannot be.
    pub fn functions(&self) -> Result<Vec<Function>, DeviceError> {
        let mut all = self.functions_in(&self.sys.join(FUNCTIONS))?;
        all.extend(self.functions_in(&self.sys.join(MEDIATED))?);
        Ok(all)
    }

    /// The members of an IOMMU group, by address; none if there is no such group.
    ///
    /// # Errors
    ///
    /// What sysfs says that cannot be.
    pub fn group(&self, number: u32) -> Result<Vec<Function>, DeviceError> {
        let groups = self.sys.join("kernel/iommu_groups");
        self.functions_in(&groups.join(number.to_string()).join("devices"))
    }

    /// All IOMMU groups with PCI functions or mediated devices in them.
    ///
    /// # Errors
    ///
    /// What sysfs says that cannot be.
    pub fn groups(&self) -> Result<BTreeMap<u32, Vec<Function>>, DeviceError> {
        let mut groups: BTreeMap<u32, Vec<Function>> = BTreeMap::new();
        for function in self.functions()? {
            if let Some(group) = function.group {
                groups.entry(group).or_default().push(function);
            }
        }
        Ok(groups)
    }

    /// The processors of a NUMA node; `None` where there is no such node.
    ///
    /// # Errors
    ///
    /// What sysfs says that cannot be.
    pub fn node_cpus(&self, node: u32) -> Result<Option<NumberList>, DeviceError> {
        let nodes = self.sys.join("devices/system/node");
        let path = nodes.join(format!("node{node}/cpulist"));
        match text(&path)? {
            // A node without processors has memory alone.
            Some(list) if list.is_empty() => Ok(None),
            Some(list) => match NumberList::parse(&list) {
                Some(cpus) => Ok(Some(cpus)),
                None => Err(malformed(&path, &list)),
            },
            None => Ok(None),
        }
    }

    fn functions_in(&self, dir: &Path) -> Result<Vec<Function>, DeviceError> {
        let mut functions = Vec::new();
        for name in names_in(dir)? {
            // Groups have members on other buses, too.
            if let Ok(address) = name.parse()
                // It may have gone since.
                && let Some(function) = self.find(address)?
            {
                functions.push(function);
            }
        }
        functions.sort_by_key(|function| function.address);
        Ok(functions)
    }

    fn find(&self, address: Address) -> Result<Option<Function>, DeviceError> {
        let dir = self.device_dir(address);
        if let Address::Mediated(_) = address {
            return mediated::find(&dir, address);
        }
        let Some(class) = number(&dir.join("class"))? else {
            return Ok(None);
        };
        let names = names_in(&dir)?;
        let mut virtual_functions = Vec::new();
        for name in names.iter().filter(|name| name.starts_with("virtfn")) {
            virtual_functions.extend(link_address(&dir.join(name))?);
        }
        virtual_functions.sort();
        Ok(Some(Function {
            address,
            mediated: None,
            vendor: number(&dir.join("vendor"))?.unwrap_or_default(),
            device: number(&dir.join("device"))?.unwrap_or_default(),
            class,
            driver: link_name(&dir.join("driver"))?,
            driver_override: text(&dir.join("driver_override"))?
                .filter(|text| !text.is_empty() && text != NO_OVERRIDE),
            group: link_number(&dir.join("iommu_group"))?,
            bars: bars(&dir.join("resource"))?,
            numa_node: numa_node(&dir)?,
            reset_methods: text(&dir.join("reset_method"))?
                .map(|text| text.split_whitespace().map(str::to_owned).collect())
                .unwrap_or_default(),
            physical_function: link_address(&dir.join("physfn"))?,
            virtual_functions,
            boot_vga: text(&dir.join("boot_vga"))?.as_deref() == Some("1"),
            vfio_node: names_in(&dir.join("vfio-dev"))?.pop(),
        }))
    }
}

/// The node of a device by its file `uevent`, as the kernel calls it.
///
/// # Errors
///
/// When the file cannot be read, or has none.
pub(crate) fn node_in(uevent: &Path) -> io::Result<PathBuf> {
    let text = fs::read_to_string(uevent)?;
    let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    let name = name.ok_or_else(|| io::Error::other("the kernel knows no name of it"))?;
    Ok(Path::new("/dev").join(name))
}

/// The NUMA node of the function with this directory.
pub(super) fn numa_node(dir: &Path) -> Result<Option<u32>, DeviceError> {
    // -1: the host has one node, or the firmware does not say.
    Ok(text(&dir.join("numa_node"))?.and_then(|text| text.parse().ok()))
}

fn read_error(path: &Path) -> impl FnOnce(io::Error) -> DeviceError + '_ {
    move |source| DeviceError::Read {
        path: path.to_owned(),
        source,
    }
}

fn malformed(path: &Path, text: &str) -> DeviceError {
    DeviceError::Malformed {
        path: path.to_owned(),
        text: text.to_owned(),
    }
}

/// Nothing where nothing is.
pub(super) fn if_there<T>(path: &Path, result: io::Result<T>) -> Result<Option<T>, DeviceError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(read_error(path)(error)),
    }
}

/// The names in a directory, in order; none if it is not there.
pub(super) fn names_in(dir: &Path) -> Result<Vec<String>, DeviceError> {
    let mut names = Vec::new();
    for entry in if_there(dir, fs::read_dir(dir))?.into_iter().flatten() {
        let entry = entry.map_err(read_error(dir))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// A file's text; nothing if it is not there.
pub(super) fn text(path: &Path) -> Result<Option<String>, DeviceError> {
    // Mounts' places and processes' names may be any bytes.
    let text = if_there(path, fs::read(path))?;
    Ok(text.map(|text| String::from_utf8_lossy(&text).trim().to_owned()))
}

/// `0x` and digits.
pub(super) fn number(path: &Path) -> Result<Option<u32>, DeviceError> {
    let Some(text) = text(path)? else {
        return Ok(None);
    };
    let digits = text.strip_prefix("0x").unwrap_or(&text);
    u32::from_str_radix(digits, 16)
        .map(Some)
        .map_err(|_| malformed(path, &text))
}

/// The name of what a link points at; nothing if there is no link.
pub(super) fn link_name(path: &Path) -> Result<Option<String>, DeviceError> {
    let target = if_there(path, fs::read_link(path))?;
    let name = target.as_deref().and_then(Path::file_name);
    Ok(name.map(|name| name.to_string_lossy().into_owned()))
}

pub(super) fn link_number(path: &Path) -> Result<Option<u32>, DeviceError> {
    link_name(path)?
        .map(|name| name.parse().map_err(|_| malformed(path, &name)))
        .transpose()
}

fn link_address(path: &Path) -> Result<Option<Address>, DeviceError> {
    link_name(path)?.map(|name| name.parse()).transpose()
}

fn bars(path: &Path) -> Result<Vec<pci::Bar>, DeviceError> {
    let Some(text) = text(path)? else {
        return Ok(Vec::new());
    };
    pci::bars(&text).ok_or_else(|| malformed(path, &text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::{Tree, address};

    #[test]
    fn a_function_as_sysfs_tells() {
        let tree = Tree::new();
        let gpu = tree.add("0000:01:00.0", 0x03_0200);
        gpu.file("vendor", "0x10de\n")
            .file("device", "0x2330\n")
            .file("numa_node", "1\n")
            .file("reset_method", "flr bus\n")
            .file("boot_vga", "0\n")
            .file("driver_override", "(null)\n")
            .file(
                "resource",
                "0x0000200000000000 0x0000201fffffffff 0x000000000014220c\n",
            )
            .group(12)
            .driver("nouveau");
        let function = tree.system().function(address("01:00.0")).unwrap();
        assert_eq!((function.vendor, function.device), (0x10de, 0x2330));
        assert_eq!(function.class_name(), "GPU (3D)");
        assert_eq!(function.driver.as_deref(), Some("nouveau"));
        assert_eq!(function.driver_override, None);
        assert_eq!(function.group, Some(12));
        assert_eq!(function.numa_node, Some(1));
        assert_eq!(function.reset_methods, ["flr", "bus"]);
        assert_eq!(function.bars[0].size, 128 << 30);
        assert!(!function.boot_vga && !function.is_on_vfio());
    }

    #[test]
    fn what_a_host_does_not_tell_is_unknown() {
        let tree = Tree::new();
        tree.add("0000:01:00.0", 0x01_0802)
            .file("numa_node", "-1\n");
        let function = tree.system().function(address("01:00.0")).unwrap();
        assert_eq!((function.group, function.numa_node), (None, None));
        assert!(function.reset_methods.is_empty() && function.bars.is_empty());
        let error = tree.system().function(address("02:00.0")).unwrap_err();
        assert!(matches!(error, DeviceError::NoDevice(_)), "{error}");
    }

    #[test]
    fn physical_and_virtual_functions_know_each_other() {
        let tree = Tree::new();
        let physical = tree.add("0000:01:00.0", 0x02_0000);
        for (index, name) in ["0000:01:10.0", "0000:01:10.2"].into_iter().enumerate() {
            let function = tree.add(name, 0x02_0000);
            function.link("physfn", "../0000:01:00.0");
            physical.link(&format!("virtfn{index}"), &format!("../{name}"));
        }
        let system = tree.system();
        let physical = system.function(address("01:00.0")).unwrap();
        let virtuals = ["01:10.0", "01:10.2"].map(address);
        assert_eq!(physical.virtual_functions, virtuals);
        let function = system.function(virtuals[1]).unwrap();
        assert_eq!(function.physical_function, Some(address("01:00.0")));
    }

    #[test]
    fn groups_and_their_members_in_order() {
        let tree = Tree::new();
        for (name, group) in [
            ("0000:01:00.1", 7),
            ("0000:01:00.0", 7),
            ("0000:02:00.0", 8),
        ] {
            tree.add(name, 0x03_0000).group(group);
        }
        let members = tree.system().group(7).unwrap();
        let members: Vec<_> = members.iter().map(|member| member.address).collect();
        assert_eq!(members, ["01:00.0", "01:00.1"].map(address));
        assert!(tree.system().group(9).unwrap().is_empty());
        let groups = tree.system().groups().unwrap();
        assert_eq!(groups.keys().copied().collect::<Vec<_>>(), [7, 8]);
    }

    #[test]
    fn nodes_have_the_kernel_s_names() {
        let tree = Tree::new();
        tree.add_node("240:7", "vfio/7");
        tree.write("sys/dev/char/240:9/uevent", "MAJOR=240\nMINOR=9\n");
        let node_of = |major, minor| tree.system().node_of(major, minor);
        assert_eq!(node_of(240, 7).unwrap(), Some("/dev/vfio/7".into()));
        for (major, minor) in [(240, 8), (-1, -1)] {
            assert_eq!(node_of(major, minor).unwrap(), None);
        }
        let error = node_of(240, 9).unwrap_err().to_string();
        assert!(error.ends_with("dev/char/240:9/uevent"), "{error}");
    }

    #[test]
    fn vendors_versions_of_vfio_pci_count() {
        for (driver, is_vfio) in [
            ("vfio-pci", true),
            ("mlx5_vfio_pci", true),
            ("nvgrace-gpu-vfio-pci", true),
            ("nvme", false),
        ] {
            let tree = Tree::new();
            tree.add("0000:01:00.0", 0x03_0000).driver(driver);
            let function = tree.system().function(address("01:00.0")).unwrap();
            assert_eq!(function.is_on_vfio(), is_vfio, "{driver}");
        }
    }

    #[test]
    fn nonsense_is_named_with_its_file() {
        let tree = Tree::new();
        tree.add("0000:01:00.0", 0x03_0000)
            .file("resource", "what\n");
        let error = tree.system().functions().unwrap_err().to_string();
        assert!(error.contains("resource says \"what\""), "{error}");
    }
}
