//! Bad input in every place of every command, and wrong types at every key of
//! the pool: an error that repeats nothing, no change, a server that lives on.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop anywhere"
)]

mod support;

use redis::Value;
use std::collections::BTreeMap;
use support::*;

/// A piece of each bad value that no honest text of the server has in it.
const MARK: &str = "zZqQ";

fn bad_values() -> Vec<(&'static str, Vec<u8>)> {
    let mut values = vec![
        ("nothing", b"".to_vec()),
        ("a blank", b" ".to_vec()),
        ("a huge number", b"99999999999999999999999999".to_vec()),
        ("more than 64 bits", b"9223372036854775808".to_vec()),
        ("the largest number", b"9223372036854775807".to_vec()),
        ("the smallest number", b"-9223372036854775808".to_vec()),
        ("a negative number", b"-1".to_vec()),
        ("a signed number", b"+1".to_vec()),
        ("a number with a blank", b"1 ".to_vec()),
        ("a fraction", b"1.5".to_vec()),
        ("an exponent", b"1e3".to_vec()),
        ("hexadecimal", b"0x10".to_vec()),
        ("not a number", b"nan".to_vec()),
        ("digits of another script", "１２".as_bytes().to_vec()),
        ("NUL", b"\0".to_vec()),
        ("a line's end", b"zZqQ\r\n+OK\r\n".to_vec()),
        ("not UTF-8", b"\xff\xfezZqQ".to_vec()),
        ("a format", b"%s%n%s%n".to_vec()),
        ("U+4E00", "一".as_bytes().to_vec()),
        ("a path", b"../../zZqQ".to_vec()),
        ("a name with a NUL", b"zZqQ\0zZqQ".to_vec()),
        ("an escape", b"\x1b[31mzZqQ".to_vec()),
        ("a long name", vec![b'z'; 257]),
        ("a pattern", b"*".to_vec()),
    ];
    values.push(("1 MB", MARK.as_bytes().repeat(256 * 1024)));
    values
}

/// What the server may begin an error with.
const CODES: [&str; 9] = [
    "NOKEY",
    "REVOKED",
    "EXPIRED",
    "POOLFULL",
    "NOACCOUNT",
    "NOTOKEN",
    "CLOCKSKEW",
    "ERR",
    "WRONGTYPE",
];

/// Each command with every argument it takes, all of them good. `<key>`
/// stands for a registered key.
const COMMANDS: &[&[&str]] = &[
    &["MPOOL.ACQUIRE", "<key>", "1000", "WITHTOKEN"],
    &["MPOOL.RELEASE", "<key>", "1000"],
    &["MPOOL.STATUS", "NOW", "1000"],
    &[
        "MPOOL.STATUS",
        "ACCOUNTS",
        "medium",
        "NOW",
        "1000",
        "CURSOR",
        "0",
        "COUNT",
        "10",
    ],
    &[
        "MPOOL.STATUS",
        "LEASES",
        "medium",
        "NOW",
        "1000",
        "CURSOR",
        "0",
        "COUNT",
        "10",
    ],
    &["MPOOL.STATUS", "KEY", "<key>", "NOW", "1000"],
    &[
        "MPOOL.KEYGEN",
        "medium",
        "POOL",
        "DAYS",
        "30",
        "NAME",
        "label",
        "NOW",
        "1000",
    ],
    &["MPOOL.KEYGEN", "medium", "a", "DAYS", "30"],
    &["MPOOL.REVOKE", "<key>"],
    &[
        "MPOOL.COOLDOWN",
        "medium",
        "a",
        "1000",
        "1000",
        "REASON",
        "text",
    ],
    &["MPOOL.RELOAD"],
    &["MPOOL.REPAIR"],
];

/// Whether the value is one that the command takes in that place.
fn is_legal(words: &[&str], place: usize, value: &[u8]) -> bool {
    let text = std::str::from_utf8(value).ok();
    let number = text
        .filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))
        .and_then(|text| text.parse::<i64>().ok());
    match (words[0], place, words[place - 1]) {
        (_, _, "NAME" | "REASON") => {
            text.is_some_and(|text| text.len() <= 256 && !text.chars().any(char::is_control))
        }
        // `*` is the server's clock.
        ("MPOOL.ACQUIRE" | "MPOOL.RELEASE", 2, _) | ("MPOOL.COOLDOWN", 3, _) | (_, _, "NOW") => {
            value == b"*" || number.is_some_and(|number| number <= 253_402_300_799_999)
        }
        _ => false,
    }
}

#[test]
fn bad_values_in_every_place_of_every_command() {
    let mut server = Options::default().accounts(&["a"]).start();
    let mut client = server.connect();
    let key = client.pool_key();
    client.acquire(&key, 1000);
    let mut count = 0;
    for words in COMMANDS {
        for place in 1..words.len() {
            for (what, value) in bad_values() {
                if is_legal(words, place, &value) {
                    continue;
                }
                let mut command: Vec<&[u8]> = words.iter().map(|word| word.as_bytes()).collect();
                for word in &mut command {
                    if *word == b"<key>" {
                        *word = key.as_bytes();
                    }
                }
                command[place] = &value;
                check_refused(
                    &mut client,
                    &command,
                    &value,
                    &format!("{words:?} with {what} at {place}"),
                );
                count += 1;
            }
        }
    }
    println!("{count} commands");
    assert!(server.is_alive());
    let log = server.log();
    assert!(
        !log.contains(MARK) && !log.contains("%n") && !log.contains('一'),
        "{log}"
    );
    assert_eq!(client.acquire(&key, 1001).state, "current");
    client.check_invariants(2);
    client.check_repair();
}

/// The command must be refused by a known code, repeating nothing and writing
/// nothing.
#[track_caller]
fn check_refused(client: &mut Client, command: &[&[u8]], value: &[u8], what: &str) {
    let before = client.traces();
    match client.try_bytes::<Value>(command) {
        Ok(reply) => panic!("{what} was taken: {reply:?}"),
        Err(error) => {
            let code = error.code().unwrap_or_else(|| panic!("{what}: {error}"));
            assert!(CODES.contains(&code), "{what}: {error}");
            let text = format!("{code} {}", error.detail().unwrap_or_default());
            let repeated = String::from_utf8_lossy(value);
            let distinctive =
                repeated.len() > 3 && !repeated.bytes().all(|byte| byte.is_ascii_digit());
            assert!(
                !distinctive || !text.contains(&*repeated),
                "{what} is repeated: {text}"
            );
            assert!(
                !text.contains(MARK) && !text.contains("internal error"),
                "{what}: {text}"
            );
        }
    }
    assert_eq!(client.traces(), before, "{what} wrote something");
}

#[test]
fn wrong_counts_of_arguments() {
    let mut server = Options::default().accounts(&["a"]).start();
    let mut client = server.connect();
    let key = client.pool_key();
    client.acquire(&key, 1000);
    let none: &[&[&str]] = &[
        &["MPOOL.ACQUIRE"],
        &["MPOOL.RELEASE"],
        &["MPOOL.KEYGEN"],
        &["MPOOL.REVOKE"],
        &["MPOOL.COOLDOWN"],
    ];
    for words in none {
        client.refused("ERR", words);
    }
    for words in COMMANDS {
        let mut words: Vec<&str> = words.to_vec();
        for word in &mut words[1..] {
            if *word == "<key>" {
                *word = &key;
            }
        }
        // One argument and many too many.
        for extra in [1, 2, 1000] {
            let more = [&words[..], &vec!["more"; extra]].concat();
            client.refused("ERR", &more);
        }
        // An option without its value.
        if words.len() > 4 {
            client.refused("ERR", &words[..words.len() - 1]);
        }
    }
    assert!(server.is_alive());
}

#[test]
fn odd_but_legal_values_are_handled_right() {
    let server = Options::default().accounts(&["a"]).start();
    let mut client = server.connect();
    let longest = "k".repeat(256);
    // What the start of a server writes is written by then.
    client.pool_key();
    // In the shape of a key, but not registered.
    for key in ["%s%n", "*", "{}", "a:b", "'\"\\", "0", &longest] {
        for words in [
            &["MPOOL.ACQUIRE", key, "1000"][..],
            &["MPOOL.RELEASE", key],
            &["MPOOL.REVOKE", key],
            &["MPOOL.STATUS", "KEY", key],
        ] {
            client.refused("NOKEY", words);
        }
        // Registered by hand they are keys like any other.
        client.ok(&[
            "HSET",
            &format!("client_keys:{key}"),
            "tier",
            "medium",
            "use_pool",
            "true",
        ]);
        assert_eq!(client.acquire(key, 1000).account, "a");
        client.ok(&["MPOOL.STATUS", "KEY", key]);
        assert_eq!(text(&client.map(&["MPOOL.RELEASE", key])["account"]), "a");
        client.ok(&["MPOOL.REVOKE", key]);
    }
    for label in ["%s%n", "一", "", " ", &"x".repeat(256)] {
        let key = text(&client.map(&["MPOOL.KEYGEN", "medium", "POOL", "NAME", label])["key"]);
        let shown = client.map(&["MPOOL.STATUS", "KEY", &key]);
        assert_eq!(optional_text(&shown["name"]).unwrap_or_default(), label);
        client.ok(&[
            "MPOOL.COOLDOWN",
            "medium",
            "a",
            "1000",
            "1000",
            "REASON",
            label,
        ]);
        let row = client.account_status("a", 1000).unwrap();
        assert_eq!(optional_text(&row["reason"]).unwrap_or_default(), label);
    }
    client.ok(&["MPOOL.COOLDOWN", "medium", "a", "1000", "0"]);
    // Words in any case, tiers too.
    let key = text(
        &client.map(&[
            "mpool.keygen",
            "Medium",
            "Pool",
            "days",
            "1",
            "Name",
            "x",
            "now",
            "0",
        ])["key"],
    );
    client.ok(&["mpool.acquire", &key, "0", "WithToken"]);
    client.check_invariants(2);
    client.check_repair();
}

#[test]
fn accounts_files_with_odd_names_are_listed_safely() {
    use std::os::unix::ffi::OsStrExt;
    let mut server = Options::default().accounts(&["a"]).start();
    let mut client = server.connect();
    let long = "x".repeat(200);
    let names: [&[u8]; 7] = [
        b"%s%n",
        "一".as_bytes(),
        b"\xff\xfe",
        b"a b",
        b"c\nd",
        b"e:f",
        long.as_bytes(),
    ];
    for name in names {
        let file = [name, b".json"].concat();
        std::fs::write(
            server
                .account_dir()
                .join("medium")
                .join(std::ffi::OsStr::from_bytes(&file)),
            bearer("x"),
        )
        .unwrap();
    }
    let reload = client.map(&["MPOOL.RELOAD"]);
    let reasons = named_reasons(&reload["invalid"]);
    assert_eq!(reasons.len(), names.len(), "{reasons:?}");
    assert!(
        reasons
            .values()
            .all(|reason| reason.contains("A-Z a-z 0-9")),
        "{reasons:?}"
    );
    assert_eq!(client.invalid_files().len(), names.len());
    let key = client.pool_key();
    assert_eq!(client.acquire(&key, 1000).account, "a");
    assert_eq!(client.pages("ACCOUNTS", "medium", "10").len(), 1);
    assert!(server.is_alive());
    for name in names {
        let file = [name, b".json"].concat();
        std::fs::remove_file(
            server
                .account_dir()
                .join("medium")
                .join(std::ffi::OsStr::from_bytes(&file)),
        )
        .unwrap();
    }
    client.ok(&["MPOOL.RELOAD"]);
    assert_eq!(client.invalid_files().len(), 0);
    client.check_repair();
}

/// Puts a value of another type at a key.
fn spoil(client: &mut Client, kind: &str, name: &str) {
    let mut pipe = redis::pipe();
    pipe.atomic();
    pipe.cmd("DEL").arg(name).ignore();
    let words: &[&str] = match kind {
        "string" => &["SET", name, "text"],
        "list" => &["RPUSH", name, "text"],
        "set" => &["SADD", name, "text"],
        "hash" => &["HSET", name, "text", "text"],
        "stream" => &["XADD", name, "*", "text", "text"],
        _ => &["ZADD", name, "1", "text"],
    };
    let mut command = redis::cmd(words[0]);
    command.arg(&words[1..]);
    pipe.add_command(command).ignore();
    pipe.exec(&mut client.connection).unwrap();
}

#[test]
fn wrong_types_at_the_pools_keys() {
    let kinds = ["string", "list", "set", "hash", "stream", "zset"];
    let mut server = Options::default().accounts(&["a", "b", "c"]).start();
    let mut client = server.connect();
    let healthy = client.pool_key();
    let account = client.acquire(&healthy, 1000).account;
    // An account that it doesn't hold.
    let victim = if account == "a" { "b" } else { "a" };
    for kind in kinds {
        // A key's record.
        let key = client.pool_key();
        client.acquire(&key, 1000);
        let record = format!("client_keys:{key}");
        spoil(&mut client, kind, &record);
        let error = client.try_acquire(&key, 1001).unwrap_err();
        assert!(
            ["ERR", "WRONGTYPE"].contains(&error.split(' ').next().unwrap()),
            "{kind}: {error}"
        );
        assert_eq!(client.holds(&key), None, "{kind}: its slot is given up");
        client.check_invariants(2);
        client.check_repair();
        if kind != "hash" {
            client.refused("ERR", &["MPOOL.REVOKE", &key]);
        }
        client.ok(&["MPOOL.RELEASE", &key]);
        client.ok(&["MPOOL.STATUS", "KEY", &key]);
        client.ok(&["DEL", &record]);

        // A lease.
        let key = client.pool_key();
        let account = client.acquire(&key, 1000).account;
        let used = client.slots(&account).unwrap();
        let lease = format!("key_rotation:{key}");
        spoil(&mut client, kind, &lease);
        if kind == "hash" {
            assert_eq!(client.acquire(&key, 1001).state, "assigned");
        } else {
            let _ = client.try_acquire(&key, 1001);
            assert_eq!(
                client.slots(&account),
                Some(used - 1),
                "{kind}: nothing is counted that isn't there"
            );
            client.refused("WRONGTYPE", &["MPOOL.ACQUIRE", &key, "1001"]);
            assert_eq!(client.run::<String>(&["TYPE", &lease]), kind);
            client.ok(&["MPOOL.STATUS", "KEY", &key]);
            client.ok(&["MPOOL.RELEASE", &key]);
        }
        client.ok(&["MPOOL.REVOKE", &key]);
        client.check_invariants(2);
        client.check_repair();

        // An account's counter, cooldown and reason.
        for what in ["slots", "cooldown", "cooldown_reason"] {
            let name = format!("medium_pool:{what}:{victim}");
            spoil(&mut client, kind, &name);
            assert_eq!(
                client.acquire(&healthy, 1001).state,
                "current",
                "{kind} at {name}"
            );
            client.ok(&["MPOOL.STATUS"]);
            client.check_invariants(2);
            client.check_repair();
            assert_eq!(
                client.acquire(&healthy, 1001).state,
                "current",
                "{kind} at {name}"
            );
            client.ok(&["MPOOL.COOLDOWN", "medium", victim, "1001", "0"]);
            client.ok(&[
                "MPOOL.COOLDOWN",
                "medium",
                victim,
                "0",
                "1",
                "REASON",
                "text",
            ]);
            client.check_invariants(2);
            client.check_repair();
        }
        // The rest of the pool works.
        let key = client.pool_key();
        assert_eq!(client.acquire(&key, 1001).state, "assigned", "{kind}");
        client.ok(&["MPOOL.REVOKE", &key]);
    }
    // The same once more with a restart of the view from such keys.
    for (kind, name) in kinds.iter().zip([
        "client_keys:x",
        "key_rotation:y",
        "high_pool:slots:x",
        "medium_pool:cooldown:b",
        "key_rotation:z",
        "client_keys:z",
    ]) {
        spoil(&mut client, kind, name);
    }
    client.ok(&["DEBUG", "RELOAD"]);
    let _ = client.try_acquire("nobody", 1);
    client.check_repair();
    client.check_invariants(2);
    assert_eq!(client.acquire(&healthy, 1001).state, "current");
    assert!(server.is_alive());
}

#[test]
fn one_spoilt_lease_does_not_stop_a_sweep() {
    let server = Options::default().accounts(&["a"]).start();
    let mut client = server.connect();
    let keys: Vec<String> = (0..3).map(|_| client.pool_key()).collect();
    client.acquire(&keys[0], 1000);
    client.acquire(&keys[1], 1000);
    spoil(&mut client, "list", &format!("key_rotation:{}", keys[0]));
    // One slot is overdue, the other one's lease is spoilt.
    assert_eq!(client.acquire(&keys[2], 1000 + DAY).account, "a");
    client.check_invariants(2);
    client.check_repair();
}

#[test]
fn very_large_and_odd_fields_in_the_pools_hashes() {
    let mut server = Options::default().accounts(&["a", "b"]).start();
    let mut client = server.connect();
    let key = client.pool_key();
    let fields = [
        ("client_keys", "tier"),
        ("client_keys", "use_pool"),
        ("client_keys", "active"),
        ("client_keys", "expires_at"),
        ("client_keys", "account_name"),
        ("client_keys", "created_at"),
        ("client_keys", "name"),
        ("key_rotation", "account"),
        ("key_rotation", "next_rotation"),
        ("key_rotation", "last_rotation"),
        ("key_rotation", "previous_account"),
    ];
    for (kind, field) in fields {
        let name = format!("{kind}:{key}");
        for (what, value) in bad_values() {
            let before: BTreeMap<String, String> =
                client.run(&["HGETALL", &format!("client_keys:{key}")]);
            client.acquire(&key, 1000);
            client
                .try_bytes::<Value>(&[b"HSET", name.as_bytes(), field.as_bytes(), &value])
                .unwrap();
            let outcome = client.try_acquire(&key, 1001);
            if let Err(error) = &outcome {
                let code = error.split(' ').next().unwrap();
                assert!(
                    CODES.contains(&code) && !error.contains(MARK),
                    "{kind} {field} {what}: {error}"
                );
                assert_eq!(kind, "client_keys", "{field} {what}: {error}");
            }
            let shown = client.try_bytes::<Value>(&[b"MPOOL.STATUS", b"KEY", key.as_bytes()]);
            assert!(shown.is_ok(), "{kind} {field} {what}: {shown:?}");
            client.check_invariants(2);
            if kind == "client_keys" {
                client.ok(&["DEL", &name]);
                for (field, value) in &before {
                    client.ok(&["HSET", &name, field, value]);
                }
            } else {
                client.ok(&["DEL", &name]);
            }
        }
        client.acquire(&key, 1000);
        client.check_repair();
    }
    assert!(server.is_alive());
    assert!(!server.log().contains(MARK), "{}", server.log());
}
