//! End-to-end tests: real containerd, real KVM, real guests. See `tests/lab`.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

mod boot;
mod death;
mod exec;
mod failures;
mod host;
mod limits;
mod network;
mod rootfs;
mod run;
mod several;
mod streams;

use nacre_tests::{Machine, Scene, ctr, run};

/// The machine the other tests stand on: KVM is usable there.
#[test]
fn machine_has_kvm_and_containerd() {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    assert!(
        flags.contains("svm") || flags.contains("vmx"),
        "no SVM or VT-x"
    );
    assert!(std::path::Path::new("/dev/kvm").exists(), "no /dev/kvm");
    let said = ctr(&["version"]).exits(0);
    assert!(said.stdout.contains("Server:"), "{said:#?}");
}

/// The check for leftovers can fail: it sees a process, a directory, a link.
#[test]
fn leftovers_are_seen() {
    let before = Machine::now();
    run("ip", &["link", "add", "left0", "type", "dummy"]).exits(0);
    let with_link = Machine::now();
    run("ip", &["link", "del", "left0"]).exits(0);
    assert_ne!(before, with_link);
    before.await_return();
}

/// The same image under runc: what the machine gives without nacre.
#[test]
fn runc_runs_here() {
    let mut scene = Scene::new();
    let id = scene.id();
    let image = nacre_tests::BUSYBOX;
    ctr(&["run", "--rm", image, &id, "echo", "hi"])
        .exits(0)
        .prints("hi\n");
}
