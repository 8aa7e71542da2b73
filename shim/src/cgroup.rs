//! The pod's cgroup on the host (cgroup v2): shim, monitor and virtio-fs daemon live
//! in it, so that the pod is charged for all it costs and cannot exceed it.
//!
//! Limits are enforced twice: per container by the guest's own cgroups, and here
//! for the pod as a whole. This one must leave room for what the guest does
//! not see (page tables, virtqueues, monitor and shim themselves), or a container at its
//! limit would get its VM killed: hence the configuration's overheads.
//!
//! | path | group | made by |
//! |---|---|---|
//! | `/kubepods/pod1/abc` (cgroupfs driver) | that directory | the shim |
//! | `kubepods-pod1.slice:cri-containerd:abc` (systemd driver) | `kubepods.slice/kubepods-pod1.slice/cri-containerd-abc.scope` | systemd (`systemd.rs`); the shim on hosts without it |
//!
//! The spelling decides, so nobody has to configure the driver a second time.
//!
//! ```text
//! create: directories, or a scope around the shim -> limits -> the shim enters
//!                                         monitor, virtiofsd are born in it
//! remove: the shim leaves -> all others are killed -> the scope ends -> directory
//! ```
//! What the shim is there, and what of it is not, is in `resident.rs`.
//!
//! **Processors.** A cpuset names processors of the host, which a guest does not have:
//! it is the machine that runs on them, on those of all its containers together, and
//! their memory nodes are where its memory is. Among themselves containers of a pod
//! share the machine's vCPUs.
//!
//! Processes start in the group by [`PodCgroup::dir_fd`] (`CLONE_INTO_CGROUP`, or
//! [`join`] before their execve).

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use crate::error::chain;

mod bus;
mod cpus;
mod huge_pages;
mod limits;
mod place;
mod resident;
mod systemd;

use bus::BusError;
use place::Place;
use resident::Resident;
use systemd::{Scope, Systemd};

pub use cpus::NumberList;
pub use huge_pages::HugePages;
pub use limits::Limits;
pub(crate) use resident::{join, start_outside};

/// Where cgroup v2 is mounted.
pub const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Controllers the pod's group wants, where the host has them.
const CONTROLLERS: [&str; 6] = ["cpu", "cpuset", "memory", "pids", "io", "hugetlb"];
/// How long killed processes may take to be gone, and systemd to end their scope.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(2);

/// Errors of this module.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The host has cgroup v1, or a mixture.
    #[error("{} is not a cgroup v2 mount; boot with systemd.unified_cgroup_hierarchy=1", .0.display())]
    NotV2(PathBuf),
    /// A path that is not one of the two forms.
    #[error("bad cgroup path {0:?}: expected /a/b or slice:prefix:name")]
    BadPath(String),
    /// systemd does not do what it was asked.
    #[error("systemd does not {action} {unit}")]
    Systemd {
        /// What was asked.
        action: &'static str,
        /// Of which unit.
        unit: String,
        /// Why.
        source: BusError,
    },
    /// The pod's group or unit is somebody's, with processes.
    #[error(
        "there is a cgroup {0} already, in which processes run; end them, or choose another id or \
         cgroup path"
    )]
    Exists(String),
    /// The group is also that of what outlives it.
    #[error(
        "{} is the shim's own cgroup, which is not removed; choose another cgroup path", .0.display()
    )]
    Inside(PathBuf),
    /// systemd's tree is not the one that is seen here.
    #[error(
        "systemd has put the pod into {}, and not into {}; are cgroups mounted here as on the host?",
        actual.display(), expected.display()
    )]
    Elsewhere {
        /// Where its spec says.
        expected: PathBuf,
        /// Where it is.
        actual: PathBuf,
    },
    /// A file operation failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::Io {
        action,
        path,
        source,
    }
}

/// The cgroup of a pod.
#[derive(Debug)]
pub struct PodCgroup {
    group: Group,
    dir: File,
}

impl PodCgroup {
    /// Makes the group with its parents, sets its limits and enters it. One that is there
    /// already is taken over if it has no processes. May block for as long as systemd is busy.
    ///
    /// # Errors
    ///
    /// `BadPath`, `NotV2`, `Exists`, `Systemd`, `Elsewhere` or `Io`; a limit that cannot be set is
    /// an error too. What was made by then is removed; failures of that are logged. What
    /// was not made here stays: processes may run in it, and nobody knows whose.
    pub fn create(cgroups_path: &str, limits: &Limits) -> Result<Self, CgroupError> {
        let root = Path::new(CGROUP_ROOT);
        let stat = statfs(root).map_err(|e| failed("look at", root)(e.into()))?;
        if stat.filesystem_type() != CGROUP2_SUPER_MAGIC {
            return Err(CgroupError::NotV2(root.into()));
        }
        let place = Place::parse(cgroups_path)?;
        let systemd = Systemd::of_host();
        let group = Group::new(root, &place, systemd, Resident::entering()?);
        Self::make(group, root, &place, limits)
    }

    fn make(
        group: Group,
        root: &Path,
        place: &Place,
        limits: &Limits,
    ) -> Result<Self, CgroupError> {
        group.make(root, place, limits)?;
        let dir = group
            .set_up(limits)
            .inspect_err(|_| stays(group.remove()))?;
        Ok(Self { group, dir })
    }

    /// Its directory below `/sys/fs/cgroup`.
    pub fn path(&self) -> &Path {
        &self.group.path
    }

    /// The directory's descriptor, for `CLONE_INTO_CGROUP` and the virtio-fs
    /// daemon.
    pub fn dir_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// Sets the limits; those not given are lifted. May block for as long as systemd is
    /// busy.
    ///
    /// # Errors
    ///
    /// `Systemd`, or `Io` if a given limit cannot be set.
    pub fn set_limits(&self, limits: &Limits) -> Result<(), CgroupError> {
        let limits = self.group.with_lists(limits)?;
        if let Some(scope) = &self.group.scope {
            scope.set_limits(&limits)?;
        }
        self.group.write_limits(&limits)
    }

    /// Whether the kernel has killed a process of the group for want of memory: within its own
    /// limit or that of a group above.
    pub fn ran_out_of_memory(&self) -> bool {
        // Without the memory controller there is no such file, and no limit.
        let events = self.group.path.join("memory.events");
        let events = fs::read_to_string(events).unwrap_or_default();
        let mut counts = events.lines().filter_map(|line| line.split_once(' '));
        counts.any(|(event, count)| event == "oom_kill" && count.trim() != "0")
    }

    /// Leaves the group, kills what is left in it and removes it. Doing so twice is no
    /// error.
    ///
    /// # Errors
    ///
    /// `Inside`; `Io` if processes do not die or the group cannot be removed.
    pub fn remove(&self) -> Result<(), CgroupError> {
        self.group.remove()
    }
}

/// Removes the group of a cgroup path without having made it, as after a crash.
///
/// # Errors
///
/// Those of [`PodCgroup::remove`], and `BadPath`.
pub fn remove(cgroups_path: &str) -> Result<(), CgroupError> {
    let place = Place::parse(cgroups_path)?;
    let root = Path::new(CGROUP_ROOT);
    Group::new(root, &place, Systemd::of_host(), Resident::present()).remove()
}

/// A group, whether it is there or not.
#[derive(Debug)]
struct Group {
    path: PathBuf,
    /// As systemd knows it.
    scope: Option<Scope>,
    shim: Resident,
}

impl Group {
    fn new(root: &Path, place: &Place, systemd: Option<Systemd>, shim: Resident) -> Self {
        let path = place.below(root);
        let scope = place.unit.clone().zip(systemd);
        let scope = scope.map(|(unit, systemd)| Scope {
            systemd,
            unit,
            group: path.clone(),
        });
        Self { path, scope, shim }
    }

    /// Makes it, a scope around the shim. Of what fails there is nothing.
    fn make(&self, root: &Path, place: &Place, limits: &Limits) -> Result<(), CgroupError> {
        let Some(scope) = &self.scope else {
            if is_populated(&self.path) {
                return Err(CgroupError::Exists(self.path.display().to_string()));
            }
            return make_directories(root, place);
        };
        scope.start(self.shim.pid, limits)?;
        if self.shim.is_in(&self.path) {
            return Ok(());
        }
        let elsewhere = self.shim.elsewhere(&self.path);
        // What is at the path may be somebody's, in the tree that is seen here.
        let left = self.shim.leave(&self.path);
        stays(left.and_then(|()| scope.stop(REMOVE_TIMEOUT)));
        Err(elsewhere)
    }

    /// Limits one that was made, and has the shim in it.
    fn set_up(&self, limits: &Limits) -> Result<File, CgroupError> {
        let dir = File::options()
            .read(true)
            .custom_flags(libc::O_DIRECTORY)
            .open(&self.path)
            .map_err(failed("open", &self.path))?;
        self.write_limits(&self.with_lists(limits)?)?;
        if self.scope.is_none() {
            self.shim.enter(&self.path)?;
        }
        Ok(dir)
    }

    fn write_limits(&self, limits: &Limits) -> Result<(), CgroupError> {
        let memory = limits.memory_bytes.map(|bytes| bytes.to_string());
        let cpu = limits
            .cpu
            .map(|(quota, period)| format!("{quota} {period}"));
        self.set("memory.max", memory.as_deref())?;
        self.set("cpu.max", cpu.as_deref())?;
        for (name, list) in [("cpuset.cpus", limits.cpus), ("cpuset.mems", limits.mems)] {
            if let Some(list) = list {
                self.set(name, Some(&list.to_string()))?;
            }
        }
        Ok(())
    }

    /// Of a group with processes the kernel does not take an empty list back: where one
    /// was set, it gets what the group above has.
    fn with_lists(&self, limits: &Limits) -> Result<Limits, CgroupError> {
        Ok(Limits {
            cpus: limits
                .cpus
                .map_or_else(|| self.lifted("cpuset.cpus"), |list| Ok(Some(list)))?,
            mems: limits
                .mems
                .map_or_else(|| self.lifted("cpuset.mems"), |list| Ok(Some(list)))?,
            ..*limits
        })
    }

    fn lifted(&self, name: &str) -> Result<Option<NumberList>, CgroupError> {
        let now = fs::read_to_string(self.path.join(name)).unwrap_or_default();
        if now.trim().is_empty() {
            return Ok(None);
        }
        let above = self.path.with_file_name(format!("{name}.effective"));
        let text = fs::read_to_string(&above).map_err(failed("read", &above))?;
        Ok(NumberList::parse(&text))
    }

    fn set(&self, name: &str, value: Option<&str>) -> Result<(), CgroupError> {
        let path = self.path.join(name);
        if value.is_none() && !path.exists() {
            return Ok(());
        }
        write(&path, value.unwrap_or("max")).map_err(failed("write", &path))
    }

    /// See [`PodCgroup::remove`].
    fn remove(&self) -> Result<(), CgroupError> {
        self.shim.leave(&self.path)?;
        let deadline = Instant::now() + REMOVE_TIMEOUT;
        if let Some(scope) = &self.scope {
            kill(&self.path)?;
            // systemd forgets a scope without processes by itself, if later.
            if let Err(error) = scope.stop(REMOVE_TIMEOUT) {
                tracing::warn!(error = chain(&error), "a scope is left to end by itself");
            }
        }
        remove_directory(&self.path, deadline)
    }
}

/// Logs that what was made is not taken back.
fn stays(removed: Result<(), CgroupError>) {
    if let Err(error) = removed {
        tracing::warn!(error = chain(&error), "a cgroup stays half made");
    }
}

/// Whether there are processes in a group or below it.
fn is_populated(group: &Path) -> bool {
    let events = fs::read_to_string(group.join("cgroup.events"));
    events.is_ok_and(|events| events.lines().any(|line| line == "populated 1"))
}

fn make_directories(root: &Path, place: &Place) -> Result<(), CgroupError> {
    let mut path = root.to_owned();
    for part in &place.directories {
        enable_controllers(&path);
        path.push(part);
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed("make cgroup", &path)(error));
            }
            _ => {}
        }
    }
    Ok(())
}

fn remove_directory(path: &Path, deadline: Instant) -> Result<(), CgroupError> {
    let mut pause = Duration::from_millis(1);
    loop {
        match fs::remove_dir(path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error)
                if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {}
            Err(error) => return Err(failed("remove cgroup", path)(error)),
        }
        kill(path)?;
        // The kernel has no way to wait for a group's last process on rmdir;
        // exits take microseconds to, with much memory, tenths of a second.
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Kills all processes of a group, if it is there.
fn kill(path: &Path) -> Result<(), CgroupError> {
    let kill = path.join("cgroup.kill");
    match write(&kill, "1") {
        Err(error) if !is_gone(&error) => Err(failed("write", &kill)(error)),
        _ => Ok(()),
    }
}

/// ENODEV is what a file of a group says that was removed since it was opened.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// Hands controllers down to the groups below `path`. A controller the host
/// lacks, or one that a process in `path` blocks, shows when a limit is set.
fn enable_controllers(path: &Path) {
    let available = fs::read_to_string(path.join("cgroup.controllers")).unwrap_or_default();
    let enabled = fs::read_to_string(path.join("cgroup.subtree_control")).unwrap_or_default();
    let has = |list: &str, name: &str| list.split_whitespace().any(|word| word == name);
    for name in CONTROLLERS {
        if has(&available, name)
            && !has(&enabled, name)
            && let Err(error) = write(&path.join("cgroup.subtree_control"), &format!("+{name}"))
        {
            tracing::debug!(path = %path.display(), controller = name, %error, "controller stays off");
        }
    }
}

/// cgroup files exist already, and one write(2) is one command.
fn write(path: &Path, value: &str) -> io::Result<()> {
    use std::io::Write;
    File::options()
        .write(true)
        .open(path)?
        .write_all(value.as_bytes())
}

#[cfg(test)]
mod tests;
