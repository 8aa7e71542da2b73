//! Which of a device's capabilities the guest sees (PCI Express base 7.5 to 7.9).
//!
//! An allow-list: MSI and MSI-X, which we emulate; PCI Express, of which the guest
//! drives device control, but for function-level reset, and nothing of the link; vendor-specific
//! ones, serial number. Power management, ASPM, VPD, SR-IOV, access control, address translation, resizable
//! BARs and the rest concern the host, and are not there.

use super::config::{Bar, Bytes, CONVENTIONAL_SIZE, SIZE, Source};
use crate::pci::msix;
use crate::pci::registers::express::{
    DEVICE_CAPABILITIES, DEVICE_CAPABILITIES_2, DEVICE_CONTROL, DEVICE_CONTROL_2, FLAGS,
    LINK_CAPABILITIES, LINK_CONTROL, LINK_STATUS,
};
use crate::pci::registers::{
    CAPABILITIES, EXPRESS, FIRST_CAPABILITY, MSI, MSI_64, MSI_ENABLE, MSIX, VENDOR_SPECIFIC,
};
use crate::pci::root_port::Link;

/// Where extended capabilities begin.
const EXTENDED: usize = CONVENTIONAL_SIZE;

/// Extended capability ids: device serial number, vendor-specific, designated
/// vendor-specific; none.
const SERIAL_NUMBER: u16 = 0x03;
const VENDOR_EXTENDED: u16 = 0x0b;
const DESIGNATED_VENDOR: u16 = 0x23;
const HIDDEN: u32 = 0xffff;

/// MSI message control: vectors that are enabled, per-vector masks.
const MSI_ENABLED_VECTORS: u16 = 0b111 << 4;
const MSI_MASKS: u16 = 1 << 8;
const MSI_EXTENDED_DATA: u16 = 0b11 << 9;
/// MSI-X message control: enable.
pub const MSIX_ENABLE: u16 = 1 << 15;
/// MSI-X message control: size of the table.
const MSIX_SIZE: u16 = 0x7ff;
/// The most vectors a guest is offered: a page of table entries, and more than it
/// has vCPUs.
pub const MAX_VECTORS: u16 = 256;

/// How long the PCI Express capability is.
const EXPRESS_END: usize = 0x3c;
/// Up to the link registers: what version 1 has of an endpoint.
const EXPRESS_1_END: usize = 0x14;
/// Device capabilities: there is function-level reset; device control, second byte: begin it.
const FUNCTION_RESET: u32 = 1 << 28;
const BEGIN_RESET: u8 = 1 << 7;
/// Flags: the type, of which 0 is an endpoint and 9 one that is part of the root complex.
const TYPE_MASK: u8 = 0xf0;
const TYPE_INTEGRATED: u8 = 9 << 4;
/// Link capabilities: ASPM, exit latencies and clock power management.
const LINK_POWER: u32 = 0b11 << 10 | 0b111 << 12 | 0b111 << 15 | 1 << 18;
/// Device capabilities 2: LTR and OBFF.
const POWER_2: u32 = 1 << 11 | 0b11 << 18;

/// MSI, as far as it is needed to read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiLayout {
    /// Offset of message control.
    pub control: usize,
    /// The address has 64 bits.
    pub wide: bool,
    /// Most vectors, a power of two.
    pub vectors: u16,
}

/// MSI-X: where its table and pending bits are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsixLayout {
    /// Offset of message control.
    pub control: usize,
    /// Vectors the guest is offered.
    pub vectors: u16,
    /// Vectors the device has. None of their entries is for the guest to reach.
    pub entries: u16,
    /// BAR of the table, and offset in it.
    pub table: (usize, u64),
    /// BAR of the pending bits, and offset in it.
    pub pending: (usize, u64),
}

impl MsixLayout {
    /// Bytes of the table.
    #[must_use]
    pub fn table_len(self) -> u64 {
        u64::from(self.entries) * 16
    }

    /// Bytes of pending bits: 64 to a word.
    #[must_use]
    pub fn pending_len(self) -> u64 {
        u64::from(self.entries).div_ceil(64) * 8
    }
}

/// Where the capabilities are that we act on.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// MSI.
    pub msi: Option<MsiLayout>,
    /// MSI-X.
    pub msix: Option<MsixLayout>,
    /// The link, of a PCI Express device that has one.
    pub link: Option<Link>,
}

/// Leaves of the `size` bytes of configuration space what the guest may have, in
/// lists of their own.
pub fn filter(bytes: &mut Bytes, size: usize, bars: &[Bar]) -> Layout {
    let mut layout = Layout::default();
    let all_end = size.clamp(FIRST_CAPABILITY, EXTENDED);
    let found = conventional(bytes, all_end);
    bytes.source[FIRST_CAPABILITY..all_end].fill(Source::Device);
    let mut last_pointer = CAPABILITIES;
    bytes.ours[CAPABILITIES] = 0;
    for (index, at) in found.iter().copied().enumerate() {
        let end = end_of(&found, at, all_end);
        bytes.ours[at + 1] = 0;
        let id = bytes.ours[at];
        let again = found[..index].iter().any(|other| bytes.ours[*other] == id);
        if again && id != VENDOR_SPECIFIC || !keep(bytes, at, end, bars, &mut layout) {
            bytes.ours[at..end].fill(0);
            bytes.source[at..end].fill(Source::Ours);
            continue;
        }
        bytes.source[at] = Source::Ours;
        bytes.source[at + 1] = Source::Ours;
        bytes.ours[last_pointer] = u8::try_from(at).unwrap_or(0);
        last_pointer = at + 1;
    }
    extended(bytes, size);
    layout
}

/// Offsets of the capabilities that begin before `end`, in the order of the list, each once.
fn conventional(bytes: &Bytes, end: usize) -> Vec<usize> {
    let mut found = Vec::new();
    let mut at = usize::from(bytes.ours[CAPABILITIES] & !3);
    while at >= FIRST_CAPABILITY && at + 2 <= end && !found.contains(&at) {
        found.push(at);
        at = usize::from(bytes.ours[at + 1] & !3);
    }
    found
}

/// Where a capability must have ended: at the next one, or at `end`.
fn end_of(found: &[usize], at: usize, end: usize) -> usize {
    let later = found.iter().copied().filter(|other| *other > at);
    later.min().unwrap_or(end)
}

/// Prepares a capability for the guest; `false` if it is not to have it.
fn keep(bytes: &mut Bytes, at: usize, end: usize, bars: &[Bar], layout: &mut Layout) -> bool {
    match bytes.ours[at] {
        MSI => keep_msi(bytes, at, end, layout),
        MSIX => keep_msix(bytes, at, end, bars, layout),
        EXPRESS => keep_express(bytes, at, end, layout),
        VENDOR_SPECIFIC => {
            let len = usize::from(bytes.ours[at + 2]);
            let end = (at + len).min(end);
            if end > at + 2 {
                bytes.pass_on(at + 2..end);
            }
            true
        }
        _ => false,
    }
}

fn keep_msi(bytes: &mut Bytes, at: usize, end: usize, layout: &mut Layout) -> bool {
    let mut control = u16_at(bytes, at + 2);
    let wide = control & MSI_64 != 0;
    let len = if wide { 14 } else { 10 };
    if at + len > end {
        return false;
    }
    let vectors = 1 << (control >> 1 & 0b111).min(5);
    control &= !(MSI_ENABLE | MSI_ENABLED_VECTORS | MSI_MASKS | MSI_EXTENDED_DATA);
    put(bytes, at + 2, &control.to_le_bytes());
    bytes.ours[at + 4..end].fill(0);
    bytes.source[at..end].fill(Source::Ours);
    let control = (MSI_ENABLE | MSI_ENABLED_VECTORS).to_le_bytes();
    allow(bytes, at + 2, &control);
    allow(bytes, at + 4, &[0xfc, 0xff, 0xff, 0xff]);
    bytes.writable[at + 8..at + len].fill(0xff);
    layout.msi = Some(MsiLayout {
        control: at + 2,
        wide,
        vectors,
    });
    true
}

fn keep_msix(bytes: &mut Bytes, at: usize, end: usize, bars: &[Bar], layout: &mut Layout) -> bool {
    if at + 12 > end {
        return false;
    }
    let entries = (u16_at(bytes, at + 2) & MSIX_SIZE) + 1;
    let vectors = entries.min(MAX_VECTORS);
    let place = |register: usize| {
        let value = u32_at(bytes, register);
        let bar = (value & 0b111) as usize;
        (bar, u64::from(value & !0b111))
    };
    let msix = MsixLayout {
        control: at + 2,
        vectors,
        entries,
        table: place(at + 4),
        pending: place(at + 8),
    };
    let fits = |(index, offset): (usize, u64), len: u64| {
        let bar = bars.iter().find(|bar| bar.index == index);
        bar.is_some_and(|bar| !bar.is_io() && offset + len <= bar.size)
    };
    if !fits(msix.table, msix.table_len()) || !fits(msix.pending, msix.pending_len()) {
        return false;
    }
    bytes.source[at..at + 12].fill(Source::Ours);
    put(bytes, at + 2, &(vectors - 1).to_le_bytes());
    allow(bytes, at + 2, &[0, msix::ENABLE | msix::FUNCTION_MASK]);
    layout.msix = Some(msix);
    true
}

fn keep_express(bytes: &mut Bytes, at: usize, end: usize, layout: &mut Layout) -> bool {
    let version = bytes.ours[at + FLAGS] & 0xf;
    let len = if version >= 2 {
        EXPRESS_END
    } else {
        EXPRESS_1_END
    };
    if at + len > end {
        return false;
    }
    bytes.source[at..at + len].fill(Source::Ours);
    let payload = bytes.ours[at + DEVICE_CAPABILITIES] & 7;
    clear(bytes, at + DEVICE_CAPABILITIES, FUNCTION_RESET);
    if bytes.ours[at + FLAGS] & TYPE_MASK == TYPE_INTEGRATED {
        // An endpoint behind a port has a link.
        put(bytes, at + LINK_CAPABILITIES, &0x11u32.to_le_bytes());
        put(bytes, at + LINK_STATUS, &0x11u16.to_le_bytes());
    }
    bytes.ours[at + FLAGS] &= !TYPE_MASK;
    clear(bytes, at + LINK_CAPABILITIES, LINK_POWER);
    put(bytes, at + LINK_CONTROL, &[0; 2]);
    bytes.pass_on(at + DEVICE_CONTROL..at + LINK_CAPABILITIES);
    bytes.writable[at + DEVICE_CONTROL + 1] = !BEGIN_RESET;
    if version >= 2 {
        clear(bytes, at + DEVICE_CAPABILITIES_2, POWER_2);
        bytes.pass_on(at + DEVICE_CONTROL_2..at + DEVICE_CONTROL_2 + 2);
    }
    let link = u32_at(bytes, at + LINK_CAPABILITIES);
    layout.link = Some(Link {
        speed: bytes.ours[at + LINK_CAPABILITIES] & 0xf,
        width: u8::try_from(link >> 4 & 0x3f).unwrap_or(1),
        payload,
    });
    true
}

/// The list of extended capabilities. One at its head that is hidden stays as a header
/// that says nothing, because the list begins there.
fn extended(bytes: &mut Bytes, size: usize) {
    let mut found = Vec::new();
    let mut at = EXTENDED;
    while at >= EXTENDED && at + 4 <= size && !found.contains(&at) {
        let header = u32_at(bytes, at);
        if header == 0 || header == u32::MAX {
            break;
        }
        found.push(at);
        at = (header >> 20) as usize & !3;
    }
    let original = bytes.ours;
    bytes.ours[EXTENDED..].fill(0);
    let mut last = None;
    for at in found.iter().copied() {
        let end = end_of(&found, at, size);
        let header = u32::from_le_bytes(array(&original, at));
        let Some(len) = kept_extended(&original, at, header, end) else {
            continue;
        };
        bytes.ours[at..at + len].copy_from_slice(&original[at..at + len]);
        let id_and_version = header & 0xf_ffff;
        put(bytes, at, &id_and_version.to_le_bytes());
        if header & 0xffff != u32::from(SERIAL_NUMBER) {
            bytes.pass_on(at + 8..at + len);
        }
        link_to(bytes, last, at);
        last = Some(at);
    }
}

/// Appends the capability at `at` to the list that ends at `last`.
fn link_to(bytes: &mut Bytes, last: Option<usize>, at: usize) {
    let from = last.unwrap_or(EXTENDED);
    if from == at {
        return;
    }
    let own = match last {
        Some(last) => u32_at(bytes, last) & 0xf_ffff,
        None => HIDDEN,
    };
    let next = u32::try_from(at).unwrap_or(0) << 20;
    put(bytes, from, &(own | next).to_le_bytes());
}

/// The length of an extended capability the guest is to have.
fn kept_extended(space: &[u8; SIZE], at: usize, header: u32, end: usize) -> Option<usize> {
    let second = || u32::from_le_bytes(array(space, at + 4));
    let len = match u16::try_from(header & 0xffff).ok()? {
        SERIAL_NUMBER => 12,
        VENDOR_EXTENDED | DESIGNATED_VENDOR => (second() >> 20) as usize,
        _ => return None,
    };
    (len >= 8 && at + len <= end).then_some(len)
}

fn u16_at(bytes: &Bytes, at: usize) -> u16 {
    let [low, high, ..] = array(&bytes.ours, at);
    u16::from_le_bytes([low, high])
}

fn u32_at(bytes: &Bytes, at: usize) -> u32 {
    u32::from_le_bytes(array(&bytes.ours, at))
}

/// Four bytes; zero past the end.
fn array(space: &[u8; SIZE], at: usize) -> [u8; 4] {
    let mut bytes = [0; 4];
    for (to, from) in bytes.iter_mut().zip(space.iter().skip(at)) {
        *to = *from;
    }
    bytes
}

fn put(bytes: &mut Bytes, at: usize, value: &[u8]) {
    for (to, from) in bytes.ours.iter_mut().skip(at).zip(value) {
        *to = *from;
    }
}

/// Hides bits of four bytes.
fn clear(bytes: &mut Bytes, at: usize, bits: u32) {
    let value = u32_at(bytes, at) & !bits;
    put(bytes, at, &value.to_le_bytes());
}

fn allow(bytes: &mut Bytes, at: usize, mask: &[u8]) {
    for (to, from) in bytes.writable.iter_mut().skip(at).zip(mask) {
        *to = *from;
    }
}
