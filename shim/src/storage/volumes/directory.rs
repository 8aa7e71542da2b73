//! A volume the kubelet writes, read for a copy in the guest.
//!
//! Its atomic writer keeps the files in a directory of their own that `..data`
//! links to, and replaces that link. So reading is: look where `..data` leads,
//! read that directory, look again. If the link has changed meanwhile, what was
//! read may be half gone, and is read anew.
//!
//! Nothing is opened but directories and regular files of the volume itself: a
//! symbolic link is copied as one, never followed (openat2(2)), since whoever
//! can write to a volume must not make the shim read the host's files.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nacre_protocol::agent::volume_entry::Kind;
use nacre_protocol::agent::{DirectoryVolume, Empty, VolumeEntry};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2, readlinkat};

use crate::task::agent_message;

/// The most a volume may hold, names and all, to be copied: a version of it
/// goes to the guest in one message, and those have 4 MiB at most (ttrpc).
pub(super) const MAX_BYTES: usize = 3 << 20;
/// What an entry counts for besides its name and contents.
const ENTRY_BYTES: usize = 64;
/// Directories in directories; the kubelet makes a handful.
const MAX_DEPTH: usize = 16;
/// How often a volume may change under the reader.
const ATTEMPTS: usize = 8;
const DATA: &str = "..data";

/// Why a volume cannot be copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// Too much to copy.
    #[error(
        "{path} holds more than the {} bytes a copied volume may have",
        MAX_BYTES
    )]
    TooLarge {
        /// The volume.
        path: PathBuf,
    },
    /// Not what the kubelet's atomic writer makes.
    #[error("{path} is not laid out as the kubelet does it: {what}")]
    Layout {
        /// The volume.
        path: PathBuf,
        /// The difference.
        what: String,
    },
    /// It could not be read.
    #[error("read {path}")]
    Io {
        /// The volume.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It changed all the time.
    #[error("{path} changes faster than it can be read")]
    Restless {
        /// The volume.
        path: PathBuf,
    },
    /// The guest did not take it.
    #[error("the guest does not take a volume: {}", agent_message(answer))]
    Guest {
        /// Its answer.
        answer: ttrpc::Error,
    },
}

impl CopyError {
    /// Whether there is nobody left to copy for.
    pub(super) fn guest_is_gone(&self) -> bool {
        matches!(self, Self::Guest { answer } if !matches!(answer, ttrpc::Error::RpcStatus(_)))
    }
}

/// Reads the volume at `path`; name and generation are the caller's to set.
///
/// # Errors
///
/// A volume that cannot be copied.
pub(super) fn read(path: &Path) -> Result<DirectoryVolume, CopyError> {
    let name = || path.to_owned();
    for _ in 0..ATTEMPTS {
        match read_once(path) {
            Ok(Some(volume)) => return Ok(volume),
            Ok(None) => {}
            Err(Trouble::Io(source)) if source.kind() == io::ErrorKind::NotFound => {
                // Gone with the directory `..data` led to, or the volume is.
                std::fs::symlink_metadata(path).map_err(|source| CopyError::Io {
                    path: name(),
                    source,
                })?;
            }
            Err(Trouble::Io(source)) => {
                return Err(CopyError::Io {
                    path: name(),
                    source,
                });
            }
            Err(Trouble::TooLarge) => return Err(CopyError::TooLarge { path: name() }),
            Err(Trouble::Layout(what)) => return Err(CopyError::Layout { path: name(), what }),
        }
    }
    Err(CopyError::Restless { path: name() })
}

enum Trouble {
    Io(io::Error),
    TooLarge,
    Layout(String),
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<nix::Error> for Trouble {
    fn from(error: nix::Error) -> Self {
        Self::Io(error.into())
    }
}

/// `None` if `..data` changed meanwhile.
fn read_once(path: &Path) -> Result<Option<DirectoryVolume>, Trouble> {
    let root = File::open(path)?;
    let data = link(&root, DATA)?;
    if data.contains('/') || data == ".." || !data.starts_with("..") {
        return Err(Trouble::Layout(format!("{DATA} leads to {data:?}")));
    }
    let mut reader = Reader::default();
    for name in names(&root)? {
        if !name.starts_with("..") {
            let target = link(&root, &name)?;
            reader.add(&name, None, Kind::Link(target))?;
        }
    }
    let links = std::mem::take(&mut reader.entries);
    let dir = open(&root, &data, OFlag::O_DIRECTORY)?;
    reader.add("", Some(&dir), Kind::Directory(Empty::default()))?;
    reader.read_dir(&dir, "", 0)?;
    if link(&root, DATA)? != data {
        return Ok(None);
    }
    let metadata = root.metadata()?;
    Ok(Some(DirectoryVolume {
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        entries: reader.entries,
        links,
        ..Default::default()
    }))
}

/// Entries as they are read, and what they take.
#[derive(Default)]
struct Reader {
    entries: Vec<VolumeEntry>,
    bytes: usize,
}

impl Reader {
    fn add(&mut self, path: &str, file: Option<&File>, kind: Kind) -> Result<(), Trouble> {
        let size = match &kind {
            Kind::Contents(contents) => contents.len(),
            Kind::Link(target) => target.len(),
            _ => 0,
        };
        self.bytes += ENTRY_BYTES + path.len() + size;
        if self.bytes > MAX_BYTES {
            return Err(Trouble::TooLarge);
        }
        let metadata = file.map(File::metadata).transpose()?;
        let number = |of: fn(&std::fs::Metadata) -> u32| metadata.as_ref().map_or(0, of);
        self.entries.push(VolumeEntry {
            path: path.into(),
            mode: number(MetadataExt::mode) & 0o7777,
            uid: number(MetadataExt::uid),
            gid: number(MetadataExt::gid),
            kind: Some(kind),
            ..Default::default()
        });
        Ok(())
    }

    fn read_dir(&mut self, dir: &File, path: &str, depth: usize) -> Result<(), Trouble> {
        if depth > MAX_DEPTH {
            return Err(Trouble::Layout(format!("{path} is too deep")));
        }
        for name in names(dir)? {
            let path = match path {
                "" => name.clone(),
                path => format!("{path}/{name}"),
            };
            match link(dir, &name) {
                Ok(target) => {
                    self.add(&path, None, Kind::Link(target))?;
                    continue;
                }
                Err(Trouble::Layout(_)) => {}
                Err(trouble) => return Err(trouble),
            }
            let file = open(dir, &name, OFlag::empty())?;
            let kind = file.metadata()?.file_type();
            if kind.is_dir() {
                self.add(&path, Some(&file), Kind::Directory(Empty::default()))?;
                self.read_dir(&file, &path, depth + 1)?;
            } else if kind.is_file() {
                let contents = self.contents(&file)?;
                self.add(&path, Some(&file), Kind::Contents(contents))?;
            } else {
                let what = if kind.is_fifo() { "pipe" } else { "device" };
                return Err(Trouble::Layout(format!("{path} is a {what}")));
            }
        }
        Ok(())
    }

    /// Bounded, whatever the file's size says.
    fn contents(&self, file: &File) -> Result<Vec<u8>, Trouble> {
        let left = MAX_BYTES.saturating_sub(self.bytes);
        let mut contents = Vec::new();
        file.take(left as u64 + 1).read_to_end(&mut contents)?;
        if contents.len() > left {
            return Err(Trouble::TooLarge);
        }
        Ok(contents)
    }
}

/// Where a symbolic link leads; `Layout` for what is none.
fn link(dir: &File, name: &str) -> Result<String, Trouble> {
    match readlinkat(dir, name) {
        Ok(target) => target
            .into_string()
            .map_err(|target| Trouble::Layout(format!("{name} leads to {target:?}"))),
        Err(nix::Error::EINVAL) => Err(Trouble::Layout(format!("{name} is no symbolic link"))),
        Err(nix::Error::ENOENT) if name == DATA => {
            Err(Trouble::Layout(format!("it has no {DATA}")))
        }
        Err(error) => Err(error.into()),
    }
}

fn open(dir: &File, name: &str, flags: OFlag) -> Result<File, Trouble> {
    // O_NONBLOCK: a pipe must not hold us up before we see that it is one.
    let flags = flags | OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let how = OpenHow::new()
        .flags(flags)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    let opened: OwnedFd = openat2(dir.as_fd(), name, how)?;
    Ok(opened.into())
}

fn names(dir: &File) -> Result<Vec<String>, Trouble> {
    let path = format!("/proc/self/fd/{}", dir.as_raw_fd());
    let mut names = Vec::new();
    for entry in std::fs::read_dir(path)? {
        let name = entry?.file_name();
        let name = name
            .into_string()
            .map_err(|name| Trouble::Layout(format!("{name:?} is not UTF-8")))?;
        names.push(name);
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests;
