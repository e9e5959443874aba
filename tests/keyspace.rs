//! Changes by hand to each kind of key of the pool: the next command behaves
//! rightly, the counters agree with the leases, and REPAIR finds nothing.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop anywhere"
)]

mod support;

use redis::Value;
use support::*;

/// The instant of the first leases.
const NOW: i64 = 1_755_266_400_000;

/// What the acquire after a change must give.
#[derive(Clone, Copy, Debug)]
enum Then {
    /// The same lease as before.
    Current,
    /// An account in this state.
    State(&'static str),
    /// The other account, in this state.
    Other(&'static str),
    /// An error with this code.
    Error(&'static str),
}

use Then::{Current, Error, Other, State};

/// A pool of two accounts. `{k}` holds a slot of `{a}`, `{j}` one of `{b}`,
/// `{n}` none.
struct Scene {
    server: Server,
    client: Client,
    words: Vec<(&'static str, String)>,
    /// The database that the client has selected.
    database: String,
}

impl Scene {
    fn new() -> Self {
        let server = Options::default()
            .accounts(&["one", "two"])
            .file("high/h", &bearer("h"))
            .start();
        let mut client = server.connect();
        let (k, j, n) = (client.pool_key(), client.pool_key(), client.pool_key());
        let a = client.acquire(&k, NOW).account;
        let b = client.acquire(&j, NOW).account;
        assert_ne!(a, b);
        let words = vec![("{k}", k), ("{j}", j), ("{n}", n), ("{a}", a), ("{b}", b)];
        Self {
            server,
            client,
            words,
            database: "0".to_owned(),
        }
    }

    fn word(&self, name: &str) -> String {
        self.words
            .iter()
            .find(|(word, _)| *word == name)
            .unwrap()
            .1
            .clone()
    }

    /// Runs a line of words in which names in braces stand for the scene's.
    fn run(&mut self, line: &str) {
        let mut line = line.to_owned();
        for (name, value) in &self.words {
            line = line.replace(name, value);
        }
        let words: Vec<&str> = line.split(' ').collect();
        self.client.ok(&words);
        match words[..] {
            ["SELECT", database] => database.clone_into(&mut self.database),
            // Where a module listens to notifications, Valkey 8.1 leaves the
            // connection in the database that the key has gone to.
            ["MOVE", ..] => self.client.ok(&["SELECT", &self.database]),
            _ => {}
        }
    }

    #[track_caller]
    fn check(&mut self, key: &str, now: i64, then: Then, what: &str) {
        let (name, held) = (
            self.word(key),
            self.word(if key == "{j}" { "{b}" } else { "{a}" }),
        );
        let outcome = self.client.try_acquire(&name, now);
        match then {
            Current => {
                let lease = outcome.unwrap_or_else(|error| panic!("{what}: {error}"));
                assert_eq!(
                    (lease.state.as_str(), lease.account),
                    ("current", held),
                    "{what}"
                );
            }
            State(state) => assert_eq!(
                outcome.map(|lease| lease.state).as_deref(),
                Ok(state),
                "{what}"
            ),
            Other(state) => {
                let lease = outcome.unwrap_or_else(|error| panic!("{what}: {error}"));
                assert_eq!(lease.state, state, "{what}");
                assert_ne!(lease.account, held, "{what}");
            }
            Error(code) => {
                let error = outcome
                    .err()
                    .unwrap_or_else(|| panic!("{what}: not refused"));
                assert_eq!(error.split(' ').next(), Some(code), "{what}: {error}");
            }
        }
        assert_eq!(self.client.broken_invariant(2), None, "{what}");
        self.client.check_repair();
        assert!(self.server.is_alive(), "{what}");
    }
}

fn check_table(table: &[(&str, Then)]) {
    for (line, then) in table {
        let mut scene = Scene::new();
        for line in line.split("; ") {
            scene.run(line);
        }
        scene.check("{k}", NOW + 1, *then, line);
    }
}

#[test]
fn changes_of_a_keys_record() {
    check_table(
        &[
            ("DEL client_keys:{k}", Error("NOKEY")),
            ("UNLINK client_keys:{k}", Error("NOKEY")),
            ("MOVE client_keys:{k} 1", Error("NOKEY")),
            ("RENAME client_keys:{k} client_keys:other", Error("NOKEY")),
            ("HSET client_keys:{k} active false", Error("REVOKED")),
            ("HSET client_keys:{k} active perhaps", Error("ERR")),
            ("HSET client_keys:{k} expires_at 1000", Error("EXPIRED")),
            ("HSET client_keys:{k} expires_at never", Error("ERR")),
            ("HDEL client_keys:{k} expires_at", Current),
            ("HDEL client_keys:{k} active", Current),
            ("HSET client_keys:{k} tier gold", Error("ERR")),
            ("HDEL client_keys:{k} tier", Error("ERR")),
            ("HSET client_keys:{k} tier high", Error("ERR")),
            (
                "HSET client_keys:{k} tier high account_name h use_pool false",
                State("bound"),
            ),
            (
                "HSET client_keys:{k} use_pool false account_name {b}",
                State("bound"),
            ),
            ("HSET client_keys:{k} use_pool maybe", Error("ERR")),
            ("HSET client_keys:{k} name a-label", Current),
            ("SET client_keys:{k} text", Error("ERR")),
            (
                "MULTI; DEL client_keys:{k}; RPUSH client_keys:{k} text; EXEC",
                Error("ERR"),
            ),
            // Gone and back in one go: the lease went with the record.
            (
                "HSET client_keys:{k} active false; HSET client_keys:{k} active true",
                State("any"),
            ),
        ]
        .map(|(line, then)| (line, then))
        .iter()
        .filter(|(_, then)| !matches!(then, State("any")))
        .copied()
        .collect::<Vec<_>>(),
    );
}

#[test]
fn changes_of_a_lease() {
    check_table(&[
        ("DEL key_rotation:{k}", State("assigned")),
        ("UNLINK key_rotation:{k}", State("assigned")),
        ("MOVE key_rotation:{k} 1", State("assigned")),
        ("HDEL key_rotation:{k} account", State("assigned")),
        ("HSET key_rotation:{k} account nowhere", State("failover")),
        ("HSET key_rotation:{k} account no/name", State("assigned")),
        ("HSET key_rotation:{k} next_rotation 1000", State("rotated")),
        ("HSET key_rotation:{k} next_rotation soon", State("rotated")),
        ("HDEL key_rotation:{k} next_rotation", State("rotated")),
        ("HDEL key_rotation:{k} last_rotation", Current),
        ("HSET key_rotation:{k} previous_account no/name", Current),
        (
            "MULTI; DEL key_rotation:{k}; SET key_rotation:{k} text; EXEC",
            Error("WRONGTYPE"),
        ),
        (
            "RENAME key_rotation:{k} key_rotation:{n}",
            State("assigned"),
        ),
        (
            "RENAME key_rotation:{k} key_rotation:{j}",
            State("assigned"),
        ),
        ("COPY key_rotation:{k} key_rotation:{n}", Current),
        (
            "RENAME key_rotation:{k} key_rotation:nobody",
            State("assigned"),
        ),
    ]);
}

#[test]
fn changes_of_a_counter() {
    check_table(&[
        ("SET medium_pool:slots:{a} 7", Current),
        ("SET medium_pool:slots:{a} 0", Current),
        ("SET medium_pool:slots:{a} -3", Current),
        ("SET medium_pool:slots:{a} many", Current),
        ("SET medium_pool:slots:{a} 01", Current),
        ("SET medium_pool:slots:{a} +1", Current),
        ("INCR medium_pool:slots:{a}", Current),
        ("DEL medium_pool:slots:{a}", Current),
        (
            "MULTI; DEL medium_pool:slots:{a}; RPUSH medium_pool:slots:{a} x; EXEC",
            Current,
        ),
        (
            "RENAME medium_pool:slots:{a} medium_pool:slots:{b}",
            Current,
        ),
        (
            "RENAME medium_pool:slots:{a} medium_pool:slots:nowhere",
            Current,
        ),
        ("SET medium_pool:slots:nowhere 1", Current),
        ("SET high_pool:slots:nowhere 1", Current),
        ("MOVE medium_pool:slots:{a} 1", Current),
        (
            "SET medium_pool:slots:{a} 2; SET medium_pool:slots:{b} 2",
            Current,
        ),
    ]);
    // The counter of an account that isn't there goes.
    let mut scene = Scene::new();
    scene.run("SET medium_pool:slots:nowhere 1");
    scene.check("{k}", NOW + 1, Current, "a counter of nothing");
    assert_eq!(scene.client.slots("nowhere"), None);
}

#[test]
fn changes_of_a_cooldown() {
    check_table(&[
        (
            "SET medium_pool:cooldown:{a} 1855266400000",
            Other("failover"),
        ),
        ("SET medium_pool:cooldown:{a} 1000", Current),
        ("SET medium_pool:cooldown:{a} long", Current),
        ("SET medium_pool:cooldown:{a} -1", Current),
        ("RPUSH medium_pool:cooldown:{a} 1855266400000", Current),
        ("SET medium_pool:cooldown_reason:{a} text", Current),
        ("RPUSH medium_pool:cooldown_reason:{a} text", Current),
        ("SET medium_pool:cooldown:nowhere 1855266400000", Current),
        (
            "MPOOL.COOLDOWN medium {a} 1755266400000 5000; DEL medium_pool:cooldown:{a}",
            State("failover"),
        ),
    ]);
    let mut scene = Scene::new();
    scene.run("SET medium_pool:cooldown:{a} 1855266400000 PX 20");
    scene.check("{k}", NOW + 1, Other("failover"), "a cooldown by hand");
    let a = scene.word("{a}");
    let key = format!("medium_pool:cooldown:{a}");
    wait_for("the cooldown's expiry", || {
        (!scene.client.run::<bool>(&["EXISTS", &key])).then_some(())
    });
    assert_eq!(
        scene.client.state(&a, NOW + 2).as_deref(),
        Some("available")
    );
}

#[test]
fn a_lease_put_upon_a_full_account_by_hand_is_given_up() {
    let mut scene = Scene::new();
    scene.run("HSET key_rotation:{j} account {a}");
    let [last, next] = [NOW + 1, NOW + 1 + DAY];
    scene.run(&format!(
        "HSET key_rotation:{{n}} account {{a}} last_rotation {last} next_rotation {next}"
    ));
    // Three leases of two slots: whoever came last moves.
    let extra = scene.word("{n}");
    let lease = scene.client.acquire(&extra, NOW + 1);
    assert_eq!(lease.account, scene.word("{b}"));
    scene.check("{k}", NOW + 1, Current, "the first holder stays");
}

#[test]
fn a_lease_moved_by_hand_is_the_new_keys() {
    let mut scene = Scene::new();
    let (k, n, a) = (scene.word("{k}"), scene.word("{n}"), scene.word("{a}"));
    scene.run("RENAME key_rotation:{k} key_rotation:{n}");
    let lease = scene.client.acquire(&n, NOW + 1);
    assert_eq!(
        (lease.state.as_str(), lease.account, lease.next),
        ("current", a, Some(NOW + DAY))
    );
    scene.check(
        "{k}",
        NOW + 1,
        State("assigned"),
        "the former holder starts afresh",
    );
    assert!(scene.client.holds(&k).is_some());
}

#[test]
fn a_lease_copied_by_hand_takes_a_slot_of_its_own() {
    let mut scene = Scene::new();
    let (n, a) = (scene.word("{n}"), scene.word("{a}"));
    scene.run("COPY key_rotation:{k} key_rotation:{n}");
    assert_eq!(scene.client.acquire(&n, NOW + 1).state, "current");
    assert_eq!(scene.client.slots(&a), Some(2));
    scene.check("{k}", NOW + 1, Current, "the original stays");
}

#[test]
fn a_lease_without_a_registered_key_goes() {
    let mut scene = Scene::new();
    let a = scene.word("{a}");
    scene.run("COPY key_rotation:{k} key_rotation:nobody");
    scene.check("{k}", NOW + 1, Current, "a copy for nobody");
    assert!(!scene.client.run::<bool>(&["EXISTS", "key_rotation:nobody"]));
    assert_eq!(scene.client.slots(&a), Some(1));
    // The record gone, the lease goes too, and nothing of it stays.
    scene.run("DEL client_keys:{k}");
    scene.check("{k}", NOW + 1, Error("NOKEY"), "the record is gone");
    let lease = format!("key_rotation:{}", scene.word("{k}"));
    assert!(!scene.client.run::<bool>(&["EXISTS", &lease]));
    assert_eq!(scene.client.slots(&a), Some(0));
}

#[test]
fn a_record_copied_by_hand_is_a_key() {
    let mut scene = Scene::new();
    scene.run("COPY client_keys:{k} client_keys:copy");
    assert_eq!(scene.client.acquire("copy", NOW + 1).state, "assigned");
    scene.run("RENAME client_keys:copy client_keys:renamed");
    assert_eq!(scene.client.acquire("renamed", NOW + 1).state, "assigned");
    assert!(
        scene
            .client
            .try_acquire("copy", NOW + 1)
            .unwrap_err()
            .starts_with("NOKEY")
    );
    scene.check("{k}", NOW + 1, Current, "the original stays");
}

#[test]
fn a_record_that_expires_takes_its_lease_along() {
    let mut scene = Scene::new();
    let (k, a) = (scene.word("{k}"), scene.word("{a}"));
    scene.run("PEXPIRE client_keys:{k} 20");
    scene.run("PEXPIRE key_rotation:{j} 20");
    // No command of the pool meanwhile: what is due comes by itself.
    wait_for("the slots to be given up", || {
        (scene.client.slots(&a) == Some(0) && scene.client.slots(&scene.word("{b}")) == Some(0))
            .then_some(())
    });
    assert_eq!(scene.client.holds(&k), None);
    scene.check("{k}", NOW + 1, Error("NOKEY"), "an expired record");
    scene.check("{j}", NOW + 1, State("assigned"), "an expired lease");
}

#[test]
fn a_lease_that_has_expired_is_given_up_like_any_other() {
    for line in [
        "MPOOL.RELEASE {k}",
        "MPOOL.REVOKE {k}",
        "MPOOL.COOLDOWN medium {a} * 1000",
    ] {
        let mut scene = Scene::new();
        // Nobody but the module's own write finds that it has.
        scene.run("DEBUG SET-ACTIVE-EXPIRE 0");
        scene.run("PEXPIRE key_rotation:{k} 1");
        std::thread::sleep(std::time::Duration::from_millis(20));
        scene.run(line);
        scene.client.check_repair();
    }
}

#[test]
fn a_change_by_hand_is_put_right_without_a_command_too() {
    let mut scene = Scene::new();
    let a = scene.word("{a}");
    for line in [
        "SET medium_pool:slots:{a} 7",
        "DEL medium_pool:slots:{a}",
        "INCR medium_pool:slots:{a}",
    ] {
        scene.run(line);
        wait_for("the counter to be right", || {
            (scene.client.slots(&a) == Some(1)).then_some(())
        });
    }
}

#[test]
fn flushes_and_swaps_of_databases() {
    for line in ["FLUSHALL", "FLUSHALL ASYNC", "FLUSHDB", "FLUSHDB ASYNC"] {
        let mut scene = Scene::new();
        scene.run(line);
        scene.check("{k}", NOW + 1, Error("NOKEY"), line);
        for account in ["one", "two"] {
            wait_for("the counters to come back", || {
                (scene.client.slots(account) == Some(0)).then_some(())
            });
        }
        let key = scene.client.pool_key();
        assert_eq!(scene.client.acquire(&key, NOW).state, "assigned", "{line}");
    }
    let mut scene = Scene::new();
    for line in ["SELECT 1", "SET mark 1", "FLUSHDB", "SELECT 0"] {
        scene.run(line);
    }
    scene.check("{k}", NOW + 1, Current, "another database was flushed");
    scene.run("SWAPDB 0 1");
    scene.check(
        "{k}",
        NOW + 1,
        Error("NOKEY"),
        "an empty database was swapped in",
    );
    let key = scene.client.pool_key();
    assert_eq!(scene.client.acquire(&key, NOW + 1).state, "assigned");
    scene.run("SWAPDB 1 0");
    scene.check("{k}", NOW + 1, Current, "the database is back");
    assert!(
        scene
            .client
            .try_acquire(&key, NOW + 1)
            .unwrap_err()
            .starts_with("NOKEY")
    );
    scene.run("SWAPDB 1 2");
    scene.check("{k}", NOW + 1, Current, "other databases were swapped");
}

#[test]
fn moving_keys_between_databases() {
    let mut scene = Scene::new();
    scene.run("MOVE client_keys:{k} 1");
    scene.run("MOVE key_rotation:{j} 1");
    scene.check("{k}", NOW + 1, Error("NOKEY"), "the record is elsewhere");
    scene.run("SELECT 1");
    scene.run("MOVE client_keys:{k} 0");
    scene.run("SELECT 0");
    scene.check(
        "{k}",
        NOW + 1,
        State("assigned"),
        "the record is back, its lease was forgotten",
    );
    // The lease comes back from the other database, with its old end.
    let j = scene.word("{j}");
    scene.run("SELECT 1");
    scene.run("MOVE key_rotation:{j} 0");
    scene.run("SELECT 0");
    assert_eq!(scene.client.acquire(&j, NOW + 1).next, Some(NOW + DAY));
    scene.check("{j}", NOW + 1, Current, "the lease is back");
}

#[test]
fn reloading_and_restoring() {
    let mut scene = Scene::new();
    for line in [
        "DEBUG RELOAD",
        "DEBUG RELOAD NOSAVE",
        "DEBUG SET-ACTIVE-EXPIRE 1",
    ] {
        scene.run(line);
        scene.check("{k}", NOW + 1, Current, line);
        scene.check("{j}", NOW + 1, Current, line);
    }
    let (k, a) = (scene.word("{k}"), scene.word("{a}"));
    for kind in ["client_keys", "key_rotation"] {
        let name = format!("{kind}:{k}");
        let dump: Vec<u8> = scene.client.run(&["DUMP", &name]);
        // In one transaction: what is gone for longer may be acted upon.
        let mut pipe = redis::pipe();
        pipe.atomic();
        pipe.cmd("DEL").arg(&name).ignore();
        pipe.cmd("RESTORE").arg(&name).arg(0).arg(&dump).ignore();
        pipe.exec(&mut scene.client.connection).unwrap();
        scene.check("{k}", NOW + 1, Current, kind);
    }
    let slots = format!("medium_pool:slots:{a}");
    let dump: Vec<u8> = scene.client.run(&["DUMP", &slots]);
    scene
        .client
        .try_bytes::<Value>(&[b"RESTORE", b"medium_pool:slots:nowhere", b"0", &dump])
        .unwrap();
    scene.check(
        "{k}",
        NOW + 1,
        Current,
        "a counter restored under another name",
    );
    assert_eq!(scene.client.slots("nowhere"), None);
}

/// A server keeps short hashes in one piece of memory, numbers in binary, and
/// others as tables.
#[test]
fn hashes_are_read_alike_however_the_server_keeps_them() {
    let server = Options::default()
        .accounts(&["12", "0012"])
        .file("high/-7", &bearer("-7"))
        .start();
    let mut client = server.connect();
    let more: Vec<String> = (0..60).map(|number| format!("more-{number}")).collect();
    let more: Vec<&str> = more.iter().flat_map(|name| [name.as_str(), "1"]).collect();
    let (last, next) = (NOW.to_string(), (NOW + DAY).to_string());
    for (encoding, limit, more) in [
        ("listpack", "512", &[][..]),
        ("listpack", "512", &more),
        ("hashtable", "1", &[]),
        ("hashtable", "1", &more),
    ] {
        let what = format!("{encoding}, {} more", more.len());
        client.ok(&["CONFIG", "SET", "hash-max-listpack-entries", limit]);
        let mut write = |name: &str, fields: &[&str]| {
            client.ok(&[&["HSET", name][..], more, fields].concat());
            let kept: String = client.run(&["OBJECT", "ENCODING", name]);
            assert_eq!(kept, encoding, "{what}");
        };
        let times = ["created_at", "7", "expires_at", "1999999999999"];
        let words = ["tier", "medium", "use_pool", "1", "active", "1"];
        write("client_keys:pooled", &[&words[..], &times].concat());
        let words = ["account", "12", "previous_account", "0012"];
        let times = ["last_rotation", &last, "next_rotation", &next];
        write("key_rotation:pooled", &[&words[..], &times].concat());
        let words = ["tier", "high", "use_pool", "0", "account_name", "-7"];
        write("client_keys:bound", &words);

        let status = client.map(&["MPOOL.STATUS", "KEY", "pooled", "NOW", &last]);
        assert_eq!(
            status["expires_at"],
            Value::Int(1_999_999_999_999),
            "{what}"
        );
        assert_eq!(text(&status["created_at"]), "7", "{what}");
        for reloads in 0..2 {
            let lease = client.acquire("pooled", NOW + 1);
            assert_eq!(
                (&*lease.account, &*lease.state),
                ("12", "current"),
                "{what}"
            );
            assert_eq!(lease.previous.as_deref(), Some("0012"), "{what}");
            assert_eq!(
                (lease.last, lease.next),
                (Some(NOW), Some(NOW + DAY)),
                "{what}"
            );
            let lease = client.acquire("bound", NOW + 1);
            assert_eq!((&*lease.account, &*lease.state), ("-7", "bound"), "{what}");
            client.check_repair();
            client.check_invariants(2);
            if reloads == 0 {
                client.ok(&["DEBUG", "RELOAD"]);
            }
        }
        let too_late = client.try_acquire("pooled", 1_999_999_999_999);
        assert!(too_late.unwrap_err().starts_with("EXPIRED"), "{what}");
        client.ok(&["HSET", "client_keys:pooled", "active", "0"]);
        let revoked = client.try_acquire("pooled", NOW + 1);
        assert!(revoked.unwrap_err().starts_with("REVOKED"), "{what}");
        client.ok(&["HDEL", "client_keys:pooled", "active", "use_pool"]);
        client.ok(&["HSET", "client_keys:pooled", "account_name", "0012"]);
        let lease = client.acquire("pooled", NOW + 1);
        assert_eq!(
            (&*lease.account, &*lease.state),
            ("0012", "bound"),
            "{what}"
        );
        client.check_repair();
        client.ok(&["DEL", "client_keys:pooled", "client_keys:bound"]);
    }
}

/// As Redis from 7.4 on and Valkey from 9 on have them.
#[test]
fn a_field_that_expires_is_a_field_that_goes() {
    for limit in ["512", "1"] {
        let mut server = Options::default()
            .accounts(&["one"])
            .server(&["--hash-max-listpack-entries", limit])
            .start();
        let mut client = server.connect();
        let expire = |client: &mut Client, name: &str, ms: &str, field: &str| {
            client.try_run::<Value>(&["HPEXPIRE", name, ms, "FIELDS", "1", field])
        };
        if let Err(error) = expire(&mut client, "none", "1", "none") {
            assert!(error.to_string().contains("unknown command"), "{error}");
            return;
        }
        let key = client.pool_key();
        let name = format!("client_keys:{key}");
        client.ok(&["HSET", &name, "active", "false"]);
        expire(&mut client, &name, "3600000", "created_at").unwrap();
        expire(&mut client, &name, "3600000", "expires_at").unwrap();
        for restarts in 0..2 {
            let refused = client.try_acquire(&key, NOW).unwrap_err();
            assert!(refused.starts_with("REVOKED"), "{limit}: {refused}");
            let status = client.map(&["MPOOL.STATUS", "KEY", &key]);
            assert!(status["expires_at"] != Value::Nil, "{limit}");
            client.check_repair();
            if restarts == 0 {
                client.ok(&["SAVE"]);
                server.kill();
                server.launch();
                client = server.connect();
            }
        }
        expire(&mut client, &name, "50", "active").unwrap();
        let lease = wait_for("the field to go", || client.try_acquire(&key, NOW).ok());
        assert_eq!(lease.state, "assigned", "{limit}");
        client.check_repair();
        client.ok(&["SAVE"]);
        server.kill();
        server.launch();
        client = server.connect();
        assert_eq!(client.acquire(&key, NOW).state, "current", "{limit}");
        client.check_repair();
        // A hash goes with the last of its fields.
        client.ok(&["HSET", "client_keys:short", "tier", "medium"]);
        expire(&mut client, "client_keys:short", "1", "tier").unwrap();
        wait_for("the record to go", || {
            let there: bool = client.run(&["EXISTS", "client_keys:short"]);
            (!there).then_some(())
        });
        client.refused("NOKEY", &["MPOOL.STATUS", "KEY", "short"]);
        client.check_repair();
        assert!(server.is_alive(), "{limit}");
    }
}

#[test]
fn several_changes_in_one_transaction() {
    let mut scene = Scene::new();
    let (k, j, a, b) = (
        scene.word("{k}"),
        scene.word("{j}"),
        scene.word("{a}"),
        scene.word("{b}"),
    );
    let mut pipe = redis::pipe();
    pipe.atomic();
    // The two holders swap accounts, and the counters lie.
    pipe.cmd("HSET")
        .arg(format!("key_rotation:{k}"))
        .arg("account")
        .arg(&b)
        .ignore();
    pipe.cmd("HSET")
        .arg(format!("key_rotation:{j}"))
        .arg("account")
        .arg(&a)
        .ignore();
    pipe.cmd("SET")
        .arg(format!("medium_pool:slots:{a}"))
        .arg(2)
        .ignore();
    pipe.cmd("DEL")
        .arg(format!("medium_pool:slots:{b}"))
        .ignore();
    pipe.exec(&mut scene.client.connection).unwrap();
    let lease = scene.client.acquire(&k, NOW + 1);
    assert_eq!((lease.state.as_str(), lease.account), ("current", b));
    scene.client.check_invariants(2);
    scene.client.check_repair();
    assert_eq!(scene.client.slots(&a), Some(1));
}

#[test]
fn the_guides_queries_work_as_printed() {
    let mut scene = Scene::new();
    let (k, a) = (scene.word("{k}"), scene.word("{a}"));
    let port = scene.server.port;
    let shell = |line: &str| {
        let line = line.replace("-p 6380", &format!("-p {port}"));
        let output = std::process::Command::new("sh")
            .arg("-c")
            .arg(&line)
            .env("PATH", search_path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{line}");
        String::from_utf8(output.stdout).unwrap()
    };
    let one = shell(&format!(r#"redis-cli -p 6380 get "medium_pool:slots:{a}""#));
    assert_eq!(one.trim(), "1");
    let all = shell(
        r#"redis-cli -p 6380 keys "medium_pool:slots:*" | xargs -I {} sh -c 'echo -n "{}: "; redis-cli -p 6380 get "{}"'"#
            .replace("-p 6380", &format!("-p {port}"))
            .as_str(),
    );
    let mut lines: Vec<&str> = all.lines().collect();
    lines.sort_unstable();
    assert_eq!(
        lines,
        ["medium_pool:slots:one: 1", "medium_pool:slots:two: 1"]
    );
    scene.client.acquire(&k, NOW + DAY);
    let rotation = shell(&format!(r#"redis-cli -p 6380 hgetall "key_rotation:{k}""#));
    for expected in [
        "account",
        "next_rotation",
        "last_rotation",
        "previous_account",
    ] {
        assert!(
            rotation.lines().any(|line| line == expected),
            "{expected}: {rotation}"
        );
    }
    for expected in [(NOW + DAY).to_string(), (NOW + 2 * DAY).to_string(), a] {
        assert!(rotation.contains(&expected), "{expected}: {rotation}");
    }
}

#[test]
fn the_keyspace_may_change_amid_a_transaction_or_script() {
    let mut scene = Scene::new();
    let (k, a) = (scene.word("{k}"), scene.word("{a}"));
    // Each line is one transaction; the last word says what its acquire must give.
    let table: &[(&[&str], &str)] = &[
        (
            &["DEL key_rotation:{k}", "MPOOL.ACQUIRE {k} 1755266400001"],
            "assigned",
        ),
        (
            &[
                "SET medium_pool:slots:{a} 2",
                "SET medium_pool:slots:{b} 2",
                "MPOOL.ACQUIRE {k} 1755266400002",
            ],
            "current",
        ),
        (
            &[
                "MPOOL.REVOKE {k}",
                "HSET client_keys:{k} active true",
                "MPOOL.ACQUIRE {k} 1755266400003",
            ],
            "assigned",
        ),
        (
            &[
                "MPOOL.COOLDOWN medium one 1755266400003 1",
                "MPOOL.COOLDOWN medium two 1755266400003 1",
                "MPOOL.ACQUIRE {k} 1755266400004",
            ],
            "failover",
        ),
        (
            &[
                "SWAPDB 0 1",
                "SWAPDB 0 1",
                "MPOOL.ACQUIRE {k} 1755266400005",
            ],
            "current",
        ),
        (
            &[
                "SWAPDB 0 1",
                "MPOOL.REPAIR",
                "SWAPDB 0 1",
                "MPOOL.ACQUIRE {k} 1755266400005",
            ],
            "current",
        ),
        (
            &[
                "HSET client_keys:{k} active false",
                "HSET client_keys:{k} active true",
                "MPOOL.ACQUIRE {k} 1755266400005",
            ],
            "current",
        ),
        (
            &[
                "RENAME key_rotation:{k} key_rotation:x",
                "RENAME key_rotation:x key_rotation:{k}",
                "MPOOL.ACQUIRE {k} 1755266400005",
            ],
            "current",
        ),
        (
            &[
                "FLUSHALL",
                "HSET client_keys:{k} tier medium use_pool true",
                "MPOOL.ACQUIRE {k} 1755266400005",
            ],
            "assigned",
        ),
    ];
    for (lines, state) in table {
        let mut pipe = redis::pipe();
        pipe.atomic();
        for line in *lines {
            let line = line
                .replace("{k}", &k)
                .replace("{a}", &a)
                .replace("{b}", &scene.word("{b}"));
            let mut words = line.split(' ');
            let mut command = redis::cmd(words.next().unwrap());
            command.arg(words.collect::<Vec<_>>());
            pipe.add_command(command);
        }
        let replies: Vec<Value> = pipe.query(&mut scene.client.connection).unwrap();
        let lease: std::collections::BTreeMap<String, Value> =
            redis::from_redis_value_ref(replies.last().unwrap()).unwrap();
        assert_eq!(text(&lease["state"]), *state, "{lines:?}");
        assert_eq!(scene.client.broken_invariant(2), None, "{lines:?}");
        scene.client.check_repair();
    }
    let script = r"
        for round = 1, 200 do
            redis.call('MPOOL.ACQUIRE', ARGV[1], 1755266400005 + round)
            if round % 3 == 0 then redis.call('DEL', 'key_rotation:' .. ARGV[1]) end
            if round % 5 == 0 then redis.call('SET', 'medium_pool:slots:one', round) end
            if round % 7 == 0 then redis.call('MPOOL.RELEASE', ARGV[1]) end
        end
        return redis.call('MPOOL.ACQUIRE', ARGV[1], 1755266410000)";
    scene.client.ok(&["EVAL", script, "0", &k]);
    scene.client.check_invariants(2);
    scene.client.check_repair();
    assert!(scene.server.is_alive());
}
