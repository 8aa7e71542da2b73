//! Hooks in a container's life: those that are refused, `poststart`, and those the
//! guest runs.

use std::path::Path;

use containerd_shim_protos::api::*;
use serde_json::{Value, json};
use ttrpc::Code;

use super::fixture::*;
use super::real_agent;

fn script(text: &str) -> Value {
    json!([{"path": "/bin/sh", "args": ["sh", "-c", text], "env": ["PATH=/bin:/usr/bin"]}])
}

/// Gives the bundle's spec hooks.
fn add_hooks(bundle: &str, hooks: Value) {
    let path = Path::new(bundle).join("config.json");
    let mut spec: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    spec["hooks"] = hooks;
    std::fs::write(&path, spec.to_string()).unwrap();
}

async fn create(fixture: &Fixture, bundle: String) -> ttrpc::Result<CreateTaskResponse> {
    let request = CreateTaskRequest {
        id: "c".into(),
        bundle,
        ..Default::default()
    };
    fixture.client.create(context(), &request).await
}

fn message<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
        other => panic!("not a status: {other}"),
    }
}

#[tokio::test]
async fn hooks_that_cannot_run_are_refused() {
    let mut fixture = Fixture::new().await;
    let bundle = fixture.bundle("c", "true");
    add_hooks(&bundle, json!({"createContainer": script("true")}));
    let (code, text) = message(create(&fixture, bundle).await);
    assert_eq!(code, Code::UNIMPLEMENTED);
    assert!(
        text.starts_with("container c: createContainer hook /bin/sh "),
        "{text}"
    );

    fixture.annotations = json!({"io.kubernetes.cri.container-type": "sandbox"});
    let bundle = fixture.bundle("c", "true");
    add_hooks(&bundle, json!({"startContainer": script("true")}));
    let (code, text) = message(create(&fixture, bundle).await);
    assert_eq!(code, Code::UNIMPLEMENTED);
    assert!(
        text.starts_with("container c: startContainer hook /bin/sh "),
        "{text}"
    );

    fixture.annotations = json!({});
    fixture.run("c", "true").await;
}

#[tokio::test]
async fn poststart_runs_before_the_start_returns() {
    let mut fixture = Fixture::new().await;
    let bundle = fixture.bundle("c", "sleep 60");
    let hooks = json!({
        "poststart": script("cat > state; exit 1"),
        "poststop": script("echo > stopped"),
    });
    add_hooks(&bundle, hooks);
    let file = |name: &str| Path::new(&bundle).join(name);
    create(&fixture, bundle.clone()).await.unwrap();
    assert!(!file("state").exists());
    // It fails, which is no reason to end what runs.
    fixture.start("c", "").await.unwrap();
    let state: Value = serde_json::from_slice(&std::fs::read(file("state")).unwrap()).unwrap();
    assert_eq!(state["status"], "running");
    assert_eq!(fixture.status("c").await, Status::RUNNING);
    std::fs::remove_file(file("state")).unwrap();

    fixture.exec("c", "e", "true").await.unwrap();
    fixture.start("c", "e").await.unwrap();
    assert!(!file("state").exists(), "an exec is not the container");
    fixture.kill("c", "").await.unwrap();
    fixture.wait("c", "").await;
    fixture.delete("c", "").await.unwrap();
    assert!(file("stopped").exists());
    let topics = ["create", "start", "exec-added", "exec-started"];
    fixture.expect(&topics).await;
}

#[tokio::test]
async fn a_hook_in_the_guest_fails_the_start() {
    let Some(mut fixture) = real_agent::fixture().await else {
        return;
    };
    let bundle = real_agent::bundle(&fixture, "c", json!(["sleep", "60"]));
    let hooks = json!({"startContainer": script("cat > /state; echo no gpu; exit 3")});
    add_hooks(&bundle, hooks);
    create(&fixture, bundle.clone()).await.unwrap();
    let (_, text) = message(fixture.start("c", "").await);
    assert_eq!(
        text,
        "guest: start the container: startContainer: hook /bin/sh failed (exit status: 3): no gpu"
    );
    assert_ne!(fixture.wait("c", "").await, 0);
    let state = std::fs::read(Path::new(&bundle).join("rootfs/state")).unwrap();
    let state: Value = serde_json::from_slice(&state).unwrap();
    assert_eq!(state["bundle"], json!(bundle));
    fixture.delete("c", "").await.unwrap();
    fixture.expect(&["create", "exit", "delete"]).await;
}
