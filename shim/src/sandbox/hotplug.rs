//! Devices of the host for containers that join a pod: a machine may have empty slots for
//! them (`pci_slots`).
//!
//! ```text
//! container joins:   claimed -> opened -> plugged in         undone when a step fails
//! last user deleted: the guest lets go -> unplugged -> the claim given back
//! ```
//! A device stays as long as a container of the pod uses it. One that the guest does not let
//! go within [`EJECT_TIMEOUT`] is taken all the same. One of which the monitor does not say
//! what became of it stays the pod's to its end, with its slot, and is no container's.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Mutex as StdMutex;
use std::time::Duration;

use futures::future::join_all;
use nacre_protocol::agent::EjectDeviceRequest;
use nacre_protocol::vm::guest_address;
use nacre_vmm::vfio::Passthrough;
use tokio::sync::Mutex;
use tracing::{info, warn};

use super::images::Images;
use super::{Sandbox, SandboxError};
use crate::devices::{Address, AssignedDevice, System, drivers, request};
use crate::error::chain;
use crate::machine::MachineError;
use crate::rundir::RunDir;
use crate::storage::PciDevices;
use crate::task::{agent_message, lock};

/// Time the guest's drivers have to let go of a device: they end the requests it has, which an
/// NVMe disk is given some seconds for. A guest that does not answer costs its containers' deletion as much.
const EJECT_TIMEOUT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });

/// The slots of a pod's machine.
pub struct HotPlug {
    run_dir: RunDir,
    /// Who plugs and unplugs, one at a time.
    slots: Mutex<Slots>,
    /// Containers with devices that were plugged in.
    users: StdMutex<BTreeSet<String>>,
}

#[derive(Default)]
struct Slots {
    /// The machine's own devices, which are before the slots in the guest.
    first: Vec<AssignedDevice>,
    /// Which are in use.
    taken: Vec<bool>,
    plugged: Vec<Plugged>,
    /// Devices in slots that nobody uses again: the monitor may have them.
    lost: Vec<Address>,
    images: Images,
    /// What the groups of all devices are in, or those of the last ones were.
    container: Option<OwnedFd>,
    /// Time the monitor has for one of its steps.
    timeout: Duration,
}

/// What came for a container, in the order of its slots.
struct Plugged {
    devices: Vec<AssignedDevice>,
    slots: Vec<u8>,
    users: BTreeSet<String>,
}

impl HotPlug {
    /// Of a machine that does not run yet.
    pub fn new(run_dir: RunDir) -> Self {
        Self {
            run_dir,
            slots: Mutex::default(),
            users: StdMutex::default(),
        }
    }

    /// The machine has `count` empty slots, and boots with the devices `first`, which were
    /// opened as `passthrough`, and with `images`. The monitor has `timeout` for a step.
    ///
    /// # Errors
    ///
    /// Those of dup(2).
    pub async fn start(
        &self,
        count: u8,
        (first, passthrough): (Vec<AssignedDevice>, Option<&Passthrough>),
        images: Images,
        timeout: Duration,
    ) -> std::io::Result<()> {
        let container = match passthrough {
            Some(passthrough) if count > 0 => passthrough.container()?,
            _ => None,
        };
        *self.slots.lock().await = Slots {
            first,
            taken: vec![false; count.into()],
            images,
            container,
            timeout,
            ..Slots::default()
        };
        Ok(())
    }

    /// Sees to it that the pod has the devices a container asks for; returns where the guest
    /// has them.
    ///
    /// # Errors
    ///
    /// `NoPciSlot`, `LostDevice`; what keeps a device from being claimed, opened or plugged
    /// in. Nothing of it is left then, unless the monitor does not say so.
    pub async fn attach(
        &self,
        system: &System,
        sandbox: &Sandbox,
        container_id: &str,
        asked: &[AssignedDevice],
    ) -> Result<PciDevices, SandboxError> {
        let slots = &mut *self.slots.lock().await;
        let missing = slots.missing(container_id, asked)?;
        if !missing.is_empty() {
            self.plug(system, sandbox, container_id, slots, missing)
                .await?;
        }
        for plugged in &mut slots.plugged {
            if asked.iter().any(|device| plugged.has(device.address)) {
                plugged.users.insert(container_id.to_owned());
                lock(&self.users).insert(container_id.to_owned());
            }
        }
        Ok(slots.in_guest(asked))
    }

    async fn plug(
        &self,
        system: &System,
        sandbox: &Sandbox,
        container_id: &str,
        slots: &mut Slots,
        devices: Vec<AssignedDevice>,
    ) -> Result<(), SandboxError> {
        let chosen = slots.choose(container_id, devices.len())?;
        let addresses: Vec<_> = devices.iter().map(|device| device.address).collect();
        self.claim(container_id, addresses.clone()).await?;
        let opened = slots.open(system, container_id, devices.clone()).await;
        let plugged = match opened {
            Ok((opened, images)) => {
                let plug = sandbox.machine.plug(&chosen, &opened);
                let plugged = within(slots.timeout, container_id, plug).await;
                plugged.map(|()| images)
            }
            Err(error) => Err(error),
        };
        match plugged {
            Ok(images) => {
                info!(container_id, ?addresses, slots = ?chosen, "devices plugged in");
                slots.add(devices, chosen, images);
                Ok(())
            }
            Err(error) => {
                if may_be_plugged(&error) {
                    slots.take(&chosen, true);
                    slots.lost.extend(addresses);
                } else {
                    self.give_back(addresses).await;
                }
                Err(error)
            }
        }
    }

    async fn claim(&self, container_id: &str, addresses: Vec<Address>) -> Result<(), SandboxError> {
        let run_dir = self.run_dir.clone();
        super::blocking(move || run_dir.claims().claim(&run_dir, &addresses))
            .await
            .map_err(|source| SandboxError::Claim {
                container_id: container_id.to_owned(),
                source,
            })
    }

    /// A container is gone from the guest, or never came: takes out what nobody else
    /// uses. What goes wrong is logged.
    pub async fn detach(&self, sandbox: &Sandbox, container_id: &str) {
        if !lock(&self.users).remove(container_id) {
            return;
        }
        let slots = &mut *self.slots.lock().await;
        let (mut kept, mut unused) = (Vec::new(), Vec::new());
        for mut plugged in slots.plugged.drain(..) {
            plugged.users.remove(container_id);
            if plugged.users.is_empty() {
                unused.push(plugged);
            } else {
                kept.push(plugged);
            }
        }
        slots.plugged = kept;
        for plugged in unused {
            self.unplug(sandbox, slots, plugged).await;
        }
    }

    async fn unplug(&self, sandbox: &Sandbox, slots: &mut Slots, plugged: Plugged) {
        let in_guest = plugged.slots.iter().map(|slot| slots.guest_address(*slot));
        let in_guest: Vec<_> = in_guest.collect();
        join_all(in_guest.iter().map(|address| eject(sandbox, address))).await;
        for address in &in_guest {
            slots.images.went(address);
        }
        let addresses: Vec<_> = plugged.devices.iter().map(|one| one.address).collect();
        let unplug = sandbox.machine.unplug(&plugged.slots);
        match tokio::time::timeout(slots.timeout, unplug).await {
            Ok(Ok(())) => {
                info!(?addresses, "devices unplugged");
                self.give_back(addresses).await;
                return slots.take(&plugged.slots, false);
            }
            // They are free when the pod is taken down.
            Ok(Err(MachineError::Stopped(_))) => (),
            Ok(Err(error)) => warn!(?addresses, error = chain(&error), "devices not unplugged"),
            Err(_) => warn!(?addresses, "the monitor does not unplug devices"),
        }
        slots.lost.extend(addresses);
    }

    async fn give_back(&self, addresses: Vec<Address>) {
        let run_dir = self.run_dir.clone();
        super::blocking(move || run_dir.claims().give_back(&run_dir, &addresses)).await;
    }
}

/// What becomes of devices that the monitor is to plug in.
async fn within(
    limit: Duration,
    container_id: &str,
    plug: impl Future<Output = Result<(), MachineError>>,
) -> Result<(), SandboxError> {
    match tokio::time::timeout(limit, plug).await {
        Ok(result) => result.map_err(SandboxError::from),
        Err(_) => Err(SandboxError::PlugTimeout {
            container_id: container_id.to_owned(),
            seconds: limit.as_secs(),
        }),
    }
}

/// Whether the monitor may have plugged devices in, or do so yet.
fn may_be_plugged(error: &SandboxError) -> bool {
    use MachineError::{Channel, Io};
    matches!(
        error,
        SandboxError::PlugTimeout { .. } | SandboxError::Machine(Channel(_) | Io { .. })
    )
}

/// Has the guest's driver leave a device, if the guest answers.
async fn eject(sandbox: &Sandbox, address: &str) {
    let Some(agent) = sandbox.agent() else {
        return;
    };
    let request = EjectDeviceRequest {
        address: address.to_owned(),
        ..Default::default()
    };
    let context = ttrpc::context::with_duration(EJECT_TIMEOUT);
    let call = agent.eject_device(context, &request);
    match sandbox.unless_stopped(call).await {
        Ok(_) | Err(ttrpc::Error::RemoteClosed) => (),
        Err(error) => {
            let error = agent_message(&error);
            warn!(address, error, "the guest does not let go of its device");
        }
    }
}

impl Slots {
    /// What has to be plugged in.
    fn missing(
        &self,
        container_id: &str,
        asked: &[AssignedDevice],
    ) -> Result<Vec<AssignedDevice>, SandboxError> {
        let mut addresses = asked.iter().map(|device| device.address);
        if let Some(address) = addresses.find(|address| self.lost.contains(address)) {
            return Err(SandboxError::LostDevice {
                container_id: container_id.to_owned(),
                address,
            });
        }
        let is_missing = |device: &&AssignedDevice| self.position(device.address).is_none();
        Ok(asked.iter().filter(is_missing).cloned().collect())
    }

    /// Devices were plugged in, which need these driver images.
    fn add(&mut self, devices: Vec<AssignedDevice>, slots: Vec<u8>, images: Vec<Option<PathBuf>>) {
        self.take(&slots, true);
        for (slot, image) in slots.iter().zip(images) {
            let in_guest = self.guest_address(*slot);
            if let Some(image) = image {
                self.images.came(&image, in_guest);
            }
        }
        self.plugged.push(Plugged {
            devices,
            slots,
            users: BTreeSet::new(),
        });
    }

    /// A device's place behind the guest's root ports.
    fn position(&self, address: Address) -> Option<usize> {
        request::position(&self.first, address).or_else(|| {
            let mut plugged = self.plugged.iter();
            let slot = plugged.find_map(|plugged| plugged.slot(address));
            slot.map(|slot| self.first.len() + usize::from(slot))
        })
    }

    fn guest_address(&self, slot: u8) -> String {
        guest_address(self.first.len() + usize::from(slot))
    }

    fn in_guest(&self, asked: &[AssignedDevice]) -> PciDevices {
        let positions = asked.iter().filter_map(|one| self.position(one.address));
        let addresses: Vec<_> = positions.map(guest_address).collect();
        PciDevices {
            drivers: self.images.of(&addresses),
            addresses,
        }
    }

    /// Empty slots for so many devices.
    fn choose(&self, container_id: &str, wanted: usize) -> Result<Vec<u8>, SandboxError> {
        let numbered = (0u8..).zip(&self.taken);
        let empty: Vec<u8> = numbered
            .filter_map(|(slot, taken)| (!taken).then_some(slot))
            .collect();
        match empty.get(..wanted) {
            Some(chosen) => Ok(chosen.to_owned()),
            None => Err(SandboxError::NoPciSlot {
                container_id: container_id.to_owned(),
                wanted,
                empty: empty.len(),
                count: self.taken.len(),
            }),
        }
    }

    fn take(&mut self, slots: &[u8], taken: bool) {
        for slot in slots {
            if let Some(slot) = self.taken.get_mut(usize::from(*slot)) {
                *slot = taken;
            }
        }
    }

    /// What the groups of other devices are in, if the machine may have any: with the last one a
    /// container loses its type, and the next device gets a new one.
    fn take_container(&mut self) -> Option<OwnedFd> {
        let has_none = self.first.is_empty() && self.plugged.is_empty() && self.lost.is_empty();
        self.container.take().filter(|_| !has_none)
    }

    /// Opens devices; returns with them the driver image that each needs.
    async fn open(
        &mut self,
        system: &System,
        container_id: &str,
        devices: Vec<AssignedDevice>,
    ) -> Result<(Passthrough, Vec<Option<PathBuf>>), SandboxError> {
        let (system, container) = (system.clone(), self.take_container());
        let rules = self.images.rules().to_owned();
        let (opened, images, container) = super::blocking(move || {
            let opened = request::open(&system, &devices, container.as_ref());
            let images = devices.iter().map(|device| {
                let image = drivers::image_for(&rules, &system, device.address);
                image.map(|path| path.map(Path::to_owned))
            });
            (opened, images.collect::<Result<Vec<_>, _>>(), container)
        })
        .await;
        self.container = container;
        let opened = opened.map_err(|source| SandboxError::OpenDevices {
            container_id: container_id.to_owned(),
            source,
        })?;
        let images = images.map_err(|source| SandboxError::Drivers {
            container_id: container_id.to_owned(),
            source,
        })?;
        if self.container.is_none() {
            let kept = opened.container().map_err(|source| SandboxError::Io {
                what: "keep the address space of the pod's devices".into(),
                source,
            });
            self.container = kept?;
        }
        Ok((opened, images))
    }
}

impl Plugged {
    fn slot(&self, address: Address) -> Option<u8> {
        let at = request::position(&self.devices, address)?;
        self.slots.get(at).copied()
    }

    fn has(&self, address: Address) -> bool {
        self.slot(address).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_that_has_lost_its_type_is_not_used_again() {
        let container = || std::fs::File::open("/dev/null").unwrap().into();
        let mut slots = Slots {
            container: Some(container()),
            ..Slots::default()
        };
        assert!(slots.take_container().is_none(), "nothing is in it");
        slots.container = Some(container());
        slots.lost.push("0000:01:00.0".parse().unwrap());
        assert!(slots.take_container().is_some(), "the machine may have it");
    }
}
