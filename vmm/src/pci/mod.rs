//! The PCI Express bus: a host bridge and virtio devices, one to a slot.
//!
//! ```text
//!   ECAM window --slot--> VirtioPci::{config_read, config_write}
//!   32/64-bit windows --BAR match--> VirtioPci::{bar_read, bar_write}
//! ```
//!
//! BARs are assigned when a device is added and Linux keeps them, but the guest
//! may move them: a window access goes to whichever function's BAR covers the
//! address at that moment.
//!
//! Finding the devices takes Linux some 200 reads of configuration space for
//! each, and hardly anything in it changes by itself. So every function's page of
//! the ECAM window is a read-only memory slot ([`PciRoot::map_config`]): reads
//! are memory reads, writes come to [`Ecam`], and so do reads of functions that
//! are not there.

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::layout;
use crate::virtio::transport::{BAR_SIZE, VirtioPci};
use crate::vm::{Vm, VmError};

pub mod config;
pub mod msix;

use config::ConfigSpace;

/// Slots of a bus.
const SLOTS: usize = 32;
/// Slots that are free for devices; slot 0 holds the host bridge.
pub const MAX_DEVICES: usize = SLOTS - 1;

/// Bits of an ECAM offset: 12 of register, 3 of function, 5 of device
/// (PCI Express base 7.2.2).
const REGISTER_MASK: u64 = 0xfff;
const FUNCTION_SHIFT: u32 = 12;
const SLOT_SHIFT: u32 = 15;

/// "QEMU PCIe host bridge", which Linux needs no driver for.
const BRIDGE_VENDOR: u16 = 0x1b36;
const BRIDGE_DEVICE: u16 = 0x0008;
/// Host bridge class (PCI Code and ID Assignment 1.7).
const BRIDGE_CLASS: [u8; 3] = [0, 0, 6];

/// The bus, complete; built once.
pub struct PciRoot {
    bridge: ConfigSpace,
    devices: Vec<Arc<VirtioPci>>,
}

impl PciRoot {
    /// A bus with `devices` in slots 1, 2, ...; those past [`MAX_DEVICES`]
    /// would not be seen.
    #[must_use]
    pub fn new(devices: Vec<Arc<VirtioPci>>) -> Self {
        debug_assert!(devices.len() <= MAX_DEVICES);
        Self {
            bridge: ConfigSpace::new(BRIDGE_VENDOR, BRIDGE_DEVICE, BRIDGE_CLASS),
            devices,
        }
    }

    /// Lets the guest read the configuration of all functions without an exit.
    /// Once, before it runs.
    ///
    /// # Errors
    ///
    /// When there is no memory, or no slot of memory, for it.
    pub fn map_config(&self, vm: &Vm) -> Result<(), VmError> {
        let page = vm.add_read_only_page(layout::ECAM_START)?;
        page.page().show(self.bridge.bytes());
        for (slot, device) in (1u64..).zip(&self.devices) {
            device.map_config(layout::ECAM_START + (slot << SLOT_SHIFT))?;
        }
        Ok(())
    }

    /// BAR address of the device with this index.
    #[must_use]
    pub fn bar_address(index: usize) -> u64 {
        layout::WINDOW32_START + index as u64 * BAR_SIZE
    }

    /// Stops all devices.
    pub fn reset(&self) {
        for device in &self.devices {
            device.reset();
        }
    }

    fn device_at(&self, address: u64) -> Option<(&VirtioPci, u64)> {
        self.devices.iter().find_map(|device| {
            let offset = address.checked_sub(device.bar_address()?)?;
            (offset < BAR_SIZE).then_some((device.as_ref(), offset))
        })
    }
}

/// Where an ECAM access goes. Functions other than 0 do not exist.
enum Target<'a> {
    Bridge,
    Device(&'a VirtioPci),
}

/// The configuration space window.
pub struct Ecam(pub Arc<PciRoot>);

impl Ecam {
    fn target(&self, offset: u64) -> Option<(Target<'_>, usize)> {
        let register = usize::try_from(offset & REGISTER_MASK).ok()?;
        let slot = usize::try_from(offset >> SLOT_SHIFT).ok()?;
        if offset >> FUNCTION_SHIFT & 7 != 0 {
            return None;
        }
        let target = match slot.checked_sub(1) {
            None => Target::Bridge,
            Some(index) => Target::Device(self.0.devices.get(index)?.as_ref()),
        };
        Some((target, register))
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.target(offset) {
            Some((Target::Bridge, register)) => self.0.bridge.read(register, data),
            Some((Target::Device(device), register)) => device.config_read(register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // Nothing in the host bridge can be written.
        if let Some((Target::Device(device), register)) = self.target(offset) {
            device.config_write(register, data);
        }
    }
}

/// A window BARs lie in.
pub struct Window {
    /// The bus behind it.
    pub root: Arc<PciRoot>,
    /// Its first address.
    pub start: u64,
}

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.root.device_at(self.start + offset) {
            Some((device, offset)) => device.bar_read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((device, offset)) = self.root.device_at(self.start + offset) {
            device.bar_write(offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_bridge_answers_on_an_empty_bus() {
        let ecam = Ecam(Arc::new(PciRoot::new(Vec::new())));
        let mut id = [0; 4];
        ecam.read(0, &mut id);
        assert_eq!(id, [0x36, 0x1b, 8, 0]);
        for absent in [1 << FUNCTION_SHIFT, 1 << SLOT_SHIFT, 31 << SLOT_SHIFT] {
            ecam.read(absent, &mut id);
            assert_eq!(id, [0xff; 4]);
            ecam.write(absent, &id);
        }
    }

    #[test]
    fn window_without_devices_reads_as_ones() {
        let window = Window {
            root: Arc::new(PciRoot::new(Vec::new())),
            start: layout::WINDOW32_START,
        };
        let mut data = [0; 8];
        window.read(0x10, &mut data);
        assert_eq!(data, [0xff; 8]);
    }
}
