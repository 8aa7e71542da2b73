//! Interrupt lines, for the INTx of PCI devices: level-triggered inputs of an I/O APIC,
//! which are shared and stay raised until the guest has served their devices.
//!
//! ```text
//!   device --raise (irqfd)--> pin --vector--> vCPU --end of interrupt--> pin lowered --again (resample)--> device
//! ```
//!
//! KVM does all of it, but with an I/O APIC of its own only: a split interrupt controller has no
//! resampling. So machines that may get devices of the host have KVM's whole controller,
//! and others none of this.

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, kvm_irq_routing_entry, kvm_irq_routing_irqchip,
};
use vmm_sys_util::eventfd::EventFd;

use super::{Vm, VmError};

/// Pins of the I/O APIC, which are the first GSIs.
pub const PINS: u32 = 24;
/// Those that PCI has, after the 16 of ISA, which nothing uses.
const FIRST: u32 = 16;

/// The line of the device on a bus behind a root port; with many devices some share one.
#[must_use]
pub fn of_bus(bus: u8) -> u32 {
    FIRST + u32::from(bus.wrapping_sub(1)) % (PINS - FIRST)
}

/// The routes that make the first GSIs pins.
pub(super) fn routes() -> impl Iterator<Item = kvm_irq_routing_entry> {
    (0..PINS).map(|pin| {
        let mut entry = kvm_irq_routing_entry {
            gsi: pin,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            ..Default::default()
        };
        entry.u.irqchip = kvm_irq_routing_irqchip {
            irqchip: KVM_IRQCHIP_IOAPIC,
            pin,
        };
        entry
    })
}

impl Vm {
    /// Raises a line whenever `raise` is signalled, lowers it when the guest ends the
    /// interrupt, and signals `again` then: whoever still wants to be served raises it anew.
    ///
    /// # Errors
    ///
    /// KVM's, for one of a machine without lines.
    pub fn add_line(&self, raise: &EventFd, again: &EventFd, line: u32) -> Result<(), VmError> {
        self.fd
            .register_irqfd_with_resample(raise, again, line)
            .map_err(VmError::new("add an interrupt line"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn machine_without_an_io_apic_has_no_lines() {
        let Ok(kvm) = kvm_ioctls::Kvm::new() else {
            eprintln!("skipped: no /dev/kvm");
            return;
        };
        let memory = || memory::allocate(32, false).unwrap();
        let [raise, again] = [(), ()].map(|()| EventFd::new(0).unwrap());
        let line = of_bus(1);
        let vm = Vm::new(&kvm, memory(), false).unwrap();
        assert!(vm.add_line(&raise, &again, line).is_err());
        assert_eq!(vm.new_gsi().unwrap(), 0);
        let vm = Vm::new(&kvm, memory(), true).unwrap();
        vm.add_line(&raise, &again, line).unwrap();
        vm.remove_irqfd(&raise, line).unwrap();
        assert_eq!(vm.new_gsi().unwrap(), PINS, "the others are pins");
    }
}
