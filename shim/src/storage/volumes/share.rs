//! Directories of the host that the guest sees through virtio-fs.
//!
//! A directory is shared once for the pod, however many containers mount it:
//! the guest then has one file system for it, in which one container's unix
//! socket or lock is the other's too. It stays until the pod ends.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use nacre_protocol::guest::SHARED_DIR;
use sha2::{Digest, Sha256};

use crate::storage::{StorageError, host};

/// Below the shared root; no container's id starts with a dot.
const VOLUMES: &str = ".volumes";

/// A directory to be shared.
#[derive(Debug)]
pub(super) struct SharedDir<'a> {
    pub source: &'a Path,
    pub read_only: bool,
    /// Whether what the host mounts below it later is to be seen.
    pub receives_mounts: bool,
}

impl SharedDir<'_> {
    /// Has it in `shared_root`; returns where the guest sees it.
    pub fn share(&self, shared_root: &Path) -> Result<PathBuf, StorageError> {
        // Two containers may be created at once.
        static TURN: Mutex<()> = Mutex::new(());
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);

        let place = Path::new(VOLUMES).join(self.name()?);
        let target = shared_root.join(&place);
        if host::mounted_root(&target)?.is_none() {
            host::make_dir(&target)?;
            let shared = host::share(self.source, &target, self.read_only, self.receives_mounts);
            if shared.is_err() {
                // Half a mount would pass for a whole one the next time.
                host::unmount_below(&target)?;
            }
            shared?;
        }
        Ok(Path::new(SHARED_DIR).join(place))
    }

    /// The same for the same directory in the same way. What is at a path may
    /// change while the pod runs, so its file system and inode count too.
    fn name(&self) -> Result<String, StorageError> {
        let metadata =
            std::fs::metadata(self.source).map_err(StorageError::host("look at", self.source))?;
        let mut hash = Sha256::new();
        hash.update(metadata.dev().to_le_bytes());
        hash.update(metadata.ino().to_le_bytes());
        hash.update([u8::from(self.read_only), u8::from(self.receives_mounts)]);
        hash.update(self.source.as_os_str().as_bytes());
        Ok(super::short_hash(hash))
    }
}
