//! The boundary between the shim and whatever runs the guest.
//!
//! A [`Machine`] is made stopped, with a process that already stands in the
//! pod's network namespace and cgroup, so that its pid can be shown to host
//! hooks before the guest runs. [`VmMachine`] is the real one: the monitor
//! process, told what to do over the control channel. Tests use a machine that
//! runs an agent without a VM.
//!
//! Whoever waits for the guest also waits for [`Machine::stopped`]: it resolves
//! once, for every caller, when the machine is dead, by whatever hand.

mod vm;

#[cfg(test)]
pub mod fake;

use std::io;
use std::os::unix::net::UnixStream as StdUnixStream;

use async_trait::async_trait;
use nacre_protocol::channel::ChannelError;
#[cfg(doc)]
use nacre_protocol::vm::GROWTH_STEP_MIB;
use nacre_protocol::vm::StopReason;
use nacre_vmm::vfio::Passthrough;
use tokio::net::UnixStream;

use crate::network::HostNic;
use crate::storage::HostBacking;

pub use vm::{Launch, VmMachine};

/// This very program, whatever happened to its file since it started: the monitor's.
pub(crate) const SELF_EXE: &str = "/proc/self/exe";

/// Errors of a machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The monitor process could not be started.
    #[error("start the monitor")]
    Spawn(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The control channel failed.
    #[error("talk to the monitor")]
    Channel(#[from] ChannelError),
    /// A system call of the shim's side failed.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The failure.
        source: io::Error,
    },
    /// A disk cannot have other bytes.
    #[error("disk {serial}: {reason}")]
    Disk {
        /// Its serial number.
        serial: String,
        /// The monitor's words.
        reason: String,
    },
    /// A disk has not got other bytes in time. It may still get them.
    #[error(
        "disk {serial}: a device of the host has not answered a request for {seconds} s; it is \
         the guest's until it has"
    )]
    DiskBusy {
        /// Its serial number.
        serial: String,
        /// The time.
        seconds: u64,
    },
    /// Devices are not plugged in: all is as it was. Or what keeps a machine from letting go of
    /// them.
    #[error("{0}")]
    Slots(String),
    /// A network card cannot be put in or taken out.
    #[error("network card: {0}")]
    Nic(String),
    /// The shared directory cannot be put in.
    #[error("virtio-fs: {0}")]
    SharedDir(String),
    /// The machine is dead.
    #[error("the virtual machine is gone: {0}")]
    Stopped(Stop),
}

impl MachineError {
    /// For `map_err`.
    pub fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}

/// Why a machine is dead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// The guest stopped itself.
    Guest(StopReason),
    /// The monitor could not build or run the VM; its words.
    Failed(String),
    /// The monitor ended without a word, or was killed.
    Died,
    /// It was killed because the guest did not answer.
    Hung,
}

impl std::fmt::Display for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Guest(StopReason::Shutdown) => f.write_str("the guest powered off"),
            Self::Guest(StopReason::Reboot) => f.write_str("the guest rebooted"),
            Self::Guest(StopReason::TripleFault) => f.write_str("the guest crashed (triple fault)"),
            Self::Guest(StopReason::Panic) => f.write_str("the guest kernel panicked"),
            Self::Failed(message) => write!(f, "the monitor failed: {message}"),
            Self::Died => f.write_str("the monitor process ended"),
            Self::Hung => f.write_str("the guest hung: no answer within hang_timeout_seconds"),
        }
    }
}

/// Something that runs an agent.
#[async_trait]
pub trait Machine: Send + Sync {
    /// Host pid of the process that is the pod, as containerd sees it.
    fn pid(&self) -> u32;

    /// Opens a stream to a port of the guest. A refusal shows as end of file.
    async fn connect(&self, port: u32) -> Result<UnixStream, MachineError>;

    /// The connection the agent made when it was ready. Resolves once; pending
    /// until the agent is ready.
    async fn agent(&self) -> Result<UnixStream, MachineError>;

    /// Has the guest use `growth_mib` of memory beyond what it booted with, a
    /// multiple of [`GROWTH_STEP_MIB`], and waits until it does or comes no nearer.
    /// Returns what it uses then.
    async fn resize(&self, growth_mib: u32) -> Result<u32, MachineError>;

    /// Gives a disk that was made empty the bytes of `backing`, or none again. Nothing
    /// touches those it had when this returns. The size in bytes. After an error other
    /// than [`MachineError::Disk`] nobody knows what the disk has; it may be asked for
    /// again, and the last call counts.
    async fn exchange(
        &self,
        serial: &str,
        backing: Option<&HostBacking>,
        read_only: bool,
    ) -> Result<u64, MachineError>;

    /// Puts opened devices of the host into empty slots, one into each: all of them or
    /// none. After an error other than [`MachineError::Slots`], or when this was not waited
    /// for, nobody knows which until the machine is dead.
    async fn plug(&self, slots: &[u8], devices: &Passthrough) -> Result<(), MachineError>;

    /// Takes out what came with one call of [`Machine::plug`], whether the guest has let
    /// go of it or not. The machine has nothing of it when this returns. After any error, or when
    /// this was not waited for, it may have it until it is dead.
    async fn unplug(&self, slots: &[u8]) -> Result<(), MachineError>;

    /// Puts a network card into the running machine; the slot of bus 0 it is in, where
    /// the guest finds it when it looks. After any error it may be there, or come yet.
    async fn add_nic(&self, nic: &HostNic) -> Result<u8, MachineError>;

    /// Takes the network card out of a slot, whether the guest has let go of it or not; if
    /// not, no other comes into that slot. The machine has nothing of it open when this returns;
    /// after any error nobody knows, until it is dead.
    async fn remove_nic(&self, slot: u8, is_let_go: bool) -> Result<(), MachineError>;

    /// Puts the shared directory into a running machine that has none; `file_server` is its
    /// server's end of the connection. The slot of bus 0 it is in, where the guest finds it when
    /// it looks. After any error it may be there, or come yet, until the server has ended.
    async fn add_shared_dir(&self, file_server: &StdUnixStream) -> Result<u8, MachineError>;

    /// Has the kernel of a guest that does not answer say where it is, in the pod's log, and
    /// panic; [`Machine::stopped`] tells when, if it still can.
    async fn interrupt(&self) -> Result<(), MachineError>;

    /// Resolves when the machine is dead and its process reaped.
    async fn stopped(&self) -> Stop;

    /// Ends the machine at once. Idempotent; [`Machine::stopped`] tells when.
    fn kill(&self);
}
