use super::realize::{Names, layers};
use super::*;
use crate::sandbox::{Api, DiskSlots, SlotCounts};
use crate::storage::HostBacking;

use std::sync::Arc;

use oci_spec::runtime::Spec;
use serde_json::json;

fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
    Mount {
        type_: kind.into(),
        source: source.into(),
        options: options.iter().map(|o| (*o).to_owned()).collect(),
        ..Default::default()
    }
}

fn spec() -> Spec {
    serde_json::from_value(json!({"ociVersion": "1.1.0", "root": {"path": "rootfs"}})).unwrap()
}

fn config(mounts: &[Mount], spec: Spec) -> ContainerConfig {
    ContainerConfig {
        api: Api::Task,
        id: "c1".into(),
        bundle: "/bundle".into(),
        rootfs: mounts.to_owned(),
        spec: Arc::new(spec),
    }
}

fn source_of(mounts: &[Mount]) -> Result<Source, StorageError> {
    Source::of(&config(mounts, spec()), true)
}

/// In a machine without disks for it.
fn source_without_disks(mounts: &[Mount]) -> Result<Source, StorageError> {
    Source::of(&config(mounts, spec()), false)
}

fn own_names() -> Names<'static> {
    Names {
        container_id: "c1",
        slots: [].iter(),
    }
}

#[test]
fn no_mounts_means_the_specs_root() {
    assert_eq!(
        source_of(&[]).unwrap(),
        Source::Host(vec![HostMount::Bind {
            source: "/bundle/rootfs".into(),
            read_only: false,
            maps: None,
        }])
    );
}

#[test]
fn overlay_of_plain_directories_is_mounted_on_the_host() {
    let options = [
        "lowerdir=/s/1/fs:/s/2/fs",
        "upperdir=/s/3/fs",
        "workdir=/s/3/work",
    ];
    let source = source_of(&[mount("overlay", "overlay", &options)]).unwrap();
    assert_eq!(
        source,
        Source::Host(vec![HostMount::Overlay {
            options: options.map(str::to_owned).into(),
            maps: None,
        }])
    );
}

#[test]
fn overlay_of_erofs_mounts_becomes_their_blobs() {
    let dir = tempfile::tempdir().unwrap();
    for layer in ["1", "2"] {
        std::fs::create_dir_all(dir.path().join(layer).join("fs")).unwrap();
        std::fs::write(dir.path().join(layer).join("layer.erofs"), "x").unwrap();
    }
    let root = dir.path().display();
    let lower = format!("lowerdir={root}/2/fs:{root}/1/fs");
    let mounts = [mount("overlay", "overlay", &[&lower, "upperdir=/s/3/fs"])];

    assert_eq!(
        source_of(&mounts).unwrap(),
        Source::Layers {
            images: vec![
                dir.path().join("2/layer.erofs"),
                dir.path().join("1/layer.erofs")
            ],
            upper: Upper::Tmpfs,
        }
    );
    let running = source_without_disks(&mounts).unwrap();
    assert!(matches!(running, Source::Host(_)));
}

#[test]
fn raw_erofs_layers_are_resolved() {
    let mounts = [
        mount("erofs", "/s/9/layer.erofs", &["ro", "loop"]),
        mount("erofs", "/s/8/layer.erofs", &["ro", "loop"]),
        mount(
            "format/mkdir/overlay",
            "overlay",
            &[
                "workdir=/s/10/work",
                "upperdir=/s/10/fs",
                "lowerdir={{ overlay 0 1 }}",
            ],
        ),
    ];
    assert_eq!(
        source_of(&mounts).unwrap(),
        Source::Layers {
            images: vec!["/s/9/layer.erofs".into(), "/s/8/layer.erofs".into()],
            upper: Upper::Tmpfs,
        }
    );
}

#[test]
fn block_mode_upper_goes_with_its_image() {
    let mounts = [
        mount("ext4", "/s/10/rwlayer.img", &["rw", "loop"]),
        mount("erofs", "/s/9/layer.erofs", &["ro", "loop"]),
        mount(
            "format/mkdir/overlay",
            "overlay",
            &[
                "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
                "workdir={{ mount 0 }}/work",
                "upperdir={{ mount 0 }}/upper",
                "lowerdir={{ mount 1 }}",
            ],
        ),
    ];
    assert_eq!(
        source_of(&mounts).unwrap(),
        Source::Layers {
            images: vec!["/s/9/layer.erofs".into()],
            upper: Upper::Disk {
                path: "/s/10/rwlayer.img".into(),
                upper: "upper".into(),
                work: "work".into(),
            },
        }
    );
}

#[test]
fn templates_that_point_nowhere_are_errors() {
    let erofs = mount("erofs", "/s/9/layer.erofs", &["ro"]);
    for lower in [
        "{{ overlay 0 7 }}",
        "{{ overlay 0 18446744073709551615 }}",
        "{{ mount 1 }}",
        "{{ exec 0 }}",
        "/s/9/fs",
    ] {
        let option = format!("lowerdir={lower}");
        let overlay = mount("format/overlay", "overlay", &[&option]);
        let result = source_of(&[erofs.clone(), overlay]);
        assert!(
            matches!(result, Err(StorageError::RootfsOption { .. })),
            "{lower}: {result:?}"
        );
    }
}

#[test]
fn upper_directory_may_not_climb() {
    assert_eq!(directory_on("{{ mount 0 }}/../etc"), None);
    assert_eq!(directory_on("{{ mount 0 }}/"), None);
    assert_eq!(directory_on("{{ mount 3 }}/a/b"), Some((3, "a/b")));
}

#[test]
fn unknown_type_names_type_and_container() {
    let error = source_of(&[mount("zfs", "pool/x", &[])]).unwrap_err();
    let message = error.to_string();
    assert!(
        message.contains("c1") && message.contains("\"zfs\""),
        "{message}"
    );
    assert!(source_of(&[mount("mkfs/ext4", "/s/1/rw.img", &[])]).is_err());
}

#[test]
fn vm_without_disks_gets_raw_layers_by_the_host() {
    let mut mounts = [
        mount("erofs", "/s/8/layer.erofs", &["ro", "loop"]),
        mount("erofs", "/s/9/layer.erofs", &["ro", "loop"]),
        mount(
            "format/mkdir/overlay",
            "overlay",
            &["upperdir=/s/10/fs", "lowerdir={{ overlay 1 0 }}"],
        ),
    ];
    let source = source_without_disks;
    assert_eq!(
        source(&mounts).unwrap(),
        Source::HostLayers {
            images: vec!["/s/9/layer.erofs".into(), "/s/8/layer.erofs".into()],
            options: vec!["upperdir=/s/10/fs".into()],
            maps: None,
        }
    );
    mounts[2].options[0] = "upperdir={{ mount 0 }}/upper".into();
    assert!(matches!(
        source(&mounts),
        Err(StorageError::NeedsDisk { .. })
    ));
}

#[test]
fn vm_without_disks_gets_no_image() {
    let mounts = [mount("ext4", "/dev/mapper/x", &["rw"])];
    let result = source_without_disks(&mounts);
    assert!(matches!(result, Err(StorageError::NeedsDisk { .. })));
}

#[test]
fn layers_become_one_disk_and_an_overlay() {
    let dir = tempfile::tempdir().unwrap();
    let images: Vec<_> = ["a", "b"].map(|name| dir.path().join(name)).into();
    for image in &images {
        std::fs::write(image, [0; 4096]).unwrap();
    }

    let root = layers(&images, &Upper::Tmpfs, &mut own_names()).unwrap();

    let [disk] = root.disks.as_slice() else {
        panic!("{} disks", root.disks.len());
    };
    assert!(disk.read_only && disk.serial.len() <= 20);
    assert!(matches!(&disk.backing, HostBacking::Partitions(files) if files.len() == 2));
    let kinds: Vec<_> = root.storages.iter().map(|s| s.fstype.as_str()).collect();
    assert_eq!(kinds, ["erofs", "erofs", "tmpfs", "overlay"]);
    assert_eq!(root.storages[1].source, format!("serial:{}:2", disk.serial));
    let base = "/run/nacre/containers/c1";
    assert_eq!(
        root.storages[3].options,
        [
            format!("lowerdir={base}/layers/1:{base}/layers/2"),
            format!("upperdir={base}/scratch/upper"),
            format!("workdir={base}/scratch/work"),
        ]
    );
    assert_eq!(root.storages[3].target, format!("{base}/rootfs"));
    assert!(!root.shared);
}

/// The machine runs, and was made with empty disks.
#[test]
fn layers_and_their_upper_take_the_place_of_empty_disks() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    std::fs::write(&image, [0; 4096]).unwrap();
    let upper = Upper::Disk {
        path: image.clone(),
        upper: "upper".into(),
        work: "work".into(),
    };
    let source = Source::Layers {
        images: vec![image.clone(), image],
        upper,
    };
    let slots = DiskSlots::new(SlotCounts {
        volumes: 0,
        roots: 2,
    });
    let slots = slots.take_roots(source.disks()).unwrap();

    let root = source.realize("c1", dir.path(), &slots).unwrap();

    let disks = root.disks.iter();
    let disks = disks.map(|disk| (disk.serial.as_str(), disk.read_only));
    assert_eq!(
        disks.collect::<Vec<_>>(),
        [("root0", true), ("root1", false)]
    );
    let sources: Vec<_> = root.storages.iter().map(|s| s.source.as_str()).collect();
    let expected = [
        "serial:root0:1",
        "serial:root0:2",
        "serial:root1",
        "overlay",
    ];
    assert_eq!(sources, expected);
}

#[test]
fn disks_are_counted() {
    let images = |count| vec![PathBuf::new(); count];
    let on_tmpfs = |count| Source::Layers {
        images: images(count),
        upper: Upper::Tmpfs,
    };
    let counts = [1, MAX_PARTITIONS, MAX_PARTITIONS + 1].map(|count| on_tmpfs(count).disks());
    assert_eq!(counts, [1, 1, 2]);
    let by_the_host = Source::HostLayers {
        images: images(3),
        options: Vec::new(),
        maps: None,
    };
    assert_eq!(by_the_host.disks(), 0);
    let image = Source::Image {
        path: PathBuf::new(),
        read_only: false,
    };
    assert_eq!(image.disks(), 1);
}

/// A disk has 253 partitions, an overlay takes 500 layers.
#[test]
fn many_layers_become_several_disks() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("layer.erofs");
    std::fs::write(&image, [0; 4096]).unwrap();
    let images = vec![image; MAX_LAYERS];

    let root = layers(&images, &Upper::Tmpfs, &mut own_names()).unwrap();

    let counts = root.disks.iter().map(|disk| match &disk.backing {
        HostBacking::Partitions(files) => files.len(),
        HostBacking::Whole(_) => panic!("a whole disk"),
    });
    assert_eq!(counts.collect::<Vec<_>>(), [253, 247]);
    let serials: Vec<_> = root.disks.iter().map(|disk| &disk.serial).collect();
    assert!(serials[0] != serials[1] && serials.iter().all(|serial| serial.len() <= 20));
    let places = |index: usize| {
        let storage = &root.storages[index];
        (storage.source.clone(), storage.target.clone())
    };
    let at = |serial: &str, partition: u32, layer: u32| {
        let target = format!("/run/nacre/containers/c1/layers/{layer}");
        (format!("serial:{serial}:{partition}"), target)
    };
    assert_eq!(places(252), at(serials[0], 253, 253));
    assert_eq!(places(253), at(serials[1], 1, 254));
    assert_eq!(places(499), at(serials[1], 247, 500));
    let overlay = root.storages.last().unwrap();
    let lower = overlay.options[0].strip_prefix("lowerdir=").unwrap();
    assert_eq!(lower.split(':').count(), 500);
}

#[test]
fn more_layers_than_an_overlay_takes_are_refused() {
    let raw = |count: usize| {
        let mut mounts = vec![mount("erofs", "/l.erofs", &["ro"]); count];
        let lower = format!("lowerdir={{{{ overlay {} 0 }}}}", count - 1);
        mounts.push(mount("format/mkdir/overlay", "overlay", &[&lower]));
        mounts
    };
    for disks in [true, false] {
        let of = |count| Source::of(&config(&raw(count), spec()), disks);
        assert!(of(500).is_ok());
        let error = of(501).unwrap_err();
        assert!(
            matches!(error, StorageError::TooManyLayers { layers: 501, .. }),
            "{error}"
        );
    }
}

#[test]
fn image_that_was_cut_to_nothing_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("layer.erofs");
    std::fs::write(&image, "cut").unwrap();
    let error = layers(
        std::slice::from_ref(&image),
        &Upper::Tmpfs,
        &mut own_names(),
    )
    .err();
    let error = crate::error::chain(&error.unwrap());
    assert!(
        error.contains("layer.erofs") && error.contains("3 bytes"),
        "{error}"
    );
}

/// The mappings containerd puts among an overlay's options are for its layers.
#[test]
fn mappings_are_taken_from_the_options() {
    let options = |uidmap: &str| {
        let uidmap = format!("uidmap={uidmap}");
        [mount(
            "overlay",
            "overlay",
            &["lowerdir=/s/1/fs:/s/2/fs", &uidmap, "gidmap=0:7:9"],
        )]
    };
    let source = source_of(&options("0:100000:65536,70000:5:1")).unwrap();
    let Source::Host(mounts) = source else {
        panic!("{source:?}");
    };
    let [
        HostMount::Overlay {
            options: rest,
            maps: Some(maps),
        },
    ] = mounts.as_slice()
    else {
        panic!("{mounts:?}");
    };
    assert_eq!(rest, &["lowerdir=/s/1/fs:/s/2/fs"]);
    assert_eq!(
        (maps.uid(1), maps.uid(70_000), maps.gid(8)),
        (Some(100_001), Some(5), Some(15))
    );
    for bad in ["", "0:1", "0:1:2:3", "x:1:2", "0:1:2,"] {
        let error = source_of(&options(bad)).unwrap_err();
        assert!(
            matches!(error, StorageError::RootfsOption { .. }),
            "{bad}: {error}"
        );
    }
}

/// Their upper directory is the host's, with owners that are theirs.
#[test]
fn users_of_their_own_have_their_layers_mounted_by_the_host() {
    let linux = json!({"namespaces": [{"type": "user"}]});
    let spec = json!({"ociVersion": "1.1.0", "linux": linux});
    let spec: Spec = serde_json::from_value(spec).unwrap();
    let of = |mounts: &[Mount]| Source::of(&config(mounts, spec.clone()), true);
    let overlay = |upper: &str| {
        let options = [
            "lowerdir={{ overlay 0 0 }}",
            upper,
            "uidmap=0:1:2",
            "gidmap=0:1:2",
        ];
        let layer = mount("erofs", "/s/8/layer.erofs", &["ro"]);
        [layer, mount("format/mkdir/overlay", "overlay", &options)]
    };
    let source = of(&overlay("upperdir=/s/9/fs")).unwrap();
    assert!(
        matches!(&source, Source::HostLayers { maps: Some(_), options, .. }
            if options == &["upperdir=/s/9/fs"]),
        "{source:?}"
    );
    let error = of(&overlay("upperdir={{ mount 0 }}/upper")).unwrap_err();
    assert!(
        error.to_string().contains("overlayfs snapshotter"),
        "{error}"
    );
}
