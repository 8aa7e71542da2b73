//! Pods for tests, made over containerd's CRI the way kubelet makes them.
//!
//! ```text
//! let scene = PodScene::new();
//! let pod = scene.pod("web").sysctl("net.core.somaxconn", "512").run();
//! pod.container("init", &["true"]).run().exits(0);
//! let app = pod.container("app", &["sleep", "3600"]).run_as(1000, 1000).start();
//! app.exec(&["id", "-u"]).exits(0).prints("1000\n");
//! ```
//! As with a [`Scene`](crate::Scene), when a scene ends without a panic nothing of it may
//! be left. What kubelet does is done here: a cgroup for each pod, directories
//! for volumes and logs.

mod container;
mod manifest;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, Once};
use std::time::Duration;

use tonic::Status;

use crate::cri::Cri;
use crate::cri::messages::{PodSandboxConfig, PodSandboxState, PodSandboxStatus};
use crate::cri::stream::Stream;
use crate::leftovers::Machine;
use crate::watchdog::Watchdog;
use crate::{BUSYBOX, CONTAINERD_1_7, CONTAINERD_2, Containerd, eventually, run};

pub use container::{ContainerManifest, LogLine, PodContainer};
pub use manifest::PodManifest;

/// The runtime handler under test, as in the lab's containerd configuration.
pub const HANDLER: &str = "nacre";
/// The same with `sandboxer = "shim"`.
pub const SANDBOXED: &str = "nacre-sandboxed";
/// The same runtime, found by its path: containerd asks it for its features.
pub const WITH_FEATURES: &str = "nacre-features";
/// What containerd is configured to take for its sandbox containers. Under runc
/// it sleeps.
const PAUSE: &str = "docker.io/library/pause:lab";
const CGROUP_ROOT: &str = "/sys/fs/cgroup";
/// Parents of the pods' cgroups, as kubelet's: with its cgroupfs driver, and with that
/// of systemd, for which a directory is enough here.
const CGROUP_PARENTS: [&str; 2] = ["/kubepods", "/kubepods.slice"];

/// That may take all the time they have, before a scene with a limit of its own is ended.
const CALLS: u32 = 4;

/// One test's pods.
pub struct PodScene {
    cri: Cri,
    handler: &'static str,
    before: Machine,
    scratch: PathBuf,
    pods: Mutex<Vec<String>>,
    cgroups: Mutex<Vec<PathBuf>>,
    _watchdog: Watchdog,
}

impl Default for PodScene {
    fn default() -> Self {
        Self::new()
    }
}

impl PodScene {
    /// Notes what the machine looks like now; the first one imports the images.
    ///
    /// # Panics
    ///
    /// When containerd, or the machine, is not as the lab's.
    #[must_use]
    pub fn new() -> Self {
        Self::on(CONTAINERD_2, HANDLER)
    }

    /// The same with containerd's other mode: its pods have no sandbox container.
    ///
    /// # Panics
    ///
    /// As [`Self::new`].
    #[must_use]
    pub fn sandboxed() -> Self {
        Self::on(CONTAINERD_2, SANDBOXED)
    }

    /// The same with pods of containerd 1.7, which runs.
    ///
    /// # Panics
    ///
    /// As [`Self::new`].
    #[must_use]
    pub fn older() -> Self {
        Self::on(CONTAINERD_1_7, HANDLER)
    }

    /// The same with so much time for each call.
    ///
    /// # Panics
    ///
    /// As [`Self::new`].
    #[must_use]
    pub fn within(limit: Duration) -> Self {
        let mut scene = Self::new();
        scene.cri = scene.cri.within(limit);
        scene._watchdog = Watchdog::within(CALLS * limit);
        scene
    }

    fn on(containerd: Containerd, handler: &'static str) -> Self {
        let cri = Cri::of(containerd);
        prepare_machine();
        import_images(containerd, &cri);
        let scratch = PathBuf::from(format!("/run/pods-{}", unique()));
        fs::create_dir_all(&scratch).expect("a directory can be made");
        Self {
            cri,
            handler,
            before: Machine::now(),
            scratch,
            pods: Mutex::default(),
            cgroups: Mutex::default(),
            _watchdog: Watchdog::new(),
        }
    }

    /// containerd's CRI, for what has no helper here.
    #[must_use]
    pub fn cri(&self) -> &Cri {
        &self.cri
    }

    /// Imports an image for containerd 2's pods, unless it is there.
    ///
    /// # Panics
    ///
    /// When it cannot be imported.
    pub fn import(&self, image: &str, archive: &Path) {
        let archive = archive.to_str().expect("paths of tests are UTF-8");
        import_image(CONTAINERD_2, &self.cri, image, archive);
    }

    /// A pod to be, under nacre.
    #[must_use]
    pub fn pod(&self, name: &str) -> PodManifest<'_> {
        PodManifest::new(self, name)
    }

    /// Fails the test unless a pod was refused in a sentence that has all of `parts`, and
    /// an id: which one it was to have nobody else was told.
    ///
    /// # Panics
    ///
    /// See above.
    #[track_caller]
    pub fn refuses(&self, pod: PodManifest<'_>, parts: &[&str]) {
        let error = pod.try_run().err().expect("a refusal");
        let message = error.message();
        let mut words = message.split(|c: char| !c.is_ascii_hexdigit());
        assert!(words.any(|word| word.len() == 64), "no id in: {error}");
        for part in parts {
            assert!(message.contains(part), "no {part:?} in: {error}");
        }
    }

    /// An empty directory on the host that is gone with the scene.
    ///
    /// # Panics
    ///
    /// When it cannot be made.
    #[must_use]
    pub fn directory(&self, name: &str) -> PathBuf {
        let path = self.scratch.join(format!("{name}-{}", unique()));
        fs::create_dir_all(&path).expect("a directory can be made");
        path
    }

    /// A cgroup for a pod, as kubelet makes one; its path below the root.
    fn cgroup(&self, uid: &str) -> String {
        self.make_cgroup(format!("{}/pod{uid}", CGROUP_PARENTS[0]))
    }

    /// The same as kubelet's systemd driver names it: in a slice's name a dash leads
    /// down, so those of the uid become underscores.
    fn slice(&self, uid: &str) -> String {
        let uid = uid.replace('-', "_");
        self.make_cgroup(format!("{}/kubepods-pod{uid}.slice", CGROUP_PARENTS[1]))
    }

    fn make_cgroup(&self, group: String) -> String {
        let path = PathBuf::from(format!("{CGROUP_ROOT}{group}"));
        fs::create_dir_all(&path).expect("a cgroup can be made");
        delegate(&path);
        self.cgroups
            .lock()
            .unwrap_or_else(|p| p.into_inner())
            .push(path);
        group
    }

    fn note_pod(&self, id: &str) {
        let mut pods = self.pods.lock().unwrap_or_else(|p| p.into_inner());
        pods.push(id.to_owned());
    }
}

impl Drop for PodScene {
    fn drop(&mut self) {
        for id in self
            .pods
            .lock()
            .unwrap_or_else(|p| p.into_inner())
            .drain(..)
        {
            // Most are stopped; a failed test's may not be.
            for result in [self.cri.stop_pod(&id), self.cri.remove_pod(&id)] {
                if let Err(error) = result {
                    eprintln!("pod {id}: {error}");
                }
            }
        }
        for path in self
            .cgroups
            .lock()
            .unwrap_or_else(|p| p.into_inner())
            .drain(..)
        {
            if let Err(error) = fs::remove_dir(&path) {
                eprintln!("{}: {error}", path.display());
            }
        }
        if let Err(error) = fs::remove_dir_all(&self.scratch) {
            eprintln!("{}: {error}", self.scratch.display());
        }
        if !std::thread::panicking() {
            self.before.await_return();
        }
    }
}

/// A sandbox that was made.
pub struct Pod<'s> {
    pub(crate) scene: &'s PodScene,
    /// containerd's id.
    pub id: String,
    /// As it was asked for.
    pub config: PodSandboxConfig,
}

impl<'s> Pod<'s> {
    /// A container to be, of busybox.
    #[must_use]
    pub fn container(&self, name: &str, command: &[&str]) -> ContainerManifest<'_, 's> {
        ContainerManifest::new(self, name, command)
    }

    /// `PodSandboxStatus`.
    ///
    /// # Panics
    ///
    /// When containerd does not know the pod.
    #[must_use]
    #[track_caller]
    pub fn status(&self) -> PodSandboxStatus {
        let status = self.scene.cri.pod_status(&self.id);
        status.unwrap_or_else(|error| panic!("{}: {error}", self.id))
    }

    /// Whether containerd takes it for running.
    #[must_use]
    #[track_caller]
    pub fn is_ready(&self) -> bool {
        self.status().state() == PodSandboxState::Ready
    }

    /// Waits until containerd takes it for ended.
    #[track_caller]
    pub fn await_not_ready(&self) {
        eventually(&format!("pod {} is not ready", self.id), || {
            !self.is_ready()
        });
    }

    /// Fails the test unless something was refused in a sentence that names this pod and
    /// has all of `parts`.
    ///
    /// # Panics
    ///
    /// See above.
    #[track_caller]
    pub fn refuses<T>(&self, result: Result<T, Status>, parts: &[&str]) {
        let error = result.err().expect("a refusal");
        for part in [&[self.id.as_str()][..], parts].concat() {
            assert!(error.message().contains(part), "no {part:?} in: {error}");
        }
    }

    /// Its IPv4 address.
    ///
    /// # Panics
    ///
    /// Without one.
    #[must_use]
    #[track_caller]
    pub fn ip(&self) -> String {
        let network = self.status().network.expect("a pod's network");
        assert!(!network.ip.is_empty(), "no address");
        network.ip
    }

    /// `StopPodSandbox`.
    ///
    /// # Panics
    ///
    /// When containerd refuses.
    #[track_caller]
    pub fn stop(&self) {
        let stopped = self.scene.cri.stop_pod(&self.id);
        stopped.unwrap_or_else(|error| panic!("stop {}: {error}", self.id));
    }

    /// `RemovePodSandbox`.
    ///
    /// # Panics
    ///
    /// When containerd refuses.
    #[track_caller]
    pub fn remove(&self) {
        let removed = self.scene.cri.remove_pod(&self.id);
        removed.unwrap_or_else(|error| panic!("remove {}: {error}", self.id));
    }

    /// `PortForward` to a port of the pod's loopback, as kubelet has it.
    ///
    /// # Panics
    ///
    /// When containerd refuses.
    #[must_use]
    #[track_caller]
    pub fn port_forward(&self, port: u16) -> Stream {
        let url = self.scene.cri.port_forward(&self.id, port);
        let url = url.unwrap_or_else(|error| panic!("port {port}: {error}"));
        Stream::open(&format!("{url}?port={port}"))
    }

    /// Directory of its cgroup on the host.
    ///
    /// # Panics
    ///
    /// When its monitor is gone.
    #[must_use]
    #[track_caller]
    pub fn cgroup(&self) -> PathBuf {
        let file = format!("/proc/{}/cgroup", self.monitor());
        let text = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{file}: {error}"));
        let group = text.trim_end().strip_prefix("0::").expect("cgroup v2");
        PathBuf::from(format!("{CGROUP_ROOT}{group}"))
    }

    /// Host pid of its machine's monitor.
    ///
    /// # Panics
    ///
    /// When it has none.
    #[must_use]
    #[track_caller]
    pub fn monitor(&self) -> u32 {
        let info = self.scene.cri.pod_info(&self.id);
        let info = info.unwrap_or_else(|error| panic!("{}: {error}", self.id));
        let pid = info["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
        pid.filter(|pid| *pid != 0)
            .unwrap_or_else(|| panic!("no pid of {} in {info}", self.id))
    }
}

/// A number no other part of this run has.
pub(crate) fn unique() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Lets groups below have all controllers.
fn delegate(group: &Path) {
    let controllers = fs::read_to_string(group.join("cgroup.controllers")).expect("a cgroup");
    let all: Vec<String> = controllers
        .split_whitespace()
        .map(|name| format!("+{name}"))
        .collect();
    fs::write(group.join("cgroup.subtree_control"), all.join(" ")).expect("controllers");
}

/// Where [`PAUSE`] is made.
const PAUSE_ARCHIVE: &str = "/run/pause-image.tar";

/// The pause image, and the parents of all pods' cgroups.
fn prepare_machine() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for parent in CGROUP_PARENTS {
            let parent = PathBuf::from(format!("{CGROUP_ROOT}{parent}"));
            fs::create_dir_all(&parent).expect("a cgroup can be made");
            delegate(&parent);
        }
        let tree = "/run/pause-image";
        fs::create_dir_all(format!("{tree}/bin")).expect("a directory can be made");
        fs::copy("/bin/busybox", format!("{tree}/bin/busybox")).expect("busybox");
        let sleep = [
            "--entrypoint",
            "/bin/busybox",
            "--entrypoint",
            "sleep",
            "--entrypoint",
            "infinity",
        ];
        let make = ["--name", PAUSE, "--out", PAUSE_ARCHIVE];
        run("mkimage", &[&make[..], &sleep, &[tree]].concat()).exits(0);
    });
}

/// Images in CRI's namespace, unless they are there.
fn import_images(containerd: Containerd, cri: &Cri) {
    let archives = [
        (BUSYBOX, "/opt/lab/images/busybox.tar"),
        (PAUSE, PAUSE_ARCHIVE),
    ];
    for (image, archive) in archives {
        import_image(containerd, cri, image, archive);
    }
}

fn import_image(containerd: Containerd, cri: &Cri, image: &str, archive: &str) {
    if !cri.has_image(image) {
        let import = ["-n", "k8s.io", "image", "import", archive];
        containerd.ctr(&import).exits(0);
        // containerd tells its CRI by an event.
        eventually(&format!("CRI has {image}"), || cri.has_image(image));
    }
}
