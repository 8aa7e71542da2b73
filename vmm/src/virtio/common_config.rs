//! The common configuration structure (virtio 1.2, 4.1.4.3) and the device
//! initialization it drives (3.1), without PCI, KVM or devices.
//!
//! ```text
//!   0 -> ACKNOWLEDGE -> DRIVER -> FEATURES_OK -> DRIVER_OK        write 0: reset
//!                       features   queues         Effect::Activate
//! ```
//!
//! What may be written depends on where in this sequence the driver is; writes
//! at the wrong time, and bits that must not be cleared, change nothing.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use super::{GuestMemory, VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1};

/// "No vector".
pub const NO_VECTOR: u16 = 0xffff;
/// Length of the structure.
pub const LENGTH: u32 = 0x40;

#[allow(clippy::cast_possible_truncation)] // single bits below 256
const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
#[allow(clippy::cast_possible_truncation)]
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
#[allow(clippy::cast_possible_truncation)]
const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;

/// Field offsets.
mod field {
    pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub const DEVICE_FEATURE: u64 = 0x04;
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub const DRIVER_FEATURE: u64 = 0x0c;
    pub const CONFIG_VECTOR: u64 = 0x10;
    pub const NUM_QUEUES: u64 = 0x12;
    pub const STATUS: u64 = 0x14;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_VECTOR: u64 = 0x1a;
    pub const QUEUE_ENABLE: u64 = 0x1c;
    pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub const QUEUE_DESC: u64 = 0x20;
    pub const QUEUE_DRIVER: u64 = 0x28;
    pub const QUEUE_DEVICE: u64 = 0x30;
}

/// Addresses of a queue, in the order of [`QueueConfig`]'s.
const ADDRESS_FIELDS: [u64; 3] = [field::QUEUE_DESC, field::QUEUE_DRIVER, field::QUEUE_DEVICE];
/// Bytes of an address.
const ADDRESS_LEN: u64 = 8;

/// What a write means to the transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Nothing further.
    None,
    /// The driver is ready.
    Activate,
    /// The driver resets the device.
    Reset,
}

/// A virtqueue as the driver describes it.
#[derive(Debug, Clone, Copy)]
pub struct QueueConfig {
    max_size: u16,
    size: u16,
    /// MSI-X vector of its interrupt.
    pub vector: u16,
    /// Whether the driver enabled it.
    pub enabled: bool,
    /// Addresses of descriptors, driver area and device area.
    addresses: [u64; 3],
}

impl QueueConfig {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            vector: NO_VECTOR,
            enabled: false,
            addresses: [0; 3],
        }
    }

    /// The queue, ready to be worked on, if it lies in guest memory and is sized
    /// and aligned as it must be.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn build(&self, memory: &GuestMemory, features: u64) -> Result<Queue, virtio_queue::Error> {
        let [desc, driver, device] = self.addresses.map(GuestAddress);
        let mut queue = Queue::new(self.max_size)?;
        queue.try_set_size(self.size)?;
        queue.try_set_desc_table_address(desc)?;
        queue.try_set_avail_ring_address(driver)?;
        queue.try_set_used_ring_address(device)?;
        queue.set_event_idx(features & VIRTIO_F_EVENT_IDX != 0);
        queue.set_ready(true);
        if queue.is_valid(memory) {
            Ok(queue)
        } else {
            Err(virtio_queue::Error::FindMemoryRegion)
        }
    }
}

/// The structure.
pub struct CommonConfig {
    offered: u64,
    vectors: u16,
    queue_sizes: Vec<u16>,
    state: State,
}

/// What a reset clears.
struct State {
    device_select: u32,
    driver_select: u32,
    accepted: u64,
    config_vector: u16,
    status: u8,
    queue_select: u16,
    queues: Vec<QueueConfig>,
}

impl State {
    fn new(queue_sizes: &[u16]) -> Self {
        Self {
            device_select: 0,
            driver_select: 0,
            accepted: 0,
            config_vector: NO_VECTOR,
            status: 0,
            queue_select: 0,
            queues: queue_sizes.iter().copied().map(QueueConfig::new).collect(),
        }
    }
}

impl CommonConfig {
    /// For a device that offers `features`, with queues of `queue_sizes` and
    /// `vectors` MSI-X vectors.
    #[must_use]
    pub fn new(features: u64, queue_sizes: Vec<u16>, vectors: u16) -> Self {
        Self {
            offered: features,
            vectors,
            state: State::new(&queue_sizes),
            queue_sizes,
        }
    }

    /// Back to the beginning.
    pub fn reset(&mut self) {
        self.state = State::new(&self.queue_sizes);
    }

    /// The device failed: the driver has to reset it.
    pub fn set_needs_reset(&mut self) {
        self.state.status |= NEEDS_RESET;
    }

    /// Whether the driver has set `DRIVER_OK`.
    #[must_use]
    pub fn driver_ok(&self) -> bool {
        self.state.status & DRIVER_OK != 0
    }

    /// Features both sides know.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.state.accepted
    }

    /// MSI-X vector of configuration changes.
    #[must_use]
    pub fn config_vector(&self) -> u16 {
        self.state.config_vector
    }

    /// The queues.
    #[must_use]
    pub fn queues(&self) -> &[QueueConfig] {
        &self.state.queues
    }

    /// Reads a field, or part of one.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let (start, value) = self.field(offset);
        let skip = usize::try_from(offset - start).unwrap_or(usize::MAX);
        for (byte, value) in data.iter_mut().zip(value.to_le_bytes().iter().skip(skip)) {
            *byte = *value;
        }
    }

    /// The field at `offset`: where it begins and its value.
    fn field(&self, offset: u64) -> (u64, u64) {
        let state = &self.state;
        let queue = state.queues.get(usize::from(state.queue_select));
        match offset {
            field::DEVICE_FEATURE_SELECT => (offset, state.device_select.into()),
            field::DEVICE_FEATURE => (offset, half(self.offered, state.device_select)),
            field::DRIVER_FEATURE_SELECT => (offset, state.driver_select.into()),
            field::DRIVER_FEATURE => (offset, half(state.accepted, state.driver_select)),
            field::CONFIG_VECTOR => (offset, state.config_vector.into()),
            field::NUM_QUEUES => (offset, state.queues.len() as u64),
            field::STATUS => (offset, state.status.into()),
            field::QUEUE_SELECT => (offset, state.queue_select.into()),
            field::QUEUE_SIZE => (offset, queue.map_or(0, |queue| queue.size.into())),
            field::QUEUE_VECTOR => {
                let vector = queue.map_or(NO_VECTOR, |queue| queue.vector);
                (offset, vector.into())
            }
            field::QUEUE_ENABLE => (offset, queue.is_some_and(|queue| queue.enabled).into()),
            field::QUEUE_NOTIFY_OFF => (offset, queue.map_or(0, |_| state.queue_select.into())),
            _ => {
                let address = address_field(offset).zip(queue);
                address.map_or((offset, 0), |((which, start), queue)| {
                    (start, queue.addresses.get(which).copied().unwrap_or(0))
                })
            }
        }
    }

    /// Writes a field; addresses also by halves. Other sizes are ignored.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        match data {
            [value] if offset == field::STATUS => return self.write_status(*value),
            [a, b] => self.write16(offset, u16::from_le_bytes([*a, *b])),
            [a, b, c, d] => self.write32(offset, u32::from_le_bytes([*a, *b, *c, *d])),
            [a, b, c, d, e, f, g, h] if offset.is_multiple_of(8) => {
                self.write_address(offset, u32::from_le_bytes([*a, *b, *c, *d]));
                self.write_address(offset | 4, u32::from_le_bytes([*e, *f, *g, *h]));
            }
            _ => {}
        }
        Effect::None
    }

    fn write_status(&mut self, value: u8) -> Effect {
        if value == 0 {
            return Effect::Reset;
        }
        let before = self.state.status;
        // The driver must not clear a bit, and NEEDS_RESET is ours.
        let mut status = before | value & !NEEDS_RESET;
        if status & FEATURES_OK != 0 && before & FEATURES_OK == 0 && !self.features_acceptable() {
            status &= !FEATURES_OK;
        }
        if status & FEATURES_OK == 0 {
            status &= !DRIVER_OK;
        }
        self.state.status = status;
        if status & !before & DRIVER_OK != 0 && status & NEEDS_RESET == 0 {
            Effect::Activate
        } else {
            Effect::None
        }
    }

    fn features_acceptable(&self) -> bool {
        let accepted = self.state.accepted;
        accepted & !self.offered == 0 && accepted & VIRTIO_F_VERSION_1 != 0
    }

    fn write16(&mut self, offset: u64, value: u16) {
        let vector = if value < self.vectors {
            value
        } else {
            NO_VECTOR
        };
        let features_ok = self.state.status & FEATURES_OK != 0;
        match offset {
            field::QUEUE_SELECT => self.state.queue_select = value,
            // An active device has been given its events.
            _ if self.driver_ok() => {}
            field::CONFIG_VECTOR => self.state.config_vector = vector,
            field::QUEUE_VECTOR => {
                if let Some(queue) = self.selected() {
                    queue.vector = vector;
                }
            }
            field::QUEUE_SIZE => {
                if let Some(queue) = self.selected().filter(|queue| !queue.enabled) {
                    queue.size = value;
                }
            }
            field::QUEUE_ENABLE if value == 1 && features_ok => {
                if let Some(queue) = self.selected() {
                    queue.enabled = true;
                }
            }
            _ => {}
        }
    }

    fn write32(&mut self, offset: u64, value: u32) {
        match offset {
            field::DEVICE_FEATURE_SELECT => self.state.device_select = value,
            field::DRIVER_FEATURE_SELECT => self.state.driver_select = value,
            field::DRIVER_FEATURE if self.state.status & FEATURES_OK == 0 => {
                let accepted = &mut self.state.accepted;
                match self.state.driver_select {
                    0 => *accepted = *accepted & !0xffff_ffff | u64::from(value),
                    1 => *accepted = *accepted & 0xffff_ffff | u64::from(value) << 32,
                    _ => {}
                }
            }
            _ => self.write_address(offset, value),
        }
    }

    fn write_address(&mut self, offset: u64, value: u32) {
        if self.driver_ok() {
            return;
        }
        let Some((which, start)) = address_field(offset) else {
            return;
        };
        let Some(queue) = self.selected().filter(|queue| !queue.enabled) else {
            return;
        };
        let Some(address) = queue.addresses.get_mut(which) else {
            return;
        };
        match offset - start {
            0 => *address = *address & !0xffff_ffff | u64::from(value),
            4 => *address = *address & 0xffff_ffff | u64::from(value) << 32,
            _ => {}
        }
    }

    fn selected(&mut self) -> Option<&mut QueueConfig> {
        let index = usize::from(self.state.queue_select);
        self.state.queues.get_mut(index)
    }
}

/// The queue address `offset` is part of: which one, and where it begins.
fn address_field(offset: u64) -> Option<(usize, u64)> {
    let mut fields = ADDRESS_FIELDS.into_iter().enumerate();
    fields.find(|(_, start)| (*start..*start + ADDRESS_LEN).contains(&offset))
}

/// 32 of 64 feature bits; there are no more.
fn half(features: u64, select: u32) -> u64 {
    match select {
        0 => features & 0xffff_ffff,
        1 => features >> 32,
        _ => 0,
    }
}

#[cfg(test)]
mod tests;
