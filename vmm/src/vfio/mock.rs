//! A device for tests: memory for configuration space and BARs, and a record of
//! what it was told. Of interrupts it takes what VFIO takes (`vfio_pci_intrs.c`).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use nix::poll::{PollFd, PollFlags, poll};
use vmm_sys_util::eventfd::EventFd;

use super::access::{Access, CONFIG_REGION, Irq, IrqError, Neighbor, ROM_REGION, Region};
use crate::vm::Mapping;

/// Offsets of the capabilities in [`space`].
pub const POWER: usize = 0x40;
pub const MSI: usize = 0x50;
pub const EXPRESS: usize = 0x70;
pub const MSIX: usize = 0xb0;
pub const VPD: usize = 0xc0;
pub const VENDOR: usize = 0xd0;
/// And of the extended ones.
pub const ERRORS: usize = 0x100;
pub const SERIAL: usize = 0x140;
pub const VIRTUAL_FUNCTIONS: usize = 0x150;
pub const VENDOR_EXTENDED: usize = 0x190;
pub const ACCESS_CONTROL: usize = 0x1a0;
/// BAR 0, with the MSI-X table.
pub const BAR0_SIZE: u64 = 0x8000;
pub const TABLE: u64 = 0x2000;
pub const PENDING: u64 = 0x3000;
pub const VECTORS: u16 = 16;
/// Bits of the command register.
const MEMORY_SPACE: u16 = 1 << 1;
const MASTER: u16 = 1 << 2;
const INTX_DISABLE: u16 = 1 << 10;

/// What the device holds and has seen.
pub struct State {
    pub config: Vec<u8>,
    pub bar: Vec<u8>,
    /// BAR 5,
    pub ports: [u8; 0x20],
    /// and the expansion ROM.
    pub rom: Vec<u8>,
    pub sizes: [u64; 6],
    /// Of BAR 0,
    pub mappable: Vec<(u64, u64)>,
    /// the start of a part of which it is not true after all,
    pub unmappable: Option<u64>,
    /// and what has been mapped: region, offset, length.
    pub mapped: Vec<(u32, u64, u64)>,
    pub no_events: bool,
    pub is_gone: bool,
    /// Vectors the host has at first, and later one by one.
    pub free_vectors: u32,
    /// One whose event is not taken.
    pub refused_vector: Option<u32>,
    /// Whether INTx cannot be unmasked,
    pub is_never_unmasked: bool,
    /// or by no event, and signals this when it is by a call.
    pub unmasked: Option<EventFd>,
    /// What is not turned off.
    pub stuck: Option<Irq>,
    /// Whether it can be reset alone,
    pub can_reset: bool,
    /// how often it was,
    pub resets: u32,
    /// what is reset with its bus,
    pub on_bus: Vec<Neighbor>,
    /// and how often that was.
    pub bus_resets: u32,
    /// Writes to configuration space, in order.
    pub config_writes: Vec<(u64, Vec<u8>)>,
    /// Calls about interrupts, in words.
    pub calls: Vec<String>,
    /// What is done to it and those it shares this with, in order.
    pub journal: Arc<Mutex<Vec<&'static str>>>,
    /// INTx, MSI or MSI-X, whichever is on.
    pub on: Option<Irq>,
    /// Its line might have interrupted the host at a time when nobody listened.
    pub was_loose: bool,
    events: Vec<(Irq, u32, EventFd)>,
    /// Unmasks INTx.
    pub unmask: Option<EventFd>,
}

pub struct Mock(Mutex<State>);

impl Default for Mock {
    fn default() -> Self {
        Self(Mutex::new(State {
            config: space(),
            bar: vec![0; 0x8000],
            ports: [0; 0x20],
            rom: (0..=255).cycle().take(0x1000).collect(),
            sizes: [BAR0_SIZE, 0, 0x1000_0000, 0, 0x100, 0x20],
            mappable: vec![(0, BAR0_SIZE)],
            unmappable: None,
            mapped: Vec::new(),
            no_events: false,
            is_gone: false,
            free_vectors: u32::MAX,
            refused_vector: None,
            is_never_unmasked: false,
            unmasked: None,
            stuck: None,
            can_reset: true,
            resets: 0,
            on_bus: Vec::new(),
            bus_resets: 0,
            config_writes: Vec::new(),
            calls: Vec::new(),
            journal: Arc::default(),
            on: None,
            was_loose: false,
            events: Vec::new(),
            unmask: None,
        }))
    }
}

impl Mock {
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Raises an interrupt; `false` if nobody listens.
    pub fn signal(&self, irq: Irq, vector: u32) -> bool {
        let event = self.event(irq, vector);
        event.is_some_and(|event| event.write(1).is_ok())
    }

    /// One journal for several, empty.
    pub fn share_journal(mocks: &[Arc<Self>]) -> Arc<Mutex<Vec<&'static str>>> {
        let journal = Arc::default();
        for mock in mocks {
            mock.state().journal = Arc::clone(&journal);
        }
        journal
    }

    /// The event of an interrupt, if somebody listens.
    pub fn event(&self, irq: Irq, vector: u32) -> Option<EventFd> {
        let state = self.state();
        let mut events = state.events.iter();
        let found = events.find(|event| (event.0, event.1) == (irq, vector));
        found.map(|(_, _, event)| event.try_clone().unwrap())
    }

    /// Calls about interrupts since the last time.
    pub fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.state().calls)
    }
}

impl State {
    /// Its command register.
    pub fn command(&self) -> u16 {
        u16::from_le_bytes([self.config[4], self.config[5]])
    }

    /// To be called after whatever may let the line loose. That it is when VFIO opens it is no matter.
    fn look_at_line(&mut self) {
        let is_ours = self.config_writes.iter().any(|(at, _)| *at == 4);
        let is_loose = self.command() & INTX_DISABLE == 0;
        self.was_loose |= is_ours && is_loose && self.on != Some(Irq::Intx);
    }

    fn bytes(&mut self, region: u32, offset: u64, len: usize) -> io::Result<&mut [u8]> {
        if self.is_gone {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if region == ROM_REGION && self.command() & MEMORY_SPACE == 0 {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let bytes: &mut [u8] = match region {
            CONFIG_REGION => &mut self.config,
            0 => &mut self.bar,
            5 => &mut self.ports,
            ROM_REGION => &mut self.rom,
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        };
        let start = usize::try_from(offset).unwrap();
        let end = start.checked_add(len).unwrap();
        bytes
            .get_mut(start..end)
            .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

impl Access for Mock {
    fn region(&self, index: u32) -> io::Result<Region> {
        let state = self.state();
        let size = match index {
            CONFIG_REGION => state.config.len() as u64,
            ROM_REGION => state.rom.len() as u64,
            index => state.sizes.get(index as usize).copied().unwrap_or(0),
        };
        let mappable = if index == 0 {
            state.mappable.clone()
        } else {
            Vec::new()
        };
        Ok(Region { size, mappable })
    }

    fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let len = data.len();
        data.copy_from_slice(self.state().bytes(region, offset, len)?);
        Ok(())
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.state();
        state
            .bytes(region, offset, data.len())?
            .copy_from_slice(data);
        if region == CONFIG_REGION {
            state.config_writes.push((offset, data.to_vec()));
            state.look_at_line();
            if offset == 4 && state.command() & MASTER == 0 {
                state.journal.lock().unwrap().push("quiet");
            }
        }
        Ok(())
    }

    fn map(&self, region: u32, offset: u64, len: u64) -> io::Result<Mapping> {
        let mut state = self.state();
        if state.unmappable == Some(offset) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        state.mapped.push((region, offset, len));
        let file = tempfile::tempfile()?;
        file.set_len(len)?;
        Mapping::new(file.as_fd(), 0, len)
    }

    fn irq_count(&self, irq: Irq) -> io::Result<u32> {
        Ok(match irq {
            Irq::Intx => 1,
            Irq::Msi => 8,
            Irq::Msix => VECTORS.into(),
            Irq::Error | Irq::Request => u32::from(!self.state().no_events),
        })
    }

    fn set_irqs(&self, irq: Irq, start: u32, events: &[Option<&EventFd>]) -> Result<(), IrqError> {
        let mut state = self.state();
        if state.is_gone {
            return Err(io::Error::from(io::ErrorKind::BrokenPipe).into());
        }
        let asked = u32::try_from(events.len()).unwrap();
        let available = state.free_vectors;
        let is_interrupt = matches!(irq, Irq::Intx | Irq::Msi | Irq::Msix);
        let is_other_on = state.on.is_some_and(|on| on != irq);
        let is_new = state.on.is_none();
        if is_interrupt && (is_other_on || is_new && start != 0) {
            return Err(io::Error::from(io::ErrorKind::InvalidInput).into());
        }
        if is_new && start == 0 && available < asked {
            state
                .calls
                .push(format!("{irq:?} 0+{asked} has {available}"));
            return Err(IrqError::Fewer { available, asked });
        }
        if start >= available || state.refused_vector == Some(start) {
            return Err(io::Error::from(io::ErrorKind::InvalidInput).into());
        }
        let attached: Vec<_> = (start..)
            .zip(events)
            .filter_map(|(vector, event)| Some((vector, (*event)?)))
            .collect();
        if is_interrupt {
            state.on = Some(irq);
        }
        let vectors: Vec<_> = attached.iter().map(|(vector, _)| *vector).collect();
        let call = format!("{irq:?} {start}+{} {vectors:?}", events.len());
        state.calls.push(call);
        for (vector, event) in attached {
            state.events.push((irq, vector, event.try_clone()?));
        }
        Ok(())
    }

    fn unmask_on(&self, event: &EventFd) -> io::Result<bool> {
        let mut state = self.state();
        if state.unmasked.is_some() {
            return Ok(false);
        }
        if state.is_never_unmasked || state.on != Some(Irq::Intx) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        state.calls.push("Intx unmasked by an event".into());
        state.unmask = Some(event.try_clone()?);
        Ok(true)
    }

    fn unmask(&self) -> io::Result<()> {
        let state = self.state();
        if state.is_never_unmasked || state.on != Some(Irq::Intx) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let unmasked = state.unmasked.as_ref();
        unmasked.map_or(Ok(()), |event| event.write(1))
    }

    fn disable_irqs(&self, irq: Irq) -> io::Result<()> {
        let mut state = self.state();
        state.calls.push(format!("{irq:?} off"));
        if state.is_gone || state.stuck == Some(irq) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if state.on != Some(irq) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        state.on = None;
        state.events.retain(|event| event.0 != irq);
        if irq == Irq::Intx {
            state.unmask = None;
        }
        state.look_at_line();
        Ok(())
    }

    fn reset(&self) -> io::Result<bool> {
        let mut state = self.state();
        state.resets += u32::from(state.can_reset);
        state.journal.lock().unwrap().push("reset");
        Ok(state.can_reset)
    }

    fn on_bus(&self) -> io::Result<Vec<Neighbor>> {
        Ok(self.state().on_bus.clone())
    }

    fn reset_bus(&self, _: &[Neighbor], _: &[OwnedFd]) -> io::Result<()> {
        let mut state = self.state();
        if state.is_gone {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        state.bus_resets += 1;
        Ok(())
    }
}

/// Configuration space of a PCI Express endpoint with all that one may have.
pub fn space() -> Vec<u8> {
    let mut space = vec![0; 4096];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x00, &[0x34, 0x12, 0x78, 0x56]);
    // Memory on, bus master, a capability list; multi-function; INTA.
    put(0x04, &[0x06, 0, 0x10, 0]);
    put(0x08, &[1, 2, 8, 1]);
    put(0x0e, &[0x80]);
    put(0x10, &0xfe00_0004_u32.to_le_bytes());
    put(0x18, &0x8000_000c_u32.to_le_bytes());
    put(0x20, &0xfd00_0000_u32.to_le_bytes());
    put(0x24, &0xc001_u32.to_le_bytes());
    put(0x30, &0xfc00_0001_u32.to_le_bytes());
    put(0x34, &[0x40]);
    put(0x3c, &[11, 1]);
    put(POWER, &[0x01, 0x50, 3, 0, 8, 0]);
    // 64-bit addresses, per-vector masks, eight vectors; on.
    put(MSI, &[0x05, 0x70, 0x87, 1]);
    express(&mut put);
    put(MSIX, &[0x11, 0xc0, 0x0f, 0x80]);
    put(MSIX + 4, &0x2000_u32.to_le_bytes());
    put(MSIX + 8, &0x3000_u32.to_le_bytes());
    put(VPD, &[0x03, 0xd0, 0x11, 0x22]);
    put(VENDOR, &[0x09, 0, 0x10, 0xaa, 0xbb]);
    let mut header = |at: usize, id: u32, next: usize| {
        let next = u32::try_from(next).unwrap();
        put(at, &(next << 20 | 1 << 16 | id).to_le_bytes());
    };
    header(ERRORS, 0x01, SERIAL);
    header(SERIAL, 0x03, VIRTUAL_FUNCTIONS);
    header(VIRTUAL_FUNCTIONS, 0x10, VENDOR_EXTENDED);
    header(VENDOR_EXTENDED, 0x0b, ACCESS_CONTROL);
    header(ACCESS_CONTROL, 0x0d, 0);
    put(SERIAL + 4, &[1, 2, 3, 4, 5, 6, 7, 8]);
    put(VENDOR_EXTENDED + 4, &(0x10_u32 << 20 | 7).to_le_bytes());
    space
}

/// Version 2, endpoint; 16 GT/s, eight lanes, ASPM; 512 bytes of payload.
fn express(put: &mut impl FnMut(usize, &[u8])) {
    put(EXPRESS, &[0x10, 0xb0, 0x02, 0]);
    put(EXPRESS + 0x04, &0x1000_8002_u32.to_le_bytes());
    put(EXPRESS + 0x08, &[0x10, 0x28]);
    put(
        EXPRESS + 0x0c,
        &(8u32 << 4 | 4 | 3 << 10 | 1 << 18).to_le_bytes(),
    );
    put(EXPRESS + 0x10, &[0x42, 0]);
    put(EXPRESS + 0x12, &(8u16 << 4 | 4).to_le_bytes());
    put(EXPRESS + 0x24, &(1u32 << 11 | 0x1f).to_le_bytes());
}

/// Waits until an event is signalled, which takes no time unless the test fails.
#[track_caller]
pub fn wait_for(event: &EventFd) {
    wait_for_one([event]);
}

/// Waits until one of `events` is signalled; which.
#[track_caller]
pub fn wait_for_one<const N: usize>(events: [&EventFd; N]) -> usize {
    let mut fds = events.map(|event| {
        // SAFETY: the descriptor is open as long as `event` is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
        PollFd::new(fd, PollFlags::POLLIN)
    });
    poll(&mut fds, 10_000u16).unwrap();
    let signalled = fds.iter().position(|fd| fd.any() == Some(true));
    signalled.expect("nothing was signalled")
}
