//! Devices in the hands of containers.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use nacre_tests::{Changed, HugePages, Said, Scene, eventually, run};
use serde_json::{Value, json};

use crate::{
    Bound, DEVICES, DISK, EDU, NVME_PORT, PAIR, SWITCH_PORT, begins, behind, disk, group, no_claims,
};

/// Of the disk: all of it.
const MIB: usize = 64;

/// A container of `script` that asks for devices.
fn container(spec: &mut Value, devices: &str, script: &str) {
    spec["annotations"] = json!({DEVICES: devices});
    spec["process"]["args"] = json!(["sh", "-c", script]);
    // Newer clients hide /proc/interrupts.
    spec["linux"]["maskedPaths"] = json!([]);
}

fn run_to_end(scene: &mut Scene, devices: &str, script: &str) -> Said {
    scene.run_spec(|spec| container(spec, devices, script))
}

/// Interrupts of a kind in the lines of /proc/interrupts that `said` has: a line is the
/// vector, a count for each processor, the kind and what it is for.
fn interrupts(said: &Said, kind: &str, of: &str) -> u64 {
    let lines = said.stdout.lines();
    let lines = lines.filter(|line| line.contains(kind) && line.contains(of));
    lines
        .flat_map(|line| line.split_whitespace().skip(1))
        .filter_map(|word| word.parse::<u64>().ok())
        .sum()
}

/// What is written in the container is on the disk when the host has it back. Between
/// writing and reading the disk is closed, so that the kernel forgets what it has of it.
#[test]
fn a_disk_is_written_and_read_in_a_container() {
    let nvme = behind(NVME_PORT);
    let line = format!("a line for {nvme} by {}", std::process::id());
    let bytes = format!("{line}\n").repeat((MIB << 20) / line.len());
    let sum = nacre_tests::md5(&bytes.as_bytes()[..MIB << 20]);
    let bound = Bound::new(&[&nvme]);
    let script = format!(
        "yes '{line}' | head -c {} | dd of={DISK} bs=1M iflag=fullblock conv=fsync 2>/dev/null\n\
         dd if={DISK} bs=1M count={MIB} 2>/dev/null | md5sum\n\
         ls -l {DISK}\n\
         grep nvme0q /proc/interrupts\n",
        MIB << 20
    );
    let said = run_to_end(&mut Scene::new(), &nvme, &script).exits(0);
    assert!(said.stdout.starts_with(&sum), "not {sum} in {said:#?}");
    // The one for commands to the controller, and that of the one vCPU.
    for queue in ["nvme0q0", "nvme0q1"] {
        let count = interrupts(&said, "MSIX", queue);
        assert!(count > 0, "no MSI-X interrupt of {queue} in {said:#?}");
    }
    no_claims();

    drop(bound);
    let disk = disk(&nvme);
    let read = Command::new("sh")
        .args(["-c", &format!("head -c {} {disk} | md5sum", MIB << 20)])
        .output();
    Said::from(read.unwrap()).exits(0).prints(&sum);
}

/// The guest's 512 MiB by default are taken at once, and given back.
#[test]
fn memory_in_huge_pages_is_a_device_s_too() {
    let nvme = behind(NVME_PORT);
    let _bound = Bound::new(&[&nvme]);
    let _config = Changed::new("hugepages", "true");
    let pool = HugePages::new(300);
    let mut scene = Scene::new();
    let id = scene.start_spec(|spec| container(spec, &nvme, "sleep 3600"));
    assert_eq!(pool.left(), 300 - 256);
    let read = format!("dd if={DISK} bs=1M count=1 2>/dev/null | wc -c");
    scene
        .exec(&id, &[], &["sh", "-c", &read])
        .exits(0)
        .prints("1048576\n");
    scene.ctr(&["task", "rm", "-f", &id]).exits(0);
    no_claims();
    eventually("the pages are free again", || pool.left() == 300);
}

/// The guest's kernel reads the table of partitions after it has made the disk.
#[test]
fn partitions_are_in_the_container() {
    let nvme = behind(NVME_PORT);
    let mut sfdisk = Command::new("sfdisk");
    sfdisk.arg(disk(&nvme));
    let table = "label: gpt\nstart=2048, size=4096\n";
    nacre_tests::run_with_input(sfdisk, table.into()).exits(0);
    let bound = Bound::new(&[&nvme]);
    let script = format!("wc -c < {DISK}p1");
    run_to_end(&mut Scene::new(), &nvme, &script)
        .exits(0)
        .prints("2097152\n");
    no_claims();
    drop(bound);
    fs::write(disk(&nvme), [0; 512]).unwrap();
}

/// From one pod to the next: first refused while it is held, then free when the monitor
/// was killed.
#[test]
fn a_device_is_one_pod_s_until_its_monitor_dies() {
    let nvme = behind(NVME_PORT);
    let _bound = Bound::new(&[&nvme]);
    let mut scene = Scene::new();
    let id = scene.start_spec(|spec| container(spec, &nvme, "sleep 3600"));
    scene.exec(&id, &[], &["test", "-b", DISK]).exits(0);
    let pods = run("nacre", &["ps"]).exits(0).stdout;
    let row = pods.lines().find(|row| row.contains(&id));
    assert!(row.is_some_and(|row| row.contains(&nvme)), "{pods}");

    let annotation = format!("{DEVICES}={nvme}");
    scene
        .run_with(&["--annotation", &annotation], &["true"])
        .exits(1)
        .complains(&[&format!("PCI device {nvme} is pod default/{id}'s")]);
    // The refusal took nothing from the one that has it.
    scene.exec(&id, &[], &["test", "-b", DISK]).exits(0);

    let state = fs::read(format!("/run/nacre/default/{id}/state.json")).unwrap();
    let state: Value = serde_json::from_slice(&state).unwrap();
    run("kill", &["-9", &state["monitor"]["pid"].to_string()]).exits(0);
    scene.await_status(&id, "STOPPED");
    scene.ctr(&["task", "rm", &id]).exits(0);
    no_claims();
    run_to_end(&mut scene, &nvme, &format!("test -b {DISK}")).exits(0);
    no_claims();
}

/// Two disks in a pod: a container has nodes of those it asks for, and one that asks for
/// a third device does not join.
#[test]
fn containers_of_a_pod_have_their_own_devices() {
    let [alone, switched] = [NVME_PORT, SWITCH_PORT].map(behind);
    let _bound = Bound::new(&[&alone, &switched, EDU]);
    let mut scene = Scene::new();
    let both = format!("{alone},{switched}");
    let first = scene.start_spec(|spec| container(spec, &both, "sleep 3600"));
    let group =
        |spec: &mut Value| spec["annotations"]["io.containerd.runc.v2.group"] = json!(first);
    let second = scene.start_spec(|spec| {
        container(spec, &switched, "sleep 3600");
        group(spec);
    });
    let third = scene.start_spec(|spec| {
        container(spec, "", "sleep 3600");
        group(spec);
    });
    let nodes = |id: &str| {
        let script = "cd /dev; for disk in nvme*n1; do head -c 1048576 $disk | wc -c; done";
        scene.exec(id, &[], &["sh", "-c", script]).exits(0).stdout
    };
    assert_eq!(nodes(&first), "1048576\n1048576\n");
    assert_eq!(nodes(&second), "1048576\n");
    scene
        .exec(&third, &[], &["sh", "-c", "ls /dev/nvme*"])
        .exits(1);
    // A node of its own making does not open what the rules keep.
    let numbers = ["sh", "-c", "cat /sys/block/nvme0n1/dev"];
    let numbers = scene.exec(&third, &[], &numbers).exits(0).stdout;
    let (major, minor) = numbers.trim().split_once(':').unwrap();
    let make = format!("mknod /dev/mine b {major} {minor} && cat /dev/mine");
    scene
        .exec(&third, &[], &["sh", "-c", &make])
        .exits(1)
        .complains(&["Operation not permitted"]);
    let fourth = scene.run_spec(|spec| {
        container(spec, EDU, "true");
        group(spec);
    });
    fourth
        .exits(1)
        .complains(&["needs a device of the host", "built without"]);
}

/// Two disks that are one group, by its node: each is written with its serial number.
#[test]
fn all_devices_of_a_group_come_with_its_node() {
    let bound = Bound::new(&PAIR);
    let node = format!("/dev/vfio/{}", group(PAIR[0]));
    let script = "cd /dev; for disk in nvme*n1; do \
                  dd if=/sys/block/$disk/device/serial of=$disk conv=fsync 2>/dev/null; \
                  cat /sys/block/$disk/device/serial; done";
    let said = Scene::new().run_with(&["--device", &node], &["sh", "-c", script]);
    let said = said.exits(0);
    let mut serials: Vec<&str> = said.stdout.lines().map(str::trim).collect();
    // The guest's driver looks at both at once: either may be its first.
    serials.sort_unstable();
    assert_eq!(serials, ["first", "second"], "{said:#?}");
    no_claims();
    drop(bound);
    for (address, serial) in PAIR.iter().zip(serials) {
        let path = disk(address);
        assert_eq!(begins(&path).trim(), serial);
        fs::write(path, [0; 512]).unwrap();
    }
}

/// The guest has no driver for it, and shows it all the same.
#[test]
fn a_device_without_a_driver_is_in_sysfs() {
    let _bound = Bound::new(&[EDU]);
    let mut scene = Scene::new();
    let script = "cat /sys/bus/pci/devices/0000:01:00.0/device";
    run_to_end(&mut scene, EDU, script)
        .exits(0)
        .prints("0x11e8\n");
    no_claims();
}

/// Of a shim that may not raise its limits, as containerd's service can have it: nothing is
/// left of the pod, and the device is free for the next.
#[test]
fn a_lock_limit_that_is_too_small_is_explained() {
    const DIR: &str = "/tmp/limited";
    let nvme = behind(NVME_PORT);
    let _bound = Bound::new(&[&nvme]);
    let mut scene = Scene::new();
    let node = format!("/dev/vfio/{}", group(&nvme));
    let shim = format!("{DIR}/containerd-shim-nacre-v2");
    let mut run = |limit_mib: u64| {
        let script = format!(
            "#!/bin/sh\n\
             exec prlimit --memlock={bytes}:{bytes} setpriv --bounding-set=-sys_resource \
             containerd-shim-nacre-v2 \"$@\"\n",
            bytes = limit_mib << 20
        );
        fs::create_dir_all(DIR).unwrap();
        fs::write(&shim, script).unwrap();
        fs::set_permissions(&shim, Permissions::from_mode(0o755)).unwrap();
        let options = ["--runtime", &shim, "--device", &node];
        let said = scene.run_with(&options, &["test", "-b", DISK]);
        no_claims();
        said
    };
    // The machine's size by default is 512 MiB.
    run(500).exits(1).complains(&[
        "is pinned, 512 MiB",
        "RLIMIT_MEMLOCK is 500 MiB",
        "LimitMEMLOCK=",
    ]);
    let open = fs::File::options().read(true).write(true).open(&node);
    drop(open.expect("nobody has the device"));
    run(512).exits(0);
    fs::remove_dir_all(DIR).unwrap();
}

/// A device that somebody else has open: nothing is left of the pod.
#[test]
fn a_device_that_a_process_has_open_is_refused() {
    let nvme = behind(NVME_PORT);
    let _bound = Bound::new(&[&nvme]);
    let mut scene = Scene::new();
    let node = format!("/dev/vfio/{}", group(&nvme));
    let open = fs::File::options().read(true).write(true).open(&node);
    let open = open.unwrap();
    run_to_end(&mut scene, &nvme, "true")
        .exits(1)
        .complains(&[&node, "another process has it"]);
    no_claims();
    drop(open);
    run_to_end(&mut scene, &nvme, "true").exits(0);
    eventually("no monitor has it", || {
        fs::File::options()
            .read(true)
            .write(true)
            .open(&node)
            .is_ok()
    });
}
