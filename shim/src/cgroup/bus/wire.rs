//! D-Bus messages as bytes ("Marshaling", "Message Format").
//!
//! A message is a fixed part of 16 bytes, an array of header fields, padding to 8
//! bytes, and a body. Every value is aligned, counted from the message's first byte;
//! since fields and body both begin at a multiple of 8, each is a buffer of its own here.

use std::io::Read;

use super::{BusError, Method, failed};

/// "Little-endian", and the version of the protocol.
const LITTLE: u8 = b'l';
const VERSION: u8 = 1;
const FIXED_BYTES: usize = 16;
/// The specification allows 128 MiB; what systemd has to say here is some lines.
const MAX_BYTES: usize = 1 << 20;

/// Types of messages.
const METHOD_CALL: u8 = 1;
const METHOD_RETURN: u8 = 2;
const ERROR: u8 = 3;
const SIGNAL: u8 = 4;

/// Header fields.
const PATH: u8 = 1;
const INTERFACE: u8 = 2;
const MEMBER: u8 = 3;
const ERROR_NAME: u8 = 4;
const REPLY_SERIAL: u8 = 5;
const DESTINATION: u8 = 6;
const SENDER: u8 = 7;
const SIGNATURE: u8 = 8;

/// Structs, and with them the fields of a header, are aligned to this.
const STRUCT: usize = 8;

/// A value of a property.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// `s`
    Text(String),
    /// `b`
    Flag(bool),
    /// `t`
    Number(u64),
    /// `ay`
    Bytes(Vec<u8>),
    /// `au`
    Numbers(Vec<u32>),
}

impl Value {
    fn signature(&self) -> &'static str {
        match self {
            Self::Text(_) => "s",
            Self::Flag(_) => "b",
            Self::Number(_) => "t",
            Self::Bytes(_) => "ay",
            Self::Numbers(_) => "au",
        }
    }

    fn write(&self, to: &mut Writer) {
        match self {
            Self::Text(text) => to.text(text),
            Self::Flag(flag) => to.number(u32::from(*flag)),
            Self::Number(number) => to.long(*number),
            Self::Bytes(bytes) => to.array(1, |to| to.0.extend(bytes)),
            Self::Numbers(numbers) => to.array(4, |to| {
                for number in numbers {
                    to.number(*number);
                }
            }),
        }
    }
}

/// A property's name and value.
pub type Property = (&'static str, Value);

/// The arguments of a call, in their order.
#[derive(Debug, Default)]
pub struct Body {
    signature: String,
    bytes: Writer,
}

impl Body {
    /// Adds an `s`.
    pub fn text(mut self, text: &str) -> Self {
        self.signature.push('s');
        self.bytes.text(text);
        self
    }

    /// Adds a `b`.
    pub fn flag(mut self, flag: bool) -> Self {
        self.signature.push('b');
        self.bytes.number(u32::from(flag));
        self
    }

    /// Adds an `a(sv)`.
    pub fn properties(mut self, properties: &[Property]) -> Self {
        self.signature.push_str("a(sv)");
        self.bytes.array(STRUCT, |to| {
            for (name, value) in properties {
                to.align(STRUCT);
                to.text(name);
                to.signature(value.signature());
                value.write(to);
            }
        });
        self
    }

    /// Adds an `a(sa(sv))` without elements: units with their properties.
    pub fn no_units(mut self) -> Self {
        self.signature.push_str("a(sa(sv))");
        self.bytes.array(STRUCT, |_| ());
        self
    }
}

/// The message that calls a method.
///
/// # Errors
///
/// `Malformed` for one that is too long.
pub(super) fn call(serial: u32, method: &Method<'_>, body: &Body) -> Result<Vec<u8>, BusError> {
    let mut fields = Writer::default();
    for (code, kind, text) in [
        (PATH, "o", method.path),
        (DESTINATION, "s", method.destination),
        (INTERFACE, "s", method.interface),
        (MEMBER, "s", method.member),
    ] {
        fields.field(code, kind, |to| to.text(text));
    }
    if !body.signature.is_empty() {
        fields.field(SIGNATURE, "g", |to| to.signature(&body.signature));
    }
    let mut message = Writer(vec![LITTLE, METHOD_CALL, 0, VERSION]);
    message.number(length(&body.bytes.0));
    message.number(serial);
    message.number(length(&fields.0));
    message.0.extend(fields.0);
    message.align(STRUCT);
    message.0.extend(&body.bytes.0);
    if message.0.len() > MAX_BYTES {
        return Err(BusError::Malformed("no calls of that length"));
    }
    Ok(message.0)
}

/// A message from the bus.
#[derive(Debug, Default)]
pub struct Message {
    kind: u8,
    reply_serial: Option<u32>,
    interface: String,
    member: String,
    error_name: String,
    /// Who sent it, on a bus with more than one.
    pub sender: String,
    signature: String,
    body: Vec<u8>,
}

impl Message {
    /// Reads one.
    ///
    /// # Errors
    ///
    /// `Io`; `Malformed`.
    pub(super) fn read(from: &mut impl Read) -> Result<Self, BusError> {
        let mut read =
            |bytes: &mut [u8]| from.read_exact(bytes).map_err(failed("read from the bus"));
        let mut fixed = [0; FIXED_BYTES];
        read(&mut fixed)?;
        let mut header = Reader::new(&fixed);
        let [endian, kind, _flags, version] = header.take()?;
        if (endian, version) != (LITTLE, VERSION) {
            return Err(BusError::Malformed(
                "messages of another byte order or version",
            ));
        }
        let body_bytes = header.size()?;
        let _serial = header.number()?;
        let fields_bytes = header.size()?;
        if body_bytes > MAX_BYTES || fields_bytes > MAX_BYTES {
            return Err(BusError::Malformed("a message that is too long"));
        }
        let mut fields = vec![0; fields_bytes.next_multiple_of(STRUCT)];
        read(&mut fields)?;
        fields.truncate(fields_bytes);
        let mut body = vec![0; body_bytes];
        read(&mut body)?;
        let mut message = Self {
            kind,
            body,
            ..Self::default()
        };
        message.read_fields(&fields)?;
        Ok(message)
    }

    fn read_fields(&mut self, bytes: &[u8]) -> Result<(), BusError> {
        let mut fields = Reader::new(bytes);
        while !fields.is_at_end() {
            fields.align(STRUCT)?;
            let [code] = fields.take()?;
            let text = match fields.signature()?.as_str() {
                "s" | "o" => fields.text()?,
                "g" => fields.signature()?,
                "u" => {
                    let number = fields.number()?;
                    if code == REPLY_SERIAL {
                        self.reply_serial = Some(number);
                    }
                    continue;
                }
                _ => return Err(BusError::Malformed("a header field of an unknown type")),
            };
            match code {
                INTERFACE => self.interface = text,
                MEMBER => self.member = text,
                ERROR_NAME => self.error_name = text,
                SENDER => self.sender = text,
                SIGNATURE => self.signature = text,
                // Those that are not known are to be ignored.
                _ => (),
            }
        }
        Ok(())
    }

    /// Whether it is a signal.
    pub fn is_signal(&self) -> bool {
        self.kind == SIGNAL
    }

    /// Whether it has this name.
    pub fn is(&self, interface: &str, member: &str) -> bool {
        self.interface == interface && self.member == member
    }

    pub(super) fn answers(&self, serial: u32) -> bool {
        matches!(self.kind, METHOD_RETURN | ERROR) && self.reply_serial == Some(serial)
    }

    /// An error of the called method is one here.
    pub(super) fn into_answer(self) -> Result<Self, BusError> {
        if self.kind != ERROR {
            return Ok(self);
        }
        // An error's first argument is for people, if it is a string.
        let text = if self.signature.starts_with('s') {
            Reader::new(&self.body).text()?
        } else {
            "no reason given".into()
        };
        Err(BusError::Refused {
            name: self.error_name,
            text,
        })
    }

    /// The arguments, if they have this signature.
    ///
    /// # Errors
    ///
    /// `Malformed` if not.
    pub fn arguments(&self, signature: &str) -> Result<Reader<'_>, BusError> {
        if self.signature != signature {
            return Err(BusError::Malformed("an answer of another type"));
        }
        Ok(Reader::new(&self.body))
    }
}

fn length(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX)
}

#[derive(Debug, Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn align(&mut self, to: usize) {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
    }

    fn number(&mut self, number: u32) {
        self.align(4);
        self.0.extend(number.to_le_bytes());
    }

    fn long(&mut self, number: u64) {
        self.align(8);
        self.0.extend(number.to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.number(length(text.as_bytes()));
        self.0.extend(text.bytes());
        self.0.push(0);
    }

    /// At most 255 bytes; those here are constants.
    fn signature(&mut self, text: &str) {
        self.0.push(u8::try_from(text.len()).unwrap_or(u8::MAX));
        self.0.extend(text.bytes());
        self.0.push(0);
    }

    /// Its length does not count the padding before the first element.
    fn array(&mut self, alignment: usize, elements: impl FnOnce(&mut Self)) {
        self.number(0);
        let length_at = self.0.len() - 4;
        self.align(alignment);
        let start = self.0.len();
        elements(self);
        let length = length(&self.0[start..]).to_le_bytes();
        self.0[length_at..length_at + 4].copy_from_slice(&length);
    }

    fn field(&mut self, code: u8, signature: &str, value: impl FnOnce(&mut Self)) {
        self.align(STRUCT);
        self.0.push(code);
        self.signature(signature);
        value(self);
    }
}

/// Values of a message, in their order.
#[derive(Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    fn is_at_end(&self) -> bool {
        self.at >= self.bytes.len()
    }

    fn align(&mut self, to: usize) -> Result<(), BusError> {
        let padding = self.at.next_multiple_of(to) - self.at;
        self.slice(padding).map(drop)
    }

    fn slice(&mut self, count: usize) -> Result<&'a [u8], BusError> {
        let end = self.at.checked_add(count);
        let slice = end.and_then(|end| self.bytes.get(self.at..end));
        let slice = slice.ok_or(BusError::Malformed("a message that is too short"))?;
        self.at += count;
        Ok(slice)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], BusError> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.slice(N)?);
        Ok(bytes)
    }

    /// A `u`.
    ///
    /// # Errors
    ///
    /// `Malformed` where there is none, as with all of these.
    pub fn number(&mut self) -> Result<u32, BusError> {
        self.align(4)?;
        self.take().map(u32::from_le_bytes)
    }

    fn size(&mut self) -> Result<usize, BusError> {
        let number = self.number()?;
        usize::try_from(number).map_err(|_| BusError::Malformed("a message that is too long"))
    }

    /// An `s` or an `o`.
    ///
    /// # Errors
    ///
    /// `Malformed`.
    pub fn text(&mut self) -> Result<String, BusError> {
        let length = self.size()?;
        self.terminated(length)
    }

    fn signature(&mut self) -> Result<String, BusError> {
        let [length] = self.take()?;
        self.terminated(length.into())
    }

    fn terminated(&mut self, length: usize) -> Result<String, BusError> {
        let text = self.slice(length)?.to_owned();
        let [_zero] = self.take()?;
        String::from_utf8(text).map_err(|_| BusError::Malformed("a text that is none"))
    }
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
