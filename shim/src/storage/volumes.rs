//! The mounts of an OCI spec: which of them name host files, and how those get
//! into the guest.

use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nacre_protocol::agent;
use nacre_protocol::guest::{POD_SHM, SHARED_DIR};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use oci_spec::runtime::{Mount, Spec};

use super::{StorageError, host};
use crate::oci::{container_dir, kubernetes};

/// Largest file that is copied into the guest instead of shared.
const MAX_COPY_BYTES: u64 = 1 << 20;
/// Size of `/dev/shm` where the host does not tell, as everywhere in Kubernetes.
const DEFAULT_SHM_BYTES: u64 = 64 << 20;
/// Files the runtime writes for a container. They are copied even though they
/// are mounted writable: nothing on the host reads them back.
const RUNTIME_FILES: [&str; 3] = ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"];

/// A spec's mounts, translated.
#[derive(Debug, Default)]
pub(super) struct Volumes {
    /// What the guest's spec says.
    pub mounts: Vec<Mount>,
    /// Files to copy.
    pub files: Vec<agent::File>,
    /// Whether something lies in the shared directory.
    pub shared: bool,
}

/// Translates all mounts of `spec`, making the bind mounts the guest will see.
pub(super) fn translate(
    spec: &Spec,
    container_id: &str,
    shared_root: &Path,
) -> Result<Volumes, StorageError> {
    let mut volumes = Volumes::default();
    let container = Container {
        id: container_id,
        sandbox_id: kubernetes::joined_sandbox(spec),
        shared_root,
    };
    for (index, mount) in spec.mounts().iter().flatten().enumerate() {
        if is_bind(mount) {
            container.add_bind(&mut volumes, mount, index)?;
        } else {
            volumes.mounts.push(mount.clone());
        }
    }
    Ok(volumes)
}

struct Container<'a> {
    id: &'a str,
    /// The pod's, if it is in one.
    sandbox_id: Option<&'a str>,
    shared_root: &'a Path,
}

impl Container<'_> {
    fn add_bind(
        &self,
        volumes: &mut Volumes,
        mount: &Mount,
        index: usize,
    ) -> Result<(), StorageError> {
        if mount.uid_mappings().is_some() || mount.gid_mappings().is_some() {
            return Err(self.refuse(mount, "has an id mapping, which virtio-fs cannot carry"));
        }
        if mount.destination() == Path::new("/dev/shm") {
            volumes.mounts.push(self.shared_memory(mount));
            return Ok(());
        }
        let metadata = std::fs::metadata(source_of(mount)).map_err(|e| self.lost(mount, e))?;
        if let Some(reason) = refusal(source_of(mount), &metadata) {
            return Err(self.refuse(mount, reason));
        }
        let guest_source = if metadata.is_file() && is_copied(mount, &metadata) {
            let file = self.copy(mount, index)?;
            let path = PathBuf::from(&file.path);
            volumes.files.push(file);
            path
        } else {
            volumes.shared = true;
            self.share(mount, index, metadata.is_dir())?
        };
        let mut guest = mount.clone();
        guest
            .set_typ(Some("bind".into()))
            .set_source(Some(guest_source))
            .set_options(Some(guest_options(mount)));
        volumes.mounts.push(guest);
        Ok(())
    }

    /// Shared memory cannot span kernels, so what is a bind of a host tmpfs
    /// becomes one of the guest: the pod's, which CRI keeps in a directory of
    /// the sandbox's name, or else one of the same size.
    fn shared_memory(&self, mount: &Mount) -> Mount {
        let is_pods = self
            .sandbox_id
            .is_some_and(|id| source_of(mount).ends_with(Path::new(id).join("shm")));
        let mut options = ["nosuid", "noexec", "nodev"].map(str::to_owned).to_vec();
        let (kind, source) = if is_pods {
            options.push("rbind".into());
            ("bind", POD_SHM)
        } else {
            options.push("mode=1777".into());
            options.push(format!("size={}k", shm_bytes(source_of(mount)) / 1024));
            ("tmpfs", "shm")
        };
        let mut shm = Mount::default();
        shm.set_destination("/dev/shm".into())
            .set_typ(Some(kind.into()))
            .set_source(Some(source.into()))
            .set_options(Some(options));
        shm
    }

    /// Bind-mounts the source into the shared directory; returns where the
    /// guest sees it.
    fn share(&self, mount: &Mount, index: usize, is_dir: bool) -> Result<PathBuf, StorageError> {
        let place = Path::new(self.id).join("mounts").join(index.to_string());
        let target = self.shared_root.join(&place);
        if is_dir {
            host::make_dir(&target)?;
        } else {
            if let Some(parent) = target.parent() {
                host::make_dir(parent)?;
            }
            host::make_file(&target)?;
        }
        host::bind(source_of(mount), &target, is_read_only(mount))?;
        Ok(Path::new(SHARED_DIR).join(place))
    }

    fn copy(&self, mount: &Mount, index: usize) -> Result<agent::File, StorageError> {
        let file = std::fs::File::open(source_of(mount)).map_err(|e| self.lost(mount, e))?;
        let metadata = file.metadata().map_err(|e| self.lost(mount, e))?;
        let mut contents = Vec::new();
        // Bounded, in case the file grows while it is read.
        file.take(MAX_COPY_BYTES)
            .read_to_end(&mut contents)
            .map_err(|e| self.lost(mount, e))?;
        let path = container_dir(self.id).join("files").join(index.to_string());
        Ok(agent::File {
            path: path.to_string_lossy().into_owned(),
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid(),
            gid: metadata.gid(),
            contents,
            ..Default::default()
        })
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

fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind") || has_option(mount, &["bind", "rbind"])
}

fn is_read_only(mount: &Mount) -> bool {
    has_option(mount, &["ro", "rro"])
}

/// Whether a regular file goes into the guest as a copy.
fn is_copied(mount: &Mount, metadata: &std::fs::Metadata) -> bool {
    let by_runtime = RUNTIME_FILES
        .iter()
        .any(|path| mount.destination() == Path::new(path));
    metadata.len() <= MAX_COPY_BYTES && (is_read_only(mount) || by_runtime)
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

/// Size of the `/dev/shm` of a pod whose sandbox container has `spec`.
pub fn pod_shm_bytes(spec: &Spec) -> u64 {
    let mut mounts = spec.mounts().iter().flatten();
    let shm = mounts.find(|mount| mount.destination() == Path::new("/dev/shm"));
    shm.map_or(DEFAULT_SHM_BYTES, |mount| shm_bytes(source_of(mount)))
}

/// Size of a tmpfs of the host.
fn shm_bytes(source: &Path) -> u64 {
    statfs(source)
        .ok()
        .filter(|stat| stat.filesystem_type() == TMPFS_MAGIC)
        .and_then(|stat| {
            let block_bytes = u64::try_from(stat.block_size()).ok()?;
            stat.blocks().checked_mul(block_bytes)
        })
        .unwrap_or(DEFAULT_SHM_BYTES)
}

/// Options of the bind mount in the guest; it is always one.
fn guest_options(mount: &Mount) -> Vec<String> {
    let mut options = options_of(mount).to_vec();
    if !has_option(mount, &["bind", "rbind"]) {
        options.insert(0, "rbind".into());
    }
    options
}
