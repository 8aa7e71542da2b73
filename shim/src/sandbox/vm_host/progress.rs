//! What the monitor cannot tell of a boot: how far it is while memory is pinned, which is one
//! system call that may take minutes, and that it was killed for want of memory.

use std::fs;
use std::pin::pin;
use std::time::Duration;

use tokio::time::{Instant, interval_at};
use tracing::info;

use super::{ContainerConfig, PodCgroup, SandboxError, VmHost};

const INTERVAL: Duration = Duration::from_secs(10);

impl VmHost {
    /// The error of a boot, and why the monitor had no words for it if that is known.
    pub(super) fn with_cause(&self, error: SandboxError, config: &ContainerConfig) -> SandboxError {
        let has_run_out = {
            let parts = crate::task::lock(&self.parts);
            let cgroup = parts.cgroup.as_deref();
            cgroup.is_some_and(PodCgroup::ran_out_of_memory)
        };
        if !has_run_out {
            return error;
        }
        SandboxError::OutOfMemory {
            memory_mib: self.size_of(&config.spec).memory_mib,
            is_pinned: !self.pod_devices().is_empty(),
            source: error.into(),
        }
    }
}

/// Waits for `boot`; meanwhile the log tells how much of a guest of `memory_mib` is
/// pinned for its monitor, process `pid`.
pub(super) async fn logged<T>(boot: impl Future<Output = T>, pid: u32, memory_mib: u32) -> T {
    reported(boot, INTERVAL, || {
        if let Some(pinned_mib) = pinned_mib(pid) {
            info!(
                pinned_mib,
                memory_mib, "booting: memory is pinned for PCI devices"
            );
        }
    })
    .await
}

async fn reported<T>(
    boot: impl Future<Output = T>,
    interval: Duration,
    mut report: impl FnMut(),
) -> T {
    let mut boot = pin!(boot);
    let mut ticks = interval_at(Instant::now() + interval, interval);
    loop {
        tokio::select! {
            biased;
            result = &mut boot => return result,
            _ = ticks.tick() => report(),
        }
    }
}

/// `None` when the process is gone, which its machine tells.
fn pinned_mib(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    Some(pinned_kib(&status) >> 10)
}

/// Of proc_pid_status(5): VFIO's containers count what they pin as locked, iommufd as
/// pinned.
fn pinned_kib(status: &str) -> u64 {
    let lines = status.lines().filter_map(|line| line.split_once(':'));
    let counts = lines.filter(|(name, _)| ["VmLck", "VmPin"].contains(name));
    counts
        .filter_map(|(_, value)| value.trim().strip_suffix(" kB")?.parse::<u64>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::mpsc;

    #[test]
    fn what_either_interface_pins_is_counted() {
        let status = "Name:\tnacre\nVmPeak:\t  900 kB\nVmLck:\t  2048 kB\nVmPin:\t   512 kB\n";
        assert_eq!(pinned_kib(status), 2560);
        assert_eq!(pinned_kib("Name:\tkthreadd\n"), 0);
        assert_eq!(pinned_mib(std::process::id()), Some(0));
    }

    #[tokio::test]
    async fn a_boot_is_reported_until_it_is_over() {
        let (sender, mut receiver) = mpsc::unbounded_channel();
        let boot = async {
            receiver.recv().await;
            receiver.recv().await;
            "booted"
        };
        let mut reports = 0;
        let result = reported(boot, Duration::from_millis(1), || {
            reports += 1;
            sender.send(()).unwrap();
        });
        assert_eq!(result.await, "booted");
        assert!(reports >= 2);
        let at_once = reported(async { 7 }, INTERVAL, || panic!("it is over"));
        assert_eq!(at_once.await, 7);
    }
}
