//! What is in the events, as containerd reads it.

use std::time::Duration;

use containerd_shim_protos::api::*;
use containerd_shim_protos::events::task::*;
use tokio::time::Instant;

use super::fixture::*;
use crate::machine::Machine;
use crate::task::lock;

fn pid() -> u32 {
    std::process::id()
}

#[tokio::test]
async fn events_of_a_container_and_an_exec() {
    let mut fixture = Fixture::new().await;
    let [stdin, stdout, stderr] = ["stdin", "stdout", "stderr"].map(|name| fixture.fifo(name));
    let request = CreateTaskRequest {
        id: "c".into(),
        // A child of the shell's would keep the output open.
        bundle: fixture.bundle("c", "exec sleep 60"),
        stdin: stdin.clone(),
        stdout: stdout.clone(),
        stderr: stderr.clone(),
        ..Default::default()
    };
    fixture.client.create(context(), &request).await.unwrap();
    let created = fixture.event::<TaskCreate>().await;
    assert_eq!(created.container_id, "c");
    assert_eq!(created.bundle, request.bundle);
    assert_eq!(created.pid, pid());
    let io = created.io.unwrap();
    assert_eq!((io.stdin, io.stdout, io.stderr), (stdin, stdout, stderr));
    assert!(!io.terminal && created.checkpoint.is_empty());

    fixture.start("c", "").await.unwrap();
    let started = fixture.event::<TaskStart>().await;
    assert_eq!((&*started.container_id, started.pid), ("c", pid()));

    fixture.exec("c", "e", "exit 3").await.unwrap();
    let added = fixture.event::<TaskExecAdded>().await;
    assert_eq!((&*added.container_id, &*added.exec_id), ("c", "e"));
    fixture.start("c", "e").await.unwrap();
    let started = fixture.event::<TaskExecStarted>().await;
    assert_eq!((&*started.container_id, &*started.exec_id), ("c", "e"));
    assert_eq!(started.pid, pid());
    // containerd tells an exec's exit from its container's by the id.
    exits(&mut fixture, "e", 3).await;

    fixture.pause("c").await.unwrap();
    assert_eq!(fixture.event::<TaskPaused>().await.container_id, "c");
    fixture.resume("c").await.unwrap();
    assert_eq!(fixture.event::<TaskResumed>().await.container_id, "c");

    fixture.kill("c", "").await.unwrap();
    exits(&mut fixture, "c", 137).await;
    let deleted = fixture.delete("c", "").await.unwrap();
    let event = fixture.event::<TaskDelete>().await;
    assert_eq!((&*event.container_id, &*event.id), ("c", ""));
    assert_eq!((event.pid, event.exit_status), (pid(), 137));
    assert_eq!(event.exited_at, deleted.exited_at);
    assert_eq!((deleted.pid, deleted.exit_status), (pid(), 137));
}

/// The next event is the exit of the container "c" or its exec, and the State and the
/// Wait that come after it agree.
async fn exits(fixture: &mut Fixture, id: &str, status: u32) {
    let exit = fixture.event::<TaskExit>().await;
    assert_eq!((&*exit.container_id, &*exit.id), ("c", id));
    assert_eq!((exit.pid, exit.exit_status), (pid(), status));
    let exec_id = if id == "c" { "" } else { id };
    let request = StateRequest {
        id: "c".into(),
        exec_id: exec_id.into(),
        ..Default::default()
    };
    let state = fixture.client.state(context(), &request).await.unwrap();
    assert_eq!(state.status.unwrap(), Status::STOPPED);
    assert_eq!(state.exit_status, status);
    assert!(exit.exited_at.is_some());
    assert_eq!(state.exited_at, exit.exited_at);
}

/// The guest tells of one container in half a second by itself.
#[tokio::test]
async fn lack_of_memory_is_told_once_and_before_the_exits_it_causes() {
    let mut fixture = Fixture::new().await;
    fixture.run("a", "exec sleep 60").await;
    fixture.run("b", "exec sleep 60").await;
    fixture
        .expect(&["create", "start", "create", "start"])
        .await;
    let machine = lock(&fixture.machine).clone().unwrap();
    machine.lacks_memory("a");
    assert_eq!(fixture.event::<TaskOOM>().await.container_id, "a");
    fixture.kill("a", "").await.unwrap();
    assert_eq!(fixture.event::<TaskExit>().await.container_id, "a");
    fixture.kill("b", "").await.unwrap();
    assert_eq!(fixture.event::<TaskOOM>().await.container_id, "b");
    assert_eq!(fixture.event::<TaskExit>().await.container_id, "b");
}

#[tokio::test]
async fn exits_with_the_machine_have_a_status_of_their_own() {
    let mut fixture = Fixture::new().await;
    fixture.run("c", "sleep 60").await;
    fixture.expect(&["create", "start"]).await;
    let machine = lock(&fixture.machine).clone().unwrap();
    // From here on it passes as soon as all wait.
    tokio::time::pause();
    let begin = Instant::now();
    machine.kill();
    exits(&mut fixture, "c", 137).await;
    let took = begin.elapsed();
    tokio::time::resume();
    assert!(took < Duration::from_secs(5), "{took:?}");
}
