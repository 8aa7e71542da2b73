//! The pod's cgroup on the host (cgroup v2): monitor and virtio-fs daemon live
//! in it, so that the pod is charged for its VM and cannot exceed it.
//!
//! Limits are enforced twice: per container by the guest's own cgroups, and here
//! for the machine as a whole. This one must leave room for what the guest does
//! not see (page tables, virtqueues, the monitor itself), or a container at its
//! limit would get its VM killed: hence the configuration's overhead.
//!
//! Both of containerd's spellings of a path work: `/kubepods/pod1/abc` (cgroupfs
//! driver) and `kubepods-pod1.slice:cri-containerd:abc` (systemd driver). Under
//! systemd the directory is made below the slice that kubelet had systemd make;
//! the scope itself is not registered with systemd, which leaves alone what it
//! does not know.
//!
//! **Processors.** A cpuset names processors of the host, which a guest does not have:
//! it is the machine that runs on them, on those of all its containers together, and
//! their memory nodes are where its memory is. Among themselves containers of a pod
//! share the machine's vCPUs.
//!
//! Processes start in the group by [`PodCgroup::dir_fd`] (`CLONE_INTO_CGROUP`)
//! or are moved by [`PodCgroup::add_process`].

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources, Spec};

mod cpus;
mod huge_pages;

pub use cpus::NumberList;
pub use huge_pages::HugePages;

/// Where cgroup v2 is mounted.
pub const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Controllers the pod's group wants, where the host has them.
const CONTROLLERS: [&str; 6] = ["cpu", "cpuset", "memory", "pids", "io", "hugetlb"];
/// How long killed processes may take to be gone.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(2);
/// CPU period where the spec names a quota only; the kernel's default.
const DEFAULT_PERIOD_USEC: u64 = 100_000;

/// Errors of this module.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The host has cgroup v1, or a mixture.
    #[error("{} is not a cgroup v2 mount; boot with systemd.unified_cgroup_hierarchy=1", .0.display())]
    NotV2(PathBuf),
    /// A path that is not one of the two forms.
    #[error("bad cgroup path {0:?}: expected /a/b or slice:prefix:name")]
    BadPath(String),
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
}

impl Limits {
    /// The limits of a spec's resources.
    pub fn of(spec: &Spec) -> Self {
        let linux = spec.linux().as_ref();
        let resources = linux.and_then(|linux| linux.resources().as_ref());
        resources.map_or_else(Self::default, |resources| {
            Self::default().updated_by(resources)
        })
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
        }
    }

    /// What containers with these limits may use together: no limit where one of
    /// them has none.
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

/// A cgroup of one pod.
#[derive(Debug)]
pub struct PodCgroup {
    path: PathBuf,
    dir: File,
}

impl PodCgroup {
    /// Makes the group with its parents and sets its limits. A group that is
    /// there already is taken over.
    ///
    /// # Errors
    ///
    /// `BadPath`, `NotV2`, or `Io`; a limit that cannot be set is an error too.
    pub fn create(cgroups_path: &str, limits: &Limits) -> Result<Self, CgroupError> {
        let root = Path::new(CGROUP_ROOT);
        let stat = statfs(root).map_err(|e| failed("look at", root)(e.into()))?;
        if stat.filesystem_type() != CGROUP2_SUPER_MAGIC {
            return Err(CgroupError::NotV2(root.into()));
        }
        Self::create_below(root, cgroups_path, limits)
    }

    fn create_below(root: &Path, cgroups_path: &str, limits: &Limits) -> Result<Self, CgroupError> {
        let relative = expand(cgroups_path)?;
        let mut path = root.to_owned();
        for part in &relative {
            enable_controllers(&path);
            path.push(part);
            match fs::create_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(failed("make cgroup", &path)(error));
                }
                _ => {}
            }
        }
        let dir = File::options()
            .read(true)
            .custom_flags(libc::O_DIRECTORY)
            .open(&path)
            .map_err(failed("open", &path))?;
        let cgroup = Self { path, dir };
        cgroup.set_limits(limits)?;
        Ok(cgroup)
    }

    /// Its directory below `/sys/fs/cgroup`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory's descriptor, for `CLONE_INTO_CGROUP` and the virtio-fs
    /// daemon.
    pub fn dir_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// Sets the limits; those not given are lifted.
    ///
    /// # Errors
    ///
    /// `Io` if a given limit cannot be set.
    pub fn set_limits(&self, limits: &Limits) -> Result<(), CgroupError> {
        let memory = limits.memory_bytes.map(|bytes| bytes.to_string());
        let cpu = limits
            .cpu
            .map(|(quota, period)| format!("{quota} {period}"));
        self.set("memory.max", memory.as_deref())?;
        self.set("cpu.max", cpu.as_deref())?;
        self.set_list("cpuset.cpus", limits.cpus)?;
        self.set_list("cpuset.mems", limits.mems)
    }

    /// Of a group with processes the kernel does not take an empty list back: it gets
    /// what the group above has.
    fn set_list(&self, name: &str, list: Option<NumberList>) -> Result<(), CgroupError> {
        let path = self.path.join(name);
        let text = match list {
            Some(list) => list.to_string(),
            None => {
                let now = fs::read_to_string(&path).unwrap_or_default();
                if now.trim().is_empty() {
                    return Ok(());
                }
                let above = self.path.with_file_name(format!("{name}.effective"));
                let above = fs::read_to_string(&above).map_err(failed("read", &above))?;
                above.trim().to_owned()
            }
        };
        write(&path, &text).map_err(failed("write", &path))
    }

    fn set(&self, name: &str, value: Option<&str>) -> Result<(), CgroupError> {
        let path = self.path.join(name);
        if value.is_none() && !path.exists() {
            return Ok(());
        }
        write(&path, value.unwrap_or("max")).map_err(failed("write", &path))
    }

    /// Moves a process into the group.
    ///
    /// # Errors
    ///
    /// `Io`, for example when the process is gone.
    pub fn add_process(&self, pid: u32) -> Result<(), CgroupError> {
        let path = self.path.join("cgroup.procs");
        write(&path, &pid.to_string()).map_err(failed("write", &path))
    }

    /// Whether the kernel has killed a process of the group for want of memory: within its own
    /// limit or that of a group above.
    pub fn ran_out_of_memory(&self) -> bool {
        // Without the memory controller there is no such file, and no limit.
        let events = fs::read_to_string(self.path.join("memory.events")).unwrap_or_default();
        let mut counts = events.lines().filter_map(|line| line.split_once(' '));
        counts.any(|(event, count)| event == "oom_kill" && count.trim() != "0")
    }

    /// Kills what is left in the group and removes it. Doing so twice is no
    /// error.
    ///
    /// # Errors
    ///
    /// `Io` if processes do not die or the group cannot be removed.
    pub fn remove(&self) -> Result<(), CgroupError> {
        remove_group(&self.path)
    }
}

/// Removes the group of a cgroup path without having made it, as after a crash.
///
/// # Errors
///
/// Those of [`PodCgroup::remove`], and `BadPath`.
pub fn remove(cgroups_path: &str) -> Result<(), CgroupError> {
    let parts = expand(cgroups_path)?;
    let path = parts
        .iter()
        .fold(PathBuf::from(CGROUP_ROOT), |path, part| path.join(part));
    remove_group(&path)
}

fn remove_group(path: &Path) -> Result<(), CgroupError> {
    let deadline = Instant::now() + REMOVE_TIMEOUT;
    let kill = path.join("cgroup.kill");
    let mut pause = Duration::from_millis(1);
    loop {
        match fs::remove_dir(path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error)
                if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {}
            Err(error) => return Err(failed("remove cgroup", path)(error)),
        }
        match write(&kill, "1") {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("write", &kill)(error));
            }
            _ => {}
        }
        // The kernel has no way to wait for a group's last process on rmdir;
        // exits take microseconds to, with much memory, tenths of a second.
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
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

/// The directories a cgroup path stands for, outermost first.
fn expand(cgroups_path: &str) -> Result<Vec<String>, CgroupError> {
    let bad = || CgroupError::BadPath(cgroups_path.into());
    let parts: Vec<&str> = cgroups_path.split(':').collect();
    let expanded = match parts.as_slice() {
        [path] => plain_parts(path).ok_or_else(bad)?,
        [slice, prefix, name] => {
            let mut dirs = slice_dirs(slice).ok_or_else(bad)?;
            let unit = if prefix.is_empty() {
                (*name).to_owned()
            } else {
                format!("{prefix}-{name}.scope")
            };
            dirs.extend(
                plain_parts(&unit)
                    .filter(|unit| unit.len() == 1)
                    .ok_or_else(bad)?,
            );
            dirs
        }
        _ => return Err(bad()),
    };
    if expanded.is_empty() {
        return Err(bad());
    }
    Ok(expanded)
}

/// Components of a path that neither climbs nor stays.
fn plain_parts(path: &str) -> Option<Vec<String>> {
    Path::new(path)
        .components()
        .filter(|part| *part != Component::RootDir)
        .map(|part| match part {
            Component::Normal(name) => name.to_str().map(str::to_owned),
            _ => None,
        })
        .collect()
}

/// `a-b.slice` lies in `a.slice` (systemd.slice(5)); no slice means the system's.
fn slice_dirs(slice: &str) -> Option<Vec<String>> {
    let slice = if slice.is_empty() {
        "system.slice"
    } else {
        slice
    };
    let name = slice.strip_suffix(".slice")?;
    if name == "-" {
        return Some(Vec::new());
    }
    let mut dirs = Vec::new();
    let mut unit = String::new();
    for part in name.split('-') {
        if part.is_empty() || part.contains('/') || part.starts_with('.') {
            return None;
        }
        if !unit.is_empty() {
            unit.push('-');
        }
        unit.push_str(part);
        dirs.push(format!("{unit}.slice"));
    }
    Some(dirs)
}

#[cfg(test)]
mod tests;
