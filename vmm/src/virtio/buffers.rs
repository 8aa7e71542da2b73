//! The buffers of descriptor chains, ready for vectored I/O.
//!
//! A device that moves bytes between a descriptor and the guest does so without
//! a copy of its own: [`Buffers`] gathers what a chain points at, checks that
//! all of it is guest memory, and hands it to readv(2) and writev(2). It is made
//! for reuse, one per thread, so that a packet costs no allocation.
//!
//! The framing of messages is the driver's affair (virtio 1.2, 2.7.4): nothing
//! here depends on how many descriptors a header or its data are spread over.

use std::io;
use std::os::fd::AsRawFd;

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::GuestMemory;

/// Most pieces one set of buffers may have, the kernel's `UIO_MAXIOV`.
pub const MAX_PIECES: usize = 1024;

/// Why a chain cannot be used. All of them are the driver's fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BufferError {
    /// A descriptor points outside guest memory.
    #[error("descriptor at {address:#x} with {len} bytes is not in guest memory")]
    Address {
        /// Guest physical address.
        address: u64,
        /// Length in bytes.
        len: u32,
    },
    /// More pieces than one system call takes.
    #[error("more than {MAX_PIECES} pieces")]
    TooManyPieces,
}

/// Which descriptors of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Those the device reads.
    FromGuest,
    /// Those the device writes.
    ToGuest,
}

/// Pieces of guest memory in the order of their descriptors.
#[derive(Default)]
pub struct Buffers<'m> {
    pieces: Vec<VolatileSlice<'m>>,
    len: usize,
    iovecs: Vec<libc::iovec>,
}

impl<'m> Buffers<'m> {
    /// Forgets all pieces.
    pub fn clear(&mut self) {
        self.pieces.clear();
        self.len = 0;
    }

    /// Bytes in all pieces.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is not a byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends the chain's descriptors of one direction and returns how many
    /// bytes they have.
    ///
    /// # Errors
    ///
    /// A [`BufferError`]; what was appended before is still there, nothing of
    /// this chain is.
    pub fn append(
        &mut self,
        memory: &'m GuestMemory,
        chain: DescriptorChain<&'m GuestMemory>,
        direction: Direction,
    ) -> Result<usize, BufferError> {
        let (pieces, before) = (self.pieces.len(), self.len);
        for descriptor in chain {
            if descriptor.is_write_only() != (direction == Direction::ToGuest) {
                continue;
            }
            if let Err(error) = self.push(memory, descriptor.addr(), descriptor.len()) {
                self.truncate(pieces);
                return Err(error);
            }
        }
        Ok(self.len - before)
    }

    fn push(
        &mut self,
        memory: &'m GuestMemory,
        address: GuestAddress,
        len: u32,
    ) -> Result<(), BufferError> {
        let outside = BufferError::Address {
            address: address.0,
            len,
        };
        let count = usize::try_from(len).map_err(|_| outside)?;
        for piece in memory.get_slices(address, count) {
            if self.pieces.len() == MAX_PIECES {
                return Err(BufferError::TooManyPieces);
            }
            let piece = piece.map_err(|_| outside)?;
            self.len += piece.len();
            self.pieces.push(piece);
        }
        Ok(())
    }

    /// How many pieces there are.
    #[must_use]
    pub fn pieces(&self) -> usize {
        self.pieces.len()
    }

    /// Forgets the first `count` pieces.
    pub fn discard(&mut self, count: usize) {
        let gone = self.pieces.drain(..count.min(self.pieces.len()));
        self.len -= gone.map(|piece| piece.len()).sum::<usize>();
    }

    /// Forgets all but the first `count` pieces.
    pub fn truncate(&mut self, count: usize) {
        let gone = self.pieces.drain(count.min(self.pieces.len())..);
        self.len -= gone.map(|piece| piece.len()).sum::<usize>();
    }

    /// The first `len` bytes as buffers of their own.
    #[must_use]
    pub fn prefix(&self, len: usize) -> Self {
        let pieces: Vec<_> = Window::new(&self.pieces, 0, len).collect();
        Self {
            len: pieces.iter().map(VolatileSlice::len).sum(),
            pieces,
            iovecs: Vec::new(),
        }
    }

    /// Copies the bytes from `offset` into `bytes`; how many there were.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in Window::new(&self.pieces, offset, bytes.len()) {
            let Some(rest) = bytes.get_mut(done..) else {
                break;
            };
            done += piece.copy_to(rest);
        }
        done
    }

    /// Copies `bytes` to `offset`; how many there was room for.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> usize {
        let mut done = 0;
        for piece in Window::new(&self.pieces, offset, bytes.len()) {
            let rest = bytes.get(done..).unwrap_or_default();
            // A piece of the window is never longer than what is left.
            let Ok(()) = piece.write_slice(rest.get(..piece.len()).unwrap_or(rest), 0) else {
                break;
            };
            done += piece.len();
        }
        done
    }

    /// readv(2) from `source` into at most `len` bytes from `offset` on.
    ///
    /// # Errors
    ///
    /// Those of readv(2), `Interrupted` excepted.
    pub fn read_from(
        &mut self,
        source: &impl AsRawFd,
        offset: usize,
        len: usize,
    ) -> io::Result<usize> {
        let count = self.fill_iovecs(offset, len);
        retry(|| {
            // SAFETY: each iovec lies in a VolatileSlice, which keeps its
            // mapping alive for 'm, and is written by the kernel only. Guest
            // memory is never referenced as a Rust slice, so that the guest
            // writing it meanwhile breaks no aliasing rule.
            unsafe { libc::readv(source.as_raw_fd(), self.iovecs.as_ptr(), count) }
        })
    }

    /// writev(2) of at most `len` bytes from `offset` on to `sink`.
    ///
    /// # Errors
    ///
    /// Those of writev(2), `Interrupted` excepted. `EPIPE` comes without its
    /// signal only where `SIGPIPE` is ignored, as in every Rust program.
    pub fn write_to(
        &mut self,
        sink: &impl AsRawFd,
        offset: usize,
        len: usize,
    ) -> io::Result<usize> {
        let count = self.fill_iovecs(offset, len);
        retry(|| {
            // SAFETY: as in `read_from`; the kernel only reads.
            unsafe { libc::writev(sink.as_raw_fd(), self.iovecs.as_ptr(), count) }
        })
    }

    /// preadv(2) from byte `position` of `source` into at most `len` bytes from
    /// `offset` on.
    ///
    /// # Errors
    ///
    /// Those of preadv(2), `Interrupted` excepted.
    pub fn read_at(
        &mut self,
        source: &impl AsRawFd,
        position: libc::off_t,
        offset: usize,
        len: usize,
    ) -> io::Result<usize> {
        let count = self.fill_iovecs(offset, len);
        retry(|| {
            // SAFETY: as in `read_from`.
            unsafe { libc::preadv(source.as_raw_fd(), self.iovecs.as_ptr(), count, position) }
        })
    }

    /// pwritev(2) of at most `len` bytes from `offset` on to byte `position` of
    /// `sink`.
    ///
    /// # Errors
    ///
    /// Those of pwritev(2), `Interrupted` excepted.
    pub fn write_at(
        &mut self,
        sink: &impl AsRawFd,
        position: libc::off_t,
        offset: usize,
        len: usize,
    ) -> io::Result<usize> {
        let count = self.fill_iovecs(offset, len);
        retry(|| {
            // SAFETY: as in `read_from`; the kernel only reads.
            unsafe { libc::pwritev(sink.as_raw_fd(), self.iovecs.as_ptr(), count, position) }
        })
    }

    fn fill_iovecs(&mut self, offset: usize, len: usize) -> libc::c_int {
        self.iovecs.clear();
        let window = Window::new(&self.pieces, offset, len);
        self.iovecs.extend(window.map(|piece| libc::iovec {
            iov_base: piece.ptr_guard_mut().as_ptr().cast(),
            iov_len: piece.len(),
        }));
        // At most MAX_PIECES.
        libc::c_int::try_from(self.iovecs.len()).unwrap_or(0)
    }
}

/// The parts of pieces that make up `len` bytes from `offset` on.
struct Window<'p, 'm> {
    pieces: std::slice::Iter<'p, VolatileSlice<'m>>,
    skip: usize,
    left: usize,
}

impl<'p, 'm> Window<'p, 'm> {
    fn new(pieces: &'p [VolatileSlice<'m>], offset: usize, len: usize) -> Self {
        Self {
            pieces: pieces.iter(),
            skip: offset,
            left: len,
        }
    }
}

impl<'m> Iterator for Window<'_, 'm> {
    type Item = VolatileSlice<'m>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.left > 0 {
            let piece = self.pieces.next()?;
            if self.skip >= piece.len() {
                self.skip -= piece.len();
                continue;
            }
            let count = self.left.min(piece.len() - self.skip);
            let part = piece.subslice(self.skip, count).ok()?;
            self.skip = 0;
            self.left -= count;
            return Some(part);
        }
        None
    }
}

fn retry(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        if let Ok(count) = usize::try_from(call()) {
            return Ok(count);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use virtio_queue::QueueOwnedT;

    use crate::virtio::driver::{Driver, memory};

    #[test]
    fn bytes_go_through_scattered_pieces_both_ways() {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 16);
        let mut queue = driver.queue();
        driver.add(&[
            (0x2_0000, 3, true),
            (0x2_1000, 0, true),
            (0x2_2000, 5, true),
        ]);
        let chain = queue.iter(&memory).unwrap().next().unwrap();
        let mut buffers = Buffers::default();
        assert_eq!(buffers.append(&memory, chain, Direction::ToGuest), Ok(8));
        let (near, mut far) = UnixStream::pair().unwrap();

        far.write_all(b"abcdefgh").unwrap();
        assert_eq!(buffers.read_from(&near, 2, 100).unwrap(), 6);
        assert_eq!(buffers.write(0, b"XY"), 2);
        let mut read = [0; 9];
        assert_eq!(buffers.read(0, &mut read), 8);
        assert_eq!(&read, b"XYabcdef\0");
        assert_eq!(buffers.write_to(&near, 1, 4).unwrap(), 4);
        let mut sent = [0; 4];
        far.read_exact(&mut sent).unwrap();
        assert_eq!(&sent, b"Yabc");

        buffers.discard(1);
        assert_eq!((buffers.pieces(), buffers.len()), (1, 5));
        assert_eq!(buffers.read(0, &mut read), 5);
        assert_eq!(&read[..5], b"bcdef");
    }

    #[test]
    fn chain_outside_memory_leaves_nothing_behind() {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 16);
        let mut queue = driver.queue();
        driver.add(&[(0x2_0000, 3, true), (0xffff_ffff_ffff_fff0, 0x20, true)]);
        let chain = queue.iter(&memory).unwrap().next().unwrap();
        let mut buffers = Buffers::default();
        assert!(matches!(
            buffers.append(&memory, chain, Direction::ToGuest),
            Err(BufferError::Address { .. })
        ));
        assert!(buffers.is_empty());
    }
}
