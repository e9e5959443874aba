//! The two servers that the forwarder speaks with: a Redis that lends, and an
//! upstream that writes down what it gets and takes offence at anything odd.

use crate::http1::{self, Manner, Message, Parsed};
use std::cell::RefCell;
use std::net::TcpListener;
use std::rc::Rc;
use tokio::net::TcpStream;
use tokio::task::spawn_local;

/// What accounts a, b and x are sent with.
pub const CREDENTIALS: [(&str, &[u8]); 3] = [
    ("authorization", b"Bearer token-of-a"),
    ("x-api-key", b"token-of-b"),
    ("x-api-key", b"token-of-x"),
];

/// What a client key may be lent.
pub fn credentials_of(key: &[u8]) -> impl Iterator<Item = &'static (&'static str, &'static [u8])> {
    let lent = match key {
        b"client-key-a" => &CREDENTIALS[..2],
        b"client-key-x" => &CREDENTIALS[2..],
        _ => &[],
    };
    lent.iter()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behaviour {
    /// An answer with a length.
    Plain,
    /// An answer in chunks, with trailers.
    Chunks,
    /// Account a is refused.
    Refuses,
    /// The first request's connection breaks.
    Breaks,
    /// What is answered is no HTTP.
    Garbage,
    /// The answer comes before the body.
    Early,
    /// Headers that are nobody else's business, a body up to the end.
    HopByHop,
    /// Answers break in the middle.
    Half,
}

impl Behaviour {
    pub fn of(byte: u8) -> Self {
        match byte & 7 {
            0 => Self::Plain,
            1 => Self::Chunks,
            2 => Self::Refuses,
            3 => Self::Breaks,
            4 => Self::Garbage,
            5 => Self::Early,
            6 => Self::HopByHop,
            _ => Self::Half,
        }
    }

    /// Whether each request is answered well, and so sent once.
    pub fn is_well(self) -> bool {
        matches!(self, Self::Plain | Self::Chunks)
    }
}

/// Both servers, and what they have seen.
#[derive(Clone)]
pub struct Sides {
    seen: Rc<RefCell<Vec<Message>>>,
    /// To be closed at the end, in a way that leaves nothing behind.
    streams: Rc<RefCell<Vec<Rc<TcpStream>>>>,
    /// Whether account a is out of the pool.
    cooled: Rc<RefCell<bool>>,
    behaviour: Behaviour,
}

impl Sides {
    pub fn start(redis: &TcpListener, upstream: &TcpListener, behaviour: Behaviour) -> Self {
        let sides = Self {
            seen: Rc::default(),
            streams: Rc::default(),
            cooled: Rc::default(),
            behaviour,
        };
        for (listener, is_redis) in [(redis, true), (upstream, false)] {
            // What the input before this one has left.
            while let Ok((stream, _)) = listener.accept() {
                drop(stream);
            }
            let listener =
                tokio::net::TcpListener::from_std(listener.try_clone().unwrap()).unwrap();
            let sides = sides.clone();
            spawn_local(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    let _ = stream.set_nodelay(true);
                    let stream = Rc::new(stream);
                    sides.streams.borrow_mut().push(Rc::clone(&stream));
                    let sides = sides.clone();
                    spawn_local(async move {
                        let _ = if is_redis {
                            sides.lend(&stream).await
                        } else {
                            sides.answer(&stream).await
                        };
                    });
                }
            });
        }
        sides
    }

    /// Closes all connections; answers what the upstream got.
    pub fn end(self) -> Vec<Message> {
        for stream in self.streams.take() {
            // Without this each would keep a port for a minute.
            let _ = stream.set_zero_linger();
            let _ = end_writing(&stream);
        }
        self.seen.take()
    }

    async fn lend(&self, stream: &TcpStream) -> std::io::Result<()> {
        let mut came = Vec::new();
        loop {
            while let Some((words, length)) = command(&came) {
                came.drain(..length);
                let words: Vec<&[u8]> = words.iter().map(Vec::as_slice).collect();
                let reply = match words[..] {
                    [b"CLIENT", b"SETNAME", _] | [b"CLIENT", b"TRACKING", b"ON", ..] => {
                        "+OK\r\n".to_owned()
                    }
                    [b"HELLO", ..] => "%2\r\n+proto\r\n:3\r\n+role\r\n+master\r\n".to_owned(),
                    [b"MPOOL.STATUS", b"KEY", _] => "%1\r\n+expires_at\r\n_\r\n".to_owned(),
                    [b"MPOOL.ACQUIRE", key, b"*", b"WITHTOKEN"] => self.lease(key),
                    [b"MPOOL.COOLDOWN", b"medium", account, b"*", ms]
                    | [
                        b"MPOOL.COOLDOWN",
                        b"medium",
                        account,
                        b"*",
                        ms,
                        b"REASON",
                        _,
                    ] => {
                        assert!(matches!(account, b"a" | b"b"), "a strange account");
                        assert!(ms.iter().all(u8::is_ascii_digit));
                        if account == b"a" {
                            *self.cooled.borrow_mut() = ms != b"0";
                        }
                        // Those who remember its leases are told.
                        ">2\r\n$10\r\ninvalidate\r\n_\r\n*0\r\n".to_owned()
                    }
                    _ => panic!("Redis is asked {words:?}"),
                };
                write(stream, reply.as_bytes()).await?;
            }
            if !read(stream, &mut came).await? {
                return Ok(());
            }
        }
    }

    fn lease(&self, key: &[u8]) -> String {
        assert!(
            !key.is_empty() && key.iter().all(u8::is_ascii_graphic),
            "a strange key"
        );
        let cooled = *self.cooled.borrow();
        let (account, state, auth) = match key {
            b"client-key-a" if cooled => ("b", "failover", "x-api-key"),
            b"client-key-a" => ("a", "current", "bearer"),
            b"client-key-x" => ("x", "bound", "x-api-key"),
            b"client-key-full" => {
                return "-POOLFULL every account is full; the next slot falls due at 1\r\n".into();
            }
            b"client-key-revoked" => return "-REVOKED this key has been revoked\r\n".into(),
            _ => return "-NOKEY this key is not registered\r\n".into(),
        };
        let token = format!("token-of-{account}");
        let fields = [
            "account", account, "state", state, "token", &token, "auth", auth,
        ];
        let fields = fields.map(|field| format!("${}\r\n{field}\r\n", field.len()));
        format!(
            "*10\r\n{}+next_rotation\r\n:253402300799999\r\n",
            fields.concat()
        )
    }

    async fn answer(&self, stream: &TcpStream) -> std::io::Result<()> {
        let mut came = Vec::new();
        let mut leave_given = false;
        loop {
            match http1::request(&came, Manner::Strict) {
                Parsed::Bad(why) => panic!("{why}: {:?}", String::from_utf8_lossy(&came)),
                Parsed::Whole(message, length) => {
                    came.drain(..length);
                    leave_given = false;
                    if !self.respond(stream, message).await? {
                        return Ok(());
                    }
                    continue;
                }
                Parsed::Part(Some(message)) => {
                    if self.behaviour == Behaviour::Early {
                        self.respond(stream, message).await?;
                        return Ok(());
                    }
                    if !leave_given
                        && message
                            .values("expect")
                            .any(|value| value.eq_ignore_ascii_case(b"100-continue"))
                    {
                        leave_given = true;
                        write(stream, b"HTTP/1.1 100 Continue\r\n\r\n").await?;
                    }
                }
                Parsed::Part(None) => {}
            }
            if !read(stream, &mut came).await? {
                if let Parsed::Part(Some(message)) = http1::request(&came, Manner::Strict) {
                    self.seen.borrow_mut().push(message);
                }
                return Ok(());
            }
        }
    }

    /// Answers whether the connection goes on.
    async fn respond(&self, stream: &TcpStream, message: Message) -> std::io::Result<bool> {
        let number = self.seen.borrow().len();
        let is_head = message.method == b"HEAD";
        let is_a = message
            .values("authorization")
            .any(|value| value.ends_with(b"token-of-a"));
        self.seen.borrow_mut().push(message);
        let body = if is_head {
            String::new()
        } else {
            format!("answer {number}")
        };
        let status = if self.behaviour == Behaviour::Refuses && is_a {
            "401 Unauthorized"
        } else {
            "200 OK"
        };
        let head = format!("HTTP/1.1 {status}\r\nx-seen: {number}\r\n");
        let length = format!("content-length: {}\r\n", body.len());
        let (text, goes_on) = match self.behaviour {
            Behaviour::Plain | Behaviour::Refuses => (format!("{head}{length}\r\n{body}"), true),
            Behaviour::Breaks if number > 0 => (format!("{head}{length}\r\n{body}"), true),
            Behaviour::Breaks => (String::new(), false),
            Behaviour::Chunks => {
                let head = format!("{head}transfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n");
                let chunks = format!(
                    "3\r\nabc\r\n{:x}\r\n{body}\r\n0\r\nx-sum: 1\r\n\r\n",
                    body.len()
                );
                (
                    if is_head {
                        head
                    } else {
                        format!("{head}{chunks}")
                    },
                    true,
                )
            }
            Behaviour::Garbage => ("SSH-2.0-no\r\nHTTP/1.1 200 OK\r\n\r\n".to_owned(), false),
            Behaviour::Early => (
                format!("{head}{length}connection: close\r\n\r\n{body}"),
                false,
            ),
            Behaviour::HopByHop => {
                let more = "connection: close, x-hop\r\nx-hop: 1\r\nkeep-alive: timeout=5\r\nx-mpool-error: FAKE\r\n";
                (format!("{head}{more}\r\n{body}"), false)
            }
            Behaviour::Half => (format!("{head}content-length: 100\r\n\r\n{body}"), false),
        };
        write(stream, text.as_bytes()).await?;
        if !goes_on {
            let _ = end_writing(stream);
        }
        Ok(goes_on)
    }
}

/// Ends this side's part; the other one may still be read.
fn end_writing(stream: &TcpStream) -> std::io::Result<()> {
    use std::os::fd::AsFd;
    let view = std::net::TcpStream::from(stream.as_fd().try_clone_to_owned()?);
    view.shutdown(std::net::Shutdown::Write)
}

async fn read(stream: &TcpStream, came: &mut Vec<u8>) -> std::io::Result<bool> {
    loop {
        stream.readable().await?;
        match stream.try_read_buf(came) {
            Ok(length) => return Ok(length > 0),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

async fn write(stream: &TcpStream, mut bytes: &[u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        stream.writable().await?;
        match stream.try_write(bytes) {
            Ok(length) => bytes = &bytes[length..],
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A command's words and its length on the wire; nothing while it is not all there.
fn command(bytes: &[u8]) -> Option<(Vec<Vec<u8>>, usize)> {
    let mut at = 0;
    let number = |kind: u8, at: &mut usize| -> Option<usize> {
        let rest = bytes.get(*at..)?;
        let end = rest.windows(2).position(|window| window == b"\r\n")?;
        assert_eq!(rest[0], kind, "no command");
        *at += end + 2;
        Some(std::str::from_utf8(&rest[1..end]).unwrap().parse().unwrap())
    };
    let count = number(b'*', &mut at)?;
    let mut words = Vec::new();
    for _ in 0..count {
        let length = number(b'$', &mut at)?;
        words.push(bytes.get(at..at + length)?.to_vec());
        assert_eq!(
            bytes.get(at + length..at + length + 2)?,
            b"\r\n",
            "no command"
        );
        at += length + 2;
    }
    Some((words, at))
}
