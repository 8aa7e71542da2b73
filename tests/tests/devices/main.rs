//! The host's PCI devices: `nacre devices`, and containers that ask for one. They need
//! the lab's (`lab run --devices`, which has an IOMMU and these):
//!
//! ```text
//! 00:10.0 root port -> nvme                        a group of its own
//! 00:11.0 root port -> switch -> nvme              a group with the switch's ports
//! 00:12.0 nvme, 00:12.1 nvme                       one group
//! 00:13.0 edu     00:14.0 pci-testdev, 4 GiB       no driver
//! 00:15.0 virtio-net     00:16.0 VGA     00:17.0 ivshmem, 128 GiB of memory
//! 00:18.0 root port -> two functions, xhci         one group; reset together only
//! 00:19.0 root port -> nvme with virtual functions
//! ```
//!
//! One test makes another one, which is on no bus: `mediated.rs`.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

mod ask;
mod drivers;
mod handover;
mod mediated;
mod pass;
mod plug;
mod pods;
mod refusals;
mod table;
mod virtual_functions;

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use nacre_tests::{Said, eventually, run};
use serde_json::json;

const SWITCH_PORT: &str = "0000:00:11.0";
const NVME_PORT: &str = "0000:00:10.0";
const CARD_PORT: &str = "0000:00:18.0";
const SHARED_PORT: &str = "0000:00:19.0";
const PAIR: [&str; 2] = ["0000:00:12.0", "0000:00:12.1"];
const EDU: &str = "0000:00:13.0";
const TESTDEV: &str = "0000:00:14.0";
const NIC: &str = "0000:00:15.0";
const VGA: &str = "0000:00:16.0";

/// The annotation that asks for devices.
const DEVICES: &str = "io.nacre.devices";
/// What a guest calls its first disk.
const DISK: &str = "/dev/nvme0n1";
const SLEEP: [&str; 2] = ["sleep", "3600"];

/// `nacre devices` with arguments.
fn devices(arguments: &[&str]) -> Said {
    run("nacre", &[&["devices"][..], arguments].concat())
}

fn sysfs(address: &str) -> PathBuf {
    Path::new("/sys/bus/pci/devices").join(address)
}

/// What a function's link points at.
fn link(address: &str, name: &str) -> Option<String> {
    let target = fs::read_link(sysfs(address).join(name)).ok()?;
    Some(target.file_name()?.to_str()?.to_owned())
}

fn driver(address: &str) -> Option<String> {
    link(address, "driver")
}

fn group(address: &str) -> String {
    link(address, "iommu_group").unwrap()
}

/// The device behind a port, and be it behind a switch.
fn behind(port: &str) -> String {
    let is_function = |name: &str| name.len() == port.len() && name.starts_with("0000:");
    let mut at = fs::canonicalize(sysfs(port)).unwrap();
    loop {
        let names = fs::read_dir(&at).unwrap();
        let mut names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        match names.find(|name| is_function(name)) {
            Some(name) => at.push(name),
            None => return at.file_name().unwrap().to_str().unwrap().to_owned(),
        }
    }
}

/// The disk of an NVMe controller, once it is there.
fn disk(address: &str) -> String {
    let mut found = None;
    eventually(&format!("{address} has a disk"), || {
        let controllers = fs::read_dir(sysfs(address).join("nvme")).ok();
        let names = controllers
            .into_iter()
            .flatten()
            .map(|entry| entry.unwrap().file_name());
        let mut disks = names.map(|name| format!("/dev/{}n1", name.to_str().unwrap()));
        found = disks.find(|disk| Path::new(disk).exists());
        found.is_some()
    });
    found.unwrap()
}

/// What it begins with, up to the first byte that is not printed.
fn begins(disk: &str) -> String {
    let mut block = [0; 512];
    File::open(disk).unwrap().read_exact(&mut block).unwrap();
    let printed = block.iter().take_while(|byte| !byte.is_ascii_control());
    printed.map(|byte| char::from(*byte)).collect()
}

/// Waits until no pod has a device: the shim of one that is gone may be ending still.
fn no_claims() {
    eventually("no device is a pod's", || {
        let claims = fs::read_dir("/run/nacre/.devices").into_iter().flatten();
        claims.count() == 0
    });
}

/// A CDI spec of one device, until this is dropped.
struct CdiSpec(PathBuf);

impl CdiSpec {
    /// In one of CDI's directories: `KIND=NAME` is a VFIO device with this node, which containers
    /// are to have by another name.
    fn new(dir: &str, kind: &str, name: &str, node: &str) -> Self {
        let renamed = json!({"path": "/dev/vfio/given", "hostPath": node});
        let edits = json!({"deviceNodes": [{"path": "/dev/vfio/vfio"}, renamed]});
        let spec = json!({
            "cdiVersion": "0.6.0",
            "kind": kind,
            "devices": [{"name": name, "containerEdits": edits}],
        });
        fs::create_dir_all(dir).unwrap();
        let file = Path::new(dir).join("nacre-test.json");
        fs::write(&file, spec.to_string()).unwrap();
        Self(file)
    }
}

impl Drop for CdiSpec {
    fn drop(&mut self) {
        fs::remove_file(&self.0).unwrap();
    }
}

/// Devices with vfio-pci until this is dropped.
struct Bound<'a>(Vec<&'a str>);

impl<'a> Bound<'a> {
    fn new(addresses: &[&'a str]) -> Self {
        let said = devices(&[&["bind"][..], addresses].concat()).exits(0);
        assert!(!said.stdout.contains("not ready"), "{said:#?}");
        Self(addresses.to_vec())
    }
}

impl Drop for Bound<'_> {
    fn drop(&mut self) {
        let said = devices(&[&["unbind"][..], &self.0].concat());
        if !std::thread::panicking() {
            said.exits(0);
        }
    }
}

#[test]
fn a_disk_goes_to_vfio_and_comes_back() {
    let nvme = behind(NVME_PORT);
    let before = disk(&nvme);
    let node = format!("/dev/vfio/{}", group(&nvme));
    devices(&["bind", &nvme])
        .exits(0)
        .prints(&format!("{nvme}: nvme -> vfio-pci\n"));
    assert_eq!(driver(&nvme).as_deref(), Some("vfio-pci"));
    assert!(Path::new(&node).exists() && !Path::new(&before).exists());
    devices(&["bind", &nvme])
        .exits(0)
        .prints(&format!("{nvme}: vfio-pci, as before\n"));

    devices(&["unbind", &nvme])
        .exits(0)
        .prints(&format!("{nvme}: vfio-pci -> nvme\n"));
    let path = disk(&nvme);
    assert!(!Path::new(&node).exists());
    // It works, not only exists.
    run("mke2fs", &["-q", "-F", &path]).exits(0);
    devices(&["unbind", &nvme])
        .exits(0)
        .prints(&format!("{nvme}: nvme, as before\n"));
}

#[test]
fn devices_that_nobody_drives() {
    for address in [EDU, TESTDEV] {
        assert_eq!(driver(address), None);
        devices(&["bind", address])
            .exits(0)
            .prints(&format!("{address}: no driver -> vfio-pci\n"));
        devices(&["unbind", address])
            .exits(0)
            .prints(&format!("{address}: vfio-pci -> no driver\n"));
        assert_eq!(driver(address), None);
    }
}

/// Of the ports in its group nothing has to be moved.
#[test]
fn a_device_behind_a_switch_is_ready_by_itself() {
    let nvme = behind(SWITCH_PORT);
    let members = fs::read_dir(format!("/sys/kernel/iommu_groups/{}/devices", group(&nvme)));
    assert!(
        members.unwrap().count() > 1,
        "the switch keeps its devices apart here"
    );
    let _bound = Bound::new(&[&nvme]);
}

#[test]
fn one_function_of_two_is_not_ready() {
    let [first, second] = PAIR;
    let said = devices(&["bind", first]).exits(0);
    for part in ["not ready yet", &format!("{second} (nvme)")] {
        assert!(said.stdout.contains(part), "{said:#?}");
    }
    devices(&["unbind", first]).exits(0);
    let _bound = Bound::new(&PAIR);
}
