//! The walls around a monitor.
//!
//! ```text
//!   shim (root) --spawn: clone3 with new pid, mount, ipc, uts [, net] namespaces,
//!        |               straight into the pod's cgroup and network namespace
//!        v
//!   monitor (root, waits for Request::Boot) --enter: empty read-only root, no
//!        |               capabilities, the pod's own uid and gid
//!        v
//!   monitor (nobody) builds and runs the VM
//! ```
//!
//! A monitor's life hangs on its control channel: when the shim is gone, by
//! whatever hand, the channel closes and the monitor exits. `PR_SET_PDEATHSIG`
//! would not do: it follows the *thread* that spawned, and a change of user clears
//! it.

mod enter;
mod spawn;

pub use enter::{JailError, enter};
pub use spawn::{Child, Spawn, spawn};

/// Where the control channel is in a spawned monitor.
pub const CONTROL_FD: std::os::fd::RawFd = 3;
