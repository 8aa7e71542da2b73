//! Waiting for a file or directory to change, by inotify(7).

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;

use crate::io::register;

/// A watch on one path. Changes from its creation on are seen: check the
/// condition after creating it, then wait.
#[derive(Debug)]
pub struct Watch {
    queue: AsyncFd<OwnedFd>,
}

impl Watch {
    /// Watches `path` for the events in `flags`.
    ///
    /// # Errors
    ///
    /// Those of inotify_add_watch(2).
    pub fn new(path: &Path, flags: AddWatchFlags) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        inotify.add_watch(path, flags)?;
        Ok(Self {
            queue: register(inotify.into())?,
        })
    }

    /// Returns when something happened since the last call.
    ///
    /// # Errors
    ///
    /// Those of read(2).
    pub async fn changed(&self) -> io::Result<()> {
        let mut events = [0; 4096];
        loop {
            let mut guard = self.queue.readable().await?;
            let read = guard.try_io(|queue| Ok(nix::unistd::read(queue.get_ref(), &mut events)?));
            if let Ok(result) = read {
                return result.map(drop);
            }
        }
    }
}
