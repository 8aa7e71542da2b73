//! The files all containers of a pod have: names of hosts, the pod's name, name
//! servers, shared memory.
//!
//! In its default mode containerd's CRI makes them with the sandbox and mounts them
//! into every container. With `sandboxer = "shim"` it leaves both to the shim: the
//! files are made here, on the host, and mounted into a container's spec, from where
//! they go the way of all mounts. Shared memory is only a path, of which
//! [`super::volumes`] makes memory of the guest.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nacre_protocol::cri::{DNSConfig, PodSandboxConfig};
use oci_spec::runtime::{Mount, Root, Spec};

use super::volumes::{RUNTIME_FILES, is_bind};
use super::{StorageError, host};

const HOSTS: &str = "/etc/hosts";
const RESOLV_CONF: &str = "/etc/resolv.conf";
const SHM: &str = "/dev/shm";
/// Anybody may read them: they are a container's.
const MODE: u32 = 0o644;

/// See the module.
#[derive(Debug)]
pub struct PodFiles {
    dir: PathBuf,
}

impl PodFiles {
    /// Writes those of a pod with `config` into `dir`, as CRI does: what the pod does
    /// not say is as on the host.
    ///
    /// # Errors
    ///
    /// When the host's cannot be read or the pod's not be written.
    pub fn write(dir: PathBuf, config: &PodSandboxConfig) -> Result<Self, StorageError> {
        host::make_dir(&dir)?;
        let files = Self { dir };
        files.put("hostname", format!("{}\n", config.hostname).as_bytes())?;
        files.put("hosts", &of_host(HOSTS)?)?;
        match config.dns_config.as_ref() {
            Some(dns) => files.put("resolv.conf", resolv_conf(dns).as_bytes())?,
            None => files.put("resolv.conf", &of_host(RESOLV_CONF)?)?,
        }
        Ok(files)
    }

    fn put(&self, name: &str, contents: &[u8]) -> Result<(), StorageError> {
        let path = self.dir.join(name);
        let put = || -> io::Result<()> {
            fs::write(&path, contents)?;
            fs::set_permissions(&path, Permissions::from_mode(MODE))
        };
        put().map_err(StorageError::host("write", &path))
    }

    /// Mounts into `spec` what it does not mount itself, as kubelet's own hosts file.
    pub fn mount_into(&self, spec: &mut Spec) {
        let root = spec.root().as_ref();
        let read_only = root.and_then(Root::readonly).unwrap_or(false);
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for destination in RUNTIME_FILES.map(Path::new) {
            let is_there = mounts.iter().any(|own| own.destination() == destination);
            let name = destination.file_name().unwrap_or_default();
            if !is_there {
                mounts.push(bind(self.dir.join(name), destination, read_only));
            }
        }
        let shm = Path::new(SHM);
        let own_shm = mounts
            .iter_mut()
            .find(|mount| mount.destination() == shm && !is_bind(mount));
        if let Some(own) = own_shm {
            *own = bind(self.dir.join("shm"), shm, false);
        }
        spec.set_mounts(Some(mounts));
    }
}

fn of_host(path: &str) -> Result<Vec<u8>, StorageError> {
    fs::read(path).map_err(StorageError::host("read", Path::new(path)))
}

fn bind(source: PathBuf, destination: &Path, read_only: bool) -> Mount {
    let access = if read_only { "ro" } else { "rw" };
    let options = ["rbind", "rprivate", access].map(str::to_owned);
    let mut mount = Mount::default();
    mount
        .set_typ(Some("bind".into()))
        .set_source(Some(source))
        .set_destination(destination.to_owned())
        .set_options(Some(options.to_vec()));
    mount
}

/// resolv.conf(5).
fn resolv_conf(dns: &DNSConfig) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text += &format!("search {}\n", dns.searches.join(" "));
    }
    for server in &dns.servers {
        text += &format!("nameserver {server}\n");
    }
    if !dns.options.is_empty() {
        text += &format!("options {}\n", dns.options.join(" "));
    }
    text
}

#[cfg(test)]
mod tests {
    use protobuf::MessageField;
    use serde_json::json;

    use super::*;

    fn config() -> PodSandboxConfig {
        PodSandboxConfig {
            hostname: "web".into(),
            dns_config: MessageField::some(DNSConfig {
                servers: vec!["192.0.2.1".into(), "192.0.2.2".into()],
                searches: vec!["a.local".into(), "b.local".into()],
                options: vec!["ndots:5".into()],
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn files_say_what_the_pod_says() {
        let dir = tempfile::tempdir().unwrap();
        let read = |name: &str| fs::read_to_string(dir.path().join("etc").join(name)).unwrap();
        let write = |config: &PodSandboxConfig| {
            PodFiles::write(dir.path().join("etc"), config).unwrap();
        };
        write(&config());
        assert_eq!(read("hostname"), "web\n");
        assert_eq!(read("hosts"), fs::read_to_string("/etc/hosts").unwrap());
        assert_eq!(
            read("resolv.conf"),
            "search a.local b.local\nnameserver 192.0.2.1\nnameserver 192.0.2.2\n\
             options ndots:5\n"
        );
        let metadata = fs::metadata(dir.path().join("etc/hosts")).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o7777, 0o644);

        let mut silent = config();
        silent.dns_config = MessageField::some(DNSConfig::default());
        write(&silent);
        assert_eq!(read("resolv.conf"), "", "none is not the host's");
        silent.dns_config = MessageField::none();
        write(&silent);
        let host = fs::read_to_string("/etc/resolv.conf").unwrap();
        assert_eq!(read("resolv.conf"), host);
    }

    #[test]
    fn containers_get_what_they_do_not_bring() {
        let dir = tempfile::tempdir().unwrap();
        let files = PodFiles::write(dir.path().to_owned(), &config()).unwrap();
        let mounted = |root: serde_json::Value, mounts: serde_json::Value| {
            let spec = json!({"ociVersion": "1.0.2", "root": root, "mounts": mounts});
            let mut spec: Spec = serde_json::from_value(spec).unwrap();
            files.mount_into(&mut spec);
            let mounts = spec.mounts().clone().unwrap().into_iter();
            mounts
                .map(|mount| {
                    let source = mount.source().clone().unwrap();
                    let place = source.strip_prefix(dir.path()).unwrap_or(&source);
                    let options = mount.options().clone().unwrap_or_default();
                    let mode = options.last().cloned().unwrap_or_default();
                    let to = mount.destination().display();
                    format!("{} {to} {mode}", place.display())
                })
                .collect::<Vec<_>>()
        };
        let shm = json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm"});
        assert_eq!(
            mounted(json!({"path": "rootfs"}), json!([shm])),
            [
                "shm /dev/shm rw",
                "hosts /etc/hosts rw",
                "hostname /etc/hostname rw",
                "resolv.conf /etc/resolv.conf rw",
            ]
        );
        let brought = |path: &str| json!({"destination": path, "type": "bind", "source": "/own"});
        assert_eq!(
            mounted(
                json!({"path": "rootfs", "readonly": true}),
                json!([brought("/dev/shm"), brought("/etc/hosts")])
            ),
            [
                "/own /dev/shm ",
                "/own /etc/hosts ",
                "hostname /etc/hostname ro",
                "resolv.conf /etc/resolv.conf ro",
            ]
        );
        let without = mounted(json!({"path": "rootfs"}), json!([]));
        assert_eq!(without.len(), 3, "no /dev/shm where there is none");
    }
}
