//! What systemd is asked, on a bus where a script is systemd.

use std::fs;

use super::*;
use crate::cgroup::NumberList;
use crate::cgroup::bus::testing::{Answer, FakeBus};
use crate::error::chain;

mod real;

const UNIT: &str = "cri-containerd-abc.scope";
const JOB: &str = "/org/freedesktop/systemd1/job/7";
const PATIENCE: Duration = Duration::from_secs(60);

/// A scope on a fake bus, its group a plain directory.
struct Host {
    bus: FakeBus,
    scope: Scope,
    root: tempfile::TempDir,
}

impl Host {
    fn new(script: impl FnMut(&Message) -> Vec<Answer> + Send + 'static) -> Self {
        let bus = FakeBus::new(script);
        let root = tempfile::tempdir().unwrap();
        let systemd = Systemd {
            system_bus: bus.path().into(),
            private: root.path().join("nobody"),
        };
        let scope = Scope {
            systemd,
            unit: Unit {
                slice: "kubepods-pod1.slice".into(),
                name: UNIT.into(),
            },
            group: root.path().join(UNIT),
        };
        fs::create_dir(&scope.group).unwrap();
        Self { bus, scope, root }
    }

    fn populated(self, populated: u32) -> Self {
        let events = format!("populated {populated}\nfrozen 0\n");
        fs::write(self.scope.group.join("cgroup.events"), events).unwrap();
        self
    }
}

fn removed(job: &str, result: &str) -> Body {
    let body = Body::default().number(7).path(job);
    body.text(UNIT).text(result)
}

/// A job that ends so, among others' jobs and somebody's lies.
fn job(result: &str) -> Vec<Answer> {
    vec![
        Answer::Signal(MANAGER, JOB_REMOVED, removed("/another", "failed")),
        Answer::Forged(MANAGER, JOB_REMOVED, removed(JOB, "canceled")),
        Answer::Return(Body::default().path(JOB)),
        Answer::Signal(MANAGER, "JobNew", Body::default()),
        Answer::Signal(MANAGER, JOB_REMOVED, removed(JOB, result)),
    ]
}

fn nothing() -> Vec<Answer> {
    vec![Answer::Return(Body::default())]
}

/// Systemd as it should be.
fn obliging(call: &Message) -> Vec<Answer> {
    match call.name() {
        "StartTransientUnit" | "StopUnit" => job(DONE),
        _ => nothing(),
    }
}

fn limits() -> Limits {
    Limits {
        memory_bytes: Some(192 << 20),
        cpu: Some((60_000, 100_000)),
        cpus: NumberList::parse("1,8-9"),
        ..Limits::default()
    }
}

#[test]
fn a_scope_is_made_around_a_process() {
    let host = Host::new(obliging);
    host.scope.start(4711, &limits()).unwrap();
    assert_eq!(
        host.bus.members(),
        ["Hello", "AddMatch", "Subscribe", "StartTransientUnit"]
    );
    let expected = [
        (
            "Description",
            Value::Text("nacre pod cri-containerd-abc".into()),
        ),
        ("Slice", Value::Text("kubepods-pod1.slice".into())),
        ("PIDs", Value::Numbers(vec![4711])),
        ("Delegate", Value::Flag(true)),
        ("DefaultDependencies", Value::Flag(false)),
        ("CollectMode", Value::Text("inactive-or-failed".into())),
        ("MemoryAccounting", Value::Flag(true)),
        ("CPUAccounting", Value::Flag(true)),
        ("IOAccounting", Value::Flag(true)),
        ("TasksAccounting", Value::Flag(true)),
        ("MemoryMax", Value::Number(192 << 20)),
        ("CPUQuotaPerSecUSec", Value::Number(600_000)),
        ("CPUQuotaPeriodUSec", Value::Number(100_000)),
        ("AllowedCPUs", Value::Bytes(vec![2, 3])),
    ];
    let expected = Body::default()
        .text(UNIT)
        .text("replace")
        .properties(&expected)
        .no_units();
    let calls = host.bus.take_calls("StartTransientUnit");
    let [call] = calls.as_slice() else {
        panic!("{calls:?}");
    };
    assert!(call.is(MANAGER, "StartTransientUnit"));
    call.assert_arguments(&expected);
}

#[test]
fn limits_change_for_as_long_as_it_runs() {
    let host = Host::new(obliging);
    host.scope.set_limits(&Limits::default()).unwrap();
    assert_eq!(host.bus.members(), ["Hello", "SetUnitProperties"]);
    let lifted = [
        ("MemoryMax", Value::Number(u64::MAX)),
        ("CPUQuotaPerSecUSec", Value::Number(u64::MAX)),
        ("CPUQuotaPeriodUSec", Value::Number(u64::MAX)),
    ];
    let expected = Body::default().text(UNIT).flag(true).properties(&lifted);
    host.bus.take_calls("SetUnitProperties")[0].assert_arguments(&expected);
}

#[test]
fn quotas_are_never_less_than_was_asked_for() {
    for (quota, period, expected) in [
        (100_000, 100_000, 1_000_000),
        (250_000, 100_000, 2_500_000),
        (33_333, 100_000, 340_000),
        (100, 1_000_000, 10_000),
        (u64::MAX, 1, u64::MAX),
    ] {
        assert_eq!(
            quota_per_second(quota, period),
            expected,
            "{quota}/{period}"
        );
    }
}

#[test]
fn a_job_that_fails_is_an_error_with_the_unit_s_name() {
    let host = Host::new(|call| match call.name() {
        "StartTransientUnit" => job("failed"),
        _ => nothing(),
    });
    let error = host.scope.start(1, &Limits::default()).unwrap_err();
    let text = chain(&error);
    assert!(text.contains(UNIT) && text.contains("(failed)"), "{text}");
}

/// Refuses a unit as long as there is the one before, whose group is `group`.
fn with_the_one_before(group: &str) -> impl FnMut(&Message) -> Vec<Answer> + Send + 'static {
    let mut exists = true;
    let group = group.to_owned();
    move |call| match call.name() {
        "GetUnit" => vec![Answer::Return(Body::default().path("/unit"))],
        "Get" => vec![Answer::Return(Body::default().variant(&group))],
        "StartTransientUnit" if exists => vec![Answer::Error(UNIT_EXISTS, "it was loaded")],
        "StopUnit" => {
            exists = false;
            job(DONE)
        }
        _ => obliging(call),
    }
}

#[test]
fn what_is_left_of_one_before_is_ended_first() {
    // It has a group without processes, or none any more.
    for group in ["/cri-containerd-abc.scope", ""] {
        let host = Host::new(with_the_one_before(group)).populated(0);
        host.scope.start(1, &Limits::default()).unwrap();
        assert_eq!(host.bus.take_calls("StartTransientUnit").len(), 2);
        let stop = &host.bus.take_calls("StopUnit")[0];
        stop.assert_arguments(&Body::default().text(UNIT).text("replace"));
        let get = &host.bus.take_calls("Get")[0];
        get.assert_arguments(&Body::default().text(SCOPE).text("ControlGroup"));
    }
}

/// It has processes, or is in another slice, where its processes are not seen.
#[test]
fn another_s_is_left_alone() {
    let elsewhere = "/user.slice/cri-containerd-abc.scope";
    for (group, populated) in [("/cri-containerd-abc.scope", 1), (elsewhere, 0)] {
        let host = Host::new(with_the_one_before(group)).populated(populated);
        let error = host.scope.start(1, &Limits::default()).unwrap_err();
        assert!(
            matches!(&error, CgroupError::Exists(unit) if unit == UNIT),
            "{error}"
        );
        assert!(host.bus.take_calls("StopUnit").is_empty());
    }
}

#[test]
fn unit_that_is_gone_meanwhile_is_made() {
    let mut exists = true;
    let host = Host::new(move |call| match call.name() {
        "StartTransientUnit" if std::mem::take(&mut exists) => {
            vec![Answer::Error(UNIT_EXISTS, "it was loaded")]
        }
        "GetUnit" | "StopUnit" => vec![Answer::Error(NO_SUCH_UNIT, "not loaded")],
        _ => obliging(call),
    });
    host.scope.start(1, &Limits::default()).unwrap();
}

#[test]
fn one_that_is_gone_is_ended() {
    let host = Host::new(|call| match call.name() {
        "StopUnit" => vec![Answer::Error(NO_SUCH_UNIT, "not loaded")],
        _ => nothing(),
    });
    host.scope.stop(PATIENCE).unwrap();
}

#[test]
fn without_a_system_bus_systemd_is_asked_directly() {
    let mut host = Host::new(obliging);
    std::mem::swap(
        &mut host.scope.systemd.system_bus,
        &mut host.scope.systemd.private,
    );
    host.scope.start(1, &Limits::default()).unwrap();
    assert_eq!(host.bus.members(), ["StartTransientUnit"]);

    host.scope.systemd.private = host.root.path().join("nobody");
    let text = chain(&host.scope.stop(PATIENCE).unwrap_err());
    assert!(
        text.contains(UNIT) && text.contains("connect to the bus"),
        "{text}"
    );
}
