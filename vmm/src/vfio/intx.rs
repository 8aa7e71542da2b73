//! The interrupt line of a device of the host (`Documentation/driver-api/vfio.rst`).
//!
//! The host masks the line when the device raises it, so that it can wait for a guest. Two
//! events connect it with the guest's ([`crate::vm::lines`]) without this process:
//!
//! ```text
//!   device --> host: masks, --trigger--> the guest's line --> the guest serves the device, ends the
//!      ^                                                      interrupt
//!      +-------- unmasks <-----------resample-------------------+
//! ```
//!
//! A device that wants more, or whose line another one raised, does so then.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::access::{Access, Irq};
use crate::vm::Vm;

/// A device's line.
pub struct Intx {
    vm: Arc<Vm>,
    line: u32,
    /// While it is on, or could not be turned off.
    events: Option<Events>,
    /// What the guest used of the device when it could not be turned on.
    failed: Option<u16>,
}

struct Events {
    trigger: EventFd,
    resample: EventFd,
    /// Whether the device unmasks its line by `resample`: else there is one interrupt, and no more.
    is_complete: bool,
}

impl Intx {
    /// Off; in the guest it is `line`.
    #[must_use]
    pub fn new(vm: &Arc<Vm>, line: u32) -> Self {
        Self {
            vm: vm.clone(),
            line,
            events: None,
            failed: None,
        }
    }

    /// Whether somebody listens to it.
    #[must_use]
    pub fn is_on(&self) -> bool {
        let events = self.events.as_ref();
        events.is_some_and(|events| events.is_complete)
    }

    /// Lets the device raise the guest's line, if it does not already. What has failed is tried
    /// again when the guest uses something else of the device (`in_use`), not at its every write.
    ///
    /// # Errors
    ///
    /// The device's or KVM's.
    pub fn turn_on(&mut self, device: &dyn Access, in_use: u16) -> io::Result<()> {
        if self.is_on() || self.failed == Some(in_use) {
            return Ok(());
        }
        let result = self.turn_off(device).and_then(|()| self.attach(device));
        self.failed = result.is_err().then_some(in_use);
        result
    }

    /// What was signalled before the kernel listens to `resample`, it finds.
    fn attach(&mut self, device: &dyn Access) -> io::Result<()> {
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let mut events = Events {
            trigger: event()?,
            resample: event()?,
            is_complete: false,
        };
        let Events {
            trigger, resample, ..
        } = &events;
        self.vm
            .add_resample_irqfd(trigger, resample, self.line)
            .map_err(io::Error::other)?;
        if let Err(error) = device.set_irqs(Irq::Intx, 0, &[Some(trigger)]) {
            self.leave(&events);
            return Err(error.into());
        }
        let result = device.unmask_on(resample);
        events.is_complete = result.is_ok();
        self.events = Some(events);
        result.inspect_err(|_| {
            // Of two errors the first is told.
            let _ = self.turn_off(device);
        })
    }

    /// Undoes [`Self::turn_on`].
    ///
    /// # Errors
    ///
    /// The device's; it is on still.
    pub fn turn_off(&mut self, device: &dyn Access) -> io::Result<()> {
        self.failed = None;
        if self.events.is_some() {
            device.disable_irqs(Irq::Intx)?;
            self.release();
        }
        Ok(())
    }

    /// Leaves the guest's line.
    pub fn release(&mut self) {
        if let Some(events) = self.events.take() {
            self.leave(&events);
        }
    }

    fn leave(&self, events: &Events) {
        if let Err(error) = self.vm.remove_irqfd(&events.trigger, self.line) {
            tracing::warn!(%error, "an interrupt line stays attached");
        }
    }
}
