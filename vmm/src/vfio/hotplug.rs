//! Devices that come to a guest that runs, and go again, by its root ports' hot-plug
//! slots ([`crate::pci::slot`]).
//!
//! ```text
//!   plug:   attach (map the memory for DMA if it is the first device), fit into the slots' windows,
//!           show them all
//!   unplug: registers nowhere, interrupts off, reset; descriptors closed. With the last
//!           device goes the address space, and nothing is pinned any more
//! ```
//!
//! Plugging is all or nothing, and may take seconds, for pinning. So a thread of its own does
//! the jobs, one after another, and tells what became of each. Whoever unplugs asks the guest
//! to let go first; it is not waited for here. Unplugging goes on to its end whatever fails: then
//! KVM may have something of a device as long as the machine is there.

use std::sync::Arc;
use std::sync::mpsc::{SendError, Sender, channel};
use std::thread::JoinHandle;

use super::device::VfioPci;
use super::{AddressSpace, Attached, Passthrough, Session, VfioError, Watch};
use crate::pci::placement::{Placement, PlacementError};
use crate::pci::root_port::RootPort;
use crate::pci::{PciRoot, Port};
use crate::stop::Stop;
use crate::vm::Vm;

/// `count` root ports with empty slots, from bus `first_bus` on, which share what
/// `placement` has left.
///
/// # Errors
///
/// When that is nothing.
pub fn empty_ports(
    vm: &Arc<Vm>,
    first_bus: u8,
    count: u8,
    placement: &mut Placement,
) -> Result<Vec<Port>, PlacementError> {
    let ports = (first_bus..).zip(placement.share(count)?);
    let ports = ports.map(|(bus, room)| Port::empty(RootPort::with_slot(vm, bus, &room), room));
    Ok(ports.collect())
}

/// What is to be done; slots are counted from the first empty one of the machine.
pub enum Job {
    /// A device for each of the slots.
    Plug(Vec<u8>, Passthrough),
    /// What came to these slots together.
    Unplug(Vec<u8>),
}

/// The slots of a machine.
pub struct Slots {
    vm: Arc<Vm>,
    root: Arc<PciRoot>,
    window64: Option<(u64, u64)>,
    /// The place of the first slot among the root ports.
    first: usize,
    space: Option<AddressSpace>,
    /// Devices that do not go are in it too.
    space_stays: bool,
    roms: bool,
    stop: Arc<Stop>,
    plugged: Vec<(Vec<u8>, Watch)>,
}

impl Slots {
    /// Those of `root`, whose first is at the place `first` among its ports. `space` is that of
    /// the devices which are there from the start.
    #[must_use]
    pub fn new(
        vm: &Arc<Vm>,
        root: &Arc<PciRoot>,
        window64: Option<(u64, u64)>,
        first: usize,
        space: Option<AddressSpace>,
        stop: &Arc<Stop>,
    ) -> Self {
        Self {
            vm: vm.clone(),
            root: root.clone(),
            window64,
            first,
            space_stays: space.is_some(),
            space,
            roms: false,
            stop: stop.clone(),
            plugged: Vec::new(),
        }
    }

    /// Whether the guest sees the devices' expansion ROMs.
    #[must_use]
    pub fn with_roms(self, roms: bool) -> Self {
        Self { roms, ..self }
    }

    /// Does a job, unless the machine has ended; returns with how many devices.
    fn work(&mut self, job: Job) -> Result<u64, String> {
        if self.stop.outcome().is_some() {
            return Err("the machine has ended".into());
        }
        let (count, result) = match job {
            Job::Plug(slots, devices) => (slots.len(), self.plug(&slots, devices)),
            Job::Unplug(slots) => (slots.len(), self.unplug(&slots)),
        };
        result
            .map(|()| count as u64)
            .map_err(|error| error.to_string())
    }

    fn plug(&mut self, slots: &[u8], devices: Passthrough) -> Result<(), VfioError> {
        let attached = devices.attach(&self.vm, &mut self.space);
        let result = attached.and_then(|attached| self.show(slots, attached));
        if result.is_err() {
            // It may have been made for them.
            self.leave_space();
        }
        result
    }

    fn show(&mut self, slots: &[u8], attached: Attached) -> Result<(), VfioError> {
        let Attached { endpoints, known } = attached.with_roms(self.roms);
        if let Some(more) = slots.get(endpoints.len()) {
            return Err(VfioError::Slot(*more));
        }
        let mut session = Session {
            watched: Vec::new(),
            known,
        };
        let mut ready = Vec::new();
        for (index, endpoint) in endpoints.into_iter().enumerate() {
            let slot = slots.get(index).copied().unwrap_or(u8::MAX);
            let port = self.port(slot).filter(|port| !port.is_taken());
            let port = port.ok_or(VfioError::Slot(slot))?;
            let places = port.room().fit(&endpoint.requests()).map_err(|source| {
                let address = endpoint.address().to_owned();
                VfioError::Room { address, source }
            })?;
            session.arm(&endpoint)?;
            let link = endpoint.link();
            let device = VfioPci::new(&self.vm, endpoint, port.line(), &places, self.window64)?;
            ready.push((slot, device, link));
        }
        let watch = session.watch(self.stop.clone())?;
        self.plugged.push((slots.to_owned(), watch));
        for (slot, device, link) in ready {
            if let Some(port) = self.port(slot) {
                port.plug(device, link);
            }
        }
        tracing::info!(?slots, "PCI devices plugged in");
        Ok(())
    }

    fn unplug(&mut self, slots: &[u8]) -> Result<(), VfioError> {
        let mut plugged = self.plugged.iter();
        let at = plugged.position(|(of, _)| of == slots);
        let first = slots.first().copied().unwrap_or(u8::MAX);
        let (slots, watch) = self.plugged.remove(at.ok_or(VfioError::Slot(first))?);
        let ports = slots.iter().filter_map(|slot| self.port(*slot));
        let devices: Vec<_> = ports.filter_map(Port::unplug).collect();
        let mut result = Ok(());
        // Quiet by now, all of them: what could write to the others is not left.
        for device in devices {
            device.reset();
            result = result.and(device.close());
        }
        result = result.and(watch.stop().map_err(VfioError::from));
        self.leave_space();
        tracing::info!(?slots, "PCI devices unplugged");
        result
    }

    /// The kernel unmaps the guest's memory when nothing is in its address space.
    fn leave_space(&mut self) {
        if self.plugged.is_empty() && !self.space_stays {
            self.space = None;
        }
    }

    fn port(&self, slot: u8) -> Option<&Port> {
        self.root.ports().nth(self.first + usize::from(slot))
    }

    /// When the machine has ended and its devices were stopped.
    fn close(self) {
        for (_, watch) in self.plugged {
            watch.end();
        }
    }
}

/// Who is told what became of a job.
type Done = Box<dyn FnOnce(Result<u64, String>) + Send>;

/// The thread that does the jobs.
pub struct Worker {
    jobs: Sender<(Job, Done)>,
    thread: JoinHandle<Slots>,
}

impl Worker {
    /// Starts it.
    ///
    /// # Errors
    ///
    /// When there is no thread.
    pub fn start(mut slots: Slots) -> Result<Self, VfioError> {
        let (jobs, to_do) = channel::<(Job, Done)>();
        let work = move || {
            for (job, done) in to_do {
                done(slots.work(job));
            }
            slots
        };
        let thread = std::thread::Builder::new()
            .name("hotplug".into())
            .spawn(work)
            .map_err(VfioError::Thread)?;
        Ok(Self { jobs, thread })
    }

    /// Has a job done. `done` is told how many devices it was about, or why they are not plugged
    /// in, or may not be free.
    pub fn request(&self, job: Job, done: impl FnOnce(Result<u64, String>) + Send + 'static) {
        let done: Done = Box::new(done);
        // It ends only with `self`, unless it panicked.
        if let Err(SendError((_, done))) = self.jobs.send((job, done)) {
            done(Err("the thread for PCI devices is gone".into()));
        }
    }

    /// Lets it finish what it does and ends it, before the machine's devices are stopped.
    #[must_use]
    pub fn stop(self) -> Option<Finished> {
        drop(self.jobs);
        let slots = self.thread.join();
        if slots.is_err() {
            tracing::error!("the thread for PCI devices panicked");
        }
        slots.ok().map(Finished)
    }
}

/// Slots to which no more devices come.
pub struct Finished(Slots);

impl Finished {
    /// Gives up what the devices need, after they were stopped.
    pub fn close(self) {
        self.0.close();
    }
}

#[cfg(test)]
mod tests;
