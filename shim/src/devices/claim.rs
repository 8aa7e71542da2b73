//! Which pod has which device: a link for each device, in a directory beside
//! the pods' own (see [`crate::rundir`]).
//!
//! ```text
//! <run_dir>/.devices/0000:01:00.0 -> <namespace>/<sandbox id>
//! ```
//! A link is made whole or not at all, and all of one pod's under the directory's
//! lock. It counts as long as the pod lives: its shim or its monitor, which may be killed
//! long before it is gone. So a claim that nobody came to release, after the shim was
//! killed, holds nobody up: whoever wants the device cleans up after the dead pod.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

use tracing::warn;

use super::Address;
use crate::rundir::{RunDir, RunDirError, io_error, lock, remove};

/// Not a possible namespace: those start with a letter or digit.
const DIRECTORY: &str = ".devices";

/// Errors of claims.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Another pod has the device.
    #[error(
        "{} {address} is pod {holder}'s, which runs; a device is for one pod at a time",
        address.kind()
    )]
    Held {
        /// Which.
        address: Address,
        /// Namespace and id of the other pod.
        holder: String,
    },
    /// The directory failed.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
}

/// The claims of all pods of a host.
#[derive(Debug)]
pub struct Claims {
    root: PathBuf,
}

impl Claims {
    /// Those of the pods below the run directory `root`; touches nothing.
    pub fn of(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// Makes devices `pod`'s: all of them or, if another living pod has one, none.
    ///
    /// # Errors
    ///
    /// `Held`; a directory that cannot be used.
    pub fn claim(&self, pod: &RunDir, devices: &[Address]) -> Result<(), ClaimError> {
        let dir = self.dir();
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(io_error("make", &dir))?;
        let owner = pod.owner();
        // Before the lock, which that takes as well.
        for &address in devices {
            if let Some(other) = self.owner(address)?.filter(|other| *other != owner) {
                RunDir::bury(&self.root, &other)?;
            }
        }
        let _lock = lock(&dir)?;
        for &address in devices {
            match self.owner(address)? {
                Some(other) if other != owner && self.lives(&other) => {
                    let holder = other.display().to_string();
                    return Err(ClaimError::Held { address, holder });
                }
                _ => (),
            }
        }
        let mut made = Vec::new();
        for &address in devices {
            if self.owner(address)?.as_ref() == Some(&owner) {
                continue;
            }
            if let Err(error) = replace(&self.link(address), &owner) {
                made.iter().for_each(|address| self.free(*address));
                return Err(error.into());
            }
            made.push(address);
        }
        Ok(())
    }

    /// Frees all of `pod`'s devices. Goes on after failures, which it logs.
    pub fn release(&self, pod: &RunDir) {
        let dir = self.dir();
        if !dir.exists() {
            return;
        }
        if let Err(error) = lock(&dir).and_then(|_lock| self.release_locked(&pod.owner())) {
            warn!(error = crate::error::chain(&error), "claims stay");
        }
    }

    /// Frees some of `pod`'s devices. Goes on after failures, which it logs.
    pub fn give_back(&self, pod: &RunDir, devices: &[Address]) {
        let freed = lock(&self.dir()).and_then(|_lock| {
            for &address in devices {
                if self.owner(address)? == Some(pod.owner()) {
                    self.free(address);
                }
            }
            Ok(())
        });
        if let Err(error) = freed {
            warn!(error = crate::error::chain(&error), "claims stay");
        }
    }

    /// The living pod that has a device, as namespace and id.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read.
    pub fn holder(&self, address: Address) -> Result<Option<String>, RunDirError> {
        let owner = self.owner(address)?.filter(|owner| self.lives(owner));
        Ok(owner.map(|owner| owner.display().to_string()))
    }

    /// All devices that are some pod's, by the pod as namespace and id.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read.
    pub fn by_pod(&self) -> Result<BTreeMap<String, Vec<Address>>, RunDirError> {
        let mut claims: BTreeMap<String, Vec<Address>> = BTreeMap::new();
        for address in self.claimed()? {
            if let Some(owner) = self.owner(address)? {
                let devices = claims.entry(owner.display().to_string()).or_default();
                devices.push(address);
            }
        }
        Ok(claims)
    }

    fn dir(&self) -> PathBuf {
        self.root.join(DIRECTORY)
    }

    fn link(&self, address: Address) -> PathBuf {
        self.dir().join(address.to_string())
    }

    fn owner(&self, address: Address) -> Result<Option<PathBuf>, RunDirError> {
        let link = self.link(address);
        match fs::read_link(&link) {
            Ok(owner) => Ok(Some(owner)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io_error("read", &link)(error)),
        }
    }

    /// By address.
    fn claimed(&self) -> Result<Vec<Address>, RunDirError> {
        let dir = self.dir();
        let entries = match fs::read_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(io_error("read", &dir))?,
        };
        let mut claimed = Vec::new();
        for entry in entries {
            let name = entry.map_err(io_error("read", &dir))?.file_name();
            claimed.extend(name.to_str().and_then(|name| name.parse::<Address>().ok()));
        }
        claimed.sort();
        Ok(claimed)
    }

    fn release_locked(&self, owner: &Path) -> Result<(), RunDirError> {
        for address in self.claimed()? {
            if self.owner(address)?.as_deref() == Some(owner) {
                self.free(address);
            }
        }
        Ok(())
    }

    fn free(&self, address: Address) {
        let link = self.link(address);
        remove(&link, fs::remove_file(&link));
    }

    fn lives(&self, owner: &Path) -> bool {
        RunDir::owner_lives(&self.root, owner)
    }
}

fn replace(link: &Path, owner: &Path) -> Result<(), RunDirError> {
    match fs::remove_file(link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => symlink(owner, link),
    }
    .map_err(io_error("claim", link))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::devices::testing::address;
    use crate::rundir::{Proc, State};
    use std::process::Command;

    /// A pod whose shim is this process.
    pub(in crate::devices) fn living_pod(root: &Path, id: &str) -> RunDir {
        pod(root, id, Proc::of(std::process::id()))
    }

    fn pod(root: &Path, id: &str, daemon: Option<Proc>) -> RunDir {
        let dir = RunDir::new(root, "default", id).unwrap();
        dir.create().unwrap();
        let state = State {
            daemon,
            ..State::default()
        };
        dir.save(&state).unwrap();
        dir
    }

    fn dead() -> Option<Proc> {
        let mut child = Command::new("true").spawn().unwrap();
        let process = Proc::of(child.id());
        child.wait().unwrap();
        process
    }

    #[test]
    fn one_pod_at_a_time_has_a_device() {
        let root = tempfile::tempdir().unwrap();
        let (a, b) = (living_pod(root.path(), "a"), living_pod(root.path(), "b"));
        let claims = Claims::of(root.path());
        let [first, second] = ["01:00.0", "02:00.0"].map(address);
        claims.claim(&a, &[first]).unwrap();
        claims.claim(&a, &[first]).unwrap();
        let error = claims.claim(&b, &[second, first]).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("0000:01:00.0 is pod default/a's"), "{text}");
        // All or nothing.
        assert_eq!(claims.holder(second).unwrap(), None);
        assert_eq!(claims.holder(first).unwrap().as_deref(), Some("default/a"));

        // Only one's own can be given back.
        claims.give_back(&b, &[first]);
        assert!(claims.holder(first).unwrap().is_some());
        claims.claim(&a, &[second]).unwrap();
        claims.give_back(&a, &[first]);
        assert_eq!(claims.holder(first).unwrap(), None);
        assert!(claims.holder(second).unwrap().is_some());

        claims.release(&a);
        claims.release(&a);
        claims.claim(&b, &[second, first]).unwrap();
        let devices = &claims.by_pod().unwrap()["default/b"];
        assert_eq!(devices, &[first, second]);
    }

    #[test]
    fn a_dead_pod_s_claim_is_taken_over() {
        let root = tempfile::tempdir().unwrap();
        let claims = Claims::of(root.path());
        let device = address("01:00.0");
        let heir = living_pod(root.path(), "heir");
        claims
            .claim(&pod(root.path(), "dead", dead()), &[device])
            .unwrap();
        assert_eq!(claims.holder(device).unwrap(), None);
        claims.claim(&heir, &[device]).unwrap();
        assert_eq!(
            claims.holder(device).unwrap().as_deref(),
            Some("default/heir")
        );
        assert!(!root.path().join("default/dead").exists());

        // One that left nothing else.
        claims.release(&heir);
        let gone = living_pod(root.path(), "gone");
        claims.claim(&gone, &[device]).unwrap();
        fs::remove_dir_all(gone.path()).unwrap();
        claims.claim(&heir, &[device]).unwrap();
    }

    /// A monitor may outlive a killed shim for a moment, and has the device until then.
    #[test]
    fn a_monitor_alone_keeps_its_devices() {
        let root = tempfile::tempdir().unwrap();
        let claims = Claims::of(root.path());
        let device = address("01:00.0");
        let orphan = pod(root.path(), "orphan", dead());
        let state = State {
            monitor: Proc::of(std::process::id()),
            ..orphan.load().unwrap().unwrap()
        };
        orphan.save(&state).unwrap();
        claims.claim(&orphan, &[device]).unwrap();
        let other = living_pod(root.path(), "other");
        assert!(matches!(
            claims.claim(&other, &[device]),
            Err(ClaimError::Held { .. })
        ));
    }

    /// What `delete` does after a killed shim.
    #[test]
    fn cleanup_from_disk_alone_frees_the_devices() {
        let root = tempfile::tempdir().unwrap();
        let claims = Claims::of(root.path());
        let (mine, others) = (address("01:00.0"), address("02:00.0"));
        let dir = pod(root.path(), "mine", dead());
        claims.claim(&dir, &[mine]).unwrap();
        claims
            .claim(&living_pod(root.path(), "other"), &[others])
            .unwrap();
        let again = RunDir::new(root.path(), "default", "mine").unwrap();
        again.cleanup();
        assert!(fs::read_link(claims.link(mine)).is_err());
        assert_eq!(
            claims.holder(others).unwrap().as_deref(),
            Some("default/other")
        );
    }
}
