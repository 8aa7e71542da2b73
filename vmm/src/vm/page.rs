//! A page of ours that the guest may read without an exit.

use std::io;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, Ordering};

/// Bytes in a page.
pub const PAGE_SIZE: usize = 4096;

/// One anonymous page, zero at first.
pub struct Page(NonNull<AtomicU8>);

// SAFETY: the page is plain memory, unmapped only on drop, and all access from
// this process is atomic.
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

impl Page {
    /// Allocates the page.
    ///
    /// # Errors
    ///
    /// When there is no memory.
    pub fn new() -> io::Result<Self> {
        // SAFETY: a new anonymous mapping; nothing else is touched.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                PAGE_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(address.cast())
            .map(Self)
            .ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    /// Its address in this process.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.0.as_ptr().addr() as u64
    }

    /// Shows `bytes` at the start of the page. A guest that reads meanwhile sees
    /// the old or the new value of each byte.
    pub fn show(&self, bytes: &[u8]) {
        // SAFETY: the mapping is PAGE_SIZE bytes long and lives as long as `self`;
        // AtomicU8 has the layout of a byte.
        let page = unsafe { std::slice::from_raw_parts(self.0.as_ptr(), PAGE_SIZE) };
        for (shown, byte) in page.iter().zip(bytes) {
            shown.store(*byte, Ordering::Relaxed);
        }
    }

    /// What the page shows.
    #[cfg(test)]
    pub fn bytes(&self) -> Vec<u8> {
        // SAFETY: as in `show`.
        let page = unsafe { std::slice::from_raw_parts(self.0.as_ptr(), PAGE_SIZE) };
        let bytes = page.iter().map(|byte| byte.load(Ordering::Relaxed));
        bytes.collect()
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nobody can reach any more.
        unsafe { libc::munmap(self.0.as_ptr().cast(), PAGE_SIZE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_is_zero_and_shows_what_it_is_told() {
        let page = Page::new().unwrap();
        page.show(&[1, 2, 3]);
        let bytes = page.bytes();
        assert_eq!(bytes[..4], [1, 2, 3, 0]);
        assert!(bytes[4..].iter().all(|byte| *byte == 0));
    }
}
