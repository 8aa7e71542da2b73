use super::*;

use std::fs::{self, File};
use std::sync::Arc;

use serde_json::json;

use crate::devices::testing::{GROUP_MAJOR, Tree, address};

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

/// Major number of devices' own nodes.
const OWN_MAJOR: u32 = 511;

/// The node `name`, with the numbers that the host has for such a one, be it there or not.
fn node(name: &str) -> serde_json::Value {
    let number = |prefix| name.strip_prefix(prefix)?.parse::<u32>().ok();
    let own = number("/dev/vfio/devices/vfio").map(|number| (OWN_MAJOR, number));
    let group = number("/dev/vfio/").map(|number| (GROUP_MAJOR, number));
    let (major, minor) = own.or(group).unwrap_or((10, 255));
    node_of(name, "c", major, minor)
}

fn node_of(name: &str, kind: &str, major: u32, minor: u32) -> serde_json::Value {
    json!({"path": name, "type": kind, "major": major, "minor": minor})
}

fn with_devices(devices: &[serde_json::Value]) -> Spec {
    let spec = json!({"ociVersion": "1.1.0", "linux": {"devices": devices}});
    serde_json::from_value(spec).unwrap()
}

fn with_nodes(paths: &[&str]) -> Spec {
    let devices: Vec<_> = paths.iter().map(|path| node(path)).collect();
    with_devices(&devices)
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
    tree.add_node("511:3", "vfio/devices/vfio3");
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

/// The path is the container's: of CDI's `hostPath` nothing is left but the numbers.
#[test]
fn a_node_is_what_its_numbers_say() {
    let tree = host();
    tree.write(
        "sys/devices/pci0000:00/0000:02:00.0/vfio-dev/vfio3/dev",
        "511:3\n",
    );
    tree.add_node("511:3", "vfio/devices/vfio3");
    tree.add_node("10:196", "vfio/vfio");
    tree.add_node("1:3", "null");
    let named = |name| {
        let nodes = [(GROUP_MAJOR, 5), (OWN_MAJOR, 3)];
        nodes.map(|(major, minor)| with_devices(&[node_of(name, "c", major, minor)]))
    };
    // Some are another node's name on the host.
    for name in [
        "/dev/vfio/gpu0",
        "/dev/gpu0",
        "/dev/vfio/4",
        "/dev/vfio/vfio",
    ] {
        for spec in named(name) {
            assert_eq!(addresses(&tree, &spec), ["0000:02:00.0"], "{name}");
        }
    }
    let through = node_of("/dev/vfio/4", "c", 10, 196);
    assert!(addresses(&tree, &with_devices(&[through])).is_empty());
    for (kind, major, minor) in [("b", GROUP_MAJOR, 5), ("c", 1, 3), ("c", GROUP_MAJOR, 99)] {
        let other = with_devices(&[node_of("/dev/gpu0", kind, major, minor)]);
        assert!(
            addresses(&tree, &other).is_empty(),
            "{kind} {major}:{minor}"
        );
        let claims = with_devices(&[node_of("/dev/vfio/5", kind, major, minor)]);
        let refusal = refusal(&tree, &claims);
        assert!(
            refusal.starts_with("/dev/vfio/5 is no device's"),
            "{refusal}"
        );
    }
    // By the host's name, where `nacre devices` has it.
    let not_ready = node_of("/dev/vfio/gpu0", "c", GROUP_MAJOR, 6);
    let refusal = refusal(&tree, &with_devices(&[not_ready]));
    assert!(
        refusal.starts_with("/dev/vfio/6 is no device's"),
        "{refusal}"
    );
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

/// They are the host's, and have the host's names to the letter.
#[test]
fn nodes_of_cdi_that_nobody_has() {
    let tree = host();
    for path in [
        "/dev/vfio/99",
        "/dev/vfio/+4",
        "/dev/vfio/4/..",
        "/dev/vfio/devices",
    ] {
        let edits = json!({"deviceNodes": [{"path": "/dev/vfio/4", "hostPath": path}]});
        let spec = json!({"cdiVersion": "0.6.0", "kind": "vendor.com/gpu", "devices": [
            {"name": "0", "containerEdits": edits},
        ]});
        tree.write("etc/cdi/vendor.json", &spec.to_string());
        let refusal = refusal(
            &tree,
            &with_annotation("cdi.k8s.io/nacre", "vendor.com/gpu=0"),
        );
        assert!(
            refusal.starts_with(&format!("{path} is no device's")),
            "{refusal}"
        );
    }
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
            ("4", 240, 4),
            ("5", 240, 5),
            ("6", 240, 6),
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
    let own = json!({"allow": true, "type": "c", "major": 240, "minor": 5, "access": "rwm"});
    assert_eq!(by(own), ["0000:02:00.0"]);
    for other in [
        json!({"allow": true, "type": "c", "major": 240, "access": "rwm"}),
        json!({"allow": false, "type": "c", "major": 240, "minor": 5, "access": "rwm"}),
        json!({"allow": true, "type": "b", "major": 240, "minor": 5, "access": "rwm"}),
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

/// A mediated device in group 9: a part of no hardware.
const UUID: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
const PARENT: &str = "devices/virtual/mtty/mtty";

fn with_mediated() -> Tree {
    let tree = host();
    let part = tree.add_mediated(UUID, PARENT);
    part.group(9).file("vfio-dev/vfio4/dev", "511:4\n");
    tree.add_node("511:4", "vfio/devices/vfio4");
    tree
}

#[test]
fn a_mediated_device_by_each_of_its_names() {
    let tree = with_mediated();
    let spec = json!({"cdiVersion": "0.6.0", "kind": "vendor.com/vgpu", "devices": [
        {"name": "0", "containerEdits": {"deviceNodes": [{"path": "/dev/vfio/9"}]}},
    ]});
    tree.write("etc/cdi/vgpu.json", &spec.to_string());
    for spec in [
        named(UUID),
        named(&format!("/sys/bus/mdev/devices/{UUID}")),
        named(&format!("/sys/{PARENT}/{UUID}")),
        with_nodes(&["/dev/vfio/9"]),
        with_nodes(&["/dev/vfio/devices/vfio4"]),
        with_annotation("cdi.k8s.io/nacre_vgpu", "vendor.com/vgpu=0"),
    ] {
        let devices = assigned(&tree.system(), &spec, true).unwrap();
        let expected = AssignedDevice {
            address: address(UUID),
            group: 9,
            group_node: tree.path("dev/vfio/9"),
            device_node: Some(tree.path("dev/vfio/devices/vfio4")),
            bar_bytes: 0,
        };
        assert_eq!(devices, [expected]);
    }
    let both = named(&format!("{UUID},0000:02:00.0"));
    assert_eq!(addresses(&tree, &both), ["0000:02:00.0", UUID]);
}

#[test]
fn paths_of_no_mediated_device() {
    let tree = with_mediated();
    let gone = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002";
    tree.write(&format!("sys/elsewhere/{UUID}/remove"), "");
    for name in [
        "/sys/bus/mdev/devices/mtty".to_owned(),
        "/sys/devices/virtual/mtty/mtty".to_owned(),
        format!("/sys/bus/mdev/devices/{UUID}-1"),
        format!("/sys/bus/mdev/devices/../devices/{UUID}"),
        format!("/sys/bus/pci/devices/{UUID}"),
        format!("/sys/elsewhere/{UUID}"),
        "83b8f4f2-509f-382f-3c1e".to_owned(),
    ] {
        let refusal = refusal(&tree, &named(&name));
        let parts = [name.as_str(), "neither", "the UUID of a mediated device"];
        assert!(parts.iter().all(|part| refusal.contains(part)), "{refusal}");
    }
    for name in [gone.to_owned(), format!("/sys/bus/mdev/devices/{gone}")] {
        let refusal = refusal(&tree, &named(&name));
        let text = format!("no mediated device {gone}");
        assert!(refusal.contains(&text), "{refusal}");
    }
    fs::remove_file(tree.path(&format!("sys/{PARENT}/{UUID}/driver"))).unwrap();
    let refusal = refusal(&tree, &named(UUID));
    assert!(refusal.contains("has no driver"), "{refusal}");
}

/// Plugins of vGPUs name them so, and others use UUIDs of their own.
#[test]
fn a_plugin_s_uuid_is_a_mediated_device_s_where_there_is_one() {
    let tree = with_mediated();
    let given = |id: &str| {
        let names = [Allocated::Plugin {
            resource: "vendor.com/vgpu".into(),
            id: id.into(),
        }];
        let devices = assigned_to_pod(&tree.system(), &named(""), false, &names).unwrap();
        let devices = devices.iter().map(|device| device.address.to_string());
        devices.collect::<Vec<_>>()
    };
    assert_eq!(given(UUID), [UUID]);
    let other = "00000000-509f-382f-3c1e-e6bfe0fa1001";
    assert!(given(other).is_empty());
    let spec = json!({"cdiVersion": "0.6.0", "kind": "vendor.com/vgpu", "devices": [
        {"name": other, "containerEdits": {"deviceNodes": [{"path": "/dev/vfio/5"}]}},
    ]});
    tree.write("etc/cdi/vgpu.json", &spec.to_string());
    assert_eq!(given(other), ["0000:02:00.0"]);
}

/// Its node may be another one's then, which is another pod's.
#[test]
fn a_device_that_is_another_one_by_now_is_not_opened() {
    let tree = with_mediated();
    for file in ["dev/iommu", "dev/vfio/devices/vfio4"] {
        tree.write(file, "");
    }
    let devices = assigned(&tree.system(), &named(UUID), true).unwrap();
    let opened = || open(&tree.system(), &devices, None);
    assert_eq!(opened().unwrap().len(), 1);
    let nodes = tree.path(&format!("sys/{PARENT}/{UUID}/vfio-dev"));
    fs::rename(nodes.join("vfio4"), nodes.join("vfio5")).unwrap();
    let again = opened().err().unwrap().to_string();
    let what = format!("cannot open mediated device {UUID}: ");
    assert!(
        again.starts_with(&what) && again.contains("come back"),
        "{again}"
    );
    fs::remove_file(tree.path(&format!("sys/bus/mdev/devices/{UUID}"))).unwrap();
    let gone = opened().err().unwrap().to_string();
    assert!(
        gone.starts_with(&what) && gone.contains("no mediated device"),
        "{gone}"
    );
}
