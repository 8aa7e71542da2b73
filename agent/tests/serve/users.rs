//! Containers with users of their own (user namespaces).

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, lchown};
use std::path::Path;

use nacre_protocol::agent::{Stdio, TmpfsVolume};
use nacre_protocol::guest::VOLUMES_DIR;
use serde_json::{Value, json};
use ttrpc::Code;

use crate::fixture::{Agent, context, outside_of_dev, process, spec, start, status};

/// What the container's root is outside.
const ROOT: u32 = 100_000;

fn mapped(agent: &Agent, args: &[&str]) -> Value {
    shift(&agent.file(""));
    let mut spec = spec("c1", args);
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.push(json!({"type": "user"}));
    let map = json!([{"containerID": 0, "hostID": ROOT, "size": 65536}]);
    spec["linux"]["uidMappings"] = map.clone();
    spec["linux"]["gidMappings"] = map;
    spec
}

/// Gives an image to the container's root, as containerd does.
fn shift(path: &Path) {
    lchown(path, Some(ROOT), Some(ROOT)).unwrap();
    if path.symlink_metadata().unwrap().is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            shift(&entry.unwrap().path());
        }
    }
}

#[tokio::test]
async fn root_of_a_container_is_nobody_outside() {
    let Some(agent) = start() else { return };
    let script = "
        id -u; id -g; cat /proc/self/uid_map | busybox tr -s ' '
        echo made > /data/file; cat /proc/sys/kernel/hostname
        echo > /dev/null && busybox head -c 3 /dev/zero | busybox wc -c
        busybox stat -c '%a %u' /dev/full /dev/fuse
        busybox test -d /sys/kernel && busybox test -d /dev/mqueue && echo mounted
        ulimit -n; echo again > /dev/stdout
        (echo 1 > /proc/sys/kernel/hostname) 2>/dev/null || echo protected
        cat /proc/version | busybox wc -c
        busybox grep CapEff /proc/self/status
        busybox mknod /data/node c 1 3 2>/dev/null || echo no nodes
    ";
    let mut spec = mapped(&agent, &["sh", "-c", script]);
    let caps = json!(["CAP_CHOWN", "CAP_MKNOD"]);
    spec["process"]["capabilities"] =
        json!({"bounding": caps, "effective": caps, "permitted": caps});
    spec["linux"]["devices"] = json!([{
        "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o600, "uid": 5,
    }]);
    let mut ends = agent.run("c1", &spec, 1).await;
    ends.close_stdin();
    assert_eq!(agent.wait("c1", "").await.exit_status, 0);
    let expected = "0\n0\n 0 100000 65536\nbox\n3\n666 0\n600 5\nmounted\n512\nagain\n\
        protected\n0\nCapEff:\t0000000008000001\nno nodes\n";
    assert_eq!(
        (ends.stdout().as_str(), ends.stderr().as_str()),
        (expected, "")
    );
    let made = fs::metadata(agent.file("data/file")).unwrap();
    assert_eq!((made.uid(), made.gid()), (ROOT, ROOT));
    agent.delete("c1").await.unwrap();
    assert!(agent.is_clean("c1"));
}

#[tokio::test]
async fn a_device_outside_of_dev_has_mapped_owners() {
    let Some(agent) = start() else { return };
    let script = "busybox stat -c '%F %a %u %g' /volumes/void /dev/null; echo > /volumes/void";
    let mut spec = mapped(&agent, &["sh", "-c", script]);
    spec["linux"]["devices"] = outside_of_dev();
    let mut ends = agent.run("c1", &spec, 1).await;
    ends.close_stdin();
    assert_eq!(agent.wait("c1", "").await.exit_status, 0);
    let expected = "character special file 666 5 6\ncharacter special file 666 0 0\n";
    assert_eq!(
        (ends.stdout().as_str(), ends.stderr().as_str()),
        (expected, "")
    );
    agent.delete("c1").await.unwrap();
    assert!(agent.is_clean("c1"));
}

#[tokio::test]
async fn execs_and_terminals_are_in_the_namespace() {
    let Some(agent) = start() else { return };
    let _init = agent
        .run("c1", &mapped(&agent, &["sleep", "1000"]), 1)
        .await;
    let mut user = process(&["sh", "-c", "cat; id -u; id -G; cat /proc/self/uid_map"]);
    user["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [7]});
    let (mut ends, stdio) = agent.streams(11);
    agent.exec("c1", "e1", &user, stdio).await.unwrap();
    ends.stdin.write_all(b"input\n").unwrap();
    ends.close_stdin();
    assert_eq!(agent.wait("c1", "e1").await.exit_status, 0);
    let said = ends.stdout();
    let words: Vec<_> = said.split_whitespace().collect();
    assert_eq!(
        words,
        ["input", "1000", "1000", "7", "0", "100000", "65536"]
    );

    let (mut ends, stdio) = agent.terminal(21);
    let script = "test -t 0 && echo > /dev/stdout && busybox stat -c %u $(busybox tty)";
    user["args"] = json!(["sh", "-c", script]);
    agent.exec("c1", "e2", &user, stdio).await.unwrap();
    assert_eq!(agent.wait("c1", "e2").await.exit_status, 0);
    let mut said = String::new();
    ends.stdout.read_to_string(&mut said).unwrap();
    assert_eq!(said.trim(), "1000");
    agent.kill("c1", 9, true).await.unwrap();
    assert_eq!(agent.wait("c1", "").await.exit_status, 137);
    agent.delete("c1").await.unwrap();
}

/// A mount with mappings shows the owners that its files have in the container.
#[tokio::test]
async fn owners_of_mounted_files_are_mapped() {
    let Some(agent) = start() else { return };
    let volume = TmpfsVolume {
        name: "v".into(),
        size_bytes: 1 << 20,
        mode: 0o777,
        uid: 33,
        gid: 44,
        ..TmpfsVolume::default()
    };
    agent.client.make_tmpfs(context(), &volume).await.unwrap();
    let bind = |destination: &str| {
        json!({"destination": destination, "type": "bind",
            "source": format!("{VOLUMES_DIR}/v"), "options": ["rbind", "rw"]})
    };
    let script = "busybox stat -c '%u %g' /volume /plain; echo > /volume/new";
    let mut first = mapped(&agent, &["sh", "-c", script]);
    let mut with_map = bind("/volume");
    with_map["uidMappings"] = first["linux"]["uidMappings"].clone();
    with_map["gidMappings"] = first["linux"]["gidMappings"].clone();
    let mounts = first["mounts"].as_array_mut().unwrap();
    mounts.extend([with_map, bind("/plain")]);
    let mut ends = agent.run("c1", &first, 1).await;
    ends.close_stdin();
    assert_eq!(
        agent.wait("c1", "").await.exit_status,
        0,
        "{}",
        ends.stderr()
    );
    assert_eq!(ends.stdout(), "33 44\n65534 65534\n");
    agent.delete("c1").await.unwrap();

    let mut second = spec("c2", &["busybox", "stat", "-c", "%u %g", "/volume/new"]);
    let mounts = second["mounts"].as_array_mut().unwrap();
    mounts.push(bind("/volume"));
    let mut ends = agent.run("c2", &second, 11).await;
    ends.close_stdin();
    assert_eq!(agent.wait("c2", "").await.exit_status, 0);
    assert_eq!(ends.stdout(), "0 0\n");
}

#[tokio::test]
async fn mappings_that_cannot_be() {
    let Some(agent) = start() else { return };
    let refusal = async |spec: &Value| {
        let error = agent.create("c1", spec, Stdio::default()).await;
        let (code, message) = status(&error.unwrap_err());
        assert!(agent.is_clean("c1"), "{message}");
        (code, message)
    };
    let mut none = mapped(&agent, &["true"]);
    none["linux"]["uidMappings"] = json!([]);
    let (_, message) = refusal(&none).await;
    assert!(message.contains("mappings"), "{message}");

    let mut stranger = mapped(&agent, &["true"]);
    stranger["process"]["user"]["uid"] = json!(70_000);
    let (code, message) = refusal(&stranger).await;
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("70000"), "{message}");

    let mut shared = mapped(&agent, &["true"]);
    shared["linux"]["namespaces"][0]["path"] = json!(nacre_protocol::guest::POD_PID_NAMESPACE);
    let (code, message) = refusal(&shared).await;
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("shareProcessNamespace"), "{message}");
}
