//! OCI hooks (runtime-spec 1.2, config.md, "POSIX-platform Hooks").
//!
//! | hook | where | when | when it fails |
//! |---|---|---|---|
//! | `prestart`, `createRuntime` | host | the monitor process stands in the pod's network namespace, the guest has not booted | the create fails |
//! | `createContainer` | a program of the host inside the container | never: refused | the create fails |
//! | `startContainer` | guest, by the agent | before the container's process | the start fails, the container ends |
//! | `poststart` | host | the container's process runs, its start has not returned | logged |
//! | `poststop` | host | the container is deleted | logged |
//!
//! nerdctl configures the network in a `createRuntime` hook, by the pid of the
//! state it gets on stdin.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use nacre_protocol::hook::{self, HookError};
use oci_spec::runtime::{ContainerState, Hook, Hooks, Spec, State};
use tracing::warn;

use crate::oci::kubernetes;
use crate::sandbox::ContainerConfig;

/// nerdctl reads the network namespace from here.
const NERDCTL_NETNS: &str = "nerdctl/network-namespace";

/// A hook that cannot be run as it is meant.
#[derive(Debug, thiserror::Error)]
pub enum HookRefused {
    /// The host's program, the guest's namespaces.
    #[error(
        "container {container_id}: createContainer hook {} is a program of the host that runs \
         inside the container, which a virtual machine makes impossible; use createRuntime for \
         the host's programs and startContainer for the container's",
        path.display()
    )]
    CreateContainer {
        /// Whose.
        container_id: String,
        /// The program.
        path: PathBuf,
    },
    /// There is no process that it would run before.
    #[error(
        "container {container_id}: startContainer hook {} has nothing to run in: a pod's sandbox \
         container has no process in a virtual machine",
        path.display()
    )]
    Sandbox {
        /// Whose.
        container_id: String,
        /// The program.
        path: PathBuf,
    },
}

/// Refuses a container whose hooks cannot all be run.
///
/// # Errors
///
/// The first one of those.
pub fn check(config: &ContainerConfig) -> Result<(), HookRefused> {
    let first = |get| {
        of(&config.spec, get)
            .first()
            .map(|hook| hook.path().clone())
    };
    if let Some(path) = first(Hooks::create_container) {
        return Err(HookRefused::CreateContainer {
            container_id: config.id.clone(),
            path,
        });
    }
    match first(Hooks::start_container) {
        Some(path) if kubernetes::is_sandbox(&config.spec) => Err(HookRefused::Sandbox {
            container_id: config.id.clone(),
            path,
        }),
        _ => Ok(()),
    }
}

/// How long the guest may run a container's hooks before its process.
pub fn time_in_guest(spec: &Spec) -> Duration {
    let hooks = of(spec, Hooks::start_container).iter();
    hooks.map(hook::timeout).sum()
}

/// Runs `prestart`, then `createRuntime`, up to the first that fails.
///
/// # Errors
///
/// That hook's.
pub async fn create(config: &ContainerConfig, pid: u32) -> Result<(), HookError> {
    let mut state = state(config, ContainerState::Creating, Some(pid));
    let annotations: &mut HashMap<_, _> = state.annotations_mut().get_or_insert_default();
    annotations
        .entry(NERDCTL_NETNS.into())
        .or_insert_with(|| format!("/proc/{pid}/ns/net"));
    #[allow(deprecated, reason = "prestart is what older clients still set")]
    let lists = [
        of(&config.spec, Hooks::prestart),
        of(&config.spec, Hooks::create_runtime),
    ];
    for hook in lists.into_iter().flatten() {
        run(hook, config, &state).await?;
    }
    Ok(())
}

/// Runs `poststart`.
pub async fn started(config: &ContainerConfig, pid: u32) {
    let state = state(config, ContainerState::Running, Some(pid));
    run_all(Hooks::poststart, config, &state).await;
}

/// Runs `poststop`.
pub async fn stopped(config: &ContainerConfig) {
    let state = state(config, ContainerState::Stopped, None);
    run_all(Hooks::poststop, config, &state).await;
}

/// Runs hooks that change nothing when they fail (runtime-spec 1.2, runtime.md,
/// "Lifecycle", steps 9 and 13: log a warning, go on with the next).
async fn run_all(list: fn(&Hooks) -> &Option<Vec<Hook>>, config: &ContainerConfig, state: &State) {
    for hook in of(&config.spec, list) {
        if let Err(error) = run(hook, config, state).await {
            let error = crate::error::chain(&error);
            warn!(container_id = config.id, error, "hook");
        }
    }
}

fn of(spec: &Spec, list: fn(&Hooks) -> &Option<Vec<Hook>>) -> &[Hook] {
    let hooks = spec.hooks().as_ref();
    hooks
        .and_then(|hooks| list(hooks).as_deref())
        .unwrap_or_default()
}

/// The container's state (runtime-spec, runtime.md, "State").
fn state(config: &ContainerConfig, status: ContainerState, pid: Option<u32>) -> State {
    let mut state = State::default();
    state
        .set_version(config.spec.version().clone())
        .set_id(config.id.clone())
        .set_status(status)
        .set_pid(pid.and_then(|pid| i32::try_from(pid).ok()))
        .set_bundle(config.bundle.clone())
        .set_annotations(config.spec.annotations().clone());
    state
}

/// Runs one hook where it may block, in the bundle.
async fn run(hook: &Hook, config: &ContainerConfig, state: &State) -> Result<(), HookError> {
    let mut command = hook::command(hook);
    command.current_dir(&config.bundle);
    let (hook, state) = (hook.clone(), state.clone());
    let run = tokio::task::spawn_blocking(move || hook::run(&hook, command, &state));
    match run.await {
        Ok(result) => result,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::path::Path;
    use std::sync::Arc;

    fn config(bundle: &Path, hooks: &Value) -> ContainerConfig {
        let spec = json!({
            "ociVersion": "1.0.2", "annotations": {"a": "b"}, "hooks": hooks,
        });
        ContainerConfig {
            api: crate::sandbox::Api::Task,
            id: "c".into(),
            spec: Arc::new(serde_json::from_value(spec).unwrap()),
            bundle: bundle.to_owned(),
            rootfs: Vec::new(),
        }
    }

    fn hook(script: &str) -> Value {
        json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"]})
    }

    fn read_state(bundle: &Path, name: &str) -> Value {
        serde_json::from_slice(&std::fs::read(bundle.join(name)).unwrap()).unwrap()
    }

    #[tokio::test]
    async fn hooks_get_the_state_of_their_stage() {
        let bundle = tempfile::tempdir().unwrap();
        let config = config(
            bundle.path(),
            &json!({
                "prestart": [hook("test ! -e created && cat > prestart")],
                "createRuntime": [hook("cat > created")],
                "poststart": [hook("cat > started")],
                "poststop": [hook("cat > stopped")],
            }),
        );
        create(&config, 42).await.unwrap();
        let created = read_state(bundle.path(), "created");
        assert_eq!(created, read_state(bundle.path(), "prestart"));
        assert_eq!(created["status"], "creating");
        assert_eq!(created["pid"], 42);
        assert_eq!(created["bundle"], json!(bundle.path()));
        assert_eq!(created["annotations"][NERDCTL_NETNS], "/proc/42/ns/net");
        assert!(!bundle.path().join("started").exists());
        started(&config, 42).await;
        let state = read_state(bundle.path(), "started");
        assert_eq!(
            (&state["status"], &state["pid"]),
            (&"running".into(), &42.into())
        );
        assert!(!bundle.path().join("stopped").exists());
        stopped(&config).await;
        let state = read_state(bundle.path(), "stopped");
        assert_eq!(state["status"], "stopped");
        assert_eq!(state.get("pid"), None);
        assert_eq!(state["annotations"], json!({"a": "b"}));
    }

    #[tokio::test]
    async fn a_failing_hook_ends_a_create_and_nothing_else() {
        let bundle = tempfile::tempdir().unwrap();
        let list = json!([hook("echo no bridge >&2; exit 3"), hook("echo > second")]);
        let second = bundle.path().join("second");
        let on_create = config(bundle.path(), &json!({"createRuntime": list}));
        let error = create(&on_create, 42).await.unwrap_err();
        assert!(error.to_string().contains("no bridge"), "{error}");
        assert!(!second.exists());
        let later = config(bundle.path(), &json!({"poststart": list, "poststop": list}));
        started(&later, 42).await;
        std::fs::remove_file(&second).unwrap();
        stopped(&later).await;
        assert!(second.exists());
    }

    #[test]
    fn the_guest_has_as_long_as_its_hooks() {
        let hooks = json!({"startContainer": [
            {"path": "/a"}, {"path": "/b", "timeout": 5}, {"path": "/c", "timeout": i64::MAX},
        ]});
        let config = config(Path::new("/"), &hooks);
        assert_eq!(time_in_guest(&config.spec).as_secs(), 60 + 5 + 86400);
    }
}
