//! Disks that get their bytes, or others, while a driver has them.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::Duration;

use super::*;

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
    assert_eq!(exchanger.exchange(1, false, whole()).unwrap(), 1024);
    assert_eq!(told.read().unwrap(), 1, "the driver is told");
    assert_eq!(block.config_generation(), 1);
    assert_eq!(capacity(&block), 2);
    assert_eq!(request(&mut driver, IN, 1, &sector), (OK, 513));
    assert_eq!(driver.load(DATA, 512), [7; 512]);
    let from = [(DATA, 512, false)];
    driver.store(DATA, &[8; 512]);
    assert_eq!(request(&mut driver, OUT, 0, &from), (OK, 1));
    assert_eq!(content(&file, 0, 512), [8; 512]);

    exchanger.exchange(2, true, whole()).unwrap();
    assert_eq!(request(&mut driver, IN, 0, &sector).0, OK);
    assert_eq!(request(&mut driver, OUT, 0, &from).0, IOERR);
    let odd = Backing::Whole(file_of(&[0; 100]));
    assert!(matches!(
        exchanger.exchange(3, false, odd),
        Err(BlockError::Size { .. })
    ));
    assert_eq!(capacity(&block), 2, "as before");

    exchanger.exchange(5, false, Backing::Empty).unwrap();
    exchanger.exchange(4, false, whole()).unwrap();
    assert_eq!(capacity(&block), 0, "the later one counts");
    assert_eq!(request(&mut driver, IN, 0, &sector).0, IOERR);
    assert_eq!(told.read().unwrap(), 3);
}

/// Layers of a container that joins the pod: each begins at a multiple of 1 MiB.
#[test]
fn an_empty_disk_gets_partitions() {
    let memory = memory();
    let mut block = Block::new("slot", false, Backing::Empty, 1).unwrap();
    let exchanger = block.exchanger();
    let mut driver = Driver::new(&memory, 0, 16);
    activate(&mut block, &memory, &[&driver]);
    let layers = || Backing::Partitions(vec![file_of(&[1; 4096]), file_of(&[2; 4096])]);
    assert!(exchanger.exchange(1, false, layers()).is_err());
    let size = exchanger.exchange(2, true, layers()).unwrap();
    assert_eq!(capacity(&block), size / 512);
    let sector = [(DATA, 512, true)];
    assert_eq!(request(&mut driver, IN, 1, &sector), (OK, 513));
    assert_eq!(driver.load(DATA, 8), b"EFI PART");
    for (start, byte) in [(2048, 1), (4096, 2)] {
        assert_eq!(request(&mut driver, IN, start, &sector), (OK, 513));
        assert_eq!(driver.load(DATA, 512), [byte; 512]);
    }
    assert_eq!(
        request(&mut driver, OUT, 2048, &[(DATA, 512, false)]).0,
        IOERR
    );
    exchanger.exchange(3, false, Backing::Empty).unwrap();
    assert_eq!(request(&mut driver, IN, 2048, &sector).0, IOERR);
}

/// While that waits for a device of the host.
#[test]
fn a_driver_asks_what_a_disk_is_while_that_is_exchanged() {
    let memory = memory();
    let file = file_of(&[7; 1024]);
    let mut block = whole(&file, false);
    let exchanger = block.exchanger();
    let mut driver = Driver::new(&memory, 0, 16);
    activate(&mut block, &memory, &[&driver]);
    let (done, answered) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        exchanger.while_busy(|| {
            let block = &block;
            scope.spawn(move || {
                let told = (capacity(block), block.config_generation());
                let serial = request(&mut driver, GET_ID, 0, &[(DATA, 20, true)]);
                done.send((told, serial, driver.load(DATA, 6))).unwrap();
            });
            let answer = answered.recv_timeout(Duration::from_secs(10));
            let (told, serial, name) = answer.expect("they wait");
            assert_eq!(told, (2, 0));
            assert_eq!((serial, name.as_slice()), ((OK, 21), &b"disk-1"[..]));
        });
    });
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
    let give = |number, file: &File| {
        let backing = Backing::Whole(file.try_clone().unwrap());
        exchanger.exchange(number, false, backing).unwrap();
    };
    give(1, &files[1]);
    let mut driver = Driver::new(&memory, 0, 16);
    activate(&mut block, &memory, &[&driver]);
    let (done, stop) = (AtomicU32::new(0), AtomicBool::new(false));
    let touched = std::thread::scope(|scope| {
        let traffic = scope.spawn(|| write_until(&stop, &mut driver, &done));
        let touched = (2_u64..).zip(0..50_usize).filter(|(number, round)| {
            let [new, old] = [round % 2, (round + 1) % 2].map(|index| &files[index]);
            after(1, &done, &traffic);
            give(*number, new);
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
