//! The logical sectors of the host's block devices (Linux include/uapi/linux/fs.h).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;

use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_io_nr;

ioctl_io_nr!(BLKSSZGET, 0x12, 104);

/// What nearly all disks have.
pub const USUAL_BYTES: u32 = 512;

/// Bytes of a sector of a block device; of other files [`USUAL_BYTES`], for the host
/// reads and writes them anywhere.
///
/// # Errors
///
/// Those of fstat(2) and of the ioctl.
pub fn bytes_of(file: &File) -> io::Result<u32> {
    if !file.metadata()?.file_type().is_block_device() {
        return Ok(USUAL_BYTES);
    }
    let mut bytes: libc::c_int = 0;
    // SAFETY: the kernel writes an int, which `bytes` is.
    if unsafe { ioctl_with_mut_ref(file, BLKSSZGET(), &mut bytes) } < 0 {
        return Err(io::Error::last_os_error());
    }
    u32::try_from(bytes).map_err(io::Error::other)
}
