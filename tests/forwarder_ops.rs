//! What operators rely on: configuration that is refused before anything is
//! bound, log lines, the admin listener, an orderly end, limits, TLS, and a Redis
//! that goes, comes back, hangs or changes places.

mod proxy;
mod support;

use proxy::http2::{frame, upstream_of_frames};
use proxy::tls::{Authority, TlsUpstream};
use proxy::{Answer, Client, Forwarder, Stage, Target, Upstream};
use proxy::{Setup, chunked, request};
use redis::Value;
use std::collections::{BTreeMap, HashSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, TryRecvError};
use std::time::{Duration, Instant, SystemTime};
use support::network::Place;
use support::sentinels::Sentinels;
use support::{
    DAY, Options, PATIENCE, Server, free_port, optional_number, text, wait_for, while_reading,
};

/// In every URL and variable that must never be repeated.
const SECRET: &str = "s3cr3t-of-redis";

/// A duration that a busy machine keeps to where something is to be prompt.
const PROMPT: Duration = Duration::from_millis(1500);

fn unix_ms() -> i64 {
    let elapsed = SystemTime::UNIX_EPOCH.elapsed().unwrap();
    elapsed.as_millis().try_into().unwrap()
}

#[track_caller]
fn check_ok(answer: &Answer) {
    assert_eq!((answer.status(), answer.code()), (200, None), "{answer:?}");
}

#[track_caller]
fn check_redis_is_away(answer: &Answer) {
    assert_eq!(
        (answer.status(), answer.code()),
        (503, Some("REDIS")),
        "{answer:?}"
    );
    let retry = answer.header("retry-after").expect("Retry-After");
    assert!(retry.parse::<u64>().unwrap() >= 1);
}

/// What the closure answers, which must not take long.
#[track_caller]
fn promptly<T>(work: impl FnOnce() -> T) -> T {
    let begun = Instant::now();
    let result = work();
    let took = begun.elapsed();
    assert!(took < PROMPT, "it took {took:?}");
    result
}

// Configuration

/// The flags that take a duration, and whether it may be none at all.
const DURATIONS: [(&str, bool); 12] = [
    ("--redis-timeout", false),
    ("--connect-timeout", false),
    ("--response-timeout", false),
    ("--stream-timeout", false),
    ("--header-timeout", false),
    ("--keepalive-timeout", false),
    ("--body-timeout", false),
    ("--send-timeout", false),
    ("--cooldown", false),
    ("--drain-timeout", true),
    ("--grace", true),
    ("--lease-cache", true),
];

fn variable(flag: &str) -> String {
    let name = flag.trim_start_matches("--").replace('-', "_");
    format!("MPOOL_{}", name.to_uppercase())
}

/// Mistakes by the flag that the message must name; the value may be a file that
/// is made for the test.
fn mistakes(files: &Authority) -> Vec<(&'static str, Vec<String>)> {
    let ca = files.file();
    let (one, two) = (files.issue("127.0.0.1"), files.issue("localhost"));
    let mut rows: Vec<(&str, Vec<String>)> = Vec::new();
    let mut row = |names: &'static str, arguments: &[&str]| {
        let arguments = arguments.iter().map(ToString::to_string).collect();
        rows.push((names, arguments));
    };
    // What begins with a dash can't stand alone.
    let joined = |flag: &str, value: &str| format!("{flag}={value}");
    let single = [
        ("--upstream", "api.example.com"),
        ("--upstream", "api.example.com:443"),
        ("--upstream", "/v1"),
        ("--upstream", "ftp://api.example.com"),
        ("--upstream", "http://"),
        ("--upstream", "http://user:s3cr3t-of-redis@api.example.com"),
        ("--upstream", "http://api.example.com/?key=s3cr3t-of-redis"),
        ("--upstream", "http://api.example.com/#s3cr3t-of-redis"),
        ("--upstream", "http://:s3cr3t-of-redis@api example.com"),
        ("--upstream", "http://api.example.com:99999"),
        ("--upstream", "http://api.example.com:0"),
        ("--upstream", "http://api.example.com:"),
        ("--redis", "127.0.0.1:6379"),
        ("--redis", "http://:s3cr3t-of-redis@127.0.0.1"),
        ("--redis", "redis://:s3cr3t-of-redis@127.0.0.1:port"),
        ("--redis", "redis://:s3cr3t-of-redis@127.0.0.1:99999"),
        ("--redis", "redis://user:s3cr3t-of-redis@127.0.0.1/3"),
        ("--redis", "redis://user:s3cr3t-of-redis@127.0.0.1/name"),
        ("--redis", "redis://:s3cr3t-of-redis@"),
        ("--redis", "redis://:s3cr3t-of-redis@[::1"),
        ("--redis", "redis+sentinel://user:s3cr3t-of-redis@127.0.0.1"),
        (
            "--redis",
            "redis+sentinel://user:s3cr3t-of-redis@127.0.0.1/",
        ),
        (
            "--redis",
            "redis+sentinel://user:s3cr3t-of-redis@127.0.0.1/a/b",
        ),
        (
            "--redis",
            "redis+sentinel://:s3cr3t-of-redis@127.0.0.1:x/name",
        ),
        ("--redis", "rediss+sentinel://:s3cr3t-of-redis@,/name"),
        ("MPOOL_REDIS_PASSWORD", "--redis-user=alone"),
        ("--redis-cacert", "/nowhere/ca.pem"),
        ("--upstream-cacert", "/nowhere/ca.pem"),
        ("--upstream-protocol", "http3"),
        ("--tls-key", "--tls-cert=/nowhere/cert.pem"),
        ("--tls-cert", "--tls-key=/nowhere/key.pem"),
        ("--redis-key", "--redis-cert=/nowhere/cert.pem"),
        ("--redis-cert", "--redis-key=/nowhere/key.pem"),
        ("--threads", "0"),
        ("--threads", "257"),
        ("--threads", "many"),
        ("--max-connections", "0"),
        ("--max-connections", "1000001"),
        ("--max-connections", "-1"),
        ("--max-header-bytes", "1KiB"),
        ("--max-header-bytes", "17MiB"),
        ("--max-header-bytes", "much"),
        ("--max-body", "-1"),
        ("--max-body", "1 parsec"),
        ("--replay-body", "2GiB"),
        ("--replay-memory", "2TiB"),
        ("--listen", "127.0.0.1"),
        ("--listen", "everywhere:80"),
        ("--listen", ""),
        ("--admin", "127.0.0.1:99999"),
        ("--admin", "on"),
        ("--admin", ""),
        ("--log", "yaml"),
        ("--log-level", "debug"),
        ("--no-such-flag", "1"),
    ];
    for (flag, value) in single {
        match value {
            value if value.starts_with("--") => row(flag, &[value]),
            value if value.starts_with('-') => row(flag, &[&joined(flag, value)]),
            value => row(flag, &[flag, value]),
        }
    }
    for (flag, may_be_zero) in DURATIONS {
        for value in ["", "soon", "-1s", "10", "8d", "0s"] {
            if value != "0s" || !may_be_zero {
                row(flag, &[&joined(flag, value)]);
            }
        }
    }
    row("--upstream-cacert", &["--upstream-cacert", &ca]);
    row(
        "--upstream-cacert",
        &["--upstream", "https://h", "--upstream-cacert", &one.key],
    );
    row(
        "--upstream-protocol",
        &["--upstream", "https://h", "--upstream-protocol", "http2"],
    );
    row("--redis-cacert", &["--redis-cacert", &ca]);
    row(
        "--redis-cacert",
        &["--redis", "rediss://127.0.0.1", "--redis-cacert", &one.key],
    );
    let client = ["--redis", "rediss://127.0.0.1", "--redis-cert"];
    row(
        "--redis-key",
        &[&client[..], &[&one.cert, "--redis-key", &ca]].concat(),
    );
    row(
        "--redis-cert",
        &[&client[..], &[&one.key, "--redis-key", &one.key]].concat(),
    );
    row(
        "--tls-key",
        &["--tls-cert", &one.cert, "--tls-key", &one.cert],
    );
    row(
        "--tls-cert",
        &["--tls-cert", &one.key, "--tls-key", &one.key],
    );
    row(
        "--tls-cert",
        &["--tls-cert", &one.cert, "--tls-key", &two.key],
    );
    row(
        "--tls-key",
        &["--tls-cert", &one.cert, "--tls-key", "/nowhere"],
    );
    row("--cooldown", &["--cooldown", "999us"]);
    let (one, all, other) = ("127.0.0.1:18080", "0.0.0.0:18080", "127.0.0.1:18081");
    for (listen, admin) in [(one, one), (all, one), (one, all)] {
        row("--admin", &["--listen", listen, "--admin", admin]);
    }
    for (listen, admin, upstream) in [
        (one, other, "http://127.0.0.1:18080"),
        (one, other, "http://localhost:18080/v1"),
        (all, other, "http://127.0.0.1:18080"),
        (one, other, "http://127.0.0.1:18081"),
    ] {
        let arguments = ["--listen", listen, "--admin", admin, "--upstream", upstream];
        row("--upstream", &arguments);
    }
    rows
}

#[test]
fn a_mistake_ends_it_before_anything_is_bound() {
    let files = Authority::new();
    // Bound already: were it to bind first, it would end with that error.
    let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let basis = [
        "--upstream",
        "http://127.0.0.1:9",
        "--listen",
        &taken,
        "--admin",
        "off",
    ];
    let check = |setup: Setup, names: &str, what: &str| {
        let (code, out, err) = setup.run();
        assert_eq!(code, 2, "{what}: {err}");
        assert!(err.contains(names), "{what}: {err}");
        assert_eq!(out, "", "{what}");
        assert!(!err.contains(SECRET), "{what}: {err}");
        assert!(!err.contains("panicked"), "{what}: {err}");
    };
    for (names, arguments) in mistakes(&files) {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let what = format!("{arguments:?}");
        check(Setup::bare(&basis).args(&arguments), names, &what);
        // The same by the environment.
        let pair = match arguments[..] {
            [joined] => joined.split_once('='),
            [flag, value] => Some((flag, value)),
            _ => None,
        };
        if let Some((flag, value)) = pair
            && flag == names
            && flag != "--no-such-flag"
            && !value.is_empty()
        {
            let without = basis.chunks(2).filter(|pair| pair[0] != flag);
            let without: Vec<&str> = without.flatten().copied().collect();
            let setup = Setup::bare(&without).env(&variable(flag), value);
            check(setup, names, &format!("{}={value}", variable(flag)));
        }
    }
    check(Setup::bare(&basis[2..]), "--upstream", "no upstream");
    let password = Setup::bare(&basis).env("MPOOL_REDIS", "redis://:s3cr3t-of-redis@h:x");
    check(password, "--redis", "a password in the environment");
}

#[test]
fn a_secret_in_the_wrong_place_is_not_repeated() {
    let url = format!("redis://:{SECRET}@127.0.0.1");
    let table: [&[&str]; 9] = [
        &["--upstream", "http://h", &url],
        &["--upstream", "http://h", "--admin", &url],
        &["--upstream", "http://h", "--threads", &url],
        &["--upstream", "http://h", "--max-connections", &url],
        &["--upstream", "http://h", "--max-body", &url],
        &["--upstream", "http://h", "--log", &url],
        &["--upstream", "http://h", "--listen", &url],
        &["--upstream", &url],
        &["--upstream", "http://h", "--redis-timeout", &url],
    ];
    for arguments in table {
        let (code, out, err) = Setup::bare(arguments).run();
        assert_eq!((code, out.as_str()), (2, ""), "{arguments:?}");
        assert!(!err.contains(SECRET), "{err}");
    }
    let setup = Setup::bare(&["--help"])
        .env("MPOOL_REDIS", &url)
        .env("MPOOL_REDIS_PASSWORD", SECRET)
        .env("MPOOL_UPSTREAM", &format!("http://user:{SECRET}@h"));
    let (code, out, _) = setup.run();
    assert_eq!(code, 0);
    assert!(!out.contains(SECRET), "{out}");
}

#[test]
fn an_address_that_is_taken_is_named() {
    let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for (flag, other) in [("--listen", "--admin"), ("--admin", "--listen")] {
        let arguments = [
            "--upstream",
            "http://127.0.0.1:9",
            flag,
            &address,
            other,
            "127.0.0.1:0",
        ];
        let (code, out, err) = Setup::bare(&arguments).run();
        assert!(
            code != 0 && err.contains(flag) && err.contains(&address),
            "{code} {err}"
        );
        assert!(!out.contains("listening on"), "{out}");
    }
}

#[test]
fn help_and_version_say_what_there_is() {
    let (code, out, err) = Setup::bare(&["--version"]).run();
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(
        out,
        format!("mpool-forwarder {}", env!("CARGO_PKG_VERSION"))
    );
    let (code, out, err) = Setup::bare(&["--help"]).run();
    assert_eq!((code, err.as_str()), (0, ""));
    let flags: Vec<&str> = out
        .split_whitespace()
        .filter(|word| word.starts_with("--") && word.len() > 3)
        .filter(|flag| !["--help", "--version"].contains(flag))
        .map(|flag| flag.trim_end_matches([',', ';', '.']))
        .collect();
    assert!(flags.len() > 30, "{flags:?}");
    for flag in flags {
        let variable = format!("[env: {}", variable(flag));
        let named = ["=", "]"].map(|end| out.contains(&format!("{variable}{end}")));
        assert!(named.contains(&true), "{variable} is missing");
    }
    for (flag, _) in DURATIONS {
        assert!(out.contains(flag), "{flag}");
    }
}

#[test]
fn the_environment_does_what_flags_do_and_flags_win() {
    let server = Options::default().accounts(&["one"]).start();
    let key = server.connect().pool_key();
    let upstream = Upstream::ok();
    let forwarder = Setup::bare(&[])
        .env("MPOOL_LISTEN", "127.0.0.1:0")
        .env("MPOOL_ADMIN", "127.0.0.1:0")
        .env("MPOOL_THREADS", "1")
        .env("MPOOL_REDIS", &server.url())
        .env("MPOOL_UPSTREAM", &upstream.url())
        .env("MPOOL_LOG", "json")
        .env("MPOOL_MAX_BODY", "10B")
        .start();
    check_ok(&forwarder.client().get("/", &key));
    let long = forwarder
        .client()
        .round("POST", "/", &key, &[], &[b'x'; 11]);
    assert_eq!(long.code(), Some("BODY_TOO_LARGE"));
    assert!(forwarder.log().iter().all(|line| line.starts_with('{')));
    drop(forwarder);

    let forwarder = Forwarder::between(&server, &upstream)
        .args(&["--max-body", "1KiB", "--log", "text"])
        .env("MPOOL_UPSTREAM", "http://127.0.0.1:1")
        .env("MPOOL_REDIS", "redis://127.0.0.1:1")
        .env("MPOOL_MAX_BODY", "10B")
        .env("MPOOL_LOG", "json")
        .start();
    check_ok(
        &forwarder
            .client()
            .round("POST", "/", &key, &[], &[b'x'; 11]),
    );
    assert!(forwarder.log().iter().all(|line| line.starts_with('[')));
}

// The log

/// What comes after a line's time, which must be ISO time in UTC with ms.
#[track_caller]
fn untimed(line: &str) -> &str {
    let pattern = "[dddd-dd-ddTdd:dd:dd.dddZ] ";
    assert!(
        line.is_char_boundary(pattern.len()) && line.len() > pattern.len(),
        "{line}"
    );
    let (time, rest) = line.split_at(pattern.len());
    let fits = time
        .chars()
        .zip(pattern.chars())
        .all(|(is, wanted)| match wanted {
            'd' => is.is_ascii_digit(),
            _ => is == wanted,
        });
    assert!(fits, "{line}");
    rest
}

/// A request's line with N for the two times, which must be in order.
#[track_caller]
fn without_times(line: &str) -> String {
    let number = |name: &str| -> u64 {
        let (_, rest) = line
            .split_once(name)
            .unwrap_or_else(|| panic!("no {name}: {line}"));
        let (number, _) = rest.split_once("ms").unwrap();
        number.parse().unwrap()
    };
    let (first, total) = (number(" ttfb="), number(" total="));
    assert!(first <= total, "{line}");
    line.replacen(
        &format!(" ttfb={first}ms total={total}ms"),
        " ttfb=N total=N",
        1,
    )
}

fn masked(key: &str) -> String {
    let body = key.strip_prefix("sk-cli-v1-").unwrap();
    format!("sk-cli-v1-{}...{}", &body[..4], &body[body.len() - 4..])
}

/// The lines that a request leaves, its own last.
#[track_caller]
fn lines_of(forwarder: &Forwarder, work: impl FnOnce()) -> Vec<String> {
    let before = forwarder.log().len();
    work();
    let lines = wait_for("the request's line", || {
        let lines = forwarder.log().split_off(before);
        let last = lines.last().is_some_and(|line| line.contains(" ttfb="));
        last.then_some(lines)
    });
    let mut lines: Vec<String> = lines.iter().map(|line| untimed(line).to_owned()).collect();
    let last = lines.pop().unwrap();
    lines.push(without_times(&last));
    lines
}

#[test]
fn the_lines_of_the_guide() {
    let server = Options::default().accounts(&["one", "two"]).start();
    let mut redis = server.connect();
    let stage = Stage::on(server, Upstream::ok(), &[]);
    let (key, lease) = (&stage.key, format!("key_rotation:{}", stage.key));
    let lines = || {
        lines_of(&stage.forwarder, || {
            check_ok(&stage.client().round(
                "POST",
                "/v1/messages?beta=1",
                key,
                &[],
                b"12 bytes long",
            ));
        })
    };
    let own = |account: &str, state: &str| {
        format!(
            "POST /v1/messages 200 in=13 out=2 ttfb=N total=N account={account} state={state} key={}",
            masked(key)
        )
    };
    let token =
        |account: &str| format!("✅ Successfully obtained token from pool account: {account}");
    let rotated = |account: &str, hours: u32| {
        format!("🔄 Pool: Rotated to account: {account} (will rotate in {hours} hours)")
    };
    let previous = |account: &str| format!("📝 Previous account was: {account}");
    let current = |account: &str, hours: u32| {
        format!("📌 Pool: Using current account: {account} ({hours} hours until rotation)")
    };
    let holds = |redis: &mut support::Client| redis.holds(key).unwrap();

    wait_for_redis(&stage.forwarder);
    stage.forwarder.wait_for_lines("connected to Redis", 1);
    let first = lines();
    let one = holds(&mut redis);
    assert_eq!(
        first,
        [rotated(&one, 24), token(&one), own(&one, "assigned")]
    );
    assert_eq!(
        lines(),
        [current(&one, 23), token(&one), own(&one, "current")]
    );
    // Whole hours, whatever is left.
    let hour = DAY / 24;
    for (left, hours) in [
        (hour * 5 + hour / 2, 5),
        (hour + hour / 2, 1),
        (hour / 2, 0),
    ] {
        let next = unix_ms() + left;
        redis.ok(&[
            "HSET",
            &lease,
            "next_rotation",
            &next.to_string(),
            "last_rotation",
            &(next - DAY).to_string(),
        ]);
        assert_eq!(
            lines(),
            [current(&one, hours), token(&one), own(&one, "current")]
        );
    }
    // It falls due.
    let next = unix_ms() - 1;
    redis.ok(&[
        "HSET",
        &lease,
        "next_rotation",
        &next.to_string(),
        "last_rotation",
        &(next - DAY).to_string(),
    ]);
    let due = lines();
    let two = holds(&mut redis);
    assert_ne!(one, two);
    assert_eq!(
        due,
        [
            rotated(&two, 24),
            previous(&one),
            token(&two),
            own(&two, "rotated")
        ]
    );
    // The account goes.
    stage.server.remove_account(&format!("medium/{two}"));
    redis.ok(&["MPOOL.RELOAD"]);
    assert_eq!(
        lines(),
        [
            rotated(&one, 24),
            previous(&two),
            token(&one),
            own(&one, "failover")
        ]
    );
    // Another span.
    redis.ok(&[
        "CONFIG",
        "SET",
        "mpool.rotation-ms",
        &(3 * hour).to_string(),
    ]);
    redis.ok(&["MPOOL.RELEASE", key]);
    assert_eq!(lines()[0], rotated(&one, 3));
    assert_eq!(lines()[0], current(&one, 2));
}

#[test]
fn every_request_has_a_line() {
    let upstream = Upstream::start(|mut exchange| match exchange.target.as_str() {
        "/breaks" => {
            exchange.stream();
            exchange.chunk("half");
            exchange.close();
        }
        "/streams" => {
            exchange.stream();
            exchange.chunk("12345");
            exchange.wait_for_close(PATIENCE);
        }
        "/hangs" => exchange.hang(),
        "/busy" => exchange.respond(529, &[], b"overloaded"),
        "/nothing" => exchange.answer("HTTP/1.1 204 No Content\r\n\r\n"),
        _ => exchange.ok(),
    });
    let stage = Stage::with(upstream, &[]);
    let mut redis = stage.server.connect();
    let bound = redis.bound_key("medium/one");
    let made = "hand-made-key-of-23-chars";
    redis.ok(&[
        "HSET",
        &format!("client_keys:{made}"),
        "tier",
        "medium",
        "use_pool",
        "true",
        "active",
        "true",
        "created_at",
        "0",
        "expires_at",
        "99999999999999",
    ]);
    wait_for_redis(&stage.forwarder);
    check_ok(&stage.get("/first"));
    stage.forwarder.wait_for_lines("GET /first 200 ", 1);
    let key = &stage.key;
    let unknown = format!("sk-cli-v1-{}", "0123456789abcdef".repeat(4));
    let last = |work: &dyn Fn()| lines_of(&stage.forwarder, work).pop().unwrap();
    let ask = |method: &str, target: &str, key: &str, body: &[u8]| {
        last(&|| drop(stage.client().round(method, target, key, &[], body)))
    };
    let mine = format!("account=one state=current key={}", masked(key));
    assert_eq!(
        ask("GET", "/a//b/%2e?q=secret", key, b""),
        format!("GET /a//b/%2e 200 in=0 out=2 ttfb=N total=N {mine}")
    );
    assert_eq!(
        ask("PATCH", "/nothing", key, b"abc"),
        format!("PATCH /nothing 204 in=3 out=0 ttfb=N total=N {mine}")
    );
    assert_eq!(
        ask("POST", "/busy", key, b"abc"),
        format!("POST /busy 529 in=3 out=10 ttfb=N total=N {mine}")
    );
    assert_eq!(
        ask("GET", "/", &bound, b""),
        format!(
            "GET / 200 in=0 out=2 ttfb=N total=N account=one state=bound key={}",
            masked(&bound)
        )
    );
    assert_eq!(
        ask("GET", "/", made, b""),
        "GET / 200 in=0 out=2 ttfb=N total=N account=one state=assigned key=hand...hars"
    );
    // Those of its own.
    let refused = |method: &str, key: &str, shown: &str, code: &str| {
        let line = ask(method, "/", key, b"");
        let (head, tail) = line.split_once(" out=").unwrap();
        assert_eq!(head, format!("{method} / 401 in=0"));
        let (_, tail) = tail.split_once(' ').unwrap();
        assert_eq!(
            tail,
            format!("ttfb=N total=N account=- state=- key={shown} error={code}")
        );
    };
    refused("GET", "", "-", "NOKEYGIVEN");
    refused("POST", &unknown, "sk-cli-v1-0123...cdef", "NOKEY");
    refused("GET", "short", "...", "NOKEY");
    // In chunks, and over HTTP/2.
    let line = last(&|| {
        let mut client = stage.client();
        client.send(request(
            "PUT",
            "/",
            key,
            &[("Transfer-Encoding", "chunked")],
            b"",
        ));
        client.send([chunked("12345"), chunked("67"), chunked("")].concat());
        check_ok(&client.answer());
    });
    assert_eq!(line, format!("PUT / 200 in=7 out=2 ttfb=N total=N {mine}"));
    let line = last(&|| {
        assert_eq!(
            stage
                .forwarder
                .http2()
                .ask("POST", "/h2", key, &[], b"123")
                .body(),
            b"ok"
        );
    });
    assert_eq!(
        line,
        format!("POST /h2 200 in=3 out=2 ttfb=N total=N {mine}")
    );
    // How it ended.
    let line = last(&|| {
        let mut client = stage.client();
        client.ask("GET", "/breaks", key, &[], b"");
        assert!(client.try_answer().is_err());
    });
    assert_eq!(
        line,
        format!("GET /breaks 200 in=0 out=4 ttfb=N total=N {mine} end=upstream-broke")
    );
    let line = last(&|| {
        let mut client = stage.client();
        client.ask("GET", "/streams", key, &[], b"");
        client.head();
        assert_eq!(client.piece().unwrap(), b"12345");
    });
    assert_eq!(
        line,
        format!("GET /streams 200 in=0 out=5 ttfb=N total=N {mine} end=client-gone")
    );
    let line = last(&|| {
        let before = stage.upstream.count();
        let mut client = stage.client();
        client.ask("GET", "/hangs", key, &[], b"");
        stage.upstream.wait_for_requests(before + 1);
    });
    assert_eq!(
        line,
        format!("GET /hangs 499 in=0 out=0 ttfb=N total=N {mine} end=client-gone")
    );
}

#[test]
fn an_answer_that_came_whole_is_not_said_to_have_broken_off() {
    // The last piece says that it is the last one, and no length told before.
    let frames = upstream_of_frames(|stream, _| {
        let begin = frame(1, 4, stream, &[0x88]);
        let (first, last) = (frame(0, 0, stream, b"o"), frame(0, 1, stream, b"k"));
        [begin, first, last].concat()
    });
    let frames = Stage::with(frames, &["--upstream-protocol", "http2"]);
    let trailers = Upstream::start(|mut exchange| {
        exchange.send("HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n");
        exchange.chunk("ok");
        exchange.end_with_trailers(&["X-Sum: 1"]);
    });
    let trailers = Stage::with(trailers, &["--threads", "1"]);
    for (forwarder, key, what) in [
        (&frames.forwarder, &frames.key, "frames"),
        (&trailers.forwarder, &trailers.key, "trailers"),
    ] {
        let line = |target: &str, work: &dyn Fn()| {
            work();
            let lines = forwarder.wait_for_lines(&format!("GET {target} "), 1);
            assert!(lines[0].contains(" 200 in=0 out=2 "), "{what}: {lines:?}");
            assert!(!lines[0].contains("end="), "{what}: {lines:?}");
        };
        for takes in ["trailers", "gzip"] {
            let headers = [("te", takes)];
            line(&format!("/one/{takes}"), &|| {
                let mut client = forwarder.client();
                let target = format!("/one/{takes}");
                let answer = client.round("GET", &target, key, &headers, b"");
                assert_eq!(answer.text(), "ok", "{what}");
            });
        }
        line("/two", &|| {
            let body = forwarder.http2().get("/two", key).body();
            assert_eq!(body, b"ok", "{what}");
        });
        let broken = forwarder.metric("mpool_requests_broken_total{end=\"client-gone\"}");
        assert_eq!(broken, None, "{what}");
    }
    assert_eq!(trailers.upstream.connections(), 1, "it is used again");
}

#[test]
fn json_lines_say_the_same_in_fields() {
    let server = Options::default().accounts(&["one", "two"]).start();
    let stage = Stage::on(server, Upstream::ok(), &["--log", "json"]);
    // The bytes of an umlaut in UTF-8.
    let long = format!("/{}", "x\u{c3}\u{bc}%22".repeat(100));
    for target in ["/v1/messages?q=1", "/v1/messages", &long] {
        drop(
            stage
                .client()
                .round("POST", target, &stage.key, &[], b"12345"),
        );
    }
    stage.client().get("/", "unknown-key-of-some-length");
    stage.forwarder.wait_for_lines("NOKEY", 1);
    let lines = stage.forwarder.log();
    let parse = |line: &String| -> serde_json::Value {
        let json: serde_json::Value =
            serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"));
        let time = json["timestamp"].as_str().unwrap();
        untimed(&format!("[{time}] x"));
        assert!(
            ["INFO", "WARN", "ERROR"].contains(&json["level"].as_str().unwrap()),
            "{line}"
        );
        assert!(
            json["message"].is_string() && json["event"].is_string(),
            "{line}"
        );
        json
    };
    let lines: Vec<_> = lines.iter().map(parse).collect();
    let of = |event: &str| -> Vec<&serde_json::Value> {
        lines.iter().filter(|line| line["event"] == event).collect()
    };
    let requests = of("request");
    assert_eq!(requests.len(), 4);
    let (first, second) = (requests[0], requests[1]);
    let account = stage.server.connect().holds(&stage.key).unwrap();
    for (line, state) in [(first, "assigned"), (second, "current")] {
        let expected = serde_json::json!({
            "method": "POST", "path": "/v1/messages", "status": 200, "bytes_in": 5, "bytes_out": 2,
            "account": account, "state": state, "key": masked(&stage.key), "end": "whole",
        });
        for (name, value) in expected.as_object().unwrap() {
            assert_eq!(&line[name], value, "{name} of {line}");
        }
        assert!(line["ttfb_ms"].as_u64().unwrap() <= line["total_ms"].as_u64().unwrap());
        assert!(
            line.get("error").is_none_or(serde_json::Value::is_null),
            "{line}"
        );
    }
    assert_eq!(requests[3]["error"], "NOKEY");
    assert_eq!(requests[3]["status"], 401);
    let rotated = of("rotated");
    assert_eq!(
        (&rotated[0]["account"], &rotated[0]["hours"]),
        (&account.as_str().into(), &24.into())
    );
    let current = of("current");
    assert_eq!(
        (&current[0]["account"], &current[0]["hours"]),
        (&account.as_str().into(), &23.into())
    );
    assert!(!of("token").is_empty() && of("listening").len() == 2);
}

#[test]
fn less_is_logged_when_less_is_wanted() {
    let stage = Stage::with(Upstream::ok(), &["--log-level", "info"]);
    check_ok(&stage.get("/"));
    stage.forwarder.wait_for_lines("GET / 200", 1);
    for level in ["warn", "error"] {
        let port = free_port();
        let mut forwarder = Forwarder::between(&stage.server, &stage.upstream)
            .args(&[
                "--log-level",
                level,
                "--listen",
                &format!("127.0.0.1:{port}"),
            ])
            .spawn();
        wait_for("the forwarder", || {
            TcpStream::connect(("127.0.0.1", port)).ok()
        });
        for _ in 0..3 {
            check_ok(&Client::connect(port).get("/", &stage.key));
        }
        assert_eq!(forwarder.terminate(), 0);
        let log = forwarder.log();
        assert!(
            !log.iter()
                .any(|line| line.contains("GET /") || line.contains("Pool:")),
            "{log:?}"
        );
    }
}

/// Nothing of that may be in what the forwarder has shown.
#[track_caller]
fn check_hidden(shown: &str, secrets: &[String]) {
    for secret in secrets {
        let found = shown.lines().find(|line| line.contains(secret));
        assert_eq!(found, None, "{secret} is shown");
    }
}

#[test]
fn no_token_and_no_whole_key_is_ever_shown() {
    for format in ["text", "json"] {
        println!("{format}");
        let mut server = Options::default()
            .server(&["--appendonly", "yes", "--appendfsync", "always"])
            .accounts(&["one", "two", "three"])
            .file("medium/four", r#"{"api_key": "token-of-four"}"#)
            .start();
        let mut redis = server.connect();
        redis.ok(&["CONFIG", "SET", "requirepass", SECRET]);
        let (key, revoked) = (redis.pool_key(), redis.pool_key());
        redis.ok(&["MPOOL.REVOKE", &revoked]);
        let upstream = Upstream::start(|exchange| match exchange.target.as_str() {
            "/bad" => exchange.respond(401, &[("X-Echo", "no")], b"refused"),
            "/closes" => exchange.close(),
            _ => exchange.ok(),
        });
        let url = format!("redis://:{SECRET}@127.0.0.1:{}/", server.port);
        let mut forwarder = Forwarder::between(url.as_str(), &upstream)
            .args(&["--log", format, "--grace", "200ms", "--cooldown", "100ms"])
            .start();
        let ask = |method: &str, target: &str, headers: &[(&str, &str)], key: &str| {
            let mut client = forwarder.client();
            client.ask(method, target, key, headers, b"");
            let _ = client.try_answer();
        };
        let hex = key.strip_prefix("sk-cli-v1-").unwrap().to_owned();
        let other = format!("/v1/{revoked}/x?key={revoked}");
        let own = format!("/v1/{key}/x?key={key}");
        let escaped = own.replace('-', "%2D");
        let bare = format!("/{hex}/");
        for target in ["/", "/bad", "/closes", &other, &own, &escaped, &bare] {
            ask("POST", target, &[("Cookie", &key), ("X-Mine", &key)], &key);
            ask("GET", target, &[], &revoked);
            ask("GET", target, &[("x-api-key", &revoked)], &key);
            ask("GET", target, &[], "");
        }
        // A key where the method should be, and where nothing is right.
        ask(&key, "/", &[], &key);
        ask(&hex, "/", &[], "");
        for garbage in [
            format!("{key}\r\n\r\n"),
            format!("GET {key} HTTP/1.1\r\n\r\n"),
            format!("GET / HTTP/1.1\r\nAuthorization: {key}\r\n\r\n"),
            format!(
                "GET / HTTP/1.1\r\nAuthorization: Bearer {key}\r\nHost: {key}\r\n{key}\r\n\r\n"
            ),
            format!("GET / HTTP/9.9\r\nAuthorization: Bearer {key}\r\n\r\n"),
            format!(
                "GET http://{key}@front/{key} HTTP/1.1\r\nHost: {key}\r\nx-api-key: {key}\r\n\r\n"
            ),
            format!("GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\u{1}\r\n\r\n"),
            format!("GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key} {key}\r\n\r\n"),
        ] {
            let mut client = forwarder.client();
            client.patience(Duration::from_millis(300));
            client.send(garbage);
            let _ = client.try_answer();
        }
        let mut answer = forwarder.http2().ask(&hex, &own, &key, &[], b"");
        answer.body();
        server.kill();
        for _ in 0..3 {
            ask("GET", "/", &[], &key);
            std::thread::sleep(Duration::from_millis(150));
        }
        server.launch();
        let pages: String = ["/metrics", "/readyz", "/healthz", "/", &own]
            .map(|page| forwarder.admin(page).text())
            .concat();
        assert_eq!(forwarder.terminate(), 0);
        let shown = [forwarder.log(), forwarder.errors(), vec![pages]]
            .concat()
            .join("\n");
        // It was a busy run indeed, and it is the right place to look.
        for part in [
            &masked(&key),
            &masked(&revoked),
            "failover",
            "UPSTREAM",
            "REDIS",
            "mpool_requests_total",
        ] {
            assert!(shown.contains(part), "{part} is missing");
        }
        assert!(!shown.contains("panicked"), "{shown}");
        let revoked = revoked.strip_prefix("sk-cli-v1-").unwrap().to_owned();
        check_hidden(&shown, &["token-of-".into(), SECRET.into(), hex, revoked]);
    }
}

#[test]
fn no_client_can_forge_a_line() {
    for format in ["text", "json"] {
        let stage = Stage::with(Upstream::ok(), &["--log", format]);
        let forged = "[2025-08-14T14:00:00.000Z] forged";
        let targets = [
            "/%0a[2025-08-14T14:00:00.000Z]%20forged".to_owned(),
            format!("/\n{forged}"),
            format!("/\r{forged}"),
            "/\u{85}\u{9b}[2025-08-14T14:00:00.000Z]forged\u{1b}[31m".to_owned(),
            "/\u{e2}\u{80}\u{a8}forged".to_owned(),
        ];
        for target in &targets {
            for key in [&stage.key, &format!("{forged}\u{85}{forged}"), ""] {
                let mut client = stage.client();
                client.patience(Duration::from_millis(500));
                client.send(request("GET", target, key, &[], b""));
                let _ = client.try_answer();
            }
        }
        check_ok(&stage.get("/last"));
        stage.forwarder.wait_for_lines("/last", 1);
        for line in stage.forwarder.log() {
            assert!(!line.contains(forged), "{line}");
            let control = |c: char| c.is_control() || ['\u{2028}', '\u{2029}'].contains(&c);
            assert!(!line.contains(control), "{line:?}");
            match format {
                "text" => drop(untimed(&line).to_owned()),
                _ => drop(serde_json::from_str::<serde_json::Value>(&line).expect(&line)),
            }
        }
    }
}

/// A forwarder whose stdout is the test's to read or to leave.
struct Unread(Child, u16);

impl Unread {
    fn start(stage: &Stage<Upstream>, arguments: &[&str]) -> Self {
        let port = free_port();
        let mut command = Forwarder::between(&stage.server, &stage.upstream)
            .args(&["--listen", &format!("127.0.0.1:{port}")])
            .args(arguments)
            .command();
        let child = Self(command.stderr(Stdio::inherit()).spawn().unwrap(), port);
        wait_for("the forwarder", || {
            TcpStream::connect(("127.0.0.1", port)).ok()
        });
        child
    }

    fn terminate(&mut self) -> Option<i32> {
        let pid = self.0.id().to_string();
        let kill = Command::new("bash")
            .args(["-c", "kill \"$0\"", &pid])
            .status();
        assert!(kill.unwrap().success());
        wait_for("its end", || self.0.try_wait().unwrap()).code()
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn nobody_who_reads_the_log_is_no_reason_to_stop() {
    let stage = Stage::new(Upstream::ok());
    // More than a pipe and the backlog behind it hold.
    let path = "/x".repeat(250);
    let serve = |forwarder: &Unread, requests: usize| {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let mut client = Client::connect(forwarder.1);
                    for _ in 0..requests / 4 {
                        check_ok(&client.get(&path, &stage.key));
                    }
                });
            }
        });
    };
    // Stuck.
    let mut stuck = Unread::start(&stage, &["--log", "json"]);
    serve(&stuck, 3000);
    // And read after all: what is there is whole, and what is not is counted.
    let mut lines = BufReader::new(stuck.0.stdout.take().unwrap()).lines();
    let mut requests = 0;
    let left_out = loop {
        let line = lines.next().unwrap().unwrap();
        if line.contains("left out") {
            break line;
        }
        let json: serde_json::Value = serde_json::from_str(&line).expect(&line);
        requests += usize::from(json["event"] == "request");
        assert!(requests < 3000, "all of it was kept");
    };
    assert!((100..3000).contains(&requests), "{requests}");
    let json: Result<serde_json::Value, _> = serde_json::from_str(&left_out);
    assert!(json.is_ok(), "{left_out}");
    assert_eq!(stuck.terminate(), Some(0));
    // Stuck to the end.
    let mut stuck = Unread::start(&stage, &[]);
    serve(&stuck, 600);
    assert_eq!(stuck.terminate(), Some(0));
    // Gone.
    let mut gone = Unread::start(&stage, &[]);
    serve(&gone, 8);
    drop(gone.0.stdout.take());
    serve(&gone, 100);
    assert_eq!(gone.terminate(), Some(0));
}

// The admin listener

#[test]
fn the_admin_listener_says_how_it_is() {
    let stage = Stage::new(Upstream::ok());
    let page = |path: &str| {
        let answer = stage.forwarder.admin(path);
        (answer.status(), answer.text())
    };
    let is = |status: u16, text: &str| (status, text.to_owned());
    assert_eq!(page("/healthz"), is(200, "ok\n"));
    wait_for("it to be ready", || {
        (page("/readyz") == is(200, "ready\n")).then_some(())
    });
    assert_eq!(page("/nothing").0, 404);
    let mut client = Client::connect(stage.forwarder.admin);
    client.send("POST /healthz HTTP/1.1\r\nHost: admin\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(client.answer().status(), 405);
    client.ask("HEAD", "/readyz", "", &[], b"");
    assert_eq!(client.answer().status(), 200, "on the same connection");
    // Not on the clients' side.
    let answer = stage.client().get("/metrics", "");
    assert_eq!(answer.code(), Some("NOKEYGIVEN"));
    // Accounts.
    let mut redis = stage.server.connect();
    let now = unix_ms().to_string();
    redis.ok(&["MPOOL.COOLDOWN", "medium", "one", &now, "60000"]);
    let (status, why) = page("/readyz");
    assert!(status == 503 && why.contains("account"), "{why}");
    assert_eq!(page("/healthz").0, 200, "that is no reason to be restarted");
    redis.ok(&["MPOOL.COOLDOWN", "medium", "one", &now, "0"]);
    assert_eq!(page("/readyz").0, 200);
    // Files that can't be used take nothing from those that can.
    for (name, content) in [
        ("bad", "no json"),
        ("ended", r#"{"access_token": "x", "expires_at": 1000}"#),
    ] {
        stage
            .server
            .write_account(&format!("medium/{name}"), content);
    }
    redis.ok(&["MPOOL.RELOAD"]);
    assert_eq!(page("/readyz"), is(200, "ready\n"));
    stage.server.remove_account("medium/one");
    redis.ok(&["MPOOL.RELOAD"]);
    let (status, why) = page("/readyz");
    assert!(status == 503 && why.contains("account"), "{why}");
    // An account of another tier is one.
    stage
        .server
        .write_account("high/top", &support::bearer("top"));
    redis.ok(&["MPOOL.RELOAD"]);
    assert_eq!(page("/readyz").0, 200);
    // The module.
    redis.unload();
    // That closes the forwarder's connections.
    wait_for("it to miss the module", || {
        let (status, why) = page("/readyz");
        assert_eq!(status, 503, "{why}");
        why.contains("module").then_some(())
    });
    check_redis_is_away(&stage.client().get("/", "some-key-that-was-never-seen"));
    assert_eq!(page("/healthz").0, 200);
}

#[test]
fn admin_clients_that_stay_keep_nobody_out_for_long() {
    let stage = Stage::new(Upstream::ok());
    let connect = || TcpStream::connect(("127.0.0.1", stage.forwarder.admin)).unwrap();
    let ask = |mut stream: &TcpStream| {
        // It may have been closed.
        let _ = stream.write(b"GET /healthz HTTP/1.1\r\nHost: admin\r\n\r\n");
    };
    let staying: Vec<TcpStream> = (0..64).map(|_| connect()).collect();
    staying.iter().for_each(ask);
    let late = connect();
    ask(&late);
    late.set_nonblocking(true).unwrap();
    wait_for("an answer for one more", || {
        staying.iter().for_each(ask);
        std::thread::sleep(Duration::from_millis(200));
        (late.peek(&mut [0]).ok() == Some(1)).then_some(())
    });
}

#[test]
fn readiness_follows_redis() {
    let mut server = Options::default().accounts(&["one"]).start();
    let upstream = Upstream::ok();
    let forwarder = Forwarder::between(&server, &upstream)
        .args(&["--redis-timeout", "300ms"])
        .start();
    let ready = |status: u16| {
        wait_for("readiness", || {
            let answer = promptly(|| forwarder.admin("/readyz"));
            (answer.status() == status).then(|| answer.text())
        })
    };
    ready(200);
    server.kill();
    assert!(ready(503).contains("Redis"));
    assert_eq!(forwarder.admin("/healthz").status(), 200);
    server.launch();
    ready(200);
    signal(server.pid(), "STOP");
    assert!(ready(503).contains("Redis"));
    signal(server.pid(), "CONT");
    ready(200);
}

#[test]
fn there_need_not_be_an_admin_listener() {
    let server = Options::default().accounts(&["one"]).start();
    let stage = Stage::on(server, Upstream::ok(), &["--admin", "off"]);
    check_ok(&stage.get("/"));
    assert_eq!(stage.forwarder.admin, 0);
    assert!(
        !stage
            .forwarder
            .log()
            .iter()
            .any(|line| line.contains("admin on"))
    );
    // One for clients and nothing else.
    let listening =
        std::fs::read_to_string(format!("/proc/{}/net/tcp", stage.forwarder.pid())).unwrap();
    let inodes = sockets(stage.forwarder.pid());
    let listening = listening.lines().skip(1).filter(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words[3] == "0A" && inodes.contains(words[9])
    });
    assert_eq!(listening.count(), 1);
}

fn sockets(pid: u32) -> HashSet<String> {
    let folder = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let links = folder
        .flatten()
        .filter_map(|entry| std::fs::read_link(entry.path()).ok());
    let inode = |link: std::path::PathBuf| {
        let text = link.to_string_lossy().into_owned();
        Some(text.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())
    };
    links.filter_map(inode).collect()
}

/// A page of metrics by the letter of OpenMetrics 1.0: each sample with its
/// value.
#[track_caller]
fn open_metrics(page: &str) -> BTreeMap<String, f64> {
    let mut samples = BTreeMap::new();
    let mut families: Vec<(String, String)> = Vec::new();
    let mut described: HashSet<(String, String)> = HashSet::new();
    let body = page.strip_suffix("# EOF\n").expect("# EOF at the end");
    assert!(body.ends_with('\n') && !body.contains("# EOF"));
    let is_name = |name: &str| {
        let mut letters = name.chars();
        letters
            .next()
            .is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
            && letters.all(|c| c.is_ascii_alphanumeric() || c == '_')
    };
    for line in body.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            let mut words = comment.splitn(3, ' ');
            let (kind, name, text) = (words.next().unwrap(), words.next().unwrap(), words.next());
            let text = text.expect(line).to_owned();
            assert!(is_name(name), "{line}");
            assert!(
                described.insert((kind.into(), name.into())),
                "twice: {line}"
            );
            if families.last().is_none_or(|(last, _)| last != name) {
                assert!(
                    families.iter().all(|(known, _)| known != name),
                    "interleaved: {line}"
                );
                families.push((name.to_owned(), String::new()));
            }
            let family = families.last_mut().unwrap();
            match kind {
                "TYPE" => {
                    assert!(
                        ["counter", "gauge", "histogram"].contains(&&*text),
                        "{line}"
                    );
                    family.1 = text;
                }
                "HELP" => assert!(!text.is_empty(), "{line}"),
                "UNIT" => assert!(name.ends_with(&format!("_{text}")), "{line}"),
                _ => panic!("{line}"),
            }
            continue;
        }
        let (sample, value) = line.rsplit_once(' ').expect(line);
        let value: f64 = value.parse().expect(line);
        let (name, labels) = match sample.split_once('{') {
            Some((name, labels)) => (name, labels.strip_suffix('}').expect(line)),
            None => (sample, ""),
        };
        for label in labels
            .split_inclusive("\",")
            .filter(|label| !label.is_empty())
        {
            let (label, text) = label.trim_end_matches(',').split_once('=').expect(line);
            assert!(is_name(label), "{line}");
            let text = text
                .strip_prefix('"')
                .and_then(|text| text.strip_suffix('"'))
                .expect(line);
            assert!(!text.contains(['"', '\n', '\\']), "{line}");
        }
        let (family, kind) = families.last().expect(line);
        let suffix = name
            .strip_prefix(family.as_str())
            .unwrap_or_else(|| panic!("not of {family}: {line}"));
        let suffixes: &[&str] = match kind.as_str() {
            "counter" => &["_total"],
            "gauge" => &[""],
            _ => &["_bucket", "_sum", "_count"],
        };
        assert!(suffixes.contains(&suffix), "{line}");
        assert!(kind == "gauge" || value >= 0.0, "{line}");
        assert!(
            samples.insert(sample.to_owned(), value).is_none(),
            "twice: {line}"
        );
    }
    for (family, kind) in families {
        assert!(
            described.contains(&("TYPE".into(), family.clone())),
            "{family} has no TYPE"
        );
        assert!(
            described.contains(&("HELP".into(), family.clone())),
            "{family} has no HELP"
        );
        if kind == "histogram" {
            let bucket = format!("{family}_bucket{{le=\"");
            let mut buckets: Vec<(f64, f64)> = samples
                .iter()
                .filter_map(|(sample, value)| {
                    let bound = sample.strip_prefix(&bucket)?.strip_suffix("\"}")?;
                    Some((bound.parse().unwrap(), *value))
                })
                .collect();
            buckets.sort_by(|one, two| one.0.total_cmp(&two.0));
            assert!(
                buckets.len() > 2 && buckets.is_sorted_by(|one, two| one.1 <= two.1),
                "{buckets:?}"
            );
            let last = buckets.last().unwrap();
            assert_eq!(*last, (f64::INFINITY, samples[&format!("{family}_count")]));
        }
    }
    samples
}

#[test]
fn metrics_count_what_happened() {
    let upstream = Upstream::start(|mut exchange| match exchange.target.as_str() {
        "/busy" => exchange.respond(429, &[], b"later"),
        "/breaks" => {
            exchange.stream();
            exchange.close();
        }
        "/closes" => exchange.close(),
        "/streams" => {
            exchange.stream();
            exchange.wait_for_close(PATIENCE);
        }
        _ if exchange.token().as_deref() == Some("token-of-worn") => {
            exchange.respond(401, &[], b"no")
        }
        _ => exchange.ok(),
    });
    let server = Options::default().accounts(&["one", "worn"]).start();
    let arguments = ["--threads", "1", "--lease-cache", "1h"];
    let stage = Stage::on(server, upstream, &arguments);
    let before = stage.forwarder.admin("/metrics");
    assert_eq!(
        before.header("content-type"),
        Some("application/openmetrics-text; version=1.0.0; charset=utf-8")
    );
    open_metrics(&before.text());
    // The key has the account that is refused.
    let mut redis = stage.server.connect();
    let now = unix_ms();
    let mut cool = |ms: &str| redis.ok(&["MPOOL.COOLDOWN", "medium", "one", &now.to_string(), ms]);
    cool("600000");
    let lease = stage.server.connect().acquire(&stage.key, now);
    assert_eq!(lease.account, "worn");
    cool("0");
    let key = &stage.key;

    check_ok(&stage.get("/"));
    for target in ["/", "/", "/busy"] {
        stage.client().get(target, key);
    }
    stage.client().get("/", "");
    stage.client().get("/", "unknown-key");
    stage.client().round("POST", "/closes", key, &[], b"x");
    let mut broken = stage.client();
    broken.ask("GET", "/breaks", key, &[], b"");
    assert!(broken.try_answer().is_err());
    let mut streams = stage.client();
    streams.ask("GET", "/streams", key, &[], b"");
    streams.head();
    let expected = [
        ("mpool_requests_total{status=\"200\",code=\"\"}", 4.0),
        ("mpool_requests_total{status=\"429\",code=\"\"}", 1.0),
        (
            "mpool_requests_total{status=\"401\",code=\"NOKEYGIVEN\"}",
            1.0,
        ),
        ("mpool_requests_total{status=\"401\",code=\"NOKEY\"}", 1.0),
        (
            "mpool_requests_total{status=\"502\",code=\"UPSTREAM\"}",
            1.0,
        ),
        ("mpool_requests_broken_total{end=\"upstream-broke\"}", 1.0),
        ("mpool_requests_in_flight", 1.0),
        ("mpool_connections", 1.0),
        // Answered by the upstream, those that broke and still stream too.
        ("mpool_time_to_first_byte_seconds_count", 6.0),
        // The first request, two look-ups more to replace its account, the unknown
        // key, and one until the lease is known to stay; none without a key.
        ("mpool_acquire_seconds_count", 5.0),
        ("mpool_leases_known_total", 5.0),
        ("mpool_failovers_total", 1.0),
        ("mpool_grace_total", 0.0),
        ("mpool_redis_connections_up", 2.0),
        (
            "mpool_upstream_errors_total{account=\"worn\",error=\"401\"}",
            1.0,
        ),
        (
            "mpool_upstream_errors_total{account=\"one\",error=\"broke-off\"}",
            1.0,
        ),
    ];
    drop(broken);
    let page = wait_for("the metrics to settle", || {
        let page = open_metrics(&stage.forwarder.admin("/metrics").text());
        let settled = page["mpool_connections"] == 1.0 && page["mpool_requests_in_flight"] == 1.0;
        settled.then_some(page)
    });
    for (sample, value) in expected {
        assert_eq!(page.get(sample), Some(&value), "{sample} in {page:#?}");
    }
    // Nothing happened but what is told.
    let requests = page
        .iter()
        .filter(|(sample, _)| sample.starts_with("mpool_requests_total"));
    assert_eq!(requests.map(|(_, value)| value).sum::<f64>(), 8.0);
    assert!(page["mpool_acquire_seconds_sum"] > 0.0);
    streams.leave();
    wait_for("the stream's end", || {
        let ends = stage
            .forwarder
            .metric("mpool_requests_broken_total{end=\"client-gone\"}");
        (ends == Some(1.0)).then_some(())
    });
    assert_eq!(
        stage.forwarder.metric("mpool_requests_in_flight"),
        Some(0.0)
    );
}

// An orderly end

fn signal(pid: u32, name: &str) {
    let sent = Command::new("bash")
        .args(["-c", "kill -s \"$0\" \"$1\"", name, &pid.to_string()])
        .status();
    assert!(sent.unwrap().success());
}

#[test]
fn what_is_under_way_is_finished_before_the_end() {
    for name in ["TERM", "INT"] {
        println!("{name}");
        let mut stage = Stage::with(Upstream::manual(), &["--drain-timeout", "20s"]);
        let key = stage.key.clone();
        let mut idle = stage.client();
        idle.ask("GET", "/", &key, &[], b"");
        stage.upstream.next().ok();
        check_ok(&idle.answer());
        let mut fresh = stage.client();
        // A stream that has begun, one over HTTP/2, a request that waits for its
        // answer, and one whose body is still coming.
        let mut streaming = stage.client();
        streaming.ask("GET", "/stream", &key, &[], b"");
        let mut stream = stage.upstream.next();
        stream.stream();
        stream.chunk("before");
        streaming.head();
        assert_eq!(streaming.piece().unwrap(), b"before");
        let mut http2 = stage.forwarder.http2();
        let (feed, pending) = http2.open("POST", "/h2", &key, &[]);
        let mut upper = stage.upstream.next();
        let mut waiting = stage.client();
        waiting.ask("GET", "/waits", &key, &[], b"");
        let waits = stage.upstream.next();
        let mut uploading = stage.client();
        uploading.send(request("PUT", "/up", &key, &[("Content-Length", "8")], b""));
        uploading.send("half");
        let mut upload = stage.upstream.next();
        assert_eq!(upload.piece().unwrap(), b"half");

        stage.forwarder.signal(name);
        stage.forwarder.wait_for_line("stopping");
        for (what, client) in [("an idle", &mut idle), ("a fresh", &mut fresh)] {
            let closed = client.wait_for_close(Duration::from_secs(5));
            assert!(closed.is_some(), "{what} connection is kept");
        }
        wait_for("new connections to be refused", || {
            TcpStream::connect(("127.0.0.1", stage.forwarder.port)).err()
        });
        let ready = stage.forwarder.admin("/readyz");
        assert!(
            ready.status() == 503 && ready.text().contains("stop"),
            "{ready:?}"
        );
        assert_eq!(stage.forwarder.admin("/healthz").status(), 200);
        assert!(stage.forwarder.is_alive());

        stream.chunk("after");
        assert_eq!(streaming.piece().unwrap(), b"after");
        stream.end();
        assert_eq!(streaming.rest().text(), "beforeafter");
        feed.data("all of it");
        feed.end();
        assert_eq!(upper.body(), b"all of it");
        upper.ok();
        assert_eq!(pending.answer().body(), b"ok");
        waits.ok();
        let answer = waiting.answer();
        check_ok(&answer);
        assert_eq!(answer.header("connection"), Some("close"));
        uploading.send("half");
        assert_eq!(upload.body(), b"half");
        upload.ok();
        check_ok(&uploading.answer());
        assert_eq!(stage.forwarder.wait(), 0);
        let log = stage.forwarder.log();
        assert!(log.last().unwrap().ends_with("] stopped"), "{log:?}");
        assert_eq!(
            log.iter()
                .filter(|line| line.contains("GET /stream 200"))
                .count(),
            1
        );
        assert!(stage.forwarder.errors().is_empty());
    }
}

/// A stage with a stream that doesn't end.
fn endless(arguments: &[&str]) -> (Stage<Upstream>, Client, proxy::Exchange) {
    let stage = Stage::with(Upstream::manual(), arguments);
    let mut client = stage.client();
    client.ask("GET", "/endless", &stage.key, &[], b"");
    let mut exchange = stage.upstream.next();
    exchange.stream();
    exchange.chunk("one");
    client.head();
    assert_eq!(client.piece().unwrap(), b"one");
    (stage, client, exchange)
}

#[test]
fn what_does_not_finish_is_cut_off() {
    let (mut stage, mut client, mut exchange) = endless(&["--drain-timeout", "400ms"]);
    let begun = Instant::now();
    assert_eq!(stage.forwarder.terminate(), 0);
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(400), "{took:?}");
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert!(
        client.try_rest().is_err(),
        "an answer that was cut off looks whole"
    );
    assert!(exchange.wait_for_close(PATIENCE).is_some());
    let log = stage.forwarder.log();
    assert!(
        log.iter()
            .any(|line| line.contains("1 requests are cut off")),
        "{log:?}"
    );
}

#[test]
fn the_second_signal_ends_it_at_once() {
    for (first, second) in [("TERM", "TERM"), ("INT", "TERM"), ("TERM", "INT")] {
        let (mut stage, mut client, _exchange) = endless(&[]);
        stage.forwarder.signal(first);
        stage.forwarder.wait_for_line("stopping");
        let begun = Instant::now();
        stage.forwarder.signal(second);
        assert_eq!(stage.forwarder.wait(), 0);
        assert!(begun.elapsed() < Duration::from_secs(5));
        assert!(client.try_rest().is_err());
    }
}

#[test]
fn nothing_under_way_ends_at_once_whatever_redis_does() {
    for what in ["up", "down", "hung"] {
        let mut stage = Stage::new(Upstream::ok());
        check_ok(&stage.get("/"));
        let _idle = stage.client();
        match what {
            "down" => stage.server.kill(),
            "hung" => signal(stage.server.pid(), "STOP"),
            _ => {}
        }
        let begun = Instant::now();
        assert_eq!(stage.forwarder.terminate(), 0);
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(3), "{what}: {took:?}");
    }
}

// Limits

#[test]
fn connections_beyond_the_limit_are_told() {
    let server = Options::default().accounts(&["one"]).start();
    let stage = Stage::on(server, Upstream::ok(), &["--max-connections", "3"]);
    let mut kept: Vec<Client> = (0..3).map(|_| stage.client()).collect();
    for client in &mut kept {
        check_ok(&client.get("/", &stage.key));
    }
    for _ in 0..3 {
        let answer = promptly(|| stage.client().answer());
        assert_eq!((answer.status(), answer.code()), (503, Some("CONNECTIONS")));
        assert_eq!(answer.header("retry-after"), Some("1"));
        assert!(answer.text().contains("overloaded_error"));
    }
    for client in &mut kept {
        check_ok(&client.get("/", &stage.key));
    }
    kept.pop();
    wait_for("a place", || {
        let mut client = stage.client();
        client
            .try_send(request("GET", "/", &stage.key, &[], b""))
            .ok()?;
        client
            .try_answer()
            .ok()
            .filter(|answer| answer.status() == 200)
    });
}

#[test]
fn many_connections_beyond_the_limit_hold_nothing_up() {
    let server = Options::default().accounts(&["one"]).start();
    let stage = Stage::on(server, Upstream::ok(), &["--max-connections", "2"]);
    let mut kept = stage.client();
    check_ok(&kept.get("/", &stage.key));
    let _other = stage.client();
    let mut beyond: Vec<Client> = (0..200).map(|_| stage.client()).collect();
    let told = beyond
        .iter_mut()
        .filter_map(|client| client.try_answer().ok());
    let told = told
        .filter(|answer| answer.code() == Some("CONNECTIONS"))
        .count();
    assert!(told >= 32, "{told} were told");
    promptly(|| check_ok(&kept.get("/", &stage.key)));
    drop(beyond);
    wait_for("all of them to be forgotten", || {
        (stage.forwarder.metric("mpool_connections") == Some(2.0)).then_some(())
    });
}

#[test]
fn idle_connections_are_closed() {
    let limit = Duration::from_millis(400);
    let stage = Stage::with(Upstream::manual(), &["--keepalive-timeout", "400ms"]);
    let check = |begun: Instant, closed: Option<Instant>, what: &str| {
        let after = closed.unwrap_or_else(|| panic!("{what} is not closed")) - begun;
        assert!(
            after >= limit - Duration::from_millis(10),
            "{what}: {after:?}"
        );
        assert!(after < Duration::from_secs(5), "{what}: {after:?}");
    };
    let mut unused = stage.client();
    let begun = Instant::now();
    check(
        begun,
        unused.wait_for_close(PATIENCE),
        "one that was never used",
    );
    // A request may take longer than that.
    let mut client = stage.client();
    client.ask("GET", "/", &stage.key, &[], b"");
    let mut exchange = stage.upstream.next();
    std::thread::sleep(limit * 2);
    exchange.stream();
    exchange.chunk("slow");
    std::thread::sleep(limit * 2);
    exchange.end();
    assert_eq!(client.answer().text(), "slow");
    let begun = Instant::now();
    // The time since the last one, not since the first.
    std::thread::sleep(limit / 2);
    client.ask("GET", "/", &stage.key, &[], b"");
    stage.upstream.next().ok();
    check_ok(&client.answer());
    check(
        begun + limit / 2,
        client.wait_for_close(PATIENCE),
        "one that was used",
    );
    let mut http2 = stage.forwarder.http2();
    let (feed, pending) = http2.open("POST", "/", &stage.key, &[]);
    feed.end();
    stage.upstream.next().ok();
    assert_eq!(pending.answer().body(), b"ok");
    // Over HTTP/2 as well a request may take longer, whatever rest came before it.
    for _ in 0..2 {
        std::thread::sleep(limit / 2);
        let (feed, pending) = http2.open("POST", "/", &stage.key, &[]);
        feed.end();
        let exchange = stage.upstream.next();
        std::thread::sleep(limit * 2);
        exchange.ok();
        assert_eq!(pending.answer().body(), b"ok");
    }
    wait_for("the HTTP/2 connection to be closed", || {
        (stage.forwarder.metric("mpool_connections") == Some(0.0)).then_some(())
    });
}

/// Sends until the other side is gone: how long that took.
#[track_caller]
fn send_without_end(mut exchange: proxy::Exchange) -> Duration {
    let begun = Instant::now();
    let limit = Duration::from_secs(5);
    exchange.send("HTTP/1.1 200 OK\r\n\r\n");
    let stream = &exchange.wire().stream;
    stream.set_write_timeout(Some(limit)).unwrap();
    let data = vec![b'x'; 64 * 1024];
    while exchange.try_send(&data).is_ok() {}
    let took = begun.elapsed();
    assert!(took < limit, "it is never cut off");
    took
}

#[test]
fn a_client_that_reads_nothing_is_cut_off() {
    let stage = Stage::with(Upstream::manual(), &["--send-timeout", "500ms"]);
    let mut client = stage.client();
    client.ask("GET", "/endless", &stage.key, &[], b"");
    let took = send_without_end(stage.upstream.next());
    assert!(took >= Duration::from_millis(400), "{took:?}");
    stage.forwarder.wait_for_lines("end=client-gone", 1);
    drop(client);
    // One that reads slowly stays.
    let mut slow = stage.client();
    slow.ask("GET", "/slow", &stage.key, &[], b"");
    let mut exchange = stage.upstream.next();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let data = vec![b'x'; 12 << 20];
            let length = data.len();
            exchange.send(format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n"
            ));
            exchange.send(&data);
        });
        let mut got = 0;
        slow.head();
        let mut last = Instant::now();
        while let Some(piece) = slow.piece() {
            got += piece.len();
            if last.elapsed() > Duration::from_millis(50) && got < 6 << 20 {
                std::thread::sleep(Duration::from_millis(200));
                last = Instant::now();
            }
        }
        assert_eq!(got, 12 << 20);
    });
}

#[test]
fn an_http2_stream_that_is_not_read_is_cut_off_alone() {
    let stage = Stage::with(Upstream::manual(), &["--send-timeout", "500ms"]);
    let mut http2 = stage.forwarder.http2();
    let (feed, pending) = http2.open("GET", "/endless", &stage.key, &[]);
    feed.end();
    send_without_end(stage.upstream.next());
    // The others of the connection go on.
    let (feed, other) = http2.open("GET", "/", &stage.key, &[]);
    feed.end();
    stage.upstream.next().ok();
    assert_eq!(other.answer().body(), b"ok");
    drop(pending);
}

#[test]
fn what_is_turned_away_is_counted() {
    let arguments = ["--max-connections", "2", "--header-timeout", "300ms"];
    let stage = Stage::with(Upstream::ok(), &arguments);
    let mut table = vec![("503", "CONNECTIONS")];
    let kept = [stage.client(), stage.client()];
    assert_eq!(stage.client().answer().code(), Some("CONNECTIONS"));
    drop(kept);
    let long = format!("GET / HTTP/1.1\r\nX-Long: {}\r\n\r\n", "x".repeat(200_000));
    for (status, code, bytes) in [
        ("400", "BAD_REQUEST", "no HTTP\r\n\r\n"),
        ("408", "REQUEST_TIMEOUT", "GET / HTTP/1.1\r\nHost:"),
        ("431", "HEADERS_TOO_LARGE", &long),
    ] {
        let answer = wait_for("a place", || {
            let mut client = stage.client();
            let _ = client.try_send(bytes);
            let answer = client.try_answer().ok()?;
            (answer.code() != Some("CONNECTIONS")).then_some(answer)
        });
        assert_eq!(answer.code(), Some(code));
        table.push((status, code));
    }
    for (status, code) in table {
        let sample = format!("mpool_requests_total{{status=\"{status}\",code=\"{code}\"}}");
        let count = stage.forwarder.metric(&sample);
        assert!(
            count.is_some_and(|count| count >= 1.0),
            "{sample}: {count:?}"
        );
    }
    assert_eq!(
        stage.forwarder.metric("mpool_requests_in_flight"),
        Some(0.0)
    );
}

// TLS

#[test]
fn clients_may_come_over_tls() {
    let authority = Authority::new();
    let identity = authority.issue("127.0.0.1");
    let tls = [
        "--tls-cert",
        &identity.cert,
        "--tls-key",
        &identity.key,
        "--header-timeout",
        "400ms",
    ];
    let stage = Stage::with(Upstream::ok(), &tls);
    for (offered, agreed) in [
        (&["h2", "http/1.1"][..], "h2"),
        (&["h2"], "h2"),
        (&["http/1.1"], "http/1.1"),
        (&[], ""),
    ] {
        let (version, status, body) = authority.get(stage.forwarder.port, offered, "/", &stage.key);
        assert_eq!(
            (version.as_str(), status, body.as_str()),
            (agreed, 200, "ok")
        );
    }
    stage
        .forwarder
        .wait_for_lines(" (https), forwarding to ", 1);
    // What is no TLS, and what says nothing at all, is let go.
    let mut plain = stage.client();
    plain.ask("GET", "/", &stage.key, &[], b"");
    assert!(plain.wait_for_close(PATIENCE).is_some());
    let mut silent = stage.client();
    assert!(silent.wait_for_close(PATIENCE).is_some());
    assert_eq!(stage.upstream.count(), 4);
    wait_for("all connections to go", || {
        (stage.forwarder.metric("mpool_connections") == Some(0.0)).then_some(())
    });
}

#[test]
fn a_client_that_goes_is_seen_through_tls() {
    let authority = Authority::new();
    let identity = authority.issue("127.0.0.1");
    let tls = ["--tls-cert", &identity.cert, "--tls-key", &identity.key];
    let stage = Stage::with(Upstream::manual(), &tls);
    let request = request("GET", "/", &stage.key, &[], b"");
    for (says_so, answered) in [(true, false), (false, false), (true, true), (false, true)] {
        let mut client = authority.connect(stage.forwarder.port);
        client.write_all(&request).unwrap();
        let mut exchange = stage.upstream.next();
        if answered {
            exchange.stream();
            exchange.chunk("begun");
            let mut some = [0; 1024];
            assert_ne!(client.read(&mut some).unwrap(), 0);
        }
        if says_so {
            client.conn.send_close_notify();
            client.flush().unwrap();
        }
        let left = Instant::now();
        drop(client);
        let seen = exchange.wait_for_close(PATIENCE).unwrap();
        let time = seen.saturating_duration_since(left);
        assert!(
            time < Duration::from_millis(100),
            "{says_so} {answered}: {time:?}"
        );
    }
}

#[test]
fn the_upstream_may_be_behind_tls() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let upstream = TlsUpstream::start(&authority.issue("127.0.0.1"));
    let misnamed = TlsUpstream::start(&authority.issue("other.example"));
    let server = Options::default().accounts(&["one"]).start();
    let key = server.connect().pool_key();
    let table = [
        ("auto", &upstream, &authority, Some("HTTP/2.0")),
        ("http1", &upstream, &authority, Some("HTTP/1.1")),
        ("auto", &upstream, &stranger, None),
        ("auto", &misnamed, &authority, None),
    ];
    for (protocol, upstream, trusted, version) in table {
        let forwarder = Forwarder::between(&server, upstream)
            .args(&[
                "--upstream-protocol",
                protocol,
                "--upstream-cacert",
                &trusted.file(),
            ])
            .start();
        for _ in 0..4 {
            let answer = forwarder.client().get("/", &key);
            match version {
                Some(version) => {
                    check_ok(&answer);
                    assert_eq!(answer.text(), format!("{version} Bearer token-of-one"));
                }
                None => assert_eq!((answer.status(), answer.code()), (502, Some("UPSTREAM"))),
            }
        }
    }
    assert_eq!(
        server.connect().state("one", unix_ms()).as_deref(),
        Some("partial")
    );
}

#[test]
fn redis_may_be_behind_tls() {
    if !support::server_has_tls() {
        println!("this server is built without TLS: nothing to test");
        return;
    }
    let (authority, stranger) = (Authority::new(), Authority::new());
    let identity = authority.issue("127.0.0.1");
    let own = authority.issue("forwarder");
    let port = free_port();
    let file = authority.file();
    let server = Options::default()
        .server(&[
            "--tls-port",
            &port.to_string(),
            "--tls-cert-file",
            &identity.cert,
        ])
        .server(&["--tls-key-file", &identity.key, "--tls-ca-cert-file", &file])
        .accounts(&["one"])
        .start();
    let mut redis = server.connect();
    let key = redis.pool_key();
    redis.ok(&[
        &["ACL", "SETUSER", "proxy", "on", &format!(">{SECRET}")][..],
        &["+mpool.acquire", "+mpool.cooldown", "+mpool.status"],
    ]
    .concat());
    let upstream = Upstream::ok();
    let url = format!("rediss://127.0.0.1:{port}");
    let client = ["--redis-cert", &own.cert, "--redis-key", &own.key];
    let forged = stranger.issue("forwarder");
    let forged = ["--redis-cert", &forged.cert, "--redis-key", &forged.key];
    let stranger = stranger.file();
    let table: [(&str, &[&str], bool); 6] = [
        (
            "and the machine's authorities alone are trusted",
            &client,
            false,
        ),
        (
            "with another authority's certificate",
            &[&["--redis-cacert", &file], &forged[..]].concat(),
            false,
        ),
        (
            "without TLS",
            &["--redis", &format!("redis://127.0.0.1:{port}")],
            false,
        ),
        (
            "with its certificate",
            &[&["--redis-cacert", &file], &client[..]].concat(),
            true,
        ),
        ("without one", &["--redis-cacert", &file], false),
        (
            "of another authority",
            &[&["--redis-cacert", &stranger], &client[..]].concat(),
            false,
        ),
    ];
    for (what, arguments, good) in table {
        println!("{what}");
        let forwarder = Forwarder::between(url.as_str(), &upstream)
            .args(arguments)
            .start();
        let answer = wait_for("an answer", || {
            let answer = promptly(|| forwarder.client().get("/", &key));
            // The connection may be on its way still.
            (answer.status() == 200 || !good).then_some(answer)
        });
        match good {
            true => check_ok(&answer),
            false => check_redis_is_away(&answer),
        }
        assert_eq!(
            forwarder.admin("/readyz").status(),
            if good { 200 } else { 503 }
        );
    }
    // What Redis tells comes through TLS as well.
    let forwarder = Forwarder::between(url.as_str(), &upstream)
        .args(&[&["--threads", "1", "--redis-cacert", &file], &client[..]].concat())
        .start();
    let mut requests = forwarder.client();
    check_nobody_asks_for_others(&server, &mut requests, &key);
    redis.ok(&["MPOOL.REVOKE", &key]);
    assert_eq!(requests.get("/", &key).code(), Some("REVOKED"));
    let key = redis.pool_key();
    // A server that does not ask for certificates, and one whose own is for another name.
    redis.ok(&["CONFIG", "SET", "tls-auth-clients", "no"]);
    let trusting = Forwarder::between(url.as_str(), &upstream).args(&["--redis-cacert", &file]);
    let good_answer = |forwarder: &Forwarder| {
        wait_for("a good answer", || {
            (forwarder.client().get("/", &key).status() == 200).then_some(())
        });
    };
    good_answer(&trusting.start());
    redis.ok(&[
        "ACL",
        "SETUSER",
        "default",
        "resetpass",
        &format!(">{SECRET}"),
    ]);
    for (user, password, good) in [
        ("proxy", SECRET, true),
        ("proxy", "wrong", false),
        ("", SECRET, true),
    ] {
        let forwarder = trusting.clone().env("MPOOL_REDIS_PASSWORD", password);
        let forwarder = match user {
            "" => forwarder,
            user => forwarder.env("MPOOL_REDIS_USER", user),
        };
        let forwarder = forwarder.start();
        match good {
            true => good_answer(&forwarder),
            false => check_redis_is_away(&promptly(|| forwarder.client().get("/", &key))),
        }
        assert!(!forwarder.log().concat().contains(SECRET));
    }
    let misnamed = authority.issue("redis.example");
    redis.ok(&[
        "CONFIG",
        "SET",
        "tls-cert-file",
        &misnamed.cert,
        "tls-key-file",
        &misnamed.key,
    ]);
    let forwarder = trusting.env("MPOOL_REDIS_PASSWORD", SECRET).start();
    for _ in 0..3 {
        check_redis_is_away(&promptly(|| forwarder.client().get("/", &key)));
    }
    assert!(
        forwarder
            .log()
            .concat()
            .contains("a certificate is not accepted")
    );
}

// Redis

#[test]
fn redis_asks_who_it_is() {
    let server = Options::default().accounts(&["one", "two"]).start();
    let mut redis = server.connect();
    let key = redis.pool_key();
    // What the README asks for, and nothing more.
    redis.ok(&[
        "ACL",
        "SETUSER",
        "forwarder",
        "reset",
        "on",
        ">s3cr3t-of-redis",
        "+mpool.acquire",
        "+mpool.cooldown",
        "+mpool.status",
        "+client|setname",
    ]);
    redis.ok(&["CONFIG", "SET", "requirepass", "s3cr3t-of-redis"]);
    let upstream = Upstream::start(|exchange| match exchange.target.as_str() {
        "/bad" => exchange.respond(401, &[], b"no"),
        _ => exchange.ok(),
    });
    let host = format!("127.0.0.1:{}", server.port);
    let plain = format!("redis://{host}");
    let table: [(&str, &[&str], &str, bool); 8] = [
        (&plain, &[], SECRET, true),
        (&plain, &["--redis-user", "forwarder"], SECRET, true),
        (&format!("redis://forwarder:{SECRET}@{host}"), &[], "", true),
        (&format!("redis://:{SECRET}@{host}/0"), &[], "", true),
        (
            &format!("redis://forwarder:{SECRET}@{host}"),
            &["--redis-user", "nobody"],
            "wrong",
            true,
        ),
        (&plain, &[], "", false),
        (&plain, &[], "wrong-s3cr3t-of-redis", false),
        (&plain, &["--redis-user", "nobody"], SECRET, false),
    ];
    for (url, arguments, password, good) in table {
        println!("{arguments:?} {good}");
        let setup = Forwarder::between(url, &upstream).args(arguments);
        let setup = match password {
            "" => setup,
            password => setup.env("MPOOL_REDIS_PASSWORD", password),
        };
        let forwarder = setup.start();
        let answer = forwarder.client().get("/", &key);
        match good {
            true => {
                check_ok(&answer);
                assert_eq!(forwarder.admin("/readyz").status(), 200);
                assert_eq!(forwarder.client().get("/bad", &key).status(), 401);
                forwarder.wait_for_lines("is out of the pool", 1);
                let names = ["one", "two"];
                names
                    .iter()
                    .for_each(|name| redis.ok(&["MPOOL.COOLDOWN", "medium", name, "1000", "0"]));
            }
            false => {
                check_redis_is_away(&answer);
                assert_eq!(forwarder.admin("/readyz").status(), 503);
            }
        }
        let log = forwarder.log().join("\n");
        assert!(!log.contains(SECRET), "{log}");
    }
}

/// A server that keeps what it has over a kill.
fn durable(module: &[&str]) -> Server {
    Options::default()
        .server(&["--appendonly", "yes", "--appendfsync", "always"])
        .module(module)
        .accounts(&["one", "two"])
        .start()
}

/// Waits until every thread has its connection to Redis: 2, and the admin's.
#[track_caller]
fn wait_for_redis(forwarder: &Forwarder) {
    wait_for("the connections to Redis", || {
        (forwarder.metric("mpool_redis_connections_up") == Some(3.0)).then_some(())
    });
}

#[test]
fn leases_seen_go_on_for_a_while_without_redis() {
    let upstream = Upstream::start(|exchange| {
        let token = exchange.token().unwrap();
        exchange.respond(200, &[], token.as_bytes());
    });
    let mut stage = Stage::on(durable(&[]), upstream, &["--grace", "2s"]);
    let mut redis = stage.server.connect();
    let seen = stage.key.clone();
    let (unseen, revoked) = (redis.pool_key(), redis.pool_key());
    let before = stage.get("/");
    check_ok(&before);
    check_ok(&stage.client().get("/", &revoked));
    stage.server.kill();
    let away = Instant::now();
    let mut served = 0;
    while away.elapsed() < Duration::from_millis(1500) {
        let answer = promptly(|| stage.get("/"));
        check_ok(&answer);
        assert_eq!(answer.body, before.body, "another account");
        check_redis_is_away(&promptly(|| stage.client().get("/", &unseen)));
        served += 1;
    }
    assert_eq!(
        stage.forwarder.metric("mpool_grace_total"),
        Some(f64::from(served))
    );
    stage.forwarder.wait_for_lines("state=grace", 1);
    stage.forwarder.wait_for_lines(
        "Redis can't be asked: going on with the lease seen last, account: ",
        1,
    );
    stage.forwarder.wait_for_lines("is lost", 1);
    // Not for ever.
    let ended = wait_for("the grace's end", || {
        let answer = promptly(|| stage.get("/"));
        (answer.status() != 200).then_some(answer)
    });
    check_redis_is_away(&ended);
    assert!(away.elapsed() > Duration::from_millis(1900));
    stage.server.launch();
    wait_for_redis(&stage.forwarder);
    for key in [&seen, &unseen] {
        check_ok(&stage.client().get("/", key));
    }
    assert_eq!(stage.get("/").body, before.body);
    stage
        .forwarder
        .wait_for_lines("connected to Redis at 127.0.0.1", 2);
    // A new outage has its own span; the word of Redis counts once it is there.
    stage.server.kill();
    check_ok(&stage.client().get("/", &revoked));
    stage.server.launch();
    stage.server.connect().ok(&["MPOOL.REVOKE", &revoked]);
    wait_for_redis(&stage.forwarder);
    let answer = stage.client().get("/", &revoked);
    assert_eq!(answer.code(), Some("REVOKED"));
    stage.server.kill();
    check_redis_is_away(&stage.client().get("/", &revoked));
    check_ok(&stage.client().get("/", &seen));
}

#[test]
fn a_module_that_reads_the_keyspace_is_as_a_redis_that_loads() {
    for grace in ["0s", "60s"] {
        let stage = Stage::on(durable(&[]), Upstream::ok(), &["--grace", grace]);
        let mut redis = stage.server.connect();
        let unseen = redis.pool_key();
        redis.register(30_000);
        let lease = redis.acquire(&stage.key, unix_ms());
        check_ok(&stage.get("/"));
        let connections = stage.forwarder.metric("mpool_redis_connections_up");
        while_reading(&stage.server, || {
            for _ in 0..10 {
                let answer = promptly(|| stage.get("/"));
                match grace {
                    "0s" => check_redis_is_away(&answer),
                    _ => check_ok(&answer),
                }
                check_redis_is_away(&promptly(|| stage.client().get("/", &unseen)));
                let ready = stage.forwarder.admin("/readyz");
                assert_eq!(ready.status(), 503);
                let why = ready.text();
                assert!(why.contains("is reading the keyspace"), "{why}");
            }
        });
        if grace != "0s" {
            stage.forwarder.wait_for_lines("state=grace", 10);
        }
        redis.wait_until_ready();
        // There is no connection to be made anew.
        assert_eq!(
            stage.forwarder.metric("mpool_redis_connections_up"),
            connections
        );
        check_ok(&stage.get("/"));
        check_ok(&stage.client().get("/", &unseen));
        let again = redis.acquire(&stage.key, unix_ms());
        assert_eq!((again.account, again.last), (lease.account, lease.last));
    }
}

/// How often the pool has been asked for an account, by whomever.
fn asked(server: &Server) -> u64 {
    server
        .connect()
        .info("mpool", "mpool_acquires")
        .parse()
        .unwrap()
}

/// Requests until the forwarder knows the lease.
#[track_caller]
fn make_known(server: &Server, client: &mut proxy::Client, key: &str) -> Answer {
    // Twice, once Redis tells of changes: it may be told so after the first request.
    wait_for("a lease that is known", || {
        let before = asked(server);
        let answer = client.get("/", key);
        check_ok(&answer);
        (asked(server) == before).then_some(answer)
    })
}

/// Answers with the token.
fn telling() -> Upstream {
    Upstream::start(|exchange| {
        let token = exchange.token().unwrap();
        exchange.respond(200, &[], token.as_bytes());
    })
}

#[test]
fn a_lease_that_is_known_to_stay_is_not_asked_for() {
    let stage = Stage::with(telling(), &["--lease-cache", "1h"]);
    let mut client = stage.client();
    let answer = make_known(&stage.server, &mut client, &stage.key);
    let before = asked(&stage.server);
    for _ in 0..100 {
        assert_eq!(client.get("/", &stage.key).body, answer.body);
    }
    assert_eq!(asked(&stage.server), before);
    let known = stage.forwarder.metric("mpool_leases_known_total");
    assert!(known >= Some(101.0), "{known:?}");
}

/// Gives an account a token that it hasn't had.
fn write_token(stage: &Stage<Upstream>, account: &str) {
    let text = r#"{"access_token": "a-new-token"}"#;
    stage
        .server
        .write_account(&format!("medium/{account}"), text);
}

#[test]
fn a_known_lease_ends_with_what_it_rests_on() {
    type Change = fn(&Stage<Upstream>, &mut support::Client, &str);
    // What is changed, and the code that follows; none: another account.
    let changes: [(&str, Change, Option<&str>); 15] = [
        (
            "revoked",
            |_, redis, key| redis.ok(&["MPOOL.REVOKE", key]),
            Some("REVOKED"),
        ),
        (
            "revoked by hand",
            |_, redis, key| {
                let name = format!("client_keys:{key}");
                let _: i64 = redis.run(&["HSET", &name, "active", "false"]);
            },
            Some("REVOKED"),
        ),
        (
            "deleted",
            |_, redis, key| {
                let _: i64 = redis.run(&["DEL", &format!("client_keys:{key}")]);
            },
            Some("NOKEY"),
        ),
        (
            "expired by hand",
            |_, redis, key| {
                let name = format!("client_keys:{key}");
                let _: i64 = redis.run(&["HSET", &name, "expires_at", "1"]);
            },
            Some("EXPIRED"),
        ),
        (
            "flushed",
            |_, redis, _| redis.ok(&["FLUSHALL"]),
            Some("NOKEY"),
        ),
        (
            "another database in the place of the pool's",
            |_, redis, _| redis.ok(&["SWAPDB", "0", "1"]),
            Some("NOKEY"),
        ),
        (
            "and another one again",
            |stage, redis, key| {
                redis.ok(&["SWAPDB", "0", "1"]);
                redis.ok(&["SWAPDB", "1", "0"]);
                make_known(&stage.server, &mut stage.client(), key);
                redis.ok(&["SWAPDB", "0", "1"]);
            },
            Some("NOKEY"),
        ),
        (
            "its account cools down",
            |_, redis, key| {
                let account = redis.holds(key).unwrap();
                let now = unix_ms().to_string();
                redis.ok(&["MPOOL.COOLDOWN", "medium", &account, &now, "60000"]);
            },
            None,
        ),
        (
            "its account is deleted",
            |stage, redis, key| {
                let account = redis.holds(key).unwrap();
                stage.server.remove_account(&format!("medium/{account}"));
                redis.ok(&["MPOOL.RELOAD"]);
            },
            None,
        ),
        (
            "its account has a new token",
            |stage, redis, key| {
                write_token(stage, &redis.holds(key).unwrap());
                redis.ok(&["MPOOL.RELOAD"]);
            },
            None,
        ),
        (
            "its account's token ends, as its file has said",
            |stage, redis, key| {
                let account = redis.holds(key).unwrap();
                let end = unix_ms() + 500;
                let text =
                    format!(r#"{{"access_token": "token-of-{account}", "expires_at": {end}}}"#);
                let file = format!("medium/{account}");
                stage.server.write_account(&file, &text);
                redis.ok(&["MPOOL.RELOAD"]);
                make_known(&stage.server, &mut stage.client(), key);
                while unix_ms() < end {
                    std::thread::sleep(Duration::from_millis(10));
                }
            },
            None,
        ),
        (
            "its account is away and comes back while nothing may be written",
            |stage, redis, key| {
                let account = redis.holds(key).unwrap();
                redis.ok(&["CLIENT", "PAUSE", "60000", "WRITE"]);
                stage.server.remove_account(&format!("medium/{account}"));
                // MPOOL.RELOAD would wait as well.
                let mut wait_for_state = |is_usable: bool| {
                    wait_for("its file to be looked at", || {
                        let rows = redis.pages("ACCOUNTS", "medium", "100");
                        let mut rows = rows.iter();
                        let row = rows.find(|row| text(&row["account"]) == account);
                        let usable = row.is_some_and(|row| text(&row["state"]) != "missing");
                        (usable == is_usable).then_some(())
                    });
                };
                wait_for_state(false);
                write_token(stage, &account);
                wait_for_state(true);
                redis.ok(&["CLIENT", "UNPAUSE"]);
            },
            None,
        ),
        (
            "the module goes and comes with a new token for its account",
            |stage, redis, key| {
                let account = redis.holds(key).unwrap();
                // The forwarder's last command is none of the module's then.
                std::thread::sleep(Duration::from_millis(1500));
                redis.ok(&["MODULE", "UNLOAD", "mpool"]);
                write_token(stage, &account);
                let words = stage.server.load_words();
                let words: Vec<&str> = words.iter().map(String::as_str).collect();
                redis.ok(&words);
                redis.wait_until_ready();
            },
            None,
        ),
        (
            "its server is no longer the primary",
            |_, redis, _| redis.ok(&["REPLICAOF", "127.0.0.1", "1"]),
            Some("REDIS"),
        ),
        (
            "the connection breaks meanwhile",
            |_, redis, key| {
                redis.run::<i64>(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
                redis.ok(&["MPOOL.REVOKE", key]);
            },
            Some("REVOKED"),
        ),
    ];
    for (what, change, code) in changes {
        println!("{what}");
        let arguments = ["--threads", "1", "--lease-cache", "1h", "--grace", "0s"];
        let server = Options::default().accounts(&["a", "b"]).start();
        let stage = Stage::on(server, telling(), &arguments);
        let mut redis = stage.server.connect();
        let mut client = stage.client();
        let before = make_known(&stage.server, &mut client, &stage.key);
        change(&stage, &mut redis, &stage.key);
        let began = Instant::now();
        wait_for(what, || {
            let after = client.get("/", &stage.key);
            let told = after.code() == code && after.body != before.body;
            // Only REVOKE waits for Redis to have told of it.
            assert!(told || what != "revoked", "{after:?}");
            told.then_some(())
        });
        assert!(began.elapsed() < Duration::from_secs(1), "{what}");
    }
}

#[test]
fn a_new_token_is_asked_for_by_whoever_uses_its_account_alone() {
    let arguments = ["--threads", "1", "--lease-cache", "1h"];
    let server = Options::default().accounts(&["a", "b"]).start();
    let stage = Stage::on(server, telling(), &arguments);
    let mut redis = stage.server.connect();
    let mut client = stage.client();
    let other = redis.pool_key();
    let [before, after] =
        [&stage.key, &other].map(|key| make_known(&stage.server, &mut client, key));
    let accounts = [&stage.key, &other].map(|key| redis.holds(key).unwrap());
    assert_ne!(accounts[0], accounts[1]);
    write_token(&stage, &accounts[1]);
    redis.ok(&["MPOOL.RELOAD"]);
    wait_for("the new token", || {
        let answer = client.get("/", &other);
        (answer.body != after.body).then_some(())
    });
    let asked_before = asked(&stage.server);
    assert_eq!(client.get("/", &stage.key).body, before.body);
    assert_eq!(asked(&stage.server), asked_before);
}

#[test]
fn a_new_token_reaches_all_who_share_its_account() {
    let arguments = ["--threads", "1", "--lease-cache", "1h"];
    let slots = ["slots-per-account", "300"];
    let server = Options::default().accounts(&["a"]).module(&slots).start();
    let stage = Stage::on(server, telling(), &arguments);
    let mut redis = stage.server.connect();
    let mut client = stage.client();
    let keys: Vec<String> = (0..299).map(|_| redis.pool_key()).collect();
    for key in &keys {
        make_known(&stage.server, &mut client, key);
    }
    write_token(&stage, "a");
    redis.ok(&["MPOOL.RELOAD"]);
    wait_for("the new token", || {
        let mut answers = keys.iter().map(|key| client.get("/", key));
        answers
            .all(|answer| answer.body == b"a-new-token")
            .then_some(())
    });
}

/// Has Redis tell of one change after the other, none of them to a key in use, while that is done.
fn while_others_change(server: &Server, work: impl FnOnce()) {
    std::thread::scope(|scope| {
        // The thread ends with the sender, however that ends.
        let (_sender, receiver) = mpsc::channel::<()>();
        let mut other = server.connect();
        scope.spawn(move || {
            let name = format!("client_keys:{}", "x".repeat(99));
            while receiver.try_recv() == Err(TryRecvError::Empty) {
                let _: i64 = other.run(&["HSET", &name, "tier", "high"]);
            }
        });
        work();
    });
}

#[test]
fn a_revoked_key_is_never_served() {
    let stage = Stage::with(Upstream::ok(), &["--lease-cache", "1h"]);
    let mut redis = stage.server.connect();
    let mut clients = [stage.client(), stage.client()];
    let mut revoke = |rounds: usize| {
        for _ in 0..rounds {
            let key = redis.pool_key();
            for client in &mut clients {
                for _ in 0..3 {
                    check_ok(&client.get("/", &key));
                }
            }
            redis.ok(&["MPOOL.REVOKE", &key]);
            for client in &mut clients {
                assert_eq!(client.get("/", &key).code(), Some("REVOKED"));
            }
        }
    };
    revoke(300);
    while_others_change(&stage.server, || revoke(100));
}

/// A known lease is used while others change.
#[track_caller]
fn check_nobody_asks_for_others(server: &Server, client: &mut proxy::Client, key: &str) {
    make_known(server, client, key);
    while_others_change(server, || {
        let before = asked(server);
        for _ in 0..1_000 {
            check_ok(&client.get("/", key));
        }
        // Rather than each time; on a busy machine Redis may be tried out meanwhile.
        assert!(asked(server) < before + 10);
    });
}

#[test]
fn changes_to_others_have_nobody_asked() {
    let stage = Stage::with(telling(), &["--threads", "1", "--lease-cache", "1h"]);
    check_nobody_asks_for_others(&stage.server, &mut stage.client(), &stage.key);
}

#[test]
fn changes_told_of_while_a_connection_begins_do_it_no_harm() {
    let server = Options::default().accounts(&["a"]).start();
    let mut redis = server.connect();
    let upstream = telling();
    let key = redis.pool_key();
    while_others_change(&server, || {
        for _ in 0..5 {
            let forwarder = Forwarder::between(&server, &upstream).start();
            let mut client = forwarder.client();
            for _ in 0..20 {
                check_ok(&client.get("/", &key));
            }
            let log = forwarder.log().join("\n");
            assert!(!log.contains("is lost"), "{log}");
        }
    });
}

#[test]
fn a_known_lease_is_asked_for_again_in_time() {
    let stage = Stage::with(telling(), &["--threads", "1", "--lease-cache", "300ms"]);
    let mut client = stage.client();
    make_known(&stage.server, &mut client, &stage.key);
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(300));
        let before = asked(&stage.server);
        check_ok(&client.get("/", &stage.key));
        assert_eq!(asked(&stage.server), before + 1);
    }
}

#[test]
fn a_known_lease_ends_with_its_key() {
    let stage = Stage::with(telling(), &["--threads", "1", "--lease-cache", "1h"]);
    let mut redis = stage.server.connect();
    let mut client = stage.client();
    let name = format!("client_keys:{}", stage.key);
    let _: i64 = redis.run(&["HSET", &name, "expires_at", ""]);
    make_known(&stage.server, &mut client, &stage.key);
    let end = unix_ms() + 1500;
    let _: i64 = redis.run(&["HSET", &name, "expires_at", &end.to_string()]);
    make_known(&stage.server, &mut client, &stage.key);
    wait_for("the key's end", || {
        let begun = unix_ms();
        let answer = client.get("/", &stage.key);
        assert!(
            begun < end || answer.code() == Some("EXPIRED"),
            "{answer:?}"
        );
        (begun >= end).then_some(())
    });
}

#[test]
fn a_known_lease_is_of_no_use_once_redis_is_out_of_reach() {
    for (grace, code) in [("0s", Some("REDIS")), ("60s", None)] {
        let arguments = ["--threads", "1", "--lease-cache", "1h", "--grace", grace];
        let stage = Stage::with(telling(), &arguments);
        let mut client = stage.client();
        make_known(&stage.server, &mut client, &stage.key);
        // It says nothing any more, and nothing breaks.
        signal(stage.server.pid(), "STOP");
        let began = Instant::now();
        wait_for("the silence to be noticed", || {
            let answer = client.get("/", &stage.key);
            assert!(
                answer.status() == 200 || answer.code() == code,
                "{answer:?}"
            );
            let served = stage.forwarder.metric("mpool_grace_total");
            let noticed = if code.is_some() {
                answer.code() == code
            } else {
                served > Some(0.0)
            };
            noticed.then_some(())
        });
        // A second, and another one for an answer.
        assert!(began.elapsed() < Duration::from_secs(5));
        signal(stage.server.pid(), "CONT");
        wait_for("Redis", || {
            (client.get("/", &stage.key).status() == 200).then_some(())
        });
        make_known(&stage.server, &mut client, &stage.key);
    }
}

#[test]
fn what_is_not_remembered_costs_one_question() {
    let server = Options::default().accounts(&["a"]);
    let own = r#"{"access_token": "own-token"}"#;
    let server = server.file("high/own", own).start();
    let stage = Stage::on(server, telling(), &["--threads", "1"]);
    let mut redis = stage.server.connect();
    let bound = redis.bound_key("high/own");
    let mut client = stage.client();
    make_known(&stage.server, &mut client, &stage.key);
    for (key, status) in [(bound.as_str(), 200), ("of-nobody", 401)] {
        let before = (asked(&stage.server), redis.calls("mpool.status"));
        for _ in 0..10 {
            assert_eq!(client.get("/", key).status(), status);
        }
        let after = (asked(&stage.server), redis.calls("mpool.status"));
        assert_eq!(after, (before.0 + 10, before.1), "{key}");
    }
}

#[test]
fn a_known_lease_rotates_in_time() {
    let server = Options::default().module(&["rotation-ms", "1500"]);
    let server = server.accounts(&["a", "b"]).start();
    let stage = Stage::on(
        server,
        telling(),
        &["--threads", "1", "--lease-cache", "1h"],
    );
    let mut client = stage.client();
    let begun = Instant::now();
    let before = make_known(&stage.server, &mut client, &stage.key);
    wait_for("the rotation", || {
        (client.get("/", &stage.key).body != before.body).then_some(())
    });
    assert!(begun.elapsed() < Duration::from_secs(3));
}

#[test]
fn every_request_asks_where_changes_are_not_told_of() {
    let server = Options::default().accounts(&["a", "b", "c"]).start();
    let mut redis = server.connect();
    // What each is refused for the connection, and not for each request. HELLO is
    // allowed to all.
    for (user, rights, refusals, what) in [
        ("no-hello", &["+mpool.status"][..], 0, "CLIENT TRACKING"),
        ("no-tracking", &["+hello"], 0, "CLIENT TRACKING"),
        (
            "no-status",
            &["+hello", "+client|tracking"],
            1,
            "MPOOL.STATUS",
        ),
    ] {
        let words = [
            "ACL",
            "SETUSER",
            user,
            "on",
            ">secret-of-redis",
            "+mpool.acquire",
        ];
        redis.ok(&[&words[..], rights].concat());
        let upstream = telling();
        let forwarder = Forwarder::between(&server, &upstream)
            .args(&["--redis-user", user, "--lease-cache", "1h"])
            .args(&["--threads", "2"])
            .env("MPOOL_REDIS_PASSWORD", "secret-of-redis")
            .start();
        let key = redis.pool_key();
        let mut client = forwarder.client();
        let before = asked(&server);
        for _ in 0..5 {
            check_ok(&client.get("/", &key));
        }
        assert_eq!(asked(&server) - before, 5, "{user}");
        let reason = format!("it refuses {what}");
        let why = || {
            let mut log = forwarder.log();
            log.retain(|line| line.contains("not remembered") && line.ends_with(&reason));
            log.len()
        };
        wait_for("the reason in the log", || (why() > 0).then_some(()));
        let refused = redis.run::<Vec<BTreeMap<String, Value>>>(&["ACL", "LOG"]);
        let refused = refused
            .iter()
            .filter(|entry| text(&entry["username"]) == user)
            .filter(|entry| text(&entry["object"]) == "mpool.status");
        let refused: i64 = refused
            .filter_map(|entry| optional_number(&entry["count"]))
            .sum();
        assert_eq!(refused, refusals, "{user}");
        // What a user may is asked once for each connection.
        redis.ok(&["ACL", "SETUSER", user, "+mpool.status", "+client|tracking"]);
        redis.run::<i64>(&["CLIENT", "KILL", "USER", user]);
        wait_for("the forwarder to be back", || {
            (client.get("/", &key).status() == 200).then_some(())
        });
        make_known(&server, &mut client, &key);
        assert_eq!(why(), 1, "one for all threads");
    }
    // Nor where that is not wanted.
    let stage = Stage::on(server, telling(), &["--lease-cache", "0s"]);
    let before = asked(&stage.server);
    for _ in 0..5 {
        check_ok(&stage.get("/"));
    }
    assert_eq!(asked(&stage.server) - before, 5);
    let log = stage.forwarder.log();
    assert!(!log.iter().any(|line| line.contains("not remembered")));
}

#[test]
fn a_redis_that_is_busy_or_wants_a_login_is_asked_again() {
    let server = Options::default().accounts(&["a"]).start();
    let mut redis = server.connect();
    let key = redis.pool_key();
    let upstream = telling();
    let start = || {
        Forwarder::between(&server, &upstream)
            .args(&["--lease-cache", "1h"])
            .start()
    };
    let wait_for_reason = |forwarder: &Forwarder, why: &str| {
        wait_for(why, || {
            let log = forwarder.log();
            log.iter().any(|line| line.ends_with(why)).then_some(())
        });
    };
    redis.ok(&["CONFIG", "SET", "busy-reply-threshold", "20"]);
    let mut script = server.connect();
    let endless = std::thread::spawn(move || {
        script.error(&["EVAL", "while true do end", "0"]);
    });
    wait_for("the script to run", || {
        redis.try_run::<String>(&["PING"]).is_err().then_some(())
    });
    let busy = start();
    wait_for_reason(&busy, "can't be asked: it is busy with a script");
    redis.ok(&["SCRIPT", "KILL"]);
    endless.join().unwrap();
    let mut client = busy.client();
    wait_for("Redis to be asked", || {
        (client.get("/", &key).status() == 200).then_some(())
    });
    make_known(&server, &mut client, &key);

    redis.ok(&["CONFIG", "SET", "requirepass", "secret-of-redis"]);
    let stranger = start();
    wait_for_reason(&stranger, "can't be asked: it wants a login");
    check_redis_is_away(&stranger.client().get("/", &key));
    for forwarder in [busy, stranger] {
        let log = forwarder.log();
        assert!(!log.iter().any(|line| line.contains("not remembered")));
    }
}

#[test]
fn an_outage_is_a_new_one_also_for_a_thread_that_was_not_asked_between() {
    let mut stage = Stage::on(
        durable(&[]),
        Upstream::ok(),
        &["--grace", "1s", "--threads", "1"],
    );
    check_ok(&stage.get("/"));
    for _ in 0..2 {
        stage.server.kill();
        check_ok(&stage.get("/"));
        std::thread::sleep(Duration::from_millis(1200));
        check_redis_is_away(&stage.get("/"));
        stage.server.launch();
        wait_for("the connections to Redis", || {
            (stage.forwarder.metric("mpool_redis_connections_up") == Some(2.0)).then_some(())
        });
    }
}

#[test]
fn the_grace_ends_for_a_thread_that_is_cut_off_alone() {
    let stage = Stage::on(durable(&[]), Upstream::ok(), &["--grace", "1s"]);
    let mut redis = stage.server.connect();
    // Connections go to the threads in turn.
    let mut clients: Vec<_> = (0..4).map(|_| stage.client()).collect();
    for client in &mut clients {
        check_ok(&client.get("/", &stage.key));
    }
    wait_for_redis(&stage.forwarder);
    // One of the links is cut, and Redis takes no connection any more.
    let list: String = redis.run(&["CLIENT", "LIST", "TYPE", "normal"]);
    let link = list
        .lines()
        .find(|line| line.contains("cmd=mpool.acquire"))
        .and_then(|line| line.split(' ').next()?.strip_prefix("id="))
        .expect("a link that has asked");
    redis.ok(&["CONFIG", "SET", "maxclients", "1"]);
    let cut: i64 = redis.run(&["CLIENT", "KILL", "ID", link]);
    assert_eq!(cut, 1);
    let begun = Instant::now();
    let mut round = || {
        let answers = clients.iter_mut().map(|client| client.get("/", &stage.key));
        answers
            .filter(|answer| match answer.status() {
                200 => false,
                _ => {
                    check_redis_is_away(answer);
                    true
                }
            })
            .count()
    };
    // The other link's good answers don't prolong it.
    let refused = wait_for("the grace's end", || match round() {
        0 => None,
        refused => Some(refused),
    });
    assert!(begun.elapsed() > Duration::from_millis(900));
    assert!(refused < 4, "all threads are cut off");
    redis.ok(&["CONFIG", "SET", "maxclients", "1000"]);
    wait_for_redis(&stage.forwarder);
    assert_eq!(round(), 0);
}

#[test]
fn a_lease_that_has_run_out_is_not_served_without_redis() {
    let mut stage = Stage::on(durable(&["rotation-ms", "1500"]), Upstream::ok(), &[]);
    let begun = Instant::now();
    check_ok(&stage.get("/"));
    stage.server.kill();
    check_ok(&stage.get("/"));
    let ended = wait_for("the lease's end", || {
        let answer = promptly(|| stage.get("/"));
        (answer.status() != 200).then_some(answer)
    });
    check_redis_is_away(&ended);
    assert!(begun.elapsed() > Duration::from_millis(1400));
}

#[test]
fn there_need_not_be_any_grace() {
    let mut stage = Stage::on(durable(&[]), Upstream::ok(), &["--grace", "0s"]);
    check_ok(&stage.get("/"));
    stage.server.kill();
    for _ in 0..5 {
        check_redis_is_away(&promptly(|| stage.get("/")));
    }
    stage.server.launch();
    let back = Instant::now();
    wait_for("a good answer", || {
        (promptly(|| stage.get("/")).status() == 200).then_some(())
    });
    let took = back.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");
}

#[test]
fn redis_may_be_away_when_it_starts() {
    let mut server = durable(&[]);
    let key = server.connect().pool_key();
    server.kill();
    let upstream = Upstream::ok();
    let forwarder = Forwarder::between(&server, &upstream).start();
    for _ in 0..3 {
        check_redis_is_away(&promptly(|| forwarder.client().get("/", &key)));
    }
    forwarder.wait_for_lines("can't be asked: nothing listens there", 1);
    server.launch();
    wait_for_redis(&forwarder);
    check_ok(&forwarder.client().get("/", &key));
}

#[test]
fn a_redis_that_hangs_holds_requests_up_for_no_longer_than_told() {
    let limit = Duration::from_millis(400);
    for grace in ["0s", "60s"] {
        println!("grace {grace}");
        let stage = Stage::on(
            durable(&[]),
            Upstream::ok(),
            &["--grace", grace, "--redis-timeout", "400ms"],
        );
        let unseen = stage.server.connect().pool_key();
        check_ok(&stage.get("/"));
        signal(stage.server.pid(), "STOP");
        let check = |answer: &Answer, is_seen: bool| match grace == "60s" && is_seen {
            true => check_ok(answer),
            false => check_redis_is_away(answer),
        };
        let begun = Instant::now();
        std::thread::scope(|scope| {
            for number in 0..8 {
                let (stage, unseen) = (&stage, &unseen);
                scope.spawn(move || {
                    let seen = number % 2 == 0;
                    let key = if seen { &stage.key } else { unseen };
                    let answer = stage.client().get("/", key);
                    check(&answer, seen);
                });
            }
        });
        let took = begun.elapsed();
        assert!(took < limit + Duration::from_secs(1), "{took:?}");
        // From then on it is known.
        std::thread::sleep(limit);
        for number in 0..6 {
            let seen = number % 2 == 0;
            let key = if seen { &stage.key } else { &unseen };
            let begun = Instant::now();
            let answer = stage.client().get("/", key);
            check(&answer, seen);
            let took = begun.elapsed();
            assert!(took < Duration::from_millis(300), "{took:?}");
        }
        signal(stage.server.pid(), "CONT");
        wait_for_redis(&stage.forwarder);
        check_ok(&stage.client().get("/", &unseen));
    }
}

#[test]
fn a_redis_that_loads_its_data_is_waited_for() {
    let mut server = Options::default()
        .server(&[
            "--key-load-delay",
            "500",
            "--loading-process-events-interval-bytes",
            "1024",
        ])
        .accounts(&["one"])
        .start();
    let mut redis = server.connect();
    redis.ok(&["DEBUG", "POPULATE", "3000"]);
    let (seen, unseen) = (redis.pool_key(), redis.pool_key());
    let upstream = Upstream::ok();
    let mut forwarder = Forwarder::between(&server, &upstream).start();
    check_ok(&forwarder.client().get("/", &seen));
    redis.ok(&["SAVE"]);
    server.kill();
    let loaded = AtomicBool::new(false);
    let refused = std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut refused = 0;
            while !loaded.load(Ordering::Relaxed) {
                check_ok(&promptly(|| forwarder.client().get("/", &seen)));
                let answer = promptly(|| forwarder.client().get("/", &unseen));
                if answer.status() != 200 {
                    check_redis_is_away(&answer);
                    refused += 1;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            refused
        });
        server.launch();
        loaded.store(true, Ordering::Relaxed);
        asking.join().unwrap()
    });
    assert!(refused > 3, "it was never asked while it loaded");
    forwarder.wait_for_line("Redis is loading its data");
    wait_for_redis(&forwarder);
    check_ok(&forwarder.client().get("/", &unseen));
}

#[test]
fn connections_to_redis_that_are_cut_cost_no_request() {
    let stage = Stage::on(durable(&[]), Upstream::ok(), &["--grace", "0s"]);
    let mut redis = stage.server.connect();
    let keys: Vec<String> = (0..4).map(|_| redis.pool_key()).collect();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let users: Vec<_> = keys
            .iter()
            .map(|key| {
                let (stage, done) = (&stage, &done);
                scope.spawn(move || {
                    let mut client = stage.client();
                    while !done.load(Ordering::Relaxed) {
                        check_ok(&promptly(|| client.get("/", key)));
                    }
                })
            })
            .collect();
        let mut killed = 0;
        for _ in 0..8 {
            std::thread::sleep(Duration::from_millis(250));
            killed += redis.run::<i64>(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
        }
        done.store(true, Ordering::Relaxed);
        assert!(killed >= 16, "{killed} connections were cut");
        users.into_iter().for_each(|user| user.join().unwrap());
    });
}

#[test]
fn a_redis_that_takes_no_writes_is_no_pool() {
    let primary = durable(&[]);
    let stage = Stage::on(durable(&[]), Upstream::ok(), &["--grace", "0s"]);
    let mut redis = stage.server.connect();
    check_ok(&stage.get("/"));
    let port = primary.port.to_string();
    let table: [(&str, &[&str], &[&str]); 2] = [
        (
            "a replica",
            &["REPLICAOF", "127.0.0.1", &port],
            &["REPLICAOF", "NO", "ONE"],
        ),
        (
            "one that can't save",
            &["CONFIG", "SET", "min-replicas-to-write", "1"],
            &["CONFIG", "SET", "min-replicas-to-write", "0"],
        ),
    ];
    for (what, begin, end) in table {
        println!("{what}");
        redis.ok(begin);
        if what == "a replica" {
            // What it copies is the other one's.
            wait_for("the copy", || {
                (redis.info("replication", "master_link_status") == "up").then_some(())
            });
        }
        for _ in 0..5 {
            check_redis_is_away(&promptly(|| stage.get("/")));
        }
        assert_eq!(stage.forwarder.admin("/healthz").status(), 200);
        redis.ok(end);
        if what == "a replica" {
            let key = redis.pool_key();
            wait_for("a good answer", || {
                (promptly(|| stage.client().get("/", &key)).status() == 200).then_some(())
            });
            redis.ok(&[
                "HSET",
                &format!("client_keys:{}", stage.key),
                "tier",
                "medium",
                "use_pool",
                "true",
                "active",
                "true",
                "created_at",
                "0",
                "expires_at",
                "99999999999999",
            ]);
        }
        wait_for("a good answer", || {
            (promptly(|| stage.get("/")).status() == 200).then_some(())
        });
    }
}

/// An answer over a connection of its own, which a change of roles may cut.
fn ask<T: redis::FromRedisValue>(server: &Server, words: &[&str]) -> Option<T> {
    let client = redis::Client::open(server.url()).unwrap();
    let mut connection = client.get_connection_with_timeout(PATIENCE).ok()?;
    let mut command = redis::cmd(words[0]);
    command.arg(&words[1..]).query(&mut connection).ok()
}

fn replication(server: &Server) -> Option<redis::InfoDict> {
    ask(server, &["INFO", "replication"])
}

#[test]
fn a_failover_of_redis_is_followed() {
    let primary = durable(&[]);
    let replica = Options::default()
        .server(&["--appendonly", "yes"])
        .accounts(&["one", "two"])
        .replica_of(&primary)
        .start();
    let mut redis = primary.connect();
    let keys: Vec<String> = (0..4).map(|_| redis.pool_key()).collect();
    support::wait_for_same(&mut redis, &mut replica.connect());
    let nearby = std::array::from_fn(|_| Place::default());
    let down_after = Duration::from_millis(600);
    let mut sentinels = Sentinels::watch(&primary, 1, &nearby, Some(SECRET), down_after);
    let upstream = Upstream::start(|exchange| {
        let token = exchange.token().unwrap();
        exchange.respond(200, &[], token.as_bytes());
    });
    let mut forwarder = Forwarder::between(sentinels.url().as_str(), &upstream)
        .env("MPOOL_SENTINEL_PASSWORD", SECRET)
        .start();
    wait_for_redis(&forwarder);
    let account = |key: &str| {
        let answer = promptly(|| forwarder.client().get("/", key));
        check_ok(&answer);
        answer.text()
    };
    let before = [&keys[0], &keys[1]].map(|key| account(key));
    support::wait_for_same(&mut redis, &mut replica.connect());
    let follow = |key: &str| {
        // The seen ones go on, the new one waits, and nothing takes long.
        wait_for("the failover to be followed", || {
            for (key, before) in keys.iter().zip(&before) {
                assert_eq!(account(key), *before, "another account than before");
            }
            let answer = promptly(|| forwarder.client().get("/", key));
            match answer.status() {
                200 => Some(()),
                _ => {
                    check_redis_is_away(&answer);
                    None
                }
            }
        });
    };
    // In order: the primary becomes a replica, and says so.
    let mut sentinel = sentinels.connect(1).unwrap();
    sentinel.ok(&["SENTINEL", "FAILOVER", "pool"]);
    wait_for("the new primary", || {
        let role: String = replication(&replica)?.get("role")?;
        (role == "master").then_some(())
    });
    // The Sentinels would tell the old one some seconds later.
    let port = replica.port.to_string();
    wait_for("the old one to be told", || {
        ask::<Value>(&primary, &["REPLICAOF", "127.0.0.1", &port])
    });
    follow(&keys[2]);
    wait_for("the copy", || {
        let link: String = replication(&primary)?.get("master_link_status")?;
        let digest = |server| ask::<String>(server, &["DEBUG", "DIGEST"]);
        (link == "up" && digest(&primary)? == digest(&replica)?).then_some(())
    });
    // One Sentinel less, and the primary dies.
    let _ = sentinels.children[0].kill();
    let _ = sentinels.children[0].wait();
    let mut replica = replica;
    replica.kill();
    follow(&keys[3]);
    let role: Option<String> = replication(&primary).unwrap().get("role");
    assert_eq!(role.as_deref(), Some("master"));
    primary.connect().check_invariants(2);
    assert!(forwarder.is_alive());
}
