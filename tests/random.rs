//! Random commands, hand-made changes and account files that come and go, at
//! times that jump back and forth: after each step the keyspace agrees with
//! itself, and a rebuild of the view finds nothing different.
//! `MPOOL_TEST_SEED` repeats a run, `MPOOL_STEPS` makes it longer.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop anywhere"
)]

mod support;

use rand::{RngExt, rngs::SmallRng};
use redis::Value;
use std::collections::BTreeMap;
use support::*;

const ACCOUNTS: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];
const TIERS: [&str; 3] = ["medium", "high", "supreme"];

struct Run {
    server: Server,
    client: Client,
    rng: SmallRng,
    keys: Vec<String>,
    now: i64,
    counts: BTreeMap<String, u64>,
    /// The last steps, for whoever has to find out.
    trace: Vec<String>,
}

impl Run {
    fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.rng.random_range(0..of.len())].clone()
    }

    fn key(&mut self) -> String {
        let keys = std::mem::take(&mut self.keys);
        let key = self.pick(&keys);
        self.keys = keys;
        key
    }

    /// Runs a command that may be refused by the rules, and by nothing else.
    fn go(&mut self, words: &[&str]) -> Option<Value> {
        self.trace.push(words.join(" "));
        match self.client.try_run::<Value>(words) {
            Ok(reply) => {
                *self.counts.entry(words[0].to_owned()).or_default() += 1;
                Some(reply)
            }
            Err(error) => {
                let code = error.code().unwrap_or_default().to_owned();
                // Long runs leave more keys than are read at once after a swap. What
                // changes by hand then is put right with the rest, in many turns.
                if code == "LOADING" {
                    self.client.ok(&["MPOOL.REPAIR"]);
                    return self.go(words);
                }
                let known = [
                    "NOKEY",
                    "REVOKED",
                    "EXPIRED",
                    "POOLFULL",
                    "NOACCOUNT",
                    "ERR",
                    "WRONGTYPE",
                ];
                assert!(known.contains(&code.as_str()), "{words:?}: {error}");
                assert!(
                    !error.to_string().contains("internal error"),
                    "{words:?}: {error}"
                );
                if ["REVOKED", "EXPIRED"].contains(&code.as_str()) && self.rng.random_bool(0.3) {
                    // Else most keys would be of no use after a while.
                    self.keys.retain(|key| key != words[1]);
                    let key = self.client.pool_key();
                    self.keys.push(key);
                }
                *self.counts.entry(code).or_default() += 1;
                None
            }
        }
    }

    fn invalid_files(&mut self) -> Value {
        let status: BTreeMap<String, Value> =
            redis::from_redis_value(self.go(&["MPOOL.STATUS"]).unwrap()).unwrap();
        status["invalid_files"].clone()
    }

    /// `invalid` are the files that can't be used just before.
    fn step(&mut self, invalid: &Value) {
        let key = self.key();
        let account = self.pick(&ACCOUNTS);
        let now = self.now.to_string();
        match self.rng.random_range(0..100) {
            0..40 => self.acquire(&key, invalid),
            40..48 => drop(self.go(&["MPOOL.RELEASE", &key])),
            48..50 => drop(self.go(&["MPOOL.RELEASE", &key, &now])),
            50..53 => {
                self.go(&["MPOOL.REVOKE", &key]);
                self.keys.retain(|other| *other != key);
                let key = self.client.pool_key();
                self.keys.push(key);
            }
            53..57 => {
                let ms = self.pick(&["0", "1000", "43200000", "86400000"]);
                self.go(&["MPOOL.COOLDOWN", "medium", account, &now, ms]);
            }
            57..60 => {
                let tier = self.pick(&TIERS);
                let target = if tier == "medium" && self.rng.random_bool(0.5) {
                    "POOL"
                } else {
                    account
                };
                if let Some(reply) =
                    self.go(&["MPOOL.KEYGEN", tier, target, "DAYS", "3", "NOW", &now])
                {
                    let reply: BTreeMap<String, Value> =
                        redis::from_redis_value_ref(&reply).unwrap();
                    let at = self.rng.random_range(0..self.keys.len());
                    self.keys[at] = text(&reply["key"]);
                }
            }
            60..68 => self.change_files(account),
            68..74 => {
                self.now += self.pick(&[1, 3_600_000, DAY / 2, DAY, DAY, -1, -3_600_000, -DAY]);
                self.now = self.now.max(0);
            }
            74..96 => self.change_by_hand(&key, account),
            96..97 => {
                let how = self.pick(&["RELOAD", "LOADAOF"]);
                self.go(&["DEBUG", how]);
                // Where a module listens to notifications, Valkey 8.1 leaves the
                // connection in the database of the last key loaded.
                self.client.ok(&["SELECT", "0"]);
            }
            97..98 => drop(self.go(&["MPOOL.STATUS", "NOW", &now])),
            98..99 => {
                let slots = self.pick(&["1", "2", "3"]);
                self.go(&["CONFIG", "SET", "mpool.slots-per-account", slots]);
                self.go(&["CONFIG", "SET", "mpool.slots-per-account", "2"]);
            }
            _ => {
                self.go(&["SWAPDB", "0", "1"]);
                self.go(&["MPOOL.RELEASE", &key]);
                self.go(&["SWAPDB", "0", "1"]);
            }
        }
    }

    fn acquire(&mut self, key: &str, invalid: &Value) {
        let (now, at) = (self.now, self.now.to_string());
        if let Some(lease) = self.go(&["MPOOL.ACQUIRE", key, &at]) {
            let lease: BTreeMap<String, Value> = redis::from_redis_value_ref(&lease).unwrap();
            let (account, state) = (text(&lease["account"]), text(&lease["state"]));
            if state != "bound" {
                let shown = self.client.state(&account, now);
                let used = ["partial", "full"].map(|state| Some(state.to_owned()));
                // A file that stays half-written may have been given up since.
                assert!(
                    used.contains(&shown) || self.invalid_files() != *invalid,
                    "{state} on an account that is {shown:?}"
                );
            }
            *self.counts.entry(state).or_default() += 1;
            return;
        }
        // Nobody who may have a slot is refused while one is free.
        let status = self.client.try_run::<BTreeMap<String, Value>>(&[
            "MPOOL.STATUS",
            "KEY",
            key,
            "NOW",
            &at,
        ]);
        if status.is_ok_and(|status| {
            ["idle", "leased", "due"].contains(&text(&status["state"]).as_str())
        }) {
            let status = self.client.map(&["MPOOL.STATUS", "NOW", &at]);
            let medium: BTreeMap<String, Option<i64>> =
                redis::from_redis_value_ref(&status["medium"]).unwrap();
            assert_eq!(
                medium["free"],
                Some(0),
                "{key} was refused at {at}: {medium:?}"
            );
            // What is overdue would have been freed, had it been of any use.
            for lease in self.client.pages("LEASES", "medium", "1000") {
                let due = optional_number(&lease["next_rotation"]).unwrap_or(0);
                let account = text(&lease["account"]);
                let shown = self.client.state(&account, now);
                let lost = ["cooldown", "expired"].map(|state| Some(state.to_owned()));
                assert!(
                    due > now || lost.contains(&shown),
                    "{key} was refused at {at}; {account}, {shown:?}, was due at {due}"
                );
            }
        }
    }

    fn change_files(&mut self, account: &str) {
        let tier = self.pick(&TIERS);
        let name = format!("{tier}/{account}");
        let end = format!(
            r#"{{"access_token": "t", "expires_at": {}}}"#,
            (self.now + DAY / 2).max(100_000_000_000)
        );
        let good = r#"{"api_key": "k"}"#;
        let content = self.pick(&["", "gone", "{", good, good, good, good, end.as_str()]);
        self.trace.push(format!("file {name}: {content}"));
        match content {
            "gone" => drop(std::fs::remove_file(self.server.account_file(&name))),
            content => self.server.write_account(&name, content),
        }
        self.go(&["MPOOL.RELOAD"]);
    }

    fn change_by_hand(&mut self, key: &str, account: &str) {
        let (record, lease) = (format!("client_keys:{key}"), format!("key_rotation:{key}"));
        let other = format!("key_rotation:{}", self.key());
        let (slots, cooldown) = (
            format!("medium_pool:slots:{account}"),
            format!("medium_pool:cooldown:{account}"),
        );
        let until = (self.now + DAY / 3).to_string();
        match self.rng.random_range(0..24) {
            0 => self.go(&["DEL", &lease]),
            1 => self.go(&["HSET", &lease, "account", account]),
            2 => self.go(&["HSET", &lease, "account", "no/such account"]),
            3 => self.go(&["HSET", &lease, "account", "nowhere"]),
            4 => self.go(&["HDEL", &lease, "account"]),
            5 => self.go(&["HSET", &lease, "next_rotation", &until]),
            6 => self.go(&["HSET", &lease, "next_rotation", "soon"]),
            7 => self.go(&["HDEL", &lease, "previous_account", "last_rotation"]),
            8 => self.go(&["RENAME", &lease, &other]),
            9 => self.go(&["COPY", &lease, &other, "REPLACE"]),
            10 => self.go(&["SET", &slots, "9"]),
            11 => self.go(&["DEL", &slots]),
            12 => self.go(&["INCR", &slots]),
            13 => self.go(&["SET", &slots, "many"]),
            14 => self.go(&["SET", &cooldown, &until]),
            15 => self.go(&["SET", &cooldown, "long"]),
            16 => self.go(&["DEL", &cooldown]),
            17 => self.go(&["HSET", &record, "active", "false"]),
            18 => self.go(&["HSET", &record, "active", "true"]),
            19 => self.go(&["HSET", &record, "expires_at", &until]),
            20 => self.go(&["HSET", &record, "use_pool", "true", "tier", "medium"]),
            21 => self.go(&[
                "HSET",
                &record,
                "use_pool",
                "false",
                "account_name",
                account,
            ]),
            22 => {
                let set = self.go(&["PEXPIRE", &lease, "1"]);
                wait_for("the lease to expire", || {
                    (!self.client.run::<bool>(&["EXISTS", &lease])).then_some(())
                });
                set
            }
            _ => {
                self.go(&["DEL", &record]);
                self.go(&["HSET", &record, "tier", "medium", "use_pool", "true"])
            }
        };
        // Noticed and put right by the next command.
        let now = self.now.to_string();
        self.go(&["MPOOL.ACQUIRE", key, &now]);
    }
}

#[test]
fn any_sequence_leaves_a_pool_that_agrees_with_itself() {
    let steps = std::env::var("MPOOL_STEPS").map_or(2500, |steps| steps.parse().unwrap());
    let server = Options::default()
        .accounts(&ACCOUNTS)
        .server(&["--appendonly", "yes"])
        .start();
    let mut replica = Options::default().replica_of(&server).start();
    let mut client = server.connect();
    let keys = (0..15).map(|_| client.pool_key()).collect();
    let mut run = Run {
        server,
        client,
        rng: seeded(),
        keys,
        now: 1_755_266_400_000,
        counts: BTreeMap::new(),
        trace: Vec::new(),
    };
    for step in 0..steps {
        let before = run.invalid_files();
        run.step(&before);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            run.client.check_invariants(2);
            if step % 3 == 0 {
                let repaired: BTreeMap<String, i64> = run.client.run(&["MPOOL.REPAIR"]);
                // A file that stays half-written is given up in its own time: then the
                // account's counter and leases may be among what REPAIR puts right.
                let is_right = repaired["changed"] == 0 || run.invalid_files() != before;
                assert!(is_right && repaired["view"] == 0, "{repaired:?}");
            }
        }));
        if let Err(failure) = outcome {
            let from = run.trace.len().saturating_sub(15);
            println!(
                "step {step}; {:?}; the last commands: {:#?}",
                run.client.broken_invariant(2),
                &run.trace[from..]
            );
            std::panic::resume_unwind(failure);
        }
    }
    println!("{:?}", run.counts);
    for what in [
        "assigned",
        "current",
        "rotated",
        "failover",
        "bound",
        "POOLFULL",
        "NOACCOUNT",
        "REVOKED",
        "EXPIRED",
        "NOKEY",
    ] {
        assert!(
            run.counts.contains_key(what) || steps < 1000,
            "{what} never happened: {:?}",
            run.counts
        );
    }
    wait_for_same(&mut run.client, &mut replica.connect());
    assert!(run.server.is_alive() && replica.is_alive());
}
