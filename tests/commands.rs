//! Each command against a real server: its reply, its errors, its
//! documentation, its settings, and what the server's own logs show of it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop anywhere"
)]

mod support;

use redis::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::process::{Command, Stdio};
use support::*;

const COMMANDS: [&str; 8] = [
    "mpool.acquire",
    "mpool.release",
    "mpool.status",
    "mpool.keygen",
    "mpool.revoke",
    "mpool.cooldown",
    "mpool.reload",
    "mpool.repair",
];

#[test]
fn replies_are_maps_or_flat_arrays_with_their_fields_in_order() {
    let server = Options::default()
        .accounts(&["a", "b"])
        .file("high/h", &bearer("h"))
        .file("medium/broken", "{")
        .start();
    let tier = "accounts slots used free cooling_down invalid leases next_due expired missing";
    let account = "account tier used slots state reason until";
    let lease = "key tier account next_rotation last_rotation previous_account";
    for protocol in [2, 3] {
        let mut client = if protocol == 2 {
            server.connect()
        } else {
            server.connect3()
        };
        let mut check = |words: &[&str], expected: &str| {
            let reply: Value = client.run(words);
            let is_map = matches!(reply, Value::Map(_));
            assert_eq!(
                is_map,
                protocol == 3,
                "{words:?} by RESP{protocol}: {reply:?}"
            );
            assert_eq!(
                names(&reply).join(" "),
                expected,
                "{words:?} by RESP{protocol}"
            );
            reply
        };
        let keygen = check(
            &["MPOOL.KEYGEN", "medium", "POOL", "NOW", "1000"],
            "key tier account expires_at",
        );
        let key = text(&by_name(&keygen)["key"]);
        let lent = "account state previous_account last_rotation next_rotation";
        check(&["MPOOL.ACQUIRE", &key, "1000"], lent);
        check(
            &["MPOOL.ACQUIRE", &key, "1000", "withtoken"],
            &format!("{lent} token auth"),
        );
        let whole = check(
            &["MPOOL.STATUS"],
            "now medium high supreme accounts leases invalid_files",
        );
        let whole = by_name(&whole);
        for name in ["medium", "high", "supreme"] {
            assert_eq!(names(&whole[name]).join(" "), tier);
        }
        assert_eq!(names(&items(&whole["accounts"])[0]).join(" "), account);
        assert_eq!(names(&items(&whole["leases"])[0]).join(" "), lease);
        assert_eq!(
            names(&items(&whole["invalid_files"])[0]).join(" "),
            "tier file reason"
        );
        let page = check(&["MPOOL.STATUS", "ACCOUNTS", "medium"], "accounts cursor");
        assert_eq!(
            names(&items(&by_name(&page)["accounts"])[0]).join(" "),
            account
        );
        let page = check(&["MPOOL.STATUS", "LEASES", "medium"], "leases cursor");
        assert_eq!(names(&items(&by_name(&page)["leases"])[0]).join(" "), lease);
        check(
            &["MPOOL.STATUS", "KEY", &key],
            "key tier state account previous_account last_rotation next_rotation created_at expires_at name flaw",
        );
        check(
            &["MPOOL.COOLDOWN", "medium", "b", "1000", "0"],
            "account until freed",
        );
        check(&["MPOOL.RELEASE", &key], "account");
        check(&["MPOOL.REVOKE", &key], "account");
        let reload = check(
            &["MPOOL.RELOAD"],
            "added removed invalid unreadable exposed",
        );
        assert_eq!(
            names(&items(&by_name(&reload)["invalid"])[0]).join(" "),
            "tier file reason"
        );
        check(&["MPOOL.REPAIR"], "changed counters leases view");
    }
}

fn by_name(reply: &Value) -> BTreeMap<String, Value> {
    redis::from_redis_value_ref(reply).unwrap()
}

fn items(list: &Value) -> Vec<Value> {
    redis::from_redis_value_ref(list).unwrap()
}

#[test]
fn acquire_answers_the_lease_and_the_token_only_when_asked() {
    let server = Options::default()
        .accounts(&["a"])
        .file("high/h", r#"{"apiKey": "key-of-h"}"#)
        .start();
    for mut client in [server.connect(), server.connect3()] {
        let key = client.pool_key();
        let lease = client.map(&["MPOOL.ACQUIRE", &key, "5000"]);
        assert_eq!(text(&lease["account"]), "a");
        assert_eq!(text(&lease["state"]), "assigned");
        assert_eq!(lease["previous_account"], Value::Nil);
        assert_eq!(lease["last_rotation"], Value::Int(5000));
        assert_eq!(lease["next_rotation"], Value::Int(5000 + DAY));
        let lease = client.map(&["MPOOL.ACQUIRE", &key, "5001", "WITHTOKEN"]);
        assert_eq!(text(&lease["state"]), "current");
        assert_eq!(text(&lease["token"]), "token-of-a");
        assert_eq!(text(&lease["auth"]), "bearer");

        let bound = client.bound_key("high/h");
        let lease = client.map(&["MPOOL.ACQUIRE", &bound, "5000", "WITHTOKEN"]);
        assert_eq!(text(&lease["account"]), "h");
        assert_eq!(text(&lease["state"]), "bound");
        assert_eq!(text(&lease["token"]), "key-of-h");
        assert_eq!(text(&lease["auth"]), "x-api-key");
        for nothing in ["previous_account", "last_rotation", "next_rotation"] {
            assert_eq!(lease[nothing], Value::Nil, "{nothing}");
        }
    }
}

#[test]
fn a_star_is_the_servers_clock() {
    let server = Options::default().accounts(&["a"]).start();
    let mut client = server.connect();
    let key = client.pool_key();
    let clock = |client: &mut Client| {
        let (seconds, micros): (i64, i64) = client.run(&["TIME"]);
        seconds * 1000 + micros / 1000
    };
    let before = clock(&mut client);
    let lease = client.map(&["MPOOL.ACQUIRE", &key, "*"]);
    let after = clock(&mut client);
    let last = optional_number(&lease["last_rotation"]).unwrap();
    assert!(
        (before..=after + 1).contains(&last),
        "{before} {last} {after}"
    );
    assert_eq!(client.acquire(&key, after + 5).state, "current");
    assert_eq!(client.acquire(&key, last + DAY).state, "rotated");
}

#[test]
fn each_error_begins_with_its_code_and_changes_nothing() {
    let server = Options::default()
        .accounts(&["a", "b"])
        .file("high/h", &bearer("h"))
        .file("high/cold", &bearer("cold"))
        .start();
    let mut client = server.connect();
    let holders: Vec<String> = (0..4).map(|_| client.pool_key()).collect();
    for (at, key) in (0..).zip(&holders) {
        client.acquire(key, 1000 + at);
    }
    let waiting = client.pool_key();
    let revoked = client.pool_key();
    client.ok(&["MPOOL.REVOKE", &revoked]);
    let short =
        text(&client.map(&["MPOOL.KEYGEN", "medium", "POOL", "DAYS", "1", "NOW", "0"])["key"]);
    let bound_cold = client.bound_key("high/cold");
    client.ok(&["MPOOL.COOLDOWN", "high", "cold", "0", "9000000"]);
    client.ok(&["HSET", "client_keys:odd", "tier", "gold"]);
    client.ok(&["SET", "client_keys:string", "1"]);
    client.ok(&[
        "HSET",
        "client_keys:stuck",
        "tier",
        "medium",
        "use_pool",
        "true",
    ]);
    client.ok(&["SET", "key_rotation:stuck", "1"]);
    client.check_repair();

    let table: &[(&str, &[&str])] = &[
        ("NOKEY", &["MPOOL.ACQUIRE", "nobody", "1000"]),
        ("NOKEY", &["MPOOL.RELEASE", "nobody"]),
        ("NOKEY", &["MPOOL.REVOKE", "nobody"]),
        ("NOKEY", &["MPOOL.STATUS", "KEY", "nobody"]),
        ("REVOKED", &["MPOOL.ACQUIRE", &revoked, "1000"]),
        ("EXPIRED", &["MPOOL.ACQUIRE", &short, "86400000"]),
        ("POOLFULL", &["MPOOL.ACQUIRE", &waiting, "5000"]),
        (
            "POOLFULL",
            &["MPOOL.ACQUIRE", &waiting, "5000", "WITHTOKEN"],
        ),
        ("NOACCOUNT", &["MPOOL.ACQUIRE", &bound_cold, "1000"]),
        ("NOACCOUNT", &["MPOOL.KEYGEN", "high", "nosuch"]),
        ("NOACCOUNT", &["MPOOL.KEYGEN", "supreme", "h"]),
        (
            "NOACCOUNT",
            &["MPOOL.COOLDOWN", "medium", "nosuch", "0", "1"],
        ),
        ("ERR", &["MPOOL.ACQUIRE", "odd", "1000"]),
        ("ERR", &["MPOOL.ACQUIRE", "string", "1000"]),
        ("ERR", &["MPOOL.REVOKE", "string"]),
        ("ERR", &["MPOOL.ACQUIRE", &waiting, "soon"]),
        ("ERR", &["MPOOL.ACQUIRE", &waiting]),
        ("ERR", &["MPOOL.ACQUIRE", &waiting, "1", "TOKEN"]),
        ("ERR", &["MPOOL.ACQUIRE", &waiting, "1", "WITHTOKEN", "x"]),
        ("ERR", &["MPOOL.RELEASE"]),
        ("ERR", &["MPOOL.RELEASE", &holders[0], "1", "2"]),
        ("ERR", &["MPOOL.KEYGEN", "gold", "POOL"]),
        ("ERR", &["MPOOL.KEYGEN", "high", "POOL"]),
        ("ERR", &["MPOOL.KEYGEN", "supreme", "pool"]),
        ("ERR", &["MPOOL.KEYGEN", "medium", "POOL", "DAYS", "0"]),
        ("ERR", &["MPOOL.KEYGEN", "medium", "POOL", "DAYS"]),
        (
            "ERR",
            &["MPOOL.KEYGEN", "medium", "POOL", "DAYS", "1", "DAYS", "1"],
        ),
        ("ERR", &["MPOOL.COOLDOWN", "medium", "a", "0"]),
        ("ERR", &["MPOOL.COOLDOWN", "medium", "a", "0", "-1"]),
        ("ERR", &["MPOOL.STATUS", "NOTHING"]),
        ("ERR", &["MPOOL.STATUS", "ACCOUNTS"]),
        ("ERR", &["MPOOL.STATUS", "LEASES", "gold"]),
        ("ERR", &["MPOOL.STATUS", "LEASES", "medium", "CURSOR", "7"]),
        ("ERR", &["MPOOL.STATUS", "KEY"]),
        ("ERR", &["MPOOL.RELOAD", "now"]),
        ("ERR", &["MPOOL.REPAIR", "now"]),
        ("ERR", &["MPOOL.REVOKE"]),
    ];
    for (code, words) in table {
        client.refused(code, words);
    }
    client.check_invariants(2);
    client.check_repair();

    // A slot is free, so that what is refused is the write and nothing before.
    client.ok(&["MPOOL.RELEASE", &holders[0]]);
    client.refused("WRONGTYPE", &["MPOOL.ACQUIRE", "stuck", "1000"]);
    client.check_invariants(2);

    // Without any account that can be lent there is nothing to wait for.
    for account in ["a", "b"] {
        client.ok(&["MPOOL.COOLDOWN", "medium", account, "1000", "500"]);
    }
    let error = client.refused("NOACCOUNT", &["MPOOL.ACQUIRE", &waiting, "1100"]);
    assert!(error.ends_with(" 1500"), "{error}");
}

#[test]
fn the_last_word_of_poolfull_is_when_the_next_slot_falls_due() {
    let server = Options::default().accounts(&["a", "b"]).start();
    let mut client = server.connect();
    for at in [3000, 1000, 2000, 4000] {
        let key = client.pool_key();
        client.acquire(&key, at);
    }
    let waiting = client.pool_key();
    let error = client.refused("POOLFULL", &["MPOOL.ACQUIRE", &waiting, "5000"]);
    assert_eq!(
        error.split(' ').next_back(),
        Some((1000 + DAY).to_string().as_str())
    );
    // One ms earlier it is still so; then the slot is there.
    client.refused(
        "POOLFULL",
        &["MPOOL.ACQUIRE", &waiting, &(999 + DAY).to_string()],
    );
    assert_eq!(client.acquire(&waiting, 1000 + DAY).state, "assigned");
    let next = client.pool_key();
    let error = client.refused(
        "POOLFULL",
        &["MPOOL.ACQUIRE", &next, &(1000 + DAY).to_string()],
    );
    assert_eq!(
        error.split(' ').next_back(),
        Some((2000 + DAY).to_string().as_str())
    );
    client.check_invariants(2);
}

#[test]
fn poolfull_counts_the_end_of_a_holding_key_too() {
    let server = Options::default().accounts(&["a"]).start();
    let mut client = server.connect();
    let long = client.pool_key();
    client.acquire(&long, 0);
    client.ok(&[
        "HSET",
        "client_keys:short",
        "tier",
        "medium",
        "use_pool",
        "true",
        "expires_at",
        "7000",
    ]);
    client.acquire("short", 100);
    let waiting = client.pool_key();
    let error = client.refused("POOLFULL", &["MPOOL.ACQUIRE", &waiting, "6999"]);
    assert_eq!(error.split(' ').next_back(), Some("7000"));
    assert_eq!(client.acquire(&waiting, 7000).account, "a");
    assert_eq!(client.holds("short"), None);
    client.check_invariants(2);
}

#[test]
fn notoken_where_the_file_is_missing() {
    let primary = Options::default().accounts(&["a"]).start();
    let mut replica = Options::default().replica_of(&primary).start();
    let mut client = primary.connect();
    let key = client.pool_key();
    client.acquire(&key, 1000);
    wait_for_same(&mut client, &mut replica.connect());
    let mut other = replica.connect();
    other.ok(&["REPLICAOF", "NO", "ONE"]);
    assert_eq!(other.acquire(&key, 1001).state, "current");
    other.refused("NOTOKEN", &["MPOOL.ACQUIRE", &key, "1001", "WITHTOKEN"]);
    assert!(replica.is_alive());
}

#[test]
fn release_twice_is_no_error() {
    let server = Options::default().accounts(&["a"]).start();
    let mut client = server.connect();
    let key = client.pool_key();
    let release =
        |client: &mut Client| optional_text(&client.map(&["MPOOL.RELEASE", &key])["account"]);
    assert_eq!(release(&mut client), None);
    client.acquire(&key, 1000);
    assert_eq!(client.slots("a"), Some(1));
    assert_eq!(release(&mut client).as_deref(), Some("a"));
    assert_eq!(client.slots("a"), Some(0));
    let before = client.traces();
    assert_eq!(release(&mut client), None);
    assert_eq!(client.traces(), before, "a second release writes nothing");
    assert_eq!(client.holds(&key), None);
    client.check_invariants(2);
    client.check_repair();
}

#[test]
fn release_with_a_now_frees_what_is_overdue() {
    let server = Options::default().accounts(&["a"]).start();
    let mut client = server.connect();
    let (one, other) = (client.pool_key(), client.pool_key());
    client.acquire(&one, 1000);
    client.acquire(&other, 5000);
    let reply = client.map(&["MPOOL.RELEASE", &other, &(1000 + DAY).to_string()]);
    assert_eq!(text(&reply["account"]), "a");
    assert_eq!(client.slots("a"), Some(0));
    assert_eq!(client.holds(&one), None);
    client.check_invariants(2);
}

#[test]
fn revoke_ends_a_key_and_frees_its_slot() {
    let server = Options::default()
        .accounts(&["a"])
        .file("high/h", &bearer("h"))
        .start();
    let mut client = server.connect();
    let key = client.pool_key();
    client.acquire(&key, 1000);
    assert_eq!(text(&client.map(&["MPOOL.REVOKE", &key])["account"]), "a");
    assert_eq!(client.slots("a"), Some(0));
    assert_eq!(
        client.run::<String>(&["HGET", &format!("client_keys:{key}"), "active"]),
        "false"
    );
    assert_eq!(client.map(&["MPOOL.REVOKE", &key])["account"], Value::Nil);
    client.refused("REVOKED", &["MPOOL.ACQUIRE", &key, "1001"]);
    let bound = client.bound_key("high/h");
    assert_eq!(client.map(&["MPOOL.REVOKE", &bound])["account"], Value::Nil);
    client.refused("REVOKED", &["MPOOL.ACQUIRE", &bound, "1001"]);
    client.check_invariants(2);
    client.check_repair();
}

#[test]
fn keygen_makes_keys_of_each_kind() {
    let server = Options::default()
        .accounts(&["jasonlucy8160-outlook"])
        .file("high/h", &bearer("h"))
        .file("supreme/s", &bearer("s"))
        .start();
    let mut client = server.connect();
    let mut seen = BTreeSet::new();
    let table: &[(&[&str], &str, &str, i64)] = &[
        (&["medium", "POOL", "NOW", "1000"], "medium", "pool", 30),
        (
            &["MEDIUM", "pool", "DAYS", "60", "NOW", "1000"],
            "medium",
            "pool",
            60,
        ),
        (
            &["medium", "jasonlucy8160-outlook", "NOW", "1000"],
            "medium",
            "jasonlucy8160-outlook",
            30,
        ),
        (&["high", "h", "now", "1000", "days", "1"], "high", "h", 1),
        (
            &[
                "supreme", "s", "NAME", "一 %s%n", "DAYS", "36500", "NOW", "1000",
            ],
            "supreme",
            "s",
            36500,
        ),
    ];
    for (words, tier, account, days) in table {
        let reply = client.map(&[&["MPOOL.KEYGEN"], *words].concat());
        let key = text(&reply["key"]);
        let digits = key.strip_prefix("sk-cli-v1-").unwrap();
        assert_eq!(digits.len(), 64);
        assert!(
            digits
                .bytes()
                .all(|digit| b"0123456789abcdef".contains(&digit)),
            "{key}"
        );
        assert!(seen.insert(key.clone()), "a key came twice");
        assert_eq!(text(&reply["tier"]), *tier);
        assert_eq!(text(&reply["account"]), *account);
        let end = 1000 + days * DAY;
        assert_eq!(reply["expires_at"], Value::Int(end));
        let record: BTreeMap<String, String> =
            client.run(&["HGETALL", &format!("client_keys:{key}")]);
        assert_eq!(record["tier"], *tier);
        assert_eq!(record["use_pool"], (*account == "pool").to_string());
        assert_eq!(
            record.get("account_name").map_or("pool", String::as_str),
            *account
        );
        assert_eq!(record["created_at"], "1000");
        assert_eq!(record["expires_at"], end.to_string());
        assert_eq!(record["active"], "true");
        assert_eq!(
            record.get("name").map(String::as_str),
            (*tier == "supreme").then_some("一 %s%n")
        );
        assert_eq!(
            client.acquire(&key, end - 1).account,
            if *account == "pool" {
                "jasonlucy8160-outlook"
            } else {
                account
            }
        );
        client.refused("EXPIRED", &["MPOOL.ACQUIRE", &key, &end.to_string()]);
    }
    for tier in ["high", "supreme"] {
        let error = client.refused("ERR", &["MPOOL.KEYGEN", tier, "POOL"]);
        assert!(error.contains("bound"), "it should say why: {error}");
    }
}

#[test]
fn cooldown_takes_an_account_out_and_puts_it_back() {
    let server = Options::default().accounts(&["a"]).start();
    let mut client = server.connect();
    let key = client.pool_key();
    client.acquire(&key, 1000);
    let reply = client.map(&[
        "MPOOL.COOLDOWN",
        "medium",
        "a",
        "2000",
        "500",
        "REASON",
        "429 一 %s%n",
    ]);
    assert_eq!(text(&reply["account"]), "a");
    assert_eq!(reply["until"], Value::Int(2500));
    assert_eq!(reply["freed"], Value::Int(1));
    assert_eq!(
        client.run::<String>(&["GET", "medium_pool:cooldown:a"]),
        "2500"
    );
    assert_eq!(client.slots("a"), Some(0));
    let row = client.account_status("a", 2000).unwrap();
    assert_eq!(text(&row["state"]), "cooldown");
    assert_eq!(text(&row["reason"]), "429 一 %s%n");
    assert_eq!(row["until"], Value::Int(2500));
    client.refused("NOACCOUNT", &["MPOOL.ACQUIRE", &key, "2499"]);
    let reply = client.map(&["MPOOL.COOLDOWN", "medium", "a", "2499", "0"]);
    assert_eq!(
        (&reply["until"], &reply["freed"]),
        (&Value::Nil, &Value::Int(0))
    );
    assert!(!client.run::<bool>(&["EXISTS", "medium_pool:cooldown:a"]));
    assert_eq!(client.acquire(&key, 2499).account, "a");
    // An end that has come is as good as none.
    client.ok(&["MPOOL.COOLDOWN", "medium", "a", "3000", "500"]);
    assert_eq!(client.acquire(&key, 3500).account, "a");
    client.check_invariants(2);
    client.check_repair();
}

#[test]
fn status_shows_a_small_pool_whole() {
    let server = Options::default()
        .accounts(&["a", "b", "cold"])
        .file(
            "medium/old",
            r#"{"access_token": "t", "expires_at": 1755266400000}"#,
        )
        .file("medium/broken", "{")
        .file("high/h", &bearer("h"))
        .start();
    let mut client = server.connect();
    let now = 1_755_266_400_000;
    client.ok(&["MPOOL.COOLDOWN", "medium", "cold", &now.to_string(), "1000"]);
    let keys: Vec<String> = (0..3).map(|_| client.pool_key()).collect();
    for (at, key) in (0..).zip(&keys) {
        client.acquire(key, now + at);
    }
    let status = client.map(&["MPOOL.STATUS", "NOW", &(now + 10).to_string()]);
    assert_eq!(status["now"], Value::Int(now + 10));
    let medium: BTreeMap<String, Option<i64>> =
        redis::from_redis_value_ref(&status["medium"]).unwrap();
    let expected = [
        ("accounts", 4),
        ("slots", 8),
        ("used", 3),
        ("free", 1),
        ("cooling_down", 1),
        ("invalid", 1),
        ("leases", 3),
        ("next_due", now + DAY),
        ("expired", 1),
        ("missing", 0),
    ];
    for (name, value) in expected {
        assert_eq!(medium[name], Some(value), "{name}: {medium:?}");
    }
    let high: BTreeMap<String, Option<i64>> = redis::from_redis_value_ref(&status["high"]).unwrap();
    assert_eq!((high["accounts"], high["next_due"]), (Some(1), None));
    let states: BTreeMap<String, String> = maps(&status["accounts"])
        .iter()
        .map(|row| (text(&row["account"]), text(&row["state"])))
        .collect();
    assert_eq!(states["cold"], "cooldown");
    assert_eq!(states["old"], "expired");
    assert_eq!(states["broken"], "invalid");
    assert_eq!(states["h"], "available");
    let mut lent = [states["a"].as_str(), &states["b"]];
    lent.sort_unstable();
    assert_eq!(lent, ["full", "partial"]);
    let leases = maps(&status["leases"]);
    assert_eq!(leases.len(), 3);
    for (at, (key, lease)) in (0..).zip(keys.iter().zip(&leases)) {
        let shown = text(&lease["key"]);
        assert_eq!(shown, format!("{}...{}", &key[..14], &key[key.len() - 4..]));
        assert_eq!(lease["next_rotation"], Value::Int(now + at + DAY));
    }
    let files = named_reasons(&status["invalid_files"]);
    assert!(files["medium/broken.json"].contains("JSON"), "{files:?}");
}

#[test]
fn status_key_shows_one_key_in_full() {
    let server = Options::default()
        .accounts(&["a"])
        .file("high/h", &bearer("h"))
        .start();
    let mut client = server.connect();
    let state = |client: &mut Client, key: &str, now: i64| {
        let reply = client.map(&["MPOOL.STATUS", "KEY", key, "NOW", &now.to_string()]);
        assert!(
            !text(&reply["key"]).contains(&key[key.len() / 2..]),
            "the key is masked"
        );
        (text(&reply["state"]), reply)
    };
    let keygen = client.map(&[
        "MPOOL.KEYGEN",
        "medium",
        "POOL",
        "DAYS",
        "3",
        "NAME",
        "一\"%s",
        "NOW",
        "500",
    ]);
    let key = text(&keygen["key"]);
    let (idle, reply) = state(&mut client, &key, 600);
    assert_eq!(idle, "idle");
    assert_eq!(text(&reply["name"]), "一\"%s");
    assert_eq!(reply["created_at"], Value::Int(500));
    assert_eq!(reply["expires_at"], Value::Int(500 + 3 * DAY));
    assert_eq!(reply["account"], Value::Nil);
    client.acquire(&key, 1000);
    let (leased, reply) = state(&mut client, &key, 1000);
    assert_eq!(
        (leased.as_str(), text(&reply["account"]).as_str()),
        ("leased", "a")
    );
    assert_eq!(reply["last_rotation"], Value::Int(1000));
    assert_eq!(reply["next_rotation"], Value::Int(1000 + DAY));
    assert_eq!(state(&mut client, &key, 1000 + DAY).0, "due");
    assert_eq!(state(&mut client, &key, 500 + 3 * DAY).0, "expired");
    client.ok(&["MPOOL.REVOKE", &key]);
    assert_eq!(state(&mut client, &key, 1000).0, "revoked");
    let bound = client.bound_key("high/h");
    let (word, reply) = state(&mut client, &bound, 1000);
    assert_eq!(
        (
            word.as_str(),
            text(&reply["account"]).as_str(),
            text(&reply["tier"]).as_str()
        ),
        ("bound", "h", "high")
    );
    client.ok(&["HSET", "client_keys:some-odd-key", "tier", "gold"]);
    let (word, reply) = state(&mut client, "some-odd-key", 1000);
    assert_eq!(word, "malformed");
    assert!(text(&reply["flaw"]).contains("medium, high or supreme"));
}

#[test]
fn pages_show_every_account_and_every_lease_once() {
    const ACCOUNTS: usize = 2500;
    const LEASES: usize = 1000;
    let expected: BTreeSet<String> = (0..ACCOUNTS)
        .map(|number| format!("account-{number}"))
        .collect();
    let mut options = Options::default().file("high/h", &bearer("h"));
    for name in &expected {
        options = options.file(&format!("medium/{name}"), r#"{"api_key": "k"}"#);
    }
    let server = options.start();
    let mut client = server.connect();
    let mut keys = BTreeSet::new();
    for at in 0..LEASES {
        // A key by hand whose mask still tells it from the others.
        let key = format!("{at:04}-abcdefghijklmnop-{at:04}");
        client.ok(&[
            "HSET",
            &format!("client_keys:{key}"),
            "tier",
            "medium",
            "use_pool",
            "true",
        ]);
        // Several at each instant, so that pages end between equal ones.
        client.acquire(&key, (at / 7) as i64);
        keys.insert(format!("{}...{}", &key[..4], &key[key.len() - 4..]));
    }
    for count in ["1000", "97"] {
        let rows = client.pages("ACCOUNTS", "medium", count);
        let found: BTreeSet<String> = rows.iter().map(|row| text(&row["account"])).collect();
        assert_eq!((rows.len(), &found), (ACCOUNTS, &expected));
        let rows = client.pages("LEASES", "medium", count);
        let found: BTreeSet<String> = rows.iter().map(|row| text(&row["key"])).collect();
        assert_eq!((rows.len(), &found), (LEASES, &keys));
        let due: Vec<_> = rows
            .iter()
            .map(|row| optional_number(&row["next_rotation"]))
            .collect();
        assert!(due.is_sorted(), "leases come by next rotation");
    }
    assert_eq!(client.pages("ACCOUNTS", "high", "10").len(), 1);
    assert_eq!(client.pages("ACCOUNTS", "supreme", "10").len(), 0);
    assert_eq!(client.pages("LEASES", "high", "10").len(), 0);
    let whole = client.map(&["MPOOL.STATUS"]);
    assert_eq!(
        (maps(&whole["accounts"]).len(), maps(&whole["leases"]).len()),
        (100, 100)
    );
}

#[test]
fn repair_says_what_it_changed_and_then_nothing() {
    let server = Options::default().accounts(&["a"]).start();
    let mut client = server.connect();
    let key = client.pool_key();
    client.acquire(&key, 1000);
    client.check_repair();
    // In one transaction, so that nothing puts it right before REPAIR does.
    let reply: Vec<BTreeMap<String, i64>> = {
        let mut pipe = redis::pipe();
        pipe.atomic();
        pipe.cmd("SET").arg("medium_pool:slots:a").arg(7).ignore();
        pipe.cmd("MPOOL.REPAIR");
        pipe.query(&mut client.connection).unwrap()
    };
    assert_eq!((reply[0]["changed"], reply[0]["counters"]), (1, 1));
    assert_eq!(client.slots("a"), Some(1));
    client.check_repair();
    client.check_invariants(2);
}

#[test]
fn transactions_and_scripts_can_use_the_commands() {
    let server = Options::default().accounts(&["a", "b"]).start();
    let mut client = server.connect();
    let (one, other) = (client.pool_key(), client.pool_key());
    let mut pipe = redis::pipe();
    pipe.atomic();
    for key in [&one, &other] {
        pipe.cmd("MPOOL.ACQUIRE").arg(key).arg(1000);
    }
    pipe.cmd("MPOOL.RELEASE").arg(&other);
    pipe.cmd("MPOOL.STATUS").arg("KEY").arg(&other);
    let replies: Vec<BTreeMap<String, Value>> = pipe.query(&mut client.connection).unwrap();
    assert_ne!(text(&replies[0]["account"]), text(&replies[1]["account"]));
    assert_eq!(text(&replies[2]["account"]), text(&replies[1]["account"]));
    assert_eq!(text(&replies[3]["state"]), "idle");
    client.check_invariants(2);

    let script =
        "local lease = redis.call('MPOOL.ACQUIRE', ARGV[1], ARGV[2]) return {lease[2], lease[4]}";
    let (account, state): (String, String) = client.run(&["EVAL", script, "0", &other, "2000"]);
    assert_eq!(state, "assigned");
    assert_eq!(client.holds(&other), Some(account));
    let caught = "local reply = redis.pcall('MPOOL.ACQUIRE', 'nobody', 1) return reply.err";
    let error: String = client.run(&["EVAL", caught, "0"]);
    assert!(error.starts_with("NOKEY"), "{error}");
    client.check_invariants(2);
    client.check_repair();
    // It waits for a thread, which neither can.
    client.refused("ERR", &["EVAL", "return redis.call('MPOOL.RELOAD')", "0"]);
    client.ok(&["MULTI"]);
    client.ok(&["MPOOL.RELOAD"]);
    let error = client.error(&["EXEC"]);
    assert!(error.contains("MULTI"), "{error}");
}

#[test]
fn the_pool_is_in_database_0_whichever_is_selected() {
    let server = Options::default()
        .accounts(&["a"])
        .server(&["--appendonly", "yes"])
        .start();
    let mut client = server.connect();
    client.ok(&["SELECT", "5"]);
    let key = client.pool_key();
    assert_eq!(client.acquire(&key, 1000).account, "a");
    assert_eq!(
        client.run::<i64>(&["DBSIZE"]),
        0,
        "nothing is written to database 5"
    );
    client.ok(&["SET", "mark", "1"]);
    let mut zero = server.connect();
    assert_eq!(zero.holds(&key).as_deref(), Some("a"));
    assert!(
        !zero.run::<bool>(&["EXISTS", "mark"]),
        "the client has stayed in database 5"
    );
    client.error(&["MPOOL.ACQUIRE", "nobody", "1"]);
    assert_eq!(
        client.run::<i64>(&["DBSIZE"]),
        1,
        "it has stayed there after an error too"
    );
    // Names of the pool's keys in another database are not the pool's.
    client.ok(&["HSET", &format!("key_rotation:{key}"), "account", "b"]);
    client.ok(&[
        "HSET",
        "client_keys:elsewhere",
        "tier",
        "medium",
        "use_pool",
        "true",
    ]);
    client.refused("NOKEY", &["MPOOL.ACQUIRE", "elsewhere", "1000"]);
    assert_eq!(client.acquire(&key, 1001).state, "current");
    // The append-only file has every write in its database.
    client.ok(&["MPOOL.RELEASE", &key]);
    let before = zero.traces().0;
    client.ok(&["DEBUG", "LOADAOF"]);
    assert_eq!(zero.traces().0, before);
    zero.check_invariants(2);
}

#[test]
fn info_counts() {
    let server = Options::default()
        .accounts(&["a"])
        .file("high/h", &bearer("h"))
        .start();
    let mut client = server.connect();
    let keys: Vec<String> = (0..3).map(|_| client.pool_key()).collect();
    let bound = client.bound_key("high/h");
    client.acquire(&keys[0], 1000);
    client.acquire(&keys[0], 1001);
    client.acquire(&keys[1], 1000);
    client.acquire(&bound, 1000);
    client.error(&["MPOOL.ACQUIRE", &keys[2], "1000"]);
    client.error(&["MPOOL.ACQUIRE", "nobody", "1000"]);
    client.acquire(&keys[0], 1000 + DAY);
    client.acquire(&keys[1], 1000 + DAY);
    client.ok(&["MPOOL.COOLDOWN", "medium", "a", "2000", "1000"]);
    client.acquire(&keys[0], 5000);
    let expected = [
        ("acquires", 9),
        ("current", 1),
        ("bound", 1),
        ("assignments", 2),
        ("rotations", 2),
        ("failovers", 1),
        ("refused_nokey", 1),
        ("refused_revoked", 0),
        ("refused_expired", 0),
        ("refused_poolfull", 1),
        ("refused_noaccount", 0),
        ("refused_notoken", 0),
        ("refused_clockskew", 0),
        ("refused_err", 0),
        ("accounts", 2),
        ("slots", 4),
        ("leases", 1),
        ("medium_used", 1),
        ("medium_free", 1),
        ("high_free", 2),
    ];
    let info: redis::InfoDict = client.run(&["INFO", "mpool"]);
    for (name, value) in expected {
        assert_eq!(
            info.get::<i64>(&format!("mpool_{name}")),
            Some(value),
            "{name}"
        );
    }
}

#[test]
fn commands_are_documented() {
    let server = Options::default().start();
    let mut client = server.connect();
    for name in COMMANDS {
        let docs: BTreeMap<String, BTreeMap<String, Value>> =
            client.run(&["COMMAND", "DOCS", name]);
        let docs = &docs[name];
        for field in ["summary", "since", "complexity"] {
            assert!(!text(&docs[field]).is_empty(), "{name} has no {field}");
        }
        let takes_none = ["mpool.reload", "mpool.repair"].contains(&name);
        let arguments = docs.get("arguments").map_or(0, |list| items(list).len());
        assert_eq!(arguments == 0, takes_none, "{name}");

        let info: Vec<Vec<Value>> = client.run(&["COMMAND", "INFO", name]);
        let arity: i64 = redis::from_redis_value_ref(&info[0][1]).unwrap();
        let flags: BTreeSet<String> = redis::from_redis_value_ref(&info[0][2]).unwrap();
        let expected = match name {
            "mpool.acquire" | "mpool.keygen" => -3,
            "mpool.release" => -2,
            "mpool.revoke" => 2,
            "mpool.cooldown" => -5,
            "mpool.status" => -1,
            _ => 1,
        };
        assert_eq!(arity, expected, "{name}");
        let reads = name == "mpool.status";
        assert_eq!(
            (flags.contains("readonly"), flags.contains("write")),
            (reads, !reads),
            "{name}: {flags:?}"
        );
    }
}

#[test]
fn settings_can_be_read_and_changed() {
    let server = Options::default().accounts(&["a"]).start();
    let mut client = server.connect();
    let get = |client: &mut Client, name: &str| {
        let found: BTreeMap<String, String> = client.run(&["CONFIG", "GET", name]);
        found.get(name).cloned().unwrap()
    };
    assert_eq!(get(&mut client, "mpool.slots-per-account"), "2");
    assert_eq!(get(&mut client, "mpool.rotation-ms"), DAY.to_string());
    assert_eq!(get(&mut client, "mpool.max-clock-skew-ms"), "0");
    assert_eq!(get(&mut client, "mpool.choice-seed"), "0");
    let folder = server.account_dir().to_string_lossy().into_owned();
    assert_eq!(get(&mut client, "mpool.account-dir"), folder);
    for (name, value) in [
        ("slots-per-account", "3"),
        ("slots-per-account", "1024"),
        ("rotation-ms", "1"),
        ("rotation-ms", "31536000000"),
        ("choice-seed", "9223372036854775807"),
        ("choice-seed", "0"),
        ("max-clock-skew-ms", "31536000000"),
        ("max-clock-skew-ms", "0"),
    ] {
        let name = format!("mpool.{name}");
        client.ok(&["CONFIG", "SET", &name, value]);
        assert_eq!(get(&mut client, &name), value);
    }
    let file = server
        .account_file("medium/a")
        .to_string_lossy()
        .into_owned();
    let table: &[(&str, &[&[u8]])] = &[
        (
            "slots-per-account",
            &[
                b"0",
                b"1025",
                b"-1",
                b"many",
                b"",
                b"2.5",
                b"\xff",
                b"99999999999999999999",
                b"%s%n",
                "一".as_bytes(),
            ],
        ),
        (
            "rotation-ms",
            &[
                b"0",
                b"31536000001",
                b"-1",
                b"1d",
                b"",
                b"\xff",
                b"%s%n",
                "一".as_bytes(),
            ],
        ),
        (
            "max-clock-skew-ms",
            &[b"31536000001", b"-1", b"1d", b"", b"\xff"],
        ),
        (
            "choice-seed",
            &[b"9223372036854775808", b"-1", b"dice", b"", b"\xff"],
        ),
        (
            "account-dir",
            &[b"", b"\xff", b"a\0b", b"a\nb", file.as_bytes()],
        ),
        ("no-such-setting", &[b"1"]),
    ];
    for (name, values) in table {
        let name = format!("mpool.{name}");
        let before: Vec<String> = client.run(&["CONFIG", "GET", "mpool.*"]);
        for value in *values {
            client.error_bytes(&[b"CONFIG", b"SET", name.as_bytes(), value]);
        }
        assert_eq!(
            client.run::<Vec<String>>(&["CONFIG", "GET", "mpool.*"]),
            before,
            "{name}"
        );
    }
}

/// What redis-server says when it is started like this and has to refuse.
fn refusal(module_args: &[&str], config: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("redis.conf");
    let args: Vec<String> = module_args.iter().map(|arg| format!("{arg:?}")).collect();
    let content = format!(
        "loadmodule {} {}\n{config}\n",
        module().display(),
        args.join(" ")
    );
    std::fs::write(&file, content).unwrap();
    let mut child = Command::new(server_binary())
        .arg(&file)
        .args([
            "--port",
            &free_port().to_string(),
            "--save",
            "",
            "--logfile",
            "log",
        ])
        .current_dir(folder.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let log = || std::fs::read_to_string(folder.path().join("log")).unwrap_or_default();
    let deadline = std::time::Instant::now() + PATIENCE;
    let ended = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if log().contains("Ready to accept") || std::time::Instant::now() > deadline {
            break None;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    };
    let _ = child.kill();
    let _ = child.wait();
    let status =
        ended.unwrap_or_else(|| panic!("it started with {module_args:?} {config}: {}", log()));
    assert_eq!(
        status.code(),
        Some(1),
        "it ended in another way than by refusing: {}",
        log()
    );
    log()
}

#[test]
fn bad_settings_refuse_to_load_and_say_what_would_be_accepted() {
    let arguments: &[(&[&str], &str)] = &[
        (&["slots-per-account", "0"], "from 1 to 1024"),
        (&["slots-per-account", "1025"], "from 1 to 1024"),
        (&["slots-per-account", "two"], "from 1 to 1024"),
        (&["slots-per-account", ""], "from 1 to 1024"),
        (&["slots-per-account"], "no value"),
        (&["rotation-ms", "0"], "from 1 to 31536000000"),
        (&["rotation-ms", "-5"], "from 1 to 31536000000"),
        (&["rotation-ms", "%s%n"], "from 1 to 31536000000"),
        (&["max-clock-skew-ms", "-1"], "from 0 (off) to 31536000000"),
        (
            &["max-clock-skew-ms", "31536000001"],
            "from 0 (off) to 31536000000",
        ),
        (
            &["choice-seed", "9223372036854775808"],
            "from 0 (at random) to 9223372036854775807",
        ),
        (&["account-dir", ""], "path of a folder"),
        (&["account-dir", "/etc/passwd"], "a folder, not a file"),
        (&["slot-per-account", "2"], "does not know"),
        (&["%s%n", "2"], "does not know"),
        (&["一", "2"], "does not know"),
    ];
    for (args, expected) in arguments {
        let log = refusal(args, "");
        assert!(log.contains(expected), "{args:?} draws: {log}");
        assert!(
            log.contains("accepted module arguments are"),
            "{args:?} draws: {log}"
        );
        assert!(
            !log.contains("%s") && !log.contains('一'),
            "{args:?} is repeated: {log}"
        );
    }
    let lines = [
        ("mpool.slots-per-account 0", "1024"),
        ("mpool.slots-per-account many", "integer"),
        ("mpool.rotation-ms -1", "31536000000"),
        ("mpool.max-clock-skew-ms 1d", "integer"),
        ("mpool.choice-seed -1", "9223372036854775807"),
        ("mpool.account-dir /etc/passwd", "folder"),
    ];
    for (line, expected) in lines {
        let log = refusal(&[], line);
        assert!(log.contains(expected), "{line} draws: {log}");
    }
    refusal(&[], "mpool.no-such-setting 1");
}

#[test]
fn good_settings_in_the_configuration_file_hold() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().to_string_lossy().into_owned();
    let server = Options {
        bare: true,
        ..Options::default()
    }
    .server(&[
        "--loadmodule",
        module().to_str().unwrap(),
        "slots-per-account",
        "3",
        "max-clock-skew-ms",
        "60000",
    ])
    .server(&["--mpool.rotation-ms", "5000", "--mpool.account-dir", &dir])
    .server(&["--mpool.choice-seed", "42"])
    .start();
    let mut client = server.connect();
    let found: BTreeMap<String, String> = client.run(&["CONFIG", "GET", "mpool.*"]);
    let found: Vec<(&str, &str)> = found
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect();
    let expected = [
        ("mpool.account-dir", dir.as_str()),
        ("mpool.choice-seed", "42"),
        ("mpool.max-clock-skew-ms", "60000"),
        ("mpool.rotation-ms", "5000"),
        ("mpool.slots-per-account", "3"),
    ];
    assert_eq!(found, expected);
}

#[test]
fn the_slow_log_never_shows_a_client_key() {
    let server = Options::default()
        .accounts(&["a"])
        .server(&[
            "--slowlog-log-slower-than",
            "0",
            "--slowlog-max-len",
            "1000",
        ])
        .start();
    let mut client = server.connect();
    let key = client.pool_key();
    client.acquire(&key, 1000);
    client.acquire(&key, 1000 + DAY);
    client.ok(&["MPOOL.ACQUIRE", &key, "1001", "WITHTOKEN"]);
    client.ok(&["MPOOL.STATUS", "KEY", &key]);
    client.ok(&["MPOOL.RELEASE", &key, "5000"]);
    client.error(&["MPOOL.ACQUIRE", &key, "never"]);
    client.error(&["MPOOL.ACQUIRE", &key, "1", "WITHTOKEN", "x"]);
    client.error(&["MPOOL.STATUS", "KEY", &key, "x"]);
    client.ok(&["MPOOL.REVOKE", &key]);
    client.error(&["MPOOL.ACQUIRE", &key, "1001"]);
    client.error(&["MPOOL.ACQUIRE", &format!("{key} and a blank"), "1001"]);
    // A key at the wrong place is still a key.
    client.error(&["MPOOL.ACQUIRE", "*", &key]);
    client.error(&["MPOOL.STATUS", &key]);
    client.error(&["MPOOL.STATUS", "NOW", &key]);
    client.error(&["MPOOL.KEYGEN", "medium", &key]);
    client.error(&["MPOOL.COOLDOWN", "medium", &key, "*", "1"]);
    let entries: Vec<Vec<Value>> = client.run(&["SLOWLOG", "GET", "-1"]);
    let entries = entries
        .iter()
        .map(|entry| redis::from_redis_value_ref::<Vec<String>>(&entry[3]).unwrap());
    // What the module itself writes can't be redacted; no such write is slow.
    let (ours, inner): (Vec<_>, Vec<_>) = entries.partition(|words| words[0].starts_with("MPOOL."));
    assert_eq!(ours.len(), 17, "{ours:?}");
    let secret = &key["sk-cli-v1-".len()..];
    for words in &ours {
        assert!(
            !words.iter().any(|word| word.contains(secret)),
            "the slow log shows the key: {words:?}"
        );
        let made = words[0] == "MPOOL.KEYGEN" && words[2] == "POOL";
        assert_eq!(!made, words.contains(&"(redacted)".to_owned()), "{words:?}");
    }
    for words in inner
        .iter()
        .filter(|words| words.iter().any(|word| word.contains(secret)))
    {
        assert!(["HSET", "HDEL"].contains(&words[0].as_str()), "{words:?}");
    }
    assert!(!server.log().contains(secret), "the log shows the key");
}

#[test]
fn monitor_shows_the_redacted_argument() {
    let server = Options::default().accounts(&["a"]).start();
    let mut client = server.connect();
    let key = client.pool_key();
    let mut watcher = server.connect();
    watcher.ok(&["MONITOR"]);
    client.acquire(&key, 1000);
    client.ok(&["MPOOL.STATUS", "KEY", &key]);
    client.ok(&["MPOOL.REVOKE", &key]);
    client.ok(&["PING", "the-end"]);
    let mut lines = Vec::new();
    while !lines
        .last()
        .is_some_and(|line: &String| line.contains("the-end"))
    {
        lines.push(text(&watcher.connection.recv_response().unwrap()));
    }
    let is_ours = |line: &&String| line.to_lowercase().contains("\"mpool.");
    let (ours, others): (Vec<_>, Vec<_>) = lines.iter().partition(is_ours);
    assert_eq!(ours.len(), 3, "{lines:#?}");
    for line in ours {
        assert!(
            line.contains("(redacted)") && !line.contains(&key),
            "{line}"
        );
    }
    // What the module itself writes can't be redacted.
    for line in others.iter().filter(|line| line.contains(&key)) {
        assert!(
            ["\"HSET\"", "\"HDEL\""]
                .iter()
                .any(|word| line.contains(word)),
            "{line}"
        );
    }
}

#[test]
fn a_user_may_be_allowed_one_command_and_no_key() {
    let server = Options::default().accounts(&["a"]).start();
    let mut client = server.connect();
    let key = client.pool_key();
    client.ok(&[
        "ACL",
        "SETUSER",
        "proxy",
        "on",
        ">pw",
        "resetkeys",
        "-@all",
        "+mpool.acquire",
    ]);
    let mut proxy = server.connect();
    proxy.ok(&["AUTH", "proxy", "pw"]);
    assert_eq!(proxy.acquire(&key, 1000).account, "a");
    for words in [
        &["MPOOL.RELEASE", &key][..],
        &["MPOOL.STATUS"],
        &["HGETALL", &format!("client_keys:{key}")],
    ] {
        let error = proxy.error(words);
        assert!(error.starts_with("NOPERM"), "{words:?}: {error}");
    }
    client.check_invariants(2);
}

#[test]
fn a_read_only_script_can_look_and_not_lend() {
    let server = Options::default().accounts(&["a"]).start();
    let mut client = server.connect();
    let key = client.pool_key();
    client.ok(&[
        "EVAL_RO",
        "return redis.call('MPOOL.STATUS', 'KEY', ARGV[1])",
        "0",
        &key,
    ]);
    client.refused(
        "ERR",
        &[
            "EVAL_RO",
            "return redis.call('MPOOL.ACQUIRE', ARGV[1], '1000')",
            "0",
            &key,
        ],
    );
    client.check_repair();
}
