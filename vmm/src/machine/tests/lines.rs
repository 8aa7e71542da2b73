//! Interrupt lines: KVM's alone, and with "edu" of QEMU in the lab.

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::code::*;
use super::passthrough::{RAISE, run};
use super::*;
use crate::vfio::mock;
use crate::vm::{MsiRoute, lines};

/// What "edu" is told when its interrupt was served.
const ACKNOWLEDGE: u64 = BAR + 0x64;

/// Whoever raised a line hears when the guest has served it, and raises it again.
#[test]
fn line_is_raised_until_the_guest_has_served_it() {
    let line = lines::of_bus(1);
    let code = Code::new().serve(line, &[]).wait_for(COUNT, 2).power_off();
    let Some(mut parts) = parts(&code, 1) else {
        return;
    };
    parts.pci_slots = 1;
    let running = Machine::new(parts).unwrap().start().unwrap();
    let [raise, again] = [(), ()].map(|()| EventFd::new(EFD_NONBLOCK).unwrap());
    running.vm.add_line(&raise, &again, line).unwrap();
    // KVM is told all routes again with each new one.
    let message = MsiRoute {
        address: layout::LAPIC.into(),
        data: 0x42,
    };
    running
        .vm
        .route(running.vm.new_gsi().unwrap(), message)
        .unwrap();
    for _ in 0..2 {
        raise.write(1).unwrap();
        mock::wait_for(&again);
        again.read().unwrap();
    }
    mock::wait_for(running.stop_handle().event());
    let stop = running.stop_handle().clone();
    running.stop();
    let outcome = Outcome::Stopped(StopReason::Shutdown);
    assert_eq!(stop.outcome(), Some(&outcome));
}

/// A second interrupt comes only if the host has unmasked the line after the first.
#[test]
fn intx_reaches_the_guest_each_time() {
    let code = Code::new()
        .enable()
        .serve(lines::of_bus(1), &[(ACKNOWLEDGE, 1)])
        .store(BAR + RAISE, 1)
        .wait_for(COUNT, 1)
        .store(BAR + RAISE, 1)
        .wait_for(COUNT, 2)
        .power_off();
    let Some(exits) = run(&code) else { return };
    let counts = (exits.mmio_reads, exits.mmio_writes);
    assert_eq!(counts, (0, 2), "configuration only");
}
