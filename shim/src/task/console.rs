//! `nacre console`: shells in the guest itself, beside its containers.
//!
//! ```text
//! nacre console --Run(pid, pipes)--> here --CreateContainer "console+PID"--> agent
//!               <----- pipes ------> io.rs <----------- streams -----------> shell
//! ```
//! The guest holds no program but the agent, so the shell comes from the host,
//! with the request. To the agent it is a container whose root holds that one
//! file and which has all of the guest's namespaces but the mounts'. To containerd
//! it is nothing: its id is none containerd could choose (see [`ID_PREFIX`]), no
//! event tells of it, and not being among the pod's containers it neither keeps
//! the pod alive nor counts for its size.
//!
//! The service (`console.proto`) is one of its own beside the Task service, for
//! a task is what containerd knows of: it has a bundle, sends events and outlives
//! its clients. A shell's life is the call that runs it. ttrpc drops a call
//! whose connection is gone, and a [`Shell`] that is dropped is killed.

mod image;

use std::collections::HashMap;
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use nacre_protocol::agent;
use nacre_protocol::agent_ttrpc::AgentClient;
use nacre_protocol::console::{Empty, ResizeRequest, RunRequest, RunResponse, Size};
use nacre_protocol::console_ttrpc::{Console, create_console};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tracing::{info, warn};
use ttrpc::asynchronous::{Service, TtrpcContext};
use ttrpc::context::with_duration;

use super::container::{CALL_TIMEOUT, CREATE_TIMEOUT, SIGKILL};
use super::io::{StdioPaths, Streams};
use super::logger::Owner;
use super::process::lock;
use super::{Pod, TaskError, agent_message};
use crate::config::Config;
use crate::machine::{MachineError, Stop};
use crate::oci::guest_rootfs;
use crate::sandbox::{Sandbox, SandboxError};

/// What containers of shells are called, with the caller's pid: the agent takes
/// a plus in an id, containerd and [`crate::rundir::check_id`] do not.
const ID_PREFIX: &str = "console+";

/// Errors of the console.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The pod was started without one.
    #[error(
        "it has no console: debug_shell in {} must be set before a pod starts", config.display()
    )]
    Off {
        /// The shim's configuration file.
        config: PathBuf,
    },
    /// There is no guest yet.
    #[error("its virtual machine has not booted yet")]
    NotBooted,
    /// The configured shell is of no use.
    #[error("debug_shell {}: {problem}", path.display())]
    Shell {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A process wants a second shell.
    #[error("process {pid} has a console already")]
    Exists {
        /// The process.
        pid: u32,
    },
    /// A process resizes a shell it does not have.
    #[error("process {pid} has no console")]
    NotFound {
        /// The process.
        pid: u32,
    },
    /// The shell could not be made or waited for.
    #[error(transparent)]
    Task(#[from] TaskError),
}

/// The service, for a server.
pub fn create(pod: &Arc<Pod>) -> HashMap<String, Service> {
    create_console(Arc::new(ConsoleService {
        pod: pod.clone(),
        sizes: Mutex::default(),
    }))
}

struct ConsoleService {
    pod: Arc<Pod>,
    /// Of the shells' terminals, by their callers' pids.
    sizes: Mutex<HashMap<u32, watch::Sender<Size>>>,
}

#[async_trait]
impl Console for ConsoleService {
    async fn run(&self, _: &TtrpcContext, request: RunRequest) -> ttrpc::Result<RunResponse> {
        let (_entry, sizes) = self.enter(&request)?;
        let pod = self.pod.clone();
        // Not left half made if the caller goes away meanwhile.
        let opening = tokio::spawn(async move { Shell::open(&pod, &request).await });
        let cancelled = |_| ConsoleError::from(TaskError::Cancelled);
        let opened = opening.await.map_err(cancelled)?;
        let exit_status = opened?.exit(sizes).await?;
        Ok(RunResponse {
            exit_status,
            ..Default::default()
        })
    }

    async fn resize(&self, _: &TtrpcContext, request: ResizeRequest) -> ttrpc::Result<Empty> {
        let pid = request.pid;
        match lock(&self.sizes).get(&pid) {
            Some(size) => size.send_replace(request.size.unwrap_or_default()),
            None => return Err(ConsoleError::NotFound { pid }.into()),
        };
        Ok(Empty::new())
    }
}

impl ConsoleService {
    /// Notes a caller, until the entry is dropped.
    fn enter(
        &self,
        request: &RunRequest,
    ) -> Result<(Entry<'_>, watch::Receiver<Size>), ConsoleError> {
        let pid = request.pid;
        let mut sizes = lock(&self.sizes);
        if sizes.contains_key(&pid) {
            return Err(ConsoleError::Exists { pid });
        }
        let (sender, receiver) = watch::channel(Size::default());
        sizes.insert(pid, sender);
        let service = self;
        Ok((Entry { service, pid }, receiver))
    }
}

struct Entry<'a> {
    service: &'a ConsoleService,
    pid: u32,
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        lock(&self.service.sizes).remove(&self.pid);
    }
}

/// A shell that runs. Dropping it ends it.
struct Shell {
    sandbox: Arc<Sandbox>,
    id: String,
    streams: Option<Streams>,
}

impl Shell {
    /// Starts a shell in the pod's guest.
    async fn open(pod: &Pod, request: &RunRequest) -> Result<Self, ConsoleError> {
        let path = pod.host.debug_shell().ok_or_else(|| ConsoleError::Off {
            config: Config::path(),
        })?;
        let sandbox = pod.sandbox.get().ok_or(ConsoleError::NotBooted)?;
        let agent = sandbox.agent().ok_or(ConsoleError::NotBooted)?;
        let program = image::read(path).await?;
        let start = async {
            let shell = Self::create(pod, sandbox, agent, request, program).await?;
            shell.start(agent).await
        };
        tokio::select! {
            biased;
            stop = sandbox.stopped() => Err(gone(stop)),
            shell = start => Ok(shell?),
        }
    }

    async fn create(
        pod: &Pod,
        sandbox: &Arc<Sandbox>,
        agent: &AgentClient,
        request: &RunRequest,
        program: Vec<u8>,
    ) -> Result<Self, TaskError> {
        let id = format!("{ID_PREFIX}{}", request.pid);
        info!(id, "opening a console");
        let owner = Owner {
            namespace: pod.publisher.namespace(),
            id: &id,
        };
        let (streams, mut stdio) = Streams::open(sandbox, &pipes(request), owner).await?;
        (stdio.width, stdio.height) = (request.terminal.size.width, request.terminal.size.height);
        let root = guest_rootfs(&id);
        let shell = agent::File {
            path: format!("{}{}", root.display(), image::SHELL),
            mode: 0o755,
            contents: program,
            ..Default::default()
        };
        let request = agent::CreateContainerRequest {
            container_id: id.clone(),
            spec: image::spec(&root, &request.terminal.kind),
            files: vec![shell],
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        let answer = sandbox.ask("make the console", CREATE_TIMEOUT, |context| {
            agent.create_container(context, &request)
        });
        answer.await?;
        Ok(Self {
            sandbox: sandbox.clone(),
            id,
            streams: Some(streams),
        })
    }

    async fn start(mut self, agent: &AgentClient) -> Result<Self, TaskError> {
        if let Some(streams) = &mut self.streams {
            // The input ends when the caller closes it; nobody comes after it.
            streams.close_stdin();
            streams.start_input()?;
        }
        let request = container_request(&self.id);
        let answer = self
            .sandbox
            .ask("start the console's shell", CALL_TIMEOUT, |context| {
                agent.start_container(context, &request)
            });
        answer.await?;
        Ok(self)
    }

    /// Waits for the shell's end and for the caller to take all its output.
    async fn exit(mut self, sizes: watch::Receiver<Size>) -> Result<u32, ConsoleError> {
        let status = tokio::select! {
            biased;
            stop = self.sandbox.stopped() => return Err(gone(stop)),
            never = self.follow(sizes) => match never {},
            status = self.wait() => status?,
        };
        if let Some(streams) = self.streams.take() {
            // A caller that does not read waits for itself alone.
            streams.drain(Duration::MAX).await;
        }
        info!(id = self.id, status, "console closed");
        Ok(status)
    }

    async fn wait(&self) -> Result<u32, ConsoleError> {
        let agent = self.sandbox.agent().ok_or(ConsoleError::NotBooted)?;
        let request = agent::ProcessRequest {
            container_id: self.id.clone(),
            ..Default::default()
        };
        let context = ttrpc::context::Context::default();
        match agent.wait(context, &request).await {
            Ok(answer) => Ok(answer.exit_status.min(255)),
            Err(answer @ ttrpc::Error::RpcStatus(_)) => {
                let what = "wait for the console's shell";
                Err(TaskError::from(SandboxError::Agent { what, answer }).into())
            }
            // The agent is gone, and the guest about to be.
            Err(_) => {
                self.sandbox.give_up().await;
                Err(gone(self.sandbox.stopped().await))
            }
        }
    }

    /// Has the terminal's size be the caller's.
    async fn follow(&self, mut sizes: watch::Receiver<Size>) -> Infallible {
        while let Some(agent) = self.sandbox.agent()
            && sizes.changed().await.is_ok()
        {
            let size = sizes.borrow_and_update().clone();
            let request = agent::ResizeTerminalRequest {
                container_id: self.id.clone(),
                width: size.width,
                height: size.height,
                ..Default::default()
            };
            let context = with_duration(CALL_TIMEOUT);
            if let Err(error) = agent.resize_terminal(context, &request).await {
                warn!(
                    id = self.id,
                    error = agent_message(&error),
                    "terminal not resized"
                );
            }
        }
        std::future::pending().await
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let end = end(self.sandbox.clone(), std::mem::take(&mut self.id));
        // Without a runtime the pod is at its end as well.
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(end);
        }
    }
}

/// Kills what a shell has left, itself included, and frees what it had.
async fn end(sandbox: Arc<Sandbox>, id: String) {
    let Some(agent) = sandbox.agent() else { return };
    let kill = agent::SignalRequest {
        container_id: id.clone(),
        signal: SIGKILL,
        all: true,
        ..Default::default()
    };
    let wait = agent::ProcessRequest {
        container_id: id.clone(),
        ..Default::default()
    };
    let container = container_request(&id);
    let ending = async {
        // Whatever they answer, the last call tells whether it is gone.
        let _ = agent.signal(with_duration(CALL_TIMEOUT), &kill).await;
        let _ = agent.wait(with_duration(CALL_TIMEOUT), &wait).await;
        agent
            .delete_container(with_duration(CALL_TIMEOUT), &container)
            .await
    };
    match sandbox.unless_stopped(ending).await {
        Ok(_) | Err(ttrpc::Error::RemoteClosed) => (),
        Err(error) => warn!(id, error = agent_message(&error), "the guest keeps it"),
    }
}

fn gone(stop: Stop) -> ConsoleError {
    TaskError::from(MachineError::Stopped(stop)).into()
}

fn container_request(id: &str) -> agent::ContainerRequest {
    agent::ContainerRequest {
        container_id: id.to_owned(),
        ..Default::default()
    }
}

/// The caller's pipes, by the names the kernel gives them.
fn pipes(request: &RunRequest) -> StdioPaths {
    let name = |fd| format!("/proc/{}/fd/{fd}", request.pid);
    let terminal = request.terminal.is_some();
    StdioPaths {
        stdin: name(request.stdin),
        stdout: name(request.stdout),
        stderr: if terminal {
            String::new()
        } else {
            name(request.stderr)
        },
        terminal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_is_none_that_containerd_could_choose() {
        assert!(crate::rundir::check_id(&format!("{ID_PREFIX}1")).is_err());
    }
}
