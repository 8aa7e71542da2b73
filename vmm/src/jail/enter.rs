//! From root in fresh namespaces to nobody in an empty one.

use std::io;

use nacre_protocol::vm::Jail;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid, chdir, pivot_root, setgroups, setresgid, setresuid};

use crate::layout::MIB;

/// A directory every host has; in our own mount namespace nobody misses it.
const MOUNT_POINT: &str = "/proc";
/// The root holds nothing but its own inode.
const ROOT_OPTIONS: &str = "size=4k,nr_inodes=1,mode=0555";
/// Guest memory, devices and their events need a few hundred at most.
const MAX_OPEN_FILES: u64 = 4096;
/// Threads: vCPUs and devices. Counted per user, and the user is this pod's.
const MAX_THREADS: u64 = 512;
/// Capabilities are numbered from 0; the kernel knows fewer than this.
const MAX_CAPABILITIES: libc::c_ulong = 64;

/// A step that failed.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// Most of them.
    #[error("jail: {step}: {source}")]
    Step {
        /// Which.
        step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The guest's memory could not be pinned.
    #[error(
        "jail: the memory of a guest with PCI devices is pinned, {mib} MiB; RLIMIT_MEMLOCK is {limit_mib} MiB \
         and cannot be raised here: {source}; set LimitMEMLOCK=infinity for containerd's service, or leave \
         it CAP_SYS_RESOURCE"
    )]
    LockLimit {
        /// What is to be pinned.
        mib: u64,
        /// The limit.
        limit_mib: u64,
        /// The kernel's answer.
        source: io::Error,
    },
}

trait Step<T> {
    fn step(self, step: &'static str) -> Result<T, JailError>;
}

impl<T> Step<T> for Result<T, Errno> {
    fn step(self, step: &'static str) -> Result<T, JailError> {
        self.map_err(|errno| JailError::Step {
            step,
            source: errno.into(),
        })
    }
}

/// Gives up file system, capabilities and user. Call it while the process has
/// one thread, in a mount namespace of its own. Of its memory the process may lock
/// `locked_bytes`, or as much as it could before.
///
/// # Errors
///
/// The step that failed; the process must not go on then.
pub fn enter(jail: Jail, locked_bytes: Option<u64>) -> Result<(), JailError> {
    empty_root()?;
    limit(locked_bytes)?;
    drop_privilege(jail)
}

fn empty_root() -> Result<(), JailError> {
    let none = None::<&str>;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).step("private mounts")?;
    mount(
        Some("jail"),
        MOUNT_POINT,
        Some("tmpfs"),
        flags,
        Some(ROOT_OPTIONS),
    )
    .step("empty root")?;
    chdir(MOUNT_POINT).step("enter the empty root")?;
    // The old root lands on top of the new one (pivot_root(2)), and goes.
    pivot_root(".", ".").step("pivot_root")?;
    umount2(".", MntFlags::MNT_DETACH).step("leave the old root")?;
    chdir("/").step("enter the new root")?;
    let read_only = flags | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(none, "/", none, read_only, none).step("read-only root")
}

fn limit(locked_bytes: Option<u64>) -> Result<(), JailError> {
    for (resource, value) in [
        (Resource::RLIMIT_CORE, 0),
        (Resource::RLIMIT_NOFILE, MAX_OPEN_FILES),
        (Resource::RLIMIT_NPROC, MAX_THREADS),
    ] {
        setrlimit(resource, value, value).step("resource limits")?;
    }
    locked_bytes.map_or(Ok(()), limit_locked)
}

fn limit_locked(bytes: u64) -> Result<(), JailError> {
    let resource = Resource::RLIMIT_MEMLOCK;
    setrlimit(resource, bytes, bytes).map_err(|errno| JailError::LockLimit {
        mib: bytes / MIB,
        limit_mib: getrlimit(resource).map_or(0, |(_, hard)| hard / MIB),
        source: errno.into(),
    })
}

fn drop_privilege(jail: Jail) -> Result<(), JailError> {
    prctl::set_no_new_privs().step("no_new_privs")?;
    drop_bounding_set().step("capability bounding set")?;
    setgroups(&[]).step("supplementary groups")?;
    let gid = Gid::from_raw(jail.gid);
    setresgid(gid, gid, gid).step("group")?;
    let uid = Uid::from_raw(jail.uid);
    setresuid(uid, uid, uid).step("user")?;
    // Already gone with root, unless the pod's user is root.
    drop_capabilities().step("capabilities")
}

fn drop_bounding_set() -> Result<(), Errno> {
    for capability in 0..MAX_CAPABILITIES {
        // SAFETY: prctl with integer arguments.
        let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        match Errno::result(result) {
            Ok(_) => {}
            // Past the last one the kernel knows.
            Err(Errno::EINVAL) if capability > 0 => return Ok(()),
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

fn drop_capabilities() -> Result<(), Errno> {
    /// `_LINUX_CAPABILITY_VERSION_3`, whose sets are two words long.
    const VERSION: u32 = 0x2008_0522;
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    let header = Header {
        version: VERSION,
        pid: 0,
    };
    // Effective, permitted, inheritable; twice.
    let sets = [0u32; 6];
    // SAFETY: header and sets are laid out as capset(2) wants them; it writes
    // neither when the version is one it knows.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) };
    Errno::result(result)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sched::{CloneFlags, unshare};
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};

    /// Runs in a child of its own, because there is no way back.
    fn inside() -> Result<(), String> {
        unshare(CloneFlags::CLONE_NEWNS).map_err(|error| error.to_string())?;
        let jail = Jail {
            uid: 65_500,
            gid: 65_501,
        };
        enter(jail, Some(1 << 20)).map_err(|error| error.to_string())?;
        let expect = |holds: bool, what: &str| if holds { Ok(()) } else { Err(what.to_owned()) };
        expect(nix::unistd::getuid().as_raw() == 65_500, "uid")?;
        expect(nix::unistd::getgid().as_raw() == 65_501, "gid")?;
        expect(
            std::fs::read_dir("/").is_ok_and(|dir| dir.count() == 0),
            "empty root",
        )?;
        expect(std::fs::write("/file", "x").is_err(), "read-only root")?;
        expect(
            setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0)).is_err(),
            "no way back",
        )?;
        expect(
            getrlimit(Resource::RLIMIT_MEMLOCK) == Ok((1 << 20, 1 << 20)),
            "locked memory",
        )?;
        expect(prctl::get_no_new_privs() == Ok(true), "no_new_privs")
    }

    /// As a containerd has it that may not raise its limits.
    fn with_a_lock_limit() -> Result<(), String> {
        let text = |error: Errno| error.to_string();
        setrlimit(Resource::RLIMIT_MEMLOCK, 2 * MIB, 2 * MIB).map_err(text)?;
        drop_capabilities().map_err(text)?;
        limit_locked(MIB).map_err(|error| error.to_string())?;
        let error = limit_locked(64 * MIB).err().ok_or("it was raised")?;
        let error = error.to_string();
        let parts = [
            "64 MiB",
            "RLIMIT_MEMLOCK is 1 MiB",
            "LimitMEMLOCK=",
            "CAP_SYS_RESOURCE",
        ];
        if parts.iter().all(|part| error.contains(part)) {
            Ok(())
        } else {
            Err(error)
        }
    }

    #[test]
    fn lock_limit_that_cannot_be_raised_is_explained() {
        in_a_child(with_a_lock_limit);
    }

    #[test]
    fn jailed_process_has_nothing() {
        if Uid::effective().is_root() {
            in_a_child(inside);
        } else {
            eprintln!("skipped: needs root");
        }
    }

    fn in_a_child(body: fn() -> Result<(), String>) {
        // SAFETY: the child only makes system calls, allocates, and exits; glibc
        // keeps its allocator usable in a forked child.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                let code = match body() {
                    Ok(()) => 0,
                    Err(what) => {
                        eprintln!("in the child: {what}");
                        1
                    }
                };
                // SAFETY: ends the child without running the parent's exit handlers.
                unsafe { libc::_exit(code) }
            }
            ForkResult::Parent { child } => {
                assert_eq!(waitpid(child, None).unwrap(), WaitStatus::Exited(child, 0));
            }
        }
    }
}
