//! HTTP/1.1 by hand: heads and chunks as they are on the wire, and the client
//! that the tests send exact bytes with.

use crate::support::PATIENCE;
use std::io::{self, Error, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

/// A start line and its headers. Bytes above 0x7f are kept as the characters of
/// the same number, so that nothing is lost.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Head {
    /// Every byte, the empty line at the end included.
    pub raw: Vec<u8>,
    pub line: String,
    pub headers: Vec<(String, String)>,
}

/// Bytes as the characters of the same number.
pub fn latin1(bytes: &[u8]) -> String {
    bytes.iter().copied().map(char::from).collect()
}

impl std::fmt::Debug for Head {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", latin1(&self.raw))
    }
}

impl Head {
    fn parse(raw: Vec<u8>) -> Self {
        let text = latin1(&raw);
        let mut lines = text.trim_end_matches("\r\n").split("\r\n");
        let line = lines.next().unwrap_or_default().to_owned();
        let headers = lines.map(split_header).collect();
        Self { raw, line, headers }
    }

    /// Every value of that header, in order.
    pub fn values(&self, name: &str) -> Vec<&str> {
        let named = self
            .headers
            .iter()
            .filter(|(own, _)| own.eq_ignore_ascii_case(name));
        named.map(|(_, value)| value.as_str()).collect()
    }

    /// The only value of that header.
    #[track_caller]
    pub fn value(&self, name: &str) -> Option<&str> {
        let values = self.values(name);
        assert!(
            values.len() <= 1,
            "{name} is there more than once: {values:?}"
        );
        values.first().copied()
    }

    pub fn has(&self, name: &str) -> bool {
        !self.values(name).is_empty()
    }

    /// The headers as lines, but those of these names.
    pub fn lines_without(&self, names: &[&str]) -> Vec<String> {
        let others = self.headers.iter().filter(|(own, _)| {
            let skipped = names.iter().any(|name| name.eq_ignore_ascii_case(own));
            !skipped
        });
        others
            .map(|(name, value)| format!("{name}: {value}"))
            .collect()
    }

    pub fn status(&self) -> u16 {
        let status = self
            .line
            .split(' ')
            .nth(1)
            .and_then(|word| word.parse().ok());
        status.unwrap_or_else(|| panic!("no status: {:?}", self.line))
    }

    /// What is wrong with a head by the letter of RFC 9112, if anything.
    pub fn fault(&self) -> Option<String> {
        let (lines, rest) = self.raw.split_at(self.raw.len().saturating_sub(4));
        if rest != b"\r\n\r\n" {
            return Some("no end".to_owned());
        }
        for line in latin1(lines).split("\r\n") {
            if let Some(bad) = line
                .chars()
                .find(|&c| (c < ' ' && c != '\t') || c == '\x7f')
            {
                return Some(format!("{bad:?} in {line:?}"));
            }
        }
        let token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
        for (name, _) in &self.headers {
            if name.is_empty() || !name.chars().all(token) {
                return Some(format!("the header name {name:?}"));
            }
        }
        let lengths = self.values("content-length");
        let codings = self.values("transfer-encoding");
        match (lengths.as_slice(), codings.as_slice()) {
            ([], []) => None,
            ([], [coding]) if coding.eq_ignore_ascii_case("chunked") => None,
            ([length], []) if length.parse::<u64>().is_ok() => None,
            framing => Some(format!("the framing {framing:?}")),
        }
    }

    /// How a request's body ends.
    pub(super) fn request_framing(&self) -> Framing {
        if self.has("transfer-encoding") {
            return Framing::Chunked;
        }
        let length = self.values("content-length");
        let length = length.first().and_then(|text| text.parse().ok());
        Framing::Length(length.unwrap_or(0))
    }

    /// How an answer's body ends.
    fn answer_framing(&self, to_head: bool) -> Framing {
        if to_head || self.status() < 200 || [204, 304].contains(&self.status()) {
            return Framing::Length(0);
        }
        if self.has("transfer-encoding") {
            return Framing::Chunked;
        }
        let length = self.values("content-length");
        let length = length.first().map(|text| text.parse().unwrap());
        length.map_or(Framing::Close, Framing::Length)
    }
}

fn split_header(line: &str) -> (String, String) {
    let (name, value) = line.split_once(':').unwrap_or((line, ""));
    let value = value.trim_matches([' ', '\t']);
    (name.to_owned(), value.to_owned())
}

/// How much of a body is still to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Framing {
    Length(u64),
    Chunked,
    Close,
    Done,
}

/// Data in the chunked coding, as one chunk; none at all is the last one.
pub fn chunked(data: impl AsRef<[u8]>) -> Vec<u8> {
    let data = data.as_ref();
    let mut chunk = format!("{:x}\r\n", data.len()).into_bytes();
    chunk.extend_from_slice(data);
    chunk.extend_from_slice(b"\r\n");
    chunk
}

/// A connection with what has been read of it and not yet used.
#[derive(Debug)]
pub struct Wire {
    pub stream: TcpStream,
    buffer: Vec<u8>,
    /// Every byte that came is counted here.
    pub received: u64,
}

impl Wire {
    pub fn new(stream: TcpStream) -> Self {
        stream.set_nodelay(true).unwrap();
        Self {
            stream,
            buffer: Vec::new(),
            received: 0,
        }
    }

    /// What came and has not been used.
    pub fn waiting(&self) -> &[u8] {
        &self.buffer
    }

    /// Reads once: how many bytes came, 0 at the end.
    pub fn fill(&mut self) -> io::Result<usize> {
        let mut space = [0; 64 * 1024];
        let count = loop {
            match self.stream.read(&mut space) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        self.buffer.extend_from_slice(&space[..count]);
        self.received += count as u64;
        Ok(count)
    }

    fn fill_some(&mut self) -> io::Result<()> {
        match self.fill()? {
            0 => Err(Error::new(
                ErrorKind::UnexpectedEof,
                "the message breaks off",
            )),
            _ => Ok(()),
        }
    }

    /// What is there, up to `count`.
    fn take(&mut self, count: usize) -> Vec<u8> {
        let rest = self.buffer.split_off(count);
        std::mem::replace(&mut self.buffer, rest)
    }

    fn until(&mut self, end: &[u8]) -> io::Result<Vec<u8>> {
        let mut looked_at = 0;
        loop {
            let window = self.buffer[looked_at..].windows(end.len());
            if let Some(at) = window.into_iter().position(|bytes| bytes == end) {
                return Ok(self.take(looked_at + at + end.len()));
            }
            looked_at = self.buffer.len().saturating_sub(end.len() - 1);
            self.fill_some()?;
        }
    }

    /// The next head, or none where the connection ends before it.
    pub fn head(&mut self) -> io::Result<Option<Head>> {
        if self.buffer.is_empty() && self.fill()? == 0 {
            return Ok(None);
        }
        Ok(Some(Head::parse(self.until(b"\r\n\r\n")?)))
    }

    fn exactly(&mut self, count: usize) -> io::Result<Vec<u8>> {
        while self.buffer.len() < count {
            self.fill_some()?;
        }
        Ok(self.take(count))
    }

    /// The next chunk, whole; none at the last one, whose trailers are still to
    /// be read.
    fn chunk(&mut self) -> io::Result<Option<Vec<u8>>> {
        let line = latin1(&self.until(b"\r\n")?);
        let digits = line.trim_end_matches("\r\n");
        let bad = || Error::new(ErrorKind::InvalidData, format!("the chunk size {line:?}"));
        let size = usize::from_str_radix(digits, 16).map_err(|_| bad())?;
        if size == 0 {
            return Ok(None);
        }
        let mut data = self.exactly(size + 2)?;
        if data.split_off(size) != b"\r\n" {
            return Err(Error::new(ErrorKind::InvalidData, "the end of a chunk"));
        }
        Ok(Some(data))
    }

    fn trailers(&mut self) -> io::Result<Vec<(String, String)>> {
        let mut trailers = Vec::new();
        loop {
            let line = latin1(&self.until(b"\r\n")?);
            match line.trim_end_matches("\r\n") {
                "" => return Ok(trailers),
                line => trailers.push(split_header(line)),
            }
        }
    }

    /// The next piece of a body: a chunk, or what is there of another kind.
    /// None at the end, with the trailers.
    pub(super) fn piece(&mut self, left: &mut Framing) -> io::Result<Piece> {
        match *left {
            Framing::Done | Framing::Length(0) => {
                *left = Framing::Done;
                Ok(Piece::End(Vec::new()))
            }
            Framing::Chunked => match self.chunk()? {
                Some(data) => Ok(Piece::Data(data)),
                None => {
                    *left = Framing::Done;
                    Ok(Piece::End(self.trailers()?))
                }
            },
            Framing::Length(length) => {
                if self.buffer.is_empty() {
                    self.fill_some()?;
                }
                let here = length.min(self.buffer.len() as u64);
                *left = Framing::Length(length - here);
                Ok(Piece::Data(self.take(here as usize)))
            }
            Framing::Close => {
                if self.buffer.is_empty() && self.fill()? == 0 {
                    *left = Framing::Done;
                    return Ok(Piece::End(Vec::new()));
                }
                Ok(Piece::Data(std::mem::take(&mut self.buffer)))
            }
        }
    }

    /// Waits for the other side to close or reset the connection: when it did.
    /// What it sends meanwhile is kept.
    pub fn wait_for_close(&mut self, limit: Duration) -> Option<Instant> {
        let deadline = Instant::now() + limit;
        let before = self.stream.read_timeout().unwrap();
        let closed = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break None;
            }
            self.stream.set_read_timeout(Some(left)).unwrap();
            match self.fill() {
                Ok(0) => break Some(Instant::now()),
                Ok(_) => {}
                Err(error) if is_timeout(&error) => break None,
                Err(_) => break Some(Instant::now()),
            }
        };
        let _ = self.stream.set_read_timeout(before);
        closed
    }

    /// Ends the connection with a reset, so that the other side loses what it
    /// has not read yet.
    pub fn reset(self) {
        let socket = tokio::net::TcpSocket::from_std_stream(self.stream);
        socket.set_zero_linger().unwrap();
    }
}

pub(super) enum Piece {
    Data(Vec<u8>),
    End(Vec<(String, String)>),
}

pub(super) fn is_timeout(error: &Error) -> bool {
    [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&error.kind())
}

/// A whole answer.
#[derive(Clone, Default)]
pub struct Answer {
    pub head: Head,
    pub body: Vec<u8>,
    /// The pieces that the body came in and when.
    pub pieces: Vec<(Instant, Vec<u8>)>,
    pub trailers: Vec<(String, String)>,
    /// The status lines of the 1xx answers before it.
    pub before: Vec<String>,
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let body = self.text();
        let begin: String = body.chars().take(300).collect();
        write!(
            f,
            "{:?} {:?}, {} bytes: {begin:?}",
            self.before,
            self.head,
            body.len()
        )
    }
}

impl Answer {
    pub fn status(&self) -> u16 {
        self.head.status()
    }

    #[track_caller]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.value(name)
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The code of an answer of the forwarder's own.
    #[track_caller]
    pub fn code(&self) -> Option<&str> {
        self.header("x-mpool-error")
    }
}

/// An answer that did not come whole: what there is of it, and why no more.
#[derive(Debug)]
pub struct Broken {
    pub answer: Answer,
    pub error: Error,
}

impl Broken {
    pub fn timed_out(&self) -> bool {
        is_timeout(&self.error)
    }
}

/// A request with the key as a bearer token and, where there is a body, its
/// length.
pub fn request(
    method: &str,
    target: &str,
    key: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Vec<u8> {
    let mut head = format!("{method} {target} HTTP/1.1\r\nHost: front\r\n");
    if !key.is_empty() {
        head += &format!("Authorization: Bearer {key}\r\n");
    }
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    if !body.is_empty() {
        head += &format!("Content-Length: {}\r\n", body.len());
    }
    // Values above 0x7f are sent as the bytes of the same number.
    let mut bytes: Vec<u8> = (head + "\r\n").chars().map(|c| c as u8).collect();
    bytes.extend_from_slice(body);
    bytes
}

/// A connection to the forwarder.
#[derive(Debug)]
pub struct Client {
    pub wire: Wire,
    left: Framing,
    /// Whether the next answer is one to a HEAD request.
    to_head: bool,
    answer: Answer,
}

impl Client {
    #[track_caller]
    pub fn connect(port: u16) -> Self {
        Self::over(TcpStream::connect(("127.0.0.1", port)).unwrap())
    }

    /// On a connection that there is.
    pub fn over(stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self {
            wire: Wire::new(stream),
            left: Framing::Done,
            to_head: false,
            answer: Answer::default(),
        }
    }

    /// How long it waits for what it reads.
    pub fn patience(&self, limit: Duration) {
        self.wire.stream.set_read_timeout(Some(limit)).unwrap();
    }

    /// Sends these bytes as they are.
    #[track_caller]
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_send(bytes).unwrap();
    }

    pub fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.wire.stream.write_all(bytes.as_ref())
    }

    /// Sends a request with the key as a bearer token, see [`request`].
    #[track_caller]
    pub fn ask(
        &mut self,
        method: &str,
        target: &str,
        key: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) {
        self.to_head = method == "HEAD";
        self.send(request(method, target, key, headers, body));
    }

    /// The same, and the whole answer.
    #[track_caller]
    pub fn round(
        &mut self,
        method: &str,
        target: &str,
        key: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Answer {
        self.ask(method, target, key, headers, body);
        self.answer()
    }

    #[track_caller]
    pub fn get(&mut self, target: &str, key: &str) -> Answer {
        self.round("GET", target, key, &[], b"")
    }

    /// Says that the next answer is one to a HEAD request sent by hand.
    pub fn expect_no_body(&mut self) {
        self.to_head = true;
    }

    /// The next head, those of 1xx answers too.
    pub fn try_any_head(&mut self) -> io::Result<Head> {
        let head = self.wire.head()?;
        head.ok_or_else(|| Error::new(ErrorKind::UnexpectedEof, "closed without an answer"))
    }

    pub fn try_head(&mut self) -> io::Result<Head> {
        self.answer = Answer::default();
        loop {
            let head = self.try_any_head()?;
            if head.status() < 200 && head.status() != 101 {
                self.answer.before.push(head.line);
                continue;
            }
            self.left = head.answer_framing(std::mem::take(&mut self.to_head));
            self.answer.head = head.clone();
            return Ok(head);
        }
    }

    /// The head of the next answer; 1xx answers are passed over.
    #[track_caller]
    pub fn head(&mut self) -> Head {
        self.try_head().unwrap()
    }

    /// The next piece of the body, none at its end.
    pub fn try_piece(&mut self) -> io::Result<Option<Vec<u8>>> {
        match self.wire.piece(&mut self.left)? {
            Piece::Data(data) => {
                self.answer.body.extend_from_slice(&data);
                let now = Instant::now();
                self.answer.pieces.push((now, data.clone()));
                Ok(Some(data))
            }
            Piece::End(trailers) => {
                self.answer.trailers = trailers;
                Ok(None)
            }
        }
    }

    #[track_caller]
    pub fn piece(&mut self) -> Option<Vec<u8>> {
        self.try_piece().unwrap()
    }

    /// What is left of the body is read and thrown away: how much it was.
    #[track_caller]
    pub fn drain(&mut self, mut look: impl FnMut(&[u8])) -> u64 {
        let mut length = 0;
        loop {
            match self.wire.piece(&mut self.left).unwrap() {
                Piece::Data(data) => {
                    look(&data);
                    length += data.len() as u64;
                }
                Piece::End(_) => return length,
            }
        }
    }

    /// The rest of an answer whose head has been read.
    pub fn try_rest(&mut self) -> Result<Answer, Box<Broken>> {
        loop {
            match self.try_piece() {
                Ok(Some(_)) => {}
                Ok(None) => return Ok(std::mem::take(&mut self.answer)),
                Err(error) => {
                    let answer = std::mem::take(&mut self.answer);
                    return Err(Box::new(Broken { answer, error }));
                }
            }
        }
    }

    #[track_caller]
    pub fn rest(&mut self) -> Answer {
        self.try_rest().unwrap()
    }

    /// A whole answer, or what there is of it.
    pub fn try_answer(&mut self) -> Result<Answer, Box<Broken>> {
        if let Err(error) = self.try_head() {
            let answer = std::mem::take(&mut self.answer);
            return Err(Box::new(Broken { answer, error }));
        }
        self.try_rest()
    }

    #[track_caller]
    pub fn answer(&mut self) -> Answer {
        self.try_answer().unwrap()
    }

    /// Waits for the forwarder to close the connection: when it did.
    pub fn wait_for_close(&mut self, limit: Duration) -> Option<Instant> {
        self.wire.wait_for_close(limit)
    }

    /// Sends no more, but still reads.
    pub fn close_sending(&self) {
        self.wire.stream.shutdown(Shutdown::Write).unwrap();
    }

    /// Goes, as a client does that ends its process: when it went.
    pub fn leave(self) -> Instant {
        let now = Instant::now();
        drop(self);
        now
    }
}
