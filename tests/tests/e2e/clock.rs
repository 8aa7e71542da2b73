//! The guest's clock follows the host's.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nacre_tests::{BUSYBOX, Changed, Scene, eventually, run};

use crate::host::pid_of;

/// Most the clocks may differ.
const TOLERANCE: Duration = Duration::from_millis(50);

/// A container that tells the time.
struct Clock {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    id: String,
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap()
}

impl Clock {
    fn start(scene: &mut Scene) -> Self {
        let tell = "adjtimex | awk '/tv_sec/ { s = $2 } /tv_usec/ { print s, $2 }'";
        let script = &format!("while read word; do {tell}; done");
        let (id, mut command) = scene.command(BUSYBOX, &["--rm"], &["sh", "-c", script]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stdin = child.stdin.take().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Self {
            child,
            stdin,
            stdout,
            id,
        }
    }

    /// By how much the guest's clock is off at least: none if it may have been
    /// read at any time between question and answer.
    fn error_once(&mut self) -> Duration {
        let before = now();
        writeln!(self.stdin, "now").unwrap();
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        let after = now();
        let (seconds, micros) = line.trim().split_once(' ').unwrap();
        let guest = Duration::from_secs(seconds.parse().unwrap())
            + Duration::from_micros(micros.parse().unwrap());
        println!(
            "guest {:+.1} ms from the question, {:.1} ms to the answer",
            guest.as_secs_f64() * 1e3 - before.as_secs_f64() * 1e3,
            (after.checked_sub(before))
                .unwrap_or_default()
                .as_secs_f64()
                * 1e3,
        );
        before
            .saturating_sub(guest)
            .max(guest.saturating_sub(after))
    }

    /// The largest of a few.
    fn error(&mut self) -> Duration {
        (0..10).map(|_| self.error_once()).max().unwrap()
    }

    fn ends(mut self) {
        drop(self.stdin);
        assert!(self.child.wait().unwrap().success());
    }
}

/// The host's clock set forward, until this is dropped.
struct SetForward;

const STEP: i64 = 7200;

impl SetForward {
    fn now() -> Self {
        step(STEP);
        Self
    }
}

impl Drop for SetForward {
    fn drop(&mut self) {
        step(-STEP);
    }
}

fn step(seconds: i64) {
    let seconds = i64::try_from(now().as_secs()).unwrap() + seconds;
    run("date", &["-s", &format!("@{seconds}")]).exits(0);
}

#[test]
fn follows_the_host_s() {
    // The shim looks at the clock twice in this time.
    let _timeout = Changed::new("hang_timeout_seconds", "20");
    let mut scene = Scene::new();
    let mut clock = Clock::start(&mut scene);
    assert!(clock.error() < TOLERANCE, "at first");
    let set = SetForward::now();
    eventually("the guest's clock follows", || clock.error() < TOLERANCE);
    drop(set);
    eventually("the guest's clock follows back", || {
        clock.error() < TOLERANCE
    });
    clock.ends();
}

#[test]
fn is_right_after_the_machine_was_stopped() {
    let mut scene = Scene::new();
    let mut clock = Clock::start(&mut scene);
    clock.error();
    let pid = pid_of(&scene, &clock.id);
    run("kill", &["-STOP", &pid]).exits(0);
    // For the guest no time passes that it could notice.
    std::thread::sleep(Duration::from_secs(5));
    run("kill", &["-CONT", &pid]).exits(0);
    assert!(clock.error() < TOLERANCE);
    clock.ends();
}

/// A pause ends as it began, however long it was, and no ping goes without an
/// answer meanwhile: the guest lives. It is longer than the shim's patience.
#[test]
fn is_right_after_a_pause() {
    let _timeout = Changed::new("hang_timeout_seconds", "10");
    let mut scene = Scene::new();
    let mut clock = Clock::start(&mut scene);
    clock.error();
    let id = clock.id.clone();
    let mut command = scene.exec_command(&id, &[], &["sh", "-c", "sleep 5; exit 6"]);
    let mut timer = command.stdin(Stdio::null()).spawn().unwrap();
    eventually("the timer runs", || {
        let said = scene.ctr(&["task", "ps", &id]).exits(0);
        said.stdout.contains("exec_id")
    });
    scene.ctr(&["task", "pause", &id]).exits(0);
    std::thread::sleep(Duration::from_secs(60));
    assert!(timer.try_wait().unwrap().is_none(), "it was not paused");
    scene.ctr(&["task", "resume", &id]).exits(0);
    assert!(clock.error() < TOLERANCE);
    assert_eq!(timer.wait().unwrap().code(), Some(6));
    clock.ends();
}
