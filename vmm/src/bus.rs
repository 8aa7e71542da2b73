//! From an address the guest touched to the device that answers.
//!
//! A [`Bus`] is filled while the machine is built and immutable afterwards, so
//! vCPU threads look devices up without a lock; a device takes its own.

use std::collections::BTreeMap;
use std::sync::Arc;

/// A device behind a range of addresses.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` bytes at `offset` from the start of the range.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Writes `data` at `offset` from the start of the range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// A range that cannot be added.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// Another device answers in it.
    #[error("{len:#x} bytes at {start:#x} overlap another device")]
    Overlap {
        /// First address.
        start: u64,
        /// Length.
        len: u64,
    },
    /// It is empty or leaves the address space.
    #[error("{len:#x} bytes at {start:#x} are no address range")]
    Range {
        /// First address.
        start: u64,
        /// Length.
        len: u64,
    },
}

/// An address space, of memory or of ports.
#[derive(Default)]
pub struct Bus {
    ranges: BTreeMap<u64, (u64, Arc<dyn BusDevice>)>,
}

impl Bus {
    /// Lets `device` answer `len` addresses from `start`.
    ///
    /// # Errors
    ///
    /// When the range is empty, too long, or taken.
    pub fn add(
        &mut self,
        start: u64,
        len: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), BusError> {
        let last = len
            .checked_sub(1)
            .and_then(|len| start.checked_add(len))
            .ok_or(BusError::Range { start, len })?;
        let before = self.ranges.range(..=last).next_back();
        if before.is_some_and(|(other, (other_len, _))| other + (other_len - 1) >= start) {
            return Err(BusError::Overlap { start, len });
        }
        self.ranges.insert(start, (len, device));
        Ok(())
    }

    /// Reads; addresses nobody answers read as ones, as on a real bus.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((offset, device)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes; nothing happens where nobody answers.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address) {
            device.write(offset, data);
        }
    }

    fn find(&self, address: u64) -> Option<(u64, &dyn BusDevice)> {
        let (start, (len, device)) = self.ranges.range(..=address).next_back()?;
        let offset = address - start;
        (offset < *len).then_some((offset, device.as_ref()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn accesses_reach_the_device_with_its_offset() {
        let device = Arc::new(Recorder::default());
        let mut bus = Bus::default();
        bus.add(0x100, 0x10, device.clone()).unwrap();
        let mut byte = [0];
        bus.read(0x10f, &mut byte);
        assert_eq!(byte, [0x0f]);
        bus.write(0x104, &[1, 2]);
        assert_eq!(*device.0.lock().unwrap(), [(4, vec![1, 2])]);
    }

    #[test]
    fn addresses_without_device_read_as_ones() {
        let mut bus = Bus::default();
        bus.add(0x100, 0x10, Arc::new(Recorder::default())).unwrap();
        for address in [0xff, 0x110] {
            let mut data = [0; 2];
            bus.read(address, &mut data);
            assert_eq!(data, [0xff; 2]);
            bus.write(address, &data);
        }
    }

    #[test]
    fn overlapping_ranges_are_refused() {
        let mut bus = Bus::default();
        bus.add(0x100, 0x10, Arc::new(Recorder::default())).unwrap();
        for (start, len) in [(0x100, 1), (0xf0, 0x11), (0x10f, 1), (0, 0x1000)] {
            let result = bus.add(start, len, Arc::new(Recorder::default()));
            assert_eq!(result, Err(BusError::Overlap { start, len }));
        }
        bus.add(0x110, 1, Arc::new(Recorder::default())).unwrap();
        bus.add(0xff, 1, Arc::new(Recorder::default())).unwrap();
    }

    #[test]
    fn impossible_ranges_are_refused() {
        let mut bus = Bus::default();
        for (start, len) in [(0, 0), (u64::MAX, 2)] {
            let result = bus.add(start, len, Arc::new(Recorder::default()));
            assert_eq!(result, Err(BusError::Range { start, len }));
        }
    }
}
