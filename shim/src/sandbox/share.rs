//! The shared directory of a machine that runs.
//!
//! ```text
//!              the file server starts,
//!   Absent ---- the device is put in ----> Plugged ---- the guest mounts it ----> Mounted
//! ```
//! A machine boots with it if it is known by then that a container uses it. A pod whose
//! containers have their root file systems on disks gets it with the first container that
//! brings a directory of the host, which few do ([`crate::storage`]): until then there is no
//! file server. It stays to the pod's end.

use std::time::Duration;

use nacre_protocol::agent::Empty;

use super::{Sandbox, SandboxError};

/// Time the guest has to find and mount it.
const MOUNT_TIMEOUT: Duration = Duration::from_secs(20);

/// How far a machine is with its shared directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Share {
    /// It has none.
    Absent,
    /// It has the device.
    Plugged,
    /// So has the guest.
    Mounted,
}

impl Share {
    /// Of a machine that booted with it, or without.
    pub(super) fn at_boot(is_there: bool) -> Self {
        if is_there {
            Self::Mounted
        } else {
            Self::Absent
        }
    }
}

impl Sandbox {
    /// Sees to it that the guest of a running machine has the shared directory; `plug` puts it
    /// into the machine, if it has none. One container at a time: others wait and find it.
    ///
    /// # Errors
    ///
    /// Those of `plug`, of which nothing is left then; what keeps the guest from mounting it. It
    /// may be tried again.
    pub async fn share(
        &self,
        plug: impl Future<Output = Result<(), SandboxError>>,
    ) -> Result<(), SandboxError> {
        let guest = self.guest.get().ok_or(SandboxError::Stopped)?;
        let mut share = guest.share.lock().await;
        if *share == Share::Absent {
            plug.await?;
            *share = Share::Plugged;
        }
        if *share == Share::Plugged {
            let request = Empty::default();
            self.ask("mount the shared directory", MOUNT_TIMEOUT, |context| {
                guest.agent.mount_shared(context, &request)
            })
            .await?;
            *share = Share::Mounted;
        }
        Ok(())
    }
}
