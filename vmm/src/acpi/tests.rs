use std::path::Path;
use std::process::Command;

use super::*;
use crate::memory;

fn platform() -> Platform {
    Platform {
        vcpus: 4,
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

#[test]
fn iasl_disassembles_without_complaint() {
    if Command::new("iasl").arg("-v").output().is_err() {
        eprintln!("skipped: iasl (acpica-tools) is not installed");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in walk(&Tables::new(&platform(), layout::ACPI_TABLES)) {
        let path = dir.path().join(format!("{}.dat", name.to_lowercase()));
        std::fs::write(&path, bytes).unwrap();
        iasl(&["-d"], &path);
        if name == "DSDT" {
            iasl(&["-we"], &path.with_extension("dsl"));
        }
    }
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
