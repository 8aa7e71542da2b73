//! Disks that are made empty with the machine, for the block devices of containers
//! that come later: a slot is given a container's device, and is empty again before
//! the container is said to be gone.

use std::sync::Mutex;

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

/// A machine's slots for disks.
#[derive(Debug)]
pub struct DiskSlots {
    /// Which have a device.
    taken: Mutex<Vec<bool>>,
}

impl DiskSlots {
    /// As many as the machine was made with.
    pub fn new(count: usize) -> Self {
        Self {
            taken: Mutex::new(vec![false; count]),
        }
    }

    /// Takes an empty slot; returns its disk's serial number.
    ///
    /// # Errors
    ///
    /// `NoSlot`.
    pub fn take(&self, container_id: &str) -> Result<String, SandboxError> {
        let mut taken = lock(&self.taken);
        let count = taken.len();
        let free = taken.iter_mut().enumerate().find(|(_, taken)| !**taken);
        let (index, slot) = free.ok_or_else(|| SandboxError::NoSlot {
            container_id: container_id.to_owned(),
            count,
        })?;
        *slot = true;
        Ok(serial(index))
    }

    /// Empties the slot with this disk and gives it back. One that cannot be emptied stays
    /// taken: its device is in use, and this may be tried again.
    ///
    /// # Errors
    ///
    /// Those of the machine, as long as there is one.
    pub async fn empty(&self, machine: &dyn Machine, serial: &str) -> Result<(), MachineError> {
        match machine.exchange(serial, None, false).await {
            Ok(_) | Err(MachineError::Stopped(_)) => (),
            Err(error) => return Err(error),
        }
        let index = serial.strip_prefix("slot").and_then(|n| n.parse().ok());
        if let Some(taken) = lock(&self.taken).get_mut(index.unwrap_or(usize::MAX)) {
            *taken = false;
        }
        Ok(())
    }
}
