use std::io::Write;
use std::os::fd::AsRawFd;

use nacre_protocol::vm::StopReason;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory;
use crate::test_kernel;
use crate::virtio::net;
use crate::virtio::rng::{DEVICE_TYPE, Rng};
use code::{COUNT, Code};

/// A machine that runs `code`, or `None` where there is no KVM.
fn machine(code: &[u8], vcpus: u8) -> Option<Machine> {
    Some(Machine::new(parts(code, vcpus)?).unwrap())
}

fn unnamed(file: File) -> NamedFile {
    NamedFile {
        file,
        path: "-".into(),
    }
}

/// What it is made of.
pub(crate) fn parts(code: &[u8], vcpus: u8) -> Option<Parts> {
    let Ok(kvm) = File::options().read(true).write(true).open("/dev/kvm") else {
        eprintln!("skipped: no /dev/kvm");
        return None;
    };
    let mut kernel = tempfile::tempfile().unwrap();
    kernel.write_all(&test_kernel::pvh(code)).unwrap();
    let initrd = tempfile::tempfile().unwrap();
    let ram = memory::allocate(32, false).unwrap();
    Some(Parts {
        kvm: kvm.into(),
        vcpus,
        memory: ram.clone(),
        ram,
        kernel: unnamed(kernel),
        initrd: unnamed(initrd),
        cmdline: String::new(),
        devices: Vec::new(),
        passthrough: None,
        pci_slots: 0,
        pci: PciOptions::default(),
        serial: None,
    })
}

/// Runs until the machine has ended.
fn end_of(machine: Machine) -> (Outcome, Exits) {
    let running = machine.start().unwrap();
    let outcome = await_end(&running);
    (outcome, running.stop())
}

/// Waits until the machine has ended.
pub(crate) fn await_end(running: &Running) -> Outcome {
    let stop = running.stop_handle();
    let mut event = libc::pollfd {
        fd: stop.event().as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd, ours.
    let ready = unsafe { libc::poll(&raw mut event, 1, 20_000) };
    assert_eq!(ready, 1, "the guest did not end the machine");
    stop.outcome().unwrap().clone()
}

/// `mov dx, port; mov al, value; out dx, al; hlt`
fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee, 0xf4]
}

#[test]
fn guest_ends_the_machine_each_way() {
    for (port, value, reason) in [
        (layout::PORT_SLEEP_CONTROL, 0x34, StopReason::Shutdown),
        (layout::PORT_RESET, 1, StopReason::Reboot),
        (layout::PORT_PVPANIC, 1, StopReason::Panic),
    ] {
        let Some(machine) = machine(&out(port, value), 1) else {
            return;
        };
        let (outcome, exits) = end_of(machine);
        assert_eq!(outcome, Outcome::Stopped(reason));
        assert_eq!(exits.port_writes, 1);
    }
}

#[test]
fn triple_fault_ends_the_machine() {
    // ud2, without an interrupt table
    let Some(machine) = machine(&[0x0f, 0x0b], 1) else {
        return;
    };
    let (outcome, _) = end_of(machine);
    assert_eq!(outcome, Outcome::Stopped(StopReason::TripleFault));
}

#[test]
fn running_vcpus_are_stopped() {
    // jmp to itself, with interrupts off, as PVH's entry has them; the second vCPU
    // waits to be started
    let Some(machine) = machine(&[0xeb, 0xfe], 2) else {
        return;
    };
    let stop = machine.stop_handle();
    let running = machine.start().unwrap();
    running.stop();
    assert_eq!(stop.outcome(), Some(&Outcome::Cancelled));
}

#[test]
fn guest_with_interrupts_off_can_be_asked_where_it_is() {
    const READY: u64 = COUNT + 8;
    let code = Code::new()
        .take_nmi(u8::try_from(layout::PORT_NMI).unwrap())
        .store(READY, 1)
        .wait_for(COUNT, 1)
        .expect(COUNT + 4, 0x40)
        .power_off();
    let Some(machine) = machine(&code, 2) else {
        return;
    };
    let running = machine.start().unwrap();
    let word = |address| running.memory().read_obj::<u32>(GuestAddress(address));
    while word(READY).unwrap() == 0 {
        std::thread::yield_now();
    }
    running.interrupt().unwrap();
    assert_eq!(await_end(&running), Outcome::Stopped(StopReason::Shutdown));
    running.stop();
}

#[test]
fn devices_come_and_go_while_vcpus_run() {
    // mov eax, [id of what is in slot 2]; mov eax, [its status]; jmp back
    let mut code = Vec::new();
    for address in [
        layout::ECAM_START + (2 << 15),
        PciRoot::bar_address(2) + 0x14,
    ] {
        code.push(0xa1);
        code.extend(u32::try_from(address).unwrap().to_le_bytes());
    }
    code.extend([0xeb, 0xf4]);
    let Some(mut parts) = parts(&code, 1) else {
        return;
    };
    parts.devices = vec![Box::new(Rng::new())];
    let running = Machine::new(parts).unwrap().start().unwrap();
    for _ in 0..3 {
        assert_eq!(running.add(Box::new(Rng::new())).unwrap(), 2);
        running.remove(DEVICE_TYPE, 2, true).unwrap();
        let error = running.remove(DEVICE_TYPE, 2, true).unwrap_err();
        let expected = "no virtio device of type 4 is in slot 2 of bus 0";
        assert_eq!(error.to_string(), expected);
    }
    let error = running.remove(net::DEVICE_TYPE, 1, true).unwrap_err();
    let expected = "no virtio device of type 1 is in slot 1 of bus 0";
    assert_eq!(error.to_string(), expected);
    assert_eq!(running.add(Box::new(Rng::new())).unwrap(), 2);
    running.remove(DEVICE_TYPE, 2, false).unwrap();
    assert_eq!(running.add(Box::new(Rng::new())).unwrap(), 3);
    while running.add(Box::new(Rng::new())).is_ok() {}
    let error = running.add(Box::new(Rng::new())).unwrap_err().to_string();
    assert!(error.starts_with("no slot of bus 0 is free"), "{error}");
    running.stop();
}

#[test]
fn impossible_machines_are_refused() {
    for (vcpus, expected) in [(0, "0 vCPUs"), (33, "33 vCPUs")] {
        let null = || File::open("/dev/null").unwrap();
        let ram = memory::allocate(32, false).unwrap();
        let parts = Parts {
            kvm: null().into(),
            vcpus,
            memory: ram.clone(),
            ram,
            kernel: unnamed(null()),
            initrd: unnamed(null()),
            cmdline: String::new(),
            devices: Vec::new(),
            passthrough: None,
            pci_slots: 0,
            pci: PciOptions::default(),
            serial: None,
        };
        let error = Machine::new(parts).err().unwrap().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
}

/// Before memory is pinned and devices are reset for nothing.
#[test]
fn devices_of_iommufd_are_no_peers() {
    let Some(mut parts) = parts(&[], 1) else {
        return;
    };
    parts.pci.peers = true;
    parts.passthrough = Some(Passthrough::of_iommufd(2));
    let error = Machine::new(parts).err().unwrap().to_string();
    assert!(error.starts_with("pci_peers in nacre.toml asks"), "{error}");
}

mod code;
mod lines;
mod passthrough;
