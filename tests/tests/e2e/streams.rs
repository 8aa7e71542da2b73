//! Standard input, output and error; terminals.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};

use nacre_tests::{BUSYBOX, Scene, eventually, run_with_input};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{Winsize, openpty};

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

#[test]
fn all_output_comes_before_the_exit() {
    let mut scene = Scene::new();
    for _ in 0..3 {
        let said = scene.run(&["sh", "-c", "seq 1 100000; exit 9"]).exits(9);
        assert!(said.stdout.ends_with("\n100000\n"), "{}", said.stdout.len());
    }
}

/// A program on a terminal of its own.
struct OnTerminal {
    child: Child,
    terminal: std::fs::File,
    line: OwnedFd,
    /// Came after what the last [`Self::read_until`] looked for.
    unread: String,
}

impl OnTerminal {
    fn spawn(mut command: Command, rows: u16, columns: u16) -> Self {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = openpty(Some(&size), None).unwrap();
        let line = || Stdio::from(pty.slave.try_clone().unwrap());
        let child = command
            .stdin(line())
            .stdout(line())
            .stderr(line())
            .spawn()
            .unwrap();
        Self {
            child,
            terminal: pty.master.into(),
            line: pty.slave,
            unread: String::new(),
        }
    }

    /// Reads until `text` has come, and returns what came up to its end.
    #[track_caller]
    fn read_until(&mut self, text: &str) -> String {
        let what = format!("the terminal shows {text:?}");
        let mut end = None;
        eventually(&what, || {
            end = self.unread.find(text).map(|start| start + text.len());
            if end.is_none() && self.is_readable() {
                let mut bytes = [0; 1024];
                let count = self.terminal.read(&mut bytes).unwrap();
                let came = String::from_utf8_lossy(&bytes[..count]);
                self.unread.push_str(&came);
            }
            end.is_some()
        });
        let rest = self.unread.split_off(end.unwrap());
        std::mem::replace(&mut self.unread, rest)
    }

    fn is_readable(&self) -> bool {
        let mut fds = [PollFd::new(self.terminal.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).unwrap() > 0
    }

    /// Has the shell print the terminal's size until it is `size`.
    #[track_caller]
    fn ask_until(&mut self, size: &str) {
        eventually(&format!("the terminal's size is {size}"), || {
            self.type_line("word");
            self.read_until("got word");
            self.read_until("\n");
            self.read_until("\n").contains(size)
        });
    }

    fn type_line(&mut self, text: &str) {
        self.terminal.write_all(text.as_bytes()).unwrap();
        self.terminal.write_all(b"\n").unwrap();
    }

    /// Changes the terminal's size and tells the program, as a window does.
    fn resize(&self, rows: u16, columns: u16) {
        let size = ["rows", &rows.to_string(), "cols", &columns.to_string()].map(str::to_owned);
        let stty = Command::new("stty")
            .args(size)
            .stdin(self.line.try_clone().unwrap())
            .status();
        assert!(stty.unwrap().success());
        let pid = self.child.id().to_string();
        let kill = Command::new("kill").args(["-WINCH", &pid]).status();
        assert!(kill.unwrap().success());
    }
}

#[test]
fn terminal_has_the_client_s_size_and_follows_it() {
    let mut scene = Scene::new();
    let script = "while read word; do echo \"got $word\"; stty size; done";
    let (_, command) = scene.command(BUSYBOX, &["--rm", "-t"], &["sh", "-c", script]);
    let mut client = OnTerminal::spawn(command, 33, 101);
    // ctr sends a size after the start, or after a signal: the shell is asked
    // until it has come.
    client.ask_until("33 101");
    client.resize(40, 120);
    client.ask_until("40 120");
    client.terminal.write_all(&[4]).unwrap(); // Ctrl-D: end of input
    assert!(client.child.wait().unwrap().success());
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
    assert_eq!(client.child.wait().unwrap().code(), Some(6));
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
    let _timeout = crate::failures::Changed::new("hang_timeout_seconds", "10");
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
