//! What can be done to a container's running processes: signals, freezing,
//! terminal sizes, limits, counters.

use containerd_shim_protos::api::{KillRequest, ProcessInfo};
use containerd_shim_protos::events::task::{TaskPaused, TaskResumed};
use containerd_shim_protos::shim::oci::ProcessDetails;
use nacre_protocol::agent;
use oci_spec::runtime::LinuxResources;
use protobuf::well_known_types::any::Any;
use tracing::info;

use super::container::{CALL_TIMEOUT, Container};
use super::process::{Exit, Phase, Process, lock};
use super::{TaskError, stats};
use crate::cgroup::Limits;
use crate::error::chain;
use crate::events::pack;

/// The last of the signals (signal(7)).
const MAX_SIGNAL: u32 = 64;
/// Added to a signal's number it makes a status, as in a shell.
const SIGNAL_STATUS: u32 = 128;

impl Container {
    /// Sends a signal.
    ///
    /// # Errors
    ///
    /// `Invalid` for a number that is no signal, `Finished` for a process that has
    /// exited, `WrongPhase` for an exec that was not started, the guest's refusal.
    pub async fn kill(&self, request: &KillRequest) -> Result<(), TaskError> {
        if request.signal > MAX_SIGNAL {
            return Err(TaskError::Invalid(format!(
                "{} is no signal",
                request.signal
            )));
        }
        let process = self.process(&request.exec_id)?;
        match process.phase() {
            Phase::Stopped(_) | Phase::Deleting(_) => {
                return Err(TaskError::Finished {
                    process: process.name(),
                });
            }
            phase @ (Phase::Created | Phase::Starting) if !process.exec_id.is_empty() => {
                return Err(process.wrong_phase("signal", phase));
            }
            Phase::Created | Phase::Starting | Phase::Running | Phase::Pausing | Phase::Paused => {}
        }
        self.signal(&process, request.signal, request.all).await
    }

    /// Sends a signal to a process, whatever its phase. Any signal ends a
    /// container the guest does not have yet, and the sandbox's. One that the guest is
    /// being booted for gets it as soon as it is there.
    pub(super) async fn signal(
        &self,
        process: &Process,
        signal: u32,
        all: bool,
    ) -> Result<(), TaskError> {
        if self.is_sandbox() || self.take_pending().is_some() {
            let exit = Exit::now(SIGNAL_STATUS + signal);
            process
                .finish(exit, |exit| self.report_exit(process, exit))
                .await;
            return Ok(());
        }
        if process.exec_id.is_empty() && process.phase() == Phase::Starting {
            tokio::select! {
                () = self.entered_guest() => (),
                _ = process.exited() => {
                    let process = process.name();
                    return Err(TaskError::Finished { process });
                }
            }
        }
        let request = agent::SignalRequest {
            container_id: self.config.id.clone(),
            exec_id: process.exec_id.clone(),
            signal,
            all,
            ..Default::default()
        };
        let agent = self.agent("signal")?;
        let answer = self.sandbox.ask("signal", CALL_TIMEOUT, |context| {
            agent.signal(context, &request)
        });
        answer.await?;
        Ok(())
    }

    /// Freezes the container.
    ///
    /// # Errors
    ///
    /// `WrongPhase` unless it runs; the guest's refusal, after which it runs.
    pub async fn pause(&self) -> Result<(), TaskError> {
        let agent = self.agent("pause")?;
        self.init.advance("pause", |phase| {
            (phase == Phase::Running).then_some(Phase::Pausing)
        })?;
        let request = self.container_request();
        let answer = self.sandbox.ask("pause", CALL_TIMEOUT, |context| {
            agent.pause(context, &request)
        });
        let paused = answer.await;
        let moved = self.init.advance("pause", |phase| match (phase, &paused) {
            (Phase::Pausing, Ok(_)) => {
                self.publisher.publish(&TaskPaused {
                    container_id: self.config.id.clone(),
                    ..Default::default()
                });
                Some(Phase::Paused)
            }
            (Phase::Pausing, Err(_)) => Some(Phase::Running),
            // It exited meanwhile.
            _ => None,
        });
        paused?;
        moved?;
        Ok(())
    }

    /// Thaws the container.
    ///
    /// # Errors
    ///
    /// `WrongPhase` unless it is paused; the guest's refusal.
    pub async fn resume(&self) -> Result<(), TaskError> {
        let phase = self.init.phase();
        if phase != Phase::Paused {
            return Err(self.init.wrong_phase("resume", phase));
        }
        let request = self.container_request();
        let agent = self.agent("resume")?;
        let answer = self.sandbox.ask("resume", CALL_TIMEOUT, |context| {
            agent.resume(context, &request)
        });
        answer.await?;
        self.init.advance("resume", |phase| {
            (phase == Phase::Paused).then(|| {
                self.publisher.publish(&TaskResumed {
                    container_id: self.config.id.clone(),
                    ..Default::default()
                });
                Phase::Running
            })
        })?;
        Ok(())
    }

    /// Changes the size of a process's terminal, or notes it for the start of an
    /// exec.
    ///
    /// # Errors
    ///
    /// `NoExec`, `Finished`, the guest's refusal.
    pub async fn resize(&self, exec_id: &str, width: u32, height: u32) -> Result<(), TaskError> {
        let process = self.process(exec_id)?;
        process.set_size(width, height);
        match process.phase() {
            // Noted is enough: the guest gets the size with the process.
            Phase::Created | Phase::Starting if !exec_id.is_empty() || self.is_pending() => {
                return Ok(());
            }
            Phase::Stopped(_) | Phase::Deleting(_) => {
                return Err(TaskError::Finished {
                    process: process.name(),
                });
            }
            Phase::Created | Phase::Starting | Phase::Running | Phase::Pausing | Phase::Paused => {}
        }
        self.tell_size(&process, (width, height)).await
    }

    /// Tells the guest of a terminal size that was noted while it made the process
    /// with size `told`.
    pub(super) async fn catch_up(&self, process: &Process, told: (u32, u32)) {
        let size = process.size();
        if size != told
            && let Err(error) = self.tell_size(process, size).await
        {
            // The process may have ended already.
            let process = process.name();
            info!(process, error = chain(&error), "terminal not resized");
        }
    }

    async fn tell_size(
        &self,
        process: &Process,
        (width, height): (u32, u32),
    ) -> Result<(), TaskError> {
        let request = agent::ResizeTerminalRequest {
            container_id: self.config.id.clone(),
            exec_id: process.exec_id.clone(),
            width,
            height,
            ..Default::default()
        };
        let agent = self.agent("resize")?;
        let answer = self
            .sandbox
            .ask("resize the terminal", CALL_TIMEOUT, |context| {
                agent.resize_terminal(context, &request)
            });
        answer.await?;
        Ok(())
    }

    /// What the container may use.
    pub fn limits(&self) -> Limits {
        *lock(&self.limits)
    }

    /// Notes what it may use.
    pub fn set_limits(&self, limits: Limits) {
        *lock(&self.limits) = limits;
    }

    /// Reads new limits.
    ///
    /// # Errors
    ///
    /// `Spec`.
    pub fn parse_resources(&self, json: &[u8]) -> Result<LinuxResources, TaskError> {
        serde_json::from_slice(json).map_err(|error| self.unusable_resources(error))
    }

    fn unusable_resources(&self, error: serde_json::Error) -> TaskError {
        TaskError::Spec {
            container_id: self.config.id.clone(),
            what: "resources",
            source: error.into(),
        }
    }

    /// Applies new limits in the guest, which gets only what OCI knows.
    ///
    /// # Errors
    ///
    /// The guest's refusal.
    pub async fn update(&self, resources: &LinuxResources) -> Result<(), TaskError> {
        let mut resources = resources.clone();
        crate::oci::translate_resources(&mut resources);
        let resources = serde_json::to_vec(&resources);
        let request = agent::UpdateRequest {
            container_id: self.config.id.clone(),
            resources: resources.map_err(|error| self.unusable_resources(error))?,
            ..Default::default()
        };
        let agent = self.agent("update")?;
        let answer = self
            .sandbox
            .ask("update the limits", CALL_TIMEOUT, |context| {
                agent.update(context, &request)
            });
        answer.await?;
        Ok(())
    }

    /// The container's processes, by their pids in the guest: on the host they
    /// are no processes. While the guest has none, the pod's host pid: a containerd
    /// that restarts takes a task without processes for a leak, and with it the
    /// exit status would be gone. An exec's own process tells the exec's id.
    ///
    /// # Errors
    ///
    /// The guest's refusal.
    pub async fn pids(&self) -> Result<Vec<ProcessInfo>, TaskError> {
        if self.is_pending() || self.init.phase().exit().is_some() {
            return Ok(vec![ProcessInfo {
                pid: self.pid(),
                ..Default::default()
            }]);
        }
        let request = self.container_request();
        let agent = self.agent("list the processes of")?;
        let answer = self
            .sandbox
            .ask("list the processes", CALL_TIMEOUT, |context| {
                agent.list_processes(context, &request)
            });
        let answer = answer.await?;
        answer.pids.into_iter().map(|pid| self.info(pid)).collect()
    }

    fn info(&self, pid: u32) -> Result<ProcessInfo, TaskError> {
        let exec_id = self.exec_of(pid);
        let info = exec_id.map(|exec_id| {
            pack(&ProcessDetails {
                exec_id,
                ..Default::default()
            })
        });
        Ok(ProcessInfo {
            pid,
            info: info.transpose().map_err(TaskError::Encode)?.into(),
            ..Default::default()
        })
    }

    fn exec_of(&self, pid: u32) -> Option<String> {
        let execs = lock(&self.execs);
        let mut running = execs.values().filter(|exec| exec.phase().exit().is_none());
        running
            .find(|exec| exec.guest_pid.get() == Some(&pid))
            .map(|exec| exec.exec_id.clone())
    }

    /// The container's counters, packed; those of the sandbox's, which uses nothing, are
    /// zeros.
    ///
    /// # Errors
    ///
    /// The guest's refusal.
    pub async fn stats(&self) -> Result<Any, TaskError> {
        stats::metrics(self.counters().await?).map_err(TaskError::Encode)
    }

    async fn counters(&self) -> Result<agent::StatsResponse, TaskError> {
        if self.is_sandbox() {
            return Ok(agent::StatsResponse::default());
        }
        let request = self.container_request();
        let agent = self.agent("read the counters of")?;
        let answer = self
            .sandbox
            .ask("read the counters", CALL_TIMEOUT, |context| {
                agent.stats(context, &request)
            });
        Ok(answer.await?)
    }
}
