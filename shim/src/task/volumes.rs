//! A container's volumes and disks, while the guest has it: what the guest is to have
//! before the container is made, and what is left to do when it has ended.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use nacre_protocol::agent;
use nacre_protocol::agent_ttrpc::AgentClient;
use tracing::warn;
use ttrpc::context::with_duration;

use super::TaskError;
use super::container::{CALL_TIMEOUT, Container, DRAIN_TIMEOUT};
use super::process::lock;
use crate::machine::MachineError;
use crate::sandbox::{SandboxError, Slot};
use crate::storage::{
    BlockDevice, Follower, GuestVolumes, HostDisk, MAX_LOG_BYTES, StorageError, WriteBack,
};

/// Time a guest has to hand back what a container wrote, before the exit is
/// told without it: as long as output has to reach its readers, which goes on meanwhile.
const WRITE_BACK_TIMEOUT: Duration = DRAIN_TIMEOUT;

/// What a container holds.
#[derive(Default)]
pub struct Attached(Mutex<Held>);

#[derive(Default)]
struct Held {
    /// Held, no more: a volume is followed as long as somebody does.
    _followers: Vec<Arc<Follower>>,
    write_back: Vec<WriteBack>,
}

/// Slots of the machine that a container has until it is gone from the guest.
#[derive(Default)]
pub struct Disks(Mutex<Vec<Arc<Slot>>>);

impl Disks {
    /// Has no other container get them.
    pub(super) fn retire(&self) {
        lock(&self.0).iter().for_each(|slot| slot.retire());
    }
}

impl Container {
    /// Has the guest make what the container's mounts refer to.
    pub(super) async fn attach_volumes(
        &self,
        agent: &AgentClient,
        volumes: GuestVolumes,
    ) -> Result<(), TaskError> {
        for tmpfs in &volumes.tmpfs {
            let answer = self
                .sandbox
                .ask("make a volume in memory", CALL_TIMEOUT, |context| {
                    agent.make_tmpfs(context, tmpfs)
                });
            answer.await?;
        }
        let mut followers = Vec::new();
        for dir in &volumes.dirs {
            let follower = self.sandbox.followers().follow(agent, dir).await;
            followers.push(follower.map_err(|source| StorageError::VolumeCopy {
                container_id: self.config.id.clone(),
                source,
            })?);
        }
        *lock(&self.attached.0) = Held {
            _followers: followers,
            write_back: volumes.write_back,
        };
        Ok(())
    }

    /// Gives the machine the container's block devices; returns what the agent makes
    /// of them. Those that may have come are the container's even when one fails.
    pub(super) async fn attach_devices(
        &self,
        devices: &[BlockDevice],
    ) -> Result<Vec<agent::BlockDevice>, TaskError> {
        let mut attached = Vec::new();
        for device in devices {
            let slots = self.sandbox.slots().ok_or(SandboxError::Stopped)?;
            let slot = Arc::new(slots.take_volume(&self.config.id)?);
            lock(&self.disks.0).push(slot.clone());
            let machine = self.sandbox.machine();
            slot.fill(machine, &device.backing, device.read_only)
                .await?;
            attached.push(agent::BlockDevice {
                serial: slot.serial().to_owned(),
                size_bytes: device.size_bytes,
                sector_bytes: device.sector_bytes,
                path: device.path.to_string_lossy().into_owned(),
                access: device.access.clone(),
                mode: device.mode,
                uid: device.uid,
                gid: device.gid,
                ..Default::default()
            });
        }
        Ok(attached)
    }

    /// Gives the machine, which runs, what the container's root file system is on; returns
    /// what the agent waits for. The slots are the container's even when this fails.
    pub(super) async fn attach_root(
        &self,
        disks: &[HostDisk],
        slots: Vec<Slot>,
    ) -> Result<Vec<agent::Disk>, TaskError> {
        let slots: Vec<_> = slots.into_iter().map(Arc::new).collect();
        lock(&self.disks.0).extend(slots.iter().cloned());
        let mut attached = Vec::new();
        for (slot, disk) in slots.iter().zip(disks) {
            let sector_bytes = disk
                .backing
                .sector_bytes()
                .map_err(MachineError::io("look at a disk's sectors"))?;
            let filled = slot.fill(self.sandbox.machine(), &disk.backing, disk.read_only);
            attached.push(agent::Disk {
                serial: slot.serial().to_owned(),
                size_bytes: filled.await?,
                sector_bytes,
                ..Default::default()
            });
        }
        Ok(attached)
    }

    /// Takes block devices and layers back, when the guest has no such container any more.
    /// One that cannot be taken back stays the container's, and this may be tried again.
    ///
    /// # Errors
    ///
    /// Those of [`Slot::empty`].
    pub async fn detach_devices(&self) -> Result<(), TaskError> {
        let slots = lock(&self.disks.0).clone();
        // Each may take its time.
        let emptied = slots.iter().map(|slot| async move {
            slot.empty(self.sandbox.machine()).await?;
            lock(&self.disks.0).retain(|other| !Arc::ptr_eq(other, slot));
            Ok::<_, TaskError>(())
        });
        futures::future::join_all(emptied)
            .await
            .into_iter()
            .collect()
    }

    /// When the init process has ended: brings back what is to be, and lets the
    /// copies be.
    pub(super) async fn detach_volumes(&self) {
        let held = std::mem::take(&mut *lock(&self.attached.0));
        let bring_back = async {
            for file in &held.write_back {
                self.bring_back(file).await;
            }
        };
        if tokio::time::timeout(WRITE_BACK_TIMEOUT, bring_back)
            .await
            .is_err()
        {
            let container_id = &self.config.id;
            warn!(container_id, "the guest does not hand its files back");
        }
    }

    async fn bring_back(&self, file: &WriteBack) {
        let container_id = &self.config.id;
        let Ok(agent) = self.agent("read from") else {
            return;
        };
        let request = agent::ReadFileRequest {
            container_id: container_id.clone(),
            path: file.guest_path.clone(),
            max_bytes: MAX_LOG_BYTES,
            ..Default::default()
        };
        let call = agent.read_file(with_duration(CALL_TIMEOUT), &request);
        match self.sandbox.unless_stopped(call).await {
            // A few KiB to the host's page cache.
            Ok(answer) => {
                if let Err(error) = file.write(&answer.contents) {
                    warn!(container_id, %error, "termination log not written");
                }
            }
            Err(error) => {
                let error = super::agent_message(&error);
                warn!(container_id, error, "termination log not read");
            }
        }
    }
}
