//! virtio-console (virtio 1.2, 5.3), one port, for debugging only.
//!
//! What the guest writes goes to a file; nothing ever comes from it. Without
//! `VIRTIO_CONSOLE_F_MULTIPORT` there are two queues, receive (0) and transmit
//! (1), and no control messages.

use std::fs::File;

use vmm_sys_util::epoll::EventSet;

use super::buffers::{Buffers, Direction};
use super::ring::{Ring, RingError};
use super::{
    ActivateError, Activation, ActiveQueue, GuestMemory, VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1, VirtioDevice,
};
use crate::worker::{Poller, Worker};

/// Device type (virtio 1.2, 5.3.1).
const DEVICE_TYPE: u16 = 3;
const QUEUE_SIZE: u16 = 64;

/// The device.
pub struct Console {
    output: Option<File>,
    worker: Option<Worker<File>>,
}

impl Console {
    /// A console that writes to `output`.
    #[must_use]
    pub fn new(output: File) -> Self {
        Self {
            output: Some(output),
            worker: None,
        }
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn features(&self) -> u64 {
        VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX | VIRTIO_F_INDIRECT_DESC
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let memory = activation.memory;
        let transmit = activation.queues.into_iter().nth(1).flatten();
        let transmit = transmit.ok_or(ActivateError::QueueDisabled(1))?;
        let output = self.output.take().ok_or(ActivateError::Unavailable)?;
        let worker = Worker::spawn("virtio-console", move |poller| {
            if let Err(error) = work(poller, &memory, transmit, &output) {
                tracing::warn!(%error, "console stopped until the guest resets it");
            }
            output
        });
        self.worker = Some(worker.map_err(ActivateError::Worker)?);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            self.output = worker.stop();
        }
    }
}

fn work(
    mut poller: Poller,
    memory: &GuestMemory,
    queue: ActiveQueue,
    output: &File,
) -> Result<(), RingError> {
    let mut ring = Ring::new(memory, queue);
    let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
    poller
        .add(ring.kick(), edge, 0)
        .map_err(RingError::Interrupt)?;
    loop {
        transmit(&mut ring, memory, output)?;
        if poller.wait(-1).map_err(RingError::Interrupt)?.is_none() {
            return Ok(());
        }
    }
}

fn transmit<'m>(
    ring: &mut Ring<'m>,
    memory: &'m GuestMemory,
    output: &File,
) -> Result<(), RingError> {
    let mut buffers = Buffers::default();
    loop {
        while let Some(chain) = ring.take()? {
            let head = chain.head_index();
            buffers.clear();
            match buffers.append(memory, chain, Direction::FromGuest) {
                Ok(len) => write(&mut buffers, output, len),
                Err(error) => tracing::warn!(%error, "console output refused"),
            }
            ring.give(head, 0)?;
        }
        ring.flush()?;
        if !ring.await_kick()? {
            return Ok(());
        }
    }
}

/// Debug output is dropped where its file takes no more: it must not stop the
/// guest.
fn write(buffers: &mut Buffers<'_>, output: &File, len: usize) {
    let mut done = 0;
    while done < len {
        match buffers.write_to(output, done, len - done) {
            Ok(0) => return,
            Ok(count) => done += count,
            Err(error) => {
                tracing::warn!(%error, "console output lost");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};
    use std::sync::Arc;

    use crate::virtio::driver::{Driver, memory};
    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::eventfd::EventFd;

    #[test]
    fn output_reaches_the_file_also_after_a_reset() {
        let memory = memory();
        let mut file = tempfile::tempfile().unwrap();
        let mut console = Console::new(file.try_clone().unwrap());
        memory
            .write_slice(b"one two", GuestAddress(0x10_0000))
            .unwrap();
        for _ in 0..2 {
            let receive = Driver::new(&memory, 0, 16);
            let mut transmit = Driver::new(&memory, 1, 16);
            console
                .activate(Activation {
                    memory: memory.clone(),
                    features: VIRTIO_F_VERSION_1,
                    queues: vec![Some(receive.active()), Some(transmit.active())],
                    config_interrupt: Arc::new(EventFd::new(0).unwrap()),
                })
                .unwrap();
            let head = transmit.add(&[(0x10_0000, 4, false), (0x10_0004, 3, false)]);
            transmit.kick();
            assert_eq!(transmit.wait(), (head, 0));
            console.reset();
        }
        file.rewind().unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "one twoone two");
    }
}
