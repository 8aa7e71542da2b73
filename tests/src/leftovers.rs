//! What a test may leave behind, and must not.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::PATIENCE;

/// What belongs to a namespace of containerd, to the runtime or to the CNI
/// plugins, not to a pod, and stays. What is *in* the directories counts.
const PARENTS: [&str; 6] = [
    "cgroup /sys/fs/cgroup/default",
    "run directory /run/nacre/default",
    "run directory /run/nacre/k8s.io",
    "run directory /run/nacre/.uids",
    "run directory /run/nacre/.devices",
    "interface /sys/class/net/cni0",
];

/// Directories whose entries are those of one pod or container each: bundles, and
/// what containerd's CRI keeps.
const PER_POD: [&str; 7] = [
    "/run/containerd/io.containerd.runtime.v2.task/default",
    "/run/containerd/io.containerd.runtime.v2.task/k8s.io",
    "/run/containerd/io.containerd.sandbox.controller.v1.shim/k8s.io",
    "/run/containerd/io.containerd.grpc.v1.cri/sandboxes",
    "/run/containerd/io.containerd.grpc.v1.cri/containers",
    "/var/lib/containerd/io.containerd.grpc.v1.cri/sandboxes",
    "/var/lib/containerd/io.containerd.grpc.v1.cri/containers",
];

/// Where the CNI plugins note the addresses they gave away.
const ADDRESSES: &str = "/var/lib/cni/networks/lab";

/// Everything of the machine that a pod could leak: processes, mounts, network
/// interfaces, addresses and namespaces, cgroups, sockets, run directories,
/// bundles.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine(BTreeSet<String>);

impl Machine {
    /// The machine as it is.
    #[must_use]
    pub fn now() -> Self {
        let mut items = BTreeSet::new();
        items.extend(processes());
        items.extend(mounts());
        items.extend(entries("interface", Path::new("/sys/class/net"), 1));
        items.extend(entries("netns", Path::new("/run/netns"), 1));
        items.extend(entries("cgroup", Path::new("/sys/fs/cgroup"), 4));
        items.extend(entries("socket", Path::new("/run/containerd/s"), 1));
        items.extend(entries("run directory", Path::new("/run/nacre"), 3));
        for directory in PER_POD {
            items.extend(entries("pod", Path::new(directory), 1));
        }
        items.extend(addresses());
        for parent in PARENTS {
            items.remove(parent);
        }
        Self(items)
    }

    /// What is here and was not `before`.
    #[must_use]
    pub fn beyond(&self, before: &Self) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }

    /// Waits until nothing is there that was not there then.
    ///
    /// # Panics
    ///
    /// When something is left after [`PATIENCE`]; the message names it.
    pub fn await_return(&self) {
        let deadline = Instant::now() + PATIENCE;
        let mut reported = Vec::new();
        loop {
            let left = Self::now().beyond(self);
            if left.is_empty() {
                return;
            }
            if left != reported && deadline - Instant::now() < PATIENCE / 2 {
                // Should the test be ended from outside, this was why it waited.
                eprintln!("waiting for the end of {left:#?}");
                reported.clone_from(&left);
            }
            assert!(Instant::now() < deadline, "left behind: {left:#?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Addresses that are a pod's, with the pod they were given to. Those of `ctr run
/// --detach` are left out: ctr never gives them back.
fn addresses() -> Vec<String> {
    let Ok(files) = fs::read_dir(ADDRESSES) else {
        return Vec::new();
    };
    let holder = |path: &Path| {
        let name = path.file_name()?.to_str()?;
        let is_address = name != "lock" && !name.starts_with("last_reserved_ip");
        let holder = is_address.then(|| fs::read_to_string(path).ok())??;
        (!holder.starts_with("default-"))
            .then(|| format!("address {name} of {}", holder.replace("\r\n", " ")))
    };
    files
        .flatten()
        .filter_map(|file| holder(&file.path()))
        .collect()
}

/// Programs of the tests, whose names resemble nacre's.
const TESTS: [&str; 3] = ["nacre-e2e", "nacre-pods", "nacre-devices"];

/// Processes that belong to a runtime, by pid: others come and go.
fn processes() -> Vec<String> {
    let Ok(proc) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    proc.filter_map(Result::ok)
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let line = fs::read(entry.path().join("cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            let contains = |name: &&str| line.contains(name);
            let ours = ["nacre", "virtiofsd"].iter().any(contains) && !TESTS.iter().any(contains);
            ours.then(|| format!("process {pid} {line}"))
        })
        .collect()
}

/// Mounts but those of containerd's snapshotters, which keep layers mounted as
/// long as the layers exist.
fn mounts() -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo is readable");
    table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .filter(|target| !target.contains("/io.containerd.snapshotter.v1."))
        .map(|target| format!("mount {target}"))
        .collect()
}

/// Directory entries down to `depth`; of cgroups only the directories.
fn entries(kind: &str, directory: &Path, depth: usize) -> Vec<String> {
    let Ok(listing) = fs::read_dir(directory) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for entry in listing.filter_map(Result::ok) {
        let path = entry.path();
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_directory || kind != "cgroup" {
            found.push(format!("{kind} {}", path.display()));
        }
        if is_directory && depth > 1 {
            found.extend(entries(kind, &path, depth - 1));
        }
    }
    found
}
