//! What commands cost as the pool grows, at 10 to 100,000 accounts and 1,000 to
//! 1,000,000 keys, and how long the server stands still meanwhile.
//!
//! Sizes that are compared do the same work a call: a first use and a failover
//! write the lease and one counter, a rotation to another account writes it and
//! two, a page has ten rows. Each command has the time of a call as a client sees
//! it that waits for each answer (the median call's), the server's CPU time for a
//! call in pipelines, and the longest stall during such pipelines (see
//! common/probe.rs). Beside them stand those of plain Redis: the reads of a lease, and the
//! writes that a choice comes down to, over as many keys and accounts on a server without
//! the module. They show how much of any growth is the server's own, and the machine's
//! memory.
//!
//! All sizes are measured side by side, round after round, in one run; figures
//! are medians, with the least and the most beside them, and ratios are taken
//! within a round. Run it with `make bench`. In the environment:
//! - `MPOOL_BENCH_KEYS`, `MPOOL_BENCH_ACCOUNTS`: larger sizes are left out (1000000, 100000)
//! - `MPOOL_BENCH_ROUNDS`: 5
//! - `MPOOL_BENCH_CALLS`: of a command in a round, in pipelines (30000); a fifth
//!   of it one by one

mod common;

use common::page::{Bar, Page};
use common::probe::stall_of;
use common::support::{Client, DAY, Options, Server, wait_long};
use common::{
    Link, median, mix, pack, pairs, plain_lease, plain_slots, progress, range, registration,
    setting, short, spread,
};
use std::collections::BTreeMap;
use std::time::Duration;

/// How long setting up may take.
const PATIENCE: Duration = Duration::from_secs(300);
/// Takes keys out of the order in which they were made; prime to their number.
const SCATTER: usize = 7_919;
/// Between one key's rotation and the next one's, in ms.
const STEP: i64 = 80;
/// A cooldown that lasts until it is ended, in ms.
const COOLDOWN: &str = "3600000";

/// What the figures of the first size may grow to.
const FLAT: Bar = Bar::AtMost(1.2);
/// A stall of the module's making, in ms.
const STALL: Bar = Bar::AtMost(2.0);

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Op {
    Current,
    /// The key was released before, which is not measured.
    FirstUse,
    /// The lease's period is over.
    Rotation,
    /// The lease's account cools down, which is not measured.
    Failover,
    Release,
    Accounts,
    Leases,
    /// HMGET of two fields of a lease.
    Reads,
    /// What a choice writes, without the module.
    Writes,
}

impl Op {
    fn name(self) -> &'static str {
        match self {
            Self::Current => "ACQUIRE, current lease",
            Self::FirstUse => "ACQUIRE, first use",
            Self::Rotation => "ACQUIRE, rotation",
            Self::Failover => "ACQUIRE, failover",
            Self::Release => "RELEASE",
            Self::Accounts => "STATUS, 10 accounts",
            Self::Leases => "STATUS, 10 leases",
            Self::Reads => "plain HMGET",
            Self::Writes => "plain HSET and SET",
        }
    }

    fn is_plain(self) -> bool {
        matches!(self, Self::Reads | Self::Writes)
    }
}

#[derive(Clone, Copy)]
enum How {
    /// Time of a call, in ns; the median of each lot's calls.
    Awaited,
    /// CPU time of a call, in ns.
    Piped,
    /// The longest stall during pipelines, in ms.
    Watched,
}

const HOWS: [How; 3] = [How::Awaited, How::Piped, How::Watched];

/// A server, and who has it work.
struct Place {
    server: Server,
    link: Link,
}

impl Place {
    fn new(server: Server) -> Self {
        let link = Link::open(server.port);
        Self { server, link }
    }

    /// What the calls cost together, or the longest stall in them.
    fn cost(&mut self, how: How, calls: Vec<Vec<u8>>, replies: usize) -> f64 {
        let pid = self.server.pid();
        let link = &mut self.link;
        match how {
            How::Awaited => link.awaited_each(calls, replies),
            How::Piped => link.piped_each(pid, calls, replies),
            How::Watched => {
                stall_of(self.server.port, || {
                    link.piped_each(pid, calls, replies);
                })
                .own
            }
        }
    }
}

/// One size of pool, with servers of its own.
struct Cell {
    name: String,
    pool: Place,
    client: Client,
    /// Without the module: the same keys, written as a choice writes them.
    plain: Place,
    keys: Vec<String>,
    accounts: usize,
    slots: usize,
    /// Leases move on to other accounts when they rotate.
    moves: bool,
    /// How many keys have chosen so far, and when the last one did (unix ms).
    chosen: usize,
    now: i64,
    /// Each key's account, and where to look for the next ones to cool down;
    /// filled when failovers begin.
    held: Vec<String>,
    next_account: usize,
    /// An entry a round, in the order of [`HOWS`].
    figures: BTreeMap<Op, [Vec<f64>; HOWS.len()]>,
}

impl Cell {
    fn new(table: &Table, (accounts, keys): (usize, usize)) -> Self {
        let name = match table.by {
            By::Accounts => format!("{accounts} accounts"),
            By::Keys => format!("{keys} keys"),
        };
        progress(&format!("growth: setting up {name}"));
        let names: Vec<String> = (0..accounts).map(account_name).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let options = Options {
            patience: Some(PATIENCE),
            ..Options::default()
        };
        let options = options.accounts(&names);
        let server = options
            .module(&["slots-per-account", &table.slots.to_string()])
            .start();
        let bare = Options {
            bare: true,
            ..Options::default()
        };
        let mut client = server.connect();
        wait_long("the accounts", PATIENCE, || {
            (client.run::<usize>(&["DBSIZE"]) == accounts).then_some(())
        });
        let keys = (0..keys as u64).map(|n| format!("sk-cli-v1-{:064x}", mix(n)));
        let mut cell = Self {
            name,
            pool: Place::new(server),
            client,
            plain: Place::new(bare.start()),
            keys: keys.collect(),
            accounts,
            slots: table.slots,
            moves: table.moves,
            chosen: 0,
            now: 0,
            held: Vec::new(),
            next_account: 0,
            figures: BTreeMap::new(),
        };
        for place in [&mut cell.pool, &mut cell.plain] {
            let registrations = cell.keys.iter().map(|key| registration(key));
            place.link.run(registrations);
        }
        let leases = (0..cell.keys.len()).map(|n| acquire(cell.key(n), n as i64 * STEP));
        let leases: Vec<_> = leases.collect();
        let written: Vec<_> = cell
            .keys
            .iter()
            .zip(0..)
            .map(|(key, n)| cell.lease(key, n))
            .collect();
        let slots = (0..accounts).map(|n| plain_slots(&account_name(n), "1"));
        cell.plain.link.run(slots);
        cell.plain.link.run(written);
        cell.pool.link.run(leases);
        // What creating so many has left to do is not to be measured.
        cell.client.ok(&["MPOOL.REPAIR"]);
        cell
    }

    /// The key whose turn comes at this place of the order in which keys choose.
    fn key(&self, place: usize) -> &str {
        let keys = self.keys.len();
        &self.keys[place % keys * SCATTER % keys]
    }

    fn measure(&mut self, op: Op, calls: usize) {
        for (number, how) in HOWS.into_iter().enumerate() {
            let count = match (how, op) {
                (How::Awaited, _) => calls / 5,
                // A page is the work of many calls.
                (_, Op::Accounts | Op::Leases) => calls / 5,
                (How::Piped | How::Watched, _) => calls,
            };
            let sum = match op {
                Op::FirstUse | Op::Rotation | Op::Release => self.choosing(op, how, count),
                Op::Failover => self.failing_over(how, count),
                _ => self.one_lot(op, how, count),
            };
            let figure = match how {
                How::Watched => sum,
                How::Awaited | How::Piped => sum / count as f64,
            };
            self.figures.entry(op).or_default()[number].push(figure);
        }
    }

    /// Calls that change nothing of the pool.
    fn one_lot(&mut self, op: Op, how: How, count: usize) -> f64 {
        let keys = self.keys.len() as u64;
        let some = |n: u64| &self.keys[(mix(n) % keys) as usize];
        let now = self.now.to_string();
        let page = |list: &str| {
            let words = ["MPOOL.STATUS", list, "medium", "NOW", &now, "COUNT", "10"];
            pack(&words)
        };
        let call = |n: usize| match op {
            Op::Accounts => page("ACCOUNTS"),
            Op::Leases => page("LEASES"),
            Op::Reads => {
                let name = format!("key_rotation:{}", some(n as u64));
                pack(&["HMGET", &name, "account", "next_rotation"])
            }
            Op::Writes => self.plain_choice(some(n as u64), n),
            _ => acquire(some(n as u64), self.now),
        };
        let calls = (0..count).map(call).collect();
        match op {
            Op::Writes if self.moves => self.plain.cost(how, calls, 3),
            Op::Writes => self.plain.cost(how, calls, 2),
            _ => self.pool.cost(how, calls, 1),
        }
    }

    /// Has so many keys choose or be released, in the order in which they do.
    fn choosing(&mut self, op: Op, how: How, count: usize) -> f64 {
        let keys = self.keys.len();
        let mut total = 0.0;
        let mut left = count;
        while left > 0 {
            let batch = match op {
                Op::Rotation => left,
                _ => left.min(keys),
            };
            let places = self.chosen..self.chosen + batch;
            // Each key's time comes once a lap, and nobody else's with it.
            let now = |place: usize| (1 + place / keys) as i64 * DAY + (place % keys) as i64 * STEP;
            let acquires = places
                .clone()
                .map(|place| acquire(self.key(place), now(place)));
            let acquires: Vec<_> = acquires.collect();
            let releases = places.map(|place| pack(&["MPOOL.RELEASE", self.key(place)]));
            let releases: Vec<_> = releases.collect();
            self.chosen += batch;
            self.now = now(self.chosen - 1);
            let cost = match op {
                Op::Release => {
                    let cost = self.pool.cost(how, releases, 1);
                    self.pool.link.run(acquires);
                    cost
                }
                Op::FirstUse => {
                    self.pool.link.run(releases);
                    self.pool.cost(how, acquires, 1)
                }
                _ => self.pool.cost(how, acquires, 1),
            };
            total = how.add(total, cost);
            left -= batch;
        }
        total
    }

    /// Has so many keys lose their account and lend another.
    fn failing_over(&mut self, how: How, count: usize) -> f64 {
        if self.held.is_empty() {
            let all: Vec<usize> = (0..self.keys.len()).collect();
            self.held = self.accounts_of(&all);
        }
        let mut total = 0.0;
        let mut left = count;
        while left > 0 {
            let mut holders = BTreeMap::<&str, Vec<usize>>::new();
            for (number, account) in self.held.iter().enumerate() {
                holders.entry(account).or_default().push(number);
            }
            // The others must have slots for all.
            let full = self.keys.len().div_ceil(self.slots);
            let most = (self.accounts / 2).min(self.accounts - full - 1);
            let wanted = left.min(self.keys.len() / 2);
            let (mut lost, mut losers) = (Vec::new(), Vec::new());
            let start = self.next_account % holders.len();
            for (account, of) in holders
                .iter()
                .cycle()
                .skip(start)
                .take(holders.len().min(most))
            {
                if losers.len() >= wanted {
                    break;
                }
                lost.push((*account).to_owned());
                losers.extend_from_slice(of);
            }
            self.next_account += lost.len();
            let now = self.now.to_string();
            let cool =
                |account: &String, ms: &str| pack(&["MPOOL.COOLDOWN", "medium", account, &now, ms]);
            self.pool
                .link
                .run(lost.iter().map(|account| cool(account, COOLDOWN)));
            let calls = losers.iter().map(|&key| acquire(&self.keys[key], self.now));
            let mut calls: Vec<_> = calls.collect();
            let rest = calls.split_off(left.min(calls.len()));
            left -= calls.len();
            let cost = self.pool.cost(how, calls, 1);
            total = how.add(total, cost);
            self.pool.link.run(rest);
            self.pool
                .link
                .run(lost.iter().map(|account| cool(account, "0")));
            for (place, account) in losers.iter().zip(self.accounts_of(&losers)) {
                assert!(
                    !lost.contains(&account),
                    "a lease of an account that cools down"
                );
                self.held[*place] = account;
            }
        }
        total
    }

    fn accounts_of(&mut self, keys: &[usize]) -> Vec<String> {
        let mut found = Vec::new();
        for some in keys.chunks(10_000) {
            let mut pipe = redis::pipe();
            for &key in some {
                pipe.hget(format!("key_rotation:{}", self.keys[key]), "account");
            }
            let accounts: Vec<String> = pipe.query(&mut self.client.connection).unwrap();
            found.extend(accounts);
        }
        found
    }

    /// The writes of a choice.
    fn plain_choice(&self, key: &str, n: usize) -> Vec<u8> {
        let mut writes = self.lease(key, n);
        writes.extend(plain_slots(&self.account(n), "1"));
        if self.moves {
            writes.extend(plain_slots(&self.account(n + 1), "0"));
        }
        writes
    }

    fn lease(&self, key: &str, n: usize) -> Vec<u8> {
        let (new, old) = (self.account(n), self.account(n + 1));
        let now = n.to_string();
        plain_lease(key, [&new, &old], &now, &now)
    }

    fn account(&self, n: usize) -> String {
        account_name(mix(n as u64) as usize % self.accounts)
    }
}

impl How {
    fn add(self, total: f64, figure: f64) -> f64 {
        match self {
            Self::Awaited | Self::Piped => total + figure,
            Self::Watched => total.max(figure),
        }
    }
}

fn account_name(number: usize) -> String {
    format!("account-{number:06}")
}

fn acquire(key: &str, now: i64) -> Vec<u8> {
    pack(&["MPOOL.ACQUIRE", key, &now.to_string()])
}

#[derive(Clone, Copy)]
enum By {
    Accounts,
    Keys,
}

/// Sizes that are compared: accounts and keys, of which one varies.
struct Table {
    what: &'static str,
    by: By,
    sizes: [(usize, usize); 3],
    slots: usize,
    moves: bool,
    ops: &'static [Op],
}

/// Failovers are last: they leave accounts behind that are not used alike, and
/// leases that fall due out of turn.
const EVERY_OP: [Op; 9] = [
    Op::Rotation,
    Op::Writes,
    Op::Reads,
    Op::Current,
    Op::FirstUse,
    Op::Release,
    Op::Accounts,
    Op::Leases,
    Op::Failover,
];

const TABLES: [Table; 3] = [
    Table {
        what: "by accounts: 10, 1,000, 100,000, with 1,000 keys",
        by: By::Accounts,
        sizes: [(10, 1_000), (1_000, 1_000), (100_000, 1_000)],
        slots: 256,
        moves: false,
        // With few keys, how a rotation ends depends on the number of accounts.
        ops: EVERY_OP.split_at(1).1,
    },
    Table {
        what: "by accounts: 10, 1,000, 100,000, with 4 keys that rotate to other accounts",
        by: By::Accounts,
        sizes: [(10, 4), (1_000, 4), (100_000, 4)],
        slots: 2,
        moves: true,
        ops: &[Op::Writes, Op::Rotation],
    },
    Table {
        what: "by keys: 1,000, 100,000, 1,000,000, with 1,000 accounts",
        by: By::Keys,
        sizes: [(1_000, 1_000), (1_000, 100_000), (1_000, 1_000_000)],
        slots: 1_024,
        moves: false,
        ops: &EVERY_OP,
    },
];

fn main() {
    let rounds: usize = setting("ROUNDS", 5);
    let calls: usize = setting("CALLS", 30_000);
    let (accounts, keys) = (setting("ACCOUNTS", 100_000), setting("KEYS", 1_000_000));
    let mut page = Page::new("Growth", &[]);
    page.line(format!(
        "medians of {rounds} rounds; beside the smallest size's figure the other sizes' ratios to it, in order (least-most of the last one's)"
    ));
    for table in &TABLES {
        let sizes = table.sizes.into_iter();
        let sizes = sizes.filter(|size| size.0 <= accounts && size.1 <= keys);
        let mut cells: Vec<Cell> = sizes.map(|size| Cell::new(table, size)).collect();
        if cells.is_empty() {
            continue;
        }
        for is_last in [false, true] {
            for round in 1..=rounds {
                progress(&format!("growth: round {round} of {rounds}"));
                let ops = table.ops.iter().copied();
                for op in ops.filter(|op| (*op == Op::Failover) == is_last) {
                    cells.iter_mut().for_each(|cell| cell.measure(op, calls));
                }
            }
        }
        page.table("");
        page.line(format!("  {}", table.what));
        for op in table.ops {
            print(&mut page, *op, &cells);
        }
        print_stalls(&mut page, table, &cells);
    }
    page.save();
}

fn print(page: &mut Page, op: Op, cells: &[Cell]) {
    let figures = |cell: &Cell, how: How| cell.figures[&op][how as usize].clone();
    let ratios = |cell: &Cell, how: How| {
        let (own, first) = (figures(cell, how), figures(&cells[0], how));
        pairs(&own, &first, |own, first| own / first)
    };
    for cell in cells {
        let part = |how: How| {
            let own: Vec<f64> = figures(cell, how).iter().map(|ns| ns / 1e3).collect();
            format!(
                "{:>20} us {:>17}x",
                spread(&own),
                spread(&ratios(cell, how))
            )
        };
        page.table(format!(
            "    {:<24}{:<18}time{} CPU time{} stall{:>18} ms",
            op.name(),
            cell.name,
            part(How::Awaited),
            part(How::Piped),
            spread(&figures(cell, How::Watched)),
        ));
    }
    let mut growth: f64 = 1.0;
    let mut part = |how: How| {
        let first = short(median(&figures(&cells[0], how)) / 1e3);
        let mut text = format!("{first:>6} us");
        for cell in &cells[1..] {
            let ratio = median(&ratios(cell, how));
            growth = growth.max(ratio);
            text += &format!(" {ratio:.2}x");
        }
        match cells {
            [_, .., last] => text + &format!(" {:<12}", range(&ratios(last, how))),
            _ => text,
        }
    };
    let (time, cpu) = (part(How::Awaited), part(How::Piped));
    let stalls = cells
        .iter()
        .map(|cell| short(median(&figures(cell, How::Watched))));
    let stalls: Vec<String> = stalls.collect();
    let verdict = if op.is_plain() || cells.len() == 1 {
        String::new()
    } else {
        format!("; {}", FLAT.judge(growth, "x"))
    };
    page.line(format!(
        "    {:<23}time {time} CPU time {cpu} stall {} ms{verdict}",
        op.name(),
        stalls.join(" "),
    ));
}

/// The longest stall of any command, without what plain writes have in the same round.
fn print_stalls(page: &mut Page, table: &Table, cells: &[Cell]) {
    let stalls = |cell: &Cell, op: Op| cell.figures[&op][How::Watched as usize].clone();
    let ops = table.ops.iter().filter(|op| !op.is_plain());
    let longest = ops
        .flat_map(|op| cells.iter().map(move |cell| (*op, cell)))
        .map(|(op, cell)| {
            let (own, plain) = (stalls(cell, op), stalls(cell, Op::Writes));
            let added = median(&pairs(&own, &plain, |own, plain| own - plain));
            (added, format!("{}, {}", op.name(), cell.name))
        })
        .max_by(|one, other| one.0.total_cmp(&other.0));
    if let Some((added, whose)) = longest {
        let verdict = STALL.judge(added, " ms");
        page.line(format!(
            "    longest stall of the module's making ({whose}): {verdict}"
        ));
    }
}
