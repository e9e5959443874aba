//! A recorded run, done again on a fresh server with the same `choice-seed`,
//! gives the same answers and the same keyspace. `MPOOL_SEED` repeats a run.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop anywhere"
)]

mod support;

use rand::{RngExt, rngs::SmallRng};
use redis::Value;
use std::collections::{BTreeMap, BTreeSet};
use support::*;

const NOW: i64 = 1_755_266_400_000;
const ACCOUNTS: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

/// One thing that was done to a server.
#[derive(Clone, Debug)]
enum Step {
    Command(Vec<String>),
    /// An account file was written, or none: removed.
    File(&'static str, Option<String>),
}

/// A run of that many steps, at times that jump.
fn record(rng: &mut SmallRng, length: usize) -> Vec<Step> {
    let pick = |rng: &mut SmallRng, from: &[i64]| from[rng.random_range(0..from.len())];
    // MPOOL.KEYGEN draws from the operating system, so the record has the keys.
    let mut steps: Vec<Step> = (0..16)
        .map(|number| {
            let words = [
                "HSET",
                &format!("client_keys:key-{number}"),
                "tier",
                "medium",
                "use_pool",
                "true",
            ];
            Step::Command(words.map(str::to_owned).to_vec())
        })
        .collect();
    let mut now = NOW;
    while steps.len() < length {
        now += pick(rng, &[0, 0, 1, 1000, DAY / 3, DAY, -DAY / 2, -1]);
        let (key, account) = (
            format!("key-{}", rng.random_range(0..16)),
            ACCOUNTS[rng.random_range(0..ACCOUNTS.len())],
        );
        let (at, lease) = (now.to_string(), format!("key_rotation:{key}"));
        let words = match rng.random_range(0..100) {
            0..70 => vec!["MPOOL.ACQUIRE", &key, &at],
            70..78 => vec!["MPOOL.RELEASE", &key, &at],
            78..80 => vec!["MPOOL.REVOKE", &key],
            80..82 => vec!["HSET", "client_keys:key-1", "active", "true"],
            82..87 => vec![
                "MPOOL.COOLDOWN",
                "medium",
                account,
                &at,
                "43200000",
                "REASON",
                "why",
            ],
            87..88 => vec!["DEL", &lease],
            88..89 => vec!["SET", "medium_pool:slots:a", "9"],
            89..90 => vec!["MPOOL.REPAIR"],
            90..92 => vec!["CONFIG", "SET", "mpool.slots-per-account", "1"],
            92..94 => vec!["CONFIG", "SET", "mpool.slots-per-account", "2"],
            94..97 => {
                steps.push(Step::File(account, None));
                vec!["MPOOL.RELOAD"]
            }
            _ => {
                steps.push(Step::File(account, Some(bearer(account))));
                vec!["MPOOL.RELOAD"]
            }
        };
        let by_hand = !words[0].starts_with("MPOOL.");
        let mut push = |words: &[&str]| {
            let words = words.iter().map(|word| (*word).to_owned());
            steps.push(Step::Command(words.collect()));
        };
        push(&words);
        if by_hand {
            // Puts right what follows from it. Else the watcher might do so before
            // the next change by hand, or might not.
            push(&["MPOOL.RELEASE", "nobody", &at]);
        }
    }
    steps
}

/// What came of a run: each answer, and each key with its content.
#[derive(Debug, PartialEq)]
struct Outcome {
    answers: Vec<String>,
    digest: String,
    keys: BTreeMap<String, Vec<u8>>,
}

/// Does all of it on a server of its own. `shaken`: with rebuilds of the view
/// in between, which are not in the record.
fn run(steps: &[Step], seed: &str, shaken: bool) -> Outcome {
    let server = Options::default()
        .accounts(&ACCOUNTS)
        .module(&["choice-seed", seed])
        .start();
    let mut client = server.connect();
    let mut answers = Vec::new();
    for (number, step) in steps.iter().enumerate() {
        if shaken && number % 40 == 0 {
            client.ok(&["DEBUG", "RELOAD"]);
        }
        match step {
            Step::File(account, Some(content)) => {
                server.write_account(&format!("medium/{account}"), content)
            }
            Step::File(account, None) => drop(std::fs::remove_file(
                server.account_file(&format!("medium/{account}")),
            )),
            Step::Command(words) => {
                let words: Vec<&str> = words.iter().map(String::as_str).collect();
                let answer = client.try_run::<Value>(&words);
                // What was to be done to the files and to be put right may have
                // been done before, by the watcher.
                if !["MPOOL.RELOAD", "MPOOL.REPAIR"].contains(&words[0]) {
                    answers.push(format!("{words:?}: {answer:?}"));
                }
            }
        }
    }
    // Whatever the last step has left to put right.
    client.error(&["MPOOL.RELEASE", "nobody"]);
    client.check_invariants(2);
    client.check_repair();
    let mut names: Vec<String> = client.run(&["KEYS", "*"]);
    names.sort_unstable();
    Outcome {
        answers,
        digest: client.traces().0,
        keys: names
            .into_iter()
            .map(|name| {
                // A hash has no order of its own.
                let content: Vec<u8> = if client.run::<String>(&["TYPE", &name]) == "hash" {
                    let fields: BTreeMap<String, String> = client.run(&["HGETALL", &name]);
                    format!("{fields:?}").into_bytes()
                } else {
                    client.run(&["DUMP", &name])
                };
                (name, content)
            })
            .collect(),
    }
}

#[test]
fn a_recorded_run_does_the_same_again() {
    let steps = record(&mut seeded(), 800);
    let first = run(&steps, "42", false);
    for state in ["assigned", "current", "rotated", "failover"] {
        assert!(
            first
                .answers
                .iter()
                .any(|answer| answer.contains(&format!("\"{state}\""))
                    || answer.contains(&format!("'{state}'"))),
            "{state} never happened: {:?}",
            &first.answers[..40]
        );
    }
    for shaken in [false, true] {
        let again = run(&steps, "42", shaken);
        for (one, other) in first.answers.iter().zip(&again.answers) {
            assert_eq!(one, other, "shaken: {shaken}");
        }
        assert_eq!(again, first, "shaken: {shaken}");
    }
    // It is the seed that does it.
    let other = run(&steps, "43", false);
    assert_ne!((other.answers, other.digest), (first.answers, first.digest));
}

#[test]
fn without_a_seed_a_choice_is_not_the_same_again() {
    let choices = |seed: Option<&str>| -> Vec<String> {
        let mut options = Options::default().accounts(&ACCOUNTS);
        if let Some(seed) = seed {
            options = options.module(&["choice-seed", seed]);
        }
        let server = options.start();
        let mut client = server.connect();
        client.ok(&[
            "HSET",
            "client_keys:k",
            "tier",
            "medium",
            "use_pool",
            "true",
        ]);
        let choose = |now| {
            let account = client.acquire("k", now).account;
            client.ok(&["MPOOL.RELEASE", "k"]);
            account
        };
        (NOW..NOW + 40).map(choose).collect()
    };
    assert_ne!(
        choices(None),
        choices(None),
        "6 to the power of 40 against one"
    );
    assert_ne!(choices(Some("0")), choices(Some("0")));
    assert_eq!(choices(Some("1")), choices(Some("1")));
    let used: BTreeSet<String> = choices(Some("1")).into_iter().collect();
    assert_eq!(used.len(), ACCOUNTS.len(), "a seed keeps to no one account");
}

#[test]
fn the_seed_can_be_set_at_run_time() {
    let server = Options::default().accounts(&ACCOUNTS).start();
    let mut client = server.connect();
    client.ok(&[
        "HSET",
        "client_keys:k",
        "tier",
        "medium",
        "use_pool",
        "true",
    ]);
    let mut choices = |seed: &str| -> Vec<String> {
        client.ok(&["FLUSHALL"]);
        client.ok(&[
            "HSET",
            "client_keys:k",
            "tier",
            "medium",
            "use_pool",
            "true",
        ]);
        client.ok(&["CONFIG", "SET", "mpool.choice-seed", seed]);
        let choose = |now| {
            let account = client.acquire("k", now).account;
            client.ok(&["MPOOL.RELEASE", "k"]);
            account
        };
        (NOW..NOW + 40).map(choose).collect()
    };
    let first = choices("7");
    assert_ne!(choices("8"), first);
    assert_ne!(choices("0"), first);
    assert_eq!(choices("7"), first);
}
