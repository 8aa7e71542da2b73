//! `nacre install` and `nacre uninstall`.
//!
//! ```text
//! PREFIX/lib/nacre/
//!     0.1.0-0123456789ab/    one version: never changed once it has this name
//!         bin/  share/nacre/
//!     current -> 0.1.0-0123456789ab
//!     record.json            what was made, see [`record`]
//! PREFIX/bin/nacre -> ../lib/nacre/current/bin/nacre       and so on
//! ```
//! What a pod's shim was started from stays as it is: another version is another
//! directory, named by its contents, and one rename of `current` switches all names
//! at once. The directory of an earlier one is removed by the next call that finds no
//! process of it. A file outside PREFIX that is there already belongs to its user.

mod record;
#[cfg(test)]
mod tests;

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use self::record::{Record, Written, make_directory};
use super::containerd::{self, ContainerdConfig, ContainerdError, Way, below};
use super::{CliError, pods};
use crate::config::{CONFIG_PATH, Config, ConfigError, DEFAULTS};
use crate::machine::SELF_EXE;

/// What a version consists of, by its place beside the program, and its mode.
const FILES: [(&str, u32); 5] = [
    ("bin/containerd-shim-nacre-v2", 0o755),
    ("bin/nacre", 0o755),
    ("share/nacre/vmlinux", 0o644),
    ("share/nacre/initrd.img", 0o644),
    ("share/nacre/drivers/nvme.erofs", 0o644),
];
/// The names that are used, each in a directory of the prefix.
const LINKS: [&str; 3] = ["bin/containerd-shim-nacre-v2", "bin/nacre", "share/nacre"];
const LIBRARY: &str = "lib/nacre";
const CURRENT: &str = "current";
/// Hexadecimal digits of the hash in a version's name.
const HASH_DIGITS: usize = 12;

/// Errors of both commands, told to a person.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// A file operation failed.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The prefix is no place on a host.
    #[error("--prefix {}: not an absolute path", .0.display())]
    Prefix(PathBuf),
    /// A name is taken by something else.
    #[error("{} is there and not by `nacre install`; move it away first", path.display())]
    NotOurs {
        /// What is in the way.
        path: PathBuf,
    },
    /// The record is not what this version writes.
    #[error("malformed {}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// The parser's complaint.
        source: serde_json::Error,
    },
    /// containerd's configuration cannot be used.
    #[error(transparent)]
    Containerd(#[from] ContainerdError),
    /// This version would refuse every pod.
    #[error(
        "this version would start no pod with the configuration of this host; \
         correct or remove that line and run `nacre install` again"
    )]
    Config(#[source] ConfigError),
    /// Pods need what is to be removed.
    #[error(
        "pods are here: {}; remove them first, or give --force and lose containerd's way to end them",
        .0.join(", ")
    )]
    Pods(Vec<String>),
    /// A process needs what is to be removed.
    #[error("process {pid} runs version {version}; end it first, or give --force")]
    InUse {
        /// Which of those that are installed.
        version: String,
        /// One that runs a program of it.
        pid: u32,
    },
}

/// Where to.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Place {
    /// Directory on the host for programs, kernel and agent.
    #[arg(long, default_value = "/usr/local")]
    prefix: PathBuf,
    /// Directory that is or becomes the host's root directory.
    #[arg(long, default_value = "/")]
    root: PathBuf,
}

impl Place {
    fn check(&self) -> Result<(), InstallError> {
        if self.prefix.is_absolute() {
            Ok(())
        } else {
            Err(InstallError::Prefix(self.prefix.clone()))
        }
    }

    /// The library directory as on the host.
    fn library(&self) -> PathBuf {
        self.prefix.join(LIBRARY)
    }

    /// Where something of the library directory is now.
    fn in_library(&self, name: &str) -> PathBuf {
        below(&self.root, &self.library()).join(name)
    }
}

/// Installs the version whose files are in `tree`.
pub(super) fn install(place: &Place, tree: &Path, out: &mut impl Write) -> Result<(), CliError> {
    place.check()?;
    // What can be refused is, before anything is changed.
    let version = version_of(tree)?;
    let config = ContainerdConfig::load(&place.root).map_err(InstallError::from)?;
    check_links(place)?;
    let found = Record::find(&place.root, &place.library())?;
    check_config(place, found.as_ref())?;
    let mut record = match found {
        Some(record) => record,
        None => Record::open(&place.root, &place.library())?,
    };
    add_version(place, &mut record, &version, tree)?;
    record.link(&place.library().join(CURRENT), Path::new(&version))?;
    for link in LINKS {
        record.link(&place.prefix.join(link), &target_of(link))?;
    }
    let mut say = |line: String| writeln!(out, "{line}").map_err(CliError::Write);
    say(format!(
        "installed {version} in {}",
        place.library().display()
    ))?;
    if let Some(line) = write_config(&mut record)? {
        say(line)?;
    }
    say(tell_containerd(config.as_ref(), &mut record)?)?;
    for line in remove_unused(place, &mut record, &version)? {
        say(line)?;
    }
    say("next: nacre check".into())
}

/// Undoes every [`install`] with this prefix.
pub(super) fn uninstall(
    place: &Place,
    is_forced: bool,
    out: &mut impl Write,
) -> Result<(), CliError> {
    place.check()?;
    let mut say = |line: String| writeln!(out, "{line}").map_err(CliError::Write);
    let library = place.library();
    let Some(mut record) = Record::find(&place.root, &library)? else {
        return say(format!("nothing is installed in {}", library.display()));
    };
    if !is_forced {
        refuse_with_pods(place)?;
        refuse_with_processes(place, &record)?;
    }
    for line in remove_files(&record)? {
        say(line)?;
    }
    record.remove_links()?;
    for version in record.versions() {
        record.remove_version(&version)?;
        say(format!("removed {version}"))?;
    }
    record.remove()?;
    let config = ContainerdConfig::load(&place.root).map_err(InstallError::from)?;
    match config.and_then(|config| config.naming_runtime()) {
        Some(file) => say(format!(
            "containerd has the runtime in {}: remove it there",
            file.display()
        )),
        None => say("restart containerd, and it has forgotten the runtime".into()),
    }
}

/// Removes what was written outside the prefix; tells of each.
fn remove_files(record: &Record) -> Result<Vec<String>, InstallError> {
    let remove = |file: PathBuf| {
        let is_gone = record.remove_file(&file)?;
        let file = file.display();
        Ok(if is_gone {
            format!("removed {file}")
        } else {
            format!("kept {file}: edited since it was written")
        })
    };
    record.files().into_iter().map(remove).collect()
}

fn refuse_with_pods(place: &Place) -> Result<(), CliError> {
    let config = Config::load_from(&below(&place.root, Path::new(CONFIG_PATH)))?;
    let run_dir = below(&place.root, &config.run_dir);
    pods::sweep(&run_dir)?;
    // Whatever their state says, or if it cannot be read: something is left of them.
    let pods = pods::places(&run_dir)?;
    if pods.is_empty() {
        return Ok(());
    }
    let names = pods
        .iter()
        .map(|pod| format!("{}/{}", pod.namespace, pod.id));
    Err(InstallError::Pods(names.collect()).into())
}

/// Pods may be where another configuration had them.
fn refuse_with_processes(place: &Place, record: &Record) -> Result<(), InstallError> {
    for version in record.versions() {
        if let Some(pid) = user_of(&place.in_library(&version), Path::new("/proc"))? {
            return Err(InstallError::InUse { version, pid });
        }
    }
    Ok(())
}

/// The name of the version in a tree: the same for the same bytes only.
fn version_of(tree: &Path) -> Result<String, InstallError> {
    let mut hash = Sha256::new();
    for (name, _) in FILES {
        let path = tree.join(name);
        let mut file = File::open(&path).map_err(io_error("open", &path))?;
        let length = io::copy(&mut file, &mut hash).map_err(io_error("read", &path))?;
        hash.update(length.to_le_bytes());
    }
    let mut hash = format!("{:x}", hash.finalize());
    hash.truncate(HASH_DIGITS);
    Ok(format!("{}-{hash}", env!("CARGO_PKG_VERSION")))
}

/// What a link is to; the same in every version, so it tells ours from others.
fn target_of(link: &str) -> PathBuf {
    Path::new("..").join(LIBRARY).join(CURRENT).join(link)
}

/// Fails if there is something in a link's place that is not the link.
fn check_links(place: &Place) -> Result<(), InstallError> {
    for link in LINKS {
        let path = below(&place.root, &place.prefix.join(link));
        let is_link = || fs::read_link(&path).is_ok_and(|target| target == target_of(link));
        if fs::symlink_metadata(&path).is_ok() && !is_link() {
            return Err(InstallError::NotOurs { path });
        }
    }
    Ok(())
}

/// Copies a version's files, which have their final name once they are complete.
fn add_version(
    place: &Place,
    record: &mut Record,
    version: &str,
    tree: &Path,
) -> Result<(), InstallError> {
    let directory = place.in_library(version);
    if directory.exists() {
        return record.add_version(version);
    }
    // An interrupted call's is a version that nothing uses.
    let unfinished = format!("{version}.new");
    record.remove_version(&unfinished)?;
    record.add_version(&unfinished)?;
    record.add_version(version)?;
    let new = place.in_library(&unfinished);
    for part in ["", "bin", "share", "share/nacre", "share/nacre/drivers"] {
        make_directory(&new.join(part))?;
    }
    for (name, mode) in FILES {
        let (from, to) = (tree.join(name), new.join(name));
        fs::copy(&from, &to)
            .and_then(|_| fs::set_permissions(&to, Permissions::from_mode(mode)))
            .and_then(|()| File::open(&to)?.sync_all())
            .map_err(io_error("write", &to))?;
    }
    fs::rename(&new, &directory).map_err(io_error("make", &directory))?;
    record.remove_version(&unfinished)
}

/// Fails if a user's configuration is none for this version. One that is as an earlier
/// version wrote it is going to be replaced.
fn check_config(place: &Place, record: Option<&Record>) -> Result<(), InstallError> {
    let is_users = record.map(|record| record.is_users(Path::new(CONFIG_PATH)));
    if is_users.transpose()?.unwrap_or(true) {
        let path = below(&place.root, Path::new(CONFIG_PATH));
        Config::load_from(&path).map_err(InstallError::Config)?;
    }
    Ok(())
}

/// This version's defaults, unless the configuration is a user's.
fn write_config(record: &mut Record) -> Result<Option<String>, InstallError> {
    let written = record.write(Path::new(CONFIG_PATH), DEFAULTS)?;
    Ok((written == Written::Now).then(|| format!("wrote {CONFIG_PATH}")))
}

/// Has containerd's configuration name the runtime; returns what there is to say.
fn tell_containerd(
    config: Option<&ContainerdConfig>,
    record: &mut Record,
) -> Result<String, InstallError> {
    let by_hand = |what: String| format!("Kubernetes needs the runtime in containerd: {what}");
    let Some(config) = config else {
        return Ok(by_hand(containerd::without_config()));
    };
    Ok(match (config.naming_runtime(), config.way()) {
        (Some(naming), Way::DropIn(file)) if naming == file => write_drop_in(&file, record)?,
        (None, Way::DropIn(file)) => write_drop_in(&file, record)?,
        (Some(naming), _) => format!("containerd has the runtime in {}", naming.display()),
        (None, Way::ByHand(what)) => by_hand(what),
    })
}

fn write_drop_in(file: &Path, record: &mut Record) -> Result<String, InstallError> {
    let written = record.write(file, containerd::DROP_IN)?;
    let file = file.display();
    Ok(match written {
        Written::Now => format!("wrote {file}; restart containerd"),
        Written::Before => format!("containerd has the runtime in {file}"),
        Written::Not => format!("kept {file}: not as nacre wrote it"),
    })
}

/// Removes versions that are neither `current` nor in use; tells of each.
fn remove_unused(
    place: &Place,
    record: &mut Record,
    current: &str,
) -> Result<Vec<String>, InstallError> {
    let mut lines = Vec::new();
    for version in record.versions() {
        if version == current {
            continue;
        }
        let directory = place.in_library(&version);
        lines.push(match user_of(&directory, Path::new("/proc")) {
            Ok(Some(pid)) => format!("kept {version}: process {pid} runs it"),
            Ok(None) => {
                record.remove_version(&version)?;
                format!("removed {version}")
            }
            Err(error) => {
                let error = crate::error::chain(&error);
                format!("kept {version}: a process may run it: {error}")
            }
        });
    }
    Ok(lines)
}

/// A process that runs a program of this version. Compared as files, because a jailed
/// process's paths are not this one's.
///
/// # Errors
///
/// When that cannot be known of one.
fn user_of(version: &Path, proc: &Path) -> Result<Option<u32>, InstallError> {
    let mut programs = Vec::new();
    for (name, _) in FILES {
        programs.extend(identity(&version.join(name))?);
    }
    for entry in fs::read_dir(proc).map_err(io_error("read", proc))? {
        let entry = entry.map_err(io_error("read", proc))?;
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // A thread of the kernel has no program, one that has ended no longer.
        match identity(&entry.path().join("exe")) {
            Ok(Some(program)) if programs.contains(&program) && pid != std::process::id() => {
                return Ok(Some(pid));
            }
            Err(error) if may_be_ours(&entry.path()) => return Err(error),
            _ => (),
        }
    }
    Ok(None)
}

/// Whether a process was started as ours are, by its command line: in a container the
/// programs of some are not to be looked at.
fn may_be_ours(process: &Path) -> bool {
    let Ok(line) = fs::read(process.join("cmdline")) else {
        return true;
    };
    let program = line.split(|byte| *byte == 0).next().unwrap_or_default();
    let program = Path::new(OsStr::from_bytes(program));
    // A shim starts itself as monitor.
    let is = |name: &str| program.file_name() == Path::new(name).file_name();
    is(SELF_EXE) || FILES.iter().any(|(name, _)| is(name))
}

/// Tells a file from others; `None` if it is not there.
fn identity(path: &Path) -> Result<Option<(u64, u64)>, InstallError> {
    match fs::metadata(path) {
        Ok(file) => Ok(Some((file.dev(), file.ino()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        // A process that ends while it is looked at (proc(5)).
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        Err(error) => Err(io_error("look at", path)(error)),
    }
}

fn io_error<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> InstallError + 'a {
    move |source| InstallError::Io {
        what,
        path: path.to_owned(),
        source,
    }
}
