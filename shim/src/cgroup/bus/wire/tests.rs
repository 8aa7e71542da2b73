//! Messages byte for byte, and those that are none.

use super::*;

const HELLO: Method<'_> = Method {
    destination: "org.freedesktop.DBus",
    path: "/org/freedesktop/DBus",
    interface: "org.freedesktop.DBus",
    member: "Hello",
};

/// As libdbus writes it.
const HELLO_BYTES: &[u8] = b"l\x01\x00\x01\x00\x00\x00\x00\x01\x00\x00\x00\x6e\x00\x00\x00\
    \x01\x01o\x00\x15\x00\x00\x00/org/freedesktop/DBus\x00\x00\x00\
    \x06\x01s\x00\x14\x00\x00\x00org.freedesktop.DBus\x00\x00\x00\x00\
    \x02\x01s\x00\x14\x00\x00\x00org.freedesktop.DBus\x00\x00\x00\x00\
    \x03\x01s\x00\x05\x00\x00\x00Hello\x00\x00\x00";

#[test]
fn a_call_is_as_others_write_it() {
    assert_eq!(call(1, &HELLO, &Body::default()).unwrap(), HELLO_BYTES);
}

/// Padding is before what needs it and not counted by an array's length.
#[test]
fn values_are_aligned() {
    let properties = [
        ("P", Value::Numbers(vec![7])),
        ("N", Value::Number(1)),
        ("B", Value::Bytes(vec![3])),
        ("D", Value::Flag(true)),
        ("T", Value::Text("x".into())),
    ];
    let body = Body::default()
        .text("unit")
        .properties(&properties)
        .no_units();
    assert_eq!(body.signature, "sa(sv)a(sa(sv))");
    let expected = [
        &b"\x04\0\0\0unit\0"[..],
        b"\0\0\0\x6a\0\0\0",
        b"\x01\0\0\0P\0\x02au\0\0\0\x04\0\0\0\x07\0\0\0",
        b"\0\0\0\0",
        b"\x01\0\0\0N\0\x01t\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0",
        b"\x01\0\0\0B\0\x02ay\0\0\0\x01\0\0\0\x03",
        b"\0\0\0\0\0\0\0",
        b"\x01\0\0\0D\0\x01b\0\0\0\0\x01\0\0\0",
        b"\x01\0\0\0T\0\x01s\0\0\0\0\x01\0\0\0x\0",
        b"\0\0\0\0\0\0",
    ]
    .concat();
    assert_eq!(
        body.bytes.0.escape_ascii().to_string(),
        expected.escape_ascii().to_string()
    );
}

fn read(mut bytes: &[u8]) -> Result<Message, BusError> {
    Message::read(&mut bytes)
}

#[test]
fn a_message_is_read_as_it_was_written() {
    let message = read(HELLO_BYTES).unwrap();
    assert!(message.is("org.freedesktop.DBus", "Hello"));
    assert!(!message.is_signal() && !message.answers(1));
}

#[test]
fn what_is_no_message_is_an_error_and_no_panic() {
    for length in 0..HELLO_BYTES.len() {
        let error = read(&HELLO_BYTES[..length]).unwrap_err();
        assert!(matches!(error, BusError::Io { .. }), "{length}: {error}");
    }
    let mut bytes = HELLO_BYTES.to_vec();
    for at in 0..bytes.len() {
        for value in [0, 1, b'B', 0x7f, 0xff] {
            let before = std::mem::replace(&mut bytes[at], value);
            // Whatever it is then.
            drop(read(&bytes));
            bytes[at] = before;
        }
    }
    for (at, value) in [
        (0, b'B'),
        (3, 2),
        (7, 0x7f),
        (15, 0x7f),
        (18, b'x'),
        (20, 0xff),
    ] {
        let before = std::mem::replace(&mut bytes[at], value);
        let error = read(&bytes).unwrap_err();
        assert!(matches!(error, BusError::Malformed(_)), "{at}: {error}");
        bytes[at] = before;
    }
}

#[test]
fn arguments_are_what_was_asked_for() {
    let message = Message {
        signature: "uo".into(),
        body: b"\x05\x00\x00\x00\x02\x00\x00\x00/a\x00".into(),
        ..Message::default()
    };
    assert!(message.arguments("us").is_err());
    let mut arguments = message.arguments("uo").unwrap();
    assert_eq!(arguments.number().unwrap(), 5);
    assert_eq!(arguments.text().unwrap(), "/a");
    assert!(arguments.number().is_err(), "no more");
}
