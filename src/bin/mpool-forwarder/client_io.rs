//! A client's connection as the HTTP library sees it. It adds what the library
//! leaves out: bounds on time, and a full answer where the library would send a
//! bare status or nothing at all.

use crate::answers::Code;
use crate::config::Timeouts;
use bytes::{Buf, Bytes};
use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

/// How much a client that was refused may still send before the connection is
/// closed, in bytes, and for how long: closed at once, it would lose the answer.
const LINGER: (usize, Duration) = (1 << 20, Duration::from_secs(2));

/// What a connection's transport and its requests tell each other.
#[derive(Debug, Default)]
pub struct Exchange {
    /// Requests begun and not wholly answered.
    active: AtomicU32,
    /// Requests so far.
    requests: AtomicU64,
}

impl Exchange {
    /// Marks a request as under way until the value is dropped.
    pub fn begin(self: &Arc<Self>) -> Active {
        self.active.fetch_add(1, Ordering::Relaxed);
        self.requests.fetch_add(1, Ordering::Relaxed);
        Active(Arc::clone(self))
    }
}

/// A request that is not wholly answered yet.
#[derive(Debug)]
pub struct Active(Arc<Exchange>);

impl Drop for Active {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The bounds that a connection is held to.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    header: Duration,
    keepalive: Duration,
    send: Duration,
}

/// A transport `S` with bounds.
pub struct ClientIo<S> {
    inner: S,
    exchange: Arc<Exchange>,
    bounds: Bounds,
    is_http2: bool,
    /// Requests that the state below has taken note of.
    noted: u64,
    /// All answers to them have gone out.
    clean: bool,
    /// Whether a request was under way at the last look.
    was_active: bool,
    idle_since: Instant,
    /// When a head began to come, since the connection is idle.
    head_since: Option<Instant>,
    /// Since when the client takes nothing.
    stalled_since: Option<Instant>,
    timer: Pin<Box<Sleep>>,
    /// An answer in the place of the library's, or where it has none.
    own: Option<Bytes>,
    /// What came since that answer, in bytes, and when the wait for it ends.
    lingering: Option<(usize, Instant)>,
    /// Time is up: nothing more is read.
    expired: bool,
    shut: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> ClientIo<S> {
    pub fn new(inner: S, exchange: Arc<Exchange>, timeouts: &Timeouts) -> Self {
        let now = Instant::now();
        let bounds = Bounds {
            header: timeouts.header,
            keepalive: timeouts.keepalive,
            send: timeouts.send,
        };
        Self {
            inner,
            exchange,
            bounds,
            is_http2: false,
            noted: 0,
            clean: true,
            was_active: false,
            idle_since: now,
            head_since: None,
            stalled_since: None,
            timer: Box::pin(tokio::time::sleep_until(
                now + bounds.header.min(bounds.keepalive),
            )),
            own: None,
            lingering: None,
            expired: false,
            shut: false,
        }
    }

    fn is_idle(&self) -> bool {
        self.exchange.active.load(Ordering::Relaxed) == 0
    }

    /// Takes note of requests that began since the last look.
    fn note(&mut self) {
        let requests = self.exchange.requests.load(Ordering::Relaxed);
        if requests != self.noted {
            self.noted = requests;
            self.clean = false;
            self.was_active = true;
            self.head_since = None;
        }
    }

    /// The timer is set anew only when it fires, not for each request.
    fn poll_deadline(&mut self, deadline: Instant, cx: &mut Context<'_>) -> Poll<()> {
        if self.timer.deadline() > deadline {
            self.timer.as_mut().reset(deadline);
        }
        while self.timer.as_mut().poll(cx).is_ready() {
            if Instant::now() >= deadline {
                return Poll::Ready(());
            }
            self.timer.as_mut().reset(deadline);
        }
        Poll::Pending
    }

    /// Whether the client has been silent for too long, and was in the middle of
    /// a head.
    fn poll_silence(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        if !self.is_idle() {
            return Poll::Pending;
        }
        if self.was_active {
            self.was_active = false;
            self.idle_since = Instant::now();
        }
        match self.head_since {
            Some(since) => self
                .poll_deadline(since + self.bounds.header, cx)
                .map(|()| true),
            None => self
                .poll_deadline(self.idle_since + self.bounds.keepalive, cx)
                .map(|()| false),
        }
    }

    fn poll_own(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(own) = &mut self.own {
            if !own.has_remaining() {
                self.own = None;
                self.lingering = Some((0, Instant::now() + LINGER.1));
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
        if self.own.is_some() || self.lingering.is_some() {
            return true;
        }
        self.note();
        if !self.clean || !self.is_idle() {
            return false;
        }
        let status = bytes
            .strip_prefix(b"HTTP/1.")
            .and_then(|rest| rest.get(2..5));
        let Some(status) = status else { return false };
        let status = std::str::from_utf8(status)
            .ok()
            .and_then(|status| status.parse().ok());
        self.own = Some(Code::of_status(status.unwrap_or(400)).bytes());
        true
    }

    /// After a write: whether the client takes what it is sent.
    fn poll_taken(
        &mut self,
        polled: Poll<io::Result<usize>>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        if polled.is_ready() {
            self.stalled_since = None;
            return polled;
        }
        let since = *self.stalled_since.get_or_insert_with(Instant::now);
        ready!(self.poll_deadline(since + self.bounds.send, cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }

    /// Reads what the refused client still sends, within bounds.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut scrap = [0; 4096];
        while let Some((seen, until)) = self.lingering {
            let mut buffer = ReadBuf::new(&mut scrap);
            match Pin::new(&mut self.inner).poll_read(cx, &mut buffer) {
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() && seen < LINGER.0 => {
                    self.lingering = Some((seen + buffer.filled().len(), until));
                }
                Poll::Ready(_) => break,
                Poll::Pending => return self.poll_deadline(until, cx),
            }
        }
        Poll::Ready(())
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for ClientIo<S> {
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
        let before = buffer.filled().len();
        if let Poll::Ready(read) = Pin::new(&mut this.inner).poll_read(cx, buffer) {
            let came = buffer.filled().get(before..).unwrap_or_default();
            if !came.is_empty() && this.head_since.is_none() && this.is_idle() {
                this.is_http2 |= this.noted == 0 && came.starts_with(b"PRI ");
                // In HTTP/2 what comes between requests need not be a head.
                this.head_since = (!this.is_http2).then(Instant::now);
            }
            return Poll::Ready(read);
        }
        let in_a_head = ready!(this.poll_silence(cx));
        this.expired = true;
        if in_a_head {
            this.own = Some(Code::RequestTimeout.bytes());
            // It is small; a client that does not even take this gets nothing.
            let _ = this.poll_own(cx);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for ClientIo<S> {
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
        // The library flushes when it has written all it had.
        this.clean = this.is_idle();
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
