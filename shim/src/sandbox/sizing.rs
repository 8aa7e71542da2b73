//! How large a pod's virtual machine is.
//!
//! One rule: what the pod's containers may use together, plus a fixed reserve
//! for the guest's kernel and agent. CRI sums its containers' limits up in
//! annotations of the sandbox; elsewhere the first container's own resources
//! are the pod's. No limit: the configured default.

use std::collections::HashMap;
use std::time::Duration;

use nacre_protocol::vm::GROWTH_STEP_MIB;
use nacre_vmm::vcpu::MAX_VCPUS;
use oci_spec::runtime::Spec;

use crate::cgroup::Limits;
use crate::config::Config;
use crate::oci::kubernetes::{
    SANDBOX_CPU_PERIOD as CPU_PERIOD, SANDBOX_CPU_QUOTA as CPU_QUOTA, SANDBOX_MEMORY as MEMORY,
};

/// What guest kernel and agent need beside the containers.
const GUEST_RESERVE_MIB: u64 = 64;
/// The least a guest boots in.
const MIN_MEMORY_MIB: u64 = 128;
/// Pages for each page of a table at worst: entries of 8 bytes.
const PAGES_PER_TABLE: u64 = 512;
/// Who has tables for all of a guest's pinned memory, counted against the pod's cgroup: the
/// IOMMU, KVM and the monitor.
const PINNED_TABLES: u64 = 3;
/// What any host pins in a second, clearing the pages included.
const PINNED_MIB_PER_SECOND: u32 = 512;
/// What it maps of BARs for other devices in a second, a page of 4 KiB at a time: kernels before 6.12 know
/// no larger ones there. The monitor has a page table for each 2 MiB then.
const BARS_MIB_PER_SECOND: u64 = 2048;
/// The host's huge pages, of which a machine has whole ones.
const HUGE_PAGE_MIB: u32 = 2;
/// As the configuration's own limits.
const MAX_MEMORY_MIB: u64 = 1 << 20;
const DEFAULT_PERIOD_USEC: u64 = 100_000;

/// Size of a virtual machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// vCPUs that the guest boots with.
    pub vcpus: u8,
    /// vCPUs that it can have later.
    pub max_vcpus: u8,
    /// Memory.
    pub memory_mib: u32,
    /// What may be added to it.
    pub growth_mib: u32,
    /// Devices of the host reach it, so all of it is there from the start.
    pub is_pinned: bool,
    /// What they reach of each other's BARs.
    pub peer_bars_mib: u64,
}

/// What pinning a machine's memory may take, and mapping what its devices reach besides.
pub fn pin_time(size: Size) -> Duration {
    if !size.is_pinned {
        return Duration::ZERO;
    }
    let memory = size.memory_mib.div_ceil(PINNED_MIB_PER_SECOND);
    let bars = size.peer_bars_mib.div_ceil(BARS_MIB_PER_SECOND);
    Duration::from_secs(u64::from(memory) + bars)
}

/// The size for a pod whose first container has `spec`. `is_pinned`: it has devices, which reach
/// `peer_bars_mib` of each other.
pub fn size_of(spec: &Spec, is_pinned: bool, peer_bars_mib: u64, config: &Config) -> Size {
    let empty = HashMap::new();
    let annotations = spec.annotations().as_ref().unwrap_or(&empty);
    let memory_mib = annotated(annotations, MEMORY)
        .or_else(|| spec_memory(spec))
        .map_or(config.default_memory_mib, mib_for);
    let memory_mib = with_huge_pages(memory_mib, Limits::of(spec).huge_pages.bytes());
    let memory_mib = if config.hugepages {
        memory_mib.next_multiple_of(HUGE_PAGE_MIB)
    } else {
        memory_mib
    };
    let quota = annotated(annotations, CPU_QUOTA)
        .map(|quota| (quota, annotated(annotations, CPU_PERIOD)))
        .or_else(|| spec_cpu(spec));
    let vcpus = quota
        .map(|(quota, period)| quota.div_ceil(period.unwrap_or(DEFAULT_PERIOD_USEC)))
        .map_or(config.default_vcpus, possible_vcpus);
    Size {
        vcpus,
        max_vcpus: vcpus,
        memory_mib,
        growth_mib: if is_pinned || config.hugepages {
            0
        } else {
            growth_of(memory_mib, host_memory_mib())
        },
        is_pinned,
        peer_bars_mib,
    }
}

/// What may be added to `memory_mib` on a host with `host_mib`: no machine gets
/// larger than its host. Huge pages are taken when the machine is made, and so is memory
/// that devices reach: such a machine keeps its size.
fn growth_of(memory_mib: u32, host_mib: u32) -> u32 {
    let growth = host_mib.saturating_sub(memory_mib);
    growth - growth % GROWTH_STEP_MIB
}

fn host_memory_mib() -> u32 {
    match nix::sys::sysinfo::sysinfo() {
        Ok(info) => u32::try_from(info.ram_total() >> 20).unwrap_or(u32::MAX),
        Err(error) => {
            tracing::warn!(%error, "the host's memory is not known: machines do not grow");
            0
        }
    }
}

/// Memory, in MiB, for a pod whose containers have these limits: what they may
/// use together, and no less than the default while one of them has no limit. In a
/// machine that keeps its size such a one has what is there.
pub fn memory_of(containers: &[Limits], is_pinned: bool, config: &Config) -> u32 {
    let known = containers.iter().filter_map(|limits| limits.memory_bytes);
    let bytes = known.fold(0, u64::saturating_add);
    let mib = mib_for(bytes);
    let limited = containers
        .iter()
        .all(|limits| limits.memory_bytes.is_some());
    let mib = if limited || is_pinned {
        mib
    } else {
        mib.max(config.default_memory_mib)
    };
    with_huge_pages(mib, Limits::together(containers).huge_pages.bytes())
}

/// vCPUs for a pod whose containers have these limits: what they may use together, and no
/// fewer than the default while one of them has no limit.
pub fn vcpus_of(containers: &[Limits], config: &Config) -> u8 {
    let share = |(quota, period): (u64, u64)| {
        u128::from(quota) * u128::from(DEFAULT_PERIOD_USEC) / u128::from(period)
    };
    let known = containers.iter().filter_map(|limits| limits.cpu);
    let usec: u128 = known.map(share).sum();
    let vcpus = usec.div_ceil(DEFAULT_PERIOD_USEC.into());
    let vcpus = possible_vcpus(u64::try_from(vcpus).unwrap_or(u64::MAX));
    if containers.iter().all(|limits| limits.cpu.is_some()) {
        vcpus
    } else {
        vcpus.max(config.default_vcpus)
    }
}

/// As many of these vCPUs as a machine can have.
fn possible_vcpus(vcpus: u64) -> u8 {
    let vcpus = vcpus.clamp(1, MAX_VCPUS.into());
    u8::try_from(vcpus).unwrap_or(MAX_VCPUS)
}

/// Huge pages are beside the memory that has a limit, as in Kubernetes.
fn with_huge_pages(memory_mib: u32, bytes: u64) -> u32 {
    let mib = u64::from(memory_mib).saturating_add(bytes.div_ceil(1 << 20));
    u32::try_from(mib.min(MAX_MEMORY_MIB)).unwrap_or(u32::MAX)
}

/// Memory of a machine whose containers may use `bytes` together.
fn mib_for(bytes: u64) -> u32 {
    let mib = bytes.div_ceil(1 << 20).saturating_add(GUEST_RESERVE_MIB);
    u32::try_from(mib.clamp(MIN_MEMORY_MIB, MAX_MEMORY_MIB)).unwrap_or(u32::MAX)
}

/// The host's limits for a pod with these containers and a machine of
/// `memory_mib`: what the machine may fill, and the overhead. The guest's reserve
/// is part of that, but for a machine with devices: it fills its memory at once, and there
/// are page tables for all of it, and for what they reach of each other. Of processor time there
/// is an overhead too, else containers that use all of theirs would leave the shim none to manage
/// them with.
/// A container without a limit lifts that of the pod.
pub fn host_limits(
    containers: &[Limits],
    memory_mib: u32,
    is_pinned: bool,
    peer_bars_mib: u64,
    config: &Config,
) -> Limits {
    let together = Limits::together(containers);
    let memory_mib = u64::from(memory_mib);
    let mib = if is_pinned {
        let tables = (memory_mib * PINNED_TABLES).saturating_add(peer_bars_mib);
        memory_mib + tables.div_ceil(PAGES_PER_TABLE)
    } else {
        memory_mib.saturating_sub(GUEST_RESERVE_MIB)
    };
    let mib = mib + u64::from(config.overhead_memory_mib);
    let millis = u64::from(config.overhead_cpu_millis);
    let with_overhead = |(quota, period): (u64, u64)| {
        let overhead = period.saturating_mul(millis) / 1000;
        (quota.saturating_add(overhead), period)
    };
    Limits {
        memory_bytes: together.memory_bytes.map(|_| mib << 20),
        cpu: together.cpu.map(with_overhead),
        ..together
    }
}

/// A positive number; anything else means "no limit".
fn annotated(annotations: &HashMap<String, String>, name: &str) -> Option<u64> {
    annotations
        .get(name)?
        .parse()
        .ok()
        .filter(|value| *value > 0)
}

fn positive(value: Option<i64>) -> Option<u64> {
    u64::try_from(value?).ok().filter(|value| *value > 0)
}

fn spec_memory(spec: &Spec) -> Option<u64> {
    let resources = spec.linux().as_ref()?.resources().as_ref()?;
    positive(resources.memory().as_ref()?.limit())
}

fn spec_cpu(spec: &Spec) -> Option<(u64, Option<u64>)> {
    let resources = spec.linux().as_ref()?.resources().as_ref()?;
    let cpu = resources.cpu().as_ref()?;
    Some((
        positive(cpu.quota())?,
        cpu.period().filter(|period| *period > 0),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn size(value: &serde_json::Value) -> (u8, u32) {
        let mut spec = json!({"ociVersion": "1.0.2"});
        spec.as_object_mut()
            .unwrap()
            .extend(value.as_object().unwrap().clone());
        let spec: Spec = serde_json::from_value(spec).unwrap();
        let size = size_of(&spec, false, 0, &Config::default());
        (size.vcpus, size.memory_mib)
    }

    #[test]
    fn limits_and_their_absence() {
        let config = Config::default();
        let default = (config.default_vcpus, config.default_memory_mib);
        assert_eq!(size(&json!({})), default);
        let spec = json!({"linux": {"resources": {
            "memory": {"limit": 256 << 20},
            "cpu": {"quota": 150_000, "period": 100_000},
        }}});
        assert_eq!(size(&spec), (2, 320));
        let unlimited = json!({"linux": {"resources": {
            "memory": {"limit": -1}, "cpu": {"quota": -1},
        }}});
        assert_eq!(size(&unlimited), default);
    }

    #[test]
    fn machines_grow_up_to_the_host_s_size() {
        assert_eq!(growth_of(256, 1027), 768);
        assert_eq!(growth_of(512, 256), 0);
    }

    #[test]
    fn what_is_there_from_the_start_keeps_its_size() {
        let mut config = Config {
            default_memory_mib: 128,
            ..Config::default()
        };
        let spec = Spec::default();
        let [free, pinned] = [false, true].map(|pinned| size_of(&spec, pinned, 0, &config));
        assert!(free.growth_mib > 0);
        assert_eq!((pinned.growth_mib, pinned.is_pinned), (0, true));
        config.hugepages = true;
        assert_eq!(size_of(&spec, false, 0, &config).growth_mib, 0);
        // Only whole huge pages are a machine's.
        config.default_memory_mib = 201;
        assert_eq!(size_of(&spec, false, 0, &config).memory_mib, 202);
    }

    #[test]
    fn pinned_memory_is_counted_and_waited_for() {
        let config = Config::default();
        let limit = [Limits {
            memory_bytes: Some(2000 << 20),
            ..Limits::default()
        }];
        let bytes = |pinned, bars| host_limits(&limit, 2064, pinned, bars, &config).memory_bytes;
        let overhead = u64::from(config.overhead_memory_mib);
        assert_eq!(bytes(false, 0), Some((2000 + overhead) << 20));
        assert_eq!(bytes(true, 0), Some((2064 + 13 + overhead) << 20));
        // Two BARs of 128 GiB.
        assert_eq!(bytes(true, 256 << 10), Some((2064 + 525 + overhead) << 20));

        let mut size = size_of(&Spec::default(), true, 0, &config);
        size.memory_mib = 64 << 10;
        assert_eq!(pin_time(size), Duration::from_secs(128));
        size.peer_bars_mib = 256 << 10;
        assert_eq!(pin_time(size), Duration::from_secs(128 + 128));
        size.is_pinned = false;
        assert_eq!(pin_time(size), Duration::ZERO);
    }

    #[test]
    fn containers_together() {
        let config = Config::default();
        let limit = |mib: u64| Limits {
            memory_bytes: Some(mib << 20),
            cpu: Some((50_000, 100_000)),
            ..Limits::default()
        };
        let both = [limit(256), limit(512)];
        assert_eq!(memory_of(&both, false, &config), 832);
        let overhead = u64::from(config.overhead_memory_mib);
        let host = host_limits(&both, 832, false, 0, &config);
        assert_eq!(host.memory_bytes, Some((768 + overhead) << 20));
        let millis = u64::from(config.overhead_cpu_millis);
        assert_eq!(host.cpu, Some((100_000 + 100 * millis, 100_000)));
        let one_without = [limit(4), Limits::default()];
        let default = config.default_memory_mib;
        assert_eq!(memory_of(&one_without, false, &config), default);
        assert_eq!(memory_of(&one_without, true, &config), 128);
        assert_eq!(
            host_limits(&one_without, default, false, 0, &config),
            Limits::default()
        );
        assert_eq!(
            memory_of(&[limit(u64::MAX >> 20); 2], false, &config),
            1 << 20
        );
    }

    #[test]
    fn vcpus_are_what_containers_may_use_together() {
        let config = Config {
            default_vcpus: 2,
            ..Config::default()
        };
        let limit = |quota, period| Limits {
            cpu: Some((quota, period)),
            ..Limits::default()
        };
        let of = |containers: &[Limits]| vcpus_of(containers, &config);
        let half = limit(25_000, 50_000);
        assert_eq!(of(&[half]), 1);
        assert_eq!(of(&[half, limit(150_000, 100_000)]), 2);
        assert_eq!(of(&[half, limit(160_000, 100_000)]), 3);
        assert_eq!(of(&[half, Limits::default()]), 2, "the default");
        assert_eq!(of(&[limit(300_000, 100_000), Limits::default()]), 3);
        assert_eq!(of(&[limit(u64::MAX, 1); 2]), MAX_VCPUS);
        assert_eq!(of(&[]), 1);
    }

    #[test]
    fn huge_pages_are_beside_the_other_memory() {
        let config = Config::default();
        let huge = json!([{"pageSize": "2MB", "limit": 64 << 20}]);
        let spec = json!({"linux": {"resources": {
            "memory": {"limit": 256 << 20}, "hugepageLimits": huge,
        }}});
        assert_eq!(size(&spec).1, 256 + 64 + 64);
        let resources = serde_json::from_value(spec["linux"]["resources"].clone());
        let limits = Limits::default().updated_by(&resources.unwrap());
        assert_eq!(memory_of(&[limits, limits], false, &config), 512 + 64 + 128);
    }

    #[test]
    fn annotations_win_and_cannot_overflow() {
        let pod = json!({"annotations": {MEMORY: "1073741824", CPU_QUOTA: "400000", CPU_PERIOD: "100000"}});
        assert_eq!(size(&pod), (4, 1088));
        let huge = u64::MAX.to_string();
        let pod = json!({"annotations": {MEMORY: huge, CPU_QUOTA: huge, CPU_PERIOD: "0"}});
        assert_eq!(size(&pod), (MAX_VCPUS, 1 << 20));
    }
}
