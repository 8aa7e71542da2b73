//! A virtual function of a controller that the host keeps (SR-IOV).

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;

use nacre_tests::{Scene, eventually};
use serde_json::json;

use crate::{
    Bound, DEVICES, DISK, SHARED_PORT, begins, behind, devices, disk, driver, link, no_claims,
    sysfs,
};

/// `struct nvme_passthru_cmd` of linux/nvme_ioctl.h.
#[repr(C)]
#[derive(Default)]
pub struct AdminCommand {
    opcode: u8,
    flags: u8,
    reserved: u16,
    namespace: u32,
    cdw2: u32,
    cdw3: u32,
    metadata: u64,
    data: u64,
    metadata_len: u32,
    data_len: u32,
    cdw10: u32,
    cdw11: u32,
    cdw12: u32,
    cdw13: u32,
    cdw14: u32,
    cdw15: u32,
    timeout_ms: u32,
    result: u32,
}

nix::ioctl_readwrite!(admin_command, b'N', 0x41, AdminCommand);

/// Virtualization Management (NVM Express base 2.0, 5.38), and what it does.
const VIRTUALIZATION: u8 = 0x1c;
const GIVE_PRIMARY: u32 = 1;
const GIVE_SECONDARY: u32 = 8;
const ONLINE: u32 = 9;
/// Kinds of resources: queues and interrupts.
const QUEUES: u32 = 0;
const INTERRUPTS: u32 = 1;

/// The controllers' numbers in QEMU: the first virtual function is the one after its parent.
const PRIMARY: u32 = 0;
const SECONDARY: u32 = 1;

/// A controller that has one virtual function with a queue for commands and one for data,
/// until this is dropped.
struct Parent(String);

impl Parent {
    fn new(address: &str) -> Self {
        let parent = Self(address.to_owned());
        for kind in [QUEUES, INTERRUPTS] {
            parent.manage(PRIMARY, GIVE_PRIMARY, kind, 0);
        }
        // What it has given up it has until it is reset.
        parent.write("reset", "1");
        let state = sysfs(address)
            .join("nvme")
            .join(parent.name())
            .join("state");
        eventually("the host's driver has it again", || {
            fs::read_to_string(&state).unwrap() == "live\n"
        });
        parent.write("sriov_drivers_autoprobe", "0");
        parent.write("sriov_numvfs", "1");
        parent.manage(SECONDARY, GIVE_SECONDARY, QUEUES, 2);
        parent.manage(SECONDARY, GIVE_SECONDARY, INTERRUPTS, 1);
        parent.manage(SECONDARY, ONLINE, 0, 0);
        parent
    }

    fn write(&self, file: &str, text: &str) {
        let path = sysfs(&self.0).join(file);
        fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }

    /// `nvme0`
    fn name(&self) -> OsString {
        let names = fs::read_dir(sysfs(&self.0).join("nvme")).unwrap();
        let mut names = names.map(|entry| entry.unwrap().file_name());
        names.next().unwrap()
    }

    fn manage(&self, controller: u32, action: u32, kind: u32, count: u32) {
        let node = File::open(Path::new("/dev").join(self.name())).unwrap();
        let mut command = AdminCommand {
            opcode: VIRTUALIZATION,
            cdw10: controller << 16 | kind << 8 | action,
            cdw11: count,
            ..AdminCommand::default()
        };
        // SAFETY: the structure is the kernel's, and has no data.
        let status = unsafe { admin_command(node.as_raw_fd(), &raw mut command) };
        let what = [controller, action, kind, count];
        assert_eq!(status, Ok(0), "controller, action, kind, count: {what:?}");
    }
}

impl Drop for Parent {
    fn drop(&mut self) {
        self.write("sriov_numvfs", "0");
    }
}

/// Its pod writes to the disk, which the host sees by the parent: that is still the host's.
#[test]
fn a_virtual_function_is_a_disk_of_a_pod() {
    let address = behind(SHARED_PORT);
    let parent = Parent::new(&address);
    let function = link(&address, "virtfn0").unwrap();
    devices(&["bind", &address])
        .exits(1)
        .complains(&["1 virtual functions"]);
    let table = devices(&[]).exits(0).stdout;
    let line = table.lines().find(|line| line.starts_with(&function));
    let kind = format!("NVMe, VF of {address}");
    assert!(line.is_some_and(|line| line.contains(&kind)), "{table}");
    let bound = Bound::new(&[&function]);
    let mut scene = Scene::new();
    let line = format!("by {function}, {}", std::process::id());
    let script = format!("printf '{line}' | dd of={DISK} conv=fsync 2>/dev/null");
    let said = scene.run_spec(|spec| {
        spec["annotations"] = json!({DEVICES: function});
        spec["process"]["args"] = json!(["sh", "-c", script]);
    });
    said.exits(0);
    no_claims();
    assert_eq!(driver(&address).as_deref(), Some("nvme"));
    // What the parent had read of the disk before is in no cache.
    eventually("the host reads it", || {
        fs::write("/proc/sys/vm/drop_caches", "1").unwrap();
        begins(&disk(&address)).starts_with(&line)
    });
    drop(bound);
    drop(parent);
}
