//! Collects the exit statuses of all children: container processes, helpers,
//! and orphans that became PID 1's.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::engine::sys;

/// How and when a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 + the signal's number.
    pub status: u32,
    /// Seconds since the epoch.
    pub seconds: i64,
    /// And nanoseconds.
    pub nanos: u32,
}

impl Exit {
    fn now(status: u32) -> Self {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Self {
            status,
            seconds: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
            nanos: now.subsec_nanos(),
        }
    }
}

/// A process's exit, now or later. The status stays.
#[derive(Debug, Clone)]
pub struct ExitWatch(watch::Receiver<Option<Exit>>);

impl ExitWatch {
    /// The exit, if it has happened.
    #[must_use]
    pub fn get(&self) -> Option<Exit> {
        *self.0.borrow()
    }

    /// Whether it has happened.
    #[must_use]
    pub fn has_exited(&self) -> bool {
        self.get().is_some()
    }

    /// Waits for it.
    pub async fn wait(&mut self) {
        // An error would mean that the reaper is gone, and the agent with it.
        let _ = self.0.wait_for(Option::is_some).await;
    }
}

#[derive(Debug, Default)]
struct Inner {
    watched: HashMap<i32, watch::Sender<Option<Exit>>>,
    /// Launches under way: children whose PID the agent does not know yet.
    launches: usize,
    /// Exits meanwhile of PIDs nobody watched.
    early: HashMap<i32, Exit>,
}

/// The one caller of waitpid(2).
#[derive(Debug, Default)]
pub struct Reaper(Mutex<Inner>);

/// A launch under way; see [`Reaper::launching`].
#[derive(Debug)]
pub struct Launching<'a>(&'a Reaper);

impl Reaper {
    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be held from before a process is started until it is watched: no
    /// exit is lost in between.
    pub fn launching(&self) -> Launching<'_> {
        self.lock().launches += 1;
        Launching(self)
    }

    /// Collects children for as long as the agent runs.
    ///
    /// # Errors
    ///
    /// If SIGCHLD cannot be handled.
    pub async fn run(self: Arc<Self>) -> io::Result<()> {
        let mut child = signal(SignalKind::child())?;
        loop {
            self.reap();
            if child.recv().await.is_none() {
                return Ok(());
            }
        }
    }

    fn reap(&self) {
        while let Some((pid, status)) = sys::reap() {
            let exit = Exit::now(status);
            let mut inner = self.lock();
            if let Some(sender) = inner.watched.remove(&pid) {
                sender.send_replace(Some(exit));
            } else if inner.launches > 0 {
                inner.early.insert(pid, exit);
            }
        }
    }
}

impl Launching<'_> {
    /// Watches the process that was launched.
    #[must_use]
    pub fn watch(self, pid: i32) -> ExitWatch {
        let mut inner = self.0.lock();
        let early = inner.early.remove(&pid);
        let (sender, receiver) = watch::channel(early);
        if early.is_none() {
            inner.watched.insert(pid, sender);
        }
        ExitWatch(receiver)
    }
}

impl Drop for Launching<'_> {
    fn drop(&mut self) {
        let mut inner = self.0.lock();
        inner.launches = inner.launches.saturating_sub(1);
        if inner.launches == 0 {
            inner.early.clear();
        }
    }
}
