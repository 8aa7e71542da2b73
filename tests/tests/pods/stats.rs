//! What containerd tells of a pod's consumption, against what the guest knows.

use std::io::{self, Read};
use std::net::{TcpListener, TcpStream};
use std::thread;

use nacre_tests::cri::messages::{ContainerStats, CpuUsage, MemoryUsage, UInt64Value};
use nacre_tests::pods::{Pod, PodContainer, PodScene};
use nacre_tests::{Said, eventually, run};

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

/// Nanoseconds of processor time, and bytes of the working set.
type Counters = [u64; 2];

fn both_agree(told: Counters, first: Counters, last: Counters) -> bool {
    (0..told.len()).all(|kind| agree(told[kind], first[kind], last[kind]))
}

/// Prints what a cgroup's own files say. The working set is cAdvisor's: usage less inactive
/// file pages.
fn script(group: &str) -> String {
    format!(
        "cd {group} && awk '/^usage_usec/ {{print $2}}' cpu.stat && cat memory.current && \
         awk '/^inactive_file/ {{print $2}}' memory.stat"
    )
}

fn counters(said: Said) -> Counters {
    let said = said.exits(0).stdout;
    let numbers: Vec<u64> = said.lines().map(|line| line.parse().unwrap()).collect();
    let [usec, current, inactive] = numbers[..] else {
        panic!("{said}")
    };
    [usec * 1000, current.saturating_sub(inactive)]
}

fn guest(container: &PodContainer) -> Counters {
    counters(container.sh(&script("/sys/fs/cgroup")))
}

fn told(cpu: Option<CpuUsage>, memory: Option<MemoryUsage>) -> Counters {
    [
        value(cpu.unwrap().usage_core_nano_seconds),
        value(memory.unwrap().working_set_bytes),
    ]
}

/// What `ContainerStats`, `ListContainerStats` and `PodSandboxStats` tell of a container,
/// which is one of so many of the pod.
fn stats_of(
    scene: &PodScene,
    pod: &Pod,
    container: &PodContainer,
    count: usize,
) -> [ContainerStats; 3] {
    let ours = |stats: &ContainerStats| stats.attributes.as_ref().unwrap().id == container.id;
    let cri = scene.cri();
    let listed = cri.stats_of_pod(&pod.id).unwrap();
    let of_pod = cri.pod_stats(&pod.id).unwrap().containers;
    assert_eq!((listed.len(), of_pod.len()), (count, count));
    [
        cri.stats(&container.id).unwrap(),
        listed.into_iter().find(ours).unwrap(),
        of_pod.into_iter().find(ours).unwrap(),
    ]
}

#[test]
fn stats_agree_with_the_guest() {
    let scene = PodScene::new();
    stats_agree_in(&scene, &scene.pod("counted").run());
}

const BALLAST: u64 = 24 << 20;

/// Stats of a pod without other containers.
pub fn stats_agree_in(scene: &PodScene, pod: &Pod) {
    // Of both so much memory that the command which asks the guest is none of 5 %; of one
    // a good second of work.
    let [busy, idle] = [("busy", 40_000), ("idle", 0)].map(|(name, work)| {
        let script = format!(
            "dd if=/dev/zero of=/dev/shm/{name} bs={BALLAST} count=1 2>/dev/null; \
             i=0; while [ $i -lt {work} ]; do i=$((i+1)); done; touch /done; exec sleep 3600"
        );
        pod.container(name, &["sh", "-c", &script]).start()
    });
    for container in [&busy, &idle] {
        eventually("the work is done", || {
            container.exec(&["ls", "/done"]).code == Some(0)
        });
        eventually("both sides agree", || {
            // Asking the guest takes processor time and memory itself.
            let before = guest(container);
            let stats = stats_of(scene, pod, container, 2);
            let stats = stats.map(|stats| told(stats.cpu, stats.memory));
            let after = guest(container);
            println!("guest {before:?}, host {stats:?}, guest {after:?}");
            stats
                .into_iter()
                .all(|told| both_agree(told, before, after))
        });
    }
    let [busy, idle] = [&busy, &idle].map(guest);
    assert!(busy[0] > idle[0] && busy[1].min(idle[1]) > BALLAST);

    // The pod's are the host's: its machine, monitor and file server.
    let group = pod.cgroup();
    let group = script(group.parent().unwrap().to_str().unwrap());
    let host = || counters(run("sh", &["-c", &group]));
    let mut of_pod = [0; 2];
    eventually("CRI and the pod's cgroup agree", || {
        let before = host();
        let stats = scene.cri().pod_stats(&pod.id).unwrap();
        of_pod = told(stats.cpu, stats.memory);
        let after = host();
        println!("cgroup {before:?}, CRI {of_pod:?}, cgroup {after:?}");
        both_agree(of_pod, before, after)
    });
    let overhead = (overhead_mib() + GUEST_RESERVE_MIB) << 20;
    assert!(
        of_pod[1] > 2 * BALLAST && of_pod[1] < busy[1] + idle[1] + overhead,
        "{of_pod:?}, of which containers {busy:?} and {idle:?}"
    );
    assert!(of_pod[0] > busy[0] + idle[0]);
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
        let stats = stats_of(&scene, &pod, &app, 1);
        let written = stats.map(|stats| value(stats.writable_layer.unwrap().used_bytes));
        let in_guest = app.sh("du -k /file | cut -f 1").exits(0).stdout;
        let bytes = in_guest.trim().parse::<u64>().unwrap() << 10;
        assert!(agree(bytes, FILE_BYTES, FILE_BYTES), "{in_guest}");
        written.into_iter().all(|told| agree(told, bytes, bytes))
    });
}
