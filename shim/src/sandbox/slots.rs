//! Disks that are made empty with the machine, for the block devices of containers
//! that come later: a slot is given a container's device, and is empty again when
//! the container is gone.

use std::fs::File;
use std::sync::{Arc, Mutex};

use nacre_protocol::vm::{Disk, DiskBacking};

use super::SandboxError;
use crate::machine::{Machine, MachineError};
use crate::task::lock;

/// The disks of so many slots.
pub fn disks(count: usize, queues: u16) -> impl Iterator<Item = Disk> {
    (0..count).map(move |index| Disk {
        serial: serial(index),
        read_only: false,
        backing: DiskBacking::Empty,
        queues,
    })
}

/// Serial number of a slot's disk.
fn serial(index: usize) -> String {
    format!("slot{index}")
}

/// A machine's slots.
#[derive(Debug)]
pub struct Slots {
    /// Which have a device.
    taken: Mutex<Vec<bool>>,
}

impl Slots {
    /// As many as the machine was made with.
    pub fn new(count: usize) -> Self {
        Self {
            taken: Mutex::new(vec![false; count]),
        }
    }

    /// Gives a device to an empty slot; returns its disk's serial number. A slot that
    /// may get the device yet, or has it, is not used again.
    ///
    /// # Errors
    ///
    /// `NoSlot`; the monitor's refusal.
    pub async fn fill(
        &self,
        machine: &Arc<dyn Machine>,
        container_id: &str,
        file: &File,
        read_only: bool,
    ) -> Result<String, SandboxError> {
        let index = self.take(container_id)?;
        let serial = serial(index);
        match machine.exchange(&serial, Some(file), read_only).await {
            Ok(_) => Ok(serial),
            Err(error) => {
                if let MachineError::Disk { .. } = error {
                    self.give_back(index);
                }
                Err(error.into())
            }
        }
    }

    /// Empties the slot with this disk. One that cannot be emptied is not used again.
    ///
    /// # Errors
    ///
    /// Those of the machine.
    pub async fn empty(
        &self,
        machine: &Arc<dyn Machine>,
        serial: &str,
    ) -> Result<(), MachineError> {
        machine.exchange(serial, None, false).await?;
        let index = serial.strip_prefix("slot").and_then(|n| n.parse().ok());
        self.give_back(index.unwrap_or(usize::MAX));
        Ok(())
    }

    fn take(&self, container_id: &str) -> Result<usize, SandboxError> {
        let mut taken = lock(&self.taken);
        let count = taken.len();
        let free = taken.iter_mut().enumerate().find(|(_, taken)| !**taken);
        let (index, slot) = free.ok_or_else(|| SandboxError::NoSlot {
            container_id: container_id.to_owned(),
            count,
        })?;
        *slot = true;
        Ok(index)
    }

    fn give_back(&self, index: usize) {
        if let Some(taken) = lock(&self.taken).get_mut(index) {
            *taken = false;
        }
    }
}
