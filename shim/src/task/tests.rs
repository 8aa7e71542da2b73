//! The Task API and the Sandbox API against fake machines, called as containerd calls it: over
//! ttrpc, with FIFOs, with events going to a listener that plays containerd.

mod block_devices;
mod callers;
mod console;
mod death;
mod devices;
mod events;
mod fixture;
mod hooks;
mod late_boot;
mod output;
mod patience;
mod phases;
mod real_agent;
mod resize;
mod sandboxed;
mod volumes;

use containerd_shim_protos::api::*;
use containerd_shim_protos::shim::oci::ProcessDetails;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use serde_json::json;
use ttrpc::Code;

use super::service;
use crate::machine::Machine;

use fixture::*;

#[tokio::test]
async fn a_container_s_life() {
    let mut fixture = Fixture::new().await;
    let stdout = fixture.fifo("stdout");
    let output = reader(&stdout);
    let request = CreateTaskRequest {
        id: "c".into(),
        bundle: fixture.bundle("c", "echo hi; exit 7"),
        stdout,
        ..Default::default()
    };
    let created = fixture.client.create(context(), &request).await.unwrap();
    assert_ne!(created.pid, 0);
    assert_eq!(fixture.status("c").await, Status::CREATED);
    fixture.start("c", "").await.unwrap();
    assert_eq!(fixture.wait("c", "").await, 7);
    assert_eq!(output.await.unwrap(), "hi\n");
    assert_eq!(fixture.status("c").await, Status::STOPPED);
    assert_eq!(code(fixture.kill("c", "").await), Code::NOT_FOUND);
    assert_eq!(fixture.delete("c", "").await.unwrap().exit_status, 7);
    assert_eq!(code(fixture.delete("c", "").await), Code::NOT_FOUND);
    fixture.expect(&["create", "start", "exit", "delete"]).await;

    let shutdown = ShutdownRequest::default();
    fixture.client.shutdown(context(), &shutdown).await.unwrap();
    fixture.pod.ended().await;
}

#[tokio::test]
async fn both_service_names_are_there() {
    let fixture = Fixture::new().await;
    let services = service::create(&fixture.pod);
    for name in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
        assert!(services[name].methods.contains_key("Create"), "{name}");
    }
}

#[tokio::test]
async fn input_reaches_the_process_and_ends_with_close_io() {
    let fixture = Fixture::new().await;
    let (stdin, stdout) = (fixture.fifo("stdin"), fixture.fifo("stdout"));
    let output = reader(&stdout);
    let request = CreateTaskRequest {
        id: "c".into(),
        bundle: fixture.bundle("c", "cat"),
        stdin: stdin.clone(),
        stdout,
        ..Default::default()
    };
    fixture.client.create(context(), &request).await.unwrap();
    fixture.start("c", "").await.unwrap();
    fixture.feed("c", &stdin, "to and fro").await;
    assert_eq!(fixture.wait("c", "").await, 0);
    assert_eq!(output.await.unwrap(), "to and fro");
}

#[tokio::test]
async fn execs_come_and_go_within_a_container() {
    let mut fixture = Fixture::new().await;
    fixture.run("c", "sleep 60").await;
    fixture.exec("c", "e", "exit 3").await.unwrap();
    assert_eq!(
        code(fixture.exec("c", "e", "true").await),
        Code::ALREADY_EXISTS
    );
    assert_eq!(
        code(fixture.kill("c", "e").await),
        Code::FAILED_PRECONDITION
    );
    fixture.start("c", "e").await.unwrap();
    assert_eq!(fixture.wait("c", "e").await, 3);
    assert_eq!(fixture.delete("c", "e").await.unwrap().exit_status, 3);
    assert_eq!(code(fixture.delete("c", "e").await), Code::NOT_FOUND);
    let topics = ["create", "start", "exec-added", "exec-started", "exit"];
    fixture.expect(&topics).await;

    assert_eq!(
        code(fixture.delete("c", "").await),
        Code::FAILED_PRECONDITION
    );
    fixture.kill("c", "").await.unwrap();
    assert_eq!(fixture.wait("c", "").await, 137);
    assert_eq!(
        code(fixture.exec("c", "late", "true").await),
        Code::FAILED_PRECONDITION
    );
    fixture.delete("c", "").await.unwrap();
    fixture.expect(&["exit", "delete"]).await;
}

#[tokio::test]
async fn an_exec_that_cannot_start_ends() {
    let fixture = Fixture::new().await;
    fixture.run("c", "sleep 60").await;
    let mut process = process("true");
    process["args"] = json!(["/no/such/command"]);
    let request = ExecProcessRequest {
        id: "c".into(),
        exec_id: "e".into(),
        spec: Some(Any {
            value: process.to_string().into_bytes(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    fixture.client.exec(context(), &request).await.unwrap();
    assert_eq!(code(fixture.start("c", "e").await), Code::INVALID_ARGUMENT);
    assert_eq!(fixture.wait("c", "e").await, 255);
    fixture.delete("c", "e").await.unwrap();
}

#[tokio::test]
async fn pausing_shows_in_the_state() {
    let mut fixture = Fixture::new().await;
    fixture.run("c", "sleep 60").await;
    fixture.pause("c").await.unwrap();
    assert_eq!(fixture.status("c").await, Status::PAUSED);
    fixture.resume("c").await.unwrap();
    assert_eq!(fixture.status("c").await, Status::RUNNING);
    fixture
        .expect(&["create", "start", "paused", "resumed"])
        .await;
}

#[tokio::test]
async fn a_created_container_can_be_deleted() {
    let mut fixture = Fixture::new().await;
    fixture.create("c", "true").await.unwrap();
    assert_eq!(fixture.delete("c", "").await.unwrap().exit_status, 137);
    fixture.expect(&["create", "exit", "delete"]).await;
}

#[tokio::test]
async fn the_machine_s_death_is_everyone_s_exit() {
    let mut fixture = Fixture::new().await;
    fixture.run("a", "sleep 60").await;
    fixture.run("b", "sleep 60").await;
    fixture.exec("a", "e", "sleep 60").await.unwrap();
    fixture.start("a", "e").await.unwrap();
    let machine = super::lock(&fixture.machine).clone().unwrap();
    machine.kill();
    for (id, exec_id) in [("a", ""), ("b", ""), ("a", "e")] {
        assert_eq!(fixture.wait(id, exec_id).await, 137);
    }
    fixture.delete("a", "").await.unwrap();
    fixture.delete("b", "").await.unwrap();
    let topics = [
        "create",
        "start",
        "create",
        "start",
        "exec-added",
        "exec-started",
    ];
    fixture.expect(&topics).await;
    assert_eq!(code(fixture.stats("a").await), Code::NOT_FOUND);
}

#[tokio::test]
async fn mistakes_get_the_codes_containerd_expects() {
    let fixture = Fixture::new().await;
    assert_eq!(code(fixture.start("none", "").await), Code::NOT_FOUND);
    let no_bundle = CreateTaskRequest {
        id: "x".into(),
        bundle: "/nowhere".into(),
        ..Default::default()
    };
    assert_eq!(
        code(fixture.client.create(context(), &no_bundle).await),
        Code::INVALID_ARGUMENT
    );
    fixture.run("c", "sleep 60").await;
    let again = CreateTaskRequest {
        id: "c".into(),
        bundle: fixture.path("c").to_str().unwrap().into(),
        ..Default::default()
    };
    assert_eq!(
        code(fixture.client.create(context(), &again).await),
        Code::ALREADY_EXISTS
    );
    assert_eq!(
        code(fixture.start("c", "").await),
        Code::FAILED_PRECONDITION
    );
    let checkpoint = CheckpointTaskRequest::default();
    assert_eq!(
        code(fixture.client.checkpoint(context(), &checkpoint).await),
        Code::UNIMPLEMENTED
    );
    let update = fixture.update("c", &json!("nonsense")).await;
    assert_eq!(code(update), Code::INVALID_ARGUMENT);
    let restored = CreateTaskRequest {
        id: "restored".into(),
        bundle: fixture.bundle("restored", "true"),
        checkpoint: "/checkpoint".into(),
        ..Default::default()
    };
    let restored = fixture.client.create(context(), &restored).await;
    assert_eq!(code(restored), Code::UNIMPLEMENTED);
    // A pod with containers does not end.
    let shutdown = ShutdownRequest::default();
    fixture.client.shutdown(context(), &shutdown).await.unwrap();
    assert_eq!(fixture.status("c").await, Status::RUNNING);
}

#[tokio::test]
async fn counters_and_pids() {
    let fixture = Fixture::new().await;
    fixture.run("c", "sleep 60").await;
    let stats = fixture.stats("c").await.unwrap();
    assert_eq!(stats.stats.type_url, "io.containerd.cgroups.v2.Metrics");
    fixture.exec("c", "e", "sleep 60").await.unwrap();
    fixture.start("c", "e").await.unwrap();
    let mut pids = fixture.pids("c").await.unwrap().processes;
    pids.sort_by_key(|process| process.info.is_some());
    assert_eq!(pids.len(), 2);
    assert!(pids[0].pid != pids[1].pid && pids[0].info.is_none());
    assert_eq!(pids[1].info.type_url, "containerd.runc.v1.ProcessDetails");
    let details = ProcessDetails::parse_from_bytes(&pids[1].info.value).unwrap();
    assert_eq!(details.exec_id, "e");
    fixture.kill("c", "").await.unwrap();
    fixture.wait("c", "").await;
    let pids = fixture.pids("c").await.unwrap();
    assert_eq!(pids.processes.len(), 1, "never a leak to containerd");
    assert_eq!(pids.processes[0].pid, std::process::id());
    let connect = ConnectRequest {
        id: "c".into(),
        ..Default::default()
    };
    let connect = fixture.client.connect(context(), &connect).await.unwrap();
    assert_eq!(connect.task_pid, std::process::id(), "the machine's");
}

/// A pod's sandbox container: the machine, and no process in the guest.
#[tokio::test]
async fn a_pod_s_sandbox_runs_without_a_process() {
    let mut fixture = Fixture::new().await;
    fixture.annotations = json!({"io.kubernetes.cri.container-type": "sandbox"});
    fixture.run("pod", "exit 1").await;
    assert_eq!(fixture.status("pod").await, Status::RUNNING);
    let exec = fixture.exec("pod", "e", "true").await;
    assert_eq!(code(exec), Code::UNIMPLEMENTED);
    fixture.annotations = json!({});
    fixture.run("app", "exec sleep 60").await;

    fixture.kill("pod", "").await.unwrap();
    assert_eq!(fixture.wait("pod", "").await, 137);
    fixture.delete("pod", "").await.unwrap();
    assert_eq!(fixture.status("app").await, Status::RUNNING);
    fixture.kill("app", "").await.unwrap();
    fixture.wait("app", "").await;
    let events = [
        "create", "start", "create", "start", "exit", "delete", "exit",
    ];
    fixture.expect(&events).await;
}
