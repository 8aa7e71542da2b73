//! What of the machine must not grow with the pods that come and go.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, ensure};

use crate::run;

/// What is counted, of containerd and of all of the machine.
const COLUMNS: [&str; 9] = [
    "containerd fds",
    "threads",
    "RSS MiB",
    "host MiB",
    "files",
    "mounts",
    "interfaces",
    "cgroups",
    "processes",
];

/// The machine at one moment.
#[derive(Debug, Clone, Copy)]
pub struct Sample([u64; COLUMNS.len()]);

impl Sample {
    /// The names of what is counted, above the columns of [`Sample`]'s `Display`.
    #[must_use]
    pub fn head() -> String {
        COLUMNS.join("  ")
    }

    /// The machine as it is.
    ///
    /// # Errors
    ///
    /// When something cannot be counted: there is not one containerd.
    pub fn take() -> Result<Self> {
        let pid = only("containerd")?;
        let count = |path: String| -> Result<u64> {
            let entries = fs::read_dir(&path).with_context(|| path)?;
            Ok(u64::try_from(entries.count())?)
        };
        let rss_kib = kib(&format!("/proc/{pid}/status"), "VmRSS:")?;
        let memory = |name| kib("/proc/meminfo", name);
        let used_kib = memory("MemTotal:")?.saturating_sub(memory("MemAvailable:")?);
        // Open, unused, most.
        let files = fs::read_to_string("/proc/sys/fs/file-nr")?;
        let files = files.split_whitespace().next().context("no count")?;
        let lines = |text: String| u64::try_from(text.lines().count());
        let all = fs::read_dir("/proc")?.filter_map(Result::ok);
        let is_process = |name: &str| name.bytes().all(|byte| byte.is_ascii_digit());
        let processes = all.filter(|entry| entry.file_name().to_str().is_some_and(is_process));
        Ok(Self([
            count(format!("/proc/{pid}/fd"))?,
            count(format!("/proc/{pid}/task"))?,
            rss_kib / 1024,
            used_kib / 1024,
            files.parse()?,
            lines(fs::read_to_string("/proc/self/mountinfo")?)?,
            interfaces()?,
            lines(run("find", &["/sys/fs/cgroup", "-type", "d"]).stdout)?,
            u64::try_from(processes.count())?,
        ]))
    }

    /// What has grown since then: by more than a part and a few where the kernel or
    /// Go decides how much there is, by anything at all otherwise.
    #[must_use]
    pub fn growth_since(&self, before: &Self) -> Vec<String> {
        let rows = before.0.iter().zip(self.0).zip(COLUMNS);
        rows.filter_map(|((before, after), name)| {
            let slack = match name {
                "containerd fds" | "threads" | "processes" => before / 10 + 4,
                "RSS MiB" => before / 4 + 8,
                "host MiB" | "files" => before / 10 + 64,
                _ => 0,
            };
            (after > before + slack).then(|| format!("{name}: {before}, then {after}"))
        })
        .collect()
    }
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cells = self.0.iter().zip(COLUMNS);
        let cells: Vec<String> = cells
            .map(|(value, name)| format!("{value:>width$}", width = name.len()))
            .collect();
        f.write_str(&cells.join("  "))
    }
}

/// The one process of a program.
fn only(program: &str) -> Result<String> {
    let pids = run("pidof", &[program]).stdout;
    ensure!(pids.split_whitespace().count() == 1, "{program}: {pids:?}");
    Ok(pids.trim().to_owned())
}

/// Network interfaces in all namespaces: a pod's taps are in its own.
fn interfaces() -> Result<u64> {
    // The first two lines are a table's head (proc_pid_net(5)).
    let rows = |text: &str| text.lines().skip(2).count();
    let mut seen = BTreeSet::new();
    let mut count = 0;
    for process in fs::read_dir("/proc")?.filter_map(Result::ok) {
        // It may be gone, or be no process.
        let path = process.path();
        if let Ok(namespace) = fs::metadata(path.join("ns/net"))
            && let Ok(table) = fs::read_to_string(path.join("net/dev"))
            && seen.insert(namespace.ino())
        {
            count += rows(&table);
        }
    }
    for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        if seen.insert(entry.metadata()?.ino()) {
            let namespace = format!("--net={}", entry.path().display());
            count += rows(&run("nsenter", &[namespace.as_str(), "cat", "/proc/net/dev"]).stdout);
        }
    }
    Ok(u64::try_from(count)?)
}

/// A line of a file of proc(5) that counts KiB.
fn kib(path: &str, name: &str) -> Result<u64> {
    let text = fs::read_to_string(path).with_context(|| path.to_owned())?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let value = line.and_then(|rest| rest.split_whitespace().next());
    Ok(value
        .with_context(|| format!("no {name} in {path}"))?
        .parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: Sample = Sample([100, 20, 40, 400, 1000, 60, 4, 30, 90]);

    #[test]
    fn what_grows_with_the_pods_is_named() {
        assert_eq!(BEFORE.growth_since(&BEFORE), [""; 0], "it is flat");
        let less = Sample([0; COLUMNS.len()]);
        assert_eq!(less.growth_since(&BEFORE), [""; 0], "it shrinks");
        for (index, name) in COLUMNS.into_iter().enumerate() {
            let mut after = BEFORE;
            // One for each of 250 pods.
            after.0[index] += 250;
            let (before, grown) = (BEFORE.0[index], after.0[index]);
            let expected = [format!("{name}: {before}, then {grown}")];
            assert_eq!(after.growth_since(&BEFORE), expected);
        }
        // What nobody but nacre makes may not grow at all.
        for (index, name) in COLUMNS.into_iter().enumerate() {
            let mut after = BEFORE;
            after.0[index] += 1;
            let counted = ["mounts", "interfaces", "cgroups"].contains(&name);
            assert_eq!(!after.growth_since(&BEFORE).is_empty(), counted, "{name}");
        }
    }

    #[test]
    fn numbers_stand_below_their_names() {
        let (head, row) = (Sample::head(), BEFORE.to_string());
        assert_eq!(head.len(), row.len());
        let mut end = 0;
        for (name, value) in COLUMNS.into_iter().zip(BEFORE.0) {
            end += name.len();
            assert!(head[..end].ends_with(name), "{head}");
            assert!(row[..end].ends_with(&format!(" {value}")), "{name}: {row}");
            end += "  ".len();
        }
    }

    #[test]
    fn what_this_host_has_is_counted() {
        let own = fs::read_to_string("/proc/self/net/dev").unwrap();
        let own = u64::try_from(own.lines().count() - 2).unwrap();
        assert!(interfaces().unwrap() >= own);
        assert!(kib("/proc/meminfo", "MemTotal:").unwrap() > 0);
        let missing = kib("/proc/meminfo", "None:").unwrap_err().to_string();
        assert_eq!(missing, "no None: in /proc/meminfo");
    }
}
