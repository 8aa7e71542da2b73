//! The container engine: makes processes in namespaces of their own.
//!
//! It is our own rather than the `libcontainer` crate. libcontainer clones the
//! calling process without exec, so it would have had to run in a re-executed
//! helper all the same. It looks a command up before "created", as wanted, but
//! says so in words of its own where containerd's clients look for runc's, and
//! an execve(2) that fails at "start" is a log line, not an error. Its seccomp
//! support needs a distribution's static libseccomp, and it keeps state in
//! directories an agent has no use for. What remains is small: the kernel does
//! the work.
//!
//! ```text
//!   agent (spawn.rs) --exec self--> helper (init.rs) --clone3--> process
//!                                   joins, reports, exits        rootfs.rs, devices.rs,
//!                                                                process.rs, credentials.rs,
//!                                                                seccomp.rs, command.rs,
//!                                                                hooks.rs; or pause.rs
//! ```
//!
//! `sync.rs` is the protocol between the three, `sys.rs` the system calls.
//! Of the hooks, those for inside the container run here (`hooks.rs`); the others
//! are the host's. AppArmor and SELinux are not there: the guest kernel has no
//! such modules.

pub mod command;
pub mod credentials;
pub mod devices;
pub mod error;
pub mod hooks;
pub mod init;
pub mod pause;
pub mod process;
pub mod rootfs;
pub mod seccomp;
pub mod spawn;
pub mod sync;
pub mod sys;
pub mod users;

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};

/// The namespaces a specification lists.
#[must_use]
pub fn namespaces(spec: &Spec) -> &[LinuxNamespace] {
    let linux = spec.linux().as_ref();
    linux
        .and_then(|linux| linux.namespaces().as_deref())
        .unwrap_or_default()
}

/// Whether it asks for a new namespace of this type.
#[must_use]
pub fn is_new(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    namespaces(spec)
        .iter()
        .any(|namespace| namespace.typ() == kind && namespace.path().is_none())
}
