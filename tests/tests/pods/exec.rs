//! `ExecSync`, and exec and attach by containerd's streaming server.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use nacre_tests::cri::stream::{STDERR, STDIN, STDOUT};
use nacre_tests::eventually;
use nacre_tests::pods::{Pod, PodScene};
use tonic::Code;

use crate::SLEEP;

#[test]
fn exec_sync_output_code_and_time_limit() {
    let scene = PodScene::new();
    let pod = scene.pod("exec").run();
    let app = pod.container("app", SLEEP).start();
    let said = app
        .sh("echo out; echo err >&2; exit 7")
        .exits(7)
        .prints("out\n");
    assert_eq!(said.stderr, "err\n");
    let large = app.sh("seq 1 100000").exits(0).stdout;
    assert_eq!(large.lines().count(), 100_000);
    assert!(large.ends_with("\n100000\n"));
    let missing = app.try_exec(&["nope"], Duration::ZERO).unwrap_err();
    assert!(
        missing.message().contains("executable file not found"),
        "{missing}"
    );

    let begin = Instant::now();
    let limit = Duration::from_secs(1);
    let late = app.try_exec(&["sleep", "7200"], limit).unwrap_err();
    assert_eq!(late.code(), Code::DeadlineExceeded, "{late}");
    assert!(begin.elapsed() >= limit);
    eventually("the late command is gone", || {
        !app.exec(&["ps", "-o", "args"]).stdout.contains("7200")
    });
    hooks_run_beside_the_container(&scene, &pod);
}

#[test]
fn exec_and_attach_streams() {
    let scene = PodScene::new();
    exec_and_attach_in(&scene.pod("streams").run());
}

/// Streams without terminals, of a container of this pod.
pub fn exec_and_attach_in(pod: &Pod) {
    let script = "while read line; do echo got $line; echo warned >&2; done";
    let app = pod.container("app", &["sh", "-c", script]).stdin().start();

    let mut exec = app.exec_stream(&["sh", "-c", "read a; echo $a; echo $a >&2; exit 4"], false);
    exec.send(STDIN, b"hello\n");
    exec.read_to_end();
    assert_eq!(
        (exec.text(STDOUT), exec.text(STDERR)),
        ("hello\n".into(), "hello\n".into())
    );
    assert_eq!(exec.exit_code(), 4);

    let mut attached = app.attach(false);
    attached.send(STDIN, b"one\n");
    attached.read_until(STDOUT, |text| text == "got one\n");
    attached.read_until(STDERR, |text| text == "warned\n");
    drop(attached);
    let mut attached = app.attach(false);
    attached.send(STDIN, b"two\n");
    attached.read_until(STDOUT, |text| text == "got two\n");
    app.await_logged("stdout", "got one\ngot two\n");

    // Its input ends with the first client.
    let script = "read line; echo got $line; cat; echo no more";
    let once = pod.container("once", &["sh", "-c", script]).stdin_once();
    let once = once.start();
    let mut attached = once.attach(false);
    attached.send(STDIN, b"three\n");
    attached.read_until(STDOUT, |text| text == "got three\n");
    drop(attached);
    assert_eq!(once.await_exit().exit_code, 0);
    assert_eq!(once.logged("stdout"), "got three\nno more\n");
}

/// `postStart` and `preStop` are execs beside the container's process: the one as soon as
/// it runs, the other before it is stopped. One that does not end goes with the
/// container.
fn hooks_run_beside_the_container(scene: &PodScene, pod: &Pod) {
    const HANG: &[&str] = &["sh", "-c", "touch /notes/hangs; sleep 7200"];
    let notes = scene.directory("notes");
    let script = "trap 'echo stopped >> /notes/all; exit 0' TERM; touch /notes/ready; \
                  while true; do sleep 0.1; done";
    let app = pod
        .container("hooked", &["sh", "-c", script])
        .mount(&notes, "/notes")
        .start();
    let note = |text: &str| app.sh(&format!("echo {text} >> /notes/all"));
    note("postStart").exits(0);
    eventually("the trap is set", || notes.join("ready").exists());
    note("preStop").exits(0);
    thread::scope(|threads| {
        let endless = threads.spawn(|| app.try_exec(HANG, Duration::ZERO));
        eventually("a hook hangs", || notes.join("hangs").exists());
        app.stop(Duration::from_secs(60));
        let ended = endless.join().unwrap();
        assert!(ended.map_or(true, |said| said.code != Some(0)));
    });
    assert_eq!(app.status().exit_code, 0);
    let all = fs::read_to_string(notes.join("all")).unwrap();
    assert_eq!(all, "postStart\npreStop\nstopped\n");
}

#[test]
fn terminals_and_their_sizes() {
    let scene = PodScene::new();
    terminals_in(&scene.pod("terminal").run());
}

/// Terminals of a container and of an exec in it.
pub fn terminals_in(pod: &Pod) {
    let script = "stty size; trap 'stty size' WINCH; echo ready; while true; do sleep 0.1; done";
    let app = pod.container("terminal", &["sh", "-c", script]).tty();
    let app = app.start();
    // Its trap is set: a size that comes before goes unnoticed.
    app.await_logged("stdout", "ready");
    let mut attached = app.attach(true);
    attached.resize(101, 33);
    attached.read_until(STDOUT, |text| text.contains("33 101"));

    let mut exec = app.exec_stream(&["sh"], true);
    exec.resize(120, 40);
    exec.read_until(STDOUT, |text| text.contains('#'));
    let mut asked = 0;
    eventually("the shell's terminal has its size", || {
        asked += 1;
        exec.send(STDIN, b"stty size; echo asked $?\n");
        let text = exec.read_until(STDOUT, |text| text.matches("asked 0").count() == asked);
        text.contains("40 120\r\n")
    });
    exec.send(STDIN, b"tty; exit 6\n");
    exec.read_to_end();
    assert!(
        exec.text(STDOUT).contains("/dev/pts/"),
        "{}",
        exec.text(STDOUT)
    );
    assert_eq!(exec.exit_code(), 6);
}
