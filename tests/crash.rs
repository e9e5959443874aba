//! Servers that are killed while clients are at work, and started again on what
//! they have left behind: what they have told is still true, as far as their
//! persistence promises; what they hold agrees with itself, and every slot that
//! nobody holds can be lent.
//!
//! `MPOOL_CRASH_ROUNDS` says how often (8). A round follows from its seed, which
//! is printed: `MPOOL_TEST_SEED=… MPOOL_CRASH_ROUNDS=1` has it again. What each
//! client sends is the same then, and the kill comes after as many replies; how
//! the clients' commands mingle is the machine's affair.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop anywhere"
)]

mod support;

use rand::{RngExt, SeedableRng, rngs::SmallRng};
use redis::{RedisResult, Value};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use support::load::{
    BEGIN, Shared, Shift, Worker, check_every_slot, check_strangers, hold_to_account,
};
use support::*;

const CLIENTS: u64 = 6;
const ACCOUNTS: [&str; 6] = ["a", "b", "c", "d", COOLED, VANISHING];
/// The account that the operator cools down.
const COOLED: &str = "cooled";
/// The account whose file the operator removes.
const VANISHING: &str = "vanishing";
/// Kills of a round, each on what the one before has left.
const KILLS: usize = 2;

/// A way to persist.
struct Mode {
    name: &'static str,
    settings: &'static [&'static str],
    /// What the operator asks for now and then.
    background: &'static str,
    /// Every reply must be true after a kill.
    lossless: bool,
    /// The end of the file is lost too, as when the machine loses its power.
    power_cut: bool,
}

const MODES: [Mode; 4] = [
    Mode {
        name: "AOF, appendfsync always",
        settings: &[
            "--appendonly",
            "yes",
            "--appendfsync",
            "always",
            "--aof-use-rdb-preamble",
            "no",
        ],
        background: "MPOOL.STATUS",
        lossless: true,
        power_cut: false,
    },
    Mode {
        name: "AOF, appendfsync everysec",
        settings: &["--appendonly", "yes", "--appendfsync", "everysec"],
        background: "MPOOL.STATUS",
        lossless: false,
        power_cut: true,
    },
    Mode {
        name: "RDB",
        settings: &["--save", "1 1"],
        background: "BGSAVE",
        lossless: false,
        power_cut: false,
    },
    Mode {
        name: "AOF with RDB preamble, rewritten",
        settings: &[
            "--appendonly",
            "yes",
            "--appendfsync",
            "always",
            "--aof-use-rdb-preamble",
            "yes",
        ],
        background: "BGREWRITEAOF",
        lossless: true,
        power_cut: false,
    },
];

type Counts = BTreeMap<String, u64>;

#[test]
fn a_killed_server_keeps_its_word() {
    let rounds = std::env::var("MPOOL_CRASH_ROUNDS").map_or(8, |rounds| rounds.parse().unwrap());
    let first = seed();
    let mut counts = Counts::new();
    for round in 0..rounds {
        let seed = first.wrapping_add(round);
        for (what, count) in crash(seed) {
            *counts.entry(what).or_default() += count;
        }
    }
    println!("{rounds} rounds: {counts:#?}");
    // Everything must have happened, or it was no test.
    for what in [
        "assigned",
        "current",
        "rotated",
        "failover",
        "POOLFULL",
        "released",
        "revoked",
        "REVOKED",
        "MPOOL.COOLDOWN",
        "MPOOL.RELOAD",
        "MPOOL.REPAIR",
        "BGSAVE",
        "BGREWRITEAOF",
        "told",
        "lost",
        "unanswered",
        "looked at without the module",
    ] {
        assert!(
            counts.get(what).is_some_and(|&count| count > 0) || rounds < 40,
            "{what} never happened: {counts:?}"
        );
    }
}

/// One round; answers what has happened how often.
fn crash(seed: u64) -> Counts {
    let mode = &MODES[(seed % MODES.len() as u64) as usize];
    println!("MPOOL_TEST_SEED={seed} MPOOL_CRASH_ROUNDS=1: {}", mode.name);
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut server = Options::default()
        .accounts(&ACCOUNTS)
        .server(mode.settings)
        .start();
    // A new server has its accounts' counters to write, which a REPAIR that comes
    // before all else would count.
    for account in ACCOUNTS {
        server.connect().wait_for_account(account, true);
    }
    let mut workers: Vec<Worker> = (0..CLIENTS).map(|_| Worker::new(rng.random(), 0)).collect();
    let mut operator = Operator::new(mode, &server, &mut rng);
    let mut counts = Counts::new();
    let shared = Shared::new(&[COOLED, VANISHING]);
    let mut safe = 0;
    for _ in 0..KILLS {
        let (shift, told) = Shift::new(rng.random_range(10..1500));
        let clients: Vec<Client> = workers.iter().map(|_| server.connect()).collect();
        let control = server.connect();
        std::thread::scope(|scope| {
            let (shared, shift) = (&shared, &shift);
            for (worker, client) in workers.iter_mut().zip(clients) {
                scope.spawn(move || worker.work(client, shared, shift));
            }
            let operator = &mut operator;
            scope.spawn(move || operator.work(control, shared, shift));
            let reached = told.recv_timeout(PATIENCE);
            server.kill();
            reached.unwrap();
        });
        if mode.power_cut {
            cut_the_end_off(&server, safe, &mut rng);
        }
        // What is on the disk, before the module could mend it.
        if rng.random_bool(0.5) {
            server.set_bare(true);
            server.launch();
            server.connect().check_invariants(2);
            server.kill();
            server.set_bare(false);
            *counts
                .entry("looked at without the module".into())
                .or_default() += 1;
        }
        server.launch();
        let mut client = server.connect();
        client.check_invariants(2);
        if mode.power_cut {
            rewrite(&mut client);
        }
        if mode.lossless && !operator.touches_files {
            // Nothing may be left for a command to put right first.
            client.check_repair();
        }
        let strangers = check_strangers(&mut workers, &[], &mut client);
        let loss = hold_to_account(&mut workers, &mut client, &shared);
        assert!(!mode.lossless || loss.lost == 0, "{loss:?}");
        operator.check_cooldown(&mut client, mode);
        operator.put_back(&mut client);
        client.check_repair();
        check_every_slot(&workers, &mut client, &shared, 2 * ACCOUNTS.len());
        assert!(server.is_alive());
        // The clients don't know of the checks, which are not to be lost, then.
        match mode.background {
            "BGSAVE" => client.ok(&["SAVE"]),
            _ => wait_for("everything to be written", || {
                (client.info("persistence", "aof_buffer_length") == "0").then_some(())
            }),
        }
        safe = if mode.power_cut {
            append_only_file(&server).metadata().unwrap().len()
        } else {
            0
        };
        for (what, count) in [
            ("told", loss.told),
            ("lost", loss.lost),
            ("unanswered", loss.unanswered + strangers),
        ] {
            *counts.entry(what.into()).or_default() += count as u64;
        }
    }
    for other in workers
        .into_iter()
        .map(|worker| worker.counts)
        .chain([operator.counts])
    {
        for (what, count) in other {
            *counts.entry(what).or_default() += count;
        }
    }
    counts
}

/// Has the append-only file written anew. Redis leaves a transaction that was cut
/// amid a command in the file without its EXEC, and what is written next would
/// be taken for the rest of it at the next start (valkey-io/valkey#4342).
fn rewrite(client: &mut Client) {
    client.ok(&["BGREWRITEAOF"]);
    wait_for("the rewrite", || {
        let mut waits = ["aof_rewrite_in_progress", "aof_rewrite_scheduled"].into_iter();
        let over = waits.all(|name| client.info("persistence", name) == "0");
        over.then_some(())
    });
    assert_eq!(
        client.info("persistence", "aof_last_bgrewrite_status"),
        "ok"
    );
}

/// The one file that grows, once those before it are gone.
fn append_only_file(server: &Server) -> fs::File {
    let folder = server.folder.path().join("data/appendonlydir");
    let path = wait_for("one file that grows", || {
        let files = fs::read_dir(&folder)
            .unwrap()
            .map(|entry| entry.unwrap().path());
        let grows = |path: &PathBuf| path.to_string_lossy().ends_with(".incr.aof");
        let mut files = files.filter(grows);
        files.next().filter(|_| files.next().is_none())
    });
    fs::OpenOptions::new().write(true).open(path).unwrap()
}

/// Cuts the append-only file anywhere after that length.
fn cut_the_end_off(server: &Server, safe: u64, rng: &mut SmallRng) {
    let file = append_only_file(server);
    let length = file.metadata().unwrap().len();
    file.set_len(rng.random_range(safe..=length)).unwrap();
}

/// Who takes accounts out of the pool, and sees to the server.
struct Operator {
    rng: SmallRng,
    now: i64,
    background: &'static str,
    touches_files: bool,
    file: PathBuf,
    /// What the end of the cooldown has been, and will be.
    cooldowns: Vec<Option<i64>>,
    /// The last of them is without an answer.
    is_open: bool,
    counts: Counts,
}

impl Operator {
    fn new(mode: &Mode, server: &Server, rng: &mut SmallRng) -> Self {
        Self {
            rng: SmallRng::seed_from_u64(rng.random()),
            now: BEGIN,
            background: mode.background,
            touches_files: rng.random_bool(0.5),
            file: server.account_file(&format!("medium/{VANISHING}")),
            cooldowns: vec![None],
            is_open: false,
            counts: Counts::new(),
        }
    }

    fn work(&mut self, mut client: Client, shared: &Shared, shift: &Shift) {
        loop {
            match self.step(&mut client, shared) {
                Ok(()) => shift.count(),
                Err(error) => return assert!(error.code().is_none(), "{error}"),
            }
        }
    }

    fn step(&mut self, client: &mut Client, shared: &Shared) -> RedisResult<()> {
        self.now += DAY / 40;
        shared.latest.fetch_max(self.now, Ordering::SeqCst);
        match self.rng.random_range(0..100) {
            0..30 => {
                let ms = if self.rng.random_bool(0.4) {
                    0
                } else {
                    self.rng.random_range(1..DAY)
                };
                self.cool(ms, client)
            }
            30..50 if self.touches_files => {
                // Read by the watcher too, which may come in between.
                let _ = fs::remove_file(&self.file);
                if self.rng.random_bool(0.5) {
                    fs::write(&self.file, bearer(VANISHING)).unwrap();
                }
                self.ask(&["MPOOL.RELOAD"], client)
            }
            50..60 => self.ask(&["MPOOL.RELOAD"], client),
            60..70 => {
                let repair: BTreeMap<String, i64> = client.try_run(&["MPOOL.REPAIR"])?;
                assert_eq!(repair["changed"], 0, "{repair:?}");
                self.count("MPOOL.REPAIR");
                Ok(())
            }
            _ => match self.ask(&[self.background], client) {
                // One is under way already, which is as good.
                Err(error) if error.code() == Some("ERR") => Ok(()),
                outcome => outcome,
            },
        }
    }

    fn count(&mut self, what: &str) {
        *self.counts.entry(what.to_owned()).or_default() += 1;
    }

    fn ask(&mut self, words: &[&str], client: &mut Client) -> RedisResult<()> {
        client.try_run::<Value>(words)?;
        self.count(words[0]);
        Ok(())
    }

    fn cool(&mut self, ms: i64, client: &mut Client) -> RedisResult<()> {
        let (now, length) = (self.now.to_string(), ms.to_string());
        self.cooldowns.push((ms > 0).then_some(self.now + ms));
        self.is_open = true;
        let words = [
            "MPOOL.COOLDOWN",
            "medium",
            COOLED,
            &now,
            &length,
            "REASON",
            "429",
        ];
        self.ask(&words, client)?;
        self.is_open = false;
        Ok(())
    }

    #[track_caller]
    fn check_cooldown(&self, client: &mut Client, mode: &Mode) {
        let seen: Option<i64> = client.run(&["GET", &format!("medium_pool:cooldown:{COOLED}")]);
        let may_be = if mode.lossless {
            self.cooldowns.len() - 1 - usize::from(self.is_open)
        } else {
            0
        };
        assert!(
            self.cooldowns[may_be..].contains(&seen),
            "{seen:?} of {:?}",
            self.cooldowns
        );
    }

    /// Makes every account usable.
    fn put_back(&mut self, client: &mut Client) {
        fs::write(&self.file, bearer(VANISHING)).unwrap();
        client.ok(&["MPOOL.RELOAD"]);
        self.cool(0, client).unwrap();
        self.cooldowns.drain(..self.cooldowns.len() - 1);
    }
}
