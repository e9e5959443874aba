//! mpool-forwarder beside nginx `proxy_pass`, HAProxy and LiteLLM's proxy: the
//! same upstream, the same requests, the same load, one run. The forwarder looks
//! leases up in a Redis of its own; how often it did is counted there.
//!
//! A request is a chat completion's, answered at once or as an event stream. The
//! load is wrk's; while it streams, one client more takes the time to the first
//! event. A round measures each proxy (and the upstream with none) one after the
//! other, the next round in another order. Figures are medians over the rounds,
//! with the least and the most beside them; ratios and differences are taken
//! within a round. CPU time is that of the proxy's processes, with Redis's beside
//! it. All share the machine, so throughput is what its cores give to everyone
//! together.
//!
//! LiteLLM knows the client by its master key instead of a virtual key, and looks
//! none up: its database client fetches a program from elsewhere than PyPI when it
//! is installed.
//!
//! Run it with `make bench`. In the environment:
//! - `MPOOL_BENCH_SECONDS`: how long one measurement takes (2); LiteLLM's twice that and more
//! - `MPOOL_BENCH_ROUNDS`: 5
//! - `MPOOL_BENCH_THREADS`: threads of each proxy: `1` and the number of processors, with `,` between them.
//!   With several, one connection is left out; LiteLLM is measured with the first of these numbers alone.
//! - `MPOOL_BENCH_CONNECTIONS`: `1,64,512`
//! - `MPOOL_BENCH_PACE`: ms between two events of a stream (0: one after the other)
//! - `MPOOL_BENCH_ONLY`: some of straight, nginx, HAProxy, forwarder, LiteLLM, …
//!   with `,` between them
//! - `MPOOL_BENCH_FORWARDER`: more binaries to measure, such as `optimized=PATH`, with `:` between them

#[path = "../common/mod.rs"]
mod common;
mod proxies;
mod upstream;

use common::page::{Bar, Page, output};
use common::support::{Client, Options, Server, wait_for};
use common::{median, pairs, progress, setting, spread};
use proxies::Proxy;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Prints what wrk found in a form that needs no guessing.
const REPORT: &str = r#"
done = function(summary, latency)
  local errors = summary.errors
  local bad = errors.connect + errors.read + errors.write + errors.timeout + errors.status
  if bad > 0 then
    io.stderr:write(string.format("wrk: failures: connect %d, read %d, write %d, timeout %d, status %d\n",
      errors.connect, errors.read, errors.write, errors.timeout, errors.status))
  end
  io.write(string.format("mpool-bench %d %d %d %d %d\n",
    summary.requests, summary.duration, bad, latency:percentile(50), latency:percentile(99)))
end
"#;

/// What is measured.
const COLUMNS: [&str; 7] = [
    "requests/s",
    "p50 us",
    "p99 us",
    "first event p50 us",
    "p99 us",
    "CPU us/request",
    "Redis's",
];
const RATE: usize = 0;
const P99: usize = 2;
/// Where the first event's figures begin.
const FIRST: usize = 3;
const CPU: usize = 5;
/// Times that a proxy adds something to.
const ADDED: std::ops::Range<usize> = 1..CPU;

const RATE_BAR: Bar = Bar::AtLeast(0.9);
const ADDED_P99_BAR: Bar = Bar::AtMost(1.5);
const CPU_BAR: Bar = Bar::AtMost(1.3);
const LITELLM_BAR: Bar = Bar::AtLeast(20.0);

/// How long LiteLLM may work on when its clients have gone.
const DRAIN: Duration = Duration::from_secs(60);

const STRAIGHT: &str = "straight";
const NGINX: &str = "nginx";
const LITELLM: &str = "LiteLLM";

/// The figures of one measurement, in the order of [`COLUMNS`].
type Figures = [f64; COLUMNS.len()];

#[derive(Clone, Copy)]
enum Kind {
    Short,
    Stream,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Short => "short answers",
            Self::Stream => "event streams",
        }
    }

    fn body(self) -> &'static str {
        match self {
            Self::Short => upstream::SHORT,
            Self::Stream => upstream::STREAM,
        }
    }
}

/// Something that wrk can ask.
struct Target {
    name: String,
    port: u16,
    /// The processes whose CPU time and memory count.
    pids: Vec<u32>,
    /// It is held to the bars.
    is_ours: bool,
    /// Its requests, those that failed, and the look-ups that they led to.
    requests: u64,
    failed: u64,
    lookups: u64,
    samples: Vec<Figures>,
}

impl Target {
    fn new(name: &str, port: u16, pids: Vec<u32>) -> Self {
        Self {
            name: name.to_owned(),
            port,
            pids,
            is_ours: false,
            requests: 0,
            failed: 0,
            lookups: 0,
            samples: Vec::new(),
        }
    }

    fn column(&self, number: usize) -> Vec<f64> {
        let samples = self.samples.iter();
        samples.map(|figures| figures[number]).collect()
    }
}

/// All that is needed to put load on something and see what it costs.
struct Bench {
    /// Of each proxy.
    threads: usize,
    seconds: u32,
    key: String,
    folder: TempDir,
    redis: u32,
    client: Client,
    targets: Vec<Target>,
}

fn main() {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let mut threads: Vec<usize> = list("THREADS", format!("1,{processors}"));
    threads.dedup();
    let connections: Vec<u32> = list("CONNECTIONS", "1,64,512".to_owned());

    let names: Vec<String> = (0..10).map(|n| format!("account-{n}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let redis: Server = Options::default().accounts(&names).start();
    let key = redis.connect().pool_key();
    let pace: u64 = setting("PACE", 0);
    let upstream = upstream::start(Duration::from_millis(pace));

    let only: String = setting("ONLY", String::new());
    let mut page = Page::new("Forwarder", &versions());
    let seconds: u32 = setting("SECONDS", 2);
    let rounds: usize = setting("ROUNDS", 5);
    page.table(format!(
        "streams of {} events, {pace} ms between two; medians of {rounds} rounds of {seconds} s (least-most)",
        upstream::EVENTS,
    ));
    page.line("the forwarder's throughput and CPU time per request as parts of nginx's, its added p99 as part of nginx's added p99, its throughput as multiple of LiteLLM's");
    for (pass, &threads) in threads.iter().enumerate() {
        let is_wanted = |name: &str| {
            (only.is_empty() || only.split(',').any(|word| word == name))
                && (pass == 0 || name != LITELLM)
        };
        let proxies = start(&key, threads, &redis, upstream, is_wanted);
        let mut targets: Vec<Target> = proxies
            .iter()
            .map(|(proxy, is_ours)| Target {
                is_ours: *is_ours,
                ..Target::new(&proxy.name, proxy.port, proxy.pids())
            })
            .collect();
        if is_wanted(STRAIGHT) {
            targets.insert(0, Target::new(STRAIGHT, upstream, vec![]));
        }
        assert!(
            !targets.is_empty() || pass > 0,
            "MPOOL_BENCH_ONLY names nothing that is measured"
        );
        if targets.is_empty() {
            break;
        }
        if is_wanted(LITELLM) {
            page.line(match proxies::venv() {
                Some(_) => "LiteLLM with its master key instead of virtual keys: it looks none up in a database",
                None => "LiteLLM is not measured: scripts/install-deps could not install it",
            });
        }
        let mut bench = Bench {
            threads,
            seconds,
            key: key.clone(),
            folder: tempfile::tempdir().unwrap(),
            redis: redis.pid(),
            client: redis.connect(),
            targets,
        };
        for kind in [Kind::Short, Kind::Stream] {
            for &count in connections
                .iter()
                .filter(|count| **count > 1 || threads == 1)
            {
                progress(&format!("forwarder: {}", bench.load(kind, count)));
                bench.rounds(kind, count, rounds);
                bench.print_table(&mut page, kind, count);
            }
        }
        bench.print_memory(&mut page);
    }
    page.save();
}

/// Numbers with `,` between them.
fn list<T: std::str::FromStr>(name: &str, otherwise: String) -> Vec<T> {
    let text: String = setting(name, otherwise);
    let numbers = text.split(',').map(|number| number.parse().ok());
    let numbers: Option<Vec<T>> = numbers.collect();
    numbers.unwrap_or_else(|| panic!("MPOOL_BENCH_{name} is wrong: numbers with , between them"))
}

/// What is to be measured, and whether it is ours.
fn start(
    key: &str,
    threads: usize,
    redis: &Server,
    upstream: u16,
    is_wanted: impl Fn(&str) -> bool,
) -> Vec<(Proxy, bool)> {
    let mut proxies = Vec::new();
    if is_wanted(NGINX) {
        proxies.push((Proxy::nginx(threads, upstream), false));
    }
    if is_wanted("HAProxy") {
        proxies.push((Proxy::haproxy(threads, upstream), false));
    }
    if is_wanted(LITELLM) {
        proxies.extend(Proxy::litellm(threads, upstream, key).map(|proxy| (proxy, false)));
    }
    let own = ("forwarder", env!("CARGO_BIN_EXE_mpool-forwarder"));
    let more: String = setting("FORWARDER", String::new());
    let more = more.split(':').filter(|word| !word.is_empty()).map(|word| {
        let named = word.split_once('=');
        named.expect("MPOOL_BENCH_FORWARDER is wrong: NAME=PATH:NAME=PATH")
    });
    for (name, binary) in std::iter::once(own).chain(more) {
        let binary = Path::new(binary);
        let asking = format!("{name}+asking");
        // The first remembers leases, the second asks Redis for each request.
        for (name, more) in [
            (name, &[][..]),
            (asking.as_str(), &["--lease-cache", "0s"][..]),
        ] {
            if is_wanted(name) {
                let place = (redis, upstream);
                let proxy = Proxy::forwarder(name, binary, threads, place, more);
                proxies.push((proxy, true));
            }
        }
    }
    proxies
}

fn versions() -> Vec<String> {
    let mut versions = vec![
        version("nginx", &output(proxies::nginx_binary(), &["-v"])),
        version("HAProxy", &output(proxies::haproxy_binary(), &["-v"])),
        version("wrk", &output("wrk", &["-v"])),
    ];
    if let Some(venv) = proxies::venv() {
        let code = "import importlib.metadata as m; print('LiteLLM', m.version('litellm'))";
        versions.push(output(venv.join("bin/python"), &["-c", code]));
    }
    versions
}

impl Bench {
    /// What is measured.
    fn load(&self, kind: Kind, connections: u32) -> String {
        let threads = match self.threads {
            1 => String::new(),
            more => format!(", {more} threads each"),
        };
        format!("{}, {connections} connections{threads}", kind.name())
    }

    /// Fills each target's samples, an entry a round.
    fn rounds(&mut self, kind: Kind, connections: u32, rounds: usize) {
        let count = self.targets.len();
        for place in 0..count {
            self.targets[place].samples.clear();
            let (name, port) = (&self.targets[place].name, self.targets[place].port);
            wait_for(&format!("the upstream's answer from {name}"), || {
                let answer = ask(port, &self.key, kind).ok()?;
                let is_right =
                    answer.starts_with("HTTP/1.1 200 ") && answer.contains(upstream::TEXT);
                is_right.then_some(())
            });
            // The connections to the upstream are made now.
            let seconds = self.seconds_for(&self.targets[place], kind, connections);
            self.wrk(kind, port, connections, seconds.div_ceil(2));
            self.drain(place);
        }
        for round in 0..rounds {
            // Backwards every other round, and beginning with another one.
            for turn in 0..count {
                let forth = (turn + round) % count;
                let place = if round % 2 == 0 {
                    forth
                } else {
                    count - 1 - forth
                };
                self.measure(place, kind, connections);
            }
        }
    }

    /// LiteLLM takes seconds for an answer where there are many clients.
    fn seconds_for(&self, target: &Target, kind: Kind, connections: u32) -> u32 {
        let more = match kind {
            Kind::Short => connections / 50,
            Kind::Stream => connections / 25,
        };
        match &*target.name {
            LITELLM => 2 * self.seconds + more,
            _ => self.seconds,
        }
    }

    /// LiteLLM goes on working for clients that have gone: the next one's turn
    /// comes when it has become quiet.
    fn drain(&self, place: usize) {
        let target = &self.targets[place];
        let cpu = || -> f64 { target.pids.iter().map(|&pid| cpu_time(pid)).sum() };
        let start = Instant::now();
        while target.name == LITELLM && start.elapsed() < DRAIN {
            let before = cpu();
            std::thread::sleep(Duration::from_millis(300));
            if cpu() - before < 30_000.0 {
                break;
            }
        }
    }

    fn measure(&mut self, place: usize, kind: Kind, connections: u32) {
        let target = &self.targets[place];
        let (port, pids) = (target.port, target.pids.clone());
        let seconds = self.seconds_for(target, kind, connections);
        let lookups = self.lookups();
        let redis = cpu_time(self.redis);
        let cpu: f64 = pids.iter().map(|&pid| cpu_time(pid)).sum();
        let streamer = match kind {
            Kind::Short => None,
            Kind::Stream => Some(Streamer::start(port, &self.key)),
        };
        let [requests, micros, failed, p50, p99] = match (&streamer, connections) {
            // The client that takes the time is the only one.
            (Some(_), 1) => {
                std::thread::sleep(Duration::from_secs(seconds.into()));
                [0.0; 5]
            }
            (Some(_), more) => self.wrk(kind, port, more - 1, seconds),
            (None, all) => self.wrk(kind, port, all, seconds),
        };
        let streams = streamer.map(Streamer::stop).unwrap_or_default();
        let bad = failed + f64::from(streams.broken);
        let cpu = pids.iter().map(|&pid| cpu_time(pid)).sum::<f64>() - cpu;
        let redis = cpu_time(self.redis) - redis;
        self.drain(place);
        let all = requests + streams.whole.len() as f64;
        let target = &mut self.targets[place];
        target.requests += all as u64;
        target.failed += bad as u64;
        let name = &target.name;
        // Figures with failures in them compare different things.
        assert!(
            bad == 0.0 || name == LITELLM,
            "{bad} of {requests} requests to {name} failed, {} of them streams that broke off",
            streams.broken
        );
        let [first, last] = [0.5, 0.99].map(|part| percentile(&streams.first, part));
        let (rate, p50, p99) = match (kind, connections) {
            (Kind::Stream, 1) => (
                all * 1e6 / streams.whole.iter().sum::<f64>(),
                percentile(&streams.whole, 0.5),
                percentile(&streams.whole, 0.99),
            ),
            // Of no answers there are no times.
            _ if requests == 0.0 => (0.0, f64::NAN, f64::NAN),
            _ => (requests * 1e6 / micros, p50, p99),
        };
        let all = if rate > 0.0 { all } else { f64::NAN };
        target
            .samples
            .push([rate, p50, p99, first, last, cpu / all, redis / all]);
        let lookups = self.lookups() - lookups;
        self.targets[place].lookups += lookups;
    }

    /// Requests, microseconds that they took, failures, p50 and p99 (µs).
    fn wrk(&self, kind: Kind, port: u16, connections: u32, seconds: u32) -> [f64; 5] {
        let script = self.folder.path().join("wrk.lua");
        let request = format!(
            "wrk.method = 'POST'\nwrk.body = '{}'\nwrk.headers['Content-Type'] = 'application/json'\n",
            kind.body()
        );
        fs::write(&script, request + REPORT).unwrap();
        let output = Command::new("wrk")
            .args(["-t", "1", "-c", &connections.to_string()])
            .args(["-d", &format!("{seconds}s"), "--timeout", "60s", "-s"])
            .arg(&script)
            .args(["-H", &format!("Authorization: Bearer {}", self.key)])
            .arg(format!("http://127.0.0.1:{port}/v1/chat/completions"))
            .stderr(Stdio::inherit())
            .output()
            .expect("wrk is not installed");
        let text = String::from_utf8_lossy(&output.stdout);
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("mpool-bench "));
        let numbers: Vec<f64> = line
            .map(|line| {
                line.split(' ')
                    .map(|number| number.parse().unwrap())
                    .collect()
            })
            .unwrap_or_default();
        <[f64; 5]>::try_from(numbers).unwrap_or_else(|_| {
            // It has said why itself.
            panic!("wrk failed: {text}")
        })
    }

    /// How often Redis was asked for a lease.
    fn lookups(&mut self) -> u64 {
        self.client.calls("mpool.acquire")
    }

    fn target(&self, name: &str) -> Option<&Target> {
        self.targets.iter().find(|target| target.name == name)
    }

    fn print_table(&self, page: &mut Page, kind: Kind, connections: u32) {
        page.table("");
        let mut line = format!("{:<18}", format!("{connections} connections"));
        for title in COLUMNS {
            line += &format!("{title:>22}");
        }
        let load = self.load(kind, connections);
        page.table(format!(
            "{load}; all but the first line's times as added to it"
        ));
        page.table(line);
        let straight = self.target(STRAIGHT);
        for target in &self.targets {
            let mut line = format!("  {:<16}", target.name);
            for number in 0..COLUMNS.len() {
                let mut figures = target.column(number);
                if ADDED.contains(&number) && target.name != STRAIGHT {
                    figures = straight.map_or(figures.clone(), |straight| {
                        pairs(&figures, &straight.column(number), |own, none| own - none)
                    });
                }
                let is_missing = number >= CPU && target.pids.is_empty()
                    // Nothing was answered.
                    || figures.iter().any(|figure| figure.is_nan())
                    || (FIRST..CPU).contains(&number) && matches!(kind, Kind::Short);
                let text = if is_missing {
                    "-".to_owned()
                } else {
                    spread(&figures)
                };
                line += &format!(" {text:>21}");
            }
            page.table(line);
        }
        for target in self.targets.iter().filter(|target| target.is_ours) {
            let bars = self.bars(target).join(", ");
            page.line(format!("  {load}, {}: {bars}", target.name));
        }
    }

    /// What the target's figures are held to, and whether they reach it.
    fn bars(&self, target: &Target) -> Vec<String> {
        let ratios = |other: &Target, number: usize| {
            pairs(&target.column(number), &other.column(number), |own, its| {
                own / its
            })
        };
        let mut bars = Vec::new();
        if let Some(nginx) = self.target(NGINX) {
            let rate = median(&ratios(nginx, RATE));
            bars.push(format!("throughput {}", RATE_BAR.judge(rate, "x")));
            let cpu = median(&ratios(nginx, CPU));
            bars.push(format!("CPU {}", CPU_BAR.judge(cpu, "x")));
            if let Some(straight) = self.target(STRAIGHT) {
                let added = |target: &Target| {
                    let (own, none) = (target.column(P99), straight.column(P99));
                    median(&pairs(&own, &none, |own, none| own - none))
                };
                let (own, nginxs) = (added(target), added(nginx));
                // A proxy can be as quick as none in a noisy run; no ratio says anything then.
                bars.push(if nginxs > 0.0 {
                    format!("added p99 {}", ADDED_P99_BAR.judge(own / nginxs, "x"))
                } else {
                    format!("added p99 can't be judged: {own:.0} us, nginx's {nginxs:.0} us")
                });
            }
        }
        if let Some(litellm) = self.target(LITELLM) {
            let rate = median(&ratios(litellm, RATE));
            bars.push(if rate.is_finite() {
                format!("of LiteLLM's {}", LITELLM_BAR.judge(rate, "x"))
            } else {
                "LiteLLM has answered none".to_owned()
            });
        }
        bars
    }

    /// The peak over the whole run, and how often leases were looked up in it.
    fn print_memory(&self, page: &mut Page) {
        let peaks = self.targets.iter().filter(|target| !target.pids.is_empty());
        let peaks = peaks.map(|target| format!("{} {:.0}", target.name, peak_memory(&target.pids)));
        let peaks: Vec<String> = peaks.collect();
        page.line(format!("  peak memory, MB: {}", peaks.join(", ")));
        for target in &self.targets {
            if target.failed > 0 {
                page.line(format!(
                    "  {} of {} requests to {} failed",
                    target.failed, target.requests, target.name
                ));
            }
            if target.is_ours {
                page.table(format!(
                    "  look-ups a request, {}: {:.3}",
                    target.name,
                    target.lookups as f64 / target.requests.max(1) as f64
                ));
            }
        }
    }
}

/// What a client that streams has seen, in µs from its request on.
#[derive(Default)]
struct Streams {
    first: Vec<f64>,
    whole: Vec<f64>,
    /// Answers that broke off.
    broken: u32,
}

/// A client that asks for one stream after the other.
struct Streamer {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Streams>,
}

impl Streamer {
    fn start(port: u16, key: &str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let request = request(key, Kind::Stream, "keep-alive");
        let thread = std::thread::spawn(move || {
            let connect = || {
                let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
                stream.set_nodelay(true).unwrap();
                let patience = Some(Duration::from_secs(120));
                stream.set_read_timeout(patience).unwrap();
                stream
            };
            let mut stream = connect();
            let mut streams = Streams::default();
            let mut answer = Vec::new();
            'streams: while !stopped.load(Ordering::Relaxed) {
                let start = Instant::now();
                let since = || start.elapsed().as_nanos() as f64 / 1e3;
                stream.write_all(request.as_bytes()).unwrap();
                answer.clear();
                let mut first = None;
                while !answer.ends_with(b"\r\n0\r\n\r\n") {
                    let mut part = [0; 8192];
                    let length = stream.read(&mut part).unwrap();
                    if length == 0 {
                        streams.broken += 1;
                        stream = connect();
                        continue 'streams;
                    }
                    answer.extend_from_slice(&part[..length]);
                    if first.is_none() && memchr::memmem::find(&answer, b"data: ").is_some() {
                        first = Some(since());
                    }
                }
                streams.whole.push(since());
                assert!(
                    memchr::memmem::find(&answer, upstream::DONE.as_bytes()).is_some(),
                    "no stream: {}",
                    String::from_utf8_lossy(&answer)
                );
                streams.first.extend(first);
            }
            streams
        });
        Self { stop, thread }
    }

    fn stop(self) -> Streams {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

fn percentile(figures: &[f64], part: f64) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = (sorted.len() as f64 * part) as usize;
    sorted
        .get(place)
        .or(sorted.last())
        .copied()
        .unwrap_or(f64::NAN)
}

fn request(key: &str, kind: Kind, connection: &str) -> String {
    let body = kind.body();
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: {connection}\r\n\r\n{body}",
        body.len()
    )
}

/// What the target answers one request with, head and body.
fn ask(port: u16, key: &str, kind: Kind) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    // The bare upstream leaves the connection open.
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(request(key, kind, "close").as_bytes())?;
    let mut answer = Vec::new();
    while memchr::memmem::find(&answer, upstream::TEXT.as_bytes()).is_none() {
        let mut part = [0; 8192];
        match stream.read(&mut part)? {
            0 => break,
            length => answer.extend_from_slice(&part[..length]),
        }
    }
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

// --- The machine ------------------------------------------------------------------------------

/// The version in a line that a program tells it in.
fn version(name: &str, line: &str) -> String {
    let mut words = line.split([' ', '/']);
    let version = words.find(|word| word.starts_with(|first: char| first.is_ascii_digit()));
    format!("{name} {}", version.unwrap_or("unknown"))
}

/// CPU time of a process and all its threads, in microseconds.
fn cpu_time(pid: u32) -> f64 {
    common::support::cpu_time(pid).as_micros() as f64
}

/// The most memory that the processes ever had, in MB.
fn peak_memory(pids: &[u32]) -> f64 {
    let peak = |pid: &u32| {
        let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        line.unwrap()
            .trim()
            .trim_end_matches(" kB")
            .parse::<f64>()
            .unwrap()
    };
    pids.iter().map(peak).sum::<f64>() / 1024.0
}
