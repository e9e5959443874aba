//! The request's body on its way up: passed on as it comes, counted against the
//! limit, watched for silence, and kept up to a limit, so that the request can be
//! sent once more on another account.

use crate::client_io::{Active, Exchange};
use crate::headers;
use crate::patience::Patience;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::HeaderMap;
use hyper::body::Incoming;
use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;
use tokio::time::Instant;

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

/// One thread's part of the memory that all kept bodies share, in bytes. It takes some more
/// than it needs, and gives back what it has too much of: memory that two processors write by
/// turns has to travel between them each time.
#[derive(Debug)]
pub struct Budget {
    /// What all threads have taken.
    taken: Arc<AtomicUsize>,
    limit: usize,
    /// What this thread has taken and not used.
    spare: AtomicUsize,
    step: usize,
}

impl Budget {
    /// Of those that share a limit, as many as there are threads. A thirty-second of it
    /// at most lies idle.
    pub fn shared(limit: usize, threads: usize) -> Vec<Self> {
        let taken = Arc::new(AtomicUsize::new(0));
        let step = (limit / 64 / threads.max(1)).min(256 << 10);
        let budget = |_| Self {
            taken: Arc::clone(&taken),
            limit,
            spare: AtomicUsize::new(0),
            step,
        };
        (0..threads).map(budget).collect()
    }

    fn take(&self, bytes: usize) -> bool {
        let spare = self.spare.swap(0, Ordering::Relaxed);
        let left = if bytes <= spare {
            Some(spare - bytes)
        } else {
            let extra = [self.step, 0].into_iter();
            let mut extra = extra.filter(|extra| self.take_from_all(bytes - spare, *extra));
            extra.next()
        };
        self.spare
            .fetch_add(left.unwrap_or(spare), Ordering::Relaxed);
        left.is_some()
    }

    fn take_from_all(&self, bytes: usize, extra: usize) -> bool {
        let more = |taken: usize| {
            let taken = taken.checked_add(bytes)?.checked_add(extra)?;
            (taken <= self.limit).then_some(taken)
        };
        let taken = self
            .taken
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        taken.is_ok()
    }

    fn give_back(&self, bytes: usize) {
        let spare = self.spare.swap(0, Ordering::Relaxed) + bytes;
        let keep = if spare > 2 * self.step {
            self.step
        } else {
            spare
        };
        self.spare.fetch_add(keep, Ordering::Relaxed);
        if keep < spare {
            self.taken.fetch_sub(spare - keep, Ordering::Relaxed);
        }
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
    exchange: Arc<Exchange>,
    /// Everything that came so far; nothing once it can't be sent again.
    kept: Option<Vec<Kept>>,
    kept_bytes: usize,
    received: u64,
    finished: bool,
    fault: Option<Fault>,
    attempt: u32,
    last: Instant,
    patience: Patience,
    /// Whoever waits for more of it.
    waker: Option<Waker>,
    /// Held until the upstream says that it wants the body.
    gate: Option<Gate>,
}

/// What holds a body back.
struct Gate {
    /// When it opens by itself; never once the answer is there.
    opens_at: Option<Instant>,
    patience: Patience,
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
        let Some(opens_at) = gate.opens_at else {
            return Poll::Pending;
        };
        ready!(gate.patience.poll(opens_at, cx));
        self.open();
        Poll::Ready(())
    }

    fn open(&mut self) {
        if self.gate.take().is_some() {
            self.last = Instant::now();
            self.wake();
        }
    }

    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn poll_live(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Fault>>> {
        if let Some(fault) = self.fault {
            return Poll::Ready(Some(Err(fault)));
        }
        ready!(self.poll_gate(cx));
        match Pin::new(&mut self.live).poll_frame(cx) {
            Poll::Ready(Some(Ok(mut frame))) => {
                if let Some(trailers) = frame.trailers_mut() {
                    headers::strip_trailers(trailers);
                }
                self.last = Instant::now();
                self.received += frame.data_ref().map_or(0, |data| data.len() as u64);
                if self.received > self.rules.most {
                    return self.fail(Fault::TooLarge);
                }
                self.keep(&frame);
                // Where the length is known, nobody may ask for what comes after.
                self.finished = self.live.is_end_stream();
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

    fn poll_silence(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Fault>>> {
        ready!(self.patience.poll(self.last + self.rules.silence, cx));
        self.fail(Fault::Silent)
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
    pub fn new(live: Incoming, rules: &Rules, exchange: &Arc<Exchange>) -> Self {
        if live.is_end_stream() {
            return Self { source: None };
        }
        let source = Source {
            live,
            rules: rules.clone(),
            exchange: Arc::clone(exchange),
            kept: Some(Vec::new()),
            kept_bytes: 0,
            received: 0,
            finished: false,
            fault: None,
            attempt: 0,
            last: Instant::now(),
            patience: Patience::new(),
            waker: None,
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
        let (Some(shared), Some(mut source)) = (&self.source, self.lock()) else {
            return Some(UploadBody(None));
        };
        if source.attempt > 0 && source.kept.is_none() {
            return None;
        }
        source.attempt += 1;
        // Whoever sends it now is to stop.
        source.wake();
        let left = source
            .live
            .size_hint()
            .exact()
            .map(|rest| rest + source.received);
        Some(UploadBody(Some(Box::new(Sending {
            source: Arc::clone(shared),
            attempt: source.attempt,
            next: 0,
            left,
        }))))
    }

    /// Whether the whole body can be sent once more.
    pub fn in_hand(&self) -> bool {
        self.lock().is_none_or(|source| source.kept.is_some())
    }

    /// Whether the client's part is over, and all of it is on its way up.
    pub fn is_sent(&self) -> bool {
        self.lock().is_none_or(|source| source.finished)
    }

    /// Lets no byte go up until [`Self::let_go`], or a second has passed.
    pub fn withhold(&self) {
        if let Some(mut source) = self.lock() {
            source.gate = Some(Gate {
                opens_at: Some(Instant::now() + CONTINUE_PATIENCE),
                patience: Patience::new(),
            });
        }
    }

    /// Whether no byte may go up still.
    pub fn is_withheld(&self) -> bool {
        self.lock().is_some_and(|source| source.gate.is_some())
    }

    /// The upstream wants the body.
    pub fn let_go(&self) {
        if let Some(mut source) = self.lock() {
            source.open();
        }
    }

    /// The exchange is over. What the client still sends is read on for as long
    /// as that is bearable, so that it gets to read its answer instead of a reset
    /// connection; a body still withheld will not be sent at all.
    pub fn close(&self) {
        let Some(shared) = self.source.clone() else {
            return;
        };
        let mut held = None;
        if let Some(mut source) = self.lock() {
            source.forget();
            if source.finished || source.fault == Some(Fault::Broken) {
                return;
            }
            source.attempt += 1;
            source.wake();
            if source.gate.take().is_some() {
                return;
            }
            held = Some(source.exchange.hold());
        }
        let mut left = DRAIN.0;
        drain(
            held,
            poll_fn(move |cx| {
                let mut source = shared.lock().unwrap_or_else(PoisonError::into_inner);
                loop {
                    match ready!(Pin::new(&mut source.live).poll_frame(cx)) {
                        Some(Ok(frame)) => {
                            left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len))
                        }
                        Some(Err(_)) | None => return Poll::Ready(()),
                    }
                    if left == 0 {
                        return Poll::Ready(());
                    }
                }
            }),
        );
    }

    /// The answer has begun: the body won't be sent again, and what is withheld
    /// stays so, unless the upstream still asks for it.
    pub fn forget(&self) {
        if let Some(mut source) = self.lock() {
            source.forget();
            if let Some(gate) = &mut source.gate {
                gate.opens_at = None;
            }
        }
    }

    pub fn fault(&self) -> Option<Fault> {
        self.lock().and_then(|source| source.fault)
    }

    /// Bytes of the body that have come in.
    pub fn received(&self) -> u64 {
        self.lock().map_or(0, |source| source.received)
    }

    /// When the body last came on, or ended; nothing for a request without one.
    pub fn last_heard(&self) -> Option<Instant> {
        self.lock().map(|source| source.last)
    }
}

/// A body to send, or none: small, as a connection to the upstream sets aside
/// room for many requests.
pub struct UploadBody(Option<Box<Sending>>);

/// One sending of the body.
struct Sending {
    source: Arc<Mutex<Source>>,
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
        let Some(this) = &mut self.get_mut().0 else {
            return Poll::Ready(None);
        };
        let mut source = this.source.lock().unwrap_or_else(PoisonError::into_inner);
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
        if polled.is_pending()
            && !source
                .waker
                .as_ref()
                .is_some_and(|waker| waker.will_wake(cx.waker()))
        {
            source.waker = Some(cx.waker().clone());
        }
        if let Poll::Ready(Some(Ok(frame))) = &polled {
            this.next += 1;
            let sent = frame.data_ref().map_or(0, |data| data.len() as u64);
            this.left = this.left.map(|left| left.saturating_sub(sent));
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        let left = self.0.as_ref().map_or(Some(0), |sending| sending.left);
        left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

/// How much a client may still send that has its answer, in bytes, and for how long.
const DRAIN: (usize, Duration) = (16 << 20, Duration::from_secs(5));

/// `held` keeps the client's connection from looking idle meanwhile.
fn drain(held: Option<Active>, reading: impl Future<Output = ()> + Send + 'static) {
    // There is no runtime any more when the process ends.
    if let Ok(runtime) = tokio::runtime::Handle::try_current() {
        runtime.spawn(async move {
            let _ = tokio::time::timeout(DRAIN.1, reading).await;
            drop(held);
        });
    }
}

/// Reads a body to its end, within bounds, so that its connection can be used
/// again and the other side isn't cut off. `held` is a client's connection.
pub fn discard<B>(mut body: B, held: Option<Active>)
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Send,
{
    if body.is_end_stream() {
        return;
    }
    drain(held, async move {
        let mut left = DRAIN.0;
        while let Some(Ok(frame)) = body.frame().await {
            left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
            if left == 0 {
                return;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_share_one_budget() {
        const LIMIT: usize = 64 << 20;
        let budgets = Budget::shared(LIMIT, 2);
        let [one, two] = &budgets[..] else {
            panic!("two")
        };
        let used = || one.taken.load(Ordering::Relaxed);
        // Here and there a body, and most of the memory for one of them.
        for _ in 0..1000 {
            assert!(one.take(1000) && two.take(1000));
            one.give_back(1000);
            two.give_back(1000);
        }
        assert!(used() <= LIMIT / 32, "{}", used());
        let most = LIMIT - LIMIT / 32;
        assert!(one.take(most));
        assert!(!two.take(LIMIT / 16));
        assert!(used() <= LIMIT);
        one.give_back(most);
        assert!(two.take(most));
        two.give_back(most);
        assert!(used() <= LIMIT / 32, "{}", used());
    }

    #[test]
    fn pieces_of_any_size_leave_little_idle() {
        const LIMIT: usize = 1 << 20;
        for size in [100, 2000, 5000, 16_448, 65_600] {
            let budgets = Budget::shared(LIMIT, 8);
            let mut used = 0;
            while budgets.iter().any(|budget| budget.take(size)) {
                used += size;
            }
            let idle = LIMIT - used;
            assert!(idle <= LIMIT / 32 + size, "{size}: {idle}");
        }
    }

    #[test]
    fn a_small_budget_is_kept_to_the_byte() {
        let budgets = Budget::shared(100, 2);
        let [one, two] = &budgets[..] else {
            panic!("two")
        };
        assert!(one.take(60) && two.take(40) && !one.take(1));
        two.give_back(40);
        assert!(one.take(40) && !two.take(1));
        one.give_back(100);
        assert!(two.take(100));
    }
}
