//! Account files that come, go, change and break, seen through the server; and
//! that their tokens are nowhere but in replies that ask for them.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop anywhere"
)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};
use support::*;

const NOW: i64 = 1_755_266_400_000;

/// What a RELOAD says was added and removed.
fn reload(client: &mut Client) -> (Vec<String>, Vec<String>) {
    let reply = client.map(&["MPOOL.RELOAD"]);
    let list = |name: &str| redis::from_redis_value_ref(&reply[name]).unwrap();
    (list("added"), list("removed"))
}

/// How long an account file's end and beginning take to be seen by clients.
fn reaction() -> (Duration, Duration) {
    let server = Options::default().accounts(&["a", "b"]).start();
    let mut client = server.connect();
    let key = client.pool_key();
    let account = client.acquire(&key, NOW).account;
    let begin = Instant::now();
    server.remove_account(&format!("medium/{account}"));
    let moved = wait_for("the holder to move", || {
        let lease = client.acquire(&key, NOW);
        (lease.account != account).then(|| begin.elapsed())
    });
    // The other one is full now but for a slot: a third account is the least used.
    let waiting = client.pool_key();
    let begin = Instant::now();
    server.write_account("medium/new", &bearer("new"));
    let lent = wait_for("the new account to be lent", || {
        let lease = client.acquire(&waiting, NOW);
        client.ok(&["MPOOL.RELEASE", &waiting]);
        (lease.account == "new").then(|| begin.elapsed())
    });
    client.check_invariants(2);
    (moved, lent)
}

#[test]
fn a_file_that_goes_or_comes_is_seen_soon() {
    for _ in 0..3 {
        let (moved, lent) = reaction();
        println!("moved {moved:?} after the rm, lent {lent:?} after the file came");
        assert!(moved < Duration::from_secs(5) && lent < Duration::from_secs(5));
    }
}

#[test]
#[ignore = "a bar for a quiet machine"]
fn a_file_that_goes_or_comes_is_seen_within_a_second() {
    for _ in 0..20 {
        let (moved, lent) = reaction();
        println!("moved {moved:?} after the rm, lent {lent:?} after the file came");
        assert!(moved < Duration::from_secs(1) && lent < Duration::from_secs(1));
    }
}

#[test]
fn no_client_sees_an_error_while_a_slot_is_free() {
    let server = Options::default().accounts(&["a", "b", "c"]).start();
    let mut client = server.connect();
    let keys: Vec<String> = (0..4).map(|_| client.pool_key()).collect();
    for key in &keys {
        client.acquire(key, NOW);
    }
    // Four keys on two accounts at all times, whatever goes.
    for round in 0..6 {
        let account = ["a", "b", "c"][round % 3];
        server.remove_account(&format!("medium/{account}"));
        wait_for("everyone to be elsewhere", || {
            let leases: Vec<Lease> = keys.iter().map(|key| client.acquire(key, NOW)).collect();
            leases
                .iter()
                .all(|lease| lease.account != account)
                .then_some(())
        });
        server.write_account(&format!("medium/{account}"), &bearer(account));
        client.wait_for_account(account, true);
        client.check_invariants(2);
    }
    client.check_repair();
}

#[test]
fn reload_says_what_came_went_and_is_invalid() {
    let server = Options::default().accounts(&["a", "b"]).start();
    let mut client = server.connect();
    assert_eq!(
        reload(&mut client).0.len(),
        0,
        "what was there at the start is no news"
    );
    let table = [
        ("empty", "", "empty"),
        ("text", "hello", "JSON"),
        ("list", "[1]", "JSON"),
        ("no-credential", r#"{"user": "x"}"#, "no credential"),
        (
            "both",
            r#"{"access_token": "t", "api_key": "k"}"#,
            "not both",
        ),
        (
            "bad-token",
            r#"{"access_token": "zZqQ zZqQ"}"#,
            "visible ASCII",
        ),
        ("number", r#"{"access_token": 5}"#, "visible ASCII"),
        (
            "seconds",
            r#"{"access_token": "t", "expires_at": 1755266400}"#,
            "milliseconds",
        ),
        (
            "when",
            r#"{"access_token": "t", "expires_at": "soon"}"#,
            "milliseconds",
        ),
        (
            "two",
            r#"{"x": {"api_key": "zZqQ"}, "y": {"api_key": "k"}}"#,
            "more than one object",
        ),
    ];
    for (name, content, _) in table {
        server.write_account(&format!("medium/{name}"), content);
    }
    fs::create_dir(server.account_file("high/folder")).unwrap();
    std::os::unix::fs::symlink("nowhere", server.account_file("supreme/dangling")).unwrap();
    // Not account files at all.
    for name in ["README.md", ".hidden.json", "a.json.bak", "x.new"] {
        fs::write(server.account_dir().join("medium").join(name), "zZqQ").unwrap();
    }
    let reply = client.map(&["MPOOL.RELOAD"]);
    let reasons = named_reasons(&reply["invalid"]);
    let said = |account: &str| {
        let found = [format!("{account}.json"), account.to_owned()];
        found
            .iter()
            .find_map(|file| reasons.get(file))
            .unwrap_or_else(|| panic!("{account} is missing: {reasons:#?}"))
            .clone()
    };
    for (name, _, expected) in table {
        let reason = said(&format!("medium/{name}"));
        assert!(reason.contains(expected), "{name}: {reason}");
        assert!(!reason.contains("zZqQ"), "{name}: {reason}");
    }
    assert!(said("high/folder").contains("regular file"));
    assert!(said("supreme/dangling").contains("link"));
    assert_eq!(reasons.len(), table.len() + 2, "{reasons:#?}");
    // STATUS names them too, once they had their time to become right.
    wait_for("STATUS to name each invalid file", || {
        (client.invalid_files().len() == table.len() + 2).then_some(())
    });
    let shown = client.invalid_files();
    for (name, _, expected) in table {
        assert!(
            shown[&format!("medium/{name}.json")].contains(expected),
            "{name}: {shown:?}"
        );
    }
    assert_eq!(client.state("empty", NOW).as_deref(), Some("invalid"));
    for (name, _, _) in table {
        server.write_account(&format!("medium/{name}"), &bearer(name));
    }
    server.remove_account("medium/a");
    let (mut added, removed) = reload(&mut client);
    added.sort_unstable();
    let mut expected: Vec<String> = table
        .iter()
        .map(|(name, _, _)| format!("medium/{name}"))
        .collect();
    expected.sort_unstable();
    assert_eq!((added, removed), (expected, vec!["medium/a".to_owned()]));
    assert_eq!(reload(&mut client), (vec![], vec![]));
    client.check_repair();
}

#[test]
fn a_half_written_file_keeps_its_account() {
    let server = Options::default().accounts(&["a"]).start();
    let mut client = server.connect();
    let keys: Vec<String> = (0..2).map(|_| client.pool_key()).collect();
    for key in &keys {
        client.acquire(key, NOW);
    }
    let path = server.account_file("medium/a");
    // Written in place and in pieces, one after the other, for a while.
    for _ in 0..10 {
        for piece in [
            "",
            "{",
            r#"{"access_token": "#,
            r#"{"access_token": "new-token"}"#,
        ] {
            fs::write(&path, piece).unwrap();
            for key in &keys {
                let lease = client.map(&["MPOOL.ACQUIRE", key, &NOW.to_string(), "WITHTOKEN"]);
                assert_eq!(text(&lease["state"]), "current");
                assert!(["token-of-a", "new-token"].contains(&text(&lease["token"]).as_str()));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    wait_for("the new token", || {
        let lease = client.map(&["MPOOL.ACQUIRE", &keys[0], &NOW.to_string(), "WITHTOKEN"]);
        (text(&lease["token"]) == "new-token").then_some(())
    });
    // Broken for good it is invalid, after its time of grace.
    let begin = Instant::now();
    fs::write(&path, "{").unwrap();
    client.wait_for_account("a", false);
    let took = begin.elapsed();
    assert!(
        took >= Duration::from_millis(1500),
        "given up after {took:?}"
    );
    client.refused("NOACCOUNT", &["MPOOL.ACQUIRE", &keys[0], &NOW.to_string()]);
    assert!(client.invalid_files().contains_key("medium/a.json"));
    assert!(
        server.log().contains("medium/a.json can't be used"),
        "{}",
        server.log()
    );
    fs::write(&path, bearer("a")).unwrap();
    client.wait_for_account("a", true);
    assert_eq!(client.acquire(&keys[0], NOW).account, "a");
    client.check_invariants(2);
    client.check_repair();
}

#[test]
fn a_folder_that_is_away_removes_nothing() {
    let server = Options::default().accounts(&["a", "b"]).start();
    let mut client = server.connect();
    let key = client.pool_key();
    let account = client.acquire(&key, NOW).account;
    let (here, away) = (server.account_dir(), server.folder.path().join("away"));
    for (from, to) in [
        (here.clone(), away.clone()),
        (here.join("medium"), away.join("medium-away")),
    ] {
        fs::create_dir_all(&away).ok();
        if from == here {
            fs::remove_dir(&away).unwrap();
        }
        fs::rename(&from, &to).unwrap();
        // However often it is looked at.
        for _ in 0..3 {
            assert_eq!(reload(&mut client), (vec![], vec![]));
            std::thread::sleep(Duration::from_millis(300));
            let lease = client.map(&["MPOOL.ACQUIRE", &key, &NOW.to_string(), "WITHTOKEN"]);
            assert_eq!(text(&lease["token"]), format!("token-of-{account}"));
        }
        assert_eq!(
            (client.slots("a").is_some(), client.slots("b").is_some()),
            (true, true)
        );
        fs::rename(&to, &from).unwrap();
        assert_eq!(reload(&mut client), (vec![], vec![]));
        assert_eq!(client.acquire(&key, NOW).state, "current");
    }
    // Back in place, it is watched as before.
    server.write_account("medium/new", &bearer("new"));
    client.wait_for_account("new", true);
    server.remove_account(&format!("medium/{account}"));
    client.wait_for_account(&account, false);
    assert_eq!(client.acquire(&key, NOW).state, "failover");
    // A folder in its place that is empty is another matter.
    fs::rename(here.join("medium"), server.folder.path().join("old")).unwrap();
    fs::create_dir(here.join("medium")).unwrap();
    wait_for("the accounts to go", || {
        client.slots("new").is_none().then_some(())
    });
    client.check_invariants(2);
    client.check_repair();
}

#[test]
fn files_that_came_or_went_while_the_server_was_down_are_right_at_once() {
    for args in [&["--appendonly", "yes"][..], &[]] {
        let mut server = Options::default()
            .accounts(&["a", "b"])
            .server(args)
            .start();
        let mut client = server.connect();
        let keys: Vec<String> = (0..4).map(|_| client.pool_key()).collect();
        for key in &keys {
            client.acquire(key, NOW);
        }
        client.ok(&["MPOOL.COOLDOWN", "medium", "b", "0", "1"]);
        client.acquire(&keys[2], NOW);
        client.acquire(&keys[3], NOW);
        if args.is_empty() {
            client.ok(&["SAVE"]);
            server.kill();
        } else {
            server.shutdown();
        }
        server.remove_account("medium/a");
        server.write_account("medium/c", &bearer("c"));
        server.write_account("medium/broken", "{");
        server.launch();
        let mut client = server.connect();
        // The very first command.
        for key in &keys {
            let lease = client.acquire(key, NOW + 1);
            assert_ne!(lease.account, "a", "{args:?}");
            client.check_invariants(2);
        }
        assert_eq!((client.slots("b"), client.slots("c")), (Some(2), Some(2)));
        assert_eq!((client.slots("a"), client.slots("broken")), (None, None));
        assert!(client.invalid_files().contains_key("medium/broken.json"));
        client.check_repair();
    }
}

#[test]
fn another_folder_can_be_turned_to() {
    let server = Options::default().accounts(&["a", "b"]).start();
    let mut client = server.connect();
    let key = client.pool_key();
    client.acquire(&key, NOW);
    let other = tempfile::tempdir().unwrap();
    fs::create_dir(other.path().join("medium")).unwrap();
    for name in ["b", "c"] {
        fs::write(
            other.path().join(format!("medium/{name}.json")),
            format!(r#"{{"api_key": "other-{name}"}}"#),
        )
        .unwrap();
    }
    client.ok(&[
        "CONFIG",
        "SET",
        "mpool.account-dir",
        other.path().to_str().unwrap(),
    ]);
    client.wait_for_account("c", true);
    client.wait_for_account("a", false);
    let lease = client.map(&["MPOOL.ACQUIRE", &key, &NOW.to_string(), "WITHTOKEN"]);
    assert!(text(&lease["token"]).starts_with("other-"));
    // The new one is watched, the old one is not.
    fs::write(other.path().join("medium/d.json"), bearer("d")).unwrap();
    server.write_account("medium/e", &bearer("e"));
    client.wait_for_account("d", true);
    client.ok(&["MPOOL.RELOAD"]);
    assert_eq!(client.slots("e"), None);
    // One that isn't there yet removes nothing, and is taken when it comes.
    let later = other.path().join("later");
    client.ok(&[
        "CONFIG",
        "SET",
        "mpool.account-dir",
        later.to_str().unwrap(),
    ]);
    client.ok(&["MPOOL.RELOAD"]);
    assert_eq!(client.slots("d"), Some(0));
    fs::create_dir_all(later.join("medium")).unwrap();
    fs::write(later.join("medium/z.json"), bearer("z")).unwrap();
    client.wait_for_account("z", true);
    wait_for("the others to go", || {
        client.slots("d").is_none().then_some(())
    });
    assert_eq!(client.acquire(&key, NOW).account, "z");
    client.check_invariants(2);
    client.check_repair();
}

#[test]
fn a_server_without_any_account_folder_starts_and_takes_one_later() {
    let nowhere = tempfile::tempdir().unwrap();
    let folder = nowhere.path().join("mounted/later");
    let mut server = Options::default()
        .module(&["account-dir", folder.to_str().unwrap()])
        .start();
    let mut client = server.connect();
    let key = client.pool_key();
    client.refused("NOACCOUNT", &["MPOOL.ACQUIRE", &key, &NOW.to_string()]);
    assert!(
        server.log().contains("no readable folder"),
        "{}",
        server.log()
    );
    fs::create_dir_all(folder.join("medium")).unwrap();
    fs::write(folder.join("medium/a.json"), bearer("a")).unwrap();
    client.wait_for_account("a", true);
    assert_eq!(client.acquire(&key, NOW).account, "a");
    assert!(server.is_alive());
}

#[test]
fn a_flood_of_changes_ends_in_what_the_folder_holds() {
    let server = Options::default().start();
    let mut client = server.connect();
    let keys: Vec<String> = (0..20).map(|_| client.pool_key()).collect();
    for number in 0..600 {
        server.write_account(&format!("medium/x{number}"), &bearer("x"));
        if number % 3 == 0 {
            // Gone and back in no time.
            let other = format!("medium/x{}", number / 3);
            server.remove_account(&other);
            server.write_account(&other, r#"{"api_key": "k"}"#);
        }
        let _ = client.try_acquire(&keys[number % 20], NOW);
    }
    wait_for("all of them to be there", || {
        (client
            .run::<Vec<String>>(&["KEYS", "medium_pool:slots:*"])
            .len()
            == 600)
            .then_some(())
    });
    for number in 0..300 {
        server.remove_account(&format!("medium/x{number}"));
        client.acquire(&keys[number % 20], NOW);
    }
    let expected: BTreeSet<String> = (300..600).map(|number| format!("x{number}")).collect();
    wait_for("the pool to be as the folder", || {
        let rows = client.pages("ACCOUNTS", "medium", "1000");
        let found: BTreeSet<String> = rows.iter().map(|row| text(&row["account"])).collect();
        (found == expected).then_some(())
    });
    for key in &keys {
        assert!(expected.contains(&client.acquire(key, NOW).account));
    }
    let counters: Vec<String> = client.run(&["KEYS", "medium_pool:slots:*"]);
    assert_eq!(counters.len(), expected.len());
    client.check_invariants(2);
    client.check_repair();
}

/// Whether some file below the folder has the bytes in it.
fn holds_bytes(folder: &Path, bytes: &[u8]) -> Option<std::path::PathBuf> {
    fs::read_dir(folder).unwrap().find_map(|entry| {
        let path = entry.unwrap().path();
        if path.is_dir() {
            return holds_bytes(&path, bytes);
        }
        let content = fs::read(&path).unwrap();
        content
            .windows(bytes.len())
            .any(|window| window == bytes)
            .then_some(path)
    })
}

#[test]
fn tokens_are_nowhere_but_in_replies_that_ask_for_them() {
    const SECRET: &str = "s3cr3t-t0k3n";
    let mut server = Options::default()
        .file("medium/a", &format!(r#"{{"access_token": "{SECRET}-a"}}"#))
        .file(
            "high/h",
            &format!(r#"{{"wrapped": {{"apiKey": "{SECRET}-h"}}}}"#),
        )
        .file(
            "medium/broken",
            &format!(r#"{{"access_token": "{SECRET} broken"}}"#),
        )
        .file(
            "medium/broken2",
            &format!(r#"{{"access_token": "{SECRET}", "api_key": "{SECRET}"}}"#),
        )
        .server(&[
            "--appendonly",
            "yes",
            "--aof-use-rdb-preamble",
            "no",
            "--loglevel",
            "debug",
        ])
        .server(&["--slowlog-log-slower-than", "0"])
        .start();
    let replica = Options::default().replica_of(&server).start();
    let mut client = server.connect();
    let key = client.pool_key();
    let bound = client.bound_key("high/h");
    for key in [&key, &bound] {
        let lease = client.map(&["MPOOL.ACQUIRE", key, "1000", "WITHTOKEN"]);
        assert!(text(&lease["token"]).starts_with(SECRET));
        let lease = client.map(&["MPOOL.ACQUIRE", key, "1000"]);
        assert!(!lease.contains_key("token"));
    }
    let shown = [
        format!("{:?}", client.run::<redis::Value>(&["MPOOL.STATUS"])),
        format!(
            "{:?}",
            client.run::<redis::Value>(&["MPOOL.STATUS", "KEY", &key])
        ),
        format!(
            "{:?}",
            client.run::<redis::Value>(&["MPOOL.STATUS", "ACCOUNTS", "medium"])
        ),
        format!("{:?}", client.run::<redis::Value>(&["MPOOL.RELOAD"])),
        format!("{:?}", client.run::<redis::Value>(&["INFO", "everything"])),
        format!(
            "{:?}",
            client.run::<redis::Value>(&["SLOWLOG", "GET", "-1"])
        ),
        format!("{:?}", client.run::<redis::Value>(&["CONFIG", "GET", "*"])),
    ];
    for text in shown {
        assert!(!text.contains(SECRET), "{text}");
    }
    // The replica's first copy is a background save, beside which there is no other.
    wait_for_same(&mut client, &mut replica.connect());
    wait_for("the snapshot", || client.try_run::<String>(&["SAVE"]).ok());
    client.ok(&["BGREWRITEAOF"]);
    wait_for("the rewrite", || {
        (client.info("persistence", "aof_rewrite_in_progress") == "0").then_some(())
    });
    wait_for_same(&mut client, &mut replica.connect());
    replica.connect().ok(&["SAVE"]);
    let mut hashes = BTreeMap::new();
    for name in client.run::<Vec<String>>(&["KEYS", "*"]) {
        hashes.insert(name.clone(), client.run::<Vec<u8>>(&["DUMP", &name]));
    }
    assert!(hashes.len() >= 4);
    assert!(!format!("{hashes:?}").contains(SECRET));
    server.shutdown();
    for folder in [server.folder.path(), replica.folder.path()] {
        assert_eq!(holds_bytes(&folder.join("data"), SECRET.as_bytes()), None);
        // The look itself finds what is there.
        assert!(holds_bytes(&folder.join("data"), b"client_keys:").is_some());
    }
}

#[test]
fn a_reload_whose_client_has_gone_is_nobodys_trouble() {
    let mut server = Options::default().accounts(&["a", "b"]).start();
    for _ in 0..30 {
        let mut client = server.connect();
        // Sent, and gone before the reply.
        client.send(&["MPOOL.RELOAD"]);
        drop(client);
    }
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| (0..10).for_each(|_| drop(reload(&mut server.connect()))));
        }
    });
    let mut client = server.connect();
    client.check_repair();
    let mut leaving = server.connect();
    leaving.send(&["MPOOL.RELOAD"]);
    // Redis unloads no module that a client waits for.
    client.unload();
    assert!(server.is_alive());
}

#[test]
fn a_file_that_every_user_may_read_is_named_once_and_its_content_never() {
    let server = Options::default().accounts(&["a", "b"]).start();
    let mut client = server.connect();
    let warned = |account: &str| {
        let name = format!("{account}.json can be read by every user");
        server.log().matches(&name).count()
    };
    let exposed = |client: &mut Client| -> Vec<String> {
        redis::from_redis_value(client.map(&["MPOOL.RELOAD"])["exposed"].clone()).unwrap()
    };
    let mode = |account: &str, mode: u32| {
        let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
        fs::set_permissions(server.account_file(account), permissions).unwrap();
    };
    assert_eq!(exposed(&mut client), Vec::<String>::new());
    assert_eq!((warned("medium/a"), warned("medium/b")), (0, 0));
    mode("medium/a", 0o604);
    wait_for("a warning", || (warned("medium/a") == 1).then_some(()));
    mode("medium/b", 0o660);
    // One that is broken may hold a token all the same.
    server.write_account("high/c", r#"{"access_token": "token-of-c", "#);
    mode("high/c", 0o644);
    for _ in 0..3 {
        assert_eq!(exposed(&mut client), ["medium/a", "high/c"]);
    }
    wait_for("a warning", || (warned("high/c") == 1).then_some(()));
    assert_eq!((warned("medium/a"), warned("medium/b")), (1, 0));
    mode("medium/a", 0o600);
    mode("high/c", 0o600);
    assert_eq!(exposed(&mut client), Vec::<String>::new());
    // It is no worse an account for it.
    mode("medium/a", 0o644);
    wait_for("another warning", || {
        (warned("medium/a") == 2).then_some(())
    });
    assert_eq!(client.slots("a"), Some(0));
    assert!(!server.log().contains("token-of-"));

    // Nor does what was there before the start go unnoticed.
    let mut server = server;
    server.kill();
    fs::write(server.folder.path().join("data/log"), "").unwrap();
    server.launch();
    assert_eq!(server.log().matches("can be read by every user").count(), 1);
    assert!(server.log().contains("medium/a.json can be read"));
}
