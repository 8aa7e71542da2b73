//! Files that are copied: into the guest when the container is created, and
//! for a termination log back when it has ended.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nacre_protocol::agent;

/// Largest file that is copied instead of shared.
pub(super) const MAX_FILE_BYTES: u64 = 1 << 20;
/// What all copied files of a container may have together: they travel in the
/// message that creates it, which has 4 MiB at most (ttrpc).
pub(super) const MAX_FILES_BYTES: u64 = 2 << 20;
/// How much of the end of a termination log the kubelet reads.
pub const MAX_LOG_BYTES: u32 = 4096;

/// A file of the host that gets what the container wrote to its copy.
#[derive(Debug)]
pub struct WriteBack {
    /// The copy, in the guest.
    pub guest_path: String,
    /// Open since the container was created, so that it is the same file then.
    host: File,
}

impl WriteBack {
    /// For the file at `source`, whose copy is `guest_path`.
    pub(super) fn open(source: &Path, guest_path: &str) -> io::Result<Self> {
        let host = File::options()
            .write(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(source)?;
        Ok(Self {
            guest_path: guest_path.to_owned(),
            host,
        })
    }

    /// Writes the end of `contents`, which a guest may have chosen, in place:
    /// somebody may have the file open.
    ///
    /// # Errors
    ///
    /// Those of the host's file system.
    pub fn write(&self, contents: &[u8]) -> io::Result<()> {
        let skipped = contents.len().saturating_sub(MAX_LOG_BYTES as usize);
        let kept = contents.get(skipped..).unwrap_or_default();
        self.host.write_all_at(kept, 0)?;
        self.host.set_len(kept.len() as u64)
    }
}

/// Reads the file at `source` for a copy at `guest_path`.
pub(super) fn read(source: &Path, guest_path: String) -> io::Result<agent::File> {
    let file = File::open(source)?;
    let metadata = file.metadata()?;
    let mut contents = Vec::new();
    // Bounded, in case the file grows while it is read.
    file.take(MAX_FILE_BYTES).read_to_end(&mut contents)?;
    Ok(agent::File {
        path: guest_path,
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        contents,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_back_is_written_in_place_and_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "longer than what comes").unwrap();
        let reader = File::open(&path).unwrap();
        let back = WriteBack::open(&path, "/log").unwrap();

        back.write(b"why").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "why");
        assert_eq!(io::read_to_string(&reader).unwrap(), "why", "the same file");

        let flood: Vec<u8> = (0..10_000_u32).flat_map(u32::to_le_bytes).collect();
        back.write(&flood).unwrap();
        let kept = std::fs::read(&path).unwrap();
        assert_eq!(kept, flood[flood.len() - 4096..]);
    }

    #[test]
    fn a_link_gets_nothing_back() {
        let dir = tempfile::tempdir().unwrap();
        let (link, file) = (dir.path().join("log"), dir.path().join("other"));
        std::fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert!(WriteBack::open(&link, "/log").is_err());
    }
}
