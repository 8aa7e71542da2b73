//! Images of as many layers as containerd takes, made here: each layer is one small
//! file, and the lowest busybox.

use std::fs;

use nacre_tests::{Said, Scene, run};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// What containerd's clients can have: an overlay of Linux takes 500 lower layers,
/// and to read a container's /etc/group they stack its upper layer on the others.
const MOST: usize = 499;

/// A tar archive (POSIX.1-1988 ustar) of plain files.
#[derive(Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn add(&mut self, name: &str, mode: u32, contents: &[u8]) {
        let mut header = [0; 512];
        let mut put = |at: usize, text: &str| {
            header[at..at + text.len()].copy_from_slice(text.as_bytes());
        };
        put(0, name);
        put(100, &format!("{mode:07o}"));
        put(108, "0000000");
        put(116, "0000000");
        put(124, &format!("{:011o}", contents.len()));
        put(136, "00000000000");
        // The checksum counts its own field as spaces.
        put(148, "        ");
        put(156, "0");
        put(257, "ustar");
        put(263, "00");
        let sum: u32 = header.iter().copied().map(u32::from).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        self.0.extend(header);
        self.0.extend(contents);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

/// An OCI image layout in a tar.
#[derive(Default)]
struct Archive(Tar);

impl Archive {
    /// Adds a blob and returns its descriptor.
    fn blob(&mut self, kind: &str, bytes: &[u8]) -> Value {
        let digest = Sha256::digest(bytes);
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        self.0.add(&format!("blobs/sha256/{hex}"), 0o644, bytes);
        let media_type = format!("application/vnd.oci.image.{kind}");
        json!({"mediaType": media_type, "digest": format!("sha256:{hex}"), "size": bytes.len()})
    }

    fn json(&mut self, kind: &str, value: &Value) -> Value {
        self.blob(kind, value.to_string().as_bytes())
    }

    /// An image's manifest, as the index names it.
    fn manifest(&mut self, layers: &[Value]) -> Value {
        let diff_ids: Vec<&Value> = layers.iter().map(|layer| &layer["digest"]).collect();
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": {"Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = self.json("config.v1+json", &config);
        let manifest = json!({"schemaVersion": 2, "config": config, "layers": layers});
        let mut manifest = self.json("manifest.v1+json", &manifest);
        manifest["annotations"] = json!({"io.containerd.image.name": name(layers.len())});
        manifest["platform"] = json!({"architecture": "amd64", "os": "linux"});
        manifest
    }
}

fn name(layers: usize) -> String {
    format!("docker.io/library/layers-{layers}:latest")
}

fn layer(number: usize) -> Vec<u8> {
    let mut tar = Tar::default();
    if number == 1 {
        tar.add("bin/busybox", 0o755, &fs::read("/bin/busybox").unwrap());
    }
    let text = format!("of layer {number}\n");
    tar.add(&format!("layers/{number}"), 0o644, text.as_bytes());
    tar.finish()
}

/// An archive for `ctr image import`: images of the first so many of the same layers.
fn images(counts: &[usize]) -> Vec<u8> {
    let mut archive = Archive::default();
    let most = counts.iter().max().copied().unwrap_or_default();
    let layers: Vec<Value> = (1..=most)
        .map(|number| archive.blob("layer.v1.tar", &layer(number)))
        .collect();
    let manifests: Vec<Value> = counts
        .iter()
        .map(|count| archive.manifest(&layers[..*count]))
        .collect();
    let index = json!({"schemaVersion": 2, "manifests": manifests});
    let mut tar = archive.0;
    let layout = br#"{"imageLayoutVersion":"1.0.0"}"#;
    tar.add("oci-layout", 0o644, layout);
    tar.add("index.json", 0o644, index.to_string().as_bytes());
    tar.finish()
}

/// Images in containerd, until this is dropped.
struct Images(Vec<String>);

impl Images {
    fn import(counts: &[usize], snapshotter: &str) -> Self {
        let path = "/tmp/e2e-layers.tar";
        fs::write(path, images(counts)).unwrap();
        let import = ["image", "import", "--snapshotter", snapshotter, path];
        run("ctr", &import).exits(0);
        fs::remove_file(path).unwrap();
        Self(counts.iter().copied().map(name).collect())
    }
}

impl Drop for Images {
    fn drop(&mut self) {
        for name in &self.0 {
            run("ctr", &["image", "rm", "--sync", name]);
        }
    }
}

fn run_image(layers: usize, snapshotter: &str, script: &str) -> Said {
    let mut scene = Scene::new();
    let options = ["--snapshotter", snapshotter];
    let command = ["/bin/busybox", "sh", "-c", script];
    scene.run_image(&name(layers), &options, &command)
}

/// Every layer is there.
fn all_layers_are_there(snapshotter: &str) {
    let script = "cd /layers; echo * | busybox wc -w; busybox cat 1 256 499; \
                  echo written > 499 && busybox cat 499";
    run_image(MOST, snapshotter, script)
        .exits(0)
        .prints("499\nof layer 1\nof layer 256\nof layer 499\nwritten\n");
}

/// On the host's side of a share. Of one more containerd's client says so before
/// nacre is asked, which refuses more than 500.
#[test]
fn image_of_499_layers_on_overlayfs() {
    let _images = Images::import(&[MOST, MOST + 1], "overlayfs");
    all_layers_are_there("overlayfs");
    run_image(MOST + 1, "overlayfs", "true")
        .exits(1)
        .complains(&["invalid argument"]);
}

/// On disks.
#[test]
fn image_of_499_layers_on_erofs() {
    let _images = Images::import(&[MOST], "erofs");
    all_layers_are_there("erofs");
}
