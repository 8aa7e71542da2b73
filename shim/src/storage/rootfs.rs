//! The root file system: which of the ways it takes, and taking it.
//!
//! [`Source::of`] only looks; [`Source::realize`] mounts and opens. The forms
//! containerd's snapshotters use:
//!
//! | snapshotter | mounts | source |
//! |---|---|---|
//! | overlayfs, native | `overlay`, `bind` | host |
//! | erofs, containerd 2.1 | `overlay` of directories with a `layer.erofs` beside them | layers |
//! | erofs, containerd >= 2.2 | `erofs`..., then `format/mkdir/overlay` with templates | layers |
//! | erofs, block mode | `ext4`, `erofs`..., then `format/mkdir/overlay` | layers, ext4 as upper |
//! | devmapper, blockfile | `ext4` | image |
//! | `ctr run --rootfs` | none, a root path | host |

use std::ffi::OsStr;
use std::fs::File;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use containerd_shim_protos::types::mount::Mount;
use nacre_protocol::agent;
use nacre_protocol::guest::SHARED_DIR;
use oci_spec::runtime::Spec;
use sha2::{Digest, Sha256};

use super::{HostBacking, HostDisk, StorageError, host};
use crate::oci::{container_dir, guest_rootfs};

/// Layer blob of containerd's erofs snapshotter, beside the layer's mount point.
const LAYER_BLOB: &str = "layer.erofs";

/// Where a root file system comes from.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// Mounted on the host, one over the other, and shared.
    Host(Vec<HostMount>),
    /// EROFS images, uppermost first, overlaid in the guest.
    Layers { images: Vec<PathBuf>, upper: Upper },
    /// An ext4 image, whole.
    Image { path: PathBuf, read_only: bool },
}

/// A mount the host makes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum HostMount {
    Bind { source: PathBuf, read_only: bool },
    Overlay { options: Vec<String> },
}

/// Where the guest's overlay writes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Upper {
    /// Guest memory.
    Tmpfs,
    /// An ext4 image; directories are relative to its root.
    Disk {
        path: PathBuf,
        upper: String,
        work: String,
    },
}

/// What came of a [`Source`].
#[derive(Debug, Default)]
pub(super) struct Root {
    pub disks: Vec<HostDisk>,
    pub storages: Vec<agent::Storage>,
    pub shared: bool,
}

impl Source {
    /// Decides how a root file system reaches the guest.
    pub fn of(
        bundle: &Path,
        container_id: &str,
        mounts: &[Mount],
        spec: &Spec,
        disks: bool,
    ) -> Result<Self, StorageError> {
        let reader = Reader {
            container_id,
            mounts,
            disks,
        };
        let Some((last, before)) = mounts.split_last() else {
            let root = spec
                .root()
                .as_ref()
                .ok_or_else(|| StorageError::NoRootfs(container_id.into()))?;
            return Ok(Self::Host(vec![HostMount::Bind {
                source: bundle.join(root.path()),
                read_only: false,
            }]));
        };
        let block_parts = before
            .iter()
            .any(|mount| matches!(kind_of(mount), "erofs" | "ext4"));
        if block_parts {
            reader.templated_overlay(last)
        } else if before.is_empty() {
            reader.single(last)
        } else {
            let mounts = mounts.iter().map(|mount| reader.host_mount(mount));
            Ok(Self::Host(mounts.collect::<Result<_, _>>()?))
        }
    }

    /// Mounts or opens the source.
    pub fn realize(&self, container_id: &str, shared_root: &Path) -> Result<Root, StorageError> {
        match self {
            Self::Host(mounts) => share(mounts, container_id, shared_root),
            Self::Layers { images, upper } => layers(images, upper, container_id),
            Self::Image { path, read_only } => image(path, *read_only, container_id),
        }
    }
}

/// Reads containerd's mounts for one container.
struct Reader<'a> {
    container_id: &'a str,
    mounts: &'a [Mount],
    disks: bool,
}

impl Reader<'_> {
    fn single(&self, mount: &Mount) -> Result<Source, StorageError> {
        match kind_of(mount) {
            "erofs" => Ok(Source::Layers {
                images: vec![self.layer(mount)?],
                upper: Upper::Tmpfs,
            }),
            "ext4" => Ok(Source::Image {
                path: self.image(mount)?,
                read_only: has_option(mount, "ro"),
            }),
            "overlay" if self.disks => match erofs_layers(mount) {
                Some(images) => Ok(Source::Layers {
                    images,
                    upper: Upper::Tmpfs,
                }),
                None => Ok(Source::Host(vec![self.host_mount(mount)?])),
            },
            _ => Ok(Source::Host(vec![self.host_mount(mount)?])),
        }
    }

    fn host_mount(&self, mount: &Mount) -> Result<HostMount, StorageError> {
        match kind_of(mount) {
            "bind" => Ok(HostMount::Bind {
                source: mount.source.clone().into(),
                read_only: has_option(mount, "ro"),
            }),
            "overlay" => {
                let bad = |option: &&String| {
                    option.contains("{{")
                        || option.starts_with("uidmap=")
                        || option.starts_with("gidmap=")
                };
                if let Some(option) = mount.options.iter().find(bad) {
                    return Err(self.bad_option(mount, option));
                }
                Ok(HostMount::Overlay {
                    options: mount.options.clone(),
                })
            }
            _ => Err(self.unsupported(
                mount,
                "known are overlay, bind, erofs and ext4, alone or as layers of an overlay",
            )),
        }
    }

    /// The file of an EROFS mount.
    fn layer(&self, mount: &Mount) -> Result<PathBuf, StorageError> {
        if mount.options.iter().any(|o| o.starts_with("device=")) {
            let reason = "it is a merged index over several files; \
                          set fs_merge_threshold = 0 in the erofs snapshotter";
            return Err(self.unsupported(mount, reason));
        }
        self.image(mount)
    }

    fn image(&self, mount: &Mount) -> Result<PathBuf, StorageError> {
        if self.disks {
            Ok(mount.source.clone().into())
        } else {
            Err(StorageError::NeedsDisk {
                container_id: self.container_id.into(),
                fstype: mount.type_.clone(),
            })
        }
    }

    /// An overlay whose options name the mounts before it, as
    /// `{{ overlay FIRST LAST }}` or `{{ mount N }}` (containerd, docs/mounts.md).
    fn templated_overlay(&self, overlay: &Mount) -> Result<Source, StorageError> {
        if kind_of(overlay) != "overlay" {
            return Err(self.unsupported(overlay, "image files before it need an overlay last"));
        }
        let lower = option_value(overlay, "lowerdir")
            .ok_or_else(|| self.unsupported(overlay, "it has no lowerdir"))?;
        let mut images = Vec::new();
        for part in lower.split(':') {
            let range = referenced(part).ok_or_else(|| self.bad_option(overlay, lower))?;
            // Backwards when the first number is the greater.
            let (first, last) = (*range.start(), *range.end());
            let indices: Vec<usize> = if first <= last {
                range.collect()
            } else {
                (last..=first).rev().collect()
            };
            for index in indices {
                let mount = self
                    .mounts
                    .get(index)
                    .filter(|mount| kind_of(mount) == "erofs")
                    .ok_or_else(|| self.bad_option(overlay, lower))?;
                images.push(self.layer(mount)?);
            }
        }
        Ok(Source::Layers {
            images,
            upper: self.upper(overlay)?,
        })
    }

    /// An upper directory on an image goes into the guest with the image. One
    /// of the host's does not: a virtio-fs directory cannot be an overlay's
    /// upper layer without giving the file server `CAP_SYS_ADMIN`.
    fn upper(&self, overlay: &Mount) -> Result<Upper, StorageError> {
        let templated = |name| option_value(overlay, name).filter(|dir| dir.contains("{{"));
        let (Some(upper), Some(work)) = (templated("upperdir"), templated("workdir")) else {
            return Ok(Upper::Tmpfs);
        };
        let (Some((index, upper_dir)), Some((work_index, work_dir))) =
            (directory_on(upper), directory_on(work))
        else {
            return Err(self.bad_option(overlay, upper));
        };
        let mount = self
            .mounts
            .get(index)
            .filter(|mount| kind_of(mount) == "ext4" && work_index == index)
            .ok_or_else(|| self.bad_option(overlay, upper))?;
        Ok(Upper::Disk {
            path: self.image(mount)?,
            upper: upper_dir.into(),
            work: work_dir.into(),
        })
    }

    fn unsupported(&self, mount: &Mount, reason: &str) -> StorageError {
        StorageError::UnsupportedRootfs {
            container_id: self.container_id.into(),
            fstype: mount.type_.clone(),
            reason: reason.into(),
        }
    }

    fn bad_option(&self, mount: &Mount, option: &str) -> StorageError {
        StorageError::RootfsOption {
            container_id: self.container_id.into(),
            fstype: mount.type_.clone(),
            option: option.into(),
        }
    }
}

/// A mount's type without containerd's instructions before it. `format` and
/// `mkdir` only say that the options hold templates and directories to make.
fn kind_of(mount: &Mount) -> &str {
    let mut kind = mount.type_.as_str();
    while let Some(rest) = ["format/", "mkdir/"]
        .iter()
        .find_map(|prefix| kind.strip_prefix(prefix))
    {
        kind = rest;
    }
    kind
}

fn has_option(mount: &Mount, name: &str) -> bool {
    mount.options.iter().any(|option| option == name)
}

fn option_value<'a>(mount: &'a Mount, name: &str) -> Option<&'a str> {
    mount
        .options
        .iter()
        .find_map(|option| option.strip_prefix(name)?.strip_prefix('='))
}

/// The blobs of an overlay whose every layer was mounted by the erofs
/// snapshotter.
fn erofs_layers(overlay: &Mount) -> Option<Vec<PathBuf>> {
    let blob_of = |layer: &str| {
        let layer = Path::new(layer);
        let blob = layer.parent()?.join(LAYER_BLOB);
        (layer.file_name() == Some(OsStr::new("fs")) && blob.is_file()).then_some(blob)
    };
    option_value(overlay, "lowerdir")?
        .split(':')
        .map(blob_of)
        .collect()
}

/// Indices a template stands for.
fn referenced(template: &str) -> Option<RangeInclusive<usize>> {
    let inner = template.trim().strip_prefix("{{")?.strip_suffix("}}")?;
    let words: Vec<&str> = inner.split_whitespace().collect();
    match words.as_slice() {
        ["overlay", first, last] => Some(first.parse().ok()?..=last.parse().ok()?),
        ["mount", index] => {
            let index = index.parse().ok()?;
            Some(index..=index)
        }
        _ => None,
    }
}

/// Splits `{{ mount N }}/directory`. The directory becomes a path below the
/// guest's mount of the image, so it may not climb.
fn directory_on(path: &str) -> Option<(usize, &str)> {
    let (template, directory) = path.split_once("}}/")?;
    let index = *referenced(&format!("{template}}}}}"))?.start();
    let plain = Path::new(directory)
        .components()
        .all(|part| matches!(part, std::path::Component::Normal(_)));
    (plain && !directory.is_empty()).then_some((index, directory))
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
            HostMount::Bind { source, read_only } => host::bind(source, &target, *read_only)?,
            HostMount::Overlay { options } => {
                host::overlay(&target, &host::Options::parse(options))?;
            }
        }
    }
    let source = Path::new(SHARED_DIR).join(container_id).join("rootfs");
    let storage = storage(
        &text(&source),
        &guest_rootfs(container_id),
        "bind",
        ["rbind"],
    );
    Ok(Root {
        disks: Vec::new(),
        storages: vec![storage],
        shared: true,
    })
}

fn image(path: &Path, read_only: bool, container_id: &str) -> Result<Root, StorageError> {
    let serial = serial('r', container_id);
    let options = [if read_only { "ro" } else { "rw" }];
    let source = format!("serial:{serial}");
    Ok(Root {
        storages: vec![storage(
            &source,
            &guest_rootfs(container_id),
            "ext4",
            options,
        )],
        disks: vec![whole_disk(serial, path, read_only)?],
        shared: false,
    })
}

fn layers(images: &[PathBuf], upper: &Upper, container_id: &str) -> Result<Root, StorageError> {
    let dir = container_dir(container_id);
    let layer_serial = serial('l', container_id);
    let mut root = Root::default();
    let mut files = Vec::new();
    let mut lower = Vec::new();
    for (number, path) in (1..).zip(images) {
        files.push(open(path, false)?);
        let target = dir.join("layers").join(number.to_string());
        let source = format!("serial:{layer_serial}:{number}");
        root.storages
            .push(storage(&source, &target, "erofs", ["ro"]));
        lower.push(text(&target));
    }
    root.disks.push(HostDisk {
        serial: layer_serial,
        read_only: true,
        backing: HostBacking::Partitions(files),
    });

    let scratch = dir.join("scratch");
    let (upper_dir, work_dir) = match upper {
        Upper::Tmpfs => {
            root.storages
                .push(storage("tmpfs", &scratch, "tmpfs", ["mode=0755"]));
            ("upper", "work")
        }
        Upper::Disk { path, upper, work } => {
            let serial = serial('u', container_id);
            let source = format!("serial:{serial}");
            root.storages
                .push(storage(&source, &scratch, "ext4", ["rw"]));
            root.disks.push(whole_disk(serial, path, false)?);
            (upper.as_str(), work.as_str())
        }
    };
    let options = [
        format!("lowerdir={}", lower.join(":")),
        format!("upperdir={}", text(&scratch.join(upper_dir))),
        format!("workdir={}", text(&scratch.join(work_dir))),
    ];
    let options = options.each_ref().map(String::as_str);
    root.storages.push(storage(
        "overlay",
        &guest_rootfs(container_id),
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

fn open(path: &Path, write: bool) -> Result<File, StorageError> {
    File::options()
        .read(true)
        .write(write)
        .open(path)
        .map_err(StorageError::host("open", path))
}

/// A serial number of 17 bytes: what the disk is, and whose. Container ids are
/// longer than the 20 bytes a serial number has.
fn serial(role: char, container_id: &str) -> String {
    let digest = Sha256::digest(container_id.as_bytes());
    let hex: String = digest.iter().take(8).map(|b| format!("{b:02x}")).collect();
    format!("{role}{hex}")
}

#[cfg(test)]
mod tests;
