//! Taking the way a [`Source`] says: mounts on the host, descriptors for disks,
//! and the mounts the agent is to make.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nacre_protocol::agent;
use nacre_protocol::guest::SHARED_DIR;
use nacre_protocol::idmap::IdMaps;
use nacre_protocol::vm::MAX_PARTITIONS;
use sha2::{Digest, Sha256};

use super::{HostMount, Root, Source, Upper};
use crate::oci::{container_dir, guest_rootfs};
use crate::sandbox::Slot;
use crate::storage::{HostBacking, HostDisk, LAYERS_DIR, StorageError, host};

/// A block of the smallest image of either kind.
const MIN_IMAGE_BYTES: u64 = 4096;

impl Source {
    /// Mounts or opens the source, for disks of these slots or of its own.
    pub fn realize(
        &self,
        container_id: &str,
        shared_root: &Path,
        slots: &[Slot],
    ) -> Result<Root, StorageError> {
        let mut names = Names {
            container_id,
            slots: slots.iter(),
        };
        match self {
            Self::Host(mounts) => share(mounts, container_id, shared_root),
            Self::Layers { images, upper } => layers(images, upper, &mut names),
            Self::HostLayers {
                images,
                options,
                maps,
            } => {
                let layers = mount_images(images, container_id, shared_root)?;
                map(&layers, maps.as_ref(), container_id)?;
                share_layers(&layers, options, container_id, shared_root)
            }
            Self::Image { path, read_only } => image(path, *read_only, &mut names),
        }
    }
}

/// Serial numbers of a container's disks.
pub(super) struct Names<'a> {
    pub(super) container_id: &'a str,
    /// Those it takes the place of, if the machine was not made with its own.
    pub(super) slots: std::slice::Iter<'a, Slot>,
}

impl Names<'_> {
    /// The next one: a slot's, or what the disk is and whose. Container ids are longer than
    /// the 20 bytes a serial number has.
    fn next(&mut self, role: &str) -> String {
        if let Some(slot) = self.slots.next() {
            return slot.serial().to_owned();
        }
        let digest = Sha256::digest(self.container_id.as_bytes());
        let hex: String = digest.iter().take(8).map(|b| format!("{b:02x}")).collect();
        format!("{role}{hex}")
    }
}

fn share(
    mounts: &[HostMount],
    container_id: &str,
    shared_root: &Path,
) -> Result<Root, StorageError> {
    let target = shared_root.join(container_id).join("rootfs");
    host::make_dir(&target)?;
    for mount in mounts {
        match mount {
            HostMount::Bind {
                source,
                read_only,
                maps: None,
            } => host::bind(source, &target, *read_only)?,
            HostMount::Bind {
                source,
                read_only,
                maps: Some(maps),
            } => {
                let users = host::users(maps, container_id)?;
                host::bind_mapped(source, &target, users.as_fd(), false)?;
                host::confine(&target, *read_only, true)?;
            }
            HostMount::Overlay {
                options,
                maps: None,
            } => host::overlay(&target, &host::Options::parse(options))?,
            HostMount::Overlay {
                options,
                maps: Some(maps),
            } => {
                let options = map_layers(options, maps, container_id, shared_root)?;
                host::overlay(&target, &host::Options::parse(&options))?;
            }
        }
    }
    Ok(shared(container_id))
}

/// A root file system in the shared directory.
fn shared(container_id: &str) -> Root {
    let source = Path::new(SHARED_DIR).join(container_id).join("rootfs");
    let target = guest_rootfs(container_id);
    Root {
        disks: Vec::new(),
        storages: vec![storage(&text(&source), &target, "bind", ["rbind"])],
        shared: true,
    }
}

/// An overlay's options with its layers replaced by copies whose owners are mapped.
fn map_layers(
    options: &[String],
    maps: &IdMaps,
    container_id: &str,
    shared_root: &Path,
) -> Result<Vec<String>, StorageError> {
    let users = host::users(maps, container_id)?;
    let mut mapped = Vec::new();
    for option in options {
        let Some(lower) = option.strip_prefix("lowerdir=") else {
            mapped.push(option.clone());
            continue;
        };
        let mut layers = Vec::new();
        for (number, layer) in (1..).zip(lower.split(':')) {
            let place = layer_place(number, container_id, shared_root)?;
            host::bind_mapped(Path::new(layer), &place, users.as_fd(), false)?;
            host::confine(&place, true, true)?;
            layers.push(text(&place));
        }
        mapped.push(format!("lowerdir={}", layers.join(":")));
    }
    Ok(mapped)
}

/// A directory for one layer below the container's shared directory, where
/// `release` finds it.
fn layer_place(
    number: usize,
    container_id: &str,
    shared_root: &Path,
) -> Result<PathBuf, StorageError> {
    let place = shared_root
        .join(container_id)
        .join(LAYERS_DIR)
        .join(number.to_string());
    host::make_dir(&place)?;
    Ok(place)
}

/// Mounts EROFS images; returns where.
fn mount_images(
    images: &[PathBuf],
    container_id: &str,
    shared_root: &Path,
) -> Result<Vec<PathBuf>, StorageError> {
    let mut places = Vec::new();
    for (number, image) in (1..).zip(images) {
        let place = layer_place(number, container_id, shared_root)?;
        host::erofs(image, &place)?;
        places.push(place);
    }
    Ok(places)
}

/// Has the owners of these mounts' files mapped, in their places.
fn map(layers: &[PathBuf], maps: Option<&IdMaps>, container_id: &str) -> Result<(), StorageError> {
    let Some(maps) = maps else { return Ok(()) };
    let users = host::users(maps, container_id)?;
    for layer in layers {
        host::bind_mapped(layer, layer, users.as_fd(), false)?;
    }
    Ok(())
}

/// Shares an overlay of layers that the host has mounted, or the one without
/// anything over it.
fn share_layers(
    layers: &[PathBuf],
    options: &[String],
    container_id: &str,
    shared_root: &Path,
) -> Result<Root, StorageError> {
    let target = shared_root.join(container_id).join("rootfs");
    host::make_dir(&target)?;
    if let ([layer], []) = (layers, options) {
        host::bind(layer, &target, true)?;
        return Ok(shared(container_id));
    }
    let lower: Vec<String> = layers.iter().map(|layer| text(layer)).collect();
    let mut options = options.to_vec();
    options.push(format!("lowerdir={}", lower.join(":")));
    host::overlay(&target, &host::Options::parse(&options))?;
    Ok(shared(container_id))
}

fn image(path: &Path, read_only: bool, names: &mut Names<'_>) -> Result<Root, StorageError> {
    let serial = names.next("r");
    let options = [if read_only { "ro" } else { "rw" }];
    let source = format!("serial:{serial}");
    Ok(Root {
        storages: vec![storage(
            &source,
            &guest_rootfs(names.container_id),
            "ext4",
            options,
        )],
        disks: vec![whole_disk(serial, path, read_only)?],
        shared: false,
    })
}

pub(super) fn layers(
    images: &[PathBuf],
    upper: &Upper,
    names: &mut Names<'_>,
) -> Result<Root, StorageError> {
    let dir = container_dir(names.container_id);
    let mut root = Root::default();
    let mut targets = (1..).map(|number: usize| dir.join("layers").join(number.to_string()));
    for (index, part) in images.chunks(MAX_PARTITIONS).enumerate() {
        let serial = names.next(&format!("l{index}"));
        let mut files = Vec::new();
        for ((number, path), target) in (1..).zip(part).zip(&mut targets) {
            files.push(open(path, false)?);
            let source = format!("serial:{serial}:{number}");
            root.storages
                .push(storage(&source, &target, "erofs", ["ro"]));
        }
        root.disks.push(HostDisk {
            serial,
            read_only: true,
            backing: HostBacking::Partitions(files),
        });
    }
    overlay(root, upper, names)
}

/// Adds an overlay of what is mounted by now.
fn overlay(mut root: Root, upper: &Upper, names: &mut Names<'_>) -> Result<Root, StorageError> {
    let dir = container_dir(names.container_id);
    let layers = root.storages.iter().map(|layer| layer.target.as_str());
    let lower = layers.collect::<Vec<_>>().join(":");
    let scratch = dir.join("scratch");
    let (upper_dir, work_dir) = match upper {
        Upper::Tmpfs => {
            root.storages
                .push(storage("tmpfs", &scratch, "tmpfs", ["mode=0755"]));
            ("upper", "work")
        }
        Upper::Disk { path, upper, work } => {
            let serial = names.next("u");
            let source = format!("serial:{serial}");
            root.storages
                .push(storage(&source, &scratch, "ext4", ["rw"]));
            root.disks.push(whole_disk(serial, path, false)?);
            (upper.as_str(), work.as_str())
        }
    };
    let options = [
        format!("lowerdir={lower}"),
        format!("upperdir={}", text(&scratch.join(upper_dir))),
        format!("workdir={}", text(&scratch.join(work_dir))),
    ];
    let options = options.each_ref().map(String::as_str);
    root.storages.push(storage(
        "overlay",
        &guest_rootfs(names.container_id),
        "overlay",
        options,
    ));
    Ok(root)
}

fn storage<const N: usize>(
    source: &str,
    target: &Path,
    fstype: &str,
    options: [&str; N],
) -> agent::Storage {
    agent::Storage {
        source: source.into(),
        target: text(target),
        fstype: fstype.into(),
        options: options.map(str::to_owned).into(),
        ..Default::default()
    }
}

/// Guest paths are made of our constants and a checked id: always UTF-8.
fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn whole_disk(serial: String, path: &Path, read_only: bool) -> Result<HostDisk, StorageError> {
    Ok(HostDisk {
        serial,
        read_only,
        backing: HostBacking::Whole(open(path, !read_only)?),
    })
}

/// Opens an image or a device. One that was cut down to nothing is named here:
/// what opens it later knows no paths.
fn open(path: &Path, write: bool) -> Result<File, StorageError> {
    let open = || {
        let file = File::options().read(true).write(write).open(path)?;
        let meta = file.metadata()?;
        if meta.is_file() && meta.len() < MIN_IMAGE_BYTES {
            let text = format!("{} bytes are no file system's image", meta.len());
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(file)
    };
    open().map_err(StorageError::host("open", path))
}
