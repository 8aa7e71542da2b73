//! The file server, the container's init and the agent lost at the steps of a
//! container's life: every call returns, containerd knows, nothing is left.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nacre_tests::{BUSYBOX, CONTAINERD_2, Said, Scene, Shim, eventually, run};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::boot::initramfs;
use crate::death::{LOST, MOMENTS_MS, in_time, kill, log_has, process_of, returns, spawn};
use crate::failures::Changed;

const FILE_SERVER: &str = "virtiofsd";

fn after(moment: u64) -> String {
    sleep(Duration::from_millis(moment));
    format!("after {moment} ms")
}

#[test]
fn of_the_file_server_while_a_container_starts() {
    for moment in MOMENTS_MS {
        let mut scene = Scene::new();
        let (id, command) = scene.command(BUSYBOX, &["-d"], &["sleep", "3600"]);
        let client = spawn(command);
        let pid = process_of(&id, FILE_SERVER);
        let what = after(moment);
        kill(&pid);
        returns(&scene, &id, client, &what);
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
    for client in clients {
        Said::from(client.wait_with_output().unwrap()).exits(LOST);
    }
}

/// From the first moment at which containerd has a task to kill.
#[test]
fn of_init_while_a_container_starts() {
    for moment in MOMENTS_MS {
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

/// An initramfs whose init becomes the agent and leaves behind a process that kills
/// it when it sees `sleep 31415` run. No signal reaches PID 1: its code is overwritten.
fn mortal_agent(directory: &Path) -> PathBuf {
    let tree = directory.join("tree");
    fs::create_dir_all(&tree).unwrap();
    let unpack = format!(
        "cd {} && busybox cpio -i < /usr/local/share/nacre/initrd.img && mv init agent",
        tree.display()
    );
    run("sh", &["-c", &unpack]).exits(0);
    let script = "{ until cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -q '[3]1415'; do sleep 1; done
        set -- $(grep -m 1 r-xp /proc/1/maps | tr - ' ')
        dd if=/dev/zero of=/proc/1/mem conv=notrunc bs=4096 \
            seek=$((0x$1 / 4096)) count=$(((0x$2 - 0x$1) / 4096)); } &
        exec /agent";
    initramfs(directory, script)
}

#[test]
fn of_the_agent() {
    let directory = PathBuf::from("/tmp/e2e-mortal");
    let initrd = mortal_agent(&directory);
    let _config = Changed::new("initrd", &format!("{:?}", initrd.to_str().unwrap()));
    let mut scene = Scene::new();
    let id = scene.start_sleeper(&[]);
    let other = spawn(scene.exec_command(&id, &[], &["sleep", "3600"]));
    let since = Instant::now();
    scene.exec(&id, &[], &["sleep", "31415"]).exits(LOST);
    Said::from(other.wait_with_output().unwrap()).exits(LOST);
    in_time(&scene, since, "the clients returned");
    scene.await_status(&id, "STOPPED");
    log_has(&id, "the guest kernel panicked");
    log_has(&id, "Attempted to kill init");
    scene.ctr(&["task", "rm", &id]).exits(0);
    fs::remove_dir_all(directory).unwrap();
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
    let _timeout = Changed::new("hang_timeout_seconds", "10");
    let mut scene = Scene::new();
    let id = scene.start_spec(without_walls);
    let script = "mount -t cgroup2 none /tmp && echo 1 > /tmp/agent/cgroup.freeze; sleep 3600";
    let since = Instant::now();
    scene.exec(&id, &[], &["sh", "-c", script]).exits(LOST);
    println!("the client returned after {:.1?}", since.elapsed());
    log_has(&id, "the guest hangs");
    scene.await_status(&id, "STOPPED");
    scene.ctr(&["task", "rm", &id]).exits(0);
}
