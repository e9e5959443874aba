//! MPOOL.REPAIR of a large pool while others work: they are served meanwhile,
//! and the view that it makes has all that they do.
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

fn key(number: usize) -> String {
    format!("key-{number:06}")
}

fn register(client: &mut Client, keys: usize) {
    for portion in (0..keys).collect::<Vec<_>>().chunks(1_000) {
        let mut pipe = redis::pipe();
        for &number in portion {
            let name = format!("client_keys:{}", key(number));
            let record = ["tier", "medium", "use_pool", "true", "active", "true"];
            pipe.cmd("HSET").arg(name).arg(&record).ignore();
        }
        pipe.query::<()>(&mut client.connection).unwrap();
    }
}

/// A server with so many keys, of which the first few hold slots.
fn pool(keys: usize) -> Server {
    let server = Options::default().accounts(&ACCOUNTS).start();
    let mut client = server.connect();
    register(&mut client, keys);
    for number in 0..6 {
        client.acquire(&key(number), NOW);
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
            assert_eq!(other.acquire(&key(0), NOW).state, "current");
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
    let name = key(round % 40);
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
            let record = format!("client_keys:{}", key(round + 100));
            client.ok(&["HSET", &record, "tier", "high"]);
        }
        6 => client.ok(&["DEL", &format!("client_keys:{}", key(round + 103))]),
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
        register(&mut other, 200);
        other.acquire(&key(0), NOW);
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
    // By then, nothing is left to do but to write.
    thread::sleep(Duration::from_secs(2));
    let before = cpu_time(server.pid());
    thread::sleep(Duration::from_secs(1));
    let taken = cpu_time(server.pid()) - before;
    assert!(is_under_way(&mut other));
    other.ok(&["CLIENT", "UNPAUSE"]);
    let repaired = repaired(&mut one);
    assert_eq!(repaired["changed"], 0, "{repaired:?}");
    assert!(taken <= Duration::from_millis(200), "{taken:?} in a second");
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
