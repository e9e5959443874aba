//! How long the server stands still with a large pool, and what that takes in
//! memory: while keys and accounts are added, during a rescan of the account
//! files, a promotion and a load.
//!
//! A client of its own sends PING after PING meanwhile. Its longest round trip
//! has the machine's noise in it, other programs' turns at the processor too;
//! beside it stands the most CPU time that the server's main thread used within
//! one of those round trips, which is the server's own doing. The same is
//! measured of a server without the module that does the same writes, or
//! nothing. Run it with `make bench`. In the environment:
//! - `MPOOL_BENCH_KEYS`: 1000000
//! - `MPOOL_BENCH_ACCOUNTS`: how many account files there are to scan (100000)
//! - `MPOOL_BENCH_ROUNDS`: 5

mod common;

use common::page::{Bar, Page};
use common::support::{Options, Server, bearer, wait_for};
use common::{Link, cpu_time, extreme, median, mix, pack, setting};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

/// Accounts that the keys' leases are of, with slots for them all.
const LENDERS: usize = 1_000;
/// How long the server is watched after what happens at once.
const AFTERMATH: Duration = Duration::from_secs(1);
/// A stall of the module's making, in ms.
const STALL: Bar = Bar::AtMost(2.0);
const VIEW_BYTES: Bar = Bar::AtMost(200.0);
const KEY_BYTES: Bar = Bar::AtMost(760.0);

/// What the probe saw, in ms.
#[derive(Clone, Copy)]
struct Stall {
    longest: f64,
    /// Exceeded by one round trip in a thousand.
    tail: f64,
    /// The most CPU time of the server's main thread within one round trip.
    cpu: f64,
}

/// A client that sends PING after PING until it is stopped.
struct Probe {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<(f64, f64)>>,
}

impl Probe {
    fn start(server: &Server) -> Self {
        let (port, pid) = (server.port, server.pid());
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
            stream.set_nodelay(true).unwrap();
            let mut trips = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                let cpu = cpu_time(pid);
                let start = Instant::now();
                stream.write_all(b"PING\r\n").unwrap();
                stream.read_exact(&mut [0; 7]).unwrap();
                let time = start.elapsed().as_nanos() as f64 / 1e6;
                trips.push((time, (cpu_time(pid) - cpu) as f64 / 1e6));
            }
            trips
        });
        Self { stop, thread }
    }

    fn stop(self) -> Stall {
        self.stop.store(true, Ordering::Relaxed);
        let trips = self.thread.join().unwrap();
        let mut times: Vec<f64> = trips.iter().map(|trip| trip.0).collect();
        times.sort_by(f64::total_cmp);
        let cpu: Vec<f64> = trips.iter().map(|trip| trip.1).collect();
        Stall {
            longest: times.last().copied().unwrap_or_default(),
            tail: times[times.len() * 999 / 1000],
            cpu: extreme(&cpu, f64::max),
        }
    }
}

/// What the probe sees while that is done.
fn stall_of(server: &Server, work: impl FnOnce()) -> Stall {
    let probe = Probe::start(server);
    work();
    probe.stop()
}

fn client_key(number: usize) -> String {
    format!("sk-cli-v1-{:064x}", mix(number as u64))
}

fn lender(number: usize) -> String {
    format!("account-{:06}", number % LENDERS)
}

/// A record with the fields of MPOOL.KEYGEN's, as long as those.
fn record(key: &str) -> Vec<u8> {
    let name = format!("client_keys:{key}");
    let words = ["HSET", &name, "tier", "medium", "use_pool", "true"];
    let times = ["created_at", "1755266400000", "expires_at", "9999999999999"];
    pack(&[&words[..], &times, &["active", "true"]].concat())
}

/// The writes that a lease comes down to.
fn plain_lease(key: &str, number: usize) -> [Vec<u8>; 2] {
    let (account, now) = (lender(number), number.to_string());
    let name = format!("key_rotation:{key}");
    let words = ["HSET", &name, "account", &account, "next_rotation", &now];
    let lease = pack(&[&words[..], &["last_rotation", &now]].concat());
    let slots = format!("medium_pool:slots:{account}");
    [lease, pack(&["SET", &slots, "1"])]
}

/// A server without a pool's module, and without anything else in it.
fn bare() -> Server {
    let options = Options {
        bare: true,
        ..Options::default()
    };
    options.start()
}

struct Bench {
    page: Page,
    keys: usize,
    accounts: usize,
    rounds: usize,
}

fn main() {
    let mut bench = Bench {
        page: Page::new("Stalls, loading and memory", &[]),
        keys: setting("KEYS", 1_000_000),
        accounts: setting("ACCOUNTS", 100_000),
        rounds: setting("ROUNDS", 5),
    };
    let titles = ["longest ms", "p99.9 ms", "its CPU ms"];
    let title = |of: &str| titles.map(|title| format!("{title:>12}")).concat() + "  " + of;
    bench.page.line(format!("{:<34}{}", "", title("")));
    bench.account_files();
    let mut primary = bench.adding_keys();
    bench.promotion(&primary);
    bench.loading(&mut primary);
    bench.page.save();
}

impl Bench {
    /// Prints what was seen; answers nothing but holds the module's CPU time to the bar.
    fn report(&mut self, what: &str, own: Stall, plain: Stall) {
        self.page.line(what);
        for (name, stall) in [("mpool", own), ("without the module", plain)] {
            self.page.line(format!(
                "    {name:<30}{:>12.2}{:>12.2}{:>12.2}",
                stall.longest, stall.tail, stall.cpu
            ));
        }
        self.page.bar(
            "longest stall of its own making, CPU",
            own.cpu,
            STALL,
            " ms",
        );
    }

    /// So many account files that arrive at once, and a rescan of them all.
    fn account_files(&mut self) {
        eprintln!("stalls: {} account files", self.accounts);
        let server = Options::default().start();
        let folder = server.account_dir().join("medium");
        let fresh = server.folder.path().join("fresh");
        fs::create_dir(&fresh).unwrap();
        for number in 0..self.accounts {
            let name = format!("account-{number:06}");
            fs::write(fresh.join(&name).with_extension("json"), bearer(&name)).unwrap();
        }
        let mut client = server.connect();
        let count = self.accounts;
        let start = Instant::now();
        let arrival = stall_of(&server, || {
            fs::remove_dir(&folder).unwrap();
            fs::rename(&fresh, &folder).unwrap();
            client.ok(&["MPOOL.RELOAD"]);
            let last = format!("medium_pool:slots:account-{:06}", count - 1);
            wait_for("the last account", || {
                client.run::<Option<String>>(&["GET", &last])
            });
            sleep(AFTERMATH);
        });
        let took = start.elapsed();
        let idle = bare();
        let nothing = stall_of(&idle, || sleep(took));
        self.report(
            &format!("{count} account files arrive at once"),
            arrival,
            nothing,
        );
        let start = Instant::now();
        let rescan = stall_of(&server, || {
            (0..self.rounds).for_each(|_| client.ok(&["MPOOL.RELOAD"]));
        });
        let took = start.elapsed();
        let nothing = stall_of(&idle, || sleep(took));
        let what = format!("{count} account files scanned again, {} times", self.rounds);
        self.report(&what, rescan, nothing);
    }

    /// Makes keys and has each lend; answers the server.
    fn adding_keys(&mut self) -> Server {
        eprintln!("stalls: {} keys", self.keys);
        let names: Vec<String> = (0..LENDERS).map(lender).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let slots = (self.keys / LENDERS + 1).to_string();
        let options = Options::default().accounts(&names);
        let server = options.module(&["slots-per-account", &slots]).start();
        let mut link = Link::open(server.port);
        let own = stall_of(&server, || {
            link.run((0..self.keys).flat_map(|number| {
                let key = client_key(number);
                let now = number.to_string();
                [record(&key), pack(&["MPOOL.ACQUIRE", &key, &now])]
            }));
        });
        let other = bare();
        let mut link = Link::open(other.port);
        let plain = stall_of(&other, || {
            link.run((0..self.keys).flat_map(|number| {
                let key = client_key(number);
                let [lease, slots] = plain_lease(&key, number);
                [record(&key), lease, slots]
            }));
        });
        self.report(&format!("{} keys are made and lend", self.keys), own, plain);
        server
    }

    /// A replica with all the leases becomes a primary, and lends.
    fn promotion(&mut self, primary: &Server) {
        eprintln!("stalls: promotion");
        let slots = (self.keys / LENDERS + 1).to_string();
        let stalls = [false, true].map(|is_bare| {
            let options = Options {
                bare: is_bare,
                ..Options::default()
            };
            let names: Vec<String> = (0..LENDERS).map(lender).collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let options = options
                .accounts(&names)
                .module(&["slots-per-account", &slots]);
            let replica = options.replica_of(primary).start();
            let mut client = replica.connect();
            wait_for("the replica to have its data", || {
                (client.info("replication", "master_link_status") == "up").then_some(())
            });
            let now = self.keys.to_string();
            stall_of(&replica, || {
                client.ok(&["REPLICAOF", "NO", "ONE"]);
                if !is_bare {
                    for number in 0..self.keys.min(1_000) {
                        client.ok(&["MPOOL.ACQUIRE", &client_key(number), &now]);
                    }
                }
                sleep(AFTERMATH);
            })
        });
        let what = format!("a replica with {} leases is promoted", self.keys);
        self.report(&what, stalls[0], stalls[1]);
    }

    /// The same data loaded with the module and without, in turn; then what it takes.
    fn loading(&mut self, server: &mut Server) {
        server.connect().ok(&["SAVE"]);
        let (mut times, mut memory) = ([vec![], vec![]], [vec![], vec![]]);
        let mut stalls = Vec::new();
        for round in 1..=self.rounds {
            eprintln!("stalls: load {round} of {}", self.rounds);
            for place in [0, 1] {
                server.kill();
                server.set_bare(place == 1);
                server.launch();
                stalls.push(stall_of(server, || sleep(AFTERMATH)));
                times[place].push(load_time(&server.log()));
                memory[place].push(used_memory(server));
            }
        }
        let worst = |place: usize| {
            let of = stalls.iter().skip(place).step_by(2);
            of.copied()
                .max_by(|one, other| one.cpu.total_cmp(&other.cpu))
                .unwrap()
        };
        let (own, plain) = (worst(0), worst(1));
        self.report(
            &format!("just after {} leases are loaded", self.keys),
            own,
            plain,
        );
        let ratios: Vec<f64> = times[0]
            .iter()
            .zip(&times[1])
            .map(|(own, plain)| own / plain)
            .collect();
        self.page.line(format!(
            "loading {} leases: {:.2} s, {:.2} s without the module, {:.2}x ({:.2}-{:.2})",
            self.keys,
            median(&times[0]),
            median(&times[1]),
            median(&ratios),
            extreme(&ratios, f64::min),
            extreme(&ratios, f64::max),
        ));
        self.memory(
            server,
            (median(&memory[0]) - median(&memory[1])) / self.keys as f64,
        );
    }

    fn memory(&mut self, server: &Server, view: f64) {
        let mut client = server.connect();
        let sample = self.keys.min(1_000);
        let bytes: u64 = (0..sample)
            .flat_map(|number| {
                let key = client_key(number);
                [format!("client_keys:{key}"), format!("key_rotation:{key}")]
            })
            .map(|name| client.run::<u64>(&["MEMORY", "USAGE", &name]))
            .sum();
        let keyspace = bytes as f64 / sample as f64;
        self.page.line(format!(
            "memory of a leased key: {keyspace:.0} bytes in the keyspace, {view:.0} in the view"
        ));
        self.page.bar("view", view, VIEW_BYTES, " bytes");
        self.page
            .bar("leased key", keyspace + view, KEY_BYTES, " bytes");
    }
}

/// How long the latest load took, in s, as the server's log has it.
fn load_time(log: &str) -> f64 {
    let line = log.rsplit("DB loaded from disk: ").next().unwrap();
    line.split(' ').next().unwrap().parse().unwrap()
}

fn used_memory(server: &Server) -> f64 {
    let info: redis::InfoDict = server.connect().run(&["INFO", "memory"]);
    info.get("used_memory").unwrap()
}
