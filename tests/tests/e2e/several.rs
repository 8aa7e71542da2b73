//! Several machines at once, and an older containerd.

use std::process::Stdio;

use nacre_tests::{BUSYBOX, CONTAINERD_1_7, Scene, run, run_with_input};

#[test]
fn four_machines_at_once() {
    let mut scene = Scene::new();
    let clients: Vec<_> = (0..4)
        .map(|number| {
            let script =
                format!("echo {number}; cat /proc/sys/kernel/random/boot_id; exit {number}");
            let (_, mut command) = scene.command(BUSYBOX, &["--rm"], &["sh", "-c", &script]);
            command.stdin(Stdio::null()).stdout(Stdio::piped());
            command.spawn().unwrap()
        })
        .collect();
    let mut boots = std::collections::BTreeSet::new();
    for (number, client) in (0..).zip(clients) {
        let output = client.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(number));
        let text = String::from_utf8(output.stdout).unwrap();
        let (first, boot) = text.split_once('\n').unwrap();
        assert_eq!(first, number.to_string());
        boots.insert(boot.to_owned());
    }
    assert_eq!(boots.len(), 4, "each has a kernel of its own: {boots:?}");
}

/// containerd 1.7 for as long as this lives.
struct Older;

impl Older {
    fn start() -> Self {
        run("lab-containerd", &["1.7", "start"]).exits(0);
        Self
    }
}

impl Drop for Older {
    fn drop(&mut self) {
        run("lab-containerd", &["1.7", "stop"]);
    }
}

#[test]
fn lifecycle_under_containerd_1_7() {
    let _containerd = Older::start();
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
