//! From `RunPodSandbox` to `RemovePodSandbox`, and what may happen in between.

use std::time::{Duration, Instant};

use nacre_tests::cri::messages::{ContainerState, LinuxContainerResources};
use nacre_tests::pods::{Pod, PodScene};
use nacre_tests::{OlderContainerd, SlowFile, eventually, five_seconds, run};

use crate::SLEEP;

in_both_modes![
    init_containers_containers_and_restarts,
    termination_is_graceful,
    a_pod_is_stopped_twice_and_removed,
    a_pod_whose_machine_dies_is_not_ready,
    pods_outlive_containerd,
    a_pod_is_stopped_during_a_create
];

/// Init containers run one after the other, then the others side by side; one
/// that ends is replaced in the same sandbox.
fn init_containers_containers_and_restarts(scene: &PodScene) {
    let volume = scene.directory("empty-dir");
    let pod = scene.pod("web").run();
    for step in ["one", "two"] {
        let script = format!("echo {step} >> /data/steps; cat /data/steps");
        let said = pod
            .container(&format!("init-{step}"), &["sh", "-c", &script])
            .mount(&volume, "/data")
            .run();
        let all = if step == "one" { "one\n" } else { "one\ntwo\n" };
        said.exits(0).prints(all);
    }
    let app = pod.container("app", SLEEP).mount(&volume, "/data").start();
    let script = "until [ -e /data/go ]; do sleep 0.1; done; echo gone >&2; exit 3";
    let other = pod
        .container("other", &["sh", "-c", script])
        .mount(&volume, "/data")
        .start();
    app.exec(&["cat", "/data/steps"])
        .exits(0)
        .prints("one\ntwo\n");
    app.exec(&["hostname"]).exits(0).prints("web\n");
    let states = [app.state(), other.state()];
    assert_eq!(states, [ContainerState::Running; 2]);

    app.exec(&["touch", "/data/go"]).exits(0);
    let ended = other.await_exit();
    assert_eq!((ended.exit_code, ended.reason.as_str()), (3, "Error"));
    assert!(ended.created_at <= ended.started_at && ended.started_at < ended.finished_at);
    assert_eq!(other.logged("stderr"), "gone\n");
    other.remove();

    let again = pod
        .container("other", &["echo", "again"])
        .attempt(1)
        .start();
    let ended = again.await_exit();
    assert_eq!((ended.exit_code, ended.reason.as_str()), (0, "Completed"));
    assert_eq!(ended.metadata.unwrap().attempt, 1);
    assert_ne!(again.id, other.id);
    assert!(pod.is_ready());
    assert_eq!(app.state(), ContainerState::Running);
}

/// SIGTERM once, the grace period, SIGKILL.
fn termination_is_graceful(scene: &PodScene) {
    let volume = scene.directory("notes");
    let pod = scene.pod("graceful").run();
    let note = |name: &str, then: &str| {
        let script = format!(
            "trap 'echo {name} >> /notes/{name}{then}' TERM; touch /notes/{name}-ready; \
             while true; do sleep 0.1; done"
        );
        pod.container(name, &["sh", "-c", &script])
            .mount(&volume, "/notes")
            .start()
    };
    let obedient = note("obedient", "; exit 5");
    let stubborn = note("stubborn", "");
    for name in ["obedient-ready", "stubborn-ready"] {
        eventually("traps are set", || volume.join(name).exists());
    }

    obedient.stop(Duration::from_secs(60));
    assert_eq!(obedient.status().exit_code, 5);
    let begin = Instant::now();
    stubborn.stop(Duration::from_secs(2));
    assert!(begin.elapsed() >= Duration::from_secs(2));
    assert_eq!(stubborn.status().exit_code, 137);
    for name in ["obedient", "stubborn"] {
        let notes = std::fs::read_to_string(volume.join(name)).unwrap();
        assert_eq!(notes, format!("{name}\n"));
    }
}

/// A pod is stopped with what runs in it, any number of times; then it can
/// only be removed.
fn a_pod_is_stopped_twice_and_removed(scene: &PodScene) {
    let pod = scene.pod("stopped").run();
    let app = pod.container("app", SLEEP).start();
    let monitor = pod.monitor();
    pod.stop();
    assert!(!pod.is_ready());
    assert_eq!(app.state(), ContainerState::Exited);
    assert_eq!(app.status().exit_code, 137);
    eventually("the machine is gone", || {
        !std::path::Path::new(&format!("/proc/{monitor}")).exists()
    });
    pod.stop();
    let refused = pod.container("late", SLEEP).try_start().err().unwrap();
    assert!(refused.message().contains("not running"), "{refused}");
    pod.remove();
    pod.remove();
    assert!(
        scene
            .cri()
            .pods()
            .unwrap()
            .iter()
            .all(|other| other.id != pod.id)
    );
}

/// When the machine dies, so do pod and containers, and both can be removed.
fn a_pod_whose_machine_dies_is_not_ready(scene: &PodScene) {
    let pod = scene.pod("dying").run();
    let app = pod.container("app", SLEEP).start();
    run("kill", &["-9", &pod.monitor().to_string()]).exits(0);
    let begin = Instant::now();
    pod.await_not_ready();
    let ended = app.await_exit();
    let (took, limit) = (begin.elapsed(), five_seconds());
    assert!(took < limit, "known after {took:?}, not {limit:?}");
    assert_eq!((ended.exit_code, ended.reason.as_str()), (137, "Error"));
    assert!(app.try_exec(&["true"], Duration::ZERO).is_err());
    let refused = pod.container("late", SLEEP).try_start().err().unwrap();
    assert!(!refused.message().is_empty());
    pod.stop();
    pod.remove();
}

/// What containerd is asked right after a restart it still knows.
fn pods_outlive_containerd(scene: &PodScene) {
    let pod = scene.pod("durable").run();
    let app = pod.container("app", SLEEP).start();
    let brief = pod
        .container("brief", &["sh", "-c", "sleep 1; exit 9"])
        .start();
    run("lab-containerd", &["2", "kill"]).exits(0);
    run("lab-containerd", &["2", "start"]).exits(0);
    // The first call finds the old connection broken.
    eventually("CRI answers", || scene.cri().pods().is_ok());
    let pods = scene.cri().pods().unwrap();
    assert!(
        pods.iter()
            .any(|other| other.id == pod.id && other.state == 0)
    );
    assert!(pod.is_ready());
    assert_eq!(app.state(), ContainerState::Running);
    app.exec(&["echo", "here"]).exits(0).prints("here\n");
    assert_eq!(brief.await_exit().exit_code, 9);
    pod.container("new", &["echo", "new"])
        .run()
        .exits(0)
        .prints("new\n");
}

/// How many containers containerd has bundles of: those that run, and those for which it
/// waits.
fn bundles() -> usize {
    const BUNDLES: &str = "/run/containerd/io.containerd.runtime.v2.task/k8s.io";
    std::fs::read_dir(BUNDLES).map_or(0, Iterator::count)
}

/// A pod may be stopped while a container of it is being made.
fn a_pod_is_stopped_during_a_create(scene: &PodScene) {
    let pod = scene.pod("hurried").run();
    let before = bundles();
    std::thread::scope(|threads| {
        let creating = threads.spawn(|| {
            pod.container("app", SLEEP)
                .try_start()
                .map(|container| container.id)
        });
        eventually("it is being made", || {
            bundles() > before || creating.is_finished()
        });
        pod.stop();
        // Which of the two is first is chance; neither may hang or be left.
        if let Ok(id) = creating.join().unwrap() {
            assert!(scene.cri().status(&id).is_ok());
        }
    });
    pod.stop();
    assert!(!pod.is_ready());
    pod.remove();
}

#[test]
fn no_call_waits_for_another_container_s_slow_create() {
    let scene = PodScene::new();
    no_call_waits_for_a_slow_create_in(&scene, &scene.pod("patient").run());
}

/// A container is being made, and the shim waits for a file of the host that is to be copied.
/// Meanwhile others of its pod are asked for, changed, made and stopped.
pub fn no_call_waits_for_a_slow_create_in(scene: &PodScene, pod: &Pod) {
    let file = SlowFile::new(&scene.directory("slow").join("file"), "late\n");
    let one = pod.container("one", SLEEP).start();
    let slow = pod
        .container("slow", &["cat", "/etc/slow"])
        .mount_read_only(file.path(), "/etc/slow")
        .create();
    std::thread::scope(|threads| {
        let starting = threads.spawn(|| scene.cri().start(&slow.id));
        let held = file.await_open();
        assert_eq!(one.state(), ContainerState::Running);
        one.exec(&["echo", "here"]).exits(0).prints("here\n");
        assert!(scene.cri().stats(&one.id).unwrap().memory.is_some());
        let resources = LinuxContainerResources {
            cpu_shares: 512,
            ..Default::default()
        };
        scene.cri().update(&one.id, resources).unwrap();
        let two = pod.container("two", SLEEP).start();
        two.exec(&["echo", "too"]).exits(0).prints("too\n");
        for other in [two, one] {
            other.stop(Duration::ZERO);
            assert_eq!(other.status().exit_code, 137);
            other.remove();
        }
        assert!(pod.is_ready());
        assert!(!starting.is_finished(), "it waits for the file");
        assert_eq!(slow.state(), ContainerState::Created);
        drop(held);
        starting.join().unwrap().unwrap();
    });
    assert_eq!(slow.await_exit().exit_code, 0);
    assert_eq!(slow.logged("stdout"), "late\n");
}

/// The pod of containerd 1.7's CRI, which knows one mode.
#[test]
fn a_pod_of_containerd_1_7() {
    let _containerd = OlderContainerd::start();
    let scene = PodScene::older();
    let volume = scene.directory("empty-dir");
    let pod = scene.pod("older").limits(256, 1).run();
    let init = pod.container("init", &["sh", "-c", "echo init > /data/steps"]);
    init.mount(&volume, "/data").run().exits(0);
    let app = pod.container("app", SLEEP).mount(&volume, "/data").start();
    app.sh("cat /data/steps; hostname; exit 3")
        .exits(3)
        .prints("init\nolder\n");
    let brief = pod.container("brief", &["sh", "-c", "echo out; exit 7"]);
    brief.run().exits(7).prints("out\n");
    let again = pod.container("brief", &["echo", "again"]).attempt(1);
    again.run().exits(0).prints("again\n");
    let stats = scene.cri().stats(&app.id).unwrap();
    assert!(stats.memory.unwrap().working_set_bytes.unwrap().value > 0);

    app.stop(Duration::ZERO);
    assert_eq!(app.status().exit_code, 137);
    assert!(pod.is_ready());
    pod.stop();
    assert!(!pod.is_ready());
    pod.remove();
}
