//! The container's file system: mounts, pivot_root, read-only and masked paths.
//!
//! Sources of bind mounts are guest paths and destinations are container
//! paths, which the image may fill with symbolic links. Neither needs care of
//! its own: sources become detached mount objects before pivot_root, and
//! everything is attached after it, when every path can only resolve inside
//! the container. For a container with users of its own the former happens
//! before the process enters their namespace (`users.rs`).

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nacre_protocol::idmap::{IdMaps, map_mount};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use oci_spec::runtime::{Linux, LinuxNamespaceType, Mount, Spec};

use super::devices;
use super::error::{InitError, Step};
use super::namespaces;
use super::sys::{self, MountAttr};
use crate::mount::{MountOptions, detached, propagation};

/// Longest chain of symbolic links followed to create a destination.
const MAX_LINKS: usize = 40;

/// A mount of the specification, its source already opened.
struct Prepared<'a> {
    mount: &'a Mount,
    options: MountOptions,
    tree: Option<OwnedFd>,
    is_dir: bool,
}

/// What a container's mounts and devices are made from, opened while this process
/// may.
pub struct Sources<'a> {
    mounts: Vec<Prepared<'a>>,
    /// See [`devices::open`].
    devices: Vec<Option<OwnedFd>>,
}

impl<'a> Sources<'a> {
    /// Opens them. `cgroup` is the container's own cgroup directory, shown where
    /// the specification asks for cgroups without a cgroup namespace. `users` are
    /// those of a container that has its own; this process does not yet.
    ///
    /// # Errors
    ///
    /// The step that failed.
    pub fn open(spec: &'a Spec, cgroup: &Path, users: Option<&IdMaps>) -> Result<Self, InitError> {
        let own_cgroups = has(spec, LinuxNamespaceType::Cgroup);
        let cgroup = (!own_cgroups).then_some(cgroup);
        let mut mounts = Vec::new();
        for mount in spec.mounts().iter().flatten() {
            let mut prepared = prepare(mount, spec, cgroup)?;
            if users.is_some() && shows_guest(mount, spec) {
                prepared.tree = Some(new_tree(&prepared)?);
            }
            if let (Some(tree), Some(_)) = (&prepared.tree, users) {
                // What these are copies of was not made a slave: see `enter`.
                let attr = MountAttr {
                    propagation: MsFlags::MS_SLAVE.bits(),
                    ..MountAttr::default()
                };
                sys::set_mount_attr(tree.as_fd(), attr, true).step(|| "make a mount a slave")?;
            }
            mounts.push(prepared);
        }
        let devices = devices::open(spec, users)?;
        Ok(Self { mounts, devices })
    }

    /// A procfs or sysfs is mounted in a user namespace while another is in sight
    /// (`SB_I_USERNS_VISIBLE`): before the old root is gone.
    fn mount_visible(&mut self) -> Result<(), InitError> {
        for prepared in &mut self.mounts {
            let kind = prepared.mount.typ().as_deref();
            if prepared.tree.is_none() && matches!(kind, Some("proc" | "sysfs")) {
                prepared.tree = Some(new_tree(prepared)?);
            }
        }
        Ok(())
    }
}

/// Whether a mount shows a namespace that the container shares with the guest, in
/// which the container's root may mount nothing.
fn shows_guest(mount: &Mount, spec: &Spec) -> bool {
    match mount.typ().as_deref() {
        Some("sysfs") => !has(spec, LinuxNamespaceType::Network),
        Some("mqueue") => !has(spec, LinuxNamespaceType::Ipc),
        _ => false,
    }
}

fn has(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    namespaces(spec)
        .iter()
        .any(|namespace| namespace.typ() == kind)
}

fn new_tree(prepared: &Prepared<'_>) -> Result<OwnedFd, InitError> {
    let kind = prepared.mount.typ().as_deref().unwrap_or_default();
    detached(kind, kind, &prepared.options).step(|| {
        format!(
            "mount {kind} for {}",
            prepared.mount.destination().display()
        )
    })
}

/// Makes the container's mounts and moves this process into them. `sources` are
/// there already if the process is in a user namespace of the container's; `cgroup`
/// is as in [`Sources::open`].
///
/// # Errors
///
/// `Invalid` for a specification without a root, else the step that failed.
pub fn enter<'a>(
    spec: &'a Spec,
    cgroup: &Path,
    sources: Option<Sources<'a>>,
) -> Result<(), InitError> {
    let root = spec
        .root()
        .as_ref()
        .ok_or_else(|| InitError::Invalid("the specification has no root".into()))?;
    // Slave: what the guest mounts later shows up, nothing leaks back.
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SLAVE, NONE)
        .step(|| "make the mounts slaves")?;
    let sources = match sources {
        Some(mut sources) => {
            sources.mount_visible()?;
            sources
        }
        None => Sources::open(spec, cgroup, None)?,
    };
    pivot(root.path())?;
    let umask = nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    for mount in &sources.mounts {
        place(mount)?;
    }
    devices::create(spec, &sources.devices)?;
    nix::sys::stat::umask(umask);
    make_cwd(spec)?;
    if let Some(linux) = spec.linux() {
        protect(linux)?;
    }
    seal_root(spec, root.readonly().unwrap_or(false))
}

const NONE: Option<&str> = None;

fn prepare<'a>(
    mount: &'a Mount,
    spec: &Spec,
    cgroup: Option<&Path>,
) -> Result<Prepared<'a>, InitError> {
    let mut options = MountOptions::parse(mount.options().as_deref().unwrap_or_default());
    let mut source = mount.source().clone();
    if mount.typ().as_deref() == Some("bind") {
        options.bind = true;
    }
    if let (Some("cgroup" | "cgroup2"), Some(cgroup)) = (mount.typ().as_deref(), cgroup) {
        options.bind = true;
        source = Some(cgroup.to_owned());
    }
    let mut prepared = Prepared {
        mount,
        options,
        tree: None,
        is_dir: true,
    };
    if prepared.options.bind {
        let source = source.ok_or_else(|| {
            InitError::Invalid(format!("mount on {:?} has no source", mount.destination()))
        })?;
        let what = || format!("bind mount source {}", source.display());
        prepared.is_dir = fs::metadata(&source).step(what)?.is_dir();
        let tree = sys::clone_mount(&source, prepared.options.recursive).step(what)?;
        if let Some(maps) = IdMaps::of_mount(mount, spec) {
            let what = || format!("map the owners of {}", mount.destination().display());
            let users = maps.namespace().step(what)?;
            map_mount(tree.as_fd(), users.as_fd(), prepared.options.map_tree).step(what)?;
        }
        prepared.tree = Some(tree);
    }
    Ok(prepared)
}

fn pivot(root: &Path) -> Result<(), InitError> {
    let what = || format!("pivot_root to {}", root.display());
    // pivot_root(2) wants a mount point.
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(root), root, NONE, flags, NONE).step(what)?;
    nix::unistd::chdir(root).step(what)?;
    // The same directory twice stacks the old root over the new one, where it
    // can be unmounted at once (pivot_root(2), NOTES).
    nix::unistd::pivot_root(".", ".").step(what)?;
    umount2(".", MntFlags::MNT_DETACH).step(what)?;
    nix::unistd::chdir("/").step(what)
}

fn place(prepared: &Prepared<'_>) -> Result<(), InitError> {
    let what = || {
        let kind = prepared.mount.typ().as_deref().unwrap_or("bind");
        format!("mount {kind} on {}", prepared.mount.destination().display())
    };
    let target = make_target(prepared.mount.destination(), prepared.is_dir).step(what)?;
    match &prepared.tree {
        Some(tree) => attach(tree, &prepared.options, &target).step(what)?,
        None => mount_new(prepared, &target).step(what)?,
    }
    if let Some((kind, tree)) = prepared.options.propagation {
        let attr = MountAttr {
            propagation: kind.bits(),
            ..MountAttr::default()
        };
        set_attr(&target, attr, tree).step(what)?;
    }
    Ok(())
}

fn attach(tree: &OwnedFd, options: &MountOptions, target: &Path) -> io::Result<()> {
    if !options.attr.is_empty() {
        sys::set_mount_attr(tree.as_fd(), options.attr, false)?;
    }
    if !options.tree_attr.is_empty() {
        sys::set_mount_attr(tree.as_fd(), options.tree_attr, true)?;
    }
    sys::attach_mount(tree.as_fd(), target)
}

fn mount_new(prepared: &Prepared<'_>, target: &Path) -> io::Result<()> {
    let kind = match prepared.mount.typ().as_deref() {
        // The guest has cgroup v2 only.
        Some("cgroup") => "cgroup2",
        Some(kind) => kind,
        None => return Err(io::Error::other("mount without a type")),
    };
    let mut data = prepared.options.data.clone();
    if kind == "tmpfs" && !prepared.options.has_data("mode") {
        // An image's /tmp stays 1777 when a tmpfs covers it, as under runc.
        let mode = fs::metadata(target)?.permissions().mode() & 0o7777;
        let comma = if data.is_empty() { "" } else { "," };
        data = format!("{data}{comma}mode={mode:o}");
    }
    let source = prepared.mount.source().as_deref();
    let source = source.unwrap_or_else(|| Path::new(kind));
    mount(
        Some(source),
        target,
        Some(kind),
        prepared.options.flags,
        Some(data.as_str()).filter(|data| !data.is_empty()),
    )?;
    if !prepared.options.tree_attr.is_empty() {
        set_attr(target, prepared.options.tree_attr, true)?;
    }
    Ok(())
}

fn set_attr(path: &Path, attr: MountAttr, recursive: bool) -> io::Result<()> {
    let file = nix::fcntl::open(
        path,
        nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )?;
    sys::set_mount_attr(file.as_fd(), attr, recursive)
}

/// Makes sure a destination exists, and returns it with a dangling final link
/// (an image's /etc/resolv.conf, say) resolved.
pub(super) fn make_target(destination: &Path, is_dir: bool) -> io::Result<PathBuf> {
    let mut target = Path::new("/").join(destination);
    for _ in 0..MAX_LINKS {
        if target.exists() {
            return Ok(target);
        }
        let parent = target.parent().unwrap_or(Path::new("/")).to_owned();
        match fs::read_link(&target) {
            Ok(link) => target = parent.join(link),
            Err(_) if is_dir => {
                create_dirs(&target)?;
                return Ok(target);
            }
            Err(_) => {
                create_dirs(&parent)?;
                File::create(&target)?.set_permissions(fs::Permissions::from_mode(0o644))?;
                return Ok(target);
            }
        }
    }
    Err(nix::errno::Errno::ELOOP.into())
}

/// Directories the image lacks get the usual mode, whatever the umask is now.
fn create_dirs(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
}

/// As runc does: a working directory the image lacks is made.
fn make_cwd(spec: &Spec) -> Result<(), InitError> {
    let Some(process) = spec.process() else {
        return Ok(());
    };
    let cwd = process.cwd();
    if !cwd.is_absolute() {
        return Err(InitError::Invalid(format!("cwd {cwd:?} is not absolute")));
    }
    if cwd.exists() {
        return Ok(());
    }
    create_dirs(cwd).step(|| format!("create cwd {}", cwd.display()))
}

/// Applies `readonlyPaths` and `maskedPaths`.
fn protect(linux: &Linux) -> Result<(), InitError> {
    for path in linux.readonly_paths().iter().flatten() {
        skip_missing(make_readonly(Path::new(path))).step(|| format!("make {path} read-only"))?;
    }
    for path in linux.masked_paths().iter().flatten() {
        skip_missing(mask(Path::new(path))).step(|| format!("mask {path}"))?;
    }
    Ok(())
}

fn skip_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

const READ_ONLY: MountAttr = MountAttr {
    set: libc::MOUNT_ATTR_RDONLY,
    clear: 0,
    propagation: 0,
};

fn make_readonly(path: &Path) -> io::Result<()> {
    let tree = sys::clone_mount(path, true)?;
    sys::set_mount_attr(tree.as_fd(), READ_ONLY, false)?;
    sys::attach_mount(tree.as_fd(), path)
}

fn mask(path: &Path) -> io::Result<()> {
    if fs::metadata(path)?.is_dir() {
        let flags =
            MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(
            Some("tmpfs"),
            path,
            Some("tmpfs"),
            flags,
            Some("size=0,nr_inodes=1"),
        )
        .or_else(|_| mount(Some("tmpfs"), path, Some("tmpfs"), flags, NONE))?;
        return Ok(());
    }
    let null = sys::clone_mount(Path::new("/dev/null"), false)?;
    sys::attach_mount(null.as_fd(), path)
}

/// `root.readonly` and `linux.rootfsPropagation`, last: nothing is created
/// after this.
fn seal_root(spec: &Spec, readonly: bool) -> Result<(), InitError> {
    let root = Path::new("/");
    if readonly {
        set_attr(root, READ_ONLY, false).step(|| "make the root read-only")?;
    }
    let wanted = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.rootfs_propagation().as_deref());
    let Some(name) = wanted.filter(|name| !name.is_empty()) else {
        return Ok(());
    };
    let (kind, tree) = propagation(name)
        .ok_or_else(|| InitError::Invalid(format!("rootfsPropagation {name:?}")))?;
    let attr = MountAttr {
        propagation: kind.bits(),
        ..MountAttr::default()
    };
    set_attr(root, attr, tree).step(|| format!("make the root {name}"))
}
