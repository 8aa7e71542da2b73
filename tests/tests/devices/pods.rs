//! Kubernetes pods with devices: by the annotation that containerd's CRI passes on
//! (`pod_annotations`), which the sandbox and each of the pod's containers have.

use std::fs;

use nacre_tests::pods::PodScene;
use nacre_tests::run;

use crate::{Bound, DEVICES, DISK, NVME_PORT, SLEEP, begins, behind, disk, driver, no_claims};

/// The runtime for which containerd passes it on.
const HANDLER: &str = "nacre-devices";
const MIB: u64 = 1 << 20;

#[test]
fn a_pod_has_the_disk_its_annotation_names() {
    let nvme = behind(NVME_PORT);
    let bound = Bound::new(&[&nvme]);
    let scene = PodScene::new();
    let pod = scene.pod("disk").runtime(HANDLER).limits(256, 1);
    let pod = pod.annotation(DEVICES, &nvme).run();
    // Both are the pod's, which is what has the disk.
    let [writer, reader] = ["writer", "reader"].map(|name| pod.container(name, &SLEEP).start());
    let line = format!("of pod {}", pod.id);
    let write = format!("printf '{line}' | dd of={DISK} conv=fsync 2>/dev/null");
    writer.sh(&write).exits(0);
    let read = format!("head -c {} {DISK}", line.len());
    reader.sh(&read).exits(0).prints(&line);

    let pods = run("nacre", &["ps"]).exits(0).stdout;
    let row = pods.lines().find(|row| row.contains(&pod.id));
    assert!(row.is_some_and(|row| row.contains(&nvme)), "{pods}");
    // The monitor has the disk by the descriptor it was handed: its root is empty.
    let root = fs::read_dir(format!("/proc/{}/root", pod.monitor())).unwrap();
    assert_eq!(root.count(), 0);
    // The guest's 320 MiB are pinned, and counted against the pod.
    let used = fs::read_to_string(pod.cgroup().join("memory.current")).unwrap();
    let used: u64 = used.trim().parse().unwrap();
    assert!(used >= 320 * MIB, "{} MiB", used / MIB);

    pod.stop();
    pod.remove();
    no_claims();
    drop(bound);
    assert!(begins(&disk(&nvme)).starts_with(&line));
    fs::write(disk(&nvme), [0; 512]).unwrap();
}

/// kubelet shows it among the pod's events.
#[test]
fn why_a_pod_cannot_have_a_device_reaches_kubelet() {
    let nvme = behind(NVME_PORT);
    let scene = PodScene::new();
    let pod = scene.pod("refused").runtime(HANDLER);
    let refused = pod.annotation(DEVICES, &nvme).try_run().err().unwrap();
    for part in [nvme.as_str(), "driver nvme", "nacre devices bind"] {
        assert!(refused.message().contains(part), "{refused}");
    }
    // The shim moves nothing.
    assert_eq!(driver(&nvme).as_deref(), Some("nvme"));
    no_claims();
}

/// The overhead of its class is too small: either the kernel refuses to pin its 320 MiB
/// or it kills the machine. Nothing is left of it.
#[test]
fn a_pod_whose_group_is_too_small_is_told_so() {
    let nvme = behind(NVME_PORT);
    let bound = Bound::new(&[&nvme]);
    let scene = PodScene::new();
    let pod = scene.pod("small").runtime(HANDLER).limits(256, 1);
    let pod = pod.annotation(DEVICES, &nvme).cgroup_limit(200);
    let refused = pod.try_run().err().unwrap();
    let message = refused.message();
    assert!(
        message.contains("320 MiB") && message.contains("cgroup"),
        "{refused}"
    );
    no_claims();
    drop(bound);
}

/// The annotation of a pod whose runtime is not to have it.
#[test]
fn other_runtimes_do_not_hear_of_the_annotation() {
    let nvme = behind(NVME_PORT);
    let bound = Bound::new(&[&nvme]);
    let scene = PodScene::new();
    let pod = scene.pod("plain").annotation(DEVICES, &nvme).run();
    no_claims();
    pod.stop();
    pod.remove();
    drop(bound);
}
