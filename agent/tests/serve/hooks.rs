//! `startContainer` hooks (runtime-spec 1.2, runtime.md, "Lifecycle", step 8).

use std::fs;

use nacre_protocol::agent::Stdio;
use serde_json::{Value, json};
use ttrpc::Code;

use crate::fixture::{spec, start, status};

fn with_hook(args: &[&str], hook: &Value) -> Value {
    let mut spec = spec("c1", args);
    spec["hooks"] = json!({"startContainer": [hook]});
    spec
}

fn script(text: &str) -> Value {
    json!({"path": "/bin/sh", "args": ["sh", "-c", text], "env": ["PATH=/bin", "WORD=hook"]})
}

#[tokio::test]
async fn a_hook_runs_inside_the_container_before_its_process() {
    let Some(agent) = start() else { return };
    // What it says is no output of the container's.
    let hook = script(
        "cat > /data/state; echo noise; id -u; exec > /data/seen; echo $WORD; id -u; echo $PPID
         busybox hostname other || echo refused; busybox grep CapEff /proc/self/status",
    );
    let mut spec = with_hook(&["cat", "/data/seen", "/data/state"], &hook);
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    spec["annotations"] = json!({"a": "b"});
    fs::set_permissions(
        agent.file("data"),
        std::os::unix::fs::PermissionsExt::from_mode(0o777),
    )
    .unwrap();
    let (mut ends, stdio) = agent.streams(1);
    ends.close_stdin();
    agent.create("c1", &spec, stdio).await.unwrap();
    assert!(!agent.file("data/seen").exists(), "it waits for the start");
    agent.start("c1").await.unwrap();
    assert_eq!(agent.wait("c1", "").await.exit_status, 0);
    let said = ends.stdout();
    let (seen, state) = said.split_at(said.find('{').unwrap());
    assert_eq!(seen, "hook\n1000\n1\nrefused\nCapEff:\t0000000000000000\n");
    let state: Value = serde_json::from_str(state).unwrap();
    assert_eq!(
        state,
        json!({
            "ociVersion": "1.2.0", "id": "c1", "status": "created", "pid": 1,
            "bundle": "/host/bundle", "annotations": {"a": "b"},
        })
    );
    agent.delete("c1").await.unwrap();
}

#[tokio::test]
async fn a_failing_hook_fails_the_start_and_ends_the_container() {
    let Some(agent) = start() else { return };
    let mut slow = script("exec sleep 60");
    slow["timeout"] = json!(1);
    for (hook, complaint) in [
        (
            script("echo no gpu >&2; exit 3"),
            "startContainer: hook /bin/sh failed (exit status: 3): no gpu",
        ),
        (slow, "startContainer: hook /bin/sh took longer than 1 s"),
        (
            json!({"path": "/no/such"}),
            "startContainer: run hook /no/such: no such file or directory",
        ),
    ] {
        let spec = with_hook(&["sh", "-c", "echo ran > /data/ran"], &hook);
        agent.create("c1", &spec, Stdio::default()).await.unwrap();
        let error = agent.start("c1").await.unwrap_err();
        assert_eq!(status(&error), (Code::INTERNAL, complaint.into()));
        assert_ne!(agent.wait("c1", "").await.exit_status, 0);
        assert!(!agent.file("data/ran").exists());
        agent.delete("c1").await.unwrap();
        assert!(agent.is_clean("c1"));
    }
}
