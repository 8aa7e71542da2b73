//! Mediated devices (Linux Documentation/driver-api/vfio-mediated-device.rst): parts of a
//! device that its driver makes for programs, such as vGPUs.
//!
//! ```text
//! /sys/bus/mdev/devices/UUID -> ../../../devices/pci0000:64/0000:65:00.0/UUID
//!                                                its parent ^^^^^^^^^^^^
//!   iommu_group, driver, vfio-dev     as a function has them; it is alone in its group
//!   mdev_type/name                    what the driver calls such ones
//! ```
//! What it is to its guest only its own configuration space says, which is read when it is
//! opened. Until then its ids and class are its parent's, as those of vGPUs usually are, and its BARs
//! unknown. Where its memory should be is where the parent is, too.

use std::fs;
use std::path::Path;

use super::pci::{Function, Mediated};
use super::sysfs::{if_there, link_name, link_number, names_in, numa_node, number, text};
use super::{Address, DeviceError};

/// The mediated device `address`, whose directory is `dir`.
pub(super) fn find(dir: &Path, address: Address) -> Result<Option<Function>, DeviceError> {
    let real = if_there(dir, fs::canonicalize(dir))?;
    let Some(parent) = real.as_deref().and_then(Path::parent) else {
        return Ok(None);
    };
    let name = parent.file_name().unwrap_or_default();
    let mediated = Mediated {
        parent: name.to_string_lossy().into_owned(),
        kind: text(&dir.join("mdev_type/name"))?,
    };
    // What is no function may have files of these names that say something else.
    let is_function = mediated.parent.parse::<Address>().is_ok();
    let of_parent = |name| {
        if is_function {
            number(&parent.join(name)).map(Option::unwrap_or_default)
        } else {
            Ok(0)
        }
    };
    Ok(Some(Function {
        address,
        mediated: Some(mediated),
        vendor: of_parent("vendor")?,
        device: of_parent("device")?,
        class: of_parent("class")?,
        driver: link_name(&dir.join("driver"))?,
        driver_override: None,
        group: link_number(&dir.join("iommu_group"))?,
        bars: Vec::new(),
        numa_node: numa_node(parent)?,
        reset_methods: Vec::new(),
        physical_function: None,
        virtual_functions: Vec::new(),
        boot_vga: false,
        vfio_node: names_in(&dir.join("vfio-dev"))?.pop(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::{Tree, address};

    const UUID: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";

    #[test]
    fn a_part_of_a_gpu_is_what_that_is_and_where_that_is() {
        let tree = Tree::new();
        let gpu = tree.add("0000:65:00.0", 0x03_0200);
        gpu.file("vendor", "0x10de\n")
            .file("device", "0x2330\n")
            .file("numa_node", "1\n");
        let part = tree.add_mediated(UUID, "devices/pci0000:00/0000:65:00.0");
        part.group(12).file("mdev_type/name", "GRID T4-2Q\n");
        part.file("vfio-dev/vfio3/dev", "511:3\n");
        let part = tree.system().function(address(UUID)).unwrap();
        let expected = Mediated {
            parent: "0000:65:00.0".into(),
            kind: Some("GRID T4-2Q".into()),
        };
        assert_eq!(part.mediated, Some(expected));
        assert_eq!((part.vendor, part.device), (0x10de, 0x2330));
        assert_eq!(part.class_name(), "GPU (3D)");
        assert_eq!((part.group, part.numa_node), (Some(12), Some(1)));
        assert_eq!(part.vfio_node.as_deref(), Some("vfio3"));
        assert!(part.is_on_vfio() && part.bars.is_empty());
    }

    #[test]
    fn one_whose_parent_is_no_hardware() {
        let tree = Tree::new();
        tree.add_mediated(UUID, "devices/virtual/mtty/mtty")
            .group(3);
        tree.write("sys/devices/virtual/mtty/mtty/class", "serial\n");
        let system = tree.system();
        let part = system.function(address(UUID)).unwrap();
        assert_eq!(part.mediated.as_ref().unwrap().parent, "mtty");
        assert_eq!(part.mediated.as_ref().unwrap().kind, None);
        assert_eq!((part.class, part.numa_node), (0, None));
        assert_eq!(system.group(3).unwrap(), system.functions().unwrap());
        assert_eq!(system.functions().unwrap(), [part]);
    }

    #[test]
    fn one_that_is_gone() {
        let tree = Tree::new();
        let error = tree.system().function(address(UUID)).unwrap_err();
        let text = format!("this host has no mediated device {UUID}; `nacre devices` lists them");
        assert_eq!(error.to_string(), text);
    }
}
