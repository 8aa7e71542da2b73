//! Installations below a temporary directory.

use std::collections::BTreeMap;
use std::process::{Child, Command};

use super::*;
use crate::rundir::{Proc, State};

const DROP_IN: &str = "etc/containerd/conf.d/nacre.toml";
const CONTAINERD: &str = "etc/containerd/config.toml";
const NACRE: &str = "etc/nacre/nacre.toml";
const WITH_IMPORTS: &str = "version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n";

/// A host's root directory and a stage beside it.
struct Host {
    directory: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let host = Self {
            directory: tempfile::tempdir().unwrap(),
        };
        fs::create_dir(host.path("")).unwrap();
        host.stage("one");
        host
    }

    fn path(&self, path: &str) -> PathBuf {
        self.directory.path().join("root").join(path)
    }

    fn tree(&self) -> PathBuf {
        self.directory.path().join("stage")
    }

    /// Makes the stage one of another version. The shim is a program that can run.
    fn stage(&self, kernel: &str) {
        let tree = self.tree();
        fs::create_dir_all(tree.join("bin")).unwrap();
        fs::create_dir_all(tree.join("share/nacre/drivers")).unwrap();
        fs::copy("/bin/sleep", tree.join(FILES[0].0)).unwrap();
        for (name, text) in [
            (FILES[1].0, "nacre"),
            (FILES[2].0, kernel),
            (FILES[3].0, "agent"),
            (FILES[4].0, "driver"),
        ] {
            fs::write(tree.join(name), text).unwrap();
        }
    }

    fn write(&self, path: &str, text: &str) {
        fs::create_dir_all(self.path(path).parent().unwrap()).unwrap();
        fs::write(self.path(path), text).unwrap();
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap()
    }

    fn place(&self) -> Place {
        Place {
            prefix: "/usr/local".into(),
            root: self.path(""),
        }
    }

    fn try_install(&self) -> Result<String, CliError> {
        let mut out = Vec::new();
        install(&self.place(), &self.tree(), &mut out)?;
        Ok(String::from_utf8(out).unwrap())
    }

    fn install(&self) -> String {
        self.try_install().unwrap()
    }

    fn try_uninstall(&self, is_forced: bool) -> Result<String, CliError> {
        let mut out = Vec::new();
        uninstall(&self.place(), is_forced, &mut out)?;
        Ok(String::from_utf8(out).unwrap())
    }

    fn uninstall(&self) -> String {
        self.try_uninstall(false).unwrap()
    }

    /// Every path of the host with its mode and what it holds.
    fn snapshot(&self) -> BTreeMap<PathBuf, (u32, String)> {
        let mut found = BTreeMap::new();
        let mut directories = vec![self.path("")];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(&directory).unwrap() {
                let path = entry.unwrap().path();
                let metadata = fs::symlink_metadata(&path).unwrap();
                let content = if metadata.is_dir() {
                    directories.push(path.clone());
                    String::new()
                } else if metadata.is_symlink() {
                    fs::read_link(&path).unwrap().display().to_string()
                } else {
                    String::from_utf8_lossy(&fs::read(&path).unwrap()).into_owned()
                };
                found.insert(path, (metadata.mode(), content));
            }
        }
        found
    }

    /// Directories of versions.
    fn versions(&self) -> usize {
        let entries = fs::read_dir(self.path("usr/local/lib/nacre")).unwrap();
        let kinds = entries.map(|entry| entry.unwrap().file_type().unwrap());
        kinds.filter(fs::FileType::is_dir).count()
    }

    fn current(&self) -> PathBuf {
        self.path("usr/local/lib/nacre/current")
            .canonicalize()
            .unwrap()
    }

    /// A process of the version that is installed, started by its usual name.
    fn run_shim(&self) -> Shim {
        let shim = self.path("usr/local/bin/containerd-shim-nacre-v2");
        loop {
            // Another test's child may hold what was open while this one's program was
            // written, until it has become a program of its own (execve(2), ETXTBSY).
            match Command::new(&shim).arg("60").spawn() {
                Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy => (),
                child => return Shim(child.unwrap()),
            }
        }
    }
}

struct Shim(Child);

impl Drop for Shim {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn fresh_host_gets_everything() {
    let host = Host::new();
    host.write(CONTAINERD, WITH_IMPORTS);
    let said = host.install();
    for (name, mode) in FILES {
        let installed = host.path("usr/local").join(name);
        assert_eq!(
            fs::read(&installed).unwrap(),
            fs::read(host.tree().join(name)).unwrap()
        );
        assert_eq!(
            fs::metadata(&installed).unwrap().mode() & 0o7777,
            mode,
            "{name}"
        );
        assert!(
            installed
                .canonicalize()
                .unwrap()
                .starts_with(host.current())
        );
    }
    assert_eq!(host.read(NACRE), DEFAULTS);
    assert_eq!(host.read(DROP_IN), containerd::DROP_IN);
    for part in [
        "installed 0.",
        "wrote /etc/nacre/nacre.toml",
        "conf.d/nacre.toml; restart",
        "nacre check",
    ] {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
    // Links hold wherever the root is in the end.
    for link in LINKS {
        let target = fs::read_link(host.path("usr/local").join(link)).unwrap();
        assert!(target.is_relative(), "{target:?}");
    }
}

#[test]
fn installing_again_changes_nothing() {
    let host = Host::new();
    host.write(CONTAINERD, WITH_IMPORTS);
    host.install();
    let before = host.snapshot();
    let inode = |name| fs::metadata(host.current().join(name)).unwrap().ino();
    let shim = inode(FILES[0].0);
    let said = host.install();
    assert_eq!(host.snapshot(), before);
    assert_eq!(inode(FILES[0].0), shim);
    assert!(
        !said.contains("wrote") && !said.contains("removed"),
        "{said}"
    );
}

#[test]
fn upgrade_leaves_what_runs_alone_until_nothing_does() {
    let host = Host::new();
    host.install();
    let old = host.current();
    let shim = host.run_shim();
    host.stage("two");
    let said = host.install();
    let name = old.file_name().unwrap().to_str().unwrap();
    let pid = shim.0.id();
    assert!(
        said.contains(&format!("kept {name}: process {pid} runs it")),
        "{said}"
    );
    assert_ne!(host.current(), old);
    assert_eq!(host.read("usr/local/share/nacre/vmlinux"), "two");
    assert_eq!(
        fs::read_to_string(old.join("share/nacre/vmlinux")).unwrap(),
        "one"
    );
    let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    assert_eq!(program, old.join(FILES[0].0));

    drop(shim);
    let said = host.install();
    assert!(said.contains(&format!("removed {name}")), "{said}");
    assert!(!old.exists());
    assert_eq!(host.versions(), 1);
}

#[test]
fn uninstall_restores_what_was_there() {
    for containerd in [WITH_IMPORTS, "version = 3\n"] {
        let host = Host::new();
        host.write(CONTAINERD, containerd);
        host.write("usr/local/bin/other", "a user's");
        host.write("etc/containerd/conf.d/other.toml", "version = 3\n");
        fs::create_dir_all(host.path("usr/local/lib/empty")).unwrap();
        let before = host.snapshot();
        host.install();
        host.stage("two");
        host.install();
        assert_ne!(host.snapshot(), before);
        let said = host.uninstall();
        assert_eq!(host.snapshot(), before, "{said}");
        let said = host.uninstall();
        assert!(
            said.contains("nothing is installed in /usr/local/lib/nacre"),
            "{said}"
        );
        assert_eq!(host.snapshot(), before);
    }
}

#[test]
fn empty_directories_that_were_there_stay() {
    let host = Host::new();
    for directory in ["etc/nacre", "usr/local/bin", "usr/local/lib/nacre"] {
        fs::create_dir_all(host.path(directory)).unwrap();
    }
    let before = host.snapshot();
    host.install();
    host.uninstall();
    assert_eq!(host.snapshot(), before);
}

#[test]
fn edited_configuration_is_kept() {
    let host = Host::new();
    host.write(CONTAINERD, WITH_IMPORTS);
    host.install();
    for file in [NACRE, DROP_IN] {
        host.write(file, "# mine\n");
    }
    let said = host.install();
    assert!(
        said.contains("kept /etc/containerd/conf.d/nacre.toml"),
        "{said}"
    );
    let said = host.uninstall();
    for file in [NACRE, DROP_IN] {
        assert_eq!(host.read(file), "# mine\n");
        assert!(said.contains(&format!("kept /{file}: edited")), "{said}");
    }
    assert!(!host.path("usr").exists());
}

#[test]
fn configuration_of_the_user_is_kept() {
    let host = Host::new();
    host.write(NACRE, "default_vcpus = 2\n");
    host.write(CONTAINERD, WITH_IMPORTS);
    host.write(DROP_IN, "# mine\nversion = 3\n");
    let before = host.snapshot();
    let said = host.install();
    assert!(
        said.contains("kept /etc/containerd/conf.d/nacre.toml"),
        "{said}"
    );
    assert_eq!(host.read(NACRE), "default_vcpus = 2\n");
    assert_eq!(host.read(DROP_IN), "# mine\nversion = 3\n");
    host.uninstall();
    assert_eq!(host.snapshot(), before);
}

/// Leaves a file as an earlier version wrote it.
fn write_earlier(host: &Host, file: &str, text: &str) {
    let place = host.place();
    let mut record = Record::open(&place.root, &place.library()).unwrap();
    let file = Path::new("/").join(file);
    assert_eq!(record.write(&file, text).unwrap(), Written::Now);
}

#[test]
fn files_of_an_earlier_version_are_brought_up_to_date() {
    let host = Host::new();
    host.write(CONTAINERD, WITH_IMPORTS);
    write_earlier(&host, DROP_IN, "# earlier\n");
    // With a key that there is no longer.
    write_earlier(&host, NACRE, "colour = 'red'\n");
    let said = host.install();
    for file in [DROP_IN, NACRE] {
        assert!(said.contains(&format!("wrote /{file}")), "{said}");
    }
    assert_eq!(host.read(DROP_IN), containerd::DROP_IN);
    assert_eq!(host.read(NACRE), DEFAULTS);
}

/// A version that would refuse every pod does not come into the place of one that runs them.
#[test]
fn edited_configuration_that_this_version_refuses_keeps_the_earlier_one() {
    let host = Host::new();
    host.install();
    host.write(NACRE, "default_vcpus = 2\n# mine\ncolour = 'red'\n");
    host.stage("two");
    let before = host.snapshot();
    let error = crate::error::chain(&host.try_install().unwrap_err());
    for part in [
        "correct or remove that line",
        "etc/nacre/nacre.toml:3: colour: no such key",
    ] {
        assert!(error.contains(part), "no {part:?} in {error}");
    }
    assert_eq!(host.snapshot(), before);
    host.write(NACRE, "default_vcpus = 2\n");
    host.install();
    assert_eq!(host.read("usr/local/share/nacre/vmlinux"), "two");
    assert_eq!(host.read(NACRE), "default_vcpus = 2\n");
}

#[test]
fn link_to_the_same_text_is_a_user_s() {
    let host = Host::new();
    host.install();
    let file = host.path(NACRE);
    host.write("opt/nacre.toml", DEFAULTS);
    fs::remove_file(&file).unwrap();
    std::os::unix::fs::symlink(host.path("opt/nacre.toml"), &file).unwrap();
    host.install();
    let said = host.uninstall();
    assert!(said.contains("kept /etc/nacre/nacre.toml"), "{said}");
    assert!(file.is_symlink());
}

#[test]
fn containerd_that_needs_a_person_is_not_touched() {
    let named = "version = 3\n[plugins.x]\nruntime_type = 'io.containerd.nacre.v2'\n";
    for (config, told) in [
        (None, "there is no /etc/containerd/config.toml"),
        (
            Some("version = 3\n"),
            "imports = ['/etc/containerd/conf.d/*.toml']",
        ),
        (
            Some("imports = ['/etc/containerd/conf.d/*.toml']\n"),
            "has no `version`",
        ),
        (
            Some("version = 2\nimports = ['/etc/containerd/conf.d/*.toml']\n"),
            "io.containerd.grpc.v1.cri",
        ),
        (
            Some(named),
            "has the runtime in /etc/containerd/config.toml",
        ),
    ] {
        let host = Host::new();
        if let Some(text) = config {
            host.write(CONTAINERD, text);
        }
        let said = host.install();
        assert!(said.contains(told), "no {told:?} in {said}");
        assert!(!host.path(DROP_IN).exists(), "{config:?}");
        assert_eq!(config.map(|_| host.read(CONTAINERD)).as_deref(), config);
    }
    // What a person wrote only a person can take back.
    let host = Host::new();
    host.write(CONTAINERD, named);
    host.install();
    assert!(host.uninstall().contains("remove it there"));
}

#[test]
fn nothing_is_changed_where_it_cannot_be_right() {
    let refused = |prepare: &dyn Fn(&Host), part: &str| {
        let host = Host::new();
        prepare(&host);
        let before = host.snapshot();
        let error = crate::error::chain(&host.try_install().unwrap_err());
        assert!(error.contains(part), "no {part:?} in {error}");
        assert_eq!(host.snapshot(), before);
    };
    let earlier = |host: &Host| host.write("usr/local/bin/nacre", "make install's");
    refused(
        &earlier,
        "usr/local/bin/nacre is there and not by `nacre install`",
    );
    let foreign = |host: &Host| {
        fs::create_dir_all(host.path("usr/local/share")).unwrap();
        std::os::unix::fs::symlink("/opt", host.path("usr/local/share/nacre")).unwrap();
    };
    refused(&foreign, "usr/local/share/nacre is there");
    refused(&|host| host.write(CONTAINERD, "version = = 3"), "not TOML");
    let incomplete = |host: &Host| fs::remove_file(host.tree().join(FILES[2].0)).unwrap();
    refused(&incomplete, "share/nacre/vmlinux: No such file");
    let host = Host::new();
    let relative = Place {
        prefix: "usr".into(),
        ..host.place()
    };
    let error = install(&relative, &host.tree(), &mut Vec::new()).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("--prefix usr: not an absolute path")
    );
}

#[test]
fn pods_forbid_to_uninstall_unless_forced() {
    let host = Host::new();
    host.install();
    let pod = host.path("run/nacre/k8s.io/abc");
    fs::create_dir_all(&pod).unwrap();
    let state = State {
        daemon: Proc::of(std::process::id()),
        ..State::default()
    };
    fs::write(pod.join("state.json"), serde_json::to_vec(&state).unwrap()).unwrap();
    let before = host.snapshot();
    let error = host.try_uninstall(false).unwrap_err().to_string();
    assert!(
        error.contains("k8s.io/abc") && error.contains("--force"),
        "{error}"
    );
    assert_eq!(host.snapshot(), before);
    host.try_uninstall(true).unwrap();
    assert!(!host.path("usr").exists());
}

/// What cannot be read may be a pod's all the same.
#[test]
fn pods_without_a_readable_state_forbid_to_uninstall() {
    for state in [None, Some("{")] {
        let host = Host::new();
        host.install();
        fs::create_dir_all(host.path("run/nacre/.uids/x")).unwrap();
        let pod = host.path("run/nacre/k8s.io/abc");
        fs::create_dir_all(&pod).unwrap();
        if let Some(state) = state {
            fs::write(pod.join("state.json"), state).unwrap();
        }
        let error = host.try_uninstall(false).unwrap_err().to_string();
        assert!(error.starts_with("pods are here: k8s.io/abc;"), "{error}");
        fs::remove_dir_all(pod).unwrap();
        host.uninstall();
    }
}

#[test]
fn processes_forbid_to_uninstall_unless_forced() {
    let host = Host::new();
    host.install();
    let shim = host.run_shim();
    let error = host.try_uninstall(false).unwrap_err().to_string();
    let pid = shim.0.id();
    assert!(
        error.starts_with(&format!("process {pid} runs version 0.")),
        "{error}"
    );
    host.try_uninstall(true).unwrap();
}

/// A version is unused only if nothing else is possible.
#[test]
fn users_of_a_version_that_cannot_be_known() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let version = path("version");
    fs::create_dir_all(version.join("bin")).unwrap();
    fs::write(version.join(FILES[0].0), "").unwrap();
    let error = user_of(&version, &path("proc")).unwrap_err();
    assert!(error.to_string().starts_with("cannot read "), "{error}");

    fs::create_dir_all(path("proc/4000000")).unwrap();
    fs::create_dir_all(path("proc/sys")).unwrap();
    assert_eq!(user_of(&version, &path("proc")).unwrap(), None);
    // Any error but that there is none.
    let link = |target: &Path, pid: &str| {
        fs::create_dir_all(path("proc").join(pid)).unwrap();
        std::os::unix::fs::symlink(target, path("proc").join(pid).join("exe")).unwrap();
    };
    link(Path::new("exe"), "4000001");
    let command_line = path("proc/4000001/cmdline");
    for line in [
        None,
        Some("/proc/self/exe\0monitor\0"),
        Some("nacre\0logs\0"),
    ] {
        if let Some(line) = line {
            fs::write(&command_line, line).unwrap();
        }
        let error = user_of(&version, &path("proc")).unwrap_err();
        assert!(error.to_string().ends_with("4000001/exe"), "{error}");
    }
    fs::write(&command_line, "/sbin/init\0").unwrap();
    assert_eq!(user_of(&version, &path("proc")).unwrap(), None);

    fs::remove_dir_all(path("proc/4000001")).unwrap();
    link(&version.join(FILES[0].0), "4000002");
    assert_eq!(user_of(&version, &path("proc")).unwrap(), Some(4_000_002));
}

#[test]
fn interrupted_installation_is_finished_by_the_next() {
    let host = Host::new();
    host.install();
    let current = host.current();
    let mut unfinished = current.clone().into_os_string();
    unfinished.push(".new");
    fs::rename(&current, &unfinished).unwrap();
    fs::remove_file(Path::new(&unfinished).join(FILES[2].0)).unwrap();
    host.install();
    assert_eq!(host.read("usr/local/share/nacre/vmlinux"), "one");
    assert_eq!(host.versions(), 1);
}
