//! Very many random calls of every command, pipelined: right and wrong arguments,
//! huge and binary ones, in MULTI and in scripts, between other commands that touch
//! the pool's keys, settings and account files that change. The server lives on,
//! every error is one of the table, memory stays flat, and nothing is left to repair.
//! `MPOOL_SEED` repeats a run, `MPOOL_RANDOM_CALLS` makes it longer.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop anywhere"
)]

mod support;

use rand::{Rng, RngExt, rngs::SmallRng};
use redis::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};
use support::*;

const ACCOUNTS: [&str; 6] = ["a", "b", "c", "d", "e", "f"];
/// Calls sent before the first reply is read.
const PIPELINE: usize = 200;
/// Looks at memory, evenly over the run.
const LOOKS: usize = 10;
/// Client keys in use; the oldest go.
const MOST_KEYS: usize = 300;
/// A piece of each odd argument that no honest text of the server has in it.
const MARK: &str = "zZqQ";

/// What an error of the module's begins with.
const CODES: [&str; 9] = [
    "LOADING",
    "NOKEY",
    "REVOKED",
    "EXPIRED",
    "POOLFULL",
    "NOACCOUNT",
    "NOTOKEN",
    "ERR",
    "WRONGTYPE",
];
/// What Redis itself may say besides, of its own commands.
const OTHERS: [&str; 4] = ["BUSYKEY", "EXECABORT", "NOSCRIPT", "NOPROTO"];

const SCRIPTS: [&str; 2] = [
    "return redis.call(unpack(ARGV))",
    "local r = redis.pcall(unpack(ARGV)); redis.pcall('PING'); return r",
];

/// Each command with all that it takes. `<key>`, `<account>`, `<tier>` and `<now>` are drawn.
const COMMANDS: [&str; 17] = [
    "MPOOL.ACQUIRE <key> <now>",
    "MPOOL.ACQUIRE <key> <now>",
    "MPOOL.ACQUIRE <key> <now> WITHTOKEN",
    "MPOOL.RELEASE <key>",
    "MPOOL.RELEASE <key> <now>",
    "MPOOL.STATUS",
    "MPOOL.STATUS NOW <now>",
    "MPOOL.STATUS ACCOUNTS <tier> NOW <now> CURSOR 0 COUNT 3",
    "MPOOL.STATUS LEASES <tier> NOW <now> CURSOR 0 COUNT 3",
    "MPOOL.STATUS KEY <key> NOW <now>",
    "MPOOL.KEYGEN medium POOL DAYS 3 NAME label NOW <now>",
    "MPOOL.KEYGEN <tier> <account> DAYS 3 NOW <now>",
    "MPOOL.REVOKE <key>",
    "MPOOL.COOLDOWN <tier> <account> <now> 60000 REASON text",
    "MPOOL.COOLDOWN <tier> <account> <now> 0",
    "MPOOL.RELOAD",
    "MPOOL.REPAIR",
];

/// What others do to the pool's keys and to the server.
const BY_HAND: [&str; 31] = [
    "DEL client_keys:<key>",
    "DEL key_rotation:<key>",
    "DEL medium_pool:slots:<account>",
    "UNLINK medium_pool:cooldown:<account>",
    "SET medium_pool:slots:<account> 9",
    "SET medium_pool:slots:<account> many",
    "INCR medium_pool:slots:<account>",
    "SET <tier>_pool:cooldown:<account> <now>",
    "SET client_keys:<key> text",
    "RPUSH key_rotation:<key> text",
    "HSET key_rotation:<key> account <account>",
    "HSET key_rotation:<key> account no/such",
    "HSET key_rotation:<key> next_rotation <now>",
    "HDEL key_rotation:<key> account",
    "HSET client_keys:<key> tier medium use_pool true active true",
    "HSET client_keys:<key> active false",
    "HSET client_keys:<key> expires_at <now>",
    "HSET client_keys:<key> use_pool false account_name <account>",
    "PEXPIRE key_rotation:<key> 1",
    "EXPIRE client_keys:<key> 0",
    "RENAME key_rotation:<key> key_rotation:<key>",
    "COPY key_rotation:<key> key_rotation:<key> REPLACE",
    "COPY client_keys:<key> client_keys:<key> DB 1",
    "MOVE client_keys:<key> 1",
    "RESTORE key_rotation:<key> 0 <dump> REPLACE",
    "RESTORE client_keys:<key> 0 <odd>",
    "CONFIG SET mpool.slots-per-account 3",
    "CONFIG SET mpool.slots-per-account <odd>",
    "CONFIG SET mpool.rotation-ms <number>",
    "CONFIG SET mpool.account-dir <odd>",
    "SELECT 1",
];

/// The same, but what takes its time or all the data: one call of some thousands.
const SELDOM: [&str; 7] = [
    "FLUSHALL",
    "FLUSHDB",
    "SWAPDB 0 1",
    "DEBUG RELOAD",
    "HELLO 3",
    "HELLO 2",
    "CONFIG SET mpool.slots-per-account 1",
];

type Words = Vec<Vec<u8>>;

/// A connection that reads replies for their errors alone.
struct Wire {
    stream: TcpStream,
    replies: BufReader<TcpStream>,
    /// The client keys in the replies.
    keys: Vec<String>,
}

impl Wire {
    fn open(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(3 * PATIENCE)).unwrap();
        let replies = BufReader::new(stream.try_clone().unwrap());
        Self {
            stream,
            replies,
            keys: Vec::new(),
        }
    }

    fn send(&mut self, calls: &[Words]) -> std::io::Result<()> {
        let mut packed = Vec::new();
        for words in calls {
            write!(packed, "*{}\r\n", words.len())?;
            for word in words {
                write!(packed, "${}\r\n", word.len())?;
                packed.extend_from_slice(word);
                packed.extend_from_slice(b"\r\n");
            }
        }
        // Replies are read meanwhile, or both sides would wait for each other.
        let mut stream = self.stream.try_clone()?;
        std::thread::scope(|scope| {
            let sending = scope.spawn(move || stream.write_all(&packed));
            for words in calls {
                let errors = self.reply()?;
                for error in errors {
                    check_error(words, &error);
                }
            }
            sending.join().unwrap()
        })
    }

    /// Reads a reply to its end; answers the errors in it.
    fn reply(&mut self) -> std::io::Result<Vec<String>> {
        let mut errors = Vec::new();
        let mut left = 1_u64;
        while left > 0 {
            left -= 1;
            let mut line = Vec::new();
            if self.replies.read_until(b'\n', &mut line)? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            let text = String::from_utf8_lossy(line.trim_ascii_end()).into_owned();
            let (kind, text) = text.split_at(1);
            let number = text.parse::<i64>().unwrap_or(0).max(0).cast_unsigned();
            match kind {
                "-" => errors.push(text.to_owned()),
                "+" | ":" | "_" | "," | "#" | "(" => {}
                "$" | "=" if text.starts_with('-') => {}
                "$" | "=" => {
                    let mut bulk = vec![0; usize::try_from(number).unwrap() + 2];
                    self.replies.read_exact(&mut bulk)?;
                    assert!(bulk.ends_with(b"\r\n"), "a broken reply");
                    if bulk.len() == 76 && bulk.starts_with(b"sk-cli-v1-") {
                        let key = String::from_utf8_lossy(bulk.trim_ascii_end());
                        self.keys.push(key.into_owned());
                    }
                }
                "*" | "~" | ">" => left += number,
                "%" => left += 2 * number,
                other => panic!("a broken reply: {other}{text}"),
            }
        }
        Ok(errors)
    }
}

fn check_error(words: &Words, error: &str) {
    let name = String::from_utf8_lossy(&words[0]).to_ascii_uppercase();
    let code = error.split(' ').next().unwrap_or_default();
    let shown = || {
        let shown = words.iter().map(|word| {
            let word = &word[..word.len().min(60)];
            String::from_utf8_lossy(word).into_owned()
        });
        shown.collect::<Vec<_>>()
    };
    let own = name.starts_with("MPOOL.");
    let known = CODES.contains(&code) || !own && OTHERS.contains(&code);
    assert!(known, "{:?}: {error}", shown());
    assert!(!error.contains("internal error"), "{:?}: {error}", shown());
    assert!(
        !own || !error.contains(MARK),
        "{:?} is repeated: {error}",
        shown()
    );
}

struct Flood {
    rng: SmallRng,
    keys: Vec<String>,
    now: i64,
    dump: Vec<u8>,
}

impl Flood {
    fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.rng.random_range(0..of.len())].clone()
    }

    /// An argument of any kind.
    fn odd(&mut self) -> Vec<u8> {
        match self.rng.random_range(0..24) {
            0 => Vec::new(),
            1 => b"-1".to_vec(),
            2 => b"9223372036854775807".to_vec(),
            3 => b"99999999999999999999999999".to_vec(),
            4 => b"253402300800000".to_vec(),
            5 => b"%s%n%s%n".to_vec(),
            6 => "一".as_bytes().to_vec(),
            7 => b"zZqQ\r\n+OK\r\n".to_vec(),
            8 => b"zZqQ\0zZqQ".to_vec(),
            9 => b"*".to_vec(),
            10 => vec![b'z'; 257],
            11 => b"\x1b[31mzZqQ".to_vec(),
            12 => {
                let words = "POOL WITHTOKEN DAYS NAME NOW REASON KEY ACCOUNTS LEASES CURSOR COUNT medium high";
                self.pick(&words.split(' ').collect::<Vec<_>>()).into()
            }
            13 if self.rng.random_ratio(1, 200) => MARK.as_bytes().repeat(256 * 1024),
            13 | 14 if self.rng.random_ratio(1, 50) => MARK.as_bytes().repeat(8 * 1024),
            _ => {
                let mut bytes = vec![0; self.rng.random_range(0..40)];
                self.rng.fill_bytes(&mut bytes);
                bytes
            }
        }
    }

    fn words(&mut self, template: &str) -> Words {
        let words = template.split(' ').map(|word| self.word(word));
        words.collect()
    }

    fn word(&mut self, word: &str) -> Vec<u8> {
        let Some((before, rest)) = word.split_once('<') else {
            return word.into();
        };
        let (what, after) = rest.split_once('>').unwrap();
        let drawn: Vec<u8> = match what {
            "key" if self.rng.random_ratio(1, 20) => b"nobody".to_vec(),
            "key" => {
                let at = self.rng.random_range(0..self.keys.len());
                self.keys[at].clone().into()
            }
            "account" => self.pick(&ACCOUNTS).into(),
            "tier" => self.pick(&["medium", "medium", "high", "supreme"]).into(),
            "number" => self.rng.random_range(0..90_000_000).to_string().into(),
            "dump" => self.dump.clone(),
            "odd" => self.odd(),
            _ if self.rng.random_ratio(1, 10) => b"*".to_vec(),
            _ => {
                let hours = self.rng.random_range(-30..30);
                (self.now + hours * 3_600_000).to_string().into()
            }
        };
        [before.as_bytes(), &drawn, after.as_bytes()].concat()
    }

    /// One of the module's commands, as it should be or not.
    fn command(&mut self) -> Words {
        let template = self.pick(&COMMANDS);
        let mut words = self.words(template);
        if self.rng.random_bool(0.6) {
            return words;
        }
        for _ in 0..self.rng.random_range(1..4) {
            let place = self.rng.random_range(1..=words.len());
            match self.rng.random_range(0..6) {
                0 | 1 if place < words.len() => words[place] = self.odd(),
                2 if place < words.len() => drop(words.remove(place)),
                3 => {
                    let odd = self.odd();
                    words.insert(place, odd);
                }
                4 if place + 1 < words.len() => words.swap(place, place + 1),
                5 => words[0].make_ascii_lowercase(),
                _ => {
                    let count = self.pick(&[1, 2, 2, 2, 50]);
                    for _ in 0..count {
                        let odd = self.odd();
                        words.push(odd);
                    }
                }
            }
        }
        words
    }

    fn one(&mut self) -> Words {
        match self.rng.random_range(0..10_000) {
            0..2 => {
                let template = self.pick(&SELDOM);
                self.words(template)
            }
            2..2_500 => {
                let template = self.pick(&BY_HAND);
                self.words(template)
            }
            2_500..3_000 => {
                let script = self.pick(&SCRIPTS);
                let mut words: Words = vec![b"EVAL".to_vec(), script.into(), b"0".to_vec()];
                words.extend(self.command());
                words
            }
            _ => self.command(),
        }
    }

    /// Calls for one pipeline, which leave the connection as it should be.
    fn calls(&mut self) -> Vec<Words> {
        let mut calls = Vec::new();
        while calls.len() < PIPELINE - 2 {
            if self.rng.random_ratio(1, 100) {
                calls.push(vec![b"MULTI".to_vec()]);
                for _ in 0..self.rng.random_range(0..6) {
                    calls.push(self.one());
                }
                let end = self.pick(&["EXEC", "EXEC", "DISCARD"]);
                calls.push(vec![end.into()]);
            } else {
                calls.push(self.one());
            }
        }
        calls.push(vec![b"SELECT".to_vec(), b"0".to_vec()]);
        self.now += self.rng.random_range(0..600_000);
        calls
    }

    fn change_files(&mut self, server: &Server) {
        let account = self.pick(&ACCOUNTS);
        let tier = self.pick(&["medium", "medium", "high"]);
        let name = format!("{tier}/{account}");
        let good = r#"{"access_token": "t"}"#;
        match self.pick(&["", "gone", "{", good, good, good, r#"{"api_key": 5}"#]) {
            "gone" => drop(std::fs::remove_file(server.account_file(&name))),
            content => server.write_account(&name, content),
        }
    }
}

/// `used_memory` and the resident memory, in bytes, of a server that has been brought
/// back to the same small state.
fn memory(server: &Server, flood: &mut Flood) -> (i64, i64) {
    for account in ACCOUNTS {
        server.write_account(&format!("medium/{account}"), &bearer(account));
        let _ = std::fs::remove_file(server.account_file(&format!("high/{account}")));
    }
    let mut client = server.connect();
    let folder = server.account_dir();
    for (setting, value) in [
        ("slots-per-account", "2"),
        ("rotation-ms", "86400000"),
        ("account-dir", folder.to_str().unwrap()),
    ] {
        client.ok(&["CONFIG", "SET", &format!("mpool.{setting}"), value]);
    }
    client.ok(&["MPOOL.RELOAD"]);
    // First of all: what thousands of calls have done to the keys is in order.
    settled(&mut client);
    client.ok(&["FLUSHALL"]);
    client.ok(&["SCRIPT", "FLUSH"]);
    client.ok(&["SLOWLOG", "RESET"]);
    client.ok(&["MPOOL.RELOAD"]);
    flood.keys = (0..20).map(|_| client.pool_key()).collect();
    for key in flood.keys.clone() {
        let _ = client.try_acquire(&key, flood.now);
    }
    settled(&mut client);
    let dumped = client.try_run::<Vec<u8>>(&["DUMP", &format!("key_rotation:{}", flood.keys[0])]);
    flood.dump = dumped.unwrap_or_default();
    client.ok(&["MEMORY", "PURGE"]);
    let number = |client: &mut Client, name| client.info("memory", name).parse().unwrap();
    (
        number(&mut client, "used_memory"),
        number(&mut client, "used_memory_rss"),
    )
}

/// Waits until the watcher has put right what was left, and sees that it is all.
fn settled(client: &mut Client) {
    let begin = Instant::now();
    while let Some(wrong) = client.broken_invariant(2) {
        assert!(begin.elapsed() < PATIENCE, "{wrong}");
        let _ = client.try_run::<Value>(&["MPOOL.RELEASE", "nobody"]);
        std::thread::sleep(Duration::from_millis(10));
    }
    // The watcher may be about to write still.
    std::thread::sleep(Duration::from_millis(100));
    client.check_repair();
}

#[test]
fn calls_of_all_kinds_break_nothing_and_leave_nothing_behind() {
    let calls = std::env::var("MPOOL_RANDOM_CALLS").map_or(30_000, |calls| calls.parse().unwrap());
    let mut server = Options::default().accounts(&ACCOUNTS).start();
    let mut flood = Flood {
        rng: seeded(),
        keys: Vec::new(),
        now: 1_755_266_400_000,
        dump: Vec::new(),
    };
    let mut wire = Wire::open(server.port);
    let (mut done, mut looks) = (0, Vec::new());
    memory(&server, &mut flood);
    let begin = Instant::now();
    while done < calls {
        if done >= looks.len() * calls / LOOKS {
            let (used, resident) = memory(&server, &mut flood);
            println!(
                "{done} calls, {:.0} s: used_memory {used}, used_memory_rss {resident}",
                begin.elapsed().as_secs_f64()
            );
            looks.push((used, resident));
        }
        let batch = flood.calls();
        if let Err(error) = wire.send(&batch) {
            panic!("after {done} calls: {error}; alive: {}", server.is_alive());
        }
        done += batch.len();
        flood.keys.append(&mut wire.keys);
        let surplus = flood.keys.len().saturating_sub(MOST_KEYS);
        let gone = flood.keys.drain(..surplus).flat_map(|key| {
            ["client_keys", "key_rotation"].map(|kind| format!("{kind}:{key}").into_bytes())
        });
        let gone: Words = std::iter::once(b"DEL".to_vec()).chain(gone).collect();
        if gone.len() > 1 {
            wire.send(&[gone]).unwrap();
        }
        if flood.rng.random_ratio(1, 20) {
            flood.change_files(&server);
        }
    }
    let (used, resident) = memory(&server, &mut flood);
    println!(
        "{done} calls, {:.0} s: used_memory {used}, used_memory_rss {resident}",
        begin.elapsed().as_secs_f64()
    );
    // The first look comes before Redis has its tables and buffers.
    let (first_used, first_resident) = looks[1];
    assert!(
        used < first_used + (512 << 10),
        "used_memory has grown from {first_used} to {used}"
    );
    assert!(
        resident < first_resident + (16 << 20),
        "resident memory has grown from {first_resident} to {resident}"
    );
    assert!(server.is_alive());
    let info: BTreeMap<String, String> = server
        .connect()
        .run::<redis::InfoDict>(&["INFO", "errorstats"])
        .iter()
        .filter_map(|(name, value)| Some((name.clone(), redis::from_redis_value_ref(value).ok()?)))
        .collect();
    println!("{info:?}");
    let log = server.log();
    let wrong: BTreeSet<&str> = log
        .lines()
        .filter(|line| line.contains(MARK) || line.contains("panic"))
        .collect();
    assert!(wrong.is_empty(), "{wrong:?}");
}
