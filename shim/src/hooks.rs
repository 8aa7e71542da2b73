//! OCI hooks on the host (runtime-spec, config.md, "POSIX-platform Hooks").
//!
//! `prestart` and `createRuntime` run when the monitor process stands in the
//! pod's network namespace and before the guest boots: nerdctl configures the
//! network in one, by the pid of the state it gets on stdin. `poststop` runs
//! when a container is deleted. Hooks that belong inside the container
//! (`createContainer`, `startContainer`) would need the bundle in the guest and
//! do not run.

use std::collections::HashMap;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use oci_spec::runtime::{Hook, Spec};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// Time a hook without a limit of its own gets.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);
/// nerdctl reads the network namespace from here.
const NERDCTL_NETNS: &str = "nerdctl/network-namespace";

/// A hook failed.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It could not be run.
    #[error("run hook {path}")]
    Run {
        /// The program.
        path: String,
        /// The failure.
        source: std::io::Error,
    },
    /// It took too long.
    #[error("hook {path} took longer than {seconds} s")]
    Timeout {
        /// The program.
        path: String,
        /// Its limit.
        seconds: u64,
    },
    /// It said no.
    #[error("hook {path} failed ({status}): {stderr}")]
    Failed {
        /// The program.
        path: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// The end of what it said.
        stderr: String,
    },
}

/// When hooks run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// `prestart`, then `createRuntime`.
    Create,
    /// `poststop`.
    Stopped,
}

/// Runs a stage's hooks in order, up to the first that fails.
///
/// # Errors
///
/// That hook's.
pub async fn run(
    stage: Stage,
    spec: &Spec,
    container_id: &str,
    bundle: &Path,
    pid: u32,
) -> Result<(), HookError> {
    let Some(hooks) = spec.hooks() else {
        return Ok(());
    };
    #[allow(deprecated, reason = "prestart is what older clients still set")]
    let lists = match stage {
        Stage::Create => vec![hooks.prestart(), hooks.create_runtime()],
        Stage::Stopped => vec![hooks.poststop()],
    };
    let state = state(stage, spec, container_id, bundle, pid);
    for hook in lists.into_iter().flatten().flatten() {
        run_one(hook, &state, bundle).await?;
    }
    Ok(())
}

/// The container's state (runtime-spec, runtime.md, "State").
fn state(stage: Stage, spec: &Spec, container_id: &str, bundle: &Path, pid: u32) -> Vec<u8> {
    let mut annotations: HashMap<String, String> = spec.annotations().clone().unwrap_or_default();
    let status = match stage {
        Stage::Create => {
            annotations
                .entry(NERDCTL_NETNS.into())
                .or_insert_with(|| format!("/proc/{pid}/ns/net"));
            "creating"
        }
        Stage::Stopped => "stopped",
    };
    let mut state = serde_json::json!({
        "ociVersion": spec.version(),
        "id": container_id,
        "status": status,
        "bundle": bundle,
        "annotations": annotations,
    });
    if stage == Stage::Create {
        state["pid"] = pid.into();
    }
    state.to_string().into_bytes()
}

async fn run_one(hook: &Hook, state: &[u8], bundle: &Path) -> Result<(), HookError> {
    let path = hook.path().display().to_string();
    let failed = |source| HookError::Run {
        path: path.clone(),
        source,
    };
    let arguments = hook.args().clone().unwrap_or_default();
    let mut command = Command::new(hook.path());
    // The first argument is the program's own name.
    if let Some(name) = arguments.first() {
        command.arg0(name);
    }
    let environment = hook.env().clone().unwrap_or_default();
    let mut child = command
        .args(arguments.iter().skip(1))
        .env_clear()
        .envs(environment.iter().filter_map(|pair| pair.split_once('=')))
        .current_dir(bundle)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        match stdin.write_all(state).await {
            // A hook need not read its state.
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
                return Err(failed(error));
            }
            _ => (),
        }
    }
    let limit = hook
        .timeout()
        .and_then(|seconds| u64::try_from(seconds).ok())
        .filter(|seconds| *seconds > 0)
        .map_or(DEFAULT_TIMEOUT, Duration::from_secs);
    let output = tokio::time::timeout(limit, child.wait_with_output())
        .await
        .map_err(|_| HookError::Timeout {
            path: path.clone(),
            seconds: limit.as_secs(),
        })?
        .map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    Err(HookError::Failed {
        path: path.clone(),
        status: output.status,
        stderr: last_words(&output.stderr),
    })
}

fn last_words(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let lines: Vec<&str> = text.lines().rev().take(3).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec(script: &str) -> Spec {
        serde_json::from_value(json!({
            "ociVersion": "1.0.2",
            "hooks": {"createRuntime": [
                {"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"]},
            ]},
        }))
        .unwrap()
    }

    #[tokio::test]
    async fn a_hook_gets_the_pid_and_the_namespace() {
        let bundle = tempfile::tempdir().unwrap();
        let spec = spec("cat > state");
        run(Stage::Create, &spec, "c", bundle.path(), 42)
            .await
            .unwrap();
        let text = std::fs::read(bundle.path().join("state")).unwrap();
        let state: serde_json::Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(state["pid"], 42);
        assert_eq!(state["annotations"][NERDCTL_NETNS], "/proc/42/ns/net");
        // Other stages have no hook here.
        run(Stage::Stopped, &spec, "c", bundle.path(), 42)
            .await
            .unwrap();
    }

    #[tokio::test]
    async fn a_failing_hook_is_quoted() {
        let bundle = tempfile::tempdir().unwrap();
        let spec = spec("echo no bridge >&2; exit 3");
        let error = run(Stage::Create, &spec, "c", bundle.path(), 42)
            .await
            .unwrap_err();
        assert!(error.to_string().contains("no bridge"), "{error}");
    }
}
