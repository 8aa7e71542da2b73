//! Starts `nacre-agent serve` and talks to it as the shim would.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use nacre_protocol::agent::{
    ContainerRequest, CreateContainerRequest, ExecRequest, ProcessRequest, SignalRequest, Stdio,
    Storage, WaitResponse,
};
use nacre_protocol::agent_ttrpc::AgentClient;
use nacre_protocol::guest::CONTAINERS_DIR;
use serde_json::{Value, json};
use ttrpc::asynchronous::transport::Socket;

const BUSYBOX: &str = "/bin/busybox";
const APPLETS: [&str; 9] = [
    "sh", "echo", "cat", "sleep", "id", "ls", "stty", "mount", "true",
];

/// The agent under test.
pub struct Agent {
    pub client: AgentClient,
    child: Child,
    rpc: UnixStream,
    streams: PathBuf,
    dir: tempfile::TempDir,
}

/// Why the tests cannot run here, if they cannot.
fn obstacle() -> Option<&'static str> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root");
    }
    if !Path::new(BUSYBOX).exists() {
        return Some("needs /bin/busybox (Debian: busybox-static)");
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let Some(root) = nacre_agent::cgroup::find_mount(&mounts) else {
        return Some("needs a cgroup2 mount");
    };
    let probe = root.join(format!("nacre-probe-{}", std::process::id()));
    if fs::create_dir(&probe).is_err() || fs::remove_dir(&probe).is_err() {
        return Some("needs a writable cgroup2 mount");
    }
    None
}

/// Starts an agent, or says what was skipped.
pub fn start() -> Option<Agent> {
    if let Some(obstacle) = obstacle() {
        eprintln!("skipped: {obstacle}");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    make_image(&dir.path().join("image"));
    let (near, far) = UnixStream::pair().unwrap();
    let streams = dir.path().join("streams.sock");
    let listener = UnixListener::bind(&streams).unwrap();
    let (rpc_fd, streams_fd) = (far.as_raw_fd(), listener.as_raw_fd());
    let mut command = Command::new(env!("CARGO_BIN_EXE_nacre-agent"));
    command
        .args(["serve", "--rpc-fd", "100", "--streams-fd", "101", "--root"])
        .arg(dir.path().join("run"));
    // SAFETY: the closure only makes system calls on descriptors that stay open.
    unsafe {
        command.pre_exec(move || {
            for (from, to) in [(rpc_fd, 100), (streams_fd, 101)] {
                nacre_agent::engine::sys::dup_to(BorrowedFd::borrow_raw(from), to)?;
            }
            Ok(())
        });
    }
    let child = command.spawn().unwrap();
    let rpc = near.try_clone().unwrap();
    near.set_nonblocking(true).unwrap();
    let near = tokio::net::UnixStream::from_std(near).unwrap();
    let client = AgentClient::new(ttrpc::r#async::Client::new(Socket::new(near)));
    Some(Agent {
        client,
        child,
        rpc,
        streams,
        dir,
    })
}

fn make_image(root: &Path) {
    for name in ["bin", "etc", "proc", "sys", "dev", "tmp", "data"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    fs::copy(BUSYBOX, root.join("bin/busybox")).unwrap();
    for applet in APPLETS {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "u:x:1000:1000::/home/u:/bin/sh\n").unwrap();
    fs::write(root.join("etc/not-a-program"), "text\n").unwrap();
    symlink("../run/resolv.conf", root.join("etc/resolv.conf")).unwrap();
}

/// A timeout that only a hanging test reaches.
pub fn context() -> ttrpc::context::Context {
    ttrpc::context::with_duration(std::time::Duration::from_secs(30))
}

/// An OCI process.
pub fn process(args: &[&str]) -> Value {
    let caps = ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID"];
    json!({
        "args": args,
        "env": ["PATH=/bin", "TERM=xterm"],
        "cwd": "/",
        "user": {"uid": 0, "gid": 0},
        "noNewPrivileges": true,
        "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 512, "hard": 512}],
    })
}

/// A specification like containerd's.
pub fn spec(id: &str, args: &[&str]) -> Value {
    json!({
        "ociVersion": "1.2.0",
        "hostname": "box",
        "root": {"path": format!("{CONTAINERS_DIR}/{id}/rootfs")},
        "process": process(args),
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
        ],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"}],
            "maskedPaths": ["/proc/version", "/proc/scsi", "/no/such/path"],
            "readonlyPaths": ["/proc/sys", "/proc/bus"],
            "resources": {"devices": [{"allow": false, "access": "rwm"}], "pids": {"limit": 100}},
            "seccomp": {
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
                "syscalls": [{"names": ["sethostname"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}],
            },
        },
    })
}

/// A device for a specification, like /dev/null, in a place that the image does not have.
pub fn outside_of_dev() -> Value {
    json!([{
        "path": "/volumes/void", "type": "c", "major": 1, "minor": 3, "fileMode": 0o666, "uid": 5,
        "gid": 6,
    }])
}

/// The shim's ends of a process's streams.
pub struct Ends {
    pub stdin: UnixStream,
    pub stdout: UnixStream,
    pub stderr: Option<UnixStream>,
}

impl Ends {
    /// All of standard output; blocks until the agent closes it.
    pub fn stdout(&mut self) -> String {
        read_all(&mut self.stdout)
    }

    /// All of standard error.
    pub fn stderr(&mut self) -> String {
        self.stderr.as_mut().map(read_all).unwrap_or_default()
    }

    /// Ends standard input.
    pub fn close_stdin(&self) {
        self.stdin.shutdown(std::net::Shutdown::Write).unwrap();
    }
}

fn read_all(stream: &mut UnixStream) -> String {
    let mut text = Vec::new();
    stream.read_to_end(&mut text).unwrap();
    String::from_utf8(text).unwrap()
}

impl Agent {
    fn stream(&self, id: u64) -> UnixStream {
        let mut stream = UnixStream::connect(&self.streams).unwrap();
        stream.write_all(&id.to_le_bytes()).unwrap();
        stream
    }

    /// Three streams with ids from `first` on.
    pub fn streams(&self, first: u64) -> (Ends, Stdio) {
        let ends = Ends {
            stdin: self.stream(first),
            stdout: self.stream(first + 1),
            stderr: Some(self.stream(first + 2)),
        };
        let stdio = Stdio {
            stdin: first,
            stdout: first + 1,
            stderr: first + 2,
            ..Stdio::default()
        };
        (ends, stdio)
    }

    /// Two streams and a terminal.
    pub fn terminal(&self, first: u64) -> (Ends, Stdio) {
        let ends = Ends {
            stdin: self.stream(first),
            stdout: self.stream(first + 1),
            stderr: None,
        };
        let stdio = Stdio {
            stdin: first,
            stdout: first + 1,
            terminal: true,
            width: 91,
            height: 33,
            ..Stdio::default()
        };
        (ends, stdio)
    }

    pub async fn create(&self, id: &str, spec: &Value, stdio: Stdio) -> ttrpc::Result<u32> {
        let request = self.creation(id, spec, stdio);
        let started = self.client.create_container(context(), &request).await?;
        Ok(started.pid)
    }

    /// The request that makes a container.
    pub fn creation(&self, id: &str, spec: &Value, stdio: Stdio) -> CreateContainerRequest {
        let image = self.dir.path().join("image");
        CreateContainerRequest {
            container_id: id.into(),
            spec: serde_json::to_vec(spec).unwrap(),
            storages: vec![Storage {
                source: image.to_str().unwrap().into(),
                target: format!("{CONTAINERS_DIR}/{id}/rootfs"),
                options: vec!["bind".into()],
                ..Storage::default()
            }],
            files: vec![nacre_protocol::agent::File {
                path: format!("{CONTAINERS_DIR}/{id}/files/resolv.conf"),
                mode: 0o644,
                contents: b"nameserver 192.0.2.1\n".to_vec(),
                ..Default::default()
            }],
            stdio: Some(stdio).into(),
            bundle: "/host/bundle".into(),
            ..CreateContainerRequest::default()
        }
    }

    pub async fn start(&self, id: &str) -> ttrpc::Result<()> {
        let request = container(id);
        self.client.start_container(context(), &request).await?;
        Ok(())
    }

    /// Creates and starts; panics on errors.
    pub async fn run(&self, id: &str, spec: &Value, first_stream: u64) -> Ends {
        let (ends, stdio) = self.streams(first_stream);
        self.create(id, spec, stdio).await.unwrap();
        self.start(id).await.unwrap();
        ends
    }

    pub async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: &Value,
        stdio: Stdio,
    ) -> ttrpc::Result<u32> {
        let request = ExecRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            process: serde_json::to_vec(process).unwrap(),
            stdio: Some(stdio).into(),
            ..ExecRequest::default()
        };
        Ok(self.client.exec(context(), &request).await?.pid)
    }

    pub async fn wait(&self, id: &str, exec_id: &str) -> WaitResponse {
        let request = process_request(id, exec_id);
        self.client.wait(context(), &request).await.unwrap()
    }

    pub async fn kill(&self, id: &str, signal: u32, all: bool) -> ttrpc::Result<()> {
        let request = SignalRequest {
            container_id: id.into(),
            signal,
            all,
            ..SignalRequest::default()
        };
        self.client.signal(context(), &request).await?;
        Ok(())
    }

    pub async fn delete(&self, id: &str) -> ttrpc::Result<()> {
        let request = container(id);
        self.client.delete_container(context(), &request).await?;
        Ok(())
    }

    /// A file of the image, which is what containers write to.
    pub fn file(&self, path: &str) -> PathBuf {
        self.dir.path().join("image").join(path)
    }

    /// Makes the kernel spare or prefer the agent when memory runs out.
    pub fn set_oom_score(&self, score: i32) {
        let path = format!("/proc/{}/oom_score_adj", self.child.id());
        fs::write(path, score.to_string()).unwrap();
    }

    /// Whether the container's directory is gone.
    pub fn is_clean(&self, id: &str) -> bool {
        let run = self.dir.path().join("run/containers");
        !run.join(id).exists() && self.dir.path().join("image/bin/busybox").exists()
    }
}

impl Drop for Agent {
    /// The broken connection ends the agent and all it made.
    fn drop(&mut self) {
        let _ = self.rpc.shutdown(std::net::Shutdown::Both);
        let status = self.child.wait().unwrap();
        if !std::thread::panicking() {
            assert!(status.success(), "agent: {status}");
        }
    }
}

pub fn container(id: &str) -> ContainerRequest {
    ContainerRequest {
        container_id: id.into(),
        ..ContainerRequest::default()
    }
}

pub fn process_request(id: &str, exec_id: &str) -> ProcessRequest {
    ProcessRequest {
        container_id: id.into(),
        exec_id: exec_id.into(),
        ..ProcessRequest::default()
    }
}

/// Code and message of an error.
pub fn status(error: &ttrpc::Error) -> (ttrpc::Code, String) {
    match error {
        ttrpc::Error::RpcStatus(status) => {
            (status.code.enum_value_or_default(), status.message.clone())
        }
        other => panic!("not a status: {other}"),
    }
}
