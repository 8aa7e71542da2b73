//! Copies a file into guest memory without touching it in this process.
//!
//! Guest memory is a memfd. read(2) into its mapping has the kernel zero each
//! page, map it here and then overwrite it; sendfile(2) between the two files
//! copies straight into new pages. For a kernel and an initramfs that is half of
//! the work.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use nix::sys::sendfile::sendfile;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{
    FileOffset, GuestMemoryBackend, GuestMemoryRegion, ReadVolatile, VolatileMemoryError,
    VolatileSlice,
};

use crate::virtio::GuestMemory;

/// A file to load, as linux-loader and vm-memory want it.
pub struct Image<'a> {
    file: &'a mut File,
    memory: &'a GuestMemory,
}

impl<'a> Image<'a> {
    /// `file`, for loading into `memory`.
    pub fn new(file: &'a mut File, memory: &'a GuestMemory) -> Self {
        Self { file, memory }
    }

    /// Where in the memory's file `address` of this process is.
    fn place(&self, address: usize) -> Option<(&File, u64)> {
        self.memory.iter().find_map(|region| {
            let offset = address.checked_sub(region.as_ptr().addr())? as u64;
            let file = region.file_offset().filter(|_| offset < region.len())?;
            Some((FileOffset::file(file), file.start() + offset))
        })
    }

    fn send(&mut self, address: usize, len: usize) -> io::Result<usize> {
        let (mut to, position) = self.place(address).ok_or(io::ErrorKind::Unsupported)?;
        to.seek(SeekFrom::Start(position))?;
        Ok(sendfile(to, &*self.file, None, len)?)
    }
}

impl Read for Image<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read(buffer)
    }
}

impl Seek for Image<'_> {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        self.file.seek(position)
    }
}

impl ReadVolatile for Image<'_> {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buffer: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        match self.send(buffer.ptr_guard_mut().as_ptr().addr(), buffer.len()) {
            // Huge pages are a file that cannot be written.
            Err(_) => self.file.read_volatile(buffer),
            Ok(sent) => Ok(sent),
        }
    }
}
