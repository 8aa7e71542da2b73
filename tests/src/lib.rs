//! Fixtures of the end-to-end tests.
//!
//! The tests run as root on a machine with KVM, containerd and nacre: the lab,
//! or a host that has them. They talk to containerd through `ctr`, as a user
//! does. A test begins with [`Scene::new`], which notes what the machine looks
//! like; when the scene ends without a panic it waits until the machine looks
//! so again and fails naming what is left.

mod allocations;
mod config;
pub mod cri;
mod deaths;
mod hugepages;
mod kubelet;
mod leftovers;
pub mod pods;
mod sample;
mod segments;
mod shim;
mod slow_file;
mod spec;
mod systemd;
mod terminal;
mod watchdog;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;

pub use allocations::Allocations;
pub use config::{CONFIG, Changed};
pub use deaths::{five_seconds, process_of, returned, spawn, two_seconds};
pub use hugepages::HugePages;
pub use kubelet::PodDir;
pub use leftovers::Machine;
pub use sample::Sample;
pub use segments::{HostSegments, SEGMENTS};
pub use shim::Shim;
pub use slow_file::SlowFile;
pub use systemd::Systemd;
pub use terminal::OnTerminal;
use watchdog::Watchdog;

/// The runtime under test.
pub const RUNTIME: &str = "io.containerd.nacre.v2";
/// busybox and two users: root, and app (1000:1000).
pub const BUSYBOX: &str = "docker.io/library/busybox:latest";
/// Three layers with whiteouts, links, nodes, xattrs; user app:staff, /data.
pub const LAYERS: &str = "docker.io/library/layers:latest";

/// What ends the agent, in a shell that sees all of the guest. No signal reaches PID 1: its
/// code is overwritten.
pub const KILL_AGENT: &str = "set -- $(grep -m 1 r-xp /proc/1/maps | tr - ' ')
dd if=/dev/zero of=/proc/1/mem conv=notrunc bs=4096 \
    seek=$((0x$1 / 4096)) count=$(((0x$2 - 0x$1) / 4096))";

/// How long anything may take before a test calls it stuck. The lab is ten to
/// twenty times slower than hardware.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// What a command said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    /// Exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Standard output, lossily decoded.
    pub stdout: String,
    /// Standard error, lossily decoded.
    pub stderr: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Said {
    /// Fails the test unless the command exited with `code`.
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self:#?}");
        self
    }

    /// Fails the test unless the command printed exactly `text`.
    #[track_caller]
    pub fn prints(self, text: &str) -> Self {
        assert_eq!(self.stdout, text, "{self:#?}");
        self
    }

    /// Fails the test unless the command complained with all of `parts`.
    #[track_caller]
    pub fn complains(self, parts: &[&str]) -> Self {
        for part in parts {
            assert!(self.stderr.contains(part), "no {part:?} in {self:#?}");
        }
        self
    }
}

/// Runs a program to its end.
pub fn run(program: &str, arguments: &[&str]) -> Said {
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"))
        .into()
}

/// Runs `ctr` to its end.
pub fn ctr(arguments: &[&str]) -> Said {
    run("ctr", arguments)
}

/// Runs a program to its end with `input` on its standard input.
pub fn run_with_input(mut command: Command, input: Vec<u8>) -> Said {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let mut stdin = child.stdin.take().expect("stdin is a pipe");
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let said = child.wait_with_output().expect("the child is ours").into();
    let written = writer.join().expect("the writer does not panic");
    if let Err(error) = written {
        eprintln!("input not taken to its end: {error}; {said:#?}");
    }
    said
}

/// What `md5sum` says of its input.
#[must_use]
pub fn md5(bytes: &[u8]) -> String {
    let said = run_with_input(Command::new("md5sum"), bytes.to_vec());
    said.exits(0).stdout
}

/// A containerd and its `ctr`.
#[derive(Debug, Clone, Copy)]
pub struct Containerd {
    program: &'static str,
    address: &'static str,
}

/// The machine's containerd 2.
pub const CONTAINERD_2: Containerd = Containerd {
    program: "ctr",
    address: "/run/containerd/containerd.sock",
};

/// The lab's containerd 1.7; `lab-containerd 1.7` starts and stops it.
pub const CONTAINERD_1_7: Containerd = Containerd {
    program: "/opt/containerd-1.7/usr/bin/ctr",
    address: "/run/containerd17/containerd.sock",
};

/// [`CONTAINERD_1_7`] for as long as this lives.
pub struct OlderContainerd(());

impl OlderContainerd {
    /// Starts it.
    #[must_use]
    pub fn start() -> Self {
        run("lab-containerd", &["1.7", "start"]).exits(0);
        Self(())
    }
}

impl Drop for OlderContainerd {
    fn drop(&mut self) {
        run("lab-containerd", &["1.7", "stop"]);
    }
}

impl Containerd {
    /// A call of its `ctr`.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.program);
        command.args(["--address", self.address]).args(arguments);
        command
    }

    /// Its line of `/proc/PID/cgroup`.
    ///
    /// # Panics
    ///
    /// When it does not run.
    #[must_use]
    pub fn cgroup(&self) -> String {
        let socket = UnixStream::connect(self.address).expect("containerd listens");
        let listener = getsockopt(&socket, PeerCredentials).expect("sockets have users");
        let path = format!("/proc/{}/cgroup", listener.pid());
        std::fs::read_to_string(path).expect("containerd runs")
    }

    /// Runs its `ctr` to the end.
    pub fn ctr(&self, arguments: &[&str]) -> Said {
        run_with_input(self.command(arguments), Vec::new())
    }
}

/// Runs a command that leaves something running. What runs on would have this
/// process's output, which is not waited for: it gets none.
fn detach(mut command: Command) {
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status();
    let status = status.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(status.success(), "{command:?}: {status}");
}

/// Polls until `condition` holds; fails the test after [`PATIENCE`].
#[track_caller]
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(
            Instant::now() < deadline,
            "still not after {PATIENCE:?}: {what}"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// One test's part of the machine.
pub struct Scene {
    containerd: Containerd,
    before: Machine,
    containers: Vec<String>,
    _watchdog: Watchdog,
}

impl Default for Scene {
    fn default() -> Self {
        Self::new()
    }
}

impl Scene {
    /// Notes what the machine looks like now.
    #[must_use]
    pub fn new() -> Self {
        Self::on(CONTAINERD_2)
    }

    /// The same, with containers made by `containerd`.
    #[must_use]
    pub fn on(containerd: Containerd) -> Self {
        Self {
            containerd,
            before: Machine::now(),
            containers: Vec::new(),
            _watchdog: Watchdog::new(),
        }
    }

    /// A container id nobody has used; what has it is removed with the scene.
    pub fn id(&mut self) -> String {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let id = format!("e2e-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        self.containers.push(id.clone());
        id
    }

    /// The same, as long as containerd allows (76 characters).
    pub fn long_id(&mut self) -> String {
        let id = format!("{:x<76}", self.id());
        self.containers.push(id.clone());
        id
    }

    /// Runs `ctr` to its end.
    pub fn ctr(&self, arguments: &[&str]) -> Said {
        self.containerd.ctr(arguments)
    }

    /// `ctr run --rm` of busybox under nacre with further options.
    pub fn run_with(&mut self, options: &[&str], command: &[&str]) -> Said {
        self.run_image(BUSYBOX, options, command)
    }

    /// `ctr run --rm` of busybox under nacre.
    pub fn run(&mut self, command: &[&str]) -> Said {
        self.run_with(&[], command)
    }

    /// `ctr run --rm` of any image under nacre.
    pub fn run_image(&mut self, image: &str, options: &[&str], command: &[&str]) -> Said {
        let mut options = options.to_vec();
        options.push("--rm");
        run_with_input(self.command(image, &options, command).1, Vec::new())
    }

    /// `ctr run` under nacre, not yet started, and the container's id.
    pub fn command(
        &mut self,
        image: &str,
        options: &[&str],
        command: &[&str],
    ) -> (String, Command) {
        let id = self.id();
        let mut arguments = vec!["run", "--runtime", RUNTIME];
        arguments.extend(options);
        arguments.extend([image, &id]);
        arguments.extend(command);
        let command = self.containerd.command(&arguments);
        (id, command)
    }

    /// Starts a container that runs on, and returns its id.
    pub fn start(&mut self, options: &[&str], command: &[&str]) -> String {
        let mut options = options.to_vec();
        options.push("-d");
        let (id, command) = self.command(BUSYBOX, &options, command);
        detach(command);
        id
    }

    /// Starts a container that runs on from a spec of its own, see
    /// [`Self::run_spec`], and returns its id.
    pub fn start_spec(&mut self, change: impl FnOnce(&mut serde_json::Value)) -> String {
        let id = self.id();
        let spec = spec::write(&id, change);
        let run = [
            "run",
            "-d",
            "--runtime",
            RUNTIME,
            "--config",
            &spec.path,
            &id,
        ];
        detach(self.containerd.command(&run));
        id
    }

    /// Starts a container that sleeps, and returns its id.
    pub fn start_sleeper(&mut self, options: &[&str]) -> String {
        self.start(options, &["sleep", "3600"])
    }

    /// Runs a container from a spec of its own to its end. `change`
    /// gets ctr's default spec with a root file system of busybox.
    pub fn run_spec(&mut self, change: impl FnOnce(&mut serde_json::Value)) -> Said {
        let id = self.id();
        let spec = spec::write(&id, change);
        let said = self.ctr(&[
            "run",
            "--rm",
            "--runtime",
            RUNTIME,
            "--config",
            &spec.path,
            &id,
        ]);
        drop(spec);
        said
    }

    /// `ctr task exec` of a command.
    pub fn exec(&self, id: &str, options: &[&str], command: &[&str]) -> Said {
        run_with_input(self.exec_command(id, options, command), Vec::new())
    }

    /// `ctr task exec`, not yet started.
    pub fn exec_command(&self, id: &str, options: &[&str], command: &[&str]) -> Command {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let exec_id = format!("exec-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        self.exec_as(id, &exec_id, options, command)
    }

    /// `ctr task exec` with an exec id of one's own, not yet started.
    pub fn exec_as(&self, id: &str, exec_id: &str, options: &[&str], command: &[&str]) -> Command {
        let mut arguments = vec!["task", "exec", "--exec-id", exec_id];
        arguments.extend(options);
        arguments.push(id);
        arguments.extend(command);
        self.containerd.command(&arguments)
    }

    /// What `ctr task ls` says of a container; `None` if it has no task.
    pub fn status(&self, id: &str) -> Option<String> {
        let said = self.ctr(&["task", "ls"]).exits(0);
        said.stdout.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some(id)).then(|| words.nth(1).unwrap_or_default().to_owned())
        })
    }

    /// Kills a container's process and deletes its task, as a client does.
    #[track_caller]
    pub fn remove(&self, id: &str) {
        self.ctr(&["task", "kill", "-s", "KILL", id]).exits(0);
        self.await_status(id, "STOPPED");
        self.ctr(&["task", "rm", id]).exits(0);
    }

    /// Waits until a container has a status.
    #[track_caller]
    pub fn await_status(&self, id: &str, status: &str) {
        eventually(&format!("{id} is {status}"), || {
            self.status(id).as_deref() == Some(status)
        });
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        // Most are gone. What containerd does not have is of no pod either, or is
        // found by the look at the machine below.
        let had = self.ctr(&["container", "ls", "-q"]).stdout;
        for id in &self.containers {
            if failed {
                let log = run("nacre", &["logs", id]);
                if log.code == Some(0) {
                    eprintln!("log of {id}:\n{}", log.stdout);
                }
            }
            if had.lines().any(|line| line == id) {
                let _ = self.ctr(&["task", "rm", "-f", id]);
                // Its snapshot goes with it.
                let _ = self.ctr(&["container", "rm", id]);
            }
        }
        if !failed {
            self.before.await_return();
        }
    }
}
