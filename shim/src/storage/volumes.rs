//! The mounts of an OCI spec: which of them name host files, and how those get
//! into the guest.
//!
//! ```text
//!  kubelet.rs    what a path of the kubelet's is
//!  share.rs      directories, by virtio-fs, once for the pod
//!  directory.rs  ConfigMap and its kin, read for a copy
//!  follow.rs     those copies, kept in step
//!  file.rs       files that are copied, and one that is copied back
//! ```
//!
//! A mount is first given a [`Way`], which touches nothing, and only when all
//! have one is anything mounted.

mod directory;
mod file;
mod follow;
mod kubelet;
mod share;
#[cfg(test)]
pub(crate) mod testing;

use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nacre_protocol::agent;
use nacre_protocol::guest::{SHARED_DIR, VOLUMES_DIR};
use nacre_protocol::idmap::IdMaps;
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, statfs};
use oci_spec::runtime::{Mount, Spec};
use sha2::{Digest, Sha256};

use super::{StorageError, devices, host};
use crate::oci::container_dir;
use kubelet::{Medium, Place};
use share::SharedDir;

pub use directory::CopyError;
pub use file::{MAX_LOG_BYTES, WriteBack};
pub use follow::{CopiedDir, Follower, Followers};

/// Size of `/dev/shm` where the host does not tell, as everywhere in Kubernetes.
const DEFAULT_SHM_BYTES: u64 = 64 << 20;
/// The only huge pages a guest is sure to have.
const HUGE_PAGE_BYTES: u64 = 2 << 20;
/// Files the runtime writes for a container. They are copied even though they
/// are mounted writable: nothing on the host reads them back.
pub(super) const RUNTIME_FILES: [&str; 3] = ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"];

/// A spec's mounts, translated.
#[derive(Debug, Default)]
pub(super) struct Volumes {
    /// What the guest's spec says.
    pub mounts: Vec<Mount>,
    /// Files to copy.
    pub files: Vec<agent::File>,
    /// Whether something lies in the shared directory.
    pub shared: bool,
    /// What the guest needs first.
    pub guest: GuestVolumes,
}

/// What the guest has for a container besides its root file system.
#[derive(Debug, Default)]
pub struct GuestVolumes {
    /// Memory the containers of the pod share.
    pub tmpfs: Vec<agent::TmpfsVolume>,
    /// Directories that are copied and kept in step.
    pub dirs: Vec<CopiedDir>,
    /// Parts of those in memory.
    pub subpaths: Vec<agent::Subpath>,
    /// Files that are copied back.
    pub write_back: Vec<WriteBack>,
}

/// Translates all mounts of `spec`, making the bind mounts the guest will see.
pub(super) fn translate(
    spec: &Spec,
    container_id: &str,
    shared_root: &Path,
) -> Result<Volumes, StorageError> {
    let container = Container {
        id: container_id,
        spec,
        shared_root,
    };
    let mut ways = Vec::new();
    let mut copied_bytes = 0;
    for mount in spec.mounts().iter().flatten() {
        let way = if is_bind(mount) {
            container.way(mount, &mut copied_bytes)?
        } else {
            Way::Guest
        };
        ways.push((mount, way));
    }
    let mut volumes = Volumes::default();
    for (index, (mount, way)) in ways.into_iter().enumerate() {
        container.go(&mut volumes, mount, way, index)?;
    }
    Ok(volumes)
}

/// How a mount gets into the guest.
#[derive(Debug)]
enum Way {
    /// It is the guest's own.
    Guest,
    /// A device node that the guest has as well.
    Node(&'static str),
    /// Memory of the guest.
    Tmpfs(agent::TmpfsVolume),
    /// A directory in such memory.
    Subpath(agent::TmpfsVolume, String),
    /// A copy that is kept in step.
    Follow(CopiedDir),
    /// A copy; whether it is copied back.
    Copy { back: bool },
    /// virtio-fs.
    ShareFile,
    /// virtio-fs.
    ShareDir,
}

struct Container<'a> {
    id: &'a str,
    spec: &'a Spec,
    shared_root: &'a Path,
}

impl Container<'_> {
    fn way(&self, mount: &Mount, copied_bytes: &mut u64) -> Result<Way, StorageError> {
        if has_option(mount, &["shared", "rshared"]) {
            let reason = "is to show the host what the container mounts, which another \
                          kernel cannot (mount propagation Bidirectional)";
            return Err(self.refuse(mount, reason));
        }
        let source = source_of(mount);
        let place = Place::of(source);
        if place.is_none()
            && let Some(shm) = shared_memory(mount)
        {
            return Ok(Way::Tmpfs(shm));
        }
        let metadata = std::fs::metadata(source).map_err(|e| self.lost(mount, e))?;
        if let Some(node) = kernel_node(&metadata) {
            return Ok(Way::Node(node));
        }
        if let Some(reason) = refusal(source, &metadata) {
            return Err(self.refuse(mount, reason));
        }
        if metadata.is_dir() {
            return self.way_of_dir(mount, place);
        }
        if let Some(Place::Subpath(volume)) = &place
            && matches!(Medium::of(volume), Ok(Medium::Memory | Medium::HugePages))
        {
            return Err(self.refuse(mount, "is a file of the host in an emptyDir in memory"));
        }
        let back = place == Some(Place::TerminationLog) && !is_read_only(mount);
        let copied = back || is_read_only(mount) || is_runtime_file(mount);
        let fits = metadata.len() <= file::MAX_FILE_BYTES
            && *copied_bytes + metadata.len() <= file::MAX_FILES_BYTES;
        if copied && fits {
            *copied_bytes += metadata.len();
            return Ok(Way::Copy { back });
        }
        Ok(Way::ShareFile)
    }

    fn way_of_dir(&self, mount: &Mount, place: Option<Place>) -> Result<Way, StorageError> {
        let source = source_of(mount);
        match place {
            Some(Place::Written) => {
                let dir = CopiedDir {
                    name: volume_name("dir", source),
                    source: source.to_owned(),
                };
                match dir.check() {
                    Ok(()) => return Ok(Way::Follow(dir)),
                    Err(error) => {
                        let error = crate::error::chain(&error);
                        tracing::info!(
                            container_id = self.id,
                            error,
                            "volume is shared, not copied"
                        );
                    }
                }
            }
            Some(Place::EmptyDir) => match Medium::of(source).map_err(|e| self.lost(mount, e))? {
                Medium::Disk => {}
                Medium::Memory | Medium::HugePages => {
                    return Ok(Way::Tmpfs(self.memory(mount, source)?));
                }
            },
            Some(Place::Subpath(volume)) => {
                if matches!(Medium::of(&volume), Ok(Medium::Memory | Medium::HugePages)) {
                    return self.subpath(mount, &volume);
                }
            }
            Some(Place::TerminationLog) | None => {}
        }
        Ok(Way::ShareDir)
    }

    /// The part of an emptyDir in memory that the kubelet bound for a `subPath`.
    fn subpath(&self, mount: &Mount, volume: &Path) -> Result<Way, StorageError> {
        let root = host::mounted_root(source_of(mount))?;
        let path = root.as_deref().and_then(|root| root.strip_prefix("/").ok());
        let Some(path) = path.and_then(Path::to_str) else {
            return Err(self.refuse(mount, "is no directory of its volume"));
        };
        Ok(Way::Subpath(self.memory(mount, volume)?, path.to_owned()))
    }

    /// Memory of the guest that is like the host's at `volume`.
    fn memory(&self, mount: &Mount, volume: &Path) -> Result<agent::TmpfsVolume, StorageError> {
        let memory = tmpfs(volume).map_err(|e| self.lost(mount, e))?;
        if ![0, HUGE_PAGE_BYTES].contains(&memory.page_bytes) {
            return Err(self.refuse(mount, "is made of huge pages of another size than 2 MiB"));
        }
        Ok(memory)
    }

    /// Does what `way` says.
    fn go(
        &self,
        volumes: &mut Volumes,
        mount: &Mount,
        way: Way,
        index: usize,
    ) -> Result<(), StorageError> {
        let own_path = |kind: &str| container_dir(self.id).join(kind).join(index.to_string());
        let mut options = guest_options(mount);
        let mut guest = mount.clone();
        // The guest maps the owners of its own files. It could not those of the
        // host's (virtio-fs): they come to it mapped. Nor those of a devtmpfs.
        let maps = IdMaps::of_mount(mount, self.spec);
        if matches!(way, Way::Node(_) | Way::ShareFile | Way::ShareDir) {
            options.retain(|option| option != "idmap" && option != "ridmap");
            guest.set_uid_mappings(None).set_gid_mappings(None);
        }
        let source = match way {
            Way::Guest => {
                volumes.mounts.push(mount.clone());
                return Ok(());
            }
            Way::Node(node) => PathBuf::from(node),
            Way::Tmpfs(volume) => {
                let source = Path::new(VOLUMES_DIR).join(&volume.name);
                volumes.guest.tmpfs.push(volume);
                source
            }
            Way::Subpath(volume, path) => {
                let target = own_path("subpaths");
                volumes.guest.subpaths.push(agent::Subpath {
                    volume: volume.name.clone(),
                    path,
                    target: target.to_string_lossy().into_owned(),
                    ..Default::default()
                });
                volumes.guest.tmpfs.push(volume);
                target
            }
            Way::Follow(dir) => {
                let source = Path::new(VOLUMES_DIR).join(&dir.name);
                volumes.guest.dirs.push(dir);
                // The kubelet's own rule, whatever the spec says.
                options.retain(|option| option != "rw");
                if !is_read_only(mount) {
                    options.push("ro".into());
                }
                source
            }
            Way::Copy { back } => {
                let path = own_path("files");
                self.copy(volumes, mount, &path, back)?;
                path
            }
            Way::ShareFile => {
                volumes.shared = true;
                self.share_file(mount, index, maps.as_ref())?
            }
            Way::ShareDir => {
                volumes.shared = true;
                let dir = SharedDir {
                    source: source_of(mount),
                    read_only: is_read_only(mount),
                    receives_mounts: has_option(mount, &["slave", "rslave"]),
                    maps: maps.as_ref(),
                    map_all: has_option(mount, &["ridmap"]),
                };
                dir.share(self.shared_root, self.id)?
            }
        };
        guest
            .set_typ(Some("bind".into()))
            .set_source(Some(source))
            .set_options(Some(options));
        volumes.mounts.push(guest);
        Ok(())
    }

    fn copy(
        &self,
        volumes: &mut Volumes,
        mount: &Mount,
        path: &Path,
        back: bool,
    ) -> Result<(), StorageError> {
        let source = source_of(mount);
        let guest_path = path.to_string_lossy().into_owned();
        if back {
            let back = WriteBack::open(source, &guest_path).map_err(|e| self.lost(mount, e))?;
            volumes.guest.write_back.push(back);
        }
        let file = file::read(source, guest_path).map_err(|e| self.lost(mount, e))?;
        volumes.files.push(file);
        Ok(())
    }

    /// Bind-mounts a file into the shared directory; returns where the guest
    /// sees it.
    fn share_file(
        &self,
        mount: &Mount,
        index: usize,
        maps: Option<&IdMaps>,
    ) -> Result<PathBuf, StorageError> {
        let place = Path::new(self.id).join("mounts").join(index.to_string());
        let target = self.shared_root.join(&place);
        if let Some(parent) = target.parent() {
            host::make_dir(parent)?;
        }
        host::make_file(&target)?;
        let (source, read_only) = (source_of(mount), is_read_only(mount));
        match maps {
            None => host::bind(source, &target, read_only)?,
            Some(maps) => {
                let users = host::users(maps, self.id)?;
                host::bind_mapped(source, &target, users.as_fd(), false)?;
                host::confine(&target, read_only, true)?;
            }
        }
        Ok(Path::new(SHARED_DIR).join(place))
    }

    fn lost(&self, mount: &Mount, source: std::io::Error) -> StorageError {
        StorageError::VolumeSource {
            container_id: self.id.into(),
            destination: mount.destination().clone(),
            source_path: source_of(mount).into(),
            source,
        }
    }

    fn refuse(&self, mount: &Mount, reason: &'static str) -> StorageError {
        StorageError::VolumeRefused {
            container_id: self.id.into(),
            destination: mount.destination().clone(),
            source_path: source_of(mount).into(),
            reason,
        }
    }
}

fn options_of(mount: &Mount) -> &[String] {
    mount.options().as_deref().unwrap_or_default()
}

fn source_of(mount: &Mount) -> &Path {
    mount.source().as_deref().unwrap_or(Path::new(""))
}

fn has_option(mount: &Mount, names: &[&str]) -> bool {
    options_of(mount)
        .iter()
        .any(|option| names.contains(&option.as_str()))
}

pub(super) fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind") || has_option(mount, &["bind", "rbind"])
}

fn is_read_only(mount: &Mount) -> bool {
    has_option(mount, &["ro", "rro"])
}

fn is_runtime_file(mount: &Mount) -> bool {
    RUNTIME_FILES
        .iter()
        .any(|path| mount.destination() == Path::new(path))
}

/// The node of the guest's that stands for one of the host's. The container's device rules
/// say who may use it, as under any runtime.
fn kernel_node(metadata: &std::fs::Metadata) -> Option<&'static str> {
    let rdev = metadata.rdev();
    let is_char = metadata.file_type().is_char_device();
    let node = || devices::kernel_node(libc::major(rdev).into(), libc::minor(rdev).into());
    is_char.then(node).flatten()
}

/// Why a source cannot be given to a VM, if so.
fn refusal(source: &Path, metadata: &std::fs::Metadata) -> Option<&'static str> {
    let kind = metadata.file_type();
    if kind.is_char_device() || kind.is_block_device() {
        Some(
            "is a device node of the host, which means nothing to the VM's kernel; pass devices as devices",
        )
    } else if source.starts_with("/dev") {
        Some("lies in the host's /dev, whose devices the VM does not have")
    } else if source.starts_with("/proc") || source.starts_with("/sys") {
        Some("lies in the host's /proc or /sys; the VM has its own")
    } else if kind.is_socket() {
        Some("is a unix socket, which cannot be reached from another kernel")
    } else if kind.is_fifo() {
        Some("is a named pipe, which cannot be reached from another kernel")
    } else {
        None
    }
}

/// The pod's `/dev/shm`: shared memory cannot span kernels, so what is a tmpfs
/// of the host, or one that nobody has made yet, is one of the guest's.
fn shared_memory(mount: &Mount) -> Option<agent::TmpfsVolume> {
    if mount.destination() != Path::new("/dev/shm") {
        return None;
    }
    let source = source_of(mount);
    match statfs(source) {
        Ok(stat) if stat.filesystem_type() == TMPFS_MAGIC => tmpfs(source).ok(),
        Ok(_) => None,
        Err(_) => Some(agent::TmpfsVolume {
            name: volume_name("mem", source),
            size_bytes: DEFAULT_SHM_BYTES,
            mode: 0o1777,
            ..Default::default()
        }),
    }
}

/// A tmpfs or a hugetlbfs for the guest that is like the one at `source`.
fn tmpfs(source: &Path) -> std::io::Result<agent::TmpfsVolume> {
    let metadata = std::fs::metadata(source)?;
    let stat = statfs(source)?;
    // Of hugetlbfs it is the page's (statfs(2)).
    let block_bytes = u64::try_from(stat.block_size()).unwrap_or(0);
    let is_huge = stat.filesystem_type() == HUGETLBFS_MAGIC;
    Ok(agent::TmpfsVolume {
        name: volume_name("mem", source),
        size_bytes: stat.blocks().saturating_mul(block_bytes),
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        page_bytes: if is_huge { block_bytes } else { 0 },
        ..Default::default()
    })
}

/// A volume's name in the guest: the same for all containers of the pod that
/// mount it, and nothing of the host's paths in it.
fn volume_name(kind: &str, source: &Path) -> String {
    let hash = Sha256::new_with_prefix(source.as_os_str().as_bytes());
    format!("{kind}-{}", short_hash(hash))
}

/// 128 bits of a hash, in hexadecimal.
fn short_hash(hash: Sha256) -> String {
    let digest = hash.finalize();
    digest.iter().take(16).map(|b| format!("{b:02x}")).collect()
}

/// Options of the bind mount in the guest; it is always one.
fn guest_options(mount: &Mount) -> Vec<String> {
    let mut options = options_of(mount).to_vec();
    if !has_option(mount, &["bind", "rbind"]) {
        options.insert(0, "rbind".into());
    }
    options
}
