//! A pod's processes killed and guests that end by themselves: containerd learns
//! of it, every client's call returns, and nothing is left.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nacre_tests::{
    BUSYBOX, CONTAINERD_2, Changed, Scene, Shim, eventually, five_seconds, process_of, returned,
    run, spawn,
};

use crate::host::{Events, pid_of, status_of};

/// What a client of a container that was lost exits with.
pub const LOST: i32 = 137;

pub fn kill(pid: &str) {
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
        // Of which the shim knows: not those whose start is still under way.
        eventually("the execs run", || {
            let said = scene.ctr(&["task", "ps", &id]).exits(0);
            said.stdout.matches("exec_id").count() == 2
        });
        Self { scene, id, clients }
    }

    /// Waits for all clients, which have lost their processes, and removes the
    /// container. Returns the pod's log.
    fn ends(mut self, since: Instant) -> String {
        for client in std::mem::take(&mut self.clients) {
            returned(client).exits(LOST);
        }
        in_time(since, "clients returned");
        self.scene.await_status(&self.id, "STOPPED");
        let said = self.scene.exec(&self.id, &[], &["true"]);
        said.exits(1).complains(&["it is stopped"]);
        let log = run("nacre", &["logs", &self.id]).exits(0).stdout;
        println!("{log}");
        self.scene.ctr(&["task", "rm", &self.id]).exits(0);
        log
    }
}

/// Clients and containerd know of a death in time.
pub fn in_time(since: Instant, what: &str) {
    let took = since.elapsed();
    let limit = five_seconds();
    println!("{what}: {took:.1?} of {limit:.1?}");
    assert!(took < limit, "{what}: {took:?}, not {limit:?}");
}

/// A hang is found after the half of `hang_timeout_seconds` at the earliest, when the
/// guest has just been asked, and after all of it at the latest.
pub fn as_configured(took: Duration, seconds: u64) {
    let timeout = Duration::from_secs(seconds);
    let limit = timeout + five_seconds();
    println!("found after {took:.1?} of {timeout:?}, at most {limit:.1?}");
    let least = timeout / 2 - Duration::from_secs(1);
    assert!(least < took && took < limit, "{took:?} of {timeout:?}");
}

#[test]
fn of_the_monitor() {
    let pod = Pod::start(&[]);
    kill(&pid_of(&pod.scene, &pod.id));
    let since = Instant::now();
    let log = pod.ends(since);
    assert!(log.contains("monitor process ended"), "{log}");
}

#[test]
fn of_the_file_server() {
    let pod = Pod::start(&[]);
    let pid = run("pidof", &["virtiofsd"]).exits(0).stdout;
    kill(&pid);
    let log = pod.ends(Instant::now());
    let cause = "the file server of the shared directory has ended";
    assert!(log.contains(cause), "{log}");
}

/// Nobody is left to answer: containerd forgets the task, and runs `delete`, which says how
/// the container ended.
#[test]
fn of_the_shim() {
    let Pod { scene, id, clients } = Pod::start(&[]);
    let events = Events::listen(&scene);
    kill(&status_of(&pid_of(&scene, &id))["PPid"]);
    let since = Instant::now();
    for client in clients {
        assert_ne!(returned(client).code, Some(0));
    }
    eventually("containerd has noticed", || {
        scene.status(&id).is_none_or(|status| status == "STOPPED")
    });
    in_time(since, "containerd noticed");
    let cgroup = Path::new("/sys/fs/cgroup/default").join(&id);
    eventually("the pod is gone", || !cgroup.exists());
    in_time(since, "the pod was gone");
    let mut told = Vec::new();
    while told.last().is_none_or(|(topic, _)| topic != "/tasks/exit") {
        told.push(
            events
                .next_of(&id)
                .unwrap_or_else(|| panic!("only {told:#?}")),
        );
    }
    let (_, exit) = &told[told.len() - 1];
    assert_eq!(exit["exit_status"], 137, "{told:#?}");
}

/// When a pod is hit whose container starts.
#[derive(Debug, Clone, Copy)]
pub enum Moment {
    /// So many milliseconds after the process is there.
    AfterMs(u64),
    /// When the container is created: the client's next call starts it.
    Created,
}

impl Moment {
    /// The steps of a start lie between them.
    pub const OF_A_START: [Self; 4] = [
        Self::AfterMs(0),
        Self::AfterMs(300),
        Self::AfterMs(1500),
        Self::Created,
    ];

    pub fn wait(self, id: &str) {
        match self {
            Self::AfterMs(moment) => std::thread::sleep(Duration::from_millis(moment)),
            Self::Created => eventually("the container is created", || {
                Shim::find(id).is_ok_and(|shim| shim.state("").is_ok())
            }),
        }
    }
}

/// Waits for a client whose pod was hit, and for containerd to know. Whether the
/// client had its answer before is a matter of the moment.
pub fn returns(scene: &Scene, id: &str, client: Child, what: &str) -> Option<i32> {
    let since = Instant::now();
    let said = returned(client);
    eventually("containerd has noticed", || {
        scene.status(id).is_none_or(|status| status == "STOPPED")
    });
    println!("{what}: {said:?}");
    in_time(since, what);
    said.code
}

/// containerd kills a `start` whose caller waits no longer, removes the bundle, and asks for no
/// `delete`: there is nothing to be left by then, or a daemon that notices.
#[test]
fn of_start_at_any_moment() {
    let scene = Scene::new();
    let root = Path::new("/tmp/e2e-start");
    // None: after its answer, which containerd does not read any more.
    let moments = [0, 10, 30, 60, 100, 150, 250, 400].map(Some);
    for (number, moment) in moments.into_iter().chain([None]).enumerate() {
        let id = format!("start{number}");
        let bundle = root.join(&id);
        fs::create_dir_all(&bundle).unwrap();
        let mut start = Command::new("containerd-shim-nacre-v2")
            .args(["-namespace", "default", "-address", "/e2e", "-id", &id])
            .arg("start")
            .current_dir(&bundle)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        if let Some(moment) = moment {
            std::thread::sleep(Duration::from_millis(moment));
            // It may be done by then.
            run("kill", &["-9", &start.id().to_string()]);
        }
        let ended = start.wait().unwrap();
        println!("{id}, {moment:?} ms: {ended}");
        if moment.is_none() {
            assert!(ended.success());
            // It has a daemon that can be found.
            process_of(&id, "daemon");
        }
        eventually("the bundle is gone", || {
            fs::remove_dir_all(&bundle).is_ok() || !bundle.exists()
        });
    }
    fs::remove_dir(root).unwrap();
    // Waits until nothing is left.
    drop(scene);
}

#[test]
fn of_shim_and_monitor_while_a_container_starts() {
    for name in ["daemon", "monitor"] {
        for moment in Moment::OF_A_START {
            let mut scene = Scene::new();
            let (id, command) = scene.command(BUSYBOX, &["-d"], &["sleep", "3600"]);
            let client = spawn(command);
            let pid = process_of(&id, name);
            moment.wait(&id);
            kill(&pid);
            returns(&scene, &id, client, &format!("{name}, {moment:?}"));
        }
    }
}

#[test]
fn of_shim_and_monitor_while_an_exec_starts() {
    // None: when the shim has the exec, and the client's next call starts it.
    for (name, moment) in [
        ("daemon", Some(0)),
        ("daemon", None),
        ("monitor", Some(100)),
        ("monitor", None),
    ] {
        let mut scene = Scene::new();
        let id = scene.start_sleeper(&[]);
        let pid = process_of(&id, name);
        let shim = Shim::of(&id);
        let client = spawn(scene.exec_as(&id, "cut", &[], &["sleep", "3600"]));
        match moment {
            Some(moment) => std::thread::sleep(Duration::from_millis(moment)),
            None => eventually("there is an exec", || shim.state("cut").is_ok()),
        }
        kill(&pid);
        let what = format!("{name}, {moment:?} ms");
        let code = returns(&scene, &id, client, &what);
        assert_ne!(code, Some(0), "{what}");
    }
}

#[test]
fn of_shim_and_monitor_while_a_container_is_deleted() {
    // None: when its machine is gone, which is a step of the deletion.
    for (name, moments) in [
        ("daemon", [Some(0), Some(150), None].as_slice()),
        ("monitor", &[Some(0), Some(30), Some(150)]),
    ] {
        for moment in moments {
            let mut scene = Scene::new();
            let id = scene.start_sleeper(&[]);
            let pid = process_of(&id, name);
            let monitor = format!("/proc/{}", process_of(&id, "monitor"));
            scene.ctr(&["task", "kill", "-s", "KILL", &id]).exits(0);
            scene.await_status(&id, "STOPPED");
            let delete = CONTAINERD_2.command(&["task", "rm", &id]);
            let client = spawn(delete);
            match moment {
                Some(moment) => std::thread::sleep(Duration::from_millis(*moment)),
                None => eventually("the machine is gone", || !Path::new(&monitor).exists()),
            }
            // It may be gone by then.
            run("kill", &["-9", &pid]);
            returns(&scene, &id, client, &format!("{name}, {moment:?} ms"));
        }
    }
}

/// containerd killed, until this is dropped at the latest.
pub struct Killed;

impl Killed {
    pub fn now() -> Self {
        run("lab-containerd", &["2", "kill"]).exits(0);
        Self
    }

    pub fn restart(self) {
        drop(self);
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        let said = run("lab-containerd", &["2", "start"]);
        assert!(
            std::thread::panicking() || said.code == Some(0),
            "{said:#?}"
        );
    }
}

#[test]
fn of_containerd() {
    let mut scene = Scene::new();
    // ctr tells of the end of its input when it runs, not when it attaches.
    let script =
        "n=0; while read word; do n=$((n + 1)); echo $n $word; [ $n != 3 ] || exit 5; done";
    let (id, mut command) = scene.command(BUSYBOX, &[], &["sh", "-c", script]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut first = command.spawn().unwrap();
    let mut stdout = BufReader::new(first.stdout.take().unwrap());
    let stdin = first.stdin.as_mut().unwrap();
    writeln!(stdin, "before").unwrap();
    assert_eq!(line_of(&mut stdout), "1 before\n");
    let pid = pid_of(&scene, &id);

    let killed = Killed::now();
    drop(stdout);
    first.kill().unwrap();
    first.wait().unwrap();
    killed.restart();

    assert_eq!(scene.status(&id).as_deref(), Some("RUNNING"));
    assert_eq!(pid_of(&scene, &id), pid);
    scene
        .exec(&id, &[], &["sh", "-c", "echo hi; exit 3"])
        .exits(3)
        .prints("hi\n");
    let log = run("nacre", &["logs", &id]).exits(0).stdout;
    assert!(log.contains("booting"), "{log}");
    // The container's input has not ended with its client.
    let mut attach = Command::new("ctr");
    attach.args(["task", "attach", &id]);
    attach.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut second = attach.spawn().unwrap();
    let mut stdout = BufReader::new(second.stdout.take().unwrap());
    writeln!(second.stdin.as_mut().unwrap(), "after").unwrap();
    assert_eq!(line_of(&mut stdout), "2 after\n");
    writeln!(second.stdin.as_mut().unwrap(), "last").unwrap();
    assert_eq!(line_of(&mut stdout), "3 last\n");
    assert_eq!(second.wait().unwrap().code(), Some(5));
}

#[test]
fn of_containerd_while_a_container_ends() {
    let mut scene = Scene::new();
    let directory = "/tmp/e2e-go";
    fs::create_dir_all(directory).unwrap();
    let mount = format!("type=bind,src={directory},dst=/mnt,options=rbind:rw");
    let script = "until [ -e /mnt/go ]; do sleep 0.1; done; exit 7";
    let id = scene.start(&["--mount", &mount], &["sh", "-c", script]);

    let killed = Killed::now();
    fs::write(format!("{directory}/go"), "").unwrap();
    eventually("the shim knows of the exit", || {
        let log = run("nacre", &["logs", &id]).exits(0).stdout;
        log.contains("exited")
    });
    killed.restart();

    scene.await_status(&id, "STOPPED");
    let said = scene.ctr(&["task", "rm", &id]).exits(0);
    said.complains(&["non-zero exit code 7"]);
    fs::remove_dir_all(directory).unwrap();
}

fn line_of(reader: &mut impl BufRead) -> String {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    line
}

/// The guest's kernel kills all but the agent, which tells of each.
#[test]
fn of_every_process_in_the_guest() {
    let pod = Pod::start(&["--privileged"]);
    let since = end_by(&pod, "echo i > /proc/sysrq-trigger");
    pod.ends(since);
}

/// Runs what ends a guest, in a shell of an exec.
fn end_by(pod: &Pod, script: &str) -> Instant {
    let since = Instant::now();
    let script = format!("{script}; sleep 3600");
    let said = pod.scene.exec(&pod.id, &[], &["sh", "-c", &script]);
    said.exits(LOST);
    since
}

#[track_caller]
pub fn log_has(id: &str, text: &str) {
    let log = run("nacre", &["logs", id]).exits(0).stdout;
    assert!(log.contains(text), "no {text:?} in {log}");
}

#[test]
fn of_the_guest_by_a_panic() {
    let pod = Pod::start(&["--privileged"]);
    let since = end_by(&pod, "echo c > /proc/sysrq-trigger");
    log_has(&pod.id, "the guest kernel panicked");
    log_has(&pod.id, "Kernel panic - not syncing: sysrq triggered crash");
    pod.ends(since);
}

/// A guest whose kernel hangs answers nobody: so does one whose monitor is stopped.
#[test]
fn of_the_guest_by_a_hang() {
    const SECONDS: u64 = 8;
    let _timeout = Changed::new("hang_timeout_seconds", &SECONDS.to_string());
    let pod = Pod::start(&[]);
    run("kill", &["-STOP", &pid_of(&pod.scene, &pod.id)]).exits(0);
    let begin = Instant::now();
    let id = pod.id.clone();
    eventually("the machine is ended", || {
        let log = run("nacre", &["logs", &id]).exits(0).stdout;
        log.contains("the guest hangs")
    });
    // Only now it can be known.
    let since = Instant::now();
    as_configured(since - begin, SECONDS);
    pod.ends(since);
}

#[test]
fn of_the_guest_by_power_off() {
    let _console = Changed::new("debug_console", "true");
    let pod = Pod::start(&["--privileged"]);
    let since = end_by(&pod, "echo o > /proc/sysrq-trigger");
    log_has(&pod.id, "the guest powered off");
    log_has(&pod.id, "reboot: Power down");
    let console = run("nacre", &["logs", "--console", &pod.id])
        .exits(0)
        .stdout;
    assert!(console.contains("sysrq: Power Off"), "{console}");
    pod.ends(since);
}
