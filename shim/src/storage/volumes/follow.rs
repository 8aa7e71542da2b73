//! Copies of the kubelet's volumes in the guest, kept in step with the host.
//!
//! ```text
//!  Followers::follow --first container--> task: inotify watch, first copy --> ready
//!        |                                  |  change: settle, read, PutDirectory
//!        +--other containers: the same      |  failure: logged, tried again
//!           Follower ---last one dropped--> aborted
//! ```
//!
//! One task follows a volume for all containers of the pod. Nobody waits for it
//! but those who need the first copy. The guest keeps a copy until it ends.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use nacre_protocol::agent::DirectoryVolume;
use nacre_protocol::agent_ttrpc::AgentClient;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use protobuf::Message;
use sha2::{Digest, Sha256};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tracing::warn;

use super::directory::{self, CopyError};
use crate::error::chain;
use crate::task::lock;

/// Time the agent has to take a copy.
const PUT_TIMEOUT: Duration = Duration::from_secs(10);
/// Time between a change's first sign and its reading: the kubelet makes links
/// and removes its old directory after the step that counts.
const SETTLE: Duration = Duration::from_millis(50);
/// Time between attempts to bring over a change.
const RETRY: Duration = Duration::from_secs(5);

/// A volume that is copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopiedDir {
    /// In the guest.
    pub name: String,
    /// On the host.
    pub source: PathBuf,
}

impl CopiedDir {
    /// Whether it can be copied at all.
    pub(super) fn check(&self) -> Result<(), CopyError> {
        directory::read(&self.source).map(drop)
    }
}

/// The volumes of a pod that are followed.
#[derive(Default)]
pub struct Followers {
    running: Mutex<HashMap<String, Weak<Follower>>>,
    /// Counts the copies that were sent, of all volumes.
    generation: Arc<AtomicU64>,
}

/// The guest's copy follows the volume as long as somebody has this.
pub struct Follower {
    task: AbortHandle,
    ready: watch::Receiver<Option<Result<(), Arc<CopyError>>>>,
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Followers {
    /// Has the guest's copy of a volume follow it. The guest has it when this
    /// returns.
    ///
    /// # Errors
    ///
    /// When the first copy cannot be made.
    pub async fn follow(
        &self,
        agent: &AgentClient,
        volume: &CopiedDir,
    ) -> Result<Arc<Follower>, Arc<CopyError>> {
        let follower = self.find_or_start(agent, volume);
        let mut ready = follower.ready.clone();
        match ready.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(Err(error))) => Err(error.clone()),
            Ok(_) => Ok(follower),
            // The task is gone without a word: the runtime is, too.
            Err(_) => Err(Arc::new(CopyError::Guest {
                answer: ttrpc::Error::RemoteClosed,
            })),
        }
    }

    fn find_or_start(&self, agent: &AgentClient, volume: &CopiedDir) -> Arc<Follower> {
        let mut running = lock(&self.running);
        // One that failed is of no use to whoever comes after.
        let alive = |follower: &Arc<Follower>| !follower.task.is_finished();
        let found = running.get(&volume.name).and_then(Weak::upgrade);
        if let Some(follower) = found.filter(alive) {
            return follower;
        }
        let (sender, ready) = watch::channel(None);
        let copy = Tracked {
            volume: volume.clone(),
            agent: agent.clone(),
            generation: self.generation.clone(),
            shown: None,
        };
        let task = tokio::spawn(copy.follow(sender)).abort_handle();
        let follower = Arc::new(Follower { task, ready });
        running.retain(|_, follower| follower.strong_count() > 0);
        running.insert(volume.name.clone(), Arc::downgrade(&follower));
        follower
    }
}

/// One volume's copy, in its task.
struct Tracked {
    volume: CopiedDir,
    agent: AgentClient,
    generation: Arc<AtomicU64>,
    /// Hash of what the guest has.
    shown: Option<[u8; 32]>,
}

impl Tracked {
    async fn follow(mut self, ready: watch::Sender<Option<Result<(), Arc<CopyError>>>>) {
        match self.bring_over().await {
            Ok(watch) => {
                ready.send_replace(Some(Ok(())));
                self.keep_up(watch).await;
            }
            Err(error) => {
                ready.send_replace(Some(Err(Arc::new(error))));
            }
        }
    }

    /// Until the guest is gone.
    async fn keep_up(&mut self, watch: Watch) {
        let mut step = Ok(watch);
        let mut behind = false;
        loop {
            step = match step {
                Ok(watch) => {
                    behind = false;
                    match watch.changed().await {
                        Ok(()) => {
                            tokio::time::sleep(SETTLE).await;
                            self.bring_over().await
                        }
                        Err(source) => Err(self.unreadable(source)),
                    }
                }
                Err(error) if error.guest_is_gone() => return,
                Err(error) => {
                    if !behind {
                        warn!(
                            error = chain(&error),
                            "the guest's copy of a volume is behind"
                        );
                    }
                    behind = true;
                    tokio::time::sleep(RETRY).await;
                    self.bring_over().await
                }
            };
        }
    }

    fn unreadable(&self, source: std::io::Error) -> CopyError {
        CopyError::Io {
            path: self.volume.source.clone(),
            source,
        }
    }

    /// Has the guest show what the volume holds now. It is watched before it is
    /// read, so what changes after that shows in the watch returned.
    async fn bring_over(&mut self) -> Result<Watch, CopyError> {
        let path = self.volume.source.clone();
        let watch = Watch::new(&path).map_err(|source| self.unreadable(source))?;
        let generation = self.generation.fetch_add(1, Ordering::Relaxed) + 1;
        let read = tokio::task::spawn_blocking(move || directory::read(&path)).await;
        let mut volume = match read {
            Ok(volume) => volume?,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        let hash = hash(&volume);
        if hash.is_some() && self.shown == hash {
            return Ok(watch);
        }
        volume.name.clone_from(&self.volume.name);
        volume.generation = generation;
        let context = ttrpc::context::with_duration(PUT_TIMEOUT);
        let answer = self.agent.put_directory(context, &volume).await;
        answer.map_err(|answer| CopyError::Guest { answer })?;
        self.shown = hash;
        Ok(watch)
    }
}

/// `None` if it cannot be encoded, which sending it will tell.
fn hash(volume: &DirectoryVolume) -> Option<[u8; 32]> {
    let bytes = volume.write_to_bytes().ok()?;
    Some(Sha256::digest(bytes).into())
}

/// inotify(7) on a volume's root, which is where every change shows.
struct Watch(AsyncFd<OwnedFd>);

impl Watch {
    fn new(path: &Path) -> std::io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let flags = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVE
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_ONLYDIR;
        inotify.add_watch(path, flags)?;
        // SAFETY: an OwnedFd names the same open descriptor until it is dropped,
        // and the AsyncFd deregisters it before that.
        Ok(Self(unsafe { AsyncFd::register(inotify.into()) }?))
    }

    /// Returns when something has changed since the last call.
    async fn changed(&self) -> std::io::Result<()> {
        let mut events = [0; 4096];
        loop {
            let mut guard = self.0.readable().await?;
            let read = guard.try_io(|fd| Ok(nix::unistd::read(fd.get_ref(), &mut events)?));
            if let Ok(result) = read {
                return result.map(drop);
            }
        }
    }
}
