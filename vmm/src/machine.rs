//! A virtual machine, from its parts to its end.
//!
//! ```text
//!   Parts --Machine::new--> Machine --start--> Running --(Stop is set)--> stop() -> Exits
//! ```
//!
//! The thread that calls these owns the machine. vCPU threads and device threads
//! never touch each other: they meet in guest memory and event descriptors.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nacre_protocol::vm::PciOptions;
use vm_memory::GuestMemoryBackend;

use crate::acpi::{self, AcpiError, Platform};
use crate::boot::{self, BootError, NamedFile, Payload};
use crate::bus::{Bus, BusError};
use crate::layout;
use crate::memory::MemoryError;
use crate::nmi::Nmi;
use crate::pci::placement::Placement;
use crate::pci::{Ecam, IoPorts, MAX_DEVICES, PciRoot, Place, Port, Slot, Window};
use crate::power::{Power, PvPanic};
use crate::pstore;
use crate::serial::Serial;
use crate::stop::{Outcome, Stop};
use crate::vcpu::{self, Buses, Cpuid, Exits, MAX_VCPUS, Vcpu, VcpuError, VcpuThread};
use crate::vfio::{AddressSpace, Passthrough, Session, VfioError, Watch, hotplug};
use crate::virtio::transport::{TransportError, VirtioPci};
use crate::virtio::{GuestMemory, VirtioDevice};
use crate::vm::{self, IrqChip, Vm, VmError};

/// What a machine is made of.
pub struct Parts {
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// RAM, see [`memory::allocate`].
    pub ram: GuestMemory,
    /// RAM and what there is beyond it, see [`memory::with_growth`].
    pub memory: GuestMemory,
    /// Uncompressed kernel.
    pub kernel: NamedFile,
    /// initramfs.
    pub initrd: NamedFile,
    /// Kernel command line.
    pub cmdline: String,
    /// Virtio devices, in order of their slots.
    pub devices: Vec<Box<dyn VirtioDevice>>,
    /// Devices of the host, for which all of `memory` is pinned.
    pub passthrough: Option<Passthrough>,
    /// Empty slots for devices of the host that come later. All of `memory` is pinned as
    /// long as there are any.
    pub pci_slots: u8,
    /// What there is with devices of the host only if it is wanted.
    pub pci: PciOptions,
    /// Output of a serial port; none is there without it.
    pub serial: Option<File>,
}

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Not a number of vCPUs we run with.
    #[error("{0} vCPUs: 1 to {MAX_VCPUS} are possible")]
    Vcpus(u8),
    /// The bus is full.
    #[error(
        "{0} devices: the bus has room for {MAX_DEVICES}, among them disks and ports that are \
         empty at first (pod_disks, root_disks and pci_slots in nacre.toml)"
    )]
    Devices(usize),
    /// Nothing can be put there while the guest runs.
    #[error(
        "no slot of bus 0 is free: disks and ports that are empty at first take some (pod_disks, \
         root_disks and pci_slots in nacre.toml), and one whose device the guest has not let go of \
         stays empty"
    )]
    NoSlot,
    /// Nothing that could be taken out is there.
    #[error("no virtio device of type {device_type} is in slot {number} of bus 0")]
    NoDevice {
        /// What was to be taken out (virtio 1.2, 5).
        device_type: u16,
        /// Where.
        number: u8,
    },
    /// See the source.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// See the source.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// See the source.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// See the source.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// See the source.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// See the source.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// See the source.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// See the source.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    /// No event descriptor or signal handler.
    #[error("events: {0}")]
    Event(#[from] std::io::Error),
}

/// A machine ready to start.
pub struct Machine {
    vm: Arc<Vm>,
    root: Arc<PciRoot>,
    buses: Buses,
    vcpus: Vec<Vcpu>,
    stop: Arc<Stop>,
    nmi: Arc<Nmi>,
    session: Option<Session>,
    space: Option<AddressSpace>,
    window64: Option<(u64, u64)>,
    pci_slots: u8,
    pci: PciOptions,
}

impl Machine {
    /// Builds the machine.
    ///
    /// # Errors
    ///
    /// When a part is unfit, or the system refuses something.
    pub fn new(parts: Parts) -> Result<Self, MachineError> {
        check(&parts)?;
        let kvm = vm::kvm_from(parts.kvm);
        let irq_chip = match &parts.passthrough {
            None if parts.pci_slots == 0 => IrqChip::Split,
            _ => IrqChip::Full,
        };
        let vm = Arc::new(Vm::new(&kvm, parts.memory, irq_chip)?);
        let stop = Arc::new(Stop::new()?);
        let cpuid = Cpuid::new(&kvm, parts.vcpus)?;
        let bits = cpuid.physical_bits();
        let window64 = layout::window64(vm.memory().last_addr().0 + 1, bits);
        let mut placement = Placement::new(window64, bits);
        let mut space = None;
        let (root_ports, session) = match parts.passthrough {
            Some(devices) => {
                let attached = devices.attach(&vm, &mut space)?;
                let attached = attached.with_roms(parts.pci.roms);
                let peers = space.as_ref().filter(|_| parts.pci.peers);
                let (root_ports, session) = attached.place(&vm, &mut placement, peers)?;
                (root_ports, Some(session))
            }
            None => (Vec::new(), None),
        };
        let root_ports = with_slots(&vm, root_ports, parts.pci_slots, &mut placement)?;
        let root = pci_root(&vm, parts.devices, root_ports)?;
        let platform = Platform {
            vcpus: parts.vcpus,
            last_bus: root.last_bus(),
            lines: if vm.has_lines() {
                root.lines()
            } else {
                Vec::new()
            },
            hot_plug: parts.pci_slots > 0,
            window64,
            serial: parts.serial.is_some(),
        };
        let (mut kernel, mut initrd) = (parts.kernel, parts.initrd);
        let mut payload = Payload {
            kernel: &mut kernel,
            initrd: &mut initrd,
            cmdline: &format!("{} {}", parts.cmdline, pstore::parameters()),
        };
        let loaded = boot::load(&parts.ram, &mut payload)?;
        acpi::write(&parts.ram, &platform)?;
        let vcpus = (0..parts.vcpus)
            .map(|index| Vcpu::new(&vm, &cpuid, index, loaded.entry))
            .collect::<Result<Vec<_>, _>>()?;
        if let Some(first) = vcpus.first() {
            first.pre_fault(&loaded.ranges);
        }
        let target = vm.clone();
        let nmi = Arc::new(Nmi::new(move || target.send_nmi()));
        Ok(Self {
            buses: Buses {
                mmio: Arc::new(mmio(&root, &platform)?),
                ports: Arc::new(ports(&root, &stop, &nmi, parts.serial)?),
            },
            vm,
            root,
            vcpus,
            stop,
            nmi,
            session,
            space,
            window64,
            pci_slots: parts.pci_slots,
            pci: parts.pci,
        })
    }

    /// Where the machine's end shows.
    #[must_use]
    pub fn stop_handle(&self) -> Arc<Stop> {
        self.stop.clone()
    }

    /// Lets the vCPUs run.
    ///
    /// # Errors
    ///
    /// When there are no threads.
    pub fn start(self) -> Result<Running, MachineError> {
        vcpu::install_kick_handler()?;
        let session = self.session;
        let watch = session.map(|session| session.watch(self.stop.clone()));
        let first = usize::from(self.root.last_bus() - self.pci_slots);
        let (vm, root, stop) = (&self.vm, &self.root, &self.stop);
        let (space, hot_plug) = if self.pci_slots > 0 {
            let slots = hotplug::Slots::new(vm, root, self.window64, first, self.space, stop)
                .with_roms(self.pci.roms);
            (None, Some(hotplug::Worker::start(slots)?))
        } else {
            (self.space, None)
        };
        let mut running = Running {
            threads: Vec::with_capacity(self.vcpus.len()),
            watch: watch.transpose()?,
            hot_plug,
            root: self.root,
            stop: self.stop,
            nmi: self.nmi,
            vm: self.vm,
            _space: space,
        };
        for vcpu in self.vcpus {
            match vcpu.start(self.buses.clone(), running.stop.clone()) {
                Ok(thread) => running.threads.push(thread),
                Err(error) => {
                    running.stop();
                    return Err(error.into());
                }
            }
        }
        Ok(running)
    }
}

/// A machine whose vCPUs run.
pub struct Running {
    threads: Vec<VcpuThread>,
    watch: Option<Watch>,
    hot_plug: Option<hotplug::Worker>,
    root: Arc<PciRoot>,
    stop: Arc<Stop>,
    nmi: Arc<Nmi>,
    vm: Arc<Vm>,
    /// The devices leave it when it is closed, after the others.
    _space: Option<AddressSpace>,
}

impl Running {
    /// Where the machine's end shows.
    #[must_use]
    pub fn stop_handle(&self) -> &Arc<Stop> {
        &self.stop
    }

    /// Guest memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        self.vm.memory()
    }

    /// Who plugs devices in, if there are slots.
    #[must_use]
    pub fn hot_plug(&self) -> Option<&hotplug::Worker> {
        self.hot_plug.as_ref()
    }

    /// Puts a virtio device into the first empty slot of bus 0, whose number it returns.
    /// The guest finds it there when it looks.
    ///
    /// # Errors
    ///
    /// When there is no slot, or the device cannot be put on the bus.
    pub fn add(&self, device: Box<dyn VirtioDevice>) -> Result<u8, MachineError> {
        let number = self.root.empty_slot();
        let number = number.ok_or(MachineError::NoSlot)?;
        let function = VirtioPci::new(&self.vm, device, PciRoot::bar_address(number))?;
        self.root.insert(number, function)?;
        Ok(number)
    }

    /// Takes a virtio device of this type out of its slot, whether the guest has let go of it or
    /// not; if not, the slot stays as it is to the end. Nothing works for it any more when this
    /// returns.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn remove(
        &self,
        device_type: u16,
        number: u8,
        is_let_go: bool,
    ) -> Result<(), MachineError> {
        if self.root.remove(device_type, number, is_let_go) {
            Ok(())
        } else {
            Err(MachineError::NoDevice {
                device_type,
                number,
            })
        }
    }

    /// Has a guest that does not answer say where it is, see [`Nmi`].
    ///
    /// # Errors
    ///
    /// KVM's.
    pub fn interrupt(&self) -> Result<(), MachineError> {
        Ok(self.nmi.raise()?)
    }

    /// Stops vCPUs and devices, in this order, and returns what the vCPUs left
    /// the kernel for.
    pub fn stop(self) -> Exits {
        self.stop.set(Outcome::Cancelled);
        for thread in &self.threads {
            thread.kick();
        }
        let mut exits = Exits::default();
        for thread in self.threads {
            match thread.join() {
                Some(counted) => exits += counted,
                None => tracing::error!("a vCPU thread panicked"),
            }
        }
        let slots = self.hot_plug.and_then(hotplug::Worker::stop);
        self.root.reset();
        if let Some(watch) = self.watch {
            watch.end();
        }
        if let Some(slots) = slots {
            slots.close();
        }
        exits
    }
}

fn check(parts: &Parts) -> Result<(), MachineError> {
    if !(1..=MAX_VCPUS).contains(&parts.vcpus) {
        return Err(MachineError::Vcpus(parts.vcpus));
    }
    let passed_on = parts.passthrough.as_ref().map_or(0, Passthrough::len);
    let devices = parts.devices.len() + passed_on + usize::from(parts.pci_slots);
    if devices > MAX_DEVICES {
        return Err(MachineError::Devices(devices));
    }
    let passed_on = parts.passthrough.as_ref();
    if parts.pci.peers && passed_on.is_some_and(Passthrough::cannot_be_peers) {
        return Err(VfioError::NoPeers.into());
    }
    Ok(())
}

/// Root ports with empty slots after those of devices.
fn with_slots(
    vm: &Arc<Vm>,
    mut ports: Vec<Port>,
    count: u8,
    placement: &mut Placement,
) -> Result<Vec<Port>, VfioError> {
    let first_bus = u8::try_from(ports.len() + 1).unwrap_or(u8::MAX);
    ports.extend(hotplug::empty_ports(vm, first_bus, count, placement)?);
    Ok(ports)
}

/// Bus 0: virtio devices first, so that their slots do not depend on what follows.
fn pci_root(
    vm: &Arc<Vm>,
    devices: Vec<Box<dyn VirtioDevice>>,
    ports: Vec<Port>,
) -> Result<Arc<PciRoot>, MachineError> {
    let virtio = (1..).zip(devices).map(|(number, device)| {
        let address = PciRoot::bar_address(number);
        VirtioPci::new(vm, device, address).map(|device| Slot::Virtio(Place::with(device)))
    });
    let mut slots = virtio.collect::<Result<Vec<_>, _>>()?;
    slots.extend(ports.into_iter().map(|port| Slot::Port(Box::new(port))));
    let root = Arc::new(PciRoot::new(slots));
    root.map_config(vm)?;
    Ok(root)
}

fn mmio(root: &Arc<PciRoot>, platform: &Platform) -> Result<Bus, BusError> {
    let mut bus = Bus::default();
    let ecam = Arc::new(Ecam(root.clone()));
    bus.add(layout::ECAM_START, layout::ECAM_SIZE, ecam)?;
    let window32 = (layout::WINDOW32_START, layout::WINDOW32_END);
    for (start, end) in [Some(window32), platform.window64].into_iter().flatten() {
        let window = Window {
            root: root.clone(),
            start,
        };
        bus.add(start, end - start, Arc::new(window))?;
    }
    Ok(bus)
}

fn ports(
    root: &Arc<PciRoot>,
    stop: &Arc<Stop>,
    nmi: &Arc<Nmi>,
    serial: Option<File>,
) -> Result<Bus, BusError> {
    let mut bus = Bus::default();
    if root.last_bus() > 0 {
        let len = layout::IO_END - layout::IO_START;
        bus.add(layout::IO_START, len, Arc::new(IoPorts(root.clone())))?;
    }
    let power = Arc::new(Power(stop.clone()));
    bus.add(
        layout::PORT_SLEEP_CONTROL.into(),
        layout::POWER_PORTS.into(),
        power,
    )?;
    bus.add(
        layout::PORT_PVPANIC.into(),
        1,
        Arc::new(PvPanic(stop.clone())),
    )?;
    bus.add(layout::PORT_NMI.into(), 1, nmi.clone())?;
    if let Some(output) = serial {
        let serial = Arc::new(Serial::new(output));
        bus.add(
            layout::PORT_SERIAL.into(),
            layout::SERIAL_PORTS.into(),
            serial,
        )?;
    }
    Ok(bus)
}

#[cfg(test)]
pub(crate) mod tests;
