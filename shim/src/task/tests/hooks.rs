//! Hooks in a container's life: those that are refused, `poststart`, `poststop`, and those
//! the guest runs.

use std::path::Path;
use std::time::Duration;

use containerd_shim_protos::api::*;
use futures::FutureExt;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
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

#[tokio::test]
async fn hooks_that_cannot_run_are_refused() {
    let mut fixture = Fixture::new().await;
    let bundle = fixture.bundle("c", "true");
    add_hooks(&bundle, json!({"createContainer": script("true")}));
    let (code, text) = refusal(create(&fixture, bundle).await);
    assert_eq!(code, Code::UNIMPLEMENTED);
    assert!(
        text.starts_with(&of_pod("container c: createContainer hook /bin/sh ")),
        "{text}"
    );

    fixture.annotations = json!({"io.kubernetes.cri.container-type": "sandbox"});
    let bundle = fixture.bundle("c", "true");
    add_hooks(&bundle, json!({"startContainer": script("true")}));
    let (code, text) = refusal(create(&fixture, bundle).await);
    assert_eq!(code, Code::UNIMPLEMENTED);
    assert!(
        text.starts_with(&of_pod("container c: startContainer hook /bin/sh ")),
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

/// Whoever set something up on the host gets to take it down (runtime-spec 1.2,
/// runtime.md, "Lifecycle", step 7).
#[tokio::test]
async fn poststop_runs_when_a_create_fails() {
    let fixture = Fixture::new().await;
    let failing = |name: &str, hooks: Value| {
        let bundle = fixture.bundle(name, "true");
        add_hooks(&bundle, hooks);
        let stdout = "/no/such/fifo".into();
        (
            bundle.clone(),
            CreateTaskRequest {
                id: name.into(),
                bundle,
                stdout,
                ..Default::default()
            },
        )
    };
    // The first makes the machine, the second joins it.
    for name in ["first", "second"] {
        let hooks = json!({
            "createRuntime": script("echo > made; exit 3"), "poststop": script("rm made"),
        });
        let (bundle, request) = failing(name, hooks);
        let (_, text) = refusal(fixture.client.create(context(), &request).await);
        assert!(text.contains("exit status: 3"), "{text}");
        assert!(!Path::new(&bundle).join("made").exists(), "{name}");
        if name == "first" {
            fixture.run("other", "sleep 60").await;
        }
    }
    let hooks = json!({
        "createRuntime": script("echo > made"), "poststop": script("rm made; echo >> stopped"),
    });
    let (bundle, request) = failing("third", hooks);
    let (_, text) = refusal(fixture.client.create(context(), &request).await);
    assert!(text.contains("/no/such/fifo"), "{text}");
    let file = |name: &str| Path::new(&bundle).join(name);
    assert!(!file("made").exists());
    assert_eq!(std::fs::read(file("stopped")).unwrap(), b"\n");
}

/// A container that is being deleted: its hook has begun and waits for a line in `go`.
async fn deleting(fixture: &Fixture, bundle: &str) -> JoinHandle<()> {
    let hooks = json!({
        "poststop": script("echo > began; read line < go; echo > ended"),
    });
    add_hooks(bundle, hooks);
    let began = fixture.fifo("c/began");
    fixture.fifo("c/go");
    let began = reader(&began);
    create(fixture, bundle.to_owned()).await.unwrap();
    let pod = fixture.pod.clone();
    let request = DeleteRequest {
        id: "c".into(),
        ..Default::default()
    };
    let deleted = tokio::spawn(async move { drop(pod.delete(&request).await.unwrap()) });
    assert_eq!(began.await.unwrap(), "\n");
    deleted
}

#[tokio::test]
async fn the_pod_s_end_waits_for_hooks() {
    let fixture = Fixture::new().await;
    let bundle = fixture.bundle("c", "sleep 60");
    let deleted = deleting(&fixture, &bundle).await;
    let mut stop = std::pin::pin!(fixture.pod.stop());
    assert!(stop.as_mut().now_or_never().is_none());
    let go = Path::new(&bundle).join("go");
    let told = tokio::task::spawn_blocking(move || std::fs::write(go, "\n"));
    stop.await;
    assert!(Path::new(&bundle).join("ended").exists());
    told.await.unwrap().unwrap();
    deleted.await.unwrap();
}

/// This test's end is that of the hook, too.
#[tokio::test]
async fn the_pod_s_end_does_not_wait_for_ever() {
    let fixture = Fixture::new().await;
    let bundle = fixture.bundle("c", "sleep 60");
    let deleted = deleting(&fixture, &bundle).await;
    tokio::time::pause();
    let mut stop = std::pin::pin!(fixture.pod.stop());
    assert!(stop.as_mut().now_or_never().is_none());
    tokio::time::advance(Duration::from_secs(60)).await;
    stop.await;
    assert!(!deleted.is_finished());
    assert!(!Path::new(&bundle).join("ended").exists());
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
    let (_, text) = refusal(fixture.start("c", "").await);
    let failed = "guest: start the container: startContainer: hook /bin/sh failed (exit status: \
                  3): no gpu";
    assert_eq!(text, of_pod(failed));
    assert_ne!(fixture.wait("c", "").await, 0);
    let state = std::fs::read(Path::new(&bundle).join("rootfs/state")).unwrap();
    let state: Value = serde_json::from_slice(&state).unwrap();
    assert_eq!(state["bundle"], json!(bundle));
    fixture.delete("c", "").await.unwrap();
    fixture.expect(&["create", "exit", "delete"]).await;
}
