use super::*;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::storage::volumes::testing::Writer;

fn contents(volume: &DirectoryVolume) -> Vec<(&str, &[u8])> {
    let of = |entry: &VolumeEntry| match &entry.kind {
        Some(Kind::Contents(contents)) => Some(contents.clone()),
        _ => None,
    };
    volume
        .entries
        .iter()
        .filter(|entry| of(entry).is_some())
        .map(|entry| (entry.path.as_str(), entry.contents()))
        .collect()
}

#[test]
fn files_modes_and_links() {
    let mut writer = Writer::new();
    let binary: Vec<u8> = (0..=255).collect();
    writer.write(&[("b", &binary), ("dir/a", b"1"), ("empty", b"")]);
    let path = writer.path().join("..data/b");
    fs::set_permissions(path, fs::Permissions::from_mode(0o440)).unwrap();
    fs::set_permissions(writer.path(), fs::Permissions::from_mode(0o2770)).unwrap();

    let volume = read(writer.path()).unwrap();

    let expected: [(&str, &[u8]); 3] = [("b", &binary), ("dir/a", b"1"), ("empty", b"")];
    assert_eq!(contents(&volume), expected);
    let paths: Vec<_> = volume.entries.iter().map(|entry| &entry.path).collect();
    assert_eq!(paths, ["", "b", "dir", "dir/a", "empty"]);
    assert_eq!(volume.entries[1].mode, 0o440);
    assert_eq!(volume.mode, 0o2770);
    let links: Vec<_> = volume.links.iter().map(|l| (&*l.path, l.link())).collect();
    let expected = [
        ("b", "..data/b"),
        ("dir", "..data/dir"),
        ("empty", "..data/empty"),
    ];
    assert_eq!(links, expected);
}

#[test]
fn an_empty_volume_is_one() {
    let mut writer = Writer::new();
    writer.write(&[]);
    let volume = read(writer.path()).unwrap();
    assert_eq!((volume.entries.len(), volume.links.len()), (1, 0));
}

/// However often the kubelet replaces it: all files are of one version.
#[test]
fn what_is_read_is_one_version() {
    let mut writer = Writer::new();
    writer.write(&[("a", b"0"), ("b", b"0")]);
    let path = writer.path().to_owned();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            loop {
                let is_last = done.load(Ordering::Acquire);
                match read(&path) {
                    Ok(volume) => {
                        let files = contents(&volume);
                        assert_eq!(files.len(), 2);
                        assert_eq!(files[0].1, files[1].1);
                        if is_last {
                            return files[0].1.to_vec();
                        }
                    }
                    Err(error) => assert!(matches!(error, CopyError::Restless { .. }), "{error}"),
                }
            }
        });
        for n in 0..500 {
            let text = n.to_string();
            writer.write(&[("a", text.as_bytes()), ("b", text.as_bytes())]);
        }
        done.store(true, Ordering::Release);
        assert_eq!(reader.join().unwrap(), b"499");
    });
}

/// A link to a file of the host is a link in the copy too, its target unread.
#[test]
fn links_are_not_followed() {
    let secret = tempfile::NamedTempFile::new().unwrap();
    fs::write(&secret, "host's own").unwrap();
    let mut writer = Writer::new();
    writer.write(&[("key", b"")]);
    let data = fs::read_link(writer.path().join("..data")).unwrap();
    symlink(secret.path(), writer.path().join(&data).join("leak")).unwrap();

    let volume = read(writer.path()).unwrap();

    assert_eq!(contents(&volume), [("key", &b""[..])]);
    let leak = volume.entries.iter().find(|entry| entry.path == "leak");
    assert_eq!(leak.unwrap().link(), secret.path().to_str().unwrap());
}

#[test]
fn a_data_link_out_of_the_volume_is_refused() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("key"), "host's own").unwrap();
    let dir = tempfile::tempdir().unwrap();
    symlink(outside.path(), dir.path().join("..other")).unwrap();
    for target in [outside.path().to_str().unwrap(), "..", "../x", "plain"] {
        symlink(target, dir.path().join(DATA)).unwrap();
        let error = read(dir.path()).unwrap_err();
        assert!(matches!(error, CopyError::Layout { .. }), "{error}");
        fs::remove_file(dir.path().join(DATA)).unwrap();
    }
    // A name of the right kind that is a link itself.
    symlink("..other", dir.path().join(DATA)).unwrap();
    let error = read(dir.path()).unwrap_err();
    assert!(matches!(error, CopyError::Io { .. }), "{error}");
}

#[test]
fn other_layouts_and_too_much_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let message = |result: Result<DirectoryVolume, CopyError>| result.unwrap_err().to_string();
    assert!(message(read(dir.path())).contains("no ..data"));

    let mut writer = Writer::new();
    let half = vec![0; MAX_BYTES / 2];
    writer.write(&[("a", &half)]);
    assert!(read(writer.path()).is_ok());
    writer.write(&[("a", &half), ("b", &half)]);
    let error = message(read(writer.path()));
    assert!(error.contains("more than the 3145728 bytes"), "{error}");

    writer.write(&[]);
    fs::write(writer.path().join("file"), "").unwrap();
    let error = message(read(writer.path()));
    assert!(error.contains("file is no symbolic link"), "{error}");
}
