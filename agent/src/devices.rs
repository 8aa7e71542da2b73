//! Devices of the host that a container gets: block devices, which are disks of the
//! machine, and PCI devices with what their drivers made of them ([`crate::pci`]). Either
//! are nodes with this kernel's numbers, which the container's first process makes as it
//! makes all others (`engine/devices.rs`), and rules that allow them.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nacre_protocol::agent::BlockDevice;
use oci_spec::runtime::{
    Linux, LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder,
    LinuxDeviceType, Spec,
};

use crate::error::{Context, Error, Result};
use crate::{disk, pci};

/// Waits for the disks and adds nodes and rules to the specification.
///
/// # Errors
///
/// `InvalidArgument` for a device that is described wrongly, `NotFound` for a disk
/// that does not come, else `Io`.
pub async fn add(spec: &mut Spec, devices: &[BlockDevice]) -> Result<()> {
    for device in devices {
        let disk = disk::wait_for(&device.serial, device.size_bytes, device.sector_bytes).await?;
        let node = fs::metadata(&disk).with_context(|| format!("look at {}", disk.display()))?;
        if !node.file_type().is_block_device() {
            return Err(Error::Internal(format!("{} is no disk", disk.display())));
        }
        let listed = node_of(device, node.rdev())?;
        add_rule(spec, &listed, &device.access)?;
        add_node(spec, listed);
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
}
