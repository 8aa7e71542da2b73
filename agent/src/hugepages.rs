//! Huge pages: the guest's pool has as many as its containers may use together.
//!
//! The shim has the machine be that much larger before a container is made, so that
//! what goes into the pool is not missing elsewhere. A page that a container has not
//! used goes back with it; one that a volume of the pod still holds stays in use, and
//! the kernel takes it out of the pool when it is free.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nacre_protocol::guest::{huge_page_bytes, huge_page_kib};
use oci_spec::runtime::LinuxResources;

use crate::error::{Context, Error, Result};

/// Where the kernel has its pools (Documentation/admin-guide/mm/hugetlbpage.rst).
pub const POOLS: &str = "/sys/kernel/mm/hugepages";

/// Pages, by the KiB of one.
type Pages = BTreeMap<u64, u64>;

/// What each container may use.
type Reserved = HashMap<String, Pages>;

/// The guest's pools. Its methods block.
#[derive(Debug)]
pub struct HugePages {
    /// None: the machine is not ours.
    pools: Option<PathBuf>,
    reserved: Mutex<Reserved>,
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

    /// Puts what a container may use into the pools. Of sizes that the resources do not
    /// name it keeps what it has.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` for a page size this kernel does not have, `FailedPrecondition`
    /// when there is not enough memory in one piece. All is as before then.
    pub fn reserve(&self, container_id: &str, resources: Option<&LinuxResources>) -> Result<()> {
        self.update(container_id, resources, || Ok(()))
    }

    /// The same for a container whose limits `apply` changes. Who deletes it meanwhile
    /// waits, or its pages would come back after that.
    ///
    /// # Errors
    ///
    /// Those of [`HugePages::reserve`] and of `apply`. All is as before then.
    pub fn update(
        &self,
        container_id: &str,
        resources: Option<&LinuxResources>,
        apply: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let Some(pools) = &self.pools else {
            return apply();
        };
        let mut reserved = self.lock();
        let before = reserved.get(container_id).cloned().unwrap_or_default();
        let mut after = before.clone();
        after.extend(wanted(resources)?);
        after.retain(|_, pages| *pages > 0);
        let change = change(pools, &mut reserved, container_id, &after);
        let result = change.and_then(|()| apply());
        if result.is_err() {
            take_back(pools, &mut reserved, container_id, &before);
        }
        result
    }

    /// Takes a container's share out of the pools.
    pub fn release(&self, container_id: &str) {
        if let Some(pools) = &self.pools {
            take_back(pools, &mut self.lock(), container_id, &Pages::new());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Reserved> {
        self.reserved.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What goes wrong is logged.
fn take_back(pools: &Path, reserved: &mut Reserved, container_id: &str, pages: &Pages) {
    if let Err(error) = change(pools, reserved, container_id, pages) {
        tracing::warn!("huge pages of {container_id}: {}", error.full());
    }
}

/// Has the container's share be `pages`; the pools of all sizes that this changes
/// are gone through even when one fails.
fn change(pools: &Path, reserved: &mut Reserved, container_id: &str, pages: &Pages) -> Result<()> {
    let before = reserved.remove(container_id).unwrap_or_default();
    if !pages.is_empty() {
        reserved.insert(container_id.to_owned(), pages.clone());
    }
    let mut result = Ok(());
    for page_kib in before.keys().chain(pages.keys()) {
        if before.get(page_kib) != pages.get(page_kib) {
            let resized = resize(pools, *page_kib, total(reserved, *page_kib));
            result = result.and(resized);
        }
    }
    result
}

fn total(reserved: &Reserved, page_kib: u64) -> u64 {
    let all = reserved.values();
    all.filter_map(|pages| pages.get(&page_kib)).sum()
}

/// What the limits ask for; "no limit" asks for no pages.
fn wanted(resources: Option<&LinuxResources>) -> Result<Pages> {
    let limits = resources.and_then(|resources| resources.hugepage_limits().as_deref());
    let mut wanted = Pages::new();
    for limit in limits.unwrap_or_default() {
        let bytes = huge_page_bytes(limit.limit());
        match huge_page_kib(limit.page_size()) {
            Some(page_kib) => {
                wanted.insert(page_kib, bytes.div_ceil(page_kib << 10));
            }
            // Of pages nobody has heard of none are wanted.
            None if bytes == 0 => (),
            None => {
                let text = format!("huge page size {:?}", limit.page_size());
                return Err(Error::InvalidArgument(text));
            }
        }
    }
    Ok(wanted)
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
    use std::sync::mpsc::channel;
    use std::time::Duration;

    fn limits(value: &serde_json::Value) -> LinuxResources {
        serde_json::from_value(json!({"hugepageLimits": value})).unwrap()
    }

    /// The pools of a kernel with pages of these sizes.
    fn pools_of(sizes_kib: &[u64]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for kib in sizes_kib {
            let pool = dir.path().join(format!("hugepages-{kib}kB"));
            fs::create_dir(&pool).unwrap();
            fs::write(pool.join("nr_hugepages"), "0").unwrap();
        }
        dir
    }

    fn pools() -> tempfile::TempDir {
        pools_of(&[2048])
    }

    fn pages(dir: &tempfile::TempDir, page_kib: u64) -> String {
        let pool = dir.path().join(format!("hugepages-{page_kib}kB"));
        fs::read_to_string(pool.join("nr_hugepages")).unwrap()
    }

    fn two_mib(pages: u64) -> LinuxResources {
        limits(&json!([{"pageSize": "2MB", "limit": pages << 21}]))
    }

    #[test]
    fn the_pool_has_what_containers_may_use_together() {
        let dir = pools();
        let pages = || pages(&dir, 2048);
        let huge = HugePages::new(Some(dir.path().into()));
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
    fn what_cannot_be_had_whole_leaves_nothing_in_any_pool() {
        // The pool of the largest pages has a kernel that gives none.
        let dir = pools_of(&[64, 2048]);
        let huge = HugePages::new(Some(dir.path().into()));
        huge.reserve("a", Some(&two_mib(4))).unwrap();
        let greedy = limits(&json!([
            {"pageSize": "64KB", "limit": 3 << 16}, {"pageSize": "2MB", "limit": 5 << 21},
            {"pageSize": "1GB", "limit": 1 << 30},
        ]));
        huge.reserve("b", Some(&greedy)).unwrap_err();
        assert_eq!(
            (pages(&dir, 64), pages(&dir, 2048)),
            ("0".into(), "4".into())
        );
        let bad = huge.update("a", Some(&greedy), || panic!("not without pages"));
        assert!(bad.is_err());
        assert_eq!(
            (pages(&dir, 64), pages(&dir, 2048)),
            ("0".into(), "4".into())
        );
        huge.release("a");
        assert_eq!(pages(&dir, 2048), "0");
    }

    #[test]
    fn the_pool_follows_a_container_s_limits() {
        let dir = pools_of(&[64, 2048]);
        let huge = HugePages::new(Some(dir.path().into()));
        let both = json!([
            {"pageSize": "64KB", "limit": 3 << 16}, {"pageSize": "2MB", "limit": 4 << 21},
        ]);
        huge.reserve("a", Some(&limits(&both))).unwrap();
        huge.reserve("b", Some(&two_mib(1))).unwrap();
        let update = |resources: &LinuxResources| huge.update("a", Some(resources), || Ok(()));
        update(&two_mib(6)).unwrap();
        assert_eq!(
            (pages(&dir, 64), pages(&dir, 2048)),
            ("3".into(), "7".into())
        );
        update(&LinuxResources::default()).unwrap();
        let twice = json!([
            {"pageSize": "2MB", "limit": 9 << 21}, {"pageSize": "2MB", "limit": 6 << 21},
        ]);
        update(&limits(&twice)).unwrap();
        assert_eq!(
            pages(&dir, 2048),
            "7",
            "the last counts: CRI adds what it updates"
        );
        let refused = || Err(Error::InvalidArgument("as the cgroup may".into()));
        huge.update("a", Some(&two_mib(2)), refused).unwrap_err();
        assert_eq!(pages(&dir, 2048), "7", "as before");
        update(&limits(&json!([{"pageSize": "2MB", "limit": -1}]))).unwrap();
        assert_eq!(
            (pages(&dir, 64), pages(&dir, 2048)),
            ("3".into(), "1".into())
        );
        huge.release("a");
        assert_eq!(
            (pages(&dir, 64), pages(&dir, 2048)),
            ("0".into(), "1".into())
        );
    }

    #[test]
    fn a_container_that_is_deleted_during_an_update_keeps_nothing() {
        let dir = pools();
        let huge = &HugePages::new(Some(dir.path().into()));
        huge.reserve("a", Some(&two_mib(4))).unwrap();
        std::thread::scope(|scope| {
            let (done, deleted) = channel();
            let refused = huge.update("a", Some(&two_mib(2)), || {
                scope.spawn(move || {
                    huge.release("a");
                    done.send(()).unwrap();
                });
                let in_between = deleted.recv_timeout(Duration::from_millis(200));
                assert!(in_between.is_err(), "what it has may come back yet");
                Err(Error::NotFound("its cgroup".into()))
            });
            refused.unwrap_err();
            deleted.recv().unwrap();
        });
        assert_eq!(pages(&dir, 2048), "0");
        assert!(huge.lock().is_empty());
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
