//! containerd's Task API, and its Sandbox API.
//!
//! ```text
//! service.rs    the ttrpc trait; each method only delegates
//! sandboxed.rs  the Sandbox API, for a pod whose sandbox is no task
//! pod.rs        the containers of one pod, its one sandbox, create and shutdown
//! life.rs       whether a pod takes containers, and whether anybody will ask for one
//! container.rs  one container and its execs, from start to deletion
//! control.rs    signals, pause, terminal size, limits, counters
//! process.rs    one process's state machine
//! io.rs         FIFOs and files on the host, streams to the guest
//! resize.rs     new limits, and a machine that is as large as they ask for
//! volumes.rs    what the guest holds for a container besides its root
//! logger.rs     logging programs (`binary://`)
//! console.rs    shells in the guest itself, of which containerd knows nothing
//! stats.rs      the agent's counters as containerd's message
//! ```
//!
//! No call holds a lock while it waits for the guest: a call that changes a
//! process claims it by moving its phase (Created to Starting), and reads take
//! the phase as it is. What the guest answers is data: it becomes an exit
//! status or a counter, and nothing on the host depends on its being true.

pub mod console;
mod container;
mod control;
mod deletion;
mod io;
mod life;
mod logger;
mod pod;
mod process;
mod resize;
pub mod sandboxed;
pub mod service;
mod stats;
mod volumes;

#[cfg(test)]
mod tests;

use crate::hooks::HookRefused;
use crate::machine::MachineError;
use crate::sandbox::SandboxError;
use crate::storage::StorageError;

pub use io::StreamError;
pub use pod::Pod;
pub(crate) use process::lock;

/// Errors of the Task API.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// There is no such container.
    #[error("no container {0}")]
    NoContainer(String),
    /// There is no such exec.
    #[error("no exec {exec_id} in container {container_id}")]
    NoExec {
        /// The container.
        container_id: String,
        /// The exec.
        exec_id: String,
    },
    /// There is no such sandbox.
    #[error("no sandbox {0}")]
    NoSandbox(String),
    /// The pod has its sandbox.
    #[error("cannot create sandbox {0}: its pod exists already")]
    SandboxExists(String),
    /// The process has exited; containerd takes `NOT_FOUND` for that.
    #[error("process {process} has already finished")]
    Finished {
        /// Which.
        process: String,
    },
    /// The container exists.
    #[error("container {0} exists already")]
    ContainerExists(String),
    /// The container was given up before it was there.
    #[error("container {0} was given up while it was being created")]
    GivenUp(String),
    /// The exec exists.
    #[error("exec {exec_id} exists already in container {container_id}")]
    ExecExists {
        /// The container.
        container_id: String,
        /// The exec.
        exec_id: String,
    },
    /// The process's phase does not allow the action.
    #[error("cannot {action} {process}: it is {phase}")]
    WrongPhase {
        /// What was asked.
        action: &'static str,
        /// Of which process.
        process: String,
        /// What it is doing.
        phase: &'static str,
    },
    /// A request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// An OCI document cannot be parsed.
    #[error("container {container_id}: unusable {what}")]
    Spec {
        /// The container.
        container_id: String,
        /// Which document.
        what: &'static str,
        /// The parser's complaint.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// nacre does not do that.
    #[error("{0} is not supported by nacre")]
    Unsupported(&'static str),
    /// Something did not happen in time.
    #[error("{what} took longer than {seconds} s")]
    Timeout {
        /// What.
        what: &'static str,
        /// The limit.
        seconds: u64,
    },
    /// The machine failed.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The sandbox could not be made.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// A stream could not be set up.
    #[error(transparent)]
    Io(#[from] StreamError),
    /// The container's storage could not be set up.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The container has a hook that cannot be run.
    #[error(transparent)]
    Hook(#[from] HookRefused),
    /// An answer cannot be encoded.
    #[error("encode the answer")]
    Encode(#[source] protobuf::Error),
    /// The shim is shutting down.
    #[error("the shim is shutting down")]
    Cancelled,
}

/// Most of a guest's message that reaches containerd and its logs.
const MAX_GUEST_MESSAGE_CHARS: usize = 1024;

/// An agent's error in its own words, bounded and on one line.
pub(crate) fn agent_message(error: &ttrpc::Error) -> String {
    let text = match error {
        ttrpc::Error::RpcStatus(status) => status.message().to_owned(),
        other => other.to_string(),
    };
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MAX_GUEST_MESSAGE_CHARS)
        .collect()
}
