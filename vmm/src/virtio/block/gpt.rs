//! A partition table that exists in memory only (UEFI 2.10, 5.2 and 5.3).
//!
//! ```text
//!   sector 0   protective MBR
//!          1   header
//!          2   entries, 128 at least
//!       2048   first partition; each starts at a multiple of 2048 sectors
//!          :
//!              entries again
//!       last   header again
//! ```
//!
//! The same files under the same serial number give the same bytes, so that a
//! guest may hold on to what it read.

use nacre_protocol::vm::MAX_PARTITIONS;

use super::SECTOR_BYTES;

#[cfg(test)]
mod tests;

/// Where partitions may start: 1 MiB, as partitioning tools do it.
const ALIGNMENT: u64 = 2048 * SECTOR_BYTES;
/// A partition has whole pages: its file's length rounded up.
const PAGE: u64 = 4096;
const HEADER_BYTES: u32 = 92;
const ENTRY_BYTES: u32 = 128;
/// The table has room for so many, used or not (UEFI 2.10, 5.3.1).
const MIN_ENTRIES: usize = 128;
/// UTF-16 units of a partition's name.
const NAME_UNITS: usize = 36;
/// "Linux filesystem data", 0FC63DAF-8483-4772-8E79-3D69D8477DE4.
const LINUX_DATA: [u8; 16] = [
    0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4,
];

/// Where everything is on a disk of partitions. Positions are in bytes.
#[derive(Debug, PartialEq, Eq)]
pub struct Gpt {
    /// MBR, header and entries, from byte 0 on.
    pub head: Vec<u8>,
    /// Start of each partition.
    pub starts: Vec<u64>,
    /// Entries and header once more.
    pub tail: Vec<u8>,
    /// Where `tail` belongs.
    pub tail_start: u64,
    /// Size of the disk.
    pub size: u64,
}

impl Gpt {
    /// Lays out partitions for files of these lengths; `None` if there are too
    /// many or too few, or the disk would be too large.
    pub fn new(serial: &str, lens: &[u64]) -> Option<Self> {
        if lens.is_empty() || lens.len() > MAX_PARTITIONS {
            return None;
        }
        let mut starts = Vec::with_capacity(lens.len());
        let mut table = Vec::new();
        let identity = identity(serial, lens);
        let mut end = 0;
        for (index, &len) in lens.iter().enumerate() {
            // The head always fits before the first: see the test.
            let start = if index == 0 { ALIGNMENT } else { end };
            let start = start.checked_next_multiple_of(ALIGNMENT)?;
            end = start.checked_add(len.checked_next_multiple_of(PAGE)?)?;
            let number = u32::try_from(index).ok()?.checked_add(1)?;
            table.extend(entry(identity, number, start, end));
            starts.push(start);
        }
        let entries = lens.len().max(MIN_ENTRIES).next_multiple_of(4);
        table.resize(entries * usize::try_from(ENTRY_BYTES).ok()?, 0);

        let table_sectors = u64::try_from(table.len()).ok()? / SECTOR_BYTES;
        let tail_bytes = (table_sectors + 1) * SECTOR_BYTES;
        let size = end
            .checked_add(tail_bytes)?
            .checked_next_multiple_of(PAGE)?;
        let tail_start = size - tail_bytes;
        i64::try_from(size).ok()?;

        let header = Header {
            identity,
            table_crc: crc32(&table),
            table_sectors,
            entries: u32::try_from(entries).ok()?,
            last_sector: size / SECTOR_BYTES - 1,
        };
        let mut head = protective_mbr(header.last_sector);
        head.extend(header.bytes(1, header.last_sector, 2));
        head.extend(&table);
        let mut tail = table;
        let table_again = tail_start / SECTOR_BYTES;
        tail.extend(header.bytes(header.last_sector, 1, table_again));
        Some(Self {
            head,
            starts,
            tail,
            tail_start,
            size,
        })
    }
}

/// What both headers say.
struct Header {
    identity: u64,
    table_crc: u32,
    table_sectors: u64,
    entries: u32,
    last_sector: u64,
}

impl Header {
    /// The header of sector `here` (UEFI 2.10, table 5-5), a sector long.
    fn bytes(&self, here: u64, other: u64, table: u64) -> Vec<u8> {
        let first_usable = 2 + self.table_sectors;
        let last_usable = self.last_sector - self.table_sectors - 1;
        let fields = |crc: u32| {
            let mut bytes = b"EFI PART".to_vec();
            bytes.extend(0x0001_0000u32.to_le_bytes());
            bytes.extend(HEADER_BYTES.to_le_bytes());
            bytes.extend(crc.to_le_bytes());
            bytes.extend(0u32.to_le_bytes());
            for sector in [here, other, first_usable, last_usable] {
                bytes.extend(sector.to_le_bytes());
            }
            bytes.extend(guid(self.identity, 0));
            bytes.extend(table.to_le_bytes());
            for value in [self.entries, ENTRY_BYTES, self.table_crc] {
                bytes.extend(value.to_le_bytes());
            }
            bytes
        };
        let mut bytes = fields(crc32(&fields(0)));
        pad_to_sector(&mut bytes);
        bytes
    }
}

/// A partition of the bytes `start..end` (UEFI 2.10, table 5-6).
fn entry(identity: u64, number: u32, start: u64, end: u64) -> Vec<u8> {
    let mut bytes = LINUX_DATA.to_vec();
    bytes.extend(guid(identity, number));
    for value in [start / SECTOR_BYTES, end / SECTOR_BYTES - 1, 0] {
        bytes.extend(value.to_le_bytes());
    }
    let name = format!("part-{number}");
    let units = name.encode_utf16().chain(std::iter::repeat(0));
    bytes.extend(units.take(NAME_UNITS).flat_map(u16::to_le_bytes));
    bytes
}

/// One partition of type 0xee over the whole disk (UEFI 2.10, 5.2.3).
fn protective_mbr(last_sector: u64) -> Vec<u8> {
    let mut bytes = vec![0; 446];
    // Not bootable; from C/H/S 0/0/2 to the largest there is.
    bytes.extend([0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff]);
    bytes.extend(1u32.to_le_bytes());
    let sectors = u32::try_from(last_sector).unwrap_or(u32::MAX);
    bytes.extend(sectors.to_le_bytes());
    bytes.extend([0; 3 * 16]);
    bytes.extend([0x55, 0xaa]);
    bytes
}

fn pad_to_sector(bytes: &mut Vec<u8>) {
    while !(bytes.len() as u64).is_multiple_of(SECTOR_BYTES) {
        bytes.push(0);
    }
}

/// What tells this disk from others: FNV-1a over all it is made of.
fn identity(serial: &str, lens: &[u64]) -> u64 {
    let lens = lens.iter().flat_map(|len| len.to_le_bytes());
    serial
        .bytes()
        .chain(lens)
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
}

/// A GUID of the kind whose bits are ours to choose (RFC 9562, 5.8). The disk is
/// number 0 of its identity, partitions count from 1.
fn guid(identity: u64, number: u32) -> [u8; 16] {
    let [i0, i1, i2, i3, i4, i5, i6, i7] = identity.to_le_bytes();
    let [n0, n1, n2, n3] = number.to_be_bytes();
    // Bytes 6 and 7 are the little-endian field with the version, 8 has the variant.
    [
        i0,
        i1,
        i2,
        i3,
        i4,
        i5,
        i6,
        0x80 | (i7 & 0x0f),
        0x80 | (i7 >> 4),
        b'n',
        b'a',
        b'c',
        n0,
        n1,
        n2,
        n3,
    ]
}

/// CRC-32 as in Ethernet, reflected, polynomial 0x04c11db7.
pub fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        let index = crc.to_le_bytes()[0] ^ byte;
        CRC_TABLE[usize::from(index)] ^ (crc >> 8)
    })
}

static CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut value = 0u32;
    while value < 256 {
        let mut crc = value;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 {
                0xedb8_8320 ^ (crc >> 1)
            } else {
                crc >> 1
            };
            bit += 1;
        }
        table[value as usize] = crc;
        value += 1;
    }
    table
};
