//! Clients at work on keys of their own, every reply written down, so that a
//! server that was killed, or another in its place, can be held to its word.
//! What a client sends follows from its seed; no reply changes it.

use super::{Client, DAY, Lease, text};
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use redis::{RedisError, RedisResult, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

/// Keys that a client works on at a time.
const KEYS: usize = 3;
/// The first instant of every clock.
pub const BEGIN: i64 = 1_755_266_400_000;
/// How far a client's clock goes with each command: far enough for leases to
/// fall due, little enough for most to be current.
const TICK: i64 = DAY / 40;

/// What a client key's hashes say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// Whether the key may be used; none: it is not registered.
    pub active: Option<bool>,
    /// The account whose slot the key holds.
    pub account: Option<String>,
    /// When its last lease began.
    pub last: Option<i64>,
}

impl State {
    #[track_caller]
    pub fn read(client: &mut Client, key: &str) -> Self {
        let active: Option<String> = client.run(&["HGET", &format!("client_keys:{key}"), "active"]);
        let lease = format!("key_rotation:{key}");
        let (account, last, next): (Option<String>, Option<i64>, Option<i64>) =
            client.run(&["HMGET", &lease, "account", "last_rotation", "next_rotation"]);
        if account.is_some() {
            assert_eq!(next, last.map(|last| last + DAY), "{lease} is half a lease");
        }
        Self {
            active: active.map(|active| active == "true"),
            account,
            last,
        }
    }
}

/// A state that a reply has told of.
#[derive(Clone, Debug)]
struct Fact {
    state: State,
    sent: Instant,
    received: Instant,
    /// Replicas have confirmed it.
    confirmed: bool,
}

/// A command without an answer: it may have been carried out.
#[derive(Clone, Debug)]
enum Open {
    Acquire { now: i64 },
    Release,
    Revoke,
}

/// A key and what its owner has been told of it, in that order.
#[derive(Debug)]
pub struct History {
    pub key: String,
    facts: Vec<Fact>,
    open: Option<(Open, Instant)>,
}

/// Where in a key's history a state is, in facts. More than one place where
/// another client may have freed a slot that its owner gave up next.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub earliest: usize,
    pub latest: usize,
}

impl History {
    fn last(&self) -> &State {
        &self.facts.last().expect("a history has a beginning").state
    }

    fn push(&mut self, state: State, sent: Instant) {
        self.facts.push(Fact {
            state,
            sent,
            received: Instant::now(),
            confirmed: false,
        });
    }

    /// Where this state has been, if ever; one past the facts is what a command
    /// without an answer has made of the last.
    pub fn find(&self, seen: &State, shared: &Shared) -> Option<Place> {
        let mut places =
            (0..self.facts.len()).filter(|&place| shared.is_still(&self.facts[place].state, seen));
        let mut place = places.next().map(|earliest| Place {
            earliest,
            latest: places.last().unwrap_or(earliest),
        });
        if self
            .open
            .as_ref()
            .is_some_and(|(open, _)| self.may_have_become(open, seen))
        {
            let latest = self.facts.len();
            place
                .get_or_insert(Place {
                    earliest: latest,
                    latest,
                })
                .latest = latest;
        }
        place
    }

    /// Goes on from what the server says now.
    fn resume(&mut self, seen: State) {
        self.facts.clear();
        self.open = None;
        self.push(seen, Instant::now());
    }

    fn may_have_become(&self, open: &Open, seen: &State) -> bool {
        let last = self.last();
        match open {
            Open::Acquire { now } => seen.active == Some(true) && seen.last == Some(*now),
            Open::Release => {
                *seen
                    == State {
                        account: None,
                        ..last.clone()
                    }
            }
            Open::Revoke => {
                *seen
                    == State {
                        active: Some(false),
                        account: None,
                        ..last.clone()
                    }
            }
        }
    }
}

/// What the clients of a run have in common.
#[derive(Debug)]
pub struct Shared {
    /// Accounts that somebody takes out of the pool meanwhile.
    pub flaky: &'static [&'static str],
    /// The latest instant that anybody has named: what fell due before may be free.
    pub latest: AtomicI64,
}

/// A stretch of work.
#[derive(Debug)]
pub struct Shift {
    replies: AtomicU64,
    /// Told once there have been that many replies.
    quota: u64,
    tell: Sender<()>,
    over: AtomicBool,
}

impl Shift {
    /// The receiver hears of it once there have been that many replies.
    pub fn new(quota: u64) -> (Self, Receiver<()>) {
        let (tell, told) = channel();
        let shift = Self {
            replies: AtomicU64::new(0),
            quota,
            tell,
            over: AtomicBool::new(false),
        };
        (shift, told)
    }

    pub fn count(&self) {
        if self.replies.fetch_add(1, Ordering::Relaxed) + 1 == self.quota {
            let _ = self.tell.send(());
        }
    }

    /// Lets everybody stop after the command under way.
    pub fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }
}

impl Shared {
    pub fn new(flaky: &'static [&'static str]) -> Self {
        Self {
            flaky,
            latest: AtomicI64::new(BEGIN),
        }
    }

    /// The latest instant that anybody has named.
    pub fn now(&self) -> i64 {
        self.latest.load(Ordering::SeqCst)
    }

    /// Whether nobody but its owner can have ended that lease.
    pub fn is_firm(&self, state: &State) -> bool {
        let due = state.last.map_or(0, |last| last + DAY);
        state
            .account
            .as_deref()
            .is_some_and(|account| !self.flaky.contains(&account) && due > self.now())
    }

    /// Whether `seen` is what was told, or what others may have made of it.
    pub fn is_still(&self, told: &State, seen: &State) -> bool {
        let freed = State {
            account: None,
            ..told.clone()
        };
        seen == told || (*seen == freed && !self.is_firm(told))
    }
}

/// A client and its keys.
#[derive(Debug)]
pub struct Worker {
    rng: SmallRng,
    now: i64,
    /// How many replicas are to confirm each write.
    pub wait: usize,
    keys: Vec<History>,
    /// Keys that are revoked and stay so.
    ended: Vec<History>,
    /// A KEYGEN without an answer: there may be a key that nobody knows.
    open_keygen: bool,
    pub counts: BTreeMap<String, u64>,
}

impl Worker {
    pub fn new(seed: u64, wait: usize) -> Self {
        Self {
            rng: SmallRng::seed_from_u64(seed),
            now: BEGIN,
            wait,
            keys: Vec::new(),
            ended: Vec::new(),
            open_keygen: false,
            counts: BTreeMap::new(),
        }
    }

    /// Works until the connection breaks, the server refuses writes, or it is over.
    pub fn work(&mut self, mut client: Client, shared: &Shared, shift: &Shift) {
        while !shift.is_over() {
            let outcome = self.step(&mut client, shared);
            shift.count();
            if let Err(end) = outcome {
                let refused = ["READONLY", "NOREPLICAS"].contains(&end.code().unwrap_or_default());
                assert!(refused || lost(&end), "{end}");
                return self.count(end.code().unwrap_or("lost"));
            }
        }
    }

    fn count(&mut self, what: &str) {
        *self.counts.entry(what.to_owned()).or_default() += 1;
    }

    fn step(&mut self, client: &mut Client, shared: &Shared) -> RedisResult<()> {
        self.now += TICK;
        shared.latest.fetch_max(self.now, Ordering::SeqCst);
        let at = self.rng.random_range(0..KEYS);
        let action = self.rng.random_range(0..100);
        let sent = Instant::now();
        if at >= self.keys.len() || (action >= 96 && self.keys.len() < 2 * KEYS) {
            return self.generate(client, sent);
        }
        let outcome = match action {
            0..70 => self.acquire(at, client, shared, sent),
            70..80 => self.release(at, None, client, shared, sent),
            80..88 => self.release(at, Some(self.now), client, shared, sent),
            88..92 => self.revoke(at, client, sent),
            _ => self.knock(at, client),
        };
        if outcome.is_ok() && self.wait > 0 {
            self.confirm(at, client)?;
        }
        if self
            .keys
            .get(at)
            .is_some_and(|key| key.last().active == Some(false))
        {
            let key = self.keys.remove(at);
            self.ended.push(key);
        }
        outcome
    }

    fn generate(&mut self, client: &mut Client, sent: Instant) -> RedisResult<()> {
        self.open_keygen = true;
        let now = self.now.to_string();
        let words = [
            "MPOOL.KEYGEN",
            "medium",
            "POOL",
            "DAYS",
            "36500",
            "NOW",
            &now,
        ];
        let reply: BTreeMap<String, Value> =
            settled(client.try_run(&words), || self.open_keygen = false)?;
        self.open_keygen = false;
        let nothing = State {
            active: None,
            account: None,
            last: None,
        };
        let mut key = History {
            key: text(&reply["key"]),
            facts: Vec::new(),
            open: None,
        };
        key.push(nothing.clone(), sent);
        key.push(
            State {
                active: Some(true),
                ..nothing
            },
            sent,
        );
        self.keys.push(key);
        self.count("generated");
        if self.wait > 0 {
            self.confirm(self.keys.len() - 1, client)?;
        }
        Ok(())
    }

    fn acquire(
        &mut self,
        at: usize,
        client: &mut Client,
        shared: &Shared,
        sent: Instant,
    ) -> RedisResult<()> {
        let now = self.now;
        let key = &mut self.keys[at];
        let before = key.last().clone();
        key.open = Some((Open::Acquire { now }, sent));
        let reply = client.try_run::<BTreeMap<String, Value>>(&[
            "MPOOL.ACQUIRE",
            &key.key,
            &now.to_string(),
        ]);
        // Asked after the reply: what was firm then was so before.
        let current = shared.is_firm(&before);
        let what = match settled(reply, || key.open = None) {
            Ok(reply) => {
                key.open = None;
                let lease = Lease::of(&reply);
                let told = State {
                    account: Some(lease.account.clone()),
                    last: lease.last,
                    ..before.clone()
                };
                assert_eq!(lease.next, lease.last.map(|last| last + DAY), "{lease:?}");
                if lease.state == "current" {
                    assert_eq!(told, before, "a current lease is another than before");
                } else {
                    assert!(!current, "{before:?} was to be current: {lease:?}");
                    assert_eq!(lease.last, Some(now), "{lease:?}");
                    key.push(told, sent);
                }
                lease.state
            }
            Err(error) if ["POOLFULL", "NOACCOUNT"].contains(&error.code().unwrap_or_default()) => {
                assert!(!current, "{before:?} was to be current: {error}");
                error.code().unwrap_or_default().to_owned()
            }
            Err(error) => return Err(error),
        };
        self.count(&what);
        Ok(())
    }

    fn release(
        &mut self,
        at: usize,
        now: Option<i64>,
        client: &mut Client,
        shared: &Shared,
        sent: Instant,
    ) -> RedisResult<()> {
        let key = &mut self.keys[at];
        let before = key.last().clone();
        let firm = shared.is_firm(&before);
        key.open = Some((Open::Release, sent));
        let now = now.map(|now| now.to_string());
        let mut words = vec!["MPOOL.RELEASE", &key.key];
        words.extend(now.as_deref());
        let reply: BTreeMap<String, Option<String>> =
            settled(client.try_run(&words), || key.open = None)?;
        key.open = None;
        let freed = reply["account"].clone();
        let firm = firm && shared.is_firm(&before);
        assert!(
            freed == before.account || (freed.is_none() && !firm),
            "{freed:?} freed of {before:?}"
        );
        if freed.is_some() {
            key.push(
                State {
                    account: None,
                    ..before
                },
                sent,
            );
        }
        self.count("released");
        Ok(())
    }

    fn revoke(&mut self, at: usize, client: &mut Client, sent: Instant) -> RedisResult<()> {
        let key = &mut self.keys[at];
        let before = key.last().clone();
        key.open = Some((Open::Revoke, sent));
        let reply = client.try_run::<Value>(&["MPOOL.REVOKE", &key.key]);
        settled(reply, || key.open = None)?;
        key.open = None;
        key.push(
            State {
                active: Some(false),
                account: None,
                ..before
            },
            sent,
        );
        self.count("revoked");
        Ok(())
    }

    /// A key that is revoked stays so.
    fn knock(&mut self, at: usize, client: &mut Client) -> RedisResult<()> {
        let Some(ended) = self.ended.last() else {
            let words = ["MPOOL.STATUS", "KEY", &self.keys[at].key];
            return client.try_run::<Value>(&words).map(drop);
        };
        let now = self.now.to_string();
        match client.try_run::<Value>(&["MPOOL.ACQUIRE", &ended.key, &now]) {
            Err(error) if error.code() == Some("REVOKED") => {
                self.count("REVOKED");
                Ok(())
            }
            Err(error) => Err(error),
            Ok(lease) => panic!("a revoked key has got {lease:?}: {ended:#?}"),
        }
    }

    /// Waits for the replicas; what they don't confirm in time stays unconfirmed.
    fn confirm(&mut self, at: usize, client: &mut Client) -> RedisResult<()> {
        let reply = client.try_run::<usize>(&["WAIT", &self.wait.to_string(), "1000"]);
        match reply {
            Ok(replicas) if replicas >= self.wait => {
                let fact = self.keys[at].facts.last_mut();
                fact.expect("a history has a beginning").confirmed = true;
                self.count("confirmed");
            }
            // The server has become a replica meanwhile.
            Ok(_) => self.count("unconfirmed"),
            Err(error) if error.code() == Some("UNBLOCKED") => self.count("unconfirmed"),
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

/// Whether nobody can know what has become of the command: the connection broke,
/// or the server became a replica while the client was on hold.
fn lost(error: &RedisError) -> bool {
    error.code().is_none_or(|code| code == "UNBLOCKED")
}

/// The reply; if it is an error of the server's, the command has done nothing.
fn settled<T>(reply: RedisResult<T>, undone: impl FnOnce()) -> RedisResult<T> {
    if reply.as_ref().is_err_and(|error| !lost(error)) {
        undone();
    }
    reply
}

/// What of the replies a server doesn't know of.
#[derive(Clone, Copy, Debug, Default)]
pub struct Loss {
    pub told: usize,
    pub lost: usize,
    /// Commands without an answer that were carried out.
    pub unanswered: usize,
}

/// Holds a server to what the workers have been told, by it or by the one that
/// it has taken the place of. Nothing may be there that never was, nothing
/// confirmed may be missing, and nothing that was answered before something
/// was asked that is there. The workers go on from what there is.
#[track_caller]
pub fn hold_to_account(workers: &mut [Worker], client: &mut Client, shared: &Shared) -> Loss {
    let mut loss = Loss::default();
    let mut survived: Option<Instant> = None;
    let mut missing: Option<Instant> = None;
    for worker in workers {
        let histories: Vec<_> = worker
            .keys
            .drain(..)
            .chain(worker.ended.drain(..))
            .collect();
        for mut history in histories {
            let seen = State::read(client, &history.key);
            let facts = &history.facts;
            let place = history
                .find(&seen, shared)
                .unwrap_or_else(|| panic!("{seen:?} was never so: {history:#?}"));
            let confirmed = facts.iter().rposition(|fact| fact.confirmed);
            assert!(
                confirmed.is_none_or(|confirmed| confirmed <= place.latest),
                "{seen:?} is not what was confirmed: {history:#?}"
            );
            if place.earliest > 0 {
                let open = history.open.as_ref().map(|&(_, sent)| sent);
                survived = survived.max(facts.get(place.earliest).map(|fact| fact.sent).or(open));
            }
            if let Some(fact) = facts.get(place.latest + 1) {
                missing = Some(missing.map_or(fact.received, |other| other.min(fact.received)));
            }
            loss.told += facts.len() - 1;
            loss.lost += facts.len().saturating_sub(place.latest + 1);
            loss.unanswered += usize::from(place.earliest == facts.len());
            history.resume(seen);
            match history.last().active {
                Some(true) => worker.keys.push(history),
                Some(false) => worker.ended.push(history),
                None => assert_eq!(history.last().last, None, "a lease of nobody: {history:?}"),
            }
        }
    }
    let order = missing.zip(survived);
    assert!(
        order.is_none_or(|(missing, survived)| survived <= missing),
        "something was lost that was answered before what is there was asked: {loss:?}"
    );
    loss
}

/// Keys that no worker knows, nor the test, must come from commands without an
/// answer, and have no lease. They are taken away; answers how many there were.
#[track_caller]
pub fn check_strangers(workers: &mut [Worker], known: &[String], client: &mut Client) -> usize {
    let mut keys: BTreeSet<String> = client.run(&["KEYS", "client_keys:*"]);
    for key in known {
        keys.remove(&format!("client_keys:{key}"));
    }
    let mut leases: BTreeSet<String> = client.run(&["KEYS", "key_rotation:*"]);
    let mut open = 0;
    for worker in workers {
        open += usize::from(std::mem::take(&mut worker.open_keygen));
        for History { key, .. } in worker.keys.iter().chain(&worker.ended) {
            keys.remove(&format!("client_keys:{key}"));
            leases.remove(&format!("key_rotation:{key}"));
        }
    }
    assert!(keys.len() <= open, "keys that nobody has made: {keys:?}");
    assert!(leases.is_empty(), "leases of nobody: {leases:?}");
    for key in &keys {
        client.ok(&["DEL", key]);
    }
    keys.len()
}

/// Every lease that must run is current, and each other of the pool's slots can
/// be lent, once.
#[track_caller]
pub fn check_every_slot(workers: &[Worker], client: &mut Client, shared: &Shared, slots: usize) {
    let now = shared.now();
    for key in workers.iter().flat_map(|worker| &worker.keys) {
        if shared.is_firm(key.last()) {
            let lease = client.acquire(&key.key, now);
            assert_eq!(lease.state, "current", "{key:#?}");
            assert_eq!(Some(lease.account), key.last().account, "{key:#?}");
        }
    }
    let leases: Vec<String> = client.run(&["KEYS", "key_rotation:*"]);
    let running = leases.iter().filter(|lease| {
        let (account, next): (Option<String>, Option<i64>) =
            client.run(&["HMGET", lease, "account", "next_rotation"]);
        account.is_some() && next.is_some_and(|next| next > now)
    });
    let free = slots - running.count();
    let mut keys = Vec::new();
    loop {
        let key = client.pool_key();
        let lease = client.try_acquire(&key, now);
        keys.push(key);
        match lease {
            Ok(lease) => assert_eq!(lease.state, "assigned"),
            Err(error) => break assert!(error.starts_with("POOLFULL"), "{error}"),
        }
    }
    assert_eq!(keys.len() - 1, free, "slots that could be lent");
    client.check_invariants(2);
    for key in keys {
        client.ok(&["MPOOL.RELEASE", &key]);
        client.ok(&[
            "DEL",
            &format!("client_keys:{key}"),
            &format!("key_rotation:{key}"),
        ]);
    }
    client.check_invariants(2);
}
