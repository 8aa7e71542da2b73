use super::*;

use serde_json::{Value, json};

fn translate(spec: Value) -> Value {
    let spec: Spec = serde_json::from_value(spec).unwrap();
    serde_json::to_value(guest_spec(&spec, "c1", Vec::new())).unwrap()
}

#[test]
fn host_objects_are_taken_out() {
    let guest = translate(json!({
        "ociVersion": "1.1.0",
        "root": {"path": "/var/lib/x/rootfs", "readonly": true},
        "process": {
            "cwd": "/", "args": ["sh"], "user": {"uid": 0, "gid": 0},
            "apparmorProfile": "cri-containerd.apparmor.d", "selinuxLabel": "a:b:c:s0",
            "oomScoreAdj": -997,
        },
        "hooks": {"createRuntime": [{"path": "/usr/bin/nerdctl"}]},
        "linux": {
            "cgroupsPath": "/k8s.io/c1",
            "mountLabel": "a:b:c:s0",
            "namespaces": [
                {"type": "pid"},
                {"type": "network", "path": "/proc/7/ns/net"},
                {"type": "ipc", "path": "/proc/7/ns/ipc"},
                {"type": "cgroup"},
            ],
            "devices": [
                {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229},
                {"path": "/dev/vfio/12", "type": "c", "major": 240, "minor": 0},
                {"path": "/dev/vfio/devices/vfio0", "type": "c", "major": 511, "minor": 0},
                {"path": "/dev/iommu", "type": "c", "major": 10, "minor": 125},
            ],
        },
    }));

    assert_eq!(
        guest["root"],
        json!({"path": "/run/nacre/containers/c1/rootfs", "readonly": true})
    );
    assert_eq!(guest.get("hooks"), None);
    assert_eq!(guest["process"].get("apparmorProfile"), None);
    assert_eq!(guest["process"].get("selinuxLabel"), None);
    assert_eq!(guest["process"]["oomScoreAdj"], -997);
    assert_eq!(guest["linux"]["cgroupsPath"], "/c1");
    assert_eq!(guest["linux"].get("mountLabel"), None);
    assert_eq!(
        guest["linux"]["namespaces"],
        json!([
            {"type": "pid"}, {"type": "ipc"}, {"type": "cgroup"},
            {"type": "mount"}, {"type": "uts"},
        ])
    );
    let devices = guest["linux"]["devices"].as_array().unwrap();
    assert_eq!(devices.len(), 1);
    assert_eq!(devices[0]["path"], "/dev/fuse");
}

#[test]
fn a_pod_s_namespaces_are_the_machine_s_and_the_agent_s() {
    let in_pod = |pid: Value| {
        let guest = translate(json!({
            "ociVersion": "1.1.0",
            "annotations": {
                "io.kubernetes.cri.container-type": "container",
                "io.kubernetes.cri.sandbox-id": "pod",
            },
            "linux": {"namespaces": [
                pid,
                {"type": "ipc", "path": "/proc/7/ns/ipc"},
                {"type": "uts", "path": "/proc/7/ns/uts"},
                {"type": "mount"},
                {"type": "network", "path": "/proc/7/ns/net"},
            ]},
        }));
        guest["linux"]["namespaces"].clone()
    };

    assert_eq!(
        in_pod(json!({"type": "pid"})),
        json!([{"type": "pid"}, {"type": "mount"}])
    );
    assert_eq!(
        in_pod(json!({"type": "pid", "path": "/proc/7/ns/pid"})),
        json!([{"type": "pid", "path": "/run/nacre/pod/pid"}, {"type": "mount"}])
    );
}

#[test]
fn what_describes_the_container_passes_through() {
    let resources = json!({
        "devices": [{"allow": false, "access": "rwm"}],
        "memory": {"limit": 67108864},
        "cpu": {"quota": 50000, "period": 100000},
    });
    let mut asked = resources.clone();
    asked["cpu"]["cpus"] = json!("6-7");
    asked["cpu"]["mems"] = json!("1");
    let seccomp = json!({"defaultAction": "SCMP_ACT_ERRNO"});
    let guest = translate(json!({
        "ociVersion": "1.1.0",
        "hostname": "web",
        "annotations": {"a": "b"},
        "linux": {"resources": asked, "seccomp": seccomp, "maskedPaths": ["/proc/kcore"]},
    }));

    assert_eq!(guest["linux"]["resources"]["memory"], resources["memory"]);
    assert_eq!(guest["linux"]["resources"]["cpu"], resources["cpu"]);
    assert_eq!(guest["linux"]["resources"]["devices"][0]["access"], "rwm");
    assert_eq!(guest["linux"]["seccomp"]["defaultAction"], "SCMP_ACT_ERRNO");
    assert_eq!(guest["linux"]["maskedPaths"], json!(["/proc/kcore"]));
    assert_eq!(guest["hostname"], "web");
    assert_eq!(guest["annotations"]["a"], "b");
}

proptest::proptest! {
    /// Whatever namespaces are asked for, each type is there once, without a
    /// path, and never the network's.
    #[test]
    fn namespaces_are_new_and_unique(
        asked in proptest::collection::vec((0usize..8, proptest::option::of("/[a-z]{1,8}")), 0..16)
    ) {
        use LinuxNamespaceType::{Cgroup, Ipc, Mount, Network, Pid, Time, User, Uts};
        let kinds = [Cgroup, Ipc, Mount, Network, Pid, Time, User, Uts];
        let asked: Vec<_> = asked
            .into_iter()
            .map(|(kind, path)| {
                let mut namespace = LinuxNamespace::default();
                namespace.set_typ(kinds[kind]).set_path(path.map(PathBuf::from));
                namespace
            })
            .collect();

        let guest = own_namespaces(&asked);

        for typ in ALWAYS_NEW {
            assert_eq!(guest.iter().filter(|known| known.typ() == typ).count(), 1);
        }
        assert!(guest.iter().all(|known| known.path().is_none()));
        assert!(guest.iter().all(|known| known.typ() != Network));
    }
}
