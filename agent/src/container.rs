//! One container and its processes.
//!
//! ```text
//!   create -> Created --start--> Running --exit--> Stopped --delete--> gone
//! ```
//!
//! The state is not kept, it is what the parts say: Created holds the init's
//! [`Spawning`], Stopped is an exit status.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nacre_protocol::idmap::IdMaps;
use oci_spec::runtime::{LinuxNamespaceType, LinuxSeccomp, Process as OciProcess, Spec};
use tokio::task::AbortHandle;

use crate::cgroup::Cgroup;
use crate::cgroup::oom::OomWatch;
use crate::drivers::ProcessEdits;
use crate::engine::init::{Kind, Request};
use crate::engine::is_new;
use crate::engine::spawn::{Spawning, spawn};
use crate::engine::sys::{self, WindowSize};
use crate::error::{Context, Error, Result};
use crate::reaper::{ExitWatch, Reaper};
use crate::stdio::{Connections, ProcessIo};

/// A process of a container: its init or an exec.
#[derive(Debug)]
pub struct Process {
    /// In the guest's PID namespace.
    pub pid: i32,
    /// When and how it ended.
    pub exit: ExitWatch,
    /// Its streams.
    pub io: ProcessIo,
}

impl Process {
    /// Starts a process up to its execution.
    ///
    /// # Errors
    ///
    /// Above all a command that cannot be executed.
    pub async fn launch(
        reaper: &Reaper,
        request: &Request,
        connections: Connections,
    ) -> Result<(Self, Spawning)> {
        let (streams, plumbing) = connections.plumb()?;
        let launching = reaper.launching();
        let mut spawning = spawn(request, streams)?;
        let pid = spawning.pid().await?;
        let exit = launching.watch(pid);
        // From here on a failure leaves a process that is about to exit by
        // itself: it has reported and has nothing left to do.
        let terminal = spawning.ready().await?;
        let io = plumbing.start(terminal, &exit)?;
        Ok((Self { pid, exit, io }, spawning))
    }

    /// Sends a signal.
    ///
    /// # Errors
    ///
    /// `NotFound` if it has exited, `InvalidArgument` for no signal.
    pub fn signal(&self, signal: u32) -> Result<()> {
        let gone = || Error::NotFound(format!("process {}", self.pid));
        if self.exit.has_exited() {
            return Err(gone());
        }
        // No other process can have the number: it is reaped on this thread.
        match sys::kill(self.pid, signal_number(signal)?) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Err(gone()),
            result => result.with_context(|| format!("signal {signal}")),
        }
    }
}

/// A signal's number, checked.
///
/// # Errors
///
/// `InvalidArgument`.
pub fn signal_number(signal: u32) -> Result<i32> {
    i32::try_from(signal)
        .ok()
        .filter(|number| (0..=libc::SIGRTMAX()).contains(number))
        .ok_or_else(|| Error::InvalidArgument(format!("signal {signal}")))
}

/// An exec: its id is taken from the moment it is asked for.
enum ExecSlot {
    Starting,
    Running(Arc<Process>),
}

/// A container.
pub struct Container {
    /// Its id.
    pub id: String,
    /// `CONTAINERS_DIR/<id>`.
    pub dir: PathBuf,
    /// Serial numbers of disks that become another container's.
    pub disks: Vec<String>,
    /// Its cgroup.
    pub cgroup: Cgroup,
    /// Its first process.
    pub init: Arc<Process>,
    /// Kills by the kernel.
    pub oom: Arc<OomWatch>,
    /// Until it is started.
    spawning: Mutex<Option<Spawning>>,
    seccomp: Option<LinuxSeccomp>,
    users: Option<IdMaps>,
    edits: ProcessEdits,
    execs: Mutex<HashMap<String, ExecSlot>>,
    tasks: Vec<AbortHandle>,
}

/// What a container is made of, for [`Container::new`].
pub struct Parts {
    /// See [`Container`].
    pub id: String,
    /// See [`Container`].
    pub dir: PathBuf,
    /// See [`Container`].
    pub disks: Vec<String>,
    /// See [`Container`].
    pub cgroup: Cgroup,
    /// See [`Container`].
    pub init: Process,
    /// See [`Container`].
    pub oom: OomWatch,
    /// The init's release.
    pub spawning: Spawning,
    /// What its devices' drivers did to its first process, and do to all others.
    pub edits: ProcessEdits,
}

impl Container {
    /// A created container.
    #[must_use]
    pub fn new(parts: Parts, spec: &Spec) -> Self {
        let oom = Arc::new(parts.oom);
        let init = Arc::new(parts.init);
        let watching = oom.clone();
        let mut tasks = vec![tokio::spawn(async move { watching.run().await }).abort_handle()];
        if !is_new(spec, LinuxNamespaceType::Pid) {
            // Without a PID namespace nothing ends the rest when init exits.
            let (cgroup, mut exit) = (parts.cgroup.clone(), init.exit.clone());
            let end = async move {
                exit.wait().await;
                if let Err(error) = cgroup.kill() {
                    tracing::warn!("{}", error.full());
                }
            };
            tasks.push(tokio::spawn(end).abort_handle());
        }
        let linux = spec.linux().as_ref();
        Self {
            id: parts.id,
            dir: parts.dir,
            disks: parts.disks,
            cgroup: parts.cgroup,
            init,
            oom,
            spawning: Mutex::new(Some(parts.spawning)),
            seccomp: linux.and_then(|linux| linux.seccomp().clone()),
            users: IdMaps::of_spec(spec),
            edits: parts.edits,
            execs: Mutex::default(),
            tasks,
        }
    }

    fn execs(&self) -> MutexGuard<'_, HashMap<String, ExecSlot>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Executes the init.
    ///
    /// # Errors
    ///
    /// `FailedPrecondition` if it was started before, or has exited.
    pub async fn start(&self) -> Result<()> {
        let spawning = self
            .spawning
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let spawning = spawning
            .ok_or_else(|| Error::FailedPrecondition(format!("{} was started", self.id)))?;
        if self.init.exit.has_exited() {
            return Err(Error::FailedPrecondition(format!("{} has exited", self.id)));
        }
        spawning.go()?;
        spawning.executed().await
    }

    /// Runs a further process.
    ///
    /// # Errors
    ///
    /// `AlreadyExists` for an id in use, `FailedPrecondition` unless the
    /// container runs, `InvalidArgument` for a command that cannot be executed.
    pub async fn exec(
        &self,
        reaper: &Reaper,
        exec_id: &str,
        mut process: OciProcess,
        connections: Connections,
        window: Option<WindowSize>,
    ) -> Result<i32> {
        self.check_running()?;
        self.reserve(exec_id)?;
        self.edits.apply(&mut process);
        let request = Request {
            cgroup: self.cgroup.path().to_owned(),
            window,
            kind: Kind::Exec {
                container_pid: self.init.pid,
                process: Box::new(process),
                seccomp: self.seccomp.clone(),
                users: self.users.clone(),
            },
        };
        let result = async {
            let (process, spawning) = Process::launch(reaper, &request, connections).await?;
            spawning.executed().await?;
            Ok(process)
        };
        match result.await {
            Ok(process) => {
                let pid = process.pid;
                let slot = ExecSlot::Running(Arc::new(process));
                self.execs().insert(exec_id.to_owned(), slot);
                Ok(pid)
            }
            Err(error) => {
                self.execs().remove(exec_id);
                Err(error)
            }
        }
    }

    fn check_running(&self) -> Result<()> {
        let refuse = |why| Err(Error::FailedPrecondition(format!("{} {why}", self.id)));
        if self.init.exit.has_exited() {
            return refuse("has exited");
        }
        let spawning = self.spawning.lock().unwrap_or_else(PoisonError::into_inner);
        if spawning.is_some() {
            return refuse("was not started");
        }
        if self.cgroup.is_frozen()? {
            return refuse("is paused");
        }
        Ok(())
    }

    fn reserve(&self, exec_id: &str) -> Result<()> {
        let mut execs = self.execs();
        if execs.contains_key(exec_id) {
            return Err(Error::AlreadyExists(format!("exec {exec_id}")));
        }
        execs.insert(exec_id.to_owned(), ExecSlot::Starting);
        Ok(())
    }

    /// The init for an empty id, else the exec.
    ///
    /// # Errors
    ///
    /// `NotFound`.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        match self.execs().get(exec_id) {
            Some(ExecSlot::Running(process)) => Ok(process.clone()),
            _ => Err(Error::NotFound(format!("exec {exec_id} of {}", self.id))),
        }
    }

    /// Forgets an exec.
    ///
    /// # Errors
    ///
    /// `NotFound`; `FailedPrecondition` while it runs.
    pub fn delete_exec(&self, exec_id: &str) -> Result<()> {
        if !self.process(exec_id)?.exit.has_exited() {
            return Err(Error::FailedPrecondition(format!(
                "exec {exec_id} is running"
            )));
        }
        self.execs().remove(exec_id);
        Ok(())
    }

    /// Sends a signal to all processes.
    ///
    /// # Errors
    ///
    /// `NotFound` if there are none.
    pub fn signal_all(&self, signal: u32) -> Result<()> {
        let number = signal_number(signal)?;
        let pids = self.cgroup.processes()?;
        if pids.is_empty() {
            return Err(Error::NotFound(format!("processes of {}", self.id)));
        }
        if number == libc::SIGKILL {
            return self.cgroup.kill();
        }
        for pid in pids.into_iter().filter_map(|pid| i32::try_from(pid).ok()) {
            match sys::kill(pid, number) {
                Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
                    return Err(error).with_context(|| format!("signal {signal} to {pid}"));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}
