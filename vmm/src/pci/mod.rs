//! The PCI Express buses: on bus 0 a host bridge, virtio devices and root ports,
//! one to a slot; behind each root port a bus with a device of the host, or an
//! empty hot-plug slot for one.
//!
//! ```text
//!   ECAM window --bus, slot--> VirtioPci, RootPort or VfioPci::{config_read, config_write}
//!   32/64-bit windows --BAR match--> VirtioPci or VfioPci::{bar_read, bar_write}
//!   I/O ports --BAR match--> VfioPci::{bar_read, bar_write}
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
//! Virtio devices may come and go while the guest runs, too. Nothing on bus 0 tells the
//! guest of that, as a hot-plug slot does: who asks for it has the guest look, or let go.
//! What a guest has not let go of can be taken by force ([`PciRoot::remove`]). No other
//! device comes into that slot, which the guest would take for the one it knows. It reads
//! as empty, and where its BAR was, as zeros: Linux resets a device that it lets go of, and waits,
//! for ever and with its PCI buses locked, until the status is 0 (virtio 1.2, 4.1.4.3.2).

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::bus::BusDevice;
use crate::layout;
use crate::vfio::VfioPci;
use crate::virtio::transport::{BAR_SIZE, VirtioPci};
use crate::vm::{Vm, VmError};

pub mod config;
pub mod msix;
pub mod placement;
pub(crate) mod registers;
pub mod root_port;
pub mod slot;

use config::ConfigSpace;
use placement::Placed;
use root_port::{Link, RootPort};

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
    /// What is on bus 0 from slot 1 on,
    slots: Vec<Slot>,
    /// and the slots that stay empty: whose device was taken by force, with the last address of
    /// its BAR, or can be seen yet.
    lost: Mutex<BTreeMap<u8, Option<u64>>>,
}

/// and what a slot holds.
pub enum Slot {
    /// A virtio device, or nothing.
    Virtio(Place<VirtioPci>),
    /// A root port, and what is behind it.
    Port(Box<Port>),
}

/// A root port and the device of the host behind it.
pub struct Port {
    root: RootPort,
    /// For an empty slot, what its devices' BARs may have.
    room: Placed,
    device: Place<VfioPci>,
}

/// Where a device is, or may be. Accesses share it: with it alone, no vCPU is in the device.
pub struct Place<T>(RwLock<Option<Box<T>>>);

impl<T> Place<T> {
    /// Without a device.
    #[must_use]
    pub fn empty() -> Self {
        Self(RwLock::new(None))
    }

    /// With one.
    #[must_use]
    pub fn with(device: T) -> Self {
        Self(RwLock::new(Some(Box::new(device))))
    }

    fn look(&self) -> RwLockReadGuard<'_, Option<Box<T>>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn own(&self) -> RwLockWriteGuard<'_, Option<Box<T>>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Port {
    /// With a device that stays.
    #[must_use]
    pub fn with(root: RootPort, device: VfioPci) -> Self {
        Self {
            root,
            room: Placed::default(),
            device: Place::with(device),
        }
    }

    /// Without one, but with room in the guest's windows for it.
    #[must_use]
    pub fn empty(root: RootPort, room: Placed) -> Self {
        Self {
            root,
            room,
            device: Place::empty(),
        }
    }

    /// What there is for a device.
    #[must_use]
    pub fn room(&self) -> &Placed {
        &self.room
    }

    /// The line of its device.
    #[must_use]
    pub fn line(&self) -> u32 {
        self.root.line()
    }

    /// Whether there is a device.
    #[must_use]
    pub fn is_taken(&self) -> bool {
        self.device.look().is_some()
    }

    /// Puts a device in and shows it to the guest.
    pub fn plug(&self, device: VfioPci, link: Link) {
        *self.device.own() = Some(Box::new(device));
        self.root.set_present(Some(link));
    }

    /// Takes the device out, whether the guest has let go of it or not: it is quiet, and has yet to
    /// be reset.
    #[must_use]
    pub fn unplug(&self) -> Option<Box<VfioPci>> {
        let device = self.device.own().take();
        if let Some(device) = &device {
            device.withdraw();
            device.quiesce();
        }
        self.root.set_present(None);
        device
    }

    /// Does `access` if a BAR of the device covers an address, by `find`.
    fn access(
        &self,
        find: fn(&VfioPci, u64) -> Option<(usize, u64)>,
        address: u64,
        access: impl FnOnce(&VfioPci, usize, u64),
    ) -> bool {
        let device = self.device.look();
        let found = device
            .as_ref()
            .and_then(|device| Some((device, find(device, address)?)));
        found
            .map(|(device, (bar, at))| access(device, bar, at))
            .is_some()
    }
}

impl PciRoot {
    /// Bus 0 with `slots` in slots 1, 2, ...; those past [`MAX_DEVICES`] would not
    /// be seen.
    #[must_use]
    pub fn new(mut slots: Vec<Slot>) -> Self {
        debug_assert!(slots.len() <= MAX_DEVICES);
        slots.resize_with(MAX_DEVICES, || Slot::Virtio(Place::empty()));
        Self {
            bridge: ConfigSpace::new(BRIDGE_VENDOR, BRIDGE_DEVICE, BRIDGE_CLASS),
            slots,
            lost: Mutex::default(),
        }
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
        for (number, slot) in (1..).zip(&self.slots) {
            let address = config_address(number);
            match slot {
                Slot::Virtio(place) => {
                    if let Some(device) = &*place.look() {
                        device.map_config(address)?;
                    }
                }
                Slot::Port(port) => port.root.map_config(vm, address)?,
            }
        }
        Ok(())
    }

    /// The number of the first empty slot of bus 0.
    #[must_use]
    pub fn empty_slot(&self) -> Option<u8> {
        let slots = (1..).zip(&self.slots);
        let mut empty = slots.filter(|(number, slot)| match slot {
            Slot::Virtio(place) => !self.lost().contains_key(number) && place.look().is_none(),
            Slot::Port(_) => false,
        });
        empty.next().map(|(number, _)| number)
    }

    /// Puts a device into an empty slot of bus 0 and lets the guest see it.
    ///
    /// # Errors
    ///
    /// When there is no such slot; no memory, or no slot of memory, for its configuration.
    pub fn insert(&self, number: u8, device: VirtioPci) -> Result<(), VmError> {
        let place = self.virtio(number).ok_or_else(|| VmError {
            what: "find the slot of a device",
            source: io::ErrorKind::NotFound.into(),
        })?;
        let mut place = place.own();
        device.map_config(config_address(number))?;
        *place = Some(Box::new(device));
        Ok(())
    }

    /// Takes a virtio device of this type out of its slot and stops it; whether there was one. If
    /// the guest has not let go of it, or KVM goes on showing it, the slot stays empty.
    pub fn remove(&self, device_type: u16, number: u8, is_let_go: bool) -> bool {
        let Some(device) = self.take(device_type, number, is_let_go) else {
            return false;
        };
        if let Err(error) = device.retire() {
            tracing::warn!(
                %error,
                number,
                "the guest still sees a device that is gone, whose slot stays empty"
            );
            self.lost().entry(number).or_insert(None);
        }
        true
    }

    fn take(&self, device_type: u16, number: u8, is_let_go: bool) -> Option<Box<VirtioPci>> {
        let mut place = self.virtio(number)?.own();
        let device = place.take_if(|device| device.device_type() == device_type)?;
        if !is_let_go {
            // Whoever finds no device there any more, finds this. One whose BAR is off reads as ones
            // as it did before: nobody waits for that.
            self.lost().insert(number, device.bar_address());
        }
        Some(device)
    }

    /// Whether the BAR of a device that was taken by force was there.
    fn is_lost(&self, address: u64) -> bool {
        let lost = self.lost();
        let mut bars = lost.values().flatten();
        bars.any(|bar| offset_in_bar(*bar, address).is_some())
    }

    fn lost(&self) -> MutexGuard<'_, BTreeMap<u8, Option<u64>>> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn virtio(&self, number: u8) -> Option<&Place<VirtioPci>> {
        let index = usize::from(number).checked_sub(1)?;
        match self.slots.get(index)? {
            Slot::Virtio(place) => Some(place),
            Slot::Port(_) => None,
        }
    }

    /// The highest bus number: a bus for each root port.
    #[must_use]
    pub fn last_bus(&self) -> u8 {
        u8::try_from(self.ports().count()).unwrap_or(u8::MAX)
    }

    /// The slot of each root port, and the line of what is behind it.
    #[must_use]
    pub fn lines(&self) -> Vec<(u8, u32)> {
        let slots = (1..).zip(&self.slots);
        let lines = slots.filter_map(|(number, slot)| match slot {
            Slot::Virtio(_) => None,
            Slot::Port(port) => Some((number, port.line())),
        });
        lines.collect()
    }

    /// The root ports, in the order of their buses.
    pub fn ports(&self) -> impl Iterator<Item = &Port> {
        self.slots.iter().filter_map(|slot| match slot {
            Slot::Virtio(_) => None,
            Slot::Port(port) => Some(&**port),
        })
    }

    /// BAR address of the virtio device in a slot of bus 0.
    #[must_use]
    pub fn bar_address(number: u8) -> u64 {
        layout::WINDOW32_START + u64::from(number - 1) * BAR_SIZE
    }

    /// Stops all devices. Those of the host are all quiet before the first is reset, which another
    /// one could write to.
    pub fn reset(&self) {
        for port in self.ports() {
            if let Some(device) = &*port.device.look() {
                device.quiesce();
            }
        }
        for slot in &self.slots {
            match slot {
                Slot::Virtio(place) => {
                    if let Some(device) = &*place.look() {
                        device.reset();
                    }
                }
                Slot::Port(port) => {
                    if let Some(device) = &*port.device.look() {
                        device.reset();
                    }
                }
            }
        }
    }

    /// The port of a bus where there is such a slot.
    fn behind_port(&self, bus: u8, slot: u8) -> Option<&Port> {
        let mut ports = self.ports();
        ports.find(|port| slot == 0 && port.root.secondary_bus() == bus)
    }
}

/// Where the configuration of a function on bus 0 is.
fn config_address(number: u8) -> u64 {
    layout::ECAM_START + (u64::from(number) << SLOT_SHIFT)
}

/// Where an ECAM access goes. Functions other than 0 do not exist.
enum Target<'a> {
    Bridge(&'a ConfigSpace),
    Virtio(&'a Place<VirtioPci>),
    Port(&'a RootPort),
    Behind(&'a Place<VfioPci>),
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
            (0, slot) => match self.0.slots.get(usize::from(slot) - 1)? {
                Slot::Virtio(place) => Target::Virtio(place),
                Slot::Port(port) => Target::Port(&port.root),
            },
            (bus, slot) => Target::Behind(&self.0.behind_port(bus, slot)?.device),
        };
        Some((target, register))
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.target(offset) {
            Some((Target::Bridge(bridge), register)) => bridge.read(register, data),
            Some((Target::Port(port), register)) => port.config_read(register, data),
            Some((Target::Virtio(place), register)) => match &*place.look() {
                Some(device) => device.config_read(register, data),
                None => data.fill(0xff),
            },
            Some((Target::Behind(place), register)) => match &*place.look() {
                Some(device) => device.config_read(register, data),
                None => data.fill(0xff),
            },
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match self.target(offset) {
            Some((Target::Port(port), register)) => port.config_write(register, data),
            Some((Target::Virtio(place), register)) => {
                if let Some(device) = &*place.look() {
                    device.config_write(register, data);
                }
            }
            Some((Target::Behind(place), register)) => {
                if let Some(device) = &*place.look() {
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
    /// Does `access` where a BAR covers an offset of the window, once.
    fn access(&self, offset: u64, mut access: impl FnMut(BarTarget<'_>)) -> bool {
        let address = self.start + offset;
        self.root.slots.iter().any(|slot| match slot {
            Slot::Virtio(place) => {
                let device = place.look();
                let found = device
                    .as_ref()
                    .and_then(|device| Some((device, virtio_offset(device, address)?)));
                found
                    .map(|(device, at)| access(BarTarget::Virtio(device, at)))
                    .is_some()
            }
            Slot::Port(port) => port.access(VfioPci::bar_at, address, |device, bar, at| {
                access(BarTarget::Endpoint(device, bar, at));
            }),
        })
    }
}

/// Where an access to a window goes.
enum BarTarget<'a> {
    Virtio(&'a VirtioPci, u64),
    Endpoint(&'a VfioPci, usize, u64),
}

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let found = self.access(offset, |target| match target {
            BarTarget::Virtio(device, offset) => device.bar_read(offset, data),
            BarTarget::Endpoint(device, bar, offset) => device.bar_read(bar, offset, data),
        });
        if !found {
            let is_lost = self.root.is_lost(self.start + offset);
            data.fill(if is_lost { 0 } else { 0xff });
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.access(offset, |target| match target {
            BarTarget::Virtio(device, offset) => device.bar_write(offset, data),
            BarTarget::Endpoint(device, bar, offset) => device.bar_write(bar, offset, data),
        });
    }
}

/// The I/O ports that root ports pass on, from [`layout::IO_START`] on.
pub struct IoPorts(pub Arc<PciRoot>);

impl IoPorts {
    /// Does `access` where an I/O BAR covers an offset, once.
    fn access(&self, offset: u64, mut access: impl FnMut(&VfioPci, usize, u64)) -> bool {
        let port = layout::IO_START + offset;
        let mut ports = self.0.ports();
        ports.any(|root_port| root_port.access(VfioPci::io_bar_at, port, &mut access))
    }
}

impl BusDevice for IoPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let found = self.access(offset, |device, bar, at| device.bar_read(bar, at, data));
        if !found {
            data.fill(0xff);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.access(offset, |device, bar, at| device.bar_write(bar, at, data));
    }
}

fn virtio_offset(device: &VirtioPci, address: u64) -> Option<u64> {
    offset_in_bar(device.bar_address()?, address)
}

fn offset_in_bar(bar: u64, address: u64) -> Option<u64> {
    let offset = address.checked_sub(bar)?;
    (offset < BAR_SIZE).then_some(offset)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::rng::{DEVICE_TYPE, Rng};
    use crate::vm::test_vm;

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
        let Some(vm) = test_vm() else { return };
        let root = Arc::new(PciRoot::new(Vec::new()));
        let ecam = Ecam(root.clone());
        let id = |number: u64| {
            let mut id = [0; 4];
            ecam.read(number << SLOT_SHIFT, &mut id);
            u32::from_le_bytes(id)
        };
        let add = || {
            let number = root.empty_slot().unwrap();
            let bar = PciRoot::bar_address(number);
            let device = VirtioPci::new(&vm, Box::new(Rng::new()), bar).unwrap();
            root.insert(number, device).unwrap();
            number
        };
        assert_eq!([add(), add(), add()], [1, 2, 3]);
        ecam.write(2 << SLOT_SHIFT | registers::COMMAND as u64, &[2, 0]);
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
        assert!(root.remove(DEVICE_TYPE, 2, true));
        assert!(!root.remove(DEVICE_TYPE, 2, true));
        assert_eq!((id(2), queues()), (u32::MAX, u16::MAX));
        assert_eq!(id(3), 0x1044_1af4);
        assert_eq!(add(), 2);
        while root.empty_slot().is_some() {
            add();
        }
        assert_eq!(id(31), 0x1044_1af4);
        assert!(!root.remove(DEVICE_TYPE, 0, true) && !root.remove(DEVICE_TYPE, 32, true));
        let device = VirtioPci::new(&vm, Box::new(Rng::new()), layout::WINDOW32_START).unwrap();
        assert!(root.insert(32, device).is_err());
    }

    /// As Linux does when it lets go of a device later than it had time for: resets it, and
    /// waits for that.
    #[test]
    fn slot_of_a_device_that_was_taken_by_force_is_not_used_again() {
        let Some(vm) = test_vm() else { return };
        let root = Arc::new(PciRoot::new(Vec::new()));
        let ecam = Ecam(root.clone());
        let window = Window {
            root: root.clone(),
            start: layout::WINDOW32_START,
        };
        let add = || {
            let number = root.empty_slot().unwrap();
            let bar = PciRoot::bar_address(number);
            let device = VirtioPci::new(&vm, Box::new(Rng::new()), bar).unwrap();
            root.insert(number, device).unwrap();
            let command = u64::from(number) << SLOT_SHIFT | registers::COMMAND as u64;
            ecam.write(command, &[2, 0]);
            number
        };
        assert_eq!([add(), add()], [1, 2]);
        assert!(root.remove(DEVICE_TYPE, 1, false));
        assert!(!root.remove(DEVICE_TYPE, 1, false));
        let mut id = [0; 4];
        ecam.read(1 << SLOT_SHIFT, &mut id);
        assert_eq!(id, [0xff; 4], "nothing to find");
        let status = |number: u64| {
            let status = (number - 1) * BAR_SIZE + 0x14;
            window.write(status, &[1]);
            window.write(status, &[0]);
            let mut data = [1];
            window.read(status, &mut data);
            data[0]
        };
        assert_eq!([status(1), status(2), status(3)], [0, 0, 0xff]);
        assert_eq!(add(), 3);
        ecam.write(3 << SLOT_SHIFT | registers::COMMAND as u64, &[0, 0]);
        assert_eq!(status(3), 0xff);
        assert!(root.remove(DEVICE_TYPE, 3, false));
        assert_eq!((status(3), add()), (0xff, 4), "it was off");
        assert!(root.remove(DEVICE_TYPE, 2, true));
        assert_eq!(add(), 2);
    }

    /// Else no device could be added any more, for KVM has a page of the first empty slot.
    #[test]
    fn slot_of_a_device_that_kvm_goes_on_showing_is_not_used_again() {
        let Some(vm) = test_vm() else { return };
        let root = PciRoot::new(Vec::new());
        let add = || {
            let number = root.empty_slot().unwrap();
            let bar = PciRoot::bar_address(number);
            let device = VirtioPci::new(&vm, Box::new(Rng::new()), bar).unwrap();
            root.insert(number, device).unwrap();
            number
        };
        assert_eq!([add(), add()], [1, 2]);
        vm.refuse_removals();
        assert!(root.remove(DEVICE_TYPE, 1, true));
        assert_eq!(add(), 3);
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
