//! A systemd of the test's own: a user's manager has the same interface as the host's.

use std::os::unix::net::UnixDatagram;
use std::process::{Child, Command, Stdio};

use super::*;
use crate::cgroup::resident::start_in;
use crate::cgroup::tests::Process;

/// Where distributions have it.
const PROGRAMS: [&str; 2] = ["/usr/lib/systemd/systemd", "/lib/systemd/systemd"];
/// How often its end is looked for meanwhile.
const LOOK: Duration = Duration::from_millis(200);

/// A group for it in each hierarchy that it uses: it takes all that is in the group it
/// finds itself in for its own.
struct Groups(Vec<PathBuf>);

impl Groups {
    fn new() -> std::io::Result<Self> {
        let mut groups = Self(Vec::new());
        for hierarchy in ["", "unified", "systemd"] {
            let root = Path::new("/sys/fs/cgroup").join(hierarchy);
            if root.join("cgroup.procs").exists() {
                let group = root.join(format!("nacre-test-systemd-{}", std::process::id()));
                fs::create_dir(&group)?;
                groups.0.push(group);
            }
        }
        Ok(groups)
    }

    /// The directory of a group by its name in the kernel.
    fn directory(&self, name: &str) -> PathBuf {
        let below = |group: &PathBuf| group.parent().unwrap().join(name.trim_start_matches('/'));
        let mut paths = self.0.iter().map(below);
        paths
            .find(|path| path.join("cgroup.events").exists())
            .unwrap()
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        for group in &self.0 {
            remove_with_those_below(group);
        }
    }
}

fn remove_with_those_below(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_with_those_below(&entry.path());
        }
    }
    // What is still in use is a matter of the machine's, not of the test's.
    let _ = fs::remove_dir(group);
}

struct Manager {
    process: Child,
    directory: tempfile::TempDir,
    groups: Groups,
}

impl Manager {
    /// None, with the reason on stderr, where there is none or it does not run.
    fn new() -> Option<Self> {
        let program = PROGRAMS.iter().find(|path| Path::new(path).exists());
        let (Some(program), Ok(groups)) = (program, Groups::new()) else {
            eprintln!("skipped: no systemd here, or no cgroups for it");
            return None;
        };
        let directory = tempfile::tempdir().unwrap();
        let ready = UnixDatagram::bind(directory.path().join("ready")).unwrap();
        ready.set_read_timeout(Some(LOOK)).unwrap();
        let mut command = Command::new(program);
        command
            .args(["--user", "--unit=basic.target"])
            .env_clear()
            .env("XDG_RUNTIME_DIR", directory.path())
            .env("HOME", directory.path())
            .env("NOTIFY_SOCKET", directory.path().join("ready"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        for group in &groups.0 {
            start_in(&mut command, [group, group]).unwrap();
        }
        let process = command.spawn().unwrap();
        let mut manager = Self {
            process,
            directory,
            groups,
        };
        manager.is_ready(&ready).then_some(manager)
    }

    /// sd_notify(3). One that ends does not run here; one that runs has to get ready.
    fn is_ready(&mut self, socket: &UnixDatagram) -> bool {
        let mut message = [0; 256];
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let length = socket.recv(&mut message).unwrap_or(0);
            if message[..length].starts_with(b"READY=1") {
                return true;
            }
            if let Some(status) = self.process.try_wait().unwrap() {
                eprintln!("skipped: systemd does not run here as a user's manager: {status}");
                return false;
            }
        }
        panic!("systemd does not get ready within {PATIENCE:?}");
    }

    fn scope(&self, group: &Path) -> Scope {
        Scope {
            systemd: Systemd {
                system_bus: self.directory.path().join("nobody"),
                private: self.directory.path().join("systemd/private"),
            },
            unit: Unit {
                slice: "nacre-pods.slice".into(),
                name: "nacre-pod.scope".into(),
            },
            group: group.to_owned(),
        }
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        // Already dead is fine.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn a_real_systemd_does_what_it_is_asked() {
    let Some(manager) = Manager::new() else {
        return;
    };
    let (mut shim, other) = (Process::new(), Process::new());
    let scope = manager.scope(Path::new("/none"));
    scope.start(shim.pid(), &limits()).unwrap();
    let group = shim.group();
    assert!(
        group.ends_with("/nacre.slice/nacre-pods.slice/nacre-pod.scope"),
        "{group}"
    );
    scope.set_limits(&Limits::default()).unwrap();

    let populated = manager.scope(&manager.groups.directory(&group));
    let error = populated.start(other.pid(), &limits()).unwrap_err();
    assert!(matches!(error, CgroupError::Exists(_)), "{error}");

    scope.stop(PATIENCE).unwrap();
    assert!(!shim.0.wait().unwrap().success(), "it was in it");
    scope.stop(PATIENCE).unwrap();
    scope.start(other.pid(), &limits()).unwrap();
    assert_eq!(other.group(), group);
}
