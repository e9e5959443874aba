//! What ACQUIRE costs as the pool grows: for a current lease and for one that
//! must choose, at 10 to 100,000 accounts and 1,000 to 1,000,000 keys.
//!
//! Sizes that are compared do the same work a call: a first use writes the
//! lease and one counter, a rotation that moves on writes it and two. Each has
//! three kinds of figures, with their ratio to the smallest size: the time of a
//! call as a client sees it that waits for each answer, the server's CPU time
//! for a call in pipelines, and beside it that of the plain Redis writes which
//! a choice comes down to, over as many keys. The last one shows how much of
//! any growth is the machine's memory.
//!
//! All sizes are measured side by side, round after round, in one run; figures
//! are medians, with the least and the most beside them. Run it with `make bench`.

mod common;

use common::page::{Bar, Page};
use common::support::{DAY, Options, Server};
use common::{Link, extreme, median, mix, pack};

const ROUNDS: usize = 7;
/// Calls of a round, in pipelines and one by one.
const PIPED: usize = 60_000;
const AWAITED: usize = 20_000;
/// Takes keys out of the order in which they were made; prime to their number.
const SCATTER: usize = 7_919;
/// Between one key's rotation and the next one's, in ms.
const STEP: i64 = 80;

/// What makes a key choose.
#[derive(Clone, Copy)]
enum Work {
    /// It was released before (which is not measured): one counter changes.
    FirstUse,
    /// Its period is over, and there are accounts with fewer slots in use than
    /// its own: two counters change.
    Rotation,
}

/// One size of pool, with a server of its own.
struct Cell {
    name: &'static str,
    server: Server,
    link: Link,
    keys: Vec<String>,
    work: Work,
    /// How many keys have chosen so far, and when the last one did (unix ms).
    chosen: usize,
    now: i64,
    accounts: usize,
    /// Nanoseconds per call: a list a figure, an entry a round.
    figures: [Vec<f64>; FIGURES.len()],
}

const FIGURES: [&str; 6] = [
    "current lease, each answer awaited: time",
    "current lease, pipelines of 32: server CPU",
    "must choose, each answer awaited: time",
    "must choose, pipelines of 32: server CPU",
    "the same writes in plain Redis, pipelines of 32: server CPU",
    "HMGET of two fields of the lease, pipelines of 32: server CPU",
];
/// Those that must not grow.
const FLAT: [usize; 4] = [0, 1, 2, 3];
const FLAT_BAR: Bar = Bar::AtMost(1.2);

impl Cell {
    fn new(work: Work, &(name, accounts, slots, keys): &Size) -> Self {
        eprintln!("setting up {name} ...");
        let names: Vec<String> = (0..accounts).map(|n| format!("account-{n:06}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let options = Options::default().accounts(&names);
        let server = options
            .module(&["slots-per-account", &slots.to_string()])
            .start();
        let mut link = Link::open(server.port);
        let keys: Vec<String> = (0..keys)
            .map(|n| format!("sk-cli-v1-{:064x}", mix(n as u64)))
            .collect();
        let records = keys.iter().map(|key| {
            let name = format!("client_keys:{key}");
            pack(&[
                "HSET",
                &name,
                "tier",
                "medium",
                "use_pool",
                "true",
                "active",
                "true",
                "expires_at",
                "99999999999999",
            ])
        });
        link.run(records);
        link.run((0..keys.len()).map(|n| acquire(&keys[n], n as i64 * STEP)));
        let cell = Self {
            name,
            server,
            link,
            keys,
            work,
            chosen: 0,
            now: 0,
            accounts,
            figures: Default::default(),
        };
        // What creating so many accounts has left to do is not to be measured.
        cell.server.connect().ok(&["MPOOL.REPAIR"]);
        cell
    }

    fn round(&mut self) {
        let pid = self.server.pid();
        let awaited_choosing = self.choosing(AWAITED, Link::awaited);
        let piped_choosing = self.choosing(PIPED, Link::piped);
        let calls = self.current(AWAITED);
        let awaited_current = self.link.awaited(pid, calls);
        let calls = self.current(PIPED);
        let piped_current = self.link.piped(pid, calls);
        let calls = self.plain(PIPED);
        let replies = self.plain_replies();
        let plain = self.link.piped_each(pid, calls, replies);
        let calls = self.reads(PIPED);
        let reads = self.link.piped(pid, calls);
        let round = [
            awaited_current,
            piped_current,
            awaited_choosing,
            piped_choosing,
            plain,
            reads,
        ];
        let counts = [AWAITED, PIPED, AWAITED, PIPED, PIPED, PIPED];
        for ((figures, cost), count) in self.figures.iter_mut().zip(round).zip(counts) {
            figures.push(cost / count as f64);
        }
    }

    /// Calls for keys in a scattered order, each within its period.
    fn current(&self, count: usize) -> Vec<Vec<u8>> {
        let keys = self.keys.len() as u64;
        let key = |n| &self.keys[(mix(n) % keys) as usize];
        (0..count as u64)
            .map(|n| acquire(key(n), self.now))
            .collect()
    }

    /// What a client without the module would read of such leases.
    fn reads(&self, count: usize) -> Vec<Vec<u8>> {
        let keys = self.keys.len() as u64;
        let name = |n| format!("key_rotation:{}", self.keys[(mix(n) % keys) as usize]);
        (0..count as u64)
            .map(|n| pack(&["HMGET", &name(n), "account", "next_rotation"]))
            .collect()
    }

    /// Has so many keys choose, in a scattered order; answers the cost.
    fn choosing(&mut self, count: usize, measure: fn(&mut Link, u32, Vec<Vec<u8>>) -> f64) -> f64 {
        let keys = self.keys.len();
        let mut cost = 0.0;
        let mut left = count;
        while left > 0 {
            let batch = match self.work {
                Work::FirstUse => left.min(keys),
                Work::Rotation => left,
            };
            let places: Vec<usize> = (self.chosen..self.chosen + batch).collect();
            let key = |place: usize| self.keys[place % keys * SCATTER % keys].as_str();
            if let Work::FirstUse = self.work {
                let releases: Vec<_> = places
                    .iter()
                    .map(|&place| pack(&["MPOOL.RELEASE", key(place)]))
                    .collect();
                self.link.run(releases);
            }
            // Each key's time comes once a lap, and nobody else's with it.
            let now = |place: usize| (1 + place / keys) as i64 * DAY + (place % keys) as i64 * STEP;
            let calls = places
                .iter()
                .map(|&place| acquire(key(place), now(place)))
                .collect();
            self.now = now(self.chosen + batch - 1);
            cost += measure(&mut self.link, self.server.pid(), calls);
            self.chosen += batch;
            left -= batch;
        }
        cost
    }

    /// The writes of so many choices over as many other keys.
    fn plain(&self, count: usize) -> Vec<Vec<u8>> {
        let keys = self.keys.len();
        let account = |n: usize| {
            format!(
                "plain:slots:account-{:06}",
                mix(n as u64) % self.accounts as u64
            )
        };
        let writes = (0..count).map(|n| {
            let key = format!("plain:rotation:{}", self.keys[n % keys * SCATTER % keys]);
            let (new, old) = (account(n), account(n.saturating_sub(keys)));
            let now = n.to_string();
            let (new_name, old_name) = (&new[12..], &old[12..]);
            let mut writes = pack(&[
                "HSET",
                &key,
                "account",
                new_name,
                "next_rotation",
                &now,
                "last_rotation",
                &now,
                "previous_account",
                old_name,
            ]);
            writes.extend(pack(&["SET", &new, "1"]));
            if let Work::Rotation = self.work {
                writes.extend(pack(&["SET", &old, "0"]));
            }
            writes
        });
        writes.collect()
    }

    /// Replies to one of the calls of `plain`.
    fn plain_replies(&self) -> usize {
        match self.work {
            Work::FirstUse => 2,
            Work::Rotation => 3,
        }
    }
}

/// Name, accounts, slots of each, keys. One number varies in a table.
type Size = (&'static str, usize, usize, usize);

const TABLES: [(&str, Work, &[Size]); 3] = [
    (
        "accounts, with 1,000 keys; choosing is a first use",
        Work::FirstUse,
        &[
            ("10 accounts", 10, 128, 1_000),
            ("1,000 accounts", 1_000, 128, 1_000),
            ("100,000 accounts", 100_000, 128, 1_000),
        ],
    ),
    (
        "accounts, with 4 keys; choosing is a rotation to another account",
        Work::Rotation,
        &[
            ("10 accounts", 10, 2, 4),
            ("1,000 accounts", 1_000, 2, 4),
            ("100,000 accounts", 100_000, 2, 4),
        ],
    ),
    (
        "keys, with 1,000 accounts; choosing is a first use",
        Work::FirstUse,
        &[
            ("1,000 keys", 1_000, 1_024, 1_000),
            ("1,000,000 keys", 1_000, 1_024, 1_000_000),
        ],
    ),
];

/// Words on the command line choose sizes by their names; none: all.
fn main() {
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with('-'))
        .collect();
    let chosen =
        |name: &str| words.is_empty() || words.iter().any(|word| name.contains(word.as_str()));
    let mut page = Page::new("Growth", &[]);
    page.line(format!(
        "microseconds a call, medians of {ROUNDS} rounds (least-most), ratio to the smallest size's"
    ));
    for (what, work, sizes) in TABLES {
        let sizes = sizes.iter().filter(|(name, ..)| chosen(name));
        let mut cells: Vec<Cell> = sizes.map(|size| Cell::new(work, size)).collect();
        if !cells.is_empty() {
            run(&mut page, what, &mut cells);
        }
    }
    page.save();
}

fn run(page: &mut Page, what: &str, cells: &mut [Cell]) {
    for round in 1..=ROUNDS {
        eprintln!("growth: round {round} of {ROUNDS}");
        cells.iter_mut().for_each(Cell::round);
    }
    page.line("");
    page.line(format!("ACQUIRE by {what}"));
    for (number, figure) in FIGURES.iter().enumerate() {
        page.line(format!("  {figure}"));
        let base = median(&cells[0].figures[number]);
        let mut growth: f64 = 1.0;
        for cell in &*cells {
            let figures = &cell.figures[number];
            let (least, most) = (extreme(figures, f64::min), extreme(figures, f64::max));
            let middle = median(figures);
            let ratio = middle / base;
            growth = growth.max(ratio);
            page.line(format!(
                "    {:<18}{:>8.2}{:>7.2}x ({:.2}-{:.2})",
                cell.name,
                middle / 1e3,
                ratio,
                least / 1e3,
                most / 1e3,
            ));
        }
        if FLAT.contains(&number) && cells.len() > 1 {
            page.bar("growth", growth, FLAT_BAR, "x");
        }
    }
}

fn acquire(key: &str, now: i64) -> Vec<u8> {
    pack(&["MPOOL.ACQUIRE", key, &now.to_string()])
}
