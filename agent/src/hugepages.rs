//! Huge pages: the guest's pool has as many as its containers may use together.
//!
//! The shim has the machine be that much larger before a container is made, so that
//! what goes into the pool is not missing elsewhere. A page that a container has not
//! used goes back with it; one that a volume of the pod still holds stays in use, and
//! the kernel takes it out of the pool when it is free.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use oci_spec::runtime::LinuxResources;

use crate::error::{Context, Error, Result};

/// Where the kernel has its pools (Documentation/admin-guide/mm/hugetlbpage.rst).
pub const POOLS: &str = "/sys/kernel/mm/hugepages";

/// The guest's pools. Its methods block.
#[derive(Debug)]
pub struct HugePages {
    /// None: the machine is not ours.
    pools: Option<PathBuf>,
    /// What each container may use: KiB of a page, and pages.
    reserved: Mutex<HashMap<String, Vec<(u64, u64)>>>,
}

impl HugePages {
    /// Pools at a place.
    #[must_use]
    pub fn new(pools: Option<PathBuf>) -> Self {
        Self {
            pools,
            reserved: Mutex::default(),
        }
    }

    /// Puts what a container may use into the pools.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` for a page size this kernel does not have, `FailedPrecondition`
    /// when there is not enough memory in one piece.
    pub fn reserve(&self, container_id: &str, resources: Option<&LinuxResources>) -> Result<()> {
        let Some(pools) = &self.pools else {
            return Ok(());
        };
        let wanted = wanted(resources)?;
        if wanted.is_empty() {
            return Ok(());
        }
        let mut reserved = self.lock();
        reserved.insert(container_id.to_owned(), wanted.clone());
        for (page_kib, pages) in wanted {
            if let Err(error) = resize(pools, page_kib, total(&reserved, page_kib)) {
                tracing::warn!("{pages} pages for {container_id}: {}", error.full());
                reserved.remove(container_id);
                // Whatever it got of them.
                let _ = resize(pools, page_kib, total(&reserved, page_kib));
                return Err(error);
            }
        }
        Ok(())
    }

    /// Takes a container's share out of the pools.
    pub fn release(&self, container_id: &str) {
        let Some(pools) = &self.pools else {
            return;
        };
        let mut reserved = self.lock();
        for (page_kib, _) in reserved.remove(container_id).unwrap_or_default() {
            if let Err(error) = resize(pools, page_kib, total(&reserved, page_kib)) {
                tracing::warn!("huge pages of {container_id}: {}", error.full());
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Vec<(u64, u64)>>> {
        self.reserved.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn total(reserved: &HashMap<String, Vec<(u64, u64)>>, page_kib: u64) -> u64 {
    let all = reserved.values().flatten();
    all.filter(|(kib, _)| *kib == page_kib)
        .map(|(_, pages)| pages)
        .sum()
}

/// Page sizes with a limit that asks for pages; "no limit" asks for none.
fn wanted(resources: Option<&LinuxResources>) -> Result<Vec<(u64, u64)>> {
    let limits = resources.and_then(|resources| resources.hugepage_limits().as_deref());
    let mut wanted = Vec::new();
    for limit in limits.unwrap_or_default() {
        let bytes = u64::try_from(limit.limit()).unwrap_or(0);
        // Version 1's word for it: the largest multiple of a page.
        if bytes == 0 || bytes >= 1 << 62 {
            continue;
        }
        let page_kib = page_kib(limit.page_size()).ok_or_else(|| {
            Error::InvalidArgument(format!("huge page size {:?}", limit.page_size()))
        })?;
        wanted.push((page_kib, bytes.div_ceil(page_kib << 10)));
    }
    Ok(wanted)
}

/// "2MB", as the specification writes it.
fn page_kib(text: &str) -> Option<u64> {
    let (number, unit) = [("KB", 1), ("MB", 1 << 10), ("GB", 1 << 20)]
        .iter()
        .find_map(|(suffix, unit)| Some((text.strip_suffix(suffix)?, unit)))?;
    number
        .parse::<u64>()
        .ok()?
        .checked_mul(*unit)
        .filter(|kib| kib.is_power_of_two() && *kib <= 1 << 24)
}

/// Has the pool hold `pages`.
fn resize(pools: &Path, page_kib: u64, pages: u64) -> Result<()> {
    let pool = pools.join(format!("hugepages-{page_kib}kB"));
    if !pool.is_dir() {
        let text = format!("huge pages of {page_kib} KiB: this kernel has none");
        return Err(Error::InvalidArgument(text));
    }
    let file = pool.join("nr_hugepages");
    let what = || format!("have {pages} huge pages of {page_kib} KiB");
    fs::write(&file, pages.to_string()).with_context(what)?;
    // The kernel takes what it gets.
    let text = fs::read_to_string(&file).with_context(what)?;
    let has: u64 = text.trim().parse().unwrap_or(0);
    if has < pages {
        return Err(Error::FailedPrecondition(format!(
            "{has} of {pages} huge pages of {page_kib} KiB: the machine has no room for more"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn limits(value: &serde_json::Value) -> LinuxResources {
        serde_json::from_value(json!({"hugepageLimits": value})).unwrap()
    }

    fn pools() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let pool = dir.path().join("hugepages-2048kB");
        fs::create_dir(&pool).unwrap();
        fs::write(pool.join("nr_hugepages"), "0").unwrap();
        dir
    }

    #[test]
    fn the_pool_has_what_containers_may_use_together() {
        let dir = pools();
        let pages = || {
            let file = dir.path().join("hugepages-2048kB/nr_hugepages");
            fs::read_to_string(file).unwrap()
        };
        let huge = HugePages::new(Some(dir.path().into()));
        let two_mib = |pages: u64| limits(&json!([{"pageSize": "2MB", "limit": pages << 21}]));
        huge.reserve("a", Some(&two_mib(4))).unwrap();
        huge.reserve("b", Some(&two_mib(3))).unwrap();
        assert_eq!(pages(), "7");
        huge.release("a");
        huge.release("a");
        assert_eq!(pages(), "3");
        huge.release("b");
        assert_eq!(pages(), "0");
    }

    #[test]
    fn sizes_without_a_limit_ask_for_nothing_and_others_must_be_there() {
        let dir = pools();
        let huge = HugePages::new(Some(dir.path().into()));
        // As kubelet sends it.
        let none = json!([{"pageSize": "1GB", "limit": 0}, {"pageSize": "64KB", "limit": -1}]);
        huge.reserve("a", Some(&limits(&none))).unwrap();
        let large = limits(&json!([{"pageSize": "1GB", "limit": 1 << 30}]));
        let error = huge.reserve("a", Some(&large)).unwrap_err();
        assert!(error.to_string().contains("1048576 KiB"), "{error}");
        assert!(huge.lock().is_empty(), "nothing is kept of it");
        let odd = limits(&json!([{"pageSize": "2 MB", "limit": 1}]));
        assert!(huge.reserve("a", Some(&odd)).is_err());
    }

    #[test]
    fn a_machine_that_is_not_ours_is_left_alone() {
        let huge = HugePages::new(None);
        let some = limits(&json!([{"pageSize": "2MB", "limit": 1 << 21}]));
        huge.reserve("a", Some(&some)).unwrap();
        assert!(huge.lock().is_empty());
    }
}
