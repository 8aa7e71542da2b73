//! Device nodes of an OCI spec: which of them a VM can have.
//!
//! A node of the host means nothing to another kernel, so each is one of these:
//!
//! | node | in the guest |
//! |---|---|
//! | of the kernel itself: null, tty, fuse, tun... ([`KERNEL_DEVICES`]) | the same numbers |
//! | block device | a disk of the VM, a node with the guest's numbers |
//! | VFIO's: `/dev/vfio/...`, `/dev/iommu`, and what has their numbers | none: the device as a whole is the VM's |
//! | any other | refused |
//!
//! A spec that allows everything and lists all nodes of the host is a privileged
//! container's, for which containerd lists them unasked: it gets the kernel's own.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Spec};
use rustix::fs::ioctl_blksszget;

use super::{HostBacking, StorageError};
use crate::devices::request::is_passthrough_node;
use crate::devices::{System, sysfs};
use crate::oci::device_rules;

/// What sizes of disks count in (virtio 1.2, 5.2.4).
const SECTOR_BYTES: u64 = 512;
/// Logical sectors of nearly all disks, and of files that are none.
pub(super) const USUAL_SECTOR_BYTES: u32 = 512;
/// Permission bits of a node where the spec has none.
const DEFAULT_MODE: u32 = 0o660;

/// Character devices that are the same in every Linux kernel, and their nodes in its
/// devtmpfs (Documentation/admin-guide/devices.txt).
const KERNEL_DEVICES: [(i64, i64, &str); 12] = [
    (1, 3, "/dev/null"),
    (1, 5, "/dev/zero"),
    (1, 7, "/dev/full"),
    (1, 8, "/dev/random"),
    (1, 9, "/dev/urandom"),
    (1, 11, "/dev/kmsg"),
    (5, 0, "/dev/tty"),
    (5, 1, "/dev/console"),
    (5, 2, "/dev/ptmx"),
    (10, 200, "/dev/net/tun"),
    (10, 229, "/dev/fuse"),
    (10, 183, "/dev/hwrng"),
];

/// A block device of the host that a container gets.
#[derive(Debug)]
pub struct BlockDevice {
    /// The device.
    pub backing: HostBacking,
    /// Its size.
    pub size_bytes: u64,
    /// Size of its logical sectors.
    pub sector_bytes: u32,
    /// Whether the container may only read it.
    pub read_only: bool,
    /// Its node in the container.
    pub path: PathBuf,
    /// What the container may do with it, as a device rule has it.
    pub access: String,
    /// Permission bits of the node.
    pub mode: u32,
    /// Owner of the node.
    pub uid: u32,
    /// Group of the node.
    pub gid: u32,
}

/// Opens the block devices a spec names.
pub(super) fn open(
    system: &System,
    spec: &Spec,
    container_id: &str,
) -> Result<Vec<BlockDevice>, StorageError> {
    let Some(linux) = spec.linux() else {
        return Ok(Vec::new());
    };
    let rules = device_rules::of(linux);
    if device_rules::allow_everything(rules) {
        return Ok(Vec::new());
    }
    let mut devices = Vec::new();
    for device in linux.devices().iter().flatten() {
        if is_kernel_s(device) {
            continue;
        }
        let refused = |reason: String, source: Option<io::Error>| StorageError::Device {
            container_id: container_id.into(),
            path: device.path().clone(),
            reason,
            source,
        };
        let is_passed = is_passthrough_node(system, device).map_err(|error| {
            let reason = "may be a PCI device's, which sysfs does not tell".into();
            refused(reason, Some(io::Error::other(error)))
        })?;
        if is_passed {
            continue;
        }
        if device.typ() != LinuxDeviceType::B {
            let reason = "is a device of the host that a virtual machine does not have; block \
                          devices can be passed, and PCI devices by /dev/vfio";
            return Err(refused(reason.into(), None));
        }
        let opened = open_one(device, rules).map_err(|error| {
            let number = format!("{}:{}", device.major(), device.minor());
            refused(format!("is block device {number} of the host"), Some(error))
        })?;
        devices.push(opened);
    }
    Ok(devices)
}

fn is_kernel_s(device: &LinuxDevice) -> bool {
    match device.typ() {
        // A named pipe is made, whoever's it is.
        LinuxDeviceType::P => true,
        LinuxDeviceType::C | LinuxDeviceType::U => {
            kernel_node(device.major(), device.minor()).is_some()
        }
        LinuxDeviceType::A | LinuxDeviceType::B => false,
    }
}

/// Where every kernel, the guest's too, has the character device of these numbers; `None`
/// for one that not every kernel has.
pub(super) fn kernel_node(major: i64, minor: i64) -> Option<&'static str> {
    let found = KERNEL_DEVICES
        .iter()
        .find(|device| (device.0, device.1) == (major, minor));
    found.map(|device| device.2)
}

/// What the guest's spec keeps of nodes and rules: the numbers of the host's devices are
/// somebody else's there.
pub fn keep_kernel_s(linux: &mut Linux) {
    let all = linux.devices().clone().unwrap_or_default();
    let (kept, dropped): (Vec<_>, Vec<_>) = all.into_iter().partition(is_kernel_s);
    if linux.devices().is_some() {
        linux.set_devices(Some(kept));
    }
    let Some(resources) = linux.resources_mut() else {
        return;
    };
    if let Some(rules) = resources.devices_mut() {
        rules.retain(|rule| {
            let some_disk_s = device_rules::kind(rule) == LinuxDeviceType::B
                && device_rules::number(rule.major()).is_some();
            let is_dropped_s = |device| device_rules::is_own(rule, device);
            !some_disk_s && !dropped.iter().any(is_dropped_s)
        });
    }
}

fn open_one(device: &LinuxDevice, rules: &[LinuxDeviceCgroup]) -> io::Result<BlockDevice> {
    let access = device_rules::access(rules, device);
    if !access.contains(['r', 'w']) {
        let text = "no device rule of the spec lets the container read or write it";
        return Err(io::Error::other(text));
    }
    let read_only = !access.contains('w');
    let path = host_node(device.major(), device.minor())?;
    let mut file = open_uncached(&path, read_only)?;
    let metadata = file.metadata()?;
    let rdev = metadata.rdev();
    let numbers = (i64::from(libc::major(rdev)), i64::from(libc::minor(rdev)));
    if !metadata.file_type().is_block_device() || numbers != (device.major(), device.minor()) {
        let text = format!("{} is another device", path.display());
        return Err(io::Error::other(text));
    }
    let size_bytes = file.seek(SeekFrom::End(0))?;
    check_size(size_bytes).map_err(|why| io::Error::other(format!("{}: {why}", path.display())))?;
    Ok(BlockDevice {
        sector_bytes: sector_bytes(&file)?,
        backing: HostBacking::Whole(file),
        size_bytes,
        read_only,
        path: device.path().clone(),
        access,
        mode: device.file_mode().unwrap_or(DEFAULT_MODE) & 0o7777,
        uid: device.uid().unwrap_or(0),
        gid: device.gid().unwrap_or(0),
    })
}

/// Whether something of this size can be a disk.
///
/// # Errors
///
/// Why not.
pub fn check_size(bytes: u64) -> Result<(), String> {
    if bytes > 0 && bytes.is_multiple_of(SECTOR_BYTES) {
        return Ok(());
    }
    Err(format!(
        "it has {bytes} bytes, not a positive multiple of {SECTOR_BYTES}"
    ))
}

/// Size of the logical sectors of a disk on this file.
pub(super) fn sector_bytes(file: &File) -> io::Result<u32> {
    if file.metadata()?.file_type().is_block_device() {
        return Ok(ioctl_blksszget(file)?);
    }
    Ok(USUAL_SECTOR_BYTES)
}

/// Opens a device for I/O past the host's page cache, which would not know what another
/// host writes to a disk that both have.
fn open_uncached(path: &Path, read_only: bool) -> io::Result<File> {
    let mut options = File::options();
    options
        .read(true)
        .write(!read_only)
        .custom_flags(libc::O_DIRECT);
    options.open(path)
}

/// Where the host has a block device: a spec tells its numbers only.
fn host_node(major: i64, minor: i64) -> io::Result<PathBuf> {
    let uevent = format!("/sys/dev/block/{major}:{minor}/uevent");
    sysfs::node_in(Path::new(&uevent))
}

/// A block device of this machine, by its numbers; none, with the reason on stderr,
/// where none can be opened.
#[cfg(test)]
pub(crate) fn some_disk() -> Option<(i64, i64)> {
    let found = std::fs::read_dir("/sys/dev/block").ok()?.find_map(|entry| {
        let name = entry.ok()?.file_name().into_string().ok()?;
        let (major, minor) = name.split_once(':')?;
        let numbers = (major.parse().ok()?, minor.parse().ok()?);
        let file = File::open(host_node(numbers.0, numbers.1).ok()?);
        (file.ok()?.seek(SeekFrom::End(0)).ok()? > 0).then_some(numbers)
    });
    if found.is_none() {
        eprintln!("skipped: no block device that can be opened");
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    use serde_json::{Value, json};

    use crate::devices::testing::Tree;

    /// On this machine.
    fn open(spec: &Spec, container_id: &str) -> Result<Vec<BlockDevice>, StorageError> {
        super::open(&System::default(), spec, container_id)
    }

    fn spec(devices: &Value, rules: &Value) -> Spec {
        serde_json::from_value(json!({
            "ociVersion": "1.1.0",
            "linux": {"devices": devices, "resources": {"devices": rules}},
        }))
        .unwrap()
    }

    #[test]
    fn a_block_device_is_opened_as_its_rule_says() {
        let Some((major, minor)) = some_disk() else {
            return;
        };
        let node = json!([{"path": "/dev/xvda", "type": "b", "major": major, "minor": minor,
                           "fileMode": 0o640, "uid": 5, "gid": 6}]);
        let rule = json!([{"allow": false, "access": "rwm"},
            {"allow": true, "type": "b", "major": major, "minor": minor, "access": "mr"}]);
        let devices = open(&spec(&node, &rule), "c1").unwrap();
        let [device] = devices.as_slice() else {
            panic!("{devices:?}");
        };
        assert!(device.read_only && device.size_bytes > 0);
        assert_eq!((device.access.as_str(), device.mode), ("rm", 0o640));
        assert_eq!((device.uid, device.gid), (5, 6));
        assert_eq!(device.path, Path::new("/dev/xvda"));
        // Looked at, not tried: it is a disk of this machine.
        let HostBacking::Whole(file) = &device.backing else {
            panic!("{device:?}");
        };
        let flags = fcntl(file, FcntlArg::F_GETFL).unwrap();
        let access = OFlag::from_bits_retain(flags) & OFlag::O_ACCMODE;
        assert_eq!(access, OFlag::O_RDONLY);
        let of = |place: &str| {
            let file = format!("/sys/dev/block/{major}:{minor}/{place}logical_block_size");
            std::fs::read_to_string(file).ok()
        };
        // A partition has its disk's.
        let sysfs = of("queue/").or_else(|| of("../queue/")).unwrap();
        assert_eq!(device.sector_bytes.to_string(), sysfs.trim());

        let everything = json!([{"allow": true, "access": "rwm"}]);
        let privileged = open(&spec(&node, &everything), "c1").unwrap();
        assert!(privileged.is_empty(), "listed unasked");
    }

    #[test]
    fn nothing_is_between_a_container_and_its_device() {
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let mut probe = File::options();
        let probe = probe.read(true).custom_flags(libc::O_DIRECT);
        if let Err(error) = probe.open(file.path()) {
            eprintln!("skipped: no O_DIRECT here: {error}");
            return;
        }
        let opened = open_uncached(file.path(), true).unwrap();
        let flags = OFlag::from_bits_retain(fcntl(&opened, FcntlArg::F_GETFL).unwrap());
        assert!(flags.contains(OFlag::O_DIRECT), "{flags:?}");
    }

    #[test]
    fn a_disk_has_whole_sectors() {
        for good in [512, 4096] {
            check_size(good).unwrap();
        }
        for bad in [0, 511, 513] {
            let why = check_size(bad).unwrap_err();
            assert!(why.contains(&format!("{bad} bytes")), "{why}");
        }
    }

    #[test]
    fn a_block_device_that_no_rule_allows_is_refused() {
        let node = json!([{"path": "/dev/xvda", "type": "b", "major": 4000, "minor": 1}]);
        let refusal = |rules: Value| {
            let error = open(&spec(&node, &rules), "c1").unwrap_err();
            crate::error::chain(&error)
        };
        for rules in [
            json!([{"allow": false, "access": "rwm"}]),
            json!([{"allow": true, "type": "b", "major": 4000, "minor": 1, "access": ""}]),
            json!([{"allow": true, "type": "b", "access": "m"}]),
        ] {
            let text = refusal(rules);
            let parts = ["container c1", "/dev/xvda", "4000:1", "no device rule"];
            assert!(parts.iter().all(|part| text.contains(part)), "{text}");
        }
        let minors = json!([{"allow": true, "type": "b", "major": 4000, "access": "r"}]);
        let text = refusal(minors);
        assert!(text.contains("No such file"), "it is allowed: {text}");
    }

    #[test]
    fn other_devices_of_the_host_are_refused_in_a_sentence() {
        let kvm = json!([{"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}]);
        let error = open(&spec(&kvm, &json!([])), "c1").unwrap_err().to_string();
        assert!(
            error.contains("/dev/kvm") && error.contains("container c1"),
            "{error}"
        );
        let gone = json!([{"path": "/dev/x", "type": "b", "major": 4000, "minor": 1}]);
        let error = open(&spec(&gone, &json!([])), "c1").unwrap_err();
        assert!(error.to_string().contains("4000:1"), "{error}");
        let own = json!([
            {"path": "/dev/void", "type": "c", "major": 1, "minor": 3},
            {"path": "/dev/vfio/7", "type": "c", "major": 240, "minor": 1},
            {"path": "/dev/initctl", "type": "p", "major": 0, "minor": 0},
        ]);
        assert!(open(&spec(&own, &json!([])), "c1").unwrap().is_empty());
    }

    /// CDI may have them called anything.
    #[test]
    fn nodes_of_vfio_are_known_by_their_numbers() {
        let tree = Tree::new();
        tree.add_node("240:7", "vfio/7");
        tree.add_node("10:232", "kvm");
        let open = |major, minor| {
            let node = json!([{"path": "/dev/gpu", "type": "c", "major": major, "minor": minor}]);
            super::open(&tree.system(), &spec(&node, &json!([])), "c1")
        };
        assert!(open(240, 7).unwrap().is_empty());
        for (major, minor) in [(240, 8), (10, 232)] {
            let text = open(major, minor).unwrap_err().to_string();
            assert!(text.contains("device /dev/gpu of container c1"), "{text}");
        }
    }

    #[test]
    fn the_guest_gets_no_numbers_of_the_host() {
        let devices = json!([
            {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229},
            {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0},
        ]);
        let rules = json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "b", "access": "m"},
            {"allow": true, "type": "b", "major": 8, "minor": 0, "access": "rwm"},
            {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm"},
        ]);
        let mut linux = spec(&devices, &rules).linux().clone().unwrap();
        keep_kernel_s(&mut linux);
        let linux = serde_json::to_value(linux).unwrap();
        let paths: Vec<_> = linux["devices"].as_array().unwrap().iter().collect();
        assert_eq!(paths.len(), 1);
        let rules = linux["resources"]["devices"].as_array().unwrap();
        assert_eq!(rules.len(), 3);
        assert!(rules.iter().all(|rule| rule["major"] != 8));
    }
}
