//! Volumes as kubelet prepares them.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Instant;

use nacre_tests::cri::messages::MountPropagation;
use nacre_tests::pods::{Pod, PodContainer, PodScene};
use nacre_tests::{PodDir, eventually, run, two_seconds};

use crate::{PERL, SLEEP};

in_both_modes![memory_is_shared_by_the_pod];

#[test]
fn host_paths_and_empty_dirs() {
    let scene = PodScene::new();
    host_paths_and_empty_dirs_in(&scene, &scene.pod("volumes").run());
}

/// A directory for two containers, one of the host's, which one may not write, and a file.
pub fn host_paths_and_empty_dirs_in(scene: &PodScene, pod: &Pod) {
    let (shared, data) = (scene.directory("empty-dir"), scene.directory("host-path"));
    let file = data.join("file");
    fs::write(&file, "from the host\n").unwrap();
    let one = pod
        .container("one", SLEEP)
        .mount(&shared, "/shared")
        .mount(&data, "/data")
        .mount(&file, "/etc/one-file")
        .start();
    let two = pod
        .container("two", SLEEP)
        .mount(&shared, "/shared")
        .mount_read_only(&data, "/data")
        .start();

    one.sh("echo hello > /shared/hello").exits(0);
    two.exec(&["cat", "/shared/hello"])
        .exits(0)
        .prints("hello\n");
    two.sh("echo no > /data/no")
        .exits(1)
        .complains(&["Read-only"]);
    two.exec(&["cat", "/data/file"])
        .exits(0)
        .prints("from the host\n");
    one.sh("echo from the guest > /etc/one-file; mkdir /data/made")
        .exits(0);
    assert_eq!(fs::read_to_string(&file).unwrap(), "from the guest\n");
    assert!(data.join("made").is_dir());
    fs::write(data.join("later"), "later\n").unwrap();
    one.exec(&["cat", "/data/later"]).exits(0).prints("later\n");
}

/// Tells of each version that arrives, and of any that is not all of one, until there is a
/// file `end`. Files of a version that is being removed may be missing.
const FOLLOW: &str = "
    known=none
    until [ -e /config/end ]; do
        set -- $(cd /config/..data && cat a b 2>/dev/null | uniq -c)
        case \"$# $1\" in
            '2 8192') [ $2 = $known ] || echo arrived $2; known=$2 ;;
            '0 ' | '2 4096') ;;
            *) echo half: $* ;;
        esac
    done
    head -n 1 /config/a
    for dir in empty optional; do ls /$dir | wc -l; done
    cat /etc/one-key
    echo why > /dev/termination-log
    exit 3";

/// A file of a version: lines that are all alike.
fn version(name: &str) -> String {
    format!("{name}\n").repeat(4096)
}

#[test]
fn what_kubelet_writes() {
    let scene = PodScene::new();
    what_kubelet_writes_in(&scene.pod("written").run());
}

/// ConfigMaps: one that changes, one without keys, an optional one that is not
/// there (kubelet makes an empty volume), one key by `subPath`; a termination log.
pub fn what_kubelet_writes_in(pod: &Pod) {
    let mut kubelet = PodDir::new("written");
    let [config, empty, optional, keys] =
        ["config", "empty", "optional", "keys"].map(|name| kubelet.volume("configmap", name));
    let write = |kubelet: &mut PodDir, name: &str| {
        let text = version(name);
        kubelet.write(&config, &[("a", &text), ("b", &text)]);
    };
    write(&mut kubelet, "1");
    for volume in [&empty, &optional] {
        kubelet.write(volume, &[]);
    }
    kubelet.write(&keys, &[("key", "one key\n")]);
    let key = kubelet.subpath(&keys.join("..data/key"), "keys");
    let log = kubelet.termination_log();
    let app = pod
        .container("follows", &["sh", "-c", FOLLOW])
        .mount_read_only(&config, "/config")
        .mount_read_only(&empty, "/empty")
        .mount_read_only(&optional, "/optional")
        .mount_read_only(&key, "/etc/one-key")
        .mount(&log, "/dev/termination-log")
        .start();
    app.sh("readlink /config/a; echo x > /config/a")
        .exits(1)
        .prints("..data/a\n")
        .complains(&["Read-only"]);

    app.await_logged("stdout", "arrived 1\n");
    for number in 2..8 {
        let written = Instant::now();
        write(&mut kubelet, &number.to_string());
        app.await_logged("stdout", &format!("arrived {number}\n"));
        let (took, limit) = (written.elapsed(), two_seconds());
        println!("version {number} took {took:.2?} of {limit:.2?}");
        assert!(took < limit, "{took:?}, not {limit:?}");
    }
    let last = version("last");
    kubelet.write(&config, &[("a", &last), ("b", &last), ("end", "")]);
    let ended = app.await_exit();
    assert_eq!(ended.exit_code, 3);
    let said = app.logged("stdout");
    assert!(!said.contains("half"), "{said}");
    assert!(said.ends_with("last\n0\n0\none key\n"), "{said}");
    assert_eq!(fs::read_to_string(log).unwrap(), "why\n");
}

/// Something from one container to the other, by a pipe and by a unix socket.
fn talk(one: &PodContainer, two: &PodContainer, directory: &str) {
    two.sh(&format!("mkfifo {directory}/pipe")).exits(0);
    thread::scope(|threads| {
        let reading = threads.spawn(|| one.exec(&["cat", &format!("{directory}/pipe")]));
        two.sh(&format!("echo piped > {directory}/pipe")).exits(0);
        reading.join().unwrap().exits(0).prints("piped\n");
        let listen = format!(
            "exec {PERL} -MIO::Socket::UNIX -e '$s = IO::Socket::UNIX->new( \
             Local => \"{directory}/.socket\", Listen => 1) or die \"listen: $!\"; rename \"{directory}/.socket\", \
             \"{directory}/socket\"; $c = $s->accept; print <$c>'"
        );
        let listening = threads.spawn(move || one.sh(&listen));
        let speak = format!(
            "until [ -S {directory}/socket ]; do sleep 0.1; done; exec {PERL} -MIO::Socket::UNIX -e '$c = \
             IO::Socket::UNIX->new(\"{directory}/socket\") or die \"connect: $!\"; \
             print $c \"through\\n\"'"
        );
        two.sh(&speak).exits(0);
        listening.join().unwrap().exits(0).prints("through\n");
    });
}

/// KiB that a directory of the host takes, as kubelet counts them.
fn used_kib(directory: &Path) -> u64 {
    let said = run("du", &["-sk", directory.to_str().unwrap()]).exits(0);
    let kib = said.stdout.split_whitespace().next().unwrap();
    kib.parse().unwrap()
}

#[test]
fn empty_dirs_of_disk_and_memory() {
    let scene = PodScene::new();
    let mut kubelet = PodDir::new("empty-dirs");
    let disk = kubelet.volume("empty-dir", "disk");
    let capped = kubelet.capped("capped", 8);
    let memory = kubelet.memory("memory", "size=2m,mode=1777");
    fs::create_dir(disk.join("part")).unwrap();
    let part = kubelet.subpath(&disk.join("part"), "disk");
    let pod = scene.pod("empty-dirs").run();
    let usr = Path::new("/usr");
    let [one, two] = ["one", "two"].map(|name| {
        let container = pod.container(name, SLEEP).mount(&disk, "/disk");
        let container = container.mount(&memory, "/memory").mount(&part, "/part");
        let container = container.mount(&capped, "/capped");
        container.mount_read_only(usr, "/run/usr").start()
    });
    for directory in ["/disk", "/memory"] {
        talk(&one, &two, directory);
    }
    one.sh("echo part > /part/file").exits(0);
    two.exec(&["cat", "/disk/part/file"]).prints("part\n");
    assert_eq!(
        fs::read_to_string(disk.join("part/file")).unwrap(),
        "part\n"
    );

    let fill = |path: &str, kib: u32| {
        one.sh(&format!(
            "dd if=/dev/urandom of={path} bs=64k count={}",
            kib / 64
        ))
    };
    fill("/memory/half", 1024).exits(0);
    fill("/memory/more", 2048)
        .exits(1)
        .complains(&["No space left on device"]);
    one.sh("rm /memory/more").exits(0);
    fill("/memory/more", 512).exits(0);
    assert_eq!(
        fs::read_dir(&memory).unwrap().count(),
        0,
        "it is the guest's"
    );

    for (directory, name) in [(&disk, "/disk/file"), (&capped, "/capped/file")] {
        let before = used_kib(directory);
        fill(name, 4096).exits(0);
        one.sh("sync").exits(0);
        let full = used_kib(directory);
        assert!(
            (4096..4600).contains(&(full - before)),
            "{before} to {full}"
        );
        one.sh(&format!("rm {name}")).exits(0);
        eventually("the space is given back", || {
            used_kib(directory) <= before + 64
        });
    }
    fill("/capped/file", 16384)
        .exits(1)
        .complains(&["No space left on device"]);
    one.sh("rm /capped/file").exits(0);
    fill("/capped/file", 4096).exits(0);
}

/// Plugins of the volumes the kubelet writes itself.
const WRITTEN: [&str; 4] = ["secret", "projected", "downward-api", "configmap"];
const GROUP: u32 = 2000;

/// `fsGroup`: the kubelet gives the group what it writes, and the pod's containers are
/// in it. Who is not may not read a key of mode 0400.
#[test]
fn volumes_belong_to_the_group_of_the_pod() {
    let scene = PodScene::new();
    volumes_belong_to_the_group_in(&scene.pod("grouped").run());
}

/// The same of two containers of a pod.
pub fn volumes_belong_to_the_group_in(pod: &Pod) {
    let mut kubelet = PodDir::new("grouped");
    let written = WRITTEN.map(|plugin| {
        let volume = kubelet.written_in_memory(plugin, "volume");
        kubelet.write(&volume, &[("key", plugin)]);
        let key = fs::Permissions::from_mode(0o400);
        fs::set_permissions(volume.join("..data/key"), key).unwrap();
        kubelet.give_to(&volume, GROUP, "r");
        volume
    });
    let disk = kubelet.volume("empty-dir", "disk");
    kubelet.give_to(&disk, GROUP, "rw");
    let memory = kubelet.memory("memory", &format!("size=2m,mode=2775,gid={GROUP}"));
    let [member, stranger] =
        [("member", vec![i64::from(GROUP)]), ("stranger", vec![])].map(|(name, groups)| {
            let mut container = pod.container(name, SLEEP).run_as(1000, 1000);
            container = container.security(|security| security.supplemental_groups = groups);
            for (plugin, volume) in WRITTEN.iter().zip(&written) {
                container = container.mount_read_only(volume, &format!("/{plugin}"));
            }
            let container = container.mount(&disk, "/disk");
            container.mount(&memory, "/memory").start()
        });

    for plugin in WRITTEN {
        let script = format!(
            "cat /{plugin}/key && stat -L -c ' %a %u %g' /{plugin}/key && \
             stat -L -c %g /{plugin}/..data && [ -g /{plugin}/..data ]"
        );
        let said = member.sh(&script).exits(0);
        said.prints(&format!("{plugin} 440 0 {GROUP}\n{GROUP}\n"));
        stranger
            .exec(&["cat", &format!("/{plugin}/key")])
            .exits(1)
            .complains(&["Permission denied"]);
    }
    for directory in ["/disk", "/memory"] {
        let script = format!("echo x > {directory}/file && stat -c '%u %g' {directory}/file");
        member
            .sh(&script)
            .exits(0)
            .prints(&format!("1000 {GROUP}\n"));
        stranger
            .sh(&format!("echo x > {directory}/no"))
            .complains(&["Permission denied"]);
    }
    assert_eq!(fs::metadata(disk.join("file")).unwrap().gid(), GROUP);
}

/// A mount of the host, taken off again.
pub struct Mounted(PathBuf);

impl Mounted {
    pub fn new(path: PathBuf) -> Self {
        fs::create_dir_all(&path).unwrap();
        run("mount", &["-t", "tmpfs", "tmpfs", path.to_str().unwrap()]).exits(0);
        Self(path)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // The file server may have it open, as any process may.
        run("umount", &["-l", self.0.to_str().unwrap()]);
    }
}

#[test]
fn mounts_of_the_host_below_a_volume() {
    let scene = PodScene::new();
    let host = Mounted::new(scene.directory("host"));
    run("mount", &["--make-shared", host.0.to_str().unwrap()]).exits(0);
    let inner = Mounted::new(host.0.join("inner"));
    fs::create_dir(host.0.join("later")).unwrap();
    let pod = scene.pod("mounts").run();
    let app = pod
        .container("app", SLEEP)
        .mount_with(&host.0, "/slave", |mount| {
            mount.propagation = MountPropagation::HostToContainer.into();
        })
        .mount(&host.0, "/private")
        .mount_read_only(&host.0, "/ro")
        .start();
    app.sh("echo inner > /private/inner/file").exits(0);
    assert_eq!(fs::read(inner.0.join("file")).unwrap(), b"inner\n");
    for directory in ["/ro", "/ro/inner"] {
        app.sh(&format!("echo x > {directory}/no"))
            .exits(1)
            .complains(&["Read-only"]);
    }
    let later = Mounted::new(host.0.join("later"));
    fs::write(later.0.join("file"), "later\n").unwrap();
    eventually("the mount arrives", || {
        app.exec(&["cat", "/slave/later/file"]).stdout == "later\n"
    });
    app.sh("ls /private/later").exits(0).prints("");

    let refused = pod
        .container("both", SLEEP)
        .mount_with(&host.0, "/both", |mount| {
            mount.propagation = MountPropagation::Bidirectional.into();
        })
        .try_start();
    pod.refuses(refused, &["Bidirectional", "/both"]);
}

/// The pod's shared memory, and System V's: all of its containers have the same.
fn memory_is_shared_by_the_pod(scene: &PodScene) {
    let pod = scene.pod("shm").run();
    let one = pod.container("one", SLEEP).start();
    let two = pod.container("two", SLEEP).start();
    one.sh("echo here > /dev/shm/note").exits(0);
    two.exec(&["cat", "/dev/shm/note"])
        .exits(0)
        .prints("here\n");
    one.sh("df -k /dev/shm | awk 'NR == 2 {print $2}'")
        .prints("65536\n");
    let ids =
        |name: &str| [&one, &two].map(|c| c.sh(&format!("readlink /proc/self/ns/{name}")).stdout);
    for shared in ["ipc", "uts", "net"] {
        let [a, b] = ids(shared);
        assert_eq!(a, b, "{shared}");
    }
    for own in ["pid", "mnt"] {
        let [a, b] = ids(own);
        assert_ne!(a, b, "{own}");
    }
    one.stop(std::time::Duration::ZERO);
    one.remove();
    two.exec(&["cat", "/dev/shm/note"])
        .exits(0)
        .prints("here\n");
}
