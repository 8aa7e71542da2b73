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
//! A device that wants more, or whose line another one raised, does so then. Some drivers of mediated
//! devices unmask at no event: for those a thread waits for it, and tells them by a call.

use std::io;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::access::{Access, Irq};
use crate::vm::Vm;
use crate::worker::Worker;

/// A device's line.
pub struct Intx {
    vm: Arc<Vm>,
    line: u32,
    /// The device's name in messages.
    address: String,
    /// While it is on, or could not be turned off.
    events: Option<Events>,
    /// What the guest used of the device when it could not be turned on.
    failed: Option<u16>,
}

struct Events {
    trigger: EventFd,
    resample: EventFd,
    /// Who tells the device of `resample`, if it does not listen itself.
    messenger: Option<Worker<()>>,
    /// Whether the device unmasks its line by `resample`: else there is one interrupt, and no more.
    is_complete: bool,
}

impl Events {
    /// The device hears nothing more from this process.
    fn dismiss(&mut self) {
        if let Some(messenger) = self.messenger.take() {
            self.is_complete = false;
            messenger.stop();
        }
    }
}

impl Intx {
    /// Off; in the guest it is `line`. `address` is the device's name in messages.
    #[must_use]
    pub fn new(vm: &Arc<Vm>, line: u32, address: &str) -> Self {
        Self {
            vm: vm.clone(),
            line,
            address: address.to_owned(),
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
    pub fn turn_on(&mut self, device: &Arc<dyn Access>, in_use: u16) -> io::Result<()> {
        if self.is_on() || self.failed == Some(in_use) {
            return Ok(());
        }
        let result = self.turn_off(&**device).and_then(|()| self.attach(device));
        self.failed = result.is_err().then_some(in_use);
        result
    }

    /// What was signalled before somebody listens to `resample`, he finds.
    fn attach(&mut self, device: &Arc<dyn Access>) -> io::Result<()> {
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let mut events = Events {
            trigger: event()?,
            resample: event()?,
            messenger: None,
            is_complete: false,
        };
        let Events {
            trigger, resample, ..
        } = &events;
        self.vm
            .add_resample_irqfd(trigger, resample, self.line)
            .map_err(io::Error::other)?;
        if let Err(error) = device.set_irqs(Irq::Intx, 0, &[Some(trigger)]) {
            self.leave(events);
            return Err(error.into());
        }
        let result = match device.unmask_on(resample) {
            Ok(false) => messenger(device, resample, &self.address).map(Some),
            result => result.map(|_| None),
        };
        events.is_complete = result.is_ok();
        let result = result.map(|messenger| events.messenger = messenger);
        self.events = Some(events);
        result.inspect_err(|_| {
            // Of two errors the first is told.
            let _ = self.turn_off(&**device);
        })
    }

    /// Undoes [`Self::turn_on`].
    ///
    /// # Errors
    ///
    /// The device's; it is on still.
    pub fn turn_off(&mut self, device: &dyn Access) -> io::Result<()> {
        self.failed = None;
        if let Some(events) = &mut self.events {
            // First: a line that is off is none to unmask.
            events.dismiss();
            device.disable_irqs(Irq::Intx)?;
            self.release();
        }
        Ok(())
    }

    /// See [`super::interrupts::Interrupts::end_of_line`].
    #[cfg(test)]
    pub fn end(&self) {
        let events = self.events.as_ref().unwrap();
        events.resample.write(1).unwrap();
    }

    /// Leaves the guest's line.
    pub fn release(&mut self) {
        if let Some(events) = self.events.take() {
            self.leave(events);
        }
    }

    fn leave(&self, mut events: Events) {
        events.dismiss();
        if let Err(error) = self.vm.remove_irqfd(&events.trigger, self.line) {
            tracing::warn!(%error, "an interrupt line stays attached");
        }
    }
}

/// A thread that has the device at `address` unmask its line whenever `resample` is signalled.
fn messenger(
    device: &Arc<dyn Access>,
    resample: &EventFd,
    address: &str,
) -> io::Result<Worker<()>> {
    // Who cannot be told either is found out here, not at the guest's first interrupt.
    device.unmask()?;
    let (device, resample, address) = (device.clone(), resample.try_clone()?, address.to_owned());
    Worker::spawn("intx", move |mut poller| {
        let mut unmask = || {
            poller.add(&resample, EventSet::IN, 0)?;
            while poller.wait(-1)?.is_some() {
                // An interrupted wait has signalled nothing.
                if resample.read().is_ok() {
                    device.unmask()?;
                }
            }
            io::Result::Ok(())
        };
        if let Err(error) = unmask() {
            tracing::warn!(device = address, %error, "its interrupt line stays masked");
        }
    })
}
