//! mount(8) options, told apart: flags, attributes, propagation, data.
//!
//! The same text serves two system calls. mount(2) takes `MS_*` flags and
//! makes new file systems; mount_setattr(2) takes `MOUNT_ATTR_*` and changes
//! bind mounts, also all of a tree at once ("rro").

use std::io;
use std::os::fd::OwnedFd;

use nix::mount::MsFlags;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen,
};

use crate::engine::sys::MountAttr;

const ATIME_MASK: u64 = libc::MOUNT_ATTR__ATIME;

/// Parsed mount options.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountOptions {
    /// Flags for mount(2), `MS_BIND` and `MS_REC` not among them.
    pub flags: MsFlags,
    /// The same for mount_setattr(2), on the mount itself.
    pub attr: MountAttr,
    /// Attributes for the whole tree ("rro" and its kin).
    pub tree_attr: MountAttr,
    /// "bind" or "rbind".
    pub bind: bool,
    /// "rbind".
    pub recursive: bool,
    /// "ridmap": owners of files are mapped in all of the tree.
    pub map_tree: bool,
    /// Propagation and whether it is for the tree.
    pub propagation: Option<(MsFlags, bool)>,
    /// What is left for the file system, comma-separated.
    pub data: String,
}

impl MountOptions {
    /// Parses options as an OCI mount or a `Storage` lists them.
    #[must_use]
    pub fn parse<S: AsRef<str>>(options: &[S]) -> Self {
        let mut parsed = Self {
            flags: MsFlags::empty(),
            attr: MountAttr::default(),
            tree_attr: MountAttr::default(),
            bind: false,
            recursive: false,
            map_tree: false,
            propagation: None,
            data: String::new(),
        };
        for option in options {
            parsed.add(option.as_ref());
        }
        parsed
    }

    fn add(&mut self, option: &str) {
        if self.add_kind(option) || self.add_flag(option) {
            return;
        }
        let tree = option.strip_prefix('r').and_then(attribute);
        if let Some((attr, set)) = tree {
            change(&mut self.tree_attr, attr, set);
            return;
        }
        if !self.data.is_empty() {
            self.data.push(',');
        }
        self.data.push_str(option);
    }

    fn add_kind(&mut self, option: &str) -> bool {
        match option {
            "" | "defaults" | "nofail" | "_netdev" => {}
            // Whether they are mapped the mount itself says, see `IdMaps`.
            "idmap" => {}
            "ridmap" => self.map_tree = true,
            "bind" => self.bind = true,
            "rbind" => (self.bind, self.recursive) = (true, true),
            _ => match propagation(option) {
                Some(propagation) => self.propagation = Some(propagation),
                None => return false,
            },
        }
        true
    }

    fn add_flag(&mut self, option: &str) -> bool {
        if let Some((flag, set)) = flag(option) {
            self.flags.set(flag, set);
            if let Some((attr, set)) = attribute(option) {
                change(&mut self.attr, attr, set);
            }
            return true;
        }
        false
    }

    /// Whether `data` sets `key`.
    #[must_use]
    pub fn has_data(&self, key: &str) -> bool {
        self.data_value(key).is_some()
    }

    /// The value of `key=value` in `data`.
    #[must_use]
    pub fn data_value(&self, key: &str) -> Option<&str> {
        self.data
            .split(',')
            .find_map(|item| item.strip_prefix(key)?.strip_prefix('='))
    }
}

/// A new file system in a mount that is attached nowhere (fsopen(2)). Layers go in
/// one by one (`lowerdir+`, Linux 6.8): mount(2) takes its data in one page, and the
/// paths of a large image's layers are longer together.
///
/// # Errors
///
/// Those of the system calls.
pub fn detached(fstype: &str, source: &str, options: &MountOptions) -> io::Result<OwnedFd> {
    let context = fsopen(fstype, FsOpenFlags::FSOPEN_CLOEXEC)?;
    // As it stands in /proc/mounts.
    fsconfig_set_string(&context, "source", source)?;
    for item in options.data.split(',').filter(|item| !item.is_empty()) {
        match item.split_once('=') {
            Some(("lowerdir", layers)) => {
                for layer in layers.split(':') {
                    fsconfig_set_string(&context, "lowerdir+", layer)?;
                }
            }
            Some((key, value)) => fsconfig_set_string(&context, key, value)?,
            None => fsconfig_set_flag(&context, item)?,
        }
    }
    fsconfig_create(&context)?;
    let attributes = u32::try_from(options.attr.set).map_err(io::Error::other)?;
    let attributes = MountAttrFlags::from_bits_retain(attributes);
    Ok(fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        attributes,
    )?)
}

/// The propagation types, "r" before them for a whole tree.
#[must_use]
pub fn propagation(option: &str) -> Option<(MsFlags, bool)> {
    let kind = |name| match name {
        "private" => Some(MsFlags::MS_PRIVATE),
        "shared" => Some(MsFlags::MS_SHARED),
        "slave" => Some(MsFlags::MS_SLAVE),
        "unbindable" => Some(MsFlags::MS_UNBINDABLE),
        _ => None,
    };
    match kind(option) {
        Some(flags) => Some((flags, false)),
        None => Some((kind(option.strip_prefix('r')?)?, true)),
    }
}

/// The `MS_*` flag an option sets or clears.
fn flag(option: &str) -> Option<(MsFlags, bool)> {
    Some(match option {
        "ro" => (MsFlags::MS_RDONLY, true),
        "rw" => (MsFlags::MS_RDONLY, false),
        "nosuid" => (MsFlags::MS_NOSUID, true),
        "suid" => (MsFlags::MS_NOSUID, false),
        "nodev" => (MsFlags::MS_NODEV, true),
        "dev" => (MsFlags::MS_NODEV, false),
        "noexec" => (MsFlags::MS_NOEXEC, true),
        "exec" => (MsFlags::MS_NOEXEC, false),
        "noatime" => (MsFlags::MS_NOATIME, true),
        "atime" => (MsFlags::MS_NOATIME, false),
        "nodiratime" => (MsFlags::MS_NODIRATIME, true),
        "diratime" => (MsFlags::MS_NODIRATIME, false),
        "relatime" => (MsFlags::MS_RELATIME, true),
        "norelatime" => (MsFlags::MS_RELATIME, false),
        "strictatime" => (MsFlags::MS_STRICTATIME, true),
        "nostrictatime" => (MsFlags::MS_STRICTATIME, false),
        "sync" => (MsFlags::MS_SYNCHRONOUS, true),
        "async" => (MsFlags::MS_SYNCHRONOUS, false),
        "dirsync" => (MsFlags::MS_DIRSYNC, true),
        "lazytime" => (MsFlags::MS_LAZYTIME, true),
        "nolazytime" => (MsFlags::MS_LAZYTIME, false),
        "silent" => (MsFlags::MS_SILENT, true),
        "loud" => (MsFlags::MS_SILENT, false),
        _ => return None,
    })
}

/// The `MOUNT_ATTR_*` an option sets or clears.
fn attribute(option: &str) -> Option<(u64, bool)> {
    Some(match option {
        "ro" => (libc::MOUNT_ATTR_RDONLY, true),
        "rw" => (libc::MOUNT_ATTR_RDONLY, false),
        "nosuid" => (libc::MOUNT_ATTR_NOSUID, true),
        "suid" => (libc::MOUNT_ATTR_NOSUID, false),
        "nodev" => (libc::MOUNT_ATTR_NODEV, true),
        "dev" => (libc::MOUNT_ATTR_NODEV, false),
        "noexec" => (libc::MOUNT_ATTR_NOEXEC, true),
        "exec" => (libc::MOUNT_ATTR_NOEXEC, false),
        "nodiratime" => (libc::MOUNT_ATTR_NODIRATIME, true),
        "diratime" => (libc::MOUNT_ATTR_NODIRATIME, false),
        "noatime" => (libc::MOUNT_ATTR_NOATIME, true),
        "strictatime" => (libc::MOUNT_ATTR_STRICTATIME, true),
        "relatime" => (libc::MOUNT_ATTR_RELATIME, true),
        "atime" | "nostrictatime" | "norelatime" => (ATIME_MASK, false),
        _ => return None,
    })
}

fn change(attr: &mut MountAttr, bits: u64, set: bool) {
    // The access-time attributes are one field, not bits: choosing one value
    // means clearing the whole field (mount_setattr(2)).
    let is_atime = bits & ATIME_MASK != 0 || bits == libc::MOUNT_ATTR_RELATIME;
    let cleared = if is_atime { ATIME_MASK } else { bits };
    attr.set &= !cleared;
    if set {
        attr.set |= bits;
        attr.clear &= !cleared;
    }
    if !set || is_atime {
        attr.clear |= cleared;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_and_data_are_split() {
        let options = MountOptions::parse(&["nosuid", "ro", "mode=755", "size=64k", "noexec"]);
        assert_eq!(
            options.flags,
            MsFlags::MS_NOSUID | MsFlags::MS_RDONLY | MsFlags::MS_NOEXEC
        );
        assert_eq!(options.data, "mode=755,size=64k");
        assert_eq!(options.data_value("size"), Some("64k"));
        assert!(options.has_data("mode") && !options.has_data("mod"));
        assert!(!options.bind);
    }

    #[test]
    fn later_options_win() {
        let options = MountOptions::parse(&["ro", "rw", "nodev"]);
        assert_eq!(options.flags, MsFlags::MS_NODEV);
        assert_eq!(options.attr.set, libc::MOUNT_ATTR_NODEV);
        assert_eq!(options.attr.clear, libc::MOUNT_ATTR_RDONLY);
    }

    #[test]
    fn bind_with_tree_attributes() {
        let options = MountOptions::parse(&["rbind", "rro", "ridmap", "rprivate"]);
        assert!(options.bind && options.recursive && options.map_tree);
        assert_eq!(options.tree_attr.set, libc::MOUNT_ATTR_RDONLY);
        assert!(options.attr.is_empty());
        assert_eq!(options.propagation, Some((MsFlags::MS_PRIVATE, true)));
        assert_eq!(options.data, "");
    }

    #[test]
    fn access_time_is_one_field() {
        let options = MountOptions::parse(&["bind", "noatime", "relatime"]);
        assert_eq!(options.attr.set, libc::MOUNT_ATTR_RELATIME);
        assert_eq!(options.attr.clear, ATIME_MASK);
    }

    #[test]
    fn overlay_options_stay_data() {
        let text = ["lowerdir=/a:/b", "upperdir=/u", "workdir=/w", "volatile"];
        let options = MountOptions::parse(&text);
        assert_eq!(options.data, text.join(","));
    }
}
