//! Block devices as kubelet hands them over: `volumeDevices` of a raw volume.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use nacre_tests::pods::{Pod, PodScene};
use nacre_tests::run;

use crate::SLEEP;

const MIB: u64 = 1 << 20;

/// A block device of the host, on a file.
struct Loop {
    node: String,
    file: PathBuf,
}

impl Loop {
    fn new(scene: &PodScene, mib: u64) -> Self {
        Self::of_sectors(scene, mib, 512)
    }

    fn of_sectors(scene: &PodScene, mib: u64, bytes: u32) -> Self {
        let file = scene.directory("volume").join("bytes");
        File::create(&file).unwrap().set_len(mib * MIB).unwrap();
        run("modprobe", &["loop"]).exits(0);
        let sectors = bytes.to_string();
        let options = ["-f", "--show", "--sector-size", &sectors];
        let said = run(
            "losetup",
            &[&options[..], &[file.to_str().unwrap()]].concat(),
        )
        .exits(0);
        let node = said.stdout.trim().to_owned();
        Self { node, file }
    }

    /// The first bytes of the device.
    fn begins(&self, len: usize) -> String {
        let mut bytes = fs::read(&self.node).unwrap();
        bytes.truncate(len);
        String::from_utf8(bytes).unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let said = run("losetup", &["-d", &self.node]);
        assert!(
            std::thread::panicking() || said.code == Some(0),
            "{said:#?}"
        );
        fs::remove_file(&self.file).ok();
    }
}

#[test]
fn raw_volumes() {
    let scene = PodScene::new();
    raw_volumes_in(&scene, &scene.pod("raw").run());
}

/// Raw volumes of a pod that has no others.
pub fn raw_volumes_in(scene: &PodScene, pod: &Pod) {
    let (one, two) = (Loop::new(scene, 8), Loop::new(scene, 4));
    fs::write(&one.node, "from the host").unwrap();
    let app = pod
        .container("disks", SLEEP)
        .device(&one.node, "/dev/xvda", "mrw")
        .device(&two.node, "/volumes/second", "r")
        .start();

    app.sh("head -c 13 /dev/xvda; echo; wc -c < /dev/xvda; wc -c < /volumes/second")
        .exits(0)
        .prints("from the host\n8388608\n4194304\n");
    let said = app
        .sh("ls -l /dev/xvda /volumes/second | cut -c 1")
        .exits(0);
    assert_eq!(said.stdout, "b\nb\n");
    app.sh("printf 'from the pod ' > /dev/xvda").exits(0);
    assert_eq!(one.begins(13), "from the pod ");
    app.sh("echo x > /volumes/second")
        .exits(1)
        .complains(&["Operation not permitted"]);
    // Another disk of the machine is none of this container's.
    let other = "n=$(ls -l /dev/xvda | awk '{print $5}' | tr -d ,); \
                 mknod /dev/other b $n 4096 && head -c 1 /dev/other";
    app.sh(other)
        .exits(1)
        .complains(&["Operation not permitted"]);

    // Both disks are taken; when this container is gone, they are another's.
    let refused = pod
        .container("late", SLEEP)
        .device(&two.node, "/dev/xvda", "mrw")
        .try_start();
    pod.refuses(refused, &["pod_disks"]);
    app.stop(std::time::Duration::ZERO);
    app.remove();
    let next = pod
        .container("next", SLEEP)
        .device(&two.node, "/dev/xvda", "mrw")
        .start();
    next.sh("wc -c < /dev/xvda; head -c 4 /dev/xvda | tr '\\0' 0; echo second > /dev/xvda")
        .exits(0)
        .prints("4194304\n0000");
    next.stop(std::time::Duration::ZERO);
    next.remove();
    assert_eq!(two.begins(7), "second\n");
}

/// Large sectors, and the same disk of the machine with small ones again.
#[test]
fn a_raw_volume_has_the_sectors_of_the_host_s_device() {
    let scene = PodScene::new();
    let (large, small) = (Loop::of_sectors(&scene, 8, 4096), Loop::new(&scene, 8));
    let pod = scene.pod("sectors").run();
    for (device, bytes) in [(&large, 4096), (&small, 512), (&large, 4096)] {
        let app = pod
            .container("app", SLEEP)
            .device(&device.node, "/dev/xvda", "mrw")
            .start();
        let script = format!(
            "cat $(for d in /sys/block/vd*; do \
               [ $(cat $d/size) != 16384 ] || echo $d/queue/logical_block_size; done)
             printf 'sectors of {bytes} ' | dd of=/dev/xvda conv=fsync 2>/dev/null"
        );
        app.sh(&script).exits(0).prints(&format!("{bytes}\n"));
        let text = format!("sectors of {bytes} ");
        assert_eq!(device.begins(text.len()), text);
        app.stop(std::time::Duration::ZERO);
        app.remove();
    }
}

#[test]
fn other_devices_of_the_host_are_refused() {
    let scene = PodScene::new();
    let pod = scene.pod("greedy").run();
    let refused = pod
        .container("device", SLEEP)
        .device("/dev/kvm", "/dev/kvm", "mrw")
        .try_start();
    pod.refuses(refused, &["/dev/kvm", "does not have"]);
    let refused = pod
        .container("path", SLEEP)
        .mount(Path::new("/dev/kvm"), "/dev/kvm")
        .try_start();
    pod.refuses(refused, &["/dev/kvm", "device node"]);
}

/// Names in /dev that would be a device of the host's, or a disk of the machine's.
const OF_THE_HOST: &str = "ls /dev | grep -E '^(vd|sd|nvme|loop|kvm|vfio|vhost|mem|port)' | wc -l";

/// A node of a device that every kernel has is the guest's, and device rules say who may
/// open it, as under any runtime: privileged containers may. They have no others, though
/// containerd lists every node of the host for them here.
#[test]
fn nodes_of_the_kernel_s_devices_are_the_guest_s() {
    let scene = PodScene::new();
    let pod = scene.pod("nodes").runtime("nacre-host-devices");
    let pod = pod.privileged().run();
    let [fuse, tun, null] = ["/dev/fuse", "/dev/net/tun", "/dev/null"].map(Path::new);
    let script = format!(
        "{OF_THE_HOST}; stat -c '%t %T' /dev/null /dev/fuse /run/fuse /run/tun && \
         exec 3<>/run/fuse 4<>/run/tun && echo opened"
    );
    pod.container("all", &["sh", "-c", &script])
        .security(|security| security.privileged = true)
        .mount(fuse, "/run/fuse")
        .mount(tun, "/run/tun")
        .run()
        .exits(0)
        .prints("0\n1 3\na e5\na e5\na c8\nopened\n");

    let plain = pod
        .container("plain", SLEEP)
        .mount(fuse, "/dev/fuse")
        .mount_read_only(null, "/etc/masked")
        .start();
    plain.sh("wc -c < /etc/masked").exits(0).prints("0\n");
    plain
        .sh("exec 3<>/dev/fuse")
        .complains(&["Operation not permitted"]);
}
