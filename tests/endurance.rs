//! Commands of every kind, good and bad, on one server that is meanwhile saved,
//! rewritten, loaded, restarted and copied, with the module unloaded and loaded
//! again: it never fails, and keeps no memory. `make sanitize` runs it with
//! tools that see each wrong access and each leak. `MPOOL_COMMANDS` says how many
//! commands of the module (10000), `MPOOL_SEED` repeats a run.
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

const ACCOUNTS: [&str; 6] = ["a", "b", "c", "d", "e", "f"];
const KEYS: usize = 20;
/// How many commands are sent at a time.
const BATCH: usize = 50;

type Words = Vec<Vec<u8>>;

fn words(words: &[&str]) -> Words {
    words.iter().map(|word| word.as_bytes().to_vec()).collect()
}

struct Run {
    rng: SmallRng,
    now: i64,
    /// Commands of the module that were sent.
    sent: usize,
    /// How often each command was answered, and each error given.
    counts: BTreeMap<String, u64>,
}

impl Run {
    fn pick<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.rng.random_range(0..of.len())]
    }

    fn key(&mut self) -> String {
        // One of them is nobody's.
        format!("key{}", self.rng.random_range(0..=KEYS))
    }

    /// What comes next: mostly one command, some belong together.
    fn next(&mut self) -> Vec<Words> {
        let key = &self.key();
        let account = self.pick(&ACCOUNTS);
        let tier = self.pick(&["medium", "medium", "high", "supreme"]);
        let steps = [1, 1000, DAY / 4, DAY / 2, -1, -DAY / 8];
        self.now += steps[self.rng.random_range(0..steps.len())];
        let now = &self.now.to_string();
        let acquire = words(&["MPOOL.ACQUIRE", key, now]);
        let one = match self.rng.random_range(0..100) {
            0..25 => acquire,
            25..34 => words(&["MPOOL.ACQUIRE", key, now, "WITHTOKEN"]),
            34..40 => words(&["MPOOL.RELEASE", key]),
            40..43 => words(&["MPOOL.RELEASE", key, now]),
            43..46 => words(&["MPOOL.STATUS", "NOW", now]),
            46..48 => words(&["MPOOL.STATUS", "ACCOUNTS", tier, "COUNT", "2"]),
            48..50 => words(&["MPOOL.STATUS", "LEASES", tier, "COUNT", "3", "NOW", now]),
            50..53 => words(&["MPOOL.STATUS", "KEY", key, "NOW", now]),
            53..56 => words(&["MPOOL.KEYGEN", "medium", "POOL", "DAYS", "3", "NOW", now]),
            56..58 => words(&["MPOOL.KEYGEN", tier, account, "NAME", "a label: 测试"]),
            58..60 => words(&["MPOOL.REVOKE", key]),
            60..64 => {
                let ms = self.pick(&["0", "1000", "43200000"]);
                words(&["MPOOL.COOLDOWN", tier, account, now, ms, "REASON", "429 %s"])
            }
            64..65 => words(&["MPOOL.RELOAD"]),
            65..67 => words(&["MPOOL.REPAIR"]),
            67..79 => self.refused(key, now),
            79..81 => return self.together(&[b"MULTI"], acquire, &[b"EXEC"]),
            81..82 => return self.together(&[b"MULTI"], acquire, &[b"DISCARD"]),
            82..83 => return self.together(&[b"SELECT", b"3"], acquire, &[b"SELECT", b"0"]),
            83..84 => {
                let reload = words(&["MPOOL.RELOAD"]);
                return self.together(&[b"MULTI"], reload, &[b"EXEC"]);
            }
            84..86 => {
                let script = "redis.call('MPOOL.RELEASE', ARGV[1]) \
                    return redis.call('MPOOL.ACQUIRE', ARGV[1], ARGV[2])";
                words(&["EVAL", script, "0", key, now])
            }
            86..88 => {
                let about = self.pick(&["mpool", "everything", "commandstats"]);
                words(&["INFO", about])
            }
            88..89 => words(&["HELLO", self.pick(&["2", "3"])]),
            89..91 => self.settings(),
            _ => self.by_hand(key, account),
        };
        vec![one]
    }

    fn together(&self, before: &[&[u8]], command: Words, after: &[&[u8]]) -> Vec<Words> {
        let owned = |words: &[&[u8]]| words.iter().map(|word| word.to_vec()).collect();
        vec![owned(before), command, owned(after)]
    }

    /// A command that is not as it should be.
    fn refused(&mut self, key: &str, now: &str) -> Words {
        let long = "x".repeat(300);
        let table: [&[&str]; 20] = [
            &["MPOOL.ACQUIRE"],
            &["MPOOL.ACQUIRE", key],
            &["MPOOL.ACQUIRE", key, "-1"],
            &["MPOOL.ACQUIRE", key, "99999999999999999999"],
            &["MPOOL.ACQUIRE", key, now, "WITHOUT"],
            &["MPOOL.ACQUIRE", key, now, "WITHTOKEN", "WITHTOKEN"],
            &["MPOOL.ACQUIRE", "", now],
            &["MPOOL.ACQUIRE", "测试 一", now],
            &["MPOOL.ACQUIRE", "%s%n\r\n\0", now],
            &["MPOOL.ACQUIRE", &long, now],
            &["MPOOL.RELEASE", "never-registered"],
            &["MPOOL.KEYGEN", "low", "POOL"],
            &["MPOOL.KEYGEN", "high", "POOL"],
            &["MPOOL.KEYGEN", "medium", &long],
            &["MPOOL.KEYGEN", "medium", "POOL", "DAYS", "0"],
            &["MPOOL.REVOKE", "never-registered"],
            &["MPOOL.COOLDOWN", "medium", "no/such", now, "1"],
            &["MPOOL.STATUS", "LEASES", "medium", "CURSOR", "\0"],
            &["MPOOL.STATUS", "ACCOUNTS", &long],
            &["MPOOL.PANIC"],
        ];
        let chosen = self.rng.random_range(0..=table.len());
        match table.get(chosen) {
            Some(refused) => words(refused),
            // Bytes of any kind, any number of them.
            None => {
                let mut refused = words(&[self.pick(&[
                    "MPOOL.ACQUIRE",
                    "MPOOL.RELEASE",
                    "MPOOL.STATUS",
                    "MPOOL.KEYGEN",
                    "MPOOL.COOLDOWN",
                ])]);
                for _ in 0..self.rng.random_range(0..6) {
                    let length = self.rng.random_range(0..40);
                    refused.push((0..length).map(|_| self.rng.random()).collect());
                }
                refused
            }
        }
    }

    fn settings(&mut self) -> Words {
        match self.rng.random_range(0..7) {
            0 => words(&["CONFIG", "GET", "mpool.*"]),
            1 => words(&["CONFIG", "SET", "mpool.rotation-ms", "86400000"]),
            2 => words(&["CONFIG", "SET", "mpool.rotation-ms", "0"]),
            3 => words(&["CONFIG", "SET", "mpool.account-dir", ""]),
            4 => words(&["COMMAND", "DOCS", "mpool.acquire"]),
            5 => words(&["CONFIG", "SET", "mpool.slots-per-account", "1"]),
            _ => words(&["CONFIG", "SET", "mpool.slots-per-account", "2"]),
        }
    }

    /// What an operator may do to the keys.
    fn by_hand(&mut self, key: &str, account: &str) -> Words {
        let (record, lease) = (
            &format!("client_keys:{key}"),
            &format!("key_rotation:{key}"),
        );
        let other = &format!("key_rotation:{}", self.key());
        let slots = &format!("medium_pool:slots:{account}");
        let cooldown = &format!("medium_pool:cooldown:{account}");
        let expires = &(self.now + DAY / 3).to_string();
        match self.rng.random_range(0..18) {
            0 => words(&["DEL", lease]),
            1 => words(&["HSET", lease, "account", account]),
            2 => words(&["HSET", lease, "account", "no/such account"]),
            3 => words(&["HSET", lease, "next_rotation", "soon"]),
            4 => words(&["RENAME", lease, other]),
            5 => words(&["COPY", lease, other, "REPLACE"]),
            6 => words(&["PEXPIRE", lease, "1"]),
            7 => words(&["SET", slots, "9"]),
            8 => words(&["SET", slots, "many"]),
            9 => words(&["LPUSH", slots, "one"]),
            10 => words(&["DEL", slots]),
            11 => words(&["SET", cooldown, "long"]),
            12 => words(&["DEL", cooldown]),
            13 => words(&["HSET", record, "expires_at", expires]),
            14 => words(&["HSET", record, "active", "no"]),
            15 => words(&["HSET", record, "use_pool", "false", "account_name", account]),
            16 => words(&["DEL", record]),
            _ => words(&[
                "HSET", record, "tier", "medium", "use_pool", "true", "active", "true",
            ]),
        }
    }

    /// Sends some commands at once and counts the answers.
    fn batch(&mut self, client: &mut Client) {
        let mut commands = Vec::new();
        while commands.len() < BATCH {
            commands.extend(self.next());
        }
        let mut packed = Vec::new();
        for command in &commands {
            let mut cmd = redis::Cmd::new();
            for word in command {
                cmd.arg(word);
            }
            packed.extend(cmd.get_packed_command());
        }
        client.connection.send_packed_command(&packed).unwrap();
        for command in &commands {
            let name = String::from_utf8_lossy(&command[0]).into_owned();
            self.sent += usize::from(name.starts_with("MPOOL."));
            let reply = client.connection.recv_response();
            let reply = reply.unwrap_or_else(|error| panic!("{command:?}: {error}"));
            *self.counts.entry(name).or_default() += 1;
            if let Value::ServerError(error) = reply {
                let code = error.code().to_owned();
                let text = error.details().unwrap_or_default();
                assert!(
                    !text.contains("internal error") || command[0] == b"MPOOL.PANIC",
                    "{command:?}: {error:?}"
                );
                *self.counts.entry(code).or_default() += 1;
            }
        }
    }

    /// Brings an account's file, makes it one that can't be used, or takes it away.
    fn change_a_file(&mut self, server: &Server) {
        let tier = self.pick(&["medium", "medium", "high", "supreme"]);
        let name = format!("{tier}/{}", self.pick(&ACCOUNTS));
        let good = bearer("any");
        match self.pick(&["", "gone", "{", "good", "good", "good", "good"]) {
            "gone" => drop(std::fs::remove_file(server.account_file(&name))),
            "good" => server.write_account(&name, &good),
            bad => server.write_account(&name, bad),
        }
    }

    /// Keys that are good again, and accounts enough for most of them.
    fn refresh(&mut self, server: &Server, client: &mut Client) {
        for account in ["a", "b", "c", "d"] {
            server.write_account(&format!("medium/{account}"), &bearer(account));
        }
        // What has just happened may have the keyspace read anew.
        client.wait_until_ready();
        client.ok(&["MPOOL.RELOAD"]);
        for number in 0..KEYS {
            let record = format!("client_keys:key{number}");
            client.ok(&["HDEL", &record, "expires_at", "account_name"]);
            let good = ["tier", "medium", "use_pool", "true", "active", "true"];
            client.ok(&[&["HSET", &record][..], &good].concat());
        }
    }
}

/// Waits until nothing is being saved.
fn wait_for_children(client: &mut Client) {
    wait_for("what is being saved", || {
        let busy = [
            "rdb_bgsave_in_progress",
            "aof_rewrite_in_progress",
            "aof_rewrite_scheduled",
        ];
        let over = busy.map(|name| client.info("persistence", name) == "0");
        (over == [true; 3]).then_some(())
    });
}

/// What happens to servers now and then.
fn incident(number: usize, server: &mut Server, replica: &mut Server) {
    let (mut client, mut other) = (server.connect(), replica.connect());
    match number % 8 {
        0 => {
            // Not while a replica is being fed.
            wait_for_children(&mut client);
            client.ok(&["SAVE"]);
            client.ok(&["DEBUG", "RELOAD"]);
        }
        1 => {
            client.ok(&["BGREWRITEAOF"]);
            wait_for_children(&mut client);
            client.ok(&["DEBUG", "LOADAOF"]);
        }
        2 => {
            for _ in 0..3 {
                client.unload();
                client.error(&["MPOOL.STATUS"]);
                client.load(server);
            }
        }
        3 => {
            server.shutdown();
            server.launch();
        }
        4 => {
            other.unload();
            other.load(replica);
            replica.shutdown();
            replica.launch();
        }
        5 => {
            other.ok(&["REPLICAOF", "NO", "ONE"]);
            other.ok(&["MPOOL.REPAIR"]);
            let _ = other.try_acquire("key1", 1);
            other.ok(&["REPLICAOF", "127.0.0.1", &server.port.to_string()]);
        }
        6 => {
            client.ok(&["SWAPDB", "0", "1"]);
            client.ok(&["MPOOL.REPAIR"]);
            client.ok(&["SWAPDB", "0", "1"]);
        }
        _ => {
            wait_for_children(&mut client);
            client.ok(&["BGSAVE"]);
            wait_for_children(&mut client);
            client.ok(&["FLUSHALL"]);
        }
    }
}

#[test]
fn nothing_is_lost_in_many_commands_of_every_kind() {
    let commands = std::env::var("MPOOL_COMMANDS").map_or(10_000, |count| count.parse().unwrap());
    let persistent = ["--appendonly", "yes", "--repl-backlog-size", "16kb"];
    let mut server = Options::default().server(&persistent).start();
    let mut replica = Options::default().replica_of(&server).start();
    wait_for_same(&mut server.connect(), &mut replica.connect());
    let mut run = Run {
        rng: seeded(),
        now: 1_755_266_400_000,
        sent: 0,
        counts: BTreeMap::new(),
    };
    // Each incident four times, however many commands there are.
    let slice = (commands / 32).max(BATCH);
    let mut incidents = 0;
    while run.sent < commands {
        incident(incidents, &mut server, &mut replica);
        incidents += 1;
        let mut client = server.connect();
        let until = run.sent + slice;
        while run.sent < until {
            run.refresh(&server, &mut client);
            for _ in 0..5 {
                run.batch(&mut client);
                run.change_a_file(&server);
            }
        }
        assert!(server.is_alive() && replica.is_alive());
        // On a connection that speaks as the helpers expect.
        let mut client = server.connect();
        client.ok(&["CONFIG", "SET", "mpool.slots-per-account", "2"]);
        // A panic may have been the last thing.
        client.wait_until_ready();
        client.ok(&["MPOOL.RELOAD"]);
        client.ok(&["MPOOL.REPAIR"]);
        client.check_invariants(2);
        client.check_repair();
        wait_for_same(&mut client, &mut replica.connect());
    }
    println!(
        "{} commands of the module, {incidents} incidents: {:?}",
        run.sent, run.counts
    );
    for what in [
        "MPOOL.ACQUIRE",
        "MPOOL.RELEASE",
        "MPOOL.STATUS",
        "MPOOL.KEYGEN",
        "MPOOL.REVOKE",
        "MPOOL.COOLDOWN",
        "MPOOL.RELOAD",
        "MPOOL.REPAIR",
        "EVAL",
        "EXEC",
        "DISCARD",
        "ERR",
        "NOKEY",
        "REVOKED",
        "EXPIRED",
        "POOLFULL",
        "NOACCOUNT",
    ] {
        assert!(run.counts.contains_key(what), "{what} never happened");
    }
}
