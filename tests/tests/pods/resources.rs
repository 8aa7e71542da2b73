//! Sizes and limits: of the machine, of a container, changed while it runs.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use nacre_tests::cri::messages::{ContainerState, HugepageLimit, LinuxContainerResources};
use nacre_tests::pods::{Pod, PodContainer, PodScene};
use nacre_tests::{PodDir, eventually, run};

use crate::SLEEP;

in_both_modes![
    the_machine_is_as_large_as_the_pod,
    vcpus_come_and_go_with_the_limits,
];

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

#[test]
fn one_container_runs_out_of_memory() {
    let scene = PodScene::new();
    one_runs_out_of_memory_in(&scene.pod("hungry").run());
}

/// The kernel kills within the container that has no memory left.
pub fn one_runs_out_of_memory_in(pod: &Pod) {
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

/// The last two processors of the host; of one with a single processor it is both.
fn last_processors() -> [usize; 2] {
    let last = std::thread::available_parallelism().unwrap().get() - 1;
    [last.saturating_sub(1), last]
}

/// Shares are between the containers of a pod; a cpuset names processors of the host,
/// on which the machine runs.
#[test]
fn shares_and_processors() {
    let [first, last] = last_processors();
    let scene = PodScene::new();
    let pod = scene.pod("shared").limits(256, 1).run();
    let busy = &["sh", "-c", "while :; do :; done"];
    let [many, few] = [("many", 2048), ("few", 256)].map(|(name, shares)| {
        let container = pod.container(name, busy);
        let container = container.resources(|resources| {
            resources.cpu_shares = shares;
            resources.cpuset_cpus = last.to_string();
        });
        container.start()
    });
    let cpus = pod.cgroup().join("cpuset.cpus");
    let on_host = || fs::read_to_string(&cpus).unwrap().trim().to_owned();
    assert_eq!(on_host(), last.to_string());
    let monitor = fs::read_to_string(format!("/proc/{}/status", pod.monitor())).unwrap();
    let allowed = format!("Cpus_allowed_list:\t{last}\n");
    assert!(monitor.contains(&allowed), "{monitor}");
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

    let update = |container: &PodContainer| {
        let cpuset_cpus = first.to_string();
        let resources = LinuxContainerResources {
            cpuset_cpus,
            ..Default::default()
        };
        scene.cri().update(&container.id, resources).unwrap();
    };
    update(&few);
    let differ = first < last;
    if differ {
        assert_eq!(on_host(), format!("{first}-{last}"), "those of both");
    }
    update(&many);
    assert_eq!(on_host(), first.to_string());
    let free = pod.container("free", SLEEP).start();
    if differ {
        assert_ne!(on_host(), first.to_string(), "one may run anywhere");
    }
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
fn requests_and_a_limit_of_processes() {
    let scene = PodScene::new();
    let pod = scene.pod("burstable").run();
    requests_without_limits(&pod);
    processes_are_limited(&pod);
}

/// A container with a limit of its own.
pub fn processes_are_limited(pod: &Pod) {
    let app = pod
        .container("forks", SLEEP)
        .resources(|resources| {
            resources.unified.insert("pids.max".into(), "8".into());
        })
        .start();
    app.sh("cat /sys/fs/cgroup/pids.max").prints("8\n");
    let said = app.sh("for i in 1 2 3 4 5 6 7 8 9; do sleep 30 & done");
    assert!(said.stderr.contains("can't fork"), "{said:#?}");
}

/// Kubernetes' requests are shares and a score; without limits nothing else is said of a
/// pod's size, and its machine is as large as nacre.toml has it.
fn requests_without_limits(pod: &Pod) {
    let app = pod
        .container("requests", SLEEP)
        .resources(|resources| (resources.cpu_shares, resources.oom_score_adj) = (512, 900))
        .start();
    let group = "cd /sys/fs/cgroup && cat cpu.weight cpu.max memory.max";
    app.sh(group).exits(0).prints("20\nmax 100000\nmax\n");
    app.exec(&["cat", "/proc/self/oom_score_adj"])
        .prints("900\n");
    assert_eq!(number(&app, "nproc"), 1);
    let total_mib = number(&app, TOTAL_KIB) / 1024;
    assert!((448..=512).contains(&total_mib), "{total_mib} MiB");
}

/// What a container under load does: memory taken and given back, and processor time
/// without end. It ends with the first try that fails.
const LOAD: &str = "while dd if=/dev/zero of=/dev/null bs=32M count=1 2>/dev/null; do \
                    echo >> /dev/shm/rounds; done; exit 1";

#[test]
fn limits_change_while_a_container_runs() {
    limits_change_in(&PodScene::new());
}

/// In-place resize, up and down, under load. The machine grows with its containers.
pub fn limits_change_in(scene: &PodScene) {
    let pod = scene.pod("resized").limits(128, 1).run();
    let limits = |mib: i64, quota: i64| LinuxContainerResources {
        memory_limit_in_bytes: mib * MIB,
        cpu_quota: quota,
        cpu_period: 100_000,
        ..Default::default()
    };
    let app = pod
        .container("app", &["sh", "-c", LOAD])
        .resources(|resources| *resources = limits(128, 50_000))
        .start();
    let goes_on = || {
        let rounds = || number(&app, "wc -l < /dev/shm/rounds");
        eventually("the load runs", || {
            app.sh("[ -e /dev/shm/rounds ]").code == Some(0)
        });
        let before = rounds();
        eventually("the load goes on", || rounds() > before);
    };
    goes_on();
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
    goes_on();

    scene.cri().update(&app.id, limits(256, 80_000)).unwrap();
    assert_eq!(number(&app, MEMORY_MAX), 256 * MIB);
    goes_on();
    app.sh("grep oom_kill /sys/fs/cgroup/memory.events")
        .prints("oom_kill 0\n");
    assert_eq!(app.state(), ContainerState::Running);
}

/// In-place resize beyond the vCPUs of the boot and back, under load. The lab has one
/// processor: how many the guest has is looked at, not how fast they are.
fn vcpus_come_and_go_with_the_limits(scene: &PodScene) {
    let pod = scene.pod("wider").limits(256, 1).run();
    let limits = |cpus: i64| LinuxContainerResources {
        memory_limit_in_bytes: 128 * MIB,
        cpu_quota: cpus * 100_000,
        cpu_period: 100_000,
        ..Default::default()
    };
    let app = pod
        .container("app", &["sh", "-c", LOAD])
        .resources(|resources| *resources = limits(1))
        .start();
    let shown = || {
        let table = run("nacre", &["ps"]).exits(0).stdout;
        let row = table.lines().find(|line| line.starts_with(&pod.id));
        let vcpus = row.and_then(|row| row.split_whitespace().nth(5));
        vcpus.map(str::to_owned).unwrap_or(table)
    };
    let on_host = pod.cgroup().join("cpu.max");
    let has = |vcpus: i64, limit: i64| {
        // What a container may run on follows from a work queue of the kernel's.
        eventually(&format!("{vcpus} vCPUs"), || number(&app, "nproc") == vcpus);
        assert_eq!(shown(), vcpus.to_string());
        app.sh("cat /sys/fs/cgroup/cpu.max")
            .prints(&format!("{limit}00000 100000\n"));
        let text = fs::read_to_string(&on_host).unwrap();
        // With `overhead_cpu_millis`.
        assert_eq!(text, format!("{limit}10000 100000\n"));
    };
    let update = |cpus| scene.cri().update(&app.id, limits(cpus)).unwrap();
    has(1, 1);
    app.sh("cat /sys/devices/system/cpu/present")
        .prints("0-3\n");

    update(3);
    has(3, 3);
    // Field 39 of proc(5) stat.
    app.sh("taskset 4 cut -d ' ' -f 39 /proc/self/stat")
        .exits(0)
        .prints("2\n");
    update(2);
    has(2, 2);
    update(8);
    has(4, 8);
    update(1);
    has(1, 1);

    let second = pod
        .container("second", SLEEP)
        .resources(|resources| *resources = limits(2))
        .start();
    eventually("the vCPUs of both", || number(&app, "nproc") == 3);
    second.stop(std::time::Duration::ZERO);
    second.remove();
    eventually("one is enough again", || number(&app, "nproc") == 1);
    assert_eq!(app.state(), ContainerState::Running);
}
