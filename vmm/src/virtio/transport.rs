//! Virtio over PCI (virtio 1.2, 4.1), modern only: a device in a PCI function.
//!
//! One 64-bit BAR holds everything, a page each:
//!
//! ```text
//!   0x0000 common configuration    0x3000 notifications, 4 bytes per queue
//!   0x1000 ISR status              0x4000 MSI-X table
//!   0x2000 device configuration    0x5000 MSI-X pending bits
//! ```
//!
//! Notifications are ioeventfds while the device is active and its BAR is in
//! place; a write that reaches us all the same (the BAR has just moved)
//! signals the same event. Interrupts are MSI-X only, so the ISR status is always
//! 0. One lock guards a function; device threads never take it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::common_config::{self, CommonConfig, Effect, QueueConfig};
use super::{ActivateError, Activation, ActiveQueue, VirtioDevice};
use crate::layout;
use crate::pci::config::ConfigSpace;
use crate::pci::msix::Msix;
use crate::pci::registers::VENDOR_SPECIFIC;
use crate::vm::{ReadOnlyPage, Vm, VmError};

/// Size of the BAR.
pub const BAR_SIZE: u64 = 0x8000;

const PAGE: u32 = 0x1000;
const COMMON: u32 = 0x0000;
/// `config_generation` in the common configuration (virtio 1.2, 4.1.4.3): the device's.
const CONFIG_GENERATION: u64 = 0x15;
const ISR: u32 = 0x1000;
const DEVICE: u32 = 0x2000;
const NOTIFY: u32 = 0x3000;
const MSIX_TABLE: u32 = 0x4000;
const MSIX_PENDING: u32 = 0x5000;

/// `notify_off_multiplier`.
const NOTIFY_MULTIPLIER: u32 = 4;
/// So that table, pending bits and notifications fit their pages.
const MAX_QUEUES: usize = 254;

const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE_ID: u16 = 0x1040;
/// Any revision but 0 says "not transitional".
const REVISION: u8 = 1;

/// Types of vendor-specific capabilities (virtio 1.2, 4.1.4).
const TYPE_COMMON: u8 = 1;
const TYPE_NOTIFY: u8 = 2;
const TYPE_ISR: u8 = 3;
const TYPE_DEVICE: u8 = 4;
const TYPE_PCI: u8 = 5;
/// Offsets in a vendor-specific capability.
const CAP_BAR: usize = 4;
const CAP_OFFSET: usize = 8;
const CAP_LENGTH: usize = 12;
const CAP_DATA: usize = 16;

/// [`VirtioPci::bar`] while the BAR answers nowhere.
const NOWHERE: u64 = u64::MAX;

/// A device that cannot be put on the bus.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// More queues than the BAR has room for.
    #[error("{0} queues are too many")]
    Queues(usize),
}

/// A PCI function with a virtio device.
pub struct VirtioPci {
    /// Where the BAR answers; [`NOWHERE`] if it does not. Outside the lock, so that
    /// looking for the function of an address takes none.
    bar: AtomicU64,
    state: Mutex<Function>,
}

struct Function {
    vm: Arc<Vm>,
    config: ConfigSpace,
    /// Where the guest reads `config` without us, once it does.
    page: Option<ReadOnlyPage>,
    /// Offset of the PCI configuration access capability.
    window: usize,
    common: CommonConfig,
    msix: Msix,
    /// Offset of its message control.
    msix_control: usize,
    device: Box<dyn VirtioDevice>,
    /// Set while the device is active: its queues' events, by queue.
    kicks: Option<Vec<Option<EventFd>>>,
    /// BAR the ioeventfds are attached at.
    attached: Option<u64>,
}

impl VirtioPci {
    /// Puts `device` into a function whose BAR is at `bar_address`.
    ///
    /// # Errors
    ///
    /// When it has too many queues.
    pub fn new(
        vm: &Arc<Vm>,
        device: Box<dyn VirtioDevice>,
        bar_address: u64,
    ) -> Result<Self, TransportError> {
        let queue_sizes = device.queue_sizes();
        let queues = queue_sizes.len();
        if queues > MAX_QUEUES {
            return Err(TransportError::Queues(queues));
        }
        // One vector per queue, one for the configuration.
        let vectors = u16::try_from(queues + 1).map_err(|_| TransportError::Queues(queues))?;
        let mut config = config_space(device.device_type(), bar_address);
        let msix = Msix::new(vm, vectors);
        let msix_control = msix.add_capability(&mut config, MSIX_TABLE, MSIX_PENDING);
        let window = add_capabilities(&mut config);
        let function = Function {
            vm: vm.clone(),
            config,
            page: None,
            window,
            common: CommonConfig::new(device.features(), queue_sizes, vectors),
            msix,
            msix_control,
            device,
            kicks: None,
            attached: None,
        };
        Ok(Self {
            bar: AtomicU64::new(NOWHERE),
            state: Mutex::new(function),
        })
    }

    /// Device type (virtio 1.2, 5).
    #[must_use]
    pub fn device_type(&self) -> u16 {
        self.lock().device.device_type()
    }

    /// Where the BAR answers now.
    #[must_use]
    pub fn bar_address(&self) -> Option<u64> {
        let bar = self.bar.load(Ordering::Acquire);
        (bar != NOWHERE).then_some(bar)
    }

    /// Lets the guest read configuration space at `address` without an exit.
    ///
    /// # Errors
    ///
    /// When there is no memory, or no slot of memory, for it.
    pub fn map_config(&self, address: u64) -> Result<(), VmError> {
        let mut function = self.lock();
        function.page = Some(function.vm.add_read_only_page(address)?);
        function.show_config();
        Ok(())
    }

    /// Reads configuration space.
    pub fn config_read(&self, register: usize, data: &mut [u8]) {
        let mut function = self.lock();
        if let Some((offset, len)) = function.window_access(register, data.len()) {
            let mut value = [0; 4];
            if let Some(value) = value.get_mut(..len) {
                function.bar_read(offset, value);
            }
            let at = function.window + CAP_DATA;
            function.config.write(at, &value);
        }
        function.config.read(register, data);
    }

    /// Writes configuration space.
    pub fn config_write(&self, register: usize, data: &[u8]) {
        let mut function = self.lock();
        function.config.write(register, data);
        if let Some((offset, len)) = function.window_access(register, data.len()) {
            let mut value = [0; 4];
            function.config.read(function.window + CAP_DATA, &mut value);
            function.bar_write(offset, value.get(..len).unwrap_or_default());
        }
        let control = function.config.u16_at(function.msix_control);
        function.msix.set_control(control);
        function.show_config();
        let bar = function.config.bar();
        self.bar.store(bar.unwrap_or(NOWHERE), Ordering::Release);
        function.move_to(bar);
    }

    /// Reads the BAR.
    pub fn bar_read(&self, offset: u64, data: &mut [u8]) {
        self.lock().bar_read(offset, data);
    }

    /// Writes the BAR.
    pub fn bar_write(&self, offset: u64, data: &[u8]) {
        self.lock().bar_write(offset, data);
    }

    /// Stops the device.
    pub fn reset(&self) {
        self.lock().reset();
    }

    /// Stops the device, which is in no slot any more, and gives back what it has of KVM.
    ///
    /// # Errors
    ///
    /// KVM's: the guest still sees its configuration.
    pub fn retire(self) -> Result<(), VmError> {
        let mut function = self.lock();
        function.reset();
        function.msix.release();
        match function.page.take() {
            Some(page) => function.vm.remove_read_only_page(&page),
            None => Ok(()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Function> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Function {
    fn bar_read(&mut self, offset: u64, data: &mut [u8]) {
        let (page, offset) = split(offset);
        match page {
            COMMON => match data {
                [byte] if offset == CONFIG_GENERATION => *byte = self.device.config_generation(),
                data => self.common.read(offset, data),
            },
            DEVICE => self.device.read_config(offset, data),
            MSIX_TABLE => self.msix.read_table(offset, data),
            MSIX_PENDING => self.msix.read_pending(offset, data),
            _ => data.fill(0),
        }
    }

    fn bar_write(&mut self, offset: u64, data: &[u8]) {
        let (page, offset) = split(offset);
        match page {
            COMMON => match self.common.write(offset, data) {
                Effect::None => {}
                Effect::Activate => self.activate(),
                Effect::Reset => self.reset(),
            },
            DEVICE => self.device.write_config(offset, data),
            NOTIFY => self.notify(offset),
            MSIX_TABLE => self.msix.write_table(offset, data),
            _ => {}
        }
    }

    /// A notification that no ioeventfd caught.
    fn notify(&self, offset: u64) {
        let queue = usize::try_from(offset / u64::from(NOTIFY_MULTIPLIER)).unwrap_or(usize::MAX);
        let kicks = self.kicks.as_deref().unwrap_or_default();
        if let Some(Some(kick)) = kicks.get(queue)
            && let Err(error) = kick.write(1)
        {
            tracing::warn!(queue, %error, "queue not notified");
        }
    }

    fn activate(&mut self) {
        if let Err(error) = self.try_activate() {
            let kind = self.device.device_type();
            tracing::warn!(kind, %error, "virtio device not activated");
            self.detach();
            self.kicks = None;
            self.common.set_needs_reset();
            let event = event_of(&mut self.msix, self.common.config_vector());
            let told = event.and_then(|event| event.write(1).map_err(ActivateError::Worker));
            if let Err(error) = told {
                tracing::warn!(?error, "configuration interrupt lost");
            }
        }
    }

    fn try_activate(&mut self) -> Result<(), ActivateError> {
        let mut kicks = Vec::new();
        let mut queues = Vec::new();
        for (index, config) in self.common.queues().iter().enumerate() {
            let mut queue = None;
            if config.enabled {
                let interrupt = event_of(&mut self.msix, config.vector)?;
                queue = Some(self.active_queue(index, config, interrupt)?);
            }
            let kick = queue.as_ref().map(|queue| queue.kick.try_clone());
            kicks.push(kick.transpose().map_err(ActivateError::Worker)?);
            queues.push(queue);
        }
        let config_interrupt = event_of(&mut self.msix, self.common.config_vector())?;
        self.kicks = Some(kicks);
        self.move_to(self.config.bar());
        self.device.activate(Activation {
            memory: self.vm.memory().clone(),
            features: self.common.features(),
            queues,
            config_interrupt,
        })
    }

    fn active_queue(
        &self,
        index: usize,
        config: &QueueConfig,
        interrupt: Arc<EventFd>,
    ) -> Result<ActiveQueue, ActivateError> {
        let queue = config
            .build(self.vm.memory(), self.common.features())
            .map_err(|error| ActivateError::Backend(format!("queue {index}: {error}")))?;
        Ok(ActiveQueue {
            queue,
            kick: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(ActivateError::Worker)?,
            interrupt,
        })
    }

    fn reset(&mut self) {
        self.detach();
        if self.kicks.take().is_some() {
            self.device.reset();
        }
        self.common.reset();
        self.msix.discard_pending();
    }

    /// Has the ioeventfds where the BAR is.
    fn move_to(&mut self, bar: Option<u64>) {
        let bar = bar.filter(|bar| self.kicks.is_some() && in_window(*bar));
        if bar == self.attached {
            return;
        }
        self.detach();
        let Some(bar) = bar else { return };
        self.attached = Some(bar);
        for (kick, address) in self.notify_addresses(bar) {
            if let Err(error) = self.vm.add_ioeventfd(kick, address) {
                tracing::warn!(%error, "notifications will take the slow way");
            }
        }
    }

    fn detach(&mut self) {
        let Some(bar) = self.attached.take() else {
            return;
        };
        for (kick, address) in self.notify_addresses(bar) {
            if let Err(error) = self.vm.remove_ioeventfd(kick, address) {
                tracing::debug!(%error, "no ioeventfd to remove");
            }
        }
    }

    fn notify_addresses(&self, bar: u64) -> impl Iterator<Item = (&EventFd, u64)> {
        let first = bar + u64::from(NOTIFY);
        let kicks = self.kicks.as_deref().unwrap_or_default();
        let addresses = (first..).step_by(NOTIFY_MULTIPLIER as usize);
        kicks
            .iter()
            .zip(addresses)
            .filter_map(|(kick, address)| Some((kick.as_ref()?, address)))
    }

    /// Shows the guest what configuration space holds now. A guest that readies
    /// the PCI configuration access, where a read has an effect, reads by us from
    /// then on. (Firmware does so; Linux does not.)
    fn show_config(&mut self) {
        let Some(page) = &self.page else { return };
        if self.window_access(self.window + CAP_DATA, 1).is_none() {
            page.page().show(self.config.bytes());
        } else if let Err(error) = self.vm.remove_read_only_page(page) {
            tracing::warn!(%error, "the PCI configuration access will not work");
        } else {
            self.page = None;
        }
    }

    /// If an access touches the data of the PCI configuration access capability
    /// (virtio 1.2, 4.1.4.9): the BAR offset and length it stands for.
    fn window_access(&self, register: usize, len: usize) -> Option<(u64, usize)> {
        let data = self.window + CAP_DATA;
        if register >= data + 4 || register.saturating_add(len) <= data {
            return None;
        }
        let offset = u64::from(self.config_u32(self.window + CAP_OFFSET));
        let len = self.config_u32(self.window + CAP_LENGTH);
        let valid = self.config.byte(self.window + CAP_BAR) == 0
            && matches!(len, 1 | 2 | 4)
            && offset.is_multiple_of(len.into())
            && offset + u64::from(len) <= BAR_SIZE;
        valid.then_some((offset, usize::try_from(len).ok()?))
    }

    fn config_u32(&self, register: usize) -> u32 {
        let mut value = [0; 4];
        self.config.read(register, &mut value);
        u32::from_le_bytes(value)
    }
}

impl Drop for Function {
    fn drop(&mut self) {
        self.reset();
    }
}

/// The event of a vector; without a vector, one that nobody hears.
fn event_of(msix: &mut Msix, vector: u16) -> Result<Arc<EventFd>, ActivateError> {
    let event = msix.event(vector);
    match event.map_err(|error| ActivateError::Backend(error.to_string()))? {
        Some(event) => Ok(event),
        None => EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
            .map(Arc::new)
            .map_err(ActivateError::Worker),
    }
}

/// The page of the BAR, and the offset in it.
fn split(offset: u64) -> (u32, u64) {
    let page = offset & !u64::from(PAGE - 1);
    (u32::try_from(page).unwrap_or(u32::MAX), offset - page)
}

/// BARs that are being sized, or moved over RAM, get no ioeventfds.
fn in_window(bar: u64) -> bool {
    let end = bar.saturating_add(BAR_SIZE);
    (layout::WINDOW32_START..layout::WINDOW32_END).contains(&bar) && end <= layout::WINDOW32_END
        || (layout::MMIO_HOLE_END..1 << 52).contains(&bar)
}

fn config_space(device_type: u16, bar_address: u64) -> ConfigSpace {
    let id = FIRST_DEVICE_ID + device_type;
    let mut config = ConfigSpace::new(VENDOR, id, class(device_type));
    config.set_identity(REVISION, VENDOR, id);
    config.set_bar(bar_address, BAR_SIZE);
    config
}

/// Programming interface, subclass, base class: network, storage, or other.
fn class(device_type: u16) -> [u8; 3] {
    match device_type {
        1 => [0, 0, 2],
        2 => [0, 0x80, 1],
        _ => [0, 0, 0xff],
    }
}

/// Adds the structures' capabilities; returns the offset of the last one, the
/// PCI configuration access.
fn add_capabilities(config: &mut ConfigSpace) -> usize {
    for (kind, offset, length) in [
        (TYPE_COMMON, COMMON, common_config::LENGTH),
        (TYPE_ISR, ISR, 1),
        (TYPE_DEVICE, DEVICE, PAGE),
    ] {
        config.add_capability(VENDOR_SPECIFIC, &body(kind, offset, length, &[]), &[]);
    }
    let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
    config.add_capability(
        VENDOR_SPECIFIC,
        &body(TYPE_NOTIFY, NOTIFY, PAGE, &multiplier),
        &[],
    );
    let writable = body(0, u32::MAX, u32::MAX, &[0xff; 4]);
    let mut writable: Vec<u8> = writable.into_iter().collect();
    // Length and type stay; the BAR may be written.
    writable.splice(..3, [0, 0, 0xff]);
    config.add_capability(VENDOR_SPECIFIC, &body(TYPE_PCI, 0, 0, &[0; 4]), &writable)
}

/// `struct virtio_pci_cap` from `cap_len` on, and what follows it.
fn body(kind: u8, offset: u32, length: u32, rest: &[u8]) -> Vec<u8> {
    let total = u8::try_from(CAP_DATA + rest.len()).unwrap_or(u8::MAX);
    let mut body = vec![total, kind, 0, 0, 0, 0];
    body.extend(offset.to_le_bytes());
    body.extend(length.to_le_bytes());
    body.extend(rest);
    body
}

#[cfg(test)]
mod tests;
