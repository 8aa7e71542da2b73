use super::*;
use crate::devices::testing::{Made, Tree, address};
use std::os::unix::fs::symlink;

fn user(tree: &Tree) -> Option<String> {
    let system = tree.system();
    let function = system.function(address("01:00.0")).unwrap();
    user_of(&system, &function).unwrap()
}

fn nvme(tree: &Tree) -> Made<'_> {
    let made = tree.add("0000:01:00.0", 0x01_0802);
    made.node("nvme/nvme0", "nvme", "511:0")
        .node("nvme/nvme0/nvme0n1", "block", "259:0")
        .node("nvme/nvme0/nvme0n1/nvme0n1p1", "block", "259:1");
    made
}

#[test]
fn a_mounted_partition_is_named_with_its_place() {
    let tree = Tree::new();
    nvme(&tree);
    assert_eq!(user(&tree), None);
    let other = "30 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n";
    let mount = "31 30 259:1 / /srv/my\\040data rw - ext4 /dev/disk/by-id/x rw\n";
    tree.write("proc/self/mountinfo", &format!("{other}{mount}"));
    let by = user(&tree).unwrap();
    assert!(
        by.contains("/dev/nvme0n1p1") && by.contains("/srv/my data"),
        "{by}"
    );
    // Btrfs shows a number that no disk has.
    let btrfs = "31 30 0:40 /@ /data rw - btrfs /dev/nvme0n1 rw\n";
    tree.write("proc/self/mountinfo", btrfs);
    let by = user(&tree).unwrap();
    assert!(by.contains("/dev/nvme0n1 is mounted at /data"), "{by}");
}

#[test]
fn swap_and_volumes_on_a_disk() {
    let tree = Tree::new();
    let disk = nvme(&tree);
    let swaps = "Filename Type Size Used Priority\n/dev/nvme0n1p1 partition 1 0 -2\n";
    tree.write("proc/swaps", swaps);
    let by = user(&tree).unwrap();
    assert!(by.contains("swapoff /dev/nvme0n1p1"), "{by}");
    tree.write("proc/swaps", "Filename Type Size Used Priority\n");
    tree.write("sys/devices/virtual/block/dm-0/dm/name", "vg-root\n");
    let holder = tree.path("sys/devices/virtual/block/dm-0");
    disk.link("nvme/nvme0/nvme0n1/holders/dm-0", holder.to_str().unwrap());
    let by = user(&tree).unwrap();
    assert!(
        by.contains("/dev/nvme0n1 is part of dm-0 (vg-root)"),
        "{by}"
    );
}

/// Two controllers, one disk.
#[test]
fn a_disk_that_controllers_share() {
    let tree = Tree::new();
    let made = tree.add("0000:01:00.0", 0x01_0802);
    made.node("nvme/nvme3", "nvme", "511:3");
    let shared = "sys/class/nvme-subsystem/nvme-subsys0";
    tree.link(&format!("{shared}/nvme3"), "elsewhere");
    tree.link(&format!("{shared}/nvme0n1/subsystem"), "/sys/class/block");
    tree.write(&format!("{shared}/nvme0n1/dev"), "259:0\n");
    assert_eq!(user(&tree), None);
    let mount = "31 30 259:0 / /data rw - xfs /dev/nvme0n1 rw\n";
    tree.write("proc/self/mountinfo", mount);
    assert!(user(&tree).unwrap().contains("/data"));
}

fn nic(tree: &Tree) -> Made<'_> {
    let made = tree.add("0000:01:00.0", 0x02_0000);
    made.node("virtio1", "virtio", "")
        .node("virtio1/net/eth1", "net", "")
        .file("virtio1/net/eth1/flags", "0x1002\n");
    made
}

#[test]
fn interfaces_that_are_up_or_part_of_something() {
    let tree = Tree::new();
    let made = nic(&tree);
    assert_eq!(user(&tree), None);
    made.file("virtio1/net/eth1/flags", "0x1003\n");
    let by = user(&tree).unwrap();
    assert!(by.contains("ip link set eth1 down"), "{by}");
    made.link("virtio1/net/eth1/upper_vlan7", "../vlan7");
    assert!(user(&tree).unwrap().contains("eth1 carries vlan7"));
    made.link("virtio1/net/eth1/master", "../../br0");
    assert!(user(&tree).unwrap().contains("eth1 is a port of br0"));
}

#[test]
fn an_interface_that_a_container_has() {
    let tree = Tree::new();
    nic(&tree);
    let net = "sys/devices/pci0000:00/0000:01:00.0/virtio1/net";
    fs::remove_dir_all(tree.path(net).join("eth1")).unwrap();
    let by = user(&tree).unwrap();
    assert!(by.contains("another network namespace"), "{by}");
}

#[test]
fn the_console_and_virtual_functions() {
    let tree = Tree::new();
    let made = tree.add("0000:01:00.0", 0x03_0000);
    made.file("boot_vga", "1\n");
    assert!(user(&tree).unwrap().contains("console"));
    made.file("boot_vga", "0\n");
    assert_eq!(user(&tree), None);
    made.link("virtfn0", "../0000:01:10.0");
    assert!(user(&tree).unwrap().contains("sriov_numvfs"));
}

/// The device is /dev/null, which has the number 1:3.
#[test]
fn a_process_with_a_node_open_is_named() {
    let tree = Tree::new();
    let made = tree.add("0000:01:00.0", 0x03_0000);
    made.node("drm/card1", "drm", "226:1");
    tree.write("proc/77/comm", "Xorg\n");
    let descriptor = |number: u32, target: &str| {
        let path = tree.path(&format!("proc/77/fd/{number}"));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(target, path).unwrap();
    };
    descriptor(0, "socket:[1]");
    descriptor(1, "/dev/null");
    assert_eq!(user(&tree), None);
    made.node("drm/card2", "drm", "1:3");
    let by = user(&tree).unwrap();
    assert!(by.contains("process 77 (Xorg) has /dev/null open"), "{by}");
}

#[test]
fn a_group_that_a_process_has_open() {
    let tree = Tree::new();
    tree.add("0000:01:00.0", 0x03_0000).group(5);
    tree.write("proc/77/comm", "qemu\n");
    tree.link("proc/77/fd/9", "/dev/null");
    tree.write("sys/class/vfio/6/dev", "1:3\n");
    assert_eq!(user(&tree), None);
    tree.write("sys/class/vfio/5/dev", "1:3\n");
    assert!(user(&tree).unwrap().contains("77 (qemu)"));
}

/// The driver of NVIDIA lets a GPU go only when nobody has it open.
#[test]
fn the_number_of_an_nvidia_gpu_s_node() {
    let tree = Tree::new();
    tree.add("0000:01:00.0", 0x03_0200);
    let system = tree.system();
    let function = system.function(address("01:00.0")).unwrap();
    let number = || nvidia_node(&system, &function).unwrap();
    assert_eq!(number(), None);
    tree.write(
        "proc/driver/nvidia/gpus/0000:01:00.0/information",
        "Model: \t\t NVIDIA H100\nDevice Minor: \t 3\nGPU Excluded:\t No\n",
    );
    assert_eq!(number().as_deref(), Some("195:3"));
}

/// What is behind a bridge is no part of it.
#[test]
fn functions_behind_are_others() {
    let tree = Tree::new();
    let made = tree.add("0000:01:00.0", 0x06_0400);
    made.link("0000:02:00.0/subsystem", "/sys/bus/pci")
        .node("0000:02:00.0/net/eth0", "net", "")
        .file("0000:02:00.0/net/eth0/flags", "0x1003\n");
    assert_eq!(user(&tree), None);
}

#[test]
fn a_device_that_has_mediated_ones() {
    let tree = Tree::new();
    tree.add("0000:01:00.0", 0x03_0200);
    assert_eq!(user(&tree), None);
    let uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
    tree.add_mediated(uuid, "devices/pci0000:00/0000:01:00.0");
    let by = user(&tree).unwrap();
    assert!(by.contains(&format!("mediated device {uuid}")), "{by}");
}
