//! What containers may use, alone and together.

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources, Process, Spec};

use super::{HugePages, NumberList};

/// CPU period where the spec names a quota only; the kernel's default.
const DEFAULT_PERIOD_USEC: u64 = 100_000;

/// What a container, or a pod, may use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Memory in bytes.
    pub memory_bytes: Option<u64>,
    /// CPU time per period, both in microseconds.
    pub cpu: Option<(u64, u64)>,
    /// Processors of the host it may run on.
    pub cpus: Option<NumberList>,
    /// Memory nodes of the host its memory may be on.
    pub mems: Option<NumberList>,
    /// Memory in huge pages of the guest, beside the other.
    pub huge_pages: HugePages,
    /// How readily the host's kernel may end it when memory runs out
    /// (proc_pid_oom_score_adj(5)).
    pub oom_score_adj: Option<i32>,
}

impl Limits {
    /// The limits of a spec's resources.
    pub fn of(spec: &Spec) -> Self {
        let linux = spec.linux().as_ref();
        let resources = linux.and_then(|linux| linux.resources().as_ref());
        let process = spec.process().as_ref();
        let limits = Self {
            oom_score_adj: process.and_then(Process::oom_score_adj),
            ..Self::default()
        };
        resources.map_or(limits, |resources| limits.updated_by(resources))
    }

    /// These limits with those that `resources` name put in their place. Negative
    /// values lift a limit; zero and what is not named leave it, as everywhere in
    /// OCI.
    #[must_use]
    pub fn updated_by(self, resources: &LinuxResources) -> Self {
        let memory = resources.memory().as_ref().and_then(LinuxMemory::limit);
        let cpu = resources.cpu().as_ref();
        let period = cpu.and_then(LinuxCpu::period).filter(|period| *period > 0);
        let period = period.unwrap_or(DEFAULT_PERIOD_USEC);
        let quota = cpu.and_then(LinuxCpu::quota);
        Self {
            memory_bytes: updated(self.memory_bytes, memory),
            cpu: match quota {
                None | Some(0) => self.cpu,
                Some(quota) => u64::try_from(quota).ok().map(|quota| (quota, period)),
            },
            cpus: listed(cpu.and_then(|cpu| cpu.cpus().as_deref())).or(self.cpus),
            mems: listed(cpu.and_then(|cpu| cpu.mems().as_deref())).or(self.mems),
            huge_pages: self.huge_pages.updated_by(resources),
            oom_score_adj: self.oom_score_adj,
        }
    }

    /// Of each of two limits the one that allows more.
    #[must_use]
    pub fn or_more(self, other: Self) -> Self {
        let share = |(quota, period): (u64, u64)| u128::from(quota) * 1000 / u128::from(period);
        Self {
            memory_bytes: self
                .memory_bytes
                .zip(other.memory_bytes)
                .map(|(a, b)| a.max(b)),
            cpu: self
                .cpu
                .zip(other.cpu)
                .map(|(a, b)| if share(a) > share(b) { a } else { b }),
            cpus: self.cpus.zip(other.cpus).map(|(a, b)| a.or(b)),
            mems: self.mems.zip(other.mems).map(|(a, b)| a.or(b)),
            huge_pages: self.huge_pages.with(other.huge_pages, u64::max),
            oom_score_adj: self.oom_score_adj.or(other.oom_score_adj),
        }
    }

    /// What containers with these limits may use together: no limit where one of
    /// them has none. They end together, so the one that is to be spared most is.
    pub fn together(containers: &[Self]) -> Self {
        let scaled = |(quota, period): (u64, u64)| {
            let usec = u128::from(quota) * u128::from(DEFAULT_PERIOD_USEC) / u128::from(period);
            u64::try_from(usec).unwrap_or(u64::MAX)
        };
        match containers {
            [] => Self::default(),
            [one] => *one,
            many => Self {
                memory_bytes: sum(many.iter().map(|limits| limits.memory_bytes)),
                cpu: sum(many.iter().map(|limits| limits.cpu.map(scaled)))
                    .map(|quota| (quota, DEFAULT_PERIOD_USEC)),
                cpus: union(many.iter().map(|limits| limits.cpus)),
                mems: union(many.iter().map(|limits| limits.mems)),
                huge_pages: many
                    .iter()
                    .map(|limits| limits.huge_pages)
                    .fold(HugePages::default(), |sum, pages| {
                        sum.with(pages, u64::saturating_add)
                    }),
                oom_score_adj: many.iter().filter_map(|limits| limits.oom_score_adj).min(),
            },
        }
    }
}

fn updated(before: Option<u64>, change: Option<i64>) -> Option<u64> {
    match change {
        None | Some(0) => before,
        Some(value) => u64::try_from(value).ok(),
    }
}

/// An empty list names nothing, one that cannot be read is told of.
fn listed(text: Option<&str>) -> Option<NumberList> {
    let text = text.filter(|text| !text.is_empty())?;
    let list = NumberList::parse(text);
    if list.is_none() {
        tracing::warn!(text, "no list of processors or memory nodes: left out");
    }
    list
}

fn union(mut lists: impl Iterator<Item = Option<NumberList>>) -> Option<NumberList> {
    let first = lists.next()??;
    lists.try_fold(first, |all, list| Some(all.or(list?)))
}

fn sum(mut values: impl Iterator<Item = Option<u64>>) -> Option<u64> {
    values.try_fold(0u64, |sum, value| Some(sum.saturating_add(value?)))
}
