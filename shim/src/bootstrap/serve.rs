//! `serve`: the daemon's life from its first instruction to its exit.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::setsid;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use super::place::{Place, Taken};
use super::{Args, BootstrapError, init_log};
use crate::config::Config;
use crate::events::Publisher;
use crate::hooks::Runner;
use crate::rundir::RunDir;
use crate::sandbox::{Host, VmHost};
use crate::task::{Pod, console, sandboxed, service};

/// How long the last events may take.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a thread for what blocks waits for more: to the end of any pod. Where a further one
/// cannot be made, as in a pod at its limit of processes, tokio has those take over that are
/// there, and panics if there are none.
const THREAD_KEEP_ALIVE: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// Runs the daemon until its pod is shut down, if it is the pod's first.
pub fn serve(args: &Args) -> Result<(), BootstrapError> {
    let config = Config::load()?;
    let place = Place {
        run_dir: RunDir::new(&config.run_dir, &args.namespace, &args.id)?,
        socket: args.socket.clone().into(),
        bundle: args.bundle()?,
    };
    let Some(taken) = place.take(&mut io::stdout())? else {
        return Ok(());
    };
    serve_from(args, config, &place, taken).inspect_err(|_| place.leave())
}

fn serve_from(
    args: &Args,
    config: Config,
    place: &Place,
    taken: Taken,
) -> Result<(), BootstrapError> {
    let Taken {
        listener,
        state,
        log,
    } = taken;
    let hooks = Runner::here().map_err(BootstrapError::io("open the mount namespace"))?;
    leave_mounts()?;
    let_go_of_start(log)?;
    init_log(&config.log_level);
    leave_session();
    // One thread: a pod's shim mostly sleeps, and copies at most a few streams.
    tokio::runtime::Builder::new_current_thread()
        .thread_keep_alive(THREAD_KEEP_ALIVE)
        .enable_all()
        .build()
        .map_err(BootstrapError::io("start the runtime"))?
        .block_on(async {
            let host = VmHost::new(config, place.run_dir.clone(), args.id.clone(), state, hooks);
            run(args, host, accept(listener)?, place).await
        })
}

/// Closes the pipe on which it listens, for its answer or for an error.
fn let_go_of_start(log: File) -> Result<(), BootstrapError> {
    let replace = || -> io::Result<()> {
        nix::unistd::dup2_stderr(log)?;
        nix::unistd::dup2_stdout(File::open("/dev/null")?)?;
        Ok(())
    };
    replace().map_err(BootstrapError::io("let go of `start`"))
}

/// Leaves containerd's session.
fn leave_session() {
    // Fails only for a process group leader, which a child of `start` is not;
    // one started by hand may stay where it is.
    if let Err(error) = setsid() {
        warn!(%error, "stays in its session");
    }
}

/// Leaves containerd's mount namespace. Mounts made from here on die with the daemon; mounts
/// the host makes later are still seen.
fn leave_mounts() -> Result<(), BootstrapError> {
    unshare(CloneFlags::CLONE_NEWNS)
        .and_then(|()| {
            mount(
                None::<&Path>,
                "/",
                None::<&Path>,
                MsFlags::MS_REC | MsFlags::MS_SLAVE,
                None::<&Path>,
            )
        })
        .map_err(|errno| BootstrapError::io("leave the host's mount namespace")(errno.into()))
}

async fn run(
    args: &Args,
    host: VmHost,
    listener: Listener,
    place: &Place,
) -> Result<(), BootstrapError> {
    let address = std::env::var("TTRPC_ADDRESS").unwrap_or_default();
    let publisher = Publisher::new(&args.namespace, &address);
    let pod = Pod::new(Host::Vm(Box::new(host)), publisher.clone());
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(service::create(&pod))
        .register_service(sandboxed::create(&pod))
        .register_service(console::create(&pod));
    server.start().await?;
    info!(id = args.id, "serving");
    wait_for_the_end(&pod, &place.bundle).await?;
    // The reply to Shutdown is still on its way; leaving closes its connection
    // only after what was written is out.
    if tokio::time::timeout(FLUSH_TIMEOUT, publisher.flush())
        .await
        .is_err()
    {
        warn!("leaving with events undelivered");
    }
    // The socket first: a start under the same id that found nobody at it would make its own
    // there, which is not ours to remove.
    place.run_dir.cleanup();
    server.stop_listen().await;
    Ok(())
}

async fn wait_for_the_end(pod: &Arc<Pod>, bundle: &Path) -> Result<(), BootstrapError> {
    let mut terminate =
        signal(SignalKind::terminate()).map_err(BootstrapError::io("listen for SIGTERM"))?;
    tokio::select! {
        () = pod.ended() => (),
        () = pod.abandoned(bundle) => {
            warn!("containerd has removed the bundle and asked for no container");
            pod.stop().await;
        }
        _ = terminate.recv() => {
            info!("told to terminate");
            pod.stop().await;
        }
    }
    Ok(())
}

fn accept(listener: StdUnixListener) -> Result<Listener, BootstrapError> {
    let socket = listener
        .set_nonblocking(true)
        .and_then(|()| UnixListener::from_std(listener))
        .map_err(BootstrapError::io("listen"))?;
    Ok(Listener::new(futures::stream::unfold(
        socket,
        |socket| async move {
            let accepted = socket.accept().await.map(|(stream, _)| stream);
            Some((accepted, socket))
        },
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::api::CreateTaskRequest;

    use crate::machine::fake::FakeHost;

    const A_DAY: Duration = Duration::from_secs(24 * 60 * 60);

    fn pod() -> Arc<Pod> {
        let host = Host::Fake(Box::new(FakeHost::scripted()));
        Pod::new(host, Publisher::new("test", ""))
    }

    /// Asks for a container in a bundle.
    async fn create(pod: &Arc<Pod>, bundle: &Path) -> Result<u32, String> {
        let request = CreateTaskRequest {
            id: "app".into(),
            bundle: bundle.display().to_string(),
            ..Default::default()
        };
        let created = pod.create(request).await;
        created.map_err(|error| error.to_string())
    }

    fn bundle() -> tempfile::TempDir {
        let bundle = tempfile::tempdir().unwrap();
        let spec = r#"{"ociVersion": "1.2.0"}"#;
        std::fs::write(bundle.path().join("config.json"), spec).unwrap();
        bundle
    }

    /// containerd removes a bundle whose `start` it has killed, and knows of no shim then.
    #[tokio::test(start_paused = true)]
    async fn daemon_ends_whose_bundle_is_gone_and_that_nobody_asks() {
        let (pod, unused, other) = (pod(), bundle(), bundle());
        let path = unused.path().to_owned();
        let mut end = Box::pin(wait_for_the_end(&pod, &path));
        let early = tokio::time::timeout(A_DAY, &mut end).await;
        assert!(early.is_err(), "containerd may ask yet");
        unused.close().unwrap();
        let end = tokio::time::timeout(A_DAY, end).await;
        end.expect("nobody will ask").unwrap();
        pod.ended().await;
        let refused = create(&pod, other.path()).await.unwrap_err();
        assert_eq!(refused, "the sandbox was shut down");
    }

    /// Whatever comes of what it was asked, containerd knows it, and says when it is to end.
    #[tokio::test]
    async fn daemon_stays_that_was_asked_for_a_container() {
        let (pod, bundle) = (pod(), bundle());
        let asked = create(&pod, bundle.path()).await;
        let path = bundle.path().to_owned();
        tokio::time::pause();
        bundle.close().unwrap();
        let end = tokio::time::timeout(A_DAY, wait_for_the_end(&pod, &path)).await;
        assert!(end.is_err(), "{asked:?}");
    }
}
