//! What is counted, for Prometheus. No label holds a key or a token.

use crate::answers::Code;
use crate::report::End;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use std::fmt::{self, Write};
use std::sync::OnceLock;

/// Upper bounds of the time buckets, in seconds.
const WAITS: [f64; 14] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
];
const LOOKUPS: [f64; 10] = [
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1.0,
];

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Answered {
    status: u16,
    /// The forwarder's own code; empty for the upstream's answers.
    code: Word,
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

/// All metrics of the process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: Family<Answered, Counter>,
    /// The one of them that nearly all are: the upstream's answers of status 200.
    usual: OnceLock<Counter>,
    broken: Family<Ended, Counter>,
    pub in_flight: Gauge,
    pub connections: Gauge,
    pub first_byte: Histogram,
    pub acquire: Histogram,
    pub known: Counter,
    pub failovers: Counter,
    pub grace: Counter,
    pub redis_up: Gauge,
    upstream_errors: Family<AccountError, Counter>,
}

impl Metrics {
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("mpool");
        let metrics = Self {
            requests: Family::default(),
            usual: OnceLock::new(),
            broken: Family::default(),
            in_flight: Gauge::default(),
            connections: Gauge::default(),
            first_byte: Histogram::new(WAITS),
            acquire: Histogram::new(LOOKUPS),
            known: Counter::default(),
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
            metrics.first_byte.clone(),
        );
        registry.register_with_unit(
            "acquire",
            "How long asking the pool took",
            Unit::Seconds,
            metrics.acquire.clone(),
        );
        registry.register(
            "leases_known",
            "Requests whose lease Redis had told of no change to, so that it was not asked",
            metrics.known.clone(),
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

    pub fn finished(&self, status: u16, code: Option<Code>, end: End) {
        self.in_flight.dec();
        let name = Word(code.map_or("", Code::name));
        let label = Answered { status, code: name };
        if status == 200 && code.is_none() {
            let usual = || self.requests.get_or_create_owned(&label);
            self.usual.get_or_init(usual).inc();
        } else {
            self.requests.get_or_create(&label).inc();
        }
        if end != End::Whole {
            self.broken
                .get_or_create(&Ended {
                    end: Word(end.name()),
                })
                .inc();
        }
    }

    /// An answer to what never became a request.
    pub fn turned_away(&self, code: Code) {
        let label = Answered {
            status: code.status(),
            code: Word(code.name()),
        };
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
        let mut page = String::new();
        let _ = encode(&mut page, &self.registry);
        page
    }
}
