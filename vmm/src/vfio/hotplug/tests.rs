use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use super::*;
use crate::bus::BusDevice;
use crate::layout::{GIB, WINDOW32_START};
use crate::pci::{Slot, Window};
use crate::stop::Outcome;
use crate::vfio::KnownToKvm;
use crate::vfio::access::Irq;
use crate::vfio::container::Container;
use crate::vfio::mock::{self, Mock};
use crate::vfio::tests::{WINDOW64, attached, config, write};
use crate::vm::{lines, test_vm, test_vm_with_lines, test_vm_without_memory};

/// Registers of a root port: of its PCI Express capability, which is the first.
const PORT_EXPRESS: u64 = 0x40;
const SLOT_STATUS: u64 = PORT_EXPRESS + 0x18;
const LINK_STATUS: u64 = PORT_EXPRESS + 0x10;
const PRESENT: u32 = 1 << 6;
const CHANGED: u32 = 1 << 3 | 1 << 8;

/// A machine with so many empty slots, or `None` where there is no KVM.
fn slots(count: u8) -> Option<Slots> {
    Some(slots_of(&test_vm()?, count))
}

fn slots_of(vm: &Arc<Vm>, count: u8) -> Slots {
    let mut placement = Placement::new(WINDOW64, 37);
    let ports = empty_ports(vm, 1, count, &mut placement).unwrap();
    let ports = ports.into_iter().map(|port| Slot::Port(Box::new(port)));
    let root = Arc::new(PciRoot::new(ports.collect()));
    root.map_config(vm).unwrap();
    let stop = Arc::new(Stop::new().unwrap());
    Slots::new(vm, &root, WINDOW64, 0, None, &stop)
}

fn status(slots: &Slots, bus: u64) -> u32 {
    config(&slots.root, 0, bus, SLOT_STATUS) >> 16
}

/// What a guest does: places BAR 0 where its port passes it on, and turns memory on.
fn configure(slots: &Slots, bus: u64) -> u64 {
    let base = config(&slots.root, 0, bus, 0x20) & 0xfff0;
    let bar = base << 16;
    write(&slots.root, bus, 0, 0x10, &bar.to_le_bytes());
    write(&slots.root, bus, 0, 0x04, &[6, 0]);
    u64::from(bar)
}

fn window(slots: &Slots) -> Window {
    Window {
        root: slots.root.clone(),
        start: WINDOW32_START,
    }
}

#[test]
fn a_device_comes_is_driven_and_goes() {
    let Some(mut slots) = slots(2) else { return };
    assert_eq!(config(&slots.root, 2, 0, 0), u32::MAX, "nothing there");
    assert_eq!(status(&slots, 2), 0);
    let mock = Arc::new(Mock::default());
    slots
        .show(&[1], attached(std::slice::from_ref(&mock)))
        .unwrap();
    assert_eq!(status(&slots, 2), PRESENT | CHANGED);
    assert_eq!(status(&slots, 1), 0);
    let link = config(&slots.root, 0, 2, LINK_STATUS) >> 16;
    assert_eq!(link, 1 << 13 | 8 << 4 | 4);
    assert_eq!(config(&slots.root, 2, 0, 0), 0x5678_1234);
    write(&slots.root, 0, 2, SLOT_STATUS + 2, &[0x08, 0x01]);
    assert_eq!(status(&slots, 2), PRESENT);

    let bar = configure(&slots, 2);
    let offset = bar - WINDOW32_START + 0x2800;
    window(&slots).write(offset, &[7, 7]);
    assert_eq!(mock.state().bar[0x2800..0x2802], [7, 7]);
    write(&slots.root, 2, 0, mock::MSIX as u64 + 3, &[0x80]);
    mock.calls();

    slots.unplug(&[1]).unwrap();
    assert_eq!(status(&slots, 2), CHANGED, "and none is present");
    assert_eq!(config(&slots.root, 0, 2, LINK_STATUS) >> 29, 0);
    assert_eq!(config(&slots.root, 2, 0, 0), u32::MAX);
    let mut data = [0; 2];
    window(&slots).read(offset, &mut data);
    assert_eq!(data, [0xff; 2]);
    assert_eq!(mock.calls(), ["Msix off"]);
    assert_eq!(mock.state().resets, 2, "before and after");
    assert_eq!(Arc::strong_count(&mock), 1, "nobody has it open");
}

#[test]
fn a_device_that_comes_has_its_rom_if_that_is_wanted() {
    for (wanted, mask) in [(false, 0), (true, 0xffff_f001)] {
        let Some(slots) = slots(1) else { return };
        let mut slots = slots.with_roms(wanted);
        let mock = Arc::new(Mock::default());
        slots.show(&[0], attached(&[mock])).unwrap();
        write(&slots.root, 1, 0, 0x30, &[0xff; 4]);
        assert_eq!(config(&slots.root, 1, 0, 0x30), mask);
    }
}

/// Whoever gives the devices to others must know.
#[test]
fn what_kvm_keeps_of_a_device_is_an_error() {
    let Some(mut slots) = slots(2) else { return };
    let mocks = [Arc::new(Mock::default()), Arc::new(Mock::default())];
    slots.show(&[0, 1], attached(&mocks)).unwrap();
    configure(&slots, 1);
    configure(&slots, 2);
    slots.vm.refuse_removals();
    let error = slots.unplug(&[0, 1]).unwrap_err().to_string();
    let start = "PCI device 0000:01:00.0: cannot take its registers from the guest: KVM: ";
    assert!(error.starts_with(start), "{error}");
    // The rest is done all the same.
    assert_eq!(
        (status(&slots, 1) & PRESENT, status(&slots, 2) & PRESENT),
        (0, 0)
    );
    for mock in &mocks {
        assert_eq!((mock.state().resets, Arc::strong_count(mock)), (2, 1));
    }
}

#[test]
fn files_that_kvm_keeps_are_an_error() {
    let Some(mut slots) = slots(1) else { return };
    let null = null();
    // No VFIO file, but KVM has to do with them from now on.
    let refused = slots.vm.attach_vfio([null.as_fd()]).unwrap_err();
    if !refused.what.contains("add or remove") {
        eprintln!("skipped: {refused}");
        return;
    }
    let mut attached = attached(&[Arc::new(Mock::default())]);
    attached.known = Some(KnownToKvm {
        vm: slots.vm.clone(),
        files: vec![null],
    });
    slots.show(&[0], attached).unwrap();
    let error = slots.unplug(&[0]).unwrap_err();
    assert!(matches!(error, VfioError::Vm(_)), "{error}");
    assert!(slots.plugged.is_empty());
}

/// What devices have of KVM's comes back: there are 4096 interrupt routes, and a slot
/// has one only from when there is something to tell.
#[test]
fn devices_come_and_go_without_end() {
    let Some(mut slots) = slots(1) else { return };
    assert_eq!(slots.vm.new_gsi().unwrap(), 0);
    for _ in 0..3 {
        let mock = Arc::new(Mock::default());
        slots
            .show(&[0], attached(std::slice::from_ref(&mock)))
            .unwrap();
        let bar = configure(&slots, 1);
        write(&slots.root, 1, 0, mock::MSIX as u64 + 3, &[0x80]);
        let control = bar - WINDOW32_START + mock::TABLE + 12;
        window(&slots).write(control, &[0; 4]);
        let mut is_there = mock.calls();
        assert_eq!(is_there.pop().as_deref(), Some("Msix 0+1 [0]"));
        let taken = slots.vm.new_gsi().unwrap();
        assert_eq!(taken, 2, "the device has one");
        slots.unplug(&[0]).unwrap();
        let again = slots.vm.new_gsi().unwrap();
        assert_eq!(again, 1, "and not any more");
        for gsi in [taken, again] {
            slots.vm.free_gsi(gsi);
        }
    }
}

/// As those of a group do, which may reach each other.
#[test]
fn devices_that_go_together_are_quiet_before_one_is_reset() {
    let Some(mut slots) = slots(2) else { return };
    let mocks = [Arc::new(Mock::default()), Arc::new(Mock::default())];
    slots.show(&[0, 1], attached(&mocks)).unwrap();
    let journal = Mock::share_journal(&mocks);
    slots.unplug(&[0, 1]).unwrap();
    assert_eq!(
        *journal.lock().unwrap(),
        ["quiet", "quiet", "reset", "reset"]
    );
}

#[test]
fn device_that_goes_leaves_its_line() {
    let Some(vm) = test_vm_with_lines() else {
        return;
    };
    let mut slots = slots_of(&vm, 2);
    let mock = Arc::new(Mock::default());
    slots
        .show(&[1], attached(std::slice::from_ref(&mock)))
        .unwrap();
    configure(&slots, 2);
    let event = mock.event(Irq::Intx, 0).unwrap();
    let line = lines::OF_PCI.start + 1;
    assert!(vm.add_irqfd(&event, line).is_err(), "KVM has it already");
    slots.unplug(&[1]).unwrap();
    vm.add_irqfd(&event, line).unwrap();
    assert!(!mock.state().was_loose);
}

fn has_vfio(vm: &Vm) -> bool {
    let has_it = vm.attach_vfio(std::iter::empty()).is_ok();
    if !has_it {
        eprintln!("skipped: KVM has no VFIO");
    }
    has_it
}

fn null() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

/// Whose container and device are neither.
fn no_device() -> Passthrough {
    Passthrough {
        container: Container::Groups {
            container: null(),
            groups: Vec::new(),
        },
        devices: vec![("0000:01:00.0".into(), null())],
    }
}

/// Memory that is mapped for nobody would stay pinned.
#[test]
fn an_address_space_is_kept_only_for_devices_that_can_be_used() {
    let Some(vm) = test_vm_without_memory() else {
        return;
    };
    if !has_vfio(&vm) {
        return;
    }
    let mut space = None;
    let attached = no_device().attach(&vm, &mut space);
    let error = attached.err().unwrap().to_string();
    let mapped = "PCI device 0000:01:00.0: cannot ask what it is: ";
    assert!(error.starts_with(mapped) && space.is_none(), "{error}");
}

/// What comes later reaches what the devices reach that are there from the start: the memory, and with
/// `pci_peers` their BARs.
#[test]
fn a_device_that_comes_joins_the_address_space_of_the_others() {
    let [Some(first), Some(second)] = [slots(1), slots(1)] else {
        return;
    };
    if !has_vfio(&first.vm) {
        return;
    }
    let plug = |mut slots: Slots, space: Option<AddressSpace>| {
        (slots.space_stays, slots.space) = (space.is_some(), space);
        let error = slots.plug(&[0], no_device()).unwrap_err().to_string();
        (error, slots.space.is_some())
    };
    let (error, stays) = plug(first, Some(AddressSpace::Ioas(null(), 1)));
    let joins = "PCI device 0000:01:00.0: cannot bind it to /dev/iommu: ";
    assert!(error.starts_with(joins) && stays, "{error}");
    let (error, stays) = plug(second, None);
    assert!(error.starts_with("mapping 32 MiB") && !stays, "{error}");
}

#[test]
fn what_does_not_fit_leaves_nothing() {
    let Some(mut slots) = slots(1) else { return };
    let mock = Arc::new(Mock::default());
    mock.state().sizes[2] = 128 * GIB;
    let error = slots
        .show(&[0], attached(std::slice::from_ref(&mock)))
        .unwrap_err();
    let expected = "PCI device 0000:01:00.0: its 64-bit BARs need 128 GiB, and each empty slot of \
                    the pod has 64 GiB for them: 64 GiB too little";
    assert_eq!(error.to_string(), expected);
    assert_eq!((status(&slots, 1), Arc::strong_count(&mock)), (0, 1));
    assert!(slots.unplug(&[0]).is_err());
}

#[test]
fn slots_are_one_device_s_and_only_those_there_are() {
    let Some(mut slots) = slots(2) else { return };
    let mocks = [Arc::new(Mock::default()), Arc::new(Mock::default())];
    slots.show(&[0], attached(&mocks[..1])).unwrap();
    for wrong in [&[0][..], &[2], &[], &[1, 0]] {
        let error = slots.show(wrong, attached(&mocks[1..])).unwrap_err();
        assert!(matches!(error, VfioError::Slot(_)), "{error}");
    }
    assert_eq!(status(&slots, 2), 0);
    assert_eq!(Arc::strong_count(&mocks[1]), 1);
    assert!(slots.unplug(&[0, 1]).is_err(), "they did not come together");
    assert!(mocks[0].signal(Irq::Request, 0));
}

#[test]
fn the_worker_tells_what_became_of_a_job() {
    let Some(slots) = slots(1) else { return };
    let (root, stop) = (slots.root.clone(), slots.stop.clone());
    let worker = Worker::start(slots).unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    let answer = |job| {
        let tell = tell.clone();
        worker.request(job, move |result| tell.send(result).unwrap());
        told.recv().unwrap().unwrap_err()
    };
    let text = "slot 0 for PCI devices is not there, or not as it should be";
    assert_eq!(answer(Job::Unplug(vec![0])), text);
    stop.set(Outcome::Cancelled);
    assert_eq!(answer(Job::Unplug(vec![0])), "the machine has ended");
    let finished = worker.stop().unwrap();
    root.reset();
    finished.close();
}
