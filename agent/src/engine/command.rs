//! Finding the command, with the words containerd's clients expect when it is
//! not there.

use std::ffi::{CString, OsStr};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, access};

use super::error::{InitError, plain};

/// What a shell assumes when PATH is not set.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Finds the file to execute for `name`, as the user the process now is and
/// relative to its working directory.
///
/// # Errors
///
/// `Command`, worded as Go's exec.LookPath words it.
pub fn find(name: &str, env: &[String]) -> Result<PathBuf, InitError> {
    if name.contains('/') {
        let path = PathBuf::from(name);
        return match check(&path) {
            Ok(()) => Ok(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(InitError::Command(
                format!("exec: {name:?}: stat {name}: no such file or directory"),
            )),
            Err(error) => Err(failed(name, &error)),
        };
    }
    let path = env
        .iter()
        .rev()
        .find_map(|entry| entry.strip_prefix("PATH="))
        .unwrap_or(DEFAULT_PATH);
    std::env::split_paths(path)
        .map(|directory| Path::new("").join(directory).join(name))
        .find(|candidate| check(candidate).is_ok())
        .ok_or_else(|| {
            InitError::Command(format!(
                "exec: {name:?}: executable file not found in $PATH"
            ))
        })
}

/// The error of an execve(2) that failed although the file was found.
#[must_use]
pub fn failed(name: &str, error: &io::Error) -> InitError {
    InitError::Command(format!("exec: {name:?}: {}", plain(error)))
}

fn check(path: &Path) -> io::Result<()> {
    if fs::metadata(path)?.is_dir() {
        return Err(nix::errno::Errno::EISDIR.into());
    }
    Ok(access(path, AccessFlags::X_OK)?)
}

/// Strings for execve(2).
///
/// # Errors
///
/// `Invalid` if one holds a NUL.
pub fn c_strings<S: AsRef<OsStr>>(strings: &[S]) -> Result<Vec<CString>, InitError> {
    strings
        .iter()
        .map(|text| CString::new(text.as_ref().as_bytes()))
        .collect::<Result<_, _>>()
        .map_err(|_| InitError::Invalid("NUL in an argument or environment variable".into()))
}

/// The environment with HOME added, if it lacks it, from `passwd` (the
/// contents of /etc/passwd), as runc does.
#[must_use]
pub fn with_home(env: &[String], uid: u32, passwd: &str) -> Vec<String> {
    let mut env = env.to_vec();
    if !env.iter().any(|entry| entry.starts_with("HOME=")) {
        let home = passwd.lines().find_map(|line| {
            let mut fields = line.split(':');
            let found = fields.nth(2)?.parse() == Ok(uid);
            fields.nth(2).filter(|home| found && !home.is_empty())
        });
        env.push(format!("HOME={}", home.unwrap_or("/")));
    }
    env
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(name: &str, path: &str) -> String {
        find(name, &[format!("PATH={path}")])
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn missing_commands() {
        assert_eq!(
            message("no-such", "/bin:/usr/bin"),
            "exec: \"no-such\": executable file not found in $PATH"
        );
        assert_eq!(
            message("/no/such", ""),
            "exec: \"/no/such\": stat /no/such: no such file or directory"
        );
    }

    #[test]
    fn commands_that_cannot_be_executed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("data");
        fs::write(&file, "x").unwrap();
        let name = file.to_str().unwrap();
        assert_eq!(
            message(name, ""),
            format!("exec: {name:?}: permission denied")
        );
        let directory = dir.path().to_str().unwrap();
        assert!(message(directory, "").ends_with("is a directory"));
        assert!(message("data", directory).ends_with("not found in $PATH"));
    }

    #[test]
    fn path_is_searched_in_order() {
        let found = find("sh", &["PATH=/no/such:/bin:/usr/bin".into()]).unwrap();
        assert_eq!(found, Path::new("/bin/sh"));
    }

    #[test]
    fn home_from_passwd() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n";
        assert_eq!(with_home(&[], 1000, passwd), ["HOME=/home/user"]);
        assert_eq!(with_home(&[], 7, passwd), ["HOME=/"]);
        assert_eq!(with_home(&["HOME=/x".into()], 0, passwd), ["HOME=/x"]);
    }
}
