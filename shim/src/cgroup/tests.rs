//! Limits, lists and paths; one test on a cgroup of this machine.

use super::*;
use serde_json::json;

#[test]
fn both_forms_of_paths() {
    assert_eq!(expand("/default/id").unwrap(), ["default", "id"]);
    assert_eq!(
        expand("kubepods-burstable-pod1.slice:cri-containerd:abc").unwrap(),
        [
            "kubepods.slice",
            "kubepods-burstable.slice",
            "kubepods-burstable-pod1.slice",
            "cri-containerd-abc.scope",
        ]
    );
    assert_eq!(
        expand(":nerdctl:abc").unwrap(),
        ["system.slice", "nerdctl-abc.scope"]
    );
    assert_eq!(expand("-.slice::x.scope").unwrap(), ["x.scope"]);
}

#[test]
fn paths_do_not_climb() {
    for path in [
        "",
        "/",
        "/a/../b",
        "a:b",
        "a.slice:p:x/y",
        "a/b.slice:p:x",
        "..slice:p:x",
    ] {
        assert!(expand(path).is_err(), "{path:?}");
    }
}

#[test]
fn updates_change_what_they_name() {
    let resources = |value| -> LinuxResources { serde_json::from_value(value).unwrap() };
    let both = json!({"memory": {"limit": 4096}, "cpu": {"quota": 150_000}});
    let limits = Limits::default().updated_by(&resources(both));
    assert_eq!(limits.memory_bytes, Some(4096));
    assert_eq!(limits.cpu, Some((150_000, 100_000)));
    let cpu = json!({"memory": {"limit": 0}, "cpu": {"quota": 1000, "period": 50_000}});
    let limits = limits.updated_by(&resources(cpu));
    assert_eq!(limits.memory_bytes, Some(4096));
    assert_eq!(limits.cpu, Some((1000, 50_000)));
    let period = json!({"cpu": {"quota": 0, "period": 10_000}});
    assert_eq!(limits.updated_by(&resources(period)), limits);
    let lifted = json!({"memory": {"limit": -1}, "cpu": {"quota": -1}});
    assert_eq!(limits.updated_by(&resources(lifted)), Limits::default());
}

#[test]
fn what_was_killed_for_want_of_memory_is_known() {
    let dir = tempfile::tempdir().unwrap();
    let cgroup = PodCgroup {
        path: dir.path().to_owned(),
        dir: File::open(dir.path()).unwrap(),
    };
    assert!(!cgroup.ran_out_of_memory(), "without the controller");
    for (kills, expected) in [("0", false), ("2", true)] {
        let events = format!("max 5\noom 3\noom_kill {kills}\noom_group_kill 1\n");
        fs::write(dir.path().join("memory.events"), events).unwrap();
        assert_eq!(cgroup.ran_out_of_memory(), expected);
    }
}

#[test]
fn more_of_two() {
    let limits = |memory_bytes, cpu| Limits {
        memory_bytes,
        cpu,
        ..Limits::default()
    };
    let one = limits(Some(10), Some((10, 10)));
    let other = limits(Some(20), Some((15, 20)));
    assert_eq!(one.or_more(other), limits(Some(20), Some((10, 10))));
    assert_eq!(one.or_more(Limits::default()), Limits::default());
}

#[test]
fn containers_together() {
    let limits = |memory_bytes, cpu| Limits {
        memory_bytes,
        cpu,
        ..Limits::default()
    };
    let one = limits(Some(10), Some((5, 20)));
    assert_eq!(Limits::together(&[one]), one);
    let other = limits(Some(u64::MAX), Some((100_000, 50_000)));
    let both = limits(Some(u64::MAX), Some((225_000, 100_000)));
    assert_eq!(Limits::together(&[one, other]), both);
    let free = Limits::default();
    assert_eq!(Limits::together(&[one, free]), free);
    assert_eq!(Limits::together(&[]), free);
}

#[test]
fn processors_are_those_of_all_containers() {
    let of = |cpus: &str| {
        let resources = json!({"cpu": {"cpus": cpus, "mems": "0"}});
        Limits::default().updated_by(&serde_json::from_value(resources).unwrap())
    };
    let list = |text| NumberList::parse(text);
    let (one, other) = (of("0-1"), of("5"));
    assert_eq!(Limits::together(&[one, other]).cpus, list("0-1,5"));
    assert_eq!(Limits::together(&[one, other]).mems, list("0"));
    assert_eq!(Limits::together(&[one, Limits::default()]).cpus, None);
    assert_eq!(one.or_more(other).cpus, list("0-1,5"));
    let empty = serde_json::from_value(json!({"cpu": {"cpus": ""}})).unwrap();
    assert_eq!(one.updated_by(&empty), one, "names nothing");
}

#[test]
fn huge_pages_of_all_sizes_count() {
    let limits = |value| {
        let resources = serde_json::from_value(json!({"hugepageLimits": value}));
        Limits::default().updated_by(&resources.unwrap())
    };
    let some = json!([{"pageSize": "2MB", "limit": 4 << 20}, {"pageSize": "1GB", "limit": 0}]);
    let none = json!([{"pageSize": "2MB", "limit": -1}]);
    let (some, none) = (limits(some), limits(none));
    assert_eq!(some.huge_pages.bytes(), 4 << 20);
    assert_eq!(none.huge_pages.bytes(), 0);
    let updated =
        json!([{"pageSize": "2MB", "limit": 4 << 20}, {"pageSize": "2MB", "limit": 6 << 20}]);
    assert_eq!(
        limits(updated).huge_pages.bytes(),
        6 << 20,
        "as CRI updates it"
    );
    assert_eq!(Limits::together(&[some, some]).huge_pages.bytes(), 8 << 20);
    let cpu = serde_json::from_value(json!({"cpu": {"quota": 5}})).unwrap();
    assert_eq!(some.updated_by(&cpu).huge_pages.bytes(), 4 << 20);
}

/// As the guest's pools do.
#[test]
fn huge_pages_of_sizes_that_an_update_does_not_name_stay() {
    let update = |limits: Limits, value| {
        let resources = serde_json::from_value(json!({"hugepageLimits": value}));
        limits.updated_by(&resources.unwrap())
    };
    let both =
        json!([{"pageSize": "2MB", "limit": 4 << 20}, {"pageSize": "1GB", "limit": 2_u64 << 30}]);
    let before = update(Limits::default(), both);
    let bytes = |limits: Limits| limits.huge_pages.bytes();
    assert_eq!(bytes(before), (4 << 20) + (2 << 30));
    let after = update(before, json!([{"pageSize": "2MB", "limit": 6 << 20}]));
    assert_eq!(bytes(after), (6 << 20) + (2 << 30));
    let less = update(after, json!([{"pageSize": "1GB", "limit": -1}]));
    assert_eq!(bytes(less), 6 << 20);
    // Between two limits there is room for either.
    let large = json!([{"pageSize": "2MB", "limit": 0}, {"pageSize": "1GB", "limit": 1 << 30}]);
    let large = update(less, large);
    assert_eq!(bytes(less.or_more(large)), (6 << 20) + (1 << 30));
}

/// Plain files in the place of a cgroup's.
#[test]
fn a_list_is_lifted_to_what_the_group_above_has() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("pod");
    fs::create_dir(&path).unwrap();
    fs::write(root.path().join("cpuset.cpus.effective"), "0-7\n").unwrap();
    let cpus = path.join("cpuset.cpus");
    let dir = File::open(&path).unwrap();
    let cgroup = PodCgroup { path, dir };
    cgroup.set_list("cpuset.cpus", None).unwrap();
    assert!(!cpus.exists(), "was never set");
    fs::write(&cpus, "").unwrap();
    cgroup
        .set_list("cpuset.cpus", NumberList::parse("2-3"))
        .unwrap();
    assert_eq!(fs::read_to_string(&cpus).unwrap(), "2-3");
    cgroup.set_list("cpuset.cpus", None).unwrap();
    assert_eq!(fs::read_to_string(&cpus).unwrap(), "0-7");
}

/// The first writable cgroup v2 mount, also on hosts that have v1 as well.
fn root() -> Option<PathBuf> {
    [CGROUP_ROOT, "/sys/fs/cgroup/unified"]
        .map(PathBuf::from)
        .into_iter()
        .find(|path| statfs(path).is_ok_and(|stat| stat.filesystem_type() == CGROUP2_SUPER_MAGIC))
}

#[test]
fn leftover_processes_are_killed_on_removal() {
    let Some(root) = root() else {
        eprintln!("skipped: no cgroup v2 here");
        return;
    };
    let name = format!("/nacre-test-{}/pod", std::process::id());
    let cgroup = match PodCgroup::create_below(&root, &name, &Limits::default()) {
        Err(CgroupError::Io { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {
            eprintln!("skipped: not allowed to make cgroups");
            return;
        }
        result => result.unwrap(),
    };
    let mut child = std::process::Command::new("sleep")
        .arg("600")
        .spawn()
        .unwrap();
    cgroup.add_process(child.id()).unwrap();

    // The zombie holds the group until it is reaped.
    let reaper = std::thread::spawn(move || child.wait().unwrap());
    cgroup.remove().unwrap();
    assert!(!reaper.join().unwrap().success());
    cgroup.remove().unwrap();
    assert!(!cgroup.path().exists());
    fs::remove_dir(cgroup.path().parent().unwrap()).unwrap();
}
