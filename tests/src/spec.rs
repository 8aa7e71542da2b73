//! Specs of our own, for what `ctr run` has no option for.

use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use serde_json::{Value, json};

use crate::run;

/// A root file system of busybox, made once.
const ROOT: &str = "/tmp/e2e-rootfs";

/// A spec in a file, removed when dropped.
pub struct SpecFile {
    pub path: String,
}

impl Drop for SpecFile {
    fn drop(&mut self) {
        // It is in /tmp: worth no failure.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// ctr's default spec on a root file system of busybox, after `change`.
pub fn write(id: &str, change: impl FnOnce(&mut Value)) -> SpecFile {
    make_root();
    let mut spec = default_spec();
    spec["root"] = json!({"path": ROOT, "readonly": true});
    spec["linux"]["cgroupsPath"] = json!(format!("/default/{id}"));
    spec["process"]["terminal"] = json!(false);
    change(&mut spec);
    let path = format!("/tmp/e2e-spec-{id}.json");
    std::fs::write(&path, spec.to_string()).expect("/tmp is writable");
    SpecFile { path }
}

/// What ctr's spec is without options: asked for once, each call takes its time.
fn default_spec() -> Value {
    static SPEC: OnceLock<Value> = OnceLock::new();
    SPEC.get_or_init(|| {
        let text = run("ctr", &["oci", "spec"]).exits(0).stdout;
        serde_json::from_str(&text).expect("ctr prints a spec")
    })
    .clone()
}

fn make_root() {
    let root = Path::new(ROOT);
    if root.join("bin/sh").exists() {
        return;
    }
    for directory in ["bin", "dev", "etc", "proc", "run", "sys", "tmp"] {
        std::fs::create_dir_all(root.join(directory)).expect("/tmp is writable");
    }
    let script =
        format!("cp /bin/busybox {ROOT}/bin/ && chroot {ROOT} /bin/busybox --install -s /bin");
    let status = Command::new("sh").args(["-c", &script]).status();
    assert!(status.is_ok_and(|status| status.success()), "{script}");
    std::fs::write(root.join("etc/passwd"), "root:x:0:0::/:/bin/sh\n").expect("/tmp is writable");
}
