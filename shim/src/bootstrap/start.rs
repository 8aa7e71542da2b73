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
//!
//! containerd may kill this process at any moment, so it makes nothing that would be left
//! then: what there is to be made the daemon makes (`place.rs`).

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use protobuf::Message;
use sha2::{Digest, Sha256};

use super::place::READY;
use super::{Args, BootstrapError, NAME, group_of};
use crate::config::Config;

/// Where containerd expects shim sockets.
const SOCKET_DIR: &str = "/run/containerd/s";
const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";
const MAX_SHIM_VERSION: &str = "MAX_SHIM_VERSION";
/// The newest Task service we serve.
const SHIM_VERSION: u32 = 3;

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
    // Of two that find nobody there, one starts the daemon that gets the socket.
    if UnixStream::connect(&socket).is_err() {
        spawn(args, params.as_ref(), &group, &bundle, &socket)?;
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

/// Starts the daemon, and waits until it or another one can be found.
fn spawn(
    args: &Args,
    params: Option<&BootstrapParams>,
    group: &str,
    bundle: &Path,
    socket: &Path,
) -> Result<(), BootstrapError> {
    let config = Config::load()?;
    let exe = std::env::current_exe().map_err(BootstrapError::io("find this program"))?;
    let (said, says) = io::pipe().map_err(BootstrapError::io("make a pipe"))?;
    let errors = says
        .try_clone()
        .map_err(BootstrapError::io("duplicate a pipe"))?;
    let mut command = Command::new(exe);
    command
        .args(["-namespace", &args.namespace, "-address", &args.address])
        .args(["-id", group, "-bundle"])
        .arg(bundle)
        .arg("-socket")
        .arg(socket)
        .arg("serve")
        .current_dir(bundle)
        .stdin(Stdio::null())
        .stdout(says)
        .stderr(errors);
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
    let daemon = command.spawn();
    // Its ends of the pipe.
    drop(command);
    let mut daemon = daemon.map_err(BootstrapError::io("start the daemon"))?;
    let heard = listen(said);
    if heard.is_err() {
        daemon
            .wait()
            .map_err(BootstrapError::io("wait for the daemon"))?;
    }
    heard
}

/// Listens until the daemon lets go of the pipe: it can be found then, or has said why not.
fn listen(mut daemon: impl Read) -> Result<(), BootstrapError> {
    let mut said = Vec::new();
    daemon
        .read_to_end(&mut said)
        .map_err(BootstrapError::io("listen to the daemon"))?;
    if said.ends_with(READY.as_bytes()) {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&said);
    // Its errors begin as ours do, and may come when it could be found already.
    let reason = said.trim_start_matches(READY).trim_start_matches(NAME);
    let reason = reason.trim_start_matches(": ").trim();
    Err(BootstrapError::Daemon(if reason.is_empty() {
        "the daemon has ended without a word".into()
    } else {
        reason.into()
    }))
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
    fn daemon_is_ready_or_says_why_not() {
        let heard = |said: &str| listen(said.as_bytes()).map_err(|error| error.to_string());
        assert_eq!(heard(READY), Ok(()));
        let error = format!("{NAME}: make /run/nacre: Read-only file system\n");
        let reason = "make /run/nacre: Read-only file system".to_owned();
        assert_eq!(heard(&error), Err(reason));
        let silent = "the daemon has ended without a word".to_owned();
        assert_eq!(heard(""), Err(silent));
        let late = format!("{READY}{NAME}: leave the host's mount namespace: EPERM\n");
        let reason = "leave the host's mount namespace: EPERM".to_owned();
        assert_eq!(heard(&late), Err(reason));
    }
}
