//! A queue pair in the kernel: `/dev/vhost-net`, opened by the shim.
//!
//! The crate `vhost` has all the requests, but its own type opens the device by
//! path; this one is made of a descriptor.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{VHOST_NET_SET_BACKEND, vhost_vring_file};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::NetError;
use super::pair::Queues;
use super::tap::Tap;
use crate::virtio::{ActiveQueue, GuestMemory};

/// The queues of a pair as vhost-net counts them.
const RX: usize = 0;
const TX: usize = 1;

/// A pair's vhost device. While it has an owner, the kernel holds a reference
/// to our address space.
pub struct Vhost {
    file: File,
    memory: Arc<GuestMemory>,
    owned: bool,
    running: bool,
}

impl AsRawFd for Vhost {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl VhostKernBackend for Vhost {
    type AS = Arc<GuestMemory>;

    fn mem(&self) -> &Self::AS {
        &self.memory
    }

    /// Each ring must lie within one region, because the kernel gets its
    /// address in our address space.
    fn is_valid(&self, config: &VringConfigData) -> bool {
        let size = usize::from(config.queue_size);
        let rings = [
            (config.desc_table_addr, 16 * size),
            (config.avail_ring_addr, 6 + 2 * size),
            (config.used_ring_addr, 6 + 8 * size),
        ];
        rings
            .iter()
            .all(|&(start, len)| self.memory.get_slice(GuestAddress(start), len).is_ok())
    }
}

impl Vhost {
    /// Takes a descriptor of `/dev/vhost-net` over.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        Self {
            file: fd.into(),
            memory: Arc::new(GuestMemory::new()),
            owned: false,
            running: false,
        }
    }

    /// Features the kernel has.
    ///
    /// # Errors
    ///
    /// When the descriptor is no vhost device.
    pub fn features(&self) -> Result<u64, NetError> {
        self.get_features().map_err(failed("features"))
    }

    /// Lets the kernel move this pair's packets. `features` are the driver's
    /// and the kernel's in common.
    ///
    /// # Errors
    ///
    /// When the kernel refuses; the pair is stopped then.
    pub fn start(
        &mut self,
        memory: &GuestMemory,
        features: u64,
        queues: &Queues,
        tap: &Tap,
    ) -> Result<(), NetError> {
        if !self.owned {
            self.set_owner().map_err(failed("owner"))?;
            self.owned = true;
        }
        self.memory = Arc::new(memory.clone());
        self.set_features(features).map_err(failed("features"))?;
        self.set_mem_table(&regions(memory))
            .map_err(failed("memory"))?;
        self.set_up(RX, &queues.rx)?;
        self.set_up(TX, &queues.tx)?;
        self.running = true;
        let started = [RX, TX]
            .into_iter()
            .try_for_each(|index| self.set_backend(index, Some(tap)));
        if started.is_err() {
            self.stop();
        }
        started
    }

    fn set_up(&self, index: usize, queue: &ActiveQueue) -> Result<(), NetError> {
        self.set_vring_num(index, queue.queue.size())
            .map_err(failed("ring size"))?;
        self.set_vring_base(index, queue.queue.next_avail())
            .map_err(failed("ring position"))?;
        self.set_vring_addr(index, &rings(&queue.queue))
            .map_err(failed("ring addresses"))?;
        self.set_vring_call(index, &queue.interrupt)
            .map_err(failed("interrupt"))?;
        self.set_vring_kick(index, &queue.kick)
            .map_err(failed("kick"))
    }

    /// Stops the pair: the kernel touches neither queues nor tap after this.
    pub fn stop(&mut self) {
        if !std::mem::take(&mut self.running) {
            return;
        }
        for index in [RX, TX] {
            if let Err(error) = self.set_backend(index, None) {
                tracing::error!(%error, source = ?error, "vhost-net does not stop");
            }
        }
    }

    fn set_backend(&self, index: usize, tap: Option<&Tap>) -> Result<(), NetError> {
        let file = vhost_vring_file {
            // RX or TX
            index: u32::from(index == TX),
            fd: tap.map_or(-1, AsRawFd::as_raw_fd),
        };
        // SAFETY: VHOST_NET_SET_BACKEND reads one vhost_vring_file; the kernel
        // takes a reference of its own to the tap.
        let result = unsafe { ioctl_with_ref(self, VHOST_NET_SET_BACKEND(), &file) };
        if result < 0 {
            let error = vhost::Error::IoctlError(std::io::Error::last_os_error());
            return Err(failed("back end")(error));
        }
        Ok(())
    }
}

fn failed(operation: &'static str) -> impl FnOnce(vhost::Error) -> NetError {
    move |source| NetError::VhostNet { operation, source }
}

fn regions(memory: &GuestMemory) -> Vec<VhostUserMemoryRegionInfo> {
    memory
        .iter()
        .map(|region| VhostUserMemoryRegionInfo {
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            // For vhost-user only.
            mmap_offset: 0,
            mmap_handle: -1,
        })
        .collect()
}

fn rings(queue: &Queue) -> VringConfigData {
    VringConfigData {
        queue_max_size: queue.max_size(),
        queue_size: queue.size(),
        flags: 0,
        desc_table_addr: queue.desc_table(),
        used_ring_addr: queue.used_ring(),
        avail_ring_addr: queue.avail_ring(),
        log_addr: None,
    }
}
