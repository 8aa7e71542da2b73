//! Mappings of user and group ids (user_namespaces(7)), and mounts that carry one
//! (mount_setattr(2), "ID-mapped mounts").
//!
//! The shim maps what the host has for a container with users of its own, the
//! agent what the guest has, and makes the container's user namespace.

use std::fs::{self, File};
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, Shutdown, SockFlag, SockType, shutdown, socketpair};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, read, write};
use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Mount, Spec};
use serde::{Deserialize, Serialize};

/// Which ids of a container are which outside of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMaps {
    /// Users.
    pub uids: Vec<LinuxIdMapping>,
    /// Groups.
    pub gids: Vec<LinuxIdMapping>,
}

impl IdMaps {
    /// Those of a container, if it has a user namespace.
    #[must_use]
    pub fn of_spec(spec: &Spec) -> Option<Self> {
        let linux = spec.linux().as_ref()?;
        let mut namespaces = linux.namespaces().iter().flatten();
        let mapped = namespaces.any(|namespace| namespace.typ() == LinuxNamespaceType::User);
        mapped.then(|| Self {
            uids: linux.uid_mappings().clone().unwrap_or_default(),
            gids: linux.gid_mappings().clone().unwrap_or_default(),
        })
    }

    /// Those of a mount of a container, if its files' owners are to be mapped
    /// (runtime-spec 1.2, config.md, "Linux mount options": `idmap` and `ridmap`
    /// without mappings take the container's).
    #[must_use]
    pub fn of_mount(mount: &Mount, spec: &Spec) -> Option<Self> {
        let mut options = mount.options().iter().flatten();
        match (mount.uid_mappings(), mount.gid_mappings()) {
            (None, None) => options
                .any(|option| option == "idmap" || option == "ridmap")
                .then(|| Self::of_spec(spec))
                .flatten(),
            (uids, gids) => Some(Self {
                uids: uids.clone().unwrap_or_default(),
                gids: gids.clone().unwrap_or_default(),
            }),
        }
    }

    /// What a user of the container is outside.
    #[must_use]
    pub fn uid(&self, uid: u32) -> Option<u32> {
        outside(&self.uids, uid)
    }

    /// What a group of the container is outside.
    #[must_use]
    pub fn gid(&self, gid: u32) -> Option<u32> {
        outside(&self.gids, gid)
    }

    /// A new user namespace with these mappings.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for empty mappings, the kernel's refusal of others.
    pub fn namespace(&self) -> io::Result<OwnedFd> {
        if self.uids.is_empty() || self.gids.is_empty() {
            let error = "a user namespace needs mappings of users and of groups";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, error));
        }
        let kind = SockType::Stream;
        let (ours, theirs) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC)?;
        // SAFETY: the child only makes system calls until it exits.
        let pid = match unsafe { fork() }? {
            ForkResult::Child => {
                drop(ours);
                hold_namespace(&theirs);
            }
            ForkResult::Parent { child } => child,
        };
        drop(theirs);
        let namespace = self.fill(pid, &ours);
        // It ends at the end of file. A close would not be one while another thread's
        // child has a copy of this socket, which that thread may end after ours only.
        let ended = shutdown(ours.as_raw_fd(), Shutdown::Both);
        while matches!(waitpid(pid, None), Err(Errno::EINTR)) {}
        ended?;
        namespace
    }

    fn fill(&self, pid: Pid, socket: &OwnedFd) -> io::Result<OwnedFd> {
        let mut errno = [0; size_of::<i32>()];
        if read(socket, &mut errno)? < errno.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match i32::from_ne_bytes(errno) {
            0 => {}
            errno => return Err(io::Error::from_raw_os_error(errno)),
        }
        fs::write(format!("/proc/{pid}/uid_map"), lines(&self.uids))?;
        fs::write(format!("/proc/{pid}/gid_map"), lines(&self.gids))?;
        Ok(File::open(format!("/proc/{pid}/ns/user"))?.into())
    }
}

/// Makes a user namespace and keeps it until the other end of `socket` is closed.
fn hold_namespace(socket: &OwnedFd) -> ! {
    let result = unshare(CloneFlags::CLONE_NEWUSER);
    let errno = result.map_or_else(|errno| errno as i32, |()| 0);
    let mut end = [0];
    if write(socket, &errno.to_ne_bytes()).is_ok() {
        while matches!(read(socket, &mut end), Err(Errno::EINTR)) {}
    }
    // SAFETY: this is a forked child, whose exit handlers are its parent's.
    unsafe { libc::_exit(0) }
}

fn outside(maps: &[LinuxIdMapping], id: u32) -> Option<u32> {
    maps.iter().find_map(|map| {
        let offset = id.checked_sub(map.container_id())?;
        let known = offset < map.size();
        known.then(|| map.host_id().checked_add(offset)).flatten()
    })
}

/// As /proc/PID/uid_map takes it.
fn lines(maps: &[LinuxIdMapping]) -> String {
    maps.iter()
        .map(|map| format!("{} {} {}\n", map.container_id(), map.host_id(), map.size()))
        .collect()
}

/// Has a mount that is attached nowhere show its files' owners as `namespace` maps
/// them; `recursive`: all of the tree.
///
/// # Errors
///
/// Those of mount_setattr(2); a file system that cannot do it is named as such.
pub fn map_mount(
    mount: BorrowedFd<'_>,
    namespace: BorrowedFd<'_>,
    recursive: bool,
) -> io::Result<()> {
    let attr = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::try_from(namespace.as_raw_fd()).map_err(io::Error::other)?,
    };
    let recursive = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: string and structure outlive the call; the size is the structure's.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    match Errno::result(result) {
        Ok(_) => Ok(()),
        Err(Errno::EINVAL) => Err(io::Error::other(
            "its file system cannot map the owners of files (ID-mapped mounts)",
        )),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::LinuxIdMappingBuilder;
    use serde_json::json;

    fn maps(list: &[(u32, u32, u32)]) -> Vec<LinuxIdMapping> {
        let map = |(container, host, size): &(u32, u32, u32)| {
            let map = LinuxIdMappingBuilder::default().container_id(*container);
            map.host_id(*host).size(*size).build().unwrap()
        };
        list.iter().map(map).collect()
    }

    #[test]
    fn ids_inside_and_outside() {
        let maps = IdMaps {
            uids: maps(&[(0, 100_000, 1000), (2000, 5, 2)]),
            gids: maps(&[(0, u32::MAX, 2)]),
        };
        assert_eq!(maps.uid(0), Some(100_000));
        assert_eq!(maps.uid(999), Some(100_999));
        assert_eq!((maps.uid(1000), maps.uid(2001)), (None, Some(6)));
        assert_eq!((maps.gid(0), maps.gid(1)), (Some(u32::MAX), None));
        assert_eq!(lines(&maps.uids), "0 100000 1000\n2000 5 2\n");
    }

    #[test]
    fn mappings_of_specs_and_mounts() {
        let map = json!([{"containerID": 0, "hostID": 9, "size": 3}]);
        let spec = |namespaces| -> Spec {
            let linux = json!({"namespaces": namespaces, "uidMappings": map, "gidMappings": map});
            serde_json::from_value(json!({"ociVersion": "1.2.0", "linux": linux})).unwrap()
        };
        let mapped = spec(json!([{"type": "user"}]));
        let plain = spec(json!([{"type": "pid"}]));
        assert_eq!(IdMaps::of_spec(&mapped).unwrap().uid(2), Some(11));
        assert_eq!(IdMaps::of_spec(&plain), None);
        let mount = |rest| -> Mount { serde_json::from_value(rest).unwrap() };
        let bind = mount(json!({"destination": "/x", "options": ["rbind"]}));
        assert_eq!(IdMaps::of_mount(&bind, &mapped), None);
        let idmap = mount(json!({"destination": "/x", "options": ["rbind", "idmap"]}));
        assert_eq!(IdMaps::of_mount(&idmap, &mapped), IdMaps::of_spec(&mapped));
        let own = json!([{"containerID": 0, "hostID": 7, "size": 1}]);
        let own = mount(json!({"destination": "/x", "uidMappings": own, "gidMappings": own}));
        assert_eq!(IdMaps::of_mount(&own, &plain).unwrap().gid(0), Some(7));
    }

    #[test]
    fn a_namespace_has_the_mappings() {
        let empty = IdMaps {
            uids: Vec::new(),
            gids: maps(&[(0, 0, 1)]),
        };
        let error = empty.namespace().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: mapping other users takes root");
            return;
        }
        let mapped = IdMaps {
            uids: maps(&[(0, 100_000, 65536)]),
            gids: maps(&[(0, 100_000, 65536)]),
        };
        let own = fs::metadata("/proc/self/ns/user").unwrap();
        let other = File::from(mapped.namespace().unwrap()).metadata().unwrap();
        use std::os::unix::fs::MetadataExt;
        assert_ne!(own.ino(), other.ino());
        let overlapping = IdMaps {
            uids: maps(&[(0, 1, 2), (1, 9, 1)]),
            ..mapped
        };
        assert!(overlapping.namespace().is_err());
    }

    /// Each thread's child has copies of what the other threads have open.
    #[test]
    fn many_threads_make_namespaces_at_once() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: mapping other users takes root");
            return;
        }
        let (made, all) = std::sync::mpsc::channel();
        for _ in 0..16 {
            let made = made.clone();
            std::thread::spawn(move || {
                let own = IdMaps {
                    uids: maps(&[(0, 100_000, 65536)]),
                    gids: maps(&[(0, 100_000, 65536)]),
                };
                for _ in 0..20 {
                    made.send(own.namespace().map(drop)).unwrap();
                }
            });
        }
        for count in 0..16 * 20 {
            let next = all.recv_timeout(std::time::Duration::from_secs(30));
            next.unwrap_or_else(|_| panic!("threads hang after {count} namespaces"))
                .unwrap();
        }
    }
}
