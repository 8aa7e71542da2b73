//! The one configuration file, `nacre.toml`.
//!
//! `config/nacre.toml` of the source tree is compiled in and *is* the defaults:
//! [`Config::default`] parses it, so what an administrator reads there cannot
//! differ from what the program does. A file on the host is laid over it key by
//! key. Whoever made a mistake gets one line that says where, what and what
//! would be right:
//!
//! ```text
//! /etc/nacre/nacre.toml:12: default_vcpus: 0 is out of range; allowed: 1 to 32
//! ```

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use nacre_protocol::vm::PciOptions;
use nacre_vmm::vfio::open::Api;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::devices::DriverImage;

/// Where the configuration is read from.
pub const CONFIG_PATH: &str = "/etc/nacre/nacre.toml";
/// Environment variable that names another file.
pub const CONFIG_ENV: &str = "NACRE_CONFIG";

/// The file that is compiled in.
pub(crate) const DEFAULTS: &str = include_str!("../../config/nacre.toml");
const DEFAULTS_NAME: &str = "config/nacre.toml";
const LOG_LEVELS: [&str; 5] = ["error", "warn", "info", "debug", "trace"];

/// Errors of [`Config::load`]; each is one line.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is there but cannot be read.
    #[error("{}: cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("{file}:{line}: {problem}; allowed: TOML, see https://toml.io")]
    Syntax {
        /// File name.
        file: String,
        /// Line, from 1.
        line: usize,
        /// The parser's message.
        problem: String,
    },
    /// A key or its value is wrong.
    #[error("{file}:{line}: {key}: {problem}; allowed: {allowed}")]
    Key {
        /// File name.
        file: String,
        /// Line, from 1.
        line: usize,
        /// The key as written.
        key: String,
        /// What is wrong.
        problem: String,
        /// What would be right.
        allowed: String,
    },
}

/// The configuration; the keys are explained in `config/nacre.toml`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Guest kernel.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: PathBuf,
    /// virtio-fs daemon.
    pub virtiofsd: PathBuf,
    /// vCPUs of a pod without a CPU limit.
    pub default_vcpus: u8,
    /// vCPUs that a pod which runs can have.
    pub max_vcpus: u8,
    /// Memory of a pod without a memory limit.
    pub default_memory_mib: u32,
    /// What the pod's host cgroup may use beyond the guest's memory.
    pub overhead_memory_mib: u32,
    /// Processor time it may use beyond the containers' limit, in thousandths of one.
    pub overhead_cpu_millis: u32,
    /// Back guest memory with 2 MiB pages.
    pub hugepages: bool,
    /// Block devices the containers of a pod can have at once.
    pub pod_disks: u8,
    /// Disks for root file systems of containers that join a pod.
    pub root_disks: u8,
    /// Devices of the host that containers which join a pod can bring.
    pub pci_slots: u8,
    /// Whether guests see the expansion ROMs of devices.
    pub pci_roms: bool,
    /// Whether devices of a pod reach each other's BARs by DMA.
    pub pci_peers: bool,
    /// By which of VFIO's interfaces devices are used.
    pub vfio_api: Api,
    /// Queue pairs of each network interface.
    pub net_queues: u16,
    /// First numeric user id for monitors.
    pub uid_base: u32,
    /// Number of such ids.
    pub uid_count: u32,
    /// Whether annotations may ask for PCI devices.
    pub device_annotations: bool,
    /// Where kubelet tells which devices it has given to a pod; none: it is not asked.
    pub pod_resources_socket: Option<PathBuf>,
    /// State of running pods.
    pub run_dir: PathBuf,
    /// Time until the agent must have answered.
    pub boot_timeout_seconds: u64,
    /// Time a guest may leave the shim without an answer; 0: any.
    pub hang_timeout_seconds: u64,
    /// Log level, a `tracing` level name.
    pub log_level: String,
    /// Write the guest's console to a file.
    pub debug_console: bool,
    /// The shell of `nacre console`; none: there is no console.
    pub debug_shell: Option<PathBuf>,
    /// Driver images, in the order of the file.
    pub drivers: Vec<DriverImage>,
}

impl Default for Config {
    fn default() -> Self {
        let mut config = Self::blank();
        // A test keeps the compiled-in file free of errors.
        config
            .apply(DEFAULTS, DEFAULTS_NAME)
            .expect("the compiled-in configuration is valid");
        config
    }
}

impl Config {
    /// Reads the configuration file, or the one `NACRE_CONFIG` names. Without a
    /// file the defaults hold.
    ///
    /// # Errors
    ///
    /// An unreadable file, or the first mistake in it.
    pub fn load() -> Result<Self, ConfigError> {
        Self::load_from(&Self::path())
    }

    /// What guests with PCI devices have only if it is wanted.
    pub fn pci_options(&self) -> PciOptions {
        PciOptions {
            roms: self.pci_roms,
            peers: self.pci_peers,
        }
    }

    /// The file [`Config::load`] reads.
    pub fn path() -> PathBuf {
        std::env::var_os(CONFIG_ENV).map_or_else(|| PathBuf::from(CONFIG_PATH), PathBuf::from)
    }

    /// Reads a given file; see [`Config::load`].
    ///
    /// # Errors
    ///
    /// Those of [`Config::load`].
    pub fn load_from(path: &Path) -> Result<Self, ConfigError> {
        let mut config = Self::default();
        match std::fs::read_to_string(path) {
            Ok(text) => config.apply(&text, &path.display().to_string())?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => {
                return Err(ConfigError::Read {
                    path: path.into(),
                    source,
                });
            }
        }
        Ok(config)
    }

    fn blank() -> Self {
        Self {
            kernel: PathBuf::new(),
            initrd: PathBuf::new(),
            virtiofsd: PathBuf::new(),
            default_vcpus: 0,
            max_vcpus: 0,
            default_memory_mib: 0,
            overhead_memory_mib: 0,
            overhead_cpu_millis: 0,
            hugepages: false,
            pod_disks: 0,
            root_disks: 0,
            pci_slots: 0,
            pci_roms: false,
            pci_peers: false,
            vfio_api: Api::default(),
            net_queues: 0,
            uid_base: 0,
            uid_count: 0,
            device_annotations: false,
            pod_resources_socket: None,
            run_dir: PathBuf::new(),
            boot_timeout_seconds: 0,
            hang_timeout_seconds: 0,
            log_level: String::new(),
            debug_console: false,
            debug_shell: None,
            drivers: Vec::new(),
        }
    }

    /// Lays the keys of `text` over this configuration.
    fn apply(&mut self, text: &str, file: &str) -> Result<(), ConfigError> {
        let table = DeTable::parse(text).map_err(|error| ConfigError::Syntax {
            file: file.into(),
            line: line_of(text, error.span().map_or(0, |span| span.start)),
            problem: one_line(error.message()),
        })?;
        // In the order of the file, so that the first mistake is the one reported.
        let mut entries: Vec<_> = table.get_ref().iter().collect();
        entries.sort_by_key(|(key, _)| key.span().start);
        for (key, value) in entries {
            let result = KEYS.iter().find(|known| known.name == key.get_ref());
            let result = match result {
                Some(known) => (known.set)(self, value).map_err(|problem| {
                    let allowed = known.kind.allowed();
                    (problem, allowed)
                }),
                None => Err(("no such key".to_owned(), known_keys())),
            };
            result.map_err(|(problem, allowed)| ConfigError::Key {
                file: file.into(),
                line: line_of(text, key.span().start),
                key: one_line(key.get_ref()),
                problem,
                allowed,
            })?;
        }
        Ok(())
    }
}

/// What a key accepts.
enum Kind {
    Path,
    InstalledPath,
    OptionalPath,
    Bool,
    Number(RangeInclusive<i64>),
    Word(&'static [&'static str]),
    Drivers,
}

impl Kind {
    fn allowed(&self) -> String {
        match self {
            Self::Path => "an absolute path in quotes".into(),
            Self::InstalledPath => "a path in quotes".into(),
            Self::OptionalPath => "an absolute path in quotes, or \"\"".into(),
            Self::Bool => "true or false".into(),
            Self::Number(range) => format!("{} to {}", range.start(), range.end()),
            Self::Word(words) => format!("\"{}\"", words.join("\", \"")),
            Self::Drivers => {
                "lines of \"vendor:device:class\" = \"path\", where each of the three is four \
                 hexadecimal digits, x for any digit, or nothing"
                    .into()
            }
        }
    }
}

type Setter = fn(&mut Config, &Spanned<DeValue<'_>>) -> Result<(), String>;

struct Key {
    name: &'static str,
    kind: Kind,
    set: Setter,
}

macro_rules! key {
    ($field:ident, path) => {
        Key {
            name: stringify!($field),
            kind: Kind::Path,
            set: |config, value| path(value).map(|path| config.$field = path),
        }
    };
    ($field:ident, installed_path) => {
        Key {
            name: stringify!($field),
            kind: Kind::InstalledPath,
            set: |config, value| installed_path(value).map(|path| config.$field = path),
        }
    };
    ($field:ident, optional_path) => {
        Key {
            name: stringify!($field),
            kind: Kind::OptionalPath,
            set: |config, value| optional_path(value).map(|path| config.$field = path),
        }
    };
    ($field:ident, bool) => {
        Key {
            name: stringify!($field),
            kind: Kind::Bool,
            set: |config, value| boolean(value).map(|value| config.$field = value),
        }
    };
    ($field:ident, $range:expr) => {
        Key {
            name: stringify!($field),
            kind: Kind::Number($range),
            set: |config, value| {
                let number = number(value, &$range)?;
                config.$field = number
                    .try_into()
                    .map_err(|_| format!("{number} is out of range"))?;
                Ok(())
            },
        }
    };
}

/// Every key there is, in the order of `config/nacre.toml`.
const KEYS: [Key; 27] = [
    key!(kernel, installed_path),
    key!(initrd, installed_path),
    key!(virtiofsd, path),
    key!(default_vcpus, 1..=32),
    key!(max_vcpus, 1..=32),
    key!(default_memory_mib, 128..=1_048_576),
    key!(overhead_memory_mib, 0..=4096),
    key!(overhead_cpu_millis, 0..=4000),
    key!(hugepages, bool),
    key!(pod_disks, 0..=16),
    key!(root_disks, 0..=8),
    key!(pci_slots, 0..=8),
    key!(pci_roms, bool),
    key!(pci_peers, bool),
    Key {
        name: "vfio_api",
        kind: Kind::Word(&Api::NAMES),
        set: |config, value| {
            let name = word(value, &Api::NAMES)?;
            config.vfio_api = Api::named(name).ok_or("no interface has this name")?;
            Ok(())
        },
    },
    key!(net_queues, 1..=16),
    key!(uid_base, 65_536..=4_294_000_000),
    key!(uid_count, 1..=1_000_000),
    key!(device_annotations, bool),
    key!(pod_resources_socket, optional_path),
    key!(run_dir, path),
    key!(boot_timeout_seconds, 1..=600),
    key!(hang_timeout_seconds, 0..=3600),
    Key {
        name: "log_level",
        kind: Kind::Word(&LOG_LEVELS),
        set: |config, value| {
            config.log_level = word(value, &LOG_LEVELS)?.to_owned();
            Ok(())
        },
    },
    key!(debug_console, bool),
    key!(debug_shell, optional_path),
    Key {
        name: "drivers",
        kind: Kind::Drivers,
        set: |config, value| drivers(value).map(|drivers| config.drivers = drivers),
    },
];

fn known_keys() -> String {
    KEYS.map(|key| key.name).join(", ")
}

fn path(value: &Spanned<DeValue<'_>>) -> Result<PathBuf, String> {
    let value = value.get_ref();
    let text = value.as_str().ok_or_else(|| not_a("path", value))?;
    if Path::new(text).is_absolute() && !text.contains('\0') {
        Ok(text.into())
    } else {
        Err(format!("{text:?} is not an absolute path"))
    }
}

/// A path of the installation this program is of, unless it is absolute: what one
/// version runs is never mixed with files of another.
fn installed_path(value: &Spanned<DeValue<'_>>) -> Result<PathBuf, String> {
    let value = value.get_ref();
    let text = value.as_str().ok_or_else(|| not_a("path", value))?;
    if text.is_empty() || text.contains('\0') {
        return Err(format!("{text:?} is not a path"));
    }
    let tree = program_tree().map_err(|error| format!("cannot find this program: {error}"))?;
    Ok(tree.join(text))
}

/// The directory above that of this program, links resolved: what it was installed
/// with is there.
pub(crate) fn program_tree() -> std::io::Result<PathBuf> {
    let program = std::env::current_exe()?;
    let tree = program.parent().and_then(Path::parent);
    Ok(tree.unwrap_or(Path::new("/")).to_owned())
}

fn optional_path(value: &Spanned<DeValue<'_>>) -> Result<Option<PathBuf>, String> {
    match value.get_ref().as_str() {
        Some("") => Ok(None),
        _ => path(value).map(Some),
    }
}

/// All of the table: what stands in a file is not mixed with the defaults.
fn drivers(value: &Spanned<DeValue<'_>>) -> Result<Vec<DriverImage>, String> {
    let value = value.get_ref();
    let table = value.as_table().ok_or_else(|| not_a("table", value))?;
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    let entries = entries.into_iter().map(|(key, path)| {
        let text = key.get_ref();
        let filter = text.parse();
        Ok(DriverImage {
            filter: filter.map_err(|()| format!("{text:?} names no PCI devices"))?,
            path: installed_path(path).map_err(|problem| format!("{text:?}: {problem}"))?,
        })
    });
    entries.collect()
}

fn boolean(value: &Spanned<DeValue<'_>>) -> Result<bool, String> {
    let value = value.get_ref();
    value.as_bool().ok_or_else(|| not_a("boolean", value))
}

fn number(value: &Spanned<DeValue<'_>>, range: &RangeInclusive<i64>) -> Result<i64, String> {
    let value = value.get_ref();
    let integer = value
        .as_integer()
        .ok_or_else(|| not_a("whole number", value))?;
    match i64::from_str_radix(integer.as_str(), integer.radix()) {
        Ok(number) if range.contains(&number) => Ok(number),
        _ => Err(format!("{integer} is out of range")),
    }
}

fn word<'a>(value: &'a Spanned<DeValue<'_>>, words: &[&str]) -> Result<&'a str, String> {
    let value = value.get_ref();
    let text = value.as_str().ok_or_else(|| not_a("word", value))?;
    if words.contains(&text) {
        Ok(text)
    } else {
        Err(format!("{text:?} is none of the words"))
    }
}

fn not_a(wanted: &str, value: &DeValue<'_>) -> String {
    format!("a {} is not a {wanted}", value.type_str())
}

fn line_of(text: &str, offset: usize) -> usize {
    let before = text.as_bytes().get(..offset).unwrap_or(text.as_bytes());
    1 + before.iter().filter(|&&byte| byte == b'\n').count()
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error_of(text: &str) -> String {
        let error = Config::default().apply(text, "f.toml").unwrap_err();
        error.to_string()
    }

    #[test]
    fn compiled_in_file_names_every_key_once() {
        let mut config = Config::blank();
        config.apply(DEFAULTS, DEFAULTS_NAME).unwrap();
        let table = DeTable::parse(DEFAULTS).unwrap();
        let mut named: Vec<_> = table
            .get_ref()
            .keys()
            .map(|key| key.get_ref().to_string())
            .collect();
        let mut known: Vec<_> = KEYS.map(|key| key.name.to_owned()).into();
        named.sort();
        known.sort();
        assert_eq!(named, known);
        assert_eq!(config, Config::default());
        assert_eq!(config.default_memory_mib, 512);
    }

    #[test]
    fn unreadable_file_is_no_missing_file() {
        let directory = tempfile::tempdir().unwrap();
        let error = Config::load_from(directory.path()).unwrap_err();
        let path = directory.path().display().to_string();
        assert!(error.to_string().contains(&path), "{error}");
    }

    #[test]
    fn missing_file_means_defaults() {
        let config = Config::load_from(Path::new("/nonexistent/nacre.toml")).unwrap();
        assert_eq!(config, Config::default());
    }

    #[test]
    fn keys_are_laid_over_the_defaults() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nacre.toml");
        std::fs::write(&path, "default_vcpus = 0x10\nlog_level = 'debug'\n").unwrap();
        let config = Config::load_from(&path).unwrap();
        assert_eq!(config.default_vcpus, 16);
        assert_eq!(config.log_level, "debug");
        assert_eq!(config.kernel, Config::default().kernel);
    }

    #[test]
    fn options_of_devices_are_those_of_the_keys() {
        for (key, roms, peers) in [("pci_roms", true, false), ("pci_peers", false, true)] {
            let mut config = Config::default();
            assert_eq!(config.pci_options(), PciOptions::default());
            config.apply(&format!("{key} = true"), "f.toml").unwrap();
            assert_eq!(config.pci_options(), PciOptions { roms, peers });
        }
    }

    #[test]
    fn interface_of_vfio_is_one_of_those_there_are() {
        let mut config = Config::default();
        assert_eq!(config.vfio_api, Api::Auto);
        config.apply("vfio_api = 'iommufd'", "f.toml").unwrap();
        assert_eq!(config.vfio_api, Api::Iommufd);
        let error = error_of("vfio_api = 'groups'");
        let what = "f.toml:1: vfio_api: \"groups\" is none of the words; allowed: \"auto\", \"group\", \"iommufd\"";
        assert_eq!(error, what);
    }

    #[test]
    fn kernel_is_of_the_programs_tree_or_anywhere() {
        let mut config = Config::default();
        let program = std::env::current_exe().unwrap();
        let tree = program.parent().unwrap().parent().unwrap();
        assert_eq!(config.kernel, tree.join("share/nacre/vmlinux"));
        assert_eq!(config.initrd, tree.join("share/nacre/initrd.img"));
        config.apply("kernel = '/boot/vmlinux'", "f.toml").unwrap();
        assert_eq!(config.kernel, Path::new("/boot/vmlinux"));
        assert_eq!(
            error_of("initrd = ''"),
            "f.toml:1: initrd: \"\" is not a path; allowed: a path in quotes"
        );
    }

    #[test]
    fn no_shell_and_a_shell() {
        let mut config = Config::default();
        assert_eq!(config.debug_shell, None);
        config
            .apply("debug_shell = '/bin/busybox'", "f.toml")
            .unwrap();
        assert_eq!(config.debug_shell, Some("/bin/busybox".into()));
        config.apply("debug_shell = ''", "f.toml").unwrap();
        assert_eq!(config.debug_shell, None);
    }

    #[test]
    fn drivers_are_tried_in_the_order_of_the_file() {
        let mut config = Config::default();
        let program = std::env::current_exe().unwrap();
        let tree = program.parent().unwrap().parent().unwrap();
        let [nvme] = config.drivers.as_slice() else {
            panic!("{:?}", config.drivers);
        };
        assert_eq!(nvme.path, tree.join("share/nacre/drivers/nvme.erofs"));
        let text = "[drivers]\n'::0108' = '/b'\n'10de::03xx' = '/a'\n'144d:' = 'share/c'\n";
        config.apply(text, "f.toml").unwrap();
        let paths: Vec<_> = config.drivers.iter().map(|image| &image.path).collect();
        assert_eq!(
            paths,
            ["/b".as_ref(), "/a".as_ref(), &*tree.join("share/c")]
        );
        config.apply("[drivers]", "f.toml").unwrap();
        assert!(config.drivers.is_empty(), "an empty table is none");

        let error = error_of("hugepages = true\n[drivers]\n10de = '/a'\n");
        assert!(
            error.starts_with("f.toml:2: drivers: \"10de\" names no PCI devices; allowed: lines"),
            "{error}"
        );
        let error = error_of("[drivers]\n'10de:' = true\n");
        assert!(
            error.contains("\"10de:\": a boolean is not a path"),
            "{error}"
        );
        assert!(error_of("drivers = 'nvme'").contains("a string is not a table"));
    }

    #[test]
    fn mistakes_are_one_line_each() {
        assert_eq!(
            error_of("# c\ndefault_vcpus = 0\n"),
            "f.toml:2: default_vcpus: 0 is out of range; allowed: 1 to 32"
        );
        assert_eq!(
            error_of("hugepages = 'yes'"),
            "f.toml:1: hugepages: a string is not a boolean; allowed: true or false"
        );
        assert_eq!(
            error_of("virtiofsd = 'virtiofsd'"),
            "f.toml:1: virtiofsd: \"virtiofsd\" is not an absolute path; allowed: an absolute path in quotes"
        );
        assert_eq!(
            error_of("debug_shell = true"),
            "f.toml:1: debug_shell: a boolean is not a path; allowed: an absolute path in quotes, or \"\""
        );
        assert!(error_of("\n\nlog_level = 'loud'").starts_with("f.toml:3: log_level: "));
        assert!(
            error_of("colour = 1").starts_with("f.toml:1: colour: no such key; allowed: kernel, ")
        );
        assert!(error_of("a = = 1").starts_with("f.toml:1: "));
        assert!(!error_of("a = = 1").contains('\n'));
    }

    #[test]
    fn first_mistake_of_the_file_is_reported() {
        assert!(error_of("zebra = 1\napple = 2\n").contains(":1: zebra"));
    }
}
