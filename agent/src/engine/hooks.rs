//! `startContainer` hooks (runtime-spec 1.2, config.md, "startContainer Hooks"):
//! programs of the container's own files, run in its namespaces when its start
//! was asked for, before its process.
//!
//! They are run by the process that becomes the container's, as its user, with
//! its capabilities and under its seccomp profile: what they execute comes from
//! the image.

use std::os::unix::process::CommandExt;

use nacre_protocol::hook;
use oci_spec::runtime::{Hook, State};

use super::error::InitError;
use super::seccomp::Filter;

/// A container's hooks and the state they are told.
pub struct StartHooks<'a> {
    /// In their order.
    pub list: &'a [Hook],
    /// Without the PID, which only the process itself knows.
    pub state: &'a State,
}

impl StartHooks<'_> {
    /// Runs all of them; `filter` is what this process has not installed yet.
    ///
    /// # Errors
    ///
    /// The first one's that fails.
    pub fn run(&self, filter: Option<&Filter>) -> Result<(), InitError> {
        let mut state = self.state.clone();
        state.set_pid(Some(nix::unistd::getpid().as_raw()));
        for hook in self.list {
            let mut command = hook::command(hook);
            if let Some(filter) = filter.cloned() {
                // SAFETY: the closure makes one system call, on memory that it owns.
                unsafe {
                    command.pre_exec(move || filter.enter());
                }
            }
            hook::run(hook, command, &state, None).map_err(InitError::Hook)?;
        }
        Ok(())
    }
}
