//! A device's interrupt line.

use proptest::prelude::*;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::vm::test_vm_with_lines;

const LINE_ON: [&str; 2] = ["Intx 0+1 [0]", "Intx unmasked by an event"];

/// One of a machine with interrupt lines.
fn function_with_line() -> Option<(VfioPci, Arc<Mock>)> {
    let mock = Arc::new(Mock::default());
    Some((function_in(&test_vm_with_lines()?, &mock), mock))
}

#[test]
fn line_is_on_while_the_guest_uses_the_device_without_messages() {
    let Some((function, mock)) = function_with_line() else {
        return;
    };
    let command = || mock.state().command();
    assert_eq!(command(), 0x403, "the guest does not use it");
    function.config_write(COMMAND, &[6, 0]);
    assert_eq!(mock.calls(), LINE_ON);
    assert_eq!(command(), 7);
    assert!(mock.signal(Irq::Intx, 0));
    function.config_write(0x0c, &[8]);
    assert_eq!(mock.calls(), [""; 0], "it is on");
    // The kernel has one kind on at a time.
    function.config_write(mock::MSIX + 3, &[0x80]);
    assert_eq!(mock.calls(), ["Intx off", "Msix 0+16 []"]);
    function.config_write(mock::MSIX + 3, &[0]);
    assert_eq!(mock.calls(), [&["Msix off"][..], &LINE_ON].concat());
    function.config_write(mock::MSI + 2, &[1, 0]);
    assert_eq!(mock.calls(), ["Intx off", "Msi 0+1 [0]"]);
    assert_eq!(command(), 0x407);
    function.config_write(mock::MSI + 2, &[0, 0]);
    assert_eq!(mock.calls(), [&["Msi off"][..], &LINE_ON].concat());
    // What drivers do at each interrupt costs no more than it has to.
    function.config_write(COMMAND, &[6, 4]);
    assert_eq!(command(), 0x407);
    function.config_write(COMMAND, &[6, 0]);
    assert_eq!(command(), 7);
    assert_eq!(mock.calls(), [""; 0]);
    function.config_write(COMMAND, &[0, 0]);
    assert_eq!(mock.calls(), ["Intx off"]);
    function.config_write(COMMAND, &[6, 0]);
    assert_eq!(mock.calls(), LINE_ON);
    function.quiesce();
    assert_eq!(mock.calls(), ["Intx off"]);
    assert!(!mock.state().was_loose);
}

#[test]
fn line_that_would_stay_masked_is_off_until_it_can_be_unmasked() {
    let Some((function, mock)) = function_with_line() else {
        return;
    };
    mock.state().is_never_unmasked = true;
    function.config_write(COMMAND, &[2, 0]);
    assert_eq!(mock.calls(), ["Intx 0+1 [0]", "Intx off"]);
    mock.state().is_never_unmasked = false;
    function.config_write(0x0c, &[8]);
    assert_eq!(mock.calls(), [""; 0], "not at every write");
    assert_eq!(mock.state().command(), 0x403);
    function.config_write(COMMAND, &[6, 0]);
    assert_eq!(mock.calls(), LINE_ON);
    mock.state().stuck = Some(Irq::Intx);
    function.config_write(COMMAND, &[0, 0]);
    assert_eq!(mock.state().command(), 0x403, "but silent");
    mock.state().stuck = None;
    function.config_write(0x0c, &[8]);
    function.config_write(0x0c, &[8]);
    assert_eq!(mock.calls(), ["Intx off", "Intx off"]);
    assert!(!mock.state().was_loose);
}

/// As drivers of mediated devices may be. The thread that calls it has the device as long.
#[test]
fn line_of_a_driver_that_takes_no_event_is_unmasked_by_a_call() {
    let Some((function, mock)) = function_with_line() else {
        return;
    };
    let idle = Arc::strong_count(&mock);
    let unmasked = EventFd::new(0).unwrap();
    mock.state().unmasked = Some(unmasked.try_clone().unwrap());
    function.config_write(COMMAND, &[6, 0]);
    assert_eq!(mock.calls(), ["Intx 0+1 [0]"]);
    assert_eq!(mock.state().command(), 7);
    assert_eq!(unmasked.read().unwrap(), 1, "whether it can be");
    // Twice: it listens on.
    for _ in 0..2 {
        function.lock().interrupts.end_of_line();
        mock::wait_for(&unmasked);
        assert_eq!(unmasked.read().unwrap(), 1);
    }
    assert_eq!(Arc::strong_count(&mock), idle + 1);
    function.config_write(COMMAND, &[0, 0]);
    assert_eq!(mock.calls(), ["Intx off"]);
    assert_eq!(Arc::strong_count(&mock), idle, "a thread is left");
    // One that is not turned off has no thread any more: it is silent until it has one again.
    function.config_write(COMMAND, &[6, 0]);
    mock.state().stuck = Some(Irq::Intx);
    function.config_write(COMMAND, &[0, 0]);
    assert_eq!(mock.state().command(), 0x403);
    function.config_write(COMMAND, &[6, 0]);
    assert_eq!(mock.state().command(), 0x407);
    mock.state().stuck = None;
    function.config_write(COMMAND, &[7, 0]);
    assert_eq!(mock.state().command(), 7);
    assert_eq!(Arc::strong_count(&mock), idle + 1);
    drop(function);
    assert_eq!(Arc::strong_count(&mock), 1);
    assert!(!mock.state().was_loose);
}

#[test]
fn line_of_a_driver_that_takes_neither_event_nor_call_is_off() {
    let Some((function, mock)) = function_with_line() else {
        return;
    };
    let idle = Arc::strong_count(&mock);
    {
        let mut state = mock.state();
        (state.is_never_unmasked, state.unmasked) = (true, Some(EventFd::new(0).unwrap()));
    }
    function.config_write(COMMAND, &[6, 0]);
    assert_eq!(mock.calls(), ["Intx 0+1 [0]", "Intx off"]);
    assert_eq!(mock.state().command(), 0x407);
    assert_eq!(Arc::strong_count(&mock), idle);
}

/// The host would mask it at its first interrupt, for good.
#[test]
fn line_that_can_be_neither_unmasked_nor_turned_off_is_silent() {
    let Some((function, mock)) = function_with_line() else {
        return;
    };
    {
        let mut state = mock.state();
        (state.is_never_unmasked, state.stuck) = (true, Some(Irq::Intx));
    }
    function.config_write(COMMAND, &[2, 0]);
    assert_eq!(mock.calls(), ["Intx 0+1 [0]", "Intx off"]);
    assert_eq!(mock.state().command(), 0x403);
    {
        let mut state = mock.state();
        (state.is_never_unmasked, state.stuck) = (false, None);
    }
    function.config_write(COMMAND, &[6, 0]);
    assert_eq!(mock.calls(), [&["Intx off"][..], &LINE_ON].concat());
    assert_eq!(mock.state().command(), 7);
    assert!(!mock.state().was_loose);
}

#[test]
fn machine_without_lines_shows_none() {
    let Some((function, mock)) = function() else {
        return;
    };
    mock.state().config[6] |= 8;
    function.config_write(COMMAND, &[6, 0]);
    let mut data = [0; 4];
    function.config_read(0x3c, &mut data);
    assert_eq!(data[1], 0, "no pin");
    function.config_read(COMMAND, &mut data);
    assert_eq!(data[2] & 8, 0, "nothing is pending");
    assert_eq!(mock.calls(), [""; 0]);
    assert!(!mock.state().was_loose);
}

/// Its driver would wait for ever.
#[test]
fn machine_without_lines_takes_no_device_without_messages() {
    let Some(vm) = test_vm() else { return };
    let made = |pin| {
        let mock = Arc::new(Mock::default());
        mock.state().config[0x34] = 0;
        mock.state().config[0x3d] = pin;
        let endpoint = Endpoint::open("0000:01:00.0", mock).unwrap();
        VfioPci::new(&vm, endpoint, LINE, &ADDRESSES, WINDOW64)
    };
    let error = made(1).err().unwrap().to_string();
    let start = "PCI device 0000:01:00.0: its only interrupt is a line";
    assert!(error.starts_with(start), "{error}");
    assert!(made(0).is_ok(), "it never interrupts");
}

/// A machine whose devices come and go has a line's event no longer than the device has.
#[test]
fn nothing_is_left_of_a_line_that_is_off() {
    let Some(vm) = test_vm_with_lines() else {
        return;
    };
    let ways: [fn(VfioPci) -> Option<VfioPci>; 3] = [
        |function| {
            function.config_write(mock::MSIX + 3, &[0x80]);
            Some(function)
        },
        |function| {
            function.quiesce();
            Some(function)
        },
        |_| None,
    ];
    for way in ways {
        let mock = Arc::new(Mock::default());
        let function = function_in(&vm, &mock);
        function.config_write(COMMAND, &[6, 0]);
        let event = mock.event(Irq::Intx, 0).unwrap();
        assert!(vm.add_irqfd(&event, LINE).is_err(), "KVM has it already");
        let _kept = way(function);
        vm.add_irqfd(&event, LINE).unwrap();
        vm.remove_irqfd(&event, LINE).unwrap();
    }
}

#[test]
fn devices_share_a_line() {
    let Some(vm) = test_vm_with_lines() else {
        return;
    };
    let [first, second] = [(), ()].map(|()| {
        let mock = Arc::new(Mock::default());
        (function_in(&vm, &mock), mock)
    });
    for (function, mock) in [&first, &second] {
        function.config_write(COMMAND, &[4, 0]);
        assert_eq!(mock.calls(), LINE_ON);
    }
    drop(first);
    assert!(second.1.signal(Irq::Intx, 0));
    assert_eq!(second.1.calls(), [""; 0]);
}

/// What happens to a device and to what the host has for it.
#[derive(Debug, Clone)]
enum Step {
    Write(usize, Vec<u8>),
    Gone(bool),
    Stuck(Option<Irq>),
    NeverUnmasked(bool),
}

/// Writes to the registers that decide over interrupts, and to any others.
fn step() -> impl Strategy<Value = Step> {
    let registers = prop_oneof![
        Just(COMMAND),
        Just(COMMAND + 1),
        Just(mock::MSI + 2),
        Just(mock::MSIX + 3),
        0usize..4096,
    ];
    let bytes = prop::collection::vec(any::<u8>(), 1..=4);
    let kinds = [None, Some(Irq::Intx), Some(Irq::Msi), Some(Irq::Msix)];
    prop_oneof![
        8 => (registers, bytes).prop_map(|(register, bytes)| Step::Write(register, bytes)),
        1 => any::<bool>().prop_map(Step::Gone),
        1 => prop::sample::select(kinds.to_vec()).prop_map(Step::Stuck),
        1 => any::<bool>().prop_map(Step::NeverUnmasked),
    ]
}

/// Whatever a guest writes and whatever fails, the line is loose only while somebody listens to it, and
/// a guest that begins anew when nothing fails any more has what it asks for.
#[test]
fn any_writes_and_failures_leave_a_line_that_works() {
    let Some(vm) = test_vm_with_lines() else {
        return;
    };
    let steps = prop::collection::vec(step(), 1..48);
    proptest!(ProptestConfig::with_cases(64), |(steps in steps, by_call in any::<bool>())| {
        let mock = Arc::new(Mock::default());
        mock.state().unmasked = by_call.then(|| EventFd::new(0).unwrap());
        let function = function_in(&vm, &mock);
        let idle = Arc::strong_count(&mock);
        for step in &steps {
            match step {
                Step::Write(register, data) => function.config_write(*register, data),
                Step::Gone(is_gone) => mock.state().is_gone = *is_gone,
                Step::Stuck(stuck) => mock.state().stuck = *stuck,
                Step::NeverUnmasked(never) => mock.state().is_never_unmasked = *never,
            }
            prop_assert!(!mock.state().was_loose, "{step:?}");
        }
        {
            let mut state = mock.state();
            (state.is_gone, state.stuck, state.is_never_unmasked) = (false, None, false);
        }
        let enabled = |msi, msix, command: [u8; 2]| {
            function.config_write(mock::MSI + 2, &[msi]);
            function.config_write(mock::MSIX + 3, &[msix]);
            function.config_write(COMMAND, &command);
            let has_thread = Arc::strong_count(&mock) > idle;
            let state = mock.state();
            let is_unmasked = if by_call { has_thread } else { state.unmask.is_some() };
            (state.on, state.command() & 0x400 != 0, is_unmasked)
        };
        prop_assert_eq!(enabled(0, 0, [0, 0]), (None, true, false));
        prop_assert_eq!(enabled(0, 0, [6, 0]), (Some(Irq::Intx), false, true));
        prop_assert_eq!(enabled(0, 0, [6, 4]), (Some(Irq::Intx), true, true));
        prop_assert_eq!(enabled(0, 0x80, [6, 0]), (Some(Irq::Msix), true, false));
        prop_assert_eq!(enabled(0, 0, [6, 0]), (Some(Irq::Intx), false, true));
        prop_assert!(!mock.state().was_loose);
    });
}
