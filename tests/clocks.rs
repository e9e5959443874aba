//! Callers whose clocks are off: what becomes of the leases, that no invariant
//! ever breaks, and how `max-clock-skew-ms` keeps such callers out. What
//! `docs/reliability.md` says of clocks is proved here, by name.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop anywhere"
)]

mod support;

use rand::{RngExt, SeedableRng, rngs::SmallRng};
use redis::Value;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};
use support::*;

/// What the callers whose clocks are right take for the time.
const NOW: i64 = 1_755_266_400_000;
/// Decades after any server's clock, before the keys of the tests end.
const FAR: i64 = 3_000_000_000_000;
const HOUR: i64 = 3_600_000;

fn keys(client: &mut Client, count: usize) -> Vec<String> {
    (0..count).map(|_| client.pool_key()).collect()
}

/// The keyspace agrees with itself and with the view.
#[track_caller]
fn check(client: &mut Client) {
    client.check_invariants(2);
    client.check_repair();
}

fn server_clock() -> i64 {
    let since = SystemTime::UNIX_EPOCH.elapsed().unwrap();
    i64::try_from(since.as_millis()).unwrap()
}

#[test]
fn a_caller_ahead_ends_leases_early() {
    let server = Options::default().accounts(&["a"]).start();
    let mut client = server.connect();
    let keys = keys(&mut client, 3);
    client.acquire(&keys[0], NOW);
    client.acquire(&keys[1], NOW);
    // Its own key's: rotated a day before its time.
    let ahead = client.acquire(&keys[0], NOW + DAY);
    assert_eq!(ahead.state, "rotated");
    // And, as it had to choose, the overdue one of a key that it never named.
    assert_eq!(client.holds(&keys[1]), None);
    check(&mut client);
    let other = client.acquire(&keys[1], NOW + 1);
    assert_eq!(
        (other.state.as_str(), other.next),
        ("failover", Some(NOW + 1 + DAY))
    );
    check(&mut client);
}

#[test]
fn a_caller_ahead_can_fill_the_pool_with_what_it_took_from_others() {
    let server = Options::default().accounts(&["a"]).start();
    let mut client = server.connect();
    let keys = keys(&mut client, 4);
    client.acquire(&keys[0], NOW);
    client.acquire(&keys[1], NOW);
    client.acquire(&keys[2], NOW + DAY);
    client.acquire(&keys[3], NOW + DAY);
    let error = client.refused("POOLFULL", &["MPOOL.ACQUIRE", &keys[0], &NOW.to_string()]);
    assert!(error.ends_with(&format!(" {}", NOW + 2 * DAY)), "{error}");
    check(&mut client);
}

#[test]
fn a_lease_taken_ahead_ends_late_by_as_much_and_no_later() {
    let server = Options::default().accounts(&["a", "b"]).start();
    let mut client = server.connect();
    let keys = keys(&mut client, 5);
    let ahead = client.acquire(&keys[0], NOW + DAY);
    assert_eq!(
        (ahead.last, ahead.next),
        (Some(NOW + DAY), Some(NOW + 2 * DAY))
    );
    // Before it has begun and 47 hours on it is current, and written by nobody.
    for now in [NOW, NOW + DAY, NOW + 2 * DAY - 1] {
        let lease = client.acquire(&keys[0], now);
        assert_eq!((lease.state.as_str(), lease.next), ("current", ahead.next));
    }
    for key in &keys[1..4] {
        client.acquire(key, NOW + 2 * DAY - 1);
    }
    client.refused(
        "POOLFULL",
        &["MPOOL.ACQUIRE", &keys[4], &(NOW + 2 * DAY - 1).to_string()],
    );
    assert_eq!(
        client.acquire(&keys[4], NOW + 2 * DAY).account,
        ahead.account
    );
    check(&mut client);
}

#[test]
fn a_caller_behind_ends_no_lease_and_one_it_takes_ends_early() {
    let server = Options::default().accounts(&["a", "b"]).start();
    let mut client = server.connect();
    let keys = keys(&mut client, 2);
    let right = client.acquire(&keys[0], NOW);
    let behind = client.acquire(&keys[0], NOW + DAY + HOUR - DAY);
    assert_eq!(
        (behind.state.as_str(), behind.next),
        ("current", right.next)
    );
    let behind = client.acquire(&keys[1], NOW - DAY);
    assert_eq!(behind.next, Some(NOW));
    assert_eq!(client.holds(&keys[0]), Some(right.account));
    assert_eq!(client.acquire(&keys[1], NOW).state, "rotated");
    check(&mut client);
}

#[test]
fn a_cooldown_lasts_by_the_clock_of_who_asked_for_it() {
    let server = Options::default().accounts(&["a"]).start();
    let mut client = server.connect();
    let key = client.pool_key();
    let cool = |client: &mut Client, now: i64| {
        client.ok(&["MPOOL.COOLDOWN", "medium", "a", &now.to_string(), "60000"]);
    };
    let acquire = |now: i64| ["MPOOL.ACQUIRE", &key, &now.to_string()].map(str::to_owned);
    // By one who is behind it is over at once for the others.
    cool(&mut client, NOW - DAY);
    assert_eq!(client.acquire(&key, NOW).account, "a");
    // By one ahead it lasts a day longer.
    cool(&mut client, NOW + DAY);
    assert_eq!(client.holds(&key), None);
    let late = acquire(NOW + DAY + 59_999);
    let error = client.refused("NOACCOUNT", &late.each_ref().map(String::as_str));
    assert!(
        error.ends_with(&format!(" {}", NOW + DAY + 60_000)),
        "{error}"
    );
    assert_eq!(client.acquire(&key, NOW + DAY + 60_000).account, "a");
    // The others see that lease on an account that is cooling down, and move on.
    let early = acquire(NOW);
    client.refused("NOACCOUNT", &early.each_ref().map(String::as_str));
    check(&mut client);
}

#[test]
fn an_end_that_has_come_for_one_caller_has_not_for_another() {
    let server = Options::default()
        .file(
            "medium/a",
            &format!(
                r#"{{"access_token": "t", "expires_at": {}}}"#,
                NOW + 2 * HOUR
            ),
        )
        .start();
    let mut client = server.connect();
    let key = text(
        &client.map(&[
            "MPOOL.KEYGEN",
            "medium",
            "POOL",
            "DAYS",
            "1",
            "NOW",
            &(NOW - HOUR).to_string(),
        ])["key"],
    );
    let long = client.pool_key();
    client.acquire(&key, NOW);
    let ahead = (NOW + DAY).to_string();
    client.refused("EXPIRED", &["MPOOL.ACQUIRE", &key, &ahead]);
    client.refused("NOACCOUNT", &["MPOOL.ACQUIRE", &long, &ahead]);
    assert_eq!(client.acquire(&key, NOW + 1).state, "current");
    assert_eq!(client.acquire(&long, NOW + 1).state, "assigned");
    check(&mut client);
}

/// Callers on connections of their own, the clocks of some a day ahead or
/// behind, all of them jumping: whoever looks in between finds every invariant
/// true, and REPAIR finds nothing.
#[test]
fn callers_a_day_apart_never_break_an_invariant() {
    let accounts = ["a", "b", "c", "d"];
    let server = Options::default().accounts(&accounts).start();
    let mut client = server.connect();
    let keys = keys(&mut client, 12);
    let over = AtomicBool::new(false);
    let seed: u64 = seeded().random();
    let counts: Vec<BTreeMap<String, u64>> = std::thread::scope(|scope| {
        let callers = [-DAY, 0, 0, DAY]
            .into_iter()
            .enumerate()
            .map(|(number, off)| {
                let (keys, over, mut client) = (&keys, &over, server.connect());
                let mut rng = SmallRng::seed_from_u64(seed ^ number as u64);
                scope.spawn(move || {
                    let (mut now, mut counts) = (NOW + off, BTreeMap::new());
                    while !over.load(Ordering::Relaxed) {
                        now += [1, HOUR, -HOUR, DAY, -DAY][rng.random_range(0..5)];
                        // Never further than that from the others.
                        now = now.clamp(NOW + off - DAY, NOW + off + DAY);
                        let key = &keys[rng.random_range(0..keys.len())];
                        let account = accounts[rng.random_range(0..accounts.len())];
                        let at = now.to_string();
                        let words = match rng.random_range(0..10) {
                            0 => vec!["MPOOL.RELEASE", key, &at],
                            1 => vec!["MPOOL.COOLDOWN", "medium", account, &at, "3600000"],
                            2 => vec!["MPOOL.COOLDOWN", "medium", account, &at, "0"],
                            _ => vec!["MPOOL.ACQUIRE", key, &at],
                        };
                        let kind = match client.try_run::<BTreeMap<String, Value>>(&words) {
                            Ok(reply) => reply.get("state").map_or(words[0].to_owned(), text),
                            Err(error) => error.code().unwrap_or_default().to_owned(),
                        };
                        *counts.entry(kind).or_default() += 1;
                    }
                    counts
                })
            });
        let callers: Vec<_> = callers.collect();
        let until = std::time::Instant::now() + Duration::from_secs(3);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            while std::time::Instant::now() < until {
                client.check_invariants(2);
                client.check_repair();
            }
        }));
        over.store(true, Ordering::Relaxed);
        let counts = callers
            .into_iter()
            .map(|caller| caller.join().unwrap())
            .collect();
        if let Err(failure) = outcome {
            std::panic::resume_unwind(failure);
        }
        counts
    });
    println!("{counts:?}");
    let known = [
        "MPOOL.RELEASE",
        "MPOOL.COOLDOWN",
        "assigned",
        "current",
        "rotated",
        "failover",
        "POOLFULL",
        "NOACCOUNT",
    ];
    for kind in counts.iter().flat_map(BTreeMap::keys) {
        assert!(known.contains(&kind.as_str()), "{kind}");
    }
    for kind in ["assigned", "current", "rotated", "failover", "POOLFULL"] {
        assert!(
            counts.iter().any(|counts| counts.contains_key(kind)),
            "no {kind}: {counts:?}"
        );
    }
    check(&mut client);
    // Once all clocks are right, all is as it should be two days on.
    for key in &keys {
        let _ = client.try_acquire(key, NOW + 4 * DAY);
    }
    for lease in client.pages("LEASES", "medium", "1000") {
        assert_eq!(
            optional_number(&lease["last_rotation"]),
            Some(NOW + 4 * DAY)
        );
    }
    check(&mut client);
}

#[test]
fn a_now_too_far_from_the_servers_clock_is_refused_and_changes_nothing() {
    let server = Options::default()
        .accounts(&["a", "b"])
        .module(&["max-clock-skew-ms", "60000"])
        .start();
    let mut client = server.connect();
    let key = text(&client.map(&["MPOOL.KEYGEN", "medium", "POOL"])["key"]);
    client.ok(&["MPOOL.ACQUIRE", &key, "*"]);
    for off in [-DAY, DAY, -70_000, 70_000] {
        let before = server_clock();
        let now = (before + off).to_string();
        for words in [
            &["MPOOL.ACQUIRE", &key, &now][..],
            &["MPOOL.ACQUIRE", &key, &now, "WITHTOKEN"],
            &["MPOOL.ACQUIRE", "nobody", &now],
            &["MPOOL.RELEASE", &key, &now],
            &["MPOOL.COOLDOWN", "medium", "a", &now, "1000"],
            &["MPOOL.COOLDOWN", "medium", "a", &now, "0"],
            &["MPOOL.KEYGEN", "medium", "POOL", "NOW", &now],
        ] {
            let error = client.refused("CLOCKSKEW", words);
            // It says what would be accepted, and that is.
            let numbers: Vec<i64> = error
                .split([' ', ','])
                .filter_map(|word| word.parse().ok())
                .collect();
            assert_eq!(numbers.len(), 2, "{error}");
            let clock = numbers[0] + 60_000;
            assert_eq!(numbers[1], clock + 60_000, "{error}");
            assert!((before..=server_clock()).contains(&clock), "{error}");
            assert!(!error.contains(&now), "{error} repeats what was sent");
        }
        // Asking changes nothing and is free.
        client.ok(&["MPOOL.STATUS", "NOW", &now]);
        client.ok(&["MPOOL.STATUS", "KEY", &key, "NOW", &now]);
        client.ok(&["MPOOL.STATUS", "ACCOUNTS", "medium", "NOW", &now]);
    }
    assert_eq!(client.info("mpool", "mpool_refused_clockskew"), "12");
    for off in [-50_000, 50_000] {
        client.acquire(&key, server_clock() + off);
    }
    check(&mut client);
}

#[test]
fn the_servers_own_clock_is_never_refused() {
    let server = Options::default()
        .accounts(&["a"])
        .module(&["max-clock-skew-ms", "1"])
        .start();
    let mut client = server.connect();
    let key = text(&client.map(&["MPOOL.KEYGEN", "medium", "POOL", "NOW", "*"])["key"]);
    for _ in 0..300 {
        client.ok(&["MPOOL.ACQUIRE", &key, "*"]);
        client.ok(&["MPOOL.COOLDOWN", "medium", "a", "*", "0"]);
        client.ok(&["MPOOL.RELEASE", &key, "*"]);
    }
    client.ok(&["MPOOL.RELEASE", &key]);
    client.ok(&["MPOOL.KEYGEN", "medium", "POOL"]);
    client.refused("CLOCKSKEW", &["MPOOL.ACQUIRE", &key, "0"]);
}

#[test]
fn the_skew_can_be_set_at_run_time_and_is_off_at_first() {
    let server = Options::default().accounts(&["a"]).start();
    let mut client = server.connect();
    let key = client.pool_key();
    client.acquire(&key, 0);
    client.ok(&["CONFIG", "SET", "mpool.max-clock-skew-ms", "1000"]);
    client.refused("CLOCKSKEW", &["MPOOL.ACQUIRE", &key, "1"]);
    client.ok(&["CONFIG", "SET", "mpool.max-clock-skew-ms", "0"]);
    assert_eq!(client.acquire(&key, 1).state, "current");
    assert_eq!(client.acquire(&key, FAR).state, "rotated");
    check(&mut client);
}

/// What replicas and an append-only file get is what came of the commands, and
/// nobody judges that again.
#[test]
fn replicas_and_the_append_only_file_apply_no_skew() {
    let mut server = Options::default()
        .accounts(&["a", "b"])
        .server(&["--appendonly", "yes"])
        .start();
    let replica = Options::default()
        .accounts(&["a", "b"])
        .module(&["max-clock-skew-ms", "1000"])
        .replica_of(&server)
        .start();
    let mut client = server.connect();
    let keys = keys(&mut client, 3);
    for key in &keys {
        // Both are years away from the server's clock.
        client.acquire(key, 1000);
        client.acquire(key, FAR);
    }
    client.ok(&["MPOOL.COOLDOWN", "medium", "a", &FAR.to_string(), "1000"]);
    let mut follower = replica.connect();
    wait_for_same(&mut client, &mut follower);
    follower.check_invariants(2);
    let held: Vec<Option<String>> = keys.iter().map(|key| client.holds(key)).collect();
    client.ok(&["CONFIG", "SET", "mpool.max-clock-skew-ms", "1000"]);
    let before = client.traces().0;
    client.ok(&["DEBUG", "LOADAOF"]);
    assert_eq!(client.traces().0, before);
    client.refused("CLOCKSKEW", &["MPOOL.ACQUIRE", &keys[0], "1000"]);
    assert_eq!(
        keys.iter().map(|key| client.holds(key)).collect::<Vec<_>>(),
        held
    );
    check(&mut client);
    // A restart reads the file too, with the setting there from the start.
    server.shutdown();
    server.add_module_args(&["max-clock-skew-ms", "1000"]);
    server.launch();
    let mut client = server.connect();
    assert_eq!(client.traces().0, before);
    client.refused("CLOCKSKEW", &["MPOOL.ACQUIRE", &keys[0], "1000"]);
    check(&mut client);
    assert!(server.is_alive());
}
