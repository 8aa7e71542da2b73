//! The DSDT: one PCI Express host bridge and the few devices it cannot find.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal,
    IO, If, Local, Memory32Fixed, Method, Name, NotEqual, ONE, Or, Package, Path, ResourceTemplate,
    Return, Scope, Store, Uuid, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::{OEM, OEM_REVISION, OEM_TABLE};
use crate::vm::lines;
use crate::{layout, power};

/// Length of a table header, all a DSDT has besides AML.
const HEADER: u32 = 36;
/// From revision 2 on, AML integers have 64 bits.
const REVISION: u8 = 2;
/// `_OSC` of a PCI host bridge (PCI Firmware 3.3, 4.5.1): whom it is for; its status bits:
/// unknown UUID, unknown revision, some control was not granted; controls: native hot-plug
/// of PCI Express, and its capability structure, without which Linux takes none.
const OSC_PCI: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
const OSC_UNKNOWN_UUID: u8 = 1 << 2;
const OSC_UNKNOWN_REVISION: u8 = 1 << 3;
const OSC_MASKED: u8 = 1 << 4;
const OSC_GRANTED: u8 = 1 << 4 | 1;
/// Offset of the controls.
const OSC_CONTROL: u8 = 8;
/// `_STA`: present, enabled, shown, working (ACPI 6.5, 6.3.7).
const PRESENT: u8 = 0xf;

/// What differs from one machine to the next.
#[derive(Debug, Clone, Copy)]
pub struct Platform {
    /// vCPUs.
    pub vcpus: u8,
    /// Highest bus number: there are as many root ports,
    pub last_bus: u8,
    /// from this slot of bus 0 on.
    pub first_port: u8,
    /// Whether there are root ports with hot-plug slots.
    pub hot_plug: bool,
    /// 64-bit window for BARs, end exclusive.
    pub window64: Option<(u64, u64)>,
    /// Whether there is a serial port.
    pub serial: bool,
}

/// The table.
pub fn dsdt(platform: &Platform) -> Sdt {
    let mut aml = Vec::new();
    host_bridge(platform, &mut aml);
    ecam(platform.last_bus, &mut aml);
    pvpanic(&mut aml);
    if platform.serial {
        serial(&mut aml);
    }
    soft_off(&mut aml);
    let mut dsdt = Sdt::new(*b"DSDT", HEADER, REVISION, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&aml);
    dsdt
}

fn in_system_bus(device: &Device<'_>, aml: &mut Vec<u8>) {
    Scope::new("_SB_".into(), vec![device]).to_aml_bytes(aml);
}

#[allow(clippy::cast_possible_truncation)] // constants below 4 GiB, and ports
fn host_bridge(platform: &Platform, aml: &mut Vec<u8>) {
    let buses = AddressSpace::new_bus_number(0u16, u16::from(platform.last_bus));
    let window32 = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        layout::WINDOW32_START as u32,
        (layout::WINDOW32_END - 1) as u32,
        None,
    );
    let window64 = platform.window64.map(|(start, end)| {
        AddressSpace::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            start,
            end - 1,
            None,
        )
    });
    let ports = AddressSpace::new_io(
        layout::PCI_PORTS as u16,
        (layout::PORTS_END - 1) as u16,
        None,
    );
    let mut resources: Vec<&dyn Aml> = vec![&buses, &window32];
    if platform.last_bus > 0 {
        resources.push(&ports);
    }
    if let Some(window64) = &window64 {
        resources.push(window64);
    }
    let names = [
        Name::new("_HID".into(), &EISAName::new("PNP0A08")),
        Name::new("_CID".into(), &EISAName::new("PNP0A03")),
        Name::new("_UID".into(), &ZERO),
        Name::new("_SEG".into(), &ZERO),
        Name::new("_BBN".into(), &ZERO),
        Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
    ];
    let mut device = children(&names);
    let lines = Lines(*platform);
    if platform.last_bus > 0 {
        device.push(&lines);
    }
    let native_hot_plug = NativeHotPlug;
    if platform.hot_plug {
        device.push(&native_hot_plug);
    }
    in_system_bus(&Device::new("PCI0".into(), device), aml);
}

/// `_PRT` (ACPI 6.5, 6.2.13): which line the INTA of each root port is, and with that the one of the
/// device behind it, the first of its bus.
struct Lines(Platform);

impl Aml for Lines {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let ports = (self.0.first_port..).zip(1..=self.0.last_bus);
        // A slot's address and any function; no link device.
        let entries: Vec<_> = ports
            .map(|(slot, bus)| (u32::from(slot) << 16 | 0xffff, lines::of_bus(bus)))
            .collect();
        let entries: Vec<_> = entries
            .iter()
            .map(|(slot, line)| Package::new(vec![slot, &ZERO, &ZERO, line]))
            .collect();
        let entries = entries.iter().map(|entry| entry as &dyn Aml).collect();
        Name::new("_PRT".into(), &Package::new(entries)).to_aml_bytes(sink);
    }
}

/// Grants the guest what it needs to drive the root ports' slots, and nothing else.
struct NativeHotPlug;

impl Aml for NativeHotPlug {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let (status, control) = (Path::new("STAT"), Path::new("CTRL"));
        let (for_whom, its_revision, words, wanted) = (Arg(0), Arg(1), Arg(3), Local(0));
        let set = |bit: &'static u8| Or::new(&status, &status, bit);
        let unknown_revision = set(&OSC_UNKNOWN_REVISION);
        let revision = NotEqual::new(&its_revision, &ONE);
        let revision = If::new(&revision, vec![&unknown_revision]);
        let granted = And::new(&wanted, &control, &OSC_GRANTED);
        let masked = set(&OSC_MASKED);
        let is_masked = NotEqual::new(&wanted, &control);
        let is_masked = If::new(&is_masked, vec![&masked]);
        let grant = Store::new(&control, &wanted);
        let uuid = Uuid::new(OSC_PCI);
        let is_pci = Equal::new(&for_whom, &uuid);
        let is_pci = If::new(&is_pci, vec![&revision, &granted, &is_masked, &grant]);
        let unknown_uuid = set(&OSC_UNKNOWN_UUID);
        let status_field = CreateDWordField::new(&status, &words, &ZERO);
        let control_field = CreateDWordField::new(&control, &words, &OSC_CONTROL);
        let is_other = Else::new(vec![&unknown_uuid]);
        let answer = Return::new(&words);
        let body: Vec<&dyn Aml> = vec![&status_field, &control_field, &is_pci, &is_other, &answer];
        Method::new("_OSC".into(), 4, true, body).to_aml_bytes(sink);
    }
}

/// Linux wants the configuration space claimed by a motherboard device.
#[allow(clippy::cast_possible_truncation)] // constants below 4 GiB
fn ecam(last_bus: u8, aml: &mut Vec<u8>) {
    let size = (u32::from(last_bus) + 1) * layout::ECAM_BUS_SIZE as u32;
    let range = Memory32Fixed::new(true, layout::ECAM_START as u32, size);
    let device = [
        Name::new("_HID".into(), &EISAName::new("PNP0C02")),
        Name::new("_UID".into(), &ZERO),
        Name::new("_CRS".into(), &ResourceTemplate::new(vec![&range])),
    ];
    in_system_bus(&Device::new("MBRD".into(), children(&device)), aml);
}

fn pvpanic(aml: &mut Vec<u8>) {
    let port = IO::new(layout::PORT_PVPANIC, layout::PORT_PVPANIC, 1, 1);
    let device = [
        Name::new("_HID".into(), &"QEMU0001"),
        Name::new("_UID".into(), &ZERO),
        Name::new("_STA".into(), &PRESENT),
        Name::new("_CRS".into(), &ResourceTemplate::new(vec![&port])),
    ];
    in_system_bus(&Device::new("PEVT".into(), children(&device)), aml);
}

/// No interrupt: Linux then polls.
fn serial(aml: &mut Vec<u8>) {
    let ports = IO::new(layout::PORT_SERIAL, layout::PORT_SERIAL, 1, 8);
    let device = [
        Name::new("_HID".into(), &EISAName::new("PNP0501")),
        Name::new("_UID".into(), &ZERO),
        Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports])),
    ];
    in_system_bus(&Device::new("COM1".into(), children(&device)), aml);
}

fn soft_off(aml: &mut Vec<u8>) {
    let package = Package::new(vec![&power::SLEEP_TYPE_S5, &ZERO, &ZERO, &ZERO]);
    Name::new("_S5_".into(), &package).to_aml_bytes(aml);
}

fn children(names: &[Name]) -> Vec<&dyn Aml> {
    names.iter().map(|name| name as &dyn Aml).collect()
}
