//! Where a spec's cgroup path says a group is: runtime-spec 1.2, config-linux.md,
//! "Cgroups Path", and for systemd's spelling runc's docs/systemd.md.

use std::path::{Component, Path, PathBuf};

use super::CgroupError;

/// Where a unit without a slice is.
const DEFAULT_SLICE: &str = "system.slice";

/// A group's place in the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// Directories below the root, outermost first; the last one is the group.
    pub directories: Vec<String>,
    /// As systemd is to know it, if it is spelled that way.
    pub unit: Option<Unit>,
}

/// A scope of systemd's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unit {
    /// The slice it is in.
    pub slice: String,
    /// Its name, `.scope` included.
    pub name: String,
}

impl Place {
    /// Reads both of containerd's spellings.
    ///
    /// # Errors
    ///
    /// `BadPath` for what is neither, or leads out of the tree.
    pub fn parse(cgroups_path: &str) -> Result<Self, CgroupError> {
        let parts: Vec<&str> = cgroups_path.split(':').collect();
        let place = match parts.as_slice() {
            [path] => Self::of_path(path),
            [slice, prefix, name] => Self::of_unit(slice, prefix, name),
            _ => None,
        };
        place
            .filter(|place| !place.directories.is_empty())
            .ok_or_else(|| CgroupError::BadPath(cgroups_path.into()))
    }

    fn of_path(path: &str) -> Option<Self> {
        Some(Self {
            directories: plain_parts(path)?,
            unit: None,
        })
    }

    fn of_unit(slice: &str, prefix: &str, name: &str) -> Option<Self> {
        let slice = if slice.is_empty() {
            DEFAULT_SLICE
        } else {
            slice
        };
        let name = match prefix {
            "" => name.strip_suffix(".scope").unwrap_or(name).to_owned(),
            _ => format!("{prefix}-{name}"),
        };
        let unit = Unit {
            slice: slice.to_owned(),
            name: format!("{name}.scope"),
        };
        let mut directories = slice_directories(slice)?;
        directories.extend(plain_parts(&unit.name).filter(|parts| *parts == [unit.name.as_str()])?);
        Some(Self {
            directories,
            unit: Some(unit),
        })
    }

    /// The group's directory.
    pub fn below(&self, root: &Path) -> PathBuf {
        let mut path = root.to_owned();
        path.extend(&self.directories);
        path
    }
}

/// Components of a path that neither climbs nor stays.
fn plain_parts(path: &str) -> Option<Vec<String>> {
    Path::new(path)
        .components()
        .filter(|part| *part != Component::RootDir)
        .map(|part| match part {
            Component::Normal(name) => name.to_str().map(str::to_owned),
            _ => None,
        })
        .collect()
}

/// `a-b.slice` lies in `a.slice` (systemd.slice(5)).
fn slice_directories(slice: &str) -> Option<Vec<String>> {
    let name = slice.strip_suffix(".slice")?;
    if name == "-" {
        return Some(Vec::new());
    }
    let mut directories = Vec::new();
    let mut unit = String::new();
    for part in name.split('-') {
        if part.is_empty() || part.contains('/') || part.starts_with('.') {
            return None;
        }
        if !unit.is_empty() {
            unit.push('-');
        }
        unit.push_str(part);
        directories.push(format!("{unit}.slice"));
    }
    Some(directories)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings() {
        let directories = |path| Place::parse(path).unwrap().directories;
        assert_eq!(directories("/default/id"), ["default", "id"]);
        assert_eq!(
            directories("kubepods-burstable-pod1.slice:cri-containerd:abc"),
            [
                "kubepods.slice",
                "kubepods-burstable.slice",
                "kubepods-burstable-pod1.slice",
                "cri-containerd-abc.scope",
            ]
        );
        assert_eq!(
            directories(":nerdctl:abc"),
            ["system.slice", "nerdctl-abc.scope"]
        );
        assert_eq!(directories("-.slice::x.scope"), ["x.scope"]);
        assert_eq!(directories("-.slice::x"), ["x.scope"]);
    }

    #[test]
    fn only_systemd_s_spelling_is_a_unit() {
        assert_eq!(Place::parse("/default/id").unwrap().unit, None);
        let unit = |path| Place::parse(path).unwrap().unit.unwrap();
        assert_eq!(
            unit("kubepods-pod1.slice:cri-containerd:abc"),
            Unit {
                slice: "kubepods-pod1.slice".into(),
                name: "cri-containerd-abc.scope".into(),
            }
        );
        assert_eq!(unit(":nerdctl:abc").slice, "system.slice");
    }

    #[test]
    fn paths_do_not_climb() {
        for path in [
            "",
            "/",
            "/a/../b",
            "a:b",
            "a.slice:p:x/y",
            "a.slice:/p:x",
            "a/b.slice:p:x",
            "..slice:p:x",
        ] {
            assert!(Place::parse(path).is_err(), "{path:?}");
        }
    }
}
