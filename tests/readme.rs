//! The README is true: both languages say the same, every command in it works
//! in order after `make run`, its tables are complete, and client keys and
//! tokens show where it says, and nowhere else.

mod proxy;
mod support;
mod typed;

use proxy::{Forwarder, Setup, Upstream};
use redis::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::Duration;
use support::{Client, Options, Server, free_port, text, wait_for};
use typed::{Started, Terminal, free_pair, text_of};

const READMES: [&str; 2] = ["README.md", "README.zh-CN.md"];

/// The fenced blocks of a language, such as `sh`.
fn blocks(markdown: &str, language: &str) -> Vec<String> {
    let fence = format!("```{language}\n");
    let starts = markdown.split(&fence).skip(1);
    starts
        .map(|rest| rest.split("```").next().unwrap().to_owned())
        .collect()
}

/// The rows of all tables, each as its cells.
fn rows(markdown: &str) -> Vec<Vec<String>> {
    let lines = markdown
        .lines()
        .filter(|line| line.starts_with('|') && !line.starts_with("| ---"));
    lines
        .map(|line| {
            let line = line.replace("\\|", "\0");
            let cells = line.trim_matches('|').split('|');
            cells.map(|cell| cell.trim().replace('\0', "|")).collect()
        })
        .collect()
}

/// What stands in backticks.
fn code(text: &str) -> Vec<String> {
    text.split('`')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}

/// The row whose first cell begins with that code.
#[track_caller]
fn row<'a>(rows: &'a [Vec<String>], begin: &str) -> &'a [String] {
    let found = rows
        .iter()
        .find(|row| row[0].starts_with(&format!("`{begin}")));
    found.unwrap_or_else(|| panic!("no row of {begin}"))
}

#[test]
fn both_languages_have_the_same_structure_commands_and_tables() {
    let [english, chinese] = READMES.map(text_of);
    let levels = |text: &str| -> Vec<String> {
        text.lines()
            .filter(|line| line.starts_with('#'))
            .map(|line| line.split(' ').next().unwrap().to_owned())
            .collect()
    };
    assert_eq!(levels(&english), levels(&chinese));
    for language in ["sh", "conf", "ini"] {
        assert_eq!(blocks(&english, language), blocks(&chinese, language));
    }
    let (one, other) = (rows(&english), rows(&chinese));
    assert_eq!(one.len(), other.len());
    for (one, other) in one.iter().zip(&other) {
        assert_eq!(one.len(), other.len(), "{other:?}");
        assert_eq!(code(&one[0]), code(&other[0]));
        let words = |row: &[String]| {
            row.iter()
                .flat_map(|cell| code(cell))
                .collect::<BTreeSet<_>>()
        };
        assert_eq!(words(one), words(other));
    }
}

#[test]
fn every_link_leads_somewhere() {
    for page in ["README.md", "README.zh-CN.md", "docs/architecture.md"] {
        for target in text_of(page)
            .split("](")
            .skip(1)
            .map(|rest| rest.split(')').next().unwrap().to_owned())
        {
            assert!(
                support::repository().join(&target).exists(),
                "{page}: {target}"
            );
        }
    }
    // The files that the page on the architecture sends its reader to.
    let sources = ["src", "src/pool", "src/bin/mpool-forwarder"];
    for word in code(&text_of("docs/architecture.md")) {
        if word.ends_with(".rs") && !word.contains("src/") && !word.contains("tests/") {
            let mut places = sources
                .iter()
                .map(|folder| support::repository().join(folder));
            assert!(
                places.any(|folder| folder.join(&word).exists()),
                "docs/architecture.md: {word}"
            );
        }
        let folders = ["src/", "docs/", "tests/", "scripts/"];
        if folders.iter().any(|folder| word.starts_with(folder)) {
            assert!(
                support::repository().join(&word).exists(),
                "docs/architecture.md: {word}"
            );
        }
    }
}

/// Types into a copy of the repository, in one shell, from `make run` to `make stop`.
fn session(port: u16, typed: &str) -> String {
    let forwarder = free_pair();
    let terminal = Terminal::in_a_copy(port, forwarder);
    let _started = Started::by(&terminal);
    let outcome = terminal.run(&format!("set -euo pipefail\n{typed}"));
    let printed = format!("{}\n{}", outcome.stdout, outcome.stderr);
    assert_eq!(outcome.code, 0, "{printed}");
    let stopped = terminal.run("make stop").ok();
    assert_eq!(stopped.matches("Stopped").count(), 3, "{stopped}");
    for port in [port, forwarder, forwarder + 1] {
        assert!(
            TcpStream::connect(("127.0.0.1", port)).is_err(),
            "make stop left something running on {port}"
        );
    }
    printed
}

#[test]
fn every_command_of_the_readme_works_after_make_run() {
    for readme in READMES {
        let blocks = blocks(&text_of(readme), "sh");
        assert_eq!(blocks[0], "make run\n");
        let printed = session(free_port(), &blocks.join("\n"));
        for part in [
            "MPOOL.ACQUIRE",
            "cargo test",
            "assigned",
            "current",
            "sample-token-not-real",
            "my-account",
            "text_delta",
            "mpool_requests_total",
            "--upstream",
            "mpool_acquires",
        ] {
            assert!(
                printed.contains(part),
                "{readme}: {part} is missing in {printed}"
            );
        }
        assert_eq!(
            printed.matches("Started Redis with mpool").count(),
            1,
            "{printed}"
        );
    }
}

fn server() -> (Server, Client) {
    let server = Options::default().accounts(&["one", "two"]).start();
    let client = server.connect();
    (server, client)
}

#[test]
fn the_table_of_commands_is_complete() {
    let (_server, mut client) = server();
    let commands: BTreeSet<String> =
        client.run(&["COMMAND", "LIST", "FILTERBY", "MODULE", "mpool"]);
    // Debug builds have one for tests.
    let commands: BTreeSet<String> = commands
        .into_iter()
        .map(|name| name.to_uppercase())
        .filter(|name| !["MPOOL.PANIC", "MPOOL.LEAK"].contains(&name.as_str()))
        .collect();
    let key = client.pool_key();
    let replies = [
        (
            "MPOOL.ACQUIRE",
            client.map(&["MPOOL.ACQUIRE", &key, "*", "WITHTOKEN"]),
        ),
        ("MPOOL.RELEASE", client.map(&["MPOOL.RELEASE", &key])),
        (
            "MPOOL.KEYGEN",
            client.map(&[
                "MPOOL.KEYGEN",
                "medium",
                "pool",
                "DAYS",
                "1",
                "NAME",
                "x",
                "NOW",
                "0",
            ]),
        ),
        ("MPOOL.REVOKE", client.map(&["MPOOL.REVOKE", &key])),
        (
            "MPOOL.COOLDOWN",
            client.map(&["MPOOL.COOLDOWN", "medium", "one", "*", "5", "REASON", "x"]),
        ),
        ("MPOOL.RELOAD", client.map(&["MPOOL.RELOAD"])),
        ("MPOOL.REPAIR", client.map(&["MPOOL.REPAIR"])),
    ];
    for readme in READMES {
        let rows = rows(&text_of(readme));
        let first_words = rows
            .iter()
            .flat_map(|row| code(&row[0]))
            .map(|word| word.split(' ').next().unwrap().to_owned());
        let listed: BTreeSet<String> = first_words
            .filter(|word| word.starts_with("MPOOL.") && word.len() > 7)
            .collect();
        assert_eq!(listed, commands, "{readme}");
        for (command, reply) in &replies {
            let told = code(&row(&rows, command)[1]);
            for field in reply.keys() {
                assert!(
                    told.contains(field),
                    "{readme}: {command} does not tell {field}"
                );
            }
        }
        for state in ["assigned", "current", "rotated", "failover", "bound"] {
            assert!(row(&rows, "MPOOL.ACQUIRE")[1].contains(state));
        }
    }
}

#[test]
fn the_table_of_errors_is_complete() {
    let (_server, mut client) = server();
    let info: String = client.run(&["INFO", "mpool"]);
    let codes: BTreeSet<String> = info
        .lines()
        .filter_map(|line| line.strip_prefix("mpool_refused_"))
        .map(|line| line.split(':').next().unwrap().to_uppercase())
        .collect();
    assert!(codes.contains("POOLFULL"), "{info}");
    for readme in READMES {
        let readme = text_of(readme);
        let section = readme
            .split("\n## ")
            .find(|text| text.contains("| `ERR` |"));
        let rows = rows(section.unwrap());
        for code in &codes {
            row(&rows, &format!("{code}`"));
        }
    }
}

#[test]
fn the_table_of_the_forwarders_flags_has_their_defaults() {
    let (exit, help, _) = Setup::bare(&["--help"]).run();
    assert_eq!(exit, 0);
    let flags: BTreeMap<&str, &str> = help
        .split("\n      --")
        .skip(1)
        .map(|text| text.split_once([' ', '\n']).unwrap())
        .collect();
    for readme in READMES {
        let readme = text_of(readme);
        let rows: Vec<_> = rows(&readme)
            .into_iter()
            .filter(|row| row[0].starts_with("`--"))
            .collect();
        assert!(rows.len() > 10, "{rows:?}");
        for row in rows {
            let name = &code(&row[0])[0];
            let text = flags[name.trim_start_matches("--")];
            let default = format!("[default: {}]", code(&row[1]).concat());
            let told = text.contains("[default: ");
            assert_eq!(told, !row[1].is_empty(), "{name}: {text}");
            assert!(!told || text.contains(&default), "{name}: {text}");
        }
        // All others that are named.
        let named = code(&readme).into_iter().filter_map(|word| {
            let word = word.strip_prefix("--")?;
            Some(word.split(' ').next()?.to_owned())
        });
        for name in named {
            assert!(flags.contains_key(name.as_str()), "--{name}");
        }
    }
}

#[test]
fn the_table_of_the_forwarders_answers_is_complete() {
    // Each is written once, as Row("CODE", status, …).
    let source = text_of("src/bin/mpool-forwarder/answers.rs");
    let known: BTreeSet<(String, String)> = source
        .split("Row(")
        .filter_map(|row| {
            let mut words = row.split(',').map(str::trim);
            let name = words.next()?.strip_prefix('"')?.strip_suffix('"')?;
            let status: u16 = words.next()?.parse().ok()?;
            Some((name.to_owned(), status.to_string()))
        })
        .collect();
    assert!(known.len() > 15, "{known:?}");
    for readme in READMES {
        let rows = rows(&text_of(readme));
        let rows = rows.iter().filter(|row| row[1].parse::<u16>().is_ok());
        let told: BTreeSet<(String, String)> = rows
            .flat_map(|row| code(&row[0]).into_iter().map(|name| (name, row[1].clone())))
            .collect();
        assert_eq!(told, known, "{readme}");
    }
}

#[test]
fn the_list_of_the_forwarders_metrics_is_complete() {
    // A refused account, and an answer that breaks off: all there is to count.
    let upstream = Upstream::start(|mut exchange| {
        if exchange.token().as_deref() == Some("token-of-one") {
            return exchange.respond(401, &[], b"refused");
        }
        exchange.stream();
        exchange.chunk("and then no more");
        exchange.close();
    });
    let (server, mut client) = server();
    let forwarder = Forwarder::between(&server, &upstream).start();
    for _ in 0..2 {
        let key = client.pool_key();
        let mut client = forwarder.client();
        client.ask("GET", "/", &key, &[], b"");
        client.try_answer().unwrap_err();
    }
    forwarder.wait_for_lines("end=upstream-broke", 2);
    let page = forwarder.admin("/metrics").text();
    let known: BTreeSet<String> = page
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .map(|line| match line.split_once(' ').unwrap() {
            (name, "counter") => format!("{name}_total"),
            (name, _) => name.to_owned(),
        })
        .collect();
    for readme in READMES {
        let words = code(&text_of(readme));
        let told = words.into_iter().filter(|word| word.starts_with("mpool_"));
        assert_eq!(told.collect::<BTreeSet<_>>(), known, "{readme}");
    }
}

#[test]
fn the_service_starts_a_forwarder_with_the_user_that_is_shown() {
    let (server, mut client) = server();
    let readme = text_of(READMES[0]);
    let (_, user) = readme.split_once("redis-cli -p 6380 ACL SETUSER ").unwrap();
    let (user, _) = user.split_once("```").unwrap();
    let user = user.replace(['\'', '\\'], "");
    let mut words = vec!["ACL", "SETUSER"];
    words.extend(user.split_whitespace());
    client.ok(&words);

    let unit = blocks(&readme, "ini").concat();
    let setting = |name: &str| {
        let line = unit.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.strip_prefix('=')).unwrap()
    };
    let command: Vec<&str> = setting("ExecStart").split(' ').collect();
    assert!(command[0].ends_with("/mpool-forwarder"));
    let upstream = Upstream::ok();
    let mut setup = Setup::bare(&command[1..]);
    for variable in setting("Environment").split(' ') {
        let (name, value) = variable.split_once('=').unwrap();
        let value = match name {
            "MPOOL_UPSTREAM" => proxy::Target::url(&upstream),
            "MPOOL_REDIS" => value.replace("6380", &server.port.to_string()),
            _ => value.to_owned(),
        };
        setup = setup.env(name, &value);
    }
    let forwarder = setup
        .env("MPOOL_REDIS_PASSWORD", "choose-a-password")
        .args(&["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
        .start();
    wait_for("readiness", || {
        (forwarder.admin("/readyz").status() == 200).then_some(())
    });
    let key = client.pool_key();
    assert_eq!(forwarder.client().get("/", &key).status(), 200);
}

#[test]
fn the_table_of_settings_is_complete_and_has_the_defaults() {
    let (_server, mut client) = server();
    let settings: BTreeMap<String, String> = client.run(&["CONFIG", "GET", "mpool.*"]);
    for readme in READMES {
        let rows = rows(&text_of(readme));
        let listed: BTreeSet<String> = rows
            .iter()
            .flat_map(|row| code(&row[0]))
            .filter(|word| word.starts_with("mpool."))
            .collect();
        assert_eq!(listed, settings.keys().cloned().collect(), "{readme}");
        for (name, value) in &settings {
            if name != "mpool.account-dir" {
                assert_eq!(
                    row(&rows, name)[1],
                    format!("`{value}`"),
                    "{readme}: {name}"
                );
            }
        }
    }
}

#[test]
fn the_table_of_keys_is_complete() {
    let server = Options::default()
        .accounts(&["one", "two"])
        .file("high/other", r#"{"api_key": "x"}"#)
        .start();
    let mut client = server.connect();
    let key = client.pool_key();
    client.acquire(&key, 0);
    client.acquire(&key, support::DAY);
    let bound = text(&client.map(&["MPOOL.KEYGEN", "high", "other", "NAME", "x"])["key"]);
    client.ok(&[
        "MPOOL.COOLDOWN",
        "medium",
        "one",
        "*",
        "60000",
        "REASON",
        "x",
    ]);
    client.acquire(&key, support::DAY);
    let names: Vec<String> = client.run(&["KEYS", "*"]);
    let mut patterns = BTreeMap::new();
    for name in &names {
        let pattern = name.replace(&key, "{key}").replace(&bound, "{key}");
        let pattern = pattern
            .replace("medium_", "{tier}_")
            .replace("high_", "{tier}_");
        let pattern = ["one", "two", "other"]
            .iter()
            .fold(pattern, |text, account| {
                text.replace(&format!(":{account}"), ":{account}")
            });
        let kind: String = client.run(&["TYPE", name]);
        let fields: Vec<String> = if kind == "hash" {
            client.run(&["HKEYS", name])
        } else {
            Vec::new()
        };
        patterns
            .entry(pattern)
            .or_insert((kind, BTreeSet::new()))
            .1
            .extend(fields);
    }
    for readme in READMES {
        let rows = rows(&text_of(readme));
        let listed: BTreeSet<String> = rows
            .iter()
            .flat_map(|row| code(&row[0]))
            .filter(|word| word.contains(":{"))
            .collect();
        assert_eq!(listed, patterns.keys().cloned().collect(), "{readme}");
        for (pattern, (kind, fields)) in &patterns {
            let row = row(&rows, pattern);
            assert_eq!(&row[1], kind, "{readme}: {pattern}");
            assert_eq!(
                &code(&row[2]).into_iter().collect::<BTreeSet<_>>(),
                fields,
                "{readme}: {pattern}"
            );
        }
    }
}

#[test]
fn the_lines_for_redis_conf_are_accepted() {
    let folder = tempfile::tempdir().unwrap();
    for readme in READMES {
        let mut lines = blocks(&text_of(readme), "conf").concat();
        lines = lines.replace("/path/to/libmpool.so", support::module().to_str().unwrap());
        lines = lines.replace("/path/to/account", folder.path().to_str().unwrap());
        let mut words: Vec<String> = Vec::new();
        for line in lines.lines() {
            words.push(format!("--{line}"));
        }
        let args: Vec<&str> = words.iter().flat_map(|line| line.split(' ')).collect();
        let server = Options {
            bare: true,
            ..Options::default()
        }
        .server(&args)
        .start();
        let mut client = server.connect();
        for (setting, value) in [
            ("appendfsync", "everysec"),
            ("maxmemory-policy", "noeviction"),
            ("mpool.rotation-ms", "86400000"),
        ] {
            assert_eq!(
                client.run::<Vec<String>>(&["CONFIG", "GET", setting])[1],
                value,
                "{readme}"
            );
        }
        assert!(
            !server.log().contains("maxmemory-policy may"),
            "{}",
            server.log()
        );
    }
}

#[test]
fn a_policy_that_may_evict_the_pools_keys_is_warned_of() {
    for (policy, warned) in [("allkeys-lru", true), ("volatile-lru", false)] {
        let server = Options::default()
            .server(&["--maxmemory-policy", policy])
            .start();
        assert_eq!(
            server.log().contains("maxmemory-policy may evict"),
            warned,
            "{policy}"
        );
    }
}

#[test]
fn cluster_mode_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    // Above 55535 there is no room for the cluster's own port.
    let port = (20_000..50_000)
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .unwrap();
    let mut command = Command::new("timeout");
    command.arg("20").arg(support::server_binary()).args([
        "--port",
        &port.to_string(),
        "--cluster-enabled",
        "yes",
        "--dir",
    ]);
    command
        .arg(folder.path())
        .arg("--loadmodule")
        .arg(support::module())
        .stdin(Stdio::null());
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("use Sentinel"));
}

/// What MONITOR shows while `act` goes on.
fn monitored(server: &Server, act: impl FnOnce(&mut Client)) -> Vec<String> {
    let mut monitor = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    monitor
        .set_read_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    monitor.write_all(b"MONITOR\r\n").unwrap();
    let mut shown = Vec::new();
    let mut read_until = |end: &str| {
        wait_for("MONITOR", || {
            let mut part = [0; 4096];
            if let Ok(count) = monitor.read(&mut part) {
                shown.extend_from_slice(&part[..count]);
            }
            String::from_utf8_lossy(&shown).contains(end).then_some(())
        });
    };
    read_until("+OK");
    let mut client = server.connect();
    act(&mut client);
    client.ok(&["ECHO", "that-is-all"]);
    read_until("that-is-all");
    String::from_utf8(shown)
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect()
}

/// Every command that takes a client key, also within MULTI and a script.
fn use_key(client: &mut Client, key: &str) {
    client.ok(&["MPOOL.ACQUIRE", key, "*"]);
    client.ok(&["MPOOL.ACQUIRE", key, "*", "WITHTOKEN"]);
    client.ok(&["MPOOL.STATUS", "KEY", key]);
    client.error(&["MPOOL.ACQUIRE", key, "never"]);
    client.error(&["MPOOL.ACQUIRE", key, "*", "WITHOUT"]);
    client.error(&["MPOOL.ACQUIRE", key]);
    client.ok(&["MULTI"]);
    client.ok(&["MPOOL.ACQUIRE", key, "*"]);
    client.ok(&["EXEC"]);
    client.ok(&[
        "EVAL",
        "return redis.call('MPOOL.ACQUIRE', redis.call('GET', 'the-key'), '*')",
        "0",
    ]);
    client.ok(&["MPOOL.RELEASE", key]);
    client.ok(&["MPOOL.REVOKE", key]);
}

#[test]
fn monitor_and_slowlog_show_client_keys_in_redis_key_names_alone() {
    let (server, mut client) = server();
    let key = client.pool_key();
    client.ok(&["SET", "the-key", &key]);
    client.ok(&["CONFIG", "SET", "slowlog-log-slower-than", "0"]);
    client.ok(&["SLOWLOG", "RESET"]);
    let monitored = monitored(&server, |client| use_key(client, &key));
    let slow: Vec<(u64, u64, u64, Vec<String>, String, String)> =
        client.run(&["SLOWLOG", "GET", "-1"]);
    let slow: Vec<String> = slow.into_iter().map(|entry| entry.3.join(" ")).collect();
    for (place, lines) in [("MONITOR", monitored), ("SLOWLOG", slow)] {
        let of_mpool = |line: &&String| {
            line.to_lowercase().contains("mpool.") && !line.to_lowercase().contains("eval")
        };
        assert!(
            lines.iter().filter(of_mpool).count() >= 8,
            "{place}: {lines:#?}"
        );
        for line in lines.iter().filter(of_mpool) {
            assert!(
                !line.contains(&key) && line.contains("(redacted)"),
                "{place}: {line}"
            );
        }
        // The module's own writes name Redis keys, and those hold the client key.
        assert!(
            lines
                .iter()
                .any(|line| line.contains(&format!("key_rotation:{key}"))),
            "{place}: {lines:#?}"
        );
        for line in lines.iter().filter(|line| line.contains(&key)) {
            let named = [format!("key_rotation:{key}"), format!("client_keys:{key}")];
            assert!(
                named.iter().any(|name| line.contains(name)),
                "{place}: {line}"
            );
        }
        assert!(
            !lines.iter().any(|line| line.contains("token-of-")),
            "{place}: {lines:#?}"
        );
    }
    // By default only what takes 10 ms is logged.
    assert_eq!(
        self::server()
            .1
            .run::<Vec<String>>(&["CONFIG", "GET", "slowlog-log-slower-than"])[1],
        "10000"
    );
}

#[test]
fn monitor_shows_what_is_typed_with_a_client_key_in_it() {
    let (server, mut client) = server();
    let key = client.pool_key();
    let lines = monitored(&server, |client| {
        client.ok(&["HGETALL", &format!("key_rotation:{key}")]);
        client.ok(&[
            "EVAL",
            "return redis.call('MPOOL.ACQUIRE', KEYS[1], '*')",
            "1",
            &key,
        ]);
    });
    for command in ["HGETALL", "EVAL"] {
        assert!(
            lines
                .iter()
                .any(|line| line.contains(command) && line.contains(&key)),
            "{command}: {lines:#?}"
        );
    }
}

#[test]
fn what_is_kept_on_disk_holds_client_keys_and_never_a_token() {
    let options = Options::default().accounts(&["one", "two"]);
    let server = options
        .server(&[
            "--appendonly",
            "yes",
            "--appendfsync",
            "always",
            "--rdbcompression",
            "no",
        ])
        .start();
    let mut client = server.connect();
    let key = client.pool_key();
    client.ok(&["SET", "the-key", &key]);
    client.ok(&["MPOOL.ACQUIRE", &key, "*", "WITHTOKEN"]);
    client.ok(&["SAVE"]);
    use_key(&mut client, &key);
    let data = server.folder.path().join("data");
    let find = |bytes: &[u8], text: &str| {
        bytes
            .windows(text.len())
            .any(|window| window == text.as_bytes())
    };
    let mut kinds = BTreeSet::new();
    let files = fs::read_dir(&data)
        .unwrap()
        .chain(fs::read_dir(data.join("appendonlydir")).unwrap());
    for path in files
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file())
    {
        let bytes = fs::read(&path).unwrap();
        assert!(
            !find(&bytes, "token-of-"),
            "{} holds a token",
            path.display()
        );
        if find(&bytes, &format!("client_keys:{key}")) {
            kinds.insert(path.extension().unwrap().to_str().unwrap().to_owned());
        }
        if path.ends_with("log") {
            assert!(!find(&bytes, &key), "the log holds a client key");
        }
    }
    assert_eq!(kinds, BTreeSet::from(["aof".to_owned(), "rdb".to_owned()]));
}

#[test]
fn status_info_and_errors_hold_neither_client_keys_nor_tokens() {
    let (_server, mut client) = server();
    let key = client.pool_key();
    client.ok(&["MPOOL.ACQUIRE", &key, "*"]);
    let mut shown = String::new();
    for words in [
        &["MPOOL.STATUS"][..],
        &["MPOOL.STATUS", "ACCOUNTS", "medium"],
        &["MPOOL.STATUS", "LEASES", "medium"],
        &["MPOOL.STATUS", "KEY", &key],
        &["INFO", "everything"],
        &["MPOOL.RELOAD"],
        &["MPOOL.REPAIR"],
    ] {
        shown += &format!("{:?}\n", client.run::<Value>(words));
    }
    shown += &client.error(&["MPOOL.ACQUIRE", &key, "never"]);
    shown += &client.error(&["MPOOL.STATUS", "KEY", &key, "NOW", &key]);
    client.ok(&["MPOOL.REVOKE", &key]);
    shown += &client.error(&["MPOOL.ACQUIRE", &key, "*"]);
    assert!(!shown.contains(&key), "{shown}");
    assert!(!shown.contains("token-of-"), "{shown}");
    assert!(
        shown.contains(&format!("{}...{}", &key[..14], &key[key.len() - 4..])),
        "{shown}"
    );
}

#[test]
fn the_forwarder_shows_neither_client_keys_nor_tokens() {
    let (server, mut client) = server();
    let keys = [client.pool_key(), client.pool_key()];
    let upstream = Upstream::refusing(&["token-of-one"]);
    for form in ["text", "json"] {
        let forwarder = Forwarder::between(&server, &upstream)
            .args(&["--log", form])
            .start();
        let mut shown = String::new();
        for key in &keys {
            let path = format!("/{key}?key={key}");
            assert_eq!(forwarder.client().get(&path, key).status(), 200);
            let answer = forwarder
                .client()
                .round("GET", "/", key, &[("x-api-key", "other")], b"");
            assert_eq!(answer.status(), 401);
            shown += &answer.text();
        }
        client.ok(&["MPOOL.COOLDOWN", "medium", "one", "*", "0"]);
        forwarder.wait_for_lines("GET", 4);
        shown += &forwarder.log().join("\n");
        shown += &forwarder.admin("/metrics").text();
        for key in &keys {
            assert!(!shown.contains(key), "{shown}");
            let masked = format!("{}...{}", &key[..14], &key[key.len() - 4..]);
            assert!(shown.contains(&masked), "{shown}");
        }
        assert!(!shown.contains("token-of-"), "{shown}");
    }
}

#[test]
fn keyspace_notifications_and_scan_hold_client_keys() {
    let (server, mut client) = server();
    let key = client.pool_key();
    client.ok(&["CONFIG", "SET", "notify-keyspace-events", "KEA"]);
    let mut listener = server.connect();
    let mut events = listener.connection.as_pubsub();
    events.psubscribe("*").unwrap();
    client.ok(&["MPOOL.ACQUIRE", &key, "*"]);
    let channel = events.get_message().unwrap().get_channel_name().to_owned();
    assert!(
        channel.ends_with(&format!("key_rotation:{key}")),
        "{channel}"
    );
    let (_, names): (String, Vec<String>) = client.run(&["SCAN", "0", "COUNT", "1000"]);
    assert!(names.contains(&format!("client_keys:{key}")), "{names:?}");
}

#[test]
fn settings_that_are_changed_at_run_time_count_from_then_on() {
    let (_server, mut client) = server();
    let keys: Vec<String> = (0..4).map(|_| client.pool_key()).collect();
    for key in &keys {
        client.acquire(key, 0);
    }
    client.ok(&["CONFIG", "SET", "mpool.rotation-ms", "60000"]);
    client.ok(&["CONFIG", "SET", "mpool.slots-per-account", "1"]);
    let holders: Vec<&String> = keys
        .iter()
        .filter(|key| client.try_acquire(key, 1).is_ok())
        .collect();
    assert_eq!(
        holders.len(),
        2,
        "holders beyond the lowered number move on, and nothing is free"
    );
    client.check_invariants(1);
    client.ok(&["MPOOL.RELEASE", holders[0]]);
    assert_eq!(client.acquire(holders[0], 5).next, Some(60_005));
    for (name, value) in [
        ("slots-per-account", "0"),
        ("slots-per-account", "1025"),
        ("rotation-ms", "-1"),
        ("account-dir", ""),
    ] {
        client.error(&["CONFIG", "SET", &format!("mpool.{name}"), value]);
    }
}

#[test]
fn without_the_module_the_error_repeats_the_client_key() {
    let server = Options {
        bare: true,
        ..Options::default()
    }
    .start();
    let mut client = server.connect();
    let error = client.error(&["MPOOL.ACQUIRE", "sk-cli-v1-secret", "*"]);
    assert!(error.contains("sk-cli-v1-secret"), "{error}");
}

#[test]
fn the_proxys_user_may_do_what_it_must_and_no_more() {
    for readme in READMES {
        let (server, mut client) = server();
        let key = client.pool_key();
        let command = blocks(&text_of(readme), "sh").pop().unwrap();
        assert!(command.contains("ACL SETUSER proxy"), "{command}");
        Terminal::of(&server)
            .env("MPOOL_TEST_STRICT", "1")
            .run(&command)
            .ok();
        let mut proxy = Client::open(&format!(
            "redis://proxy:choose-a-password@127.0.0.1:{}/",
            server.port
        ));
        let lease = proxy.map(&["MPOOL.ACQUIRE", &key, "*", "WITHTOKEN"]);
        proxy.ok(&[
            "MPOOL.COOLDOWN",
            "medium",
            &text(&lease["account"]),
            "*",
            "1000",
        ]);
        proxy.ok(&["MPOOL.STATUS"]);
        // So that the forwarder is told of changes.
        let registration = format!("client_keys:{key}");
        proxy.ok(&["MPOOL.STATUS", "KEY", &key]);
        proxy.ok(&["HELLO", "3"]);
        let prefix = ["PREFIX", "client_keys:", "PREFIX", "key_rotation:"];
        proxy.ok(&[&["CLIENT", "TRACKING", "ON", "BCAST"][..], &prefix].concat());
        for refused in [
            &["MPOOL.KEYGEN", "medium", "POOL"][..],
            &["MPOOL.REVOKE", &key],
            &["GET", "medium_pool:slots:one"],
            &["HGETALL", &registration],
            &["EXISTS", &registration],
            &["CLIENT", "LIST"],
            &["KEYS", "*"],
            &["MONITOR"],
            &["SLOWLOG", "GET"],
            &["CONFIG", "GET", "*"],
        ] {
            assert!(
                proxy
                    .error(refused)
                    .to_lowercase()
                    .contains("no permissions"),
                "{refused:?}"
            );
        }
    }
}

/// The page on reliability names a test for what it says: each is there, and
/// the numbers of states are those that the tests insist on.
#[test]
fn the_tests_that_the_page_on_reliability_names_are_there() {
    let page = text_of("docs/reliability.md");
    let mut sources = String::new();
    for folder in ["tests", "src/pool"] {
        for file in fs::read_dir(support::repository().join(folder)).unwrap() {
            let path = file.unwrap().path();
            if path.extension().is_some_and(|end| end == "rs") {
                sources += &fs::read_to_string(path).unwrap();
            }
        }
    }
    let is_test = |word: &&String| {
        word.matches('_').count() > 2
            && word
                .chars()
                .all(|letter| letter == '_' || letter.is_ascii_lowercase())
    };
    let named = code(&page);
    let named: BTreeSet<&String> = named.iter().filter(is_test).collect();
    assert!(named.len() > 10, "{named:?}");
    for name in named {
        assert!(sources.contains(&format!("fn {name}(")), "{name}");
    }
    for row in rows(&page) {
        let name = code(&row[0]).pop().unwrap_or_default();
        if !name.starts_with("every_state_when") {
            continue;
        }
        let numbers = row[2..].join(", ").replace(',', "_").replace("_ ", ", ");
        let body = sources.split(&format!("fn {name}(")).nth(1).unwrap();
        let body = body.split("\n}\n").next().unwrap();
        assert!(body.contains(&format!("[{numbers}]")), "{name}: {numbers}");
    }
}
