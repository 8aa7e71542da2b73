//! `serve`: the daemon's life from its first instruction to its exit.

use std::fs::File;
use std::os::fd::AsFd;
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

use super::{Args, BootstrapError, init_log};
use crate::config::Config;
use crate::events::Publisher;
use crate::hooks::Runner;
use crate::rundir::{RunDir, State};
use crate::sandbox::{Host, VmHost};
use crate::task::{Pod, console, sandboxed, service};

/// How long the last events may take.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a thread for what blocks waits for more: to the end of any pod. Where a further one
/// cannot be made, as in a pod at its limit of processes, tokio has those take over that are
/// there, and panics if there are none.
const THREAD_KEEP_ALIVE: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// Runs the daemon until its pod is shut down.
pub fn serve(args: &Args) -> Result<(), BootstrapError> {
    let config = Config::load()?;
    init_log(&config.log_level);
    let hooks = Runner::here().map_err(BootstrapError::io("open the mount namespace"))?;
    become_daemon()?;
    // One thread: a pod's shim mostly sleeps, and copies at most a few streams.
    tokio::runtime::Builder::new_current_thread()
        .thread_keep_alive(THREAD_KEEP_ALIVE)
        .enable_all()
        .build()
        .map_err(BootstrapError::io("start the runtime"))?
        .block_on(run(args, config, hooks))
}

/// Leaves containerd's session and mount namespace. Mounts made from here on
/// die with the daemon; mounts the host makes later are still seen.
fn become_daemon() -> Result<(), BootstrapError> {
    // Fails only for a process group leader, which a child of `start` is not;
    // one started by hand may stay where it is.
    if let Err(error) = setsid() {
        warn!(%error, "stays in its session");
    }
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

async fn run(args: &Args, config: Config, hooks: Runner) -> Result<(), BootstrapError> {
    let run_dir = RunDir::new(&config.run_dir, &args.namespace, &args.id)?;
    let state = State::of_daemon(std::process::id(), args.bundle()?, Path::new(&args.socket));
    let address = std::env::var("TTRPC_ADDRESS").unwrap_or_default();
    let publisher = Publisher::new(&args.namespace, &address);
    let host = VmHost::new(config, run_dir.clone(), args.id.clone(), state, hooks);
    let pod = Pod::new(Host::Vm(Box::new(host)), publisher.clone());
    let mut server = Server::new()
        .add_listener(listener()?)
        .register_service(service::create(&pod))
        .register_service(sandboxed::create(&pod))
        .register_service(console::create(&pod));
    server.start().await?;
    info!(id = args.id, "serving");
    wait_for_the_end(&pod).await?;
    // The reply to Shutdown is still on its way; leaving closes its connection
    // only after what was written is out.
    if tokio::time::timeout(FLUSH_TIMEOUT, publisher.flush())
        .await
        .is_err()
    {
        warn!("leaving with events undelivered");
    }
    server.stop_listen().await;
    run_dir.cleanup();
    Ok(())
}

async fn wait_for_the_end(pod: &Arc<Pod>) -> Result<(), BootstrapError> {
    let mut terminate =
        signal(SignalKind::terminate()).map_err(BootstrapError::io("listen for SIGTERM"))?;
    tokio::select! {
        () = pod.ended() => (),
        _ = terminate.recv() => {
            info!("told to terminate");
            pod.stop().await;
        }
    }
    Ok(())
}

/// The socket `start` bound, inherited as stdin.
fn listener() -> Result<Listener, BootstrapError> {
    let inherited = BootstrapError::io("take over the listening socket");
    let socket = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .and_then(|fd| {
            let listener = StdUnixListener::from(fd);
            // Children must not inherit a working copy as their stdin.
            nix::unistd::dup2_stdin(File::open("/dev/null")?)?;
            listener.set_nonblocking(true)?;
            UnixListener::from_std(listener)
        })
        .map_err(inherited)?;
    Ok(Listener::new(futures::stream::unfold(
        socket,
        |socket| async move {
            let accepted = socket.accept().await.map(|(stream, _)| stream);
            Some((accepted, socket))
        },
    )))
}
