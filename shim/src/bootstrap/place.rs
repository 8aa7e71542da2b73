//! A daemon's place on the host: its socket and its run directory.
//!
//! ```text
//! containerd ---> start ---> serve: takes its place
//!                   ^          |
//!                   +-- READY--+
//! ```
//! containerd kills a `start` whose caller waits no longer, at any moment, and asks for no
//! `delete` of it. So `start` itself makes nothing. The daemon does, and takes it back if
//! `start` is not there to hear of it; from then on what is there is the pod's, and goes when
//! the pod does.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::BootstrapError;
use crate::rundir::{self, RunDir, State};

/// What a daemon says to `start` when it can be found: by containerd, and by `delete`.
pub(super) const READY: &str = "ready";

/// See the module.
pub(super) struct Place {
    pub(super) run_dir: RunDir,
    pub(super) socket: PathBuf,
    pub(super) bundle: PathBuf,
}

/// What a daemon has in its place.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) listener: UnixListener,
    pub(super) state: State,
    pub(super) log: File,
}

impl Place {
    /// Takes it for this process, and tells `start`; `None` when a live daemon has it.
    ///
    /// # Errors
    ///
    /// Anything on the way; nothing is left then.
    pub(super) fn take(&self, start: &mut impl Write) -> Result<Option<Taken>, BootstrapError> {
        let Some(listener) = claim(&self.socket)? else {
            tell(start)?;
            return Ok(None);
        };
        let (state, log) = self
            .furnish()
            .and_then(|furnished| tell(start).map(|()| furnished))
            .inspect_err(|_| self.leave())?;
        Ok(Some(Taken {
            listener,
            state,
            log,
        }))
    }

    /// Makes the run directory, where a `delete` finds this process.
    fn furnish(&self) -> Result<(State, File), BootstrapError> {
        self.run_dir.renew()?;
        self.run_dir.remember(&self.bundle)?;
        let state = State::of_daemon(std::process::id(), self.bundle.clone(), &self.socket);
        self.run_dir.save(&state)?;
        Ok((state, self.run_dir.open_log()?))
    }

    /// Takes back what a daemon that does not serve has made.
    pub(super) fn leave(&self) {
        // What is not gone by now is an earlier daemon's.
        self.run_dir.cleanup_within(Duration::ZERO);
        rundir::remove(&self.socket, fs::remove_file(&self.socket));
    }
}

fn tell(start: &mut impl Write) -> Result<(), BootstrapError> {
    start
        .write_all(READY.as_bytes())
        .and_then(|()| start.flush())
        .map_err(BootstrapError::io(
            "tell `start`, which may have been killed",
        ))
}

/// Binds the socket; `None` when a live daemon has it. One at a time: between bind(2) and
/// listen(2) a socket looks like a dead daemon's.
fn claim(socket: &Path) -> Result<Option<UnixListener>, BootstrapError> {
    let told = |what: &str| BootstrapError::io(format!("{what} {}", socket.display()));
    let directory = socket.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(directory).map_err(told("make the directory of"))?;
    let _turn = rundir::lock(directory)?;
    match UnixStream::connect(socket) {
        Ok(_) => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            rundir::remove(socket, fs::remove_file(socket));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => (),
        Err(error) => return Err(told("try")(error)),
    }
    UnixListener::bind(socket).map(Some).map_err(told("bind"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rundir::Proc;

    /// A place below `root`.
    fn place(root: &Path) -> Place {
        let bundle = root.join("bundle");
        fs::create_dir_all(&bundle).unwrap();
        Place {
            run_dir: RunDir::new(&root.join("run"), "default", "pod").unwrap(),
            socket: root.join("sockets").join("s"),
            bundle,
        }
    }

    #[test]
    fn a_live_socket_is_found_and_a_dead_one_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep").join("s");
        let first = claim(&path).unwrap().unwrap();
        assert!(claim(&path).unwrap().is_none());
        drop(first);
        assert!(claim(&path).unwrap().is_some());
    }

    #[test]
    fn of_many_at_once_one_gets_the_socket() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        for _ in 0..20 {
            let claims = std::thread::scope(|scope| {
                let threads = [(); 4].map(|()| scope.spawn(|| claim(&path).unwrap()));
                threads.map(|thread| thread.join().unwrap())
            });
            assert_eq!(claims.iter().flatten().count(), 1);
            // They are dead now, and the next ones replace theirs.
        }
    }

    #[test]
    fn start_hears_when_the_daemon_can_be_found() {
        let root = tempfile::tempdir().unwrap();
        let place = place(root.path());
        let (mut first, mut second) = (Vec::new(), Vec::new());
        let taken = place.take(&mut first).unwrap().unwrap();
        let (found, us) = (place.run_dir.load().unwrap(), Proc::of(std::process::id()));
        assert_eq!(found.as_ref(), Some(&taken.state));
        assert_eq!(
            (taken.state.daemon, taken.state.bundle),
            (us, place.bundle.clone())
        );
        assert!(place.take(&mut second).unwrap().is_none(), "it has one");
        assert_eq!(
            (first.as_slice(), second.as_slice()),
            (READY.as_bytes(), READY.as_bytes())
        );
        assert!(place.socket.exists());
        UnixStream::connect(&place.socket).unwrap();
        drop(taken.listener);
    }

    #[test]
    fn nothing_is_left_when_start_was_killed() {
        let root = tempfile::tempdir().unwrap();
        let place = place(root.path());
        let (reader, mut start) = io::pipe().unwrap();
        drop(reader);
        let error = place.take(&mut start).unwrap_err();
        let text = crate::error::chain(&error);
        assert!(text.starts_with("tell `start`"), "{text}");
        assert!(!place.socket.exists());
        assert!(!place.run_dir.path().exists());
        // containerd has removed the bundle. The same pod may be started again.
        fs::remove_dir_all(&place.bundle).unwrap();
        fs::create_dir(&place.bundle).unwrap();
        place.take(&mut io::sink()).unwrap().unwrap();
    }

    #[test]
    fn nothing_is_left_of_a_place_that_cannot_be_furnished() {
        let root = tempfile::tempdir().unwrap();
        let mut place = place(root.path());
        place.bundle = root.path().join("none");
        let mut start = Vec::new();
        let error = place.take(&mut start).unwrap_err();
        let text = crate::error::chain(&error);
        assert!(text.contains("none/nacre-run-dir"), "{text}");
        assert!(start.is_empty());
        assert!(!place.socket.exists());
        assert!(!place.run_dir.path().exists());
    }
}
