//! The rules: case by case, and under thousands of random sequences against
//! the naive model of `model`.

use super::model::{Cooldown, Expected, Lease, Record, World, credential};
use super::{Choice, Difference, Refusal, SWEEP_LIMIT, State, Stored, Tier, Walk};
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use std::collections::BTreeSet;

const DAY: i64 = 86_400_000;

fn random(seed: u64) -> Choice {
    Choice::Random(SmallRng::seed_from_u64(seed))
}

fn pooled(expires_at: Option<i64>) -> Record {
    Record {
        tier: Tier::Medium,
        bound: None,
        expires_at,
        active: true,
    }
}

fn world(accounts: &[&str], keys: &[&str]) -> World {
    let mut world = World::new(2, DAY);
    for account in accounts {
        world.set_file(Tier::Medium, account, Some(Some(credential(None))));
    }
    for key in keys {
        world.set_record(key, Some(pooled(None)));
    }
    world.settle();
    world
}

impl World {
    #[track_caller]
    fn get(&mut self, key: &str, now: i64) -> (String, State) {
        let decision = self.acquire(key, now, &mut random(7)).unwrap();
        self.check();
        self.pool.audit();
        (
            self.pool.account_name(decision.account).unwrap().to_owned(),
            decision.state,
        )
    }

    fn refusal(&mut self, key: &str, now: i64) -> Refusal {
        let before = (
            self.leases.clone(),
            self.slots.clone(),
            self.records.clone(),
        );
        let refusal = self.acquire(key, now, &mut random(7)).unwrap_err();
        assert_eq!(
            before,
            (
                self.leases.clone(),
                self.slots.clone(),
                self.records.clone()
            ),
            "a refusal changed something"
        );
        refusal
    }

    fn account_of(&self, key: &str) -> Option<String> {
        self.leases.get(key)?.account.clone()
    }
}

#[test]
fn tokens_end_once_in_any_course_of_time() {
    let mut world = world(&["endless"], &[]);
    for (account, end) in [("a", 10), ("b", 20), ("c", 20)] {
        let file = credential(Some(end));
        world.set_file(Tier::Medium, account, Some(Some(file)));
    }
    for (from, to, expected) in [
        (8, 9, &[][..]),
        (9, 10, &["a"]),
        (10, 19, &[]),
        (0, 20, &["a", "b", "c"]),
        (20, 9, &[]),
        (i64::MAX, 20, &[]),
    ] {
        let ended = world.pool.ended(from, to);
        let names: Vec<&str> = ended.filter_map(|id| world.pool.account_name(id)).collect();
        assert_eq!(names, expected, "{from} to {to}");
    }
}

#[test]
fn the_least_used_account_is_chosen() {
    let mut world = world(&["a", "b"], &["1", "2", "3", "4", "5"]);
    let first = world.get("1", 0).0;
    let second = world.get("2", 0).0;
    assert_ne!(first, second);
    world.get("3", 0);
    world.get("4", 0);
    assert_eq!(world.refusal("5", 0), Refusal::PoolFull { next: Some(DAY) });
}

#[test]
fn a_lease_is_current_until_its_very_last_millisecond() {
    let mut world = world(&["a", "b"], &["1"]);
    let (account, state) = world.get("1", 1000);
    assert_eq!(state, State::Assigned);
    assert_eq!(
        world.get("1", 1000 + DAY - 1),
        (account.clone(), State::Current)
    );
    let (next, state) = world.get("1", 1000 + DAY);
    assert_eq!(state, State::Rotated);
    assert_ne!(
        next, account,
        "rotation avoids the previous account while another ties"
    );
    let lease = &world.leases["1"];
    assert_eq!(
        (lease.last, lease.next),
        (Some(1000 + DAY), Some(1000 + 2 * DAY))
    );
    assert_eq!(lease.previous, Some(account));
}

#[test]
fn a_key_that_holds_a_slot_is_never_refused_at_rotation() {
    let mut world = world(&["a"], &["1", "2"]);
    world.get("1", 0);
    world.get("2", 0);
    assert_eq!(world.get("1", DAY), ("a".to_owned(), State::Rotated));
}

#[test]
fn an_idle_key_blocks_no_slot_past_its_period() {
    let mut world = world(&["a"], &["1", "2", "3"]);
    world.get("1", 0);
    world.get("2", 5);
    assert_eq!(
        world.refusal("3", DAY - 1),
        Refusal::PoolFull { next: Some(DAY) }
    );
    assert_eq!(world.get("3", DAY).1, State::Assigned);
    assert_eq!(world.account_of("1"), None);
    assert!(world.account_of("2").is_some());
    // The one that lost its slot comes back after its period: a rotation.
    assert_eq!(world.get("1", DAY + 5).1, State::Rotated);
}

#[test]
fn a_lost_account_is_a_failover_and_the_period_begins_anew() {
    let mut world = world(&["a", "b"], &["1", "2"]);
    let (account, _) = world.get("1", 0);
    let other = if account == "a" { "b" } else { "a" };
    world.set_file(Tier::Medium, &account, None);
    world.settle();
    assert_eq!(
        world.account_of("1"),
        None,
        "a deleted account gives up its holders at once"
    );
    assert_eq!(world.get("1", 10), (other.to_owned(), State::Failover));
    assert_eq!(world.leases["1"].next, Some(10 + DAY));
}

#[test]
fn a_cooldown_moves_holders_on_and_ends_by_itself() {
    let mut world = world(&["a"], &["1"]);
    world.get("1", 0);
    assert_eq!(world.cool("a", 10, Some(60)).unwrap(), 1);
    assert_eq!(
        world.refusal("1", 59),
        Refusal::NoAccount { next: Some(60) }
    );
    assert_eq!(world.get("1", 60), ("a".to_owned(), State::Failover));
    // Time may go back: the account is cooling again for who says so.
    assert_eq!(
        world.refusal("1", 50),
        Refusal::NoAccount { next: Some(60) }
    );
    world.cool("a", 50, None).unwrap();
    assert_eq!(world.get("1", 50).0, "a");
    assert_eq!(
        world.cool("zzz", 0, Some(1)).unwrap_err(),
        Refusal::NoSuchAccount
    );
}

#[test]
fn a_cooldown_outlives_a_file_that_is_broken_for_a_while() {
    let mut world = world(&["a"], &["1"]);
    world.get("1", 0);
    world.cool("a", 10, Some(60)).unwrap();
    world.set_file(Tier::Medium, "a", Some(None));
    world.settle();
    world.check();
    world.set_file(Tier::Medium, "a", Some(Some(credential(None))));
    world.settle();
    assert_eq!(
        world.refusal("1", 59),
        Refusal::NoAccount { next: Some(60) }
    );
    // A file that was gone makes a new account.
    world.set_file(Tier::Medium, "a", None);
    world.settle();
    world.set_file(Tier::Medium, "a", Some(Some(credential(None))));
    world.settle();
    assert_eq!(world.get("1", 59).0, "a");
}

#[test]
fn an_expired_token_moves_holders_on() {
    let mut world = world(&["a"], &["1", "2"]);
    world.set_file(Tier::Medium, "old", Some(Some(credential(Some(100)))));
    world.get("1", 0);
    world.get("2", 0);
    let old = if world.account_of("1").as_deref() == Some("old") {
        "1"
    } else {
        "2"
    };
    assert_eq!(world.get(old, 99).1, State::Current);
    assert_eq!(world.get(old, 100), ("a".to_owned(), State::Failover));
}

#[test]
fn bound_keys_take_no_slot() {
    let mut world = world(&["a"], &[]);
    world.set_file(Tier::High, "h", Some(Some(credential(Some(100)))));
    let bound = |tier, account: &str| Record {
        tier,
        bound: Some(account.to_owned()),
        expires_at: None,
        active: true,
    };
    world.set_record("m", Some(bound(Tier::Medium, "a")));
    world.set_record("h", Some(bound(Tier::High, "h")));
    assert_eq!(world.get("m", 0), ("a".to_owned(), State::Bound));
    assert_eq!(world.get("h", 99), ("h".to_owned(), State::Bound));
    assert_eq!(
        world.slots[&(Tier::Medium, "a".to_owned())],
        Stored::Count(0)
    );
    assert_eq!(world.refusal("h", 100), Refusal::BoundAccount);
    world.set_record("x", Some(bound(Tier::Medium, "h")));
    assert_eq!(
        world.refusal("x", 0),
        Refusal::BoundAccount,
        "the account is another tier's"
    );
}

#[test]
fn the_ends_of_keys() {
    let mut world = world(&["a"], &["1"]);
    world.set_record("2", Some(pooled(Some(50))));
    world.get("1", 0);
    world.get("2", 0);
    assert_eq!(world.refusal("2", 50), Refusal::Expired);
    assert_eq!(world.refusal("nobody", 0), Refusal::NoKey);
    world.set_record("3", Some(pooled(None)));
    assert_eq!(world.refusal("3", 49), Refusal::PoolFull { next: Some(50) });
    assert_eq!(
        world.get("3", 50).1,
        State::Assigned,
        "an expired key gives up its slot"
    );
    assert_eq!(world.revoke("1").unwrap().as_deref(), Some("a"));
    assert_eq!(world.revoke("1").unwrap(), None);
    assert_eq!(world.refusal("1", 50), Refusal::Revoked);
    assert_eq!(world.release("3", None).unwrap().as_deref(), Some("a"));
    assert_eq!(
        world.release("3", None).unwrap(),
        None,
        "releasing twice is no error"
    );
    assert_eq!(
        world.get("3", 51).1,
        State::Assigned,
        "after a release a key starts afresh"
    );
    assert_eq!(world.release("nobody", None).unwrap_err(), Refusal::NoKey);
}

#[test]
fn ties_are_broken_at_random_among_all() {
    let accounts = ["a", "b", "c", "d", "e"];
    let mut seen = BTreeSet::new();
    for seed in 0..200 {
        let mut world = world(&accounts, &["1"]);
        let decision = world.acquire("1", 0, &mut random(seed)).unwrap();
        seen.insert(
            world
                .pool
                .account_name(decision.account)
                .unwrap()
                .to_owned(),
        );
    }
    assert_eq!(seen.len(), accounts.len());
}

#[test]
fn one_command_frees_a_bounded_number_of_overdue_leases_and_never_refuses_for_it() {
    let accounts: Vec<String> = (0..100).map(|n| format!("a{n}")).collect();
    let keys: Vec<String> = (0..200).map(|n| format!("k{n}")).collect();
    let mut world = world(
        &accounts.iter().map(String::as_str).collect::<Vec<_>>(),
        &keys.iter().map(String::as_str).collect::<Vec<_>>(),
    );
    world.set_record("late", Some(pooled(None)));
    for key in &keys {
        world.get(key, 0);
    }
    world.get("late", DAY);
    let held = |world: &World| {
        world
            .leases
            .values()
            .filter(|lease| lease.account.is_some())
            .count()
    };
    assert_eq!(held(&world), 200 - SWEEP_LIMIT + 1);
    world.release("late", Some(DAY)).unwrap();
    assert_eq!(held(&world), 200 - 2 * SWEEP_LIMIT);
}

#[test]
fn an_overdue_slot_is_found_behind_any_number_that_help_nobody() {
    let keys: Vec<String> = (0..120).map(|n| format!("k{n}")).collect();
    let mut world = world(&[], &keys.iter().map(String::as_str).collect::<Vec<_>>());
    world.set_capacity(40);
    // More leases than one sweep frees, on accounts whose tokens end ...
    for account in ["old", "older"] {
        world.set_file(Tier::Medium, account, Some(Some(credential(Some(50)))));
    }
    keys.iter().take(80).for_each(|key| drop(world.get(key, 0)));
    // ... and behind them those that fill the one that can be lent.
    world.set_file(Tier::Medium, "new", Some(Some(credential(None))));
    keys.iter().skip(80).for_each(|key| drop(world.get(key, 1)));
    world.set_record("late", Some(pooled(None)));
    assert_eq!(
        world.refusal("late", DAY),
        Refusal::PoolFull {
            next: Some(DAY + 1)
        }
    );
    assert_eq!(world.get("late", DAY + 1).0, "new");
    world.set_file(Tier::Medium, "new", Some(Some(credential(Some(50)))));
    assert_eq!(
        world.refusal("late", DAY + 1),
        Refusal::NoAccount { next: None }
    );
}

#[test]
fn a_name_without_a_file_is_left_alone_where_files_are_not_known() {
    let mut world = World::new(2, DAY);
    world.pool.follow();
    world.trusts_folder = false;
    world.set_record("1", Some(pooled(None)));
    world.set_lease(
        "1",
        Some(Lease {
            account: Some("far".into()),
            last: Some(0),
            next: Some(DAY),
            ..Lease::default()
        }),
    );
    world.set_slots(Tier::Medium, "far", Stored::Count(1));
    world.settle();
    assert_eq!(world.get("1", 5), ("far".to_owned(), State::Current));
    assert_eq!(
        world.get("1", DAY),
        ("far".to_owned(), State::Rotated),
        "who holds a slot is not refused"
    );
    let decision = world.acquire("1", DAY + 1, &mut random(7)).unwrap();
    assert!(world.pool.credential(decision.account).is_none());
    world.set_record("2", Some(pooled(None)));
    assert_eq!(world.refusal("2", 5), Refusal::NoAccount { next: None });
    // Known now not to exist: the lease is given up.
    world.pool.set_trusts_folder(Tier::Medium, true);
    world.trusts_folder = true;
    world.settle();
    world.check();
    assert_eq!(world.account_of("1"), None);
}

#[test]
fn fewer_slots_than_before_are_given_up_by_those_who_came_last() {
    let mut world = world(&["a"], &["1", "2"]);
    world.get("1", 0);
    world.get("2", 1);
    world.set_capacity(1);
    world.settle();
    world.check();
    assert!(world.account_of("1").is_some());
    assert_eq!(world.account_of("2"), None);
}

/// The view numbers keys as they come in; a rebuilt one numbers them otherwise.
#[test]
fn of_those_who_came_at_once_the_same_go_however_the_view_was_built() {
    for keys in [["1", "2"], ["2", "1"]] {
        let mut world = world(&["a"], &keys);
        for key in keys {
            world.get(key, 0);
        }
        world.set_capacity(1);
        world.settle();
        world.check();
        assert_eq!(world.account_of("1").as_deref(), Some("a"), "{keys:?}");
        assert_eq!(world.account_of("2"), None, "{keys:?}");
    }
}

/// One step of a random run. Numbers are taken modulo what there is.
#[derive(Clone, Debug)]
enum Step {
    Acquire(u8),
    Release(u8, bool),
    Revoke(u8),
    Cool(u8, i64),
    Warm(u8),
    FileGood(u8, Option<i64>),
    FileBad(u8),
    FileGone(u8),
    Time(i64),
    Capacity(u8),
    Register(u8, Option<i64>),
    Bind(u8, u8),
    // Changes by hand.
    Forget(u8),
    DropLease(u8),
    Seat(u8, u8, i64),
    Spoil(u8),
    Count(u8, Option<u64>),
    SetCooldown(u8, i64),
}

fn step() -> impl Strategy<Value = Step> {
    let time = prop_oneof![
        Just(0),
        -2 * DAY..2 * DAY,
        -10_i64..10,
        Just(DAY),
        Just(-DAY)
    ];
    let any = || any::<u8>();
    prop_oneof![
        30 => any().prop_map(Step::Acquire),
        4 => (any(), proptest::bool::ANY).prop_map(|(key, timed)| Step::Release(key, timed)),
        1 => any().prop_map(Step::Revoke),
        3 => (any(), 1..2 * DAY).prop_map(|(account, ms)| Step::Cool(account, ms)),
        1 => any().prop_map(Step::Warm),
        4 => (any(), proptest::option::of(0..20 * DAY)).prop_map(|(account, end)| Step::FileGood(account, end)),
        1 => any().prop_map(Step::FileBad),
        2 => any().prop_map(Step::FileGone),
        10 => time.prop_map(Step::Time),
        1 => (1..4_u8).prop_map(Step::Capacity),
        4 => (any(), proptest::option::of(0..20 * DAY)).prop_map(|(key, end)| Step::Register(key, end)),
        1 => (any(), any()).prop_map(|(key, account)| Step::Bind(key, account)),
        1 => any().prop_map(Step::Forget),
        1 => any().prop_map(Step::DropLease),
        2 => (any(), any(), 0..20 * DAY).prop_map(|(key, account, next)| Step::Seat(key, account, next)),
        1 => any().prop_map(Step::Spoil),
        1 => (any(), proptest::option::of(0..5_u64)).prop_map(|(account, count)| Step::Count(account, count)),
        1 => (any(), 0..20 * DAY).prop_map(|(account, until)| Step::SetCooldown(account, until)),
    ]
}

/// A run under way: a world, its clock and how it chooses.
struct Run {
    world: World,
    now: i64,
    choice: Choice,
}

impl Run {
    fn key(number: u8) -> String {
        format!("key{}", number % 7)
    }

    fn account(number: u8) -> String {
        format!("account{}", number % 4)
    }

    fn step(&mut self, step: &Step) {
        let world = &mut self.world;
        match *step {
            Step::Acquire(key) => self.acquire(&Self::key(key)),
            Step::Release(key, timed) => {
                let key = Self::key(key);
                world.settle();
                let held = world.account_of(&key);
                let expected = if world.records.contains_key(&key) {
                    Ok(held)
                } else {
                    Err(Refusal::NoKey)
                };
                let freed = world.release(&key, timed.then_some(self.now));
                assert_eq!(freed.map(|account| account.map(String::from)), expected);
                assert_eq!(world.account_of(&key), None);
            }
            Step::Revoke(key) => {
                let _ = world.revoke(&Self::key(key));
            }
            Step::Cool(account, ms) => {
                let _ = world.cool(&Self::account(account), self.now, Some(self.now + ms));
            }
            Step::Warm(account) => {
                let _ = world.cool(&Self::account(account), self.now, None);
            }
            Step::FileGood(account, end) => {
                world.set_file(
                    Tier::Medium,
                    &Self::account(account),
                    Some(Some(credential(end))),
                );
            }
            Step::FileBad(account) => {
                world.set_file(Tier::Medium, &Self::account(account), Some(None))
            }
            Step::FileGone(account) => world.set_file(Tier::Medium, &Self::account(account), None),
            Step::Time(by) => self.now = (self.now + by).clamp(0, 20 * DAY),
            Step::Capacity(capacity) => world.set_capacity(u32::from(capacity)),
            Step::Register(key, end) => world.set_record(&Self::key(key), Some(pooled(end))),
            Step::Bind(key, account) => {
                let bound = Some(Self::account(account));
                let record = Record {
                    tier: Tier::Medium,
                    bound,
                    expires_at: None,
                    active: true,
                };
                world.set_record(&Self::key(key), Some(record));
            }
            Step::Forget(key) => world.set_record(&Self::key(key), None),
            Step::DropLease(key) => world.set_lease(&Self::key(key), None),
            Step::Seat(key, account, next) => {
                let lease = Lease {
                    account: Some(Self::account(account)),
                    next: Some(next),
                    ..Lease::default()
                };
                world.set_lease(&Self::key(key), Some(lease));
            }
            Step::Spoil(key) => {
                world.set_lease(
                    &Self::key(key),
                    Some(Lease {
                        garbage: true,
                        ..Lease::default()
                    }),
                );
            }
            Step::Count(account, count) => {
                let stored = count.map_or(Stored::Garbage, Stored::Count);
                world.set_slots(Tier::Medium, &Self::account(account), stored);
            }
            Step::SetCooldown(account, until) => {
                world.set_cooldown(
                    Tier::Medium,
                    &Self::account(account),
                    Cooldown {
                        until,
                        reason: None,
                    },
                );
            }
        }
        self.world.pool.audit();
        self.world.settle();
        self.world.pool.audit();
        self.world.check();
        self.world.check_rebuild();
    }

    fn acquire(&mut self, key: &str) {
        let (world, now) = (&mut self.world, self.now);
        world.settle();
        let expected = world.expected(key, now);
        let before = (
            world.leases.clone(),
            world.slots.clone(),
            world.cooldowns.clone(),
        );
        let decision = world.acquire(key, now, &mut self.choice);
        let decision = match (decision, expected) {
            (Err(refusal), expected) => {
                assert_eq!(Expected::Refused(refusal), expected);
                assert_eq!(
                    before,
                    (
                        world.leases.clone(),
                        world.slots.clone(),
                        world.cooldowns.clone()
                    )
                );
                return;
            }
            (Ok(decision), Expected::Kept { account, state }) => {
                assert_eq!(world.pool.account_name(decision.account), Some(&*account));
                assert_eq!(decision.state, state);
                assert_eq!(before.0, world.leases);
                decision
            }
            (Ok(decision), Expected::OneOf { accounts, state }) => {
                let account = world
                    .pool
                    .account_name(decision.account)
                    .unwrap()
                    .to_owned();
                assert!(
                    accounts.contains(&account),
                    "{account} is none of {accounts:?}"
                );
                assert_eq!(decision.state, state);
                assert_eq!(world.account_of(key), Some(account));
                assert_eq!((decision.last, decision.next), (Some(now), Some(now + DAY)));
                for (other, lease) in &world.leases {
                    if let (Some(account), true) = (&lease.account, other != key) {
                        assert!(
                            world.usable(Tier::Medium, account, now),
                            "{other} keeps {account}"
                        );
                        assert!(
                            lease.next.unwrap_or(0) > now,
                            "{other} is overdue and keeps its slot"
                        );
                    }
                }
                decision
            }
            (Ok(decision), Expected::Refused(refusal)) => {
                panic!("{decision:?} instead of {refusal:?}")
            }
        };
        let Some(lease) = world.leases.get(key) else {
            return;
        };
        if decision.state != State::Bound {
            assert_eq!(
                (decision.last.or(lease.last), decision.next),
                (lease.last, lease.next)
            );
        }
    }
}

/// What a caller whose clock is off does: who, for which key, at how much more
/// than its usual error, and what.
type Call = (usize, u8, i64, u8);

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    /// Callers a day ahead, right and a day behind, all of them jumping by up
    /// to a day: the invariants hold after every command, and no lease begins
    /// or ends later than the error of the clocks explains.
    #[test]
    fn clocks_that_are_off_move_a_lease_by_no_more_than_they_are_off(
        seed: u64,
        calls in proptest::collection::vec((0..3_usize, any::<u8>(), -DAY..=DAY, 0..10_u8), 1..80),
    ) {
        let mut world = world(&["account0", "account1"], &[]);
        for key in 0..6 {
            world.set_record(&Run::key(key), Some(pooled(None)));
        }
        let mut run = Run { world, now: 0, choice: random(seed) };
        // The right time, which goes on by an hour from call to call.
        let mut right = 10 * DAY;
        let calls: &[Call] = &calls;
        for &(caller, which, jump, what) in calls {
            let off = ([-DAY, 0, DAY][caller] + jump).clamp(-DAY, DAY);
            run.now = right + off;
            run.step(&match what {
                0 => Step::Release(which, true),
                1 => Step::Cool(which % 2, 3_600_000),
                2 => Step::Warm(which % 2),
                _ => Step::Acquire(which % 6),
            });
            for lease in run.world.leases.values() {
                prop_assert!(lease.last.is_none_or(|last| last <= right + DAY));
                prop_assert!(lease.next.is_none_or(|next| next <= right + 2 * DAY));
            }
            right += 3_600_000;
        }
        // All clocks right again: after a lease's time and the error at most,
        // any command that chooses finds all of it past.
        run.now = right + 2 * DAY;
        run.step(&Step::Warm(0));
        run.step(&Step::Warm(1));
        run.step(&Step::Acquire(0));
        let held = run.world.leases.values().filter(|lease| lease.account.is_some());
        prop_assert_eq!(held.count(), 1);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever happens in whatever order: each answer is what the naive model
    /// says, the invariants hold after every step, and the view is what a
    /// rebuild would give.
    #[test]
    fn the_pool_does_what_the_model_says(seed: u64, steps in proptest::collection::vec(step(), 1..60)) {
        let mut world = World::new(2, DAY);
        for account in 0..3 {
            world.set_file(Tier::Medium, &Run::account(account), Some(Some(credential(None))));
        }
        for key in 0..5 {
            world.set_record(&Run::key(key), Some(pooled(None)));
        }
        let mut run = Run { world, now: 5 * DAY, choice: random(seed) };
        for step in &steps {
            run.step(step);
        }
    }
}

/// Two views of the same thing, told in full, and what each lacks told apart.
#[test]
fn views_that_differ_are_found_to_differ_in_however_many_portions() {
    let all = |one: &World, other: &World, limit| {
        let mut found = [0, 0];
        for (place, (from, to, what)) in [
            (&one.pool, &other.pool, Difference::Any),
            (&other.pool, &one.pool, Difference::Absence),
        ]
        .into_iter()
        .enumerate()
        {
            let mut walk = Walk::default();
            while !walk.is_over(from) {
                found[place] += from.compare(to, &mut walk, limit, what);
            }
        }
        found
    };
    let keys: Vec<String> = (0..50).map(|number| number.to_string()).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    let (mut one, mut other) = (world(&["a", "b"], &keys), world(&["a", "b"], &keys));
    for limit in [1, 7, usize::MAX] {
        assert_eq!(all(&one, &other, limit), [0, 0]);
    }
    // A key and its account, then a key and an account that only one of them knows.
    one.get("7", 1000);
    other.set_record("stranger", Some(pooled(None)));
    other.set_file(Tier::High, "z", Some(Some(credential(None))));
    for limit in [1, 7, usize::MAX] {
        assert_eq!(all(&one, &other, limit), [2, 2]);
        assert_eq!(all(&other, &one, limit), [4, 0]);
    }
    assert_eq!(one.pool.differences(&other.pool), 4);
    assert_eq!(other.pool.differences(&one.pool), 4);
}
