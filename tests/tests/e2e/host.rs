//! What a pod looks like from the host: events, the monitor's jail, `nacre ps`
//! and `nacre logs`.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

use nacre_tests::{Changed, PATIENCE, Said, Scene, eventually, run};
use serde_json::{Value, json};

/// `ctr events`, listening before this is made.
pub struct Events {
    child: Child,
    lines: Receiver<String>,
}

impl Events {
    pub fn listen(scene: &Scene) -> Self {
        let mut child = Command::new("ctr")
            .arg("events")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (send, lines) = channel();
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        let events = Self { child, lines };
        // It listens once it hears: labels of a namespace are events, too.
        loop {
            scene.ctr(&["namespaces", "label", "default", "e2e=listening"]);
            if let Ok(line) = events.lines.recv_timeout(std::time::Duration::from_secs(1)) {
                assert!(line.contains("/namespaces/update"), "{line}");
                return events;
            }
        }
    }

    /// The next task event, of whatever container: its topic, and what is told of it.
    fn next(&self) -> Option<(String, Value)> {
        while let Ok(line) = self.lines.recv_timeout(PATIENCE) {
            // Time, namespace, topic and, as JSON, the event.
            let (head, told) = line.split_once('{').unwrap_or((&line, ""));
            let mut words = head.split_whitespace();
            if let Some(topic) = words.find(|word| word.starts_with("/tasks/")) {
                let told = serde_json::from_str(&format!("{{{told}"));
                return Some((topic.to_owned(), told.unwrap_or_else(|_| panic!("{line}"))));
            }
        }
        None
    }

    /// A container's next task event.
    pub fn next_of(&self, id: &str) -> Option<(String, Value)> {
        std::iter::from_fn(|| self.next()).find(|(_, told)| told["container_id"] == id)
    }

    /// The topics of a container's next task events.
    pub fn topics(&self, id: &str, count: usize) -> Vec<String> {
        topics(count, || self.next_of(id))
    }

    /// The same of whatever containers.
    pub fn topics_of_all(&self, count: usize) -> Vec<String> {
        topics(count, || self.next())
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn topics(count: usize, next: impl Fn() -> Option<(String, Value)>) -> Vec<String> {
    let mut topics = Vec::new();
    while topics.len() < count {
        topics.push(next().unwrap_or_else(|| panic!("only {topics:?}")).0);
    }
    topics
}

/// The events of a container with one exec, which is killed.
pub const LIFE_WITH_AN_EXEC: [&str; 7] = [
    "/tasks/create",
    "/tasks/start",
    "/tasks/exec-added",
    "/tasks/exec-started",
    "/tasks/exit",
    "/tasks/exit",
    "/tasks/delete",
];

#[test]
fn events_come_in_their_order() {
    let mut scene = Scene::new();
    let events = Events::listen(&scene);
    let id = scene.start_sleeper(&[]);
    scene.exec(&id, &[], &["true"]).exits(0);
    scene.remove(&id);
    let life = LIFE_WITH_AN_EXEC;
    assert_eq!(events.topics(&id, life.len()), life);
}

/// Host pid of a container, as containerd has it.
pub fn pid_of(scene: &Scene, id: &str) -> String {
    let said = scene.ctr(&["task", "ls"]).exits(0);
    let mut lines = said.stdout.lines().map(str::split_whitespace);
    let pid = lines.find_map(|mut words| (words.next() == Some(id)).then(|| words.next())?);
    pid.unwrap_or_else(|| panic!("no {id} in {said:#?}"))
        .to_owned()
}

/// The lines of `/proc/PID/status`.
pub fn status_of(pid: &str) -> BTreeMap<String, String> {
    fs::read_to_string(format!("/proc/{pid}/status"))
        .unwrap()
        .lines()
        .filter_map(|line| line.split_once(":\t"))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

#[test]
fn monitor_is_jailed() {
    let mut scene = Scene::new();
    let id = scene.start_sleeper(&["--cni"]);
    let pid = pid_of(&scene, &id);
    let status = status_of(&pid);
    let uids: Vec<&str> = status["Uid"].split('\t').collect();
    assert!(
        uids.iter().all(|uid| *uid == uids[0] && *uid != "0"),
        "{uids:?}"
    );
    assert_eq!(status["Groups"].trim(), "");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status[set], "0000000000000000", "{set}");
    }
    assert_eq!(status["NoNewPrivs"], "1");
    assert_eq!(
        fs::read_dir(format!("/proc/{pid}/root")).unwrap().count(),
        0
    );
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    for namespace in ["mnt", "pid", "ipc", "uts", "net"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of(&pid), of("self"), "{namespace}");
    }
    // Two pods, two users.
    let other = scene.start_sleeper(&[]);
    assert_ne!(status_of(&pid_of(&scene, &other))["Uid"], status["Uid"]);
}

#[test]
fn pod_is_in_the_cgroup_containerd_named() {
    let mut scene = Scene::new();
    let id = scene.start_sleeper(&["--memory-limit", "67108864"]);
    let pid = pid_of(&scene, &id);
    let group = format!("/default/{id}");
    // The monitor and its parent, the shim.
    for pid in [&pid, &status_of(&pid)["PPid"]] {
        let seen = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        assert_eq!(seen, format!("0::{group}\n"));
    }
    let limit = fs::read_to_string(format!("/sys/fs/cgroup{group}/memory.max")).unwrap();
    // The container's limit and the documented overhead of 128 MiB.
    assert_eq!(limit.trim(), ((64 + 128) << 20).to_string());
}

/// On a host without systemd, as the lab is.
#[test]
fn a_path_in_systemd_s_spelling_is_the_directory_it_would_make() {
    let mut scene = Scene::new();
    let id = scene.start_spec(|spec| {
        spec["linux"]["cgroupsPath"] = json!("nacre-e2e.slice:nacre:spelled");
        spec["process"]["args"] = json!(["sleep", "3600"]);
    });
    let slice = "/nacre.slice/nacre-e2e.slice";
    let seen = fs::read_to_string(format!("/proc/{}/cgroup", pid_of(&scene, &id))).unwrap();
    assert_eq!(seen, format!("0::{slice}/nacre-spelled.scope\n"));
    scene.ctr(&["task", "rm", "-f", &id]);
    // Its slices are not the pod's.
    for slice in [slice, "/nacre.slice"] {
        eventually("nothing is left in the slice", || {
            fs::remove_dir(format!("/sys/fs/cgroup{slice}")).is_ok()
        });
    }
}

/// What `nacre ps` says of a pod, by the names of its columns.
fn ps_row(id: &str) -> Option<BTreeMap<String, String>> {
    let table = run("nacre", &["ps"]).exits(0).stdout;
    let cells = |line: &str| -> Vec<String> {
        let cells = line.split("  ").map(str::trim);
        let cells = cells.filter(|cell| !cell.is_empty());
        cells.map(str::to_owned).collect()
    };
    let mut lines = table.lines();
    let names = cells(lines.next().unwrap());
    let row = lines.find(|line| line.starts_with(id))?;
    Some(names.into_iter().zip(cells(row)).collect())
}

#[test]
fn nacre_ps_and_logs_know_the_pod() {
    let _vcpus = Changed::new("default_vcpus", "2");
    let mut scene = Scene::new();
    let id = scene.start_sleeper(&[]);
    let pid = pid_of(&scene, &id);
    let row = ps_row(&id).unwrap();
    let columns = ["POD", "NAMESPACE", "PID", "STATE", "VCPUS"];
    let expected = [id.as_str(), "default", &pid, "running", "2"];
    assert_eq!(columns.map(|column| row[column].as_str()), expected);
    // What the guest has touched and the monitor itself, as the kernel counts it.
    let mib = |text: &str, unit| text.strip_suffix(unit).unwrap().parse::<u64>().unwrap();
    let shown = mib(&row["MEMORY"], " MiB");
    let resident = mib(status_of(&pid)["VmRSS"].trim(), " kB") / 1024;
    assert!(shown > 0 && shown.abs_diff(resident) < 64, "{row:?}");
    // It ages, and not faster than time.
    eventually("the pod is at least 3 s old", || {
        let uptime = ps_row(&id).unwrap()["UPTIME"].clone();
        let elapsed = run("ps", &["-o", "etimes=", "-p", &pid]).exits(0).stdout;
        let elapsed: u64 = elapsed.trim().parse().unwrap();
        match uptime.strip_suffix('s') {
            Some(seconds) => {
                let seconds = seconds.parse::<u64>().unwrap();
                assert!(seconds <= elapsed, "{seconds} of {elapsed} s");
                seconds >= 3
            }
            None => uptime == "1m" && elapsed >= 60,
        }
    });

    let said = run("nacre", &["logs", &id]).exits(0);
    assert!(said.stdout.contains("booting"), "{said:#?}");
    run("nacre", &["logs", "no-such-pod"])
        .exits(1)
        .complains(&["no-such-pod"]);
    let mut follow = Command::new("nacre");
    follow.args(["logs", "-f", &id]).stdout(Stdio::piped());
    let follower = follow.spawn().unwrap();

    run("kill", &["-9", &pid]).exits(0);
    scene.await_status(&id, "STOPPED");
    let row = ps_row(&id).unwrap();
    let columns = ["PID", "STATE", "UPTIME", "VCPUS", "MEMORY"];
    let expected = ["-", "stopped", "-", "-", "-"];
    assert_eq!(columns.map(|column| row[column].as_str()), expected);
    scene.ctr(&["task", "rm", "-f", &id]).exits(0);
    let followed = follower.wait_with_output().unwrap();
    let text = String::from_utf8(followed.stdout).unwrap();
    assert!(
        followed.status.success() && text.contains("exited"),
        "{text}"
    );
    assert_eq!(ps_row(&id), None);
}

/// containerd asks the shim's binary what it is before it starts one.
#[test]
fn containerd_reads_what_the_runtime_is() {
    let said = run(
        "ctr",
        &[
            "plugins",
            "inspect-runtime",
            "--runtime",
            nacre_tests::RUNTIME,
        ],
    )
    .exits(0);
    for word in [
        "\"io.containerd.nacre.v2\"",
        "containerd.io/runtime-allow-mounts",
        "ociVersionMax",
    ] {
        assert!(said.stdout.contains(word), "{said:#?}");
    }
    let said = run("containerd-shim-nacre-v2", &["-v"]).exits(0);
    assert!(
        said.stdout.contains("Version:  0."),
        "no version in {said:#?}"
    );
}

#[test]
fn processors_and_queues_follow_the_configuration() {
    let _vcpus = Changed::new("default_vcpus", "2");
    let _queues = Changed::new("net_queues", "2");
    let mut scene = Scene::new();
    let id = scene.start_sleeper(&["--cni", "--snapshotter", "erofs"]);
    let script = "grep -c ^processor /proc/cpuinfo; ls /sys/block/vda/mq; ls -d /sys/class/net/eth0/queues/rx-*; \
                  ping -c 1 -W 20 10.88.0.1 >/dev/null && echo reached";
    scene.exec(&id, &[], &["sh", "-c", script]).exits(0).prints(
        "2\n0\n1\n/sys/class/net/eth0/queues/rx-0\n/sys/class/net/eth0/queues/rx-1\nreached\n",
    );
}

/// `lab run` as on a host of its own, which the lab is: it has SVM.
fn lab(mode: &str, options: &[&str], command: &[&str]) -> Said {
    let mut lab = Command::new("tests/lab/lab");
    lab.current_dir("/nacre").env("LAB", mode).arg("run");
    lab.args(options).args(["/nacre", "--"]).args(command);
    lab.output().unwrap().into()
}

#[test]
fn lab_on_a_host_runs_the_tests_here() {
    let said = lab("host", &[], &["nacre-e2e", "--exact", "run::hostname"]).exits(0);
    assert!(said.stdout.contains("1 passed"), "{said:#?}");
    let out = std::env::temp_dir().join("e2e-lab-out");
    let script = "echo kept > $LAB_OUT/file; exit 7";
    let options = ["--out", out.to_str().unwrap()];
    lab("host", &options, &["sh", "-c", script]).exits(7);
    assert_eq!(fs::read_to_string(out.join("file")).unwrap(), "kept\n");
    fs::remove_dir_all(out).unwrap();
    lab("host", &["--timeout", "1"], &["sleep", "60"]).exits(124);
}

/// As on a host that never ran a container: with an image of its own making.
#[test]
fn demo_runs_on_a_host_that_can() {
    let script = "mount -t tmpfs none /opt/lab/images && exec bash tests/demo.sh";
    let namespace = ["env", "CONTAINERD_NAMESPACE=demo"];
    let command = [&namespace[..], &["unshare", "-m", "sh", "-c", script]].concat();
    let said = lab("auto", &[], &command).exits(0);
    let host = run("uname", &["-r"]).stdout;
    assert!(said.stdout.contains("hello from a micro-VM"), "{said:#?}");
    let releases = ["guest kernel: ", "host kernel:  "].map(|name| {
        let line = said.stdout.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("no {name:?} in {said:#?}"))
    });
    assert_eq!(releases[1], host.trim());
    assert_ne!(releases[0], releases[1]);
    let image = "docker.io/library/busybox:latest";
    run("ctr", &["-n", "demo", "image", "rm", "--sync", image]).exits(0);
    run("ctr", &["namespace", "rm", "demo"]).exits(0);
}
