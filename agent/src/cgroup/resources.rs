//! OCI `linux.resources`, translated to files of cgroup v2.
//!
//! The specification was written for version 1; the conversions are those of
//! its "cgroup v2" appendix, as runc does them.

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};

use crate::error::{Error, Result};

/// Default CFS period in microseconds.
const DEFAULT_PERIOD: u64 = 100_000;

/// Files and what to write to them, in order.
///
/// # Errors
///
/// `InvalidArgument` for values that make no sense.
pub fn settings(resources: &LinuxResources) -> Result<Vec<(String, String)>> {
    let mut settings = Settings::default();
    if let Some(cpu) = resources.cpu() {
        settings.cpu(cpu);
    }
    if let Some(memory) = resources.memory() {
        settings.memory(memory)?;
    }
    if let Some(pids) = resources.pids() {
        // 0 in the specification means "no limit", as does -1.
        let limit = pids.limit();
        settings.add(
            "pids.max",
            if limit == 0 { "max".into() } else { max(limit) },
        );
    }
    if let Some(io) = resources.block_io() {
        settings.io(io);
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        // Reserving more fails; without the first, using it would be SIGBUS.
        for kind in ["rsvd.max", "max"] {
            let file = format!("hugetlb.{}.{kind}", limit.page_size());
            settings.add_checked(file, max(limit.limit()))?;
        }
    }
    for (file, value) in resources.unified().iter().flatten() {
        settings.add_checked(file.clone(), value.clone())?;
    }
    Ok(settings.0)
}

#[derive(Default)]
struct Settings(Vec<(String, String)>);

/// -1 is "no limit".
fn max(value: i64) -> String {
    if value < 0 {
        "max".into()
    } else {
        value.to_string()
    }
}

/// Version 1's 2..=262144 to version 2's 1..=10000.
fn weight_from_shares(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

/// 10..=1000 to 1..=10000.
fn io_weight(weight: u16) -> u64 {
    1 + (u64::from(weight).clamp(10, 1000) - 10) * 9999 / 990
}

impl Settings {
    fn add(&mut self, file: &str, value: String) {
        self.0.push((file.into(), value));
    }

    /// For file names that come from the request.
    fn add_checked(&mut self, file: String, value: String) -> Result<()> {
        if file.contains('/') || !file.contains('.') || file.starts_with("cgroup.") {
            return Err(Error::InvalidArgument(format!("cgroup file {file:?}")));
        }
        self.0.push((file, value));
        Ok(())
    }

    fn cpu(&mut self, cpu: &LinuxCpu) {
        if let Some(idle) = cpu.idle() {
            self.add("cpu.idle", idle.to_string());
        }
        // An idle group has no weight to set.
        if let Some(shares) = cpu.shares().filter(|s| *s != 0 && cpu.idle() != Some(1)) {
            self.add("cpu.weight", weight_from_shares(shares).to_string());
        }
        let quota = cpu.quota().filter(|quota| *quota != 0);
        let period = cpu.period().filter(|period| *period != 0);
        if quota.is_some() || period.is_some() {
            let quota = quota.map_or("max".into(), max);
            self.add(
                "cpu.max",
                format!("{quota} {}", period.unwrap_or(DEFAULT_PERIOD)),
            );
        }
        if let Some(burst) = cpu.burst() {
            self.add("cpu.max.burst", burst.to_string());
        }
        for (file, list) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
            if let Some(list) = list.as_ref().filter(|list| !list.is_empty()) {
                self.add(file, list.clone());
            }
        }
    }

    /// Version 1's swap limit counts memory too; version 2's does not.
    fn memory(&mut self, memory: &LinuxMemory) -> Result<()> {
        let limit = memory.limit().filter(|limit| *limit != 0);
        if let Some(swap) = memory.swap().filter(|swap| *swap != 0) {
            let value = match (swap, limit) {
                (..0, _) => "max".into(),
                (swap, Some(limit @ 0..)) if swap >= limit => (swap - limit).to_string(),
                _ => {
                    return Err(Error::InvalidArgument(format!(
                        "memory and swap limit {swap} without a memory limit below it"
                    )));
                }
            };
            self.add("memory.swap.max", value);
        }
        if let Some(limit) = limit {
            self.add("memory.max", max(limit));
        }
        if let Some(reservation) = memory.reservation().filter(|value| *value != 0) {
            self.add("memory.low", max(reservation));
        }
        Ok(())
    }

    fn io(&mut self, io: &LinuxBlockIo) {
        if let Some(weight) = io.weight().filter(|weight| *weight != 0) {
            self.add("io.weight", io_weight(weight).to_string());
        }
        for device in io.weight_device().iter().flatten() {
            if let Some(weight) = device.weight() {
                let weight = io_weight(weight);
                self.add(
                    "io.weight",
                    format!("{}:{} {weight}", device.major(), device.minor()),
                );
            }
        }
        self.throttle("rbps", io.throttle_read_bps_device());
        self.throttle("wbps", io.throttle_write_bps_device());
        self.throttle("riops", io.throttle_read_iops_device());
        self.throttle("wiops", io.throttle_write_iops_device());
    }

    fn throttle(&mut self, key: &str, devices: &Option<Vec<LinuxThrottleDevice>>) {
        for device in devices.iter().flatten() {
            let (major, minor) = (device.major(), device.minor());
            self.add("io.max", format!("{major}:{minor} {key}={}", device.rate()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: serde_json::Value) -> Result<Vec<(String, String)>> {
        settings(&serde_json::from_value(json).unwrap())
    }

    fn check(json: serde_json::Value, expected: &[(&str, &str)]) {
        let got = parse(json).unwrap();
        let got: Vec<_> = got.iter().map(|(f, v)| (f.as_str(), v.as_str())).collect();
        assert_eq!(got, expected);
    }

    #[test]
    fn cpu() {
        check(
            serde_json::json!({"cpu": {"shares": 1024, "quota": 50000, "period": 100000, "cpus": "0-1"}}),
            &[
                ("cpu.weight", "39"),
                ("cpu.max", "50000 100000"),
                ("cpuset.cpus", "0-1"),
            ],
        );
        check(
            serde_json::json!({"cpu": {"quota": -1}}),
            &[("cpu.max", "max 100000")],
        );
        check(
            serde_json::json!({"cpu": {"shares": 2}}),
            &[("cpu.weight", "1")],
        );
        check(
            serde_json::json!({"cpu": {"shares": 262_144}}),
            &[("cpu.weight", "10000")],
        );
    }

    #[test]
    fn memory_and_swap() {
        check(
            serde_json::json!({"memory": {"limit": 1000, "swap": 1500, "reservation": 500}}),
            &[
                ("memory.swap.max", "500"),
                ("memory.max", "1000"),
                ("memory.low", "500"),
            ],
        );
        check(
            serde_json::json!({"memory": {"limit": -1, "swap": -1}}),
            &[("memory.swap.max", "max"), ("memory.max", "max")],
        );
        assert!(parse(serde_json::json!({"memory": {"limit": 1000, "swap": 500}})).is_err());
    }

    #[test]
    fn pids_io_and_hugepages() {
        check(
            serde_json::json!({"pids": {"limit": 100}}),
            &[("pids.max", "100")],
        );
        check(
            serde_json::json!({"pids": {"limit": 0}}),
            &[("pids.max", "max")],
        );
        check(
            serde_json::json!({"blockIO": {"weight": 1000,
                "throttleReadBpsDevice": [{"major": 254, "minor": 0, "rate": 1048576}]}}),
            &[("io.weight", "10000"), ("io.max", "254:0 rbps=1048576")],
        );
        check(
            serde_json::json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 4096}]}),
            &[
                ("hugetlb.2MB.rsvd.max", "4096"),
                ("hugetlb.2MB.max", "4096"),
            ],
        );
    }

    #[test]
    fn unified_cannot_leave_the_cgroup() {
        check(
            serde_json::json!({"unified": {"memory.oom.group": "1"}}),
            &[("memory.oom.group", "1")],
        );
        for file in ["../memory.max", "cgroup.procs", "tasks"] {
            assert!(parse(serde_json::json!({"unified": {file: "1"}})).is_err());
        }
    }
}
