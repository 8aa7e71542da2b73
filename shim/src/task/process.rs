//! One process of a container: its init or an exec.
//!
//! ```text
//!                      +--failed: init--+
//!                      v                |
//!  Created --start--> Starting --ok--> Running --pause--> Pausing --> Paused
//!     |                  |              |  ^                |           |
//!     |                  |exec failed   |  +----------------+--resume---+
//!     +------exit--------+------exit----+-----------exit----------------+
//!                                v  <---failed: init--+
//!                             Stopped --delete--> Deleting --> forgotten
//! ```
//!
//! The phase is the only state; it moves in one step under the watch channel's
//! own lock, which is held for the step alone. Events are queued inside the step
//! that they report, so their order is the order of the phases: an exit that
//! arrives while the process is Starting waits for Running.

use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::SystemTime;

use containerd_shim_protos::api::{StateResponse, Status};
use tokio::sync::watch;

use super::TaskError;
use super::io::{StdioPaths, StreamError, Streams};
use crate::events::timestamp;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255.
    pub status: u32,
    /// When; the host's clock.
    pub at: SystemTime,
}

impl Exit {
    /// An exit that happens now.
    pub fn now(status: u32) -> Self {
        Self {
            status,
            at: SystemTime::now(),
        }
    }
}

/// What a process is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Exists, was not started.
    Created,
    /// A start is under way.
    Starting,
    /// Runs.
    Running,
    /// A pause is under way.
    Pausing,
    /// Frozen.
    Paused,
    /// Has exited.
    Stopped(Exit),
    /// Has exited and is being removed.
    Deleting(Exit),
}

impl Phase {
    /// The exit, when there was one.
    pub fn exit(self) -> Option<Exit> {
        match self {
            Self::Stopped(exit) | Self::Deleting(exit) => Some(exit),
            Self::Created | Self::Starting | Self::Running | Self::Pausing | Self::Paused => None,
        }
    }

    /// In a word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Stopped(_) => "stopped",
            Self::Deleting(_) => "being deleted",
        }
    }

    fn status(self) -> Status {
        match self {
            Self::Created | Self::Starting => Status::CREATED,
            Self::Running => Status::RUNNING,
            Self::Pausing => Status::PAUSING,
            Self::Paused => Status::PAUSED,
            Self::Stopped(_) | Self::Deleting(_) => Status::STOPPED,
        }
    }
}

/// A process and what the host keeps about it.
pub struct Process {
    /// Its container.
    pub container_id: String,
    /// Empty for the init process.
    pub exec_id: String,
    /// Where containerd wants its streams.
    pub stdio: StdioPaths,
    /// An exec's OCI process, ready for the guest.
    pub command: Vec<u8>,
    /// In the guest, of an exec that was started.
    pub guest_pid: OnceLock<u32>,
    phase: watch::Sender<Phase>,
    streams: Mutex<Attached>,
    size: Mutex<(u32, u32)>,
}

/// A process's streams, once it has them.
#[derive(Default)]
struct Attached {
    streams: Option<Streams>,
    /// Whether CloseIO came. It may come before the streams: a client whose input is
    /// empty calls it at once.
    stdin_closed: bool,
}

impl Process {
    /// A process in phase Created.
    pub fn new(container_id: &str, exec_id: &str, stdio: StdioPaths, command: Vec<u8>) -> Self {
        Self {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            stdio,
            command,
            guest_pid: OnceLock::new(),
            phase: watch::Sender::new(Phase::Created),
            streams: Mutex::default(),
            size: Mutex::new((0, 0)),
        }
    }

    /// For messages: `container` or `container/exec`.
    pub fn name(&self) -> String {
        if self.exec_id.is_empty() {
            self.container_id.clone()
        } else {
            format!("{}/{}", self.container_id, self.exec_id)
        }
    }

    /// The phase now.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Moves the phase by `step`, which names the next phase or `None` when the
    /// present one does not allow `action`.
    ///
    /// # Errors
    ///
    /// `WrongPhase`.
    pub fn advance(
        &self,
        action: &'static str,
        step: impl FnOnce(Phase) -> Option<Phase>,
    ) -> Result<Phase, TaskError> {
        let mut before = Phase::Created;
        let moved = self.phase.send_if_modified(|phase| {
            before = *phase;
            match step(before) {
                Some(next) => {
                    *phase = next;
                    true
                }
                None => false,
            }
        });
        if moved {
            Ok(before)
        } else {
            Err(self.wrong_phase(action, before))
        }
    }

    /// The error for an action the phase does not allow.
    pub fn wrong_phase(&self, action: &'static str, phase: Phase) -> TaskError {
        TaskError::WrongPhase {
            action,
            process: self.name(),
            phase: phase.name(),
        }
    }

    /// Records the exit, once no start is under way; `report` runs in the same
    /// step. A second exit is ignored.
    pub async fn finish(&self, exit: Exit, report: impl Fn(Exit)) {
        let mut changes = self.phase.subscribe();
        loop {
            let settled = |phase: &Phase| *phase != Phase::Starting;
            // Never fails: this process holds the sender.
            if changes.wait_for(settled).await.is_err() {
                return;
            }
            let mut busy = false;
            self.phase.send_if_modified(|phase| match *phase {
                Phase::Starting => {
                    busy = true;
                    false
                }
                Phase::Stopped(_) | Phase::Deleting(_) => false,
                Phase::Created | Phase::Running | Phase::Pausing | Phase::Paused => {
                    report(exit);
                    *phase = Phase::Stopped(exit);
                    true
                }
            });
            if !busy {
                return;
            }
        }
    }

    /// Waits for the exit.
    pub async fn exited(&self) -> Exit {
        let mut changes = self.phase.subscribe();
        let phase = changes.wait_for(|phase| phase.exit().is_some()).await;
        phase
            .ok()
            .and_then(|phase| phase.exit())
            .unwrap_or_else(|| Exit::now(super::container::LOST_STATUS))
    }

    /// Keeps the process's streams.
    pub fn attach(&self, mut streams: Streams) {
        let mut attached = lock(&self.streams);
        if attached.stdin_closed {
            streams.close_stdin();
        }
        attached.streams = Some(streams);
    }

    /// Takes the streams away; dropping them closes the host's ends.
    pub fn detach(&self) -> Option<Streams> {
        lock(&self.streams).streams.take()
    }

    /// Starts to copy the input.
    ///
    /// # Errors
    ///
    /// When it cannot be opened.
    pub fn start_input(&self) -> Result<(), StreamError> {
        let mut attached = lock(&self.streams);
        let streams = attached.streams.as_mut();
        streams.map_or(Ok(()), Streams::start_input)
    }

    /// Lets the input end once containerd has closed its side too.
    pub fn close_stdin(&self) {
        let mut attached = lock(&self.streams);
        attached.stdin_closed = true;
        if let Some(streams) = &mut attached.streams {
            streams.close_stdin();
        }
    }

    /// Notes a terminal size for when the process starts.
    pub fn set_size(&self, width: u32, height: u32) {
        *lock(&self.size) = (width, height);
    }

    /// The size noted last, zeros when none was.
    pub fn size(&self) -> (u32, u32) {
        *lock(&self.size)
    }

    /// containerd's view of the process.
    pub fn state(&self, bundle: &str, pid: u32) -> StateResponse {
        let phase = self.phase();
        let exit = phase.exit();
        StateResponse {
            id: self.container_id.clone(),
            exec_id: self.exec_id.clone(),
            bundle: bundle.to_owned(),
            pid,
            status: phase.status().into(),
            stdin: self.stdio.stdin.clone(),
            stdout: self.stdio.stdout.clone(),
            stderr: self.stdio.stderr.clone(),
            terminal: self.stdio.terminal,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| timestamp(exit.at)).into(),
            ..Default::default()
        }
    }
}

/// Nothing panics while these short locks are held; a poisoned one is as good.
pub fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn process() -> Arc<Process> {
        Arc::new(Process::new("c", "", StdioPaths::default(), Vec::new()))
    }

    fn start(phase: Phase) -> Option<Phase> {
        (phase == Phase::Created).then_some(Phase::Starting)
    }

    #[tokio::test]
    async fn an_exit_waits_for_the_start_to_be_told() {
        let process = process();
        process.advance("start", start).unwrap();
        let told = Arc::new(Mutex::new(Vec::new()));
        let exit = tokio::spawn({
            let (process, told) = (process.clone(), told.clone());
            async move {
                process
                    .finish(Exit::now(3), |_| lock(&told).push("exit"))
                    .await;
            }
        });
        tokio::task::yield_now().await;
        assert_eq!(process.phase(), Phase::Starting);
        let running = process.advance("start", |_| {
            lock(&told).push("start");
            Some(Phase::Running)
        });
        running.unwrap();
        exit.await.unwrap();
        assert_eq!(*lock(&told), ["start", "exit"]);
        assert_eq!(process.exited().await.status, 3);
    }

    #[tokio::test]
    async fn the_first_exit_counts() {
        let process = process();
        process.finish(Exit::now(1), |_| ()).await;
        process.finish(Exit::now(2), |_| panic!("told twice")).await;
        assert_eq!(process.exited().await.status, 1);
        assert!(process.advance("start", start).is_err());
    }
}
