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
mod sizing;
mod slots;
#[cfg(test)]
mod tests;
mod vm_host;
mod watch;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use containerd_shim_protos::types::mount::Mount;
use futures::future::BoxFuture;
use nacre_protocol::agent::ConfigureSandboxRequest;
use nacre_protocol::agent_ttrpc::AgentClient;
use nacre_protocol::guest::STREAM_PORT;
use nacre_protocol::vm::GROWTH_STEP_MIB;
use oci_spec::runtime::Spec;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tracing::info;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::{Context, with_duration};

use crate::machine::{Machine, MachineError, Stop};
use crate::storage::{BlockDevice, Followers};

pub use error::SandboxError;
pub use host::Host;
#[cfg(test)]
pub use hotplug::HotPlug;
#[cfg(test)]
pub use images::Images;
use slots::DiskSlots;
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
    /// Whether the guest was found not to answer.
    hangs: AtomicBool,
}

/// A machine's memory.
#[derive(Debug, Clone, Copy)]
pub struct MemorySize {
    /// What it boots with.
    pub boot_mib: u32,
    /// What may be added.
    pub growth_mib: u32,
    /// Devices of the host reach it: nothing may be.
    pub is_pinned: bool,
}

/// What a machine was made with for containers that come later.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// Its memory.
    pub memory: MemorySize,
    /// Empty disks.
    pub disks: usize,
}

/// What there is after the boot.
struct Guest {
    agent: AgentClient,
    shares_directory: bool,
    slots: DiskSlots,
    memory: MemorySize,
    /// What it has.
    memory_mib: AtomicU32,
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
            slots: DiskSlots::new(room.disks),
            memory: room.memory,
            memory_mib: AtomicU32::new(room.memory.boot_mib),
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

    /// Has the machine's memory be `wanted_mib`, or what it booted with if that is
    /// more. `limit` sets the host's limits for a size: before the machine grows,
    /// and after it has shrunk as far as the guest lets it. One caller at a time.
    ///
    /// # Errors
    ///
    /// `TooLarge`, `Pinned`; `NotGrown`, with size and limits as they were; those of the
    /// machine and of `limit`.
    pub async fn resize<'a>(
        &self,
        wanted_mib: u32,
        limit: impl Fn(u32) -> BoxFuture<'a, Result<(), SandboxError>>,
    ) -> Result<(), SandboxError> {
        let Some(guest) = self.guest.get() else {
            return Ok(());
        };
        let MemorySize {
            boot_mib,
            growth_mib,
            is_pinned,
        } = guest.memory;
        let growth = wanted_mib.saturating_sub(boot_mib);
        if growth > 0 && is_pinned {
            return Err(SandboxError::Pinned {
                wanted_mib,
                has_mib: boot_mib,
            });
        }
        if growth > growth_mib {
            return Err(SandboxError::TooLarge {
                wanted_mib,
                limit_mib: boot_mib + growth_mib,
            });
        }
        let wanted_mib = boot_mib + growth.next_multiple_of(GROWTH_STEP_MIB);
        let before_mib = guest.memory_mib.load(Ordering::Relaxed);
        if wanted_mib > before_mib {
            limit(wanted_mib).await?;
            let has_mib = self.resize_to(guest, wanted_mib).await?;
            if has_mib < wanted_mib {
                limit(self.resize_to(guest, before_mib).await?).await?;
                return Err(SandboxError::NotGrown {
                    wanted_mib,
                    has_mib,
                });
            }
            return Ok(());
        }
        if wanted_mib < before_mib {
            let has_mib = self.resize_to(guest, wanted_mib).await?;
            if has_mib > wanted_mib {
                info!(wanted_mib, has_mib, "the guest keeps memory");
            }
        }
        limit(guest.memory_mib.load(Ordering::Relaxed)).await
    }

    async fn resize_to(&self, guest: &Guest, wanted_mib: u32) -> Result<u32, SandboxError> {
        let boot_mib = guest.memory.boot_mib;
        let growth = self.machine.resize(wanted_mib - boot_mib).await?;
        // The guest's word, so it may be any.
        let has_mib = boot_mib.saturating_add(growth);
        guest.memory_mib.store(has_mib, Ordering::Relaxed);
        Ok(has_mib)
    }

    /// An empty disk of the guest's, a container's from now on; its serial number.
    ///
    /// # Errors
    ///
    /// `Stopped` before the boot, `NoSlot`.
    pub fn take_disk(&self, container_id: &str) -> Result<String, SandboxError> {
        let guest = self.guest.get().ok_or(SandboxError::Stopped)?;
        guest.slots.take(container_id)
    }

    /// Makes a block device the bytes of a disk that was taken. After an error it may
    /// have them all the same, or get them yet, until it is emptied.
    ///
    /// # Errors
    ///
    /// Those of [`Machine::exchange`].
    pub async fn fill_disk(&self, serial: &str, device: &BlockDevice) -> Result<(), MachineError> {
        let (file, read_only) = (Some(&device.file), device.read_only);
        let filled = self.machine.exchange(serial, file, read_only).await;
        filled.map(drop)
    }

    /// Takes the device from the guest, and gives the disk back.
    ///
    /// # Errors
    ///
    /// Those of [`Machine::exchange`]: the guest may have the device then. Not once the
    /// machine is dead.
    pub async fn empty_disk(&self, serial: &str) -> Result<(), MachineError> {
        match self.guest.get() {
            Some(guest) => guest.slots.empty(&*self.machine, serial).await,
            None => Ok(()),
        }
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
            Stop::Died if self.hangs.load(Ordering::Relaxed) => Stop::Hung,
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

    /// Ends the machine. When this returns it has nothing of the host's any more.
    pub async fn kill(&self) {
        self.machine.kill();
        self.stopped().await;
    }
}
