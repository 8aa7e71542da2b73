//! Limits of containers, enforced in the guest.

use nacre_tests::Scene;
use serde_json::json;

use crate::host::Events;

#[test]
fn memory_kills_with_an_event() {
    let mut scene = Scene::new();
    let events = Events::listen(&scene);
    let id = scene.start_sleeper(&["--memory-limit", "33554432"]);
    // `tail` keeps what it reads without a newline.
    let said = scene.exec(&id, &[], &["tail", "/dev/zero"]);
    said.exits(137);
    // The two after create, start, exec-added and exec-started; the kill and the
    // exit are told in either order.
    let mut last = events.topics(&id, 6).split_off(4);
    last.sort();
    assert_eq!(last, ["/tasks/exit", "/tasks/oom"]);
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
        spec["linux"]["resources"]["cpu"] = json!({"quota": 20000, "period": 100_000});
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({
            "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
            "options": ["ro", "nosuid", "noexec", "nodev"],
        }));
        spec["process"]["args"] = json!(["sh", "-c", script]);
    });
    said.exits(0).prints("20000 100000\nthrottled\n");
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
