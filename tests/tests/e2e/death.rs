//! A pod's processes killed and guests that end by themselves: containerd learns
//! of it, every client's call returns, and nothing is left.

use std::process::{Child, Command, Stdio};
use std::time::Instant;

use nacre_tests::{Scene, eventually, run};

use crate::failures::Changed;
use crate::host::{pid_of, status_of};

/// What a client of a container that was lost exits with.
const LOST: i32 = 137;

fn kill(pid: &str) {
    run("kill", &["-9", pid.trim()]).exits(0);
}

/// A running container with two clients whose execs wait.
struct Pod {
    scene: Scene,
    id: String,
    clients: Vec<Child>,
}

impl Pod {
    fn start(options: &[&str]) -> Self {
        let mut scene = Scene::new();
        let id = scene.start_sleeper(options);
        let client = |_| spawn(scene.exec_command(&id, &[], &["sleep", "3600"]));
        let clients = (0..2).map(client).collect();
        eventually("the execs run", || {
            let said = scene.ctr(&["task", "ps", &id]).exits(0);
            said.stdout.lines().count() == 4
        });
        Self { scene, id, clients }
    }

    /// Waits for all clients, which have lost their processes, and removes the
    /// container.
    fn ends(mut self, since: Instant) {
        for client in &mut self.clients {
            assert_eq!(client.wait().unwrap().code(), Some(LOST));
        }
        println!("clients returned after {:.1?}", since.elapsed());
        self.scene.await_status(&self.id, "STOPPED");
        let said = self.scene.exec(&self.id, &[], &["true"]);
        said.exits(1).complains(&["it is stopped"]);
        let log = run("nacre", &["logs", &self.id]).exits(0).stdout;
        println!("{log}");
        self.scene.ctr(&["task", "rm", &self.id]).exits(0);
    }
}

fn spawn(mut command: Command) -> Child {
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null());
    quiet.spawn().unwrap()
}

#[test]
fn of_the_monitor() {
    let pod = Pod::start(&[]);
    kill(&pid_of(&pod.scene, &pod.id));
    pod.ends(Instant::now());
}

#[test]
fn of_the_file_server() {
    let pod = Pod::start(&[]);
    let pid = run("pidof", &["virtiofsd"]).exits(0).stdout;
    kill(&pid);
    pod.ends(Instant::now());
}

/// Nobody is left to answer: containerd forgets the task, and runs `delete`.
#[test]
fn of_the_shim() {
    let mut pod = Pod::start(&[]);
    kill(&status_of(&pid_of(&pod.scene, &pod.id))["PPid"]);
    let since = Instant::now();
    for client in &mut pod.clients {
        assert_ne!(client.wait().unwrap().code(), Some(0));
    }
    let Pod { scene, id, .. } = pod;
    eventually("containerd has noticed", || {
        scene.status(&id).is_none_or(|status| status == "STOPPED")
    });
    println!("containerd noticed after {:.1?}", since.elapsed());
}

#[test]
fn of_the_guest_by_a_panic() {
    let _console = Changed::new("debug_console", "true");
    let pod = Pod::start(&["--privileged"]);
    let id = pod.id.clone();
    let since = Instant::now();
    let crash = ["sh", "-c", "echo c > /proc/sysrq-trigger"];
    pod.scene.exec(&id, &[], &crash).exits(LOST);
    let log = run("nacre", &["logs", &id]).exits(0).stdout;
    assert!(log.contains("the guest kernel panicked"), "{log}");
    let console = run("nacre", &["logs", "--console", &id]).exits(0).stdout;
    assert!(console.contains("sysrq triggered crash"), "{console}");
    pod.ends(since);
}

#[test]
fn of_the_guest_by_power_off() {
    let pod = Pod::start(&["--privileged"]);
    let id = pod.id.clone();
    let since = Instant::now();
    let off = ["sh", "-c", "echo o > /proc/sysrq-trigger; sleep 3600"];
    pod.scene.exec(&id, &[], &off).exits(LOST);
    let log = run("nacre", &["logs", &id]).exits(0).stdout;
    assert!(log.contains("the guest powered off"), "{log}");
    pod.ends(since);
}
