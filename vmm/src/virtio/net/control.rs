//! The control queue (virtio 1.2, 5.1.6.5): one command is served, how many
//! queue pairs the driver uses.

use virtio_bindings::virtio_net::{VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET};

use crate::virtio::buffers::{Buffers, Direction};
use crate::virtio::ring::{self, RingError};
use crate::virtio::{ActiveQueue, GuestMemory};
use crate::worker::Poller;

/// `VIRTIO_NET_OK`
const ACK: u8 = 0;
/// `VIRTIO_NET_ERR`
const REFUSAL: u8 = 1;

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
) -> Result<(), RingError> {
    let (mut command, mut answer) = (Buffers::default(), Buffers::default());
    ring::serve(poller, memory, queue, |chain| {
        command.clear();
        answer.clear();
        let readable = command.append(memory, chain.clone(), Direction::FromGuest);
        let writable = answer.append(memory, chain, Direction::ToGuest);
        if readable.is_err() || !writable.is_ok_and(|room| room > 0) {
            return 0;
        }
        let ack = if obey(&command, set_pairs) {
            ACK
        } else {
            REFUSAL
        };
        answer.write(0, &[ack])
    })
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
