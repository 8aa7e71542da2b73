//! virtio-mem (virtio 1.2, 5.15): memory beyond what the machine booted with.
//!
//! The region is there from the start, mapped and known to KVM and to every back
//! end, and costs nothing: no page of it exists before the guest touches it.
//! [`Resizer::request`] says how much of it the guest is to use; the guest plugs
//! and unplugs blocks until it does, as far as it can, and pages of an unplugged
//! block go back to the host. What a guest may touch is thus a matter of its good
//! will; what it can take from the host is limited by the pod's cgroup.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nacre_protocol::vm::GROWTH_STEP_MIB;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::buffers::{Buffers, Direction};
use super::complaints::Complaints;
use super::ring::{self, RingError};
use super::{
    ActivateError, Activation, ActiveQueue, GuestMemory, VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1, VirtioDevice,
};
use crate::memory::Growth;
use crate::worker::{Poller, Worker};

mod blocks;

use blocks::{Blocks, Refusal};

/// Device type (virtio 1.2, 5.15.1).
const DEVICE_TYPE: u16 = 24;
const QUEUE_SIZE: u16 = 16;
/// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`: the driver keeps off unplugged memory.
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
/// Bytes of a block.
pub const BLOCK_BYTES: u64 = (GROWTH_STEP_MIB as u64) << 20;

/// Length of a request, the same for all types (virtio 1.2, 5.15.6).
const REQUEST_BYTES: usize = 24;

/// The device.
pub struct Mem {
    shared: Arc<Shared>,
    worker: Option<Worker<()>>,
}

/// Says how large the memory is to be.
#[derive(Clone)]
pub struct Resizer(Arc<Shared>);

struct Shared {
    blocks: Mutex<Blocks>,
    /// Tells an active driver to look at the configuration.
    config_interrupt: Mutex<Option<Arc<EventFd>>>,
    /// Signalled when the guest plugged or unplugged something.
    changed: EventFd,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Mem {
    /// A device for a region nothing of which is plugged.
    ///
    /// # Errors
    ///
    /// When there is no event descriptor.
    pub fn new(growth: Growth) -> io::Result<(Self, Resizer)> {
        let shared = Arc::new(Shared {
            blocks: Mutex::new(Blocks::new(growth)),
            config_interrupt: Mutex::default(),
            changed: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        });
        let resizer = Resizer(shared.clone());
        let device = Self {
            shared,
            worker: None,
        };
        Ok((device, resizer))
    }
}

impl Resizer {
    /// Asks the guest to use `bytes` of the region, rounded up to whole blocks;
    /// more than the region has is all of it.
    pub fn request(&self, bytes: u64) {
        lock(&self.0.blocks).request(bytes);
        if let Some(interrupt) = &*lock(&self.0.config_interrupt)
            && let Err(error) = interrupt.write(1)
        {
            tracing::warn!(%error, "the guest is not told of its new size");
        }
    }

    /// Bytes the guest has plugged.
    #[must_use]
    pub fn plugged(&self) -> u64 {
        lock(&self.0.blocks).plugged_bytes()
    }

    /// Signalled when [`Self::plugged`] may have changed.
    #[must_use]
    pub fn changed(&self) -> &EventFd {
        &self.0.changed
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX | VIRTIO_F_INDIRECT_DESC | UNPLUGGED_INACCESSIBLE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = lock(&self.shared.blocks).config();
        data.fill(0);
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = config.get(offset..).unwrap_or_default();
        for (to, from) in data.iter_mut().zip(bytes) {
            *to = *from;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if self.worker.is_some() {
            return Err(ActivateError::Unavailable);
        }
        let memory = activation.memory;
        let queue = Activation::all_queues(activation.queues)?
            .pop()
            .ok_or(ActivateError::QueueDisabled(0))?;
        *lock(&self.shared.config_interrupt) = Some(activation.config_interrupt);
        let shared = self.shared.clone();
        let worker = Worker::spawn("virtio-mem", move |mut poller| {
            if let Err(error) = work(&mut poller, &memory, queue, &shared) {
                tracing::warn!(%error, "mem stopped until the guest resets it");
            }
        });
        self.worker = Some(worker.map_err(ActivateError::Worker)?);
        Ok(())
    }

    /// Plugged memory stays so: only the machine's own reset unplugs it (virtio
    /// 1.2, 5.15.5.1), and that ends this machine.
    fn reset(&mut self) {
        *lock(&self.shared.config_interrupt) = None;
        if let Some(worker) = self.worker.take() {
            worker.stop();
        }
    }
}

impl Drop for Mem {
    fn drop(&mut self) {
        self.reset();
    }
}

fn work(
    poller: &mut Poller,
    memory: &GuestMemory,
    queue: ActiveQueue,
    shared: &Shared,
) -> Result<(), RingError> {
    let mut complaints = Complaints::new("mem request fails");
    let (mut request, mut answer) = (Buffers::default(), Buffers::default());
    ring::serve(poller, memory, queue, |chain| {
        request.clear();
        answer.clear();
        let readable = request.append(memory, chain.clone(), Direction::FromGuest);
        let writable = answer.append(memory, chain, Direction::ToGuest);
        if let Err(error) = readable.and(writable) {
            complaints.add(&error);
            return 0;
        }
        let mut bytes = [0; REQUEST_BYTES];
        if request.read(0, &mut bytes) != bytes.len() {
            complaints.add(&"request too short");
            return 0;
        }
        let response = match obey(shared, memory, bytes) {
            Ok(response) => response,
            Err(refusal) => {
                complaints.add(&refusal);
                Response::refused(&refusal)
            }
        };
        answer.write(0, &response.bytes())
    })
}

/// What the driver reads (virtio 1.2, 5.15.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Response {
    kind: u16,
    /// Answer to a question after the state of blocks.
    state: u16,
}

impl Response {
    const ACK: u16 = 0;
    const NACK: u16 = 1;
    const BUSY: u16 = 2;
    const ERROR: u16 = 3;

    const fn done() -> Self {
        Self {
            kind: Self::ACK,
            state: 0,
        }
    }

    fn refused(refusal: &Refusal) -> Self {
        let kind = match refusal {
            Refusal::TooMuch => Self::NACK,
            Refusal::Host(_) => Self::BUSY,
            Refusal::Request(_) | Refusal::Range | Refusal::State => Self::ERROR,
        };
        Self { kind, state: 0 }
    }

    /// Type, six bytes of padding, state.
    fn bytes(self) -> [u8; 10] {
        let mut bytes = [0; 10];
        bytes[..2].copy_from_slice(&self.kind.to_le_bytes());
        bytes[8..].copy_from_slice(&self.state.to_le_bytes());
        bytes
    }
}

/// Request: type, six bytes of padding, address, number of blocks, padding.
fn obey(
    shared: &Shared,
    memory: &GuestMemory,
    bytes: [u8; REQUEST_BYTES],
) -> Result<Response, Refusal> {
    const PLUG: u16 = 0;
    const UNPLUG: u16 = 1;
    const UNPLUG_ALL: u16 = 2;
    const STATE: u16 = 3;
    let [kind_low, kind_high, _, _, _, _, _, _, rest @ ..] = bytes;
    let [a, b, c, d, e, f, g, h, count_low, count_high, ..] = rest;
    let address = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    let count = u16::from_le_bytes([count_low, count_high]);
    let mut blocks = lock(&shared.blocks);
    match u16::from_le_bytes([kind_low, kind_high]) {
        PLUG => blocks.plug(address, count)?,
        UNPLUG => blocks.unplug(memory, address, count)?,
        UNPLUG_ALL => blocks.unplug_all(memory)?,
        STATE => {
            let state = blocks.state(address, count)? as u16;
            return Ok(Response {
                kind: Response::ACK,
                state,
            });
        }
        other => return Err(Refusal::Request(other)),
    }
    drop(blocks);
    if let Err(error) = shared.changed.write(1) {
        tracing::warn!(%error, "a change of memory is not told");
    }
    Ok(Response::done())
}

#[cfg(test)]
mod tests;
