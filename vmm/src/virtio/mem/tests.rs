use super::*;
use crate::memory;
use crate::virtio::driver::Driver;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

const REQUEST: u64 = 0x10_0000;
const ANSWER: u64 = 0x10_1000;
/// Blocks of the region.
const COUNT: u64 = 8;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

struct Guest<'m> {
    memory: &'m GuestMemory,
    driver: Driver<'m>,
}

impl Guest<'_> {
    /// Sends a request; type and state of the answer.
    fn ask(&mut self, kind: u16, address: u64, count: u16) -> (u16, u16) {
        let mut request = [0; REQUEST_BYTES];
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&address.to_le_bytes());
        request[16..18].copy_from_slice(&count.to_le_bytes());
        self.memory
            .write_slice(&request, GuestAddress(REQUEST))
            .unwrap();
        let head = self.driver.add(&[(REQUEST, 24, false), (ANSWER, 10, true)]);
        self.driver.kick();
        assert_eq!(self.driver.wait(), (head, 10));
        let answer = self.driver.load(ANSWER, 10);
        let number = |at: usize| u16::from_le_bytes([answer[at], answer[at + 1]]);
        assert_eq!(answer[2..8], [0; 6]);
        (number(0), number(8))
    }
}

struct Setup {
    memory: GuestMemory,
    growth: Growth,
    device: Mem,
    resizer: Resizer,
    config_interrupt: Arc<EventFd>,
}

impl Setup {
    fn new() -> Self {
        let ram = memory::allocate(32, false).unwrap();
        let mib = u32::try_from((COUNT * BLOCK_BYTES) >> 20).unwrap();
        let (memory, growth) = memory::with_growth(&ram, mib).unwrap();
        let (device, resizer) = Mem::new(growth).unwrap();
        Self {
            memory,
            growth,
            device,
            resizer,
            config_interrupt: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
        }
    }

    fn activate<'m>(&mut self, memory: &'m GuestMemory) -> Guest<'m> {
        let driver = Driver::new(memory, 0, 16);
        self.device
            .activate(Activation {
                memory: memory.clone(),
                features: VIRTIO_F_VERSION_1,
                queues: vec![Some(driver.active())],
                config_interrupt: self.config_interrupt.clone(),
            })
            .unwrap();
        Guest { memory, driver }
    }

    /// Field of the configuration at a multiple of eight bytes.
    fn field(&self, index: u64) -> u64 {
        let mut bytes = [0; 8];
        self.device.read_config(index * 8, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn block(&self, index: u64) -> u64 {
        self.growth.start + index * BLOCK_BYTES
    }

    /// KiB of the region's file that exist.
    fn backed_kib(&self) -> u64 {
        let region = self.memory.find_region(GuestAddress(self.growth.start));
        let file = region.unwrap().file_offset().unwrap().file();
        std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) / 2
    }
}

#[test]
fn configuration_shows_region_and_sizes() {
    let setup = Setup::new();
    let region = COUNT * BLOCK_BYTES;
    let expected = [BLOCK_BYTES, 0, setup.growth.start, region, region, 0, 0];
    for (index, expected) in (0..).zip(expected) {
        assert_eq!(setup.field(index), expected, "field {index}");
    }
    setup.resizer.request(BLOCK_BYTES + 1);
    assert_eq!(setup.field(6), 2 * BLOCK_BYTES, "whole blocks");
    setup.resizer.request(u64::MAX);
    assert_eq!(setup.field(6), region, "no more than there is");
    let mut beyond = [7; 4];
    setup.device.read_config(54, &mut beyond);
    assert_eq!(beyond, [0; 4]);
}

#[test]
fn guest_plugs_what_was_asked_for_and_no_more() {
    let mut setup = Setup::new();
    let memory = setup.memory.clone();
    let mut guest = setup.activate(&memory);
    assert_eq!(guest.ask(PLUG, setup.block(0), 1).0, Response::NACK);
    setup.resizer.request(3 * BLOCK_BYTES);
    assert_eq!(setup.config_interrupt.read().unwrap(), 1);
    assert_eq!(guest.ask(PLUG, setup.block(0), 2).0, Response::ACK);
    assert_eq!(setup.resizer.changed().read().unwrap(), 1);
    assert_eq!(setup.resizer.plugged(), 2 * BLOCK_BYTES);
    assert_eq!(setup.field(5), 2 * BLOCK_BYTES);
    assert_eq!(guest.ask(PLUG, setup.block(2), 2).0, Response::NACK);
    assert_eq!(guest.ask(PLUG, setup.block(7), 1).0, Response::ACK);
    assert_eq!(guest.ask(STATE, setup.block(0), 2), (Response::ACK, 0));
    assert_eq!(guest.ask(STATE, setup.block(3), 2), (Response::ACK, 1));
    assert_eq!(guest.ask(STATE, setup.block(6), 2), (Response::ACK, 2));
    let changed = setup.resizer.changed().read().unwrap();
    assert_eq!(changed, 1, "refusals and questions change nothing");
}

#[test]
fn requests_that_make_no_sense_are_errors() {
    let mut setup = Setup::new();
    let memory = setup.memory.clone();
    let mut guest = setup.activate(&memory);
    setup.resizer.request(u64::MAX);
    let block = |index| setup.growth.start + index * BLOCK_BYTES;
    assert_eq!(guest.ask(PLUG, block(2), 2).0, Response::ACK);
    for (what, kind, address, count) in [
        ("already plugged", PLUG, block(1), 2),
        ("not plugged", UNPLUG, block(3), 2),
        ("before the region", PLUG, block(0) - BLOCK_BYTES, 1),
        ("after the region", PLUG, block(COUNT), 1),
        ("beyond its end", PLUG, block(COUNT - 1), 2),
        ("no blocks", PLUG, block(0), 0),
        ("half a block", PLUG, block(0) + BLOCK_BYTES / 2, 1),
        ("beyond its end", STATE, block(COUNT - 1), 2),
        (
            "at the end of addresses",
            STATE,
            u64::MAX - BLOCK_BYTES + 1,
            1,
        ),
        ("no type", 4, block(0), 1),
    ] {
        assert_eq!(guest.ask(kind, address, count).0, Response::ERROR, "{what}");
    }
    assert_eq!(setup.resizer.plugged(), 2 * BLOCK_BYTES);
}

#[test]
fn unplugged_pages_are_given_back() {
    let mut setup = Setup::new();
    let memory = setup.memory.clone();
    let mut guest = setup.activate(&memory);
    setup.resizer.request(u64::MAX);
    assert_eq!(guest.ask(PLUG, setup.block(0), 4).0, Response::ACK);
    // Whole blocks: a page may be as large.
    let block_kib = BLOCK_BYTES >> 10;
    let ones = vec![1; usize::try_from(BLOCK_BYTES).unwrap()];
    for index in 0..4 {
        let address = GuestAddress(setup.block(index));
        memory.write_slice(&ones, address).unwrap();
    }
    assert_eq!(setup.backed_kib(), 4 * block_kib);
    assert_eq!(guest.ask(UNPLUG, setup.block(1), 2).0, Response::ACK);
    assert_eq!(setup.backed_kib(), 2 * block_kib);
    let read = |index| -> u8 { memory.read_obj(GuestAddress(setup.block(index))).unwrap() };
    assert_eq!([read(0), read(1), read(2), read(3)], [1, 0, 0, 1]);
    assert_eq!(setup.resizer.plugged(), 2 * BLOCK_BYTES);
    assert_eq!(guest.ask(UNPLUG_ALL, 0, 0).0, Response::ACK);
    assert_eq!(setup.backed_kib(), 0);
    assert_eq!(setup.resizer.plugged(), 0);
}

#[test]
fn reset_keeps_memory_and_another_driver_goes_on() {
    let mut setup = Setup::new();
    let memory = setup.memory.clone();
    setup.resizer.request(2 * BLOCK_BYTES);
    let mut guest = setup.activate(&memory);
    assert_eq!(guest.ask(PLUG, setup.block(0), 2).0, Response::ACK);
    setup.device.reset();
    assert_eq!(setup.resizer.plugged(), 2 * BLOCK_BYTES);
    setup.resizer.request(BLOCK_BYTES);
    assert!(setup.config_interrupt.read().is_err(), "nobody listens");
    let mut guest = setup.activate(&memory);
    assert_eq!(guest.ask(UNPLUG, setup.block(1), 1).0, Response::ACK);
    assert_eq!(setup.resizer.plugged(), BLOCK_BYTES);
}
