//! Block devices of containers, on a machine with two empty disks.

use serde_json::json;

use super::fixture::*;
use crate::storage::devices::some_disk;
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

#[tokio::test]
async fn disks_come_with_containers_and_go_with_them() {
    let Some(numbers) = some_disk() else { return };
    let mut fixture = Fixture::new().await;
    fixture.run("plain", "sleep 60").await;
    give(&mut fixture, numbers, 1);
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
    let Some(numbers) = some_disk() else { return };
    let mut fixture = Fixture::new().await;
    fixture.run("plain", "sleep 60").await;
    give(&mut fixture, numbers, 3);
    fixture.create("greedy", "sleep 60").await.unwrap_err();
    give(&mut fixture, numbers, 2);
    fixture.run("modest", "sleep 60").await;
}
