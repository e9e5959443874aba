//! The official SDKs of two providers, for Python and for Node, as the
//! forwarder's clients, with the demo upstream behind it. Each program of
//! tests/sdks/ calls, streams, and reads the forwarder's own errors; what it
//! found it prints, and it is judged here.
//!
//! The SDKs come from `scripts/install-deps test`.

mod proxy;
mod support;
mod typed;

use proxy::Forwarder;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use support::{Client, DAY, Options, Server, repository};
use typed::{Terminal, installed_packages, program};

const CLIENTS: [&str; 4] = ["messages.py", "chat.py", "messages.mjs", "chat.mjs"];
/// What every client says, and the upstream echoes.
const WORDS: [&str; 6] = ["one ", "two ", "three ", "four ", "five ", "six"];
/// The time between two words of a stream, in ms.
const DELAY: i64 = 200;
/// The token that the demo upstream answers 401.
const REFUSED: &str = r#"{"access_token": "refused"}"#;

/// examples/demo-upstream.rs, which lives as long as this value.
struct Demo {
    child: Child,
    url: String,
}

impl Demo {
    fn start() -> Self {
        let test = std::env::current_exe().unwrap();
        let build = test.parent().and_then(|folder| folder.parent()).unwrap();
        let mut child = Command::new(build.join("examples/demo-upstream"))
            .arg("127.0.0.1:0")
            .env_clear()
            .env("MPOOL_DEMO_DELAY_MS", DELAY.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the demo upstream is not built: run `cargo build --examples` first");
        let mut line = String::new();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        stdout.read_line(&mut line).unwrap();
        let demo = Self {
            child,
            url: line.trim().replace("demo upstream on ", ""),
        };
        assert!(demo.url.starts_with("http://127.0.0.1:"), "{line:?}");
        demo
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A pool in which the key holds a slot, and no slot is left for the late key.
struct Pool {
    server: Server,
    client: Client,
    key: String,
    late_key: String,
}

impl Pool {
    fn full(account: &str) -> Self {
        let server = Options::default().file("medium/first", account).start();
        let mut client = server.connect();
        let [key, other, late_key] = std::array::from_fn(|_| client.pool_key());
        for key in [&key, &other] {
            client.ok(&["MPOOL.ACQUIRE", key, "*"]);
        }
        Self {
            server,
            client,
            key,
            late_key,
        }
    }

    /// Room for one more: that of the key, once its first account is refused.
    fn add_room(&mut self) {
        self.server
            .write_account("medium/second", &support::bearer("second"));
        self.client.wait_for_account("second", true);
        let other = self.client.pool_key();
        self.client.ok(&["MPOOL.ACQUIRE", &other, "*"]);
    }
}

/// What the program found, by the name of the check.
#[track_caller]
fn run(program_name: &str, forwarder: &Forwarder, pool: &Pool) -> BTreeMap<String, Value> {
    let packages = installed_packages().with_file_name("sdks");
    assert!(
        packages.join("venv").exists() && packages.join("node_modules").exists(),
        "the SDKs are not there: run `scripts/install-deps test` first"
    );
    let terminal = Terminal::of(&pool.server)
        .env("MPOOL_URL", &forwarder.url())
        .env("MPOOL_KEY", &pool.key)
        .env("MPOOL_LATE_KEY", &pool.late_key);
    let interpreter: PathBuf = if program_name.ends_with(".py") {
        packages.join("venv/bin/python")
    } else {
        program("node")
    };
    // Node looks for packages beside the program.
    let copy = terminal.folder().join(program_name);
    std::fs::copy(repository().join("tests/sdks").join(program_name), &copy).unwrap();
    symlink(
        packages.join("node_modules"),
        copy.with_file_name("node_modules"),
    )
    .unwrap();
    let command = format!("'{}' '{program_name}'", interpreter.display());
    let printed = terminal.run(&command).ok();
    let lines = printed.lines().map(|line| {
        let found: Value = serde_json::from_str(line).unwrap();
        (found["check"].as_str().unwrap().to_owned(), found)
    });
    lines.collect()
}

/// All that a client must find; answers the seconds that the late one is to wait.
#[track_caller]
fn check(found: &BTreeMap<String, Value>) -> i64 {
    for check in ["plain", "bearer"] {
        let Some(answer) = found.get(check) else {
            // OpenAI's SDK knows one kind of credential.
            assert!(check == "bearer" && found.contains_key("plain"));
            continue;
        };
        assert_eq!(answer["text"], WORDS.concat());
        assert_eq!(answer["tokens"], WORDS.len());
    }
    assert_eq!(found["models"]["names"], json!(["demo"]));

    for check in ["first stream", "stream"] {
        assert_eq!(found[check]["pieces"], json!(WORDS));
    }
    let times = found["stream"]["times"].as_array().unwrap().iter();
    let times: Vec<i64> = times.map(|time| time.as_i64().unwrap()).collect();
    let spread = times[times.len() - 1] - times[0];
    // Of five pauses; a busy machine may hold the client up for some of them.
    assert!(spread >= 2 * DELAY, "a stream in one lump: {times:?}");

    let bad = &found["bad key"];
    assert_eq!(
        (&bad["status"], &bad["code"]),
        (&json!(401), &json!("NOKEY"))
    );
    assert_eq!(bad["retry_after"], Value::Null);
    let message = bad["message"].as_str().unwrap();
    assert!(message.contains("This key is not known."), "{message}");

    let full = &found["full"];
    assert_eq!(
        (&full["status"], &full["code"]),
        (&json!(503), &json!("POOLFULL"))
    );
    let message = full["message"].as_str().unwrap();
    assert!(
        message.contains("Every account of the pool is in use."),
        "{message}"
    );
    full["retry_after"].as_str().unwrap().parse().unwrap()
}

/// The forwarder must have logged a line of each request, with each client's
/// own error once, and no secret.
#[track_caller]
fn check_log(forwarder: &Forwarder, found: &BTreeMap<String, Value>, pool: &Pool) {
    let answered = |status: u16| forwarder.wait_for_lines(&format!(" {status} in="), 1).len();
    assert_eq!((answered(401), answered(503)), (1, 1));
    forwarder.wait_for_lines(" 200 in=", found.len() - 2);
    let log = forwarder.log().join("\n");
    for secret in [&pool.key, &pool.late_key, "token-of-"] {
        assert!(!log.contains(secret), "{log}");
    }
}

fn for_each_client(check: impl Fn(&str) + Sync) {
    std::thread::scope(|scope| {
        for client in CLIENTS {
            let check = &check;
            let thread = std::thread::Builder::new().name(client.to_owned());
            thread.spawn_scoped(scope, move || check(client)).unwrap();
        }
    });
}

#[test]
fn sdks_call_stream_and_read_the_forwarders_errors() {
    for_each_client(|client| {
        let (pool, demo) = (Pool::full(&support::bearer("first")), Demo::start());
        let forwarder = Forwarder::between(&pool.server, &demo.url).start();
        let found = run(client, &forwarder, &pool);
        let wait = check(&found);
        // Until the first lease's end.
        let day = DAY / 1000;
        assert!((day - 300..=day).contains(&wait), "{client}: {wait} s");
        check_log(&forwarder, &found, &pool);
    });
}

#[test]
fn sdks_see_nothing_of_an_account_that_the_upstream_refuses() {
    for_each_client(|client| {
        let (mut pool, demo) = (Pool::full(REFUSED), Demo::start());
        let forwarder = Forwarder::between(&pool.server, &demo.url).start();
        assert_eq!(pool.client.holds(&pool.key).as_deref(), Some("first"));
        pool.add_room();
        let found = run(client, &forwarder, &pool);
        let wait = check(&found);
        // Until the refused account is tried again.
        assert!((1..=60).contains(&wait), "{client}: {wait} s");
        check_log(&forwarder, &found, &pool);
        assert_eq!(pool.client.holds(&pool.key).as_deref(), Some("second"));
        let reason: Option<String> = pool
            .client
            .run(&["GET", "medium_pool:cooldown_reason:first"]);
        assert!(
            reason.is_some_and(|reason| reason.contains("401")),
            "{client}"
        );
    });
}

#[test]
fn the_demo_upstream_shows_what_came_but_no_credential() {
    let demo = Demo::start();
    let (_, port) = demo.url.rsplit_once(':').unwrap();
    let mut http = proxy::Client::connect(port.parse().unwrap());
    let seen = http.round(
        "PUT",
        "/a/b?q=1",
        "some-key",
        &[("X-Api-Key", "other")],
        b"{}",
    );
    assert_eq!(seen.status(), 200);
    let seen: Value = serde_json::from_slice(&seen.body).unwrap();
    let mut kinds: Vec<(&str, u64)> = seen["credentials"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| {
            (
                one["kind"].as_str().unwrap(),
                one["length"].as_u64().unwrap(),
            )
        })
        .collect();
    kinds.sort_unstable();
    assert_eq!(kinds, [("bearer", 8), ("x-api-key", 5)]);
    assert_eq!(
        (&seen["method"], &seen["path"]),
        (&json!("PUT"), &json!("/a/b"))
    );

    for (method, target, key, body, status) in [
        ("GET", "/", "", "", 200),
        ("GET", "/v1/models", "", "", 401),
        ("GET", "/v1/models", "refused", "", 401),
        ("GET", "/", "refused", "", 401),
        ("POST", "/v1/messages", "any", "{", 400),
        ("POST", "/v1/chat/completions", "any", "[1, 2]", 400),
        (
            "POST",
            "/v1/messages",
            "any",
            r#"{"messages": [{"role": 1}, 2, null]}"#,
            400,
        ),
    ] {
        let answer = http.round(method, target, key, &[], body.as_bytes());
        assert_eq!(answer.status(), status, "{method} {target} {key} {body}");
        let error: Value = serde_json::from_slice(&answer.body).unwrap();
        assert_eq!(
            error["error"]["message"].is_string(),
            status != 200,
            "{error}"
        );
    }
}
