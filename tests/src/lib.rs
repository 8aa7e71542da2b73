//! Fixtures of the end-to-end tests.
//!
//! The tests run as root on a machine with KVM, containerd and nacre: the lab,
//! or a host that has them. They talk to containerd through `ctr`, as a user
//! does. A test begins with [`Scene::new`], which notes what the machine looks
//! like; when the scene ends without a panic it waits until the machine looks
//! so again and fails naming what is left.

mod leftovers;

use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

pub use leftovers::Machine;

/// The runtime under test.
pub const RUNTIME: &str = "io.containerd.nacre.v2";
/// busybox and two users: root, and app (1000:1000).
pub const BUSYBOX: &str = "docker.io/library/busybox:latest";
/// Three layers with whiteouts, links, nodes, xattrs; user app:staff, /data.
pub const LAYERS: &str = "docker.io/library/layers:latest";

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
    before: Machine,
    containers: Vec<String>,
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
        Self {
            before: Machine::now(),
            containers: Vec::new(),
        }
    }

    /// A container id nobody has used.
    pub fn id(&mut self) -> String {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let id = format!("e2e-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        self.containers.push(id.clone());
        id
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
        let id = self.id();
        let mut arguments = vec!["run", "--rm", "--runtime", RUNTIME];
        arguments.extend(options);
        arguments.extend([image, &id]);
        arguments.extend(command);
        ctr(&arguments)
    }

    /// Starts a container that sleeps, and returns its id.
    pub fn start_sleeper(&mut self, options: &[&str]) -> String {
        let id = self.id();
        let mut arguments = vec!["run", "-d", "--runtime", RUNTIME];
        arguments.extend(options);
        arguments.extend([BUSYBOX, &id, "sleep", "3600"]);
        ctr(&arguments).exits(0);
        id
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        for id in &self.containers {
            // Most are gone: these calls are for what a failed test left.
            let _ = ctr(&["task", "rm", "-f", id]);
            let _ = ctr(&["container", "rm", id]);
            let _ = ctr(&["snapshot", "rm", id]);
        }
        if !std::thread::panicking() {
            self.before.await_return();
        }
    }
}
