//! mount(2) and what belongs to it.
//!
//! Every function acts in the calling thread's mount namespace.

use std::fs::{DirBuilder, OpenOptions};
use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nacre_protocol::idmap::{IdMaps, map_mount};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::StorageError;

mod overlay;

pub(super) use overlay::overlay;

/// Mount options, split as mount(2) wants them.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Options {
    pub flags: MsFlags,
    pub data: Vec<String>,
}

impl Options {
    /// Splits fstab-style options. `loop` and `X-` options speak to mount(8)
    /// and containerd, not to the kernel.
    pub fn parse(options: &[String]) -> Self {
        let mut parsed = Self {
            flags: MsFlags::empty(),
            data: Vec::new(),
        };
        for option in options {
            match flag(option) {
                Some((flag, true)) => parsed.flags |= flag,
                Some((flag, false)) => parsed.flags &= !flag,
                None if option == "loop" || option.starts_with("X-") => {}
                None => parsed.data.push(option.clone()),
            }
        }
        parsed
    }
}

/// The flag an option stands for, and whether it sets or clears it.
fn flag(option: &str) -> Option<(MsFlags, bool)> {
    Some(match option {
        "defaults" | "async" => (MsFlags::empty(), true),
        "ro" => (MsFlags::MS_RDONLY, true),
        "rw" => (MsFlags::MS_RDONLY, false),
        "nosuid" => (MsFlags::MS_NOSUID, true),
        "suid" => (MsFlags::MS_NOSUID, false),
        "nodev" => (MsFlags::MS_NODEV, true),
        "dev" => (MsFlags::MS_NODEV, false),
        "noexec" => (MsFlags::MS_NOEXEC, true),
        "exec" => (MsFlags::MS_NOEXEC, false),
        "sync" => (MsFlags::MS_SYNCHRONOUS, true),
        "dirsync" => (MsFlags::MS_DIRSYNC, true),
        "noatime" => (MsFlags::MS_NOATIME, true),
        "nodiratime" => (MsFlags::MS_NODIRATIME, true),
        "relatime" => (MsFlags::MS_RELATIME, true),
        "strictatime" => (MsFlags::MS_STRICTATIME, true),
        "bind" => (MsFlags::MS_BIND, true),
        "rbind" => (MsFlags::MS_BIND | MsFlags::MS_REC, true),
        _ => return None,
    })
}

/// Makes a directory and its parents, for root alone.
pub(super) fn make_dir(path: &Path) -> Result<(), StorageError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(StorageError::host("make directory", path))
}

/// Makes an empty file for a bind mount to cover.
pub(super) fn make_file(path: &Path) -> Result<(), StorageError> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map(drop)
        .map_err(StorageError::host("make file", path))
}

/// Bind-mounts `source`, with what is mounted below it, on `target`.
pub(super) fn bind(source: &Path, target: &Path, read_only: bool) -> Result<(), StorageError> {
    share(source, target, read_only, true)
}

/// The same; what the host mounts below `source` later arrives if `receives`.
pub(super) fn share(
    source: &Path,
    target: &Path,
    read_only: bool,
    receives: bool,
) -> Result<(), StorageError> {
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(source), target, None::<&str>, flags, None::<&str>)
        .map_err(io::Error::from)
        .map_err(StorageError::host("bind-mount", source))?;
    confine(target, read_only, receives)
}

/// Has what was just mounted for a guest give nothing to the host, and the guest
/// no more than it may.
pub(super) fn confine(target: &Path, read_only: bool, receives: bool) -> Result<(), StorageError> {
    if receives {
        isolate(target)?;
    } else {
        propagate(target, MsFlags::MS_PRIVATE)?;
    }
    restrict(target, read_only)
}

/// Bind-mounts `source`, with what is mounted below it, on `target`, with its
/// files' owners mapped by a user namespace; `all`: of what is below it, too.
pub(super) fn bind_mapped(
    source: &Path,
    target: &Path,
    users: BorrowedFd<'_>,
    all: bool,
) -> Result<(), StorageError> {
    let bind = || -> io::Result<()> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_RECURSIVE;
        let tree = open_tree(CWD, source, flags)?;
        map_mount(tree.as_fd(), users, all)?;
        let empty_path = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        Ok(move_mount(tree, "", CWD, target, empty_path)?)
    };
    bind().map_err(StorageError::host("map the owners of files in", source))
}

/// A user namespace with these mappings.
pub(super) fn users(maps: &IdMaps, container_id: &str) -> Result<OwnedFd, StorageError> {
    maps.namespace().map_err(|source| StorageError::Users {
        container_id: container_id.into(),
        source,
    })
}

/// Mounts an EROFS image from its file, which Linux 6.12 and later do without a
/// loop device.
pub(super) fn erofs(image: &Path, target: &Path) -> Result<(), StorageError> {
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV;
    mount(Some(image), target, Some("erofs"), flags, None::<&str>)
        .map_err(|errno| match errno {
            nix::Error::ENOTBLK => io::Error::other(
                "the host's kernel mounts EROFS from block devices only (Linux 6.12)",
            ),
            errno => errno.into(),
        })
        .map_err(StorageError::host("mount", image))?;
    isolate(target)
}

/// Lets mounts of the host arrive below `target`, and none of ours go back:
/// unmounting a shared copy would otherwise unmount the original too.
fn isolate(target: &Path) -> Result<(), StorageError> {
    propagate(target, MsFlags::MS_SLAVE)
}

fn propagate(target: &Path, kind: MsFlags) -> Result<(), StorageError> {
    let flags = kind | MsFlags::MS_REC;
    mount(None::<&str>, target, None::<&str>, flags, None::<&str>)
        .map_err(io::Error::from)
        .map_err(StorageError::host("isolate", target))
}

/// Makes `target` and all mounts below it `nodev`, and read-only if asked.
///
/// Recursive on purpose: an OCI `ro` binds the top mount only, but a guest must
/// not write through a nested mount to what a pod was given to read.
fn restrict(target: &Path, read_only: bool) -> Result<(), StorageError> {
    let mut attributes = libc::MOUNT_ATTR_NODEV;
    if read_only {
        attributes |= libc::MOUNT_ATTR_RDONLY;
    }
    set_attributes(target, attributes).map_err(StorageError::host("restrict", target))
}

fn set_attributes(target: &Path, set: u64) -> io::Result<()> {
    let path = std::ffi::CString::new(target.as_os_str().as_bytes())?;
    let attributes = libc::mount_attr {
        attr_set: set,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: mount_setattr(2) reads the path and the structure, whose size is
    // given, and keeps neither.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::AT_RECURSIVE,
            &raw const attributes,
            mem::size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Detaches every mount on or below `dir`, deepest first.
pub(super) fn unmount_below(dir: &Path) -> Result<(), StorageError> {
    let text = mount_table()?;
    for target in mount_points(&text)
        .filter(|point| point.starts_with(dir))
        .collect::<Vec<_>>()
        .iter()
        .rev()
    {
        // Lazily, since the virtio-fs daemon may still have files open.
        match umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            // Gone with a mount above it.
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
            Err(errno) => return Err(StorageError::host("unmount", target)(errno.into())),
        }
    }
    Ok(())
}

/// If something is mounted on `target`: which of its file system's directories.
pub(super) fn mounted_root(target: &Path) -> Result<Option<PathBuf>, StorageError> {
    let text = mount_table()?;
    // The last one covers those before it.
    let roots = mounts(&text).filter(|(_, point)| point == target);
    Ok(roots.map(|(root, _)| root).last())
}

/// The calling thread's namespace's, which need not be the main thread's.
fn mount_table() -> Result<Vec<u8>, StorageError> {
    let table = Path::new("/proc/thread-self/mountinfo");
    std::fs::read(table).map_err(StorageError::host("read", table))
}

/// Mount points of a mountinfo table, in mount order.
fn mount_points(table: &[u8]) -> impl Iterator<Item = PathBuf> + '_ {
    mounts(table).map(|(_, point)| point)
}

/// Roots and mount points of a mountinfo table (proc_pid_mountinfo(5)).
fn mounts(table: &[u8]) -> impl Iterator<Item = (PathBuf, PathBuf)> + '_ {
    let path = |field| PathBuf::from(std::ffi::OsString::from_vec(unescape(field)));
    table.split(|&byte| byte == b'\n').filter_map(move |line| {
        let mut fields = line.split(|&byte| byte == b' ').skip(3);
        Some((path(fields.next()?), path(fields.next()?)))
    })
}

/// Undoes the octal escapes of mountinfo.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let escaped = tail
            .get(..3)
            .filter(|_| first == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        if let Some(byte) = escaped {
            bytes.push(byte);
            rest = tail.get(3..).unwrap_or_default();
        } else {
            bytes.push(first);
            rest = tail;
        }
    }
    bytes
}

/// Removes an empty directory, if it is there.
pub(super) fn remove_dir(path: &Path) -> Result<(), StorageError> {
    ignore_missing(std::fs::remove_dir(path)).map_err(StorageError::host("remove directory", path))
}

/// Removes a directory of placeholders. A directory among them that is not
/// empty is an error and stays: it may be a mount we failed to take off.
pub(super) fn remove_placeholders(dir: &Path) -> Result<(), StorageError> {
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(StorageError::host("list", dir))?,
    };
    for entry in entries {
        let entry = entry.map_err(StorageError::host("list", dir))?;
        let path = entry.path();
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_dir {
            remove_dir(&path)?;
        } else {
            ignore_missing(std::fs::remove_file(&path))
                .map_err(StorageError::host("remove file", &path))?;
        }
    }
    remove_dir(dir)
}

fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(list: &[&str]) -> Vec<String> {
        list.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn options_split_into_flags_and_data() {
        let options = strings(&[
            "index=off",
            "ro",
            "loop",
            "nosuid",
            "X-a=b",
            "lowerdir=/a:/b",
        ]);
        let parsed = Options::parse(&options);
        assert_eq!(parsed.flags, MsFlags::MS_RDONLY | MsFlags::MS_NOSUID);
        assert_eq!(parsed.data, strings(&["index=off", "lowerdir=/a:/b"]));
    }

    #[test]
    fn later_option_wins() {
        assert_eq!(
            Options::parse(&strings(&["ro", "rw"])).flags,
            MsFlags::empty()
        );
    }

    #[test]
    fn mount_points_are_unescaped() {
        let table = b"1 2 0:1 / /a\\040b rw - x y z\n3 1 0:1 / /c rw - x y z\n";
        let points: Vec<_> = mount_points(table).collect();
        assert_eq!(points, [PathBuf::from("/a b"), PathBuf::from("/c")]);
        let roots: Vec<_> = mounts(b"1 2 0:1 /in\\040it /a rw - x y z").collect();
        assert_eq!(roots, [("/in it".into(), "/a".into())]);
    }
}
