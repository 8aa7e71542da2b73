//! PCI devices of the host in the guest's hands, by VFIO
//! (`Documentation/driver-api/vfio.rst`).
//!
//! ```text
//!   Passthrough::take      descriptors the shim has opened
//!     --attach--> Attached KVM knows them, the guest's memory is mapped for their DMA, once;
//!                          each is reset and its configuration space read
//!     --place-->  ports    a root port and a VfioPci each, their BARs placed and mapped
//!     --plug-->            or, in a guest that runs, into empty slots ([`hotplug`])
//!                 Session  what must live as long as they are there
//! ```
//!
//! The guest drives the device without us: its registers are memory slots
//! ([`bars`]), its interrupts irqfds ([`interrupts`]), its DMA goes through the
//! host's IOMMU, in which the guest's memory is all there is ([`container`]), but for the BARs of
//! its other devices, if that is wanted ([`peers`]). What comes here is configuration space
//! ([`config`]) and what cannot be mapped: the MSI-X table, I/O ports, the expansion ROM.
//!
//! Trust: the guest is hostile and the device does as it says. What a device may
//! do to the host is limited by the IOMMU, by the kernel's VFIO, and by what of configuration
//! space is passed on.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use nacre_protocol::channel::{ChannelError, FdList, Fds};
use nacre_protocol::vm::{Iommu, Passthrough as Config, PciDevice};

use crate::pci::Port;
use crate::pci::placement::{Placement, PlacementError};
use crate::pci::root_port::RootPort;
use crate::stop::Stop;
use crate::vm::{Vm, VmError};
use crate::worker::Worker;

pub mod access;
pub mod bars;
pub mod bus_reset;
pub mod capabilities;
pub mod config;
pub mod container;
pub mod device;
pub mod events;
pub mod hotplug;
pub mod interrupts;
pub mod intx;
#[cfg(test)]
pub(crate) mod mock;
pub mod open;
pub mod peers;
mod sys;

pub use container::AddressSpace;
pub use device::VfioPci;

use config::ConfigError;
use container::{Container, Mapped};
use device::Endpoint;
use events::Watched;
use sys::VfioFile;

/// Why the guest cannot have a device.
#[derive(Debug, thiserror::Error)]
pub enum VfioError {
    /// The kernel refused something.
    #[error("PCI device {address}: cannot {what}: {source}")]
    Device {
        /// The device.
        address: String,
        /// What was asked.
        what: &'static str,
        /// The answer.
        source: io::Error,
    },
    /// It is not a device for a guest.
    #[error("PCI device {address}: {source}")]
    Config {
        /// The device.
        address: String,
        /// Why.
        source: ConfigError,
    },
    /// No address space.
    #[error("/dev/iommu: {0}")]
    Iommufd(#[source] io::Error),
    /// The guest's memory cannot be reached by the devices.
    #[error("mapping {mib} MiB of the guest at {iova:#x} for its PCI devices: {source}{hint}")]
    Map {
        /// Size of the region.
        mib: u64,
        /// Its address in the guest.
        iova: u64,
        /// The kernel's answer,
        source: io::Error,
        /// and what usually causes it.
        hint: &'static str,
    },
    /// The devices cannot reach each other by `/dev/iommu`, which maps no BARs.
    #[error(
        "pci_peers in nacre.toml asks for PCI devices that reach each other, which /dev/iommu has no way \
         to: load vfio_iommu_type1, so that there is /dev/vfio/vfio, with vfio_api = \"auto\", or set \
         pci_peers = false"
    )]
    NoPeers,
    /// The devices cannot reach each other.
    #[error(
        "PCI device {address}: mapping {mib} MiB of its BARs at {iova:#x} for the pod's other devices, \
         as pci_peers in nacre.toml asks: {source}{hint}"
    )]
    Peer {
        /// The device.
        address: String,
        /// Size of the part.
        mib: u64,
        /// Its address in the guest.
        iova: u64,
        /// The kernel's answer,
        source: io::Error,
        /// and what usually causes it.
        hint: &'static str,
    },
    /// See the source.
    #[error(transparent)]
    Placement(#[from] PlacementError),
    /// The slot's windows are too small for a device.
    #[error("PCI device {address}: {source}")]
    Room {
        /// The device.
        address: String,
        /// By how much.
        source: PlacementError,
    },
    /// See the source.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// No thread to watch the devices, or to plug some in.
    #[error("threads for PCI devices: {0}")]
    Thread(#[source] io::Error),
    /// No more descriptors of the same files.
    #[error("duplicating descriptors of PCI devices: {0}")]
    Duplicate(#[source] io::Error),
    /// Whoever plugs is wrong about the machine.
    #[error("slot {0} for PCI devices is not there, or not as it should be")]
    Slot(u8),
}

impl VfioError {
    /// For `map_err`: names the device and what was asked.
    pub fn device(address: &str, what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Device {
            address: address.to_owned(),
            what,
            source,
        }
    }
}

/// The devices of a machine, as the shim opened them.
pub struct Passthrough {
    container: Container,
    /// By address on the host.
    devices: Vec<(String, OwnedFd)>,
}

impl Passthrough {
    /// Takes the descriptors `config` names.
    ///
    /// # Errors
    ///
    /// When one is missing.
    pub fn take(config: &Config, fds: &mut Fds) -> Result<Self, ChannelError> {
        let container = match &config.iommu {
            Iommu::Container { container, groups } => Container::Groups {
                container: fds.take(*container)?,
                groups: groups
                    .iter()
                    .map(|group| fds.take(*group))
                    .collect::<Result<_, _>>()?,
            },
            Iommu::Iommufd(iommufd) => Container::Iommufd(fds.take(*iommufd)?),
        };
        Ok(Self {
            container,
            devices: config
                .devices
                .iter()
                .map(|device| Ok((device.address.clone(), fds.take(device.device)?)))
                .collect::<Result<_, ChannelError>>()?,
        })
    }

    /// What [`Passthrough::take`] takes at the other end; lists the descriptors.
    pub fn describe<'a>(&'a self, list: &mut FdList<'a>) -> Config {
        let iommu = match &self.container {
            Container::Groups { container, groups } => Iommu::Container {
                container: list.push(container.as_fd()),
                groups: groups
                    .iter()
                    .map(|group| list.push(group.as_fd()))
                    .collect(),
            },
            Container::Iommufd(iommufd) => Iommu::Iommufd(list.push(iommufd.as_fd())),
        };
        let devices = self.devices.iter().map(|(address, device)| PciDevice {
            address: address.clone(),
            device: list.push(device.as_fd()),
        });
        Config {
            iommu,
            devices: devices.collect(),
        }
    }

    /// What the groups are in, for those of devices that come later; `None` for iommufd, where
    /// nothing has to be kept.
    ///
    /// # Errors
    ///
    /// Those of dup(2).
    pub fn container(&self) -> io::Result<Option<OwnedFd>> {
        match &self.container {
            Container::Groups { container, .. } => container.try_clone().map(Some),
            Container::Iommufd(_) => Ok(None),
        }
    }

    /// So many devices that are none.
    #[cfg(test)]
    pub fn of_iommufd(count: usize) -> Self {
        let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        Self {
            container: Container::Iommufd(null()),
            devices: (0..count).map(|_| (String::new(), null())).collect(),
        }
    }

    /// How many devices there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.devices.len()
    }

    /// Whether there are several that could not reach each other.
    #[must_use]
    pub fn cannot_be_peers(&self) -> bool {
        self.len() > 1 && matches!(self.container, Container::Iommufd(_))
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.devices.is_empty()
    }

    /// Gives the devices to `vm`, in the address space that others are in already, or in
    /// a new one: the guest's memory is pinned from then on.
    ///
    /// # Errors
    ///
    /// When the kernel refuses something, or a device is not for a guest. The address
    /// space is as it was then.
    pub fn attach(
        self,
        vm: &Arc<Vm>,
        space: &mut Option<AddressSpace>,
    ) -> Result<Attached, VfioError> {
        let start = Instant::now();
        let Self { container, devices } = self;
        let groups = container.groups().map_err(VfioError::Duplicate)?;
        let files = container.kvm_files(devices.iter().map(|(_, device)| device));
        let known = KnownToKvm::new(vm, files.map_err(VfioError::Duplicate)?)?;
        let named = devices
            .iter()
            .map(|(address, device)| (address.as_str(), device));
        let (new, mapped) = match space {
            Some(space) => {
                space.join(named)?;
                (None, Mapped::default())
            }
            None => {
                let new = container.space()?;
                new.join(named)?;
                let mapped = new.map(vm.memory())?;
                (Some(new), mapped)
            }
        };
        let mut endpoints = devices
            .into_iter()
            .map(|(address, device)| {
                let device =
                    VfioFile::new(device).map_err(VfioError::device(&address, "ask what it is"))?;
                Endpoint::open(&address, Arc::new(device))
            })
            .collect::<Result<Vec<_>, VfioError>>()?;
        bus_reset::reset_rest(&mut endpoints, &groups)?;
        let attached = Attached {
            endpoints,
            known: Some(known),
        };
        attached.log(mapped, start);
        if new.is_some() {
            *space = new;
        }
        Ok(attached)
    }
}

/// Groups or devices that KVM knows, until this is dropped.
struct KnownToKvm {
    vm: Arc<Vm>,
    files: Vec<OwnedFd>,
}

impl KnownToKvm {
    fn new(vm: &Arc<Vm>, files: Vec<OwnedFd>) -> Result<Self, VmError> {
        vm.attach_vfio(files.iter().map(AsFd::as_fd))?;
        Ok(Self {
            vm: vm.clone(),
            files,
        })
    }

    /// KVM knows them no more.
    fn forget(&mut self) -> Result<(), VmError> {
        let files = std::mem::take(&mut self.files);
        self.vm.detach_vfio(files.iter().map(AsFd::as_fd))
    }
}

impl Drop for KnownToKvm {
    fn drop(&mut self) {
        if let Err(error) = self.forget() {
            tracing::warn!(%error, "KVM keeps a PCI device open");
        }
    }
}

/// Devices that can reach the guest's memory, which cannot reach them yet.
pub struct Attached {
    endpoints: Vec<Endpoint>,
    /// None in tests.
    known: Option<KnownToKvm>,
}

/// What must live as long as the devices are the guest's.
pub struct Session {
    watched: Vec<Watched>,
    known: Option<KnownToKvm>,
}

impl Attached {
    /// Has the guest see their expansion ROMs, or not.
    #[must_use]
    pub fn with_roms(self, roms: bool) -> Self {
        if !roms {
            return self;
        }
        let endpoints = self.endpoints.into_iter().map(Endpoint::with_rom);
        Self {
            endpoints: endpoints.collect(),
            known: self.known,
        }
    }

    /// One line that tells what it took.
    fn log(&self, mapped: Mapped, start: Instant) {
        let resets = self
            .endpoints
            .iter()
            .filter(|device| device.was_reset())
            .count();
        let names: Vec<_> = self.endpoints.iter().map(Endpoint::address).collect();
        let milliseconds = start.elapsed().as_millis();
        tracing::info!(
            devices = names.join(","),
            map_calls = mapped.calls,
            bytes_mapped = mapped.bytes,
            resets,
            %milliseconds,
            "PCI devices attached"
        );
    }

    /// Puts each behind a root port, from bus 1 on, with its BARs in the guest's windows, and in
    /// the address space `peers`, if they are to reach each other.
    ///
    /// # Errors
    ///
    /// When the windows are too small, or a BAR cannot be mapped.
    pub fn place(
        self,
        vm: &Arc<Vm>,
        placement: &mut Placement,
        peers: Option<&AddressSpace>,
    ) -> Result<(Vec<Port>, Session), VfioError> {
        let endpoints = self.endpoints.into_iter();
        let placed: Vec<_> = endpoints
            .map(|endpoint| {
                let placed = placement.place(&endpoint.requests());
                (endpoint, placed)
            })
            .collect();
        placement.check()?;
        let mut session = Session {
            watched: Vec::new(),
            known: self.known,
        };
        let mut ports = Vec::new();
        let mut reachable = Vec::new();
        for (bus, (endpoint, placed)) in (1..).zip(placed) {
            session.arm(&endpoint)?;
            let root = RootPort::new(bus, endpoint.link(), &placed);
            let device = VfioPci::new(
                vm,
                endpoint,
                root.line(),
                &placed.bars,
                placement.window64(),
            )?;
            reachable.push(device.reachable(&placed.bars));
            ports.push(Port::with(root, device));
        }
        let mapped = peers.map(|space| peers::map(space, &reachable));
        let mapped = mapped.transpose()?.unwrap_or_default();
        tracing::info!(
            bar_map_calls = mapped.calls,
            bar_bytes_mapped = mapped.bytes,
            "PCI devices placed"
        );
        Ok((ports, session))
    }
}

impl Session {
    /// Has the device tell what happens to it.
    fn arm(&mut self, endpoint: &Endpoint) -> Result<(), VfioError> {
        let events = events::arm(endpoint.address(), endpoint.device());
        let what = "have its errors reported";
        let events = events.map_err(VfioError::device(endpoint.address(), what))?;
        self.watched.extend(events);
        Ok(())
    }

    /// Ends the machine when something happens to a device.
    ///
    /// # Errors
    ///
    /// When there is no thread for it.
    pub fn watch(self, stop: Arc<Stop>) -> Result<Watch, VfioError> {
        let worker = events::watch(self.watched, stop).map_err(VfioError::Thread)?;
        Ok(Watch {
            worker,
            known: self.known,
        })
    }
}

/// A session whose devices are watched.
pub struct Watch {
    worker: Worker<u64>,
    known: Option<KnownToKvm>,
}

impl Watch {
    /// Does not watch any more; KVM forgets the devices.
    ///
    /// # Errors
    ///
    /// KVM's: it keeps a device open.
    pub fn stop(self) -> Result<(), VmError> {
        match self.worker.stop() {
            Some(polls) => tracing::info!(polls, "PCI devices not watched any more"),
            None => tracing::error!("the thread that watches PCI devices panicked"),
        }
        self.known.map_or(Ok(()), |mut known| known.forget())
    }

    /// The same when the machine ends, with which goes what KVM keeps.
    pub fn end(self) {
        if let Err(error) = self.stop() {
            tracing::warn!(%error, "KVM keeps a PCI device open");
        }
    }
}

#[cfg(test)]
mod tests;
