//! What tests of deaths have in common: clients that wait, processes to kill, and the time
//! within which all know.

use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{PATIENCE, Said, ctr, eventually};

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
