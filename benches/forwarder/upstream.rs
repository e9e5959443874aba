//! The upstream that all proxies share: a chat completion, at once or as an event
//! stream, in the form that every provider's clients know. It does as little as
//! it can for a request, so that what is measured is the proxies.

use std::io::{self, ErrorKind};
use std::net::TcpListener as StdListener;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};

/// What a request asks for.
pub(crate) const SHORT: &str =
    r#"{"model":"bench","messages":[{"role":"user","content":"How are you?"}]}"#;
pub(crate) const STREAM: &str =
    r#"{"model":"bench","stream":true,"messages":[{"role":"user","content":"How are you?"}]}"#;
/// What stands in each answer, and at the end of a stream.
pub(crate) const TEXT: &str = "Hello there, how are you today?";
pub(crate) const DONE: &str = "data: [DONE]";
/// Events of a stream, each in a chunk and a write of its own.
pub(crate) const EVENTS: usize = 10;

const ANSWER: &str = r#"{"id":"c","object":"chat.completion","created":1755266400,"model":"bench","choices":[{"index":0,"message":{"role":"assistant","content":"Hello there, how are you today?"},"finish_reason":"stop"}],"usage":{"prompt_tokens":1,"completion_tokens":8,"total_tokens":9}}"#;

/// Serves on a free port from a thread of its own; answers the port. `pace` is
/// the time between two events.
pub(crate) fn start(pace: Duration) -> u16 {
    let listener = StdListener::bind(("127.0.0.1", 0)).unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = { runtime }.enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = TcpListener::from_std(listener).unwrap();
            let answers = Arc::new(Answers::new(pace));
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let answers = Arc::clone(&answers);
                // A client that goes ends its connection, nothing more.
                tokio::spawn(async move { answers.serve(&stream).await });
            }
        })
    });
    port
}

struct Answers {
    short: Vec<u8>,
    /// One write each; the head goes with the first.
    events: Vec<Vec<u8>>,
    pace: Duration,
}

impl Answers {
    fn new(pace: Duration) -> Self {
        let head = "HTTP/1.1 200 OK\r\nContent-Type: ";
        let length = ANSWER.len();
        let short = format!("{head}application/json\r\nContent-Length: {length}\r\n\r\n{ANSWER}");
        let chunk = |data: &str| format!("{:x}\r\n{data}\r\n", data.len());
        let mut events = vec![format!(
            "{head}text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )];
        for number in 0..EVENTS {
            let (text, reason) = match number {
                0 => (TEXT, "null"),
                last if last + 1 == EVENTS => ("", r#""stop""#),
                _ => (" Fine?", "null"),
            };
            let event = format!(
                r#"data: {{"id":"c","object":"chat.completion.chunk","created":1755266400,"model":"bench","choices":[{{"index":0,"delta":{{"role":"assistant","content":"{text}"}},"finish_reason":{reason}}}]}}"#
            );
            let event = chunk(&(event + "\n\n"));
            if number == 0 {
                events[0] += &event;
            } else {
                events.push(event);
            }
        }
        let end = chunk(&format!("{DONE}\n\n")) + "0\r\n\r\n";
        events.last_mut().unwrap().push_str(&end);
        Self {
            short: short.into_bytes(),
            events: events.into_iter().map(String::into_bytes).collect(),
            pace,
        }
    }

    async fn serve(&self, stream: &TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let mut received = Vec::new();
        loop {
            let (length, is_stream) = loop {
                match request(&received) {
                    Some(request) => break request,
                    None => read(stream, &mut received).await?,
                }
            };
            received.drain(..length);
            if !is_stream {
                write(stream, &self.short).await?;
                continue;
            }
            for (number, event) in self.events.iter().enumerate() {
                if number > 0 && self.pace.is_zero() {
                    tokio::task::yield_now().await;
                } else if number > 0 {
                    tokio::time::sleep(self.pace).await;
                }
                write(stream, event).await?;
            }
        }
    }
}

/// The length of the first request in what was received, once it is whole, and
/// whether it asks for a stream.
fn request(received: &[u8]) -> Option<(usize, bool)> {
    let head = memchr::memmem::find(received, b"\r\n\r\n")? + 4;
    let lines = String::from_utf8_lossy(&received[..head]).to_ascii_lowercase();
    let length = lines
        .lines()
        .find_map(|line| line.strip_prefix("content-length:"));
    let length: usize = length.map_or(0, |length| length.trim().parse().unwrap());
    let body = received.get(head..head + length)?;
    let is_stream = memchr::memmem::find(body, br#""stream":true"#).is_some()
        || memchr::memmem::find(body, br#""stream": true"#).is_some();
    Some((head + length, is_stream))
}

async fn read(stream: &TcpStream, received: &mut Vec<u8>) -> io::Result<()> {
    let mut part = [0; 4096];
    loop {
        stream.readable().await?;
        match stream.try_read(&mut part) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(length) => {
                received.extend_from_slice(&part[..length]);
                return Ok(());
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

async fn write(stream: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match stream.try_write(bytes) {
            Ok(length) => bytes = &bytes[length..],
            Err(error) if error.kind() == ErrorKind::WouldBlock => stream.writable().await?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
