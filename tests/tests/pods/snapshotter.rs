//! A snapshotter of the runtime's own, as config/containerd-2.toml has it.

use std::fs;
use std::path::PathBuf;

use nacre_tests::ctr;
use nacre_tests::pods::{PodContainer, PodScene};

use crate::SLEEP;

/// Where a container's snapshot has what is written.
#[track_caller]
fn upper(container: &PodContainer) -> PathBuf {
    let said = ctr(&[
        "-n",
        "k8s.io",
        "snapshots",
        "--snapshotter",
        "erofs",
        "mounts",
        "/mnt",
        &container.id,
    ])
    .exits(0);
    let (_, rest) = said.stdout.split_once("upperdir=").unwrap();
    let end = rest.find([',', ' ', '\n']).unwrap();
    rest[..end].into()
}

/// Image layers are EROFS images on the host; the root file systems of two containers
/// are of the same, and each its own.
#[test]
fn pods_of_erofs_layers() {
    let scene = PodScene::new();
    let pod = scene.pod("layers").runtime("nacre-erofs").run();
    let [one, two] = ["one", "two"].map(|name| pod.container(name, SLEEP).start());
    one.sh("echo one > /written && rm /bin/wget && ls /bin/busybox")
        .exits(0)
        .prints("/bin/busybox\n");
    two.sh("ls /bin/wget; ls /written")
        .exits(1)
        .prints("/bin/wget\n");
    let written = upper(&one).join("written");
    assert_eq!(fs::read_to_string(written).unwrap(), "one\n");
    let again = pod.container("two", &["ls", "/bin/wget"]).attempt(1).run();
    again.exits(0).prints("/bin/wget\n");
}
