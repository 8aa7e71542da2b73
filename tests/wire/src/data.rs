//! Bytes no two parts of which are alike, and what tells whether they are the same.

use anyhow::{Context, Result, ensure};

/// Bytes are made and summed up by so many at once: every piece has whole words.
pub const WORD: usize = 8;

/// A number of bytes.
pub fn size(text: &str) -> Result<u64> {
    let bytes: u64 = text.parse().with_context(|| format!("{text:?} bytes"))?;
    ensure!(
        bytes > 0 && bytes.is_multiple_of(WORD as u64),
        "{bytes} bytes are not whole words of {WORD}"
    );
    Ok(bytes)
}

/// Makes the bytes (xorshift64, Marsaglia 2003).
pub struct Source(u64);

impl Source {
    /// Those that follow from a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// The next ones: `bytes` are whole words.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_exact_mut(WORD) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            word.copy_from_slice(&self.0.to_le_bytes());
        }
    }
}

/// Number and checksum of bytes; where they are matters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sum {
    pub bytes: u64,
    hash: u64,
}

impl Sum {
    /// Bytes of one that is sent.
    pub const LEN: usize = 16;

    /// The next ones: `bytes` are whole words.
    pub fn add(&mut self, bytes: &[u8]) {
        for word in bytes.chunks_exact(WORD) {
            let word = u64::from_le_bytes(word.try_into().unwrap_or_default());
            self.hash = (self.hash.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
        self.bytes += bytes.len() as u64;
    }

    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..WORD].copy_from_slice(&self.bytes.to_le_bytes());
        bytes[WORD..].copy_from_slice(&self.hash.to_le_bytes());
        bytes
    }

    pub fn of_bytes(bytes: [u8; Self::LEN]) -> Self {
        let (count, hash) = bytes.split_at(WORD);
        let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap_or_default());
        Self {
            bytes: word(count),
            hash: word(hash),
        }
    }
}

/// What the sender and the receiver have must be the same.
pub fn compare(sent: Sum, arrived: Sum) -> Result<()> {
    ensure!(
        sent == arrived,
        "{} bytes were sent, {} arrived; sums {:016x} and {:016x}",
        sent.bytes,
        arrived.bytes,
        sent.hash,
        arrived.hash
    );
    Ok(())
}

/// Another one for each transfer.
pub fn seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = now.unwrap_or_default();
    now.as_secs() << 30 ^ u64::from(now.subsec_nanos()) ^ u64::from(std::process::id()) << 48
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(parts: &[&[u8]]) -> Sum {
        let mut sum = Sum::default();
        for part in parts {
            sum.add(part);
        }
        sum
    }

    #[test]
    fn any_change_is_another_sum() {
        let mut bytes = [0; 64];
        Source::new(seed()).fill(&mut bytes);
        let whole = sum(&[&bytes]);
        assert_eq!(sum(&[&bytes[..24], &bytes[24..]]), whole);
        assert_eq!(Sum::of_bytes(whole.to_bytes()), whole);
        for other in [
            sum(&[&bytes[..56]]),
            sum(&[&bytes[8..], &bytes[..8]]),
            sum(&[&bytes, &[0; 8]]),
            sum(&[&bytes[..32], &bytes[..32]]),
        ] {
            let error = compare(whole, other).unwrap_err().to_string();
            assert!(error.starts_with("64 bytes were sent"), "{error}");
        }
        compare(whole, whole).unwrap();
    }

    #[test]
    fn sizes_are_whole_words() {
        assert_eq!(size("1073741824").unwrap(), 1 << 30);
        for wrong in ["", "0", "12", "-8", "1G"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
