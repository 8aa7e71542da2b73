//! Calls that are with a guest when its machine dies, and those a guest never answers.

use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::api::{ShutdownRequest, Status};
use futures::FutureExt;
use nacre_protocol::vm::StopReason;
use serde_json::json;
use ttrpc::Code;

use super::fixture::*;
use crate::machine::fake::{FakeHost, FakeMachine};
use crate::machine::{Machine, Stop};
use crate::task::container::CALL_TIMEOUT;
use crate::task::lock;

/// Time for what takes none.
const SOON: Duration = Duration::from_secs(5);

/// Containers and execs in all that they may be doing, in a guest that hangs from now on.
async fn hung() -> (Fixture, Arc<FakeMachine>) {
    let fixture = Fixture::new().await;
    for id in ["c", "paused"] {
        fixture.run(id, "sleep 60").await;
    }
    fixture.pause("paused").await.unwrap();
    fixture.run("gone", "exit 3").await;
    fixture.wait("gone", "").await;
    fixture.create("created", "sleep 60").await.unwrap();
    for (exec_id, script) in [("new", "true"), ("ended", "exit 4"), ("runs", "sleep 60")] {
        fixture.exec("c", exec_id, script).await.unwrap();
    }
    fixture.start("c", "runs").await.unwrap();
    fixture.start("c", "ended").await.unwrap();
    fixture.wait("c", "ended").await;
    let machine = lock(&fixture.machine).clone().unwrap();
    machine.hang();
    machine.hang_deletes();
    (fixture, machine)
}

/// Every call that waits for a guest returns when the machine dies, and says of what.
#[tokio::test]
async fn calls_under_way_return_and_say_what_happened() {
    for (stop, what) in [
        (Stop::Guest(StopReason::Panic), "the guest kernel panicked"),
        (Stop::Guest(StopReason::Shutdown), "the guest powered off"),
        (Stop::Died, "the monitor process ended"),
    ] {
        calls_under_way_return(stop, what).await;
    }
}

async fn calls_under_way_return(stop: Stop, what: &str) {
    let (fixture, machine) = hung().await;
    let pids = json!({"pids": {"limit": 5}});
    let refused = async {
        tokio::join!(
            async { refusal(fixture.start("created", "").await) },
            async { refusal(fixture.start("c", "new").await) },
            async { refusal(fixture.kill("c", "").await) },
            async { refusal(fixture.stats("c").await) },
            async { refusal(fixture.pids("c").await) },
            async { refusal(fixture.update("c", &pids).await) },
            async { refusal(fixture.resize("c", "runs").await) },
            async { refusal(fixture.pause("c").await) },
            async { refusal(fixture.resume("paused").await) },
        )
    };
    let answered = async {
        tokio::join!(
            async { fixture.delete("gone", "").await.unwrap().exit_status },
            async { fixture.delete("c", "ended").await.unwrap().exit_status },
            fixture.wait("c", ""),
            fixture.wait("c", "runs"),
        )
    };
    let death = async {
        // All but the two that wait.
        machine.held(11).await;
        machine.end(stop);
        machine.kill();
    };
    let all = async { tokio::join!(refused, answered, death) };
    let all = tokio::time::timeout(SOON, all).await;
    let (refused, answered, ()) = all.expect("they return");
    let (start, exec, kill, stats, pids, update, resize, pause, resume) = refused;
    let gone = of_pod(&format!("the virtual machine is gone: {what}"));
    for refusal in [
        start, exec, kill, stats, pids, update, resize, pause, resume,
    ] {
        assert_eq!(refusal, (Code::UNAVAILABLE, gone.clone()));
    }
    assert_eq!(answered, (3, 4, 137, 137));
    let late = refusal(fixture.stats("c").await);
    assert_eq!(late, (Code::UNAVAILABLE, gone));
    for (id, exec_id, status) in [
        ("c", "new", 255),
        ("c", "runs", 137),
        ("c", "", 137),
        ("created", "", 137),
        ("paused", "", 137),
    ] {
        assert_eq!(fixture.wait(id, exec_id).await, status, "{id} {exec_id}");
        let deleted = tokio::time::timeout(SOON, fixture.delete(id, exec_id)).await;
        let deleted = deleted.expect("there is nobody to wait for").unwrap();
        assert_eq!(deleted.exit_status, status, "{id} {exec_id}");
    }
}

/// The shim has it say where and end, and says why.
#[tokio::test]
async fn calls_that_a_guest_leaves_unanswered_say_that_it_hung() {
    let mut host = FakeHost::scripted();
    host.hang_timeout = Duration::from_secs(4);
    let most = host.hang_timeout + SOON;
    assert!(most < CALL_TIMEOUT, "else the calls give up");
    let mut fixture = Fixture::on(host).await;
    fixture.run("c", "sleep 60").await;
    fixture.exec("c", "e", "sleep 60").await.unwrap();
    let topics = ["create", "start", "exec-added"];
    fixture.expect(&topics).await;
    let machine = lock(&fixture.machine).clone().unwrap();
    // Of the shim's interrupt, which is not what happened to it.
    machine.panics();
    machine.hang();
    let calls = async {
        tokio::join!(
            async { refusal(fixture.start("c", "e").await) },
            async { refusal(fixture.stats("c").await) },
            fixture.wait("c", ""),
        )
    };
    let calls = tokio::time::timeout(most, calls).await;
    let (start, stats, status) = calls.expect("in time");
    let gone = "the virtual machine is gone: the guest hung: no answer within hang_timeout_seconds";
    for refusal in [start, stats] {
        assert_eq!(refusal, (Code::UNAVAILABLE, of_pod(gone)));
    }
    assert_eq!(status, 137);
    fixture.expect(&["exit"]).await;
}

/// The container that is being made when the machine dies, and the one after it.
#[tokio::test]
async fn a_create_says_what_happened() {
    let fixture = Fixture::new().await;
    fixture.run("c", "sleep 60").await;
    let machine = lock(&fixture.machine).clone().unwrap();
    machine.hang();
    let death = async {
        machine.held(1).await;
        machine.end(Stop::Guest(StopReason::Shutdown));
        machine.kill();
    };
    let both = async { tokio::join!(fixture.create("new", "true"), death) };
    let (created, ()) = tokio::time::timeout(SOON, both).await.expect("in time");
    let gone = "the virtual machine is gone: the guest powered off";
    let expected = (Code::UNAVAILABLE, of_pod(gone));
    assert_eq!(refusal(created), expected);
    assert_eq!(refusal(fixture.create("late", "true").await), expected);
    assert_eq!(fixture.wait("c", "").await, 137);
    let exec = fixture.exec("c", "late", "true").await;
    assert_eq!(code(exec), Code::FAILED_PRECONDITION);
}

/// As by a containerd that was restarted meanwhile, and found a shim without a task.
#[tokio::test]
async fn a_create_that_nobody_waits_for_is_given_up() {
    let mut host = FakeHost::scripted();
    host.hangs = true;
    let fixture = Fixture::on(host).await;
    let shutdown = async {
        let machine = fixture.machine_made().await;
        // The first ping and the container.
        machine.held(2).await;
        for (id, ends) in [("another", false), ("c", true)] {
            let request = ShutdownRequest {
                id: id.into(),
                ..Default::default()
            };
            fixture.client.shutdown(context(), &request).await.unwrap();
            assert_eq!(fixture.pod.ended().now_or_never().is_some(), ends, "{id}");
        }
    };
    let both = async { tokio::join!(fixture.create("c", "true"), shutdown) };
    let (created, ()) = tokio::time::timeout(SOON, both).await.expect("in time");
    assert_eq!(code(created), Code::UNAVAILABLE);
}

/// The same in a pod with other containers, which are none of its business.
#[tokio::test]
async fn a_container_that_nobody_waits_for_is_deleted_when_it_is_made() {
    let mut fixture = Fixture::new().await;
    fixture.run("c", "sleep 60").await;
    let machine = lock(&fixture.machine).clone().unwrap();
    machine.hang();
    let shutdown = async {
        machine.held(1).await;
        let request = ShutdownRequest {
            id: "new".into(),
            ..Default::default()
        };
        fixture.client.shutdown(context(), &request).await.unwrap();
        let again = fixture.create("new", "sleep 60").await;
        assert_eq!(code(again), Code::ALREADY_EXISTS);
        machine.recover();
    };
    let (created, ()) = tokio::join!(fixture.create("new", "sleep 60"), shutdown);
    assert_eq!(code(created), Code::FAILED_PRECONDITION);
    assert_eq!(code(fixture.start("new", "").await), Code::NOT_FOUND);
    assert_eq!(fixture.status("c").await, Status::RUNNING);
    fixture.run("new", "exit 4").await;
    assert_eq!(fixture.wait("new", "").await, 4);
    let first = ["create", "start", "create", "exit", "delete"];
    fixture.expect(&first).await;
    fixture.expect(&["create", "start", "exit"]).await;
}

/// Whether it is deleted already or cannot be.
#[tokio::test]
async fn a_container_that_was_given_up_keeps_no_pod() {
    let fixture = Fixture::new().await;
    fixture.run("c", "true").await;
    fixture.wait("c", "").await;
    fixture.delete("c", "").await.unwrap();
    let machine = lock(&fixture.machine).clone().unwrap();
    machine.hang();
    let given_up = async {
        machine.held(1).await;
        assert_eq!(code(fixture.delete("new", "").await), Code::NOT_FOUND);
        machine.hang_deletes();
        machine.recover();
        machine.held(2).await;
        let request = ShutdownRequest {
            id: "c".into(),
            ..Default::default()
        };
        fixture.client.shutdown(context(), &request).await.unwrap();
        assert!(fixture.pod.ended().now_or_never().is_some());
    };
    let (created, ()) = tokio::join!(fixture.create("new", "sleep 60"), given_up);
    assert_eq!(code(created), Code::FAILED_PRECONDITION);
}

/// A guest whose connection ends is about to end itself: who asked it is told why.
#[tokio::test]
async fn a_call_waits_for_the_guest_s_last_words() {
    let host = FakeHost::scripted();
    let sandbox = host.open();
    host.boot(&sandbox).await.unwrap();
    let machine = lock(&host.machine).clone().unwrap();
    let asked = sandbox.ask("test", SOON, |_| async {
        Err::<(), _>(ttrpc::Error::RemoteClosed)
    });
    let mut asked = std::pin::pin!(asked);
    assert!(futures::poll!(asked.as_mut()).is_pending());
    machine.end(Stop::Guest(StopReason::Panic));
    let error = asked.await.unwrap_err().to_string();
    assert!(error.ends_with("the guest kernel panicked"), "{error}");
}

/// The guest lives, and the machine: nobody is told that they are gone.
#[tokio::test]
async fn a_guest_that_does_not_answer_is_not_waited_for() {
    let fixture = Fixture::new().await;
    fixture.run("c", "sleep 60").await;
    fixture.exec("c", "e", "sleep 60").await.unwrap();
    fixture.start("c", "e").await.unwrap();
    let machine = lock(&fixture.machine).clone().unwrap();
    machine.hang();
    let calls = async {
        tokio::join!(
            async { refusal(fixture.kill("c", "e").await) },
            async { refusal(fixture.stats("c").await) },
            async { refusal(fixture.pause("c").await) },
        )
    };
    let time = async {
        machine.held(3).await;
        tokio::time::pause();
        tokio::time::advance(CALL_TIMEOUT).await;
        tokio::time::resume();
    };
    let ((kill, stats, pause), ()) = tokio::join!(calls, time);
    let late = |what: &str| {
        let seconds = CALL_TIMEOUT.as_secs();
        of_pod(&format!("guest: {what}: no answer within {seconds} s"))
    };
    for (refused, message) in [
        (kill, late("signal")),
        (stats, late("read the counters")),
        (pause, late("pause")),
    ] {
        assert_eq!(refused, (Code::DEADLINE_EXCEEDED, message));
    }
    assert_eq!(fixture.status("c").await, Status::RUNNING);
    machine.recover();
    fixture.kill("c", "").await.unwrap();
    assert_eq!(fixture.wait("c", "").await, 137);
}

/// It has to be killed first, and the guest does not do that.
#[tokio::test]
async fn a_created_container_that_does_not_die_stays() {
    let fixture = Fixture::new().await;
    fixture.create("c", "sleep 60").await.unwrap();
    let machine = lock(&fixture.machine).clone().unwrap();
    machine.hang();
    let time = async {
        machine.held(1).await;
        // From here on it passes as soon as all wait.
        tokio::time::pause();
    };
    let (deleted, ()) = tokio::join!(fixture.delete("c", ""), time);
    let expected = of_pod("killing the container took longer than 5 s");
    assert_eq!(refusal(deleted), (Code::DEADLINE_EXCEEDED, expected));
    assert_eq!(fixture.status("c").await, Status::CREATED);
}
