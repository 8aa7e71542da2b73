//! The kernel's own record of what happened: tracefs, in an instance of ours.
//!
//! Tracepoints change how long things take and not how often they happen, and
//! one stream has system calls, VM exits, forks and execs in their order.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, ensure};

const INSTANCES: &str = "/sys/kernel/tracing/instances";
/// Per processor; one start of a pod is less than 2 MiB.
const BUFFER_KIB: &str = "32768";
const EVENTS: [&str; 8] = [
    "kvm/kvm_exit",
    "kvm/kvm_userspace_exit",
    "kvm/kvm_mmio",
    "kvm/kvm_pio",
    "kvm/kvm_cpuid",
    "raw_syscalls/sys_enter",
    "sched/sched_process_fork",
    "sched/sched_process_exec",
];

/// A running recording. It ends with the value.
pub struct Recording {
    directory: PathBuf,
}

impl Recording {
    /// Starts to record.
    pub fn start() -> anyhow::Result<Self> {
        let directory = PathBuf::from(format!("{INSTANCES}/nacre-bench"));
        fs::create_dir(&directory).with_context(|| format!("make {}", directory.display()))?;
        let recording = Self { directory };
        recording.set("buffer_size_kb", BUFFER_KIB)?;
        for event in EVENTS {
            recording.set(&format!("events/{event}/enable"), "1")?;
        }
        Ok(recording)
    }

    /// Ends it and returns what happened, in order.
    pub fn stop(self) -> anyhow::Result<Vec<Event>> {
        self.set("tracing_on", "0")?;
        let file = self.directory.join("trace");
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        let counts = text.lines().find(|line| line.contains("entries-written"));
        if let Some((kept, written)) = counts.and_then(entries) {
            ensure!(
                kept == written,
                "the trace buffer holds {kept} of {written} events"
            );
        }
        let events = text.lines().filter(|line| !line.starts_with('#'));
        Ok(events.filter_map(Event::parse).collect())
    }

    fn set(&self, file: &str, value: &str) -> anyhow::Result<()> {
        let file = self.directory.join(file);
        fs::write(&file, value).with_context(|| format!("write {}", file.display()))
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        // The next one reports it if the instance is still there.
        let _ = fs::remove_dir(&self.directory);
    }
}

/// `# entries-in-buffer/entries-written: 24773/24773   #P:1`
fn entries(line: &str) -> Option<(u64, u64)> {
    let (_, counts) = line.split_once(": ")?;
    let (kept, written) = counts.split_whitespace().next()?.split_once('/')?;
    Some((kept.parse().ok()?, written.parse().ok()?))
}

/// One line of the trace.
#[derive(Debug, PartialEq)]
pub struct Event {
    /// Id of the thread it happened in.
    pub tid: u32,
    /// Seconds of the trace's clock.
    pub at: f64,
    /// The tracepoint.
    pub name: String,
    /// What it says.
    pub text: String,
}

impl Event {
    /// `  vcpu0-290  [000] .....  19.288353: kvm_pio: pio_write at 0xcf8 ...`.
    /// A thread's name may hold anything, so the line is read around "[".
    fn parse(line: &str) -> Option<Self> {
        let (before, after) = line.split_once(" [")?;
        let tid = before.trim_end().rsplit('-').next()?.parse().ok()?;
        let after = after.split_once(']')?.1.trim_start();
        let (_flags, after) = after.split_once(char::is_whitespace)?;
        let (at, after) = after.split_once(": ")?;
        let (name, text) = after.split_once(": ")?;
        Some(Self {
            tid,
            at: at.trim().parse().ok()?,
            name: name.to_owned(),
            text: text.to_owned(),
        })
    }

    /// The word that follows `key` in the text.
    pub fn word(&self, key: &str) -> Option<&str> {
        let (_, rest) = self.text.split_once(key)?;
        rest.split([' ', ',']).find(|word| !word.is_empty())
    }

    /// The number that follows `key`, decimal or with 0x.
    pub fn number(&self, key: &str) -> Option<u64> {
        let word = self.word(key)?;
        match word.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None => word.parse().ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_parsed() {
        let line = "           vcpu0-290     [000] .....    19.288353: kvm_pio: pio_write at 0xcf8 size 4 count 1";
        let event = Event::parse(line).unwrap();
        assert_eq!((event.tid, event.name.as_str()), (290, "kvm_pio"));
        assert_eq!(event.at, 19.288353);
        assert_eq!(event.number("at "), Some(0xcf8));
        assert_eq!(event.number("size "), Some(4));
        let odd = " a b-c [x-7 [001] d..1. 1.5: sys_enter: NR 3 (a, 0)";
        assert!(Event::parse(odd).is_none_or(|event| event.tid != 7));
        assert_eq!(Event::parse("# tracer: nop"), None);
    }

    #[test]
    fn loss_is_noticed() {
        let line = "# entries-in-buffer/entries-written: 10/24   #P:1";
        assert_eq!(entries(line), Some((10, 24)));
    }
}
