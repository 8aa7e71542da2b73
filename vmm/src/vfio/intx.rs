//! The interrupt line of a device of the host (`Documentation/driver-api/vfio.rst`).
//!
//! The host masks the line when the device raises it, so that it can wait for a guest. Two
//! events connect it with the guest's ([`crate::vm::lines`]) without this process:
//!
//! ```text
//!   device --> host: masks, --raise--> the guest's line --> the guest serves the device, ends the
//!      ^                                                    interrupt
//!      +-------- unmasks <-----------again--------------------+
//! ```
//!
//! A device that wants more, or whose line another one raised, does so then.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::access::{Access, Irq};
use crate::vm::{Vm, VmError};

/// A device's line.
pub struct Intx {
    vm: Arc<Vm>,
    line: u32,
    /// While it is on.
    events: Option<Events>,
}

struct Events {
    raise: EventFd,
    again: EventFd,
}

impl Intx {
    /// Off; in the guest it is `line`.
    #[must_use]
    pub fn new(vm: &Arc<Vm>, line: u32) -> Self {
        Self {
            vm: vm.clone(),
            line,
            events: None,
        }
    }

    /// Lets the device raise the guest's line, if it does not already.
    ///
    /// # Errors
    ///
    /// The device's or KVM's; it is off then.
    pub fn turn_on(&mut self, device: &dyn Access) -> io::Result<()> {
        if self.events.is_some() {
            return Ok(());
        }
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let events = Events {
            raise: event()?,
            again: event()?,
        };
        let Events { raise, again } = &events;
        self.vm
            .add_line(raise, again, self.line)
            .map_err(io::Error::other)?;
        self.events = Some(events);
        let result = self.attach(device);
        if result.is_err() {
            self.release();
        }
        result
    }

    /// What was signalled before the kernel listens to `again`, it finds.
    fn attach(&self, device: &dyn Access) -> io::Result<()> {
        let Some(Events { raise, again }) = &self.events else {
            return Ok(());
        };
        device.set_irqs(Irq::Intx, 0, &[Some(raise)])?;
        device.unmask_on(again).inspect_err(|_| {
            // Of two errors the first is told.
            let _ = device.disable_irqs(Irq::Intx);
        })
    }

    /// Undoes [`Self::turn_on`].
    ///
    /// # Errors
    ///
    /// The device's; it is on still.
    pub fn turn_off(&mut self, device: &dyn Access) -> io::Result<()> {
        if self.events.is_some() {
            device.disable_irqs(Irq::Intx)?;
            self.release();
        }
        Ok(())
    }

    /// Leaves the guest's line.
    pub fn release(&mut self) {
        if let Some(events) = self.events.take()
            && let Err(error) = self.leave(&events)
        {
            tracing::warn!(%error, "an interrupt line stays attached");
        }
    }

    fn leave(&self, events: &Events) -> Result<(), VmError> {
        self.vm.remove_irqfd(&events.raise, self.line)
    }
}
