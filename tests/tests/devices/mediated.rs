//! Mediated devices, with the kernel's own sample of them: `mtty`, which makes serial cards of one
//! port or two that are in no hardware. (The lab's kernel was built without it; `lab/disk.sh` makes
//! the modules.)

use std::fs;
use std::path::{Path, PathBuf};

use nacre_tests::{Said, Scene};
use serde_json::json;

use crate::table::row;
use crate::{DEVICES, SLEEP, devices, no_claims};

const PARENT: &str = "/sys/devices/virtual/mtty/mtty";
/// With two ports.
const KIND: &str = "mtty-2";
const UUID: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
const OTHER: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002";

/// Prints what the guest has in its first slot, and what is in the scratch registers of both ports
/// after `$0` and `$1` were written there: the guest's kernel has no driver for the card, which so gets
/// its ports here. Nothing resets the card, so that each pod writes something else.
const LOOK: &str = "cd /sys/bus/pci/devices/0000:01:00.0 && cat vendor device && echo 1 > enable && \
                    printf $0 | dd of=resource0 bs=1 seek=7 conv=notrunc 2>/dev/null && \
                    printf $1 | dd of=resource1 bs=1 seek=7 conv=notrunc 2>/dev/null && \
                    for port in 0 1; do dd if=resource$port bs=1 skip=7 count=1 2>/dev/null; done";
const IDS: [&str; 3] = ["sh", "-c", "cat /sys/bus/pci/devices/*:01:00.0/vendor"];

/// A card, until this is dropped.
struct Card(PathBuf);

impl Card {
    fn new() -> Self {
        nacre_tests::run("modprobe", &["mtty"]).exits(0);
        let create = format!("{PARENT}/mdev_supported_types/{KIND}/create");
        fs::write(&create, UUID).unwrap_or_else(|error| panic!("{create}: {error}"));
        Self(Path::new("/sys/bus/mdev/devices").join(UUID))
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }

    fn group(&self) -> String {
        let group = fs::read_link(self.0.join("iommu_group")).unwrap();
        group.file_name().unwrap().to_str().unwrap().to_owned()
    }

    /// The kernel waits for whoever has it.
    fn remove(&self) {
        fs::write(self.0.join("remove"), "1").unwrap();
        assert!(!self.0.exists());
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        if !self.0.exists() {
            return;
        }
        let removed = fs::write(self.0.join("remove"), "1");
        if !std::thread::panicking() {
            removed.unwrap();
        }
    }
}

fn by_annotation(scene: &mut Scene, name: &str) -> Said {
    let said = scene.run_spec(|spec| {
        spec["annotations"] = json!({DEVICES: name});
        spec["process"]["args"] = json!(IDS);
    });
    no_claims();
    said
}

/// A pod has it by its path, and the next one when that is gone.
#[test]
fn a_card_that_a_driver_makes_is_one_pod_s_after_another() {
    let card = Card::new();
    let mut scene = Scene::new();
    let free = row(UUID);
    let group = card.group();
    for (column, cell) in [
        ("CLASS", "mediated, of mtty"),
        ("GROUP", &group),
        ("DRIVER", "mtty"),
        ("BARS", "-"),
        ("HELD BY", "-"),
        ("NAME", "Dual port serial"),
    ] {
        assert_eq!(free[column], cell, "{column}: {free:?}");
    }
    let annotation = format!("{DEVICES}={}", card.path());
    let options = ["--privileged", "--annotation", &annotation];
    for [first, second] in [["4", "5"], ["6", "7"]] {
        let id = scene.start(&options, &SLEEP);
        scene
            .exec(&id, &[], &["sh", "-c", LOOK, first, second])
            .exits(0)
            .prints(&format!("0x4348\n0x3253\n{first}{second}"));
        assert_eq!(row(UUID)["HELD BY"], format!("default/{id}"));
        let text = format!("mediated device {UUID} is pod default/{id}'s");
        scene
            .run_with(&["--annotation", &annotation], &["true"])
            .exits(1)
            .complains(&[&text]);
        scene.ctr(&["task", "rm", "-f", &id]).exits(0);
        no_claims();
    }
    card.remove();
    by_annotation(&mut scene, card.path())
        .exits(1)
        .complains(&[&format!("no mediated device {UUID}")]);
}

#[test]
fn a_card_by_its_other_names() {
    let card = Card::new();
    let mut scene = Scene::new();
    for name in [UUID, &format!("{PARENT}/{UUID}")] {
        by_annotation(&mut scene, name).exits(0).prints("0x4348\n");
    }
    let node = format!("/dev/vfio/{}", card.group());
    scene
        .run_with(&["--device", &node], &IDS)
        .exits(0)
        .prints("0x4348\n");
    no_claims();
    for action in ["bind", "unbind"] {
        devices(&[action, UUID])
            .exits(1)
            .complains(&[&format!("{UUID} is a mediated device")]);
    }
}

/// The scene looks for what a refusal might leave.
#[test]
fn what_is_no_card_is_refused() {
    let _card = Card::new();
    let mut scene = Scene::new();
    let gone = format!("/sys/bus/mdev/devices/{OTHER}");
    by_annotation(&mut scene, &gone)
        .exits(1)
        .complains(&[&format!("no mediated device {OTHER}")]);
    for name in [PARENT, "/sys/bus/mdev/devices/card", &UUID[1..]] {
        by_annotation(&mut scene, name)
            .exits(1)
            .complains(&[name, "neither"]);
    }
}
