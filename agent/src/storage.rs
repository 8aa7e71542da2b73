//! What a container brings along: mounts and small files, all below
//! `CONTAINERS_DIR/<container id>`.

use std::fs;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Component, Path, PathBuf};

use nacre_protocol::agent::{File, Storage};
use nacre_protocol::guest::CONTAINERS_DIR;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::disk::DiskRef;
use crate::engine::sys;
use crate::error::{Context, Error, Result};
use crate::mount::{MountOptions, detached};

/// The container's directory.
///
/// # Errors
///
/// `InvalidArgument` for an id that is no plain file name.
pub fn container_dir(container_id: &str) -> Result<PathBuf> {
    check_id(container_id)?;
    Ok(Path::new(CONTAINERS_DIR).join(container_id))
}

/// Ids become file names.
///
/// # Errors
///
/// `InvalidArgument` for one that cannot.
pub fn check_id(id: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '+');
    if id.is_empty() || id.len() > 255 || id.starts_with('.') || !id.chars().all(plain) {
        return Err(Error::InvalidArgument(format!("id {id:?}")));
    }
    Ok(())
}

/// Checks that `path` lies below `dir` as it is written.
pub(crate) fn below<'a>(dir: &Path, path: &'a str) -> Result<&'a Path> {
    let path_ref = Path::new(path);
    let plain = path_ref
        .strip_prefix(dir)
        .is_ok_and(|rest| rest.components().all(|c| matches!(c, Component::Normal(_))));
    if plain {
        Ok(path_ref)
    } else {
        Err(Error::InvalidArgument(format!(
            "{path:?} is not below {}",
            dir.display()
        )))
    }
}

/// Makes one mount, waiting for its disk.
///
/// # Errors
///
/// `InvalidArgument` for a target elsewhere, `NotFound` for a disk that does
/// not appear, `Io` for what mount(2) says.
pub async fn mount_storage(dir: &Path, storage: Storage) -> Result<()> {
    let target = below(dir, &storage.target)?.to_owned();
    let source = match DiskRef::parse(&storage.source)? {
        Some(disk) => disk.wait().await?,
        None => PathBuf::from(&storage.source),
    };
    // A mount may wait for a disk or for the share's other end.
    tokio::task::spawn_blocking(move || mount_at(&source, &target, &storage))
        .await
        .map_err(|error| Error::Internal(error.to_string()))?
}

fn mount_at(source: &Path, target: &Path, storage: &Storage) -> Result<()> {
    let what = || format!("mount {} on {}", storage.source, storage.target);
    let options = MountOptions::parse(&storage.options);
    let is_file_bind = options.bind && source.is_file();
    make_target(target, is_file_bind).with_context(what)?;
    if storage.fstype == "overlay" {
        for key in ["upperdir", "workdir"] {
            if let Some(path) = options.data_value(key) {
                fs::create_dir_all(path).with_context(|| format!("create {path}"))?;
            }
        }
        let overlay = detached("overlay", "overlay", &options).with_context(what)?;
        sys::attach_mount(overlay.as_fd(), target).with_context(what)?;
        return propagate(target, &options).with_context(what);
    }
    if !options.bind {
        let data = Some(options.data.as_str()).filter(|data| !data.is_empty());
        let fstype = Some(storage.fstype.as_str());
        mount(Some(source), target, fstype, options.flags, data).with_context(what)?;
        return propagate(target, &options).with_context(what);
    }
    let mut flags = MsFlags::MS_BIND;
    flags.set(MsFlags::MS_REC, options.recursive);
    mount(Some(source), target, NONE, flags, NONE).with_context(what)?;
    if !options.flags.is_empty() {
        // Flags of a bind mount take effect in a second step (mount(2)).
        let flags = options.flags | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
        mount(NONE, target, NONE, flags, NONE).with_context(what)?;
    }
    propagate(target, &options).with_context(what)
}

const NONE: Option<&str> = None;

fn propagate(target: &Path, options: &MountOptions) -> io::Result<()> {
    let Some((mut flags, tree)) = options.propagation else {
        return Ok(());
    };
    flags.set(MsFlags::MS_REC, tree);
    Ok(mount(NONE, target, NONE, flags, NONE)?)
}

fn make_target(target: &Path, is_file: bool) -> io::Result<()> {
    if !is_file {
        return fs::create_dir_all(target);
    }
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::File::options()
        .create(true)
        .append(true)
        .open(target)
        .map(drop)
}

/// Writes one file, with its directories.
///
/// # Errors
///
/// `InvalidArgument` for a path elsewhere, else `Io`.
pub fn write_file(dir: &Path, file: &File) -> Result<()> {
    let path = below(dir, &file.path)?;
    let write = || -> io::Result<()> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let mut out = fs::File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)?;
        out.write_all(&file.contents)?;
        fchown(&out, Some(file.uid), Some(file.gid))?;
        // After the change of owner, which drops set-id bits.
        out.set_permissions(fs::Permissions::from_mode(file.mode & 0o7777))
    };
    write().with_context(|| format!("write {}", file.path))
}

/// Unmounts everything below `dir` and removes it.
///
/// # Errors
///
/// `Internal` if something stays mounted (then nothing is removed), else `Io`.
pub fn remove(dir: &Path) -> Result<()> {
    for target in mounts_below(dir)?.iter().rev() {
        let result = match umount2(target, MntFlags::UMOUNT_NOFOLLOW) {
            // Still in use, by a mount namespace that outlives the container:
            // gone for us, and for good when that is.
            Err(Errno::EBUSY) => {
                tracing::warn!("{} is busy, detaching it", target.display());
                umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
            }
            result => result,
        };
        result.with_context(|| format!("unmount {}", target.display()))?;
    }
    if let Some(left) = mounts_below(dir)?.first() {
        return Err(Error::Internal(format!(
            "{} is still mounted",
            left.display()
        )));
    }
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

fn mounts_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("read mountinfo")?;
    Ok(points_below(&text, dir))
}

/// Mount points of mountinfo (proc(5)) at or below `dir`, parents first.
fn points_below(mountinfo: &str, dir: &Path) -> Vec<PathBuf> {
    mountinfo
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|field| PathBuf::from(unescape(field)))
        .filter(|point| point.starts_with(dir))
        .collect()
}

/// Undoes the octal escapes of space, tab, newline and backslash.
fn unescape(field: &str) -> String {
    [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ]
    .iter()
    .fold(field.to_owned(), |text, (from, to)| text.replace(from, to))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_file_names() {
        for good in ["a", "0123456789abcdef", "my-pod_1.x"] {
            assert!(check_id(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", ".hidden", "a b", "é"] {
            assert!(check_id(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn targets_stay_in_the_container_directory() {
        let dir = container_dir("c1").unwrap();
        let inside = format!("{}/rootfs", dir.display());
        assert!(below(&dir, &inside).is_ok());
        for outside in ["/etc", "rootfs", &format!("{}/../c2", dir.display())] {
            assert!(below(&dir, outside).is_err(), "{outside}");
        }
    }

    #[test]
    fn mounts_of_the_container_only() {
        let mountinfo = "\
1 0 0:1 / / rw - rootfs rootfs rw
2 1 0:2 / /run/nacre/containers/c1/rootfs rw - overlay overlay rw
3 2 0:3 / /run/nacre/containers/c1/rootfs/a\\040b rw - tmpfs tmpfs rw
4 1 0:4 / /run/nacre/containers/c10/rootfs rw - overlay overlay rw
";
        assert_eq!(
            points_below(mountinfo, &container_dir("c1").unwrap()),
            [
                PathBuf::from("/run/nacre/containers/c1/rootfs"),
                PathBuf::from("/run/nacre/containers/c1/rootfs/a b"),
            ]
        );
    }

    #[test]
    fn files_get_their_mode() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("files/etc/hosts");
        let metadata = fs::metadata(dir.path()).unwrap();
        let file = File {
            path: path.to_str().unwrap().into(),
            mode: 0o640,
            uid: std::os::unix::fs::MetadataExt::uid(&metadata),
            gid: std::os::unix::fs::MetadataExt::gid(&metadata),
            contents: b"127.0.0.1 localhost\n".to_vec(),
            ..File::default()
        };
        write_file(dir.path(), &file).unwrap();
        assert_eq!(fs::read(&path).unwrap(), file.contents);
        let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode, 0o640);
    }
}
