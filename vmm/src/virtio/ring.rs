//! A split virtqueue as a device's thread works it.
//!
//! The point is what it does *not* do: the driver is asked for a kick only when
//! the device has nothing left to take ([`Ring::await_kick`]), and interrupted
//! once for all buffers used since the last time ([`Ring::flush`]), if it wants
//! to be at all (virtio 1.2, 2.7.10).

use std::io;
use std::sync::Arc;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::{ActiveQueue, GuestMemory};
use crate::worker::Poller;

const KICK_TOKEN: u64 = 0;
/// Most chains between two interrupts, and two looks at the stop event.
const BATCH: usize = 16;

/// Why queues cannot be worked any further until the device is reset.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The driver broke it, or it is not in guest memory.
    #[error("virtqueue")]
    Queue(#[from] virtio_queue::Error),
    /// The interrupt's event descriptor failed.
    #[error("interrupt event")]
    Interrupt(#[source] io::Error),
    /// epoll failed.
    #[error("event loop")]
    Poll(#[source] io::Error),
}

/// Serves one queue until its worker is told to stop. `handle` deals with a chain
/// and says how many bytes it wrote into it.
///
/// # Errors
///
/// When the driver broke the queue.
pub fn serve<'m>(
    poller: &mut Poller,
    memory: &'m GuestMemory,
    queue: ActiveQueue,
    mut handle: impl FnMut(DescriptorChain<&'m GuestMemory>) -> usize,
) -> Result<(), RingError> {
    let mut ring = Ring::new(memory, queue);
    let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
    let added = poller.add(ring.kick(), edge, KICK_TOKEN);
    added.map_err(RingError::Poll)?;
    // The driver may have kicked before we listened.
    let mut busy = true;
    while poller
        .wait(if busy { 0 } else { -1 })
        .map_err(RingError::Poll)?
        .is_some()
    {
        busy = ring.work(&mut handle)?;
    }
    Ok(())
}

/// A virtqueue and its two event descriptors.
pub struct Ring<'m> {
    memory: &'m GuestMemory,
    queue: Queue,
    kick: EventFd,
    interrupt: Arc<EventFd>,
    /// Whether the driver has been told to kick.
    kicks: bool,
    /// Whether buffers were used since the last flush.
    used: bool,
}

impl<'m> Ring<'m> {
    /// Takes over a queue.
    #[must_use]
    pub fn new(memory: &'m GuestMemory, active: ActiveQueue) -> Self {
        Self {
            memory,
            queue: active.queue,
            kick: active.kick,
            interrupt: active.interrupt,
            kicks: true,
            used: false,
        }
    }

    /// The driver's kick. Watched edge-triggered it need never be read.
    #[must_use]
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Most chains the driver can have outstanding.
    #[must_use]
    pub fn size(&self) -> usize {
        usize::from(self.queue.size())
    }

    /// The next chain the driver made available.
    ///
    /// # Errors
    ///
    /// When the available ring makes no sense.
    pub fn take(&mut self) -> Result<Option<DescriptorChain<&'m GuestMemory>>, RingError> {
        let chain = self.queue.iter(self.memory)?.next();
        if chain.is_some() && self.kicks {
            self.queue.disable_notification(self.memory)?;
            self.kicks = false;
        }
        Ok(chain)
    }

    /// Handles some of the chains there are. Returns whether there may be more: a
    /// guest that never stops asking must not keep the worker from ending.
    ///
    /// # Errors
    ///
    /// When the driver broke the queue.
    pub fn work(
        &mut self,
        mut handle: impl FnMut(DescriptorChain<&'m GuestMemory>) -> usize,
    ) -> Result<bool, RingError> {
        for _ in 0..BATCH {
            let Some(chain) = self.take()? else {
                if self.await_kick()? {
                    continue;
                }
                self.flush()?;
                return Ok(false);
            };
            let head = chain.head_index();
            let written = handle(chain);
            self.give(head, written)?;
        }
        self.flush()?;
        Ok(true)
    }

    /// Puts back the last `count` chains taken, none of them used.
    pub fn put_back(&mut self, count: u16) {
        let position = self.queue.next_avail().wrapping_sub(count);
        self.queue.set_next_avail(position);
    }

    /// Asks for a kick when there is more; `true` if there is already.
    ///
    /// # Errors
    ///
    /// When the ring is not in guest memory.
    pub fn await_kick(&mut self) -> Result<bool, RingError> {
        self.kicks = true;
        Ok(self.queue.enable_notification(self.memory)?)
    }

    /// Gives a chain back with `len` bytes written.
    ///
    /// # Errors
    ///
    /// When the driver's index for the chain makes no sense.
    pub fn give(&mut self, head: u16, len: usize) -> Result<(), RingError> {
        // A chain has less than 2^32 bytes.
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        self.queue.add_used(self.memory, head, len)?;
        self.used = true;
        Ok(())
    }

    /// Interrupts the driver if buffers were used and it wants to know.
    ///
    /// # Errors
    ///
    /// When the ring is not in guest memory or the interrupt fails.
    pub fn flush(&mut self) -> Result<(), RingError> {
        if std::mem::take(&mut self.used) && self.queue.needs_notification(self.memory)? {
            self.interrupt.write(1).map_err(RingError::Interrupt)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::driver::{Driver, memory};

    #[test]
    fn buffers_go_round_with_one_interrupt_a_batch() {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 4);
        let active = driver.active();
        let interrupt = Arc::clone(&active.interrupt);
        let mut ring = Ring::new(&memory, active);
        for _ in 0..5 {
            let heads = [0; 3].map(|_| driver.add(&[(0x2_0000, 16, true)]));
            for head in heads {
                assert_eq!(ring.take().unwrap().unwrap().head_index(), head);
                ring.give(head, 7).unwrap();
            }
            assert!(ring.take().unwrap().is_none());
            ring.flush().unwrap();
            ring.flush().unwrap();
            assert_eq!(interrupt.read().unwrap(), 1);
            assert_eq!(
                [0; 3].map(|_| driver.poll()),
                heads.map(|head| Some((head, 7)))
            );
        }
        assert!(!ring.await_kick().unwrap());
        let head = driver.add(&[(0x2_0000, 16, true)]);
        assert!(ring.await_kick().unwrap());
        assert_eq!(ring.take().unwrap().unwrap().head_index(), head);
        ring.put_back(1);
        assert_eq!(ring.take().unwrap().unwrap().head_index(), head);
    }

    #[test]
    fn driver_says_when_it_wants_an_interrupt() {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 8);
        let mut active = driver.active();
        active.queue.set_event_idx(true);
        let interrupt = Arc::clone(&active.interrupt);
        let mut ring = Ring::new(&memory, active);
        driver.interrupt_after(2);
        for used in 1..=4 {
            let head = driver.add(&[(0x2_0000, 16, true)]);
            ring.take().unwrap().unwrap();
            ring.give(head, 0).unwrap();
            ring.flush().unwrap();
            assert_eq!(interrupt.read().is_ok(), used == 3);
        }
        assert!(!ring.await_kick().unwrap());
        assert_eq!(driver.kick_wanted_after(), 4);
    }
}
