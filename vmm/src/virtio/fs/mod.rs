//! virtio-fs (virtio 1.2, 5.11), its back end another process: virtiofsd.
//!
//! ```text
//!   guest driver <--- rings, FUSE requests, kicks, interrupts ---> virtiofsd
//!        | set-up                                                     ^
//!        v                                                            |
//!   this device --- vhost-user socket: guest memory, ring addresses --+
//! ```
//!
//! The monitor only carries set-up over the vhost-user socket. Requests go from
//! the guest to virtiofsd and back without it, so there is no thread here.
//!
//! A back end that dies, or does not stop when it is told to, is given up for
//! good: its socket is shut down, which ends virtiofsd, so that it cannot touch
//! guest memory after a reset. The device stays and refuses to be activated until
//! the monitor, which sees the connection hang up, ends the machine.

#[cfg(test)]
pub(crate) mod tests;

use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::{
    ActivateError, Activation, ActiveQueue, GuestMemory, VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1, VirtioDevice,
};

/// Device type (virtio 1.2, 5.11.1).
const DEVICE_TYPE: u16 = 26;
/// The high-priority queue and one request queue (virtio 1.2, 5.11.2).
const QUEUES: u16 = 2;
/// Linux sends no requests larger than a ring of descriptors for pages: this
/// many are enough for 1 MiB, the most it ever sends.
const QUEUE_SIZE: u16 = 1024;
/// Bytes of the tag in configuration space (virtio 1.2, 5.11.4).
const TAG_BYTES: usize = 36;
/// Bytes of the configuration space without notifications.
const CONFIG_BYTES: usize = TAG_BYTES + 4;
/// Features that are the rings', not the file system's.
const RING_FEATURES: u64 = VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX | VIRTIO_F_INDIRECT_DESC;
/// Says that there are protocol features; it is not the driver's business.
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// What a back end must offer.
const REQUIRED: u64 = VIRTIO_F_VERSION_1 | PROTOCOL_FEATURES;

/// Why there is no shared directory.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The tag does not fit.
    #[error("tag {0:?} is empty or longer than {TAG_BYTES} bytes")]
    Tag(String),
    /// The socket cannot be used.
    #[error("vhost-user socket: {0}")]
    Socket(#[source] io::Error),
    /// The back end does not speak as it should.
    #[error("vhost-user back end: {0}")]
    BackEnd(#[from] vhost::Error),
    /// The back end follows no virtio 1.x, or knows no protocol features.
    #[error("vhost-user back end offers features {0:#x} without {REQUIRED:#x}")]
    Features(u64),
    /// The back end does not say when it has done what it was told.
    #[error("vhost-user back end acknowledges no requests (protocol features {0:#x})")]
    Acknowledge(u64),
    /// The back end has too few queues.
    #[error("vhost-user back end has {0} queues, {QUEUES} are needed")]
    Queues(u64),
}

/// The device.
pub struct Fs {
    config: [u8; CONFIG_BYTES],
    back_end: Frontend,
    /// The same connection, to end it.
    socket: UnixStream,
    features: u64,
    /// Queues that were started and not stopped since.
    running: Vec<usize>,
    /// The back end was given up.
    lost: bool,
}

impl Fs {
    /// A device with the mount tag `tag` whose back end is at the other end of
    /// `socket`.
    ///
    /// # Errors
    ///
    /// When the tag does not fit or the back end cannot be agreed with.
    pub fn new(tag: &str, socket: OwnedFd) -> Result<Self, FsError> {
        let config = config(tag)?;
        let socket = UnixStream::from(socket);
        let stream = socket.try_clone().map_err(FsError::Socket)?;
        let mut back_end = Frontend::from_stream(stream, QUEUES.into());
        back_end.set_owner()?;
        let features = back_end.get_features()?;
        if features & REQUIRED != REQUIRED {
            return Err(FsError::Features(features));
        }
        agree(&mut back_end)?;
        Ok(Self {
            config,
            back_end,
            socket,
            features: features & RING_FEATURES,
            running: Vec::new(),
            lost: false,
        })
    }

    fn start(&mut self, activation: Activation) -> vhost::Result<()> {
        let features = activation.features & self.features;
        self.back_end.set_features(features | PROTOCOL_FEATURES)?;
        let memory = activation.memory;
        let regions = memory
            .iter()
            .map(VhostUserMemoryRegionInfo::from_guest_region)
            .collect::<vhost::Result<Vec<_>>>()?;
        self.back_end.set_mem_table(&regions)?;
        for (index, queue) in activation.queues.into_iter().enumerate() {
            if let Some(queue) = queue {
                self.start_queue(index, &memory, &queue)?;
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
        let rings = rings(memory, queue)?;
        self.back_end.set_vring_num(index, queue.size())?;
        self.back_end.set_vring_addr(index, &rings)?;
        self.back_end.set_vring_base(index, queue.next_avail())?;
        self.back_end.set_vring_call(index, &active.interrupt)?;
        // The ring may run from here on, whatever the next answer is.
        self.running.push(index);
        self.back_end.set_vring_kick(index, &active.kick)?;
        self.back_end.set_vring_enable(index, true)?;
        // virtiofsd takes kicks from the moment it has the descriptor, and lets go of
        // those that come before the ring is enabled: the guest would wait for ever. It
        // may find an empty ring at any time, so one kick too many does no harm.
        active.kick.write(1).map_err(vhost::Error::IOError)
    }

    /// Ends the connection, once.
    fn give_up(&mut self, error: &vhost::Error) {
        if std::mem::replace(&mut self.lost, true) {
            return;
        }
        tracing::error!(%error, "shared directory is lost: its vhost-user back end is gone");
        self.running.clear();
        // Fails only if the connection has ended.
        if let Err(error) = self.socket.shutdown(Shutdown::Both) {
            tracing::debug!(%error, "vhost-user socket");
        }
    }
}

/// Agrees on what requests look like.
fn agree(back_end: &mut Frontend) -> Result<(), FsError> {
    let offered = back_end.get_protocol_features()?;
    let wanted = VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::MQ;
    let agreed = offered & wanted;
    if !agreed.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        return Err(FsError::Acknowledge(offered.bits()));
    }
    back_end.set_protocol_features(agreed)?;
    back_end.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    if agreed.contains(VhostUserProtocolFeatures::MQ) {
        let queues = back_end.get_queue_num()?;
        if queues < QUEUES.into() {
            return Err(FsError::Queues(queues));
        }
    }
    Ok(())
}

/// The tag, then the number of request queues (virtio 1.2, 5.11.4).
fn config(tag: &str) -> Result<[u8; CONFIG_BYTES], FsError> {
    let mut config = [0; CONFIG_BYTES];
    let (name, queues) = config.split_at_mut(TAG_BYTES);
    match name.get_mut(..tag.len()) {
        Some(room) if !tag.is_empty() => room.copy_from_slice(tag.as_bytes()),
        _ => return Err(FsError::Tag(tag.to_owned())),
    }
    queues.copy_from_slice(&u32::from(QUEUES - 1).to_le_bytes());
    Ok(config)
}

/// Where the rings are in this process: that is how vhost-user names addresses.
/// Each must lie within one region.
fn rings(memory: &GuestMemory, queue: &virtio_queue::Queue) -> vhost::Result<VringConfigData> {
    let size = usize::from(queue.size());
    let place = |address: u64, bytes: usize| {
        let slice = memory.get_slice(GuestAddress(address), bytes);
        slice
            .map(|slice| slice.ptr_guard().as_ptr() as u64)
            .map_err(|_| vhost::Error::InvalidGuestMemory)
    };
    Ok(VringConfigData {
        queue_max_size: queue.max_size(),
        queue_size: queue.size(),
        flags: 0,
        desc_table_addr: place(queue.desc_table(), 16 * size)?,
        avail_ring_addr: place(queue.avail_ring(), 6 + 2 * size)?,
        used_ring_addr: place(queue.used_ring(), 6 + 8 * size)?,
        log_addr: None,
    })
}

/// Whether the back end is gone, as opposed to having refused something.
fn is_hangup(error: &vhost::Error) -> bool {
    use vhost::vhost_user::Error;
    matches!(
        error,
        vhost::Error::VhostUserProtocol(
            Error::Disconnected
                | Error::PartialMessage
                | Error::SocketBroken(_)
                | Error::SocketError(_)
                | Error::InvalidMessage
        )
    )
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(QUEUES)]
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let fields = self.config.into_iter().skip(start);
        for (byte, value) in data.iter_mut().zip(fields.chain(std::iter::repeat(0))) {
            *byte = value;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if self.lost || !self.running.is_empty() {
            return Err(ActivateError::Unavailable);
        }
        self.start(activation).map_err(|error| {
            if is_hangup(&error) {
                self.give_up(&error);
            }
            self.reset();
            ActivateError::Backend(format!("vhost-user back end: {error}"))
        })
    }

    /// Stops every ring: the back end answers once it no longer uses it.
    fn reset(&mut self) {
        for index in std::mem::take(&mut self.running) {
            if let Err(error) = self.back_end.get_vring_base(index) {
                self.give_up(&error);
                return;
            }
        }
    }
}

impl Drop for Fs {
    fn drop(&mut self) {
        self.reset();
    }
}
