//! Limits of containers, enforced in the guest.

use std::fs;
use std::time::Instant;

use nacre_tests::{Changed, HugePages, Scene, Shim, eventually, process_of, run};
use serde_json::json;

use crate::host::{Events, pid_of, status_of};

#[test]
fn memory_kills_with_an_event() {
    let mut scene = Scene::new();
    let events = Events::listen(&scene);
    let id = scene.start_sleeper(&["--memory-limit", "33554432"]);
    // `tail` keeps what it reads without a newline.
    let said = scene.exec(&id, &[], &["tail", "/dev/zero"]);
    said.exits(137);
    // After create, start, exec-added and exec-started: the cause before the exit.
    let last = events.topics(&id, 6).split_off(4);
    assert_eq!(last, ["/tasks/oom", "/tasks/exit"]);
    // By the container's limit, not for want of the machine's memory.
    let counted = Shim::of(&id).stats().unwrap().memory_events;
    assert!(counted.max > 0 && counted.oom_kill == 1, "{counted:?}");
    scene.exec(&id, &[], &["true"]).exits(0);
}

#[test]
fn memory_kills_init_with_137() {
    let mut scene = Scene::new();
    scene
        .run_with(&["--memory-limit", "33554432"], &["tail", "/dev/zero"])
        .exits(137);
}

#[test]
fn processes_are_limited() {
    let mut scene = Scene::new();
    let said = scene.run_spec(|spec| {
        spec["linux"]["resources"]["pids"] = json!({"limit": 8});
        let script = "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 60 & done; echo all";
        spec["process"]["args"] = json!(["sh", "-c", script]);
    });
    assert!(!said.stdout.contains("all"), "{said:#?}");
    said.complains(&["can't fork"]);
}

#[test]
fn processor_time_is_limited() {
    let mut scene = Scene::new();
    // Ends without throttling too, after 3 s of processor time.
    let script = "cd /sys/fs/cgroup; cat cpu.max; of() { grep $1 cpu.stat | cut -d' ' -f2; }; while :; do :; done & \
                  until [ $(of nr_throttled) -gt 3 ]; do [ $(of usage_usec) -lt 3000000 ] || exit 1; done; echo throttled";
    let said = scene.run_spec(|spec| {
        spec["linux"]["resources"]["cpu"] = json!({"quota": 50000, "period": 100_000});
        with_cgroup(spec);
        spec["process"]["args"] = json!(["sh", "-c", script]);
    });
    said.exits(0).prints("50000 100000\nthrottled\n");
}

#[test]
fn rlimits_sysctls_groups_privileges_and_devices() {
    let mut scene = Scene::new();
    let script = "ulimit -n; cat /proc/sys/net/ipv4/ip_forward; id -G; grep NoNewPrivs /proc/self/status; \
                  cat /proc/self/oom_score_adj; echo x > /dev/void; ls -l /dev/void | cut -c1-10";
    let said = scene.run_spec(|spec| {
        spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "hard": 77, "soft": 66}]);
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [50, 60]});
        spec["process"]["noNewPrivileges"] = json!(true);
        spec["process"]["oomScoreAdj"] = json!(333);
        spec["linux"]["devices"] = json!([{
            "path": "/dev/void", "type": "c", "major": 1, "minor": 3, "fileMode": 0o666,
        }]);
        spec["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1"});
        spec["process"]["args"] = json!(["sh", "-c", script]);
    });
    said.exits(0)
        .prints("66\n1\n1000 50 60\nNoNewPrivs:\t1\n333\ncrw-rw-rw-\n");
}

/// A cgroup of the guest, mounted in the container.
pub fn with_cgroup(spec: &mut serde_json::Value) {
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(json!({
        "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
        "options": ["ro", "nosuid", "noexec", "nodev"],
    }));
}

/// A file of the pod's cgroup on the host.
fn on_host(id: &str, file: &str) -> String {
    let path = format!("/sys/fs/cgroup/default/{id}/{file}");
    fs::read_to_string(path).unwrap().trim().to_owned()
}

const MIB: u64 = 1 << 20;

/// Bytes of memory the guest has.
fn guest_memory(scene: &Scene, id: &str) -> u64 {
    let said = scene.exec(id, &[], &["grep", "MemTotal", "/proc/meminfo"]);
    let said = said.exits(0).stdout;
    let kib: u64 = said.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib << 10
}

/// Bytes the machine occupies on the host.
fn occupied(scene: &Scene, id: &str) -> u64 {
    let status = status_of(&pid_of(scene, id));
    let kib = status["RssShmem"].split_whitespace().next().unwrap();
    kib.parse::<u64>().unwrap() << 10
}

#[test]
fn memory_grows_beyond_the_machine_and_is_given_back() {
    let mut scene = Scene::new();
    let memory = |mib: u64| json!({"memory": {"limit": mib * MIB}});
    let id = scene.start_spec(|spec| {
        spec["linux"]["resources"] = memory(128);
        spec["process"]["args"] = json!(["sleep", "3600"]);
        with_cgroup(spec);
    });
    let shim = Shim::of(&id);
    let (boot, before) = (guest_memory(&scene, &id), occupied(&scene, &id));
    // dd has a buffer of that size.
    let fill = ["dd", "if=/dev/zero", "of=/dev/null", "bs=300M", "count=1"];
    scene
        .exec(&id, &[], &fill)
        .exits(1)
        .complains(&["out of memory"]);

    let start = Instant::now();
    shim.update(&memory(512)).unwrap();
    println!("grown after {:.1?}", start.elapsed());
    assert_eq!(guest_memory(&scene, &id), boot + 384 * MIB);
    let host = (512 + 128) * MIB;
    assert_eq!(on_host(&id, "memory.max"), host.to_string());
    let limit = ["cat", "/sys/fs/cgroup/memory.max"];
    let said = scene.exec(&id, &[], &limit).exits(0);
    assert_eq!(said.stdout.trim(), (512 * MIB).to_string());
    scene.exec(&id, &[], &fill).exits(0);
    let full = occupied(&scene, &id);
    assert!(full > before + 250 * MIB, "{before} then {full}");

    let start = Instant::now();
    shim.update(&memory(128)).unwrap();
    println!("shrunk after {:.1?}", start.elapsed());
    assert_eq!(guest_memory(&scene, &id), boot);
    let after = occupied(&scene, &id);
    println!("on the host: {before} bytes, {full} grown and filled, {after} shrunk");
    assert!(after + 200 * MIB < full, "{full} then {after}");
    let host = (128 + 128) * MIB;
    assert_eq!(on_host(&id, "memory.max"), host.to_string());

    let error = shim.update(&memory(1 << 20)).unwrap_err().to_string();
    assert!(
        error.contains("its virtual machine can have at most"),
        "{error}"
    );
    scene.exec(&id, &[], &["true"]).exits(0);
}

fn oom_score_adj(pid: &str) -> i32 {
    let text = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
    text.trim().parse().unwrap()
}

/// Also when containerd's unit spares it and all that it starts.
#[test]
fn the_kernel_prefers_the_machine_to_the_shim() {
    let mut scene = Scene::new();
    for wanted in [None, Some(700)] {
        let id = scene.start_spec(|spec| {
            if let Some(wanted) = wanted {
                spec["process"]["oomScoreAdj"] = json!(wanted);
            }
            spec["process"]["args"] = json!(["sleep", "3600"]);
        });
        let monitor = pid_of(&scene, &id);
        let shim = oom_score_adj(&status_of(&monitor)["PPid"]);
        let expected = wanted.unwrap_or(i32::MIN).max(shim + 100);
        assert_eq!(oom_score_adj(&monitor), expected);
        assert_eq!(oom_score_adj(&process_of(&id, "virtiofsd")), expected);
    }
}

/// As when the overhead is not enough.
#[test]
fn a_full_cgroup_ends_the_machine_and_not_the_shim() {
    let mut scene = Scene::new();
    let id = scene.start_sleeper(&["--memory-limit", "134217728"]);
    let shim = status_of(&pid_of(&scene, &id))["PPid"].clone();
    let stat = on_host(&id, "memory.stat");
    let bytes = |name: &str| -> u64 {
        let line = stat.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim().parse().unwrap()
    };
    // Of files' pages the kernel would make room for more.
    let held = bytes("anon ") + bytes("shmem ") + bytes("kernel ");
    let limit = format!("/sys/fs/cgroup/default/{id}/memory.max");
    fs::write(limit, (held + 8 * MIB).to_string()).unwrap();
    // The container may, the pod may not. Nobody is left to tell how it ended.
    let fill = ["dd", "if=/dev/zero", "of=/dev/null", "bs=100M", "count=1"];
    let said = scene.exec(&id, &[], &fill);
    assert_ne!(said.code, Some(0), "{said:#?}");
    scene.await_status(&id, "STOPPED");
    eventually("the pod's log has it", || {
        let log = run("nacre", &["logs", &id]).exits(0).stdout;
        let mut lines = log.lines();
        lines.any(|line| line.contains("monitor process ended") && line.contains("SIGKILL"))
    });
    let events = on_host(&id, "memory.events");
    let kills = events
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill "));
    assert_ne!(kills.unwrap(), "0");
    let group = fs::read_to_string(format!("/proc/{shim}/cgroup")).unwrap();
    assert_eq!(group, format!("0::/default/{id}\n"));
    let said = scene.ctr(&["task", "rm", &id]).exits(0);
    said.complains(&["exit with non-zero exit code 137"]);
}

#[test]
fn processor_time_and_processes_are_changed_while_running() {
    let mut scene = Scene::new();
    let id = scene.start_spec(|spec| {
        spec["linux"]["resources"] = json!({"cpu": {"quota": 95_000, "period": 100_000}});
        spec["process"]["args"] = json!(["sleep", "3600"]);
        with_cgroup(spec);
    });
    let shim = Shim::of(&id);
    let limits = ["sh", "-c", "cd /sys/fs/cgroup; cat cpu.max pids.max"];
    for (quota, pids) in [(99_000, 50), (90_000, 20)] {
        let cpu = json!({"cpu": {"quota": quota, "period": 100_000}, "pids": {"limit": pids}});
        shim.update(&cpu).unwrap();
        let said = scene.exec(&id, &[], &limits).exits(0);
        assert_eq!(said.stdout, format!("{quota} 100000\n{pids}\n"));
        // And a tenth of a processor for what is not the container's.
        let on_the_host = format!("{} 100000", quota + 10_000);
        assert_eq!(on_host(&id, "cpu.max"), on_the_host);
    }
    // For 0.3 s of processor time.
    let spin = "of() { grep $1 /sys/fs/cgroup/cpu.stat | cut -d' ' -f2; }; \
                before=$(of nr_throttled); end=$(($(of usage_usec) + 300000)); \
                while [ $(of usage_usec) -lt $end ]; do :; done; \
                [ $(of nr_throttled) -gt $before ] && echo throttled || echo free";
    for (quota, how) in [(50_000, "throttled\n"), (200_000, "free\n")] {
        let cpu = json!({"cpu": {"quota": quota, "period": 100_000}});
        shim.update(&cpu).unwrap();
        let said = scene.exec(&id, &[], &["sh", "-c", spin]);
        said.exits(0).prints(how);
    }
    let many = "for i in $(seq 30); do sleep 3600 >/dev/null 2>&1 & done; echo all";
    let fork = || scene.exec(&id, &[], &["sh", "-c", many]);
    fork().complains(&["can't fork"]);
    shim.update(&json!({"pids": {"limit": 100}})).unwrap();
    fork().exits(0).prints("all\n");
}

/// `hugepages = true`: a machine's memory is the pool's, all of it from the start, and
/// without enough of them there is no pod.
#[test]
fn machines_of_the_host_s_huge_pages() {
    const LIMIT: [&str; 2] = ["--memory-limit", "67108864"];
    let _config = Changed::new("hugepages", "true");
    let pool = HugePages::new(96);
    let mut scene = Scene::new();
    // 64 MiB and as much for the guest's kernel and agent.
    let id = scene.start_sleeper(&LIMIT);
    assert_eq!(pool.left(), 32);
    scene
        .exec(&id, &[], &["echo", "here"])
        .exits(0)
        .prints("here\n");
    scene
        .run_with(&LIMIT, &["true"])
        .exits(1)
        .complains(&["128 MiB", "vm.nr_hugepages"]);
    scene.remove(&id);
    eventually("they are given back", || pool.left() == 96);
}
