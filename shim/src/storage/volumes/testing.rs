//! Writes volumes as the kubelet does.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// A ConfigMap, in the kubelet's place for one.
pub struct Writer {
    path: PathBuf,
    version: u32,
    _kubelet: tempfile::TempDir,
}

impl Writer {
    /// A volume that was never written.
    pub fn new() -> Self {
        let kubelet = tempfile::tempdir().unwrap();
        let path = kubelet
            .path()
            .join("pods/1-2/volumes/kubernetes.io~configmap/config");
        fs::create_dir_all(&path).unwrap();
        Self {
            path,
            version: 0,
            _kubelet: kubelet,
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A further version, in the order of the kubelet's atomic writer.
    pub fn write(&mut self, files: &[(&str, &[u8])]) {
        self.version += 1;
        let version = format!("..2026_11_25_00_00_00.{}", self.version);
        let dir = self.path.join(&version);
        fs::create_dir(&dir).unwrap();
        for (name, contents) in files {
            let file = dir.join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, contents).unwrap();
        }
        let data = self.path.join("..data");
        let old = fs::read_link(&data).ok();
        symlink(&version, self.path.join("..data_tmp")).unwrap();
        fs::rename(self.path.join("..data_tmp"), &data).unwrap();
        self.link(files);
        if let Some(old) = old {
            fs::remove_dir_all(self.path.join(old)).unwrap();
        }
    }

    fn link(&self, files: &[(&str, &[u8])]) {
        let tops: Vec<&str> = files
            .iter()
            .map(|(name, _)| name.split('/').next().unwrap())
            .collect();
        for name in &tops {
            let link = self.path.join(name);
            if link.symlink_metadata().is_err() {
                symlink(format!("..data/{name}"), link).unwrap();
            }
        }
        for entry in fs::read_dir(&self.path).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if !name.starts_with("..") && !tops.contains(&name.as_str()) {
                fs::remove_file(self.path.join(name)).unwrap();
            }
        }
    }
}
