//! Streams that go to files and logging programs of the host.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nacre_tests::{CONTAINERD_2, Scene, eventually};

/// A write that fails, or a signal for it, is told apart.
const SCRIPT: &str = "echo out; echo err >&2; seq 1 100000 || exit 9; exit 7";

/// What it prints but for its error.
fn output() -> String {
    let lines = (1..=100_000).map(|number| format!("{number}\n"));
    format!("out\n{}", lines.collect::<String>())
}

/// Runs [`SCRIPT`] with its output going to `uri`.
fn run_to(scene: &mut Scene, uri: &str) {
    let id = scene.start(&["--log-uri", uri], &["sh", "-c", SCRIPT]);
    scene.await_status(&id, "STOPPED");
    let said = scene.ctr(&["task", "rm", &id]).exits(0);
    said.complains(&["exit with non-zero exit code 7"]);
}

fn logger(path: &str, script: &str) -> String {
    fs::write(path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    format!("binary://{path}")
}

#[test]
fn file_gets_both_outputs() {
    let mut scene = Scene::new();
    let path = "/tmp/e2e-log";
    let _ = fs::remove_file(path);
    run_to(&mut scene, &format!("file://{path}"));
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains("err\n"), "no error in {} bytes", text.len());
    // In the middle of a line, as likely as not.
    let rest = text.replacen("err\n", "", 1);
    assert!(rest == output(), "{} bytes", text.len());
    fs::remove_file(path).unwrap();
}

#[test]
fn program_gets_the_outputs_apart() {
    let mut scene = Scene::new();
    let directory = Path::new("/tmp/e2e-logger");
    let _ = fs::remove_dir_all(directory);
    fs::create_dir(directory).unwrap();
    let program = logger(
        "/tmp/e2e-logger/program",
        "cd /tmp/e2e-logger; echo $1 $2 $CONTAINER_NAMESPACE > for\n\
         exec 5>&-\ncat <&4 > err & cat <&3 > out; wait; touch done",
    );
    run_to(&mut scene, &format!("{program}?tag=one"));
    let file = |name: &str| fs::read_to_string(directory.join(name)).unwrap();
    eventually("the logger has ended", || directory.join("done").exists());
    assert_eq!(file("for"), "tag one default\n");
    assert_eq!(file("err"), "err\n");
    let out = file("out");
    assert!(out == output(), "{} bytes", out.len());
    fs::remove_dir_all(directory).unwrap();
}

/// It is containerd's client's: it has all the time it needs for what it has read.
#[test]
fn program_is_not_in_the_pod_s_cgroup_and_outlives_it() {
    let mut scene = Scene::new();
    let directory = Path::new("/tmp/e2e-logger-outlives");
    let _ = fs::remove_dir_all(directory);
    fs::create_dir(directory).unwrap();
    let program = logger(
        "/tmp/e2e-logger-outlives/program",
        "cd /tmp/e2e-logger-outlives; cat /proc/self/cgroup > group\n\
         exec 5>&-\ncat <&4 > err & cat <&3 > out; wait\n\
         while [ -d /sys/fs/cgroup/default/$CONTAINER_ID ]; do sleep 0.1; done; touch done",
    );
    run_to(&mut scene, &program);
    let file = |name: &str| fs::read_to_string(directory.join(name)).unwrap();
    eventually("the logger has seen the group's end", || {
        directory.join("done").exists()
    });
    assert!(file("out") == output(), "{} bytes", file("out").len());
    assert_eq!(file("group"), CONTAINERD_2.cgroup());
    fs::remove_dir_all(directory).unwrap();
}

/// The container's output has nowhere to go; the container itself goes on.
#[test]
fn program_that_dies_takes_no_container_with_it() {
    let mut scene = Scene::new();
    let path = "/tmp/e2e-logger-dies";
    let program = logger(path, "exec 5>&-; read line <&3; touch $0.dead; exit 1");
    let go_on =
        "n=0; while :; do echo $n || exit 8; n=$((n + 1)); echo $n > /written; sleep 0.1; done";
    let script = SCRIPT.replace("exit 7", go_on);
    let id = scene.start(&["--log-uri", &program], &["sh", "-c", &script]);
    let dead = format!("{path}.dead");
    eventually("the logger has died", || Path::new(&dead).exists());
    // It writes on, to nobody.
    let written = || -> u64 {
        let said = scene.exec(&id, &[], &["cat", "/written"]);
        said.stdout.trim().parse().unwrap_or_default()
    };
    eventually("what was lost is behind it", || written() > 0);
    let before = written();
    eventually("it writes on", || written() > before + 3);
    assert_eq!(scene.status(&id).as_deref(), Some("RUNNING"));
    scene.ctr(&["task", "kill", "-s", "KILL", &id]).exits(0);
    scene.await_status(&id, "STOPPED");
    for file in [path, &dead] {
        fs::remove_file(file).unwrap();
    }
}

#[test]
fn program_that_is_not_there_is_named() {
    let mut scene = Scene::new();
    let (_, mut command) = scene.command(
        nacre_tests::BUSYBOX,
        &["-d", "--log-uri", "binary:///none/logger"],
        &["true"],
    );
    let said: nacre_tests::Said = command.output().unwrap().into();
    said.exits(1).complains(&["/none/logger", "No such file"]);
}
