//! A bus of a test's own, which answers calls by a script.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::*;
use crate::task::lock;

/// Who the fake bus says it is.
pub(crate) const SENDER_NAME: &str = ":1.0";

/// What a call is answered with.
pub(crate) enum Answer {
    /// Its result.
    Return(Body),
    /// An error's name and text.
    Error(&'static str, &'static str),
    /// A signal: interface, member, arguments.
    Signal(&'static str, &'static str, Body),
    /// The same, of someone else.
    Forged(&'static str, &'static str, Body),
}

impl Body {
    /// Adds an `o`.
    pub(crate) fn path(mut self, text: &str) -> Self {
        self.signature.push('o');
        self.bytes.text(text);
        self
    }

    /// Adds a `u`.
    pub(crate) fn number(mut self, number: u32) -> Self {
        self.signature.push('u');
        self.bytes.number(number);
        self
    }
}

impl Message {
    /// Of the method.
    pub(crate) fn name(&self) -> &str {
        &self.member
    }

    /// The call has exactly these arguments.
    #[track_caller]
    pub(crate) fn assert_arguments(&self, body: &Body) {
        assert_eq!(self.signature, body.signature);
        assert_eq!(self.body, body.bytes.0);
    }
}

pub(crate) struct FakeBus {
    path: PathBuf,
    calls: Arc<Mutex<Vec<Message>>>,
    _directory: tempfile::TempDir,
}

impl FakeBus {
    /// Answers each call with what `script` makes of it, on any number of connections.
    pub(crate) fn new(script: impl FnMut(&Message) -> Vec<Answer> + Send + 'static) -> Self {
        Self::with_login("OK 0123456789abcdef0123456789abcdef", script)
    }

    /// Lets nobody in.
    pub(crate) fn refusing() -> Self {
        Self::with_login("REJECTED EXTERNAL", |_| Vec::new())
    }

    fn with_login(
        login: &'static str,
        mut script: impl FnMut(&Message) -> Vec<Answer> + Send + 'static,
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bus");
        let listener = UnixListener::bind(&path).unwrap();
        let calls = Arc::<Mutex<Vec<Message>>>::default();
        let noted = calls.clone();
        // Ends with the process.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                serve(stream.unwrap(), login, &mut script, &noted);
            }
        });
        Self {
            path,
            calls,
            _directory: directory,
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The names of the methods that were called.
    pub(crate) fn members(&self) -> Vec<String> {
        let calls = lock(&self.calls);
        calls.iter().map(|call| call.member.clone()).collect()
    }

    /// The calls of a method, which are forgotten.
    pub(crate) fn take_calls(&self, member: &str) -> Vec<Message> {
        let mut calls = lock(&self.calls);
        let (taken, rest) = calls.drain(..).partition(|call| call.member == member);
        *calls = rest;
        taken
    }
}

/// One connection, until the client closes it.
fn serve(
    stream: UnixStream,
    login: &str,
    script: &mut impl FnMut(&Message) -> Vec<Answer>,
    calls: &Mutex<Vec<Message>>,
) {
    let mut to = stream.try_clone().unwrap();
    let mut from = Recorder::new(BufReader::new(stream));
    let mut line = String::new();
    from.inner.read_line(&mut line).unwrap();
    let uid: String = nix::unistd::geteuid()
        .to_string()
        .bytes()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!(line, format!("\0AUTH EXTERNAL {uid}\r\n"));
    to.write_all(format!("{login}\r\n").as_bytes()).unwrap();
    line.clear();
    if from.inner.read_line(&mut line).unwrap() == 0 {
        return;
    }
    assert_eq!(line, "BEGIN\r\n");
    loop {
        from.bytes.clear();
        let Ok(call) = Message::read(&mut from) else {
            return;
        };
        assert_eq!(call.kind, METHOD_CALL);
        let serial = u32::from_le_bytes(from.bytes[8..12].try_into().unwrap());
        let answers = script(&call);
        lock(calls).push(call);
        for answer in answers {
            to.write_all(&answer.into_bytes(serial)).unwrap();
        }
    }
}

/// Keeps what is read.
struct Recorder<R> {
    inner: R,
    bytes: Vec<u8>,
}

impl<R> Recorder<R> {
    fn new(inner: R) -> Self {
        Self {
            inner,
            bytes: Vec::new(),
        }
    }
}

impl<R: Read> Read for Recorder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.bytes.extend(&buffer[..count]);
        Ok(count)
    }
}

impl Answer {
    fn into_bytes(self, serial: u32) -> Vec<u8> {
        let mut fields = Writer::default();
        let (kind, sender, body) = match self {
            Self::Return(body) => (METHOD_RETURN, SENDER_NAME, body),
            Self::Error(name, text) => {
                fields.field(ERROR_NAME, "s", |to| to.text(name));
                (ERROR, SENDER_NAME, Body::default().text(text))
            }
            Self::Signal(interface, member, body) => {
                fields.signal(interface, member);
                (SIGNAL, SENDER_NAME, body)
            }
            Self::Forged(interface, member, body) => {
                fields.signal(interface, member);
                (SIGNAL, ":1.66", body)
            }
        };
        if kind != SIGNAL {
            fields.field(REPLY_SERIAL, "u", |to| to.number(serial));
        }
        fields.field(SENDER, "s", |to| to.text(sender));
        // Number of descriptors: one of those that are not looked at.
        fields.field(9, "u", |to| to.number(0));
        if !body.signature.is_empty() {
            fields.field(SIGNATURE, "g", |to| to.signature(&body.signature));
        }
        let mut message = Writer(vec![LITTLE, kind, 0, VERSION]);
        message.number(length(&body.bytes.0));
        message.number(77);
        message.number(length(&fields.0));
        message.0.extend(fields.0);
        message.align(STRUCT);
        message.0.extend(body.bytes.0);
        message.0
    }
}

impl Writer {
    fn signal(&mut self, interface: &str, member: &str) {
        self.field(INTERFACE, "s", |to| to.text(interface));
        self.field(MEMBER, "s", |to| to.text(member));
    }
}
