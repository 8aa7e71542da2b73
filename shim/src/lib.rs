//! nacre's containerd side: the shim, one daemon per pod, and what it needs.
//!
//! ```text
//! containerd --start/delete--> bootstrap --spawns--> serve (one per pod)
//!            --ttrpc---------> task::service -> task::container -> sandbox -> machine -> monitor
//!            <-events--------- events                                   \-> agent (ttrpc over vsock)
//! ```
//!
//! The shim is the trusted zone. It holds the privilege: it opens files, makes
//! mounts, taps and cgroups, and hands descriptors to the monitor. What comes
//! back from the monitor or the agent is data of a hostile guest: it ends up in
//! replies and events, never in a path, an argument or an allocation size.
#![warn(missing_docs)]

pub mod bootstrap;
pub mod cgroup;
pub mod cli;
pub mod config;
pub mod devices;
mod elf;
pub mod error;
pub mod events;
pub mod hooks;
pub mod machine;
pub mod network;
pub mod oci;
mod oom;
pub mod rundir;
pub mod sandbox;
pub mod storage;
pub mod task;
pub mod virtiofsd;

/// Runtime name as users write it.
pub const RUNTIME_NAME: &str = "io.containerd.nacre.v2";
