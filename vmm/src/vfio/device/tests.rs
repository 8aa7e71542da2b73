use super::*;
use crate::layout::{GIB, WINDOW32_PORTS};
use crate::vfio::access::Irq;
use crate::vfio::mock::{self, Mock};
use crate::vm::lines::OF_PCI;
use crate::vm::test_vm;

const WINDOW64: Option<(u64, u64)> = Some((64 * GIB, 128 * GIB));
const BAR0: u64 = WINDOW32_PORTS;
const COMMAND: usize = 4;
const LINE: u32 = OF_PCI.start;
/// Places of the mock's BARs.
const ADDRESSES: [u64; 4] = [BAR0, 64 * GIB, BAR0 + 0x10_0000, 0x1000];

/// The mock behind a port, or `None` where there is no KVM.
fn function() -> Option<(VfioPci, Arc<Mock>)> {
    let mock = Arc::new(Mock::default());
    Some((function_in(&test_vm()?, &mock), mock))
}

fn function_in(vm: &Arc<Vm>, mock: &Arc<Mock>) -> VfioPci {
    let endpoint = Endpoint::open("0000:01:00.0", mock.clone()).unwrap();
    VfioPci::new(vm, endpoint, LINE, &ADDRESSES, WINDOW64).unwrap()
}

/// Where the mapped parts of BAR 0 are.
fn mapped(function: &VfioPci) -> Vec<Option<u64>> {
    function.lock().map.addresses(0)
}

#[test]
fn device_is_reset_before_it_is_looked_at() {
    let mock = Arc::new(Mock::default());
    let endpoint = Endpoint::open("0000:01:00.0", mock.clone()).unwrap();
    assert!(endpoint.was_reset());
    assert_eq!(mock.state().resets, 1);
    assert_eq!(endpoint.requests().len(), 4);
    mock.state().is_gone = true;
    let error = Endpoint::open("0000:01:00.0", mock).err().unwrap();
    let start = "PCI device 0000:01:00.0: cannot read its configuration space: ";
    assert!(error.to_string().starts_with(start), "{error}");
}

/// As drivers of mediated devices have it.
#[test]
fn configuration_space_is_read_as_far_as_there_is_one() {
    let mock = Arc::new(Mock::default());
    mock.state().config.truncate(0xff);
    let endpoint = Endpoint::open("0000:01:00.0", mock).unwrap();
    assert_eq!(endpoint.requests().len(), 4);
}

#[test]
fn registers_are_in_the_guest_while_memory_space_is_on() {
    let Some((function, mock)) = function() else {
        return;
    };
    assert_eq!(function.bar_at(BAR0), None);
    assert_eq!(mapped(&function), [None, None]);
    function.config_write(COMMAND, &[6, 0]);
    assert_eq!(function.bar_at(BAR0 + 0x7fff), Some((0, 0x7fff)));
    assert_eq!(function.bar_at(64 * GIB), Some((1, 0)));
    assert_eq!(function.bar_at(BAR0 + 0x8000), None);
    assert_eq!(mapped(&function), [Some(BAR0), Some(BAR0 + 0x4000)]);
    // Moved, then over memory, where it must not be.
    function.config_write(0x10, &0xd000_0000_u32.to_le_bytes());
    assert_eq!(mapped(&function)[0], Some(0xd000_0000));
    function.config_write(0x10, &0x10_0000_u32.to_le_bytes());
    assert_eq!(mapped(&function), [None, None]);
    function.config_write(COMMAND, &[0, 0]);
    assert_eq!(function.bar_at(0x10_0000), None);
    assert_eq!(mock.state().resets, 1);
}

#[test]
fn ports_and_addresses_are_told_apart() {
    let Some((function, _)) = function() else {
        return;
    };
    assert_eq!(function.io_bar_at(0x1000), None);
    function.config_write(COMMAND, &[7, 0]);
    assert_eq!(function.io_bar_at(0x101f), Some((3, 0x1f)));
    assert_eq!(function.io_bar_at(0x1020), None);
    assert_eq!(function.bar_at(0x1000), None);
    assert_eq!(function.io_bar_at(BAR0), None);
    function.withdraw();
    assert_eq!(function.io_bar_at(0x1000), None);
}

#[test]
fn rom_is_read_once_and_never_written() {
    let Some(vm) = test_vm() else { return };
    let mock = Arc::new(Mock::default());
    mock.state().config[COMMAND] = 0;
    let endpoint = Endpoint::open("0000:01:00.0", mock.clone()).unwrap();
    let endpoint = endpoint.with_rom();
    let rom = BAR0 + 0x20_0000;
    let addresses = [&ADDRESSES[..], &[rom]].concat();
    let before = std::mem::take(&mut mock.state().rom);
    let function = VfioPci::new(&vm, endpoint, LINE, &addresses, WINDOW64).unwrap();
    function.config_write(COMMAND, &[6, 0]);
    assert_eq!(function.bar_at(rom), None, "off");
    function.config_write(0x30, &[1]);
    assert_eq!(function.bar_at(rom + 0xffc), Some((4, 0xffc)));
    function.bar_write(4, 0, &[9; 4]);
    for (offset, expected) in [(0, &before[..4]), (0xffe, &[0xfe, 0xff, 0xff, 0xff][..])] {
        let mut data = [0; 4];
        function.bar_read(4, offset, &mut data);
        assert_eq!(data, expected);
    }
}

#[test]
fn rom_that_cannot_be_had_is_not_shown() {
    let mock = Arc::new(Mock::default());
    let requests = |size, is_gone| {
        mock.state().rom.resize(size, 0);
        let endpoint = Endpoint::open("0000:01:00.0", mock.clone()).unwrap();
        mock.state().is_gone = is_gone;
        let endpoint = endpoint.with_rom();
        mock.state().is_gone = false;
        endpoint.requests().len()
    };
    assert_eq!(requests(0x1000, false), 5);
    assert_eq!(requests(0x1000, true), 4, "it cannot be read");
    // None, and sizes that no ROM has.
    for size in [0, 0x400, 0x1800, 32 << 20] {
        assert_eq!(requests(size, false), 4, "{size:#x}");
    }
    assert_eq!(requests(16 << 20, false), 5);
}

#[test]
fn others_reach_what_the_guest_has_mapped() {
    let Some((function, _)) = function() else {
        return;
    };
    let Reachable { address, ranges } = function.reachable(&ADDRESSES);
    assert_eq!(address, "0000:01:00.0");
    let places: Vec<_> = ranges.iter().map(|range| (range.iova, range.len)).collect();
    assert_eq!(places, [(BAR0, 0x2000), (BAR0 + 0x4000, 0x4000)]);
    assert!(ranges.iter().all(|range| range.host != 0));
}

#[test]
fn only_what_the_device_says_can_be_mapped_is_mapped() {
    let Some(vm) = test_vm() else { return };
    let mock = Arc::new(Mock::default());
    // In front of the table, over it and its pending bits, and after them.
    mock.state().mappable = vec![(0, 0x1000), (0x1000, 0x4000), (0x6000, 0x1000)];
    let function = function_in(&vm, &mock);
    let areas = [
        (0, 0, 0x1000),
        (0, 0x1000, 0x1000),
        (0, 0x4000, 0x1000),
        (0, 0x6000, 0x1000),
    ];
    assert_eq!(mock.state().mapped, areas);
    function.config_write(COMMAND, &[6, 0]);
    let addresses = areas.map(|(_, offset, _)| Some(BAR0 + offset));
    assert_eq!(mapped(&function), addresses);
    // The rest comes to us, and goes to the device.
    function.bar_write(0, 0x5000, &[7]);
    assert_eq!(mock.state().bar[0x5000], 7);
}

#[test]
fn trapped_accesses_reach_the_device_but_for_the_table() {
    let Some((function, mock)) = function() else {
        return;
    };
    function.bar_write(0, 0x2ff0, &[1, 2, 3, 4]);
    assert_eq!(mock.state().bar[0x2ff0..0x2ff4], [1, 2, 3, 4]);
    let mut data = [0; 4];
    function.bar_read(0, 0x2ff0, &mut data);
    assert_eq!(data, [1, 2, 3, 4]);
    function.bar_write(0, mock::TABLE + 8, &[0x41, 0, 0, 0]);
    function.bar_write(0, mock::PENDING, &[0xff; 8]);
    assert!(
        mock.state().bar[0x2000..0x2100]
            .iter()
            .all(|byte| *byte == 0)
    );
    assert!(
        mock.state().bar[0x3000..0x3008]
            .iter()
            .all(|byte| *byte == 0)
    );
    function.bar_read(0, mock::TABLE + 8, &mut data);
    assert_eq!(data, [0x41, 0, 0, 0]);
    // Past the end, and a device that is gone: ones.
    function.bar_read(0, 0x7ffe, &mut data);
    assert_eq!(data, [0xff; 4]);
    mock.state().is_gone = true;
    function.bar_read(0, 0, &mut data);
    assert_eq!(data, [0xff; 4]);
    function.bar_read(9, 0, &mut data);
    function.bar_write(9, 0, &data);
}

/// Writes address, data and control of a vector's entry.
fn set_vector(function: &VfioPci, vector: u64, control: u32) {
    let entry = mock::TABLE + vector * 16;
    function.bar_write(0, entry, &0xfee0_0000_u64.to_le_bytes());
    function.bar_write(0, entry + 8, &0x41_u32.to_le_bytes());
    function.bar_write(0, entry + 12, &control.to_le_bytes());
}

#[test]
fn vectors_are_turned_on_together_and_heard_when_unmasked() {
    let Some((function, mock)) = function() else {
        return;
    };
    let control = |value: u8| function.config_write(mock::MSIX + 3, &[value]);
    set_vector(&function, 3, 0);
    assert_eq!(mock.calls(), [""; 0], "MSI-X is off");
    // As Linux does: enabled with all masked, then unmasked.
    control(0xc0);
    assert_eq!(mock.calls(), ["Msix 0+16 [3]"]);
    set_vector(&function, 5, 0);
    control(0x80);
    assert_eq!(mock.calls(), ["Msix 5+1 [5]"]);
    set_vector(&function, 5, 1);
    set_vector(&function, 5, 0);
    assert_eq!(mock.calls(), [""; 0], "its event stays where it is");
    assert!(mock.signal(Irq::Msix, 5) && !mock.signal(Irq::Msix, 6));
    control(0);
    assert_eq!(mock.calls(), ["Msix off"]);
    control(0x80);
    assert_eq!(mock.calls(), ["Msix 0+16 [3, 5]"]);
}

#[test]
fn interrupt_of_a_masked_vector_is_pending() {
    let Some((function, mock)) = function() else {
        return;
    };
    let pending = || {
        let mut bits = [0; 8];
        function.bar_read(0, mock::PENDING, &mut bits);
        u64::from_le_bytes(bits)
    };
    set_vector(&function, 2, 0);
    function.config_write(mock::MSIX + 3, &[0x80]);
    set_vector(&function, 2, 1);
    assert!(mock.signal(Irq::Msix, 2));
    assert_eq!(pending(), 1 << 2);
    set_vector(&function, 2, 0);
    assert_eq!(pending(), 0, "delivered");
}

#[test]
fn msi_has_as_many_vectors_as_the_guest_enables() {
    let Some((function, mock)) = function() else {
        return;
    };
    function.config_write(mock::MSI + 4, &0xfee0_1000_u32.to_le_bytes());
    function.config_write(mock::MSI + 12, &[0x40, 0]);
    assert_eq!(mock.calls(), [""; 0]);
    function.config_write(mock::MSI + 2, &[1 | 1 << 4, 0]);
    assert_eq!(mock.calls(), ["Msi 0+2 [0, 1]"]);
    function.config_write(mock::MSI + 12, &[0x50, 0]);
    assert_eq!(mock.calls(), [""; 0], "only the route changes");
    // More than it has: all it has.
    function.config_write(mock::MSI + 2, &[1 | 7 << 4, 0]);
    assert_eq!(
        mock.calls(),
        ["Msi off", "Msi 0+8 [0, 1, 2, 3, 4, 5, 6, 7]"]
    );
    function.config_write(mock::MSI + 2, &[0, 0]);
    assert_eq!(mock.calls(), ["Msi off"]);
}

/// What was not turned on as a whole is turned off all the same, or the line could not be turned on.
#[test]
fn msi_of_fewer_vectors_is_turned_off() {
    let Some((function, mock)) = function() else {
        return;
    };
    mock.state().free_vectors = 1;
    function.config_write(mock::MSI + 2, &[1 | 1 << 4, 0]);
    assert_eq!(mock.calls(), ["Msi 0+2 has 1", "Msi 0+1 [0]"]);
    function.config_write(mock::MSI + 2, &[0, 0]);
    assert_eq!(mock.calls(), ["Msi off"]);
}

#[test]
fn host_with_fewer_vectors_turns_on_those_it_has() {
    let Some((function, mock)) = function() else {
        return;
    };
    mock.state().free_vectors = 4;
    set_vector(&function, 3, 0);
    set_vector(&function, 5, 0);
    let mut state = function.lock();
    let State {
        config, interrupts, ..
    } = &mut *state;
    config.write(&*mock, mock::MSIX + 3, &[0x80]).unwrap();
    let error = interrupts
        .config_changed(config, &function.device)
        .unwrap_err();
    let text = "the host has only 4 of 16 interrupt vectors for it";
    assert_eq!(error.to_string(), text);
    assert_eq!(mock.calls(), ["Msix 0+16 has 4", "Msix 0+4 [3]"]);
    // Vector 5 is asked for alone whenever there is a chance.
    let error = interrupts
        .config_changed(config, &function.device)
        .unwrap_err();
    assert!(error.to_string().starts_with("Msix vector 5: "), "{error}");
    mock.state().free_vectors = 16;
    interrupts.config_changed(config, &function.device).unwrap();
    assert_eq!(mock.calls(), ["Msix 5+1 [5]"]);
    assert!(mock.signal(Irq::Msix, 3) && mock.signal(Irq::Msix, 5));
}

#[test]
fn vector_that_is_not_armed_does_not_keep_the_others_from_it() {
    let Some((function, mock)) = function() else {
        return;
    };
    function.config_write(mock::MSIX + 3, &[0xc0]);
    mock.state().refused_vector = Some(5);
    for vector in [5, 6] {
        set_vector(&function, vector, 0);
    }
    assert_eq!(mock.calls(), ["Msix 0+16 []", "Msix 6+1 [6]"]);
    mock.state().refused_vector = None;
    function.config_write(mock::MSIX + 3, &[0x80]);
    assert_eq!(mock.calls(), ["Msix 5+1 [5]"]);
}

#[test]
fn what_failed_is_done_with_the_next_write() {
    let Some((function, mock)) = function() else {
        return;
    };
    let poke = || function.config_write(0x0c, &[8]);
    mock.state().is_gone = true;
    function.config_write(mock::MSI + 2, &[1, 0]);
    assert_eq!(mock.calls(), [""; 0]);
    mock.state().is_gone = false;
    poke();
    assert_eq!(mock.calls(), ["Msi 0+1 [0]"]);
    mock.state().stuck = Some(Irq::Msi);
    function.config_write(mock::MSI + 2, &[0, 0]);
    mock.state().stuck = None;
    poke();
    poke();
    assert_eq!(mock.calls(), ["Msi off", "Msi off"]);
}

#[test]
fn devices_share_the_routes_of_kvm_by_what_their_guest_uses() {
    let Some(vm) = test_vm() else { return };
    // With 256 vectors of MSI-X each: far more than there are routes.
    let functions: Vec<_> = (0..32)
        .map(|_| {
            let mock = Arc::new(Mock::default());
            mock.state().config[mock::MSIX + 2] = 0xff;
            (function_in(&vm, &mock), mock)
        })
        .collect();
    for (function, mock) in &functions {
        function.config_write(mock::MSIX + 3, &[0x80]);
        set_vector(function, 255, 0);
        assert_eq!(mock.calls(), ["Msix 0+256 []", "Msix 255+1 [255]"]);
    }
    assert_eq!(vm.new_gsi().unwrap(), 32);
    // When a guest has used all up, what has a route keeps it and nothing else breaks.
    while vm.new_gsi().is_ok() {}
    let (function, mock) = &functions[0];
    set_vector(function, 7, 0);
    set_vector(function, 255, 1);
    set_vector(function, 255, 0);
    assert_eq!(mock.calls(), [""; 0]);
    assert!(mock.signal(Irq::Msix, 255) && !mock.signal(Irq::Msix, 7));
    let mut state = function.lock();
    let State {
        config, interrupts, ..
    } = &mut *state;
    let error = interrupts
        .config_changed(config, &function.device)
        .unwrap_err();
    let text = error.to_string();
    let start = "Msix vector 7: KVM: find a free interrupt route: all ";
    assert!(text.starts_with(start), "{text}");
    interrupts.stop(&**mock).unwrap();
    assert_eq!(mock.calls(), ["Msix off"]);
}

#[test]
fn stopped_device_is_silent_and_reset() {
    let Some((function, mock)) = function() else {
        return;
    };
    set_vector(&function, 0, 0);
    function.config_write(COMMAND, &[6, 0]);
    function.config_write(mock::MSIX + 3, &[0x80]);
    mock.calls();
    function.quiesce();
    function.reset();
    assert_eq!(mock.calls(), ["Msix off"]);
    let state = mock.state();
    assert_eq!(state.config_writes.last(), Some(&(4, vec![0, 4])));
    assert_eq!(state.resets, 2);
}

mod line;
