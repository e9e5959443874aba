//! Every state that a small pool can get into: all sequences of commands over
//! three keys, two accounts and four instants, breadth first and to the end,
//! the rules and invariants checked on every step.
//!
//! A state is what the keyspace and the account folder hold. Two states that
//! differ in nothing but the names of keys and accounts are one: no rule looks
//! at names, save to choose between equals, and of those each is tried. Nor
//! does any look at when a lease began that is over and done with.

use super::model::{Cooldown, Expected, Lease, Record, World, credential};
use super::{Choice, Refusal, Stored, Tier};
use std::collections::{BTreeSet, HashSet};

const DAY: i64 = 86_400_000;
const START: i64 = 5 * DAY;

/// A lease taken at the first ends exactly at the third, one of the second at
/// the fourth, and one of the third a millisecond after the fourth.
const INSTANTS: [i64; 4] = [START, START + DAY - 1, START + DAY, START + 2 * DAY - 1];
/// Ends of cooldowns: within the instants, and after all of them.
const ENDS: [i64; 2] = [INSTANTS[2], INSTANTS[3] + 1];
const KEYS: [&str; 3] = ["1", "2", "3"];
const ACCOUNTS: [&str; 2] = ["a", "b"];

/// What may be known of one client key. Numbers stand for places in the tables
/// above, so that a whole state fits into a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Key {
    record: Option<Registered>,
    holds: Option<u8>,
    previous: Option<u8>,
    last: Option<u8>,
    /// Whether the period that began at `last` is on record.
    runs: bool,
}

/// What may stand in a client key's record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Registered {
    active: bool,
    /// The key ends at the third instant.
    ends: bool,
    bound: Option<u8>,
}

const POOLED: Registered = Registered {
    active: true,
    ends: false,
    bound: None,
};

/// What may be known of one account.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Account {
    file: File,
    cools_until: Option<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum File {
    Good,
    /// Its token ends at the third instant.
    Ends,
    Broken,
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Snapshot {
    slots: u8,
    accounts: [Account; 2],
    keys: [Key; 3],
}

#[derive(Clone, Copy, Debug)]
enum Command {
    Acquire(usize, i64),
    Release(usize, Option<i64>),
    Revoke(usize),
    Cool(usize, i64, u8),
    Warm(usize, i64),
    // What changes by other ways than commands of the pool.
    Register(usize, Option<Registered>),
    DropLease(usize),
    Miscount(usize),
    File(usize, File),
    Slots(u8),
}

/// How far an exploration goes: what each thing may become.
struct Scope {
    slots: &'static [u8],
    files: &'static [File],
    cools_until: &'static [u8],
    records: &'static [Option<Registered>],
    revoke: bool,
    /// Every how many states the second world takes part.
    twin_every: usize,
}

/// What an exploration came to.
#[derive(Debug, PartialEq, Eq)]
struct Extent {
    states: usize,
    /// Commands carried out.
    steps: usize,
    /// Commands that lead to the state furthest away.
    depth: usize,
}

impl Snapshot {
    const START: Self = Self {
        slots: 2,
        accounts: [Account {
            file: File::Gone,
            cools_until: None,
        }; 2],
        keys: [Key {
            record: None,
            holds: None,
            previous: None,
            last: None,
            runs: false,
        }; 3],
    };

    /// What the world's keyspace and folder hold. Fails when it is nothing
    /// that the commands could have made.
    fn of(world: &World) -> Self {
        let account = |name: &str| ACCOUNTS.iter().position(|of| *of == name).unwrap() as u8;
        let accounts = ACCOUNTS.map(|name| {
            let at = (Tier::Medium, name.to_owned());
            let file = match world.files.get(&at) {
                None => File::Gone,
                Some(None) => File::Broken,
                Some(Some(credential)) if credential.expires_at.is_some() => File::Ends,
                Some(Some(_)) => File::Good,
            };
            let cools_until = world.cooldowns.get(&at);
            let cools_until = cools_until
                .map(|cooldown| ENDS.iter().position(|end| *end == cooldown.until).unwrap() as u8);
            Account { file, cools_until }
        });
        let keys = KEYS.map(|name| {
            let record = world.records.get(name).map(|record| Registered {
                active: record.active,
                ends: record.expires_at.is_some(),
                bound: record.bound.as_deref().map(account),
            });
            let empty = Lease::default();
            let lease = world.leases.get(name).unwrap_or(&empty);
            let last = lease.last;
            let last = last.map(|last| INSTANTS.iter().position(|at| *at == last).unwrap() as u8);
            if let Some(next) = lease.next {
                assert_eq!(Some(next), lease.last.map(|last| last + DAY), "{name}");
            }
            Key {
                record,
                holds: lease.account.as_deref().map(account),
                previous: lease.previous.as_deref().map(account),
                last,
                runs: lease.next.is_some(),
            }
        });
        Self {
            slots: world.capacity as u8,
            accounts,
            keys,
        }
    }

    /// The one that stands for all states that no rule tells apart.
    fn nameless(mut self) -> Self {
        for key in self.keys.iter_mut().filter(|key| !key.runs) {
            key.last = None;
        }
        self.keys.sort_unstable();
        let mut swapped = self;
        swapped.accounts.swap(0, 1);
        let other = |account: &mut Option<u8>| *account = account.map(|account| 1 - account);
        for key in &mut swapped.keys {
            other(&mut key.holds);
            other(&mut key.previous);
            if let Some(record) = &mut key.record {
                other(&mut record.bound);
            }
        }
        swapped.keys.sort_unstable();
        let order = |state: &Self| (state.accounts, state.keys);
        if order(&swapped) < order(&self) {
            swapped
        } else {
            self
        }
    }

    fn packed(&self) -> u64 {
        let number = |place: Option<u8>| place.map_or(0, |place| u64::from(place) + 1);
        let mut word = u64::from(self.slots);
        let mut put = |bits: u32, value: u64| {
            debug_assert!(value < 1 << bits);
            word = word << bits | value;
        };
        for account in &self.accounts {
            put(2, account.file as u64);
            put(2, number(account.cools_until));
        }
        for key in &self.keys {
            let record = key.record.map_or(0, |record| {
                1 + u64::from(record.active) + 2 * u64::from(record.ends) + 4 * number(record.bound)
            });
            put(4, record);
            put(2, number(key.holds));
            put(2, number(key.previous));
            put(3, number(key.last));
            put(1, u64::from(key.runs));
        }
        word
    }

    /// Makes the world this, told piece by piece of what differs from what it
    /// is, as of changes made by hand. `backwards`: in another order.
    fn enter(&self, world: &mut World, now: &Self, backwards: bool) {
        if now == self {
            return;
        }
        let order =
            |length: usize| (0..length).map(move |at| if backwards { length - 1 - at } else { at });
        if now.slots != self.slots {
            world.set_capacity(u32::from(self.slots));
        }
        for at in order(KEYS.len()) {
            let (name, from, to) = (KEYS[at], &now.keys[at], &self.keys[at]);
            if from.record != to.record {
                world.set_record(name, to.record.map(Registered::stored));
            }
            if (from.holds, from.previous, from.last, from.runs)
                != (to.holds, to.previous, to.last, to.runs)
            {
                let name_of =
                    |account: Option<u8>| account.map(|at| ACCOUNTS[usize::from(at)].to_owned());
                let last = to.last.map(|at| INSTANTS[usize::from(at)]);
                let lease = Lease {
                    account: name_of(to.holds),
                    garbage: false,
                    previous: name_of(to.previous),
                    last,
                    next: last.filter(|_| to.runs).map(|last| last + DAY),
                };
                world.set_lease(name, Some(lease));
            }
        }
        for at in order(ACCOUNTS.len()) {
            let (name, from, to) = (ACCOUNTS[at], &now.accounts[at], &self.accounts[at]);
            if from.file != to.file {
                world.set_file(Tier::Medium, name, to.file.content());
            }
            if from.cools_until != to.cools_until {
                let cooldown = to.cools_until.map(|end| Cooldown {
                    until: ENDS[usize::from(end)],
                    reason: Some("why".into()),
                });
                world.set_cooldown(Tier::Medium, name, cooldown.unwrap_or_default());
            }
            let there = matches!(to.file, File::Good | File::Ends);
            let used = self.keys.iter().filter(|key| key.holds == Some(at as u8));
            let stored = if there {
                Stored::Count(used.count() as u64)
            } else {
                Stored::Absent
            };
            if world
                .slots
                .get(&(Tier::Medium, name.to_owned()))
                .copied()
                .unwrap_or(Stored::Absent)
                != stored
            {
                world.set_slots(Tier::Medium, name, stored);
            }
        }
        let wrong = world.pool.settle(usize::MAX);
        assert_eq!(wrong, [], "what is right is put right");
    }
}

impl Registered {
    fn stored(self) -> Record {
        Record {
            tier: Tier::Medium,
            bound: self.bound.map(|at| ACCOUNTS[usize::from(at)].to_owned()),
            expires_at: self.ends.then_some(INSTANTS[2]),
            active: self.active,
        }
    }
}

impl File {
    fn content(self) -> Option<Option<crate::accounts::Credential>> {
        match self {
            Self::Good => Some(Some(credential(None))),
            Self::Ends => Some(Some(credential(Some(INSTANTS[2])))),
            Self::Broken => Some(None),
            Self::Gone => None,
        }
    }
}

impl Scope {
    fn commands(&self) -> Vec<Command> {
        let mut commands = Vec::new();
        for key in 0..KEYS.len() {
            for now in INSTANTS {
                commands.extend([Command::Acquire(key, now), Command::Release(key, Some(now))]);
            }
            commands.extend([Command::Release(key, None), Command::DropLease(key)]);
            commands.extend(self.revoke.then_some(Command::Revoke(key)));
            let records = self.records.iter();
            commands.extend(records.map(|&record| Command::Register(key, record)));
        }
        for account in 0..ACCOUNTS.len() {
            for now in INSTANTS {
                commands.push(Command::Warm(account, now));
                let ends = self.cools_until.iter();
                commands.extend(
                    ends.filter(|&&end| ENDS[usize::from(end)] > now)
                        .map(|&end| Command::Cool(account, now, end)),
                );
            }
            commands.push(Command::Miscount(account));
            let files = self.files.iter();
            commands.extend(files.map(|&file| Command::File(account, file)));
        }
        commands.extend(self.slots.iter().map(|&slots| Command::Slots(slots)));
        commands
    }
}

/// Two worlds that come to the same state by different ways and in which the
/// same is done: what follows must not depend on the way.
struct Twins {
    worlds: [World; 2],
    /// What they are now.
    states: [Snapshot; 2],
    /// Whether the second one takes part.
    both: bool,
    /// What has been answered so far, by kind.
    answers: BTreeSet<String>,
    steps: usize,
}

impl Twins {
    fn new() -> Self {
        Self {
            worlds: [World::new(2, DAY), World::new(2, DAY)],
            states: [Snapshot::START; 2],
            both: true,
            answers: BTreeSet::new(),
            steps: 0,
        }
    }

    fn enter(&mut self, state: &Snapshot) {
        let places = self.worlds.iter_mut().zip(&mut self.states).enumerate();
        for (number, (world, now)) in places.take(1 + usize::from(self.both)) {
            state.enter(world, now, number == 1);
            *now = *state;
        }
    }

    /// Does the same in each; the answers and what follows must be the same.
    fn run<R: PartialEq + std::fmt::Debug>(
        &mut self,
        mut run: impl FnMut(&mut World) -> R,
    ) -> (R, Snapshot) {
        self.steps += 1;
        let mut done = |number: usize| {
            let world = &mut self.worlds[number];
            let answer = run(world);
            world.settle();
            self.states[number] = Snapshot::of(world);
            (answer, self.states[number])
        };
        let outcome = done(0);
        if self.both {
            assert_eq!(
                outcome,
                done(1),
                "what follows depends on more than the keyspace"
            );
        }
        outcome
    }

    /// All states that a command can lead to.
    fn follow(&mut self, from: &Snapshot, command: Command) -> Vec<Snapshot> {
        self.enter(from);
        let after = match command {
            Command::Acquire(key, now) => return self.acquire(from, key, now),
            Command::Release(key, now) => {
                let (answer, after) = self.run(|world| world.release(KEYS[key], now));
                self.check_freed(from, key, answer, &after);
                after
            }
            Command::Revoke(key) => {
                let (answer, after) = self.run(|world| world.revoke(KEYS[key]));
                self.check_freed(from, key, answer, &after);
                assert!(after.keys[key].record.is_none_or(|record| !record.active));
                after
            }
            Command::Cool(account, now, end) => {
                let until = ENDS[usize::from(end)];
                let (answer, after) =
                    self.run(|world| world.cool(ACCOUNTS[account], now, Some(until)));
                if self.check_listed(from, account, &answer, &after) {
                    let held = |state: &Snapshot| {
                        state
                            .keys
                            .iter()
                            .filter(|key| key.holds == Some(account as u8))
                            .count()
                    };
                    assert_eq!((answer, held(&after)), (Ok(held(from)), 0));
                }
                after
            }
            Command::Warm(account, now) => {
                let (answer, after) = self.run(|world| world.cool(ACCOUNTS[account], now, None));
                if self.check_listed(from, account, &answer, &after) {
                    assert_eq!(after.accounts[account].cools_until, None);
                }
                after
            }
            Command::Register(key, record) => {
                let record = record.map(Registered::stored);
                self.run(|world| world.set_record(KEYS[key], record.clone()))
                    .1
            }
            Command::DropLease(key) => self.run(|world| world.set_lease(KEYS[key], None)).1,
            Command::Miscount(account) => {
                let nine = Stored::Count(9);
                let after = self
                    .run(|world| world.set_slots(Tier::Medium, ACCOUNTS[account], nine))
                    .1;
                assert_eq!(after, *from, "a wrong counter was not put right");
                after
            }
            Command::File(account, file) => {
                self.run(|world| world.set_file(Tier::Medium, ACCOUNTS[account], file.content()))
                    .1
            }
            Command::Slots(slots) => self.run(|world| world.set_capacity(u32::from(slots))).1,
        };
        vec![after]
    }

    fn check_freed(
        &mut self,
        from: &Snapshot,
        key: usize,
        answer: Result<Option<Box<str>>, Refusal>,
        after: &Snapshot,
    ) {
        match answer {
            Ok(freed) => {
                let held = from.keys[key].holds.map(|at| ACCOUNTS[usize::from(at)]);
                assert_eq!(freed.as_deref(), held);
                assert_eq!(after.keys[key].holds, None);
            }
            Err(refusal) => {
                assert_eq!((refusal, from.keys[key].record), (Refusal::NoKey, None));
                assert_eq!(after, from, "a refusal changed something");
            }
        }
    }

    fn check_listed(
        &mut self,
        from: &Snapshot,
        account: usize,
        answer: &Result<usize, Refusal>,
        after: &Snapshot,
    ) -> bool {
        let gone = from.accounts[account].file == File::Gone;
        assert_eq!(*answer == Err(Refusal::NoSuchAccount), gone);
        assert!(!gone || after == from, "a refusal changed something");
        !gone
    }

    /// An acquire, with every choice that there is.
    fn acquire(&mut self, from: &Snapshot, key: usize, now: i64) -> Vec<Snapshot> {
        let expected = self.worlds[0].expected(KEYS[key], now);
        let mut missing = match &expected {
            Expected::OneOf { accounts, .. } => accounts.clone(),
            Expected::Kept { .. } | Expected::Refused(_) => BTreeSet::new(),
        };
        let mut states = Vec::new();
        for seed in 1.. {
            assert!(seed < 100, "{missing:?} is never chosen");
            self.enter(from);
            let (answer, after) = self.run(|world| {
                let decision = world.acquire(KEYS[key], now, &mut Choice::Seeded(seed))?;
                let name = world
                    .pool
                    .account_name(decision.account)
                    .unwrap()
                    .to_owned();
                Ok::<_, Refusal>((name, decision.state, decision.last, decision.next))
            });
            match (answer, &expected) {
                (Err(refusal), Expected::Refused(known)) => {
                    assert_eq!(refusal, *known);
                    assert_eq!(after, *from, "a refusal changed something");
                    let text = format!("{refusal:?}");
                    let kind = text.split(' ').next().unwrap().to_owned();
                    self.answers.insert(kind);
                }
                (
                    Ok((account, state, _, next)),
                    Expected::Kept {
                        account: known,
                        state: is,
                    },
                ) => {
                    assert_eq!((&account, state), (known, *is));
                    assert_eq!(after, *from, "a current lease was written");
                    assert!(next.is_none_or(|next| next > now));
                    self.answers.insert(format!("{state:?}"));
                }
                (
                    Ok((account, state, last, next)),
                    Expected::OneOf {
                        accounts,
                        state: is,
                    },
                ) => {
                    assert!(
                        accounts.contains(&account),
                        "{account} is none of {accounts:?}"
                    );
                    assert_eq!((state, last, next), (*is, Some(now), Some(now + DAY)));
                    missing.remove(&account);
                    self.check_granted(key, &account, now, &after);
                    self.answers.insert(format!("{state:?}"));
                }
                (answer, expected) => panic!("{answer:?} instead of {expected:?}"),
            }
            states.push(after);
            if missing.is_empty() {
                break;
            }
        }
        states
    }

    /// After a new lease nobody keeps a slot for longer than they may.
    fn check_granted(&self, key: usize, account: &str, now: i64, after: &Snapshot) {
        let world = &self.worlds[0];
        assert_eq!(world.leases[KEYS[key]].account.as_deref(), Some(account));
        for (other, name) in after.keys.iter().zip(KEYS) {
            let (Some(held), true) = (other.holds, name != KEYS[key]) else {
                continue;
            };
            let held = ACCOUNTS[usize::from(held)];
            assert!(world.usable(Tier::Medium, held, now), "{name} keeps {held}");
            let ends = other.record.is_some_and(|record| record.ends) && now >= INSTANTS[2];
            let next = world.leases[name].next;
            assert!(
                !ends && next.is_some_and(|next| next > now),
                "{name} is overdue"
            );
        }
    }

    /// What must be true in every state.
    fn check(&self) {
        for world in &self.worlds[..=usize::from(self.both)] {
            world.check();
            world.pool.audit();
            world.check_rebuild();
        }
    }
}

/// A state that has been met, and how: from which one, by which command.
struct Met {
    state: Snapshot,
    from: usize,
    by: Option<Command>,
    depth: usize,
}

fn explore(scope: &Scope) -> (Extent, BTreeSet<String>) {
    let commands = scope.commands();
    let mut met = vec![Met {
        state: Snapshot::START,
        from: 0,
        by: None,
        depth: 0,
    }];
    let mut known = HashSet::from([Snapshot::START.packed()]);
    let mut twins = Twins::new();
    let mut at = 0;
    while at < met.len() {
        let (state, depth) = (met[at].state, met[at].depth);
        twins.both = at % scope.twin_every == 0;
        for &command in &commands {
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let mut new = Vec::new();
                for from in named(&state, command) {
                    for after in twins.follow(&from, command) {
                        let after = after.nameless();
                        if known.insert(after.packed()) {
                            twins.check();
                            new.push(after);
                        }
                    }
                }
                new
            }));
            let new = outcome.unwrap_or_else(|failure| {
                println!("{command:?} fails in {state:#?}, reached by, names aside:");
                path(&met, at).for_each(|command| println!("  {command:?}"));
                std::panic::resume_unwind(failure)
            });
            met.extend(new.into_iter().map(|state| Met {
                state,
                from: at,
                by: Some(command),
                depth: depth + 1,
            }));
        }
        at += 1;
    }
    let extent = Extent {
        states: met.len(),
        steps: twins.steps,
        depth: met.last().map_or(0, |last| last.depth),
    };
    (extent, twins.answers)
}

/// The state under the names that matter to the command: which of two equal
/// holders goes first, when there are fewer slots, is a matter of their names.
fn named(state: &Snapshot, command: Command) -> Vec<Snapshot> {
    if !matches!(command, Command::Slots(_)) {
        return vec![*state];
    }
    let orders = [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ];
    let renamed = |order: [usize; 3]| Snapshot {
        keys: order.map(|at| state.keys[at]),
        ..*state
    };
    orders.into_iter().map(renamed).collect()
}

fn path(met: &[Met], to: usize) -> impl Iterator<Item = Command> {
    let mut commands = Vec::new();
    let mut at = to;
    while let Some(command) = met[at].by {
        commands.push(command);
        at = met[at].from;
    }
    commands.into_iter().rev()
}

const ENDING: Registered = Registered {
    ends: true,
    ..POOLED
};
const BOUND: Registered = Registered {
    bound: Some(0),
    ..POOLED
};

/// Keys that use the pool, and accounts that are there.
const LEASES: Scope = Scope {
    slots: &[],
    files: &[File::Good],
    cools_until: &[],
    records: &[Some(POOLED)],
    revoke: false,
    twin_every: 4,
};

/// The numbers are in `docs/reliability.md`.
#[track_caller]
fn check_extent(scope: &Scope, expected: [usize; 3], answers: &[&str]) {
    let (extent, given) = explore(scope);
    let [states, steps, depth] = expected;
    let expected = Extent {
        states,
        steps,
        depth,
    };
    assert_eq!(extent, expected, "the pool has other states than before");
    assert_eq!(given.iter().collect::<Vec<_>>(), answers);
}

#[test]
fn every_state_when_accounts_come_go_and_cool_down() {
    let scope = Scope {
        files: &[File::Good, File::Gone],
        cools_until: &[0],
        ..LEASES
    };
    let answers = [
        "Assigned",
        "Current",
        "Failover",
        "NoAccount",
        "NoKey",
        "PoolFull",
        "Rotated",
    ];
    check_extent(&scope, [12_067, 618_696, 15], &answers);
}

#[test]
fn every_state_when_accounts_have_more_slots_or_fewer() {
    let scope = Scope {
        slots: &[1, 2],
        ..LEASES
    };
    let answers = [
        "Assigned",
        "Current",
        "Failover",
        "NoAccount",
        "NoKey",
        "PoolFull",
        "Rotated",
    ];
    check_extent(&scope, [5_821, 334_449, 15], &answers);
}

#[test]
fn every_state_when_keys_come_go_and_are_revoked() {
    let scope = Scope {
        records: &[None, Some(POOLED)],
        revoke: true,
        ..LEASES
    };
    let answers = [
        "Assigned",
        "Current",
        "Failover",
        "NoAccount",
        "NoKey",
        "PoolFull",
        "Revoked",
        "Rotated",
    ];
    check_extent(&scope, [5_259, 270_000, 14], &answers);
}

#[test]
#[ignore = "minutes; CARGO_PROFILE_TEST_OPT_LEVEL=2 cargo test --lib states:: -- --ignored"]
fn every_state_when_keys_end_and_are_bound() {
    let scope = Scope {
        records: &[None, Some(POOLED), Some(ENDING), Some(BOUND)],
        revoke: true,
        twin_every: 1,
        ..LEASES
    };
    let answers = [
        "Assigned",
        "Bound",
        "BoundAccount",
        "Current",
        "Expired",
        "Failover",
        "NoAccount",
        "NoKey",
        "PoolFull",
        "Revoked",
        "Rotated",
    ];
    check_extent(&scope, [225_373, 12_883_715, 19], &answers);
}

#[test]
#[ignore = "minutes; CARGO_PROFILE_TEST_OPT_LEVEL=2 cargo test --lib states:: -- --ignored"]
fn every_state_when_anything_happens_to_accounts() {
    let scope = Scope {
        slots: &[1, 2],
        files: &[File::Good, File::Ends, File::Broken, File::Gone],
        cools_until: &[0, 1],
        twin_every: 1,
        ..LEASES
    };
    let answers = [
        "Assigned",
        "Current",
        "Failover",
        "NoAccount",
        "NoKey",
        "PoolFull",
        "Rotated",
    ];
    check_extent(&scope, [134_844, 10_121_540, 16], &answers);
}
