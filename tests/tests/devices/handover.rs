//! What becomes of a device when its pod ends, or the host wants it back.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use nacre_tests::{Scene, run};
use serde_json::{Value, json};

use crate::{
    Bound, DEVICES, DISK, NVME_PORT, SLEEP, behind, disk, driver, group, no_claims, sysfs,
};

const VFIO_PCI: &str = "/sys/bus/pci/drivers/vfio-pci";

fn log_has(id: &str, text: &str) {
    let log = run("nacre", &["logs", id]).exits(0).stdout;
    assert!(log.contains(text), "no {text:?} in {log}");
}

/// By the monitor, before a guest has it and after one that ended by itself. (A monitor
/// that is killed leaves it to the kernel, which resets what is closed.)
#[test]
fn a_disk_is_reset_before_and_after_a_pod() {
    let nvme = behind(NVME_PORT);
    let _bound = Bound::new(&[&nvme]);
    let mut scene = Scene::new();
    let node = format!("/dev/vfio/{}", group(&nvme));
    let first = scene.start(&["--privileged", "--device", &node], &SLEEP);
    log_has(&first, "map_calls=1");
    // The machine's size by default, and no registers of a device.
    log_has(&first, &format!("bytes_mapped={}", 512u64 << 20));
    log_has(&first, "resets=1");
    let power_off = "echo o > /proc/sysrq-trigger; sleep 3600";
    // Its client has lost it.
    scene.exec(&first, &[], &["sh", "-c", power_off]).exits(137);
    scene.await_status(&first, "STOPPED");
    log_has(&first, "was_reset=true");
    // Nothing in the monitor looked at it now and then.
    log_has(&first, "polls=0");
    scene.ctr(&["task", "rm", &first]).exits(0);
    no_claims();

    let second = scene.start(&["--device", &node], &SLEEP);
    log_has(&second, "resets=1");
    scene.exec(&second, &[], &["test", "-b", DISK]).exits(0);
    scene.ctr(&["task", "rm", "-f", &second]).exits(0);
    no_claims();
}

/// The driver lets it go only when nobody has it open, and asks whoever has: when it is taken
/// from the driver, and when it is taken out of the machine.
#[test]
fn a_device_that_the_host_takes_back_ends_the_pod() {
    let nvme = behind(NVME_PORT);
    let _bound = Bound::new(&[&nvme]);
    let mut scene = Scene::new();
    let mut lose = |path: PathBuf, text: &str| {
        let id = scene.start_spec(|spec: &mut Value| {
            spec["annotations"] = json!({DEVICES: nvme});
            spec["process"]["args"] = json!(SLEEP);
        });
        scene.exec(&id, &[], &["test", "-b", DISK]).exits(0);
        let text = text.to_owned();
        let taken = thread::spawn(move || fs::write(path, text));
        scene.await_status(&id, "STOPPED");
        taken.join().unwrap().unwrap();
        log_has(&id, &format!("PCI device {nvme} is taken back by the host"));
        scene.ctr(&["task", "rm", &id]).exits(0);
        no_claims();
    };
    lose(Path::new(VFIO_PCI).join("unbind"), &nvme);
    assert_eq!(driver(&nvme), None);
    fs::write(format!("{VFIO_PCI}/bind"), &nvme).unwrap();

    lose(sysfs(&nvme).join("remove"), "1");
    assert!(!sysfs(&nvme).exists());
    fs::write("/sys/bus/pci/rescan", "1").unwrap();
    assert_eq!(behind(NVME_PORT), nvme);
    disk(&nvme);
}
