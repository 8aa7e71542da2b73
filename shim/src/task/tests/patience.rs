//! Callers whose patience ends: what becomes of a pod then.

use std::time::Duration;

use containerd_shim_protos::sandbox_api::ShutdownSandboxRequest;
use protobuf::Message;

use super::fixture::*;

const SANDBOX_API: &str = "containerd.runtime.sandbox.v1.Sandbox";

/// containerd's Sandbox controller ends what a caller waits for no longer with that caller's
/// context, which is over, and closes the connection without an answer.
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
