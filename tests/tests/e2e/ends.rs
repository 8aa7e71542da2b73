//! Guests that end by themselves at each step of a container's life: every call returns
//! with what happened, containerd knows, nothing is left.
//!
//! The guest's init becomes the agent and leaves a process behind, which does to the
//! guest what [`Way`] says when it sees that [`Step`]. All of the guest is visible to it.

use std::fs;
use std::io::{BufRead, BufReader, Lines};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Instant;

use nacre_tests::{
    BUSYBOX, CONTAINERD_2, Changed, KILL_AGENT, Said, Scene, eventually, process_of, returned, run,
    spawn,
};

use crate::boot::initramfs;
use crate::death::{LOST, in_time};

/// What a guest does, as its root.
struct Way {
    name: &'static str,
    script: &'static str,
    /// What the pod's log says of it.
    logged: &'static str,
    /// And the guest's kernel in it.
    last_words: &'static str,
    /// What a client is told whose call the guest had.
    told: &'static str,
}

const AGENT: Way = Way {
    name: "the agent dies",
    script: KILL_AGENT,
    logged: "the guest kernel panicked",
    last_words: "Attempted to kill init",
    told: "the guest kernel panicked",
};
const PANIC: Way = Way {
    name: "the kernel panics",
    script: "echo c >/proc/sysrq-trigger",
    logged: "the guest kernel panicked",
    last_words: "sysrq triggered crash",
    told: "the guest kernel panicked",
};
const POWER_OFF: Way = Way {
    name: "it powers off",
    script: "echo o >/proc/sysrq-trigger",
    logged: "the guest powered off",
    last_words: "reboot: Power down",
    told: "the guest powered off",
};
/// With interrupts off (`tests/devices/drivers/module/hang.c`).
const HANG: Way = Way {
    name: "it hangs",
    script: "insmod /hang.ko",
    logged: "the guest hangs",
    last_words: "RIP: 0010:spin+0x",
    told: "the guest hung",
};

/// Part of a container's life, by what the guest sees of it first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Create,
    Start,
    Exec,
    Delete,
}

impl Step {
    fn condition(self) -> &'static str {
        match self {
            Self::Create => {
                "mkdir /cgroup && mount -t cgroup2 none /cgroup
                 until ls -d /cgroup/containers/*/; do sleep 0.02; done"
            }
            Self::Start => "until pidof sleep; do sleep 0.05; done",
            Self::Exec => "until [ $(pidof sleep | wc -w) = 2 ]; do sleep 0.05; done",
            // Its init is killed, and goes no further while a process of its namespace is there
            // whose parent, outside of it, does not reap it (pid_namespaces(7)): the exit is
            // told to nobody before the guest ends.
            Self::Delete => {
                "until pid=$(pidof sleep); do sleep 0.05; done
                 nsenter -F -t $pid -p sh -c 'sleep 7200 & echo $! >/child; kill -STOP $$' &
                 until grep '^State:.Z' /proc/$(cat /child)/status; do sleep 0.05; done"
            }
        }
    }
}

/// An initramfs of nacre's agent and of what ends it.
fn mortal(directory: &Path, step: Step, way: &Way) -> PathBuf {
    let tree = directory.join("tree");
    fs::create_dir_all(&tree).unwrap();
    let unpack = format!(
        "cd {} && busybox cpio -i < /usr/local/share/nacre/initrd.img && mv init agent \
         && cp /nacre/tests/hang.ko .",
        tree.display()
    );
    run("sh", &["-c", &unpack]).exits(0);
    let (condition, end) = (step.condition(), way.script);
    let script = format!("{{ {condition}\n{end}; }} >/dev/null 2>&1 &\nexec /agent");
    initramfs(directory, &script)
}

/// A pod's log, as it is written.
pub struct Log {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    seen: Vec<String>,
}

impl Log {
    pub fn follow(id: &str) -> Self {
        let mut command = Command::new("nacre");
        command.args(["logs", "-f", id]).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let seen = Vec::new();
        Self { child, lines, seen }
    }

    /// Waits for a line with this text; returns when it came.
    fn says(&mut self, text: &str) -> Instant {
        loop {
            let Some(line) = self.lines.next() else {
                panic!("no {text:?} in {:#?}", self.seen);
            };
            self.seen.push(line.unwrap());
            if self.seen.last().is_some_and(|line| line.contains(text)) {
                return Instant::now();
            }
        }
    }

    /// All of it, when the pod is gone.
    pub fn whole(&mut self) -> String {
        let rest = self.lines.by_ref().map(Result::unwrap);
        self.seen.extend(rest);
        self.seen.join("\n")
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Takes a container to a step. Returns its id, its log, and the client whose call the guest
/// has then.
fn reach(scene: &mut Scene, step: Step) -> (String, Log, Child) {
    // Creation takes its time.
    let mounts: Vec<String> = (0..100)
        .map(|n| format!("type=tmpfs,src=tmpfs,dst=/mnt/{n},options=rw"))
        .collect();
    let mut options = vec!["-d"];
    if step == Step::Create {
        options.extend(mounts.iter().flat_map(|mount| ["--mount", mount.as_str()]));
    }
    let (id, command) = scene.command(BUSYBOX, &options, &["sleep", "3600"]);
    let client = spawn(command);
    process_of(&id, "monitor");
    let log = Log::follow(&id);
    let next = match step {
        Step::Create | Step::Start => return (id, log, client),
        Step::Exec => scene.exec_command(&id, &[], &["sleep", "3600"]),
        Step::Delete => CONTAINERD_2.command(&["task", "rm", "-f", &id]),
    };
    returned(client).exits(0);
    if step == Step::Delete {
        // The process that holds it is its guest's, of which only the container shows anything.
        let held = "until [ $(pidof sleep | wc -w) = 2 ]; do sleep 0.05; done";
        scene.exec(&id, &[], &["sh", "-c", held]).exits(0);
    }
    (id, log, spawn(next))
}

/// Fails the test unless a client was told what became of its call. That may have been
/// answered just before; or have come after, when all there is to say is that the container
/// has stopped.
fn is_told(step: Step, way: &Way, said: Said) {
    let words = [way.told, "it is stopped"];
    let was_told = words.iter().any(|words| said.stderr.contains(words));
    match step {
        Step::Create => drop(said.exits(1).complains(&[way.told])),
        Step::Start | Step::Delete => assert!(said.code == Some(0) || was_told, "{said:?}"),
        Step::Exec => assert!(said.code == Some(LOST) || was_told, "{said:?}"),
    }
}

/// A guest ends in this way at this step.
fn ends(step: Step, way: &Way) {
    let what = format!("{} at {step:?}", way.name);
    println!("{what}");
    let directory = PathBuf::from("/tmp/e2e-ends");
    let initrd = mortal(&directory, step, way);
    let _initrd = Changed::new("initrd", &format!("{:?}", initrd.to_str().unwrap()));
    let _timeout = Changed::new("hang_timeout_seconds", "8");
    let mut scene = Scene::new();
    let (id, mut log, client) = reach(&mut scene, step);
    let since = log.says(way.logged);
    let said = returned(client);
    println!("{said:?}");
    in_time(since, "the client returned");
    is_told(step, way, said);
    eventually("containerd has noticed", || {
        scene.status(&id).is_none_or(|status| status == "STOPPED")
    });
    in_time(since, "containerd noticed");
    scene.ctr(&["task", "rm", "-f", &id]);
    assert_eq!(scene.status(&id), None);
    let log = log.whole();
    assert!(log.contains(way.last_words), "{log}");
    fs::remove_dir_all(directory).unwrap();
}

/// A guest that ends in every way at one step.
fn ends_in_every_way(step: Step) {
    for way in [AGENT, PANIC, POWER_OFF, HANG] {
        ends(step, &way);
    }
}

// What the shim makes of any end at any step shows without a guest, too
// (`shim/src/task/tests/death.rs`).

#[test]
fn of_the_guest_while_a_container_is_created() {
    ends_in_every_way(Step::Create);
}

#[test]
fn of_the_guest_while_a_container_starts() {
    ends_in_every_way(Step::Start);
}

#[test]
fn of_the_guest_while_an_exec_starts() {
    ends_in_every_way(Step::Exec);
}

#[test]
fn of_the_guest_while_a_container_is_deleted() {
    ends_in_every_way(Step::Delete);
}
