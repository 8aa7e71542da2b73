//! Containers that ask for devices of the host.

use containerd_shim_protos::api::CreateTaskRequest;
use serde_json::json;
use ttrpc::Code;

use super::fixture::*;
use crate::devices::DriverImage;
use crate::devices::testing::{GROUP_MAJOR, Tree};
use crate::machine::MachineError;
use crate::machine::fake::FakeHost;
use crate::rundir::RunDir;
use crate::task::lock;

const DEVICES: &str = "io.nacre.devices";

/// A host with two disks for pods.
async fn fixture(tree: &Tree) -> Fixture {
    Fixture::on(host(tree)).await
}

fn host(tree: &Tree) -> FakeHost {
    tree.write("dev/iommu", "");
    for (address, group) in [("0000:01:00.0", 4), ("0000:05:00.0", 5)] {
        let nvme = tree.add(address, 0x01_0802);
        nvme.group(group).driver("vfio-pci");
        nvme.file(&format!("vfio-dev/vfio{group}/dev"), "511:0\n");
        tree.write(&format!("dev/vfio/devices/vfio{group}"), "");
    }
    let mut host = FakeHost::scripted();
    host.system = tree.system();
    host
}

/// A pod whose machine has two empty slots, and where its devices are claimed.
async fn with_slots(tree: &Tree) -> (Fixture, RunDir) {
    let mut host = host(tree);
    host.pci_slots = 2;
    let run_dir = host.run_dir.clone();
    let mut fixture = Fixture::on(host).await;
    fixture.run("first", "sleep 60").await;
    fixture.annotations = json!({DEVICES: "0000:05:00.0"});
    (fixture, run_dir)
}

fn holder(run_dir: &RunDir, address: &str) -> Option<String> {
    let address = address.parse().unwrap();
    run_dir.claims().holder(address).unwrap()
}

/// What happened to devices since the last time.
fn news(fixture: &Fixture) -> Vec<String> {
    let journal = std::mem::take(&mut *lock(&fixture.journal));
    let of_devices = |line: &String| {
        let words = ["plug ", "unplug ", "eject ", " has "];
        words.iter().any(|word| line.contains(word))
    };
    journal.into_iter().filter(of_devices).collect()
}

async fn delete(fixture: &Fixture, id: &str) {
    fixture.kill(id, "").await.unwrap();
    fixture.wait(id, "").await;
    fixture.delete(id, "").await.unwrap();
}

#[tokio::test]
async fn a_device_comes_with_a_container_and_goes_with_it() {
    let tree = Tree::new();
    let (mut fixture, run_dir) = with_slots(&tree).await;
    fixture.run("second", "sleep 60").await;
    assert_eq!(
        news(&fixture),
        ["plug 0 0000:05:00.0", "second has 0000:01:00.0"]
    );
    assert_eq!(
        holder(&run_dir, "0000:05:00.0").as_deref(),
        Some("default/pod")
    );
    // Who asks for the same shares it.
    fixture.run("third", "sleep 60").await;
    fixture.annotations = json!({DEVICES: "0000:01:00.0"});
    fixture.run("fourth", "sleep 60").await;
    assert_eq!(
        news(&fixture),
        [
            "third has 0000:01:00.0",
            "plug 1 0000:01:00.0",
            "fourth has 0000:02:00.0"
        ]
    );
    delete(&fixture, "second").await;
    assert_eq!(news(&fixture), [""; 0], "the third has it still");
    delete(&fixture, "third").await;
    assert_eq!(news(&fixture), ["eject 0000:01:00.0", "unplug [0]"]);
    assert_eq!(holder(&run_dir, "0000:05:00.0"), None);
    assert!(holder(&run_dir, "0000:01:00.0").is_some());
    // The slot serves again.
    fixture.annotations = json!({DEVICES: "0000:05:00.0"});
    fixture.run("fifth", "sleep 60").await;
    assert_eq!(
        news(&fixture),
        ["plug 0 0000:05:00.0", "fifth has 0000:01:00.0"]
    );
}

/// As CDI's `hostPath` has it.
#[tokio::test]
async fn a_device_comes_by_a_node_of_any_name() {
    let tree = Tree::new();
    let (mut fixture, _) = with_slots(&tree).await;
    fixture.annotations = json!({});
    fixture.devices = json!([{"path": "/dev/gpu0", "type": "c", "major": GROUP_MAJOR, "minor": 5}]);
    fixture.run("second", "sleep 60").await;
    assert_eq!(
        news(&fixture),
        ["plug 0 0000:05:00.0", "second has 0000:01:00.0"]
    );
}

#[tokio::test]
async fn more_devices_than_slots_are_refused() {
    let tree = Tree::new();
    let mut host = host(&tree);
    host.pci_slots = 1;
    let run_dir = host.run_dir.clone();
    let mut fixture = Fixture::on(host).await;
    fixture.run("first", "sleep 60").await;
    fixture.annotations = json!({DEVICES: "0000:05:00.0,0000:01:00.0"});
    let (code, text) = refusal(&fixture, "second").await;
    assert_eq!(code, Code::FAILED_PRECONDITION);
    for part in [
        "of its 1 slots",
        "1 are empty",
        "2 would be filled",
        "pci_slots",
    ] {
        assert!(text.contains(part), "{text}");
    }
    assert_eq!(holder(&run_dir, "0000:01:00.0"), None);
    assert_eq!(news(&fixture), [""; 0]);
}

#[tokio::test]
async fn what_is_not_plugged_in_is_not_kept() {
    let tree = Tree::new();
    let (fixture, run_dir) = with_slots(&tree).await;
    let machine = lock(&fixture.machine).clone().unwrap();
    machine.keeps_devices(Some(|| MachineError::Slots("too large".into())));
    let (code, text) = refusal(&fixture, "second").await;
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(text.contains("too large"), "{text}");
    assert_eq!(holder(&run_dir, "0000:05:00.0"), None);
    machine.keeps_devices(None);
    // Plugged in, but its container is none that can be made.
    let request = CreateTaskRequest {
        id: "second".into(),
        bundle: fixture.bundle_of("second", json!(["/no/such"])),
        ..Default::default()
    };
    assert!(fixture.client.create(context(), &request).await.is_err());
    assert_eq!(
        news(&fixture),
        ["plug 0 0000:05:00.0", "eject 0000:01:00.0", "unplug [0]"]
    );
    assert_eq!(holder(&run_dir, "0000:05:00.0"), None);
    // What cannot be opened.
    std::fs::remove_file(tree.path("dev/vfio/devices/vfio5")).unwrap();
    let (_, text) = refusal(&fixture, "second").await;
    assert!(text.contains("vfio5: No such file"), "{text}");
    assert_eq!(holder(&run_dir, "0000:05:00.0"), None);
    assert_eq!(news(&fixture), [""; 0]);
}

fn no_answer() -> MachineError {
    MachineError::io("wait for the control channel")(std::io::ErrorKind::BrokenPipe.into())
}

/// As long as the monitor may have it, nobody else gets it.
#[tokio::test]
async fn a_device_of_which_nobody_knows_stays_the_pod_s() {
    let tree = Tree::new();
    let (mut fixture, run_dir) = with_slots(&tree).await;
    let machine = lock(&fixture.machine).clone().unwrap();
    let is_kept = |address: &str| holder(&run_dir, address).as_deref() == Some("default/pod");
    machine.keeps_devices(Some(no_answer));
    assert_eq!(refusal(&fixture, "second").await.0, Code::INTERNAL);
    assert!(is_kept("0000:05:00.0"));
    machine.keeps_devices(None);
    let (code, text) = refusal(&fixture, "second").await;
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(text.contains("0000:05:00.0 may be in the pod's"), "{text}");
    assert!(is_kept("0000:05:00.0"));
    assert_eq!(news(&fixture), [""; 0]);
    // The other slot serves, until its device does not go either.
    fixture.annotations = json!({DEVICES: "0000:01:00.0"});
    fixture.run("third", "sleep 60").await;
    let expected = ["plug 1 0000:01:00.0", "third has 0000:02:00.0"];
    assert_eq!(news(&fixture), expected);
    machine.keeps_devices(Some(no_answer));
    delete(&fixture, "third").await;
    machine.keeps_devices(None);
    assert!(is_kept("0000:01:00.0"));
    let (_, text) = refusal(&fixture, "fourth").await;
    assert!(text.contains("0000:01:00.0 may be in the pod's"), "{text}");
}

/// It may plug it in yet.
#[tokio::test]
async fn a_device_that_is_not_plugged_in_in_time_stays_the_pod_s() {
    let tree = Tree::new();
    let (fixture, run_dir) = with_slots(&tree).await;
    let machine = lock(&fixture.machine).clone().unwrap();
    let time = async {
        machine.hang_devices().await;
        // From here on it passes as soon as all wait.
        tokio::time::pause();
    };
    let ((), (code, text)) = tokio::join!(time, refusal(&fixture, "second"));
    assert_eq!(code, Code::DEADLINE_EXCEEDED);
    assert!(text.contains("not plugged in within 10 s"), "{text}");
    let holder = holder(&run_dir, "0000:05:00.0");
    assert_eq!(holder.as_deref(), Some("default/pod"));
    let (code, text) = refusal(&fixture, "second").await;
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(text.contains("0000:05:00.0 may be in the pod's"), "{text}");
}

#[tokio::test]
async fn driver_images_are_told_with_the_devices_there_are() {
    let tree = Tree::new();
    let mut host = host(&tree);
    host.pci_slots = 2;
    host.drivers = vec![DriverImage {
        filter: "::0108".parse().unwrap(),
        path: "/images/nvme".into(),
    }];
    let mut fixture = Fixture::on(host).await;
    fixture.run("first", "sleep 60").await;
    for (id, device) in [("second", "0000:05:00.0"), ("third", "0000:01:00.0")] {
        fixture.annotations = json!({DEVICES: device});
        fixture.run(id, "sleep 60").await;
    }
    let both = r#"third has /images/nvme for ["0000:01:00.0", "0000:02:00.0"]"#;
    assert_eq!(news(&fixture).last().map(String::as_str), Some(both));
    delete(&fixture, "second").await;
    news(&fixture);
    fixture.run("fourth", "sleep 60").await;
    let left = r#"fourth has /images/nvme for ["", "0000:02:00.0"]"#;
    assert_eq!(news(&fixture), ["fourth has 0000:02:00.0", left]);
    fixture.annotations = json!({});
    fixture.run("fifth", "sleep 60").await;
    assert_eq!(news(&fixture), [""; 0]);
}

/// Nobody waits for it longer than it takes to say so.
#[tokio::test]
async fn a_guest_that_does_not_answer_loses_its_device() {
    let tree = Tree::new();
    let (fixture, run_dir) = with_slots(&tree).await;
    fixture.run("second", "true").await;
    fixture.wait("second", "").await;
    news(&fixture);
    let machine = lock(&fixture.machine).clone().unwrap();
    machine.hang();
    fixture.delete("second", "").await.unwrap();
    assert_eq!(news(&fixture), ["unplug [0]"]);
    assert_eq!(holder(&run_dir, "0000:05:00.0"), None);
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
