//! A client's connection as the HTTP library sees it. It adds what the library
//! leaves out: bounds on time, and a full answer where the library would send a
//! bare status or nothing at all.

use crate::answers::Code;
use crate::config::Timeouts;
use crate::gate::{Gate, Ticket};
use crate::metrics::Metrics;
use crate::patience::Patience;
use bytes::{Buf, Bytes};
use futures_util::FutureExt;
use smallvec::SmallVec;
use std::io::{self, IoSlice};
use std::mem;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, Ready};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::server::TlsStream;

/// How much a client that was refused may still send before the connection is
/// closed, in bytes, and for how long: closed at once, it would lose the answer.
const LINGER: (usize, Duration) = (1 << 20, Duration::from_secs(2));

/// How much of a head is kept, in bytes: as long as most.
const MOST_HEAD: usize = 4096;

/// What a connection's transport and its requests tell each other. Not to be shown:
/// a client's key is in its head.
pub struct Exchange {
    /// Requests begun and not wholly answered, and bodies still being read.
    active: AtomicU32,
    /// Those of them that are bodies of answered requests.
    held: AtomicU32,
    /// Requests so far.
    requests: AtomicU64,
    /// Whether the head that came last may hold a Content-Length.
    may_have_length: AtomicBool,
    /// What came last between two requests, a head most likely. It may be the end of
    /// one, or begin with another, where requests come together.
    head: Mutex<Vec<u8>>,
    turns: Mutex<Turns>,
}

/// Answers that wait for the client to take more of them.
#[derive(Debug, Default)]
struct Turns {
    waiting: u32,
    /// When one began or ceased to wait.
    changed: Option<Instant>,
}

impl Default for Exchange {
    fn default() -> Self {
        Self {
            active: AtomicU32::new(0),
            held: AtomicU32::new(0),
            requests: AtomicU64::new(0),
            may_have_length: AtomicBool::new(true),
            head: Mutex::default(),
            turns: Mutex::default(),
        }
    }
}

impl Exchange {
    /// Marks a request as under way until the value is dropped.
    pub fn begin(self: &Arc<Self>) -> Active {
        self.active.fetch_add(1, Ordering::Relaxed);
        self.requests.fetch_add(1, Ordering::Relaxed);
        Active {
            exchange: Arc::clone(self),
            held: false,
        }
    }

    /// Keeps the connection from looking idle until the value is dropped: a
    /// body is still being read.
    pub fn hold(self: &Arc<Self>) -> Active {
        self.active.fetch_add(1, Ordering::Relaxed);
        self.held.fetch_add(1, Ordering::Relaxed);
        Active {
            exchange: Arc::clone(self),
            held: true,
        }
    }

    fn turns(&self) -> MutexGuard<'_, Turns> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn head(&self) -> MutexGuard<'_, Vec<u8>> {
        self.head.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is most likely the request's head, as it came over HTTP/1. To be taken
    /// for each request, as it holds a client's key.
    pub fn take_head(&self) -> Option<Vec<u8>> {
        let head = mem::take(&mut *self.head());
        (1..MOST_HEAD).contains(&head.len()).then_some(head)
    }

    /// How long nothing has happened here because each answer that is under way
    /// waits for the client.
    fn untaken(&self) -> Option<Duration> {
        let turns = self.turns();
        let all = turns.waiting > 0 && turns.waiting >= self.active.load(Ordering::Relaxed);
        let changed = turns.changed.filter(|_| all)?;
        Some(changed.elapsed())
    }

    /// Whether the request's head may hold a Content-Length. The library drops
    /// it without a word beside a Transfer-Encoding.
    pub fn take_may_have_length(&self) -> bool {
        self.may_have_length.swap(true, Ordering::Relaxed)
    }
}

/// Whose turn it is with one answer over HTTP/2: the client's, to take what
/// there is, or the forwarder's, to have more of it. The client's at first.
pub struct Turn {
    exchange: Arc<Exchange>,
    clients: bool,
}

impl Turn {
    pub fn begin(exchange: &Arc<Exchange>) -> Self {
        let mut turn = Self {
            exchange: Arc::clone(exchange),
            clients: false,
        };
        turn.set(true);
        turn
    }

    pub fn set(&mut self, clients: bool) {
        if !clients && !self.clients {
            return;
        }
        let mut turns = self.exchange.turns();
        turns.waiting = turns.waiting + u32::from(clients) - u32::from(self.clients);
        turns.changed = Some(Instant::now());
        self.clients = clients;
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.set(false);
    }
}

const LENGTH: &[u8; 14] = b"content-length";
/// As much of what came before as may hold all of the name but its end.
const REST: usize = LENGTH.len() - 1;

/// Looks for a Content-Length in a head as it comes, in however many pieces.
#[derive(Debug, Default)]
struct HeadScan {
    found: bool,
    begun: bool,
    /// The last bytes so far; zeros where there are fewer.
    tail: [u8; REST],
}

impl HeadScan {
    /// Whether there has been one by the end of this piece.
    fn sees(&mut self, piece: &[u8]) -> bool {
        self.found |= names_length(piece);
        let border: SmallVec<[u8; 2 * REST]> = if self.begun {
            let begin = piece.get(..REST).unwrap_or(piece);
            self.tail.iter().chain(begin).copied().collect()
        } else {
            SmallVec::new()
        };
        self.found |= names_length(&border);
        self.begun = true;
        if let Some(tail) = piece.last_chunk().or_else(|| border.last_chunk()) {
            self.tail = *tail;
        } else {
            let kept = self.tail.len() - piece.len();
            if let Some((_, end)) = self.tail.split_at_mut_checked(kept) {
                end.copy_from_slice(piece);
            }
        }
        self.found
    }
}

fn names_length(head: &[u8]) -> bool {
    may_name_length(head)
        && memchr::memchr_iter(b'-', head).any(|at| {
            let start = at.checked_sub(7);
            let name = start.and_then(|start| head.get(start..start + LENGTH.len()));
            name.is_some_and(|name| name.eq_ignore_ascii_case(LENGTH))
        })
}

/// Whether the middle of the name is there. Without a branch for each byte, many
/// bytes are looked at in one go.
fn may_name_length(head: &[u8]) -> bool {
    let after = |count| head.get(count..).unwrap_or_default();
    let threes = head.iter().zip(after(1)).zip(after(2));
    threes.fold(false, |seen, ((first, second), third)| {
        seen | ((*first == b'-') & (second | 0x20 == b'l') & (third | 0x20 == b'e'))
    })
}

/// A request that is not wholly answered yet, or whose body is still being read.
pub struct Active {
    exchange: Arc<Exchange>,
    held: bool,
}

impl Drop for Active {
    fn drop(&mut self) {
        if self.held {
            self.exchange.held.fetch_sub(1, Ordering::Relaxed);
        }
        self.exchange.active.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The bounds that connections are held to, and where their ends are counted.
#[derive(Debug)]
pub struct Bounds {
    header: Duration,
    keepalive: Duration,
    send: Duration,
    metrics: Arc<Metrics>,
    /// For all connections of a thread.
    gate: Arc<Gate>,
}

impl Bounds {
    pub fn new(timeouts: &Timeouts, metrics: &Arc<Metrics>) -> Self {
        Self {
            header: timeouts.header,
            keepalive: timeouts.keepalive,
            send: timeouts.send,
            metrics: Arc::clone(metrics),
            gate: Arc::default(),
        }
    }

    /// Has requests that have come taken up at once, as there will be no others.
    pub fn open(&self) {
        self.gate.open();
    }
}

/// A transport that has a socket underneath.
pub trait Transport: AsyncRead + AsyncWrite + Unpin {
    fn socket(&self) -> &TcpStream;
}

impl Transport for TcpStream {
    fn socket(&self) -> &TcpStream {
        self
    }
}

impl Transport for TlsStream<TcpStream> {
    fn socket(&self) -> &TcpStream {
        self.get_ref().0
    }
}

/// Whether the other side has ended its part, as far as is known by now.
fn is_closed(socket: &TcpStream) -> bool {
    let seen = socket.ready(Interest::READABLE).now_or_never();
    seen.is_some_and(|seen| seen.is_ok_and(|seen: Ready| seen.is_read_closed()))
}

/// What becomes of a client that is refused.
enum Refusal {
    /// It gets this, in the place of what the library says, or where that says nothing.
    Answering(Bytes),
    /// What it has sent since, in bytes, and when the wait for it to go ends.
    Lingering(usize, Instant),
}

/// A transport `S` with bounds.
pub struct ClientIo<S> {
    inner: S,
    exchange: Arc<Exchange>,
    bounds: Arc<Bounds>,
    is_http2: bool,
    /// Requests that the state below has taken note of.
    noted: u64,
    /// All answers to them have gone out.
    clean: bool,
    /// Whether a request has been under way since the connection was last idle.
    was_active: bool,
    /// Whether a head has begun to come, since the connection is idle.
    in_head: bool,
    /// Since when more of that, or its beginning, is waited for.
    waiting_since: Option<Instant>,
    scan: HeadScan,
    /// Its place among those whose requests have come.
    ticket: Ticket,
    /// Whether the library reads, so that it sees a client go.
    reading: bool,
    /// Looks out for that while it does not: a second view of the socket.
    lookout: Option<Box<TcpStream>>,
    /// Since when the client takes nothing.
    stalled_since: Option<Instant>,
    patience: Patience,
    /// What is still to be done for a client that is refused here.
    refusal: Option<Box<Refusal>>,
    /// Time is up: nothing more is read.
    expired: bool,
    shut: bool,
}

impl<S: Transport> ClientIo<S> {
    pub fn new(inner: S, is_http2: bool, exchange: Arc<Exchange>, bounds: Arc<Bounds>) -> Self {
        Self {
            inner,
            exchange,
            bounds,
            is_http2,
            noted: 0,
            clean: true,
            was_active: false,
            in_head: false,
            waiting_since: None,
            scan: HeadScan::default(),
            ticket: Ticket::default(),
            reading: false,
            lookout: None,
            stalled_since: None,
            patience: Patience::new(),
            refusal: None,
            expired: false,
            shut: false,
        }
    }

    fn is_idle(&self) -> bool {
        self.exchange.active.load(Ordering::Relaxed) == 0
    }

    /// Whether no answer is under way; a body may still be coming.
    fn is_answered(&self) -> bool {
        let exchange = &self.exchange;
        exchange.active.load(Ordering::Relaxed) <= exchange.held.load(Ordering::Relaxed)
    }

    /// Whether a request has come and none of it has been read. (Over HTTP/2, one
    /// connection has the requests of many.)
    fn begins_head(&self, cx: &mut Context<'_>) -> bool {
        let may_begin = !self.is_http2 && !self.in_head && self.is_idle();
        may_begin && (self.ticket.is_held() || self.inner.socket().poll_read_ready(cx).is_ready())
    }

    /// Takes note of requests that began since the last look.
    fn note(&mut self) {
        let requests = self.exchange.requests.load(Ordering::Relaxed);
        if requests != self.noted {
            self.noted = requests;
            self.clean = false;
            self.was_active = true;
            self.in_head = false;
            // HTTP/2 reads before it flushes an answer's end.
            self.waiting_since = None;
            self.reading = false;
        }
    }

    /// Whether the client has been silent for too long, or takes nothing of what it
    /// is sent, and whether it was in the middle of a head.
    fn poll_silence(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        if !self.is_idle() {
            // What a client leaves untaken is cut off after the one span; from then
            // on the connection is as good as idle, which is bound by the other.
            let most = self.bounds.send.saturating_add(self.bounds.keepalive);
            if self.exchange.untaken().is_some_and(|time| time >= most) {
                return Poll::Ready(false);
            }
            // Nobody else wakes this when the answer is out.
            let while_untaken = if self.is_http2 {
                self.bounds.send / 2
            } else {
                Duration::MAX
            };
            let next = self.bounds.keepalive.min(while_untaken);
            let _ = self.patience.poll(Instant::now() + next, cx);
            return Poll::Pending;
        }
        let in_head = self.in_head;
        let bound = if in_head {
            self.bounds.header
        } else {
            self.bounds.keepalive
        };
        let since = *self.waiting_since.get_or_insert_with(Instant::now);
        self.patience.poll(since + bound, cx).map(|()| in_head)
    }

    fn answer(&mut self, code: Code) {
        self.bounds.metrics.turned_away(code);
        self.refusal = Some(Box::new(Refusal::Answering(code.bytes())));
    }

    fn poll_own(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(refusal) = &mut self.refusal else {
            return Poll::Ready(Ok(()));
        };
        while let Refusal::Answering(own) = &mut **refusal {
            if !own.has_remaining() {
                **refusal = Refusal::Lingering(0, Instant::now() + LINGER.1);
                break;
            }
            let written = ready!(Pin::new(&mut self.inner).poll_write(cx, own))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            own.advance(written);
        }
        Poll::Ready(Ok(()))
    }

    /// Whether these bytes of the library's are not to go out. What it writes
    /// when all answers are out can only be its own refusal of something that is
    /// no request: a full answer goes in its place.
    fn replaces(&mut self, bytes: &[u8]) -> bool {
        if self.refusal.is_some() {
            return true;
        }
        self.note();
        if !self.clean || !self.is_answered() {
            return false;
        }
        let status = bytes
            .strip_prefix(b"HTTP/1.")
            .and_then(|rest| rest.get(2..5));
        let Some(status) = status else { return false };
        let status = std::str::from_utf8(status)
            .ok()
            .and_then(|status| status.parse().ok());
        self.answer(Code::of_status(status.unwrap_or(400)));
        true
    }

    /// After a write: whether the client takes what it is sent.
    fn poll_taken(
        &mut self,
        polled: Poll<io::Result<usize>>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(count)) = polled {
            self.bounds.gate.passed_on(count);
        }
        if polled.is_ready() {
            self.stalled_since = None;
            return polled;
        }
        let since = *self.stalled_since.get_or_insert_with(Instant::now);
        ready!(self.patience.poll(since + self.bounds.send, cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }

    /// Whether the client has gone while the library does not read, as more
    /// requests wait behind the one under way, or its body can't be passed on:
    /// the end lies behind what is unread, but the socket knows of it.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.lookout.is_none() {
            let socket = self.inner.socket();
            if ready!(socket.poll_read_ready(cx)).is_err() || is_closed(socket) {
                return Poll::Ready(());
            }
            // Something else is there to be read, which hides what comes behind it.
            let view = self.inner.socket().as_fd().try_clone_to_owned();
            let view = view
                .map(std::net::TcpStream::from)
                .and_then(TcpStream::from_std);
            self.lookout = view.ok().map(Box::new);
        }
        let Some(lookout) = &self.lookout else {
            return Poll::Pending;
        };
        while ready!(lookout.poll_read_ready(cx)).is_ok() {
            if is_closed(lookout) {
                return Poll::Ready(());
            }
            // Nothing is read here: this waits for what the socket says next.
            let _ = lookout.try_io(Interest::READABLE, || {
                io::Result::<()>::Err(io::ErrorKind::WouldBlock.into())
            });
        }
        Poll::Pending
    }

    /// Reads what the refused client still sends, within bounds.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(Refusal::Lingering(seen, until)) = self.refusal.as_deref_mut() else {
            return Poll::Ready(());
        };
        let mut scrap = [0; 4096];
        loop {
            let mut buffer = ReadBuf::new(&mut scrap);
            match Pin::new(&mut self.inner).poll_read(cx, &mut buffer) {
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() && *seen < LINGER.0 => {
                    *seen += buffer.filled().len();
                }
                Poll::Ready(_) => break,
                Poll::Pending => return self.patience.poll(*until, cx),
            }
        }
        Poll::Ready(())
    }
}

impl<S: Transport> AsyncRead for ClientIo<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.expired {
            return Poll::Ready(Ok(()));
        }
        this.note();
        if this.begins_head(cx) {
            this.reading = true;
            let gate = &this.bounds.gate;
            ready!(gate.poll_enter(&mut this.ticket, cx));
        }
        let before = buffer.filled().len();
        if let Poll::Ready(read) = Pin::new(&mut this.inner).poll_read(cx, buffer) {
            let came = buffer.filled().get(before..).unwrap_or_default();
            if !came.is_empty() && this.is_idle() {
                let begins = !this.in_head;
                if begins {
                    this.scan = HeadScan::default();
                }
                let length = this.scan.sees(came);
                this.exchange
                    .may_have_length
                    .store(length, Ordering::Relaxed);
                // In HTTP/2 what comes between requests need not be a head.
                if !this.is_http2 {
                    let mut head = this.exchange.head();
                    if begins {
                        head.clear();
                        this.in_head = true;
                        this.waiting_since = None;
                    }
                    // What comes with it of a body is not to be kept beside it.
                    let room = MOST_HEAD.saturating_sub(head.len());
                    head.extend_from_slice(came.get(..room).unwrap_or(came));
                }
            }
            this.reading = false;
            return Poll::Ready(read);
        }
        this.reading = true;
        let in_a_head = ready!(this.poll_silence(cx));
        this.expired = true;
        if in_a_head {
            this.answer(Code::RequestTimeout);
            // It is small; a client that does not even take this gets nothing.
            let _ = this.poll_own(cx);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: Transport> AsyncWrite for ClientIo<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.replaces(bytes) {
            ready!(this.poll_own(cx))?;
            return Poll::Ready(Ok(bytes.len()));
        }
        let polled = Pin::new(&mut this.inner).poll_write(cx, bytes);
        this.poll_taken(polled, cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let first = parts
            .iter()
            .find(|part| !part.is_empty())
            .map_or(&[][..], |part| part);
        if this.replaces(first) {
            ready!(this.poll_own(cx))?;
            return Poll::Ready(Ok(parts.iter().map(|part| part.len()).sum()));
        }
        let polled = Pin::new(&mut this.inner).poll_write_vectored(cx, parts);
        this.poll_taken(polled, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_own(cx))?;
        ready!(Pin::new(&mut this.inner).poll_flush(cx))?;
        this.note();
        // The library flushes when it has written all it had, and each time it
        // has nothing to do.
        this.clean = this.is_answered();
        let idle = this.is_idle();
        if idle && this.was_active {
            this.was_active = false;
            this.waiting_since = None;
        }
        if !idle && !this.reading && this.poll_gone(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_own(cx))?;
        if !this.shut {
            ready!(Pin::new(&mut this.inner).poll_shutdown(cx))?;
            this.shut = true;
        }
        ready!(this.poll_linger(cx));
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_is_seen_however_the_head_is_cut() {
        let head = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n";
        for size in 1..head.len() {
            let mut scan = HeadScan::default();
            let seen: Vec<bool> = head.chunks(size).map(|piece| scan.sees(piece)).collect();
            assert_eq!(seen.last(), Some(&true), "{size}");
            assert!(!seen[0] || size > 58, "{size}");
        }
        let mut scan = HeadScan::default();
        assert!(
            !b"content-_content_length-content"
                .chunks(3)
                .any(|piece| scan.sees(piece))
        );
    }

    #[test]
    fn a_length_is_seen_in_any_case_and_place() {
        for head in [
            "Content-Length: 3",
            "x-y: 1\r\ncontent-length:3\r\n",
            "--CONTENT-LENGTH",
        ] {
            assert!(names_length(head.as_bytes()), "{head}");
        }
        for head in [
            "",
            "-",
            "content_length: 3",
            "Content-Type: text",
            "content-lengt",
            "ent-length: 3",
        ] {
            assert!(!names_length(head.as_bytes()), "{head}");
        }
    }

    /// Whether hundreds may enter at once.
    fn is_free(gate: &Arc<Gate>) -> bool {
        let cx = &mut Context::from_waker(std::task::Waker::noop());
        (0..999).all(|_| gate.poll_enter(&mut Ticket::default(), cx).is_ready())
    }

    #[test]
    fn the_gate_is_told_of_downloads() {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        runtime.enable_all().build().unwrap().block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let client = TcpStream::connect(listener.local_addr().unwrap()).await;
            let (server, _) = listener.accept().await.unwrap();
            let wait = Duration::from_secs(9);
            let bounds = Arc::new(Bounds {
                header: wait,
                keepalive: wait,
                send: wait,
                metrics: Arc::new(Metrics::new(1)),
                gate: Arc::default(),
            });
            let mut io = ClientIo::new(server, false, Arc::default(), Arc::clone(&bounds));
            for (length, free) in [(1000, false), (64 << 10, true)] {
                let bytes = vec![b'x'; length];
                let taken = std::future::poll_fn(|cx| Pin::new(&mut io).poll_write(cx, &bytes));
                assert!(taken.await.unwrap() >= length.min(16 << 10));
                assert_eq!(is_free(&bounds.gate), free, "{length}");
            }
            drop(client);
        });
    }
}
