//! virtio-net (virtio 1.2, 5.1) between the guest and a tap in the pod's
//! network namespace.
//!
//! ```text
//!                    +--- with /dev/vhost-net: the kernel moves the packets ---+
//!   guest driver ----+                                                         +---- tap queue
//!    queue pair n    +--- without: a thread of ours (pair.rs), readv/writev ---+        n
//!
//!    control queue ------- a thread of ours (control.rs): how many pairs are in use
//! ```
//!
//! The shim makes the taps (`IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, and
//! `IFF_MULTI_QUEUE` for more than one pair) and opens `/dev/vhost-net`, because
//! both need privilege. Everything done to these descriptors here needs none:
//! `TUNSETVNETHDRSZ`, `TUNSETOFFLOAD`, `TUNSETQUEUE` and vhost's own.
//!
//! Checksum and segmentation offloads go through as they are: the 12-byte header
//! in front of each packet (virtio 1.2, 5.1.6) means the same to the guest and
//! to the tap, and the kernel checks what the guest put there.

mod control;
mod device;
mod pair;
mod tap;
#[cfg(test)]
pub(crate) mod tests;
mod vhost;

pub use device::{DEVICE_TYPE, Net};

use std::io;

/// Why the device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// There must be a tap queue for each pair, at least one.
    #[error("{0} tap queues, 1 to {max} can be used", max = device::MAX_PAIRS)]
    Taps(usize),
    /// There must be a vhost descriptor for each pair, or none at all.
    #[error("{vhost} vhost descriptors for {taps} tap queues")]
    Vhost {
        /// Tap queues.
        taps: usize,
        /// vhost descriptors.
        vhost: usize,
    },
    /// Less than IPv4 allows (virtio 1.2, 5.1.4.1).
    #[error("MTU {0} is below 68")]
    Mtu(u16),
    /// A tap refused.
    #[error("tap: {operation}")]
    Tap {
        /// What it refused.
        operation: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// vhost-net refused.
    #[error("vhost-net: {operation}")]
    VhostNet {
        /// What it refused.
        operation: &'static str,
        /// Why.
        #[source]
        source: ::vhost::Error,
    },
}
