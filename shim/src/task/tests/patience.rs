//! Callers whose patience ends: what becomes of a shim then.

use std::time::Duration;

use containerd_shim_protos::sandbox_api::ShutdownSandboxRequest;
use protobuf::Message;

use super::fixture::*;

const SANDBOX_API: &str = "containerd.runtime.sandbox.v1.Sandbox";

/// containerd kills `start` with its caller's patience, and knows no shim then.
#[tokio::test]
async fn shim_that_nobody_asks_for_anything_is_abandoned() {
    let (idle, used) = (Fixture::new().await, Fixture::new().await);
    used.create("app", "true").await.unwrap();
    tokio::time::pause();
    let a_day = Duration::from_secs(24 * 60 * 60);
    let abandoned = tokio::time::timeout(a_day, idle.pod.abandoned());
    abandoned.await.expect("nobody asks");
    let abandoned = tokio::time::timeout(a_day, used.pod.abandoned());
    abandoned.await.expect_err("somebody has asked");
}

/// Its Sandbox controller ends what a caller waits for no longer with that caller's context,
/// which is over, and closes the connection without an answer.
#[tokio::test]
async fn shutdown_that_nobody_waits_for_is_done() {
    let mut fixture = Fixture::new().await;
    fixture.run("app", "sleep 60").await;
    let request = ShutdownSandboxRequest {
        sandbox_id: "pod".into(),
        ..Default::default()
    };
    let payload = request.write_to_bytes().unwrap();
    fixture
        .call_late(SANDBOX_API, "ShutdownSandbox", payload)
        .await;
    let ended = tokio::time::timeout(Duration::from_secs(20), fixture.pod.ended());
    ended.await.expect("the shim ends");
    assert_eq!(fixture.wait("app", "").await, 137);
}
