//! virtio-fs (virtio 1.2, 5.11), its back end another process: virtiofsd.
//!
//! The monitor only carries set-up over the vhost-user socket: guest memory, ring
//! addresses, event descriptors. Requests go from the guest to virtiofsd and
//! back without it, so there is no thread here.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::QueueT;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{
    ActivateError, Activation, ActiveQueue, GuestMemory, VIRTIO_F_VERSION_1, VirtioDevice,
};

/// Device type (virtio 1.2, 5.11.1).
const DEVICE_TYPE: u16 = 26;
/// The high-priority queue and one request queue.
const QUEUES: u16 = 2;
const QUEUE_SIZE: u16 = 256;
/// Bytes of the tag in configuration space (virtio 1.2, 5.11.4).
const TAG_BYTES: usize = 36;
/// Features that are the transport's and the protocol's, not the file system's.
const OFFERED: u64 = super::VIRTIO_F_VERSION_1
    | super::VIRTIO_F_EVENT_IDX
    | super::VIRTIO_F_INDIRECT_DESC
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// Why there is no shared directory.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The tag does not fit.
    #[error("tag {0:?} is empty or longer than {TAG_BYTES} bytes")]
    Tag(String),
    /// The back end does not speak as it should.
    #[error("vhost-user back end: {0}")]
    BackEnd(#[from] vhost::Error),
    /// The back end follows no virtio 1.x.
    #[error("vhost-user back end offers features {0:#x} without VIRTIO_F_VERSION_1")]
    Features(u64),
}

/// The device.
pub struct Fs {
    tag: [u8; TAG_BYTES],
    back_end: Frontend,
    features: u64,
    /// Queues that were started and not stopped since.
    running: Vec<usize>,
}

impl Fs {
    /// A device with the mount tag `tag` whose back end is at the other end of
    /// `socket`.
    ///
    /// # Errors
    ///
    /// When the tag does not fit or the back end cannot be agreed with.
    pub fn new(tag: &str, socket: OwnedFd) -> Result<Self, FsError> {
        let mut bytes = [0; TAG_BYTES];
        match bytes.get_mut(..tag.len()) {
            Some(room) if !tag.is_empty() => room.copy_from_slice(tag.as_bytes()),
            _ => return Err(FsError::Tag(tag.to_owned())),
        }
        let mut back_end = Frontend::from_stream(UnixStream::from(socket), QUEUES.into());
        back_end.set_owner()?;
        let offered = back_end.get_features()?;
        if offered & VIRTIO_F_VERSION_1 == 0 {
            return Err(FsError::Features(offered));
        }
        if offered & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0 {
            let known = back_end.get_protocol_features().map_err(user_error)?;
            let wanted = VhostUserProtocolFeatures::REPLY_ACK;
            back_end
                .set_protocol_features(known & wanted)
                .map_err(user_error)?;
        }
        Ok(Self {
            tag: bytes,
            back_end,
            features: offered & OFFERED,
            running: Vec::new(),
        })
    }

    fn start(&mut self, activation: Activation) -> vhost::Result<()> {
        let protocol = self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.back_end.set_features(activation.features | protocol)?;
        let regions = regions(&activation.memory)?;
        self.back_end.set_mem_table(&regions)?;
        for (index, queue) in activation.queues.into_iter().enumerate() {
            if let Some(queue) = queue {
                self.start_queue(index, &activation.memory, &queue)?;
            }
        }
        Ok(())
    }

    fn start_queue(
        &mut self,
        index: usize,
        memory: &GuestMemory,
        active: &ActiveQueue,
    ) -> vhost::Result<()> {
        let queue = &active.queue;
        self.back_end.set_vring_num(index, queue.size())?;
        self.back_end.set_vring_addr(
            index,
            &VringConfigData {
                queue_max_size: queue.max_size(),
                queue_size: queue.size(),
                flags: 0,
                desc_table_addr: host_address(memory, queue.desc_table())?,
                used_ring_addr: host_address(memory, queue.used_ring())?,
                avail_ring_addr: host_address(memory, queue.avail_ring())?,
                log_addr: None,
            },
        )?;
        self.back_end.set_vring_base(index, queue.next_avail())?;
        self.back_end.set_vring_call(index, &active.interrupt)?;
        self.back_end.set_vring_kick(index, &active.kick)?;
        self.back_end
            .set_vring_enable(index, true)
            .map_err(user_error)?;
        self.running.push(index);
        Ok(())
    }
}

/// The extension methods of the front end have the same error type.
fn user_error(error: vhost::Error) -> vhost::Error {
    error
}

fn regions(memory: &GuestMemory) -> vhost::Result<Vec<VhostUserMemoryRegionInfo>> {
    memory
        .iter()
        .map(VhostUserMemoryRegionInfo::from_guest_region)
        .collect()
}

/// Where a ring is in this process: that is how vhost-user names addresses.
fn host_address(memory: &GuestMemory, address: u64) -> vhost::Result<u64> {
    let address = GuestAddress(address);
    memory
        .find_region(address)
        .and_then(|region| {
            let base = VhostUserMemoryRegionInfo::from_guest_region(region).ok()?;
            let offset = address.checked_offset_from(region.start_addr())?;
            base.userspace_addr.checked_add(offset)
        })
        .ok_or(vhost::Error::InvalidGuestMemory)
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(QUEUES)]
    }

    fn features(&self) -> u64 {
        self.features & !VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    /// The tag, then the number of request queues (virtio 1.2, 5.11.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = self.tag.to_vec();
        config.extend(u32::from(QUEUES - 1).to_le_bytes());
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (index, byte) in data.iter_mut().enumerate() {
            let at = start.saturating_add(index);
            *byte = config.get(at).copied().unwrap_or(0);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.start(activation)
            .map_err(|error| ActivateError::Backend(format!("vhost-user back end: {error}")))
    }

    /// Stops every ring: the back end answers once it no longer uses it.
    fn reset(&mut self) {
        for index in std::mem::take(&mut self.running) {
            if let Err(error) = self.back_end.get_vring_base(index) {
                tracing::warn!(%error, index, "vhost-user back end did not stop its ring");
            }
        }
    }
}
