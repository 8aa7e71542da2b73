//! The server, and `nacre-agent serve`: the real agent on an ordinary Linux.
//!
//! `nacre-agent serve --rpc-fd N --streams-fd M --root DIR`, as root, for the
//! shim's tests: RPCs arrive on a connected unix stream socket N, stream
//! connections on a listening unix socket M. The process makes itself private
//! mount, UTS, IPC and network namespaces and shows `DIR` as /run/nacre there,
//! so every path of the contract is valid as it stands. It differs from PID 1
//! in this only: the clock is left alone, cgroup controllers and device rules
//! that the machine does not offer are warnings, and Shutdown or the end of the
//! connection ends the process (and kills its containers).

use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nacre_protocol::agent_ttrpc::create_agent;
use nacre_protocol::guest::CONTAINERS_DIR;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tokio::sync::Notify;
use ttrpc::asynchronous::transport::Listener;

use crate::cgroup::{CgroupBase, find_mount};
use crate::engine::sys;
use crate::error::{Context, Error, Result};
use crate::io::Connection;
use crate::reaper::Reaper;
use crate::sandbox::{Mode, Sandbox};
use crate::service::Service;
use crate::streams::{StreamHub, StreamListener};

/// Serves one RPC connection until it breaks or the sandbox is shut down.
///
/// # Errors
///
/// Those of setting up; afterwards there are none.
pub async fn serve(
    mode: Mode,
    cgroups: CgroupBase,
    rpc: OwnedFd,
    streams: StreamListener,
) -> Result<()> {
    let reaper = Arc::new(Reaper::default());
    let reaping = reaper.clone();
    tokio::spawn(async move {
        if let Err(error) = reaping.run().await {
            tracing::error!("SIGCHLD: {error}");
        }
    });
    let hub = Arc::new(StreamHub::default());
    tokio::spawn(hub.clone().run(streams));
    let sandbox = Arc::new(Sandbox::new(mode, cgroups, reaper, hub));
    let broken = Arc::new(Notify::new());
    let connection = Connection::new(rpc, broken.clone()).context("RPC connection")?;
    let one = futures::stream::once(std::future::ready(Ok(connection)));
    let mut server = ttrpc::r#async::Server::new()
        .add_listener(Listener::new(one))
        .register_service(create_agent(Arc::new(Service(sandbox.clone()))));
    server
        .start()
        .await
        .map_err(|error| Error::Internal(format!("start the server: {error}")))?;
    broken.notified().await;
    sandbox.shutdown().await;
    Ok(())
}

/// Runs a future on the one thread.
///
/// # Errors
///
/// Those of the future, or of making the runtime.
pub fn block_on<F: Future<Output = Result<()>>>(future: F) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("make the runtime")?;
    runtime.block_on(future)
}

/// Arguments of `nacre-agent serve`.
#[derive(Debug, PartialEq, Eq)]
pub struct Arguments {
    rpc_fd: i32,
    streams_fd: i32,
    root: PathBuf,
}

impl Arguments {
    /// Parses what follows `serve`.
    ///
    /// # Errors
    ///
    /// `InvalidArgument`.
    pub fn parse(arguments: &[String]) -> Result<Self> {
        let invalid = |what: &str| Error::InvalidArgument(format!("serve: {what}"));
        let (mut rpc_fd, mut streams_fd, mut root) = (None, None, None);
        for pair in arguments.chunks(2) {
            let [key, value] = pair else {
                return Err(invalid("an option lacks its value"));
            };
            match key.as_str() {
                "--rpc-fd" => rpc_fd = value.parse().ok(),
                "--streams-fd" => streams_fd = value.parse().ok(),
                "--root" => root = Some(PathBuf::from(value)),
                _ => return Err(invalid(key)),
            }
        }
        Ok(Self {
            rpc_fd: rpc_fd.ok_or_else(|| invalid("--rpc-fd N is needed"))?,
            streams_fd: streams_fd.ok_or_else(|| invalid("--streams-fd N is needed"))?,
            root: root.ok_or_else(|| invalid("--root DIR is needed"))?,
        })
    }

    /// Serves.
    ///
    /// # Errors
    ///
    /// Those of setting up, above all without root's rights.
    pub fn run(self) -> Result<()> {
        let (rpc, streams) = (sys::inherited(self.rpc_fd), sys::inherited(self.streams_fd));
        sys::cloexec_from(3).context("set close-on-exec")?;
        isolate(&self.root)?;
        let mountinfo = std::fs::read_to_string("/proc/self/mountinfo").context("mountinfo")?;
        let root = find_mount(&mountinfo)
            .ok_or_else(|| Error::FailedPrecondition("cgroup2 is not mounted here".into()))?;
        let name = format!("nacre-agent-{}", std::process::id());
        let cgroups = CgroupBase::new(&root, &name, false)?;
        block_on(async {
            let streams = StreamListener::unix(streams).context("stream listener")?;
            serve(Mode::Serve, cgroups, rpc, streams).await
        })
    }
}

fn isolate(root: &Path) -> Result<()> {
    sys::set_child_subreaper().context("become subreaper")?;
    let flags = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWNET;
    unshare(flags).context("make private namespaces")?;
    sys::loopback_up().context("bring up loopback")?;
    let show = || -> io::Result<()> {
        mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
        let run = Path::new(CONTAINERS_DIR).parent().unwrap_or(Path::new("/"));
        std::fs::create_dir_all(root)?;
        std::fs::create_dir_all(run)?;
        mount(Some(root), run, NONE, MsFlags::MS_BIND, NONE)?;
        std::fs::create_dir_all(CONTAINERS_DIR)
    };
    show().with_context(|| format!("show {} as the agent's directory", root.display()))
}

const NONE: Option<&str> = None;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments() {
        let parse = |text: &str| {
            let words: Vec<String> = text.split_whitespace().map(Into::into).collect();
            Arguments::parse(&words)
        };
        let expected = Arguments {
            rpc_fd: 3,
            streams_fd: 4,
            root: "/tmp/x".into(),
        };
        let text = "--rpc-fd 3 --streams-fd 4 --root /tmp/x";
        assert_eq!(parse(text).unwrap(), expected);
        for bad in [
            "",
            "--rpc-fd",
            "--rpc-fd 3 --streams-fd x --root /",
            "--what 3",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
