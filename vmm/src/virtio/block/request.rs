//! What the driver asks for (virtio 1.2, 5.2.6).
//!
//! ```text
//!   read by the device:    type (4) | reserved (4) | sector (8) | data or ranges
//!   written by the device: data or serial number | status (1)
//! ```
//!
//! A [`Chain`] is looked at once, what must be believed twice is copied, and a
//! [`Request`] only has what lies on the disk; acting on it comes after.

use virtio_bindings::virtio_blk as spec;

use super::SECTOR_BYTES;
use super::backing::{Disk, Extent};
use super::device::MAX_SEGMENTS;
use crate::virtio::buffers::Buffers;

/// Bytes in front of the data.
pub const HEADER_BYTES: usize = 16;
/// Bytes of a serial number, filled up with zeroes.
pub const SERIAL_BYTES: usize = spec::VIRTIO_BLK_ID_BYTES as usize;
/// Most bytes of a data buffer: Linux's default for devices that say nothing
/// (`BLK_MAX_SEGMENT_SIZE`).
pub const MAX_SEGMENT_BYTES: u32 = 64 << 10;
/// Most bytes of a request; drivers that keep to the limits want no more. The host's device
/// may do it one small piece after another, and until it has done all of it the disk cannot
/// be taken from the guest.
const MAX_DATA_BYTES: u64 = MAX_SEGMENTS as u64 * MAX_SEGMENT_BYTES as u64;
/// Most ranges of a discard,
pub const MAX_DISCARD_RANGES: u32 = 32;
/// and of a write-zeroes request.
pub const MAX_ZEROES_RANGES: u32 = 1;
/// Most sectors of a discarded range: 1 GiB.
pub const MAX_DISCARD_SECTORS: u32 = 2 << 20;
/// Most sectors of a zeroed range: 16 MiB, because the host may have to write
/// them one by one.
pub const MAX_ZEROES_SECTORS: u32 = 32 << 10;
/// `struct virtio_blk_discard_write_zeroes`.
const RANGE_BYTES: usize = 16;

/// The last byte of a request's buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// The device or the driver failed.
    IoError = 1,
    /// The device cannot do this.
    Unsupported = 2,
}

/// Why a request is refused. All of them are the driver's fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// No room for a header.
    #[error("header of {0} bytes")]
    Header(usize),
    /// Not the buffers such a request has.
    #[error("request of type {kind} with {from} bytes to read and {to} to write")]
    Shape {
        /// The request's type.
        kind: u32,
        /// Bytes from the guest after the header.
        from: usize,
        /// Bytes for the guest before the status.
        to: usize,
    },
    /// Beyond the disk's end.
    #[error("{len} bytes from sector {sector} on are not on the disk")]
    Place {
        /// First sector.
        sector: u64,
        /// Number of bytes.
        len: u64,
    },
    /// The disk can only be read.
    #[error("write to a read-only disk")]
    ReadOnly,
    /// A range is empty or longer than allowed.
    #[error("range of {0} sectors")]
    RangeSize(u32),
    /// Flags that mean nothing here.
    #[error("range flags {0:#x}")]
    Flags(u32),
    /// A type the device has not heard of.
    #[error("request of type {0}")]
    Unknown(u32),
}

impl RequestError {
    /// What the driver is told.
    pub fn status(self) -> Status {
        match self {
            Self::Unknown(_) | Self::Flags(_) => Status::Unsupported,
            _ => Status::IoError,
        }
    }
}

/// A request that can be carried out.
#[derive(Debug, PartialEq, Eq)]
pub enum Request {
    /// Disk to guest.
    Read(Extent),
    /// Guest to disk, the data after the header.
    Write(Extent),
    /// Make writes last.
    Flush,
    /// These bytes are not needed any more.
    Discard(Vec<Extent>),
    /// These bytes become zero; true: their space may go.
    WriteZeroes(Vec<(Extent, bool)>),
}

/// A request as the driver wrote it. Its header has been read.
pub struct Chain<'b, 'm> {
    kind: u32,
    sector: u64,
    from: &'b Buffers<'m>,
    from_len: usize,
    to_len: usize,
}

impl<'b, 'm> Chain<'b, 'm> {
    /// Reads the header. `to` has room for the status at least.
    ///
    /// # Errors
    ///
    /// `Header`.
    pub fn read(from: &'b Buffers<'m>, to: &Buffers<'_>) -> Result<Self, RequestError> {
        let mut header = [0; HEADER_BYTES];
        let have = from.read(0, &mut header);
        if have < HEADER_BYTES {
            return Err(RequestError::Header(have));
        }
        let (kind, _reserved, sector) = fields(header);
        Ok(Self {
            kind,
            sector,
            from,
            from_len: from.len() - HEADER_BYTES,
            to_len: to.len().saturating_sub(1),
        })
    }

    /// Whether the serial number is asked for, which takes no disk.
    ///
    /// # Errors
    ///
    /// `Shape`.
    pub fn asks_for_serial(&self) -> Result<bool, RequestError> {
        if self.kind != spec::VIRTIO_BLK_T_GET_ID {
            return Ok(false);
        }
        self.check(self.from_len == 0 && self.to_len >= SERIAL_BYTES)?;
        Ok(true)
    }

    /// What is asked of `disk`.
    ///
    /// # Errors
    ///
    /// A [`RequestError`], for which the disk was not touched.
    pub fn request(&self, disk: &Disk) -> Result<Request, RequestError> {
        match self.kind {
            spec::VIRTIO_BLK_T_IN => {
                self.check(self.from_len == 0 && is_data(self.to_len))?;
                Ok(Request::Read(place(disk, self.sector, self.to_len)?))
            }
            spec::VIRTIO_BLK_T_OUT => {
                check_writable(disk)?;
                self.check(self.to_len == 0 && is_data(self.from_len))?;
                Ok(Request::Write(place(disk, self.sector, self.from_len)?))
            }
            spec::VIRTIO_BLK_T_FLUSH => Ok(Request::Flush),
            spec::VIRTIO_BLK_T_DISCARD => {
                let ranges = self.ranges(disk, MAX_DISCARD_RANGES, MAX_DISCARD_SECTORS, 0)?;
                let extents = ranges.into_iter().map(|(extent, _)| extent);
                Ok(Request::Discard(extents.collect()))
            }
            spec::VIRTIO_BLK_T_WRITE_ZEROES => {
                let unmap = spec::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
                let ranges = self.ranges(disk, MAX_ZEROES_RANGES, MAX_ZEROES_SECTORS, unmap)?;
                Ok(Request::WriteZeroes(ranges))
            }
            kind => Err(RequestError::Unknown(kind)),
        }
    }

    fn check(&self, shape: bool) -> Result<(), RequestError> {
        if shape {
            return Ok(());
        }
        Err(RequestError::Shape {
            kind: self.kind,
            from: self.from_len,
            to: self.to_len,
        })
    }

    /// The ranges of a discard or write-zeroes request, and whether a flag of
    /// those allowed is set.
    fn ranges(
        &self,
        disk: &Disk,
        max_ranges: u32,
        max_sectors: u32,
        allowed: u32,
    ) -> Result<Vec<(Extent, bool)>, RequestError> {
        check_writable(disk)?;
        let count = self.from_len / RANGE_BYTES;
        let whole = self.from_len.is_multiple_of(RANGE_BYTES);
        let fits = (1..=u64::from(max_ranges)).contains(&(count as u64));
        self.check(self.to_len == 0 && whole && fits)?;
        (0..count)
            .map(|index| {
                let mut bytes = [0; RANGE_BYTES];
                self.from
                    .read(HEADER_BYTES + index * RANGE_BYTES, &mut bytes);
                range(disk, bytes, max_sectors, allowed)
            })
            .collect()
    }
}

fn check_writable(disk: &Disk) -> Result<(), RequestError> {
    if disk.read_only() {
        return Err(RequestError::ReadOnly);
    }
    Ok(())
}

fn place(disk: &Disk, sector: u64, len: usize) -> Result<Extent, RequestError> {
    let start = sector.checked_mul(SECTOR_BYTES);
    let end = start.and_then(|start| start.checked_add(len as u64));
    match (start, end) {
        (Some(start), Some(end)) if end <= disk.size() => Ok(Extent { start, len }),
        _ => Err(RequestError::Place {
            sector,
            len: len as u64,
        }),
    }
}

fn range(
    disk: &Disk,
    bytes: [u8; RANGE_BYTES],
    max_sectors: u32,
    allowed: u32,
) -> Result<(Extent, bool), RequestError> {
    let value = u128::from_le_bytes(bytes);
    // Sector (8), number of sectors (4), flags (4); the casts cut them out.
    #[allow(clippy::cast_possible_truncation)]
    let (sector, sectors, flags) = (value as u64, (value >> 64) as u32, (value >> 96) as u32);
    if flags & !allowed != 0 {
        return Err(RequestError::Flags(flags));
    }
    if !(1..=max_sectors).contains(&sectors) {
        return Err(RequestError::RangeSize(sectors));
    }
    let len = u64::from(sectors) * SECTOR_BYTES;
    let len = usize::try_from(len).map_err(|_| RequestError::RangeSize(sectors))?;
    Ok((place(disk, sector, len)?, flags != 0))
}

/// Type, reserved, sector.
fn fields(header: [u8; HEADER_BYTES]) -> (u32, u32, u64) {
    let value = u128::from_le_bytes(header);
    // The casts cut the fields out.
    #[allow(clippy::cast_possible_truncation)]
    let fields = (value as u32, (value >> 32) as u32, (value >> 64) as u64);
    fields
}

/// Whether so many bytes can be read or written at once.
fn is_data(len: usize) -> bool {
    let len = len as u64;
    (1..=MAX_DATA_BYTES).contains(&len) && len.is_multiple_of(SECTOR_BYTES)
}
