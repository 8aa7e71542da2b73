//! Which way each kind of mount goes.

use std::os::unix::fs::PermissionsExt;

use nix::pty::openpty;

use super::*;

use crate::storage::volumes::testing::Writer;

/// Where the guest finds what is mounted, in the spec's order.
fn sources(prepared: &Prepared) -> Vec<String> {
    let mounts = prepared.guest_spec.mounts().as_ref().unwrap();
    mounts
        .iter()
        .map(|mount| mount.source().as_ref().unwrap().display().to_string())
        .collect()
}

fn options(prepared: &Prepared, index: usize) -> Vec<String> {
    let mounts = prepared.guest_spec.mounts().as_ref().unwrap();
    mounts[index].options().clone().unwrap()
}

/// A bind mount's JSON.
fn bind(source: &Path, destination: &str, options: &[&str]) -> Value {
    let options = [&["rbind"][..], options].concat();
    json!({"destination": destination, "type": "bind", "source": source, "options": options})
}

fn tmpfs(target: &Path, data: &str) {
    std::fs::create_dir_all(target).unwrap();
    let flags = MsFlags::empty();
    nix::mount::mount(Some("tmpfs"), target, Some("tmpfs"), flags, Some(data)).unwrap();
}

impl Host {
    fn pod(&self, rest: &str) -> PathBuf {
        self.path("kubelet/pods/1-2").join(rest)
    }

    /// The host's side of what the guest sees at `source`.
    fn shared(&self, source: &str) -> PathBuf {
        let place = source.strip_prefix("/run/nacre/shared/").unwrap();
        self.path("shared").join(place)
    }
}

#[test]
fn volumes_are_shared_copied_or_replaced() {
    if !own_mounts() {
        return;
    }
    let host = Host::new();
    std::fs::write(host.path("resolv.conf"), "nameserver 10.0.0.1\n").unwrap();
    std::fs::write(host.path("file"), "").unwrap();
    let prepared = host
        .prepare(&json!([
            {"destination": "/proc", "type": "proc", "source": "proc"},
            bind(&host.path("data"), "/data", &["ro"]),
            bind(&host.path("resolv.conf"), "/etc/resolv.conf", &["rw"]),
            bind(&host.path("file"), "/file", &["rw"]),
            bind(Path::new("/nonexistent/shm"), "/dev/shm", &[]),
        ]))
        .unwrap();

    let sources = sources(&prepared);
    assert_eq!(sources[0], "proc");
    assert_eq!(sources[2], "/run/nacre/containers/c1/files/2");
    assert_eq!(sources[3], "/run/nacre/shared/c1/mounts/3");
    assert!(sources[4].starts_with("/run/nacre/volumes/mem-"));
    assert_eq!(prepared.files.len(), 1);
    assert_eq!(prepared.files[0].contents, b"nameserver 10.0.0.1\n");
    let shm = &prepared.volumes.tmpfs[0];
    assert_eq!((shm.size_bytes, shm.mode), (64 << 20, 0o1777));
    assert!(
        std::fs::write(host.shared(&sources[1]).join("new"), "").is_err(),
        "read-only holds on the host"
    );
    std::fs::write(host.shared(&sources[3]), "done").unwrap();
    assert_eq!(std::fs::read_to_string(host.path("file")).unwrap(), "done");
    release(&host.path("shared"), "c1").unwrap();
    assert!(!host.path("shared/c1").exists());
    assert!(host.path("data").exists() && host.path("file").exists());
}

#[test]
fn refused_volume_leaves_nothing_mounted() {
    if !own_mounts() {
        return;
    }
    let host = Host::new();
    let data = host.path("data");
    let terminal = openpty(None, None).unwrap();
    let node = nix::unistd::ttyname(&terminal.slave).unwrap();
    let cases = [
        (bind(&node, "/volume", &[]), "device node"),
        (bind(Path::new("/dev"), "/volume", &[]), "/dev"),
        (bind(Path::new("/proc"), "/volume", &[]), "/proc"),
        (
            bind(Path::new("/nonexistent"), "/volume", &[]),
            "/nonexistent",
        ),
        (bind(&data, "/volume", &["rshared"]), "Bidirectional"),
    ];
    for (mount, needle) in cases {
        let mounts = json!([bind(&data, "/data", &[]), mount]);
        let message = host.prepare(&mounts).unwrap_err().to_string();
        assert!(
            message.contains("/volume") && message.contains(needle),
            "{message}"
        );
        let shared = std::fs::read_dir(host.path("shared")).unwrap();
        assert_eq!(shared.count(), 0, "{needle}");
    }
}

/// The guest's own nodes stand for those of the host's that any kernel has, whatever their
/// paths are there.
#[test]
fn nodes_of_the_kernel_s_devices_are_the_guest_s() {
    if !own_mounts() {
        return;
    }
    let host = Host::new();
    std::os::unix::fs::symlink("/dev/zero", host.path("link")).unwrap();
    let mounts = json!([
        bind(Path::new("/dev/null"), "/etc/masked", &["ro"]),
        bind(&host.path("link"), "/volume", &[]),
    ]);
    let prepared = host.prepare(&mounts).unwrap();
    assert_eq!(sources(&prepared), ["/dev/null", "/dev/zero"]);
    assert!(options(&prepared, 0).contains(&"ro".to_owned()));
    assert!(prepared.files.is_empty() && !host.path("shared/c1/mounts").exists());
}

#[test]
fn a_directory_is_shared_once_for_the_pod() {
    if !own_mounts() {
        return;
    }
    let host = Host::new();
    let data = host.path("data");
    let of = |id: &str, options: &[&str]| {
        let mounts = json!([bind(&data, "/data", options)]);
        let prepared = host.prepare_as(id, &mounts).unwrap();
        sources(&prepared).remove(0)
    };

    let first = of("c1", &["rw"]);
    assert_eq!(of("c2", &["rw"]), first);
    assert_ne!(of("c3", &["ro"]), first);
    std::fs::write(host.shared(&first).join("file"), "").unwrap();

    release(&host.path("shared"), "c1").unwrap();
    assert!(host.shared(&first).join("file").exists(), "c2 has it still");
    // What is at the path now is not what was shared.
    std::fs::rename(&data, host.path("old")).unwrap();
    std::fs::create_dir(&data).unwrap();
    assert_ne!(of("c4", &["rw"]), first);
    for id in ["c2", "c3", "c4"] {
        release(&host.path("shared"), id).unwrap();
    }
}

/// Files of the host come to the guest with their owners mapped; those the guest
/// holds itself it maps, too.
#[test]
fn owners_of_volumes_are_mapped() {
    if !own_mounts() {
        return;
    }
    let host = Host::new();
    let data = host.path("theirs");
    tmpfs(&data, "mode=755");
    if !can_map() {
        return;
    }
    std::fs::write(data.join("file"), "").unwrap();
    std::os::unix::fs::chown(data.join("file"), Some(33), Some(44)).unwrap();
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    let mapped = |source: &Path, destination: &str, options: &[&str]| {
        let mut mount = bind(source, destination, options);
        mount["uidMappings"] = map.clone();
        mount["gidMappings"] = map.clone();
        mount
    };
    let plain = host.path("data");
    std::fs::write(host.path("hosts"), "").unwrap();
    let mounts = json!([
        mapped(&data.join("file"), "/file", &["rw"]),
        mapped(&host.path("hosts"), "/etc/hosts", &["rw"]),
        bind(&plain, "/plain", &["rw"]),
    ]);
    let prepared = host.prepare(&mounts).unwrap();

    let sources = sources(&prepared);
    let file = std::fs::metadata(host.shared(&sources[0])).unwrap();
    assert_eq!((file.uid(), file.gid()), (100_033, 100_044));
    std::fs::write(host.shared(&sources[0]), "x").unwrap();
    let mounts = prepared.guest_spec.mounts().as_ref().unwrap();
    let has_maps = |index: usize| mounts[index].uid_mappings().is_some();
    assert_eq!(
        (has_maps(0), has_maps(1), has_maps(2)),
        (false, true, false)
    );
    release(&host.path("shared"), "c1").unwrap();
}

/// As one container has a directory mapped, another may have it as it is.
#[test]
fn a_directory_is_shared_once_for_each_mapping() {
    if !own_mounts() {
        return;
    }
    let host = Host::new();
    let data = host.path("mapped");
    tmpfs(&data, "mode=755");
    if !can_map() {
        return;
    }
    std::fs::write(data.join("file"), "").unwrap();
    let of = |id: &str, first: Option<u32>| {
        let mut mount = bind(&data, "/data", &["rw", "idmap"]);
        if let Some(first) = first {
            let map = json!([{"containerID": 0, "hostID": first, "size": 10}]);
            mount["uidMappings"] = map.clone();
            mount["gidMappings"] = map;
        }
        let prepared = host.prepare_as(id, &json!([mount])).unwrap();
        assert!(!options(&prepared, 0).contains(&"idmap".to_owned()));
        let source = sources(&prepared).remove(0);
        let owner = std::fs::metadata(host.shared(&source).join("file"))
            .unwrap()
            .uid();
        (source, owner)
    };
    let first = of("c1", Some(5000));
    assert_eq!(first.1, 5000);
    assert_eq!(of("c2", Some(5000)), first);
    assert_eq!(of("c3", Some(6000)).1, 6000);
    assert_eq!(of("c4", None).1, 0);
    for id in ["c1", "c2", "c3", "c4"] {
        release(&host.path("shared"), id).unwrap();
    }
}

#[test]
fn later_mounts_of_the_host_arrive_if_asked_for() {
    if !own_mounts() {
        return;
    }
    let host = Host::new();
    let data = host.path("data");
    tmpfs(&data, "size=1m");
    let none = None::<&str>;
    nix::mount::mount(none, &data, none, MsFlags::MS_SHARED, none).unwrap();
    let prepared = host
        .prepare(&json!([
            bind(&data, "/slave", &["rslave"]),
            bind(&data, "/private", &["rprivate"]),
            bind(&data, "/default", &[]),
        ]))
        .unwrap();

    tmpfs(&data.join("later"), "size=1m");
    std::fs::write(data.join("later/file"), "").unwrap();

    let places: Vec<_> = sources(&prepared).iter().map(|s| host.shared(s)).collect();
    assert!(places[0].join("later/file").exists());
    assert!(!places[1].join("later/file").exists());
    assert_eq!(places[1], places[2]);
    // And none of the guest's go back.
    tmpfs(&places[0].join("later"), "size=1m");
    assert!(data.join("later/file").exists());
}

#[test]
fn what_the_kubelet_writes_is_copied_and_read_only() {
    if !own_mounts() {
        return;
    }
    let host = Host::new();
    let mut config = Writer::new();
    config.write(&[("key", b"value")]);
    let mut large = Writer::new();
    large.write(&[("key", &vec![0; 4 << 20])]);

    let mounts = json!([
        bind(config.path(), "/config", &["rw", "rprivate"]),
        bind(config.path(), "/again", &["rro"]),
        bind(large.path(), "/large", &["ro"]),
    ]);
    let prepared = host.prepare(&mounts).unwrap();

    let sources = sources(&prepared);
    assert!(sources[0].starts_with("/run/nacre/volumes/dir-"));
    assert_eq!(sources[0], sources[1]);
    assert_eq!(options(&prepared, 0), ["rbind", "rprivate", "ro"]);
    assert_eq!(options(&prepared, 1), ["rbind", "rro"]);
    assert!(host.shared(&sources[2]).join("key").exists());
    assert_eq!(prepared.volumes.dirs.len(), 2);
    assert_eq!(prepared.volumes.dirs[0].source, config.path());
}

#[test]
fn empty_dirs_in_memory_are_memory_of_the_guest() {
    if !own_mounts() {
        return;
    }
    let host = Host::new();
    let memory = host.pod("volumes/kubernetes.io~empty-dir/memory");
    tmpfs(&memory, "size=1m,mode=2770,gid=77");
    let disk = host.pod("volumes/kubernetes.io~empty-dir/disk");
    let part = host.pod("volume-subpaths/memory/c/0");
    let part_of_disk = host.pod("volume-subpaths/disk/c/0");
    for dir in [&disk, &part, &part_of_disk, &memory.join("a/b")] {
        std::fs::create_dir_all(dir).unwrap();
    }
    let bound = Some(memory.join("a/b"));
    let none = None::<&str>;
    nix::mount::mount(bound.as_ref(), &part, none, MsFlags::MS_BIND, none).unwrap();

    let mounts = json!([
        bind(&memory, "/memory", &["rw"]),
        bind(&memory, "/dev/shm", &["rw"]),
        bind(&disk, "/disk", &["rw"]),
        bind(&part, "/part", &["rw"]),
        bind(&part_of_disk, "/part-of-disk", &["rw"]),
    ]);
    let prepared = host.prepare(&mounts).unwrap();

    let sources = sources(&prepared);
    let volume = &prepared.volumes.tmpfs[0];
    assert_eq!(sources[0], format!("/run/nacre/volumes/{}", volume.name));
    assert_eq!(sources[0], sources[1]);
    assert_eq!((volume.size_bytes, volume.mode), (1 << 20, 0o2770));
    assert_eq!(volume.gid, 77);
    assert!(sources[2].starts_with("/run/nacre/shared/.volumes/"));
    assert_eq!(sources[3], "/run/nacre/containers/c1/subpaths/3");
    let subpath = &prepared.volumes.subpaths[0];
    assert_eq!((&subpath.volume, &*subpath.path), (&volume.name, "a/b"));
    assert_eq!(subpath.target, sources[3]);
    assert!(sources[4].starts_with("/run/nacre/shared/.volumes/"));
}

#[test]
fn empty_dirs_of_huge_pages_are_huge_pages_of_the_guest() {
    if !own_mounts() {
        return;
    }
    let host = Host::new();
    let volume = host.pod("volumes/kubernetes.io~empty-dir/huge");
    let part = host.pod("volume-subpaths/huge/c/0");
    for dir in [&volume, &part] {
        std::fs::create_dir_all(dir).unwrap();
    }
    let kind = Some("hugetlbfs");
    let data = Some("pagesize=2M,gid=77");
    if let Err(errno) = nix::mount::mount(kind, &volume, kind, MsFlags::empty(), data) {
        eprintln!("skipped: no hugetlbfs: {errno}");
        return;
    }
    // As kubelet does for fsGroup: the mount option takes no set-group-ID bit.
    std::fs::set_permissions(&volume, std::fs::Permissions::from_mode(0o2770)).unwrap();
    std::fs::create_dir(volume.join("a")).unwrap();
    let bound = Some(volume.join("a"));
    let none = None::<&str>;
    nix::mount::mount(bound.as_ref(), &part, none, MsFlags::MS_BIND, none).unwrap();

    let mounts = json!([
        bind(&volume, "/huge", &["rw"]),
        bind(&part, "/part", &["rw"])
    ]);
    let prepared = host.prepare(&mounts).unwrap();

    let sources = sources(&prepared);
    let memory = &prepared.volumes.tmpfs[0];
    assert_eq!(sources[0], format!("/run/nacre/volumes/{}", memory.name));
    assert_eq!((memory.page_bytes, memory.mode), (2 << 20, 0o2770));
    assert_eq!((memory.gid, memory.size_bytes), (77, 0));
    assert_eq!(sources[1], "/run/nacre/containers/c1/subpaths/1");
    assert_eq!(prepared.volumes.subpaths[0].path, "a");
}

#[test]
fn sub_paths_of_files_are_copied_if_read_only_else_shared() {
    if !own_mounts() {
        return;
    }
    let host = Host::new();
    let mut config = Writer::new();
    config.write(&[("key", b"value")]);
    let none = None::<&str>;
    let part = |volume: &str, source: &Path| {
        let part = host.pod(&format!("volume-subpaths/{volume}/c/0"));
        std::fs::create_dir_all(part.parent().unwrap()).unwrap();
        std::fs::write(&part, "").unwrap();
        nix::mount::mount(Some(source), &part, none, MsFlags::MS_BIND, none).unwrap();
        part
    };
    let key = part("config", &config.path().join("..data/key"));
    let file = host.path("data/file");
    std::fs::write(&file, "before").unwrap();
    let on_disk = part("disk", &file);
    let mounts = json!([
        bind(&key, "/key", &["ro"]),
        bind(&on_disk, "/file", &["rw"])
    ]);
    let prepared = host.prepare(&mounts).unwrap();

    let sources = sources(&prepared);
    assert!(sources[0].ends_with("/files/0"));
    assert_eq!(prepared.files[0].contents, b"value");
    std::fs::write(host.shared(&sources[1]), "after").unwrap();
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "after");
}

#[test]
fn dev_shm_is_as_large_as_the_host_s() {
    if !own_mounts() {
        return;
    }
    let host = Host::new();
    let shm = host.path("sandbox/shm");
    tmpfs(&shm, "size=2m,mode=1777");
    let of = |source: &Path| {
        let prepared = host.prepare(&json!([bind(source, "/dev/shm", &[])]));
        let prepared = prepared.unwrap();
        release(&host.path("shared"), "c1").unwrap();
        prepared
    };
    let (first, second) = (of(&shm), of(&shm));
    assert_eq!(first.volumes.tmpfs, second.volumes.tmpfs);
    let volume = &first.volumes.tmpfs[0];
    assert_eq!((volume.size_bytes, volume.mode), (2 << 20, 0o1777));
    // A directory of the user's choice is what it is.
    let other = of(Path::new("/usr"));
    assert!(other.volumes.tmpfs.is_empty() && other.uses_shared_dir);
}

#[test]
fn termination_logs_are_copied_back() {
    if !own_mounts() {
        return;
    }
    let host = Host::new();
    let log = host.pod("containers/c/0a1b2c3d");
    std::fs::create_dir_all(log.parent().unwrap()).unwrap();
    std::fs::write(&log, "before").unwrap();
    let mounts = json!([bind(&log, "/dev/termination-log", &["rw"])]);

    let prepared = host.prepare(&mounts).unwrap();

    assert_eq!(sources(&prepared), ["/run/nacre/containers/c1/files/0"]);
    assert_eq!(prepared.files[0].contents, b"before");
    let back = &prepared.volumes.write_back[0];
    assert_eq!(back.guest_path, prepared.files[0].path);
    back.write(b"after").unwrap();
    assert_eq!(std::fs::read_to_string(&log).unwrap(), "after");
}

/// One message takes them all, and it has a limit.
#[test]
fn files_beyond_what_a_message_takes_are_shared() {
    if !own_mounts() {
        return;
    }
    let host = Host::new();
    let file = |name: &str, size: usize| {
        std::fs::write(host.path(name), vec![0; size]).unwrap();
        bind(&host.path(name), &format!("/{name}"), &["ro"])
    };
    let mounts = json!([
        file("a", 1 << 20),
        file("b", (1 << 20) + 1),
        file("c", 1 << 20),
        file("d", 1),
    ]);
    let prepared = host.prepare(&mounts).unwrap();
    let sources = sources(&prepared);
    let copied: Vec<_> = sources.iter().map(|s| s.contains("/files/")).collect();
    assert_eq!(copied, [true, false, true, false]);
}
