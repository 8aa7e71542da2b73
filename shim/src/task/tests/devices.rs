//! Containers that ask for devices of the host.

use serde_json::json;
use ttrpc::Code;

use super::fixture::*;
use crate::devices::testing::Tree;
use crate::machine::fake::FakeHost;
use crate::task::lock;

const DEVICES: &str = "io.nacre.devices";

/// A host with two disks for pods.
async fn fixture(tree: &Tree) -> Fixture {
    for (address, group) in [("0000:01:00.0", 4), ("0000:05:00.0", 5)] {
        let nvme = tree.add(address, 0x01_0802);
        nvme.group(group).driver("vfio-pci");
    }
    let mut host = FakeHost::scripted();
    host.system = tree.system();
    Fixture::on(host).await
}

async fn refusal(fixture: &Fixture, id: &str) -> (Code, String) {
    match fixture.create(id, "true").await {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message().to_owned()),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_running_machine_is_given_none() {
    let tree = Tree::new();
    let mut fixture = fixture(&tree).await;
    fixture.run("first", "sleep 60").await;

    fixture.annotations = json!({DEVICES: "0000:01:00.0"});
    let (code, text) = refusal(&fixture, "second").await;
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(text.contains("container second needs a device"), "{text}");
    fixture.annotations = json!({DEVICES: "0000:07:00.0"});
    let (code, text) = refusal(&fixture, "third").await;
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(text.contains("no PCI device 0000:07:00.0"), "{text}");

    // Others join as ever.
    fixture.annotations = json!({});
    fixture.run("fourth", "exit 3").await;
    assert_eq!(fixture.wait("fourth", "").await, 3);
}

/// By their places in the guest: behind its root ports, in the order of the host's
/// addresses.
#[tokio::test]
async fn containers_get_those_of_the_pod_s_that_they_ask_for() {
    let tree = Tree::new();
    let mut fixture = fixture(&tree).await;
    fixture.annotations = json!({DEVICES: "0000:05:00.0,0000:01:00.0"});
    fixture.run("both", "sleep 60").await;
    fixture.annotations = json!({DEVICES: "0000:05:00.0"});
    fixture.run("one", "sleep 60").await;
    fixture.annotations = json!({});
    fixture.run("none", "sleep 60").await;
    let journal = lock(&fixture.journal).clone();
    let told: Vec<_> = journal
        .iter()
        .filter(|line| line.contains(" has "))
        .collect();
    assert_eq!(
        told,
        [
            "both has 0000:01:00.0",
            "both has 0000:02:00.0",
            "one has 0000:02:00.0"
        ]
    );
}

/// A pod's sandbox container asks for its containers.
#[tokio::test]
async fn the_sandbox_has_devices_for_others() {
    let tree = Tree::new();
    let mut fixture = fixture(&tree).await;
    let sandbox = "io.kubernetes.cri.container-type";
    fixture.annotations = json!({sandbox: "sandbox", DEVICES: "0000:05:00.0"});
    fixture.run("pod", "true").await;
    fixture.annotations = json!({DEVICES: "0000:05:00.0"});
    fixture.run("one", "sleep 60").await;
    fixture.annotations = json!({DEVICES: "0000:01:00.0"});
    assert_eq!(refusal(&fixture, "two").await.0, Code::FAILED_PRECONDITION);
    let journal = lock(&fixture.journal).clone();
    assert!(
        journal.contains(&"one has 0000:01:00.0".into()),
        "{journal:?}"
    );
}

#[tokio::test]
async fn memory_that_devices_reach_does_not_grow() {
    let tree = Tree::new();
    let mut fixture = fixture(&tree).await;
    let limit = |mib: u64| json!({"memory": {"limit": mib << 20}});
    fixture.annotations = json!({DEVICES: "0000:01:00.0"});
    fixture.resources = limit(128);
    fixture.run("first", "sleep 60").await;
    fixture.annotations = json!({});
    fixture.run("second", "sleep 60").await;
    let (code, text) = refusal(&fixture, "third").await;
    assert_eq!(code, Code::FAILED_PRECONDITION);
    let parts = ["384 MiB together", "256 MiB", "PCI devices"];
    assert!(parts.iter().all(|part| text.contains(part)), "{text}");
    let journal = lock(&fixture.journal).clone();
    let grows = |line: &String| line.starts_with("machine +") && line != "machine +0";
    assert!(!journal.iter().any(grows), "{journal:?}");
}
