//! What can go wrong with a sandbox.

use nacre_protocol::hook::HookError;
use nacre_vmm::vfio::open::OpenError;

use crate::cgroup::CgroupError;
use crate::devices::{Address, ClaimError, DriverError, KubeletError, RequestError};
use crate::machine::MachineError;
use crate::network::NetworkError;
use crate::rundir::RunDirError;
use crate::task::agent_message;
use crate::virtiofsd::VirtiofsdError;

/// Errors of a sandbox.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The pod wants the host's network, which a VM cannot be in.
    #[error(
        "container {container_id} asks for the host's network, which a virtual machine cannot \
         share; give it a network namespace (hostNetwork: false, no --net-host)"
    )]
    HostNetwork {
        /// The container that asked.
        container_id: String,
    },
    /// The pod wants a namespace of the host, which a VM cannot be in.
    #[error(
        "pod {sandbox_id} asks for {what}, which a virtual machine cannot have: it runs a kernel \
         of its own"
    )]
    HostNamespace {
        /// The pod that asked.
        sandbox_id: String,
        /// For what, in the words of a pod's specification.
        what: &'static str,
    },
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// A container needs a device that its pod's machine was not built with.
    #[error(
        "container {container_id} needs a device of the host, which the pod's running virtual \
         machine was built without"
    )]
    NoHotplug {
        /// The container.
        container_id: String,
    },
    /// The devices a container asks for cannot be had.
    #[error("container {container_id}: the devices it asks for")]
    Devices {
        /// The container.
        container_id: String,
        /// Why.
        source: RequestError,
    },
    /// It is not known what kubelet has given the pod.
    #[error("pod {sandbox_id}: the devices kubelet has given it")]
    Kubelet {
        /// The pod.
        sandbox_id: String,
        /// Why.
        source: KubeletError,
    },
    /// Another pod has a device.
    #[error("container {container_id}: the devices it asks for")]
    Claim {
        /// The container.
        container_id: String,
        /// Which, and whose it is.
        source: ClaimError,
    },
    /// A device cannot be opened.
    #[error("container {container_id}: the devices it asks for")]
    OpenDevices {
        /// The container.
        container_id: String,
        /// Which, and why.
        source: OpenError,
    },
    /// A driver for a device cannot be had.
    #[error("container {container_id}: the devices it asks for")]
    Drivers {
        /// The container.
        container_id: String,
        /// Which, and why.
        source: DriverError,
    },
    /// All disks for block devices are in use.
    #[error(
        "container {container_id} needs a block device, and the pod's virtual machine has no \
         empty disk left of the {count} it was made with: raise pod_disks in nacre.toml"
    )]
    NoSlot {
        /// The container.
        container_id: String,
        /// How many there are.
        count: usize,
    },
    /// All slots for devices of the host are in use, or too many are.
    #[error(
        "container {container_id} needs a device of the host, which the pod's running virtual \
         machine was built without; of its {count} slots for devices that come later {empty} are \
         empty, and {wanted} would be filled: raise pci_slots in nacre.toml"
    )]
    NoPciSlot {
        /// The container.
        container_id: String,
        /// How many would be filled.
        wanted: usize,
        /// How many are empty.
        empty: usize,
        /// How many there are.
        count: usize,
    },
    /// The monitor does not say that it has plugged devices in.
    #[error(
        "container {container_id}: the devices it asks for were not plugged in within {seconds} s"
    )]
    PlugTimeout {
        /// The container.
        container_id: String,
        /// The limit.
        seconds: u64,
    },
    /// The monitor has not let go of a device, or has not said what became of it.
    #[error(
        "container {container_id}: PCI device {address} may be in the pod's virtual machine, whose \
         monitor did not say that it let go of it: it is nobody's before the pod ends"
    )]
    LostDevice {
        /// The container.
        container_id: String,
        /// The device.
        address: Address,
    },
    /// A second container came before the first was started.
    #[error(
        "container {container_id} joins a pod whose virtual machine boots with the start of its \
         first container: start that one first"
    )]
    NotBooted {
        /// The container that came.
        container_id: String,
    },
    /// The containers may use more memory than the machine can have.
    #[error(
        "the pod's containers may use {wanted_mib} MiB together, reserve included; its virtual \
         machine can have at most {limit_mib}"
    )]
    TooLarge {
        /// What it would have to be.
        wanted_mib: u32,
        /// What it can be.
        limit_mib: u32,
    },
    /// The machine has devices, or slots for them, and its memory is what it booted with.
    #[error(
        "the pod's containers may use {wanted_mib} MiB together, reserve included; its virtual \
         machine keeps the {has_mib} MiB it was made with, because PCI devices may reach them: give \
         the pod its whole memory limit when it is made"
    )]
    Pinned {
        /// What it would have to be.
        wanted_mib: u32,
        /// What it is.
        has_mib: u32,
    },
    /// The host's kernel killed the machine while it booted.
    #[error(
        "the host's kernel killed the virtual machine of {memory_mib} MiB for want of memory: \
         its cgroup, the one above (in Kubernetes the pod's: limits and the RuntimeClass's \
         overhead) or the host has not that much{}",
        filled_at_once(*is_pinned)
    )]
    OutOfMemory {
        /// The guest's.
        memory_mib: u32,
        /// Whether it fills it at once.
        is_pinned: bool,
        /// What was seen of it.
        source: Box<SandboxError>,
    },
    /// The guest does not use the memory it was given.
    #[error("the guest took only {has_mib} MiB of memory of the {wanted_mib} it was to have")]
    NotGrown {
        /// What it was given.
        wanted_mib: u32,
        /// What it uses.
        has_mib: u32,
    },
    /// The guest does not use the vCPUs it was to use.
    #[error("the guest uses only {has} of the {wanted} vCPUs it was to use")]
    NoVcpus {
        /// What it was to use.
        wanted: u8,
        /// What it uses.
        has: u8,
    },
    /// The machine failed.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The agent refused or failed.
    #[error("guest: {what}: {}", agent_message(answer))]
    Agent {
        /// What was asked of it.
        what: &'static str,
        /// Its answer, already in the text.
        answer: ttrpc::Error,
    },
    /// The agent did not answer a call in time.
    #[error("guest: {what}: no answer within {seconds} s")]
    Late {
        /// What was asked of it.
        what: &'static str,
        /// The limit.
        seconds: u64,
    },
    /// The agent did not connect.
    #[error(
        "the guest's agent did not answer within {seconds} s of the start; the pod's log has \
         where its kernel was, and debug_console = true shows the guest's console"
    )]
    AgentSilent {
        /// The configured limit.
        seconds: u64,
    },
    /// The sandbox was shut down.
    #[error("the sandbox was shut down")]
    Stopped,
    /// A system call failed.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: String,
        /// The failure.
        source: std::io::Error,
    },
    /// The run directory failed.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// The pod's network could not be set up.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The pod's cgroup could not be set up.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The virtio-fs daemon could not be started.
    #[error(transparent)]
    Virtiofsd(#[from] VirtiofsdError),
    /// A host hook failed.
    #[error(transparent)]
    Hook(#[from] HookError),
}

fn filled_at_once(is_pinned: bool) -> &'static str {
    if is_pinned {
        "; PCI devices reach all of it, so it is filled at once"
    } else {
        ""
    }
}
