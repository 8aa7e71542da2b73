//! Specs at the limits of what a client may ask for, and beyond them.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nacre_tests::{Changed, Scene, Shim, run};
use serde_json::{Value, json};

use crate::host::{pid_of, status_of};

fn with_script(spec: &mut Value, script: &str) {
    spec["process"]["args"] = json!(["sh", "-c", script]);
}

#[test]
fn environment_of_64_kib() {
    let mut scene = Scene::new();
    let said = scene.run_spec(|spec| {
        let long = format!("LONG={}", "x".repeat(64 << 10));
        let many = (0..1000).map(|n| format!("VARIABLE_{n}={n}"));
        let path = "PATH=/bin".to_owned();
        let env: Vec<String> = [path, long].into_iter().chain(many).collect();
        spec["process"]["env"] = json!(env);
        with_script(spec, "echo ${#LONG} $VARIABLE_0 $VARIABLE_999");
    });
    said.exits(0).prints("65536 0 999\n");
}

#[test]
fn a_thousand_mounts() {
    let mut scene = Scene::new();
    let source = "/tmp/e2e-mounted";
    fs::create_dir_all(source).unwrap();
    fs::write(format!("{source}/file"), "there").unwrap();
    let said = scene.run_spec(|spec| {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.extend((0..500).flat_map(|n| {
            [
                json!({"destination": format!("/tmp/t{n}"), "type": "tmpfs", "source": "tmpfs"}),
                json!({"destination": format!("/tmp/b{n}"), "type": "bind", "source": source,
                       "options": ["rbind", "ro"]}),
            ]
        }));
        mounts.insert(
            0,
            json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}),
        );
        with_script(
            spec,
            "grep -c ' /tmp/' /proc/self/mounts; cat /tmp/b499/file",
        );
    });
    said.exits(0).prints("1000\nthere");
    fs::remove_dir_all(source).unwrap();
}

/// Every byte a path may have that JSON can carry, and beyond ASCII; of a mount, the
/// working directory and an argument. Bytes that JSON cannot carry are in a directory.
#[test]
fn paths_of_any_characters() {
    let mut scene = Scene::new();
    let odd: String = (1..128u8).map(char::from).filter(|c| *c != '/').collect();
    let name = format!("{odd}ü€\u{1f41a}");
    let directory = Path::new("/tmp").join(&name);
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("file"), "found").unwrap();
    let bytes = |bytes: &[u8]| directory.join(OsStr::from_bytes(bytes));
    fs::write(bytes(b"\xff\xfe"), " too ").unwrap();
    let said = scene.run_spec(|spec| {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}));
        mounts.push(json!({
            "destination": format!("/tmp/to {name}"), "type": "bind",
            "source": directory.to_str().unwrap(), "options": ["rbind", "rw"],
        }));
        spec["process"]["cwd"] = json!(format!("/tmp/to {name}"));
        let script = r#"cat file "$(printf '\377\376')"; printf %s "$0";
            echo new > "$(printf '\377\375')""#;
        spec["process"]["args"] = json!(["sh", "-c", script, name]);
    });
    said.exits(0).prints(&format!("found too {name}"));
    let new = fs::read_to_string(bytes(b"\xff\xfd")).unwrap();
    assert_eq!(new, "new\n");
    fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn specs_without_process_or_root_are_refused() {
    for (missing, complaint) in [
        ("process", "the specification has no process"),
        ("root", "neither rootfs mounts nor a root path"),
    ] {
        let mut scene = Scene::new();
        let said = scene.run_spec(|spec| {
            spec.as_object_mut().unwrap().remove(missing);
        });
        said.exits(1).complains(&[complaint]);
    }
}

/// The directory the pod is in is found by what was written then.
#[test]
fn configuration_that_changes_before_the_delete() {
    let mut scene = Scene::new();
    let id = scene.start_sleeper(&[]);
    let shim = status_of(&pid_of(&scene, &id))["PPid"].clone();
    let config = Changed::new("run_dir", "\"/run/nacre-elsewhere\"");
    run("kill", &["-9", &shim]).exits(0);
    nacre_tests::eventually("containerd has noticed", || {
        scene.status(&id).is_none_or(|status| status == "STOPPED")
    });
    scene.ctr(&["task", "rm", "-f", &id]);
    drop(config);
    assert!(!Path::new("/run/nacre-elsewhere").exists());
}

/// The rest of the pod is unharmed by a request that makes no sense.
#[test]
fn update_that_is_no_resources() {
    let mut scene = Scene::new();
    let id = scene.start_sleeper(&[]);
    let shim = Shim::of(&id);
    for nonsense in [json!("x"), json!({"memory": {"limit": "much"}}), json!([1])] {
        let error = shim.update(&nonsense).unwrap_err();
        assert!(error.to_string().contains("resources"), "{error}");
    }
    scene.exec(&id, &[], &["true"]).exits(0);
}
