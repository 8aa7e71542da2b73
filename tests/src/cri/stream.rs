//! containerd's streaming server, spoken to by websocket: the protocols
//! `v4.channel.k8s.io` and, for ports, `v4.channel.k8s.io` with two channels a
//! port. The first byte of each message names its channel.
//!
//! This protocol cannot end the input of a command: its streams end together.

use std::io::ErrorKind;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use tungstenite::client::IntoClientRequest;
use tungstenite::{Error, Message, WebSocket};

use crate::PATIENCE;

const PROTOCOL: &str = "v4.channel.k8s.io";
/// A read that takes longer lets the caller look at its deadline.
const TURN: Duration = Duration::from_millis(200);

/// Channels of an exec or attach.
pub const STDIN: u8 = 0;
/// See [`STDIN`].
pub const STDOUT: u8 = 1;
/// See [`STDIN`].
pub const STDERR: u8 = 2;
/// How it ended, a `metav1.Status` in JSON.
pub const ERROR: u8 = 3;
/// Terminal sizes, in JSON.
pub const RESIZE: u8 = 4;

const CHANNELS: usize = 5;

/// A session of exec, attach or port-forward.
pub struct Stream {
    socket: WebSocket<TcpStream>,
    received: [Vec<u8>; CHANNELS],
    ended: bool,
}

impl Stream {
    /// Connects to what `Exec`, `Attach` or `PortForward` answered.
    ///
    /// # Panics
    ///
    /// When the server does not take it.
    #[must_use]
    pub fn open(url: &str) -> Self {
        let url = url.replacen("http://", "ws://", 1);
        let mut request = url.as_str().into_client_request().expect("a URL");
        let protocol = PROTOCOL.parse().expect("a header's value");
        let headers = request.headers_mut();
        headers.insert("Sec-WebSocket-Protocol", protocol);
        let address = request.uri().authority().expect("an address").to_string();
        let tcp = TcpStream::connect(&address).unwrap_or_else(|e| panic!("{address}: {e}"));
        tcp.set_nodelay(true).expect("a TCP socket");
        let (socket, answer) =
            tungstenite::client(request, tcp).unwrap_or_else(|error| panic!("{url}: {error}"));
        let protocol = answer.headers().get("Sec-WebSocket-Protocol");
        assert_eq!(
            protocol.map(|value| value.as_bytes()),
            Some(PROTOCOL.as_bytes())
        );
        let turn = socket.get_ref().set_read_timeout(Some(TURN));
        turn.expect("a TCP socket");
        Self {
            socket,
            received: Default::default(),
            ended: false,
        }
    }

    /// Sends bytes on a channel.
    ///
    /// # Panics
    ///
    /// When the other side is gone.
    pub fn send(&mut self, channel: u8, bytes: &[u8]) {
        let mut message = vec![channel];
        message.extend(bytes);
        let sent = self.socket.send(Message::binary(message));
        sent.unwrap_or_else(|error| panic!("channel {channel}: {error}"));
    }

    /// Changes the terminal's size.
    pub fn resize(&mut self, width: u16, height: u16) {
        let size = serde_json::json!({"Width": width, "Height": height});
        self.send(RESIZE, size.to_string().as_bytes());
    }

    /// Takes one message, or none within a turn.
    fn receive(&mut self) {
        match self.socket.read() {
            Ok(Message::Binary(message)) => {
                let Some((channel, bytes)) = message.split_first() else {
                    return;
                };
                let channel = self.received.get_mut(usize::from(*channel));
                channel.expect("a channel of ours").extend(bytes);
            }
            Ok(Message::Close(_)) | Err(Error::ConnectionClosed) => self.ended = true,
            Ok(_) => (),
            Err(Error::Io(error))
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            // The server need not say goodbye.
            Err(Error::Protocol(_) | Error::Io(_)) => self.ended = true,
            Err(error) => panic!("{error}"),
        }
    }

    /// What has come on a channel, once `enough` says so.
    ///
    /// # Panics
    ///
    /// When the stream ends before, or nothing comes for [`PATIENCE`].
    #[track_caller]
    pub fn read_until(&mut self, channel: u8, enough: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let text = self.text(channel);
            if enough(&text) {
                return text;
            }
            assert!(!self.ended, "the stream ended after {text:?}");
            assert!(Instant::now() < deadline, "no more than {text:?}");
            self.receive();
        }
    }

    /// Waits for the end.
    ///
    /// # Panics
    ///
    /// When it does not come within [`PATIENCE`].
    #[track_caller]
    pub fn read_to_end(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.ended {
            assert!(Instant::now() < deadline, "no end: {:?}", self.text(STDOUT));
            self.receive();
        }
    }

    /// What has come on a channel by now.
    #[must_use]
    pub fn bytes(&self, channel: u8) -> &[u8] {
        &self.received[usize::from(channel)]
    }

    /// The same, lossily decoded.
    #[must_use]
    pub fn text(&self, channel: u8) -> String {
        String::from_utf8_lossy(self.bytes(channel)).into_owned()
    }

    /// How the command ended, after [`Self::read_to_end`].
    ///
    /// # Panics
    ///
    /// When the server has not told.
    #[must_use]
    #[track_caller]
    pub fn exit_code(&self) -> i32 {
        let text = self.text(ERROR);
        let status: serde_json::Value =
            serde_json::from_str(&text).unwrap_or_else(|error| panic!("{text:?}: {error}"));
        if status["status"] == "Success" {
            return 0;
        }
        let causes = status["details"]["causes"].as_array();
        let code = causes.into_iter().flatten().find_map(|cause| {
            let message = cause["message"].as_str()?;
            (cause["reason"] == "ExitCode").then(|| message.parse().ok())?
        });
        code.unwrap_or_else(|| panic!("{text}"))
    }
}
