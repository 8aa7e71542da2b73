//! Lists of processors or memory nodes, as cpusets have them: "0-3,7"
//! (Documentation/admin-guide/cgroup-v2.rst, "Cpuset Interface Files").

use std::fmt;

/// Numbers a list can have; Linux has up to 8192 processors, distributions' kernels
/// fewer, and machines with more than this are not among ours.
const NUMBERS: usize = 1024;
const WORD_BITS: usize = 64;

/// A set of processors or memory nodes of the host.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct NumberList([u64; NUMBERS / WORD_BITS]);

impl NumberList {
    /// Reads a list; `None` for what is none, or empty.
    pub fn parse(text: &str) -> Option<Self> {
        let mut list = Self([0; NUMBERS / WORD_BITS]);
        for range in text.trim().split(',') {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
            if first > last || last >= NUMBERS {
                return None;
            }
            for number in first..=last {
                *list.0.get_mut(number / WORD_BITS)? |= 1 << (number % WORD_BITS);
            }
        }
        Some(list)
    }

    /// What is in one or the other.
    #[must_use]
    pub fn or(mut self, other: Self) -> Self {
        for (word, more) in self.0.iter_mut().zip(other.0) {
            *word |= more;
        }
        self
    }

    /// A bit for each number from 0 on, without zero bytes at the end.
    pub fn to_bytes(self) -> Vec<u8> {
        let bytes = self.0.iter().flat_map(|word| word.to_le_bytes());
        let mut bytes: Vec<u8> = bytes.collect();
        let used = bytes.iter().rposition(|byte| *byte != 0);
        bytes.truncate(used.map_or(0, |last| last + 1));
        bytes
    }

    /// Whether a number is in it.
    #[must_use]
    pub fn has(&self, number: usize) -> bool {
        let word = self.0.get(number / WORD_BITS).copied().unwrap_or(0);
        word & (1 << (number % WORD_BITS)) != 0
    }
}

impl fmt::Display for NumberList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut comma = "";
        let mut number = 0;
        while number < NUMBERS {
            if !self.has(number) {
                number += 1;
                continue;
            }
            let first = number;
            while self.has(number + 1) {
                number += 1;
            }
            write!(f, "{comma}{first}")?;
            if number > first {
                write!(f, "-{number}")?;
            }
            comma = ",";
            number += 1;
        }
        Ok(())
    }
}

impl fmt::Debug for NumberList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_and_written() {
        let list = |text: &str| NumberList::parse(text).unwrap();
        assert_eq!(list("7,0-2,3\n").to_string(), "0-3,7");
        assert_eq!(list("1023").to_string(), "1023");
        assert_eq!(list("62-65").or(list("0,66")).to_string(), "0,62-66");
        assert_eq!(list("0,9").to_bytes(), [1, 2]);
        assert_eq!(list("64").to_bytes(), [0, 0, 0, 0, 0, 0, 0, 0, 1]);
        for bad in ["", "a", "3-1", "0-", "1024", "0-4096", "1,,2", "-1"] {
            assert_eq!(NumberList::parse(bad), None, "{bad:?}");
        }
    }
}
