//! Takes clients' connections and spreads them over threads. Each thread has a
//! runtime, connections to the upstream and a connection to Redis of its own, so
//! a request never changes threads.

use crate::answers::Code;
use crate::client_io::{Bounds, ClientIo, Exchange, Transport};
use crate::config::Config;
use crate::known::Known;
use crate::lender::{Lender, Seen};
use crate::link::{Event, Link};
use crate::metrics::{Metrics, Tally};
use crate::proxy::Proxy;
use crate::relay::Reply;
use crate::rooms::in_rooms;
use crate::upload::{Budget, Rules};
use crate::upstream::Upstream;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, FusedFuture};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::thread;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_rustls::TlsAcceptor;

/// How many tasks have their turn before sockets are looked at again. One turn
/// may pass much on, and what others wait for meanwhile waits as well.
const EVENT_INTERVAL: u32 = 13;
/// Streams of one HTTP/2 connection at once.
const MAX_STREAMS: u32 = 256;
/// Connections beyond the limit that are told so at once; others are just closed.
const MAX_TOLD: usize = 64;

/// What all threads share.
pub struct Shared {
    pub config: Config,
    pub metrics: Arc<Metrics>,
    pub seen: Arc<Seen>,
    pub accounts: Arc<crate::accounts::Accounts>,
    pub began: Instant,
    pub told: Arc<Mutex<Told>>,
}

/// What the log says of Redis already.
#[derive(Debug, Default)]
pub struct Told {
    /// Why it can't be asked, since it last could.
    down: Vec<&'static str>,
    /// Why leases are not remembered, and when that was said last.
    forgetful: BTreeMap<&'static str, Instant>,
}

/// How long the same reason why leases are not remembered is not said again: each thread
/// finds it out for itself.
const SAID: Duration = Duration::from_secs(10);

impl Told {
    fn of(told: &Mutex<Self>) -> MutexGuard<'_, Self> {
        told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_down_anew(&mut self, why: &'static str) -> bool {
        let is_new = !self.down.contains(&why);
        if is_new {
            self.down.push(why);
        }
        is_new
    }

    fn is_forgetful_anew(&mut self, why: &'static str) -> bool {
        let now = Instant::now();
        let last = self.forgetful.get(why);
        let is_new = last.is_none_or(|last| now.duration_since(*last) >= SAID);
        if is_new {
            self.forgetful.insert(why, now);
        }
        is_new
    }
}

impl Shared {
    /// Asks Redis from the runtime that this is called on. Leases that have not
    /// changed are used again for that span.
    pub fn lender(&self, span: Duration) -> Result<Lender, String> {
        let metrics = Arc::clone(&self.metrics);
        let told = Arc::clone(&self.told);
        let shown = self.config.redis.shown();
        let link = Link::start(
            self.config.redis.target()?,
            self.config.timeouts.redis,
            Known::new(span),
            move |event| match event {
                // Every thread has a connection; the first one speaks for all.
                Event::Up => {
                    Told::of(&told).down.clear();
                    if metrics.redis_up.inc() == 0 {
                        tracing::info!(event = "redis", "connected to Redis at {shown}");
                    }
                }
                Event::Forgetful(why) => {
                    if Told::of(&told).is_forgetful_anew(why) {
                        tracing::warn!(
                            event = "redis",
                            "leases from Redis at {shown} are asked for at each request, not remembered: {why}"
                        );
                    }
                }
                Event::Lost => {
                    if metrics.redis_up.dec() == 1 {
                        tracing::error!(
                            event = "redis",
                            "the connection to Redis at {shown} is lost"
                        );
                    }
                }
                Event::Down(why) => {
                    if Told::of(&told).is_down_anew(why) {
                        tracing::error!(event = "redis", "Redis at {shown} can't be asked: {why}");
                    }
                }
            },
        );
        Ok(Lender {
            link,
            seen: Arc::clone(&self.seen),
            accounts: Arc::clone(&self.accounts),
        })
    }
}

/// A connection's place among those allowed; it is given back when dropped.
pub struct Place {
    open: Arc<AtomicUsize>,
    metrics: Arc<Metrics>,
}

impl Place {
    pub fn take(open: &Arc<AtomicUsize>, metrics: &Arc<Metrics>) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        metrics.connections.inc();
        Self {
            open: Arc::clone(open),
            metrics: Arc::clone(metrics),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.open.fetch_sub(1, Ordering::Relaxed);
        self.metrics.connections.dec();
    }
}

struct Worker {
    connections: mpsc::UnboundedSender<(std::net::TcpStream, Place)>,
    /// Connections that it has.
    open: Arc<AtomicUsize>,
    finished: oneshot::Receiver<()>,
}

/// The threads that serve.
pub struct Workers {
    shared: Arc<Shared>,
    workers: Vec<Worker>,
}

impl Workers {
    /// # Errors
    /// When a thread or its runtime can't be had.
    pub fn start(shared: &Arc<Shared>) -> io::Result<Self> {
        let tls = shared
            .config
            .tls
            .clone()
            .map(|config| TlsAcceptor::from(Arc::new(config)));
        let (threads, limits) = (shared.config.threads, &shared.config.limits);
        let budgets = Budget::shared(limits.replay_memory, threads);
        let each = shared.metrics.tallies().zip(budgets).enumerate();
        let workers = each.map(|(number, (tally, budget))| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .event_interval(EVENT_INTERVAL)
                .build()?;
            let (connections, waiting) = mpsc::unbounded_channel();
            let (done, finished) = oneshot::channel();
            let (shared, tls) = (Arc::clone(shared), tls.clone());
            thread::Builder::new()
                .name(format!("worker-{number}"))
                .spawn(move || {
                    runtime.block_on(work(&shared, tls, tally, budget, waiting));
                    let _ = done.send(());
                })?;
            Ok(Worker {
                connections,
                open: Arc::default(),
                finished,
            })
        });
        Ok(Self {
            shared: Arc::clone(shared),
            workers: workers.collect::<io::Result<_>>()?,
        })
    }

    /// Takes connections, for ever.
    pub async fn accept(&self, listener: TcpListener) {
        let limit = self.shared.config.limits.connections;
        let told = Arc::new(AtomicUsize::new(0));
        let mut complained = None;
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of file descriptors, most likely: it passes when clients go.
                    if complained.is_none_or(|at: Instant| at.elapsed() > Duration::from_secs(10)) {
                        complained = Some(Instant::now());
                        tracing::error!(event = "accept", "Connections can't be taken: {error}");
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    continue;
                }
            };
            let Some(worker) = self
                .workers
                .iter()
                .min_by_key(|worker| worker.open.load(Ordering::Relaxed))
            else {
                return;
            };
            let open: usize = self
                .workers
                .iter()
                .map(|worker| worker.open.load(Ordering::Relaxed))
                .sum();
            if open >= limit {
                self.shared.metrics.turned_away(Code::Connections);
                if self.shared.config.tls.is_none() && told.load(Ordering::Relaxed) < MAX_TOLD {
                    tokio::spawn(turn_away(stream, Place::take(&told, &self.shared.metrics)));
                }
                continue;
            }
            let _ = stream.set_nodelay(true);
            let place = Place::take(&worker.open, &self.shared.metrics);
            if let Ok(stream) = stream.into_std() {
                let _ = worker.connections.send((stream, place));
            }
        }
    }

    /// No connection comes any more: waits until the requests under way are done.
    pub async fn drain(self) {
        let ends: Vec<_> = self
            .workers
            .into_iter()
            .map(|worker| worker.finished)
            .collect();
        for finished in ends {
            let _ = finished.await;
        }
    }
}

async fn turn_away(mut stream: TcpStream, _place: Place) {
    let talk = async {
        stream.write_all(&Code::Connections.bytes()).await?;
        stream.shutdown().await?;
        let mut scrap = [0; 1024];
        while stream.read(&mut scrap).await? > 0 {}
        io::Result::Ok(())
    };
    let _ = tokio::time::timeout(Duration::from_secs(1), talk).await;
}

/// One thread's life: serves what comes until nobody can send more.
pub async fn work(
    shared: &Arc<Shared>,
    tls: Option<TlsAcceptor>,
    tally: Tally,
    budget: Budget,
    mut waiting: mpsc::UnboundedReceiver<(std::net::TcpStream, Place)>,
) {
    let config = &shared.config;
    let lender = match shared.lender(config.lease_cache) {
        Ok(lender) => lender,
        Err(why) => return tracing::error!("{why}"),
    };
    let proxy = Arc::new(Proxy {
        base: config.upstream.apart(),
        upstream: Upstream::new(
            &config.upstream,
            config.upstream_tls.clone(),
            config.upstream_protocol,
            &config.timeouts,
            &config.limits,
        ),
        lender,
        tally: Arc::new(tally),
        limits: config.limits,
        uploads: Rules {
            most: config.limits.body,
            keep: config.limits.replay_body,
            silence: config.timeouts.body,
            budget: Arc::new(budget),
        },
        stream_timeout: config.timeouts.stream,
        send_timeout: config.timeouts.send,
        cooldown: config.cooldown,
        began: shared.began,
        complained_at: AtomicU64::new(0),
    });
    let serve = in_rooms(move |(request, exchange)| Arc::clone(&proxy).serve(request, exchange));
    let bounds = Bounds::new(&config.timeouts, &shared.metrics);
    let http = Arc::new(Http::new(config.limits.header, bounds));
    let (stop, stopping) = watch::channel(());
    while let Some((stream, place)) = waiting.recv().await {
        let Ok(stream) = TcpStream::from_std(stream) else {
            continue;
        };
        let serving = Serving {
            serve: serve.clone(),
            http: Arc::clone(&http),
            shared: Arc::clone(shared),
            stopping: stopping.clone(),
            place,
        };
        // Boxed, as the room that a beginning takes is not to stay for the
        // connection's whole life.
        let beginning = match &tls {
            None => serving.plain(stream).boxed(),
            Some(tls) => serving.secured(tls.clone(), stream).boxed(),
        };
        tokio::spawn(async move {
            if let Some(connection) = beginning.await {
                connection.await;
            }
        });
    }
    // What has come by now is known to have come once the sockets have been looked at.
    tokio::task::yield_now().await;
    http.bounds.open();
    let _ = stop.send(());
    drop(stopping);
    // Each connection keeps a receiver for as long as it lasts.
    stop.closed().await;
}

/// How HTTP is spoken with clients.
struct Http {
    bounds: Arc<Bounds>,
    one: http1::Builder,
    two: http2::Builder<TokioExecutor>,
}

impl Http {
    fn new(max_header: usize, bounds: Bounds) -> Self {
        let mut one = http1::Builder::new();
        one.timer(TokioTimer::new())
            // ClientIo has its own, which tells an idle client from a slow one.
            .header_read_timeout(None)
            // ClientIo sees a client go as well, and sets no room aside to read meanwhile.
            .half_close(true)
            .auto_date_header(false)
            .preserve_header_case(true)
            // Copying a small piece costs less than a call with two of them.
            .writev(false)
            .max_buf_size(max_header.max(8192));
        let mut two = http2::Builder::new(TokioExecutor::new());
        two.timer(TokioTimer::new())
            .auto_date_header(false)
            .max_concurrent_streams(MAX_STREAMS)
            // A stream that nobody takes from is not to hold up the others.
            .initial_stream_window_size(256 << 10)
            .initial_connection_window_size(4 << 20)
            .max_send_buf_size(128 << 10)
            // What is between this and the limit gets a full answer.
            .max_header_list_size(u32::try_from(max_header.saturating_mul(2)).unwrap_or(u32::MAX))
            .keep_alive_interval(Duration::from_secs(30));
        Self {
            bounds: Arc::new(bounds),
            one,
            two,
        }
    }
}

/// A request, and what it and its connection tell each other.
type Asked = (Request<Incoming>, Arc<Exchange>);

/// One connection's share of everything.
struct Serving<S> {
    /// Answers a request.
    serve: S,
    http: Arc<Http>,
    shared: Arc<Shared>,
    stopping: watch::Receiver<()>,
    place: Place,
}

impl<S, F> Serving<S>
where
    S: Fn(Asked) -> F + Send + 'static,
    F: Future<Output = Response<Reply>> + Send + Unpin + 'static,
{
    /// A connection whose client has begun to speak.
    async fn plain(mut self, stream: TcpStream) -> Option<BoxFuture<'static, ()>> {
        let looking =
            tokio::time::timeout(self.shared.config.timeouts.keepalive, begins_http2(&stream));
        let http2 = tokio::select! {
            seen = looking => seen.ok()?.ok()?,
            // It has not begun a request, and is not to begin one now.
            _ = self.stopping.changed() => return None,
        };
        Some(self.connection(stream, http2))
    }

    async fn secured(
        mut self,
        tls: TlsAcceptor,
        stream: TcpStream,
    ) -> Option<BoxFuture<'static, ()>> {
        let handshake =
            tokio::time::timeout(self.shared.config.timeouts.header, tls.accept(stream));
        let stream = tokio::select! {
            done = handshake => done.ok()?.ok()?,
            _ = self.stopping.changed() => return None,
        };
        let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        Some(self.connection(stream, http2))
    }

    /// A connection to its end. No async fn: that would keep room for each step
    /// of its making for as long as the connection lives.
    fn connection<T: Transport + Send + 'static>(
        self,
        stream: T,
        http2: bool,
    ) -> BoxFuture<'static, ()> {
        let exchange = Arc::new(Exchange::default());
        let bounds = Arc::clone(&self.http.bounds);
        let client = ClientIo::new(stream, http2, Arc::clone(&exchange), bounds);
        let io = TokioIo::new(client);
        let (serve, place) = (self.serve, self.place);
        let service = service_fn(move |request: Request<Incoming>| {
            serve((request, Arc::clone(&exchange))).map(Ok::<_, Infallible>)
        });
        // Whatever ends a connection has been reported request by request.
        let stopping = self.stopping;
        if http2 {
            let connection = self.http.two.serve_connection(io, service);
            let served = to_its_end(connection, |one| one.graceful_shutdown(), stopping);
            served.map(move |()| drop(place)).boxed()
        } else {
            let connection = self.http.one.serve_connection(io, service);
            let served = to_its_end(connection, |one| one.graceful_shutdown(), stopping);
            served.map(move |()| drop(place)).boxed()
        }
    }
}

/// A connection to its end, of which it is told when the server stops: what is
/// under way is answered then, and nothing new is taken.
///
/// No async fn: it would keep room for a connection twice.
fn to_its_end<C: Future>(
    connection: C,
    end: impl Fn(Pin<&mut C>),
    mut stopping: watch::Receiver<()>,
) -> impl Future<Output = ()> {
    let told = stopping.clone();
    let mut connection = Box::pin(connection);
    let stopped = async move { stopping.changed().await.is_ok() };
    let mut stopped = Box::pin(stopped.fuse());
    let mut asked: Option<Waker> = None;
    poll_fn(move |cx| {
        // Asked once, it wakes this task: a look suffices then, and costs less.
        let asks = asked
            .as_ref()
            .is_none_or(|waker| !waker.will_wake(cx.waker()));
        let is_told = told.has_changed().unwrap_or(true);
        if (asks || is_told) && !stopped.is_terminated() {
            asked = Some(cx.waker().clone());
            if stopped.as_mut().poll(cx).is_ready() {
                // A request that has come before is under way.
                if connection.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(());
                }
                end(connection.as_mut());
            }
        }
        connection.as_mut().poll(cx).map(drop)
    })
}

/// Looks at the first bytes and leaves them there.
async fn begins_http2(stream: &TcpStream) -> io::Result<bool> {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let mut begin = [0; PREFACE.len()];
    // A preface comes in one piece, as good as always.
    for _ in 0..50 {
        let length = stream.peek(&mut begin).await?;
        let came = begin.get(..length).unwrap_or_default();
        if length == 0 || came.len() == PREFACE.len() || !PREFACE.starts_with(came) {
            return Ok(came == PREFACE);
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(false)
}
