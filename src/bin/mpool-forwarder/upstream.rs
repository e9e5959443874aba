//! The way to the upstream: connections kept open, timeouts, and what can go
//! wrong. Each thread has its own.
//!
//! The connections are hyper's. They are handed out here and not by
//! hyper-util's client, because that is a third of a request's cost, and because
//! a request's form depends on the protocol of the connection that it gets.
//!
//! Over HTTP/1 whoever has a connection for its request also makes it go on: no
//! task has to be woken for what another one waits for, and what has come at once
//! is passed on at once.

use crate::base::Base;
use crate::config::{Limits, Timeouts};
use crate::patience::Patience;
use crate::upload::{Fault, Upload, UploadBody};
use bytes::Bytes;
use clap::ValueEnum;
use futures_util::future::{BoxFuture, Either, FutureExt};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http1, http2};
use hyper::{Request, Response, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder, MaybeHttpsStream};
use hyper_util::client::legacy::connect::{Connection, HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use std::error::Error;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::Instant;
use tower_service::Service;

/// How long an unused connection is kept, shorter than servers usually do:
/// a request on one that the server is just closing would be lost.
const IDLE: Duration = Duration::from_secs(30);
/// How often unused connections are looked at: the upstream may have closed them.
const LOOK: Duration = Duration::from_secs(1);
/// One that has been unused for no longer is not looked at before its use.
const MOMENT: Duration = Duration::from_millis(1);
/// How much of an answer is passed on before the thread's other connections get
/// their turn, in bytes.
const TURN: usize = 64 << 10;
/// Unused connections kept by each thread.
const MAX_IDLE: usize = 1024;
/// Streams on one HTTP/2 connection, unless the server allows fewer; then
/// another connection is made.
const MAX_STREAMS: usize = 100;

/// The HTTP version spoken to the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Protocol {
    /// What TLS negotiates; HTTP/1.1 without TLS.
    Auto,
    Http1,
    /// Without TLS and without asking first.
    Http2,
}

/// Why there is no answer of the upstream's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendError {
    /// No connection; nothing was sent.
    Connect,
    /// No connection in time; nothing was sent.
    ConnectTimeout,
    /// The connection broke before the answer began.
    Broke,
    /// The answer did not begin in time.
    Timeout,
    /// What came is no HTTP.
    Garbage,
    /// The connection had been closed before anything was sent.
    Unsent,
    /// Sent over HTTP/2, but the upstream says that it has done nothing with it.
    Unprocessed,
    /// The request's target can't be asked for there.
    Target,
    /// The client's body could not be passed on.
    Upload(Fault),
}

impl SendError {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::ConnectTimeout => "connect-timeout",
            Self::Broke => "broke-off",
            Self::Timeout => "timeout",
            Self::Garbage => "not-http",
            Self::Unsent => "unsent",
            Self::Unprocessed => "unprocessed",
            Self::Target => "target",
            Self::Upload(_) => "upload",
        }
    }
}

/// One thread's connections to the upstream.
#[derive(Clone)]
pub struct Upstream(Arc<Shared>);

struct Shared {
    origin: Uri,
    connector: HttpsConnector<HttpConnector>,
    protocol: Protocol,
    connect_timeout: Duration,
    response_timeout: Duration,
    http1: http1::Builder,
    http2: http2::Builder<TokioExecutor>,
    /// HTTP/1 connections that nobody uses, the last used one last.
    idle: Mutex<Vec<Idle>>,
    multiplexed: Mutex<Vec<Multiplexed>>,
    /// Whether HTTP/2 is spoken, as far as is known: then one connects at a time.
    over_http2: AtomicBool,
    connecting: tokio::sync::Mutex<()>,
}

struct Idle {
    http1: Http1,
    since: Instant,
}

/// A connection over HTTP/1.
pub struct Http1 {
    sender: http1::SendRequest<UploadBody>,
    /// What goes on when it is polled; nothing once it has ended, or where a task
    /// of its own polls it.
    connection: Option<BoxFuture<'static, ()>>,
}

impl Http1 {
    /// Whether it can take a request, as far as has come to be known.
    fn is_free(&mut self) -> bool {
        self.drive(&mut Context::from_waker(Waker::noop()));
        self.sender.is_ready()
    }

    fn drive(&mut self, cx: &mut Context<'_>) {
        if let Some(going) = &mut self.connection
            && going.as_mut().poll(cx).is_ready()
        {
            self.connection = None;
        }
    }

    /// It is to go on by itself.
    fn detach(&mut self) {
        if let Some(connection) = self.connection.take() {
            tokio::spawn(connection);
        }
    }
}

type Answer = Result<Response<Incoming>, TrySendError<Request<UploadBody>>>;

struct Multiplexed {
    sender: http2::SendRequest<UploadBody>,
    /// Each stream holds one.
    streams: Arc<()>,
    /// How many the server allows.
    most: Arc<AtomicUsize>,
}

/// A connection for one request.
pub enum Channel {
    Http1(Http1),
    Http2(
        http2::SendRequest<UploadBody>,
        #[expect(dead_code, reason = "it is there to be counted")] Arc<()>,
    ),
}

impl Channel {
    const fn is_http2(&self) -> bool {
        matches!(self, Self::Http2(..))
    }

    fn begin(
        &mut self,
        request: Request<UploadBody>,
    ) -> impl Future<Output = Answer> + Send + use<> {
        match self {
            Self::Http1(http1) => Either::Left(http1.sender.try_send_request(request)),
            Self::Http2(sender, _) => Either::Right(sender.try_send_request(request)),
        }
    }

    /// Makes it go on, where no task of its own does.
    fn drive(&mut self, cx: &mut Context<'_>) {
        if let Self::Http1(http1) = self {
            http1.drive(cx);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Upstream {
    /// Called on the runtime of the thread that uses it.
    pub fn new(
        base: &Base,
        tls: Option<rustls::ClientConfig>,
        protocol: Protocol,
        timeouts: &Timeouts,
        limits: &Limits,
    ) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.set_nodelay(true);
        tcp.enforce_http(false);
        tcp.set_keepalive(Some(Duration::from_secs(60)));
        let may_negotiate = tls.is_some() && protocol == Protocol::Auto;
        let tls = tls.unwrap_or_else(|| {
            // Never used: the base URL is http.
            rustls::ClientConfig::builder()
                .with_root_certificates(rustls::RootCertStore::empty())
                .with_no_client_auth()
        });
        let https = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http();
        let connector = match protocol {
            Protocol::Http1 => https.enable_http1().wrap_connector(tcp),
            Protocol::Auto | Protocol::Http2 => https.enable_all_versions().wrap_connector(tcp),
        };
        let mut http1 = http1::Builder::new();
        http1
            .preserve_header_case(true)
            // Copying a small piece costs less than a call with two of them.
            .writev(false)
            .max_buf_size(limits.header.max(256 << 10));
        let mut http2 = http2::Builder::new(TokioExecutor::new());
        http2
            .timer(TokioTimer::new())
            // One client that reads slowly is not to hold up those that share the connection.
            .initial_stream_window_size(256 << 10)
            .initial_connection_window_size(64 << 20)
            .keep_alive_interval(Duration::from_secs(20))
            .keep_alive_while_idle(false);
        let shared = Arc::new(Shared {
            origin: base.origin(),
            connector,
            protocol,
            connect_timeout: timeouts.connect,
            response_timeout: timeouts.response,
            http1,
            http2,
            idle: Mutex::default(),
            multiplexed: Mutex::default(),
            over_http2: AtomicBool::new(may_negotiate || protocol == Protocol::Http2),
            connecting: tokio::sync::Mutex::new(()),
        });
        tokio::spawn(close_idle(Arc::downgrade(&shared)));
        Self(shared)
    }

    /// A connection for a request, `now`: one that is open and free, or a new one;
    /// and when it was there. With `look`, also one that was used this moment is
    /// looked at first.
    ///
    /// # Errors
    /// [`SendError::Connect`] and [`SendError::ConnectTimeout`].
    pub async fn channel(
        &self,
        look: bool,
        now: std::time::Instant,
    ) -> Result<(Channel, Instant), SendError> {
        let now = Instant::from_std(now);
        match self.0.free(look, now) {
            Some(channel) => Ok((channel, now)),
            None => {
                let channel = Box::pin(self.0.connect_in_turn(look)).await?;
                Ok((channel, Instant::now()))
            }
        }
    }

    /// Sends a request, `now`, in the form that the connection's protocol asks for
    /// (whether it is HTTP/2), and waits for the answer's head, but not for ever.
    ///
    /// No async fn: it would keep room for its arguments beside what becomes of them.
    ///
    /// # Errors
    /// [`SendError`]. Dropping the future drops the request.
    pub fn send(
        &self,
        (mut channel, now): (Channel, Instant),
        request: impl FnOnce(bool) -> Result<Request<UploadBody>, SendError>,
        upload: &Upload,
    ) -> impl Future<Output = Result<Response<Download>, SendError>> + Send {
        let sending = request(channel.is_http2()).map(|request| channel.begin(request));
        async move {
            let mut sending = pin!(sending?);
            let shared = &self.0;
            let mut deadline = now + shared.response_timeout;
            let mut patience = Patience::shared();
            let outcome = poll_fn(|cx| {
                channel.drive(cx);
                if let Poll::Ready(outcome) = sending.as_mut().poll(cx) {
                    return Poll::Ready(Ok(outcome));
                }
                loop {
                    ready!(patience.poll(deadline, cx));
                    // The upstream's time begins when it has the whole request, as
                    // long as it takes it.
                    let now = Instant::now();
                    let moved = upload
                        .last_heard()
                        .map(|last| last + shared.response_timeout);
                    match moved.filter(|later| *later > now) {
                        Some(later) => deadline = later,
                        None => return Poll::Ready(Err(SendError::Timeout)),
                    }
                }
            })
            .await?;
            let response = outcome.map_err(|mut error| match error.take_message() {
                Some(_) => SendError::Unsent,
                None => classify(error.error(), upload),
            })?;
            if let Channel::Http1(http1) = &mut channel
                && !upload.is_sent()
            {
                // The client may read nothing of the answer before all of its body is taken.
                http1.detach();
            }
            Ok(response.map(|body| Download::new(body, channel, shared)))
        }
    }
}

type Stream = MaybeHttpsStream<TokioIo<TcpStream>>;

/// What HTTP/1 runs on.
trait Transport: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static {}

impl<T: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static> Transport for T {}

impl Shared {
    fn free(&self, look: bool, now: Instant) -> Option<Channel> {
        let mut idle = lock(&self.idle);
        while let Some(Idle { mut http1, since }) = idle.pop() {
            let unused = now.saturating_duration_since(since);
            if !look && unused < MOMENT || unused < IDLE && http1.is_free() {
                return Some(Channel::Http1(http1));
            }
        }
        drop(idle);
        let mut multiplexed = lock(&self.multiplexed);
        multiplexed.retain(|one| !one.sender.is_closed());
        let one = multiplexed.iter().find(|one| {
            let most = one.most.load(Ordering::Relaxed).clamp(1, MAX_STREAMS);
            Arc::strong_count(&one.streams) <= most
        })?;
        Some(Channel::Http2(one.sender.clone(), Arc::clone(&one.streams)))
    }

    async fn connect_in_turn(&self, look: bool) -> Result<Channel, SendError> {
        if !self.over_http2.load(Ordering::Relaxed) {
            return self.connect().await;
        }
        // The others can use what the first of them makes.
        let _turn = self.connecting.lock().await;
        match self.free(look, Instant::now()) {
            Some(channel) => Ok(channel),
            None => self.connect().await,
        }
    }

    async fn connect(&self) -> Result<Channel, SendError> {
        let connecting = self.connector.clone().call(self.origin.clone());
        let stream = match tokio::time::timeout(self.connect_timeout, connecting).await {
            Err(_) => return Err(SendError::ConnectTimeout),
            Ok(Err(_)) => return Err(SendError::Connect),
            Ok(Ok(stream)) => stream,
        };
        self.begin(stream).await
    }

    /// Begins to speak HTTP. No async fn: that would keep room for a stream of
    /// either kind.
    fn begin(&self, stream: Stream) -> BoxFuture<'_, Result<Channel, SendError>> {
        let http2 = self.protocol == Protocol::Http2 || stream.connected().is_negotiated_h2();
        self.over_http2.store(http2, Ordering::Relaxed);
        match stream {
            stream if http2 => self.begin_http2(stream).boxed(),
            MaybeHttpsStream::Http(stream) => self.begin_http1(stream).boxed(),
            MaybeHttpsStream::Https(stream) => self.begin_http1(stream).boxed(),
        }
    }

    async fn begin_http1<S: Transport>(&self, stream: S) -> Result<Channel, SendError> {
        let made = self.http1.handshake(stream).await;
        let (sender, connection) = made.map_err(|_| SendError::Connect)?;
        Ok(Channel::Http1(Http1 {
            sender,
            connection: Some(connection.map(drop).boxed()),
        }))
    }

    async fn begin_http2(&self, stream: Stream) -> Result<Channel, SendError> {
        let made = self.http2.handshake(stream).await;
        let (sender, mut connection) = made.map_err(|_| SendError::Connect)?;
        let most = Arc::new(AtomicUsize::new(MAX_STREAMS));
        let streams = Arc::new(());
        lock(&self.multiplexed).push(Multiplexed {
            sender: sender.clone(),
            streams: Arc::clone(&streams),
            most: Arc::clone(&most),
        });
        tokio::spawn(poll_fn(move |cx| {
            let polled = Pin::new(&mut connection).poll(cx);
            most.store(connection.current_max_send_streams(), Ordering::Relaxed);
            polled
        }));
        Ok(Channel::Http2(sender, streams))
    }

    /// Keeps a connection that was looked at `since` for the next request.
    fn keep(&self, http1: Http1, since: Instant) {
        let mut idle = lock(&self.idle);
        if idle.len() < MAX_IDLE {
            idle.push(Idle { http1, since });
        }
    }
}

/// Closes connections that have not been used for long, or that the upstream has closed.
async fn close_idle(shared: Weak<Shared>) {
    loop {
        tokio::time::sleep(LOOK).await;
        let Some(shared) = shared.upgrade() else {
            return;
        };
        lock(&shared.idle).retain_mut(|idle| idle.since.elapsed() < IDLE && idle.http1.is_free());
    }
}

fn classify(error: &hyper::Error, upload: &Upload) -> SendError {
    if let Some(fault) = upload.fault() {
        return SendError::Upload(fault);
    }
    if error.is_parse() {
        SendError::Garbage
    } else if is_unprocessed(error) {
        SendError::Unprocessed
    } else {
        SendError::Broke
    }
}

/// Whether the stream was refused, or came after the last one that a server takes
/// which closes its connection (RFC 9113 section 8.7): servers do that to every
/// connection in time.
fn is_unprocessed(error: &hyper::Error) -> bool {
    let error = error.source().and_then(|source| source.downcast_ref());
    error.is_some_and(|error: &h2::Error| {
        let refused = error.reason() == Some(h2::Reason::REFUSED_STREAM);
        error.is_remote() && (error.is_go_away() || refused)
    })
}

/// The answer's body. Its connection is free for the next request at its end.
pub struct Download {
    body: Incoming,
    /// What it came by, and where that goes then.
    channel: Option<(Channel, Weak<Shared>)>,
    /// Why it has broken off, to be told the next time.
    broken: Option<hyper::Error>,
    /// When its head came: the connection went on then.
    headed: Instant,
    /// Whether it has been waited for since.
    awaited: bool,
    /// Bytes handed over in this turn of the task.
    turn: usize,
}

impl Download {
    fn new(body: Incoming, channel: Channel, shared: &Arc<Shared>) -> Self {
        let mut download = Self {
            body,
            channel: Some((channel, Arc::downgrade(shared))),
            broken: None,
            headed: Instant::now(),
            awaited: false,
            turn: 0,
        };
        if download.body.is_end_stream() {
            download.release();
        }
        download
    }

    /// When its head came.
    pub fn headed(&self) -> std::time::Instant {
        self.headed.into_std()
    }

    /// Gives the connection back. It need not go on for that where it is known to be
    /// free since the head came, as all of a short answer comes then.
    fn release(&mut self) {
        let Some((Channel::Http1(mut http1), shared)) = self.channel.take() else {
            return;
        };
        let since = if !self.awaited && http1.sender.is_ready() {
            Some(self.headed)
        } else {
            http1.is_free().then(Instant::now)
        };
        if let Some(since) = since {
            if let Some(shared) = shared.upgrade() {
                shared.keep(http1, since);
            }
        } else if !http1.sender.is_closed() {
            // The request is still on its way.
            http1.detach();
            tokio::spawn(async move {
                let ready = tokio::time::timeout(IDLE, http1.sender.ready()).await;
                if let (Ok(Ok(())), Some(shared)) = (ready, shared.upgrade()) {
                    shared.keep(http1, Instant::now());
                }
            });
        }
    }
}

impl Body for Download {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = self.get_mut();
        if let Some(error) = this.broken.take() {
            return Poll::Ready(Some(Err(error)));
        }
        if this.turn >= TURN {
            // An upstream that always has more would hold up the thread's other connections.
            this.turn = 0;
            this.awaited = true;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let mut polled = Pin::new(&mut this.body).poll_frame(cx);
        if polled.is_pending() {
            this.awaited = true;
            if let Some((Channel::Http1(http1), _)) = &mut this.channel {
                http1.drive(cx);
                polled = Pin::new(&mut this.body).poll_frame(cx);
            }
        }
        if let Poll::Ready(Some(Err(error))) = polled {
            // What came before it, perhaps in the same moment, is to be on its way first.
            this.broken = Some(error);
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let over = match &polled {
            Poll::Ready(None) => true,
            Poll::Ready(Some(Ok(frame))) => {
                this.turn += frame.data_ref().map_or(0, Bytes::len);
                frame.is_trailers() || this.body.is_end_stream()
            }
            _ => {
                this.turn = 0;
                false
            }
        };
        if over {
            this.release();
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
