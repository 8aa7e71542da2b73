//! Driver images: what is in them gets into the containers that have such a device. The
//! images are made of `drivers/` (`Makefile`): the NVMe driver with a CDI spec, and a
//! driver from outside of the kernel's tree for edu, which stands for a vendor's.

use std::fs;

use nacre_tests::{Changed, Said, Scene};
use serde_json::{Value, json};

use crate::{Bound, DEVICES, EDU, NVME_PORT, SLEEP, SWITCH_PORT, behind, no_claims};

const IMAGES: &str = "/nacre/tests/drivers";

/// The configuration with these lines in `[drivers]`, until it is dropped.
pub fn drivers(lines: &[(&str, &str)]) -> Changed {
    let lines = lines
        .iter()
        .map(|(filter, path)| format!("{filter:?} = {path:?}\n"));
    let lines: String = lines.collect();
    Changed::by(|before| {
        let (rest, _) = before.split_once("\n[drivers]\n").unwrap();
        format!("{rest}\n[drivers]\n{lines}")
    })
}

pub fn image(name: &str) -> String {
    format!("{IMAGES}/{name}.erofs")
}

fn container(spec: &mut Value, devices: &str, command: &[&str]) {
    spec["annotations"] = json!({DEVICES: devices});
    spec["process"]["args"] = json!(command);
}

fn run_to_end(scene: &mut Scene, devices: &str, command: &[&str]) -> Said {
    let said = scene.run_spec(|spec| container(spec, devices, command));
    no_claims();
    said
}

/// Two disks in a pod, and a container with both, one with one, and one with none.
#[test]
fn libraries_are_in_the_containers_with_their_devices() {
    let [alone, switched] = [NVME_PORT, SWITCH_PORT].map(behind);
    let _bound = Bound::new(&[&alone, &switched]);
    let _drivers = drivers(&[("::0108", &image("nvme"))]);
    let mut scene = Scene::new();
    let both = format!("{alone},{switched}");
    let first = scene.start_spec(|spec| container(spec, &both, &SLEEP));
    let mut join = |devices: &str| {
        scene.start_spec(|spec| {
            container(spec, devices, &SLEEP);
            spec["annotations"]["io.containerd.runc.v2.group"] = json!(first);
        })
    };
    let (second, third) = (join(&switched), join(""));
    let look = [
        "sh",
        "-c",
        "cat $DISK_LIBRARY /run/hooked; echo $DISK_0 $DISK_1; ls /dev | grep -c nvme.n1; id -G",
    ];
    let seen = |id: &str| scene.exec(id, &[], &look).exits(0).stdout;
    let groups = |text: &str| {
        text.lines()
            .last()
            .unwrap()
            .split(' ')
            .any(|gid| gid == "4242")
    };
    let text = seen(&first);
    assert!(
        text.starts_with("a library\na library\nfirst second\n2\n"),
        "{text}"
    );
    assert!(groups(&text), "{text}");
    let text = seen(&second);
    assert!(
        text.starts_with("a library\na library\nsecond\n1\n"),
        "{text}"
    );
    // The container's own process has it as well as those that come later.
    let environ = ["sh", "-c", "tr '\\0' '\\n' < /proc/1/environ"];
    let text = scene.exec(&second, &[], &environ).exits(0).stdout;
    assert!(
        text.contains("DISK_1=second\n") && !text.contains("DISK_0"),
        "{text}"
    );
    let write = ["sh", "-c", "echo x > /run/libdisk.so"];
    scene
        .exec(&second, &[], &write)
        .exits(1)
        .complains(&["Read-only"]);

    let nothing =
        "ls /run/libdisk.so /run/hooked; echo ${DISK_LIBRARY-none}; ls /dev | grep nvme; id -G";
    let said = scene.exec(&third, &[], &["sh", "-c", nothing]).exits(0);
    assert!(said.stdout.starts_with("none\n"), "{said:#?}");
    assert_eq!(said.stdout.lines().count(), 2, "{said:#?}");
    assert!(!groups(&said.stdout), "{said:#?}");
}

/// A driver that is none of Linux's, with firmware, a parameter and a node.
#[test]
fn a_vendor_s_driver_drives_its_device() {
    let _bound = Bound::new(&[EDU]);
    let _drivers = drivers(&[("::0108", &image("nvme")), ("1234:11e8", &image("edu"))]);
    let mut scene = Scene::new();
    let look = ["sh", "-c", "cat /dev/edu; cat /dev/education; echo $EDU"];
    let line = "010000ed 3 firm\n";
    run_to_end(&mut scene, EDU, &look)
        .exits(0)
        .prints(&format!("{line}{line}yes\n"));
}

/// Each is refused in a sentence that names the file, and nothing is left of the pod.
#[test]
fn images_that_cannot_be_used() {
    let _bound = Bound::new(&[EDU]);
    let mut scene = Scene::new();
    let mut refused = |path: &str, parts: &[&str]| {
        let _drivers = drivers(&[("1234:", path)]);
        let said = run_to_end(&mut scene, EDU, &["true"]).exits(1);
        said.complains(&[&[path][..], parts].concat());
    };
    let missing = image("missing");
    refused(&missing, &[EDU, "[drivers] in nacre.toml", "No such file"]);
    let release = "5.12.";
    refused(
        &image("old"),
        &[
            "/modules/edu.ko",
            "version magic",
            release,
            "make the image again",
        ],
    );
    let damaged = "/tmp/damaged.erofs";
    fs::write(damaged, [0x55; 8192]).unwrap();
    refused(damaged, &["mount", "invalid argument"]);
    fs::write(damaged, "not a disk").unwrap();
    refused(damaged, &["10 bytes", "guest-kernel/driver-image"]);
    fs::remove_file(damaged).unwrap();
}
