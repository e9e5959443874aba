//! The Lua script that the benchmarks measure the module against keeps the same
//! rules: random commands get the same answers from both, and leave the same
//! leases and counters behind. `MPOOL_SEED` repeats a run.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop anywhere"
)]

mod support;

use rand::RngExt;
use redis::Value;
use std::collections::BTreeMap;
use support::*;

const ACCOUNTS: [&str; 5] = ["a", "b", "c", "d", "e"];
const SLOTS: &str = "2";

/// A server with the script alone.
struct Peer {
    client: Client,
    script: String,
    _server: Server,
}

impl Peer {
    fn start() -> Self {
        let server = Options {
            bare: true,
            ..Options::default()
        }
        .start();
        let mut client = server.connect();
        let path = repository().join("benches/peer.lua");
        let text = std::fs::read_to_string(path).unwrap();
        let script = client.run(&["SCRIPT", "LOAD", &text]);
        for account in ACCOUNTS {
            client.ok(&["SET", &format!("medium_pool:slots:{account}"), "0"]);
            let _: i64 = client.run(&["ZADD", "peer:by_use", "0", account]);
        }
        Self {
            client,
            script,
            _server: server,
        }
    }

    fn register(&mut self, key: &str, expires_at: &str) {
        let name = format!("client_keys:{key}");
        let words = ["HSET", &name, "use_pool", "true", "active", "true"];
        let _: i64 = self
            .client
            .run(&[&words[..], &["expires_at", expires_at]].concat());
    }

    fn call(&mut self, words: &[&str]) -> Result<Value, String> {
        let words = [&["EVALSHA", &self.script, "0"], words].concat();
        self.client.try_run(&words).map_err(|error| said(&error))
    }
}

/// An error's code, and the instant that it names.
fn said(error: &redis::RedisError) -> String {
    let code = error.code().unwrap_or_default().to_owned();
    let last = error.detail().and_then(|text| text.rsplit(' ').next());
    match last.filter(|word| word.parse::<i64>().is_ok()) {
        Some(instant) => format!("{code} {instant}"),
        None => code,
    }
}

/// A reply's fields; a script's null and a command's are the same.
fn fields(reply: &Value) -> BTreeMap<String, Value> {
    let fields: BTreeMap<String, Value> = redis::from_redis_value_ref(reply).unwrap();
    fields
        .into_iter()
        .map(|(name, value)| {
            let value = match value {
                Value::Boolean(false) => Value::Nil,
                value => value,
            };
            (name, value)
        })
        .collect()
}

/// Leases, registrations, counters and running cooldowns.
fn keyspace(client: &mut Client, keys: &[String], now: i64) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for key in keys {
        let name = format!("key_rotation:{key}");
        let lease: BTreeMap<String, String> = client.run(&["HGETALL", &name]);
        found.insert(name, format!("{lease:?}"));
        let name = format!("client_keys:{key}");
        let active: Option<String> = client.run(&["HGET", &name, "active"]);
        found.insert(name, format!("{active:?}"));
    }
    for account in ACCOUNTS {
        let name = format!("medium_pool:slots:{account}");
        let slots: Option<String> = client.run(&["GET", &name]);
        found.insert(name, format!("{slots:?}"));
        let name = format!("medium_pool:cooldown:{account}");
        let until: Option<i64> = client.run(&["GET", &name]);
        found.insert(name, format!("{:?}", until.filter(|until| *until > now)));
    }
    found
}

#[test]
fn the_lua_peer_keeps_the_modules_rules() {
    let mut rng = seeded();
    let server = Options::default().accounts(&ACCOUNTS).start();
    let mut module = server.connect();
    let mut peer = Peer::start();
    let mut now = 1_755_266_400_000_i64;
    let mut made = 0;
    let mut keys: Vec<String> = Vec::new();
    let mut states = BTreeMap::<String, u32>::new();
    for step in 0..1_500 {
        now += [0, 0, 0, 1, 60_000, DAY / 24, DAY / 6][rng.random_range(0..7)];
        while keys.len() < 20 {
            made += 1;
            let key = format!("sk-cli-v1-{made}");
            let expires_at = (now + rng.random_range(1..5) * DAY + 7).to_string();
            peer.register(&key, &expires_at);
            let name = format!("client_keys:{key}");
            let words = ["HSET", &name, "use_pool", "true", "active", "true"];
            let rest = ["tier", "medium", "expires_at", &expires_at];
            let _: i64 = module.run(&[&words[..], &rest].concat());
            keys.push(key);
        }
        let place = rng.random_range(0..keys.len());
        let key = keys[place].clone();
        let key = key.as_str();
        let account = ACCOUNTS[rng.random_range(0..ACCOUNTS.len())];
        let at = now.to_string();
        let what = rng.random_range(0..100);
        let (ours, theirs) = match what {
            0..75 => {
                let ours = module.try_run::<Value>(&["MPOOL.ACQUIRE", key, &at]);
                let ours = ours.map_err(|error| said(&error));
                // So that both settle ties alike.
                let chosen = ours
                    .as_ref()
                    .ok()
                    .map(|reply| text(&fields(reply)["account"]));
                let day = DAY.to_string();
                let mut words = vec!["acquire", key, &at, SLOTS, &day];
                words.extend(chosen.as_deref());
                (ours, peer.call(&words))
            }
            75..88 => {
                let ours = module.try_run(&["MPOOL.RELEASE", key]);
                (
                    ours.map_err(|error| said(&error)),
                    peer.call(&["release", key]),
                )
            }
            88..90 => {
                let ours = module.try_run(&["MPOOL.REVOKE", key]);
                (
                    ours.map_err(|error| said(&error)),
                    peer.call(&["revoke", key]),
                )
            }
            _ => {
                let ms = ["0", "1000", "3600000", "86400000"][rng.random_range(0..4)];
                module.ok(&["MPOOL.COOLDOWN", "medium", account, &at, ms]);
                peer.call(&["cooldown", account, &at, ms]).unwrap();
                continue;
            }
        };
        let shape = |outcome: Result<Value, String>| outcome.map(|reply| fields(&reply));
        let (ours, theirs) = (shape(ours), shape(theirs));
        assert_eq!(ours, theirs, "step {step}, {key} at {at}");
        let state = match &ours {
            Ok(reply) => reply.get("state").map_or("freed".to_owned(), text),
            Err(error) => error.split(' ').next().unwrap().to_owned(),
        };
        if ["REVOKED", "EXPIRED"].contains(&&*state) && rng.random_bool(0.3) {
            keys.swap_remove(place);
        }
        let chose = ["assigned", "rotated", "failover"].contains(&&*state);
        *states.entry(state).or_default() += 1;
        if chose || step % 10 == 0 {
            let (ours, theirs) = (
                keyspace(&mut module, &keys, now),
                keyspace(&mut peer.client, &keys, now),
            );
            assert_eq!(ours, theirs, "step {step}, {key} at {at}");
        }
    }
    println!("{states:?}");
    for state in [
        "assigned", "current", "rotated", "failover", "POOLFULL", "REVOKED", "EXPIRED", "freed",
    ] {
        assert!(
            states.get(state).is_some_and(|count| *count > 3),
            "{state}: {states:?}"
        );
    }
}
