//! The Task API with the agent that runs in guests, as a process of this host:
//! real containers, made of the host's busybox. `make unit` names the agent in
//! `NACRE_TEST_AGENT`.

use std::path::Path;

use containerd_shim_protos::api::*;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::unix::pipe;
use ttrpc::Code;

use super::fixture::*;
use crate::machine::fake::FakeHost;

/// A fixture on the real agent; `None`, with the reason on stderr, where that
/// cannot be.
pub(super) async fn fixture() -> Option<Fixture> {
    let busybox = Path::new("/bin/busybox");
    if !busybox.exists() {
        eprintln!("skipped: no static busybox (Debian: busybox-static)");
        return None;
    }
    let mut host = FakeHost::real()?;
    host.debug_shell = Some(busybox.to_owned());
    Some(Fixture::on(host).await)
}

/// A bundle with a root file system, whose init process is `args`.
pub(super) fn bundle(fixture: &Fixture, id: &str, args: serde_json::Value) -> String {
    let bundle = fixture.bundle_of(id, json!([]));
    let rootfs = Path::new(&bundle).join("rootfs");
    for directory in ["bin", "proc", "dev", "sys", "etc"] {
        std::fs::create_dir_all(rootfs.join(directory)).unwrap();
    }
    std::fs::copy("/bin/busybox", rootfs.join("bin/busybox")).unwrap();
    for applet in [
        "sh", "cat", "sleep", "tty", "stty", "ls", "mkfifo", "readlink", "stat", "df", "tail",
        "seq",
    ] {
        std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(applet)).unwrap();
    }
    std::fs::write(rootfs.join("etc/passwd"), "root:x:0:0::/:/bin/sh\n").unwrap();
    let mut process = process("");
    process["args"] = args;
    let spec = json!({
        "ociVersion": "1.0.2",
        "root": {"path": rootfs},
        "process": process,
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["newinstance", "ptmxmode=0666", "mode=0620"]},
        ],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]},
    });
    std::fs::write(Path::new(&bundle).join("config.json"), spec.to_string()).unwrap();
    bundle
}

pub async fn create(
    fixture: &Fixture,
    id: &str,
    args: serde_json::Value,
) -> ttrpc::Result<CreateTaskResponse> {
    let request = CreateTaskRequest {
        id: id.into(),
        bundle: bundle(fixture, id, args),
        ..Default::default()
    };
    fixture.client.create(context(), &request).await
}

#[tokio::test]
async fn a_container_s_life() {
    let Some(mut fixture) = fixture().await else {
        return;
    };
    let (stdin, stdout) = (fixture.fifo("stdin"), fixture.fifo("stdout"));
    let output = reader(&stdout);
    let request = CreateTaskRequest {
        id: "c".into(),
        bundle: bundle(&fixture, "c", json!(["sh", "-c", "cat; exit 7"])),
        stdin: stdin.clone(),
        stdout,
        ..Default::default()
    };
    fixture.client.create(context(), &request).await.unwrap();
    fixture.start("c", "").await.unwrap();
    fixture.feed("c", &stdin, "to and fro").await;
    assert_eq!(fixture.wait("c", "").await, 7);
    assert_eq!(output.await.unwrap(), "to and fro");
    fixture.delete("c", "").await.unwrap();
    fixture.expect(&["create", "start", "exit", "delete"]).await;
}

/// What containerd or its client does not know itself it leaves out (`ctr run --config`).
#[tokio::test]
async fn fields_of_a_later_specification_are_ignored() {
    let Some(fixture) = fixture().await else {
        return;
    };
    let bundle = bundle(&fixture, "c", json!(["sleep", "60"]));
    let path = Path::new(&bundle).join("config.json");
    let mut spec: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    spec["ofTheFuture"] = json!({"a": [1, 2]});
    for part in ["root", "process", "linux"] {
        spec[part]["ofTheFuture"] = json!(true);
    }
    std::fs::write(&path, spec.to_string()).unwrap();
    let request = CreateTaskRequest {
        id: "c".into(),
        bundle,
        ..Default::default()
    };
    fixture.client.create(context(), &request).await.unwrap();
    fixture.start("c", "").await.unwrap();
    let mut process = process("exit 3");
    process["ofTheFuture"] = json!("x");
    let mut request = exec_request("c", "e", "");
    request.spec = json_any(&process.to_string());
    fixture.client.exec(context(), &request).await.unwrap();
    fixture.start("c", "e").await.unwrap();
    assert_eq!(fixture.wait("c", "e").await, 3);
    let update = UpdateTaskRequest {
        id: "c".into(),
        resources: json_any(r#"{"ofTheFuture": 1, "pids": {"limit": 50, "ofTheFuture": 2}}"#),
        ..Default::default()
    };
    fixture.client.update(context(), &update).await.unwrap();
}

#[tokio::test]
async fn commands_that_cannot_run_are_named_as_runc_names_them() {
    let Some(fixture) = fixture().await else {
        return;
    };
    for (command, complaint) in [
        ("nope", "exec: \"nope\": executable file not found in $PATH"),
        ("/etc/passwd", "exec: \"/etc/passwd\": permission denied"),
        (
            "/no/such",
            "exec: \"/no/such\": stat /no/such: no such file or directory",
        ),
    ] {
        let id = command.replace('/', "-");
        let id = id.trim_start_matches('-');
        let error = create(&fixture, id, json!([command])).await.unwrap_err();
        let ttrpc::Error::RpcStatus(status) = &error else {
            panic!("not a status: {error}");
        };
        assert_eq!(status.code(), Code::INVALID_ARGUMENT);
        assert!(status.message().contains(complaint), "{}", status.message());
    }
}

#[tokio::test]
async fn execs_with_their_streams_and_a_terminal() {
    let Some(fixture) = fixture().await else {
        return;
    };
    create(&fixture, "c", json!(["sleep", "60"])).await.unwrap();
    fixture.start("c", "").await.unwrap();

    for (exec_id, script, terminal, expected) in [
        ("plain", "echo out; exit 3", false, "out\n"),
        ("tty", "stty size; exit 3", true, "33 101\r\n"),
    ] {
        let stdout = fixture.fifo(exec_id);
        let output = reader(&stdout);
        let request = ExecProcessRequest {
            id: "c".into(),
            exec_id: exec_id.into(),
            stdout,
            terminal,
            spec: Some(Any {
                value: {
                    let mut process = process(script);
                    process["terminal"] = json!(terminal);
                    process.to_string().into_bytes()
                },
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        fixture.client.exec(context(), &request).await.unwrap();
        let resize = ResizePtyRequest {
            id: "c".into(),
            exec_id: exec_id.into(),
            width: 101,
            height: 33,
            ..Default::default()
        };
        fixture.client.resize_pty(context(), &resize).await.unwrap();
        fixture.start("c", exec_id).await.unwrap();
        assert_eq!(fixture.wait("c", exec_id).await, 3);
        assert_eq!(output.await.unwrap(), expected);
        fixture.delete("c", exec_id).await.unwrap();
    }
    fixture.exec("c", "bad", "").await.unwrap();
    fixture.delete("c", "bad").await.unwrap();

    fixture.kill("c", "").await.unwrap();
    assert_eq!(fixture.wait("c", "").await, 137);
    assert_eq!(fixture.delete("c", "").await.unwrap().exit_status, 137);
}

/// A file has it all at the moment the exit is known, whoever has asked for that.
#[tokio::test]
async fn a_file_is_complete_with_the_exit() {
    let Some(fixture) = fixture().await else {
        return;
    };
    let path = fixture.path("log");
    let request = CreateTaskRequest {
        id: "c".into(),
        bundle: bundle(&fixture, "c", json!(["seq", "1", "300000"])),
        stdout: format!("file://{}", path.display()),
        ..Default::default()
    };
    fixture.client.create(context(), &request).await.unwrap();
    fixture.start("c", "").await.unwrap();
    assert_eq!(fixture.wait("c", "").await, 0);
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.ends_with("\n300000\n"), "{}", text.len());
}

/// What a file has no room for is lost; that stops neither the process nor the exit.
#[tokio::test]
async fn a_full_file_system_does_not_stop_the_container() {
    let Some(fixture) = fixture().await else {
        return;
    };
    let script = "seq 1 300000 || exit 9; exit 7";
    let request = CreateTaskRequest {
        id: "c".into(),
        bundle: bundle(&fixture, "c", json!(["sh", "-c", script])),
        stdout: "file:///dev/full".into(),
        ..Default::default()
    };
    fixture.client.create(context(), &request).await.unwrap();
    fixture.start("c", "").await.unwrap();
    assert_eq!(fixture.wait("c", "").await, 7);
    fixture.delete("c", "").await.unwrap();
}

/// What the guest has to say to it: limits and counters are there as long as the cgroup
/// is, a terminal is only where there is one.
#[tokio::test]
async fn paused_and_stopped_containers_have_limits_and_counters() {
    let Some(fixture) = fixture().await else {
        return;
    };
    create(&fixture, "c", json!(["sleep", "60"])).await.unwrap();
    let pids = json!({"pids": {"limit": 50}});
    fixture.update("c", &pids).await.unwrap();
    fixture.start("c", "").await.unwrap();
    let resized = fixture.resize("c", "").await;
    let (code, message) = refusal(resized);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(message.contains("has no terminal"), "{message}");

    fixture.pause("c").await.unwrap();
    fixture.update("c", &pids).await.unwrap();
    let while_paused = used(&fixture).await;
    assert!(while_paused > 0);
    fixture.resume("c").await.unwrap();
    fixture.kill("c", "").await.unwrap();
    assert_eq!(fixture.wait("c", "").await, 137);
    assert!(used(&fixture).await >= while_paused);
    fixture.update("c", &pids).await.unwrap();
    fixture.delete("c", "").await.unwrap();
}

/// By the numbers they have in the guest, which a container has that has no namespace of
/// its own for them.
#[tokio::test]
async fn processes_have_the_guest_s_numbers() {
    let Some(fixture) = fixture().await else {
        return;
    };
    let stdout = fixture.fifo("stdout");
    let mut output = BufReader::new(
        pipe::OpenOptions::new()
            .open_receiver(Path::new(&stdout))
            .unwrap(),
    );
    let script = "sleep 60 & echo $! $$; wait";
    let bundle = bundle(&fixture, "c", json!(["sh", "-c", script]));
    let path = Path::new(&bundle).join("config.json");
    let mut spec: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    spec["linux"]["namespaces"] = json!([{"type": "mount"}]);
    std::fs::write(&path, spec.to_string()).unwrap();
    let request = CreateTaskRequest {
        id: "c".into(),
        bundle,
        stdout,
        ..Default::default()
    };
    fixture.client.create(context(), &request).await.unwrap();
    fixture.start("c", "").await.unwrap();
    let mut line = String::new();
    output.read_line(&mut line).await.unwrap();
    let mut seen: Vec<u32> = line
        .split_whitespace()
        .map(|n| n.parse().unwrap())
        .collect();
    let pids = fixture.pids("c").await.unwrap();
    let mut told: Vec<u32> = pids.processes.iter().map(|process| process.pid).collect();
    seen.sort_unstable();
    told.sort_unstable();
    assert_eq!(told, seen);
    fixture.kill("c", "").await.unwrap();
    assert_eq!(fixture.wait("c", "").await, 137);
    // The other one goes, too.
    fixture.delete("c", "").await.unwrap();
    for pid in seen {
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "{pid}");
    }
}

/// Microseconds of processor time the container has had, by its counters.
async fn used(fixture: &Fixture) -> u64 {
    let stats = fixture.stats("c").await.unwrap();
    let metrics = Metrics::parse_from_bytes(&stats.stats.value).unwrap();
    metrics.cpu.usage_usec
}
