//! The examples in Python, Node and shell: each leases an account, calls an
//! upstream with its token, reports one that the upstream refuses and goes on
//! with another, and says when to come back to a full pool.
//!
//! The upstream is a thread of the test. The packages that the examples need
//! come from `scripts/install-deps test`.

mod support;
mod typed;

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use support::{Client, DAY, Options, Server, wait_for, while_reading};
use typed::{Outcome, Terminal, installed_packages, program};

/// The example languages; each test is run for all of them.
const LANGUAGES: [&str; 3] = ["python", "node", "shell"];

/// An upstream that refuses one token and keeps what it was sent.
struct Upstream {
    port: u16,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Upstream {
    /// Answers `status` with `header` to requests with the token, and 200 to others.
    fn refusing(token: &'static str, status: u16, header: &'static str) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&seen);
        // The thread ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                serve(stream, token, status, header, &log);
            }
        });
        Self { port, seen }
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}/v1/models", self.port)
    }

    /// The credential headers of the requests so far.
    fn credentials(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }
}

fn serve(mut stream: TcpStream, token: &str, status: u16, header: &str, log: &Mutex<Vec<String>>) {
    let mut credential = String::from("none");
    for line in BufReader::new(stream.try_clone().unwrap())
        .lines()
        .map_while(Result::ok)
    {
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(": ").unwrap_or_default();
        let name = name.to_ascii_lowercase();
        if name == "authorization" || name == "x-api-key" {
            credential = format!("{name}: {value}");
        }
    }
    let (status, header, body) = if credential.ends_with(token) {
        (status, header, "refused")
    } else {
        (200, "X-Upstream: 1\r\n", "models")
    };
    log.lock().unwrap().push(credential);
    let _ = write!(
        stream,
        "HTTP/1.1 {status} Answer\r\n{header}Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
}

/// Something that `scripts/install-deps test` puts below target/.
#[track_caller]
fn installed(path: &str) -> PathBuf {
    let full = installed_packages().join(path);
    assert!(
        full.exists(),
        "{} is not there: run `scripts/install-deps test` first",
        full.display()
    );
    full
}

/// The example with the key in its environment.
#[track_caller]
fn run(language: &str, server: &Server, key: &str, url: &str) -> Outcome {
    run_with(language, server, key, url, ("", ""))
}

/// The same for a server that asks for a password, and perhaps a user.
#[track_caller]
fn run_with(
    language: &str,
    server: &Server,
    key: &str,
    url: &str,
    (user, password): (&str, &str),
) -> Outcome {
    let mut terminal = Terminal::of(server).env("MPOOL_KEY", key);
    if !password.is_empty() {
        terminal = terminal.env("MPOOL_REDIS_PASSWORD", password);
    }
    if !user.is_empty() {
        terminal = terminal.env("MPOOL_REDIS_USER", user);
    }
    let command = match language {
        "python" => format!(
            "'{}' examples/acquire.py",
            installed("venv/bin/python").display()
        ),
        "node" => {
            // Node looks for packages beside the script.
            let packages = installed("node_modules");
            let script = terminal.folder().join("acquire.mjs");
            std::fs::copy(support::repository().join("examples/acquire.mjs"), script).unwrap();
            std::os::unix::fs::symlink(packages, terminal.folder().join("node_modules")).unwrap();
            format!("'{}' acquire.mjs", program("node").display())
        }
        _ => {
            program("curl");
            "examples/acquire.sh".to_owned()
        }
    };
    let outcome = terminal.run(&format!("{command} '{url}'"));
    for secret in ["token-of-", key, password]
        .into_iter()
        .filter(|secret| !secret.is_empty())
    {
        assert!(
            !outcome.stdout.contains(secret),
            "{language}: {}",
            outcome.stdout
        );
        assert!(
            !outcome.stderr.contains(secret),
            "{language}: {}",
            outcome.stderr
        );
        assert!(!terminal.command_lines().contains(secret), "{language}");
    }
    outcome
}

fn for_each_language(check: impl Fn(&str) + Sync) {
    std::thread::scope(|scope| {
        for language in LANGUAGES {
            let check = &check;
            scope.spawn(move || check(language));
        }
    });
}

fn started(accounts: &[&str]) -> (Server, Client) {
    let server = Options::default().accounts(accounts).start();
    let client = server.connect();
    (server, client)
}

/// Makes another account lendable.
fn add_account(server: &Server, client: &mut Client, content: &str) {
    server.write_account("medium/good", content);
    wait_for("the new account", || client.slots("good"));
}

#[test]
fn the_upstream_gets_the_token_the_way_the_account_says() {
    for_each_language(|language| {
        for (content, header) in [
            (
                r#"{"access_token": "token-of-one"}"#,
                "authorization: Bearer token-of-one",
            ),
            (r#"{"api_key": "token-of-one"}"#, "x-api-key: token-of-one"),
        ] {
            let server = Options::default().file("medium/one", content).start();
            let key = server.connect().pool_key();
            let upstream = Upstream::refusing("nobody's", 401, "");
            let printed = run(language, &server, &key, &upstream.url()).ok();
            assert_eq!(printed.trim(), "models", "{language}");
            assert_eq!(upstream.credentials(), [header], "{language}");
        }
    });
}

#[test]
fn an_account_that_the_upstream_refuses_is_reported_and_another_one_used() {
    for_each_language(|language| {
        for (content, header) in [
            (
                r#"{"access_token": "token-of-good"}"#,
                "authorization: Bearer token-of-good",
            ),
            (
                r#"{"api_key": "token-of-good"}"#,
                "x-api-key: token-of-good",
            ),
        ] {
            let (server, mut client) = started(&["bad"]);
            let key = client.pool_key();
            client.ok(&["MPOOL.ACQUIRE", &key, "*"]);
            add_account(&server, &mut client, content);
            let upstream = Upstream::refusing("token-of-bad", 401, "");
            let printed = run(language, &server, &key, &upstream.url()).ok();
            assert_eq!(printed.trim(), "models", "{language}");
            assert_eq!(
                upstream.credentials(),
                ["authorization: Bearer token-of-bad", header],
                "{language}"
            );
            // The report took the account out of the pool, with its reason.
            let reason: Option<String> = client.run(&["GET", "medium_pool:cooldown_reason:bad"]);
            assert_eq!(
                reason.as_deref(),
                Some("the upstream answered 401"),
                "{language}"
            );
            assert_eq!(
                (client.slots("bad"), client.slots("good")),
                (Some(0), Some(1)),
                "{language}"
            );
        }
    });
}

#[test]
fn an_upstream_that_asks_for_patience_sets_the_length_of_the_cooldown() {
    for_each_language(|language| {
        let (server, mut client) = started(&["bad"]);
        let key = client.pool_key();
        client.ok(&["MPOOL.ACQUIRE", &key, "*"]);
        add_account(&server, &mut client, r#"{"api_key": "token-of-good"}"#);
        let upstream = Upstream::refusing("token-of-bad", 429, "Retry-After: 1000\r\n");
        run(language, &server, &key, &upstream.url()).ok();
        let until: i64 = client.run(&["GET", "medium_pool:cooldown:bad"]);
        let now: Vec<i64> = client.run(&["TIME"]);
        let left = until / 1000 - now[0];
        assert!((900..=1000).contains(&left), "{language}: {left} s");
    });
}

#[test]
fn a_failover_is_tried_once() {
    for_each_language(|language| {
        // Both accounts have the token that is refused.
        let same = r#"{"access_token": "token-of-both"}"#;
        let server = Options::default()
            .file("medium/one", same)
            .file("medium/two", same)
            .start();
        let key = server.connect().pool_key();
        let upstream = Upstream::refusing("token-of-both", 401, "");
        let outcome = run(language, &server, &key, &upstream.url());
        assert_eq!(outcome.code, 1, "{language}: {outcome:?}");
        assert!(outcome.stderr.contains("401"), "{language}: {outcome:?}");
        assert_eq!(upstream.credentials().len(), 2, "{language}");
    });
}

#[test]
fn a_full_pool_is_told_with_the_time_to_come_back() {
    for_each_language(|language| {
        let (server, mut client) = started(&["one"]);
        for _ in 0..2 {
            let holder = client.pool_key();
            client.ok(&["MPOOL.ACQUIRE", &holder, "*"]);
        }
        let key = client.pool_key();
        let upstream = Upstream::refusing("nobody's", 401, "");
        let outcome = run(language, &server, &key, &upstream.url());
        assert_eq!(outcome.code, 1, "{language}: {outcome:?}");
        assert!(outcome.stderr.contains("503"), "{language}: {outcome:?}");
        assert!(
            format!("{outcome:?}").contains("POOLFULL"),
            "{language}: {outcome:?}"
        );
        let (_, wait) = outcome
            .stderr
            .split_once("Retry-After: ")
            .unwrap_or_else(|| panic!("{language}: {outcome:?}"));
        let wait: i64 = wait.trim().parse().unwrap();
        assert!(
            (DAY / 1000 - 300..=DAY / 1000).contains(&wait),
            "{language}: {wait} s"
        );
        assert!(upstream.credentials().is_empty(), "{language}");
    });
}

#[test]
fn a_pool_in_which_every_account_cools_down_is_told_with_the_time_too() {
    for_each_language(|language| {
        let (server, mut client) = started(&["one"]);
        let key = client.pool_key();
        client.ok(&["MPOOL.COOLDOWN", "medium", "one", "*", "500000"]);
        let upstream = Upstream::refusing("nobody's", 401, "");
        let outcome = run(language, &server, &key, &upstream.url());
        let (_, wait) = outcome
            .stderr
            .split_once("Retry-After: ")
            .unwrap_or_else(|| panic!("{language}: {outcome:?}"));
        let wait: i64 = wait.trim().parse().unwrap();
        assert!((300..=500).contains(&wait), "{language}: {wait} s");
    });
}

#[test]
fn a_module_that_reads_the_keyspace_is_a_reason_to_come_back_soon() {
    for_each_language(|language| {
        let (server, mut client) = started(&["one"]);
        client.register(30_000);
        let key = client.pool_key();
        let upstream = Upstream::refusing("nobody's", 401, "");
        let outcome = while_reading(&server, || run(language, &server, &key, &upstream.url()));
        assert_eq!(outcome.code, 1, "{language}: {outcome:?}");
        assert!(outcome.stderr.contains("503"), "{language}: {outcome:?}");
        assert!(
            format!("{outcome:?}").contains("LOADING"),
            "{language}: {outcome:?}"
        );
        assert!(
            outcome.stderr.trim().ends_with("Retry-After: 1"),
            "{language}: {outcome:?}"
        );
        assert!(upstream.credentials().is_empty(), "{language}");
        client.wait_until_ready();
        assert_eq!(
            run(language, &server, &key, &upstream.url()).ok().trim(),
            "models"
        );
    });
}

#[test]
fn a_key_that_is_not_good_is_told_by_its_code() {
    for_each_language(|language| {
        let (server, mut client) = started(&["one"]);
        let revoked = client.pool_key();
        client.ok(&["MPOOL.REVOKE", &revoked]);
        let upstream = Upstream::refusing("nobody's", 401, "");
        for (key, code) in [(revoked.as_str(), "REVOKED"), ("sk-cli-v1-nobody", "NOKEY")] {
            let outcome = run(language, &server, key, &upstream.url());
            assert_eq!(outcome.code, 1, "{language}: {outcome:?}");
            assert!(
                format!("{outcome:?}").contains(code),
                "{language}: {outcome:?}"
            );
        }
        assert!(upstream.credentials().is_empty(), "{language}");
    });
}

#[test]
fn a_bound_keys_account_is_never_reported() {
    for_each_language(|language| {
        let (server, mut client) = started(&["bad", "good"]);
        let key = support::text(&client.map(&["MPOOL.KEYGEN", "medium", "bad"])["key"]);
        let upstream = Upstream::refusing("token-of-bad", 401, "");
        let outcome = run(language, &server, &key, &upstream.url());
        assert_eq!(outcome.code, 1, "{language}: {outcome:?}");
        assert_eq!(upstream.credentials().len(), 1, "{language}");
        assert_eq!(
            client.run::<Option<String>>(&["GET", "medium_pool:cooldown:bad"]),
            None,
            "{language}"
        );
    });
}

#[test]
fn an_upstreams_redirect_is_not_followed_with_the_token() {
    for_each_language(|language| {
        let (server, mut client) = started(&["one"]);
        let key = client.pool_key();
        let elsewhere = Upstream::refusing("nobody's", 401, "");
        let header = format!("Location: {}\r\n", elsewhere.url()).leak();
        let upstream = Upstream::refusing("token-of-one", 302, header);
        run(language, &server, &key, &upstream.url());
        assert_eq!(upstream.credentials().len(), 1, "{language}");
        assert!(elsewhere.credentials().is_empty(), "{language}");
    });
}

#[test]
fn a_password_goes_by_the_environment() {
    for_each_language(|language| {
        let server = Options::default()
            .accounts(&["one"])
            .server(&["--requirepass", "open-sesame"])
            .start();
        let url = format!("redis://:open-sesame@127.0.0.1:{}/", server.port);
        let key = Client::open(&url).pool_key();
        let upstream = Upstream::refusing("nobody's", 401, "");
        let outcome = run_with(
            language,
            &server,
            &key,
            &upstream.url(),
            ("", "open-sesame"),
        );
        assert_eq!(outcome.ok().trim(), "models", "{language}");
        assert_ne!(
            run(language, &server, &key, &upstream.url()).code,
            0,
            "{language}"
        );
    });
}

#[test]
fn the_rights_of_the_user_proxy_are_enough() {
    for_each_language(|language| {
        let users = support::repository().join("examples/acl.conf");
        let server = Options::default()
            .accounts(&["bad", "good"])
            .server(&["--include", users.to_str().unwrap()])
            .start();
        let login = "operator:operators-password";
        let mut operator = Client::open(&format!("redis://{login}@127.0.0.1:{}/", server.port));
        // Until one of the keys has the account that is refused, and is cooled down.
        let upstream = Upstream::refusing("token-of-bad", 429, "Retry-After: 60\r\n");
        for _ in 0..2 {
            let key = operator.pool_key();
            let outcome = run_with(
                language,
                &server,
                &key,
                &upstream.url(),
                ("proxy", "proxys-password"),
            );
            assert_eq!(outcome.ok().trim(), "models", "{language}");
        }
        assert_eq!(
            operator.state("bad", 0).as_deref(),
            Some("cooldown"),
            "{language}"
        );
    });
}
