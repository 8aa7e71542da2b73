//! containerd's own configuration, as far as it decides where nacre's lines go.
//!
//! Drop-ins are files that `imports` of the configuration names. How containerd
//! lays them over the configuration is a matter of its version:
//!
//! | `version` | containerd | a drop-in with a runtime |
//! |---|---|---|
//! | none, 1 | 1.x | would make the whole of it version 2, and void what it says of plugins |
//! | 2 | 1.x or 2.x | 1.x takes it in place of all other settings of CRI |
//! | 3 and later | 2.x | is one runtime more |
//!
//! (`mergeConfig` in containerd's services/server/config of 1.7 and in
//! cmd/containerd/server/config of 2.x.) So a drop-in is written for version 3 and
//! later only, and a person is told which lines to add where otherwise.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::check::SHIM;
use crate::RUNTIME_NAME;

/// The configuration's place on a host.
pub(super) const CONFIG_PATH: &str = "/etc/containerd/config.toml";
/// The drop-in's name in whatever directory is imported.
const DROP_IN_NAME: &str = "nacre.toml";
/// What `imports` may well hold, and does by default from containerd 2.2 on.
const USUAL_IMPORT: &str = "imports = ['/etc/containerd/conf.d/*.toml']";
/// The drop-in for version 3 and later.
pub(super) const DROP_IN: &str = include_str!("../../../config/containerd-2.toml");
/// The same lines for version 2.
const LINES_1_7: &str = include_str!("../../../config/containerd-1.7.toml");

/// The configuration cannot be used; each is one line.
#[derive(Debug, thiserror::Error)]
pub enum ContainerdError {
    /// It is there but cannot be read.
    #[error("{}: cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not TOML, so containerd cannot read it either.
    #[error("{}: not TOML, containerd would not start with it: {problem}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The parser's message.
        problem: String,
    },
}

/// What the configuration says.
#[derive(Debug)]
pub(super) struct ContainerdConfig {
    root: PathBuf,
    version: i64,
    /// As written.
    imports: Vec<String>,
}

/// How containerd gets to know the runtime.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// By a file of this name, below the root.
    DropIn(PathBuf),
    /// By a person, who is told this.
    ByHand(String),
}

impl ContainerdConfig {
    /// Reads that of the host whose file system is at `root`; `None` without one.
    pub(super) fn load(root: &Path) -> Result<Option<Self>, ContainerdError> {
        let path = below(root, Path::new(CONFIG_PATH));
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(ContainerdError::Read { path, source }),
            Ok(text) => text,
        };
        let table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
            let problem = error.message().to_owned();
            ContainerdError::Syntax { path, problem }
        })?;
        let imports = table.get("imports").and_then(toml::Value::as_array);
        let imports = imports
            .into_iter()
            .flatten()
            .filter_map(|item| item.as_str());
        Ok(Some(Self {
            root: root.to_owned(),
            version: table
                .get("version")
                .and_then(toml::Value::as_integer)
                .unwrap_or(1),
            imports: imports.map(str::to_owned).collect(),
        }))
    }

    /// The file that names the runtime, of all that containerd reads.
    pub(super) fn naming_runtime(&self) -> Option<PathBuf> {
        self.file_with(is_ours)
    }

    /// The file that names a runtime whose pods have no VM, though it has the shim's path.
    pub(super) fn without_vm(&self) -> Option<PathBuf> {
        self.file_with(is_without_vm)
    }

    /// The first file with a table that is such a one.
    fn file_with(&self, is_one: fn(&toml::Table) -> bool) -> Option<PathBuf> {
        self.files().into_iter().find(|file| {
            let text = fs::read_to_string(below(&self.root, file));
            let table = text.ok().and_then(|text| text.parse().ok());
            table.is_some_and(|table| has(&table, is_one))
        })
    }

    /// All files that containerd reads, but for those that imported ones import.
    fn files(&self) -> Vec<PathBuf> {
        let mut files = vec![PathBuf::from(CONFIG_PATH)];
        for (directory, pattern) in self.imported() {
            let entries = fs::read_dir(below(&self.root, &directory));
            let names = entries
                .into_iter()
                .flatten()
                .filter_map(Result::ok)
                .map(|entry| entry.file_name().to_string_lossy().into_owned());
            let mut found: Vec<_> = names.filter(|name| matches(&pattern, name)).collect();
            found.sort();
            files.extend(found.iter().map(|name| directory.join(name)));
        }
        files
    }

    /// `imports` as directories and patterns of names. Relative ones are beside the
    /// configuration.
    fn imported(&self) -> impl Iterator<Item = (PathBuf, String)> {
        let base = Path::new(CONFIG_PATH).parent().unwrap_or(Path::new("/"));
        self.imports.iter().filter_map(move |import| {
            let path = base.join(import);
            let pattern = path.file_name()?.to_str()?.to_owned();
            let directory = path.parent()?;
            let is_plain = !directory.to_str()?.contains(['*', '?', '[']);
            is_plain.then(|| (directory.to_owned(), pattern))
        })
    }

    /// How the runtime gets into this configuration.
    pub(super) fn way(&self) -> Way {
        match self.version {
            ..2 => Way::ByHand(format!(
                "{CONFIG_PATH} has no `version`, or 1, and nacre's lines need 2 or later; \
                 bring it to the version of `containerd config default` and run `nacre install` again"
            )),
            2 => Way::ByHand(format!(
                "add these lines to {CONFIG_PATH}, as containerd 1.7 would take a drop-in in \
                 place of all other settings of CRI:\n{}",
                lines_for_version_2()
            )),
            _ => self.drop_in(),
        }
    }

    fn drop_in(&self) -> Way {
        let mut imported = self.imported();
        match imported.find(|(_, pattern)| matches(pattern, DROP_IN_NAME)) {
            Some((directory, _)) => Way::DropIn(directory.join(DROP_IN_NAME)),
            None => Way::ByHand(format!(
                "no `imports` in {CONFIG_PATH} takes a file {DROP_IN_NAME}; add this line at its \
                 top and run `nacre install` again:\n{USUAL_IMPORT}"
            )),
        }
    }
}

/// Whether a table is such a one, or has one in it: runtimes are in whatever plugin's.
fn has(table: &toml::Table, is_one: fn(&toml::Table) -> bool) -> bool {
    let mut values = table.values();
    is_one(table) || values.any(|value| value.as_table().is_some_and(|table| has(table, is_one)))
}

fn text_of<'t>(table: &'t toml::Table, key: &str) -> Option<&'t str> {
    table.get(key)?.as_str()
}

fn has_our_type(runtime: &toml::Table) -> bool {
    text_of(runtime, "runtime_type") == Some(RUNTIME_NAME)
}

fn has_our_path(runtime: &toml::Table) -> bool {
    text_of(runtime, "runtime_path").is_some_and(|path| Path::new(path).ends_with(SHIM))
}

/// By type or by path.
fn is_ours(runtime: &toml::Table) -> bool {
    has_our_type(runtime) || has_our_path(runtime)
}

/// containerd's shim controller looks at the type alone when it makes a sandbox (`Create` of
/// its plugins/sandbox/controller.go), and containers join what runs it: `runtime_path` is
/// not looked at.
fn is_without_vm(runtime: &toml::Table) -> bool {
    // Its name in containerd 1.7 is the second one.
    let mut controllers = ["sandboxer", "sandbox_mode"]
        .map(|key| text_of(runtime, key))
        .into_iter();
    has_our_path(runtime) && !has_our_type(runtime) && controllers.any(|name| name == Some("shim"))
}

/// What a person does on a host without a configuration.
pub(super) fn without_config() -> String {
    format!(
        "there is no {CONFIG_PATH}; make one by `containerd config default`, see that it has \
         {USUAL_IMPORT} at its top if its version is 3 or later, and run `nacre install` again"
    )
}

/// An absolute path of a host whose file system is at `root`.
pub(super) fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// The lines without what is around them in the file.
fn lines_for_version_2() -> String {
    let lines = LINES_1_7.lines().filter(|line| {
        let line = line.trim();
        !line.is_empty() && !line.starts_with('#') && !line.starts_with("version")
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// Whether a file's name is one of a pattern with any number of `*`. Go's other
/// wildcards match nothing here.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, rest)) => name.strip_prefix(start).is_some_and(|name| {
            let mut ends = name.char_indices().map(|(end, _)| end).chain([name.len()]);
            ends.any(|end| matches(rest, &name[end..]))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The configuration of a host in which `files` are.
    fn config(files: &[(&str, &str)]) -> (tempfile::TempDir, ContainerdConfig) {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = below(root.path(), Path::new(path));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let config = ContainerdConfig::load(root.path()).unwrap().unwrap();
        (root, config)
    }

    fn way(text: &str) -> Way {
        config(&[(CONFIG_PATH, text)]).1.way()
    }

    #[track_caller]
    fn told(text: &str, parts: &[&str]) {
        match way(text) {
            Way::ByHand(told) => {
                for part in parts {
                    assert!(told.contains(part), "no {part:?} in {told}");
                }
            }
            Way::DropIn(path) => panic!("a drop-in {path:?}"),
        }
    }

    #[test]
    fn drop_in_goes_where_imports_take_its_name() {
        for (imports, path) in [
            (
                "'/etc/containerd/conf.d/*.toml'",
                "/etc/containerd/conf.d/nacre.toml",
            ),
            ("'/a/runtime_*.toml', '/b/n*.to*'", "/b/nacre.toml"),
            ("'drop-ins/*'", "/etc/containerd/drop-ins/nacre.toml"),
            ("'/c/nacre.toml'", "/c/nacre.toml"),
        ] {
            let text = format!("version = 3\nimports = [{imports}]\n");
            assert_eq!(way(&text), Way::DropIn(path.into()), "{imports}");
        }
        let later = "version = 4\nimports = ['/etc/containerd/conf.d/*.toml']\n";
        assert!(matches!(way(later), Way::DropIn(_)));
    }

    #[test]
    fn person_is_told_where_a_drop_in_cannot_be() {
        let imports = "imports = ['/etc/containerd/conf.d/*.toml']\n";
        told("version = 3\n", &[USUAL_IMPORT, "nacre install"]);
        told(
            "version = 3\nimports = ['/a/x_*.toml', '/b/*/n*']\n",
            &[USUAL_IMPORT],
        );
        told(imports, &["no `version`", "containerd config default"]);
        told(&format!("version = 1\n{imports}"), &["no `version`, or 1"]);
        let lines = "[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.nacre]\n  \
                     runtime_type = 'io.containerd.nacre.v2'\n  privileged_without_host_devices = true";
        told(&format!("version = 2\n{imports}"), &[lines, "1.7"]);
        assert!(without_config().contains(USUAL_IMPORT));
    }

    #[test]
    fn runtime_is_found_in_the_configuration_and_in_what_it_imports() {
        let main = "version = 3\nimports = ['conf.d/*.toml']\n";
        let drop_in = "/etc/containerd/conf.d/any.toml";
        let (_root, found) = config(&[(CONFIG_PATH, main), (drop_in, DROP_IN)]);
        assert_eq!(found.naming_runtime(), Some(drop_in.into()));
        let (_root, none) = config(&[
            (CONFIG_PATH, main),
            (drop_in, "version = 3\n"),
            ("/etc/containerd/conf.d/any.bak", DROP_IN),
        ]);
        assert_eq!(none.naming_runtime(), None);
        for (path, is_ours) in [
            ("/opt/containerd-shim-nacre-v2", true),
            ("/opt/other", false),
        ] {
            let by_path = "[plugins.x.runtimes.y]\nruntime_type = 'io.containerd.runc.v2'";
            let text = format!("version = 3\n{by_path}\nruntime_path = '{path}'\n");
            let (_root, found) = config(&[(CONFIG_PATH, &text)]);
            assert_eq!(found.naming_runtime().is_some(), is_ours, "{path}");
        }
        // containerd reads no comments.
        let comments: String = DROP_IN.lines().map(|line| format!("# {line}\n")).collect();
        let (_root, comments) = config(&[(CONFIG_PATH, main), (drop_in, &comments)]);
        assert_eq!(comments.naming_runtime(), None);
        let (_root, itself) = config(&[(CONFIG_PATH, DROP_IN)]);
        assert_eq!(itself.naming_runtime(), Some(CONFIG_PATH.into()));
    }

    #[test]
    fn path_is_not_looked_at_by_the_shim_s_controller() {
        for (lines, is_found) in [
            (
                "runtime_type = 'io.containerd.runc.v2'\nsandboxer = 'shim'",
                true,
            ),
            (
                "runtime_type = 'io.containerd.runc.v2'\nsandbox_mode = 'shim'",
                true,
            ),
            ("sandboxer = 'shim'", true),
            (
                "runtime_type = 'io.containerd.runc.v2'\nsandboxer = 'podsandbox'",
                false,
            ),
            ("runtime_type = 'io.containerd.runc.v2'", false),
            (
                "runtime_type = 'io.containerd.nacre.v2'\nsandboxer = 'shim'",
                false,
            ),
        ] {
            let path = "runtime_path = '/usr/local/bin/containerd-shim-nacre-v2'";
            let text = format!("version = 3\n[plugins.x.runtimes.y]\n{lines}\n{path}\n");
            let (_root, found) = config(&[(CONFIG_PATH, &text)]);
            assert_eq!(found.without_vm().is_some(), is_found, "{lines}");
        }
        let runc = "[a.runc]\nruntime_type = 'io.containerd.runc.v2'\nsandboxer = 'shim'\n";
        let (_root, found) = config(&[(CONFIG_PATH, runc)]);
        assert_eq!(found.without_vm(), None);
    }

    #[test]
    fn configuration_that_is_none() {
        let root = tempfile::tempdir().unwrap();
        assert!(ContainerdConfig::load(root.path()).unwrap().is_none());
        let path = below(root.path(), Path::new(CONFIG_PATH));
        fs::create_dir_all(&path).unwrap();
        let error = ContainerdConfig::load(root.path()).unwrap_err();
        assert!(matches!(error, ContainerdError::Read { .. }), "{error}");
        fs::remove_dir(&path).unwrap();
        fs::write(&path, "version = = 3").unwrap();
        let error = ContainerdConfig::load(root.path()).unwrap_err().to_string();
        assert!(error.contains("config.toml: not TOML"), "{error}");
    }

    #[test]
    fn patterns_of_names() {
        for (pattern, name, expected) in [
            ("*.toml", "nacre.toml", true),
            ("*", "nacre.toml", true),
            ("n*c*e.toml", "nacre.toml", true),
            ("nacre.toml", "nacre.toml", true),
            ("*.tom", "nacre.toml", false),
            ("x*", "nacre.toml", false),
            ("?acre.toml", "nacre.toml", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    /// What containerd would read if the files in config/ are used as they say.
    #[test]
    fn snippets_are_of_their_versions() {
        let version = |text: &str| text.parse::<toml::Table>().unwrap()["version"].as_integer();
        assert_eq!(version(DROP_IN), Some(3));
        assert_eq!(version(LINES_1_7), Some(2));
    }
}
