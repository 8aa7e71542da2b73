//! Interrupts of a device of the host: MSI and MSI-X here, its line in [`super::intx`].
//!
//! The host's interrupt handler signals an eventfd, which is an irqfd of KVM: an
//! interrupt reaches the guest without this process ([`crate::pci::msix`]).
//!
//! ```text
//!   device --vector--> host --eventfd (VFIO_DEVICE_SET_IRQS)--> irqfd --GSI--> vCPU
//! ```
//!
//! What the guest writes to its table or capability changes the right half only:
//! address, data and mask are KVM's routes. The left half is turned on with MSI or MSI-X,
//! all vectors at once (a kernel before 6.5 cannot add one later), but an event is
//! attached to a vector only when the guest first unmasks it. Vectors that a guest
//! never uses cost no interrupt handler of the host, event or route of KVM then.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::access::{Access, Irq, IrqError};
use super::capabilities::{MsiLayout, MsixLayout};
use super::config::GuestConfig;
use super::intx::Intx;
use crate::pci::msix::{ENABLE, Msix};
use crate::vm::{MsiRoute, Vm};

/// Message control of MSI: where the number of vectors is.
const MSI_ENABLED_VECTORS: u16 = 4;

/// A device's interrupts.
pub struct Interrupts {
    intx: Option<Intx>,
    msi: Option<Msi>,
    msix: Option<(MsixLayout, Vectors)>,
}

struct Msi {
    layout: MsiLayout,
    vectors: Vectors,
    /// Control, address and data that have taken effect, if the last ones have.
    seen: Option<(u16, MsiRoute)>,
}

/// Vectors of one kind.
struct Vectors {
    irq: Irq,
    /// KVM's side.
    table: Msix,
    count: u16,
    /// How many vectors are turned on at the host; 0 when it is off.
    on: u16,
    /// Those whose event is attached.
    armed: Vec<bool>,
}

impl Interrupts {
    /// All off; its line, if the device at `address` has one, is `line` of the guest's.
    #[must_use]
    pub fn new(vm: &Arc<Vm>, config: &GuestConfig, line: u32, address: &str) -> Self {
        let layout = config.layout();
        let intx = config.has_intx().then(|| Intx::new(vm, line, address));
        let msi = layout.msi.map(|layout| {
            let route = MsiRoute {
                address: 0,
                data: 0,
            };
            Msi {
                layout,
                vectors: Vectors::new(vm, Irq::Msi, layout.vectors),
                seen: Some((0, route)),
            }
        });
        let msix = layout
            .msix
            .map(|layout| (layout, Vectors::new(vm, Irq::Msix, layout.vectors)));
        Self { intx, msi, msix }
    }

    /// To be called after a write to configuration space.
    ///
    /// # Errors
    ///
    /// The device's, when it does not turn its interrupts on or off.
    pub fn config_changed(
        &mut self,
        config: &GuestConfig,
        device: &Arc<dyn Access>,
    ) -> io::Result<()> {
        let (shared, device) = (device, &**device);
        // The kernel has one kind on at a time.
        let is_line = config.wants_intx();
        let mut result = match &mut self.intx {
            Some(intx) if !is_line => intx.turn_off(device),
            _ => Ok(()),
        };
        if let Some(msi) = &mut self.msi {
            result = result.and(msi.update(config, device));
        }
        if let Some((layout, vectors)) = &mut self.msix {
            let control = config.u16_at(layout.control);
            vectors.table.set_control(control);
            let count = config.msix_is_on().then_some(vectors.count);
            result = result.and(vectors.sync(device, count));
        }
        result?;
        match &mut self.intx {
            Some(intx) if is_line => intx.turn_on(shared, config.in_use()),
            _ => Ok(()),
        }
    }

    /// Whether somebody listens to the device's line.
    #[must_use]
    pub fn line_is_on(&self) -> bool {
        self.intx.as_ref().is_some_and(Intx::is_on)
    }

    /// What KVM does when the guest has ended an interrupt of the line.
    #[cfg(test)]
    pub fn end_of_line(&self) {
        self.intx.as_ref().unwrap().end();
    }

    /// Reads the MSI-X table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        match &self.msix {
            Some((_, vectors)) => vectors.table.read_table(offset, data),
            None => data.fill(0),
        }
    }

    /// Writes the MSI-X table.
    ///
    /// # Errors
    ///
    /// The device's.
    pub fn write_table(&mut self, offset: u64, data: &[u8], device: &dyn Access) -> io::Result<()> {
        let Some((_, vectors)) = &mut self.msix else {
            return Ok(());
        };
        vectors.table.write_table(offset, data);
        vectors.arm(device)
    }

    /// Reads MSI-X's pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        match &self.msix {
            Some((_, vectors)) => vectors.table.read_pending(offset, data),
            None => data.fill(0),
        }
    }

    /// Leaves what the vectors have of KVM's, for good.
    pub fn release(&mut self) {
        let msi = self.msi.as_mut().map(|msi| &mut msi.vectors);
        let msix = self.msix.as_mut().map(|(_, vectors)| vectors);
        for vectors in [msi, msix].into_iter().flatten() {
            vectors.table.release();
        }
        if let Some(intx) = &mut self.intx {
            intx.release();
        }
    }

    /// Turns everything off at the host.
    ///
    /// # Errors
    ///
    /// The device's.
    pub fn stop(&mut self, device: &dyn Access) -> io::Result<()> {
        let msi = self.msi.as_mut().map(|msi| &mut msi.vectors);
        let msix = self.msix.as_mut().map(|(_, vectors)| vectors);
        let mut result = Ok(());
        for vectors in [msi, msix].into_iter().flatten() {
            result = result.and(vectors.sync(device, None));
        }
        match &mut self.intx {
            Some(intx) => result.and(intx.turn_off(device)),
            None => result,
        }
    }
}

impl Msi {
    fn update(&mut self, config: &GuestConfig, device: &dyn Access) -> io::Result<()> {
        let MsiLayout { control, wide, .. } = self.layout;
        let [low, high, data] = if wide { [2, 6, 10] } else { [2, 0, 6] };
        let high = match high {
            0 => 0,
            high => config.u32_at(control + high),
        };
        let route = MsiRoute {
            address: u64::from(high) << 32 | u64::from(config.u32_at(control + low)),
            data: config.u16_at(control + data).into(),
        };
        let control = config.u16_at(control);
        if self.seen == Some((control, route)) {
            return Ok(());
        }
        // What fails is tried again.
        self.seen = None;
        // Encoded as a power of two; what the device does not have is not enabled.
        let count = (1u16 << (control >> MSI_ENABLED_VECTORS & 0b111)).min(self.vectors.count);
        for vector in 0..self.vectors.count {
            let data = route.data & !u32::from(count - 1) | u32::from(vector);
            self.vectors
                .table
                .set_entry(vector, MsiRoute { data, ..route }, vector >= count);
        }
        let enabled = config.msi_is_on();
        let on = if enabled { ENABLE } else { 0 };
        self.vectors.table.set_control(u16::from_le_bytes([0, on]));
        self.vectors.sync(device, enabled.then_some(count))?;
        self.seen = Some((control, route));
        Ok(())
    }
}

impl Vectors {
    fn new(vm: &Arc<Vm>, irq: Irq, count: u16) -> Self {
        Self {
            irq,
            table: Msix::new(vm, count),
            count,
            on: 0,
            armed: vec![false; count.into()],
        }
    }

    /// Has `count` vectors on at the host, or none, and the events of all
    /// that are unmasked attached.
    fn sync(&mut self, device: &dyn Access, count: Option<u16>) -> io::Result<()> {
        let count = count.unwrap_or(0);
        if self.on != 0 && self.on != count {
            device.disable_irqs(self.irq)?;
            self.on = 0;
            self.armed.fill(false);
        }
        let mut result = Ok(());
        if self.on != count {
            result = self.turn_on(device, count);
        }
        result.and(self.arm(device))
    }

    /// Turns `count` vectors on. When the host has fewer, those it has are on: a guest
    /// seldom uses all, and a kernel since 6.5 may find the others later.
    fn turn_on(&mut self, device: &dyn Access, count: u16) -> io::Result<()> {
        // One that is not to be had is missed, and reported, when it is to be attached.
        let events: Vec<_> = (0..count)
            .map(|vector| self.unmasked(vector).unwrap_or(None))
            .collect();
        let mut events: Vec<_> = events.iter().map(Option::as_deref).collect();
        let mut result = Ok(());
        if let Err(error) = device.set_irqs(self.irq, 0, &events) {
            let IrqError::Fewer { available, .. } = error else {
                return Err(error.into());
            };
            events.truncate(usize::try_from(available).unwrap_or(usize::MAX));
            device.set_irqs(self.irq, 0, &events)?;
            result = Err(error.into());
        }
        self.on = count;
        for (armed, event) in self.armed.iter_mut().zip(events) {
            *armed = event.is_some();
        }
        result
    }

    /// Attaches the events of vectors that have been unmasked since they were turned on.
    fn arm(&mut self, device: &dyn Access) -> io::Result<()> {
        let mut result = Ok(());
        for vector in 0..self.on {
            let armed = self.arm_vector(device, vector).map_err(|error| {
                let what = format!("{:?} vector {vector}: {error}", self.irq);
                io::Error::new(error.kind(), what)
            });
            result = result.and(armed);
        }
        result
    }

    fn arm_vector(&mut self, device: &dyn Access, vector: u16) -> io::Result<()> {
        let at = usize::from(vector);
        if self.armed.get(at) != Some(&false) {
            return Ok(());
        }
        let Some(event) = self.unmasked(vector)? else {
            return Ok(());
        };
        device.set_irqs(self.irq, vector.into(), &[Some(&*event)])?;
        self.armed[at] = true;
        Ok(())
    }

    /// The event of a vector that is unmasked.
    fn unmasked(&mut self, vector: u16) -> io::Result<Option<Arc<EventFd>>> {
        if !self.table.is_unmasked(vector) {
            return Ok(None);
        }
        self.table.event(vector).map_err(io::Error::other)
    }
}
