//! Messages of the CRI, `runtime.v1` of Kubernetes: those fields that the tests
//! use, with the numbers they have on the wire. What is missing here is skipped
//! when read and has its default when sent.
//!
//! They are written down rather than generated, because a generator would take
//! protoc, and the whole of the interface with it.

mod container;
mod pod;
mod stats;

pub use container::*;
pub use pod::*;
pub use stats::*;
