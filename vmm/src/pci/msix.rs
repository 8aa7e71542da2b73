//! MSI-X (PCI Express base 7.7.2): the vector table, and interrupts by irqfd.
//!
//! A vector that its device is to signal has an eventfd for that and a GSI that KVM
//! turns into the message of the vector's table entry:
//!
//! ```text
//!   masked: eventfd counts, nobody reads it   (PBA bit = eventfd is readable)
//!      |  ^
//!      v  |   route the GSI to address and data, attach / detach the irqfd
//!   live: eventfd --irqfd--> GSI --> message to the vCPU
//! ```
//!
//! Attaching an irqfd delivers what its eventfd already counted, so pending
//! interrupts need no state of their own. A vector is live when MSI-X is enabled
//! and neither the function nor the vector is masked.
//!
//! Both are made when the device asks for the event ([`Msix::event`]), and stay until it goes
//! ([`Msix::release`]): GSIs and descriptors are few, and devices have hundreds of vectors
//! that no guest uses.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::config::ConfigSpace;
use super::registers::MSIX;
use crate::vm::{MsiRoute, Vm, VmError};

/// Message control, second byte: enable,
pub const ENABLE: u8 = 1 << 7;
/// and function mask.
pub const FUNCTION_MASK: u8 = 1 << 6;
/// Vector control: masked.
const VECTOR_MASK: u32 = 1;
/// Bytes of a table entry: address, data, vector control.
const ENTRY_SIZE: u64 = 16;

struct Vector {
    /// None until its event is asked for.
    wire: Option<Wire>,
    address: u64,
    data: u32,
    control: u32,
    /// The irqfd is attached.
    live: bool,
}

/// What connects a device to a vCPU.
struct Wire {
    event: Arc<EventFd>,
    gsi: u32,
}

/// A function's MSI-X state.
pub struct Msix {
    vm: Arc<Vm>,
    vectors: Vec<Vector>,
    on: bool,
}

impl Msix {
    /// `count` vectors, all masked.
    #[must_use]
    pub fn new(vm: &Arc<Vm>, count: u16) -> Self {
        Self {
            vm: vm.clone(),
            vectors: (0..count).map(|_| Vector::new()).collect(),
            on: false,
        }
    }

    /// Adds the capability of a device whose BAR 0 holds table and pending bits at
    /// the given offsets; returns the offset of message control.
    pub fn add_capability(&self, config: &mut ConfigSpace, table: u32, pending: u32) -> usize {
        let last = u16::try_from(self.vectors.len().saturating_sub(1)).unwrap_or(u16::MAX);
        let mut body = Vec::from(last.to_le_bytes());
        // The low bits of both offsets name the BAR, 0.
        body.extend(table.to_le_bytes());
        body.extend(pending.to_le_bytes());
        config.add_capability(MSIX, &body, &[0, ENABLE | FUNCTION_MASK]) + 2
    }

    /// The event of a vector; `None` if there is no such vector.
    ///
    /// # Errors
    ///
    /// When there is no event or GSI for it.
    pub fn event(&mut self, vector: u16) -> Result<Option<Arc<EventFd>>, VmError> {
        let Some(vector) = self.vectors.get_mut(usize::from(vector)) else {
            return Ok(None);
        };
        if let Some(wire) = &vector.wire {
            return Ok(Some(wire.event.clone()));
        }
        let wire = Wire::new(&self.vm)?;
        let event = wire.event.clone();
        vector.wire = Some(wire);
        vector.update(&self.vm, self.on);
        Ok(Some(event))
    }

    /// Whether the vector's entry lets it send.
    #[must_use]
    pub fn is_unmasked(&self, vector: u16) -> bool {
        let vector = self.vectors.get(usize::from(vector));
        vector.is_some_and(|vector| vector.control & VECTOR_MASK == 0)
    }

    /// Fills an entry as a guest would.
    pub fn set_entry(&mut self, vector: u16, route: MsiRoute, masked: bool) {
        if let Some(vector) = self.vectors.get_mut(usize::from(vector)) {
            (vector.address, vector.data) = (route.address, route.data);
            vector.control = if masked { VECTOR_MASK } else { 0 };
            vector.update(&self.vm, self.on);
        }
    }

    /// To be called with message control whenever it may have been written.
    pub fn set_control(&mut self, control: u16) {
        let [_, control] = control.to_le_bytes();
        let on = control & (ENABLE | FUNCTION_MASK) == ENABLE;
        if on != self.on {
            self.on = on;
            for vector in &mut self.vectors {
                vector.update(&self.vm, on);
            }
        }
    }

    /// Reads the table: aligned, 4 or 8 bytes, as the guest must.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Some(vector) = self.vectors.get(vector_of(offset)) else {
            return;
        };
        let entry = vector.entry();
        let start = usize::try_from(offset % ENTRY_SIZE).unwrap_or(entry.len());
        for (byte, value) in data.iter_mut().zip(entry.iter().skip(start)) {
            *byte = *value;
        }
    }

    /// Writes the table; other than aligned 4 or 8 bytes is ignored.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        let len = data.len() as u64;
        if !matches!(len, 4 | 8) || !offset.is_multiple_of(len) {
            return;
        }
        let Some(vector) = self.vectors.get_mut(vector_of(offset)) else {
            return;
        };
        for (word, at) in data.chunks_exact(4).zip((offset % ENTRY_SIZE..).step_by(4)) {
            let word = u32::from_le_bytes(word.try_into().unwrap_or_default());
            vector.set(at, word);
        }
        vector.update(&self.vm, self.on);
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (at, byte) in data.iter_mut().enumerate() {
            let first = start.saturating_add(at).saturating_mul(8);
            for (vector, bit) in self.vectors.iter().skip(first).zip(0..8) {
                if vector.pending() {
                    *byte |= 1 << bit;
                }
            }
        }
    }

    /// Masks all vectors for good, and gives their GSIs back. One that KVM does not let go
    /// of stays taken.
    pub fn release(&mut self) {
        for mut vector in self.vectors.drain(..) {
            vector.update(&self.vm, false);
            if let Some(wire) = vector.wire.filter(|_| !vector.live) {
                self.vm.free_gsi(wire.gsi);
            }
        }
    }

    /// Forgets interrupts that were never delivered.
    pub fn discard_pending(&self) {
        let masked = self.vectors.iter().filter(|vector| !vector.live);
        for wire in masked.filter_map(|vector| vector.wire.as_ref()) {
            // Nothing counted is the usual case, and an error of read(2).
            let _ = wire.event.read();
        }
    }
}

impl Wire {
    fn new(vm: &Vm) -> Result<Self, VmError> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|source| VmError {
            what: "make an event for an interrupt",
            source,
        })?;
        Ok(Self {
            event: Arc::new(event),
            gsi: vm.new_gsi()?,
        })
    }

    /// Has the event raise a message from now on, or count.
    fn update(&self, vm: &Vm, was_live: bool, route: Option<MsiRoute>) -> Result<(), VmError> {
        if let Some(route) = route {
            vm.route(self.gsi, route)?;
        }
        match (was_live, route.is_some()) {
            (false, true) => vm.add_irqfd(&self.event, self.gsi),
            (true, false) => vm.remove_irqfd(&self.event, self.gsi),
            _ => Ok(()),
        }
    }

    /// Whether something was counted. KVM empties a live vector's event at once.
    fn is_signalled(&self) -> bool {
        // SAFETY: the eventfd is open as long as `self` is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) };
        let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }
}

impl Vector {
    fn new() -> Self {
        Self {
            wire: None,
            address: 0,
            data: 0,
            control: VECTOR_MASK,
            live: false,
        }
    }

    fn entry(&self) -> [u8; 16] {
        let mut entry = [0; 16];
        entry[..8].copy_from_slice(&self.address.to_le_bytes());
        entry[8..12].copy_from_slice(&self.data.to_le_bytes());
        entry[12..].copy_from_slice(&self.control.to_le_bytes());
        entry
    }

    fn set(&mut self, at: u64, word: u32) {
        match at {
            0 => self.address = self.address & !0xffff_ffff | u64::from(word),
            4 => self.address = self.address & 0xffff_ffff | u64::from(word) << 32,
            8 => self.data = word,
            _ => self.control = word & VECTOR_MASK,
        }
    }

    /// Brings KVM in line with the entry.
    fn update(&mut self, vm: &Vm, on: bool) {
        let Some(wire) = &self.wire else { return };
        let live = on && self.control & VECTOR_MASK == 0;
        let route = MsiRoute {
            address: self.address,
            data: self.data,
        };
        match wire.update(vm, self.live, live.then_some(route)) {
            Ok(()) => self.live = live,
            Err(error) => tracing::warn!(gsi = wire.gsi, %error, "MSI-X vector not updated"),
        }
    }

    fn pending(&self) -> bool {
        !self.live && self.wire.as_ref().is_some_and(Wire::is_signalled)
    }
}

fn vector_of(offset: u64) -> usize {
    usize::try_from(offset / ENTRY_SIZE).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::test_vm;

    /// Two vectors of a VM, or `None` where there is no KVM.
    fn msix() -> Option<Msix> {
        let vm = test_vm()?;
        Some(Msix::new(&vm, 2))
    }

    fn signal(msix: &mut Msix, vector: u16) {
        let event = msix.event(vector).unwrap().unwrap();
        event.write(1).unwrap();
    }

    fn enable(msix: &mut Msix, control: u8) {
        msix.set_control(u16::from_le_bytes([0, control]));
    }

    fn pending(msix: &Msix) -> u8 {
        let mut byte = [0];
        msix.read_pending(0, &mut byte);
        byte[0]
    }

    #[test]
    fn table_keeps_what_is_written() {
        let Some(mut msix) = msix() else { return };
        msix.write_table(16, &0xfee0_1000_u64.to_le_bytes());
        msix.write_table(24, &0x41_u32.to_le_bytes());
        let mut entry = [0; 16];
        msix.read_table(16, &mut entry);
        assert_eq!(entry[..4], 0xfee0_1000_u32.to_le_bytes());
        assert_eq!(entry[8..], [0x41, 0, 0, 0, 1, 0, 0, 0]);
    }

    #[test]
    fn halves_of_an_entry_are_written_alone() {
        let Some(mut msix) = msix() else { return };
        let entry = |msix: &Msix| {
            let mut words = [[0; 8]; 2];
            msix.read_table(0, &mut words[0]);
            msix.read_table(8, &mut words[1]);
            words.map(u64::from_le_bytes)
        };
        for (offset, word, expected) in [
            (0, 0xffff_ffff_u32, [0xffff_ffff, 1 << 32]),
            (4, 0x1, [0x1_ffff_ffff, 1 << 32]),
            (0, 0xfee0_2000, [0x1_fee0_2000, 1 << 32]),
            (4, 0x0, [0xfee0_2000, 1 << 32]),
            (8, 0x99, [0xfee0_2000, 1 << 32 | 0x99]),
            (12, 0xffff_fffe, [0xfee0_2000, 0x99]),
        ] {
            msix.write_table(offset, &word.to_le_bytes());
            assert_eq!(entry(&msix), expected, "{word:#x} at {offset}");
        }
    }

    #[test]
    fn masked_vector_stays_pending_until_unmasked() {
        let Some(mut msix) = msix() else { return };
        msix.write_table(16, &0xfee0_0000_u64.to_le_bytes());
        signal(&mut msix, 1);
        assert_eq!(pending(&msix), 0b10);
        enable(&mut msix, ENABLE);
        assert_eq!(pending(&msix), 0b10, "enabled, but still masked");
        msix.write_table(28, &[0; 4]);
        assert_eq!(pending(&msix), 0);
        assert!(msix.vectors[1].live);
        enable(&mut msix, ENABLE | FUNCTION_MASK);
        assert!(!msix.vectors[1].live);
        signal(&mut msix, 1);
        assert_eq!(pending(&msix), 0b10);
        msix.discard_pending();
        assert_eq!(pending(&msix), 0);
    }

    #[test]
    fn released_vectors_leave_their_gsis() {
        let Some(mut msix) = msix() else { return };
        msix.write_table(12, &[0; 4]);
        enable(&mut msix, ENABLE);
        for vector in [0, 1] {
            signal(&mut msix, vector);
        }
        assert!(msix.vectors[0].live && !msix.vectors[1].live);
        let vm = msix.vm.clone();
        msix.release();
        assert!(msix.event(0).unwrap().is_none());
        let mut again = [(); 3].map(|()| vm.new_gsi().unwrap());
        again.sort_unstable();
        assert_eq!(again, [0, 1, 2]);
    }

    #[test]
    fn odd_accesses_change_nothing() {
        let Some(mut msix) = msix() else { return };
        msix.write_table(1, &[0xff; 4]);
        msix.write_table(0, &[0xff; 2]);
        msix.write_table(32, &[0xff; 8]);
        msix.write_table(u64::MAX - 7, &[0xff; 8]);
        let mut entry = [0xee; 16];
        msix.read_table(0, &mut entry);
        assert_eq!(entry[..12], [0; 12]);
        msix.read_table(u64::MAX, &mut entry);
        msix.read_pending(u64::MAX, &mut [0; 8]);
        assert!(msix.event(2).unwrap().is_none());
    }

    #[test]
    fn vector_that_nobody_signals_costs_nothing() {
        let Some(mut msix) = msix() else { return };
        enable(&mut msix, ENABLE);
        for control in [28, 12] {
            msix.write_table(control, &[0; 4]);
        }
        assert_eq!(msix.vm.new_gsi().unwrap(), 0);
        assert!(!msix.vectors[1].live && pending(&msix) == 0);
        signal(&mut msix, 1);
        assert!(msix.vectors[1].live, "unmasked before its event was there");
        signal(&mut msix, 1);
        let next = msix.vm.new_gsi().unwrap();
        assert_eq!(next, 2, "one for the vector");
    }

    #[test]
    fn no_more_routes_than_kvm_has_are_given_out() {
        let Some(mut msix) = msix() else { return };
        enable(&mut msix, ENABLE);
        msix.write_table(12, &[0; 4]);
        signal(&mut msix, 0);
        while msix.vm.new_gsi().is_ok() {}
        let error = msix.event(1).unwrap_err().to_string();
        assert!(error.ends_with(" are taken"), "{error}");
        assert!(error.starts_with("KVM: find a free interrupt route: all "));
        msix.write_table(28, &[0; 4]);
        assert!(!msix.vectors[1].live && msix.vectors[0].live);
        signal(&mut msix, 0);
    }
}
