//! Device nodes of a container, and links of its /dev.
//!
//! | node | is |
//! |---|---|
//! | below /dev | made there |
//! | elsewhere | made beside the container's root and bound to its place: the root file system may be a share of the host that takes no nodes |
//! | anywhere, for a container with users of its own | the same: its root can make none |

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use nacre_protocol::idmap::IdMaps;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Spec};

use super::error::{InitError, Step};
use super::rootfs::make_target;
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
/// is what [`open`] made of the same specification.
///
/// A /dev that is a bind mount is somebody else's and is left alone.
///
/// # Errors
///
/// The node that could not be made.
pub fn create(spec: &Spec, opened: &[Option<OwnedFd>]) -> Result<(), InitError> {
    for (node, tree) in nodes(spec)?.iter().zip(opened) {
        let made = match tree {
            None => node.create(&node.path),
            Some(tree) => node.bind(tree),
        };
        made.step(|| node.what())?;
    }
    if has_foreign_dev(spec) {
        return Ok(());
    }
    for (target, link) in LINKS {
        if fs::symlink_metadata(link).is_err() {
            symlink(target, link).step(|| format!("create link {link}"))?;
        }
    }
    Ok(())
}

/// Makes those nodes beside the container's root that [`create`] binds; for the others
/// there is `None`. Owners are as `users` maps them.
///
/// # Errors
///
/// The node that could not be made.
pub fn open(spec: &Spec, users: Option<&IdMaps>) -> Result<Vec<Option<OwnedFd>>, InitError> {
    let nodes = nodes(spec)?;
    let is_bound = |node: &Node<'_>| users.is_some() || !is_in_dev(&node.path);
    let root = spec.root().as_ref().map(|root| root.path().clone());
    let directory = root.unwrap_or_default().with_file_name("devices");
    if nodes.iter().any(is_bound) {
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&directory)
            .step(|| format!("create {}", directory.display()))?;
    }
    let umask = nix::sys::stat::umask(Mode::empty());
    let open = |(number, node): (usize, &Node<'_>)| {
        let path = directory.join(number.to_string());
        let open = || node.open(&path, users).step(|| node.what());
        is_bound(node).then(open).transpose()
    };
    let opened = nodes.iter().enumerate().map(open).collect();
    nix::sys::stat::umask(umask);
    opened
}

fn is_in_dev(path: &Path) -> bool {
    path.starts_with("/dev")
}

/// Whether /dev is somebody else's: a bind mount.
fn has_foreign_dev(spec: &Spec) -> bool {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    mounts.iter().any(|mount| {
        mount.destination() == Path::new("/dev")
            && (mount.typ().as_deref() == Some("bind")
                || mount
                    .options()
                    .iter()
                    .flatten()
                    .any(|o| o == "bind" || o == "rbind"))
    })
}

/// Those listed, then the usual ones; in a /dev of somebody else's there are none.
fn nodes(spec: &Spec) -> Result<Vec<Node<'_>>, InitError> {
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
    if has_foreign_dev(spec) {
        nodes.retain(|node| !is_in_dev(&node.path));
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

    /// Makes the node at `path`, as a mount.
    fn open(&self, path: &Path, users: Option<&IdMaps>) -> io::Result<OwnedFd> {
        self.create(path)?;
        if let Some(users) = users {
            let (uid, gid) = self.owner();
            let outside = (users.uid(uid.unwrap_or(0)), users.gid(gid.unwrap_or(0)));
            let (Some(uid), Some(gid)) = outside else {
                return Err(io::ErrorKind::InvalidInput.into());
            };
            chown(path, Some(uid), Some(gid))?;
        }
        sys::clone_mount(path, false)
    }

    /// Binds a node that was made before to this one's path.
    fn bind(&self, tree: &OwnedFd) -> io::Result<()> {
        sys::attach_mount(tree.as_fd(), &make_target(&self.path, false)?)
    }
}
