//! Devices of the host that a container gets: block devices, which are disks of the
//! machine, and PCI devices with what their drivers made of them ([`crate::pci`]). Either
//! are nodes with this kernel's numbers, and rules that allow them.
//!
//! Below /dev, which is the container's own, the node is made by the container's
//! first process as all others are. Elsewhere it would lie on the container's root
//! file system, which may be a share of the host that takes no nodes; there it is
//! made in the container's directory and bound to its place.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use nacre_protocol::agent::BlockDevice;
use nix::sys::stat::{Mode, SFlag, mknod};
use oci_spec::runtime::{
    Linux, LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder,
    LinuxDeviceType, Mount, Spec,
};

use crate::error::{Context, Error, Result};
use crate::{disk, pci};

/// Below the container's directory.
const DIRECTORY: &str = "devices";

/// Waits for the disks and adds nodes and rules to the specification.
///
/// # Errors
///
/// `InvalidArgument` for a device that is described wrongly, `NotFound` for a disk
/// that does not come, else `Io`.
pub async fn add(spec: &mut Spec, dir: &Path, devices: &[BlockDevice]) -> Result<()> {
    for (index, device) in devices.iter().enumerate() {
        let disk = disk::wait_for_size(&device.serial, device.size_bytes).await?;
        let node = fs::metadata(&disk).with_context(|| format!("look at {}", disk.display()))?;
        if !node.file_type().is_block_device() {
            return Err(Error::Internal(format!("{} is no disk", disk.display())));
        }
        let number = node.rdev();
        let listed = node_of(device, number)?;
        add_rule(spec, &listed, &device.access)?;
        if Path::new(&device.path).starts_with("/dev") {
            add_node(spec, listed);
        } else {
            let node = dir.join(DIRECTORY).join(index.to_string());
            make_node(&node, device, number).with_context(|| format!("make {}", device.path))?;
            add_mount(spec, device, node);
        }
    }
    Ok(())
}

/// Adds nodes and rules of PCI devices to the specification, once they are there.
///
/// # Errors
///
/// `InvalidArgument` for a node that the specification has already, those of
/// [`pci::nodes`].
pub async fn add_pci(spec: &mut Spec, addresses: &[String]) -> Result<()> {
    for address in addresses {
        add_nodes(spec, address, pci::nodes(address).await?)?;
    }
    Ok(())
}

fn add_nodes(spec: &mut Spec, address: &str, nodes: Vec<LinuxDevice>) -> Result<()> {
    for node in nodes {
        if listed(spec, node.path()).is_some() {
            let path = node.path().display();
            let text = format!("{path} is a node of PCI device {address} and of another device");
            return Err(Error::InvalidArgument(text));
        }
        add_rule(spec, &node, "rwm")?;
        add_node(spec, node);
    }
    Ok(())
}

/// The node that the specification has at a path.
pub(crate) fn listed(spec: &Spec, path: &Path) -> Option<LinuxDevice> {
    let mut nodes = linux(spec).devices().clone().into_iter().flatten();
    nodes.find(|node| node.path() == path)
}

fn linux(spec: &Spec) -> Linux {
    spec.linux().clone().unwrap_or_default()
}

fn numbers(number: u64) -> (i64, i64) {
    (
        i64::from(libc::major(number)),
        i64::from(libc::minor(number)),
    )
}

fn invalid(error: &dyn std::fmt::Display) -> Error {
    Error::InvalidArgument(format!("device: {error}"))
}

fn rule_of(node: &LinuxDevice, access: &str) -> Result<LinuxDeviceCgroup> {
    LinuxDeviceCgroupBuilder::default()
        .allow(true)
        .typ(node.typ())
        .major(node.major())
        .minor(node.minor())
        .access(access.to_owned())
        .build()
        .map_err(|error| invalid(&error))
}

/// Rules of the specification are followed from the last one back.
pub(crate) fn add_rule(spec: &mut Spec, node: &LinuxDevice, access: &str) -> Result<()> {
    let mut linux = linux(spec);
    let mut resources = linux.resources().clone().unwrap_or_default();
    let mut rules = resources.devices().clone().unwrap_or_default();
    rules.push(rule_of(node, access)?);
    resources.set_devices(Some(rules));
    linux.set_resources(Some(resources));
    spec.set_linux(Some(linux));
    Ok(())
}

fn node_of(device: &BlockDevice, number: u64) -> Result<LinuxDevice> {
    let (major, minor) = numbers(number);
    LinuxDeviceBuilder::default()
        .path(&device.path)
        .typ(LinuxDeviceType::B)
        .major(major)
        .minor(minor)
        .file_mode(device.mode & 0o7777)
        .uid(device.uid)
        .gid(device.gid)
        .build()
        .map_err(|error| invalid(&error))
}

pub(crate) fn add_node(spec: &mut Spec, node: LinuxDevice) {
    let mut linux = linux(spec);
    let mut devices = linux.devices().clone().unwrap_or_default();
    devices.push(node);
    linux.set_devices(Some(devices));
    spec.set_linux(Some(linux));
}

fn make_node(path: &Path, device: &BlockDevice, number: u64) -> std::io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let mode = device.mode & 0o7777;
    mknod(path, SFlag::S_IFBLK, Mode::from_bits_truncate(mode), number)?;
    chown(path, Some(device.uid), Some(device.gid))?;
    // The umask has taken some of it.
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

fn add_mount(spec: &mut Spec, device: &BlockDevice, node: PathBuf) {
    let mut mount = Mount::default();
    mount
        .set_destination(PathBuf::from(&device.path))
        .set_typ(Some("bind".into()))
        .set_source(Some(node))
        .set_options(Some(vec!["bind".into()]));
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    mounts.push(mount);
    spec.set_mounts(Some(mounts));
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn device(path: &str) -> BlockDevice {
        BlockDevice {
            path: path.into(),
            access: "rm".into(),
            mode: 0o640,
            uid: 5,
            gid: 6,
            ..BlockDevice::default()
        }
    }

    #[test]
    fn nodes_and_rules_have_this_kernel_s_numbers() {
        let mut spec: Spec = serde_json::from_value(json!({
            "ociVersion": "1.1.0",
            "linux": {"resources": {"devices": [{"allow": false, "access": "rwm"}]}},
        }))
        .unwrap();
        let number = libc::makedev(254, 16);
        let node = node_of(&device("/dev/xvda"), number).unwrap();
        add_rule(&mut spec, &node, "rm").unwrap();
        add_node(&mut spec, node);
        let spec = serde_json::to_value(&spec).unwrap();
        assert_eq!(
            spec["linux"]["resources"]["devices"][1],
            json!({"allow": true, "type": "b", "major": 254, "minor": 16, "access": "rm"})
        );
        assert_eq!(
            spec["linux"]["devices"],
            json!([{"path": "/dev/xvda", "type": "b", "major": 254, "minor": 16,
                    "fileMode": 0o640, "uid": 5, "gid": 6}])
        );
    }

    #[test]
    fn nodes_of_pci_devices_are_listed_and_allowed() {
        let mut disk = device("/dev/nvme0n1");
        disk.mode = 0o660;
        let node = node_of(&disk, libc::makedev(259, 0)).unwrap();
        let spec = json!({"ociVersion": "1.1.0", "linux": {}});
        let mut spec: Spec = serde_json::from_value(spec).unwrap();
        add_nodes(&mut spec, "0000:01:00.0", vec![node.clone()]).unwrap();
        let json = serde_json::to_value(&spec).unwrap();
        assert_eq!(json["linux"]["devices"][0]["path"], "/dev/nvme0n1");
        assert_eq!(
            json["linux"]["resources"]["devices"],
            json!([{"allow": true, "type": "b", "major": 259, "minor": 0, "access": "rwm"}])
        );
        let error = add_nodes(&mut spec, "0000:02:00.0", vec![node]).unwrap_err();
        assert!(error.full().contains("0000:02:00.0"), "{}", error.full());
    }

    #[test]
    fn a_node_elsewhere_is_made_here_and_bound() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: device nodes take root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("devices/0");
        make_node(&path, &device("/data/disk"), libc::makedev(254, 16)).unwrap();
        let made = fs::metadata(&path).unwrap();
        assert!(made.file_type().is_block_device());
        assert_eq!(made.rdev(), libc::makedev(254, 16));
        assert_eq!(made.mode() & 0o7777, 0o640);
        assert_eq!((made.uid(), made.gid()), (5, 6));

        let mut spec: Spec = serde_json::from_value(json!({"ociVersion": "1.1.0"})).unwrap();
        spec.set_mounts(None);
        add_mount(&mut spec, &device("/data/disk"), path.clone());
        let mounts = spec.mounts().as_ref().unwrap();
        assert_eq!(mounts[0].destination(), Path::new("/data/disk"));
        assert_eq!(mounts[0].source().as_ref(), Some(&path));
    }
}
