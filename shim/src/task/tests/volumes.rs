//! Volumes that the guest holds itself, with the real agent: what the container
//! sees of them, and that they follow the host.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::CreateTaskRequest;
use serde_json::{Value, json};

use super::fixture::*;
use super::real_agent::{bundle, fixture};
use crate::machine::fake::FakeHost;
use crate::storage::testing::Writer;

/// How soon an update has to arrive.
const SOON: Duration = Duration::from_secs(2);

fn bind(source: &Path, destination: &str, options: &str) -> Value {
    json!({"destination": destination, "type": "bind", "source": source,
           "options": ["rbind", "rprivate", options]})
}

/// Starts a container that has `mounts`; returns where its output goes.
pub(super) async fn start(fixture: &Fixture, id: &str, script: &str, mounts: Vec<Value>) -> String {
    let bundle = bundle(fixture, id, json!(["sh", "-c", script]));
    let config = Path::new(&bundle).join("config.json");
    let mut spec: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    spec["mounts"].as_array_mut().unwrap().extend(mounts);
    std::fs::write(&config, spec.to_string()).unwrap();
    let stdout = fixture.path(&format!("{id}.out")).display().to_string();
    std::fs::write(&stdout, "").unwrap();
    let request = CreateTaskRequest {
        id: id.into(),
        bundle,
        stdout: format!("file://{stdout}"),
        ..Default::default()
    };
    fixture.client.create(context(), &request).await.unwrap();
    fixture.start(id, "").await.unwrap();
    stdout
}

/// Waits until a container has printed `text`; fails after `limit`.
pub(super) async fn printed(stdout: &str, text: &str, limit: Duration) {
    let deadline = Instant::now() + limit;
    loop {
        let now = std::fs::read_to_string(stdout).unwrap();
        if now == text {
            return;
        }
        assert!(Instant::now() < deadline, "{now:?} is not {text:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Prints all keys whenever `..data` has changed, until there is one named end.
const FOLLOW: &str = "
    last=
    while ! [ -e /config/end ]; do
        now=$(readlink /config/..data)
        if [ \"$now\" != \"$last\" ]; then
            last=$now
            cat /config/a /config/b
        fi
    done";

#[tokio::test]
async fn a_config_map_is_followed() {
    let Some(fixture) = fixture().await else {
        return;
    };
    let mut config = Writer::new();
    config.write(&[("a", b"1"), ("b", b"1\n")]);
    let mounts = || vec![bind(config.path(), "/config", "rw")];
    let script = format!("{FOLLOW}\necho > /config/x || exit 7");
    let first = start(&fixture, "c1", &script, mounts()).await;
    let second = start(&fixture, "c2", &script, mounts()).await;
    printed(&first, "11\n", context_limit()).await;
    printed(&second, "11\n", context_limit()).await;

    config.write(&[("a", b"2"), ("b", b"2\n")]);
    printed(&first, "11\n22\n", SOON).await;
    printed(&second, "11\n22\n", SOON).await;

    config.write(&[("a", b"3"), ("b", b"3\n"), ("end", b"")]);
    assert_eq!(fixture.wait("c1", "").await, 7, "the volume is read-only");
    assert_eq!(fixture.wait("c2", "").await, 7);
}

fn context_limit() -> Duration {
    Duration::from_secs(20)
}

/// One volume that cannot be copied any more holds nobody up, and is followed
/// again when it can.
#[tokio::test]
async fn a_volume_that_grows_too_large_stays_as_it_was() {
    let Some(fixture) = fixture().await else {
        return;
    };
    let mut config = Writer::new();
    config.write(&[("a", b"1"), ("b", b"1\n")]);
    let script = format!("{FOLLOW}\nexit 0");
    let mounts = vec![bind(config.path(), "/config", "ro")];
    let output = start(&fixture, "c", &script, mounts).await;
    printed(&output, "11\n", context_limit()).await;

    config.write(&[("a", b"2"), ("b", &vec![0; 4 << 20])]);
    fixture.exec("c", "e", "true").await.unwrap();
    fixture.start("c", "e").await.unwrap();
    assert_eq!(fixture.wait("c", "e").await, 0);
    config.write(&[("a", b"3"), ("b", b"3\n")]);
    printed(&output, "11\n33\n", context_limit()).await;
    config.write(&[("end", b"")]);
    assert_eq!(fixture.wait("c", "").await, 0);
}

/// The watch ends with the container, not with its deletion.
#[tokio::test]
async fn nothing_is_watched_after_the_exit() {
    let Some(fixture) = fixture().await else {
        return;
    };
    let mut config = Writer::new();
    config.write(&[("key", b"value")]);
    let source = config.path().to_owned();
    let mounts = || vec![bind(&source, "/config", "ro")];
    let script = "cat /config/key; while [ -e /config/key ]; do :; done";
    let output = start(&fixture, "c", script, mounts()).await;
    printed(&output, "value", context_limit()).await;
    assert!(is_watched(config.path()));
    config.write(&[]);
    assert_eq!(fixture.wait("c", "").await, 0);
    let deadline = Instant::now() + context_limit();
    while is_watched(config.path()) {
        assert!(Instant::now() < deadline, "still watched");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    fixture.delete("c", "").await.unwrap();

    // A container that comes later gets what there is then.
    config.write(&[("key", b"other")]);
    let output = start(&fixture, "c2", "cat /config/key", mounts()).await;
    assert_eq!(fixture.wait("c2", "").await, 0);
    printed(&output, "other", SOON).await;
}

/// Whether this process has an inotify watch on a directory (proc_pid_fdinfo(5)).
fn is_watched(dir: &Path) -> bool {
    let inode = format!(" ino:{:x} ", std::fs::metadata(dir).unwrap().ino());
    let fds = std::fs::read_dir("/proc/self/fdinfo").unwrap();
    fds.filter_map(|entry| std::fs::read_to_string(entry.ok()?.path()).ok())
        .any(|text| text.contains("inotify wd:") && text.contains(&inode))
}

#[tokio::test]
async fn memory_is_shared_by_containers_and_bounded() {
    let Some(fixture) = fixture().await else {
        return;
    };
    // No such directory on the host: made with the default size.
    let shm = fixture.path("sandbox-shm");
    let mounts = || vec![bind(&shm, "/dev/shm", "rw")];
    let script = "mkfifo /dev/shm/pipe; cat /dev/shm/pipe; stat -c %a /dev/shm; \
        df -k /dev/shm | tail -n 1 | { read a b c; echo ${b}; }";
    let output = start(&fixture, "c1", script, mounts()).await;
    let script = "until [ -p /dev/shm/pipe ]; do :; done; echo through > /dev/shm/pipe";
    start(&fixture, "c2", script, mounts()).await;
    assert_eq!(fixture.wait("c2", "").await, 0);
    assert_eq!(fixture.wait("c1", "").await, 0);
    printed(&output, "through\n1777\n65536\n", SOON).await;
    // It outlives its containers.
    fixture.delete("c1", "").await.unwrap();
    let output = start(&fixture, "c3", "ls /dev/shm", mounts()).await;
    assert_eq!(fixture.wait("c3", "").await, 0);
    printed(&output, "pipe\n", SOON).await;
}

#[tokio::test]
async fn the_termination_log_is_there_when_the_exit_is_told() {
    let Some(mut fixture) = fixture().await else {
        return;
    };
    let log = fixture.path("kubelet/pods/1-2/containers/c/0a1b");
    std::fs::create_dir_all(log.parent().unwrap()).unwrap();
    std::fs::write(&log, "").unwrap();
    let mounts = vec![bind(&log, "/dev/termination-log", "rw")];
    let script = "seq 2000 > /dev/termination-log; echo why >> /dev/termination-log; exit 3";
    start(&fixture, "c", script, mounts).await;
    fixture.expect(&["create", "start", "exit"]).await;
    let text = std::fs::read_to_string(&log).unwrap();
    assert_eq!(text.len(), 4096, "its end, as far as the kubelet reads");
    assert!(text.ends_with("1999\n2000\nwhy\n"), "{text}");
}

/// A guest that does not hand the log back, as the scripted one, holds nothing up.
#[tokio::test]
async fn an_exit_is_told_without_the_log() {
    let mut fixture = Fixture::on(FakeHost::scripted()).await;
    let log = fixture.path("pods/1-2/containers/c/0a1b");
    std::fs::create_dir_all(log.parent().unwrap()).unwrap();
    std::fs::write(&log, "untouched").unwrap();
    fixture.mounts = json!([bind(&log, "/dev/termination-log", "rw")]);
    fixture.run("c", "exit 3").await;
    assert_eq!(fixture.wait("c", "").await, 3);
    fixture.expect(&["create", "start", "exit"]).await;
    assert_eq!(std::fs::read_to_string(&log).unwrap(), "untouched");
}
