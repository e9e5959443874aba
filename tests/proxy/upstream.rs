//! An upstream that speaks HTTP/1.1 by hand. It keeps every request as it came
//! over the wire, and answers as a closure or the test itself says, byte by
//! byte. A head that is not well-formed fails the test when the upstream goes.

use super::Target;
use super::wire::{Framing, Head, Piece, Wire, chunked};
use crate::support::{PATIENCE, wait_for};
use std::io::{self, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A request as it came.
#[derive(Clone)]
pub struct Request {
    /// Which connection it came over, counted from 0.
    pub connection: usize,
    pub at: Instant,
    pub method: String,
    pub target: String,
    pub head: Head,
    /// As much of the body as has been read.
    pub body: Vec<u8>,
    pub trailers: Vec<(String, String)>,
    /// Whether the body came to its end.
    pub whole: bool,
}

impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let body = super::wire::latin1(&self.body[..self.body.len().min(300)]);
        let (length, whole) = (self.body.len(), self.whole);
        write!(
            f,
            "{:?}, {length} bytes, whole: {whole}: {body:?}",
            self.head
        )
    }
}

impl Request {
    /// The token that it came with, as a bearer token or an x-api-key.
    pub fn token(&self) -> Option<String> {
        token(&self.head)
    }
}

fn token(head: &Head) -> Option<String> {
    let bearer = head.values("authorization");
    let bearer = bearer
        .first()
        .and_then(|value| value.strip_prefix("Bearer "));
    let key = head.values("x-api-key");
    bearer.or(key.first().copied()).map(str::to_owned)
}

type Handler = dyn Fn(Exchange) + Send + Sync;

#[derive(Default)]
struct Shared {
    requests: Mutex<Vec<Request>>,
    faults: Mutex<Vec<String>>,
    /// For closing them; none once they have ended.
    connections: Mutex<Vec<Option<TcpStream>>>,
    open: AtomicUsize,
    stopping: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A handler that panics fails its own exchange, not all that come after.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An upstream on a free port.
pub struct Upstream {
    pub port: u16,
    shared: Arc<Shared>,
    handler: Arc<Handler>,
    exchanges: Option<Mutex<Receiver<Exchange>>>,
    listener: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Upstream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upstream")
            .field("port", &self.port)
            .finish_non_exhaustive()
    }
}

impl Target for Upstream {
    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
}

impl Upstream {
    /// Answers each request with the handler, on a thread for each connection.
    pub fn start(handler: impl Fn(Exchange) + Send + Sync + 'static) -> Self {
        let mut upstream = Self {
            port: 0,
            shared: Arc::default(),
            handler: Arc::new(handler),
            exchanges: None,
            listener: None,
        };
        upstream.start_again();
        upstream
    }

    /// Leaves each request to the test, which takes it with [`Self::next`].
    pub fn manual() -> Self {
        let (sender, receiver) = mpsc::channel();
        let mut upstream = Self::start(move |exchange| {
            // Nobody takes it any more at the test's end.
            let _ = sender.send(exchange);
        });
        upstream.exchanges = Some(Mutex::new(receiver));
        upstream
    }

    /// Answers each request with these bytes, once its body has come.
    pub fn answering(raw: impl Into<Vec<u8>>) -> Self {
        let raw = raw.into();
        Self::start(move |exchange| exchange.answer(&raw))
    }

    /// Answers 200 and `ok`.
    pub fn ok() -> Self {
        Self::start(Exchange::ok)
    }

    /// Answers 401 to requests with these tokens, and 200 with the token to others.
    pub fn refusing(tokens: &'static [&'static str]) -> Self {
        Self::start(move |exchange| {
            let token = exchange.token().unwrap_or_default();
            match tokens.contains(&token.as_str()) {
                true => exchange.respond(401, &[], b"refused"),
                false => exchange.respond(200, &[], token.as_bytes()),
            }
        })
    }

    /// An upstream that speaks HTTP/2 alone and leaves each request to the test.
    pub fn http2() -> super::Http2Upstream {
        super::Http2Upstream::manual()
    }

    /// The next request, to be answered by the test.
    #[track_caller]
    pub fn next(&self) -> Exchange {
        self.next_within(PATIENCE).expect("no request came")
    }

    pub fn next_within(&self, limit: Duration) -> Option<Exchange> {
        let exchanges = self.exchanges.as_ref();
        let exchanges = exchanges.expect("this upstream answers by itself");
        lock(exchanges).recv_timeout(limit).ok()
    }

    /// Every request so far, whether answered or not.
    pub fn requests(&self) -> Vec<Request> {
        lock(&self.shared.requests).clone()
    }

    /// The only request so far.
    #[track_caller]
    pub fn only(&self) -> Request {
        let mut requests = self.requests();
        assert_eq!(requests.len(), 1, "{requests:#?}");
        requests.remove(0)
    }

    /// How many requests there were.
    pub fn count(&self) -> usize {
        lock(&self.shared.requests).len()
    }

    /// Forgets the requests so far.
    pub fn forget(&self) {
        lock(&self.shared.requests).clear();
    }

    #[track_caller]
    pub fn wait_for_requests(&self, count: usize) -> Vec<Request> {
        wait_for(&format!("{count} requests"), || {
            (self.count() >= count).then(|| self.requests())
        })
    }

    /// How many connections there were so far.
    pub fn connections(&self) -> usize {
        lock(&self.shared.connections).len()
    }

    /// How many connections there are.
    pub fn open_connections(&self) -> usize {
        self.shared.open.load(Ordering::SeqCst)
    }

    /// Ends every connection; new ones are refused until [`Self::start_again`].
    pub fn stop(&mut self) {
        if let Some(listener) = self.listener.take() {
            self.shared.stopping.store(true, Ordering::SeqCst);
            // Wakes the listener up.
            let _ = TcpStream::connect(("127.0.0.1", self.port));
            let _ = listener.join();
        }
        self.close_connections();
    }

    /// Ends every connection there is.
    pub fn close_connections(&self) {
        for connection in lock(&self.shared.connections).iter().flatten() {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    /// Listens, on the port that it had before.
    pub fn start_again(&mut self) {
        self.shared.stopping.store(false, Ordering::SeqCst);
        let listener = TcpListener::bind(("127.0.0.1", self.port)).unwrap();
        self.port = listener.local_addr().unwrap().port();
        let (shared, handler) = (Arc::clone(&self.shared), Arc::clone(&self.handler));
        self.listener = Some(std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if shared.stopping.load(Ordering::SeqCst) {
                    return;
                }
                let (shared, handler) = (Arc::clone(&shared), Arc::clone(&handler));
                let number = {
                    let mut connections = lock(&shared.connections);
                    connections.push(stream.try_clone().ok());
                    connections.len() - 1
                };
                shared.open.fetch_add(1, Ordering::SeqCst);
                std::thread::spawn(move || {
                    serve(Wire::new(stream), number, &shared, &*handler);
                    // The copy for close_connections would keep it open.
                    lock(&shared.connections)[number] = None;
                    shared.open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        }));
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.stop();
        let faults = lock(&self.shared.faults);
        if !std::thread::panicking() {
            assert!(faults.is_empty(), "the upstream got {faults:#?}");
        }
    }
}

/// Takes the requests of one connection, one after the other.
fn serve(mut wire: Wire, connection: usize, shared: &Arc<Shared>, handler: &Handler) {
    loop {
        let head = match wire.head() {
            Ok(Some(head)) => head,
            Ok(None) => return,
            Err(_) => {
                let rest = wire.waiting();
                if !rest.is_empty() {
                    let rest = super::wire::latin1(rest);
                    lock(&shared.faults).push(format!("a head that broke off: {rest:?}"));
                }
                return;
            }
        };
        if let Some(fault) = head.fault() {
            lock(&shared.faults).push(format!("{fault} in {:?}", super::wire::latin1(&head.raw)));
        }
        let (back, returned) = mpsc::channel();
        let exchange = Exchange::new(wire, head, connection, shared, back);
        handler(exchange);
        // It comes back with the end of an exchange after which it can be used.
        match returned.recv() {
            Ok(used) => wire = used,
            Err(_) => return,
        }
    }
}

/// A request that waits for its answer. Its connection is closed with it unless
/// the answer was whole.
pub struct Exchange {
    pub head: Head,
    pub method: String,
    pub target: String,
    pub connection: usize,
    wire: Option<Wire>,
    left: Framing,
    keep: bool,
    index: usize,
    shared: Arc<Shared>,
    back: Sender<Wire>,
}

impl Exchange {
    fn new(
        wire: Wire,
        head: Head,
        connection: usize,
        shared: &Arc<Shared>,
        back: Sender<Wire>,
    ) -> Self {
        let mut words = head.line.split(' ').map(str::to_owned);
        let (method, target) = (
            words.next().unwrap_or_default(),
            words.next().unwrap_or_default(),
        );
        let left = head.request_framing();
        let index = {
            let mut requests = lock(&shared.requests);
            requests.push(Request {
                connection,
                at: Instant::now(),
                method: method.clone(),
                target: target.clone(),
                head: head.clone(),
                body: Vec::new(),
                trailers: Vec::new(),
                whole: left == Framing::Length(0),
            });
            requests.len() - 1
        };
        Self {
            head,
            method,
            target,
            connection,
            wire: Some(wire),
            left,
            keep: false,
            index,
            shared: Arc::clone(shared),
            back,
        }
    }

    /// The token that it came with, as a bearer token or an x-api-key.
    pub fn token(&self) -> Option<String> {
        token(&self.head)
    }

    /// The connection, for what has no method here.
    pub fn wire(&mut self) -> &mut Wire {
        self.wire.as_mut().unwrap()
    }

    /// The next piece of the request's body, none at its end: a chunk as it
    /// came, or what is there of a body with a length.
    pub fn try_piece(&mut self) -> io::Result<Option<Vec<u8>>> {
        let wire = self.wire.as_mut().unwrap();
        let piece = wire.piece(&mut self.left)?;
        let mut requests = lock(&self.shared.requests);
        // It may have been forgotten.
        let request = requests.get_mut(self.index);
        match piece {
            Piece::Data(data) => {
                if let Some(request) = request {
                    request.body.extend_from_slice(&data);
                }
                Ok(Some(data))
            }
            Piece::End(trailers) => {
                if let Some(request) = request {
                    request.trailers.extend(trailers);
                    request.whole = true;
                }
                Ok(None)
            }
        }
    }

    #[track_caller]
    pub fn piece(&mut self) -> Option<Vec<u8>> {
        self.try_piece().unwrap()
    }

    /// The rest of the request's body.
    #[track_caller]
    pub fn body(&mut self) -> Vec<u8> {
        let mut body = Vec::new();
        while let Some(piece) = self.piece() {
            body.extend(piece);
        }
        body
    }

    /// The rest of the request's body, which is looked at and not kept: its length.
    #[track_caller]
    pub fn drain(&mut self, mut look: impl FnMut(&[u8])) -> u64 {
        let mut length = 0;
        loop {
            let wire = self.wire.as_mut().unwrap();
            match wire.piece(&mut self.left).unwrap() {
                Piece::Data(data) => {
                    look(&data);
                    length += data.len() as u64;
                }
                Piece::End(_) => return length,
            }
        }
    }

    /// Sends these bytes as they are.
    #[track_caller]
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_send(bytes).unwrap();
    }

    pub fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.wire().stream.write_all(bytes.as_ref())
    }

    /// Reads the request's body, answers with these bytes, and leaves the
    /// connection open for the next request. A client that has gone is no error.
    pub fn answer(mut self, raw: impl AsRef<[u8]>) {
        while let Ok(Some(_)) = self.try_piece() {}
        self.keep = self.left == Framing::Done && self.try_send(raw).is_ok();
    }

    /// An answer with its length.
    pub fn respond(self, status: u16, headers: &[(&str, &str)], body: &[u8]) {
        let mut raw = format!("HTTP/1.1 {status} Answer\r\n");
        for (name, value) in headers {
            raw += &format!("{name}: {value}\r\n");
        }
        raw += &format!("Content-Length: {}\r\n\r\n", body.len());
        let mut raw: Vec<u8> = raw.chars().map(|c| c as u8).collect();
        if self.method != "HEAD" {
            raw.extend_from_slice(body);
        }
        self.answer(raw);
    }

    pub fn ok(self) {
        self.respond(200, &[("Content-Type", "text/plain")], b"ok");
    }

    /// Begins an event stream in the chunked coding.
    #[track_caller]
    pub fn stream(&mut self) {
        self.send(
            "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n",
        );
    }

    /// Sends one chunk.
    #[track_caller]
    pub fn chunk(&mut self, data: impl AsRef<[u8]>) {
        self.send(chunked(data));
    }

    /// Ends the chunks; the connection can be used again.
    #[track_caller]
    pub fn end(mut self) {
        self.send("0\r\n\r\n");
        self.keep = true;
    }

    /// The same with trailers, each a line without its end.
    #[track_caller]
    pub fn end_with_trailers(mut self, trailers: &[&str]) {
        let lines: String = trailers.iter().map(|line| format!("{line}\r\n")).collect();
        self.send(format!("0\r\n{lines}\r\n"));
        self.keep = true;
    }

    /// Says that the answer sent by hand was whole.
    pub fn keep(mut self) {
        self.keep = true;
    }

    /// Closes the connection.
    pub fn close(self) {}

    /// Resets the connection.
    pub fn reset(mut self) {
        let wire = self.wire.take().unwrap();
        // The reset goes out with the last copy.
        lock(&self.shared.connections)[self.connection] = None;
        wire.reset();
    }

    /// Waits until the other side is gone: the instant, or none within the limit.
    pub fn wait_for_close(&mut self, limit: Duration) -> Option<Instant> {
        self.wire().wait_for_close(limit)
    }

    /// Answers nothing until the other side is gone.
    pub fn hang(mut self) {
        self.wait_for_close(PATIENCE);
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if let Some(wire) = self.wire.take() {
            if self.keep {
                let _ = self.back.send(wire);
            } else {
                let _ = wire.stream.shutdown(Shutdown::Both);
            }
        }
    }
}
