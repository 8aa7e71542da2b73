//! The lab itself: what of a command comes back, and what is left of one that fails.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nacre_tests::{OnTerminal, Said};

fn lab(arguments: &[&str]) -> Command {
    let lab = Path::new(env!("CARGO_MANIFEST_DIR")).join("lab/lab");
    let mut command = Command::new(lab);
    command.args(arguments).env_remove("LAB");
    command
}

/// An empty directory.
fn directory(name: &str) -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(&directory).unwrap();
    directory
}

/// `lab run` of a script, with options before the tree.
fn run(name: &str, options: &[&str], script: &str) -> Said {
    let tree = directory(name);
    let mut arguments = vec!["run"];
    arguments.extend(options);
    arguments.extend([tree.to_str().unwrap(), "--", "sh", "-c", script]);
    lab(&arguments).output().unwrap().into()
}

/// The log that a complaint names.
fn log_of(said: &Said) -> String {
    let (_, rest) = said.stderr.split_once("the console's log is ").unwrap();
    fs::read_to_string(rest.lines().next().unwrap()).unwrap()
}

#[test]
fn output_files_and_exit_code_come_back() {
    let out = directory("lab-out");
    let options = ["--out", out.to_str().unwrap()];
    let script = "ls -d /nacre; grep -c -w svm /proc/cpuinfo >&2; echo kept > /out/file; exit 3";
    let said = run("lab-tree", &options, script)
        .exits(3)
        .prints("/nacre\n");
    // One processor, and it has SVM.
    assert_eq!(said.stderr.lines().next(), Some("1"), "{said:#?}");
    assert_eq!(fs::read_to_string(out.join("file")).unwrap(), "kept\n");
}

/// The command has begun by then, so there is no second machine for it.
#[test]
fn machine_that_dies_leaves_its_log() {
    let script = "echo began; echo c > /proc/sysrq-trigger; sleep 600";
    let said = run("lab-panic", &[], script).exits(125);
    assert!(said.stdout.matches("began").count() < 2, "{said:#?}");
    assert!(said.stderr.contains("ended without a result"), "{said:#?}");
    assert!(!said.stderr.contains("up; its console's log"), "{said:#?}");
    assert!(log_of(&said).contains("Kernel panic"), "{said:#?}");
}

#[test]
fn machine_that_panics_before_it_is_up_is_replaced() {
    // QEMU takes the last of several: a kernel without anything to run.
    let append = "console=ttyS0 panic=-1 rdinit=/none root=/none";
    let said = run(
        "lab-early",
        &["--qemu", "-append", "--qemu", append],
        "true",
    )
    .exits(125);
    let line = "the machine's kernel panicked before it was up; its console's log is ";
    let logs: Vec<_> = said
        .stderr
        .lines()
        .filter_map(|text| text.split_once(line))
        .collect();
    assert_eq!(logs.len(), 3, "{said:#?}");
    for (_, log) in logs {
        let log = fs::read_to_string(log).unwrap();
        assert!(log.contains("Kernel panic"), "{log}");
    }
    let end = "lab: the machine did not come up three times\n";
    assert!(said.stderr.ends_with(end), "{said:#?}");
}

#[test]
fn command_that_takes_too_long_is_ended() {
    let said = run("lab-late", &["--timeout", "20"], "sleep 600").exits(124);
    assert!(
        said.stderr.contains("stopped after 20 seconds"),
        "{said:#?}"
    );
    log_of(&said);
}

/// A processor that nothing else gets is as good as one that stopped.
#[test]
fn machine_that_stands_still_is_ended_and_examined() {
    let script = "echo -1 > /proc/sys/kernel/sched_rt_runtime_us
        echo 0 > /sys/kernel/debug/sched/fair_server/cpu0/runtime
        exec chrt -f 99 sh -c 'while :; do :; done'";
    let said = run("lab-still", &["--patience", "45"], script).exits(125);
    let why = "the machine stood still for 45 seconds";
    assert!(said.stderr.contains(why), "{said:#?}");
    let log = log_of(&said);
    for part in [
        "VM status: running",
        "RIP=",
        "local APIC state",
        "panic - not syncing: NMI",
    ] {
        assert!(log.contains(part), "no {part:?} in {log}");
    }
}

#[test]
fn machine_that_does_not_come_up_is_replaced() {
    let options = ["--patience", "2", "--qemu", "-S"];
    let said = run("lab-stopped", &options, "true").exits(125);
    for seconds in [2, 4, 6] {
        let line = format!("the machine is not up after {seconds} s; its console's log is ");
        assert!(said.stderr.contains(&line), "{said:#?}");
    }
    let end = "lab: the machine did not come up three times\n";
    assert!(said.stderr.ends_with(end), "{said:#?}");
}

#[test]
fn shell_is_on_the_terminal() {
    let tree = directory("lab-shell");
    let arguments = ["shell", "--patience", "60", tree.to_str().unwrap()];
    let mut shell = OnTerminal::spawn(lab(&arguments), 31, 97);
    shell.read_until("containerd is ready");
    shell.read_until("# ");
    shell.type_line("echo $(stty size) and $(ctr version | grep -c Version)");
    shell.read_until("31 97 and 2");
    shell.type_line("exit");
    shell.read_until("Power down");
    assert_eq!(shell.wait(), Some(0));
}
