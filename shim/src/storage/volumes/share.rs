//! Directories of the host that the guest sees through virtio-fs.
//!
//! A directory is shared once for the pod, however many containers mount it:
//! the guest then has one file system for it, in which one container's unix
//! socket or lock is the other's too. It stays until the pod ends.

use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use nacre_protocol::guest::SHARED_DIR;
use nacre_protocol::idmap::IdMaps;
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
    /// Whose its files are to be.
    pub maps: Option<&'a IdMaps>,
    /// Whether that goes for what is mounted below it, too.
    pub map_all: bool,
}

impl SharedDir<'_> {
    /// Has it in `shared_root` for a container; returns where the guest sees it.
    pub fn share(&self, shared_root: &Path, container_id: &str) -> Result<PathBuf, StorageError> {
        // Two containers may be created at once.
        static TURN: Mutex<()> = Mutex::new(());
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);

        let place = Path::new(VOLUMES).join(self.name()?);
        let target = shared_root.join(&place);
        if host::mounted_root(&target)?.is_none() {
            host::make_dir(&target)?;
            let shared = self.mount(&target, container_id);
            if shared.is_err() {
                // Half a mount would pass for a whole one the next time.
                host::unmount_below(&target)?;
            }
            shared?;
        }
        Ok(Path::new(SHARED_DIR).join(place))
    }

    fn mount(&self, target: &Path, container_id: &str) -> Result<(), StorageError> {
        let Some(maps) = self.maps else {
            return host::share(self.source, target, self.read_only, self.receives_mounts);
        };
        let users = host::users(maps, container_id)?;
        host::bind_mapped(self.source, target, users.as_fd(), self.map_all)?;
        host::confine(target, self.read_only, self.receives_mounts)
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
        let maps = self
            .maps
            .into_iter()
            .flat_map(|maps| [&maps.uids, &maps.gids]);
        for list in maps {
            hash.update([u8::from(self.map_all), 1]);
            for map in list {
                for number in [map.container_id(), map.host_id(), map.size()] {
                    hash.update(number.to_le_bytes());
                }
            }
        }
        hash.update(self.source.as_os_str().as_bytes());
        Ok(super::short_hash(hash))
    }
}
