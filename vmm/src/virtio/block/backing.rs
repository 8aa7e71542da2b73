//! The bytes of a disk: where they are on the host, and I/O on them.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::BlockError;
use super::gpt::Gpt;
use super::whole::{USUAL_SECTOR_BYTES, Whole, ZEROES};
use crate::virtio::buffers::Buffers;

/// What a disk is made of.
#[derive(Debug)]
pub enum Backing {
    /// One file or block device of whole sectors.
    Whole(File),
    /// Read-only files one after another, the first one the disk's first
    /// partition.
    Partitions(Vec<File>),
    /// Nothing: a disk of no sectors, until another takes its place.
    Empty,
}

/// Part of a disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub start: u64,
    /// Number of bytes.
    pub len: usize,
}

/// An opened disk, shared by its workers.
#[derive(Debug)]
pub struct Disk {
    size: u64,
    read_only: bool,
    content: Content,
}

#[derive(Debug)]
enum Content {
    File(Whole),
    /// In ascending order; all between them is zero.
    Pieces(Vec<Piece>),
}

#[derive(Debug)]
struct Piece {
    start: u64,
    len: u64,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Bytes(Vec<u8>),
    File(File),
}

impl Disk {
    /// Examines the files.
    ///
    /// # Errors
    ///
    /// A [`BlockError`] that says which file cannot be used.
    pub fn open(serial: &str, read_only: bool, backing: Backing) -> Result<Self, BlockError> {
        match backing {
            Backing::Whole(file) => {
                let what = "the disk's file";
                Self::whole(read_only, Whole::open(file, what)?, what)
            }
            Backing::Partitions(_) if !read_only => Err(BlockError::WritablePartitions),
            Backing::Partitions(files) => Self::partitions(serial, files),
            Backing::Empty => Ok(Self {
                size: 0,
                read_only,
                content: Content::Pieces(Vec::new()),
            }),
        }
    }

    pub(super) fn whole(read_only: bool, whole: Whole, what: &str) -> Result<Self, BlockError> {
        let size = length(whole.file(), what)?;
        if size == 0 || !size.is_multiple_of(whole.sector_bytes().into()) {
            return Err(BlockError::Size {
                what: what.to_owned(),
                bytes: size,
                sector_bytes: whole.sector_bytes(),
            });
        }
        if !read_only && !whole.is_writable() {
            return Err(BlockError::NotWritable(what.to_owned()));
        }
        Ok(Self {
            size,
            read_only,
            content: Content::File(whole),
        })
    }

    fn partitions(serial: &str, files: Vec<File>) -> Result<Self, BlockError> {
        let mut lens = Vec::with_capacity(files.len());
        for (index, file) in files.iter().enumerate() {
            let what = format!("the file of partition {}", index + 1);
            match length(file, &what)? {
                0 => return Err(BlockError::Empty(what)),
                len => lens.push(len),
            }
        }
        let gpt = Gpt::new(serial, &lens).ok_or(BlockError::Partitions(files.len()))?;
        let mut pieces = vec![Piece::bytes(0, gpt.head)];
        let places = gpt.starts.into_iter().zip(lens);
        pieces.extend(places.zip(files).map(|((start, len), file)| Piece {
            start,
            len,
            source: Source::File(file),
        }));
        pieces.push(Piece::bytes(gpt.tail_start, gpt.tail));
        Ok(Self {
            size: gpt.size,
            read_only: true,
            content: Content::Pieces(pieces),
        })
    }

    /// Size in bytes, a multiple of the sector's.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of a logical sector, of which reads and writes are made.
    pub fn sector_bytes(&self) -> u32 {
        match &self.content {
            Content::File(whole) => whole.sector_bytes(),
            Content::Pieces(_) => USUAL_SECTOR_BYTES,
        }
    }

    /// Whether nobody may write.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Reads `extent`, which is on the disk, into the first bytes of `to`.
    ///
    /// # Errors
    ///
    /// Those of preadv(2); `UnexpectedEof` if a file has become shorter.
    pub fn read(&self, to: &mut Buffers<'_>, extent: Extent) -> io::Result<()> {
        match &self.content {
            Content::File(whole) => whole.read(to, extent),
            Content::Pieces(pieces) => read_pieces(pieces, to, extent),
        }
    }

    /// Writes what `from` has from `offset` on to `extent`.
    ///
    /// # Errors
    ///
    /// Those of pwritev(2), or `PermissionDenied` if nobody may write.
    pub fn write(&self, from: &mut Buffers<'_>, offset: usize, extent: Extent) -> io::Result<()> {
        self.writable()?.write(from, offset, extent)
    }

    /// Makes what was written last.
    ///
    /// # Errors
    ///
    /// Those of fdatasync(2).
    pub fn flush(&self) -> io::Result<()> {
        match &self.content {
            Content::File(whole) if !self.read_only => whole.file().sync_data(),
            _ => Ok(()),
        }
    }

    /// Gives the host its space back. That is advice: a host that has no way to
    /// take it keeps the bytes.
    ///
    /// # Errors
    ///
    /// Those of fallocate(2).
    pub fn discard(&self, extent: Extent) -> io::Result<()> {
        match punch(self.writable()?.file(), extent) {
            Err(Errno::EOPNOTSUPP) => Ok(()),
            result => Ok(result?),
        }
    }

    /// Makes `extent` read as zeroes; with `unmap` its space may go.
    ///
    /// # Errors
    ///
    /// Those of fallocate(2) and pwrite(2).
    pub fn write_zeroes(&self, extent: Extent, unmap: bool) -> io::Result<()> {
        let whole = self.writable()?;
        let done = if unmap {
            punch(whole.file(), extent)
        } else {
            allocate(whole.file(), FallocateFlags::FALLOC_FL_ZERO_RANGE, extent)
        };
        match done {
            Err(Errno::EOPNOTSUPP) => whole.write_zeroes(extent),
            result => Ok(result?),
        }
    }

    fn writable(&self) -> io::Result<&Whole> {
        match &self.content {
            Content::File(whole) if !self.read_only => Ok(whole),
            _ => Err(io::ErrorKind::PermissionDenied.into()),
        }
    }
}

impl Piece {
    fn bytes(start: u64, bytes: Vec<u8>) -> Self {
        Self {
            start,
            len: bytes.len() as u64,
            source: Source::Bytes(bytes),
        }
    }

    /// Reads `len` bytes from byte `skip` of the piece on, all of them in it.
    fn read(&self, skip: u64, to: &mut Buffers<'_>, offset: usize, len: usize) -> io::Result<()> {
        match &self.source {
            Source::File(file) => read_file(file, skip, to, offset, len),
            Source::Bytes(bytes) => {
                let skip = usize::try_from(skip).map_err(|_| io::ErrorKind::InvalidInput)?;
                let part = bytes.get(skip..).and_then(|rest| rest.get(..len));
                fill(to, offset, part.ok_or(io::ErrorKind::UnexpectedEof)?)
            }
        }
    }
}

/// The size of a file, or of a block device, which has none in its inode.
fn length(mut file: &File, what: &str) -> Result<u64, BlockError> {
    file.seek(SeekFrom::End(0)).map_err(failed(what))
}

pub(super) fn failed(what: &str) -> impl FnOnce(io::Error) -> BlockError {
    move |source| BlockError::File {
        what: what.to_owned(),
        source,
    }
}

pub(super) fn file_position(start: u64, done: usize) -> io::Result<libc::off_t> {
    let position = start.checked_add(done as u64);
    position
        .and_then(|position| position.try_into().ok())
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

pub(super) fn read_file(
    file: &File,
    start: u64,
    to: &mut Buffers<'_>,
    offset: usize,
    len: usize,
) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        let position = file_position(start, done)?;
        match to.read_at(file, position, offset + done, len - done)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => done += count,
        }
    }
    Ok(())
}

fn read_pieces(pieces: &[Piece], to: &mut Buffers<'_>, extent: Extent) -> io::Result<()> {
    let mut done = 0;
    while done < extent.len {
        let position = extent.start + done as u64;
        let left = extent.len - done;
        let after = pieces.partition_point(|piece| piece.start <= position);
        let piece = after.checked_sub(1).and_then(|index| pieces.get(index));
        let within = piece.map(|piece| (piece, position - piece.start));
        let count = match within {
            Some((piece, skip)) if skip < piece.len => {
                let count = at_most(left, piece.len - skip);
                piece.read(skip, to, done, count)?;
                count
            }
            _ => {
                let next = pieces.get(after).map_or(u64::MAX, |piece| piece.start);
                let count = at_most(left, next - position).min(ZEROES.0.len());
                fill(to, done, ZEROES.0.get(..count).unwrap_or(&ZEROES.0))?;
                count
            }
        };
        done += count;
    }
    Ok(())
}

fn at_most(len: usize, limit: u64) -> usize {
    usize::try_from(limit).map_or(len, |limit| len.min(limit))
}

pub(super) fn fill(to: &Buffers<'_>, offset: usize, bytes: &[u8]) -> io::Result<()> {
    if to.write(offset, bytes) == bytes.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

fn punch(file: &File, extent: Extent) -> Result<(), Errno> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    allocate(file, flags, extent)
}

fn allocate(file: &File, flags: FallocateFlags, extent: Extent) -> Result<(), Errno> {
    let start = extent.start.try_into().map_err(|_| Errno::EINVAL)?;
    let len = extent.len.try_into().map_err(|_| Errno::EINVAL)?;
    fallocate(file, flags, start, len)
}
