//! A client that gives up and asks again, as kubelet does when a call takes too long:
//! what it asks for is made once, and nothing is left of the tries before.

use std::time::Duration;

use nacre_tests::cri::messages::PodSandboxMetadata;
use nacre_tests::pods::PodScene;
use nacre_tests::{PATIENCE, eventually};
use tonic::{Code, Status};

use crate::SLEEP;

in_both_modes![pods_and_containers_are_made_once_however_often_they_are_asked_for];

/// Too short for anything.
const FIRST: Duration = Duration::from_millis(1);

/// Makes a call with twice the time each time, until it is done in it: so it is given up
/// at one point after the other. `collect` removes what was done too late for anyone to
/// know, as kubelet would. How often it was given up, and what came of it.
fn until_done<T>(
    mut call: impl FnMut(Duration) -> Result<T, Status>,
    collect: impl Fn(),
) -> (u32, T) {
    let (mut limit, mut given_up) = (FIRST, 0);
    loop {
        let mut answer = None;
        eventually("the try before is at an end", || match call(limit) {
            Err(error) if error.message().contains("is reserved for") => {
                collect();
                false
            }
            other => {
                answer = Some(other);
                true
            }
        });
        match answer {
            Some(Ok(done)) => return (given_up, done),
            Some(Err(error)) => assert!(is_late(&error) && limit < PATIENCE, "{error}"),
            None => unreachable!("it waits for one"),
        }
        limit *= 2;
        given_up += 1;
    }
}

/// Whether a call was given up: by this client, or by containerd, which knows of the limit.
fn is_late(error: &Status) -> bool {
    let words = ["context deadline exceeded", "context canceled"];
    matches!(error.code(), Code::DeadlineExceeded | Code::Cancelled)
        || words.iter().any(|words| error.message().contains(words))
}

fn pods_and_containers_are_made_once_however_often_they_are_asked_for(scene: &PodScene) {
    let cri = scene.cri();
    let manifest = scene.pod("impatient");
    let is_ours = |metadata: &Option<PodSandboxMetadata>| {
        let metadata = metadata.as_ref();
        metadata.is_some_and(|metadata| metadata.name.starts_with("impatient-"))
    };
    let (given_up, pod) = until_done(
        |limit| manifest.clone().within(limit).try_run(),
        || {
            for late in cri.pods().unwrap() {
                if is_ours(&late.metadata) {
                    cri.stop_pod(&late.id).unwrap();
                    cri.remove_pod(&late.id).unwrap();
                }
            }
        },
    );
    assert_ne!(given_up, 0);
    let made = cri.pods().unwrap();
    assert_eq!(made.iter().filter(|pod| is_ours(&pod.metadata)).count(), 1);

    let container = pod.container("app", SLEEP);
    let of_the_pod = || {
        let all = cri.containers().unwrap().into_iter();
        all.filter(|container| container.pod_sandbox_id == pod.id)
            .collect::<Vec<_>>()
    };
    let (given_up, app) = until_done(
        |limit| container.clone().within(limit).try_create(),
        || {
            for late in of_the_pod() {
                cri.remove(&late.id).unwrap();
            }
        },
    );
    assert_ne!(given_up, 0);
    assert_eq!(of_the_pod().len(), 1);
    app.start();
    app.exec(&["echo", "here"]).exits(0).prints("here\n");
}
