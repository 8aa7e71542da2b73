//! Which blocks of the region are plugged, and how many should be.

use std::io;

use nix::fcntl::{FallocateFlags, fallocate};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::BLOCK_BYTES;
use crate::memory::Growth;
use crate::virtio::GuestMemory;

/// Why a request is not granted.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// No type of request we know.
    #[error("request of type {0}")]
    Request(u16),
    /// Not whole blocks of the region.
    #[error("blocks outside the region")]
    Range,
    /// They are not as the request takes them to be.
    #[error("blocks in the wrong state")]
    State,
    /// More than was asked for.
    #[error("more memory than asked for")]
    TooMuch,
    /// The host does not take the pages back.
    #[error("pages cannot be given back: {0}")]
    Host(#[from] io::Error),
}

/// State of a range of blocks (virtio 1.2, 5.15.6.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum State {
    /// All plugged.
    Plugged = 0,
    /// All unplugged.
    Unplugged = 1,
    /// Some of them.
    Mixed = 2,
}

/// The region's blocks.
#[derive(Debug)]
pub struct Blocks {
    start: u64,
    plugged: Vec<bool>,
    plugged_count: u64,
    requested_count: u64,
}

impl Blocks {
    /// None is plugged. A rest of the region that is no whole block stays unused.
    pub fn new(growth: Growth) -> Self {
        let count = usize::try_from(growth.len / BLOCK_BYTES).unwrap_or(0);
        Self {
            start: growth.start,
            plugged: vec![false; count],
            plugged_count: 0,
            requested_count: 0,
        }
    }

    fn count(&self) -> u64 {
        self.plugged.len() as u64
    }

    /// Sets how much is to be plugged.
    pub fn request(&mut self, bytes: u64) {
        self.requested_count = bytes.div_ceil(BLOCK_BYTES).min(self.count());
    }

    /// How much is.
    pub fn plugged_bytes(&self) -> u64 {
        self.plugged_count * BLOCK_BYTES
    }

    /// Device configuration (virtio 1.2, 5.15.4): block size, node, address, size
    /// of the region, its usable part, plugged and requested size.
    pub fn config(&self) -> [u8; 56] {
        let region = self.count() * BLOCK_BYTES;
        let fields = [
            BLOCK_BYTES,
            0,
            self.start,
            region,
            region,
            self.plugged_bytes(),
            self.requested_count * BLOCK_BYTES,
        ];
        let mut config = [0; 56];
        for (bytes, field) in config.chunks_exact_mut(8).zip(fields) {
            bytes.copy_from_slice(&field.to_le_bytes());
        }
        config
    }

    /// Indices of `count` blocks from `address` on.
    fn range(&self, address: u64, count: u16) -> Result<std::ops::Range<usize>, Refusal> {
        let offset = address.checked_sub(self.start).ok_or(Refusal::Range)?;
        let first = offset / BLOCK_BYTES;
        let end = first + u64::from(count);
        if !offset.is_multiple_of(BLOCK_BYTES) || count == 0 || end > self.count() {
            return Err(Refusal::Range);
        }
        let index = |block| usize::try_from(block).map_err(|_| Refusal::Range);
        Ok(index(first)?..index(end)?)
    }

    /// The state of `count` blocks from `address` on.
    ///
    /// # Errors
    ///
    /// `Range`.
    pub fn state(&self, address: u64, count: u16) -> Result<State, Refusal> {
        let range = self.range(address, count)?;
        let blocks = self.plugged.get(range).unwrap_or_default();
        Ok(match blocks.iter().filter(|plugged| **plugged).count() {
            0 => State::Unplugged,
            some if some == blocks.len() => State::Plugged,
            _ => State::Mixed,
        })
    }

    /// Plugs unplugged blocks, no more than were asked for.
    ///
    /// # Errors
    ///
    /// `Range`, `State`, `TooMuch`.
    pub fn plug(&mut self, address: u64, count: u16) -> Result<(), Refusal> {
        self.expect(State::Unplugged, address, count)?;
        if self.plugged_count + u64::from(count) > self.requested_count {
            return Err(Refusal::TooMuch);
        }
        self.set(address, count, true)
    }

    /// Unplugs plugged blocks; their pages are gone.
    ///
    /// # Errors
    ///
    /// `Range`, `State`, `Host`.
    pub fn unplug(
        &mut self,
        memory: &GuestMemory,
        address: u64,
        count: u16,
    ) -> Result<(), Refusal> {
        self.expect(State::Plugged, address, count)?;
        give_back(memory, address, u64::from(count) * BLOCK_BYTES)?;
        self.set(address, count, false)
    }

    /// Unplugs all blocks.
    ///
    /// # Errors
    ///
    /// `Host`.
    pub fn unplug_all(&mut self, memory: &GuestMemory) -> Result<(), Refusal> {
        give_back(memory, self.start, self.count() * BLOCK_BYTES)?;
        self.plugged.fill(false);
        self.plugged_count = 0;
        Ok(())
    }

    fn expect(&self, state: State, address: u64, count: u16) -> Result<(), Refusal> {
        if self.state(address, count)? == state {
            Ok(())
        } else {
            Err(Refusal::State)
        }
    }

    fn set(&mut self, address: u64, count: u16, plugged: bool) -> Result<(), Refusal> {
        let range = self.range(address, count)?;
        if let Some(blocks) = self.plugged.get_mut(range) {
            blocks.fill(plugged);
        }
        if plugged {
            self.plugged_count += u64::from(count);
        } else {
            self.plugged_count -= u64::from(count);
        }
        Ok(())
    }
}

/// Punches a hole into the region's file: the guest and every back end that maps
/// it find zeros there.
fn give_back(memory: &GuestMemory, address: u64, len: u64) -> io::Result<()> {
    let region = memory
        .find_region(GuestAddress(address))
        .ok_or(io::ErrorKind::NotFound)?;
    let file = region.file_offset().ok_or(io::ErrorKind::Unsupported)?;
    let offset = file.start() + (address - region.start_addr().0);
    let number = |value: u64| i64::try_from(value).map_err(io::Error::other);
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(file.file(), flags, number(offset)?, number(len)?)?;
    Ok(())
}
