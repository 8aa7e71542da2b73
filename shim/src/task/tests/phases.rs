//! What a container allows by what it is doing, and the codes of what it does not.

use containerd_shim_protos::api::*;
use serde_json::json;
use ttrpc::Code;

use super::fixture::*;
use crate::task::lock;

/// The codes of these calls, in this order: start, exec, pause, resume, update, stats,
/// the size of the terminal, the end of the input; without `allowed`, which would change
/// what the container is doing.
async fn codes(fixture: &Fixture, id: &str, allowed: &str) -> Vec<Option<Code>> {
    fn code_of<T: std::fmt::Debug>(answer: ttrpc::Result<T>) -> Option<Code> {
        answer.is_err().then(|| code(answer))
    }
    let pids = json!({"pids": {"limit": 5}});
    let mut codes = Vec::new();
    for call in [
        "start", "exec", "pause", "resume", "update", "stats", "size", "input",
    ] {
        codes.push(match call {
            _ if call == allowed => continue,
            "start" => code_of(fixture.start(id, "").await),
            "exec" => code_of(fixture.exec(id, "e", "true").await),
            "pause" => code_of(fixture.pause(id).await),
            "resume" => code_of(fixture.resume(id).await),
            "update" => code_of(fixture.update(id, &pids).await),
            "stats" => code_of(fixture.stats(id).await),
            "size" => code_of(fixture.resize(id, "").await),
            _ => code_of(fixture.close_input(id, "").await),
        });
    }
    codes
}

#[tokio::test]
async fn each_phase_allows_what_it_allows() {
    let fixture = Fixture::new().await;
    fixture.create("created", "sleep 60").await.unwrap();
    for id in ["running", "paused", "stopped"] {
        fixture.run(id, "sleep 60").await;
    }
    fixture.pause("paused").await.unwrap();
    fixture.kill("stopped", "").await.unwrap();
    fixture.wait("stopped", "").await;
    let wrong = Some(Code::FAILED_PRECONDITION);
    let none = Some(Code::NOT_FOUND);
    for (id, status, allowed, expected) in [
        (
            "created",
            Some(Status::CREATED),
            "start",
            // Its cgroup and its terminal are there.
            [wrong, wrong, wrong, None, None, None, None],
        ),
        (
            "running",
            Some(Status::RUNNING),
            "pause",
            [wrong, None, wrong, None, None, None, None],
        ),
        (
            "paused",
            Some(Status::PAUSED),
            "resume",
            [wrong, wrong, wrong, None, None, None, None],
        ),
        (
            "stopped",
            Some(Status::STOPPED),
            "start",
            // Its cgroup is there until it is deleted, its process is not.
            [wrong, wrong, wrong, None, None, none, None],
        ),
        ("missing", None, "start", [none; 7]),
    ] {
        assert_eq!(codes(&fixture, id, allowed).await, expected, "{id}");
        if let Some(status) = status {
            assert_eq!(fixture.status(id).await, status, "{id}");
        }
    }
    let start = fixture.start("stopped", "").await;
    assert_eq!(Some(code(start)), wrong);
    assert_eq!(Some(code(fixture.pause("paused").await)), wrong);
    assert_eq!(Some(code(fixture.kill("missing", "").await)), none);
    assert_eq!(Some(code(fixture.delete("missing", "").await)), none);
    let paused = fixture.delete("paused", "").await;
    assert_eq!(Some(code(paused)), wrong);
}

#[tokio::test]
async fn execs_that_are_missing_or_have_ended() {
    let fixture = Fixture::new().await;
    fixture.run("c", "sleep 60").await;
    let calls = async |exec_id: &'static str| {
        [
            fixture.start("c", exec_id).await.map(drop),
            fixture.kill("c", exec_id).await.map(drop),
            fixture.resize("c", exec_id).await.map(drop),
        ]
        .map(code)
    };
    let none = Code::NOT_FOUND;
    assert_eq!(calls("missing").await, [none; 3]);
    assert_eq!(code(fixture.close_input("c", "missing").await), none);
    fixture.exec("c", "e", "exit 3").await.unwrap();
    fixture.start("c", "e").await.unwrap();
    assert_eq!(fixture.wait("c", "e").await, 3);
    let wrong = Code::FAILED_PRECONDITION;
    assert_eq!(calls("e").await, [wrong, none, none]);
    // A client that closes its input late does no harm.
    fixture.close_input("c", "e").await.unwrap();
}

#[tokio::test]
async fn a_container_that_does_not_freeze_runs_on() {
    let mut fixture = Fixture::new().await;
    fixture.run("stubborn", "sleep 60").await;
    lock(&fixture.machine).clone().unwrap().keeps_phases();
    let expected = (
        Code::FAILED_PRECONDITION,
        of_pod("guest: pause: does not freeze"),
    );
    assert_eq!(refusal(fixture.pause("stubborn").await), expected);
    assert_eq!(fixture.status("stubborn").await, Status::RUNNING);
    fixture.exec("stubborn", "e", "true").await.unwrap();
    fixture.expect(&["create", "start", "exec-added"]).await;
}

#[tokio::test]
async fn a_container_that_does_not_thaw_stays_paused() {
    let mut fixture = Fixture::new().await;
    fixture.run("frozen", "sleep 60").await;
    fixture.pause("frozen").await.unwrap();
    lock(&fixture.machine).clone().unwrap().keeps_phases();
    let expected = (
        Code::FAILED_PRECONDITION,
        of_pod("guest: resume: does not thaw"),
    );
    assert_eq!(refusal(fixture.resume("frozen").await), expected);
    assert_eq!(fixture.status("frozen").await, Status::PAUSED);
    fixture.kill("frozen", "").await.unwrap();
    assert_eq!(fixture.wait("frozen", "").await, 137);
    let topics = ["create", "start", "paused", "exit"];
    fixture.expect(&topics).await;
}

/// What the kernel knows as signals, and what it does not.
#[tokio::test]
async fn numbers_that_are_no_signals() {
    let mut fixture = Fixture::new().await;
    fixture.create("created", "sleep 60").await.unwrap();
    fixture.run("running", "sleep 60").await;
    fixture.annotations = json!({"io.kubernetes.cri.container-type": "sandbox"});
    fixture.run("sandbox", "").await;
    for id in ["created", "running", "sandbox"] {
        for signal in [65, 1000, u32::MAX] {
            let request = KillRequest {
                id: id.into(),
                signal,
                ..Default::default()
            };
            let answer = fixture.client.kill(context(), &request).await;
            assert_eq!(code(answer), Code::INVALID_ARGUMENT, "{id} {signal}");
        }
    }
    assert_eq!(fixture.status("created").await, Status::CREATED);
    assert_eq!(fixture.status("sandbox").await, Status::RUNNING);
}

#[tokio::test]
async fn ids_as_long_as_they_may_be_and_longer() {
    let fixture = Fixture::new().await;
    let (longest, too_long) = ("x".repeat(255), "x".repeat(256));
    let bundle = fixture.bundle("bundle", "sleep 60");
    let create = async |id: &str| {
        let request = CreateTaskRequest {
            id: id.into(),
            bundle: bundle.clone(),
            ..Default::default()
        };
        fixture.client.create(context(), &request).await
    };
    let invalid = Code::INVALID_ARGUMENT;
    for id in [too_long.as_str(), "", ".", "..", "a/b", "a\0b"] {
        assert_eq!(code(create(id).await), invalid, "{id:?}");
    }
    create(&longest).await.unwrap();
    fixture.start(&longest, "").await.unwrap();
    for exec_id in [too_long.as_str(), "", "../e"] {
        let exec = fixture.exec(&longest, exec_id, "true").await;
        assert_eq!(code(exec), invalid, "{exec_id:?}");
    }
    fixture.exec(&longest, &longest, "exit 4").await.unwrap();
    fixture.start(&longest, &longest).await.unwrap();
    assert_eq!(fixture.wait(&longest, &longest).await, 4);
}

#[tokio::test]
async fn a_stream_that_cannot_be_had_is_named() {
    let fixture = Fixture::new().await;
    let request = CreateTaskRequest {
        id: "c".into(),
        bundle: fixture.bundle("c", "true"),
        stdout: "/none/there/stdout".into(),
        ..Default::default()
    };
    let refused = fixture.client.create(context(), &request).await;
    let (code, message) = refusal(refused);
    assert_eq!(code, Code::INTERNAL);
    let expected = of_pod("open /none/there/stdout as stdout: ");
    assert!(message.starts_with(&expected), "{message}");
}
