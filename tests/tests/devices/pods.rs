//! Kubernetes pods with devices: by the annotation that containerd's CRI passes on
//! (`pod_annotations`), which the sandbox and each of the pod's containers have, by what
//! kubelet has given to a container, which has it by its name of CDI, and by what only the
//! container tells, in a slot of the machine that runs.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use nacre_tests::pods::{Pod, PodContainer, PodManifest, PodScene, SANDBOXED};
use nacre_tests::{Allocations, Changed, eventually, run};

use crate::{
    Bound, CdiSpec, DEVICES, DISK, DISKS, NVME_PORT, PAIR, SLEEP, SWITCH_PORT, begins, behind,
    disk, driver, group, log_has, no_claims,
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

fn node(address: &str) -> String {
    format!("/dev/vfio/{}", group(address))
}

/// It has slots, too, for what its containers bring.
#[test]
fn a_pod_has_the_disk_its_annotation_names() {
    let [nvme, switched] = [NVME_PORT, SWITCH_PORT].map(behind);
    let bound = Bound::new(&[&nvme, &switched, PAIR[0], PAIR[1]]);
    let _slots = Changed::new("pci_slots", "2");
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

    containers_bring_devices_to(&pod, &switched);
    assert_eq!(disks(&reader), "1048576 alone\n");
    pod.stop();
    pod.remove();
    drop(bound);
    was_left_with(&nvme, &line);
}

/// The disks of a container.
fn disks(container: &PodContainer) -> String {
    container.sh(DISKS).exits(0).stdout
}

/// What containerd tells only with the container that has it: a disk by its name of CDI, and two
/// disks that are one group by its node (`linux.devices`). The pod has two slots, and a disk from
/// the start, which each of its containers has.
fn containers_bring_devices_to(pod: &Pod<'_>, switched: &str) {
    let _spec = CdiSpec::new("/etc/cdi", "nacre.test/disk", "0", &node(switched));
    let named = pod.container("named", &SLEEP);
    let named = named.cdi_device("nacre.test/disk=0").start();
    assert!(has(pod, switched));
    assert_eq!(disks(&named), "1048576 alone\n1048576 switched\n");
    // The guest's memory was mapped with the first.
    log_has(&pod.id, " map_calls=0 ");
    let with_pair = |name| {
        let container = pod.container(name, &SLEEP);
        container.device(&node(PAIR[0]), "/dev/vfio/pair", "mrw")
    };
    let full = [
        "of its 2 slots",
        "1 are empty, and 2 would be filled",
        "pci_slots",
    ];
    pod.refuses(with_pair("early").try_start(), &full);

    named.stop(Duration::ZERO);
    named.remove();
    eventually("its disk is nobody's", || !has(pod, switched));
    let pair = with_pair("pair").start();
    let text = "1048576 alone\n1048576 first\n1048576 second\n";
    assert_eq!(disks(&pair), text);
    assert!(PAIR.iter().all(|address| has(pod, address)));
}

/// The disk is the host's again, and begins with this. It is cleared for the next test.
fn was_left_with(nvme: &str, line: &str) {
    no_claims();
    assert!(begins(&disk(nvme)).starts_with(line));
    fs::write(disk(nvme), [0; 512]).unwrap();
}

/// A device plugin's, and by the time of the sandbox only kubelet knows of it.
#[test]
fn a_pod_has_the_disk_that_kubelet_gave_to_a_container() {
    let scene = PodScene::new();
    kubelet_gives(&scene, scene.pod("given"), |dir, name| {
        Allocations::of_plugin(dir, name, "nacre.test/disk", "0")
    });
}

/// A claim's (DRA), to a pod of which containerd leaves all to the shim.
#[test]
fn a_pod_has_the_disk_of_its_claim() {
    let scene = PodScene::new();
    let pod = scene.pod("claims").runtime(SANDBOXED);
    kubelet_gives(&scene, pod, |dir, name| {
        Allocations::of_claim(dir, name, "nacre.test/disk=0")
    });
}

/// The container has the name of CDI that goes with the disk, which containerd looks up in the
/// host's specs.
fn kubelet_gives(
    scene: &PodScene,
    pod: PodManifest<'_>,
    allocations: impl FnOnce(&Path, &str) -> Allocations,
) {
    let nvme = behind(NVME_PORT);
    let bound = Bound::new(&[&nvme]);
    let _spec = CdiSpec::new("/etc/cdi", "nacre.test/disk", "0", &node(&nvme));
    let pod = pod.limits(256, 1);
    let kubelet = allocations(&scene.directory("kubelet"), &pod.uid());
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
    // Past the harness, which keeps to itself what a test that passes prints.
    let told = writeln!(
        io::stderr(),
        "with a device against without: RunPodSandbox {:.2}, StartContainer to its first access {:.2}",
        ratio(0),
        ratio(1)
    );
    told.unwrap();
    assert!(ratio(1) < 3.0, "{with:?} against {without:?}");
}
