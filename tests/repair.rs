//! A large pool's view is made anew while others work: by MPOOL.REPAIR, during which
//! they are served, and when another keyspace is there or the view is in doubt,
//! until when they are refused and nothing is put right. It has all that they do.
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
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;
use support::*;

const NOW: i64 = 1_755_266_400_000;
const ACCOUNTS: [&str; 4] = ["a", "b", "c", "d"];

/// A server with so many keys, of which the first few hold slots.
fn pool(keys: usize) -> Server {
    let server = Options::default().accounts(&ACCOUNTS).start();
    let mut client = server.connect();
    client.register(keys);
    for number in 0..6 {
        client.acquire(&numbered_key(number), NOW);
    }
    server
}

fn repair(client: &mut Client) -> BTreeMap<String, i64> {
    client.run(&["MPOOL.REPAIR"])
}

/// What a repair that was sent before is answered with.
fn repaired(client: &mut Client) -> BTreeMap<String, i64> {
    redis::from_redis_value(client.connection.recv_response().unwrap()).unwrap()
}

/// Whether somebody waits for a repair's end.
fn is_under_way(client: &mut Client) -> bool {
    let listed: String = client.run(&["CLIENT", "LIST"]);
    let mut lines = listed.lines();
    lines.any(|line| line.contains("cmd=mpool.repair") && line.contains("flags=b"))
}

#[test]
fn clients_are_served_while_a_repair_is_under_way() {
    let server = pool(20_000);
    let (mut one, mut other) = (server.connect(), server.connect());
    let over = AtomicBool::new(false);
    let (served, repaired) = thread::scope(|scope| {
        let repairing = scope.spawn(|| {
            let repaired = repair(&mut one);
            over.store(true, Ordering::Relaxed);
            repaired
        });
        let mut served = 0;
        while !over.load(Ordering::Relaxed) {
            assert_eq!(other.acquire(&numbered_key(0), NOW).state, "current");
            served += 1;
        }
        (served, repairing.join().unwrap())
    });
    assert_eq!(repaired["changed"], 0, "{repaired:?}");
    // All at once, it would hold up all but those that came before it.
    assert!(served >= 20, "{served} were served meanwhile");
}

/// Leases, records and cooldowns that change in every way, by the module's
/// commands and by hand.
fn work(client: &mut Client, round: usize, server: &Server) {
    let name = numbered_key(round % 40);
    let now = NOW + round as i64;
    let _ = client.try_acquire(&name, now);
    let account = ACCOUNTS[round % 3];
    match round % 9 {
        0 => client.ok(&["MPOOL.RELEASE", &name]),
        1 => client.ok(&["DEL", &format!("key_rotation:{name}")]),
        2 => {
            let lease = format!("key_rotation:{name}");
            client.ok(&["HSET", &lease, "account", account, "next_rotation", "1"]);
        }
        3 => client.ok(&["SET", &format!("medium_pool:slots:{account}"), "9"]),
        4 => {
            let (now, until) = (now.to_string(), "5");
            client.ok(&["MPOOL.COOLDOWN", "medium", account, &now, until]);
        }
        5 => {
            let record = format!("client_keys:{}", numbered_key(round + 100));
            client.ok(&["HSET", &record, "tier", "high"]);
        }
        6 => client.ok(&["DEL", &format!("client_keys:{}", numbered_key(round + 103))]),
        7 => server.write_account(&format!("medium/x{}", round % 5), &bearer("x")),
        _ => {
            let other = format!("medium/x{}", (round + 3) % 5);
            let _ = std::fs::remove_file(server.account_dir().join(other + ".json"));
        }
    }
}

#[test]
fn what_happens_during_a_repair_is_in_the_view_that_it_makes() {
    let mut server = pool(5_000);
    let rounds = AtomicUsize::new(0);
    let over = AtomicBool::new(false);
    let repairs = thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let mut client = server.connect();
                while !over.load(Ordering::Relaxed) {
                    work(&mut client, rounds.fetch_add(1, Ordering::Relaxed), &server);
                }
            });
        }
        let mut client = server.connect();
        let repairs: Vec<_> = (0..10)
            .map(|_| {
                let before = rounds.load(Ordering::Relaxed);
                let repaired = client.try_run::<BTreeMap<String, i64>>(&["MPOOL.REPAIR"]);
                (repaired, rounds.load(Ordering::Relaxed) - before)
            })
            .collect();
        // First, or a failure would leave the others at work for ever.
        over.store(true, Ordering::Relaxed);
        repairs
    });
    for (repaired, during) in repairs {
        let repaired = repaired.unwrap();
        assert_eq!(repaired["view"], 0, "{repaired:?}");
        assert!(during > 0, "nothing happened meanwhile");
    }
    let mut client = server.connect();
    client.ok(&["MPOOL.RELOAD"]);
    repair(&mut client);
    client.check_repair();
    client.check_invariants(2);
    assert!(server.is_alive());
}

#[test]
fn a_repair_starts_over_when_the_keyspace_is_another() {
    let changes: [&[&str]; 4] = [
        &["SWAPDB", "0", "1"],
        &["FLUSHALL"],
        &["DEBUG", "RELOAD"],
        &["MPOOL.PANIC"],
    ];
    for change in changes {
        let mut server = pool(20_000);
        let (mut one, mut other) = (server.connect(), server.connect());
        let repaired = thread::scope(|scope| {
            let repairing = scope.spawn(|| repair(&mut one));
            wait_for("the repair to begin", || {
                is_under_way(&mut other).then_some(())
            });
            let _ = other.try_run::<Value>(change);
            repairing.join().unwrap()
        });
        assert_eq!(repaired["view"], 0, "{change:?}: {repaired:?}");
        other.check_repair();
        other.register(200);
        other.acquire(&numbered_key(0), NOW);
        other.check_invariants(2);
        assert!(server.is_alive());
    }
}

#[test]
fn a_repair_waits_idly_for_the_end_of_a_pause() {
    let server = pool(20_000);
    let (mut one, mut other) = (server.connect(), server.connect());
    one.send(&["MPOOL.REPAIR"]);
    wait_for("the repair to begin", || {
        is_under_way(&mut other).then_some(())
    });
    other.ok(&["CLIENT", "PAUSE", "60000", "WRITE"]);
    // Before long, nothing is left to do but to write.
    wait_for("the repair to be idle", || {
        let before = cpu_time(server.pid());
        thread::sleep(Duration::from_secs(1));
        let taken = cpu_time(server.pid()) - before;
        (taken <= Duration::from_millis(200)).then_some(())
    });
    assert!(is_under_way(&mut other));
    other.ok(&["CLIENT", "UNPAUSE"]);
    let repaired = repaired(&mut one);
    assert_eq!(repaired["changed"], 0, "{repaired:?}");
}

#[test]
fn a_repair_in_multi_takes_no_account_from_one_under_way() {
    const FILES: usize = 3_000;
    const PORTION: usize = 100;
    let account = |number: usize| format!("medium/a{number:04}");
    let server = Options::default().start();
    for number in 0..FILES {
        server.write_account(&account(number), &bearer("x"));
    }
    let (mut one, mut other) = (server.connect(), server.connect());
    for round in 0..24 {
        // Those that stay are numbered afresh in the view that is made in MULTI.
        for number in round * PORTION..(round + 1) * PORTION {
            server.remove_account(&account(number));
        }
        one.ok(&["MPOOL.RELOAD"]);
        one.send(&["MPOOL.REPAIR"]);
        // Some come before its first portion, some after the files.
        thread::sleep(Duration::from_micros(round as u64 % 6 * 300));
        let mut multi = redis::pipe();
        multi.atomic().cmd("MPOOL.REPAIR").ignore();
        multi.query::<()>(&mut other.connection).unwrap();
        let repaired = repaired(&mut one);
        assert_eq!(repaired["changed"], 0, "{round} {repaired:?}");
        let status = other.map(&["MPOOL.STATUS"]);
        let medium: BTreeMap<String, Value> =
            redis::from_redis_value(status["medium"].clone()).unwrap();
        let accounts: usize = redis::from_redis_value(medium["accounts"].clone()).unwrap();
        assert_eq!(accounts, FILES - (round + 1) * PORTION);
    }
}

#[test]
fn repairs_that_are_asked_for_at_once_are_all_answered() {
    let mut server = pool(2_000);
    thread::scope(|scope| {
        for number in 0..16 {
            let server = &server;
            scope.spawn(move || {
                let mut client = server.connect();
                if number % 4 == 3 {
                    // Gone before there is an answer.
                    client.send(&["MPOOL.REPAIR"]);
                } else {
                    assert_eq!(repair(&mut client)["changed"], 0);
                }
            });
        }
    });
    let mut client = server.connect();
    client.check_repair();
    // Redis unloads no module that a client waits for.
    client.unload();
    assert!(server.is_alive());
}

/// Enough keys that they are not read at once, however fast.
const MANY: usize = 30_000;
/// What `refused` says of a view that is still being made.
const NOT_READY: &str =
    "LOADING mpool is reading the keyspace or the account files; try again shortly";

/// A pool of many keys, six of them with a lease, in database 0; a client of its
/// server, and those leases.
fn large_pool() -> (Server, Client, Vec<Lease>) {
    let server = pool(MANY);
    let mut client = server.connect();
    let before = leases(&mut client);
    (server, client, before)
}

/// Sends all in one write, so that the server carries it out without a turn of
/// the module's in between, and answers each reply, errors by their text.
fn at_one_blow(client: &mut Client, commands: &[&[&str]]) -> Vec<Result<Value, String>> {
    let packed = commands.iter().flat_map(|words| {
        let mut command = redis::Cmd::new();
        command.arg(*words).get_packed_command()
    });
    let packed: Vec<u8> = packed.collect();
    assert!(packed.len() < 16_000, "more than the server reads at once");
    client.connection.send_packed_command(&packed).unwrap();
    let mut reply = || match client.connection.recv_response().unwrap() {
        Value::ServerError(error) => Err(format!(
            "{} {}",
            error.code(),
            error.details().unwrap_or_default()
        )),
        reply => Ok(reply),
    };
    commands.iter().map(|_| reply()).collect()
}

fn is_ready(client: &mut Client) -> bool {
    client.info("mpool", "mpool_ready") == "1"
}

/// Holds the server to what it must do until the view is made: nothing that the
/// module would put right changes. Answers how often that was seen; in between, something
/// else may be done.
fn watch_until_ready(
    client: &mut Client,
    names: &[&str],
    mut meanwhile: impl FnMut(&mut Client, usize),
) -> usize {
    let (mut before, mut looks) = (None, 0);
    loop {
        let mut multi = redis::pipe();
        multi.atomic().cmd("INFO").arg("mpool");
        for name in names {
            multi.cmd("DUMP").arg(name);
        }
        let mut all: Vec<Value> = multi.query(&mut client.connection).unwrap();
        let info: redis::InfoDict = redis::from_redis_value(all.remove(0)).unwrap();
        if info.get("mpool_ready") == Some(1) {
            return looks;
        }
        let values = before.get_or_insert_with(|| all.clone());
        assert_eq!(*values, all, "something was put right");
        meanwhile(client, looks);
        looks += 1;
    }
}

fn refused_loading(reply: &Result<Value, String>) {
    assert_eq!(reply.as_ref().unwrap_err(), NOT_READY);
}

/// The pool as it was when it was filled.
fn check_pool(client: &mut Client, leases: &[Lease]) {
    for (number, lease) in leases.iter().enumerate() {
        let found = client.acquire(&numbered_key(number), NOW);
        assert_eq!(
            (&found.account, found.state.as_str()),
            (&lease.account, "current")
        );
    }
    client.check_invariants(2);
    client.check_repair();
}

fn leases(client: &mut Client) -> Vec<Lease> {
    (0..6)
        .map(|number| client.acquire(&numbered_key(number), NOW))
        .collect()
}

/// Each command that answers from the view or acts on it.
fn commands(holder: &str) -> Vec<Vec<&str>> {
    vec![
        vec!["MPOOL.ACQUIRE", holder, "1755266400000"],
        vec!["MPOOL.ACQUIRE", "nobody", "*", "WITHTOKEN"],
        vec!["MPOOL.RELEASE", holder],
        vec!["MPOOL.REVOKE", holder],
        vec!["MPOOL.KEYGEN", "medium", "POOL"],
        vec!["MPOOL.KEYGEN", "medium", "a"],
        vec!["MPOOL.COOLDOWN", "medium", "a", "*", "60000"],
        vec!["MPOOL.STATUS"],
        vec!["MPOOL.STATUS", "ACCOUNTS", "medium"],
        vec!["MPOOL.STATUS", "LEASES", "medium"],
        vec!["MPOOL.STATUS", "KEY", holder],
        vec!["MPOOL.RELOAD"],
    ]
}

/// The first commands after `change` are refused, others' are not; nothing has been
/// written by then, nor once the keyspace is read, and then all is as it was.
fn check_a_large_keyspace_is_read_in_portions(
    client: &mut Client,
    change: &[&str],
    before: &[Lease],
) {
    let holder = numbered_key(0);
    let lease = format!("key_rotation:{holder}");
    let asked = commands(&holder);
    let mut all: Vec<&[&str]> = vec![change];
    let holds = ["HGET", &lease, "account"];
    for words in &asked {
        all.extend([&words[..], &["PING"], &holds]);
    }
    all.push(&["INFO", "mpool"]);
    all.push(&["DEBUG", "DIGEST"]);
    let digest: String = client.run(&["DEBUG", "DIGEST"]);
    let replies = at_one_blow(client, &all);
    assert!(replies[0].is_ok(), "{:?}", replies[0]);
    for (words, reply) in asked.iter().zip(replies[1..].chunks(3)) {
        assert_eq!(reply[0], Err(NOT_READY.into()), "{words:?}");
        assert_eq!(reply[1], Ok(Value::SimpleString("PONG".into())));
        assert_eq!(text(reply[2].as_ref().unwrap()), before[0].account);
    }
    let [info, after] = &replies[replies.len() - 2..] else {
        panic!("replies are missing");
    };
    let info = text(info.as_ref().unwrap());
    assert!(info.contains("mpool_ready:0\r\n"), "{info}");
    assert!(info.contains("mpool_refused_loading:2\r\n"), "{info}");
    // Numbers of a view that nobody may rely on would be taken for the pool's.
    assert!(!info.contains("_leases:"), "{info}");
    let unread = text(after.as_ref().unwrap());
    client.wait_until_ready();
    check_pool(client, before);
    // SWAPDB brings one database in the place of another.
    let read: String = client.run(&["DEBUG", "DIGEST"]);
    assert_eq!(unread, read);
    assert!(change[0] == "SWAPDB" || read == digest);
}

#[test]
fn a_large_keyspace_is_read_in_portions_after_a_swap() {
    let (mut server, mut client, before) = large_pool();
    client.ok(&["SWAPDB", "0", "1"]);
    // Nothing is there, which is soon read.
    let error = client.error(&["MPOOL.ACQUIRE", &numbered_key(0), "*"]);
    assert!(error.starts_with("NOKEY"), "{error}");
    // Another pool, of which no lease may be told once it is gone.
    client.register(7);
    client.acquire(&numbered_key(6), NOW);
    check_a_large_keyspace_is_read_in_portions(&mut client, &["SWAPDB", "0", "1"], &before);
    assert_eq!(client.acquire(&numbered_key(6), NOW).state, "assigned");
    client.check_invariants(2);
    assert!(server.is_alive());
}

#[test]
fn a_large_keyspace_is_read_in_portions_after_a_load() {
    let (mut server, mut client, before) = large_pool();
    client.unload();
    let mut client = server.connect();
    let load = server.load_words();
    let load = load.iter().map(String::as_str).collect::<Vec<_>>();
    check_a_large_keyspace_is_read_in_portions(&mut client, &load, &before);
    assert!(server.is_alive());
}

#[test]
fn a_large_keyspace_is_read_in_portions_after_a_panic() {
    let (mut server, mut client, before) = large_pool();
    let holder = numbered_key(0);
    let asked = commands(&holder);
    let mut all: Vec<&[&str]> = vec![&["MPOOL.PANIC"]];
    all.extend(asked.iter().map(|words| &words[..]));
    let replies = at_one_blow(&mut client, &all);
    replies[1..].iter().for_each(refused_loading);
    // Another one in the midst of it: it begins again.
    let replies = at_one_blow(&mut client, &[&["MPOOL.PANIC"], &["MPOOL.STATUS"]]);
    refused_loading(&replies[1]);
    client.wait_until_ready();
    check_pool(&mut client, &before);
    assert!(server.is_alive());
}

#[test]
fn commands_that_follow_a_swap_in_its_transaction_are_refused() {
    let (_server, mut client, before) = large_pool();
    client.ok(&["SWAPDB", "0", "1"]);
    let holder = numbered_key(0);
    let acquire = ["MPOOL.ACQUIRE", &holder, "1755266400000"];
    let script = [
        "EVAL",
        "redis.call('SWAPDB', 0, 1) return redis.pcall(unpack(ARGV))",
        "0",
    ];
    let script = [&script[..], &acquire].concat();
    let transaction: [&[&str]; 5] = [
        &["MULTI"],
        &["SWAPDB", "0", "1"],
        &acquire,
        &["MPOOL.STATUS"],
        &["EXEC"],
    ];
    let replies = at_one_blow(&mut client, &transaction);
    let Ok(Value::Array(done)) = &replies[4] else {
        panic!("{replies:?}");
    };
    for reply in &done[1..] {
        assert!(
            matches!(reply, Value::ServerError(error) if error.code() == "LOADING"),
            "{reply:?}"
        );
    }
    client.wait_until_ready();
    check_pool(&mut client, &before);
    client.ok(&["SWAPDB", "0", "1"]);
    let replies = at_one_blow(&mut client, &[&script]);
    refused_loading(&replies[0]);
    // A repair that is part of a transaction is done within it, and makes the view.
    client.ok(&["SWAPDB", "0", "1"]);
    let transaction: [&[&str]; 5] = [
        &["MULTI"],
        &["SWAPDB", "0", "1"],
        &["MPOOL.REPAIR"],
        &acquire,
        &["EXEC"],
    ];
    let replies = at_one_blow(&mut client, &transaction);
    let Ok(Value::Array(done)) = &replies[4] else {
        panic!("{replies:?}");
    };
    let repaired: BTreeMap<String, i64> = redis::from_redis_value_ref(&done[1]).unwrap();
    assert_eq!(repaired["changed"], 0, "{repaired:?}");
    let lease: BTreeMap<String, Value> = redis::from_redis_value_ref(&done[2]).unwrap();
    assert_eq!(Lease::of(&lease).state, "current");
    check_pool(&mut client, &before);
}

#[test]
fn what_happens_while_the_keyspace_is_read_is_acted_upon_after_that() {
    let (server, mut client, before) = large_pool();
    let names: Vec<String> = (0..6)
        .map(|number| format!("key_rotation:{}", numbered_key(number)))
        .collect();
    let counters = ACCOUNTS.map(|account| format!("medium_pool:slots:{account}"));
    client.unload();
    let mut client = server.connect();
    // More than one turn puts right: what is left of the leases of keys that are gone.
    let mut pipe = redis::pipe();
    for number in 0..300 {
        let name = format!("key_rotation:gone-{number}");
        pipe.cmd("HSET")
            .arg(name)
            .arg(&["last_rotation", "1"])
            .ignore();
    }
    pipe.query::<()>(&mut client.connection).unwrap();
    let load = server.load_words();
    let load = load.iter().map(String::as_str).collect::<Vec<_>>();
    // By hand: a lease goes, one comes, a counter is wrong, keys come, go and end.
    let held = &before[1].account;
    let new = "client_keys:new";
    let replies = at_one_blow(
        &mut client,
        &[
            &load,
            &["DEL", &names[0]],
            &[
                "HSET",
                &format!("key_rotation:{}", numbered_key(9)),
                "account",
                held,
                "next_rotation",
                "1755352800000",
                "last_rotation",
                "1755266400000",
            ],
            &["SET", &counters[3], "7"],
            &[
                "HSET", new, "tier", "medium", "use_pool", "true", "active", "true",
            ],
            &[
                "HSET",
                &format!("client_keys:{}", numbered_key(2)),
                "active",
                "false",
            ],
            &["DEL", &format!("client_keys:{}", numbered_key(3))],
            &["MPOOL.STATUS"],
        ],
    );
    refused_loading(&replies[7]);
    // Files: one comes, another one's leases are to go with it.
    server.write_account("medium/e", &bearer("e"));
    let gone = &before[4].account;
    server.remove_account(&format!("medium/{gone}"));
    let watched: Vec<&str> = names
        .iter()
        .chain(&counters)
        .map(String::as_str)
        .chain([new, "medium_pool:slots:e"])
        .collect();
    // At any time: keys that have been read already are read again.
    let ends = |client: &mut Client, look: usize| {
        let record = format!("client_keys:{}", numbered_key(1_000 + look));
        client.ok(&["HSET", &record, "active", "false"]);
    };
    let looks = watch_until_ready(&mut client, &watched, ends);
    assert!(looks > 10, "it was over after {looks} looks");
    client.wait_for_account("e", true);
    client.wait_for_account(gone, false);
    wait_for("what is left of keys that are gone to go", || {
        let left: Vec<String> = client.run(&["KEYS", "key_rotation:gone-*"]);
        left.is_empty().then_some(())
    });
    for (number, lease) in before.iter().enumerate() {
        let name = numbered_key(number);
        let ended = [0, 2, 3].contains(&number) || lease.account == *gone;
        // Of three leases of an account with two slots, the youngest by name goes.
        assert_eq!(
            client.holds(&name).is_none(),
            ended || client.holds(&name).is_none() && lease.account == *held,
            "{number}"
        );
    }
    for look in 0..looks {
        let error = client.error(&["MPOOL.ACQUIRE", &numbered_key(1_000 + look), "*"]);
        assert!(error.starts_with("REVOKED"), "{look}: {error}");
    }
    client.refused("REVOKED", &["MPOOL.ACQUIRE", &numbered_key(2), "*"]);
    client.refused("NOKEY", &["MPOOL.ACQUIRE", &numbered_key(3), "*"]);
    client.acquire("new", NOW);
    client.check_invariants(2);
    client.check_repair();
}

#[test]
fn another_keyspace_while_one_is_read_begins_it_anew() {
    let (mut server, mut client, before) = large_pool();
    let holder = numbered_key(0);
    let acquire = ["MPOOL.ACQUIRE", &holder, "1755266400000"];
    let swap = ["SWAPDB", "0", "1"];
    let info = ["INFO", "mpool"];
    client.ok(&swap);
    // Back to nothing, which is read at once, and again.
    let replies = at_one_blow(
        &mut client,
        &[&swap, &acquire, &swap, &acquire, &info, &swap, &acquire],
    );
    refused_loading(&replies[1]);
    assert!(
        replies[3].as_ref().unwrap_err().starts_with("NOKEY"),
        "{replies:?}"
    );
    assert!(text(replies[4].as_ref().unwrap()).contains("mpool_ready:1"));
    refused_loading(&replies[6]);
    client.wait_until_ready();
    check_pool(&mut client, &before);
    // Nothing is left, whatever of it had been read.
    for flush in [&["FLUSHALL"][..], &["FLUSHDB", "ASYNC"]] {
        client.ok(&["SAVE"]);
        let replies = at_one_blow(
            &mut client,
            &[&swap, &swap, &acquire, flush, &acquire, &info],
        );
        refused_loading(&replies[2]);
        assert!(
            replies[4].as_ref().unwrap_err().starts_with("NOKEY"),
            "{replies:?}"
        );
        let info = text(replies[5].as_ref().unwrap());
        assert!(
            info.contains("mpool_ready:1") && info.contains("mpool_leases:0"),
            "{info}"
        );
        // A load begins with a flush, and tells of each key.
        client.ok(&["DEBUG", "RELOAD", "NOSAVE"]);
        // Valkey leaves the connection in another database.
        client.ok(&["SELECT", "0"]);
        check_pool(&mut client, &before);
    }
    let replies = at_one_blow(
        &mut client,
        &[&swap, &swap, &acquire, &["DEBUG", "RELOAD"], &acquire],
    );
    refused_loading(&replies[2]);
    assert!(replies[4].is_ok(), "{replies:?}");
    client.ok(&["SELECT", "0"]);
    check_pool(&mut client, &before);
    assert!(server.is_alive());
}

#[test]
fn a_repair_that_is_asked_for_while_the_keyspace_is_read_waits_for_it() {
    let (server, mut client, before) = large_pool();
    let mut other = server.connect();
    client.ok(&["SWAPDB", "0", "1"]);
    let replies = at_one_blow(
        &mut client,
        &[
            &["SWAPDB", "0", "1"],
            &["SET", "medium_pool:slots:a", "9"],
            &["INFO", "mpool"],
            &["MPOOL.REPAIR"],
        ],
    );
    assert!(text(replies[2].as_ref().unwrap()).contains("mpool_ready:0"));
    let repaired: BTreeMap<String, i64> =
        redis::from_redis_value_ref(replies[3].as_ref().unwrap()).unwrap();
    assert_eq!(repaired["view"], 0, "{repaired:?}");
    assert!(is_ready(&mut other));
    check_pool(&mut client, &before);
    // One that is under way begins again with another keyspace.
    client.ok(&["SWAPDB", "0", "1"]);
    client.ok(&["SWAPDB", "0", "1"]);
    other.wait_until_ready();
    client.send(&["MPOOL.REPAIR"]);
    wait_for("the repair to begin", || {
        is_under_way(&mut other).then_some(())
    });
    let replies = at_one_blow(
        &mut other,
        &[
            &["SWAPDB", "0", "1"],
            &["SWAPDB", "0", "1"],
            &["MPOOL.STATUS"],
        ],
    );
    refused_loading(&replies[2]);
    assert_eq!(repaired_view(&mut client), 0);
    check_pool(&mut other, &before);
}

fn repaired_view(client: &mut Client) -> i64 {
    repaired(client)["view"]
}

#[test]
fn the_keyspace_is_read_while_clients_are_paused() {
    let (_server, mut client, before) = large_pool();
    client.ok(&["SWAPDB", "0", "1"]);
    let replies = at_one_blow(
        &mut client,
        &[
            &["SWAPDB", "0", "1"],
            &["SET", "medium_pool:slots:a", "9"],
            &["CLIENT", "PAUSE", "600000", "WRITE"],
            &["MPOOL.STATUS"],
        ],
    );
    refused_loading(&replies[3]);
    client.wait_until_ready();
    assert_eq!(
        client.slots("a"),
        Some(9),
        "a write while clients are paused"
    );
    client.ok(&["CLIENT", "UNPAUSE"]);
    check_pool(&mut client, &before);
}

#[test]
fn the_module_can_go_while_the_keyspace_is_read() {
    let (mut server, mut client, before) = large_pool();
    for _ in 0..3 {
        client.ok(&["SWAPDB", "0", "1"]);
        let replies = at_one_blow(
            &mut client,
            &[
                &["SWAPDB", "0", "1"],
                &["MPOOL.STATUS"],
                &["DEBUG", "DIGEST"],
            ],
        );
        refused_loading(&replies[1]);
        // Whose last command was the module's would be closed.
        client.ok(&["PING"]);
        client.unload();
        let digest: String = client.run(&["DEBUG", "DIGEST"]);
        assert_eq!(digest, text(replies[2].as_ref().unwrap()));
        client.load(&server);
    }
    client.wait_until_ready();
    check_pool(&mut client, &before);
    assert!(server.is_alive());
}

/// More account files than are read at once, or brought in by a few commands.
const MANY_FILES: usize = 2_000;
const READS_FILES: &str = "reading the account files; until that is done";

fn many_files() -> Options {
    (0..MANY_FILES).fold(Options::default(), |options, number| {
        options.file(&format!("medium/f{number}"), &bearer("f"))
    })
}

/// A pool of many accounts, six of them lent; a client of its server, and those
/// leases.
fn pool_of_many_files() -> (Server, Client, Vec<Lease>) {
    let server = many_files().start();
    let mut client = server.connect();
    client.register(6);
    let before = leases(&mut client);
    wait_for("a counter of each account", || {
        (client.run::<usize>(&["DBSIZE"]) == MANY_FILES + 2 * 6).then_some(())
    });
    (server, client, before)
}

#[test]
fn many_account_files_are_read_beside_a_running_server() {
    let (mut server, mut client, before) = pool_of_many_files();
    // A server that starts answers nobody anyway, and then has them all.
    assert!(!server.log().contains(READS_FILES));
    client.unload();
    let mut client = server.connect();
    let load = server.load_words();
    let load: Vec<&str> = load.iter().map(String::as_str).collect();
    check_a_large_keyspace_is_read_in_portions(&mut client, &load, &before);
    assert!(server.log().contains(READS_FILES));
    assert_eq!(
        client.info("mpool", "mpool_accounts"),
        MANY_FILES.to_string()
    );
    // What has happened to the files without the module.
    let [gone, kept] = [&before[0].account, &before[1].account];
    client.ok(&["PING"]);
    client.unload();
    server.remove_account(&format!("medium/{gone}"));
    server.write_account("medium/new", &bearer("new"));
    // In a transaction all would be done at once, but it can't be yet.
    let replies = at_one_blow(
        &mut client,
        &[&load, &["MULTI"], &["MPOOL.REPAIR"], &["EXEC"]],
    );
    let repaired = format!("{:?}", replies[3]);
    assert!(repaired.contains("is reading the keyspace"), "{repaired}");
    client.wait_until_ready();
    assert_eq!(client.acquire(&numbered_key(0), NOW).state, "failover");
    assert_eq!(&client.acquire(&numbered_key(1), NOW).account, kept);
    client.wait_for_account(gone, false);
    client.wait_for_account("new", true);
    client.check_invariants(2);
    client.check_repair();
    assert!(server.is_alive());
}

#[test]
fn the_module_can_go_while_many_account_files_are_read() {
    let (mut server, mut client, before) = pool_of_many_files();
    for _ in 0..3 {
        client.ok(&["PING"]);
        client.unload();
        let load = server.load_words();
        let load: Vec<&str> = load.iter().map(String::as_str).collect();
        let unload = ["MODULE", "UNLOAD", "mpool"];
        let replies = at_one_blow(&mut client, &[&load, &unload, &["DEBUG", "DIGEST"]]);
        assert!(replies[0].is_ok(), "{replies:?}");
        if replies[1].is_err() {
            client.unload();
        }
        let digest: String = client.run(&["DEBUG", "DIGEST"]);
        assert_eq!(digest, text(replies[2].as_ref().unwrap()));
        client.load(&server);
    }
    client.wait_until_ready();
    check_pool(&mut client, &before);
    assert!(server.is_alive());
}

#[test]
fn a_replica_reads_many_account_files_and_is_promoted_meanwhile() {
    let (primary, mut client, before) = pool_of_many_files();
    let mut replica = many_files().replica_of(&primary).start();
    let mut other = replica.connect();
    wait_for_same(&mut client, &mut other);
    for promoted in [false, true] {
        other.unload();
        let mut other = replica.connect();
        let load = replica.load_words();
        let load: Vec<&str> = load.iter().map(String::as_str).collect();
        let promote: &[&str] = if promoted {
            &["REPLICAOF", "NO", "ONE"]
        } else {
            &["PING"]
        };
        let replies = at_one_blow(&mut other, &[&load, &["MPOOL.STATUS"], promote]);
        refused_loading(&replies[1]);
        other.wait_until_ready();
        assert_eq!(
            other.info("mpool", "mpool_accounts"),
            MANY_FILES.to_string()
        );
        assert_eq!(client.traces().0, other.traces().0);
        if promoted {
            check_pool(&mut other, &before);
        }
    }
    assert!(replica.is_alive());
}

/// The accounts of all leases that STATUS shows.
fn lent(client: &mut Client) -> Vec<String> {
    let rows = client.pages("LEASES", "medium", "100");
    let mut accounts: Vec<String> = rows.iter().map(|row| text(&row["account"])).collect();
    accounts.sort();
    accounts
}

#[test]
fn a_replica_reads_its_keyspace_and_is_promoted_meanwhile() {
    let (primary, mut client, before) = large_pool();
    for writable in ["no", "yes"] {
        let options = Options::default().accounts(&ACCOUNTS);
        let mut replica = options
            .server(&[
                "--replica-read-only",
                if writable == "yes" { "no" } else { "yes" },
            ])
            .replica_of(&primary)
            .start();
        let mut other = replica.connect();
        wait_for_same(&mut client, &mut other);
        other.unload();
        let mut other = replica.connect();
        let load = replica.load_words();
        let load = load.iter().map(String::as_str).collect::<Vec<_>>();
        // As a replica it reads on its own, and has the leases that its primary has.
        let replies = at_one_blow(&mut other, &[&load, &["MPOOL.STATUS"]]);
        refused_loading(&replies[1]);
        other.wait_until_ready();
        assert_eq!(other.info("mpool", "mpool_leases"), "6");
        assert_eq!(lent(&mut other), lent(&mut client));
        // It begins again by itself when it may be wrong.
        other.ok(&["PING"]);
        other.unload();
        let mut other = replica.connect();
        let replies = at_one_blow(&mut other, &[&load, &["MPOOL.STATUS"], &["MPOOL.PANIC"]]);
        refused_loading(&replies[1]);
        other.wait_until_ready();
        assert_eq!(lent(&mut other), lent(&mut client));
        // Promoted amid it, with something to put right, it does so when it has read all.
        other.ok(&["PING"]);
        other.unload();
        let mut other = replica.connect();
        let holder = numbered_key(0);
        let acquire = ["MPOOL.ACQUIRE", &holder, "1755266400000"];
        let replies = at_one_blow(
            &mut other,
            &[
                &load,
                &["REPLICAOF", "NO", "ONE"],
                &["SET", "medium_pool:slots:a", "9"],
                &acquire,
            ],
        );
        refused_loading(&replies[3]);
        let names = ACCOUNTS.map(|account| format!("medium_pool:slots:{account}"));
        let looks = watch_until_ready(&mut other, &names.each_ref().map(String::as_str), |_, _| ());
        assert!(looks > 10, "it was over after {looks} looks");
        wait_for("the counter to be put right", || {
            (other.slots("a") != Some(9)).then_some(())
        });
        check_pool(&mut other, &before);
        // A full copy begins with a flush.
        let swap = ["SWAPDB", "0", "1"];
        other.ok(&swap);
        let port = primary.port.to_string();
        let replies = at_one_blow(
            &mut other,
            &[
                &swap,
                &["MPOOL.STATUS"],
                &["REPLICAOF", primary.host(), &port],
            ],
        );
        refused_loading(&replies[1]);
        wait_for_same(&mut client, &mut other);
        other.wait_until_ready();
        assert_eq!(lent(&mut other), lent(&mut client));
        assert!(replica.is_alive());
    }
}
