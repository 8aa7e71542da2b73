//! `/run/nacre/<namespace>/<sandbox id>/`: what is known about a pod on disk.
//!
//! ```text
//! <root>/.uids/<uid> -> <namespace>/<sandbox id>  a monitor uid in use (symlink: made whole or not at all)
//! <root>/.devices/<PCI address> -> the same       a device in use, see `devices/claim.rs`
//! <root>/<namespace>/<sandbox id>/
//!     state.json   processes, cgroup, ...: enough to clean up after a killed shim
//!     log          the shim's and the monitor's messages
//!     etc/         files of all containers of the pod, where the shim makes them
//!     shared/      root of the pod's shared directory
//! ```
//!
//! The daemon writes `state.json` before each thing it describes can be left
//! behind; [`RunDir::cleanup`] undoes everything from it, and may be called any
//! number of times, by the daemon or by `delete`.

mod process;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, umount2};
use serde::{Deserialize, Serialize};
use tracing::{debug, warn};

use crate::devices::Claims;

#[cfg(test)]
pub(crate) use process::undying::Undying;
pub use process::{Proc, pidfd_kill, pidfd_open};

/// Longest id taken as a directory name; containerd's own limit is 76.
const MAX_ID_BYTES: usize = 255;

/// Errors of the run directory.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// A namespace or id cannot be a directory name.
    #[error("{0:?} is not a containerd identifier")]
    BadId(String),
    /// A file operation failed.
    #[error("{what} {}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// The failure.
        source: io::Error,
    },
    /// All monitor uids are in use.
    #[error(
        "all {count} monitor uids from {base} are in use; raise uid_count in the configuration"
    )]
    NoUid {
        /// First uid.
        base: u32,
        /// Number of uids.
        count: u32,
    },
    /// state.json is not what this version writes.
    #[error("malformed {}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The parser's complaint.
        source: serde_json::Error,
    },
}

/// Contents of `state.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The sandbox's bundle.
    pub bundle: PathBuf,
    /// The shim daemon.
    pub daemon: Option<Proc>,
    /// The monitor.
    pub monitor: Option<Proc>,
    /// The pod's virtiofsd.
    pub virtiofsd: Option<Proc>,
    /// The monitor's uid.
    pub uid: Option<u32>,
    /// The pod's cgroup path, as the spec names it.
    pub cgroup: Option<String>,
    /// The pod's network namespace.
    pub netns: Option<PathBuf>,
    /// The daemon's socket.
    pub socket: Option<PathBuf>,
}

impl State {
    /// What is known of a pod whose daemon has just been started.
    pub fn of_daemon(pid: u32, bundle: PathBuf, socket: &Path) -> Self {
        Self {
            bundle,
            daemon: Proc::of(pid),
            socket: Some(socket.to_owned()),
            ..Self::default()
        }
    }
}

/// In a bundle, a link to what `run_dir` was.
const ROOT_LINK: &str = "nacre-run-dir";

/// A pod's run directory.
#[derive(Debug, Clone)]
pub struct RunDir {
    root: PathBuf,
    namespace: String,
    id: String,
}

impl RunDir {
    /// Names the run directory of a pod; touches nothing.
    ///
    /// # Errors
    ///
    /// `BadId` unless both parts are containerd identifiers.
    pub fn new(root: &Path, namespace: &str, id: &str) -> Result<Self, RunDirError> {
        check_id(namespace)?;
        check_id(id)?;
        Ok(Self {
            root: root.to_owned(),
            namespace: namespace.to_owned(),
            id: id.to_owned(),
        })
    }

    /// That of a pod whose first container has the bundle `bundle`, wherever the
    /// configuration said it was when the pod was made; `root` if that is not known.
    ///
    /// # Errors
    ///
    /// Those of [`Self::new`].
    pub fn of_bundle(
        bundle: &Path,
        root: &Path,
        namespace: &str,
        id: &str,
    ) -> Result<Self, RunDirError> {
        let remembered = fs::read_link(bundle.join(ROOT_LINK));
        let root = remembered.as_deref().unwrap_or(root);
        Self::new(root, namespace, id)
    }

    /// Has [`Self::of_bundle`] find this one.
    ///
    /// # Errors
    ///
    /// Those of symlink(2).
    pub fn remember(&self, bundle: &Path) -> Result<(), RunDirError> {
        let link = bundle.join(ROOT_LINK);
        symlink(&self.root, &link).map_err(io_error("make", &link))
    }

    /// The directory.
    pub fn path(&self) -> PathBuf {
        self.root.join(&self.namespace).join(&self.id)
    }

    /// Root of the shared directory.
    pub fn shared_root(&self) -> PathBuf {
        self.path().join("shared")
    }

    /// Makes the directory and those in it.
    ///
    /// # Errors
    ///
    /// When a directory cannot be made.
    pub fn create(&self) -> Result<(), RunDirError> {
        for path in [self.uids_dir(), self.shared_root()] {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .map_err(io_error("make", &path))?;
        }
        Ok(())
    }

    /// Opens the log for appending.
    ///
    /// # Errors
    ///
    /// When it cannot be opened.
    pub fn open_log(&self) -> Result<File, RunDirError> {
        let path = self.path().join("log");
        OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&path)
            .map_err(io_error("open", &path))
    }

    /// Reads `state.json`; `None` when there is none.
    ///
    /// # Errors
    ///
    /// When it cannot be read or is malformed.
    pub fn load(&self) -> Result<Option<State>, RunDirError> {
        let path = self.path().join("state.json");
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error("read", &path)(error)),
        };
        serde_json::from_slice(&text)
            .map(Some)
            .map_err(|source| RunDirError::Malformed { path, source })
    }

    /// Replaces `state.json` in one step.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn save(&self, state: &State) -> Result<(), RunDirError> {
        let path = self.path().join("state.json");
        let temporary = self.path().join("state.json.new");
        let text = serde_json::to_vec(state).map_err(|source| RunDirError::Malformed {
            path: path.clone(),
            source,
        })?;
        OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&temporary)
            .and_then(|mut file| file.write_all(&text))
            .map_err(io_error("write", &temporary))?;
        fs::rename(&temporary, &path).map_err(io_error("replace", &path))
    }

    /// Finds a uid for the monitor that no other pod of this host uses.
    ///
    /// # Errors
    ///
    /// `NoUid` when the range is full.
    pub fn allocate_uid(&self, base: u32, count: u32) -> Result<u32, RunDirError> {
        let _lock = lock(&self.uids_dir())?;
        let owner = self.owner();
        for uid in base..base.saturating_add(count) {
            let link = self.uids_dir().join(uid.to_string());
            match fs::read_link(&link) {
                Ok(other) if other == owner => return Ok(uid),
                Ok(other) if Self::owner_lives(&self.root, &other) => continue,
                Ok(_) => fs::remove_file(&link).map_err(io_error("remove", &link))?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => (),
                Err(error) => return Err(io_error("read", &link)(error)),
            }
            symlink(&owner, &link).map_err(io_error("make", &link))?;
            return Ok(uid);
        }
        Err(RunDirError::NoUid { base, count })
    }

    /// Undoes all the pod left on the host: processes, mounts, cgroup, socket,
    /// uid, and the directory itself. Goes on after failures, which it logs.
    ///
    /// A monitor that is killed and not gone yet has the uid, the cgroup and the devices
    /// still: they stay the pod's, by its directory, until nothing of it runs.
    pub fn cleanup(&self) {
        let state = self.load().unwrap_or_else(|error| {
            warn!(error = crate::error::chain(&error), "state unusable");
            None
        });
        let state = state.unwrap_or_default();
        let monitor_is_gone = state.monitor.is_none_or(Proc::kill);
        if let Some(virtiofsd) = state.virtiofsd
            && !virtiofsd.kill()
        {
            warn!(pid = virtiofsd.pid, "virtiofsd does not die");
        }
        let unmounted = unmount_below(&self.path());
        if let Some(socket) = &state.socket {
            remove(socket, fs::remove_file(socket));
        }
        if !monitor_is_gone {
            warn!(
                pid = state.monitor.map(|monitor| monitor.pid),
                path = %self.path().display(),
                "the monitor is killed and not gone; until it is, its devices and its uid are the \
                 pod's"
            );
            return;
        }
        if let Some(cgroup) = &state.cgroup {
            remove_cgroup(cgroup);
        }
        if let Some(uid) = state.uid {
            self.release_uid(uid);
        }
        self.claims().release(self);
        let path = self.path();
        // A recursive removal would empty whatever is still mounted inside.
        if unmounted {
            remove(&path, fs::remove_dir_all(&path));
        }
    }

    /// Whether something of the pod runs that has its uid and its devices: its shim or
    /// its monitor. One whose state cannot be read, or is not there yet, may.
    fn lives(&self) -> bool {
        match self.load() {
            Ok(Some(state)) => {
                let mut processes = [state.daemon, state.monitor].into_iter().flatten();
                processes.any(Proc::is_alive)
            }
            Ok(None) => self.path().exists(),
            Err(_) => true,
        }
    }

    /// Whether the pod lives that a link below `root` names.
    pub(crate) fn owner_lives(root: &Path, owner: &Path) -> bool {
        let names = owner.parent().zip(owner.file_name());
        let pod = names
            .and_then(|(namespace, id)| Self::new(root, namespace.to_str()?, id.to_str()?).ok());
        pod.is_some_and(|pod| pod.lives())
    }

    /// Kills the daemon of this run directory, if it still runs.
    pub fn kill_daemon(state: &State) {
        if let Some(daemon) = state.daemon
            && daemon.pid != std::process::id()
        {
            daemon.kill();
        }
    }

    /// Who has which device on this host.
    pub fn claims(&self) -> Claims {
        Claims::of(&self.root)
    }

    /// The pod as links name it: its directory below the root.
    pub fn owner(&self) -> PathBuf {
        Path::new(&self.namespace).join(&self.id)
    }

    fn uids_dir(&self) -> PathBuf {
        // Not a possible namespace: those start with a letter or digit.
        self.root.join(".uids")
    }

    fn release_uid(&self, uid: u32) {
        let link = self.uids_dir().join(uid.to_string());
        if fs::read_link(&link).is_ok_and(|target| target == self.owner()) {
            remove(&link, fs::remove_file(&link));
        }
    }
}

/// Accepts what containerd's `identifiers.Validate` accepts.
///
/// # Errors
///
/// `BadId` otherwise.
pub fn check_id(id: &str) -> Result<(), RunDirError> {
    let good = id.len() <= MAX_ID_BYTES
        && id.starts_with(|c: char| c.is_ascii_alphanumeric())
        && id
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
    if good {
        Ok(())
    } else {
        Err(RunDirError::BadId(id.to_owned()))
    }
}

/// Locks a directory until the lock is dropped (flock(2)).
///
/// # Errors
///
/// When it cannot be opened or locked.
pub(crate) fn lock(path: &Path) -> Result<Flock<File>, RunDirError> {
    let directory = File::open(path).map_err(io_error("open", path))?;
    Flock::lock(directory, FlockArg::LockExclusive)
        .map_err(|(_, errno)| io_error("lock", path)(errno.into()))
}

pub(crate) fn io_error<'a>(
    what: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> RunDirError + 'a {
    move |source| RunDirError::Io {
        what,
        path: path.to_owned(),
        source,
    }
}

pub(crate) fn remove(path: &Path, result: io::Result<()>) {
    match result {
        Ok(()) => debug!(path = %path.display(), "removed"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => (),
        Err(error) => warn!(path = %path.display(), %error, "cannot remove"),
    }
}

fn remove_cgroup(cgroups_path: &str) {
    if let Err(error) = crate::cgroup::remove(cgroups_path) {
        warn!(error = crate::error::chain(&error), "cgroup stays");
    }
}

/// Detaches every mount below `path` in this mount namespace, deepest first,
/// by the kernel's list. Returns whether none is left.
fn unmount_below(path: &Path) -> bool {
    let Ok(mounts) = fs::read_to_string("/proc/self/mountinfo") else {
        warn!("cannot read mountinfo");
        return false;
    };
    let points = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|field| PathBuf::from(unescape(field)));
    let below: Vec<PathBuf> = points.filter(|point| point.starts_with(path)).collect();
    let mut clean = true;
    for point in below.iter().rev() {
        if let Err(error) = umount2(point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            warn!(path = %point.display(), %error, "cannot unmount");
            clean = false;
        }
    }
    clean
}

/// Undoes mountinfo's octal escapes (proc(5)).
pub(crate) fn unescape(field: &str) -> String {
    ["\\040", "\\011", "\\012", "\\134"]
        .iter()
        .zip([" ", "\t", "\n", "\\"])
        .fold(field.to_owned(), |text, (escape, plain)| {
            text.replace(escape, plain)
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn run_dir(root: &Path, id: &str) -> RunDir {
        let dir = RunDir::new(root, "default", id).unwrap();
        dir.create().unwrap();
        dir
    }

    #[test]
    fn ids_that_are_paths_are_refused() {
        for bad in ["", ".", "..", "a/b", "/a", "-a", "a\0b", ".uids"] {
            assert!(check_id(bad).is_err(), "{bad:?}");
        }
        for good in ["a", "k8s.io", "0123abc_x-y.z"] {
            assert!(check_id(good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn uids_are_unique_and_come_back() {
        let root = tempfile::tempdir().unwrap();
        let (a, b) = (run_dir(root.path(), "a"), run_dir(root.path(), "b"));
        assert_eq!(a.allocate_uid(1000, 2).unwrap(), 1000);
        assert_eq!(a.allocate_uid(1000, 2).unwrap(), 1000);
        assert_eq!(b.allocate_uid(1000, 2).unwrap(), 1001);
        let c = run_dir(root.path(), "c");
        assert!(matches!(
            c.allocate_uid(1000, 2),
            Err(RunDirError::NoUid { .. })
        ));
        // A pod whose directory is gone holds nothing, nor does one whose processes are.
        fs::remove_dir_all(a.path()).unwrap();
        assert_eq!(c.allocate_uid(1000, 2).unwrap(), 1000);
        let mut child = Command::new("true").spawn().unwrap();
        let dead = State {
            daemon: Proc::of(child.id()),
            ..State::default()
        };
        child.wait().unwrap();
        b.save(&dead).unwrap();
        let d = run_dir(root.path(), "d");
        assert_eq!(d.allocate_uid(1000, 2).unwrap(), 1001);
    }

    #[test]
    fn a_monitor_that_is_not_gone_keeps_uid_and_devices() {
        let Some(monitor) = Undying::new() else {
            return;
        };
        let root = tempfile::tempdir().unwrap();
        let dir = run_dir(root.path(), "pod");
        let state = State {
            monitor: Some(monitor.process),
            uid: Some(dir.allocate_uid(1000, 1).unwrap()),
            ..State::default()
        };
        dir.save(&state).unwrap();
        let device = ["0000:01:00.0".parse().unwrap()];
        dir.claims().claim(&dir, &device).unwrap();

        dir.cleanup();
        let other = run_dir(root.path(), "other");
        let held = other.claims().claim(&other, &device);
        assert!(held.is_err(), "a device of a pod that is not gone");
        assert!(other.allocate_uid(1000, 1).is_err(), "so is its uid");

        drop(monitor);
        other.claims().claim(&other, &device).unwrap();
        assert_eq!(other.allocate_uid(1000, 1).unwrap(), 1000);
        dir.cleanup();
        assert!(!dir.path().exists());
        let holder = dir.claims().holder(device[0]).unwrap();
        assert_eq!(holder.as_deref(), Some("default/other"), "not another's");
    }

    #[test]
    fn cleanup_kills_the_right_process_and_can_be_repeated() {
        let root = tempfile::tempdir().unwrap();
        let dir = run_dir(root.path(), "pod");
        let mut monitor = Command::new("sleep").arg("60").spawn().unwrap();
        let mut bystander = Command::new("sleep").arg("60").spawn().unwrap();
        let mut stale = Proc::of(bystander.id()).unwrap();
        stale.start_time += 1;
        let state = State {
            monitor: Proc::of(monitor.id()),
            virtiofsd: Some(stale),
            uid: Some(dir.allocate_uid(1000, 1).unwrap()),
            ..State::default()
        };
        dir.save(&state).unwrap();
        assert_eq!(dir.load().unwrap().unwrap(), state);

        dir.cleanup();
        dir.cleanup();
        assert!(!dir.path().exists());
        assert!(!monitor.wait().unwrap().success());
        assert!(bystander.try_wait().unwrap().is_none(), "killed a stranger");
        bystander.kill().unwrap();
        bystander.wait().unwrap();
        let other = run_dir(root.path(), "other");
        assert_eq!(other.allocate_uid(1000, 1).unwrap(), 1000);
    }
}
