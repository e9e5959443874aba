//! Commands with any arguments, changes by hand and account files, to the
//! module's own commands, node, store, events and pool over a server in memory.
//!
//! The input is text: a line a step, its words apart by blanks. In a word, the
//! bytes 1 and 2 stand for a line's end and a blank, 3 for nothing at all, 4 for
//! 300 letters, and $0 to $9 for the client keys made so far. First words besides the
//! commands: FILE, SET, HSET, HDEL, DEL, LIST, FLUSH, OOM, CAPACITY, ROTATION.
//!
//! After each step: one whole reply or one error of the table, which has changed
//! nothing; no token and no client key where none belongs; counters that agree
//! with the leases, within capacity; a view that audits well and is what a
//! rebuild gives. An acquire's answer is also held against the rules, naively.

#![no_main]
#![allow(
    dead_code,
    unused_imports,
    reason = "parts of the module stand alone here"
)]
#![allow(clippy::panic, clippy::unwrap_used, clippy::indexing_slicing)]

#[path = "../../../src/accounts/mod.rs"]
mod accounts;
#[path = "../../../src/background.rs"]
mod background;
#[path = "../../../src/commands/mod.rs"]
mod commands;
#[path = "../../../src/errors.rs"]
mod errors;
#[path = "../../../src/events.rs"]
mod events;
mod ffi;
#[path = "../../../src/node.rs"]
mod node;
#[path = "../../../src/pool/mod.rs"]
mod pool;
#[path = "../../../src/rebuild.rs"]
mod rebuild;
#[path = "../../../src/store.rs"]
mod store;

/// Settings that commands ask for; as they are unless told otherwise.
mod settings {
    pub(crate) fn max_clock_skew_ms() -> Option<i64> {
        None
    }

    pub(crate) fn of_server(_ctx: &redis_module::Context, _name: &str) -> Option<String> {
        None
    }
}

/// A server in memory loads no data.
mod portions {
    pub(crate) fn shrink(_ctx: &redis_module::Context) {}
    pub(crate) fn give_back(_ctx: &redis_module::Context) {}
}

use accounts::{Change, Credential, Scan, Sink};
use ffi::{Item, Outcome};
use libfuzzer_sys::fuzz_target;
use pool::{Choice, Pool, Tier, names};
use redis_module::{Context, Keyspace, Value, server};
use secrecy::ExposeSecret;
use std::collections::{BTreeMap, BTreeSet};

/// Steps of one input.
const MOST_STEPS: usize = 200;
/// What begins a token that is looked for where it does not belong.
const SECRET: &[u8] = b"secret-";
/// The code words of the table in the README, and what Redis itself says of a key
/// of another type or of its memory.
const CODES: [&str; 9] = [
    "NOKEY",
    "REVOKED",
    "EXPIRED",
    "POOLFULL",
    "NOACCOUNT",
    "NOTOKEN",
    "ERR",
    "WRONGTYPE",
    "OOM",
];

fuzz_target!(|input: &[u8]| {
    let mut run = Run::begin(input);
    for line in input.split(|byte| *byte == b'\n').take(MOST_STEPS) {
        run.step(line);
    }
    run.settle();
    run.check();
    let repaired = Run::words(&run.command(&words(b"MPOOL.REPAIR", &[])));
    assert_eq!(
        repaired[1],
        Item::Integer(0),
        "REPAIR changed something: {repaired:?}"
    );
});

struct Run {
    capacity: u32,
    rotation_ms: i64,
    /// Client keys that KEYGEN made.
    keys: Vec<Vec<u8>>,
    /// Those that someone has used as the name of something else, or as a text.
    told: BTreeSet<Vec<u8>>,
    /// Account files that are there; none: one that can't be used.
    files: BTreeMap<(Tier, String), Option<Credential>>,
    /// Whether tokens come from account files alone.
    secrets_are_tokens: bool,
}

impl Run {
    fn begin(input: &[u8]) -> Self {
        server::start(events::key_changed);
        node::forget_arrivals();
        let choice = Choice::Random(rand::SeedableRng::seed_from_u64(1));
        let node = node::Node::new(Pool::new(2, 86_400_000), choice, true);
        node::install(Some(node));
        let mut run = Self {
            capacity: 2,
            rotation_ms: 86_400_000,
            keys: Vec::new(),
            told: BTreeSet::new(),
            files: BTreeMap::new(),
            secrets_are_tokens: !input
                .split(|byte| *byte == b'\n')
                .any(|line| !line.starts_with(b"FILE ") && holds(line, SECRET)),
        };
        for (tier, name) in [
            ("medium", "a"),
            ("medium", "b"),
            ("medium", "c"),
            ("high", "h"),
        ] {
            let content = format!(r#"{{"access_token":"secret-{name}"}}"#);
            run.file(tier.as_bytes(), name.as_bytes(), content.as_bytes());
        }
        run
    }

    fn step(&mut self, line: &[u8]) {
        let words = words(line, &self.keys);
        let word = |place: usize| words.get(place).map_or(&b""[..], Vec::as_slice);
        let number = || std::str::from_utf8(word(1)).ok()?.parse::<i64>().ok();
        if !takes_key(word(0)) {
            let keys = words.iter().filter(|word| self.keys.contains(word));
            self.told.extend(keys.cloned());
        }
        match word(0) {
            b"FILE" => {
                // The content is what follows, blanks included.
                let content = line
                    .splitn(4, |byte| *byte == b' ')
                    .nth(3)
                    .unwrap_or_default();
                self.file(word(1), word(2), content);
            }
            b"SET" => server::set(word(1), Some(Value::Text(word(2).to_vec()))),
            b"LIST" => server::set(word(1), Some(Value::List)),
            b"DEL" => server::set(word(1), None),
            b"HSET" | b"HDEL" => {
                let mut hash = match server::get(word(1)) {
                    Some(Value::Hash(hash)) => hash,
                    _ => BTreeMap::new(),
                };
                let rest = words.get(2..).unwrap_or_default();
                if word(0) == b"HSET" {
                    let pairs = rest.chunks_exact(2);
                    hash.extend(pairs.map(|pair| (pair[0].clone(), pair[1].clone())));
                } else {
                    rest.iter().for_each(|field| drop(hash.remove(field)));
                }
                server::set(word(1), (!hash.is_empty()).then_some(Value::Hash(hash)));
            }
            b"FLUSH" => {
                server::flush();
                events::flushed();
                self.settle();
            }
            b"OOM" => server::set_full(word(1) == b"1"),
            b"CAPACITY" => {
                if let Some(capacity) = number().and_then(|n| u32::try_from(n).ok())
                    && (1..=pool::MAX_CAPACITY).contains(&capacity)
                {
                    self.capacity = capacity;
                    node::with(|node| node.pool.set_capacity(capacity)).unwrap();
                }
            }
            b"ROTATION" => {
                if let Some(ms) = number()
                    && (1..=pool::MAX_ROTATION_MS).contains(&ms)
                {
                    self.rotation_ms = ms;
                    node::with(|node| node.pool.set_rotation_ms(ms)).unwrap();
                }
            }
            _ => {
                self.command(&words);
                self.settle();
                self.check();
            }
        }
        node::with(|node| node.pool.audit()).unwrap();
        for message in ffi::logged() {
            let leaks = self.secrets_are_tokens && holds(message.as_bytes(), SECRET);
            assert!(!leaks, "logged: {message}");
        }
    }

    /// An account file comes, changes or, without content, goes.
    fn file(&mut self, tier: &[u8], name: &[u8], content: &[u8]) {
        let (Some(tier), Some(name)) = (Tier::parse(tier), names::account_name(name)) else {
            return;
        };
        let (key, name) = ((tier, name.to_owned()), name.to_owned());
        let change = if content.is_empty() {
            self.files.remove(&key);
            Change::Gone { tier, file: name }
        } else {
            match accounts::parse::parse(content) {
                Ok(credential) => {
                    self.files.insert(key, Some(credential.clone()));
                    Change::Valid {
                        tier,
                        name,
                        credential,
                    }
                }
                Err(reason) => {
                    self.files.insert(key, None);
                    Change::Invalid { tier, name, reason }
                }
            }
        };
        let scan = Scan {
            changes: vec![change],
            complete: true,
            readable: [true; 3],
        };
        background::open().apply(scan);
    }

    /// What the watcher's thread does when it is woken.
    fn settle(&self) {
        while background::open().settle() {}
    }

    /// Runs one of the module's commands, if it is one, and checks the answer.
    fn command(&mut self, words: &[Vec<u8>]) -> Vec<Item> {
        let name = words.first().map(|name| name.to_ascii_uppercase());
        let run = match name.as_deref().unwrap_or_default() {
            b"MPOOL.ACQUIRE" => ffi::call::<commands::Acquire>,
            b"MPOOL.RELEASE" => ffi::call::<commands::Release>,
            b"MPOOL.STATUS" => ffi::call::<commands::Status>,
            b"MPOOL.KEYGEN" => ffi::call::<commands::Keygen>,
            b"MPOOL.REVOKE" => ffi::call::<commands::Revoke>,
            b"MPOOL.COOLDOWN" => ffi::call::<commands::Cooldown>,
            b"MPOOL.RELOAD" => ffi::call::<commands::Reload>,
            b"MPOOL.REPAIR" => ffi::call::<commands::Repair>,
            _ => return Vec::new(),
        };
        let name = name.unwrap_or_default();
        let settled = !node::with(|node| node.pool.has_backlog()).unwrap();
        let before = server::keys();
        let Outcome { reply, secret } = run(words);
        if let [Item::Error(text)] = &reply[..] {
            check_error(text);
            let after = server::keys();
            // A refusal frees no slot, but what was wrong before may be put right.
            assert!(
                !settled || after == before,
                "{text}, and something was written"
            );
            if name == b"MPOOL.ACQUIRE" {
                self.check_refused(words, text, &after);
            }
            return reply;
        }
        assert_eq!(value(&reply), Some(&[][..]), "no whole value: {reply:?}");
        let place = match (&name[..], words.get(1)) {
            (b"MPOOL.ACQUIRE" | b"MPOOL.RELEASE" | b"MPOOL.REVOKE", _) => Some(1),
            (b"MPOOL.STATUS", Some(word)) if word.eq_ignore_ascii_case(b"KEY") => Some(2),
            _ => None,
        };
        assert!(
            place.is_none() || place == secret,
            "a key is shown in the logs"
        );
        let with_token = name == b"MPOOL.ACQUIRE" && words.len() == 4;
        for item in &reply {
            let Item::Text(text) = item else { continue };
            if self.secrets_are_tokens && !with_token {
                assert!(!holds(text, SECRET), "a token in a reply: {reply:?}");
            }
            if name != b"MPOOL.KEYGEN" {
                assert!(
                    !self.keys.contains(text) || self.told.contains(text),
                    "a client key in a reply: {reply:?}"
                );
            }
        }
        match &name[..] {
            b"MPOOL.KEYGEN" => match &reply[2] {
                Item::Text(key) if key.len() == 74 => self.keys.push(key.clone()),
                other => panic!("no client key: {other:?}"),
            },
            b"MPOOL.ACQUIRE" => self.check_acquired(words, &reply),
            b"MPOOL.REVOKE" => {
                let next = ffi::call::<commands::Acquire>(&[
                    b"MPOOL.ACQUIRE".to_vec(),
                    words[1].clone(),
                    b"1".to_vec(),
                ]);
                assert!(
                    matches!(&next.reply[..], [Item::Error(text)] if text.starts_with("REVOKED")
                        || text.starts_with("ERR")),
                    "after REVOKE: {:?}",
                    next.reply
                );
            }
            b"MPOOL.STATUS" => assert!(server::keys() == before, "STATUS wrote"),
            _ => {}
        }
        reply
    }

    fn words(reply: &[Item]) -> Vec<Item> {
        reply[1..].to_vec()
    }

    fn check_acquired(&self, words: &[Vec<u8>], reply: &[Item]) {
        let text = |place: usize| match &reply[place] {
            Item::Text(text) => String::from_utf8(text.clone()).unwrap(),
            other => panic!("no text: {other:?}"),
        };
        let (account, state) = (text(2), text(4));
        let keys = server::keys();
        let again = ffi::call::<commands::Acquire>(&[
            b"MPOOL.ACQUIRE".to_vec(),
            words[1].clone(),
            words[2].clone(),
        ]);
        assert!(server::keys() == keys, "the same acquire wrote something");
        assert_eq!(
            again.reply.get(2),
            reply.get(2),
            "the same acquire, another account"
        );
        let now = instant(&words[2]);
        if words.len() == 4 {
            let tier =
                record(&keys, &words[1]).and_then(|record| Tier::parse(record.get(&b"tier"[..])?));
            let credential = self.files[&(tier.unwrap_or(Tier::Medium), account.clone())].as_ref();
            assert_eq!(
                text(12),
                credential.unwrap().token.expose_secret(),
                "another's token"
            );
        }
        if state == "bound" {
            return;
        }
        let lease = hash(&keys, b"key_rotation:", &words[1]).unwrap();
        assert_eq!(
            lease[&b"account"[..]],
            account.as_bytes(),
            "lent, but not on record"
        );
        if let Some(now) = now {
            assert!(
                self.usable(&keys, &account, now),
                "{state}: {account} is not to be lent"
            );
            assert!(number(lease.get(&b"next_rotation"[..])).is_none_or(|next| next > now));
            if state != "current" {
                assert_eq!(reply[8], Item::Integer(now));
                assert_eq!(reply[10], Item::Integer(now + self.rotation_ms));
            }
        }
    }

    /// Nobody is refused while a slot is free.
    fn check_refused(&self, words: &[Vec<u8>], text: &str, keys: &Keyspace) {
        let Some(now) = words.get(2).and_then(|now| instant(now)) else {
            return;
        };
        let usable = self.files.keys().filter(|(tier, _)| *tier == Tier::Medium);
        let usable: BTreeSet<&str> = usable
            .map(|(_, name)| name.as_str())
            .filter(|name| self.usable(keys, name, now))
            .collect();
        if text.starts_with("NOACCOUNT no account of this tier") {
            assert!(usable.is_empty(), "{text}, but {usable:?}");
        }
        if text.starts_with("POOLFULL") {
            assert!(!usable.is_empty(), "{text}, but there is no account");
            for account in usable {
                let held = leases(keys).filter(|(key, lease)| {
                    let end =
                        record(keys, key).and_then(|record| number(record.get(&b"expires_at"[..])));
                    let next = number(lease.get(&b"next_rotation"[..])).unwrap_or(0);
                    *key != &words[1][..]
                        && lease
                            .get(&b"account"[..])
                            .is_some_and(|held| held == account.as_bytes())
                        && next.min(end.unwrap_or(i64::MAX)) > now
                });
                let held = held.count();
                assert!(
                    held >= self.capacity as usize,
                    "{text}, but {account} has {held}"
                );
            }
        }
    }

    /// Whether an account of the pool may be lent at `now`.
    fn usable(&self, keys: &Keyspace, account: &str, now: i64) -> bool {
        let file = self.files.get(&(Tier::Medium, account.to_owned()));
        let Some(Some(credential)) = file else {
            return false;
        };
        let until = match keys.get(format!("medium_pool:cooldown:{account}").as_bytes()) {
            Some(Value::Text(text)) => std::str::from_utf8(text)
                .ok()
                .and_then(|text| text.parse::<u64>().ok()),
            _ => None,
        };
        let until = until.and_then(|until| i64::try_from(until).ok());
        credential.expires_at.is_none_or(|end| now < end) && until.is_none_or(|until| now >= until)
    }

    /// The keyspace against itself, and the view against the keyspace.
    fn check(&self) {
        let keys = server::keys();
        let mut counted: BTreeMap<Vec<u8>, usize> = BTreeMap::new();
        for (_, lease) in leases(&keys) {
            if let Some(account) = lease.get(&b"account"[..]) {
                *counted.entry(account.clone()).or_default() += 1;
            }
        }
        for (name, value) in &keys {
            let Some(account) = name.strip_prefix(b"medium_pool:slots:") else {
                continue;
            };
            let Some(account) = names::account_name(account) else {
                continue;
            };
            let count = counted.remove(account.as_bytes()).unwrap_or(0);
            assert_eq!(
                value,
                &Value::Text(count.to_string().into()),
                "slots of {account}"
            );
            assert!(
                count <= self.capacity as usize,
                "{account} is over its slots"
            );
        }
        assert!(counted.is_empty(), "leases without counters: {counted:?}");
        let rebuilt = node::rebuilt(&Context).unwrap();
        rebuilt.audit();
        let differences = node::with(|node| node.pool.differences(&rebuilt)).unwrap();
        assert_eq!(differences, 0, "the view has drifted from the keyspace");
    }
}

/// Whether it is a command that is told a client key as what it is.
fn takes_key(command: &[u8]) -> bool {
    [
        "MPOOL.ACQUIRE",
        "MPOOL.RELEASE",
        "MPOOL.REVOKE",
        "MPOOL.STATUS",
    ]
    .iter()
    .any(|name| command.eq_ignore_ascii_case(name.as_bytes()))
}

fn words(line: &[u8], keys: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let words = line
        .split(|byte| *byte == b' ')
        .filter(|word| !word.is_empty());
    words.map(|word| expand(word, keys)).collect()
}

fn expand(word: &[u8], keys: &[Vec<u8>]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut bytes = word.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        match byte {
            1 => out.push(b'\n'),
            2 => out.push(b' '),
            3 => {}
            4 => out.extend([b'x'; 300]),
            b'$' => match bytes.peek().copied() {
                Some(digit @ b'0'..=b'9') => {
                    bytes.next();
                    let key = keys.get(usize::from(digit - b'0'));
                    out.extend_from_slice(key.map_or(&b"nobody"[..], Vec::as_slice));
                }
                _ => out.push(byte),
            },
            byte => out.push(byte),
        }
    }
    out
}

fn check_error(text: &str) {
    let code = text.split(' ').next().unwrap_or_default();
    assert!(CODES.contains(&code), "an unknown error: {text}");
    assert!(
        text.bytes().all(|byte| (b' '..=b'~').contains(&byte)),
        "{text:?}"
    );
    assert!(!text.contains("internal error"), "{text}");
}

/// What follows the first value; none when it is not whole.
fn value(items: &[Item]) -> Option<&[Item]> {
    let (first, mut rest) = items.split_first()?;
    let inner = match first {
        Item::Map(pairs) => 2 * pairs,
        Item::Array(length) => *length,
        Item::Error(_) => return None,
        _ => 0,
    };
    for _ in 0..inner {
        rest = value(rest)?;
    }
    Some(rest)
}

fn holds(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

fn instant(text: &[u8]) -> Option<i64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn number(text: Option<&Vec<u8>>) -> Option<i64> {
    let text = text.filter(|text| text.iter().all(u8::is_ascii_digit))?;
    instant(text)
}

type Hash = BTreeMap<Vec<u8>, Vec<u8>>;

fn hash<'a>(keys: &'a Keyspace, prefix: &[u8], key: &[u8]) -> Option<&'a Hash> {
    match keys.get(&[prefix, key].concat())? {
        Value::Hash(hash) => Some(hash),
        _ => None,
    }
}

fn record<'a>(keys: &'a Keyspace, key: &[u8]) -> Option<&'a Hash> {
    hash(keys, b"client_keys:", key)
}

/// Every lease of a key that can be one.
fn leases(keys: &Keyspace) -> impl Iterator<Item = (&[u8], &Hash)> {
    keys.iter().filter_map(|(name, value)| {
        let key = name.strip_prefix(b"key_rotation:")?;
        match value {
            Value::Hash(hash) => names::client_key(key).map(|_| (key, hash)),
            _ => None,
        }
    })
}
