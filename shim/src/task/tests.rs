//! The Task API against fake machines, called as containerd calls it: over
//! ttrpc, with FIFOs, with events going to a listener that plays containerd.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api::*;
use containerd_shim_protos::shim_async::{Events, TaskClient, create_events};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use protobuf::well_known_types::any::Any;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use ttrpc::Code;
use ttrpc::asynchronous::transport::{Listener, Socket};
use ttrpc::asynchronous::{Client, Server, TtrpcContext};
use ttrpc::context::{Context, with_duration};

use super::{Pod, service};
use crate::events::Publisher;
use crate::machine::Machine;
use crate::machine::fake::{FakeHost, FakeMachine};
use crate::sandbox::Host;

/// Plays containerd's event service.
struct EventSink(mpsc::UnboundedSender<String>);

#[async_trait]
impl Events for EventSink {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        self.0.send(request.envelope.topic.clone()).unwrap();
        Ok(Empty::new())
    }
}

/// A pod, a client of it, and its events.
struct Fixture {
    client: TaskClient,
    pod: Arc<Pod>,
    events: mpsc::UnboundedReceiver<String>,
    directory: tempfile::TempDir,
    machine: Arc<std::sync::Mutex<Option<Arc<FakeMachine>>>>,
    _servers: Vec<Server>,
}

fn context() -> Context {
    with_duration(Duration::from_secs(20))
}

impl Fixture {
    async fn new() -> Self {
        Self::on(FakeHost::scripted()).await
    }

    async fn on(host: FakeHost) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (sender, events) = mpsc::unbounded_channel();
        let address = directory.path().join("containerd.ttrpc");
        let mut sink = Server::new()
            .bind(&format!("unix://{}", address.display()))
            .unwrap()
            .register_service(create_events(Arc::new(EventSink(sender))));
        sink.start().await.unwrap();
        let machine = host.machine.clone();
        let publisher = Publisher::new("test", address.to_str().unwrap());
        let pod = Pod::new(Host::Fake(host), publisher);
        let (near, far) = UnixStream::pair().unwrap();
        let mut server = Server::new()
            .add_listener(Listener::new(futures::stream::iter([Ok(far)])))
            .register_service(service::create(&pod));
        server.start().await.unwrap();
        Self {
            client: TaskClient::new(Client::new(Socket::new(near))),
            pod,
            events,
            directory,
            machine,
            _servers: vec![server, sink],
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn fifo(&self, name: &str) -> String {
        let path = self.path(name);
        mkfifo(&path, Mode::from_bits_retain(0o600)).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// A bundle whose init process is `sh -c script`.
    fn bundle(&self, id: &str, script: &str) -> String {
        let bundle = self.path(id);
        std::fs::create_dir(&bundle).unwrap();
        let spec = json!({
            "ociVersion": "1.0.2",
            "root": {"path": "/"},
            "process": process(script),
            "linux": {},
        });
        std::fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        bundle.to_str().unwrap().to_owned()
    }

    async fn create(&self, id: &str, script: &str) -> ttrpc::Result<CreateTaskResponse> {
        let request = CreateTaskRequest {
            id: id.into(),
            bundle: self.bundle(id, script),
            ..Default::default()
        };
        self.client.create(context(), &request).await
    }

    async fn run(&self, id: &str, script: &str) {
        self.create(id, script).await.unwrap();
        self.start(id, "").await.unwrap();
    }

    async fn start(&self, id: &str, exec_id: &str) -> ttrpc::Result<StartResponse> {
        let request = StartRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.client.start(context(), &request).await
    }

    async fn wait(&self, id: &str, exec_id: &str) -> u32 {
        let request = WaitRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        let response = self.client.wait(context(), &request).await.unwrap();
        assert!(response.exited_at.is_some());
        response.exit_status
    }

    async fn kill(&self, id: &str, exec_id: &str) -> ttrpc::Result<Empty> {
        let request = KillRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            signal: 9,
            ..Default::default()
        };
        self.client.kill(context(), &request).await
    }

    async fn delete(&self, id: &str, exec_id: &str) -> ttrpc::Result<DeleteResponse> {
        let request = DeleteRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.client.delete(context(), &request).await
    }

    async fn exec(&self, id: &str, exec_id: &str, script: &str) -> ttrpc::Result<Empty> {
        let request = ExecProcessRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            spec: Some(Any {
                value: process(script).to_string().into_bytes(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        self.client.exec(context(), &request).await
    }

    async fn status(&self, id: &str) -> Status {
        let request = StateRequest {
            id: id.into(),
            ..Default::default()
        };
        let state = self.client.state(context(), &request).await.unwrap();
        state.status.unwrap()
    }

    /// The next events, in their order.
    async fn expect(&mut self, topics: &[&str]) {
        for topic in topics {
            let event = tokio::time::timeout(Duration::from_secs(10), self.events.recv());
            assert_eq!(event.await.unwrap().unwrap(), format!("/tasks/{topic}"));
        }
    }
}

fn process(script: &str) -> serde_json::Value {
    json!({
        "cwd": "/",
        "user": {"uid": 0, "gid": 0},
        "args": ["/bin/sh", "-c", script],
        "env": ["PATH=/bin:/usr/bin"],
    })
}

fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> Code {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => status.code(),
        other => panic!("not a status: {other}"),
    }
}

async fn read_all(path: &str) -> String {
    let mut reader = pipe::OpenOptions::new()
        .open_receiver(Path::new(path))
        .unwrap();
    let mut text = String::new();
    reader.read_to_string(&mut text).await.unwrap();
    text
}

#[tokio::test]
async fn a_container_s_life() {
    let mut fixture = Fixture::new().await;
    let stdout = fixture.fifo("stdout");
    let output = tokio::spawn({
        let stdout = stdout.clone();
        async move { read_all(&stdout).await }
    });
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
    let output = tokio::spawn({
        let stdout = stdout.clone();
        async move { read_all(&stdout).await }
    });
    let request = CreateTaskRequest {
        id: "c".into(),
        bundle: fixture.bundle("c", "cat"),
        stdin: stdin.clone(),
        stdout,
        ..Default::default()
    };
    fixture.client.create(context(), &request).await.unwrap();
    fixture.start("c", "").await.unwrap();
    let mut writer = pipe::OpenOptions::new().open_sender(&stdin).unwrap();
    writer.write_all(b"to and fro").await.unwrap();
    drop(writer);
    let close = CloseIORequest {
        id: "c".into(),
        stdin: true,
        ..Default::default()
    };
    fixture.client.close_io(context(), &close).await.unwrap();
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
    let pause = PauseRequest {
        id: "c".into(),
        ..Default::default()
    };
    let resume = ResumeRequest {
        id: "c".into(),
        ..Default::default()
    };
    assert_eq!(
        code(fixture.client.resume(context(), &resume).await),
        Code::FAILED_PRECONDITION
    );
    fixture.client.pause(context(), &pause).await.unwrap();
    assert_eq!(fixture.status("c").await, Status::PAUSED);
    fixture.client.resume(context(), &resume).await.unwrap();
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
    let stats = StatsRequest {
        id: "a".into(),
        ..Default::default()
    };
    assert_eq!(
        code(fixture.client.stats(context(), &stats).await),
        Code::NOT_FOUND
    );
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
    let update = UpdateTaskRequest {
        id: "c".into(),
        resources: Some(Any {
            value: b"nonsense".to_vec(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    assert_eq!(
        code(fixture.client.update(context(), &update).await),
        Code::INVALID_ARGUMENT
    );
    // A pod with containers does not end.
    let shutdown = ShutdownRequest::default();
    fixture.client.shutdown(context(), &shutdown).await.unwrap();
    assert_eq!(fixture.status("c").await, Status::RUNNING);
}

#[tokio::test]
async fn counters_and_pids() {
    let fixture = Fixture::new().await;
    fixture.run("c", "sleep 60").await;
    let stats = StatsRequest {
        id: "c".into(),
        ..Default::default()
    };
    let stats = fixture.client.stats(context(), &stats).await.unwrap();
    assert_eq!(stats.stats.type_url, "io.containerd.cgroups.v2.Metrics");
    let pids = PidsRequest {
        id: "c".into(),
        ..Default::default()
    };
    let pids = fixture.client.pids(context(), &pids).await.unwrap();
    assert_eq!(pids.processes.len(), 1);
    let connect = ConnectRequest {
        id: "c".into(),
        ..Default::default()
    };
    let connect = fixture.client.connect(context(), &connect).await.unwrap();
    assert_eq!(connect.task_pid, pids.processes[0].pid);
}

/// The same life in a container the real agent makes, of the host's busybox.
#[tokio::test]
async fn the_real_agent_runs_a_container() {
    let Some(host) = FakeHost::real() else { return };
    let busybox = Path::new("/bin/busybox");
    if !busybox.exists() {
        eprintln!("skipped: no static busybox (Debian: busybox-static)");
        return;
    }
    let mut fixture = Fixture::on(host).await;
    let bundle = fixture.bundle("c", "echo hi; exit 7");
    let rootfs = Path::new(&bundle).join("rootfs");
    for directory in ["bin", "proc", "dev", "sys"] {
        std::fs::create_dir_all(rootfs.join(directory)).unwrap();
    }
    std::fs::copy(busybox, rootfs.join("bin/sh")).unwrap();
    let spec = json!({
        "ociVersion": "1.0.2",
        "root": {"path": rootfs},
        "process": process("echo hi; exit 7"),
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]},
    });
    std::fs::write(Path::new(&bundle).join("config.json"), spec.to_string()).unwrap();
    let stdout = fixture.fifo("stdout");
    let output = tokio::spawn({
        let stdout = stdout.clone();
        async move { read_all(&stdout).await }
    });
    let request = CreateTaskRequest {
        id: "c".into(),
        bundle,
        stdout,
        ..Default::default()
    };
    fixture.client.create(context(), &request).await.unwrap();
    fixture.start("c", "").await.unwrap();
    assert_eq!(fixture.wait("c", "").await, 7);
    assert_eq!(output.await.unwrap(), "hi\n");
    fixture.delete("c", "").await.unwrap();
    fixture.expect(&["create", "start", "exit", "delete"]).await;
}
