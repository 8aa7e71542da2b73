//! Sizes and limits: of the machine, of a container, changed while it runs.

use nacre_tests::cri::messages::{ContainerState, LinuxContainerResources};
use nacre_tests::eventually;
use nacre_tests::pods::{PodContainer, PodScene};

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
