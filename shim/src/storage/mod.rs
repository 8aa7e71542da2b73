//! A container's files: from what containerd hands over to what the guest gets.
//!
//! The shim calls [`prepare`] when a container is created and [`release`] when
//! it is gone. What happens in between:
//!
//! ```text
//!  rootfs overlay, bind   --mount(2)--> shared_root/<id>/rootfs     --virtio-fs--> bind
//!  rootfs EROFS, ext4     --open(2)---> HostDisk                    --virtio-blk-> mount, overlay
//!  volume directory       --mount(2)--> shared_root/.volumes/<hash> --virtio-fs--> bind
//!  other file             --mount(2)--> shared_root/<id>/mounts/<n> --virtio-fs--> bind
//!  small read-only file   --read(2)---> File                        --agent RPC--> bind
//!  ConfigMap and the like --inotify---> GuestVolumes                --agent RPC--> bind
//!  memory (emptyDir, shm)               GuestVolumes                --agent RPC--> bind
//!  block device           --open(2)---> BlockDevice                 --virtio-blk-> device node
//! ```
//!
//! `shared_root` is what the pod's virtio-fs daemon serves, all of it, to a
//! hostile guest. Two rules follow. Read-only is set on the host's mount, since
//! the guest's own `ro` flag binds only an honest kernel; and everything shared
//! is mounted `nodev`. The mounts live in the shim's mount namespace.
//!
//! `docs/storage.md` has the table of what goes which way, and why.

pub(crate) mod devices;
mod host;
mod pod_files;
mod rootfs;
mod volumes;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nacre_protocol::agent;
use nacre_protocol::channel::FdList;
use nacre_protocol::vm::DiskBacking;
use oci_spec::runtime::Spec;

use crate::devices::System;
use crate::sandbox::{ContainerConfig, DiskSlots, Slot};

pub use devices::BlockDevice;
pub use pod_files::PodFiles;
#[cfg(test)]
pub(crate) use volumes::testing;
pub use volumes::{CopyError, Follower, Followers, GuestVolumes, MAX_LOG_BYTES, WriteBack};

/// Below a container's shared directory: EROFS layers the host had to mount.
const LAYERS_DIR: &str = "layers";

/// A container's storage, host and guest side.
#[derive(Debug)]
pub struct Prepared {
    /// virtio-blk devices the guest needs before the container is created.
    pub disks: Vec<HostDisk>,
    /// Empty disks of a machine that runs, each of which becomes one of `disks`, in this
    /// order; none where the machine is made with them.
    pub slots: Vec<Slot>,
    /// Whether the container needs the pod's shared directory.
    pub uses_shared_dir: bool,
    /// Block devices the container gets.
    pub block_devices: Vec<BlockDevice>,
    /// PCI devices the container gets. Not of its files' making: whoever knows the
    /// machine's devices fills it.
    pub pci_devices: PciDevices,
    /// Mounts the agent makes, in this order.
    pub storages: Vec<agent::Storage>,
    /// Files the agent writes.
    pub files: Vec<agent::File>,
    /// Volumes the guest holds itself.
    pub volumes: GuestVolumes,
    /// The container's spec as the agent gets it.
    pub guest_spec: Spec,
}

/// PCI devices of the host, as a guest has them.
#[derive(Debug, Default)]
pub struct PciDevices {
    /// Where they are.
    pub addresses: Vec<String>,
    /// The driver images for them.
    pub drivers: Vec<agent::Driver>,
}

/// A virtio-blk device to be.
#[derive(Debug)]
pub struct HostDisk {
    /// Serial number the guest finds it by, at most 20 bytes.
    pub serial: String,
    /// Whether the guest may not write.
    pub read_only: bool,
    /// Where the bytes are.
    pub backing: HostBacking,
}

/// The bytes of a [`HostDisk`].
#[derive(Debug)]
pub enum HostBacking {
    /// One file or block device.
    Whole(File),
    /// Read-only files, each a partition; `MAX_PARTITIONS` at most.
    Partitions(Vec<File>),
}

impl HostBacking {
    /// What a message says of it that takes its descriptors along.
    pub fn describe<'a>(&'a self, list: &mut FdList<'a>) -> DiskBacking {
        match self {
            Self::Whole(file) => DiskBacking::Whole(list.push(file.as_fd())),
            Self::Partitions(files) => {
                let files = files.iter().map(|file| list.push(file.as_fd()));
                DiskBacking::Partitions(files.collect())
            }
        }
    }

    /// Size of its logical sectors.
    ///
    /// # Errors
    ///
    /// Those of the ioctl that asks a block device.
    pub fn sector_bytes(&self) -> io::Result<u32> {
        match self {
            Self::Whole(file) => devices::sector_bytes(file),
            Self::Partitions(_) => Ok(devices::USUAL_SECTOR_BYTES),
        }
    }
}

/// Errors of this module.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// A container id that cannot be a directory name.
    #[error("container id {0:?} is not a plain name")]
    ContainerId(String),
    /// A rootfs mount of a kind nacre has no answer to.
    #[error("container {container_id}: rootfs mount of type {fstype:?} is not supported: {reason}")]
    UnsupportedRootfs {
        /// Whose.
        container_id: String,
        /// Type as containerd named it.
        fstype: String,
        /// What would work.
        reason: String,
    },
    /// A rootfs mount that contradicts itself.
    #[error("container {container_id}: rootfs mount {fstype:?} has a bad option {option:?}")]
    RootfsOption {
        /// Whose.
        container_id: String,
        /// Type as containerd named it.
        fstype: String,
        /// The option.
        option: String,
    },
    /// More layers than Linux stacks.
    #[error(
        "container {container_id}: the image has {layers} layers, and Linux's overlay file system \
         stacks {limit} at most; build the image with fewer"
    )]
    TooManyLayers {
        /// Whose.
        container_id: String,
        /// How many there are.
        layers: usize,
        /// How many there may be.
        limit: usize,
    },
    /// Neither mounts nor a root path.
    #[error("container {0}: neither rootfs mounts nor a root path")]
    NoRootfs(String),
    /// The VM runs, and this rootfs would need more of its empty disks than there are.
    #[error(
        "container {container_id}: rootfs mount of type {fstype:?} needs a disk, and the pod's \
         running virtual machine has too few empty ones left: raise root_disks in nacre.toml, or \
         use the overlayfs snapshotter for pods"
    )]
    NeedsDisk {
        /// Whose.
        container_id: String,
        /// Type as containerd named it.
        fstype: String,
    },
    /// A volume whose source is not there.
    #[error("mount {destination}: source {source_path} of container {container_id}")]
    VolumeSource {
        /// Whose.
        container_id: String,
        /// Where it would be mounted.
        destination: PathBuf,
        /// What is missing or unreadable.
        source_path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A volume that makes no sense in a VM.
    #[error("mount {destination}: {source_path} of container {container_id} {reason}")]
    VolumeRefused {
        /// Whose.
        container_id: String,
        /// Where it would be mounted.
        destination: PathBuf,
        /// What was asked for.
        source_path: PathBuf,
        /// Why not.
        reason: &'static str,
    },
    /// A device node that makes no sense in a VM.
    #[error("device {path} of container {container_id} {reason}")]
    Device {
        /// Whose.
        container_id: String,
        /// Its node in the container.
        path: PathBuf,
        /// Why not.
        reason: String,
        /// The system's reason.
        source: Option<io::Error>,
    },
    /// The users of a container cannot be mapped.
    #[error("container {container_id}: map its users to others")]
    Users {
        /// Whose.
        container_id: String,
        /// Why not.
        source: io::Error,
    },
    /// A volume that cannot be given to the guest as a copy.
    #[error("container {container_id}: copy a volume into the guest")]
    VolumeCopy {
        /// Whose.
        container_id: String,
        /// Why not. Several containers may have waited for it.
        source: Arc<CopyError>,
    },
    /// A system call on the host failed.
    #[error("cannot {action} {}", path.display())]
    Host {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Prepared {
    /// Of a pod's sandbox container: it has no process, so it needs no files.
    pub fn nothing(spec: &Spec) -> Self {
        Self {
            disks: Vec::new(),
            slots: Vec::new(),
            uses_shared_dir: false,
            block_devices: Vec::new(),
            pci_devices: PciDevices::default(),
            storages: Vec::new(),
            files: Vec::new(),
            volumes: GuestVolumes::default(),
            guest_spec: spec.clone(),
        }
    }
}

impl StorageError {
    fn host(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Host {
            action,
            path,
            source,
        }
    }
}

/// Prepares a container's storage: for a VM that has yet to boot, or for one that runs and
/// has these slots. Where too few of them are empty, EROFS layers are mounted on the host
/// and shared. `system` knows the PCI devices among the spec's nodes, which are not storage.
///
/// # Errors
///
/// Anything that cannot be given to the guest as asked; nothing stays mounted then.
/// `NeedsDisk` for what only a disk can be.
pub fn prepare(
    system: &System,
    config: &ContainerConfig,
    shared_root: &Path,
    slots: Option<&DiskSlots>,
) -> Result<Prepared, StorageError> {
    let container_id = config.id.as_str();
    check_id(container_id)?;
    let on_disks = rootfs::Source::of(config, true)?;
    let (source, slots) = match slots {
        None => (on_disks, Vec::new()),
        Some(slots) => match slots.take_roots(on_disks.disks()) {
            Some(taken) => (on_disks, taken),
            None => (rootfs::Source::of(config, false)?, Vec::new()),
        },
    };
    let prepared = assemble(system, &source, config, shared_root, slots);
    if prepared.is_err()
        && let Err(error) = release(shared_root, container_id)
    {
        tracing::warn!(container_id, %error, "cannot undo half-made mounts");
    }
    prepared
}

/// Whether a container's root file system could be on disks. All containers of a pod have
/// theirs of one snapshotter, so that the first one tells of the others.
pub fn has_root_on_disks(config: &ContainerConfig) -> bool {
    let source = rootfs::Source::of(config, true);
    // What is wrong with it, its container is told when it is prepared.
    source.is_ok_and(|source| source.disks() > 0)
}

fn assemble(
    system: &System,
    source: &rootfs::Source,
    config: &ContainerConfig,
    shared_root: &Path,
    slots: Vec<Slot>,
) -> Result<Prepared, StorageError> {
    let (container_id, spec) = (config.id.as_str(), &*config.spec);
    let block_devices = devices::open(system, spec, container_id)?;
    let root = source.realize(container_id, shared_root, &slots)?;
    let volumes = volumes::translate(spec, container_id, shared_root)?;
    Ok(Prepared {
        uses_shared_dir: root.shared || volumes.shared,
        disks: root.disks,
        slots,
        block_devices,
        pci_devices: PciDevices::default(),
        storages: root.storages,
        files: volumes.files,
        volumes: volumes.guest,
        guest_spec: crate::oci::guest_spec(spec, container_id, volumes.mounts),
    })
}

/// Prepares what a container needs besides its root file system, which stays
/// the host's.
#[cfg(test)]
pub(crate) fn prepare_volumes(
    system: &System,
    spec: &Spec,
    container_id: &str,
    shared_root: &Path,
) -> Result<Prepared, StorageError> {
    let block_devices = devices::open(system, spec, container_id)?;
    let volumes = volumes::translate(spec, container_id, shared_root)?;
    let mut guest_spec = spec.clone();
    guest_spec.set_mounts(Some(volumes.mounts));
    Ok(Prepared {
        disks: Vec::new(),
        slots: Vec::new(),
        uses_shared_dir: volumes.shared,
        block_devices,
        pci_devices: PciDevices::default(),
        storages: Vec::new(),
        files: volumes.files,
        volumes: volumes.guest,
        guest_spec,
    })
}

/// Unmounts and removes what [`prepare`] made for this container alone. Doing so
/// twice is no error. Shared directories stay for the pod.
///
/// # Errors
///
/// A mount that does not come off. The files below it are never touched: only
/// empty directories and the placeholders of bind mounts are removed.
pub fn release(shared_root: &Path, container_id: &str) -> Result<(), StorageError> {
    check_id(container_id)?;
    let dir = shared_root.join(container_id);
    host::unmount_below(&dir)?;
    host::remove_placeholders(&dir.join("mounts"))?;
    host::remove_placeholders(&dir.join(LAYERS_DIR))?;
    host::remove_dir(&dir.join("rootfs"))?;
    host::remove_dir(&dir)
}

/// containerd checks ids too, but this one becomes a host path.
fn check_id(container_id: &str) -> Result<(), StorageError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if !container_id.is_empty()
        && container_id.len() <= 128
        && container_id.bytes().all(plain)
        && !container_id.starts_with('.')
    {
        Ok(())
    } else {
        Err(StorageError::ContainerId(container_id.into()))
    }
}

#[cfg(test)]
mod tests;
