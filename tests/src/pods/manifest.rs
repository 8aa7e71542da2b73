//! A pod before it is made.

use std::fs;
use std::time::Duration;

use tonic::Status;

use super::{CGROUP_ROOT, Pod, PodScene, unique};
use crate::cri::messages::*;
use crate::cri::owned;

/// What kubelet would make of a pod's manifest. One container's PID namespace is
/// its own unless said otherwise, as in Kubernetes.
#[derive(Clone)]
pub struct PodManifest<'s> {
    scene: &'s PodScene,
    handler: &'static str,
    limit: Duration,
    config: PodSandboxConfig,
}

impl<'s> PodManifest<'s> {
    pub(super) fn new(scene: &'s PodScene, name: &str) -> Self {
        let uid = format!("{name}-{}", unique());
        let namespaces = NamespaceOption {
            pid: NamespaceMode::Container.into(),
            ..Default::default()
        };
        let linux = LinuxPodSandboxConfig {
            cgroup_parent: scene.cgroup(&uid),
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces),
                ..Default::default()
            }),
            ..Default::default()
        };
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: uid.clone(),
                uid: uid.clone(),
                namespace: "default".into(),
                attempt: 0,
            }),
            hostname: name.into(),
            log_directory: scene.directory("logs").display().to_string(),
            linux: Some(linux),
            ..Default::default()
        };
        Self {
            scene,
            handler: scene.handler,
            limit: scene.cri().limit(),
            config,
        }
    }

    /// With another runtime.
    #[must_use]
    pub fn runtime(mut self, handler: &'static str) -> Self {
        self.handler = handler;
        self
    }

    /// With a cgroup of kubelet's systemd driver.
    #[must_use]
    pub fn in_slice(mut self) -> Self {
        let uid = self.uid();
        self.linux().cgroup_parent = self.scene.slice(&uid);
        self
    }

    /// Made within so much time, or not at all as far as this client knows.
    #[must_use]
    pub fn within(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Its uid, which is its name too.
    #[must_use]
    pub fn uid(&self) -> String {
        let metadata = self.config.metadata.as_ref();
        metadata.map_or_else(String::new, |metadata| metadata.uid.clone())
    }

    fn linux(&mut self) -> &mut LinuxPodSandboxConfig {
        self.config.linux.get_or_insert_default()
    }

    fn security(&mut self) -> &mut LinuxSandboxSecurityContext {
        self.linux().security_context.get_or_insert_default()
    }

    /// With these namespaces shared or the host's.
    #[must_use]
    pub fn namespaces(mut self, change: impl FnOnce(&mut NamespaceOption)) -> Self {
        change(self.security().namespace_options.get_or_insert_default());
        self
    }

    /// `shareProcessNamespace: true`.
    #[must_use]
    pub fn shared_pids(self) -> Self {
        self.namespaces(|options| options.pid = NamespaceMode::Pod.into())
    }

    /// `hostUsers: false`, with its users from `first` on of the host's.
    #[must_use]
    pub fn own_users(self, first: u32) -> Self {
        let ids = vec![IdMapping {
            host_id: first,
            container_id: 0,
            length: 65536,
        }];
        self.namespaces(|options| {
            options.userns_options = Some(UserNamespace {
                mode: NamespaceMode::Pod.into(),
                uids: ids.clone(),
                gids: ids,
            });
        })
    }

    /// With a privileged container among its own.
    #[must_use]
    pub fn privileged(mut self) -> Self {
        self.security().privileged = true;
        self
    }

    /// With an annotation.
    #[must_use]
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.config.annotations.insert(key.into(), value.into());
        self
    }

    /// With a kernel parameter.
    #[must_use]
    pub fn sysctl(mut self, name: &str, value: &str) -> Self {
        self.linux().sysctls.insert(name.into(), value.into());
        self
    }

    /// What its containers may use together, as kubelet tells it.
    #[must_use]
    pub fn limits(mut self, memory_mib: i64, cpus: i64) -> Self {
        self.linux().resources = Some(LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: cpus * 100_000,
            memory_limit_in_bytes: memory_mib << 20,
            ..Default::default()
        });
        self
    }

    /// With a limit of the pod's cgroup, which kubelet sets to its containers' limits and
    /// the overhead of its class.
    ///
    /// # Panics
    ///
    /// When the group does not take it.
    #[must_use]
    pub fn cgroup_limit(mut self, memory_mib: u64) -> Self {
        let file = format!("{CGROUP_ROOT}{}/memory.max", self.linux().cgroup_parent);
        let bytes = memory_mib << 20;
        fs::write(&file, bytes.to_string()).unwrap_or_else(|error| panic!("{file}: {error}"));
        self
    }

    /// With a port of the host led to one of its own.
    #[must_use]
    pub fn host_port(mut self, host_port: u16, container_port: u16) -> Self {
        self.config.port_mappings.push(PortMapping {
            protocol: Protocol::Tcp.into(),
            container_port: container_port.into(),
            host_port: host_port.into(),
        });
        self
    }

    /// With name servers of its own.
    #[must_use]
    pub fn dns(mut self, servers: &[&str], searches: &[&str], options: &[&str]) -> Self {
        self.config.dns_config = Some(DnsConfig {
            servers: owned(servers),
            searches: owned(searches),
            options: owned(options),
        });
        self
    }

    /// Makes the sandbox.
    ///
    /// # Errors
    ///
    /// containerd's.
    pub fn try_run(self) -> Result<Pod<'s>, Status> {
        fs::create_dir_all(&self.config.log_directory).expect("a directory can be made");
        let cri = self.scene.cri().within(self.limit);
        let id = cri.run_pod(&self.config, self.handler)?;
        self.scene.note_pod(&id);
        Ok(Pod {
            scene: self.scene,
            id,
            config: self.config,
        })
    }

    /// Makes the sandbox.
    ///
    /// # Panics
    ///
    /// When containerd does not.
    #[must_use]
    #[track_caller]
    pub fn run(self) -> Pod<'s> {
        self.try_run()
            .unwrap_or_else(|error| panic!("run the pod: {error}"))
    }
}
