//! Large packets for TCP in the lab.
//!
//! An emulated machine's round trip takes milliseconds, of which Linux concludes that the way is
//! slow, and that small packets do (`tcp_tso_autosize` in `net/ipv4/tcp_output.c`). Each
//! costs such a machine as much as a large one.

use std::fs;
use std::path::{Path, PathBuf};

/// The least segments of a packet that is cut for the wire: a sysctl of a network
/// namespace, and its value.
pub const SEGMENTS: (&str, &str) = ("net.ipv4.tcp_min_tso_segs", "40");

/// Those of what the host sends, until it is dropped.
pub struct HostSegments {
    file: PathBuf,
    before: String,
}

impl HostSegments {
    /// # Panics
    ///
    /// When the sysctl cannot be set.
    #[must_use]
    pub fn set() -> Self {
        let file = Path::new("/proc/sys").join(SEGMENTS.0.replace('.', "/"));
        let before = fs::read_to_string(&file).expect("Linux has it");
        fs::write(&file, SEGMENTS.1).expect("root may set it");
        Self { file, before }
    }
}

impl Drop for HostSegments {
    fn drop(&mut self) {
        fs::write(&self.file, &self.before).expect("root may set it");
    }
}
