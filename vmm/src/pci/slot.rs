//! A root port's hot-plug slot (PCI Express base 7.5.3.9 to 7.5.3.11, 6.7.3).
//!
//! ```text
//!   empty --set_present(true)--> presence and link have changed --MSI--> the guest looks, and finds it
//!         <-set_present(false)-- the same; by then the guest has let go of it, or it has lost it
//! ```
//!
//! No power controller, button, indicator or lock: whoever takes a device out asks the guest
//! first (the agent writes 0 to the slot's `power` in Linux), and Linux waits a second
//! for a slot whose power it turned off. Commands complete at once, so nothing tells of that.
//!
//! The interrupt is the port's only one, an MSI. It is sent when the first event that
//! the guest has enabled comes (6.7.3.4), and again only after all were cleared.

use std::sync::Arc;

use super::config::ConfigSpace;
use super::msix::{ENABLE, Msix};
use super::registers::{MSI, MSI_64, MSI_ENABLE};
use crate::virtio::complaints::Complaints;
use crate::vm::{MsiRoute, Vm};

/// From the slot capabilities on.
const CONTROL: usize = 0x04;
const STATUS: usize = 0x06;
/// Slot capabilities: a device may go without notice, hot-plug, commands complete at
/// once; and where the slot's number is.
const SURPRISE: u32 = 1 << 5;
const HOT_PLUG: u32 = 1 << 6;
const NO_COMMAND_COMPLETED: u32 = 1 << 18;
const NUMBER_SHIFT: u32 = 19;
/// Slot control: events that interrupt, and whether any does.
const PRESENCE_ENABLE: u16 = 1 << 3;
const INTERRUPT_ENABLE: u16 = 1 << 5;
const LINK_ENABLE: u16 = 1 << 12;
/// Slot status: events, cleared by writing ones; whether there is a device.
const PRESENCE_CHANGED: u16 = 1 << 3;
const PRESENT: u16 = 1 << 6;
const LINK_CHANGED: u16 = 1 << 8;

/// See the module.
pub struct HotPlug {
    /// Of the slot capabilities.
    at: usize,
    /// Of message control.
    msi: usize,
    vector: Msix,
    /// Whether an enabled event is there.
    pending: bool,
    /// Whether that is to be told.
    is_news: bool,
    complaints: Complaints,
}

impl HotPlug {
    /// Adds an empty slot with a number to a port, whose slot capabilities are at `at`.
    pub fn new(vm: &Arc<Vm>, config: &mut ConfigSpace, at: usize, number: u8) -> Self {
        let capabilities =
            SURPRISE | HOT_PLUG | NO_COMMAND_COMPLETED | u32::from(number) << NUMBER_SHIFT;
        config.put(at, &capabilities.to_le_bytes());
        let enables = PRESENCE_ENABLE | INTERRUPT_ENABLE | LINK_ENABLE;
        config.allow(at + CONTROL, &enables.to_le_bytes());
        let body = [0u8; 12];
        let mut writable = body;
        // Enable; address, whose low bits are 0; data.
        (writable[0], writable[2]) = (1, 0xfc);
        writable[3..12].fill(0xff);
        let msi = config.add_capability(MSI, &body, &writable) + 2;
        // Of one vector.
        config.put(msi, &MSI_64.to_le_bytes());
        Self {
            at,
            msi,
            vector: Msix::new(vm, 1),
            pending: false,
            is_news: false,
            complaints: Complaints::new("the guest is not told of a PCI device"),
        }
    }

    /// Puts a device in, or takes it out; [`Self::notify`] is to follow.
    pub fn set_present(&mut self, config: &mut ConfigSpace, present: bool) {
        let mut status = config.u16_at(self.at + STATUS);
        if present != (status & PRESENT != 0) {
            status = status ^ PRESENT | PRESENCE_CHANGED | LINK_CHANGED;
            config.put(self.at + STATUS, &status.to_le_bytes());
        }
        self.look(config);
    }

    /// To be called after each write of the guest; [`Self::notify`] is to follow.
    pub fn written(&mut self, config: &mut ConfigSpace, register: usize, data: &[u8]) {
        let events = (PRESENCE_CHANGED | LINK_CHANGED).to_le_bytes();
        for (at, event) in (self.at + STATUS..).zip(events) {
            let written = at.checked_sub(register).and_then(|offset| data.get(offset));
            let cleared = written.map_or(0, |byte| byte & event);
            config.put(at, &[config.byte(at) & !cleared]);
        }
        let word = |at: usize| u32::from(config.u16_at(at));
        let address = |at: usize| u64::from(word(at + 2)) << 16 | u64::from(word(at));
        let route = MsiRoute {
            address: address(self.msi + 6) << 32 | address(self.msi + 2),
            data: word(self.msi + 10),
        };
        let enabled = config.u16_at(self.msi) & MSI_ENABLE != 0;
        self.vector.set_entry(0, route, !enabled);
        let on = if enabled { ENABLE } else { 0 };
        self.vector.set_control(u16::from_le_bytes([0, on]));
        self.look(config);
    }

    fn look(&mut self, config: &ConfigSpace) {
        let control = config.u16_at(self.at + CONTROL);
        let status = config.u16_at(self.at + STATUS);
        let is_set = |enable: u16, event: u16| control & enable != 0 && status & event != 0;
        let pending = control & INTERRUPT_ENABLE != 0
            && (is_set(PRESENCE_ENABLE, PRESENCE_CHANGED) || is_set(LINK_ENABLE, LINK_CHANGED));
        self.is_news |= pending && !self.pending;
        self.pending = pending;
    }

    /// Interrupts the guest if there is something new. It can see what it is by now.
    pub fn notify(&mut self) {
        // Without MSI nobody listens.
        if !std::mem::take(&mut self.is_news) || !self.vector.is_unmasked(0) {
            return;
        }
        let told = match self.vector.event(0) {
            Ok(Some(event)) => event.write(1).map_err(|error| error.to_string()),
            Ok(None) => Ok(()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = told {
            self.complaints.add(&error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::test_vm;

    const SLOT: usize = 0x54;

    /// A bridge with a slot, or `None` where there is no KVM.
    fn slot() -> Option<(ConfigSpace, HotPlug)> {
        let vm = test_vm()?;
        let mut config = ConfigSpace::bridge(1, 2, [0, 4, 6]);
        config.add_capability(0x10, &[0; 0x3a], &[]);
        let slot = HotPlug::new(&vm, &mut config, SLOT, 3);
        Some((config, slot))
    }

    fn write(config: &mut ConfigSpace, slot: &mut HotPlug, register: usize, data: &[u8]) {
        config.write(register, data);
        slot.written(config, register, data);
    }

    /// Whether the guest is interrupted, if its MSI is on.
    fn interrupts(slot: &mut HotPlug) -> bool {
        std::mem::take(&mut slot.is_news)
    }

    /// As Linux does it.
    fn listen(config: &mut ConfigSpace, slot: &mut HotPlug) {
        let enables = PRESENCE_ENABLE | INTERRUPT_ENABLE | LINK_ENABLE;
        write(config, slot, SLOT + CONTROL, &enables.to_le_bytes());
    }

    #[test]
    fn slot_says_what_it_can() {
        let Some((mut config, mut slot)) = slot() else {
            return;
        };
        let low = u32::from(config.u16_at(SLOT));
        let capabilities = u32::from(config.u16_at(SLOT + 2)) << 16 | low;
        assert_eq!(capabilities, 3 << 19 | 1 << 18 | 0b110_0000);
        assert_eq!(config.u16_at(SLOT + STATUS), 0);
        write(&mut config, &mut slot, SLOT, &[0xff; 8]);
        assert_eq!(config.u16_at(SLOT + CONTROL), 0x1028, "only the enables");
        assert_eq!(config.u16_at(SLOT), u16::try_from(low).unwrap());
        assert_eq!(config.u16_at(SLOT + STATUS), 0);
    }

    #[test]
    fn a_device_that_comes_interrupts_once() {
        let Some((mut config, mut slot)) = slot() else {
            return;
        };
        listen(&mut config, &mut slot);
        slot.set_present(&mut config, true);
        assert_eq!(config.u16_at(SLOT + STATUS), 0x0148);
        assert!(interrupts(&mut slot));
        slot.set_present(&mut config, true);
        assert!(!interrupts(&mut slot), "nothing new");
        // One event is left, and it is known.
        write(&mut config, &mut slot, SLOT + STATUS, &[0x08, 0]);
        assert_eq!(config.u16_at(SLOT + STATUS), 0x0140);
        assert!(!interrupts(&mut slot));
        write(&mut config, &mut slot, SLOT + CONTROL, &[0x28, 0x10, 0, 1]);
        assert_eq!(config.u16_at(SLOT + STATUS), 0x0040);
        slot.set_present(&mut config, false);
        assert_eq!(config.u16_at(SLOT + STATUS), 0x0108);
        assert!(interrupts(&mut slot));
    }

    #[test]
    fn nobody_is_interrupted_who_does_not_listen() {
        let Some((mut config, mut slot)) = slot() else {
            return;
        };
        slot.set_present(&mut config, true);
        assert!(!interrupts(&mut slot));
        // Who listens later hears of what is there.
        listen(&mut config, &mut slot);
        assert!(interrupts(&mut slot));
    }

    #[test]
    fn the_message_is_the_guest_s() {
        let Some((mut config, mut slot)) = slot() else {
            return;
        };
        let msi = slot.msi;
        assert_eq!(u16::from(config.byte(msi)), MSI_64);
        write(
            &mut config,
            &mut slot,
            msi + 2,
            &0xfee0_1003_u32.to_le_bytes(),
        );
        write(&mut config, &mut slot, msi + 10, &[0x42, 0]);
        // Without MSI nothing is sent, and nothing is left to be.
        slot.is_news = true;
        slot.notify();
        assert!(slot.vector.event(0).unwrap().unwrap().read().is_err());
        write(&mut config, &mut slot, msi, &[0xff, 0]);
        assert_eq!(u16::from(config.byte(msi)), MSI_64 | 1, "one vector");
        let mut entry = [0; 16];
        slot.vector.read_table(0, &mut entry);
        assert_eq!(entry[..8], 0xfee0_1000_u64.to_le_bytes());
        assert_eq!(entry[8..], [0x42, 0, 0, 0, 0, 0, 0, 0]);
        // Whatever a guest writes, and wherever.
        for register in 0..256 {
            write(&mut config, &mut slot, register, &[0xff; 8]);
        }
    }
}
