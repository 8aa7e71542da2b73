//! Volumes: directories that containers of the sandbox share, at
//! `VOLUMES_DIR/<name>`, for as long as the sandbox lives.
//!
//! ```text
//!   tmpfs        a mount, written by containers       emptyDir in memory, /dev/shm
//!   hugetlbfs    the same                             emptyDir of huge pages
//!   directory    files on the guest's /run, written   ConfigMap, Secret, projected,
//!                by the agent, see `directory.rs`     downward API
//! ```
//!
//! Containers get them by bind mounts. What a container may write to, it may
//! fill with symbolic links; the agent, whose root they would lead through,
//! follows none ([`bind_subpath`]).

mod directory;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, fchown};
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use nacre_protocol::agent::{DirectoryVolume, Subpath, TmpfsVolume};
use nacre_protocol::guest::{SHARED_DIR, VOLUMES_DIR};
use nix::mount::{MsFlags, mount};
use oci_spec::runtime::Spec;
use rustix::fs::{Mode, OFlags, ResolveFlags, fchmod, mkdirat, openat2};

use crate::engine::sys;
use crate::error::{Context, Error, Result};
use crate::storage::{below, check_id};

/// What [`read_end`] returns at most, whatever it is asked for.
const MAX_READ_BYTES: u64 = 1 << 20;

/// The sandbox's volumes. Its methods block.
#[derive(Debug, Default)]
pub struct Volumes {
    made: Mutex<Made>,
}

#[derive(Debug, Default)]
struct Made {
    tmpfs: HashSet<String>,
    /// The generation each directory shows.
    directories: HashMap<String, u64>,
}

impl Volumes {
    /// Makes a tmpfs or a hugetlbfs, unless it is there.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` for a bad name, else those of mount(2).
    pub fn make_tmpfs(&self, volume: &TmpfsVolume) -> Result<()> {
        let target = volume_dir(&volume.name)?;
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if made.tmpfs.contains(&volume.name) {
            return Ok(());
        }
        let (kind, data) = memory_options(volume);
        let what = || format!("mount a {kind} on {}", target.display());
        fs::create_dir_all(&target).with_context(what)?;
        mount(
            Some(kind),
            &target,
            Some(kind),
            MsFlags::MS_NODEV,
            Some(data.as_str()),
        )
        .with_context(what)?;
        made.tmpfs.insert(volume.name.clone());
        Ok(())
    }

    /// Makes a directory, or has it show new contents.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` for names that would lead elsewhere, else `Io`; who
    /// reads through `..data` sees what was there before.
    pub fn put_directory(&self, volume: &DirectoryVolume) -> Result<()> {
        let path = volume_dir(&volume.name)?;
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let shown = made.directories.get(&volume.name);
        if shown.is_some_and(|shown| *shown >= volume.generation) {
            return Ok(());
        }
        directory::put(&path, volume)?;
        let name = volume.name.clone();
        made.directories.insert(name, volume.generation);
        Ok(())
    }
}

/// Type and data for mount(2).
fn memory_options(volume: &TmpfsVolume) -> (&'static str, String) {
    let mode = volume.mode & 0o7777;
    let mut data = format!("mode={mode:o},uid={},gid={}", volume.uid, volume.gid);
    if volume.size_bytes != 0 {
        data += &format!(",size={}", volume.size_bytes);
    }
    if volume.page_bytes == 0 {
        return ("tmpfs", data);
    }
    data += &format!(",pagesize={}", volume.page_bytes);
    ("hugetlbfs", data)
}

fn volume_dir(name: &str) -> Result<PathBuf> {
    check_id(name)?;
    Ok(Path::new(VOLUMES_DIR).join(name))
}

/// No way out of the directory: no `..`, no symbolic link.
const CONFINED: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS);

/// The names in a path that goes down only; the empty path has none.
fn components(path: &str) -> Result<Vec<&str>> {
    Path::new(path)
        .components()
        .map(|component| match component {
            Component::Normal(name) => name.to_str(),
            _ => None,
        })
        .collect::<Option<_>>()
        .ok_or_else(|| Error::InvalidArgument(format!("path {path:?} of a volume")))
}

fn open_dir(dir: impl AsFd, name: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(openat2(dir, name, flags, Mode::empty(), CONFINED)?)
}

fn open_root(path: &Path) -> io::Result<OwnedFd> {
    fs::File::options()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
        .open(path)
        .map(OwnedFd::from)
}

/// Owner first: a change of it drops set-id bits.
fn own(file: BorrowedFd<'_>, uid: u32, gid: u32, mode: u32) -> io::Result<()> {
    fchown(file, Some(uid), Some(gid))?;
    Ok(fchmod(file, Mode::from_raw_mode(mode & 0o7777))?)
}

/// Binds a directory of a volume to a place below `container_dir`.
///
/// # Errors
///
/// `InvalidArgument` for paths that lead elsewhere, symbolic links included.
pub fn bind_subpath(container_dir: &Path, subpath: &Subpath) -> Result<()> {
    let target = below(container_dir, &subpath.target)?;
    let volume = volume_dir(&subpath.volume)?;
    let names = components(&subpath.path)?;
    let what = || format!("bind {} of volume {}", subpath.path, subpath.volume);
    let mut dir = open_root(&volume).with_context(what)?;
    let root = fs::metadata(&volume).with_context(what)?;
    for name in names {
        dir = match enter(&dir, name, &root) {
            Err(error) if error.raw_os_error() == Some(libc::ELOOP) => {
                let link = format!("{}: {name:?} is a symbolic link", what());
                return Err(Error::InvalidArgument(link));
            }
            entered => entered.with_context(what)?,
        };
    }
    fs::create_dir_all(target).with_context(what)?;
    // The descriptor's own link is followed, and ends at the directory.
    let source = format!("/proc/self/fd/{}", dir.as_raw_fd());
    let tree = sys::clone_mount(Path::new(&source), false).with_context(what)?;
    sys::attach_mount(tree.as_fd(), target).with_context(what)
}

/// Opens a directory in another, making it if need be.
fn enter(dir: &OwnedFd, name: &str, like: &fs::Metadata) -> io::Result<OwnedFd> {
    match open_dir(dir, name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            mkdirat(dir, name, Mode::RWXU)?;
            let made = open_dir(dir, name)?;
            own(made.as_fd(), like.uid(), like.gid(), like.mode())?;
            Ok(made)
        }
        opened => opened,
    }
}

/// Looks into the shared directories a container will mount.
///
/// Each is a file system of its own in the share, which the kernel mounts for
/// who enters it first, in that one's mount namespace. So that is the agent:
/// what containers mount is then the same file system in all of them, and a
/// unix socket or a lock in it is the same to all of them.
///
/// # Errors
///
/// `Io` for a directory that cannot be opened.
pub fn enter_shared(spec: &Spec) -> Result<()> {
    for mount in spec.mounts().iter().flatten() {
        let source = mount
            .source()
            .iter()
            .find(|path| path.starts_with(SHARED_DIR));
        let Some(source) = source else { continue };
        let opened = fs::File::options()
            .read(true)
            .custom_flags(libc::O_DIRECTORY)
            .open(source);
        match opened {
            Err(error) if error.raw_os_error() == Some(libc::ENOTDIR) => {}
            opened => drop(opened.with_context(|| format!("open {}", source.display()))?),
        }
    }
    Ok(())
}

/// The last `max_bytes` of a regular file below `container_dir`.
///
/// # Errors
///
/// `InvalidArgument` for a path elsewhere or another kind of file, else `Io`.
pub fn read_end(container_dir: &Path, path: &str, max_bytes: u32) -> Result<Vec<u8>> {
    let file = below(container_dir, path)?;
    let what = || format!("read {path}");
    let mut file = fs::File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(file)
        .with_context(what)?;
    let metadata = file.metadata().with_context(what)?;
    if !metadata.is_file() {
        return Err(Error::InvalidArgument(format!("{path} is not a file")));
    }
    let max = u64::from(max_bytes).min(MAX_READ_BYTES);
    let skipped = metadata.len().saturating_sub(max);
    file.seek(SeekFrom::Start(skipped)).with_context(what)?;
    let mut contents = Vec::new();
    file.take(max)
        .read_to_end(&mut contents)
        .with_context(what)?;
    Ok(contents)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_file_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let name = path.to_str().unwrap();
        fs::write(&path, "0123456789").unwrap();
        assert_eq!(read_end(dir.path(), name, 4).unwrap(), b"6789");
        assert_eq!(read_end(dir.path(), name, 100).unwrap(), b"0123456789");

        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        for other in [link, dir.path().join("nowhere"), dir.path().to_owned()] {
            assert!(read_end(dir.path(), other.to_str().unwrap(), 4).is_err());
        }
    }

    #[test]
    fn memory_has_the_options_of_its_kind() {
        let mut volume = TmpfsVolume {
            size_bytes: 4 << 20,
            mode: 0o2770,
            gid: 7,
            ..TmpfsVolume::default()
        };
        let tmpfs = "mode=2770,uid=0,gid=7,size=4194304".to_owned();
        assert_eq!(memory_options(&volume), ("tmpfs", tmpfs));
        (volume.size_bytes, volume.page_bytes) = (0, 2 << 20);
        let huge = "mode=2770,uid=0,gid=7,pagesize=2097152".to_owned();
        assert_eq!(memory_options(&volume), ("hugetlbfs", huge));
    }

    #[test]
    fn paths_of_volumes_go_down() {
        assert_eq!(components("a/b").unwrap(), ["a", "b"]);
        assert!(components("").unwrap().is_empty());
        for bad in ["/a", "../a", "a/../../b"] {
            assert!(components(bad).is_err(), "{bad}");
        }
    }
}
