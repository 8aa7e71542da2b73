//! Devices that come with a container which joins a running pod, and go with it. Their
//! drivers are in images that the pod has a disk for from the start.

use std::process::Command;

use nacre_tests::{Changed, Said, Scene, run};
use serde_json::{Value, json};

use crate::drivers::{drivers, image};
use crate::{Bound, DEVICES, DISK, EDU, NVME_PORT, SLEEP, SWITCH_PORT, behind, disk, no_claims};

/// Where a guest has its first device.
const IN_GUEST: &str = "/sys/bus/pci/devices/0000:01:00.0";
const MIB: usize = 8;

/// A container of the test's pod.
fn member(spec: &mut Value, devices: &str, command: &[&str]) {
    spec["annotations"] = json!({
        "io.containerd.runc.v2.group": "plugged",
        DEVICES: devices,
    });
    spec["process"]["args"] = json!(command);
}

fn start(scene: &mut Scene, devices: &str) -> String {
    scene.start_spec(|spec| member(spec, devices, &SLEEP))
}

/// One slot serves one disk after another, the first of them again at the end. The
/// others in the pod see nothing of it.
#[test]
fn disks_come_and_go_with_containers_that_join() {
    let [alone, switched] = [NVME_PORT, SWITCH_PORT].map(behind);
    let bound = Bound::new(&[&alone, &switched]);
    let _slots = Changed::new("pci_slots", "1");
    let _drivers = drivers(&[("::0108", &image("nvme"))]);
    let mut scene = Scene::new();
    let first = start(&mut scene, "");
    scene.exec(&first, &[], &["test", "-e", IN_GUEST]).exits(1);
    let mut last = (0, String::new());
    for (round, disk) in [&alone, &switched, &alone].into_iter().enumerate() {
        let id = start(&mut scene, disk);
        let pods = run("nacre", &["ps"]).exits(0).stdout;
        assert!(pods.contains(disk.as_str()), "{pods}");
        let line = format!("round {round} by {}\n", std::process::id());
        let bytes = line.repeat((MIB << 20) / line.len());
        let sum = nacre_tests::md5(bytes.as_bytes());
        let script = format!(
            "yes '{}' | head -c {len} | dd of={DISK} bs=1M iflag=fullblock conv=fsync 2>/dev/null\n\
             head -c {len} {DISK} | md5sum\n",
            line.trim(),
            len = bytes.len(),
        );
        let said = scene.exec(&id, &[], &["sh", "-c", &script]).exits(0);
        assert!(said.stdout.starts_with(&sum), "not {sum} in {said:#?}");
        last = (bytes.len(), sum);
        // It is the only one that the image is for, whichever it is.
        let look = ["sh", "-c", "cat $DISK_LIBRARY; echo $DISK_0 $DISK_1"];
        let said = scene.exec(&id, &[], &look).exits(0);
        assert_eq!(said.stdout, "a library\nfirst\n", "{said:#?}");
        scene.exec(&first, &[], &["test", "-e", DISK]).exits(1);

        let other = if disk == &alone { &switched } else { &alone };
        scene
            .run_spec(|spec| member(spec, other, &["true"]))
            .exits(1)
            .complains(&["of its 1 slots", "0 are empty", "pci_slots"]);

        scene.remove(&id);
        no_claims();
        scene.exec(&first, &[], &["test", "-e", IN_GUEST]).exits(1);
    }
    scene.remove(&first);
    drop(bound);
    let (len, sum) = last;
    let script = format!("head -c {len} {} | md5sum", disk(&alone));
    let read = Command::new("sh").args(["-c", &script]).output().unwrap();
    let read = Said::from(read).exits(0);
    assert!(read.stdout.starts_with(&sum), "not {sum} in {read:#?}");
}

/// It is loaded with the first device, which it has firmware for, and there for the next.
#[test]
fn a_vendor_s_driver_comes_with_its_device() {
    let _bound = Bound::new(&[EDU]);
    let _slots = Changed::new("pci_slots", "1");
    let _drivers = drivers(&[("1234:11e8", &image("edu"))]);
    let mut scene = Scene::new();
    let first = start(&mut scene, "");
    let is_loaded = ["test", "-e", "/sys/module/edu"];
    scene.exec(&first, &[], &is_loaded).exits(1);
    for _ in 0..2 {
        let look = ["sh", "-c", "cat /dev/edu; cat /dev/education; echo $EDU"];
        let line = "010000ed 3 firm\n";
        scene
            .run_spec(|spec| member(spec, EDU, &look))
            .exits(0)
            .prints(&format!("{line}{line}yes\n"));
        no_claims();
        scene.exec(&first, &[], &is_loaded).exits(0);
        scene.exec(&first, &[], &["test", "-e", IN_GUEST]).exits(1);
    }
}
