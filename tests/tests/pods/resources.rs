//! Sizes and limits: of the machine, of a container, changed while it runs.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use nacre_tests::cri::messages::{ContainerState, HugepageLimit, LinuxContainerResources};
use nacre_tests::pods::{Pod, PodContainer, PodScene};
use nacre_tests::{PodDir, eventually};

use crate::SLEEP;

in_both_modes![the_machine_is_as_large_as_the_pod];

const MIB: i64 = 1 << 20;

/// A number the guest tells.
fn number(container: &PodContainer, script: &str) -> i64 {
    let said = container.sh(script).exits(0);
    said.stdout
        .trim()
        .parse()
        .unwrap_or_else(|_| panic!("{said:#?}"))
}

const TOTAL_KIB: &str = "awk '/MemTotal/ {print $2}' /proc/meminfo";
const MEMORY_MAX: &str = "cat /sys/fs/cgroup/memory.max";

/// kubelet tells with the sandbox what its containers may use together.
fn the_machine_is_as_large_as_the_pod(scene: &PodScene) {
    let pod = scene.pod("sized").limits(448, 2).run();
    let limit = |resources: &mut LinuxContainerResources| {
        resources.memory_limit_in_bytes = 224 * MIB;
        (resources.cpu_quota, resources.cpu_period) = (100_000, 100_000);
    };
    let one = pod.container("one", SLEEP).resources(limit).start();
    let two = pod.container("two", SLEEP).resources(limit).start();
    for container in [&one, &two] {
        assert_eq!(number(container, "nproc"), 2);
        let total_mib = number(container, TOTAL_KIB) / 1024;
        // 448 and the reserve, less what the kernel keeps for itself.
        assert!((448..=512).contains(&total_mib), "{total_mib} MiB");
        assert_eq!(number(container, MEMORY_MAX), 224 * MIB);
        container
            .sh("cat /sys/fs/cgroup/cpu.max")
            .prints("100000 100000\n");
    }
}

/// The kernel kills within the container that has no memory left.
#[test]
fn one_container_runs_out_of_memory() {
    let scene = PodScene::new();
    let pod = scene.pod("hungry").run();
    let sibling = pod.container("sibling", SLEEP).start();
    let hungry = pod
        .container("hungry", &["sh", "-c", "exec tail /dev/zero"])
        .resources(|resources| resources.memory_limit_in_bytes = 32 * MIB)
        .start();
    let ended = hungry.await_exit();
    assert_eq!(ended.exit_code, 137);
    eventually("the reason is told", || {
        hungry.status().reason == "OOMKilled"
    });
    assert_eq!(sibling.state(), ContainerState::Running);
    sibling.exec(&["echo", "alive"]).exits(0).prints("alive\n");
    assert!(pod.is_ready());
}

/// The machine has no memory left, and no container a limit of its own. Scores are
/// those of a Guaranteed pod's containers, behind which the agent would be first.
#[test]
fn the_machine_runs_out_of_memory() {
    let scene = PodScene::new();
    let pod = scene.pod("exhausted").run();
    let guaranteed = |resources: &mut LinuxContainerResources| resources.oom_score_adj = -997;
    let sibling = pod
        .container("sibling", SLEEP)
        .resources(guaranteed)
        .start();
    let hungry = pod
        .container("hungry", &["sh", "-c", "exec tail /dev/zero"])
        .resources(guaranteed)
        .start();
    assert_eq!(hungry.await_exit().exit_code, 137);
    eventually("the reason is told", || {
        hungry.status().reason == "OOMKilled"
    });
    sibling
        .exec(&["cat", "/proc/self/oom_score_adj"])
        .exits(0)
        .prints("-997\n");
    assert_eq!(sibling.state(), ContainerState::Running);
    assert!(pod.is_ready());

    // One that must not be killed leaves nobody to kill in the end. containerd removes
    // what is left of the pod by itself, the log included.
    let log = Command::new("nacre")
        .args(["logs", "-f", &pod.id])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let _immortal = pod
        .container("immortal", &["sh", "-c", "exec tail /dev/zero"])
        .resources(|resources| resources.oom_score_adj = -1000)
        .start();
    pod.await_not_ready();
    let log = log.wait_with_output().unwrap().stdout;
    let log = String::from_utf8_lossy(&log);
    assert!(log.contains("deadlocked on memory"), "{log}");
}

/// Processor time a container has had.
const USAGE_USEC: &str = "awk '/^usage_usec/ {print $2}' /sys/fs/cgroup/cpu.stat";

/// Shares are between the containers of a pod; a cpuset names processors of the host,
/// on which the machine runs.
#[test]
fn shares_and_processors() {
    let scene = PodScene::new();
    let pod = scene.pod("shared").limits(256, 1).run();
    let busy = &["sh", "-c", "while :; do :; done"];
    let [many, few] = [("many", 2048), ("few", 256)].map(|(name, shares)| {
        let container = pod.container(name, busy);
        let container = container.resources(|resources| {
            resources.cpu_shares = shares;
            resources.cpuset_cpus = "2".into();
        });
        container.start()
    });
    let cpus_on_host = || on_host(&pod, "cpuset.cpus").trim().to_owned();
    assert_eq!(cpus_on_host(), "2");
    let monitor = fs::read_to_string(format!("/proc/{}/status", pod.monitor())).unwrap();
    assert!(monitor.contains("Cpus_allowed_list:\t2\n"), "{monitor}");
    many.sh("cat /sys/fs/cgroup/cpu.weight /sys/fs/cgroup/cpuset.cpus")
        .prints("79\n\n");

    let usage = || [&many, &few].map(|container| number(container, USAGE_USEC));
    let before = usage();
    let spent = || {
        let now = usage();
        [now[0] - before[0], now[1] - before[1]]
    };
    eventually("four seconds of work", || {
        spent().iter().sum::<i64>() > 4_000_000
    });
    // 79 to 10 by weight; asking takes time, too.
    let [much, little] = spent();
    assert!(much > 3 * little, "{much} and {little} usec");

    let update = |container: &PodContainer, cpus: &str| {
        let cpuset_cpus = cpus.to_owned();
        let resources = LinuxContainerResources {
            cpuset_cpus,
            ..Default::default()
        };
        scene.cri().update(&container.id, resources).unwrap();
    };
    update(&few, "1");
    assert_eq!(cpus_on_host(), "1-2", "those of both");
    update(&many, "1");
    assert_eq!(cpus_on_host(), "1");
    let free = pod.container("free", SLEEP).start();
    assert_ne!(cpus_on_host(), "1", "one may run anywhere");
    free.exec(&["true"]).exits(0);
}

/// Huge pages are memory of the machine beside the limit, a volume of them is the
/// guest's own.
#[test]
fn huge_pages() {
    let scene = PodScene::new();
    let mut kubelet = PodDir::new("huge");
    let volume = kubelet.huge_pages("huge", "pagesize=2M");
    let pod = scene.pod("huge").limits(128, 1).run();
    let usr = Path::new("/usr");
    // As kubelet sends it: a limit for each size of the host's.
    let limits = |pages: u64| {
        move |resources: &mut LinuxContainerResources| {
            resources.memory_limit_in_bytes = 64 * MIB;
            let of = |page_size: &str, limit| HugepageLimit {
                page_size: page_size.into(),
                limit,
            };
            resources.hugepage_limits = vec![of("2MB", pages << 21), of("1GB", 0)];
        }
    };
    let [large, small] = [("large", 16), ("small", 2)].map(|(name, pages)| {
        let container = pod.container(name, SLEEP).resources(limits(pages));
        let container = container.mount(&volume, "/huge");
        container.mount_read_only(usr, "/run/usr").start()
    });
    let pages = |what: &str| {
        number(
            &large,
            &format!("awk '/^HugePages_{what}/ {{print $2}}' /proc/meminfo"),
        )
    };
    assert_eq!((pages("Total"), pages("Free")), (18, 18));
    let total_mib = number(&large, TOTAL_KIB) / 1024;
    assert!(total_mib > 128 + 36, "{total_mib} MiB");
    let allocate = |container: &PodContainer, file: &str, pages: u64| {
        container.sh(&format!(
            "exec /run/usr/lib64/ld-linux-x86-64.so.2 --library-path \
             /run/usr/lib/x86_64-linux-gnu /run/usr/bin/fallocate -l {} /huge/{file}",
            pages << 21
        ))
    };
    allocate(&large, "file", 4).exits(0);
    assert_eq!(pages("Free"), 14);
    small.sh("wc -c < /huge/file").exits(0).prints("8388608\n");
    // More than its own limit, though the pool has them.
    let refused = allocate(&small, "more", 5).exits(1);
    refused.complains(&["No space left on device"]);
    small.sh("rm /huge/*").exits(0);
    assert_eq!(pages("Free"), 18);
    allocate(&small, "own", 2).exits(0);
    let mut more = LinuxContainerResources::default();
    limits(5)(&mut more);
    scene.cri().update(&small.id, more).unwrap();
    assert_eq!((pages("Total"), pages("Free")), (21, 19));
    allocate(&small, "more", 3).exits(0);
    small.sh("rm /huge/*").exits(0);
    assert_eq!(
        fs::read_dir(&volume).unwrap().count(),
        0,
        "it is the guest's"
    );
    small.stop(std::time::Duration::ZERO);
    small.remove();
    eventually("its pages are given back", || pages("Total") == 16);
}

#[test]
fn processes_are_limited() {
    let scene = PodScene::new();
    let pod = scene.pod("forking").run();
    let app = pod
        .container("app", SLEEP)
        .resources(|resources| {
            resources.unified.insert("pids.max".into(), "8".into());
        })
        .start();
    app.sh("cat /sys/fs/cgroup/pids.max").prints("8\n");
    let said = app.sh("for i in 1 2 3 4 5 6 7 8 9; do sleep 30 & done");
    assert!(said.stderr.contains("can't fork"), "{said:#?}");
}

/// A file of a pod's cgroup on the host.
fn on_host(pod: &Pod<'_>, file: &str) -> String {
    let linux = pod.config.linux.as_ref().unwrap();
    let group = format!("/sys/fs/cgroup{}/{}", linux.cgroup_parent, pod.id);
    fs::read_to_string(format!("{group}/{file}")).unwrap()
}

/// A value in bytes of `memory.stat`, or of a process's status.
fn bytes_of(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let mut words = line
        .unwrap_or_else(|| panic!("no {name}"))
        .split_whitespace();
    let number: u64 = words.next().unwrap().parse().unwrap();
    number << if words.next() == Some("kB") { 10 } else { 0 }
}

/// Shim, monitor and file server: what they use is what the kernel counts.
#[test]
fn the_pod_s_cgroup_counts_all_of_it() {
    let scene = PodScene::new();
    let pod = scene.pod("counted").limits(256, 1).run();
    let app = pod.container("app", SLEEP);
    let app = app.mount_read_only(Path::new("/usr"), "/run/usr").start();
    app.exec(&["test", "-d", "/run/usr/bin"]).exits(0);

    let monitor = pod.monitor();
    let of = |pid: &str, file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    let procs = on_host(&pod, "cgroup.procs");
    let mut kinds: Vec<&str> = procs
        .lines()
        .map(|pid| match of(pid, "cmdline").replace('\0', " ") {
            _ if pid == monitor.to_string() => "monitor",
            line if line.contains("virtiofsd") => "virtiofsd",
            line if line.contains(&pod.id) && line.ends_with("serve ") => "shim",
            line => panic!("{line} is not the pod's"),
        })
        .collect();
    kinds.sort_unstable();
    kinds.dedup();
    assert_eq!(kinds, ["monitor", "shim", "virtiofsd"]);

    // The guest's memory is the monitor's; the file server sees the same pages.
    let used = || {
        let anonymous = procs
            .lines()
            .map(|pid| bytes_of(&of(pid, "status"), "RssAnon:"));
        let shared = bytes_of(&of(&monitor.to_string(), "status"), "RssShmem:");
        anonymous.sum::<u64>() + shared
    };
    let counted = || {
        let stat = on_host(&pod, "memory.stat");
        bytes_of(&stat, "anon ") + bytes_of(&stat, "shmem ")
    };
    let current = || -> u64 { on_host(&pod, "memory.current").trim().parse().unwrap() };
    let before = current();
    app.sh("dd if=/dev/zero of=/dev/shm/ballast bs=1M count=48 2>&1")
        .exits(0);
    // The guest uses memory meanwhile, too.
    eventually("both agree within a tenth", || {
        let (used, counted) = (used(), counted());
        used.abs_diff(counted) <= used / 10
    });
    assert!(
        current() >= before + (40 << 20),
        "{before} then {}",
        current()
    );
    assert!(current() >= counted());
}

/// In-place resize, up and down. The machine grows with its containers.
#[test]
fn limits_change_while_a_container_runs() {
    let scene = PodScene::new();
    let pod = scene.pod("resized").limits(128, 1).run();
    let limits = |mib: i64, quota: i64| LinuxContainerResources {
        memory_limit_in_bytes: mib * MIB,
        cpu_quota: quota,
        cpu_period: 100_000,
        ..Default::default()
    };
    let app = pod
        .container("app", SLEEP)
        .resources(|resources| *resources = limits(128, 50_000))
        .start();
    let before_kib = number(&app, TOTAL_KIB);

    scene.cri().update(&app.id, limits(384, 80_000)).unwrap();
    assert_eq!(number(&app, MEMORY_MAX), 384 * MIB);
    app.sh("cat /sys/fs/cgroup/cpu.max")
        .prints("80000 100000\n");
    let grown_kib = number(&app, TOTAL_KIB);
    assert!(
        grown_kib >= before_kib + 200 * 1024,
        "{before_kib} to {grown_kib} KiB"
    );

    scene.cri().update(&app.id, limits(96, 20_000)).unwrap();
    assert_eq!(number(&app, MEMORY_MAX), 96 * MIB);
    app.sh("cat /sys/fs/cgroup/cpu.max")
        .prints("20000 100000\n");
    assert!(number(&app, TOTAL_KIB) < grown_kib);
    assert_eq!(app.state(), ContainerState::Running);
}
