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
        "hooks": {
            "createRuntime": [{"path": "/usr/bin/nerdctl"}],
            "startContainer": [{"path": "/bin/check"}],
            "poststop": [{"path": "/usr/bin/nerdctl"}],
        },
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
    assert_eq!(
        guest["hooks"],
        json!({"startContainer": [{"path": "/bin/check"}]})
    );
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

/// A rule for a number of the host's would let the container at another device of the
/// guest's.
#[test]
fn a_passed_device_s_node_and_its_rule_are_taken_out() {
    let rule = |major: u32, minor: u32| json!({"allow": true, "type": "c", "major": major, "minor": minor, "access": "rwm"});
    let deny_all = json!({"allow": false, "access": "rwm"});
    let node = |path: &str, major: u32, minor: u32| json!({"path": path, "type": "c", "major": major, "minor": minor});
    let guest = translate(json!({
        "ociVersion": "1.1.0",
        "linux": {
            "devices": [
                node("/dev/vfio/vfio", 10, 196), node("/dev/vfio/12", 240, 3), node("/dev/fuse", 10, 229),
            ],
            "resources": {"devices": [
                deny_all, rule(10, 196), rule(240, 3), rule(10, 229), rule(240, 4),
            ]},
        },
    }));
    let linux = &guest["linux"];
    let paths: Vec<_> = linux["devices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|device| &device["path"])
        .collect();
    assert_eq!(paths, ["/dev/fuse"]);
    let rules = linux["resources"]["devices"].as_array().unwrap();
    let numbers: Vec<_> = rules
        .iter()
        .map(|rule| (rule["major"].as_u64(), rule["minor"].as_u64()))
        .collect();
    let kept = [(None, None), (Some(10), Some(229)), (Some(240), Some(4))];
    assert_eq!(numbers, kept);
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
