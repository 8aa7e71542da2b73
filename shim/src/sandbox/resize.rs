//! A machine that becomes larger and smaller: its memory by virtio-mem, its vCPUs by the
//! guest's kernel, which uses as many of those that are there as it is asked to.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;
use nacre_protocol::agent::SetCpusRequest;
use nacre_protocol::vm::GROWTH_STEP_MIB;
use tracing::info;

use super::{Guest, Sandbox, SandboxError};
use crate::task::lock;

/// Time a guest has to start vCPUs, on a host that may be busy.
const VCPU_TIMEOUT: Duration = Duration::from_secs(30);

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

/// A machine's vCPUs.
#[derive(Debug, Clone, Copy)]
pub struct VcpuCount {
    /// What its guest boots with.
    pub boot: u8,
    /// What there are.
    pub max: u8,
}

/// How large a machine is to be.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// Memory; what it booted with if that is more.
    pub memory_mib: u32,
    /// vCPUs; what it booted with if those are more, and no more than there are.
    pub vcpus: u8,
}

/// How large a machine may be, and is.
pub(super) struct MachineSize {
    memory: MemorySize,
    memory_mib: AtomicU32,
    vcpu_count: VcpuCount,
    /// None while the guest has not said how many.
    vcpus: Mutex<Option<u8>>,
}

impl MachineSize {
    /// Of a machine that has just booted.
    pub(super) fn new(memory: MemorySize, vcpu_count: VcpuCount) -> Self {
        Self {
            memory,
            memory_mib: AtomicU32::new(memory.boot_mib),
            vcpu_count,
            vcpus: Mutex::new(Some(vcpu_count.boot)),
        }
    }
}

impl Sandbox {
    /// Has the machine be as large as `wanted`. `limit` sets the host's limits for an
    /// amount of memory: before the machine grows, and after it has shrunk as far as the
    /// guest lets it. Those of processor time need nothing of the guest, which may take
    /// long to use fewer vCPUs, or not do so: they do not wait for it. One caller at a time.
    ///
    /// # Errors
    ///
    /// `TooLarge`, `Pinned`; `NotGrown`, with memory and limits as they were; `NoVcpus` and
    /// those of the agent, with the memory and the limits that were wanted; those of the
    /// machine and of `limit`.
    pub async fn resize<'a>(
        &self,
        wanted: Wanted,
        limit: impl Fn(u32) -> BoxFuture<'a, Result<(), SandboxError>>,
    ) -> Result<(), SandboxError> {
        let Some(guest) = self.guest.get() else {
            return Ok(());
        };
        let VcpuCount { boot, max } = guest.size.vcpu_count;
        let vcpus = wanted.vcpus.max(boot).min(max);
        if vcpus < wanted.vcpus {
            info!(
                wanted = wanted.vcpus,
                has = vcpus,
                "the limits allow more vCPUs than the machine has"
            );
        }
        let before = self.vcpus();
        let mut set = Ok(());
        if before.is_none_or(|before| vcpus < before) {
            limit(guest.size.memory_mib.load(Ordering::Relaxed)).await?;
            set = self.set_vcpus(guest, vcpus).await;
        }
        self.resize_memory(guest, wanted.memory_mib, limit).await?;
        if set.is_ok() && self.vcpus().is_some_and(|now| vcpus > now) {
            set = self.set_vcpus(guest, vcpus).await;
        }
        set
    }

    /// How many vCPUs the guest uses, if it has said so the last time.
    pub fn vcpus(&self) -> Option<u8> {
        let guest = self.guest.get()?;
        *lock(&guest.size.vcpus)
    }

    async fn set_vcpus(&self, guest: &Guest, vcpus: u8) -> Result<(), SandboxError> {
        let request = SetCpusRequest {
            count: vcpus.into(),
            ..Default::default()
        };
        *lock(&guest.size.vcpus) = None;
        let answer = self
            .ask("change the number of CPUs", VCPU_TIMEOUT, |context| {
                guest.agent.set_cpus(context, &request)
            })
            .await?;
        // The guest's word, so it may be any.
        let has = u8::try_from(answer.count).unwrap_or(u8::MAX);
        let has = has.clamp(1, guest.size.vcpu_count.max);
        *lock(&guest.size.vcpus) = Some(has);
        if has < vcpus {
            return Err(SandboxError::NoVcpus { wanted: vcpus, has });
        }
        info!(wanted = vcpus, has, "vCPUs of the guest");
        Ok(())
    }

    async fn resize_memory<'a>(
        &self,
        guest: &Guest,
        wanted_mib: u32,
        limit: impl Fn(u32) -> BoxFuture<'a, Result<(), SandboxError>>,
    ) -> Result<(), SandboxError> {
        let MemorySize {
            boot_mib,
            growth_mib,
            is_pinned,
        } = guest.size.memory;
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
        let before_mib = guest.size.memory_mib.load(Ordering::Relaxed);
        if wanted_mib > before_mib {
            limit(wanted_mib).await?;
            let has_mib = self.set_memory(guest, wanted_mib).await?;
            if has_mib < wanted_mib {
                limit(self.set_memory(guest, before_mib).await?).await?;
                return Err(SandboxError::NotGrown {
                    wanted_mib,
                    has_mib,
                });
            }
            return Ok(());
        }
        if wanted_mib < before_mib {
            let has_mib = self.set_memory(guest, wanted_mib).await?;
            if has_mib > wanted_mib {
                info!(wanted_mib, has_mib, "the guest keeps memory");
            }
        }
        limit(guest.size.memory_mib.load(Ordering::Relaxed)).await
    }

    async fn set_memory(&self, guest: &Guest, wanted_mib: u32) -> Result<u32, SandboxError> {
        let MemorySize {
            boot_mib,
            growth_mib,
            ..
        } = guest.size.memory;
        let growth = self.machine.resize(wanted_mib - boot_mib).await?;
        // The monitor's word, so it may be any: the host does not allow more for it than the
        // machine may have.
        let has_mib = boot_mib + growth.min(growth_mib);
        guest.size.memory_mib.store(has_mib, Ordering::Relaxed);
        Ok(has_mib)
    }
}
