//! A pod on a fake machine, and containerd played: its client, its event
//! service.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api::*;
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Events, TaskClient, create_events};
use nacre_protocol::console_ttrpc::ConsoleClient;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use ttrpc::Code;
use ttrpc::asynchronous::transport::{Listener, Socket};
use ttrpc::asynchronous::{Client, Server, TtrpcContext};
use ttrpc::context::{Context, with_duration};
use ttrpc::proto::{MessageHeader, Request};

use super::super::{Pod, console, sandboxed, service};
use crate::events::{Publisher, TaskEvent};
use crate::machine::fake::{FakeHost, FakeMachine, Journal, SANDBOX_ID};
use crate::sandbox::Host;
use crate::task::lock;

/// Plays containerd's event service.
struct EventSink(mpsc::UnboundedSender<Envelope>);

#[async_trait]
impl Events for EventSink {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        self.0.send(request.envelope.unwrap()).unwrap();
        Ok(Empty::new())
    }
}

/// A pod, a client of it, and its events.
pub struct Fixture {
    pub client: TaskClient,
    /// On a connection of its own.
    pub console: ConsoleClient,
    /// The same.
    pub sandbox: SandboxClient,
    pub pod: Arc<Pod>,
    pub events: mpsc::UnboundedReceiver<Envelope>,
    pub directory: tempfile::TempDir,
    pub machine: Arc<std::sync::Mutex<Option<Arc<FakeMachine>>>>,
    pub journal: Journal,
    /// Of the bundles made from now on.
    pub resources: serde_json::Value,
    /// The same.
    pub annotations: serde_json::Value,
    /// The same.
    pub devices: serde_json::Value,
    /// The same.
    pub mounts: serde_json::Value,
    servers: Vec<Server>,
}

pub fn context() -> Context {
    with_duration(Duration::from_secs(20))
}

impl Fixture {
    pub async fn new() -> Self {
        Self::on(FakeHost::scripted()).await
    }

    pub async fn on(host: FakeHost) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (sender, events) = mpsc::unbounded_channel();
        let address = directory.path().join("containerd.ttrpc");
        let mut sink = Server::new()
            .bind(&format!("unix://{}", address.display()))
            .unwrap()
            .register_service(create_events(Arc::new(EventSink(sender))));
        sink.start().await.unwrap();
        let machine = host.machine.clone();
        let journal = host.journal.clone();
        let publisher = Publisher::new("test", address.to_str().unwrap());
        let pod = Pod::new(Host::Fake(Box::new(host)), publisher);
        let (client, server) = connect(&pod).await;
        let (console, console_server) = connect(&pod).await;
        let (sandbox, sandbox_server) = connect(&pod).await;
        Self {
            client: TaskClient::new(client),
            console: ConsoleClient::new(console),
            sandbox: SandboxClient::new(sandbox),
            pod,
            events,
            directory,
            machine,
            journal,
            resources: json!({}),
            annotations: json!({}),
            devices: json!([]),
            mounts: json!([]),
            servers: vec![server, console_server, sandbox_server, sink],
        }
    }

    /// One more connection to the pod.
    pub async fn another_client(&mut self) -> TaskClient {
        let (client, server) = connect(&self.pod).await;
        self.servers.push(server);
        TaskClient::new(client)
    }

    /// A call whose time is over when it is made: its caller does not wait for an answer, and
    /// closes the connection at once.
    pub async fn call_late(&mut self, service: &str, method: &str, payload: Vec<u8>) {
        let request = Request {
            service: service.into(),
            method: method.into(),
            payload,
            timeout_nano: -1,
            ..Default::default()
        };
        let request = request.write_to_bytes().unwrap();
        let header = MessageHeader::new_request(1, request.len().try_into().unwrap());
        let (mut near, server) = connection(&self.pod).await;
        self.servers.push(server);
        let message = [Vec::from(header), request].concat();
        near.write_all(&message).await.unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The machine, once there is one.
    pub async fn machine_made(&self) -> Arc<FakeMachine> {
        loop {
            if let Some(machine) = lock(&self.machine).clone() {
                return machine;
            }
            tokio::task::yield_now().await;
        }
    }

    pub fn fifo(&self, name: &str) -> String {
        let path = self.path(name);
        mkfifo(&path, Mode::from_bits_retain(0o600)).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// A bundle whose init process is `sh -c script`.
    pub fn bundle(&self, id: &str, script: &str) -> String {
        self.bundle_of(id, json!(["/bin/sh", "-c", script]))
    }

    /// A bundle whose init process is `args`.
    pub fn bundle_of(&self, id: &str, args: serde_json::Value) -> String {
        let bundle = self.path(id);
        std::fs::create_dir_all(&bundle).unwrap();
        let mut process = process("");
        process["args"] = args;
        let spec = json!({
            "ociVersion": "1.0.2",
            "root": {"path": "/"},
            "process": process,
            "annotations": self.annotations,
            "mounts": self.mounts,
            "linux": {"resources": self.resources, "devices": self.devices},
        });
        std::fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        bundle.to_str().unwrap().to_owned()
    }

    pub async fn create(&self, id: &str, script: &str) -> ttrpc::Result<CreateTaskResponse> {
        let request = CreateTaskRequest {
            id: id.into(),
            bundle: self.bundle(id, script),
            ..Default::default()
        };
        self.client.create(context(), &request).await
    }

    pub async fn run(&self, id: &str, script: &str) {
        self.create(id, script).await.unwrap();
        self.start(id, "").await.unwrap();
    }

    pub async fn start(&self, id: &str, exec_id: &str) -> ttrpc::Result<StartResponse> {
        let request = StartRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.client.start(context(), &request).await
    }

    pub async fn wait(&self, id: &str, exec_id: &str) -> u32 {
        let request = WaitRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        let response = self.client.wait(context(), &request).await.unwrap();
        assert!(response.exited_at.is_some());
        response.exit_status
    }

    pub async fn kill(&self, id: &str, exec_id: &str) -> ttrpc::Result<Empty> {
        let request = KillRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            signal: 9,
            ..Default::default()
        };
        self.client.kill(context(), &request).await
    }

    pub async fn delete(&self, id: &str, exec_id: &str) -> ttrpc::Result<DeleteResponse> {
        let request = DeleteRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.client.delete(context(), &request).await
    }

    pub async fn exec(&self, id: &str, exec_id: &str, script: &str) -> ttrpc::Result<Empty> {
        let request = exec_request(id, exec_id, script);
        self.client.exec(context(), &request).await
    }

    pub async fn status(&self, id: &str) -> Status {
        let request = StateRequest {
            id: id.into(),
            ..Default::default()
        };
        let state = self.client.state(context(), &request).await.unwrap();
        state.status.unwrap()
    }

    /// Writes all of a container's input, as a client that then goes away.
    pub async fn feed(&self, id: &str, stdin: &str, input: &str) {
        let mut writer = pipe::OpenOptions::new().open_sender(stdin).unwrap();
        writer.write_all(input.as_bytes()).await.unwrap();
        drop(writer);
        self.close_input(id, "").await.unwrap();
    }

    pub async fn pause(&self, id: &str) -> ttrpc::Result<Empty> {
        let request = PauseRequest {
            id: id.into(),
            ..Default::default()
        };
        self.client.pause(context(), &request).await
    }

    pub async fn resume(&self, id: &str) -> ttrpc::Result<Empty> {
        let request = ResumeRequest {
            id: id.into(),
            ..Default::default()
        };
        self.client.resume(context(), &request).await
    }

    pub async fn update(&self, id: &str, resources: &serde_json::Value) -> ttrpc::Result<Empty> {
        let request = UpdateTaskRequest {
            id: id.into(),
            resources: json_any(&resources.to_string()),
            ..Default::default()
        };
        self.client.update(context(), &request).await
    }

    pub async fn stats(&self, id: &str) -> ttrpc::Result<StatsResponse> {
        let request = StatsRequest {
            id: id.into(),
            ..Default::default()
        };
        self.client.stats(context(), &request).await
    }

    pub async fn pids(&self, id: &str) -> ttrpc::Result<PidsResponse> {
        let request = PidsRequest {
            id: id.into(),
            ..Default::default()
        };
        self.client.pids(context(), &request).await
    }

    /// Has a terminal be 120 columns wide and 40 lines high.
    pub async fn resize(&self, id: &str, exec_id: &str) -> ttrpc::Result<Empty> {
        let request = ResizePtyRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            width: 120,
            height: 40,
            ..Default::default()
        };
        self.client.resize_pty(context(), &request).await
    }

    pub async fn close_input(&self, id: &str, exec_id: &str) -> ttrpc::Result<Empty> {
        let request = CloseIORequest {
            id: id.into(),
            exec_id: exec_id.into(),
            stdin: true,
            ..Default::default()
        };
        self.client.close_io(context(), &request).await
    }

    async fn next_event(&mut self) -> Envelope {
        let event = tokio::time::timeout(Duration::from_secs(10), self.events.recv());
        event.await.unwrap().unwrap()
    }

    /// The next events, in their order.
    pub async fn expect(&mut self, topics: &[&str]) {
        for topic in topics {
            assert_eq!(self.next_event().await.topic, format!("/tasks/{topic}"));
        }
    }

    /// The next event, as containerd unpacks it.
    pub async fn event<E: TaskEvent>(&mut self) -> E {
        let envelope = self.next_event().await;
        assert_eq!(envelope.topic, E::TOPIC);
        assert_eq!(envelope.namespace, "test");
        assert!(envelope.timestamp.is_some());
        let event = envelope.event.unwrap();
        assert_eq!(event.type_url, E::descriptor().full_name());
        E::parse_from_bytes(&event.value).unwrap()
    }
}

async fn connect(pod: &Arc<Pod>) -> (Client, Server) {
    let (near, server) = connection(pod).await;
    (Client::new(Socket::new(near)), server)
}

async fn connection(pod: &Arc<Pod>) -> (UnixStream, Server) {
    let (near, far) = UnixStream::pair().unwrap();
    let mut server = Server::new()
        .add_listener(Listener::new(futures::stream::iter([Ok(far)])))
        .register_service(service::create(pod))
        .register_service(sandboxed::create(pod))
        .register_service(console::create(pod));
    server.start().await.unwrap();
    (near, server)
}

/// An exec of `sh -c script` without streams.
pub fn exec_request(id: &str, exec_id: &str, script: &str) -> ExecProcessRequest {
    ExecProcessRequest {
        id: id.into(),
        exec_id: exec_id.into(),
        spec: json_any(&process(script).to_string()),
        ..Default::default()
    }
}

/// JSON as containerd packs it.
pub fn json_any(text: &str) -> MessageField<Any> {
    MessageField::some(Any {
        value: text.as_bytes().to_vec(),
        ..Default::default()
    })
}

pub fn process(script: &str) -> serde_json::Value {
    json!({
        "cwd": "/",
        "user": {"uid": 0, "gid": 0},
        "args": ["/bin/sh", "-c", script],
        "env": ["PATH=/bin:/usr/bin"],
    })
}

/// The code and the words that a call was refused with.
pub fn refusal<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
        other => panic!("not a status: {other}"),
    }
}

/// What a call on the pod says.
pub fn of_pod(text: &str) -> String {
    format!("pod {SANDBOX_ID}: {text}")
}

pub fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> Code {
    refusal(result).0
}

/// Reads a FIFO to its end.
pub fn reader(path: &str) -> JoinHandle<String> {
    let mut reader = pipe::OpenOptions::new()
        .open_receiver(Path::new(path))
        .unwrap();
    tokio::spawn(async move {
        let mut text = String::new();
        reader.read_to_string(&mut text).await.unwrap();
        text
    })
}
