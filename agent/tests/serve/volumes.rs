//! Volumes of the sandbox, as containers see them.

use nacre_protocol::agent::volume_entry::Kind;
use nacre_protocol::agent::{
    CreateContainerRequest, DirectoryVolume, Empty, ReadFileRequest, Subpath, TmpfsVolume,
    VolumeEntry,
};
use nacre_protocol::guest::{CONTAINERS_DIR, VOLUMES_DIR};
use serde_json::{Value, json};
use ttrpc::Code;

use super::fixture::{Agent, context, spec, start, status};

fn tmpfs(name: &str) -> TmpfsVolume {
    TmpfsVolume {
        name: name.into(),
        size_bytes: 1 << 20,
        mode: 0o2770,
        gid: 77,
        ..TmpfsVolume::default()
    }
}

fn directory(generation: u64, text: &str) -> DirectoryVolume {
    let entry = |path: &str, mode, kind| VolumeEntry {
        path: path.into(),
        mode,
        kind: Some(kind),
        ..VolumeEntry::default()
    };
    DirectoryVolume {
        name: "dir".into(),
        generation,
        mode: 0o755,
        entries: vec![
            entry("", 0o755, Kind::Directory(Empty::default())),
            entry("key", 0o644, Kind::Contents(text.into())),
        ],
        links: vec![entry("key", 0, Kind::Link("..data/key".into()))],
        ..DirectoryVolume::default()
    }
}

fn with_mount(id: &str, script: &str, source: &str) -> Value {
    let mut spec = spec(id, &["sh", "-c", script]);
    let mount = json!({"destination": "/data", "type": "bind", "source": source,
                       "options": ["rbind", "rprivate"]});
    spec["mounts"].as_array_mut().unwrap().push(mount);
    spec
}

/// Runs a script to its end, with `source` on /data.
async fn run(agent: &Agent, id: &str, script: &str, source: &str, stream: u64) -> String {
    let spec = with_mount(id, script, source);
    let mut ends = agent.run(id, &spec, stream).await;
    ends.close_stdin();
    agent.wait(id, "").await;
    agent.delete(id).await.unwrap();
    ends.stdout()
}

#[tokio::test]
async fn a_tmpfs_stays_and_keeps_its_limits() {
    let Some(agent) = start() else { return };
    let volume = tmpfs("mem");
    agent.client.make_tmpfs(context(), &volume).await.unwrap();
    let source = format!("{VOLUMES_DIR}/mem");
    let script = "busybox stat -c '%a %g' /data; echo kept > /data/file; \
        busybox dd if=/dev/zero of=/data/x bs=1k count=2000 2>/dev/null || echo full";
    let said = run(&agent, "c1", script, &source, 1).await;
    assert_eq!(said, "2770 77\nfull\n");
    agent.client.make_tmpfs(context(), &volume).await.unwrap();
    let said = run(&agent, "c2", "cat /data/file", &source, 11).await;
    assert_eq!(said, "kept\n");

    let error = agent.client.make_tmpfs(context(), &tmpfs("../x")).await;
    assert_eq!(status(&error.unwrap_err()).0, Code::INVALID_ARGUMENT);
}

#[tokio::test]
async fn older_contents_are_ignored() {
    let Some(agent) = start() else { return };
    for (generation, text) in [(5, "new"), (4, "old"), (5, "again")] {
        let volume = directory(generation, text);
        agent
            .client
            .put_directory(context(), &volume)
            .await
            .unwrap();
    }
    let source = format!("{VOLUMES_DIR}/dir");
    let said = run(&agent, "c1", "cat /data/key", &source, 1).await;
    assert_eq!(said, "new");
}

fn with_subpath(mut request: CreateContainerRequest, path: &str) -> CreateContainerRequest {
    request.subpaths.push(Subpath {
        volume: "mem".into(),
        path: path.into(),
        target: format!("{CONTAINERS_DIR}/{}/subpaths/0", request.container_id),
        ..Subpath::default()
    });
    request
}

#[tokio::test]
async fn subpaths_are_made_and_links_not_followed() {
    let Some(agent) = start() else { return };
    agent
        .client
        .make_tmpfs(context(), &tmpfs("mem"))
        .await
        .unwrap();
    let source = |id: &str| format!("{CONTAINERS_DIR}/{id}/subpaths/0");
    let script = "busybox stat -c '%a %g' /data; echo part > /data/file";
    let (mut ends, stdio) = agent.streams(1);
    let request = agent.creation("c1", &with_mount("c1", script, &source("c1")), stdio);
    let request = with_subpath(request, "a/b");
    let created = agent.client.create_container(context(), &request).await;
    created.unwrap();
    agent.start("c1").await.unwrap();
    ends.close_stdin();
    agent.wait("c1", "").await;
    assert_eq!(ends.stdout(), "2770 77\n");
    agent.delete("c1").await.unwrap();
    assert!(agent.is_clean("c1"));

    let whole = format!("{VOLUMES_DIR}/mem");
    let script = "cat /data/a/b/file; busybox ln -s / /data/link; busybox ln -s a /data/inside";
    assert_eq!(run(&agent, "c2", script, &whole, 11).await, "part\n");
    for (path, complaint) in [
        ("link", "symbolic link"),
        ("link/etc", "symbolic link"),
        ("inside", "symbolic link"),
        ("../..", "path"),
    ] {
        let spec = with_mount("c3", "true", &source("c3"));
        let request = agent.creation("c3", &spec, Default::default());
        let request = with_subpath(request, path);
        let error = agent.client.create_container(context(), &request).await;
        let (code, message) = status(&error.unwrap_err());
        assert_eq!(code, Code::INVALID_ARGUMENT, "{path}: {message}");
        assert!(message.contains(complaint), "{path}: {message}");
        assert!(agent.is_clean("c3"));
    }
}

#[tokio::test]
async fn only_the_container_s_files_are_read() {
    let Some(agent) = start() else { return };
    let (ends, stdio) = agent.streams(1);
    ends.close_stdin();
    let spec = spec("c1", &["sleep", "60"]);
    agent.create("c1", &spec, stdio).await.unwrap();
    let read = async |container_id: &str, path: &str| {
        let request = ReadFileRequest {
            container_id: container_id.into(),
            path: path.into(),
            max_bytes: 9,
            ..ReadFileRequest::default()
        };
        let answer = agent.client.read_file(context(), &request).await;
        answer
            .map(|answer| answer.contents)
            .map_err(|error| status(&error).0)
    };
    let path = format!("{CONTAINERS_DIR}/c1/files/resolv.conf");
    assert_eq!(read("c1", &path).await.unwrap(), b"92.0.2.1\n");
    assert_eq!(read("c2", &path).await, Err(Code::NOT_FOUND));
    for path in ["/etc/passwd", &format!("{CONTAINERS_DIR}/c1/../../x")] {
        assert_eq!(
            read("c1", path).await,
            Err(Code::INVALID_ARGUMENT),
            "{path}"
        );
    }
}
