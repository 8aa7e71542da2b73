//! Device nodes and links of the container's /dev.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use nacre_protocol::idmap::IdMaps;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Spec};

use super::error::{InitError, Step};
use super::sys;

/// The devices every container has (OCI runtime spec, "Default Devices").
const DEFAULT_DEVICES: [(&str, u64, u64); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
    ("pts/ptmx", "/dev/ptmx"),
];

/// A node to be.
struct Node<'a> {
    path: PathBuf,
    kind: SFlag,
    mode: Mode,
    number: u64,
    listed: Option<&'a LinuxDevice>,
}

/// Makes nodes and links, with a umask of 0, inside the container's root. `opened`
/// are nodes made before, see [`open`].
///
/// A /dev that is a bind mount is somebody else's and is left alone.
///
/// # Errors
///
/// The node that could not be made.
pub fn create(spec: &Spec, opened: Option<&[OwnedFd]>) -> Result<(), InitError> {
    let nodes = nodes(spec)?;
    if nodes.is_empty() {
        return Ok(());
    }
    match opened {
        None => {
            for node in &nodes {
                node.create(&node.path).step(|| node.what())?;
            }
        }
        Some(opened) => {
            for (node, tree) in nodes.iter().zip(opened) {
                node.bind(tree).step(|| node.what())?;
            }
        }
    }
    for (target, link) in LINKS {
        if fs::symlink_metadata(link).is_err() {
            symlink(target, link).step(|| format!("create link {link}"))?;
        }
    }
    Ok(())
}

/// Makes the nodes beside the container's root, for [`create`] to bind: the root
/// of a user namespace cannot make any. Their owners are as `users` maps them.
///
/// # Errors
///
/// The node that could not be made.
pub fn open(spec: &Spec, users: &IdMaps) -> Result<Vec<OwnedFd>, InitError> {
    let root = spec.root().as_ref().map(|root| root.path().clone());
    let directory = root.unwrap_or_default().with_file_name("devices");
    fs::DirBuilder::new()
        .mode(0o700)
        .create(&directory)
        .step(|| format!("create {}", directory.display()))?;
    let umask = nix::sys::stat::umask(Mode::empty());
    let open = |(number, node): (usize, &Node<'_>)| {
        let path = directory.join(number.to_string());
        let open = || {
            node.create(&path)?;
            let owner = |id: Option<u32>, outside: &dyn Fn(u32) -> Option<u32>| {
                outside(id.unwrap_or(0)).ok_or(io::ErrorKind::InvalidInput)
            };
            let (uid, gid) = node.owner();
            let (uid, gid) = (
                owner(uid, &|id| users.uid(id))?,
                owner(gid, &|id| users.gid(id))?,
            );
            chown(&path, Some(uid), Some(gid))?;
            sys::clone_mount(&path, false)
        };
        open().step(|| node.what())
    };
    let opened = nodes(spec)?.iter().enumerate().map(open).collect();
    nix::sys::stat::umask(umask);
    opened
}

/// Those listed, then the usual ones; none in a /dev of somebody else's.
fn nodes(spec: &Spec) -> Result<Vec<Node<'_>>, InitError> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let foreign = mounts.iter().any(|mount| {
        mount.destination() == Path::new("/dev")
            && (mount.typ().as_deref() == Some("bind")
                || mount
                    .options()
                    .iter()
                    .flatten()
                    .any(|o| o == "bind" || o == "rbind"))
    });
    if foreign {
        return Ok(Vec::new());
    }
    let linux = spec.linux().as_ref();
    let listed = linux.and_then(|linux| linux.devices().as_deref());
    let listed = listed.unwrap_or_default();
    let mut nodes = listed
        .iter()
        .map(Node::listed)
        .collect::<Result<Vec<_>, _>>()?;
    for (path, major, minor) in DEFAULT_DEVICES {
        if !listed.iter().any(|device| device.path() == Path::new(path)) {
            nodes.push(Node {
                path: path.into(),
                kind: SFlag::S_IFCHR,
                mode: Mode::from_bits_truncate(0o666),
                number: makedev(major, minor),
                listed: None,
            });
        }
    }
    Ok(nodes)
}

impl<'a> Node<'a> {
    fn listed(device: &'a LinuxDevice) -> Result<Self, InitError> {
        let kind = match device.typ() {
            LinuxDeviceType::B => SFlag::S_IFBLK,
            LinuxDeviceType::C | LinuxDeviceType::U => SFlag::S_IFCHR,
            LinuxDeviceType::P => SFlag::S_IFIFO,
            LinuxDeviceType::A => {
                let path = device.path().display();
                return Err(InitError::Invalid(format!("device {path} is of no type")));
            }
        };
        let number = |value: i64| u64::try_from(value).unwrap_or(0);
        Ok(Self {
            path: Path::new("/").join(device.path()),
            kind,
            mode: Mode::from_bits_truncate(device.file_mode().unwrap_or(0o666) & 0o7777),
            number: makedev(number(device.major()), number(device.minor())),
            listed: Some(device),
        })
    }

    fn owner(&self) -> (Option<u32>, Option<u32>) {
        let device = self.listed;
        device.map_or((None, None), |device| (device.uid(), device.gid()))
    }

    fn what(&self) -> String {
        format!("create device {}", self.path.display())
    }

    /// Makes the node at `path`.
    fn create(&self, path: &Path) -> io::Result<()> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        match mknod(path, self.kind, self.mode, self.number) {
            // An image with device nodes of its own in /dev.
            Ok(()) | Err(nix::errno::Errno::EEXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
        if self.listed.is_none() {
            return Ok(());
        }
        fs::set_permissions(path, fs::Permissions::from_mode(self.mode.bits()))?;
        let (uid, gid) = self.owner();
        chown(path, uid, gid)
    }

    /// Binds a node that was made before to this one's path.
    fn bind(&self, tree: &OwnedFd) -> io::Result<()> {
        if let Some(parent) = self.path.parent() {
            fs::create_dir_all(parent)?;
        }
        if fs::symlink_metadata(&self.path).is_err() {
            fs::File::create(&self.path)?;
        }
        sys::attach_mount(tree.as_fd(), &self.path)
    }
}
