//! Containers with users of their own (`linux.uidMappings`, user_namespaces(7)).
//!
//! Who is root in a user namespace has no rights to what is outside of it. So the
//! helper does what takes the agent's rights before it enters the namespace: it
//! opens the sources of mounts and maps their owners, makes device nodes (mknod(2)
//! is not for the root of such a namespace), mounts what shows namespaces that
//! stay the guest's, raises limits, hands over the standard streams. Then it
//! becomes the container's root, and what it forks is in new namespaces that
//! belong to the container's.

use std::path::Path;

use nacre_protocol::idmap::IdMaps;
use nix::sched::{CloneFlags, setns};
use nix::unistd::{Gid, Uid, setresgid, setresuid};
use oci_spec::runtime::{LinuxNamespaceType, Process, Spec};

use super::credentials;
use super::error::{InitError, Step};
use super::namespaces;
use super::process::own_stdio;
use super::rootfs::Sources;
use super::sys;

/// Prepares a container's process and enters a new user namespace.
///
/// # Errors
///
/// `Invalid` for mappings without a root and for a PID namespace of others; those
/// of the steps.
pub fn enter_new<'a>(
    spec: &'a Spec,
    maps: &IdMaps,
    process: &Process,
    cgroup: &Path,
) -> Result<Sources<'a>, InitError> {
    let mut joined = namespaces(spec).iter();
    if joined.any(|own| own.typ() == LinuxNamespaceType::Pid && own.path().is_some()) {
        // Its /proc could not be mounted: it belongs to another user namespace.
        return Err(InitError::Invalid(
            "a process namespace that containers share (shareProcessNamespace: true) cannot \
             have users of its own (hostUsers: false)"
                .into(),
        ));
    }
    let namespace = maps.namespace().step(|| "make a user namespace")?;
    let sources = Sources::open(spec, cgroup, Some(maps))?;
    hand_over(maps, process)?;
    setns(&namespace, CloneFlags::CLONE_NEWUSER).step(|| "enter the user namespace")?;
    become_root()?;
    Ok(sources)
}

/// Gives a process in a user namespace what only the agent can give.
///
/// # Errors
///
/// `Invalid` for a user who is not mapped; those of the steps.
pub fn hand_over(maps: &IdMaps, process: &Process) -> Result<(), InitError> {
    let user = process.user();
    let (Some(uid), Some(gid)) = (maps.uid(user.uid()), maps.gid(user.gid())) else {
        return Err(InitError::Invalid(format!(
            "user {}:{} is not among those mapped",
            user.uid(),
            user.gid()
        )));
    };
    credentials::raise_limits(process.rlimits().as_deref().unwrap_or_default())?;
    own_stdio(uid, Some(gid))
}

/// Becomes the root of the user namespace that this process has entered.
///
/// # Errors
///
/// Those of the system calls: `EINVAL` if nobody is mapped to root.
pub fn become_root() -> Result<(), InitError> {
    let what = || "become root of the user namespace";
    let (root, root_group) = (Uid::from_raw(0), Gid::from_raw(0));
    sys::set_groups(&[]).step(what)?;
    setresgid(root_group, root_group, root_group).step(what)?;
    setresuid(root, root, root).step(what)
}
