//! A PCI Express root port: the bridge between bus 0 and one device of the host
//! (PCI Express base 7.5.1.3 and 7.5.3).
//!
//! It is there so that the guest sees an endpoint where endpoints belong, with a
//! link and a bus of its own. Bus number and windows are set before the guest
//! runs, and Linux keeps what it finds. No access control services:
//! those would promise an isolation between the pod's own devices that nobody checks. The INTx of what is
//! behind it is a [line](crate::vm::lines) that it has from the start, whatever number its bus gets.
//!
//! A port whose device is there from the start has no slot and no interrupt. One that
//! waits for a device has a hot-plug slot ([`super::slot`]).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::config::{BridgeWindow, ConfigSpace};
use super::placement::Placed;
use super::registers::EXPRESS;
use super::registers::express::{
    DEVICE_CAPABILITIES, DEVICE_CONTROL, FLAGS, LINK_CAPABILITIES, LINK_CAPABILITIES_2,
    LINK_CONTROL_2, LINK_STATUS, SLOT_CAPABILITIES,
};
use super::slot::HotPlug;
use crate::vm::lines::OF_PCI;
use crate::vm::{ReadOnlyPage, Vm, VmError};

/// "QEMU PCIe root port", which Linux needs no driver of its own for.
const VENDOR: u16 = 0x1b36;
const DEVICE: u16 = 0x000c;
/// PCI-to-PCI bridge.
const CLASS: [u8; 3] = [0, 4, 6];

/// What follows the PCI Express capability's id up to the second slot register.
const BODY: usize = 0x3a;
/// Flags, second byte: there is a slot.
const FLAGS_SLOT: u8 = 1;
/// Version 2, root port.
const FLAGS_ROOT_PORT: u8 = 4 << 4 | 2;
/// Device capabilities: role-based error reporting.
const ROLE_BASED_ERRORS: u32 = 1 << 15;
/// Device control: the largest payload.
const CONTROL_PAYLOAD: u16 = 7 << 5;
/// Link capabilities: a link without ASPM is no mistake.
const NO_ASPM_BY_INTENT: u32 = 1 << 22;
/// And link status says whether the link is up,
const REPORTS_LINK: u32 = 1 << 20;
/// by this.
const LINK_ACTIVE: u16 = 1 << 13;

/// What the device behind the port says of its link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Speed as link capabilities encode it: 1 is 2.5 GT/s.
    pub speed: u8,
    /// Lanes.
    pub width: u8,
    /// Largest payload as device capabilities encode it: 0 is 128 bytes.
    pub payload: u8,
}

/// Without a link of its own: the slowest there is.
pub const NO_LINK: Link = Link {
    speed: 1,
    width: 1,
    payload: 0,
};

/// A root port.
pub struct RootPort {
    line: u32,
    port: Mutex<Port>,
}

struct Port {
    config: ConfigSpace,
    /// Where its PCI Express capability is.
    express: usize,
    hot_plug: Option<HotPlug>,
    /// Where the guest reads `config` without us, once it does.
    page: Option<ReadOnlyPage>,
}

impl RootPort {
    /// The port before bus `bus`, over what has been placed for the device there.
    #[must_use]
    pub fn new(bus: u8, link: Link, placed: &Placed) -> Self {
        let mut port = Port::new(bus, placed, false);
        port.show_link(link);
        Self {
            line: line(bus),
            port: Mutex::new(port),
        }
    }

    /// The port before bus `bus`, with an empty slot whose devices get what is in the
    /// windows of `placed`.
    #[must_use]
    pub fn with_slot(vm: &Arc<Vm>, bus: u8, placed: &Placed) -> Self {
        let mut port = Port::new(bus, placed, true);
        port.show_link(NO_LINK);
        port.config.put(port.express + LINK_STATUS, &[0, 0]);
        let at = port.express + SLOT_CAPABILITIES;
        port.hot_plug = Some(HotPlug::new(vm, &mut port.config, at, bus));
        Self {
            line: line(bus),
            port: Mutex::new(port),
        }
    }

    /// The line of the device behind it.
    #[must_use]
    pub fn line(&self) -> u32 {
        self.line
    }

    /// Shows a device in the slot, with this link, or that there is none any more. The
    /// guest is told.
    pub fn set_present(&self, link: Option<Link>) {
        let mut port = self.lock();
        let at = port.express + LINK_STATUS;
        match link {
            Some(link) => port.show_link(link),
            None => {
                let status = port.config.u16_at(at) & !LINK_ACTIVE;
                port.config.put(at, &status.to_le_bytes());
            }
        }
        let Port {
            config, hot_plug, ..
        } = &mut *port;
        if let Some(hot_plug) = hot_plug {
            hot_plug.set_present(config, link.is_some());
        }
        port.show();
        if let Some(hot_plug) = &mut port.hot_plug {
            hot_plug.notify();
        }
    }

    /// The number of the bus behind it.
    #[must_use]
    pub fn secondary_bus(&self) -> u8 {
        self.lock().config.secondary_bus()
    }

    /// Lets the guest read configuration space at `address` without an exit.
    ///
    /// # Errors
    ///
    /// When there is no memory, or no slot of memory, for it.
    pub fn map_config(&self, vm: &Vm, address: u64) -> Result<(), VmError> {
        let mut port = self.lock();
        let page = vm.add_read_only_page(address)?;
        page.page().show(port.config.bytes());
        port.page = Some(page);
        Ok(())
    }

    /// Reads configuration space.
    pub fn config_read(&self, register: usize, data: &mut [u8]) {
        self.lock().config.read(register, data);
    }

    /// Writes configuration space.
    pub fn config_write(&self, register: usize, data: &[u8]) {
        let mut port = self.lock();
        port.config.write(register, data);
        let Port {
            config, hot_plug, ..
        } = &mut *port;
        if let Some(hot_plug) = hot_plug {
            hot_plug.written(config, register, data);
        }
        port.show();
        if let Some(hot_plug) = &mut port.hot_plug {
            hot_plug.notify();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Port> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Port {
    fn new(bus: u8, placed: &Placed, has_slot: bool) -> Self {
        let mut config = ConfigSpace::bridge(VENDOR, DEVICE, CLASS);
        config.set_buses(0, bus, bus);
        config.set_window(BridgeWindow::Memory, placed.memory);
        config.set_window(BridgeWindow::Prefetchable, placed.prefetchable);
        config.set_window(BridgeWindow::Io, placed.io);
        let (body, writable) = express(has_slot);
        let express = config.add_capability(EXPRESS, &body, &writable);
        config.put(express + LINK_CAPABILITIES + 3, &[bus]);
        Self {
            config,
            express,
            hot_plug: None,
            page: None,
        }
    }

    /// Mirrors the link of the device behind it, as a link that is up.
    fn show_link(&mut self, link: Link) {
        let Self {
            config,
            express,
            hot_plug,
            ..
        } = self;
        let payload = link.payload & 7;
        // Its other bits are the guest's.
        let control = config.u16_at(*express + DEVICE_CONTROL) & !CONTROL_PAYLOAD;
        let control = control | u16::from(payload) << CONTROL_PAYLOAD.trailing_zeros();
        let mut put = |at: usize, bytes: &[u8]| config.put(*express + at, bytes);
        let speed_and_width = u16::from(link.speed & 0xf) | u16::from(link.width & 0x3f) << 4;
        let speeds = ((1u32 << (link.speed & 0xf)) - 1) << 1;
        let capabilities = ROLE_BASED_ERRORS | u32::from(payload);
        put(DEVICE_CAPABILITIES, &capabilities.to_le_bytes());
        put(DEVICE_CONTROL, &control.to_le_bytes());
        put(LINK_CAPABILITIES, &speed_and_width.to_le_bytes());
        put(LINK_CAPABILITIES_2, &speeds.to_le_bytes());
        put(LINK_CONTROL_2, &[link.speed & 0xf]);
        let active = match hot_plug {
            Some(_) => LINK_ACTIVE,
            None => 0,
        };
        put(LINK_STATUS, &(speed_and_width | active).to_le_bytes());
    }

    /// Has the guest read what there is now.
    fn show(&self) {
        if let Some(page) = &self.page {
            page.page().show(self.config.bytes());
        }
    }
}

/// The line behind the port before `bus`: in turn, so that with many some share one.
fn line(bus: u8) -> u32 {
    let count = OF_PCI.end - OF_PCI.start;
    OF_PCI.start + u32::from(bus.wrapping_sub(1)) % count
}

/// The PCI Express capability after id and next pointer, and its writable bits, but for
/// what depends on the device behind the port.
fn express(has_slot: bool) -> (Vec<u8>, Vec<u8>) {
    let mut body = vec![0; BODY];
    let mut writable = vec![0; BODY];
    let (flags, reports_link) = if has_slot {
        (FLAGS_SLOT, REPORTS_LINK)
    } else {
        (0, 0)
    };
    put(&mut body, FLAGS, &[FLAGS_ROOT_PORT, flags]);
    put(&mut writable, DEVICE_CONTROL, &[0xff, 0x7f]);
    let capabilities = NO_ASPM_BY_INTENT | reports_link;
    put(&mut body, LINK_CAPABILITIES, &capabilities.to_le_bytes());
    (body, writable)
}

/// `at` counts from the start of the capability, which begins two bytes earlier.
fn put(body: &mut [u8], at: usize, bytes: &[u8]) {
    for (to, from) in body.iter_mut().skip(at - 2).zip(bytes) {
        *to = *from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::GIB;
    use crate::vm::test_vm;

    fn u32_at(port: &RootPort, register: usize) -> u32 {
        let mut bytes = [0; 4];
        port.config_read(register, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn port(link: Link) -> RootPort {
        let placed = Placed {
            bars: Vec::new(),
            memory: Some((0xc010_0000, 0xc020_0000)),
            prefetchable: Some((64 * GIB, 65 * GIB)),
            io: Some((0x1000, 0x2000)),
        };
        RootPort::new(2, link, &placed)
    }

    #[test]
    fn bridge_leads_to_its_bus_and_covers_the_bars() {
        let port = port(NO_LINK);
        assert_eq!(u32_at(&port, 0), 0x000c_1b36);
        assert_eq!(u32_at(&port, 0x08) >> 8, 0x06_0400);
        assert_eq!(u32_at(&port, 0x18) & 0xff_ffff, 0x02_0200);
        assert_eq!(port.secondary_bus(), 2);
        assert_eq!(u32_at(&port, 0x20), 0xc010_c010);
        assert_eq!(u32_at(&port, 0x28), 0x10);
        assert_eq!(u32_at(&port, 0x1c) & 0xffff, 0x1010);
        port.config_write(0x19, &[9]);
        assert_eq!(port.secondary_bus(), 9);
    }

    #[test]
    fn ports_share_lines_where_there_are_many() {
        let line = |bus| RootPort::new(bus, NO_LINK, &Placed::default()).line();
        assert_eq!([1, 8, 9, 31].map(line), [16, 23, 16, 22]);
        let port = port(NO_LINK);
        port.config_write(0x19, &[9]);
        assert_eq!(port.line(), 17, "whatever its bus is called");
    }

    #[test]
    fn link_is_the_device_s() {
        let link = Link {
            speed: 4,
            width: 16,
            payload: 2,
        };
        let port = port(link);
        let at = (u32_at(&port, 0x34) & 0xff) as usize;
        assert_eq!(u32_at(&port, at), 0x0042_0010, "the only capability");
        assert_eq!(u32_at(&port, at + LINK_CAPABILITIES) & 0x3ff, 16 << 4 | 4);
        assert_eq!(u32_at(&port, at + 0x10) >> 16, 16 << 4 | 4);
        assert_eq!(u32_at(&port, at + LINK_CAPABILITIES_2), 0b11110);
        assert_eq!(u32_at(&port, at + DEVICE_CONTROL) >> 5 & 7, 2);
        assert_eq!(
            u32_at(&port, at + LINK_CAPABILITIES) >> 10 & 3,
            0,
            "no ASPM"
        );
    }

    #[test]
    fn device_control_can_be_written_and_the_link_not() {
        let port = port(NO_LINK);
        let at = (u32_at(&port, 0x34) & 0xff) as usize;
        port.config_write(at + DEVICE_CONTROL, &[0x2f, 0x50]);
        assert_eq!(u32_at(&port, at + DEVICE_CONTROL), 0x502f);
        let before = u32_at(&port, at + LINK_CAPABILITIES);
        port.config_write(at + LINK_CAPABILITIES, &[0xff; 4]);
        assert_eq!(u32_at(&port, at + LINK_CAPABILITIES), before);
    }

    #[test]
    fn a_slot_shows_the_link_of_what_is_in_it() {
        let Some(vm) = test_vm() else {
            return;
        };
        let port = RootPort::with_slot(&vm, 2, &Placed::default());
        let at = (u32_at(&port, 0x34) & 0xff) as usize;
        assert_eq!(u32_at(&port, at) >> 16, 0x0142, "a slot");
        assert_eq!(u32_at(&port, at + LINK_CAPABILITIES) >> 20 & 1, 1);
        let status = |port: &RootPort| u32_at(port, at + 0x10) >> 16;
        assert_eq!(status(&port), 0);
        let link = Link {
            speed: 3,
            width: 4,
            payload: 1,
        };
        port.config_write(at + DEVICE_CONTROL, &[0x1f, 0x20]);
        port.set_present(Some(link));
        assert_eq!(u32_at(&port, at + DEVICE_CONTROL), 0x203f, "the guest's");
        assert_eq!(status(&port), 1 << 13 | 4 << 4 | 3);
        assert_eq!(u32_at(&port, at + LINK_CAPABILITIES) & 0x3ff, 4 << 4 | 3);
        port.set_present(None);
        assert_eq!(status(&port) >> 13, 0, "the link is down");
    }
}
