//! Many machines at once, and one that is busy beside one that is asked.

use std::process::Stdio;
use std::time::{Duration, Instant};

use nacre_tests::{BUSYBOX, Changed, Said, Sample, Scene, Shim, eventually};

/// What they leave shows at once where it is counted one by one (mounts, interfaces, cgroups),
/// and in descriptors and processes if each leaves one. Memory that grows shows over the many pods
/// of `make soak`: of two rounds it may be the kernel's own.
#[test]
#[ignore = "twice twenty kernels at once take the lab's one emulated processor over 6 minutes: make long"]
fn twenty_machines_at_once() {
    // One emulated processor takes its time for twenty kernels.
    let _boot = Changed::new("boot_timeout_seconds", "500");
    let _hang = Changed::new("hang_timeout_seconds", "500");
    // What is made once for so many is made by the first twenty.
    twenty_machines();
    let before = Sample::take().unwrap();
    twenty_machines();
    let mut grown = Vec::new();
    eventually("all is as it was before the second twenty", || {
        let after = Sample::take().unwrap().growth_since(&before);
        if after != grown {
            println!("{after:?}");
            grown = after;
        }
        grown.is_empty()
    });
}

fn twenty_machines() {
    let mut scene = Scene::new();
    let start = Instant::now();
    let clients: Vec<_> = (0..20)
        .map(|number| {
            let script = format!("echo {number}; exit {number}");
            let (_, mut command) = scene.command(BUSYBOX, &["--rm"], &["sh", "-c", &script]);
            command.stdin(Stdio::null());
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            command.spawn().unwrap()
        })
        .collect();
    for (number, client) in (0..).zip(clients) {
        // As long as the scene lasts: they share a processor.
        let said = Said::from(client.wait_with_output().unwrap());
        said.exits(number).prints(&format!("{number}\n"));
    }
    println!("all ended after {:.1?}", start.elapsed());
}

/// How long State takes: the median and the longest of many.
fn state_takes(shim: &Shim) -> (Duration, Duration) {
    let mut times: Vec<Duration> = (0..100)
        .map(|_| {
            let start = Instant::now();
            shim.state("").unwrap();
            start.elapsed()
        })
        .collect();
    times.sort_unstable();
    (times[times.len() / 2], times[times.len() - 1])
}

/// By how much State of one machine may slow down while another does all it can.
/// Both share the processors: some of it is theirs, not nacre's.
const FACTOR: u32 = 10;

/// What else the host of the lab does can make any one round slow; nacre would all of them.
const ROUNDS: usize = 3;

#[test]
fn busy_machine_does_not_delay_the_state_of_another() {
    let mut scene = Scene::new();
    let asked = Shim::of(&scene.start_sleeper(&[]));
    let (id, mut command) = scene.command(BUSYBOX, &["--rm"], &["yes"]);
    // It computes, writes to the host without pause, and its client waits for more.
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let mut client = command.spawn().unwrap();
    let is = |status| scene.status(&id).as_deref() == Some(status);
    eventually("it runs", || is("RUNNING"));
    let rounds = [(); ROUNDS].map(|()| {
        scene.ctr(&["task", "pause", &id]).exits(0);
        let alone = state_takes(&asked);
        scene.ctr(&["task", "resume", &id]).exits(0);
        let beside = state_takes(&asked);
        assert!(is("RUNNING"), "it was busy all the time");
        println!("State: median and most {alone:.1?} alone, {beside:.1?} beside a busy machine");
        (alone.0, beside.0)
    });
    assert!(
        rounds
            .iter()
            .any(|(alone, beside)| *beside < *alone * FACTOR),
        "{rounds:?}"
    );
    scene.ctr(&["task", "kill", "-s", "KILL", &id]).exits(0);
    assert_eq!(client.wait().unwrap().code(), Some(137));
}
