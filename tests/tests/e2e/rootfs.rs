//! Root file systems and mounts: what the snapshotters hand over, block devices
//! and shared directories, and that writes land where they belong.

use std::fs;
use std::process::Stdio;

use nacre_tests::{Changed, LAYERS, Scene, run, run_with_input};

/// Describes the tree below /data, a line a file: type, mode, owner, links,
/// device, size, content, extended attributes. `getfattr` is the host's.
const DESCRIBE: &str = r#"
cd /data && find . | sort | while IFS= read -r file; do
  stat -c '%n|%F|%a|%u:%g|%t:%T' "$file"
  [ -d "$file" ] || stat -c '  links %h, %s bytes' "$file"
  [ ! -f "$file" ] || md5sum < "$file"
  [ ! -L "$file" ] || readlink "$file"
  /host/lib64/ld-linux-x86-64.so.2 --library-path /host/lib/x86_64-linux-gnu \
    /host/bin/getfattr -h -d -m '^(user|security)\.' -e hex "$file"
done 2>&1"#;

fn describe(scene: &mut Scene, snapshotter: &str, runtime: &[&str]) -> String {
    let id = scene.id();
    let mut arguments = vec!["run", "--rm"];
    arguments.extend(runtime);
    let mount = "type=bind,src=/usr,dst=/host,options=rbind:ro";
    arguments.extend([
        "--snapshotter",
        snapshotter,
        "--mount",
        mount,
        "--user",
        "0",
    ]);
    arguments.extend([LAYERS, &id, "sh", "-c", DESCRIBE]);
    let said = scene.ctr(&arguments).exits(0);
    said.stdout
}

#[test]
fn snapshotters_give_the_same_tree_as_runc() {
    let mut scene = Scene::new();
    let expected = describe(&mut scene, "overlayfs", &[]);
    for part in [
        "./setuid|regular file|4755|0:0|0:0",
        "./setgid|regular file|2750|1000:50|0:0",
        "./sticky|directory|1777|0:0|0:0",
        "./nodes/null|character special file|644|0:0|1:3",
        "./nodes/fifo|fifo|644|0:0|0:0",
        "user.lab=0x6f6e65",
        "security.capability=0x01",
        "./opaque/shown|",
        "./gone/again|",
        "links 2, 5000000 bytes",
    ] {
        assert!(expected.contains(part), "no {part:?} in {expected}");
    }
    for hidden in ["./removed|", "./opaque/hidden|", "./gone/file|"] {
        assert!(!expected.contains(hidden), "{hidden:?} in {expected}");
    }
    let nacre = ["--runtime", nacre_tests::RUNTIME];
    assert_eq!(describe(&mut scene, "overlayfs", &nacre), expected);
    for snapshotter in ["native", "erofs"] {
        let seen = describe(&mut scene, snapshotter, &nacre);
        let expected = describe(&mut scene, snapshotter, &[]);
        assert_eq!(seen, expected, "{snapshotter}");
    }
}

#[test]
fn erofs_layers_are_block_devices_and_no_file_server_runs() {
    let mut scene = Scene::new();
    let id = scene.start_sleeper(&["--snapshotter", "erofs"]);
    let mounts = scene.exec(&id, &[], &["cat", "/proc/mounts"]).exits(0);
    assert!(mounts.stdout.contains("overlay / overlay"), "{mounts:#?}");
    assert!(!mounts.stdout.contains("virtiofs"), "{mounts:#?}");
    let partitions = scene.exec(&id, &[], &["cat", "/proc/partitions"]).exits(0);
    assert!(partitions.stdout.contains("vda1"), "{partitions:#?}");
    let processes = run("ps", &["-e", "-o", "args"]).stdout;
    assert!(!processes.contains("virtiofsd"), "{processes}");
    // Writes go to the guest's upper layer, not to the image.
    scene
        .exec(
            &id,
            &[],
            &["sh", "-c", "echo new > /etc/passwd && cat /etc/passwd"],
        )
        .exits(0)
        .prints("new\n");
}

/// Layers whose paths in the guest, the container's id in each, together exceed the page that mount(2) takes.
#[test]
fn image_of_many_layers() {
    const COUNT: usize = 42;
    const IMAGE: &str = "docker.io/library/many:latest";
    let directory = "/tmp/e2e-many";
    let mut layers = Vec::new();
    for layer in 1..=COUNT {
        let tree = format!("{directory}/{layer}");
        fs::create_dir_all(&tree).unwrap();
        fs::write(format!("{tree}/layer-{layer}"), format!("{layer}\n")).unwrap();
        fs::write(format!("{tree}/last"), format!("{layer}\n")).unwrap();
        layers.push(tree);
    }
    let busybox = format!("{directory}/1/bin");
    fs::create_dir_all(&busybox).unwrap();
    fs::copy("/bin/busybox", format!("{busybox}/sh")).unwrap();
    let archive = format!("{directory}/many.tar");
    let mut make = vec!["--name", IMAGE, "--out", &archive];
    make.extend(layers.iter().map(String::as_str));
    run("mkimage", &make).exits(0);
    run("ctr", &["image", "import", &archive]).exits(0);
    fs::remove_dir_all(directory).unwrap();

    let mut scene = Scene::new();
    let script = "set -- /layer-*; echo $#; read last </last; echo $last";
    let id = scene.long_id();
    let mut arguments = vec!["run", "--rm", "--runtime", nacre_tests::RUNTIME];
    arguments.extend(["--snapshotter", "erofs", IMAGE, &id, "sh", "-c", script]);
    let said = scene.ctr(&arguments);
    said.exits(0).prints(&format!("{COUNT}\n{COUNT}\n"));
    run("ctr", &["image", "rm", "--sync", IMAGE]).exits(0);
}

#[test]
fn writes_land_in_the_snapshot() {
    let mut scene = Scene::new();
    let options = ["--snapshotter", "overlayfs"];
    let script = "echo kept > /written && rm /etc/group && chmod 600 /etc/passwd";
    let (id, mut command) = scene.command(nacre_tests::BUSYBOX, &options, &["sh", "-c", script]);
    let status = command.stdin(Stdio::null()).status().unwrap();
    assert!(status.success());
    let diff = format!("ctr snapshots diff {id} | tar -tvz");
    let said = run("sh", &["-c", &diff]).exits(0);
    for part in ["written", "etc/.wh.group", "-rw-------"] {
        assert!(said.stdout.contains(part), "no {part:?} in {said:#?}");
    }
}

#[test]
fn ext4_image_is_the_root_and_keeps_what_is_written() {
    let mut scene = Scene::new();
    let options = ["--snapshotter", "blockfile"];
    let script = "grep ' / ' /proc/mounts; echo there > /written";
    let (id, command) = scene.command(nacre_tests::BUSYBOX, &options, &["sh", "-c", script]);
    let said = run_with_input(command, Vec::new()).exits(0);
    assert!(said.stdout.contains(" / ext4 rw"), "{said:#?}");
    is_written(&scene, &id);
}

/// Fails the test unless a container that is gone from its guest has left `there` in the
/// file `written` of its image, and all of it in order: a disk is flushed before that.
#[track_caller]
fn is_written(scene: &Scene, id: &str) {
    let mounts = [
        "snapshots",
        "--snapshotter",
        "blockfile",
        "mounts",
        "/mnt",
        id,
    ];
    let said = scene.ctr(&mounts).exits(0);
    let image = said
        .stdout
        .split_whitespace()
        .find(|word| word.starts_with("/var/lib/containerd"))
        .unwrap_or_else(|| panic!("no image in {said:#?}"));
    run("debugfs", &["-R", "cat /written", image])
        .exits(0)
        .prints("there\n");
    run("e2fsck", &["-f", "-n", image]).exits(0);
}

/// On an empty disk of the machine, one after the other; without one there is no other way.
#[test]
fn images_of_containers_that_join_a_pod() {
    let _one_disk = Changed::new("root_disks", "1");
    let mut scene = Scene::new();
    let group = "io.containerd.runc.v2.group=images";
    let options = ["--snapshotter", "blockfile", "--annotation", group];
    let _first = scene.start_sleeper(&options);
    for _ in 0..2 {
        let id = scene.start_sleeper(&options);
        let script = "grep ' / ' /proc/mounts; cat /written; echo there > /written";
        let said = scene.exec(&id, &[], &["sh", "-c", script]).exits(0);
        assert!(said.stdout.contains(" / ext4 rw"), "{said:#?}");
        assert!(!said.stdout.contains("there"), "of another: {said:#?}");
        scene
            .run_with(&options, &["true"])
            .exits(1)
            .complains(&["ext4", "raise root_disks in nacre.toml"]);
        scene.ctr(&["task", "rm", "-f", &id]).exits(0);
        is_written(&scene, &id);
    }
}

#[test]
fn directories_are_shared_both_ways() {
    let mut scene = Scene::new();
    let directory = "/tmp/e2e-shared";
    fs::create_dir_all(directory).unwrap();
    fs::write(format!("{directory}/from-host"), "host\n").unwrap();
    let mount = format!("type=bind,src={directory},dst=/mnt,options=rbind:rw");
    let id = scene.start_sleeper(&["--mount", &mount]);
    let script = "cat /mnt/from-host; echo guest > /mnt/from-guest";
    scene
        .exec(&id, &[], &["sh", "-c", script])
        .exits(0)
        .prints("host\n");
    let seen = fs::read_to_string(format!("{directory}/from-guest")).unwrap();
    assert_eq!(seen, "guest\n");
    // What the host changes later is seen, too.
    fs::write(format!("{directory}/later"), "later\n").unwrap();
    scene
        .exec(&id, &[], &["cat", "/mnt/later"])
        .exits(0)
        .prints("later\n");
    scene.ctr(&["task", "rm", "-f", &id]);
    fs::remove_dir_all(directory).unwrap();
}

#[test]
fn read_only_directory_stays_so() {
    let mut scene = Scene::new();
    let options = ["--mount", "type=bind,src=/etc,dst=/mnt,options=rbind:ro"];
    let write = "echo x > /mnt/hostname";
    scene
        .run_with(&options, &["sh", "-c", write])
        .exits(1)
        .complains(&["Read-only file system"]);
    // A guest that allows itself to write still cannot.
    let script = format!("mount -o remount,bind,rw /mnt && grep ' /mnt ' /proc/mounts; {write}");
    let said = scene.run_with(
        &[&options[..], &["--privileged"]].concat(),
        &["sh", "-c", &script],
    );
    assert!(said.stdout.contains(" rw,"), "{said:#?}");
    said.exits(1).complains(&["Read-only file system"]);
}

#[test]
fn files_are_mounted() {
    let mut scene = Scene::new();
    let (read, written) = ("/tmp/e2e-resolv.conf", "/tmp/e2e-file");
    fs::write(read, "nameserver 192.0.2.1\n").unwrap();
    fs::write(written, "before\n").unwrap();
    let resolv = format!("type=bind,src={read},dst=/etc/resolv.conf,options=rbind:ro");
    let file = format!("type=bind,src={written},dst=/file,options=rbind:rw");
    let script = "cat /etc/resolv.conf /file; echo after > /file";
    scene
        .run_with(
            &["--mount", &resolv, "--mount", &file],
            &["sh", "-c", script],
        )
        .exits(0)
        .prints("nameserver 192.0.2.1\nbefore\n");
    assert_eq!(fs::read_to_string(written).unwrap(), "after\n");
    fs::remove_file(read).unwrap();
    fs::remove_file(written).unwrap();
}

#[test]
fn tmpfs_and_shm_have_their_sizes() {
    let mut scene = Scene::new();
    let script = "df -k /scratch /dev/shm | awk 'NR > 1 { print $2, $6 }'; \
                  dd if=/dev/zero of=/scratch/x bs=1k count=2000 2>/dev/null; echo full $?";
    let mount = "type=tmpfs,dst=/scratch,options=size=1m";
    scene
        .run_with(&["--mount", mount], &["sh", "-c", script])
        .exits(0)
        .prints("1024 /scratch\n65536 /dev/shm\nfull 1\n");
}

#[test]
fn device_nodes_of_the_host_are_refused() {
    let mut scene = Scene::new();
    let mount = "type=bind,src=/dev/kvm,dst=/dev/kvm,options=rbind:rw";
    scene
        .run_with(&["--mount", mount], &["true"])
        .exits(1)
        .complains(&["/dev/kvm", "device"]);
}
