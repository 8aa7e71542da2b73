//! Driver images: what guests with certain PCI devices have besides the kernel.
//!
//! ```text
//! /modules/modules.load, *.ko   loaded in the order of the list (modules.rs)
//! /lib/firmware/                what the modules ask for by name
//! /cdi/*.json                   what containers with such a device get (cdi.rs)
//! all else                      what the CDI specs name: libraries, programs
//! ```
//!
//! An image is a disk of the machine, mounted read-only when the first of its devices is
//! there: with the machine, or with a container that brings it. Its modules are loaded before
//! the devices' nodes are looked for. It is trusted as the kernel is. What could not be
//! used once is not tried again. `docs/driver-images.md` is for those who make one.

mod cdi;
mod modules;

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use nacre_protocol::agent::{Driver, Storage};
use nacre_protocol::guest::DRIVERS_DIR;
use oci_spec::runtime::{Process, Spec};
use tokio::sync::Mutex;

use self::cdi::CdiSpec;
use crate::error::{Context, Error, Result};
use crate::storage;

/// Where the kernel looks for firmware (Documentation/driver-api/firmware).
const FIRMWARE_DIR: &str = "/lib/firmware";

/// The images of a guest that are in use.
#[derive(Debug, Default)]
pub struct Drivers(Mutex<Vec<Image>>);

/// One image.
#[derive(Debug)]
struct Image {
    /// Of its disk.
    serial: String,
    /// Where it is mounted.
    root: PathBuf,
    /// Or why it cannot be used.
    specs: std::result::Result<Vec<CdiSpec>, String>,
}

/// What driver images do to every process of a container.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct ProcessEdits {
    env: Vec<String>,
    gids: Vec<u32>,
}

impl Drivers {
    /// Mounts images that are not in use yet and loads their modules, one after another.
    ///
    /// # Errors
    ///
    /// `FailedPrecondition`: which image cannot be used, and why.
    pub async fn attach(&self, drivers: &[Driver]) -> Result<()> {
        let mut images = self.0.lock().await;
        for driver in drivers {
            if !images.iter().any(|image| image.serial == driver.serial) {
                let image = Image::attach(images.len(), driver).await;
                images.push(image);
            }
            specs_of(&images, driver)?;
        }
        Ok(())
    }

    /// Adds to a container what those of the images have for it that are for one of its devices.
    /// They were attached.
    ///
    /// # Errors
    ///
    /// `FailedPrecondition`: what an image promises and does not have.
    pub async fn edit(
        &self,
        spec: &mut Spec,
        devices: &[String],
        drivers: &[Driver],
    ) -> Result<ProcessEdits> {
        let images = self.0.lock().await;
        let mut edits = ProcessEdits::default();
        for driver in drivers {
            let numbers = numbers(driver, devices);
            if numbers.is_empty() {
                continue;
            }
            let (root, specs) = specs_of(&images, driver)?;
            for cdi in specs {
                edits
                    .add(spec, cdi, root, &numbers)
                    .map_err(|error| unusable(&driver.path, &error.full()))?;
            }
        }
        if let Some(process) = spec.process_mut() {
            edits.apply(process);
        }
        Ok(edits)
    }
}

/// Where an image is, and its specs.
fn specs_of<'a>(images: &'a [Image], driver: &Driver) -> Result<(&'a Path, &'a [CdiSpec])> {
    let image = images.iter().find(|image| image.serial == driver.serial);
    let image = image.ok_or_else(|| unusable(&driver.path, "it is not mounted"))?;
    match &image.specs {
        Ok(specs) => Ok((image.root.as_path(), specs.as_slice())),
        Err(why) => Err(unusable(&driver.path, why)),
    }
}

/// What CDI specs call those of a container's devices that an image is for.
fn numbers(driver: &Driver, devices: &[String]) -> Vec<String> {
    let numbered = driver.devices.iter().enumerate();
    let its = numbered.filter(|(_, device)| devices.contains(device));
    its.map(|(number, _)| number.to_string()).collect()
}

impl Image {
    async fn attach(index: usize, driver: &Driver) -> Self {
        let root = Path::new(DRIVERS_DIR).join(index.to_string());
        let specs = attach(&root, &driver.serial).await;
        Self {
            serial: driver.serial.clone(),
            root,
            specs: specs.map_err(|error| error.full()),
        }
    }
}

impl ProcessEdits {
    /// Does to a container what a spec has for one with devices of these names.
    fn add(&mut self, spec: &mut Spec, cdi: &CdiSpec, root: &Path, names: &[String]) -> Result<()> {
        for edits in cdi.edits_of(names) {
            edits.apply(spec, root)?;
            self.env.extend_from_slice(&edits.env);
            self.gids.extend_from_slice(&edits.additional_gids);
        }
        Ok(())
    }

    /// Adds them to a process; a variable it has gets the image's value.
    pub fn apply(&self, process: &mut Process) {
        if !self.env.is_empty() {
            let mut env = process.env().clone().unwrap_or_default();
            for line in &self.env {
                let key = |line: &str| line.split('=').next().map(str::to_owned);
                env.retain(|other| key(other) != key(line));
                env.push(line.clone());
            }
            process.set_env(Some(env));
        }
        if !self.gids.is_empty() {
            let mut user = process.user().clone();
            let mut gids = user.additional_gids().clone().unwrap_or_default();
            let more = self.gids.iter().filter(|gid| !gids.contains(gid));
            let more: Vec<_> = more.copied().collect();
            gids.extend(more);
            user.set_additional_gids(Some(gids));
            process.set_user(user);
        }
    }
}

fn unusable(path: &str, why: &str) -> Error {
    Error::FailedPrecondition(format!("driver image {path}: {why}"))
}

async fn attach(root: &Path, serial: &str) -> Result<Vec<CdiSpec>> {
    let mount = Storage {
        source: format!("serial:{serial}"),
        target: root.display().to_string(),
        fstype: "erofs".into(),
        options: ["ro", "nosuid", "nodev"].map(str::to_owned).into(),
        ..Storage::default()
    };
    storage::mount_storage(Path::new(DRIVERS_DIR), mount).await?;
    let root = root.to_owned();
    let load = move || {
        link_firmware(&root, Path::new(FIRMWARE_DIR))?;
        modules::load(&root)?;
        cdi::specs(&root)
    };
    tokio::task::spawn_blocking(load)
        .await
        .map_err(|error| Error::Internal(error.to_string()))?
}

/// Shows an image's firmware, and other images' beside it, where the kernel looks.
fn link_firmware(root: &Path, place: &Path) -> Result<()> {
    for name in names_in(&root.join("lib/firmware")).context("list /lib/firmware")? {
        let target = root.join("lib/firmware").join(&name);
        fs::create_dir_all(place)
            .and_then(|()| symlink(target, place.join(&name)))
            .with_context(|| format!("show the kernel /lib/firmware/{name}"))?;
    }
    Ok(())
}

/// The names in a directory, in order; none if it is not there.
fn names_in(dir: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let name = |entry: io::Result<fs::DirEntry>| {
        let name = entry?.file_name().into_string();
        name.map_err(|name| io::Error::other(format!("{} is not UTF-8", name.display())))
    };
    let mut names: Vec<_> = entries.map(name).collect::<io::Result<_>>()?;
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const FIRST: &str = "0000:01:00.0";
    const SECOND: &str = "0000:02:00.0";
    const OTHER: &str = "0000:03:00.0";
    const SERIAL: &str = "driver0";

    /// An image with a library and a spec.
    fn image(dir: &Path) -> Drivers {
        let spec = json!({
            "cdiVersion": "0.6.0",
            "kind": "vendor.com/gpu",
            "annotations": {"made": "by hand"},
            "devices": [
                {"name": "0", "containerEdits": {"env": ["GPU=zero"]}},
                {"name": "1", "containerEdits": {"env": ["GPU=one"]}},
                {"name": "all", "containerEdits": {"env": ["GPU=all"]}},
            ],
            "containerEdits": {
                "env": ["LIBRARY=new", "LEVEL=3"],
                "additionalGids": [44, 5],
                "mounts": [{"hostPath": "/usr/lib/libgpu.so", "containerPath": "/lib/libgpu.so",
                            "options": ["ro", "nosuid"]}],
                "deviceNodes": [{"path": "/dev/gpuctl", "type": "c", "major": 195, "minor": 255}],
                "hooks": [{"hookName": "startContainer", "path": "/sbin/ldconfig",
                           "args": ["ldconfig"], "timeout": 5}],
            },
        });
        for (name, text) in [
            ("cdi/gpu.json", spec.to_string()),
            ("usr/lib/libgpu.so.1", "library".into()),
        ] {
            fs::create_dir_all(dir.join(name).parent().unwrap()).unwrap();
            fs::write(dir.join(name), text).unwrap();
        }
        symlink("/usr/lib/libgpu.so.1", dir.join("usr/lib/libgpu.so")).unwrap();
        Drivers(Mutex::new(vec![Image {
            serial: SERIAL.into(),
            root: dir.to_owned(),
            specs: Ok(cdi::specs(dir).unwrap()),
        }]))
    }

    /// What it is for.
    fn driver(devices: &[&str]) -> Driver {
        Driver {
            serial: SERIAL.into(),
            path: "/images/gpu.erofs".into(),
            devices: owned(devices),
            ..Driver::default()
        }
    }

    fn owned(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|&text| text.to_owned()).collect()
    }

    fn spec() -> Spec {
        serde_json::from_value(json!({
            "ociVersion": "1.1.0",
            "process": {"cwd": "/", "user": {"uid": 7, "gid": 7, "additionalGids": [5]},
                        "env": ["PATH=/bin", "LIBRARY=old"], "args": ["sh"]},
            "mounts": [],
            "linux": {},
        }))
        .unwrap()
    }

    async fn edited(drivers: &Drivers, devices: &[&str]) -> (Value, ProcessEdits) {
        let mut spec = spec();
        let (devices, of) = (owned(devices), [driver(&[FIRST, SECOND])]);
        let edits = drivers.edit(&mut spec, &devices, &of).await.unwrap();
        (serde_json::to_value(&spec).unwrap(), edits)
    }

    #[tokio::test]
    async fn a_container_with_a_device_gets_what_its_image_has() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        let (spec, edits) = edited(&image(&root), &[OTHER, SECOND]).await;
        let process = &spec["process"];
        assert_eq!(
            process["env"],
            json!(["PATH=/bin", "LIBRARY=new", "LEVEL=3", "GPU=one"])
        );
        assert_eq!(process["user"]["additionalGids"], json!([5, 44]));
        // The link is followed in the image, absolute as it is.
        assert_eq!(
            spec["mounts"],
            json!([{"destination": "/lib/libgpu.so", "type": "bind",
                    "source": root.join("usr/lib/libgpu.so.1"),
                    "options": ["ro", "nosuid", "bind"]}])
        );
        let node = &spec["linux"]["devices"][0];
        assert_eq!(
            (&node["path"], &node["minor"]),
            (&json!("/dev/gpuctl"), &json!(255))
        );
        assert_eq!(
            spec["linux"]["resources"]["devices"],
            json!([{"allow": true, "type": "c", "major": 195, "minor": 255, "access": "rwm"}])
        );
        assert_eq!(
            spec["hooks"]["startContainer"],
            json!([{"path": "/sbin/ldconfig", "args": ["ldconfig"], "timeout": 5}])
        );
        // A process that comes later has the same.
        let mut later = spec_process(&json!({"cwd": "/", "user": {"uid": 7, "gid": 7},
                                             "args": ["sh"], "env": ["GPU=none"]}));
        edits.apply(&mut later);
        let later = serde_json::to_value(&later).unwrap();
        assert_eq!(later["env"], json!(["LIBRARY=new", "LEVEL=3", "GPU=one"]));
        assert_eq!(later["user"]["additionalGids"], json!([44, 5]));
    }

    fn spec_process(process: &Value) -> Process {
        serde_json::from_value(process.clone()).unwrap()
    }

    #[tokio::test]
    async fn containers_without_its_devices_get_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let before = serde_json::to_value(spec()).unwrap();
        let (drivers, devices) = (image(dir.path()), owned(&[OTHER]));
        let mut spec = spec();
        let of_others = [driver(&[FIRST])];
        let edits = drivers.edit(&mut spec, &devices, &of_others).await;
        assert_eq!(edits.unwrap(), ProcessEdits::default());
        assert_eq!(serde_json::to_value(&spec).unwrap(), before);
    }

    /// A device that comes later has the number of one that is gone, or the next.
    #[tokio::test]
    async fn devices_have_the_numbers_of_their_places() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        let drivers = image(&root);
        let own = owned(&[OTHER]);
        for (devices, expected) in [
            (&[FIRST, OTHER][..], Some("GPU=one")),
            (&[OTHER, FIRST][..], Some("GPU=zero")),
            (&["", OTHER][..], Some("GPU=one")),
            (&["", "", OTHER][..], None),
        ] {
            let mut spec = spec();
            let of = [driver(devices)];
            let edits = drivers.edit(&mut spec, &own, &of).await.unwrap();
            let gpu = edits.env.iter().find(|line| line.starts_with("GPU="));
            assert_eq!(gpu.map(String::as_str), expected, "{devices:?}");
        }
    }

    #[tokio::test]
    async fn what_an_image_does_not_have_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let drivers = image(dir.path());
        fs::remove_file(dir.path().join("usr/lib/libgpu.so.1")).unwrap();
        let (devices, of) = (owned(&[FIRST]), [driver(&[FIRST])]);
        let edits = drivers.edit(&mut spec(), &devices, &of).await;
        let text = edits.unwrap_err().full();
        assert!(text.contains("/images/gpu.erofs"), "{text}");
        assert!(text.contains("/usr/lib/libgpu.so: no such file"), "{text}");
    }

    #[tokio::test]
    async fn an_image_that_could_not_be_used_is_not_tried_again() {
        let drivers = Drivers(Mutex::new(vec![Image {
            serial: SERIAL.into(),
            root: PathBuf::new(),
            specs: Err("load /modules/gpu.ko: no".into()),
        }]));
        let error = drivers.attach(&[driver(&[FIRST])]).await.unwrap_err();
        let text = "driver image /images/gpu.erofs: load /modules/gpu.ko: no";
        assert_eq!(error.full(), text);
        assert_eq!(drivers.0.lock().await.len(), 1);
    }

    #[test]
    fn firmware_of_all_images_is_in_one_place() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["0/lib/firmware/one", "1/lib/firmware/two"] {
            fs::create_dir_all(at(name)).unwrap();
            fs::write(at(name).join("blob"), name).unwrap();
        }
        let place = at("firmware");
        link_firmware(&at("none"), &place).unwrap();
        assert!(!place.exists());
        link_firmware(&at("0"), &place).unwrap();
        link_firmware(&at("1"), &place).unwrap();
        let read = |name: &str| fs::read_to_string(place.join(name)).unwrap();
        assert_eq!(read("one/blob"), "0/lib/firmware/one");
        assert_eq!(read("two/blob"), "1/lib/firmware/two");
        let error = link_firmware(&at("1"), &place).unwrap_err().full();
        assert!(error.contains("/lib/firmware/two: file exists"), "{error}");
    }
}
