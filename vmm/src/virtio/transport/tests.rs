use std::sync::atomic::AtomicUsize;

use crate::vm::test_vm;

use super::*;
use crate::pci::registers::{BAR0, COMMAND};
use crate::virtio::{VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1};

const BAR: u64 = layout::WINDOW32_START;

/// What the device was told.
#[derive(Default)]
struct Log {
    activation: Mutex<Option<Activation>>,
    resets: AtomicUsize,
}

struct Fake(Arc<Log>);

impl VirtioDevice for Fake {
    fn device_type(&self) -> u16 {
        2
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![256, 64]
    }
    fn features(&self) -> u64 {
        VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xa0 | u8::try_from(offset).unwrap());
    }
    fn config_generation(&self) -> u8 {
        0x5a
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        *self.0.activation.lock().unwrap() = Some(activation);
        Ok(())
    }
    fn reset(&mut self) {
        self.0.activation.lock().unwrap().take();
        self.0.resets.fetch_add(1, Ordering::Relaxed);
    }
}

/// A function with the fake device, or `None` where there is no KVM.
fn function() -> Option<(VirtioPci, Arc<Log>)> {
    let vm = test_vm()?;
    let log = Arc::new(Log::default());
    let device = Box::new(Fake(log.clone()));
    Some((VirtioPci::new(&vm, device, BAR).unwrap(), log))
}

fn config_u32(function: &VirtioPci, register: usize) -> u32 {
    let mut bytes = [0; 4];
    function.config_read(register, &mut bytes);
    u32::from_le_bytes(bytes)
}

fn write16(function: &VirtioPci, offset: u64, value: u16) {
    function.bar_write(offset, &value.to_le_bytes());
}

fn write32(function: &VirtioPci, offset: u64, value: u32) {
    function.bar_write(offset, &value.to_le_bytes());
}

fn status(function: &VirtioPci) -> u8 {
    let mut byte = [0];
    function.bar_read(0x14, &mut byte);
    byte[0]
}

/// A driver, as far as `DRIVER_OK`, with queue 0 at `desc`.
fn drive(function: &VirtioPci, desc: u32) {
    function.config_write(COMMAND, &[6, 0]);
    function.bar_write(0x14, &[3]);
    write32(function, 0x08, 0);
    write32(function, 0x0c, 1 << 29);
    write32(function, 0x08, 1);
    write32(function, 0x0c, 1);
    function.bar_write(0x14, &[0xb]);
    write16(function, 0x16, 0);
    write16(function, 0x18, 16);
    write16(function, 0x1a, 1);
    for (offset, address) in [(0x20, desc), (0x28, desc + 0x1000), (0x30, desc + 0x2000)] {
        write32(function, offset, address);
    }
    write16(function, 0x1c, 1);
    function.bar_write(0x14, &[0xf]);
}

#[test]
fn driver_finds_the_structures() {
    let Some((function, _)) = function() else {
        return;
    };
    assert_eq!(config_u32(&function, 0), 0x1042_1af4);
    let mut kinds = Vec::new();
    let mut at = config_u32(&function, 0x34) & 0xff;
    while at != 0 {
        let header = config_u32(&function, at as usize);
        kinds.push((header & 0xff, header >> 24));
        at = header >> 8 & 0xff;
    }
    let vendor = kinds
        .iter()
        .filter(|(id, _)| *id == 9)
        .map(|(_, kind)| *kind);
    assert_eq!(vendor.collect::<Vec<_>>(), [1, 3, 4, 2, 5]);
    assert_eq!(kinds[0].0, 0x11);
}

#[test]
fn device_is_activated_with_its_queues_and_reset() {
    let Some((function, log)) = function() else {
        return;
    };
    drive(&function, 0x10_0000);
    assert_eq!(status(&function), 0xf);
    {
        let guard = log.activation.lock().unwrap();
        let activation = guard.as_ref().unwrap();
        assert_eq!(activation.features, VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX);
        assert!(activation.queues[0].is_some());
        assert!(activation.queues[1].is_none());
    }
    function.bar_write(0x14, &[0]);
    assert_eq!(status(&function), 0);
    assert_eq!(log.resets.load(Ordering::Relaxed), 1);
    drive(&function, 0x10_0000);
    assert!(log.activation.lock().unwrap().is_some(), "activated again");
}

#[test]
fn the_generation_of_the_configuration_is_the_device_s() {
    let Some((function, _)) = function() else {
        return;
    };
    let mut generation = [0];
    function.bar_read(0x15, &mut generation);
    assert_eq!(generation, [0x5a]);
}

#[test]
fn queue_outside_memory_needs_reset() {
    let Some((function, log)) = function() else {
        return;
    };
    drive(&function, 0x7000_0000);
    assert_eq!(status(&function), 0x4f);
    assert!(log.activation.lock().unwrap().is_none());
}

#[test]
fn device_without_a_route_for_its_interrupt_needs_reset() {
    let Some((function, log)) = function() else {
        return;
    };
    let vm = function.lock().vm.clone();
    while vm.new_gsi().is_ok() {}
    drive(&function, 0x10_0000);
    assert_eq!(status(&function), 0x4f);
    assert!(log.activation.lock().unwrap().is_none());
}

#[test]
fn notification_that_reaches_us_signals_the_queue() {
    let Some((function, log)) = function() else {
        return;
    };
    write16(&function, 0x3000, 0);
    drive(&function, 0x10_0000);
    write16(&function, 0x3000, 0);
    write16(&function, 0x3004, 1);
    write16(&function, 0x3ffc, 0);
    let guard = log.activation.lock().unwrap();
    let queue = guard.as_ref().unwrap().queues[0].as_ref().unwrap();
    assert_eq!(queue.kick.read().unwrap(), 1);
}

#[test]
fn bar_moves_with_its_notifications() {
    let Some((function, _log)) = function() else {
        return;
    };
    assert_eq!(function.bar_address(), None);
    drive(&function, 0x10_0000);
    assert_eq!(function.bar_address(), Some(BAR));
    function.config_write(BAR0, &[0xff; 4]);
    function.config_write(BAR0, &0xd000_0000_u32.to_le_bytes());
    assert_eq!(function.bar_address(), Some(0xd000_0000));
    assert_eq!(function.lock().attached, Some(0xd000_0000));
    function.config_write(COMMAND, &[0, 0]);
    assert_eq!(function.bar_address(), None);
    assert_eq!(function.lock().attached, None);
}

#[test]
fn device_that_is_taken_out_is_stopped_and_leaves_what_it_had() {
    let Some((function, log)) = function() else {
        return;
    };
    function.map_config(layout::ECAM_START).unwrap();
    drive(&function, 0x10_0000);
    let vm = function.lock().vm.clone();
    // They are handed out from the first one on.
    let first = test_vm().unwrap().new_gsi().unwrap();
    assert!(vm.new_gsi().unwrap() > first);
    function.retire().unwrap();
    assert_eq!(log.resets.load(Ordering::Relaxed), 1);
    let page = vm.add_read_only_page(layout::ECAM_START).unwrap();
    vm.remove_read_only_page(&page).unwrap();
    assert_eq!(vm.new_gsi().unwrap(), first);
}

#[test]
fn configuration_is_reached_through_config_space() {
    let Some((function, _)) = function() else {
        return;
    };
    let window = function.lock().window;
    function.config_write(window + CAP_OFFSET, &0x2004u32.to_le_bytes());
    function.config_write(window + CAP_LENGTH, &2u32.to_le_bytes());
    assert_eq!(config_u32(&function, window + CAP_DATA) & 0xffff, 0xa4a4);
    function.config_write(window + CAP_OFFSET, &0x14u32.to_le_bytes());
    function.config_write(window + CAP_LENGTH, &1u32.to_le_bytes());
    function.config_write(window + CAP_DATA, &[1]);
    assert_eq!(status(&function), 1);
    // Misaligned, past the end, too long: nothing happens.
    for (offset, len) in [(1u32, 4u32), (0x8000, 1), (u32::MAX, 1), (0, 8)] {
        function.config_write(window + CAP_OFFSET, &offset.to_le_bytes());
        function.config_write(window + CAP_LENGTH, &len.to_le_bytes());
        function.config_write(window + CAP_DATA, &[0xff; 4]);
        config_u32(&function, window + CAP_DATA);
    }
    assert_eq!(status(&function), 1);
}

#[test]
fn page_the_guest_reads_follows_configuration_space() {
    let Some((function, _log)) = function() else {
        return;
    };
    function.map_config(layout::ECAM_START).unwrap();
    let shown = || {
        let function = function.lock();
        let page = function.page.as_ref()?;
        Some(page.page().bytes())
    };
    assert_eq!(shown().unwrap()[..2], VENDOR.to_le_bytes());
    function.config_write(BAR0, &[0xff; 4]);
    let bar = config_u32(&function, BAR0).to_le_bytes();
    assert_eq!(shown().unwrap()[BAR0..BAR0 + 4], bar);

    // Reads of the PCI configuration access have effects: no page any more.
    let window = function.lock().window;
    function.config_write(window + CAP_LENGTH, &[4]);
    assert!(shown().is_none());
}
