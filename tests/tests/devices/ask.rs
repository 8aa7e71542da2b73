//! The ways to ask for a device: each is understood, and nothing is left of it.

use std::fs;

use nacre_tests::{Changed, Said, Scene};
use serde_json::json;

use crate::{
    Bound, CdiSpec, DEVICES, EDU, NVME_PORT, PAIR, behind, disk, driver, group, no_claims,
};

/// Prints the ids of what is behind the guest's root ports.
const LOOK: [&str; 3] = [
    "sh",
    "-c",
    "cat /sys/bus/pci/devices/0000:0[1-9]:00.0/device",
];
const EDU_ID: &str = "0x11e8\n";
const NVME_ID: &str = "0x0010\n";

fn with_annotation(scene: &mut Scene, key: &str, value: &str) -> Said {
    let said = scene.run_spec(|spec| {
        spec["annotations"] = json!({key: value});
        spec["process"]["args"] = json!(LOOK);
    });
    no_claims();
    said
}

#[test]
fn by_address_and_by_path() {
    let mut scene = Scene::new();
    let nvme = behind(NVME_PORT);
    with_annotation(&mut scene, DEVICES, &nvme)
        .exits(1)
        .complains(&[&nvme, "driver nvme", "nacre devices bind"]);
    // The shim moves nothing.
    assert_eq!(driver(&nvme).as_deref(), Some("nvme"));
    let bound = Bound::new(&[&nvme, EDU]);
    let both = format!("{nvme},/sys/bus/pci/devices/{EDU}");
    with_annotation(&mut scene, DEVICES, &both)
        .exits(0)
        .prints(&format!("{EDU_ID}{NVME_ID}"));
    with_annotation(&mut scene, DEVICES, "0000:7f:00.0")
        .exits(1)
        .complains(&["no PCI device 0000:7f:00.0"]);
    drop(bound);
}

/// Bound, and gone from the bus before a pod asks for it.
#[test]
fn a_device_that_vanished() {
    let mut scene = Scene::new();
    let nvme = behind(NVME_PORT);
    let bound = Bound::new(&[&nvme]);
    let node = format!("/dev/vfio/{}", group(&nvme));
    fs::write(crate::sysfs(&nvme).join("remove"), "1").unwrap();
    let by_address = with_annotation(&mut scene, DEVICES, &nvme);
    let by_node = scene.run_with(&["--device", &node], &LOOK);
    fs::write("/sys/bus/pci/rescan", "1").unwrap();
    by_address
        .exits(1)
        .complains(&[&format!("no PCI device {nvme}")]);
    // Its node is gone too: `ctr` finds none.
    by_node.exits(1).complains(&[&node]);
    // To the kernel it is a new one, which is no more reserved for vfio-pci.
    assert_eq!(behind(NVME_PORT), nvme);
    disk(&nvme);
    drop(bound);
}

#[test]
fn by_the_group_s_node() {
    let mut scene = Scene::new();
    let bound = Bound::new(&[EDU]);
    let node = format!("/dev/vfio/{}", group(EDU));
    let mut run = |api: &str| {
        let _config = Changed::new("vfio_api", api);
        let said = scene.run_with(&["--device", &node], &LOOK);
        no_claims();
        said
    };
    run("'group'").exits(0).prints(EDU_ID);
    // The lab's kernel has none.
    run("'iommufd'")
        .exits(1)
        .complains(&["vfio_api in nacre.toml asks for iommufd", "no /dev/iommu"]);
    drop(bound);
}

/// Its spec has the nodes of all devices.
#[test]
fn a_privileged_container_has_what_it_asks_for() {
    let mut scene = Scene::new();
    let nvme = behind(NVME_PORT);
    let bound = Bound::new(&[&nvme, EDU]);
    let all = [
        "sh",
        "-c",
        "for d in /sys/bus/pci/devices/0000:0[1-9]:00.0; do [ ! -e $d ] || cat $d/device; done",
    ];
    scene.run_with(&["--privileged"], &all).exits(0).prints("");
    let node = format!("/dev/vfio/{}", group(EDU));
    scene
        .run_with(&["--privileged", "--device", &node], &all)
        .exits(0)
        .prints(EDU_ID);
    no_claims();
    drop(bound);
}

#[test]
fn by_the_name_of_a_cdi_spec() {
    let mut scene = Scene::new();
    let bound = Bound::new(&[EDU]);
    let node = format!("/dev/vfio/{}", group(EDU));
    let spec = CdiSpec::new("/var/run/cdi", "nacre.test/edu", "0", &node);
    let key = "cdi.k8s.io/test";
    let found = with_annotation(&mut scene, key, "nacre.test/edu=0");
    let wrong = with_annotation(&mut scene, key, "nacre.test/edu=1");
    found.exits(0).prints(EDU_ID);
    let file = spec.0.to_str().unwrap();
    wrong.exits(1).complains(&["nacre.test/edu=1", file]);
    drop(bound);
}

#[test]
fn a_group_that_is_not_complete() {
    let mut scene = Scene::new();
    let [first, second] = PAIR;
    crate::devices(&["bind", first]).exits(0);
    let said = with_annotation(&mut scene, DEVICES, first);
    crate::devices(&["unbind", first]).exits(0);
    said.exits(1)
        .complains(&["IOMMU group", &format!("{second} (nvme)")]);
}
