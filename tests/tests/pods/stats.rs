//! What containerd tells of a pod's consumption, against what the guest knows.

use nacre_tests::cri::messages::UInt64Value;
use nacre_tests::eventually;
use nacre_tests::pods::{PodContainer, PodScene};

use crate::SLEEP;

in_both_modes![stats_agree_with_the_guest];

fn value(counter: Option<UInt64Value>) -> u64 {
    counter.expect("a counter").value
}

/// Whether `value` is within 5 % of what was between `first` and `last`.
fn agree(value: u64, first: u64, last: u64) -> bool {
    let (low, high) = (first.min(last), first.max(last));
    (low - low / 20..=high + high / 20).contains(&value)
}

/// Working set, as cAdvisor defines it: usage less inactive file pages.
fn working_set(container: &PodContainer) -> u64 {
    let script = "cat /sys/fs/cgroup/memory.current; \
                  awk '/^inactive_file/ {print $2}' /sys/fs/cgroup/memory.stat";
    let said = container.sh(script).exits(0).stdout;
    let numbers: Vec<u64> = said.lines().map(|line| line.parse().unwrap()).collect();
    numbers[0].saturating_sub(numbers[1])
}

fn cpu_nanoseconds(container: &PodContainer) -> u64 {
    let script = "awk '/^usage_usec/ {print $2}' /sys/fs/cgroup/cpu.stat";
    let said = container.sh(script).exits(0).stdout;
    said.trim().parse::<u64>().unwrap() * 1000
}

fn stats_agree_with_the_guest(scene: &PodScene) {
    let pod = scene.pod("counted").run();
    // 24 MiB of memory and a good second of work, then nothing.
    let script = "dd if=/dev/zero of=/dev/shm/ballast bs=1M count=24 2>/dev/null; \
                  i=0; while [ $i -lt 40000 ]; do i=$((i+1)); done; exec sleep 3600";
    let busy = pod.container("busy", &["sh", "-c", script]).start();
    let idle = pod.container("idle", SLEEP).start();
    eventually("the work is done", || {
        busy.exec(&["cat", "/proc/1/cmdline"])
            .stdout
            .contains("3600")
    });

    for container in [&busy, &idle] {
        // Asking the guest takes processor time and memory itself.
        let guest = || [cpu_nanoseconds(container), working_set(container)];
        eventually("both sides agree", || {
            let before = guest();
            let stats = scene.cri().stats(&container.id).unwrap();
            let after = guest();
            let (cpu, memory) = (stats.cpu.unwrap(), stats.memory.unwrap());
            let host = [
                value(cpu.usage_core_nano_seconds),
                value(memory.working_set_bytes),
            ];
            println!("guest {before:?}, host {host:?}, guest {after:?}");
            agree(host[0], before[0], after[0])
                && (agree(host[1], before[1], after[1]) || host[1].abs_diff(after[1]) < 1 << 20)
        });
    }
    assert!(working_set(&busy) > 24 << 20);

    let stats = scene.cri().pod_stats(&pod.id).unwrap();
    let ids: Vec<_> = stats
        .containers
        .iter()
        .filter_map(|stats| stats.attributes.as_ref())
        .collect();
    assert!(
        ids.iter().any(|known| known.id == busy.id) && ids.iter().any(|known| known.id == idle.id)
    );
    // The pod's are the host's: its machine, monitor and file server.
    let host = value(stats.memory.unwrap().working_set_bytes);
    assert!(host > 24 << 20, "{host}");
    assert!(value(stats.cpu.unwrap().usage_core_nano_seconds) > cpu_nanoseconds(&busy));
    let network = stats.network.unwrap().default_interface.unwrap();
    assert_eq!(network.name, "eth0");
}
