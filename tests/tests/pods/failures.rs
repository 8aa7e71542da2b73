//! What goes wrong around a pod is told, and leaves nothing.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use nacre_tests::cri::messages::ContainerState;
use nacre_tests::pods::PodScene;
use nacre_tests::{Changed, eventually, run};

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
