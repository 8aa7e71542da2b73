//! What `nacre install` made, so that no more than that is ever changed or undone.
//!
//! It is a file of the library directory, written before each thing it names is made.
//! What is in it and not on the host does no harm.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{InstallError, io_error};
use crate::cli::containerd::below;

const NAME: &str = "record.json";
/// Of all that is not a program.
const FILE_MODE: u32 = 0o644;
const DIRECTORY_MODE: u32 = 0o755;

/// Paths as on the host that is being installed to, wherever its root is now.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Made {
    /// Names of versions in the library directory.
    versions: BTreeSet<String>,
    /// Symbolic links and what they are to.
    links: BTreeMap<PathBuf, PathBuf>,
    /// Files outside the library directory and the SHA-256 of what was written.
    files: BTreeMap<PathBuf, String>,
    /// Directories, the library directory too.
    directories: BTreeSet<PathBuf>,
}

/// The record of one library directory, which is locked as long as this lives.
#[derive(Debug)]
pub(super) struct Record {
    root: PathBuf,
    /// On the host.
    library: PathBuf,
    made: Made,
    _lock: Flock<File>,
}

/// What became of a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Written {
    /// It was not there, or not of this version.
    Now,
    /// It is as it should be.
    Before,
    /// It is a user's, or was edited by one.
    Not,
}

impl Record {
    /// Opens the record of a library directory, which is made if need be.
    pub(super) fn open(root: &Path, library: &Path) -> Result<Self, InstallError> {
        fs::create_dir_all(root).map_err(io_error("make", root))?;
        let missing = missing_directories(root, library);
        for directory in &missing {
            make_directory(&below(root, directory))?;
        }
        let mut record = Self::load(root, library)?;
        record.made.directories.extend(missing);
        record.save()?;
        Ok(record)
    }

    /// The same where something is installed; `None` elsewhere.
    pub(super) fn find(root: &Path, library: &Path) -> Result<Option<Self>, InstallError> {
        if below(root, library).join(NAME).exists() {
            Self::load(root, library).map(Some)
        } else {
            Ok(None)
        }
    }

    fn load(root: &Path, library: &Path) -> Result<Self, InstallError> {
        let directory = below(root, library);
        let file = File::open(&directory).map_err(io_error("open", &directory))?;
        let lock = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| io_error("lock", &directory)(errno.into()))?;
        let path = directory.join(NAME);
        let made = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Made::default(),
            Err(error) => return Err(io_error("read", &path)(error)),
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|source| InstallError::Record { path, source })?,
        };
        Ok(Self {
            root: root.to_owned(),
            library: library.to_owned(),
            made,
            _lock: lock,
        })
    }

    fn save(&self) -> Result<(), InstallError> {
        let path = below(&self.root, &self.library).join(NAME);
        let text =
            serde_json::to_vec_pretty(&self.made).map_err(|source| InstallError::Record {
                path: path.clone(),
                source,
            })?;
        replace(&path, &text)
    }

    /// Names of the versions that are installed.
    pub(super) fn versions(&self) -> Vec<String> {
        self.made.versions.iter().cloned().collect()
    }

    pub(super) fn add_version(&mut self, version: &str) -> Result<(), InstallError> {
        self.made.versions.insert(version.to_owned());
        self.save()
    }

    /// Removes a version's files.
    pub(super) fn remove_version(&mut self, version: &str) -> Result<(), InstallError> {
        let path = below(&self.root, &self.library).join(version);
        absent_is_fine(fs::remove_dir_all(&path)).map_err(io_error("remove", &path))?;
        self.made.versions.remove(version);
        self.save()
    }

    /// Files that were written, by their names on the host.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        self.made.files.keys().cloned().collect()
    }

    /// Makes a link or moves it to another target, in one step.
    pub(super) fn link(&mut self, link: &Path, target: &Path) -> Result<(), InstallError> {
        let path = below(&self.root, link);
        if fs::read_link(&path).is_ok_and(|now| now == target) {
            return Ok(());
        }
        self.make_parents(link)?;
        self.made.links.insert(link.to_owned(), target.to_owned());
        self.save()?;
        let new = beside(&path);
        absent_is_fine(fs::remove_file(&new)).map_err(io_error("remove", &new))?;
        symlink(target, &new).map_err(io_error("make", &new))?;
        fs::rename(&new, &path).map_err(io_error("replace", &path))
    }

    /// Whether a file is there that is a user's or was edited by one.
    pub(super) fn is_users(&self, file: &Path) -> Result<bool, InstallError> {
        let path = below(&self.root, file);
        if fs::symlink_metadata(&path).is_err() {
            return Ok(false);
        }
        match self.made.files.get(file) {
            Some(recorded) => is_as_written(&path, recorded).map(|is| !is),
            None => Ok(true),
        }
    }

    /// Writes a file unless it is a user's or was edited.
    pub(super) fn write(&mut self, file: &Path, text: &str) -> Result<Written, InstallError> {
        if self.is_users(file)? {
            return Ok(Written::Not);
        }
        let path = below(&self.root, file);
        let wanted = digest(text.as_bytes());
        if self.made.files.get(file) == Some(&wanted) && fs::symlink_metadata(&path).is_ok() {
            return Ok(Written::Before);
        }
        self.make_parents(file)?;
        // What an interrupted call leaves is then taken for edited, and kept.
        self.made.files.insert(file.to_owned(), wanted);
        self.save()?;
        replace(&path, text.as_bytes())?;
        Ok(Written::Now)
    }

    /// Removes a file unless it was edited; returns whether it is gone.
    pub(super) fn remove_file(&self, file: &Path) -> Result<bool, InstallError> {
        let path = below(&self.root, file);
        let recorded = self.made.files.get(file);
        if fs::symlink_metadata(&path).is_ok()
            && !recorded.is_some_and(|digest| is_as_written(&path, digest).unwrap_or(false))
        {
            return Ok(false);
        }
        absent_is_fine(fs::remove_file(&path)).map_err(io_error("remove", &path))?;
        Ok(true)
    }

    /// Removes all links that are still ours.
    pub(super) fn remove_links(&self) -> Result<(), InstallError> {
        for (link, target) in &self.made.links {
            let path = below(&self.root, link);
            if fs::read_link(&path).is_ok_and(|now| now == *target) {
                fs::remove_file(&path).map_err(io_error("remove", &path))?;
            }
        }
        Ok(())
    }

    /// Removes the record and those directories that are empty then.
    pub(super) fn remove(self) -> Result<(), InstallError> {
        let path = below(&self.root, &self.library).join(NAME);
        fs::remove_file(&path).map_err(io_error("remove", &path))?;
        // Deeper ones come after those they are in.
        for directory in self.made.directories.iter().rev() {
            let path = below(&self.root, directory);
            match fs::remove_dir(&path) {
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => (),
                result => absent_is_fine(result).map_err(io_error("remove", &path))?,
            }
        }
        Ok(())
    }

    fn make_parents(&mut self, path: &Path) -> Result<(), InstallError> {
        let parent = path.parent().unwrap_or(Path::new("/"));
        let missing = missing_directories(&self.root, parent);
        if missing.is_empty() {
            return Ok(());
        }
        self.made.directories.extend(missing.iter().cloned());
        self.save()?;
        missing
            .iter()
            .try_for_each(|directory| make_directory(&below(&self.root, directory)))
    }
}

/// Those of a path's directories that are not there, outermost first.
fn missing_directories(root: &Path, path: &Path) -> Vec<PathBuf> {
    let is_missing = |directory: &&Path| !below(root, directory).exists();
    let mut missing: Vec<_> = path.ancestors().take_while(is_missing).collect();
    missing.reverse();
    missing.into_iter().map(Path::to_owned).collect()
}

/// Makes a directory that everyone may read, whatever the umask.
pub(super) fn make_directory(path: &Path) -> Result<(), InstallError> {
    fs::create_dir(path)
        .and_then(|()| fs::set_permissions(path, Permissions::from_mode(DIRECTORY_MODE)))
        .map_err(io_error("make", path))
}

/// Puts a file with these bytes into its place in one step.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), InstallError> {
    let new = beside(path);
    File::create(&new)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            file.set_permissions(Permissions::from_mode(FILE_MODE))?;
            file.sync_all()
        })
        .map_err(io_error("write", &new))?;
    fs::rename(&new, path).map_err(io_error("replace", path))
}

/// The name of what is to come into a file's place.
fn beside(path: &Path) -> PathBuf {
    path.with_added_extension("nacre-new")
}

fn is_as_written(path: &Path, recorded: &str) -> Result<bool, InstallError> {
    // A link in the file's place is a user's, wherever it is to.
    let metadata = fs::symlink_metadata(path).map_err(io_error("look at", path))?;
    if !metadata.is_file() {
        return Ok(false);
    }
    let bytes = fs::read(path).map_err(io_error("read", path))?;
    Ok(digest(&bytes) == recorded)
}

fn digest(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
