//! Pause and resume.

use std::fs;
use std::time::Duration;

use super::Cgroup;
use crate::error::{Context, Error, Result};

/// A process deep in the kernel (a stuck share, say) may not freeze.
const FREEZE_LIMIT: Duration = Duration::from_secs(10);

impl Cgroup {
    /// Stops all processes; returns when they have stopped.
    ///
    /// # Errors
    ///
    /// `Internal` if they did not in time; they are thawed again.
    pub async fn freeze(&self) -> Result<()> {
        self.set_frozen("1")?;
        match tokio::time::timeout(FREEZE_LIMIT, self.wait_event("frozen", 1)).await {
            Ok(result) => result,
            Err(_) => {
                self.set_frozen("0")?;
                Err(Error::Internal("the container does not freeze".into()))
            }
        }
    }

    /// Lets them run; returns when they do.
    ///
    /// # Errors
    ///
    /// `Io` if the cgroup is gone.
    pub async fn thaw(&self) -> Result<()> {
        self.set_frozen("0")?;
        self.wait_event("frozen", 0).await
    }

    /// Whether it is frozen or about to be.
    ///
    /// # Errors
    ///
    /// `Io` if the cgroup is gone.
    pub fn is_frozen(&self) -> Result<bool> {
        let text = fs::read_to_string(self.path.join("cgroup.freeze"));
        Ok(text.context("read cgroup.freeze")?.trim() == "1")
    }

    fn set_frozen(&self, value: &str) -> Result<()> {
        fs::write(self.path.join("cgroup.freeze"), value).context("write cgroup.freeze")
    }
}
