//! The forwarder's own answers: which there are, that each can be told from the
//! upstream's and gives nothing away, and that what is no HTTP, or only looks
//! like one request, never reaches the upstream as more than one.

mod proxy;
mod support;

use proxy::http2::frame;
use proxy::{Answer, Client, Forwarder, Stage, Upstream, chunked, request};
use std::cell::Cell;
use std::time::{Duration, Instant, SystemTime};
use support::{Options, PATIENCE, Server};

/// Every code with its status and the error's type.
const CODES: [(&str, u16, &str); 18] = [
    ("NOKEYGIVEN", 401, "authentication_error"),
    ("TWOKEYS", 401, "authentication_error"),
    ("NOKEY", 401, "authentication_error"),
    ("REVOKED", 401, "authentication_error"),
    ("EXPIRED", 401, "authentication_error"),
    ("POOLFULL", 503, "overloaded_error"),
    ("NOACCOUNT", 503, "overloaded_error"),
    ("NOTOKEN", 503, "overloaded_error"),
    ("REDIS", 503, "overloaded_error"),
    ("ACCOUNT", 503, "overloaded_error"),
    ("CONNECTIONS", 503, "overloaded_error"),
    ("UPSTREAM", 502, "api_error"),
    ("UPSTREAM_TIMEOUT", 504, "timeout_error"),
    ("BODY_TOO_LARGE", 413, "request_too_large"),
    ("HEADERS_TOO_LARGE", 431, "invalid_request_error"),
    ("REQUEST_TIMEOUT", 408, "timeout_error"),
    ("BAD_REQUEST", 400, "invalid_request_error"),
    ("UNSUPPORTED", 501, "invalid_request_error"),
];

/// What no answer and no log may hold.
const TOKEN: &str = "token-of-";

/// The answer must be the forwarder's own with that code, whole in all its parts.
#[track_caller]
fn check_own(answer: &Answer, code: &str, key: &str) {
    assert_eq!(answer.code(), Some(code), "{answer:?}");
    let (_, status, kind) = CODES.iter().find(|row| row.0 == code).unwrap();
    assert_eq!(answer.status(), *status, "{code}");
    check_json(&answer.body, kind);
    assert_eq!(
        answer.header("content-type"),
        Some("application/json"),
        "{code}"
    );
    let length = answer.body.len().to_string();
    assert_eq!(answer.header("content-length"), Some(&*length), "{code}");
    assert!(answer.header("date").is_some(), "{code}");
    let retry: Option<u64> = answer
        .header("retry-after")
        .map(|text| text.parse().unwrap());
    match status {
        503 => assert!(
            retry.is_some_and(|seconds| seconds > 0),
            "{code}: {answer:?}"
        ),
        _ => assert_eq!(retry, None, "{code}"),
    }
    let raw = proxy::latin1(&answer.head.raw) + &answer.text();
    assert!(!raw.contains(TOKEN), "{raw}");
    assert!(key.is_empty() || !raw.contains(key), "{raw}");
}

#[track_caller]
fn check_json(body: &[u8], kind: &str) {
    let json: serde_json::Value = serde_json::from_slice(body).unwrap();
    let message = json["error"]["message"].as_str().unwrap();
    assert!(message.ends_with('.') && message.len() > 10, "{message}");
    let expected = serde_json::json!({
        "type": "error",
        "error": {"type": kind, "message": message},
    });
    assert_eq!(json, expected);
}

fn ended(end: Option<Instant>) -> bool {
    end.is_some()
}

/// The log must name no key in full and no token, each entry on a line of its own.
#[track_caller]
fn check_log(forwarder: &Forwarder, keys: &[&str]) {
    for line in forwarder.log().iter().chain(&forwarder.errors()) {
        assert!(line.starts_with('['), "{line:?}");
        assert!(!line.contains(TOKEN), "{line:?}");
        assert!(!line.contains(|c: char| c.is_control()), "{line:?}");
        for key in keys {
            assert!(!line.contains(key), "{line:?}");
        }
    }
}

fn unix_ms() -> i64 {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap();
    now.as_millis().try_into().unwrap()
}

// Keys

#[test]
fn a_key_that_is_missing_unknown_or_over_is_refused_by_its_code() {
    let stage = Stage::new(Upstream::ok());
    let mut redis = stage.server.connect();
    let (good, other, revoked) = (&stage.key, redis.pool_key(), redis.pool_key());
    redis.ok(&["MPOOL.REVOKE", &revoked]);
    let expired = redis.map(&["MPOOL.KEYGEN", "medium", "POOL", "DAYS", "1", "NOW", "0"]);
    let expired = support::text(&expired["key"]);
    let nobody = "sk-cli-v1-0000000000000000000000000000000000000000000000000000000000000000";
    let cases = [
        ("NOKEYGIVEN", String::new()),
        ("NOKEYGIVEN", "x-api-key:\r\n".into()),
        ("NOKEYGIVEN", "x-api-key:   \r\n".into()),
        ("NOKEYGIVEN", "Authorization: Bearer\r\n".into()),
        ("NOKEYGIVEN", "Authorization: Bearer \r\n".into()),
        ("NOKEYGIVEN", format!("Authorization: Basic {good}\r\n")),
        ("NOKEYGIVEN", format!("Authorization: {good}\r\n")),
        ("NOKEYGIVEN", format!("Authorization: Bearer{good}\r\n")),
        (
            "NOKEYGIVEN",
            format!("Proxy-Authorization: Bearer {good}\r\n"),
        ),
        ("NOKEYGIVEN", format!("api-key: {good}\r\n")),
        (
            "TWOKEYS",
            format!("x-api-key: {good}\r\nAuthorization: Bearer {other}\r\n"),
        ),
        (
            "TWOKEYS",
            format!("Authorization: Bearer {good}\r\nx-api-key: nobody\r\n"),
        ),
        (
            "TWOKEYS",
            format!("x-api-key: {good}\r\nx-api-key: {other}\r\n"),
        ),
        (
            "TWOKEYS",
            format!("Authorization: Bearer {good}\r\nAuthorization: Bearer {other}\r\n"),
        ),
        ("NOKEY", format!("x-api-key: {nobody}\r\n")),
        ("NOKEY", format!("Authorization: Bearer {nobody}\r\n")),
        ("NOKEY", format!("x-api-key: {good},{good}\r\n")),
        ("NOKEY", format!("x-api-key: {good}x\r\n")),
        ("NOKEY", format!("x-api-key: {}\r\n", good.to_uppercase())),
        ("REVOKED", format!("x-api-key: {revoked}\r\n")),
        ("EXPIRED", format!("Authorization: bearer {expired}\r\n")),
    ];
    // All over one connection, which stays usable.
    let mut client = stage.client();
    for (code, headers) in &cases {
        client.send(format!("GET / HTTP/1.1\r\nHost: front\r\n{headers}\r\n"));
        let answer = client.answer();
        assert_eq!(answer.code(), Some(*code), "{headers}");
        for key in [good.as_str(), &other, &revoked, &expired, nobody] {
            check_own(&answer, code, key);
        }
    }
    assert_eq!(client.get("/", good).status(), 200);
    assert_eq!(stage.upstream.count(), 1);

    let mut client = stage.forwarder.http2();
    for (code, key) in [
        ("NOKEYGIVEN", ""),
        ("NOKEY", nobody),
        ("REVOKED", &revoked),
        ("EXPIRED", &expired),
    ] {
        let mut answer = client.ask("POST", "/", key, &[], b"a body");
        assert_eq!(
            (answer.status(), answer.header("x-mpool-error")),
            (401, Some(code))
        );
        check_json(&answer.body(), "authentication_error");
    }
    assert_eq!(client.get("/", good).status(), 200);
    check_log(
        &stage.forwarder,
        &[good, &other, &revoked, &expired, nobody],
    );
}

#[test]
fn a_refused_head_request_gets_the_head_alone() {
    let stage = Stage::new(Upstream::ok());
    let mut client = stage.client();
    let answer = client.round("HEAD", "/", "nobody", &[], b"");
    assert_eq!((answer.status(), answer.code()), (401, Some("NOKEY")));
    assert_eq!(answer.body, b"");
    // Nothing of a body is left on the connection.
    assert_eq!(
        client.round("HEAD", "/", &stage.key, &[], b"").status(),
        200
    );
}

#[test]
fn keys_of_any_bytes_do_no_harm() {
    let stage = Stage::new(Upstream::ok());
    let mut redis = stage.server.connect();
    stage.get("/");
    let before = redis.traces();
    let long = "k".repeat(50_000);
    let odd = [
        "*1",
        "$8 FLUSHALL",
        "*1 $8 FLUSHALL",
        "FLUSHALL",
        "a b c",
        "a\tb",
        "\\r\\nFLUSHALL",
        "%0d%0aFLUSHALL%0d%0a",
        "key\" \"WITHTOKEN",
        "'; return redis.call('FLUSHALL') --",
        "${jndi:ldap://x}",
        "client_keys:*",
        "*",
        "../../etc/passwd",
        "{\"a\":1}",
        "\u{80}\u{ff}\u{fe}",
        "\u{e2}\u{80}\u{a8}\u{c2}\u{85}",
        "hunter2-hunter2",
        "x",
        &long,
    ];
    let mut client = stage.client();
    for key in odd {
        for header in ["x-api-key: ", "Authorization: Bearer "] {
            let head = format!("GET / HTTP/1.1\r\nHost: front\r\n{header}{key}\r\n\r\n");
            client.send(head.chars().map(|c| c as u8).collect::<Vec<u8>>());
            let answer = client.answer();
            let short = key.len() < 4;
            check_own(&answer, "NOKEY", if short { "" } else { key });
        }
    }
    // What can't be in a header's value is no HTTP.
    for bad in ["a\0b", "a\rb", "a\nb", "\u{1b}[31m", "a\u{7f}"] {
        let mut client = stage.client();
        client.send(format!(
            "GET / HTTP/1.1\r\nHost: front\r\nx-api-key: {bad}\r\n\r\n"
        ));
        let answer = client.answer();
        assert!(
            ["BAD_REQUEST", "NOKEY"].contains(&answer.code().unwrap()),
            "{bad:?}"
        );
    }
    assert_eq!(redis.traces(), before);
    assert_eq!(client.get("/", &stage.key).status(), 200);
    assert_eq!(stage.upstream.count(), 2);
    let keys: Vec<&str> = odd.into_iter().filter(|key| key.len() > 9).collect();
    check_log(&stage.forwarder, &keys);
}

// The pool

/// The seconds from now to that instant, as a range that holds both ends of a call.
#[track_caller]
fn check_wait(answer: &Answer, due: i64, before: i64, after: i64) {
    let seconds: i64 = answer.header("retry-after").unwrap().parse().unwrap();
    let up = |ms: i64| (ms + 999) / 1000;
    let expected = up(due - after)..=up(due - before);
    assert!(expected.contains(&seconds), "{seconds} s, not {expected:?}");
}

#[test]
fn a_full_pool_says_when_the_next_slot_falls_due() {
    let server = Options::default()
        .accounts(&["one"])
        .module(&["rotation-ms", "600000"])
        .start();
    let stage = Stage::on(server, Upstream::ok(), &[]);
    let mut redis = stage.server.connect();
    let holders = [redis.pool_key(), redis.pool_key()];
    for holder in &holders {
        redis.ok(&["MPOOL.ACQUIRE", holder, "*"]);
    }
    let due = |key: &String| format!("key_rotation:{key}");
    let first: i64 = redis.run(&["HGET", &due(&holders[0]), "next_rotation"]);
    let second: i64 = redis.run(&["HGET", &due(&holders[1]), "next_rotation"]);
    let before = unix_ms();
    let answer = stage.get("/");
    check_own(&answer, "POOLFULL", &stage.key);
    check_wait(&answer, first.min(second), before, unix_ms());
    assert_eq!(stage.upstream.count(), 0);
    // Another slot falls due earlier.
    let soon = unix_ms() + 90_500;
    redis.ok(&[
        "HSET",
        &due(&holders[1]),
        "next_rotation",
        &soon.to_string(),
    ]);
    let before = unix_ms();
    let answer = stage.get("/");
    check_own(&answer, "POOLFULL", &stage.key);
    check_wait(&answer, soon, before, unix_ms());
    // And when one is free, it is had at once.
    redis.ok(&["MPOOL.RELEASE", &holders[0]]);
    assert_eq!(stage.get("/").status(), 200);
}

#[test]
fn a_pool_without_a_usable_account_says_when_there_may_be_one() {
    let stage = Stage::new(Upstream::ok());
    let mut redis = stage.server.connect();
    let until = redis.map(&["MPOOL.COOLDOWN", "medium", "one", "*", "300000"]);
    let until = support::optional_number(&until["until"]).unwrap();
    let before = unix_ms();
    let answer = stage.get("/");
    check_own(&answer, "NOACCOUNT", &stage.key);
    check_wait(&answer, until, before, unix_ms());
    // The account of a bound key is gone: nobody knows for how long.
    let bound = redis.bound_key("medium/one");
    stage.server.remove_account("medium/one");
    redis.wait_for_account("one", false);
    for key in [&stage.key, &bound] {
        let answer = stage.client().get("/", key);
        check_own(&answer, "NOACCOUNT", key);
    }
    assert_eq!(stage.upstream.count(), 0);
}

#[test]
fn an_account_whose_file_is_elsewhere_is_told() {
    let primary = Options::default().accounts(&["one"]).start();
    let mut replica = Options::default().replica_of(&primary).start();
    let mut redis = primary.connect();
    let key = redis.pool_key();
    redis.ok(&["MPOOL.ACQUIRE", &key, "*"]);
    support::wait_for_same(&mut redis, &mut replica.connect());
    replica.connect().ok(&["REPLICAOF", "NO", "ONE"]);
    let upstream = Upstream::ok();
    let forwarder = Forwarder::between(&replica, &upstream).start();
    check_own(&forwarder.client().get("/", &key), "NOTOKEN", &key);
    assert!(replica.is_alive());
    assert_eq!(upstream.count(), 0);
}

/// How long a request may take at most that Redis is to be asked for in vain.
const PROMPT: Duration = Duration::from_secs(3);

#[test]
fn a_redis_that_can_not_be_asked_is_told_promptly() {
    let mut stage = Stage::new(Upstream::ok());
    let redis_pid = stage.server.pid().to_string();
    assert_eq!(stage.get("/").status(), 200);
    let unseen = stage.server.connect().pool_key();
    let ask = |stage: &Stage<Upstream>, what: &str| {
        let began = Instant::now();
        let answer = stage.client().get("/", &unseen);
        check_own(&answer, "REDIS", &unseen);
        assert_eq!(answer.header("retry-after"), Some("1"), "{what}");
        assert!(began.elapsed() < PROMPT, "{what}: {:?}", began.elapsed());
    };
    // It hangs.
    let signal = |name: &str| {
        let kill = ["-c", "kill -s \"$0\" \"$1\"", name, &redis_pid];
        assert!(
            std::process::Command::new("bash")
                .args(kill)
                .status()
                .unwrap()
                .success()
        );
    };
    signal("STOP");
    for _ in 0..2 {
        ask(&stage, "stopped");
    }
    signal("CONT");
    support::wait_for("Redis to be asked again", || {
        let answer = stage.client().get("/", &unseen);
        (answer.status() == 200).then_some(())
    });
    let unseen = stage.server.connect().pool_key();
    // It is gone.
    stage.server.kill();
    for _ in 0..2 {
        let began = Instant::now();
        check_own(&stage.client().get("/", &unseen), "REDIS", &unseen);
        assert!(began.elapsed() < PROMPT, "gone: {:?}", began.elapsed());
    }
    // A key that is not one is told the same: nobody knows.
    check_own(&stage.client().get("/", "nobody"), "REDIS", "nobody");
    check_log(&stage.forwarder, &[&unseen, &stage.key]);
}

#[test]
fn a_redis_without_the_pool_is_told() {
    let server = Options {
        bare: true,
        ..Options::default()
    };
    let server = server.start();
    let upstream = Upstream::ok();
    let forwarder = Forwarder::between(&server, &upstream).start();
    check_own(
        &forwarder.client().get("/", "some-key"),
        "REDIS",
        "some-key",
    );
}

// The upstream

#[test]
fn an_upstream_that_can_not_be_reached_is_told() {
    let nowhere = format!("http://127.0.0.1:{}", support::free_port());
    for (upstream, more) in [
        (nowhere.as_str(), &[][..]),
        (&nowhere, &["--upstream-protocol", "http2"]),
    ] {
        let server = Options::default().accounts(&["one"]).start();
        let key = server.connect().pool_key();
        let forwarder = Forwarder::between(&server, upstream).args(more).start();
        for body in [b"".as_slice(), b"a body"] {
            let method = if body.is_empty() { "GET" } else { "POST" };
            let answer = forwarder.client().round(method, "/", &key, &[], body);
            check_own(&answer, "UPSTREAM", &key);
        }
        check_log(&forwarder, &[&key]);
    }
}

#[test]
fn an_upstream_that_answers_nothing_of_use_is_told() {
    let answers: [&[u8]; 15] = [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-",
        b"HTTP/1.1\r\n\r\n",
        b"HTTP/1.1 99 Low\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 20 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/3.0 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok!",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nX-Nul: a\0b\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nBad Name: x\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nok",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: other\r\nConnection: Upgrade\r\n\r\n",
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03 this is TLS",
    ];
    let stage = Stage::new(Upstream::manual());
    for raw in answers {
        let what = proxy::latin1(raw);
        for method in ["GET", "POST"] {
            stage.upstream.forget();
            let (target, key) = (format!("/{method}"), &stage.key);
            let mut client = stage.client();
            let body: &[u8] = if method == "GET" { b"" } else { b"a body" };
            client.ask(method, &target, key, &[], body);
            let mut first = stage.upstream.next();
            first.body();
            first.send(raw);
            first.close();
            // A request that may be repeated may have been.
            while client.wire.waiting().is_empty() && stage.upstream.count() < 3 {
                client.patience(Duration::from_millis(50));
                if client.wire.fill().is_ok() {
                    break;
                }
                if let Some(mut again) = stage.upstream.next_within(Duration::from_millis(50)) {
                    assert_eq!(method, "GET", "{what:?}: sent again");
                    again.body();
                    again.send(raw);
                    again.close();
                }
            }
            client.patience(PATIENCE);
            check_own(&client.answer(), "UPSTREAM", key);
            assert!(stage.upstream.count() <= 2, "{what:?}");
        }
    }
    check_log(&stage.forwarder, &[&stage.key]);
}

#[test]
fn what_follows_an_upstreams_answer_is_nobodys() {
    let stage = Stage::with(Upstream::manual(), &["--threads", "1"]);
    let mut client = stage.client();
    for poison in [
        "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison",
        "\r\n\r\npoison",
    ] {
        client.ask("GET", "/first", &stage.key, &[], b"");
        let mut exchange = stage.upstream.next();
        exchange.send(format!(
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok{poison}"
        ));
        exchange.keep();
        assert_eq!(client.answer().text(), "ok");
        client.ask("GET", "/second", &stage.key, &[], b"");
        let exchange = stage.upstream.next();
        assert_eq!(exchange.target, "/second");
        exchange.respond(200, &[], b"its own");
        assert_eq!(client.answer().text(), "its own");
    }
}

#[test]
fn both_framings_in_an_answer_become_one() {
    let stage = Stage::new(Upstream::answering(
        "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
    ));
    let answer = stage.get("/");
    let framings = ["content-length", "transfer-encoding"];
    let given = framings.iter().filter(|name| answer.head.has(name)).count();
    match answer.code() {
        Some(code) => assert_eq!(code, "UPSTREAM"),
        None => assert_eq!((given, answer.text().as_str()), (1, "body")),
    }
}

#[test]
fn informational_answers_do_not_stand_in_for_the_answer() {
    let stage = Stage::new(Upstream::manual());
    let mut client = stage.client();
    for before in [
        "HTTP/1.1 100 Continue",
        "HTTP/1.1 102 Processing",
        "HTTP/1.1 103 Early Hints",
    ] {
        client.ask("GET", "/", &stage.key, &[], b"");
        let mut exchange = stage.upstream.next();
        exchange.send(format!("{before}\r\nLink: </x>\r\n\r\n"));
        exchange.ok();
        assert_eq!(client.answer().text(), "ok", "{before}");
    }
}

#[test]
fn an_upstream_that_hangs_is_told_and_let_go() {
    let limit = Duration::from_millis(400);
    let stage = Stage::with(Upstream::manual(), &["--response-timeout", "400ms"]);
    for method in ["GET", "POST"] {
        let began = Instant::now();
        let mut client = stage.client();
        client.ask(method, "/", &stage.key, &[], b"a body");
        let mut exchange = stage.upstream.next();
        exchange.body();
        let answer = client.answer();
        check_own(&answer, "UPSTREAM_TIMEOUT", &stage.key);
        assert!(began.elapsed() >= limit, "{method}");
        assert!(exchange.wait_for_close(PATIENCE).is_some(), "{method}");
        // The connection is as good as before.
        client.ask("GET", "/", &stage.key, &[], b"");
        stage.upstream.next().ok();
        assert_eq!(client.answer().status(), 200, "{method}");
    }
    let second = Stage::with(Upstream::http2(), &["--response-timeout", "400ms"]);
    let mut client = second.client();
    client.ask("GET", "/", &second.key, &[], b"");
    let mut exchange = second.upstream.next();
    check_own(&client.answer(), "UPSTREAM_TIMEOUT", &second.key);
    assert!(exchange.wait_for_close(PATIENCE).is_some());
    // One whose stream is reset before the answer is no timeout.
    client.ask("POST", "/", &second.key, &[], b"x");
    let mut exchange = second.upstream.next();
    exchange.body();
    drop(exchange);
    check_own(&client.answer(), "UPSTREAM", &second.key);
}

#[test]
fn an_upstream_that_falls_silent_in_its_answer_breaks_it() {
    let stage = Stage::with(Upstream::manual(), &["--stream-timeout", "400ms"]);
    let mut client = stage.client();
    client.ask("GET", "/", &stage.key, &[], b"");
    let mut exchange = stage.upstream.next();
    exchange.stream();
    // As long as something comes, it goes on.
    for _ in 0..6 {
        exchange.chunk("x");
        std::thread::sleep(Duration::from_millis(100));
    }
    client.head();
    let broken = client.try_rest().expect_err("it looks whole");
    assert!(!broken.timed_out());
    assert_eq!(broken.answer.body, b"xxxxxx");
    assert!(exchange.wait_for_close(PATIENCE).is_some());
}

// Limits

#[test]
fn a_body_over_the_limit_is_refused() {
    let stage = Stage::with(
        Upstream::start(|mut exchange| {
            while let Ok(Some(_)) = exchange.try_piece() {}
            exchange.ok();
        }),
        &["--max-body", "1KiB"],
    );
    let key = &stage.key;
    let at_the_limit = [b'x'; 1024];
    let over = [b'x'; 1025];
    let mut client = stage.client();
    assert_eq!(
        client.round("POST", "/", key, &[], &at_the_limit).status(),
        200
    );
    let head = format!("POST / HTTP/1.1\r\nHost: front\r\nx-api-key: {key}\r\n");
    let in_chunks = format!("{head}Transfer-Encoding: chunked\r\n\r\n");
    client.send([in_chunks.as_bytes(), &chunked(at_the_limit), &chunked("")].concat());
    assert_eq!(client.answer().status(), 200);

    // By its length: the upstream never hears of it.
    stage.upstream.forget();
    for length in [1025, u64::MAX / 4] {
        let mut client = stage.client();
        client.send(format!("{head}Content-Length: {length}\r\n\r\n"));
        check_own(&client.answer(), "BODY_TOO_LARGE", key);
    }
    check_own(
        &stage.client().round("POST", "/", key, &[], &over),
        "BODY_TOO_LARGE",
        key,
    );
    assert_eq!(stage.upstream.count(), 0);

    // In chunks: what the upstream gets never looks whole.
    for chunks in [
        vec![chunked(over)],
        vec![chunked(at_the_limit), chunked("x")],
    ] {
        stage.upstream.forget();
        let mut client = stage.client();
        client.send(&in_chunks);
        for chunk in chunks {
            client.send(chunk);
        }
        client.send(chunked(""));
        check_own(&client.answer(), "BODY_TOO_LARGE", key);
        let whole = stage
            .upstream
            .requests()
            .iter()
            .any(|request| request.whole);
        assert!(!whole, "{:?}", stage.upstream.requests());
    }
    let mut client = stage.forwarder.http2();
    let mut answer = client.ask("POST", "/", key, &[], &over);
    assert_eq!(answer.header("x-mpool-error"), Some("BODY_TOO_LARGE"));
    check_json(&answer.body(), "request_too_large");
    assert_eq!(client.get("/", key).status(), 200);
}

#[test]
fn a_head_over_the_limit_is_refused() {
    let stage = Stage::with(Upstream::ok(), &["--max-header-bytes", "16KiB"]);
    let key = &stage.key;
    let many: String = (0..2000).map(|n| format!("X-{n}: {n}\r\n")).collect();
    let some: String = (0..99).map(|n| format!("X-{n}: {n}\r\n")).collect();
    let heads = [
        (
            "a long value",
            format!("GET / HTTP/1.1\r\nX-Long: {}\r\n", "v".repeat(17_000)),
        ),
        (
            "a very long value",
            format!("GET / HTTP/1.1\r\nX-Long: {}\r\n", "v".repeat(900_000)),
        ),
        (
            "a long target",
            format!("GET /{} HTTP/1.1\r\n", "p".repeat(17_000)),
        ),
        (
            "a very long target",
            format!("GET /{} HTTP/1.1\r\n", "p".repeat(900_000)),
        ),
        (
            "a long name",
            format!("GET / HTTP/1.1\r\n{}: v\r\n", "n".repeat(17_000)),
        ),
        ("many headers", format!("GET / HTTP/1.1\r\n{many}")),
        (
            "one more than a hundred small headers",
            format!("GET / HTTP/1.1\r\n{some}"),
        ),
    ];
    for (what, head) in &heads {
        let mut client = stage.client();
        // It may be refused before all of it is sent.
        let _ = client.try_send(format!("{head}Host: front\r\nx-api-key: {key}\r\n\r\n"));
        let answer = client.try_answer();
        let answer = answer.unwrap_or_else(|broken| panic!("{what}: {broken:?}"));
        check_own(&answer, "HEADERS_TOO_LARGE", key);
    }
    let long = format!("GET / HTTP/1.1\r\nX-Long: {}\r\n", "v".repeat(15_000));
    let (many, _) = some.rsplit_once("X-98").unwrap();
    for fits in [long, format!("GET / HTTP/1.1\r\n{many}")] {
        let mut client = stage.client();
        client.send(format!("{fits}Host: front\r\nx-api-key: {key}\r\n\r\n"));
        assert_eq!(client.answer().status(), 200);
    }
    assert_eq!(stage.upstream.count(), 2);

    let mut client = stage.forwarder.http2();
    let long = "v".repeat(17_000);
    let answer = client.ask("GET", "/", key, &[("x-long", &long)], b"");
    assert_eq!(answer.status(), 431);
    assert_eq!(answer.header("x-mpool-error"), Some("HEADERS_TOO_LARGE"));
    assert_eq!(client.get("/", key).status(), 200);
}

#[test]
fn a_request_that_takes_too_long_to_come_is_told() {
    let timeouts = ["--header-timeout", "500ms", "--body-timeout", "500ms"];
    let stage = Stage::with(
        Upstream::start(|mut exchange| {
            while let Ok(Some(_)) = exchange.try_piece() {}
            exchange.ok();
        }),
        &timeouts,
    );
    let key = &stage.key;
    let limit = Duration::from_millis(500);
    let generous = Duration::from_secs(5);
    let head = format!("POST / HTTP/1.1\r\nHost: front\r\nx-api-key: {key}\r\n");

    let half: [(&str, String); 4] = [
        ("half a line", "GET / HT".into()),
        ("half a head", head.clone()),
        (
            "half a body",
            format!("{head}Content-Length: 100\r\n\r\nhalf"),
        ),
        (
            "half the chunks",
            format!("{head}Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"),
        ),
    ];
    std::thread::scope(|scope| {
        for (what, sent) in &half {
            let stage = &stage;
            scope.spawn(move || {
                let mut client = stage.client();
                let began = Instant::now();
                client.send(sent);
                let answer = client.try_answer();
                let answer = answer.unwrap_or_else(|broken| panic!("{what}: {broken:?}"));
                check_own(&answer, "REQUEST_TIMEOUT", &stage.key);
                assert!(began.elapsed() >= limit, "{what}: {:?}", began.elapsed());
                assert!(began.elapsed() < generous, "{what}: {:?}", began.elapsed());
                assert!(ended(client.wait_for_close(PATIENCE)), "{what}");
            });
        }
        // A head that comes byte by byte has the same time as another.
        scope.spawn(|| {
            let mut client = stage.client();
            let began = Instant::now();
            let slow = std::iter::repeat("x-slow: 1\r\n").flat_map(str::bytes);
            let first = head.bytes().chain(slow);
            for byte in first {
                if client.try_send([byte]).is_err() || began.elapsed() > generous {
                    break;
                }
                client.patience(Duration::from_millis(20));
                if client.wire.fill().is_ok() {
                    break;
                }
            }
            client.patience(PATIENCE);
            check_own(&client.answer(), "REQUEST_TIMEOUT", &stage.key);
            assert!(began.elapsed() < generous, "{:?}", began.elapsed());
        });
        // A body that comes slowly, but comes, is no silent one.
        scope.spawn(|| {
            let mut client = stage.client();
            client.send(format!("{head}Content-Length: 8\r\n\r\n"));
            for byte in b"all good" {
                std::thread::sleep(Duration::from_millis(150));
                client.send([*byte]);
            }
            assert_eq!(client.answer().text(), "ok");
        });
        // The second request of a connection has as much time as the first.
        scope.spawn(|| {
            let mut client = stage.client();
            assert_eq!(client.get("/", key).status(), 200);
            client.send("GET / HTTP/1.1\r\nHo");
            check_own(&client.answer(), "REQUEST_TIMEOUT", key);
        });
        // What is left of a refused request's body is no head.
        scope.spawn(|| {
            let mut client = stage.client();
            client.send("POST / HTTP/1.1\r\nHost: front\r\nContent-Length: 8\r\n\r\n");
            check_own(&client.answer(), "NOKEYGIVEN", "");
            client.send("all ");
            client.send("good");
            assert_eq!(client.wait_for_close(2 * limit), None);
            assert_eq!(client.get("/", key).status(), 200);
        });
    });
    assert!(
        !stage
            .upstream
            .requests()
            .iter()
            .any(|request| request.target != "/")
    );
}

#[test]
fn a_client_that_reads_nothing_is_let_go() {
    let stage = Stage::with(Upstream::manual(), &["--send-timeout", "500ms"]);
    let mut client = stage.client();
    client.ask("GET", "/", &stage.key, &[], b"");
    let mut exchange = stage.upstream.next();
    exchange.stream();
    let chunk = chunked(vec![b'x'; 64 * 1024]);
    let began = Instant::now();
    while exchange.try_send(&chunk).is_ok() {
        assert!(began.elapsed() < PATIENCE, "the upstream is kept waiting");
    }
    // What was sent does not look whole.
    client.head();
    assert!(!client.try_rest().expect_err("it looks whole").timed_out());
}

#[test]
fn an_idle_connection_is_closed_without_a_word() {
    let stage = Stage::with(Upstream::ok(), &["--keepalive-timeout", "400ms"]);
    let mut used = stage.client();
    assert_eq!(used.get("/", &stage.key).status(), 200);
    let began = Instant::now();
    let mut unused = stage.client();
    for client in [&mut used, &mut unused] {
        assert!(ended(client.wait_for_close(PATIENCE)));
        assert_eq!(proxy::latin1(client.wire.waiting()), "");
    }
    assert!(began.elapsed() >= Duration::from_millis(300));
}

#[test]
fn connections_over_the_limit_are_told_and_a_place_that_falls_free_is_used() {
    let stage = Stage::with(Upstream::ok(), &["--max-connections", "2"]);
    let mut held = [stage.client(), stage.client()];
    for client in &mut held {
        assert_eq!(client.get("/", &stage.key).status(), 200);
    }
    let mut third = stage.client();
    let _ = third.try_send(request("GET", "/", &stage.key, &[], b""));
    check_own(&third.answer(), "CONNECTIONS", &stage.key);
    assert!(ended(third.wait_for_close(PATIENCE)));
    drop(held);
    support::wait_for("a place", || {
        let mut client = stage.client();
        let _ = client.try_send(request("GET", "/", &stage.key, &[], b""));
        let answer = client.try_answer().ok()?;
        (answer.status() == 200).then_some(())
    });
}

// What is no HTTP, and what looks like more than one request

#[test]
fn what_is_no_http_is_refused() {
    let stage = Stage::new(Upstream::ok());
    let key = format!("x-api-key: {}", stage.key);
    let get = format!("GET / HTTP/1.1\r\nHost: front\r\n{key}\r\n");
    let shapes: Vec<(&str, Vec<u8>)> = vec![
        ("words", b"hello there\r\n\r\n".to_vec()),
        (
            "TLS",
            b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n".to_vec(),
        ),
        ("no version", format!("GET /\r\n{key}\r\n\r\n").into()),
        (
            "HTTP/0.9 and more",
            format!("GET / HTTP/0.9\r\n{key}\r\n\r\n").into(),
        ),
        (
            "HTTP/3.0",
            format!("GET / HTTP/3.0\r\n{key}\r\n\r\n").into(),
        ),
        (
            "a lower-case version",
            format!("GET / http/1.1\r\n{key}\r\n\r\n").into(),
        ),
        (
            "a space in the target",
            format!("GET /a b HTTP/1.1\r\n{key}\r\n\r\n").into(),
        ),
        (
            "no slash",
            format!("GET a HTTP/1.1 x\r\n{key}\r\n\r\n").into(),
        ),
        (
            "an empty method",
            format!(" / HTTP/1.1\r\n{key}\r\n\r\n").into(),
        ),
        (
            "a bad method",
            format!("G(T / HTTP/1.1\r\n{key}\r\n\r\n").into(),
        ),
        (
            "NUL in the target",
            format!("GET /a\0b HTTP/1.1\r\n{key}\r\n\r\n").into(),
        ),
        (
            "a line without a colon",
            format!("{get}nonsense\r\n\r\n").into(),
        ),
        ("a name with a space", format!("{get}X Y: 1\r\n\r\n").into()),
        ("an empty name", format!("{get}: 1\r\n\r\n").into()),
        (
            "a name beyond ASCII",
            [get.as_bytes(), b"X-\xe9: 1\r\n\r\n"].concat(),
        ),
        ("NUL in a value", format!("{get}X-Y: a\0b\r\n\r\n").into()),
        ("DEL in a value", format!("{get}X-Y: a\x7fb\r\n\r\n").into()),
        ("CR in a value", format!("{get}X-Y: a\rb\r\n\r\n").into()),
        (
            "a bell in a value",
            format!("{get}X-Y: a\x07b\r\n\r\n").into(),
        ),
        (
            "a negative length",
            format!("{get}Content-Length: -1\r\n\r\n").into(),
        ),
        (
            "a signed length",
            format!("{get}Content-Length: +4\r\n\r\nbody").into(),
        ),
        (
            "a hexadecimal length",
            format!("{get}Content-Length: 0x4\r\n\r\nbody").into(),
        ),
        (
            "no length at all",
            format!("{get}Content-Length:\r\n\r\n").into(),
        ),
        (
            "a length beyond 64 bits",
            format!("{get}Content-Length: 18446744073709551616\r\n\r\n").into(),
        ),
    ];
    for (what, bytes) in shapes {
        let mut client = stage.client();
        client.send(bytes);
        let answer = client.try_answer();
        let answer = answer.unwrap_or_else(|broken| panic!("{what}: {broken:?}"));
        assert_eq!(answer.status(), 400, "{what}: {answer:?}");
        check_own(&answer, "BAD_REQUEST", &stage.key);
        assert!(
            ended(client.wait_for_close(PATIENCE)),
            "{what}: it stays open"
        );
    }
    assert_eq!(
        stage.upstream.count(),
        0,
        "{:#?}",
        stage.upstream.requests()
    );
}

#[test]
fn what_is_no_http_gets_a_full_answer_behind_another_request_too() {
    let stage = Stage::new(Upstream::ok());
    for (what, key, body) in [
        ("a refused request", "sk-none", ""),
        ("a refused request with a body", "sk-none", "hello"),
        ("a forwarded request", stage.key.as_str(), "hello"),
    ] {
        let head = format!(
            "POST / HTTP/1.1\r\nHost: front\r\nx-api-key: {key}\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        let mut client = stage.client();
        client.send(format!("{head}{body}hello there\r\n\r\n"));
        let first = client.try_answer();
        first.unwrap_or_else(|broken| panic!("{what}: {broken:?}"));
        let second = client.try_answer();
        let second = second.unwrap_or_else(|broken| panic!("{what}: {broken:?}"));
        println!("behind {what}");
        check_own(&second, "BAD_REQUEST", &stage.key);
        assert!(
            ended(client.wait_for_close(PATIENCE)),
            "{what}: it stays open"
        );
    }
}

#[test]
fn connect_and_trace_are_not_forwarded() {
    let stage = Stage::new(Upstream::ok());
    for (method, target) in [("CONNECT", "elsewhere:443"), ("TRACE", "/"), ("TRACE", "*")] {
        let mut client = stage.client();
        client.ask(method, target, &stage.key, &[], b"");
        check_own(&client.answer(), "UNSUPPORTED", &stage.key);
    }
    assert_eq!(stage.upstream.count(), 0);
}

#[test]
fn a_target_that_names_only_a_host_is_refused() {
    let stage = Stage::new(Upstream::ok());
    for target in ["elsewhere", "elsewhere:443", "127.0.0.1"] {
        let answer = stage.get(target);
        assert_eq!(answer.status(), 400, "{target}");
        check_own(&answer, "BAD_REQUEST", &stage.key);
    }
    assert_eq!(stage.upstream.count(), 0);
}

#[test]
fn an_upstreams_own_code_is_not_taken_for_the_forwarders() {
    let stage = Stage::new(Upstream::answering(
        "HTTP/1.1 503 No\r\nX-Mpool-Error: POOLFULL\r\nX-Other: 1\r\nContent-Length: 0\r\n\r\n",
    ));
    let answer = stage.get("/");
    assert_eq!((answer.status(), answer.code()), (503, None));
    assert_eq!(answer.header("x-other"), Some("1"));
}

#[test]
fn requests_over_the_limit_are_told_on_one_connection_too() {
    let stage = Stage::with(Upstream::manual(), &["--max-connections", "2"]);
    let mut client = stage.forwarder.http2();
    let mut begin = || {
        let (feed, pending) = client.open("GET", "/", &stage.key, &[]);
        feed.end();
        pending
    };
    let first = (begin(), stage.upstream.next());
    let second = (begin(), stage.upstream.next());
    let mut answer = begin().answer();
    assert_eq!(answer.status(), 503);
    assert_eq!(answer.header("x-mpool-error"), Some("CONNECTIONS"));
    assert_eq!(answer.header("retry-after"), Some("1"));
    answer.body();
    first.1.ok();
    assert_eq!(first.0.answer().body(), b"ok");
    support::wait_for("the end of the first", || {
        (stage.forwarder.metric("mpool_requests_in_flight") == Some(1.0)).then_some(())
    });
    let third = (begin(), stage.upstream.next());
    for (pending, exchange) in [second, third] {
        exchange.ok();
        assert_eq!(pending.answer().status(), 200);
    }
}

/// A round for requests that may hide another, `GET /hidden`, with a good key.
struct Smuggler {
    stage: Stage<Upstream>,
    /// The headers of both requests.
    headers: String,
    hidden: String,
    round: Cell<u32>,
    faults: Vec<String>,
}

impl Smuggler {
    fn new() -> Self {
        let stage = Stage::new(Upstream::start(|mut exchange| {
            // A body that never ends is none of the upstream's doing.
            while let Ok(Some(_)) = exchange.try_piece() {}
            exchange.ok();
        }));
        let key = format!("Host: front\r\nx-api-key: {}\r\n", stage.key);
        Self {
            stage,
            hidden: format!("GET /hidden HTTP/1.1\r\n{key}\r\n"),
            headers: key,
            round: Cell::new(0),
            faults: Vec::new(),
        }
    }

    /// Sends it, and answers what the upstream got of it once all is silent.
    fn send(&self, rest: &str) -> (Vec<proxy::Request>, String) {
        // By this its first request is told from one before that came late.
        self.round.set(self.round.get() + 1);
        let own = format!("/{}", self.round.get());
        let mut client = self.stage.client();
        // It may be refused before all of it is sent.
        let _ = client.try_send(format!("POST {own} HTTP/1.1\r\n{}{rest}", self.headers));
        // Where the forwarder waits for more, there is no more.
        client.wait_for_close(Duration::from_millis(100));
        let back = proxy::latin1(client.wire.waiting());
        drop(client);
        let mut requests = self.stage.upstream.requests();
        requests.retain(|request| request.target == own || request.target == "/hidden");
        self.stage.upstream.forget();
        (requests, back)
    }

    /// At most the first request may reach the upstream, and an answer must come.
    fn check(&mut self, what: &str, rest: &str) {
        let (requests, back) = self.send(rest);
        let hidden = requests.iter().any(|request| request.target == "/hidden");
        if requests.len() > 1 || hidden || back.is_empty() {
            let fault = format!("{what}: the upstream got {requests:#?}, the client {back:?}");
            self.faults.push(fault);
        }
    }

    #[track_caller]
    fn end(self) {
        assert!(self.faults.is_empty(), "{}", self.faults.join("\n\n"));
        assert_eq!(self.stage.get("/").status(), 200);
    }
}

#[test]
fn no_framing_hides_a_request() {
    // Framings, and where the body begins what is an end to one reader and data
    // to another.
    const END: &str = "0\r\n\r\n";
    let framings = [
        ("Content-Length: 6\r\nTransfer-Encoding: chunked", END),
        ("Transfer-Encoding: chunked\r\nContent-Length: 6", END),
        ("Content-Length: 0\r\nContent-Length: 5", ""),
        ("Content-Length: 0, 5", ""),
        ("Content-Length: 0\r\nContent-Length: ", ""),
        ("Transfer-Encoding: chunked, identity", END),
        ("Transfer-Encoding: identity\r\nContent-Length: 0", ""),
        ("Transfer-Encoding: identity", END),
        ("Transfer-Encoding: xchunked", END),
        ("Transfer-Encoding: chunkedx\r\nContent-Length: 0", ""),
        ("Transfer-Encoding: chunked, chunked", END),
        ("Transfer-Encoding: deflate, chunked", END),
        (
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
            END,
        ),
        (
            "Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
            END,
        ),
        ("Transfer-Encoding: \"chunked\"\r\nContent-Length: 0", ""),
        ("Transfer-Encoding: \x0bchunked\r\nContent-Length: 0", ""),
        ("Transfer-Encoding: chunked;q=1", END),
        ("Transfer-Encoding:", END),
        ("Transfer-Encoding : chunked\r\nContent-Length: 0", ""),
        ("Content-Length\t: 5", ""),
        (
            "X-Fold: a\r\n Transfer-Encoding: chunked\r\nContent-Length: 0",
            "",
        ),
        ("Transfer-Encoding:\r\n chunked\r\nContent-Length: 0", END),
        (" Content-Length: 5", ""),
        (
            "X-Bare: a\nTransfer-Encoding: chunked\r\nContent-Length: 0",
            "",
        ),
        ("X-Bare: a\rContent-Length: 500", ""),
        ("Transfer-Encoding\0: chunked\r\nContent-Length: 0", ""),
        (": x\r\nContent-Length: 0", ""),
    ];
    let mut smuggler = Smuggler::new();
    for (framing, before) in framings {
        let rest = format!("{framing}\r\n\r\n{before}{}", smuggler.hidden);
        smuggler.check(framing, &rest);
    }
    smuggler.end();
}

#[test]
fn no_chunk_hides_a_request() {
    let bodies = [
        "\r\n",
        "xyz\r\n",
        "-1\r\n",
        "0x0\r\n\r\n",
        "+0\r\n\r\n",
        " 0\r\n\r\n",
        "10000000000000000\r\n\r\n",
        "100000000000000000\r\n\r\n",
        // Too long, too short.
        "1\r\nxx\r\n0\r\n\r\n",
        "5\r\nxx\r\n0\r\n\r\n",
        // Bare line feeds and carriage returns.
        "1\nx\r\n0\r\n\r\n",
        "1\r\nx\n0\r\n\r\n",
        "1\rx\r\n0\r\n\r\n",
        "1;a\nb\r\nx\r\n0\r\n\r\n",
        "0\r\nnonsense\r\n\r\n",
        "0\r\nBad Name: x\r\n\r\n",
    ];
    let mut smuggler = Smuggler::new();
    for body in bodies {
        let hidden = &smuggler.hidden;
        let rest = format!("Transfer-Encoding: chunked\r\n\r\n{body}{hidden}");
        smuggler.check(body, &rest);
    }
    for (what, body) in [
        (
            "a long extension",
            format!("1;{}\r\nx\r\n0\r\n\r\n", "e".repeat(100_000)),
        ),
        (
            "many trailers",
            format!("0\r\n{}", "x: y\r\n".repeat(20_000)),
        ),
    ] {
        let hidden = &smuggler.hidden;
        let rest = format!("Transfer-Encoding: chunked\r\n\r\n{body}{hidden}");
        smuggler.check(what, &rest);
    }
    smuggler.end();
}

#[test]
fn chunks_that_are_oddly_but_rightly_written_pass_as_data() {
    let smuggler = Smuggler::new();
    let hidden = &smuggler.hidden;
    let size = format!("{:x}", hidden.len());
    for body in [
        format!("{size};a=b;c=\"d\"\r\n{hidden}\r\n0;last\r\n\r\n"),
        format!("0000{size}\r\n{hidden}\r\n000\r\n\r\n"),
        format!(
            "{}\r\n{hidden}\r\n0\r\nX-Trailer: 1\r\n\r\n",
            size.to_uppercase()
        ),
    ] {
        let (requests, back) = smuggler.send(&format!("Transfer-Encoding: chunked\r\n\r\n{body}"));
        assert_eq!(requests.len(), 1, "{requests:#?}\n{back}");
        assert!(
            requests[0].whole && requests[0].body == hidden.as_bytes(),
            "{requests:#?}"
        );
        assert!(back.starts_with("HTTP/1.1 200"), "{back}");
    }
    // Names that only look like the framing's mean nothing and pass.
    let like = "Content_Length: 500\r\nX-Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\nhi";
    let (requests, _) = smuggler.send(like);
    assert_eq!(requests.len(), 1);
    assert_eq!(requests[0].body, b"hi");
    assert_eq!(requests[0].head.values("content_length"), ["500"]);
    smuggler.end();
}

/// A header field as HPACK's plainest form, which takes any bytes.
fn field(name: &str, value: &str) -> Vec<u8> {
    let text = |text: &str| {
        let mut bytes = match text.len() {
            short @ 0..127 => vec![short as u8],
            long => {
                let rest = long - 127;
                assert!(rest < 128 * 128);
                vec![127, (rest % 128) as u8 | 128, (rest / 128) as u8]
            }
        };
        bytes.extend_from_slice(text.as_bytes());
        bytes
    };
    [vec![0], text(name), text(value)].concat()
}

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

#[test]
fn no_http2_request_hides_another() {
    let stage = Stage::new(Upstream::start(|mut exchange| {
        while let Ok(Some(_)) = exchange.try_piece() {}
        exchange.ok();
    }));
    let key = &stage.key;
    let hidden = format!("GET /hidden HTTP/1.1\r\nHost: x\r\nx-api-key: {key}\r\n\r\n");
    let usual = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/"),
        (":authority", "x"),
    ];
    let inject = format!("a\r\n\r\n{hidden}");
    let in_path = format!("/ HTTP/1.1\r\n\r\n{hidden}");
    let cases: Vec<(&str, Vec<(&str, &str)>)> = vec![
        // As it should be: this one passes.
        ("", vec![]),
        ("chunks", vec![("transfer-encoding", "chunked")]),
        (
            "chunks and a length",
            vec![("transfer-encoding", "chunked"), ("content-length", "5")],
        ),
        ("a length of nothing", vec![("content-length", "0")]),
        ("a length that is short", vec![("content-length", "3")]),
        ("a length that is long", vec![("content-length", "1000")]),
        (
            "two lengths",
            vec![("content-length", "0"), ("content-length", "5")],
        ),
        (
            "the same length twice, and wrong",
            vec![("content-length", "3"), ("content-length", "3")],
        ),
        ("a length that is none", vec![("content-length", "0\r\n")]),
        (
            "a line end in a value",
            vec![("x-value", "a\r\nx-injected: 1")],
        ),
        ("a request in a value", vec![("x-value", &inject)]),
        (
            "a line feed in a value",
            vec![("x-value", "a\nx-injected: 1")],
        ),
        ("NUL in a value", vec![("x-value", "a\0b")]),
        (
            "a line end in a name",
            vec![("x-name: 1\r\nx-injected", "1")],
        ),
        ("a colon in a name", vec![("x-injected: 1", "2")]),
        ("a space in a name", vec![("transfer-encoding ", "chunked")]),
        ("a capital in a name", vec![("X-Injected", "1")]),
        ("no name", vec![("", "1")]),
        (
            "Connection",
            vec![("connection", "x-api-key"), ("upgrade", "websocket")],
        ),
        ("a request in the path", vec![(":path", &in_path)]),
        ("a space in the path", vec![(":path", "/a /hidden")]),
        ("an empty path", vec![(":path", "")]),
        ("two paths", vec![(":path", "/"), (":path", "/hidden")]),
        ("a request in the method", vec![(":method", &in_path)]),
        ("a space in the method", vec![(":method", "GET /hidden")]),
        (
            "a line end in the authority",
            vec![(":authority", "x\r\nx-injected: 1")],
        ),
        (
            "a line end in the scheme",
            vec![(":scheme", "http\r\nx-injected: 1")],
        ),
        (
            "a late pseudo-header",
            vec![("x-first", "1"), (":path", "/hidden")],
        ),
        ("an unknown pseudo-header", vec![(":hidden", "1")]),
        ("CONNECT", vec![(":method", "CONNECT")]),
    ];
    for (what, changed) in &cases {
        stage.upstream.forget();
        let replaced = |name: &str| changed.iter().any(|(other, _)| *other == name);
        let begin = usual.iter().filter(|(name, _)| !replaced(name));
        let mut head: Vec<u8> = begin.flat_map(|(name, value)| field(name, value)).collect();
        // Pseudo-headers come first, where that is not the very question.
        let fields = changed.iter().flat_map(|(name, value)| field(name, value));
        head.extend(fields.chain(field("x-api-key", key)));
        let mut client = stage.client();
        client.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        client.send(frame(SETTINGS, 0, 0, b""));
        client.send(frame(HEADERS, END_HEADERS, 1, &head));
        // It may have been refused by now.
        let _ = client.try_send(frame(DATA, END_STREAM, 1, hidden.as_bytes()));
        client.wait_for_close(Duration::from_millis(50));
        if what.is_empty() {
            support::wait_for("the request that is as it should be", || {
                let requests = stage.upstream.requests();
                requests.first().filter(|request| request.whole).map(|_| ())
            });
        }
        drop(client);
        let requests = stage.upstream.requests();
        assert!(requests.len() <= 1, "{what}: {requests:#?}");
        for request in requests {
            let raw = proxy::latin1(&request.head.raw);
            assert!(
                !raw.contains("injected") && !raw.contains("hidden"),
                "{what}: {raw}"
            );
            // All of the hidden request is data, or the body never comes to its end.
            let is_data = request.body == hidden.as_bytes();
            assert!(is_data || !request.whole, "{what}: {request:?}");
        }
    }
    assert_eq!(stage.get("/").status(), 200);
}

#[test]
fn an_http2_connection_of_which_nothing_is_taken_ends() {
    let arguments = ["--send-timeout", "300ms", "--keepalive-timeout", "300ms"];
    let upstream = Upstream::start(|exchange| exchange.respond(200, &[], &[b'x'; 1000]));
    let stage = Stage::with(upstream, &arguments);
    // SETTINGS_INITIAL_WINDOW_SIZE: the client takes heads, and no byte of a body.
    let no_window = frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0]);
    for (what, key) in [("an answer", &*stage.key), ("a refusal", "sk-of-nobody")] {
        let head = [
            (":method", "GET"),
            (":scheme", "http"),
            (":path", "/"),
            (":authority", "x"),
            ("x-api-key", key),
        ];
        let head: Vec<u8> = head
            .iter()
            .flat_map(|(name, value)| field(name, value))
            .collect();
        let mut client = stage.client();
        client.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        client.send(&no_window);
        for stream in [1, 3] {
            client.send(frame(HEADERS, END_HEADERS | END_STREAM, stream, &head));
        }
        let begun = Instant::now();
        assert!(ended(client.wait_for_close(PATIENCE)), "{what}");
        assert!(begun.elapsed() > Duration::from_millis(300), "{what}");
    }
    support::wait_for("the end of all requests", || {
        (stage.forwarder.metric("mpool_requests_in_flight") == Some(0.0)).then_some(())
    });
}

#[test]
fn trailers_can_not_bring_headers_in() {
    let stage = Stage::new(Upstream::ok());
    let mut client = stage.client();
    client.send(format!(
        "POST / HTTP/1.1\r\nHost: front\r\nx-api-key: {}\r\nTE: trailers\r\nConnection: TE\r\n\
         Trailer: Authorization, x-api-key, Content-Length, Host, Transfer-Encoding, X-Fine\r\n\
         Transfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\nAuthorization: Bearer other\r\n\
         x-api-key: other\r\nContent-Length: 500\r\nTransfer-Encoding: x\r\nHost: other\r\n\
         X-Fine: 1\r\n\r\n",
        stage.key
    ));
    assert_eq!(client.answer().status(), 200);
    let request = stage.upstream.only();
    assert_eq!(request.body, b"body");
    let names: Vec<String> = request
        .trailers
        .iter()
        .map(|(name, _)| name.to_ascii_lowercase())
        .collect();
    assert_eq!(names, ["x-fine"]);
}

// Answers to clients that are still sending

#[test]
fn a_connection_stays_usable_after_a_refused_request_with_a_body() {
    let stage = Stage::new(Upstream::ok());
    let mut client = stage.client();
    let body = vec![b'x'; 100_000];
    for _ in 0..3 {
        let answer = client.round("POST", "/", "nobody", &[], &body);
        check_own(&answer, "NOKEY", "");
        assert_eq!(client.get("/", &stage.key).status(), 200);
        let head = "POST / HTTP/1.1\r\nHost: front\r\nTransfer-Encoding: chunked\r\n\r\n";
        client.send([head.as_bytes(), &chunked(&body), &chunked("")].concat());
        check_own(&client.answer(), "NOKEYGIVEN", "");
        assert_eq!(client.get("/", &stage.key).status(), 200);
    }
    assert_eq!(stage.upstream.count(), 6);
}

#[test]
fn a_client_that_is_still_sending_gets_the_answer() {
    for (limit, code) in [("1GiB", "NOKEY"), ("1MiB", "BODY_TOO_LARGE")] {
        let stage = Stage::with(Upstream::ok(), &["--max-body", limit]);
        let key = match code {
            "NOKEY" => "nobody",
            _ => stage.key.as_str(),
        };
        // All of it is sent before the answer is looked for.
        for in_chunks in [false, true] {
            let body = vec![b'x'; 8 << 20];
            let mut client = stage.client();
            let framing = match in_chunks {
                true => "Transfer-Encoding: chunked".to_owned(),
                false => format!("Content-Length: {}", body.len()),
            };
            client.send(format!(
                "POST / HTTP/1.1\r\nHost: front\r\nx-api-key: {key}\r\n{framing}\r\n\r\n"
            ));
            for piece in body.chunks(64 * 1024) {
                let sent = match in_chunks {
                    true => client.try_send(chunked(piece)),
                    false => client.try_send(piece),
                };
                sent.unwrap_or_else(|error| panic!("{code}, in chunks {in_chunks}: {error}"));
            }
            if in_chunks {
                client.send(chunked(""));
            }
            check_own(&client.answer(), code, key);
        }
        // It looks for the answer while it sends what takes longer than anyone waits.
        let mut client = stage.client();
        client.send(format!(
            "POST / HTTP/1.1\r\nHost: front\r\nx-api-key: {key}\r\nContent-Length: 1000000000\r\n\r\n"
        ));
        let mut sender = Client::over(client.wire.stream.try_clone().unwrap());
        let sending = std::thread::spawn(move || {
            let piece = [b'x'; 64 * 1024];
            while sender.try_send(piece).is_ok() {}
        });
        check_own(&client.answer(), code, key);
        drop(client);
        sending.join().unwrap();

        // An HTTP/2 client sees it beside its own sending.
        let mut client = stage.forwarder.http2();
        let (feed, pending) = client.open("POST", "/", key, &[]);
        while !pending.is_answered() && feed.try_data([b'x'; 16 * 1024], PATIENCE) {}
        let answer = pending.answer();
        assert_eq!(answer.header("x-mpool-error"), Some(code));
    }
}

#[test]
fn an_http10_client_gets_its_refusal() {
    let stage = Stage::new(Upstream::ok());
    let mut client = stage.client();
    client.send("GET / HTTP/1.0\r\n\r\n");
    check_own(&client.answer(), "NOKEYGIVEN", "");
    assert!(ended(client.wait_for_close(PATIENCE)));
}

#[test]
fn the_forwarder_comes_up_without_redis_and_recovers() {
    let mut server: Server = Options::default().accounts(&["one"]).start();
    let key = server.connect().pool_key();
    server.shutdown();
    let upstream = Upstream::ok();
    let forwarder = Forwarder::between(&server, &upstream).start();
    check_own(&forwarder.client().get("/", &key), "REDIS", &key);
    server.launch();
    let key = server.connect().pool_key();
    let began = Instant::now();
    support::wait_for("the first success", || {
        let answer = forwarder.client().get("/", &key);
        (answer.status() == 200).then_some(())
    });
    println!("the first success came {:?} after Redis", began.elapsed());
    assert_eq!(upstream.count(), 1);
}
