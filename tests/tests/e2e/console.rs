//! `nacre console`: a shell in a pod's guest.

use std::process::{Command, Stdio};

use nacre_tests::{Changed, OnTerminal, Said, Scene, eventually, run, run_with_input};

use crate::host::{Events, LIFE_WITH_AN_EXEC, pid_of};

/// What the shell's prompt starts with: it waits for input when this has come.
const PROMPT: &str = "guest:";

/// The configuration with a shell for consoles, until this is dropped.
pub fn enabled() -> Changed {
    Changed::new("debug_shell", "\"/bin/busybox\"")
}

fn console(id: &str) -> Command {
    let mut command = Command::new("nacre");
    command.args(["console", id]);
    command
}

/// What a console says to its input.
pub fn ask(id: &str, input: &str) -> Said {
    run_with_input(console(id), input.as_bytes().to_vec())
}

#[test]
fn is_off_by_default() {
    let mut scene = Scene::new();
    let id = scene.start_sleeper(&[]);
    // It is what the pod was started with that counts.
    let _now = enabled();
    ask(&id, "echo hi\n")
        .exits(1)
        .prints("")
        .complains(&[&id, "debug_shell in /etc/nacre/nacre.toml must be set"]);
    ask("no-such-pod", "").exits(1).complains(&["no-such-pod"]);
}

#[test]
fn is_in_the_guest_itself() {
    let _shell = enabled();
    let mut scene = Scene::new();
    let id = scene.start_sleeper(&["--cni"]);
    let release = scene.exec(&id, &[], &["uname", "-r"]).exits(0).stdout;
    let said = ask(&id, "uname -r; ps; echo complaint >&2; exit 7\n").exits(7);
    assert_eq!(said.stderr, "complaint\n");
    assert!(said.stdout.starts_with(&release), "{said:#?}");
    let is_agent = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        words.first() == Some(&"1") && words.last() == Some(&"/init")
    };
    assert!(said.stdout.lines().any(is_agent), "no agent in {said:#?}");
    assert!(said.stdout.contains("sleep 3600"), "{said:#?}");
    let said = ask(&id, "seq 1 100000\n").exits(0);
    let lines = (1..=100_000).map(|number| format!("{number}\n"));
    let all = said.stdout == lines.collect::<String>();
    assert!(all, "{} bytes", said.stdout.len());
}

/// The pod's network, the container's files, every device, every right.
#[test]
fn reaches_all_of_the_guest() {
    let _shell = enabled();
    let mut scene = Scene::new();
    let id = scene.start_sleeper(&["--cni"]);
    let file = format!("/proc/1/root/run/nacre/containers/{id}/rootfs/bin/busybox");
    let script = format!(
        "ip -4 addr show eth0 | grep -c 'inet 10.88.'\n\
         ls {file}\n\
         dmesg | grep -c 'Linux version'\n\
         head -n 1 /dev/kmsg | wc -l\n\
         mkdir /mnt && mount -t tmpfs none /mnt && grep -c ' /mnt ' /proc/mounts\n"
    );
    let said = ask(&id, &script).exits(0);
    said.prints(&format!("1\n{file}\n1\n1\n1\n"));
}

#[test]
fn is_unknown_to_containerd() {
    let _shell = enabled();
    let mut scene = Scene::new();
    let events = Events::listen(&scene);
    let id = scene.start_sleeper(&[]);
    let tasks = scene.ctr(&["task", "ls"]).exits(0).stdout;
    let mut client = OnTerminal::spawn(console(&id), 24, 80);
    client.read_until(PROMPT);
    assert_eq!(scene.ctr(&["task", "ls"]).exits(0).stdout, tasks);
    let said = scene.ctr(&["task", "ps", &id]).exits(0);
    assert_eq!(said.stdout.lines().count(), 2, "{said:#?}");
    client.type_in("\x04");
    assert_eq!(client.wait(), Some(0));
    // The container has not noticed.
    scene.exec(&id, &[], &["pidof", "sleep"]).exits(0);
    scene.ctr(&["task", "rm", "-f", &id]).exits(0);
    // Of whatever container.
    let life = LIFE_WITH_AN_EXEC;
    assert_eq!(events.topics_of_all(life.len()), life);
}

/// What a console leaves in the guest: nothing.
#[test]
fn leaves_nothing_in_the_guest() {
    let _shell = enabled();
    let mut scene = Scene::new();
    let id = scene.start_sleeper(&[]);
    let containers = "ls /sys/fs/cgroup/containers /proc/1/root/run/nacre/containers; ps\n";
    ask(&id, "sleep 3600 & sleep 3600 &\n").exits(0);
    let mut client = console(&id)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    // One whose caller is killed while it is open.
    eventually("the second console is open", || {
        ask(&id, containers)
            .exits(0)
            .stdout
            .matches("/bin/sh")
            .count()
            >= 2
    });
    client.kill().unwrap();
    client.wait().unwrap();
    eventually("only the asking console is left", || {
        let seen = ask(&id, containers).exits(0).stdout;
        let consoles = seen.matches("console+").count();
        let sleepers = seen.matches("sleep 3600").count();
        // Of the one that asks: its cgroup and its directory.
        consoles == 2 && sleepers == 1
    });
}

#[test]
fn on_a_terminal_that_changes_its_size() {
    let _shell = enabled();
    let mut scene = Scene::new();
    let id = scene.start_sleeper(&[]);
    let mut command = console(&id);
    command.env("TERM", "vt100");
    let mut client = OnTerminal::spawn(command, 33, 101);
    client.read_until(PROMPT);
    client.type_line("echo $TERM $(stty size) on $(tty)");
    client.read_until("vt100 33 101 on /dev/pts/");
    assert!(!client.is_as_before(), "every key is the guest's");
    client.resize(40, 120);
    client.type_line("until [ \"$(stty size)\" = '40 120' ]; do sleep 0.1; done; echo re''sized");
    client.read_until("resized");
    // Ctrl-C is for what runs in the guest.
    client.type_line("sh -c 'echo sleep\"\"ing; exec sleep 3600'");
    client.read_until("sleeping");
    client.type_in("\x03");
    client.type_line("echo st''ill here");
    client.read_until("still here");
    // Ctrl-D ends the input of a shell that waits for some.
    client.read_until(PROMPT);
    client.type_in("\x04");
    assert_eq!(client.wait(), Some(0));
    assert!(client.is_as_before());

    // A command that is told to end leaves the terminal as it was, too.
    let mut client = OnTerminal::spawn(console(&id), 24, 80);
    client.read_until(PROMPT);
    client.signal("TERM");
    assert_eq!(client.wait(), Some(128 + 15));
    assert!(client.is_as_before());
}

/// Two at once, one a terminal; then the pod is deleted under both.
#[test]
fn ends_with_its_pod() {
    let _shell = enabled();
    let mut scene = Scene::new();
    let id = scene.start_sleeper(&[]);
    let mut first = OnTerminal::spawn(console(&id), 24, 80);
    let mut second = console(&id);
    second.stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut second = second.stdout(Stdio::null()).spawn().unwrap();
    let stdin = second.stdin.take();
    first.read_until(PROMPT);
    first.type_line("until [ $(ls -d /sys/fs/cgroup/containers/console* | wc -l) = 2 ]; do sleep 0.1; done; echo t''wo");
    first.read_until("two");

    scene.ctr(&["task", "rm", "-f", &id]).exits(0);
    assert_eq!(first.wait(), Some(1));
    assert!(first.is_as_before());
    first.read_until(&format!("nacre: pod {id}: the virtual machine is gone"));
    let said = Said::from(second.wait_with_output().unwrap());
    said.exits(1).complains(&[&id, "gone"]);
    drop(stdin);
}

#[test]
fn ends_with_the_guest_and_with_the_shim() {
    let _shell = enabled();
    let mut scene = Scene::new();
    let id = scene.start_sleeper(&[]);
    let mut client = OnTerminal::spawn(console(&id), 24, 80);
    client.read_until(PROMPT);
    client.type_line("echo c > /proc/sysrq-trigger");
    assert_eq!(client.wait(), Some(1));
    assert!(client.is_as_before());
    client.read_until("the virtual machine is gone: the guest kernel panicked");
    ask(&id, "")
        .exits(1)
        .complains(&["the virtual machine is gone"]);

    let id = scene.start_sleeper(&[]);
    let mut client = OnTerminal::spawn(console(&id), 24, 80);
    client.read_until(PROMPT);
    let shim = crate::host::status_of(&pid_of(&scene, &id))["PPid"].clone();
    run("kill", &["-9", shim.trim()]).exits(0);
    assert_eq!(client.wait(), Some(1));
    assert!(client.is_as_before());
    client.read_until(&format!("the shim of pod {id} is gone"));
}
