//! `make run` and `make stop`, in a copy of the repository: what is printed works
//! as typed, what runs is found again, what has ended or is to be another is
//! started anew, and what was not started from there is left alone.

mod support;
mod typed;

use std::net::{TcpListener, TcpStream};
use support::{Options, free_port, wait_for};
use typed::{Started, Terminal, free_pair, key_in};

/// Asks the forwarder of that port for something; `-f`: an error ends the command.
fn ask(port: u16, path: &str) -> String {
    format!(r#"curl -fsS http://127.0.0.1:{port}{path} -H "x-api-key: $(<data/demo-key)""#)
}

/// The forwarder's command line.
fn command_line(terminal: &Terminal) -> String {
    let read = r#"tr '\0' ' ' <"/proc/$(<data/forwarder.pid)/cmdline""#;
    terminal.run(read).ok()
}

#[test]
fn what_make_run_prints_works_as_typed() {
    let port = free_port();
    let terminal = Terminal::in_a_copy(port, free_pair());
    let _started = Started::by(&terminal);
    let printed = terminal.run("make run").ok();
    assert!(
        printed.contains("examples/accounts"),
        "it says that it lends samples: {printed}"
    );
    // It has the server's settings that README recommends.
    for (setting, value) in [
        ("appendonly", "yes"),
        ("appendfsync", "everysec"),
        ("maxmemory-policy", "noeviction"),
    ] {
        let asked = format!("redis-cli -p {port} CONFIG GET {setting}");
        let told = terminal.run(&asked).ok();
        assert_eq!(told, format!("{setting}\n{value}\n"));
    }
    let key = key_in(&printed);
    let (_, next) = printed.split_once("Type next:\n").unwrap();
    let typed = next.lines().filter_map(|line| line.strip_prefix("  "));
    let typed: Vec<&str> = typed.collect();
    assert!(typed.len() >= 6, "{printed}");
    let mut last = String::new();
    for line in typed {
        let outcome = terminal.run(line);
        assert_eq!(outcome.code, 0, "{line}: {outcome:?}");
        last = outcome.stdout;
    }
    // It ends in a streamed answer.
    assert!(last.matches("text_delta").count() > 3, "{last}");
    let end = "data: {\"type\":\"message_stop\"}\n\n";
    assert!(last.ends_with(end), "{last}");
    // Typed again, it uses what is there, and the key is the same.
    let again = terminal.run("make run").ok();
    assert_eq!(key_in(&again), key);
    assert_eq!(again.matches("already runs").count(), 2, "{again}");
    let mode = terminal.run("stat -c %a data data/demo-key").ok();
    assert_eq!(mode, "700\n600\n");
    terminal.run("make stop").ok();
    // Nothing that was not there lies about in the repository.
    let listed = terminal.run("ls").ok();
    assert_eq!(
        listed.split_whitespace().collect::<Vec<_>>(),
        [
            "Makefile", "account", "data", "examples", "scripts", "shell", "target"
        ]
    );
    let said = terminal.run("make stop").ok();
    assert!(said.contains("Nothing to stop"), "{said}");
}

#[test]
fn what_has_ended_or_is_to_be_another_is_started_anew() {
    let port = free_pair();
    let terminal = Terminal::in_a_copy(free_port(), port);
    let _started = Started::by(&terminal);
    terminal.run("make run").ok();
    terminal.run(&ask(port, "/v1/models")).ok();
    for name in ["forwarder", "demo-upstream"] {
        terminal
            .run(&format!("kill -KILL $(<data/{name}.pid)"))
            .ok();
        let printed = terminal.run("make run").ok();
        assert!(printed.contains("Started"), "{name}: {printed}");
        terminal.run(&ask(port, "/v1/models")).ok();
    }

    // An upstream that is named takes the demo's place;
    let named = format!("http://127.0.0.1:{}/api", free_port());
    let printed = terminal.run(&format!("UPSTREAM={named} make run")).ok();
    assert!(
        printed.contains(&format!("in front of {named}")),
        "{printed}"
    );
    assert!(!terminal.folder().join("data/demo-upstream.pid").exists());
    assert!(!printed.contains("curl -N"), "{printed}");
    // and keeps it.
    let printed = terminal.run("make run").ok();
    assert!(
        printed.contains("mpool-forwarder already runs"),
        "{printed}"
    );
    assert!(command_line(&terminal).trim_end().ends_with(&named));

    // Another port.
    let other = free_pair();
    let printed = terminal
        .run(&format!("FORWARDER_PORT={other} make run"))
        .ok();
    assert!(printed.contains(&format!("on port {other}")), "{printed}");
    let printed_for_medium = format!("MPOOL_FORWARDER_URL=http://127.0.0.1:{other} ");
    assert!(printed.contains(&printed_for_medium), "{printed}");
    TcpStream::connect(("127.0.0.1", other)).unwrap();
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err());

    let stopped = terminal.run("make stop").ok();
    assert_eq!(stopped.matches("Stopped").count(), 2, "{stopped}");
    assert!(TcpStream::connect(("127.0.0.1", other)).is_err());
}

#[test]
fn a_port_that_is_taken_is_named_before_anything_is_started() {
    let port = free_pair();
    let terminal = Terminal::in_a_copy(free_port(), port);
    for taken in [port, port + 1] {
        let _listener = TcpListener::bind(("127.0.0.1", taken)).unwrap();
        let said = terminal.run("scripts/run").fails(3);
        assert!(said.contains(&format!("port {taken}")), "{said}");
        assert!(said.contains("FORWARDER_PORT="), "{said}");
    }
    assert!(!terminal.folder().join("data").exists());
    assert!(!terminal.folder().join("target").exists());
}

#[test]
fn settings_that_can_not_work_are_refused() {
    let terminal = Terminal::in_a_copy(free_port(), free_pair());
    for setting in [
        "FORWARDER_PORT=many",
        "FORWARDER_PORT=0",
        "FORWARDER_PORT=65535",
        "FORWARDER_PORT=$PORT",
        "UPSTREAM=api.example.com",
        "UPSTREAM=https://user:password@api.example.com",
        "DEMO_PORT=any",
    ] {
        let said = terminal.run(&format!("{setting} scripts/run")).fails(2);
        let (name, _) = setting.split_once('=').unwrap();
        assert!(said.contains(name), "{setting}: {said}");
    }
    assert!(!terminal.folder().join("data").exists());
}

#[test]
fn a_forwarder_that_does_not_start_shows_its_log() {
    let terminal = Terminal::in_a_copy(free_port(), free_pair()).env("MPOOL_GRACE", "long");
    let _started = Started::by(&terminal);
    let outcome = terminal.run("scripts/run");
    assert_eq!(outcome.code, 1, "{outcome:?}");
    assert!(outcome.stderr.contains("data/forwarder.log"), "{outcome:?}");
    assert!(outcome.stderr.contains("--grace"), "{outcome:?}");
}

#[test]
fn a_redis_of_anothers_is_used_with_its_login_and_left_alone() {
    let password = "correct horse $(battery) 'staple'";
    let mut server = Options::default()
        .accounts(&["one"])
        .server(&["--requirepass", password])
        .start();
    let port = free_pair();
    let terminal = Terminal::in_a_copy(server.port, port).env("MPOOL_REDIS_PASSWORD", password);
    let _started = Started::by(&terminal);
    let printed = terminal.run("make run").ok();
    assert!(printed.contains("not started from here"), "{printed}");
    terminal.run(&ask(port, "/v1/models")).ok();
    assert!(!command_line(&terminal).contains("staple"));
    let logs = terminal.run("cat data/*.log").ok();
    assert!(!logs.contains("staple"), "{logs}");
    let stopped = terminal.run("make stop").ok();
    assert_eq!(stopped.matches("Stopped").count(), 2, "{stopped}");
    assert!(server.is_alive());
}

#[test]
fn a_forwarder_that_can_not_serve_yet_is_said_so() {
    let server = Options::default().start();
    let terminal = Terminal::in_a_copy(server.port, free_pair()).env("MPOOL_TEST_STRICT", "");
    let _started = Started::by(&terminal);
    let outcome = terminal.run("make run");
    assert_eq!(outcome.code, 0, "{outcome:?}");
    let note = "can't serve requests now: no account can be used now";
    assert!(outcome.stderr.contains(note), "{outcome:?}");
    terminal.run("make stop").ok();
}

#[test]
fn make_stop_lets_a_stream_come_to_its_end() {
    let port = free_pair();
    let terminal = Terminal::in_a_copy(free_port(), port);
    let _started = Started::by(&terminal);
    terminal.run("make run").ok();
    let words = "word ".repeat(20);
    let body =
        format!(r#"{{"stream": true, "messages": [{{"role": "user", "content": "{words}"}}]}}"#);
    let streaming = format!("{} -N -d '{body}' >stream", ask(port, "/v1/messages"));
    let streamed = std::thread::scope(|scope| {
        let stream = scope.spawn(|| terminal.run(&streaming).ok());
        let file = terminal.folder().join("stream");
        wait_for("the first word", || {
            let begun = std::fs::read_to_string(&file).ok()?;
            begun.contains("text_delta").then_some(())
        });
        terminal.run("make stop").ok();
        stream.join().unwrap();
        std::fs::read_to_string(&file).unwrap()
    });
    assert_eq!(streamed.matches("text_delta").count(), 20, "{streamed}");
    assert!(streamed.contains("message_stop"), "{streamed}");
}
