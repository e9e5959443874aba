//! The way of a request through the forwarder and of its answer back: what is
//! replaced, what is left behind, and that everything else passes byte for byte,
//! as it comes, over HTTP/1.1 and HTTP/2.

mod proxy;
mod support;

use proxy::{Client, Exchange, Head, Http2Upstream, Stage, Upstream, chunked, request};
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, LazyLock};
use std::time::{Duration, Instant};
use support::{Options, PATIENCE, wait_for};

/// The issue's bound from a client's going to the upstream's seeing it.
const GONE_WITHIN: Duration = Duration::from_millis(100);
/// How long the upstream waits for it.
const GONE_AT_LAST: Duration = Duration::from_secs(2);
const MIB: u64 = 1 << 20;

fn bytes_of(latin1: &str) -> Vec<u8> {
    latin1.chars().map(|c| c as u8).collect()
}

/// Lines in the order of their names, those of one name in their own order.
fn by_name(mut lines: Vec<String>) -> Vec<String> {
    let name = |line: &String| line.split(':').next().unwrap().to_ascii_lowercase();
    lines.sort_by_key(name);
    lines
}

fn strings(lines: &[&str]) -> Vec<String> {
    lines.iter().map(ToString::to_string).collect()
}

// The credential

#[test]
fn the_accounts_credential_takes_the_place_of_the_clients_key() {
    let accounts = [
        (
            r#"{"access_token": "token-of-one"}"#,
            "authorization: Bearer token-of-one",
        ),
        (r#"{"api_key": "token-of-one"}"#, "x-api-key: token-of-one"),
    ];
    for (account, credential) in accounts {
        let server = Options::default().file("medium/one", account).start();
        let stage = Stage::on(server, Upstream::ok(), &[]);
        let key = &stage.key;
        let ways = [
            format!("Authorization: Bearer {key}\r\n"),
            format!("authorization: bearer {key}\r\n"),
            format!("AUTHORIZATION: BEARER   {key} \r\n"),
            format!("x-api-key: {key}\r\n"),
            format!("X-Api-Key:{key}\r\n"),
            format!("X-API-KEY: {key}\r\nAuthorization: Bearer {key}\r\n"),
            format!("Authorization: Bearer {key}\r\nX-Other: 1\r\nx-api-key: {key}\r\n"),
            format!("Proxy-Authorization: Basic {key}\r\nx-api-key: {key}\r\n"),
        ];
        let mut client = stage.client();
        for way in &ways {
            stage.upstream.forget();
            client.send(format!("GET / HTTP/1.1\r\nHost: front\r\n{way}\r\n"));
            assert_eq!(client.answer().status(), 200, "{way}");
            let head = stage.upstream.only().head;
            let named = ["authorization", "x-api-key", "proxy-authorization"];
            let credentials = head.headers.iter().filter_map(|(name, value)| {
                let name = name.to_ascii_lowercase();
                let line = format!("{name}: {value}");
                named.contains(&name.as_str()).then_some(line)
            });
            assert_eq!(credentials.collect::<Vec<_>>(), [credential], "{way}");
            let raw = String::from_utf8(head.raw).unwrap();
            assert!(!raw.contains(key.as_str()), "{way}: {raw}");
        }
        let mut client = stage.forwarder.http2();
        stage.upstream.forget();
        assert_eq!(client.get("/", key).status(), 200);
        let raw = String::from_utf8(stage.upstream.only().head.raw).unwrap();
        assert!(raw.contains(credential), "{raw}");
        assert!(!raw.contains(key.as_str()), "{raw}");
    }
}

// Byte for byte

#[test]
fn hop_by_hop_headers_stay_behind_in_both_directions() {
    let stage = Stage::new(Upstream::answering(
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive, X-Back\r\nX-Back: 1\r\n\
         connection: X-Second\r\nX-Second: 2\r\nKeep-Alive: timeout=9\r\nProxy-Connection: x\r\n\
         Upgrade: h2c\r\nX-Stays: 1\r\nTrailer: X-T\r\n\r\nok",
    ));
    let mut client = stage.client();
    client.send(format!(
        "GET / HTTP/1.1\r\nHost: front\r\nx-api-key: {}\r\nConnection: X-One , x-two,,close\r\n\
         X-One: 1\r\nX-TWO: 2\r\nConnection: x-three\r\nX-Three: 3\r\nProxy-Connection: keep-alive\r\n\
         Keep-Alive: timeout=5\r\nTE: trailers, deflate;q=0.5\r\nUpgrade: websocket\r\n\
         X-Stays: 1\r\nAccept: */*\r\n\r\n",
        stage.key
    ));
    let answer = client.answer();
    let head = stage.upstream.only().head;
    let mut passed = head.lines_without(&["host", "authorization"]);
    // Trailers may come: that is said anew, for the connection to the upstream.
    passed.retain(|line| !["te: trailers", "connection: te"].contains(&&*line.to_lowercase()));
    assert_eq!(by_name(passed), strings(&["Accept: */*", "X-Stays: 1"]));
    // The client asked for the connection's end, which is the forwarder's to say.
    let mut passed = answer.head.lines_without(&["content-length"]);
    passed.retain(|line| line.to_lowercase() != "connection: close");
    assert_eq!(by_name(passed), strings(&["Trailer: X-T", "X-Stays: 1"]));
    assert!(client.wait_for_close(PATIENCE).is_some());
}

#[test]
fn headers_that_the_client_calls_hop_by_hop_can_not_take_away_the_credential() {
    let stage = Stage::new(Upstream::ok());
    let mut client = stage.client();
    for named in [
        "authorization",
        "Authorization, x-api-key",
        "host",
        "content-length",
    ] {
        stage.upstream.forget();
        client.send(format!(
            "POST / HTTP/1.1\r\nHost: front\r\nx-api-key: {}\r\nConnection: {named}\r\n\
             Content-Length: 5\r\n\r\nhello",
            stage.key
        ));
        assert_eq!(client.answer().status(), 200, "{named}");
        let request = stage.upstream.only();
        assert_eq!(request.token().as_deref(), Some("token-of-one"), "{named}");
        assert!(request.head.has("host"), "{named}");
        assert_eq!(request.body, b"hello", "{named}");
    }
}

/// Header lines that pass as they are, in either direction.
const LINES: [&str; 17] = [
    "X-CamelCase: a",
    "x-lower: b",
    "X-UPPER: c",
    "X-Empty: ",
    "X-Twice: 1",
    "X-Between: x",
    "x-twice: 2",
    "X-Twice: 1",
    "X-Obs-Text: caf\u{e9} \u{c3}\u{a9} \u{ff}\u{80}",
    "X-Spaces: a  b\tc",
    "X-Marks: \"quoted \\\" \" ,;=(){}[]<>@/?:|^`~",
    "Via: 1.1 other",
    "Content-Type: application/json; charset=UTF-8",
    "Content-Encoding: gzip",
    "Date: Thu, 14 Aug 2025 14:00:00 GMT",
    "X_Underscore.dot!#$%&'*+-^`|~: odd name",
    "Cache-Control: no-store",
];

#[test]
fn a_requests_headers_pass_untouched_and_nothing_is_added() {
    let stage = Stage::new(Upstream::ok());
    let mut lines = strings(&LINES);
    lines.extend(strings(&[
        "User-Agent: test/1",
        "Accept-Encoding: gzip, br",
        "Cookie: a=b; c=d",
        "Forwarded: for=1.2.3.4",
        "X-Forwarded-For: 10.0.0.1",
        "Range: bytes=0-99",
        "If-None-Match: \"x\"",
        "anthropic-version: 2023-06-01",
        "OpenAI-Beta: assistants=v2",
        "X-Mpool-Error: the client's own",
    ]));
    let key = format!("Authorization: Bearer {}", stage.key);
    let head = format!(
        "GET / HTTP/1.1\r\nHost: front\r\n{key}\r\n{}\r\n\r\n",
        lines.join("\r\n")
    );
    let mut client = stage.client();
    client.send(bytes_of(&head));
    assert_eq!(client.answer().status(), 200);
    let head = stage.upstream.only().head;
    let passed = head.lines_without(&["host", "authorization"]);
    assert_eq!(by_name(passed), by_name(lines));
    let host = format!("127.0.0.1:{}", stage.upstream.port);
    assert_eq!(head.values("host"), [host.as_str()]);

    // The upstream gets one Host, however many the client sends.
    for hosts in ["", "Host: a\r\nHost: b\r\n", "Host:\r\n"] {
        stage.upstream.forget();
        let mut client = stage.client();
        client.send(format!("GET / HTTP/1.1\r\n{hosts}{key}\r\n\r\n"));
        match client.answer().status() {
            200 => assert_eq!(stage.upstream.only().head.values("host"), [host.as_str()]),
            status => assert_eq!((status, stage.upstream.count()), (400, 0), "{hosts}"),
        }
    }

    // A client that sends next to nothing gets nothing added.
    stage.upstream.forget();
    client.send(format!("GET / HTTP/1.1\r\nHost: front\r\n{key}\r\n\r\n"));
    client.answer();
    let head = stage.upstream.only().head;
    assert_eq!(head.lines_without(&["host", "authorization"]), [""; 0]);
}

#[test]
fn an_answers_head_passes_untouched_and_nothing_is_added() {
    let lines = LINES.join("\r\n");
    for status in [
        "200 OK",
        "200 Fine by me",
        "200 ",
        "201 Created",
        "299 Sehr gut",
        "599 Odd",
    ] {
        let head = format!("HTTP/1.1 {status}\r\n{lines}\r\nContent-Length: 2\r\n\r\nok");
        let stage = Stage::new(Upstream::answering(bytes_of(&head)));
        let answer = stage.get("/");
        assert_eq!(answer.head.line, format!("HTTP/1.1 {status}"));
        let passed = answer.head.lines_without(&["content-length"]);
        assert_eq!(by_name(passed), by_name(strings(&LINES)), "{status}");
        assert_eq!(answer.header("content-length"), Some("2"));
        assert_eq!(answer.body, b"ok");
    }
    // Not even a date is added to an answer that has none.
    let stage = Stage::new(Upstream::answering(
        "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    ));
    let answer = stage.get("/");
    assert_eq!(answer.head.lines_without(&["content-length"]), [""; 0]);
}

#[test]
fn large_heads_pass_in_both_directions() {
    let value = "v".repeat(60_000);
    let many: Vec<String> = (0..97).map(|n| format!("X-Header-{n}: {n}")).collect();
    let large = [format!("X-Large: {value}")];
    for lines in [many.as_slice(), &large] {
        let head = lines.join("\r\n");
        let answer = format!("HTTP/1.1 200 OK\r\n{head}\r\nContent-Length: 0\r\n\r\n");
        let stage = Stage::with(
            Upstream::answering(answer),
            &["--max-header-bytes", "128KiB"],
        );
        let mut client = stage.client();
        let key = &stage.key;
        client.send(format!(
            "GET / HTTP/1.1\r\nHost: x\r\nx-api-key: {key}\r\n{head}\r\n\r\n"
        ));
        let answer = client.answer();
        assert_eq!(answer.status(), 200);
        assert_eq!(
            by_name(answer.head.lines_without(&["content-length"])),
            by_name(lines.to_vec())
        );
        let passed = stage
            .upstream
            .only()
            .head
            .lines_without(&["host", "authorization"]);
        assert_eq!(by_name(passed), by_name(lines.to_vec()));
    }
}

/// Targets that a client may send and that pass as they are.
const TARGETS: [&str; 21] = [
    "/",
    "//",
    "/v1/messages",
    "/v1//messages///x/",
    "/a/./b/../c/",
    "/..",
    "/a;p=1/b,c=2:3@x!$&'()*+=-._~",
    "/%2F%2f%00%zz%",
    "/%e4%bd%a0",
    "/a%20b",
    "/?",
    "/??a=?&&=",
    "/?q=a/b?c&d=e+f%20g&h[]=1",
    "/v1?x=a|b^c`d",
    "/v1?x=a\\b",
    "/{curly}",
    "/~user/*",
    "/:80/x",
    "/http://elsewhere/x",
    "/a?http://elsewhere/?b",
    "/a&b=c",
];

#[test]
fn a_target_passes_untouched() {
    let stage = Stage::new(Upstream::ok());
    let mut client = stage.client();
    let long = format!("/{}?{}", "p".repeat(4000), "q".repeat(4000));
    for target in TARGETS.into_iter().chain([long.as_str()]) {
        stage.upstream.forget();
        assert_eq!(client.get(target, &stage.key).status(), 200, "{target}");
        assert_eq!(stage.upstream.only().target, target);
    }
    let mut client = stage.forwarder.http2();
    for target in TARGETS {
        stage.upstream.forget();
        assert_eq!(client.get(target, &stage.key).status(), 200, "{target}");
        assert_eq!(stage.upstream.only().target, target);
    }
}

#[test]
fn a_target_that_is_not_quite_valid_passes_untouched_or_is_refused() {
    let stage = Stage::new(Upstream::ok());
    let odd = [
        "/caf\u{e9}",
        "/\u{e4}\u{bd}\u{a0}?\u{ff}",
        "/a<b>\"c\"",
        "/v1?x={\"a\":1}",
        "/a[b]",
        "/a^b`c|d",
        "/a\\b",
    ];
    for target in odd {
        stage.upstream.forget();
        let answer = stage.get(target);
        match answer.status() {
            200 => assert_eq!(stage.upstream.only().target, target),
            400 => {
                assert_eq!(answer.code(), Some("BAD_REQUEST"), "{target}");
                assert_eq!(stage.upstream.count(), 0, "{target}");
            }
            other => panic!("{target}: {other}"),
        }
    }
}

#[test]
fn a_target_is_put_behind_the_upstreams_own_path() {
    let upstream = Upstream::ok();
    for (prefix, asked, expected) in [
        ("", "/v1?q=1", "/v1?q=1"),
        ("/", "/v1", "/v1"),
        ("/api", "/v1//x?q", "/api/v1//x?q"),
        ("/api/", "/", "/api/"),
        ("/api", "/../x", "/api/../x"),
        // The absolute form, as clients send it to a proxy.
        ("", "http://elsewhere:1/v1?q=%20", "/v1?q=%20"),
        ("", "http://elsewhere", "/"),
    ] {
        let server = Options::default().accounts(&["one"]).start();
        let key = server.connect().pool_key();
        let url = format!("http://127.0.0.1:{}{prefix}", upstream.port);
        let forwarder = proxy::Forwarder::between(&server, &url).start();
        upstream.forget();
        let answer = forwarder.client().get(asked, &key);
        assert_eq!(answer.status(), 200, "{prefix} {asked}");
        let request = upstream.only();
        assert_eq!(request.target, expected, "{prefix} {asked}");
        let host = format!("127.0.0.1:{}", upstream.port);
        assert_eq!(request.head.values("host"), [host]);
    }
}

#[test]
fn every_method_passes() {
    let stage = Stage::new(Upstream::ok());
    let mut client = stage.client();
    for (method, target) in [
        ("GET", "/"),
        ("HEAD", "/"),
        ("POST", "/"),
        ("PUT", "/"),
        ("DELETE", "/"),
        ("PATCH", "/"),
        ("OPTIONS", "/"),
        ("OPTIONS", "*"),
        ("PROPFIND", "/"),
        ("M-SEARCH", "/"),
        ("get", "/"),
        ("WITH.ODD!CHARS", "/"),
    ] {
        for body in [b"".as_slice(), b"a body"] {
            stage.upstream.forget();
            let answer = client.round(method, target, &stage.key, &[], body);
            assert_eq!(answer.status(), 200, "{method} {target}");
            let body_back: &[u8] = if method == "HEAD" { b"" } else { b"ok" };
            assert_eq!(answer.body, body_back, "{method}");
            let request = stage.upstream.only();
            assert_eq!((&*request.method, &*request.target), (method, target));
            assert_eq!(request.body, body, "{method}");
            // A request without a body must not look as if it had one.
            assert!(
                !body.is_empty() || !request.head.has("transfer-encoding"),
                "{method}"
            );
        }
    }
    // All over one connection.
    assert_eq!(stage.upstream.connections(), 1);
}

#[test]
fn answers_without_a_body_pass_and_leave_the_connection_usable() {
    let stage = Stage::new(Upstream::manual());
    let mut client = stage.client();
    let cases: [(&str, &str, Option<&str>); 5] = [
        ("HEAD", "200 OK\r\nContent-Length: 1234", Some("1234")),
        ("HEAD", "200 OK\r\nTransfer-Encoding: chunked", None),
        ("GET", "204 No Content", None),
        ("GET", "304 Not Modified\r\nETag: \"x\"", None),
        ("POST", "205 Reset Content\r\nContent-Length: 0", Some("0")),
    ];
    for (method, head, length) in cases {
        client.ask(method, "/", &stage.key, &[], b"");
        stage
            .upstream
            .next()
            .answer(format!("HTTP/1.1 {head}\r\n\r\n"));
        let answer = client.answer();
        let line = head.split("\r\n").next().unwrap();
        assert_eq!(answer.head.line, format!("HTTP/1.1 {line}"), "{method}");
        assert_eq!(answer.header("content-length"), length, "{method} {head}");
        assert_eq!(answer.body, b"");
    }
    client.ask("GET", "/", &stage.key, &[], b"");
    stage.upstream.next().ok();
    assert_eq!(client.answer().body, b"ok");
    assert_eq!(stage.upstream.connections(), 1);
}

/// What bodies are made of: the pieces that they are sent in.
fn bodies() -> Vec<(&'static str, Vec<Vec<u8>>)> {
    let text = "data: {\"text\":\"你好 🌍\"}\n\n".as_bytes();
    // Cut in the middle of characters.
    let split: Vec<Vec<u8>> = text.chunks(5).map(<[u8]>::to_vec).collect();
    // The beginning of a gzip file, and every byte there is.
    let mut gzip = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3];
    gzip.extend((0..40).flat_map(|_| 0..=255u8));
    let line = [b"data: ".as_slice(), &[b'x'; 200_000], b"\n\n"].concat();
    vec![
        ("empty", vec![]),
        ("small", vec![b"hello".to_vec()]),
        (
            "line ends",
            vec![b"\r\n\r\n0\r\n\r\n".to_vec(), b"\n".to_vec()],
        ),
        ("gzip", vec![gzip[..700].to_vec(), gzip[700..].to_vec()]),
        ("split characters", split),
        ("a long line", vec![line]),
        (
            "many",
            (0..500).map(|n| format!("{n},").into_bytes()).collect(),
        ),
    ]
}

/// A message's framing headers and body: with its length, or in chunks.
fn framed(pieces: &[Vec<u8>], in_chunks: bool) -> (String, Vec<u8>) {
    if in_chunks {
        let mut body: Vec<u8> = pieces.iter().flat_map(chunked).collect();
        body.extend(chunked(""));
        return ("Transfer-Encoding: chunked\r\n".to_owned(), body);
    }
    let body = pieces.concat();
    (format!("Content-Length: {}\r\n", body.len()), body)
}

fn check_framing(head: &Head, in_chunks: bool, length: usize, what: &str) {
    if in_chunks {
        assert_eq!(head.value("transfer-encoding"), Some("chunked"), "{what}");
        assert!(!head.has("content-length"), "{what}");
    } else {
        assert_eq!(
            head.value("content-length"),
            Some(&*length.to_string()),
            "{what}"
        );
        assert!(!head.has("transfer-encoding"), "{what}");
    }
}

#[test]
fn bodies_pass_byte_for_byte_in_both_directions() {
    let stage = Stage::new(Upstream::manual());
    let mut client = stage.client();
    for (what, pieces) in bodies() {
        let whole = pieces.concat();
        for in_chunks in [false, true] {
            let (framing, body) = framed(&pieces, in_chunks);
            let head = format!(
                "POST / HTTP/1.1\r\nHost: front\r\nx-api-key: {}\r\n",
                stage.key
            );
            client.send(format!("{head}Content-Encoding: gzip\r\n{framing}\r\n"));
            client.send(&body);
            let mut exchange = stage.upstream.next();
            assert!(exchange.body() == whole, "{what}: the request's body");
            check_framing(&exchange.head, in_chunks, whole.len(), what);
            let head = format!("HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n{framing}\r\n");
            exchange.send([head.as_bytes(), &body].concat());
            exchange.keep();
            let answer = client.answer();
            assert!(answer.body == whole, "{what}: the answer's body");
            check_framing(&answer.head, in_chunks, whole.len(), what);
        }
    }
    assert_eq!(stage.upstream.connections(), 1);
}

#[test]
fn an_answer_that_ends_with_its_connection_comes_whole() {
    let stage = Stage::new(Upstream::manual());
    let mut client = stage.client();
    for version in ["HTTP/1.1", "HTTP/1.0"] {
        client.ask("GET", "/", &stage.key, &[], b"");
        let mut exchange = stage.upstream.next();
        exchange.send(format!(
            "{version} 200 OK\r\nConnection: close\r\n\r\nto the "
        ));
        exchange.send("end");
        exchange.close();
        let answer = client.answer();
        assert_eq!(answer.body, b"to the end");
        assert!(answer.head.line.starts_with("HTTP/1.1 200"));
        // Closing was between the upstream and the forwarder.
        assert!(!answer.head.has("connection"));
    }
    client.ask("GET", "/", &stage.key, &[], b"");
    stage.upstream.next().ok();
    assert_eq!(client.answer().body, b"ok");
}

#[test]
fn the_upstreams_own_errors_pass() {
    let stage = Stage::new(Upstream::manual());
    let mut client = stage.client();
    for status in [
        400, 402, 403, 404, 407, 409, 413, 421, 429, 500, 502, 503, 529,
    ] {
        client.ask("POST", "/", &stage.key, &[], b"{}");
        let body = format!("{{\"error\":{status}}}");
        let headers = [("Retry-After", "7"), ("request-id", "r1")];
        stage
            .upstream
            .next()
            .respond(status, &headers, body.as_bytes());
        let answer = client.answer();
        assert_eq!((answer.status(), answer.text()), (status, body));
        assert_eq!(answer.header("retry-after"), Some("7"));
        assert_eq!(answer.code(), None, "{status}");
    }
}

// As it comes

const CHUNKS: usize = 25;

fn event(number: usize) -> Vec<u8> {
    format!("event: delta\ndata: {{\"n\":{number}}}\n\n").into_bytes()
}

/// Reads on until that much has come: a chunk may be cut, or two be joined.
#[track_caller]
fn expect(what: &[u8], mut piece: impl FnMut() -> Option<Vec<u8>>) {
    let mut come = Vec::new();
    while come.len() < what.len() {
        come.extend(piece().expect("the body ends too early"));
    }
    assert_eq!(come, what);
}

#[test]
fn each_chunk_of_an_answer_passes_before_the_next_is_sent() {
    let stage = Stage::new(Upstream::manual());
    let mut client = stage.client();
    for in_chunks in [true, false] {
        client.ask("GET", "/", &stage.key, &[], b"");
        let mut exchange = stage.upstream.next();
        let length = (0..CHUNKS).map(|n| event(n).len()).sum::<usize>();
        match in_chunks {
            true => exchange.stream(),
            false => {
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n");
                exchange.send(head);
            }
        }
        // The head is there before any of the body.
        assert_eq!(client.head().status(), 200);
        for number in 0..CHUNKS {
            match in_chunks {
                true => exchange.chunk(event(number)),
                false => exchange.send(event(number)),
            }
            expect(&event(number), || client.piece());
        }
        match in_chunks {
            true => exchange.end(),
            false => exchange.keep(),
        }
        assert_eq!(client.piece(), None);
    }

    let mut client = stage.forwarder.http2();
    let (feed, pending) = client.open("GET", "/", &stage.key, &[]);
    feed.end();
    let mut exchange = stage.upstream.next();
    exchange.stream();
    let mut answer = pending.answer();
    for number in 0..CHUNKS {
        exchange.chunk(event(number));
        expect(&event(number), || answer.piece());
    }
    exchange.end();
    assert_eq!(answer.piece(), None);
}

#[test]
fn each_chunk_of_a_request_passes_before_the_next_is_sent() {
    let stage = Stage::new(Upstream::manual());
    let mut client = stage.client();
    for in_chunks in [true, false] {
        let length = (0..CHUNKS).map(|n| event(n).len()).sum::<usize>();
        let framing = match in_chunks {
            true => "Transfer-Encoding: chunked".to_owned(),
            false => format!("Content-Length: {length}"),
        };
        client.send(format!(
            "POST / HTTP/1.1\r\nHost: front\r\nx-api-key: {}\r\n{framing}\r\n\r\n",
            stage.key
        ));
        // The upstream has the head before any of the body.
        let mut exchange = stage.upstream.next();
        for number in 0..CHUNKS {
            match in_chunks {
                true => client.send(chunked(event(number))),
                false => client.send(event(number)),
            }
            expect(&event(number), || exchange.piece());
        }
        if in_chunks {
            client.send(chunked(""));
        }
        assert_eq!(exchange.piece(), None);
        exchange.ok();
        assert_eq!(client.answer().body, b"ok");
    }

    let mut client = stage.forwarder.http2();
    let (feed, pending) = client.open("POST", "/", &stage.key, &[]);
    let mut exchange = stage.upstream.next();
    for number in 0..CHUNKS {
        feed.data(event(number));
        expect(&event(number), || exchange.piece());
    }
    feed.end();
    assert_eq!(exchange.piece(), None);
    exchange.ok();
    assert_eq!(pending.answer().body(), b"ok");
}

#[test]
fn an_answer_may_flow_while_the_request_still_does() {
    let stage = Stage::new(Upstream::manual());
    let mut client = stage.client();
    client.send(format!(
        "POST / HTTP/1.1\r\nHost: front\r\nx-api-key: {}\r\nTransfer-Encoding: chunked\r\n\r\n",
        stage.key
    ));
    let mut exchange = stage.upstream.next();
    exchange.stream();
    assert_eq!(client.head().status(), 200);
    for number in 0..CHUNKS {
        client.send(chunked(event(number)));
        expect(&event(number), || exchange.piece());
        exchange.chunk(event(number));
        expect(&event(number), || client.piece());
    }
    client.send(chunked(""));
    assert_eq!(exchange.piece(), None);
    exchange.end();
    assert_eq!(client.piece(), None);
}

#[test]
fn an_answer_that_comes_before_the_body_is_read_reaches_the_client() {
    let stage = Stage::new(Upstream::manual());
    for ends in [false, true] {
        let mut client = stage.client();
        client.send(format!(
            "POST / HTTP/1.1\r\nHost: front\r\nx-api-key: {}\r\nContent-Length: {}\r\n\r\n",
            stage.key, *BODY
        ));
        let mut sender = Client::over(client.wire.stream.try_clone().unwrap());
        let sending = std::thread::spawn(move || {
            let piece = [b'x'; 64 * 1024];
            while sender.try_send(piece).is_ok() {}
        });
        let mut exchange = stage.upstream.next();
        expect(b"x", || exchange.piece().map(|piece| piece[..1].to_vec()));
        let close = if ends { "Connection: close\r\n" } else { "" };
        exchange.send(format!(
            "HTTP/1.1 429 Slow down\r\n{close}Content-Length: 4\r\n\r\nwait"
        ));
        if ends {
            // As servers do it that want their answer to be read.
            exchange.wire().stream.shutdown(Shutdown::Write).unwrap();
        }
        let lingering = std::thread::spawn(move || exchange.wait_for_close(PATIENCE));
        let answer = client.answer();
        assert_eq!(
            (answer.status(), answer.text()),
            (429, "wait".to_owned()),
            "ends: {ends}"
        );
        drop(client);
        assert!(lingering.join().unwrap().is_some());
        sending.join().unwrap();
    }
}

#[test]
fn a_client_that_reads_only_when_it_has_sent_all_gets_a_long_answer() {
    const LONG: usize = 64 << 20;
    let stage = Stage::new(Upstream::manual());
    let mut client = stage.client();
    client.send(format!(
        "POST / HTTP/1.1\r\nHost: front\r\nx-api-key: {}\r\nContent-Length: {LONG}\r\n\r\n",
        stage.key
    ));
    let mut exchange = stage.upstream.next();
    // The upstream answers from the first byte on, and takes the body besides.
    let mut answering = Client::over(exchange.wire().stream.try_clone().unwrap());
    let answering = std::thread::spawn(move || {
        answering.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {LONG}\r\n\r\n"));
        answering.send(vec![b'y'; LONG]);
    });
    let taking = std::thread::spawn(move || {
        let mut taken = 0;
        while let Some(piece) = exchange.piece() {
            taken += piece.len();
        }
        (taken, exchange)
    });
    client.head();
    client.send(vec![b'x'; LONG]);
    // The exchange is over when it is dropped.
    let (taken, _exchange) = taking.join().unwrap();
    assert_eq!(taken, LONG);
    let mut come = 0;
    while let Some(piece) = client.piece() {
        come += piece.len();
    }
    assert_eq!(come, LONG);
    answering.join().unwrap();
}

#[test]
fn http2_upstreams_take_and_give_chunks_as_they_come() {
    let stage = Stage::new(Upstream::http2());
    for client_speaks_http2 in [false, true] {
        let (mut one, mut two) = (stage.client(), stage.forwarder.http2());
        let (mut feed, mut pending) = (None, None);
        if client_speaks_http2 {
            let (own_feed, own_pending) =
                two.open("POST", "/up?q=1", &stage.key, &[("x-own", "1")]);
            (feed, pending) = (Some(own_feed), Some(own_pending));
        } else {
            one.send(format!(
                "POST /up?q=1 HTTP/1.1\r\nHost: front\r\nX-Own: 1\r\nx-api-key: {}\r\n\
                 Connection: x-drop\r\nX-Drop: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
                stage.key
            ));
        }
        let mut exchange = stage.upstream.next();
        assert_eq!((&*exchange.method, &*exchange.target), ("POST", "/up?q=1"));
        assert_eq!(exchange.values("authorization"), ["Bearer token-of-one"]);
        assert_eq!(exchange.values("x-own"), ["1"]);
        for gone in [
            "x-api-key",
            "x-drop",
            "connection",
            "transfer-encoding",
            "host",
        ] {
            assert!(exchange.values(gone).is_empty(), "{gone}");
        }
        let authority = exchange.head.uri.authority().unwrap().as_str();
        assert_eq!(authority, format!("127.0.0.1:{}", stage.upstream.port));
        for number in 0..CHUNKS {
            match &feed {
                Some(feed) => feed.data(event(number)),
                None => one.send(chunked(event(number))),
            }
            expect(&event(number), || exchange.piece());
        }
        match feed {
            Some(feed) => feed.end(),
            None => one.send(chunked("")),
        }
        assert_eq!(exchange.piece(), None);

        exchange.begin(
            200,
            &[
                ("content-type", "text/event-stream"),
                ("x-back", "caf\u{e9}"),
            ],
        );
        let mut answer = pending.map(proxy::http2::Pending::answer);
        let back = match &answer {
            Some(answer) => answer.header("x-back").map(str::to_owned),
            None => one.head().value("x-back").map(str::to_owned),
        };
        assert_eq!(back.as_deref(), Some("caf\u{e9}"));
        for number in 0..CHUNKS {
            exchange.feed().data(event(number));
            match &mut answer {
                Some(answer) => expect(&event(number), || answer.piece()),
                None => expect(&event(number), || one.piece()),
            }
        }
        exchange.take_feed().end();
        match &mut answer {
            Some(answer) => assert_eq!(answer.piece(), None),
            None => assert_eq!(one.piece(), None),
        }
    }
}

#[test]
fn a_body_of_unknown_length_passes_with_any_method() {
    let stage = Stage::new(Upstream::ok());
    let mut one = stage.client();
    let mut two = stage.forwarder.http2();
    let pieces = [b"a ".to_vec(), b"body".to_vec()];
    let (framing, body) = framed(&pieces, true);
    for method in ["GET", "HEAD", "DELETE", "OPTIONS", "POST"] {
        stage.upstream.forget();
        let key = &stage.key;
        if method == "HEAD" {
            one.expect_no_body();
        }
        one.send(format!(
            "{method} / HTTP/1.1\r\nHost: front\r\nx-api-key: {key}\r\n{framing}\r\n"
        ));
        one.send(&body);
        assert_eq!(one.answer().status(), 200, "{method}");
        assert_eq!(two.ask(method, "/", key, &[], b"a body").status(), 200);
        for request in stage.upstream.wait_for_requests(2) {
            assert_eq!(request.body, b"a body", "{method}");
            check_framing(&request.head, true, 6, method);
        }
    }
}

#[test]
fn http2_requests_without_a_body_have_none_upstream() {
    let stage = Stage::new(Upstream::ok());
    let mut client = stage.forwarder.http2();
    for method in ["GET", "DELETE", "HEAD"] {
        stage.upstream.forget();
        let mut answer = client.ask(method, "/", &stage.key, &[], b"");
        assert_eq!(answer.status(), 200);
        answer.body();
        let head = stage.upstream.only().head;
        assert_eq!(
            head.lines_without(&["host", "authorization"]),
            [""; 0],
            "{method}"
        );
    }
    // A length that is known stays known, one that is not is not made up.
    let length = [("content-length", "5")];
    stage.upstream.forget();
    client
        .ask("POST", "/", &stage.key, &length, b"hello")
        .body();
    let request = stage.upstream.only();
    assert_eq!(request.head.values("content-length"), ["5"]);
    assert_eq!(request.body, b"hello");
}

#[test]
fn many_http2_streams_share_a_connection() {
    let stage = Stage::new(Upstream::manual());
    let mut client = stage.forwarder.http2();
    let count = 50;
    let mut pending: Vec<_> = (0..count)
        .map(|n| {
            let (feed, pending) = client.open("GET", &format!("/{n}"), &stage.key, &[]);
            feed.end();
            pending
        })
        .collect();
    let mut exchanges: Vec<Exchange> = (0..count).map(|_| stage.upstream.next()).collect();
    // Answered in another order than they were asked in.
    exchanges.sort_by_key(|exchange| std::cmp::Reverse(exchange.target.clone()));
    for exchange in exchanges {
        let target = exchange.target.clone();
        exchange.respond(200, &[], target.as_bytes());
    }
    for (n, pending) in pending.drain(..).enumerate() {
        assert_eq!(pending.answer().body(), format!("/{n}").into_bytes());
    }
}

#[test]
fn cookies_that_http2_splits_are_joined_for_http1() {
    let stage = Stage::new(Upstream::ok());
    let mut client = stage.forwarder.http2();
    let cookies = [
        ("cookie", "a=1"),
        ("cookie", "b=2; c=3"),
        ("x-more", "m"),
        ("cookie", "d=4"),
    ];
    assert_eq!(
        client.ask("GET", "/", &stage.key, &cookies, b"").status(),
        200
    );
    let head = stage.upstream.only().head;
    assert_eq!(head.values("cookie"), ["a=1; b=2; c=3; d=4"]);
}

#[test]
fn set_cookie_headers_stay_apart() {
    let stage = Stage::new(Upstream::answering(
        "HTTP/1.1 200 OK\r\nSet-Cookie: a=1; Expires=Thu, 14 Aug 2025 14:00:00 GMT\r\n\
         Set-Cookie: b=2\r\nContent-Length: 0\r\n\r\n",
    ));
    let cookies = ["a=1; Expires=Thu, 14 Aug 2025 14:00:00 GMT", "b=2"];
    assert_eq!(stage.get("/").head.values("set-cookie"), cookies);
    let answer = stage.forwarder.http2().get("/", &stage.key);
    let set: Vec<&str> = answer
        .headers
        .iter()
        .filter(|(name, _)| name == "set-cookie")
        .map(|(_, value)| value.as_str())
        .collect();
    assert_eq!(set, cookies);
}

#[test]
fn trailers_pass_in_both_directions() {
    let expected = [
        ("x-sum".to_owned(), "abc".to_owned()),
        ("x-n".to_owned(), "2".to_owned()),
    ];
    let lower = |trailers: &[(String, String)]| {
        let mut lower: Vec<(String, String)> = trailers
            .iter()
            .map(|(name, value)| (name.to_ascii_lowercase(), value.clone()))
            .collect();
        lower.sort_by_key(|(name, _)| std::cmp::Reverse(name.clone()));
        lower
    };
    let named = [("trailer", "x-sum, x-n"), ("te", "trailers")];
    let sent = [("x-sum", "abc"), ("x-n", "2")];

    let one = Stage::new(Upstream::manual());
    let two = Stage::new(Upstream::http2());
    for front_http2 in [false, true] {
        for back_http2 in [false, true] {
            let what = format!("HTTP/2 in front: {front_http2}, behind: {back_http2}");
            let (forwarder, key) = match back_http2 {
                true => (&two.forwarder, &two.key),
                false => (&one.forwarder, &one.key),
            };
            let (mut first, mut second) = (forwarder.client(), forwarder.http2());
            let pending = if front_http2 {
                let (feed, pending) = second.open("POST", "/", key, &named);
                feed.data("body");
                feed.end_with_trailers(&sent);
                Some(pending)
            } else {
                first.send(format!(
                    "POST / HTTP/1.1\r\nHost: front\r\nx-api-key: {key}\r\nTrailer: X-Sum, X-N\r\n\
                     TE: trailers\r\nConnection: TE\r\nTransfer-Encoding: chunked\r\n\r\n\
                     4\r\nbody\r\n0\r\nX-Sum: abc\r\nX-N: 2\r\n\r\n"
                ));
                None
            };
            if back_http2 {
                let mut exchange = two.upstream.next();
                assert_eq!(exchange.body(), b"body", "{what}");
                assert_eq!(lower(exchange.trailers()), expected, "{what}");
                assert_eq!(exchange.values("te"), ["trailers"], "{what}");
                exchange.begin(200, &named[..1]);
                exchange.feed().data("back");
                exchange.take_feed().end_with_trailers(&sent);
            } else {
                let mut exchange = one.upstream.next();
                assert_eq!(exchange.body(), b"body", "{what}");
                let request = one.upstream.requests().pop().unwrap();
                assert_eq!(lower(&request.trailers), expected, "{what}");
                assert_eq!(exchange.head.values("te"), ["trailers"], "{what}");
                exchange.send(
                    "HTTP/1.1 200 OK\r\nTrailer: X-Sum, X-N\r\nTransfer-Encoding: chunked\r\n\r\n",
                );
                exchange.chunk("back");
                exchange.end_with_trailers(&["X-Sum: abc", "X-N: 2"]);
            }
            match pending {
                Some(pending) => {
                    let mut answer = pending.answer();
                    assert_eq!(answer.body(), b"back", "{what}");
                    assert_eq!(lower(answer.trailers()), expected, "{what}");
                }
                None => {
                    let answer = first.answer();
                    assert_eq!(answer.body, b"back", "{what}");
                    assert_eq!(lower(&answer.trailers), expected, "{what}");
                }
            }
        }
    }
}

#[test]
fn trailers_of_an_answer_bring_no_headers_in() {
    let stage = Stage::new(Upstream::answering(
        "HTTP/1.1 200 OK\r\nTrailer: X-Sum, X-Named, X-Mpool-Error, Connection, Keep-Alive\r\n\
         Transfer-Encoding: chunked\r\n\r\n4\r\nback\r\n0\r\nX-Sum: 1\r\nX-Named: 1\r\n\
         X-Mpool-Error: NOKEY\r\nConnection: x-named\r\nKeep-Alive: timeout=5\r\n\r\n",
    ));
    let expected = [("x-sum".to_owned(), "1".to_owned())];
    let headers = [("TE", "trailers")];
    let answer = stage.client().round("GET", "/", &stage.key, &headers, b"");
    assert_eq!(answer.text(), "back");
    let [(name, value)] = &answer.trailers[..] else {
        panic!("{:?}", answer.trailers);
    };
    assert_eq!(
        (name.to_ascii_lowercase(), value),
        (expected[0].0.clone(), &expected[0].1)
    );
    let mut client = stage.forwarder.http2();
    let mut answer = client.get("/", &stage.key);
    assert_eq!(answer.body(), b"back");
    assert_eq!(answer.trailers()[..], expected);
}

// Expect: 100-continue

const EXPECTING: [(&str, &str); 2] = [("Expect", "100-continue"), ("Content-Length", "5")];

#[test]
fn a_body_is_called_for_when_the_upstream_calls_for_it() {
    let stage = Stage::new(Upstream::manual());
    let mut client = stage.client();
    for _ in 0..2 {
        client.ask("POST", "/", &stage.key, &EXPECTING, b"");
        let mut exchange = stage.upstream.next();
        assert_eq!(exchange.head.values("expect"), ["100-continue"]);
        exchange.send("HTTP/1.1 100 Continue\r\n\r\n");
        assert_eq!(client.wire.head().unwrap().unwrap().status(), 100);
        client.send("hello");
        assert_eq!(exchange.body(), b"hello");
        exchange.ok();
        let answer = client.answer();
        assert_eq!(
            (answer.body.as_slice(), answer.before.len()),
            (&b"ok"[..], 0)
        );
    }
}

#[test]
fn a_body_is_called_for_when_the_upstream_stays_silent() {
    let stage = Stage::new(Upstream::manual());
    let mut client = stage.client();
    let began = Instant::now();
    client.ask("POST", "/", &stage.key, &EXPECTING, b"");
    let mut exchange = stage.upstream.next();
    assert_eq!(client.wire.head().unwrap().unwrap().status(), 100);
    // Not at once, which would be before the upstream could refuse.
    assert!(began.elapsed() >= Duration::from_millis(900));
    client.send("hello");
    assert_eq!(exchange.body(), b"hello");
    exchange.ok();
    assert_eq!(client.answer().body, b"ok");
}

#[test]
fn a_body_that_the_upstream_does_not_want_is_not_called_for() {
    let stage = Stage::new(Upstream::manual());
    for status in [417, 403, 200] {
        let mut client = stage.client();
        client.ask("POST", "/", &stage.key, &EXPECTING, b"");
        let mut exchange = stage.upstream.next();
        exchange.send(format!(
            "HTTP/1.1 {status} Answer\r\nContent-Length: 2\r\n\r\nno"
        ));
        let answer = client.answer();
        assert_eq!(answer.status(), status);
        assert_eq!(answer.before, [""; 0], "{status}: no 100");
        assert_eq!(answer.text(), "no");
        assert!(!stage.upstream.requests().pop().unwrap().whole, "{status}");
        assert_eq!(answer.head.value("connection"), Some("close"), "{status}");
    }
}

#[test]
fn a_body_that_comes_without_being_called_for_passes() {
    let stage = Stage::new(Upstream::ok());
    let mut client = stage.client();
    let key = &stage.key;
    client.send(request(
        "POST",
        "/",
        key,
        &[("Expect", "100-continue")],
        b"hello",
    ));
    assert_eq!(client.answer().body, b"ok");
    assert_eq!(stage.upstream.only().body, b"hello");
}

#[test]
fn other_expectations_pass() {
    let stage = Stage::new(Upstream::ok());
    let mut client = stage.client();
    client.send(request(
        "POST",
        "/",
        &stage.key,
        &[("Expect", "the-best")],
        b"hello",
    ));
    assert_eq!(client.answer().body, b"ok");
    assert_eq!(stage.upstream.only().head.values("expect"), ["the-best"]);
}

#[test]
fn a_client_whose_key_is_refused_is_not_asked_for_its_body() {
    let stage = Stage::new(Upstream::ok());
    let mut client = stage.client();
    client.ask("POST", "/", "sk-cli-v1-nobody", &EXPECTING, b"");
    let answer = client.answer();
    assert_eq!((answer.status(), answer.code()), (401, Some("NOKEY")));
    assert_eq!(answer.before, [""; 0]);
    assert_eq!(answer.head.value("connection"), Some("close"));
    assert_eq!(stage.upstream.count(), 0);
}

// Connections

#[test]
fn pipelined_requests_are_answered_in_order() {
    let stage = Stage::new(Upstream::manual());
    let mut client = stage.client();
    let targets = ["/1", "/2", "/3", "/4", "/5"];
    let bodies: [&[u8]; 5] = [b"", b"body of two", b"", b"GET /no HTTP/1.1\r\n\r\n", b""];
    let all: Vec<u8> = targets
        .iter()
        .zip(bodies)
        .flat_map(|(target, body)| {
            let method = if body.is_empty() { "GET" } else { "POST" };
            request(method, target, &stage.key, &[], body)
        })
        .collect();
    client.send(all);
    for (target, body) in targets.into_iter().zip(bodies) {
        let mut exchange = stage.upstream.next();
        assert_eq!(exchange.target, target);
        assert_eq!(exchange.body(), body);
        exchange.stream();
        exchange.chunk(format!("answer to {target}"));
        exchange.end();
        assert_eq!(client.answer().text(), format!("answer to {target}"));
    }
    assert_eq!(stage.upstream.count(), targets.len());
}

#[test]
fn http10_clients_get_answers_that_they_understand() {
    let stage = Stage::new(Upstream::manual());
    let key = &stage.key;
    for (headers, stays) in [("", false), ("Connection: keep-alive\r\n", true)] {
        let mut client = stage.client();
        let rounds = if stays { 2 } else { 1 };
        for _ in 0..rounds {
            client.send(format!(
                "GET /old HTTP/1.0\r\nx-api-key: {key}\r\n{headers}\r\n"
            ));
            let exchange = stage.upstream.next();
            assert_eq!(exchange.head.line, "GET /old HTTP/1.1");
            let host = format!("127.0.0.1:{}", stage.upstream.port);
            assert_eq!(exchange.head.values("host"), [host]);
            exchange.ok();
            let answer = client.answer();
            assert_eq!((answer.status(), answer.text()), (200, "ok".to_owned()));
        }
        if !stays {
            assert!(client.wait_for_close(PATIENCE).is_some());
        }
    }
    // Chunks are not for them: the body ends with the connection.
    let mut client = stage.client();
    client.send(format!(
        "GET / HTTP/1.0\r\nx-api-key: {key}\r\nConnection: keep-alive\r\n\r\n"
    ));
    let mut exchange = stage.upstream.next();
    exchange.stream();
    exchange.chunk("one");
    exchange.chunk("two");
    exchange.end();
    let answer = client.answer();
    assert!(!answer.head.has("transfer-encoding"), "{answer:?}");
    assert_eq!(answer.text(), "onetwo");
}

#[test]
fn connections_to_the_upstream_are_used_again() {
    let stage = Stage::with(Upstream::ok(), &["--threads", "1"]);
    for _ in 0..20 {
        assert_eq!(stage.get("/").status(), 200);
    }
    assert_eq!(stage.upstream.connections(), 1);
    // One that the upstream closed in the meantime is no client's business.
    for round in 0..5 {
        stage.upstream.close_connections();
        assert_eq!(stage.get("/").status(), 200, "{round}");
        let answer = stage.client().round("POST", "/", &stage.key, &[], b"once");
        assert_eq!(answer.status(), 200, "{round}");
    }
}

#[test]
fn what_an_upstream_sends_beyond_an_answer_is_nobodys() {
    let stage = Stage::with(Upstream::manual(), &["--threads", "1"]);
    let whole = |text: &str| {
        let length = text.len();
        format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{text}")
    };
    let mut client = stage.client();
    for (round, beyond) in ["x".into(), whole("evil"), whole("")].iter().enumerate() {
        client.ask("GET", "/", &stage.key, &[], b"");
        let mut exchange = stage.upstream.next();
        exchange.send(whole("one") + beyond);
        assert_eq!(client.answer().text(), "one");
        assert_eq!(stage.upstream.connections(), round + 1);
    }
    client.ask("GET", "/", &stage.key, &[], b"");
    stage.upstream.next().send(whole("two"));
    assert_eq!(client.answer().text(), "two");
    assert_eq!(stage.upstream.connections(), 4);
}

// Answers that break off

/// How an upstream's answer ends too early, and what was sent of it.
const BREAKS: [(&str, &str); 4] = [
    ("Content-Length: 100", "half"),
    ("Transfer-Encoding: chunked", "4\r\nhalf\r\n"),
    ("Transfer-Encoding: chunked", "8\r\nhalf"),
    ("Transfer-Encoding: chunked", "4\r\nhalf\r\nxyz\r\n"),
];

#[test]
fn an_answer_that_breaks_off_never_looks_whole() {
    let stage = Stage::new(Upstream::manual());
    for (framing, sent) in BREAKS {
        for reset in [false, true] {
            let mut client = stage.client();
            client.ask("GET", "/", &stage.key, &[], b"");
            let mut exchange = stage.upstream.next();
            exchange.send(format!("HTTP/1.1 200 OK\r\n{framing}\r\n\r\n{sent}"));
            client.head();
            expect(b"half", || client.piece());
            match reset {
                true => exchange.reset(),
                false => exchange.close(),
            }
            let broken = client.try_rest().expect_err("it looks whole");
            assert!(!broken.timed_out(), "{framing}: the client is left waiting");

            let mut client = stage.forwarder.http2();
            let (feed, pending) = client.open("GET", "/", &stage.key, &[]);
            feed.end();
            let mut exchange = stage.upstream.next();
            exchange.send(format!("HTTP/1.1 200 OK\r\n{framing}\r\n\r\n{sent}"));
            let mut answer = pending.answer();
            expect(b"half", || answer.piece());
            match reset {
                true => exchange.reset(),
                false => exchange.close(),
            }
            let broken = answer.try_piece().expect_err("it looks whole");
            assert!(!broken.contains("nothing came"), "{framing}: {broken}");
            // The streams beside it go on.
            let (feed, pending) = client.open("GET", "/", &stage.key, &[]);
            feed.end();
            stage.upstream.next().ok();
            assert_eq!(pending.answer().body(), b"ok");
        }
    }
}

#[test]
fn an_http2_stream_that_breaks_off_never_looks_whole() {
    let stage = Stage::new(Upstream::http2());
    let mut client = stage.client();
    client.ask("GET", "/", &stage.key, &[], b"");
    let mut exchange = stage.upstream.next();
    exchange.begin(200, &[]);
    exchange.feed().data("half");
    client.head();
    expect(b"half", || client.piece());
    exchange.take_feed().reset();
    let broken = client.try_rest().expect_err("it looks whole");
    assert!(!broken.timed_out(), "the client is left waiting");

    let mut client = stage.forwarder.http2();
    let (feed, pending) = client.open("GET", "/", &stage.key, &[]);
    feed.end();
    let mut exchange = stage.upstream.next();
    exchange.begin(200, &[]);
    exchange.feed().data("half");
    let mut answer = pending.answer();
    expect(b"half", || answer.piece());
    exchange.take_feed().reset();
    answer.try_piece().expect_err("it looks whole");
}

#[test]
fn a_request_that_breaks_off_never_looks_whole() {
    let stage = Stage::new(Upstream::manual());
    for (framing, sent) in BREAKS {
        let mut client = stage.client();
        client.send(format!(
            "POST / HTTP/1.1\r\nHost: front\r\nx-api-key: {}\r\n{framing}\r\n\r\n{sent}",
            stage.key
        ));
        let mut exchange = stage.upstream.next();
        expect(b"half", || exchange.piece());
        client.leave();
        let end = exchange.try_piece();
        assert!(end.is_err(), "{framing}: {end:?}");
    }
    let mut client = stage.forwarder.http2();
    let (feed, pending) = client.open("POST", "/", &stage.key, &[]);
    let mut exchange = stage.upstream.next();
    feed.data("half");
    expect(b"half", || exchange.piece());
    feed.reset();
    let end = exchange.try_piece();
    assert!(end.is_err(), "{end:?}");
    assert!(pending.try_answer().is_err());
}

// Much at once

/// Bytes that say where they belong: any that is lost, doubled or moved shows.
struct Pattern {
    at: usize,
}

/// It begins again after a length that no buffer's is a multiple of.
static BLOCK: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut state = 1u32;
    let bytes = (0..1_000_003).map(|_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    });
    bytes.collect()
});

impl Pattern {
    fn new() -> Self {
        Self::from(0)
    }

    /// What comes after so many bytes.
    fn from(position: u64) -> Self {
        let at = (position % BLOCK.len() as u64) as usize;
        Self { at }
    }

    /// The next bytes, at most so many.
    fn take(&mut self, most: usize) -> &'static [u8] {
        let count = most.min(BLOCK.len() - self.at);
        let begin = self.at;
        self.at = (self.at + count) % BLOCK.len();
        &BLOCK[begin..begin + count]
    }

    #[track_caller]
    fn check(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            let expected = self.take(data.len());
            let (here, rest) = data.split_at(expected.len());
            assert!(here == expected, "other bytes than were sent");
            data = rest;
        }
    }

    /// Hands out so many bytes, in pieces of 64 KiB or less.
    fn each(mut self, total: u64, mut send: impl FnMut(&[u8])) {
        let mut left = total;
        while left > 0 {
            let piece = self.take(left.min(64 * 1024) as usize);
            left -= piece.len() as u64;
            send(piece);
        }
    }
}

/// Runs what must not make the forwarder grow by more than `most` MiB.
#[track_caller]
fn with_flat_memory<U: proxy::Target>(stage: &Stage<U>, most: u64, work: impl FnOnce()) {
    stage.forwarder.forget_peak();
    let before = stage.forwarder.memory().now;
    work();
    let grown = stage.forwarder.memory().peak.saturating_sub(before) / 1024;
    println!("grew by {grown} MiB");
    assert!(grown < most, "it grew by {grown} MiB");
}

const MUCH: u64 = 100 * MIB;

#[test]
fn a_hundred_megabytes_go_up_and_down_with_flat_memory() {
    let stage = Stage::new(Upstream::start(|mut exchange| {
        let mut pattern = Pattern::new();
        let length = exchange.drain(|data| pattern.check(data));
        match exchange.target.as_str() {
            "/up" => exchange.respond(200, &[], length.to_string().as_bytes()),
            target => {
                let in_chunks = target == "/chunks";
                let framing = match in_chunks {
                    true => "Transfer-Encoding: chunked".to_owned(),
                    false => format!("Content-Length: {MUCH}"),
                };
                exchange.send(format!("HTTP/1.1 200 OK\r\n{framing}\r\n\r\n"));
                Pattern::new().each(MUCH, |data| match in_chunks {
                    true => exchange.chunk(data),
                    false => exchange.send(data),
                });
                match in_chunks {
                    true => exchange.end(),
                    false => exchange.keep(),
                }
            }
        }
    }));
    let mut client = stage.client();
    let key = &stage.key;
    client.round("POST", "/up", key, &[], b"");
    with_flat_memory(&stage, 40, || {
        for in_chunks in [false, true] {
            let framing = match in_chunks {
                true => "Transfer-Encoding: chunked".to_owned(),
                false => format!("Content-Length: {MUCH}"),
            };
            client.send(format!(
                "POST /up HTTP/1.1\r\nHost: front\r\nx-api-key: {key}\r\n{framing}\r\n\r\n"
            ));
            Pattern::new().each(MUCH, |data| match in_chunks {
                true => client.send(chunked(data)),
                false => client.send(data),
            });
            if in_chunks {
                client.send(chunked(""));
            }
            assert_eq!(client.answer().text(), MUCH.to_string());
        }
        for target in ["/chunks", "/length"] {
            client.ask("GET", target, key, &[], b"");
            assert_eq!(client.head().status(), 200);
            let mut pattern = Pattern::new();
            assert_eq!(client.drain(|data| pattern.check(data)), MUCH, "{target}");
        }
    });
}

#[test]
fn much_goes_up_and_down_over_http2_with_flat_memory() {
    const PART: u64 = 32 * MIB;
    let stage = Stage::new(Http2Upstream::start(|mut exchange| {
        let (mut pattern, mut length) = (Pattern::new(), 0);
        while let Some(data) = exchange.piece() {
            pattern.check(&data);
            length += data.len();
        }
        if exchange.target == "/up" {
            return exchange.respond(200, &[], length.to_string().as_bytes());
        }
        exchange.begin(200, &[]);
        let feed = exchange.take_feed();
        Pattern::new().each(PART, |data| feed.data(data));
        feed.end();
    }));
    let mut client = stage.forwarder.http2();
    let key = &stage.key;
    client.get("/up", key).body();
    with_flat_memory(&stage, 40, || {
        let (feed, pending) = client.open("POST", "/up", key, &[]);
        Pattern::new().each(PART, |data| feed.data(data));
        feed.end();
        assert_eq!(pending.answer().body(), PART.to_string().into_bytes());

        let (mut pattern, mut length) = (Pattern::new(), 0);
        let mut answer = client.get("/down", key);
        while let Some(data) = answer.piece() {
            pattern.check(&data);
            length += data.len() as u64;
        }
        assert_eq!(length, PART);
    });
}

/// Sends until nobody takes any more for a while: how much went.
fn send_until_blocked(stream: &mut std::net::TcpStream, most: u64) -> u64 {
    stream
        .set_write_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    let mut sent = 0;
    loop {
        // A write may take a part of what it is given.
        match stream.write(Pattern::from(sent).take(64 * 1024)) {
            Ok(count) => sent += count as u64,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}");
                stream.set_write_timeout(Some(PATIENCE)).unwrap();
                return sent;
            }
        }
        assert!(sent < most, "{sent} bytes went and nobody read them");
    }
}

/// As much as all socket buffers on the way together take: two connections have one on
/// either side.
static BUFFERS: LazyLock<u64> = LazyLock::new(|| {
    let largest = |name| {
        let sizes = fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).ok();
        let largest = sizes.and_then(|sizes| sizes.split_whitespace().last()?.parse().ok());
        largest.unwrap_or(6 * MIB)
    };
    2 * (largest("tcp_rmem") + largest("tcp_wmem")) + MIB
});
/// A body that does not fit into them.
static BODY: LazyLock<u64> = LazyLock::new(|| *BUFFERS + 8 * MIB);

#[test]
fn a_client_that_does_not_read_stops_the_upstream() {
    let stage = Stage::new(Upstream::manual());
    let mut client = stage.client();
    client.ask("GET", "/", &stage.key, &[], b"");
    let mut exchange = stage.upstream.next();
    exchange.send(format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n",
        *BODY
    ));
    let mut sent = 0;
    with_flat_memory(&stage, 20, || {
        sent = send_until_blocked(&mut exchange.wire().stream, *BUFFERS);
    });
    println!("{sent} bytes went before it stopped");
    // Nothing is lost when it reads on.
    let rest = std::thread::spawn(move || {
        Pattern::from(sent).each(*BODY - sent, |piece| exchange.send(piece));
        exchange.keep();
    });
    client.head();
    let mut pattern = Pattern::new();
    assert_eq!(client.drain(|data| pattern.check(data)), *BODY);
    rest.join().unwrap();
}

#[test]
fn an_upstream_that_does_not_read_stops_the_client() {
    let stage = Stage::new(Upstream::manual());
    let mut client = stage.client();
    client.send(format!(
        "POST / HTTP/1.1\r\nHost: front\r\nx-api-key: {}\r\nContent-Length: {}\r\n\r\n",
        stage.key, *BODY
    ));
    let mut exchange = stage.upstream.next();
    let mut sent = 0;
    // What may be needed for sending it again is kept, up to 8 MiB.
    with_flat_memory(&stage, 30, || {
        sent = send_until_blocked(&mut client.wire.stream, *BUFFERS);
    });
    println!("{sent} bytes went before it stopped");
    let reader = std::thread::spawn(move || {
        let mut pattern = Pattern::new();
        let length = exchange.drain(|data| pattern.check(data));
        exchange.respond(200, &[], length.to_string().as_bytes());
    });
    Pattern::from(sent).each(*BODY - sent, |piece| client.send(piece));
    assert_eq!(client.answer().text(), BODY.to_string());
    reader.join().unwrap();
}

#[test]
fn a_download_without_an_end_leaves_the_others_their_turns() {
    let upstream = Upstream::start(|mut exchange| match &*exchange.target {
        "/endless" => {
            exchange.stream();
            let chunk = chunked(vec![b'x'; 1 << 20]);
            while exchange.try_send(&chunk).is_ok() {}
        }
        _ => exchange.ok(),
    });
    let stage = Stage::with(upstream, &["--threads", "1"]);
    let mut endless = stage.client();
    endless.ask("GET", "/endless", &stage.key, &[], b"");
    endless.head();
    let (come, over) = (
        Arc::new(AtomicU64::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    let taking = std::thread::spawn({
        let (come, over) = (Arc::clone(&come), Arc::clone(&over));
        move || {
            let mut buffer = vec![0; 1 << 20];
            while !over.load(Ordering::Relaxed) {
                let read = endless.wire.stream.read(&mut buffer).unwrap();
                come.fetch_add(read as u64, Ordering::Relaxed);
            }
        }
    });
    // Counted in bytes of the other's, and not in time, as machines differ.
    let mut client = stage.client();
    std::thread::sleep(Duration::from_millis(300));
    let mut waits: Vec<u64> = (0..100)
        .map(|_| {
            std::thread::sleep(Duration::from_millis(1));
            let before = come.load(Ordering::Relaxed);
            assert_eq!(client.get("/", &stage.key).text(), "ok");
            come.load(Ordering::Relaxed) - before
        })
        .collect();
    over.store(true, Ordering::Relaxed);
    taking.join().unwrap();
    waits.sort_unstable();
    let median = waits[waits.len() / 2];
    assert!(median < 40 * MIB, "{} MiB", median / MIB);
}

#[test]
fn all_requests_that_come_at_once_are_on_their_way_before_any_is_answered() {
    const MANY: usize = 300;
    let all = Arc::new(Barrier::new(MANY));
    let upstream = Upstream::start(move |exchange| {
        all.wait();
        exchange.ok();
    });
    let stage = Stage::with(upstream, &["--threads", "1"]);
    let mut clients: Vec<Client> = (0..MANY).map(|_| stage.client()).collect();
    stage.forwarder.signal("STOP");
    for client in &mut clients {
        client.ask("GET", "/", &stage.key, &[], b"");
    }
    stage.forwarder.signal("CONT");
    for mut client in clients {
        assert_eq!(client.answer().text(), "ok");
    }
}

#[test]
fn requests_that_have_come_before_the_end_is_asked_for_are_answered() {
    let mut stage = Stage::with(Upstream::ok(), &["--threads", "1"]);
    let mut clients: Vec<Client> = (0..300).map(|_| stage.client()).collect();
    for client in &mut clients {
        assert_eq!(client.get("/", &stage.key).text(), "ok");
    }
    stage.forwarder.signal("STOP");
    for client in &mut clients {
        client.ask("GET", "/", &stage.key, &[], b"");
    }
    stage.forwarder.signal("TERM");
    stage.forwarder.signal("CONT");
    for client in &mut clients {
        assert_eq!(client.answer().text(), "ok");
    }
    assert_eq!(stage.forwarder.wait(), 0);
}

#[test]
fn an_http2_client_that_does_not_read_stops_its_stream_alone() {
    let stage = Stage::new(Upstream::manual());
    let mut client = stage.forwarder.http2();
    let (feed, pending) = client.open("GET", "/slow", &stage.key, &[]);
    feed.end();
    let mut exchange = stage.upstream.next();
    exchange.send(format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n",
        *BODY
    ));
    let mut answer = pending.answer();
    with_flat_memory(&stage, 20, || {
        send_until_blocked(&mut exchange.wire().stream, *BUFFERS);
    });
    let (feed, pending) = client.open("GET", "/quick", &stage.key, &[]);
    feed.end();
    stage.upstream.next().ok();
    assert_eq!(pending.answer().body(), b"ok");
    assert!(answer.piece().is_some());
}

// The client goes

type Stages = (Stage<Upstream>, Stage<Http2Upstream>);

/// Ways for a client to go, each answering how long it took until the upstream
/// saw it.
type Way = fn(&Stages) -> Option<Duration>;

fn since(left: Instant, seen: Option<Instant>) -> Option<Duration> {
    seen.map(|seen| seen.saturating_duration_since(left))
}

fn begun(stage: &Stage<Upstream>) -> (Client, Exchange) {
    let mut client = stage.client();
    client.ask("GET", "/", &stage.key, &[], b"");
    let mut exchange = stage.upstream.next();
    exchange.stream();
    exchange.chunk("first");
    client.head();
    expect(b"first", || client.piece());
    (client, exchange)
}

fn uploading(stage: &Stage<Upstream>, framing: &str, body: &[u8]) -> (Client, Exchange) {
    let mut client = stage.client();
    let key = &stage.key;
    let head = format!("POST / HTTP/1.1\r\nHost: front\r\nx-api-key: {key}\r\n{framing}\r\n\r\n");
    client.send([head.as_bytes(), body].concat());
    let exchange = stage.upstream.next();
    (client, exchange)
}

const WAYS: [(&str, Way); 14] = [
    ("closes before the first byte", |(stage, _)| {
        let mut client = stage.client();
        client.ask("GET", "/", &stage.key, &[], b"");
        let mut exchange = stage.upstream.next();
        since(client.leave(), exchange.wait_for_close(GONE_AT_LAST))
    }),
    ("closes in mid-stream", |(stage, _)| {
        let (client, mut exchange) = begun(stage);
        since(client.leave(), exchange.wait_for_close(GONE_AT_LAST))
    }),
    ("resets before the first byte", |(stage, _)| {
        let mut client = stage.client();
        client.ask("GET", "/", &stage.key, &[], b"");
        let mut exchange = stage.upstream.next();
        let left = Instant::now();
        client.wire.reset();
        since(left, exchange.wait_for_close(GONE_AT_LAST))
    }),
    ("resets in mid-stream", |(stage, _)| {
        let (client, mut exchange) = begun(stage);
        let left = Instant::now();
        client.wire.reset();
        since(left, exchange.wait_for_close(GONE_AT_LAST))
    }),
    (
        "goes after its body, before the first byte",
        |(stage, _)| {
            let (client, mut exchange) = uploading(stage, "Content-Length: 4", b"body");
            assert_eq!(exchange.body(), b"body");
            since(client.leave(), exchange.wait_for_close(GONE_AT_LAST))
        },
    ),
    ("goes while it uploads", |(stage, _)| {
        let (client, mut exchange) = uploading(stage, "Content-Length: 100", b"half");
        expect(b"half", || exchange.piece());
        since(client.leave(), exchange.wait_for_close(GONE_AT_LAST))
    }),
    ("goes while it uploads chunks", |(stage, _)| {
        let (client, mut exchange) =
            uploading(stage, "Transfer-Encoding: chunked", b"4\r\nhalf\r\n");
        expect(b"half", || exchange.piece());
        since(client.leave(), exchange.wait_for_close(GONE_AT_LAST))
    }),
    (
        "goes with another request under way behind",
        |(stage, _)| {
            let (mut client, mut exchange) = begun(stage);
            client.send(request("GET", "/next", &stage.key, &[], b""));
            since(client.leave(), exchange.wait_for_close(GONE_AT_LAST))
        },
    ),
    ("goes with much of the answer unread", |(stage, _)| {
        let (client, mut exchange) = begun(stage);
        let stream = &mut exchange.wire().stream;
        stream.write_all(b"10000000\r\n").unwrap();
        send_until_blocked(stream, *BUFFERS);
        since(client.leave(), exchange.wait_for_close(GONE_AT_LAST))
    }),
    (
        "resets an HTTP/2 stream before the first byte",
        |(stage, _)| {
            let mut client = stage.forwarder.http2();
            let (feed, pending) = client.open("GET", "/", &stage.key, &[]);
            feed.end();
            let mut exchange = stage.upstream.next();
            let left = Instant::now();
            drop(pending);
            let seen = exchange.wait_for_close(GONE_AT_LAST);
            // The connection goes on.
            let (feed, pending) = client.open("GET", "/", &stage.key, &[]);
            feed.end();
            stage.upstream.next().ok();
            assert_eq!(pending.answer().body(), b"ok");
            since(left, seen)
        },
    ),
    ("resets an HTTP/2 stream in mid-stream", |(stage, _)| {
        let mut client = stage.forwarder.http2();
        let (feed, pending) = client.open("GET", "/", &stage.key, &[]);
        feed.end();
        let mut exchange = stage.upstream.next();
        exchange.stream();
        exchange.chunk("first");
        let mut answer = pending.answer();
        expect(b"first", || answer.piece());
        let left = Instant::now();
        drop(answer);
        since(left, exchange.wait_for_close(GONE_AT_LAST))
    }),
    ("closes an HTTP/2 connection", |(stage, _)| {
        let mut client = stage.forwarder.http2();
        let (feed, pending) = client.open("POST", "/", &stage.key, &[]);
        feed.data("half");
        let mut exchange = stage.upstream.next();
        expect(b"half", || exchange.piece());
        let left = Instant::now();
        drop(client);
        let seen = exchange.wait_for_close(GONE_AT_LAST);
        drop((feed, pending));
        since(left, seen)
    }),
    (
        "closes before an HTTP/2 upstream's first byte",
        |(_, stage)| {
            let mut client = stage.client();
            client.ask("GET", "/", &stage.key, &[], b"");
            let mut exchange = stage.upstream.next();
            since(client.leave(), exchange.wait_for_close(GONE_AT_LAST))
        },
    ),
    (
        "closes in mid-stream of an HTTP/2 upstream",
        |(_, stage)| {
            let mut client = stage.client();
            client.ask("GET", "/", &stage.key, &[], b"");
            let mut exchange = stage.upstream.next();
            exchange.begin(200, &[]);
            exchange.feed().data("first");
            client.head();
            expect(b"first", || client.piece());
            since(client.leave(), exchange.wait_for_close(GONE_AT_LAST))
        },
    ),
];

fn all_ways(rounds: usize) {
    let stages = (
        Stage::new(Upstream::manual()),
        Stage::new(Upstream::http2()),
    );
    let mut late = Vec::new();
    for (what, way) in WAYS {
        // Here each round waits for buffers to fill.
        let rounds = match what.contains("unread") {
            true if rounds < 100 => 1,
            _ => rounds,
        };
        let mut times: Vec<Duration> = (0..rounds)
            .map(|_| way(&stages).unwrap_or(GONE_AT_LAST))
            .collect();
        times.sort();
        let (median, most) = (times[rounds / 2], times[rounds - 1]);
        let within = times.iter().filter(|time| **time <= GONE_WITHIN).count();
        println!("{within:3} of {rounds} in time, median {median:9.1?}, most {most:9.1?}: {what}");
        if within < rounds {
            late.push(what);
        }
    }
    assert!(late.is_empty(), "the upstream saw it too late: {late:#?}");
    // And nothing is left open by those who went.
    let (one, _) = &stages;
    wait_for("the upstream's connections to close", || {
        (one.upstream.open_connections() <= 4).then_some(())
    });
}

#[test]
fn the_upstream_sees_at_once_that_a_client_has_gone() {
    all_ways(5);
}

/// `cargo test --test forwarder_http -- --ignored --nocapture client_gone_100_times`
#[test]
#[ignore = "takes a minute and prints figures"]
fn client_gone_100_times() {
    all_ways(100);
}

#[test]
fn a_client_that_goes_before_its_body_is_wanted_frees_everything() {
    let stage = Stage::new(Upstream::manual());
    for in_full in [false, true] {
        // An upstream that reads nothing, and more of a body than it has taken.
        let (mut client, mut exchange) = uploading(&stage, "Content-Length: 1000000000", b"half");
        if in_full {
            send_until_blocked(&mut client.wire.stream, *BUFFERS);
        } else {
            client.send(vec![b'x'; 100_000]);
        }
        let left = Instant::now();
        client.wire.reset();
        let seen = since(left, exchange.wait_for_close(PATIENCE));
        println!("in full {in_full}: {seen:?}");
        assert!(
            seen.is_some_and(|time| time <= GONE_WITHIN),
            "{in_full}: {seen:?}"
        );
    }
}
