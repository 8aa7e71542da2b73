//! The file server, the container's init and containerd lost at the steps of a
//! container's life: every call returns, containerd knows, nothing is left.

use std::io::Read;
use std::path::Path;
use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nacre_tests::{
    BUSYBOX, CONTAINERD_2, Changed, Scene, Shim, eventually, process_of, returned, run, spawn,
};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::death::{Killed, LOST, Moment, as_configured, in_time, kill, log_has, returns};

const FILE_SERVER: &str = "virtiofsd";

fn after(moment: u64) -> String {
    sleep(Duration::from_millis(moment));
    format!("after {moment} ms")
}

#[test]
fn of_the_file_server_while_a_container_starts() {
    for moment in Moment::OF_A_START {
        let mut scene = Scene::new();
        let (id, command) = scene.command(BUSYBOX, &["-d"], &["sleep", "3600"]);
        let client = spawn(command);
        let pid = process_of(&id, FILE_SERVER);
        moment.wait(&id);
        kill(&pid);
        returns(&scene, &id, client, &format!("{moment:?}"));
    }
}

#[test]
fn of_the_file_server_while_an_exec_starts_and_while_a_container_is_deleted() {
    for moment in [0, 100, 500] {
        let mut scene = Scene::new();
        let id = scene.start_sleeper(&[]);
        let pid = process_of(&id, FILE_SERVER);
        let client = spawn(scene.exec_command(&id, &[], &["sleep", "3600"]));
        let what = after(moment);
        kill(&pid);
        returns(&scene, &id, client, &what);

        let id = scene.start_sleeper(&[]);
        let pid = process_of(&id, FILE_SERVER);
        scene.ctr(&["task", "kill", "-s", "KILL", &id]).exits(0);
        scene.await_status(&id, "STOPPED");
        let client = spawn(CONTAINERD_2.command(&["task", "rm", &id]));
        let what = after(moment / 2);
        // It may be gone by then.
        run("kill", &["-9", &pid]);
        returns(&scene, &id, client, &what);
    }
}

/// From the moment the shim names an exec its client is told what became of it.
#[test]
fn of_the_file_server_as_soon_as_execs_run() {
    const CLIENTS: usize = 8;
    let mut scene = Scene::new();
    let id = scene.start_sleeper(&[]);
    let server = process_of(&id, FILE_SERVER).parse().unwrap();
    let shim = Shim::of(&id);
    let client = |_| spawn(scene.exec_command(&id, &[], &["sleep", "3600"]));
    let clients: Vec<_> = (0..CLIENTS).map(client).collect();
    eventually("the execs run", || shim.execs().unwrap().len() == CLIENTS);
    nix::sys::signal::kill(Pid::from_raw(server), Signal::SIGKILL).unwrap();
    let since = Instant::now();
    for client in clients {
        returned(client).exits(LOST);
    }
    in_time(since, "clients returned");
}

/// From the first moment at which containerd has a task to kill.
#[test]
fn of_init_while_a_container_starts() {
    for moment in [0, 300, 1500] {
        let mut scene = Scene::new();
        let (id, command) = scene.command(BUSYBOX, &["-d"], &["sleep", "3600"]);
        let client = spawn(command);
        process_of(&id, "monitor");
        let what = after(moment);
        eventually("there is something to kill", || {
            scene.ctr(&["task", "kill", "-s", "KILL", &id]).code == Some(0)
        });
        returns(&scene, &id, client, &what);
    }
}

#[test]
fn of_init_while_an_exec_starts() {
    for moment in [0, 100, 300, 1000] {
        let mut scene = Scene::new();
        let id = scene.start_sleeper(&[]);
        let client = spawn(scene.exec_command(&id, &[], &["sleep", "3600"]));
        let what = after(moment);
        scene.ctr(&["task", "kill", "-s", "KILL", &id]).exits(0);
        let code = returns(&scene, &id, client, &what);
        assert!([Some(1), Some(LOST)].contains(&code), "{what}: {code:?}");
    }
}

/// The pod goes on without it: what was asked may have been done or not, what is asked
/// afterwards works.
#[test]
fn of_containerd_while_a_container_starts() {
    let mut scene = Scene::new();
    let (id, command) = scene.command(BUSYBOX, &["-d"], &["sleep", "3600"]);
    let client = spawn(command);
    process_of(&id, "monitor");
    Killed::now().restart();
    let said = returned(client);
    let status = scene.status(&id);
    println!("{said:?}, {status:?}");
    if status.is_some() {
        scene.ctr(&["task", "rm", "-f", &id]).exits(0);
    }
    assert_eq!(scene.status(&id), None);
    eventually("its pod is gone", || {
        !Path::new("/run/nacre/default").join(&id).exists()
    });
    // The container has no task, and can have another one.
    let start = ["task", "start", "--null-io", "--detach", &id];
    scene.ctr(&start).exits(0);
    scene
        .exec(&id, &[], &["echo", "here"])
        .exits(0)
        .prints("here\n");
    scene.ctr(&["task", "rm", "-f", &id]).exits(0);
}

#[test]
fn of_containerd_while_an_exec_starts_and_while_a_container_is_deleted() {
    let mut scene = Scene::new();
    let id = scene.start_sleeper(&[]);
    let client = spawn(scene.exec_as(&id, "cut", &[], &["sleep", "3600"]));
    let shim = Shim::of(&id);
    // Started or not.
    eventually("there is an exec", || shim.state("cut").is_ok());
    Killed::now().restart();
    let said = returned(client);
    assert_ne!(said.code, Some(0), "{said:?}");
    assert_eq!(scene.status(&id).as_deref(), Some("RUNNING"));
    let said = scene.exec(&id, &[], &["sh", "-c", "echo hi; exit 3"]);
    said.exits(3).prints("hi\n");

    scene.ctr(&["task", "kill", "-s", "KILL", &id]).exits(0);
    scene.await_status(&id, "STOPPED");
    let client = spawn(CONTAINERD_2.command(&["task", "rm", &id]));
    // The rest is containerd's.
    eventually("the shim has deleted it", || shim.state("").is_err());
    Killed::now().restart();
    println!("{:?}", returned(client));
    if scene.status(&id).is_some() {
        scene.ctr(&["task", "rm", "-f", &id]).exits(0);
    }
    assert_eq!(scene.status(&id), None);
}

/// The container sees all of the guest's cgroups, and may write to them.
fn without_walls(spec: &mut Value) {
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|namespace| namespace["type"] != "cgroup");
    for set in ["bounding", "effective", "permitted"] {
        spec["process"]["capabilities"][set] = json!(["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"]);
    }
    spec["process"]["args"] = json!(["sleep", "3600"]);
}

/// The kernel and the container live, nobody answers the shim.
#[test]
fn of_the_agent_by_a_hang() {
    const SECONDS: u64 = 10;
    let _timeout = Changed::new("hang_timeout_seconds", &SECONDS.to_string());
    let mut scene = Scene::new();
    let id = scene.start_spec(without_walls);
    let script = "mount -t cgroup2 none /tmp && echo frozen && \
                  echo 1 > /tmp/agent/cgroup.freeze; sleep 3600";
    let mut command = scene.exec_command(&id, &[], &["sh", "-c", script]);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut client = command.spawn().unwrap();
    let mut stdout = client.stdout.take().unwrap();
    stdout.read_exact(&mut [0; "frozen\n".len()]).unwrap();
    let since = Instant::now();
    assert_eq!(client.wait().unwrap().code(), Some(LOST));
    as_configured(since.elapsed(), SECONDS);
    log_has(&id, "the guest hangs");
    log_has(&id, "NMI IOCK error: Not continuing");
    scene.await_status(&id, "STOPPED");
    scene.ctr(&["task", "rm", &id]).exits(0);
}
