//! An end for a test that waits for ever: a client blocks as long as nacre does,
//! and the test with it.

use std::io::{self, Write};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

/// Several waits of [`PATIENCE`](crate::PATIENCE) one after the other.
const LIMIT: Duration = Duration::from_secs(600);

/// Ends the whole run, naming the test of its thread, unless it is dropped in time.
pub struct Watchdog {
    _alive: Sender<()>,
}

impl Watchdog {
    pub fn new() -> Self {
        Self::within(LIMIT)
    }

    /// For a test that may take so long.
    pub fn within(limit: Duration) -> Self {
        let test = thread::current().name().unwrap_or_default().to_owned();
        let (alive, dropped) = channel();
        thread::spawn(move || {
            if dropped.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                // Not eprintln, which a test's output capture would swallow.
                let _ = writeln!(io::stderr(), "\n{test} hangs: not done after {limit:?}");
                std::process::abort();
            }
        });
        Self { _alive: alive }
    }
}
