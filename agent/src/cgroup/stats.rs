//! Statistics, read from the cgroup's files into `StatsResponse`.
//!
//! A file that does not exist (a controller that is off, a kernel without swap or older than
//! the file) leaves its fields zero, but for pressure, which is left out: that nothing has
//! waited is said only by a kernel that counts it. Names and units:
//! Documentation/admin-guide/cgroup-v2.rst.

use std::fs;
use std::path::Path;

use nacre_protocol::agent::pressure::Share;
use nacre_protocol::agent::{
    CpuStats, HugetlbStats, IoStats, MemoryStats, PidsStats, Pressure, StatsResponse,
};

use super::Cgroup;
use crate::error::{Error, Result};

impl Cgroup {
    /// All counters.
    ///
    /// # Errors
    ///
    /// `NotFound` if the cgroup is gone.
    pub fn stats(&self) -> Result<StatsResponse> {
        if !self.path.exists() {
            return Err(Error::NotFound("the container's cgroup".into()));
        }
        Ok(StatsResponse {
            cpu: Some(cpu(&self.path)).into(),
            memory: Some(memory(&self.path)).into(),
            pids: Some(PidsStats {
                current: number(&self.path, "pids.current"),
                limit: number(&self.path, "pids.max"),
                ..PidsStats::default()
            })
            .into(),
            io: io(&read(&self.path, "io.stat")),
            io_pressure: pressure(&self.path, "io.pressure").into(),
            hugetlb: hugetlb(&self.path),
            ..StatsResponse::default()
        })
    }
}

fn read(path: &Path, file: &str) -> String {
    fs::read_to_string(path.join(file)).unwrap_or_default()
}

/// A file with one number; "max" is 2^64-1.
fn number(path: &Path, file: &str) -> u64 {
    parse(read(path, file).trim())
}

fn parse(text: &str) -> u64 {
    match text {
        "max" => u64::MAX,
        digits => digits.parse().unwrap_or(0),
    }
}

/// The lines of a "flat keyed" file.
pub fn keyed(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key, value.trim().parse().ok()?))
    })
}

/// "some avg10=0.00 avg60=0.00 avg300=0.00 total=0", and the same line of "full".
fn pressure(path: &Path, file: &str) -> Option<Pressure> {
    let text = fs::read_to_string(path.join(file)).ok()?;
    let share = |name: &str| {
        let mut fields = text
            .lines()
            .find_map(|line| line.strip_prefix(name))?
            .split(' ');
        let mut value = |key: &str| fields.find_map(|field| field.strip_prefix(key));
        Some(Share {
            avg10: value("avg10=")?.parse().ok()?,
            avg60: value("avg60=")?.parse().ok()?,
            avg300: value("avg300=")?.parse().ok()?,
            total: value("total=")?.parse().ok()?,
            ..Share::default()
        })
    };
    Some(Pressure {
        some: share("some ").into(),
        full: share("full ").into(),
        ..Pressure::default()
    })
}

fn cpu(path: &Path) -> CpuStats {
    let mut stats = CpuStats {
        pressure: pressure(path, "cpu.pressure").into(),
        ..CpuStats::default()
    };
    for (key, value) in keyed(&read(path, "cpu.stat")) {
        match key {
            "usage_usec" => stats.usage_usec = value,
            "user_usec" => stats.user_usec = value,
            "system_usec" => stats.system_usec = value,
            "nr_periods" => stats.nr_periods = value,
            "nr_throttled" => stats.nr_throttled = value,
            "throttled_usec" => stats.throttled_usec = value,
            "nr_bursts" => stats.nr_bursts = value,
            "burst_usec" => stats.burst_usec = value,
            _ => {}
        }
    }
    stats
}

fn memory(path: &Path) -> MemoryStats {
    let mut stats = MemoryStats {
        usage: number(path, "memory.current"),
        usage_limit: number(path, "memory.max"),
        swap_usage: number(path, "memory.swap.current"),
        swap_limit: number(path, "memory.swap.max"),
        max_usage: number(path, "memory.peak"),
        swap_max_usage: number(path, "memory.swap.peak"),
        pressure: pressure(path, "memory.pressure").into(),
        stat: keyed(&read(path, "memory.stat"))
            .map(|(key, value)| (key.to_owned(), value))
            .collect(),
        ..MemoryStats::default()
    };
    for (key, value) in keyed(&read(path, "memory.events")) {
        match key {
            "low" => stats.low_events = value,
            "high" => stats.high_events = value,
            "max" => stats.max_events = value,
            "oom" => stats.oom_events = value,
            "oom_kill" => stats.oom_kill_events = value,
            "oom_group_kill" => stats.oom_group_kill_events = value,
            _ => {}
        }
    }
    stats
}

/// "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0"
fn io(text: &str) -> Vec<IoStats> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let (major, minor) = fields.next()?.split_once(':')?;
            let mut stats = IoStats {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
                ..IoStats::default()
            };
            for (key, value) in fields.filter_map(|field| field.split_once('=')) {
                match key {
                    "rbytes" => stats.rbytes = parse(value),
                    "wbytes" => stats.wbytes = parse(value),
                    "rios" => stats.rios = parse(value),
                    "wios" => stats.wios = parse(value),
                    _ => {}
                }
            }
            Some(stats)
        })
        .collect()
}

/// One entry per "hugetlb.<size>.current".
fn hugetlb(path: &Path) -> Vec<HugetlbStats> {
    let names = fs::read_dir(path).into_iter().flatten().flatten();
    let mut stats: Vec<_> = names
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
            if size.contains('.') {
                return None; // hugetlb.<size>.rsvd.current
            }
            Some(HugetlbStats {
                page_size: size.to_owned(),
                current: number(path, &name),
                max: number(path, &format!("hugetlb.{size}.max")),
                refused: keyed(&read(path, &format!("hugetlb.{size}.events")))
                    .find_map(|(key, count)| (key == "max").then_some(count))
                    .unwrap_or_default(),
                ..HugetlbStats::default()
            })
        })
        .collect();
    stats.sort_by(|a, b| a.page_size.cmp(&b.page_size));
    stats
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cgroup(files: &[(&str, &str)]) -> (tempfile::TempDir, Cgroup) {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let path = dir.path().to_owned();
        (dir, Cgroup { path, strict: true })
    }

    #[test]
    fn every_file_is_read() {
        let (_dir, cgroup) = cgroup(&[
            (
                "cpu.stat",
                "usage_usec 30\nuser_usec 20\nsystem_usec 10\nnr_periods 3\nnr_throttled 2\nthrottled_usec 1\nnr_bursts 4\nburst_usec 5\n",
            ),
            (
                "cpu.pressure",
                "some avg10=1.50 avg60=2.00 avg300=3.25 total=77\nfull avg10=0.00 avg60=0.00 avg300=0.50 total=6\n",
            ),
            (
                "memory.pressure",
                "some avg10=0.00 avg60=0.00 avg300=0.00 total=8\n",
            ),
            (
                "io.pressure",
                "full avg10=0.00 avg60=0.00 avg300=0.00 total=9\n",
            ),
            ("memory.swap.peak", "12\n"),
            ("hugetlb.2MB.events", "max 3\n"),
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            ("memory.peak", "8192\n"),
            ("memory.swap.current", "5\n"),
            ("memory.swap.max", "6\n"),
            ("memory.stat", "anon 1\ninactive_file 2\n"),
            (
                "memory.events",
                "low 1\nhigh 2\nmax 3\noom 4\noom_kill 5\noom_group_kill 6\n",
            ),
            ("pids.current", "7\n"),
            ("pids.max", "100\n"),
            (
                "io.stat",
                "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n254:16 \n",
            ),
            ("hugetlb.2MB.current", "2097152\n"),
            ("hugetlb.2MB.max", "max\n"),
            ("hugetlb.2MB.rsvd.current", "0\n"),
        ]);
        let stats = cgroup.stats().unwrap();
        assert_eq!((stats.cpu.usage_usec, stats.cpu.throttled_usec), (30, 1));
        assert_eq!((stats.cpu.nr_bursts, stats.cpu.burst_usec), (4, 5));
        let waits = |share: &Share| (share.avg10, share.avg60, share.avg300, share.total);
        assert_eq!(waits(&stats.cpu.pressure.some), (1.5, 2.0, 3.25, 77));
        assert_eq!(waits(&stats.cpu.pressure.full), (0.0, 0.0, 0.5, 6));
        assert_eq!(stats.memory.pressure.some.total, 8);
        assert!(stats.memory.pressure.full.is_none());
        assert_eq!(stats.io_pressure.full.total, 9);
        assert_eq!(stats.memory.swap_max_usage, 12);
        assert_eq!(stats.memory.oom_group_kill_events, 6);
        assert_eq!(stats.memory.usage, 4096);
        assert_eq!(stats.memory.usage_limit, u64::MAX);
        assert_eq!((stats.memory.max_usage, stats.memory.swap_limit), (8192, 6));
        assert_eq!(stats.memory.stat.get("inactive_file"), Some(&2));
        assert_eq!(stats.memory.oom_kill_events, 5);
        assert_eq!((stats.pids.current, stats.pids.limit), (7, 100));
        assert_eq!(stats.io.len(), 2);
        assert_eq!((stats.io[0].major, stats.io[0].wios), (254, 4));
        assert_eq!(stats.hugetlb.len(), 1);
        assert_eq!(stats.hugetlb[0].page_size, "2MB");
        assert_eq!(
            (stats.hugetlb[0].max, stats.hugetlb[0].refused),
            (u64::MAX, 3)
        );
    }

    #[test]
    fn missing_files_are_zero() {
        let (_dir, cgroup) = cgroup(&[]);
        let stats = cgroup.stats().unwrap();
        assert_eq!(stats.memory.usage, 0);
        assert!(stats.io.is_empty() && stats.hugetlb.is_empty());
        assert!(stats.io_pressure.is_none() && stats.cpu.pressure.is_none());
    }
}
