//! Groups that systemd knows of: scopes, made by its D-Bus interface
//! (org.freedesktop.systemd1(5)), as runc makes them for its systemd driver.
//!
//! systemd has to know a group in its tree. It gives a slice the controllers that
//! the units in it need, takes away the others, and writes the limits of all its
//! units again when it reloads (`systemctl daemon-reload`). A directory that somebody made
//! below a slice loses its limits by that; a scope's are systemd's own, so they are told to
//! it as properties, and written to the group as well where properties are coarser.
//!
//! A scope is made around a process that is there: the shim. It is gone by itself when
//! its last process is; it is stopped all the same, so that its name is free again
//! when a pod's end has been told.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::bus::{Body, Bus, BusError, Message, Method, Property, Value};
use super::place::Unit;
use super::{CgroupError, Limits, is_populated};

/// There while the host runs systemd (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";
/// Where users of the system bus find it (D-Bus Specification, "Well-known Message Bus
/// Instances"),
const SYSTEM_BUS: &str = "/run/dbus/system_bus_socket";
/// and where systemd serves root on hosts that have none, as systemctl does.
const PRIVATE: &str = "/run/systemd/private";

const DRIVER: &str = "org.freedesktop.DBus";
const DRIVER_PATH: &str = "/org/freedesktop/DBus";
const SYSTEMD: &str = "org.freedesktop.systemd1";
const SYSTEMD_PATH: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const SCOPE: &str = "org.freedesktop.systemd1.Scope";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";
const JOB_REMOVED: &str = "JobRemoved";
const JOBS: &str = "type='signal',sender='org.freedesktop.systemd1',\
                    interface='org.freedesktop.systemd1.Manager',member='JobRemoved'";
const UNIT_EXISTS: &str = "org.freedesktop.systemd1.UnitExists";
const NO_SUCH_UNIT: &str = "org.freedesktop.systemd1.NoSuchUnit";
const UNKNOWN_OBJECT: &str = "org.freedesktop.DBus.Error.UnknownObject";
/// A job's result if it did what it was to do.
const DONE: &str = "done";
/// A new job takes the place of one that waits.
const REPLACE: &str = "replace";

/// As long as runc waits.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// systemd's word for "no limit".
const INFINITY: u64 = u64::MAX;
/// systemd keeps a quota in hundredths of a processor, cut off.
const QUOTA_STEP_USEC: u64 = 10_000;

/// Where the host's systemd is found.
#[derive(Debug, Clone)]
pub(super) struct Systemd {
    pub system_bus: PathBuf,
    pub private: PathBuf,
}

impl Systemd {
    /// That of this host, if it is what runs it.
    pub fn of_host() -> Option<Self> {
        Path::new(BOOTED).is_dir().then(|| Self {
            system_bus: SYSTEM_BUS.into(),
            private: PRIVATE.into(),
        })
    }
}

/// A pod's scope.
#[derive(Debug, Clone)]
pub(super) struct Scope {
    pub systemd: Systemd,
    pub unit: Unit,
    /// Its group.
    pub group: PathBuf,
}

impl Scope {
    /// Makes it around a process.
    ///
    /// # Errors
    ///
    /// `Exists`; `Systemd`: it cannot be asked, or says no.
    pub fn start(&self, pid: u32, limits: &Limits) -> Result<(), CgroupError> {
        let started = match self.try_start(pid, limits) {
            Err(error) if error.is_named(UNIT_EXISTS) => match self.is_anothers() {
                Ok(true) => return Err(CgroupError::Exists(self.unit.name.clone())),
                // Such as that of a container that is started again at once.
                Ok(false) => self
                    .try_stop(START_TIMEOUT)
                    .and_then(|()| self.try_start(pid, limits)),
                Err(error) => Err(error),
            },
            result => result,
        };
        started.map_err(self.failed("make"))
    }

    /// Changes its limits.
    ///
    /// # Errors
    ///
    /// `Systemd`.
    pub fn set_limits(&self, limits: &Limits) -> Result<(), CgroupError> {
        let set = || {
            let body = Body::default()
                .text(&self.unit.name)
                // For as long as it runs.
                .flag(true)
                .properties(&limit_properties(limits));
            Manager::connect(&self.systemd, START_TIMEOUT)?
                .call("SetUnitProperties", &body)
                .map(drop)
        };
        set().map_err(self.failed("change the limits of"))
    }

    /// Ends it with what is in it, if there is one. The end of a pod does not wait for a
    /// systemd that is busy: `delete` has 5 s.
    ///
    /// # Errors
    ///
    /// `Systemd`.
    pub fn stop(&self, timeout: Duration) -> Result<(), CgroupError> {
        self.try_stop(timeout).map_err(self.failed("end"))
    }

    fn try_start(&self, pid: u32, limits: &Limits) -> Result<(), BusError> {
        let properties = [self.properties(pid), limit_properties(limits)].concat();
        let body = Body::default()
            .text(&self.unit.name)
            .text(REPLACE)
            .properties(&properties)
            .no_units();
        Manager::connect(&self.systemd, START_TIMEOUT)?.run_job("StartTransientUnit", &body)
    }

    fn try_stop(&self, timeout: Duration) -> Result<(), BusError> {
        let body = Body::default().text(&self.unit.name).text(REPLACE);
        match Manager::connect(&self.systemd, timeout)?.run_job("StopUnit", &body) {
            Err(error) if error.is_named(NO_SUCH_UNIT) => Ok(()),
            result => result,
        }
    }

    /// - `Delegate`: all controllers, and nothing is ended for one process that the
    ///   kernel killed for want of memory (`OOMPolicy=`, systemd.scope(5)).
    /// - `CollectMode`: one that failed is forgotten like others.
    /// - `DefaultDependencies`: it may be made while the host shuts down, or is not up yet.
    fn properties(&self, pid: u32) -> Vec<Property> {
        let name = self.unit.name.trim_end_matches(".scope");
        vec![
            ("Description", Value::Text(format!("nacre pod {name}"))),
            ("Slice", Value::Text(self.unit.slice.clone())),
            ("PIDs", Value::Numbers(vec![pid])),
            ("Delegate", Value::Flag(true)),
            ("DefaultDependencies", Value::Flag(false)),
            ("CollectMode", Value::Text("inactive-or-failed".into())),
            ("MemoryAccounting", Value::Flag(true)),
            ("CPUAccounting", Value::Flag(true)),
            ("IOAccounting", Value::Flag(true)),
            ("TasksAccounting", Value::Flag(true)),
        ]
    }

    /// Whether the unit of this name has processes, or a group that is not the one it is to
    /// have: names are systemd's, whatever the slice.
    fn is_anothers(&self) -> Result<bool, BusError> {
        let group = Manager::connect(&self.systemd, START_TIMEOUT)?.group_of(&self.unit.name)?;
        let is_ours = self.group.ends_with(group.trim_start_matches('/'));
        Ok(!group.is_empty() && (!is_ours || is_populated(&self.group)))
    }

    fn failed(&self, action: &'static str) -> impl FnOnce(BusError) -> CgroupError {
        let unit = self.unit.name.clone();
        move |source| CgroupError::Systemd {
            action,
            unit,
            source,
        }
    }
}

/// Limits as systemd has them (systemd.resource-control(5)); sets of processors and
/// memory nodes only where there are some.
fn limit_properties(limits: &Limits) -> Vec<Property> {
    let (per_second, period) = match limits.cpu {
        Some((quota, period)) => (quota_per_second(quota, period), period),
        None => (INFINITY, INFINITY),
    };
    let mut properties = vec![
        (
            "MemoryMax",
            Value::Number(limits.memory_bytes.unwrap_or(INFINITY)),
        ),
        ("CPUQuotaPerSecUSec", Value::Number(per_second)),
        ("CPUQuotaPeriodUSec", Value::Number(period)),
    ];
    for (name, list) in [
        ("AllowedCPUs", limits.cpus),
        ("AllowedMemoryNodes", limits.mems),
    ] {
        properties.extend(list.map(|list| (name, Value::Bytes(list.to_bytes()))));
    }
    properties
}

/// No less than was asked for, also as systemd keeps it.
fn quota_per_second(quota: u64, period: u64) -> u64 {
    let usec = u128::from(quota) * 1_000_000 / u128::from(period.max(1));
    let usec = u64::try_from(usec).unwrap_or(INFINITY);
    let steps = usec.div_ceil(QUOTA_STEP_USEC).max(1);
    steps.saturating_mul(QUOTA_STEP_USEC)
}

/// A connection to systemd.
struct Manager {
    bus: Bus,
    /// Others are on this bus, who get the signals they asked for.
    is_shared: bool,
}

impl Manager {
    fn connect(systemd: &Systemd, timeout: Duration) -> Result<Self, BusError> {
        let deadline = Instant::now() + timeout;
        let (bus, is_shared) = match Bus::connect(&systemd.system_bus, deadline) {
            Err(error) if error.is_absence() => (Bus::connect(&systemd.private, deadline)?, false),
            result => (result?, true),
        };
        let mut manager = Self { bus, is_shared };
        if is_shared {
            manager.call_driver("Hello", &Body::default())?;
        }
        Ok(manager)
    }

    fn call_driver(&mut self, member: &str, body: &Body) -> Result<Message, BusError> {
        let method = Method {
            destination: DRIVER,
            path: DRIVER_PATH,
            interface: DRIVER,
            member,
        };
        self.bus.call(&method, body)
    }

    fn call(&mut self, member: &str, body: &Body) -> Result<Message, BusError> {
        let method = Method {
            destination: SYSTEMD,
            path: SYSTEMD_PATH,
            interface: MANAGER,
            member,
        };
        self.bus.call(&method, body)
    }

    /// The group that a scope has; an empty one if there is no such scope, or it does not run.
    fn group_of(&mut self, unit: &str) -> Result<String, BusError> {
        let found = self.call("GetUnit", &Body::default().text(unit));
        let path = match found {
            Err(error) if error.is_named(NO_SUCH_UNIT) => return Ok(String::new()),
            answer => answer?.arguments("o")?.text()?,
        };
        let get = Method {
            destination: SYSTEMD,
            path: &path,
            interface: PROPERTIES,
            member: "Get",
        };
        let body = Body::default().text(SCOPE).text("ControlGroup");
        match self.bus.call(&get, &body) {
            // Gone since.
            Err(error) if error.is_named(UNKNOWN_OBJECT) => Ok(String::new()),
            answer => answer?.arguments("v")?.text_variant(),
        }
    }

    /// Calls a method whose result is a job, and waits for that job's end.
    fn run_job(&mut self, member: &str, body: &Body) -> Result<(), BusError> {
        if self.is_shared {
            self.call_driver("AddMatch", &Body::default().text(JOBS))?;
            self.call("Subscribe", &Body::default())?;
        }
        let answer = self.call(member, body)?;
        let job = answer.arguments("o")?.text()?;
        loop {
            let signal = self.bus.next_signal()?;
            if signal.sender != answer.sender || !signal.is(MANAGER, JOB_REMOVED) {
                continue;
            }
            // Its number, the job, its unit, its result.
            let mut arguments = signal.arguments("uoss")?;
            arguments.number()?;
            if arguments.text()? != job {
                continue;
            }
            arguments.text()?;
            return match arguments.text()?.as_str() {
                DONE => Ok(()),
                result => Err(BusError::Refused {
                    name: result.to_owned(),
                    text: "the job did not do its work".into(),
                }),
            };
        }
    }
}

#[cfg(test)]
mod tests;
