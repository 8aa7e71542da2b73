//! `nacre check`: one line for each thing a pod needs, and how to get it.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::containerd::{self, ContainerdConfig};
use super::trial;
use crate::RUNTIME_NAME;
use crate::cgroup::CGROUP_ROOT;
use crate::config::Config;
use crate::elf;
use crate::error::chain;

/// The shim's program, as containerd looks for it.
pub(super) const SHIM: &str = "containerd-shim-nacre-v2";
/// Magic of a cpio archive in "newc" form (Documentation/driver-api/early-userspace).
const CPIO_MAGIC: &[u8] = b"070701";
/// Of an EROFS image's superblock, little-endian, and where that is (fs/erofs/erofs_fs.h).
const EROFS_MAGIC: [u8; 4] = 0xe0f5_e1e2_u32.to_le_bytes();
const EROFS_OFFSET: u64 = 1024;

/// How a thing is.
#[derive(Debug, PartialEq, Eq)]
enum State {
    Ok,
    /// Pods run without it.
    Optional,
    Missing,
}

/// One line of the report.
#[derive(Debug)]
struct Finding {
    name: &'static str,
    state: State,
    /// What was found, or what is wrong.
    detail: String,
    /// How to get it.
    hint: &'static str,
}

/// Checks the host and prints the report. Returns whether pods can run.
pub(super) fn run(out: &mut impl Write) -> io::Result<bool> {
    let mut findings = vec![cpu(), kvm(), tun(), vhost_net(), cgroup()];
    match Config::load() {
        Ok(config) => {
            let path = Config::path();
            let kind = if path.exists() {
                ""
            } else {
                ": not there, defaults"
            };
            let detail = format!("{}{kind}", path.display());
            findings.push(found("configuration", &detail));
            findings.extend([
                kernel(&config.kernel),
                initrd(&config.initrd),
                virtiofsd(&config.virtiofsd),
            ]);
            let images = config.drivers.iter().map(|image| &*image.path);
            findings.extend(images.map(driver_image));
        }
        Err(error) => findings.push(missing("configuration", chain(&error), "correct the line")),
    }
    findings.extend([shim(), containerd()]);
    for finding in &findings {
        print(out, finding)?;
    }
    let ready = findings.iter().all(|f| f.state != State::Missing);
    if !ready {
        writeln!(out, "\nthis host cannot run pods yet")?;
    }
    Ok(ready)
}

fn print(out: &mut impl Write, finding: &Finding) -> io::Result<()> {
    let (word, hint) = match finding.state {
        State::Ok => ("ok", String::new()),
        State::Optional => ("optional", format!("; {}", finding.hint)),
        State::Missing => ("missing", format!("; {}", finding.hint)),
    };
    writeln!(
        out,
        "{word:<9} {:<14} {}{hint}",
        finding.name, finding.detail
    )
}

fn found(name: &'static str, detail: &str) -> Finding {
    Finding {
        name,
        state: State::Ok,
        detail: detail.into(),
        hint: "",
    }
}

fn missing(name: &'static str, detail: String, hint: &'static str) -> Finding {
    Finding {
        name,
        state: State::Missing,
        detail,
        hint,
    }
}

fn optional(name: &'static str, detail: String, hint: &'static str) -> Finding {
    Finding {
        state: State::Optional,
        ..missing(name, detail, hint)
    }
}

fn cpu() -> Finding {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    match virtualisation_flag(&info) {
        Some(flag) => found("processor", flag),
        None => missing(
            "processor",
            "neither svm nor vmx in /proc/cpuinfo".into(),
            "turn on virtualisation in the firmware, or nested virtualisation of the machine around this one",
        ),
    }
}

fn virtualisation_flag(cpuinfo: &str) -> Option<&'static str> {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"))?;
    ["svm", "vmx"]
        .into_iter()
        .find(|flag| flags.split_whitespace().any(|word| word == *flag))
}

fn kvm() -> Finding {
    match trial::run() {
        Ok(()) => found("/dev/kvm", "a small VM ran"),
        Err(problem) => missing(
            "/dev/kvm",
            problem,
            "modprobe kvm_amd or kvm_intel; run as root",
        ),
    }
}

fn tun() -> Finding {
    let name = "/dev/net/tun";
    match open_device(name) {
        Ok(_) => found(name, "opens"),
        Err(error) => missing(name, error.to_string(), "modprobe tun; run as root"),
    }
}

fn vhost_net() -> Finding {
    let name = "/dev/vhost-net";
    match open_device(name) {
        Ok(_) => found(name, "opens"),
        Err(error) => optional(
            name,
            error.to_string(),
            "modprobe vhost_net makes the network faster",
        ),
    }
}

fn open_device(path: &str) -> io::Result<File> {
    File::options().read(true).write(true).open(path)
}

fn cgroup() -> Finding {
    let is_v2 = statfs(CGROUP_ROOT).is_ok_and(|stat| stat.filesystem_type() == CGROUP2_SUPER_MAGIC);
    if is_v2 {
        found("cgroup v2", CGROUP_ROOT)
    } else {
        missing(
            "cgroup v2",
            format!("{CGROUP_ROOT} is something else"),
            "boot with systemd.unified_cgroup_hierarchy=1",
        )
    }
}

fn kernel(path: &Path) -> Finding {
    let check = File::open(path)
        .map_err(|error| error.to_string())
        .and_then(|mut file| elf::check_kernel(&mut file));
    report_file("kernel", path, check, "make install, or set `kernel`")
}

fn initrd(path: &Path) -> Finding {
    let check = starts_with(path, CPIO_MAGIC)
        .map_err(|error| error.to_string())
        .and_then(|is_cpio| {
            is_cpio
                .then_some(())
                .ok_or_else(|| "not an uncompressed cpio archive".into())
        });
    report_file("initrd", path, check, "make install, or set `initrd`")
}

fn virtiofsd(path: &Path) -> Finding {
    let check = match std::fs::metadata(path) {
        Ok(metadata) if is_program(&metadata) => Ok(()),
        Ok(_) => Err("not executable".into()),
        Err(error) => Err(error.to_string()),
    };
    let hint = "apt install virtiofsd, or set `virtiofsd`";
    report_file("virtiofsd", path, check, hint)
}

/// Only pods with a device that it is for need it.
fn driver_image(path: &Path) -> Finding {
    let check = || {
        let mut file = File::open(path)?;
        let mut magic = [0; EROFS_MAGIC.len()];
        file.seek(SeekFrom::Start(EROFS_OFFSET))?;
        file.read_exact(&mut magic)?;
        Ok(magic == EROFS_MAGIC)
    };
    let problem = match check() {
        Ok(true) => return found("driver image", &path.display().to_string()),
        Ok(false) => "no EROFS image".to_owned(),
        Err(error) => io::Error::to_string(&error),
    };
    let hint = "put it there, or correct [drivers]";
    optional(
        "driver image",
        format!("{}: {problem}", path.display()),
        hint,
    )
}

fn report_file(
    name: &'static str,
    path: &Path,
    check: Result<(), String>,
    hint: &'static str,
) -> Finding {
    match check {
        Ok(()) => found(name, &path.display().to_string()),
        Err(problem) => missing(name, format!("{}: {problem}", path.display()), hint),
    }
}

fn starts_with(path: &Path, magic: &[u8]) -> io::Result<bool> {
    let mut start = Vec::new();
    File::open(path)?
        .take(magic.len() as u64)
        .read_to_end(&mut start)?;
    Ok(start == magic)
}

fn is_program(metadata: &std::fs::Metadata) -> bool {
    metadata.is_file() && metadata.permissions().mode() & 0o111 != 0
}

fn shim() -> Finding {
    match in_path(SHIM, std::env::var_os("PATH").as_deref()) {
        Some(path) => found("shim", &path.display().to_string()),
        None => missing(
            "shim",
            format!("no {SHIM} in PATH"),
            "make install; it must be in containerd's PATH too",
        ),
    }
}

fn in_path(program: &str, path: Option<&OsStr>) -> Option<PathBuf> {
    std::env::split_paths(path?)
        .map(|dir| dir.join(program))
        .find(|file| std::fs::metadata(file).is_ok_and(|metadata| is_program(&metadata)))
}

/// `ctr` and `nerdctl` name the runtime themselves; Kubernetes needs it in
/// containerd's configuration.
fn containerd() -> Finding {
    let hint = "Kubernetes needs it there: `nacre install` does it, or tells how";
    let config = match ContainerdConfig::load(Path::new("/")) {
        Err(error) => return optional("containerd", chain(&error), hint),
        Ok(config) => config,
    };
    if let Some(file) = config.as_ref().and_then(ContainerdConfig::without_vm) {
        return missing(
            "containerd",
            format!(
                "pods of a runtime in {} have no VM: with `sandboxer = 'shim'` containerd goes by \
                 runtime_type alone",
                file.display()
            ),
            "remove `sandboxer`, or `runtime_path` and make the type ours",
        );
    }
    match config.and_then(|config| config.naming_runtime()) {
        Some(file) => found(
            "containerd",
            &format!("{RUNTIME_NAME} in {}", file.display()),
        ),
        None => optional(
            "containerd",
            format!("no {RUNTIME_NAME} in {}", containerd::CONFIG_PATH),
            hint,
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(finding: &Finding) -> String {
        let mut out = Vec::new();
        print(&mut out, finding).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn one_line_each_with_a_hint_where_needed() {
        assert_eq!(
            line(&found("shim", "/bin/x")),
            "ok        shim           /bin/x\n"
        );
        let report = line(&kernel(Path::new("/nonexistent/vmlinux")));
        assert!(report.starts_with("missing   kernel"), "{report}");
        assert!(report.contains("/nonexistent/vmlinux") && report.contains("make install"));
        assert_eq!(report.lines().count(), 1);
    }

    #[test]
    fn driver_images_are_those_of_erofs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("gpu.erofs");
        let report = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            line(&driver_image(&path))
        };
        let image = [&[0; 1024][..], &[0xe2, 0xe1, 0xf5, 0xe0]].concat();
        assert!(report(&image).starts_with("ok        driver image"));
        let other = report(&[0; 2048]);
        assert!(other.starts_with("optional  driver image"), "{other}");
        assert!(
            other.contains("gpu.erofs: no EROFS image; put it there"),
            "{other}"
        );
        assert!(report(b"short").starts_with("optional"));
    }

    #[test]
    fn processor_flags_are_whole_words() {
        assert_eq!(virtualisation_flag("flags\t\t: fpu svm sse"), Some("svm"));
        assert_eq!(virtualisation_flag("flags\t\t: fpu svm_lock sse"), None);
        assert_eq!(virtualisation_flag(""), None);
    }

    #[test]
    fn initrd_is_an_uncompressed_archive() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("initrd.img");
        std::fs::write(&path, "070701...").unwrap();
        assert_eq!(initrd(&path).state, State::Ok);
        std::fs::write(&path, [0x1f, 0x8b, 8]).unwrap();
        assert_eq!(initrd(&path).state, State::Missing);
    }

    #[test]
    fn programs_are_looked_for_in_every_directory() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("tool");
        std::fs::write(&program, "").unwrap();
        let path = std::env::join_paths([Path::new("/nonexistent"), dir.path()]).unwrap();
        assert_eq!(in_path("tool", Some(&path)), None);
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(in_path("tool", Some(&path)), Some(program));
    }
}
