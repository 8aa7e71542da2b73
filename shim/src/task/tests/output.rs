//! Output and the exit: the one is complete before the other is told, but for a reader
//! that does not read.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use containerd_shim_protos::api::*;
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::fixture::*;
use super::real_agent;
use crate::task::lock;

/// More than a FIFO holds and less than all buffers on the way: the guest can get rid of
/// it before anybody reads.
const BYTES: usize = 100_000;

/// A container that writes [`BYTES`] and ends with this, and the reader of its FIFO, who
/// has not read anything.
async fn started(fixture: &Fixture, end: &str) -> pipe::Receiver {
    let stdout = fixture.fifo("stdout");
    let reader = pipe::OpenOptions::new().open_receiver(&stdout).unwrap();
    let script = format!("head -c {BYTES} /dev/zero; {end}");
    let request = CreateTaskRequest {
        id: "c".into(),
        bundle: fixture.bundle("c", &script),
        stdout,
        ..Default::default()
    };
    fixture.client.create(context(), &request).await.unwrap();
    fixture.start("c", "").await.unwrap();
    reader
}

/// The same, all of which is with the shim when this returns.
async fn ended(fixture: &Fixture) -> pipe::Receiver {
    let reader = started(fixture, "exit 7").await;
    let machine = lock(&fixture.machine).clone().unwrap();
    machine.ended("c").await;
    reader
}

#[tokio::test]
async fn an_exit_is_told_after_the_output_was_read() {
    let mut fixture = Fixture::new().await;
    let mut reader = ended(&fixture).await;
    fixture.expect(&["create", "start"]).await;
    // The guest's answers come in their order: that of the exit is there by now.
    for _ in 0..10 {
        fixture.stats("c").await.unwrap();
        assert_eq!(fixture.status("c").await, Status::RUNNING);
    }
    assert!(fixture.events.try_recv().is_err(), "nothing is told");
    let mut output = Vec::new();
    let (read, status) = tokio::join!(reader.read_to_end(&mut output), fixture.wait("c", ""));
    assert_eq!((read.unwrap(), status), (BYTES, 7));
    fixture.expect(&["exit"]).await;
}

/// It gets the rest when it reads again, until the container is deleted.
#[tokio::test]
async fn a_reader_that_has_stopped_does_not_hide_the_exit() {
    let mut fixture = Fixture::new().await;
    let mut reader = ended(&fixture).await;
    // The shim has the guest's answers in their order, that of the exit among them.
    for _ in 0..10 {
        fixture.stats("c").await.unwrap();
    }
    // From here on it passes as soon as all wait.
    tokio::time::pause();
    let begin = Instant::now();
    assert_eq!(fixture.wait("c", "").await, 7);
    let took = begin.elapsed();
    tokio::time::resume();
    // containerd is to know within 5 s.
    assert!(took < Duration::from_millis(4500), "{took:?}");
    fixture.expect(&["create", "start", "exit"]).await;
    let mut output = Vec::new();
    let read = reader.read_to_end(&mut output).await;
    assert_eq!(read.unwrap(), BYTES);
}

/// And hands back nothing of what the container wrote.
#[tokio::test]
async fn nor_does_a_guest_that_hangs_besides() {
    let mut fixture = Fixture::new().await;
    let log = fixture.path("pods/1-2/containers/c/0a1b");
    std::fs::create_dir_all(log.parent().unwrap()).unwrap();
    std::fs::write(&log, "").unwrap();
    fixture.mounts = json!([{
        "source": log, "destination": "/dev/termination-log", "type": "bind",
        "options": ["rbind", "rw"],
    }]);
    let go = fixture.path("go");
    let end = format!("until [ -e {} ]; do sleep 0.05; done; exit 7", go.display());
    let _reader = started(&fixture, &end).await;
    let machine = lock(&fixture.machine).clone().unwrap();
    machine.hang();
    std::fs::write(&go, "").unwrap();
    // It is asked for what the container wrote as soon as the exit is known.
    machine.held(1).await;
    tokio::time::pause();
    let begin = Instant::now();
    assert_eq!(fixture.wait("c", "").await, 7);
    let took = begin.elapsed();
    tokio::time::resume();
    assert!(took < Duration::from_millis(4500), "{took:?}");
}

/// A file has it all at the moment the exit is known.
#[tokio::test]
async fn a_file_is_complete_with_the_exit() {
    let fixture = Fixture::new().await;
    let path = fixture.path("log");
    let request = CreateTaskRequest {
        id: "c".into(),
        bundle: fixture.bundle("c", "head -c 3000000 /dev/zero"),
        stdout: format!("file://{}", path.display()),
        ..Default::default()
    };
    fixture.client.create(context(), &request).await.unwrap();
    fixture.start("c", "").await.unwrap();
    assert_eq!(fixture.wait("c", "").await, 0);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 3_000_000);
}

/// A logger of two streams, and what it writes.
fn logger(fixture: &Fixture, script: &str) -> (String, JoinHandle<String>) {
    let log = fixture.fifo("log");
    let read = reader(&log);
    let program = fixture.path("logger");
    let script = format!("#!/bin/sh\nexec 5>&-\n{{ {script}; }} > $2\n");
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    (format!("binary://{}?log={log}", program.display()), read)
}

/// An exec's as a container's, by the exec's own id.
#[tokio::test]
async fn a_logger_takes_the_output_of_an_exec() {
    let fixture = Fixture::new().await;
    fixture.run("c", "sleep 60").await;
    let (uri, read) = logger(&fixture, "echo $CONTAINER_ID; cat <&3; cat <&4");
    let mut request = exec_request("c", "e", "echo out; echo err >&2; exit 3");
    (request.stdout, request.stderr) = (uri.clone(), uri);
    fixture.client.exec(context(), &request).await.unwrap();
    fixture.start("c", "e").await.unwrap();
    assert_eq!(fixture.wait("c", "e").await, 3);
    assert_eq!(read.await.unwrap(), "e\nout\nerr\n");
}

/// The other stream of a terminal ends at once.
#[tokio::test]
async fn a_logger_takes_the_one_output_of_a_terminal() {
    let Some(fixture) = real_agent::fixture().await else {
        return;
    };
    let created = real_agent::create(&fixture, "c", json!(["sleep", "60"])).await;
    created.unwrap();
    fixture.start("c", "").await.unwrap();
    let (uri, read) = logger(&fixture, "cat <&4; cat <&3");
    let mut request = exec_request("c", "e", "");
    let mut process = process("tty; echo err >&2; exit 3");
    process["terminal"] = json!(true);
    request.spec = json_any(&process.to_string());
    request.terminal = true;
    (request.stdout, request.stderr) = (uri.clone(), uri);
    fixture.client.exec(context(), &request).await.unwrap();
    fixture.start("c", "e").await.unwrap();
    assert_eq!(fixture.wait("c", "e").await, 3);
    let read = tokio::time::timeout(Duration::from_secs(5), read).await;
    let read = read.expect("both streams have ended").unwrap();
    assert_eq!(read, "/dev/pts/0\r\nerr\r\n");
    fixture.kill("c", "").await.unwrap();
    fixture.wait("c", "").await;
    fixture.delete("c", "").await.unwrap();
}
