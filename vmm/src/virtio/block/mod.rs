//! virtio-blk (virtio 1.2, 5.2): disks whose bytes are the host's files.
//!
//! ```text
//!   guest driver --queue n--> worker thread n --request.rs: whole chain checked--> Disk
//!                                   |                                               |
//!                                   +--- preadv/pwritev between guest memory and ---+
//!                                        one file, or the files of made-up partitions
//! ```
//!
//! All I/O names its position, so that the workers of a disk share its files
//! without a lock. A worker has one request under way at a time and ends between
//! two of them: when [`Block`]'s reset returns, every request that was begun has
//! been answered and nothing touches guest memory any more.
//!
//! A disk is one file or block device, or read-only files that become the
//! partitions of a GPT nobody has to store ([`gpt`]). One that has no bytes yet gets
//! some while the machine runs ([`Exchanger`]): its size changes, and the driver is
//! told (virtio 1.2, 5.2.4: the configuration change notification).

mod backing;
mod device;
mod gpt;
mod request;
#[cfg(test)]
mod tests;
mod whole;
mod worker;

pub use backing::Backing;
pub use device::{Block, Exchanger};

use std::io;

/// What positions and sizes count in, whatever sectors the disk has (virtio 1.2, 5.2.4).
const SECTOR_BYTES: u64 = 512;

/// Why a disk cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The serial number does not fit (virtio 1.2, 5.2.6).
    #[error("serial number {0:?} is longer than {max} bytes", max = request::SERIAL_BYTES)]
    Serial(String),
    /// Each queue is a thread.
    #[error("{0} queues, 1 to {max} can be used", max = device::MAX_QUEUES)]
    Queues(u16),
    /// A file cannot be examined. Partitions count from 1.
    #[error("{what}: {source}")]
    File {
        /// Which file of the disk.
        what: String,
        /// The system's reason.
        source: io::Error,
    },
    /// No disk of whole sectors.
    #[error("{what} has {bytes} bytes, not a positive multiple of {sector_bytes}")]
    Size {
        /// Which file of the disk.
        what: String,
        /// Its size.
        bytes: u64,
        /// That of its sectors.
        sector_bytes: u32,
    },
    /// Drivers know no such sectors.
    #[error("{what} has sectors of {bytes} bytes, not 512, 1024, 2048 or 4096")]
    Sectors {
        /// Which file of the disk.
        what: String,
        /// The size.
        bytes: u32,
    },
    /// A partition of nothing.
    #[error("{0} is empty")]
    Empty(String),
    /// The guest is to write what was opened for reading only.
    #[error("{0} is not open for reading and writing")]
    NotWritable(String),
    /// Partitions are shared between pods, so nobody writes them.
    #[error("a disk of partitions can only be read-only")]
    WritablePartitions,
    /// More partitions than the table has room for, none, or ones too large.
    #[error("{0} partitions cannot be laid out, 1 to {max} can", max = nacre_protocol::vm::MAX_PARTITIONS)]
    Partitions(usize),
}
