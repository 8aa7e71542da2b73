//! What the shim asks a guest again and again: whether it lives, and what time it
//! is there.
//!
//! ```text
//! after the boot, every half of hang_timeout_seconds, and every 30 s at least:
//! ping -> no answer within that half: the guest hangs, its kernel is asked where, and its
//!         machine is ended
//!      -> its time, read at some moment between question and answer: if it can
//!         be no moment of that span, the guest's clock is adjusted
//! ```
//! kvm-clock gives the guest the host's time once, at boot, and roughly where the
//! host's own clock source is not the TSC. From then on the guest counts by itself,
//! while the host's clock is steered by NTP, and may be set.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nacre_protocol::agent::{AdjustClockRequest, Empty};
use nacre_protocol::agent_ttrpc::AgentClient;
use tracing::{error, info, warn};
use ttrpc::context::Context;

use super::Sandbox;
use crate::task::agent_message;

/// Most time between pings, for the clock's sake.
const CLOCK_PERIOD: Duration = Duration::from_secs(30);
/// Difference that is not worth a correction.
const CLOCK_TOLERANCE_NS: i128 = 2_000_000;

impl Sandbox {
    /// Keeps the guest's clock on the host's and ends its machine if it does not
    /// answer for `timeout`, unless that is zero; returns when the machine is dead.
    pub async fn watch(&self, timeout: Duration) {
        let Some(agent) = self.agent() else {
            return;
        };
        let patience = if timeout.is_zero() {
            Duration::MAX
        } else {
            timeout / 2
        };
        let period = patience.min(CLOCK_PERIOD);
        let ask = async {
            loop {
                let answer = tokio::time::timeout(patience, keep_clock(agent)).await;
                if answer.is_err() {
                    return;
                }
                tokio::time::sleep(period).await;
            }
        };
        tokio::select! {
            () = ask => (),
            _ = self.stopped() => return,
        }
        error!(
            seconds = timeout.as_secs(),
            "the guest hangs: no answer to a ping; its kernel is asked where, and its machine is ended"
        );
        self.hangs.store(true, Ordering::Relaxed);
        self.interrupt().await;
        self.kill().await;
    }
}

/// A call fails when the guest is gone, which others find out too.
async fn keep_clock(agent: &AgentClient) {
    let (asked, begin) = (SystemTime::now(), Instant::now());
    let Ok(answer) = agent.ping(Context::default(), &Empty::default()).await else {
        return;
    };
    let Some(by_ns) = correction(asked, begin.elapsed(), answer.time_ns) else {
        return;
    };
    info!(by_ns, "the guest's clock is adjusted");
    let request = AdjustClockRequest {
        by_ns,
        ..Default::default()
    };
    if let Err(error) = agent.adjust_clock(Context::default(), &request).await {
        warn!(error = agent_message(&error), "it is not");
    }
}

/// By how much a clock is off that showed `guest_ns` at some moment of the time
/// that a question `took`; `None` if it may be right.
fn correction(asked: SystemTime, took: Duration, guest_ns: i64) -> Option<i64> {
    let nanos = |duration: Duration| i128::try_from(duration.as_nanos()).unwrap_or(i128::MAX);
    let half = nanos(took) / 2;
    let host_ns = nanos(asked.duration_since(UNIX_EPOCH).unwrap_or_default()) + half;
    let by_ns = host_ns - i128::from(guest_ns);
    // The guest's word may be anything.
    (by_ns.abs() > half + CLOCK_TOLERANCE_NS)
        .then(|| i64::try_from(by_ns).ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clock_is_corrected_when_it_must_be_wrong() {
        let at = |ms: u64| UNIX_EPOCH + Duration::from_millis(ms);
        let took = Duration::from_millis(10);
        let ask = |guest_ms: i64| correction(at(1000), took, guest_ms * 1_000_000);
        assert_eq!(ask(1005), None);
        // The span and the tolerance: 998 to 1012.
        assert_eq!((ask(998), ask(1012)), (None, None));
        assert_eq!(ask(997), Some(8_000_000));
        assert_eq!(ask(1013), Some(-8_000_000));
        assert_eq!(ask(0), Some(1_005_000_000));
        assert_eq!(correction(at(1000), took, i64::MIN), None, "no sane time");
    }
}
