//! Virtio devices (virtio 1.2) and their PCI transport.
//!
//! ```text
//!   guest driver --config space, BAR--> transport  --activate/reset--> VirtioDevice
//!        |  kick (ioeventfd, no exit to us)                                |
//!        +------------------------------------------> Queue::kick --> its worker thread
//!        <---- MSI-X (irqfd) <---- Interrupts::{queues,config} <-----------+
//! ```
//!
//! A device is a plain struct: features, configuration space, and a thread that
//! works its queues between [`VirtioDevice::activate`] and
//! [`VirtioDevice::reset`]. It knows nothing of PCI, MSI-X or KVM: notifications
//! come in and interrupts go out by event descriptors.

use std::io;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

pub mod block;
pub mod buffers;
pub mod common_config;
pub mod complaints;
pub mod console;
pub mod fs;
pub mod mem;
pub mod net;
pub mod ring;
pub mod rng;
pub mod transport;
pub mod vsock;

#[cfg(test)]
mod driver;

/// The guest's memory. Clones are cheap and share the mapping.
pub type GuestMemory = GuestMemoryMmap<()>;

/// Feature bit of a device that follows virtio 1.x (virtio 1.2, 6).
pub const VIRTIO_F_VERSION_1: u64 = 1 << virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
/// Feature bit for `used_event` and `avail_event` (virtio 1.2, 2.7.10).
pub const VIRTIO_F_EVENT_IDX: u64 = 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
/// Feature bit for indirect descriptors (virtio 1.2, 2.7.5.3).
pub const VIRTIO_F_INDIRECT_DESC: u64 =
    1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

/// A virtio device, seen from its transport.
///
/// The transport calls `activate` once the driver has set `DRIVER_OK`, and
/// `reset` when the driver resets the device or the machine ends; configuration
/// space may be read and written at any time.
pub trait VirtioDevice: Send {
    /// Device type (virtio 1.2, 5), for example 2 for a block device.
    fn device_type(&self) -> u16;

    /// Largest size of each virtqueue, a power of two; its length is their number.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Features offered, [`VIRTIO_F_VERSION_1`] among them.
    fn features(&self) -> u64;

    /// Reads device configuration space. Bytes past its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Another value whenever what [`Self::read_config`] tells has changed by itself
    /// (virtio 1.2, 4.1.4.3.1), so that a driver does not take halves of two.
    fn config_generation(&self) -> u8 {
        0
    }

    /// Writes device configuration space. Devices without writable fields
    /// ignore it.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// Starts work on the queues.
    ///
    /// # Errors
    ///
    /// When the device cannot work; the transport then sets
    /// `DEVICE_NEEDS_RESET` (virtio 1.2, 2.1.2).
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops all work. Nothing touches the queues or guest memory after this
    /// returns, and `activate` may be called again.
    fn reset(&mut self);
}

/// What a device gets when its driver is ready.
pub struct Activation {
    /// Guest memory.
    pub memory: GuestMemory,
    /// Features the driver accepted, a subset of those offered.
    pub features: u64,
    /// The queues the driver enabled, in order; `None` for one it left disabled.
    pub queues: Vec<Option<ActiveQueue>>,
    /// Interrupt for a changed configuration space.
    pub config_interrupt: Arc<EventFd>,
}

/// A virtqueue that the driver has set up.
pub struct ActiveQueue {
    /// Ring addresses and positions; event-idx is set as negotiated.
    pub queue: virtio_queue::Queue,
    /// Signalled when the driver added buffers.
    pub kick: EventFd,
    /// Write 1 to interrupt the driver (used buffers).
    pub interrupt: Arc<EventFd>,
}

impl Activation {
    /// The queues, all of which the driver must have enabled.
    ///
    /// # Errors
    ///
    /// [`ActivateError::QueueDisabled`] names the first that is not.
    pub fn all_queues(queues: Vec<Option<ActiveQueue>>) -> Result<Vec<ActiveQueue>, ActivateError> {
        queues
            .into_iter()
            .enumerate()
            .map(|(index, queue)| queue.ok_or(ActivateError::QueueDisabled(index)))
            .collect()
    }
}

/// Why a device could not be activated.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver said `DRIVER_OK` with a queue disabled that the device needs.
    #[error("queue {0} is not enabled")]
    QueueDisabled(usize),
    /// `activate` on a device that is active, or whose resources a failed
    /// worker took with it.
    #[error("the device cannot be activated again")]
    Unavailable,
    /// No thread or event.
    #[error("worker thread")]
    Worker(#[source] io::Error),
    /// The back end refused.
    #[error("{0}")]
    Backend(String),
}
