use super::*;

use std::fs::File;
use std::sync::Arc;

use serde_json::json;

use crate::devices::testing::{Tree, address};

const GPU: u32 = 0x03_0200;
const AUDIO: u32 = 0x04_0300;

/// A GPU with its audio function in group 4, an NVMe disk in group 5, both with
/// vfio-pci; a NIC in group 6 with the host.
fn host() -> Tree {
    let tree = Tree::new();
    for (name, class, group) in [
        ("0000:01:00.0", GPU, 4),
        ("0000:01:00.1", AUDIO, 4),
        ("0000:02:00.0", 0x01_0802, 5),
    ] {
        tree.add(name, class).group(group).driver("vfio-pci");
    }
    tree.add("0000:03:00.0", 0x02_0000)
        .group(6)
        .driver("e1000e");
    tree.add("0000:00:01.0", 0x06_0400)
        .group(4)
        .driver("pcieport");
    tree
}

fn with_nodes(paths: &[&str]) -> Spec {
    let devices: Vec<_> = paths
        .iter()
        .map(|path| json!({"path": path, "type": "c", "major": 240, "minor": 0}))
        .collect();
    let spec = json!({"ociVersion": "1.1.0", "linux": {"devices": devices}});
    serde_json::from_value(spec).unwrap()
}

fn with_annotation(key: &str, value: &str) -> Spec {
    let spec = json!({"ociVersion": "1.1.0", "annotations": {key: value}});
    serde_json::from_value(spec).unwrap()
}

fn named(value: &str) -> Spec {
    with_annotation(DEVICES_ANNOTATION, value)
}

fn addresses(tree: &Tree, spec: &Spec) -> Vec<String> {
    let assigned = assigned(&tree.system(), spec, true).unwrap();
    assigned
        .iter()
        .map(|device| device.address.to_string())
        .collect()
}

fn refusal(tree: &Tree, spec: &Spec) -> String {
    assigned(&tree.system(), spec, true)
        .unwrap_err()
        .to_string()
}

#[test]
fn a_container_that_asks_for_nothing() {
    let tree = host();
    assert!(
        addresses(
            &tree,
            &with_nodes(&["/dev/fuse", "/dev/vfio/vfio", "/dev/iommu"])
        )
        .is_empty()
    );
    assert!(addresses(&tree, &with_annotation("io.nacre.other", "02:00.0")).is_empty());
}

#[test]
fn a_group_s_node_stands_for_all_its_devices() {
    let tree = host();
    let devices = assigned(
        &tree.system(),
        &with_nodes(&["/dev/vfio/vfio", "/dev/vfio/4"]),
        false,
    )
    .unwrap();
    let expected = ["0000:01:00.0", "0000:01:00.1"].map(|name| AssignedDevice {
        address: address(name),
        group: 4,
        group_node: tree.path("dev/vfio/4"),
        device_node: None,
        bar_bytes: 0,
    });
    assert_eq!(devices, expected);
}

#[test]
fn a_device_s_own_node_stands_for_its_group_too() {
    let tree = host();
    let node = "sys/devices/pci0000:00/0000:01:00.1/vfio-dev/vfio3/dev";
    tree.write(node, "511:3\n");
    let spec = with_nodes(&["/dev/vfio/devices/vfio3", "/dev/iommu"]);
    let devices = assigned(&tree.system(), &spec, true).unwrap();
    let nodes: Vec<_> = devices
        .iter()
        .map(|device| device.device_node.clone())
        .collect();
    assert_eq!(nodes, [None, Some(tree.path("dev/vfio/devices/vfio3"))]);
}

#[test]
fn nodes_nobody_has() {
    let tree = host();
    for path in [
        "/dev/vfio/99",
        "/dev/vfio/+4",
        "/dev/vfio/4/..",
        "/dev/vfio/noiommu-0",
        "/dev/vfio/99999999999",
        "/dev/vfio/devices/vfio7",
        "/dev/vfio/devices",
        // Nothing of it is with vfio-pci.
        "/dev/vfio/6",
    ] {
        let refusal = refusal(&tree, &with_nodes(&[path]));
        assert!(refusal.contains(path), "{path}: {refusal}");
    }
}

#[test]
fn addresses_and_directories_by_annotation() {
    let tree = host();
    let all = ["0000:01:00.0", "0000:01:00.1", "0000:02:00.0"];
    let by_address = named("0000:02:00.0, 01:00.1");
    assert_eq!(addresses(&tree, &by_address), all);
    let by_path = named("/sys/bus/pci/devices/0000:02:00.0,/sys/devices/pci0000:00/0000:01:00.0");
    assert_eq!(addresses(&tree, &by_path), all);
    // Asked for twice, passed once.
    let mut both = with_nodes(&["/dev/vfio/5"]);
    both.set_annotations(named("02:00.0").annotations().clone());
    assert_eq!(addresses(&tree, &both), ["0000:02:00.0"]);
}

#[test]
fn names_that_are_none() {
    let tree = host();
    tree.write("sys/elsewhere/0000:02:00.0/class", "0x010802\n");
    for name in [
        "gpu0",
        "/sys/bus/pci/devices/../devices/0000:02:00.0",
        "/sys/bus/pci/devices",
        "/sys/elsewhere/0000:02:00.0",
        "/sys/nowhere/0000:02:00.0",
        "/dev/vfio/5",
    ] {
        let refusal = refusal(&tree, &named(name));
        assert!(
            refusal.contains(name) && refusal.contains("neither"),
            "{refusal}"
        );
    }
    for name in ["09:00.0", "/sys/bus/pci/devices/0000:09:00.0"] {
        let refusal = refusal(&tree, &named(name));
        assert!(refusal.contains("no PCI device 0000:09:00.0"), "{refusal}");
    }
}

#[test]
fn what_the_host_keeps() {
    let tree = host();
    let refusal = |name| refusal(&tree, &named(name));
    let with_host = refusal("03:00.0");
    assert!(with_host.contains("driver e1000e"), "{with_host}");
    assert!(
        with_host.contains("nacre devices bind 0000:03:00.0"),
        "{with_host}"
    );
    assert!(refusal("00:01.0").contains("is a bridge"));
}

#[test]
fn a_group_of_which_the_host_drives_a_part() {
    let tree = Tree::new();
    tree.add("0000:01:00.0", GPU).group(4).driver("vfio-pci");
    tree.add("0000:01:00.1", AUDIO)
        .group(4)
        .driver("snd_hda_intel");
    for spec in [named("01:00.0"), with_nodes(&["/dev/vfio/4"])] {
        let refusal = refusal(&tree, &spec);
        assert!(
            refusal.contains("0000:01:00.1 (snd_hda_intel)"),
            "{refusal}"
        );
    }
}

/// It is kept from DMA by having no driver, but nobody opens it either.
#[test]
fn a_member_without_a_driver_is_not_passed() {
    let tree = Tree::new();
    tree.add("0000:01:00.0", GPU).group(4).driver("vfio-pci");
    tree.add("0000:01:00.1", AUDIO).group(4);
    assert_eq!(addresses(&tree, &named("01:00.0")), ["0000:01:00.0"]);
}

#[test]
fn names_of_cdi() {
    let tree = host();
    let spec = json!({
        "cdiVersion": "0.6.0",
        "kind": "vendor.com/gpu",
        "devices": [
            {"name": "0", "containerEdits": {"deviceNodes": [{"path": "/dev/vfio/4"}]}},
            {"name": "native", "containerEdits": {"deviceNodes": [{"path": "/dev/nvidia0"}]}},
        ],
        "containerEdits": {"deviceNodes": [{"path": "/dev/vfio/vfio"}]},
    });
    tree.write("etc/cdi/vendor.json", &spec.to_string());
    let cdi = |value| with_annotation("cdi.k8s.io/nacre_gpu", value);
    let gpu = ["0000:01:00.0", "0000:01:00.1"];
    assert_eq!(addresses(&tree, &cdi("vendor.com/gpu=0")), gpu);
    let wrong = refusal(&tree, &cdi("vendor.com/gpu=0,vendor.com/gpu=7"));
    assert!(wrong.contains("\"vendor.com/gpu=7\""), "{wrong}");
    let native = refusal(&tree, &cdi("vendor.com/gpu=native"));
    assert!(
        native.contains("no node of a device below /dev/vfio"),
        "{native}"
    );
}

/// Whoever makes a pod writes its annotations.
#[test]
fn annotations_ask_only_where_the_administrator_lets_them() {
    let tree = host();
    let cdi = "cdi.k8s.io/nacre_gpu";
    for spec in [named("02:00.0"), with_annotation(cdi, "vendor.com/gpu=0")] {
        let error = assigned(&tree.system(), &spec, false).unwrap_err();
        let text = error.to_string();
        let key = spec.annotations().iter().flatten().next().unwrap().0;
        assert!(text.contains(key.as_str()), "{text}");
        assert!(text.contains("device_annotations"), "{text}");
    }
    let nothing = assigned(&tree.system(), &named(" , "), false).unwrap();
    assert!(nothing.is_empty());
    let mut node = with_nodes(&["/dev/vfio/5"]);
    let by_node = assigned(&tree.system(), &node, false).unwrap();
    assert_eq!(by_node[0].address, address("02:00.0"));
    node.set_annotations(named("02:00.0").annotations().clone());
    assert!(assigned(&tree.system(), &node, false).is_err());
}

/// A spec that containerd makes for a privileged container: all nodes of the host.
#[test]
fn a_privileged_container_asks_by_rules_of_their_own() {
    let tree = host();
    let privileged = |rules: &[serde_json::Value]| -> Spec {
        let nodes = [
            ("vfio", 10, 196),
            ("4", 240, 0),
            ("5", 240, 1),
            ("6", 240, 2),
        ];
        let nodes = nodes.map(|(name, major, minor)| {
            json!({"path": format!("/dev/vfio/{name}"), "type": "c", "major": major, "minor": minor})
        });
        let mut all = vec![json!({"allow": true, "access": "rwm"})];
        all.extend_from_slice(rules);
        let spec = json!({"ociVersion": "1.1.0",
            "linux": {"devices": nodes, "resources": {"devices": all}}});
        serde_json::from_value(spec).unwrap()
    };
    assert!(addresses(&tree, &privileged(&[])).is_empty());
    let by = |rule| addresses(&tree, &privileged(&[rule]));
    let own = json!({"allow": true, "type": "c", "major": 240, "minor": 1, "access": "rwm"});
    assert_eq!(by(own), ["0000:02:00.0"]);
    for other in [
        json!({"allow": true, "type": "c", "major": 240, "access": "rwm"}),
        json!({"allow": false, "type": "c", "major": 240, "minor": 1, "access": "rwm"}),
        json!({"allow": true, "type": "b", "major": 240, "minor": 1, "access": "rwm"}),
    ] {
        assert!(by(other.clone()).is_empty(), "{other}");
    }
}

/// A device that nobody has bound is the commonest mistake.
#[test]
fn what_kubelet_has_given_and_is_passed_over_is_logged() {
    let tree = host();
    let path = tree.path("log");
    let log = Arc::new(File::create(&path).unwrap());
    let subscriber = tracing_subscriber::fmt().with_writer(log).finish();
    let names = [
        Allocated::Plugin {
            resource: "vendor.com/nic".into(),
            id: "0000:03:00.0".into(),
        },
        Allocated::Cdi("vendor.com/disk=none".into()),
    ];
    tracing::subscriber::with_default(subscriber, || {
        let devices = assigned_to_pod(&tree.system(), &named(""), false, &names);
        assert!(devices.unwrap().is_empty());
    });
    let text = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 2, "{text}");
    assert!(lines[0].contains("0000:03:00.0"), "{text}");
    assert!(lines[0].contains("e1000e"), "{text}");
    assert!(lines[1].contains("vendor.com/disk=none"), "{text}");
}

/// Names as device plugins and DRA drivers give them.
#[test]
fn what_kubelet_has_given_is_understood_where_it_is_a_pci_device() {
    let tree = host();
    let edits = json!({"deviceNodes": [{"path": "/dev/vfio/5"}]});
    let nothing = json!({"deviceNodes": [{"path": "/dev/nvidia0"}]});
    let spec = json!({"cdiVersion": "0.6.0", "kind": "vendor.com/disk", "devices": [
        {"name": "a", "containerEdits": edits},
        {"name": "b", "containerEdits": nothing},
    ]});
    tree.write("etc/cdi/disk.json", &spec.to_string());
    let plugin = |resource: &str, id: &str| Allocated::Plugin {
        resource: resource.into(),
        id: id.into(),
    };
    let addresses = |name: Allocated| -> Vec<String> {
        let devices = assigned_to_pod(&tree.system(), &named(""), false, &[name]).unwrap();
        let devices = devices.iter().map(|device| device.address.to_string());
        devices.collect()
    };
    let card = ["0000:01:00.0", "0000:01:00.1"];
    assert_eq!(addresses(plugin("vendor.com/gpu", "0000:01:00.1")), card);
    let disk = ["0000:02:00.0"];
    assert_eq!(addresses(plugin("vendor.com/disk", "a")), disk);
    assert_eq!(addresses(Allocated::Cdi("vendor.com/disk=a".into())), disk);
    // Of the host's driver; of no spec; of a spec without a node for VFIO.
    for other in [
        plugin("vendor.com/nic", "0000:03:00.0"),
        plugin("vendor.com/fuse", "7"),
        Allocated::Cdi("vendor.com/disk=b".into()),
    ] {
        assert!(addresses(other).is_empty());
    }
    let both = [plugin("vendor.com/disk", "a")];
    let by_annotation = named("0000:01:00.0");
    let devices = assigned_to_pod(&tree.system(), &by_annotation, true, &both).unwrap();
    assert_eq!(devices.len(), 3, "what the annotation names, too");

    let gone = [plugin("vendor.com/gpu", "0000:7f:00.0")];
    let error = assigned_to_pod(&tree.system(), &named(""), false, &gone).unwrap_err();
    assert!(error.to_string().contains("no PCI device 0000:7f:00.0"));
}
