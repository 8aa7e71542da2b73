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

mod cards;
mod cmdline;
mod error;
mod host;
mod hotplug;
mod images;
mod resize;
mod share;
mod sizing;
mod slots;
#[cfg(test)]
mod tests;
mod vm_host;
mod watch;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use containerd_shim_protos::types::mount::Mount;
use nacre_protocol::agent::ConfigureSandboxRequest;
use nacre_protocol::agent_ttrpc::AgentClient;
use nacre_protocol::guest::STREAM_PORT;
use oci_spec::runtime::Spec;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tracing::warn;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::{Context, with_duration};

use crate::error::chain;
use crate::machine::{Machine, MachineError, Stop};
use crate::storage::Followers;

pub use error::SandboxError;
pub use host::Host;
#[cfg(test)]
pub use hotplug::HotPlug;
#[cfg(test)]
pub use images::Images;
use resize::MachineSize;
pub use resize::{MemorySize, VcpuCount, Wanted};
use share::Share;
pub use slots::{DiskSlots, Slot, SlotCounts};
pub use vm_host::VmHost;

/// Time a guest without its agent has to end by itself, and one that hangs to say where.
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

/// Runs file system work where it may block. A panic in it goes on here.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
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
    /// Whether the guest was found not to answer.
    hangs: AtomicBool,
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
    share: tokio::sync::Mutex<Share>,
    slots: DiskSlots,
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
            hangs: AtomicBool::new(false),
        }
    }

    /// Waits for the booting machine's agent and configures it.
    ///
    /// # Errors
    ///
    /// When the machine dies, the agent is not there and ready within `boot_timeout`,
    /// or refuses. Of a guest that is late the pod's log has where its kernel was.
    pub async fn attach(
        &self,
        boot_timeout: Duration,
        request: &ConfigureSandboxRequest,
        room: Room,
    ) -> Result<(), SandboxError> {
        let attached = self.try_attach(boot_timeout, request, room).await;
        if let Err(SandboxError::AgentSilent { .. } | SandboxError::Late { .. }) = &attached {
            self.interrupt().await;
        }
        attached
    }

    async fn try_attach(
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
        let share = Share::at_boot(request.shared_dir);
        // Attached once: the one caller is the one boot.
        self.guest.get_or_init(|| Guest {
            agent,
            share: share.into(),
            slots: DiskSlots::new(room.disks),
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

    /// The machine's empty disks, after the boot.
    pub fn slots(&self) -> Option<&DiskSlots> {
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
        match self.machine.stopped().await {
            // By the shim, or of its interrupt.
            Stop::Died | Stop::Guest(_) if self.hangs.load(Ordering::Relaxed) => Stop::Hung,
            stop => stop,
        }
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

    /// Has the kernel of a guest that does not answer say where it is, in the pod's log, and end.
    /// When this returns it has, or cannot do so.
    async fn interrupt(&self) {
        let last_words = async {
            if let Err(error) = self.machine.interrupt().await {
                warn!(
                    error = chain(&error),
                    "the guest is not asked where it hangs"
                );
            }
            self.stopped().await;
        };
        if tokio::time::timeout(LAST_WORDS, last_words).await.is_err() {
            warn!("the guest's kernel does not say where it hangs");
        }
    }

    /// Ends the machine. When this returns it has nothing of the host's any more.
    pub async fn kill(&self) {
        self.machine.kill();
        self.stopped().await;
    }
}
