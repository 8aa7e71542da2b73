//! A file that keeps whoever opens it waiting, as one of a network file system may whose
//! server does not answer.
//!
//! It is the root of a FUSE file system of its own (linux/fuse.h, protocol 7.31), which
//! answers everything at once but `FUSE_OPEN`.

use std::convert::Infallible;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

use crate::{PATIENCE, run};

const MODE: u32 = 0o100_444;
/// What the kernel wants to have room for, and more (`FUSE_MIN_READ_BUFFER`).
const REQUEST_BYTES: usize = 64 << 10;
/// Of `struct fuse_in_header`.
const HEADER_BYTES: usize = 40;

/// The file; unmounted when dropped.
pub struct SlowFile {
    path: PathBuf,
    opened: Receiver<Held>,
}

/// Somebody who opens the file and waits until this is dropped.
pub struct Held {
    _waits: Sender<Infallible>,
}

impl SlowFile {
    /// Makes it at `path`.
    ///
    /// # Panics
    ///
    /// When the machine has no FUSE.
    #[must_use]
    pub fn new(path: &Path, contents: &str) -> Self {
        fs::write(path, "").expect("a file can be made");
        let device = File::options().read(true).write(true).open("/dev/fuse");
        let device = device.expect("/dev/fuse");
        let options = format!(
            "fd={},rootmode={MODE:o},user_id=0,group_id=0,allow_other",
            device.as_raw_fd()
        );
        let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
        mount(Some("slow"), path, Some("fuse"), flags, Some(&*options)).expect("FUSE mounts");
        let (opens, opened) = channel();
        let contents = contents.as_bytes().to_vec();
        thread::spawn(move || serve(device, &contents, &opens));
        Self {
            path: path.to_owned(),
            opened,
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until somebody opens it.
    ///
    /// # Panics
    ///
    /// When nobody does.
    #[must_use]
    #[track_caller]
    pub fn await_open(&self) -> Held {
        let held = self.opened.recv_timeout(PATIENCE);
        held.unwrap_or_else(|error| panic!("{} is not opened: {error}", self.path.display()))
    }
}

impl Drop for SlowFile {
    fn drop(&mut self) {
        let path = self.path.to_str().expect("paths of tests are UTF-8");
        run("umount", &["-l", path]);
    }
}

/// Answers requests until the file system is unmounted.
fn serve(mut device: File, contents: &[u8], opens: &Sender<Held>) {
    let mut buffer = vec![0; REQUEST_BYTES];
    loop {
        let request = match device.read(&mut buffer) {
            Ok(bytes) => &buffer[..bytes],
            // Who asked gave up before.
            Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => continue,
            Err(_) => return,
        };
        let Some(answer) = answer_to(request, contents, opens) else {
            continue;
        };
        let (error, body) = match answer {
            Ok(body) => (0, body),
            Err(errno) => (-(errno as i32), Vec::new()),
        };
        // struct fuse_out_header
        let len = u32::try_from(16 + body.len()).expect("answers are short");
        let head = [
            &len.to_le_bytes()[..],
            &error.to_le_bytes(),
            &request[8..16],
        ];
        // Who asked may be gone; the next read tells whether the file system is.
        let _ = device.write(&[&head.concat()[..], &body].concat());
    }
}

/// What a request is answered with; nothing where none is waited for.
fn answer_to(
    request: &[u8],
    contents: &[u8],
    opens: &Sender<Held>,
) -> Option<Result<Vec<u8>, Errno>> {
    const FORGET: u32 = 2;
    const GETATTR: u32 = 3;
    const OPEN: u32 = 14;
    const READ: u32 = 15;
    const RELEASE: u32 = 18;
    const FLUSH: u32 = 25;
    const INIT: u32 = 26;
    const INTERRUPT: u32 = 36;
    let word = |at: usize| {
        let bytes = request[at..at + 4].try_into();
        u32::from_le_bytes(bytes.expect("four of them"))
    };
    Some(Ok(match word(4) {
        FORGET | INTERRUPT => return None,
        // struct fuse_init_out: version, `max_write` and the granularity of times
        INIT => words(&[7, 31, 0, 0, 0, 4096, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        GETATTR => attributes(contents.len()),
        OPEN => {
            let (waits, waiting) = channel();
            // With nobody who waits for this, it is dropped here.
            let _ = opens.send(Held { _waits: waits });
            // No message can come: it is the other end's drop that is waited for.
            let _ = waiting.recv();
            words(&[0; 4])
        }
        READ => {
            let [offset, size] = [HEADER_BYTES + 8, HEADER_BYTES + 16].map(|at| word(at) as usize);
            let rest = contents.get(offset..).unwrap_or_default();
            rest[..size.min(rest.len())].to_vec()
        }
        RELEASE | FLUSH => Vec::new(),
        _ => return Some(Err(Errno::ENOSYS)),
    }))
}

/// `struct fuse_attr_out` of a file that only its reader may cache.
fn attributes(size: usize) -> Vec<u8> {
    let size = u32::try_from(size).expect("contents are short");
    let validity = [0; 4];
    let (inode, size, blocks) = ([1, 0], [size, 0], [1, 0]);
    let times = [0; 9];
    let (mode, links, owners, device) = ([MODE], [1], [0; 2], [0]);
    let (block_bytes, flags) = ([4096], [0]);
    words(
        &[
            &validity[..],
            &inode,
            &size,
            &blocks,
            &times,
            &mode,
            &links,
            &owners,
            &device,
            &block_bytes,
            &flags,
        ]
        .concat(),
    )
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
