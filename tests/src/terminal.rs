//! A terminal, and a program on it.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, poll};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::{PATIENCE, Said, run};

/// A program on a terminal of its own.
pub struct OnTerminal {
    child: Child,
    terminal: std::fs::File,
    line: OwnedFd,
    /// How it was set before the program had it.
    before: String,
    /// Came after what the last [`Self::read_until`] looked for.
    unread: String,
}

impl OnTerminal {
    /// Starts the program on a terminal of this size.
    #[must_use]
    pub fn spawn(mut command: Command, rows: u16, columns: u16) -> Self {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = openpty(Some(&size), None).expect("a new terminal");
        let before = stty(&pty.slave, &["-g"]);
        let line = || Stdio::from(pty.slave.try_clone().expect("a descriptor"));
        let child = command
            .process_group(0)
            .stdin(line())
            .stdout(line())
            .stderr(line())
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        Self {
            child,
            terminal: pty.master.into(),
            line: pty.slave,
            before,
            unread: String::new(),
        }
    }

    /// Reads until `text` has come, and returns what came up to its end.
    #[track_caller]
    pub fn read_until(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        let end = loop {
            if let Some(start) = self.unread.find(text) {
                break start + text.len();
            }
            assert!(
                Instant::now() < deadline,
                "no {text:?} on the terminal within {PATIENCE:?}, only {:?}",
                self.unread
            );
            if self.is_readable() {
                let mut bytes = [0; 1024];
                let count = self
                    .terminal
                    .read(&mut bytes)
                    .expect("a terminal that is open");
                let came = String::from_utf8_lossy(&bytes[..count]);
                self.unread.push_str(&came);
            }
        };
        let rest = self.unread.split_off(end);
        std::mem::replace(&mut self.unread, rest)
    }

    fn is_readable(&self) -> bool {
        let mut fds = [PollFd::new(self.terminal.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, 50_u16).expect("poll") > 0
    }

    /// Types keys.
    pub fn type_in(&mut self, keys: &str) {
        self.terminal
            .write_all(keys.as_bytes())
            .expect("a terminal takes keys");
    }

    /// Types a line and the key that ends it.
    pub fn type_line(&mut self, text: &str) {
        self.type_in(text);
        self.type_in("\n");
    }

    /// Changes the terminal's size and tells the program, as a window does.
    ///
    /// # Panics
    ///
    /// When the terminal or the program is gone.
    pub fn resize(&self, rows: u16, columns: u16) {
        let (rows, columns) = (rows.to_string(), columns.to_string());
        stty(&self.line, &["rows", &rows, "cols", &columns]);
        self.signal("WINCH");
    }

    /// Sends the program a signal by its name.
    pub fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        run("kill", &["-s", name, &pid]).exits(0);
    }

    /// Whether the terminal is set as it was before the program had it.
    #[must_use]
    pub fn is_as_before(&self) -> bool {
        stty(&self.line, &["-g"]) == self.before
    }

    /// Waits for the program's end and returns its status.
    ///
    /// # Panics
    ///
    /// Never: the program is this one's child.
    pub fn wait(&mut self) -> Option<i32> {
        self.child.wait().expect("the child is ours").code()
    }
}

impl Drop for OnTerminal {
    /// Of a test that failed nothing runs on.
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let group = Pid::from_raw(self.child.id().cast_signed());
            let _ = killpg(group, Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

fn stty(line: &OwnedFd, arguments: &[&str]) -> String {
    let line = line.try_clone().expect("a descriptor");
    let output = Command::new("stty").args(arguments).stdin(line).output();
    Said::from(output.expect("stty")).exits(0).stdout
}
