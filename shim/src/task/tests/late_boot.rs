//! Containers whose machine boots with their start, because their network
//! namespace was still empty when they were created.

use std::pin::{Pin, pin};

use containerd_shim_protos::api::*;
use futures::poll;
use ttrpc::Code;

use super::fixture::*;
use crate::machine::Machine;
use crate::machine::fake::FakeHost;
use crate::task::lock;

async fn fixture() -> Fixture {
    let mut host = FakeHost::scripted();
    host.knows_network = false;
    Fixture::on(host).await
}

#[tokio::test]
async fn start_boots_and_runs() {
    let mut fixture = fixture().await;
    let stdout = fixture.fifo("stdout");
    let output = reader(&stdout);
    let request = CreateTaskRequest {
        id: "c".into(),
        bundle: fixture.bundle("c", "echo hi; exit 7"),
        stdout,
        ..Default::default()
    };
    let created = fixture.client.create(context(), &request).await.unwrap();
    assert_ne!(created.pid, 0, "hooks and CNI need a pid before the boot");
    assert_eq!(fixture.status("c").await, Status::CREATED);
    assert_eq!(
        code(fixture.exec("c", "e", "true").await),
        Code::FAILED_PRECONDITION
    );
    let started = fixture.start("c", "").await.unwrap();
    assert_eq!(started.pid, created.pid);
    assert_eq!(fixture.wait("c", "").await, 7);
    assert_eq!(output.await.unwrap(), "hi\n");
    fixture.delete("c", "").await.unwrap();
    fixture.expect(&["create", "start", "exit", "delete"]).await;
}

#[tokio::test]
async fn command_that_is_missing_ends_the_container() {
    let mut fixture = fixture().await;
    let request = CreateTaskRequest {
        id: "c".into(),
        bundle: fixture.bundle_of("c", serde_json::json!(["/no/such/command"])),
        ..Default::default()
    };
    fixture.client.create(context(), &request).await.unwrap();
    assert_eq!(code(fixture.start("c", "").await), Code::INVALID_ARGUMENT);
    assert_eq!(fixture.status("c").await, Status::STOPPED);
    assert_eq!(
        code(fixture.start("c", "").await),
        Code::FAILED_PRECONDITION
    );
    assert_eq!(fixture.delete("c", "").await.unwrap().exit_status, 255);
    fixture.expect(&["create", "exit", "delete"]).await;
}

#[tokio::test]
async fn container_that_never_starts_is_killed_and_deleted() {
    let mut fixture = fixture().await;
    fixture.create("c", "sleep 60").await.unwrap();
    fixture.kill("c", "").await.unwrap();
    assert_eq!(fixture.wait("c", "").await, 137);
    fixture.delete("c", "").await.unwrap();
    fixture.create("d", "sleep 60").await.unwrap();
    assert_eq!(fixture.delete("d", "").await.unwrap().exit_status, 137);
    fixture
        .expect(&["create", "exit", "delete", "create", "exit", "delete"])
        .await;
}

/// Whether a call waits once the shim has it, which takes what comes by one connection in its
/// order.
async fn waits<T>(fixture: &Fixture, mut call: Pin<&mut impl Future<Output = T>>) -> bool {
    let sent = poll!(call.as_mut()).is_pending();
    assert_eq!(fixture.status("c").await, Status::CREATED);
    sent && poll!(call).is_pending()
}

#[tokio::test]
async fn a_signal_waits_for_the_boot() {
    let fixture = fixture().await;
    fixture.create("c", "exec sleep 60").await.unwrap();
    let machine = lock(&fixture.machine).clone().unwrap();
    machine.hang();
    let signal = async {
        machine.held(1).await;
        let mut kill = pin!(fixture.kill("c", ""));
        let waits = waits(&fixture, kill.as_mut()).await;
        assert!(waits, "there is nothing to signal yet");
        machine.recover();
        kill.await.unwrap();
    };
    // Whether it has run before it ended is as it comes.
    let (_, ()) = tokio::join!(fixture.start("c", ""), signal);
    assert_eq!(fixture.wait("c", "").await, 137);
    fixture.delete("c", "").await.unwrap();
}

#[tokio::test]
async fn a_signal_is_refused_when_the_boot_fails() {
    let fixture = fixture().await;
    fixture.create("c", "sleep 60").await.unwrap();
    let machine = lock(&fixture.machine).clone().unwrap();
    machine.hang();
    let signal = async {
        machine.held(1).await;
        let mut kill = pin!(fixture.kill("c", ""));
        assert!(waits(&fixture, kill.as_mut()).await);
        machine.kill();
        assert_eq!(code(kill.await), Code::NOT_FOUND);
    };
    let (started, ()) = tokio::join!(fixture.start("c", ""), signal);
    started.unwrap_err();
    assert_eq!(fixture.wait("c", "").await, 255, "it never ran");
}

#[tokio::test]
async fn machine_that_dies_before_the_start_is_an_exit() {
    let mut fixture = fixture().await;
    fixture.create("c", "sleep 60").await.unwrap();
    let machine = fixture.machine.lock().unwrap().clone().unwrap();
    machine.kill();
    assert_eq!(fixture.wait("c", "").await, 137);
    fixture.expect(&["create", "exit"]).await;
}

#[tokio::test]
async fn second_container_waits_for_the_first_to_start() {
    let fixture = fixture().await;
    fixture.create("c", "sleep 60").await.unwrap();
    assert_eq!(
        code(fixture.create("d", "true").await),
        Code::FAILED_PRECONDITION
    );
    fixture.start("c", "").await.unwrap();
    fixture.run("d", "exit 4").await;
    assert_eq!(fixture.wait("d", "").await, 4);
}
