//! One container: its init process and its execs, from start to exit. What can be
//! done to them in between is in `control.rs`, how they are deleted in `deletion.rs`.
//!
//! Each process, once the guest has it, has a task that waits for its end:
//!
//! ```text
//! agent.Wait or machine dead -> output drained, volumes back -> TaskExit queued, Stopped
//! ```
//! The guest gets the container with Create, or with Start where the machine
//! boots only then ([`crate::sandbox`]); until then it is [`Pending`] here. A
//! pod's sandbox container never gets there: it has no process
//! ([`crate::oci::kubernetes`]), runs from Start until it is signalled, and ends
//! with the machine as the others do.
//! The guest is asked with a deadline always; only `Wait` may take forever.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::{ExecProcessRequest, StateResponse};
use containerd_shim_protos::events::task::{
    TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskStart,
};
use nacre_protocol::agent;
use nacre_protocol::agent_ttrpc::AgentClient;
use nacre_protocol::guest::{ARRIVAL_SECONDS, DISKS_SECONDS, PROBE_SECONDS, START_SECONDS};
use oci_spec::runtime::Process as OciProcess;
use tokio::sync::SetOnce;
use tracing::{error, info};

use super::TaskError;
use super::io::{StdioPaths, Streams};
use super::logger::Owner;
use super::process::{Exit, Phase, Process, lock};
use super::volumes::{Attached, Disks};
use crate::cgroup::Limits;
use crate::events::{Publisher, timestamp};
use crate::hooks;
use crate::oci::kubernetes;
use crate::sandbox::{ContainerConfig, Sandbox, SandboxError};
use crate::storage::Prepared;

/// Time the agent has for a call.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Time the agent has to start one process among many, on a host that is busy with those
/// who ask for them. A guest that hangs is found by `hang_timeout_seconds`.
const EXEC_TIMEOUT: Duration = Duration::from_secs(30);
/// Time the agent has to mount a container's storage and make it,
pub(super) const CREATE_TIMEOUT: Duration = Duration::from_secs(60);
/// and beside it for each PCI device, which it waits for one after the other.
const DEVICE_TIMEOUT: Duration =
    Duration::from_secs(ARRIVAL_SECONDS + PROBE_SECONDS + DISKS_SECONDS);
/// Time output has to reach its readers after the exit, which is told within five seconds.
pub(super) const DRAIN_TIMEOUT: Duration = Duration::from_secs(4);
/// Status of a process that went down with its machine: 128 + SIGKILL.
pub const LOST_STATUS: u32 = 137;
/// Status of a process that could not be started.
pub(super) const NOT_STARTED_STATUS: u32 = 255;
pub(super) const SIGKILL: u32 = libc::SIGKILL.unsigned_abs();

/// What a sandbox container answers to most calls.
const NO_PROCESS: TaskError = TaskError::Unsupported("a process in a pod's sandbox container");

/// A container.
pub struct Container {
    pub(super) config: ContainerConfig,
    pub(super) init: Arc<Process>,
    pub(super) execs: Mutex<HashMap<String, Arc<Process>>>,
    pub(super) sandbox: Arc<Sandbox>,
    pub(super) publisher: Publisher,
    pub(super) limits: Mutex<Limits>,
    pub(super) attached: Attached,
    /// When.
    created_at: SystemTime,
    pub(super) disks: Disks,
    /// Kills for want of memory that containerd was told of.
    oom_kills: Mutex<u64>,
    /// Whether it is the pod's sandbox container, without a process.
    is_sandbox: bool,
    pending: Mutex<Option<Pending>>,
    /// Set once the guest has the container.
    in_guest: SetOnce<()>,
}

/// What the guest needs to make the container.
pub struct Pending {
    /// The machine's disks, too, if it has not booted.
    pub prepared: Prepared,
}

/// Time the agent has to make a container with so many PCI devices.
fn create_timeout(devices: usize) -> Duration {
    let devices = u32::try_from(devices).unwrap_or(u32::MAX);
    CREATE_TIMEOUT + DEVICE_TIMEOUT * devices
}

/// Whether something in the guest may use the disks of a container that it has not made.
fn may_use_disks(error: &SandboxError) -> bool {
    match error {
        // Who gave up in the middle has undone nothing.
        SandboxError::Late { .. } => true,
        SandboxError::Agent {
            answer: ttrpc::Error::RpcStatus(status),
            ..
        } => status.code() == ttrpc::Code::ABORTED,
        _ => false,
    }
}

/// Gives a process's output time to be read. What is not read by then goes on
/// being copied until the process is deleted.
pub(super) async fn drain(process: &Process) {
    if let Some(streams) = process.detach()
        && let Some(unread) = streams.drain(DRAIN_TIMEOUT).await
    {
        process.attach(unread);
    }
}

impl Container {
    /// A container the guest does not have yet.
    pub fn new(
        config: ContainerConfig,
        stdio: StdioPaths,
        prepared: Prepared,
        sandbox: Arc<Sandbox>,
        publisher: Publisher,
    ) -> Self {
        let init = Process::new(&config.id, "", stdio, Vec::new());
        Self {
            limits: Mutex::new(Limits::of(&config.spec)),
            created_at: SystemTime::now(),
            is_sandbox: kubernetes::is_sandbox(&config.spec),
            config,
            init: Arc::new(init),
            execs: Mutex::new(HashMap::new()),
            sandbox,
            publisher,
            attached: Attached::default(),
            disks: Disks::default(),
            oom_kills: Mutex::default(),
            pending: Mutex::new(Some(Pending { prepared })),
            in_guest: SetOnce::new(),
        }
    }

    /// The sandbox it is in.
    pub fn sandbox(&self) -> &Arc<Sandbox> {
        &self.sandbox
    }

    /// When it was created.
    pub fn created_at(&self) -> SystemTime {
        self.created_at
    }

    /// Whether it is the pod's sandbox container.
    pub fn is_sandbox(&self) -> bool {
        self.is_sandbox
    }

    /// What the guest needs of it; `None` once it was taken.
    pub fn take_pending(&self) -> Option<Pending> {
        lock(&self.pending).take()
    }

    /// Whether the guest does not have it, or not yet.
    pub(super) fn is_pending(&self) -> bool {
        !self.in_guest.initialized()
    }

    /// Resolves once the guest has it.
    pub(super) async fn entered_guest(&self) {
        self.in_guest.wait().await;
    }

    /// The agent, if the guest has the container.
    ///
    /// # Errors
    ///
    /// `WrongPhase` before that; `Unsupported` of a sandbox container.
    pub(super) fn agent(&self, action: &'static str) -> Result<&AgentClient, TaskError> {
        if self.is_sandbox {
            return Err(NO_PROCESS);
        }
        self.sandbox
            .agent()
            .filter(|_| !self.is_pending())
            .ok_or_else(|| self.init.wrong_phase(action, self.init.phase()))
    }

    /// Makes the container in the booted guest, unless it is the pod's sandbox.
    ///
    /// # Errors
    ///
    /// When its streams cannot be opened; the guest's refusal.
    pub async fn enter_guest(&self, mut prepared: Prepared) -> Result<(), TaskError> {
        if self.is_sandbox {
            return Ok(());
        }
        let spec = serde_json::to_vec(&prepared.guest_spec).map_err(|error| TaskError::Spec {
            container_id: self.config.id.clone(),
            what: "guest spec",
            source: error.into(),
        })?;
        let owner = Owner {
            namespace: self.publisher.namespace(),
            id: &self.config.id,
        };
        let agent = self.sandbox.agent().ok_or(SandboxError::Stopped)?;
        let subpaths = std::mem::take(&mut prepared.volumes.subpaths);
        let disks = self.attach_root(&prepared.disks, prepared.slots).await?;
        let block_devices = self.attach_devices(&prepared.block_devices).await?;
        self.attach_volumes(agent, prepared.volumes).await?;
        let (streams, mut ids) = Streams::open(&self.sandbox, &self.init.stdio, owner).await?;
        let size = self.init.size();
        (ids.width, ids.height) = size;
        let limit = create_timeout(prepared.pci_devices.addresses.len());
        let request = agent::CreateContainerRequest {
            container_id: self.config.id.clone(),
            spec,
            storages: prepared.storages,
            files: prepared.files,
            stdio: Some(ids).into(),
            subpaths,
            bundle: self.config.bundle.display().to_string(),
            block_devices,
            disks,
            pci_devices: prepared.pci_devices.addresses,
            drivers: prepared.pci_devices.drivers,
            ..Default::default()
        };
        let answer = self.sandbox.ask("create the container", limit, |context| {
            agent.create_container(context, &request)
        });
        answer.await.inspect_err(|error| {
            if may_use_disks(error) {
                self.disks.retire();
            }
        })?;
        self.init.attach(streams);
        // Once: whoever has the pending container.
        self.in_guest.set(()).map_err(|_| TaskError::Cancelled)?;
        self.catch_up(&self.init, size).await;
        Ok(())
    }

    /// As containerd described it.
    pub fn config(&self) -> &ContainerConfig {
        &self.config
    }

    /// The init process.
    pub fn init(&self) -> &Process {
        &self.init
    }

    /// The pod's host pid: what containerd gets for every process.
    pub fn pid(&self) -> u32 {
        self.sandbox.pid()
    }

    /// Finds a process; an empty `exec_id` means the init process.
    ///
    /// # Errors
    ///
    /// `NoExec`.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>, TaskError> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        lock(&self.execs)
            .get(exec_id)
            .cloned()
            .ok_or_else(|| TaskError::NoExec {
                container_id: self.config.id.clone(),
                exec_id: exec_id.to_owned(),
            })
    }

    /// containerd's view of a process.
    ///
    /// # Errors
    ///
    /// `NoExec`.
    pub fn state(&self, exec_id: &str) -> Result<StateResponse, TaskError> {
        let bundle = self.config.bundle.display().to_string();
        Ok(self.process(exec_id)?.state(&bundle, self.pid()))
    }

    /// Waits for the init process's end from now on.
    pub fn watch_init(self: &Arc<Self>) {
        self.watch(self.init.clone());
    }

    fn watch(self: &Arc<Self>, process: Arc<Process>) {
        let container = self.clone();
        tokio::spawn(async move {
            let exit = container.wait_in_guest(&process).await;
            let volumes = async {
                if process.exec_id.is_empty() {
                    container.detach_volumes().await;
                }
            };
            tokio::join!(drain(&process), volumes);
            info!(process = process.name(), status = exit.status, "exited");
            process
                .finish(exit, |exit| container.report_exit(&process, exit))
                .await;
        });
    }

    /// The exit as the guest tells it, or the machine's end, or that of a
    /// process which the guest never got.
    async fn wait_in_guest(&self, process: &Process) -> Exit {
        let request = self.process_request(process);
        let context = ttrpc::context::Context::default();
        let in_guest = async {
            self.entered_guest().await;
            match self.agent("wait for") {
                Ok(agent) => agent.wait(context, &request).await,
                Err(_) => Err(ttrpc::Error::RemoteClosed),
            }
        };
        let answer = tokio::select! {
            answer = in_guest => answer,
            _ = self.sandbox.stopped() => return Exit::now(LOST_STATUS),
            exit = process.exited() => return exit,
        };
        match answer {
            Ok(answer) => {
                self.report_oom(answer.oom_kills);
                // The host's clock counts: the guest may claim any time.
                Exit::now(answer.exit_status.min(255))
            }
            Err(answer) => {
                // Without an exit to wait for the pod could never be deleted.
                error!(
                    process = process.name(),
                    error = super::agent_message(&answer),
                    "lost"
                );
                self.sandbox.give_up().await;
                Exit::now(LOST_STATUS)
            }
        }
    }

    /// The guest's kernel has killed so often in the container for want of memory. The guest
    /// says so by itself, and with each exit, whose cause it may be.
    pub(super) fn report_oom(&self, kills: u64) {
        let mut reported = lock(&self.oom_kills);
        if kills > *reported {
            *reported = kills;
            self.publisher.publish(&TaskOOM {
                container_id: self.config.id.clone(),
                ..Default::default()
            });
        }
    }

    pub(super) fn report_exit(&self, process: &Process, exit: Exit) {
        let id = if process.exec_id.is_empty() {
            &process.container_id
        } else {
            &process.exec_id
        };
        self.publisher.publish(&TaskExit {
            container_id: process.container_id.clone(),
            id: id.clone(),
            pid: self.pid(),
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        });
    }

    /// Starts the init process or an exec; an init process after `enter`, which
    /// has the guest make the container if it is still pending.
    ///
    /// # Errors
    ///
    /// `WrongPhase` unless it is Created; the guest's refusal. A refused exec is
    /// Stopped, a refused init process Created again.
    pub async fn start(
        self: &Arc<Self>,
        exec_id: &str,
        enter: impl Future<Output = Result<(), TaskError>>,
    ) -> Result<(), TaskError> {
        let process = self.process(exec_id)?;
        process.advance("start", |phase| {
            (phase == Phase::Created).then_some(Phase::Starting)
        })?;
        if exec_id.is_empty() {
            self.start_init(&process, enter).await
        } else {
            self.start_exec(&process).await
        }
    }

    async fn start_init(
        &self,
        process: &Process,
        enter: impl Future<Output = Result<(), TaskError>>,
    ) -> Result<(), TaskError> {
        let start = async {
            enter.await?;
            if self.is_sandbox {
                return Ok(());
            }
            process.start_input()?;
            let own_hooks = hooks::time_in_guest(&self.config.spec);
            let limit = Duration::from_secs(START_SECONDS) + own_hooks;
            let request = self.container_request();
            let agent = self.agent("start")?;
            let answer = self.sandbox.ask("start the container", limit, |context| {
                agent.start_container(context, &request)
            });
            answer.await?;
            Ok::<(), TaskError>(())
        };
        let started = start.await;
        process.advance("start", |_| match started {
            Ok(()) => {
                self.publisher.publish(&TaskStart {
                    container_id: self.config.id.clone(),
                    pid: self.pid(),
                    ..Default::default()
                });
                Some(Phase::Running)
            }
            Err(_) => Some(Phase::Created),
        })?;
        if started.is_err() && self.is_pending() {
            // What it takes to make the container is spent.
            let exit = Exit::now(NOT_STARTED_STATUS);
            process
                .finish(exit, |exit| self.report_exit(process, exit))
                .await;
        }
        started
    }

    async fn start_exec(self: &Arc<Self>, process: &Arc<Process>) -> Result<(), TaskError> {
        match self.exec_in_guest(process).await {
            Ok((streams, size)) => {
                process.attach(streams);
                process.advance("start", |_| {
                    self.publisher.publish(&TaskExecStarted {
                        container_id: self.config.id.clone(),
                        exec_id: process.exec_id.clone(),
                        pid: self.pid(),
                        ..Default::default()
                    });
                    Some(Phase::Running)
                })?;
                self.watch(process.clone());
                self.catch_up(process, size).await;
                Ok(())
            }
            Err(error) => {
                let exit = Exit::now(NOT_STARTED_STATUS);
                process.advance("start", |_| Some(Phase::Stopped(exit)))?;
                Err(error)
            }
        }
    }

    /// Also returns the terminal size the guest was told.
    async fn exec_in_guest(&self, process: &Process) -> Result<(Streams, (u32, u32)), TaskError> {
        let owner = Owner {
            namespace: self.publisher.namespace(),
            id: &process.exec_id,
        };
        let (mut streams, mut stdio) = Streams::open(&self.sandbox, &process.stdio, owner).await?;
        let size = process.size();
        (stdio.width, stdio.height) = size;
        let request = agent::ExecRequest {
            container_id: self.config.id.clone(),
            exec_id: process.exec_id.clone(),
            process: process.command.clone(),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        let agent = self.agent("exec in")?;
        let answer = self
            .sandbox
            .ask("run the command", EXEC_TIMEOUT, |context| {
                agent.exec(context, &request)
            });
        let started = answer.await?;
        // Once: an exec is started once.
        process.guest_pid.get_or_init(|| started.pid);
        streams.start_input()?;
        Ok((streams, size))
    }

    /// Adds an exec; the guest hears of it when it is started.
    ///
    /// # Errors
    ///
    /// `WrongPhase` unless the container runs, `ExecExists`, `Spec`.
    pub fn exec(&self, request: ExecProcessRequest) -> Result<(), TaskError> {
        if self.is_sandbox {
            return Err(NO_PROCESS);
        }
        let phase = self.init.phase();
        if phase != Phase::Running {
            return Err(self.init.wrong_phase("exec in", phase));
        }
        crate::rundir::check_id(&request.exec_id)
            .map_err(|error| TaskError::Invalid(error.to_string()))?;
        let command = self.exec_command(&request.spec.value)?;
        let stdio = StdioPaths {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        let process = Process::new(&self.config.id, &request.exec_id, stdio, command);
        let mut execs = lock(&self.execs);
        if execs.contains_key(&request.exec_id) {
            return Err(TaskError::ExecExists {
                container_id: self.config.id.clone(),
                exec_id: request.exec_id,
            });
        }
        self.publisher.publish(&TaskExecAdded {
            container_id: self.config.id.clone(),
            exec_id: request.exec_id.clone(),
            ..Default::default()
        });
        execs.insert(request.exec_id, Arc::new(process));
        Ok(())
    }

    /// An exec's OCI process, translated for the guest.
    fn exec_command(&self, json: &[u8]) -> Result<Vec<u8>, TaskError> {
        let unusable = |error: serde_json::Error| TaskError::Spec {
            container_id: self.config.id.clone(),
            what: "process of the exec",
            source: error.into(),
        };
        let mut process: OciProcess = serde_json::from_slice(json).map_err(unusable)?;
        crate::oci::translate_process(&mut process);
        serde_json::to_vec(&process).map_err(unusable)
    }

    pub(super) fn container_request(&self) -> agent::ContainerRequest {
        agent::ContainerRequest {
            container_id: self.config.id.clone(),
            ..Default::default()
        }
    }

    pub(super) fn process_request(&self, process: &Process) -> agent::ProcessRequest {
        agent::ProcessRequest {
            container_id: self.config.id.clone(),
            exec_id: process.exec_id.clone(),
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Else nobody hears which device has not come.
    #[test]
    fn creation_takes_as_long_as_the_agent_waits_for_devices() {
        assert_eq!(create_timeout(0), CREATE_TIMEOUT);
        for count in 1u32..=32 {
            let waits = Duration::from_secs(ARRIVAL_SECONDS + DISKS_SECONDS) * count;
            let rest = create_timeout(usize::try_from(count).unwrap()) - waits;
            assert!(rest >= CREATE_TIMEOUT + Duration::from_secs(PROBE_SECONDS));
        }
    }
}
