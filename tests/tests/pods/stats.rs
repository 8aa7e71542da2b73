//! What containerd tells of a pod's consumption, against what the guest knows.

use std::io::{self, Read};
use std::net::{TcpListener, TcpStream};
use std::thread;

use nacre_tests::cri::messages::UInt64Value;
use nacre_tests::pods::{Pod, PodContainer, PodScene};
use nacre_tests::{Said, eventually};

use crate::SLEEP;
use crate::manifests::{GUEST_RESERVE_MIB, overhead_mib};

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

#[test]
fn stats_agree_with_the_guest() {
    let scene = PodScene::new();
    stats_agree_in(&scene, &scene.pod("counted").run());
}

/// Stats of a pod without other containers.
pub fn stats_agree_in(scene: &PodScene, pod: &Pod) {
    // 24 MiB of memory and a good second of work, then nothing.
    let script = "dd if=/dev/zero of=/dev/shm/ballast bs=1M count=24 2>/dev/null; \
                  i=0; while [ $i -lt 40000 ]; do i=$((i+1)); done; touch /done; \
                  exec sleep 3600";
    let busy = pod.container("busy", &["sh", "-c", script]).start();
    let idle = pod.container("idle", SLEEP).start();
    eventually("the work is done", || {
        busy.exec(&["ls", "/done"]).code == Some(0)
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
    let listed = scene.cri().stats_of_pod(&pod.id).unwrap();
    assert_eq!(listed.len(), 2);
    for container in [&busy, &idle] {
        let mut known = listed.iter();
        let stats = known.find(|stats| stats.attributes.as_ref().unwrap().id == container.id);
        let cpu = stats.unwrap().cpu.clone().unwrap();
        let cpu = value(cpu.usage_core_nano_seconds);
        // One has worked, and both have answered questions.
        assert!(cpu > 0 && cpu <= cpu_nanoseconds(container), "{cpu}");
    }

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
    let containers = [&busy, &idle].map(working_set).iter().sum::<u64>();
    let overhead = (overhead_mib() + GUEST_RESERVE_MIB) << 20;
    assert!(
        host > 24 << 20 && host < containers + overhead,
        "{host}, of which containers {containers}"
    );
    assert!(value(stats.cpu.unwrap().usage_core_nano_seconds) > cpu_nanoseconds(&busy));
}

const FILE_BYTES: u64 = 8 << 20;
const BULK: u64 = 8 << 20;
/// Of a packet without offloads, at the MTU of the lab's bridge.
const FRAME_BYTES: u64 = 1514;

/// What the guest has received and sent: bytes, packets.
fn traffic(container: &PodContainer) -> [u64; 4] {
    let script = "cd /sys/class/net/eth0/statistics; \
                  cat rx_bytes tx_bytes rx_packets tx_packets";
    let said = container.sh(script).exits(0).stdout;
    let numbers: Vec<u64> = said.lines().map(|line| line.parse().unwrap()).collect();
    numbers.try_into().unwrap()
}

/// Runs a command in the container with a port of the host's to connect to, and `peer`
/// with the connection.
fn with_peer<T: Send>(
    container: &PodContainer,
    command: impl FnOnce(u16) -> String,
    peer: impl FnOnce(TcpStream) -> T + Send,
) -> (Said, T) {
    let listener = TcpListener::bind(("10.88.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::scope(|threads| {
        let host = threads.spawn(|| peer(listener.accept().unwrap().0));
        let said = container.sh(&command(port)).exits(0);
        (said, host.join().unwrap())
    })
}

/// 8 MiB from the pod to the host, a lot at a time: the pieces that nc itself would copy are
/// sent one by one by a kernel that keeps up.
fn send(container: &PodContainer) {
    let command = |port| {
        let mib = BULK >> 20;
        format!("nc 10.88.0.1 {port} -e dd if=/dev/zero bs=1M count={mib}")
    };
    let (_, received) = with_peer(container, command, |mut stream| {
        io::copy(&mut stream, &mut io::sink()).unwrap()
    });
    assert_eq!(received, BULK);
}

/// 8 MiB from the host to the pod.
fn receive(container: &PodContainer) {
    let command = |port| format!("nc 10.88.0.1 {port} </dev/null | wc -c");
    let (said, _) = with_peer(container, command, |mut stream| {
        io::copy(&mut io::repeat(1).take(BULK), &mut stream).unwrap()
    });
    said.prints(&format!("{BULK}\n"));
}

/// The counters of the pod's interface; with offloads a packet may be much larger than
/// a frame. What a container wrote to its root file system, which containerd looks at
/// now and then.
#[test]
fn traffic_and_files_are_counted() {
    let scene = PodScene::new();
    let pod = scene.pod("talking").run();
    let app = pod.container("app", SLEEP).start();
    app.sh("dd if=/dev/urandom of=/file bs=1M count=8 2>/dev/null; sync")
        .exits(0);

    let network = || {
        let stats = scene.cri().pod_stats(&pod.id).unwrap();
        let network = stats.network.unwrap().default_interface.unwrap();
        assert_eq!(network.name, "eth0");
        [value(network.rx_bytes), value(network.tx_bytes)]
    };
    let start = traffic(&app);
    send(&app);
    let middle = traffic(&app);
    receive(&app);
    let guest = traffic(&app);
    let host = network();
    // One way after the other: what acknowledges the bulk are small packets.
    for (way, before, after) in [(1, &start, &middle), (0, &middle, &guest)] {
        let grown = after[way] - before[way];
        assert!(grown >= BULK, "{before:?} to {after:?}");
        let packets = after[way + 2] - before[way + 2];
        println!("{grown} bytes in {packets} packets");
        assert!(
            grown / packets > FRAME_BYTES,
            "no offloads: {before:?} to {after:?}"
        );
        assert!(
            agree(host[way], guest[way], guest[way]),
            "{host:?} {guest:?}"
        );
    }

    eventually("the file is counted", || {
        let stats = scene.cri().stats(&app.id).unwrap();
        let written = value(stats.writable_layer.unwrap().used_bytes);
        agree(written, FILE_BYTES, FILE_BYTES)
    });
}
