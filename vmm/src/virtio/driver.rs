//! A driver for tests: the guest's side of one split virtqueue (virtio 1.2, 2.7).
//!
//! Unlike virtio-queue's own mock it can go round the ring, which a device that
//! moves more than a queueful needs.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{ActiveQueue, GuestMemory};

/// Room for the rings of one queue.
const QUEUE_SPACE: u64 = 0x4000;
const WAIT: Duration = Duration::from_secs(20);

/// 16 MiB at address 0; the rings of queue n start at n times `QUEUE_SPACE`.
pub fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap()
}

/// The driver's side of one queue. At most `size` chains of one descriptor, or
/// the like, may be outstanding: descriptors are used in turn.
pub struct Driver<'m> {
    memory: &'m GuestMemory,
    base: u64,
    size: u16,
    next_descriptor: u16,
    avail: u16,
    used: u16,
    kick: EventFd,
    interrupt: Arc<EventFd>,
}

impl<'m> Driver<'m> {
    pub fn new(memory: &'m GuestMemory, index: u64, size: u16) -> Self {
        let base = index * QUEUE_SPACE;
        let zeros = vec![0; usize::try_from(QUEUE_SPACE).unwrap()];
        memory.write_slice(&zeros, GuestAddress(base)).unwrap();
        Self {
            memory,
            base,
            size,
            next_descriptor: 0,
            avail: 0,
            used: 0,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            interrupt: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
        }
    }

    fn avail_ring(&self) -> u64 {
        self.base + 0x2000
    }

    fn used_ring(&self) -> u64 {
        self.base + 0x3000
    }

    /// The device's side, as the transport would make it.
    pub fn queue(&self) -> Queue {
        let mut queue = Queue::new(256).unwrap();
        queue.set_size(self.size);
        queue
            .try_set_desc_table_address(GuestAddress(self.base))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(self.avail_ring()))
            .unwrap();
        queue
            .try_set_used_ring_address(GuestAddress(self.used_ring()))
            .unwrap();
        queue.set_ready(true);
        queue
    }

    pub fn active(&self) -> ActiveQueue {
        ActiveQueue {
            queue: self.queue(),
            kick: self.kick.try_clone().unwrap(),
            interrupt: Arc::clone(&self.interrupt),
        }
    }

    /// Makes a chain of (address, length, device writes) available.
    pub fn add(&mut self, chain: &[(u64, u32, bool)]) -> u16 {
        let head = self.next_descriptor;
        for (index, &(address, len, write)) in chain.iter().enumerate() {
            let this = self.next_descriptor;
            self.next_descriptor = (this + 1) % self.size;
            let more = index + 1 < chain.len();
            let flags = u16::from(more) | (u16::from(write) << 1);
            let at = self.base + 16 * u64::from(this);
            self.store(at, &address.to_le_bytes());
            self.store(at + 8, &len.to_le_bytes());
            self.store(at + 12, &flags.to_le_bytes());
            self.store(at + 14, &self.next_descriptor.to_le_bytes());
        }
        let slot = self.avail_ring() + 4 + 2 * u64::from(self.avail % self.size);
        self.store(slot, &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
        self.memory
            .store(
                self.avail,
                GuestAddress(self.avail_ring() + 2),
                Ordering::Release,
            )
            .unwrap();
        head
    }

    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// The next used buffer, (head, bytes written), if there is one.
    pub fn poll(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self
            .memory
            .load(GuestAddress(self.used_ring() + 2), Ordering::Acquire)
            .unwrap();
        if index == self.used {
            return None;
        }
        let at = self.used_ring() + 4 + 8 * u64::from(self.used % self.size);
        self.used = self.used.wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        let len = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
        Some((u16::try_from(head).unwrap(), len))
    }

    /// Waits for the next used buffer and its interrupt.
    pub fn wait(&mut self) -> (u16, u32) {
        let end = Instant::now() + WAIT;
        loop {
            if let Some(used) = self.poll() {
                return used;
            }
            assert!(Instant::now() < end, "no buffer was used");
            let mut poll = libc::pollfd {
                fd: std::os::fd::AsRawFd::as_raw_fd(&*self.interrupt),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one valid pollfd.
            unsafe { libc::poll(&raw mut poll, 1, 1000) };
            let _ = self.interrupt.read();
        }
    }

    /// `used_event`: the index whose use is to interrupt (virtio 1.2, 2.7.7).
    pub fn interrupt_after(&self, index: u16) {
        let address = self.avail_ring() + 4 + 2 * u64::from(self.size);
        self.store(address, &index.to_le_bytes());
    }

    /// `avail_event`: the index whose availability is to kick (virtio 1.2,
    /// 2.7.10).
    pub fn kick_wanted_after(&self) -> u16 {
        let address = self.used_ring() + 4 + 8 * u64::from(self.size);
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }

    pub fn store(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    pub fn load(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }
}
