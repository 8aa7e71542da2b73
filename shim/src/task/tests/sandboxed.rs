//! A pod's sandbox by each of containerd's two APIs: what both have in common, and
//! what is only the Sandbox API's.

use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::api::*;
use containerd_shim_protos::sandbox_api::*;
use nacre_protocol::cri::{DNSConfig, PodSandboxConfig};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde_json::json;
use ttrpc::Code;

use super::fixture::*;
use super::{real_agent, volumes};
use crate::machine::Machine;
use crate::machine::fake::{FakeHost, FakeMachine};
use crate::sandbox::{Api, Sandbox};
use crate::task::lock;
use crate::task::pod::Entry;

const POD: &str = "pod";
const METRICS: &str = "io.containerd.cgroups.v2.Metrics";
/// Time for what takes none.
const SOON: Duration = Duration::from_secs(5);

/// containerd's two ways with a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// The `podsandbox` controller: a container like another, by its annotations.
    Task,
    /// `sandboxer = "shim"`.
    Sandbox,
}

const MODES: [Mode; 2] = [Mode::Task, Mode::Sandbox];

/// A pod in one of them.
struct Scene {
    fixture: Fixture,
    mode: Mode,
}

impl Scene {
    async fn new(mode: Mode) -> Self {
        Self::on(mode, FakeHost::scripted()).await
    }

    async fn on(mode: Mode, host: FakeHost) -> Self {
        let fixture = Fixture::on(host).await;
        Self { fixture, mode }
    }

    async fn create(&mut self) {
        match self.mode {
            Mode::Task => {
                self.fixture.annotations = json!({"io.kubernetes.cri.container-type": "sandbox"});
                self.fixture.create(POD, "exit 1").await.unwrap();
                self.fixture.annotations = json!({});
            }
            Mode::Sandbox => {
                let config = PodSandboxConfig::default();
                create(&self.fixture, &config).await.unwrap();
            }
        }
    }

    /// The pod's host pid.
    async fn start(&self) -> u32 {
        match self.mode {
            Mode::Task => self.fixture.start(POD, "").await.unwrap().pid,
            Mode::Sandbox => start(&self.fixture).await.unwrap().pid,
        }
    }

    async fn run(mode: Mode) -> Self {
        let mut scene = Self::new(mode).await;
        scene.create().await;
        scene.start().await;
        scene
    }

    async fn is_ready(&self) -> bool {
        match self.mode {
            Mode::Task => self.fixture.status(POD).await == Status::RUNNING,
            Mode::Sandbox => match status(&self.fixture).await.state.as_str() {
                "SANDBOX_READY" => true,
                "SANDBOX_NOTREADY" => false,
                other => panic!("no state: {other}"),
            },
        }
    }

    async fn wait(&self) -> u32 {
        match self.mode {
            Mode::Task => self.fixture.wait(POD, "").await,
            Mode::Sandbox => {
                let exit = wait(&self.fixture).await.unwrap();
                assert!(exit.exited_at.is_some());
                exit.exit_status
            }
        }
    }

    async fn metrics(&self) -> Any {
        match self.mode {
            Mode::Task => {
                let request = StatsRequest {
                    id: POD.into(),
                    ..Default::default()
                };
                let stats = self.fixture.client.stats(context(), &request).await;
                stats.unwrap().stats.unwrap()
            }
            Mode::Sandbox => {
                let answer = metrics(&self.fixture).await.unwrap();
                assert_eq!(answer.metrics.id, POD);
                assert!(answer.metrics.timestamp.is_some());
                answer.metrics.data.clone().unwrap()
            }
        }
    }

    /// `StopPodSandbox`.
    async fn stop(&self) {
        match self.mode {
            Mode::Task => {
                self.fixture.kill(POD, "").await.unwrap();
            }
            Mode::Sandbox => stop(&self.fixture).await.unwrap(),
        }
    }

    /// `RemovePodSandbox`.
    async fn remove(&self) {
        match self.mode {
            Mode::Task => {
                self.fixture.delete(POD, "").await.unwrap();
                task_shutdown(&self.fixture, POD).await;
            }
            Mode::Sandbox => shutdown(&self.fixture).await.unwrap(),
        }
        let ended = tokio::time::timeout(SOON, self.fixture.pod.ended());
        ended.await.expect("the shim ends");
    }

    fn machine(&self) -> std::sync::Arc<FakeMachine> {
        lock(&self.fixture.machine).clone().unwrap()
    }
}

fn options(config: &PodSandboxConfig) -> MessageField<Any> {
    MessageField::some(Any {
        type_url: "runtime.v1.PodSandboxConfig".into(),
        value: config.write_to_bytes().unwrap(),
        ..Default::default()
    })
}

async fn create(fixture: &Fixture, config: &PodSandboxConfig) -> ttrpc::Result<()> {
    let request = CreateSandboxRequest {
        sandbox_id: POD.into(),
        bundle_path: fixture.path(POD).display().to_string(),
        options: options(config),
        ..Default::default()
    };
    let created = fixture.sandbox.create_sandbox(context(), &request).await;
    created.map(drop)
}

/// A call about the pod.
macro_rules! calls {
    ($($name:ident: $method:ident($request:ident) -> $answer:ty;)*) => {
        $(async fn $name(fixture: &Fixture) -> ttrpc::Result<$answer> {
            let request = $request { sandbox_id: POD.into(), ..Default::default() };
            fixture.sandbox.$method(context(), &request).await
        })*
    };
}

calls! {
    start: start_sandbox(StartSandboxRequest) -> StartSandboxResponse;
    platform: platform(PlatformRequest) -> PlatformResponse;
    wait: wait_sandbox(WaitSandboxRequest) -> WaitSandboxResponse;
    try_status: sandbox_status(SandboxStatusRequest) -> SandboxStatusResponse;
    ping: ping_sandbox(PingRequest) -> PingResponse;
    metrics: sandbox_metrics(SandboxMetricsRequest) -> SandboxMetricsResponse;
}

async fn status(fixture: &Fixture) -> SandboxStatusResponse {
    try_status(fixture).await.unwrap()
}

async fn stop(fixture: &Fixture) -> ttrpc::Result<()> {
    let request = StopSandboxRequest {
        sandbox_id: POD.into(),
        ..Default::default()
    };
    let stopped = fixture.sandbox.stop_sandbox(context(), &request).await;
    stopped.map(drop)
}

async fn shutdown(fixture: &Fixture) -> ttrpc::Result<()> {
    let request = ShutdownSandboxRequest {
        sandbox_id: POD.into(),
        ..Default::default()
    };
    let ended = fixture.sandbox.shutdown_sandbox(context(), &request).await;
    ended.map(drop)
}

async fn task_shutdown(fixture: &Fixture, id: &str) {
    let request = ShutdownRequest {
        id: id.into(),
        ..Default::default()
    };
    fixture.client.shutdown(context(), &request).await.unwrap();
}

#[tokio::test]
async fn a_pod_s_life() {
    for mode in MODES {
        let mut scene = Scene::new(mode).await;
        scene.create().await;
        assert!(!scene.is_ready().await, "{mode:?}");
        assert_eq!(scene.start().await, std::process::id(), "the machine's");
        assert!(scene.is_ready().await, "{mode:?}");
        assert_eq!(scene.metrics().await.type_url, METRICS);
        scene.fixture.run("init", "exit 4").await;
        assert_eq!(scene.fixture.wait("init", "").await, 4);
        scene.fixture.delete("init", "").await.unwrap();
        scene.fixture.run("app", "sleep 60").await;
        scene.fixture.kill("app", "").await.unwrap();
        assert_eq!(scene.fixture.wait("app", "").await, 137);
        scene.fixture.delete("app", "").await.unwrap();
        assert!(scene.is_ready().await, "{mode:?}");
        scene.stop().await;
        assert_eq!(scene.wait().await, 137);
        assert!(!scene.is_ready().await, "{mode:?}");
        scene.remove().await;
    }
}

#[tokio::test]
async fn the_machine_s_death_is_the_pod_s() {
    for mode in MODES {
        let scene = Scene::run(mode).await;
        scene.fixture.run("app", "sleep 60").await;
        scene.machine().kill();
        assert_eq!(scene.wait().await, 137);
        assert!(!scene.is_ready().await, "{mode:?}");
        assert_eq!(scene.fixture.wait("app", "").await, 137);
        scene.fixture.delete("app", "").await.unwrap();
        scene.remove().await;
    }
}

/// The machine of a pod whose network is not there yet boots with its start.
#[tokio::test]
async fn start_boots_what_create_could_not() {
    for mode in MODES {
        let mut host = FakeHost::scripted();
        host.knows_network = false;
        let mut scene = Scene::on(mode, host).await;
        scene.create().await;
        let early = scene.fixture.create("app", "exit 4").await;
        assert_eq!(code(early), Code::FAILED_PRECONDITION, "{mode:?}");
        scene.start().await;
        scene.fixture.run("app", "exit 4").await;
        assert_eq!(scene.fixture.wait("app", "").await, 4);
    }
}

/// Limits are the Task API's, whichever way the sandbox came.
#[tokio::test]
async fn the_machine_grows_with_a_container() {
    let memory = |mib: u64| json!({"memory": {"limit": mib << 20}});
    for mode in MODES {
        let mut scene = Scene::run(mode).await;
        scene.fixture.resources = memory(64);
        scene.fixture.run("app", "sleep 60").await;
        scene.fixture.update("app", &memory(512)).await.unwrap();
        let journal = lock(&scene.fixture.journal).clone();
        let grown = "machine +256".to_owned();
        assert!(journal.contains(&grown), "{mode:?}: {journal:?}");
    }
}

/// Nobody waits for a container that is being made, and stopping the pod ends that.
#[tokio::test]
async fn a_slow_create_holds_up_nobody() {
    for mode in MODES {
        let scene = Scene::run(mode).await;
        scene.fixture.run("app", "sleep 60").await;
        let machine = scene.machine();
        machine.hang();
        let others = async {
            machine.held(1).await;
            assert!(scene.is_ready().await);
            assert_eq!(scene.metrics().await.type_url, METRICS);
            assert_eq!(scene.fixture.status("app").await, Status::RUNNING);
            match mode {
                Mode::Task => machine.kill(),
                Mode::Sandbox => stop(&scene.fixture).await.unwrap(),
            }
        };
        let both = async { tokio::join!(scene.fixture.create("slow", "true"), others) };
        let (created, ()) = tokio::time::timeout(SOON, both).await.expect("in time");
        assert_eq!(code(created), Code::UNAVAILABLE, "{mode:?}");
        assert_eq!(scene.fixture.wait("app", "").await, 137);
    }
}

/// A caller that gives up has containerd delete what it does not have yet: when it is
/// there it goes at once, and keeps no pod alive.
#[tokio::test]
async fn a_create_that_was_given_up_leaves_nothing() {
    for mode in MODES {
        let scene = Scene::run(mode).await;
        let machine = scene.machine();
        machine.hang();
        let given_up = async {
            machine.held(1).await;
            let deleted = scene.fixture.delete("slow", "").await;
            assert_eq!(code(deleted), Code::NOT_FOUND, "{mode:?}");
            machine.recover();
        };
        let both = async { tokio::join!(scene.fixture.create("slow", "sleep 60"), given_up) };
        let (created, ()) = tokio::time::timeout(SOON, both).await.expect("in time");
        assert_eq!(code(created), Code::FAILED_PRECONDITION, "{mode:?}");
        assert_eq!(
            code(scene.fixture.delete("slow", "").await),
            Code::NOT_FOUND
        );
        scene.fixture.run("slow", "exit 4").await;
        assert_eq!(scene.fixture.wait("slow", "").await, 4);
        scene.fixture.delete("slow", "").await.unwrap();
        scene.stop().await;
        scene.remove().await;
    }
}

/// The same of the pod's first container, for which the machine was made: containerd then
/// wants the shim to end.
#[tokio::test]
async fn a_pod_that_was_given_up_ends() {
    let mut host = FakeHost::scripted();
    host.hangs = true;
    let fixture = Fixture::on(host).await;
    let given_up = async {
        let machine = fixture.machine_made().await;
        // The first ping and the container.
        machine.held(2).await;
        assert_eq!(code(fixture.delete("slow", "").await), Code::NOT_FOUND);
        task_shutdown(&fixture, "slow").await;
        fixture.pod.ended().await;
    };
    let both = async { tokio::join!(fixture.create("slow", "sleep 60"), given_up) };
    let (created, ()) = tokio::time::timeout(SOON, both).await.expect("in time");
    assert_eq!(code(created), Code::UNAVAILABLE);
}

/// The same of a sandbox by the other API: it is gone at once, and as long as it is not,
/// it is no reason for the pod to stay.
#[tokio::test]
async fn a_sandbox_that_was_given_up_keeps_no_pod() {
    let fixture = Fixture::new().await;
    // Meanwhile another is at making the machine, and does not.
    let (give_way, way) = tokio::sync::oneshot::channel::<()>();
    let other = fixture.pod.sandbox.get_or_try_init(|| async {
        way.await.unwrap();
        Err::<Arc<Sandbox>, _>(())
    });
    let given_up = async {
        while lock(&fixture.pod.containers).is_empty() {
            tokio::task::yield_now().await;
        }
        assert_eq!(code(fixture.delete(POD, "").await), Code::NOT_FOUND);
        give_way.send(()).unwrap();
    };
    let config = PodSandboxConfig::default();
    let all = async { tokio::join!(other, create(&fixture, &config), given_up) };
    let (_, created, ()) = tokio::time::timeout(SOON, all).await.expect("in time");
    assert_eq!(code(created), Code::FAILED_PRECONDITION);
    assert!(lock(&fixture.pod.containers).is_empty());

    let scene = Scene::run(Mode::Sandbox).await;
    let pod = &scene.fixture.pod;
    let sandbox = pod.find(POD, Api::Sandbox).unwrap();
    lock(&pod.containers).insert(POD.into(), Entry::GivenUp(sandbox));
    task_shutdown(&scene.fixture, POD).await;
    let ended = tokio::time::timeout(SOON, pod.ended());
    ended.await.expect("the shim ends");
}

#[tokio::test]
async fn sandbox_tells_what_it_is() {
    let scene = Scene::run(Mode::Sandbox).await;
    let platform = platform(&scene.fixture).await.unwrap().platform;
    assert_eq!((&*platform.os, &*platform.architecture), ("linux", "amd64"));
    ping(&scene.fixture).await.unwrap();
    let running = status(&scene.fixture).await;
    assert_eq!(running.sandbox_id, POD);
    assert_eq!(running.pid, std::process::id());
    assert!(running.created_at.is_some() && running.exited_at.is_none());
    assert!(running.info.is_empty(), "only where it is asked for");
    let request = SandboxStatusRequest {
        sandbox_id: POD.into(),
        verbose: true,
        ..Default::default()
    };
    let verbose = scene.fixture.sandbox.sandbox_status(context(), &request);
    let info = &verbose.await.unwrap().info["info"];
    let info: serde_json::Value = serde_json::from_str(info).unwrap();
    let expected = json!({"pid": std::process::id(), "processStatus": "running"});
    assert_eq!(info, expected);

    scene.stop().await;
    let stopped = status(&scene.fixture).await;
    assert_eq!(stopped.pid, 0);
    assert_eq!(stopped.created_at, running.created_at);
    assert!(stopped.exited_at.is_some());
    assert_eq!(code(ping(&scene.fixture).await), Code::UNAVAILABLE);
}

#[tokio::test]
async fn calls_may_be_repeated() {
    let scene = Scene::run(Mode::Sandbox).await;
    let fixture = &scene.fixture;
    let config = PodSandboxConfig::default();
    assert_eq!(
        code(create(fixture, &config).await),
        Code::ALREADY_EXISTS,
        "and that leaves it alone"
    );
    assert_eq!(code(start(fixture).await), Code::FAILED_PRECONDITION);
    assert!(scene.is_ready().await);
    for _ in 0..2 {
        stop(fixture).await.unwrap();
        assert_eq!(scene.wait().await, 137);
    }
    assert_eq!(code(start(fixture).await), Code::FAILED_PRECONDITION);
    let late = fixture.create("late", "true").await;
    assert_eq!(code(late), Code::UNAVAILABLE);
    for _ in 0..2 {
        shutdown(fixture).await.unwrap();
    }
}

#[tokio::test]
async fn mistakes_get_the_codes_containerd_expects() {
    let fixture = Fixture::new().await;
    let none = Code::NOT_FOUND;
    assert_eq!(code(start(&fixture).await), none);
    assert_eq!(code(platform(&fixture).await), none);
    assert_eq!(code(stop(&fixture).await), none);
    assert_eq!(code(wait(&fixture).await), none);
    assert_eq!(code(try_status(&fixture).await), none);
    assert_eq!(code(ping(&fixture).await), none);
    assert_eq!(code(metrics(&fixture).await), none);

    let good = CreateSandboxRequest {
        sandbox_id: POD.into(),
        options: options(&PodSandboxConfig::default()),
        ..Default::default()
    };
    let mut bad_id = good.clone();
    bad_id.sandbox_id = "../pod".into();
    let mut no_options = good.clone();
    no_options.options = MessageField::none();
    let mut other_options = good.clone();
    other_options.options.as_mut().unwrap().type_url = "containerd.runc.v1.Options".into();
    let mut garbage = good.clone();
    garbage.options.as_mut().unwrap().value = vec![0xff];
    for request in [bad_id, no_options, other_options, garbage] {
        let refused = fixture.sandbox.create_sandbox(context(), &request).await;
        assert_eq!(code(refused), Code::INVALID_ARGUMENT, "{request:?}");
    }
    // What failed can be tried again, and a URL is as good as a name.
    let mut url = good;
    url.options.as_mut().unwrap().type_url =
        "type.googleapis.com/runtime.v1.PodSandboxConfig".into();
    fixture
        .sandbox
        .create_sandbox(context(), &url)
        .await
        .unwrap();

    let with_container = Fixture::new().await;
    with_container.run("c", "sleep 60").await;
    let config = PodSandboxConfig::default();
    let refused = create(&with_container, &config).await;
    assert_eq!(code(refused), Code::ALREADY_EXISTS);
}

/// A sandbox that failed is shut down without having been there.
#[tokio::test]
async fn shim_without_a_sandbox_ends() {
    let fixture = Fixture::new().await;
    shutdown(&fixture).await.unwrap();
    let ended = tokio::time::timeout(SOON, fixture.pod.ended());
    ended.await.expect("the shim ends");
    let late = create(&fixture, &PodSandboxConfig::default()).await;
    assert_eq!(code(late), Code::UNAVAILABLE);
}

#[tokio::test]
async fn the_task_api_does_not_know_the_sandbox() {
    let mut scene = Scene::run(Mode::Sandbox).await;
    let fixture = &mut scene.fixture;
    let state = StateRequest {
        id: POD.into(),
        ..Default::default()
    };
    let pids = PidsRequest {
        id: POD.into(),
        ..Default::default()
    };
    let gone = Code::NOT_FOUND;
    assert_eq!(code(fixture.client.state(context(), &state).await), gone);
    assert_eq!(code(fixture.client.pids(context(), &pids).await), gone);
    assert_eq!(code(fixture.kill(POD, "").await), gone);
    assert_eq!(code(fixture.delete(POD, "").await), gone);
    assert_eq!(code(fixture.exec(POD, "e", "true").await), gone);
    assert_eq!(
        code(fixture.create(POD, "true").await),
        Code::ALREADY_EXISTS
    );
    // containerd asks for the pid of whatever shim it finds when it starts.
    let connect = ConnectRequest {
        id: POD.into(),
        ..Default::default()
    };
    let connect = fixture.client.connect(context(), &connect).await.unwrap();
    assert_eq!(connect.task_pid, std::process::id());

    fixture.run("app", "exit 4").await;
    assert_eq!(fixture.wait("app", "").await, 4);
    stop(fixture).await.unwrap();
    fixture.expect(&["create", "start", "exit"]).await;
    shutdown(fixture).await.unwrap();
    fixture.pod.publisher.flush().await;
    assert!(fixture.events.try_recv().is_err(), "of the app only");
}

/// containerd shuts a task down that could not be made, and a shim whose sandbox it
/// does not know.
#[tokio::test]
async fn shutdown_of_a_task_ends_no_pod_that_is_in_use() {
    let scene = Scene::run(Mode::Sandbox).await;
    let fixture = &scene.fixture;
    task_shutdown(fixture, "failed").await;
    assert!(scene.is_ready().await);
    fixture.run("app", "exit 4").await;
    task_shutdown(fixture, POD).await;
    assert!(scene.is_ready().await, "it has a container");
    assert_eq!(fixture.wait("app", "").await, 4);
    fixture.delete("app", "").await.unwrap();
    task_shutdown(fixture, "app").await;
    assert!(scene.is_ready().await, "the sandbox is in use");
    task_shutdown(fixture, POD).await;
    let ended = tokio::time::timeout(SOON, fixture.pod.ended());
    ended.await.expect("the shim ends");
}

/// What CRI makes in the other mode, as containers in a guest see it.
#[tokio::test]
async fn containers_find_the_pod_s_files_and_memory() {
    let Some(fixture) = real_agent::fixture().await else {
        return;
    };
    let config = PodSandboxConfig {
        hostname: "web".into(),
        dns_config: MessageField::some(DNSConfig {
            servers: vec!["192.0.2.53".into()],
            ..Default::default()
        }),
        ..Default::default()
    };
    create(&fixture, &config).await.unwrap();
    start(&fixture).await.unwrap();
    let shm = || vec![json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm"})];
    let script = "cat /etc/hostname /etc/resolv.conf; stat -c %a /etc/hosts; cat /etc/hosts; \
                  mkfifo /dev/shm/pipe; cat /dev/shm/pipe";
    let output = volumes::start(&fixture, "one", script, shm()).await;
    let script = "until [ -p /dev/shm/pipe ]; do :; done; echo through > /dev/shm/pipe";
    volumes::start(&fixture, "two", script, shm()).await;
    assert_eq!(fixture.wait("two", "").await, 0);
    assert_eq!(fixture.wait("one", "").await, 0);
    let hosts = std::fs::read_to_string("/etc/hosts").unwrap();
    let expected = format!("web\nnameserver 192.0.2.53\n644\n{hosts}through\n");
    volumes::printed(&output, &expected, SOON).await;
    stop(&fixture).await.unwrap();
    assert_eq!(wait(&fixture).await.unwrap().exit_status, 137);
    shutdown(&fixture).await.unwrap();
}
