//! The command line: Go's `flag` syntax, as containerd writes it.
//!
//! `-name value`, `-name=value`, one dash or two; a switch takes a value only
//! after `=`. The action is the first argument that is not a flag.

use std::path::PathBuf;

use super::BootstrapError;

/// What the run is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Make or find the pod's daemon.
    Start,
    /// Clean up from disk.
    Delete,
    /// Be the daemon.
    Serve,
    /// Print the runtime's description.
    Info,
    /// Print the version.
    Version,
}

/// A parsed command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Args {
    /// What the run is for.
    pub action: Action,
    /// containerd namespace.
    pub namespace: String,
    /// containerd's gRPC socket.
    pub address: String,
    /// Container id; for `serve`, the sandbox's.
    pub id: String,
    /// Bundle; the working directory when empty.
    pub bundle: PathBuf,
    /// Address to serve on; only `serve` looks at it.
    pub socket: String,
    /// Log more.
    pub debug: bool,
}

impl Args {
    /// Parses the arguments after the program's name.
    ///
    /// # Errors
    ///
    /// `Usage` for unknown flags, missing values or an unknown action.
    pub fn parse(arguments: &[String]) -> Result<Self, BootstrapError> {
        let mut args = Self {
            action: Action::Version,
            namespace: String::new(),
            address: String::new(),
            id: String::new(),
            bundle: PathBuf::new(),
            socket: String::new(),
            debug: false,
        };
        let mut special = None;
        let mut rest = arguments.iter();
        let mut action = None;
        while let Some(argument) = rest.next() {
            let Some(flag) = argument.strip_prefix('-') else {
                action = Some(argument.as_str());
                break;
            };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            let (name, inline) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            match name {
                "debug" => args.debug = is_on(name, inline.as_deref())?,
                "v" if is_on(name, inline.as_deref())? => special = Some(Action::Version),
                "info" if is_on(name, inline.as_deref())? => special = Some(Action::Info),
                "v" | "info" => (),
                _ => {
                    let value = inline.or_else(|| rest.next().cloned());
                    args.set(name, value)?;
                }
            }
        }
        args.action = match special {
            Some(special) => special,
            None => parse_action(action)?,
        };
        args.check()?;
        Ok(args)
    }

    fn set(&mut self, name: &str, value: Option<String>) -> Result<(), BootstrapError> {
        let value =
            || value.ok_or_else(|| BootstrapError::Usage(format!("flag -{name} needs a value")));
        match name {
            "namespace" => self.namespace = value()?,
            "address" => self.address = value()?,
            "id" => self.id = value()?,
            "bundle" => self.bundle = value()?.into(),
            "socket" => self.socket = value()?,
            // Taken and not needed: events go over ttrpc, and there is no
            // debug socket.
            "publish-binary" | "debug-socket" => drop(value()?),
            _ => return Err(BootstrapError::Usage(format!("unknown flag -{name}"))),
        }
        Ok(())
    }

    /// Namespace and id become directory names.
    fn check(&self) -> Result<(), BootstrapError> {
        if matches!(self.action, Action::Start | Action::Delete | Action::Serve) {
            crate::rundir::check_id(&self.namespace)?;
            crate::rundir::check_id(&self.id)?;
        }
        Ok(())
    }

    /// The bundle: the flag, else the working directory.
    ///
    /// # Errors
    ///
    /// When there is no working directory.
    pub fn bundle(&self) -> Result<PathBuf, BootstrapError> {
        if self.bundle.as_os_str().is_empty() {
            std::env::current_dir().map_err(BootstrapError::io("find the bundle"))
        } else {
            Ok(self.bundle.clone())
        }
    }
}

fn parse_action(action: Option<&str>) -> Result<Action, BootstrapError> {
    match action {
        Some("start") => Ok(Action::Start),
        Some("delete") => Ok(Action::Delete),
        Some("serve") => Ok(Action::Serve),
        Some(other) => Err(BootstrapError::Usage(format!("unknown action {other:?}"))),
        None => Err(BootstrapError::Usage(
            "this program is run by containerd; see the nacre command".into(),
        )),
    }
}

fn is_on(name: &str, inline: Option<&str>) -> Result<bool, BootstrapError> {
    match inline {
        None | Some("true" | "1") => Ok(true),
        Some("false" | "0") => Ok(false),
        Some(other) => Err(BootstrapError::Usage(format!("flag -{name}={other}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, BootstrapError> {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        Args::parse(&words)
    }

    #[test]
    fn containerd_s_command_line() {
        let args = parse(
            "-namespace k8s.io -address /run/containerd/containerd.sock \
             -publish-binary /usr/bin/containerd -id abc -bundle /run/b -debug delete",
        )
        .unwrap();
        assert_eq!(args.action, Action::Delete);
        assert_eq!(args.namespace, "k8s.io");
        assert_eq!(args.id, "abc");
        assert_eq!(args.bundle, PathBuf::from("/run/b"));
        assert!(args.debug);
    }

    #[test]
    fn go_s_other_spellings() {
        let args = parse("--id=abc -namespace=x --debug=false start").unwrap();
        assert_eq!((args.id.as_str(), args.debug), ("abc", false));
        assert_eq!(parse("-v").unwrap().action, Action::Version);
        assert_eq!(parse("-info").unwrap().action, Action::Info);
    }

    #[test]
    fn mistakes_are_told() {
        for line in [
            "",
            "-id",
            "-nonsense 1 start",
            "-id a -namespace b frobnicate",
            "-id ../x -namespace b start",
            "-id a start",
        ] {
            assert!(parse(line).is_err(), "{line:?}");
        }
    }
}
