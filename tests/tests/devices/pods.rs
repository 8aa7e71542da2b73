//! Kubernetes pods with devices: by the annotation that containerd's CRI passes on
//! (`pod_annotations`), which the sandbox and each of the pod's containers have, and by what
//! kubelet has given to a container, which has it by its name of CDI.

use std::fs;
use std::time::{Duration, Instant};

use nacre_tests::pods::{Pod, PodManifest, PodScene};
use nacre_tests::{Allocations, Changed, run};

use crate::{
    Bound, CdiSpec, DEVICES, DISK, NVME_PORT, SLEEP, begins, behind, disk, driver, group, no_claims,
};

/// The runtime for which containerd passes it on.
const HANDLER: &str = "nacre-devices";
const MIB: u64 = 1 << 20;

/// Whether a device is in a pod's machine.
fn has(pod: &Pod<'_>, address: &str) -> bool {
    let pods = run("nacre", &["ps"]).exits(0).stdout;
    let row = pods.lines().find(|row| row.contains(&pod.id));
    row.unwrap().contains(address)
}

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

    assert!(has(&pod, &nvme));
    // The monitor has the disk by the descriptor it was handed: its root is empty.
    let root = fs::read_dir(format!("/proc/{}/root", pod.monitor())).unwrap();
    assert_eq!(root.count(), 0);
    // The guest's 320 MiB are pinned, and counted against the pod.
    let used = fs::read_to_string(pod.cgroup().join("memory.current")).unwrap();
    let used: u64 = used.trim().parse().unwrap();
    assert!(used >= 320 * MIB, "{} MiB", used / MIB);

    pod.stop();
    pod.remove();
    drop(bound);
    was_left_with(&nvme, &line);
}

/// The disk is the host's again, and begins with this. It is cleared for the next test.
fn was_left_with(nvme: &str, line: &str) {
    no_claims();
    assert!(begins(&disk(nvme)).starts_with(line));
    fs::write(disk(nvme), [0; 512]).unwrap();
}

/// A device plugin's, and by the time of the sandbox only kubelet knows of it. The container
/// has the name of CDI that goes with it, which containerd looks up in the host's specs.
#[test]
fn a_pod_has_the_disk_that_kubelet_gave_to_a_container() {
    let nvme = behind(NVME_PORT);
    let bound = Bound::new(&[&nvme]);
    let node = format!("/dev/vfio/{}", group(&nvme));
    let _spec = CdiSpec::new("/etc/cdi", "nacre.test/disk", "0", &node);
    let scene = PodScene::new();
    let pod = scene.pod("given").limits(256, 1);
    let dir = scene.directory("kubelet");
    let kubelet = Allocations::of_plugin(&dir, &pod.uid(), "nacre.test/disk", "0");
    let socket = kubelet.socket().to_str().unwrap();
    let _config = Changed::new("pod_resources_socket", &format!("{socket:?}"));
    let pod = pod.run();
    assert!(has(&pod, &nvme), "it is there before the container");

    let user = pod
        .container("user", &SLEEP)
        .cdi_device("nacre.test/disk=0");
    let user = user.start();
    let other = pod.container("other", &SLEEP).start();
    let line = format!("given to pod {}", pod.id);
    let write = format!("printf '{line}' | dd of={DISK} conv=fsync 2>/dev/null");
    user.sh(&write).exits(0);
    other.exec(&["test", "-e", DISK]).exits(1);
    let wrong = pod
        .container("wrong", &SLEEP)
        .cdi_device("nacre.test/disk=9");
    let refused = wrong.try_create().err().unwrap();
    assert!(refused.message().contains("nacre.test/disk=9"), "{refused}");

    pod.stop();
    pod.remove();
    drop(bound);
    was_left_with(&nvme, &line);
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

/// How long a pod takes to be made, and from the start of its container to the first 4 KiB
/// that this has read of a file.
fn times(pod: PodManifest<'_>, file: &str, is_in_pod: impl FnOnce(&Pod<'_>)) -> [Duration; 2] {
    let begin = Instant::now();
    let pod = pod.run();
    let made = begin.elapsed();
    is_in_pod(&pod);
    let read = format!("dd if={file} bs=4096 count=1 2>/dev/null | wc -c; sleep 3600");
    let reader = pod.container("reader", &["sh", "-c", &read]).create();
    let begin = Instant::now();
    reader.start();
    reader.await_logged("stdout", "4096");
    let started = begin.elapsed();
    pod.stop();
    pod.remove();
    no_claims();
    [made, started]
}

/// Of two pods with the annotation that one has the device whose runtime is to hear of it. It
/// may take longer to be made; its containers do not.
#[test]
fn a_container_reads_its_device_as_soon_as_another_one_its_files() {
    let nvme = behind(NVME_PORT);
    let _bound = Bound::new(&[&nvme]);
    let scene = PodScene::new();
    let pod = |name| scene.pod(name).annotation(DEVICES, &nvme);
    let without = times(pod("plain"), "/dev/zero", |pod| {
        no_claims();
        assert!(!has(pod, &nvme));
    });
    let with = times(pod("disk").runtime(HANDLER), DISK, |pod| {
        assert!(has(pod, &nvme));
    });
    let ratio = |index: usize| with[index].as_secs_f64() / without[index].as_secs_f64();
    println!(
        "with a device against without: RunPodSandbox {:.2}, StartContainer to its first access {:.2}",
        ratio(0),
        ratio(1)
    );
    assert!(ratio(1) < 3.0, "{with:?} against {without:?}");
}
