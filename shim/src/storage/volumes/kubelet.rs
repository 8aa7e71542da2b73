//! What a path of the kubelet's tells of what lies there.
//!
//! ```text
//! .../pods/<uid>/volumes/kubernetes.io~<plugin>/<volume>         a volume
//! .../pods/<uid>/volume-subpaths/<volume>/<container>/<index>    a part of one
//! .../pods/<uid>/containers/<container>/<id>                     a termination log
//! ```
//!
//! The kubelet's root directory can be anywhere, so it is these directories
//! that count. Nothing is guessed of other paths.

use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, statfs};

/// Plugins whose volumes the kubelet writes itself, in one step each time.
const WRITTEN_BY_KUBELET: [&str; 4] = [
    "kubernetes.io~configmap",
    "kubernetes.io~secret",
    "kubernetes.io~projected",
    "kubernetes.io~downward-api",
];
const EMPTY_DIR: &str = "kubernetes.io~empty-dir";

/// What the kubelet put somewhere.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// ConfigMap, Secret, projected volume, downward API.
    Written,
    /// emptyDir, of any medium.
    EmptyDir,
    /// A part of an emptyDir, if its volume is one: the volume's path.
    Subpath(PathBuf),
    /// A container's termination log.
    TerminationLog,
}

impl Place {
    /// What `path` is; `None` if it is not the kubelet's.
    pub fn of(path: &Path) -> Option<Self> {
        let names: Vec<&str> = path
            .components()
            .map(|component| match component {
                Component::RootDir => Some("/"),
                Component::Normal(name) => name.to_str(),
                Component::Prefix(_) | Component::CurDir | Component::ParentDir => None,
            })
            .collect::<Option<_>>()?;
        match names.as_slice() {
            [.., "pods", _, "volumes", plugin, _] if WRITTEN_BY_KUBELET.contains(plugin) => {
                Some(Self::Written)
            }
            [.., "pods", _, "volumes", EMPTY_DIR, _] => Some(Self::EmptyDir),
            [.., "pods", _, "volume-subpaths", volume, _, _] => {
                let pod = path.ancestors().nth(4)?;
                let volume = pod.join("volumes").join(EMPTY_DIR).join(volume);
                Some(Self::Subpath(volume))
            }
            [.., "pods", _, "containers", _, _] => Some(Self::TerminationLog),
            _ => None,
        }
    }
}

/// What the kubelet mounted for an emptyDir.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Medium {
    /// Nothing: it is a directory of the disk.
    Disk,
    /// A tmpfs.
    Memory,
    /// hugetlbfs.
    HugePages,
}

impl Medium {
    /// Of the emptyDir at `path`. The kubelet's directory may be on a tmpfs
    /// itself; what counts is a mount of the volume's own.
    pub fn of(path: &Path) -> std::io::Result<Self> {
        let parent = path.parent().unwrap_or(path);
        if std::fs::metadata(path)?.dev() == std::fs::metadata(parent)?.dev() {
            return Ok(Self::Disk);
        }
        Ok(match statfs(path)?.filesystem_type() {
            TMPFS_MAGIC => Self::Memory,
            HUGETLBFS_MAGIC => Self::HugePages,
            _ => Self::Disk,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_known_by_their_directories() {
        let pod = "/data/k/pods/0f-1";
        let place = |rest: &str| Place::of(&Path::new(pod).join(rest));
        for plugin in ["configmap", "secret", "projected", "downward-api"] {
            let path = format!("volumes/kubernetes.io~{plugin}/v");
            assert_eq!(place(&path), Some(Place::Written), "{plugin}");
        }
        assert_eq!(
            place("volumes/kubernetes.io~empty-dir/v"),
            Some(Place::EmptyDir)
        );
        let volume = PathBuf::from("/data/k/pods/0f-1/volumes/kubernetes.io~empty-dir/v");
        assert_eq!(place("volume-subpaths/v/c/0"), Some(Place::Subpath(volume)));
        assert_eq!(place("containers/c/0a1b"), Some(Place::TerminationLog));
    }

    #[test]
    fn other_paths_are_not() {
        for path in [
            "/srv/kubernetes.io~configmap/v",
            "/k/pods/1/volumes/kubernetes.io~configmap",
            "/k/pods/1/volumes/kubernetes.io~configmap/v/key",
            "/k/pods/1/volumes/kubernetes.io~configmap/../v",
            "/k/pods/1/volumes/kubernetes.io~csi/v",
            "/k/pods/1/etc-hosts",
            "pods",
        ] {
            assert_eq!(Place::of(Path::new(path)), None, "{path}");
        }
    }
}
