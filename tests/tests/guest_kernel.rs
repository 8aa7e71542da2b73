//! The guest kernel's build takes a source of the user's own.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nacre_tests::Said;

/// `guest-kernel/build path`, with a cache of its own.
fn path_with(source: &Path) -> Said {
    let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-kernel/build");
    Command::new(build)
        .arg("path")
        .env("KERNEL_SRC", source)
        .env("XDG_CACHE_HOME", directory("cache"))
        .output()
        .unwrap()
        .into()
}

fn directory(name: &str) -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::create_dir_all(&directory).unwrap();
    directory
}

#[test]
fn missing_source_is_named() {
    path_with(Path::new("/no/such/tree"))
        .exits(1)
        .complains(&["KERNEL_SRC=/no/such/tree does not exist"]);
}

#[test]
fn directory_without_a_kernel_is_refused() {
    path_with(&directory("no-kernel"))
        .exits(1)
        .complains(&["no-kernel is not a kernel source tree"]);
}

/// Another source is another kernel: it is not mistaken for one built before.
#[test]
fn tree_of_the_user_is_a_kernel_of_its_own() {
    let tree = directory("tree");
    fs::write(tree.join("Kbuild"), "# a tree\n").unwrap();
    path_with(&tree)
        .exits(1)
        .complains(&["not built yet: make -C guest-kernel"]);
}
