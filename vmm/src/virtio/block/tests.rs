//! A driver in front of whole disks, and one that sends nonsense.

use super::*;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::ScopedJoinHandle;

use proptest::prelude::*;
use virtio_bindings::virtio_blk as spec;
use vmm_sys_util::eventfd::EventFd;

use super::backing::Disk;
use super::worker::{Server, Service};
use crate::virtio::driver::{Driver, memory};
use crate::virtio::ring::Ring;
use crate::virtio::{Activation, GuestMemory, VIRTIO_F_VERSION_1, VirtioDevice};

const HEADER: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;
const STATUS: u64 = 0x30_0000;
const IN: u32 = spec::VIRTIO_BLK_T_IN;
const OUT: u32 = spec::VIRTIO_BLK_T_OUT;
const FLUSH: u32 = spec::VIRTIO_BLK_T_FLUSH;
const GET_ID: u32 = spec::VIRTIO_BLK_T_GET_ID;
const DISCARD: u32 = spec::VIRTIO_BLK_T_DISCARD;
const WRITE_ZEROES: u32 = spec::VIRTIO_BLK_T_WRITE_ZEROES;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// Address, length, whether the device writes it.
type Buffer = (u64, u32, bool);

fn file_of(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}

fn whole(file: &File, read_only: bool) -> Block {
    let backing = Backing::Whole(file.try_clone().unwrap());
    Block::new("disk-1", read_only, backing, 1).unwrap()
}

fn content(file: &File, start: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, start).unwrap();
    bytes
}

fn activate(block: &mut Block, memory: &GuestMemory, drivers: &[&Driver<'_>]) {
    let activation = Activation {
        memory: memory.clone(),
        features: block.features(),
        queues: drivers.iter().map(|driver| Some(driver.active())).collect(),
        config_interrupt: Arc::new(EventFd::new(0).unwrap()),
    };
    block.activate(activation).unwrap();
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

/// Sends a request with these data buffers; its status and used length.
fn request(driver: &mut Driver<'_>, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
    driver.store(HEADER, &header(kind, sector));
    driver.store(STATUS, &[0xff]);
    let mut chain = vec![(HEADER, 16, false)];
    chain.extend(data);
    chain.push((STATUS, 1, true));
    let head = driver.add(&chain);
    driver.kick();
    let (used, len) = driver.wait();
    assert_eq!(used, head);
    (driver.load(STATUS, 1)[0], len)
}

#[test]
fn what_is_written_is_read_back_also_after_a_reset() {
    let memory = memory();
    let file = file_of(&[0; 8192]);
    let mut block = whole(&file, false);
    let mut driver = Driver::new(&memory, 0, 16);
    activate(&mut block, &memory, &[&driver]);
    let pattern: Vec<u8> = (0..=255).cycle().take(1536).collect();
    driver.store(DATA, &pattern);
    let pieces = [(DATA, 100, false), (DATA + 100, 1436, false)];
    assert_eq!(request(&mut driver, OUT, 3, &pieces), (OK, 1));
    assert_eq!(request(&mut driver, FLUSH, 0, &[]), (OK, 1));
    assert_eq!(content(&file, 3 * 512, 1536), pattern);
    block.reset();

    let mut driver = Driver::new(&memory, 0, 16);
    activate(&mut block, &memory, &[&driver]);
    let pieces = [(DATA + 0x4000, 1000, true), (DATA + 0x8000, 536, true)];
    assert_eq!(request(&mut driver, IN, 3, &pieces), (OK, 1537));
    let mut back = driver.load(DATA + 0x4000, 1000);
    back.extend(driver.load(DATA + 0x8000, 536));
    assert_eq!(back, pattern);
    let serial = [(DATA, 20, true)];
    assert_eq!(request(&mut driver, GET_ID, 0, &serial), (OK, 21));
    assert_eq!(driver.load(DATA, 20), b"disk-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

/// The number of sectors the driver reads.
fn capacity(block: &Block) -> u64 {
    let mut sectors = [0; 8];
    block.read_config(0, &mut sectors);
    u64::from_le_bytes(sectors)
}

#[test]
fn an_empty_disk_gets_bytes_while_the_driver_runs() {
    let memory = memory();
    let mut block = Block::new("slot", false, Backing::Empty, 1).unwrap();
    let exchanger = block.exchanger();
    let mut driver = Driver::new(&memory, 0, 16);
    let told = Arc::new(EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap());
    let activation = Activation {
        memory: memory.clone(),
        features: block.features(),
        queues: vec![Some(driver.active())],
        config_interrupt: told.clone(),
    };
    block.activate(activation).unwrap();
    let sector = [(DATA, 512, true)];
    assert_eq!(capacity(&block), 0);
    assert_eq!(request(&mut driver, IN, 0, &sector).0, IOERR);
    assert_eq!(request(&mut driver, FLUSH, 0, &[]).0, OK);

    let file = file_of(&[7; 1024]);
    let whole = || Backing::Whole(file.try_clone().unwrap());
    assert_eq!(exchanger.exchange(false, whole()).unwrap(), 1024);
    assert_eq!(told.read().unwrap(), 1, "the driver is told");
    assert_eq!(block.config_generation(), 1);
    assert_eq!(capacity(&block), 2);
    assert_eq!(request(&mut driver, IN, 1, &sector), (OK, 513));
    assert_eq!(driver.load(DATA, 512), [7; 512]);
    let from = [(DATA, 512, false)];
    driver.store(DATA, &[8; 512]);
    assert_eq!(request(&mut driver, OUT, 0, &from), (OK, 1));
    assert_eq!(content(&file, 0, 512), [8; 512]);

    exchanger.exchange(true, whole()).unwrap();
    assert_eq!(request(&mut driver, IN, 0, &sector).0, OK);
    assert_eq!(request(&mut driver, OUT, 0, &from).0, IOERR);
    let odd = Backing::Whole(file_of(&[0; 100]));
    assert!(matches!(
        exchanger.exchange(false, odd),
        Err(BlockError::Size { .. })
    ));
    assert_eq!(capacity(&block), 2, "as before");

    exchanger.exchange(false, Backing::Empty).unwrap();
    assert_eq!(capacity(&block), 0);
    assert_eq!(request(&mut driver, IN, 0, &sector).0, IOERR);
    assert_eq!(told.read().unwrap(), 2);
}

/// A file of this size that is read and written without the page cache; none, with the
/// reason on stderr, where the file system of the build has no such thing.
fn uncached(len: u64) -> Option<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let file = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
    file.as_file().set_len(len).unwrap();
    let mut options = File::options();
    options.read(true).write(true).custom_flags(libc::O_DIRECT);
    let opened = options.open(file.path());
    if let Err(error) = &opened {
        eprintln!("skipped: no O_DIRECT here: {error}");
    }
    opened.ok()
}

/// The driver's buffers are anywhere; some devices want them aligned.
#[test]
fn without_the_page_cache_buffers_may_be_anywhere() {
    let Some(file) = uncached(1 << 20) else {
        return;
    };
    let memory = memory();
    let mut block = whole(&file, false);
    let mut driver = Driver::new(&memory, 0, 16);
    activate(&mut block, &memory, &[&driver]);
    let len = 72 << 10;
    let pattern: Vec<u8> = (0..=250).cycle().take(len).collect();
    let size = u32::try_from(len).unwrap();
    for at in [0, 3] {
        let (to, from) = (DATA + at, DATA + 0x8_0000 + at);
        driver.store(to, &pattern);
        let pieces = [(to, 101, false), (to + 101, size - 101, false)];
        assert_eq!(request(&mut driver, OUT, 8, &pieces), (OK, 1));
        let pieces = [(from, 4096, true), (from + 4096, size - 4096, true)];
        assert_eq!(request(&mut driver, IN, 8, &pieces), (OK, size + 1));
        assert!(driver.load(from, len) == pattern, "at {at}");
        driver.store(DATA, &range(0, 256, 0));
        let zeroes = [(DATA, 16, false)];
        assert_eq!(request(&mut driver, WRITE_ZEROES, 0, &zeroes), (OK, 1));
    }
}

#[test]
fn drivers_are_told_of_the_sectors_that_the_host_s_disk_has() {
    let told = |sector_bytes| {
        let file = file_of(&[0; 8192]);
        let flags = nix::fcntl::OFlag::O_RDWR;
        let whole = whole::Whole::of(file, sector_bytes, flags)?;
        let disk = Disk::of_whole(false, 8192, whole, "the disk").unwrap();
        let config = device::config(&disk, false, 1);
        let field = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
        // Capacity stays in sectors of 512 bytes.
        Some((field(0), field(20)))
    };
    assert_eq!(told(512), Some((16, 512)));
    assert_eq!(told(4096), Some((16, 4096)));
    for unknown in [0, 256, 520, 8192] {
        assert_eq!(told(unknown), None);
    }
    let odd = whole::Whole::of(file_of(&[0; 8192]), 4096, nix::fcntl::OFlag::O_RDWR).unwrap();
    let error = Disk::of_whole(false, 4096 + 512, odd, "the disk").unwrap_err();
    assert!(error.to_string().contains("multiple of 4096"), "{error}");
}

/// A driver that writes the start of a disk, three requests at a time, so that there is
/// one under way while it hears of the end of another.
fn write_until(stop: &AtomicBool, driver: &mut Driver<'_>, done: &AtomicU32) {
    for byte in (0..=u8::MAX).cycle() {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        driver.store(HEADER, &header(OUT, 0));
        for (place, more) in (1..=3_u64).zip(0..) {
            let data = DATA + (place << 20);
            driver.store(data, &vec![byte.wrapping_add(more); 1 << 20]);
            let status = (HEADER + 16 + place, 1, true);
            driver.add(&[(HEADER, 16, false), (data, 1 << 20, false), status]);
        }
        driver.kick();
        for _ in 0..3 {
            while driver.poll().is_none() {
                std::thread::yield_now();
            }
            done.fetch_add(1, Ordering::Relaxed);
        }
        assert_eq!(driver.load(HEADER + 17, 3), [OK; 3]);
    }
}

/// Waits until `count` more requests are done.
fn after(count: u32, done: &AtomicU32, traffic: &ScopedJoinHandle<'_, ()>) {
    let before = done.load(Ordering::Relaxed);
    while done.load(Ordering::Relaxed) < before + count && !traffic.is_finished() {
        std::thread::yield_now();
    }
}

/// Two files take turns while the driver writes without a pause.
#[test]
fn nothing_touches_the_bytes_a_disk_had() {
    let memory = memory();
    let files = [file_of(&[0; 1 << 20]), file_of(&[0; 1 << 20])];
    let mut block = Block::new("slot", false, Backing::Empty, 1).unwrap();
    let exchanger = block.exchanger();
    let give = |file: &File| {
        let backing = Backing::Whole(file.try_clone().unwrap());
        exchanger.exchange(false, backing).unwrap();
    };
    give(&files[1]);
    let mut driver = Driver::new(&memory, 0, 16);
    activate(&mut block, &memory, &[&driver]);
    let (done, stop) = (AtomicU32::new(0), AtomicBool::new(false));
    let touched = std::thread::scope(|scope| {
        let traffic = scope.spawn(|| write_until(&stop, &mut driver, &done));
        let touched = (0..50_usize).filter(|round| {
            let [new, old] = [round % 2, (round + 1) % 2].map(|index| &files[index]);
            after(1, &done, &traffic);
            give(new);
            let left = content(old, 0, 1 << 20);
            // With those that were under way when it was exchanged.
            after(4, &done, &traffic);
            content(old, 0, 1 << 20) != left
        });
        let touched = touched.count();
        stop.store(true, Ordering::Relaxed);
        touched
    });
    assert_eq!(touched, 0, "of 50 times");
    assert!(done.into_inner() >= 200, "the driver wrote meanwhile");
}

#[test]
fn each_queue_has_a_worker_and_they_share_the_file() {
    let memory = memory();
    let file = file_of(&[9; 4096]);
    let backing = Backing::Whole(file.try_clone().unwrap());
    let mut block = Block::new("", false, backing, 2).unwrap();
    assert_ne!(block.features() & (1 << spec::VIRTIO_BLK_F_MQ), 0);
    let mut drivers = [0, 1].map(|index| Driver::new(&memory, index, 16));
    activate(&mut block, &memory, &drivers.each_ref());
    for driver in &mut drivers {
        assert_eq!(request(driver, IN, 0, &[(DATA, 512, true)]), (OK, 513));
        assert_eq!(driver.load(DATA, 512), [9; 512]);
    }
    let again = block.activate(Activation {
        memory: memory.clone(),
        features: VIRTIO_F_VERSION_1,
        queues: vec![Some(drivers[0].active()), None],
        config_interrupt: Arc::new(EventFd::new(0).unwrap()),
    });
    assert!(again.is_err(), "it is active");
}

#[test]
fn requests_that_make_no_sense_are_answered_and_change_nothing() {
    let memory = memory();
    let file = file_of(&[7; 4096]);
    let mut block = whole(&file, false);
    let mut driver = Driver::new(&memory, 0, 16);
    activate(&mut block, &memory, &[&driver]);
    let cases: [(&str, u32, u64, &[Buffer]); 9] = [
        ("past the end", IN, 8, &[(DATA, 512, true)]),
        ("across the end", OUT, 7, &[(DATA, 1024, false)]),
        ("sector overflows", IN, u64::MAX / 512, &[(DATA, 512, true)]),
        ("end overflows", OUT, u64::MAX, &[(DATA, 512, false)]),
        ("part of a sector", IN, 0, &[(DATA, 100, true)]),
        ("read into what is to be read", IN, 0, &[(DATA, 512, false)]),
        (
            "write from what is to be written",
            OUT,
            0,
            &[(DATA, 512, true)],
        ),
        ("no data", IN, 0, &[]),
        ("short serial", GET_ID, 0, &[(DATA, 19, true)]),
    ];
    for (what, kind, sector, data) in cases {
        assert_eq!(request(&mut driver, kind, sector, data).0, IOERR, "{what}");
    }
    assert_eq!(request(&mut driver, 99, 0, &[]), (UNSUPP, 1));
    assert_eq!(request(&mut driver, IN, 7, &[(DATA, 512, true)]), (OK, 513));
    assert_eq!(content(&file, 0, 4096), [7; 4096]);
}

#[test]
fn malformed_chains_are_given_back() {
    let memory = memory();
    let file = file_of(&[7; 4096]);
    let mut block = whole(&file, false);
    let mut driver = Driver::new(&memory, 0, 16);
    activate(&mut block, &memory, &[&driver]);
    driver.store(HEADER, &header(OUT, 0));
    let huge = 3 << 30;
    let unanswered: [&[Buffer]; 3] = [
        &[(HEADER, 16, false), (DATA, 512, false)],
        &[(HEADER, 16, false), (DATA, huge, true), (STATUS, 1, true)],
        &[(HEADER, 16, false), (1 << 40, 1, true)],
    ];
    for chain in unanswered {
        let head = driver.add(chain);
        driver.kick();
        assert_eq!(driver.wait(), (head, 0));
    }
    let answered: [&[Buffer]; 3] = [
        &[(HEADER, 8, false), (STATUS, 1, true)],
        &[(HEADER, 16, false), (DATA, huge, false), (STATUS, 1, true)],
        &[(STATUS, 1, true)],
    ];
    for chain in answered {
        driver.store(STATUS, &[0xff]);
        let head = driver.add(chain);
        driver.kick();
        assert_eq!(driver.wait(), (head, 1));
        assert_eq!(driver.load(STATUS, 1), [IOERR]);
    }
    assert_eq!(request(&mut driver, IN, 0, &[(DATA, 512, true)]).0, OK);
    assert_eq!(content(&file, 0, 4096), [7; 4096]);
}

#[test]
fn nothing_writes_a_read_only_disk() {
    let memory = memory();
    let file = file_of(&[7; 4096]);
    let mut block = whole(&file, true);
    assert_ne!(block.features() & (1 << spec::VIRTIO_BLK_F_RO), 0);
    for feature in [
        spec::VIRTIO_BLK_F_DISCARD,
        spec::VIRTIO_BLK_F_WRITE_ZEROES,
        spec::VIRTIO_BLK_F_FLUSH,
    ] {
        assert_eq!(block.features() & (1 << feature), 0);
    }
    let mut driver = Driver::new(&memory, 0, 16);
    activate(&mut block, &memory, &[&driver]);
    driver.store(DATA, &range(0, 8, 0));
    assert_eq!(
        request(&mut driver, OUT, 0, &[(DATA, 512, false)]),
        (IOERR, 1)
    );
    for kind in [DISCARD, WRITE_ZEROES] {
        assert_eq!(
            request(&mut driver, kind, 0, &[(DATA, 16, false)]),
            (IOERR, 1)
        );
    }
    assert_eq!(request(&mut driver, FLUSH, 0, &[]), (OK, 1));
    assert_eq!(content(&file, 0, 4096), [7; 4096]);
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zeroes() {
    let memory = memory();
    let file = file_of(&[7; 1 << 16]);
    let mut block = whole(&file, false);
    let mut driver = Driver::new(&memory, 0, 16);
    activate(&mut block, &memory, &[&driver]);
    let cases = [
        (DISCARD, 0, 8, 0),
        (WRITE_ZEROES, 16, 9, 0),
        (WRITE_ZEROES, 32, 8, 1),
    ];
    for (kind, sector, sectors, flags) in cases {
        driver.store(DATA, &range(sector, sectors, flags));
        assert_eq!(request(&mut driver, kind, 0, &[(DATA, 16, false)]), (OK, 1));
        let len = usize::try_from(sectors).unwrap() * 512;
        assert_eq!(content(&file, sector * 512, len), vec![0; len]);
        assert_eq!(content(&file, sector * 512 + len as u64, 512), [7; 512]);
    }
    let refused = [
        (DISCARD, range(0, 8, 1), UNSUPP),
        (WRITE_ZEROES, range(0, 8, 2), UNSUPP),
        (DISCARD, range(127, 2, 0), IOERR),
        (DISCARD, range(0, 0, 0), IOERR),
        (WRITE_ZEROES, range(0, u32::MAX, 0), IOERR),
        (DISCARD, range(u64::MAX, 1, 0), IOERR),
    ];
    for (kind, bytes, status) in refused {
        driver.store(DATA, &bytes);
        let answer = request(&mut driver, kind, 0, &[(DATA, 16, false)]);
        assert_eq!(answer, (status, 1), "{bytes:?}");
    }
    let many = [(DATA, 33 * 16, false)];
    assert_eq!(request(&mut driver, DISCARD, 0, &many), (IOERR, 1));
    assert_eq!(content(&file, 0, 1 << 16).len(), 1 << 16, "size is kept");
}

#[test]
fn files_are_partitions_with_zeroes_past_their_end() {
    let memory = memory();
    let files = vec![file_of(&[1; 5000]), file_of(&[2; 100])];
    let gpt = gpt::Gpt::new("layers", &[5000, 100]).unwrap();
    let mut block = Block::new("layers", true, Backing::Partitions(files), 1).unwrap();
    let mut driver = Driver::new(&memory, 0, 16);
    activate(&mut block, &memory, &[&driver]);
    let size = u32::try_from(gpt.size).unwrap();
    let all = [(DATA + 0x20_0000, size, true)];
    assert_eq!(request(&mut driver, IN, 0, &all), (OK, size + 1));
    let read = driver.load(DATA + 0x20_0000, usize::try_from(size).unwrap());

    let mut expected = vec![0; read.len()];
    let mut put = |start: u64, bytes: &[u8]| {
        let start = usize::try_from(start).unwrap();
        expected[start..start + bytes.len()].copy_from_slice(bytes);
    };
    put(0, &gpt.head);
    put(gpt.starts[0], &[1; 5000]);
    put(gpt.starts[1], &[2; 100]);
    put(gpt.tail_start, &gpt.tail);
    assert!(read == expected);
    let sector = gpt.starts[0] / 512 + 9;
    assert_eq!(
        request(&mut driver, IN, sector, &[(DATA, 1024, true)]).0,
        OK
    );
    let mut tail = vec![1; 5000 - 9 * 512];
    tail.resize(1024, 0);
    assert_eq!(driver.load(DATA, 1024), tail);
}

#[test]
fn a_file_that_shrinks_is_an_error_to_the_guest() {
    let memory = memory();
    let file = file_of(&[1; 8192]);
    let mut block = whole(&file, true);
    let mut driver = Driver::new(&memory, 0, 16);
    activate(&mut block, &memory, &[&driver]);
    file.set_len(4096).unwrap();
    let beyond = [(DATA, 1024, true)];
    assert_eq!(request(&mut driver, IN, 7, &beyond), (IOERR, 0));
}

#[test]
fn configuration_space_says_what_the_disk_is() {
    let file = file_of(&[0; 10 * 512]);
    let block = whole(&file, false);
    let mut config = [0xff; 64];
    block.read_config(0, &mut config);
    assert_eq!(config[..8], 10u64.to_le_bytes());
    assert_eq!(config[12..16], 254u32.to_le_bytes());
    assert_eq!(config[20..24], 512u32.to_le_bytes());
    assert_eq!(config[34..36], 1u16.to_le_bytes());
    assert_eq!(config[40..44], 32u32.to_le_bytes());
    assert_eq!(config[56..], [1, 0, 0, 0, 0, 0, 0, 0]);
    let mut beyond = [0xff; 4];
    block.read_config(u64::MAX, &mut beyond);
    assert_eq!(beyond, [0; 4]);
}

#[test]
fn disks_no_guest_could_use_are_refused() {
    let refused = |serial: &str, read_only, backing, queues| {
        Block::new(serial, read_only, backing, queues)
            .map(|_| ())
            .unwrap_err()
    };
    let file = || Backing::Whole(file_of(&[0; 512]));
    let odd = refused("", true, Backing::Whole(file_of(&[0; 100])), 1);
    assert!(odd.to_string().contains("has 100 bytes"), "{odd}");
    let empty = refused("", true, Backing::Whole(file_of(&[])), 1);
    assert!(matches!(empty, BlockError::Size { bytes: 0, .. }));
    let long = refused("x".repeat(21).as_str(), true, file(), 1);
    assert!(matches!(long, BlockError::Serial(_)));
    for queues in [0, 65] {
        let error = refused("", true, file(), queues);
        assert!(matches!(error, BlockError::Queues(_)));
    }
    let partitions = |files| Backing::Partitions(files);
    let written = refused("", false, partitions(vec![file_of(&[1])]), 1);
    assert!(matches!(written, BlockError::WritablePartitions));
    let none = refused("", true, partitions(vec![]), 1);
    assert!(matches!(none, BlockError::Partitions(0)));
    let hollow = refused("", true, partitions(vec![file_of(&[1]), file_of(&[])]), 1);
    assert_eq!(hollow.to_string(), "the file of partition 2 is empty");
    let named = tempfile::NamedTempFile::new().unwrap();
    named.as_file().set_len(512).unwrap();
    let reader = Backing::Whole(File::open(named.path()).unwrap());
    let error = refused("", false, reader, 1);
    assert!(matches!(error, BlockError::NotWritable(_)));
}

/// Sizes that are likely to be right, or wrong in interesting ways.
fn len() -> impl Strategy<Value = u32> {
    prop_oneof![
        Just(1u32),
        Just(16),
        Just(20),
        Just(512),
        Just(4096),
        0u32..70_000,
        any::<u32>()
    ]
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        // The rings themselves, the requests, the end of memory, anywhere.
        0u64..0x4000,
        Just(HEADER),
        DATA..DATA + 0x10_0000,
        (16u64 << 20) - 0x1000..(16 << 20) + 0x1000,
        any::<u64>()
    ]
}

/// Address, length, flags, next.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let next = prop_oneof![4 => 0u16..16, 1 => any::<u16>()];
    (address(), len(), 0u16..8, next)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn no_chain_stops_the_worker(
        table in proptest::collection::vec(descriptor(), 16),
        heads in proptest::collection::vec(prop_oneof![8 => 0u16..16, 1 => any::<u16>()], 16),
        avail in prop_oneof![4 => 0u16..=16, 1 => any::<u16>()],
        (kind, sector) in (0u32..16, prop_oneof![0u64..32, any::<u64>()]),
        read_only in any::<bool>(),
    ) {
        let memory = memory();
        let driver = Driver::new(&memory, 0, 16);
        for (index, &(address, len, flags, next)) in (0u64..).zip(&table) {
            driver.store(16 * index, &address.to_le_bytes());
            driver.store(16 * index + 8, &len.to_le_bytes());
            driver.store(16 * index + 12, &flags.to_le_bytes());
            driver.store(16 * index + 14, &next.to_le_bytes());
        }
        driver.store(HEADER, &header(kind, sector));
        driver.store(HEADER + 16, &range(sector, 8, 0));
        let ring: Vec<u8> = heads.iter().flat_map(|head| head.to_le_bytes()).collect();
        driver.store(0x2004, &ring);
        driver.store(0x2002, &avail.to_le_bytes());
        let backing = Backing::Whole(file_of(&[0xa5; 1 << 16]));
        let disk = Disk::open("", read_only, backing).unwrap();
        let service = Service::new(disk, [0; 20]);
        let mut ring = Ring::new(&memory, driver.active());
        let mut server = Server::new(&memory, &service, false);
        // Bounded however the disk's bytes, read into the rings, change them.
        let ended = (0..10_000).any(|_| !matches!(ring.work(|chain| server.answer(chain)), Ok(true)));
        prop_assert!(ended);
    }
}
