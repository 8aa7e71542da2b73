//! The shim in its pod's group.
//!
//! It is there like the monitor, so that the group counts all the pod costs, and two
//! things are different for it:
//!
//! - It outlives the group: it goes back to where it came from before it removes it.
//! - What it runs for others, loggers and hooks, is not the pod's: programs of
//!   containerd's clients, which have to read to the end what the pod wrote, must
//!   neither be killed with the group nor take from its memory. They start
//!   where the shim came from, as those of other runtimes do.
//!
//! Where it came from is containerd's group. That is there as long as containerd
//! runs; systemd may have removed it since, when containerd was stopped, and then the
//! root group takes its place, which any process may be in.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use super::{CGROUP_ROOT, CgroupError, failed, write};

const PROCS: &str = "cgroup.procs";

/// Where this process was before it entered its pod's group. A process is in one
/// group, as it has one working directory.
static HOME: OnceLock<PathBuf> = OnceLock::new();

/// A process that lives in a group and outlives it.
#[derive(Debug, Clone)]
pub(super) struct Resident {
    pub pid: u32,
    /// Where cgroups are mounted.
    root: PathBuf,
    /// Where it came from; unknown of one that is in no pod's group.
    home: Option<PathBuf>,
}

impl Resident {
    /// This process, which is about to enter its pod's group.
    pub fn entering() -> Result<Self, CgroupError> {
        if HOME.get().is_none() {
            let home = group_of(Path::new(CGROUP_ROOT), std::process::id())?;
            HOME.get_or_init(|| home);
        }
        Ok(Self::present())
    }

    /// This process, wherever it is.
    pub fn present() -> Self {
        Self {
            pid: std::process::id(),
            root: CGROUP_ROOT.into(),
            home: HOME.get().cloned(),
        }
    }

    #[cfg(test)]
    pub fn at_home(root: &Path, pid: u32) -> Self {
        Self {
            pid,
            root: root.into(),
            home: Some(group_of(root, pid).unwrap()),
        }
    }

    /// Enters a group.
    ///
    /// The kernel lets every processor pass a quiescent state for a move, which takes
    /// milliseconds, and processes that are born in the group (`CLONE_INTO_CGROUP`)
    /// do not need. The shim cannot be: with the Sandbox API it is there before the group.
    pub fn enter(&self, group: &Path) -> Result<(), CgroupError> {
        let procs = group.join(PROCS);
        write(&procs, &self.pid.to_string()).map_err(failed("write", &procs))
    }

    /// Goes back to where it came from if it is in `group`.
    pub fn leave(&self, group: &Path) -> Result<(), CgroupError> {
        if group_of(&self.root, self.pid)? != group {
            return Ok(());
        }
        match &self.home {
            Some(home) => self.enter(home).or_else(|_| self.enter(&self.root)),
            None => self.enter(&self.root),
        }
    }
}

/// The directory of a process's group (cgroups(7), `/proc/pid/cgroup`).
fn group_of(root: &Path, pid: u32) -> Result<PathBuf, CgroupError> {
    let path = PathBuf::from(format!("/proc/{pid}/cgroup"));
    let text = fs::read_to_string(&path).map_err(failed("read", &path))?;
    Ok(group_in(root, &text))
}

fn group_in(root: &Path, text: &str) -> PathBuf {
    let group = text.lines().find_map(|line| line.strip_prefix("0::/"));
    // One outside what is mounted here begins with "..".
    let group = group.filter(|group| !group.starts_with(".."));
    let group = group.unwrap_or_default();
    let group = group.strip_suffix(" (deleted)").unwrap_or(group);
    if group.is_empty() {
        return root.to_owned();
    }
    root.join(group)
}

/// Has a program start where the shim came from. Among what happens before its execve,
/// this has to be first.
///
/// # Errors
///
/// When none of the places is there.
pub fn start_outside(command: &mut Command) -> io::Result<()> {
    match HOME.get() {
        Some(home) => start_in(command, [home, Path::new(CGROUP_ROOT)]),
        None => Ok(()),
    }
}

/// Has a program start in the first of these groups that takes it.
pub(super) fn start_in(command: &mut Command, groups: [&Path; 2]) -> io::Result<()> {
    let open = |group: &Path| File::options().write(true).open(group.join(PROCS));
    let procs = match groups.map(open) {
        [Ok(first), Ok(second)] => vec![first, second],
        [Ok(one), Err(_)] | [Err(_), Ok(one)] => vec![one],
        [Err(error), Err(_)] => return Err(error),
    };
    let join_one = move || {
        let mut result = Ok(());
        for procs in &procs {
            result = join(procs.as_raw_fd());
            if result.is_ok() {
                break;
            }
        }
        result
    };
    // SAFETY: between fork and exec the closure makes system calls on descriptors it
    // owns, and allocates nothing.
    unsafe { command.pre_exec(join_one) };
    Ok(())
}

/// Moves the caller into the group whose `cgroup.procs` is open as `procs`.
/// Async-signal-safe.
pub(crate) fn join(procs: RawFd) -> io::Result<()> {
    // SAFETY: the byte is a constant's; a descriptor that is none is an error.
    match unsafe { libc::write(procs, b"0".as_ptr().cast(), 1) } {
        1 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_found_below_the_root() {
        let root = Path::new("/cg");
        let of = |text| group_in(root, text);
        assert_eq!(
            of("0::/system.slice/c.service\n"),
            Path::new("/cg/system.slice/c.service")
        );
        assert_eq!(of("4:memory:/a\n0::/b (deleted)\n"), Path::new("/cg/b"));
        assert_eq!(of("0::/\n"), root);
        assert_eq!(of("0::/../outside\n"), root);
        assert_eq!(of(""), root);
    }

    /// Plain files in the place of a cgroup's.
    #[test]
    fn programs_start_in_the_first_group_there_is() {
        let root = tempfile::tempdir().unwrap();
        let [one, two, none] = ["one", "two", "none"].map(|name| root.path().join(name));
        for group in [&one, &two] {
            fs::create_dir(group).unwrap();
            fs::write(group.join(PROCS), "").unwrap();
        }
        let run_in = |groups: [&Path; 2]| {
            let mut command = Command::new("true");
            start_in(&mut command, groups)?;
            command.status()
        };
        let entered = |group: &Path| fs::read_to_string(group.join(PROCS)).unwrap();
        assert!(run_in([&one, &two]).unwrap().success());
        assert_eq!((entered(&one), entered(&two)), ("0".into(), String::new()));
        assert!(run_in([&none, &two]).unwrap().success());
        assert_eq!(entered(&two), "0");
        let error = run_in([&none, &none]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
