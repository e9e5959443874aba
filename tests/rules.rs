//! The rules of lending, on a real server, time moved by passing numbers.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop anywhere"
)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use support::*;

/// The instant at which most of this begins.
const NOW: i64 = 1_755_266_400_000;

fn keys(client: &mut Client, count: usize) -> Vec<String> {
    (0..count).map(|_| client.pool_key()).collect()
}

/// After every story: the keyspace agrees with itself and with the view.
#[track_caller]
fn check(client: &mut Client) {
    client.check_invariants(2);
    client.check_repair();
}

#[test]
fn the_least_used_account_is_lent() {
    let server = Options::default().accounts(&["a", "b", "c", "d"]).start();
    let mut client = server.connect();
    let keys = keys(&mut client, 9);
    let first: BTreeSet<String> = keys[..4]
        .iter()
        .map(|key| client.acquire(key, NOW).account)
        .collect();
    assert_eq!(first.len(), 4, "an empty account comes before one in use");
    let second: BTreeSet<String> = keys[4..8]
        .iter()
        .map(|key| client.acquire(key, NOW).account)
        .collect();
    assert_eq!(second.len(), 4, "one slot in use comes before two");
    client.refused("POOLFULL", &["MPOOL.ACQUIRE", &keys[8], &NOW.to_string()]);
    // Whoever frees a slot decides where the next one goes.
    let account = client.holds(&keys[2]).unwrap();
    client.ok(&["MPOOL.RELEASE", &keys[2]]);
    assert_eq!(client.acquire(&keys[8], NOW).account, account);
    check(&mut client);
}

#[test]
fn ties_are_broken_at_random() {
    let names = ["a", "b", "c", "d", "e"];
    let server = Options::default().accounts(&names).start();
    let mut client = server.connect();
    let mut chosen = BTreeMap::<String, u32>::new();
    for _ in 0..300 {
        let key = client.pool_key();
        *chosen.entry(client.acquire(&key, NOW).account).or_default() += 1;
        client.ok(&["MPOOL.REVOKE", &key]);
    }
    // 60 each on average; fewer than 20 has a chance below 1 in 10^9.
    assert_eq!(chosen.len(), names.len(), "{chosen:?}");
    assert!(chosen.values().all(|&count| count >= 20), "{chosen:?}");
}

#[test]
fn a_rotation_leaves_the_previous_account_while_another_ties() {
    let server = Options::default().accounts(&["a", "b", "c"]).start();
    let mut client = server.connect();
    let key = client.pool_key();
    let mut lease = client.acquire(&key, NOW);
    let mut seen = BTreeSet::new();
    for day in 1..40 {
        let next = client.acquire(&key, NOW + day * DAY);
        assert_eq!(next.state, "rotated");
        assert_ne!(next.account, lease.account, "day {day}");
        assert_eq!(next.previous.as_ref(), Some(&lease.account));
        seen.insert(next.account.clone());
        lease = next;
    }
    assert_eq!(seen.len(), 3, "both others are chosen");
    // After a release it is the same: the account before is on record.
    for _ in 0..20 {
        client.ok(&["MPOOL.RELEASE", &key]);
        let next = client.acquire(&key, NOW + 50 * DAY);
        assert_eq!(next.state, "assigned");
        assert_ne!(next.account, lease.account);
        lease = next;
    }
    check(&mut client);
    // Alone, or less used than the others, it is lent again.
    server.remove_account("medium/b");
    server.remove_account("medium/c");
    client.ok(&["MPOOL.RELOAD"]);
    for day in 60..63 {
        assert_eq!(client.acquire(&key, NOW + day * DAY).account, "a");
    }
    check(&mut client);
}

#[test]
fn the_previous_account_is_lent_again_when_the_others_are_used_more() {
    let server = Options::default().accounts(&["a", "b"]).start();
    let mut client = server.connect();
    let keys = keys(&mut client, 2);
    let mine = client.acquire(&keys[0], NOW).account;
    client.acquire(&keys[1], NOW + DAY / 2);
    let lease = client.acquire(&keys[0], NOW + DAY);
    assert_eq!((lease.state.as_str(), &lease.account), ("rotated", &mine));
    check(&mut client);
}

#[test]
fn a_lease_lasts_24_hours_to_the_millisecond() {
    let server = Options::default().accounts(&["a", "b"]).start();
    let mut client = server.connect();
    let key = client.pool_key();
    let first = client.acquire(&key, NOW);
    assert_eq!((first.last, first.next), (Some(NOW), Some(NOW + DAY)));
    for now in [NOW, NOW + 1, NOW + DAY / 2, NOW + DAY - 1] {
        let lease = client.acquire(&key, now);
        assert_eq!(
            lease,
            Lease {
                state: "current".to_owned(),
                ..first.clone()
            },
            "at {now}"
        );
    }
    let second = client.acquire(&key, NOW + DAY);
    assert_eq!(
        (second.state.as_str(), second.last, second.next),
        ("rotated", Some(NOW + DAY), Some(NOW + 2 * DAY))
    );
    // Late is as good as in time, and the next period counts from then.
    let late = client.acquire(&key, NOW + 5 * DAY + 17);
    assert_eq!(
        (late.state.as_str(), late.last, late.next),
        (
            "rotated",
            Some(NOW + 5 * DAY + 17),
            Some(NOW + 6 * DAY + 17)
        )
    );
    check(&mut client);
}

#[test]
fn a_key_that_holds_a_slot_is_never_refused_at_its_rotation() {
    let server = Options::default().accounts(&["a", "b"]).start();
    let mut client = server.connect();
    let keys = keys(&mut client, 5);
    for (at, key) in (0..).zip(&keys[..4]) {
        client.acquire(key, NOW + at);
    }
    for day in 1..5 {
        // All is full, and each rotates while the others hold on.
        for (at, key) in (0..).zip(&keys[..4]) {
            client.refused(
                "POOLFULL",
                &[
                    "MPOOL.ACQUIRE",
                    &keys[4],
                    &(NOW + at + day * DAY - 1).to_string(),
                ],
            );
            assert_eq!(client.acquire(key, NOW + at + day * DAY).state, "rotated");
            client.check_invariants(2);
        }
    }
    check(&mut client);
}

#[test]
fn idle_keys_never_block_a_slot_past_their_24_hours() {
    let server = Options::default().accounts(&["a", "b"]).start();
    let mut client = server.connect();
    let keys = keys(&mut client, 8);
    for (at, key) in (0..).zip(&keys[..4]) {
        client.acquire(key, NOW + at);
    }
    // One by one, as their time comes.
    for (at, key) in (0..).zip(&keys[4..6]) {
        client.refused(
            "POOLFULL",
            &["MPOOL.ACQUIRE", key, &(NOW + at + DAY - 1).to_string()],
        );
        let lease = client.acquire(key, NOW + at + DAY);
        assert_eq!(lease.state, "assigned");
        assert_eq!(
            client.holds(&keys[at as usize]),
            None,
            "the longest overdue goes"
        );
        client.check_invariants(2);
    }
    // All at once, much later, and they begin a new period.
    for key in &keys[6..8] {
        client.acquire(key, NOW + 10 * DAY);
    }
    assert_eq!(client.slots("a"), Some(1), "whatever was overdue is gone");
    assert_eq!(client.slots("b"), Some(1));
    assert_eq!(client.acquire(&keys[0], NOW + 10 * DAY).state, "rotated");
    check(&mut client);
}

#[test]
fn many_overdue_leases_are_all_freed_in_the_end() {
    let names: Vec<String> = (0..150).map(|number| format!("account{number}")).collect();
    let mut options = Options::default();
    for name in &names {
        options = options.file(&format!("medium/{name}"), &bearer(name));
    }
    let server = options.start();
    let mut client = server.connect();
    let keys = keys(&mut client, 301);
    for key in &keys[..300] {
        client.acquire(key, NOW);
    }
    client.refused("POOLFULL", &["MPOOL.ACQUIRE", &keys[300], &NOW.to_string()]);
    for round in 0..8 {
        client.acquire(&keys[300], NOW + DAY + round * 2 * DAY);
        client.check_invariants(2);
    }
    let used: i64 = client.info("mpool", "mpool_medium_used").parse().unwrap();
    assert_eq!(used, 1, "all 300 have gone");
    check(&mut client);
}

/// What makes an account of no use.
type Loss = fn(&Server, &mut Client, &str);

#[test]
fn a_lost_account_is_followed_by_another_without_an_error() {
    let cool: Loss =
        |_, client, name| client.ok(&["MPOOL.COOLDOWN", "medium", name, &NOW.to_string(), "5000"]);
    let remove: Loss = |server, client, name| {
        server.remove_account(&format!("medium/{name}"));
        client.wait_for_account(name, false);
    };
    let spoil: Loss = |server, client, name| {
        server.write_account(&format!("medium/{name}"), "{}");
        client.wait_for_account(name, false);
    };
    let expire: Loss = |server, client, name| {
        let content = format!(r#"{{"access_token": "t", "expires_at": {NOW}}}"#);
        server.write_account(&format!("medium/{name}"), &content);
        client.ok(&["MPOOL.RELOAD"]);
    };
    for (what, lose) in [
        ("cooldown", cool),
        ("removal", remove),
        ("an invalid file", spoil),
        ("an expired token", expire),
    ] {
        let server = Options::default().accounts(&["a", "b", "c"]).start();
        let mut client = server.connect();
        let keys = keys(&mut client, 6);
        // Both holders of the account that will go, and one elsewhere.
        let accounts: Vec<String> = keys[..5]
            .iter()
            .map(|key| client.acquire(key, NOW - 10).account)
            .collect();
        let lost = accounts
            .iter()
            .find(|name| accounts.iter().filter(|other| other == name).count() == 2)
            .unwrap();
        let holders: Vec<&String> = keys[..5]
            .iter()
            .zip(&accounts)
            .filter(|(_, name)| *name == lost)
            .map(|(key, _)| key)
            .collect();
        let others: Vec<&String> = keys[..5]
            .iter()
            .filter(|key| !holders.contains(key))
            .collect();
        client.ok(&["MPOOL.RELEASE", others[2]]);
        lose(&server, &mut client, lost);
        for holder in &holders {
            let lease = client.acquire(holder, NOW + 1);
            assert_eq!(lease.state, "failover", "{what}");
            assert_ne!(&lease.account, lost, "{what}");
            assert_eq!(lease.previous.as_ref(), Some(lost), "{what}");
            assert_eq!(
                (lease.last, lease.next),
                (Some(NOW + 1), Some(NOW + 1 + DAY)),
                "{what}"
            );
            client.check_invariants(2);
        }
        for other in &others[..2] {
            assert_eq!(
                client.acquire(other, NOW + 1).state,
                "current",
                "{what}: the others stay"
            );
        }
        // Now all is full; that is no loss of anybody's slot.
        client.refused(
            "POOLFULL",
            &["MPOOL.ACQUIRE", &keys[5], &(NOW + 1).to_string()],
        );
        check(&mut client);
    }
}

#[test]
fn a_lost_accounts_slots_come_back_with_it() {
    let server = Options::default().accounts(&["a"]).start();
    let mut client = server.connect();
    let keys = keys(&mut client, 2);
    client.acquire(&keys[0], NOW);
    client.acquire(&keys[1], NOW);
    server.remove_account("medium/a");
    client.wait_for_account("a", false);
    for key in &keys {
        client.refused("NOACCOUNT", &["MPOOL.ACQUIRE", key, &(NOW + 1).to_string()]);
    }
    server.write_account("medium/a", &bearer("a"));
    client.wait_for_account("a", true);
    for key in &keys {
        let lease = client.acquire(key, NOW + 2);
        assert_eq!(
            (lease.state.as_str(), lease.account.as_str()),
            ("failover", "a")
        );
    }
    check(&mut client);
}

#[test]
fn a_cooldown_frees_every_holder_and_ends_by_itself() {
    let server = Options::default().accounts(&["a", "b"]).start();
    let mut client = server.connect();
    let keys = keys(&mut client, 4);
    for key in &keys {
        client.acquire(key, NOW);
    }
    client.ok(&["MPOOL.COOLDOWN", "medium", "a", &NOW.to_string(), "1000"]);
    assert_eq!((client.slots("a"), client.slots("b")), (Some(0), Some(2)));
    let moved: Vec<&String> = keys
        .iter()
        .filter(|key| client.holds(key).is_none())
        .collect();
    for key in &moved {
        let error = client.refused(
            "POOLFULL",
            &["MPOOL.ACQUIRE", key, &(NOW + 999).to_string()],
        );
        assert!(error.ends_with(&format!(" {}", NOW + 1000)), "{error}");
    }
    for key in &moved {
        assert_eq!(client.acquire(key, NOW + 1000).account, "a");
    }
    check(&mut client);
}

#[test]
fn a_cooldown_outlives_a_file_that_is_broken_for_a_while() {
    let server = Options::default().accounts(&["a"]).start();
    let mut client = server.connect();
    let key = client.pool_key();
    client.ok(&["MPOOL.COOLDOWN", "medium", "a", &NOW.to_string(), "1000"]);
    server.write_account("medium/a", "{");
    client.ok(&["MPOOL.RELOAD"]);
    client.wait_for_account("a", false);
    check(&mut client);
    server.write_account("medium/a", &bearer("a"));
    client.ok(&["MPOOL.RELOAD"]);
    let before = (NOW + 999).to_string();
    client.refused("NOACCOUNT", &["MPOOL.ACQUIRE", &key, &before]);
    assert_eq!(client.acquire(&key, NOW + 1000).account, "a");
    check(&mut client);
}

#[test]
fn a_token_that_expires_is_not_lent_from_that_millisecond_on() {
    let server = Options::default()
        .file(
            "medium/a",
            &format!(r#"{{"access_token": "t", "expires_at": {}}}"#, NOW + 1000),
        )
        .start();
    let mut client = server.connect();
    let keys = keys(&mut client, 3);
    client.acquire(&keys[0], NOW);
    assert_eq!(client.acquire(&keys[0], NOW + 999).state, "current");
    assert_eq!(client.acquire(&keys[1], NOW + 999).account, "a");
    for key in &keys {
        client.refused(
            "NOACCOUNT",
            &["MPOOL.ACQUIRE", key, &(NOW + 1000).to_string()],
        );
    }
    assert_eq!(client.state("a", NOW + 1000).as_deref(), Some("expired"));
    // A new token, and it goes on.
    server.write_account("medium/a", &bearer("a"));
    client.ok(&["MPOOL.RELOAD"]);
    for key in &keys[..2] {
        assert_eq!(client.acquire(key, NOW + 1000).account, "a");
    }
    check(&mut client);
}

#[test]
fn a_changed_token_leaves_the_lease_as_it_is() {
    let server = Options::default().accounts(&["a", "b"]).start();
    let mut client = server.connect();
    let key = client.pool_key();
    let account = client.acquire(&key, NOW).account;
    server.write_account(&format!("medium/{account}"), r#"{"apiKey": "another"}"#);
    client.ok(&["MPOOL.RELOAD"]);
    let lease = client.map(&["MPOOL.ACQUIRE", &key, &NOW.to_string(), "WITHTOKEN"]);
    assert_eq!(text(&lease["state"]), "current");
    assert_eq!(
        (
            text(&lease["token"]).as_str(),
            text(&lease["auth"]).as_str()
        ),
        ("another", "x-api-key")
    );
    check(&mut client);
}

#[test]
fn a_keys_end_gives_its_slot_up() {
    let server = Options::default().accounts(&["a"]).start();
    let mut client = server.connect();
    let short = text(
        &client.map(&[
            "MPOOL.KEYGEN",
            "medium",
            "POOL",
            "DAYS",
            "1",
            "NOW",
            &(NOW - DAY + 500).to_string(),
        ])["key"],
    );
    let keys = keys(&mut client, 3);
    client.acquire(&short, NOW);
    client.acquire(&keys[0], NOW);
    assert_eq!(client.acquire(&short, NOW + 499).state, "current");
    client.refused(
        "POOLFULL",
        &["MPOOL.ACQUIRE", &keys[1], &(NOW + 499).to_string()],
    );
    client.refused(
        "EXPIRED",
        &["MPOOL.ACQUIRE", &short, &(NOW + 500).to_string()],
    );
    // Long before the 24 hours of its lease are over.
    assert_eq!(client.acquire(&keys[1], NOW + 500).account, "a");
    client.ok(&["MPOOL.REVOKE", &keys[0]]);
    assert_eq!(client.acquire(&keys[2], NOW + 500).account, "a");
    client.refused(
        "REVOKED",
        &["MPOOL.ACQUIRE", &keys[0], &(NOW + 500).to_string()],
    );
    check(&mut client);
}

#[test]
fn bound_keys_count_no_slot_and_never_rotate() {
    let server = Options::default()
        .accounts(&["a"])
        .file("high/h", &bearer("h"))
        .file("supreme/s", &bearer("s"))
        .start();
    let mut client = server.connect();
    let pooled = keys(&mut client, 2);
    for key in &pooled {
        client.acquire(key, NOW);
    }
    for account in ["medium/a", "high/h", "supreme/s"] {
        let (tier, name) = account.split_once('/').unwrap();
        // More of them than there are slots.
        let keys: Vec<String> = (0..4).map(|_| client.bound_key(account)).collect();
        let before = client.traces();
        for key in &keys {
            for now in [0, NOW, NOW + DAY, NOW + 300 * DAY] {
                let lease = client.acquire(key, now);
                assert_eq!(
                    (lease.state.as_str(), lease.account.as_str(), lease.next),
                    ("bound", name, None)
                );
            }
        }
        assert_eq!(client.traces(), before, "a bound key writes nothing");
        let used: Option<u64> = client.run(&["GET", &format!("{tier}_pool:slots:{name}")]);
        assert_eq!(used, Some(if tier == "medium" { 2 } else { 0 }));
        // Its account lost, it is refused, and served again when it is back.
        client.ok(&["MPOOL.COOLDOWN", tier, name, &NOW.to_string(), "1000"]);
        client.refused("NOACCOUNT", &["MPOOL.ACQUIRE", &keys[0], &NOW.to_string()]);
        assert_eq!(client.acquire(&keys[0], NOW + 1000).state, "bound");
        server.remove_account(account);
        client.ok(&["MPOOL.RELOAD"]);
        client.refused(
            "NOACCOUNT",
            &["MPOOL.ACQUIRE", &keys[0], &(NOW + 1000).to_string()],
        );
        server.write_account(account, "{");
        client.ok(&["MPOOL.RELOAD"]);
        client.refused(
            "NOACCOUNT",
            &["MPOOL.ACQUIRE", &keys[0], &(NOW + 1000).to_string()],
        );
        server.write_account(account, &bearer(name));
        client.ok(&["MPOOL.RELOAD"]);
        assert_eq!(client.acquire(&keys[0], NOW + 1000).state, "bound");
        client.check_invariants(2);
    }
    // High and supreme accounts are never lent to the pool's keys.
    client.ok(&["MPOOL.COOLDOWN", "medium", "a", &NOW.to_string(), "1000"]);
    client.refused(
        "NOACCOUNT",
        &["MPOOL.ACQUIRE", &pooled[0], &NOW.to_string()],
    );
    check(&mut client);
}

#[test]
fn an_account_of_the_same_name_in_another_tier_is_another_account() {
    let server = Options::default()
        .accounts(&["same"])
        .file("high/same", r#"{"api_key": "high-key"}"#)
        .start();
    let mut client = server.connect();
    let (pooled, high) = (client.pool_key(), client.bound_key("high/same"));
    client.acquire(&pooled, NOW);
    client.ok(&["MPOOL.COOLDOWN", "high", "same", &NOW.to_string(), "1000"]);
    assert_eq!(client.acquire(&pooled, NOW).state, "current");
    client.refused("NOACCOUNT", &["MPOOL.ACQUIRE", &high, &NOW.to_string()]);
    server.remove_account("medium/same");
    client.wait_for_account("same", false);
    let lease = client.map(&[
        "MPOOL.ACQUIRE",
        &high,
        &(NOW + 1000).to_string(),
        "WITHTOKEN",
    ]);
    assert_eq!(text(&lease["token"]), "high-key");
    check(&mut client);
}

#[test]
fn slots_per_account_can_be_more_or_fewer() {
    for slots in [1, 3, 5] {
        let server = Options::default()
            .accounts(&["a", "b"])
            .module(&["slots-per-account", &slots.to_string()])
            .start();
        let mut client = server.connect();
        let keys = keys(&mut client, 2 * slots + 1);
        for key in &keys[..2 * slots] {
            client.acquire(key, NOW);
        }
        client.refused(
            "POOLFULL",
            &["MPOOL.ACQUIRE", &keys[2 * slots], &NOW.to_string()],
        );
        client.check_invariants(slots as u64);
        client.check_repair();
    }
}

#[test]
fn slots_per_account_can_change_under_way() {
    let server = Options::default().accounts(&["a"]).start();
    let mut client = server.connect();
    let keys = keys(&mut client, 4);
    client.acquire(&keys[0], NOW);
    client.acquire(&keys[1], NOW + 1);
    client.refused("POOLFULL", &["MPOOL.ACQUIRE", &keys[2], &NOW.to_string()]);
    client.ok(&["CONFIG", "SET", "mpool.slots-per-account", "3"]);
    assert_eq!(client.acquire(&keys[2], NOW + 2).account, "a");
    client.check_invariants(3);
    // Fewer: those who came last give up theirs, at once.
    client.ok(&["CONFIG", "SET", "mpool.slots-per-account", "1"]);
    wait_for("the slots to be given up", || {
        (client.slots("a") == Some(1)).then_some(())
    });
    client.check_invariants(1);
    assert_eq!(client.acquire(&keys[0], NOW).state, "current");
    client.refused("POOLFULL", &["MPOOL.ACQUIRE", &keys[1], &NOW.to_string()]);
    client.check_repair();
}

#[test]
fn rotation_ms_says_how_long_new_leases_last() {
    let server = Options::default()
        .accounts(&["a", "b"])
        .module(&["rotation-ms", "5000"])
        .start();
    let mut client = server.connect();
    let keys = keys(&mut client, 2);
    assert_eq!(client.acquire(&keys[0], NOW).next, Some(NOW + 5000));
    client.ok(&["CONFIG", "SET", "mpool.rotation-ms", "100"]);
    assert_eq!(client.acquire(&keys[1], NOW).next, Some(NOW + 100));
    assert_eq!(
        client.acquire(&keys[0], NOW + 4999).state,
        "current",
        "a running lease keeps its end"
    );
    let lease = client.acquire(&keys[0], NOW + 5000);
    assert_eq!(
        (lease.state.as_str(), lease.next),
        ("rotated", Some(NOW + 5100))
    );
    check(&mut client);
}

#[test]
fn time_may_jump_back() {
    let server = Options::default()
        .accounts(&["a"])
        .file(
            "medium/b",
            &format!(r#"{{"access_token": "t", "expires_at": {}}}"#, NOW + DAY),
        )
        .start();
    let mut client = server.connect();
    let keys = keys(&mut client, 5);
    for key in &keys[..4] {
        client.acquire(key, NOW);
    }
    check(&mut client);
    // Far ahead b's token has expired; back again it has not.
    let ahead = client.acquire(&keys[0], NOW + 2 * DAY);
    assert_eq!(
        (ahead.state.as_str(), ahead.account.as_str()),
        ("rotated", "a")
    );
    check(&mut client);
    let back = client.acquire(&keys[0], NOW + 1);
    assert_eq!(
        (back.state.as_str(), back.next),
        ("current", Some(NOW + 3 * DAY))
    );
    // What was overdue then is lent once more, b included.
    let mut accounts = BTreeSet::new();
    for key in &keys[1..4] {
        accounts.insert(client.acquire(key, NOW + 1).account);
        client.check_invariants(2);
    }
    assert_eq!(accounts.len(), 2);
    client.refused(
        "POOLFULL",
        &["MPOOL.ACQUIRE", &keys[4], &(NOW + 1).to_string()],
    );
    // The end of a cooldown may be passed in both directions.
    client.ok(&[
        "MPOOL.COOLDOWN",
        "medium",
        "a",
        &(NOW + 2).to_string(),
        "1000",
    ]);
    assert_eq!(client.state("a", NOW + 1002).as_deref(), Some("available"));
    assert_eq!(client.state("a", NOW + 2).as_deref(), Some("cooldown"));
    for now in [NOW + 1002, NOW + 2, NOW + 1001, NOW - DAY, 0, NOW + 3] {
        let _ = client.try_acquire(&keys[4], now);
        check(&mut client);
    }
    check(&mut client);
}

#[test]
fn the_whole_range_of_instants_is_taken() {
    let server = Options::default().accounts(&["a", "b"]).start();
    let mut client = server.connect();
    client.ok(&[
        "HSET",
        "client_keys:k",
        "tier",
        "medium",
        "use_pool",
        "true",
    ]);
    let end = 253_402_300_799_999;
    assert_eq!(client.acquire("k", 0).next, Some(DAY));
    let lease = client.acquire("k", end);
    assert_eq!(
        (lease.state.as_str(), lease.next),
        ("rotated", Some(end + DAY))
    );
    assert_eq!(client.acquire("k", 0).state, "current");
    assert_eq!(client.acquire("k", end).state, "current");
    client.refused("ERR", &["MPOOL.ACQUIRE", "k", &(end + 1).to_string()]);
    client.ok(&[
        "MPOOL.COOLDOWN",
        "medium",
        "a",
        &end.to_string(),
        "315360000000",
    ]);
    check(&mut client);
}
