//! Who on the host uses a device, so that nobody takes it away from them.
//!
//! What the kernel made of a function (disks, network interfaces, character
//! devices) is below its directory in sysfs, each with a `subsystem` link:
//!
//! ```text
//! 0000:01:00.0/nvme/nvme0/nvme0n1/nvme0n1p1   block: mounted? swap? under md or dm? opened exclusively?
//! 0000:02:00.0/virtio1/net/eth0               net: up? in a bridge or bond? in another namespace?
//! 0000:03:00.0/drm/card1                      any with a number: opened by a process?
//! 0000:04:00.0/vfio-dev/vfio0                 that too; and its group's /dev/vfio/N
//! 0000:05:00.0/83b8f4f2-...                   mdev: a part of it that a pod may have
//! ```

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

use super::sysfs::{link_name, names_in, number, text};
use super::{DeviceError, Function, System};
use crate::rundir::unescape;

/// netdevice(7)
const IFF_UP: u32 = 0x1;
/// Documentation/admin-guide/devices.txt
const NVIDIA_MAJOR: u32 = 195;
/// How far below a function's directory things are looked for; a disk behind a SCSI
/// controller is seven down.
const MAX_DEPTH: usize = 12;

/// Something the kernel made of a function.
struct Node {
    dir: PathBuf,
    subsystem: String,
    name: String,
    /// "MAJOR:MINOR", if it can be opened.
    number: Option<String>,
}

/// What uses a function, and how to end that; nothing: it may be taken away.
///
/// # Errors
///
/// When that cannot be told.
pub(super) fn user_of(system: &System, function: &Function) -> Result<Option<String>, DeviceError> {
    if function.boot_vga {
        return Ok(Some("it is the host's console (boot_vga)".into()));
    }
    if !function.virtual_functions.is_empty() {
        let count = function.virtual_functions.len();
        let advice = "write 0 to its sriov_numvfs in sysfs first";
        return Ok(Some(format!("it has {count} virtual functions; {advice}")));
    }
    let dir = system.device_dir(function.address);
    let mut nodes = Vec::new();
    collect(&dir, MAX_DEPTH, &mut nodes)?;
    collect_multipath(system, &mut nodes)?;
    for node in &nodes {
        let user = match node.subsystem.as_str() {
            "block" => user_of_disk(system, node)?,
            "net" => user_of_interface(node)?,
            "mdev" => Some(format!(
                "it has mediated device {name}; write 1 to its file \"remove\" in sysfs first",
                name = node.name
            )),
            _ => None,
        };
        if user.is_some() {
            return Ok(user);
        }
    }
    if let Some(process) = opener(system, function, &nodes)? {
        return Ok(Some(process));
    }
    if has_interface_elsewhere(&dir, MAX_DEPTH)? {
        let user = "its network interface is in another network namespace, a container's perhaps";
        return Ok(Some(user.into()));
    }
    Ok(nodes.iter().find_map(|node| held_exclusively(system, node)))
}

/// The process that has a function open: the kernel waits for its end where a driver
/// is to let a device go.
///
/// # Errors
///
/// When that cannot be told.
pub(super) fn opened_by(
    system: &System,
    function: &Function,
) -> Result<Option<String>, DeviceError> {
    let mut nodes = Vec::new();
    collect(&system.device_dir(function.address), MAX_DEPTH, &mut nodes)?;
    opener(system, function, &nodes)
}

/// Directories in a directory of sysfs, links left out.
fn directories_in(dir: &Path) -> Result<Vec<PathBuf>, DeviceError> {
    let paths = names_in(dir)?.into_iter().map(|name| dir.join(name));
    let is_directory = |path: &PathBuf| fs::symlink_metadata(path).is_ok_and(|data| data.is_dir());
    Ok(paths.filter(is_directory).collect())
}

/// Finds the nodes below a directory.
fn collect(dir: &Path, depth: usize, nodes: &mut Vec<Node>) -> Result<(), DeviceError> {
    if depth == 0 {
        return Ok(());
    }
    for below in directories_in(dir)? {
        match link_name(&below.join("subsystem"))? {
            // Another function, behind this one.
            Some(subsystem) if subsystem == "pci" => continue,
            Some(subsystem) => nodes.push(Node {
                name: file_name(&below),
                number: text(&below.join("dev"))?,
                dir: below.clone(),
                subsystem,
            }),
            None => (),
        }
        collect(&below, depth - 1, nodes)?;
    }
    Ok(())
}

/// A disk that NVMe controllers share is with none of them in sysfs: it is below the
/// subsystem, which has a link to each controller.
fn collect_multipath(system: &System, nodes: &mut Vec<Node>) -> Result<(), DeviceError> {
    let controllers: BTreeSet<String> = nodes
        .iter()
        .filter(|node| node.subsystem == "nvme")
        .map(|node| node.name.clone())
        .collect();
    let subsystems = system.sys.join("class/nvme-subsystem");
    for name in names_in(&subsystems)? {
        let dir = subsystems.join(name);
        let ours = names_in(&dir)?;
        if ours.iter().any(|name| controllers.contains(name)) {
            collect(&dir, MAX_DEPTH, nodes)?;
        }
    }
    Ok(())
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// A node's name below `/dev`: sysfs has `!` for a slash.
fn device_name(node: &Node) -> String {
    node.name.replace('!', "/")
}

fn user_of_disk(system: &System, node: &Node) -> Result<Option<String>, DeviceError> {
    let device = format!("/dev/{}", device_name(node));
    let mounts = text(&system.proc.join("self/mountinfo"))?.unwrap_or_default();
    if let Some(point) = mounts
        .lines()
        .find_map(|line| mount_point(line, node, &device))
    {
        return Ok(Some(format!(
            "{device} is mounted at {point}; unmount it first"
        )));
    }
    let swaps = text(&system.proc.join("swaps"))?.unwrap_or_default();
    let mut areas = swaps
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    if areas.any(|area| unescape(area) == device) {
        return Ok(Some(format!(
            "{device} is swap space; swapoff {device} first"
        )));
    }
    let holders = names_in(&node.dir.join("holders"))?;
    let Some(holder) = holders.first() else {
        return Ok(None);
    };
    // device-mapper and md have names that people know.
    let known = text(&node.dir.join("holders").join(holder).join("dm/name"))?;
    let known = known.map_or_else(String::new, |known| format!(" ({known})"));
    Ok(Some(format!("{device} is part of {holder}{known}")))
}

/// Where a line of mountinfo (proc(5)) has this disk mounted. Btrfs has numbers of its
/// own, and only the source is the disk's.
fn mount_point(line: &str, node: &Node, device: &str) -> Option<String> {
    let (mount, file_system) = line.split_once(" - ")?;
    let mut fields = mount.split(' ').skip(2);
    let (number, point) = (fields.next()?, fields.nth(1)?);
    let source = file_system.split(' ').nth(1)?;
    let is_this = node.number.as_deref() == Some(number) || unescape(source) == device;
    is_this.then(|| unescape(point))
}

fn user_of_interface(node: &Node) -> Result<Option<String>, DeviceError> {
    let name = &node.name;
    if let Some(master) = link_name(&node.dir.join("master"))? {
        return Ok(Some(format!(
            "network interface {name} is a port of {master}"
        )));
    }
    let entries = names_in(&node.dir)?;
    if let Some(upper) = entries
        .iter()
        .find_map(|entry| entry.strip_prefix("upper_"))
    {
        return Ok(Some(format!("network interface {name} carries {upper}")));
    }
    let flags = number(&node.dir.join("flags"))?.unwrap_or_default();
    let is_up = flags & IFF_UP != 0;
    Ok(is_up.then(|| format!("network interface {name} is up; ip link set {name} down first")))
}

/// Whether a function has a place for network interfaces and none in it that this
/// network namespace can see.
fn has_interface_elsewhere(dir: &Path, depth: usize) -> Result<bool, DeviceError> {
    if depth == 0 {
        return Ok(false);
    }
    for below in directories_in(dir)? {
        let is_place = file_name(&below) == "net" && link_name(&below.join("subsystem"))?.is_none();
        if is_place && directories_in(&below)?.is_empty() {
            return Ok(true);
        }
        if link_name(&below.join("subsystem"))?.as_deref() != Some("pci")
            && has_interface_elsewhere(&below, depth - 1)?
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A process that has a node of the function, or its group's, open.
fn opener(
    system: &System,
    function: &Function,
    nodes: &[Node],
) -> Result<Option<String>, DeviceError> {
    let mut numbers: BTreeSet<String> = nodes
        .iter()
        .filter_map(|node| node.number.clone())
        .collect();
    if let Some(group) = function.group {
        let class = system.sys.join("class/vfio");
        numbers.extend(text(&class.join(group.to_string()).join("dev"))?);
    }
    numbers.extend(nvidia_node(system, function)?);
    if numbers.is_empty() {
        return Ok(None);
    }
    for pid in names_in(&system.proc)? {
        if !pid.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let process = system.proc.join(&pid);
        // It may end meanwhile, and then it has nothing open.
        let Ok(descriptors) = fs::read_dir(process.join("fd")) else {
            continue;
        };
        let mut paths = descriptors.filter_map(Result::ok).map(|entry| entry.path());
        if let Some(node) = paths.find_map(|path| open_node(&path, &numbers)) {
            let name = text(&process.join("comm")).ok().flatten();
            let name = name.unwrap_or_else(|| "?".into());
            let user = format!("process {pid} ({name}) has {} open", node.display());
            return Ok(Some(user));
        }
    }
    Ok(None)
}

/// The number of `/dev/nvidiaN`, of which sysfs knows nothing; its driver does, in a
/// line "Device Minor:".
fn nvidia_node(system: &System, function: &Function) -> Result<Option<String>, DeviceError> {
    let gpus = system.proc.join("driver/nvidia/gpus");
    let about = text(&gpus.join(function.address.to_string()).join("information"))?;
    let lines = about.iter().flat_map(|about| about.lines());
    let mut minors = lines.filter_map(|line| line.strip_prefix("Device Minor:"));
    let minor = minors.next().map(str::trim);
    Ok(minor.map(|minor| format!("{NVIDIA_MAJOR}:{minor}")))
}

/// The device a descriptor is of, if it has one of these numbers. Only what is below
/// /dev is looked at: a file of a dead file server would hold us up.
fn open_node(descriptor: &Path, numbers: &BTreeSet<String>) -> Option<PathBuf> {
    let target = fs::read_link(descriptor).ok()?;
    if !target.starts_with("/dev") {
        return None;
    }
    let data = fs::metadata(descriptor).ok()?;
    let kind = data.file_type();
    let number = format!("{}:{}", major(data.rdev()), minor(data.rdev()));
    let is_device = kind.is_char_device() || kind.is_block_device();
    (is_device && numbers.contains(&number)).then_some(target)
}

/// What the other checks do not see, such as a mount in another mount namespace:
/// whoever holds a disk for itself keeps others from that (open(2), O_EXCL).
fn held_exclusively(system: &System, node: &Node) -> Option<String> {
    if node.subsystem != "block" {
        return None;
    }
    let path = system.dev.join(device_name(node));
    let opened = File::options()
        .read(true)
        .custom_flags(libc::O_EXCL | libc::O_NONBLOCK)
        .open(&path);
    // Other failures are those of a disk that does not work, or has no node.
    let is_busy = opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY));
    is_busy.then(|| {
        let name = device_name(node);
        format!("something holds /dev/{name}, such as a mount in another namespace")
    })
}

#[cfg(test)]
mod tests;
