//! Control groups, version 2.
//!
//! ```text
//!   /sys/fs/cgroup/agent              the agent: a leaf, so that the root may delegate
//!   /sys/fs/cgroup/containers/<id>    one per container, created and removed with it
//! ```
//!
//! In `serve` mode the base lies where the test machine mounted cgroup2, and
//! that machine may lack controllers: what cannot be set there is a warning.
//! In the guest it is an error.

pub mod devices;
pub mod freezer;
pub mod oom;
pub mod resources;
pub mod stats;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::inotify::AddWatchFlags;
use oci_spec::runtime::LinuxResources;

use crate::error::{Context, Error, Result};
use crate::watch::Watch;

/// How long processes may take to die of SIGKILL when a container is removed.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// The directory under which containers get their cgroups.
#[derive(Debug)]
pub struct CgroupBase {
    path: PathBuf,
    strict: bool,
}

impl CgroupBase {
    /// Makes the base below a cgroup2 mount and hands all controllers down.
    ///
    /// # Errors
    ///
    /// The file that could not be written; only if `strict`.
    pub fn new(root: &Path, name: &str, strict: bool) -> Result<Self> {
        let base = Self {
            path: root.join(name),
            strict,
        };
        make_dir(&base.path)?;
        for parent in [root, &base.path] {
            if let Err(error) = delegate(parent) {
                if strict {
                    return Err(error);
                }
                tracing::warn!("cgroup controllers: {}", error.full());
            }
        }
        Ok(base)
    }

    /// Makes a container's cgroup.
    ///
    /// # Errors
    ///
    /// Those of mkdir(2).
    pub fn create(&self, container_id: &str) -> Result<Cgroup> {
        let path = self.path.join(container_id);
        make_dir(&path)?;
        Ok(Cgroup {
            path,
            strict: self.strict,
        })
    }

    /// Removes the base; it must be empty.
    ///
    /// # Errors
    ///
    /// Those of rmdir(2).
    pub fn remove(&self) -> io::Result<()> {
        fs::remove_dir(&self.path)
    }
}

fn make_dir(path: &Path) -> Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(error).with_context(|| format!("create cgroup {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Enables in `parent` every controller it has for its children.
fn delegate(parent: &Path) -> Result<()> {
    let path = parent.join("cgroup.controllers");
    let controllers =
        fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let path = parent.join("cgroup.subtree_control");
    for controller in controllers.split_whitespace() {
        fs::write(&path, format!("+{controller}"))
            .with_context(|| format!("enable {controller} in {}", path.display()))?;
    }
    Ok(())
}

/// Where this machine has cgroup2 mounted, from /proc/self/mountinfo.
#[must_use]
pub fn find_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let is_cgroup = file_system.split(' ').next() == Some("cgroup2");
        let point = mount.split(' ').nth(4)?;
        is_cgroup.then(|| PathBuf::from(point))
    })
}

/// A container's cgroup.
#[derive(Debug, Clone)]
pub struct Cgroup {
    path: PathBuf,
    strict: bool,
}

impl Cgroup {
    /// Its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn write(&self, file: &str, value: &str) -> Result<()> {
        let result = fs::write(self.path.join(file), value)
            .with_context(|| format!("write {value:?} to {file} of the cgroup"));
        match result {
            Err(error) if !self.strict => {
                tracing::warn!("{}", error.full());
                Ok(())
            }
            result => result,
        }
    }

    /// Applies limits.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` for values out of range, `Io` for what the kernel
    /// refuses.
    pub fn apply(&self, resources: &LinuxResources) -> Result<()> {
        for (file, value) in resources::settings(resources)? {
            // Without swap in the kernel there is nothing to limit.
            if file == "memory.swap.max" && !self.path.join(&file).exists() {
                continue;
            }
            // kubelet limits the pages of all sizes its own kernel has, to zero; and of
            // those this one lacks, no limit allows any either.
            let is_none = file.starts_with("hugetlb.") && matches!(&*value, "0" | "max");
            if is_none && !self.path.join(&file).exists() {
                continue;
            }
            self.write(&file, &value)?;
        }
        Ok(())
    }

    /// Enforces the device rules.
    ///
    /// # Errors
    ///
    /// Those of bpf(2), if strict.
    pub fn restrict_devices(&self, resources: Option<&LinuxResources>) -> Result<()> {
        let rules = resources.and_then(|resources| resources.devices().as_deref());
        match devices::attach(&self.path, rules.unwrap_or_default()) {
            Err(error) if !self.strict => {
                tracing::warn!("device rules are not enforced: {}", error.full());
                Ok(())
            }
            result => result,
        }
    }

    /// All processes in it and below.
    ///
    /// # Errors
    ///
    /// `Io` if the cgroup is gone.
    pub fn processes(&self) -> Result<Vec<u32>> {
        let mut pids = Vec::new();
        collect_processes(&self.path, &mut pids)
            .with_context(|| format!("list processes of {}", self.path.display()))?;
        pids.sort_unstable();
        Ok(pids)
    }

    /// Kills every process in it and below.
    ///
    /// # Errors
    ///
    /// Those of the write.
    pub fn kill(&self) -> Result<()> {
        let path = self.path.join("cgroup.kill");
        match fs::write(path, "1") {
            Err(error) if error.kind() == io::ErrorKind::NotFound && !self.path.exists() => Ok(()),
            result => result.context("kill the cgroup"),
        }
    }

    /// Kills what is left, waits for it and removes the cgroup.
    ///
    /// # Errors
    ///
    /// `Internal` if a process does not die, `Io` otherwise.
    pub async fn remove(&self) -> Result<()> {
        if !self.path.exists() {
            return Ok(());
        }
        self.kill()?;
        tokio::time::timeout(KILL_LIMIT, self.wait_event("populated", 0))
            .await
            .map_err(|_| Error::Internal("processes of the container do not die".into()))??;
        remove_tree(&self.path).with_context(|| format!("remove cgroup {}", self.path.display()))
    }

    /// Waits until `key` of cgroup.events has `value`.
    async fn wait_event(&self, key: &str, value: u64) -> Result<()> {
        let path = self.path.join("cgroup.events");
        let watch = Watch::new(&path, AddWatchFlags::IN_MODIFY).context("watch cgroup.events")?;
        loop {
            let text = fs::read_to_string(&path).context("read cgroup.events")?;
            if stats::keyed(&text).any(|(k, v)| k == key && v == value) {
                return Ok(());
            }
            watch.changed().await.context("watch cgroup.events")?;
        }
    }
}

fn collect_processes(path: &Path, pids: &mut Vec<u32>) -> io::Result<()> {
    let text = fs::read_to_string(path.join("cgroup.procs"))?;
    pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
    for child in children(path)? {
        match collect_processes(&child, pids) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn children(path: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(path)?.collect::<io::Result<Vec<_>>>()?;
    Ok(entries
        .into_iter()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect())
}

fn remove_tree(path: &Path) -> io::Result<()> {
    for child in children(path)? {
        remove_tree(&child)?;
    }
    fs::remove_dir(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup2_mount_is_found() {
        let mountinfo = "\
25 20 0:20 / /sys rw shared:5 - sysfs sysfs rw
30 25 0:24 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
31 25 0:26 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw
";
        assert_eq!(
            find_mount(mountinfo),
            Some(PathBuf::from("/sys/fs/cgroup/unified"))
        );
        assert_eq!(find_mount(""), None);
    }

    /// kubelet limits huge pages of all sizes, to zero where a pod asks for none.
    #[test]
    fn page_sizes_the_kernel_does_not_have_may_be_limited_to_zero_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let cgroup = Cgroup {
            path: dir.path().into(),
            strict: true,
        };
        let known = dir.path().join("hugetlb.2MB.max");
        fs::write(&known, "max").unwrap();
        let limits = serde_json::json!({"hugepageLimits": [
            {"pageSize": "64GB", "limit": 0}, {"pageSize": "16MB", "limit": -1},
            {"pageSize": "2MB", "limit": 0},
        ]});
        cgroup
            .apply(&serde_json::from_value(limits).unwrap())
            .unwrap();
        assert_eq!(fs::read_to_string(&known).unwrap(), "0");
        // In a cgroup there is nothing to write to.
        for page_size in ["64GB", "16MB"] {
            for kind in ["max", "rsvd.max"] {
                let file = format!("hugetlb.{page_size}.{kind}");
                assert!(!dir.path().join(&file).exists(), "{file}");
            }
        }
        let lifted = serde_json::json!({"hugepageLimits": [{"pageSize": "2MB", "limit": -1}]});
        cgroup
            .apply(&serde_json::from_value(lifted).unwrap())
            .unwrap();
        assert_eq!(fs::read_to_string(&known).unwrap(), "max");
        let one = serde_json::json!({"hugepageLimits": [{"pageSize": "64GB", "limit": 1}]});
        cgroup.apply(&serde_json::from_value(one).unwrap()).unwrap();
        assert!(dir.path().join("hugetlb.64GB.max").exists());
    }
}
