//! What becomes of a device when its pod ends, or the host wants it back.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::thread;

use nacre_tests::{Changed, Scene, run};
use serde_json::{Value, json};

use crate::drivers::{drivers, image};
use crate::{
    Bound, DEVICES, DISK, MEMORY, NVME_PORT, REPORTING_PORT, SLEEP, behind, card, disk, driver,
    group, log_has, no_claims, sysfs,
};

const VFIO_PCI: &str = "/sys/bus/pci/drivers/vfio-pci";

/// What a shell in a container prints.
fn prints(scene: &Scene, id: &str, script: &str) -> String {
    scene.exec(id, &[], &["sh", "-c", script]).exits(0).stdout
}

/// A pod leaves canaries in a disk, in a register of each function of a card and in the last word
/// of a device's 128 GiB of memory. The next one finds what docs/gpu.md says: devices are reset, by
/// the monitor, before a guest has them and after one that ended by itself. (A monitor that is
/// killed leaves it to the kernel, which resets what is closed.) The bytes of a disk stay, and what
/// nothing resets.
#[test]
fn what_a_pod_leaves_in_its_devices_is_cleared_where_it_can_be() {
    let nvme = behind(NVME_PORT);
    let [one, other] = card();
    let bound = Bound::new(&[&nvme, &one, &other, MEMORY]);
    let canary = image("canary");
    let _drivers = drivers(&[
        ("::0108", &image("nvme")),
        ("1b36:000d", &canary),
        ("1af4:1110", &canary),
    ]);
    let mut scene = Scene::new();
    let nodes = [nvme.as_str(), &one, MEMORY].map(|one| format!("/dev/vfio/{}", group(one)));
    let devices: Vec<&str> = nodes.iter().flat_map(|node| ["--device", node]).collect();
    let first = scene.start(&[&["--privileged"][..], &devices[..]].concat(), &SLEEP);
    log_has(&first, " map_calls=1 ");
    // The machine's size by default, and no registers of a device.
    log_has(&first, &format!(" bytes_mapped={}", 512u64 << 20));
    log_has(&first, "bar_bytes_mapped=0");
    // The disk by itself, and the card's two functions by their bus.
    log_has(&first, "resets=3");
    log_has(&first, "it has what its last user left in it");
    let number = std::process::id();
    let leave = format!(
        "cd /dev; for canary in canary-xhci-*; do cat $canary; echo 7 > $canary; cat $canary; done
         echo {number} > $(echo canary-memory-*)
         echo canary {number} | dd of={DISK} conv=fsync 2>/dev/null"
    );
    assert_eq!(prints(&scene, &first, &leave), "0\n7\n0\n7\n");
    let power_off = "echo o > /proc/sysrq-trigger; sleep 3600";
    // Its client has lost it.
    scene.exec(&first, &[], &["sh", "-c", power_off]).exits(137);
    scene.await_status(&first, "STOPPED");
    log_has(&first, "was_reset=true");
    // Nothing in the monitor looked at it now and then.
    log_has(&first, "polls=0");
    scene.ctr(&["task", "rm", &first]).exits(0);
    no_claims();

    let second = scene.start(&devices, &SLEEP);
    log_has(&second, "resets=3");
    let look = format!(
        "cd /dev; for canary in canary-*; do echo ${{canary%-*}} $(cat $canary); done
         head -n 1 {DISK}"
    );
    assert_eq!(
        prints(&scene, &second, &look),
        format!("canary-memory {number}\ncanary-xhci 0\ncanary-xhci 0\ncanary {number}\n")
    );
    scene.ctr(&["task", "rm", "-f", &second]).exits(0);
    no_claims();
    drop(bound);
    fs::write(disk(&nvme), [0; 512]).unwrap();
}

/// The driver lets it go only when nobody has it open, and asks whoever has: when it is taken
/// from the driver, and when it is taken out of the machine.
#[test]
fn a_device_that_the_host_takes_back_ends_the_pod() {
    let nvme = behind(NVME_PORT);
    let _bound = Bound::new(&[&nvme]);
    let _peers = Changed::new("pci_peers", "true");
    let mut scene = Scene::new();
    let mut lose = |path: PathBuf, text: &str| {
        let id = scene.start_spec(|spec: &mut Value| {
            spec["annotations"] = json!({DEVICES: nvme});
            spec["process"]["args"] = json!(SLEEP);
        });
        scene.exec(&id, &[], &["test", "-b", DISK]).exits(0);
        // It may reach its peers, and has none.
        log_has(&id, "bar_bytes_mapped=0");
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

/// Completion Timeout, as a device has it in its register of uncorrectable errors (PCI Express base
/// 5.0, 7.8.4.2).
const COMPLETION_TIMEOUT: u32 = 1 << 14;

/// Has the kernel find that a device has reported an error (`struct aer_error_inj` of
/// drivers/pci/pcie/aer_inject.c).
fn report_error(address: &str) {
    run("modprobe", &["aer_inject"]).exits(0);
    let (_, numbers) = address.split_once(':').unwrap();
    let numbers = numbers.split([':', '.']);
    let numbers = numbers.map(|number| u8::from_str_radix(number, 16).unwrap());
    let mut error = [0; 32];
    for (byte, number) in error.iter_mut().zip(numbers) {
        *byte = number;
    }
    error[4..8].copy_from_slice(&COMPLETION_TIMEOUT.to_ne_bytes());
    let mut node = File::options().write(true).open("/dev/aer_inject").unwrap();
    node.write_all(&error).unwrap();
}

/// The guest would wait for it; the next pod may have it.
#[test]
fn a_device_that_fails_ends_the_pod() {
    let address = behind(REPORTING_PORT);
    let _bound = Bound::new(&[&address]);
    let mut scene = Scene::new();
    let node = format!("/dev/vfio/{}", group(&address));
    let id = scene.start(&["--device", &node], &SLEEP);
    // It has no function-level reset.
    log_has(&id, "resets=1");
    report_error(&address);
    scene.await_status(&id, "STOPPED");
    let text = format!("PCI device {address} had an error it cannot recover from");
    log_has(&id, &text);
    scene.ctr(&["task", "rm", &id]).exits(0);
    no_claims();
    let open = File::options().read(true).write(true).open(&node);
    drop(open.expect("nobody has the device"));
    run("modprobe", &["-r", "aer_inject"]).exits(0);
}
