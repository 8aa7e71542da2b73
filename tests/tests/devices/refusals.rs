//! Devices in use stay where they are.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use nacre_tests::run;

use crate::{
    Bound, EDU, NIC, NVME_PORT, SWITCH_PORT, VGA, behind, devices, disk, driver, group, sysfs,
};

const PLACE: &str = "/mnt/devices";

/// What `bind` must refuse, and in which words.
#[track_caller]
fn refused(address: &str, parts: &[&str]) {
    let before = driver(address);
    devices(&["bind", address]).exits(1).complains(parts);
    assert_eq!(driver(address), before);
    let reserved = fs::read_to_string(sysfs(address).join("driver_override")).unwrap();
    assert_eq!(reserved, "(null)\n");
}

#[test]
fn a_mounted_disk() {
    let nvme = behind(NVME_PORT);
    let disk = disk(&nvme);
    run("mke2fs", &["-q", "-F", &disk]).exits(0);
    fs::create_dir_all(PLACE).unwrap();
    run("mount", &[&disk, PLACE]).exits(0);
    refused(&nvme, &[&nvme, &disk, "mounted at", PLACE]);
    // With another one that could be moved: neither is.
    devices(&["bind", EDU, &nvme]).exits(1);
    assert_eq!(driver(EDU), None);
    run("umount", &[PLACE]).exits(0);
    let _bound = Bound::new(&[&nvme]);
}

#[test]
fn a_disk_that_only_another_mount_namespace_has() {
    let nvme = behind(NVME_PORT);
    let disk = disk(&nvme);
    run("mke2fs", &["-q", "-F", &disk]).exits(0);
    fs::create_dir_all(PLACE).unwrap();
    let script = format!("mount {disk} {PLACE} && echo mounted && read line");
    let mut holder = Command::new("unshare")
        .args(["-m", "sh", "-c", &script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut said = BufReader::new(holder.stdout.take().unwrap());
    said.read_line(&mut line).unwrap();
    assert_eq!(line, "mounted\n");
    refused(&nvme, &["something holds", &disk]);
    drop(holder.stdin.take());
    holder.wait().unwrap();
    let _bound = Bound::new(&[&nvme]);
}

#[test]
fn swap_space() {
    let nvme = behind(SWITCH_PORT);
    let disk = disk(&nvme);
    run("mkswap", &[&disk]).exits(0);
    run("swapon", &[&disk]).exits(0);
    refused(&nvme, &["is swap space", &disk]);
    run("swapoff", &[&disk]).exits(0);
    let _bound = Bound::new(&[&nvme]);
}

#[test]
fn a_disk_that_a_process_reads() {
    let nvme = behind(NVME_PORT);
    let disk = disk(&nvme);
    let open = File::open(&disk).unwrap();
    let process = format!("process {}", std::process::id());
    refused(&nvme, &[&process, &disk]);
    drop(open);
    let _bound = Bound::new(&[&nvme]);
}

#[test]
fn a_network_interface_that_is_up() {
    let find = || -> Option<String> {
        let virtio = fs::read_dir(sysfs(NIC)).ok()?.flatten();
        let mut nets = virtio.filter_map(|entry| fs::read_dir(entry.path().join("net")).ok());
        let interface = nets.next()?.next()?.ok()?;
        interface.file_name().into_string().ok()
    };
    let interface = find().unwrap();
    run("ip", &["link", "set", &interface, "up"]).exits(0);
    refused(NIC, &[&interface, "is up"]);
    run("ip", &["link", "set", &interface, "down"]).exits(0);
    run("ip", &["link", "add", "br-devices", "type", "bridge"]).exits(0);
    run("ip", &["link", "set", &interface, "master", "br-devices"]).exits(0);
    refused(NIC, &[&interface, "is a port of br-devices"]);
    run("ip", &["link", "del", "br-devices"]).exits(0);
    run("ip", &["netns", "add", "devices"]).exits(0);
    run("ip", &["link", "set", &interface, "netns", "devices"]).exits(0);
    refused(NIC, &["another network namespace"]);
    // A physical interface comes back when its namespace ends.
    run("ip", &["netns", "del", "devices"]).exits(0);
    nacre_tests::eventually("the interface is back", || find().is_some());
    drop(Bound::new(&[NIC]));
    nacre_tests::eventually("the driver made it again", || find().is_some());
}

#[test]
fn the_console() {
    refused(VGA, &[VGA, "console"]);
}

#[test]
fn what_is_no_device_to_pass() {
    refused(NVME_PORT, &["is a bridge"]);
    devices(&["bind", "0000:7f:00.0"])
        .exits(1)
        .complains(&["no PCI device 0000:7f:00.0"]);
    devices(&["bind", "nvme0"])
        .exits(2)
        .complains(&["not a PCI address"]);
}

/// The kernel would wait for whoever has it open, and `unbind` with it.
#[test]
fn a_device_that_a_process_has_from_vfio() {
    let nvme = behind(NVME_PORT);
    let _bound = Bound::new(&[&nvme]);
    let node = format!("/dev/vfio/{}", group(&nvme));
    let open = File::options().read(true).write(true).open(&node).unwrap();
    let process = format!("process {}", std::process::id());
    devices(&["unbind", &nvme])
        .exits(1)
        .complains(&[&process, &node]);
    assert_eq!(driver(&nvme).as_deref(), Some("vfio-pci"));
    drop(open);
}
