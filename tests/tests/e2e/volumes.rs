//! Volumes as the kubelet makes them: what is copied and kept in step, what is
//! memory of the guest, what is shared, between host and guest and between the
//! containers of a pod.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use nacre_tests::{PodDir, Scene, eventually, run};
use serde_json::{Value, json};

const GROUP: &str = "io.containerd.runc.v2.group";
/// Between an update and its arrival; what is promised is 2 s, on hardware.
const LAB_UPDATE_SECONDS: u64 = 20;

/// A bind mount of a spec.
fn bind(source: &Path, destination: &str, options: &[&str]) -> Value {
    let options = [&["rbind"][..], options].concat();
    json!({"destination": destination, "type": "bind", "source": source, "options": options})
}

/// `ctr run --mount`.
fn option(source: &Path, destination: &str, options: &str) -> String {
    let source = source.display();
    format!("type=bind,src={source},dst={destination},options={options}")
}

/// Starts a container with `mounts` that sleeps: a pod's first, or one that
/// joins `pod`.
fn start(scene: &mut Scene, pod: Option<&str>, mounts: &[Value]) -> String {
    scene.start_spec(|spec| {
        let path = spec["linux"]["cgroupsPath"].as_str().unwrap();
        let own_id = path.rsplit('/').next().unwrap().to_owned();
        spec["annotations"] = json!({GROUP: pod.unwrap_or(&own_id)});
        spec["process"]["args"] = json!(["sleep", "3600"]);
        spec["mounts"]
            .as_array_mut()
            .unwrap()
            .extend_from_slice(mounts);
    })
}

fn remove(scene: &Scene, ids: &[&str]) {
    for id in ids.iter().rev() {
        scene.ctr(&["task", "rm", "-f", id]).exits(0);
        scene.ctr(&["container", "rm", id]).exits(0);
    }
}

fn temporary(name: &str) -> PathBuf {
    let path = Path::new("/tmp").join(name);
    let _ = fs::remove_dir_all(&path);
    fs::create_dir(&path).unwrap();
    path
}

#[test]
fn config_maps_are_followed_without_a_file_server() {
    let mut scene = Scene::new();
    let mut pod = PodDir::new("config");
    let config = pod.volume("configmap", "config");
    pod.write(&config, &[("a", "1"), ("b", "1\n")]);
    let mount = option(&config, "/config", "rbind:rw");
    let id = scene.start_sleeper(&["--snapshotter", "erofs", "--mount", &mount]);
    let shell = |script: &str| scene.exec(&id, &[], &["sh", "-c", script]);

    shell("cat /config/a /config/b; ls -A /config; readlink /config/a")
        .exits(0)
        .prints("11\n..1\n..data\na\nb\n..data/a\n");
    shell("echo x > /config/a")
        .exits(1)
        .complains(&["Read-only file system"]);
    let said = shell("cat /proc/mounts").exits(0);
    assert!(!said.stdout.contains("virtiofs"), "{said:#?}");
    let processes = run("ps", &["-e", "-o", "args"]).stdout;
    assert!(!processes.contains("virtiofsd"), "{processes}");

    let wait = "until [ \"$(cat /config/a)\" = 2 ]; do sleep 0.1; done; cat /config/b";
    let waiting = scene.exec_command(&id, &[], &["sh", "-c", wait]);
    let waiting = std::thread::spawn(|| nacre_tests::run_with_input(waiting, Vec::new()));
    let written = Instant::now();
    pod.write(&config, &[("a", "2"), ("b", "2\n")]);
    waiting.join().unwrap().exits(0).prints("2\n");
    let seconds = written.elapsed().as_secs();
    eprintln!("a ConfigMap's update took {:?}", written.elapsed());
    assert!(seconds < LAB_UPDATE_SECONDS, "{seconds} s");
    remove(&scene, &[&id]);
}

#[test]
fn termination_log_comes_back_before_the_exit() {
    let mut scene = Scene::new();
    let pod = PodDir::new("log");
    let log = pod.termination_log();
    let mount = option(&log, "/dev/termination-log", "rbind:rw");
    let script = "grep /dev/termination-log /proc/mounts; echo why > /dev/termination-log; exit 3";
    let options = ["--snapshotter", "erofs", "--mount", &mount];
    let said = scene.run_with(&options, &["sh", "-c", script]).exits(3);
    assert!(said.stdout.contains("tmpfs"), "{said:#?}");
    assert_eq!(fs::read_to_string(log).unwrap(), "why\n");
}

/// Perl of the host, on a share of its /usr.
const PERL: &str = "/run/usr/lib64/ld-linux-x86-64.so.2 \
    --library-path /run/usr/lib/x86_64-linux-gnu /run/usr/bin/perl \
    -I/run/usr/lib/x86_64-linux-gnu/perl-base -MIO::Socket::UNIX";

/// One container listens on a unix socket in `directory`, the other talks to it.
fn talk(scene: &Scene, listener: &str, talker: &str, directory: &str) {
    let listen = format!(
        "exec {PERL} -e '$s = IO::Socket::UNIX->new(Local => \"{directory}/.socket\", Listen => 1) \
         or die \"listen: $!\"; rename \"{directory}/.socket\", \"{directory}/socket\"; \
         $c = $s->accept; print <$c>'"
    );
    let listening = scene.exec_command(listener, &[], &["sh", "-c", &listen]);
    let listening = std::thread::spawn(|| nacre_tests::run_with_input(listening, Vec::new()));
    let talk = format!(
        "until [ -S {directory}/socket ]; do sleep 0.1; done; \
         exec {PERL} -e '$c = IO::Socket::UNIX->new(\"{directory}/socket\") \
         or die \"connect: $!\"; print $c \"through\\n\"'"
    );
    scene.exec(talker, &[], &["sh", "-c", &talk]).exits(0);
    listening.join().unwrap().exits(0).prints("through\n");
}

#[test]
fn memory_is_one_for_the_pod_and_limited() {
    let mut scene = Scene::new();
    let mut pod = PodDir::new("memory");
    let memory = pod.memory("memory", "size=1m,mode=1777");
    fs::create_dir(memory.join("part")).unwrap();
    let part = pod.subpath(&memory.join("part"), "memory");
    let mounts = [
        bind(&memory, "/run/memory", &["rw"]),
        bind(&part, "/run/part", &["rw"]),
        bind(Path::new("/usr"), "/run/usr", &["ro"]),
    ];
    let first = start(&mut scene, None, &mounts);
    let second = start(&mut scene, Some(&first), &mounts);

    let shell = |id: &str, script: &str| scene.exec(id, &[], &["sh", "-c", script]);
    let script = "grep ' /run/memory ' /proc/mounts | cut -d ' ' -f 3; \
        df -k /run/memory | awk 'NR > 1 { print $2 }'; \
        dd if=/dev/zero of=/run/memory/x bs=1k count=2000 2>/dev/null; echo full $?; \
        rm /run/memory/x; echo part > /run/part/file";
    shell(&first, script)
        .exits(0)
        .prints("tmpfs\n1024\nfull 1\n");
    shell(
        &second,
        "cat /run/memory/part/file; mkfifo /run/memory/pipe",
    )
    .exits(0)
    .prints("part\n");
    let reading = scene.exec_command(&first, &[], &["cat", "/run/memory/pipe"]);
    let reading = std::thread::spawn(|| nacre_tests::run_with_input(reading, Vec::new()));
    shell(&second, "echo through > /run/memory/pipe").exits(0);
    reading.join().unwrap().exits(0).prints("through\n");
    talk(&scene, &first, &second, "/run/memory");
    assert_eq!(
        fs::read_dir(&memory).unwrap().count(),
        1,
        "the host's is not used"
    );
    remove(&scene, &[&first, &second]);
}

#[test]
fn dev_shm_is_one_for_the_pod() {
    let mut scene = Scene::new();
    let mut pod = PodDir::new("shm");
    let shm = pod.shm("size=2m,mode=1777");
    let start = |scene: &mut Scene, pod: Option<&str>| {
        let mount = bind(&shm, "/dev/shm", &["nosuid", "noexec", "nodev"]);
        scene.start_spec(|spec| {
            let path = spec["linux"]["cgroupsPath"].as_str().unwrap();
            let own_id = path.rsplit('/').next().unwrap().to_owned();
            spec["annotations"] = json!({GROUP: pod.unwrap_or(&own_id)});
            spec["process"]["args"] = json!(["sleep", "3600"]);
            let mounts = spec["mounts"].as_array_mut().unwrap();
            mounts.retain(|mount| mount["destination"] != "/dev/shm");
            mounts.push(mount);
        })
    };
    let first = start(&mut scene, None);
    let second = start(&mut scene, Some(&first));
    let script = "echo seen > /dev/shm/file; stat -c %a /dev/shm; \
        df -k /dev/shm | awk 'NR > 1 { print $2 }'; grep ' /dev/shm ' /proc/mounts";
    let said = scene.exec(&first, &[], &["sh", "-c", script]).exits(0);
    assert!(said.stdout.starts_with("1777\n2048\ntmpfs "), "{said:#?}");
    assert!(said.stdout.contains("noexec"), "{said:#?}");
    scene
        .exec(&second, &[], &["cat", "/dev/shm/file"])
        .exits(0)
        .prints("seen\n");
    remove(&scene, &[&first, &second]);
}

/// Sockets and locks in a directory of the disk.
#[test]
fn a_shared_directory_is_one_file_system_for_the_pod() {
    let mut scene = Scene::new();
    let pod = PodDir::new("disk");
    let disk = pod.volume("empty-dir", "disk");
    let mounts = [
        bind(&disk, "/run/disk", &["rw"]),
        bind(Path::new("/usr"), "/run/usr", &["ro"]),
    ];
    let first = start(&mut scene, None, &mounts);
    let second = start(&mut scene, Some(&first), &mounts);
    talk(&scene, &first, &second, "/run/disk");
    let shell = |id: &str, script: &str| scene.exec(id, &[], &["sh", "-c", script]);
    // The host's, which busybox has not.
    let flock = "/run/usr/lib64/ld-linux-x86-64.so.2 \
                 --library-path /run/usr/lib/x86_64-linux-gnu /run/usr/bin/flock";
    let hold =
        format!("echo > /run/disk/lock; {flock} /run/disk/lock sh -c 'echo > /run/disk/held; cat'");
    let mut holding = scene
        .exec_command(&first, &[], &["sh", "-c", &hold])
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    eventually("the lock is held", || disk.join("held").exists());
    let take = format!("{flock} -n /run/disk/lock true");
    shell(&second, &take).exits(1);
    drop(holding.stdin.take());
    assert!(holding.wait().unwrap().success());
    shell(&second, &take).exits(0);
    remove(&scene, &[&first, &second]);
}

#[test]
fn later_mounts_of_the_host_arrive_if_asked_for() {
    let mut scene = Scene::new();
    let host = temporary("e2e-propagation");
    let text = host.to_str().unwrap();
    run("mount", &["-t", "tmpfs", "tmpfs", text]).exits(0);
    run("mount", &["--make-shared", text]).exits(0);
    fs::create_dir(host.join("later")).unwrap();
    let mounts = [
        bind(&host, "/run/slave", &["rslave"]),
        bind(&host, "/run/private", &["rprivate"]),
    ];
    let id = start(&mut scene, None, &mounts);
    let list = ["ls", "/run/slave/later", "/run/private/later"];
    let empty = "/run/private/later:\n\n/run/slave/later:\n";
    scene.exec(&id, &[], &list).exits(0).prints(empty);

    let later = host.join("later");
    run("mount", &["-t", "tmpfs", "tmpfs", later.to_str().unwrap()]).exits(0);
    fs::write(later.join("file"), "").unwrap();
    let seen = "/run/private/later:\n\n/run/slave/later:\nfile\n";
    eventually("the mount arrives", || {
        scene.exec(&id, &[], &list).exits(0).stdout == seen
    });
    // The file server has it open, as any process may.
    run("umount", &["-l", later.to_str().unwrap()]).exits(0);
    eventually("and goes", || {
        scene.exec(&id, &[], &list).exits(0).stdout == empty
    });
    remove(&scene, &[&id]);
    run("umount", &[text]).exits(0);
    fs::remove_dir(host).unwrap();
}

#[test]
fn read_only_is_recursive() {
    let mut scene = Scene::new();
    let host = temporary("e2e-rro");
    let inner = host.join("inner");
    fs::create_dir(&inner).unwrap();
    run("mount", &["-t", "tmpfs", "tmpfs", inner.to_str().unwrap()]).exits(0);
    for read_only in ["ro", "rro"] {
        let mount = option(&host, "/mnt", &format!("rbind:{read_only}"));
        let script = "mount -o remount,bind,rw /mnt; mount -o remount,bind,rw /mnt/inner; \
            echo > /mnt/x; echo > /mnt/inner/x";
        let said = scene.run_with(&["--mount", &mount, "--privileged"], &["sh", "-c", script]);
        let refused = said.stderr.matches("Read-only file system").count();
        assert_eq!((said.code, refused), (Some(1), 2), "{said:#?}");
    }
    let mount = option(&host, "/mnt", "rbind:rshared");
    scene
        .run_with(&["--mount", &mount], &["true"])
        .exits(1)
        .complains(&["/mnt", "Bidirectional"]);
    run("umount", &[inner.to_str().unwrap()]).exits(0);
    fs::remove_dir_all(host).unwrap();
}

/// What `-info` says of mount options: each is understood, else it would be taken
/// for the file system's own, and tmpfs would refuse it.
#[test]
fn advertised_mount_options_are_understood() {
    let mut scene = Scene::new();
    let info = run("containerd-shim-nacre-v2", &["-info"]).exits(0).stdout;
    let features = &info[info.find("{\"").unwrap()..];
    let mut documents = serde_json::Deserializer::from_str(features).into_iter::<Value>();
    let features = documents.next().unwrap().unwrap();
    let options: Vec<String> = serde_json::from_value(features["mountOptions"].clone()).unwrap();
    assert!(options.len() > 20 && options.contains(&"rro".to_owned()));
    let said = scene.run_spec(|spec| {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        for option in &options {
            let kind = if option.ends_with("bind") {
                "bind"
            } else {
                "tmpfs"
            };
            let source = if kind == "bind" { "/usr" } else { "tmpfs" };
            mounts.push(
                json!({"destination": format!("/run/{option}"), "type": kind,
                "source": source, "options": [option]}),
            );
        }
        spec["process"]["args"] = json!([
            "sh",
            "-c",
            "grep -c ' /run/' /proc/mounts; \
            echo > /run/ro/x || echo > /run/rro/x || echo > /run/nosuid/x"
        ]);
    });
    said.exits(0)
        .prints(&format!("{}\n", options.len()))
        .complains(&["/run/ro/x", "/run/rro/x"]);
}
