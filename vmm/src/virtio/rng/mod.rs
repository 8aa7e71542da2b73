//! virtio-rng (virtio 1.2, 5.4): the host's entropy for the guest.
//!
//! One queue of buffers the device fills. A request gets at most [`MAX_BYTES`],
//! so that a guest asking for gigabytes costs the host no more than one asking
//! often.

use vmm_sys_util::epoll::EventSet;

use super::buffers::{Buffers, Direction};
use super::ring::{Ring, RingError};
use super::{
    ActivateError, Activation, ActiveQueue, GuestMemory, VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1, VirtioDevice,
};
use crate::worker::{Poller, Worker};

/// Device type (virtio 1.2, 5.4.1).
const DEVICE_TYPE: u16 = 4;
const QUEUE_SIZE: u16 = 64;
/// Most bytes one request gets.
pub const MAX_BYTES: usize = 4096;

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
        let worker = Worker::spawn("virtio-rng", move |poller| {
            if let Err(error) = work(poller, &memory, queue) {
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

fn work(mut poller: Poller, memory: &GuestMemory, queue: ActiveQueue) -> Result<(), RingError> {
    let mut ring = Ring::new(memory, queue);
    let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
    poller
        .add(ring.kick(), edge, 0)
        .map_err(RingError::Interrupt)?;
    loop {
        serve(&mut ring, memory)?;
        if poller.wait(-1).map_err(RingError::Interrupt)?.is_none() {
            return Ok(());
        }
    }
}

fn serve<'m>(ring: &mut Ring<'m>, memory: &'m GuestMemory) -> Result<(), RingError> {
    let mut buffers = Buffers::default();
    loop {
        while let Some(chain) = ring.take()? {
            let head = chain.head_index();
            buffers.clear();
            let written = match buffers.append(memory, chain, Direction::ToGuest) {
                Ok(_) => fill(&buffers),
                Err(error) => {
                    tracing::warn!(%error, "rng request refused");
                    0
                }
            };
            ring.give(head, written)?;
        }
        ring.flush()?;
        if !ring.await_kick()? {
            return Ok(());
        }
    }
}

/// Puts random bytes into the buffers; how many.
fn fill(buffers: &Buffers<'_>) -> usize {
    let mut bytes = [0u8; MAX_BYTES];
    let wanted = buffers.len().min(MAX_BYTES);
    let part = bytes.get_mut(..wanted).unwrap_or_default();
    // Fails for no other reason than a kernel older than 3.17.
    if let Err(error) = getrandom::fill(part) {
        tracing::warn!(%error, "getrandom");
        return 0;
    }
    buffers.write(0, part)
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
            assert_eq!(driver.wait(), (large, 4096));
            let outside = driver.add(&[(1 << 40, 64, true)]);
            driver.kick();
            assert_eq!(driver.wait(), (outside, 0));
            rng.reset();
        }
    }
}
