//! Several machines at once, and an older containerd.

use std::collections::BTreeSet;
use std::process::Stdio;

use nacre_tests::{BUSYBOX, CONTAINERD_1_7, OlderContainerd, Scene, run_with_input};

/// The annotation by which containers share a pod outside of Kubernetes.
const GROUP: &str = "io.containerd.runc.v2.group";

#[test]
fn four_machines_at_once() {
    let mut scene = Scene::new();
    let starts: Vec<_> = (0..4)
        .map(|_| {
            let (id, mut command) = scene.command(BUSYBOX, &["-d"], &["sleep", "3600"]);
            command.stdin(Stdio::null()).stdout(Stdio::null());
            (id, command.spawn().unwrap())
        })
        .collect();
    let mut ids = Vec::new();
    for (id, mut start) in starts {
        assert!(start.wait().unwrap().success(), "{id}");
        ids.push(id);
    }
    let mut boots = BTreeSet::new();
    for id in &ids {
        assert_eq!(scene.status(id).as_deref(), Some("RUNNING"));
        let boot = ["cat", "/proc/sys/kernel/random/boot_id"];
        boots.insert(scene.exec(id, &[], &boot).exits(0).stdout);
    }
    assert_eq!(boots.len(), 4, "each has a kernel of its own: {boots:?}");
}

/// One machine, its name that of the first; each container has its own.
#[test]
fn containers_of_a_pod_have_names_of_their_own() {
    let mut scene = Scene::new();
    let first = scene.start_sleeper(&["--hostname", "first"]);
    let group = format!("{GROUP}={first}");
    let options = ["--annotation", &group, "--hostname", "second"];
    let second = scene.start_sleeper(&options);
    for (id, name) in [(&first, "first\n"), (&second, "second\n")] {
        scene.exec(id, &[], &["hostname"]).exits(0).prints(name);
    }
    let boot = ["cat", "/proc/sys/kernel/random/boot_id"];
    let boots = [&first, &second].map(|id| scene.exec(id, &[], &boot).exits(0).stdout);
    assert_eq!(boots[0], boots[1]);
}

#[test]
fn lifecycle_under_containerd_1_7() {
    let _containerd = OlderContainerd::start();
    let version = CONTAINERD_1_7.ctr(&["version"]).exits(0);
    assert!(version.stdout.contains("1.7."), "{version:#?}");
    CONTAINERD_1_7
        .ctr(&["image", "import", "/opt/lab/images/busybox.tar"])
        .exits(0);
    let mut scene = Scene::on(CONTAINERD_1_7);
    scene
        .run(&["sh", "-c", "echo out; exit 42"])
        .exits(42)
        .prints("out\n");
    scene
        .run(&["no-such-command"])
        .exits(1)
        .complains(&["executable file not found in $PATH"]);
    let (_, command) = scene.command(BUSYBOX, &["--rm"], &["wc", "-c"]);
    run_with_input(command, b"12345".to_vec())
        .exits(0)
        .prints("5\n");

    let id = scene.start_sleeper(&[]);
    scene
        .exec(&id, &[], &["sh", "-c", "echo in; exit 3"])
        .exits(3)
        .prints("in\n");
    scene.ctr(&["task", "metrics", &id]).exits(0);
    scene.ctr(&["task", "kill", "-s", "KILL", &id]).exits(0);
    scene.await_status(&id, "STOPPED");
    scene.ctr(&["task", "rm", &id]).exits(0).complains(&["137"]);
}
