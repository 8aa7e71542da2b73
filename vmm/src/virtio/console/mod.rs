//! virtio-console (virtio 1.2, 5.3), one port, for debugging only.
//!
//! What the guest writes goes to a file, up to a limit; nothing ever comes from
//! it. The file should be one whose writes do not wait, or a non-blocking pipe:
//! what it does not take at once is dropped. Without
//! `VIRTIO_CONSOLE_F_MULTIPORT` there are two queues, receive (0) and transmit
//! (1), and no control messages.

use std::fs::File;

use super::buffers::{Buffers, Direction};
use super::complaints::Complaints;
use super::ring::{self, RingError};
use super::{
    ActivateError, Activation, ActiveQueue, GuestMemory, VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1, VirtioDevice,
};
use crate::worker::{Poller, Worker};

/// Device type (virtio 1.2, 5.3.1).
const DEVICE_TYPE: u16 = 3;
const QUEUE_SIZE: u16 = 64;
/// The transmit queue (virtio 1.2, 5.3.2).
const TRANSMIT: usize = 1;
/// Most bytes between a reset and the next: a guest cannot fill the host's disk.
const MAX_OUTPUT_BYTES: u64 = 64 << 20;

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
        let transmit = activation.queues.into_iter().nth(TRANSMIT).flatten();
        let transmit = transmit.ok_or(ActivateError::QueueDisabled(TRANSMIT))?;
        let output = self.output.take().ok_or(ActivateError::Unavailable)?;
        let worker = Worker::spawn("virtio-console", move |mut poller| {
            if let Err(error) = work(&mut poller, &memory, transmit, &output) {
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

impl Drop for Console {
    fn drop(&mut self) {
        self.reset();
    }
}

fn work(
    poller: &mut Poller,
    memory: &GuestMemory,
    queue: ActiveQueue,
    output: &File,
) -> Result<(), RingError> {
    let mut sink = Sink {
        output,
        left: MAX_OUTPUT_BYTES,
        complaints: Complaints::new("console output lost"),
    };
    let mut buffers = Buffers::default();
    ring::serve(poller, memory, queue, |chain| {
        buffers.clear();
        match buffers.append(memory, chain, Direction::FromGuest) {
            Ok(len) => sink.write(&mut buffers, len),
            Err(error) => sink.complaints.add(&error),
        }
        0
    })
}

/// Where the output goes. It is dropped where the file takes no more, because
/// it must not stop the guest.
struct Sink<'f> {
    output: &'f File,
    left: u64,
    complaints: Complaints,
}

impl Sink<'_> {
    fn write(&mut self, buffers: &mut Buffers<'_>, len: usize) {
        let mut done = 0;
        while done < len && self.left > 0 {
            let room = usize::try_from(self.left).unwrap_or(usize::MAX);
            match buffers.write_to(self.output, done, room.min(len - done)) {
                Ok(0) => return,
                Ok(count) => {
                    done += count;
                    self.left = self.left.saturating_sub(count as u64);
                    if self.left == 0 {
                        self.complaints
                            .add(&format_args!("{MAX_OUTPUT_BYTES} bytes are enough"));
                    }
                }
                Err(error) => return self.complaints.add(&error),
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
    use virtio_queue::QueueOwnedT;
    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::eventfd::EventFd;

    #[test]
    fn output_ends_at_the_limit() {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 16);
        let mut queue = driver.queue();
        driver.add(&[(0x10_0000, 100, false)]);
        let chain = queue.iter(&memory).unwrap().next().unwrap();
        let mut buffers = Buffers::default();
        buffers
            .append(&memory, chain, Direction::FromGuest)
            .unwrap();
        let file = tempfile::tempfile().unwrap();
        let mut sink = Sink {
            output: &file,
            left: 150,
            complaints: Complaints::new("test"),
        };
        for _ in 0..3 {
            sink.write(&mut buffers, 100);
        }
        assert_eq!(file.metadata().unwrap().len(), 150);
    }

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
