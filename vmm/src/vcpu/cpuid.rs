//! What the guest's CPUID says: all that KVM supports, less what a pod has no
//! business with, and a topology of our own.
//!
//! Every vCPU is a core of one socket, without SMT; the APIC id is the index.
//! Nested virtualization and performance counters are withheld: the former for
//! the attack surface, the latter because they leak across tenants and cost
//! intercepted MSR accesses at boot.

use kvm_bindings::{
    CpuId, KVM_CAP_TSC_DEADLINE_TIMER, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES,
    kvm_cpuid_entry2,
};
use kvm_ioctls::Kvm;

use super::VcpuError;
use crate::vm::VmError;

/// Most vCPUs of a machine.
pub const MAX_VCPUS: u8 = 32;

/// Leaf 1, ECX.
const ECX_VMX: u32 = 1 << 5;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: more than one APIC id in the package.
const EDX_HTT: u32 = 1 << 28;
/// Leaf 0x8000_0001, ECX: SVM; performance counter extensions of core, north
/// bridge and L2 cache.
const ECX_AMD_WITHHELD: u32 = 1 << 2 | 1 << 23 | 1 << 24 | 1 << 28;
/// Leaf 0x8000_0001, ECX: cores share a package.
const ECX_AMD_CMP_LEGACY: u32 = 1 << 1;
/// Topology leaves written anew, in each index.
const TOPOLOGY_LEAVES: [u32; 2] = [0xb, 0x1f];
/// AMD's extended topology (as 0x1f) and performance monitoring.
const DROPPED_LEAVES: [u32; 2] = [0x8000_0026, 0x8000_0022];
/// Level types of the topology leaves (Intel SDM volume 2, CPUID).
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;
/// Physical address bits when KVM does not say.
const DEFAULT_PHYSICAL_BITS: u8 = 36;

/// The table all vCPUs of a machine derive theirs from.
pub struct Cpuid {
    supported: Vec<kvm_cpuid_entry2>,
    tsc_deadline: bool,
    vcpus: u8,
}

impl Cpuid {
    /// Asks KVM what it supports, for a machine with `vcpus` vCPUs.
    ///
    /// # Errors
    ///
    /// KVM's.
    pub fn new(kvm: &Kvm, vcpus: u8) -> Result<Self, VcpuError> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(VmError::new("get the supported CPUID"))?;
        let deadline = kvm.check_extension_raw(KVM_CAP_TSC_DEADLINE_TIMER.into()) > 0;
        Ok(Self::from_entries(supported.as_slice(), deadline, vcpus))
    }

    fn from_entries(entries: &[kvm_cpuid_entry2], tsc_deadline: bool, vcpus: u8) -> Self {
        let kept = |entry: &&kvm_cpuid_entry2| {
            !TOPOLOGY_LEAVES.contains(&entry.function) && !DROPPED_LEAVES.contains(&entry.function)
        };
        Self {
            supported: entries.iter().filter(kept).copied().collect(),
            tsc_deadline,
            vcpus,
        }
    }

    /// The guest's physical address bits (leaf 0x8000_0008, EAX).
    #[must_use]
    pub fn physical_bits(&self) -> u8 {
        self.supported
            .iter()
            .find(|entry| entry.function == 0x8000_0008)
            .map_or(DEFAULT_PHYSICAL_BITS, |entry| entry.eax.to_le_bytes()[0])
    }

    /// The table of vCPU `index`.
    ///
    /// # Errors
    ///
    /// When it has more entries than KVM takes.
    pub fn of(&self, index: u8) -> Result<CpuId, VcpuError> {
        let mut entries = self.supported.clone();
        for entry in &mut entries {
            self.adjust(entry, index);
        }
        for leaf in TOPOLOGY_LEAVES {
            // Leaf 0x1f exists only on processors that say so.
            if leaf == TOPOLOGY_LEAVES[0] || self.max_leaf() >= leaf {
                entries.extend(self.topology(leaf, index));
            }
        }
        CpuId::from_entries(&entries).map_err(|_| VcpuError::Cpuid(entries.len()))
    }

    fn max_leaf(&self) -> u32 {
        self.supported
            .iter()
            .find(|entry| entry.function == 0)
            .map_or(0, |entry| entry.eax)
    }

    /// Bits of an APIC id that number a core.
    fn core_bits(&self) -> u32 {
        u32::from(self.vcpus).next_power_of_two().trailing_zeros()
    }

    fn adjust(&self, entry: &mut kvm_cpuid_entry2, index: u8) {
        let id = u32::from(index);
        let vcpus = u32::from(self.vcpus);
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0xffff | vcpus << 16 | id << 24;
                entry.ecx = entry.ecx & !(ECX_VMX | ECX_TSC_DEADLINE) | ECX_HYPERVISOR;
                if self.tsc_deadline {
                    entry.ecx |= ECX_TSC_DEADLINE;
                }
                set(&mut entry.edx, EDX_HTT, vcpus > 1);
            }
            4 if entry.eax & 0x1f != 0 => {
                let sharing = self.sharing(entry.eax >> 5 & 7);
                let cores = (1 << self.core_bits()) - 1;
                entry.eax = entry.eax & 0x3fff | sharing << 14 | cores << 26;
            }
            0xa => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            0x8000_0001 => {
                entry.ecx &= !ECX_AMD_WITHHELD;
                set(&mut entry.ecx, ECX_AMD_CMP_LEGACY, vcpus > 1);
            }
            0x8000_0008 => entry.ecx = entry.ecx & !0xffff | self.core_bits() << 12 | (vcpus - 1),
            0x8000_001d if entry.eax & 0x1f != 0 => {
                let sharing = self.sharing(entry.eax >> 5 & 7);
                entry.eax = entry.eax & 0x3fff | sharing << 14;
            }
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
            _ => {}
        }
    }

    /// APIC ids, less one, that share a cache: all of them the third level.
    fn sharing(&self, level: u32) -> u32 {
        if level >= 3 {
            (1 << self.core_bits()) - 1
        } else {
            0
        }
    }

    /// The sub-leaves of a topology leaf: one thread per core, cores, the end.
    fn topology(&self, leaf: u32, index: u8) -> [kvm_cpuid_entry2; 3] {
        let level = |sub: u32, bits: u32, logical: u32, kind: u32| kvm_cpuid_entry2 {
            function: leaf,
            index: sub,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: bits,
            ebx: logical,
            ecx: sub | kind << 8,
            edx: index.into(),
            ..Default::default()
        };
        [
            level(0, 0, 1, LEVEL_SMT),
            level(1, self.core_bits(), self.vcpus.into(), LEVEL_CORE),
            level(2, 0, 0, 0),
        ]
    }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on {
        *register |= bit;
    } else {
        *register &= !bit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, values: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = values;
        kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn find(table: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *table
            .as_slice()
            .iter()
            .find(|entry| entry.function == function && entry.index == index)
            .unwrap()
    }

    fn cpuid(vcpus: u8) -> Cpuid {
        let host = [
            leaf(0, [0x1f, 0, 0, 0]),
            leaf(1, [0, 0xffff_00ff, u32::MAX, 0]),
            leaf(0xb, [9, 9, 9, 9]),
            leaf(0xa, [1, 2, 3, 4]),
            leaf(0x8000_0001, [0, 0, u32::MAX, 0]),
            leaf(0x8000_0008, [48, 0, 0, 0]),
        ];
        Cpuid::from_entries(&host, true, vcpus)
    }

    #[test]
    fn apic_ids_and_counts_are_ours() {
        let table = cpuid(6).of(5).unwrap();
        assert_eq!(find(&table, 1, 0).ebx, 5 << 24 | 6 << 16 | 0xff);
        assert_ne!(find(&table, 1, 0).edx & EDX_HTT, 0);
        let cores = find(&table, 0xb, 1);
        assert_eq!((cores.eax, cores.ebx, cores.edx), (3, 6, 5));
        assert_eq!(find(&table, 0x1f, 2).ecx, 2);
        assert_eq!(find(&table, 0x8000_0008, 0).ecx, 3 << 12 | 5);
    }

    #[test]
    fn single_vcpu_has_no_threads() {
        let table = cpuid(1).of(0).unwrap();
        assert_eq!(find(&table, 1, 0).edx & EDX_HTT, 0);
        assert_eq!(find(&table, 0xb, 1).eax, 0);
    }

    #[test]
    fn nested_virtualization_and_counters_are_withheld() {
        let table = cpuid(2).of(0).unwrap();
        let features = find(&table, 1, 0).ecx;
        assert_eq!(features & ECX_VMX, 0);
        assert_ne!(features & ECX_TSC_DEADLINE, 0);
        assert_ne!(features & ECX_HYPERVISOR, 0);
        assert_eq!(find(&table, 0x8000_0001, 0).ecx & ECX_AMD_WITHHELD, 0);
        assert_eq!(find(&table, 0xa, 0).eax, 0);
    }

    #[test]
    fn physical_bits_come_from_the_host() {
        assert_eq!(cpuid(1).physical_bits(), 48);
        assert_eq!(Cpuid::from_entries(&[], false, 1).physical_bits(), 36);
    }
}
