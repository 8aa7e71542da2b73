//! Interrupt lines, for the INTx of PCI devices: level-triggered inputs of an I/O APIC,
//! which are shared and stay raised until the guest has served their devices.
//!
//! ```text
//!   device --trigger (irqfd)--> pin --vector--> vCPU --end of interrupt--> pin lowered --resample--> device
//! ```
//!
//! KVM does all of it, but with an I/O APIC of its own only: a split interrupt controller has no
//! resampling. So machines that may get devices of the host have KVM's whole controller,
//! and others none of this.

use std::ops::Range;

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, kvm_irq_routing_entry, kvm_irq_routing_irqchip,
};
use vmm_sys_util::eventfd::EventFd;

use super::{Vm, VmError};

/// Pins of the I/O APIC, which are the first GSIs.
pub const PINS: u32 = 24;
/// Those that PCI has, after the 16 of ISA, which nothing uses.
pub const OF_PCI: Range<u32> = 16..PINS;

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
    /// Raises a line whenever `trigger` is signalled, lowers it when the guest ends the
    /// interrupt, and signals `resample` then: whoever still wants to be served raises it anew.
    ///
    /// # Errors
    ///
    /// KVM's, for one of a machine without lines.
    pub fn add_resample_irqfd(
        &self,
        trigger: &EventFd,
        resample: &EventFd,
        line: u32,
    ) -> Result<(), VmError> {
        self.fd
            .register_irqfd_with_resample(trigger, resample, line)
            .map_err(VmError::new("add an interrupt line"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;
    use crate::vm::IrqChip;

    #[test]
    fn machine_without_an_io_apic_has_no_lines() {
        let Ok(kvm) = kvm_ioctls::Kvm::new() else {
            eprintln!("skipped: no /dev/kvm");
            return;
        };
        let memory = || memory::allocate(32, false).unwrap();
        let [trigger, resample] = [(), ()].map(|()| EventFd::new(0).unwrap());
        let line = OF_PCI.start;
        let vm = Vm::new(&kvm, memory(), IrqChip::Split).unwrap();
        assert!(!vm.has_lines());
        assert!(vm.add_resample_irqfd(&trigger, &resample, line).is_err());
        assert_eq!(vm.new_gsi().unwrap(), 0);
        let vm = Vm::new(&kvm, memory(), IrqChip::Full).unwrap();
        assert!(vm.has_lines());
        vm.add_resample_irqfd(&trigger, &resample, line).unwrap();
        vm.remove_irqfd(&trigger, line).unwrap();
        assert_eq!(vm.new_gsi().unwrap(), PINS, "the others are pins");
    }
}
