//! The kubelet's part in a pod's volumes, played.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::run;

/// A pod's directory, as the kubelet lays it out; removed when dropped.
pub struct PodDir {
    path: PathBuf,
    version: u32,
    mounted: Vec<PathBuf>,
}

impl PodDir {
    /// An empty one; `name` is what tells pods apart.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let path = Path::new("/tmp/e2e-kubelet/pods").join(name);
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("/tmp is writable");
        Self {
            path,
            version: 0,
            mounted: Vec::new(),
        }
    }

    /// The path of a volume, made as a directory.
    #[must_use]
    pub fn volume(&self, plugin: &str, name: &str) -> PathBuf {
        let path = self
            .path
            .join("volumes")
            .join(format!("kubernetes.io~{plugin}"))
            .join(name);
        fs::create_dir_all(&path).expect("/tmp is writable");
        path
    }

    /// An emptyDir in memory.
    #[must_use]
    pub fn memory(&mut self, name: &str, options: &str) -> PathBuf {
        let path = self.volume("empty-dir", name);
        self.mount(&["-t", "tmpfs", "-o", options, "tmpfs"], &path);
        path
    }

    /// An emptyDir on a file system of so many MiB, as a quota caps one.
    #[must_use]
    pub fn capped(&mut self, name: &str, mib: u32) -> PathBuf {
        let path = self.volume("empty-dir", name);
        let image = self.path.join(format!("{name}.ext4"));
        let image = image.to_str().expect("paths of tests are UTF-8");
        let size = format!("{mib}m");
        run("mke2fs", &["-q", "-F", "-t", "ext4", image, &size]).exits(0);
        run("modprobe", &["loop"]).exits(0);
        self.mount(&["-o", "loop", image], &path);
        path
    }

    /// A volume for what the kubelet writes to memory: a Secret, a projected volume.
    #[must_use]
    pub fn written_in_memory(&mut self, plugin: &str, name: &str) -> PathBuf {
        let path = self.volume(plugin, name);
        self.mount(&["-t", "tmpfs", "-o", "mode=777", "tmpfs"], &path);
        path
    }

    /// Gives a volume to the pod's `fsGroup`, whose members may read it, or with `rw`
    /// write it too.
    ///
    /// # Panics
    ///
    /// When it cannot be given.
    pub fn give_to(&self, volume: &Path, group: u32, may: &str) {
        let path = volume.display();
        let script = format!(
            "chgrp -hR {group} {path} && find {path} -type f -exec chmod ug+{may} {{}} + && \
             find {path} -type d -exec chmod ug+{may}x,g+s {{}} +"
        );
        run("sh", &["-c", &script]).exits(0);
    }

    /// An emptyDir of huge pages.
    #[must_use]
    pub fn huge_pages(&mut self, name: &str, options: &str) -> PathBuf {
        let path = self.volume("empty-dir", name);
        self.mount(&["-t", "hugetlbfs", "-o", options, "hugetlbfs"], &path);
        path
    }

    /// What the kubelet binds for a `subPath`, of a directory or of a file.
    #[must_use]
    pub fn subpath(&mut self, source: &Path, volume: &str) -> PathBuf {
        let path = self.path.join("volume-subpaths").join(volume).join("c/0");
        let parent = path.parent().expect("it has one");
        fs::create_dir_all(parent).expect("/tmp is writable");
        if source.is_file() {
            fs::write(&path, "").expect("/tmp is writable");
        } else {
            fs::create_dir_all(&path).expect("/tmp is writable");
        }
        let source = source.to_str().expect("paths of tests are UTF-8");
        self.mount(&["--bind", source], &path);
        path
    }

    /// A `/dev/shm`, which containerd makes, in a directory of its own.
    #[must_use]
    pub fn shm(&mut self, options: &str) -> PathBuf {
        let path = self.path.join("sandbox/shm");
        fs::create_dir_all(&path).expect("/tmp is writable");
        self.mount(&["-t", "tmpfs", "-o", options, "shm"], &path);
        path
    }

    fn mount(&mut self, arguments: &[&str], target: &Path) {
        let target_text = target.to_str().expect("paths of tests are UTF-8");
        let arguments = [arguments, &[target_text]].concat();
        run("mount", &arguments).exits(0);
        self.mounted.push(target.to_owned());
    }

    /// A container's termination log.
    #[must_use]
    pub fn termination_log(&self) -> PathBuf {
        let path = self.path.join("containers/c/0a1b2c3d");
        let parent = path.parent().expect("it has one");
        fs::create_dir_all(parent).expect("/tmp is writable");
        fs::write(&path, "").expect("/tmp is writable");
        path
    }

    /// Writes a volume's next version, in the order of the atomic writer.
    pub fn write(&mut self, volume: &Path, files: &[(&str, &str)]) {
        self.try_write(volume, files).expect("/tmp is writable");
    }

    fn try_write(&mut self, volume: &Path, files: &[(&str, &str)]) -> std::io::Result<()> {
        self.version += 1;
        let version = format!("..2026_11_25_00_00_00.{}", self.version);
        fs::create_dir(volume.join(&version))?;
        for (name, contents) in files {
            fs::write(volume.join(&version).join(name), contents)?;
        }
        let data = volume.join("..data");
        let old = fs::read_link(&data).ok();
        symlink(&version, volume.join("..data_tmp"))?;
        fs::rename(volume.join("..data_tmp"), &data)?;
        for (name, _) in files {
            if volume.join(name).symlink_metadata().is_err() {
                symlink(format!("..data/{name}"), volume.join(name))?;
            }
        }
        match old {
            Some(old) => fs::remove_dir_all(volume.join(old)),
            None => Ok(()),
        }
    }
}

impl Drop for PodDir {
    fn drop(&mut self) {
        for target in self.mounted.iter().rev() {
            run(
                "umount",
                &[target.to_str().expect("paths of tests are UTF-8")],
            );
        }
        // What is left is in /tmp: worth no failure.
        let _ = fs::remove_dir_all(&self.path);
    }
}
