//! The table as its readers see it: our own checker, sfdisk and sgdisk.

use super::*;

use std::collections::HashSet;
use std::os::unix::fs::FileExt;
use std::process::Command;

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn sector(number: u64) -> usize {
    usize::try_from(number * SECTOR_BYTES).unwrap()
}

/// What a header says after its checksums were found right.
#[derive(Debug, PartialEq)]
struct Checked {
    usable: (u64, u64),
    disk: [u8; 16],
    /// First and last sector, GUID.
    partitions: Vec<(u64, u64, [u8; 16])>,
}

/// Checks the header at `here` of an image whose other header is at `other`.
fn check(image: &[u8], here: u64, other: u64) -> Checked {
    let header = &image[sector(here)..sector(here + 1)];
    assert_eq!(&header[..8], b"EFI PART");
    assert_eq!(u32_at(header, 12), 92);
    let mut without_crc = header[..92].to_vec();
    without_crc[16..20].fill(0);
    assert_eq!(u32_at(header, 16), crc32(&without_crc));
    assert_eq!((u64_at(header, 24), u64_at(header, 32)), (here, other));
    assert!(header[92..].iter().all(|&byte| byte == 0));
    let count = usize::try_from(u32_at(header, 80)).unwrap();
    assert_eq!(u32_at(header, 84), 128);
    assert!(count >= 128);
    let start = sector(u64_at(header, 72));
    let table = &image[start..start + 128 * count];
    assert_eq!(u32_at(header, 88), crc32(table));
    let partitions = table
        .chunks(128)
        .filter(|entry| entry[..16] != [0; 16])
        .map(|entry| {
            assert_eq!(entry[..16], LINUX_DATA);
            let guid = entry[16..32].try_into().unwrap();
            (u64_at(entry, 32), u64_at(entry, 40), guid)
        })
        .collect();
    Checked {
        usable: (u64_at(header, 40), u64_at(header, 48)),
        disk: header[56..72].try_into().unwrap(),
        partitions,
    }
}

/// The disk with zeroes for files.
fn image(gpt: &Gpt) -> Vec<u8> {
    let mut image = gpt.head.clone();
    image.resize(usize::try_from(gpt.tail_start).unwrap(), 0);
    image.extend(&gpt.tail);
    assert_eq!(image.len() as u64, gpt.size);
    image
}

#[test]
fn both_headers_describe_the_same_partitions() {
    let lens = [1, 4096, 5_000_000, 2 << 20];
    let gpt = Gpt::new("layers", &lens).unwrap();
    let image = image(&gpt);
    let last = gpt.size / SECTOR_BYTES - 1;
    let checked = check(&image, 1, last);
    assert_eq!(checked, check(&image, last, 1));

    assert_eq!(image[510..512], [0x55, 0xaa]);
    assert_eq!(image[450], 0xee);
    assert_eq!(u64::from(u32_at(&image, 458)), last);
    let mut free = checked.usable.0;
    let mut guids = HashSet::from([checked.disk]);
    for ((first, end, guid), (start, len)) in
        checked.partitions.iter().zip(gpt.starts.iter().zip(lens))
    {
        assert!(*first >= free && first.is_multiple_of(2048));
        assert_eq!(first * SECTOR_BYTES, *start);
        assert_eq!(
            (end + 1 - first) * SECTOR_BYTES,
            len.next_multiple_of(4096),
            "whole pages"
        );
        assert!(guids.insert(*guid), "GUIDs differ");
        free = end + 1;
    }
    assert_eq!(checked.partitions.len(), lens.len());
    assert!(free <= checked.usable.1 + 1);
}

#[test]
fn table_grows_with_the_partitions_and_ends_before_the_first() {
    for count in [1, 128, 129, MAX_PARTITIONS] {
        let gpt = Gpt::new("", &vec![4096; count]).unwrap();
        assert!(gpt.head.len() as u64 <= gpt.starts[0]);
        let header = &gpt.head[sector(1)..];
        let entries = usize::try_from(u32_at(header, 80)).unwrap();
        assert!(entries >= count && entries.is_multiple_of(4));
    }
    assert_eq!(Gpt::new("", &vec![4096; MAX_PARTITIONS + 1]), None);
    assert_eq!(Gpt::new("", &[]), None);
    assert_eq!(Gpt::new("", &[u64::MAX]), None);
    assert_eq!(Gpt::new("", &[u64::MAX / 2, u64::MAX / 2]), None);
}

#[test]
fn the_same_files_give_the_same_table_and_others_another() {
    let table = Gpt::new("a", &[4096, 8192]).unwrap();
    assert_eq!(table, Gpt::new("a", &[4096, 8192]).unwrap());
    let disk = |gpt: &Gpt| gpt.head[512 + 56..512 + 72].to_vec();
    for other in [
        Gpt::new("b", &[4096, 8192]).unwrap(),
        Gpt::new("a", &[8192, 4096]).unwrap(),
    ] {
        assert_ne!(disk(&table), disk(&other));
    }
}

#[test]
fn checksum_is_the_usual_one() {
    assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
}

/// What a partitioning tool says, which has to find no fault.
fn tool(name: &str, args: &[&str]) -> String {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap());
    let output = Command::new("env")
        .args(["LC_ALL=C", &format!("PATH={path}"), name])
        .args(args)
        .output()
        .unwrap();
    assert!(output.status.success(), "{name}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn partitioning_tools_find_no_fault() {
    let gpt = Gpt::new("layers", &vec![4096 * 3 + 1; 200]).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(gpt.size).unwrap();
    file.as_file().write_all_at(&gpt.head, 0).unwrap();
    file.as_file()
        .write_all_at(&gpt.tail, gpt.tail_start)
        .unwrap();
    let path = file.path().to_str().unwrap();
    let text = tool("sfdisk", &["--verify", path]);
    assert!(text.contains("No errors detected"), "{text}");
    let text = tool("sfdisk", &["-d", path]);
    assert!(text.contains("label: gpt"), "{text}");
    let sizes = text.lines().filter(|line| line.contains("size="));
    assert_eq!(sizes.count(), 200, "{text}");
    assert!(text.contains("name=\"part-200\""), "{text}");
    let text = tool("sgdisk", &["-v", path]);
    assert!(text.contains("No problems found"), "{text}");
}
