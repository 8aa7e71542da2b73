//! A queue's thread: takes requests, has the disk carry them out, answers.

use std::io;

use vmm_sys_util::epoll::EventSet;

use super::backing::Disk;
use super::request::{HEADER_BYTES, Request, RequestError, SERIAL_BYTES, Status};
use crate::virtio::buffers::{BufferError, Buffers, Direction};
use crate::virtio::ring::{Ring, RingError};
use crate::virtio::{ActiveQueue, GuestMemory};
use crate::worker::Poller;

const KICK_TOKEN: u64 = 0;
/// Most requests between two interrupts, and two looks at the stop event.
const BATCH: usize = 16;
/// Most warnings about the guest's mistakes and the host's failures.
const MAX_COMPLAINTS: u32 = 16;

/// What ends a disk's thread before its time.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// epoll failed.
    #[error("event loop: {0}")]
    Poll(#[from] io::Error),
    /// The driver broke the queue.
    #[error(transparent)]
    Ring(#[from] RingError),
}

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
    /// The disk.
    pub disk: Disk,
    /// Its serial number.
    pub serial: [u8; SERIAL_BYTES],
}

/// Serves a queue until told to stop. With `write_through` a write is answered
/// when it lasts (virtio 1.2, 5.2.6.2, a driver without `VIRTIO_BLK_F_FLUSH`).
///
/// # Errors
///
/// When the driver broke the queue.
pub fn serve(
    poller: &mut Poller,
    memory: &GuestMemory,
    service: &Service,
    queue: ActiveQueue,
    write_through: bool,
) -> Result<(), ServeError> {
    let mut server = Server::new(memory, service, queue, write_through);
    let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
    poller.add(server.ring.kick(), edge, KICK_TOKEN)?;
    let mut busy = true;
    while poller.wait(if busy { 0 } else { -1 })?.is_some() {
        busy = server.work()?;
    }
    Ok(())
}

/// A queue and the buffers of the request under way.
pub struct Server<'m, 's> {
    memory: &'m GuestMemory,
    service: &'s Service,
    ring: Ring<'m>,
    write_through: bool,
    from: Buffers<'m>,
    to: Buffers<'m>,
    complaints: u32,
}

impl<'m, 's> Server<'m, 's> {
    /// Takes over a queue.
    pub fn new(
        memory: &'m GuestMemory,
        service: &'s Service,
        queue: ActiveQueue,
        write_through: bool,
    ) -> Self {
        Self {
            memory,
            service,
            ring: Ring::new(memory, queue),
            write_through,
            from: Buffers::default(),
            to: Buffers::default(),
            complaints: 0,
        }
    }

    /// Answers some of the requests there are. Returns whether there may be more.
    ///
    /// # Errors
    ///
    /// When the driver broke the queue.
    pub fn work(&mut self) -> Result<bool, RingError> {
        for _ in 0..BATCH {
            if !self.answer_next()? && !self.ring.await_kick()? {
                self.ring.flush()?;
                return Ok(false);
            }
        }
        self.ring.flush()?;
        Ok(true)
    }

    fn answer_next(&mut self) -> Result<bool, RingError> {
        let Some(chain) = self.ring.take()? else {
            return Ok(false);
        };
        let head = chain.head_index();
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
        let written = self.report(result);
        self.ring.give(head, written)?;
        Ok(true)
    }

    fn carry_out(&mut self) -> Result<(), Failure> {
        let disk = &self.service.disk;
        match Request::parse(&self.from, &self.to, disk)? {
            Request::Read(extent) => disk.read(&mut self.to, extent)?,
            Request::Write(extent) => {
                disk.write(&mut self.from, HEADER_BYTES, extent)?;
                self.settle()?;
            }
            Request::Flush => disk.flush()?,
            Request::Serial => {
                self.to.write(0, &self.service.serial);
            }
            Request::Discard(extents) => {
                extents
                    .into_iter()
                    .try_for_each(|extent| disk.discard(extent))?;
            }
            Request::WriteZeroes(extents) => {
                extents
                    .into_iter()
                    .try_for_each(|(extent, unmap)| disk.write_zeroes(extent, unmap))?;
                self.settle()?;
            }
        }
        Ok(())
    }

    fn settle(&self) -> io::Result<()> {
        if self.write_through {
            return self.service.disk.flush();
        }
        Ok(())
    }

    /// Puts the status into the last byte. Returns how many bytes of the chain
    /// have been written from its first on (virtio 1.2, 2.7.8.2): none for
    /// certain, if a failed request has data in front of its status.
    fn report(&mut self, result: Result<(), Failure>) -> usize {
        let room = self.to.len();
        let Some(last) = room.checked_sub(1) else {
            self.complain(&result.err().unwrap_or(Failure::NoStatus));
            return 0;
        };
        let status = result
            .as_ref()
            .map_or_else(Failure::status, |()| Status::Ok);
        self.to.write(last, &[status as u8]);
        match result {
            Ok(()) => room,
            Err(failure) => {
                self.complain(&failure);
                if last == 0 { 1 } else { 0 }
            }
        }
    }

    fn complain(&mut self, failure: &Failure) {
        if self.complaints < MAX_COMPLAINTS {
            self.complaints += 1;
            tracing::warn!(error = %failure, "disk request fails");
        }
    }
}
