//! [`Host`]: what carries a sandbox.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{ContainerConfig, DiskSlots, Sandbox, SandboxError, VmHost, hotplug};
use crate::cgroup::Limits;
use crate::devices::request;
use crate::hooks;
use crate::oci::kubernetes;
use crate::storage::{PciDevices, Prepared, StorageError};

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
        slots: Option<&DiskSlots>,
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

    /// Sees to it that the guest of a machine that runs has the pod's shared directory.
    ///
    /// # Errors
    ///
    /// What keeps the file server from starting, the device from being put in, or the guest
    /// from mounting it; it may be tried again.
    pub async fn share(&self, sandbox: &Sandbox) -> Result<(), SandboxError> {
        match self {
            Self::Vm(host) => host.share(sandbox).await,
            #[cfg(test)]
            Self::Fake(host) => host.share(sandbox).await,
        }
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
            Self::Fake(host) => host.hang_timeout,
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

    /// Notes for `nacre ps` how many of them the guest uses, if that is known; failures
    /// are logged.
    pub fn note_vcpus(&self, vcpus: Option<u8>) {
        match self {
            Self::Vm(host) => host.note_vcpus(vcpus),
            #[cfg(test)]
            Self::Fake(_) => (),
        }
    }

    /// Limits what the pod may use of the host: what these containers may use
    /// together, on a machine with `memory_mib`.
    ///
    /// # Errors
    ///
    /// When a limit cannot be set.
    pub async fn set_limits(
        &self,
        containers: &[Limits],
        memory_mib: u32,
    ) -> Result<(), SandboxError> {
        match self {
            Self::Vm(host) => host.set_limits(containers, memory_mib).await,
            #[cfg(test)]
            Self::Fake(host) => {
                host.set_limits(containers, memory_mib);
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
