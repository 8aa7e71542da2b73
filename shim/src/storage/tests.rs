//! Real mounts, each test in a mount namespace of its thread.

use super::*;

use std::os::unix::fs::MetadataExt;

use containerd_shim_protos::types::mount::Mount;
use nix::mount::MsFlags;
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};

use crate::sandbox::{Api, SlotCounts};

/// Gives the calling thread its own mounts. Without the right to do so the test
/// is skipped, and says so.
fn own_mounts() -> bool {
    let private = || {
        unshare(CloneFlags::CLONE_NEWNS)?;
        let flags = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
        nix::mount::mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
    };
    match private() {
        Ok(()) => true,
        Err(errno) => {
            eprintln!("skipped: no mount namespace: {errno}");
            false
        }
    }
}

fn spec(mounts: &Value) -> Spec {
    serde_json::from_value(json!({
        "ociVersion": "1.1.0", "root": {"path": "rootfs"}, "mounts": mounts,
    }))
    .unwrap()
}

fn bind_mount(source: &Path) -> Mount {
    Mount {
        type_: "bind".into(),
        source: source.display().to_string(),
        options: vec!["rbind".into(), "rw".into()],
        ..Default::default()
    }
}

/// A host directory with a root file system, volumes, and a shared directory.
struct Host(tempfile::TempDir);

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["snapshot", "data", "shared"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        std::fs::write(dir.path().join("snapshot/hello"), "hi").unwrap();
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn prepare(&self, mounts: &Value) -> Result<Prepared, StorageError> {
        self.prepare_as("c1", mounts)
    }

    fn prepare_as(&self, id: &str, mounts: &Value) -> Result<Prepared, StorageError> {
        let rootfs = [bind_mount(&self.path("snapshot"))];
        let config = self.config(id, &rootfs, mounts);
        prepare(&System::default(), &config, &self.path("shared"), None)
    }

    /// For a machine that runs if it has `slots`.
    fn prepare_root(
        &self,
        rootfs: &[Mount],
        slots: Option<&DiskSlots>,
    ) -> Result<Prepared, StorageError> {
        let config = self.config("c1", rootfs, &json!([]));
        prepare(&System::default(), &config, &self.path("shared"), slots)
    }

    fn config(&self, id: &str, rootfs: &[Mount], mounts: &Value) -> ContainerConfig {
        ContainerConfig {
            api: Api::Task,
            id: id.into(),
            bundle: self.0.path().into(),
            rootfs: rootfs.to_owned(),
            spec: Arc::new(spec(mounts)),
        }
    }
}

impl Drop for Host {
    /// The pod's end.
    fn drop(&mut self) {
        let unmounted = host::unmount_below(self.0.path());
        if !std::thread::panicking() {
            unmounted.unwrap();
        }
    }
}

#[test]
fn shared_rootfs_is_written_through_and_released() {
    if !own_mounts() {
        return;
    }
    let host = Host::new();
    let prepared = host.prepare(&json!([])).unwrap();

    let shared = host.path("shared/c1/rootfs");
    assert_eq!(std::fs::read_to_string(shared.join("hello")).unwrap(), "hi");
    std::fs::write(shared.join("written"), "x").unwrap();
    assert!(host.path("snapshot/written").exists());
    assert!(prepared.uses_shared_dir && prepared.disks.is_empty());
    assert_eq!(prepared.storages[0].source, "/run/nacre/shared/c1/rootfs");

    release(&host.path("shared"), "c1").unwrap();
    release(&host.path("shared"), "c1").unwrap();
    assert!(!host.path("shared/c1").exists());
    assert!(host.path("snapshot/hello").exists());
}

/// Linux mounts such an overlay for reading only.
#[test]
fn overlay_on_a_full_disk_is_refused() {
    if !own_mounts() {
        return;
    }
    let host = Host::new();
    let disk = host.path("disk");
    std::fs::create_dir(&disk).unwrap();
    let (fstype, flags) = (Some("tmpfs"), MsFlags::empty());
    nix::mount::mount(fstype, &disk, fstype, flags, Some("nr_inodes=16")).unwrap();
    let directory = |kind: &str| {
        let path = disk.join(kind);
        std::fs::create_dir(&path).unwrap();
        format!("{kind}={}", path.display())
    };
    let rootfs = [Mount {
        type_: "overlay".into(),
        options: ["lowerdir", "upperdir", "workdir"].map(directory).into(),
        ..Default::default()
    }];
    let fill = |n: u32| File::create(disk.join(n.to_string())).err();
    let full = (0..16).find_map(fill).unwrap();
    assert_eq!(full.kind(), io::ErrorKind::StorageFull);

    let error = host.prepare_root(&rootfs, None).unwrap_err();
    let error = crate::error::chain(&error);
    let parts = ["shared/c1/rootfs", "disk/upperdir", "full"];
    assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    assert!(!host.path("shared/c1").exists());

    for n in 0..4 {
        std::fs::remove_file(disk.join(n.to_string())).unwrap();
    }
    host.prepare_root(&rootfs, None).unwrap();
    std::fs::write(host.path("shared/c1/rootfs/written"), "").unwrap();
}

/// Layers on a tmpfs, since an overlay cannot lie on an overlay's upper: each has
/// one file `file<n>`. Returns their paths.
fn layers_on_tmpfs(host: &Host, count: usize, name: impl Fn(usize) -> String) -> Vec<String> {
    let layers = host.path("layers");
    std::fs::create_dir(&layers).unwrap();
    let (fstype, flags) = (Some("tmpfs"), MsFlags::empty());
    nix::mount::mount(fstype, &layers, fstype, flags, None::<&str>).unwrap();
    let make = |n: usize| {
        let layer = layers.join(name(n)).join("fs");
        std::fs::create_dir_all(&layer).unwrap();
        std::fs::write(layer.join(format!("file{n}")), "").unwrap();
        layer.display().to_string()
    };
    (0..count).map(make).collect()
}

fn overlay_mount(options: Vec<String>) -> Mount {
    Mount {
        type_: "overlay".into(),
        source: "overlay".into(),
        options,
        ..Default::default()
    }
}

#[test]
fn overlay_with_more_layer_paths_than_a_page() {
    if !own_mounts() {
        return;
    }
    let host = Host::new();
    let name = |n: usize| format!("{n}-{}", "x".repeat(100));
    let lower = layers_on_tmpfs(&host, 38, name).join(":");
    // Relative to their common directory they fit; with it they do not.
    assert!(lower.len() > 4096);
    let mount = overlay_mount(vec![format!("lowerdir={lower}"), "ro".into()]);
    let shared = host.path("shared");

    host.prepare_root(&[mount], None).unwrap();

    assert!(shared.join("c1/rootfs/file37").exists());
    release(&shared, "c1").unwrap();
}

/// As containerd hands them over, with snapshots numbered in the ten thousands.
#[test]
fn overlay_with_as_many_layers_as_there_can_be() {
    if !own_mounts() {
        return;
    }
    let host = Host::new();
    let mut lower = layers_on_tmpfs(&host, 501, |n| (10_000 + n).to_string());
    let layers = host.path("layers");
    for directory in ["upper", "work"] {
        std::fs::create_dir(layers.join(directory)).unwrap();
    }
    let options = |lower: &[String]| {
        vec![
            "index=off".into(),
            "nosuid".into(),
            format!("workdir={}", layers.join("work").display()),
            format!("upperdir={}", layers.join("upper").display()),
            format!("lowerdir={}", lower.join(":")),
        ]
    };
    let shared = host.path("shared");
    let prepare_on = |lower: &[String]| {
        let mount = overlay_mount(options(lower));
        host.prepare_root(&[mount], None)
    };

    let error = prepare_on(&lower).unwrap_err().to_string();
    assert!(
        error.starts_with("container c1: the image has 501 layers"),
        "{error}"
    );
    assert!(error.contains("500"), "{error}");
    assert!(!shared.join("c1").exists());

    lower.remove(0);
    prepare_on(&lower).unwrap();
    let root = shared.join("c1/rootfs");
    assert!(root.join("file1").exists() && root.join("file500").exists());
    std::fs::write(root.join("file1"), "new").unwrap();
    assert!(layers.join("upper/file1").exists());
    let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let place = format!(" {} ", root.display());
    let line = mounts.lines().find(|line| line.contains(&place)).unwrap();
    assert!(line.contains("nosuid,nodev"), "{line}");
    release(&shared, "c1").unwrap();
}

/// Whether this kernel maps owners on a tmpfs, which it does since 6.3, and gives out
/// user namespaces. What else it takes is what [`own_mounts`] has found.
fn can_map() -> bool {
    let read = |name: &str| std::fs::read_to_string(Path::new("/proc/sys").join(name)).unwrap();
    let release = read("kernel/osrelease");
    let mut numbers = release
        .split(['.', '-'])
        .map(|number| number.parse().unwrap_or(0));
    let version: [u32; 2] = std::array::from_fn(|_| numbers.next().unwrap_or(0));
    let namespaces: u64 = read("user/max_user_namespaces").trim().parse().unwrap();
    let can = version >= [6, 3] && namespaces > 0;
    if !can {
        eprintln!(
            "skipped: Linux {} with {namespaces} user namespaces",
            release.trim()
        );
    }
    can
}

/// The layers' files are root's, and the container's root is user 100000 here.
#[test]
fn overlay_of_layers_with_mapped_owners() {
    if !own_mounts() {
        return;
    }
    let host = Host::new();
    let lower = layers_on_tmpfs(&host, 2, |n| n.to_string()).join(":");
    let layers = host.path("layers");
    if !can_map() {
        return;
    }
    for directory in ["upper", "work"] {
        std::fs::create_dir(layers.join(directory)).unwrap();
    }
    let mount = overlay_mount(vec![
        format!("workdir={}", layers.join("work").display()),
        format!("upperdir={}", layers.join("upper").display()),
        format!("lowerdir={lower}"),
        "uidmap=0:100000:65536".into(),
        "gidmap=0:200000:65536".into(),
    ]);
    let shared = host.path("shared");

    host.prepare_root(&[mount], None).unwrap();

    let root = shared.join("c1/rootfs");
    let file = std::fs::metadata(root.join("file1")).unwrap();
    assert_eq!((file.uid(), file.gid()), (100_000, 200_000));
    std::fs::write(root.join("file1"), "new").unwrap();
    let copy = std::fs::metadata(layers.join("upper/file1")).unwrap();
    assert_eq!((copy.uid(), copy.gid()), (100_000, 200_000));
    release(&shared, "c1").unwrap();
    assert!(!shared.join("c1").exists());
}

/// An EROFS image of one file.
fn erofs_image(host: &Host, name: &str) -> String {
    let tree = host.path(&format!("{name}.d"));
    std::fs::create_dir(&tree).unwrap();
    std::fs::write(tree.join(name), name).unwrap();
    let image = host.path(&format!("{name}.erofs"));
    let made = std::process::Command::new("mkfs.erofs")
        .args([&image, &tree])
        .output()
        .expect("mkfs.erofs (Debian: erofs-utils)");
    assert!(made.status.success(), "{made:?}");
    image.display().to_string()
}

/// Whether this host mounts EROFS from files.
fn has_erofs() -> bool {
    // A module is loaded by its first mount only; what comes of it is in the list.
    let _ = std::process::Command::new("modprobe")
        .args(["-q", "erofs"])
        .status();
    let known = std::fs::read_to_string("/proc/filesystems").unwrap();
    let has = known.contains("\terofs\n") && Path::new("/dev/loop-control").exists();
    if !has {
        eprintln!("skipped: the kernel has no EROFS or no loop devices");
    }
    has
}

/// What containerd hands over for an image of these layers.
fn erofs_mounts(layers: Vec<String>) -> Vec<Mount> {
    let lower = format!("lowerdir={{{{ overlay 0 {} }}}}", layers.len() - 1);
    let layer = |source| Mount {
        type_: "erofs".into(),
        source,
        options: vec!["ro".into(), "loop".into()],
        ..Default::default()
    };
    let mut mounts: Vec<_> = layers.into_iter().map(layer).collect();
    mounts.push(Mount {
        type_: "format/mkdir/overlay".into(),
        source: "overlay".into(),
        options: vec![lower],
        ..Default::default()
    });
    mounts
}

fn slots(roots: usize) -> DiskSlots {
    DiskSlots::new(SlotCounts { volumes: 0, roots })
}

#[test]
fn erofs_layers_are_mounted_by_the_host_where_no_disk_is_empty() {
    if !own_mounts() || !has_erofs() {
        return;
    }
    let host = Host::new();
    let layers = ["high", "low"].map(|name| erofs_image(&host, name));
    let rootfs = erofs_mounts(layers.into());
    let shared = host.path("shared");

    let prepared = host.prepare_root(&rootfs, Some(&slots(0)));

    assert!(prepared.unwrap().uses_shared_dir);
    for file in ["low", "high"] {
        let path = shared.join("c1/rootfs").join(file);
        assert_eq!(std::fs::read_to_string(path).unwrap(), file);
    }
    release(&shared, "c1").unwrap();
    assert!(!shared.join("c1").exists());
}

/// The last one of them, and it is free again with what was prepared.
#[test]
fn erofs_layers_of_a_container_that_joins_are_an_empty_disk_s() {
    let host = Host::new();
    let image = host.path("layer.erofs");
    std::fs::write(&image, [0; 4096]).unwrap();
    let rootfs = erofs_mounts(vec![image.display().to_string()]);
    let slots = slots(1);

    let prepared = host.prepare_root(&rootfs, Some(&slots)).unwrap();

    assert!(!prepared.uses_shared_dir && slots.take_roots(1).is_none());
    let [slot] = prepared.slots.as_slice() else {
        panic!("{:?}", prepared.slots);
    };
    assert_eq!(prepared.disks.len(), 1);
    assert_eq!(prepared.disks[0].serial, slot.serial());
    drop(prepared);
    std::fs::write(&image, "").unwrap();
    host.prepare_root(&rootfs, Some(&slots)).unwrap_err();
    assert!(
        slots.take_roots(1).is_some(),
        "nor has one that was refused it"
    );
}

/// Whether the pod's machine is made with disks for them.
#[test]
fn the_first_container_s_root_tells_of_the_others() {
    let host = Host::new();
    let has = |rootfs: &[Mount]| has_root_on_disks(&host.config("pod", rootfs, &json!([])));
    assert!(has(&erofs_mounts(vec!["/layer.erofs".into()])));
    assert!(!has(&[bind_mount(Path::new("/"))]));
    assert!(!has(&[overlay_mount(vec!["lowerdir=/a:/b".into()])]));
    assert!(!has(&[]), "of a sandbox that containerd has no image of");
}

#[test]
fn container_ids_are_plain_names() {
    for id in ["", ".", "..", "a/b", "../x", "a b", "a\0"] {
        assert!(check_id(id).is_err(), "{id:?}");
    }
    for id in ["c1", "web-1.2_x", &"a".repeat(64)] {
        assert!(check_id(id).is_ok(), "{id:?}");
    }
}

mod volumes;
