//! OCI hooks (runtime-spec 1.2, config.md, "POSIX-platform Hooks").
//!
//! | hook | where | when | when it fails |
//! |---|---|---|---|
//! | `prestart`, `createRuntime` | host | the monitor process stands in the pod's network namespace, the guest has not booted | the create fails |
//! | `createContainer` | a program of the host inside the container | never: refused | the create fails |
//! | `startContainer` | guest, by the agent | before the container's process | the start fails, the container ends |
//! | `poststart` | host | the container's process runs, its start has not returned | logged |
//! | `poststop` | host | the container is deleted, or its create failed after the first two, or its shim died | logged |
//!
//! nerdctl configures the network in a `createRuntime` hook, by the pid of the
//! state it gets on stdin.
//!
//! Hooks of the host run where the shim was started, as runc's do: in containerd's
//! mount namespace, not in the shim's own, and in containerd's cgroup, not in the pod's. A file in the bundle says that `poststop` is
//! due; whoever removes it, the shim or after its death `delete`, runs these hooks.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nacre_protocol::hook::{self, HookError};
use nix::sched::{CloneFlags, setns, unshare};
use oci_spec::runtime::{ContainerState, Hook, Hooks, Spec, State};
use tracing::warn;

use crate::cgroup;
use crate::oci::kubernetes;
use crate::sandbox::{ContainerConfig, SandboxError};

/// nerdctl reads the network namespace from here.
const NERDCTL_NETNS: &str = "nerdctl/network-namespace";
/// In the bundle of a container whose `poststop` hooks are still to be run.
const DUE: &str = "nacre-poststop";

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

/// Runs hooks on the host. A future of it that is dropped kills the hook that runs.
#[derive(Debug, Clone, Default)]
pub struct Runner {
    /// Those of the caller if `None`.
    mounts: Option<Arc<File>>,
}

impl Runner {
    /// Runs them in the mount namespace this thread is in now.
    ///
    /// # Errors
    ///
    /// When that cannot be opened.
    pub fn here() -> io::Result<Self> {
        let mounts = File::open("/proc/thread-self/ns/mnt")?;
        Ok(Self {
            mounts: Some(Arc::new(mounts)),
        })
    }

    /// Runs `prestart`, then `createRuntime`, up to the first that fails. From here on
    /// `poststop` is due.
    ///
    /// # Errors
    ///
    /// That hook's; `Io` when the bundle cannot be written to.
    pub async fn create(&self, config: &ContainerConfig, pid: u32) -> Result<(), SandboxError> {
        let mut state = state(config, ContainerState::Creating, Some(pid));
        let annotations: &mut HashMap<_, _> = state.annotations_mut().get_or_insert_default();
        annotations
            .entry(NERDCTL_NETNS.into())
            .or_insert_with(|| format!("/proc/{pid}/ns/net"));
        if !of(&config.spec, Hooks::poststop).is_empty() {
            let due = config.bundle.join(DUE);
            File::create(&due).map_err(|source| SandboxError::Io {
                what: format!("make {}", due.display()),
                source,
            })?;
        }
        #[allow(deprecated, reason = "prestart is what older clients still set")]
        let lists = [
            of(&config.spec, Hooks::prestart),
            of(&config.spec, Hooks::create_runtime),
        ];
        for hook in lists.into_iter().flatten() {
            self.run(hook, config, &state).await?;
        }
        Ok(())
    }

    /// Runs `poststart`.
    pub async fn started(&self, config: &ContainerConfig, pid: u32) {
        let state = state(config, ContainerState::Running, Some(pid));
        self.run_all(Hooks::poststart, config, &state).await;
    }

    /// Runs `poststop` if that is due.
    pub async fn stopped(&self, config: &ContainerConfig) {
        match fs::remove_file(config.bundle.join(DUE)) {
            Ok(()) => (),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => {
                warn!(container_id = config.id, %error, "poststop hooks stay due");
                return;
            }
        }
        let state = state(config, ContainerState::Stopped, None);
        self.run_all(Hooks::poststop, config, &state).await;
    }

    /// Runs hooks that change nothing when they fail (runtime-spec 1.2, runtime.md,
    /// "Lifecycle", steps 9 and 13: log a warning, go on with the next).
    async fn run_all(
        &self,
        list: fn(&Hooks) -> &Option<Vec<Hook>>,
        config: &ContainerConfig,
        state: &State,
    ) {
        for hook in of(&config.spec, list) {
            if let Err(error) = self.run(hook, config, state).await {
                let error = crate::error::chain(&error);
                warn!(container_id = config.id, error, "hook");
            }
        }
    }

    /// Runs one hook where it may block, in the bundle.
    async fn run(
        &self,
        hook: &Hook,
        config: &ContainerConfig,
        state: &State,
    ) -> Result<(), HookError> {
        let mut command = hook::command(hook);
        command.current_dir(&config.bundle);
        let path = hook.path().display().to_string();
        let failed = |source| HookError::Run { path, source };
        let outside = cgroup::start_outside(&mut command);
        let (cancelled, _cancel) = match outside.and_then(|()| io::pipe()) {
            Ok(pipe) => pipe,
            Err(error) => return Err(failed(error)),
        };
        let (hook, state, mounts) = (hook.clone(), state.clone(), self.mounts.clone());
        let run = tokio::task::spawn_blocking(move || {
            let run = || hook::run(&hook, command, &state, Some(&cancelled));
            match mounts {
                Some(mounts) => within(&mounts, run),
                None => Ok(run()),
            }
        });
        match run.await {
            Ok(result) => result.map_err(failed)?,
            Err(error) => resume_unwind(error.into_panic()),
        }
    }
}

/// Does something in a mount namespace: in a thread of its own, since none gets back
/// what it shared of the process's root and working directory (setns(2)).
fn within<T: Send>(mounts: &File, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let inside = || -> io::Result<T> {
            unshare(CloneFlags::CLONE_FS)?;
            setns(mounts, CloneFlags::CLONE_NEWNS)?;
            Ok(work())
        };
        let thread = std::thread::Builder::new().spawn_scoped(scope, inside)?;
        thread.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
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
        let runner = Runner::default();
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
        runner.create(&config, 42).await.unwrap();
        let created = read_state(bundle.path(), "created");
        assert_eq!(created, read_state(bundle.path(), "prestart"));
        assert_eq!(created["status"], "creating");
        assert_eq!(created["pid"], 42);
        assert_eq!(created["bundle"], json!(bundle.path()));
        assert_eq!(created["annotations"][NERDCTL_NETNS], "/proc/42/ns/net");
        assert!(!bundle.path().join("started").exists());
        runner.started(&config, 42).await;
        let state = read_state(bundle.path(), "started");
        assert_eq!(
            (&state["status"], &state["pid"]),
            (&"running".into(), &42.into())
        );
        assert!(!bundle.path().join("stopped").exists());
        runner.stopped(&config).await;
        let state = read_state(bundle.path(), "stopped");
        assert_eq!(state["status"], "stopped");
        assert_eq!(state.get("pid"), None);
        assert_eq!(state["annotations"], json!({"a": "b"}));
    }

    #[tokio::test]
    async fn a_failing_hook_ends_a_create_and_nothing_else() {
        let runner = Runner::default();
        let bundle = tempfile::tempdir().unwrap();
        let list = json!([hook("echo no bridge >&2; exit 3"), hook("echo > second")]);
        let second = bundle.path().join("second");
        let on_create = config(bundle.path(), &json!({"createRuntime": list}));
        let error = runner.create(&on_create, 42).await.unwrap_err();
        assert!(error.to_string().contains("no bridge"), "{error}");
        assert!(!second.exists());
        let later = config(bundle.path(), &json!({"poststart": list, "poststop": list}));
        runner.create(&later, 42).await.unwrap();
        runner.started(&later, 42).await;
        std::fs::remove_file(&second).unwrap();
        runner.stopped(&later).await;
        assert!(second.exists());
    }

    #[tokio::test]
    async fn poststop_runs_once_and_only_after_a_create() {
        let runner = Runner::default();
        let bundle = tempfile::tempdir().unwrap();
        let hooks = json!({
            "createRuntime": [hook("exit 3")],
            "poststop": [hook("echo >> stopped")],
        });
        let config = config(bundle.path(), &hooks);
        runner.stopped(&config).await;
        assert!(!bundle.path().join("stopped").exists());
        runner.create(&config, 42).await.unwrap_err();
        for _ in 0..2 {
            runner.stopped(&config).await;
        }
        assert_eq!(fs::read(bundle.path().join("stopped")).unwrap(), b"\n");
    }

    /// Whoever removes the file runs them.
    #[tokio::test]
    async fn poststop_that_stays_due_does_not_run() {
        let bundle = tempfile::tempdir().unwrap();
        let config = config(
            bundle.path(),
            &json!({"poststop": [hook("echo > stopped")]}),
        );
        // No file, so it cannot be removed as one.
        fs::create_dir(bundle.path().join(DUE)).unwrap();
        Runner::default().stopped(&config).await;
        assert!(!bundle.path().join("stopped").exists());
    }

    /// As the shim's runtime does with what is left of its tasks at its end.
    #[tokio::test]
    async fn a_hook_ends_with_who_waits_for_it() {
        let bundle = tempfile::tempdir().unwrap();
        let pipe = bundle.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let script = hook("exec >pipe; echo began; (sleep 20; echo outlived); true");
        let config = config(bundle.path(), &json!({"createRuntime": [script]}));
        let waiting = tokio::spawn(async move { Runner::default().create(&config, 42).await });
        let read = |count| {
            let pipe = pipe.clone();
            tokio::task::spawn_blocking(move || {
                let mut said = File::open(pipe).unwrap();
                std::io::Read::read_exact(&mut said, &mut vec![0; count]).unwrap();
                said
            })
        };
        let mut said = read(6).await.unwrap();
        waiting.abort();
        assert!(waiting.await.unwrap_err().is_cancelled());
        let rest = tokio::task::spawn_blocking(move || {
            let mut rest = String::new();
            std::io::Read::read_to_string(&mut said, &mut rest).unwrap();
            rest
        });
        let rest = tokio::time::timeout(Duration::from_secs(60), rest).await;
        assert_eq!(rest.unwrap().unwrap(), "");
    }

    #[test]
    fn hooks_run_among_the_mounts_the_shim_was_started_in() {
        let started = Runner::here().unwrap();
        if let Err(errno) = unshare(CloneFlags::CLONE_NEWNS) {
            eprintln!("skipped: no mount namespace: {errno}");
            return;
        }
        let mounts = || fs::read_link("/proc/thread-self/ns/mnt").unwrap();
        let bundle = tempfile::tempdir().unwrap();
        let script = hook("readlink /proc/self/ns/mnt > mounts; pwd > directory");
        let config = config(bundle.path(), &json!({"createRuntime": [script]}));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let own = mounts();
        runtime.block_on(started.create(&config, 42)).unwrap();
        let read = |name| fs::read_to_string(bundle.path().join(name)).unwrap();
        let process = fs::read_link("/proc/self/ns/mnt").unwrap();
        assert_eq!(read("mounts").trim(), process.to_str().unwrap());
        assert_eq!(read("directory").trim(), bundle.path().to_str().unwrap());
        assert_eq!(mounts(), own);
        assert_ne!(own, process);
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
