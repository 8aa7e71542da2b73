//! The guest kernel's build takes a source of the user's own.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nacre_tests::Said;

/// `guest-kernel/build`, with a cache of its own.
fn build() -> Command {
    let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-kernel/build");
    let mut command = Command::new(build);
    command.env("XDG_CACHE_HOME", directory("cache"));
    command
}

fn path_with(source: &Path) -> Said {
    said(build().arg("path").env("KERNEL_SRC", source))
}

fn said(command: &mut Command) -> Said {
    command.output().unwrap().into()
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
fn relative_source_is_of_the_caller_s_directory() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let make = |arguments: &[&str], variable: &str| {
        let mut make = Command::new("make");
        make.args(arguments).current_dir(root);
        make.env("KERNEL_SRC", variable);
        let path = root.join("no/such/tree");
        let complaint = format!("KERNEL_SRC={} does not exist", path.display());
        said(&mut make).exits(2).complains(&[&complaint]);
    };
    make(&["kernel"], "no/such/tree");
    make(&["kernel", "KERNEL_SRC=no/such/tree"], "");
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

/// What the build asks of a source tree: an allnoconfig that takes the options,
/// and a vmlinux with a PVH entry note (type 18 of Xen's).
const TREE: &str = r#"
allnoconfig:
	grep -vx "$(REFUSED)" nacre.config > .config
run-command:
	mkdir -p $(lastword $(KBUILD_RUN_COMMAND))
modules:
	echo drivers/some/driver.o > modules.order
	mkdir -p drivers/some
	cp nacre.config drivers/some/driver.ko
vmlinux:
	echo built >> "$(JOURNAL)"
	printf '.section .note.pvh,"a",@note\n.long 4,4,18\n.asciz "Xen"\n.long 0\n' | cc -c -x assembler - -o $@
"#;

#[test]
fn second_build_costs_nothing() {
    let tree = directory("tree-to-build");
    let journal = directory("journals").join("builds");
    let _ = fs::remove_dir_all(directory("cache-of-builds"));
    let _ = fs::remove_file(&journal);
    fs::write(tree.join("Kbuild"), "").unwrap();
    fs::write(tree.join("Makefile"), TREE).unwrap();
    let build_with = |refused: &str| {
        let mut command = build();
        command.env("XDG_CACHE_HOME", directory("cache-of-builds"));
        command.env("KERNEL_SRC", &tree).env("JOURNAL", &journal);
        said(command.env("REFUSED", refused))
    };
    build_with("CONFIG_VSOCKETS=y")
        .exits(1)
        .complains(&["the source did not take: CONFIG_VSOCKETS=y"]);
    let first = build_with("").exits(0);
    assert!(Path::new(first.stdout.trim()).exists(), "{first:#?}");
    build_with("").exits(0).prints(&first.stdout);
    assert_eq!(fs::read_to_string(&journal).unwrap(), "built\n");
    // The same as a tarball, as kernel.org has them.
    let tarball = tree.with_extension("tar.xz");
    let parent = tree.parent().unwrap();
    said(
        Command::new("tar")
            .args(["-cJf", tarball.to_str().unwrap(), "-C"])
            .args([parent, Path::new("tree-to-build")]),
    )
    .exits(0);
    let packed = || {
        let mut command = build();
        command.env("XDG_CACHE_HOME", directory("cache-of-builds"));
        command.env("KERNEL_SRC", &tarball).env("JOURNAL", &journal);
        said(command.env("REFUSED", "")).exits(0).stdout
    };
    assert!(Path::new(packed().trim()).exists());
    packed();
    assert_eq!(fs::read_to_string(&journal).unwrap(), "built\nbuilt\n");
    // What belongs to this kernel is beside it, and its release names the build.
    let beside = |what: &str| {
        let mut command = build();
        command.env("XDG_CACHE_HOME", directory("cache-of-builds"));
        let path = said(command.arg(what).env("KERNEL_SRC", &tree)).exits(0);
        let path = Path::new(path.stdout.trim()).to_owned();
        assert_eq!(path.parent(), Path::new(first.stdout.trim()).parent());
        path
    };
    let key = beside("headers")
        .parent()
        .unwrap()
        .file_name()
        .unwrap()
        .to_owned();
    assert!(beside("headers").join(".config").exists());
    let config = fs::read_to_string(beside("modules").join("driver.ko")).unwrap();
    let release = format!("CONFIG_LOCALVERSION=\"-nacre.{}\"\n", key.to_str().unwrap());
    assert!(config.ends_with(&release), "{config}");
}

/// `guest-kernel/driver-image`, from a directory with these files.
fn driver_image(name: &str, files: &[(&str, &str)]) -> (Said, PathBuf) {
    let source = directory(name);
    fs::remove_dir_all(&source).unwrap();
    fs::create_dir(&source).unwrap();
    for (name, text) in files {
        fs::create_dir_all(source.join(name).parent().unwrap()).unwrap();
        fs::write(source.join(name), text).unwrap();
    }
    let image = source.with_extension("erofs");
    let _ = fs::remove_file(&image);
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-kernel/driver-image");
    let said = said(Command::new(program).args([&source, &image]));
    (said, image)
}

#[test]
fn driver_images_are_the_same_from_the_same_files() {
    let files = [
        ("modules/modules.load", "# first\na.ko\nb.ko level=3\n"),
        ("modules/a.ko", "a"),
        ("modules/b.ko", "b"),
        ("cdi/gpu.json", "{}"),
        ("usr/lib/libgpu.so", "library"),
    ];
    let (said, image) = driver_image("image", &files);
    said.exits(0);
    let first = fs::read(&image).unwrap();
    // A superblock of EROFS, in blocks.
    assert_eq!(first[1024..1028], 0xe0f5_e1e2_u32.to_le_bytes());
    assert_eq!(first.len() % 4096, 0);
    driver_image("image", &files).0.exits(0);
    assert!(first == fs::read(&image).unwrap(), "another image");
}

#[test]
fn directories_that_make_no_driver_image_are_refused() {
    for (name, files, part) in [
        ("unlisted", &[("modules/a.ko", "a")][..], "no list"),
        (
            "missing",
            &[("modules/modules.load", "a.ko\n")],
            "names a.ko",
        ),
        (
            "cut",
            &[
                ("modules/modules.load", "a.ko\nb.ko"),
                ("modules/a.ko", "a"),
            ],
            "names b.ko",
        ),
        (
            "elsewhere",
            &[("modules/modules.load", "../a.ko\n"), ("a.ko", "a")],
            "names ../a.ko: no .ko file",
        ),
        (
            "unnamed",
            &[("modules/modules.load", "nvme x=1\n"), ("modules/nvme", "")],
            "names nvme: no .ko file",
        ),
        ("yaml", &[("cdi/gpu.yaml", "x: 1")], "gpu.yaml is not JSON"),
    ] {
        let (said, image) = driver_image(name, files);
        said.exits(1).complains(&[part]);
        assert!(!image.exists(), "{name}");
    }
}

/// Only said, not done: without a directory it would write to the host's own.
#[test]
fn modules_for_an_image_need_a_directory() {
    let make = |directory: &[&str]| {
        let kernel = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-kernel");
        let mut make = Command::new("make");
        make.args(["--dry-run", "nvme", "-C"]).arg(kernel);
        // That of a make which runs this test is not for this one.
        said(
            make.args(directory)
                .env_remove("MAKEFLAGS")
                .env_remove("DIR"),
        )
    };
    make(&[]).exits(2).complains(&["DIR=... is needed"]);
    make(&["DIR="]).exits(2).complains(&["DIR=... is needed"]);
    make(&["DIR=/some/where"]).exits(0);
}

/// The archive this host's apt uses is trusted as far as Debian's keys go.
#[test]
fn source_without_debian_s_signature_is_refused() {
    let root = directory("archive");
    let release = "Origin: Debian\nLabel: Debian\nSuite: trixie\nCodename: trixie\n\
                   Components: main\nArchitectures: amd64\nSHA256:\n";
    let packages = "Package: linux-source-6.12\nVersion: 6.12.0-1\nArchitecture: all\n\
                    Filename: pool/linux-source.deb\nSize: 1\n";
    for (name, text) in [
        ("dists/trixie/Release", release),
        ("dists/trixie/main/binary-amd64/Packages", packages),
        (
            "apt.list",
            &*format!("deb [trusted=yes] file:{} trixie main\n", root.display()),
        ),
        (
            "apt.conf",
            &*format!(
                "Dir::Etc::SourceList \"{0}/apt.list\"; Dir::Etc::SourceParts \"/dev/null\"; \
                 Dir::State::Lists \"{0}/lists\"; Dir::Cache \"{0}/apt-cache\"; \
                 APT::Sandbox::User \"root\";",
                root.display()
            ),
        ),
    ] {
        fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
        fs::write(root.join(name), text).unwrap();
    }
    for name in ["lists/partial", "apt-cache/archives/partial"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    let conf = root.join("apt.conf");
    said(
        Command::new("apt-get")
            .arg("update")
            .env("APT_CONFIG", &conf),
    )
    .exits(0);
    let mut command = build();
    command.env("XDG_CACHE_HOME", directory("cache-of-archive"));
    let _ = fs::remove_dir_all(directory("cache-of-archive"));
    said(command.env("APT_CONFIG", &conf))
        .exits(100)
        .complains(&["is not signed"]);
}
