//! Watching a container for kills by the kernel for want of memory.

use std::fs;
use std::path::PathBuf;
use std::sync::Mutex;

use nix::sys::inotify::AddWatchFlags;
use tokio::sync::mpsc::UnboundedSender;

use super::{Cgroup, stats};
use crate::watch::Watch;

/// A container's count of kills, with the news going to `sender`.
#[derive(Debug)]
pub struct OomWatch {
    container_id: String,
    path: PathBuf,
    reported: Mutex<u64>,
    sender: UnboundedSender<(String, u64)>,
}

impl OomWatch {
    /// A watch that has seen no kill yet.
    #[must_use]
    pub fn new(
        container_id: &str,
        cgroup: &Cgroup,
        sender: UnboundedSender<(String, u64)>,
    ) -> Self {
        Self {
            container_id: container_id.into(),
            path: cgroup.path().join("memory.events"),
            reported: Mutex::new(0),
            sender,
        }
    }

    /// Kills so far.
    pub fn count(&self) -> u64 {
        // No memory controller, or the cgroup is gone: no kills.
        let text = fs::read_to_string(&self.path).unwrap_or_default();
        stats::keyed(&text)
            .find(|(key, _)| *key == "oom_kill")
            .map_or(0, |(_, count)| count)
    }

    /// Reports kills that were not yet reported.
    fn check(&self) {
        let count = self.count();
        let mut reported = self.reported.lock().unwrap_or_else(|e| e.into_inner());
        if count > *reported {
            *reported = count;
            // Nobody listens any more: the sandbox is going down.
            let _ = self.sender.send((self.container_id.clone(), count));
        }
    }

    /// Follows the file until the cgroup is removed.
    pub async fn run(&self) {
        let flags = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_DELETE_SELF;
        let watch = match Watch::new(&self.path, flags) {
            Ok(watch) => watch,
            // No memory controller: nothing is killed on its account.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
            Err(error) => {
                tracing::warn!("container {}: memory.events: {error}", self.container_id);
                return;
            }
        };
        loop {
            self.check();
            if watch.changed().await.is_err() || !self.path.exists() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::mpsc::unbounded_channel;

    #[test]
    fn kills_are_counted_and_told_once() {
        let dir = tempfile::tempdir().unwrap();
        let (sender, mut told) = unbounded_channel();
        let watch = OomWatch {
            container_id: "c1".into(),
            path: dir.path().join("memory.events"),
            reported: Mutex::default(),
            sender,
        };
        watch.check();
        assert_eq!(watch.count(), 0, "no memory controller");
        fs::write(&watch.path, "oom 3\noom_kill 2\noom_group_kill 1\n").unwrap();
        watch.check();
        watch.check();
        assert_eq!(watch.count(), 2);
        assert_eq!(told.try_recv().unwrap(), ("c1".to_owned(), 2));
        assert!(told.try_recv().is_err());
    }
}
