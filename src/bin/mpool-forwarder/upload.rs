//! The request's body on its way up: passed on as it comes, counted against the
//! limit, watched for silence, and kept up to a limit, so that the request can be
//! sent once more on another account.

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::HeaderMap;
use hyper::body::Incoming;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::{Instant, Sleep};

/// Why the client's body could not be passed on whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Longer than is allowed.
    TooLarge,
    /// Nothing came for too long.
    Silent,
    /// Not valid HTTP, or the client left.
    Broken,
    /// Another try has taken the body over.
    Superseded,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLarge => "the body is too long",
            Self::Silent => "the body stopped coming",
            Self::Broken => "the body broke off",
            Self::Superseded => "the body is sent elsewhere",
        })
    }
}

impl std::error::Error for Fault {}

/// The memory that all kept bodies share, in bytes.
#[derive(Debug)]
pub struct Budget {
    used: AtomicUsize,
    limit: usize,
}

impl Budget {
    pub const fn new(limit: usize) -> Self {
        Self {
            used: AtomicUsize::new(0),
            limit,
        }
    }

    fn take(&self, bytes: usize) -> bool {
        let before = self.used.fetch_add(bytes, Ordering::Relaxed);
        let fits = before.saturating_add(bytes) <= self.limit;
        if !fits {
            self.used.fetch_sub(bytes, Ordering::Relaxed);
        }
        fits
    }

    fn give_back(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// What an upload is held to.
#[derive(Clone, Debug)]
pub struct Rules {
    /// The longest body, in bytes.
    pub most: u64,
    /// How much of it is kept, in bytes.
    pub keep: usize,
    /// How long the client may be silent.
    pub silence: Duration,
    pub budget: Arc<Budget>,
}

enum Kept {
    Data(Bytes),
    Trailers(HeaderMap),
}

/// The one body of a request, whatever number of times it is sent.
struct Source {
    live: Incoming,
    rules: Rules,
    /// Everything that came so far; nothing once it can't be sent again.
    kept: Option<Vec<Kept>>,
    kept_bytes: usize,
    received: u64,
    finished: bool,
    fault: Option<Fault>,
    attempt: u32,
    last: Instant,
    timer: Option<Pin<Box<Sleep>>>,
    /// Held until the upstream says that it wants the body.
    gate: Option<Gate>,
}

struct Gate {
    opened: oneshot::Receiver<()>,
    patience: Pin<Box<Sleep>>,
}

/// How long a withheld body waits for `100 Continue` (RFC 9110 section 10.1.1
/// says not to wait for ever).
const CONTINUE_PATIENCE: Duration = Duration::from_secs(1);

impl Source {
    fn forget(&mut self) {
        self.kept = None;
        self.rules
            .budget
            .give_back(std::mem::take(&mut self.kept_bytes));
    }

    fn keep(&mut self, frame: &Frame<Bytes>) {
        let Some(kept) = &mut self.kept else { return };
        if let Some(data) = frame.data_ref() {
            // What a frame costs beyond its bytes counts too: a client may send a body byte by byte.
            let cost = data.len() + 64;
            if self.kept_bytes + cost > self.rules.keep || !self.rules.budget.take(cost) {
                self.forget();
                return;
            }
            self.kept_bytes += cost;
            // A small frame would hold a whole read buffer back.
            kept.push(Kept::Data(if data.len() < 4096 {
                Bytes::copy_from_slice(data)
            } else {
                data.clone()
            }));
        } else if let Some(trailers) = frame.trailers_ref() {
            kept.push(Kept::Trailers(trailers.clone()));
        }
    }

    fn fail(&mut self, fault: Fault) -> Poll<Option<Result<Frame<Bytes>, Fault>>> {
        self.fault = Some(fault);
        self.forget();
        Poll::Ready(Some(Err(fault)))
    }

    fn poll_gate(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(gate) = &mut self.gate else {
            return Poll::Ready(());
        };
        if Pin::new(&mut gate.opened).poll(cx).is_pending() {
            ready!(gate.patience.as_mut().poll(cx));
        }
        self.gate = None;
        self.last = Instant::now();
        Poll::Ready(())
    }

    fn poll_live(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Fault>>> {
        if let Some(fault) = self.fault {
            return Poll::Ready(Some(Err(fault)));
        }
        ready!(self.poll_gate(cx));
        match Pin::new(&mut self.live).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                self.last = Instant::now();
                self.received += frame.data_ref().map_or(0, |data| data.len() as u64);
                if self.received > self.rules.most {
                    return self.fail(Fault::TooLarge);
                }
                self.keep(&frame);
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(_))) => self.fail(Fault::Broken),
            Poll::Ready(None) => {
                self.finished = true;
                self.last = Instant::now();
                Poll::Ready(None)
            }
            Poll::Pending => self.poll_silence(cx),
        }
    }

    /// The timer is set anew only when it fires, not for each frame.
    fn poll_silence(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Fault>>> {
        let deadline = self.last + self.rules.silence;
        let timer = self
            .timer
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        while timer.as_mut().poll(cx).is_ready() {
            if Instant::now() >= deadline {
                return self.fail(Fault::Silent);
            }
            timer.as_mut().reset(deadline);
        }
        Poll::Pending
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.forget();
    }
}

/// The request's body, from which bodies to send are made.
#[derive(Clone)]
pub struct Upload {
    source: Option<Arc<Mutex<Source>>>,
}

impl Upload {
    pub fn new(live: Incoming, rules: &Rules) -> Self {
        if live.is_end_stream() {
            return Self { source: None };
        }
        let source = Source {
            live,
            rules: rules.clone(),
            kept: Some(Vec::new()),
            kept_bytes: 0,
            received: 0,
            finished: false,
            fault: None,
            attempt: 0,
            last: Instant::now(),
            timer: None,
            gate: None,
        };
        Self {
            source: Some(Arc::new(Mutex::new(source))),
        }
    }

    fn lock(&self) -> Option<MutexGuard<'_, Source>> {
        self.source
            .as_ref()
            .map(|source| source.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The body for one more try, from its beginning. Nothing when it is no
    /// longer in hand.
    pub fn body(&self) -> Option<UploadBody> {
        let Some(mut source) = self.lock() else {
            return Some(UploadBody {
                source: None,
                attempt: 0,
                next: 0,
                left: Some(0),
            });
        };
        if source.attempt > 0 && source.kept.is_none() {
            return None;
        }
        source.attempt += 1;
        let left = source
            .live
            .size_hint()
            .exact()
            .map(|rest| rest + source.received);
        Some(UploadBody {
            source: self.source.clone(),
            attempt: source.attempt,
            next: 0,
            left,
        })
    }

    /// Whether the whole body can be sent once more.
    pub fn in_hand(&self) -> bool {
        self.lock().is_none_or(|source| source.kept.is_some())
    }

    /// Lets no byte go up until the sender is used, or dropped, or has been
    /// silent for a second.
    pub fn withhold(&self) -> Option<oneshot::Sender<()>> {
        let mut source = self.lock()?;
        let (sender, opened) = oneshot::channel();
        source.gate = Some(Gate {
            opened,
            patience: Box::pin(tokio::time::sleep(CONTINUE_PATIENCE)),
        });
        Some(sender)
    }

    /// The answer has begun: the body won't be sent again.
    pub fn forget(&self) {
        if let Some(mut source) = self.lock() {
            source.forget();
        }
    }

    pub fn fault(&self) -> Option<Fault> {
        self.lock().and_then(|source| source.fault)
    }

    /// Bytes of the body that have come in.
    pub fn received(&self) -> u64 {
        self.lock().map_or(0, |source| source.received)
    }

    /// When the client has last been heard, if it is still sending.
    pub fn still_coming(&self) -> Option<Instant> {
        self.lock()
            .and_then(|source| (!source.finished && source.fault.is_none()).then_some(source.last))
    }

    /// The end of the body; nothing for a request without one.
    pub fn finished_at(&self) -> Option<Instant> {
        self.lock().map(|source| source.last)
    }
}

/// One sending of the body.
pub struct UploadBody {
    source: Option<Arc<Mutex<Source>>>,
    attempt: u32,
    next: usize,
    /// Bytes yet to come, where that is known.
    left: Option<u64>,
}

impl Body for UploadBody {
    type Data = Bytes;
    type Error = Fault;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Fault>>> {
        let this = self.get_mut();
        let Some(source) = &this.source else {
            return Poll::Ready(None);
        };
        let mut source = source.lock().unwrap_or_else(PoisonError::into_inner);
        if source.attempt != this.attempt {
            return Poll::Ready(Some(Err(Fault::Superseded)));
        }
        let again = source
            .kept
            .as_ref()
            .and_then(|kept| kept.get(this.next))
            .map(|kept| match kept {
                Kept::Data(data) => Frame::data(data.clone()),
                Kept::Trailers(trailers) => Frame::trailers(trailers.clone()),
            });
        let polled = match again {
            Some(frame) => Poll::Ready(Some(Ok(frame))),
            None if source.finished => Poll::Ready(None),
            None => source.poll_live(cx),
        };
        if let Poll::Ready(Some(Ok(frame))) = &polled {
            this.next += 1;
            let sent = frame.data_ref().map_or(0, |data| data.len() as u64);
            this.left = this.left.map(|left| left.saturating_sub(sent));
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.source.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        self.left
            .map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

/// Reads on what a refused client still sends, so that it gets to read the
/// answer instead of a reset connection, for as long as that is bearable.
pub fn drain(body: Incoming) {
    use http_body_util::BodyExt;
    const MOST: usize = 16 << 20;
    const LONGEST: Duration = Duration::from_secs(5);
    if body.is_end_stream() {
        return;
    }
    tokio::spawn(tokio::time::timeout(LONGEST, async move {
        let mut body = body;
        let mut drained = 0;
        while let Some(Ok(frame)) = body.frame().await {
            drained += frame.data_ref().map_or(0, Bytes::len);
            if drained > MOST {
                break;
            }
        }
    }));
}
