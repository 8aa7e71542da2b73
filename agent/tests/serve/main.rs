//! The real agent on this machine: `nacre-agent serve` with containers made
//! from a static busybox. Skipped, with the reason, where it cannot run.
// The lint's exception for tests covers `#[test]` functions, not their helpers.
#![allow(clippy::unwrap_used)]

mod fixture;
mod hooks;
mod users;
mod volumes;

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use fixture::{container, context, outside_of_dev, process, process_request, spec, start, status};
use nacre_protocol::agent::{ResizeTerminalRequest, UpdateRequest};
use serde_json::json;
use ttrpc::Code;

#[tokio::test]
async fn output_exit_code_and_removal() {
    let Some(agent) = start() else { return };
    let script = "echo out; echo err >&2; cat; hostname; exit 7";
    let script = script.replace("hostname", "cat /proc/sys/kernel/hostname");
    let mut ends = agent
        .run("c1", &spec("c1", &["sh", "-c", &script]), 1)
        .await;
    ends.stdin.write_all(b"input\n").unwrap();
    ends.close_stdin();
    let exit = agent.wait("c1", "").await;
    assert_eq!(ends.stdout(), "out\ninput\nbox\n");
    assert_eq!(ends.stderr(), "err\n");
    assert_eq!(exit.exit_status, 7);
    assert!(exit.exited_at_seconds > 1_600_000_000);
    assert_eq!(
        agent.wait("c1", "").await.exit_status,
        7,
        "the status stays"
    );
    agent.delete("c1").await.unwrap();
    assert!(agent.is_clean("c1"));
    let request = process_request("c1", "");
    let error = agent.client.wait(context(), &request).await.unwrap_err();
    assert_eq!(status(&error).0, Code::NOT_FOUND);
}

/// The root file system may be one that takes no nodes.
#[tokio::test]
async fn a_device_outside_of_dev_is_bound_to_its_place() {
    let Some(agent) = start() else { return };
    let script = "busybox stat -c '%F %a %u %g' /volumes/void; echo > /volumes/void";
    let mut spec = spec("c1", &["sh", "-c", script]);
    spec["linux"]["devices"] = outside_of_dev();
    let mut ends = agent.run("c1", &spec, 1).await;
    ends.close_stdin();
    assert_eq!(agent.wait("c1", "").await.exit_status, 0);
    assert_eq!(
        (ends.stdout().as_str(), ends.stderr().as_str()),
        ("character special file 666 5 6\n", "")
    );
    let below = std::fs::metadata(agent.file("volumes/void")).unwrap();
    assert!(below.is_file(), "{below:?}");
    agent.delete("c1").await.unwrap();
    assert!(agent.is_clean("c1"));
}

/// What the agent has, -1000 in a guest, no container inherits. Raising a score takes no
/// privilege.
#[tokio::test]
async fn processes_have_a_score_of_their_own() {
    let Some(agent) = start() else { return };
    agent.set_oom_score(300);
    let script = "cat /proc/self/oom_score_adj; cat";
    let mut ends = agent.run("c1", &spec("c1", &["sh", "-c", script]), 1).await;
    let (mut exec, stdio) = agent.streams(11);
    let mut command = process(&["cat", "/proc/self/oom_score_adj"]);
    agent.exec("c1", "plain", &command, stdio).await.unwrap();
    agent.wait("c1", "plain").await;
    assert_eq!(exec.stdout(), "0\n");
    command["oomScoreAdj"] = json!(700);
    let (mut exec, stdio) = agent.streams(21);
    agent.exec("c1", "cheap", &command, stdio).await.unwrap();
    agent.wait("c1", "cheap").await;
    assert_eq!(exec.stdout(), "700\n");
    ends.close_stdin();
    agent.wait("c1", "").await;
    assert_eq!(ends.stdout(), "0\n");
}

#[tokio::test]
async fn a_container_sees_its_own_world() {
    let Some(agent) = start() else { return };
    let mut spec = spec(
        "c1",
        &[
            "sh",
            "-c",
            "
            echo pid $$
            id -u; id -g; id -G
            echo home $HOME
            ulimit -n
            grep -E 'NoNewPrivs|Seccomp:|CapEff|CapBnd' /proc/self/status
            cat /etc/resolv.conf
            (echo x > /data/file) 2>/dev/null || echo read-only
            (echo 1 > /proc/sys/kernel/hostname) 2>/dev/null || echo protected
            echo > /dev/null && head -c 3 /dev/zero | wc -c
            ls -l /dev/fd /dev/ptmx | wc -l
            stat -c %a /tmp
            pwd; umask
            echo again > /dev/stdout
            cat /proc/version | wc -c
        "
            .replace("grep", "busybox grep")
            .replace("head", "busybox head")
            .replace("wc", "busybox wc")
            .replace("stat ", "busybox stat ")
            .as_str(),
        ],
    );
    spec["process"]["user"] =
        json!({"uid": 1000, "gid": 1000, "additionalGids": [5, 6], "umask": 0o27});
    spec["process"]["cwd"] = json!("/made/for/it");
    spec["root"]["readonly"] = json!(true);
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/etc/resolv.conf", "type": "bind",
        "source": "/run/nacre/containers/c1/files/resolv.conf", "options": ["bind", "ro"]}));
    mounts.push(json!({"destination": "/tmp", "type": "tmpfs", "options": ["mode=1777"]}));
    let mut ends = agent.run("c1", &spec, 1).await;
    ends.close_stdin();
    let exit = agent.wait("c1", "").await;
    let expected = "pid 1\n1000\n1000\n1000 5 6\nhome /home/u\n512\n\
        CapEff:\t0000000000000000\nCapBnd:\t00000000000000e1\nNoNewPrivs:\t1\nSeccomp:\t2\n\
        nameserver 192.0.2.1\nread-only\nprotected\n3\n2\n1777\n/made/for/it\n0027\nagain\n0\n";
    assert_eq!(
        (ends.stdout().as_str(), ends.stderr().as_str()),
        (expected, "")
    );
    assert_eq!(exit.exit_status, 0);
    agent.delete("c1").await.unwrap();
}

#[tokio::test]
async fn commands_that_cannot_be_executed() {
    let Some(agent) = start() else { return };
    let cases = [
        (
            "no-such",
            "exec: \"no-such\": executable file not found in $PATH",
        ),
        (
            "/no/such",
            "exec: \"/no/such\": stat /no/such: no such file or directory",
        ),
        (
            "/etc/not-a-program",
            "exec: \"/etc/not-a-program\": permission denied",
        ),
    ];
    for (command, message) in cases {
        let stdio = nacre_protocol::agent::Stdio::default();
        let error = agent
            .create("c1", &spec("c1", &[command]), stdio)
            .await
            .unwrap_err();
        assert_eq!(status(&error), (Code::INVALID_ARGUMENT, message.into()));
        assert!(agent.is_clean("c1"), "nothing is left of {command}");
    }
    let _ends = agent.run("c2", &spec("c2", &["sleep", "1000"]), 1).await;
    for (command, message) in cases {
        let stdio = nacre_protocol::agent::Stdio::default();
        let error = agent
            .exec("c2", "e", &process(&[command]), stdio)
            .await
            .unwrap_err();
        assert_eq!(status(&error), (Code::INVALID_ARGUMENT, message.into()));
    }
    agent.kill("c2", 9, false).await.unwrap();
    assert_eq!(agent.wait("c2", "").await.exit_status, 137);
    agent.delete("c2").await.unwrap();
}

#[tokio::test]
async fn exec_and_its_bookkeeping() {
    let Some(agent) = start() else { return };
    let _init = agent.run("c1", &spec("c1", &["sleep", "1000"]), 1).await;
    let (mut ends, stdio) = agent.streams(11);
    let script = [
        "sh",
        "-c",
        "cat; cat /proc/1/comm; echo $$ >/dev/null; exit 3",
    ];
    agent
        .exec("c1", "e1", &process(&script), stdio)
        .await
        .unwrap();
    ends.stdin.write_all(b"hello\n").unwrap();
    ends.close_stdin();
    assert_eq!(agent.wait("c1", "e1").await.exit_status, 3);
    assert_eq!(
        (ends.stdout(), ends.stderr()),
        ("hello\nsleep\n".into(), String::new())
    );

    let stdio = nacre_protocol::agent::Stdio::default();
    let again = agent.exec("c1", "e1", &process(&["true"]), stdio).await;
    assert_eq!(status(&again.unwrap_err()).0, Code::ALREADY_EXISTS);
    let request = process_request("c1", "e1");
    agent.client.delete_exec(context(), &request).await.unwrap();
    let gone = agent.client.wait(context(), &request).await.unwrap_err();
    assert_eq!(status(&gone).0, Code::NOT_FOUND);

    let error = agent.delete("c1").await.unwrap_err();
    assert_eq!(status(&error).0, Code::FAILED_PRECONDITION);
    agent.kill("c1", 9, true).await.unwrap();
    agent.wait("c1", "").await;
    let error = agent.kill("c1", 9, false).await.unwrap_err();
    assert_eq!(status(&error).0, Code::NOT_FOUND);
    agent.delete("c1").await.unwrap();
}

#[tokio::test]
async fn a_grandchild_with_the_pipe_does_not_hold_up_wait() {
    let Some(agent) = start() else { return };
    let _init = agent.run("c1", &spec("c1", &["sleep", "1000"]), 1).await;
    let (mut ends, stdio) = agent.streams(11);
    let script = ["sh", "-c", "echo first; sleep 1000 & exit 0"];
    agent
        .exec("c1", "e1", &process(&script), stdio)
        .await
        .unwrap();
    assert_eq!(agent.wait("c1", "e1").await.exit_status, 0);
    let mut text = [0; 6];
    ends.stdout.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"first\n");
    agent.kill("c1", 9, true).await.unwrap();
    agent.wait("c1", "").await;
    assert_eq!(ends.stdout(), "", "the stream ends with its last holder");
    agent.delete("c1").await.unwrap();
}

#[tokio::test]
async fn large_output_is_complete_before_wait_returns() {
    let Some(agent) = start() else { return };
    let script = "busybox head -c 3000000 /dev/zero";
    let mut ends = agent.run("c1", &spec("c1", &["sh", "-c", script]), 1).await;
    let reader = std::thread::spawn(move || ends.stdout().len());
    assert_eq!(agent.wait("c1", "").await.exit_status, 0);
    assert_eq!(reader.join().unwrap(), 3_000_000);
    agent.delete("c1").await.unwrap();
}

/// Of more than all buffers on the way hold.
#[tokio::test]
async fn output_that_nobody_takes_does_not_hide_the_exit() {
    let Some(agent) = start() else { return };
    let script = "busybox timeout 1 busybox yes; exit 7";
    let mut ends = agent.run("c1", &spec("c1", &["sh", "-c", script]), 1).await;
    let since = Instant::now();
    assert_eq!(agent.wait("c1", "").await.exit_status, 7);
    let took = since.elapsed();
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert!(ends.stdout().starts_with("y\ny\n"), "it is still there");
    agent.delete("c1").await.unwrap();
}

#[tokio::test]
async fn terminals() {
    let Some(agent) = start() else { return };
    let (mut ends, stdio) = agent.terminal(1);
    let script = "stty size; echo ready; read line; echo got $line; stty size; \
        test -c /dev/console && test -t 0 && exit 4";
    agent
        .create("c1", &spec("c1", &["sh", "-c", script]), stdio)
        .await
        .unwrap();
    agent.start("c1").await.unwrap();
    let mut seen = String::new();
    while !seen.contains("ready") {
        let mut chunk = [0; 256];
        let bytes = ends.stdout.read(&mut chunk).unwrap();
        seen.push_str(std::str::from_utf8(&chunk[..bytes]).unwrap());
    }
    let request = ResizeTerminalRequest {
        container_id: "c1".into(),
        width: 100,
        height: 40,
        ..ResizeTerminalRequest::default()
    };
    agent
        .client
        .resize_terminal(context(), &request)
        .await
        .unwrap();
    ends.stdin.write_all(b"word\n").unwrap();
    assert_eq!(agent.wait("c1", "").await.exit_status, 4);
    seen.push_str(&ends.stdout());
    assert_eq!(seen, "33 91\r\nready\r\nword\r\ngot word\r\n40 100\r\n");
    agent.delete("c1").await.unwrap();
}

#[tokio::test]
async fn pause_and_statistics() {
    let Some(agent) = start() else { return };
    let _ends = agent.run("c1", &spec("c1", &["sleep", "1000"]), 1).await;
    let request = container("c1");
    let pids = agent
        .client
        .list_processes(context(), &request)
        .await
        .unwrap();
    assert_eq!(pids.pids.len(), 1);
    agent.client.pause(context(), &request).await.unwrap();
    let stdio = nacre_protocol::agent::Stdio::default();
    let error = agent
        .exec("c1", "e", &process(&["true"]), stdio)
        .await
        .unwrap_err();
    assert_eq!(status(&error).0, Code::FAILED_PRECONDITION);
    agent.client.resume(context(), &request).await.unwrap();
    assert!(
        agent
            .client
            .stats(context(), &request)
            .await
            .unwrap()
            .cpu
            .is_some()
    );
    let update = UpdateRequest {
        container_id: "c1".into(),
        resources: br#"{"pids": {"limit": 50}}"#.to_vec(),
        ..UpdateRequest::default()
    };
    agent.client.update(context(), &update).await.unwrap();
    agent.kill("c1", 15, false).await.unwrap();
    agent.kill("c1", 9, false).await.unwrap();
    assert_eq!(agent.wait("c1", "").await.exit_status, 137);
    agent.delete("c1").await.unwrap();
}

#[tokio::test]
async fn a_created_container_can_be_killed_and_ids_are_unique() {
    let Some(agent) = start() else { return };
    let stdio = nacre_protocol::agent::Stdio::default();
    let spec = spec("c1", &["true"]);
    agent.create("c1", &spec, stdio.clone()).await.unwrap();
    let error = agent.create("c1", &spec, stdio.clone()).await.unwrap_err();
    assert_eq!(status(&error).0, Code::ALREADY_EXISTS);
    let error = agent
        .exec("c1", "e", &process(&["true"]), stdio)
        .await
        .unwrap_err();
    assert_eq!(status(&error).0, Code::FAILED_PRECONDITION);
    for (signal, all) in [(65, false), (65, true), (u32::MAX, false)] {
        let error = agent.kill("c1", signal, all).await.unwrap_err();
        assert_eq!(status(&error).0, Code::INVALID_ARGUMENT, "{signal} {all}");
    }
    agent.kill("c1", 9, false).await.unwrap();
    assert_eq!(agent.wait("c1", "").await.exit_status, 137);
    let error = agent.start("c1").await.unwrap_err();
    assert_eq!(status(&error).0, Code::FAILED_PRECONDITION);
    agent.delete("c1").await.unwrap();
}

#[tokio::test]
async fn requests_that_make_no_sense() {
    let Some(agent) = start() else { return };
    let stdio = nacre_protocol::agent::Stdio::default();
    let error = agent
        .create("../x", &spec("x", &["true"]), stdio.clone())
        .await;
    assert_eq!(status(&error.unwrap_err()).0, Code::INVALID_ARGUMENT);
    let mut with_time = spec("c1", &["true"]);
    with_time["linux"]["namespaces"] = json!([{"type": "time"}]);
    let error = agent
        .create("c1", &with_time, stdio.clone())
        .await
        .unwrap_err();
    assert_eq!(status(&error).0, Code::INVALID_ARGUMENT);
    for missing in ["process", "root"] {
        let mut spec = spec("c1", &["true"]);
        spec.as_object_mut().unwrap().remove(missing);
        let error = agent.create("c1", &spec, stdio.clone()).await.unwrap_err();
        let (code, message) = status(&error);
        assert_eq!(code, Code::INVALID_ARGUMENT);
        let expected = format!("the specification has no {missing}");
        assert!(message.contains(&expected), "{message}");
    }
    let error = agent
        .create("c1", &json!({"root": 1}), stdio)
        .await
        .unwrap_err();
    assert_eq!(status(&error).0, Code::INVALID_ARGUMENT);
    let error = agent.start("nobody").await.unwrap_err();
    assert_eq!(status(&error).0, Code::NOT_FOUND);
}

/// Containers that name the pod's PID namespace are all in the one that the
/// agent makes; it outlives each of them.
#[tokio::test]
async fn containers_share_the_pod_s_pid_namespace() {
    let Some(agent) = start() else { return };
    let in_pod = |id: &str, args: &[&str]| {
        let mut spec = spec(id, args);
        spec["linux"]["namespaces"][0]["path"] = json!(nacre_protocol::guest::POD_PID_NAMESPACE);
        spec
    };
    let _first = agent.run("c1", &in_pod("c1", &["sleep", "7200"]), 1).await;
    let script = "
        cat /proc/1/comm; ls /proc/1/root/ 2>/dev/null | busybox wc -l
        for pid in /proc/[0-9]*; do cat $pid/cmdline; echo; done | busybox grep -c '^sleep.7200'
        (sleep 0.1 &); read line; busybox grep -l '^State.*zombie' /proc/*/status
    ";
    let mut second = agent
        .run("c2", &in_pod("c2", &["sh", "-c", script]), 10)
        .await;
    // Seen while the first one runs.
    let mut seen = [0; 10];
    second.stdout.read_exact(&mut seen).unwrap();
    assert_eq!(String::from_utf8_lossy(&seen), "pause\n0\n1\n");
    agent.kill("c1", 9, false).await.unwrap();
    assert_eq!(agent.wait("c1", "").await.exit_status, 137);
    agent.delete("c1").await.unwrap();
    second.stdin.write_all(b"go\n").unwrap();
    second.close_stdin();
    assert_eq!(agent.wait("c2", "").await.exit_status, 1, "no zombie");
    assert_eq!(second.stdout(), "");
    let mut third = agent
        .run("c3", &in_pod("c3", &["cat", "/proc/1/comm"]), 20)
        .await;
    assert_eq!(agent.wait("c3", "").await.exit_status, 0);
    assert_eq!(third.stdout(), "pause\n");
}
