//! What an idle container's processes and guest hold.
//!
//! PSS counts a page that several processes map in parts; private memory is what
//! ends with the process. Guest memory is one file without a name (a memfd) that
//! monitor and file server map: it is counted apart, by the blocks it has.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use nacre_tests::{Scene, eventually};

use crate::table::{Table, mib};

const MEMFD: &str = "/memfd:guest-memory";
/// So that what start-up left behind is done; at a standstill the clock of the
/// lab runs ahead.
const SETTLE: Duration = Duration::from_secs(2);

/// Measures; the report's section.
pub fn measure() -> anyhow::Result<String> {
    let mut text = String::from(
        "## Memory of an idle container\n\nIn MiB; guest memory is not in the processes' numbers.\n\n",
    );
    let mut table = Table::new(&["", "overlayfs", "erofs", "target"]);
    let columns = [sample("overlayfs")?, sample("erofs")?];
    let rows: [Row; 9] = [
        ("private, shim", |s| s.shim.private, ""),
        ("private, monitor", |s| s.monitor.private, ""),
        (
            "private, shim and monitor",
            |s| s.shim.private + s.monitor.private,
            "3",
        ),
        ("private, virtiofsd", |s| s.file_server.private, ""),
        ("PSS, shim", |s| s.shim.pss, ""),
        ("PSS, monitor", |s| s.monitor.pss, ""),
        ("PSS, virtiofsd", |s| s.file_server.pss, ""),
        ("guest memory the host has given", |s| s.given, ""),
        ("guest memory in use by its own account", |s| s.used, ""),
    ];
    for (name, of, target) in rows {
        let [a, b] = columns.each_ref().map(|sample| mib(of(sample)));
        table.row([name, &a, &b, target]);
    }
    text.push_str(&table.to_string());
    Ok(text)
}

/// Name, number and target.
type Row = (&'static str, fn(&Sample) -> u64, &'static str);

#[derive(Default)]
struct Sample {
    shim: Process,
    monitor: Process,
    file_server: Process,
    given: u64,
    used: u64,
}

#[derive(Default)]
struct Process {
    pss: u64,
    private: u64,
}

fn sample(snapshotter: &str) -> anyhow::Result<Sample> {
    let mut scene = Scene::new();
    let id = scene.start_sleeper(&["--snapshotter", snapshotter]);
    std::thread::sleep(SETTLE);
    let mut sample = Sample::default();
    for (pid, line) in processes()? {
        if line.contains("containerd-shim-nacre-v2 monitor") {
            sample.given = guest_memory(&pid)?;
            add(&mut sample.monitor, &pid)?;
        } else if line.contains("containerd-shim-nacre-v2") {
            add(&mut sample.shim, &pid)?;
        } else if line.contains("virtiofsd") {
            add(&mut sample.file_server, &pid)?;
        }
    }
    ensure!(sample.given > 0, "no monitor runs");
    let meminfo = scene
        .exec(&id, &[], &["cat", "/proc/meminfo"])
        .exits(0)
        .stdout;
    let field = |name| field(&meminfo, name).with_context(|| format!("no {name}"));
    sample.used = field("MemTotal:")? - field("MemAvailable:")?;
    scene.ctr(&["task", "kill", "-s", "9", &id]).exits(0);
    eventually("the container ends", || {
        scene.status(&id).is_none_or(|status| status == "STOPPED")
    });
    Ok(sample)
}

/// Directory in /proc and command line of all processes.
fn processes() -> anyhow::Result<Vec<(PathBuf, String)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        // Processes end while we look.
        if let Ok(line) = fs::read(path.join("cmdline")) {
            found.push((path, String::from_utf8_lossy(&line).replace('\0', " ")));
        }
    }
    Ok(found)
}

fn add(process: &mut Process, directory: &Path) -> anyhow::Result<()> {
    let text = fs::read_to_string(directory.join("smaps"))?;
    let mut guest = false;
    for line in text.lines() {
        let first = line.split_whitespace().next().unwrap_or_default();
        if !first.ends_with(':') {
            guest = line.contains(MEMFD);
        } else if !guest {
            match first {
                "Pss:" => process.pss += kib(line),
                "Private_Clean:" | "Private_Dirty:" => process.private += kib(line),
                _ => {}
            }
        }
    }
    Ok(())
}

/// Bytes of the file that is the guest's memory.
fn guest_memory(monitor: &Path) -> anyhow::Result<u64> {
    for entry in fs::read_dir(monitor.join("fd"))? {
        let path = entry?.path();
        let target = fs::read_link(&path).unwrap_or_default();
        if target.to_string_lossy().starts_with(MEMFD) {
            return Ok(fs::metadata(&path)?.blocks() * 512);
        }
    }
    anyhow::bail!("the monitor has no guest memory")
}

/// Bytes behind a name in the style of /proc/meminfo.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find(|line| line.starts_with(name)).map(kib)
}

/// Bytes of a line `Name: N kB`.
fn kib(line: &str) -> u64 {
    let number = line.split_whitespace().nth(1);
    number.and_then(|number| number.parse().ok()).unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_in_kib() {
        let text = "MemTotal:  100 kB\nMemAvailable:   60 kB\n";
        assert_eq!(field(text, "MemAvailable:"), Some(60 * 1024));
        assert_eq!(field(text, "Swap:"), None);
    }
}
