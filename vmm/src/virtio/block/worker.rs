//! A queue's thread: takes requests, has the disk carry them out, answers.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use virtio_queue::DescriptorChain;

use super::backing::Disk;
use super::request::{Chain, HEADER_BYTES, Request, RequestError, SERIAL_BYTES, Status};
use crate::virtio::GuestMemory;
use crate::virtio::buffers::{BufferError, Buffers, Direction};
use crate::virtio::complaints::Complaints;

/// Why a request fails.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Buffers(#[from] BufferError),
    #[error("no room for the status")]
    NoStatus,
    #[error(transparent)]
    Request(#[from] RequestError),
    #[error("host: {0}")]
    Host(#[from] io::Error),
}

impl Failure {
    fn status(&self) -> Status {
        match self {
            Self::Request(error) => error.status(),
            _ => Status::IoError,
        }
    }
}

/// What the workers of a disk have in common.
pub struct Service {
    /// The disk. A request holds it until it is answered, so whoever puts another
    /// in its place knows that nothing touches the old one any more.
    disk: RwLock<Disk>,
    /// The number of the exchange that put it there.
    exchange: AtomicU64,
    /// What a vCPU reads, which waits for no request: that may take as long as a
    /// device of the host takes.
    geometry: Mutex<Geometry>,
    /// Its serial number.
    serial: [u8; SERIAL_BYTES],
}

/// What the driver is told of a disk.
#[derive(Debug, Clone, Copy)]
pub struct Geometry {
    /// In bytes, a multiple of the sector's.
    pub size: u64,
    /// Of a logical sector.
    pub sector_bytes: u32,
    /// How many disks there have been before it, the last byte of that.
    pub generation: u8,
}

impl Geometry {
    fn of(disk: &Disk, generation: u8) -> Self {
        Self {
            size: disk.size(),
            sector_bytes: disk.sector_bytes(),
            generation,
        }
    }
}

impl Service {
    /// For a disk.
    pub fn new(disk: Disk, serial: [u8; SERIAL_BYTES]) -> Self {
        Self {
            geometry: Mutex::new(Geometry::of(&disk, 0)),
            disk: RwLock::new(disk),
            exchange: AtomicU64::new(0),
            serial,
        }
    }

    /// The disk.
    pub fn disk(&self) -> RwLockReadGuard<'_, Disk> {
        self.disk.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts another disk in its place once no request is under way. Exchanges that have
    /// waited for the same request get here in any order: the last one asked for counts.
    pub fn replace(&self, exchange: u64, disk: Disk) {
        let old = {
            let mut place = self.disk.write().unwrap_or_else(PoisonError::into_inner);
            if self.exchange.fetch_max(exchange, Ordering::Relaxed) > exchange {
                return;
            }
            let mut geometry = self.lock_geometry();
            *geometry = Geometry::of(&disk, geometry.generation.wrapping_add(1));
            std::mem::replace(&mut *place, disk)
        };
        // To close a device of the host may take long, too.
        drop(old);
    }

    /// What the driver is told of the disk.
    pub fn geometry(&self) -> Geometry {
        *self.lock_geometry()
    }

    fn lock_geometry(&self) -> MutexGuard<'_, Geometry> {
        self.geometry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `then` while nobody else gets at the disk, as when it has a request under
    /// way and an exchange waits for that.
    #[cfg(test)]
    pub fn while_busy<T>(&self, then: impl FnOnce() -> T) -> T {
        let _disk = self.disk.write().unwrap_or_else(PoisonError::into_inner);
        then()
    }
}

/// One queue's worker: the buffers of the request under way.
pub struct Server<'m, 's> {
    memory: &'m GuestMemory,
    service: &'s Service,
    write_through: bool,
    from: Buffers<'m>,
    to: Buffers<'m>,
    complaints: Complaints,
}

impl<'m, 's> Server<'m, 's> {
    /// With `write_through` a write is answered when it lasts (virtio 1.2, 5.2.6.2,
    /// a driver without `VIRTIO_BLK_F_FLUSH`).
    pub fn new(memory: &'m GuestMemory, service: &'s Service, write_through: bool) -> Self {
        Self {
            memory,
            service,
            write_through,
            from: Buffers::default(),
            to: Buffers::default(),
            complaints: Complaints::new("disk request fails"),
        }
    }

    /// Carries out a request. Returns how many bytes of the chain it wrote.
    pub fn answer(&mut self, chain: DescriptorChain<&'m GuestMemory>) -> usize {
        self.from.clear();
        self.to.clear();
        let direction = Direction::FromGuest;
        let from = self.from.append(self.memory, chain.clone(), direction);
        let to = self.to.append(self.memory, chain, Direction::ToGuest);
        let result = match (from, to) {
            (Err(error), _) | (_, Err(error)) => Err(error.into()),
            (Ok(_), Ok(0)) => Err(Failure::NoStatus),
            (Ok(_), Ok(_)) => self.carry_out(),
        };
        self.report(result)
    }

    fn carry_out(&mut self) -> Result<(), Failure> {
        let chain = Chain::read(&self.from, &self.to)?;
        if chain.asks_for_serial()? {
            self.to.write(0, &self.service.serial);
            return Ok(());
        }
        let disk = self.service.disk();
        match chain.request(&disk)? {
            Request::Read(extent) => disk.read(&mut self.to, extent)?,
            Request::Write(extent) => {
                disk.write(&mut self.from, HEADER_BYTES, extent)?;
                self.settle(&disk)?;
            }
            Request::Flush => disk.flush()?,
            Request::Discard(extents) => {
                extents
                    .into_iter()
                    .try_for_each(|extent| disk.discard(extent))?;
            }
            Request::WriteZeroes(extents) => {
                extents
                    .into_iter()
                    .try_for_each(|(extent, unmap)| disk.write_zeroes(extent, unmap))?;
                self.settle(&disk)?;
            }
        }
        Ok(())
    }

    fn settle(&self, disk: &Disk) -> io::Result<()> {
        if self.write_through {
            return disk.flush();
        }
        Ok(())
    }

    /// Puts the status into the last byte. Returns how many bytes of the chain
    /// have been written from its first on (virtio 1.2, 2.7.8.2): none for
    /// certain, if a failed request has data in front of its status.
    fn report(&mut self, result: Result<(), Failure>) -> usize {
        let room = self.to.len();
        let Some(last) = room.checked_sub(1) else {
            self.complaints
                .add(&result.err().unwrap_or(Failure::NoStatus));
            return 0;
        };
        let status = result
            .as_ref()
            .map_or_else(Failure::status, |()| Status::Ok);
        self.to.write(last, &[status as u8]);
        match result {
            Ok(()) => room,
            Err(failure) => {
                self.complaints.add(&failure);
                if last == 0 { 1 } else { 0 }
            }
        }
    }
}
