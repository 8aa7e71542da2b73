use crate::vm::test_vm;

use super::mock::Mock;
use super::*;
use crate::bus::BusDevice;
use crate::layout::{self, GIB};
use crate::pci::{Ecam, IoPorts, PciRoot, Slot, Window};

pub(super) const WINDOW64: Option<(u64, u64)> = Some((64 * GIB, 128 * GIB));

/// A bus with the mocks behind root ports, or `None` where there is no KVM.
fn bus(mocks: &[Arc<Mock>]) -> Option<(Arc<PciRoot>, Session)> {
    let vm = test_vm()?;
    let (ports, session) = place(&vm, mocks).unwrap();
    let slots = ports.into_iter().map(|port| Slot::Port(Box::new(port)));
    let root = Arc::new(PciRoot::new(slots.collect()));
    root.map_config(&vm).unwrap();
    Some((root, session))
}

fn place(vm: &Arc<Vm>, mocks: &[Arc<Mock>]) -> Result<(Vec<Port>, Session), VfioError> {
    attached(mocks).place(vm, &mut Placement::new(WINDOW64, 37), None)
}

pub(super) fn attached(mocks: &[Arc<Mock>]) -> Attached {
    let endpoints = mocks
        .iter()
        .map(|mock| Endpoint::open("0000:01:00.0", mock.clone()));
    Attached {
        known: None,
        endpoints: endpoints.collect::<Result<_, _>>().unwrap(),
    }
}

/// A register by bus, slot and offset.
pub(super) fn config(root: &Arc<PciRoot>, bus: u64, slot: u64, register: u64) -> u32 {
    let mut bytes = [0; 4];
    Ecam(root.clone()).read(bus << 20 | slot << 15 | register, &mut bytes);
    u32::from_le_bytes(bytes)
}

pub(super) fn write(root: &Arc<PciRoot>, bus: u64, slot: u64, register: u64, data: &[u8]) {
    Ecam(root.clone()).write(bus << 20 | slot << 15 | register, data);
}

#[test]
fn each_device_is_alone_behind_its_port() {
    let mocks = [Arc::new(Mock::default()), Arc::new(Mock::default())];
    let Some((root, _session)) = bus(&mocks) else {
        return;
    };
    assert_eq!(root.last_bus(), 2);
    for number in [1u8, 2] {
        let bus = u64::from(number);
        assert_eq!(config(&root, 0, bus, 0), 0x000c_1b36);
        assert_eq!(
            config(&root, 0, bus, 0x18),
            u32::from_le_bytes([0, number, number, 0])
        );
        assert_eq!(config(&root, bus, 0, 0), 0x5678_1234);
        assert_eq!(config(&root, bus, 1, 0), u32::MAX, "one slot");
    }
    assert_eq!(config(&root, 3, 0, 0), u32::MAX);
    // A port that is given another bus number takes its device along.
    write(&root, 0, 2, 0x19, &[9, 9]);
    assert_eq!(config(&root, 2, 0, 0), u32::MAX);
    assert_eq!(config(&root, 9, 0, 0), 0x5678_1234);
}

#[test]
fn bars_are_where_the_port_passes_them_on() {
    let mocks = [Arc::new(Mock::default()), Arc::new(Mock::default())];
    let Some((root, _session)) = bus(&mocks) else {
        return;
    };
    for (bus, mock) in (1..).zip(&mocks) {
        let window = config(&root, 0, bus, 0x20);
        let (base, limit) = ((window & 0xfff0) << 16, window | 0xf_ffff);
        let bar = config(&root, bus, 0, 0x10) & !0xf;
        assert!(
            base <= bar && bar + 0x7fff <= limit,
            "{bar:#x} in {base:#x}..={limit:#x}"
        );
        let upper = config(&root, bus, 0, 0x1c);
        assert_eq!(
            upper,
            config(&root, 0, bus, 0x28),
            "prefetchable, above 4 GiB"
        );
        assert_ne!(upper, 0);

        write(&root, bus, 0, 0x04, &[6, 0]);
        let window = Window {
            root: root.clone(),
            start: layout::WINDOW32_START,
        };
        let offset = u64::from(bar) - layout::WINDOW32_START + 0x2800;
        window.write(offset, &[7, 7]);
        assert_eq!(mock.state().bar[0x2800..0x2802], [7, 7]);
    }
}

#[test]
fn ports_lead_to_the_device_that_has_them() {
    let mocks = [Arc::new(Mock::default()), Arc::new(Mock::default())];
    let Some((root, _session)) = bus(&mocks) else {
        return;
    };
    let ports = IoPorts(root.clone());
    let mut byte = [0];
    for (bus, mock) in (1..).zip(&mocks) {
        let window = config(&root, 0, bus, 0x1c);
        let (base, limit) = ((window & 0xf0) << 8, window & 0xf000 | 0xfff);
        let port = config(&root, bus, 0, 0x24) & !0b11;
        assert!(
            base <= port && port + 0x1f <= limit,
            "{port:#x} {window:#x}"
        );
        let offset = u64::from(port) - layout::IO_START + 4;
        ports.write(offset, &[9]);
        ports.read(offset, &mut byte);
        assert_eq!((mock.state().ports[4], byte), (0, [0xff]), "they are off");
        write(&root, bus, 0, 0x04, &[7, 0]);
        ports.write(offset, &[9]);
        ports.read(offset, &mut byte);
        assert_eq!((mock.state().ports[4], byte), (9, [9]));
    }
    ports.read(0xefff, &mut byte);
    assert_eq!(byte, [0xff]);
}

#[test]
fn windows_that_are_too_small_are_an_error() {
    let Some(vm) = test_vm() else {
        return;
    };
    let mock = Arc::new(Mock::default());
    mock.state().sizes[2] = 128 * GIB;
    let error = place(&vm, &[mock]).err().unwrap();
    let text = error.to_string();
    assert!(
        text.ends_with("address bits leave 64 GiB: 128 GiB too little"),
        "{text}"
    );
}

#[test]
fn machine_s_end_gives_the_devices_back() {
    let mock = Arc::new(Mock::default());
    let Some((root, session)) = bus(std::slice::from_ref(&mock)) else {
        return;
    };
    let watch = session.watch(Arc::new(Stop::new().unwrap())).unwrap();
    root.reset();
    watch.stop().unwrap();
    assert_eq!(mock.state().resets, 2, "before and after");
}

/// One that is reset is not written to by another, whose queues are a guest's still.
#[test]
fn devices_are_all_quiet_before_one_is_reset() {
    let mocks = [Arc::new(Mock::default()), Arc::new(Mock::default())];
    let Some((root, _session)) = bus(&mocks) else {
        return;
    };
    let journal = Mock::share_journal(&mocks);
    root.reset();
    assert_eq!(
        *journal.lock().unwrap(),
        ["quiet", "quiet", "reset", "reset"]
    );
}

#[test]
fn devices_are_mapped_for_each_other_only_if_they_are_to_be() {
    let Some(vm) = test_vm() else {
        return;
    };
    let null = std::fs::File::open("/dev/null").unwrap();
    let space = AddressSpace::Container(null.into());
    let place = |count: usize, peers| {
        let mocks: Vec<_> = (0..count).map(|_| Arc::new(Mock::default())).collect();
        attached(&mocks).place(&vm, &mut Placement::new(WINDOW64, 37), peers)
    };
    assert!(place(2, None).is_ok());
    assert!(place(1, Some(&space)).is_ok(), "there is no other");
    let error = place(2, Some(&space)).err().unwrap();
    assert!(matches!(error, VfioError::Peer { .. }), "{error}");
}

#[test]
fn descriptors_that_did_not_come_are_missed() {
    let config = Config {
        iommu: Iommu::Iommufd(nacre_protocol::vm::FdIndex(0)),
        devices: Vec::new(),
    };
    assert!(Passthrough::take(&config, &mut Fds::default()).is_err());
}
