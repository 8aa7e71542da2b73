use super::*;

use std::fs::File;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::GuestMemory;
use crate::virtio::driver::{Driver, memory};

const HEADER: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;
const STATUS: u64 = 0x30_0000;

fn disk_of(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}

/// A machine with one disk and one queue.
struct Bench<'m> {
    memory: &'m GuestMemory,
    driver: Driver<'m>,
}

impl<'m> Bench<'m> {
    fn new(memory: &'m GuestMemory, block: &mut Block) -> Self {
        let driver = Driver::new(memory, 0, 16);
        block
            .activate(Activation {
                memory: memory.clone(),
                features: VIRTIO_F_VERSION_1,
                queues: vec![Some(driver.active())],
                config_interrupt: Arc::new(EventFd::new(0).unwrap()),
            })
            .unwrap();
        Self { memory, driver }
    }

    /// Sends a request and returns its status and used length.
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u8, u32) {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.memory
            .write_slice(&header, GuestAddress(HEADER))
            .unwrap();
        self.memory
            .write_slice(&[0xff], GuestAddress(STATUS))
            .unwrap();
        let mut chain = vec![(HEADER, 16, false)];
        chain.extend(data);
        chain.push((STATUS, 1, true));
        let head = self.driver.add(&chain);
        self.driver.kick();
        let (used, len) = self.driver.wait();
        assert_eq!(used, head);
        (self.driver.load(STATUS, 1)[0], len)
    }
}

#[test]
fn what_is_written_is_read_back_also_after_a_reset() {
    let memory = memory();
    let file = disk_of(&[0; 8192]);
    let backing = Backing::Whole(file.try_clone().unwrap());
    let mut block = Block::new("disk", false, backing, 1).unwrap();
    let mut bench = Bench::new(&memory, &mut block);
    let pattern: Vec<u8> = (0..1024u32).map(|n| n.to_le_bytes()[0] ^ 0x5a).collect();
    memory.write_slice(&pattern, GuestAddress(DATA)).unwrap();

    let halves = [(DATA, 512, false), (DATA + 512, 512, false)];
    assert_eq!(bench.request(1, 3, &halves), (0, 1));
    assert_eq!(bench.request(4, 0, &[]), (0, 1));
    let mut on_disk = vec![0; 1024];
    file.read_exact_at(&mut on_disk, 3 * 512).unwrap();
    assert_eq!(on_disk, pattern);
    block.reset();

    let mut bench = Bench::new(&memory, &mut block);
    assert_eq!(
        bench.request(0, 3, &[(DATA + 0x1000, 1024, true)]),
        (0, 1025)
    );
    assert_eq!(bench.driver.load(DATA + 0x1000, 1024), pattern);
    assert_eq!(bench.request(8, 0, &[(DATA, 20, true)]), (0, 21));
    assert_eq!(bench.driver.load(DATA, 5), b"disk\0");
    block.reset();
}

#[test]
fn requests_that_make_no_sense_are_answered_and_change_nothing() {
    let memory = memory();
    let file = disk_of(&[7; 4096]);
    let mut block = Block::new("", true, Backing::Whole(file.try_clone().unwrap()), 1).unwrap();
    let mut bench = Bench::new(&memory, &mut block);
    let write = [(DATA, 512, false)];
    let read = [(DATA, 512, true)];
    assert_eq!(
        bench.request(1, 0, &write).0,
        1,
        "write to a read-only disk"
    );
    assert_eq!(bench.request(0, 8, &read).0, 1, "past the end");
    assert_eq!(bench.request(0, u64::MAX, &read).0, 1, "sector overflows");
    assert_eq!(
        bench.request(0, 0, &[(DATA, 100, true)]).0,
        1,
        "part of a sector"
    );
    assert_eq!(bench.request(11, 0, &write).0, 2, "discard, not offered");
    assert_eq!(bench.request(99, 0, &[]).0, 2, "unknown");
    // No header, no status, memory that is not there: nothing to answer with.
    for chain in [
        vec![(DATA, 8, false)],
        vec![(HEADER, 16, false)],
        vec![(1 << 40, 16, false), (STATUS, 1, true)],
    ] {
        let head = bench.driver.add(&chain);
        bench.driver.kick();
        assert_eq!(bench.driver.wait(), (head, 0));
    }
    assert_eq!(bench.request(0, 0, &read), (0, 513), "still serves");
    block.reset();
    let mut after = vec![0; 4096];
    file.read_exact_at(&mut after, 0).unwrap();
    assert_eq!(after, [7; 4096]);
}

#[test]
fn discard_gives_zeros_and_blocks_back() {
    let memory = memory();
    let file = disk_of(&[7; 65536]);
    let mut block = Block::new("", false, Backing::Whole(file.try_clone().unwrap()), 1).unwrap();
    let mut bench = Bench::new(&memory, &mut block);
    let mut range = 8u64.to_le_bytes().to_vec();
    range.extend(16u32.to_le_bytes());
    range.extend(0u32.to_le_bytes());
    memory.write_slice(&range, GuestAddress(DATA)).unwrap();
    assert_eq!(bench.request(11, 0, &[(DATA, 16, false)]).0, 0);
    let mut after = vec![0; 65536];
    file.read_exact_at(&mut after, 0).unwrap();
    assert_eq!(after[4096..12288], [0; 8192]);
    assert_eq!((after[4095], after[12288]), (7, 7));
    block.reset();
}

#[test]
fn files_are_partitions_with_zeros_past_their_end() {
    let memory = memory();
    let files = vec![disk_of(&[1; 5000]), disk_of(&[2; 100])];
    let mut block = Block::new("layers", true, Backing::Partitions(files), 1).unwrap();
    let mut bench = Bench::new(&memory, &mut block);
    let table = super::super::gpt::Table::new(&[5000, 100]).unwrap();
    let size = u32::try_from(table.len()).unwrap();
    assert_eq!(bench.request(0, 0, &[(DATA, size, true)]), (0, size + 1));
    let bytes = bench.driver.load(DATA, usize::try_from(size).unwrap());
    let (first, second) = (table.partitions[0], table.partitions[1]);
    let at = |(start, len): (u64, u64)| {
        let start = usize::try_from(start).unwrap();
        &bytes[start..start + usize::try_from(len).unwrap()]
    };
    assert_eq!(bytes[..table.head.len()], table.head);
    assert_eq!(at(first)[..5000], [1; 5000]);
    assert_eq!(at(first)[5000..], [0; 3192]);
    assert_eq!(at(second)[..100], [2; 100]);
    assert_eq!(at(second)[100..], [0; 3996]);
    assert!(bytes.ends_with(&table.tail));
    block.reset();
}

#[test]
fn disks_no_guest_could_use_are_refused() {
    let odd = Block::new("", true, Backing::Whole(disk_of(&[0; 100])), 1);
    assert!(matches!(odd, Err(BlockError::Length(100))));
    let long = "x".repeat(21);
    let named = Block::new(&long, true, Backing::Whole(disk_of(&[0; 512])), 1);
    assert!(matches!(named, Err(BlockError::Serial(_))));
    let written = Block::new("", false, Backing::Partitions(Vec::new()), 1);
    assert!(matches!(written, Err(BlockError::Config(_))));
}
