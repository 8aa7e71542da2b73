//! Disks that are made empty with the machine, for containers that come later: a slot gets
//! a block device of a container, or what its root file system is on, and is empty again
//! before the container is said to be gone. One whose file systems the guest does not let go
//! of, or does not say so, is nobody's from then on: what comes of them late would be written
//! to the next container's disk.
//!
//! Block devices and root file systems have slots of their own: one that finds no slot
//! for its root file system has it shared with it by the host, but there is no other way
//! to give it a block device.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use nacre_protocol::vm::{Disk, DiskBacking};
use tracing::warn;

use super::SandboxError;
use crate::machine::{Machine, MachineError};
use crate::storage::HostBacking;
use crate::task::lock;

/// Serial numbers of block devices' slots begin with this,
const VOLUME: &str = "slot";
/// and of root file systems' with this.
const ROOT: &str = "root";
/// Layers are read from the host's page cache: one thread keeps up with that. More of them
/// in each slot, most of them for nothing, would cost every pod.
const ROOT_QUEUES: u16 = 1;

/// How many slots a machine is made with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SlotCounts {
    /// For block devices.
    pub volumes: usize,
    /// For root file systems.
    pub roots: usize,
}

/// The disks of so many slots; those for block devices with so many queues.
pub fn disks(counts: SlotCounts, queues: u16) -> impl Iterator<Item = Disk> {
    let of = |prefix, count, queues| {
        (0..count).map(move |index| Disk {
            serial: serial(prefix, index),
            read_only: false,
            backing: DiskBacking::Empty,
            queues,
        })
    };
    of(VOLUME, counts.volumes, queues).chain(of(ROOT, counts.roots, ROOT_QUEUES))
}

/// Serial number of a slot's disk.
fn serial(prefix: &str, index: usize) -> String {
    format!("{prefix}{index}")
}

/// A machine's slots for disks.
#[derive(Debug, Clone)]
pub struct DiskSlots {
    volumes: Pool,
    roots: Pool,
}

/// Slots of one kind; which are taken.
type Pool = Arc<Mutex<Vec<bool>>>;

impl DiskSlots {
    /// As many as the machine was made with.
    pub fn new(counts: SlotCounts) -> Self {
        let pool = |count| Arc::new(Mutex::new(vec![false; count]));
        Self {
            volumes: pool(counts.volumes),
            roots: pool(counts.roots),
        }
    }

    /// Takes an empty slot for a block device.
    ///
    /// # Errors
    ///
    /// `NoSlot`.
    pub fn take_volume(&self, container_id: &str) -> Result<Slot, SandboxError> {
        let taken = take(&self.volumes, VOLUME, 1).and_then(|mut slots| slots.pop());
        taken.ok_or_else(|| SandboxError::NoSlot {
            container_id: container_id.to_owned(),
            count: lock(&self.volumes).len(),
        })
    }

    /// Takes `count` empty slots for a root file system; `None` where there are fewer.
    pub fn take_roots(&self, count: usize) -> Option<Vec<Slot>> {
        take(&self.roots, ROOT, count)
    }
}

fn take(pool: &Pool, prefix: &str, count: usize) -> Option<Vec<Slot>> {
    let mut taken = lock(pool);
    let free = taken.iter().enumerate().filter(|(_, taken)| !**taken);
    let free: Vec<usize> = free.map(|(index, _)| index).take(count).collect();
    if free.len() < count {
        return None;
    }
    let slot = |index: usize| {
        if let Some(taken) = taken.get_mut(index) {
            *taken = true;
        }
        Slot {
            serial: serial(prefix, index),
            index,
            pool: pool.clone(),
            is_filled: AtomicBool::new(false),
            is_retired: AtomicBool::new(false),
        }
    };
    Some(free.into_iter().map(slot).collect())
}

/// A slot that is a container's until this is dropped. One that may have bytes then, or that
/// was retired, is nobody's any more.
#[derive(Debug)]
pub struct Slot {
    serial: String,
    index: usize,
    pool: Pool,
    is_filled: AtomicBool,
    is_retired: AtomicBool,
}

impl Slot {
    /// Serial number of its disk.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    /// Gives its disk bytes; returns their number. After an error it may have them all
    /// the same, or get them yet, until it is emptied.
    ///
    /// # Errors
    ///
    /// Those of [`Machine::exchange`].
    pub async fn fill(
        &self,
        machine: &dyn Machine,
        backing: &HostBacking,
        read_only: bool,
    ) -> Result<u64, MachineError> {
        self.is_filled.store(true, Ordering::Relaxed);
        let backing = Some(backing);
        machine.exchange(&self.serial, backing, read_only).await
    }

    /// Has it be nobody's after this container.
    pub fn retire(&self) {
        self.is_retired.store(true, Ordering::Relaxed);
    }

    /// Empties its disk. If that cannot be its bytes are in use, and this may be tried
    /// again.
    ///
    /// # Errors
    ///
    /// Those of the machine, as long as there is one.
    pub async fn empty(&self, machine: &dyn Machine) -> Result<(), MachineError> {
        match machine.exchange(&self.serial, None, false).await {
            Ok(_) | Err(MachineError::Stopped(_)) => {
                self.is_filled.store(false, Ordering::Relaxed);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let why = match (*self.is_filled.get_mut(), *self.is_retired.get_mut()) {
            (true, _) => "its bytes are in use",
            (false, true) => "the guest may not have let go of it",
            (false, false) => {
                if let Some(taken) = lock(&self.pool).get_mut(self.index) {
                    *taken = false;
                }
                return;
            }
        };
        let serial = &self.serial;
        warn!(serial, why, "the pod has one disk slot less from now on");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots() -> DiskSlots {
        DiskSlots::new(SlotCounts {
            volumes: 1,
            roots: 3,
        })
    }

    #[test]
    fn slots_are_all_had_or_none_and_free_again() {
        let slots = slots();
        let two = slots.take_roots(2).unwrap();
        assert!(slots.take_roots(2).is_none());
        let third = slots.take_roots(1).unwrap();
        assert_eq!(third[0].serial(), "root2");
        drop(two);
        let serials = slots.take_roots(2).unwrap();
        let serials: Vec<_> = serials.iter().map(Slot::serial).collect();
        assert_eq!(serials, ["root0", "root1"]);
        assert_eq!(slots.take_roots(0).unwrap().len(), 0);
    }

    #[test]
    fn root_file_systems_take_nothing_from_block_devices() {
        let slots = slots();
        let _roots = slots.take_roots(3).unwrap();
        let volume = slots.take_volume("c1").unwrap();
        assert_eq!(volume.serial(), "slot0");
        let full = slots.take_volume("c2").unwrap_err().to_string();
        assert!(full.contains("container c2"), "{full}");
        assert!(full.contains("left of the 1"), "{full}");
    }

    #[test]
    fn a_slot_that_may_have_bytes_is_nobody_s() {
        let slots = slots();
        let volume = slots.take_volume("c1").unwrap();
        volume.is_filled.store(true, Ordering::Relaxed);
        drop(volume);
        slots.take_volume("c2").unwrap_err();
    }

    #[test]
    fn nor_is_one_that_was_retired() {
        let slots = slots();
        let first = slots.take_roots(1).unwrap();
        first[0].retire();
        drop(first);
        let others = slots.take_roots(2).unwrap();
        let serials: Vec<_> = others.iter().map(Slot::serial).collect();
        assert_eq!(serials, ["root1", "root2"]);
    }

    #[test]
    fn each_slot_is_an_empty_disk_of_its_own() {
        let counts = SlotCounts {
            volumes: 2,
            roots: 1,
        };
        let disks: Vec<_> = disks(counts, 4).collect();
        let all_empty = disks.iter().all(|disk| disk.backing == DiskBacking::Empty);
        assert!(all_empty, "{disks:?}");
        let disks = disks.iter().map(|disk| (disk.serial.as_str(), disk.queues));
        let expected = [("slot0", 4), ("slot1", 4), ("root0", 1)];
        assert_eq!(disks.collect::<Vec<_>>(), expected);
    }
}
