//! Access: the users of examples/acl.conf can do what they are for, each with
//! exactly the rights it has there, and the monitor learns no client key and no
//! token by any command of the server.

mod proxy;
mod support;
mod typed;

use proxy::{Forwarder, Upstream};
use redis::Value;
use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use support::{Client, Options, PATIENCE, Server, free_port, repository, wait_for};
use typed::{Terminal, text_of};

const ACL: &str = "examples/acl.conf";

fn password(user: &str) -> String {
    format!("{user}s-password")
}

/// A server with the users, as redis.conf takes them.
fn guarded(options: Options) -> Server {
    let file = repository().join(ACL);
    options
        .server(&["--include", file.to_str().unwrap()])
        .start()
}

fn login(server: &Server, user: &str) -> Client {
    Client::open(&url(server.port, user))
}

fn url(port: u16, user: &str) -> String {
    format!("redis://{user}:{}@127.0.0.1:{port}/", password(user))
}

fn terminal(server: &Server, user: &str) -> Terminal {
    Terminal::of(server)
        .env("MPOOL_REDIS_USER", user)
        .env("MPOOL_REDIS_PASSWORD", &password(user))
}

/// What users were denied since the server started, save the one right that can't
/// be given on every server.
fn denied(operator: &mut Client) -> Vec<String> {
    let entries: Vec<Value> = operator.run(&["ACL", "LOG"]);
    let entries = entries.iter().map(|entry| format!("{entry:?}"));
    entries
        .filter(|entry| !entry.contains("client|setinfo"))
        .collect()
}

#[test]
fn the_users_work_in_redis_conf_and_as_an_acl_file() {
    let included = guarded(Options::default());
    let mut rules: Vec<String> = login(&included, "operator").run(&["ACL", "LIST"]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("users.acl");
    let made = Terminal::at(1).run(&format!(
        "cd examples && grep ^user acl.conf >'{}'",
        file.display()
    ));
    made.ok();
    let server = Options::default()
        .server(&["--aclfile", file.to_str().unwrap()])
        .start();
    let mut other: Vec<String> = login(&server, "operator").run(&["ACL", "LIST"]);
    rules.sort();
    other.sort();
    // The rights of a user are listed in no order, and the default user's flags differ.
    let sorted = |rules: &[String]| -> Vec<Vec<String>> {
        let words = rules
            .iter()
            .filter(|rule| !rule.starts_with("user default off "));
        words
            .map(|rule| {
                let mut words: Vec<String> = rule.split(' ').map(str::to_owned).collect();
                words.sort();
                words
            })
            .collect()
    };
    assert_eq!(sorted(&rules), sorted(&other));
    assert_eq!((rules.len(), sorted(&rules).len()), (4, 3), "{rules:#?}");
    for server in [included, server] {
        let mut nobody = server.connect();
        for words in [&["PING"][..], &["MPOOL.STATUS"], &["INFO"]] {
            assert!(nobody.error(words).starts_with("NOAUTH"), "{words:?}");
        }
    }
}

#[test]
fn the_forwarder_needs_the_proxys_rights_and_no_more() {
    let server = guarded(Options::default().accounts(&["one", "two"]));
    let mut operator = login(&server, "operator");
    let keys = [operator.pool_key(), operator.pool_key()];
    // Each account has one of the keys: one is refused, and cooled down.
    let upstream = Upstream::refusing(&["token-of-one"]);
    let forwarder = Forwarder::between(&server, &upstream)
        .env("MPOOL_REDIS_USER", "proxy")
        .env("MPOOL_REDIS_PASSWORD", &password("proxy"))
        .start();
    for key in &keys {
        assert_eq!(forwarder.client().get("/", key).status(), 200);
    }
    assert_eq!(operator.state("one", 0).as_deref(), Some("cooldown"));
    assert_eq!(forwarder.admin("/readyz").status(), 200);
    assert_eq!(denied(&mut operator), Vec::<String>::new());

    // Without any one of them it can't do what it is for.
    operator.ok(&["MPOOL.COOLDOWN", "medium", "one", "*", "0"]);
    operator.ok(&["ACL", "SETUSER", "proxy", "-mpool.cooldown"]);
    let statuses: BTreeSet<u16> = keys
        .iter()
        .map(|key| {
            operator.ok(&["MPOOL.RELEASE", key]);
            forwarder.client().get("/", key).status()
        })
        .collect();
    assert!(statuses.iter().any(|status| *status != 200), "{statuses:?}");
    operator.ok(&["ACL", "SETUSER", "proxy", "-mpool.status"]);
    wait_for("not to be ready", || {
        (forwarder.admin("/readyz").status() == 503).then_some(())
    });
    operator.ok(&["ACL", "SETUSER", "proxy", "-mpool.acquire"]);
    let key = operator.pool_key();
    let answer = forwarder.client().get("/", &key);
    assert_eq!((answer.status(), answer.code()), (503, Some("REDIS")));
    assert!(denied(&mut operator).concat().contains("mpool.acquire"));
}

#[test]
fn scripts_work_for_those_who_may() {
    let server = guarded(
        Options::default()
            .accounts(&["one", "two"])
            .file("high/big", r#"{"api_key": "token-of-big"}"#),
    );
    let mut operator = login(&server, "operator");
    let shell = terminal(&server, "operator");
    let key = shell.run("shell/medium.sh -q").ok().trim().to_owned();
    operator.ok(&["MPOOL.ACQUIRE", &key, "*"]);
    for typed in [
        "shell/medium.sh pool 60",
        "shell/medium.sh one 30",
        "shell/high.sh big",
        "shell/pool-status.sh",
        "shell/sync-slots.sh",
        &format!("echo {key} | shell/release.sh -"),
        &format!("echo {key} | shell/revoke.sh -"),
    ] {
        shell.run(typed).ok();
    }
    assert_eq!(denied(&mut operator), Vec::<String>::new());

    let key = operator.pool_key();
    operator.ok(&["MPOOL.ACQUIRE", &key, "*"]);
    for user in ["proxy", "monitor"] {
        let shell = terminal(&server, user);
        let shown = shell.run("shell/pool-status.sh").ok();
        let masked = format!("{}...{}", &key[..14], &key[key.len() - 4..]);
        assert!(shown.contains(&masked) && !shown.contains(&key), "{shown}");
        for typed in [
            "shell/medium.sh",
            "shell/sync-slots.sh",
            &format!("echo {key} | shell/release.sh -"),
            &format!("echo {key} | shell/revoke.sh -"),
        ] {
            let said = shell.run(typed).fails(1);
            assert!(said.contains("NOPERM"), "{user}, {typed}: {said}");
        }
    }
    assert!(operator.holds(&key).is_some());
}

#[test]
fn the_operator_may_do_what_the_pool_needs_and_run_no_code() {
    let server = guarded(Options::default().accounts(&["one"]));
    let mut operator = login(&server, "operator");
    let commands: Vec<String> = operator.run(&["COMMAND", "LIST", "FILTERBY", "MODULE", "mpool"]);
    assert!(commands.len() >= 8, "{commands:?}");
    for command in commands {
        let words = ["ACL", "DRYRUN", "operator", &command, "a", "b", "c", "d"];
        // Those with a fixed number of arguments say so; none says that it is not allowed.
        let answer = format!("{:?}", operator.try_run::<Value>(&words));
        assert!(!answer.contains("permission"), "{command}: {answer}");
    }
    let key = operator.pool_key();
    operator.ok(&["MPOOL.ACQUIRE", &key, "*", "WITHTOKEN"]);
    // The guide's lines, and what its scripts, `make stop` and a repair by hand need.
    let (lease, record) = (format!("key_rotation:{key}"), format!("client_keys:{key}"));
    for words in [
        &["GET", "medium_pool:slots:one"][..],
        &["KEYS", "medium_pool:slots:*"],
        &["HGETALL", &lease],
        &["HSET", &record, "name", "x"],
        &["DEL", &lease],
        &["SCAN", "0"],
        &["CONFIG", "GET", "mpool.*"],
        &["CONFIG", "SET", "mpool.rotation-ms", "86400000"],
        &["INFO", "mpool"],
        &["SLOWLOG", "GET"],
        &["CLIENT", "LIST"],
        &["MODULE", "LIST"],
        &["ACL", "DRYRUN", "operator", "SHUTDOWN"],
        &["ACL", "DRYRUN", "operator", "REPLICAOF", "NO", "ONE"],
    ] {
        let answer = format!("{:?}", operator.run::<Value>(words));
        assert!(!answer.contains("permission"), "{words:?}: {answer}");
    }
    assert_eq!(denied(&mut operator), Vec::<String>::new());
    for words in [
        &["GET", "of-another-program"][..],
        &["DEBUG", "SLEEP", "0"],
        &["MODULE", "LOAD", "/nowhere.so"],
        &["EVAL", "return 1", "0"],
    ] {
        assert!(operator.error(words).starts_with("NOPERM"), "{words:?}");
    }
}

/// A connection whose answers are taken as they are, byte for byte.
struct Raw(TcpStream);

const END: &str = "that-is-the-end-of-the-answer";

impl Raw {
    fn login(server: &Server, user: &str) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut raw = Self(stream);
        assert_eq!(raw.ask(&["AUTH", user, &password(user)]), "+OK\r\n");
        raw
    }

    fn send(&mut self, words: &[&str]) {
        let mut bytes = format!("*{}\r\n", words.len());
        for word in words {
            bytes += &format!("${}\r\n{word}\r\n", word.len());
        }
        // A connection that the server has closed has nothing to say.
        let _ = self.0.write_all(bytes.as_bytes());
    }

    /// The answer, up to that to a PING behind it, or to where the server closed.
    fn ask(&mut self, words: &[&str]) -> String {
        self.send(words);
        self.send(&["PING", END]);
        let mut bytes = Vec::new();
        let mut part = [0; 65536];
        loop {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            let whole = format!("${}\r\n{END}\r\n", END.len());
            if let Some(before) = text.strip_suffix(&whole) {
                return before.to_owned();
            }
            // What was asked for may be refused so as well: then the PING is, too.
            // Whose permissions they are, newer servers say by name.
            let last = text.trim_end().rfind('\n').map_or(0, |end| end + 1);
            let (before, last) = text.split_at(last);
            let refused = last == "-NOAUTH Authentication required.\r\n"
                || last.starts_with("-NOPERM ")
                    && last.ends_with("has no permissions to run the 'ping' command\r\n");
            if refused {
                return before.to_owned();
            }
            match self.0.read(&mut part) {
                Ok(0) | Err(_) => return text,
                Ok(count) => bytes.extend_from_slice(&part[..count]),
            }
        }
    }
}

/// Every command and subcommand of the server with its least number of words.
fn all_commands(operator: &mut Client) -> Vec<(Vec<String>, usize)> {
    fn add(entry: &Value, found: &mut Vec<(Vec<String>, usize)>) {
        let Value::Array(fields) = entry else {
            panic!("not a command: {entry:?}")
        };
        let Some(Value::Array(subcommands)) = fields.get(9) else {
            panic!("no subcommands: {entry:?}")
        };
        if !subcommands.is_empty() {
            return subcommands.iter().for_each(|entry| add(entry, found));
        }
        let arity: i64 = redis::from_redis_value_ref(&fields[1]).unwrap();
        let words = support::text(&fields[0]);
        let words = words.split('|').map(str::to_owned).collect();
        found.push((words, arity.unsigned_abs() as usize));
    }
    let mut found = Vec::new();
    let entries: Vec<Value> = operator.run(&["COMMAND"]);
    entries.iter().for_each(|entry| add(entry, &mut found));
    found
}

/// A server that has a lot to tell: leases, slow commands, denials, errors.
fn talkative() -> (Server, Vec<String>) {
    let server = guarded(
        Options::default()
            .accounts(&["one", "two"])
            .file("medium/broken", r#"{"access_token": "token-of-broken", "#)
            .server(&["--slowlog-log-slower-than", "0"])
            .server(&["--latency-monitor-threshold", "1"])
            .server(&["--notify-keyspace-events", "KEA"]),
    );
    let mut operator = login(&server, "operator");
    let keys: Vec<String> = (0..3).map(|_| operator.pool_key()).collect();
    operator.ok(&["MPOOL.REVOKE", &keys[2]]);
    let mut proxy = login(&server, "proxy");
    for key in &keys[..2] {
        proxy.ok(&["MPOOL.ACQUIRE", key, "*", "WITHTOKEN"]);
        proxy.error(&["MPOOL.ACQUIRE", key, key]);
        proxy.error(&["HGETALL", &format!("key_rotation:{key}")]);
        proxy.error(&["MPOOL.ACQUIR", key]);
        operator.error(&["GET", &format!("mistyped:{key}")]);
        operator.ok(&["HGETALL", &format!("key_rotation:{key}")]);
    }
    proxy.error(&["MPOOL.ACQUIRE", &keys[2], "*"]);
    operator.ok(&[
        "MPOOL.COOLDOWN",
        "medium",
        "one",
        "*",
        "0",
        "REASON",
        "none",
    ]);
    (server, keys)
}

#[track_caller]
fn check_shows_nothing(words: &[&str], answer: &str, keys: &[String]) {
    let secrets = keys.iter().map(String::as_str).chain(["token-of-"]);
    for secret in secrets {
        assert!(
            !answer.contains(secret),
            "{words:?} shows {secret}: {answer}"
        );
    }
}

#[test]
fn the_monitor_learns_no_key_and_no_token_by_any_command() {
    let (server, keys) = talkative();
    let mut operator = login(&server, "operator");
    let lease = format!("key_rotation:{}", keys[0]);

    // What there would be to learn, were it not refused.
    let mut raw = Raw::login(&server, "operator");
    for words in [
        &["KEYS", "*"][..],
        &["SCAN", "0", "COUNT", "1000"],
        &["SLOWLOG", "GET", "-1"],
        &["ACL", "LOG", "100"],
    ] {
        let answer = raw.ask(words);
        assert!(answer.contains(&keys[0]), "{words:?}: {answer}");
    }

    // A proxy could be told of changes by others, as acl.conf says.
    let mut told = Raw::login(&server, "proxy");
    told.ask(&["HELLO", "3"]);
    told.ask(&["CLIENT", "TRACKING", "ON", "BCAST"]);
    operator.ok(&["HSET", &lease, "seen", "no"]);
    wait_for("a word of it", || {
        told.ask(&["ROLE"]).contains(&lease).then_some(())
    });

    let fillers = [&lease, "0", "1", "*", "1"];
    let commands = all_commands(&mut operator);
    assert!(commands.len() > 300, "{}", commands.len());
    let mut allowed = BTreeSet::new();
    for (command, length) in &commands {
        let mut words: Vec<&str> = command.iter().map(String::as_str).collect();
        let missing = length.saturating_sub(words.len());
        words.extend(fillers.iter().cycle().take(missing));
        let dry = [&["ACL", "DRYRUN", "monitor"][..], &words].concat();
        let may = match operator.run::<String>(&dry).as_str() {
            "OK" => true,
            refused => {
                assert!(refused.contains("no permissions"), "{words:?}: {refused}");
                false
            }
        };
        let mut monitor = Raw::login(&server, "monitor");
        let answer = monitor.ask(&words);
        check_shows_nothing(&words, &answer, &keys);
        if may {
            allowed.insert(command.join("|").to_lowercase());
        } else {
            assert!(answer.contains("NOPERM"), "{words:?}: {answer}");
        }
    }
    // What is allowed is looked at more closely below; the last four every user has.
    let expected = [
        "mpool.status",
        "ping",
        "info",
        "role",
        "dbsize",
        "lastsave",
        "latency|latest",
        "latency|history",
        "slowlog|len",
        "auth",
        "hello",
        "quit",
        "reset",
    ];
    assert_eq!(allowed, expected.map(str::to_owned).into());

    let mut monitor = Raw::login(&server, "monitor");
    for section in [
        "all",
        "everything",
        "default",
        "server",
        "clients",
        "memory",
        "persistence",
        "stats",
        "replication",
        "cpu",
        "commandstats",
        "errorstats",
        "latencystats",
        "cluster",
        "modules",
        "keyspace",
        "sentinel",
        "debug",
        "keysizes",
        "threads",
        "mpool",
        "trace",
        "nonsense",
    ] {
        let answer = monitor.ask(&["INFO", section]);
        check_shows_nothing(&["INFO", section], &answer, &keys);
    }
    let known = &keys[0];
    let masked = format!("{}...{}", &known[..14], &known[known.len() - 4..]);
    let (body, half) = (&known[10..], &known[..known.len() / 2]);
    let mut pages = String::new();
    for words in [
        &["MPOOL.STATUS"][..],
        &["MPOOL.STATUS", "NOW", "99999999999999"],
        &["MPOOL.STATUS", "ACCOUNTS", "medium", "COUNT", "1000"],
        &["MPOOL.STATUS", "ACCOUNTS", "high"],
        &["MPOOL.STATUS", "LEASES", "medium", "COUNT", "1000"],
        &[
            "MPOOL.STATUS",
            "LEASES",
            "medium",
            "CURSOR",
            "0",
            "COUNT",
            "1",
        ],
        &[
            "MPOOL.STATUS",
            "LEASES",
            "medium",
            "CURSOR",
            "1-1",
            "NOW",
            "0",
        ],
        &["MPOOL.STATUS", "LEASES", "supreme"],
        &["MPOOL.STATUS", "KEY", &masked],
        &["MPOOL.STATUS", "KEY", "*"],
        &["MPOOL.STATUS", "KEY", half],
        &["MPOOL.STATUS", "KEY", body],
        // Who has the key learns no more by it.
        &["MPOOL.STATUS", "KEY", known],
        &["MPOOL.STATUS", "KEY"],
        &["MPOOL.STATUS", "KEYS"],
        &["MPOOL.STATUS", known],
        &["MPOOL.STATUS", "LEASES", known],
        &["MPOOL.STATUS", "LEASES", "medium", "CURSOR", known],
        &["MPOOL.ACQUIRE", known, "*", "WITHTOKEN"],
        &["MPOOL.RELEASE", known],
        &["MPOOL.KEYGEN", "medium", "POOL"],
        &["MPOOL.RELOAD"],
        &["LATENCY", "LATEST"],
        &["LATENCY", "HISTORY", "command"],
        &["LATENCY", "DOCTOR"],
        &["SLOWLOG", "LEN"],
        &["ROLE"],
        &["HELLO", "3", "SETNAME", "probe"],
        &["MPOOL.STATUS"],
        &["MONITOR"],
        &["PSUBSCRIBE", "*"],
        &["SYNC"],
        &["PSYNC", "?", "-1"],
        &["MULTI"],
        &["HELLO", "3", "AUTH", "default", ""],
        &["AUTH", "default", ""],
        &["AUTH", ""],
        &["MPOOL.STATUS", "LEASES", "medium"],
    ] {
        let answer = monitor.ask(words);
        check_shows_nothing(words, &answer, &keys);
        pages += &answer;
    }
    assert!(pages.contains(&masked), "{pages}");
    // RESET makes it the default user, who is nobody.
    assert_eq!(monitor.ask(&["RESET"]), "+RESET\r\n");
    for words in [
        &["MPOOL.STATUS"][..],
        &["INFO"],
        &["KEYS", "*"],
        &["MONITOR"],
    ] {
        monitor.send(words);
        let mut part = [0; 4096];
        let count = monitor.0.read(&mut part).unwrap();
        assert!(part[..count].starts_with(b"-NOAUTH"), "{words:?}");
    }

    // Someone else's work does not come by either.
    let mut monitor = Raw::login(&server, "monitor");
    monitor.ask(&["MONITOR"]);
    monitor.ask(&["PSUBSCRIBE", "*"]);
    login(&server, "proxy").ok(&["MPOOL.ACQUIRE", &keys[1], "3000000000000", "WITHTOKEN"]);
    monitor
        .0
        .set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    let mut part = [0; 4096];
    assert!(monitor.0.read(&mut part).is_err(), "something came");
}

/// The file with its users for replicas and Sentinels, too.
fn with_replication() -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let text = text_of(ACL).replace("\n#user ", "\nuser ");
    assert_eq!(text.matches("\nuser ").count(), 6, "{text}");
    file.write_all(text.as_bytes()).unwrap();
    file
}

struct Sentinel(Child);

impl Drop for Sentinel {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn replicas_and_a_sentinel_have_users_of_their_own() {
    let users = with_replication();
    let node = || {
        let options = Options::default().accounts(&["one", "two"]);
        let options = options.server(&["--include", users.path().to_str().unwrap()]);
        options.server(&[
            "--masteruser",
            "replica",
            "--masterauth",
            &password("replica"),
        ])
    };
    let primary = node().start();
    let replica = node().replica_of(&primary).start();
    let mut operator = login(&primary, "operator");
    let key = operator.pool_key();
    operator.ok(&["MPOOL.ACQUIRE", &key, "*"]);
    let account = operator.holds(&key);
    wait_for("the copy", || {
        (login(&replica, "operator").holds(&key) == account).then_some(())
    });

    let port = free_port();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("sentinel.conf");
    let settings = format!(
        "port {port}\nbind 127.0.0.1\ndir {}\nsentinel monitor pool 127.0.0.1 {} 1\n\
         sentinel auth-user pool sentinel\nsentinel auth-pass pool {}\n\
         sentinel down-after-milliseconds pool 1000\n",
        folder.path().display(),
        primary.port,
        password("sentinel")
    );
    fs::write(&file, settings).unwrap();
    let child = Command::new(support::server_binary())
        .args([file.to_str().unwrap(), "--sentinel"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let _sentinel = Sentinel(child);
    let upstream = Upstream::ok();
    let forwarder = Forwarder::between(
        &*format!("redis+sentinel://127.0.0.1:{port}/pool"),
        &upstream,
    )
    .env("MPOOL_REDIS_USER", "proxy")
    .env("MPOOL_REDIS_PASSWORD", &password("proxy"))
    .start();
    let served = || (forwarder.client().get("/", &key).status() == 200).then_some(());
    wait_for("an answer through the Sentinel", served);
    wait_for("the failover to be accepted", || {
        let client = redis::Client::open(("127.0.0.1", port)).unwrap();
        let mut connection = client.get_connection().ok()?;
        let mut command = redis::cmd("SENTINEL");
        command
            .arg("FAILOVER")
            .arg("pool")
            .query::<Value>(&mut connection)
            .ok()
    });
    // Sentinel cuts connections when it changes roles.
    let ask = |server: &Server, words: &[&str]| -> Option<String> {
        let client = redis::Client::open(url(server.port, "operator")).unwrap();
        let mut connection = client.get_connection_with_timeout(PATIENCE).ok()?;
        redis::cmd(words[0])
            .arg(&words[1..])
            .query(&mut connection)
            .ok()
    };
    let is = |server: &Server, part: &str| {
        ask(server, &["INFO", "replication"]).is_some_and(|info| info.contains(part))
    };
    wait_for("the failover", || {
        let follows = is(&primary, "role:slave") && is(&primary, "master_link_status:up");
        (follows && is(&replica, "role:master")).then_some(())
    });
    // The old primary follows the new one, and nobody was denied anything.
    let record = format!("client_keys:{key}");
    wait_for("a word to the new one", || {
        ask(&replica, &["HSET", &record, "name", "new"]);
        (ask(&replica, &["HGET", &record, "name"])? == "new").then_some(())
    });
    wait_for("the old primary to follow", || {
        (ask(&primary, &["HGET", &record, "name"])? == "new").then_some(())
    });
    wait_for("readiness at the new primary", || {
        (forwarder.admin("/readyz").status() == 200).then_some(())
    });
    assert_eq!(served(), Some(()));
    for server in [&primary, &replica] {
        assert_eq!(denied(&mut login(server, "operator")), Vec::<String>::new());
    }
}
