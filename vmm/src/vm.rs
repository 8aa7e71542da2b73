//! The KVM virtual machine: memory slots, interrupt routes, event descriptors.
//!
//! Interrupts are MSIs. KVM emulates the local APICs ("split irqchip") and nothing
//! else, but for machines that may get devices of the host, whose INTx are [`lines`]: these have KVM's
//! whole controller, with an I/O APIC and, since it cannot be left out, a PIC. Their first GSIs are
//! its pins. Any other is only the name of an MSI route, of which KVM has a few thousand; a vector of
//! a device takes one when it is used for the first time and keeps it as long as the device is there.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_MEM_READONLY, KvmIrqRouting, kvm_enable_cap,
    kvm_irq_routing_entry, kvm_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, DeviceFd, IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::errno::Error as Errno;
use vmm_sys_util::eventfd::EventFd;

use crate::layout;
use crate::virtio::GuestMemory;
use numbers::Numbers;

mod device_memory;
pub mod lines;
mod numbers;
mod page;
mod vfio;

pub use device_memory::{DeviceMemory, Mapping};
pub use page::{PAGE_SIZE, Page};

/// Takes ownership of `/dev/kvm`.
#[must_use]
pub fn kvm_from(fd: OwnedFd) -> Kvm {
    // SAFETY: we own the descriptor and hand it over.
    unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) }
}

/// KVM refused.
#[derive(Debug, thiserror::Error)]
#[error("KVM: {what}: {source}")]
pub struct VmError {
    /// What was asked of it.
    pub what: &'static str,
    /// Its answer.
    pub source: io::Error,
}

impl VmError {
    /// For `map_err`: names what was asked.
    pub fn new(what: &'static str) -> impl FnOnce(Errno) -> Self {
        move |errno| Self {
            what,
            source: errno.into(),
        }
    }
}

/// Message data: delivery mode NMI (Intel SDM volume 3, 11.11.2).
const DELIVER_NMI: u32 = 4 << 8;

/// Message address and data of an MSI route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiRoute {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// What of an interrupt controller KVM emulates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IrqChip {
    /// The local APICs.
    Split,
    /// An I/O APIC too, whose pins are [`lines`].
    Full,
}

/// A virtual machine without its vCPUs.
pub struct Vm {
    fd: VmFd,
    gsis: Numbers,
    irq_chip: IrqChip,
    slots: Numbers,
    routes: Mutex<BTreeMap<u32, MsiRoute>>,
    /// KVM's slots point into this mapping,
    memory: GuestMemory,
    /// into these,
    pages: Mutex<Vec<Arc<Page>>>,
    /// and into these.
    mappings: Mutex<Vec<Arc<Mapping>>>,
    /// KVM's side of VFIO, if there are devices of the host.
    vfio: Mutex<Option<DeviceFd>>,
}

/// A page of the guest that is backed by a [`Page`].
pub struct ReadOnlyPage {
    slot: u32,
    address: u64,
    page: Arc<Page>,
}

impl ReadOnlyPage {
    /// What the guest reads there.
    #[must_use]
    pub fn page(&self) -> &Page {
        &self.page
    }
}

impl Vm {
    /// Creates a VM that has `memory`, and an interrupt controller such as `irq_chip` or, where KVM
    /// makes no such, a split one.
    ///
    /// # Errors
    ///
    /// When KVM lacks what we need or refuses the memory.
    pub fn new(kvm: &Kvm, memory: GuestMemory, irq_chip: IrqChip) -> Result<Self, VmError> {
        let fd = kvm.create_vm().map_err(VmError::new("create a VM"))?;
        fd.set_tss_address(layout::KVM_TSS)
            .map_err(VmError::new("set the TSS address"))?;
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(VmError::new("set the identity map"))?;
        let irq_chip = made_or_split(irq_chip, |irq_chip| make_irq_chip(&fd, irq_chip))?;
        let first_gsi = match irq_chip {
            IrqChip::Split => 0,
            IrqChip::Full => lines::PINS,
        };
        let max_gsis = u32::try_from(fd.check_extension_int(Cap::IrqRouting)).unwrap_or(0);
        let vm = Self {
            fd,
            gsis: Numbers::new(first_gsi..max_gsis),
            irq_chip,
            slots: Numbers::new(0..u32::MAX),
            routes: Mutex::default(),
            memory,
            pages: Mutex::default(),
            mappings: Mutex::default(),
            vfio: Mutex::default(),
        };
        vm.add_memory()?;
        Ok(vm)
    }

    fn add_memory(&self) -> Result<(), VmError> {
        for region in self.memory.iter() {
            let slot = kvm_userspace_memory_region {
                slot: self.new_slot(),
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the mapping is that of `region`, whole, and lives as long
            // as `self`, longer than the VM it is given to.
            unsafe { self.fd.set_user_memory_region(slot) }
                .map_err(VmError::new("add a memory slot"))?;
        }
        Ok(())
    }

    /// Backs the guest's page at `address`: it reads without an exit, its writes
    /// go to the bus as before.
    ///
    /// # Errors
    ///
    /// When there is no memory for it, or KVM refuses.
    pub fn add_read_only_page(&self, address: u64) -> Result<ReadOnlyPage, VmError> {
        let what = "add a read-only page";
        let page = Page::new().map_err(|source| VmError { what, source })?;
        let page = Arc::new(page);
        let slot = self.new_slot();
        let region = kvm_userspace_memory_region {
            slot,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: address,
            memory_size: PAGE_SIZE as u64,
            userspace_addr: page.address(),
        };
        // SAFETY: the page is mapped, and stays so as long as `self`, longer than
        // the VM it is given to.
        let added = unsafe { self.fd.set_user_memory_region(region) };
        added
            .inspect_err(|_| self.slots.give_back(slot))
            .map_err(VmError::new(what))?;
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        pages.push(page.clone());
        Ok(ReadOnlyPage {
            slot,
            address,
            page,
        })
    }

    /// Undoes [`Self::add_read_only_page`]: all of the guest's accesses go to
    /// the bus again.
    ///
    /// # Errors
    ///
    /// KVM's. The page stays as long as the VM then, which may point into it.
    pub fn remove_read_only_page(&self, page: &ReadOnlyPage) -> Result<(), VmError> {
        self.remove_slot(page.slot, page.address)
            .map_err(VmError::new("remove a read-only page"))?;
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let before = pages.len();
        pages.retain(|other| !Arc::ptr_eq(other, &page.page));
        if pages.len() < before {
            self.slots.give_back(page.slot);
        }
        Ok(())
    }

    fn remove_slot(&self, slot: u32, address: u64) -> Result<(), Errno> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: address,
            memory_size: 0,
            userspace_addr: 0,
        };
        // SAFETY: a slot of size 0 points nowhere.
        unsafe { self.fd.set_user_memory_region(region) }
    }

    /// Whether it has interrupt [`lines`].
    #[must_use]
    pub fn has_lines(&self) -> bool {
        self.irq_chip == IrqChip::Full
    }

    /// Guest memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Creates a vCPU; `index` is also its APIC id.
    ///
    /// # Errors
    ///
    /// KVM's.
    pub fn create_vcpu(&self, index: u8) -> Result<VcpuFd, VmError> {
        self.fd
            .create_vcpu(u64::from(index))
            .map_err(VmError::new("create a vCPU"))
    }

    /// A memory slot nobody has. KVM has far fewer than numbers, and refuses the others.
    fn new_slot(&self) -> u32 {
        self.slots.take().unwrap_or(u32::MAX)
    }

    /// A GSI nobody has.
    ///
    /// # Errors
    ///
    /// When KVM has no more.
    pub fn new_gsi(&self) -> Result<u32, VmError> {
        self.gsis.take().ok_or_else(|| VmError {
            what: "find a free interrupt route",
            source: io::Error::other(format!("all {} are taken", self.gsis.count())),
        })
    }

    /// Gives a GSI back that has no irqfd any more. What it sends is forgotten when a
    /// route is set the next time.
    pub fn free_gsi(&self, gsi: u32) {
        let mut routes = self.routes.lock().unwrap_or_else(|lock| lock.into_inner());
        routes.remove(&gsi);
        self.gsis.give_back(gsi);
    }

    /// Lets `gsi` send `route` from now on.
    ///
    /// # Errors
    ///
    /// KVM's.
    pub fn route(&self, gsi: u32, route: MsiRoute) -> Result<(), VmError> {
        let mut routes = self.routes.lock().unwrap_or_else(|lock| lock.into_inner());
        let last = routes.insert(gsi, route);
        if last == Some(route) {
            return Ok(());
        }
        let result = self.set_routes(&routes);
        if result.is_err() {
            // KVM still has those of before.
            match last {
                Some(last) => routes.insert(gsi, last),
                None => routes.remove(&gsi),
            };
        }
        result
    }

    fn set_routes(&self, routes: &BTreeMap<u32, MsiRoute>) -> Result<(), VmError> {
        let lines = self.has_lines().then(lines::routes);
        let entries: Vec<_> = lines
            .into_iter()
            .flatten()
            .chain(routes.iter().map(|(gsi, route)| entry(*gsi, *route)))
            .collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| VmError {
            what: "build the interrupt routes",
            source: io::ErrorKind::OutOfMemory.into(),
        })?;
        self.fd
            .set_gsi_routing(&table)
            .map_err(VmError::new("set the interrupt routes"))
    }

    /// Raises `gsi` whenever `event` is signalled, and now if it already is.
    ///
    /// # Errors
    ///
    /// KVM's.
    pub fn add_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), VmError> {
        self.fd
            .register_irqfd(event, gsi)
            .map_err(VmError::new("add an irqfd"))
    }

    /// Undoes [`Self::add_irqfd`] or [`Self::add_resample_irqfd`]; signals stay in `event`.
    ///
    /// # Errors
    ///
    /// KVM's.
    pub fn remove_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), VmError> {
        self.fd
            .unregister_irqfd(event, gsi)
            .map_err(VmError::new("remove an irqfd"))
    }

    /// Sends the first vCPU an NMI, by the message with which a device would. The vCPU's own request
    /// for one (`KVM_NMI`) waits until it has left `KVM_RUN`, which a vCPU that hangs does not.
    ///
    /// # Errors
    ///
    /// KVM's, and when nobody takes the message.
    pub fn send_nmi(&self) -> Result<(), VmError> {
        let what = "send an NMI";
        let message = kvm_msi {
            address_lo: layout::LAPIC,
            data: DELIVER_NMI,
            ..Default::default()
        };
        match self.fd.signal_msi(message).map_err(VmError::new(what))? {
            0 => Err(VmError {
                what,
                source: io::Error::other("the guest's APIC does not take it"),
            }),
            _ => Ok(()),
        }
    }

    /// Signals `event` when the guest writes to `address`, without an exit to us.
    ///
    /// # Errors
    ///
    /// KVM's.
    pub fn add_ioeventfd(&self, event: &EventFd, address: u64) -> Result<(), VmError> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(VmError::new("add an ioeventfd"))
    }

    /// Undoes [`Self::add_ioeventfd`].
    ///
    /// # Errors
    ///
    /// KVM's.
    pub fn remove_ioeventfd(&self, event: &EventFd, address: u64) -> Result<(), VmError> {
        self.fd
            .unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(VmError::new("remove an ioeventfd"))
    }
}

fn make_irq_chip(fd: &VmFd, irq_chip: IrqChip) -> Result<(), VmError> {
    match irq_chip {
        // args[0], the routes kept for an I/O APIC in user space, stays 0.
        IrqChip::Split => fd
            .enable_cap(&kvm_enable_cap {
                cap: KVM_CAP_SPLIT_IRQCHIP,
                ..Default::default()
            })
            .map_err(VmError::new("split the interrupt controller")),
        IrqChip::Full => fd.create_irq_chip().map_err(VmError::new(
            "make an interrupt controller with an I/O APIC",
        )),
    }
}

/// Has `make` make the controller. A host's kernel may be built without an I/O APIC of KVM's
/// (`CONFIG_KVM_IOAPIC`), and few devices need a line: whatever the error is, a machine is tried without.
fn made_or_split(
    wanted: IrqChip,
    make: impl Fn(IrqChip) -> Result<(), VmError>,
) -> Result<IrqChip, VmError> {
    let made = make(wanted);
    match (wanted, made) {
        (IrqChip::Full, Err(error)) => {
            tracing::warn!(%error, "PCI devices have no interrupt lines, only messages");
            make(IrqChip::Split)?;
            Ok(IrqChip::Split)
        }
        (wanted, made) => made.map(|()| wanted),
    }
}

fn entry(gsi: u32, route: MsiRoute) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    let [a, b, c, d, e, f, g, h] = route.address.to_le_bytes();
    entry.u.msi.address_lo = u32::from_le_bytes([a, b, c, d]);
    entry.u.msi.address_hi = u32::from_le_bytes([e, f, g, h]);
    entry.u.msi.data = route.data;
    entry
}

/// A machine of 32 MiB with nothing in it; none, with the reason on stderr, where there is
/// no KVM.
#[cfg(test)]
pub fn test_vm() -> Option<Arc<Vm>> {
    test_vm_with(IrqChip::Split, crate::memory::allocate(32, false).unwrap())
}

/// The same without memory, of which nothing has to be mapped for DMA.
#[cfg(test)]
pub fn test_vm_without_memory() -> Option<Arc<Vm>> {
    test_vm_with(IrqChip::Split, GuestMemory::new())
}

/// The same with interrupt lines, as those have that may get devices of the host.
#[cfg(test)]
pub fn test_vm_with_lines() -> Option<Arc<Vm>> {
    test_vm_with(IrqChip::Full, crate::memory::allocate(32, false).unwrap())
}

#[cfg(test)]
fn test_vm_with(irq_chip: IrqChip, memory: GuestMemory) -> Option<Arc<Vm>> {
    let Ok(kvm) = Kvm::new() else {
        eprintln!("skipped: no /dev/kvm");
        return None;
    };
    Some(Arc::new(Vm::new(&kvm, memory, irq_chip).unwrap()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_is_removed_leaves_its_slot() {
        let Some(vm) = test_vm() else {
            return;
        };
        let slots = [(); 3].map(|()| {
            let page = vm.add_read_only_page(layout::ECAM_START).unwrap();
            vm.remove_read_only_page(&page).unwrap();
            assert_eq!(Arc::strong_count(&page.page), 1);
            page.slot
        });
        assert!(slots.iter().all(|slot| *slot == slots[0]), "{slots:?}");
    }

    #[test]
    fn a_page_that_is_refused_takes_no_slot() {
        let Some(vm) = test_vm() else {
            return;
        };
        let slots = [(); 2].map(|()| {
            assert!(vm.add_read_only_page(layout::ECAM_START + 1).is_err());
            vm.new_slot()
        });
        assert_eq!(slots[0] + 1, slots[1]);
    }

    #[test]
    fn route_that_is_refused_does_not_spoil_the_others() {
        for vm in [test_vm(), test_vm_with_lines()].into_iter().flatten() {
            let route = |data| MsiRoute {
                address: 0xfee0_0000,
                data,
            };
            let gsi = vm.new_gsi().unwrap();
            vm.route(gsi, route(0x41)).unwrap();
            for _ in 0..2 {
                assert!(vm.route(vm.gsis.limit(), route(0x42)).is_err());
            }
            vm.route(gsi, route(0x43)).unwrap();
            vm.route(vm.gsis.limit() - 1, route(0x44)).unwrap();
        }
    }

    #[test]
    fn nmi_needs_a_vcpu_that_takes_it() {
        for vm in [test_vm(), test_vm_with_lines()].into_iter().flatten() {
            assert!(vm.send_nmi().is_err());
            let _vcpu = vm.create_vcpu(0).unwrap();
            vm.send_nmi().unwrap();
        }
    }

    #[test]
    fn host_without_an_io_apic_has_a_machine_all_the_same() {
        let make = |refused: &[IrqChip], irq_chip| {
            if refused.contains(&irq_chip) {
                return Err(VmError::new("make it")(Errno::new(libc::ENOTTY)));
            }
            Ok(())
        };
        for (wanted, refused, made) in [
            (IrqChip::Full, &[][..], Some(IrqChip::Full)),
            (IrqChip::Full, &[IrqChip::Full], Some(IrqChip::Split)),
            (IrqChip::Split, &[IrqChip::Full], Some(IrqChip::Split)),
            (IrqChip::Split, &[IrqChip::Split], None),
            (IrqChip::Full, &[IrqChip::Full, IrqChip::Split], None),
        ] {
            let result = made_or_split(wanted, |irq_chip| make(refused, irq_chip));
            assert_eq!(result.ok(), made);
        }
    }
}
