//! One file or block device of the host as the bytes of a disk.
//!
//! Whoever opened it has said whether the host's page cache is to be in between
//! (open(2), O_DIRECT). Where it is not, the device reads and writes guest memory itself,
//! if that is aligned as the device wants it; Linux's buffers are. Others go through
//! memory of ours, piece by piece.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use rustix::fs::ioctl_blksszget;

use super::backing::{Extent, failed, file_position, fill, read_file};
use super::{BlockError, SECTOR_BYTES};
use crate::virtio::buffers::Buffers;

/// Sectors of nearly all disks, and of files that are none: the host reads and writes
/// those anywhere.
pub const USUAL_SECTOR_BYTES: u32 = 512;
/// Largest sectors there are, and how all memory of ours is aligned.
const MAX_SECTOR_BYTES: u32 = 4096;
const PIECE_BYTES: usize = 64 << 10;

/// Memory for reading and writing without the page cache.
#[derive(Clone)]
#[repr(align(4096))]
pub(super) struct Piece(pub(super) [u8; PIECE_BYTES]);

/// Zeroes in pieces, for the host that has no other way to make them, and for the guest.
pub(super) static ZEROES: Piece = Piece([0; PIECE_BYTES]);

/// See the module.
#[derive(Debug)]
pub struct Whole {
    file: File,
    sector_bytes: u32,
    flags: OFlag,
}

impl Whole {
    /// Examines a file.
    ///
    /// # Errors
    ///
    /// `File`; sectors of a size that no driver knows.
    pub fn open(file: File, what: &str) -> Result<Self, BlockError> {
        let sector_bytes = sector_bytes_of(&file).map_err(failed(what))?;
        Self::new(file, sector_bytes, what)
    }

    /// A file with sectors of a size.
    ///
    /// # Errors
    ///
    /// The same.
    pub fn new(file: File, sector_bytes: u32, what: &str) -> Result<Self, BlockError> {
        let known = u64::from(sector_bytes) >= SECTOR_BYTES && sector_bytes <= MAX_SECTOR_BYTES;
        if !known || !sector_bytes.is_power_of_two() {
            return Err(BlockError::Sectors {
                what: what.to_owned(),
                bytes: sector_bytes,
            });
        }
        let flags = fcntl(&file, FcntlArg::F_GETFL).map_err(|errno| failed(what)(errno.into()))?;
        Ok(Self {
            file,
            sector_bytes,
            flags: OFlag::from_bits_retain(flags),
        })
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Bytes of a logical sector.
    pub fn sector_bytes(&self) -> u32 {
        self.sector_bytes
    }

    /// Whether it is open for reading and writing.
    pub fn is_writable(&self) -> bool {
        self.flags & OFlag::O_ACCMODE == OFlag::O_RDWR
    }

    /// Reads `extent` into the first bytes of `to`.
    ///
    /// # Errors
    ///
    /// Those of preadv(2); `UnexpectedEof` if the file has become shorter.
    pub fn read(&self, to: &mut Buffers<'_>, extent: Extent) -> io::Result<()> {
        match read_file(&self.file, extent.start, to, 0, extent.len) {
            Err(error) if self.is_misaligned(&error) => self.read_by_piece(to, extent),
            result => result,
        }
    }

    /// Writes what `from` has from `offset` on to `extent`.
    ///
    /// # Errors
    ///
    /// Those of pwritev(2).
    pub fn write(&self, from: &mut Buffers<'_>, offset: usize, extent: Extent) -> io::Result<()> {
        match self.write_at_once(from, offset, extent) {
            Err(error) if self.is_misaligned(&error) => self.write_by_piece(from, offset, extent),
            result => result,
        }
    }

    /// Writes zeroes.
    ///
    /// # Errors
    ///
    /// Those of pwrite(2).
    pub fn write_zeroes(&self, extent: Extent) -> io::Result<()> {
        each_piece(extent, |position, _, len| {
            let zeroes = ZEROES.0.get(..len).unwrap_or(&ZEROES.0);
            self.file.write_all_at(zeroes, position)
        })
    }

    /// Whether memory may be why a call failed: then nothing of it was done, or it is
    /// done again.
    fn is_misaligned(&self, error: &io::Error) -> bool {
        let invalid = error.raw_os_error() == Some(Errno::EINVAL as i32);
        invalid && self.flags.contains(OFlag::O_DIRECT)
    }

    fn write_at_once(
        &self,
        from: &mut Buffers<'_>,
        offset: usize,
        extent: Extent,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < extent.len {
            let position = file_position(extent.start, done)?;
            match from.write_at(&self.file, position, offset + done, extent.len - done)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                count => done += count,
            }
        }
        Ok(())
    }

    fn read_by_piece(&self, to: &Buffers<'_>, extent: Extent) -> io::Result<()> {
        let mut piece = Box::new(ZEROES.clone());
        each_piece(extent, |position, done, len| {
            let bytes = piece.0.get_mut(..len).unwrap_or_default();
            self.file.read_exact_at(bytes, position)?;
            fill(to, done, bytes)
        })
    }

    fn write_by_piece(&self, from: &Buffers<'_>, offset: usize, extent: Extent) -> io::Result<()> {
        let mut piece = Box::new(ZEROES.clone());
        each_piece(extent, |position, done, len| {
            let bytes = piece.0.get_mut(..len).unwrap_or_default();
            if from.read(offset + done, bytes) < len {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.file.write_all_at(bytes, position)
        })
    }
}

fn sector_bytes_of(file: &File) -> io::Result<u32> {
    if file.metadata()?.file_type().is_block_device() {
        return Ok(ioctl_blksszget(file)?);
    }
    Ok(USUAL_SECTOR_BYTES)
}

/// Calls with the position on the disk, how many bytes are done, and how many to do.
fn each_piece(
    extent: Extent,
    mut call: impl FnMut(u64, usize, usize) -> io::Result<()>,
) -> io::Result<()> {
    let mut done = 0;
    while done < extent.len {
        let len = PIECE_BYTES.min(extent.len - done);
        call(extent.start + done as u64, done, len)?;
        done += len;
    }
    Ok(())
}
