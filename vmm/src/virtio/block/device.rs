//! The device: features, configuration space, and its workers.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_blk as spec;
use vmm_sys_util::eventfd::EventFd;

use super::backing::{Backing, Disk};
use super::request::{
    MAX_DISCARD_RANGES, MAX_DISCARD_SECTORS, MAX_SEGMENT_BYTES, MAX_ZEROES_RANGES,
    MAX_ZEROES_SECTORS, SERIAL_BYTES,
};
use super::worker::{Geometry, Server, Service};
use super::{BlockError, SECTOR_BYTES};
use crate::virtio::ring;
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, GuestMemory, VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1, VirtioDevice,
};
use crate::worker::Worker;

/// Device type (virtio 1.2, 5).
const DEVICE_TYPE: u16 = 2;
const QUEUE_SIZE: u16 = 256;
/// Most queues, each with a thread of its own.
pub const MAX_QUEUES: u16 = 64;
/// Most data descriptors of a request: header and status are two more.
pub const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Discards the host can act on are pages: 8 sectors.
const DISCARD_ALIGNMENT: u32 = 8;
/// Bytes of `struct virtio_blk_config` (virtio 1.2, 5.2.4) up to `unused1`.
const CONFIG_BYTES: usize = 60;

/// What every disk has.
const FEATURES: u64 = VIRTIO_F_VERSION_1
    | VIRTIO_F_EVENT_IDX
    | VIRTIO_F_INDIRECT_DESC
    | (1 << spec::VIRTIO_BLK_F_SIZE_MAX)
    | (1 << spec::VIRTIO_BLK_F_SEG_MAX)
    | (1 << spec::VIRTIO_BLK_F_BLK_SIZE);
/// What a disk has that can be written.
const WRITE_FEATURES: u64 =
    FLUSH | (1 << spec::VIRTIO_BLK_F_DISCARD) | (1 << spec::VIRTIO_BLK_F_WRITE_ZEROES);
const FLUSH: u64 = 1 << spec::VIRTIO_BLK_F_FLUSH;

/// A disk.
pub struct Block {
    serial: String,
    service: Arc<Service>,
    interrupt: Arc<ConfigInterrupt>,
    read_only: bool,
    queues: u16,
    workers: Vec<Worker<()>>,
}

/// Tells an active driver to look at the configuration.
type ConfigInterrupt = Mutex<Option<Arc<EventFd>>>;

fn lock(interrupt: &ConfigInterrupt) -> MutexGuard<'_, Option<Arc<EventFd>>> {
    interrupt.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Puts other bytes in the place of a disk's.
#[derive(Clone)]
pub struct Exchanger {
    serial: String,
    service: Arc<Service>,
    interrupt: Arc<ConfigInterrupt>,
}

impl Exchanger {
    /// Gives the disk other bytes; returns their number. When this returns, nothing touches
    /// those it had. Of two exchanges the one with the higher number counts, whichever comes
    /// first. Whether the guest may write them is theirs to say; to the driver the device
    /// stays what it was.
    ///
    /// # Errors
    ///
    /// When the file is not what it should be; the disk is as before then.
    pub fn exchange(
        &self,
        number: u64,
        read_only: bool,
        backing: Backing,
    ) -> Result<u64, BlockError> {
        let disk = Disk::open(&self.serial, read_only, backing)?;
        let size = disk.size();
        self.service.replace(number, disk);
        if let Some(interrupt) = &*lock(&self.interrupt)
            && let Err(error) = interrupt.write(1)
        {
            tracing::warn!(%error, "the guest is not told of another disk");
        }
        Ok(size)
    }

    /// See [`Service::while_busy`].
    #[cfg(test)]
    pub fn while_busy<T>(&self, then: impl FnOnce() -> T) -> T {
        self.service.while_busy(then)
    }
}

impl Block {
    /// A disk with the serial number `serial`, at most 20 bytes, and `queues`
    /// request queues.
    ///
    /// # Errors
    ///
    /// When a number does not fit or a file is not what it should be.
    pub fn new(
        serial: &str,
        read_only: bool,
        backing: Backing,
        queues: u16,
    ) -> Result<Self, BlockError> {
        let mut bytes = [0; SERIAL_BYTES];
        bytes
            .get_mut(..serial.len())
            .ok_or_else(|| BlockError::Serial(serial.to_owned()))?
            .copy_from_slice(serial.as_bytes());
        if !(1..=MAX_QUEUES).contains(&queues) {
            return Err(BlockError::Queues(queues));
        }
        let service = Service::new(Disk::open(serial, read_only, backing)?, bytes);
        Ok(Self {
            serial: serial.to_owned(),
            service: Arc::new(service),
            interrupt: Arc::default(),
            read_only,
            queues,
            workers: Vec::new(),
        })
    }

    /// What changes its bytes later.
    #[must_use]
    pub fn exchanger(&self) -> Exchanger {
        Exchanger {
            serial: self.serial.clone(),
            service: self.service.clone(),
            interrupt: self.interrupt.clone(),
        }
    }

    fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let write_through = activation.features & FLUSH == 0;
        // A driver that knows of one queue only leaves the others disabled.
        let mut queues = activation.queues.into_iter().enumerate();
        let first = queues.next().and_then(|(_, queue)| queue);
        let first = first.ok_or(ActivateError::QueueDisabled(0))?;
        self.start_worker(0, &activation.memory, first, write_through)?;
        for (index, queue) in queues {
            if let Some(queue) = queue {
                self.start_worker(index, &activation.memory, queue, write_through)?;
            }
        }
        Ok(())
    }

    fn start_worker(
        &mut self,
        index: usize,
        memory: &GuestMemory,
        queue: ActiveQueue,
        write_through: bool,
    ) -> Result<(), ActivateError> {
        let service = Arc::clone(&self.service);
        let memory = memory.clone();
        let worker = Worker::spawn(&format!("block{index}"), move |mut poller| {
            let mut server = Server::new(&memory, &service, write_through);
            let served = ring::serve(&mut poller, &memory, queue, |chain| server.answer(chain));
            if let Err(error) = served {
                tracing::error!(%error, index, "disk queue stops until the guest resets it");
            }
        });
        self.workers.push(worker.map_err(ActivateError::Worker)?);
        Ok(())
    }
}

/// `struct virtio_blk_config`; fields of features not offered are zero.
pub(super) fn config(geometry: Geometry, read_only: bool, queues: u16) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    let mut put = |offset: usize, field: &[u8]| {
        if let Some(place) = config.get_mut(offset..offset + field.len()) {
            place.copy_from_slice(field);
        }
    };
    let sectors = geometry.size / SECTOR_BYTES;
    put(0, &sectors.to_le_bytes());
    put(8, &MAX_SEGMENT_BYTES.to_le_bytes());
    put(12, &MAX_SEGMENTS.to_le_bytes());
    put(20, &geometry.sector_bytes.to_le_bytes());
    put(34, &queues.to_le_bytes());
    if !read_only {
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &MAX_DISCARD_RANGES.to_le_bytes());
        put(44, &DISCARD_ALIGNMENT.to_le_bytes());
        put(48, &MAX_ZEROES_SECTORS.to_le_bytes());
        put(52, &MAX_ZEROES_RANGES.to_le_bytes());
        put(56, &[1]); // write_zeroes_may_unmap
    }
    config
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(self.queues)]
    }

    fn features(&self) -> u64 {
        let mut features = FEATURES;
        if self.read_only {
            features |= 1 << spec::VIRTIO_BLK_F_RO;
        } else {
            features |= WRITE_FEATURES;
        }
        if self.queues > 1 {
            features |= 1 << spec::VIRTIO_BLK_F_MQ;
        }
        features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let config = config(self.service.geometry(), self.read_only, self.queues);
        let fields = config.into_iter().skip(start);
        for (byte, value) in data.iter_mut().zip(fields.chain(std::iter::repeat(0))) {
            *byte = value;
        }
    }

    fn config_generation(&self) -> u8 {
        self.service.geometry().generation
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if !self.workers.is_empty() {
            return Err(ActivateError::Unavailable);
        }
        *lock(&self.interrupt) = Some(activation.config_interrupt.clone());
        let started = self.start(activation);
        if started.is_err() {
            self.reset();
        }
        started
    }

    fn reset(&mut self) {
        *lock(&self.interrupt) = None;
        for worker in self.workers.drain(..) {
            worker.stop();
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.reset();
    }
}
