//! The contracts between nacre's programs.
//!
//! ```text
//!   shim  -- control channel: VmConfig, Request, Event (unix seqpacket, JSON + fds) --> monitor
//!   shim  -- agent.proto (ttrpc over one vsock connection the guest dials)          --> agent
//!   shim  -- streams (one vsock connection per stdio stream, the shim dials)        --> agent
//!   nacre -- console.proto (ttrpc over the shim's socket)                           --> shim
//!   containerd -- cri.proto, Kubernetes' own, in CreateSandbox                      --> shim
//! ```
//!
//! Trust runs one way: the monitor believes the shim, the agent believes the
//! shim, and the shim treats all that comes back as hostile input.
//!
//! `hook` and `idmap` are no contracts: they are what shim and agent do alike.
#![warn(missing_docs)]

pub mod channel;
pub mod guest;
pub mod hook;
pub mod idmap;
pub mod vm;

/// Messages and ttrpc services of `proto/`, generated at build time.
#[allow(missing_docs, clippy::all, clippy::pedantic, clippy::unwrap_used)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

pub use generated::{agent, agent_ttrpc, console, console_ttrpc, cri};
