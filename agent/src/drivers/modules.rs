//! Kernel modules of a driver image.
//!
//! `modules.load` has a line for each: its file, and parameters after it. What begins
//! with `#` is a remark. A module that the kernel has is not loaded again. A probe that
//! a module starts is over when its load is (`do_init_module` in kernel/module/main.c
//! waits for those it asked for), so afterwards its devices have their driver.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};

use crate::error::{Context, Error, Result};

/// In an image.
const DIRECTORY: &str = "modules";
const LIST: &str = "modules.load";
/// The kernel's messages, a record with each read (Documentation/ABI/testing/dev-kmsg).
const MESSAGES: &str = "/dev/kmsg";
/// No record is longer (`PRINTK_MESSAGE_MAX`).
const RECORD_BYTES: usize = 2048;
/// Messages that are told of a failure, its last ones.
const TOLD: usize = 3;

/// A line of the list.
#[derive(Debug, PartialEq, Eq)]
struct Module {
    file: String,
    parameters: String,
}

/// Loads an image's modules.
///
/// # Errors
///
/// `InvalidArgument` for a list that names no file, `FailedPrecondition` with what the
/// kernel says of the first module it does not take, else `Io`.
pub fn load(root: &Path) -> Result<()> {
    load_by(root, |file, parameters| {
        let messages = Messages::from_now();
        match finit_module(file, parameters, ModuleInitFlags::empty()) {
            Err(Errno::EEXIST) => Ok(()),
            Err(errno) => Err(refusal(errno, &messages)),
            Ok(()) => Ok(()),
        }
    })
}

fn load_by(root: &Path, load: impl Fn(&File, &CString) -> io::Result<()>) -> Result<()> {
    let directory = root.join(DIRECTORY);
    if !directory.exists() {
        return Ok(());
    }
    let list = fs::read_to_string(directory.join(LIST));
    let list = list.with_context(|| format!("read /{DIRECTORY}/{LIST}"))?;
    for module in modules(&list)? {
        let Module { file, parameters } = module;
        let parameters = CString::new(parameters)
            .map_err(|_| Error::InvalidArgument(format!("parameters of {file}")))?;
        let what = || format!("load /{DIRECTORY}/{file}");
        let opened = File::open(directory.join(&file)).with_context(what)?;
        load(&opened, &parameters).with_context(what)?;
        tracing::info!("loaded {file}");
    }
    Ok(())
}

fn modules(list: &str) -> Result<Vec<Module>> {
    let lines = list.lines().map(str::trim);
    let lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| {
            let (file, parameters) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
            if file.contains('/') || !file.ends_with(".ko") {
                let text = format!("/{DIRECTORY}/{LIST} names {file:?}: no .ko file beside it");
                return Err(Error::InvalidArgument(text));
            }
            Ok(Module {
                file: file.to_owned(),
                parameters: parameters.trim().to_owned(),
            })
        })
        .collect()
}

/// The error with what the kernel says of it: the number alone never tells which
/// symbol or which version is wrong.
fn refusal(errno: Errno, messages: &io::Result<Messages>) -> io::Error {
    let said = match messages {
        Ok(messages) => messages.read(),
        Err(error) => unreadable(error),
    };
    let remedy = match errno {
        // "version magic" or "Unknown symbol": of another kernel's build.
        Errno::ENOEXEC | Errno::ENOENT | Errno::EINVAL => {
            "; modules are for one build of the guest's kernel: make the image again for this one"
        }
        _ => "",
    };
    io::Error::other(format!(
        "{}: the kernel says: {said}{remedy}",
        errno.desc().to_lowercase()
    ))
}

/// What the kernel says from a moment on.
struct Messages(File);

impl Messages {
    fn from_now() -> io::Result<Self> {
        let mut file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(MESSAGES)?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self(file))
    }

    fn read(&self) -> String {
        let mut lines = Vec::new();
        let mut record = [0; RECORD_BYTES];
        loop {
            match (&self.0).read(&mut record) {
                Ok(0) => break,
                Ok(length) => {
                    let record = String::from_utf8_lossy(&record[..length]);
                    lines.extend(text_of(&record).map(str::to_owned));
                }
                // Some were overwritten before they were read.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    lines.push(unreadable(&error));
                    break;
                }
            }
        }
        last(&lines)
    }
}

fn unreadable(error: &io::Error) -> String {
    format!("its messages cannot be read: {error}")
}

/// The text of a record: `6,1234,5678,-;text`, and lines with keys after it.
fn text_of(record: &str) -> Option<&str> {
    record.lines().next()?.split_once(';').map(|(_, text)| text)
}

fn last(lines: &[String]) -> String {
    if lines.is_empty() {
        return "nothing".into();
    }
    lines[lines.len().saturating_sub(TOLD)..].join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    fn image(list: &str, files: &[&str]) -> tempfile::TempDir {
        let image = tempfile::tempdir().unwrap();
        let directory = image.path().join(DIRECTORY);
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join(LIST), list).unwrap();
        for name in files {
            fs::write(directory.join(name), name).unwrap();
        }
        image
    }

    #[test]
    fn modules_are_loaded_in_the_order_of_the_list() {
        let list =
            "# remark\nnvme-core.ko\n\n  nvme.ko  use_threaded_interrupts=1 sgl_threshold=0\n";
        let image = image(list, &["nvme.ko", "nvme-core.ko", "unlisted.ko"]);
        let loaded = RefCell::new(Vec::new());
        load_by(image.path(), |mut file, parameters| {
            let mut name = String::new();
            file.read_to_string(&mut name)?;
            loaded
                .borrow_mut()
                .push((name, parameters.to_str().unwrap().to_owned()));
            Ok(())
        })
        .unwrap();
        let parameters = "use_threaded_interrupts=1 sgl_threshold=0";
        assert_eq!(
            loaded.into_inner(),
            [
                ("nvme-core.ko".into(), String::new()),
                ("nvme.ko".into(), parameters.into())
            ]
        );
    }

    #[test]
    fn the_first_failure_ends_it_and_is_named() {
        let image = image("a.ko\nb.ko\nc.ko\n", &["a.ko", "b.ko", "c.ko"]);
        let count = RefCell::new(0);
        let error = load_by(image.path(), |_, _| {
            *count.borrow_mut() += 1;
            match *count.borrow() {
                2 => Err(refusal(Errno::ENOEXEC, &Err(io::Error::other("no log")))),
                _ => Ok(()),
            }
        })
        .unwrap_err();
        assert_eq!(count.into_inner(), 2);
        let text = error.full();
        assert!(text.contains("/modules/b.ko"), "{text}");
        assert!(text.contains("make the image again"), "{text}");
    }

    #[test]
    fn an_image_may_have_no_modules_but_no_broken_list() {
        let empty = tempfile::tempdir().unwrap();
        load_by(empty.path(), |_, _| panic!("there are none")).unwrap();
        fs::create_dir(empty.path().join(DIRECTORY)).unwrap();
        let error = load_by(empty.path(), |_, _| Ok(())).unwrap_err().full();
        assert!(
            error.contains("/modules/modules.load: no such file"),
            "{error}"
        );
        let missing = image("gone.ko\n", &[]);
        let error = load_by(missing.path(), |_, _| Ok(())).unwrap_err().full();
        assert!(error.contains("/modules/gone.ko: no such file"), "{error}");
        for bad in ["../x.ko", "nvme"] {
            let error = load_by(image(bad, &[]).path(), |_, _| Ok(())).unwrap_err();
            assert!(error.full().contains(&format!("names {bad:?}")), "{bad}");
        }
    }

    #[test]
    fn messages_are_told_without_their_numbers() {
        let record = "3,1092,52,-;nvme: Unknown symbol x (err -2)\n SUBSYSTEM=module\n";
        assert_eq!(text_of(record), Some("nvme: Unknown symbol x (err -2)"));
        let lines = ["a", "b", "c", "d"].map(str::to_owned);
        assert_eq!(last(&lines), "b; c; d");
        assert_eq!(last(&[]), "nothing");
        // Not one that can be read.
        let directory = Messages(File::open("/").unwrap());
        let said = directory.read();
        assert!(said.contains("cannot be read"), "{said}");
    }
}
