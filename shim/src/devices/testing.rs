//! A host made up of files, whose kernel is [`kernel`].

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use nacre_vmm::vfio::open::Api;
use tempfile::TempDir;

use super::{Address, System};

/// What a driver's directory has that takes no device.
const REFUSES: &str = "refuses";

/// Of nodes of IOMMU groups.
pub(crate) const GROUP_MAJOR: u32 = 240;

/// The made-up host.
pub(crate) struct Tree {
    dir: TempDir,
}

/// A device of it.
pub(crate) struct Made<'a> {
    tree: &'a Tree,
    dir: PathBuf,
    name: String,
}

pub(crate) fn address(text: &str) -> Address {
    text.parse().unwrap()
}

impl Tree {
    pub(crate) fn new() -> Self {
        let tree = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        for dir in [
            "sys/bus/pci/devices",
            "sys/bus/pci/drivers/vfio-pci",
            "sys/kernel/iommu_groups",
            "sys/devices/pci0000:00",
            "proc/self",
            "dev",
            "etc/cdi",
            "run/cdi",
        ] {
            fs::create_dir_all(tree.path(dir)).unwrap();
        }
        tree.write("proc/self/mountinfo", "");
        tree.write("proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n");
        tree
    }

    pub(crate) fn path(&self, below: &str) -> PathBuf {
        self.dir.path().join(below)
    }

    /// Makes a file and what it is in.
    pub(crate) fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    pub(crate) fn link(&self, path: &str, target: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(target, path).unwrap();
    }

    pub(crate) fn system(&self) -> System {
        System {
            sys: self.path("sys"),
            proc: self.path("proc"),
            dev: self.path("dev"),
            vfio_api: Api::default(),
            cdi: vec![self.path("etc/cdi"), self.path("run/cdi")],
            names: vec![self.path("usr/share/misc/pci.ids")],
            write: kernel,
        }
    }

    /// A function without driver and group.
    pub(crate) fn add(&self, name: &str, class: u32) -> Made<'_> {
        let dir = self.path("sys/devices/pci0000:00").join(name);
        fs::create_dir(&dir).unwrap();
        let target = format!("../../../devices/pci0000:00/{name}");
        self.link(&format!("sys/bus/pci/devices/{name}"), &target);
        let made = Made {
            tree: self,
            dir,
            name: name.to_owned(),
        };
        made.file("class", &format!("0x{class:06x}\n"))
            .file("driver_override", "(null)\n")
            .file("default_driver", "")
            .link("subsystem", "../../../bus/pci");
        made
    }

    /// A mediated device, a part of what has the directory `parent` below sysfs.
    pub(crate) fn add_mediated(&self, uuid: &str, parent: &str) -> Made<'_> {
        let dir = self.path("sys").join(parent).join(uuid);
        fs::create_dir_all(&dir).unwrap();
        let target = format!("../../../{parent}/{uuid}");
        self.link(&format!("sys/bus/mdev/devices/{uuid}"), &target);
        let made = Made {
            tree: self,
            dir,
            name: uuid.to_owned(),
        };
        made.link("subsystem", "../../../bus/mdev")
            .link("driver", "../../../bus/mdev/drivers/mtty");
        made
    }

    /// A character device with these numbers, whose node the kernel calls so below `/dev`.
    pub(crate) fn add_node(&self, numbers: &str, name: &str) {
        let uevent = format!("sys/dev/char/{numbers}/uevent");
        self.write(&uevent, &format!("DEVNAME={name}\n"));
    }

    /// From now on a driver takes no device.
    pub(crate) fn refuses(&self, driver: &str) {
        self.write(&format!("sys/bus/pci/drivers/{driver}/{REFUSES}"), "");
    }
}

impl Made<'_> {
    /// A file in its directory.
    pub(crate) fn file(&self, name: &str, text: &str) -> &Self {
        let path = self.dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        self
    }

    /// A link in its directory.
    pub(crate) fn link(&self, name: &str, target: &str) -> &Self {
        let path = self.dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(target, path).unwrap();
        self
    }

    /// What the kernel made of it, below its directory.
    pub(crate) fn node(&self, path: &str, subsystem: &str, number: &str) -> &Self {
        self.link(
            &format!("{path}/subsystem"),
            &format!("/sys/class/{subsystem}"),
        );
        if number.is_empty() {
            return self;
        }
        self.file(&format!("{path}/dev"), &format!("{number}\n"))
    }

    /// In an IOMMU group, whose node has its number and [`GROUP_MAJOR`].
    pub(crate) fn group(&self, number: u32) -> &Self {
        let numbers = format!("{GROUP_MAJOR}:{number}");
        self.tree.add_node(&numbers, &format!("vfio/{number}"));
        let group = format!("sys/kernel/iommu_groups/{number}");
        let target = self.tree.path(&group);
        symlink(&target, self.dir.join("iommu_group")).unwrap();
        self.tree
            .link(&format!("{group}/devices/{}", self.name), "elsewhere");
        self
    }

    /// The driver it has, which is the one it gets where none is asked for.
    pub(crate) fn driver(&self, driver: &str) -> &Self {
        if driver != super::VFIO_DRIVER {
            self.file("default_driver", driver);
        }
        attach(&self.dir, &self.tree.path("sys/bus/pci/drivers"), driver);
        self
    }
}

fn attach(function: &Path, drivers: &Path, driver: &str) {
    let driver = drivers.join(driver);
    fs::create_dir_all(&driver).unwrap();
    symlink(driver, function.join("driver")).unwrap();
}

/// What the kernel does with a write to one of its files (Documentation/ABI/testing/
/// sysfs-bus-pci): of a function that is asked for a driver by `driver_override` no other
/// one takes hold.
pub(crate) fn kernel(path: &Path, text: &str) -> io::Result<()> {
    let file = path.file_name().unwrap().to_str().unwrap();
    let sys = path.ancestors().find(|dir| dir.ends_with("sys")).unwrap();
    let drivers = sys.join("bus/pci/drivers");
    let function = sys.join("bus/pci/devices").join(text);
    let is_free = fs::read_link(function.join("driver")).is_err();
    match file {
        "driver_override" => {
            let text = if text == "\n" { "(null)" } else { text };
            fs::write(path, text)
        }
        "unbind" if is_free => Err(io::Error::from_raw_os_error(libc::ENODEV)),
        "unbind" => fs::remove_file(function.join("driver")),
        "bind" | "drivers_probe" if is_free => {
            let wanted = fs::read_to_string(function.join("driver_override"))?;
            let default = fs::read_to_string(function.join("default_driver"))?;
            let driver = match wanted.trim() {
                "(null)" => default,
                wanted => wanted.to_owned(),
            };
            if !driver.is_empty() && !drivers.join(&driver).join(REFUSES).exists() {
                attach(&function, &drivers, &driver);
            }
            Ok(())
        }
        "bind" => Err(io::Error::from_raw_os_error(libc::ENODEV)),
        "drivers_probe" => Ok(()),
        _ => panic!("nobody writes to {}", path.display()),
    }
}
