//! Standard input, output and error; terminals.

use std::io::{Read, Write};
use std::process::{Command, Stdio};

use nacre_tests::{BUSYBOX, Changed, OnTerminal, Scene, eventually, run_with_input};

const BULK: usize = 256 << 20;

/// Bytes without a period that buffers could hide behind.
fn bulk() -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut bytes = Vec::with_capacity(BULK);
    while bytes.len() < BULK {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes
}

#[test]
fn input_ends() {
    let mut scene = Scene::new();
    let (_, command) = scene.command(BUSYBOX, &["--rm"], &["wc", "-c"]);
    run_with_input(command, b"12345".to_vec())
        .exits(0)
        .prints("5\n");
}

#[test]
fn a_quarter_gibibyte_each_way_at_once() {
    let mut scene = Scene::new();
    let (_, mut command) = scene.command(BUSYBOX, &["--rm"], &["cat"]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let sent = bulk();
    let mut stdin = child.stdin.take().unwrap();
    let mut received = Vec::with_capacity(BULK);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            stdin.write_all(&sent).unwrap();
            drop(stdin);
        });
        let mut stdout = child.stdout.take().unwrap();
        let mut some = (&mut stdout).take(BULK as u64 / 8);
        some.read_to_end(&mut received).unwrap();
        // Everything in between fills up and waits.
        std::thread::sleep(std::time::Duration::from_secs(10));
        stdout.read_to_end(&mut received).unwrap();
    });
    assert!(child.wait().unwrap().success());
    assert_eq!(received.len(), sent.len());
    assert!(received == sent, "the bytes differ");
}

#[test]
fn output_and_errors_stay_apart() {
    let mut scene = Scene::new();
    let script = "for i in 1 2 3; do echo out$i; echo err$i >&2; done";
    let said = scene
        .run(&["sh", "-c", script])
        .exits(0)
        .prints("out1\nout2\nout3\n");
    assert_eq!(said.stderr, "err1\nerr2\nerr3\n");
}

/// That an exit waits for a slow reader is `an_exit_is_told_after_the_output_was_read`'s.
#[test]
fn all_output_comes_before_the_exit() {
    let mut scene = Scene::new();
    let said = scene.run(&["sh", "-c", "seq 1 100000; exit 9"]).exits(9);
    let lines = (1..=100_000).map(|number| format!("{number}\n"));
    let all = said.stdout == lines.collect::<String>();
    assert!(all, "{} bytes", said.stdout.len());
}

/// Has the shell print the terminal's size until it is `size`.
#[track_caller]
fn ask_until(client: &mut OnTerminal, size: &str) {
    eventually(&format!("the terminal's size is {size}"), || {
        client.type_line("word");
        client.read_until("got word");
        client.read_until("\n");
        client.read_until("\n").contains(size)
    });
}

#[test]
fn terminal_has_the_client_s_size_and_follows_it() {
    let mut scene = Scene::new();
    let script = "while read word; do echo \"got $word\"; stty size; done";
    let (_, command) = scene.command(BUSYBOX, &["--rm", "-t"], &["sh", "-c", script]);
    let mut client = OnTerminal::spawn(command, 33, 101);
    // ctr sends a size after the start, or after a signal: the shell is asked
    // until it has come.
    ask_until(&mut client, "33 101");
    client.resize(40, 120);
    ask_until(&mut client, "40 120");
    client.type_in("\x04"); // Ctrl-D: end of input
    assert_eq!(client.wait(), Some(0));
}

#[test]
fn exec_on_a_terminal() {
    let mut scene = Scene::new();
    let id = scene.start_sleeper(&[]);
    // As above, the size may come after the start.
    let script = "tty; for n in $(seq 100); do stty size | grep '21 77' && exit 6; sleep 0.1; done";
    let command = scene.exec_command(&id, &["-t"], &["sh", "-c", script]);
    let mut client = OnTerminal::spawn(command, 21, 77);
    let seen = client.read_until("21 77");
    assert!(seen.contains("/dev/pts/"), "{seen}");
    assert_eq!(client.wait(), Some(6));
}

/// A client that stops reading stops its own container's output and nothing else.
#[test]
fn paused_client_does_not_wedge_the_pod() {
    let mut scene = Scene::new();
    let (id, mut command) = scene.command(BUSYBOX, &["--rm"], &["yes"]);
    let mut client = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut stdout = client.stdout.take().unwrap();
    let mut some = [0; 4096];
    stdout.read_exact(&mut some).unwrap();
    // Nobody reads the pipe: within moments it, the FIFO and the stream are full.
    for _ in 0..3 {
        scene
            .exec(&id, &[], &["echo", "hi"])
            .exits(0)
            .prints("hi\n");
    }
    assert_eq!(scene.status(&id).as_deref(), Some("RUNNING"));
    stdout.read_exact(&mut some).unwrap();
    scene.ctr(&["task", "kill", "-s", "KILL", &id]).exits(0);
    std::io::copy(&mut stdout, &mut std::io::sink()).unwrap();
    assert_eq!(client.wait().unwrap().code(), Some(137));
}

/// An exec's client killed while both streams are in use: the process lives on,
/// can be signalled and deleted, and the pod serves others.
#[test]
fn killed_client_takes_nothing_with_it() {
    let mut scene = Scene::new();
    let id = scene.start_sleeper(&[]);
    let script = "cat & while :; do echo line; sleep 0.1; done";
    for exec_id in ["first", "second"] {
        let mut command = scene.exec_as(&id, exec_id, &[], &["sh", "-c", script]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut client = command.spawn().unwrap();
        let mut some = [0; 64];
        client.stdout.take().unwrap().read_exact(&mut some).unwrap();
        client.kill().unwrap();
        client.wait().unwrap();
        scene
            .exec(&id, &[], &["echo", "hi"])
            .exits(0)
            .prints("hi\n");
        let kill = ["task", "kill", "-s", "KILL", "--exec-id", exec_id, &id];
        scene.ctr(&kill).exits(0);
        let delete = ["task", "rm", "--exec-id", exec_id, &id];
        eventually("the exec can be deleted", || {
            matches!(scene.ctr(&delete).code, Some(0 | 137))
        });
    }
}

/// A client killed in the middle of an attach, or before it has come so far: the
/// container keeps its streams for the next one.
#[test]
fn killed_attach_takes_nothing_with_it() {
    let mut scene = Scene::new();
    let script = "n=0; while read word; do n=$((n + 1)); echo $n $word; done";
    let id = scene.start(&[], &["sh", "-c", script]);
    let attach = || {
        let mut command = Command::new("ctr");
        command.args(["task", "attach", &id]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.spawn().unwrap()
    };
    for number in 1..4 {
        let mut early = attach();
        early.kill().unwrap();
        early.wait().unwrap();
        let mut client = attach();
        client.stdin.as_mut().unwrap().write_all(b"word\n").unwrap();
        let expected = format!("{number} word\n");
        let mut line = vec![0; expected.len()];
        client.stdout.take().unwrap().read_exact(&mut line).unwrap();
        assert_eq!(String::from_utf8(line).unwrap(), expected);
        client.kill().unwrap();
        client.wait().unwrap();
    }
    scene
        .exec(&id, &[], &["echo", "hi"])
        .exits(0)
        .prints("hi\n");
    assert_eq!(scene.status(&id).as_deref(), Some("RUNNING"));
}

/// Longer without a byte than a guest may be without an answer to a ping.
#[test]
fn exec_that_idles_is_not_cut() {
    let _timeout = Changed::new("hang_timeout_seconds", "10");
    let mut scene = Scene::new();
    let id = scene.start_sleeper(&[]);
    let mut command = scene.exec_command(&id, &[], &["sh", "-c", "read word; echo $word; exit 5"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut client = command.spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_secs(15));
    client.stdin.as_mut().unwrap().write_all(b"word\n").unwrap();
    let output = client.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(5));
    assert_eq!(output.stdout, b"word\n");
}
