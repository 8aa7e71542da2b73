//! A snapshotter of the runtime's own, as config/containerd-2.toml has it.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nacre_tests::cri::messages::ContainerState;
use nacre_tests::pods::{Pod, PodContainer, PodScene};
use nacre_tests::{Changed, LAYERS, ctr, eventually, run};

use crate::SLEEP;

/// An option of the overlay that the host would mount for a container.
#[track_caller]
fn overlay_option(container: &PodContainer, name: &str) -> String {
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
    let (_, rest) = said.stdout.split_once(&format!("{name}=")).unwrap();
    let end = rest.find([',', ' ', '\n']).unwrap();
    rest[..end].to_owned()
}

/// Where a container's snapshot has what is written by the host.
#[track_caller]
fn upper(container: &PodContainer) -> PathBuf {
    overlay_option(container, "upperdir").into()
}

/// The lowest layer of a container, without a file system on it until this is dropped.
struct Damaged {
    blob: PathBuf,
    whole: PathBuf,
}

impl Damaged {
    #[track_caller]
    fn lowest_of(container: &PodContainer) -> Self {
        let lower = overlay_option(container, "lowerdir");
        let directory = Path::new(lower.rsplit(':').next().unwrap());
        let blob = directory.with_file_name("layer.erofs");
        let whole = blob.with_extension("whole");
        fs::rename(&blob, &whole).unwrap();
        fs::write(&blob, [0; 64 << 10]).unwrap();
        Self { blob, whole }
    }
}

impl Drop for Damaged {
    fn drop(&mut self) {
        fs::rename(&self.whole, &self.blob).unwrap();
    }
}

/// The disks of the machine that have bytes, and of each the partitions that the guest's
/// kernel knows.
#[track_caller]
fn disks(container: &PodContainer) -> Vec<String> {
    let script = "cd /sys/block; for d in vd*; do [ $(cat $d/size) = 0 ] || echo $d $d/$d*; done";
    let said = container.sh(script).exits(0);
    said.stdout.lines().map(str::to_owned).collect()
}

/// Whether a container's root file system is an overlay of the guest's.
#[track_caller]
fn is_on_a_disk(container: &PodContainer) -> bool {
    let said = container.sh("grep ' / ' /proc/mounts").exits(0).stdout;
    assert!(
        said.contains("overlay") != said.contains("virtiofs"),
        "{said}"
    );
    said.contains("overlay")
}

fn gone(container: &PodContainer) {
    container.stop(Duration::ZERO);
    container.remove();
}

fn pod_of<'s>(scene: &'s PodScene, name: &str) -> Pod<'s> {
    scene.pod(name).runtime("nacre-erofs").run()
}

/// Image layers are partitions of a disk, of which each container has one; the root file
/// systems of two containers are of the same layers, and each its own.
#[test]
fn pods_of_erofs_layers() {
    let scene = PodScene::new();
    let pod = pod_of(&scene, "layers");
    let [one, two] = ["one", "two"].map(|name| pod.container(name, SLEEP).start());
    assert!(is_on_a_disk(&one) && is_on_a_disk(&two));
    let used = disks(&one);
    assert_eq!(used.len(), 2, "{used:?}");
    for disk in &used {
        let (name, partitions) = disk.split_once(' ').unwrap();
        assert!(partitions.starts_with(&format!("{name}/{name}1")), "{disk}");
    }
    one.sh("echo one > /written && rm /bin/wget && ls /bin/busybox && cat /written")
        .exits(0)
        .prints("/bin/busybox\none\n");
    two.sh("ls /bin/wget; ls /written")
        .exits(1)
        .prints("/bin/wget\n");
    assert!(!upper(&one).join("written").exists(), "it is the guest's");

    // The disk of one that is gone is the next one's.
    gone(&one);
    // The guest is told of it, and nobody waits until it has looked.
    eventually("its disk is empty", || disks(&two).len() == 1);
    for attempt in 1..=3 {
        let again = pod.container("one", SLEEP).attempt(attempt).start();
        assert!(is_on_a_disk(&again));
        assert_eq!(disks(&two), used);
        again
            .sh("ls /bin/wget; ls /written")
            .exits(1)
            .prints("/bin/wget\n");
        gone(&again);
    }
}

/// Another image on the same disk of the machine: the guest reads its layers, not what it
/// has read of the first one's.
#[test]
fn a_disk_has_the_layers_of_one_image_after_another() {
    let _one_disk = Changed::new("root_disks", "1");
    let scene = PodScene::new();
    scene.import(LAYERS, "/opt/lab/images/layers.tar".as_ref());
    let pod = pod_of(&scene, "turns");
    let mut sums = Vec::new();
    for (image, round) in [(None, 0), (Some(LAYERS), 1), (None, 2)] {
        let mut app = pod.container("app", SLEEP).attempt(round);
        if let Some(image) = image {
            app = app.image(image);
        }
        let app = app.start();
        assert!(is_on_a_disk(&app));
        app.sh("[ -e /data ]").exits(i32::from(image.is_none()));
        let all =
            "md5sum /bin/busybox; [ ! -e /data ] || find /data -type f -exec md5sum {} + | sort";
        sums.push(app.sh(all).exits(0).stdout);
        gone(&app);
    }
    assert!(sums[0] == sums[2] && sums[0] != sums[1], "{sums:?}");
}

/// Of three layers the guest mounts two, and the third is none. It undoes that: the pod's only
/// disk is the next container's, which it would not be if anything held on to it.
#[test]
fn a_root_file_system_that_is_mounted_half_way() {
    let _one_disk = Changed::new("root_disks", "1");
    let scene = PodScene::new();
    scene.import(LAYERS, "/opt/lab/images/layers.tar".as_ref());
    let pod = pod_of(&scene, "half");
    let app = || pod.container("app", SLEEP).image(LAYERS);
    let half = app().create();
    let damaged = Damaged::lowest_of(&half);
    let refused = scene.cri().start(&half.id);
    pod.refuses(
        refused,
        &[&half.id, "mount", "/layers/3", "invalid argument"],
    );
    drop(damaged);
    half.remove();
    let whole = app().attempt(1).start();
    assert!(is_on_a_disk(&whole), "the disk is free");
    whole.exec(&["cat", "/data/kept/file"]).prints("kept\n");
}

/// The file servers that run: one of each pod that shares something.
fn file_servers() -> Vec<String> {
    let pids = run("pidof", &["virtiofsd"]).stdout;
    pids.split_whitespace().map(str::to_owned).collect()
}

/// One more than there are disks is shared by the host, and writes to its snapshot. Until then
/// there is no file server, and for those that bring a directory it is the same.
#[test]
fn layers_are_shared_where_no_disk_is_empty() {
    let _one_disk = Changed::new("root_disks", "1");
    let scene = PodScene::new();
    let pod = pod_of(&scene, "shared");
    let one = pod.container("one", SLEEP).start();
    assert!(is_on_a_disk(&one));
    assert_eq!(file_servers(), [""; 0]);
    let two = pod.container("two", SLEEP).start();
    assert!(!is_on_a_disk(&two));
    let file_server = file_servers();
    assert_eq!(file_server.len(), 1);
    two.sh("echo two > /written && ls /bin/wget")
        .exits(0)
        .prints("/bin/wget\n");
    let written = upper(&two).join("written");
    assert_eq!(fs::read_to_string(written).unwrap(), "two\n");
    gone(&one);
    let directory = scene.directory("host-path");
    fs::write(directory.join("there"), "of the host\n").unwrap();
    let three = pod.container("three", SLEEP).mount(&directory, "/data");
    let three = three.start();
    assert!(is_on_a_disk(&three));
    three
        .sh("cat /data/there; echo of the guest > /data/here")
        .exits(0)
        .prints("of the host\n");
    let here = fs::read_to_string(directory.join("here")).unwrap();
    assert_eq!(here, "of the guest\n");
    assert_eq!(file_servers(), file_server);
    two.sh("ls /bin/wget").exits(0);
}

/// As `kubectl debug` may do: a process of another container holds on to the files of one that
/// is gone. The next one gets another disk, or none.
#[test]
fn a_disk_that_somebody_holds_is_no_other_container_s() {
    let _two_disks = Changed::new("root_disks", "2");
    let scene = PodScene::new();
    let manifest = scene.pod("held").shared_pids();
    let pod = manifest.runtime("nacre-erofs").run();
    let one = pod.container("one", &["sleep", "7201"]).start();
    let two = pod.container("two", SLEEP).start();
    assert!(is_on_a_disk(&one) && is_on_a_disk(&two));
    let hold = "set -- $(ps -o pid,args | grep 'sleep [7]201') && cd /proc/$1/root && \
                { exec sleep 7202 < /dev/null > /dev/null 2>&1 & }";
    two.sh(hold).exits(0);
    gone(&one);
    let three = pod.container("three", SLEEP).start();
    assert!(!is_on_a_disk(&three));
    gone(&three);
    gone(&two);
    let four = pod.container("four", SLEEP).start();
    assert!(is_on_a_disk(&four), "the other one is free");
}

/// Of an image of its own, so that nobody else has its layer. What is in its pod beside it
/// goes on, and what comes after it has its disk.
#[test]
fn a_damaged_layer_is_its_container_s_alone() {
    const IMAGE: &str = "docker.io/library/frail:latest";
    let _disks = Changed::new("root_disks", "3");
    let scene = PodScene::new();
    let work = scene.directory("frail");
    let make = "mkdir -p tree/bin && cp /bin/busybox tree/bin && \
                for name in sh cat ls sleep; do ln -s busybox tree/bin/$name; done && \
                head -c 1000000 /dev/urandom > tree/late && \
                echo early > tree/early && \
                mkimage --name \"$1\" --out image.tar tree";
    let make = format!("cd {} && {make}", work.display());
    run("sh", &["-c", &make, "sh", IMAGE]).exits(0);
    scene.import(IMAGE, &work.join("image.tar"));

    let pod = pod_of(&scene, "frail");
    let sibling = pod.container("sibling", SLEEP).start();
    let of_image = |attempt| pod.container("frail", SLEEP).image(IMAGE).attempt(attempt);
    let frail = of_image(0).start();
    let [next, last] = [1, 2].map(|attempt| of_image(attempt).create());
    assert!(is_on_a_disk(&sibling) && is_on_a_disk(&frail));
    // Its programs are in the guest's memory, and where the file is.
    frail
        .sh("cat /bin/busybox > /dev/null; ls -l /late")
        .exits(0);
    frail.exec(&["cat", "/early"]).exits(0).prints("early\n");
    let layer = PathBuf::from(overlay_option(&frail, "lowerdir")).with_file_name("layer.erofs");
    let file = OpenOptions::new().write(true).open(&layer).unwrap();

    // What it reads is not there any more.
    file.set_len(4096).unwrap();
    let said = frail.exec(&["cat", "/late"]).exits(1);
    said.complains(&["read error"]);
    let is_well = |container: &PodContainer| {
        assert_eq!(container.state(), ContainerState::Running);
        container.sh("cat /bin/busybox > /dev/null").exits(0);
    };
    is_well(&sibling);
    is_well(&frail);
    // One that starts has no program, and with the file system's first block gone none at all.
    let started = scene.cri().start(&next.id);
    pod.refuses(started, &["i/o error"]);
    fs::write(&layer, [0xa5; 8192]).unwrap();
    let started = scene.cri().start(&last.id);
    pod.refuses(started, &["mount", "/layers/1", "invalid argument"]);
    is_well(&sibling);
    let other = pod.container("other", SLEEP).start();
    assert!(is_on_a_disk(&other));
    gone(&frail);
    is_well(&sibling);
    ctr(&["-n", "k8s.io", "image", "rm", "--sync", IMAGE]).exits(0);
}

/// Pods of other snapshotters pay nothing for what they do not use.
#[test]
fn pods_of_shared_directories_have_no_disks_for_layers() {
    let scene = PodScene::new();
    let count = |pod: &Pod| {
        let app = pod.container("app", SLEEP).start();
        let said = app.sh("ls -d /sys/block/vd* | wc -l").exits(0).stdout;
        said.trim().parse::<usize>().unwrap()
    };
    let shared = count(&scene.pod("directories").run());
    let on_disks = count(&pod_of(&scene, "images"));
    assert_eq!(on_disks, shared + 4, "root_disks");
}
