//! What becomes of a device when its pod ends, or the host wants it back.

use std::fs;
use std::thread;

use nacre_tests::{Scene, run};
use serde_json::{Value, json};

use crate::{Bound, DEVICES, DISK, NVME_PORT, SLEEP, behind, driver, group, no_claims};

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
    scene.ctr(&["task", "rm", &first]).exits(0);
    no_claims();

    let second = scene.start(&["--device", &node], &SLEEP);
    log_has(&second, "resets=1");
    scene.exec(&second, &[], &["test", "-b", DISK]).exits(0);
    scene.ctr(&["task", "rm", "-f", &second]).exits(0);
    no_claims();
}

/// The driver lets it go only when nobody has it open, and asks whoever has.
#[test]
fn a_device_that_the_host_takes_back_ends_the_pod() {
    let nvme = behind(NVME_PORT);
    let _bound = Bound::new(&[&nvme]);
    let mut scene = Scene::new();
    let id = scene.start_spec(|spec: &mut Value| {
        spec["annotations"] = json!({DEVICES: nvme});
        spec["process"]["args"] = json!(SLEEP);
    });
    scene.exec(&id, &[], &["test", "-b", DISK]).exits(0);
    let address = nvme.clone();
    let taken = thread::spawn(move || fs::write(format!("{VFIO_PCI}/unbind"), address));
    scene.await_status(&id, "STOPPED");
    taken.join().unwrap().unwrap();
    assert_eq!(driver(&nvme), None);
    log_has(&id, &format!("PCI device {nvme} is taken back by the host"));
    scene.ctr(&["task", "rm", &id]).exits(0);
    no_claims();

    fs::write(format!("{VFIO_PCI}/bind"), &nvme).unwrap();
    let again = scene.run_spec(|spec| {
        spec["annotations"] = json!({DEVICES: nvme});
        spec["process"]["args"] = json!(["test", "-b", DISK]);
    });
    again.exits(0);
    no_claims();
}
