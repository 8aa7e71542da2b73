//! Warnings that a guest can cause, and therefore only a few of them.

use std::fmt::Display;

/// Most warnings of one queue's worker between a reset and the next.
const MAX_COMPLAINTS: u32 = 16;

/// The warnings of one worker.
pub struct Complaints {
    about: &'static str,
    made: u32,
}

impl Complaints {
    /// Warnings that say what happened as "`about`".
    #[must_use]
    pub fn new(about: &'static str) -> Self {
        Self { about, made: 0 }
    }

    /// Warns, unless that has been done often enough.
    pub fn add(&mut self, error: &dyn Display) {
        if self.made < MAX_COMPLAINTS {
            self.made += 1;
            tracing::warn!(%error, "{}", self.about);
        }
    }
}
