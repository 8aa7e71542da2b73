//! A directory in the layout of the kubelet's atomic writer.
//!
//! ```text
//!   <root>/..7/key          the files of generation 7
//!          ..data -> ..7    replaced by rename(2): the one step of a change
//!          key -> ..data/key
//! ```
//!
//! A change writes `..8` whole, then replaces `..data`, then the links, and
//! only then removes what is no longer of use, so that a reader who looks
//! through `..data` never sees half of it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nacre_protocol::agent::volume_entry::Kind;
use nacre_protocol::agent::{DirectoryVolume, VolumeEntry};
use rustix::fs::{
    AtFlags, Mode, OFlags, mkdirat, openat2, readlinkat, renameat, symlinkat, unlinkat,
};
use rustix::io::Errno;

use super::{CONFINED, components, open_dir, open_root, own};
use crate::error::{Context, Error, Result};

/// The link all readers go through.
const DATA: &str = "..data";
/// Its name before it replaces the one that is there; the kubelet's word too.
const DATA_TMP: &str = "..data_tmp";

/// Makes `path` show `volume`.
pub(super) fn put(path: &Path, volume: &DirectoryVolume) -> Result<()> {
    let what = |step: &'static str| {
        let name = &volume.name;
        move || format!("volume {name}: {step}")
    };
    check(volume)?;
    fs::create_dir_all(path).with_context(what("make its directory"))?;
    let root = open_root(path).with_context(what("open"))?;
    let version = format!("..{}", volume.generation);
    write(&root, &version, &volume.entries).with_context(what("write its files"))?;
    own(root.as_fd(), volume.uid, volume.gid, volume.mode).with_context(what("own"))?;
    replace_link(&root, DATA, &version).with_context(what("show its files"))?;
    for link in &volume.links {
        show(&root, link).with_context(what("link its files"))?;
    }
    sweep(path, &version, &volume.links).with_context(what("remove what is old"))
}

/// Nothing may lead out of the directory, or to where this module keeps its own.
fn check(volume: &DirectoryVolume) -> Result<()> {
    for entry in &volume.entries {
        components(&entry.path)?;
    }
    for link in &volume.links {
        let plain = components(&link.path)?.len() == 1 && !link.path.starts_with("..");
        if !plain || !matches!(link.kind, Some(Kind::Link(_))) {
            let message = format!("{:?} in the root of a volume", link.path);
            return Err(Error::InvalidArgument(message));
        }
    }
    Ok(())
}

fn write(root: &OwnedFd, version: &str, entries: &[VolumeEntry]) -> io::Result<()> {
    mkdirat(root, version, Mode::RWXU)?;
    let dir = open_dir(root, version)?;
    for entry in entries {
        write_entry(&dir, entry)
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", entry.path)))?;
    }
    Ok(())
}

fn write_entry(dir: &OwnedFd, entry: &VolumeEntry) -> io::Result<()> {
    if entry.path.is_empty() {
        return own(dir.as_fd(), entry.uid, entry.gid, entry.mode);
    }
    let path = Path::new(&entry.path);
    let parent = match path.parent().and_then(Path::to_str) {
        None | Some("") => dir.try_clone()?,
        Some(parent) => open_dir(dir, parent)?,
    };
    let name = path.file_name().unwrap_or_default();
    let file = match &entry.kind {
        Some(Kind::Link(target)) => return Ok(symlinkat(target, &parent, name)?),
        Some(Kind::Contents(contents)) => {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let mode = Mode::RUSR | Mode::WUSR;
            let mut file = File::from(openat2(&parent, name, flags, mode, CONFINED)?);
            file.write_all(contents)?;
            OwnedFd::from(file)
        }
        Some(Kind::Directory(_)) => {
            mkdirat(&parent, name, Mode::RWXU)?;
            open_dir(dir, &entry.path)?
        }
        _ => return Err(io::Error::other("is of no kind")),
    };
    own(file.as_fd(), entry.uid, entry.gid, entry.mode)
}

fn show(root: &OwnedFd, link: &VolumeEntry) -> io::Result<()> {
    let Some(Kind::Link(target)) = &link.kind else {
        return Ok(());
    };
    match readlinkat(root, &link.path, Vec::new()) {
        Ok(shown) if shown.as_bytes() == target.as_bytes() => Ok(()),
        _ => replace_link(root, &link.path, target),
    }
}

/// Points `name` to `target` in one step.
fn replace_link(root: &OwnedFd, name: &str, target: &str) -> io::Result<()> {
    match unlinkat(root, DATA_TMP, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    symlinkat(target, root, DATA_TMP)?;
    Ok(renameat(root, DATA_TMP, root, name)?)
}

/// Removes all that is not part of the contents shown now, also what a change
/// that failed has left.
fn sweep(path: &Path, version: &str, links: &[VolumeEntry]) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let name = entry.file_name();
        let linked = || links.iter().any(|link| name == link.path.as_str());
        if name == DATA || name == version || linked() {
            continue;
        }
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
