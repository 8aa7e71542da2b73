//! Containers that ask for devices of the host.

use serde_json::json;
use ttrpc::Code;

use super::fixture::*;
use crate::devices::testing::Tree;
use crate::machine::fake::FakeHost;

#[tokio::test]
async fn a_running_machine_is_given_none() {
    let tree = Tree::new();
    let nvme = tree.add("0000:01:00.0", 0x01_0802);
    nvme.group(4).driver("vfio-pci");
    let mut host = FakeHost::scripted();
    host.system = tree.system();
    let mut fixture = Fixture::on(host).await;
    fixture.run("first", "sleep 60").await;

    let refusal = async |fixture: &Fixture, id: &str| match fixture.create(id, "true").await {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message().to_owned()),
        other => panic!("{other:?}"),
    };
    fixture.annotations = json!({"io.nacre.devices": "0000:01:00.0"});
    let (code, text) = refusal(&fixture, "second").await;
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(text.contains("container second needs a device"), "{text}");
    fixture.annotations = json!({"io.nacre.devices": "0000:07:00.0"});
    let (code, text) = refusal(&fixture, "third").await;
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(text.contains("no PCI device 0000:07:00.0"), "{text}");

    // Others join as ever.
    fixture.annotations = json!({});
    fixture.run("fourth", "exit 3").await;
    assert_eq!(fixture.wait("fourth", "").await, 3);
}
