//! Bytes as a client sends them, to the forwarder's own connection handling: the
//! real server loop, proxy, lender and upstream connections, between a socket
//! pair and two servers of this target's, a Redis and an upstream. The clock is
//! tokio's paused one, so that waiting takes no time.
//!
//! The input's first byte says how the upstream behaves, the second in what pieces the
//! client sends the rest, whether it ends its part, and whether leases are remembered.
//!
//! Nothing gets in: what the upstream gets is well-formed to the letter, and is request
//! for request what the client sent, with the credential of the key's account, none of
//! its own and nothing else added. Nothing gets out: no answer and no log line has a
//! credential, and each answer belongs to its request. Nothing is left: no request
//! and no connection is still counted when the client has gone.

#![no_main]
#![allow(dead_code, reason = "the program's main and admin door are not here")]
#![allow(clippy::panic, clippy::unwrap_used, clippy::indexing_slicing)]

#[path = "../../../src/bin/mpool-forwarder/accounts.rs"]
mod accounts;
#[path = "../../../src/bin/mpool-forwarder/answers.rs"]
mod answers;
#[path = "../../../src/bin/mpool-forwarder/base.rs"]
mod base;
#[path = "../../../src/bin/mpool-forwarder/client_io.rs"]
mod client_io;
#[path = "../../../src/bin/mpool-forwarder/config/mod.rs"]
mod config;
#[path = "../../../src/bin/mpool-forwarder/gate.rs"]
mod gate;
#[path = "../../../src/bin/mpool-forwarder/headers.rs"]
mod headers;
#[path = "../../../src/bin/mpool-forwarder/known.rs"]
mod known;
#[path = "../../../src/bin/mpool-forwarder/lender.rs"]
mod lender;
#[path = "../../../src/bin/mpool-forwarder/link.rs"]
mod link;
#[path = "../../../src/bin/mpool-forwarder/metrics.rs"]
mod metrics;
#[path = "../../../src/bin/mpool-forwarder/patience.rs"]
mod patience;
#[path = "../../../src/bin/mpool-forwarder/proxy.rs"]
mod proxy;
#[path = "../../../src/bin/mpool-forwarder/relay.rs"]
mod relay;
#[path = "../../../src/bin/mpool-forwarder/report.rs"]
mod report;
#[path = "../../../src/bin/mpool-forwarder/resp.rs"]
mod resp;
#[path = "../../../src/bin/mpool-forwarder/rooms.rs"]
mod rooms;
#[path = "../../../src/bin/mpool-forwarder/server.rs"]
mod server;
#[path = "../../../src/bin/mpool-forwarder/socket_watch.rs"]
mod socket_watch;
#[path = "../../../src/bin/mpool-forwarder/tries.rs"]
mod tries;
#[path = "../../../src/bin/mpool-forwarder/upload.rs"]
mod upload;
#[path = "../../../src/bin/mpool-forwarder/upstream.rs"]
mod upstream;

mod http1;
mod sides;

use config::Config;
use http1::{Manner, Message, Parsed};
use libfuzzer_sys::fuzz_target;
use server::{Place, Shared};
use sides::{Behaviour, Sides};
use std::collections::BTreeSet;
use std::io::Write;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

/// Long past every timeout of the forwarder's.
const LONGEST: Duration = Duration::from_secs(7200);
const TOKEN: &[u8] = b"token-of-";
const KEY: &[u8] = b"client-key";

struct Listeners {
    redis: TcpListener,
    upstream: TcpListener,
}

static LISTENERS: LazyLock<Listeners> = LazyLock::new(|| {
    let bind = || {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    };
    tracing_subscriber::fmt()
        .with_writer(|| Log)
        .with_ansi(false)
        .init();
    Listeners {
        redis: bind(),
        upstream: bind(),
    }
});

/// What the forwarder has logged since the input began.
static LOGGED: Mutex<Vec<u8>> = Mutex::new(Vec::new());

struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LOGGED.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fuzz_target!(|input: &[u8]| {
    let [behaviour, manner, bytes @ ..] = input else {
        return;
    };
    let behaviour = Behaviour::of(*behaviour);
    LazyLock::force(&CONFIG);
    LOGGED.lock().unwrap().clear();
    // The forwarder keeps timers for each thread, which belong to its runtime.
    let (seen, answered) = std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .start_paused(true)
                .build()
                .unwrap();
            runtime
                .block_on(tokio::task::LocalSet::new().run_until(talk(behaviour, *manner, bytes)))
        });
        worker.join().unwrap()
    });
    check(behaviour, bytes, &seen, &answered);
});

/// Reading it is most of what an input would cost.
static CONFIG: LazyLock<Config> = LazyLock::new(|| {
    let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
    let upstream = format!("http://127.0.0.1:{}", port(&LISTENERS.upstream));
    let redis = format!("redis://127.0.0.1:{}", port(&LISTENERS.redis));
    let flags = [
        "mpool-forwarder",
        "--threads",
        "1",
        "--upstream",
        &upstream,
        "--redis",
        &redis,
    ];
    match Config::read(flags.map(Into::into)) {
        Ok(config) => config,
        Err(_) => panic!("the flags are refused"),
    }
});

fn config(lease_cache: Duration) -> Config {
    Config {
        listen: CONFIG.listen,
        admin: None,
        tls: None,
        upstream: CONFIG.upstream.clone(),
        upstream_protocol: CONFIG.upstream_protocol,
        upstream_tls: None,
        redis: CONFIG.redis.clone(),
        threads: CONFIG.threads,
        timeouts: CONFIG.timeouts,
        limits: CONFIG.limits,
        grace: CONFIG.grace,
        lease_cache,
        cooldown: CONFIG.cooldown,
        log: CONFIG.log,
        log_level: CONFIG.log_level,
    }
}

/// One client's connection from its begin to its end. Answers what the upstream
/// got, and what the client did.
async fn talk(behaviour: Behaviour, manner: u8, bytes: &[u8]) -> (Vec<Message>, Vec<u8>) {
    let sides = Sides::start(&LISTENERS.redis, &LISTENERS.upstream, behaviour);
    let lease_cache = if manner & 8 == 0 {
        Duration::ZERO
    } else {
        Duration::from_secs(60)
    };
    let shared = Arc::new(Shared {
        metrics: Arc::new(metrics::Metrics::new(1)),
        seen: Arc::new(lender::Seen::new(Duration::from_secs(60))),
        accounts: Arc::default(),
        began: Instant::now(),
        told: Arc::default(),
        config: config(lease_cache),
    });
    let mut budgets = upload::Budget::shared(shared.config.limits.replay_memory, 1);
    let budget = budgets.pop().expect("a thread's");
    let (connections, waiting) = mpsc::unbounded_channel();
    let working = tokio::task::spawn_local({
        let shared = Arc::clone(&shared);
        let tally = shared.metrics.tallies().next().expect("a thread's");
        async move { server::work(&shared, None, tally, budget, waiting).await }
    });
    let open = Arc::default();
    let (mut client, theirs) = pair();
    let place = Place::take(&open, &shared.metrics);
    assert!(connections.send((theirs, place)).is_ok());

    let size = match manner & 3 {
        0 => usize::MAX,
        1 => 1,
        2 => 7,
        _ => 100,
    };
    let ends = manner & 4 == 0;
    let (mut reading, mut writing) = client.split();
    let write = async {
        // In very many pieces it would take too long.
        let size = size.max(bytes.len() / 200).max(1);
        for piece in bytes.chunks(size) {
            if writing.write_all(piece).await.is_err() {
                return;
            }
            sleep(Duration::from_millis(1)).await;
        }
        if ends {
            let _ = writing.shutdown().await;
        }
    };
    let mut answered = Vec::new();
    let read = async {
        let _ = reading.read_to_end(&mut answered).await;
    };
    let both = async { tokio::join!(write, read) };
    assert!(
        timeout(LONGEST, both).await.is_ok(),
        "the connection has no end"
    );
    drop(client);
    drop(connections);
    assert!(
        timeout(LONGEST, working).await.is_ok(),
        "the thread has no end"
    );
    // What is on its way to the upstream ends with its connection.
    sleep(Duration::from_secs(1)).await;
    let seen = sides.end();
    sleep(Duration::from_secs(1)).await;
    assert_eq!(shared.metrics.in_flight(), 0, "requests are left");
    assert_eq!(shared.metrics.connections.get(), 0, "connections are left");
    (seen, answered)
}

/// The client's end of a connection, and the forwarder's.
fn pair() -> (tokio::net::TcpStream, std::net::TcpStream) {
    let (one, other) = UnixStream::pair().unwrap();
    let [one, other] = [one, other].map(|end| {
        end.set_nonblocking(true).unwrap();
        std::net::TcpStream::from(OwnedFd::from(end))
    });
    (tokio::net::TcpStream::from_std(one).unwrap(), other)
}

fn check(behaviour: Behaviour, bytes: &[u8], seen: &[Message], answered: &[u8]) {
    assert!(!holds(answered, TOKEN), "a credential in an answer");
    assert!(!holds(answered, KEY), "a client key in an answer");
    let log = LOGGED.lock().unwrap();
    assert!(
        !holds(&log, TOKEN) || holds(bytes, TOKEN),
        "a credential in the log"
    );
    for message in seen {
        let credentials =
            message.values("authorization").count() + message.values("x-api-key").count();
        assert_eq!(credentials, 1, "not one credential: {message:?}");
        assert_eq!(
            message.values("proxy-authorization").count(),
            0,
            "{message:?}"
        );
    }
    if bytes.starts_with(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n") {
        for message in seen {
            let known = sides::CREDENTIALS
                .iter()
                .any(|known| has_credential(message, known));
            assert!(known, "not an account's credential: {message:?}");
        }
        return;
    }
    let sent = sent(bytes);
    let mut next = 0_usize;
    for message in seen {
        // A request may be sent anew where the upstream fails.
        let from = if behaviour.is_well() {
            next
        } else {
            next.saturating_sub(1)
        };
        let place = (from..sent.len()).find(|place| is(&sent[*place], message));
        let Some(place) = place else {
            panic!("the upstream got what nobody sent: {message:?}, of {sent:?} from {from}");
        };
        next = place + 1;
    }
    check_answers(behaviour, (bytes, &sent), seen, answered);
}

/// The requests that the client's bytes are.
fn sent(mut bytes: &[u8]) -> Vec<Message> {
    let mut sent = Vec::new();
    loop {
        match http1::request(bytes, Manner::Lenient) {
            Parsed::Whole(message, length) => {
                bytes = &bytes[length..];
                let last = message.last;
                sent.push(message);
                if last {
                    return sent;
                }
            }
            Parsed::Part(head) => {
                sent.extend(head);
                return sent;
            }
            Parsed::Bad(_) => return sent,
        }
    }
}

/// Whether the upstream got the request that the client sent.
fn is(sent: &Message, got: &Message) -> bool {
    let whole = got.whole && sent.whole && got.body == sent.body;
    let part = !got.whole && sent.body.starts_with(&got.body);
    sent.method == got.method
        && target(&sent.target) == got.target
        && (whole || part)
        && headers_of(sent) == headers_of(got)
        && cookies(sent) == cookies(got)
        && key(sent).is_some_and(|key| {
            sides::credentials_of(&key).any(|credential| has_credential(got, credential))
        })
}

fn has_credential(message: &Message, (name, value): &(&str, &[u8])) -> bool {
    message.values(name).eq([*value])
}

/// The target as it goes on: without a host before it or a fragment behind it.
fn target(asked: &[u8]) -> Vec<u8> {
    let end = asked
        .iter()
        .position(|byte| *byte == b'#')
        .unwrap_or(asked.len());
    let asked = &asked[..end];
    let behind = match asked.windows(3).position(|window| window == b"://") {
        Some(at) if !asked.starts_with(b"/") => {
            let rest = &asked[at + 3..];
            let path = rest
                .iter()
                .position(|byte| b"/?".contains(byte))
                .unwrap_or(rest.len());
            &rest[path..]
        }
        _ => asked,
    };
    if behind.is_empty() || behind.starts_with(b"?") {
        [b"/", behind].concat()
    } else {
        behind.to_vec()
    }
}

/// The client's key; none where there is not exactly one.
fn key(message: &Message) -> Option<Vec<u8>> {
    let bearers = message.values("authorization").filter_map(|value| {
        let (scheme, token) = value.split_at_checked(6)?;
        let is_bearer =
            scheme.eq_ignore_ascii_case(b"bearer") && token.first()?.is_ascii_whitespace();
        is_bearer.then(|| token.trim_ascii())
    });
    let keys = message
        .values("x-api-key")
        .chain(bearers)
        .map(<[u8]>::trim_ascii);
    let keys: BTreeSet<&[u8]> = keys.filter(|key| !key.is_empty()).collect();
    (keys.len() == 1).then(|| keys.first().map(|key| key.to_vec()))?
}

/// What must arrive as it was sent, in the order of names.
fn headers_of(message: &Message) -> Vec<(&str, &[u8])> {
    let mut out: BTreeSet<String> = [
        "connection",
        "proxy-connection",
        "keep-alive",
        "te",
        "transfer-encoding",
        "upgrade",
        "host",
        "content-length",
        "cookie",
        "authorization",
        "x-api-key",
        "proxy-authorization",
    ]
    .map(str::to_owned)
    .into();
    for value in message.values("connection") {
        let names = value.split(|byte| *byte == b',').map(http1::trim);
        out.extend(names.map(|name| String::from_utf8_lossy(name).to_ascii_lowercase()));
    }
    let headers = message
        .headers
        .iter()
        .filter(|(name, _)| !out.contains(name));
    let mut headers: Vec<_> = headers
        .map(|(name, value)| (name.as_str(), value.as_slice()))
        .collect();
    headers.sort_by_key(|(name, _)| *name);
    headers
}

fn cookies(message: &Message) -> Option<Vec<u8>> {
    let named = message.values("connection").any(|value| {
        value
            .split(|byte| *byte == b',')
            .any(|name| http1::trim(name).eq_ignore_ascii_case(b"cookie"))
    });
    let values: Vec<&[u8]> = message.values("cookie").collect();
    (!named && !values.is_empty()).then(|| http1::trim(&values.join(&b"; "[..])).to_vec())
}

/// The answers are whole, in the order of the requests, and each one's own.
fn check_answers(
    behaviour: Behaviour,
    (bytes, sent): (&[u8], &[Message]),
    seen: &[Message],
    mut answered: &[u8],
) {
    let mut place = 0;
    while !answered.is_empty() {
        let is_refusal = |method| match http1::response(answered, method, true) {
            Parsed::Whole(answer, length) => {
                length == answered.len() && answer.values("x-mpool-error").eq([&b"BAD_REQUEST"[..]])
            }
            _ => false,
        };
        // What was no HTTP is refused without a look at its method, unless that
        // shows only in the body.
        let method = match sent.get(place) {
            _ if is_refusal(b"GET") => b"GET",
            Some(sent) => &sent.method[..],
            None if holds(bytes, b"HEAD ") && is_refusal(b"HEAD") => b"HEAD",
            None => b"GET",
        };
        let (answer, length) = match http1::response(answered, method, true) {
            Parsed::Whole(answer, length) => (answer, length),
            Parsed::Part(_) => {
                assert!(
                    !behaviour.is_well(),
                    "half an answer: {:?}",
                    String::from_utf8_lossy(answered)
                );
                return;
            }
            Parsed::Bad(why) => panic!("{why}: {:?}", String::from_utf8_lossy(answered)),
        };
        answered = &answered[length..];
        if answer.status < 200 {
            assert_eq!(answer.status, 100, "{answer:?}");
            continue;
        }
        // A request is answered before one that is none is refused.
        assert!(place <= sent.len(), "an answer to nothing: {answer:?}");
        let own = answer.values("x-mpool-error").next().is_some();
        match answer.values("x-seen").next() {
            Some(number) => {
                assert!(
                    !own,
                    "the upstream's answer, as the forwarder's own: {answer:?}"
                );
                let number: usize = std::str::from_utf8(number).unwrap().parse().unwrap();
                let got = &seen[number];
                let asked = sent
                    .get(place)
                    .unwrap_or_else(|| panic!("nobody asked for {answer:?}"));
                assert!(is(asked, got), "another one's answer: {asked:?} {got:?}");
                for name in ["keep-alive", "x-hop", "proxy-connection", "upgrade"] {
                    assert_eq!(answer.values(name).count(), 0, "{answer:?}");
                }
            }
            None => {
                assert!(own, "nobody's answer: {answer:?}");
                assert!(answer.status >= 400, "{answer:?}");
                if method != b"HEAD" {
                    serde_json::from_slice::<serde_json::Value>(&answer.body).expect("JSON");
                }
            }
        }
        place += 1;
    }
}

fn holds(text: &[u8], part: &[u8]) -> bool {
    memchr::memmem::find(text, part).is_some()
}
