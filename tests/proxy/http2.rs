//! HTTP/2 without TLS, client and upstream, by hyper. Each runs on a thread of
//! its own and is used from the test's thread by calls that block.

use super::Target;
use crate::support::PATIENCE;
use bytes::Bytes;
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::client::conn::http2::SendRequest;
use hyper::http::{HeaderMap, Request, Response, request, response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::pin::Pin;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::{mpsc as channel, oneshot};

/// Names and values, as [`super::Head`] has them.
pub type Headers = Vec<(String, String)>;

fn listed(headers: &HeaderMap) -> Headers {
    let listed = headers.iter().map(|(name, value)| {
        let value = super::wire::latin1(value.as_bytes());
        (name.as_str().to_owned(), value)
    });
    listed.collect()
}

fn map_of(headers: &[(&str, &str)]) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        let bytes: Vec<u8> = value.chars().map(|c| c as u8).collect();
        let name = hyper::header::HeaderName::try_from(*name).unwrap();
        map.append(name, bytes.try_into().unwrap());
    }
    map
}

/// A runtime on a thread of its own, which drives what is started on it.
#[derive(Debug)]
struct Background {
    handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Background {
    fn start() -> Self {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_all().build().unwrap();
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            let _ = runtime.block_on(stopped);
        });
        Self {
            handle,
            stop: Some(stop),
            thread: Some(thread),
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A body that the other end of a channel feeds, or none at all.
#[derive(Debug)]
pub struct Piped(Option<channel::Receiver<io::Result<Frame<Bytes>>>>);

impl Body for Piped {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        match &mut self.0 {
            Some(receiver) => receiver.poll_recv(context),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_none()
    }
}

/// Feeds a body frame by frame. Dropped without its end, it ends the body.
#[derive(Debug)]
pub struct Feed {
    handle: Handle,
    sender: channel::Sender<io::Result<Frame<Bytes>>>,
}

impl Feed {
    fn new(handle: &Handle) -> (Self, Piped) {
        // One frame at a time: what is taken from here is on its way.
        let (sender, receiver) = channel::channel(1);
        let feed = Self {
            handle: handle.clone(),
            sender,
        };
        (feed, Piped(Some(receiver)))
    }

    /// Hands a frame over within the limit; false where nobody takes it.
    fn frame(&self, frame: io::Result<Frame<Bytes>>, limit: Duration) -> bool {
        let sent = async { tokio::time::timeout(limit, self.sender.send(frame)).await };
        matches!(self.handle.block_on(sent), Ok(Ok(())))
    }

    #[track_caller]
    pub fn data(&self, data: impl Into<Vec<u8>>) {
        assert!(self.try_data(data, PATIENCE), "nobody takes the data");
    }

    /// Whether it is taken within the limit.
    pub fn try_data(&self, data: impl Into<Vec<u8>>, limit: Duration) -> bool {
        self.frame(Ok(Frame::data(data.into().into())), limit)
    }

    pub fn end(self) {}

    #[track_caller]
    pub fn end_with_trailers(self, trailers: &[(&str, &str)]) {
        let frame = Ok(Frame::trailers(map_of(trailers)));
        assert!(self.frame(frame, PATIENCE), "nobody takes the trailers");
    }

    /// Resets the stream.
    pub fn reset(self) {
        self.frame(Err(io::Error::other("the test breaks it off")), PATIENCE);
    }

    /// Waits until nobody takes any more: the instant, or none within the limit.
    pub fn wait_for_close(&self, limit: Duration) -> Option<Instant> {
        let closed = async { tokio::time::timeout(limit, self.sender.closed()).await };
        self.handle.block_on(closed).ok().map(|()| Instant::now())
    }
}

/// What comes of a body, read piece by piece.
#[derive(Debug)]
struct Pieces {
    handle: Handle,
    body: Incoming,
    trailers: Headers,
}

impl Pieces {
    fn piece(&mut self) -> Result<Option<Vec<u8>>, String> {
        loop {
            let next = async { tokio::time::timeout(PATIENCE, self.body.frame()).await };
            let frame = self.handle.block_on(next).map_err(|_| "nothing came")?;
            let frame = match frame {
                None => return Ok(None),
                Some(frame) => frame.map_err(|error| format!("{error:?}"))?,
            };
            match frame.into_data() {
                // The end may come with a frame of its own that holds nothing.
                Ok(data) if data.is_empty() => {}
                Ok(data) => return Ok(Some(data.to_vec())),
                Err(frame) => {
                    let trailers = frame.into_trailers().unwrap_or_default();
                    self.trailers = listed(&trailers);
                }
            }
        }
    }
}

/// A client that speaks HTTP/2 from the first byte.
#[derive(Debug)]
pub struct Http2 {
    sender: SendRequest<Piped>,
    port: u16,
    background: Background,
}

/// A request under way. Dropped, it resets the stream.
#[derive(Debug)]
pub struct Pending {
    handle: Handle,
    answer: tokio::task::JoinHandle<hyper::Result<Response<Incoming>>>,
}

impl Pending {
    /// The answer's head, or how the stream ended without one.
    pub fn try_answer(mut self) -> Result<Http2Answer, String> {
        let answer = async { tokio::time::timeout(PATIENCE, &mut self.answer).await };
        let answer = self.handle.block_on(answer).map_err(|_| "no answer came")?;
        let answer = answer.map_err(|error| error.to_string())?;
        let (head, body) = answer.map_err(|error| format!("{error:?}"))?.into_parts();
        Ok(Http2Answer {
            headers: listed(&head.headers),
            head,
            pieces: Pieces {
                handle: self.handle.clone(),
                body,
                trailers: Vec::new(),
            },
        })
    }

    #[track_caller]
    pub fn answer(self) -> Http2Answer {
        self.try_answer().unwrap()
    }

    /// Whether there is an answer already.
    pub fn is_answered(&self) -> bool {
        self.answer.is_finished()
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.answer.abort();
    }
}

/// An answer whose body is read piece by piece. Dropped before its end, it
/// resets the stream.
#[derive(Debug)]
pub struct Http2Answer {
    pub head: response::Parts,
    pub headers: Headers,
    pieces: Pieces,
}

impl Http2Answer {
    pub fn status(&self) -> u16 {
        self.head.status.as_u16()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(own, _)| own == name);
        found.map(|(_, value)| value.as_str())
    }

    pub fn try_piece(&mut self) -> Result<Option<Vec<u8>>, String> {
        self.pieces.piece()
    }

    #[track_caller]
    pub fn piece(&mut self) -> Option<Vec<u8>> {
        self.try_piece().unwrap()
    }

    #[track_caller]
    pub fn body(&mut self) -> Vec<u8> {
        let mut body = Vec::new();
        while let Some(piece) = self.piece() {
            body.extend(piece);
        }
        body
    }

    /// What came after the body, once that has been read to its end.
    pub fn trailers(&self) -> &Headers {
        &self.pieces.trailers
    }
}

impl Http2 {
    #[track_caller]
    pub fn connect(port: u16) -> Self {
        let background = Background::start();
        let handle = background.handle.clone();
        let sender = handle.block_on(async move {
            let stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await;
            let stream = stream.unwrap();
            stream.set_nodelay(true).unwrap();
            let stream = TokioIo::new(stream);
            let mut builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
            builder.timer(TokioTimer::new());
            let (sender, connection) = builder.handshake(stream).await.unwrap();
            tokio::spawn(connection);
            sender
        });
        Self {
            sender,
            port,
            background,
        }
    }

    /// A request whose body the test feeds.
    #[track_caller]
    pub fn open(
        &mut self,
        method: &str,
        target: &str,
        key: &str,
        headers: &[(&str, &str)],
    ) -> (Feed, Pending) {
        let (feed, body) = Feed::new(&self.background.handle);
        (feed, self.begin(method, target, key, headers, body))
    }

    fn begin(
        &self,
        method: &str,
        target: &str,
        key: &str,
        headers: &[(&str, &str)],
        body: Piped,
    ) -> Pending {
        let handle = &self.background.handle;
        let mut request = Request::new(body);
        *request.method_mut() = method.parse().unwrap();
        let url = format!("http://127.0.0.1:{}{target}", self.port);
        *request.uri_mut() = url.parse().unwrap();
        *request.headers_mut() = map_of(headers);
        if !key.is_empty() {
            let value = format!("Bearer {key}").try_into().unwrap();
            request.headers_mut().insert("authorization", value);
        }
        let mut sender = self.sender.clone();
        let answer = handle.spawn(async move {
            sender.ready().await?;
            sender.send_request(request).await
        });
        let handle = handle.clone();
        Pending { handle, answer }
    }

    /// A request with a whole body, and its answer.
    #[track_caller]
    pub fn ask(
        &mut self,
        method: &str,
        target: &str,
        key: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Http2Answer {
        if body.is_empty() {
            return self
                .begin(method, target, key, headers, Piped(None))
                .answer();
        }
        let (feed, pending) = self.open(method, target, key, headers);
        // An answer may come before all of it was taken.
        feed.try_data(body, PATIENCE);
        feed.end();
        pending.answer()
    }

    #[track_caller]
    pub fn get(&mut self, target: &str, key: &str) -> Http2Answer {
        self.ask("GET", target, key, &[], b"")
    }
}

type Handler = dyn Fn(Http2Exchange) + Send + Sync;

/// An upstream that speaks HTTP/2 alone, on a free port.
#[derive(Debug)]
pub struct Http2Upstream {
    pub port: u16,
    exchanges: Option<Mutex<Receiver<Http2Exchange>>>,
    connections: Arc<Mutex<usize>>,
    // The last to go: exchanges that are left use it.
    background: Background,
}

impl Target for Http2Upstream {
    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn arguments(&self) -> Vec<String> {
        vec!["--upstream-protocol".to_owned(), "http2".to_owned()]
    }
}

impl Http2Upstream {
    /// Answers each request with the handler, on a thread for each.
    pub fn start(handler: impl Fn(Http2Exchange) + Send + Sync + 'static) -> Self {
        let background = Background::start();
        let handler: Arc<Handler> = Arc::new(handler);
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let port = listener.local_addr().unwrap().port();
        let handle = background.handle.clone();
        let connections = Arc::new(Mutex::new(0));
        let counter = Arc::clone(&connections);
        background.handle.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            while let Ok((stream, _)) = listener.accept().await {
                *counter.lock().unwrap() += 1;
                let _ = stream.set_nodelay(true);
                let (handle, handler) = (handle.clone(), Arc::clone(&handler));
                let service = hyper::service::service_fn(move |request| {
                    let (exchange, answer) = Http2Exchange::new(&handle, request);
                    let handler = Arc::clone(&handler);
                    std::thread::spawn(move || handler(exchange));
                    // Where the exchange is dropped unanswered, so is the stream.
                    async { answer.await.map_err(io::Error::other) }
                });
                let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                builder.timer(TokioTimer::new());
                tokio::spawn(builder.serve_connection(TokioIo::new(stream), service));
            }
        });
        Self {
            port,
            exchanges: None,
            connections,
            background,
        }
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

    /// Answers 200 and `ok`.
    pub fn ok() -> Self {
        Self::start(|exchange| exchange.respond(200, &[], b"ok"))
    }

    /// The next request, to be answered by the test.
    #[track_caller]
    pub fn next(&self) -> Http2Exchange {
        self.next_within(PATIENCE).expect("no request came")
    }

    pub fn next_within(&self, limit: Duration) -> Option<Http2Exchange> {
        let exchanges = self.exchanges.as_ref();
        let exchanges = exchanges.expect("this upstream answers by itself");
        exchanges.lock().unwrap().recv_timeout(limit).ok()
    }

    /// How many connections there were so far.
    pub fn connections(&self) -> usize {
        *self.connections.lock().unwrap()
    }
}

/// A request that waits for its answer. Dropped unanswered, it resets the stream.
#[derive(Debug)]
pub struct Http2Exchange {
    pub head: request::Parts,
    pub method: String,
    /// Path and query.
    pub target: String,
    pub headers: Headers,
    pieces: Pieces,
    respond: Option<oneshot::Sender<Response<Piped>>>,
    feed: Option<Feed>,
}

impl Http2Exchange {
    fn new(
        handle: &Handle,
        request: Request<Incoming>,
    ) -> (Self, oneshot::Receiver<Response<Piped>>) {
        let (head, body) = request.into_parts();
        let (respond, answer) = oneshot::channel();
        let exchange = Self {
            method: head.method.to_string(),
            target: head
                .uri
                .path_and_query()
                .map_or_else(String::new, ToString::to_string),
            headers: listed(&head.headers),
            head,
            pieces: Pieces {
                handle: handle.clone(),
                body,
                trailers: Vec::new(),
            },
            respond: Some(respond),
            feed: None,
        };
        (exchange, answer)
    }

    /// Every value of that header.
    pub fn values(&self, name: &str) -> Vec<&str> {
        let named = self.headers.iter().filter(|(own, _)| own == name);
        named.map(|(_, value)| value.as_str()).collect()
    }

    pub fn try_piece(&mut self) -> Result<Option<Vec<u8>>, String> {
        self.pieces.piece()
    }

    /// The next piece of the request's body, none at its end.
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

    /// What came after the body, once that has been read to its end.
    pub fn trailers(&self) -> &Headers {
        &self.pieces.trailers
    }

    /// Sends the head; the body follows by [`Self::feed`].
    pub fn begin(&mut self, status: u16, headers: &[(&str, &str)]) {
        let (feed, body) = Feed::new(&self.pieces.handle);
        self.answer_with(status, headers, body);
        self.feed = Some(feed);
    }

    fn answer_with(&mut self, status: u16, headers: &[(&str, &str)], body: Piped) {
        let mut answer = Response::new(body);
        *answer.status_mut() = status.try_into().unwrap();
        *answer.headers_mut() = map_of(headers);
        let respond = self.respond.take().expect("one answer a request");
        // A client that has gone is no error.
        let _ = respond.send(answer);
    }

    /// What feeds the answer's body.
    pub fn feed(&mut self) -> &Feed {
        self.feed.as_ref().expect("the answer has not begun")
    }

    /// The same, to end the body with.
    pub fn take_feed(&mut self) -> Feed {
        self.feed.take().expect("the answer has not begun")
    }

    pub fn respond(mut self, status: u16, headers: &[(&str, &str)], body: &[u8]) {
        if body.is_empty() {
            return self.answer_with(status, headers, Piped(None));
        }
        self.begin(status, headers);
        self.feed().try_data(body, PATIENCE);
    }

    /// Waits until the other side has reset the stream or gone: the instant, or
    /// none within the limit.
    pub fn wait_for_close(&mut self, limit: Duration) -> Option<Instant> {
        if let Some(feed) = &self.feed {
            return feed.wait_for_close(limit);
        }
        let respond = self.respond.as_mut()?;
        let closed = async { tokio::time::timeout(limit, respond.closed()).await };
        let closed = self.pieces.handle.block_on(closed);
        closed.ok().map(|()| Instant::now())
    }
}

/// A frame of HTTP/2: type, flags, stream, payload.
pub fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = vec![
        length[1], length[2], length[3], kind, flags, 0, 0, 0, stream,
    ];
    frame.extend_from_slice(payload);
    frame
}

/// An upstream that speaks HTTP/2 frame by frame, for ways of answering that a
/// library does not have. To each request, given its stream and body, it sends
/// the frames that it is told to. It answers its URL.
pub fn upstream_of_frames(
    answer: impl Fn(u8, Vec<u8>) -> Vec<u8> + Send + Sync + 'static,
) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let answer = Arc::new(answer);
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let answer = Arc::clone(&answer);
            std::thread::spawn(move || speak(stream, &*answer));
        }
    });
    url
}

/// Until the other side ends the connection.
fn speak(mut stream: TcpStream, answer: &impl Fn(u8, Vec<u8>) -> Vec<u8>) -> io::Result<()> {
    const PREFACE: usize = 24;
    stream.read_exact(&mut [0; PREFACE])?;
    stream.write_all(&frame(4, 0, 0, b""))?;
    let mut body = Vec::new();
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head)?;
        let [high, middle, low, kind, flags, .., number] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, high, middle, low]) as usize];
        stream.read_exact(&mut payload)?;
        match kind {
            0 => body.extend(payload),
            // SETTINGS and PING are to be acknowledged.
            4 | 6 if flags == 0 => {
                let echo = if kind == 6 { &payload[..] } else { b"" };
                stream.write_all(&frame(kind, 1, 0, echo))?;
            }
            _ => {}
        }
        if kind <= 1 && flags & 1 == 1 {
            stream.write_all(&answer(number, std::mem::take(&mut body)))?;
        }
    }
}
