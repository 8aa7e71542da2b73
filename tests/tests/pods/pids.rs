//! PID namespaces: one for each container, or one for the pod.

use nacre_tests::cri::messages::ContainerState;
use nacre_tests::eventually;
use nacre_tests::pods::{Pod, PodScene};

use crate::SLEEP;

#[test]
fn containers_do_not_see_each_other() {
    let scene = PodScene::new();
    pids_are_apart_in(&scene.pod("apart").run());
}

/// Each container is a world of its own.
pub fn pids_are_apart_in(pod: &Pod) {
    let alone = pod.container("alone", SLEEP).start();
    let _other = pod.container("other", &["sleep", "7200"]).start();
    let seen = alone.exec(&["ps", "-o", "pid,args"]).exits(0).stdout;
    assert!(seen.contains("1 sleep 3600"), "{seen}");
    assert!(!seen.contains("7200"), "{seen}");
}

#[test]
fn containers_share_the_pod_s_pids() {
    let scene = PodScene::new();
    pids_are_shared_in(&scene.pod("together").shared_pids().run());
}

/// `shareProcessNamespace`: PID 1 is pause, which collects orphans; one
/// container's end leaves the others alone.
pub fn pids_are_shared_in(pod: &Pod) {
    let one = pod.container("one", SLEEP).start();
    // A grandchild in the background: the container's end is its end, too.
    let script = "sleep 7201 & exec sleep 7200";
    let two = pod.container("two", &["sh", "-c", script]).start();
    let processes = || one.exec(&["ps", "-o", "pid,stat,args"]).exits(0).stdout;
    eventually("the other container's processes are seen", || {
        let seen = processes();
        seen.contains("sleep 7200") && seen.contains("sleep 7201")
    });
    one.exec(&["cat", "/proc/1/comm"])
        .exits(0)
        .prints("pause\n");
    one.sh("ls -A /proc/1/root/ | wc -l").prints("0\n");

    // The middle process ends before its child, which is nobody's then.
    one.sh("(sleep 0.2 &)").exits(0);
    eventually("the orphan is gone without a trace", || {
        let seen = processes();
        !seen.contains("sleep 0.2") && !seen.contains(" Z ")
    });

    let find = "ps -o pid,args | awk '$2 == \"sleep\" && $3 == 7200 {print $1}'";
    one.sh(&format!("kill -9 $({find})")).exits(0);
    assert_eq!(two.await_exit().exit_code, 137);
    eventually("what it left is gone", || {
        !processes().contains("sleep 7201")
    });
    assert_eq!(one.state(), ContainerState::Running);
    assert!(pod.is_ready());
    let three = pod.container("two", SLEEP).attempt(1).start();
    three
        .exec(&["cat", "/proc/1/comm"])
        .exits(0)
        .prints("pause\n");
}
