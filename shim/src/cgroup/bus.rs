//! D-Bus, as much of it as a call of systemd's takes (D-Bus Specification 0.43: "Type
//! System", "Message Protocol", "Authentication Protocol").
//!
//! ```text
//! connect -> "\0AUTH EXTERNAL uid" -> "OK" -> "BEGIN" -> call -> answer -> call ...
//!                                                            \-> signals, kept meanwhile
//! ```
//! One connection has one caller and is over by its deadline. What is written is
//! little-endian, and so is what this host's programs answer.
//!
//! A pod makes three calls in its life, with six types of values. That is less than
//! what a general crate brings along: an asynchronous one has more code than this shim.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

mod wire;

#[cfg(test)]
pub(crate) use wire::testing;
pub use wire::{Body, Message, Property, Value};

/// Longest line of the authentication that is taken.
const MAX_LINE_BYTES: usize = 256;

/// Errors of this module.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// The socket failed, or the deadline came.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The failure.
        source: io::Error,
    },
    /// The bus does not know this user.
    #[error("the bus answers the authentication with {0:?}")]
    Authentication(String),
    /// What came is no message, or none of those that are understood.
    #[error("the bus sends {0}")]
    Malformed(&'static str),
    /// The method was not carried out.
    #[error("{text} ({name})")]
    Refused {
        /// The error's name.
        name: String,
        /// What it says to people.
        text: String,
    },
}

impl BusError {
    /// Whether nobody serves the socket.
    pub fn is_absence(&self) -> bool {
        use io::ErrorKind::{ConnectionRefused, NotFound};
        matches!(self, Self::Io { source, .. } if matches!(source.kind(), NotFound | ConnectionRefused))
    }

    /// Whether it is the error of that name.
    pub fn is_named(&self, wanted: &str) -> bool {
        matches!(self, Self::Refused { name, .. } if name == wanted)
    }
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> BusError {
    move |source| BusError::Io { what, source }
}

/// What is called.
#[derive(Debug, Clone, Copy)]
pub struct Method<'a> {
    /// Whose it is.
    pub destination: &'a str,
    /// The object.
    pub path: &'a str,
    /// Its interface.
    pub interface: &'a str,
    /// Its name.
    pub member: &'a str,
}

/// A connection to a bus, or to one of its users directly.
#[derive(Debug)]
pub struct Bus {
    stream: Timed,
    last_serial: u32,
    signals: VecDeque<Message>,
}

impl Bus {
    /// Connects as the user this process is.
    ///
    /// # Errors
    ///
    /// `Io`, among them [`BusError::is_absence`]; `Authentication`.
    pub fn connect(socket: &Path, deadline: Instant) -> Result<Self, BusError> {
        let mut stream = Timed::connect(socket, deadline).map_err(failed("connect to the bus"))?;
        stream
            .authenticate()
            .map_err(failed("talk to the bus"))?
            .map_err(BusError::Authentication)?;
        Ok(Self {
            stream,
            last_serial: 0,
            signals: VecDeque::new(),
        })
    }

    /// Calls a method and waits for its answer.
    ///
    /// # Errors
    ///
    /// `Refused`; those of the connection.
    pub fn call(&mut self, method: &Method<'_>, body: &Body) -> Result<Message, BusError> {
        self.last_serial += 1;
        let serial = self.last_serial;
        let bytes = wire::call(serial, method, body)?;
        self.stream
            .write_all(&bytes)
            .map_err(failed("write to the bus"))?;
        loop {
            let message = self.read()?;
            if message.is_signal() {
                self.signals.push_back(message);
            } else if message.answers(serial) {
                return message.into_answer();
            }
        }
    }

    /// The next signal; one that came with an answer is first.
    ///
    /// # Errors
    ///
    /// Those of the connection.
    pub fn next_signal(&mut self) -> Result<Message, BusError> {
        if let Some(signal) = self.signals.pop_front() {
            return Ok(signal);
        }
        loop {
            let message = self.read()?;
            if message.is_signal() {
                return Ok(message);
            }
        }
    }

    fn read(&mut self) -> Result<Message, BusError> {
        Message::read(&mut self.stream)
    }
}

/// A stream on which everything has to be over by a deadline.
#[derive(Debug)]
struct Timed {
    stream: UnixStream,
    deadline: Instant,
}

impl Timed {
    /// Where nobody accepts, and as many as may wait already, connect(2) blocks as a write does
    /// (socket(7), `SO_SNDTIMEO`).
    fn connect(path: &Path, deadline: Instant) -> io::Result<Self> {
        let stream = socket(
            AddressFamily::Unix,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        let stream = Self {
            stream: stream.into(),
            deadline,
        };
        stream.stream.set_write_timeout(Some(stream.rest()?))?;
        let connected = connect(stream.stream.as_raw_fd(), &UnixAddr::new(path)?);
        connected.map_err(|errno| told(errno.into()))?;
        Ok(stream)
    }

    /// What the bus says where it refuses is inside.
    fn authenticate(&mut self) -> io::Result<Result<(), String>> {
        let uid = nix::unistd::geteuid().to_string();
        let uid: String = uid.bytes().map(|byte| format!("{byte:02x}")).collect();
        self.write_all(format!("\0AUTH EXTERNAL {uid}\r\n").as_bytes())?;
        let line = self.read_line()?;
        if !line.starts_with("OK ") {
            return Ok(Err(line));
        }
        self.write_all(b"BEGIN\r\n")?;
        Ok(Ok(()))
    }

    /// Byte by byte: what follows the line is not to be read.
    fn read_line(&mut self) -> io::Result<String> {
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            if line.len() == MAX_LINE_BYTES {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let mut byte = [0];
            self.read_exact(&mut byte)?;
            line.extend(byte);
        }
        Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
    }

    fn rest(&self) -> io::Result<std::time::Duration> {
        let rest = self.deadline.saturating_duration_since(Instant::now());
        if rest.is_zero() {
            return Err(timed_out());
        }
        Ok(rest)
    }
}

impl Read for Timed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.rest()?))?;
        self.stream.read(buffer).map_err(told)
    }
}

impl Write for Timed {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.rest()?))?;
        self.stream.write(buffer).map_err(told)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// EAGAIN is what a socket's timeout looks like (socket(7), `SO_RCVTIMEO`).
fn told(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => timed_out(),
        _ => error,
    }
}

fn timed_out() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "it does not answer in time")
}

#[cfg(test)]
mod tests {
    use super::testing::{Answer, FakeBus};
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::time::Duration;

    const ECHO: Method<'_> = Method {
        destination: "org.example",
        path: "/org/example",
        interface: "org.example.Echo",
        member: "Echo",
    };

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn answers_are_told_from_signals_which_are_kept() {
        let bus = FakeBus::new(|call| {
            let said = call.arguments("s").unwrap().text().unwrap();
            let signal = |text: &str| {
                Answer::Signal("org.example.Echo", "Heard", Body::default().text(text))
            };
            vec![
                signal("before"),
                Answer::Return(Body::default().text(&said)),
                signal("after"),
            ]
        });
        let mut client = Bus::connect(bus.path(), soon()).unwrap();
        for said in ["one", "two"] {
            let answer = client.call(&ECHO, &Body::default().text(said)).unwrap();
            assert_eq!(answer.arguments("s").unwrap().text().unwrap(), said);
        }
        for heard in ["before", "after", "before", "after"] {
            let signal = client.next_signal().unwrap();
            assert!(signal.is("org.example.Echo", "Heard"));
            assert_eq!(signal.arguments("s").unwrap().text().unwrap(), heard);
        }
        assert_eq!(bus.members(), ["Echo", "Echo"]);
    }

    #[test]
    fn refusals_have_a_name_and_a_reason() {
        let bus = FakeBus::new(|_| vec![Answer::Error("org.example.No", "not today")]);
        let mut client = Bus::connect(bus.path(), soon()).unwrap();
        let error = client.call(&ECHO, &Body::default()).unwrap_err();
        assert!(error.is_named("org.example.No") && !error.is_named("org.example"));
        assert_eq!(error.to_string(), "not today (org.example.No)");
    }

    #[test]
    fn nobody_there_is_no_other_failure() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bus");
        assert!(Bus::connect(&path, soon()).unwrap_err().is_absence());
        drop(UnixListener::bind(&path).unwrap());
        assert!(Bus::connect(&path, soon()).unwrap_err().is_absence());
    }

    #[track_caller]
    fn is_given_up(path: &Path) {
        let deadline = Instant::now() + Duration::from_millis(50);
        let error = Bus::connect(path, deadline).unwrap_err();
        let BusError::Io { source, .. } = &error else {
            panic!("{error}");
        };
        assert_eq!(source.kind(), io::ErrorKind::TimedOut);
        assert!(!error.is_absence());
    }

    #[test]
    fn who_does_not_answer_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bus");
        let _silent = UnixListener::bind(&path).unwrap();
        is_given_up(&path);
    }

    #[test]
    fn who_does_not_accept_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bus");
        let listener = UnixListener::bind(&path).unwrap();
        // Then one may wait.
        let backlog = nix::sys::socket::Backlog::new(0).unwrap();
        nix::sys::socket::listen(&listener, backlog).unwrap();
        let _waiting = UnixStream::connect(&path).unwrap();
        is_given_up(&path);
    }

    #[test]
    fn a_user_that_is_refused_is_told_so() {
        let bus = FakeBus::refusing();
        let error = Bus::connect(bus.path(), soon()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the bus answers the authentication with \"REJECTED EXTERNAL\""
        );
    }
}
