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
//! number of times, by the daemon or by `delete`. A monitor that is killed may have memory
//! to unpin for longer than `delete` is given: then the next who finds that nothing of the
//! pod runs cleans up after it ([`RunDir::bury`]). The root's lock keeps those apart from a
//! start under the same id.

mod process;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, umount2};
use serde::{Deserialize, Serialize};
use tracing::{debug, info, warn};

use crate::devices::Claims;
use crate::network;

pub(crate) use process::Killed;
#[cfg(test)]
pub(crate) use process::undying::Undying;
pub use process::{DEATH_WAIT, Proc, pidfd_kill, pidfd_open};

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
    /// The monitor of a pod with the same id is there yet.
    #[error(
        "pod {pod}: its earlier monitor, process {pid}, is killed and not gone, and has the pod's \
         devices; with memory to unpin that may take {seconds} s: try again then"
    )]
    NotGone {
        /// Namespace and id.
        pod: String,
        /// The monitor's.
        pid: u32,
        /// What it may take.
        seconds: u64,
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
    /// vCPUs that its guest uses, once it boots, as far as that is known.
    #[serde(default)]
    pub vcpus: Option<u8>,
    /// What the monitor may take, once killed, to unpin the guest's memory.
    #[serde(default)]
    pub pin_time: Duration,
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
        make_dir(&self.uids_dir())?;
        make_dir(&self.shared_root())
    }

    /// Makes the directory for a start. What is left of an earlier one under the same id
    /// is cleaned up before, but for the socket, which is this one's already.
    ///
    /// # Errors
    ///
    /// `NotGone` as long as its monitor is not; when a directory cannot be made.
    pub fn renew(&self) -> Result<(), RunDirError> {
        make_dir(&self.root)?;
        let _lock = lock(&self.root)?;
        let (state, rest) = self.kill_all();
        if !self.undo(&state, rest) {
            return Err(RunDirError::NotGone {
                pod: self.owner().display().to_string(),
                pid: state.monitor.map_or(0, |monitor| monitor.pid),
                seconds: state.pin_time.as_secs(),
            });
        }
        self.create()
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
                Ok(other) => {
                    Self::bury(&self.root, &other)?;
                    // It may have forgotten that it had this one.
                    remove(&link, fs::remove_file(&link));
                }
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
        self.cleanup_within(Duration::MAX);
    }

    /// The same, waiting for the end of processes no longer than that.
    pub fn cleanup_within(&self, at_most: Duration) {
        self.finish(&self.load_usable(), at_most);
    }

    /// The same for a daemon that does not do it, which is killed; no longer than [`DEATH_WAIT`]
    /// for all processes together.
    pub fn cleanup_for_daemon(&self) {
        let (state, rest) = self.kill_all();
        self.finish(&state, rest);
    }

    fn finish(&self, state: &State, at_most: Duration) {
        if let Some(socket) = &state.socket {
            remove(socket, fs::remove_file(socket));
        }
        self.undo(state, at_most);
    }

    /// Kills what runs of the pod, but for this process, and waits for the daemon's end.
    /// Returns what it has noted by then, and what is left of [`DEATH_WAIT`].
    fn kill_all(&self) -> (State, Duration) {
        let begin = Instant::now();
        let state = self.load_usable();
        let others = [state.daemon, state.monitor, state.virtiofsd].map(|process| {
            process
                .filter(|process| process.pid != std::process::id())
                .map(Proc::kill)
        });
        if let [Some(daemon), ..] = &others
            && !daemon.is_gone_within(DEATH_WAIT)
        {
            warn!("the shim is killed and not gone");
        }
        let rest = DEATH_WAIT.saturating_sub(begin.elapsed());
        (self.load_usable(), rest)
    }

    fn load_usable(&self) -> State {
        let state = self.load().unwrap_or_else(|error| {
            warn!(error = crate::error::chain(&error), "state unusable");
            None
        });
        state.unwrap_or_default()
    }

    /// Undoes all but the socket; returns whether the monitor is gone.
    fn undo(&self, state: &State, at_most: Duration) -> bool {
        let [monitor, virtiofsd] =
            [state.monitor, state.virtiofsd].map(|process| process.map(Proc::kill));
        let wait = at_most.min(DEATH_WAIT.saturating_add(state.pin_time));
        let monitor_is_gone = monitor.is_none_or(|monitor| monitor.is_gone_within(wait));
        if virtiofsd.is_some_and(|daemon| !daemon.is_gone_within(at_most.min(DEATH_WAIT))) {
            warn!("virtiofsd is killed and not gone");
        }
        let unmounted = unmount_below(&self.path());
        if !monitor_is_gone {
            warn!(
                pid = state.monitor.map(|monitor| monitor.pid),
                path = %self.path().display(),
                "the monitor is killed and not gone; until it is, its devices and its uid are the \
                 pod's"
            );
            return false;
        }
        if let Some(netns) = &state.netns
            && let Err(error) = network::release(netns)
        {
            let (netns, error) = (netns.display(), crate::error::chain(&error));
            warn!(%netns, error, "frames to the pod's interfaces are lost");
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
        true
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
        Self::of_owner(root, owner).is_some_and(|pod| pod.lives())
    }

    /// Cleans up after the pod that a link below `root` names, if nothing of it runs. Its
    /// socket may be that of a start under the same id, which replaces a dead one.
    ///
    /// # Errors
    ///
    /// When the root cannot be locked.
    pub(crate) fn bury(root: &Path, owner: &Path) -> Result<(), RunDirError> {
        let Some(pod) = Self::of_owner(root, owner) else {
            return Ok(());
        };
        if pod.lives() {
            return Ok(());
        }
        let _lock = lock(root)?;
        if !pod.lives() {
            info!(pod = %owner.display(), "nothing of it runs: cleaned up");
            pod.undo(&pod.load_usable(), Duration::ZERO);
        }
        Ok(())
    }

    fn of_owner(root: &Path, owner: &Path) -> Option<Self> {
        let (namespace, id) = owner.parent().zip(owner.file_name())?;
        Self::new(root, namespace.to_str()?, id.to_str()?).ok()
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

fn make_dir(path: &Path) -> Result<(), RunDirError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(io_error("make", path))
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
    use crate::network::tests::Netns;
    use std::os::fd::AsRawFd;
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
        assert!(!b.path().exists(), "nobody else would clean up after it");
    }

    /// A monitor that is not gone, and its pod's directory, in which nothing says so yet.
    fn undying() -> Option<(Undying, tempfile::TempDir, RunDir)> {
        let monitor = Undying::new()?;
        let root = tempfile::tempdir().unwrap();
        let dir = run_dir(root.path(), "pod");
        Some((monitor, root, dir))
    }

    #[test]
    fn a_monitor_that_is_not_gone_keeps_uid_and_devices() {
        let Some((monitor, root, dir)) = undying() else {
            return;
        };
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
        assert!(!dir.path().exists(), "whoever comes next cleans up");
        assert_eq!(other.allocate_uid(1000, 1).unwrap(), 1000);
        dir.cleanup();
        let holder = dir.claims().holder(device[0]).unwrap();
        assert_eq!(holder.as_deref(), Some("default/other"), "not another's");
    }

    #[test]
    fn a_start_waits_for_what_is_left_of_an_earlier_one() {
        let Some((monitor, root, dir)) = undying() else {
            return;
        };
        let socket = root.path().join("socket");
        fs::write(&socket, "").unwrap();
        let state = State {
            monitor: Some(monitor.process),
            socket: Some(socket.clone()),
            pin_time: Duration::from_secs(77),
            ..State::default()
        };
        dir.save(&state).unwrap();
        let refused = dir.renew().unwrap_err().to_string();
        let pid = format!("process {},", monitor.process.pid);
        for part in ["default/pod", pid.as_str(), "77 s"] {
            assert!(refused.contains(part), "{refused}");
        }
        assert_eq!(dir.load().unwrap(), Some(state), "not forgotten");
        drop(monitor);
        dir.renew().unwrap();
        assert_eq!(dir.load().unwrap(), None);
        assert!(dir.shared_root().exists());
        assert!(socket.exists(), "it is the new one's");
    }

    #[test]
    fn memory_to_unpin_has_its_time() {
        let Some((monitor, _root, dir)) = undying() else {
            return;
        };
        let state = State {
            monitor: Some(monitor.process),
            pin_time: Duration::from_secs(1),
            ..State::default()
        };
        dir.save(&state).unwrap();
        let took = |cleanup: &dyn Fn()| {
            let begin = Instant::now();
            cleanup();
            begin.elapsed()
        };
        assert!(took(&|| dir.cleanup_within(Duration::ZERO)) < DEATH_WAIT);
        assert!(took(&|| dir.cleanup()) >= DEATH_WAIT + state.pin_time);
    }

    /// Whatever does not die, `delete` has five seconds.
    #[test]
    fn all_that_is_killed_is_waited_for_at_once() {
        let Some((daemon, _root, dir)) = undying() else {
            return;
        };
        let [monitor, virtiofsd] = [(); 2].map(|()| Undying::new().unwrap());
        let state = State {
            daemon: Some(daemon.process),
            monitor: Some(monitor.process),
            virtiofsd: Some(virtiofsd.process),
            ..State::default()
        };
        dir.save(&state).unwrap();
        for cleanup in [RunDir::cleanup_for_daemon, RunDir::cleanup] {
            let begin = Instant::now();
            cleanup(&dir);
            let took = begin.elapsed();
            assert!(took >= DEATH_WAIT && took < 2 * DEATH_WAIT, "{took:?}");
        }
        drop(monitor);
        dir.cleanup_within(Duration::ZERO);
        assert!(!dir.path().exists(), "the rest keeps nothing of the pod's");
    }

    #[test]
    fn interfaces_are_the_namespace_s_again() {
        let Some((netns, _node)) = Netns::pod_and_node() else {
            return;
        };
        drop(network::prepare(&netns.0, 1).unwrap());
        let root = tempfile::tempdir().unwrap();
        let dir = run_dir(root.path(), "pod");
        let path = format!("/proc/self/fd/{}", netns.0.as_raw_fd());
        let state = State {
            netns: Some(path.into()),
            ..State::default()
        };
        dir.save(&state).unwrap();
        dir.cleanup();
        assert!(!network::look(&netns.0).unwrap().links[0].is_joined);
    }

    #[test]
    fn nothing_is_cleaned_up_after_the_living() {
        let root = tempfile::tempdir().unwrap();
        let owner = Path::new("default/pod");
        let dir = run_dir(root.path(), "pod");
        RunDir::bury(root.path(), owner).unwrap();
        assert!(dir.path().exists(), "it is being started");
        let state = State::of_daemon(std::process::id(), PathBuf::new(), Path::new("/none"));
        dir.save(&state).unwrap();
        RunDir::bury(root.path(), owner).unwrap();
        assert!(dir.path().exists());
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
