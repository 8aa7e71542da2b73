//! Numbers, printed: how long a pod takes to its first output, beside runc in the
//! same run, and what an idle one costs the host. `make long` has those of many pods.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use nacre_tests::Changed;
use nacre_tests::pods::{HANDLER, Pod, PodScene};

use crate::SLEEP;
use crate::manifests::{overhead_cpu_millis, overhead_mib};

/// Seconds that guests may take to boot, where many do at once.
pub const LONG_BOOT: &str = "600";

/// Runs `pods` at once, each from `RunPodSandbox` to a container's output;
/// returns the longest.
fn first_output(scene: &PodScene, handler: &'static str, pods: usize) -> Duration {
    thread::scope(|threads| {
        let running: Vec<_> = (0..pods)
            .map(|_| {
                threads.spawn(move || {
                    let manifest = scene.pod("timed").runtime(handler);
                    let begin = Instant::now();
                    let pod = manifest.run();
                    let app = pod.container("app", &["echo", "hi"]).start();
                    app.await_logged("stdout", "hi\n");
                    let took = begin.elapsed();
                    // containerd closes a task's connection when that has ended, and a
                    // stop at that moment fails ("ttrpc: closed"), whatever the runtime.
                    app.await_exit();
                    pod.stop();
                    pod.remove();
                    took
                })
            })
            .collect();
        let took = running.into_iter().map(|pod| pod.join().unwrap());
        took.max().unwrap()
    })
}

/// Prints how long so many pods at once take, under nacre and under runc.
fn print_starts(at_once: &[usize]) {
    let scene = PodScene::new();
    for handler in ["runc", HANDLER] {
        // The first one fills the host's caches.
        first_output(&scene, handler, 1);
    }
    for &pods in at_once {
        let runc = first_output(&scene, "runc", pods);
        let nacre = first_output(&scene, HANDLER, pods);
        let ratio = nacre.as_secs_f64() / runc.as_secs_f64();
        println!(
            "{pods} pods to first output: nacre {nacre:.2?}, runc {runc:.2?}, {ratio:.2} times"
        );
        // A hundred times would be a wait that is none of a machine's.
        assert!(ratio < 100.0, "{ratio}");
    }
}

#[test]
#[ignore = "dozens of pods take the lab's one emulated processor for minutes: make long"]
fn many_pods_start_beside_runc() {
    let _patience = Changed::new("boot_timeout_seconds", LONG_BOOT);
    print_starts(&[1, 5, 20]);
}

/// Proportional set size of all processes in the pod's cgroup, KiB.
fn pss_kib(monitor: u32) -> u64 {
    let group = fs::read_to_string(format!("/proc/{monitor}/cgroup")).unwrap();
    let group = group.trim().trim_start_matches("0::").to_owned();
    let in_pod = fs::read_to_string(format!("/sys/fs/cgroup{group}/cgroup.procs")).unwrap();
    let pids: Vec<u32> = in_pod.lines().map(|line| line.parse().unwrap()).collect();
    let pss = |pid: &u32| -> u64 {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("Pss:"))
            .unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    };
    pids.iter().map(pss).sum()
}

/// Guests' memory in pages of 4 KiB until it is dropped, as hosts have it by default.
/// The lab has it in larger ones.
struct SmallPages {
    before: String,
}

impl SmallPages {
    const SETTING: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

    fn new() -> Self {
        let all = fs::read_to_string(Self::SETTING).unwrap();
        let (_, chosen) = all.split_once('[').unwrap();
        let before = chosen.split_once(']').unwrap().0.to_owned();
        fs::write(Self::SETTING, "never").unwrap();
        Self { before }
    }
}

impl Drop for SmallPages {
    fn drop(&mut self) {
        fs::write(Self::SETTING, &self.before).unwrap();
    }
}

#[test]
fn what_an_idle_pod_costs_the_host() {
    let _pages = SmallPages::new();
    let scene = PodScene::new();
    let pod = scene.pod("idle").run();
    let empty_kib = pss_kib(pod.monitor());
    let _one = pod.container("one", SLEEP).start();
    let one_kib = pss_kib(pod.monitor());
    let _two = pod.container("two", SLEEP).start();
    let two_kib = pss_kib(pod.monitor());
    println!(
        "idle pod, PSS: {empty_kib} KiB without, {one_kib} with one, {two_kib} with two containers"
    );
    // Its machine has 256 MiB or more; an idle one touches little of it.
    assert!(two_kib < 200 << 10, "{two_kib} KiB");
    // What the pod costs beyond its containers is what nacre.toml and, by the manifests'
    // test, the RuntimeClass say it may.
    let overhead_kib = overhead_mib() << 10;
    println!("overhead of the RuntimeClass, memory: {empty_kib} KiB of {overhead_kib}");
    assert!(
        empty_kib <= overhead_kib,
        "{empty_kib} KiB of {overhead_kib}"
    );
}

/// Of one measurement. The least of several counts: the lab has other work at times.
const IDLE_SECONDS: u64 = 10;
const MEASUREMENTS: usize = 3;

/// Microseconds of processor time that kubelet's cgroup of a pod has had.
fn processor_usec(pod: &Pod) -> u64 {
    let file = pod.cgroup().with_file_name("cpu.stat");
    let text = fs::read_to_string(&file).unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("usage_usec "));
    line.unwrap().parse().unwrap()
}

/// A pod with a container that sleeps, under nacre and under runc, side by side.
#[test]
#[ignore = "measures for half a minute: make long"]
fn what_an_idle_pod_takes_of_a_processor() {
    let scene = PodScene::new();
    let pods = [HANDLER, "runc"].map(|handler| scene.pod("idle").runtime(handler).run());
    let _sleepers = pods
        .each_ref()
        .map(|pod| pod.container("app", SLEEP).start());
    let used = || pods.each_ref().map(processor_usec);
    let mut least = [u64::MAX; 2];
    for _ in 0..MEASUREMENTS {
        let (before, begin) = (used(), Instant::now());
        thread::sleep(Duration::from_secs(IDLE_SECONDS));
        let (after, took) = (used(), begin.elapsed());
        for (least, (before, after)) in least.iter_mut().zip(before.into_iter().zip(after)) {
            let seconds = took.as_secs_f64();
            // Thousandths of a processor, rounded up.
            let millis = ((after - before) as f64 / 1000.0 / seconds).ceil() as u64;
            *least = millis.min(*least);
        }
    }
    let [nacre, runc] = least;
    println!("idle pod, processor: nacre {nacre}m, runc {runc}m");
    let class = overhead_cpu_millis();
    println!("overhead of the RuntimeClass, processor: {nacre}m of {class}m");
    assert!(nacre <= class, "{nacre}m of {class}m");
}

#[test]
#[ignore = "dozens of pods take the lab's one emulated processor for minutes: make long"]
fn what_many_idle_pods_cost_the_host() {
    const COUNTS: [u64; 3] = [1, 10, 30];
    let _pages = SmallPages::new();
    let scene = PodScene::new();
    let mut pods = Vec::new();
    let mut totals = Vec::new();
    for count in COUNTS {
        while (pods.len() as u64) < count {
            pods.push(scene.pod("idle").run());
        }
        let total: u64 = pods.iter().map(|pod| pss_kib(pod.monitor())).sum();
        println!(
            "{count} idle pods, PSS: {total} KiB, {} each",
            total / count
        );
        totals.push(total);
    }
    let [one, _, many] = totals[..] else {
        panic!("{totals:?}")
    };
    let each = many.saturating_sub(one) / (COUNTS[2] - COUNTS[0]);
    println!("each further idle pod, PSS: {each} KiB");
    // Two pods share at least the programs' pages.
    assert!(each < one, "{each} KiB, the first one {one}");
    let overhead_kib = overhead_mib() << 10;
    assert!(each <= overhead_kib, "{each} KiB of {overhead_kib}");
}
