//! A PCI function of the host, as its guest sees it.
//!
//! ```text
//!   Endpoint::open (reset, read configuration) --BARs placed--> VfioPci --guest runs--> quiesce, reset
//!                                                                    +-unplugged-> withdraw, quiesce, reset
//! ```
//!
//! One lock guards a function's configuration, interrupts and mappings; an access
//! to a BAR takes it only for the MSI-X table. The kernel's VFIO is asked for
//! everything else, and checks it again.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::VfioError;
use super::access::{Access, CONFIG_REGION, ROM_REGION, Region};
use super::bars::{BarMap, region_of};
use super::capabilities::MsixLayout;
use super::config::{self, BARS, Bar, GuestConfig, HEADER_SIZE, ROM_INDEX, SIZE};
use super::interrupts::Interrupts;
use super::peers::Reachable;
use crate::pci::placement::BarRequest;
use crate::pci::root_port::Link;
use crate::virtio::complaints::Complaints;
use crate::vm::Vm;

/// A BAR's address while it answers nowhere.
const NOWHERE: u64 = u64::MAX;

/// A device that is ready but not in the guest yet.
pub struct Endpoint {
    address: String,
    device: Arc<dyn Access>,
    config: GuestConfig,
    regions: Vec<Region>,
    /// What is read of the expansion ROM, if that is shown.
    rom: Vec<u8>,
    was_reset: bool,
}

impl Endpoint {
    /// Resets the device and reads what it is; `address` is its name in messages.
    ///
    /// # Errors
    ///
    /// When the guest cannot be given it, or the kernel refuses something.
    pub fn open(address: &str, device: Arc<dyn Access>) -> Result<Self, VfioError> {
        let was_reset = device
            .reset()
            .map_err(VfioError::device(address, "reset it"))?;
        let regions = (0..CONFIG_REGION)
            .map(|index| device.region(index))
            .collect::<io::Result<Vec<_>>>()
            .map_err(VfioError::device(address, "ask for its regions"))?;
        let space = read_space(&*device)
            .map_err(VfioError::device(address, "read its configuration space"))?;
        let mut sizes = [0; BARS];
        for (size, region) in sizes.iter_mut().zip(&regions) {
            *size = region.size;
        }
        let config = GuestConfig::new(&space, sizes).map_err(|source| VfioError::Config {
            address: address.to_owned(),
            source,
        })?;
        Ok(Self {
            address: address.to_owned(),
            device,
            config,
            regions,
            rom: Vec::new(),
            was_reset,
        })
    }

    /// Its name in messages.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What answers for it.
    #[must_use]
    pub fn device(&self) -> &dyn Access {
        &*self.device
    }

    /// Whether it could be reset.
    #[must_use]
    pub fn was_reset(&self) -> bool {
        self.was_reset
    }

    /// The same with its expansion ROM among the BARs, if it has one that can be read.
    #[must_use]
    pub fn with_rom(mut self) -> Self {
        let size = self.regions.get(ROM_INDEX).map_or(0, |region| region.size);
        if size == 0 {
            return self;
        }
        match self.read_rom(size) {
            Ok(rom) => {
                self.config.show_rom(size);
                self.rom = rom;
            }
            Err(error) => tracing::warn!(
                device = self.address,
                %error,
                "the expansion ROM cannot be read: the guest does not see it"
            ),
        }
        self
    }

    /// It is read once: a device may need the decoder of its ROM for its BARs (PCI Local Bus 3.0,
    /// 6.2.5.2).
    fn read_rom(&mut self, size: u64) -> io::Result<Vec<u8>> {
        let Some(len) = usize::try_from(size)
            .ok()
            .filter(|_| config::is_rom_size(size))
        else {
            let what = format!("it has {size:#x} bytes, which no ROM has");
            return Err(io::Error::other(what));
        };
        // The ROM answers only while memory does.
        self.config.sync_command(&*self.device, false)?;
        let mut bytes = vec![0; len];
        self.device.read(ROM_REGION, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Notes that it was, by its bus.
    pub fn was_reset_with_others(&mut self) {
        self.was_reset = true;
    }

    /// What its root port is to show.
    #[must_use]
    pub fn link(&self) -> Link {
        self.config.link()
    }

    /// What is to be placed.
    #[must_use]
    pub fn requests(&self) -> Vec<BarRequest> {
        self.config.bars().iter().map(|bar| bar.request()).collect()
    }
}

/// Drivers of mediated devices may have less than a conventional one's: what is not there is 0.
fn read_space(device: &dyn Access) -> io::Result<Vec<u8>> {
    let size = usize::try_from(device.region(CONFIG_REGION)?.size).unwrap_or(SIZE);
    let mut space = vec![0; size.clamp(HEADER_SIZE, SIZE)];
    device.read(CONFIG_REGION, 0, &mut space)?;
    Ok(space)
}

/// A function behind a root port.
pub struct VfioPci {
    address: String,
    device: Arc<dyn Access>,
    /// Where each answers, or [`NOWHERE`]. Outside the lock, so that looking for the
    /// function of an address takes none.
    bars: Vec<(Bar, AtomicU64)>,
    msix: Option<MsixLayout>,
    /// What is read of the ROM.
    rom: Vec<u8>,
    state: Mutex<State>,
}

struct State {
    config: GuestConfig,
    interrupts: Interrupts,
    map: BarMap,
    complaints: Complaints,
}

/// Who answers for an offset of a BAR.
enum Owner {
    Device,
    Table(u64),
    Pending(u64),
    Rom,
}

impl VfioPci {
    /// `endpoint`, whose INTx is `line` of the guest's and whose BARs go to `addresses`; the guest may move
    /// them within its 32-bit window and `window64`.
    ///
    /// # Errors
    ///
    /// When its BARs cannot be mapped, or it could not interrupt the guest.
    pub fn new(
        vm: &Arc<Vm>,
        endpoint: Endpoint,
        line: u32,
        addresses: &[u64],
        window64: Option<(u64, u64)>,
    ) -> Result<Self, VfioError> {
        let Endpoint {
            address,
            device,
            mut config,
            regions,
            rom,
            ..
        } = endpoint;
        let layout = *config.layout();
        let bars: Vec<(Bar, Region)> = config
            .bars()
            .iter()
            .map(|bar| (*bar, regions.get(bar.index).cloned().unwrap_or_default()))
            .collect();
        config.set_bars(addresses);
        if !vm.has_lines() {
            let hidden = config.hide_intx();
            hidden.map_err(|source| VfioError::Config {
                address: address.clone(),
                source,
            })?;
        }
        let mut places = bars.iter().zip(addresses);
        if places.any(|((bar, _), port)| bar.is_io() && *port == 0) {
            tracing::warn!(
                device = address,
                "no I/O ports are left for it: it has none"
            );
        }
        config
            .sync_command(&*device, false)
            .map_err(VfioError::device(&address, "turn on its memory"))?;
        let map = BarMap::new(vm, window64, &*device, &bars, layout.msix)
            .map_err(VfioError::device(&address, "map its registers"))?;
        let interrupts = Interrupts::new(vm, &config, line, &address);
        Ok(Self {
            address,
            device,
            bars: bars
                .into_iter()
                .map(|(bar, _)| (bar, AtomicU64::new(NOWHERE)))
                .collect(),
            msix: layout.msix,
            rom,
            state: Mutex::new(State {
                interrupts,
                config,
                map,
                complaints: Complaints::new("a PCI device of the host"),
            }),
        })
    }

    /// What others can reach of its BARs where these are at `addresses`.
    #[must_use]
    pub fn reachable(&self, addresses: &[u64]) -> Reachable {
        let state = self.lock();
        let places = addresses.iter().enumerate();
        let ranges = places.flat_map(|(place, address)| state.map.dma_ranges(place, *address));
        Reachable {
            address: self.address.clone(),
            ranges: ranges.collect(),
        }
    }

    /// The BAR of memory that covers an address, by its place, and the offset in it.
    #[must_use]
    pub fn bar_at(&self, address: u64) -> Option<(usize, u64)> {
        self.find(address, false)
    }

    /// The I/O BAR that covers a port, by its place, and the offset in it.
    #[must_use]
    pub fn io_bar_at(&self, port: u64) -> Option<(usize, u64)> {
        self.find(port, true)
    }

    fn find(&self, address: u64, is_io: bool) -> Option<(usize, u64)> {
        let mut bars = self.bars.iter().enumerate();
        bars.find_map(|(place, (bar, at))| {
            // `NOWHERE` is above every address.
            let offset = address.checked_sub(at.load(Ordering::Acquire))?;
            (bar.is_io() == is_io && offset < bar.size).then_some((place, offset))
        })
    }

    /// Reads configuration space.
    pub fn config_read(&self, register: usize, data: &mut [u8]) {
        let mut state = self.lock();
        let result = state.config.read(&*self.device, register, data);
        self.note(&mut state, result);
    }

    /// Writes configuration space.
    pub fn config_write(&self, register: usize, data: &[u8]) {
        let mut state = self.lock();
        let result = state.config.write(&*self.device, register, data);
        self.note(&mut state, result);
        for (place, (bar, at)) in self.bars.iter().enumerate() {
            let address = state.config.bar_address(place);
            at.store(address.unwrap_or(NOWHERE), Ordering::Release);
            if let Err(error) = state.map.move_bar(place, bar.size, address) {
                let State { complaints, .. } = &mut *state;
                complaints.add(&format!("{}, BAR {}: {error}", self.address, bar.index));
            }
        }
        let State {
            config, interrupts, ..
        } = &mut *state;
        let device = &*self.device;
        // Nobody may stop to listen to a line that is loose, nor may it be before somebody listens.
        let results = [
            config.sync_command(device, interrupts.line_is_on()),
            interrupts.config_changed(config, &self.device),
            config.sync_command(device, interrupts.line_is_on()),
        ];
        for result in results {
            self.note(&mut state, result);
        }
    }

    /// Reads a BAR where no memory slot is.
    pub fn bar_read(&self, place: usize, offset: u64, data: &mut [u8]) {
        let Some((bar, _)) = self.bars.get(place) else {
            return data.fill(0xff);
        };
        match self.owner(bar, offset) {
            Owner::Table(offset) => self.lock().interrupts.read_table(offset, data),
            Owner::Pending(offset) => self.lock().interrupts.read_pending(offset, data),
            Owner::Rom => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                for (byte, at) in data.iter_mut().zip(start..) {
                    *byte = self.rom.get(at).copied().unwrap_or(0xff);
                }
            }
            Owner::Device => {
                let result = self.device.read(region_of(*bar), offset, data);
                if result.is_err() {
                    data.fill(0xff);
                    self.note(&mut self.lock(), result);
                }
            }
        }
    }

    /// Writes a BAR where no memory slot is.
    pub fn bar_write(&self, place: usize, offset: u64, data: &[u8]) {
        let Some((bar, _)) = self.bars.get(place) else {
            return;
        };
        let result = match self.owner(bar, offset) {
            Owner::Table(offset) => {
                let device = &*self.device;
                self.lock().interrupts.write_table(offset, data, device)
            }
            Owner::Pending(_) | Owner::Rom => Ok(()),
            Owner::Device => self.device.write(region_of(*bar), offset, data),
        };
        if result.is_err() {
            self.note(&mut self.lock(), result);
        }
    }

    /// Takes its registers from a guest that runs on: they are nowhere from now on, also
    /// where the guest has mapped them.
    pub fn withdraw(&self) {
        let mut state = self.lock();
        for (place, (bar, at)) in self.bars.iter().enumerate() {
            at.store(NOWHERE, Ordering::Release);
            let result = state.map.move_bar(place, bar.size, None);
            self.note(&mut state, result.map_err(io::Error::other));
        }
    }

    /// Takes the device from a guest that does not drive it any more: no DMA, and no interrupts.
    pub fn quiesce(&self) {
        let mut state = self.lock();
        let result = config::silence(&*self.device);
        self.note(&mut state, result);
        let result = state.interrupts.stop(&*self.device);
        self.note(&mut state, result);
    }

    /// Leaves nothing of the guest in it, as far as it can be reset. Others of the pod, which might
    /// write to it still, are quiet by then.
    pub fn reset(&self) {
        match self.device.reset() {
            Ok(was_reset) => {
                tracing::info!(device = self.address, was_reset, "PCI device released");
            }
            Err(error) => {
                tracing::warn!(device = self.address, %error, "PCI device not reset after use");
            }
        }
    }

    /// Gives up what KVM has of a device that was stopped.
    ///
    /// # Errors
    ///
    /// KVM's: the guest can reach the device yet.
    pub fn close(self) -> Result<(), VfioError> {
        let result = self.lock().map.close().map_err(io::Error::other);
        let what = "take its registers from the guest";
        result.map_err(VfioError::device(&self.address, what))
    }

    fn owner(&self, bar: &Bar, offset: u64) -> Owner {
        if bar.is_rom() {
            return Owner::Rom;
        }
        let Some(msix) = self.msix else {
            return Owner::Device;
        };
        let within = |(index, start): (usize, u64), len: u64| {
            let offset = offset.checked_sub(start)?;
            (index == bar.index && offset < len).then_some(offset)
        };
        if let Some(offset) = within(msix.table, msix.table_len()) {
            Owner::Table(offset)
        } else if let Some(offset) = within(msix.pending, msix.pending_len()) {
            Owner::Pending(offset)
        } else {
            Owner::Device
        }
    }

    fn note(&self, state: &mut State, result: io::Result<()>) {
        if let Err(error) = result {
            let what = format!("{}: {error}", self.address);
            state.complaints.add(&what);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for VfioPci {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.interrupts.release();
    }
}

#[cfg(test)]
mod tests;
