//! Volumes as kubelet prepares them.

use std::fs;
use std::os::unix::fs::symlink;

use nacre_tests::pods::PodScene;

use crate::SLEEP;

in_both_modes![memory_is_shared_by_the_pod];

#[test]
fn host_paths_and_empty_dirs() {
    let scene = PodScene::new();
    let (shared, data) = (scene.directory("empty-dir"), scene.directory("host-path"));
    let file = data.join("file");
    fs::write(&file, "from the host\n").unwrap();
    let pod = scene.pod("volumes").run();
    let one = pod
        .container("one", SLEEP)
        .mount(&shared, "/shared")
        .mount(&data, "/data")
        .mount(&file, "/etc/one-file")
        .start();
    let two = pod
        .container("two", SLEEP)
        .mount(&shared, "/shared")
        .mount_read_only(&data, "/data")
        .start();

    one.sh("echo hello > /shared/hello").exits(0);
    two.exec(&["cat", "/shared/hello"])
        .exits(0)
        .prints("hello\n");
    two.sh("echo no > /data/no")
        .exits(1)
        .complains(&["Read-only"]);
    two.exec(&["cat", "/data/file"])
        .exits(0)
        .prints("from the host\n");
    one.sh("echo from the guest > /etc/one-file; mkdir /data/made")
        .exits(0);
    assert_eq!(fs::read_to_string(&file).unwrap(), "from the guest\n");
    assert!(data.join("made").is_dir());
    fs::write(data.join("later"), "later\n").unwrap();
    one.exec(&["cat", "/data/later"]).exits(0).prints("later\n");
}

/// A ConfigMap: files are links through `..data`, a link that kubelet swaps.
#[test]
fn config_maps() {
    let scene = PodScene::new();
    let volume = scene.directory("config-map");
    fs::create_dir(volume.join("..1")).unwrap();
    fs::write(volume.join("..1/key"), "value\n").unwrap();
    symlink("..1", volume.join("..data")).unwrap();
    symlink("..data/key", volume.join("key")).unwrap();
    let pod = scene.pod("configured").run();
    let app = pod
        .container("app", SLEEP)
        .mount_read_only(&volume, "/config")
        .start();
    app.exec(&["cat", "/config/key"]).exits(0).prints("value\n");
    app.exec(&["readlink", "/config/key"])
        .prints("..data/key\n");
    app.sh("echo x > /config/key")
        .exits(1)
        .complains(&["Read-only"]);
}

/// The pod's shared memory, and System V's: all of its containers have the same.
fn memory_is_shared_by_the_pod(scene: &PodScene) {
    let pod = scene.pod("shm").run();
    let one = pod.container("one", SLEEP).start();
    let two = pod.container("two", SLEEP).start();
    one.sh("echo here > /dev/shm/note").exits(0);
    two.exec(&["cat", "/dev/shm/note"])
        .exits(0)
        .prints("here\n");
    one.sh("df -k /dev/shm | awk 'NR == 2 {print $2}'")
        .prints("65536\n");
    let ids =
        |name: &str| [&one, &two].map(|c| c.sh(&format!("readlink /proc/self/ns/{name}")).stdout);
    for shared in ["ipc", "uts", "net"] {
        let [a, b] = ids(shared);
        assert_eq!(a, b, "{shared}");
    }
    for own in ["pid", "mnt"] {
        let [a, b] = ids(own);
        assert_ne!(a, b, "{own}");
    }
    one.stop(std::time::Duration::ZERO);
    one.remove();
    two.exec(&["cat", "/dev/shm/note"])
        .exits(0)
        .prints("here\n");
}
