//! virtio-rng (virtio 1.2, 5.4): the host's entropy for the guest.
//!
//! One queue of buffers the device fills. A request gets at most [`MAX_BYTES`],
//! so that a guest asking for gigabytes costs the host no more than one asking
//! often.

use super::buffers::{Buffers, Direction};
use super::complaints::Complaints;
use super::ring::{self, RingError};
use super::{
    ActivateError, Activation, ActiveQueue, GuestMemory, VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1, VirtioDevice,
};
use crate::worker::{Poller, Worker};

/// Device type (virtio 1.2, 5.4.1).
pub const DEVICE_TYPE: u16 = 4;
const QUEUE_SIZE: u16 = 64;
/// Most bytes one request gets.
pub const MAX_BYTES: usize = 64 << 10;
/// Bytes asked of the kernel at a time.
const PIECE_BYTES: usize = 4096;

/// The device.
#[derive(Default)]
pub struct Rng {
    worker: Option<Worker<()>>,
}

impl Rng {
    /// A device nobody drives yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX | VIRTIO_F_INDIRECT_DESC
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if self.worker.is_some() {
            return Err(ActivateError::Unavailable);
        }
        let memory = activation.memory;
        let queue = Activation::all_queues(activation.queues)?
            .pop()
            .ok_or(ActivateError::QueueDisabled(0))?;
        let worker = Worker::spawn("virtio-rng", move |mut poller| {
            if let Err(error) = work(&mut poller, &memory, queue) {
                tracing::warn!(%error, "rng stopped until the guest resets it");
            }
        });
        self.worker = Some(worker.map_err(ActivateError::Worker)?);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            worker.stop();
        }
    }
}

impl Drop for Rng {
    fn drop(&mut self) {
        self.reset();
    }
}

fn work(poller: &mut Poller, memory: &GuestMemory, queue: ActiveQueue) -> Result<(), RingError> {
    let mut complaints = Complaints::new("rng request fails");
    let mut buffers = Buffers::default();
    ring::serve(poller, memory, queue, |chain| {
        buffers.clear();
        if let Err(error) = buffers.append(memory, chain, Direction::ToGuest) {
            complaints.add(&error);
            return 0;
        }
        let (written, result) = fill(&buffers);
        if let Err(error) = result {
            complaints.add(&error);
        }
        written
    })
}

/// Puts random bytes into the buffers; how many, and what kept it from more.
fn fill(buffers: &Buffers<'_>) -> (usize, Result<(), getrandom::Error>) {
    let wanted = buffers.len().min(MAX_BYTES);
    let mut bytes = [0; PIECE_BYTES];
    let mut done = 0;
    while done < wanted {
        let count = PIECE_BYTES.min(wanted - done);
        let piece = bytes.get_mut(..count).unwrap_or_default();
        // Fails for no other reason than a kernel older than 3.17.
        if let Err(error) = getrandom::fill(piece) {
            return (done, Err(error));
        }
        let written = buffers.write(done, piece);
        done += written;
        if written < count {
            break;
        }
    }
    (done, Ok(()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::driver::{Driver, memory};
    use std::sync::Arc;
    use vmm_sys_util::eventfd::EventFd;

    fn activate(rng: &mut Rng, memory: &GuestMemory, driver: &Driver<'_>) {
        rng.activate(Activation {
            memory: memory.clone(),
            features: VIRTIO_F_VERSION_1,
            queues: vec![Some(driver.active())],
            config_interrupt: Arc::new(EventFd::new(0).unwrap()),
        })
        .unwrap();
    }

    #[test]
    fn fills_what_is_asked_for_and_no_more_than_the_bound() {
        let memory = memory();
        let mut rng = Rng::new();
        for _ in 0..2 {
            let mut driver = Driver::new(&memory, 0, 16);
            activate(&mut rng, &memory, &driver);
            let small = driver.add(&[(0x10_0000, 64, true)]);
            driver.kick();
            assert_eq!(driver.wait(), (small, 64));
            assert_ne!(driver.load(0x10_0000, 64), vec![0; 64]);
            let large = driver.add(&[(0x20_0000, 1 << 20, true)]);
            driver.kick();
            assert_eq!(driver.wait(), (large, 64 << 10));
            let last = driver.load(0x20_0000 + (60 << 10), 8 << 10);
            assert_ne!(last[..4096], [0; 4096]);
            assert_eq!(last[4096..], [0; 4096]);
            let outside = driver.add(&[(1 << 40, 64, true)]);
            driver.kick();
            assert_eq!(driver.wait(), (outside, 0));
            rng.reset();
        }
    }
}
