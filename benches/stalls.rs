//! How long the server stands still with a large pool, and what that takes in
//! memory: while keys and accounts are added, during a rescan of the account
//! files, a promotion, a load, and when the view is made anew.
//!
//! A client of its own sends PING after PING meanwhile (see common/probe.rs), and the
//! servers themselves have the turns of their event loops (see turns/): the client's
//! figures are what clients meet, with all that the machine does to them, the turns are
//! what the server does at once. The
//! same is measured of a server without the module that does the same writes, or
//! where there are none, nothing: what a stall of the module's exceeds that one's
//! by in the same round is the module's making. All is done round after round;
//! figures are medians of the rounds' longest, with the least and the most. Run it
//! with `make bench`. In the environment:
//! - `MPOOL_BENCH_KEYS`: 1000000
//! - `MPOOL_BENCH_ACCOUNTS`: how many account files there are to scan (100000)
//! - `MPOOL_BENCH_ROUNDS`: 5

mod common;

use common::page::{Bar, Page};
use common::probe::{Probe, Stall, stall_of};
use common::support::{DAY, Options, Server, bearer, wait_long};
use common::{
    Link, median, mix, pack, pairs, plain_lease, plain_slots, progress, range, setting, slots_key,
    spread,
};
use std::fs;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Accounts that the keys' leases are of, with slots for them all.
const LENDERS: usize = 1_000;
/// Keys that lend anew on a replica that has been promoted.
const PROMOTED: usize = 1_000;
/// Keys between two looks at the clock.
const PORTION: usize = 1_000;
/// No writes.
const NOTHING: [Vec<u8>; 0] = [];
/// How long the server is watched after what happens at once.
const AFTERMATH: Duration = Duration::from_secs(1);
/// How long anything may take with so many keys.
const PATIENCE: Duration = Duration::from_secs(300);
/// Arguments of the server while it loads, and what they are called: its own
/// way, which the module changes (src/portions.rs), and with portions as small
/// for the one without it.
const LOADS: [(&[&str], &str); 2] = [
    (&[], "by the server's defaults"),
    (
        &["--loading-process-events-interval-bytes", "32768"],
        "in portions of 32 KiB",
    ),
];
/// A stall of the module's making, in ms.
const STALL: Bar = Bar::AtMost(2.0);
const VIEW_BYTES: Bar = Bar::AtMost(200.0);
const KEY_BYTES: Bar = Bar::AtMost(760.0);

fn client_key(number: usize) -> String {
    format!("sk-cli-v1-{:064x}", mix(number as u64))
}

fn account(number: usize) -> String {
    format!("account-{number:06}")
}

fn lender(number: usize) -> String {
    account(number % LENDERS)
}

/// A record with the fields of MPOOL.KEYGEN's, as long as those, and a lease that
/// was released: every field of a lease is to be there later.
fn used_key(key: &str, number: usize) -> [Vec<u8>; 2] {
    let name = format!("client_keys:{key}");
    let words = ["HSET", &name, "tier", "medium", "use_pool", "true"];
    let times = ["created_at", "1755266400000", "expires_at", "9999999999999"];
    let record = pack(&[&words[..], &times, &["active", "true"]].concat());
    let (name, account) = (format!("key_rotation:{key}"), lender(number + 1));
    let now = at(0);
    let words = ["HSET", &name, "last_rotation", &now, "previous_account"];
    [record, pack(&[&words[..], &[&account]].concat())]
}

/// An instant as long as real ones.
fn at(ms: usize) -> String {
    (1_755_266_400_000 + ms).to_string()
}

fn acquire(key: &str, ms: usize) -> Vec<u8> {
    pack(&["MPOOL.ACQUIRE", key, &at(ms)])
}

/// The writes that a choice comes down to.
fn plain_choice(key: &str, number: usize) -> [Vec<u8>; 2] {
    let (account, before) = (lender(number), lender(number + 1));
    let (now, next) = (at(number), at(number + DAY as usize));
    [
        plain_lease(key, [&account, &before], &now, &next),
        plain_slots(&account, "1"),
    ]
}

/// The writes that a release comes down to.
fn plain_release(key: &str, number: usize) -> [Vec<u8>; 3] {
    let (account, name) = (lender(number), format!("key_rotation:{key}"));
    [
        pack(&["HSET", &name, "previous_account", &account]),
        pack(&["HDEL", &name, "account", "next_rotation"]),
        plain_slots(&account, "1"),
    ]
}

/// What is preloaded into the servers.
fn turns() -> PathBuf {
    let bench = std::env::current_exe().unwrap();
    let places = bench.ancestors().skip(1);
    let mut places = places.map(|folder| folder.join("examples/libturns.so"));
    let found = places.find(|place| place.exists());
    found.expect("libturns.so is not built: run `make bench`")
}

/// One that its turns are seen of.
fn start(bare: bool, keys: usize) -> Server {
    let server = options(bare, keys).start();
    let turns = server.folder.path().join("data/turns");
    assert!(turns.exists(), "nothing tells of the server's turns");
    server
}

/// A server with the pool's module, or without it and anything in it.
fn options(bare: bool, keys: usize) -> Options {
    let names: Vec<String> = (0..LENDERS).map(lender).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let slots = (keys / LENDERS + 1).to_string();
    let options = Options {
        bare,
        patience: Some(PATIENCE),
        env: vec![("LD_PRELOAD".into(), turns().into())],
        ..Options::default()
    };
    if bare {
        return options;
    }
    options
        .accounts(&names)
        .module(&["slots-per-account", &slots])
}

/// One of a stall's figures.
type Part = fn(&Stall) -> f64;

/// The longest stalls of something, a round each: with the module and without.
#[derive(Default)]
struct Stalls([Vec<Stall>; 2]);

impl Stalls {
    fn add(&mut self, place: usize, stall: Stall) {
        self.0[place].push(stall);
    }

    fn figures(&self, of: Part) -> [Vec<f64>; 2] {
        self.0
            .each_ref()
            .map(|stalls| stalls.iter().map(of).collect())
    }
}

/// What loads of one kind came to: with the module and without.
#[derive(Default)]
struct Loads {
    during: Stalls,
    after: Stalls,
    /// In s.
    times: [Vec<f64>; 2],
    /// In bytes.
    memory: [Vec<f64>; 2],
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
    bench.page.table(format!(
        "longest in a round, ms; medians of {} rounds (least-most)",
        bench.rounds
    ));
    bench.account_files();
    let mut primary = bench.adding_keys();
    bench.promotion(&primary);
    bench.repair(&primary);
    bench.reading(&primary);
    bench.loading(&mut primary);
    bench.page.save();
}

impl Bench {
    /// Prints what was seen, and holds what the module adds to the bar.
    fn report(&mut self, what: &str, stalls: &Stalls) {
        let kinds: [(&str, Part); 4] = [
            ("a client's round trip", |stall| stall.trip),
            ("without waits for a processor", |stall| stall.own),
            ("a turn of the event loop", |stall| stall.turn),
            ("its CPU time", |stall| stall.cpu),
        ];
        self.page
            .table(format!("{what}; that, and without the module"));
        for (kind, of) in kinds {
            let [own, plain] = stalls.figures(of);
            let (own, plain) = (spread(&own), spread(&plain));
            self.page
                .table(format!("    {kind:<32}{own:>22} {plain:>22}"));
        }
        let seen: [(&str, Part); 2] = [
            ("a client", |stall| stall.own),
            ("its turns", |stall| stall.turn),
        ];
        for (by, of) in seen {
            let [own, plain] = stalls.figures(of);
            let added = pairs(&own, &plain, |own, plain| own - plain);
            self.page.line(format!(
                "  {what}: by {by} {:.2} ms, {:.2} without the module; of its making {} {}",
                median(&own),
                median(&plain),
                STALL.judge(median(&added), " ms"),
                range(&added),
            ));
        }
    }

    /// So many account files that arrive at once, are scanned again, and go at once.
    fn account_files(&mut self) {
        let server = start(false, 0);
        let idle = start(true, 0);
        let folder = server.account_dir().join("medium");
        let aside = server.folder.path().join("aside");
        fs::rename(&folder, server.folder.path().join("lenders")).unwrap();
        fs::create_dir(&aside).unwrap();
        for number in 0..self.accounts {
            let name = account(number);
            fs::write(aside.join(&name).with_extension("json"), bearer(&name)).unwrap();
        }
        fs::create_dir(&folder).unwrap();
        let mut client = server.connect();
        let mut count = |wanted: usize| {
            client.ok(&["MPOOL.RELOAD"]);
            // Each has a counter; there is nothing else.
            wait_long("the accounts to come or go", PATIENCE, || {
                (client.run::<usize>(&["DBSIZE"]) == wanted).then_some(())
            });
            sleep(AFTERMATH);
        };
        count(0);
        let [mut arrival, mut rescan, mut leaving] = [(); 3].map(|()| Stalls::default());
        for round in 1..=self.rounds {
            progress(&format!(
                "stalls: account files, round {round} of {}",
                self.rounds
            ));
            let makes = (0..self.accounts).map(|number| plain_slots(&account(number), "1"));
            let drops =
                (0..self.accounts).map(|number| pack(&["DEL", &slots_key(&account(number))]));
            let arrive = || {
                fs::remove_dir(&folder).unwrap();
                fs::rename(&aside, &folder).unwrap();
                count(self.accounts);
            };
            both(&server, &idle, &mut arrival, arrive, makes);
            both(
                &server,
                &idle,
                &mut rescan,
                || count(self.accounts),
                NOTHING,
            );
            let leave = || {
                fs::rename(&folder, &aside).unwrap();
                fs::create_dir(&folder).unwrap();
                count(0);
            };
            both(&server, &idle, &mut leaving, leave, drops);
        }
        let files = self.accounts;
        self.report(&format!("{files} account files arrive at once"), &arrival);
        self.report(&format!("{files} account files are scanned again"), &rescan);
        self.report(&format!("{files} account files go at once"), &leaving);
    }

    /// Makes keys and has each lend; answers the server.
    fn adding_keys(&mut self) -> Server {
        let (server, other) = (start(false, self.keys), start(true, self.keys));
        let mut stalls = Stalls::default();
        for round in 1..=self.rounds {
            progress(&format!(
                "stalls: {} keys, round {round} of {}",
                self.keys, self.rounds
            ));
            for server in [&server, &other] {
                server.connect().ok(&["FLUSHALL", "SYNC"]);
            }
            server.connect().ok(&["MPOOL.REPAIR"]);
            let start = Instant::now();
            let mut link = Link::open(server.port);
            let own = stall_of(server.port, || {
                link.run((0..self.keys).flat_map(|number| {
                    let key = client_key(number);
                    let [record, released] = used_key(&key, number);
                    [record, released, acquire(&key, number)]
                }));
            });
            stalls.add(0, own);
            let took = start.elapsed();
            let mut link = Link::open(other.port);
            let plain = stall_of(other.port, || {
                let start = Instant::now();
                let mut numbers = 0..self.keys;
                // It is done sooner, and watched as long: then it does the same over again, which
                // makes no new keys.
                while !numbers.is_empty() || start.elapsed() < took {
                    if numbers.is_empty() {
                        numbers = 0..self.keys;
                    }
                    link.run(numbers.by_ref().take(PORTION).flat_map(|number| {
                        let key = client_key(number);
                        let [record, released] = used_key(&key, number);
                        let [lease, slots] = plain_choice(&key, number);
                        [record, released, lease, slots]
                    }));
                }
            });
            stalls.add(1, plain);
        }
        self.report(&format!("{} keys are made and lend", self.keys), &stalls);
        server
    }

    /// A replica with all the leases becomes a primary; some keys are released, and lend.
    fn promotion(&mut self, primary: &Server) {
        let replicas = [false, true].map(|bare| start(bare, self.keys));
        let mut stalls = Stalls::default();
        let lending = self.keys.min(PROMOTED);
        for round in 1..=self.rounds {
            for (place, replica) in replicas.iter().enumerate() {
                progress(&format!("stalls: promotion {round} of {}", self.rounds));
                let mut client = replica.connect();
                let port = primary.port.to_string();
                client.ok(&["REPLICAOF", primary.host(), &port]);
                wait_long("the replica to have its data", PATIENCE, || {
                    (client.info("replication", "master_link_status") == "up").then_some(())
                });
                let mut link = Link::open(replica.port);
                let stall = stall_of(replica.port, || {
                    client.ok(&["REPLICAOF", "NO", "ONE"]);
                    link.run((0..lending).flat_map(|number| {
                        let key = client_key(number);
                        if place == 0 {
                            vec![pack(&["MPOOL.RELEASE", &key]), acquire(&key, self.keys)]
                        } else {
                            let writes = plain_release(&key, number);
                            { writes }
                                .into_iter()
                                .chain(plain_choice(&key, number))
                                .collect()
                        }
                    }));
                    sleep(AFTERMATH);
                });
                stalls.add(place, stall);
            }
        }
        let what = format!("a replica with {} leases is promoted", self.keys);
        self.report(&what, &stalls);
    }

    /// The view is made anew beside the one in use.
    fn repair(&mut self, server: &Server) {
        let idle = start(true, 0);
        let mut stalls = Stalls::default();
        for round in 1..=self.rounds {
            progress(&format!("stalls: repair {round} of {}", self.rounds));
            let repair = || server.connect().ok(&["MPOOL.REPAIR"]);
            both(server, &idle, &mut stalls, repair, NOTHING);
        }
        let what = format!("MPOOL.REPAIR with {} leases", self.keys);
        self.report(&what, &stalls);
    }

    /// The keyspace is new to the module: another database's, or the module is loaded.
    fn reading(&mut self, server: &Server) {
        let idle = start(true, 0);
        let [mut swaps, mut loads] = [(); 2].map(|()| Stalls::default());
        for round in 1..=self.rounds {
            progress(&format!("stalls: reading {round} of {}", self.rounds));
            let mut client = server.connect();
            client.ok(&["SWAPDB", "0", "1"]);
            client.wait_until_ready();
            sleep(AFTERMATH);
            let swap = || {
                client.ok(&["SWAPDB", "0", "1"]);
                client.wait_until_ready();
            };
            both(server, &idle, &mut swaps, swap, NOTHING);
            server.connect().unload();
            let load = || {
                let mut client = server.connect();
                client.load(server);
                client.wait_until_ready();
            };
            both(server, &idle, &mut loads, load, NOTHING);
        }
        let keys = self.keys;
        self.report(&format!("SWAPDB to {keys} leases"), &swaps);
        let what =
            format!("MODULE LOAD into a server with {keys} leases and {LENDERS} account files");
        self.report(&what, &loads);
    }

    /// The same data loaded with the module and without, in turn; then what it takes.
    fn loading(&mut self, server: &mut Server) {
        server.connect().ok(&["SAVE"]);
        let mut loads = LOADS.map(|_| Loads::default());
        for round in 1..=self.rounds {
            progress(&format!("stalls: load {round} of {}", self.rounds));
            for ((args, _), loads) in LOADS.iter().zip(&mut loads) {
                server.set_server_args(args);
                for place in [0, 1] {
                    server.kill();
                    server.set_bare(place == 1);
                    let probe = Probe::start(server.port);
                    server.launch();
                    loads.during.add(place, probe.stop());
                    let after = stall_of(server.port, || sleep(AFTERMATH));
                    loads.after.add(place, after);
                    loads.times[place].push(load_time(&server.log()));
                    loads.memory[place].push(used_memory(server));
                }
            }
        }
        let keys = self.keys;
        for ((_, how), loads) in LOADS.iter().zip(&loads) {
            self.report(&format!("{keys} leases are loaded {how}"), &loads.during);
            let what = format!("just after {keys} leases were loaded {how}");
            self.report(&what, &loads.after);
            let [own, plain] = &loads.times;
            self.page.line(format!(
                "  loading {keys} leases {how}: {:.2} s, {:.2} s without the module, {}x",
                median(own),
                median(plain),
                spread(&pairs(own, plain, |own, plain| own / plain)),
            ));
        }
        let [own, plain] = &loads[0].memory;
        let views = pairs(own, plain, |own, plain| own - plain);
        self.memory(server, median(&views) / keys as f64);
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
            "  memory of a leased key: {keyspace:.0} bytes in the keyspace, {view:.0} in the view"
        ));
        self.page.bar("view", view, VIEW_BYTES, " bytes");
        self.page
            .bar("leased key", keyspace + view, KEY_BYTES, " bytes");
    }
}

/// Does the work with the probe at the server; then lets it watch the other one as long, which
/// does those writes.
fn both(
    server: &Server,
    other: &Server,
    stalls: &mut Stalls,
    work: impl FnOnce(),
    writes: impl IntoIterator<Item = Vec<u8>>,
) {
    let start = Instant::now();
    stalls.add(0, stall_of(server.port, work));
    let took = start.elapsed();
    let mut link = Link::open(other.port);
    let plain = stall_of(other.port, || {
        let start = Instant::now();
        link.run(writes);
        sleep(took.saturating_sub(start.elapsed()));
    });
    stalls.add(1, plain);
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
