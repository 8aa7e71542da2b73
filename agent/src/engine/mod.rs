//! The container engine: makes processes in namespaces of their own.
//!
//! It is our own rather than the `libcontainer` crate. libcontainer clones the
//! calling process without exec, so it would have had to run in a re-executed
//! helper anyway; it reports a command that cannot be executed as a line on
//! standard error after `start` returned, where containerd wants an error of
//! the call in runc's words; its seccomp support needs libseccomp's static
//! library from a distribution; and it keeps state in directories the agent
//! has no use for. What remains is small: the kernel does the work.
//!
//! ```text
//!   agent (spawn.rs) --exec self--> helper (init.rs) --clone3--> process
//!                                   joins, reports, exits        rootfs.rs, devices.rs,
//!                                                                process.rs, credentials.rs,
//!                                                                seccomp.rs, command.rs
//! ```
//!
//! `sync.rs` is the protocol between the three, `sys.rs` the system calls.
//! Hooks, AppArmor and SELinux are not run here: hooks are the host's, and the
//! guest kernel has no such modules.

pub mod command;
pub mod credentials;
pub mod devices;
pub mod error;
pub mod init;
pub mod process;
pub mod rootfs;
pub mod seccomp;
pub mod spawn;
pub mod sync;
pub mod sys;
