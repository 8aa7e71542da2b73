//! Interrupt lines: KVM's alone, and with "edu" of QEMU and a mediated device in the lab.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::code::*;
use super::passthrough::{PORT, RAISE, run, run_with};
use super::*;
use crate::vfio::access::Irq;
use crate::vfio::device::{Endpoint, VfioPci};
use crate::vfio::mock::{self, Mock};
use crate::vm::{MsiRoute, lines};

/// That of the first device.
const LINE: u32 = lines::OF_PCI.start;
/// Command and status of the device: I/O, memory, bus mastering; Interrupt Disable and Interrupt Status.
const COMMAND: u64 = CONFIG + 4;
const IN_USE: u32 = 7;
const INTX_DISABLE: u32 = 1 << 10;
const INTX_PENDING: u32 = 1 << 19;
/// Where "edu" says what its interrupts are for, and what is told of those that were served.
const STATUS: u64 = BAR + 0x24;
const ACKNOWLEDGE: u64 = BAR + 0x64;

/// Raises a line again each time that `served` says so, as a device does that always wants
/// something, until the guest has had enough. KVM says so also when a guest unmasks a line that
/// is raised, so that what was raised before is no interrupt.
fn raise_until_stopped(running: &Running, served: &EventFd, raise: impl Fn()) {
    let stopped = running.stop_handle().event();
    loop {
        raise();
        if mock::wait_for_one([served, stopped]) == 1 {
            return;
        }
        served.read().unwrap();
    }
}

/// Whoever raised a line hears when the guest has served it, and raises it again.
#[test]
fn line_is_raised_until_the_guest_has_served_it() {
    let code = Code::new().serve(LINE).wait_for(COUNT, 2).power_off();
    let Some(mut parts) = parts(&code, 1) else {
        return;
    };
    parts.pci_slots = 1;
    let running = Machine::new(parts).unwrap().start().unwrap();
    let [trigger, resample] = [(), ()].map(|()| EventFd::new(EFD_NONBLOCK).unwrap());
    running
        .vm
        .add_resample_irqfd(&trigger, &resample, LINE)
        .unwrap();
    // KVM is told all routes again with each new one.
    let message = MsiRoute {
        address: layout::LAPIC.into(),
        data: 0x42,
    };
    running
        .vm
        .route(running.vm.new_gsi().unwrap(), message)
        .unwrap();
    raise_until_stopped(&running, &resample, || trigger.write(1).unwrap());
    let stop = running.stop_handle().clone();
    running.stop();
    let outcome = Outcome::Stopped(StopReason::Shutdown);
    assert_eq!(stop.outcome(), Some(&outcome));
}

/// The same with a device, whose host side masks the line each time,
#[test]
fn device_raises_its_line_again_once_it_is_unmasked() {
    raise_line_of(&Arc::new(Mock::default()), |mock| {
        let state = mock.state();
        state.unmask.as_ref().unwrap().try_clone().unwrap()
    });
}

/// and unmasks it at a call only.
#[test]
fn device_raises_its_line_again_once_it_is_told() {
    let unmasked = EventFd::new(EFD_NONBLOCK).unwrap();
    let mock = Arc::new(Mock::default());
    mock.state().unmasked = Some(unmasked.try_clone().unwrap());
    raise_line_of(&mock, |_| {
        // Whether it can be, was tried.
        unmasked.read().unwrap();
        unmasked
    });
}

/// Until the guest has had enough; `served` makes the event that tells of each end.
fn raise_line_of(mock: &Arc<Mock>, served: impl FnOnce(&Mock) -> EventFd) {
    let code = Code::new().serve(LINE).wait_for(COUNT, 2).power_off();
    let Some(mut parts) = parts(&code, 1) else {
        return;
    };
    parts.pci_slots = 1;
    let running = Machine::new(parts).unwrap().start().unwrap();
    let endpoint = Endpoint::open("0000:01:00.0", mock.clone()).unwrap();
    let addresses = [BAR, 64 * layout::GIB, BAR + 0x10_0000, 0x1000];
    let device = VfioPci::new(&running.vm, endpoint, LINE, &addresses, None).unwrap();
    // Bus mastering alone: registers are no matter.
    device.config_write(4, &[4, 0]);
    let served = served(mock);
    raise_until_stopped(&running, &served, || assert!(mock.signal(Irq::Intx, 0)));
    let stop = running.stop_handle().clone();
    device.quiesce();
    running.stop();
    let outcome = Outcome::Stopped(StopReason::Shutdown);
    assert_eq!(stop.outcome(), Some(&outcome));
}

/// A second interrupt comes only if the host has unmasked the line after the first; a third, at a time when
/// the guest has masked it, is pending until then.
#[test]
fn intx_reaches_the_guest_each_time() {
    let code = Code::new()
        .enable()
        .serve_device(LINE, STATUS, ACKNOWLEDGE)
        .store(BAR + RAISE, 1)
        .wait_for(COUNT, 1)
        .store(BAR + RAISE, 1)
        .wait_for(COUNT, 2)
        .store(COMMAND, IN_USE | INTX_DISABLE)
        .store(BAR + RAISE, 1)
        .wait_set(COMMAND, INTX_PENDING)
        .expect(COUNT, 2)
        // One that is late would be taken for the third.
        .wait_set(COMMAND, INTX_PENDING)
        .wait_set(COMMAND, INTX_PENDING)
        .wait_set(COMMAND, INTX_PENDING)
        .expect(COUNT, 2)
        .store(COMMAND, IN_USE)
        .wait_for(COUNT, 3)
        .power_off();
    let Some(exits) = run(&code) else { return };
    assert_eq!(exits.mmio_writes, 4, "configuration only");
}

/// A serial card of one port that the kernel's sample of a driver for mediated devices makes
/// (samples/vfio-mdev/mtty.c), until this is dropped. It unmasks its line at a call only.
struct Card;

impl Card {
    const UUID: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1000";
    const KIND: &str = "/sys/devices/virtual/mtty/mtty/mdev_supported_types/mtty-1";

    /// `None` outside the lab, whose kernel has the driver.
    fn new() -> Option<Self> {
        if std::env::var_os("LAB_DEVICES").is_none() {
            eprintln!("skipped: mediated devices are made in the lab alone (lab run --devices)");
            return None;
        }
        let loaded = Command::new("modprobe").arg("mtty").status();
        assert!(loaded.unwrap().success(), "no driver mtty");
        let create = PathBuf::from(Self::KIND).join("create");
        fs::write(create, Self::UUID).unwrap();
        Some(Self)
    }
}

impl Drop for Card {
    /// The kernel waits until nobody has it; after a panic somebody may.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            fs::write(format!("/sys/bus/mdev/devices/{}/remove", Self::UUID), "1").unwrap();
        }
    }
}

/// While its line is masked the card's interrupts are lost, so that it is asked until it has had three.
#[test]
fn intx_of_a_mediated_device_reaches_the_guest_each_time() {
    let Some(_card) = Card::new() else { return };
    let code = Code::new()
        .enable()
        .serve_serial(LINE, PORT)
        .ask_serial(PORT, 3)
        .power_off();
    run_with(Card::UUID, &code).expect("the lab has KVM");
}
