//! The end of containers and execs that have exited, or never ran.

use std::time::Duration;

use nacre_protocol::agent;
use tracing::{info, warn};
use ttrpc::context::with_duration;

use super::TaskError;
use super::container::{CALL_TIMEOUT, Container, NOT_STARTED_STATUS, SIGKILL, drain};
use super::process::{Exit, Phase, lock};

/// Time a process has to die of SIGKILL.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

impl Container {
    /// Forgets an exec that has exited or was never started.
    ///
    /// # Errors
    ///
    /// `NoExec`, `WrongPhase` while it runs.
    pub async fn delete_exec(&self, exec_id: &str) -> Result<Exit, TaskError> {
        let process = self.process(exec_id)?;
        let before = process.advance("delete", |phase| match phase {
            Phase::Stopped(exit) => Some(Phase::Deleting(exit)),
            Phase::Created => Some(Phase::Deleting(Exit::now(NOT_STARTED_STATUS))),
            _ => None,
        })?;
        if before != Phase::Created {
            let request = self.process_request(&process);
            let call = self
                .agent("delete")?
                .delete_exec(with_duration(CALL_TIMEOUT), &request);
            let answer = self.sandbox.unless_stopped(call).await;
            self.note_cleanup("exec", answer);
        }
        drain(&process).await;
        process.detach();
        lock(&self.execs).remove(exec_id);
        let exit = process.phase().exit();
        Ok(exit.unwrap_or_else(|| Exit::now(NOT_STARTED_STATUS)))
    }

    /// Removes the container from the guest. One that was created and never
    /// started is killed first.
    ///
    /// # Errors
    ///
    /// `WrongPhase` while it runs or is being deleted.
    pub async fn delete(&self) -> Result<Exit, TaskError> {
        if self.init.phase() == Phase::Created {
            self.kill_created().await?;
        }
        self.init.advance("delete", |phase| match phase {
            Phase::Stopped(exit) => Some(Phase::Deleting(exit)),
            _ => None,
        })?;
        if let Ok(agent) = self.agent("delete") {
            let request = self.container_request();
            let call = agent.delete_container(with_duration(CALL_TIMEOUT), &request);
            let answer = self.sandbox.unless_stopped(call).await;
            if !self.note_cleanup("container", answer) {
                self.disks.retire();
            }
        }
        drain(&self.init).await;
        self.init.detach();
        Ok(self.init.exited().await)
    }

    async fn kill_created(&self) -> Result<(), TaskError> {
        if let Err(error) = self.signal(&self.init, SIGKILL, true).await {
            // It may have ended by itself, which the wait below will tell.
            info!(
                error = crate::error::chain(&error),
                "created container not signalled"
            );
        }
        tokio::time::timeout(KILL_TIMEOUT, self.init.exited())
            .await
            .map(drop)
            .map_err(|_| TaskError::Timeout {
                what: "killing the container",
                seconds: KILL_TIMEOUT.as_secs(),
            })
    }

    /// What the guest could not clean up dies with it at the latest. It must not
    /// be able to keep the host from forgetting the container. Whether it says it has.
    fn note_cleanup(&self, what: &str, answer: ttrpc::Result<agent::Empty>) -> bool {
        match answer {
            // The last is the guest's own end.
            Ok(_) | Err(ttrpc::Error::RemoteClosed) => true,
            Err(ttrpc::Error::RpcStatus(status)) if status.code() == ttrpc::Code::NOT_FOUND => true,
            Err(error) => {
                warn!(
                    container_id = self.config.id,
                    error = super::agent_message(&error),
                    "the guest keeps the {what}"
                );
                false
            }
        }
    }
}
