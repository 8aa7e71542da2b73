//! The PCI Express buses: on bus 0 a host bridge, virtio devices and root ports,
//! one to a slot; behind each root port a bus with a device of the host.
//!
//! ```text
//!   ECAM window --bus, slot--> VirtioPci, RootPort or VfioPci::{config_read, config_write}
//!   32/64-bit windows --BAR match--> VirtioPci or VfioPci::{bar_read, bar_write}
//! ```
//!
//! BARs are assigned when a device is added and Linux keeps them, but the guest
//! may move them: a window access goes to whichever function's BAR covers the
//! address at that moment. The same holds for bus numbers, which root ports keep.
//!
//! Finding the devices takes Linux some 200 reads of configuration space for
//! each, and hardly anything in it changes by itself. So the page of every function
//! on bus 0 in the ECAM window is a read-only memory slot ([`PciRoot::map_config`]):
//! reads are memory reads, writes come to [`Ecam`], and so do reads of functions that
//! are not there, and of the host's devices.
//!
//! Virtio devices may come and go while the guest runs. Nothing on bus 0 tells the
//! guest of that, as a hot-plug slot would: who asks for it has the guest look, or let
//! go.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::bus::BusDevice;
use crate::layout;
use crate::vfio::VfioPci;
use crate::virtio::transport::{BAR_SIZE, VirtioPci};
use crate::vm::{Vm, VmError};

pub mod config;
pub mod msix;
pub mod placement;
pub mod root_port;

use config::ConfigSpace;
use root_port::RootPort;

/// Slots of a bus.
const SLOTS: usize = 32;
/// Slots that are free for devices and root ports; slot 0 holds the host bridge.
pub const MAX_DEVICES: usize = SLOTS - 1;

/// Bits of an ECAM offset: 12 of register, 3 of function, 5 of device, 8 of bus
/// (PCI Express base 7.2.2).
const REGISTER_MASK: u64 = 0xfff;
const FUNCTION_SHIFT: u32 = 12;
const SLOT_SHIFT: u32 = 15;
const BUS_SHIFT: u32 = 20;

/// "QEMU PCIe host bridge", which Linux needs no driver for.
const BRIDGE_VENDOR: u16 = 0x1b36;
const BRIDGE_DEVICE: u16 = 0x0008;
/// Host bridge class (PCI Code and ID Assignment 1.7).
const BRIDGE_CLASS: [u8; 3] = [0, 0, 6];

/// The buses.
pub struct PciRoot {
    bridge: ConfigSpace,
    /// What is on bus 0 from slot 1 on, locked only to find it,
    slots: RwLock<Vec<Option<Arc<Slot>>>>,
}

/// and what a slot holds.
pub enum Slot {
    /// A virtio device.
    Virtio(Box<VirtioPci>),
    /// A root port, and the device of the host behind it.
    Port(Box<RootPort>, Box<VfioPci>),
}

impl Slot {
    fn config_read(&self, register: usize, data: &mut [u8]) {
        match self {
            Self::Virtio(device) => device.config_read(register, data),
            Self::Port(port, _) => port.config_read(register, data),
        }
    }

    fn config_write(&self, register: usize, data: &[u8]) {
        match self {
            Self::Virtio(device) => device.config_write(register, data),
            Self::Port(port, _) => port.config_write(register, data),
        }
    }

    /// The function on a bus behind a root port.
    fn behind_port(&self, bus: u8) -> Option<&VfioPci> {
        match self {
            Self::Port(port, device) if port.secondary_bus() == bus => Some(&**device),
            _ => None,
        }
    }

    /// The BAR that covers an address, and the offset in it.
    fn bar_at(&self, address: u64) -> Option<(usize, u64)> {
        match self {
            Self::Virtio(device) => {
                let offset = address.checked_sub(device.bar_address()?)?;
                (offset < BAR_SIZE).then_some((0, offset))
            }
            Self::Port(_, device) => device.bar_at(address),
        }
    }

    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) {
        match self {
            Self::Virtio(device) => device.bar_read(offset, data),
            Self::Port(_, device) => device.bar_read(bar, offset, data),
        }
    }

    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) {
        match self {
            Self::Virtio(device) => device.bar_write(offset, data),
            Self::Port(_, device) => device.bar_write(bar, offset, data),
        }
    }
}

impl PciRoot {
    /// Bus 0 with `slots` in slots 1, 2, ...; those past [`MAX_DEVICES`] would not
    /// be seen.
    #[must_use]
    pub fn new(slots: Vec<Slot>) -> Self {
        debug_assert!(slots.len() <= MAX_DEVICES);
        Self {
            bridge: ConfigSpace::new(BRIDGE_VENDOR, BRIDGE_DEVICE, BRIDGE_CLASS),
            slots: RwLock::new(slots.into_iter().map(|slot| Some(slot.into())).collect()),
        }
    }

    fn slots(&self) -> RwLockReadGuard<'_, Vec<Option<Arc<Slot>>>> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn slots_mut(&self) -> RwLockWriteGuard<'_, Vec<Option<Arc<Slot>>>> {
        self.slots.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first slot of which something is wanted, and that.
    fn find<T>(&self, wanted: impl Fn(&Slot) -> Option<T>) -> Option<(Arc<Slot>, T)> {
        let slots = self.slots();
        let mut slots = slots.iter().flatten();
        slots.find_map(|slot| {
            let found = wanted(slot)?;
            Some((slot.clone(), found))
        })
    }

    /// The number of the first empty slot.
    #[must_use]
    pub fn empty_slot(&self) -> Option<u8> {
        let slots = self.slots();
        let index = slots.iter().position(Option::is_none);
        let number = index.unwrap_or(slots.len()) + 1;
        u8::try_from(number).ok().filter(|_| number < SLOTS)
    }

    /// Puts a device into an empty slot. One caller at a time.
    pub fn insert(&self, number: u8, device: VirtioPci) {
        let index = usize::from(number).saturating_sub(1);
        let mut slots = self.slots_mut();
        if slots.len() <= index {
            slots.resize_with(index + 1, || None);
        }
        if let Some(slot) = slots.get_mut(index) {
            *slot = Some(Arc::new(Slot::Virtio(Box::new(device))));
        }
    }

    /// Takes a virtio device out of its slot; whether there was one. Nothing works for it
    /// any more when this returns.
    pub fn remove(&self, number: u8) -> bool {
        let index = usize::from(number).wrapping_sub(1);
        let taken = match self.slots_mut().get_mut(index) {
            Some(slot) => slot.take_if(|slot| matches!(**slot, Slot::Virtio(_))),
            None => None,
        };
        let Some(taken) = taken else { return false };
        if let Slot::Virtio(device) = &*taken {
            device.retire();
        }
        true
    }

    /// Where the configuration of a function on bus 0 is.
    #[must_use]
    pub fn config_address(number: u8) -> u64 {
        layout::ECAM_START + (u64::from(number) << SLOT_SHIFT)
    }

    /// Lets the guest read the configuration of all functions on bus 0 without an
    /// exit. Once, before it runs.
    ///
    /// # Errors
    ///
    /// When there is no memory, or no slot of memory, for it.
    pub fn map_config(&self, vm: &Vm) -> Result<(), VmError> {
        let page = vm.add_read_only_page(layout::ECAM_START)?;
        page.page().show(self.bridge.bytes());
        for (number, slot) in (1..).zip(&*self.slots()) {
            let address = Self::config_address(number);
            match slot.as_deref() {
                Some(Slot::Virtio(device)) => device.map_config(address)?,
                Some(Slot::Port(port, _)) => port.map_config(vm, address)?,
                None => {}
            }
        }
        Ok(())
    }

    /// The highest bus number: a bus for each root port.
    #[must_use]
    pub fn last_bus(&self) -> u8 {
        let slots = self.slots();
        let ports = slots.iter().flatten();
        let ports = ports.filter(|slot| matches!(***slot, Slot::Port(..)));
        u8::try_from(ports.count()).unwrap_or(u8::MAX)
    }

    /// BAR address of the virtio device with this index.
    #[must_use]
    pub fn bar_address(index: usize) -> u64 {
        layout::WINDOW32_START + index as u64 * BAR_SIZE
    }

    /// Stops all devices.
    pub fn reset(&self) {
        for slot in self.slots().iter().flatten() {
            match &**slot {
                Slot::Virtio(device) => device.reset(),
                Slot::Port(_, device) => device.stop(),
            }
        }
    }
}

/// Where an ECAM access goes. Functions other than 0 do not exist.
enum Target<'a> {
    Bridge(&'a ConfigSpace),
    Slot(Arc<Slot>),
    /// Behind the root port in this slot, which has this bus.
    Behind(Arc<Slot>, u8),
}

/// The configuration space window.
pub struct Ecam(pub Arc<PciRoot>);

impl Ecam {
    fn target(&self, offset: u64) -> Option<(Target<'_>, usize)> {
        let register = usize::try_from(offset & REGISTER_MASK).ok()?;
        let bus = u8::try_from(offset >> BUS_SHIFT).ok()?;
        let slot = u8::try_from(offset >> SLOT_SHIFT & 31).ok()?;
        if offset >> FUNCTION_SHIFT & 7 != 0 {
            return None;
        }
        let target = match (bus, slot) {
            (0, 0) => Target::Bridge(&self.0.bridge),
            (0, slot) => {
                let slots = self.0.slots();
                Target::Slot(slots.get(usize::from(slot) - 1)?.clone()?)
            }
            (bus, 0) => {
                let is_behind = |slot: &Slot| slot.behind_port(bus).map(drop);
                Target::Behind(self.0.find(is_behind)?.0, bus)
            }
            _ => return None,
        };
        Some((target, register))
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.target(offset) {
            Some((Target::Bridge(bridge), register)) => bridge.read(register, data),
            Some((Target::Slot(slot), register)) => slot.config_read(register, data),
            Some((Target::Behind(port, bus), register)) => match port.behind_port(bus) {
                Some(device) => device.config_read(register, data),
                None => data.fill(0xff),
            },
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match self.target(offset) {
            Some((Target::Slot(slot), register)) => slot.config_write(register, data),
            Some((Target::Behind(port, bus), register)) => {
                if let Some(device) = port.behind_port(bus) {
                    device.config_write(register, data);
                }
            }
            // Nothing in the host bridge can be written.
            Some((Target::Bridge(_), _)) | None => {}
        }
    }
}

/// A window BARs lie in.
pub struct Window {
    /// The buses behind it.
    pub root: Arc<PciRoot>,
    /// Its first address.
    pub start: u64,
}

impl Window {
    /// The slot with the BAR that covers an offset of the window, which of its device's
    /// that is, and the offset in it.
    fn target(&self, offset: u64) -> Option<(Arc<Slot>, (usize, u64))> {
        let address = self.start + offset;
        self.root.find(|slot| slot.bar_at(address))
    }
}

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.target(offset) {
            Some((slot, (bar, offset))) => slot.bar_read(bar, offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((slot, (bar, offset))) = self.target(offset) {
            slot.bar_write(bar, offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;
    use crate::virtio::rng::Rng;
    use kvm_ioctls::Kvm;

    #[test]
    fn only_the_bridge_answers_on_an_empty_bus() {
        let ecam = Ecam(Arc::new(PciRoot::new(Vec::new())));
        let mut id = [0; 4];
        ecam.read(0, &mut id);
        assert_eq!(id, [0x36, 0x1b, 8, 0]);
        for absent in [
            1 << FUNCTION_SHIFT,
            1 << SLOT_SHIFT,
            31 << SLOT_SHIFT,
            1 << BUS_SHIFT,
        ] {
            ecam.read(absent, &mut id);
            assert_eq!(id, [0xff; 4]);
            ecam.write(absent, &id);
        }
    }

    #[test]
    fn devices_come_into_the_first_empty_slot_and_go() {
        let Ok(kvm) = Kvm::new() else {
            eprintln!("skipped: no /dev/kvm");
            return;
        };
        let vm = Arc::new(Vm::new(&kvm, memory::allocate(32, false).unwrap()).unwrap());
        let root = Arc::new(PciRoot::new(Vec::new()));
        let ecam = Ecam(root.clone());
        let id = |number: u64| {
            let mut id = [0; 4];
            ecam.read(number << SLOT_SHIFT, &mut id);
            u32::from_le_bytes(id)
        };
        let add = || {
            let number = root.empty_slot().unwrap();
            let bar = PciRoot::bar_address(usize::from(number) - 1);
            let device = VirtioPci::new(&vm, Box::new(Rng::new()), bar).unwrap();
            root.insert(number, device);
            number
        };
        assert_eq!([add(), add(), add()], [1, 2, 3]);
        ecam.write(2 << SLOT_SHIFT | config::COMMAND as u64, &[2, 0]);
        let window = Window {
            root: root.clone(),
            start: layout::WINDOW32_START,
        };
        let queues = || {
            let mut data = [0; 2];
            window.read(BAR_SIZE + 0x12, &mut data);
            u16::from_le_bytes(data)
        };
        assert_eq!((id(2), queues()), (0x1044_1af4, 1));
        assert!(root.remove(2) && !root.remove(2));
        assert_eq!((id(2), queues()), (u32::MAX, u16::MAX));
        assert_eq!(id(3), 0x1044_1af4);
        assert_eq!(add(), 2);
        while root.empty_slot().is_some() {
            add();
        }
        assert_eq!(id(31), 0x1044_1af4);
        assert!(!root.remove(0) && !root.remove(32));
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
