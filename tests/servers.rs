//! The pool through restarts, replication, promotion, loading and unloading of
//! the module, and where Redis itself refuses to write.
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
use std::ffi::OsStr;
use std::fs;
use std::process::Command;
use std::time::Duration;
use support::*;

/// Keys with leases on accounts: some held, some released, one revoked.
fn populate(client: &mut Client) -> Vec<String> {
    client.ok(&[
        "MPOOL.COOLDOWN",
        "medium",
        "cold",
        "1000",
        "100000000",
        "REASON",
        "429",
    ]);
    let keys: Vec<String> = (0..5).map(|_| client.pool_key()).collect();
    for (at, key) in (1000..).zip(&keys[..4]) {
        client.acquire(key, at);
    }
    client.ok(&["MPOOL.RELEASE", &keys[3]]);
    client.acquire(&keys[4], 1004);
    client.ok(&["MPOOL.REVOKE", &keys[4]]);
    client.check_invariants(2);
    keys
}

/// What a restart must not change.
#[track_caller]
fn check_populated(client: &mut Client, keys: &[String], digest: &str) {
    assert_eq!(client.traces().0, digest);
    for (at, key) in (1000..).zip(&keys[..3]) {
        let lease = client.acquire(key, 2000);
        assert_eq!(
            (lease.state.as_str(), lease.next),
            ("current", Some(at + DAY))
        );
    }
    assert_eq!(client.state("cold", 2000).as_deref(), Some("cooldown"));
    client.refused("REVOKED", &["MPOOL.ACQUIRE", &keys[4], "2000"]);
    assert_eq!(client.acquire(&keys[3], 2000).state, "assigned");
    client.check_invariants(2);
    client.check_repair();
    // Nobody gets two slots, and the counters were not counted twice.
    let used: u64 = ["a", "b", "cold"]
        .iter()
        .filter_map(|account| client.slots(account))
        .sum();
    assert_eq!(used, 4);
}

fn pool() -> Options {
    Options::default().accounts(&["a", "b", "cold"])
}

#[test]
fn a_restart_keeps_everything() {
    type End = fn(&mut Server);
    let save_and_kill: End = |server| {
        server.connect().ok(&["SAVE"]);
        server.kill();
    };
    let table: &[(&str, &[&str], End)] = &[
        (
            "an append-only file",
            &["--appendonly", "yes"],
            Server::shutdown,
        ),
        (
            "a kill with appendfsync always",
            &["--appendonly", "yes", "--appendfsync", "always"],
            Server::kill,
        ),
        (
            "a rewritten append-only file",
            &["--appendonly", "yes", "--appendfsync", "always"],
            |server| {
                let mut client = server.connect();
                client.ok(&["BGREWRITEAOF"]);
                wait_for("the rewrite", || {
                    (client.info("persistence", "aof_rewrite_in_progress") == "0"
                        && client.info("persistence", "aof_rewrite_scheduled") == "0")
                        .then_some(())
                });
                server.kill();
            },
        ),
        (
            "an append-only file without an RDB preamble",
            &["--appendonly", "yes", "--aof-use-rdb-preamble", "no"],
            |server| {
                let mut client = server.connect();
                client.ok(&["BGREWRITEAOF"]);
                wait_for("the rewrite", || {
                    (client.info("persistence", "aof_rewrite_in_progress") == "0").then_some(())
                });
                server.shutdown();
            },
        ),
        ("a snapshot and a kill", &[], save_and_kill),
    ];
    for (what, args, end) in table {
        println!("{what}");
        let mut server = pool().server(args).start();
        let mut client = server.connect();
        let keys = populate(&mut client);
        let digest = client.traces().0;
        end(&mut server);
        server.launch();
        check_populated(&mut server.connect(), &keys, &digest);
        assert!(server.is_alive());
    }
}

#[test]
fn a_kill_amid_writes_leaves_a_pool_that_agrees_with_itself() {
    let mut server = pool()
        .server(&["--appendonly", "yes", "--appendfsync", "always"])
        .start();
    let mut client = server.connect();
    let keys: Vec<String> = (0..6).map(|_| client.pool_key()).collect();
    let mut now = 1000;
    for _ in 0..5 {
        std::thread::scope(|scope| {
            let workers: Vec<_> = keys
                .iter()
                .map(|key| {
                    let mut client = server.connect();
                    scope.spawn(move || {
                        for round in 0.. {
                            let words: &[&str] = if round % 2 == 0 {
                                &["MPOOL.ACQUIRE", key, "*"]
                            } else {
                                &["MPOOL.RELEASE", key]
                            };
                            match client.try_run::<Value>(words) {
                                Err(error) if error.code().is_none() => return round,
                                _ => {}
                            }
                        }
                        0
                    })
                })
                .collect();
            std::thread::sleep(Duration::from_millis(50));
            server.kill();
            for worker in workers {
                worker.join().unwrap();
            }
        });
        server.launch();
        let mut client = server.connect();
        client.check_invariants(2);
        client.check_repair();
        now += 1;
        let _ = client.try_acquire(&keys[0], now);
    }
}

#[test]
fn a_replica_follows_and_refuses_writes() {
    let primary = pool().start();
    let mut client = primary.connect();
    let keys = populate(&mut client);
    let replica = pool().replica_of(&primary).start();
    let mut other = replica.connect();
    wait_for_same(&mut client, &mut other);
    // Before and after the first full copy.
    client.acquire(&keys[3], 5000);
    client.acquire(&keys[0], 1000 + DAY);
    wait_for_same(&mut client, &mut other);

    let writes: &[&[&str]] = &[
        &["MPOOL.ACQUIRE", &keys[0], "5000"],
        &["MPOOL.RELEASE", &keys[0]],
        &["MPOOL.REVOKE", &keys[0]],
        &["MPOOL.KEYGEN", "medium", "POOL"],
        &["MPOOL.COOLDOWN", "medium", "a", "1", "1"],
        &["MPOOL.RELOAD"],
        &["MPOOL.REPAIR"],
    ];
    for words in writes {
        other.refused("READONLY", words);
    }
    let at = (2 * DAY).to_string();
    for words in [
        &["MPOOL.STATUS", "NOW", &at][..],
        &["MPOOL.STATUS", "KEY", &keys[1], "NOW", &at],
        &["MPOOL.STATUS", "LEASES", "medium"],
    ] {
        assert_eq!(
            other.run::<Value>(words),
            client.run::<Value>(words),
            "{words:?}"
        );
    }
    assert_eq!(other.state("cold", 5000).as_deref(), Some("cooldown"));
    other.check_invariants(2);

    // The replica's own files change nothing there.
    let before = other.traces().0;
    replica.remove_account("medium/a");
    wait_for("the replica to show the account as missing", || {
        (other.state("a", 5000).as_deref() == Some("missing")).then_some(())
    });
    assert_eq!(other.traces().0, before);
    // The primary's do, in both.
    primary.remove_account("medium/a");
    client.wait_for_account("a", false);
    wait_for_same(&mut client, &mut other);
    other.check_invariants(2);
}

/// The keyspace of a primary with leases on `a` and `b`, promoted on a server
/// with these account files.
fn promoted(options: Options) -> (Server, Server, Client, Vec<String>) {
    let primary = pool().start();
    let mut client = primary.connect();
    let keys = populate(&mut client);
    let replica = options.replica_of(&primary).start();
    let mut other = replica.connect();
    wait_for_same(&mut client, &mut other);
    other.ok(&["REPLICAOF", "NO", "ONE"]);
    (primary, replica, other, keys)
}

#[test]
fn a_promoted_replica_with_the_account_files_does_everything() {
    let (primary, replica, mut other, keys) = promoted(pool());
    let lease = other.map(&["MPOOL.ACQUIRE", &keys[0], "2000", "WITHTOKEN"]);
    assert_eq!(text(&lease["state"]), "current");
    assert_eq!(
        text(&lease["token"]),
        format!("token-of-{}", text(&lease["account"]))
    );
    assert_eq!(other.acquire(&keys[3], 2000).state, "assigned");
    assert_eq!(other.acquire(&keys[0], 1000 + DAY).state, "rotated");
    let key = other.pool_key();
    other.check_invariants(2);
    other.check_repair();
    // Demoted again, it is what the primary is.
    other.ok(&["REPLICAOF", "127.0.0.1", &primary.port.to_string()]);
    let mut client = primary.connect();
    wait_for_same(&mut client, &mut other);
    other.refused("READONLY", &["MPOOL.ACQUIRE", &key, "2000"]);
    assert_eq!(other.state("cold", 5000).as_deref(), Some("cooldown"));
    // And promoted once more it follows itself.
    other.ok(&["REPLICAOF", "NO", "ONE"]);
    assert_eq!(other.acquire(&keys[0], 2000).state, "current");
    other.refused("NOKEY", &["MPOOL.ACQUIRE", &key, "2000"]);
    other.check_invariants(2);
    other.check_repair();
    drop(replica);
}

#[test]
fn a_promoted_replica_without_account_files_lets_leases_go_on() {
    let nowhere = tempfile::tempdir().unwrap();
    let missing = nowhere
        .path()
        .join("not/there")
        .to_string_lossy()
        .into_owned();
    for module in [&[][..], &["account-dir", &missing]] {
        let (_primary, mut replica, mut other, keys) = promoted(Options::default().module(module));
        let before = other.traces().0;
        // However often the folder is looked at, nothing is given up.
        for _ in 0..3 {
            other.ok(&["MPOOL.RELOAD"]);
            for key in &keys[..3] {
                assert_eq!(other.acquire(key, 2000).state, "current", "{module:?}");
                other.refused("NOTOKEN", &["MPOOL.ACQUIRE", key, "2000", "WITHTOKEN"]);
            }
        }
        std::thread::sleep(Duration::from_millis(700));
        other.ok(&["MPOOL.REPAIR"]);
        assert_eq!(
            other.traces().0,
            before,
            "{module:?}: something was released"
        );
        // A key that holds a slot is not refused at its rotation either.
        let lease = other.acquire(&keys[0], 1000 + DAY);
        assert_eq!(lease.state, "rotated");
        // But nothing is lent anew without a file.
        other.refused("NOACCOUNT", &["MPOOL.ACQUIRE", &keys[3], "2000"]);
        assert_eq!(other.state("a", 2000).as_deref(), Some("missing"));
        other.check_invariants(2);
        other.check_repair();
        assert!(replica.is_alive());
    }
}

#[test]
fn account_files_that_arrive_after_a_promotion_are_used() {
    let (_primary, replica, mut other, keys) = promoted(Options::default());
    for account in ["a", "b", "cold"] {
        replica.write_account(&format!("medium/{account}"), &bearer(account));
    }
    other.ok(&["MPOOL.RELOAD"]);
    let lease = other.map(&["MPOOL.ACQUIRE", &keys[0], "2000", "WITHTOKEN"]);
    assert_eq!(text(&lease["state"]), "current");
    assert_eq!(
        text(&lease["token"]),
        format!("token-of-{}", text(&lease["account"]))
    );
    assert_eq!(other.acquire(&keys[3], 2000).state, "assigned");
    // From then on a file that goes takes its account along.
    for key in &keys[1..4] {
        other.ok(&["MPOOL.RELEASE", key]);
    }
    let account = text(&lease["account"]);
    replica.remove_account(&format!("medium/{account}"));
    other.wait_for_account(&account, false);
    let lease = other.acquire(&keys[0], 2001);
    assert_eq!(lease.state, "failover");
    assert_ne!(lease.account, account);
    other.check_invariants(2);
    other.check_repair();
}

#[test]
fn redis_itself_refuses_with_its_own_errors() {
    let mut server = pool().server(&["--appendonly", "no"]).start();
    let mut client = server.connect();
    let keys = populate(&mut client);
    // One lease, so that there is a slot elsewhere.
    for key in &keys[1..3] {
        client.ok(&["MPOOL.RELEASE", key]);
    }
    // A snapshot that fails makes Redis refuse writes.
    client.ok(&["CONFIG", "SET", "stop-writes-on-bgsave-error", "yes"]);
    client.ok(&["CONFIG", "SET", "save", "3600 1"]);
    let folder = server.folder.path().join("gone");
    fs::create_dir(&folder).unwrap();
    client.ok(&["CONFIG", "SET", "dir", folder.to_str().unwrap()]);
    fs::remove_dir(&folder).unwrap();
    client.ok(&["BGSAVE"]);
    wait_for("the snapshot to fail", || {
        (client.info("persistence", "rdb_last_bgsave_status") == "err").then_some(())
    });
    for words in [
        &["MPOOL.ACQUIRE", &keys[0], "2000"][..],
        &["MPOOL.RELEASE", &keys[0]],
        &["MPOOL.REVOKE", &keys[0]],
        &["MPOOL.KEYGEN", "medium", "POOL"],
        &["MPOOL.COOLDOWN", "medium", "a", "1", "1"],
        &["MPOOL.REPAIR"],
    ] {
        client.refused("MISCONF", words);
    }
    client.ok(&["MPOOL.STATUS"]);
    // A file that goes meanwhile must not bring the server down.
    server.remove_account("medium/a");
    std::thread::sleep(Duration::from_millis(500));
    client.ok(&[
        "CONFIG",
        "SET",
        "dir",
        server.folder.path().join("data").to_str().unwrap(),
    ]);
    client.ok(&["SAVE"]);
    let lease = client.acquire(&keys[0], 2000);
    assert_eq!(lease.account, "b");
    client.wait_for_account("a", false);
    client.check_invariants(2);
    client.check_repair();
    assert!(server.is_alive());
}

#[test]
fn out_of_memory_refuses_what_must_write_more() {
    let mut server = pool().start();
    let mut client = server.connect();
    let keys = populate(&mut client);
    let before = client.traces().0;
    client.ok(&["CONFIG", "SET", "maxmemory", "1"]);
    for words in [
        &["MPOOL.ACQUIRE", &keys[3], "2000"][..],
        &["MPOOL.ACQUIRE", &keys[0], &(1000 + DAY).to_string()],
        &["MPOOL.KEYGEN", "medium", "POOL"],
    ] {
        client.refused("OOM", words);
    }
    assert_eq!(client.traces().0, before);
    assert_eq!(client.acquire(&keys[0], 2000).state, "current");
    client.ok(&["MPOOL.STATUS"]);
    client.ok(&["MPOOL.RELEASE", &keys[0]]);
    client.ok(&["MPOOL.REVOKE", &keys[1]]);
    assert_eq!(
        (client.holds(&keys[0]), client.holds(&keys[1])),
        (None, None)
    );
    client.run::<Value>(&["MPOOL.REPAIR"]);
    client.ok(&["CONFIG", "SET", "maxmemory", "0"]);
    assert_eq!(client.acquire(&keys[3], 2000).state, "assigned");
    client.check_invariants(2);
    client.check_repair();
    assert!(server.is_alive());
}

#[test]
fn an_account_that_goes_while_clients_are_paused_goes_afterwards() {
    let mut server = pool().start();
    let mut client = server.connect();
    let keys = populate(&mut client);
    for key in &keys[1..3] {
        client.ok(&["MPOOL.RELEASE", key]);
    }
    let account = client.holds(&keys[0]).unwrap();
    client.ok(&["CLIENT", "PAUSE", "1500", "WRITE"]);
    server.remove_account(&format!("medium/{account}"));
    // Reading is allowed meanwhile.
    client.ok(&["MPOOL.STATUS"]);
    client.wait_for_account(&account, false);
    let lease = client.acquire(&keys[0], 2000);
    assert_eq!(lease.state, "failover");
    client.check_invariants(2);
    client.check_repair();
    assert!(server.is_alive());
}

#[test]
fn the_module_can_be_unloaded_and_loaded_again() {
    let mut server = pool().start();
    let mut client = server.connect();
    let keys = populate(&mut client);
    // Two leases, so that either of two accounts can take them.
    client.ok(&["MPOOL.RELEASE", &keys[2]]);
    for round in 0..5 {
        client.unload();
        client.refused("ERR", &["MPOOL.STATUS"]);
        // What happens without it is seen when it is back.
        let (gone, back) = if round % 2 == 0 {
            ("a", "b")
        } else {
            ("b", "a")
        };
        server.write_account(&format!("medium/{back}"), &bearer(back));
        server.remove_account(&format!("medium/{gone}"));
        client.ok(&["SET", "medium_pool:slots:cold", "2"]);
        client.load(&server);
        for key in &keys[..2] {
            assert_eq!(client.acquire(key, 2000 + round).account, back);
        }
        assert_eq!(client.slots(gone), None);
        client.check_invariants(2);
        client.check_repair();
        server.write_account("medium/new", &bearer("new"));
        client.wait_for_account("new", true);
        server.remove_account("medium/new");
        client.wait_for_account("new", false);
    }
    let unloads = server.log().matches("unloaded").count();
    assert!(unloads >= 5, "{unloads}");
    // With a reload under way, and clients at work.
    for _ in 0..5 {
        let (mut one, mut other) = (server.connect(), server.connect());
        std::thread::scope(|scope| {
            scope.spawn(move || {
                one.try_run::<Value>(&["MPOOL.RELOAD"])
                    .map_err(|error| error.to_string())
            });
            scope.spawn(move || (0..50).for_each(|now| drop(other.try_acquire("nobody", now))));
            let _ = client.try_run::<Value>(&["MODULE", "UNLOAD", "mpool"]);
        });
        if client.try_run::<Value>(&["MPOOL.STATUS"]).is_ok() {
            client.unload();
        }
        client.load(&server);
        client.check_repair();
    }
    assert!(server.is_alive());
}

/// The watcher's turns come between commands, a busy script included, though the
/// server looks at its connections meanwhile.
#[test]
fn nothing_is_put_right_in_the_midst_of_a_script() {
    let options = pool().server(&["--lua-time-limit", "50"]);
    let mut server = options.start();
    let mut client = server.connect();
    client.wait_for_account("a", true);
    let script = "local before = redis.call('EXISTS', KEYS[1]) \
        for _ = 1, 2e8 do end \
        return {before, redis.call('EXISTS', KEYS[1])}";
    let mut busy = server.connect();
    let seen = std::thread::scope(|scope| {
        let script = scope
            .spawn(move || busy.run::<Vec<i64>>(&["EVAL", script, "1", "medium_pool:slots:a"]));
        wait_for("the server to be busy", || {
            let refused = client.try_run::<Value>(&["PING"]).err()?;
            assert!(refused.to_string().contains("BUSY"), "{refused}");
            Some(())
        });
        server.remove_account("medium/a");
        script.join().unwrap()
    });
    assert_eq!(seen, [1, 1]);
    client.wait_for_account("a", false);
    client.check_repair();
    assert!(server.is_alive());
}

/// Puts a server's clock back by an hour once the file that CLOCK_BACK names is there.
const CLOCK: &str = r#"
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int result = syscall(SYS_gettimeofday, now, zone);
    if (access(getenv("CLOCK_BACK"), F_OK) == 0) now->tv_sec -= 3600;
    return result;
}
"#;

/// Timers of the server wait for a time of day: for one that is an hour off,
/// nothing would be seen of account files meanwhile.
#[test]
fn account_files_are_followed_though_the_clock_is_put_back() {
    let folder = tempfile::tempdir().unwrap();
    let [source, library, back] =
        ["clock.c", "clock.so", "back"].map(|name| folder.path().join(name));
    fs::write(&source, CLOCK).unwrap();
    let compiled = Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .args([&library, &source])
        .status();
    assert!(compiled.unwrap().success());
    let preloaded = std::env::var_os("LD_PRELOAD").into_iter();
    let preloaded: Vec<_> = preloaded.chain([library.into_os_string()]).collect();
    let mut options = pool().server(&["--lua-time-limit", "50"]);
    options.env = vec![
        ("LD_PRELOAD".to_owned(), preloaded.join(OsStr::new(":"))),
        ("CLOCK_BACK".to_owned(), back.clone().into_os_string()),
    ];
    let mut server = options.start();
    let mut client = server.connect();
    client.wait_for_account("a", true);
    let mut other = server.connect();
    let clock = |client: &mut Client| client.run::<Vec<i64>>(&["TIME"])[0];
    let before = clock(&mut client);
    std::thread::scope(|scope| {
        let script = ["EVAL", "while true do end", "0"];
        let script = scope.spawn(move || client.try_run::<Value>(&script).unwrap_err());
        wait_for("the server to be busy", || {
            other.try_run::<Value>(&["PING"]).err()
        });
        server.remove_account("medium/a");
        // Long enough for the watcher to have asked for its turn.
        std::thread::sleep(Duration::from_millis(500));
        fs::write(back, "").unwrap();
        other.ok(&["SCRIPT", "KILL"]);
        script.join().unwrap();
    });
    assert!(clock(&mut other) < before);
    other.wait_for_account("a", false);
    server.write_account("medium/a", &bearer("a"));
    other.wait_for_account("a", true);
    other.check_repair();
    other.unload();
    assert!(server.is_alive());
}

#[test]
fn an_unload_amid_a_flood_of_account_files_harms_nothing() {
    let mut server = pool().start();
    let mut client = server.connect();
    let keys = populate(&mut client);
    for round in 0..20 {
        for number in 0..200 {
            let name = format!("medium/x{number}");
            if round % 2 == 0 || number % 3 == 0 {
                server.write_account(&name, &bearer("x"));
            } else {
                server.remove_account(&name);
            }
        }
        // At another moment of the watcher's each time.
        std::thread::sleep(Duration::from_millis(5 * round));
        client.unload();
        client.load(&server);
    }
    client.wait_until_ready();
    for key in &keys[..2] {
        client.acquire(key, 3000);
    }
    client.check_invariants(2);
    client.check_repair();
    assert!(server.is_alive());
}

/// The server frees the module's commands while connections still point to them.
#[test]
fn an_unload_closes_the_connections_that_point_to_the_modules_commands() {
    let mut server = pool().start();
    let mut client = server.connect();
    let key = client.pool_key();
    let (mut user, mut queued, mut other) = (server.connect(), server.connect(), server.connect());
    let acquire = ["MPOOL.ACQUIRE", key.as_str(), "1000"];
    user.ok(&acquire);
    queued.ok(&["MULTI"]);
    queued.ok(&acquire);
    queued.ok(&["PING"]);
    other.ok(&acquire);
    other.ok(&["SET", "x", "1"]);
    client.unload();
    let listed: String = client.run(&["CLIENT", "LIST"]);
    assert!(!listed.contains("cmd=mpool."), "{listed}");
    for (client, words) in [(&mut user, &acquire[..]), (&mut queued, &["EXEC"])] {
        let error = client.try_run::<Value>(words).unwrap_err();
        assert!(error.is_connection_dropped(), "{words:?}: {error}");
    }
    assert!(other.error(&acquire).contains("unknown command"));
    client.load(&server);
    assert_eq!(other.acquire(&key, 1000).state, "current");
    assert!(server.is_alive());
}

#[test]
fn the_module_can_be_loaded_into_a_running_server_with_data() {
    let server = Options {
        bare: true,
        ..pool()
    }
    .start();
    let mut client = server.connect();
    client.ok(&[
        "HSET",
        "client_keys:k",
        "tier",
        "medium",
        "use_pool",
        "true",
    ]);
    client.ok(&[
        "HSET",
        "client_keys:j",
        "tier",
        "medium",
        "use_pool",
        "true",
    ]);
    let (last, next) = ("1000".to_owned(), (1000 + DAY).to_string());
    client.ok(&[
        "HSET",
        "key_rotation:k",
        "account",
        "a",
        "last_rotation",
        &last,
        "next_rotation",
        &next,
    ]);
    client.ok(&[
        "HSET",
        "key_rotation:nobody",
        "account",
        "a",
        "last_rotation",
        &last,
        "next_rotation",
        &next,
    ]);
    client.ok(&["SET", "medium_pool:slots:a", "2"]);
    client.ok(&["SET", "medium_pool:slots:nowhere", "1"]);
    client.ok(&["SELECT", "3"]);
    client.load(&server);
    client.ok(&["SELECT", "0"]);
    let lease = client.acquire("k", 2000);
    assert_eq!(
        (lease.state.as_str(), lease.account.as_str(), lease.last),
        ("current", "a", Some(1000))
    );
    assert_ne!(client.acquire("j", 2000).account, "a");
    assert_eq!(client.slots("a"), Some(1));
    wait_for("the counter of nothing to go", || {
        client.slots("nowhere").is_none().then_some(())
    });
    client.check_invariants(2);
    client.check_repair();
}

#[test]
fn cluster_mode_refuses_to_load_and_says_why() {
    let server = Options {
        bare: true,
        ..pool()
    }
    .server(&["--cluster-enabled", "yes"])
    .start();
    let mut client = server.connect();
    client.error(&["MODULE", "LOAD", module().to_str().unwrap()]);
    assert!(server.log().contains("cluster mode"), "{}", server.log());
}

#[test]
fn a_policy_that_may_evict_the_pools_keys_draws_a_warning() {
    for (policy, warns) in [
        ("allkeys-lru", true),
        ("allkeys-random", true),
        ("noeviction", false),
        ("volatile-ttl", false),
    ] {
        let server = pool().server(&["--maxmemory-policy", policy]).start();
        let log = server.log();
        let warned = log
            .lines()
            .any(|line| line.contains("<mpool>") && line.contains("maxmemory-policy"));
        assert_eq!(warned, warns, "{policy}: {log}");
    }
}

#[test]
fn keys_that_were_evicted_are_seen_to_be_gone() {
    let mut server = pool()
        .server(&["--maxmemory-policy", "allkeys-random"])
        .start();
    let mut client = server.connect();
    populate(&mut client);
    client.ok(&["CONFIG", "SET", "maxmemory", "1"]);
    // A write makes the server evict everything; it is refused, or not.
    let _ = client.try_run::<Value>(&["SET", "x", "1"]);
    client.ok(&["CONFIG", "SET", "maxmemory", "0"]);
    let _ = client.try_acquire("nobody", 1);
    client.check_invariants(2);
    client.check_repair();
    let key = client.pool_key();
    assert_eq!(client.acquire(&key, 2000).state, "assigned");
    assert!(server.is_alive());
}

#[test]
fn a_panic_is_an_error_reply_and_a_line_in_the_log() {
    let mut server = pool().start();
    let mut client = server.connect();
    let known: Vec<Value> = client.run(&["COMMAND", "INFO", "MPOOL.PANIC"]);
    if known == [Value::Nil] {
        // Only a debug build has the command.
        return;
    }
    let keys = populate(&mut client);
    for _ in 0..3 {
        let error = client.refused("ERR", &["MPOOL.PANIC"]);
        assert!(error.contains("internal error"), "{error}");
        assert_eq!(client.acquire(&keys[0], 2000).state, "current");
        client.check_repair();
    }
    // The same behind a script and a transaction, and the status after one.
    client.refused("ERR", &["EVAL", "return redis.call('MPOOL.PANIC')", "0"]);
    // Who watches INFO alone sees the view made anew.
    client.wait_until_ready();
    client.error(&["MPOOL.PANIC"]);
    client.ok(&["MPOOL.STATUS"]);
    client.error(&["MPOOL.PANIC"]);
    server.remove_account("medium/b");
    client.wait_for_account("b", false);
    client.check_invariants(2);
    client.check_repair();
    assert!(
        server.log().contains("100%s on purpose"),
        "{}",
        server.log()
    );
    assert!(server.is_alive());
}

#[test]
fn two_pools_in_one_place_are_refused() {
    let server = pool().start();
    let mut client = server.connect();
    // Whatever the start has left to write is written with the first command.
    client.pool_key();
    client.refused("ERR", &["MODULE", "LOAD", module().to_str().unwrap()]);
    let modules: Vec<BTreeMap<String, Value>> = client.run(&["MODULE", "LIST"]);
    // Redis 8 has modules of its own.
    let ours = modules
        .iter()
        .filter(|module| text(&module["name"]) == "mpool");
    assert_eq!(ours.count(), 1, "{modules:?}");
}

#[test]
fn while_a_server_is_loading_it_says_so() {
    let mut server = pool().start();
    let mut client = server.connect();
    let keys = populate(&mut client);
    for _ in 0..200 {
        client.pool_key();
    }
    client.ok(&[
        "CONFIG",
        "SET",
        "loading-process-events-interval-bytes",
        "1024",
    ]);
    client.ok(&["CONFIG", "SET", "key-load-delay", "5000"]);
    let mut other = server.connect();
    std::thread::scope(|scope| {
        scope.spawn(|| client.ok(&["DEBUG", "RELOAD"]));
        for words in [&["MPOOL.ACQUIRE", &keys[0], "2000"][..], &["MPOOL.STATUS"]] {
            wait_for("LOADING", || {
                let outcome = other.try_run::<Value>(words);
                outcome
                    .is_err_and(|error| error.code() == Some("LOADING"))
                    .then_some(())
            });
        }
        // A file that goes meanwhile goes when it is over.
        server.remove_account("medium/cold");
    });
    assert_eq!(client.acquire(&keys[0], 2000).state, "current");
    client.wait_for_account("cold", false);
    client.check_invariants(2);
    client.check_repair();
    assert!(server.is_alive());
}

const PORTION: &str = "loading-process-events-interval-bytes";

/// A server whose data is less than one of the portions between which it answers
/// clients by its defaults, and takes a while to load.
fn slow_loader(args: &[&str]) -> Options {
    let slow = ["--rdbcompression", "no", "--key-load-delay", "500"];
    pool().server(&slow).server(args)
}

fn fill(client: &mut Client) {
    client.ok(&["DEBUG", "POPULATE", "1000", "filler", "300"]);
}

fn portion(client: &mut Client) -> String {
    let [_, value]: [String; 2] = client.run(&["CONFIG", "GET", PORTION]);
    value
}

fn is_loading(client: &mut Client) -> bool {
    client.info("persistence", "loading") == "1"
}

/// What a client is told between portions of the load that the work comes to.
fn while_loading<T: Send>(
    other: &mut Client,
    work: impl FnOnce() + Send,
    mut ask: impl FnMut(&mut Client) -> T + Send,
) -> Option<T> {
    std::thread::scope(|scope| {
        let working = scope.spawn(work);
        let mut told = None;
        while !working.is_finished() && told.is_none() {
            if is_loading(other) {
                told = Some(ask(other));
            }
        }
        told
    })
}

#[test]
fn clients_are_answered_while_less_than_a_portion_of_the_servers_is_loaded() {
    for args in [&[][..], &["--appendonly", "yes"]] {
        let mut server = slow_loader(args).start();
        let mut client = server.connect();
        let keys = populate(&mut client);
        fill(&mut client);
        let digest = client.traces().0;
        let before = portion(&mut client);
        let save = if args.is_empty() {
            ["SAVE"]
        } else {
            ["BGREWRITEAOF"]
        };
        client.run::<Value>(&save);
        wait_for("the data to be written", || {
            let state = client.info("persistence", "aof_rewrite_in_progress");
            (state == "0").then_some(())
        });
        server.kill();
        // Its launch asks INFO until nothing is left to be loaded.
        server.launch();
        let mut client = server.connect();
        let asked = client.info("commandstats", "cmdstat_info");
        assert!(!asked.starts_with("calls=1,"), "{args:?}: {asked}");
        assert_eq!(portion(&mut client), before, "{args:?}");
        check_populated(&mut client, &keys, &digest);
    }
}

#[test]
fn a_portion_of_the_operators_choice_is_kept() {
    let server = slow_loader(&[]).start();
    let mut client = server.connect();
    populate(&mut client);
    fill(&mut client);
    let mut other = server.connect();
    // It is one of the module's while the server loads, unless it was less.
    for (before, meanwhile) in [
        ("2097152", "32768"),
        ("65536", "32768"),
        ("32768", "32768"),
        ("8192", "8192"),
    ] {
        client.ok(&["CONFIG", "SET", PORTION, before]);
        let reload = || client.ok(&["DEBUG", "RELOAD"]);
        let seen = while_loading(&mut other, reload, portion);
        assert_eq!(seen.as_deref(), Some(meanwhile));
        assert_eq!(portion(&mut client), before);
    }
    // What is set while it loads is kept as well.
    client.ok(&["CONFIG", "SET", PORTION, "2097152"]);
    let reload = || client.ok(&["DEBUG", "RELOAD"]);
    let set = |other: &mut Client| other.ok(&["CONFIG", "SET", PORTION, "16384"]);
    assert!(while_loading(&mut other, reload, set).is_some());
    assert_eq!(portion(&mut client), "16384");
    client.check_repair();
}

#[test]
fn a_replicas_portion_is_its_own_again_whatever_its_load_comes_to() {
    let mut primary = slow_loader(&[]).start();
    let mut client = primary.connect();
    populate(&mut client);
    // More than what is on its way between the two at a time.
    client.ok(&["DEBUG", "POPULATE", "1000", "filler", "30000"]);
    // Emptied, it stays so, and loads what comes from the primary as it comes.
    let replica = Options {
        accounts: Vec::new(),
        ..slow_loader(&["--repl-diskless-load", "on-empty-db"])
    }
    .start();
    let mut other = replica.connect();
    let before = portion(&mut other);
    let port = primary.port.to_string();
    for fails in [false, true] {
        other.ok(&["REPLICAOF", "NO", "ONE"]);
        other.ok(&["FLUSHALL"]);
        other.ok(&["REPLICAOF", primary.host(), &port]);
        wait_for("the replica to load", || {
            is_loading(&mut other).then_some(())
        });
        assert_eq!(portion(&mut other), "32768");
        if fails {
            primary.kill();
        }
        wait_for("the load's end", || (!is_loading(&mut other)).then_some(()));
        assert_eq!(portion(&mut other), before);
        assert_eq!(other.run::<u64>(&["DBSIZE"]) == 0, fails);
    }
}

#[test]
fn a_server_without_config_loads_as_well() {
    let mut server = slow_loader(&["--rename-command", "CONFIG", ""]).start();
    let mut client = server.connect();
    let keys = populate(&mut client);
    let digest = client.traces().0;
    client.ok(&["SAVE"]);
    server.kill();
    server.launch();
    check_populated(&mut server.connect(), &keys, &digest);
    assert!(!server.log().contains("panic"), "{}", server.log());
}

#[test]
fn a_writable_replica_lives_on() {
    let primary = pool().start();
    let mut client = primary.connect();
    let keys = populate(&mut client);
    let mut replica = pool()
        .server(&["--replica-read-only", "no"])
        .replica_of(&primary)
        .start();
    let mut other = replica.connect();
    wait_for_same(&mut client, &mut other);
    // What it writes is its own affair.
    for now in [2000, 1000 + DAY] {
        for key in &keys {
            let _ = other.try_acquire(key, now);
        }
    }
    other.ok(&["MPOOL.STATUS"]);
    replica.remove_account("medium/a");
    client.acquire(&keys[0], 1000 + DAY);
    other.ok(&["REPLICAOF", "NO", "ONE"]);
    other.ok(&["MPOOL.REPAIR"]);
    other.check_invariants(2);
    other.check_repair();
    assert!(replica.is_alive());
}

/// `used_memory`, in bytes.
fn used_memory(client: &mut Client) -> i64 {
    let info: redis::InfoDict = client.run(&["INFO", "memory"]);
    info.get("used_memory").unwrap()
}

#[test]
fn repairs_and_looks_at_the_settings_keep_no_memory() {
    let server = Options::default().accounts(&["a"]).start();
    let mut client = server.connect();
    client.ok(&[
        "DEBUG",
        "POPULATE",
        "2000",
        "a-key-of-somebody-else-with-a-long-name",
        "8",
    ]);
    let work: [&[&str]; 2] = [&["MPOOL.REPAIR"], &["CONFIG", "GET", "mpool.account-dir"]];
    for command in work {
        let rounds = |client: &mut Client| (0..300).for_each(|_| client.ok(command));
        // What is allocated once is allocated now.
        rounds(&mut client);
        let before = used_memory(&mut client);
        rounds(&mut client);
        let grown = used_memory(&mut client) - before;
        assert!(
            grown < 50_000,
            "{command:?} keeps {grown} bytes in 300 calls"
        );
    }
}

#[test]
fn while_the_server_makes_room_by_evicting_nobody_is_refused() {
    let server = Options::default().accounts(&["a", "b"]).start();
    let mut client = server.connect();
    let key = client.pool_key();
    let fill = "for i = 1, 200000 do redis.call('SET', 'app:' .. i, 'something', 'EX', 10000) end";
    client.ok(&["EVAL", fill, "0"]);
    client.ok(&[
        "CONFIG",
        "SET",
        "maxmemory-policy",
        "volatile-lru",
        "maxmemory-eviction-tenacity",
        "0",
    ]);
    let limit = used_memory(&mut client) * 3 / 4;
    client.ok(&["CONFIG", "SET", "maxmemory", &limit.to_string()]);
    let mut while_over = 0;
    for now in 0..2000 {
        client.ok(&["MPOOL.RELEASE", &key]);
        assert_eq!(client.acquire(&key, now).state, "assigned");
        if used_memory(&mut client) <= limit {
            break;
        }
        while_over += 1;
    }
    assert!(while_over > 0, "the server was never over its limit");
}
