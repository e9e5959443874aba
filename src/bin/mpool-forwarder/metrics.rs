//! What is counted, for Prometheus. No label holds a key or a token.
//!
//! What is counted at each request, each thread counts for itself ([`Tally`]), and it is added up
//! when somebody asks ([`Sum`]): memory that two processors write by turns has to travel between
//! them each time.

use crate::answers::Code;
use crate::report::End;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{
    EncodeLabelSet, EncodeLabelValue, EncodeMetric, LabelValueEncoder, MetricEncoder, NoLabelSet,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use std::fmt::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds of the time buckets, in seconds.
const WAITS: [f64; 14] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
];
const LOOKUPS: [f64; 10] = [
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1.0,
];
/// The number of buckets, what is beyond the last bound included, at most.
const BUCKETS: usize = WAITS.len() + 1;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Answered {
    status: u16,
    /// The forwarder's own code; empty for the upstream's answers.
    code: Word,
}

impl Answered {
    fn of(status: u16, code: Option<Code>) -> Self {
        let code = Word(code.map_or("", Code::name));
        Self { status, code }
    }
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Ended {
    end: Word,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct AccountError {
    account: String,
    error: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
struct Word(&'static str);

impl EncodeLabelValue for Word {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
        encoder.write_str(self.0)
    }
}

/// Durations by their bounds. The library's histogram takes a lock at each.
#[derive(Debug)]
struct Times {
    /// In seconds, each one included.
    bounds: &'static [f64],
    counts: [AtomicU64; BUCKETS],
    /// The bits of an f64, in seconds.
    sum: AtomicU64,
}

impl Times {
    fn new(bounds: &'static [f64]) -> Self {
        Self {
            bounds,
            counts: Default::default(),
            sum: AtomicU64::new(0),
        }
    }

    fn observe(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        let place = self.bounds.iter().position(|bound| seconds <= *bound);
        if let Some(count) = self.counts.get(place.unwrap_or(self.bounds.len())) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        let add = |sum| Some((f64::from_bits(sum) + seconds).to_bits());
        let _ = self
            .sum
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
    }
}

/// What one thread has counted, in memory that no other thread's count is in: processors
/// pass it on by 64 bytes, or by twice as many.
#[derive(Debug)]
#[repr(align(128))]
struct Share {
    in_flight: AtomicI64,
    known: AtomicU64,
    /// Of the requests, the upstream's answers of status 200, which nearly all are.
    usual: AtomicU64,
    first_byte: Times,
    acquire: Times,
}

impl Share {
    fn new() -> Self {
        Self {
            in_flight: AtomicI64::new(0),
            known: AtomicU64::new(0),
            usual: AtomicU64::new(0),
            first_byte: Times::new(&WAITS),
            acquire: Times::new(&LOOKUPS),
        }
    }
}

type Shares = Arc<[Arc<Share>]>;

/// One figure of all threads.
#[derive(Debug)]
struct Sum<T: 'static> {
    shares: Shares,
    part: fn(&Share) -> &T,
}

impl<T> Clone for Sum<T> {
    fn clone(&self) -> Self {
        Self::new(&self.shares, self.part)
    }
}

impl<T> Sum<T> {
    fn new(shares: &Shares, part: fn(&Share) -> &T) -> Self {
        Self {
            shares: Arc::clone(shares),
            part,
        }
    }

    fn parts(&self) -> impl Iterator<Item = &T> {
        self.shares.iter().map(|share| (self.part)(share))
    }
}

impl Sum<AtomicU64> {
    fn get(&self) -> u64 {
        self.parts().map(|part| part.load(Ordering::Relaxed)).sum()
    }
}

impl Sum<AtomicI64> {
    fn get(&self) -> i64 {
        self.parts().map(|part| part.load(Ordering::Relaxed)).sum()
    }
}

impl EncodeMetric for Sum<AtomicU64> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        encoder.encode_counter::<NoLabelSet, _, u64>(&self.get(), None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Counter
    }
}

impl EncodeMetric for Sum<AtomicI64> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        encoder.encode_gauge(&self.get())
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Gauge
    }
}

impl EncodeMetric for Sum<Times> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let bounds = self.parts().next().map_or(&[][..], |part| part.bounds);
        let bounds = bounds.iter().copied().chain([f64::INFINITY]);
        let buckets = bounds.enumerate().map(|(place, bound)| {
            let counts = self.parts().filter_map(|part| part.counts.get(place));
            (
                bound,
                counts.map(|count| count.load(Ordering::Relaxed)).sum(),
            )
        });
        let buckets: Vec<(f64, u64)> = buckets.collect();
        let count = buckets.iter().map(|(_, count)| count).sum();
        let sums = self.parts().map(|part| part.sum.load(Ordering::Relaxed));
        let sum = sums.map(f64::from_bits).sum();
        encoder.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

/// What a thread counts in.
#[derive(Debug)]
pub struct Tally {
    share: Arc<Share>,
    pub all: Arc<Metrics>,
}

impl Tally {
    /// A request has come.
    pub fn begun(&self) {
        self.share.in_flight.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether more requests than that are under way. Nobody adds them up as long as no
    /// client has come over HTTP/2: before, there are no more than connections.
    pub fn is_crowded(&self, most: usize, over_http2: bool) -> bool {
        let multiplexed = &self.all.multiplexed;
        if !multiplexed.load(Ordering::Relaxed) {
            if !over_http2 {
                return false;
            }
            multiplexed.store(true, Ordering::Relaxed);
        }
        usize::try_from(self.all.in_flight()).is_ok_and(|count| count > most)
    }

    /// The lease was known.
    pub fn known(&self) {
        self.share.known.fetch_add(1, Ordering::Relaxed);
    }

    /// From a request's head to the head of the upstream's answer.
    pub fn first_byte(&self, time: Duration) {
        self.share.first_byte.observe(time);
    }

    /// How long asking the pool took.
    pub fn acquire(&self, time: Duration) {
        self.share.acquire.observe(time);
    }

    /// A request has ended.
    pub fn finished(&self, status: u16, code: Option<Code>, end: End) {
        self.share.in_flight.fetch_sub(1, Ordering::Relaxed);
        if (status, code) == USUAL {
            self.share.usual.fetch_add(1, Ordering::Relaxed);
        } else {
            let label = Answered::of(status, code);
            self.all.requests.get_or_create(&label).inc();
        }
        if end != End::Whole {
            let label = Ended {
                end: Word(end.name()),
            };
            self.all.broken.get_or_create(&label).inc();
        }
    }
}

const USUAL: (u16, Option<Code>) = (200, None);

/// All metrics of the process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Without those that [`Share::usual`] counts until the page is made.
    requests: Family<Answered, Counter>,
    usual: Sum<AtomicU64>,
    broken: Family<Ended, Counter>,
    in_flight: Sum<AtomicI64>,
    /// A client has come over HTTP/2.
    multiplexed: AtomicBool,
    pub connections: Gauge,
    pub failovers: Counter,
    pub grace: Counter,
    pub redis_up: Gauge,
    upstream_errors: Family<AccountError, Counter>,
}

impl Metrics {
    /// For so many threads.
    pub fn new(threads: usize) -> Self {
        let shares = (0..threads).map(|_| Arc::new(Share::new()));
        let shares: Shares = shares.collect();
        let mut registry = Registry::with_prefix("mpool");
        let metrics = Self {
            requests: Family::default(),
            usual: Sum::new(&shares, |share| &share.usual),
            broken: Family::default(),
            in_flight: Sum::new(&shares, |share| &share.in_flight),
            multiplexed: AtomicBool::new(false),
            connections: Gauge::default(),
            failovers: Counter::default(),
            grace: Counter::default(),
            redis_up: Gauge::default(),
            upstream_errors: Family::default(),
            registry: Registry::default(),
        };
        registry.register(
            "requests",
            "Requests by status, and code where the answer was the forwarder's own",
            metrics.requests.clone(),
        );
        registry.register(
            "requests_broken",
            "Requests that did not end whole, by how they ended",
            metrics.broken.clone(),
        );
        registry.register(
            "requests_in_flight",
            "Requests under way",
            metrics.in_flight.clone(),
        );
        registry.register(
            "connections",
            "Connections of clients",
            metrics.connections.clone(),
        );
        registry.register_with_unit(
            "time_to_first_byte",
            "From a request's head to the head of the upstream's answer",
            Unit::Seconds,
            Sum::<Times>::new(&shares, |share| &share.first_byte),
        );
        registry.register_with_unit(
            "acquire",
            "How long asking the pool took",
            Unit::Seconds,
            Sum::<Times>::new(&shares, |share| &share.acquire),
        );
        registry.register(
            "leases_known",
            "Requests whose lease Redis had told of no change to, so that it was not asked",
            Sum::<AtomicU64>::new(&shares, |share| &share.known),
        );
        registry.register(
            "failovers",
            "Requests sent once more on another account",
            metrics.failovers.clone(),
        );
        registry.register(
            "grace",
            "Requests served on a lease seen before, as Redis could not be asked",
            metrics.grace.clone(),
        );
        registry.register(
            "redis_connections_up",
            "Connections to Redis that stand, one for each thread",
            metrics.redis_up.clone(),
        );
        registry.register(
            "upstream_errors",
            "Answers and failures of the upstream that speak against an account",
            metrics.upstream_errors.clone(),
        );
        Self {
            registry,
            ..metrics
        }
    }

    /// One for each thread.
    pub fn tallies(self: &Arc<Self>) -> impl Iterator<Item = Tally> {
        self.in_flight.shares.iter().map(|share| Tally {
            share: Arc::clone(share),
            all: Arc::clone(self),
        })
    }

    /// Requests under way.
    pub fn in_flight(&self) -> i64 {
        self.in_flight.get()
    }

    /// An answer to what never became a request.
    pub fn turned_away(&self, code: Code) {
        let label = Answered::of(code.status(), Some(code));
        self.requests.get_or_create(&label).inc();
    }

    pub fn upstream_error(&self, account: &str, error: &str) {
        let label = AccountError {
            account: account.into(),
            error: error.into(),
        };
        self.upstream_errors.get_or_create(&label).inc();
    }

    /// The whole page.
    pub fn page(&self) -> String {
        let usual = self.usual.get();
        if usual > 0 {
            let label = Answered::of(USUAL.0, USUAL.1);
            let counter = self.requests.get_or_create(&label);
            counter.inner().fetch_max(usual, Ordering::Relaxed);
        }
        let mut page = String::new();
        let _ = encode(&mut page, &self.registry);
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_threads_count_is_added_up() {
        let metrics = Arc::new(Metrics::new(2));
        let tallies: Vec<_> = metrics.tallies().collect();
        assert!(!metrics.page().contains("mpool_requests_total{"));
        let times = [5, 6, 400_000].map(Duration::from_millis);
        for (tally, time) in tallies.iter().cycle().zip(times) {
            tally.begun();
            tally.begun();
            tally.known();
            tally.first_byte(time);
            tally.acquire(time);
            tally.finished(200, None, End::Whole);
        }
        tallies[0].finished(502, Some(Code::Upstream), End::ClientGone);
        let page = metrics.page();
        for line in [
            "mpool_requests_total{status=\"200\",code=\"\"} 3",
            "mpool_requests_total{status=\"502\",code=\"UPSTREAM\"} 1",
            "mpool_requests_broken_total{end=\"client-gone\"} 1",
            "# TYPE mpool_requests_in_flight gauge",
            "mpool_requests_in_flight 2",
            "# TYPE mpool_leases_known counter",
            "mpool_leases_known_total 3",
            "# TYPE mpool_time_to_first_byte_seconds histogram",
            "mpool_time_to_first_byte_seconds_count 3",
            "mpool_time_to_first_byte_seconds_bucket{le=\"0.005\"} 1",
            "mpool_time_to_first_byte_seconds_bucket{le=\"0.01\"} 2",
            "mpool_time_to_first_byte_seconds_bucket{le=\"300.0\"} 2",
            "mpool_time_to_first_byte_seconds_bucket{le=\"+Inf\"} 3",
            "mpool_acquire_seconds_bucket{le=\"1.0\"} 2",
            "mpool_acquire_seconds_bucket{le=\"+Inf\"} 3",
        ] {
            assert!(page.lines().any(|own| own == line), "{line}\n{page}");
        }
        let sum = "mpool_time_to_first_byte_seconds_sum ";
        let sum = page.lines().find_map(|line| line.strip_prefix(sum));
        let sum: f64 = sum.unwrap().parse().unwrap();
        assert!((sum - 400.011).abs() < 1e-9, "{sum}");
    }

    #[test]
    fn once_clients_multiplex_a_crowd_is_of_all_threads() {
        let metrics = Arc::new(Metrics::new(2));
        let tallies: Vec<_> = metrics.tallies().collect();
        let crowded = |over_http2| tallies[0].is_crowded(3, over_http2);
        (0..2).for_each(|_| tallies.iter().for_each(Tally::begun));
        assert!(!crowded(false), "each has a connection of its own");
        assert!(crowded(true));
        assert!(crowded(false));
        tallies[1].finished(200, None, End::Whole);
        assert!(!crowded(true));
    }
}
