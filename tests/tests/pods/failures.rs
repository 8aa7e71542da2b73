//! What goes wrong around a pod is told, and leaves nothing.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nacre_tests::cri::messages::ContainerState;
use nacre_tests::pods::{HANDLER, Pod, PodContainer, PodScene, SANDBOXED};
use nacre_tests::{Changed, PATIENCE, eventually, run};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use crate::SLEEP;
use crate::network::{SERVE, fetch};
use crate::numbers::LONG_BOOT;

/// What CNI plugins are configured with: the lab's, and what config/ has for a host that has
/// none.
const NETWORKS: &str = "/etc/cni/net.d";
const EXAMPLE: &str = include_str!("../../../config/10-nacre.conflist");

/// The lab's network, away until this is dropped.
struct NoNetwork {
    labs: Vec<u8>,
}

impl NoNetwork {
    fn new() -> Self {
        let labs = fs::read(Self::file("lab")).unwrap();
        fs::remove_file(Self::file("lab")).unwrap();
        Self { labs }
    }

    fn file(name: &str) -> PathBuf {
        Path::new(NETWORKS).join(format!("10-{name}.conflist"))
    }
}

impl Drop for NoNetwork {
    fn drop(&mut self) {
        // There only if the test came so far.
        let _ = fs::remove_file(Self::file("nacre"));
        fs::write(Self::file("lab"), &self.labs).unwrap();
    }
}

/// Without a network configuration there is no pod, and nothing of it; with that of config/
/// there is one.
#[test]
fn no_network_configuration() {
    let scene = PodScene::new();
    let has = |name: &str| scene.cri().networks().unwrap().contains(name);
    let (labs, examples) = ("\"Name\":\"lab\"", "\"Name\":\"nacre-example\"");
    assert!(has(labs), "{:?}", scene.cri().networks());
    let none = NoNetwork::new();
    eventually("containerd has seen that there is no network", || {
        !has(labs)
    });
    for handler in [HANDLER, SANDBOXED] {
        let parts = ["failed to setup network", "cni plugin not initialized"];
        scene.refuses(scene.pod("lonely").runtime(handler), &parts);
    }

    fs::write(NoNetwork::file("nacre"), EXAMPLE).unwrap();
    eventually("containerd has seen the example", || has(examples));
    let pod = scene.pod("social").host_port(18081, 8080).run();
    let network = pod.status().network.unwrap();
    let second = &network.additional_ips[0].ip;
    assert!(network.ip.starts_with("10.88."), "{network:?}");
    assert!(second.starts_with("fd00:88::"), "{network:?}");
    let app = pod.container("app", SERVE).start();
    let said = app.sh("ip -o addr show eth0").exits(0).stdout;
    for address in [&network.ip, second] {
        assert!(said.contains(address.as_str()), "{address}: {said}");
    }
    eventually("the host's port answers", || {
        fetch("10.88.0.1:18081", PATIENCE).as_deref() == Some("social\n")
    });
    app.exec(&["ping", "-c", "1", "-W", "20", "10.88.0.1"])
        .exits(0);
    // What its plugins gave they are to take back.
    pod.stop();
    pod.remove();
    drop(none);
    eventually("containerd has the lab's network again", || has(labs));
}

/// Somebody deletes the network namespace of a running pod: it can be stopped
/// and removed all the same.
#[test]
fn network_namespace_deleted_underneath() {
    let scene = PodScene::new();
    network_namespace_deleted_underneath_of(&scene.pod("uprooted").run());
}

/// The same of a pod, which is removed then.
pub fn network_namespace_deleted_underneath_of(pod: &Pod) {
    let app = pod.container("uprooted", SLEEP).start();
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
#[ignore = "fifty pods take the lab's one emulated processor for minutes: make long"]
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
