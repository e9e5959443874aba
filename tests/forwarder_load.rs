//! The bars of the forwarder under load: many open streams at once, accounts that
//! go away, a Redis that is killed and comes back. The full sizes are ignored in a
//! normal run, and print what they measured:
//!
//! ```sh
//! cargo build --release
//! MPOOL_TEST_FORWARDER=target/release/mpool-forwarder \
//!   cargo test --test forwarder_load -- --ignored --nocapture --test-threads 1
//! ```

mod proxy;
mod support;

use proxy::{Answer, Client, Forwarder, Target, Upstream, request};
use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};
use support::{Options, PATIENCE};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};

fn runtime() -> tokio::runtime::Runtime {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build().unwrap()
}

fn unix_ms() -> i64 {
    let elapsed = SystemTime::UNIX_EPOCH.elapsed().unwrap();
    elapsed.as_millis().try_into().unwrap()
}

/// The value below which that part of the sorted values lies.
fn percentile(sorted: &[Duration], part: f64) -> Duration {
    let at = (sorted.len() as f64 * part).ceil() as usize;
    sorted[at.clamp(1, sorted.len()) - 1]
}

// Many streams

/// How many streams, how many events each, and the time between two of a stream.
#[derive(Clone, Copy)]
struct Streams {
    count: usize,
    events: usize,
    period: Duration,
}

/// An upstream whose streams send their events at times spread evenly, each with
/// the stream's number, its own, and the time it is sent.
struct Ticker {
    port: u16,
    opened: watch::Receiver<usize>,
    /// Says when to begin, once all are open.
    begin: watch::Sender<Option<Instant>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Target for Ticker {
    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
}

impl Ticker {
    fn start(streams: Streams, epoch: Instant) -> Self {
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let port = listener.local_addr().unwrap().port();
        let (count, opened) = watch::channel(0);
        let (begin, begun) = watch::channel(None);
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            runtime().block_on(async move {
                let listener = TcpListener::from_std(listener).unwrap();
                let serving = async {
                    let count = Arc::new(count);
                    loop {
                        let (stream, _) = listener.accept().await.unwrap();
                        let (count, begun) = (Arc::clone(&count), begun.clone());
                        tokio::spawn(async move {
                            // A client that goes is told of by the other side.
                            let _ = tick(stream, streams, epoch, &count, begun).await;
                        });
                    }
                };
                tokio::select! {
                    () = serving => {}
                    _ = stopped => {}
                }
            });
        });
        Self {
            port,
            opened,
            begin,
            stop: Some(stop),
            thread: Some(thread),
        }
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn tick(
    mut stream: TcpStream,
    streams: Streams,
    epoch: Instant,
    opened: &watch::Sender<usize>,
    mut begun: watch::Receiver<Option<Instant>>,
) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let head = String::from_utf8(head).unwrap();
    let number = head.split(['/', ' ']).nth(2).unwrap();
    let number: usize = number.parse().unwrap_or_else(|_| panic!("{head}"));
    let answer =
        "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
    stream.write_all(answer.as_bytes()).await?;
    opened.send_modify(|count| *count += 1);
    let begin = loop {
        if let Some(begin) = *begun.borrow_and_update() {
            break begin;
        }
        if begun.changed().await.is_err() {
            return Ok(());
        }
    };
    let first = begin + streams.period.mul_f64(number as f64 / streams.count as f64);
    for event in 0..streams.events {
        tokio::time::sleep_until((first + streams.period * event as u32).into()).await;
        let sent = epoch.elapsed().as_nanos();
        let data = format!(
            "event: tick\ndata: {number} {event} {sent} {}\n\n",
            "x".repeat(64)
        );
        stream.write_all(&proxy::chunked(data)).await?;
    }
    stream.write_all(b"0\r\n\r\n").await
}

/// Takes the chunked coding off what comes, in whatever pieces.
#[derive(Default)]
struct Unchunked {
    came: Vec<u8>,
    /// What is left of a chunk, its line end included.
    left: usize,
    data: Vec<u8>,
    /// The last chunk, which is empty, has begun; and has ended.
    is_last: bool,
    ended: bool,
}

impl Unchunked {
    fn take(&mut self) {
        let mut used = 0;
        loop {
            let rest = &self.came[used..];
            if self.left > 0 {
                let here = self.left.min(rest.len());
                let data = here.min(self.left.saturating_sub(2));
                self.data.extend_from_slice(&rest[..data]);
                self.left -= here;
                used += here;
                self.ended = self.is_last && self.left == 0;
                if self.left > 0 || self.ended {
                    break;
                }
                continue;
            }
            let Some(end) = rest.windows(2).position(|bytes| bytes == b"\r\n") else {
                break;
            };
            let size = std::str::from_utf8(&rest[..end]).unwrap();
            let size = usize::from_str_radix(size, 16).unwrap();
            used += end + 2;
            self.is_last = size == 0;
            self.left = size + 2;
        }
        self.came.drain(..used);
    }

    /// The next whole event.
    fn event(&mut self) -> Option<String> {
        let end = self.data.windows(2).position(|bytes| bytes == b"\n\n")?;
        let event = self.data.drain(..end + 2).collect();
        Some(String::from_utf8(event).unwrap())
    }
}

/// Reads one stream to its end: how long each event was on its way.
async fn listen(
    port: u16,
    key: String,
    number: usize,
    streams: Streams,
    epoch: Instant,
) -> Vec<Duration> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let target = format!("/{number}");
    stream
        .write_all(&request("GET", &target, &key, &[], b""))
        .await
        .unwrap();
    let mut head = Vec::new();
    let end = loop {
        let count = stream.read_buf(&mut head).await.unwrap();
        assert!(count > 0, "stream {number} breaks off in its head");
        if let Some(end) = head.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
            break end;
        }
    };
    assert!(
        head.starts_with(b"HTTP/1.1 200 "),
        "{}",
        String::from_utf8_lossy(&head)
    );
    let mut coded = Unchunked {
        came: head.split_off(end + 4),
        ..Unchunked::default()
    };
    let mut delays = Vec::with_capacity(streams.events);
    loop {
        coded.take();
        let now = epoch.elapsed();
        while let Some(event) = coded.event() {
            let words: Vec<&str> = event.split_whitespace().collect();
            let number_of = |at: usize| words[at].parse::<u64>().unwrap();
            assert_eq!(words[..3], ["event:", "tick", "data:"], "{event}");
            assert_eq!(number_of(3), number as u64, "an event of another stream");
            assert_eq!(number_of(4), delays.len() as u64, "not in order");
            delays.push(now - Duration::from_nanos(number_of(5)));
        }
        if coded.ended {
            assert!(coded.data.is_empty() && coded.came.is_empty());
            return delays;
        }
        let count = stream.read_buf(&mut coded.came).await.unwrap();
        assert!(
            count > 0,
            "stream {number} breaks off after {} events",
            delays.len()
        );
    }
}

/// Opens all streams through that port, and answers how long events took, sorted.
fn follow(
    ticker: &Ticker,
    port: u16,
    keys: &[String],
    streams: Streams,
    epoch: Instant,
) -> Vec<Duration> {
    runtime().block_on(async {
        let mut listeners = Vec::with_capacity(streams.count);
        let mut opened = ticker.opened.clone();
        let before = *opened.borrow();
        for number in 0..streams.count {
            let key = keys[number % keys.len()].clone();
            listeners.push(tokio::spawn(listen(port, key, number, streams, epoch)));
            // Not more at a time than a listener's queue holds.
            if number % 100 == 99 || number + 1 == streams.count {
                let all = opened.wait_for(|count| count - before > number);
                let all = tokio::time::timeout(PATIENCE, all).await;
                if all.is_err() {
                    break;
                }
            }
        }
        let begin = Instant::now() + Duration::from_millis(300);
        ticker.begin.send_replace(Some(begin));
        let mut delays = Vec::with_capacity(streams.count * streams.events);
        for listener in listeners {
            let own = listener.await.unwrap();
            assert_eq!(own.len(), streams.events);
            delays.extend(own);
        }
        ticker.begin.send_replace(None);
        delays.sort_unstable();
        delays
    })
}

fn print_delays(what: &str, delays: &[Duration]) {
    let [half, most, nearly] = [0.5, 0.99, 0.999].map(|part| percentile(delays, part));
    let last = delays.last().unwrap();
    println!(
        "{what}: {} events, p50 {half:?}, p99 {most:?}, p99.9 {nearly:?}, longest {last:?}",
        delays.len()
    );
}

/// Runs the streams; answers how long events took, and the most memory, in bytes.
fn open_streams(streams: Streams) -> (Vec<Duration>, u64) {
    // Two for each stream in this process: the client's end and the upstream's.
    rlimit::increase_nofile_limit(streams.count as u64 * 2 + 500).unwrap();
    let server = Options::default()
        .module(&["slots-per-account", "10"])
        .accounts(&["a", "b", "c", "d"])
        .start();
    let mut redis = server.connect();
    let keys: Vec<String> = (0..20).map(|_| redis.pool_key()).collect();
    let epoch = Instant::now();
    let ticker = Ticker::start(streams, epoch);
    // What the test itself costs.
    let direct = follow(&ticker, ticker.port, &keys, streams, epoch);
    print_delays("without the forwarder", &direct);
    let forwarder = Forwarder::between(&server, &ticker).start();
    let idle = forwarder.memory();
    let began = forwarder.cpu_time();
    let delays = follow(&ticker, forwarder.port, &keys, streams, epoch);
    let memory = forwarder.memory();
    print_delays("through the forwarder", &delays);
    println!(
        "memory: {} KiB idle, {} KiB at most, {:.1} KiB a stream; processor time {:?}",
        idle.now,
        memory.peak,
        (memory.peak - idle.now) as f64 / streams.count as f64,
        forwarder.cpu_time() - began
    );
    support::wait_for("the streams' ends", || {
        (forwarder.metric("mpool_requests_in_flight") == Some(0.0)).then_some(())
    });
    (delays, memory.peak * 1024)
}

#[test]
fn open_streams_get_every_event_in_order() {
    let (delays, memory) = open_streams(Streams {
        count: 200,
        events: 4,
        period: Duration::from_millis(400),
    });
    assert_eq!(delays.len(), 800);
    // The bars are the full size's; this is what no machine is too busy for.
    let late = percentile(&delays, 0.99);
    assert!(late < Duration::from_millis(500), "{late:?}");
    assert!(memory < 60_000_000, "{memory} bytes");
}

#[test]
#[ignore = "the full size"]
fn two_thousand_open_streams() {
    let (delays, memory) = open_streams(Streams {
        count: 2000,
        events: 15,
        period: Duration::from_secs(1),
    });
    assert_eq!(delays.len(), 30_000);
    let late = percentile(&delays, 0.99);
    assert!(late <= Duration::from_millis(5), "p99 {late:?}");
    assert!(memory < 60_000_000, "{memory} bytes");
}

// Requests at a pace

/// What became of a request.
struct Outcome {
    sent: Instant,
    took: Duration,
    key: String,
    answer: Result<Answer, String>,
}

impl Outcome {
    fn status(&self) -> u16 {
        self.answer.as_ref().map_or(0, Answer::status)
    }
}

/// Sends requests at an even pace, on connections that are kept, until `work` is
/// done: what became of each, in the order they were due.
fn paced(
    forwarder: &Forwarder,
    rate: u32,
    key: impl Fn(usize) -> String + Sync,
    work: impl FnOnce(),
) -> Vec<Outcome> {
    let (next, done) = (AtomicUsize::new(0), AtomicBool::new(false));
    let outcomes = Mutex::new(BTreeMap::new());
    let begin = Instant::now();
    let pace = Duration::from_secs(1) / rate;
    // Enough for some to wait out a limit while the others keep the pace.
    let senders = rate as usize / 5 + 8;
    std::thread::scope(|scope| {
        for _ in 0..senders {
            scope.spawn(|| {
                let mut client: Option<Client> = None;
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let due = begin + pace * number as u32;
                    std::thread::sleep(due.saturating_duration_since(Instant::now()));
                    if done.load(Ordering::Relaxed) {
                        return;
                    }
                    let key = key(number);
                    let sent = Instant::now();
                    let mut connection = client.take().unwrap_or_else(|| forwarder.client());
                    let body = format!("body of {number}");
                    let asked =
                        connection.try_send(request("POST", "/", &key, &[], body.as_bytes()));
                    let answer = match asked {
                        Ok(()) => connection
                            .try_answer()
                            .map_err(|broken| format!("{broken:?}")),
                        Err(error) => Err(error.to_string()),
                    };
                    let took = sent.elapsed();
                    if answer.is_ok() {
                        client = Some(connection);
                    }
                    let outcome = Outcome {
                        sent,
                        took,
                        key,
                        answer,
                    };
                    outcomes.lock().unwrap().insert(number, outcome);
                }
            });
        }
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        done.store(true, Ordering::Relaxed);
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    });
    let outcomes = outcomes.into_inner().unwrap();
    outcomes.into_values().collect()
}

/// An upstream that answers with the account's name, and 401 to those refused.
fn judging() -> (Upstream, Arc<Mutex<HashSet<String>>>) {
    let refused: Arc<Mutex<HashSet<String>>> = Arc::default();
    let list = Arc::clone(&refused);
    let upstream = Upstream::start(move |exchange| {
        let token = exchange.token().unwrap();
        let account = token.strip_prefix("token-of-").unwrap().to_owned();
        let is_refused = list.lock().unwrap().contains(&account);
        match is_refused {
            true => exchange.respond(401, &[], b"refused"),
            false => exchange.respond(200, &[], account.as_bytes()),
        }
    });
    (upstream, refused)
}

fn print_outcomes(outcomes: &[Outcome]) {
    let mut by_kind: BTreeMap<(u16, String), usize> = BTreeMap::new();
    for outcome in outcomes {
        let code = outcome
            .answer
            .as_ref()
            .map(|answer| answer.code().unwrap_or_default().to_owned());
        *by_kind
            .entry((outcome.status(), code.unwrap_or_else(String::clone)))
            .or_default() += 1;
    }
    let mut took: Vec<Duration> = outcomes.iter().map(|outcome| outcome.took).collect();
    took.sort_unstable();
    let [half, most] = [0.5, 0.99].map(|part| percentile(&took, part));
    let longest = took.last().unwrap();
    println!("{by_kind:?}, p50 {half:?}, p99 {most:?}, longest {longest:?}");
}

/// Accounts go away under load, each phase that long: no client may see it.
fn accounts_go_away(rate: u32, phase: Duration) {
    let server = Options::default()
        .accounts(&["a", "b", "c", "d", "e", "f"])
        .start();
    let mut redis = server.connect();
    let keys: Vec<String> = (0..6).map(|_| redis.pool_key()).collect();
    for key in &keys {
        redis.acquire(key, unix_ms());
    }
    let (upstream, refused) = judging();
    let mut forwarder = Forwarder::between(&server, &upstream).start();
    let pid = forwarder.pid();
    let holds = |redis: &mut support::Client, key: &str| redis.holds(key).unwrap();
    let mut lost = Vec::new();
    let outcomes = paced(
        &forwarder,
        rate,
        |number| keys[number % keys.len()].clone(),
        || {
            std::thread::sleep(phase);
            // The file goes, its token still good: whoever has it moves on.
            let first = holds(&mut redis, &keys[0]);
            server.remove_account(&format!("medium/{first}"));
            redis.wait_for_account(&first, false);
            std::thread::sleep(phase);
            // The file goes, and the upstream knows it at once.
            let second = holds(&mut redis, &keys[1]);
            refused.lock().unwrap().insert(second.clone());
            server.remove_account(&format!("medium/{second}"));
            std::thread::sleep(phase);
            // The token alone is refused.
            let third = holds(&mut redis, &keys[2]);
            refused.lock().unwrap().insert(third.clone());
            std::thread::sleep(phase);
            lost.extend([first, second, third]);
        },
    );
    print_outcomes(&outcomes);
    let due = (phase * 4).as_secs_f64() * f64::from(rate);
    assert!(
        outcomes.len() as f64 > due * 0.8,
        "{} requests",
        outcomes.len()
    );
    for outcome in &outcomes {
        assert_eq!(outcome.status(), 200, "{:?}", outcome.answer);
    }
    let names: HashSet<&String> = lost.iter().collect();
    assert_eq!(names.len(), 3, "each of them was another account");
    // Everyone is where the pool says, and none is on an account that is gone.
    for key in &keys {
        let last = outcomes
            .iter()
            .rfind(|outcome| outcome.key == *key)
            .unwrap();
        let account = last.answer.as_ref().unwrap().text();
        assert_eq!(account, holds(&mut redis, key));
        assert!(!lost.contains(&account));
    }
    redis.check_invariants(2);
    assert!(forwarder.is_alive() && forwarder.pid() == pid);
    println!(
        "failovers within a request: {:?}",
        forwarder.metric("mpool_failovers_total")
    );
}

#[test]
fn accounts_may_go_away_under_load() {
    accounts_go_away(100, Duration::from_millis(700));
}

#[test]
#[ignore = "the full size"]
fn accounts_may_go_away_under_200_requests_a_second() {
    accounts_go_away(200, Duration::from_secs(5));
}

/// Redis is killed and started again under load, so many times.
fn redis_goes(rate: u32, times: usize, away: Duration, grace: &str) {
    let mut server = Options::default()
        .server(&["--appendonly", "yes", "--appendfsync", "always"])
        .module(&["slots-per-account", "1000"])
        .accounts(&["a", "b", "c", "d"])
        .start();
    let mut redis = server.connect();
    let seen: Vec<String> = (0..20).map(|_| redis.pool_key()).collect();
    let expected = |redis: &mut support::Client| -> BTreeMap<String, String> {
        let held = seen
            .iter()
            .map(|key| (key.clone(), redis.holds(key).unwrap()));
        held.collect()
    };
    for key in &seen {
        redis.acquire(key, unix_ms());
    }
    let before = expected(&mut redis);
    // Each of these is used once.
    let most = (away.as_secs_f64() + 1.5) * 2.0 * times as f64 * f64::from(rate) / 4.0;
    let unseen: Vec<String> = (0..most as usize + 200).map(|_| redis.pool_key()).collect();
    let (upstream, _) = judging();
    let mut forwarder = Forwarder::between(&server, &upstream)
        .args(&["--grace", grace])
        .start();
    let pid = forwarder.pid();
    for key in &seen {
        assert_eq!(forwarder.client().get("/", key).status(), 200);
    }
    let (mut spans, limit) = (Vec::new(), Duration::from_millis(1500));
    let outcomes = paced(
        &forwarder,
        rate,
        |number| match number % 4 {
            0 => unseen[number / 4].clone(),
            _ => seen[number % seen.len()].clone(),
        },
        || {
            for _ in 0..times {
                std::thread::sleep(Duration::from_millis(500));
                let killed = Instant::now();
                server.kill();
                std::thread::sleep(away);
                server.launch();
                spans.push((killed, Instant::now()));
                std::thread::sleep(Duration::from_secs(1));
            }
        },
    );
    print_outcomes(&outcomes);
    let mut redis = server.connect();
    assert_eq!(expected(&mut redis), before);
    let mut refused = 0;
    for outcome in &outcomes {
        assert!(
            outcome.took < limit,
            "{:?}: {:?}",
            outcome.took,
            outcome.answer
        );
        let answer = outcome.answer.as_ref().unwrap();
        match answer.status() {
            200 => {
                // A lease that is no one's any more would be another's slot.
                let account = redis.holds(&outcome.key);
                assert_eq!(Some(answer.text()), account, "the wrong account");
            }
            _ => {
                assert_eq!(
                    (answer.status(), answer.code()),
                    (503, Some("REDIS")),
                    "{answer:?}"
                );
                assert!(answer.header("retry-after").is_some());
                refused += 1;
            }
        }
        let is_away = spans.iter().any(|(killed, back)| {
            let late = Duration::from_secs(1);
            (*killed - limit..*back + late).contains(&outcome.sent)
        });
        assert!(
            is_away || answer.status() == 200,
            "refused while Redis was there"
        );
    }
    assert!(refused > 0, "it was never asked while Redis was away");
    for (killed, back) in spans {
        let after = |outcome: &&Outcome| outcome.sent + outcome.took > back;
        let asked_anew = |outcome: &&Outcome| grace == "0s" || unseen.contains(&outcome.key);
        let good = outcomes.iter().filter(after).filter(asked_anew);
        let good = good.filter(|outcome| outcome.status() == 200);
        let first = good.map(|outcome| outcome.sent + outcome.took).min();
        let first = first.expect("no success") - back;
        println!(
            "away for {:?}, the first success {first:?} after its return",
            back - killed
        );
        assert!(first < Duration::from_secs(1), "{first:?}");
    }
    redis.check_invariants(1000);
    assert!(forwarder.is_alive() && forwarder.pid() == pid);
}

#[test]
fn redis_may_be_killed_under_load() {
    redis_goes(100, 1, Duration::from_millis(600), "60s");
}

#[test]
fn redis_may_be_killed_under_load_without_any_grace() {
    redis_goes(100, 1, Duration::from_millis(600), "0s");
}

#[test]
#[ignore = "the full size"]
fn redis_may_be_killed_again_and_again_under_200_requests_a_second() {
    for grace in ["60s", "0s"] {
        redis_goes(200, 5, Duration::from_secs(3), grace);
    }
}
