use super::*;

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::sync::atomic::{AtomicBool, Ordering};

use nacre_protocol::agent::Empty;

fn entry(path: &str, mode: u32, kind: Kind) -> VolumeEntry {
    VolumeEntry {
        path: path.into(),
        mode,
        uid: nix::unistd::getuid().as_raw(),
        gid: nix::unistd::getgid().as_raw(),
        kind: Some(kind),
        ..VolumeEntry::default()
    }
}

fn file(path: &str, contents: &[u8]) -> VolumeEntry {
    entry(path, 0o640, Kind::Contents(contents.into()))
}

fn dir(path: &str) -> VolumeEntry {
    entry(path, 0o2755, Kind::Directory(Empty::default()))
}

fn link(path: &str) -> VolumeEntry {
    entry(path, 0, Kind::Link(format!("..data/{path}")))
}

fn volume(generation: u64, entries: Vec<VolumeEntry>, links: &[&str]) -> DirectoryVolume {
    DirectoryVolume {
        name: "v".into(),
        generation,
        mode: 0o1777,
        uid: nix::unistd::getuid().as_raw(),
        gid: nix::unistd::getgid().as_raw(),
        entries: [vec![dir("")], entries].concat(),
        links: links.iter().map(|path| link(path)).collect(),
        ..DirectoryVolume::default()
    }
}

fn names(path: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn contents_with_their_modes() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("v");
    let binary: Vec<u8> = (0..=255).collect();
    let entries = vec![
        file("key", b"value"),
        dir("sub"),
        file("sub/binary", &binary),
        file("empty", b""),
    ];

    put(&path, &volume(1, entries, &["key", "sub", "empty"])).unwrap();

    assert_eq!(fs::read(path.join("key")).unwrap(), b"value");
    assert_eq!(fs::read(path.join("sub/binary")).unwrap(), binary);
    assert_eq!(fs::read(path.join("empty")).unwrap(), b"");
    let mode = |name: &str| fs::metadata(path.join(name)).unwrap().mode() & 0o7777;
    assert_eq!(
        (mode("key"), mode("sub"), mode("")),
        (0o640, 0o2755, 0o1777)
    );
    assert_eq!(names(&path), ["..1", "..data", "empty", "key", "sub"]);
}

#[test]
fn a_change_replaces_everything() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("v");
    let change = |generation, text: &[u8], keys: [&str; 2]| {
        let files = keys.iter().map(|key| file(key, text)).collect();
        put(&path, &volume(generation, files, &keys)).unwrap();
    };

    change(1, b"1", ["a", "b"]);
    change(2, b"2", ["b", "c"]);

    assert_eq!(names(&path), ["..2", "..data", "b", "c"]);
    assert_eq!(fs::read(path.join("b")).unwrap(), b"2");
    assert_eq!(fs::read(path.join("c")).unwrap(), b"2");

    put(&path, &volume(3, vec![], &[])).unwrap();
    assert_eq!(names(&path), ["..3", "..data"]);
}

/// A file is the old one or the new one, and once one is new, all are.
#[test]
fn readers_see_old_or_new() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("v");
    let generation = |n: u64| {
        let text = n.to_string().into_bytes();
        volume(n, vec![file("a", &text), file("b", &text)], &["a", "b"])
    };
    put(&path, &generation(1)).unwrap();
    let done = AtomicBool::new(false);
    let read = |name: &str| -> u64 {
        loop {
            match fs::read_to_string(path.join(name)) {
                // The directory `..data` led to a moment ago is gone.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                text => return text.unwrap().parse().unwrap(),
            }
        }
    };

    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut last = 0;
            loop {
                let is_last = done.load(Ordering::Acquire);
                let (a, b) = (read("a"), read("b"));
                assert!(last <= a && a <= b, "{last} {a} {b}");
                last = b;
                if is_last {
                    return last;
                }
            }
        });
        for n in 2..500 {
            put(&path, &generation(n)).unwrap();
        }
        done.store(true, Ordering::Release);
        assert_eq!(reader.join().unwrap(), 499);
    });
}

#[test]
fn what_a_failed_change_left_does_not_stop_the_next() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("v");
    put(&path, &volume(1, vec![file("a", b"1")], &["a"])).unwrap();
    let twice = vec![file("a", b"2"), file("a", b"2")];
    assert!(put(&path, &volume(2, twice, &["a"])).is_err());
    assert_eq!(fs::read(path.join("a")).unwrap(), b"1", "still the old");
    symlink("nowhere", path.join(DATA_TMP)).unwrap();

    put(&path, &volume(3, vec![file("a", b"3")], &["a"])).unwrap();

    assert_eq!(fs::read(path.join("a")).unwrap(), b"3");
    assert_eq!(names(&path), ["..3", "..data", "a"]);
}

#[test]
fn nothing_leads_out() {
    let temp = tempfile::tempdir().unwrap();
    let outside = temp.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::set_permissions(&outside, fs::Permissions::from_mode(0o755)).unwrap();
    let to_outside = |path: &str| entry(path, 0, Kind::Link(outside.to_str().unwrap().into()));
    let bad = [
        volume(1, vec![file("../x", b"")], &[]),
        volume(1, vec![file("/x", b"")], &[]),
        volume(1, vec![to_outside("l"), file("l/x", b"")], &[]),
        volume(1, vec![], &["a/b"]),
        volume(1, vec![], &["..data"]),
        volume(1, vec![], &[".."]),
    ];
    for (number, bad) in bad.iter().enumerate() {
        let path = temp.path().join(number.to_string());
        assert!(put(&path, bad).is_err(), "{bad:?}");
    }
    assert!(names(&outside).is_empty());
    assert!(!temp.path().join("x").exists());
}
