//! The agent's counters as `io.containerd.cgroups.v2.Metrics`.
//!
//! The names are cgroup v2's on both sides. CRI's working set is usage minus
//! `inactive_file`, so both come from the same reading of the guest's cgroup.

use std::collections::HashMap;

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats,
    PidsStat,
};
use nacre_protocol::agent;
use protobuf::well_known_types::any::Any;

use crate::events::pack;

/// Packs the counters.
///
/// # Errors
///
/// When they cannot be encoded.
pub fn metrics(stats: agent::StatsResponse) -> protobuf::Result<Any> {
    let (memory, memory_events) = stats.memory.as_ref().map(memory).unzip();
    let metrics = Metrics {
        pids: stats.pids.as_ref().map(pids).into(),
        cpu: stats.cpu.as_ref().map(cpu).into(),
        memory: memory.into(),
        memory_events: memory_events.into(),
        io: Some(IOStat {
            usage: stats.io.iter().map(io).collect(),
            psi: stats.io_pressure.as_ref().map(pressure).into(),
            ..Default::default()
        })
        .into(),
        hugetlb: stats.hugetlb.into_iter().map(hugetlb).collect(),
        ..Default::default()
    };
    pack(&metrics)
}

fn pids(pids: &agent::PidsStats) -> PidsStat {
    PidsStat {
        current: pids.current,
        limit: pids.limit,
        ..Default::default()
    }
}

fn pressure(pressure: &agent::Pressure) -> PSIStats {
    let data = |share: &agent::pressure::Share| PSIData {
        avg10: share.avg10,
        avg60: share.avg60,
        avg300: share.avg300,
        total: share.total,
        ..Default::default()
    };
    PSIStats {
        some: pressure.some.as_ref().map(data).into(),
        full: pressure.full.as_ref().map(data).into(),
        ..Default::default()
    }
}

fn cpu(cpu: &agent::CpuStats) -> CPUStat {
    CPUStat {
        usage_usec: cpu.usage_usec,
        user_usec: cpu.user_usec,
        system_usec: cpu.system_usec,
        nr_periods: cpu.nr_periods,
        nr_throttled: cpu.nr_throttled,
        throttled_usec: cpu.throttled_usec,
        nr_bursts: cpu.nr_bursts,
        burst_usec: cpu.burst_usec,
        psi: cpu.pressure.as_ref().map(pressure).into(),
        ..Default::default()
    }
}

fn memory(memory: &agent::MemoryStats) -> (MemoryStat, MemoryEvents) {
    let mut stat = memory_stat(&memory.stat);
    stat.usage = memory.usage;
    stat.usage_limit = memory.usage_limit;
    stat.swap_usage = memory.swap_usage;
    stat.swap_limit = memory.swap_limit;
    stat.max_usage = memory.max_usage;
    stat.swap_max_usage = memory.swap_max_usage;
    stat.psi = memory.pressure.as_ref().map(pressure).into();
    let events = MemoryEvents {
        low: memory.low_events,
        high: memory.high_events,
        max: memory.max_events,
        oom: memory.oom_events,
        oom_kill: memory.oom_kill_events,
        oom_group_kill: memory.oom_group_kill_events,
        ..Default::default()
    };
    (stat, events)
}

fn memory_stat(stat: &HashMap<String, u64>) -> MemoryStat {
    let number = |name: &str| stat.get(name).copied().unwrap_or_default();
    // Since Linux 5.9 in two parts.
    let both = |name: &str| number(&format!("{name}_anon")) + number(&format!("{name}_file"));
    macro_rules! by_name {
        ($($field:ident),* $(,)?) => {
            MemoryStat {
                $($field: number(stringify!($field)),)*
                workingset_refault: both("workingset_refault"),
                workingset_activate: both("workingset_activate"),
                ..Default::default()
            }
        };
    }
    by_name!(
        anon,
        file,
        kernel_stack,
        slab,
        sock,
        shmem,
        file_mapped,
        file_dirty,
        file_writeback,
        anon_thp,
        inactive_anon,
        active_anon,
        inactive_file,
        active_file,
        unevictable,
        slab_reclaimable,
        slab_unreclaimable,
        pgfault,
        pgmajfault,
        workingset_nodereclaim,
        pgrefill,
        pgscan,
        pgsteal,
        pgactivate,
        pgdeactivate,
        pglazyfree,
        pglazyfreed,
        thp_fault_alloc,
        thp_collapse_alloc,
    )
}

fn io(io: &agent::IoStats) -> IOEntry {
    IOEntry {
        major: io.major,
        minor: io.minor,
        rbytes: io.rbytes,
        wbytes: io.wbytes,
        rios: io.rios,
        wios: io.wios,
        ..Default::default()
    }
}

fn hugetlb(hugetlb: agent::HugetlbStats) -> HugeTlbStat {
    HugeTlbStat {
        current: hugetlb.current,
        max: hugetlb.max,
        failcnt: hugetlb.refused,
        pagesize: hugetlb.page_size,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use protobuf::Message;

    use super::*;

    #[test]
    fn counters_arrive_under_their_names() {
        let stats = agent::StatsResponse {
            memory: Some(agent::MemoryStats {
                usage: 100,
                oom_kill_events: 2,
                stat: HashMap::from([
                    ("inactive_file".into(), 40),
                    ("workingset_refault_anon".into(), 2),
                    ("workingset_refault_file".into(), 3),
                    ("workingset_activate_file".into(), 4),
                    ("unknown".into(), 1),
                ]),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        let any = metrics(stats).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics = Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!(metrics.memory.usage, 100);
        assert_eq!(metrics.memory.inactive_file, 40);
        let again = (
            metrics.memory.workingset_refault,
            metrics.memory.workingset_activate,
        );
        assert_eq!(again, (5, 4));
        assert!(metrics.memory.psi.is_none());
        assert_eq!(metrics.memory_events.oom_kill, 2);
        assert!(metrics.cpu.is_none());
    }

    fn waited(total: u64) -> Option<agent::Pressure> {
        let share = |total| {
            Some(agent::pressure::Share {
                avg10: 0.5,
                avg60: 1.5,
                avg300: 2.5,
                total,
                ..Default::default()
            })
        };
        Some(agent::Pressure {
            some: share(total).into(),
            full: share(total + 1).into(),
            ..Default::default()
        })
    }

    #[test]
    fn counters_of_each_kind_are_all_there() {
        let stats = agent::StatsResponse {
            cpu: Some(agent::CpuStats {
                usage_usec: 1,
                user_usec: 2,
                system_usec: 3,
                nr_periods: 4,
                nr_throttled: 5,
                throttled_usec: 6,
                nr_bursts: 25,
                burst_usec: 26,
                pressure: waited(27).into(),
                ..Default::default()
            })
            .into(),
            memory: Some(agent::MemoryStats {
                usage_limit: 7,
                swap_usage: 8,
                swap_limit: 9,
                max_usage: 10,
                low_events: 11,
                high_events: 12,
                max_events: 13,
                oom_events: 14,
                oom_group_kill_events: 29,
                swap_max_usage: 30,
                pressure: waited(31).into(),
                ..Default::default()
            })
            .into(),
            pids: Some(agent::PidsStats {
                current: 15,
                limit: 16,
                ..Default::default()
            })
            .into(),
            io: vec![agent::IoStats {
                major: 17,
                minor: 18,
                rbytes: 19,
                wbytes: 20,
                rios: 21,
                wios: 22,
                ..Default::default()
            }],
            hugetlb: vec![agent::HugetlbStats {
                page_size: "2MB".into(),
                current: 23,
                max: 24,
                refused: 33,
                ..Default::default()
            }],
            io_pressure: waited(34).into(),
            ..Default::default()
        };
        let any = metrics(stats).unwrap();
        let metrics = Metrics::parse_from_bytes(&any.value).unwrap();
        let (cpu, memory, events) = (&metrics.cpu, &metrics.memory, &metrics.memory_events);
        let (pids, io, pages) = (&metrics.pids, &metrics.io.usage[0], &metrics.hugetlb[0]);
        assert_eq!(pages.pagesize, "2MB");
        let told = [
            cpu.usage_usec,
            cpu.user_usec,
            cpu.system_usec,
            cpu.nr_periods,
            cpu.nr_throttled,
            cpu.throttled_usec,
            memory.usage_limit,
            memory.swap_usage,
            memory.swap_limit,
            memory.max_usage,
            events.low,
            events.high,
            events.max,
            events.oom,
            pids.current,
            pids.limit,
            io.major,
            io.minor,
            io.rbytes,
            io.wbytes,
            io.rios,
            io.wios,
            pages.current,
            pages.max,
            cpu.nr_bursts,
            cpu.burst_usec,
            cpu.psi.some.total,
            cpu.psi.full.total,
            events.oom_group_kill,
            memory.swap_max_usage,
            memory.psi.some.total,
            memory.psi.full.total,
            pages.failcnt,
            metrics.io.psi.some.total,
            metrics.io.psi.full.total,
        ];
        assert_eq!(told.to_vec(), (1..=35).collect::<Vec<u64>>());
        let some = &cpu.psi.some;
        assert_eq!((some.avg10, some.avg60, some.avg300), (0.5, 1.5, 2.5));
    }
}
