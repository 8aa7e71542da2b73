//! Block devices and layers of containers, on a machine with two empty disks for each.

use std::time::Duration;

use containerd_shim_protos::api::{CreateTaskRequest, CreateTaskResponse, Status};
use containerd_shim_protos::types::mount::Mount;
use serde_json::json;
use tokio::time::{advance, pause, resume};
use ttrpc::context::with_duration;

use super::fixture::*;
use crate::machine::fake::Disks;
use crate::storage::devices::some_disk;
use crate::task::container::CREATE_TIMEOUT;
use crate::task::lock;

/// Gives the containers to come so many block devices, read-only: they are disks of
/// this machine.
fn give(fixture: &mut Fixture, numbers: (i64, i64), count: usize) {
    let (major, minor) = numbers;
    let device =
        |n| json!({"path": format!("/dev/volume{n}"), "type": "b", "major": major, "minor": minor});
    fixture.devices = (0..count).map(device).collect();
    fixture.resources = json!({"devices": [
        {"allow": true, "type": "b", "major": major, "minor": minor, "access": "rm"},
    ]});
}

/// A machine that runs a container without disks, and the numbers of the next one's
/// `count` disks; none on a host without a disk.
async fn booted(count: usize) -> Option<(Fixture, (i64, i64))> {
    let numbers = some_disk()?;
    let mut fixture = Fixture::new().await;
    fixture.run("plain", "sleep 60").await;
    give(&mut fixture, numbers, count);
    Some((fixture, numbers))
}

#[tokio::test]
async fn disks_come_with_containers_and_go_with_them() {
    let Some((fixture, _)) = booted(1).await else {
        return;
    };
    fixture.run("one", "exit 0").await;
    fixture.wait("one", "").await;
    fixture.run("two", "sleep 60").await;
    let full = fixture.create("three", "sleep 60").await.unwrap_err();
    assert!(full.to_string().contains("pod_disks"), "{full}");

    fixture.delete("one", "").await.unwrap();
    fixture.run("three", "sleep 60").await;
    let journal = lock(&fixture.journal).clone();
    let disks: Vec<_> = journal.iter().filter(|s| s.starts_with("slot")).collect();
    assert_eq!(
        disks,
        [
            "slot0 read-only",
            "slot1 read-only",
            "slot0 empty",
            "slot0 read-only"
        ]
    );
}

#[tokio::test]
async fn a_container_that_cannot_be_made_keeps_no_disk() {
    let Some((mut fixture, numbers)) = booted(3).await else {
        return;
    };
    fixture.create("greedy", "sleep 60").await.unwrap_err();
    give(&mut fixture, numbers, 2);
    fixture.run("modest", "sleep 60").await;
}

#[tokio::test]
async fn a_disk_that_is_refused_can_be_had_later() {
    let Some((mut fixture, numbers)) = booted(1).await else {
        return;
    };
    let machine = lock(&fixture.machine).clone().unwrap();
    machine.disks(Disks::Refuse);
    let refused = fixture.create("unlucky", "sleep 60").await.unwrap_err();
    assert!(
        refused.to_string().contains("slot0: not this one"),
        "{refused}"
    );
    machine.disks(Disks::Exchange);
    give(&mut fixture, numbers, 2);
    fixture.run("lucky", "sleep 60").await;
}

/// The guest uses a device of the host as long as a disk is busy.
#[tokio::test]
async fn a_container_is_not_gone_before_its_disks_are() {
    let Some((mut fixture, numbers)) = booted(1).await else {
        return;
    };
    fixture.run("one", "exit 3").await;
    fixture.wait("one", "").await;
    let machine = lock(&fixture.machine).clone().unwrap();
    machine.disks(Disks::Busy);
    for _ in 0..2 {
        let busy = fixture.delete("one", "").await.unwrap_err();
        assert!(busy.to_string().contains("disk slot0"), "{busy}");
        assert_eq!(fixture.status("one").await, Status::STOPPED);
    }
    machine.disks(Disks::Exchange);
    give(&mut fixture, numbers, 2);
    let full = fixture.create("two", "sleep 60").await.unwrap_err();
    assert!(full.to_string().contains("pod_disks"), "{full}");
    assert_eq!(fixture.delete("one", "").await.unwrap().exit_status, 3);
    fixture.run("two", "sleep 60").await;
    fixture.expect(&["create", "start"]).await;
    fixture.expect(&["create", "start", "exit", "delete"]).await;
    fixture.expect(&["create", "start"]).await;
}

/// Nobody deletes it.
#[tokio::test]
async fn a_machine_ends_with_a_container_that_was_not_made_and_keeps_a_disk() {
    let Some((fixture, _)) = booted(1).await else {
        return;
    };
    let machine = lock(&fixture.machine).clone().unwrap();
    machine.disks(Disks::Busy);
    let busy = fixture.create("two", "sleep 60").await.unwrap_err();
    assert!(busy.to_string().contains("disk slot0"), "{busy}");
    assert_eq!(fixture.wait("plain", "").await, 137);
}

/// Returns when this is in the journal.
async fn until(fixture: &Fixture, what: &str) {
    let is_there = async {
        while !lock(&fixture.journal).iter().any(|line| line == what) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let in_time = tokio::time::timeout(Duration::from_secs(10), is_there);
    in_time.await.expect(what);
}

#[tokio::test]
async fn no_disk_waits_for_another_to_be_taken_back() {
    let Some((fixture, _)) = booted(2).await else {
        return;
    };
    fixture.run("two", "exit 0").await;
    fixture.wait("two", "").await;
    let machine = lock(&fixture.machine).clone().unwrap();
    machine.disks(Disks::Wait);
    let both = async {
        until(&fixture, "slot0 empty").await;
        until(&fixture, "slot1 empty").await;
        machine.disks(Disks::Exchange);
    };
    let (deleted, ()) = tokio::join!(fixture.delete("two", ""), both);
    deleted.unwrap();
}

#[tokio::test]
async fn a_container_that_waits_for_its_disk_keeps_no_other_waiting() {
    let Some(numbers) = some_disk() else { return };
    let mut fixture = Fixture::new().await;
    fixture.run("plain", "exit 0").await;
    fixture.wait("plain", "").await;
    give(&mut fixture, numbers, 1);
    let machine = lock(&fixture.machine).clone().unwrap();
    machine.disks(Disks::Wait);
    let request = CreateTaskRequest {
        id: "waits".into(),
        bundle: fixture.bundle("waits", "sleep 60"),
        ..Default::default()
    };
    (fixture.devices, fixture.resources) = (json!([]), json!({}));
    let others = async {
        until(&fixture, "slot0 read-only").await;
        fixture.delete("plain", "").await.unwrap();
        fixture.run("other", "exit 0").await;
        fixture.wait("other", "").await;
        machine.disks(Disks::Exchange);
    };
    let (created, ()) = tokio::join!(fixture.client.create(context(), &request), others);
    created.unwrap();
}

/// A container whose image has two layers.
async fn create_of_layers(fixture: &Fixture, id: &str) -> ttrpc::Result<CreateTaskResponse> {
    let request = of_layers(fixture, id);
    fixture.client.create(context(), &request).await
}

fn of_layers(fixture: &Fixture, id: &str) -> CreateTaskRequest {
    let layer = fixture.path("layer.erofs");
    std::fs::write(&layer, [0; 4096]).unwrap();
    let layer = Mount {
        type_: "erofs".into(),
        source: layer.to_str().unwrap().into(),
        ..Default::default()
    };
    let overlay = Mount {
        type_: "format/mkdir/overlay".into(),
        options: vec!["lowerdir={{ overlay 0 1 }}".into()],
        ..Default::default()
    };
    CreateTaskRequest {
        id: id.into(),
        bundle: fixture.bundle(id, "sleep 60"),
        rootfs: vec![layer.clone(), layer, overlay],
        ..Default::default()
    }
}

/// What became of the disks for layers, in order.
fn layers(fixture: &Fixture) -> Vec<String> {
    let journal = lock(&fixture.journal);
    let disks = journal.iter().filter(|line| line.starts_with("root"));
    disks.cloned().collect()
}

#[tokio::test]
async fn layers_of_containers_that_join_are_disks_while_they_are_there() {
    let fixture = Fixture::new().await;
    fixture.run("first", "sleep 60").await;
    create_of_layers(&fixture, "one").await.unwrap();
    create_of_layers(&fixture, "two").await.unwrap();
    fixture.delete("one", "").await.unwrap();
    create_of_layers(&fixture, "three").await.unwrap();
    let journal = lock(&fixture.journal).clone();
    let disks: Vec<_> = journal.iter().filter(|s| s.contains("root")).collect();
    assert_eq!(
        disks,
        [
            "root0 2 layers",
            "one waits for root0, 8192 bytes in sectors of 512",
            "root1 2 layers",
            "two waits for root1, 8192 bytes in sectors of 512",
            "root0 empty",
            "root0 2 layers",
            "three waits for root0, 8192 bytes in sectors of 512",
        ]
    );
}

/// Something of it may be written when the next one's file systems are there.
#[tokio::test]
async fn a_disk_that_the_guest_does_not_let_go_of_is_no_other_container_s() {
    let fixture = Fixture::new().await;
    fixture.run("first", "sleep 60").await;
    create_of_layers(&fixture, "held").await.unwrap();
    fixture.delete("held", "").await.unwrap();
    create_of_layers(&fixture, "next").await.unwrap();
    let expected = ["root0 2 layers", "root0 empty", "root1 2 layers"];
    assert_eq!(layers(&fixture), expected);
}

/// It may have mounted them.
#[tokio::test]
async fn nor_is_one_of_a_container_that_the_guest_does_not_make_in_time() {
    let fixture = Fixture::new().await;
    fixture.run("first", "sleep 60").await;
    let machine = lock(&fixture.machine).clone().unwrap();
    machine.answers(1).await;
    machine.hang();
    let time_passes = async {
        machine.held(1).await;
        pause();
        advance(CREATE_TIMEOUT).await;
        resume();
    };
    let request = of_layers(&fixture, "late");
    let created = fixture
        .client
        .create(with_duration(2 * CREATE_TIMEOUT), &request);
    let (created, ()) = tokio::join!(created, time_passes);
    let (_, text) = refusal(created);
    assert!(text.contains("no answer within 60 s"), "{text}");
    machine.recover();
    create_of_layers(&fixture, "next").await.unwrap();
    let expected = ["root0 2 layers", "root0 empty", "root1 2 layers"];
    assert_eq!(layers(&fixture), expected);
}

/// The guest has made nothing, and says that something uses its disk all the same.
#[tokio::test]
async fn nor_is_one_of_a_container_that_the_guest_cannot_undo() {
    let fixture = Fixture::new().await;
    fixture.run("first", "sleep 60").await;
    let (_, text) = refusal(create_of_layers(&fixture, "aborted").await);
    assert!(text.contains("its disk is in use"), "{text}");
    create_of_layers(&fixture, "next").await.unwrap();
    let expected = ["root0 2 layers", "root0 empty", "root1 2 layers"];
    assert_eq!(layers(&fixture), expected);
}

#[tokio::test]
async fn layers_of_a_container_that_is_not_made_are_taken_back() {
    let fixture = Fixture::new().await;
    fixture.run("first", "sleep 60").await;
    let machine = lock(&fixture.machine).clone().unwrap();
    machine.disks(Disks::Refuse);
    let refused = create_of_layers(&fixture, "unlucky").await.unwrap_err();
    assert!(
        refused.to_string().contains("root0: not this one"),
        "{refused}"
    );
    machine.disks(Disks::Exchange);
    for id in ["one", "two"] {
        create_of_layers(&fixture, id).await.unwrap();
    }
}
