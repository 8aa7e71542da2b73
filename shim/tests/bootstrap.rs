//! The shim's binary as containerd runs it: `start`, a call or two, `delete`.
//! No VM runs; what is tested is the daemon around it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use containerd_shim_protos::api::{
    ConnectRequest, CreateTaskRequest, DeleteResponse, ShutdownRequest,
};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::shim_async::{Client, TaskClient};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protobuf::Message;
use serde_json::{Value, json};
use ttrpc::context::with_duration;

struct Host {
    directory: tempfile::TempDir,
}

impl Host {
    /// `None`, with the reason on stderr, where the daemon cannot run.
    fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: the daemon leaves its mount namespace, which takes root");
            return None;
        }
        let host = Self {
            directory: tempfile::tempdir().unwrap(),
        };
        host.configure("run");
        std::fs::create_dir(host.path("bundle")).unwrap();
        host.describe(&json!([]), &json!({}));
        std::fs::create_dir(host.path("bundle/rootfs")).unwrap();
        Some(host)
    }

    /// Writes the bundle's config.json.
    fn describe(&self, namespaces: &Value, hooks: &Value) {
        let spec = json!({
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "linux": {"namespaces": namespaces},
            "hooks": hooks,
        });
        std::fs::write(self.path("bundle/config.json"), spec.to_string()).unwrap();
    }

    /// Makes the container. Its network is empty, so its machine does not boot yet.
    async fn create(&self, address: &str) -> ttrpc::Result<u32> {
        let client = TaskClient::new(Client::connect(address).await.unwrap());
        let request = CreateTaskRequest {
            id: "pod".into(),
            bundle: self.path("bundle").to_str().unwrap().into(),
            ..Default::default()
        };
        let context = with_duration(Duration::from_secs(30));
        client
            .create(context, &request)
            .await
            .map(|created| created.pid)
    }

    /// The shim that serves the pod.
    async fn daemon(&self, address: &str) -> Pid {
        let client = TaskClient::new(Client::connect(address).await.unwrap());
        let context = with_duration(Duration::from_secs(10));
        let request = ConnectRequest::default();
        let connected = client.connect(context, &request).await.unwrap();
        Pid::from_raw(connected.shim_pid.try_into().unwrap())
    }

    fn configure(&self, run_dir: &str) {
        let config = format!("run_dir = {:?}\n", self.path(run_dir));
        std::fs::write(self.path("nacre.toml"), config).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn run(&self, id: &str, action: &str, input: &[u8]) -> Vec<u8> {
        let output = self.output(id, action, input);
        assert!(output.status.success(), "{action}: {output:?}");
        output.stdout
    }

    fn output(&self, id: &str, action: &str, input: &[u8]) -> Output {
        let mut child = Command::new(env!("CARGO_BIN_EXE_containerd-shim-nacre-v2"))
            .args(["-namespace", "test", "-address", "/no/containerd.sock"])
            .args(["-publish-binary", "containerd", "-id", id, "-bundle"])
            .arg(self.path("bundle"))
            .arg(action)
            .current_dir(self.path("bundle"))
            .env("NACRE_CONFIG", self.path("nacre.toml"))
            .env_remove("TTRPC_ADDRESS")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        child.wait_with_output().unwrap()
    }

    fn start(&self, id: &str) -> String {
        let params = BootstrapParams {
            instance_id: id.into(),
            socket_dir: Some(self.path("s").to_str().unwrap().into()),
            ..Default::default()
        };
        let answer = self.run(id, "start", &params.write_to_bytes().unwrap());
        let result = BootstrapResult::parse_from_bytes(&answer).unwrap();
        assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
        result.address
    }

    fn run_dir(&self, id: &str) -> PathBuf {
        self.path("run").join("test").join(id)
    }

    fn log(&self, id: &str) -> String {
        std::fs::read_to_string(self.run_dir(id).join("log")).unwrap_or_default()
    }
}

/// Waits until the daemon's end of a connection closes, that is, until it is gone.
fn wait_for_end(connection: UnixStream) {
    connection
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let mut line = String::new();
    match BufReader::new(connection).read_line(&mut line) {
        Ok(0) => (),
        // A daemon that dies before it has accepted the connection resets it.
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => (),
        other => panic!("the daemon lives: {other:?}"),
    }
}

/// A list of one hook.
fn hook(script: &str) -> Value {
    json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"]}])
}

fn own_network() -> Value {
    json!([{"type": "network"}])
}

fn connect(address: &str) -> UnixStream {
    UnixStream::connect(address.strip_prefix("unix://").unwrap()).unwrap()
}

fn wait_until_gone(path: &Path) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while path.exists() {
        assert!(Instant::now() < deadline, "{} stays", path.display());
        std::thread::yield_now();
    }
}

#[tokio::test]
async fn a_daemon_serves_refuses_and_leaves_nothing() {
    let Some(host) = Host::new() else { return };
    let address = host.start("pod");
    assert_eq!(host.start("pod"), address, "a live daemon is found again");
    let witness = connect(&address);
    let client = TaskClient::new(Client::connect(&address).await.unwrap());
    let context = || with_duration(Duration::from_secs(10));

    let connected = client.connect(context(), &ConnectRequest::default()).await;
    assert_ne!(connected.unwrap().shim_pid, std::process::id());
    let create = CreateTaskRequest {
        id: "pod".into(),
        bundle: host.path("bundle").to_str().unwrap().into(),
        ..Default::default()
    };
    let refused = client.create(context(), &create).await.unwrap_err();
    let ttrpc::Error::RpcStatus(status) = refused else {
        panic!("{refused}: {}", host.log("pod"));
    };
    assert_eq!(status.code(), ttrpc::Code::INVALID_ARGUMENT, "{status}");
    assert!(status.message().contains("host's network"), "{status}");

    // The daemon may be gone before its answer is out.
    let _ = client
        .shutdown(context(), &ShutdownRequest::default())
        .await;
    wait_for_end(witness);
    wait_until_gone(&host.run_dir("pod"));
    assert!(!Path::new(address.strip_prefix("unix://").unwrap()).exists());
}

#[test]
fn delete_ends_a_daemon_and_can_be_repeated() {
    let Some(host) = Host::new() else { return };
    let address = host.start("pod");
    let witness = connect(&address);
    // What is configured since concerns later pods.
    host.configure("elsewhere");
    for _ in 0..2 {
        let answer = host.run("pod", "delete", b"");
        let response = DeleteResponse::parse_from_bytes(&answer).unwrap();
        assert_eq!(response.exit_status, 137);
    }
    wait_for_end(witness);
    assert!(!host.run_dir("pod").exists());
}

/// Later pods are refused for it; this one must not be kept by it.
#[test]
fn delete_ends_a_daemon_whose_configuration_was_broken_since() {
    let Some(host) = Host::new() else { return };
    let address = host.start("pod");
    let witness = connect(&address);
    std::fs::write(host.path("nacre.toml"), "run_dir = 3\n[[").unwrap();
    let answer = host.run("pod", "delete", b"");
    let response = DeleteResponse::parse_from_bytes(&answer).unwrap();
    assert_eq!(response.exit_status, 137);
    wait_for_end(witness);
    assert!(!host.run_dir("pod").exists());
}

/// As a hook of runc's: what it mounts is there for everyone.
#[tokio::test]
async fn hooks_run_among_the_host_s_mounts_and_undo_a_failed_create() {
    let Some(host) = Host::new() else { return };
    let mounts = "readlink /proc/self/ns/mnt";
    let hooks = json!({
        "createRuntime": hook(&format!("{mounts} > create; exit 3")),
        "poststop": hook(&format!("{mounts} > stop")),
    });
    host.describe(&own_network(), &hooks);
    let address = host.start("pod");
    let daemon = host.daemon(&address).await;
    let refused = host.create(&address).await.unwrap_err().to_string();
    assert!(refused.contains("exit status: 3"), "{refused}");
    let own = std::fs::read_link("/proc/self/ns/mnt").unwrap();
    for file in ["bundle/create", "bundle/stop"] {
        let of_hook = std::fs::read_to_string(host.path(file)).unwrap();
        assert_eq!(of_hook.trim(), own.to_str().unwrap(), "{file}");
    }
    assert_ne!(
        std::fs::read_link(format!("/proc/{daemon}/ns/mnt")).unwrap(),
        own
    );
    host.run("pod", "delete", b"");
}

/// A file system of its own over a directory, until this is dropped.
struct Small(PathBuf);

impl Small {
    const FILES: u32 = 16;

    fn mount(path: PathBuf) -> Self {
        let (kind, options) = ("tmpfs", format!("nr_inodes={}", Self::FILES));
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some(kind), &path, Some(kind), flags, Some(&*options)).unwrap();
        Self(path)
    }

    /// Leaves no file to be made.
    fn fill(&self) {
        let make = |number| File::create(self.0.join(format!("filling-{number}")));
        let refused = (0..Self::FILES).find_map(|number| make(number).err());
        assert_eq!(refused.unwrap().kind(), std::io::ErrorKind::StorageFull);
    }

    fn empty(&self) {
        for number in 0..Self::FILES {
            // There are not so many.
            let _ = std::fs::remove_file(self.0.join(format!("filling-{number}")));
        }
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH).unwrap();
    }
}

/// Full at the start, and full at the create: a hook whose counterpart would be forgotten
/// does not run.
#[tokio::test]
async fn a_bundle_that_is_full_is_refused() {
    let Some(host) = Host::new() else { return };
    let ran = host.path("ran");
    let hooks = json!({
        "createRuntime": hook(&format!("echo > {}", ran.display())),
        "poststop": hook("true"),
    });
    let bundle = Small::mount(host.path("bundle"));
    host.describe(&own_network(), &hooks);
    std::fs::create_dir(host.path("bundle/rootfs")).unwrap();
    bundle.fill();
    let refused = host.output("pod", "start", b"");
    assert!(!refused.status.success(), "{refused:?}");
    let said = String::from_utf8(refused.stderr).unwrap();
    for part in ["bundle/nacre-run-dir", "No space left on device"] {
        assert!(said.contains(part), "{said}");
    }
    host.run("pod", "delete", b"");
    assert!(!host.run_dir("pod").exists());

    bundle.empty();
    let address = host.start("pod");
    bundle.fill();
    let refused = host.create(&address).await.unwrap_err().to_string();
    for part in ["bundle/nacre-poststop", "No space left on device"] {
        assert!(refused.contains(part), "{refused}");
    }
    assert!(!ran.exists());
    host.run("pod", "delete", b"");
    assert!(!host.run_dir("pod").exists());
}

/// Nobody else is left to run them.
#[tokio::test]
async fn delete_after_a_crash_runs_poststop_once() {
    let Some(host) = Host::new() else { return };
    host.describe(&own_network(), &json!({"poststop": hook("cat >> stop")}));
    let address = host.start("pod");
    host.create(&address).await.unwrap();
    let witness = connect(&address);
    kill(host.daemon(&address).await, Signal::SIGKILL).unwrap();
    wait_for_end(witness);
    assert!(!host.path("bundle/stop").exists());
    for _ in 0..2 {
        host.run("pod", "delete", b"");
    }
    let state = std::fs::read(host.path("bundle/stop")).unwrap();
    let state: Value = serde_json::from_slice(&state).unwrap();
    assert_eq!(
        (&state["id"], &state["status"]),
        (&json!("pod"), &json!("stopped"))
    );
    assert!(!host.run_dir("pod").exists());
}

/// containerd logs it.
#[tokio::test]
async fn delete_says_on_stderr_what_went_wrong() {
    let Some(host) = Host::new() else { return };
    let failing = hook("echo no bridge >&2; exit 3");
    host.describe(&own_network(), &json!({"poststop": failing}));
    let address = host.start("pod");
    host.create(&address).await.unwrap();
    let witness = connect(&address);
    kill(host.daemon(&address).await, Signal::SIGKILL).unwrap();
    wait_for_end(witness);
    let output = host.output("pod", "delete", b"");
    assert!(output.status.success(), "{output:?}");
    DeleteResponse::parse_from_bytes(&output.stdout).unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("no bridge"), "{said:?}");

    std::fs::write(host.path("bundle/config.json"), "{").unwrap();
    let output = host.output("pod", "delete", b"");
    assert!(
        !output.status.success(),
        "hooks nobody knows of: {output:?}"
    );
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("bundle/config.json"), "{said:?}");
    std::fs::remove_file(host.path("bundle/config.json")).unwrap();
    let output = host.output("pod", "delete", b"");
    assert!(output.stderr.is_empty(), "{output:?}");
    assert!(output.status.success(), "{output:?}");
}

#[tokio::test]
async fn a_hook_that_hangs_does_not_keep_the_daemon() {
    let Some(host) = Host::new() else { return };
    let pipe = host.path("bundle/began");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let hooks = json!({"createRuntime": hook("exec > began; echo began; sleep 600; true")});
    host.describe(&own_network(), &hooks);
    let address = host.start("pod");
    let daemon = host.daemon(&address).await;
    let begin = Instant::now();
    let (created, rest) = tokio::join!(host.create(&address), async {
        let began = tokio::task::spawn_blocking(|| {
            let mut said = File::open(pipe).unwrap();
            said.read_exact(&mut [0; 6]).unwrap();
            said
        });
        let mut said = began.await.unwrap();
        kill(daemon, Signal::SIGTERM).unwrap();
        let rest = tokio::task::spawn_blocking(move || {
            let mut rest = String::new();
            said.read_to_string(&mut rest).map(|_| rest)
        });
        rest.await.unwrap().unwrap()
    });
    created.unwrap_err();
    assert_eq!(rest, "");
    // Far less than the hook might take.
    assert!(begin.elapsed() < Duration::from_secs(40));
    wait_until_gone(&host.run_dir("pod"));
}
