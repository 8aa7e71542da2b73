//! What tests of deaths have in common: clients that wait, processes to kill, and the time
//! within which all know.

use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::Status;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{PATIENCE, Said, Shim, ctr, eventually, run};

/// Starts a client that has no input; what it says is kept for it.
pub fn spawn(mut command: Command) -> Child {
    command.stdin(Stdio::null());
    let heard = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = heard.spawn();
    child.unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

/// What a client said that returns; it has [`PATIENCE`] for that.
///
/// # Panics
///
/// When it does not, with what it said.
#[must_use]
pub fn returned(client: Child) -> Said {
    let pid = Pid::from_raw(client.id().cast_signed());
    let (send, said) = channel();
    let waiting = thread::spawn(move || send.send(client.wait_with_output()));
    let output = said.recv_timeout(PATIENCE).unwrap_or_else(|_| {
        kill(pid, Signal::SIGKILL).expect("a child may be killed");
        panic!("not returned after {PATIENCE:?}: {:#?}", said.recv());
    });
    waiting.join().expect("it ends").expect("this reads it");
    Said::from(output.expect("the child is ours"))
}

/// The pid of a process of a pod, by its name in the pod's state, as soon as there is one.
///
/// # Panics
///
/// When there is none in time.
pub fn process_of(id: &str, name: &str) -> String {
    let path = format!("/run/nacre/default/{id}/state.json");
    let mut pid = None;
    eventually(&format!("{id} has a {name}"), || {
        let state = std::fs::read(&path).unwrap_or_default();
        let state: serde_json::Value = serde_json::from_slice(&state).unwrap_or_default();
        pid = state[name]["pid"].as_u64();
        pid.is_some()
    });
    pid.unwrap_or_default().to_string()
}

/// When a pod is hit whose container starts.
#[derive(Debug, Clone, Copy)]
pub enum Moment {
    /// So many milliseconds after the process is there.
    AfterMs(u64),
    /// When the container is created: the client's next call starts it.
    Created,
    /// When its machine is about to boot: of a network namespace without a path, after that call.
    Boots,
    /// When it runs, whether its client knows or not.
    Runs,
}

impl Moment {
    /// The steps of a start lie between them.
    pub const OF_A_START: [Self; 4] = [
        Self::AfterMs(0),
        Self::AfterMs(300),
        Self::AfterMs(1500),
        Self::Created,
    ];

    /// Returns then.
    ///
    /// # Panics
    ///
    /// When the start does not get there.
    pub fn wait(self, id: &str) {
        let status = || Shim::find(id).ok()?.state("").ok();
        match self {
            Self::AfterMs(moment) => thread::sleep(Duration::from_millis(moment)),
            Self::Created => eventually("the container is created", || status().is_some()),
            Self::Boots => eventually("the machine boots", || {
                run("nacre", &["logs", id]).stdout.contains("booting")
            }),
            Self::Runs => eventually("the container runs", || status() == Some(Status::RUNNING)),
        }
    }
}

/// Five seconds of a machine on which containerd answers `ctr` at once: within them clients
/// and containerd know of an end. Here that is measured, and counted twenty times.
#[must_use]
pub fn five_seconds() -> Duration {
    seconds(5)
}

/// Two seconds by the same measure: within them an update of a volume is in its containers.
#[must_use]
pub fn two_seconds() -> Duration {
    seconds(2)
}

fn seconds(number: u32) -> Duration {
    let start = Instant::now();
    ctr(&["task", "ls"]).exits(0);
    Duration::from_secs(number.into()) + 4 * number * start.elapsed()
}
