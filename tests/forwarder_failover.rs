//! Accounts in trouble: that a refused or broken account is taken out of the
//! pool without the client's seeing it, and that nothing else is: not what the
//! upstream says to one client, not a request that no account would help, not an
//! upstream that is down as a whole.

mod proxy;
mod support;

use proxy::http2::{frame, upstream_of_frames};
use proxy::{Answer, Client, Exchange, Forwarder, Stage, Upstream, chunked, request};
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant, SystemTime};
use support::{Options, PATIENCE, Server, text, wait_for};

/// What an upstream does that knows its accounts.
#[derive(Clone, Default)]
struct Verdicts(Arc<Mutex<Lists>>);

#[derive(Default)]
struct Lists {
    refused: HashSet<String>,
    broken: HashSet<String>,
}

const REFUSAL: &[u8] =
    br#"{"type":"error","error":{"type":"authentication_error","message":"upstream's own"}}"#;

impl Verdicts {
    /// Requests of that account are answered 401 from now on, or no longer.
    fn refuse(&self, account: &str, refuse: bool) {
        let refused = &mut self.0.lock().unwrap().refused;
        match refuse {
            true => refused.insert(account.to_owned()),
            false => refused.remove(account),
        };
    }

    /// Connections that a request of that account came over are closed.
    fn break_off(&self, account: &str) {
        self.0.lock().unwrap().broken.insert(account.to_owned());
    }

    /// Answers with the account's name: 401 where it is refused, and for the
    /// path /bad in any case; nothing where it is broken, and for /poison.
    fn answer(&self, mut exchange: Exchange) {
        let account = account_of(&exchange);
        let (refused, broken) = {
            let lists = self.0.lock().unwrap();
            (
                lists.refused.contains(&account),
                lists.broken.contains(&account),
            )
        };
        let target = exchange.target.clone();
        if broken || target.starts_with("/poison") {
            while let Ok(Some(_)) = exchange.try_piece() {}
            exchange.close();
        } else if refused || target.starts_with("/bad") {
            exchange.respond(401, &[("X-Own", "of the upstream")], REFUSAL);
        } else {
            exchange.respond(200, &[], account.as_bytes());
        }
    }

    fn upstream(&self) -> Upstream {
        let verdicts = self.clone();
        Upstream::start(move |exchange| verdicts.answer(exchange))
    }
}

fn account_of(exchange: &Exchange) -> String {
    let token = exchange.token().expect("a request without a token");
    let account = token.strip_prefix("token-of-");
    account.expect("a token of no account").to_owned()
}

fn unix_ms() -> i64 {
    let elapsed = SystemTime::UNIX_EPOCH.elapsed().unwrap();
    elapsed.as_millis().try_into().unwrap()
}

fn pool(accounts: &[&str]) -> Server {
    Options::default().accounts(accounts).start()
}

/// A round with these accounts, and the account that its key has.
#[track_caller]
fn stage(accounts: &[&str], arguments: &[&str]) -> (Stage<Upstream>, Verdicts, String) {
    let verdicts = Verdicts::default();
    let stage = Stage::on(pool(accounts), verdicts.upstream(), arguments);
    let lease = stage.server.connect().acquire(&stage.key, unix_ms());
    (stage, verdicts, lease.account)
}

/// A new key and the account that it has.
#[track_caller]
fn another_key(server: &Server) -> (String, String) {
    let mut redis = server.connect();
    let key = redis.pool_key();
    let account = redis.acquire(&key, unix_ms()).account;
    (key, account)
}

/// How often the forwarders have sent that command.
fn calls(server: &Server, command: &str) -> u64 {
    server.connect().calls(command)
}

#[track_caller]
fn state(server: &Server, account: &str) -> String {
    let state = server.connect().state(account, unix_ms());
    state.expect("the account is there")
}

#[track_caller]
fn check_not_cooled(server: &Server, accounts: &[&str]) {
    for account in accounts {
        assert_ne!(state(server, account), "cooldown", "{account}");
    }
}

/// The answer must be a good one: the account that it is from.
#[track_caller]
fn good(answer: &Answer) -> String {
    assert_eq!(answer.status(), 200, "{answer:?}");
    assert_eq!(answer.code(), None);
    answer.text()
}

/// The answer must be the upstream's refusal, untouched.
#[track_caller]
fn check_refusal(answer: &Answer) {
    assert_eq!((answer.status(), answer.code()), (401, None), "{answer:?}");
    assert_eq!(answer.body, REFUSAL);
    assert_eq!(answer.header("x-own"), Some("of the upstream"));
}

#[track_caller]
fn retry_after(answer: &Answer) -> u64 {
    let value = answer.header("retry-after");
    value.expect("Retry-After").parse().unwrap()
}

// The account is refused

#[test]
fn the_client_of_a_refused_account_sees_the_next_ones_answer() {
    let (stage, verdicts, first) = stage(&["a", "b"], &[]);
    verdicts.refuse(&first, true);
    let before = unix_ms();
    let second = good(&stage.get("/v1/messages?q=1"));
    assert_ne!(second, first);

    let requests = stage.upstream.requests();
    let tokens: Vec<_> = requests.iter().map(|r| r.token().unwrap()).collect();
    assert_eq!(
        tokens,
        [&first, &second].map(|name| format!("token-of-{name}"))
    );
    let [one, two] = [&requests[0].head, &requests[1].head];
    assert_eq!(one.line, two.line);
    let rest = |head: &proxy::Head| head.lines_without(&["authorization"]);
    assert_eq!(rest(one), rest(two));

    let mut redis = stage.server.connect();
    let row = redis.account_status(&first, unix_ms()).unwrap();
    assert_eq!(text(&row["state"]), "cooldown");
    assert_eq!(text(&row["reason"]), "the upstream answered 401");
    let until = support::optional_number(&row["until"]).unwrap();
    let minute = 60_000;
    assert!((before + minute..=unix_ms() + minute).contains(&until));
    assert_eq!(redis.holds(&stage.key).as_ref(), Some(&second));
    let slots = [&first, &second].map(|account| redis.slots(account));
    assert_eq!(slots, [Some(0), Some(1)]);
    redis.check_invariants(2);

    let lines = [
        format!("🔄 Pool: Rotated to account: {second} (will rotate in 24 hours)"),
        format!("📝 Previous account was: {first}"),
        format!("WARNING Account {first} is out of the pool for 60 s: the upstream answered 401"),
        format!("account={second} state=failover key="),
    ];
    for line in lines {
        stage.forwarder.wait_for_lines(&line, 1);
    }
    let metric = |name: &str| stage.forwarder.metric(name);
    assert_eq!(metric("mpool_failovers_total"), Some(1.0));
    let errors = format!("mpool_upstream_errors_total{{account=\"{first}\",error=\"401\"}}");
    assert_eq!(metric(&errors), Some(1.0));

    stage.upstream.forget();
    assert_eq!(good(&stage.get("/again")), second);
    assert_eq!(
        stage.upstream.count(),
        1,
        "the next request goes there at once"
    );
}

#[test]
fn the_body_is_sent_again_byte_for_byte() {
    let limit = 256 * 1024;
    let pattern: Vec<u8> = (0..limit).map(|n| (n * 7 + n / 251) as u8).collect();
    let large = &pattern[..limit - 16 * 1024];
    let with_length = |body: &[u8]| {
        let head = format!("Content-Length: {}\r\n\r\n", body.len());
        [head.as_bytes(), body].concat()
    };
    let in_chunks = |pieces: &[&[u8]], trailers: &str| {
        let named = match trailers {
            "" => "",
            _ => "Trailer: X-Sum\r\n",
        };
        let mut bytes = format!("{named}Transfer-Encoding: chunked\r\n\r\n").into_bytes();
        pieces.iter().for_each(|piece| bytes.extend(chunked(piece)));
        bytes.extend(format!("0\r\n{trailers}\r\n").into_bytes());
        bytes
    };
    let table: [(&str, Vec<u8>, &[u8]); 7] = [
        ("an empty one", with_length(b""), b""),
        ("a short one", with_length(b"\0\r\n\xff"), b"\0\r\n\xff"),
        ("a large one", with_length(large), large),
        (
            "chunks",
            in_chunks(&[b"one", b"\r\n", b"three"], ""),
            b"one\r\nthree",
        ),
        ("no chunk", in_chunks(&[], ""), b""),
        (
            "large chunks",
            in_chunks(&large.chunks(60_000).collect::<Vec<_>>(), ""),
            large,
        ),
        (
            "trailers",
            in_chunks(&[b"sum", b"med"], "X-Sum: 42\r\n"),
            b"summed",
        ),
    ];
    let (stage, verdicts, mut current) = stage(
        &["a", "b"],
        &["--replay-body", "256KiB", "--cooldown", "50ms"],
    );
    for (what, bytes, body) in table {
        println!("{what}");
        verdicts.refuse(&current, true);
        stage.upstream.forget();
        let mut client = stage.client();
        let head = format!(
            "POST /up HTTP/1.1\r\nHost: front\r\nx-api-key: {}\r\nTE: trailers\r\nX-Case: Kept\r\n",
            stage.key
        );
        client.send([head.as_bytes(), &bytes].concat());
        let next = good(&client.answer());
        assert_ne!(next, current);
        let requests = stage.upstream.requests();
        assert_eq!(requests.len(), 2);
        for request in &requests {
            assert!(
                request.body == body && request.whole,
                "{what}: {} bytes",
                request.body.len()
            );
        }
        let same = |head: &proxy::Head| head.lines_without(&["authorization"]);
        assert_eq!(same(&requests[0].head), same(&requests[1].head));
        assert_eq!(requests[0].trailers, requests[1].trailers);
        assert_eq!(!requests[1].trailers.is_empty(), what == "trailers");
        // Back and forth: the first account is needed again.
        verdicts.refuse(&current, false);
        wait_for("the cooldown's end", || {
            (state(&stage.server, &current) != "cooldown").then_some(())
        });
        current = next;
    }
}

#[test]
fn requests_that_come_in_one_piece_keep_the_case_of_their_names_too() {
    let stage = Stage::on(pool(&["a", "b"]), Upstream::manual(), &[]);
    let mut client = stage.client();
    let request = |number| {
        format!(
            "GET /{number} HTTP/1.1\r\nHOST: front\r\nX-Api-Key: {}\r\nX-CASE-{number}: Kept\r\n\r\n",
            stage.key
        )
    };
    client.send([1, 2].map(request).concat());
    for number in [1, 2] {
        let refused = stage.upstream.next();
        let first = refused.head.lines_without(&["authorization"]);
        let name = format!("X-CASE-{number}: Kept");
        assert!(first.contains(&name), "{first:?}");
        refused.respond(401, &[], b"no");
        let taken = stage.upstream.next();
        assert_eq!(taken.head.lines_without(&["authorization"]), first);
        taken.ok();
        assert_eq!(client.answer().status(), 200);
        // Both accounts can be lent to the next one.
        for account in ["a", "b"] {
            let end = ["MPOOL.COOLDOWN", "medium", account, "*", "0"];
            stage.server.connect().ok(&end);
        }
    }
}

#[test]
fn a_second_try_has_nothing_of_another_request() {
    let upstream = || Stage::on(pool(&["a", "b"]), Upstream::manual(), &[]);
    let own = |head: &proxy::Head| head.lines_without(&["authorization"]);
    for body in ["", "Content-Length: 5\r\n"] {
        let stage = upstream();
        let mut client = stage.client();
        let denied = "POST /bad HTTP/1.1\r\nHOST: front\r\nx-api-key: nosuch\r\nX-Other: 1\r\n\
                      Content-Length: 9\r\n\r\nninebytes";
        let good = format!(
            "POST /good HTTP/1.1\r\nHost: front\r\nX-Api-Key: {}\r\nX-Good: yes\r\n{body}\r\n",
            stage.key
        );
        let rest = if body.is_empty() { "" } else { "hello" };
        client.send([denied, &good, rest].concat());
        assert_eq!(client.answer().status(), 401);
        let mut refused = stage.upstream.next();
        let first = own(&refused.head);
        assert_eq!(refused.body(), rest.as_bytes());
        refused.respond(401, &[], b"no");
        let mut taken = stage.upstream.next();
        assert_eq!(own(&taken.head), first);
        assert_eq!(taken.body(), rest.as_bytes());
        taken.ok();
        assert_eq!(client.answer().status(), 200);
    }
    // The second head comes in two parts, the first of them with the first request.
    let stage = upstream();
    let mut client = stage.client();
    let request = |name| {
        let key = &stage.key;
        format!("GET /{name} HTTP/1.1\r\nHost: front\r\nX-Api-Key: {key}\r\nX-Good: {name}\r\n\r\n")
    };
    let (one, two) = (request("one"), request("two"));
    let (half, rest) = two.split_at(30);
    client.send([&one, half].concat());
    stage.upstream.next().ok();
    assert_eq!(client.answer().status(), 200);
    client.send(rest);
    let refused = stage.upstream.next();
    let lower = |head: &proxy::Head| own(head).join("\n").to_lowercase();
    let first = lower(&refused.head);
    refused.respond(401, &[], b"no");
    let taken = stage.upstream.next();
    assert_eq!(lower(&taken.head), first);
    taken.ok();
    assert_eq!(client.answer().status(), 200);
}

#[test]
fn a_body_that_is_still_coming_goes_on_to_the_next_account() {
    let stage = Stage::on(pool(&["a", "b"]), Upstream::manual(), &[]);
    let mut client = stage.client();
    client.send(format!(
        "POST / HTTP/1.1\r\nHost: front\r\nx-api-key: {}\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n",
        stage.key
    ));
    let mut refused = stage.upstream.next();
    assert_eq!(refused.piece().unwrap(), b"first");
    refused.send("HTTP/1.1 401 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    let mut taken = stage.upstream.next();
    assert_ne!(account_of(&taken), account_of(&refused));
    refused.close();
    assert_eq!(taken.piece().unwrap(), b"first");
    // What comes now has never been seen by the first one.
    client.send(chunked("second"));
    assert_eq!(taken.piece().unwrap(), b"second");
    client.send(chunked(""));
    assert_eq!(taken.piece(), None);
    taken.ok();
    assert_eq!(client.answer().status(), 200);
}

#[test]
fn a_body_that_waits_for_100_continue_is_called_for_by_the_next_account() {
    let stage = Stage::on(pool(&["a", "b"]), Upstream::manual(), &[]);
    let mut client = stage.client();
    client.send(format!(
        "POST / HTTP/1.1\r\nHost: front\r\nx-api-key: {}\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n",
        stage.key
    ));
    let mut refused = stage.upstream.next();
    refused.send("HTTP/1.1 401 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    refused.close();
    let mut taken = stage.upstream.next();
    assert_eq!(taken.head.value("expect"), Some("100-continue"));
    taken.send("HTTP/1.1 100 Continue\r\n\r\n");
    assert_eq!(client.wire.head().unwrap().unwrap().status(), 100);
    client.send("body");
    assert_eq!(taken.body(), b"body");
    taken.ok();
    assert_eq!(client.answer().status(), 200);
}

#[test]
fn http2_clients_see_the_next_accounts_answer_too() {
    let (stage, verdicts, first) = stage(&["a", "b"], &[]);
    verdicts.refuse(&first, true);
    let body = vec![7; 100_000];
    let mut http2 = stage.forwarder.http2();
    let mut answer = http2.ask("POST", "/up", &stage.key, &[], &body);
    assert_eq!(answer.status(), 200);
    assert_ne!(answer.body(), first.as_bytes());
    let requests = stage.upstream.requests();
    assert_eq!(requests.len(), 2);
    assert!(requests.iter().all(|request| request.body == body));
}

#[test]
fn http2_upstreams_refuse_accounts_too() {
    let stage = Stage::on(pool(&["a", "b"]), Upstream::http2(), &[]);
    let mut client = stage.client();
    client.ask("POST", "/up", &stage.key, &[], b"the body");
    let mut refused = stage.upstream.next();
    assert_eq!(refused.body(), b"the body");
    let first = refused.values("authorization")[0].to_owned();
    refused.respond(401, &[], b"no");
    let mut taken = stage.upstream.next();
    assert_ne!(taken.values("authorization")[0], first);
    assert_eq!(taken.body(), b"the body");
    taken.respond(200, &[], b"yes");
    assert_eq!(client.answer().text(), "yes");
}

#[test]
fn the_next_accounts_credential_may_be_of_the_other_kind() {
    let server = Options::default()
        .accounts(&["a"])
        .file("medium/b", r#"{"api_key": "token-of-b"}"#)
        .start();
    let verdicts = Verdicts::default();
    let stage = Stage::on(server, verdicts.upstream(), &["--cooldown", "50ms"]);
    let mut current = good(&stage.get("/"));
    for _ in 0..2 {
        verdicts.refuse(&current, true);
        stage.upstream.forget();
        let next = good(&stage.get("/"));
        for (request, account) in stage.upstream.requests().iter().zip([&current, &next]) {
            let names = match account.as_str() {
                "a" => ("authorization", "x-api-key", "Bearer token-of-a"),
                _ => ("x-api-key", "authorization", "token-of-b"),
            };
            assert_eq!(request.head.value(names.0), Some(names.2));
            assert!(!request.head.has(names.1));
        }
        verdicts.refuse(&current, false);
        wait_for("the cooldown's end", || {
            (state(&stage.server, &current) != "cooldown").then_some(())
        });
        current = next;
    }
}

#[test]
fn a_refusal_that_never_ends_holds_nothing_up() {
    let stage = Stage::on(pool(&["a", "b"]), Upstream::manual(), &[]);
    let mut client = stage.client();
    client.ask("GET", "/", &stage.key, &[], b"");
    let mut refused = stage.upstream.next();
    refused.send("HTTP/1.1 401 No\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nno to\r\n");
    stage.upstream.next().ok();
    assert_eq!(client.answer().status(), 200);
    refused.close();
}

#[test]
fn a_body_beyond_what_is_kept_is_asked_for_again() {
    let table: [(&str, &[&str]); 2] = [
        ("a limit for each", &["--replay-body", "64KiB"]),
        ("a limit for all", &["--replay-memory", "64KiB"]),
    ];
    for (what, arguments) in table {
        println!("{what}");
        let (stage, verdicts, first) = stage(&["a", "b"], arguments);
        verdicts.refuse(&first, true);
        let body = vec![b'x'; 200_000];
        let mut client = stage.client();
        let answer = client.round("POST", "/up", &stage.key, &[], &body);
        assert_eq!((answer.status(), answer.code()), (503, Some("ACCOUNT")));
        assert!(retry_after(&answer) >= 1);
        assert_eq!(stage.upstream.count(), 1);
        assert_eq!(state(&stage.server, &first), "cooldown");
        // The client does as it was told.
        let answer = client.round("POST", "/up", &stage.key, &[], &body);
        assert_ne!(good(&answer), first);
        assert_eq!(stage.upstream.requests()[1].body, body);
    }
}

#[test]
fn memory_for_bodies_is_given_back() {
    let arguments = ["--replay-body", "256KiB", "--replay-memory", "300KiB"];
    let (stage, verdicts, _) = stage(&["a", "b"], &arguments);
    let body = vec![b'x'; 200_000];
    let mut client = stage.client();
    // Were any of it lost, the last one would find no room.
    for target in ["/up", "/poison", "/up", "/bad", "/up"] {
        client = stage.client();
        client.ask("POST", target, &stage.key, &[], &body);
        let _ = client.answer();
    }
    drop(client);
    let mut gone = stage.client();
    gone.send(&request("POST", "/up", &stage.key, &[], &body)[..150_000]);
    gone.leave();
    // What the key said of its account has been found untrue: another one's word counts.
    let key = stage.server.connect().pool_key();
    let answer = stage.client().round("POST", "/up", &key, &[], &body);
    let current = good(&answer);
    verdicts.refuse(&current, true);
    let answer = stage.client().round("POST", "/up", &key, &[], &body);
    assert_ne!(good(&answer), current);
}

#[test]
fn a_new_token_of_the_same_account_is_tried_without_a_cooldown() {
    let stage = Stage::on(pool(&["a", "b"]), Upstream::manual(), &[]);
    let mut client = stage.client();
    client.ask("POST", "/", &stage.key, &[], b"body");
    let old = stage.upstream.next();
    let account = account_of(&old);
    let fresh = r#"{"access_token": "fresh-token"}"#;
    stage
        .server
        .write_account(&format!("medium/{account}"), fresh);
    stage.server.connect().ok(&["MPOOL.RELOAD"]);
    old.respond(401, &[], b"expired");
    let mut new = stage.upstream.next();
    assert_eq!(new.token().as_deref(), Some("fresh-token"));
    assert_eq!(new.body(), b"body");
    new.ok();
    assert_eq!(client.answer().status(), 200);
    assert_eq!(calls(&stage.server, "mpool.cooldown"), 0);
    check_not_cooled(&stage.server, &["a", "b"]);
    assert_eq!(stage.server.connect().holds(&stage.key), Some(account));
}

#[test]
fn many_requests_on_a_refused_account_cool_it_down_once() {
    const REQUESTS: usize = 24;
    // Nobody is answered before all have come: every request meets the refusal.
    let (refused, all_there) = (Arc::new(Mutex::new(String::new())), Barrier::new(REQUESTS));
    let name = Arc::clone(&refused);
    let upstream = Upstream::start(move |exchange| {
        if account_of(&exchange) == *name.lock().unwrap() {
            all_there.wait();
            exchange.respond(401, &[], REFUSAL);
        } else {
            exchange.ok();
        }
    });
    let server = Options::default().module(&["slots-per-account", "10"]);
    let server = server.accounts(&["a", "b", "c"]).start();
    let stage = Stage::on(server, upstream, &[]);
    let server = &stage.server;
    let first = server.connect().acquire(&stage.key, unix_ms()).account;
    // A second one of the same account.
    let same =
        std::iter::repeat_with(|| another_key(server)).find(|(_, account)| *account == first);
    let keys = [stage.key.clone(), same.unwrap().0];
    refused.lock().unwrap().clone_from(&first);
    std::thread::scope(|scope| {
        for number in 0..REQUESTS {
            let (stage, key) = (&stage, &keys[number % keys.len()]);
            scope.spawn(move || {
                let body = format!("body {number}");
                let answer = stage.client().round("POST", "/", key, &[], body.as_bytes());
                assert_eq!(answer.status(), 200, "{answer:?}");
            });
        }
    });
    assert_eq!(calls(server, "mpool.cooldown"), 1);
    let row = server.connect().account_status(&first, unix_ms()).unwrap();
    let until = support::optional_number(&row["until"]).unwrap();
    assert!(
        until <= unix_ms() + 60_000,
        "it is cooled for longer than once"
    );
    server.connect().check_invariants(10);
}

#[test]
fn cooldowns_double_up_to_ten_times_the_first() {
    let server = Options::default()
        .module(&["slots-per-account", "100"])
        .accounts(&["good", "worn"])
        .start();
    let verdicts = Verdicts::default();
    let stage = Stage::on(server, verdicts.upstream(), &["--cooldown", "50ms"]);
    let seconds = |stage: &Stage<Upstream>| -> Vec<f64> {
        let lines = stage.forwarder.log();
        let after = |line: &str| {
            let (_, after) = line.split_once("Account worn is out of the pool for ")?;
            after.split(' ').next()?.parse().ok()
        };
        lines.iter().filter_map(|line| after(line)).collect()
    };
    verdicts.refuse("worn", true);
    // So that a new key always finds the other one less used.
    let mut keys = 0;
    while keys < 2 {
        keys += usize::from(another_key(&stage.server).1 == "good");
    }
    let use_worn = || loop {
        let (key, account) = another_key(&stage.server);
        if account == "worn" {
            let answer = stage.client().get("/", &key);
            wait_for("the cooldown's end", || {
                (state(&stage.server, "worn") != "cooldown").then_some(())
            });
            return good(&answer);
        }
    };
    let expected = [0.05, 0.1, 0.2, 0.4, 0.5, 0.5];
    for count in 1..=expected.len() {
        assert_eq!(use_worn(), "good");
        wait_for("the line of the cooldown", || {
            (seconds(&stage).len() == count).then_some(())
        });
    }
    assert_eq!(seconds(&stage), expected);
    // One good answer, and it begins anew.
    verdicts.refuse("worn", false);
    assert_eq!(use_worn(), "worn");
    verdicts.refuse("worn", true);
    assert_eq!(use_worn(), "good");
    wait_for("the line of the cooldown", || {
        (seconds(&stage).len() > 6).then_some(())
    });
    assert_eq!(seconds(&stage)[6..], [0.05]);
}

#[test]
fn a_forwarder_that_may_not_cool_accounts_down_passes_the_refusal_on() {
    let server = pool(&["a", "b"]);
    let mut redis = server.connect();
    redis.ok(&[
        "ACL",
        "SETUSER",
        "fwd",
        "on",
        ">secret-of-redis",
        "~*",
        "&*",
        "+mpool.acquire",
    ]);
    let verdicts = Verdicts::default();
    let upstream = verdicts.upstream();
    let forwarder = Forwarder::between(&server, &upstream)
        .args(&["--redis-user", "fwd"])
        .env("MPOOL_REDIS_PASSWORD", "secret-of-redis")
        .start();
    let key = redis.pool_key();
    let first = redis.acquire(&key, unix_ms()).account;
    verdicts.refuse(&first, true);
    for _ in 0..3 {
        check_refusal(&forwarder.client().get("/", &key));
    }
    let line = "MPOOL.COOLDOWN was refused: the ACL user may not run this command";
    forwarder.wait_for_lines(line, 1);
    verdicts.refuse(&first, false);
    assert_eq!(good(&forwarder.client().get("/", &key)), first);
}

#[test]
fn redis_may_go_just_when_an_account_is_refused() {
    let server = Options::default()
        .server(&["--appendonly", "yes", "--appendfsync", "always"])
        .accounts(&["a", "b"])
        .start();
    let mut stage = Stage::on(server, Upstream::manual(), &[]);
    let mut client = stage.client();
    client.ask("GET", "/", &stage.key, &[], b"");
    let refused = stage.upstream.next();
    let connections = stage.forwarder.metric("mpool_redis_connections_up");
    stage.server.kill();
    let begun = Instant::now();
    refused.respond(401, &[], REFUSAL);
    let answer = client.answer();
    let took = begun.elapsed();
    assert!(took < Duration::from_millis(2500), "{took:?}");
    match answer.status() {
        401 => assert_eq!(answer.body, REFUSAL),
        503 => assert_eq!(answer.code(), Some("REDIS")),
        _ => panic!("{answer:?}"),
    }
    stage.server.launch();
    // The account is still refused, and now it can be said.
    // Every thread of it.
    wait_for("the forwarder to have Redis again", || {
        (stage.forwarder.metric("mpool_redis_connections_up") == connections).then_some(())
    });
    client.ask("GET", "/", &stage.key, &[], b"");
    let refused = stage.upstream.next();
    let first = account_of(&refused);
    refused.respond(401, &[], REFUSAL);
    let next = stage.upstream.next();
    assert_ne!(account_of(&next), first);
    next.ok();
    assert_eq!(client.answer().status(), 200);
    assert_eq!(state(&stage.server, &first), "cooldown");
}

// No account helps

#[test]
fn when_every_account_is_refused_clients_are_told_and_it_heals_by_itself() {
    let names = ["a", "b", "c"];
    let (stage, verdicts, _) = stage(&names, &["--cooldown", "300ms"]);
    names.iter().for_each(|name| verdicts.refuse(name, true));
    let mut keys: Vec<String> = (0..3).map(|_| another_key(&stage.server).0).collect();
    keys.push(stage.key.clone());
    // Some see the second account's refusal, and then that none is left.
    let told = wait_for("the pool to be empty", || {
        let answers = keys.iter().map(|key| stage.client().get("/", key));
        let told = answers.filter(|answer| match answer.code() {
            Some("NOACCOUNT") => true,
            // While the others fill those that are left.
            Some("POOLFULL") => false,
            Some(code) => panic!("{code}: {answer:?}"),
            None => {
                check_refusal(answer);
                false
            }
        });
        told.last()
    });
    assert_eq!(told.status(), 503);
    assert!((1..=3).contains(&retry_after(&told)), "{told:?}");
    names.iter().for_each(|name| verdicts.refuse(name, false));
    wait_for("the pool to heal", || {
        let mut answers = keys.iter().map(|key| stage.client().get("/", key));
        answers.all(|answer| answer.status() == 200).then_some(())
    });
}

#[test]
fn the_only_account_is_refused() {
    let (stage, verdicts, _) = stage(&["one"], &["--cooldown", "200ms"]);
    // Never heard of before: it is out, and clients are told when to come again.
    verdicts.refuse("one", true);
    let answer = stage.get("/");
    match answer.code() {
        None => check_refusal(&answer),
        code => assert_eq!((answer.status(), code), (503, Some("NOACCOUNT"))),
    }
    verdicts.refuse("one", false);
    wait_for("it to be back", || {
        (stage.get("/").status() == 200).then_some(())
    });
    // It was well a moment ago: one refusal is the request's.
    check_refusal(&stage.get("/bad"));
    assert_eq!(good(&stage.get("/")), "one");
    // Refused for good.
    verdicts.refuse("one", true);
    for _ in 0..8 {
        let answer = stage.get("/");
        match answer.code() {
            None => check_refusal(&answer),
            code => {
                assert_eq!((answer.status(), code), (503, Some("NOACCOUNT")));
                assert!((1..=2).contains(&retry_after(&answer)), "{answer:?}");
            }
        }
    }
    verdicts.refuse("one", false);
    wait_for("it to be back", || {
        (stage.get("/").status() == 200).then_some(())
    });
}

#[test]
fn a_request_that_two_accounts_refuse_is_at_fault_itself() {
    let (stage, _, first) = stage(&["a", "b"], &[]);
    let (other_key, other) = another_key(&stage.server);
    assert_ne!(other, first);
    // Both accounts are known to be well.
    good(&stage.get("/"));
    good(&stage.client().get("/", &other_key));
    stage.upstream.forget();
    check_refusal(&stage.get("/bad"));
    assert_eq!(stage.upstream.count(), 2, "tried on both, and no more");
    stage
        .forwarder
        .wait_for_lines(&format!("Account {first} is back in the pool"), 1);
    check_not_cooled(&stage.server, &["a", "b"]);
    good(&stage.get("/"));
    good(&stage.client().get("/", &other_key));
}

/// Runs `work` while each of these keys is in use: every answer must pass `check`.
fn amid_requests(
    stage: &Stage<Upstream>,
    keys: &[String],
    check: impl Fn(&Answer) + Sync,
    work: impl FnOnce(),
) {
    let done = AtomicBool::new(false);
    let (answers, began) = (AtomicUsize::new(0), Barrier::new(keys.len() + 1));
    std::thread::scope(|scope| {
        let users: Vec<_> = keys
            .iter()
            .map(|key| {
                let (done, answers, began, check) = (&done, &answers, &began, &check);
                scope.spawn(move || {
                    let mut client = stage.client();
                    good(&client.get("/good", key));
                    began.wait();
                    while !done.load(Ordering::Relaxed) {
                        check(&client.get("/good", key));
                        answers.fetch_add(1, Ordering::Relaxed);
                        std::thread::sleep(Duration::from_millis(2));
                    }
                })
            })
            .collect();
        began.wait();
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        done.store(true, Ordering::Relaxed);
        let failed = users.into_iter().find_map(|user| user.join().err());
        if let Some(panic) = failed.or(outcome.err()) {
            std::panic::resume_unwind(panic);
        }
    });
    assert!(answers.into_inner() > 0);
}

/// A pool with three other clients: their keys.
fn crowd(accounts: &[&str]) -> (Stage<Upstream>, Vec<String>) {
    let (stage, _, _) = stage(accounts, &[]);
    let others = (0..3).map(|_| another_key(&stage.server).0).collect();
    (stage, others)
}

/// With room for all when one account is out, and with every slot in use.
const ROOMY: &[&str] = &["a", "b", "c", "d"];
const FULL: &[&str] = &["a", "b"];

#[test]
fn bad_requests_of_one_client_do_not_drain_the_pool() {
    for targets in [&["/bad"][..], &["/bad", "/good"]] {
        println!("{targets:?}");
        let (stage, others) = crowd(ROOMY);
        let mut client = stage.client();
        amid_requests(
            &stage,
            &others,
            |answer| drop(good(answer)),
            || {
                for target in targets.iter().cycle().take(100) {
                    let answer = client.get(target, &stage.key);
                    match *target {
                        "/bad" => check_refusal(&answer),
                        _ => drop(good(&answer)),
                    }
                }
            },
        );
        check_not_cooled(&stage.server, ROOMY);
        stage.server.connect().check_invariants(2);
    }
}

#[test]
fn bad_requests_in_a_full_pool_do_no_lasting_harm() {
    let (stage, others) = crowd(FULL);
    let mut client = stage.client();
    // While an account is out to see whether it is at fault, its holders have nowhere to go.
    let check = |answer: &Answer| match answer.code() {
        Some(code) => assert_eq!((answer.status(), code), (503, "POOLFULL")),
        None => drop(good(answer)),
    };
    amid_requests(&stage, &others, check, || {
        for _ in 0..100 {
            let answer = client.get("/bad", &stage.key);
            match answer.code() {
                Some(code) => assert_eq!(code, "POOLFULL"),
                None => check_refusal(&answer),
            }
        }
    });
    check_not_cooled(&stage.server, FULL);
    for key in &others {
        good(&stage.client().get("/", key));
    }
}

#[test]
fn bad_requests_in_a_quiet_hour_do_not_drain_the_pool() {
    for accounts in [ROOMY, FULL] {
        println!("{accounts:?}");
        let (stage, others) = crowd(accounts);
        for key in others.iter().chain([&stage.key]) {
            good(&stage.client().get("/", key));
        }
        let mut client = stage.client();
        for _ in 0..100 {
            let answer = client.get("/bad", &stage.key);
            assert!([401, 503].contains(&answer.status()), "{answer:?}");
        }
        for key in &others {
            good(&stage.client().get("/", key));
        }
    }
}

// What is no account's fault

#[test]
fn a_refusal_of_a_bound_key_passes_through() {
    let server = Options::default()
        .accounts(&["one", "two"])
        .file("high/top", &support::bearer("top"))
        .start();
    let verdicts = Verdicts::default();
    let stage = Stage::on(server, verdicts.upstream(), &[]);
    let mut redis = stage.server.connect();
    let table = ["medium/one", "high/top"].map(|account| (redis.bound_key(account), account));
    for (key, account) in &table {
        let (_, name) = account.split_once('/').unwrap();
        verdicts.refuse(name, true);
        stage.upstream.forget();
        for _ in 0..4 {
            check_refusal(&stage.client().get("/", key));
        }
        assert_eq!(stage.upstream.count(), 4, "nothing is sent twice");
    }
    assert_eq!(calls(&stage.server, "mpool.cooldown"), 0);
    check_not_cooled(&stage.server, &["one", "two"]);
    // A key of the pool still finds the other account.
    assert_eq!(good(&stage.get("/")), "two");
}

#[test]
fn a_bound_keys_refusal_does_not_speak_for_the_account() {
    let (stage, verdicts, _) = stage(&["one"], &["--cooldown", "10s"]);
    let bound = stage.server.connect().bound_key("medium/one");
    verdicts.refuse("one", true);
    // Never well: were the refusals of the bound key taken for good answers, the
    // account would look as if it had been well a moment ago.
    for _ in 0..4 {
        check_refusal(&stage.client().get("/", &bound));
    }
    let _ = stage.get("/");
    assert_eq!(state(&stage.server, "one"), "cooldown");
}

#[test]
fn other_words_of_the_upstream_pass_and_cool_nothing() {
    let upstream = Upstream::start(|exchange| {
        let status = exchange.target.trim_start_matches('/').parse().unwrap();
        let headers = [("Retry-After", "17"), ("X-Ratelimit-Left", "0")];
        exchange.respond(status, &headers, b"the upstream's own words");
    });
    let stage = Stage::on(pool(&["a", "b"]), upstream, &[]);
    for status in [
        400, 402, 403, 404, 407, 408, 413, 429, 500, 502, 503, 504, 529, 599,
    ] {
        for _ in 0..4 {
            stage.upstream.forget();
            let mut client = stage.client();
            let answer = client.round("POST", &format!("/{status}"), &stage.key, &[], b"x");
            assert_eq!((answer.status(), answer.code()), (status, None));
            assert_eq!(answer.text(), "the upstream's own words");
            assert_eq!(answer.header("retry-after"), Some("17"));
            assert_eq!(answer.header("x-ratelimit-left"), Some("0"));
            assert_eq!(stage.upstream.count(), 1);
        }
    }
    assert_eq!(calls(&stage.server, "mpool.cooldown"), 0);
    assert_eq!(stage.forwarder.metric("mpool_failovers_total"), Some(0.0));
}

// Connections

#[test]
fn an_account_whose_connections_keep_breaking_is_cooled_down() {
    for method in ["GET", "POST"] {
        println!("{method}");
        let (stage, verdicts, first) = stage(&["a", "b", "c"], &[]);
        let (other_key, other) = another_key(&stage.server);
        assert_ne!(other, first);
        verdicts.break_off(&first);
        let (mut client, mut others) = (stage.client(), stage.client());
        let mut failures = 0;
        let account = loop {
            assert_eq!(good(&others.get("/", &other_key)), other);
            let answer = client.round(method, "/", &stage.key, &[], b"");
            match answer.code() {
                None => break good(&answer),
                code => assert_eq!((answer.status(), code), (502, Some("UPSTREAM"))),
            }
            failures += 1;
            assert!(failures < 10, "{first} is never cooled down");
        };
        assert!(failures >= 1, "one failure is not enough");
        assert_ne!(account, first);
        let row = stage
            .server
            .connect()
            .account_status(&first, unix_ms())
            .unwrap();
        assert_eq!(text(&row["state"]), "cooldown");
        assert_eq!(
            text(&row["reason"]),
            "connections to the upstream keep failing"
        );
        check_not_cooled(&stage.server, &[&other]);
        let errors =
            format!("mpool_upstream_errors_total{{account=\"{first}\",error=\"broke-off\"}}");
        assert!(stage.forwarder.metric(&errors).unwrap() >= 3.0);
    }
}

#[test]
fn an_upstream_that_is_down_as_a_whole_cools_nothing() {
    let names = ["a", "b", "c"];
    let (mut stage, verdicts, _) = stage(&names, &[]);
    let mut keys: Vec<String> = (0..4).map(|_| another_key(&stage.server).0).collect();
    keys.push(stage.key.clone());
    let all = |stage: &Stage<Upstream>, rounds: usize, check: &dyn Fn(&Answer)| {
        for _ in 0..rounds {
            for key in &keys {
                check(&stage.client().get("/", key));
            }
        }
    };
    let is_good = |answer: &Answer| drop(good(answer));
    let is_broken = |answer: &Answer| {
        assert_eq!(
            (answer.status(), answer.code()),
            (502, Some("UPSTREAM")),
            "{answer:?}"
        );
    };
    all(&stage, 1, &is_good);
    // Nothing listens.
    stage.upstream.stop();
    all(&stage, 6, &is_broken);
    assert_eq!(calls(&stage.server, "mpool.cooldown"), 0);
    stage.upstream.start_again();
    all(&stage, 1, &is_good);
    // It takes connections, and drops them.
    names.iter().for_each(|name| verdicts.break_off(name));
    all(&stage, 6, &is_broken);
    assert_eq!(calls(&stage.server, "mpool.cooldown"), 0);
    check_not_cooled(&stage.server, &names);
}

#[test]
fn requests_that_break_connections_do_not_drain_the_pool() {
    let (stage, others) = crowd(ROOMY);
    amid_requests(
        &stage,
        &others,
        |answer| drop(good(answer)),
        || {
            for _ in 0..100 {
                let answer = stage
                    .client()
                    .round("POST", "/poison", &stage.key, &[], b"x");
                assert_eq!(
                    (answer.status(), answer.code()),
                    (502, Some("UPSTREAM")),
                    "{answer:?}"
                );
            }
        },
    );
}

/// Ten accounts.
const MANY: [&str; 10] = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"];

fn cooled(server: &Server, accounts: &[&str]) -> usize {
    let mut redis = server.connect();
    let states = accounts.iter().map(|name| redis.state(name, unix_ms()));
    states
        .filter(|state| state.as_deref() == Some("cooldown"))
        .count()
}

#[test]
fn an_upstream_that_drops_most_connections_does_not_drain_the_pool() {
    // Of any account alike: six of ten, scattered by a multiplicative hash.
    let count = AtomicUsize::new(0);
    let upstream = Upstream::start(move |exchange| {
        let number = count.fetch_add(1, Ordering::Relaxed) as u32;
        match number.wrapping_mul(2_654_435_769) >> 16 {
            part if part < 0x999A => exchange.close(),
            _ => exchange.ok(),
        }
    });
    let stage = Stage::on(pool(&MANY), upstream, &[]);
    let keys: Vec<String> = (0..12).map(|_| another_key(&stage.server).0).collect();
    let mut outcomes = [0, 0];
    for round in 0..30 {
        for key in &keys {
            let answer = stage.client().get("/", key);
            let outcome = match (answer.status(), answer.code()) {
                (200, None) => 0,
                (502, Some("UPSTREAM")) => 1,
                _ => panic!("{answer:?}"),
            };
            outcomes[outcome] += 1;
        }
        let out = cooled(&stage.server, &MANY);
        assert!(out <= 2, "round {round}: {out} accounts are out");
    }
    assert!(outcomes.iter().all(|count| *count > 50), "{outcomes:?}");
}

#[test]
fn an_upstream_that_is_now_and_then_out_of_reach_costs_no_account() {
    let (mut stage, _, first) = stage(&["a", "b", "c"], &["--connect-timeout", "200ms"]);
    let (other_key, other) = another_key(&stage.server);
    assert_ne!(other, first);
    let mut kept = stage.client();
    for _ in 0..3 {
        good(&kept.get("/", &other_key));
        stage.upstream.stop();
        for _ in 0..3 {
            let answer = stage.get("/");
            assert_eq!((answer.status(), answer.code()), (502, Some("UPSTREAM")));
        }
        stage.upstream.start_again();
    }
    assert_eq!(calls(&stage.server, "mpool.cooldown"), 0);
}

#[test]
fn a_connection_that_was_closed_while_idle_is_nobodys_fault() {
    let (stage, _, account) = stage(&["a", "b"], &[]);
    let mut client = stage.client();
    for round in 0..10 {
        let answer = client.round("POST", "/", &stage.key, &[], b"once");
        assert_eq!(good(&answer), account);
        assert_eq!(stage.upstream.count(), round + 1);
        // The forwarder keeps it for the next request, which must not be lost.
        stage.upstream.close_connections();
        wait_for("the end of the connection", || {
            (stage.upstream.open_connections() == 0).then_some(())
        });
    }
    assert_eq!(calls(&stage.server, "mpool.cooldown"), 0);
}

#[test]
fn a_request_that_an_http2_upstream_did_nothing_with_is_sent_again() {
    let reset = |reason: u32| frame(3, 0, 1, &reason.to_be_bytes());
    // What came after stream 0 was not looked at: that is, nothing was.
    let going = frame(7, 0, 0, &[0; 8]);
    for (what, first, tries) in [
        ("GOAWAY", going, 2),
        ("REFUSED_STREAM", reset(7), 2),
        // It may have done something.
        ("INTERNAL_ERROR", reset(2), 1),
    ] {
        let bodies = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&bodies);
        let url = upstream_of_frames(move |stream, body| {
            let mut seen = seen.lock().unwrap();
            seen.push(body);
            match seen.len() {
                1 => first.clone(),
                _ => frame(1, 5, stream, &[0x88]),
            }
        });
        let stage = Stage::with(url, &["--upstream-protocol", "http2"]);
        let answer = stage
            .client()
            .round("POST", "/", &stage.key, &[], b"once, whole");
        let expected = if tries == 2 { 200 } else { 502 };
        assert_eq!(answer.status(), expected, "{what}");
        assert_eq!(
            *bodies.lock().unwrap(),
            vec![b"once, whole"; tries],
            "{what}"
        );
    }
}

#[test]
fn bad_requests_whose_client_leaves_do_not_drain_the_pool() {
    // How often each target has come.
    let seen: Arc<Mutex<HashMap<String, usize>>> = Arc::default();
    let counts = Arc::clone(&seen);
    let upstream = Upstream::start(move |mut exchange| {
        let count = {
            let mut counts = counts.lock().unwrap();
            let count = counts.entry(exchange.target.clone()).or_default();
            *count += 1;
            *count
        };
        match count {
            1 => exchange.respond(401, &[], REFUSAL),
            // And on another account not answered at all.
            _ => drop(exchange.wait_for_close(PATIENCE)),
        }
    });
    let stage = Stage::on(pool(ROOMY), upstream, &[]);
    for round in 0..12 {
        let target = format!("/{round}");
        let mut client = stage.client();
        client.ask("GET", &target, &stage.key, &[], b"");
        client.patience(Duration::from_millis(10));
        wait_for("a second attempt, or the refusal", || {
            let count = seen.lock().unwrap().get(&target).copied();
            (count == Some(2) || client.try_head().is_ok()).then_some(())
        });
        client.leave();
    }
    wait_for("the accounts to be back", || {
        (cooled(&stage.server, ROOMY) == 0).then_some(())
    });
    assert_eq!(calls(&stage.server, "mpool.cooldown"), 2, "out and back");
}

#[test]
fn bad_requests_with_bodies_that_are_not_kept_do_not_drain_the_pool() {
    let (stage, _, _) = stage(ROOMY, &["--replay-body", "1KiB"]);
    let body = vec![b'x'; 100_000];
    for round in 0..12 {
        let answer = stage.client().round("POST", "/bad", &stage.key, &[], &body);
        match round {
            // Whose fault it is can't be told from one account.
            0 => assert_eq!((answer.status(), answer.code()), (503, Some("ACCOUNT"))),
            _ => check_refusal(&answer),
        }
        // What is well on the next account does not make the key believed again.
        good(&stage.get("/"));
    }
    assert_eq!(cooled(&stage.server, ROOMY), 1);
}

#[test]
fn a_client_that_leaves_while_its_account_is_replaced_leaves_nothing_behind() {
    let stage = Stage::on(pool(&["a", "b"]), Upstream::manual(), &[]);
    let mut client: Client = stage.client();
    client.ask("GET", "/", &stage.key, &[], b"");
    stage.upstream.next().respond(401, &[], REFUSAL);
    let mut second = stage.upstream.next();
    client.leave();
    assert!(second.wait_for_close(PATIENCE).is_some());
    wait_for("the request's end", || {
        (stage.forwarder.metric("mpool_requests_in_flight") == Some(0.0)).then_some(())
    });
    stage.server.connect().check_invariants(2);
}
