//! The pod's file server, from the boot or from when the first container needs it.

use std::os::unix::net::UnixStream;
use std::process::Child;

use tracing::{info, warn};

use super::VmHost;
use crate::cgroup::PodCgroup;
use crate::error::chain;
use crate::rundir::{DEATH_WAIT, Killed, Proc};
use crate::sandbox::{Sandbox, SandboxError, blocking};
use crate::virtiofsd;

impl VmHost {
    /// See [`crate::sandbox::Host::share`].
    pub async fn share(&self, sandbox: &Sandbox) -> Result<(), SandboxError> {
        sandbox.share(self.plug_shared_dir(sandbox)).await
    }

    async fn plug_shared_dir(&self, sandbox: &Sandbox) -> Result<(), SandboxError> {
        let plugged = match self.start_virtiofsd() {
            Ok(socket) => {
                let plugged = sandbox.machine().add_shared_dir(&socket).await;
                plugged.map_err(SandboxError::from)
            }
            Err(error) => Err(error),
        };
        match plugged {
            Ok(slot) => {
                info!(slot, "shared directory put in");
                Ok(())
            }
            Err(error) => {
                // A monitor that waits for it waits no longer then.
                self.end_virtiofsd().await;
                Err(error)
            }
        }
    }

    /// Starts it; returns the connection for the monitor.
    pub(super) fn start_virtiofsd(&self) -> Result<UnixStream, SandboxError> {
        let log = self.run_dir.open_log()?;
        let (child, socket) = {
            let parts = crate::task::lock(&self.parts);
            let cgroup = parts.cgroup.as_deref().map(PodCgroup::dir_fd);
            let shared_root = self.run_dir.shared_root();
            virtiofsd::spawn(&self.config.virtiofsd, &shared_root, log, cgroup)?
        };
        self.record(|parts| {
            parts.state.virtiofsd = Proc::of(child.id());
            parts.virtiofsd = Some(child);
            parts.expose();
        })?;
        Ok(socket)
    }

    async fn end_virtiofsd(&self) {
        let (child, process) = {
            let mut parts = crate::task::lock(&self.parts);
            (parts.virtiofsd.take(), parts.state.virtiofsd)
        };
        let killed = process.map(Proc::kill);
        // One that is not gone is waited for at the pod's end, too.
        if blocking(move || end(killed, child)).await
            && let Err(error) = self.record(|parts| parts.state.virtiofsd = None)
        {
            warn!(error = chain(&error), "state not written");
        }
    }
}

/// Waits for the end of one that is killed, and reaps it; returns whether it is gone. One that
/// waits for a file system of the host's may not die.
pub(super) fn end(killed: Option<Killed>, child: Option<Child>) -> bool {
    let is_gone = killed.is_none_or(|killed| killed.is_gone_within(DEATH_WAIT));
    if !is_gone {
        warn!("virtiofsd is killed and not gone");
    }
    if let Some(mut child) = child
        && let Err(error) = child.try_wait()
    {
        warn!(%error, "virtiofsd is not reaped");
    }
    is_gone
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::os::unix::fs::PermissionsExt;

    use crate::config::Config;
    use crate::hooks::Runner;
    use crate::machine::fake::FakeHost;
    use crate::rundir::{RunDir, State};
    use crate::task::lock;

    /// A host whose file server does nothing.
    fn host(dir: &std::path::Path) -> VmHost {
        let run_dir = RunDir::new(dir, "default", "pod").unwrap();
        run_dir.create().unwrap();
        let virtiofsd = dir.join("virtiofsd");
        std::fs::write(&virtiofsd, "#!/bin/sh\nexec sleep 1000\n").unwrap();
        std::fs::set_permissions(&virtiofsd, PermissionsExt::from_mode(0o755)).unwrap();
        let config = Config {
            virtiofsd,
            ..Config::default()
        };
        VmHost::new(
            config,
            run_dir,
            "pod".into(),
            State::default(),
            Runner::default(),
        )
    }

    fn file_server(host: &VmHost) -> Option<Proc> {
        host.run_dir.load().unwrap().unwrap().virtiofsd
    }

    #[tokio::test]
    async fn file_server_is_there_when_it_is_used_and_ends_else() {
        let dir = tempfile::tempdir().unwrap();
        let host = host(dir.path());
        let machines = FakeHost::scripted();
        let sandbox = machines.open();
        machines.boot(&sandbox).await.unwrap();
        let machine = lock(&machines.machine).clone().unwrap();

        machine.refuses_cards(true);
        let refused = host.share(&sandbox).await.unwrap_err().to_string();
        assert_eq!(refused, "virtio-fs: no room");
        assert!(lock(&host.parts).virtiofsd.is_none());
        assert_eq!(file_server(&host), None);

        machine.refuses_cards(false);
        host.share(&sandbox).await.unwrap();
        let first = file_server(&host).unwrap();
        host.share(&sandbox).await.unwrap();
        assert_eq!(file_server(&host), Some(first));
        assert!(first.is_alive());
        host.teardown().await;
        assert!(!first.is_alive());
    }
}
