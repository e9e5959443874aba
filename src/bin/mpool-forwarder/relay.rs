//! The answer's body on its way down: passed on frame by frame, with an eye on
//! silence and on how it ended. Dropping it drops the upstream's stream.

use crate::answers::CODE_HEADER;
use crate::client_io::{Active, Turn};
use crate::headers;
use crate::patience::Patience;
use crate::report::{End, Report};
use crate::upstream::Download;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::Full;
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// What a client is sent. Boxed: the library hands it on from step to step.
pub struct Reply(Box<Sent>);

struct Sent {
    body: Source,
    /// Over HTTP/2, where a client may leave untaken what it likes.
    turn: Option<Turn>,
    _active: Active,
}

#[expect(
    clippy::large_enum_variant,
    reason = "the large one is nearly all there is"
)]
enum Source {
    Upstream(Relay),
    Own(Full<Bytes>),
}

impl Reply {
    pub fn upstream(relay: Relay, active: Active, turn: Option<Turn>) -> Self {
        Self(Box::new(Sent {
            body: Source::Upstream(relay),
            turn,
            _active: active,
        }))
    }

    /// An answer of the forwarder's own.
    pub fn own(body: Full<Bytes>, active: Active, turn: Option<Turn>) -> Self {
        Self(Box::new(Sent {
            body: Source::Own(body),
            turn,
            _active: active,
        }))
    }
}

/// Why a stream ended before its time. The connection to the client is cut
/// then: a broken answer must never look whole.
#[derive(Clone, Copy, Debug)]
pub enum Broken {
    Upstream,
    Silent,
    Untaken,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Upstream => "the upstream broke off",
            Self::Silent => "the upstream fell silent",
            Self::Untaken => "the client took nothing of it",
        })
    }
}

impl std::error::Error for Broken {}

/// The upstream's body.
pub struct Relay {
    live: Live,
    report: Report,
    silence: Duration,
    /// Since when nothing has come; nothing where that is not waited for.
    silent_since: Option<Instant>,
    patience: Patience,
    /// Bytes yet to come, where that is known.
    left: Option<u64>,
}

/// How long the two sides may keep a stream waiting.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// How long the upstream may send nothing.
    pub silence: Duration,
    /// How long an HTTP/2 client may take nothing of one stream. (Over HTTP/1
    /// that is the connection's concern.)
    pub untaken: Option<Duration>,
}

enum Live {
    Own(Download),
    Watched {
        watched: Arc<Watched>,
        _watcher: Watcher,
    },
}

/// The task that looks after a body. It ends with this value.
struct Watcher(JoinHandle<()>);

impl Drop for Watcher {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A body that is dropped when the client takes nothing of it: then nobody asks
/// it for more, so it is looked after from outside.
#[derive(Default)]
struct Watched {
    slot: Mutex<Slot>,
}

#[derive(Default)]
struct Slot {
    live: Option<Download>,
    /// When a piece was handed over, while no other has been asked for.
    handed: Option<Instant>,
}

impl Watched {
    fn lock(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(live: Download, limit: Duration) -> Live {
        let slot = Slot {
            live: Some(live),
            // The answer's head has been.
            handed: Some(Instant::now()),
        };
        let watched = Arc::new(Self {
            slot: Mutex::new(slot),
        });
        let weak = Arc::downgrade(&watched);
        let watching = tokio::spawn(async move {
            loop {
                tokio::time::sleep(limit / 4).await;
                let Some(watched) = weak.upgrade() else {
                    return;
                };
                let mut slot = watched.lock();
                if slot.handed.is_some_and(|handed| handed.elapsed() >= limit) {
                    slot.live = None;
                    return;
                }
            }
        });
        Live::Watched {
            watched,
            _watcher: Watcher(watching),
        }
    }
}

impl Live {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let polled = match self {
            Self::Own(live) => Pin::new(live).poll_frame(cx),
            Self::Watched { watched, .. } => {
                let mut slot = watched.lock();
                let Some(live) = &mut slot.live else {
                    return Poll::Ready(Some(Err(Broken::Untaken)));
                };
                let polled = Pin::new(live).poll_frame(cx);
                slot.handed = matches!(polled, Poll::Ready(Some(Ok(_)))).then(Instant::now);
                polled
            }
        };
        polled.map_err(|_| Broken::Upstream)
    }

    fn with<T>(&self, look: impl Fn(&Download) -> T) -> Option<T> {
        match self {
            Self::Own(live) => Some(look(live)),
            Self::Watched { watched, .. } => watched.lock().live.as_ref().map(look),
        }
    }
}

impl Relay {
    pub fn new(live: Download, report: Report, bounds: Bounds) -> Self {
        let left = live.size_hint().exact();
        let over = live.is_end_stream();
        let live = match bounds.untaken {
            Some(limit) if !over => Watched::start(live, limit),
            _ => Live::Own(live),
        };
        let mut relay = Self {
            live,
            report,
            silence: bounds.silence,
            silent_since: None,
            patience: Patience::new(),
            left,
        };
        if over {
            relay.report.ended(End::Whole);
        }
        relay
    }

    fn poll_silence(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let since = *self.silent_since.get_or_insert_with(Instant::now);
        ready!(self.patience.poll(since + self.silence, cx));
        self.report.ended(End::UpstreamSilent);
        Poll::Ready(Some(Err(Broken::Silent)))
    }
}

impl Body for Relay {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let this = self.get_mut();
        match this.live.poll_frame(cx) {
            Poll::Ready(Some(Ok(mut frame))) => {
                this.silent_since = None;
                if let Some(trailers) = frame.trailers_mut() {
                    headers::strip_trailers(trailers);
                    trailers.remove(CODE_HEADER);
                }
                if let Some(data) = frame.data_ref() {
                    this.report.sent(data.len());
                    this.left = this.left.map(|left| left.saturating_sub(data.len() as u64));
                }
                // The server stops asking as soon as it knows that it has all.
                if this.left == Some(0) || frame.is_trailers() || this.is_end_stream() {
                    this.report.ended(End::Whole);
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(None) => {
                this.report.ended(End::Whole);
                Poll::Ready(None)
            }
            Poll::Ready(Some(Err(why))) => {
                if matches!(why, Broken::Upstream) {
                    this.report.ended(End::UpstreamBroke);
                }
                Poll::Ready(Some(Err(why)))
            }
            Poll::Pending => this.poll_silence(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.live.with(Download::is_end_stream).unwrap_or(false)
    }

    fn size_hint(&self) -> SizeHint {
        self.live.with(Download::size_hint).unwrap_or_default()
    }
}

impl Body for Reply {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let this = &mut *self.get_mut().0;
        let polled = match &mut this.body {
            Source::Upstream(relay) => Pin::new(relay).poll_frame(cx),
            Source::Own(body) => Pin::new(body)
                .poll_frame(cx)
                .map_err(|never| match never {}),
        };
        if let Some(turn) = &mut this.turn {
            turn.set(matches!(polled, Poll::Ready(Some(Ok(_)))));
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        match &self.0.body {
            Source::Upstream(relay) => relay.is_end_stream(),
            Source::Own(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0.body {
            Source::Upstream(relay) => relay.size_hint(),
            Source::Own(body) => body.size_hint(),
        }
    }
}
