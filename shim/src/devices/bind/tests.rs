use super::*;
use crate::devices::testing::{self, Tree, address};
use std::path::Path;

fn with_nvme() -> Tree {
    let tree = Tree::new();
    tree.add("0000:01:00.0", 0x01_0802).group(3).driver("nvme");
    tree
}

fn state(tree: &Tree, at: &str) -> (Option<String>, Option<String>) {
    let function = tree.system().function(address(at)).unwrap();
    (function.driver, function.driver_override)
}

fn no_claims() -> Claims {
    Claims::of(Path::new("/nonexistent"))
}

fn some(text: &str) -> Option<String> {
    Some(text.to_owned())
}

#[test]
fn to_vfio_and_back_any_number_of_times() {
    let tree = with_nvme();
    let (system, nvme) = (tree.system(), [address("01:00.0")]);
    let moved = bind(&system, &nvme).unwrap();
    assert_eq!(
        (moved[0].from.as_deref(), moved[0].to.as_deref()),
        (Some("nvme"), Some("vfio-pci"))
    );
    assert_eq!(
        state(&tree, "01:00.0"),
        (some("vfio-pci"), some("vfio-pci"))
    );
    let again = bind(&system, &nvme).unwrap();
    assert_eq!(again[0].from, again[0].to);

    let moved = unbind(&system, &no_claims(), &nvme).unwrap();
    assert_eq!(moved[0].to.as_deref(), Some("nvme"));
    assert_eq!(state(&tree, "01:00.0"), (some("nvme"), None));
    let again = unbind(&system, &no_claims(), &nvme).unwrap();
    assert_eq!(
        (again[0].from.as_deref(), again[0].to.as_deref()),
        (Some("nvme"), Some("nvme"))
    );
}

/// The reservation alone is no sign that vfio-pci has a device: it may be in use.
#[test]
fn a_disk_that_is_only_reserved_stays_with_its_driver() {
    let tree = with_nvme();
    let dir = "sys/devices/pci0000:00/0000:01:00.0";
    tree.write(&format!("{dir}/driver_override"), "vfio-pci\n");
    let system = System {
        write: |path, text| {
            assert!(!path.ends_with("unbind"), "it may be mounted");
            testing::kernel(path, text)
        },
        ..tree.system()
    };
    let moved = unbind(&system, &no_claims(), &[address("01:00.0")]).unwrap();
    assert_eq!(moved[0].from, moved[0].to);
    assert_eq!(state(&tree, "01:00.0"), (some("nvme"), None));
}

#[test]
fn a_device_without_a_driver() {
    let tree = Tree::new();
    tree.add("0000:01:00.0", 0x00_ff00).group(3);
    let edu = [address("01:00.0")];
    bind(&tree.system(), &edu).unwrap();
    assert_eq!(state(&tree, "01:00.0").0, some("vfio-pci"));
    unbind(&tree.system(), &no_claims(), &edu).unwrap();
    assert_eq!(state(&tree, "01:00.0"), (None, None));
}

/// The second one fails, and the first one is with its driver again.
#[test]
fn what_was_moved_before_a_failure_is_moved_back() {
    let tree = with_nvme();
    tree.add("0000:02:00.0", 0x02_0000)
        .group(4)
        .driver("e1000e");
    tree.refuses("vfio-pci");
    let both = ["01:00.0", "02:00.0"].map(address);
    let error = bind(&tree.system(), &both).unwrap_err();
    assert!(matches!(error, DeviceError::NotTaken(_)), "{error}");
    assert_eq!(state(&tree, "01:00.0"), (some("nvme"), None));

    let tree = with_nvme();
    let gone = tree.add("0000:02:00.0", 0x02_0000);
    gone.group(4).file("driver_override", "vfio-refuses\n");
    let system = System {
        write: |path, text| match text {
            "0000:02:00.0" => Err(std::io::Error::from_raw_os_error(libc::EIO)),
            _ => testing::kernel(path, text),
        },
        ..tree.system()
    };
    let error = bind(&system, &both).unwrap_err();
    assert!(matches!(error, DeviceError::Write { .. }), "{error}");
    assert_eq!(state(&tree, "01:00.0"), (some("nvme"), None));
    assert_eq!(state(&tree, "02:00.0").1, some("vfio-refuses"));
}

#[test]
fn a_driver_that_does_not_take_its_device_back_is_told() {
    let tree = with_nvme();
    tree.refuses("vfio-pci");
    tree.refuses("nvme");
    let error = bind(&tree.system(), &[address("01:00.0")]).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("vfio-pci did not take 0000:01:00.0"),
        "{text}"
    );
    assert!(text.contains("is not with its driver nvme again"), "{text}");
}

#[test]
fn nothing_is_moved_when_one_is_in_use() {
    let tree = with_nvme();
    let nic = tree.add("0000:02:00.0", 0x02_0000);
    nic.group(4).driver("e1000e");
    nic.node("net/eth0", "net", "")
        .file("net/eth0/flags", "0x1003\n");
    let error = bind(&tree.system(), &["01:00.0", "02:00.0"].map(address)).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("0000:02:00.0 is in use: network interface eth0"),
        "{text}"
    );
    assert_eq!(state(&tree, "01:00.0"), (some("nvme"), None));
}

#[test]
fn what_can_never_be_passed() {
    let tree = Tree::new();
    tree.add("0000:00:01.0", 0x06_0400)
        .group(1)
        .driver("pcieport");
    tree.add("0000:01:00.0", 0x03_0000);
    let refusal = |at: &str| bind(&tree.system(), &[address(at)]).unwrap_err();
    assert!(matches!(refusal("00:01.0"), DeviceError::Bridge(_)));
    assert!(matches!(refusal("01:00.0"), DeviceError::NoIommu(_)));
    assert!(matches!(refusal("09:00.0"), DeviceError::NoDevice(_)));
    let tree = with_nvme();
    std::fs::remove_dir(tree.path("sys/bus/pci/drivers/vfio-pci")).unwrap();
    let error = bind(&tree.system(), &[address("01:00.0")]).unwrap_err();
    assert!(error.to_string().contains("modprobe vfio-pci"), "{error}");
}

#[test]
fn a_pod_s_device_is_not_taken_from_it() {
    let tree = with_nvme();
    let nvme = [address("01:00.0")];
    bind(&tree.system(), &nvme).unwrap();
    let root = tempfile::tempdir().unwrap();
    let claims = Claims::of(root.path());
    let pod = crate::devices::claim::tests::living_pod(root.path(), "web");
    claims.claim(&pod, &nvme).unwrap();
    let error = unbind(&tree.system(), &claims, &nvme).unwrap_err();
    assert!(
        error.to_string().contains("pod default/web has it"),
        "{error}"
    );
    assert_eq!(state(&tree, "01:00.0").0, some("vfio-pci"));
    claims.release(&pod);
    unbind(&tree.system(), &claims, &nvme).unwrap();
}

/// As with `options vfio-pci ids=` on the host.
#[test]
fn a_device_that_goes_to_vfio_by_itself() {
    let tree = with_nvme();
    let nvme = [address("01:00.0")];
    bind(&tree.system(), &nvme).unwrap();
    let default = "sys/devices/pci0000:00/0000:01:00.0/default_driver";
    tree.write(default, "vfio-pci");
    let error = unbind(&tree.system(), &no_claims(), &nvme).unwrap_err();
    assert!(error.to_string().contains("/etc/modprobe.d"), "{error}");
}

/// It is there for pods from the moment it is made.
#[test]
fn a_mediated_device_has_no_other_driver() {
    let tree = Tree::new();
    let uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
    let devices = [address(uuid)];
    let refusals = || {
        let bound = bind(&tree.system(), &devices).unwrap_err();
        let unbound = unbind(&tree.system(), &no_claims(), &devices).unwrap_err();
        [bound, unbound].map(|error| error.to_string())
    };
    for text in refusals() {
        assert!(text.contains("no mediated device"), "{text}");
    }
    tree.add_mediated(uuid, "devices/virtual/mtty/mtty")
        .group(3);
    for text in refusals() {
        let start = format!("{uuid} is a mediated device: it has no other driver");
        assert!(text.starts_with(&start), "{text}");
    }
}
