//! The guest kernel's last words. When Linux panics, powers off or restarts, its ramoops
//! driver (`Documentation/admin-guide/ramoops.rst`) copies the end of the kernel log to a
//! region the command line names; once the machine stands still they are read from
//! there. Until then it costs the guest nothing.

use vm_memory::{Bytes, GuestAddress};

use crate::layout;
use crate::virtio::GuestMemory;

/// `PERSISTENT_RAM_SIG`, at the start of a region in use (Linux
/// `fs/pstore/ram_core.c`).
const SIGNATURE: u32 = 0x4347_4244;
/// Signature, start and size, four bytes each.
const HEADER_BYTES: usize = 12;
/// What is passed on.
const MAX_LINES: usize = 200;
const MAX_LINE_CHARS: usize = 240;

/// `KMSG_DUMP_SHUTDOWN`, the last of the kernel's reasons (`include/linux/kmsg_dump.h`): an
/// end that it was asked for. A panic ends in a restart, whose record replaces the panic's
/// and has the same log.
const LAST_REASON: u32 = 4;

/// What the kernel must be told: one record, of any end, in normal memory.
#[must_use]
pub fn parameters() -> String {
    let (address, size) = (layout::PSTORE, layout::PSTORE_SIZE);
    format!(
        "ramoops.mem_address={address:#x} ramoops.mem_size={size:#x} ramoops.mem_type=2 \
         ramoops.record_size={size:#x} ramoops.console_size=0 ramoops.ftrace_size=0 \
         ramoops.pmsg_size=0 ramoops.max_reason={LAST_REASON}"
    )
}

/// The last lines of the log of a kernel that has ended; none if it did not get to write
/// them. They are the guest's word: printable, but of any content.
#[must_use]
pub fn last_words(memory: &GuestMemory) -> Vec<String> {
    let mut region = vec![0; usize::try_from(layout::PSTORE_SIZE).unwrap_or(0)];
    if let Err(error) = memory.read_slice(&mut region, GuestAddress(layout::PSTORE)) {
        tracing::warn!(%error, "the guest's last words cannot be read");
        return Vec::new();
    }
    parse(&region)
}

fn parse(region: &[u8]) -> Vec<String> {
    let Some((header, data)) = region.split_at_checked(HEADER_BYTES) else {
        return Vec::new();
    };
    let word = |index: usize| -> Option<u32> {
        let bytes = header.get(index * 4..index * 4 + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    };
    let (Some(SIGNATURE), Some(size)) = (word(0), word(2)) else {
        return Vec::new();
    };
    let used = usize::try_from(size).unwrap_or(usize::MAX).min(data.len());
    let text = String::from_utf8_lossy(data.get(..used).unwrap_or_default());
    // Before the log come a line of ramoops (time and kind) and one of pstore
    // (reason and part).
    let lines: Vec<String> = text.lines().skip(2).map(printable).collect();
    let first = lines.len().saturating_sub(MAX_LINES);
    lines.into_iter().skip(first).collect()
}

/// A line of the log without its level, "<4>".
fn printable(line: &str) -> String {
    let message = line
        .strip_prefix('<')
        .and_then(|rest| rest.split_once('>'))
        .map_or(line, |(_, message)| message);
    message
        .chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .take(MAX_LINE_CHARS)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    fn region(signature: u32, size: usize, text: &str) -> Vec<u8> {
        let mut region = Vec::new();
        region.extend(signature.to_le_bytes());
        region.extend(u32::try_from(size).unwrap().to_le_bytes());
        region.extend(u32::try_from(size).unwrap().to_le_bytes());
        region.extend(text.as_bytes());
        region
    }

    #[test]
    fn end_of_the_log_is_read_from_guest_memory() {
        let memory = memory::allocate(32, false).unwrap();
        assert_eq!(last_words(&memory), [""; 0], "nothing has ended");
        let text =
            "====12.000034-D\nPanic#1 Part1\n<6>[ 1.0] up\n<0>[ 2.5] Kernel panic: \x1b[31mred\n";
        let record = region(SIGNATURE, text.len(), text);
        let address = GuestAddress(layout::PSTORE);
        memory.write_slice(&record, address).unwrap();
        let words = last_words(&memory);
        assert_eq!(words, ["[ 1.0] up", "[ 2.5] Kernel panic: ?[31mred"]);
    }

    #[test]
    fn whatever_the_guest_wrote_is_bounded() {
        let text = "a line\n".repeat(1000);
        assert_eq!(
            parse(&region(SIGNATURE, text.len(), &text)).len(),
            MAX_LINES
        );
        assert_eq!(parse(&region(SIGNATURE, 1 << 31, &text)).len(), MAX_LINES);
        let long = format!("\n\n{}", "x".repeat(5000));
        assert_eq!(
            parse(&region(SIGNATURE, long.len(), &long))[0].len(),
            MAX_LINE_CHARS
        );
        assert!(parse(&region(0, text.len(), &text)).is_empty());
        assert!(parse(&region(SIGNATURE, 0, &text)).is_empty());
        assert!(parse(&[]).is_empty());
    }
}
