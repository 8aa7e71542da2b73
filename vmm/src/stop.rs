//! The machine's end: said once, by whoever notices first, heard by all.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nacre_protocol::vm::StopReason;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Time between a panic and the machine's end.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The guest stopped it.
    Stopped(StopReason),
    /// A vCPU cannot run on.
    Failed(String),
    /// The monitor stopped it.
    Cancelled,
}

/// Shared by vCPUs, power registers and the main thread. The first outcome
/// stays.
pub struct Stop {
    outcome: OnceLock<Outcome>,
    has_panicked: AtomicBool,
    event: EventFd,
}

impl Stop {
    /// A machine that has not ended.
    ///
    /// # Errors
    ///
    /// Those of eventfd(2).
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            outcome: OnceLock::new(),
            has_panicked: AtomicBool::new(false),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// Notes that the guest's kernel panics. It says its last words and resets the
    /// machine, in a moment: after that the machine ends anyway.
    pub fn panicked(self: &Arc<Self>) {
        if self.has_panicked.swap(true, Ordering::Relaxed) {
            return;
        }
        let stop = self.clone();
        let limit = std::thread::Builder::new().name("panic".into());
        let limit = limit.spawn(move || {
            std::thread::sleep(LAST_WORDS);
            stop.set(Outcome::Stopped(StopReason::Panic));
        });
        if let Err(error) = limit {
            tracing::warn!(%error, "no time for the guest's last words");
            self.set(Outcome::Stopped(StopReason::Panic));
        }
    }

    /// Ends the machine.
    pub fn set(&self, outcome: Outcome) {
        let outcome = match outcome {
            Outcome::Stopped(_) if self.has_panicked.load(Ordering::Relaxed) => {
                Outcome::Stopped(StopReason::Panic)
            }
            outcome => outcome,
        };
        if self.outcome.set(outcome).is_ok()
            && let Err(error) = self.event.write(1)
        {
            tracing::error!(%error, "the machine's end cannot be signalled");
        }
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn outcome(&self) -> Option<&Outcome> {
        self.outcome.get()
    }

    /// Readable once the machine has ended.
    #[must_use]
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_outcome_stays_and_is_signalled_once() {
        let stop = Stop::new().unwrap();
        assert_eq!(stop.outcome(), None);
        stop.set(Outcome::Stopped(StopReason::Panic));
        stop.set(Outcome::Stopped(StopReason::Shutdown));
        assert_eq!(stop.outcome(), Some(&Outcome::Stopped(StopReason::Panic)));
        assert_eq!(stop.event().read().unwrap(), 1);
    }
}
