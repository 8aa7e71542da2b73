//! CDI specs of a driver image: what containers with one of its devices get
//! (github.com/cncf-tags/container-device-interface, SPEC.md).
//!
//! A spec's own edits are for every such container. Those of its devices are for who
//! has that device: a device's name is its number among the guest's devices that the
//! image is for, from 0, in the order in which they came; one takes the place of one that
//! has gone. Other names are nobody's.
//!
//! Paths of mounts are the image's. Nodes are the guest's: without numbers they have
//! those of the guest's own node. What is in a spec and not understood here is an
//! error, since a container without it would not be what the spec promises.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nacre_protocol::guest::START_SECONDS;
use oci_spec::runtime::{
    Hook, HookBuilder, LinuxDevice, LinuxDeviceBuilder, LinuxDeviceType, Mount, Spec,
};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use serde::Deserialize;

use super::names_in;
use crate::devices::{add_node, add_rule, listed};
use crate::error::{Context, Error, Result};

/// In an image.
const DIRECTORY: &str = "cdi";
const START: &str = "startContainer";
/// Permission bits of nodes that a spec gives none.
const DEFAULT_MODE: u32 = 0o660;

/// A file.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CdiSpec {
    #[serde(rename = "cdiVersion")]
    _version: String,
    #[serde(rename = "kind")]
    _kind: String,
    #[serde(default, rename = "annotations")]
    _annotations: BTreeMap<String, String>,
    #[serde(default)]
    devices: Vec<CdiDevice>,
    #[serde(default)]
    container_edits: Edits,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct CdiDevice {
    name: String,
    #[serde(default, rename = "annotations")]
    _annotations: BTreeMap<String, String>,
    #[serde(default)]
    container_edits: Edits,
}

/// What is done to a container.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Edits {
    /// Variables.
    #[serde(default)]
    pub env: Vec<String>,
    #[serde(default)]
    device_nodes: Vec<Node>,
    #[serde(default)]
    mounts: Vec<CdiMount>,
    #[serde(default)]
    hooks: Vec<CdiHook>,
    /// Groups its processes are in.
    #[serde(default)]
    pub additional_gids: Vec<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Node {
    path: PathBuf,
    /// Of the guest, where it is another one.
    host_path: Option<PathBuf>,
    #[serde(rename = "type")]
    kind: Option<LinuxDeviceType>,
    major: Option<i64>,
    minor: Option<i64>,
    file_mode: Option<u32>,
    permissions: Option<String>,
    uid: Option<u32>,
    gid: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct CdiMount {
    host_path: PathBuf,
    container_path: PathBuf,
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    options: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct CdiHook {
    hook_name: String,
    path: PathBuf,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: Vec<String>,
    timeout: Option<u64>,
}

/// The specs of an image, in the order of their names.
///
/// # Errors
///
/// `InvalidArgument` for what is none, or asks for more than is done here; else `Io`.
pub fn specs(root: &Path) -> Result<Vec<CdiSpec>> {
    let directory = root.join(DIRECTORY);
    let names = names_in(&directory).context("list /cdi")?;
    let read = |name: &String| {
        let text = fs::read(directory.join(name)).with_context(|| format!("read /cdi/{name}"))?;
        let invalid = |why: String| Error::InvalidArgument(format!("/cdi/{name}: {why}"));
        let spec: CdiSpec = serde_json::from_slice(&text)
            .map_err(|error| invalid(format!("{error}; CDI specs in JSON are understood")))?;
        spec.check().map_err(invalid)?;
        Ok(spec)
    };
    names.iter().map(read).collect()
}

impl CdiSpec {
    fn check(&self) -> std::result::Result<(), String> {
        let devices = self.devices.iter().map(|device| &device.container_edits);
        for edits in devices.chain([&self.container_edits]) {
            for hook in &edits.hooks {
                if hook.hook_name != START {
                    let name = &hook.hook_name;
                    return Err(format!(
                        "hook {} is of kind {name}; in guests {START} is run",
                        hook.path.display()
                    ));
                }
                if let Some(seconds) = hook.timeout.filter(|seconds| *seconds > START_SECONDS) {
                    return Err(format!(
                        "hook {} may take {seconds} s; the start of a container ends after \
                         {START_SECONDS} s",
                        hook.path.display()
                    ));
                }
            }
            for mount in &edits.mounts {
                if mount.kind.as_deref().is_some_and(|kind| kind != "bind") {
                    let path = mount.container_path.display();
                    return Err(format!("mount {path} is not of type bind"));
                }
            }
            if let Some(line) = edits.env.iter().find(|line| !line.contains('=')) {
                return Err(format!("{line:?} gives a variable no value"));
            }
        }
        Ok(())
    }

    /// What is for every container, and for one with devices of these names.
    pub fn edits_of(&self, names: &[String]) -> impl Iterator<Item = &Edits> {
        let devices = self.devices.iter();
        let its = devices.filter(|device| names.contains(&device.name));
        let its = its.map(|device| &device.container_edits);
        std::iter::once(&self.container_edits).chain(its)
    }
}

impl Edits {
    /// Adds nodes, mounts and hooks to a specification.
    ///
    /// # Errors
    ///
    /// `FailedPrecondition` for a node that is another device's, `Io` for what is not
    /// there, `InvalidArgument` for what no specification can have.
    pub fn apply(&self, spec: &mut Spec, root: &Path) -> Result<()> {
        for node in &self.device_nodes {
            let (node, access) = (node.resolve()?, node.access());
            match listed(spec, node.path()) {
                Some(same) if numbers(&same) == numbers(&node) => continue,
                Some(_) => {
                    let path = node.path().display();
                    let text = format!("{path} is a node of another device in the container");
                    return Err(Error::FailedPrecondition(text));
                }
                None => {}
            }
            add_rule(spec, &node, access)?;
            add_node(spec, node);
        }
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for mount in &self.mounts {
            mounts.push(mount.resolve(root)?);
        }
        spec.set_mounts(Some(mounts));
        self.add_hooks(spec)
    }

    fn add_hooks(&self, spec: &mut Spec) -> Result<()> {
        if self.hooks.is_empty() {
            return Ok(());
        }
        let mut hooks = spec.hooks().clone().unwrap_or_default();
        let mut start = hooks.start_container().clone().unwrap_or_default();
        for hook in &self.hooks {
            start.push(hook.resolve()?);
        }
        hooks.set_start_container(Some(start));
        spec.set_hooks(Some(hooks));
        Ok(())
    }
}

fn numbers(node: &LinuxDevice) -> (LinuxDeviceType, i64, i64) {
    (node.typ(), node.major(), node.minor())
}

fn invalid(error: &dyn std::fmt::Display) -> Error {
    Error::InvalidArgument(error.to_string())
}

impl Node {
    fn access(&self) -> &str {
        self.permissions.as_deref().unwrap_or("rwm")
    }

    fn resolve(&self) -> Result<LinuxDevice> {
        let (kind, major, minor) = match (self.kind, self.major, self.minor) {
            (Some(kind), Some(major), Some(minor)) => (kind, major, minor),
            _ => self.of_guest()?,
        };
        LinuxDeviceBuilder::default()
            .path(&self.path)
            .typ(kind)
            .major(major)
            .minor(minor)
            .file_mode(self.file_mode.unwrap_or(DEFAULT_MODE) & 0o7777)
            .uid(self.uid.unwrap_or(0))
            .gid(self.gid.unwrap_or(0))
            .build()
            .map_err(|error| invalid(&error))
    }

    /// The numbers of the guest's node.
    fn of_guest(&self) -> Result<(LinuxDeviceType, i64, i64)> {
        let path = self.host_path.as_ref().unwrap_or(&self.path);
        let node = fs::metadata(path).with_context(|| format!("look at {}", path.display()))?;
        let kind = match node.file_type() {
            kind if kind.is_char_device() => LinuxDeviceType::C,
            kind if kind.is_block_device() => LinuxDeviceType::B,
            _ => {
                let text = format!("{} is no device node", path.display());
                return Err(Error::InvalidArgument(text));
            }
        };
        let number = node.rdev();
        let (major, minor) = (libc::major(number), libc::minor(number));
        Ok((kind, major.into(), minor.into()))
    }
}

impl CdiMount {
    fn resolve(&self, root: &Path) -> Result<Mount> {
        let source = in_image(root, &self.host_path)
            .with_context(|| format!("find {}", self.host_path.display()))?;
        let mut options = self.options.clone();
        if !options
            .iter()
            .any(|option| option == "bind" || option == "rbind")
        {
            options.push("bind".into());
        }
        let mut mount = Mount::default();
        mount
            .set_destination(self.container_path.clone())
            .set_typ(Some("bind".into()))
            .set_source(Some(source))
            .set_options(Some(options));
        Ok(mount)
    }
}

/// Where a path of an image leads, its links followed as if the image were all there is.
fn in_image(root: &Path, path: &Path) -> io::Result<PathBuf> {
    let open = |path: &Path| rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    let root = open(root)?;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let found = openat2(&root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)?;
    fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd()))
}

impl CdiHook {
    fn resolve(&self) -> Result<Hook> {
        let mut hook = HookBuilder::default().path(&self.path);
        if !self.args.is_empty() {
            hook = hook.args(self.args.clone());
        }
        if !self.env.is_empty() {
            hook = hook.env(self.env.clone());
        }
        // It ends when nobody waits for the start any more.
        let limit = self.timeout.filter(|seconds| *seconds > 0);
        let limit =
            i64::try_from(limit.unwrap_or(START_SECONDS)).map_err(|error| invalid(&error))?;
        hook.timeout(limit).build().map_err(|error| invalid(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read(spec: &Value) -> Result<Vec<CdiSpec>> {
        let image = tempfile::tempdir().unwrap();
        fs::create_dir(image.path().join(DIRECTORY)).unwrap();
        fs::write(image.path().join("cdi/gpu.json"), spec.to_string()).unwrap();
        specs(image.path())
    }

    fn with(edits: &Value) -> Value {
        json!({"cdiVersion": "0.6.0", "kind": "vendor.com/gpu", "containerEdits": edits})
    }

    #[track_caller]
    fn refused(spec: &Value, part: &str) {
        let text = read(spec).unwrap_err().full();
        assert!(
            text.contains("/cdi/gpu.json") && text.contains(part),
            "{text}"
        );
    }

    #[test]
    fn what_is_not_done_here_is_refused() {
        refused(&json!("cdiVersion: 0.6.0"), "in JSON");
        refused(&with(&json!({"intelRdt": {}})), "intelRdt");
        let hook = json!({"hookName": "createContainer", "path": "/bin/hook"});
        refused(
            &with(&json!({"hooks": [hook]})),
            "/bin/hook is of kind createContainer",
        );
        let slow = json!({"hookName": "startContainer", "path": "/bin/slow", "timeout": 11});
        refused(&with(&json!({"hooks": [slow]})), "/bin/slow may take 11 s");
        let mount = json!({"hostPath": "tmpfs", "containerPath": "/x", "type": "tmpfs"});
        refused(&with(&json!({"mounts": [mount]})), "/x is not of type bind");
        refused(&with(&json!({"env": ["PATH"]})), "\"PATH\"");
        let device = json!({"name": "0", "containerEdits": {"env": ["X"]}});
        let spec = json!({"cdiVersion": "0.6.0", "kind": "a.b/c", "devices": [device]});
        refused(&spec, "\"X\"");
        assert!(specs(Path::new("/nonexistent")).unwrap().is_empty());
    }

    #[test]
    fn nodes_without_numbers_are_the_guest_s() {
        let node = |node: Value| serde_json::from_value::<Node>(node).unwrap();
        let null = node(json!({"path": "/dev/nothing", "hostPath": "/dev/null",
                               "permissions": "rw", "fileMode": 0o666}));
        let resolved = null.resolve().unwrap();
        assert_eq!(numbers(&resolved), (LinuxDeviceType::C, 1, 3));
        assert_eq!(resolved.path(), Path::new("/dev/nothing"));
        assert_eq!((null.access(), resolved.file_mode()), ("rw", Some(0o666)));
        let error = node(json!({"path": "/dev/gpu77"})).resolve().unwrap_err();
        assert!(
            error.full().contains("/dev/gpu77: no such file"),
            "{}",
            error.full()
        );
        let error = node(json!({"path": "/proc"})).resolve().unwrap_err();
        assert!(error.full().contains("/proc is no device node"));
    }

    #[test]
    fn a_node_the_container_has_is_not_added_again() {
        let edits = |minor: i64| -> Edits {
            let node = json!({"path": "/dev/gpu0", "type": "c", "major": 195, "minor": minor});
            serde_json::from_value(json!({"deviceNodes": [node]})).unwrap()
        };
        let spec = json!({"ociVersion": "1.1.0", "mounts": [], "linux": {}});
        let mut spec: Spec = serde_json::from_value(spec).unwrap();
        edits(0).apply(&mut spec, Path::new("/")).unwrap();
        edits(0).apply(&mut spec, Path::new("/")).unwrap();
        let devices = spec.linux().as_ref().unwrap().devices().as_ref();
        assert_eq!(devices.unwrap().len(), 1);
        let error = edits(1).apply(&mut spec, Path::new("/")).unwrap_err();
        assert!(error.full().contains("/dev/gpu0"), "{}", error.full());
    }

    #[test]
    fn no_hook_outlives_the_start_that_waits_for_it() {
        let limit = |timeout: Value| {
            let hook = json!({"hookName": "startContainer", "path": "/a", "timeout": timeout});
            let hook: CdiHook = serde_json::from_value(hook).unwrap();
            hook.resolve().unwrap().timeout()
        };
        let limits = [json!(null), json!(0), json!(3), json!(10)].map(limit);
        assert_eq!(limits, [10, 10, 3, 10].map(Some));
    }

    #[test]
    fn no_path_leads_out_of_an_image() {
        let image = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(image.path()).unwrap();
        fs::create_dir(root.join("etc")).unwrap();
        std::os::unix::fs::symlink("../../../../etc", root.join("up")).unwrap();
        for path in ["/etc", "/up", "/../../etc"] {
            assert_eq!(in_image(&root, Path::new(path)).unwrap(), root.join("etc"));
        }
        assert!(in_image(&root, Path::new("/proc")).is_err());
    }
}
