//! The monitor alone: our kernel on real KVM, started by vmm's example `boot`
//! with an initramfs of busybox. What the guest does last decides how it ends.
//! It speaks by kernel messages of the one level that a quiet kernel prints.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nacre_tests::{Machine, Said, run};

const KERNEL: &str = "/usr/local/share/nacre/vmlinux";

/// Makes an initramfs in `directory` whose init runs `script`.
pub fn initramfs(directory: &Path, script: &str) -> PathBuf {
    let tree = directory.join("tree");
    for name in ["bin", "dev", "proc"] {
        fs::create_dir_all(tree.join(name)).unwrap();
    }
    fs::copy("/bin/busybox", tree.join("bin/busybox")).unwrap();
    let init = format!(
        "#!/bin/busybox sh\nPATH=/bin\nbusybox mount -t proc proc /proc\nbusybox --install -s /bin\n\
         mount -t devtmpfs dev /dev\nsay() {{ echo \"<0>$*\" >/dev/kmsg; }}\n{script}\n"
    );
    fs::write(tree.join("init"), init).unwrap();
    fs::set_permissions(tree.join("init"), fs::Permissions::from_mode(0o755)).unwrap();
    let initrd = directory.join("initrd.img");
    pack(&tree, &initrd);
    initrd
}

/// Boots a guest whose init runs `script`, and returns what it said.
pub fn boot(script: &str, options: &[&str]) -> Said {
    let directory = std::env::temp_dir().join(format!("boot-{:?}", std::thread::current().id()));
    let initrd = initramfs(&directory, script);
    let mut arguments = vec!["--kernel", KERNEL, "--initrd", initrd.to_str().unwrap()];
    let console = "quiet loglevel=1 console=ttyS0 panic=-1 rdinit=/init";
    arguments.extend(["--cmdline", console]);
    arguments.extend(options);
    let said = run("boot", &arguments);
    fs::remove_dir_all(&directory).unwrap();
    said
}

fn pack(tree: &Path, initrd: &Path) {
    let status = Command::new("sh")
        .args(["-c", "find . | busybox cpio -o -H newc > \"$0\""])
        .arg(initrd)
        .current_dir(tree)
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn kernel_boots_and_powers_off() {
    let before = Machine::now();
    let said = boot("say kernel $(uname -r); poweroff -f", &[]).exits(0);
    let host = run("uname", &["-r"]).stdout;
    let guest = said
        .stdout
        .lines()
        .find_map(|line| line.strip_prefix("kernel "))
        .expect("the guest says its release");
    assert_ne!(guest.trim(), host.trim());
    println!("guest {guest}, {}", said.stderr.trim());
    before.await_return();
}

#[test]
fn processors_are_all_there() {
    for vcpus in ["1", "4", "32"] {
        let script = "say processors $(grep -c ^processor /proc/cpuinfo); poweroff -f";
        let said = boot(script, &["--vcpus", vcpus]).exits(0);
        let expected = format!("processors {vcpus}\r\n");
        assert!(said.stdout.contains(&expected), "{said:#?}");
    }
    boot("poweroff -f", &["--vcpus", "33"])
        .exits(1)
        .complains(&["33"]);
}

#[test]
fn reboot_panic_and_power_off_are_told_apart() {
    boot("reboot -f", &[]).exits(1).complains(&["Reboot"]);
    boot("echo c > /proc/sysrq-trigger", &[])
        .exits(1)
        .complains(&["Panic"]);
}

/// Asked by an NMI, of all its processors. The sysctl by which it ends of that is not set before
/// init runs, and this one waits for a disk that does not come.
#[test]
fn kernel_that_does_not_come_to_run_init_says_where_it_is() {
    let directory = PathBuf::from("/tmp/boot-asked");
    let initrd = initramfs(&directory, "");
    let cmdline = "console=ttyS0 panic=-1 unknown_nmi_panic panic_print=0x40 rdinit=/none \
                   rootwait root=/dev/vda";
    let mut command = Command::new("boot");
    command.args(["--kernel", KERNEL, "--initrd", initrd.to_str().unwrap()]);
    command.args(["--cmdline", cmdline, "--interrupt", "on", "--vcpus", "2"]);
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = piped.spawn().unwrap();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    let mut lines = stdout.lines().map(Result::unwrap);
    let waits = lines.find(|line| line.contains("Waiting for root device"));
    waits.expect("it waits");
    drop(child.stdin.take());
    let rest = lines.collect::<Vec<_>>().join("\n");
    assert_eq!(child.wait().unwrap().code(), Some(1), "{rest}");
    for words in [
        "NMI: IOCK error",
        "panic - not syncing: NMI: Not continuing",
        "NMI backtrace for cpu 1",
    ] {
        assert!(rest.contains(words), "{rest}");
    }
    fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn missing_kernel_is_named() {
    let said = run("boot", &["--kernel", "/none", "--initrd", "/none"]);
    said.exits(1).complains(&["No such file"]);
}
