//! systemd for a test: the host's, or where it runs none a user's manager in its place.
//!
//! ```text
//! XDG_RUNTIME_DIR=/run  -> its socket is /run/systemd/private, as the host's would be
//! started in /init.scope -> its tree of cgroups is all of them
//! dbus.socket of its own -> it serves its interface at /run/dbus/system_bus_socket, too
//! ```
//! A user's manager has the host's interface, and does the same with its scopes.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::{Said, eventually, run};

const PROGRAM: &str = "/usr/lib/systemd/systemd";
const RUN: &str = "/run";
/// There while the host runs systemd (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";
/// What it leaves there.
const DIRECTORIES: [&str; 3] = ["/run/systemd", "/run/dbus", UNITS];
const BUS: &str = "/run/dbus/system_bus_socket";
/// Its configuration's directory.
const UNITS: &str = "/run/test-systemd";
const DBUS_SOCKET: &str = "[Unit]
DefaultDependencies=no
[Socket]
ListenStream=/run/dbus/system_bus_socket
";
const DBUS_SERVICE: &str = "[Unit]
DefaultDependencies=no
Requires=dbus.socket
After=dbus.socket
[Service]
Type=notify
ExecStart=/usr/bin/dbus-daemon --session --address=systemd: --nofork --nopidfile
";
const CGROUP_ROOT: &str = "/sys/fs/cgroup";
/// How long what was in a cgroup may take to be gone.
const END: Duration = Duration::from_secs(10);

/// See the module.
pub struct Systemd(Option<Started>);

impl Systemd {
    /// One that answers on the bus.
    ///
    /// # Panics
    ///
    /// When there is none, and none can be started.
    #[must_use]
    pub fn running() -> Self {
        Self((!Path::new(BOOTED).exists()).then(Started::new))
    }

    /// `systemctl`.
    pub fn systemctl(&self, arguments: &[&str]) -> Said {
        if self.0.is_none() {
            return run("systemctl", arguments);
        }
        let run_directory = format!("XDG_RUNTIME_DIR={RUN}");
        let ours = [run_directory.as_str(), "systemctl", "--user"];
        run("env", &[&ours[..], arguments].concat())
    }

    /// A property of a unit.
    #[track_caller]
    pub fn property(&self, unit: &str, name: &str) -> String {
        let said = self.systemctl(&["show", "--value", "--property", name, unit]);
        said.exits(0).stdout.trim().to_owned()
    }
}

struct Started {
    process: Child,
    /// What there was before: cgroups, and controllers that they may use.
    cgroups: BTreeSet<PathBuf>,
    controllers: String,
}

impl Started {
    fn new() -> Self {
        let units = format!("{UNITS}/systemd/user");
        for directory in [units.as_str(), BOOTED, "/run/dbus"] {
            fs::create_dir_all(directory).expect("/run is writable");
        }
        for (name, text) in [("dbus.socket", DBUS_SOCKET), ("dbus.service", DBUS_SERVICE)] {
            fs::write(format!("{units}/{name}"), text).expect("/run is writable");
        }
        let controllers = fs::read_to_string(format!("{CGROUP_ROOT}/cgroup.subtree_control"));
        let cgroups = cgroups();
        // The shell enters the cgroup before it becomes systemd.
        let enter = format!("echo $$ > {CGROUP_ROOT}/init.scope/cgroup.procs && exec \"$@\"");
        let process = Command::new("sh")
            .args(["-c", &enter, "sh", PROGRAM, "--user", "--unit=dbus.service"])
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", UNITS)
            .env("XDG_CONFIG_HOME", UNITS)
            .env("XDG_RUNTIME_DIR", RUN)
            .env("DBUS_SESSION_BUS_ADDRESS", format!("unix:path={BUS}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("there is a shell");
        let started = Self {
            process,
            cgroups,
            controllers: controllers.expect("cgroup v2"),
        };
        let address = format!("--address=unix:path={BUS}");
        eventually("systemd is on the bus", || {
            let status = [address.as_str(), "status", "org.freedesktop.systemd1"];
            run("busctl", &status).code == Some(0)
        });
        started
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        // An orderly end would take empty cgroups of others with it.
        for ended in [self.process.kill(), self.process.wait().map(drop)] {
            if let Err(error) = ended {
                eprintln!("systemd: {error}");
            }
        }
        for group in cgroups().difference(&self.cgroups) {
            if let Err(error) = end(group) {
                eprintln!("{}: {error}", group.display());
            }
        }
        let enabled = self
            .controllers
            .split_whitespace()
            .map(|name| format!("+{name}"));
        let enabled = enabled.collect::<Vec<_>>().join(" ");
        let subtree = format!("{CGROUP_ROOT}/cgroup.subtree_control");
        if let Err(error) = fs::write(&subtree, enabled) {
            eprintln!("{subtree}: {error}");
        }
        for directory in DIRECTORIES {
            if let Err(error) = fs::remove_dir_all(directory) {
                eprintln!("{directory}: {error}");
            }
        }
    }
}

/// Those at the top of the tree.
fn cgroups() -> BTreeSet<PathBuf> {
    directories(Path::new(CGROUP_ROOT)).collect()
}

fn directories(path: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
}

/// Ends what is in a cgroup, and removes it with those below.
fn end(group: &Path) -> io::Result<()> {
    fs::write(group.join("cgroup.kill"), "1")?;
    for below in directories(group) {
        end(&below)?;
    }
    let deadline = Instant::now() + END;
    loop {
        match fs::remove_dir(group) {
            // Until the kernel is done with its last process.
            Err(error) if error.kind() == ErrorKind::ResourceBusy && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            result => return result,
        }
    }
}
