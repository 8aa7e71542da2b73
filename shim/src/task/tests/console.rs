//! `nacre console`'s service, called as that command calls it.

use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use nacre_protocol::agent;
use nacre_protocol::console::*;
use nix::poll::{PollFd, PollFlags, poll};
use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;
use ttrpc::Code;

use super::fixture::*;
use super::real_agent;
use crate::machine::fake::FakeHost;
use crate::machine::{Machine, Stop};
use crate::rundir::pidfd_open;
use crate::task::lock;

/// A pod with a console and a container.
async fn fixture() -> Fixture {
    let fixture = Fixture::on(FakeHost::with_console()).await;
    fixture.run("c", "exec sleep 60").await;
    fixture
}

/// The command's ends of the pipes.
struct Caller {
    request: RunRequest,
    stdin: pipe::Sender,
    stdout: BufReader<pipe::Receiver>,
    stderr: pipe::Receiver,
    /// Kept for the shim to open.
    shim_ends: (pipe::Receiver, pipe::Sender, pipe::Sender),
}

impl Caller {
    fn new() -> Self {
        let (stdin, shim_in) = pipe::pipe().unwrap();
        let (shim_out, stdout) = pipe::pipe().unwrap();
        let (shim_err, stderr) = pipe::pipe().unwrap();
        let request = RunRequest {
            pid: std::process::id(),
            stdin: shim_in.as_raw_fd().unsigned_abs(),
            stdout: shim_out.as_raw_fd().unsigned_abs(),
            stderr: shim_err.as_raw_fd().unsigned_abs(),
            ..Default::default()
        };
        Self {
            request,
            stdin,
            stdout: BufReader::new(stdout),
            stderr,
            shim_ends: (shim_in, shim_out, shim_err),
        }
    }

    fn run(&self, fixture: &Fixture) -> JoinHandle<ttrpc::Result<RunResponse>> {
        let (client, request) = (fixture.console.clone(), self.request.clone());
        tokio::spawn(async move { client.run(context(), &request).await })
    }

    async fn type_in(&mut self, text: &str) {
        self.stdin.write_all(text.as_bytes()).await.unwrap();
    }

    async fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).await.unwrap();
        line.trim().to_owned()
    }

    /// Reads until `text` has come.
    async fn until(&mut self, text: &str) {
        let mut seen = Vec::new();
        let read = async {
            while !seen.ends_with(text.as_bytes()) {
                seen.push(self.stdout.read_u8().await.unwrap());
            }
        };
        let read = tokio::time::timeout(Duration::from_secs(20), read).await;
        assert!(read.is_ok(), "no {text:?} in {}", seen.escape_ascii());
    }

    /// What comes until the end of both outputs.
    async fn rest(mut self) -> (String, String) {
        drop(self.shim_ends);
        let (mut stdout, mut stderr) = (String::new(), String::new());
        self.stdout.read_to_string(&mut stdout).await.unwrap();
        self.stderr.read_to_string(&mut stderr).await.unwrap();
        (stdout, stderr)
    }
}

/// What a console is refused with.
async fn refusal(fixture: &Fixture) -> (Code, String) {
    match Caller::new().run(fixture).await.unwrap().unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
        other => panic!("not a status: {other}"),
    }
}

#[tokio::test]
async fn pod_without_a_shell_says_what_must_be_set() {
    let fixture = Fixture::new().await;
    fixture.run("c", "exec sleep 60").await;
    let (code, message) = refusal(&fixture).await;
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(
        message.contains("debug_shell in /etc/nacre/nacre.toml"),
        "{message}"
    );
}

#[tokio::test]
async fn pod_without_a_guest() {
    let fixture = Fixture::on(FakeHost::with_console()).await;
    let (code, message) = refusal(&fixture).await;
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(message.contains("not booted"), "{message}");
}

#[tokio::test]
async fn shell_that_is_none_is_named() {
    let mut host = FakeHost::scripted();
    host.debug_shell = Some("/etc/passwd".into());
    let fixture = Fixture::on(host).await;
    fixture.run("c", "exec sleep 60").await;
    let (code, message) = refusal(&fixture).await;
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert_eq!(message, "debug_shell /etc/passwd: not a 64-bit ELF file");
}

#[tokio::test]
async fn input_runs_and_the_status_comes_back() {
    let mut fixture = fixture().await;
    let mut caller = Caller::new();
    let running = caller.run(&fixture);
    caller.type_in("echo out; echo err >&2; exit 5\n").await;
    assert_eq!(running.await.unwrap().unwrap().exit_status, 5);
    let (stdout, stderr) = caller.rest().await;
    assert_eq!((stdout.as_str(), stderr.as_str()), ("out\n", "err\n"));
    // containerd hears of its container and of nothing else.
    fixture.kill("c", "").await.unwrap();
    fixture.wait("c", "").await;
    fixture.delete("c", "").await.unwrap();
    fixture.expect(&["create", "start", "exit", "delete"]).await;
}

#[tokio::test]
async fn end_of_input_ends_the_shell_and_then_there_is_another() {
    let fixture = fixture().await;
    for _ in 0..2 {
        let mut caller = Caller::new();
        let running = caller.run(&fixture);
        caller.type_in("echo $((6 * 7))\n").await;
        assert_eq!(caller.line().await, "42");
        let Caller { stdin, .. } = caller;
        drop(stdin);
        assert_eq!(running.await.unwrap().unwrap().exit_status, 0);
        gone_from_the_guest(&fixture).await;
    }
}

/// Waits until the guest has no shell of this process.
async fn gone_from_the_guest(fixture: &Fixture) {
    let agent = fixture.pod.sandbox.get().unwrap().agent().unwrap();
    let request = agent::ProcessRequest {
        container_id: format!("console+{}", std::process::id()),
        ..Default::default()
    };
    let gone = async { while agent.wait(context(), &request).await.is_ok() {} };
    let gone = tokio::time::timeout(Duration::from_secs(10), gone);
    gone.await.unwrap();
}

#[tokio::test]
async fn process_has_one_console() {
    let fixture = fixture().await;
    let resize = ResizeRequest {
        pid: std::process::id(),
        ..Default::default()
    };
    let resized = fixture.console.resize(context(), &resize).await;
    assert_eq!(code(resized), Code::NOT_FOUND);
    let mut caller = Caller::new();
    let running = caller.run(&fixture);
    caller.type_in("echo ready\n").await;
    assert_eq!(caller.line().await, "ready");
    assert_eq!(refusal(&fixture).await.0, Code::ALREADY_EXISTS);
    fixture.console.resize(context(), &resize).await.unwrap();
    caller.type_in("exit\n").await;
    running.await.unwrap().unwrap();
}

#[tokio::test]
async fn caller_that_goes_away_takes_its_shell_with_it() {
    let fixture = fixture().await;
    let mut caller = Caller::new();
    let running = caller.run(&fixture);
    caller.type_in("echo $$; exec sleep 1000\n").await;
    let pid = caller.line().await.parse().unwrap();
    let shell = pidfd_open(pid).unwrap();
    running.abort();
    let Fixture { console, pod, .. } = fixture;
    drop((running, console));
    let died = tokio::task::spawn_blocking(move || {
        let mut fds = [PollFd::new(shell.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, 10_000u16).unwrap()
    });
    assert_eq!(died.await.unwrap(), 1);
    assert!(pod.container("c").is_ok());
}

#[tokio::test]
async fn machine_that_dies_ends_the_call() {
    let fixture = fixture().await;
    let mut caller = Caller::new();
    let running = caller.run(&fixture);
    caller.type_in("echo ready\n").await;
    assert_eq!(caller.line().await, "ready");
    lock(&fixture.machine).clone().unwrap().kill();
    assert_eq!(code(running.await.unwrap()), Code::UNAVAILABLE);
    // And so it is from then on.
    let (code, message) = refusal(&fixture).await;
    assert_eq!(code, Code::UNAVAILABLE);
    assert_eq!(
        message,
        format!("the virtual machine is gone: {}", Stop::Died)
    );
}

/// On the agent of guests: what the shell is in, and its terminal.
#[tokio::test]
async fn shell_has_the_guest_s_namespaces_and_a_terminal() {
    let Some(fixture) = real_agent::fixture().await else {
        return;
    };
    let sleep = json!(["sleep", "60"]);
    real_agent::create(&fixture, "c", sleep).await.unwrap();
    let mut caller = Caller::new();
    caller.request.terminal = Some(Terminal {
        kind: "vt100".into(),
        size: Some(size(101, 33)).into(),
        ..Default::default()
    })
    .into();
    let running = caller.run(&fixture);
    // The agent is the shell's parent.
    caller
        .type_in(
            "echo $TERM $(stty size) $(ls /bin)\n\
             for n in net pid uts ipc; do \
               [ $(readlink /proc/self/ns/$n) = $(readlink /proc/$PPID/ns/$n) ] && echo its $n; \
             done\n\
             [ \"$(grep CapEff /proc/self/status)\" = \"$(grep CapEff /proc/$PPID/status)\" ] \
               && echo every ri''ght\n",
        )
        .await;
    for text in [
        "vt100 33 101 sh",
        "its net",
        "its pid",
        "its uts",
        "its ipc",
        "every right",
    ] {
        caller.until(text).await;
    }
    let resize = ResizeRequest {
        pid: std::process::id(),
        size: Some(size(120, 40)).into(),
        ..Default::default()
    };
    fixture.console.resize(context(), &resize).await.unwrap();
    caller
        .type_in("until [ \"$(stty size)\" = '40 120' ]; do :; done; echo re''sized\n")
        .await;
    caller.until("resized").await;
    caller.until("guest:").await;
    // The shell has asked for keys: this one is the end of its input.
    caller.type_in("\x04").await;
    running.await.unwrap().unwrap();
    gone_from_the_guest(&fixture).await;
}

fn size(width: u32, height: u32) -> Size {
    Size {
        width,
        height,
        ..Default::default()
    }
}
