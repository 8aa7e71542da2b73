//! `start`: the pod's daemon, found or made, and its address.
//!
//! What containerd says on stdin and wants back on stdout differs by release:
//!
//! | containerd | stdin | `MAX_SHIM_VERSION` | answer |
//! |---|---|---|---|
//! | 1.6 | `Any` or nothing | unset | the address, plain |
//! | 1.7 | `Any` or nothing | 2 | JSON, version 2 |
//! | 2.0 to 2.2 | `Any` or nothing | 3 | JSON, version 3 |
//! | 2.3 | `BootstrapParams` | not looked at | `BootstrapResult`, version 3 |
//!
//! An `Any` may parse as `BootstrapParams` by accident (both begin with a
//! string); only one that carries our id is believed.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use protobuf::Message;
use sha2::{Digest, Sha256};

use super::{Args, BootstrapError, group_of, init_log};
use crate::config::Config;
use crate::rundir::{RunDir, State};

/// Where containerd expects shim sockets.
const SOCKET_DIR: &str = "/run/containerd/s";
const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";
const MAX_SHIM_VERSION: &str = "MAX_SHIM_VERSION";
/// The newest Task service we serve.
const SHIM_VERSION: u32 = 3;
/// A lost race for the socket is retried; each loss means another process won.
const BIND_ATTEMPTS: usize = 10;

/// In which form containerd wants the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dialect {
    Plain,
    Json { version: u32 },
    Protobuf,
}

/// Runs the action; returns what to print.
pub fn start(args: &Args, input: &[u8]) -> Result<Vec<u8>, BootstrapError> {
    let params = parse_params(input, &args.id);
    let max_version = std::env::var(MAX_SHIM_VERSION).ok();
    let dialect = dialect(params.as_ref(), max_version.as_deref());
    let bundle = args.bundle()?;
    let group = group_of(&bundle, &args.id)?;
    let socket = socket_path(args, params.as_ref(), &group);
    if let Some(listener) = claim(&socket)? {
        let spawned = spawn(args, params.as_ref(), &group, &bundle, &socket, listener);
        if let Err(error) = spawned {
            // Nobody serves it; a later `start` must not find it. containerd asks for
            // no `delete` of a shim that did not start.
            let _ = fs::remove_file(&socket);
            init_log("warn");
            undo(args, &group);
            return Err(error);
        }
    }
    answer(dialect, &format!("unix://{}", socket.display()))
}

fn parse_params(input: &[u8], id: &str) -> Option<BootstrapParams> {
    BootstrapParams::parse_from_bytes(input)
        .ok()
        .filter(|params| params.instance_id == id)
}

fn dialect(params: Option<&BootstrapParams>, max_version: Option<&str>) -> Dialect {
    if params.is_some() {
        return Dialect::Protobuf;
    }
    match max_version.and_then(|text| text.parse::<u32>().ok()) {
        Some(max) if max >= 2 => Dialect::Json {
            version: max.min(SHIM_VERSION),
        },
        _ => Dialect::Plain,
    }
}

fn answer(dialect: Dialect, address: &str) -> Result<Vec<u8>, BootstrapError> {
    match dialect {
        Dialect::Plain => Ok(address.as_bytes().to_vec()),
        Dialect::Json { version } => {
            let json = serde_json::json!({
                "version": version,
                "address": address,
                "protocol": "ttrpc",
            });
            Ok(json.to_string().into_bytes())
        }
        Dialect::Protobuf => {
            let result = BootstrapResult {
                version: containerd_shim_protos::TASK_API_VERSION,
                address: address.to_owned(),
                protocol: "ttrpc".into(),
                ..Default::default()
            };
            Ok(result.write_to_bytes()?)
        }
    }
}

/// The same for all containers of a pod, and for nothing else on this host.
fn socket_path(args: &Args, params: Option<&BootstrapParams>, group: &str) -> PathBuf {
    let name = Path::new(&args.address).join(&args.namespace).join(group);
    let digest = Sha256::digest(name.as_os_str().as_encoded_bytes());
    let directory = params
        .and_then(|params| params.socket_dir.as_deref())
        .filter(|directory| !directory.is_empty())
        .unwrap_or(SOCKET_DIR);
    Path::new(directory).join(format!("{digest:x}"))
}

/// Binds the socket; `None` when a live daemon has it.
fn claim(socket: &Path) -> Result<Option<UnixListener>, BootstrapError> {
    let told = |what: &str| BootstrapError::io(format!("{what} {}", socket.display()));
    if let Some(directory) = socket.parent() {
        fs::create_dir_all(directory).map_err(told("make the directory of"))?;
    }
    let mut last = None;
    for _ in 0..BIND_ATTEMPTS {
        match UnixListener::bind(socket) {
            Ok(listener) => return Ok(Some(listener)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => last = Some(error),
            Err(error) => return Err(told("bind")(error)),
        }
        match UnixStream::connect(socket) {
            Ok(_) => return Ok(None),
            // A dead daemon's. Two of us may remove it; one bind wins.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                let _ = fs::remove_file(socket);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => (),
            Err(error) => return Err(told("try")(error)),
        }
    }
    let error = last.unwrap_or_else(|| io::ErrorKind::AddrInUse.into());
    Err(told("bind")(error))
}

/// Starts the daemon with the listener as its stdin: the one descriptor a
/// child gets without code between fork and exec.
fn spawn(
    args: &Args,
    params: Option<&BootstrapParams>,
    group: &str,
    bundle: &Path,
    socket: &Path,
    listener: UnixListener,
) -> Result<(), BootstrapError> {
    let config = Config::load()?;
    let run_dir = RunDir::new(&config.run_dir, &args.namespace, group)?;
    run_dir.renew()?;
    run_dir.remember(bundle)?;
    let log = run_dir.open_log()?;
    let exe = std::env::current_exe().map_err(BootstrapError::io("find this program"))?;
    let mut command = Command::new(exe);
    command
        .args(["-namespace", &args.namespace, "-address", &args.address])
        .args(["-id", group, "-bundle"])
        .arg(bundle)
        .arg("-socket")
        .arg(socket)
        .current_dir(bundle)
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(Stdio::null())
        .stderr(log);
    // The monitor takes its level from here too.
    let level = if args.debug {
        "debug"
    } else {
        &config.log_level
    };
    command.env("RUST_LOG", level);
    if let Some(address) = params
        .map(|params| &params.containerd_ttrpc_address)
        .filter(|address| !address.is_empty())
    {
        command.env(TTRPC_ADDRESS, address);
    }
    let mut daemon = command
        .arg("serve")
        .spawn()
        .map_err(BootstrapError::io("start the daemon"))?;
    // Before anyone hears of the daemon: a `delete` must find it. Its own first
    // write comes with the pod's Create, which follows our answer.
    let state = State::of_daemon(daemon.id(), bundle.to_owned(), socket);
    run_dir.save(&state).or_else(|error| {
        let ended = daemon.kill().and_then(|()| daemon.wait());
        ended.map_err(BootstrapError::io("end the daemon"))?;
        Err(error.into())
    })
}

/// Takes back what a start that failed has made in the run directory.
fn undo(args: &Args, group: &str) {
    // Where there is no configuration, nothing was made.
    if let Ok(config) = Config::load()
        && let Ok(run_dir) = RunDir::new(&config.run_dir, &args.namespace, group)
    {
        // What is not gone by now is an earlier start's.
        run_dir.cleanup_within(Duration::ZERO);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::well_known_types::any::Any;

    fn args() -> Args {
        let words = [
            "-namespace",
            "ns",
            "-address",
            "/c.sock",
            "-id",
            "abc",
            "start",
        ];
        Args::parse(&words.map(str::to_owned)).unwrap()
    }

    #[test]
    fn only_our_own_params_are_believed() {
        let params = BootstrapParams {
            instance_id: "abc".into(),
            ..Default::default()
        };
        let bytes = params.write_to_bytes().unwrap();
        assert!(parse_params(&bytes, "abc").is_some());
        assert!(parse_params(&bytes, "other").is_none());
        let any = Any {
            type_url: "containerd.runc.v1.Options".into(),
            value: b"x".to_vec(),
            ..Default::default()
        };
        assert!(parse_params(&any.write_to_bytes().unwrap(), "abc").is_none());
        assert!(parse_params(b"", "abc").is_none());
    }

    #[test]
    fn each_release_gets_its_dialect() {
        assert_eq!(dialect(None, None), Dialect::Plain);
        assert_eq!(dialect(None, Some("2")), Dialect::Json { version: 2 });
        assert_eq!(dialect(None, Some("3")), Dialect::Json { version: 3 });
        assert_eq!(dialect(None, Some("9")), Dialect::Json { version: 3 });
        let params = BootstrapParams::default();
        assert_eq!(dialect(Some(&params), Some("3")), Dialect::Protobuf);
    }

    #[test]
    fn answers() {
        let address = "unix:///s";
        assert_eq!(answer(Dialect::Plain, address).unwrap(), b"unix:///s");
        let json = answer(Dialect::Json { version: 2 }, address).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(json["version"], 2);
        assert_eq!(json["address"], address);
        assert_eq!(json["protocol"], "ttrpc");
        let bytes = answer(Dialect::Protobuf, address).unwrap();
        let result = BootstrapResult::parse_from_bytes(&bytes).unwrap();
        assert_eq!((result.version, result.address.as_str()), (3, address));
    }

    #[test]
    fn socket_depends_on_the_pod_only() {
        let one = socket_path(&args(), None, "pod");
        assert_eq!(one, socket_path(&args(), None, "pod"));
        assert_ne!(one, socket_path(&args(), None, "pod2"));
        assert!(one.starts_with(SOCKET_DIR));
        // sun_path holds 107 bytes and a zero.
        assert!(one.as_os_str().len() < 108);
        let params = BootstrapParams {
            socket_dir: Some("/elsewhere".into()),
            ..Default::default()
        };
        assert!(socket_path(&args(), Some(&params), "pod").starts_with("/elsewhere"));
    }

    #[test]
    fn a_live_socket_is_found_and_a_dead_one_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep").join("s");
        let first = claim(&path).unwrap().unwrap();
        assert!(claim(&path).unwrap().is_none());
        drop(first);
        assert!(claim(&path).unwrap().is_some());
    }
}
