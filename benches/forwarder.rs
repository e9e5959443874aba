//! mpool-forwarder beside nginx `proxy_pass`: the same upstream, the same load,
//! one run. The forwarder looks the lease up in a Redis of its own on each
//! request; how often it did is counted there.
//!
//! The upstream is another nginx with a 100-byte answer, the load is wrk's. A
//! round measures each proxy (and the upstream with none) one after the other,
//! the next round in another order. Figures are medians over the rounds, with the
//! least and the most beside them; ratios are taken within a round. CPU time is
//! that of the proxy's processes, with Redis's beside it. All share the machine,
//! so throughput is what its cores give to everyone together.
//!
//! Run it with `make bench`. In the environment:
//! - `MPOOL_BENCH_SECONDS`: how long one measurement takes (3)
//! - `MPOOL_BENCH_ROUNDS`: 5
//! - `MPOOL_BENCH_THREADS`: threads of the forwarder and workers of nginx (1)
//! - `MPOOL_BENCH_CONNECTIONS`: `1,64,512`
//! - `MPOOL_BENCH_ONLY`: one of straight, nginx, forwarder, to profile it
//! - `MPOOL_BENCH_FORWARDER`: more binaries to measure, with `:` between them

mod common;

use common::page::{Bar, Page, output};
use common::support::{Client, Options, Server, free_port, wait_for};
use common::{median, setting};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

/// What the upstream answers with, 100 bytes of it.
const ANSWER: &str = concat!(
    r#"{"id":"msg_0123456789","type":"message","role":"assistant","#,
    r#""text":"Hello there, how are you today?"}"#
);

/// Prints what wrk found in a form that needs no guessing.
const REPORT: &str = r#"
done = function(summary, latency)
  local errors = summary.errors
  local bad = errors.connect + errors.read + errors.write + errors.timeout + errors.status
  io.write(string.format("mpool-bench %d %d %d %d %d\n",
    summary.requests, summary.duration, bad, latency:percentile(50), latency:percentile(99)))
end
"#;

/// What is measured, with the decimals to print.
const COLUMNS: [(&str, usize); 5] = [
    ("requests/s", 0),
    ("p50 µs", 0),
    ("p99 µs", 0),
    ("CPU µs/request", 1),
    ("Redis CPU µs", 1),
];
const RATE: usize = 0;
const CPU: usize = 3;
/// Throughput and CPU time, as parts of nginx's.
const BARS: [(usize, Bar); 2] = [(RATE, Bar::AtLeast(0.9)), (CPU, Bar::AtMost(1.3))];
const P99: usize = 2;
const ADDED_P99: Bar = Bar::AtMost(1.5);

/// The figures of one measurement, in the order of [`COLUMNS`].
type Figures = [f64; COLUMNS.len()];

/// Something that wrk can ask.
struct Target {
    name: String,
    port: u16,
    /// The processes whose CPU time and memory count.
    pids: Vec<u32>,
    /// Its requests and the look-ups that they led to.
    requests: u64,
    lookups: u64,
}

/// All that is needed to put load on something and see what it costs.
struct Bench {
    seconds: u32,
    key: String,
    script: String,
    redis: u32,
    client: Client,
}

fn main() {
    let threads: usize = setting("THREADS", 1);
    let rounds: usize = setting("ROUNDS", 5);
    let connections: String = setting("CONNECTIONS", "1,64,512".to_owned());
    let connections: Vec<u32> = connections
        .split(',')
        .map(|count| count.parse().expect("MPOOL_BENCH_CONNECTIONS is wrong"))
        .collect();

    let names: Vec<String> = (0..10).map(|n| format!("account-{n}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let redis: Server = Options::default().accounts(&names).start();
    let upstream = Nginx::start(1, |port| {
        format!(
            "server {{ listen 127.0.0.1:{port}; default_type application/json; return 200 '{ANSWER}'; }}"
        )
    });
    let nginx = Nginx::start(threads, |port| proxy_config(port, upstream.port));
    let more: String = setting("FORWARDER", String::new());
    let more = more.split(':').filter(|path| !path.is_empty());
    let forwarders: Vec<Forwarder> = std::iter::once(env!("CARGO_BIN_EXE_mpool-forwarder"))
        .chain(more)
        .map(|binary| Forwarder::start(binary, threads, &redis, upstream.port))
        .collect();

    let mut client = redis.connect();
    let script = upstream.folder.path().join("report.lua");
    fs::write(&script, REPORT).unwrap();
    let mut bench = Bench {
        seconds: setting("SECONDS", 3),
        key: client.pool_key(),
        script: script.to_str().unwrap().to_owned(),
        redis: redis.pid(),
        client,
    };

    let mut targets = vec![
        Target::new("straight", upstream.port, vec![]),
        Target::new("nginx", nginx.port, nginx.workers()),
    ];
    targets.extend(
        forwarders.iter().map(|forwarder| {
            Target::new(&forwarder.name, forwarder.port, vec![forwarder.child.id()])
        }),
    );
    let only: String = setting("ONLY", String::new());
    targets.retain(|target| only.is_empty() || target.name == only);
    assert!(
        !targets.is_empty(),
        "MPOOL_BENCH_ONLY names nothing that is measured"
    );

    let versions = [
        version("nginx", &output(nginx_binary(), &["-v"])),
        version("wrk", &output("wrk", &["-v"])),
    ];
    let mut page = Page::new("Forwarder", &versions);
    page.line(format!(
        "small requests, threads of each: {threads}; medians of {rounds} rounds of {} s (least-most)",
        bench.seconds
    ));
    for count in connections {
        eprintln!("forwarder: {count} connections");
        let samples = bench.rounds(&mut targets, count, rounds);
        print_table(&mut page, &targets, &samples, count);
    }
    print_memory(&mut page, &targets);
    page.save();
}

impl Target {
    fn new(name: &str, port: u16, pids: Vec<u32>) -> Self {
        Self {
            name: name.to_owned(),
            port,
            pids,
            requests: 0,
            lookups: 0,
        }
    }
}

impl Bench {
    /// A list for each target, of a round's figures each.
    fn rounds(
        &mut self,
        targets: &mut [Target],
        connections: u32,
        rounds: usize,
    ) -> Vec<Vec<Figures>> {
        for target in &mut *targets {
            wait_for(
                &format!("the upstream's answer from {}", target.name),
                || {
                    let answer = ask(target.port, &self.key).ok()?;
                    (answer.starts_with("HTTP/1.1 200 ") && answer.ends_with(ANSWER)).then_some(())
                },
            );
            // The connections to the upstream are made now.
            self.wrk(target.port, connections, 1);
        }
        let mut samples = vec![Vec::new(); targets.len()];
        for round in 0..rounds {
            // Backwards every other round, and beginning with another one.
            for turn in 0..targets.len() {
                let forth = (turn + round) % targets.len();
                let place = if round % 2 == 0 {
                    forth
                } else {
                    targets.len() - 1 - forth
                };
                samples[place].push(self.measure(&mut targets[place], connections));
            }
        }
        samples
    }

    fn measure(&mut self, target: &mut Target, connections: u32) -> Figures {
        let lookups = self.lookups();
        let redis = cpu_time(self.redis);
        let cpu: f64 = target.pids.iter().map(|&pid| cpu_time(pid)).sum();
        let [requests, micros, p50, p99] = self.wrk(target.port, connections, self.seconds);
        let cpu = target.pids.iter().map(|&pid| cpu_time(pid)).sum::<f64>() - cpu;
        let redis = cpu_time(self.redis) - redis;
        target.requests += requests as u64;
        target.lookups += self.lookups() - lookups;
        [
            requests / micros * 1e6,
            p50,
            p99,
            cpu / requests,
            redis / requests,
        ]
    }

    /// Requests, microseconds that they took, p50 and p99 (µs). Whatever went
    /// wrong ends the benchmark: its figures would compare different things.
    fn wrk(&self, port: u16, connections: u32, seconds: u32) -> [f64; 4] {
        let output = Command::new("wrk")
            .args(["-t", "1", "-c", &connections.to_string()])
            .args(["-d", &format!("{seconds}s"), "-s", &self.script])
            .args(["-H", &format!("x-api-key: {}", self.key)])
            .arg(format!("http://127.0.0.1:{port}/v1/messages"))
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
        let &[requests, micros, bad, p50, p99] = &numbers[..] else {
            panic!(
                "wrk failed: {text}{}",
                String::from_utf8_lossy(&output.stderr)
            );
        };
        assert!(bad == 0.0, "{bad} of {requests} requests failed:\n{text}");
        [requests, micros, p50, p99]
    }

    /// How often Redis was asked for a lease.
    fn lookups(&mut self) -> u64 {
        let info: redis::InfoDict = self.client.run(&["INFO", "commandstats"]);
        let calls = info.get::<String>("cmdstat_mpool.acquire");
        calls.map_or(0, |line| {
            let calls = line
                .strip_prefix("calls=")
                .and_then(|rest| rest.split(',').next());
            calls.unwrap().parse().unwrap()
        })
    }
}

/// What the target answers one request with, head and body.
fn ask(port: u16, key: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    let request = format!(
        "GET /v1/messages HTTP/1.1\r\nHost: bench\r\nx-api-key: {key}\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn print_table(page: &mut Page, targets: &[Target], samples: &[Vec<Figures>], connections: u32) {
    let column = |samples: &[Figures], column: usize| -> Vec<f64> {
        samples.iter().map(|figures| figures[column]).collect()
    };
    page.line("");
    let mut line = format!("{:<16}", format!("connections: {connections}"));
    for (title, _) in COLUMNS {
        line += &format!("{title:>23}");
    }
    page.line(line);
    for (target, samples) in targets.iter().zip(samples) {
        let mut line = format!("  {:<14}", target.name);
        for (number, &(_, decimals)) in COLUMNS.iter().enumerate() {
            let figures = column(samples, number);
            let text = if number >= CPU && target.pids.is_empty() {
                "-".to_owned()
            } else {
                spread(&figures, decimals)
            };
            line += &format!("{text:>23}");
        }
        page.line(line);
    }
    let place = |name: &str| targets.iter().position(|target| target.name == name);
    let Some(nginx) = place("nginx") else {
        return;
    };
    for (target, figures) in targets.iter().zip(samples).skip(nginx + 1) {
        let ratios = |number: usize| -> Vec<f64> {
            let pairs = column(figures, number)
                .into_iter()
                .zip(column(&samples[nginx], number));
            pairs.map(|(its, nginxs)| its / nginxs).collect()
        };
        let mut line = format!("  {:<14}", format!("{}/nginx", target.name));
        for number in 0..=CPU {
            line += &format!("{:>23}", spread(&ratios(number), 2));
        }
        page.line(line);
        for (number, bar) in BARS {
            let what = format!("{} of nginx's", COLUMNS[number].0);
            page.bar(&what, median(&ratios(number)), bar, "x");
        }
        if let Some(straight) = place("straight") {
            let p99 = |figures: &[Figures]| median(&column(figures, P99));
            let added = |figures: &[Figures]| p99(figures) - p99(&samples[straight]);
            let (own, nginxs) = (added(figures), added(&samples[nginx]));
            page.line(format!("  added p99: {own:.0} us, nginx's {nginxs:.0} us"));
            // A proxy can be as quick as none in a noisy run; no ratio says anything then.
            if nginxs > 0.0 {
                page.bar("added p99 of nginx's", own / nginxs, ADDED_P99, "x");
            }
        }
    }
}

/// The peak over the whole run, and how often leases were looked up in it.
fn print_memory(page: &mut Page, targets: &[Target]) {
    let nginx = targets.iter().find(|target| target.name == "nginx");
    let nginx = nginx.map(|target| peak_memory(&target.pids));
    page.line("");
    for target in targets.iter().filter(|target| !target.pids.is_empty()) {
        let memory = peak_memory(&target.pids);
        let ratio = nginx.map_or(String::new(), |nginx| {
            format!(", {:.2} of nginx's", memory / nginx)
        });
        let lookups = target.lookups as f64 / target.requests.max(1) as f64;
        page.line(format!(
            "  {:<14} peak memory {memory:.1} MB{ratio}; {lookups:.3} look-ups a request",
            target.name
        ));
    }
}

/// The median, with the least and the most.
fn spread(figures: &[f64], decimals: usize) -> String {
    let least = figures.iter().copied().fold(f64::INFINITY, f64::min);
    let most = figures.iter().copied().fold(0.0, f64::max);
    let middle = median(figures);
    format!("{middle:.decimals$} ({least:.decimals$}-{most:.decimals$})")
}

// --- What is measured -------------------------------------------------------------------------

/// An nginx with a configuration of its own; it touches nothing of the system's.
struct Nginx {
    child: Child,
    port: u16,
    folder: TempDir,
}

impl Nginx {
    /// `server` is what stands in its `http { }`, for the port it is to listen on.
    fn start(workers: usize, server: impl Fn(u16) -> String) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = free_port();
        let config = format!(
            "daemon off; pid nginx.pid; error_log error.log warn; worker_processes {workers};
            worker_rlimit_nofile 8192;
            events {{ worker_connections 4096; }}
            http {{
                access_log off; keepalive_requests 1000000000; keepalive_timeout 75s;
                client_body_temp_path client_body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
                uwsgi_temp_path uwsgi; scgi_temp_path scgi;
                {}
            }}",
            server(port)
        );
        fs::write(folder.path().join("nginx.conf"), config).unwrap();
        let child = nginx_command(folder.path())
            .spawn()
            .expect("nginx is not installed");
        let nginx = Self {
            child,
            port,
            folder,
        };
        wait_for("nginx to listen", || {
            TcpStream::connect(("127.0.0.1", port)).ok()
        });
        nginx
    }

    /// The processes that do the work, all started before the first answer.
    fn workers(&self) -> Vec<u32> {
        let pid = self.child.id();
        let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        text.split_whitespace()
            .map(|pid| pid.parse().unwrap())
            .collect()
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // Workers would outlive a master that was killed.
        let stopped = nginx_command(self.folder.path())
            .args(["-s", "stop"])
            .status();
        if !stopped.is_ok_and(|status| status.success()) {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = fs::read_to_string(self.folder.path().join("error.log"));
            eprintln!(
                "--- nginx on port {} ---\n{}",
                self.port,
                log.unwrap_or_default()
            );
        }
    }
}

/// Debian has nginx in a folder that not everyone's PATH names.
fn nginx_binary() -> &'static str {
    let debian = "/usr/sbin/nginx";
    if Path::new(debian).exists() {
        debian
    } else {
        "nginx"
    }
}

fn nginx_command(folder: &Path) -> Command {
    let mut command = Command::new(nginx_binary());
    command
        .arg("-p")
        .arg(folder)
        .arg("-c")
        .arg(folder.join("nginx.conf"));
    command
        .arg("-e")
        .arg(folder.join("error.log"))
        .stdin(Stdio::null())
        .stderr(Stdio::null());
    command
}

fn proxy_config(port: u16, upstream: u16) -> String {
    format!(
        "upstream bench {{ server 127.0.0.1:{upstream}; keepalive 512; keepalive_requests 1000000000; }}
        server {{
            listen 127.0.0.1:{port} reuseport;
            location / {{
                proxy_pass http://bench; proxy_http_version 1.1; proxy_set_header Connection '';
                proxy_buffering off;
            }}
        }}"
    )
}

/// A forwarder that lives as long as this value.
struct Forwarder {
    name: String,
    child: Child,
    port: u16,
}

impl Forwarder {
    fn start(binary: &str, threads: usize, redis: &Server, upstream: u16) -> Self {
        let port = free_port();
        let child = Command::new(binary)
            .env_clear()
            .args(["--listen", &format!("127.0.0.1:{port}"), "--admin", "off"])
            .args([
                "--redis",
                &redis.url(),
                "--upstream",
                &format!("http://127.0.0.1:{upstream}"),
            ])
            .args(["--threads", &threads.to_string(), "--log-level", "warn"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let name = Path::new(binary).file_name().unwrap().to_str().unwrap();
        let name = name.trim_start_matches("mpool-").to_owned();
        let forwarder = Self { name, child, port };
        wait_for("the forwarder to listen", || {
            TcpStream::connect(("127.0.0.1", port)).ok()
        });
        forwarder
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
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
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // The name, in brackets, may hold anything.
    let fields: Vec<&str> = text.rsplit(") ").next().unwrap().split(' ').collect();
    let ticks: u64 = fields[11..13]
        .iter()
        .map(|field| field.parse::<u64>().unwrap())
        .sum();
    // Linux shows these in hundredths of a second, whatever its own clock.
    ticks as f64 * 1e4
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
