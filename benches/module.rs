//! What the module's commands cost beside what else one could do: PING, HMGET of
//! two fields, a module command that answers with the same map and does nothing
//! (the ceiling), and the same pool as a Lua script (`peer.lua`).
//!
//! All are measured in turn, round after round, in one run; a figure is the
//! median of the rounds, with the least and the most, and what counts are the
//! ratios of a round's figures. Time is a client's that waits for each answer, the
//! median call's; CPU is the server's main thread's, for calls in pipelines of 32.
//! Run it with `make bench`; `MPOOL_BENCH_ROUNDS` (7) is how many rounds there are.

mod common;

use common::page::{Bar, Page};
use common::support::{DAY, Options, Server};
use common::{
    Link, extreme, median, mix, pack, plain_slots, progress, range, registration, setting, spread,
};
use redis::Value;
use std::path::Path;

const KEYS: usize = 1_000;
const ACCOUNTS: usize = 1_000;
/// So many that no account is ever full.
const SLOTS: &str = "16";
const PIPED: usize = 40_000;
const AWAITED: usize = 10_000;

/// One way to have a pool.
struct Side {
    server: Server,
    link: Link,
    /// The script's digest; none: the module.
    script: Option<String>,
}

impl Side {
    fn module(accounts: &[&str]) -> Self {
        let options = Options::default().accounts(accounts);
        let server = options.module(&["slots-per-account", SLOTS]).start();
        let link = Link::open(server.port);
        Self {
            server,
            link,
            script: None,
        }
    }

    fn peer(accounts: &[&str]) -> Self {
        let options = Options {
            bare: true,
            ..Options::default()
        };
        let server = options.start();
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peer.lua");
        let text = std::fs::read_to_string(path).unwrap();
        let script = server.connect().run(&["SCRIPT", "LOAD", &text]);
        let mut link = Link::open(server.port);
        for account in accounts {
            link.run([plain_slots(account, "0")]);
            link.run([pack(&["ZADD", "peer:by_use", "0", account])]);
        }
        Self {
            server,
            link,
            script: Some(script),
        }
    }

    fn register(&mut self, keys: &[String]) {
        self.link.run(keys.iter().map(|key| registration(key)));
    }

    /// A command of the pool's, as this side has it.
    fn call(&self, command: &Command<'_>) -> Vec<u8> {
        let day = DAY.to_string();
        match (&self.script, command) {
            (None, Command::Acquire(key, now)) => pack(&["MPOOL.ACQUIRE", key, &now.to_string()]),
            (None, Command::Release(key)) => pack(&["MPOOL.RELEASE", key]),
            (None, Command::Cool(account, now, ms)) => {
                let (now, ms) = (now.to_string(), ms.to_string());
                pack(&["MPOOL.COOLDOWN", "medium", account, &now, &ms])
            }
            (None, Command::Page) => pack(&[
                "MPOOL.STATUS",
                "ACCOUNTS",
                "medium",
                "NOW",
                "0",
                "COUNT",
                "100",
            ]),
            (Some(script), command) => {
                let words: Vec<String> = match command {
                    Command::Acquire(key, now) => vec![
                        "acquire".into(),
                        (*key).into(),
                        now.to_string(),
                        SLOTS.into(),
                        day,
                    ],
                    Command::Release(key) => vec!["release".into(), (*key).into()],
                    Command::Cool(account, now, ms) => vec![
                        "cooldown".into(),
                        (*account).into(),
                        now.to_string(),
                        ms.to_string(),
                    ],
                    Command::Page => vec!["status".into(), "100".into()],
                };
                let mut all = vec!["EVALSHA", script, "0"];
                all.extend(words.iter().map(String::as_str));
                pack(&all)
            }
        }
    }

    fn calls<'a>(&self, commands: impl IntoIterator<Item = Command<'a>>) -> Vec<Vec<u8>> {
        let commands = commands.into_iter();
        commands.map(|command| self.call(&command)).collect()
    }

    /// Time and CPU time of a call, in ns.
    fn measure(&mut self, awaited: Vec<Vec<u8>>, piped: Vec<Vec<u8>>) -> [f64; 2] {
        let (waits, pipes) = (awaited.len() as f64, piped.len() as f64);
        let pid = self.server.pid();
        [
            self.link.awaited(awaited) / waits,
            self.link.piped(pid, piped) / pipes,
        ]
    }
}

#[derive(Clone, Copy)]
enum Command<'a> {
    Acquire(&'a str, i64),
    Release(&'a str),
    Cool(&'a str, i64, i64),
    Page,
}

/// A contender's figures, a round each: time and CPU time, in ns.
struct Row {
    name: &'static str,
    figures: [Vec<f64>; 2],
}

/// Contenders that do the same; the first is what the others are measured by.
struct Table {
    what: &'static str,
    rows: Vec<Row>,
}

impl Table {
    fn new(what: &'static str, names: &[&'static str]) -> Self {
        let rows = names.iter().map(|name| Row {
            name,
            figures: Default::default(),
        });
        Self {
            what,
            rows: rows.collect(),
        }
    }

    fn add(&mut self, row: usize, figures: [f64; 2]) {
        for (list, figure) in self.rows[row].figures.iter_mut().zip(figures) {
            list.push(figure);
        }
    }

    fn print(&self, page: &mut Page) {
        page.table("");
        page.table(self.what);
        for row in &self.rows {
            let mut line = format!("  {:<30}", row.name);
            for (own, ratios) in row.figures.iter().zip(self.ratios(row)) {
                line += &format!(
                    "{:>8.2} us{:>7.2}x ({:.2}-{:.2})",
                    median(own) / 1e3,
                    median(&ratios),
                    extreme(&ratios, f64::min),
                    extreme(&ratios, f64::max),
                );
            }
            page.table(line);
        }
    }

    /// The row's figures as multiples of the first row's, round by round.
    fn ratios(&self, row: &Row) -> [Vec<f64>; 2] {
        std::array::from_fn(|number| {
            let first = self.rows[0].figures[number].iter();
            let pairs = row.figures[number].iter().zip(first);
            pairs.map(|(own, first)| own / first).collect()
        })
    }

    /// A line for what a row costs as a multiple of the first row's; its CPU time
    /// in pipelines is held to the bar, if there is one.
    fn compare(&self, page: &mut Page, name: &str, bar: Option<Bar>) {
        let row = self.rows.iter().find(|row| row.name == name).unwrap();
        let [times, cpu] = self.ratios(row);
        let what = format!("{}: {name}, of mpool's", self.what);
        let verdict = match bar {
            Some(bar) => bar.judge(median(&cpu), "x"),
            None => format!("{:.2}x", median(&cpu)),
        };
        page.line(format!(
            "  {what:<70} CPU time {verdict} {}, time {}x",
            range(&cpu),
            spread(&times),
        ));
    }
}

struct Bench {
    keys: Vec<String>,
    accounts: Vec<String>,
    sides: [Side; 2],
    /// The latest instant that either side has seen.
    now: i64,
    turn: u64,
}

impl Bench {
    fn new() -> Self {
        let accounts: Vec<String> = (0..ACCOUNTS).map(|n| format!("account-{n:06}")).collect();
        let names: Vec<&str> = accounts.iter().map(String::as_str).collect();
        let keys: Vec<String> = (0..KEYS)
            .map(|n| format!("sk-cli-v1-{:064x}", mix(n as u64)))
            .collect();
        let mut sides = [Side::module(&names), Side::peer(&names)];
        for side in &mut sides {
            side.register(&keys);
        }
        sides[0].server.connect().ok(&["MPOOL.REPAIR"]);
        let mut bench = Self {
            keys,
            accounts,
            sides,
            now: 1_755_266_400_000,
            turn: 0,
        };
        // From the first rotation on each lease has a previous account.
        bench.lend_all();
        bench.now += DAY + 3;
        bench.lend_all();
        bench.check_ceiling();
        bench
    }

    /// The ceiling answers with the very map that a current lease does, byte for
    /// byte as long.
    fn check_ceiling(&self) {
        let mut client = self.sides[0].server.connect();
        let now = self.now.to_string();
        let [acquired, ceiling] = ["MPOOL.ACQUIRE", "MPOOL.CEILING"].map(|command| {
            let reply: Vec<Value> = client.run(&[command, &self.keys[0], &now]);
            reply.iter().map(form).collect::<Vec<_>>()
        });
        assert_eq!(acquired, ceiling);
    }

    /// Keys in a scattered order.
    fn some_keys(&mut self, count: usize) -> Vec<String> {
        self.turn += 1;
        let start = self.turn * 1_000_003;
        let key = |n| self.keys[(mix(start + n) % KEYS as u64) as usize].clone();
        (0..count as u64).map(key).collect()
    }

    /// Has each key lend, so that it has a current lease.
    fn lend_all(&mut self) {
        for side in &mut self.sides {
            let calls = side.calls(self.keys.iter().map(|key| Command::Acquire(key, self.now)));
            side.link.run(calls);
        }
    }

    fn current(&mut self, table: &mut Table) {
        self.lend_all();
        let (waits, pipes) = (self.some_keys(AWAITED), self.some_keys(PIPED));
        let now = self.now;
        for place in 0..table.rows.len() {
            let side = &mut self.sides[usize::from(table.rows[place].name == LUA)];
            let call = |side: &Side, key: &str| match place {
                0 | 4 => side.call(&Command::Acquire(key, now)),
                1 => pack(&["MPOOL.CEILING", key, &now.to_string()]),
                2 => {
                    let name = format!("key_rotation:{key}");
                    pack(&["HMGET", &name, "account", "next_rotation"])
                }
                _ => pack(&["PING"]),
            };
            let awaited = waits.iter().map(|key| call(side, key)).collect();
            let piped = pipes.iter().map(|key| call(side, key)).collect();
            let figures = side.measure(awaited, piped);
            table.add(place, figures);
        }
    }

    /// Laps over all keys, in which each side prepares (which is not measured)
    /// and then runs one command for each key: half of them one by one.
    fn laps(&mut self, table: &mut Table, work: &Work) {
        let mut sums = [[0.0; 2]; 2];
        for _ in 0..work.laps {
            self.now += DAY + 3;
            let at = |place: usize| self.now + place as i64 * STEP;
            for (side, sums) in self.sides.iter_mut().zip(&mut sums) {
                let before = (work.prepare)(&self.keys, &self.accounts, self.now - 2);
                let calls = side.calls(before);
                side.link.run(calls);
                let commands = self.keys.iter().enumerate();
                let calls = commands.map(|(place, key)| (work.command)(key, at(place)));
                let mut calls = side.calls(calls);
                let piped = calls.split_off(KEYS / 2);
                for (sum, figure) in sums.iter_mut().zip(side.measure(calls, piped)) {
                    *sum += figure / work.laps as f64;
                }
            }
        }
        for (row, sums) in sums.into_iter().enumerate() {
            table.add(row, sums);
        }
    }
}

/// Between one key's turn and the next one's, in ms: each rotates at its own time.
const STEP: i64 = 80;

struct Work {
    laps: usize,
    prepare: for<'a> fn(&'a [String], &'a [String], i64) -> Vec<Command<'a>>,
    command: for<'a> fn(&'a str, i64) -> Command<'a>,
}

fn nothing<'a>(_: &'a [String], _: &'a [String], _: i64) -> Vec<Command<'a>> {
    Vec::new()
}

fn release_all<'a>(keys: &'a [String], _: &'a [String], _: i64) -> Vec<Command<'a>> {
    keys.iter().map(|key| Command::Release(key)).collect()
}

fn lend_all<'a>(keys: &'a [String], _: &'a [String], now: i64) -> Vec<Command<'a>> {
    keys.iter().map(|key| Command::Acquire(key, now)).collect()
}

/// All are lent, and all accounts cool down for a moment.
fn lose_all<'a>(keys: &'a [String], accounts: &'a [String], now: i64) -> Vec<Command<'a>> {
    let mut all = lend_all(keys, accounts, now);
    all.extend(
        accounts
            .iter()
            .map(|account| Command::Cool(account, now, 1)),
    );
    all
}

/// What a value costs to answer with: its kind and its length.
fn form(value: &Value) -> (&'static str, usize) {
    match value {
        Value::BulkString(bytes) => ("text", bytes.len()),
        Value::Int(number) => ("number", number.to_string().len()),
        Value::Nil => ("null", 0),
        other => panic!("{other:?} is no value of a lease's"),
    }
}

const HMGET: &str = "HMGET of two fields";
const PING: &str = "PING";
const LUA: &str = "Lua peer";
const CEILING: &str = "ceiling: the same map alone";
/// How the tables of an ACQUIRE that must choose begin.
const CHOOSES: &str = "ACQUIRE that chooses";
const BOTH: [&str; 2] = ["mpool", LUA];

fn main() {
    let mut bench = Bench::new();
    let mut current = Table::new(
        "ACQUIRE of a current lease",
        &["mpool", CEILING, HMGET, PING, LUA],
    );
    let mut others = [
        (
            Table::new("ACQUIRE that chooses: first use", &BOTH),
            Work {
                laps: 10,
                prepare: release_all,
                command: |key, now| Command::Acquire(key, now),
            },
        ),
        (
            Table::new("ACQUIRE that chooses: rotation", &BOTH),
            Work {
                laps: 10,
                prepare: nothing,
                command: |key, now| Command::Acquire(key, now),
            },
        ),
        (
            Table::new("ACQUIRE that chooses: failover", &BOTH),
            Work {
                laps: 2,
                prepare: lose_all,
                command: |key, now| Command::Acquire(key, now),
            },
        ),
        (
            Table::new("RELEASE", &BOTH),
            Work {
                laps: 10,
                prepare: lend_all,
                command: |key, _| Command::Release(key),
            },
        ),
        (
            Table::new("STATUS, a page of 100 accounts", &BOTH),
            Work {
                laps: 2,
                prepare: nothing,
                command: |_, _| Command::Page,
            },
        ),
    ];
    let rounds: usize = setting("ROUNDS", 7);
    for round in 1..=rounds {
        progress(&format!("module: round {round} of {rounds}"));
        bench.current(&mut current);
        for (table, work) in &mut others {
            bench.laps(table, work);
        }
    }
    let mut page = Page::new("Commands of the module", &[]);
    page.line(format!(
        "{KEYS} keys, {ACCOUNTS} accounts; medians of {rounds} rounds (least-most) of what the others cost as multiples of mpool's"
    ));
    page.table(format!(
        "  {:<30}{:<34}pipelines of 32: server's CPU time",
        "", "   each answer awaited: time"
    ));
    current.print(&mut page);
    current.compare(&mut page, CEILING, Some(Bar::AtLeast(0.9)));
    current.compare(&mut page, HMGET, None);
    current.compare(&mut page, PING, None);
    current.compare(&mut page, LUA, Some(Bar::AtLeast(4.0)));
    for (table, _) in &others {
        table.print(&mut page);
        let chooses = table.what.starts_with(CHOOSES);
        table.compare(&mut page, LUA, chooses.then_some(Bar::AtLeast(3.0)));
    }
    page.save();
}
