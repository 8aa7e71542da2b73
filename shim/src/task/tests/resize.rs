//! Limits that change, and the machine with them. It boots with 256 MiB and can
//! have 1280, and with one vCPU of four; the host counts containers' limits alone
//! (`FakeHost`).

use std::time::Duration;

use containerd_shim_protos::api::*;
use serde_json::json;
use ttrpc::Code;

use super::fixture::*;
use crate::machine::fake::FakeHost;
use crate::task::lock;

const MIB: u64 = 1 << 20;

/// A pod with a running container that may use 256 MiB.
async fn fixture() -> Fixture {
    let mut fixture = Fixture::new().await;
    fixture.resources = json!({"memory": {"limit": 256 * MIB}});
    fixture.run("c", "sleep 60").await;
    fixture
}

async fn update(fixture: &Fixture, resources: serde_json::Value) -> ttrpc::Result<Empty> {
    fixture.update("c", &resources).await
}

fn memory(mib: u64) -> serde_json::Value {
    json!({"memory": {"limit": mib * MIB}})
}

/// What happened since this was last asked.
fn journal(fixture: &Fixture) -> Vec<String> {
    std::mem::take(&mut lock(&fixture.journal))
}

fn guest(mib: u64) -> String {
    format!("guest {}", memory(mib))
}

#[tokio::test]
async fn what_is_around_a_container_never_has_less() {
    let fixture = fixture().await;
    update(&fixture, memory(510)).await.unwrap();
    let raised = ["host 512", "machine +256", &guest(510)];
    assert_eq!(journal(&fixture), raised);
    update(&fixture, memory(300)).await.unwrap();
    let lowered = [&guest(300), "machine +44", "host 300"];
    assert_eq!(journal(&fixture), lowered);
    update(&fixture, memory(64)).await.unwrap();
    let boot = [&guest(64), "machine +0", "host 256"];
    assert_eq!(journal(&fixture), boot, "no smaller than it booted");
    let pids = json!({"pids": {"limit": 5}});
    update(&fixture, pids).await.unwrap();
    assert_eq!(journal(&fixture).len(), 1, "the machine and the host stay");
}

#[tokio::test]
async fn what_the_guest_does_not_give_back_stays_allowed() {
    let fixture = fixture().await;
    update(&fixture, memory(512)).await.unwrap();
    journal(&fixture);
    let machine = lock(&fixture.machine).clone().unwrap();
    machine.keeps(100);
    update(&fixture, memory(256)).await.unwrap();
    let expected = [&guest(256), "machine +0", "host 356"];
    assert_eq!(journal(&fixture), expected);
    machine.keeps(u32::MAX);
    update(&fixture, memory(255)).await.unwrap();
    let all = [&guest(255), "machine +0", "host 1280"];
    assert_eq!(journal(&fixture), all, "no more than there is");
}

#[tokio::test]
async fn what_cannot_be_changes_nothing() {
    let fixture = fixture().await;
    let too_large = update(&fixture, memory(2000)).await;
    assert_eq!(code(too_large), Code::FAILED_PRECONDITION);
    let machine = lock(&fixture.machine).clone().unwrap();
    machine.takes(100);
    let not_grown = update(&fixture, memory(512)).await;
    assert_eq!(code(not_grown), Code::RESOURCE_EXHAUSTED);
    machine.takes(u32::MAX);
    let refused = update(&fixture, memory(13)).await;
    assert_eq!(code(refused), Code::INVALID_ARGUMENT);
    let last = journal(&fixture).pop().unwrap();
    assert_eq!(last, "host 256");
    update(&fixture, memory(256)).await.unwrap();
    assert_eq!(journal(&fixture), [guest(256)]);
}

#[tokio::test]
async fn room_for_containers_that_come_and_go() {
    let mut fixture = fixture().await;
    fixture.resources = memory(200);
    fixture.run("second", "sleep 60").await;
    assert_eq!(journal(&fixture), ["host 456", "machine +200"]);
    fixture.kill("second", "").await.unwrap();
    fixture.wait("second", "").await;
    fixture.delete("second", "").await.unwrap();
    assert_eq!(next(&fixture, 2).await, ["machine +0", "host 256"]);
}

/// A limit of memory that has the machine as it is, and one of CPUs.
fn cpus(count: u64) -> serde_json::Value {
    json!({"cpu": {"quota": count * 100_000, "period": 100_000}})
}

fn guest_cpus(count: u64) -> String {
    let quota = count * 100_000;
    format!(r#"guest {{"cpu":{{"quota":{quota},"period":100000}}}}"#)
}

/// The host's limits with those of so many CPUs.
fn host(memory_mib: u64, cpus: u64) -> String {
    format!("host {memory_mib}, {}/100000", cpus * 100_000)
}

async fn with_one_cpu() -> Fixture {
    let fixture = fixture().await;
    update(&fixture, cpus(1)).await.unwrap();
    journal(&fixture);
    fixture
}

#[tokio::test]
async fn vcpus_come_and_go_with_the_limit() {
    let fixture = with_one_cpu().await;
    update(&fixture, cpus(3)).await.unwrap();
    let raised = [&host(256, 3), "vcpus 3", &guest_cpus(3)];
    assert_eq!(journal(&fixture), raised);
    update(&fixture, cpus(2)).await.unwrap();
    let lowered = [&guest_cpus(2), &host(256, 2), "vcpus 2", &host(256, 2)];
    assert_eq!(
        journal(&fixture),
        lowered,
        "the host's before the machine's"
    );
    update(&fixture, cpus(9)).await.unwrap();
    let all = [&host(256, 9), "vcpus 4", &guest_cpus(9)];
    assert_eq!(journal(&fixture), all, "as many as there are");
    update(&fixture, cpus(1)).await.unwrap();
    let boot = [&guest_cpus(1), &host(256, 1), "vcpus 1", &host(256, 1)];
    assert_eq!(journal(&fixture), boot);
}

#[tokio::test]
async fn vcpus_that_the_guest_does_not_use_are_no_limit() {
    let fixture = with_one_cpu().await;
    let machine = lock(&fixture.machine).clone().unwrap();
    machine.uses_vcpus(1..=2);
    let refused = update(&fixture, cpus(3)).await;
    let (code, text) = refusal(refused);
    assert_eq!(code, Code::RESOURCE_EXHAUSTED, "{text}");
    assert!(text.contains("only 2 of the 3 vCPUs"), "{text}");
    let before = host(256, 1);
    let tried = [&host(256, 3), "vcpus 3", &before, "vcpus 1", &before];
    assert_eq!(journal(&fixture), tried, "all is as it was");

    machine.uses_vcpus(1..=4);
    update(&fixture, cpus(3)).await.unwrap();
    machine.uses_vcpus(2..=4);
    journal(&fixture);
    update(&fixture, cpus(1)).await.unwrap();
    let kept = [&guest_cpus(1), &before, "vcpus 1", &before];
    assert_eq!(journal(&fixture), kept, "what it keeps is no error");
}

#[tokio::test]
async fn vcpus_that_nobody_knows_of_are_asked_for_again() {
    let fixture = with_one_cpu().await;
    let machine = lock(&fixture.machine).clone().unwrap();
    machine.tells_no_vcpus();
    let (_, text) = refusal(update(&fixture, cpus(3)).await);
    assert!(text.contains("no such number"), "{text}");
    let before = host(256, 1);
    let tried = [&host(256, 3), "vcpus 3", &before, "vcpus 1", &before];
    assert_eq!(journal(&fixture), tried, "the host allows no more");
    machine.uses_vcpus(1..=4);
    update(&fixture, cpus(2)).await.unwrap();
    let after = host(256, 2);
    let again = [&after, "vcpus 2", &after, &guest_cpus(2)];
    assert_eq!(journal(&fixture), again);
}

#[tokio::test]
async fn a_guest_that_gives_no_vcpus_back_keeps_no_other_limit() {
    let fixture = with_one_cpu().await;
    let both = |mib, count| {
        let (memory, cpus) = (memory(mib), cpus(count));
        json!({"memory": memory["memory"], "cpu": cpus["cpu"]})
    };
    update(&fixture, both(512, 3)).await.unwrap();
    let machine = lock(&fixture.machine).clone().unwrap();
    machine.tells_no_vcpus();
    journal(&fixture);
    let lowered = [&host(512, 1), "vcpus 1", "machine +0", &host(256, 1)];
    let (_, text) = refusal(update(&fixture, both(256, 1)).await);
    assert!(text.contains("no such number"), "{text}");
    assert_eq!(journal(&fixture)[1..], lowered);

    refusal(update(&fixture, both(256, 1)).await);
    let again = [&host(256, 1), "vcpus 1", &host(256, 1)];
    assert_eq!(journal(&fixture)[1..], again, "it is not done");
    machine.uses_vcpus(1..=4);
    update(&fixture, both(256, 1)).await.unwrap();
    assert_eq!(journal(&fixture)[1..], again);
    update(&fixture, both(256, 1)).await.unwrap();
    assert_eq!(
        journal(&fixture).len(),
        1,
        "the container alone: it is done"
    );
}

#[tokio::test]
async fn a_container_that_joins_has_its_vcpus() {
    let mut fixture = with_one_cpu().await;
    fixture.resources = cpus(2);
    fixture.run("second", "sleep 60").await;
    assert_eq!(journal(&fixture), [&host(256, 3), "vcpus 3"]);
    let machine = lock(&fixture.machine).clone().unwrap();
    machine.uses_vcpus(1..=3);
    fixture.resources = cpus(1);
    fixture.create("third", "sleep 60").await.unwrap_err();
    let undone = [&host(256, 4), "vcpus 4", &host(256, 3)];
    assert_eq!(next(&fixture, 3).await, undone);
}

/// The next things that happen: nobody waits for a guest to give back what it has.
async fn next(fixture: &Fixture, count: usize) -> Vec<String> {
    let happened = async {
        while lock(&fixture.journal).len() < count {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let in_time = tokio::time::timeout(Duration::from_secs(10), happened).await;
    let happened = journal(fixture);
    assert!(in_time.is_ok(), "nothing after {happened:?}");
    happened
}

#[tokio::test]
async fn a_container_that_is_being_created_keeps_its_room() {
    let mut fixture = fixture().await;
    fixture.resources = memory(200);
    fixture.run("gone", "exit 0").await;
    fixture.wait("gone", "").await;
    journal(&fixture);
    fixture.resources = memory(300);
    let machine = lock(&fixture.machine).clone().unwrap();
    machine.hang();
    let meanwhile = async {
        machine.held(1).await;
        assert_eq!(journal(&fixture), ["host 756", "machine +500"]);
        fixture.delete("gone", "").await.unwrap();
        assert_eq!(next(&fixture, 2).await, ["machine +300", "host 556"]);
        machine.recover();
    };
    let (created, ()) = tokio::join!(fixture.create("new", "sleep 60"), meanwhile);
    created.unwrap();
    assert_eq!(journal(&fixture).len(), 0);
}

#[tokio::test]
async fn the_container_that_a_machine_boots_with_has_its_room() {
    let mut host = FakeHost::scripted();
    host.hangs = true;
    let mut fixture = Fixture::on(host).await;
    fixture.resources = memory(256);
    let both = async {
        let machine = fixture.machine_made().await;
        // The first ping and the first container.
        machine.held(2).await;
        let second = fixture.create("second", "sleep 60");
        let meanwhile = async {
            machine.held(3).await;
            assert_eq!(journal(&fixture), ["host 512", "machine +256"]);
            machine.recover();
        };
        let (second, ()) = tokio::join!(second, meanwhile);
        second
    };
    let (first, second) = tokio::join!(fixture.create("first", "sleep 60"), both);
    first.and(second).unwrap();
}

#[tokio::test]
async fn a_container_that_the_guest_does_not_make_gives_its_room_back() {
    let mut fixture = fixture().await;
    fixture.resources = memory(200);
    let request = CreateTaskRequest {
        id: "bad".into(),
        bundle: fixture.bundle_of("bad", json!(["/no/such/program"])),
        ..Default::default()
    };
    let refused = fixture.client.create(context(), &request).await;
    assert_eq!(code(refused), Code::INVALID_ARGUMENT);
    let all = next(&fixture, 4).await;
    assert_eq!(all, ["host 456", "machine +200", "machine +0", "host 256"]);
}
