//! `nacre install` and `nacre uninstall` on a machine whose containerd runs pods by them.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nacre_tests::pods::{Pod, PodScene};
use nacre_tests::{Said, eventually, run};

use crate::SLEEP;

/// What the lab was given: programs, kernel, agent.
const STAGE: &str = "/nacre/usr/local";
const CONTAINERD: &str = "/etc/containerd/config.toml";
const RUNTIME: &str = "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.nacre]";
const LIBRARY: &str = "/usr/local/lib/nacre";
const SHIM: &str = "bin/containerd-shim-nacre-v2";

/// The lab without nacre, until this is dropped: nothing in /usr/local, and a
/// containerd that does not know the runtime.
struct Bare {
    config: String,
}

impl Bare {
    fn new() -> Self {
        let config = fs::read_to_string(CONTAINERD).unwrap();
        // The runtime is the last thing there.
        let (without, _) = config.split_once(RUNTIME).unwrap();
        fs::write(CONTAINERD, without).unwrap();
        // It is bound from the stage, which must keep what is covered here.
        run("mount", &["--make-private", "/usr/local"]).exits(0);
        run("mount", &["-t", "tmpfs", "bare", "/usr/local"]).exits(0);
        Self { config }
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        fs::write(CONTAINERD, &self.config).unwrap();
        let unmounted = run("umount", &["--lazy", "/usr/local"]);
        let restarted = restart_containerd();
        assert!(
            std::thread::panicking() || (unmounted.code, restarted.code) == (Some(0), Some(0)),
            "{unmounted:#?} {restarted:#?}"
        );
    }
}

fn restart_containerd() -> Said {
    run("lab-containerd", &["2", "stop"]);
    run("lab-containerd", &["2", "start"])
}

/// Every path an installation may be in.
fn installed() -> String {
    let find = "find /usr/local /etc/nacre /etc/containerd -printf '%p %y %l\\n' | sort";
    run("sh", &["-c", find]).exits(0).stdout
}

/// A stage of another version: its agent's archive has more zeros at its end.
fn another_stage() -> PathBuf {
    let stage = PathBuf::from("/run/another-stage");
    let copy = format!(
        "mkdir -p {0}/bin {0}/share && cp {STAGE}/{SHIM} {STAGE}/bin/nacre {0}/bin/ && \
         cp -r {STAGE}/share/nacre {0}/share/ && head -c 512 /dev/zero >>{0}/share/nacre/initrd.img",
        stage.display()
    );
    run("sh", &["-c", &copy]).exits(0);
    stage
}

fn current() -> PathBuf {
    Path::new(LIBRARY).join("current").canonicalize().unwrap()
}

/// Fails the test unless a pod's monitor is a process of a version.
#[track_caller]
fn is_of(pod: &Pod, version: &Path) {
    let identity = |path: &Path| {
        let file = fs::metadata(path).unwrap();
        (file.dev(), file.ino())
    };
    let program = PathBuf::from(format!("/proc/{}/exe", pod.monitor()));
    assert_eq!(identity(&program), identity(&version.join(SHIM)));
}

#[test]
fn installed_upgraded_under_a_pod_and_removed() {
    let _bare = Bare::new();
    let before = installed();
    let said = run(&format!("{STAGE}/bin/nacre"), &["install"]).exits(0);
    let drop_in = "wrote /etc/containerd/conf.d/nacre.toml; restart containerd";
    assert!(said.stdout.contains(drop_in), "{said:#?}");
    restart_containerd().exits(0);

    let scene = PodScene::new();
    let pod = scene.pod("old").run();
    let app = pod.container("app", SLEEP).start();
    let old = current();
    is_of(&pod, &old);

    let stage = another_stage();
    let nacre = stage.join("bin/nacre");
    let said = run(nacre.to_str().unwrap(), &["install"]).exits(0);
    let name = old.file_name().unwrap().to_str().unwrap();
    assert!(said.stdout.contains(&format!("kept {name}: ")), "{said:#?}");
    assert_ne!(current(), old);
    is_of(&pod, &old);
    app.exec(&["echo", "alive"]).exits(0).prints("alive\n");
    let newer = scene.pod("new").run();
    is_of(&newer, &current());
    newer.stop();
    newer.remove();

    run("nacre", &["uninstall"])
        .exits(1)
        .complains(&[&format!("k8s.io/{}", pod.id), "--force"]);
    app.exec(&["echo", "alive"]).exits(0).prints("alive\n");
    pod.stop();
    pod.remove();
    eventually("the pod's shim is gone, and its version can be", || {
        let said = run(nacre.to_str().unwrap(), &["install"]).exits(0);
        said.stdout.contains(&format!("removed {name}"))
    });
    run("nacre", &["uninstall"]).exits(0);
    assert_eq!(installed(), before);
    fs::remove_dir_all(&stage).unwrap();
}
