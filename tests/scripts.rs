//! The scripts in shell/: what they make and show, and the exit codes that a
//! caller can rely on, against real servers: good ones, locked ones, ones
//! without the module, hung ones and none.

mod proxy;
mod support;
mod typed;

use proxy::{Forwarder, Upstream};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::time::{Duration, Instant};
use support::{Client, DAY, Options, Server, bearer, free_port, text, wait_for, while_reading};
use typed::{Terminal, key_in, program};

const REFUSED: i32 = 1;
const USAGE: i32 = 2;
const UNREACHABLE: i32 = 3;
const NO_MODULE: i32 = 4;

/// Each script with arguments that make it call Redis.
const CALLS: [&str; 8] = [
    "shell/medium.sh",
    "shell/medium.sh one 30",
    "shell/high.sh high-one",
    "shell/supreme.sh supreme-one 7",
    "shell/pool-status.sh",
    "shell/release.sh sk-cli-v1-any",
    "shell/revoke.sh sk-cli-v1-any",
    "shell/sync-slots.sh",
];

fn start(options: Options) -> (Server, Client, Terminal) {
    let server = options.start();
    let client = server.connect();
    let terminal = Terminal::of(&server);
    (server, client, terminal)
}

fn pool_of(accounts: &[&str]) -> (Server, Client, Terminal) {
    start(Options::default().accounts(accounts))
}

/// The field of a key's record.
fn record(client: &mut Client, key: &str, field: &str) -> Option<String> {
    client.run(&["HGET", &format!("client_keys:{key}"), field])
}

fn days(client: &mut Client, key: &str) -> i64 {
    let mut time = |field| record(client, key, field).unwrap().parse::<i64>().unwrap();
    let lasts = time("expires_at") - time("created_at");
    assert_eq!(lasts % DAY, 0);
    lasts / DAY
}

/// A key that holds a slot, by this server's clock.
fn holder(client: &mut Client) -> String {
    let key = key_in(&text(
        &client.map(&["MPOOL.KEYGEN", "medium", "POOL"])["key"],
    ));
    client.ok(&["MPOOL.ACQUIRE", &key, "*"]);
    key
}

/// Every script of the folder that is there to be run.
fn scripts() -> Vec<String> {
    let folder = support::repository().join("shell");
    let names = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.filter(|name| !name.starts_with("lib")).collect();
    names.sort();
    names
}

#[test]
fn every_script_explains_itself_without_a_redis() {
    let terminal = Terminal::at(free_port());
    let names = scripts();
    for expected in [
        "high.sh",
        "medium.sh",
        "pool-status.sh",
        "release.sh",
        "revoke.sh",
        "supreme.sh",
        "sync-slots.sh",
    ] {
        assert!(
            names.iter().any(|name| name == expected),
            "{expected} is missing"
        );
    }
    for name in names {
        for option in ["-h", "--help"] {
            let help = terminal.run(&format!("shell/{name} {option}")).ok();
            for part in [
                "Usage:",
                &name,
                "MPOOL_REDIS_PORT",
                "MPOOL_REDIS_PASSWORD",
                "Exit codes:",
            ] {
                assert!(
                    help.contains(part),
                    "{name} {option} does not tell {part}: {help}"
                );
            }
        }
    }
}

#[test]
fn every_script_runs_from_any_folder_and_by_a_link() {
    let (_server, _client, terminal) = pool_of(&["one"]);
    terminal
        .run("mkdir elsewhere && cd elsewhere && ../shell/pool-status.sh")
        .ok();
    terminal
        .run("ln -s \"$PWD/shell/medium.sh\" mint && ./mint")
        .ok();
    terminal
        .run("cd / && bash \"$OLDPWD/shell/sync-slots.sh\"")
        .ok();
}

#[test]
fn medium_sh_makes_pool_keys_in_each_form_of_the_guide() {
    let (_server, mut client, terminal) = pool_of(&["one"]);
    for (command, lasts) in [
        ("./medium.sh", 30),
        ("./medium.sh pool", 30),
        ("./medium.sh POOL", 30),
        ("./medium.sh pool 60", 60),
        ("./medium.sh pool 060", 60),
        ("./medium.sh pool 1", 1),
        ("./medium.sh pool 36500", 36_500),
    ] {
        let printed = terminal.run(&format!("cd shell; {command}")).ok();
        let key = key_in(&printed);
        assert_eq!(
            record(&mut client, &key, "use_pool").as_deref(),
            Some("true"),
            "{command}"
        );
        assert_eq!(
            record(&mut client, &key, "tier").as_deref(),
            Some("medium"),
            "{command}"
        );
        assert_eq!(days(&mut client, &key), lasts, "{command}");
        for part in ["medium", "pool", &format!("{lasts} day"), "MPOOL.ACQUIRE"] {
            assert!(
                printed.contains(part),
                "{command} does not tell {part}: {printed}"
            );
        }
    }
}

#[test]
fn a_key_is_bound_to_the_account_that_is_named() {
    let options = Options::default()
        .accounts(&["jasonlucy8160-outlook", "-begins.with_a+dash@x"])
        .file("high/high-one", &bearer("high-one"))
        .file("supreme/supreme-one", &bearer("supreme-one"));
    let (_server, mut client, terminal) = start(options);
    for (command, tier, account, lasts) in [
        (
            "medium.sh jasonlucy8160-outlook",
            "medium",
            "jasonlucy8160-outlook",
            30,
        ),
        (
            "medium.sh jasonlucy8160-outlook 30",
            "medium",
            "jasonlucy8160-outlook",
            30,
        ),
        (
            "medium.sh jasonlucy8160-outlook 45",
            "medium",
            "jasonlucy8160-outlook",
            45,
        ),
        (
            "medium.sh -- -begins.with_a+dash@x",
            "medium",
            "-begins.with_a+dash@x",
            30,
        ),
        ("high.sh high-one", "high", "high-one", 30),
        ("high.sh high-one 7", "high", "high-one", 7),
        ("supreme.sh supreme-one 7", "supreme", "supreme-one", 7),
    ] {
        let printed = terminal.run(&format!("shell/{command}")).ok();
        let key = key_in(&printed);
        let found =
            ["tier", "use_pool", "account_name"].map(|field| record(&mut client, &key, field));
        assert_eq!(
            found.each_ref().map(Option::as_deref),
            [Some(tier), Some("false"), Some(account)],
            "{command}"
        );
        assert_eq!(days(&mut client, &key), lasts, "{command}");
        assert!(
            printed.contains(account) && printed.contains(tier),
            "{command}: {printed}"
        );
        let lease = client.acquire(&key, 0);
        assert_eq!(
            (lease.account.as_str(), lease.state.as_str()),
            (account, "bound"),
            "{command}"
        );
    }
}

#[test]
fn the_commands_that_are_printed_with_a_key_work_as_typed() {
    let options = Options::default()
        .accounts(&["one"])
        .file("high/high-one", &bearer("high-one"));
    let (server, _client, terminal) = start(options);
    let upstream = Upstream::ok();
    let forwarder = Forwarder::between(&server, &upstream).start();
    let url = forwarder.url();
    let terminal = terminal.env("MPOOL_TEST_STRICT", "1");
    for command in ["medium.sh", "high.sh high-one"] {
        let printed = terminal.run(&format!("shell/{command}")).ok();
        assert!(printed.contains("curl http://127.0.0.1:8080/"), "{printed}");
        let elsewhere = format!("MPOOL_FORWARDER_URL={url}/ shell/{command}");
        let printed = terminal.run(&elsewhere).ok();
        let typed = printed.lines().filter_map(|line| line.strip_prefix("  "));
        let answers: Vec<String> = typed.map(|line| terminal.run(line).ok()).collect();
        assert_eq!(answers.len(), 2, "{printed}");
        assert!(answers[0].contains("account"), "{answers:?}");
        assert_eq!(answers[1], "ok");
    }
    let tokens: Vec<_> = upstream.requests().iter().map(|it| it.token()).collect();
    let tokens: Vec<&str> = tokens.iter().flatten().map(String::as_str).collect();
    assert_eq!(tokens, ["token-of-one", "token-of-high-one"]);
}

#[test]
fn q_prints_the_key_alone() {
    let options = Options::default()
        .accounts(&["one"])
        .file("high/high-one", &bearer("high-one"));
    let (_server, mut client, terminal) = start(options);
    for command in [
        "medium.sh -q",
        "medium.sh -q pool 60",
        "medium.sh one -q",
        "high.sh -q high-one",
    ] {
        let outcome = terminal.run(&format!("shell/{command}"));
        assert_eq!(outcome.stderr, "", "{command}");
        let printed = outcome.ok();
        let key = key_in(&printed);
        assert_eq!(printed, format!("{key}\n"), "{command}");
        assert!(record(&mut client, &key, "tier").is_some(), "{command}");
    }
}

#[test]
fn n_labels_the_key() {
    let (_server, mut client, terminal) = pool_of(&["one"]);
    let key = key_in(
        &terminal
            .run("shell/medium.sh -n '开发团队 %s; $(x)' -q")
            .ok(),
    );
    assert_eq!(
        record(&mut client, &key, "name").as_deref(),
        Some("开发团队 %s; $(x)")
    );
    let said = terminal
        .run(r"shell/medium.sh -n $'two\nlines'")
        .fails(REFUSED);
    assert!(said.contains("NAME"), "{said}");
}

#[test]
fn a_full_or_empty_pool_still_gives_keys_and_says_so() {
    let (server, mut client, terminal) = pool_of(&["one"]);
    holder(&mut client);
    holder(&mut client);
    let outcome = terminal.run("shell/medium.sh");
    assert!(outcome.stderr.contains("every slot"), "{outcome:?}");
    key_in(&outcome.ok());
    server.remove_account("medium/one");
    wait_for("the account's end", || {
        client.slots("one").is_none().then_some(())
    });
    let outcome = terminal.run("shell/medium.sh");
    assert!(outcome.stderr.contains("no usable account"), "{outcome:?}");
    key_in(&outcome.ok());
}

#[test]
fn high_and_supreme_refuse_the_pool_and_say_why() {
    let (_server, mut client, terminal) = pool_of(&["one"]);
    for command in [
        "high.sh pool",
        "high.sh POOL 30",
        "supreme.sh pool",
        "supreme.sh Pool",
    ] {
        let said = terminal.run(&format!("shell/{command}")).fails(USAGE);
        assert!(
            said.contains("request limits") && said.contains("medium.sh pool"),
            "{command}: {said}"
        );
    }
    assert_eq!(
        client.run::<Vec<String>>(&["KEYS", "client_keys:*"]),
        [""; 0]
    );
}

#[test]
fn wrong_usage_ends_in_2_and_calls_nothing() {
    let terminal = Terminal::at(free_port());
    for command in [
        "medium.sh pool 0",
        "medium.sh pool -1",
        "medium.sh pool 36501",
        "medium.sh pool sixty",
        "medium.sh pool 1.5",
        "medium.sh pool 99999999999999999999",
        "medium.sh pool 60 more",
        "medium.sh one ''",
        "medium.sh ''",
        "medium.sh 'a b'",
        "medium.sh ../one",
        "medium.sh 一",
        "medium.sh -x",
        "medium.sh -n",
        "high.sh",
        "supreme.sh",
        "high.sh -q",
        "release.sh",
        "release.sh one two",
        "release.sh ''",
        "revoke.sh",
        "revoke.sh one two",
        "revoke.sh ''",
        "revoke.sh -x",
        "sync-slots.sh now",
        "pool-status.sh gold",
        "pool-status.sh medium high",
        "pool-status.sh -x",
        "pool-status.sh -w 0",
        "pool-status.sh -w 1x",
        "pool-status.sh -l",
        "pool-status.sh -l many",
    ] {
        let said = terminal.run(&format!("shell/{command}")).fails(USAGE);
        let prog = command.split(' ').next().unwrap();
        assert!(said.starts_with(&format!("{prog}: ")), "{command}: {said}");
    }
    for setting in [
        "MPOOL_REDIS_PORT=none",
        "MPOOL_REDIS_PORT=70000",
        "MPOOL_TIMEOUT=0",
        "MPOOL_REDIS_TLS=yes",
        "MPOOL_REDIS_USER=me",
    ] {
        for command in CALLS {
            terminal.run(&format!("{setting} {command}")).fails(USAGE);
        }
    }
    assert_eq!(terminal.command_lines(), "", "redis-cli was called");
}

#[test]
fn what_the_module_refuses_ends_in_1_with_its_words() {
    let (_server, mut client, terminal) = pool_of(&["one"]);
    let expired =
        text(&client.map(&["MPOOL.KEYGEN", "medium", "POOL", "DAYS", "1", "NOW", "0"])["key"]);
    for (command, code) in [
        ("medium.sh nobody", "NOACCOUNT"),
        ("medium.sh 60", "medium.sh pool 60"),
        ("high.sh one", "NOACCOUNT"),
        ("supreme.sh nobody 5", "account/supreme/nobody.json"),
        ("release.sh sk-cli-v1-nobody", "NOKEY"),
        ("revoke.sh sk-cli-v1-nobody", "NOKEY"),
        ("revoke.sh 'not a key'", "client key"),
    ] {
        let said = terminal.run(&format!("shell/{command}")).fails(REFUSED);
        assert!(said.contains(code), "{command}: {said}");
    }
    assert!(
        terminal
            .run(&format!("shell/release.sh {expired}"))
            .ok()
            .contains("Nothing to release")
    );
}

#[test]
fn a_replica_shows_its_pool_and_refuses_the_rest() {
    let (_server, mut client, terminal) = pool_of(&["one"]);
    client.ok(&["REPLICAOF", "127.0.0.1", &free_port().to_string()]);
    terminal.run("shell/pool-status.sh").ok();
    for command in [
        "medium.sh",
        "release.sh sk-cli-v1-any",
        "revoke.sh sk-cli-v1-any",
        "sync-slots.sh",
    ] {
        let said = terminal.run(&format!("shell/{command}")).fails(REFUSED);
        assert!(
            said.contains("READONLY") && said.contains("primary"),
            "{command}: {said}"
        );
    }
}

#[test]
fn while_the_module_reads_the_keyspace_one_is_asked_to_try_again() {
    let (server, mut client, terminal) = pool_of(&["one"]);
    client.register(30_000);
    while_reading(&server, || {
        for command in [
            "pool-status.sh",
            "medium.sh",
            "release.sh sk-cli-v1-any",
            "revoke.sh sk-cli-v1-any",
        ] {
            let said = terminal.run(&format!("shell/{command}")).fails(REFUSED);
            assert!(
                said.contains("LOADING mpool is reading") && said.contains("try again in a moment"),
                "{command}: {said}"
            );
        }
    });
    // This one waits for it.
    let said = terminal.run("shell/sync-slots.sh").ok();
    assert!(said.contains("othing"), "{said}");
    terminal.run("shell/pool-status.sh").ok();
}

#[test]
fn no_redis_ends_in_3_and_says_how_to_start_one() {
    let port = free_port();
    let terminal = Terminal::at(port);
    for command in CALLS {
        let said = terminal.run(command).fails(UNREACHABLE);
        assert!(
            said.contains(&format!("127.0.0.1:{port}")) && said.contains("make run"),
            "{command}: {said}"
        );
    }
    let said = terminal
        .run("MPOOL_REDIS_CLI=no-such-cli shell/sync-slots.sh")
        .fails(UNREACHABLE);
    assert!(said.contains("no-such-cli"), "{said}");
}

#[test]
fn a_redis_without_the_module_ends_in_4() {
    let server = Options {
        bare: true,
        ..Options::default()
    }
    .start();
    let terminal = Terminal::of(&server);
    for command in CALLS {
        let said = terminal.run(command).fails(NO_MODULE);
        assert!(
            said.contains("no mpool module") && said.contains("make run"),
            "{command}: {said}"
        );
    }
}

#[test]
fn a_hung_redis_is_given_up_in_time() {
    // Connections are taken, and never answered.
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let terminal = Terminal::at(listener.local_addr().unwrap().port()).env("MPOOL_TIMEOUT", "1");
    std::thread::scope(|scope| {
        for command in CALLS {
            let terminal = &terminal;
            scope.spawn(move || {
                let start = Instant::now();
                let said = terminal.run(command).fails(UNREACHABLE);
                assert!(said.contains("no answer within 1 s"), "{command}: {said}");
                assert!(
                    start.elapsed() < Duration::from_secs(20),
                    "{command}: {:?}",
                    start.elapsed()
                );
            });
        }
    });
}

#[test]
fn something_else_on_the_port_is_told_from_redis() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let terminal = Terminal::at(listener.local_addr().unwrap().port());
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.read(&mut [0; 512]);
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n");
        }
    });
    let said = terminal.run("shell/pool-status.sh").fails(UNREACHABLE);
    assert!(said.contains("does not answer like Redis"), "{said}");
}

#[test]
fn a_password_goes_by_the_environment_and_onto_no_command_line() {
    let password = "correct horse $(battery) 'staple'";
    let server = Options::default()
        .accounts(&["one"])
        .server(&["--requirepass", password])
        .start();
    let open = Terminal::of(&server);
    for command in CALLS {
        let said = open.run(command).fails(UNREACHABLE);
        assert!(
            said.contains("asks for a password") && said.contains("MPOOL_REDIS_PASSWORD"),
            "{command}: {said}"
        );
    }
    let wrong = Terminal::of(&server).env("MPOOL_REDIS_PASSWORD", "wrong");
    for command in CALLS {
        let said = wrong.run(command).fails(UNREACHABLE);
        assert!(said.contains("refused the login"), "{command}: {said}");
    }
    let right = Terminal::of(&server).env("MPOOL_REDIS_PASSWORD", password);
    let key = key_in(&right.run("shell/medium.sh").ok());
    for command in [
        "pool-status.sh",
        "sync-slots.sh",
        &format!("release.sh {key}"),
        &format!("revoke.sh {key}"),
    ] {
        let outcome = right.run(&format!("shell/{command}"));
        assert_eq!(outcome.stderr, "", "{command}");
        outcome.ok();
    }
    let lines = right.command_lines();
    assert!(lines.contains("MPOOL.REPAIR"), "{lines}");
    assert!(!lines.contains("staple"), "{lines}");
    // Client keys stay off redis-cli's command line as well.
    assert!(!lines.contains(&key), "{lines}");
}

#[test]
fn an_acl_user_can_be_named() {
    let (server, mut client, _) = pool_of(&["one"]);
    client.ok(&[
        "ACL",
        "SETUSER",
        "keys",
        "on",
        ">pw",
        "-@all",
        "+mpool.keygen",
        "+mpool.status",
    ]);
    let terminal = Terminal::of(&server)
        .env("MPOOL_REDIS_USER", "keys")
        .env("MPOOL_REDIS_PASSWORD", "pw");
    key_in(&terminal.run("shell/medium.sh").ok());
    let said = terminal.run("shell/sync-slots.sh").fails(REFUSED);
    assert!(said.contains("NOPERM"), "{said}");
}

#[test]
fn revoke_and_release_say_which_slot_is_free_and_may_be_repeated() {
    let (_server, mut client, terminal) = pool_of(&["one"]);
    let (first, second) = (holder(&mut client), holder(&mut client));
    assert_eq!(client.slots("one"), Some(2));
    let printed = terminal.run(&format!("shell/release.sh {first}")).ok();
    assert!(printed.contains("one"), "{printed}");
    assert_eq!(client.slots("one"), Some(1));
    terminal.run(&format!("shell/release.sh {first}")).ok();

    // The second is typed where no history keeps it.
    let printed = terminal
        .run(&format!("echo {second} | shell/revoke.sh -"))
        .ok();
    assert!(printed.contains("one"), "{printed}");
    assert_eq!(client.slots("one"), Some(0));
    assert_eq!(
        record(&mut client, &second, "active").as_deref(),
        Some("false")
    );
    terminal.run(&format!("shell/revoke.sh {second}")).ok();
    assert!(
        client
            .error(&["MPOOL.ACQUIRE", &second, "*"])
            .starts_with("REVOKED")
    );
    // The first was released, not revoked.
    assert_eq!(client.acquire(&first, 0).state, "assigned");
    terminal
        .run(&format!("echo {first} | shell/release.sh -"))
        .ok();
}

#[test]
fn sync_slots_says_that_all_is_well_and_puts_right_what_is_not() {
    let (_server, mut client, terminal) = pool_of(&["one", "two"]);
    let key = holder(&mut client);
    assert!(
        terminal
            .run("shell/sync-slots.sh")
            .ok()
            .contains("nothing had to be changed")
    );
    // The module's watcher may be faster than the script; the outcome is the same.
    client.ok(&["SET", "medium_pool:slots:one", "77"]);
    client.ok(&["DEL", "medium_pool:slots:two"]);
    terminal.run("shell/sync-slots.sh").ok();
    client.check_invariants(2);
    client.check_repair();
    assert_eq!(
        client.slots("one").unwrap() + client.slots("two").unwrap(),
        1
    );
    terminal.run(&format!("shell/revoke.sh {key}")).ok();
}

#[test]
fn sync_slots_tells_what_was_put_right() {
    let terminal = Terminal::at(free_port()).env("MPOOL_REDIS_CLI", "answering");
    let answering =
        |reply: &str| terminal.install("answering", &format!("#!/bin/bash\nprintf '{reply}'\n"));
    answering(r"changed\n6\ncounters\n1\nleases\n2\nview\n3\n");
    let printed = terminal.run("shell/sync-slots.sh").ok();
    let words: Vec<&str> = printed.split_whitespace().collect();
    assert_eq!(
        words,
        [
            "Put", "right:", "6", "slot", "counters", "1", "leases", "2", "view", "3"
        ]
    );
    answering(r"changed\n0\nother\n");
    let said = terminal.run("shell/sync-slots.sh").fails(REFUSED);
    assert!(said.contains("different versions"), "{said}");
}

#[test]
fn pool_status_shows_each_state_of_an_account() {
    let options = Options::default()
        .accounts(&["a-free", "b-busy", "c-cooling"])
        .file(
            "medium/d-expired",
            r#"{"api_key": "x", "expires_at": 1755266400000}"#,
        )
        .file("medium/e-broken", r#"{"api_key": 5}"#)
        .file("medium/bad name", r#"{"api_key": "x"}"#)
        .file("high/high-one", &bearer("high-one"));
    let (server, mut client, terminal) = start(options);
    client.ok(&[
        "MPOOL.COOLDOWN",
        "medium",
        "c-cooling",
        "*",
        "600000",
        "REASON",
        "the upstream answered 429",
    ]);
    client.ok(&["MPOOL.COOLDOWN", "medium", "a-free", "*", "1000000"]);
    let first = holder(&mut client);
    let second = holder(&mut client);
    let masked = |key: &str| format!("{}...{}", &key[..14], &key[key.len() - 4..]);
    client.ok(&["MPOOL.COOLDOWN", "medium", "a-free", "*", "0"]);
    wait_for("the broken file's verdict", || {
        format!("{:?}", client.run::<redis::Value>(&["MPOOL.STATUS"]))
            .contains("e-broken")
            .then_some(())
    });

    let printed = terminal.run("shell/pool-status.sh").ok();
    let line = |name: &str| {
        let found = printed
            .lines()
            .find(|line| line.trim_start().starts_with(name));
        found
            .unwrap_or_else(|| panic!("no {name}: {printed}"))
            .to_owned()
    };
    for (name, parts) in [
        ("a-free", &["░░", "0/2", "available"][..]),
        ("b-busy", &["██", "2/2", "full"]),
        (
            "c-cooling",
            &["0/2", "cooling down until 2", "the upstream answered 429"],
        ),
        ("d-expired", &["token expired", "2025-08-15 14:00 UTC"]),
        (
            "e-broken",
            &["invalid file: access_token or api_key is not a token"],
        ),
        ("medium/bad", &["its name must be"]),
        ("high-one", &["available"]),
        (
            "MEDIUM",
            &["4 accounts", "2 of 8 slots in use (25 %)", "2 free"],
        ),
        (&masked(&first), &["in 23 h 59 m", "b-busy"]),
        (&masked(&second), &["in 23 h 59 m", "b-busy"]),
    ] {
        let line = line(name);
        for part in parts {
            assert!(line.contains(part), "{name} without {part}: {line}");
        }
    }
    assert!(
        !printed.contains(&first) && !printed.contains(&second),
        "a client key shows"
    );
    assert!(!printed.contains("token-of-"), "a token shows");

    client.ok(&["MPOOL.RELEASE", &first]);
    let printed = terminal.run("shell/pool-status.sh").ok();
    assert!(printed.contains("█░  1/2  partial"), "{printed}");
    // Where there is no UTF-8 it is drawn in plain characters.
    let plain = Terminal::of(&server)
        .env("LC_ALL", "C")
        .run("shell/pool-status.sh")
        .ok();
    assert!(
        plain.contains("[#.]  1/2  partial") && plain.is_ascii(),
        "{plain}"
    );
}

#[test]
fn pool_status_of_one_tier_shows_that_tier() {
    let options = Options::default()
        .accounts(&["one"])
        .file("high/high-one", &bearer("high-one"));
    let (_server, _client, terminal) = start(options);
    for (tier, shown, other) in [
        ("medium", "one", "HIGH"),
        ("high", "high-one", "MEDIUM"),
        ("supreme", "no account yet", "MEDIUM"),
    ] {
        let printed = terminal.run(&format!("shell/pool-status.sh {tier}")).ok();
        assert!(
            printed.contains(&tier.to_uppercase()) && printed.contains(shown),
            "{printed}"
        );
        assert!(!printed.contains(other), "{printed}");
    }
    let all = terminal.run("shell/pool-status.sh").ok();
    assert!(
        all.contains("MEDIUM") && all.contains("HIGH") && !all.contains("SUPREME"),
        "{all}"
    );
}

#[test]
fn pool_status_without_any_account_says_what_to_do() {
    let (_server, _client, terminal) = pool_of(&[]);
    let printed = terminal.run("shell/pool-status.sh").ok();
    assert!(
        printed.contains("account/medium/") && printed.contains("no key holds a lease"),
        "{printed}"
    );
}

#[test]
fn pool_status_is_coloured_on_a_terminal_alone() {
    let (_server, mut client, terminal) = pool_of(&["one"]);
    holder(&mut client);
    let piped = terminal
        .run("TERM=xterm shell/pool-status.sh; TERM=xterm shell/pool-status.sh | cat")
        .ok();
    assert!(!piped.contains('\x1b'), "{piped:?}");
    program("script");
    let on_terminal = |set: &str| {
        terminal
            .run(&format!("{set} script -qec shell/pool-status.sh /dev/null"))
            .ok()
    };
    assert!(on_terminal("TERM=xterm").contains("\x1b["));
    assert!(!on_terminal("TERM=xterm NO_COLOR=1").contains('\x1b'));
    assert!(!on_terminal("TERM=dumb").contains('\x1b'));
}

#[test]
fn pool_status_w_shows_the_pool_again_and_again() {
    let (_server, mut client, terminal) = pool_of(&["one"]);
    let watching = "shell/pool-status.sh -w 0.1 >frames & \
        until [[ -s frames ]]; do sleep 0.05; done; touch seen; \
        until [[ $(grep -c '1 of 2 slots' frames) -ge 2 ]]; do sleep 0.05; done; kill -TERM $!; wait $!";
    std::thread::scope(|scope| {
        let outcome = scope.spawn(|| terminal.run(watching));
        let seen = terminal.folder().join("seen");
        wait_for("the first picture", || seen.exists().then_some(()));
        holder(&mut client);
        assert_eq!(outcome.join().unwrap().code, 143);
    });
    let frames = std::fs::read_to_string(terminal.folder().join("frames")).unwrap();
    assert!(frames.contains("0 of 2 slots"), "{frames}");
    assert!(!frames.contains('\x1b'));
    // What never worked is no passing trouble.
    terminal
        .run("MPOOL_REDIS_PORT=1 shell/pool-status.sh -w")
        .fails(UNREACHABLE);
}

#[test]
fn pool_status_is_right_at_2_accounts() {
    let (_server, mut client, terminal) = pool_of(&["one", "two"]);
    for _ in 0..3 {
        holder(&mut client);
    }
    let printed = terminal.run("shell/pool-status.sh").ok();
    assert!(
        printed.contains("2 accounts") && printed.contains("3 of 4 slots in use (75 %) · 1 free"),
        "{printed}"
    );
    assert_eq!(printed.matches("sk-cli-v1-").count(), 3, "{printed}");
}

#[test]
fn pool_status_is_right_at_2000_accounts() {
    const ACCOUNTS: usize = 2_000;
    const HOLDERS: usize = 2_500;
    let names: Vec<String> = (0..ACCOUNTS)
        .map(|number| format!("account-{number:04}"))
        .collect();
    let options =
        Options::default().accounts(&names.iter().map(String::as_str).collect::<Vec<_>>());
    let (_server, mut client, terminal) = start(options);
    wait_for("all accounts", || {
        let keys: Vec<String> = client.run(&["KEYS", "medium_pool:slots:*"]);
        (keys.len() == ACCOUNTS).then_some(())
    });
    for _ in 0..HOLDERS {
        holder(&mut client);
    }

    let start = Instant::now();
    let outcome = terminal.run("shell/pool-status.sh");
    let took = start.elapsed();
    assert_eq!(outcome.stderr, "");
    let printed = outcome.ok();
    assert!(took < Duration::from_secs(40), "{took:?}");
    for part in [
        "2,000 accounts",
        "2,500 of 4,000 slots in use (63 %)",
        "1,500 free",
    ] {
        assert!(printed.contains(part), "{}", &printed[..400]);
    }
    let rows: Vec<&str> = printed
        .lines()
        .filter(|line| line.trim_start().starts_with("account-"))
        .collect();
    let shown: Vec<&str> = rows
        .iter()
        .map(|row| row.split_whitespace().next().unwrap())
        .collect();
    assert_eq!(shown, names, "each account once, by name");
    let used: usize = rows.iter().map(|row| row.matches('█').count()).sum();
    assert_eq!(used, HOLDERS);
    assert_eq!(printed.matches("sk-cli-v1-").count(), HOLDERS);
    assert!(!printed.contains('\x1b'));

    let some = terminal.run("shell/pool-status.sh -l 3").ok();
    assert_eq!(some.matches("sk-cli-v1-").count(), 3);
    assert!(
        some.contains("and 2,497 more"),
        "{}",
        &some[some.len() - 200..]
    );
}
