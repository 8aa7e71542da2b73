//! Security contexts.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;

use nacre_tests::cri::messages::{Capability, NamespaceMode, ProfileType, SecurityProfile};
use nacre_tests::pods::{HANDLER, Pod, PodScene, SANDBOXED, WITH_FEATURES};

use crate::SLEEP;
use crate::volumes::Mounted;

in_both_modes![
    sysctls,
    users_of_the_pod_s_own,
    pids_and_ipc_of_the_host_are_refused
];

const CAP_CHOWN: u64 = 1 << 0;
const CAP_NET_RAW: u64 = 1 << 13;
const CAP_SYS_ADMIN: u64 = 1 << 21;

/// A hexadecimal word of /proc/self/status.
fn mask(status: &str, name: &str) -> u64 {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .unwrap();
    u64::from_str_radix(line.trim_start_matches(':').trim(), 16).unwrap()
}

#[test]
fn users_groups_capabilities_and_protections() {
    let scene = PodScene::new();
    users_and_protections_in(&scene.pod("secured").run());
}

/// What a container without a word on it has, one with all of them, and one with what is
/// protected.
pub fn users_and_protections_in(pod: &Pod) {
    let status = &["cat", "/proc/self/status"];

    let plain = pod.container("plain", status).run().exits(0).stdout;
    assert_ne!(mask(&plain, "CapEff") & CAP_CHOWN, 0);
    assert_eq!(mask(&plain, "CapEff") & CAP_SYS_ADMIN, 0);
    assert_eq!(
        (mask(&plain, "NoNewPrivs"), mask(&plain, "Seccomp")),
        (0, 0)
    );

    let tight = pod
        .container("tight", status)
        .run_as(1000, 1000)
        .security(|security| {
            security.supplemental_groups = vec![5, 6];
            security.no_new_privs = true;
            security.seccomp = Some(SecurityProfile {
                profile_type: ProfileType::RuntimeDefault.into(),
                ..Default::default()
            });
            security.capabilities = Some(Capability {
                add_capabilities: vec!["SYS_ADMIN".into()],
                drop_capabilities: vec!["ALL".into()],
            });
        })
        .run()
        .exits(0)
        .stdout;
    assert!(tight.contains("Uid:\t1000\t1000\t1000\t1000"), "{tight}");
    assert!(tight.contains("Gid:\t1000\t1000\t1000\t1000"), "{tight}");
    let groups = tight
        .lines()
        .find_map(|line| line.strip_prefix("Groups:\t"));
    let mut groups: Vec<_> = groups.unwrap().split_whitespace().collect();
    groups.retain(|group| *group != "1000");
    assert_eq!(groups, ["5", "6", "50"], "those asked for and the image's");
    assert_eq!(mask(&tight, "CapBnd"), CAP_SYS_ADMIN);
    assert_eq!(
        (mask(&tight, "NoNewPrivs"), mask(&tight, "Seccomp")),
        (1, 2)
    );

    let protected = pod
        .container("protected", SLEEP)
        .security(|security| {
            security.readonly_rootfs = true;
            security.masked_paths = vec!["/proc/version".into(), "/sys/kernel".into()];
            security.readonly_paths = vec!["/proc/sys".into()];
            let drop_capabilities = vec!["NET_RAW".into()];
            security.capabilities = Some(Capability {
                drop_capabilities,
                ..Default::default()
            });
        })
        .start();
    protected
        .sh("touch /file")
        .exits(1)
        .complains(&["Read-only"]);
    protected
        .sh("echo 1 > /proc/sys/net/ipv4/ip_forward")
        .exits(1)
        .complains(&["Read-only"]);
    protected
        .sh("wc -c < /proc/version; ls /sys/kernel | wc -l")
        .prints("0\n0\n");
    let status = protected.exec(status).exits(0).stdout;
    assert_eq!(
        mask(&status, "CapEff") & CAP_NET_RAW,
        0,
        "execs have the container's"
    );
}

/// A profile of the node's own, with an error that nothing else makes of it
/// (EADDRNOTAVAIL).
const NO_DIRECTORIES: &str = r#"{
    "defaultAction": "SCMP_ACT_ALLOW",
    "architectures": ["SCMP_ARCH_X86_64"],
    "syscalls": [
        {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 99}
    ]
}"#;

/// kubelet reads it before it makes a pod with `hostUsers: false` or a recursive read-only
/// mount: containerd asks only runtimes of type `io.containerd.runc.v2` what they can. When
/// the first part fails, docs/kubernetes.md may promise more.
#[test]
fn kubelet_is_told_what_the_runtime_can_if_it_is_of_runc_s_type() {
    let scene = PodScene::new();
    let features = |handler| scene.cri().features(handler).unwrap();
    for handler in [HANDLER, SANDBOXED] {
        assert_eq!(features(handler), Default::default(), "{handler}");
    }
    let told = features(WITH_FEATURES);
    assert!(
        told.recursive_read_only_mounts && told.user_namespaces,
        "{told:?}"
    );

    let volume = scene.directory("volume");
    let _below = Mounted::new(volume.join("below"));
    let pod = scene.pod("told").runtime(WITH_FEATURES);
    let pod = pod.own_users(1_000_000).run();
    let container = pod
        .container("root", SLEEP)
        .mount_with(&volume, "/volume", |mount| {
            mount.readonly = true;
            mount.recursive_read_only = true;
        })
        .start();
    container
        .sh("id -u; tr -s ' ' < /proc/self/uid_map")
        .prints("0\n 0 1000000 65536\n");
    container
        .sh("touch /volume/below/file")
        .exits(1)
        .complains(&["Read-only"]);
}

/// Profiles refuse what they are there to refuse.
#[test]
fn seccomp_profiles_and_privileged_containers() {
    let scene = PodScene::new();
    let pod = scene.pod("privileged").privileged().run();
    profiles_and_privileges_in(&scene, &pod);
}

/// The same of a pod that may have privileged containers.
pub fn profiles_and_privileges_in(scene: &PodScene, pod: &Pod) {
    let profile = |kind: ProfileType| {
        Some(SecurityProfile {
            profile_type: kind.into(),
            ..Default::default()
        })
    };
    // Anyone may make a user namespace, unless the profile says no.
    let unshare = &["unshare", "-U", "true"];
    let unconfined = pod
        .container("unconfined", unshare)
        .security(|security| security.seccomp = profile(ProfileType::Unconfined))
        .run();
    unconfined.exits(0);
    let confined = pod
        .container("confined", unshare)
        .security(|security| security.seccomp = profile(ProfileType::RuntimeDefault))
        .run();
    confined.exits(1).complains(&["Operation not permitted"]);

    let local = scene.directory("seccomp").join("no-directories.json");
    fs::write(&local, NO_DIRECTORIES).unwrap();
    let localhost = |path: &Path| {
        let localhost_ref = path.display().to_string();
        pod.container("local", &["mkdir", "/made"])
            .security(|security| {
                security.seccomp = Some(SecurityProfile {
                    profile_type: ProfileType::Localhost.into(),
                    localhost_ref,
                });
            })
    };
    let refused = localhost(&local).run();
    refused
        .exits(1)
        .complains(&["Cannot assign requested address"]);
    let missing = local.with_extension("missing");
    let refused = localhost(&missing).attempt(1).try_start().err().unwrap();
    let path = missing.display().to_string();
    assert!(refused.message().contains(&path), "{refused}");

    let script = "mount -t tmpfs none /mnt && echo mounted; echo 1 > /proc/sys/net/ipv4/ip_forward \
                  && cat /proc/sys/net/ipv4/ip_forward; ls /dev/fuse 2>/dev/null || echo no fuse; \
                  grep CapEff /proc/self/status";
    let said = pod
        .container("all", &["sh", "-c", &format!("mkdir -p /mnt; {script}")])
        .security(|security| security.privileged = true)
        .run()
        .exits(0);
    // No device of the host's, as containerd lists none (`devices.rs` has the other case).
    let start = "mounted\n1\nno fuse\n";
    assert!(said.stdout.starts_with(start), "{said:#?}");
    assert_ne!(mask(&said.stdout, "CapEff") & CAP_SYS_ADMIN, 0);
}

/// Kernel parameters are the pod's, so all of its containers see them.
fn sysctls(scene: &PodScene) {
    let pod = scene
        .pod("tuned")
        .sysctl("net.core.somaxconn", "517")
        .sysctl("kernel.shm_rmid_forced", "1")
        .run();
    let read = &[
        "cat",
        "/proc/sys/net/core/somaxconn",
        "/proc/sys/kernel/shm_rmid_forced",
    ];
    for name in ["one", "two"] {
        pod.container(name, read).run().exits(0).prints("517\n1\n");
    }
}

/// What a virtual machine cannot do is refused, by the name it has in a manifest.
fn pids_and_ipc_of_the_host_are_refused(scene: &PodScene) {
    let node: i32 = NamespaceMode::Node.into();
    let pod = || scene.pod("greedy");
    let pids = pod().namespaces(|options| options.pid = node);
    scene.refuses(pids, &["hostPID"]);
    let ipc = pod().namespaces(|options| options.ipc = node);
    scene.refuses(ipc, &["hostIPC"]);
}

/// Not with `sandboxer = "shim"`: containerd 2.1 itself dies of a pod that asks for the
/// host's network then, before it calls the shim.
#[test]
fn the_host_s_network_is_refused() {
    let scene = PodScene::new();
    let node: i32 = NamespaceMode::Node.into();
    let network = scene
        .pod("greedy")
        .namespaces(|options| options.network = node);
    scene.refuses(network, &["hostNetwork"]);
}

/// `hostUsers: false`: root in the container is nobody in its machine, and owns what
/// the host's root owns of its volumes.
fn users_of_the_pod_s_own(scene: &PodScene) {
    let volume = scene.directory("volume");
    fs::write(volume.join("theirs"), "x").unwrap();
    chown(volume.join("theirs"), Some(33), Some(44)).unwrap();
    let pod = scene.pod("mapped").own_users(1_000_000).run();
    let container = pod
        .container("root", SLEEP)
        .mount(&volume, "/volume")
        .start();
    container
        .sh("id -u; tr -s ' ' < /proc/self/uid_map; stat -c '%u %g' /bin /volume/theirs")
        .prints("0\n 0 1000000 65536\n0 0\n33 44\n");
    container
        .sh("touch /file /volume/new && chown 5:6 /volume/new && stat -c %u /file")
        .prints("0\n");
    let new = fs::metadata(volume.join("new")).unwrap();
    assert_eq!((new.uid(), new.gid()), (5, 6));
    // The guest's kernel is out of reach of who is root in it by name only.
    container
        .sh("echo 1 > /proc/sysrq-trigger")
        .exits(1)
        .complains(&["Permission denied"]);
    let user = pod
        .container("user", &["id", "-u"])
        .run_as(1000, 1000)
        .run();
    user.exits(0).prints("1000\n");
}

/// What users of a pod's own have no rights to, as the network is the machine's: what
/// takes rights elsewhere is everyone's there, and the rest is nobody's.
#[test]
fn network_of_a_pod_with_users_of_its_own() {
    let scene = PodScene::new();
    let pod = scene.pod("mapped-net").own_users(1_000_000).run();
    let container = pod.container("root", SLEEP);
    let container = container
        .mount_read_only(Path::new("/usr"), "/host")
        .start();
    container
        .sh("echo served > /page && httpd -p 80 -h / && wget -q -O - http://127.0.0.1/page")
        .prints("served\n");
    // busybox's own takes rights.
    container
        .sh(
            "lib=/host/lib/x86_64-linux-gnu; $lib/ld-linux-x86-64.so.2 --library-path $lib \
             /host/bin/ping -c 1 -w 20 127.0.0.1 > /dev/null && echo answered",
        )
        .prints("answered\n");
    let admin = pod
        .container("admin", SLEEP)
        .security(|security| {
            security.capabilities = Some(Capability {
                add_capabilities: vec!["NET_ADMIN".into()],
                ..Default::default()
            });
        })
        .start();
    admin
        .sh("ip link set lo down 2> /dev/null || echo refused")
        .prints("refused\n");
}
