//! The machine's end: said once, by whoever notices first, heard by all.

use std::io;
use std::sync::OnceLock;

use nacre_protocol::vm::StopReason;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

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
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// Ends the machine.
    pub fn set(&self, outcome: Outcome) {
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
