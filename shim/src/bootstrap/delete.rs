//! `delete`: cleaning up when the daemon cannot be asked.
//!
//! containerd runs it for each container it cannot reach by RPC any more, and
//! after a failed `start`. A pod's host state hangs on its run directory, so:
//! with the daemon dead, any container's `delete` cleans the whole pod up; with
//! the daemon alive, only the one of the pod itself does. Its `poststop` hooks each
//! container's `delete` runs itself, as the bundle is there for just that long. containerd
//! gives `delete` five seconds; a hook that takes longer goes on without it, and after a
//! monitor that does whoever comes next cleans up ([`crate::rundir`]).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use containerd_shim_protos::api::DeleteResponse;
use protobuf::Message;
use tracing::warn;

use super::{Args, BootstrapError, group_of, init_log, read_spec};
use crate::config::Config;
use crate::events::timestamp;
use crate::hooks::Runner;
use crate::rundir::{Proc, RunDir};
use crate::sandbox::{Api, ContainerConfig};

/// 128 + SIGKILL: the VM was shot.
const KILLED_STATUS: u32 = 137;

/// Runs the action; returns what to print.
pub fn delete(args: &Args) -> Result<Vec<u8>, BootstrapError> {
    init_log("warn");
    // A mistake made in the configuration since must not keep a pod alive.
    let config = Config::load().unwrap_or_else(|error| {
        warn!(error = crate::error::chain(&error), "defaults are used");
        Config::default()
    });
    // A bundle without a readable config.json must not keep a pod alive.
    let bundle = args.bundle()?;
    let group = group_of(&bundle, &args.id).unwrap_or_else(|_| args.id.clone());
    // containerd keeps the bundles of a namespace side by side.
    let first = if group == args.id {
        bundle.clone()
    } else {
        bundle.with_file_name(&group)
    };
    let run_dir = RunDir::of_bundle(&first, &config.run_dir, &args.namespace, &group)?;
    let state = run_dir.load().ok().flatten().unwrap_or_default();
    let daemon_alive = state.daemon.is_some_and(Proc::is_alive);
    if !daemon_alive || group == args.id {
        run_dir.cleanup_for_daemon();
        run_hooks(args, bundle)?;
    }
    let response = DeleteResponse {
        pid: state.monitor.map_or(0, |monitor| monitor.pid),
        exit_status: KILLED_STATUS,
        exited_at: Some(timestamp(SystemTime::now())).into(),
        ..Default::default()
    };
    Ok(response.write_to_bytes()?)
}

/// Runs the container's `poststop` hooks, unless the daemon has.
fn run_hooks(args: &Args, bundle: PathBuf) -> Result<(), BootstrapError> {
    let Some(spec) = read_spec(&bundle)? else {
        return Ok(());
    };
    let config = ContainerConfig {
        api: Api::Task,
        id: args.id.clone(),
        bundle,
        rootfs: Vec::new(),
        spec: Arc::new(spec),
    };
    tokio::runtime::Builder::new_current_thread()
        .build()
        .map_err(BootstrapError::io("start the runtime"))?
        .block_on(Runner::default().stopped(&config));
    Ok(())
}
