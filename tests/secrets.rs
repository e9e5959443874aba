//! Secrets: a round with everything in it that could write a token or a client
//! key somewhere, and then a search of all that was left behind. Tokens may be
//! in account files, in the answer to WITHTOKEN and in the forwarder's requests
//! to the upstream alone; whole client keys only where the README says so.

mod proxy;
mod support;

use proxy::{Forwarder, Upstream};
use redis::Value;
use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use support::{Client, Options, Server, leak, text, wait_for};

/// Far beyond any lease, and before any key's end.
const LATER: &str = "3000000000000";

fn encoded(words: &[&str]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", words.len());
    for word in words {
        bytes += &format!("${}\r\n{word}\r\n", word.len());
    }
    bytes.into_bytes()
}

/// A connection that only listens: MONITOR, or events.
struct Tap {
    stream: TcpStream,
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl Tap {
    fn listen(server: &Server, words: &[&str]) -> Self {
        let mut stream = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
        stream.write_all(&encoded(words)).unwrap();
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let (mut from, to) = (stream.try_clone().unwrap(), Arc::clone(&bytes));
        let reader = std::thread::spawn(move || {
            let mut part = [0; 65536];
            while let Ok(count @ 1..) = from.read(&mut part) {
                to.lock().unwrap().extend_from_slice(&part[..count]);
            }
        });
        let tap = Self {
            stream,
            bytes,
            reader,
        };
        wait_for("the tap to be open", || {
            (!tap.bytes.lock().unwrap().is_empty()).then_some(())
        });
        tap
    }

    /// All that came, once `last` has come.
    fn close(self, last: &str) -> Vec<u8> {
        wait_for(last, || {
            memchr::memmem::find(&self.bytes.lock().unwrap(), last.as_bytes())
        });
        let _ = self.stream.shutdown(Shutdown::Both);
        self.reader.join().unwrap();
        Arc::into_inner(self.bytes).unwrap().into_inner().unwrap()
    }
}

/// Everything that was left behind, each with where it was.
#[derive(Default)]
struct Artefacts(Vec<(String, Vec<u8>)>);

impl Artefacts {
    fn add(&mut self, place: &str, bytes: impl Into<Vec<u8>>) {
        self.0.push((place.to_owned(), bytes.into()));
    }

    fn add_answer(&mut self, place: &str, client: &mut Client, words: &[&str]) {
        // As it went over the wire: a text's bytes as they are.
        fn write(value: &Value, to: &mut Vec<u8>) {
            match value {
                Value::BulkString(bytes) => to.extend_from_slice(bytes),
                Value::SimpleString(text) => to.extend_from_slice(text.as_bytes()),
                Value::Array(values) => values.iter().for_each(|value| {
                    write(value, to);
                    to.push(b' ');
                }),
                other => to.extend_from_slice(format!("{other:?}").as_bytes()),
            }
            to.push(b'\n');
        }
        let mut bytes = Vec::new();
        match client.try_run::<Value>(words) {
            Ok(value) => write(&value, &mut bytes),
            Err(error) => bytes.extend_from_slice(error.to_string().as_bytes()),
        }
        self.add(&format!("{place}: {}", words.join(" ")), bytes);
    }

    /// All files of a folder and of those below it.
    fn add_files(&mut self, place: &str, folder: &Path) {
        for entry in fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            let place = format!("{place}/{}", entry.file_name().display());
            if entry.file_type().unwrap().is_dir() {
                self.add_files(&place, &entry.path());
            } else if entry.file_type().unwrap().is_file() {
                self.add(&place, fs::read(entry.path()).unwrap());
            }
        }
    }

    fn of(&self, place: &str) -> impl Iterator<Item = &(String, Vec<u8>)> {
        let place = place.to_owned();
        self.0.iter().filter(move |(name, _)| name.contains(&place))
    }

    /// Nothing of it holds a token, or what was given in the place of one; keys
    /// are in what `admitted` answers true for, and nowhere else.
    fn check(&self, keys: &[String], admitted: impl Fn(&str, &str) -> bool) {
        for (place, bytes) in &self.0 {
            assert_eq!(leak(bytes, false), None, "a token is in {place}");
            for line in bytes.split(|byte| *byte == b'\n') {
                let line = String::from_utf8_lossy(line);
                for key in keys.iter().filter(|key| line.contains(*key)) {
                    assert!(admitted(place, &line), "{key} is in {place}: {line}");
                }
            }
        }
    }
}

/// The commands as they should be, and with a secret put in and in the place of
/// each word: what was refused is never to be seen again either.
fn attempts(key: &str, other: &str) -> Vec<Vec<String>> {
    let right: [&[&str]; 16] = [
        &["MPOOL.ACQUIRE", key, "*"],
        &["MPOOL.ACQUIRE", key, "*", "WITHTOKEN"],
        &["MPOOL.ACQUIRE", key, LATER],
        &["MPOOL.STATUS"],
        &["MPOOL.STATUS", "NOW", "5"],
        &["MPOOL.STATUS", "KEY", key, "NOW", "5"],
        &[
            "MPOOL.STATUS",
            "ACCOUNTS",
            "medium",
            "CURSOR",
            "0",
            "COUNT",
            "5",
        ],
        &[
            "MPOOL.STATUS",
            "LEASES",
            "medium",
            "CURSOR",
            "0",
            "COUNT",
            "5",
        ],
        &["MPOOL.KEYGEN", "medium", "POOL", "DAYS", "3", "NOW", "5"],
        &["MPOOL.KEYGEN", "high", "big"],
        &["MPOOL.COOLDOWN", "medium", "one", "*", "0"],
        &["MPOOL.RELEASE", key],
        &["MPOOL.RELEASE", key, "*"],
        &["MPOOL.REVOKE", other],
        &["MPOOL.RELOAD"],
        &["MPOOL.REPAIR"],
    ];
    let mut attempts = Vec::new();
    for words in right {
        let words: Vec<String> = words.iter().map(ToString::to_string).collect();
        attempts.push(words.clone());
        for secret in [key, "token-of-one"] {
            for place in 1..=words.len() {
                let mut inserted = words.clone();
                inserted.insert(place, secret.to_owned());
                attempts.push(inserted);
                if place < words.len() {
                    let mut replaced = words.clone();
                    replaced[place] = secret.to_owned();
                    attempts.push(replaced);
                }
            }
        }
    }
    attempts
}

fn loud(options: Options) -> Options {
    options
        .server(&["--loglevel", "debug", "--appendonly", "yes"])
        .server(&["--rdbcompression", "no", "--dbfilename", "dump.rdb"])
        .server(&[
            "--slowlog-log-slower-than",
            "0",
            "--slowlog-max-len",
            "1000000",
        ])
        .server(&[
            "--latency-monitor-threshold",
            "1",
            "--acllog-max-len",
            "1000",
        ])
        .server(&["--notify-keyspace-events", "KEA"])
}

/// Asks for whatever the server tells of itself.
fn interview(artefacts: &mut Artefacts, place: &str, client: &mut Client) {
    for words in [
        &["INFO", "everything"][..],
        &["SLOWLOG", "GET", "-1"],
        &["CLIENT", "LIST"],
        &["ACL", "LOG", "1000"],
        &["LATENCY", "LATEST"],
        &["LATENCY", "HISTOGRAM"],
        &["LATENCY", "DOCTOR"],
        &["MEMORY", "STATS"],
        &["MEMORY", "DOCTOR"],
        &["MODULE", "LIST"],
        &["CONFIG", "GET", "*"],
        &["COMMAND", "DOCS"],
        &["MPOOL.STATUS"],
        &["MPOOL.STATUS", "ACCOUNTS", "medium"],
        &["MPOOL.STATUS", "LEASES", "medium"],
        &["MPOOL.RELOAD"],
    ] {
        artefacts.add_answer(place, client, words);
    }
}

/// Provokes the errors that a client can meet; answers their code words.
fn errors(
    artefacts: &mut Artefacts,
    server: &Server,
    client: &mut Client,
    keys: &[String],
) -> BTreeSet<String> {
    let (mut codes, mut texts) = (BTreeSet::new(), Vec::new());
    let mut refuse = |client: &mut Client, words: &[&str]| {
        let error = client.error(words);
        codes.insert(error.split(' ').next().unwrap().to_owned());
        texts.push(error);
    };
    let key = keys[1].as_str();
    let acquire = ["MPOOL.ACQUIRE", key, "*", "WITHTOKEN"];
    refuse(client, &["MPOOL.ACQUIRE", "sk-cli-v1-nobodys", "*"]);
    refuse(client, &["MPOOL.ACQUIRE", &keys[3], "*"]);
    let dated = text(&client.map(&["MPOOL.KEYGEN", "medium", "POOL", "NOW", "0"])["key"]);
    refuse(client, &["MPOOL.ACQUIRE", &dated, "*"]);
    // In a transaction: some of it refused at once, some when it is carried out.
    client.ok(&["MULTI"]);
    refuse(client, &["MPOOL.ACQUIRE", key]);
    refuse(client, &["EXEC"]);
    client.ok(&["MULTI"]);
    client.ok(&["MPOOL.RELOAD"]);
    client.ok(&["MPOOL.ACQUIRE", key, "never"]);
    let results = client.try_run::<Value>(&["EXEC"]);
    artefacts.add("a transaction", format!("{results:?}"));
    // Full, cooled down, of the wrong type, out of memory, in doubt.
    client.ok(&["MPOOL.RELEASE", key]);
    let more: Vec<String> = (0..6).map(|_| client.pool_key()).collect();
    for key in &more {
        let _ = client.try_acquire(key, 2_999_999_999_999);
    }
    refuse(
        client,
        &["MPOOL.ACQUIRE", key, "2999999999999", "WITHTOKEN"],
    );
    for account in ["one", "two", "three"] {
        client.ok(&["MPOOL.COOLDOWN", "medium", account, "*", "900000"]);
    }
    refuse(client, &acquire);
    for account in ["one", "two", "three"] {
        client.ok(&["MPOOL.COOLDOWN", "medium", account, "*", "0"]);
    }
    for key in &more {
        client.ok(&["MPOOL.REVOKE", key]);
    }
    let record = "client_keys:stuck";
    client.ok(&["HSET", record, "tier", "medium", "use_pool", "true"]);
    client.ok(&["SET", "key_rotation:stuck", "1"]);
    refuse(client, &["MPOOL.ACQUIRE", "stuck", "1000"]);
    client.ok(&["DEL", record, "key_rotation:stuck"]);
    client.ok(&["CONFIG", "SET", "maxmemory", "1"]);
    refuse(client, &acquire);
    client.ok(&["CONFIG", "SET", "maxmemory", "0"]);
    refuse(client, &["MPOOL.PANIC"]);
    let _ = client.try_acquire(key, 1);
    // Those who may not.
    let login = ["ACL", "SETUSER", "nobody", "on", ">open-sesame", "+get"];
    client.ok(&login);
    let url = format!("redis://nobody:open-sesame@127.0.0.1:{}/", server.port);
    let mut nobody = Client::open(&url);
    refuse(&mut nobody, &acquire);
    refuse(&mut nobody, &["GET", &format!("key_rotation:{key}")]);
    refuse(client, &["AUTH", "nobody", key]);
    artefacts.add("an error", texts.join("\n"));
    codes
}

#[test]
fn nothing_left_behind_holds_a_token_or_more_keys_than_the_readme_says() {
    let mut artefacts = Artefacts::default();
    let options = Options::default()
        .accounts(&["one", "three"])
        .file("medium/two", r#"{"api_key": "token-of-two"}"#)
        .file("high/big", r#"{"api_key": "token-of-big"}"#);
    let mut primary = loud(options).start();
    // It has not got every file.
    let mut replica = loud(Options::default().accounts(&["one"]))
        .replica_of(&primary)
        .start();
    let mut client = primary.connect();
    let keys: Vec<String> = (0..6).map(|_| client.pool_key()).collect();
    client.ok(&["MPOOL.REVOKE", &keys[3]]);
    wait_for("the replica", || {
        let link = replica.connect().info("replication", "master_link_status");
        (link == "up").then_some(())
    });
    let taps: Vec<(String, Tap)> = [("primary", &primary), ("replica", &replica)]
        .into_iter()
        .flat_map(|(name, server)| {
            [&["MONITOR"][..], &["PSUBSCRIBE", "*"]].map(|words| {
                let place = format!("{name}: {}", words.join(" "));
                (place, Tap::listen(server, words))
            })
        })
        .collect();

    // Every command, rightly and wrongly, on both.
    let mut other = replica.connect();
    for words in attempts(&keys[0], &keys[4]) {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let with_token = words[0] == "MPOOL.ACQUIRE" && words.last() == Some(&"WITHTOKEN");
        match client.try_run::<Value>(&words) {
            // The one way out for a token.
            Ok(value) if with_token => assert!(format!("{value:?}").contains("token-of-")),
            Ok(value) => artefacts.add("an answer", format!("{words:?}\n{value:?}")),
            Err(error) => artefacts.add("an error", error.to_string()),
        }
        match other.try_run::<Value>(&words) {
            Ok(value) => artefacts.add("an answer", format!("{value:?}")),
            Err(error) => artefacts.add("an error", error.to_string()),
        }
    }
    // What was typed is no answer.
    for (place, bytes) in &mut artefacts.0 {
        if place == "an answer"
            && let Some(line) = bytes.iter().position(|byte| *byte == b'\n')
        {
            bytes.drain(..=line);
        }
    }
    let mut codes = errors(&mut artefacts, &primary, &mut client, &keys);

    // Account files that are broken in all ways, with tokens in them.
    let long = format!(r#"{{"access_token": "token-of-{}"}}"#, "x".repeat(2 << 20));
    let spaced = r#"{"access_token": "token-of two words"}"#;
    for (name, content) in [
        ("half", r#"{"access_token": "token-of-half"#),
        ("bare", "token-of-bare"),
        ("list", r#"["token-of-list"]"#),
        (
            "both",
            r#"{"access_token": "token-of-both", "api_key": "token-of-key"}"#,
        ),
        (
            "dated",
            r#"{"access_token": "token-of-dated", "expires_at": "token-of-soon"}"#,
        ),
        ("spaced", spaced),
        ("deep", r#"{"a": {"b": {"access_token": "token-of-deep"}}}"#),
        ("long", &long),
        ("odd name", r#"{"access_token": "token-of-odd"}"#),
    ] {
        primary.write_account(&format!("medium/{name}"), content);
    }
    let open = fs::Permissions::from_mode(0o644);
    fs::set_permissions(primary.account_file("medium/one"), open).unwrap();
    let log = fs::read_to_string;
    let path = primary.folder.path().join("data/log");
    client.ok(&["MPOOL.RELOAD"]);
    wait_for("the files to be judged", || {
        client.ok(&["MPOOL.RELOAD"]);
        let log = log(&path).unwrap();
        let judged = log.matches("can't be used").count() >= 8;
        (judged && log.contains("can be read by every user")).then_some(())
    });
    primary.remove_account("medium/three");

    // The forwarder, with what upstreams do.
    let upstream = Upstream::start(|exchange| match exchange.target.as_str() {
        "/bad" => exchange.respond(401, &[], b"refused"),
        "/full" => exchange.respond(429, &[("Retry-After", "1")], b"later"),
        "/closes" => exchange.close(),
        _ => exchange.ok(),
    });
    let mut tokens = BTreeSet::new();
    for form in ["text", "json"] {
        let mut forwarder = Forwarder::between(&primary, &upstream)
            .args(&["--log", form, "--log-level", "info", "--cooldown", "100ms"])
            .start();
        wait_for("readiness", || {
            (forwarder.admin("/readyz").status() == 200).then_some(())
        });
        for key in [&keys[0], &keys[1], &keys[3], &keys[5], ""] {
            for target in [
                "/",
                "/bad",
                "/full",
                "/closes",
                &format!("/{key}?key={key}"),
            ] {
                let mut http = forwarder.client();
                http.ask("GET", target, key, &[("Cookie", key)], b"");
                if let Ok(answer) = http.try_answer() {
                    artefacts.add("an answer of the forwarder", answer.text());
                }
            }
        }
        for page in ["/metrics", "/readyz", "/healthz"] {
            artefacts.add("the forwarder's pages", forwarder.admin(page).text());
        }
        let command = fs::read(format!("/proc/{}/cmdline", forwarder.pid())).unwrap();
        artefacts.add("the forwarder's command line", command);
        assert_eq!(forwarder.terminate(), 0);
        let lines = [forwarder.log(), forwarder.errors()].concat().join("\n");
        assert!(lines.contains("failover"), "{lines}");
        artefacts.add("the forwarder's log", lines);
    }
    tokens.extend(upstream.requests().iter().filter_map(proxy::Request::token));
    assert!(tokens.contains("token-of-one"), "{tokens:?}");

    // What it tells, then what it writes: by itself, on demand, and at a new start.
    for (place, client) in [("primary", &mut client), ("replica", &mut other)] {
        interview(&mut artefacts, place, client);
    }
    client.ok(&["SAVE"]);
    client.ok(&["DEBUG", "RELOAD"]);
    client.ok(&["CONFIG", "SET", "notify-keyspace-events", "KEA"]);
    client.ok(&["PUBLISH", "that-is-all", "that-is-all"]);
    for (place, tap) in taps {
        artefacts.add(&place, tap.close("that-is-all"));
    }
    // On the node that lacks a file, once it is the primary.
    other.ok(&["REPLICAOF", "NO", "ONE"]);
    for account in ["two", "one"] {
        let key = other.pool_key();
        let lease = format!("key_rotation:{key}");
        let words = ["HSET", &lease, "account", account, "next_rotation", LATER];
        other.ok(&words);
        let answer = other.try_run::<Value>(&["MPOOL.ACQUIRE", &key, "*", "WITHTOKEN"]);
        if let Err(error) = answer {
            codes.insert(error.code().unwrap().to_owned());
            artefacts.add("an error", error.to_string());
        }
    }
    interview(&mut artefacts, "promoted", &mut other);
    primary.kill();
    primary.launch();
    let mut client = primary.connect();
    let _ = client.try_run::<Value>(&["MPOOL.ACQUIRE", &keys[1], "*", "WITHTOKEN"]);
    interview(&mut artefacts, "restarted", &mut client);
    client.ok(&["BGREWRITEAOF"]);
    wait_for("the rewrite", || {
        (client.info("persistence", "aof_rewrite_in_progress") == "0").then_some(())
    });
    other.ok(&["SAVE"]);
    primary.shutdown();
    replica.kill();
    artefacts.add_files("primary", &primary.folder.path().join("data"));
    artefacts.add_files("replica", &replica.folder.path().join("data"));

    // It was a busy round, and these are the right places to look.
    let expected = [
        "NOKEY",
        "REVOKED",
        "EXPIRED",
        "POOLFULL",
        "NOACCOUNT",
        "NOTOKEN",
        "ERR",
        "WRONGTYPE",
        "OOM",
        "NOPERM",
        "EXECABORT",
        "WRONGPASS",
    ];
    assert_eq!(codes, expected.map(str::to_owned).into());
    let in_text = |place: &str, part: &str| {
        let mut found = artefacts.of(place);
        found.any(|(_, bytes)| memchr::memmem::find(bytes, part.as_bytes()).is_some())
    };
    let [name, denied] = [0, 1].map(|number| format!("key_rotation:{}", keys[number]));
    for (place, part) in [
        ("primary: MONITOR", "(redacted)"),
        ("primary: MONITOR", &name),
        ("replica: MONITOR", &name),
        ("primary: PSUBSCRIBE", &name),
        ("primary: SLOWLOG", "(redacted)"),
        ("primary: ACL LOG", &denied),
        ("primary/appendonlydir", &name),
        ("replica/appendonlydir", &name),
        ("replica/dump.rdb", &name),
        ("primary/log", "panic in mpool.panic"),
        ("an error", "against a read only replica"),
        ("the forwarder's log", "NOKEY"),
        ("the forwarder's pages", "mpool_requests_total"),
        ("primary: MPOOL.RELOAD", "spaced"),
    ] {
        assert!(in_text(place, part), "{place} has no {part}");
    }
    artefacts.check(&keys, |place, line| {
        let of_mpool = line.to_lowercase().contains("mpool.");
        match place {
            _ if place.contains("MONITOR") || place.contains("SLOWLOG") => !of_mpool,
            _ if place.contains("PSUBSCRIBE") || place.contains("ACL LOG") => true,
            _ if place.contains("/appendonlydir") || place.ends_with("/dump.rdb") => true,
            _ => false,
        }
    });
}

/// The log of a server that crashed while it carried out MPOOL.ACQUIRE, or that
/// of the last of a few tries; and the key.
fn crashed(arguments: &[&str], tries: u64) -> (String, String) {
    for number in 1.. {
        let options = Options::default().accounts(&["one"]).server(arguments);
        let mut server = options.start();
        server.is_excused = true;
        let key = server.connect().pool_key();
        let mut flood = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
        let mut answers = flood.try_clone().unwrap();
        let reader = std::thread::spawn(move || std::io::copy(&mut answers, &mut std::io::sink()));
        let pid = server.pid().to_string();
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100 + 7 * number));
            let command = ["-c", "kill -s SEGV \"$0\"", &pid];
            assert!(
                Command::new("bash")
                    .args(command)
                    .status()
                    .unwrap()
                    .success()
            );
        });
        let commands = encoded(&["MPOOL.ACQUIRE", &key, "*", "WITHTOKEN"]).repeat(500);
        while flood.write_all(&commands).is_ok() {}
        killer.join().unwrap();
        let _ = reader.join().unwrap();
        wait_for("the crash", || (!server.is_alive()).then_some(()));
        let log = server.log();
        if number == tries || (log.contains("CURRENT CLIENT INFO") && log.contains("MPOOL.ACQUIRE"))
        {
            return (log, key);
        }
    }
    unreachable!()
}

#[test]
fn a_crash_report_holds_no_token_and_a_client_key_as_the_readme_says() {
    let (log, key) = crashed(&[], 30);
    assert!(log.contains("CURRENT CLIENT INFO"), "{log}");
    // Some servers leave arguments out unless they are told otherwise.
    let setting = ["CONFIG", "GET", "hide-user-data-from-log"];
    let hides: Vec<String> = Options::default().start().connect().run(&setting);
    let hides = hides.get(1).is_some_and(|value| value == "yes");
    assert_eq!(log.contains(&key), !hides, "{log}");
    assert_eq!(leak(log.as_bytes(), false), None);
    // Stacks and registers are shown as words, their bytes in reverse.
    let reversed: String = b"token-of"
        .iter()
        .rev()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert!(!log.contains(&reversed), "{log}");

    let (log, key) = crashed(&["--crash-log-enabled", "no"], 5);
    assert!(
        !log.contains("CURRENT CLIENT INFO") && !log.contains(&key),
        "{log}"
    );
    assert_eq!(leak(log.as_bytes(), true), None);
}

#[test]
fn the_search_finds_what_it_searches_for() {
    let key = format!("sk-cli-v1-{}", "0123456789abcdef".repeat(4));
    let masked = format!("{}...{}", &key[..14], &key[key.len() - 4..]);
    for (bytes, with_keys, without) in [
        ("one\nwith token-of-x in it\nthree".to_owned(), true, true),
        (format!("one\n\"{key}\""), true, false),
        (masked.clone(), false, false),
        ("sk-cli-v1-xxxxx".to_owned(), false, false),
        (format!("{masked} {key}"), true, false),
    ] {
        assert_eq!(leak(bytes.as_bytes(), true).is_some(), with_keys, "{bytes}");
        assert_eq!(leak(bytes.as_bytes(), false).is_some(), without, "{bytes}");
    }
    let found = leak(b"one\nwith token-of-x in it\nthree", false);
    assert_eq!(found.as_deref(), Some("with token-of-x in it"));

    let planted = |file: &str, content: &str| {
        let server = Options::default().accounts(&["one"]).start();
        let data = server.folder.path().join("data");
        fs::create_dir_all(data.join(file).parent().unwrap()).unwrap();
        let mut open = fs::OpenOptions::new();
        let mut open = open
            .append(true)
            .create(true)
            .open(data.join(file))
            .unwrap();
        open.write_all(content.as_bytes()).unwrap();
        // It fails as it goes.
        std::thread::spawn(move || drop(server)).join().is_err()
    };
    assert!(planted("log", "token-of-one"));
    assert!(planted("log", &key));
    assert!(planted("appendonlydir/1.aof", "token-of-one"));
    assert!(!planted("appendonlydir/1.aof", &key));
    assert!(!planted("log", &masked));
    let server = Options::default().accounts(&["one"]).start();
    server
        .connect()
        .ok(&["CONFIG", "SET", "slowlog-log-slower-than", "0"]);
    server.connect().ok(&["ECHO", "token-of-one"]);
    assert!(std::thread::spawn(move || drop(server)).join().is_err());
}
