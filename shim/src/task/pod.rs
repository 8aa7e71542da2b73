//! The containers of one pod and the sandbox they share.
//!
//! The first Create makes the sandbox; a Create that comes meanwhile waits for
//! it, nobody else does. It boots it, too, if the pod's network is known by then,
//! else the first Start does. When the sandbox's machine dies, every container's
//! processes end (each has a task that waits for that), but the containers stay
//! until containerd deletes them.
//!
//! The sandbox container comes by Create or by CreateSandbox (`sandboxed.rs`);
//! from there on it is a container like another, except that only the API it came
//! by knows it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use containerd_shim_protos::api::{CreateTaskRequest, DeleteRequest, DeleteResponse};
use containerd_shim_protos::events::task::{TaskCreate, TaskDelete, TaskIO};
use futures::FutureExt;
use nacre_protocol::agent;
use oci_spec::runtime::Spec;
use tokio::sync::{OnceCell, RwLock};
use tracing::{info, warn};

use super::TaskError;
use super::container::Container;
use super::io::StdioPaths;
use super::life::Life;
use super::process::{Exit, Phase, lock};
use super::resize::{Turn, take_room};
use crate::cgroup::Limits;
use crate::events::{Publisher, timestamp};
use crate::hooks;
use crate::machine::MachineError;
use crate::sandbox::{Api, ContainerConfig, Host, Sandbox, SandboxError};
use crate::storage::{PodFiles, Prepared};

/// Least time between two reports of one guest's lack of memory: a guest must
/// not flood containerd.
const OOM_PAUSE: Duration = Duration::from_millis(500);
/// Time that hooks have once their pod is to end.
const HOOKS_TIMEOUT: Duration = Duration::from_secs(10);

/// A pod.
pub struct Pod {
    pub(super) host: Host,
    pub(super) publisher: Publisher,
    pub(super) sandbox: OnceCell<Arc<Sandbox>>,
    pub(super) containers: Mutex<HashMap<String, Entry>>,
    /// Those the shim had to make.
    pub(super) files: OnceLock<PodFiles>,
    /// The turn of whoever changes the machine's size.
    pub(super) resizing: tokio::sync::Mutex<Turn>,
    /// Shared by those who run hooks, or are about to.
    busy: RwLock<()>,
    life: Life,
}

/// A container's place among the others.
pub(super) enum Entry {
    /// It is being created.
    Creating(Creation),
    /// It is there.
    Made(Arc<Container>),
    /// It is there, and was given up before: it is to be deleted.
    GivenUp(Arc<Container>),
}

/// A container that is being created.
#[derive(Default)]
pub(super) struct Creation {
    /// Its limits, from when there is room for it in the machine.
    pub(super) limits: Option<Box<Limits>>,
    /// Whether who asked for it waits for it no longer.
    given_up: bool,
}

impl Entry {
    fn container(&self) -> Option<Arc<Container>> {
        match self {
            Self::Creating(_) => None,
            Self::Made(container) | Self::GivenUp(container) => Some(container.clone()),
        }
    }

    fn is_given_up(&self) -> bool {
        match self {
            Self::Creating(creation) => creation.given_up,
            Self::Made(_) => false,
            Self::GivenUp(_) => true,
        }
    }

    /// What it counts with for the pod's size; the sandbox container does not.
    pub(super) fn limits(&self) -> Option<Limits> {
        match self {
            Self::Creating(creation) => creation.limits.as_deref().copied(),
            Self::Made(container) | Self::GivenUp(container) => {
                (!container.is_sandbox()).then(|| container.limits())
            }
        }
    }
}

impl Pod {
    /// A pod without containers.
    pub fn new(host: Host, publisher: Publisher) -> Arc<Self> {
        Arc::new(Self {
            host,
            publisher,
            sandbox: OnceCell::new(),
            containers: Mutex::new(HashMap::new()),
            files: OnceLock::new(),
            resizing: tokio::sync::Mutex::default(),
            busy: RwLock::default(),
            life: Life::new(),
        })
    }

    /// Host pid of the pod, 0 before it boots.
    pub fn pid(&self) -> u32 {
        self.sandbox.get().map_or(0, |sandbox| sandbox.pid())
    }

    /// Finds a container.
    ///
    /// # Errors
    ///
    /// `NoContainer`.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, TaskError> {
        self.find(id, Api::Task)
            .ok_or_else(|| TaskError::NoContainer(id.to_owned()))
    }

    /// Finds a container that came by `api`.
    pub(super) fn find(&self, id: &str, api: Api) -> Option<Arc<Container>> {
        let container = lock(&self.containers).get(id).and_then(Entry::container);
        container.filter(|container| container.config().api == api)
    }

    /// Creates a container, and with the first one the sandbox. Returns the pod's
    /// pid.
    ///
    /// # Errors
    ///
    /// Anything on the way; nothing of the container is left then.
    pub async fn create(self: &Arc<Self>, request: CreateTaskRequest) -> Result<u32, TaskError> {
        if !request.checkpoint.is_empty() || !request.parent_checkpoint.is_empty() {
            return Err(TaskError::Unsupported("restoring a checkpoint"));
        }
        let bundle = PathBuf::from(&request.bundle);
        let mut spec = load_spec(&bundle)?;
        if let Some(files) = self.files.get() {
            files.mount_into(&mut spec);
        }
        let config = ContainerConfig {
            api: Api::Task,
            id: request.id,
            spec: Arc::new(spec),
            bundle,
            rootfs: request.rootfs,
        };
        let stdio = StdioPaths {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        Ok(self.make(config, stdio).await?.pid())
    }

    /// Makes a container, whichever way it came.
    ///
    /// # Errors
    ///
    /// Anything on the way; nothing of the container is left then.
    pub(super) async fn make(
        self: &Arc<Self>,
        config: ContainerConfig,
        stdio: StdioPaths,
    ) -> Result<Arc<Container>, TaskError> {
        let id = config.id.clone();
        self.reserve(&id)?;
        let result = self.make_reserved(config, stdio).await;
        let (result, given_up) = self.settle(&id, result);
        if given_up && let Ok(container) = &result {
            if let Err(error) = self.delete_container(container).await {
                let error = crate::error::chain(&error);
                warn!(container_id = id, error, "given up, and not deleted");
            }
            return Err(TaskError::GivenUp(id));
        }
        result
    }

    /// Puts what came of a creation in its place, and tells whether it was given up.
    fn settle(
        self: &Arc<Self>,
        id: &str,
        result: Result<Arc<Container>, TaskError>,
    ) -> (Result<Arc<Container>, TaskError>, bool) {
        let mut containers = lock(&self.containers);
        let entry = containers.remove(id);
        let given_up = entry.as_ref().is_some_and(Entry::is_given_up);
        let had_room = entry.is_some_and(|entry| entry.limits().is_some());
        match &result {
            Ok(container) => {
                container.publisher.publish(&create_event(container));
                container.watch_init();
                let made = if given_up {
                    Entry::GivenUp
                } else {
                    Entry::Made
                };
                containers.insert(id.to_owned(), made(container.clone()));
            }
            Err(_) if had_room => drop(tokio::spawn(take_room(self.clone()))),
            Err(_) => (),
        }
        (result, given_up)
    }

    fn reserve(&self, id: &str) -> Result<(), TaskError> {
        crate::rundir::check_id(id).map_err(|error| TaskError::Invalid(error.to_string()))?;
        if !self.life.ask() {
            return Err(SandboxError::Stopped.into());
        }
        let mut containers = lock(&self.containers);
        if containers.contains_key(id) {
            return Err(TaskError::ContainerExists(id.to_owned()));
        }
        containers.insert(id.to_owned(), Entry::Creating(Creation::default()));
        Ok(())
    }

    async fn make_reserved(
        self: &Arc<Self>,
        config: ContainerConfig,
        stdio: StdioPaths,
    ) -> Result<Arc<Container>, TaskError> {
        hooks::check(&config)?;
        let _busy = self.busy.read().await;
        if !self.life.is_open() {
            return Err(SandboxError::Stopped.into());
        }
        let created = async {
            let (sandbox, prepared) = self.sandbox_for(&config).await?;
            let publisher = match config.api {
                Api::Task => self.publisher.clone(),
                Api::Sandbox => self.publisher.muted(),
            };
            let container = Container::new(config.clone(), stdio, prepared, sandbox, publisher);
            let booted = container.sandbox().agent().is_some();
            if (booted || self.host.knows_network())
                && let Err(error) = self.enter_guest(&container).await
            {
                if let Err(busy) = container.detach_devices().await {
                    // containerd does not delete what it has not created: nobody would
                    // come again to take the devices back.
                    let busy = crate::error::chain(&busy);
                    warn!(
                        container_id = config.id,
                        error = busy,
                        "the machine is ended"
                    );
                    container.sandbox().kill().await;
                }
                return Err(error);
            }
            Ok(Arc::new(container))
        };
        let result = created.await;
        if result.is_err() {
            self.release(&config.id).await;
            self.host.hooks().stopped(&config).await;
        }
        result
    }

    /// Has the guest make a container it does not have yet, and boots it for
    /// that if need be.
    async fn enter_guest(self: &Arc<Self>, container: &Container) -> Result<(), TaskError> {
        let Some(mut pending) = container.take_pending() else {
            return Ok(());
        };
        let sandbox = container.sandbox();
        if sandbox.agent().is_none() {
            // The machine is made with it.
            self.count(container, true);
            self.host
                .boot(sandbox, container.config(), &mut pending.prepared)
                .await?;
            tokio::spawn(follow_events(self.clone(), sandbox.clone()));
            let (sandbox, timeout) = (sandbox.clone(), self.host.hang_timeout());
            tokio::spawn(async move { sandbox.watch(timeout).await });
        } else {
            self.make_room(container).await?;
        }
        container.enter_guest(pending.prepared).await
    }

    /// Starts a container or an exec.
    ///
    /// # Errors
    ///
    /// Those of [`Container::start`], and for a container that waits for its
    /// machine those of the boot.
    pub async fn start(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<u32, TaskError> {
        self.start_in(&self.container(id)?, exec_id).await
    }

    /// Starts a container or an exec in it, whichever way it came.
    ///
    /// # Errors
    ///
    /// Those of [`Pod::start`].
    pub(super) async fn start_in(
        self: &Arc<Self>,
        container: &Arc<Container>,
        exec_id: &str,
    ) -> Result<u32, TaskError> {
        let _busy = self.busy.read().await;
        let enter = self.enter_guest(container);
        container.start(exec_id, enter).await?;
        if exec_id.is_empty() {
            let (config, pid) = (container.config(), container.pid());
            self.host.hooks().started(config, pid).await;
        }
        Ok(container.pid())
    }

    /// The sandbox, made for this container if need be, and the container's
    /// storage.
    async fn sandbox_for(
        self: &Arc<Self>,
        config: &ContainerConfig,
    ) -> Result<(Arc<Sandbox>, Prepared), TaskError> {
        let mut first = None;
        let open = async {
            let prepared = first.insert(self.host.prepare(config, None).await?);
            let sandbox = self.host.open(config).await?;
            prepared.pci_devices = self.host.guest_devices(config).await?;
            Ok::<_, TaskError>(Arc::new(sandbox))
        };
        let sandbox = self.sandbox.get_or_try_init(|| open).await?.clone();
        let prepared = match first {
            Some(prepared) => prepared,
            None => self.join(config, &sandbox).await?,
        };
        Ok((sandbox, prepared))
    }

    /// Prepares a container for a machine that is there already.
    async fn join(
        &self,
        config: &ContainerConfig,
        sandbox: &Sandbox,
    ) -> Result<Prepared, TaskError> {
        if let Some(stop) = sandbox.stopped().now_or_never() {
            return Err(MachineError::Stopped(stop).into());
        }
        let booted = sandbox.agent().is_some();
        // The pod's first container may be gone before it was ever started.
        let alone = lock(&self.containers).len() == 1;
        if !booted && !alone {
            return Err(TaskError::Sandbox(SandboxError::NotBooted {
                container_id: config.id.clone(),
            }));
        }
        let pci_devices = if booted {
            self.host.attach_devices(sandbox, config).await?
        } else {
            self.host.guest_devices(config).await?
        };
        let mut prepared = self.host.prepare(config, sandbox.slots()).await?;
        prepared.pci_devices = pci_devices;
        if booted && prepared.uses_shared_dir {
            self.host.share(sandbox).await?;
        }
        self.host.hooks().create(config, sandbox.pid()).await?;
        Ok(prepared)
    }

    /// Deletes an exec, or a container and all that belongs to it. One that is being
    /// created is not there yet, and is deleted as soon as it is. One whose disk has a
    /// request under way that the host does not answer is still there: what is told to be
    /// gone uses no device of the host. Whoever asked asks again, as containerd's CRI
    /// plugin does. To kill the machine would take the pod's other containers along, and
    /// end no sooner: a process with such a request is not gone before it is answered.
    ///
    /// # Errors
    ///
    /// `NoContainer`; `WrongPhase` while it runs; those of [`Container::detach_devices`].
    pub async fn delete(
        self: &Arc<Self>,
        request: &DeleteRequest,
    ) -> Result<DeleteResponse, TaskError> {
        if request.exec_id.is_empty() {
            self.give_up(&request.id);
        }
        let container = self.container(&request.id)?;
        let exit = if request.exec_id.is_empty() {
            self.delete_container(&container).await?
        } else {
            container.delete_exec(&request.exec_id).await?
        };
        Ok(DeleteResponse {
            pid: container.pid(),
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        })
    }

    /// The same of a container, whichever way it came.
    async fn delete_container(
        self: &Arc<Self>,
        container: &Arc<Container>,
    ) -> Result<Exit, TaskError> {
        let exit = container.delete().await?;
        self.forget(container).await?;
        container.publisher.publish(&TaskDelete {
            container_id: container.config().id.clone(),
            pid: container.pid(),
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        });
        Ok(exit)
    }

    /// What the host has for a container that the guest does not have.
    async fn release(&self, id: &str) {
        if let Some(sandbox) = self.sandbox.get() {
            self.host.detach_devices(sandbox, id).await;
        }
        self.host.release(id).await;
    }

    /// Has a container that is being created be deleted as soon as it is there. containerd
    /// deletes a task whose creation took longer than its caller waited.
    fn give_up(&self, id: &str) {
        if let Some(Entry::Creating(creation)) = lock(&self.containers).get_mut(id) {
            creation.given_up = true;
        }
    }

    /// What the host keeps of a container that is gone from the guest.
    async fn forget(self: &Arc<Self>, container: &Container) -> Result<(), TaskError> {
        let _busy = self.busy.read().await;
        let config = container.config();
        if let Err(error) = container.detach_devices().await {
            let stopped = |phase: Phase| phase.exit().map(Phase::Stopped);
            container.init().advance("keep", stopped)?;
            return Err(error);
        }
        self.release(&config.id).await;
        self.host.hooks().stopped(config).await;
        lock(&self.containers).remove(&config.id);
        tokio::spawn(take_room(self.clone()));
        Ok(())
    }

    /// Ends the pod if it has no containers any more but those that were given up; else
    /// does nothing, as containerd asks after each container. Its sandbox by the Sandbox
    /// API is none if it is asked for: containerd does so when it does not know that
    /// sandbox. One that is being created is given up by this: whoever asked for it was
    /// restarted meanwhile, and found no task.
    pub async fn shutdown(&self, id: &str) {
        self.give_up(id);
        let is_sandbox = self.find(id, Api::Sandbox).is_some();
        let is_in_use = {
            let containers = lock(&self.containers);
            let mut others = containers
                .iter()
                .filter(|(other, _)| !is_sandbox || *other != id);
            others.any(|(_, entry)| !entry.is_given_up())
        };
        if !is_in_use {
            self.stop().await;
        }
    }

    /// Kills the machine, frees what the pod has on the host, and lets
    /// [`Pod::ended`] resolve; who asks for a container meanwhile is refused. The guest is
    /// not asked to power off: containers' file systems were unmounted with their deletion,
    /// and it has nothing else. Hooks that run may end, within [`HOOKS_TIMEOUT`]: they undo
    /// what is the host's.
    pub async fn stop(&self) {
        self.life.close();
        self.host.teardown().await;
        let idle = tokio::time::timeout(HOOKS_TIMEOUT, self.busy.write()).await;
        if idle.is_err() {
            warn!("hooks do not end");
        }
        self.life.end();
    }

    /// Resolves when nobody has asked for a container, and containerd has removed `bundle`.
    /// Whoever started the shim has given up and did not say so: containerd kills a `start`
    /// that outlives its caller's patience, and asks for no `delete` of it.
    pub async fn abandoned(&self, bundle: &Path) {
        self.life.abandoned(bundle).await;
    }

    /// Resolves after [`Pod::stop`].
    pub async fn ended(&self) {
        self.life.ended().await;
    }
}

fn load_spec(bundle: &Path) -> Result<Spec, TaskError> {
    let path = bundle.join("config.json");
    Spec::load(&path).map_err(|error| TaskError::Invalid(format!("{}: {error}", path.display())))
}

fn create_event(container: &Container) -> TaskCreate {
    let config = container.config();
    let stdio = container.init().stdio.clone();
    TaskCreate {
        container_id: config.id.clone(),
        bundle: config.bundle.display().to_string(),
        rootfs: config.rootfs.clone(),
        io: Some(TaskIO {
            stdin: stdio.stdin,
            stdout: stdio.stdout,
            stderr: stdio.stderr,
            terminal: stdio.terminal,
            ..Default::default()
        })
        .into(),
        pid: container.pid(),
        ..Default::default()
    }
}

/// Passes the agent's events on until the machine dies.
async fn follow_events(pod: Arc<Pod>, sandbox: Arc<Sandbox>) {
    let request = agent::Empty::default();
    loop {
        let Some(agent) = sandbox.agent() else { return };
        let context = ttrpc::context::Context::default();
        let next = tokio::select! {
            next = agent.next_event(context, &request) => next,
            stop = sandbox.stopped() => return info!(%stop, "no more events"),
        };
        match next {
            Ok(event) => pod.report(&event),
            Err(error) => return warn!(%error, "the agent tells no events"),
        }
        tokio::time::sleep(OOM_PAUSE).await;
    }
}

impl Pod {
    /// The container's name comes from the guest: only one we know is passed on.
    fn report(&self, event: &agent::Event) {
        if !event.has_oom_kill() {
            return;
        }
        match self.container(&event.container_id) {
            Ok(container) => container.report_oom(event.oom_kill().count),
            Err(_) => warn!("the guest reports on a container it does not have"),
        }
    }
}
