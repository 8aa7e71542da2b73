//! What cannot work is a clear error in the client and leaves nothing behind.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nacre_tests::{
    BUSYBOX, CONFIG, Changed, Said, Scene, five_seconds, process_of, returned, run, spawn,
};
use serde_json::json;

use crate::boot::initramfs;
use crate::ends::Log;

#[test]
fn guest_that_panics_at_boot() {
    let directory = PathBuf::from("/tmp/e2e-panics");
    let initrd = initramfs(&directory, "exit 3");
    let _config = Changed::new("initrd", &format!("{:?}", initrd.to_str().unwrap()));
    let mut scene = Scene::new();
    scene
        .run(&["true"])
        .exits(1)
        .complains(&["the guest kernel panicked"]);
    fs::remove_dir_all(&directory).unwrap();
}

/// It is waited for as long as configured, and no longer. Its kernel says where it was.
#[test]
fn guest_whose_agent_does_not_come() {
    // Its kernel is up by then, on a busy machine, too.
    const SECONDS: u64 = 10;
    let directory = PathBuf::from("/tmp/e2e-silent");
    let initrd = initramfs(&directory, "sleep 3600");
    let _initrd = Changed::new("initrd", &format!("{:?}", initrd.to_str().unwrap()));
    let _timeout = Changed::new("boot_timeout_seconds", &SECONDS.to_string());
    let mut scene = Scene::new();
    let (id, command) = scene.command(BUSYBOX, &["--rm"], &["true"]);
    let begin = Instant::now();
    let client = spawn(command);
    process_of(&id, "monitor");
    let mut log = Log::follow(&id);
    let said = returned(client).exits(1);
    let took = begin.elapsed();
    let complaint = format!("the guest's agent did not answer within {SECONDS} s of the start");
    said.complains(&[&complaint]);
    let timeout = Duration::from_secs(SECONDS);
    let limit = timeout + five_seconds();
    println!("given up after {took:.1?}, at most {limit:.1?}");
    assert!(timeout < took && took < limit, "{took:?} of {limit:?}");
    let log = log.whole();
    assert!(log.contains("NMI IOCK error: Not continuing"), "{log}");
    fs::remove_dir_all(&directory).unwrap();
}

/// There need not be such a device.
#[test]
fn annotations_that_ask_for_devices_are_refused_by_default() {
    let mut scene = Scene::new();
    for key in ["io.nacre.devices", "cdi.k8s.io/vendor"] {
        scene
            .run_spec(|spec| spec["annotations"] = json!({key: "0000:01:00.0"}))
            .exits(1)
            .complains(&[key, "device_annotations"]);
    }
}

#[test]
fn missing_files() {
    for key in ["kernel", "initrd", "virtiofsd"] {
        let path = format!("/none/{key}");
        let _config = Changed::new(key, &format!("{path:?}"));
        let mut scene = Scene::new();
        scene
            .run(&["true"])
            .exits(1)
            .complains(&[&path, "No such file"]);
    }
}

#[test]
fn kernel_file_that_is_none() {
    let _config = Changed::new("kernel", "\"/etc/passwd\"");
    let mut scene = Scene::new();
    scene.run(&["true"]).exits(1).complains(&["kernel"]);
}

/// As installed by hand: what there is without a configuration is in the program.
#[test]
fn no_configuration_at_all() {
    let _config = Changed::removed();
    let mut scene = Scene::new();
    scene.run(&["echo", "hi"]).exits(0).prints("hi\n");
}

/// One line says where it is, and what is allowed.
#[test]
fn bad_configuration_value() {
    for (line, complaint) in [
        (
            "default_vcpus = \"many\"",
            "default_vcpus: a string is not a whole number; allowed: 1 to 32",
        ),
        (
            "default_vcpus = 0",
            "default_vcpus: 0 is out of range; allowed: 1 to 32",
        ),
        ("vcpus = 1", "vcpus: no such key; allowed: kernel, "),
    ] {
        let _config = Changed::by(|text| {
            let rest = text
                .lines()
                .filter(|line| !line.starts_with("default_vcpus"));
            let lines = ["# A comment.", line].into_iter().chain(rest);
            lines.collect::<Vec<_>>().join("\n")
        });
        let mut scene = Scene::new();
        let said = scene.run(&["true"]).exits(1);
        said.complains(&[&format!("{CONFIG}:2: {complaint}")]);
    }
}

#[test]
fn missing_kvm() {
    fs::rename("/dev/kvm", "/dev/kvm.away").unwrap();
    let mut scene = Scene::new();
    let said = scene.run(&["true"]);
    let checked = run("nacre", &["check"]);
    // There, but of no use.
    std::os::unix::fs::symlink("/dev/null", "/dev/kvm").unwrap();
    let useless = run("nacre", &["check"]);
    fs::rename("/dev/kvm.away", "/dev/kvm").unwrap();
    said.exits(1).complains(&["/dev/kvm", "No such file"]);
    for check in [checked, useless] {
        let check = check.exits(1);
        let missing = |line: &str| line.starts_with("missing") && line.contains("/dev/kvm");
        assert!(check.stdout.lines().any(missing), "{check:#?}");
    }
}

#[test]
fn network_of_the_host() {
    let mut scene = Scene::new();
    for host in [
        ["--net-host"].as_slice(),
        &["--with-ns", "network:/proc/1/ns/net"],
    ] {
        scene
            .run_with(host, &["true"])
            .exits(1)
            .complains(&["host's network"]);
    }
}

#[test]
fn unknown_mount_type() {
    let mut scene = Scene::new();
    let said = scene.run_spec(|spec| {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/odd", "type": "oddfs", "source": "odd"}));
    });
    said.exits(1).complains(&["oddfs", "/odd"]);
}

#[test]
fn missing_bind_source() {
    let mut scene = Scene::new();
    let mount = "type=bind,src=/none/there,dst=/mnt,options=rbind:ro";
    scene
        .run_with(&["--mount", mount], &["true"])
        .exits(1)
        .complains(&["/none/there", "No such file"]);
}

/// `nacre check` where `change`, a line of shell, was done in a mount namespace
/// of its own.
fn check_after(change: &str) -> Said {
    let script = format!("{change} && /usr/local/bin/nacre check");
    run("unshare", &["--mount", "sh", "-c", &script])
}

#[test]
fn check_finds_a_fit_host_fit() {
    let said = check_after("true").exits(0);
    assert!(said.stdout.contains("a small VM ran"), "{said:#?}");
    let rows: Vec<&str> = said.stdout.lines().collect();
    assert_eq!(rows.len(), 12, "{said:#?}");
    assert!(rows.iter().all(|row| row.starts_with("ok ")), "{said:#?}");
}

#[test]
fn check_names_what_is_missing_and_how_to_get_it() {
    // There, but it cannot be opened.
    let barred =
        |node: &str| format!("mount --bind {node} {node} && mount -o remount,bind,nodev {node}");
    let over = |file: &str| format!("mount --bind /etc/passwd {file}");
    let by_path_and_shim = "printf \"[runtimes.y]\\nsandboxer = 'shim'\\n\
        runtime_path = '/usr/local/bin/containerd-shim-nacre-v2'\\n\" > /tmp/config.toml && \
        mount --bind /tmp/config.toml /etc/containerd/config.toml";
    let (required, optional) = (("missing", 1), ("optional", 0));
    for (change, (word, code), row, hint) in [
        (&*over("/proc/cpuinfo"), required, "processor", "firmware"),
        (
            &barred("/dev/kvm"),
            required,
            "/dev/kvm",
            "modprobe kvm_amd",
        ),
        (
            &barred("/dev/net/tun"),
            required,
            "/dev/net/tun",
            "modprobe tun",
        ),
        (
            &barred("/dev/vhost-net"),
            optional,
            "/dev/vhost-net",
            "modprobe vhost_net",
        ),
        (
            "mount -t tmpfs none /sys/fs/cgroup",
            required,
            "cgroup v2",
            "unified_cgroup_hierarchy",
        ),
        (&over(CONFIG), required, "configuration", "correct"),
        (
            &over("/usr/local/share/nacre/vmlinux"),
            required,
            "kernel",
            "make install",
        ),
        (
            &over("/usr/local/share/nacre/initrd.img"),
            required,
            "initrd",
            "make install",
        ),
        (
            &over("/usr/libexec/virtiofsd"),
            required,
            "virtiofsd",
            "apt install virtiofsd",
        ),
        ("PATH=/usr/bin:/bin", required, "shim", "make install"),
        (
            "mount -t tmpfs none /etc/containerd",
            optional,
            "containerd",
            "Kubernetes needs it",
        ),
        (by_path_and_shim, required, "containerd", "have no VM"),
    ] {
        let said = check_after(change).exits(code);
        let start = format!("{word:<9} {row:<14} ");
        let line = said.stdout.lines().find(|line| line.starts_with(&start));
        assert!(
            line.is_some_and(|line| line.contains(hint)),
            "{row}: {said:#?}"
        );
    }
}
