//! Hooks on the host and in the guest (runtime-spec, "POSIX-platform Hooks"), and
//! the network a hook makes, as nerdctl's do.

use std::fs;
use std::path::Path;
use std::process::Command;

use nacre_tests::{CONTAINERD_2, Scene};
use serde_json::{Value, json};

const DIRECTORY: &str = "/tmp/e2e-hooks";

/// A hook that runs a script with the state in `$state`.
fn hook(script: &str) -> Value {
    let script = format!("state=$(cat); {script}");
    json!([{
        "path": "/bin/sh",
        "args": ["sh", "-c", script],
        "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
    }])
}

/// Makes the interface eth0 in the network namespace of the state's process, and keeps what
/// the shim has written of the pod by then.
const MAKE_NETWORK: &str = "
    set -e; echo \"$state\" > /tmp/e2e-hooks/create
    netns=$(echo \"$state\" | sed 's|.*\"nerdctl/network-namespace\":\"\\([^\"]*\\)\".*|\\1|')
    pid=$(echo \"$state\" | sed 's|.*\"pid\":\\([0-9]*\\).*|\\1|')
    ip link add hook0 type veth peer name eth0 netns $pid
    ip addr add 10.99.0.1/24 dev hook0
    ip link set hook0 up
    inside() { nsenter --net=$netns \"$@\"; }
    inside ip addr add 10.99.0.2/24 dev eth0
    inside ip link set eth0 up
    inside ip route add default via 10.99.0.1
    id=$(echo \"$state\" | sed 's|.*\"id\":\"\\([^\"]*\\)\".*|\\1|')
    cp /run/nacre/default/$id/state.json /tmp/e2e-hooks/pod
";

fn scene() -> Scene {
    let _ = fs::remove_dir_all(DIRECTORY);
    fs::create_dir(DIRECTORY).unwrap();
    Scene::new()
}

fn state(name: &str) -> Value {
    let path = Path::new(DIRECTORY).join(name);
    let text = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&text).unwrap()
}

#[test]
fn network_made_by_a_hook() {
    let mut scene = scene();
    let script = "ip -o addr show eth0; ping -c 1 -w 20 10.99.0.1; ip route";
    let said = scene.run_spec(|spec| {
        spec["hooks"] = json!({
            "createRuntime": hook(MAKE_NETWORK),
            "poststop": hook("echo \"$state\" > /tmp/e2e-hooks/stop"),
        });
        spec["annotations"] = json!({"to-be": "seen"});
        spec["process"]["args"] = json!(["sh", "-c", script]);
    });
    let said = said.exits(0);
    for expected in [
        "inet 10.99.0.2/24",
        "1 packets received",
        "default via 10.99.0.1",
    ] {
        assert!(said.stdout.contains(expected), "{said:#?}");
    }
    let created = state("create");
    let id = created["id"].as_str().unwrap();
    assert_eq!(created["status"], "creating");
    assert_eq!(created["annotations"]["to-be"], "seen");
    let bundle = created["bundle"].as_str().unwrap();
    assert!(id.starts_with("e2e-") && bundle.ends_with(id), "{created}");
    // The guest's interfaces may come later as well, so they do not tell: these come with its
    // boot.
    let pod = state("pod");
    for part in ["virtiofsd", "vcpus"] {
        assert_eq!(pod.get(part), Some(&Value::Null), "{pod}");
    }
    let stopped = state("stop");
    assert_eq!(stopped["status"], "stopped");
    assert_eq!(stopped["id"], created["id"]);
}

/// As CNI plugins do, which leave a name of the network namespace. What processes a hook
/// leaves are in its group.
#[test]
fn what_a_hook_leaves_is_the_host_s_and_not_the_pod_s() {
    let mut scene = scene();
    let mounted = Path::new(DIRECTORY).join("netns");
    let said = scene.run_spec(|spec| {
        spec["hooks"] = json!({
            "createRuntime": hook("set -e; cd /tmp/e2e-hooks; : > netns; mount --bind /proc/self/ns/net netns; cat /proc/self/cgroup > group"),
        });
        spec["process"]["args"] = json!(["true"]);
    });
    said.exits(0);
    let unmounted = Command::new("umount").arg(&mounted).output().unwrap();
    assert!(unmounted.status.success(), "{unmounted:?}");
    let group = fs::read_to_string(Path::new(DIRECTORY).join("group")).unwrap();
    assert_eq!(group, CONTAINERD_2.cgroup());
}

#[test]
fn hook_that_fails_fails_the_container() {
    let mut scene = scene();
    let said = scene.run_spec(|spec| {
        spec["hooks"] = json!({
            "createRuntime": hook("echo no bridge >&2; exit 3"),
            "poststop": hook("touch /tmp/e2e-hooks/undone"),
        });
    });
    said.exits(1).complains(&["/bin/sh", "no bridge"]);
    assert!(Path::new(DIRECTORY).join("undone").exists());
}

/// The one sees the container's files and processes, the others the host's.
#[test]
fn hooks_around_the_start_run_where_they_belong() {
    let mut scene = scene();
    let said = scene.run_spec(|spec| {
        spec["hooks"] = json!({
            "startContainer": hook("echo \"$state\" > /run/state; cat /proc/1/comm /proc/version > /run/where"),
            "poststart": hook("echo \"$state\" > /tmp/e2e-hooks/started; exit 1"),
        });
        let script = "cat /run/state; tail -n 1 /run/where";
        spec["process"]["args"] = json!(["sh", "-c", script]);
    });
    let said = said.exits(0);
    let (state_text, version) = said.stdout.trim().split_once('\n').unwrap();
    let guest: Value = serde_json::from_str(state_text).unwrap();
    assert_eq!(
        (&guest["status"], &guest["pid"]),
        (&json!("created"), &json!(1))
    );
    let host = fs::read_to_string("/proc/version").unwrap();
    assert_ne!(version, host.trim(), "the guest's kernel");
    let started = state("started");
    assert_eq!(started["status"], "running");
    assert_eq!(started["id"], guest["id"]);
    assert_eq!(started["bundle"], guest["bundle"]);
}

#[test]
fn hook_in_the_guest_that_fails_fails_the_start() {
    let mut scene = scene();
    let said = scene.run_spec(|spec| {
        spec["hooks"] = json!({"startContainer": hook("echo no gpu >&2; exit 3")});
        spec["process"]["args"] = json!(["echo", "ran"]);
    });
    said.exits(1)
        .prints("")
        .complains(&["startContainer", "/bin/sh", "exit status: 3", "no gpu"]);
}

#[test]
fn hooks_of_the_host_inside_the_container_are_refused() {
    let mut scene = scene();
    let said = scene.run_spec(|spec| {
        spec["hooks"] = json!({"createContainer": hook("touch /tmp/e2e-hooks/ran")});
    });
    said.exits(1).complains(&["createContainer", "/bin/sh"]);
    assert!(!Path::new(DIRECTORY).join("ran").exists());
}
