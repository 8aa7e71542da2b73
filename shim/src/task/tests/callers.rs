//! Callers that wait: many at once, for long, and while the machine dies under them.

use std::time::Duration;

use containerd_shim_protos::api::*;
use containerd_shim_protos::shim_async::TaskClient;
use futures::future::join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use ttrpc::Code;

use super::fixture::*;
use crate::machine::Machine;
use crate::task::lock;

fn wait_request(exec_id: &str) -> WaitRequest {
    WaitRequest {
        id: "c".into(),
        exec_id: exec_id.into(),
        ..Default::default()
    }
}

async fn close_input(client: &TaskClient, exec_id: &str) {
    let request = CloseIORequest {
        id: "c".into(),
        exec_id: exec_id.into(),
        stdin: true,
        ..Default::default()
    };
    client.close_io(context(), &request).await.unwrap();
}

#[tokio::test]
async fn every_waiting_client_gets_the_exit() {
    let mut fixture = Fixture::new().await;
    fixture.run("c", "sleep 60").await;
    fixture.exec("c", "e", "sleep 60").await.unwrap();
    fixture.start("c", "e").await.unwrap();
    let mut clients = Vec::new();
    for _ in 0..10 {
        clients.push(fixture.another_client().await);
    }
    let wait = |client: TaskClient, exec_id| async move {
        let answer = client.wait(context(), &wait_request(exec_id)).await;
        answer.unwrap().exit_status
    };
    let twice = clients.iter().flat_map(|client| [client, client]);
    let waits: Vec<_> = twice
        .flat_map(|client| [wait(client.clone(), ""), wait(client.clone(), "e")])
        .map(tokio::spawn)
        .collect();
    // A server takes what comes by one connection in its order: it has the waits,
    // once they are sent.
    tokio::task::yield_now().await;
    for client in &clients {
        let request = StateRequest {
            id: "c".into(),
            ..Default::default()
        };
        client.state(context(), &request).await.unwrap();
    }
    assert!(waits.iter().all(|wait| !wait.is_finished()));
    fixture.kill("c", "e").await.unwrap();
    fixture.kill("c", "").await.unwrap();
    for status in join_all(waits).await {
        assert_eq!(status.unwrap(), 137);
    }
}

/// Nothing in the shim ends an exec that says nothing for longer than any limit of
/// the shim's.
#[tokio::test]
async fn exec_that_idles_for_an_hour_still_answers() {
    let fixture = Fixture::new().await;
    fixture.run("c", "sleep 60").await;
    let (stdin, stdout) = (fixture.fifo("stdin"), fixture.fifo("stdout"));
    let mut output = pipe::OpenOptions::new().open_receiver(&stdout).unwrap();
    let mut request = exec_request("c", "e", "cat");
    (request.stdin, request.stdout) = (stdin.clone(), stdout);
    fixture.client.exec(context(), &request).await.unwrap();
    fixture.start("c", "e").await.unwrap();
    let wait = wait_request("e");
    let unlimited = ttrpc::context::Context::default();
    let mut wait = std::pin::pin!(fixture.client.wait(unlimited, &wait));
    assert!(futures::poll!(wait.as_mut()).is_pending());
    let mut input = pipe::OpenOptions::new().open_sender(&stdin).unwrap();
    for word in ["before", "after"] {
        input.write_all(word.as_bytes()).await.unwrap();
        let mut echo = vec![0; word.len()];
        output.read_exact(&mut echo).await.unwrap();
        assert_eq!(echo, word.as_bytes());
        tokio::time::pause();
        tokio::time::advance(Duration::from_secs(3600)).await;
        tokio::time::resume();
        assert!(futures::poll!(wait.as_mut()).is_pending());
    }
    drop(input);
    close_input(&fixture.client, "e").await;
    assert_eq!(wait.await.unwrap().exit_status, 0);
}

/// Every call that waits for a guest returns when the machine dies, and says so.
#[tokio::test]
async fn calls_under_way_return_with_the_machine_s_death() {
    let fixture = Fixture::new().await;
    fixture.run("c", "sleep 60").await;
    fixture.create("d", "sleep 60").await.unwrap();
    fixture.exec("c", "e", "true").await.unwrap();
    let machine = lock(&fixture.machine).clone().unwrap();
    machine.hang();
    let update = UpdateTaskRequest {
        id: "c".into(),
        resources: json_any(r#"{"pids": {"limit": 5}}"#),
        ..Default::default()
    };
    let (stats, pids, pause) = (
        StatsRequest {
            id: "c".into(),
            ..Default::default()
        },
        PidsRequest {
            id: "c".into(),
            ..Default::default()
        },
        PauseRequest {
            id: "c".into(),
            ..Default::default()
        },
    );
    let client = &fixture.client;
    let calls = async {
        tokio::join!(
            async { code(fixture.start("d", "").await) },
            async { code(fixture.start("c", "e").await) },
            async { code(fixture.kill("c", "").await) },
            async { code(client.stats(context(), &stats).await) },
            async { code(client.pids(context(), &pids).await) },
            async { code(client.update(context(), &update).await) },
            async { code(client.pause(context(), &pause).await) },
        )
    };
    let mut calls = std::pin::pin!(calls);
    assert!(futures::poll!(calls.as_mut()).is_pending());
    // The last of them is with the guest.
    while fixture.status("c").await != Status::PAUSING {}
    machine.kill();
    let late = Duration::from_secs(5);
    let (start, exec, kill, stats, pids, update, pause) = tokio::time::timeout(late, calls)
        .await
        .expect("they return");
    let gone = Code::UNAVAILABLE;
    assert_eq!((start, exec, kill), (gone, gone, gone));
    assert_eq!((stats, pids, update), (gone, gone, gone));
    // It may find that the container has exited meanwhile.
    assert!(
        [gone, Code::FAILED_PRECONDITION].contains(&pause),
        "{pause:?}"
    );
    for (id, exec_id, status) in [("c", "", 137), ("d", "", 137), ("c", "e", 255)] {
        assert_eq!(fixture.wait(id, exec_id).await, status);
    }
}

/// The order of a client whose input is empty.
#[tokio::test]
async fn input_may_be_closed_before_the_start() {
    let fixture = Fixture::new().await;
    fixture.run("c", "sleep 60").await;
    let stdin = fixture.fifo("stdin");
    let mut request = exec_request("c", "e", "cat; exit 5");
    request.stdin = stdin;
    fixture.client.exec(context(), &request).await.unwrap();
    close_input(&fixture.client, "e").await;
    fixture.start("c", "e").await.unwrap();
    assert_eq!(fixture.wait("c", "e").await, 5);
}

/// A client tells its size as soon as it has one: the guest may be at work on the
/// process then, with none.
#[tokio::test]
async fn size_that_comes_during_a_start_is_not_lost() {
    let fixture = Fixture::new().await;
    fixture.run("c", "sleep 60").await;
    fixture.exec("c", "e", "sleep 60").await.unwrap();
    let machine = lock(&fixture.machine).clone().unwrap();
    machine.hang();
    let resize = ResizePtyRequest {
        id: "c".into(),
        exec_id: "e".into(),
        width: 120,
        height: 40,
        ..Default::default()
    };
    let size = async {
        machine.held(1).await;
        fixture.client.resize_pty(context(), &resize).await.unwrap();
        machine.recover();
    };
    let (started, ()) = tokio::join!(fixture.start("c", "e"), size);
    started.unwrap();
    assert_eq!(*lock(&fixture.journal), ["e 120x40"]);
}
