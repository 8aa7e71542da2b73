//! The Task API of a container in a guest, where `ctr` shows too little of it: the
//! codes of answers, many callers at once, counters by their fields.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::sync::Barrier;
use std::thread;

use containerd_shim_protos::api::Status;
use nacre_tests::{BUSYBOX, Scene, Shim, returned, run, spawn};
use serde_json::json;
use ttrpc::Code;

use crate::console::{ask, enabled};
use crate::exec::Ready;
use crate::host::Events;
use crate::limits::with_cgroup;

/// The code a call was refused with.
#[track_caller]
fn code<T: std::fmt::Debug>(answer: ttrpc::Result<T>) -> Code {
    match answer.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => status.code(),
        other => panic!("not a status: {other}"),
    }
}

/// An exec is answered by what its container is doing, and `ctr` is told so, too.
#[test]
fn execs_into_running_paused_stopped_and_missing_containers() {
    let mut scene = Scene::new();
    let id = scene.start_sleeper(&[]);
    let shim = Shim::of(&id);
    shim.exec("running", &["sh", "-c", "exit 3"]).unwrap();
    shim.start("running").unwrap();
    assert_eq!(shim.wait("running").unwrap(), 3);

    shim.pause().unwrap();
    assert_eq!(shim.state("").unwrap(), Status::PAUSED);
    let paused = shim.exec("paused", &["true"]);
    assert_eq!(code(paused), Code::FAILED_PRECONDITION);
    scene
        .exec(&id, &[], &["true"])
        .exits(1)
        .complains(&["it is paused"]);
    shim.resume().unwrap();
    assert_eq!(code(shim.resume()), Code::FAILED_PRECONDITION);
    scene.exec(&id, &[], &["true"]).exits(0);
    assert_eq!(code(shim.checkpoint()), Code::UNIMPLEMENTED);

    shim.kill("").unwrap();
    assert_eq!(shim.wait("").unwrap(), 137);
    let stopped = shim.exec("stopped", &["true"]);
    assert_eq!(code(stopped), Code::FAILED_PRECONDITION);
    scene
        .exec(&id, &[], &["true"])
        .exits(1)
        .complains(&["it is stopped"]);
    assert_eq!(code(shim.kill("")), Code::NOT_FOUND);

    let missing = Shim::of(&id).asked_for("no-such-container");
    assert_eq!(code(missing.exec("e", &["true"])), Code::NOT_FOUND);
    assert_eq!(code(missing.state("")), Code::NOT_FOUND);
}

/// An exec's id is taken until it is deleted, which takes that it has ended.
#[test]
fn exec_ids_are_deleted_and_free_again() {
    let mut scene = Scene::new();
    let id = scene.start_sleeper(&[]);
    let shim = Shim::of(&id);
    for status in [137, 4] {
        shim.exec(
            "e",
            &["sh", "-c", "[ -e /tmp/second ] && exit 4; sleep 3600"],
        )
        .unwrap();
        let again = shim.exec("e", &["true"]);
        assert_eq!(code(again), Code::ALREADY_EXISTS);
        shim.start("e").unwrap();
        if status == 137 {
            assert_eq!(code(shim.delete("e")), Code::FAILED_PRECONDITION);
            shim.kill("e").unwrap();
        }
        assert_eq!(shim.wait("e").unwrap(), status);
        assert_eq!(shim.delete("e").unwrap(), status);
        assert_eq!(code(shim.delete("e")), Code::NOT_FOUND);
        assert_eq!(code(shim.wait("e")), Code::NOT_FOUND);
        scene.exec(&id, &[], &["touch", "/tmp/second"]).exits(0);
    }
    shim.exec("never-started", &["true"]).unwrap();
    shim.delete("never-started").unwrap();
}

#[test]
fn a_signal_to_all_reaches_init_and_execs() {
    let mut scene = Scene::new();
    // The container ends later than its exec, which would end with it.
    let script = "trap 'sleep 5; exit 5' USR1; echo ready; while :; do sleep 0.1; done";
    let (id, command) = scene.command(BUSYBOX, &["--rm"], &["sh", "-c", script]);
    let mut init = Ready::spawn(command);
    let script = script.replace("sleep 5; exit 5", "exit 6");
    let mut exec = Ready::spawn(scene.exec_command(&id, &[], &["sh", "-c", &script]));
    scene
        .ctr(&["task", "kill", "--all", "-s", "USR1", &id])
        .exits(0);
    // The exec was told, or it would have died with its container.
    assert_eq!(exec.end(), (Some(6), String::new()));
    assert_eq!(init.end(), (Some(5), String::new()));
}

#[test]
fn many_wait_at_once() {
    const CALLERS: usize = 16;
    let mut scene = Scene::new();
    let id = scene.start_sleeper(&[]);
    let shim = Shim::of(&id);
    shim.exec("e", &["sleep", "3600"]).unwrap();
    shim.start("e").unwrap();
    let ready = Barrier::new(2 * CALLERS + 1);
    thread::scope(|scope| {
        let callers: Vec<_> = ["", "e"]
            .into_iter()
            .cycle()
            .take(2 * CALLERS)
            .map(|exec_id| {
                let shim = Shim::of(&id);
                let ready = &ready;
                scope.spawn(move || {
                    ready.wait();
                    shim.wait(exec_id)
                })
            })
            .collect();
        ready.wait();
        // An answer to another call while they wait.
        assert_eq!(shim.state("e").unwrap(), Status::RUNNING);
        shim.kill("").unwrap();
        for caller in callers {
            assert_eq!(caller.join().unwrap().unwrap(), 137);
        }
    });
}

/// A container's processes by their numbers in the guest. Its own view has other numbers for
/// the same processes, and one more: the exec that looks.
fn processes_in(id: &str) -> BTreeSet<u32> {
    let look = format!(
        "mkdir -p /mnt && mount -t cgroup2 none /mnt\n\
         find /mnt/containers/{id} -name cgroup.procs -exec cat {{}} + && umount /mnt\n"
    );
    let said = ask(id, &look).exits(0);
    let numbers = said.stdout.lines().map(|line| line.parse().unwrap());
    numbers.collect()
}

#[test]
fn processes_are_those_of_the_guest() {
    let _shell = enabled();
    let mut scene = Scene::new();
    let id = scene.start_spec(|spec| {
        with_cgroup(spec);
        let script = "sleep 3600 & sleep 3600 & wait $!; wait";
        spec["process"]["args"] = json!(["sh", "-c", script]);
    });
    let shim = Shim::of(&id);
    for (count, and_then) in [(3, "kill $(pidof sleep | cut -d' ' -f1)"), (2, "true")] {
        let mut told = BTreeSet::new();
        nacre_tests::eventually("the shim tells of all", || {
            told = shim.pids().unwrap().into_iter().collect();
            told.len() == count
        });
        assert_eq!(told, processes_in(&id));
        scene.exec(&id, &[], &["sh", "-c", and_then]).exits(0);
    }
}

/// A container's files of cgroup v2, by their names. There is no cgroup namespace, so all of
/// the guest's are below the mount.
fn cgroup_files(scene: &Scene, id: &str) -> BTreeMap<String, String> {
    let script = "mkdir -p /cgroup; [ -e /cgroup/cgroup.procs ] || mount -t cgroup2 none /cgroup; \
                  cd /cgroup$(sed -n 's/^0:://p' /proc/self/cgroup) && grep -r '' io.stat hugetlb.2MB.*";
    let said = scene.exec(id, &[], &["sh", "-c", script]).exits(0);
    let mut files = BTreeMap::new();
    for line in said.stdout.lines() {
        let (name, text) = line.split_once(':').unwrap();
        let file: &mut String = files.entry(name.to_owned()).or_default();
        file.push_str(text);
        file.push('\n');
    }
    files
}

/// A counter of a disk, by the disk's number and the counter's name.
fn io_stat(files: &BTreeMap<String, String>, disk: &str, name: &str) -> u64 {
    let mut lines = files["io.stat"].lines().map(str::split_whitespace);
    let line = lines.find_map(|mut words| (words.next() == Some(disk)).then_some(words));
    let mut fields = line.into_iter().flatten().filter_map(|f| f.split_once('='));
    let found = fields.find(|(key, _)| *key == name);
    let (_, value) = found.unwrap_or_else(|| panic!("no {name} of {disk} in {files:?}"));
    value.parse().unwrap()
}

/// What is told of counters lies between what the guest's own files say before and after.
#[test]
fn counters_of_disks_and_huge_pages() {
    let mut scene = Scene::new();
    let options = ["--snapshotter", "blockfile", "--privileged"];
    let id = scene.start_sleeper(&options);
    let shim = Shim::of(&id);
    let write = "dd if=/dev/zero of=/file bs=64k count=64 conv=fsync 2>&1; \
                 echo 3 > /proc/sys/vm/drop_caches; cat /file | wc -c";
    scene.exec(&id, &[], &["sh", "-c", write]).exits(0);
    cgroup_files(&scene, &id);
    let pages = "cd /cgroup$(sed -n 's/^0:://p' /proc/self/cgroup) && echo 4M > hugetlb.2MB.max && \
                 echo 4 > /proc/sys/vm/nr_hugepages && mkdir -p /pages && \
                 mount -t hugetlbfs none /pages && fallocate -l 4M /pages/x";
    scene.exec(&id, &[], &["sh", "-c", pages]).exits(0);
    // There are more, and the container may not have them.
    let more = scene.exec(&id, &[], &["fallocate", "-l", "2M", "/pages/y"]);
    assert_ne!(more.code, Some(0), "{more:#?}");

    let before = cgroup_files(&scene, &id);
    let told = shim.stats().unwrap();
    let after = cgroup_files(&scene, &id);

    let pages = told.hugetlb.iter().find(|pages| pages.pagesize == "2MB");
    let pages = pages.unwrap_or_else(|| panic!("no huge pages in {told:?}"));
    assert_eq!((pages.current, pages.max), (4 << 20, 4 << 20));
    assert!(pages.failcnt > 0, "{pages:?}");
    for files in [&before, &after] {
        for (name, value) in [
            ("current", format!("{}\n", pages.current)),
            ("max", format!("{}\n", pages.max)),
            ("events", format!("max {}\n", pages.failcnt)),
        ] {
            assert_eq!(files[&format!("hugetlb.2MB.{name}")], value, "{name}");
        }
    }

    let disk = told.io.usage.iter().find(|entry| entry.wbytes > 0);
    let disk = disk.unwrap_or_else(|| panic!("no disk in {told:?}"));
    let number = format!("{}:{}", disk.major, disk.minor);
    for (name, value, least) in [
        ("rbytes", disk.rbytes, 4 << 20),
        ("wbytes", disk.wbytes, 4 << 20),
        ("rios", disk.rios, 1),
        ("wios", disk.wios, 1),
    ] {
        let [low, high] = [&before, &after].map(|files| io_stat(files, &number, name));
        println!("{name}: {value}, in the guest {low} to {high}");
        assert!((low..=high).contains(&value), "{name}");
        assert!(value >= least, "{name}: {value}");
    }
}

/// Pause, resume and a lack of memory are told in their places.
#[test]
fn events_of_pause_resume_and_oom() {
    let mut scene = Scene::new();
    let events = Events::listen(&scene);
    let id = scene.start_sleeper(&["--memory-limit", "33554432"]);
    scene.ctr(&["task", "pause", &id]).exits(0);
    scene.ctr(&["task", "resume", &id]).exits(0);
    assert_eq!(
        events.topics(&id, 4),
        [
            "/tasks/create",
            "/tasks/start",
            "/tasks/paused",
            "/tasks/resumed"
        ]
    );
    scene.exec(&id, &[], &["tail", "/dev/zero"]).exits(137);
    assert_eq!(
        events.topics(&id, 4),
        [
            "/tasks/exec-added",
            "/tasks/exec-started",
            "/tasks/oom",
            "/tasks/exit"
        ]
    );
}

/// A reader that closes a container's FIFO and opens it again, as one that rotates
/// its log does, misses nothing and stops nothing.
#[test]
fn reader_comes_back_to_the_fifo() {
    let mut scene = Scene::new();
    let directory = "/tmp/e2e-fifos";
    let _ = std::fs::remove_dir_all(directory);
    std::fs::create_dir_all(directory).unwrap();
    let script = "n=0; while [ $n -lt 300 ]; do n=$((n + 1)); echo $n; done; sleep 3600";
    let options = ["--fifo-dir", directory];
    let id = scene.start(&options, &["sh", "-c", script]);
    let said = run("find", &[directory, "-name", "*-stdout"]).exits(0);
    let fifo = said.stdout.trim().to_owned();
    assert!(!fifo.is_empty(), "no FIFO below {directory}");
    let mut lines = String::new();
    while lines.lines().last() != Some("300") {
        // Each reads a little and goes away.
        let mut head = Command::new("dd");
        head.args(["bs=64", "count=1", "status=none", &format!("if={fifo}")]);
        // Who is not written to waits for ever.
        lines.push_str(&returned(spawn(head)).exits(0).stdout);
    }
    let expected: String = (1..=300).map(|n| format!("{n}\n")).collect();
    assert_eq!(lines, expected);
    scene.ctr(&["task", "rm", "-f", &id]);
    std::fs::remove_dir_all(directory).unwrap();
}
