//! Memory in huge pages of the guest, by page size.

use nacre_protocol::guest::{huge_page_bytes, huge_page_kib};
use oci_spec::runtime::LinuxResources;

/// Sizes that a guest's kernel has (x86-64), in KiB. It refuses pages of others.
const SIZES_KIB: [u64; 2] = [2 << 10, 1 << 20];

/// Bytes in pages of each size.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HugePages([u64; SIZES_KIB.len()]);

impl HugePages {
    /// In pages of all sizes together.
    pub fn bytes(self) -> u64 {
        self.0.into_iter().fold(0, u64::saturating_add)
    }

    /// These with those of the sizes that `resources` name in their place, as the agent
    /// does it. The last one of a size counts: CRI adds what it updates to the list. Where
    /// there is no limit nothing is kept ready.
    #[must_use]
    pub fn updated_by(mut self, resources: &LinuxResources) -> Self {
        for limit in resources.hugepage_limits().iter().flatten() {
            let kib = huge_page_kib(limit.page_size());
            for (size, bytes) in SIZES_KIB.into_iter().zip(&mut self.0) {
                if kib == Some(size) {
                    *bytes = huge_page_bytes(limit.limit());
                }
            }
        }
        self
    }

    /// Of each size what `choose` makes of both.
    #[must_use]
    pub fn with(self, other: Self, choose: fn(u64, u64) -> u64) -> Self {
        let mut both = self;
        for (bytes, others) in both.0.iter_mut().zip(other.0) {
            *bytes = choose(*bytes, others);
        }
        both
    }
}
