//! A machine whose agent is gone.

use nacre_protocol::vm::StopReason;
use tokio::time::{Instant, sleep};

use super::*;
use crate::machine::fake::FakeHost;
use crate::task::lock;

#[tokio::test(start_paused = true)]
async fn guest_without_an_agent_may_still_say_why() {
    let host = FakeHost::scripted();
    let sandbox = host.open();
    let machine = lock(&host.machine).clone().unwrap();
    let last_words = async {
        sleep(LAST_WORDS / 2).await;
        assert!(
            machine.end(Stop::Guest(StopReason::Panic)),
            "killed too soon"
        );
    };
    tokio::join!(sandbox.give_up(), last_words);
    assert_eq!(sandbox.stopped().await, Stop::Guest(StopReason::Panic));
}

#[tokio::test(start_paused = true)]
async fn guest_that_says_nothing_is_killed() {
    let host = FakeHost::scripted();
    let sandbox = host.open();
    let begin = Instant::now();
    sandbox.give_up().await;
    assert!(begin.elapsed() >= LAST_WORDS);
    assert_eq!(sandbox.stopped().await, Stop::Died);
}
