//! virtio-vsock (virtio 1.2, 5.10): stream connections between the guest and
//! the shim, and nothing else.
//!
//! There is no socket file and no text protocol. The host's side of every
//! connection is a unix stream socket whose other end the shim holds:
//!
//! ```text
//!   shim                 monitor                              guest
//!    |  Connect{port}+fd   |  Dialer::connect                   |
//!    |-------------------->|------------ REQUEST -------------->| listens on port
//!    |                     |                                    |
//!    |  Dialed{port}+fd    |  `dialed` callback                 |
//!    |<--------------------|<----------- REQUEST ---------------| (CID 2, AGENT_PORT) only
//! ```
//!
//! # A connection
//!
//! ```text
//!   Dialer::connect            guest's REQUEST
//!        |                          |
//!        v                          v
//!   +------------+  RESPONSE   +-------------+  RST, data held   +----------+
//!   | Connecting |------------>| Established |------------------>| Draining |
//!   +------------+             +-------------+                   +----------+
//!        | RST                      |  both directions over,          |
//!        v                          v  RST, or host closed            v all written
//!      gone                       gone                              gone
//! ```
//!
//! Each direction ends on its own:
//!
//! | what happens | what we do |
//! |---|---|
//! | host's socket reads its end | all data, then SHUTDOWN(send) |
//! | host's socket is closed | all its data, then SHUTDOWN(both), and forget |
//! | guest's SHUTDOWN(send) | write all held data, then shutdown(2) for writing |
//! | guest's SHUTDOWN(receive) | shutdown(2) for reading: the host gets `EPIPE` |
//! | both directions over | RST, and close the socket |
//!
//! # Who may hold up whom
//!
//! The thread never blocks. Data the host's socket does not take are held, at
//! most [`credit::BUF_ALLOC`] bytes a connection by the guest's credit; data
//! without credit or without receive buffers stay in the socket. Connections
//! with something to send take turns, a packet each. If the guest provokes
//! resets without receiving them, we stop reading its packets.

pub mod connection;
pub mod credit;
mod device;
mod muxer;
pub mod packet;
#[cfg(test)]
mod tests;

pub use device::{Dialer, Vsock};

use std::io;

/// Why the device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The CID is one of the reserved ones or exceeds 32 bits (virtio 1.2,
    /// 5.10.4).
    #[error("{0} cannot be a guest's CID")]
    GuestCid(u64),
    /// No event descriptor.
    #[error("event descriptor")]
    Event(#[source] io::Error),
}
