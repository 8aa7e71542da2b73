//! CRI's log files.

use nacre_tests::pods::{LogLine, Pod, PodScene};

#[test]
fn log_lines_have_streams_and_parts() {
    let scene = PodScene::new();
    log_lines_in(&scene.pod("logs").run());
}

/// A line longer than containerd's buffer comes in parts; streams are told apart.
pub fn log_lines_in(pod: &Pod) {
    let script = "echo out; echo err >&2; head -c 40000 /dev/zero | tr '\\0' x; echo; printf end";
    let app = pod.container("lines", &["sh", "-c", script]).start();
    assert_eq!(app.await_exit().exit_code, 0);
    let log = app.log();
    let line = |stream: &str, full, text: &str| LogLine {
        stream: stream.into(),
        full,
        text: text.into(),
    };
    assert_eq!(log.iter().filter(|line| line.stream == "stderr").count(), 1);
    assert!(log.contains(&line("stderr", true, "err")));
    let stdout: Vec<_> = log.iter().filter(|line| line.stream == "stdout").collect();
    assert_eq!(stdout[0], &line("stdout", true, "out"));
    let long = app.logged("stdout");
    assert_eq!(long.len(), "out\n".len() + 40_001 + "end".len());
    let tags: Vec<bool> = stdout.iter().map(|line| line.full).collect();
    assert_eq!(tags, [true, false, false, true, false], "16 KiB a part");
}

#[test]
fn logs_are_reopened() {
    let scene = PodScene::new();
    logs_are_reopened_in(&scene, &scene.pod("rotated").run());
}

/// Rotation: the file is moved away and opened anew while the container writes.
pub fn logs_are_reopened_in(scene: &PodScene, pod: &Pod) {
    let script = "i=0; while true; do i=$((i+1)); echo line $i; sleep 0.05; done";
    let app = pod.container("rotated", &["sh", "-c", script]).start();
    app.await_logged("stdout", "line 3\n");
    let rotated = app.log.with_extension("rotated");
    std::fs::rename(&app.log, &rotated).unwrap();
    scene.cri().reopen_log(&app.id).unwrap();
    app.await_logged("stdout", "line ");
    let last_number = |text: &str| -> u32 {
        let line = text.lines().last().unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    let old = std::fs::read_to_string(&rotated).unwrap();
    let new = app.logged("stdout");
    let first = new.lines().next().unwrap();
    assert_eq!(
        first,
        format!("line {}", last_number(old.trim_end()) + 1),
        "no line is lost"
    );
}
