//! Image files that are damaged and file systems that are full: an error that names
//! what is wrong, and nothing left behind.

use std::fs::{self, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use nacre_tests::{BUSYBOX, Changed, Said, Scene, run};
use serde_json::json;

const SHARE: &str = "/usr/local/share/nacre";

/// A copy of one of nacre's files, configured in its place until this is dropped.
struct Copied {
    path: PathBuf,
    _config: Changed,
}

impl Copied {
    fn of(name: &str, key: &str) -> Self {
        let path = Path::new("/tmp").join(format!("e2e-{name}"));
        fs::copy(Path::new(SHARE).join(name), &path).unwrap();
        Self {
            _config: Changed::new(key, &format!("{:?}", path.to_str().unwrap())),
            path,
        }
    }

    fn truncate(&self, percent: u64) {
        let file = OpenOptions::new().write(true).open(&self.path).unwrap();
        let len = file.metadata().unwrap().len();
        file.set_len(len * percent / 100).unwrap();
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        fs::remove_file(&self.path).unwrap();
    }
}

/// Overwrites a part of a file with bytes that are none of its own.
fn damage(path: &Path, offset: u64, bytes: usize) {
    let mut file = OpenOptions::new().write(true).open(path).unwrap();
    file.seek(SeekFrom::Start(offset)).unwrap();
    file.write_all(&vec![0xa5; bytes]).unwrap();
    file.sync_all().unwrap();
}

fn run_true(options: &[&str]) -> Said {
    Scene::new().run_with(options, &["true"])
}

#[test]
fn kernel_that_is_cut_short() {
    for percent in [0, 50] {
        let kernel = Copied::of("vmlinux", "kernel");
        kernel.truncate(percent);
        let said = run_true(&[]).exits(1);
        println!("{percent} %: {}", said.stderr);
        said.complains(&[&format!("kernel {}: ", kernel.path.display())]);
    }
}

/// Code that is none: the guest ends before its agent is there, or never gets so far. Which
/// of them is a matter of the code; it is no other thing.
#[test]
fn kernel_that_is_damaged() {
    let _limit = Changed::new("boot_timeout_seconds", "10");
    let kernel = Copied::of("vmlinux", "kernel");
    damage(&kernel.path, 4 << 20, 4 << 20);
    let said = run_true(&[]).exits(1);
    println!("{}", said.stderr);
    let ends = [
        "the guest kernel panicked",
        "the guest crashed (triple fault)",
        "the guest rebooted",
        "the guest's agent did not answer within 10 s of the start",
    ];
    assert!(ends.iter().any(|end| said.stderr.contains(end)), "{said:?}");
}

#[test]
fn initramfs_that_is_cut_short_or_damaged() {
    for cut in [true, false] {
        let initrd = Copied::of("initrd.img", "initrd");
        if cut {
            initrd.truncate(50);
        } else {
            damage(&initrd.path, 0, 4096);
        }
        let said = run_true(&[]).exits(1);
        println!("cut {cut}: {}", said.stderr);
        said.complains(&["the guest kernel panicked"]);
    }
}

/// The one file of its name below containerd's directory of a snapshotter that
/// belongs to the snapshot with this path in `ctr snapshots mounts`.
fn image_of(scene: &Scene, snapshotter: &str, id: &str) -> PathBuf {
    let mounts = [
        "snapshots",
        "--snapshotter",
        snapshotter,
        "mounts",
        "/mnt",
        id,
    ];
    let said = scene.ctr(&mounts).exits(0);
    let mut words = said
        .stdout
        .split(|c: char| c.is_whitespace() || c == ':' || c == '=');
    let path =
        words.find(|word| word.starts_with("/var/lib/containerd") && Path::new(word).is_file());
    path.unwrap_or_else(|| panic!("no image in {said:#?}"))
        .into()
}

/// Creates a container, not its task, and returns its id.
fn create(scene: &mut Scene, snapshotter: &str, command: &[&str]) -> String {
    let id = scene.id();
    let runtime = nacre_tests::RUNTIME;
    let create = [
        "container",
        "create",
        "--runtime",
        runtime,
        "--snapshotter",
        snapshotter,
    ];
    scene
        .ctr(&[&create[..], &[BUSYBOX, &id], command].concat())
        .exits(0);
    id
}

#[test]
fn ext4_image_that_is_damaged() {
    let mut scene = Scene::new();
    let id = create(&mut scene, "blockfile", &["true"]);
    damage(&image_of(&scene, "blockfile", &id), 0, 64 << 10);
    let said = scene.ctr(&["task", "start", &id]).exits(1);
    println!("{}", said.stderr);
    said.complains(&["mount", &id, "invalid argument"]);
}

#[test]
fn ext4_image_that_is_cut_short() {
    let mut scene = Scene::new();
    let id = create(&mut scene, "blockfile", &["true"]);
    let image = image_of(&scene, "blockfile", &id);
    let file = OpenOptions::new().write(true).open(image).unwrap();
    file.set_len(1000).unwrap();
    let said = scene.ctr(&["task", "start", &id]).exits(1);
    said.complains(&[
        "/var/lib/containerd",
        "1000 bytes are no file system's image",
    ]);
}

/// A layer of an image of its own, so that no other test has it mounted.
#[test]
fn erofs_layer_that_is_damaged() {
    const IMAGE: &str = "docker.io/library/damaged:latest";
    let directory = "/tmp/e2e-damaged";
    let bin = format!("{directory}/tree/bin");
    fs::create_dir_all(&bin).unwrap();
    fs::copy("/bin/busybox", format!("{bin}/true")).unwrap();
    let archive = format!("{directory}/image.tar");
    run(
        "mkimage",
        &[
            "--name",
            IMAGE,
            "--out",
            &archive,
            &format!("{directory}/tree"),
        ],
    )
    .exits(0);
    run(
        "ctr",
        &["image", "import", "--snapshotter", "erofs", &archive],
    )
    .exits(0);
    fs::remove_dir_all(directory).unwrap();
    let newest = "ls -t /var/lib/containerd/io.containerd.snapshotter.v1.erofs/snapshots/*/layer.erofs | head -n 1";
    let layer = PathBuf::from(run("sh", &["-c", newest]).exits(0).stdout.trim());

    let mut scene = Scene::new();
    let options = ["--snapshotter", "erofs"];
    scene.run_image(IMAGE, &options, &["/bin/true"]).exits(0);
    let cut = |layer: &Path, len: u64| {
        let file = OpenOptions::new().write(true).open(layer).unwrap();
        file.set_len(len).unwrap();
    };
    // The first block is all that mounting takes.
    cut(&layer, 4096);
    let said = scene.run_image(IMAGE, &options, &["/bin/true"]).exits(1);
    said.complains(&["exec: \"/bin/true\": i/o error"]);
    damage(&layer, 0, 8192);
    let said = scene.run_image(IMAGE, &options, &["/bin/true"]).exits(1);
    said.complains(&["mount", "/layers/1", "invalid argument"]);
    cut(&layer, 0);
    let said = scene.run_image(IMAGE, &options, &["/bin/true"]).exits(1);
    said.complains(&["/layer.erofs", "0 bytes are no file system's image"]);
    run("ctr", &["image", "rm", "--sync", IMAGE]).exits(0);
}

/// A small file system, until this is dropped.
struct Small(&'static str);

impl Small {
    fn mount(path: &'static str, size: &str) -> Self {
        fs::create_dir_all(path).unwrap();
        let options = format!("size={size},mode=755");
        run("mount", &["-t", "tmpfs", "-o", &options, "small", path]).exits(0);
        Self(path)
    }

    fn fill(&self) {
        let file = format!("of={}/filling", self.0);
        run("dd", &["if=/dev/zero", "bs=4k", &file]).exits(1);
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        run("umount", &[self.0]);
        let _ = fs::remove_dir(self.0);
    }
}

#[test]
fn run_directory_that_is_full() {
    let full = Small::mount("/tmp/e2e-full", "1m");
    let _config = Changed::new("run_dir", "\"/tmp/e2e-full\"");
    let mut scene = Scene::new();
    // Full before the start: refused.
    full.fill();
    let said = scene.run(&["true"]).exits(1);
    said.complains(&["No space left on device"]);
    // Full after it: the container is used, ends and is deleted as ever.
    fs::remove_file("/tmp/e2e-full/filling").unwrap();
    let id = scene.start_sleeper(&[]);
    full.fill();
    scene.exec(&id, &[], &["sh", "-c", "exit 4"]).exits(4);
    scene.remove(&id);
    drop(scene);
    fs::remove_file("/tmp/e2e-full/filling").unwrap();
    let left = run("find", &["/tmp/e2e-full", "-type", "f"])
        .exits(0)
        .stdout;
    assert!(!left.contains("state.json"), "{left}");
}

/// The file system that a container's files are on is full: the container is told,
/// and goes on.
#[test]
fn root_file_system_that_is_full() {
    let small = Small::mount("/tmp/e2e-small-root", "8m");
    for directory in ["bin", "dev", "proc", "run", "sys", "tmp"] {
        fs::create_dir_all(Path::new(small.0).join(directory)).unwrap();
    }
    let copy = format!(
        "cp /bin/busybox {0}/bin && chroot {0} /bin/busybox --install -s /bin",
        small.0
    );
    run("sh", &["-c", &copy]).exits(0);
    let mut scene = Scene::new();
    let script = "dd if=/dev/zero of=/file bs=64k 2>&1 | grep -o 'No space left on device'; \
                  rm /file; echo room > /file; cat /file; exit 3";
    let said = scene.run_spec(|spec| {
        spec["root"] = json!({"path": small.0, "readonly": false});
        spec["process"]["args"] = json!(["sh", "-c", script]);
    });
    said.exits(3).prints("No space left on device\nroom\n");
}

/// A file mounted over another, until this is dropped.
struct Over<'a>(&'a Path);

impl<'a> Over<'a> {
    fn mount(file: &str, target: &'a Path) -> Self {
        let target_path = target.to_str().unwrap();
        run("mount", &["--bind", file, target_path]).exits(0);
        Self(target)
    }
}

impl Drop for Over<'_> {
    fn drop(&mut self) {
        run("umount", &["--lazy", self.0.to_str().unwrap()]);
    }
}

/// The host has no room for what a guest writes to its disk: the guest is told so, and its
/// pod is used, ended and deleted as ever.
#[test]
fn disk_on_a_file_system_that_is_full() {
    let small = Small::mount("/tmp/e2e-full-host", "64m");
    let mut scene = Scene::new();
    let id = create(&mut scene, "blockfile", &["sleep", "3600"]);
    let image = image_of(&scene, "blockfile", &id);
    let copy = format!("{}/image", small.0);
    let sparse = ["--sparse=always", image.to_str().unwrap(), &copy];
    run("cp", &sparse).exits(0);
    let over = Over::mount(&copy, &image);
    let start = ["task", "start", "--null-io", "--detach", &id];
    scene.ctr(&start).exits(0);
    let write = |file: &str| {
        let script = format!("dd if=/dev/urandom of=/{file} bs=64k count=64 conv=fsync");
        scene.exec(&id, &[], &["sh", "-c", &script])
    };
    write("before").exits(0);
    small.fill();
    write("after").exits(1).complains(&["Input/output error"]);
    // If its journal cannot be written either, Linux shuts the guest's file system down.
    let said = scene.exec(&id, &[], &["echo", "hi"]);
    let is_read = said.code == Some(0) && said.stdout == "hi\n";
    assert!(is_read || said.stderr.contains("i/o error"), "{said:#?}");
    scene.remove(&id);
    drop(over);
}
