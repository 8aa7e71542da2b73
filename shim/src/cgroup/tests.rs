//! Limits; groups of plain files; groups of this machine.

use std::process::{Child, Command};

use super::bus::testing::{Answer, FakeBus};
use super::bus::{Body, Message};
use super::*;
use oci_spec::runtime::LinuxResources;
use serde_json::json;

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
    let (group, _) = group(dir.path(), "/pod", None, &Process::new());
    fs::create_dir(&group.path).unwrap();
    let events_file = group.path.join("memory.events");
    let dir = File::open(&group.path).unwrap();
    let cgroup = PodCgroup { group, dir };
    assert!(!cgroup.ran_out_of_memory(), "without the controller");
    for (kills, expected) in [("0", false), ("2", true)] {
        let events = format!("max 5\noom 3\noom_kill {kills}\noom_group_kill 1\n");
        fs::write(&events_file, events).unwrap();
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

/// A child of the test's, which is killed with it.
pub(super) struct Process(pub(super) Child);

impl Process {
    pub(super) fn new() -> Self {
        Self(Command::new("sleep").arg("600").spawn().unwrap())
    }

    pub(super) fn pid(&self) -> u32 {
        self.0.id()
    }

    /// What the kernel says of its group.
    pub(super) fn group(&self) -> String {
        let text = fs::read_to_string(format!("/proc/{}/cgroup", self.pid())).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("0::"));
        line.unwrap_or("/").to_owned()
    }

    fn is_running(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Already dead is fine.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn group(root: &Path, path: &str, systemd: Option<Systemd>, shim: &Process) -> (Group, Place) {
    let place = Place::parse(path).unwrap();
    let shim = Resident::at_home(root, shim.pid());
    (Group::new(root, &place, systemd, shim), place)
}

/// Plain files in the place of a cgroup's.
#[test]
fn a_list_is_lifted_to_what_the_group_above_has() {
    let root = tempfile::tempdir().unwrap();
    let shim = Process::new();
    let (group, _) = group(root.path(), "/pod", None, &shim);
    fs::create_dir(&group.path).unwrap();
    fs::write(root.path().join("cpuset.cpus.effective"), "0-7\n").unwrap();
    let cpus = group.path.join("cpuset.cpus");
    let set = |list: Option<&str>| {
        let limits = Limits {
            cpus: list.and_then(NumberList::parse),
            ..Limits::default()
        };
        let limits = group.with_lists(&limits).unwrap();
        group.write_limits(&limits).unwrap();
        limits.cpus.map(|cpus| cpus.to_string())
    };
    assert_eq!(set(None), None, "was never set");
    assert!(!cpus.exists());
    fs::write(&cpus, "").unwrap();
    assert_eq!(set(None), None);
    set(Some("2-3"));
    assert_eq!(fs::read_to_string(&cpus).unwrap(), "2-3");
    assert_eq!(set(None).as_deref(), Some("0-7"));
    assert_eq!(fs::read_to_string(&cpus).unwrap(), "0-7");
}

/// A systemd that makes plain directories.
fn with_plain_directories(root: &Path, procs: String) -> (FakeBus, Systemd) {
    let directory = root.join("a.slice/a-b.slice/nacre-pod.scope");
    let job = || Body::default().path("/job/1");
    let removed = || {
        Body::default()
            .number(1)
            .path("/job/1")
            .text("u")
            .text("done")
    };
    let signal =
        move || Answer::Signal("org.freedesktop.systemd1.Manager", "JobRemoved", removed());
    let bus = FakeBus::new(move |call: &Message| match call.name() {
        "StartTransientUnit" => {
            fs::create_dir_all(&directory).unwrap();
            for file in ["memory.max", "cpu.max"] {
                fs::write(directory.join(file), "").unwrap();
            }
            fs::write(directory.join("cgroup.procs"), &procs).unwrap();
            vec![Answer::Return(job()), signal()]
        }
        "StopUnit" => {
            fs::remove_dir_all(&directory).unwrap();
            vec![Answer::Return(job()), signal()]
        }
        _ => vec![Answer::Return(Body::default())],
    });
    let systemd = Systemd {
        system_bus: bus.path().into(),
        private: root.join("nobody"),
    };
    (bus, systemd)
}

#[test]
fn a_unit_is_systemd_s_to_make_limit_and_end() {
    let root = tempfile::tempdir().unwrap();
    let shim = Process::new();
    let (bus, systemd) = with_plain_directories(root.path(), format!("1\n{}\n", shim.pid()));
    let (group, place) = group(root.path(), "a-b.slice:nacre:pod", Some(systemd), &shim);
    let limits = Limits {
        memory_bytes: Some(4096),
        ..Limits::default()
    };
    let cgroup = PodCgroup::make(group, root.path(), &place, &limits).unwrap();
    let memory = || fs::read_to_string(cgroup.path().join("memory.max")).unwrap();
    assert_eq!(memory(), "4096");
    assert_eq!(bus.take_calls("StartTransientUnit").len(), 1);

    // A shorter text does not replace a longer one in a plain file.
    fs::write(cgroup.path().join("memory.max"), "").unwrap();
    cgroup.set_limits(&Limits::default()).unwrap();
    assert_eq!(memory(), "max");
    assert_eq!(bus.take_calls("SetUnitProperties").len(), 1);

    let error = cgroup.remove().unwrap_err();
    assert!(matches!(error, CgroupError::Inside(_)), "{error}");
    fs::write(cgroup.path().join("cgroup.procs"), "1\n").unwrap();
    cgroup.remove().unwrap();
    assert_eq!(bus.take_calls("StopUnit").len(), 1);
    assert!(!cgroup.path().exists());
}

/// Such as in a container with another part of the tree at its root.
#[test]
fn a_unit_that_is_elsewhere_is_none() {
    let root = tempfile::tempdir().unwrap();
    let shim = Process::new();
    let (bus, systemd) = with_plain_directories(root.path(), "1\n".into());
    let (group, place) = group(root.path(), "a-b.slice:nacre:pod", Some(systemd), &shim);
    // Who writes there gets an error.
    fs::create_dir_all(group.path.join("cgroup.kill")).unwrap();
    let made = PodCgroup::make(group, root.path(), &place, &Limits::default());
    let error = made.unwrap_err().to_string();
    let actual = shim.group();
    for part in [actual.as_str(), "/a.slice/a-b.slice/nacre-pod.scope"] {
        assert!(error.contains(part), "no {part} in: {error}");
    }
    assert_eq!(bus.take_calls("StopUnit").len(), 1);
}

/// Makes a group at one with processes, of plain files, which is left as it is; why not.
fn refused(cgroups_path: &str, systemd: Option<Systemd>) -> CgroupError {
    let root = tempfile::tempdir().unwrap();
    let shim = Process::new();
    let (group, place) = group(root.path(), cgroups_path, systemd, &shim);
    fs::create_dir_all(&group.path).unwrap();
    let path = group.path.clone();
    for (file, text) in [
        ("cgroup.events", "populated 1\nfrozen 0\n"),
        ("cgroup.kill", ""),
        ("memory.max", ""),
        ("cpu.max", ""),
    ] {
        fs::write(path.join(file), text).unwrap();
    }
    let made = PodCgroup::make(group, root.path(), &place, &Limits::default());
    for file in ["cgroup.kill", "memory.max"] {
        assert_eq!(fs::read_to_string(path.join(file)).unwrap(), "", "{file}");
    }
    made.unwrap_err()
}

#[test]
fn a_group_with_processes_is_another_s() {
    let error = refused("/pod", None);
    assert!(matches!(error, CgroupError::Exists(_)), "{error}");
}

/// systemd has a unit of this name, and does not say more of it.
#[test]
fn a_unit_that_may_be_another_s_is_left_alone() {
    let bus = FakeBus::new(|call: &Message| {
        let error = match call.name() {
            "StartTransientUnit" => "org.freedesktop.systemd1.UnitExists",
            "GetUnit" => "org.freedesktop.DBus.Error.AccessDenied",
            _ => return vec![Answer::Return(Body::default())],
        };
        vec![Answer::Error(error, "no")]
    });
    let systemd = Systemd {
        system_bus: bus.path().into(),
        private: "/none".into(),
    };
    let error = refused("a-b.slice:nacre:pod", Some(systemd));
    let text = chain(&error);
    assert!(text.contains("AccessDenied"), "{text}");
    assert_eq!(bus.take_calls("GetUnit").len(), 1);
    assert!(bus.take_calls("StopUnit").is_empty());
}

/// The first writable cgroup v2 mount, also on hosts that have v1 as well.
fn root() -> Option<PathBuf> {
    let roots = [CGROUP_ROOT, "/sys/fs/cgroup/unified"].map(PathBuf::from);
    let root = roots
        .into_iter()
        .find(|path| statfs(path).is_ok_and(|stat| stat.filesystem_type() == CGROUP2_SUPER_MAGIC));
    let Some(root) = root else {
        eprintln!("skipped: no cgroup v2 here");
        return None;
    };
    let probe = root.join(format!(
        "nacre-test-probe-{:?}",
        std::thread::current().id()
    ));
    match fs::create_dir(&probe).and_then(|()| fs::remove_dir(&probe)) {
        Ok(()) => Some(root),
        Err(error) => {
            eprintln!("skipped: not allowed to make cgroups: {error}");
            None
        }
    }
}

#[test]
fn the_shim_is_in_the_group_and_outlives_it() {
    let Some(root) = root() else {
        return;
    };
    let mut shim = Process::new();
    let home = shim.group();
    let name = format!("/nacre-test-{}/pod", std::process::id());
    let (group, place) = group(&root, &name, None, &shim);
    let cgroup = PodCgroup::make(group, &root, &place, &Limits::default()).unwrap();
    assert_eq!(shim.group(), name);

    let other = Process::new();
    write(
        &cgroup.path().join("cgroup.procs"),
        &other.pid().to_string(),
    )
    .unwrap();
    // The zombie holds the group until it is reaped.
    let reaper = std::thread::spawn(move || {
        let mut other = other;
        other.0.wait().unwrap()
    });
    cgroup.remove().unwrap();
    assert!(!reaper.join().unwrap().success());
    assert!(shim.is_running());
    assert_eq!(shim.group(), home);
    cgroup.remove().unwrap();
    assert!(!cgroup.path().exists());
    fs::remove_dir(cgroup.path().parent().unwrap()).unwrap();
}

#[test]
fn a_group_that_cannot_be_limited_is_not_left() {
    let Some(root) = root() else {
        return;
    };
    let mut shim = Process::new();
    let home = shim.group();
    let name = format!("/nacre-test-limits-{}", std::process::id());
    let (group, place) = group(&root, &name, None, &shim);
    // Less than a millisecond, or no such controller.
    let limits = Limits {
        cpu: Some((1, 100_000)),
        ..Limits::default()
    };
    let error = PodCgroup::make(group, &root, &place, &limits).unwrap_err();
    assert!(error.to_string().contains("cpu.max"), "{error}");
    assert!(!place.below(&root).exists());
    assert!(shim.is_running());
    assert_eq!(shim.group(), home);
}

/// A systemd that does not answer and what holds on to the group are waited for at once.
#[test]
fn the_end_of_a_group_has_one_limit() {
    let Some(root) = root() else {
        return;
    };
    let shim = Process::new();
    let bus = FakeBus::new(|call: &Message| match call.name() {
        "StopUnit" => Vec::new(),
        _ => vec![Answer::Return(Body::default())],
    });
    let systemd = Systemd {
        system_bus: bus.path().into(),
        private: "/none".into(),
    };
    let name = format!("-.slice:nacre-test:{}", std::process::id());
    let (group, _) = group(&root, &name, Some(systemd), &shim);
    let below = group.path.join("below");
    fs::create_dir_all(&below).unwrap();
    let begin = Instant::now();
    let error = group.remove().unwrap_err();
    let took = begin.elapsed();
    fs::remove_dir(&below).unwrap();
    fs::remove_dir(&group.path).unwrap();
    assert!(error.to_string().contains("remove cgroup"), "{error}");
    assert_eq!(bus.take_calls("StopUnit").len(), 1);
    assert!(took < REMOVE_TIMEOUT * 3 / 2, "{took:?}");
}

/// It would kill itself, and containerd. Plain files in the place of a cgroup's.
#[test]
fn who_is_at_home_in_a_group_does_not_remove_it() {
    let root = tempfile::tempdir().unwrap();
    let shim = Process::new();
    let path = root.path().join(shim.group().trim_start_matches('/'));
    fs::create_dir_all(&path).unwrap();
    let kill = path.join("cgroup.kill");
    fs::write(&kill, "").unwrap();
    fs::write(path.join("cgroup.procs"), format!("{}\n", shim.pid())).unwrap();
    let group = Group {
        path,
        scope: None,
        shim: Resident::at_home(root.path(), shim.pid()),
    };
    let error = group.remove().unwrap_err();
    assert!(matches!(error, CgroupError::Inside(_)), "{error}");
    assert_eq!(fs::read_to_string(&kill).unwrap(), "", "nobody is killed");
}
