//! The control queue (virtio 1.2, 5.1.6.5): one command is served, how many
//! queue pairs the driver uses.

use virtio_bindings::virtio_net::{VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET};
use vmm_sys_util::epoll::EventSet;

use super::pair::ServeError;
use crate::virtio::buffers::{Buffers, Direction};
use crate::virtio::ring::{Ring, RingError};
use crate::virtio::{ActiveQueue, GuestMemory};
use crate::worker::Poller;

const KICK_TOKEN: u64 = 0;
/// `VIRTIO_NET_OK`
const ACK: u8 = 0;
/// `VIRTIO_NET_ERR`
const REFUSAL: u8 = 1;
/// Most commands between two looks at the stop event.
const BATCH: usize = 64;

/// Serves the queue until told to stop. `set_pairs` puts a number of pairs into
/// use, and says whether it could.
///
/// # Errors
///
/// When the driver broke the queue.
pub fn serve(
    poller: &mut Poller,
    memory: &GuestMemory,
    queue: ActiveQueue,
    set_pairs: &mut impl FnMut(u16) -> bool,
) -> Result<(), ServeError> {
    let mut ring = Ring::new(memory, queue);
    let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
    poller.add(ring.kick(), edge, KICK_TOKEN)?;
    let mut busy = true;
    while poller.wait(if busy { 0 } else { -1 })?.is_some() {
        busy = answer_all(&mut ring, memory, set_pairs)?;
        ring.flush()?;
    }
    Ok(())
}

/// Returns whether there may be more.
fn answer_all<'m>(
    ring: &mut Ring<'m>,
    memory: &'m GuestMemory,
    set_pairs: &mut impl FnMut(u16) -> bool,
) -> Result<bool, RingError> {
    let (mut command, mut answer) = (Buffers::default(), Buffers::default());
    for _ in 0..BATCH {
        let Some(chain) = ring.take()? else {
            if ring.await_kick()? {
                continue;
            }
            return Ok(false);
        };
        let head = chain.head_index();
        command.clear();
        answer.clear();
        let readable = command.append(memory, chain.clone(), Direction::FromGuest);
        let writable = answer.append(memory, chain, Direction::ToGuest);
        let mut written = 0;
        if readable.is_ok() && writable.is_ok_and(|room| room > 0) {
            let ack = if obey(&command, set_pairs) {
                ACK
            } else {
                REFUSAL
            };
            written = answer.write(0, &[ack]);
        }
        ring.give(head, written)?;
    }
    Ok(true)
}

fn obey(command: &Buffers<'_>, set_pairs: &mut impl FnMut(u16) -> bool) -> bool {
    let mut bytes = [0; 4];
    if command.read(0, &mut bytes) != bytes.len() {
        return false;
    }
    let [class, code, low, high] = bytes;
    u32::from(class) == VIRTIO_NET_CTRL_MQ
        && u32::from(code) == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET
        && set_pairs(u16::from_le_bytes([low, high]))
}
