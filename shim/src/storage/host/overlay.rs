//! Overlays of any number of layers.
//!
//! mount(2) takes its options in one page, and the paths of some fifty of
//! containerd's layers fill it. Relative to the directory that they have in common
//! a few hundred fit. What is more goes in one at a time, which takes Linux 6.8.

use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::statvfs::{FsFlags, statvfs};
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};

use super::{Options, isolate};
use crate::storage::StorageError;

/// mount(2) takes its data in one page, the terminating zero included.
const MAX_DATA_BYTES: usize = 4095;

/// Mounts an overlay on `target`.
pub fn overlay(target: &Path, options: &Options) -> Result<(), StorageError> {
    let flags = options.flags | MsFlags::MS_NODEV;
    let data = options.data.join(",");
    let result = if data.len() <= MAX_DATA_BYTES {
        mount_with(target, flags, &data).map_err(io::Error::from)
    } else {
        match shorten_layers(&options.data) {
            Some((parent, data)) if data.len() <= MAX_DATA_BYTES => {
                mount_from(&parent, target, flags, &data)
            }
            _ => mount_one_by_one(target, flags, &options.data),
        }
    };
    result
        .and_then(|()| check_writable(target, options))
        .map_err(StorageError::host("mount an overlay on", target))?;
    isolate(target)
}

/// Linux mounts an overlay for reading only if it cannot make anything in its work directory,
/// and tells nobody but its log (fs/overlayfs/super.c, `ovl_workdir_create`).
fn check_writable(target: &Path, options: &Options) -> io::Result<()> {
    let mut upper = options.data.iter();
    let upper = upper.find_map(|option| option.strip_prefix("upperdir="));
    let Some(upper) = upper.filter(|_| !options.flags.contains(MsFlags::MS_RDONLY)) else {
        return Ok(());
    };
    if statvfs(target)?.flags().contains(FsFlags::ST_RDONLY) {
        let text = format!("{upper} cannot be written: is its disk full?");
        return Err(io::Error::other(text));
    }
    Ok(())
}

fn mount_with(target: &Path, flags: MsFlags, data: &str) -> Result<(), Errno> {
    mount(Some("overlay"), target, Some("overlay"), flags, Some(data))
}

/// Mounts an overlay whose layers are relative to `parent`. The working directory
/// is a thread's own only after unshare(2), hence the thread.
fn mount_from(parent: &Path, target: &Path, flags: MsFlags, data: &str) -> io::Result<()> {
    std::thread::scope(|scope| {
        let inside = || {
            unshare(CloneFlags::CLONE_FS)?;
            nix::unistd::chdir(parent)?;
            mount_with(target, flags, data)
        };
        let worker = std::thread::Builder::new().spawn_scoped(scope, inside)?;
        match worker.join() {
            Ok(result) => result.map_err(io::Error::from),
            Err(_) => Err(io::Error::other("mount thread panicked")),
        }
    })
}

/// The layers' common parent, and the data with layer paths relative to it.
fn shorten_layers(data: &[String]) -> Option<(PathBuf, String)> {
    let lower = data.iter().find_map(|o| o.strip_prefix("lowerdir="))?;
    let layers: Vec<&Path> = lower.split(':').map(Path::new).collect();
    let mut parent = layers.first()?.parent()?;
    while !layers.iter().all(|layer| layer.starts_with(parent)) {
        parent = parent.parent()?;
    }
    let mut relative = Vec::new();
    for layer in &layers {
        relative.push(layer.strip_prefix(parent).ok()?.to_str()?);
    }
    let options: Vec<String> = data
        .iter()
        .map(|option| match option.strip_prefix("lowerdir=") {
            Some(_) => format!("lowerdir={}", relative.join(":")),
            None => option.clone(),
        })
        .collect();
    Some((parent.into(), options.join(",")))
}

/// Gives the kernel one layer after the other (`lowerdir+`).
fn mount_one_by_one(target: &Path, flags: MsFlags, data: &[String]) -> io::Result<()> {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    // As it stands in /proc/mounts.
    fsconfig_set_string(&context, "source", "overlay")?;
    if flags.contains(MsFlags::MS_RDONLY) {
        fsconfig_set_flag(&context, "ro")?;
    }
    for option in data {
        match option.split_once('=') {
            Some(("lowerdir", layers)) => {
                for layer in layers.split(':') {
                    fsconfig_set_string(&context, "lowerdir+", layer).map_err(needs_newer)?;
                }
            }
            Some((key, value)) => fsconfig_set_string(&context, key, value)?,
            None => fsconfig_set_flag(&context, option.as_str())?,
        }
    }
    fsconfig_create(&context)?;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes(flags))?;
    let empty_path = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(move_mount(mount, "", CWD, target, empty_path)?)
}

/// What a kernel says that does not know `lowerdir+`.
fn needs_newer(error: rustix::io::Errno) -> io::Error {
    match error {
        rustix::io::Errno::INVAL => io::Error::other(
            "the layers' paths exceed a page together, or one of them 255 bytes; \
             the former takes Linux 6.8",
        ),
        error => error.into(),
    }
}

/// The flags of mount(2) that are the mount's, not the file system's, as
/// fsmount(2) wants them.
fn attributes(flags: MsFlags) -> MountAttrFlags {
    [
        (MsFlags::MS_RDONLY, MountAttrFlags::MOUNT_ATTR_RDONLY),
        (MsFlags::MS_NOSUID, MountAttrFlags::MOUNT_ATTR_NOSUID),
        (MsFlags::MS_NODEV, MountAttrFlags::MOUNT_ATTR_NODEV),
        (MsFlags::MS_NOEXEC, MountAttrFlags::MOUNT_ATTR_NOEXEC),
        (MsFlags::MS_NOATIME, MountAttrFlags::MOUNT_ATTR_NOATIME),
        (
            MsFlags::MS_NODIRATIME,
            MountAttrFlags::MOUNT_ATTR_NODIRATIME,
        ),
        (
            MsFlags::MS_STRICTATIME,
            MountAttrFlags::MOUNT_ATTR_STRICTATIME,
        ),
    ]
    .into_iter()
    .filter(|(flag, _)| flags.contains(*flag))
    .fold(MountAttrFlags::empty(), |all, (_, attribute)| {
        all | attribute
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_become_relative_to_their_parent() {
        let data = ["lowerdir=/s/1/fs:/s/22/fs", "upperdir=/s/3/fs"].map(String::from);
        let (parent, data) = shorten_layers(&data).unwrap();
        assert_eq!(parent, Path::new("/s"));
        assert_eq!(data, "lowerdir=1/fs:22/fs,upperdir=/s/3/fs");
    }

    #[test]
    fn attributes_are_the_mount_s_flags() {
        let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_SYNCHRONOUS;
        let expected = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
        assert_eq!(attributes(flags), expected);
    }
}
