//! Real devices behind a real IOMMU: QEMU's "edu", "nvme" for what a reset clears, "qemu-xhci" for one of a
//! whole card, and "ivshmem-plain" for a large BAR, which the lab has when it is booted with `--devices`. The
//! guest is a few dozen instructions that drive one; it powers off when all went well and resets when not.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::poll::{PollFd, PollFlags, poll};

use super::code::*;
use super::*;
use crate::layout::{ECAM_BUS_SIZE, ECAM_START};
use crate::vfio::open::{self, DeviceNodes};

mod hot_plug;

/// "edu" of QEMU (`docs/specs/edu.rst`).
pub const EDU: (&str, &str) = ("0x1234", "0x11e8");
/// "nvme" of QEMU.
const NVME: (&str, &str) = ("0x1b36", "0x0010");
/// "ivshmem-plain" of QEMU: memory in BAR 2.
const MEMORY: (&str, &str) = ("0x1af4", "0x1110");
const MEMORY_SIZE: u64 = 128 << 30;
/// "qemu-xhci" of QEMU: in the lab two functions of a card, which has no reset for one alone.
const XHCI: (&str, &str) = ("0x1b36", "0x000d");
const LIVENESS: u64 = BAR + 4;
/// The device's own memory.
const BUFFER: u32 = 0x4_0000;
/// Within the guest's memory, whose size is this.
const INSIDE: u32 = 0x20_0000;
const RESULT: u32 = 0x21_0000;

/// Its MSI capability, and the register that raises its interrupt.
const MSI: u64 = 0x40;
pub const RAISE: u64 = 0x60;
/// A register of the local APIC.
const APIC_REQUESTED: u64 = 0x200;

/// The address of a device, in the hands of vfio-pci and alone in its group; `None` where
/// there is none.
pub fn bound(id: (&str, &str)) -> Option<String> {
    bound_group(id, 1)?.pop()
}

/// Those of the first devices, by address, that are `count` together in a group.
fn bound_group(id: (&str, &str), count: usize) -> Option<Vec<String>> {
    let in_lab = std::env::var_os("LAB_DEVICES").is_some();
    let skip = |why: &str| {
        assert!(!in_lab, "{why}");
        eprintln!("skipped: {why}");
        None
    };
    if !Path::new("/dev/vfio/vfio").exists() {
        return skip("no VFIO");
    }
    let read = |path: &Path, name| fs::read_to_string(path.join(name)).unwrap_or_default();
    let members = |path: &Path| fs::read_dir(path.join("iommu_group/devices")).ok();
    let mut devices: Vec<_> = fs::read_dir("/sys/bus/pci/devices")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| (read(path, "vendor").trim(), read(path, "device").trim()) == id)
        .filter(|path| members(path).is_some_and(|members| members.count() == count))
        .collect();
    devices.sort();
    if devices.len() < count {
        return skip("no such device with an IOMMU (lab run --devices)");
    }
    let devices = devices.iter().take(count);
    let bound: Option<_> = devices.map(|device| bind(device, in_lab)).collect();
    bound.or_else(|| skip("the host drives it"))
}

/// Gives a device to vfio-pci, unless the host drives it: only the lab's may be taken from
/// their drivers.
fn bind(device: &Path, in_lab: bool) -> Option<String> {
    let address = device.file_name().unwrap().to_str().unwrap().to_owned();
    let driver = fs::read_link(device.join("driver")).ok();
    if driver
        .as_ref()
        .is_some_and(|driver| driver.ends_with("vfio-pci"))
    {
        return Some(address);
    }
    if driver.is_some() {
        if !in_lab {
            return None;
        }
        fs::write(device.join("driver/unbind"), &address).unwrap();
    }
    fs::write(device.join("driver_override"), "vfio-pci").unwrap();
    fs::write("/sys/bus/pci/drivers_probe", &address).unwrap();
    Some(address)
}

/// Runs `code` in a guest that has the edu device; `None` where there is none.
pub fn run(code: &[u8]) -> Option<Exits> {
    run_with(&bound(EDU)?, code)
}

/// Runs `code` in a guest with the device at `address`.
pub fn run_with(address: &str, code: &[u8]) -> Option<Exits> {
    run_as(&[address], PciOptions::default(), code)
}

/// Runs `code` in a guest with the devices at these addresses, behind root ports in this order.
fn run_as(addresses: &[&str], pci: PciOptions, code: &[u8]) -> Option<Exits> {
    let mut parts = parts(code, 1)?;
    let devices = addresses.iter().map(|address| DeviceNodes::of(address));
    let devices = devices.collect::<std::io::Result<Vec<_>>>().unwrap();
    parts.passthrough = Some(open::by_groups(Path::new("/dev"), &devices).unwrap());
    parts.pci = pci;
    let (outcome, exits) = end_of(Machine::new(parts).unwrap());
    assert_eq!(outcome, Outcome::Stopped(StopReason::Shutdown));
    Some(exits)
}

#[test]
fn guest_reaches_the_registers_without_an_exit() {
    let code = Code::new()
        .expect(CONFIG, 0x11e8_1234)
        .enable()
        .expect(BAR, 0x0100_00ed)
        .store(LIVENESS, 0x1234_5678)
        .expect(LIVENESS, !0x1234_5678)
        .power_off();
    let Some(exits) = run(&code) else { return };
    assert_eq!(
        (exits.mmio_reads, exits.mmio_writes),
        (1, 2),
        "configuration only"
    );
}

#[test]
fn dma_reaches_the_guest_s_memory() {
    let code = Code::new()
        .enable()
        .store(INSIDE.into(), 0xcafe_babe)
        .dma(INSIDE, BUFFER, 0)
        .dma(BUFFER, RESULT, TO_MEMORY)
        .expect(RESULT.into(), 0xcafe_babe)
        .power_off();
    run(&code);
}

/// The host's kernel is written and read where it lies: the IOMMU says so, and goes on
/// serving what is allowed. The kernel stays as it was, and nothing of it comes to the guest.
#[test]
fn dma_outside_the_guest_s_memory_faults() {
    if bound(EDU).is_none() {
        return;
    }
    let canary = Canary::find();
    let before = canary.read();
    let word = u32::from_le_bytes(*before.first_chunk().unwrap());
    let code = Code::new()
        .enable()
        .store(INSIDE.into(), !word)
        .dma(INSIDE, BUFFER, 0)
        .dma(BUFFER, canary.address, TO_MEMORY)
        .dma(canary.address, BUFFER, 0)
        .dma(BUFFER, RESULT, TO_MEMORY)
        .expect_not(RESULT.into(), word)
        .store(INSIDE.into(), 0xcafe_babe)
        .dma(INSIDE, BUFFER, 0)
        .dma(BUFFER, RESULT, TO_MEMORY)
        .expect(RESULT.into(), 0xcafe_babe)
        .power_off();
    let mut log = KernelLog::open();
    run(&code);
    for access in ["[DMA Write", "[DMA Read"] {
        log.find(&[access, &format!("fault addr {:#x}", canary.address)]);
    }
    assert!(canary.read() == before, "the host's kernel was written");
}

/// A page of the host kernel's read-only data: nobody but a device would change it.
/// `/proc/kcore` shows it, an ELF file whose segments say where in the machine's memory
/// they are (proc(5), elf(5)).
struct Canary {
    /// In the host's memory.
    address: u32,
    kcore: File,
    offset: u64,
}

impl Canary {
    const PAGE: u32 = 4096;

    /// The first page from the end, but for the last, that begins with a word which is
    /// not zero.
    fn find() -> Self {
        let ranges = fs::read_to_string("/proc/iomem").unwrap();
        let line = ranges.lines().find(|line| line.contains("Kernel rodata"));
        let (range, _) = line.unwrap().trim().split_once(' ').unwrap();
        let (first, last) = range.split_once('-').unwrap();
        let number = |hex| u32::from_str_radix(hex, 16).unwrap();
        let pages = number(first) / Self::PAGE..number(last) / Self::PAGE;
        let kcore = File::open("/proc/kcore").unwrap();
        let at = |page: u32| {
            let address = page * Self::PAGE;
            (address >= GUEST_SIZE).then_some(Self {
                address,
                offset: Self::offset(&kcore, address.into()),
                kcore: kcore.try_clone().unwrap(),
            })
        };
        let mut canaries = pages.rev().map_while(at);
        let found = canaries.find(|canary| canary.read().first_chunk() != Some(&[0; 4]));
        found.unwrap_or_else(|| panic!("no page of {range} is a canary"))
    }

    /// Where the file has a physical address.
    fn offset(kcore: &File, address: u64) -> u64 {
        let number = |at: u64| {
            let mut bytes = [0; 8];
            kcore.read_exact_at(&mut bytes, at).unwrap();
            u64::from_le_bytes(bytes)
        };
        let (headers, count) = (number(0x20), number(0x38) & 0xffff);
        let mut segments = (0..count).map(|index| headers + index * 56);
        let found = segments.find_map(|header| {
            let (physical, size) = (number(header + 0x18), number(header + 0x20));
            let within = address.checked_sub(physical)?;
            (within < size).then(|| number(header + 0x08) + within)
        });
        found.unwrap_or_else(|| panic!("/proc/kcore has no address {address:#x}"))
    }

    fn read(&self) -> Vec<u8> {
        let mut page = vec![0; Self::PAGE as usize];
        self.kcore.read_exact_at(&mut page, self.offset).unwrap();
        page
    }
}

/// What the host's kernel says from now on.
struct KernelLog(File);

impl KernelLog {
    fn open() -> Self {
        let mut log = File::open("/dev/kmsg").unwrap();
        log.seek(SeekFrom::End(0)).unwrap();
        Self(log)
    }

    /// Reads on until a message has all of `parts`.
    fn find(&mut self, parts: &[&str]) {
        let mut record = [0; 8192];
        loop {
            let ready = poll(
                &mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)],
                10_000u16,
            );
            assert_eq!(ready, Ok(1), "the kernel does not say {parts:?}");
            let len = self.0.read(&mut record).unwrap();
            let text = String::from_utf8_lossy(&record[..len]);
            if parts.iter().all(|part| text.contains(part)) {
                return;
            }
        }
    }
}

/// Interrupts stay off in the guest: it looks for the vector among those its local
/// APIC has received (Intel SDM volume 3, 11.8.4).
#[test]
fn msi_reaches_the_guest() {
    let apic = u64::from(layout::LAPIC);
    let code = Code::new()
        .enable()
        .store(apic + APIC_SPURIOUS, 0x1ff)
        .store(CONFIG + MSI + 4, layout::LAPIC)
        .store(CONFIG + MSI + 8, 0)
        .store(CONFIG + MSI + 12, VECTOR)
        .store(CONFIG + MSI, 1 << 16)
        .store(BAR + RAISE, 1)
        .wait_set(
            apic + APIC_REQUESTED + u64::from(VECTOR / 32 * 16),
            1 << (VECTOR % 32),
        )
        .power_off();
    run(&code);
}

/// Every end gives the device back, and the next guest finds it.
#[test]
fn device_goes_from_one_guest_to_the_next() {
    let leave = Code::new()
        .enable()
        .store(LIVENESS, 0x1234_5678)
        .power_off();
    let look = Code::new().enable().expect(BAR, 0x0100_00ed).power_off();
    for code in [&leave, &look, &look] {
        if run(code).is_none() {
            return;
        }
    }
}

/// Controller configuration (NVM Express base 2.0, 3.1.3.5): the entry sizes of queues, which
/// a disabled controller keeps until it is reset.
const CONFIGURATION: u64 = BAR + 0x14;
const CANARY: u32 = 0x0046_0000;

/// Device control in its PCI Express capability, and what begins a function-level reset.
const DEVICE_CONTROL: u64 = CONFIG + 0x88;
const BEGIN_RESET: u32 = 1 << 15;

/// Of what a guest left in a device that can be reset the next one finds nothing. It cannot
/// reset it itself.
#[test]
fn what_a_guest_left_in_a_device_is_gone() {
    let Some(address) = bound(NVME) else { return };
    let leave = Code::new()
        .enable()
        .expect(CONFIGURATION, 0)
        .store(CONFIGURATION, CANARY)
        .expect(CONFIGURATION, CANARY)
        .store(DEVICE_CONTROL, BEGIN_RESET)
        .expect(CONFIGURATION, CANARY)
        .power_off();
    let look = Code::new().enable().expect(CONFIGURATION, 0).power_off();
    for code in [&leave, &look] {
        if run_with(&address, code).is_none() {
            return;
        }
    }
}

/// `MaxSlotsEn` of the xHCI's CONFIG register (xHCI 1.2, 5.4.7), which is 0 after a reset.
const CARD_SLOTS: u64 = 0x78;

/// Neither function can be reset alone, and the bus of both can.
#[test]
fn functions_of_a_card_are_reset_together() {
    let Some(functions) = bound_group(XHCI, 2) else {
        return;
    };
    let functions: Vec<_> = functions.iter().map(String::as_str).collect();
    let slots = [BAR, SECOND_BAR].map(|bar| bar + CARD_SLOTS);
    let enable = || {
        let code = Code::new().enable().store(SECOND_PORT_CONFIG + 4, 6);
        code.store(SECOND_CONFIG + 4, 6)
    };
    let leave = slots.iter().fold(enable(), |code, at| {
        code.expect(*at, 0).store(*at, 7).expect(*at, 7)
    });
    let look = slots.iter().fold(enable(), |code, at| code.expect(*at, 0));
    for code in [leave, look] {
        if run_as(&functions, PciOptions::default(), &code.power_off()).is_none() {
            return;
        }
    }
}

/// Nothing of it stays: the next machine has the device.
#[test]
fn large_bar_without_room_is_refused_by_how_much() {
    let Some(address) = bound(MEMORY) else { return };
    let Some(mut parts) = parts(&Code::new().power_off(), 1) else {
        return;
    };
    parts.pci_slots = 1;
    let vm = Machine::new(parts).unwrap().vm;
    let devices = [DeviceNodes::of(&address).unwrap()];
    let place = |bits| {
        let opened = open::by_groups(Path::new("/dev"), &devices).unwrap();
        let mut space = None;
        let attached = opened.attach(&vm, &mut space).unwrap();
        let window = layout::window64(GUEST_SIZE.into(), bits);
        let placed = attached.place(&vm, &mut Placement::new(window, bits), None);
        placed.map(drop).map_err(|error| error.to_string())
    };
    let error = place(37).unwrap_err();
    // From 64 GiB on; it is as aligned as it is large.
    for part in [
        "need 192 GiB",
        "37 physical address bits leave 64 GiB",
        "128 GiB too little",
    ] {
        assert!(error.contains(part), "{error}");
    }
    place(39).unwrap();
}

/// The first and the last word of a BAR of 128 GiB are memory, and two words: they are there
/// for the next guest, since nothing resets this device.
#[test]
fn large_bar_is_reached_up_to_its_last_byte() {
    let Some(address) = bound(MEMORY) else { return };
    let (window, _) = layout::window64(GUEST_SIZE.into(), 48).unwrap();
    let bar = window.next_multiple_of(MEMORY_SIZE);
    let pages = [bar, bar + MEMORY_SIZE - u64::from(LARGE_PAGE)];
    let [first, last] = [HIGH, HIGH + 2 * LARGE_PAGE - 4].map(u64::from);
    let write = Code::new()
        .enable()
        .paging(&pages)
        .store(first, 0x1111_1111)
        .store(last, 0x9999_9999)
        .power_off();
    let read = Code::new()
        .enable()
        .paging(&pages)
        .expect(first, 0x1111_1111)
        .expect(last, 0x9999_9999)
        .power_off();
    for code in [&write, &read] {
        let Some(exits) = run_with(&address, code) else {
            return;
        };
        let counts = (exits.mmio_reads, exits.mmio_writes);
        assert_eq!(counts, (0, 2), "configuration only");
    }
}

/// "pci-testdev" of QEMU (`docs/specs/pci-testdev.rst`): a byte to its first port begins a test,
/// whose name is in the ports from 16 on, or ends it when there is no such test.
const TESTDEV: (&str, &str) = ("0x1b36", "0x0005");
/// The first that a device gets.
pub const PORT: u16 = 0x1000;

#[test]
fn guest_reaches_the_ports() {
    let Some(address) = bound(TESTDEV) else {
        return;
    };
    let code = Code::new()
        .expect_port(PORT + 16, 0xff)
        .enable()
        .output(PORT, 0)
        .expect_port(PORT + 16, b'p')
        .output(PORT, 0xff)
        .expect_port(PORT + 16, 0)
        .power_off();
    let Some(exits) = run_with(&address, &code) else {
        return;
    };
    assert_eq!((exits.port_reads, exits.port_writes), (3, 3));
}

/// The testdev's ROM, after its first BAR of a page: how it begins.
const ROM: u64 = BAR + 0x1000;
const ROM_REGISTER: u64 = CONFIG + 0x30;
const ROM_SIGNATURE: u32 = 0xcb04_aa55;

#[test]
fn guest_sees_the_rom_only_if_it_is_shown() {
    let Some(address) = bound(TESTDEV) else {
        return;
    };
    let hidden = Code::new()
        .enable()
        .store(ROM_REGISTER, u32::MAX)
        .expect(ROM_REGISTER, 0)
        .power_off();
    let enabled = u32::try_from(ROM).unwrap() | 1;
    let shown = Code::new()
        .enable()
        .expect(ROM_REGISTER, enabled - 1)
        .expect(ROM, u32::MAX)
        .store(ROM_REGISTER, enabled)
        .expect(ROM, ROM_SIGNATURE)
        .store(ROM, 0)
        .expect(ROM, ROM_SIGNATURE)
        .power_off();
    for (roms, code) in [(false, hidden), (true, shown)] {
        let options = PciOptions {
            roms,
            ..PciOptions::default()
        };
        if run_as(&[&address], options, &code).is_none() {
            return;
        }
    }
}

/// The second device's BAR, port and configuration space.
const SECOND_BAR: u64 = BAR + layout::MIB;
const SECOND_PORT_CONFIG: u64 = ECAM_START + (2 << 15);
const SECOND_CONFIG: u64 = ECAM_START + 2 * ECAM_BUS_SIZE;

/// One device writes a register of another, if they may reach each other; else it faults.
#[test]
fn device_reaches_another_one_only_if_it_may() {
    let (Some(edu), Some(nvme)) = (bound(EDU), bound(NVME)) else {
        return;
    };
    let register = SECOND_BAR + (CONFIGURATION - BAR);
    let code = |found: u32| {
        Code::new()
            .enable()
            .store(SECOND_PORT_CONFIG + 4, 6)
            .store(SECOND_CONFIG + 4, 6)
            .expect(register, 0)
            .store(INSIDE.into(), CANARY)
            .dma(INSIDE, BUFFER, 0)
            .dma(BUFFER, u32::try_from(register).unwrap(), TO_MEMORY)
            .expect(register, found)
            .power_off()
    };
    for (peers, found) in [(false, 0), (true, CANARY)] {
        let options = PciOptions {
            peers,
            ..PciOptions::default()
        };
        if run_as(&[&edu, &nvme], options, &code(found)).is_none() {
            return;
        }
    }
}
