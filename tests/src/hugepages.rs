//! The host's huge pages.

use std::fs;

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// The pool of 2 MiB pages, as large as this says until it is dropped.
pub struct HugePages;

impl HugePages {
    /// A pool of `count` pages.
    ///
    /// # Panics
    ///
    /// When the host has no room for them.
    #[must_use]
    pub fn new(count: u32) -> Self {
        let pool = Self;
        pool.resize(count);
        assert_eq!(pool.left(), count, "the host has no room for them");
        pool
    }

    fn resize(&self, count: u32) {
        let path = format!("{POOL}/nr_hugepages");
        fs::write(path, count.to_string()).expect("root may resize the pool");
    }

    /// Those that nobody has and nobody was promised.
    ///
    /// # Panics
    ///
    /// Without a pool.
    #[must_use]
    pub fn left(&self) -> u32 {
        let number = |name: &str| -> u32 {
            let text = fs::read_to_string(format!("{POOL}/{name}_hugepages"));
            let number = text.expect("the kernel has a pool");
            number.trim().parse().expect("it is a number")
        };
        number("free") - number("resv")
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        self.resize(0);
    }
}
