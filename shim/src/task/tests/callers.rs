//! Callers that wait: many at once, and for long.

use std::time::Duration;

use containerd_shim_protos::api::*;
use containerd_shim_protos::shim_async::TaskClient;
use futures::future::join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;

use super::fixture::*;
use crate::task::lock;

fn wait_request(exec_id: &str) -> WaitRequest {
    WaitRequest {
        id: "c".into(),
        exec_id: exec_id.into(),
        ..Default::default()
    }
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
    fixture.close_input("c", "e").await.unwrap();
    assert_eq!(wait.await.unwrap().exit_status, 0);
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
    fixture.close_input("c", "e").await.unwrap();
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
    let size = async {
        machine.held(1).await;
        fixture.resize("c", "e").await.unwrap();
        machine.recover();
    };
    let (started, ()) = tokio::join!(fixture.start("c", "e"), size);
    started.unwrap();
    assert_eq!(*lock(&fixture.journal), ["e 120x40"]);
}
