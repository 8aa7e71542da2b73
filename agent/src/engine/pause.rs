//! The first process of a pod's own PID namespace (`shareProcessNamespace`).
//!
//! Containers come and go; the namespace must outlive each of them, and orphans
//! need somebody to collect them. So the agent makes a process that does this
//! and nothing else. The containers see it as PID 1 and may look it up in /proc:
//! it has an empty root, no capabilities and no way to be told anything.

use std::convert::Infallible;
use std::os::fd::OwnedFd;

use nacre_protocol::guest::CONTAINERS_DIR;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{SigHandler, Signal, signal};

use super::error::{InitError, Step};
use super::sync::{self, Report};
use super::sys;

const NONE: Option<&str> = None;

/// Becomes that process; the caller is the first one of new PID and mount
/// namespaces.
///
/// # Errors
///
/// Returns only if it failed.
pub fn run(socket: &OwnedFd) -> Result<Infallible, InitError> {
    // What `ps` shows; containers know PID 1 of a pod by this name.
    std::fs::write("/proc/self/comm", "pause").step(|| "name the pause process")?;
    sys::die_with_parent().step(|| "tie the pause process to the agent")?;
    enter_empty_root()?;
    // SAFETY: ignoring a signal runs no code of ours.
    let ignored = unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) };
    // sigaction(2): children of a process that ignores SIGCHLD leave no zombies.
    ignored.step(|| "ignore SIGCHLD")?;
    sys::capset(0, 0, 0).step(|| "drop the capabilities of the pause process")?;
    sync::send(socket, &Report::Ready, None).step(|| "report to the agent")?;
    loop {
        nix::unistd::pause();
    }
}

fn enter_empty_root() -> Result<(), InitError> {
    let what = || "give the pause process an empty root";
    let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    mount(NONE, "/", NONE, private, NONE).step(what)?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("empty"), CONTAINERS_DIR, Some("tmpfs"), flags, NONE).step(what)?;
    nix::unistd::chdir(CONTAINERS_DIR).step(what)?;
    // As in rootfs.rs.
    nix::unistd::pivot_root(".", ".").step(what)?;
    umount2(".", MntFlags::MNT_DETACH).step(what)?;
    nix::unistd::chdir("/").step(what)
}
