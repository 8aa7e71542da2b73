//! End-to-end tests: real containerd, real KVM, real guests. See `tests/lab`.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

mod api;
mod boot;
mod clock;
mod console;
mod death;
mod devices;
mod ends;
mod exec;
mod failures;
mod hooks;
mod host;
mod images;
mod inputs;
mod interfaces;
mod layers;
mod limits;
mod load;
mod loggers;
mod network;
mod rootfs;
mod run;
mod several;
mod steps;
mod streams;
mod volumes;

use std::fs;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nacre_tests::{Machine, Scene, ctr, run};

/// The machine the other tests stand on: KVM is usable there.
#[test]
fn machine_has_kvm_and_containerd() {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap();
    assert!(
        flags.contains("svm") || flags.contains("vmx"),
        "no SVM or VT-x"
    );
    assert!(std::path::Path::new("/dev/kvm").exists(), "no /dev/kvm");
    let said = ctr(&["version"]).exits(0);
    assert!(said.stdout.contains("Server:"), "{said:#?}");
}

/// The check for leftovers can fail: it sees one of each kind.
#[test]
fn leftovers_are_seen() {
    let cgroup = "/sys/fs/cgroup/default/left0";
    let run_dir = "/run/nacre/default/left0";
    let socket = "/run/containerd/s/left0";
    // The first one mounts the directory they are in.
    run("ip", &["netns", "add", "left1"]).exits(0);
    run("ip", &["netns", "del", "left1"]).exits(0);
    let before = Machine::now();

    run("ip", &["link", "add", "left0", "type", "dummy"]).exits(0);
    run("ip", &["netns", "add", "left0"]).exits(0);
    let mut command = Command::new("sleep");
    let mut process = command.arg0("nacre-left0").arg("3600").spawn().unwrap();
    for directory in [cgroup, run_dir] {
        fs::create_dir_all(directory).unwrap();
    }
    run("mount", &["-t", "tmpfs", "left0", run_dir]).exits(0);
    fs::create_dir_all("/run/containerd/s").unwrap();
    let listener = UnixListener::bind(socket).unwrap();
    let with_all = Machine::now();

    drop(listener);
    fs::remove_file(socket).unwrap();
    run("umount", &[run_dir]).exits(0);
    for directory in [cgroup, run_dir] {
        fs::remove_dir(directory).unwrap();
    }
    process.kill().unwrap();
    process.wait().unwrap();
    run("ip", &["netns", "del", "left0"]).exits(0);
    run("ip", &["link", "del", "left0"]).exits(0);

    let expected = [
        format!("cgroup {cgroup}"),
        "interface /sys/class/net/left0".to_owned(),
        format!("mount {run_dir}"),
        "mount /run/netns/left0".to_owned(),
        "netns /run/netns/left0".to_owned(),
        format!("process {} nacre-left0 3600 ", process.id()),
        format!("run directory {run_dir}"),
        format!("socket {socket}"),
    ];
    assert_eq!(with_all.beyond(&before), expected);
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
