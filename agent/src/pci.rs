//! What the guest's drivers made of a PCI device of the host: the device nodes whose
//! devices are below it in sysfs, a disk's partitions among them.
//!
//! A driver has taken its device before containers are made: the kernel finishes the
//! probes of its own drivers before it starts this program, and those of a module
//! before it has loaded it ([`crate::drivers`]). Only the disks of a controller may come
//! after that, from a work queue; the kernel tells of each.
//!
//! A disk is in sysfs before its partitions are known. Until they are, the kernel
//! suppresses its messages, and then says "add" (`device_add_disk` of block/genhd.c). So of
//! a disk that may have been told of before we listened we have the kernel say "change"
//! (Documentation/ABI/testing/sysfs-uevent): whichever of the two comes, the
//! partitions are there.
//!
//! A device in a hot-plug slot comes while the pod runs. The kernel tells of it before a
//! driver has it; a rescan of its bus, which finds nothing new, waits until it has been
//! offered to those there are (`pciehp_configure_device` holds the same lock).

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use nacre_protocol::guest::{ARRIVAL_SECONDS, DISKS_SECONDS};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceBuilder, LinuxDeviceType};

use crate::error::{Context, Error, Result};
use crate::uevent::Uevents;

/// How long a controller's disks may take.
const DISKS_LIMIT: Duration = Duration::from_secs(DISKS_SECONDS);
/// How long the kernel may take to find a device that was plugged in.
const ARRIVAL_LIMIT: Duration = Duration::from_secs(ARRIVAL_SECONDS);
/// Mass storage (PCI Code and ID Assignment, 1.2), in `class`.
const STORAGE: &str = "0x01";
/// Permission bits of nodes for which the driver asks for no others.
const DEFAULT_MODE: u32 = 0o660;

/// The nodes of the device at `address`, by their names in /dev. There are none without
/// a driver, and drivers of many kinds make none.
///
/// # Errors
///
/// `NotFound` if there is no such device, else `Io`.
pub async fn nodes(address: &str) -> Result<Vec<LinuxDevice>> {
    let uevents = &Uevents::listen().context("listen to the kernel")?;
    let function = Function::at(Path::new("/sys"), address)?;
    let ask = |disk: &Path| fs::write(disk.join("uevent"), "change");
    let nodes = function.settled(|| uevents.next(), ask).await?;
    let paths: Vec<_> = nodes.iter().map(LinuxDevice::path).collect();
    tracing::info!("PCI device {address} has the nodes {paths:?}");
    Ok(nodes)
}

/// Returns when the device at `address` is there and a driver that the kernel has for it
/// has taken it: at once, but for one in a hot-plug slot.
///
/// # Errors
///
/// `NotFound` if it does not come, else `Io`.
pub async fn arrived(address: &str) -> Result<()> {
    let uevents = &Uevents::listen().context("listen to the kernel")?;
    match Slot::of(Path::new("/sys"), address)? {
        Some(slot) => slot.settled(|| uevents.next()).await,
        None => Ok(()),
    }
}

/// Has the kernel let go of the device at `address`, which is in a hot-plug slot.
///
/// # Errors
///
/// `FailedPrecondition` if it is in none, else `Io`.
pub async fn eject(address: &str) -> Result<()> {
    let slot = Slot::of(Path::new("/sys"), address)?;
    let slot = slot.ok_or_else(|| {
        Error::FailedPrecondition(format!("PCI device {address} is in no hot-plug slot"))
    })?;
    slot.eject().await
}

/// The hot-plug slot of a device, as the kernel's driver for it shows it
/// (Documentation/ABI/testing/sysfs-bus-pci).
struct Slot {
    address: String,
    /// The slot's, in sysfs.
    dir: PathBuf,
    /// The device's, if it is there.
    device: PathBuf,
    /// Of the device's bus: writing to it has the kernel look for devices.
    rescan: PathBuf,
}

impl Slot {
    /// That of the device at `address`, if it has one.
    fn of(sys: &Path, address: &str) -> Result<Option<Self>> {
        // Slots are named without the function, buses without the device.
        let parts = address.rsplit_once('.').and_then(|(device, _)| {
            let (bus, _) = device.rsplit_once(':')?;
            Some((device, bus))
        });
        let (device, bus) = parts
            .filter(|_| !address.contains('/'))
            .ok_or_else(|| Error::InvalidArgument(format!("{address:?} is no PCI address")))?;
        let what = || format!("look for the slot of PCI device {address}");
        let entries = match fs::read_dir(sys.join("bus/pci/slots")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            entries => entries.with_context(what)?,
        };
        for entry in entries {
            let dir = entry.with_context(what)?.path();
            let of = fs::read_to_string(dir.join("address")).with_context(what)?;
            if of.trim() == device {
                return Ok(Some(Self {
                    address: address.to_owned(),
                    dir,
                    device: sys.join("bus/pci/devices").join(address),
                    rescan: sys.join("class/pci_bus").join(bus).join("rescan"),
                }));
            }
        }
        Ok(None)
    }

    /// Returns when the device is there and a driver has taken it, if there is one for it.
    /// `next` returns when the kernel has told of something.
    async fn settled<F>(&self, next: impl Fn() -> F) -> Result<()>
    where
        F: Future<Output = io::Result<Option<PathBuf>>>,
    {
        let arrived = async {
            while !self.device.exists() {
                next().await.context("listen to the kernel")?;
            }
            Ok(())
        };
        let arrived = tokio::time::timeout(ARRIVAL_LIMIT, arrived).await;
        arrived.unwrap_or_else(|_| {
            let address = &self.address;
            let text = format!("PCI device {address} in its slot within {ARRIVAL_SECONDS} s");
            Err(Error::NotFound(text))
        })?;
        write(&self.rescan, "1")
            .await
            .with_context(|| format!("wait for the driver of PCI device {}", self.address))
    }

    async fn eject(&self) -> Result<()> {
        match write(&self.dir.join("power"), "0").await {
            // Nothing is there, or not any more.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            result => result.with_context(|| format!("let PCI device {} go", self.address)),
        }
    }
}

/// Writes to a file of sysfs, which may take as long as a driver does.
///
/// # Errors
///
/// What the kernel says.
pub async fn write(path: &Path, text: &'static str) -> io::Result<()> {
    let path = path.to_owned();
    let written = tokio::task::spawn_blocking(move || fs::write(path, text)).await;
    written.map_err(io::Error::other)?
}

/// Has the kernel look for what has come to the buses without its being told
/// (Documentation/ABI/testing/sysfs-bus-pci: `rescan`). The drivers have it when this returns.
///
/// # Errors
///
/// What the kernel says.
pub async fn rescan(sys: &Path) -> io::Result<()> {
    write(&sys.join("bus/pci/rescan"), "1").await
}

/// A PCI function.
struct Function {
    address: String,
    /// In sysfs.
    dir: PathBuf,
}

/// Something with a node.
struct Found {
    /// In sysfs.
    dir: PathBuf,
    node: LinuxDevice,
}

impl Found {
    /// Whether it is a whole disk.
    fn is_disk(&self) -> bool {
        self.node.typ() == LinuxDeviceType::B && !self.dir.join("partition").exists()
    }
}

impl Function {
    fn at(sys: &Path, address: &str) -> Result<Self> {
        let link = sys.join("bus/pci/devices").join(address);
        let dir = match fs::canonicalize(link) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Error::NotFound(format!("PCI device {address}")));
            }
            dir => dir.with_context(|| format!("look for PCI device {address}"))?,
        };
        let address = address.to_owned();
        Ok(Self { address, dir })
    }

    /// The nodes, once those are there that come late. `next` is the next device that
    /// the kernel tells of, `None` if some were missed; `ask` has it tell of a disk.
    async fn settled<F>(
        &self,
        next: impl Fn() -> F,
        ask: impl Fn(&Path) -> io::Result<()>,
    ) -> Result<Vec<LinuxDevice>>
    where
        F: Future<Output = io::Result<Option<PathBuf>>>,
    {
        let (mut asked, mut told) = (BTreeSet::new(), BTreeSet::new());
        let settle = async {
            loop {
                let found = self.look()?;
                let disks: Vec<_> = found.iter().filter(|found| found.is_disk()).collect();
                for disk in disks.iter().filter(|disk| !told.contains(&disk.dir)) {
                    if asked.insert(disk.dir.clone()) {
                        unless_gone(ask(&disk.dir)).context("ask the kernel of a disk")?;
                    }
                }
                if !self.awaits_disk(&disks) && disks.iter().all(|disk| told.contains(&disk.dir)) {
                    return Ok(found);
                }
                match next().await.context("listen to the kernel")? {
                    Some(device) => told.extend(
                        disks
                            .iter()
                            .filter(|disk| disk.dir.ends_with(&device))
                            .map(|disk| disk.dir.clone()),
                    ),
                    None => asked.clear(),
                }
            }
        };
        let settled = tokio::time::timeout(DISKS_LIMIT, settle).await;
        let found = settled.unwrap_or_else(|_| {
            let address = &self.address;
            tracing::warn!("PCI device {address} has no disk, or one that does not get ready");
            self.look()
        });
        Ok(found?.into_iter().map(|found| found.node).collect())
    }

    fn awaits_disk(&self, disks: &[&Found]) -> bool {
        let class = fs::read_to_string(self.dir.join("class")).unwrap_or_default();
        class.starts_with(STORAGE) && self.dir.join("driver").exists() && disks.is_empty()
    }

    fn look(&self) -> Result<Vec<Found>> {
        let mut found = Vec::new();
        collect(&self.dir, &mut found)
            .with_context(|| format!("look at PCI device {}", self.address))?;
        found.sort_by(|a, b| a.node.path().cmp(b.node.path()));
        Ok(found)
    }
}

fn unless_gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Adds the nodes of what is in a directory of sysfs. What goes away meanwhile has none.
fn collect(dir: &Path, found: &mut Vec<Found>) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        // Links lead to other devices.
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), found)?;
        }
    }
    let text = |name| match fs::read_to_string(dir.join(name)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        text => text.map(Some),
    };
    if let (Some(number), Some(uevent)) = (text("dev")?, text("uevent")?) {
        let malformed = || io::Error::other(format!("{}: {number:?}, {uevent:?}", dir.display()));
        let node = node(dir, &number, &uevent).ok_or_else(malformed)?;
        let dir = dir.to_owned();
        found.push(Found { dir, node });
    }
    Ok(())
}

/// The node of a device with these files in sysfs.
fn node(dir: &Path, number: &str, uevent: &str) -> Option<LinuxDevice> {
    let value = |key: &str| uevent.lines().find_map(|line| line.strip_prefix(key));
    let name = Path::new(value("DEVNAME=")?);
    let mut components = name.components();
    if !components.all(|part| matches!(part, Component::Normal(_))) {
        return None;
    }
    let (major, minor) = number.trim().split_once(':')?;
    let mode = match value("DEVMODE=") {
        Some(octal) => u32::from_str_radix(octal, 8).ok()? & 0o7777,
        None => DEFAULT_MODE,
    };
    let subsystem = fs::read_link(dir.join("subsystem")).ok()?;
    LinuxDeviceBuilder::default()
        .path(Path::new("/dev").join(name))
        .typ(if subsystem.ends_with("block") {
            LinuxDeviceType::B
        } else {
            LinuxDeviceType::C
        })
        .major(major.parse::<i64>().ok()?)
        .minor(minor.parse::<i64>().ok()?)
        .file_mode(mode)
        .uid(0u32)
        .gid(0u32)
        .build()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::os::unix::fs::symlink;

    const ADDRESS: &str = "0000:01:00.0";
    const NVME: &str = "0x010802\n";
    const DISK: &str = "nvme/nvme0/nvme0n1";

    type Told = io::Result<Option<PathBuf>>;

    /// A made-up sysfs with one function behind a root port.
    struct Sys(tempfile::TempDir);

    impl Sys {
        fn with(class: &str, driver: bool) -> Self {
            let sys = Self(tempfile::tempdir().unwrap());
            let devices = sys.0.path().join("bus/pci/devices");
            fs::create_dir_all(&devices).unwrap();
            fs::create_dir_all(sys.dir()).unwrap();
            let target = format!("../../../devices/pci0000:00/0000:00:02.0/{ADDRESS}");
            symlink(target, devices.join(ADDRESS)).unwrap();
            fs::write(sys.dir().join("class"), class).unwrap();
            if driver {
                fs::create_dir_all(sys.0.path().join("bus/pci/drivers/some")).unwrap();
                let driver = "../../../../bus/pci/drivers/some";
                symlink(driver, sys.dir().join("driver")).unwrap();
            }
            sys
        }

        fn dir(&self) -> PathBuf {
            let port = "devices/pci0000:00/0000:00:02.0";
            self.0.path().join(port).join(ADDRESS)
        }

        fn node(&self, path: &str, subsystem: &str, number: &str, uevent: &str) {
            let dir = self.dir().join(path);
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join("dev"), format!("{number}\n")).unwrap();
            fs::write(dir.join("uevent"), uevent).unwrap();
            symlink(format!("/sys/class/{subsystem}"), dir.join("subsystem")).unwrap();
        }

        fn controller(&self) {
            let uevent = "MAJOR=242\nMINOR=0\nDEVNAME=nvme0\n";
            self.node("nvme/nvme0", "nvme", "242:0", uevent);
        }

        fn disk(&self) {
            let uevent = "MAJOR=259\nDEVNAME=nvme0n1\nDEVTYPE=disk\n";
            self.node(DISK, "block", "259:0", uevent);
        }

        fn partition(&self) {
            let uevent = "DEVNAME=nvme0n1p1\nDEVTYPE=partition\n";
            let path = format!("{DISK}/nvme0n1p1");
            self.node(&path, "block", "259:1", uevent);
            fs::write(self.dir().join(path).join("partition"), "1\n").unwrap();
        }

        /// What a message says of something in the function's directory.
        fn path_of(&self, path: &str) -> Told {
            let dir = self.dir().join(path);
            Ok(Some(dir.strip_prefix(self.0.path()).unwrap().to_owned()))
        }

        /// Has it in a hot-plug slot, beside one for another bus.
        fn slot(&self) -> Slot {
            for (number, address) in [("2", "0000:02:00\n"), ("1", "0000:01:00\n")] {
                let dir = self.0.path().join("bus/pci/slots").join(number);
                fs::create_dir_all(&dir).unwrap();
                fs::write(dir.join("address"), address).unwrap();
            }
            let bus = self.0.path().join("class/pci_bus/0000:01");
            fs::create_dir_all(&bus).unwrap();
            fs::write(bus.join("rescan"), "").unwrap();
            Slot::of(self.0.path(), ADDRESS).unwrap().unwrap()
        }

        fn function(&self) -> Function {
            Function::at(self.0.path(), ADDRESS).unwrap()
        }
    }

    async fn nothing() -> Told {
        panic!("nothing to wait for")
    }

    fn no_disk(disk: &Path) -> io::Result<()> {
        panic!("asked for {}", disk.display())
    }

    fn names(nodes: &[LinuxDevice]) -> Vec<&str> {
        let names = nodes.iter().map(|node| node.path().to_str().unwrap());
        names.collect()
    }

    #[tokio::test]
    async fn what_is_below_the_device_is_its() {
        let sys = Sys::with(NVME, true);
        sys.controller();
        sys.disk();
        sys.partition();
        // Another device, which a link leads to.
        let other = tempfile::tempdir().unwrap();
        fs::write(other.path().join("dev"), "1:1\n").unwrap();
        symlink(other.path(), sys.dir().join("iommu")).unwrap();
        // It was there long ago: the kernel tells of it when it is asked.
        let next = || std::future::ready(sys.path_of(DISK));
        let ask = |disk: &Path| {
            assert!(disk.ends_with(DISK));
            Ok(())
        };
        let nodes = sys.function().settled(next, ask).await.unwrap();
        assert_eq!(
            names(&nodes),
            ["/dev/nvme0", "/dev/nvme0n1", "/dev/nvme0n1p1"]
        );
        let node = |at: usize| (nodes[at].typ(), nodes[at].major(), nodes[at].minor());
        assert_eq!(node(0), (LinuxDeviceType::C, 242, 0));
        assert_eq!(node(2), (LinuxDeviceType::B, 259, 1));
        assert_eq!(nodes[0].file_mode(), Some(0o660));
    }

    /// And its partitions after it, and messages that are lost.
    #[tokio::test]
    async fn a_disk_may_come_after_its_controller() {
        let sys = Sys::with(NVME, true);
        let (events, asked) = (Cell::new(0), Cell::new(0));
        let next = || {
            events.set(events.get() + 1);
            std::future::ready(match events.get() {
                1 => {
                    sys.controller();
                    sys.path_of("nvme/nvme0")
                }
                2 => {
                    sys.disk();
                    Ok(None)
                }
                3 => sys.path_of("nvme/nvme0/hwmon1"),
                4 => Ok(None),
                5 => {
                    sys.partition();
                    sys.path_of(DISK)
                }
                _ => panic!("all is there"),
            })
        };
        let ask = |_: &Path| {
            asked.set(asked.get() + 1);
            Ok(())
        };
        let nodes = sys.function().settled(next, ask).await.unwrap();
        assert_eq!((nodes.len(), events.get()), (3, 5));
        assert_eq!(asked.get(), 2, "again after a loss, not else");
    }

    #[tokio::test(start_paused = true)]
    async fn a_controller_without_disks_is_there_all_the_same() {
        let sys = Sys::with(NVME, true);
        sys.controller();
        let nodes = sys
            .function()
            .settled(std::future::pending, no_disk)
            .await
            .unwrap();
        assert_eq!(names(&nodes), ["/dev/nvme0"]);
    }

    #[tokio::test]
    async fn without_a_driver_there_is_nothing_to_wait_for() {
        for (class, driver) in [(NVME, false), ("0x030200\n", true)] {
            let sys = Sys::with(class, driver);
            let nodes = sys.function().settled(nothing, no_disk).await.unwrap();
            assert_eq!(names(&nodes), [""; 0]);
        }
    }

    #[tokio::test]
    async fn drivers_name_nodes_and_their_modes() {
        let sys = Sys::with("0x030000\n", true);
        let uevent = "DEVNAME=dri/renderD128\nDEVMODE=0666\n";
        sys.node("drm/renderD128", "drm", "226:128", uevent);
        let nodes = sys.function().settled(nothing, no_disk).await.unwrap();
        assert_eq!(names(&nodes), ["/dev/dri/renderD128"]);
        assert_eq!(nodes[0].file_mode(), Some(0o666));
        sys.node("drm/card0", "drm", "226:0", "DEVNAME=../card0\n");
        let error = sys.function().settled(nothing, no_disk).await.unwrap_err();
        assert!(error.full().contains("../card0"), "{}", error.full());
    }

    #[tokio::test]
    async fn a_device_in_a_slot_is_waited_for_and_then_its_driver() {
        let sys = Sys::with(NVME, true);
        assert!(Slot::of(sys.0.path(), ADDRESS).unwrap().is_none());
        let slot = sys.slot();
        let link = sys.0.path().join("bus/pci/devices").join(ADDRESS);
        fs::remove_file(&link).unwrap();
        let events = Cell::new(0);
        let next = || {
            assert_eq!(fs::read_to_string(&slot.rescan).unwrap(), "", "too early");
            if events.get() == 1 {
                symlink(sys.dir(), &link).unwrap();
            }
            events.set(events.get() + 1);
            std::future::ready(Ok(None))
        };
        slot.settled(next).await.unwrap();
        assert_eq!(events.get(), 2);
        assert_eq!(fs::read_to_string(&slot.rescan).unwrap(), "1");
    }

    #[tokio::test(start_paused = true)]
    async fn a_device_that_does_not_come_is_given_up() {
        let sys = Sys::with(NVME, true);
        let slot = sys.slot();
        fs::remove_file(&slot.device).unwrap();
        let error = slot.settled(std::future::pending).await.unwrap_err();
        let text = "PCI device 0000:01:00.0 in its slot within 20 s not found";
        assert_eq!(error.full(), text);
    }

    #[tokio::test]
    async fn a_device_is_let_go_by_its_slot() {
        let sys = Sys::with(NVME, true);
        sys.slot().eject().await.unwrap();
        let power = |slot: &str| sys.0.path().join("bus/pci/slots").join(slot).join("power");
        assert_eq!(fs::read_to_string(power("1")).unwrap(), "0");
        assert!(!power("2").exists());
        for wrong in ["", "0000", "../x:y.0", "0000:01.0/.."] {
            assert!(Slot::of(sys.0.path(), wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_device_that_is_not_there_is_named() {
        let sys = Sys::with(NVME, false);
        let error = Function::at(sys.0.path(), "0000:02:00.0").err().unwrap();
        assert_eq!(error.full(), "PCI device 0000:02:00.0 not found");
    }
}
