//! CDI: names of devices, such as `vendor.com/gpu=0`, and the files that say which
//! device nodes they stand for (github.com/cncf-tags/container-device-interface,
//! SPEC.md).
//!
//! containerd's CRI and nerdctl resolve such names themselves and hand over the nodes.
//! What is left to do here are names in annotations that nobody else looked at. Specs are
//! read in JSON only; of what a spec has done to a container, only the nodes that
//! stand for VFIO devices mean something to a virtual machine.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::DeviceError;
use super::request::RequestError;
use super::sysfs::names_in;

/// Annotations whose keys start so hold names.
pub(super) const ANNOTATION_PREFIX: &str = "cdi.k8s.io/";

/// A file.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct CdiSpec {
    kind: String,
    devices: Vec<CdiDevice>,
    #[serde(default)]
    container_edits: Edits,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct CdiDevice {
    name: String,
    #[serde(default)]
    container_edits: Edits,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Edits {
    #[serde(default)]
    device_nodes: Vec<Node>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Node {
    /// In the container.
    path: PathBuf,
    /// On the host, where it is another one.
    host_path: Option<PathBuf>,
}

impl Edits {
    fn paths(&self) -> impl Iterator<Item = PathBuf> {
        self.device_nodes
            .iter()
            .map(|node| node.host_path.as_ref().unwrap_or(&node.path).clone())
    }
}

/// The host's device nodes that `name` stands for.
///
/// # Errors
///
/// A name that no spec has, or two of the same directory; a spec that cannot be read.
pub(super) fn nodes(dirs: &[PathBuf], name: &str) -> Result<Vec<PathBuf>, RequestError> {
    // The later directory's spec counts (SPEC.md, "Multiple CDI Specs").
    for dir in dirs.iter().rev() {
        if let Some(nodes) = nodes_by(dir, name)? {
            return Ok(nodes);
        }
    }
    Err(RequestError::NoCdiDevice {
        name: name.to_owned(),
        known: known(dirs)?,
    })
}

fn nodes_by(dir: &Path, name: &str) -> Result<Option<Vec<PathBuf>>, RequestError> {
    let mut found = BTreeMap::new();
    for file in files(dir, &["json"])? {
        let spec = load(&file)?;
        let is_this = |device: &&CdiDevice| format!("{}={}", spec.kind, device.name) == name;
        if let Some(device) = spec.devices.iter().find(is_this) {
            let both = device.container_edits.paths();
            let nodes: Vec<_> = both.chain(spec.container_edits.paths()).collect();
            found.insert(file, nodes);
        }
    }
    if found.len() > 1 {
        let files: Vec<_> = found
            .keys()
            .map(|file| file.display().to_string())
            .collect();
        return Err(RequestError::CdiConflict {
            name: name.to_owned(),
            files: files.join(" and "),
        });
    }
    Ok(found.into_values().next())
}

fn load(file: &Path) -> Result<CdiSpec, RequestError> {
    let text = fs::read(file).map_err(|source| RequestError::CdiRead {
        path: file.to_owned(),
        source,
    })?;
    serde_json::from_slice(&text).map_err(|source| RequestError::CdiSyntax {
        path: file.to_owned(),
        source,
    })
}

/// Files in a directory whose names end so.
fn files(dir: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>, DeviceError> {
    let paths = names_in(dir)?.into_iter().map(|name| dir.join(name));
    let is_kind = |path: &PathBuf| {
        let extension = path.extension().and_then(|extension| extension.to_str());
        extension.is_some_and(|extension| extensions.contains(&extension))
    };
    Ok(paths.filter(is_kind).collect())
}

/// What there is instead, for whoever looks for a name in vain.
fn known(dirs: &[PathBuf]) -> Result<String, DeviceError> {
    let (mut read, mut unread) = (Vec::new(), Vec::new());
    for dir in dirs {
        read.extend(files(dir, &["json"])?);
        unread.extend(files(dir, &["yaml", "yml"])?);
    }
    let mut text = if read.is_empty() {
        format!("there is no spec in JSON in {}", list(dirs))
    } else {
        format!("these specs were read: {}", list(&read))
    };
    if !unread.is_empty() {
        text += "; these were not, since nacre takes JSON only: ";
        text += &list(&unread);
    }
    Ok(text)
}

fn list(paths: &[PathBuf]) -> String {
    let texts: Vec<_> = paths
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    texts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Tree;

    fn spec(node: &str) -> String {
        format!(
            r#"{{"cdiVersion": "0.6.0", "kind": "vendor.com/gpu",
                "devices": [
                    {{"name": "0", "containerEdits": {{"deviceNodes": [{{"path": "{node}"}}]}}}},
                    {{"name": "moved", "containerEdits": {{"deviceNodes": [
                        {{"path": "/dev/gpu", "hostPath": "/dev/vfio/9", "permissions": "rw"}}]}}}}
                ],
                "containerEdits": {{"env": ["A=b"], "deviceNodes": [{{"path": "/dev/vfio/vfio"}}]}}}}"#
        )
    }

    fn nodes_of(tree: &Tree, name: &str) -> Result<Vec<String>, String> {
        let nodes = nodes(&tree.system().cdi, name).map_err(|error| error.to_string())?;
        Ok(nodes
            .iter()
            .map(|path| path.display().to_string())
            .collect())
    }

    #[test]
    fn a_device_s_own_nodes_and_those_of_all() {
        let tree = Tree::new();
        tree.write("etc/cdi/vendor.json", &spec("/dev/vfio/7"));
        let both = ["/dev/vfio/7", "/dev/vfio/vfio"].map(str::to_owned);
        assert_eq!(nodes_of(&tree, "vendor.com/gpu=0").unwrap(), both);
        let moved = nodes_of(&tree, "vendor.com/gpu=moved").unwrap();
        assert_eq!(moved[0], "/dev/vfio/9");
    }

    #[test]
    fn the_later_directory_counts() {
        let tree = Tree::new();
        tree.write("etc/cdi/vendor.json", &spec("/dev/vfio/7"));
        tree.write("run/cdi/vendor.json", &spec("/dev/vfio/8"));
        assert_eq!(
            nodes_of(&tree, "vendor.com/gpu=0").unwrap()[0],
            "/dev/vfio/8"
        );
        tree.write("run/cdi/other.json", &spec("/dev/vfio/8"));
        let error = nodes_of(&tree, "vendor.com/gpu=0").unwrap_err();
        assert!(
            error.contains("other.json and ") && error.contains("vendor.json"),
            "{error}"
        );
    }

    #[test]
    fn a_wrong_name_and_what_was_looked_at() {
        let tree = Tree::new();
        let error = nodes_of(&tree, "vendor.com/gpu=0").unwrap_err();
        assert!(error.contains("no spec in JSON in"), "{error}");
        tree.write("etc/cdi/vendor.json", &spec("/dev/vfio/7"));
        tree.write("etc/cdi/nvidia.yaml", "kind: nvidia.com/gpu\n");
        let error = nodes_of(&tree, "nvidia.com/gpu=0").unwrap_err();
        assert!(error.contains("\"nvidia.com/gpu=0\""), "{error}");
        assert!(
            error.contains("vendor.json") && error.contains("nvidia.yaml"),
            "{error}"
        );
        assert!(error.contains("JSON only"), "{error}");
    }

    #[test]
    fn a_broken_spec_is_named() {
        let tree = Tree::new();
        tree.write("etc/cdi/broken.json", "{\"kind\": 1}");
        let error = nodes_of(&tree, "vendor.com/gpu=0").unwrap_err();
        assert!(error.contains("etc/cdi/broken.json"), "{error}");
    }
}
