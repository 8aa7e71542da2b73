//! How far a pod is, as to who may ask it for containers.
//!
//! ```text
//!   Unasked ------ somebody asks for a container ------> Asked
//!      |                                                   |
//!      | nobody has, and the bundle is gone                | containerd ends it,
//!      v                                                   v or SIGTERM does
//!    Ending <----------------------------------------------+
//!      |
//!      +---- what the pod has on the host is freed ----> Ended
//! ```
//! A step is taken in one piece: who asks for a container is heard, or refused because the pod
//! ends, and never taken in by one that does.

use std::path::Path;
use std::time::Duration;

use tokio::sync::watch;

/// Time between two looks at the bundle, as long as nobody has asked for a container. Nothing
/// goes by it but how long a shim that nobody knows stays: one whose bundle is there is left
/// alone.
const LOOK_PAUSE: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Unasked,
    Asked,
    Ending,
    Ended,
}

/// See the module.
pub(super) struct Life(watch::Sender<Phase>);

impl Life {
    /// Nobody has asked yet.
    pub(super) fn new() -> Self {
        Self(watch::Sender::new(Phase::Unasked))
    }

    /// Somebody asks for a container. Returns whether it may be made.
    pub(super) fn ask(&self) -> bool {
        self.enter(Phase::Asked);
        self.is_open()
    }

    /// Whether containers may be made.
    pub(super) fn is_open(&self) -> bool {
        *self.0.borrow() < Phase::Ending
    }

    /// No further containers are made.
    pub(super) fn close(&self) {
        self.enter(Phase::Ending);
    }

    /// Nothing is left of the pod.
    pub(super) fn end(&self) {
        self.enter(Phase::Ended);
    }

    /// Resolves after [`Self::end`].
    pub(super) async fn ended(&self) {
        let mut life = self.0.subscribe();
        // Fails only without the sender, which `self` holds.
        let _ = life.wait_for(|phase| *phase == Phase::Ended).await;
    }

    /// Resolves when nobody has asked for a container and nobody will: containerd has removed
    /// `bundle`. No container is made from then on.
    pub(super) async fn abandoned(&self, bundle: &Path) {
        let mut life = self.0.subscribe();
        loop {
            let asked = life.wait_for(|phase| *phase != Phase::Unasked);
            if tokio::time::timeout(LOOK_PAUSE, asked).await.is_ok() {
                return std::future::pending().await;
            }
            // Where it cannot be looked at it may be there.
            let is_gone = matches!(bundle.try_exists(), Ok(false));
            if is_gone && self.close_unasked() {
                return;
            }
        }
    }

    fn close_unasked(&self) -> bool {
        self.step(Phase::Ending, |phase| phase == Phase::Unasked)
    }

    /// There is no way back.
    fn enter(&self, next: Phase) {
        self.step(next, |phase| phase < next);
    }

    fn step(&self, next: Phase, may: impl FnOnce(Phase) -> bool) -> bool {
        self.0.send_if_modified(|phase| {
            let is_next = may(*phase);
            if is_next {
                *phase = next;
            }
            is_next
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A_DAY: Duration = Duration::from_secs(24 * 60 * 60);

    /// Whether it is abandoned within a day, and when.
    async fn abandoned(life: &Life, bundle: &Path) -> Option<Duration> {
        let begin = tokio::time::Instant::now();
        let abandoned = tokio::time::timeout(A_DAY, life.abandoned(bundle));
        abandoned.await.ok().map(|()| begin.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_is_abandoned_with_its_bundle_and_takes_no_container_then() {
        let (life, bundle) = (Life::new(), tempfile::tempdir().unwrap());
        let path = bundle.path().to_owned();
        assert_eq!(abandoned(&life, &path).await, None, "it is there");
        drop(bundle);
        let when = abandoned(&life, &path).await.expect("nobody asks");
        assert!(when < 2 * LOOK_PAUSE, "{when:?}");
        assert!(!life.ask(), "it is too late");
        life.end();
        life.ended().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_was_asked_for_a_container_is_never_abandoned() {
        let life = Life::new();
        assert!(life.ask());
        let gone = Path::new("/proc/nacre");
        assert_eq!(abandoned(&life, gone).await, None);
        assert!(life.is_open());
    }

    /// Who is heard while the bundle is looked at is not refused, and nothing ends.
    #[tokio::test(start_paused = true)]
    async fn who_asks_in_time_is_heard() {
        let life = Life::new();
        let ask = async {
            tokio::time::sleep(LOOK_PAUSE - Duration::from_millis(1)).await;
            life.ask()
        };
        let gone = Path::new("/proc/nacre");
        let (abandoned, is_heard) = tokio::join!(abandoned(&life, gone), ask);
        assert!(is_heard);
        assert_eq!(abandoned, None);
        assert!(!life.close_unasked());
    }

    #[test]
    fn there_is_no_way_back() {
        let life = Life::new();
        life.close();
        assert!(!life.ask());
        life.end();
        life.close();
        assert_eq!(*life.0.borrow(), Phase::Ended);
    }
}
