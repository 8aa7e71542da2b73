//! The manifests of config/ and docs/: by kubectl, and by what they must agree with.
//!
//! kubectl has no schema of its own: `apply --dry-run=client` asks a server for it, and
//! here is none. What it does have is the types of the Kubernetes API, and a strategic
//! merge of a manifest into itself (`patch --local`) looks up every object and list in
//! them. So it refuses unknown kinds, and unknown fields that hold objects or lists;
//! fields that hold plain values it lets pass, and those are compared here.

use std::process::Command;

use nacre_tests::pods::HANDLER;
use nacre_tests::{Said, run_with_input};
use serde_json::{Value, json};

const RUNTIME_CLASS: &str = include_str!("../../../config/runtimeclass.yaml");
const NACRE_TOML: &str = include_str!("../../../config/nacre.toml");
const DOCUMENTATION: &str = include_str!("../../../docs/kubernetes.md");
const DEVICES: &str = include_str!("../../../docs/gpu.md");
const LAB: &str = include_str!("../../lab/guest/etc/containerd/config.toml");

/// What the guest's kernel and agent take beside the containers, MiB (docs/kubernetes.md).
pub const GUEST_RESERVE_MIB: u64 = 64;

/// What nacre.toml says a pod may use beyond its containers, MiB.
pub fn overhead_mib() -> u64 {
    number("overhead_memory_mib = ")
}

/// The same of processors, thousandths of one.
pub fn overhead_cpu_millis() -> u64 {
    number("overhead_cpu_millis = ")
}

fn number(key: &str) -> u64 {
    let line = NACRE_TOML.lines().find_map(|line| line.strip_prefix(key));
    line.unwrap().parse().unwrap()
}

fn merged_by_kubectl(manifest: &str) -> Said {
    let mut kubectl = Command::new("kubectl");
    kubectl.args(["patch", "--local", "--type", "strategic", "-o", "json"]);
    kubectl.args(["-f", "-", "-p", manifest]);
    run_with_input(kubectl, manifest.into())
}

/// The manifest as kubectl understands it.
#[track_caller]
fn checked(manifest: &str) -> Value {
    let said = merged_by_kubectl(manifest).exits(0);
    serde_json::from_str(&said.stdout).unwrap()
}

fn expected_class() -> Value {
    json!({
        "apiVersion": "node.k8s.io/v1",
        "kind": "RuntimeClass",
        "metadata": { "name": "nacre" },
        "handler": HANDLER,
        "overhead": {
            "podFixed": {
                "memory": format!("{}Mi", overhead_mib()),
                "cpu": format!("{}m", overhead_cpu_millis()),
            },
        },
    })
}

#[test]
fn runtime_class_is_one_and_has_the_overhead_of_nacre_toml() {
    assert_eq!(checked(RUNTIME_CLASS), expected_class());
}

#[test]
fn runtime_class_for_some_nodes_is_one_too() {
    let (class, commented) = RUNTIME_CLASS.split_once("and uncomment:\n").unwrap();
    let lines = commented.lines();
    let lines: Vec<_> = lines.map(|line| line.strip_prefix("# ").unwrap()).collect();
    let mut expected = expected_class();
    expected["scheduling"] = json!({ "nodeSelector": { "nacre.dev/ready": "true" } });
    assert_eq!(
        checked(&format!("{class}\n{}\n", lines.join("\n"))),
        expected
    );
}

/// kubectl's check can fail.
#[test]
fn manifests_with_mistakes_are_refused() {
    for (right, wrong, complaint) in [
        ("overhead:", "overheads:", "overheads"),
        ("podFixed:", "podFix:", "podFix"),
        ("kind: RuntimeClass", "kind: RuntimeClas", "RuntimeClas"),
    ] {
        let manifest = RUNTIME_CLASS.replace(right, wrong);
        merged_by_kubectl(&manifest)
            .exits(1)
            .complains(&[complaint]);
    }
}

/// The blocks of a language in a documentation.
fn blocks(documentation: &'static str, language: &str) -> Vec<&'static str> {
    let fence = format!("```{language}\n");
    let after = documentation.split(&*fence).skip(1);
    after
        .map(|text| text.split_once("```").unwrap().0)
        .collect()
}

#[test]
fn documented_pod_is_one_and_names_the_class() {
    let manifest = blocks(DOCUMENTATION, "yaml")[0];
    let pod = checked(manifest);
    assert_eq!(pod["kind"], "Pod");
    assert_eq!(
        pod["spec"]["runtimeClassName"],
        expected_class()["metadata"]["name"]
    );
}

/// A class for pods with devices, whose handler is the lab's, and a pod of it.
#[test]
fn documented_pod_with_a_device_is_one_and_names_its_class() {
    let [class, pod] = blocks(DEVICES, "yaml")[..] else {
        panic!("not two manifests");
    };
    let (class, pod) = (checked(class), checked(pod));
    assert_eq!(class["kind"], "RuntimeClass");
    assert_eq!(pod["spec"]["runtimeClassName"], class["metadata"]["name"]);
    let key = "io.nacre.devices";
    let address = pod["metadata"]["annotations"][key].as_str().unwrap();
    assert_eq!(address.len(), "0000:01:00.0".len());
    let [runtime] = blocks(DEVICES, "toml")[..] else {
        panic!("not one runtime");
    };
    assert!(LAB.contains(runtime.trim()), "{runtime}");
    let handler = class["handler"].as_str().unwrap();
    let table = format!(".containerd.runtimes.{handler}]");
    assert!(
        runtime.contains(&table) && runtime.contains(key),
        "{runtime}"
    );
}

/// What "Memory" there says of the overhead.
#[test]
fn documented_class_for_devices_has_room_for_what_is_pinned() {
    let manifests = blocks(DEVICES, "yaml");
    let class = checked(manifests[0]);
    let pod = checked(manifests[1]);
    let mebibytes = |quantity: &Value| -> u64 {
        let text = quantity.as_str().unwrap();
        let (number, factor) = match text.strip_suffix("Gi") {
            Some(number) => (number, 1024),
            None => (text.strip_suffix("Mi").unwrap(), 1),
        };
        number.parse::<u64>().unwrap() * factor
    };
    let limits = &pod["spec"]["containers"][0]["resources"]["limits"];
    let guest = mebibytes(&limits["memory"]) + GUEST_RESERVE_MIB;
    // Three page tables for all of it, with an entry of 8 bytes for each page.
    let needed = GUEST_RESERVE_MIB + (guest * 3).div_ceil(512) + overhead_mib();
    let overhead = mebibytes(&class["overhead"]["podFixed"]["memory"]);
    assert!(overhead >= needed, "{overhead} MiB of {needed}");
}
