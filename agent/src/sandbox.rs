//! The operations of `agent.proto` as plain methods; `service.rs` only
//! translates.
//!
//! Containers live in a map behind a lock that is never held across an await:
//! no call waits for another container.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use nacre_protocol::agent::{
    ConfigureSandboxRequest, CreateContainerRequest, DirectoryVolume, Disk, Driver, ExecRequest,
    ReadFileRequest, StatsResponse, TmpfsVolume,
};
use oci_spec::runtime::{ContainerState, LinuxResources, Process as OciProcess, Spec, State};
use tokio::sync::OnceCell;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::boot;
use crate::cgroup::oom::OomWatch;
use crate::cgroup::{Cgroup, CgroupBase};
use crate::clock;
use crate::container::{Container, Parts, Process};
use crate::cpus;
use crate::devices;
use crate::disk;
use crate::drivers::{Drivers, ProcessEdits};
use crate::engine::error::Failure;
use crate::engine::init::{Kind, Request, set_sysctl};
use crate::error::{Context, Error, Result};
use crate::hugepages::{self, HugePages};
use crate::network::Network;
use crate::pci;
use crate::pids;
use crate::reaper::{Exit, Reaper};
use crate::shared::SharedDir;
use crate::stdio;
use crate::storage;
use crate::streams::StreamHub;
use crate::volumes::{self, Volumes};

/// What the agent is part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// PID 1 of a guest: the machine is ours.
    Guest,
    /// A test on an ordinary Linux: its clock is not ours, and powering off is
    /// leaving.
    Serve,
}

enum Slot {
    Creating,
    Ready(Arc<Container>),
}

/// The sandbox.
pub struct Sandbox {
    mode: Mode,
    cgroups: CgroupBase,
    reaper: Arc<Reaper>,
    streams: Arc<StreamHub>,
    containers: Mutex<HashMap<String, Slot>>,
    shared_dir: SharedDir,
    volumes: Arc<Volumes>,
    huge_pages: Arc<HugePages>,
    /// Once the sandbox is configured.
    drivers: OnceLock<Drivers>,
    /// Of the PID namespace that containers share, once one has asked for it.
    pause: OnceCell<Process>,
    oom_sender: UnboundedSender<(String, u64)>,
    oom_receiver: tokio::sync::Mutex<UnboundedReceiver<(String, u64)>>,
}

impl Sandbox {
    /// An empty sandbox.
    #[must_use]
    pub fn new(
        mode: Mode,
        cgroups: CgroupBase,
        reaper: Arc<Reaper>,
        streams: Arc<StreamHub>,
    ) -> Self {
        let (oom_sender, oom_receiver) = unbounded_channel();
        let pools = (mode == Mode::Guest).then(|| hugepages::POOLS.into());
        Self {
            mode,
            cgroups,
            reaper,
            streams,
            containers: Mutex::default(),
            shared_dir: SharedDir::default(),
            volumes: Arc::default(),
            huge_pages: Arc::new(HugePages::new(pools)),
            drivers: OnceLock::new(),
            pause: OnceCell::new(),
            oom_sender,
            oom_receiver: oom_receiver.into(),
        }
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// A container that was created.
    ///
    /// # Errors
    ///
    /// `NotFound`.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        match self.slots().get(id) {
            Some(Slot::Ready(container)) => Ok(container.clone()),
            _ => Err(Error::NotFound(format!("container {id}"))),
        }
    }

    /// Sets up what all containers share.
    ///
    /// # Errors
    ///
    /// Those of the steps.
    pub async fn configure(&self, request: ConfigureSandboxRequest) -> Result<()> {
        if !request.hostname.is_empty() {
            nix::unistd::sethostname(&request.hostname)
                .with_context(|| format!("set hostname {:?}", request.hostname))?;
        }
        if let Some(config) = request.network.as_ref() {
            Network::connect()?.configure(config).await?;
        }
        if request.shared_dir {
            self.shared_dir.mount().await?;
        }
        for (name, value) in &request.sysctls {
            set_sysctl(name, value).map_err(Failure::from)?;
        }
        let drivers = Drivers::default();
        drivers.attach(&request.drivers).await?;
        self.drivers
            .set(drivers)
            .map_err(|_| Error::FailedPrecondition("the sandbox was configured before".into()))
    }

    /// Mounts the shared directory, which has come since.
    ///
    /// # Errors
    ///
    /// Those of [`SharedDir::find`].
    pub async fn mount_shared(&self) -> Result<()> {
        match self.mode {
            Mode::Guest => self.shared_dir.find(Path::new("/sys")).await,
            Mode::Serve => Ok(()),
        }
    }

    /// Moves the guest's clock.
    ///
    /// # Errors
    ///
    /// Those of adjtimex(2).
    pub fn adjust_clock(&self, by_ns: i64) -> Result<()> {
        match self.mode {
            Mode::Guest => clock::adjust(by_ns).context("adjust the clock"),
            Mode::Serve => Ok(()),
        }
    }

    /// Has the guest use so many of its CPUs; returns how many it uses then.
    ///
    /// # Errors
    ///
    /// Those of [`cpus::set_online`].
    pub async fn set_cpus(&self, count: u32) -> Result<u32> {
        match self.mode {
            Mode::Guest => blocking(move || cpus::set_online(count)).await,
            Mode::Serve => Ok(count),
        }
    }

    /// Makes a container up to the execution of its process; returns its PID.
    ///
    /// # Errors
    ///
    /// `AlreadyExists`; `InvalidArgument` for a specification that cannot be
    /// carried out; those of the steps. Nothing is left behind then; after `Aborted` something
    /// may use its disks yet.
    pub async fn create(&self, request: CreateContainerRequest) -> Result<u32> {
        let id = request.container_id.clone();
        storage::check_id(&id)?;
        {
            let mut slots = self.slots();
            if slots.contains_key(&id) {
                return Err(Error::AlreadyExists(format!("container {id}")));
            }
            slots.insert(id.clone(), Slot::Creating);
        }
        let disks = serials(&request.disks);
        match self.try_create(request).await {
            Ok(container) => {
                let pid = container.init.pid.unsigned_abs();
                self.slots().insert(id, Slot::Ready(Arc::new(container)));
                Ok(pid)
            }
            Err(error) => {
                self.undo_create(&id).await;
                let released = disk::released(&disks).await;
                self.slots().remove(&id);
                Err(not_made(error, released))
            }
        }
    }

    async fn try_create(&self, request: CreateContainerRequest) -> Result<Container> {
        let id = request.container_id;
        let stdio = request.stdio.unwrap_or_default();
        let mut spec: Spec = parse(&request.spec, "spec")?;
        if pids::shares(&spec) {
            let pause = self.pause.get_or_try_init(|| pids::pause(&self.reaper));
            pids::join(&mut spec, pause.await?.pid);
        }
        if let Some(process) = spec.process_mut() {
            process.set_terminal(Some(stdio.terminal));
        }
        let dir = storage::container_dir(&id)?;
        std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        for disk in &request.disks {
            disk::wait_for_contents(&disk.serial, disk.size_bytes, disk.sector_bytes).await?;
        }
        for storage in request.storages {
            storage::mount_storage(&dir, storage).await?;
        }
        for file in &request.files {
            storage::write_file(&dir, file)?;
        }
        for subpath in &request.subpaths {
            volumes::bind_subpath(&dir, subpath)?;
        }
        devices::add(&mut spec, &request.block_devices).await?;
        let edits = self
            .add_pci(&mut spec, &request.pci_devices, &request.drivers)
            .await?;
        let spec = blocking(move || volumes::enter_shared(&spec).map(|()| spec)).await?;
        let connections = stdio::claim(&self.streams, &stdio).await?;
        let cgroup = self.cgroups.create(&id)?;
        limit(&cgroup, &spec)?;
        let disks = serials(&request.disks);
        let spec = self.reserve_pages(&id, spec).await?;
        let request = Request {
            cgroup: cgroup.path().to_owned(),
            window: stdio::window(&stdio),
            kind: Kind::Create {
                state: Box::new(created_state(&spec, &id, request.bundle)),
                spec: Box::new(spec),
            },
        };
        let (init, spawning) = Process::launch(&self.reaper, &request, connections).await?;
        let Kind::Create { spec, .. } = request.kind else {
            return Err(Error::Internal("not a creation".into()));
        };
        let parts = Parts {
            oom: OomWatch::new(&id, &cgroup, self.oom_sender.clone()),
            id,
            dir,
            disks,
            cgroup,
            init,
            spawning,
            edits,
        };
        Ok(Container::new(parts, &spec))
    }

    /// Gives a container PCI devices, and what their driver images have for it.
    async fn add_pci(
        &self,
        spec: &mut Spec,
        devices: &[String],
        images: &[Driver],
    ) -> Result<ProcessEdits> {
        if devices.is_empty() {
            return Ok(ProcessEdits::default());
        }
        let drivers = self.drivers.get().ok_or_else(|| {
            Error::FailedPrecondition("the sandbox has not been configured".into())
        })?;
        for device in devices {
            pci::arrived(device).await?;
        }
        drivers.attach(images).await?;
        devices::add_pci(spec, devices).await?;
        drivers.edit(spec, devices, images).await
    }

    async fn reserve_pages(&self, id: &str, spec: Spec) -> Result<Spec> {
        let (huge_pages, id) = (self.huge_pages.clone(), id.to_owned());
        blocking(move || huge_pages.reserve(&id, resources(&spec)).map(|()| spec)).await
    }

    /// The pages are free once the container's processes are gone.
    async fn release_pages(&self, id: &str) {
        let (huge_pages, id) = (self.huge_pages.clone(), id.to_owned());
        let release = blocking(move || {
            huge_pages.release(&id);
            Ok(())
        });
        if let Err(error) = release.await {
            tracing::warn!("{}", error.full());
        }
    }

    async fn undo_create(&self, id: &str) {
        let removed = match self.cgroups.create(id) {
            Ok(cgroup) => cgroup.remove().await,
            Err(error) => Err(error),
        };
        let unmounted = match storage::container_dir(id) {
            Ok(dir) => blocking(move || storage::remove(&dir)).await,
            Err(error) => Err(error),
        };
        self.release_pages(id).await;
        for error in [removed, unmounted].into_iter().filter_map(Result::err) {
            tracing::warn!("container {id}: {}", error.full());
        }
    }

    /// Runs a further process in a container; returns its PID.
    ///
    /// # Errors
    ///
    /// Those of [`Container::exec`].
    pub async fn exec(&self, request: ExecRequest) -> Result<u32> {
        let container = self.container(&request.container_id)?;
        storage::check_id(&request.exec_id)?;
        let stdio = request.stdio.unwrap_or_default();
        let mut process: OciProcess = parse(&request.process, "process")?;
        process.set_terminal(Some(stdio.terminal));
        let connections = stdio::claim(&self.streams, &stdio).await?;
        let window = stdio::window(&stdio);
        let pid = container
            .exec(&self.reaper, &request.exec_id, process, connections, window)
            .await?;
        Ok(pid.unsigned_abs())
    }

    /// Waits for a process's exit and its last output. With the exit, which it may be the
    /// cause of, comes how often the kernel has killed in the container for want of memory.
    ///
    /// # Errors
    ///
    /// `NotFound`.
    pub async fn wait(&self, container_id: &str, exec_id: &str) -> Result<(Exit, u64)> {
        let container = self.container(container_id)?;
        let process = container.process(exec_id)?;
        let (mut exit, drained) = (process.exit.clone(), process.io.drained());
        drop(process);
        exit.wait().await;
        drained.await;
        let exit = exit.get();
        let exit = exit.ok_or_else(|| Error::Internal("the reaper is gone".into()))?;
        Ok((exit, container.oom.count()))
    }

    /// Frees a stopped container.
    ///
    /// # Errors
    ///
    /// `FailedPrecondition` while its init runs, else those of the steps; the
    /// call may be repeated. Those of [`disk::released`] when there is no such container any
    /// more.
    pub async fn delete(&self, id: &str) -> Result<()> {
        let container = self.container(id)?;
        if !container.init.exit.has_exited() {
            return Err(Error::FailedPrecondition(format!(
                "container {id} is running"
            )));
        }
        if container.cgroup.path().exists() && container.cgroup.is_frozen()? {
            container.cgroup.thaw().await?;
        }
        container.cgroup.remove().await?;
        let dir = container.dir.clone();
        blocking(move || storage::remove(&dir)).await?;
        self.release_pages(id).await;
        self.slots().remove(id);
        disk::released(&container.disks).await
    }

    /// Applies new limits.
    ///
    /// # Errors
    ///
    /// Those of [`Cgroup::apply`] and [`HugePages::update`].
    pub async fn update(&self, id: &str, resources: &[u8]) -> Result<()> {
        let cgroup = self.container(id)?.cgroup.clone();
        let resources: LinuxResources = parse(resources, "resources")?;
        let (huge_pages, id) = (self.huge_pages.clone(), id.to_owned());
        blocking(move || huge_pages.update(&id, Some(&resources), || cgroup.apply(&resources)))
            .await
    }

    /// Makes a volume that is a tmpfs.
    ///
    /// # Errors
    ///
    /// Those of [`Volumes::make_tmpfs`].
    pub async fn make_tmpfs(&self, volume: TmpfsVolume) -> Result<()> {
        let volumes = self.volumes.clone();
        blocking(move || volumes.make_tmpfs(&volume)).await
    }

    /// Makes a volume of copied files, or replaces them.
    ///
    /// # Errors
    ///
    /// Those of [`Volumes::put_directory`].
    pub async fn put_directory(&self, volume: DirectoryVolume) -> Result<()> {
        let volumes = self.volumes.clone();
        blocking(move || volumes.put_directory(&volume)).await
    }

    /// The end of a file that came with a container.
    ///
    /// # Errors
    ///
    /// `NotFound` for the container, and those of [`volumes::read_end`].
    pub async fn read_file(&self, request: ReadFileRequest) -> Result<Vec<u8>> {
        let dir = self.container(&request.container_id)?.dir.clone();
        blocking(move || volumes::read_end(&dir, &request.path, request.max_bytes)).await
    }

    /// A container's counters.
    ///
    /// # Errors
    ///
    /// `NotFound`.
    pub fn stats(&self, id: &str) -> Result<StatsResponse> {
        self.container(id)?.cgroup.stats()
    }

    /// Waits for the next kill for want of memory: container and count.
    ///
    /// # Errors
    ///
    /// `FailedPrecondition` if someone else is waiting.
    pub async fn next_oom(&self) -> Result<(String, u64)> {
        let mut receiver = self
            .oom_receiver
            .try_lock()
            .map_err(|_| Error::FailedPrecondition("another caller waits for events".into()))?;
        receiver
            .recv()
            .await
            .ok_or_else(|| Error::Internal("no more events".into()))
    }

    /// Ends the machine, or in a test the agent with its containers.
    pub async fn shutdown(&self) {
        if self.mode == Mode::Guest {
            boot::power_off();
        }
        let ids: Vec<String> = self.slots().keys().cloned().collect();
        for id in ids {
            self.undo_create(&id).await;
        }
        if let Err(error) = self.cgroups.remove() {
            tracing::warn!("remove the cgroup base: {error}");
        }
        std::process::exit(0);
    }
}

/// Runs what may block on the pool for that.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Error::Internal(error.to_string()))?
}

/// Why there is no container: `error`, and worse than that, its disks may be in use yet.
fn not_made(error: Error, released: Result<()>) -> Error {
    match released {
        Ok(()) => error,
        Err(in_use) => Error::Aborted(format!("{}; {}", error.full(), in_use.full())),
    }
}

fn serials(disks: &[Disk]) -> Vec<String> {
    disks.iter().map(|disk| disk.serial.clone()).collect()
}

fn parse<T: serde::de::DeserializeOwned>(json: &[u8], what: &str) -> Result<T> {
    serde_json::from_slice(json).map_err(|error| Error::InvalidArgument(format!("{what}: {error}")))
}

/// What a container's hooks are told of it (runtime-spec 1.2, runtime.md, "State").
fn created_state(spec: &Spec, id: &str, bundle: String) -> State {
    let mut state = State::default();
    state
        .set_version(spec.version().clone())
        .set_id(id.to_owned())
        .set_status(ContainerState::Created)
        .set_bundle(bundle.into())
        .set_annotations(spec.annotations().clone());
    state
}

fn resources(spec: &Spec) -> Option<&LinuxResources> {
    let linux = spec.linux().as_ref();
    linux.and_then(|linux| linux.resources().as_ref())
}

fn limit(cgroup: &Cgroup, spec: &Spec) -> Result<()> {
    let resources = resources(spec);
    if let Some(resources) = resources {
        cgroup.apply(resources)?;
    }
    cgroup.restrict_devices(resources)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_that_are_in_use_are_told_with_what_failed() {
        let failed = || Error::NotFound("the command".into());
        let code = |error: Error| match error.into() {
            ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
            other => panic!("{other}"),
        };
        let made = code(not_made(failed(), Ok(())));
        let expected = (ttrpc::Code::NOT_FOUND, "the command not found".to_owned());
        assert_eq!(made, expected);
        let busy = Err(nix::errno::Errno::EBUSY).context("have /dev/vda for ourselves");
        let (code, text) = code(not_made(failed(), busy));
        assert_eq!(code, ttrpc::Code::ABORTED);
        let start = "the command not found; have /dev/vda for ourselves: ";
        assert!(text.starts_with(start), "{text}");
    }
}
