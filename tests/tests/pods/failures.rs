//! What goes wrong around a pod is told, and leaves nothing.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nacre_tests::cri::messages::ContainerState;
use nacre_tests::pods::{Pod, PodContainer, PodScene};
use nacre_tests::{Changed, eventually, run};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use crate::SLEEP;
use crate::numbers::LONG_BOOT;

/// Without a network configuration there is no pod, and nothing of it.
#[test]
fn no_network_configuration() {
    const CONFIGURATION: &str = "/etc/cni/net.d/10-lab.conflist";
    struct Restored(Vec<u8>);
    impl Drop for Restored {
        fn drop(&mut self) {
            fs::write(CONFIGURATION, &self.0).unwrap();
        }
    }
    let scene = PodScene::new();
    let restored = Restored(fs::read(CONFIGURATION).unwrap());
    fs::remove_file(CONFIGURATION).unwrap();
    let mut refusal = String::new();
    eventually("containerd has seen that there is no network", || {
        match scene.pod("lonely").try_run() {
            Ok(pod) => pod.remove(),
            Err(error) => refusal = error.message().to_owned(),
        }
        !refusal.is_empty()
    });
    assert!(refusal.contains("network"), "{refusal}");
    drop(restored);
    eventually("containerd has seen the network", || {
        scene.pod("social").try_run().is_ok()
    });
}

/// Somebody deletes the network namespace of a running pod: it can be stopped
/// and removed all the same.
#[test]
fn network_namespace_deleted_underneath() {
    let scene = PodScene::new();
    let pod = scene.pod("uprooted").run();
    let app = pod.container("app", SLEEP).start();
    let said = run("ip", &["netns", "identify", &pod.monitor().to_string()]).exits(0);
    let name = said.stdout.trim();
    assert!(name.starts_with("cni-"), "{said:#?}");
    run("ip", &["netns", "delete", name]).exits(0);
    app.exec(&["echo", "alive"]).exits(0).prints("alive\n");
    pod.stop();
    pod.remove();
}

/// A container that cannot be made tells why, and its pod goes on.
#[test]
fn a_container_that_cannot_be_made() {
    let scene = PodScene::new();
    let pod = scene.pod("careful").run();
    let app = pod.container("app", SLEEP).start();
    let missing = pod.container("missing", &["nope"]).try_start();
    pod.refuses(missing, &["executable file not found"]);
    let socket = scene.directory("socket").join("s");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let refused = pod
        .container("refused", SLEEP)
        .mount(&socket, "/run/docker.sock")
        .try_start();
    pod.refuses(refused, &["unix socket", "/run/docker.sock"]);
    app.exec(&["echo", "alive"]).exits(0).prints("alive\n");
}

/// A directory of the disk that containerd has its snapshots on.
struct OnDisk(PathBuf);

impl OnDisk {
    fn new() -> Self {
        let path = PathBuf::from("/var/lib/pods-on-disk");
        fs::create_dir_all(path.join("volume")).unwrap();
        Self(path)
    }

    fn volume(&self) -> PathBuf {
        self.0.join("volume")
    }

    /// Takes all that is left.
    fn fill(&self) {
        const BLOCK: i64 = 4096;
        let file = File::create(self.0.join("filling")).unwrap();
        let (mut len, mut step) = (0, 1 << 30);
        while step >= BLOCK {
            match fallocate(&file, FallocateFlags::empty(), len, step) {
                Ok(()) => len += step,
                Err(Errno::ENOSPC) => step /= 2,
                Err(error) => panic!("{error}"),
            }
        }
        assert!(len > 0, "it was full");
    }

    fn free(&self) {
        fs::remove_file(self.0.join("filling")).unwrap();
    }
}

impl Drop for OnDisk {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

/// What is mounted or made on the host for a container.
fn host_has_of(pod: &Pod, container: &PodContainer) -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    let shared = Path::new("/run/nacre/k8s.io").join(&pod.id).join("shared");
    let made = fs::read_dir(&shared).unwrap().flatten();
    let made = made.map(|entry| entry.path().display().to_string());
    points
        .map(str::to_owned)
        .chain(made)
        .filter(|path| path.contains(&container.id))
        .collect()
}

/// The disk of root file systems and volumes: containers are told, and go on. One that is
/// to be started is refused, and nothing of it stays. With room again all goes on.
#[test]
fn a_full_disk() {
    let scene = PodScene::new();
    let disk = OnDisk::new();
    let pod = scene.pod("full").run();
    let app = pod.container("app", SLEEP).mount(&disk.volume(), "/data");
    let app = app.start();
    let late = pod.container("late", SLEEP).create();
    assert!(!host_has_of(&pod, &app).is_empty());

    disk.fill();
    for file in ["/file", "/data/file"] {
        let write = format!("dd if=/dev/zero of={file} bs=64k count=1");
        let said = app.sh(&write).exits(1);
        said.complains(&["No space left on device"]);
    }
    // containerd writes to that disk, too: it is the one who says so.
    let refused = scene.cri().start(&late.id).unwrap_err();
    for part in [late.id.as_str(), "no space left on device"] {
        assert!(refused.message().contains(part), "{refused}");
    }
    assert_eq!(host_has_of(&pod, &late), [""; 0]);
    app.exec(&["echo", "alive"]).exits(0).prints("alive\n");

    disk.free();
    app.sh("echo room > /file && echo room > /data/file && cat /file /data/file")
        .exits(0)
        .prints("room\nroom\n");
    let late = pod.container("late", SLEEP).attempt(1).start();
    late.sh("echo x > /file").exits(0);
}

/// The smallest there are: fifty of them fit into the lab.
#[test]
#[ignore = "fifty kernels take the lab's one emulated processor 6 s and more each, to boot alone: make long"]
fn fifty_pods_at_once() {
    const LIMIT: Duration = Duration::from_secs(500);
    let _patience = Changed::new("boot_timeout_seconds", LONG_BOOT);
    let scene = PodScene::within(LIMIT);
    thread::scope(|threads| {
        for n in 0..50 {
            let scene = &scene;
            threads.spawn(move || {
                let pod = scene.pod(&format!("many-{n}")).limits(64, 1).run();
                let text = format!("pod {n}\n");
                let command = ["echo", "pod", &n.to_string()];
                let app = pod.container("app", &command).start();
                let deadline = Instant::now() + LIMIT;
                while app.state() != ContainerState::Exited {
                    assert!(Instant::now() < deadline, "pod {n} still runs");
                    thread::sleep(Duration::from_millis(500));
                }
                assert_eq!(app.status().exit_code, 0);
                assert_eq!(app.logged("stdout"), text);
                pod.stop();
                pod.remove();
            });
        }
    });
}
