use std::collections::HashMap;
use std::path::Path;
use std::process::Command;

use super::*;
use crate::memory;

fn platform() -> Platform {
    Platform {
        vcpus: 4,
        last_bus: 2,
        first_port: 5,
        hot_plug: true,
        window64: Some((64 << 30, 1 << 40)),
        serial: true,
    }
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
}

/// The table at `address`: signature and bytes.
fn table(tables: &Tables, address: u64) -> (String, &[u8]) {
    let start = usize::try_from(address - tables.base).unwrap();
    let bytes = &tables.bytes[start..];
    let len = u32::from_le_bytes(bytes[4..8].try_into().unwrap());
    let signature = String::from_utf8(bytes[..4].to_vec()).unwrap();
    (signature, &bytes[..usize::try_from(len).unwrap()])
}

/// Every table, found as a guest finds them: RSDP, XSDT, FADT, DSDT.
fn walk(tables: &Tables) -> Vec<(String, &[u8])> {
    let xsdt = table(tables, u64_at(&tables.bytes, 24));
    let mut found: Vec<_> = xsdt.1[36..]
        .chunks(8)
        .map(|address| table(tables, u64_at(address, 0)))
        .collect();
    let dsdt = table(tables, u64_at(found[0].1, 140));
    found.extend([xsdt, dsdt]);
    found
}

#[test]
fn a_guest_finds_every_table_and_its_checksum_holds() {
    let tables = Tables::new(&platform(), layout::ACPI_TABLES);
    let found = walk(&tables);
    let names: Vec<_> = found.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["FACP", "APIC", "MCFG", "XSDT", "DSDT"]);
    for (name, bytes) in &found {
        let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(sum, 0, "checksum of {name}");
    }
    assert_eq!(&tables.bytes[..8], b"RSD PTR ");
}

#[test]
fn largest_machine_fits() {
    let memory = memory::allocate(32, false).unwrap();
    let platform = Platform {
        vcpus: 255,
        ..platform()
    };
    write(&memory, &platform).unwrap();
}

/// What iasl makes of the tables, by name; white space is one blank.
fn disassembled(platform: &Platform) -> HashMap<String, String> {
    let dir = tempfile::tempdir().unwrap();
    let mut texts = HashMap::new();
    for (name, bytes) in walk(&Tables::new(platform, layout::ACPI_TABLES)) {
        let path = dir.path().join(format!("{}.dat", name.to_lowercase()));
        std::fs::write(&path, bytes).unwrap();
        iasl(&["-d"], &path);
        let source = path.with_extension("dsl");
        if name == "DSDT" {
            iasl(&["-we"], &source);
        }
        let text = std::fs::read_to_string(source).unwrap();
        let words: Vec<&str> = text.split_whitespace().collect();
        texts.insert(name, words.join(" "));
    }
    texts
}

fn iasl(options: &[&str], path: &Path) {
    let output = Command::new("iasl")
        .args(options)
        .arg(path)
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(output.status.success(), "{text}");
    let complaint = |line: &str| line.starts_with("Warning") || line.starts_with("Error");
    assert!(!text.lines().any(complaint), "{text}");
}

#[test]
fn iasl_reads_without_complaint_what_the_machine_is() {
    let texts = disassembled(&platform());
    for (table, parts) in [
        (
            "DSDT",
            [
                "EisaId (\"PNP0A08\")",
                "Method (_OSC, 4, Serialized)",
                "CreateDWordField (Arg3, Zero, STAT)",
                "CreateDWordField (Arg3, 0x08, CTRL)",
                "If ((Arg0 == ToUUID (\"33db4d5b-1ff7-401c-9657-7441c03dd766\")",
                "Local0 = (CTRL & 0x11)",
                "Name (_PRT, Package (0x02) // _PRT: PCI Routing Table { \
                 Package (0x04) { 0x0005FFFF, Zero, Zero, 0x10 }, \
                 Package (0x04) { 0x0006FFFF, Zero, Zero, 0x11 } })",
                "0x0002, // Range Maximum 0x0000, // Translation Offset 0x0003, // Length",
                "0x1000, // Range Minimum 0xFFFF, // Range Maximum 0x0000, // Translation Offset 0xF000,",
                "0xC0000000, // Range Minimum 0xDFFFFFFF, // Range Maximum",
                "0x0000001000000000, // Range Minimum 0x000000FFFFFFFFFF, // Range Maximum",
                "0xE0000000, // Address Base 0x00300000, // Address Length",
                "\"QEMU0001\"",
                "IO (Decode16, 0x0505, // Range Minimum 0x0505, // Range Maximum",
                "EisaId (\"PNP0501\")",
                "IO (Decode16, 0x03F8, // Range Minimum 0x03F8, // Range Maximum 0x01, // Alignment 0x08,",
                "Name (_S5, Package (0x04) // _S5_: S5 System State { 0x05,",
            ]
            .as_slice(),
        ),
        (
            "FACP",
            &[
                "Hardware Reduced (V5) : 1",
                "Reset Register Supported (V2) : 1",
                "VGA Not Present (V4) : 1",
                "CMOS RTC Not Present (V5) : 1",
                "Space ID : 01 [SystemIO]",
                "Address : 0000000000000602",
                "Value to cause reset : 01",
                "Address : 0000000000000600",
                "Address : 0000000000000601",
            ],
        ),
        (
            "MCFG",
            &[
                "Base Address : 00000000E0000000",
                "Start Bus Number : 00",
                "End Bus Number : 02",
            ],
        ),
        (
            "APIC",
            &[
                "Local Apic Address : FEE00000",
                "Local Apic ID : 03",
                "[I/O APIC]",
                "Address : FEC00000",
                "Interrupt : 00000000",
            ],
        ),
    ] {
        let text = &texts[table];
        for part in parts {
            assert!(text.contains(part), "no {part:?} in {text}");
        }
    }
    let processors = texts["APIC"].matches("Processor Enabled : 1").count();
    assert_eq!(processors, 4);
}

#[test]
fn what_a_machine_does_not_have_is_not_in_the_tables() {
    let bare = Platform {
        window64: None,
        serial: false,
        hot_plug: false,
        last_bus: 0,
        ..platform()
    };
    let texts = disassembled(&bare);
    for absent in ["PNP0501", "QWordMemory", "_OSC", "_PRT", "WordIO"] {
        assert!(!texts["DSDT"].contains(absent), "{absent}");
    }
    assert!(!texts["APIC"].contains("I/O APIC"));
}
