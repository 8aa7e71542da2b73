//! A device that comes to a guest that runs, and goes.

use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::vfio::hotplug::Job;
use crate::vfio::mock;

/// How often a device that comes and goes has served its guest.
const SERVED: u32 = RESULT + 4;

/// Slot control and status of the root port; status is the upper half.
const SLOT: u64 = PORT_CONFIG + 0x58;
const PRESENT: u32 = 1 << 22;
/// Its MSI capability.
const PORT_MSI: u64 = PORT_CONFIG + 0x7c;
/// Slot control: an interrupt for a change of presence or link.
const LISTEN: u32 = 0x1028;

/// A guest that hears of a device, drives it and waits for its end, so many times.
fn hot_plugged(times: u32) -> Vec<u8> {
    let apic = u64::from(layout::LAPIC);
    let received = apic + APIC_REQUESTED + u64::from(VECTOR / 32 * 16);
    let mut code = Code::new()
        .expect(CONFIG, u32::MAX)
        .store(apic + APIC_SPURIOUS, 0x1ff)
        .store(PORT_MSI + 4, layout::LAPIC)
        .store(PORT_MSI + 8, 0)
        .store(PORT_MSI + 12, VECTOR)
        .store(PORT_MSI, 1 << 16)
        .store(SLOT, LISTEN);
    for round in 0..times {
        code = code
            .wait_set(SLOT, PRESENT)
            .wait_set(received, 1 << (VECTOR % 32))
            .store(SLOT, LISTEN | 0x0108 << 16)
            .expect(CONFIG, 0x11e8_1234)
            .store(CONFIG + 0x10, u32::try_from(BAR).unwrap())
            .enable()
            .expect(BAR, 0x0100_00ed)
            .store(INSIDE.into(), 0xcafe_babe)
            .dma(INSIDE, BUFFER, 0)
            .dma(BUFFER, RESULT, TO_MEMORY)
            .expect(RESULT.into(), 0xcafe_babe)
            .store(RESULT.into(), 0)
            .store(SERVED.into(), round + 1)
            .wait_clear(SLOT, PRESENT)
            .store(SLOT, LISTEN | 0x0108 << 16)
            .expect(CONFIG, u32::MAX)
            .expect(BAR, u32::MAX);
    }
    code.power_off()
}

/// What became of a job.
fn done(running: &Running, job: Job) -> Result<u64, String> {
    let (tell, told) = std::sync::mpsc::channel();
    let worker = running.hot_plug().unwrap();
    worker.request(job, move |result| tell.send(result).unwrap());
    told.recv_timeout(Duration::from_secs(20)).unwrap()
}

/// Until a device has served the guest so many times, which looks no more then whether it is
/// done: of one that is gone it would never hear.
fn wait_until_served(running: &Running, times: u32) {
    let deadline = Instant::now() + Duration::from_secs(20);
    let address = GuestAddress(SERVED.into());
    while running.memory().read_obj::<u32>(address).unwrap() != times {
        assert!(Instant::now() < deadline, "not served {times} times");
        std::thread::yield_now();
    }
}

#[test]
fn device_comes_to_a_running_guest_and_goes_twice() {
    let Some(address) = bound(EDU) else { return };
    let Some(mut parts) = parts(&hot_plugged(2), 1) else {
        return;
    };
    parts.pci_slots = 1;
    let running = Machine::new(parts).unwrap().start().unwrap();
    for round in 0..2 {
        let device = DeviceNodes::of(&address).unwrap();
        let opened = open::by_groups(Path::new("/dev"), &[device]).unwrap();
        assert_eq!(done(&running, Job::Plug(vec![0], opened)), Ok(1));
        wait_until_served(&running, round + 1);
        assert_eq!(done(&running, Job::Unplug(vec![0])), Ok(1));
    }
    mock::wait_for(running.stop_handle().event());
    let stop = running.stop_handle().clone();
    running.stop();
    let outcome = Outcome::Stopped(StopReason::Shutdown);
    assert_eq!(stop.outcome(), Some(&outcome));
}
