//! `ctr task exec`, signals, `ctr task ps` and `ctr task metrics`.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Stdio};

use nacre_tests::{BUSYBOX, Scene, eventually, run_with_input};
use serde_json::json;

use crate::host::pid_of;
use crate::limits::with_cgroup;

#[test]
fn output_exit_code_input_and_user() {
    let mut scene = Scene::new();
    let id = scene.start_sleeper(&[]);
    scene
        .exec(&id, &[], &["sh", "-c", "echo out; echo err >&2; exit 5"])
        .exits(5)
        .prints("out\n")
        .complains(&["err\n"]);
    let input = scene.exec_command(&id, &[], &["wc", "-c"]);
    run_with_input(input, b"123".to_vec())
        .exits(0)
        .prints("3\n");
    scene
        .exec(&id, &["--user", "1000:50"], &["sh", "-c", "id -u; id -g"])
        .exits(0)
        .prints("1000\n50\n");
    scene
        .exec(&id, &["--cwd", "/var"], &["pwd"])
        .exits(0)
        .prints("/var\n");
}

#[test]
fn thirty_at_once() {
    let mut scene = Scene::new();
    let id = scene.start_sleeper(&[]);
    let clients: Vec<_> = (0..30)
        .map(|number| {
            let script = format!("echo {number}; exit {number}");
            let mut command = scene.exec_command(&id, &[], &["sh", "-c", &script]);
            command.stdin(Stdio::null()).stdout(Stdio::piped());
            command.spawn().unwrap()
        })
        .collect();
    for (number, client) in (0..).zip(clients) {
        let output = client.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(number));
        assert_eq!(output.stdout, format!("{number}\n").as_bytes());
    }
}

#[test]
fn missing_command_is_answered_and_leaves_the_container_alone() {
    let mut scene = Scene::new();
    let id = scene.start_sleeper(&[]);
    scene
        .exec(&id, &[], &["no-such-command"])
        .exits(1)
        .complains(&["exec: \"no-such-command\": executable file not found in $PATH"]);
    scene
        .exec(&id, &[], &["/etc/passwd"])
        .exits(1)
        .complains(&["exec: \"/etc/passwd\"", "permission denied"]);
    scene.exec(&id, &[], &["true"]).exits(0);
}

#[test]
fn exec_in_a_container_that_is_not_there() {
    let scene = Scene::new();
    scene
        .exec("no-such-container", &[], &["true"])
        .exits(1)
        .complains(&["not found"]);
}

#[test]
fn signals_reach_init_and_exec() {
    let mut scene = Scene::new();
    let script =
        "trap 'exit 5' TERM; trap 'echo usr1' USR1; echo ready; while :; do sleep 0.1; done";
    let (id, command) = scene.command(BUSYBOX, &["--rm"], &["sh", "-c", script]);
    let mut init = Ready::spawn(command);
    let script = script.replace("exit 5", "exit 6");
    let mut exec = Ready::spawn(scene.exec_as(&id, "caught", &[], &["sh", "-c", &script]));

    scene
        .ctr(&["task", "kill", "-s", "TERM", "--exec-id", "caught", &id])
        .exits(0);
    assert_eq!(exec.end(), (Some(6), String::new()));

    scene.ctr(&["task", "kill", "-s", "USR1", &id]).exits(0);
    assert_eq!(init.line(), "usr1\n");
    scene.ctr(&["task", "kill", "-s", "TERM", &id]).exits(0);
    assert_eq!(init.end(), (Some(5), String::new()));
}

/// A client whose process has said that its traps are set.
pub struct Ready {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Ready {
    pub fn spawn(mut command: Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut ready = Self { child, stdout };
        assert_eq!(ready.line(), "ready\n");
        ready
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line
    }

    /// The exit code and what was printed until then.
    pub fn end(&mut self) -> (Option<i32>, String) {
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).unwrap();
        (self.child.wait().unwrap().code(), rest)
    }
}

#[test]
fn ps_and_metrics_make_sense() {
    let mut scene = Scene::new();
    let burn = "while :; do :; done & head -c 20m /dev/zero | tail -c 20m | sleep 3600";
    let id = scene.start(&["--memory-limit", "134217728"], &["sh", "-c", burn]);

    let metric = |scene: &Scene, name: &str| -> f64 {
        let text = scene.ctr(&["task", "metrics", &id]).exits(0).stdout;
        let line = text.lines().find(|line| line.starts_with(name));
        let line = line.unwrap_or_else(|| panic!("no {name} in {text}"));
        line.split_whitespace().last().unwrap().parse().unwrap()
    };
    assert_eq!(metric(&scene, "memory.usage_limit "), 134_217_728.0);
    eventually("the memory in use is counted", || {
        metric(&scene, "memory.usage ") > 20e6
    });
    assert!(metric(&scene, "memory.usage ") < 134_217_728.0);
    let before = metric(&scene, "cpu.usage_usec ");
    eventually("time is counted", || {
        metric(&scene, "cpu.usage_usec ") > before
    });
    // The shell, its loop, tail and sleep: head ends when tail has it all.
    eventually("head has ended", || metric(&scene, "pids.current ") == 4.0);
    let said = scene.ctr(&["task", "ps", &id]).exits(0);
    let first = |line: &str| line.split_whitespace().next().unwrap().parse().unwrap();
    let pids: BTreeSet<u32> = said.stdout.lines().skip(1).map(first).collect();
    assert!(pids.len() == 4 && !pids.contains(&0), "{said:#?}");
}

/// Processor time of a process of the host, in clock ticks (proc_pid_stat(5)).
fn ticks(pid: &str) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split(' ').collect();
    fields[12].parse::<u64>().unwrap() + fields[13].parse::<u64>().unwrap()
}

/// Ticks the pod uses in two seconds.
fn ticks_in_two_seconds(pid: &str) -> u64 {
    let before = ticks(pid);
    std::thread::sleep(std::time::Duration::from_secs(2));
    ticks(pid) - before
}

#[test]
fn paused_container_uses_no_processor_time() {
    let mut scene = Scene::new();
    let id = scene.start(&[], &["sh", "-c", "while :; do :; done"]);
    let pid = pid_of(&scene, &id);
    let running = ticks_in_two_seconds(&pid);
    scene.ctr(&["task", "pause", &id]).exits(0);
    assert_eq!(scene.status(&id).as_deref(), Some("PAUSED"));
    let said = scene.exec(&id, &[], &["true"]);
    said.exits(1).complains(&["it is paused"]);
    let paused = ticks_in_two_seconds(&pid);
    scene.ctr(&["task", "resume", &id]).exits(0);
    assert_eq!(scene.status(&id).as_deref(), Some("RUNNING"));
    let resumed = ticks_in_two_seconds(&pid);
    println!("ticks in 2 s: {running} running, {paused} paused, {resumed} resumed");
    assert!(paused * 10 < running.min(resumed));
    scene.exec(&id, &[], &["true"]).exits(0);
}

const MIB: f64 = 1024.0 * 1024.0;

/// What `ctr task metrics` says lies within 5 % of what the guest's own files say
/// before and after.
#[test]
fn metrics_are_those_of_the_guest_s_files() {
    let mut scene = Scene::new();
    let burn = "head -c 20m /dev/zero | tail -c 20m | sleep 3600 & \
                cat /bin/busybox > /tmp/x; i=0; while [ $i -lt 100000 ]; do i=$((i + 1)); done; \
                echo burnt > /tmp/done; sleep 3600";
    let id = scene.start_spec(|spec| {
        with_cgroup(spec);
        spec["root"]["readonly"] = json!(false);
        spec["process"]["args"] = json!(["sh", "-c", burn]);
    });
    eventually("the work is done", || {
        let said = scene.exec(&id, &[], &["cat", "/tmp/done"]);
        said.stdout == "burnt\n"
    });
    let files = |scene: &Scene| -> BTreeMap<String, f64> {
        let script = "cd /sys/fs/cgroup; echo usage $(cat memory.current); echo current $(cat pids.current); cat cpu.stat memory.stat; \
                      for of in cpu memory io; do sed -n \"s/^some .*total=/$of.pressure /p\" $of.pressure; done";
        let said = scene.exec(&id, &[], &["sh", "-c", script]).exits(0);
        let pairs = said.stdout.lines().filter_map(|line| line.split_once(' '));
        pairs
            .map(|(name, value)| (name.to_owned(), value.parse().unwrap()))
            .collect()
    };
    let before = files(&scene);
    let text = scene
        .ctr(&["task", "metrics", "--format", "json", &id])
        .exits(0)
        .stdout;
    let after = files(&scene);
    let metrics: serde_json::Value = serde_json::from_str(&text).unwrap();
    let mut compared = BTreeSet::new();
    for (section, values) in metrics.as_object().unwrap() {
        for (name, value) in values.as_object().into_iter().flatten() {
            let (Some(first), Some(last)) = (before.get(name), after.get(name)) else {
                continue;
            };
            let (low, high) = (first.min(*last), first.max(*last));
            let value = value.as_f64().unwrap();
            println!("{section}.{name}: {value}, in the guest {low} to {high}");
            // The exec that reads the files counts too: its processes and pages, which are
            // more than 5 % of little memory.
            let little = section == "memory" && low < 20.0 * MIB;
            let slack = if little { MIB } else { 2.0 };
            assert!(
                value >= low * 0.95 - slack && value <= high * 1.05 + slack,
                "{section}.{name}: {value}, in the guest {low} to {high}"
            );
            compared.insert(name.as_str());
        }
    }
    for name in [
        "usage",
        "anon",
        "file",
        "inactive_file",
        "usage_usec",
        "user_usec",
        "system_usec",
        "pgfault",
        "current",
    ] {
        assert!(compared.contains(name), "{name} not in {text}");
    }
    assert!(
        metrics["memory"]["anon"].as_f64().unwrap() > 19.0 * MIB,
        "{text}"
    );
    for of in ["cpu", "memory", "io"] {
        let some = &metrics[of]["psi"]["some"];
        assert!(some.is_object(), "no {of} pressure in {text}");
        // Go leaves out what is 0.
        let told = some["total"].as_f64().unwrap_or_default();
        let name = format!("{of}.pressure");
        let (first, last) = (before[&name], after[&name]);
        println!("{name}: {told} us, in the guest {first} to {last}");
        assert!((first..=last).contains(&told), "{name} in {text}");
    }
    assert!(before["cpu.pressure"] > 0.0, "{before:#?}");
}
