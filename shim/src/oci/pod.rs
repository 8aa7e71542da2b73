//! The spec of a pod's sandbox container, where nobody else writes it.
//!
//! In its default mode containerd's CRI makes a container for each pod's sandbox.
//! With `sandboxer = "shim"` it hands over the pod's configuration instead, and
//! this makes of it what CRI would have made, as far as a machine has a use for it.
//! From there on both modes are one.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use nacre_protocol::cri::{NamespaceMode, NamespaceOption, PodSandboxConfig};
use nacre_protocol::idmap::IdMaps;
use oci_spec::runtime::{Linux, LinuxNamespace, LinuxNamespaceType, Spec};
use protobuf::EnumOrUnknown;

use super::kubernetes::{
    self, CONTAINER_TYPE, SANDBOX, SANDBOX_CPU_PERIOD, SANDBOX_CPU_QUOTA, SANDBOX_ID,
    SANDBOX_MEMORY, SANDBOX_NAME, SANDBOX_NAMESPACE, SANDBOX_UID,
};

/// Kernel parameters of a pod that names no others for them: the defaults of
/// containerd 2 (`enable_unprivileged_ports`, `enable_unprivileged_icmp`).
const SYSCTLS: [(&str, &str); 2] = [
    ("net.ipv4.ip_unprivileged_port_start", "0"),
    ("net.ipv4.ping_group_range", "0 2147483647"),
];
/// The prefix of CRI's scopes below a slice of systemd's.
const SCOPE_PREFIX: &str = "cri-containerd";

/// The spec of the sandbox container of a pod with `config` in a namespace of
/// containerd's.
pub fn sandbox_spec(
    request: &CreateSandboxRequest,
    config: &PodSandboxConfig,
    namespace: &str,
) -> Spec {
    let pod = config.linux.get_or_default();
    let options = pod.security_context.get_or_default();
    let namespaces = namespaces(
        &request.netns_path,
        options.namespace_options.get_or_default(),
    );
    let mut sysctls = default_sysctls();
    sysctls.extend(pod.sysctls.clone());
    let cgroups_path = cgroups_path(&pod.cgroup_parent, namespace, &request.sandbox_id);
    let mut linux = Linux::default();
    linux
        .set_namespaces(Some(namespaces))
        .set_sysctl(Some(sysctls))
        .set_cgroups_path(Some(cgroups_path))
        .set_resources(None);
    let mut spec = Spec::default();
    spec.set_process(None)
        .set_root(None)
        .set_mounts(None)
        .set_hostname(Some(config.hostname.clone()))
        .set_annotations(Some(annotations(request, config)))
        .set_linux(Some(linux));
    spec
}

/// The kernel parameters of the machine whose first container has this spec: a pod's
/// are its machine's. Nobody with users of its own has rights to the machine's network,
/// so what takes them elsewhere is open to everyone then. containerd itself leaves
/// `ping_group_range` alone for such a pod, as its groups are not the host's.
pub fn sysctls(spec: &Spec) -> HashMap<String, String> {
    let linux = spec.linux().as_ref();
    let own = linux
        .and_then(|linux| linux.sysctl().clone())
        .unwrap_or_default();
    let mut sysctls = match IdMaps::of_spec(spec) {
        Some(_) => default_sysctls(),
        None => HashMap::new(),
    };
    if kubernetes::is_sandbox(spec) {
        sysctls.extend(own);
    }
    sysctls
}

fn default_sysctls() -> HashMap<String, String> {
    let owned = SYSCTLS.map(|(name, value)| (name.to_owned(), value.to_owned()));
    HashMap::from(owned)
}

/// Those of the host are left out, as CRI does.
fn namespaces(netns_path: &str, options: &NamespaceOption) -> Vec<LinuxNamespace> {
    let is_own = |mode: EnumOrUnknown<NamespaceMode>| mode != NamespaceMode::NODE.into();
    let namespace = |kind| {
        let mut namespace = LinuxNamespace::default();
        namespace.set_typ(kind);
        namespace
    };
    let mut namespaces = vec![
        namespace(LinuxNamespaceType::Mount),
        namespace(LinuxNamespaceType::Uts),
    ];
    if is_own(options.network) {
        let mut network = namespace(LinuxNamespaceType::Network);
        network.set_path((!netns_path.is_empty()).then(|| PathBuf::from(netns_path)));
        namespaces.push(network);
    }
    if is_own(options.pid) {
        namespaces.push(namespace(LinuxNamespaceType::Pid));
    }
    if is_own(options.ipc) {
        namespaces.push(namespace(LinuxNamespaceType::Ipc));
    }
    let users = options.userns_options.as_ref();
    if users.is_some_and(|users| is_own(users.mode)) {
        namespaces.push(namespace(LinuxNamespaceType::User));
    }
    namespaces
}

/// The pod's cgroup below its parent, in the one of [`crate::cgroup`]'s spellings
/// that the parent has; without a parent where containerd has all its containers that
/// nobody has a place for, CRI's pods among them.
fn cgroups_path(parent: &str, namespace: &str, sandbox_id: &str) -> PathBuf {
    if parent.is_empty() {
        return Path::new("/").join(namespace).join(sandbox_id);
    }
    let parent = Path::new(parent);
    let slice = parent.file_name().and_then(|name| name.to_str());
    match slice.filter(|name| name.ends_with(".slice")) {
        Some(slice) => format!("{slice}:{SCOPE_PREFIX}:{sandbox_id}").into(),
        None => parent.join(sandbox_id),
    }
}

/// Whatever the caller says of the pod's size counts if its configuration has none.
fn annotations(
    request: &CreateSandboxRequest,
    config: &PodSandboxConfig,
) -> HashMap<String, String> {
    let metadata = config.metadata.get_or_default();
    let mut annotations = request.annotations.clone();
    let mut set = |name: &str, value: &str| annotations.insert(name.into(), value.into());
    set(CONTAINER_TYPE, SANDBOX);
    set(SANDBOX_ID, &request.sandbox_id);
    set(SANDBOX_NAME, &metadata.name);
    set(SANDBOX_NAMESPACE, &metadata.namespace);
    set(SANDBOX_UID, &metadata.uid);
    if let Some(resources) = config.linux.get_or_default().resources.as_ref() {
        set(SANDBOX_CPU_PERIOD, &resources.cpu_period.to_string());
        set(SANDBOX_CPU_QUOTA, &resources.cpu_quota.to_string());
        set(SANDBOX_MEMORY, &resources.memory_limit_in_bytes.to_string());
    }
    annotations
}

#[cfg(test)]
mod tests {
    use nacre_protocol::cri::{
        LinuxContainerResources, LinuxPodSandboxConfig, LinuxSandboxSecurityContext,
        PodSandboxMetadata, UserNamespace,
    };
    use protobuf::{Message, MessageField};

    use super::super::kubernetes;
    use super::*;

    /// CRI's.
    const NAMESPACE: &str = "k8s.io";

    fn request() -> CreateSandboxRequest {
        CreateSandboxRequest {
            sandbox_id: "id".into(),
            netns_path: "/run/netns/pod".into(),
            ..Default::default()
        }
    }

    fn config_with(options: NamespaceOption) -> PodSandboxConfig {
        let security_context = LinuxSandboxSecurityContext {
            namespace_options: MessageField::some(options),
            ..Default::default()
        };
        let linux = LinuxPodSandboxConfig {
            security_context: MessageField::some(security_context),
            ..Default::default()
        };
        PodSandboxConfig {
            linux: MessageField::some(linux),
            ..Default::default()
        }
    }

    fn kinds(options: NamespaceOption) -> Vec<LinuxNamespaceType> {
        let spec = sandbox_spec(&request(), &config_with(options), NAMESPACE);
        let namespaces = super::super::namespaces(&spec).iter();
        namespaces.map(LinuxNamespace::typ).collect()
    }

    #[test]
    fn pod_is_as_cri_would_have_it() {
        let mut config = config_with(NamespaceOption::default());
        config.hostname = "web".into();
        config.metadata = MessageField::some(PodSandboxMetadata {
            name: "web-1".into(),
            namespace: "shop".into(),
            uid: "0f".into(),
            ..Default::default()
        });
        let linux = config.linux.mut_or_insert_default();
        linux.cgroup_parent = "/kubepods/pod0f".into();
        linux.sysctls = HashMap::from([
            ("kernel.shm_rmid_forced".into(), "1".into()),
            (
                "net.ipv4.ip_unprivileged_port_start".into(),
                "1024".to_owned(),
            ),
        ]);
        let spec = sandbox_spec(&request(), &config, NAMESPACE);
        assert!(kubernetes::is_sandbox(&spec));
        assert_eq!(spec.hostname().as_deref(), Some("web"));
        let annotations = spec.annotations().clone().unwrap();
        assert_eq!(annotations[SANDBOX_ID], "id");
        assert_eq!(annotations[SANDBOX_NAME], "web-1");
        assert_eq!(annotations[SANDBOX_NAMESPACE], "shop");
        assert_eq!(annotations[SANDBOX_UID], "0f");
        let linux = spec.linux().clone().unwrap();
        let path = linux.cgroups_path().clone().unwrap();
        assert_eq!(path, Path::new("/kubepods/pod0f/id"));
        let sysctls = linux.sysctl().clone().unwrap();
        assert_eq!(sysctls["kernel.shm_rmid_forced"], "1");
        assert_eq!(sysctls["net.ipv4.ip_unprivileged_port_start"], "1024");
        assert_eq!(sysctls["net.ipv4.ping_group_range"], "0 2147483647");
        let network = super::super::namespaces(&spec).iter();
        let paths: Vec<_> = network.filter_map(|n| n.path().clone()).collect();
        assert_eq!(paths, [Path::new("/run/netns/pod")]);
    }

    /// They come past the list of those that the administrator lets through, and what
    /// is in a spec's annotations has a meaning.
    #[test]
    fn annotations_of_the_pod_are_nobody_s() {
        // Field 7 (`map<string, string> annotations`) with the entry "k": "v".
        let bytes = [0x3a, 6, 0x0a, 1, b'k', 0x12, 1, b'v'];
        let config = PodSandboxConfig::parse_from_bytes(&bytes).unwrap();
        let spec = sandbox_spec(&request(), &config, NAMESPACE);
        assert_eq!(spec.annotations().as_ref().unwrap().get("k"), None);
    }

    #[test]
    fn users_of_a_pod_s_own_may_bind_low_ports_and_ping() {
        let spec = |namespaces, sysctl, annotations| -> Spec {
            let linux = serde_json::json!({"namespaces": namespaces, "sysctl": sysctl});
            let spec = serde_json::json!({
                "ociVersion": "1.2.0", "linux": linux, "annotations": annotations,
            });
            serde_json::from_value(spec).unwrap()
        };
        let users = || serde_json::json!([{"type": "network"}, {"type": "user"}]);
        let none = || serde_json::json!([{"type": "network"}]);
        let own = || serde_json::json!({"net.ipv4.ip_unprivileged_port_start": "1024"});
        let pod = || serde_json::json!({"io.kubernetes.cri.container-type": "sandbox"});
        let empty = || serde_json::json!({});
        let of = |spec: Spec| {
            let sysctls = sysctls(&spec);
            SYSCTLS.map(|(name, _)| sysctls.get(name).cloned().unwrap_or_default())
        };
        let range = "0 2147483647";
        assert_eq!(of(spec(users(), empty(), pod())), ["0", range]);
        assert_eq!(of(spec(users(), own(), pod())), ["1024", range]);
        assert_eq!(of(spec(users(), empty(), empty())), ["0", range]);
        assert_eq!(of(spec(none(), own(), pod())), ["1024", ""]);
        // Those of a container that is no pod's are its own namespaces'.
        assert_eq!(of(spec(none(), own(), empty())), ["", ""]);
    }

    #[test]
    fn namespaces_of_the_host_are_left_out() {
        let node = NamespaceMode::NODE.into();
        let all = kinds(NamespaceOption::default());
        for kind in [
            LinuxNamespaceType::Network,
            LinuxNamespaceType::Pid,
            LinuxNamespaceType::Ipc,
        ] {
            assert!(all.contains(&kind), "{kind:?}");
            let mut options = NamespaceOption::default();
            match kind {
                LinuxNamespaceType::Network => options.network = node,
                LinuxNamespaceType::Pid => options.pid = node,
                _ => options.ipc = node,
            }
            assert!(!kinds(options).contains(&kind), "{kind:?}");
        }
    }

    #[test]
    fn users_are_mapped_only_where_that_is_asked_for() {
        let users = |mode: NamespaceMode| NamespaceOption {
            userns_options: MessageField::some(UserNamespace {
                mode: mode.into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let kind = LinuxNamespaceType::User;
        assert!(!kinds(NamespaceOption::default()).contains(&kind));
        assert!(!kinds(users(NamespaceMode::NODE)).contains(&kind));
        assert!(kinds(users(NamespaceMode::POD)).contains(&kind));
    }

    #[test]
    fn cgroups_in_both_spellings() {
        let path = |parent| cgroups_path(parent, NAMESPACE, "id");
        assert_eq!(path("/kubepods/pod1"), Path::new("/kubepods/pod1/id"));
        assert_eq!(
            path("/kubepods.slice/kubepods-pod1.slice"),
            Path::new("kubepods-pod1.slice:cri-containerd:id")
        );
        assert_eq!(path(""), Path::new("/k8s.io/id"));
        let spec = sandbox_spec(&request(), &PodSandboxConfig::default(), NAMESPACE);
        let path = spec.linux().clone().unwrap().cgroups_path().clone();
        assert_eq!(path, Some("/k8s.io/id".into()), "never none");
    }

    #[test]
    fn size_is_the_configuration_s_or_else_the_caller_s() {
        let mut request = request();
        request.annotations = HashMap::from([
            (SANDBOX_MEMORY.into(), "1".into()),
            (CONTAINER_TYPE.into(), "container".to_owned()),
        ]);
        let mut config = PodSandboxConfig::default();
        let spec = sandbox_spec(&request, &config, NAMESPACE);
        assert!(kubernetes::is_sandbox(&spec));
        assert_eq!(spec.annotations().clone().unwrap()[SANDBOX_MEMORY], "1");
        config.linux.mut_or_insert_default().resources =
            MessageField::some(LinuxContainerResources {
                cpu_period: 100_000,
                cpu_quota: 200_000,
                memory_limit_in_bytes: 1 << 30,
                ..Default::default()
            });
        let annotations = sandbox_spec(&request, &config, NAMESPACE)
            .annotations()
            .clone();
        let annotations = annotations.unwrap();
        assert_eq!(annotations[SANDBOX_MEMORY], "1073741824");
        assert_eq!(annotations[SANDBOX_CPU_QUOTA], "200000");
        assert_eq!(annotations[SANDBOX_CPU_PERIOD], "100000");
    }
}
