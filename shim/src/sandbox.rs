//! A sandbox: one pod's running machine and the agent in it.
//!
//! ```text
//! Host::prepare(container)             files and mounts of a container, before and after boot
//! Host::open(container) -> Sandbox     once, by the pod's first container: a process in the pod's
//!                                      network namespace, host hooks run, no guest yet
//! Host::boot(Sandbox)                  once, as soon as the pod's network is known
//! Host::teardown()                     any number of times, from any point
//! ```
//!
//! Opening and booting are two steps for the sake of clients that set the
//! network up only when they have a pid, between Create and Start, as `ctr run
//! --cni` does: a machine gets its network cards when it boots.
//!
//! [`VmHost`] does that for real; it owns everything of the pod that lives on
//! the host. [`Sandbox`] is what the Task API talks to: it only knows a
//! [`Machine`] and an agent.

mod cmdline;
mod error;
mod hotplug;
mod images;
mod resize;
mod sizing;
mod slots;
#[cfg(test)]
mod tests;
mod vm_host;
mod watch;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use containerd_shim_protos::types::mount::Mount;
use nacre_protocol::agent::ConfigureSandboxRequest;
use nacre_protocol::agent_ttrpc::AgentClient;
use nacre_protocol::guest::STREAM_PORT;
use oci_spec::runtime::Spec;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::{Context, with_duration};

use crate::cgroup::Limits;
use crate::devices::request;
use crate::hooks;
use crate::machine::{Machine, MachineError, Stop};
use crate::oci::kubernetes;
use crate::storage::{Followers, PciDevices, Prepared, StorageError};

pub use error::SandboxError;
#[cfg(test)]
pub use hotplug::HotPlug;
#[cfg(test)]
pub use images::Images;
use resize::MachineSize;
pub use resize::{MemorySize, VcpuCount, Wanted};
pub use slots::{Slot, SlotCounts, Slots};
pub use vm_host::VmHost;

/// Time a guest without its agent has to end by itself.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// Those of containerd's APIs that make containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Api {
    /// The Task API.
    Task,
    /// The Sandbox API. Its one container is the pod's sandbox container, which the
    /// Task API does not know then.
    Sandbox,
}

/// A container as containerd describes it when it creates it.
#[derive(Debug, Clone)]
pub struct ContainerConfig {
    /// By which API that was.
    pub api: Api,
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Mounts of its root file system.
    pub rootfs: Vec<Mount>,
    /// Its spec, for the host.
    pub spec: Arc<Spec>,
}

/// What carries a sandbox.
pub enum Host {
    /// A virtual machine.
    Vm(Box<VmHost>),
    /// An agent without one.
    #[cfg(test)]
    Fake(Box<crate::machine::fake::FakeHost>),
}

impl Host {
    /// The pod's id.
    pub fn sandbox_id(&self) -> &str {
        match self {
            Self::Vm(host) => host.sandbox_id(),
            #[cfg(test)]
            Self::Fake(_) => crate::machine::fake::SANDBOX_ID,
        }
    }

    /// What runs the containers' hooks.
    pub fn hooks(&self) -> &hooks::Runner {
        match self {
            Self::Vm(host) => host.hooks(),
            #[cfg(test)]
            Self::Fake(host) => &host.hooks,
        }
    }

    /// Prepares a container's storage, for a machine that runs if it has `slots`.
    ///
    /// # Errors
    ///
    /// Those of [`crate::storage`]; nothing is left behind.
    pub async fn prepare(
        &self,
        config: &ContainerConfig,
        slots: Option<&Slots>,
    ) -> Result<Prepared, StorageError> {
        match self {
            Self::Vm(host) => host.prepare(config, slots).await,
            #[cfg(test)]
            Self::Fake(host) => host.prepare(config, slots),
        }
    }

    /// Where the guest of an open machine will have the host's devices that a container asks
    /// for; their driver images are known when it boots. The sandbox container of a pod asks
    /// for others' sake.
    ///
    /// # Errors
    ///
    /// `Devices`: what cannot be passed; `NoHotplug`: what is not the pod's.
    pub async fn guest_devices(
        &self,
        config: &ContainerConfig,
    ) -> Result<PciDevices, SandboxError> {
        if kubernetes::is_sandbox(&config.spec) {
            return Ok(PciDevices::default());
        }
        let (asked, pod_s) = match self {
            Self::Vm(host) => (host.devices(config).await?, host.pod_devices()),
            #[cfg(test)]
            Self::Fake(host) => (host.devices(config)?, host.pod_devices()),
        };
        let addresses = request::in_guest(&pod_s, &asked);
        let addresses = addresses.ok_or_else(|| SandboxError::NoHotplug {
            container_id: config.id.clone(),
            what: "a device of the host",
        })?;
        Ok(PciDevices {
            addresses,
            ..PciDevices::default()
        })
    }

    /// The same in a machine that runs, with the images: what the pod does not have is
    /// plugged in, if there are slots.
    ///
    /// # Errors
    ///
    /// `Devices`, and what keeps a device from being plugged in.
    pub async fn attach_devices(
        &self,
        sandbox: &Sandbox,
        config: &ContainerConfig,
    ) -> Result<PciDevices, SandboxError> {
        let (asked, system) = match self {
            Self::Vm(host) => (host.devices(config).await?, host.system()),
            #[cfg(test)]
            Self::Fake(host) => (host.devices(config)?, &host.system),
        };
        if asked.is_empty() || kubernetes::is_sandbox(&config.spec) {
            return Ok(PciDevices::default());
        }
        let hot_plug = self.hot_plug();
        hot_plug.attach(system, sandbox, &config.id, &asked).await
    }

    /// Takes back what [`Host::attach_devices`] has plugged in, when no container of the
    /// pod uses it any more. Failures are logged.
    pub async fn detach_devices(&self, sandbox: &Sandbox, container_id: &str) {
        self.hot_plug().detach(sandbox, container_id).await;
    }

    fn hot_plug(&self) -> &hotplug::HotPlug {
        match self {
            Self::Vm(host) => host.hot_plug(),
            #[cfg(test)]
            Self::Fake(host) => &host.hot_plug,
        }
    }

    /// Makes the machine for the pod's first container, not booted.
    ///
    /// # Errors
    ///
    /// Anything on the way; what was made by then is taken down again.
    pub async fn open(&self, config: &ContainerConfig) -> Result<Sandbox, SandboxError> {
        match self {
            Self::Vm(host) => host.open(config).await,
            #[cfg(test)]
            Self::Fake(host) => host.open_for(config).await,
        }
    }

    /// Where the pod's own files are on the host, if they are the shim's to make.
    pub fn files_dir(&self) -> PathBuf {
        match self {
            Self::Vm(host) => host.files_dir(),
            #[cfg(test)]
            Self::Fake(host) => host.files_dir(),
        }
    }

    /// Whether the pod's network is as it will be. If not, it is when the first
    /// container starts.
    pub fn knows_network(&self) -> bool {
        match self {
            Self::Vm(host) => host.knows_network(),
            #[cfg(test)]
            Self::Fake(host) => host.knows_network,
        }
    }

    /// Boots the machine and waits for its agent.
    ///
    /// # Errors
    ///
    /// Anything on the way; the machine is taken down then.
    pub async fn boot(
        &self,
        sandbox: &Sandbox,
        config: &ContainerConfig,
        prepared: &mut Prepared,
    ) -> Result<(), SandboxError> {
        match self {
            Self::Vm(host) => host.boot(sandbox, config, prepared).await,
            #[cfg(test)]
            Self::Fake(host) => host.boot(sandbox).await,
        }
    }

    /// How long a guest may leave us without an answer; zero: as long as it likes.
    pub fn hang_timeout(&self) -> Duration {
        match self {
            Self::Vm(host) => host.hang_timeout(),
            #[cfg(test)]
            Self::Fake(_) => Duration::ZERO,
        }
    }

    /// The program that is a console's shell; none: there are no consoles.
    pub fn debug_shell(&self) -> Option<&Path> {
        match self {
            Self::Vm(host) => host.debug_shell(),
            #[cfg(test)]
            Self::Fake(host) => host.debug_shell.as_deref(),
        }
    }

    /// Memory, in MiB, of a machine for containers with these limits.
    pub fn memory_of(&self, containers: &[Limits]) -> u32 {
        match self {
            Self::Vm(host) => host.memory_of(containers),
            #[cfg(test)]
            Self::Fake(host) => host.memory_of(containers),
        }
    }

    /// vCPUs of a machine for containers with these limits.
    pub fn vcpus_of(&self, containers: &[Limits]) -> u8 {
        match self {
            Self::Vm(host) => host.vcpus_of(containers),
            #[cfg(test)]
            Self::Fake(host) => host.vcpus_of(containers),
        }
    }

    /// Notes for `nacre ps` how many of them the guest uses.
    ///
    /// # Errors
    ///
    /// When that cannot be written.
    pub fn note_vcpus(&self, vcpus: u8) -> Result<(), SandboxError> {
        match self {
            Self::Vm(host) => host.note_vcpus(vcpus),
            #[cfg(test)]
            Self::Fake(_) => Ok(()),
        }
    }

    /// Limits what the pod may use of the host: what these containers may use
    /// together, on a machine with `memory_mib`.
    ///
    /// # Errors
    ///
    /// When a limit cannot be set.
    pub fn set_limits(&self, containers: &[Limits], memory_mib: u32) -> Result<(), SandboxError> {
        match self {
            Self::Vm(host) => host.set_limits(containers, memory_mib),
            #[cfg(test)]
            Self::Fake(host) => {
                host.set_limits(memory_mib);
                Ok(())
            }
        }
    }

    /// Undoes [`Host::prepare`]; failures are logged.
    pub async fn release(&self, container_id: &str) {
        match self {
            Self::Vm(host) => host.release(container_id).await,
            #[cfg(test)]
            Self::Fake(_) => (),
        }
    }

    /// Kills the machine and frees what the pod has on the host. Idempotent.
    pub async fn teardown(&self) {
        match self {
            Self::Vm(host) => host.teardown().await,
            #[cfg(test)]
            Self::Fake(host) => host.teardown(),
        }
    }
}

/// Runs file system work where it may block. A panic in it goes on here.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// A machine and, once it has booted, its configured agent.
pub struct Sandbox {
    machine: Arc<dyn Machine>,
    guest: OnceLock<Guest>,
    next_stream: AtomicU64,
    followers: Followers,
}

/// What a machine was made with for containers that come later.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// Its memory.
    pub memory: MemorySize,
    /// Its vCPUs.
    pub vcpus: VcpuCount,
    /// Empty disks.
    pub disks: SlotCounts,
}

/// What there is after the boot.
struct Guest {
    agent: AgentClient,
    shares_directory: bool,
    slots: Slots,
    size: MachineSize,
}

impl Sandbox {
    /// A sandbox that has not booted.
    pub fn new(machine: Arc<dyn Machine>) -> Self {
        Self {
            machine,
            guest: OnceLock::new(),
            next_stream: AtomicU64::new(1),
            followers: Followers::default(),
        }
    }

    /// Waits for the booting machine's agent and configures it.
    ///
    /// # Errors
    ///
    /// When the machine dies, the agent is not there and ready within `boot_timeout`,
    /// or refuses.
    pub async fn attach(
        &self,
        boot_timeout: Duration,
        request: &ConfigureSandboxRequest,
        room: Room,
    ) -> Result<(), SandboxError> {
        let begin = Instant::now();
        let connection = tokio::time::timeout(boot_timeout, self.machine.agent())
            .await
            .map_err(|_| SandboxError::AgentSilent {
                seconds: boot_timeout.as_secs(),
            })??;
        let agent = AgentClient::new(Client::new(Socket::new(connection)));
        // What slows the boot down slows this down, too.
        let rest = boot_timeout.saturating_sub(begin.elapsed());
        self.ask("configure the sandbox", rest, |context| {
            agent.configure_sandbox(context, request)
        })
        .await?;
        let shares_directory = request.shared_dir;
        // Attached once: the one caller is the one boot.
        self.guest.get_or_init(|| Guest {
            agent,
            shares_directory,
            slots: Slots::new(room.disks),
            size: MachineSize::new(room.memory, room.vcpus),
        });
        Ok(())
    }

    /// The pod's host pid.
    pub fn pid(&self) -> u32 {
        self.machine.pid()
    }

    /// The agent, after the boot.
    pub fn agent(&self) -> Option<&AgentClient> {
        self.guest.get().map(|guest| &guest.agent)
    }

    /// What follows the host's volumes for the pod.
    pub fn followers(&self) -> &Followers {
        &self.followers
    }

    /// Whether the guest has the pod's shared directory.
    pub fn shares_directory(&self) -> bool {
        self.guest.get().is_some_and(|guest| guest.shares_directory)
    }

    /// The machine's empty disks, after the boot.
    pub fn slots(&self) -> Option<&Slots> {
        self.guest.get().map(|guest| &guest.slots)
    }

    /// The machine, which has those disks.
    pub fn machine(&self) -> &dyn Machine {
        &*self.machine
    }

    /// Opens a stdio stream; returns its id with it.
    ///
    /// # Errors
    ///
    /// When the machine is gone or does not take the id.
    pub async fn open_stream(&self) -> Result<(u64, UnixStream), MachineError> {
        let id = self.next_stream.fetch_add(1, Ordering::Relaxed);
        let mut stream = self.machine.connect(STREAM_PORT).await?;
        stream
            .write_all(&id.to_le_bytes())
            .await
            .map_err(MachineError::io("name a guest stream"))?;
        Ok((id, stream))
    }

    /// Resolves when the machine is dead.
    pub async fn stopped(&self) -> Stop {
        self.machine.stopped().await
    }

    /// A call to the agent that is over when the machine is, at the latest.
    ///
    /// # Errors
    ///
    /// The call's own; `RemoteClosed` when the machine is dead.
    pub async fn unless_stopped<T>(
        &self,
        call: impl Future<Output = ttrpc::Result<T>>,
    ) -> ttrpc::Result<T> {
        tokio::select! {
            biased;
            _ = self.stopped() => Err(ttrpc::Error::RemoteClosed),
            answer = call => answer,
        }
    }

    /// What the agent answers to a call within `limit`. One that is lost with the machine
    /// fails with what became of that.
    ///
    /// # Errors
    ///
    /// `Agent`, `Late`; `Machine` when the machine is dead.
    pub async fn ask<T, F: Future<Output = ttrpc::Result<T>>>(
        &self,
        what: &'static str,
        limit: Duration,
        call: impl FnOnce(Context) -> F,
    ) -> Result<T, SandboxError> {
        // The agent gives up then, too. Ours ends first: ttrpc has no code for its own.
        let late = tokio::time::sleep(limit);
        let call = self.unless_stopped(call(with_duration(limit)));
        let answer = tokio::select! {
            biased;
            () = late => {
                // What is left of a boot's time is a little less than whole seconds.
                let seconds = limit.saturating_add(Duration::from_millis(500)).as_secs();
                return Err(SandboxError::Late { what, seconds });
            }
            answer = call => match answer {
                Ok(answer) => return Ok(answer),
                Err(answer) => answer,
            },
        };
        let is_lost = !matches!(answer, ttrpc::Error::RpcStatus(_) | ttrpc::Error::Others(_));
        // As in `give_up`: the guest may be about to say why.
        if is_lost && let Ok(stop) = tokio::time::timeout(LAST_WORDS, self.stopped()).await {
            return Err(MachineError::Stopped(stop).into());
        }
        Err(SandboxError::Agent { what, answer })
    }

    /// Ends a machine whose agent is gone. Most likely the guest is about to end
    /// by itself, and then says why: it gets a moment for that.
    pub async fn give_up(&self) {
        if tokio::time::timeout(LAST_WORDS, self.stopped())
            .await
            .is_err()
        {
            self.kill().await;
        }
    }

    /// Ends the machine. When this returns it has nothing of the host's any more.
    pub async fn kill(&self) {
        self.machine.kill();
        self.stopped().await;
    }
}
