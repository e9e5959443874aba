//! Many connections at once on few accounts: at no sampled moment is an account
//! over its slots, and in the end there is nothing to repair.
//! `MPOOL_HAMMER_SECONDS` says for how long (2).
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop anywhere"
)]

mod support;

use rand::{RngExt, SeedableRng, rngs::SmallRng};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};
use support::*;

const CONNECTIONS: u64 = 64;
const ACCOUNTS: [&str; 10] = ["a0", "a1", "a2", "a3", "a4", "a5", "a6", "a7", "a8", "a9"];

#[test]
fn slots_hold_under_many_connections() {
    let seconds =
        std::env::var("MPOOL_HAMMER_SECONDS").map_or(2, |seconds| seconds.parse().unwrap());
    let mut server = Options::default().accounts(&ACCOUNTS).start();
    let (clock, over) = (AtomicI64::new(1000), AtomicBool::new(false));
    let (counts, samples) = std::thread::scope(|scope| {
        let (server, clock, over) = (&server, &clock, &over);
        let workers: Vec<_> = (0..CONNECTIONS)
            .map(|seed| scope.spawn(move || hammer(server.connect(), seed, clock, over)))
            .collect();
        let sampler = scope.spawn(move || sample(server.connect(), over));
        std::thread::sleep(Duration::from_secs(seconds));
        over.store(true, Ordering::Relaxed);
        let mut counts = BTreeMap::<String, u64>::new();
        for worker in workers {
            for (what, count) in worker.join().unwrap() {
                *counts.entry(what).or_default() += count;
            }
        }
        (counts, sampler.join().unwrap())
    });
    println!("{seconds} s, {CONNECTIONS} connections, {samples} samples: {counts:?}");
    // Everything must have happened, or it was no test.
    for what in [
        "assigned", "current", "rotated", "POOLFULL", "released", "revoked",
    ] {
        assert!(
            counts.get(what).is_some_and(|&count| count > 0),
            "{what} never happened: {counts:?}"
        );
    }
    assert!(samples > 0);
    let mut client = server.connect();
    client.check_invariants(2);
    client.check_repair();
    assert!(server.is_alive());
}

/// One connection's work with a key of its own; answers what came of it.
fn hammer(
    mut client: Client,
    seed: u64,
    clock: &AtomicI64,
    over: &AtomicBool,
) -> BTreeMap<String, u64> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut counts = BTreeMap::<String, u64>::new();
    let mut key = client.pool_key();
    while !over.load(Ordering::Relaxed) {
        let what = match rng.random_range(0..100) {
            0..90 => match client.try_acquire(&key, clock.load(Ordering::Relaxed)) {
                Ok(lease) => lease.state,
                Err(error) => {
                    assert!(error.starts_with("POOLFULL"), "{error}");
                    "POOLFULL".to_owned()
                }
            },
            90..93 => {
                client.ok(&["MPOOL.RELEASE", &key]);
                "released".to_owned()
            }
            93..95 => {
                client.ok(&["MPOOL.REVOKE", &key]);
                // Records of keys that are no more would only slow the sampling.
                client.ok(&["DEL", &format!("client_keys:{key}")]);
                key = client.pool_key();
                "revoked".to_owned()
            }
            _ => {
                // One clock for all, on which a lease lasts for a moment.
                clock.fetch_add(DAY / 50, Ordering::Relaxed);
                "later".to_owned()
            }
        };
        *counts.entry(what).or_default() += 1;
    }
    counts
}

/// Looks at the slots again and again; answers how often.
fn sample(mut client: Client, over: &AtomicBool) -> u64 {
    let mut samples = 0;
    while !over.load(Ordering::Relaxed) {
        client.check_invariants(2);
        samples += 1;
        // A breath for the others: the look itself holds the server up.
        std::thread::sleep(Duration::from_millis(1));
    }
    samples
}

#[test]
fn the_clients_are_served_while_account_files_come_and_go() {
    let mut server = Options::default().accounts(&ACCOUNTS).start();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (server, over) = (&server, &over);
        let workers: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(move || {
                    let mut client = server.connect();
                    let key = client.pool_key();
                    let mut served = 0;
                    while !over.load(Ordering::Relaxed) {
                        // 8 keys on at least 9 accounts: there is always a slot.
                        client.acquire(&key, 1000);
                        served += 1;
                    }
                    served
                })
            })
            .collect();
        let deadline = Instant::now() + Duration::from_secs(2);
        let mut control = server.connect();
        let mut changes = 0;
        while Instant::now() < deadline || changes < 20 {
            let account = ACCOUNTS[changes % ACCOUNTS.len()];
            server.remove_account(&format!("medium/{account}"));
            control.wait_for_account(account, false);
            control.check_invariants(2);
            server.write_account(&format!("medium/{account}"), &bearer(account));
            control.wait_for_account(account, true);
            changes += 1;
        }
        over.store(true, Ordering::Relaxed);
        for worker in workers {
            assert!(worker.join().unwrap() > 0);
        }
        control.check_invariants(2);
        control.check_repair();
    });
    assert!(server.is_alive());
}
