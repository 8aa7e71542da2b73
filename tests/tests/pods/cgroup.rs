//! The pod's cgroup on the host: where it is, what is in it, what it says.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nacre_tests::cri::messages::LinuxContainerResources;
use nacre_tests::pods::{Pod, PodScene};
use nacre_tests::{PodDir, Systemd, eventually};

use crate::SLEEP;

in_both_modes![a_pod_below_a_slice];

const MIB: u64 = 1 << 20;
/// What a container takes and gives back.
const BALLAST_MIB: u64 = 128;
/// Guest memory comes from the host in pieces of 2 MiB here, and what the guest has
/// freed of such a piece it may use again unseen.
const SLACK_MIB: u64 = 32;

fn read(path: impl AsRef<Path>) -> String {
    let path = path.as_ref();
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// What each process in a pod's cgroup is, by pid.
fn processes(pod: &Pod, group: &Path) -> BTreeMap<u32, &'static str> {
    let monitor = pod.monitor();
    let kind = |pid: u32| {
        // One that is gone has none.
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
        Some(match line.replace('\0', " ") {
            _ if pid == monitor => "monitor",
            line if line.contains("virtiofsd") => "virtiofsd",
            line if line.contains(&pod.id) && line.ends_with("serve ") => "shim",
            _ => "another",
        })
    };
    let pids = read(group.join("cgroup.procs"));
    let pids = pids.lines().map(|pid| pid.parse().unwrap());
    pids.filter_map(|pid| Some((pid, kind(pid)?))).collect()
}

/// Fails the test unless the pod's group is there, and one shim, one monitor and one file server
/// are in it, and nothing else that stays.
#[track_caller]
fn holds_the_pod(pod: &Pod, group: &Path) -> BTreeMap<u32, &'static str> {
    assert_eq!(pod.cgroup(), group);
    let mut all = BTreeMap::new();
    eventually("the pod's processes alone are in its group", || {
        all = processes(pod, group);
        let mut kinds: Vec<&str> = all.values().copied().collect();
        kinds.sort_unstable();
        kinds == ["monitor", "shim", "virtiofsd"]
    });
    all
}

/// kubeadm's default is the systemd driver: the pod's parent is a slice then, and what
/// is in it a scope.
fn a_pod_below_a_slice(scene: &PodScene) {
    let pod = scene.pod("sliced").in_slice().limits(256, 1).run();
    let app = pod.container("app", SLEEP);
    let app = app.resources(|resources| {
        resources.memory_limit_in_bytes = 256 << 20;
        // As a burstable pod's.
        resources.oom_score_adj = 700;
    });
    let app = app.start();
    let group = scope_of(&pod);
    for (pid, kind) in holds_the_pod(&pod, &group) {
        let score = read(format!("/proc/{pid}/oom_score_adj"));
        assert_eq!(score.trim() == "700", kind != "shim", "{kind}: {score}");
    }
    app.exec(&["echo", "here"]).exits(0).prints("here\n");
    let limit = read(group.join("memory.max"));
    assert_ne!(limit.trim(), "max");

    pod.stop();
    pod.remove();
    eventually("the scope is gone", || !group.exists());
    assert!(group.parent().unwrap().exists(), "it is kubelet's");
}

/// Where the scope of a pod below a slice is.
#[track_caller]
fn scope_of(pod: &Pod) -> PathBuf {
    let parent = &pod.config.linux.as_ref().unwrap().cgroup_parent;
    assert!(parent.ends_with(".slice"), "{parent}");
    PathBuf::from(format!(
        "/sys/fs/cgroup{parent}/cri-containerd-{}.scope",
        pod.id
    ))
}

/// Where systemd runs the scope is its own: it makes it and knows of its end, and what limits
/// it has is not lost when systemd writes those of all its units again.
#[test]
fn a_pod_in_a_scope_of_systemd_s() {
    let scene = PodScene::new();
    let systemd = Systemd::running();
    let pod = scene.pod("scoped").in_slice().limits(256, 1).run();
    let limits_of = |memory_mib: i64| LinuxContainerResources {
        memory_limit_in_bytes: memory_mib << 20,
        cpu_quota: 100_000,
        cpu_period: 100_000,
        ..Default::default()
    };
    let app = pod.container("app", SLEEP);
    let app = app
        .resources(|resources| *resources = limits_of(256))
        .start();
    let group = scope_of(&pod);
    holds_the_pod(&pod, &group);
    let unit = group.file_name().unwrap().to_str().unwrap();
    let property = |name| systemd.property(unit, name);
    assert_eq!(property("ActiveState"), "active");
    assert_eq!(
        property("ControlGroup"),
        group.to_str().unwrap()["/sys/fs/cgroup".len()..]
    );

    let limits = || ["memory.max", "cpu.max"].map(|name| read(group.join(name)));
    let before = limits();
    scene.cri().update(&app.id, limits_of(320)).unwrap();
    eventually("the scope has the new limit", || limits()[0] != before[0]);
    let [memory, cpu] = limits();
    assert_eq!(cpu, before[1]);
    assert_eq!(property("MemoryMax"), memory.trim());
    assert!(!cpu.starts_with("max"), "{cpu}");
    systemd.systemctl(&["daemon-reload"]).exits(0);
    assert_eq!(limits(), [memory, cpu]);
    app.exec(&["echo", "here"]).exits(0).prints("here\n");

    pod.stop();
    pod.remove();
    eventually("the scope is gone", || !group.exists());
    assert_eq!(property("LoadState"), "not-found");
}

/// A value in bytes of `memory.stat`, or of a process's status.
fn bytes_of(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let line = line.unwrap_or_else(|| panic!("no {name}"));
    let mut words = line.split_whitespace();
    let number: u64 = words.next().unwrap().parse().unwrap();
    number << if words.next() == Some("kB") { 10 } else { 0 }
}

/// Whether a group's count is what its processes have. The guest's memory is the monitor's; the
/// file server sees the same pages.
fn is_counted(pod: &Pod, group: &Path, processes: &BTreeMap<u32, &str>) -> bool {
    let status = |pid: u32, name: &str| bytes_of(&read(format!("/proc/{pid}/status")), name);
    let anonymous = processes.keys().map(|pid| status(*pid, "RssAnon:"));
    let used = anonymous.sum::<u64>() + status(pod.monitor(), "RssShmem:");
    let stat = read(group.join("memory.stat"));
    let counted = bytes_of(&stat, "anon ") + bytes_of(&stat, "shmem ");
    used.abs_diff(counted) <= used / 10
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
    let processes = holds_the_pod(&pod, &group);
    let current_mib = || {
        read(group.join("memory.current"))
            .trim()
            .parse::<u64>()
            .unwrap()
            / MIB
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
    // The guest goes on meanwhile, but not for long.
    let mut in_a_row = 0;
    eventually("the kernel counts what the processes have", || {
        let is_true = is_counted(&pod, &group, &processes);
        in_a_row = if is_true { in_a_row + 1 } else { 0 };
        in_a_row == 3
    });
    large.exec(&["rm", "/memory/ballast"]).exits(0);
    large.stop(Duration::ZERO);
    large.remove();
    // What the machine has had from the start it keeps.
    eventually("most of the memory is given back", || {
        current_mib() <= full - BALLAST_MIB / 2
    });
}
