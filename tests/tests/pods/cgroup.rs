//! The pod's cgroup on the host: where it is, what is in it, what it says.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nacre_tests::cri::messages::LinuxContainerResources;
use nacre_tests::pods::{Pod, PodScene};
use nacre_tests::{PodDir, eventually};

use crate::SLEEP;

in_both_modes![a_pod_below_a_slice];

const MIB: u64 = 1 << 20;
/// What a container takes and gives back.
const BALLAST_MIB: u64 = 128;
/// Guest memory comes from the host in pieces of 2 MiB here, and what the guest has
/// freed of such a piece it may use again unseen.
const SLACK_MIB: u64 = 32;

/// Names of the processes in a pod's cgroup.
fn processes(group: &Path) -> Vec<String> {
    let pids = fs::read_to_string(group.join("cgroup.procs")).unwrap();
    let names = pids
        .lines()
        .map(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap());
    names.map(|name| name.trim().to_owned()).collect()
}

/// Fails the test unless the pod's group is there, with the monitor and the file server.
#[track_caller]
fn holds_the_pod(pod: &Pod, group: &Path) {
    assert_eq!(pod.cgroup(), group);
    let names = processes(group);
    assert!(names.iter().any(|name| name == "virtiofsd"), "{names:?}");
}

/// kubeadm's default is the systemd driver: the pod's parent is a slice then, and what
/// is in it a scope.
fn a_pod_below_a_slice(scene: &PodScene) {
    let pod = scene.pod("sliced").in_slice().limits(256, 1).run();
    let app = pod.container("app", SLEEP);
    let app = app.resources(|resources| resources.memory_limit_in_bytes = 256 << 20);
    let app = app.start();
    let parent = pod.config.linux.as_ref().unwrap().cgroup_parent.clone();
    assert!(parent.ends_with(".slice"), "{parent}");
    let parent = PathBuf::from(format!("/sys/fs/cgroup{parent}"));
    let group = parent.join(format!("cri-containerd-{}.scope", pod.id));
    holds_the_pod(&pod, &group);
    app.exec(&["echo", "here"]).exits(0).prints("here\n");
    let limit = fs::read_to_string(group.join("memory.max")).unwrap();
    assert_ne!(limit.trim(), "max");

    pod.stop();
    pod.remove();
    eventually("the scope is gone", || !group.exists());
    assert!(parent.exists(), "it is kubelet's");
}

/// What a container uses is in the host's count, and no longer when its machine has
/// shrunk with it.
#[test]
fn the_host_s_count_of_memory_is_true() {
    let scene = PodScene::new();
    let mut kubelet = PodDir::new("weighed");
    let memory = kubelet.memory("memory", "size=160m,mode=1777");
    let pod = scene.pod("weighed").limits(64, 1).run();
    let container = |name: &str, limit_mib: i64| {
        let container = pod.container(name, SLEEP).mount(&memory, "/memory");
        let limit = move |resources: &mut LinuxContainerResources| {
            resources.memory_limit_in_bytes = limit_mib << 20;
        };
        container.resources(limit).start()
    };
    let _small = container("small", 64);
    let large = container("large", 192);
    let linux = pod.config.linux.as_ref().unwrap();
    let group = PathBuf::from(format!("/sys/fs/cgroup{}/{}", linux.cgroup_parent, pod.id));
    holds_the_pod(&pod, &group);
    let current_mib = || {
        let text = fs::read_to_string(group.join("memory.current")).unwrap();
        text.trim().parse::<u64>().unwrap() / MIB
    };

    large.exec(&["true"]).exits(0);
    let before = current_mib();
    let fill = format!("dd if=/dev/zero of=/memory/ballast bs=1M count={BALLAST_MIB}");
    large.sh(&fill).exits(0);
    let full = current_mib();
    let grown = full.saturating_sub(before);
    assert!(
        (BALLAST_MIB - SLACK_MIB..=BALLAST_MIB + SLACK_MIB).contains(&grown),
        "{before} to {full} MiB"
    );
    large.exec(&["rm", "/memory/ballast"]).exits(0);
    large.stop(Duration::ZERO);
    large.remove();
    // What the machine has had from the start it keeps.
    eventually("most of the memory is given back", || {
        current_mib() <= full - BALLAST_MIB / 2
    });
}
