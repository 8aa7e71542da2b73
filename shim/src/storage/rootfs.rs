//! The root file system: which of the ways it takes, and taking it.
//!
//! [`Source::of`] only looks; [`Source::realize`] (in `realize.rs`) mounts and
//! opens. The forms
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

mod realize;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use containerd_shim_protos::types::mount::Mount;
use nacre_protocol::agent;
use nacre_protocol::idmap::IdMaps;
use nacre_protocol::vm::MAX_PARTITIONS;
use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder};

use super::{HostDisk, StorageError};
use crate::sandbox::ContainerConfig;

/// Layer blob of containerd's erofs snapshotter, beside the layer's mount point.
const LAYER_BLOB: &str = "layer.erofs";

/// Most lower layers of an overlay (Linux, fs/overlayfs, `OVL_MAX_STACK`). Beyond
/// them it says no more than "invalid argument".
pub(super) const MAX_LAYERS: usize = 500;

/// Where a root file system comes from.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// Mounted on the host, one over the other, and shared.
    Host(Vec<HostMount>),
    /// EROFS images, uppermost first, overlaid in the guest.
    Layers { images: Vec<PathBuf>, upper: Upper },
    /// The same for a VM that has no disks for them: mounted on the host, one
    /// over the other, and shared. `options` are the overlay's without layers.
    HostLayers {
        images: Vec<PathBuf>,
        options: Vec<String>,
        maps: Option<IdMaps>,
    },
    /// An ext4 image, whole.
    Image { path: PathBuf, read_only: bool },
}

/// A mount the host makes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum HostMount {
    Bind {
        source: PathBuf,
        read_only: bool,
        maps: Option<IdMaps>,
    },
    /// `maps` are for the layers; the upper directory has the owners it has.
    Overlay {
        options: Vec<String>,
        maps: Option<IdMaps>,
    },
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
    /// Decides how a root file system reaches the guest, which may have it on `disks`.
    pub fn of(config: &ContainerConfig, disks: bool) -> Result<Self, StorageError> {
        let source = Self::read(config, disks)?;
        let layers = source.layers();
        if layers > MAX_LAYERS {
            return Err(StorageError::TooManyLayers {
                container_id: config.id.clone(),
                layers,
                limit: MAX_LAYERS,
            });
        }
        Ok(source)
    }

    /// How many layers the largest of its overlays has.
    fn layers(&self) -> usize {
        let of_mount = |mount: &HostMount| match mount {
            HostMount::Overlay { options, .. } => {
                let mut lower = options.iter().filter_map(|o| o.strip_prefix("lowerdir="));
                lower.next().map_or(0, |lower| lower.split(':').count())
            }
            HostMount::Bind { .. } => 1,
        };
        match self {
            Self::Layers { images, .. } | Self::HostLayers { images, .. } => images.len(),
            Self::Host(mounts) => mounts.iter().map(of_mount).max().unwrap_or(0),
            Self::Image { .. } => 1,
        }
    }

    /// How many disks of the guest it takes.
    pub fn disks(&self) -> usize {
        match self {
            Self::Layers { images, upper } => {
                let of_upper = usize::from(matches!(upper, Upper::Disk { .. }));
                images.len().div_ceil(MAX_PARTITIONS) + of_upper
            }
            Self::Image { .. } => 1,
            Self::Host(_) | Self::HostLayers { .. } => 0,
        }
    }

    fn read(config: &ContainerConfig, disks: bool) -> Result<Self, StorageError> {
        let (spec, mounts) = (&*config.spec, config.rootfs.as_slice());
        let reader = Reader {
            container_id: &config.id,
            mounts,
            disks,
            mapped: IdMaps::of_spec(spec).is_some(),
        };
        let Some((last, before)) = mounts.split_last() else {
            let root = spec
                .root()
                .as_ref()
                .ok_or_else(|| StorageError::NoRootfs(config.id.clone()))?;
            return Ok(Self::Host(vec![HostMount::Bind {
                source: config.bundle.join(root.path()),
                read_only: false,
                maps: None,
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
}

/// Reads containerd's mounts for one container.
struct Reader<'a> {
    container_id: &'a str,
    mounts: &'a [Mount],
    disks: bool,
    /// Whether the container has users of its own. containerd gives it an upper
    /// directory that is theirs, so the host mounts its layers.
    mapped: bool,
}

impl Reader<'_> {
    fn single(&self, mount: &Mount) -> Result<Source, StorageError> {
        match kind_of(mount) {
            "erofs" if self.disks && !self.mapped => Ok(Source::Layers {
                images: vec![self.layer(mount)?],
                upper: Upper::Tmpfs,
            }),
            "erofs" => Ok(Source::HostLayers {
                images: vec![self.layer(mount)?],
                options: Vec::new(),
                maps: self.mapping(mount)?.1,
            }),
            "ext4" => Ok(Source::Image {
                path: self.image(mount)?,
                read_only: has_option(mount, "ro"),
            }),
            "overlay" if self.disks && !self.mapped => match erofs_layers(mount) {
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
                maps: self.mapping(mount)?.1,
            }),
            "overlay" => {
                let (options, maps) = self.mapping(mount)?;
                if let Some(option) = options.iter().find(|option| option.contains("{{")) {
                    return Err(self.bad_option(mount, option));
                }
                Ok(HostMount::Overlay { options, maps })
            }
            _ => Err(self.unsupported(
                mount,
                "known are overlay, bind, erofs and ext4, alone or as layers of an overlay",
            )),
        }
    }

    /// A mount's options for the kernel, and how it maps owners: containerd's
    /// `uidmap=CONTAINER:HOST:SIZE[,...]` and `gidmap=`.
    fn mapping(&self, mount: &Mount) -> Result<(Vec<String>, Option<IdMaps>), StorageError> {
        let (mut uids, mut gids) = (Vec::new(), Vec::new());
        let mut options = Vec::new();
        for option in &mount.options {
            let (list, maps) = match option.split_once('=') {
                Some(("uidmap", list)) => (list, &mut uids),
                Some(("gidmap", list)) => (list, &mut gids),
                _ => {
                    options.push(option.clone());
                    continue;
                }
            };
            for map in list.split(',') {
                maps.push(id_mapping(map).ok_or_else(|| self.bad_option(mount, option))?);
            }
        }
        let mapped = !uids.is_empty() || !gids.is_empty();
        Ok((options, mapped.then_some(IdMaps { uids, gids })))
    }

    /// The file of an EROFS mount.
    fn layer(&self, mount: &Mount) -> Result<PathBuf, StorageError> {
        if mount.options.iter().any(|o| o.starts_with("device=")) {
            let reason = "it is a merged index over several files; \
                          set fs_merge_threshold = 0 in the erofs snapshotter";
            return Err(self.unsupported(mount, reason));
        }
        Ok(mount.source.clone().into())
    }

    fn image(&self, mount: &Mount) -> Result<PathBuf, StorageError> {
        if self.disks {
            Ok(mount.source.clone().into())
        } else {
            Err(self.needs_disk(mount))
        }
    }

    fn needs_disk(&self, mount: &Mount) -> StorageError {
        StorageError::NeedsDisk {
            container_id: self.container_id.into(),
            fstype: mount.type_.clone(),
        }
    }

    /// An overlay whose options name the mounts before it, as
    /// `{{ overlay FIRST LAST }}` or `{{ mount N }}` (containerd, docs/mounts.md).
    fn templated_overlay(&self, overlay: &Mount) -> Result<Source, StorageError> {
        if kind_of(overlay) != "overlay" {
            return Err(self.unsupported(overlay, "image files before it need an overlay last"));
        }
        let images = self.referenced_layers(overlay)?;
        if self.disks && !self.mapped {
            return Ok(Source::Layers {
                images,
                upper: self.upper(overlay)?,
            });
        }
        let (mut options, maps) = self.mapping(overlay)?;
        options.retain(|option| !option.starts_with("lowerdir=") && !option.starts_with("X-"));
        if !options.iter().any(|option| option.contains("{{")) {
            return Ok(Source::HostLayers {
                images,
                options,
                maps,
            });
        }
        if self.disks {
            let reason = "it is on a disk, and users of the container's own need one of the host's \
                          directories; use the overlayfs snapshotter";
            return Err(self.unsupported(overlay, reason));
        }
        Err(self.needs_disk(overlay))
    }

    fn referenced_layers(&self, overlay: &Mount) -> Result<Vec<PathBuf>, StorageError> {
        let lower = option_value(overlay, "lowerdir")
            .ok_or_else(|| self.unsupported(overlay, "it has no lowerdir"))?;
        let bad = || self.bad_option(overlay, lower);
        let mut images = Vec::new();
        for part in lower.split(':') {
            let (first, last) = referenced(part)
                .filter(|(first, last)| (*first).max(*last) < self.mounts.len())
                .ok_or_else(bad)?;
            // Backwards when the first number is the greater.
            let step = |n: usize| first.min(last) + n;
            let count = first.abs_diff(last) + 1;
            let mut indices: Vec<usize> = (0..count).map(step).collect();
            if first > last {
                indices.reverse();
            }
            for mount in indices.iter().filter_map(|&index| self.mounts.get(index)) {
                if kind_of(mount) != "erofs" {
                    return Err(bad());
                }
                images.push(self.layer(mount)?);
            }
        }
        Ok(images)
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

/// `CONTAINER:HOST:SIZE`.
fn id_mapping(text: &str) -> Option<LinuxIdMapping> {
    let numbers = text.split(':').map(|number| number.parse::<u32>().ok());
    let numbers: Vec<u32> = numbers.collect::<Option<_>>()?;
    let [container_id, host_id, size] = numbers[..] else {
        return None;
    };
    let map = LinuxIdMappingBuilder::default();
    let map = map.container_id(container_id).host_id(host_id).size(size);
    map.build().ok()
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

/// First and last of the indices a template stands for.
fn referenced(template: &str) -> Option<(usize, usize)> {
    let inner = template.trim().strip_prefix("{{")?.strip_suffix("}}")?;
    let words: Vec<&str> = inner.split_whitespace().collect();
    match words.as_slice() {
        ["overlay", first, last] => Some((first.parse().ok()?, last.parse().ok()?)),
        ["mount", index] => {
            let index = index.parse().ok()?;
            Some((index, index))
        }
        _ => None,
    }
}

/// Splits `{{ mount N }}/directory`. The directory becomes a path below the
/// guest's mount of the image, so it may not climb.
fn directory_on(path: &str) -> Option<(usize, &str)> {
    let (template, directory) = path.split_once("}}/")?;
    let (index, _) = referenced(&format!("{template}}}}}"))?;
    let plain = Path::new(directory)
        .components()
        .all(|part| matches!(part, std::path::Component::Normal(_)));
    (plain && !directory.is_empty()).then_some((index, directory))
}

#[cfg(test)]
mod tests;
