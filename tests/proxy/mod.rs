//! What the tests of the forwarder share: the forwarder as a process, upstreams
//! that record what they get and do what a test tells them, and clients that
//! send exact bytes. HTTP/1.1 is spoken here by hand, so that every byte on the
//! wire is the test's to see and to choose; HTTP/2 by hyper, from [`http2`].
#![allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "each test binary uses its own part of this"
)]

pub mod http2;
pub mod tls;
mod upstream;
mod wire;

pub use http2::{Http2, Http2Exchange, Http2Upstream};
pub use upstream::{Exchange, Request, Upstream};
pub use wire::{Answer, Broken, Client, Head, Wire, chunked, latin1, request};

use crate::support::{Options, PATIENCE, Server, wait_for};
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Something that the forwarder can be put in front of.
pub trait Target {
    /// The base URL.
    fn url(&self) -> String;

    /// Arguments of the forwarder that this upstream needs.
    fn arguments(&self) -> Vec<String> {
        Vec::new()
    }
}

impl Target for str {
    fn url(&self) -> String {
        self.to_owned()
    }
}

impl Target for String {
    fn url(&self) -> String {
        self.clone()
    }
}

/// How a forwarder is to be started.
#[derive(Clone, Debug)]
pub struct Setup {
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
}

impl Setup {
    /// No arguments but these, and nothing in the environment.
    pub fn bare(arguments: &[&str]) -> Self {
        Self {
            arguments: arguments.iter().map(ToString::to_string).collect(),
            environment: Vec::new(),
        }
    }

    /// More arguments. A flag given here takes the place of the harness's own.
    pub fn args(mut self, arguments: &[&str]) -> Self {
        for argument in arguments {
            let own = self.arguments.iter().position(|known| known == argument);
            if let Some(at) = own.filter(|_| argument.starts_with("--")) {
                self.arguments.drain(at..at + 2);
            }
        }
        let arguments = arguments.iter().map(ToString::to_string);
        self.arguments.extend(arguments);
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The process, not started yet, for what has no method here. It is the
    /// program that `MPOOL_TEST_FORWARDER` names, or the one built for the test.
    pub fn command(&self) -> Command {
        let binary = std::env::var_os("MPOOL_TEST_FORWARDER");
        let built = env!("CARGO_BIN_EXE_mpool-forwarder");
        let mut command = Command::new(binary.unwrap_or_else(|| built.into()));
        let inherited = std::env::vars_os().filter(|(name, _)| {
            let name = name.to_string_lossy().to_ascii_uppercase();
            // A proxy of the machine's must not come in between either.
            !name.starts_with("MPOOL_") && !name.ends_with("_PROXY")
        });
        command
            .env_clear()
            .envs(inherited)
            .envs(self.environment.iter().cloned())
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// A forwarder that listens.
    #[track_caller]
    pub fn start(&self) -> Forwarder {
        let mut forwarder = self.spawn();
        let line = forwarder.wait_for_line("listening on ");
        forwarder.port = port_in(&line, "listening on ");
        let admin = self.arguments.iter().position(|known| known == "--admin");
        if admin.is_none_or(|at| self.arguments[at + 1] != "off") {
            let line = forwarder.wait_for_line("admin on ");
            forwarder.admin = port_in(&line, "admin on ");
        }
        forwarder
    }

    /// A forwarder that need not come up.
    pub fn spawn(&self) -> Forwarder {
        let mut child = self.command().spawn().unwrap();
        let (log, log_reader) = Lines::collect(child.stdout.take().unwrap());
        let (errors, error_reader) = Lines::collect(child.stderr.take().unwrap());
        Forwarder {
            child,
            port: 0,
            admin: 0,
            log,
            errors,
            readers: vec![log_reader, error_reader],
        }
    }

    /// Runs to the end, which must come by itself: exit code, stdout, stderr.
    #[track_caller]
    pub fn run(&self) -> (i32, String, String) {
        let mut forwarder = self.spawn();
        let code = forwarder.wait();
        let text = |lines: Vec<String>| lines.join("\n");
        (code, text(forwarder.log()), text(forwarder.errors()))
    }
}

fn port_in(line: &str, before: &str) -> u16 {
    let (_, address) = line.split_once(before).unwrap();
    // In JSON a quotation mark follows.
    let end = |letter: char| !letter.is_ascii_hexdigit() && !".:[]".contains(letter);
    let address = address.split(end).next().unwrap();
    let (_, port) = address.rsplit_once(':').unwrap();
    port.parse().unwrap_or_else(|_| panic!("no port: {line}"))
}

/// The lines that a process writes, as they come.
#[derive(Clone, Debug, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

impl Lines {
    fn collect(from: impl Read + Send + 'static) -> (Self, JoinHandle<()>) {
        let lines = Self::default();
        let sink = lines.clone();
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(from).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).into_owned();
                sink.0.lock().unwrap().push(line);
            }
        });
        (lines, reader)
    }

    fn get(&self) -> Vec<String> {
        let lines = self.0.lock();
        lines.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Memory of a process, in KiB.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    pub now: u64,
    pub peak: u64,
}

/// A forwarder that lives as long as this value.
#[derive(Debug)]
pub struct Forwarder {
    child: Child,
    pub port: u16,
    /// The port of the admin listener, 0 without one.
    pub admin: u16,
    log: Lines,
    errors: Lines,
    readers: Vec<JoinHandle<()>>,
}

impl Forwarder {
    /// How to start one between that Redis and that upstream.
    pub fn between(redis: &(impl Target + ?Sized), upstream: &(impl Target + ?Sized)) -> Setup {
        let upstream_url = upstream.url();
        let mut setup = Setup::bare(&[
            "--listen",
            "127.0.0.1:0",
            "--admin",
            "127.0.0.1:0",
            "--threads",
            "2",
            "--redis",
            &redis.url(),
            "--upstream",
            &upstream_url,
        ]);
        setup.arguments.extend(upstream.arguments());
        setup
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// A connection to it that speaks HTTP/1.1.
    pub fn client(&self) -> Client {
        Client::connect(self.port)
    }

    /// A connection to it that speaks HTTP/2 from the first byte.
    pub fn http2(&self) -> Http2 {
        Http2::connect(self.port)
    }

    /// What the admin listener answers.
    #[track_caller]
    pub fn admin(&self, path: &str) -> Answer {
        let mut client = Client::connect(self.admin);
        client.send(format!(
            "GET {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n"
        ));
        client.answer()
    }

    /// The sample of /metrics whose line begins with `name`, labels included.
    #[track_caller]
    pub fn metric(&self, name: &str) -> Option<f64> {
        let metrics = self.admin("/metrics").text();
        let mut values = metrics.lines().filter_map(|line| {
            let (sample, value) = line.rsplit_once(' ')?;
            (sample == name).then(|| value.parse().unwrap())
        });
        values.next()
    }

    /// What it wrote to stdout so far.
    pub fn log(&self) -> Vec<String> {
        self.log.get()
    }

    /// What it wrote to stderr so far.
    pub fn errors(&self) -> Vec<String> {
        self.errors.get()
    }

    /// Waits for a line on stdout that holds `part`.
    #[track_caller]
    pub fn wait_for_line(&mut self, part: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            // Asked for first: what it wrote before its end must be found.
            let ended = self.child.try_wait().unwrap();
            if ended.is_some() {
                self.join_readers();
            }
            if let Some(line) = self.log().into_iter().find(|line| line.contains(part)) {
                return line;
            }
            assert!(
                ended.is_none() && Instant::now() < deadline,
                "no line with {part:?}, exit {ended:?}"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until `count` lines on stdout hold `part`, and answers them.
    #[track_caller]
    pub fn wait_for_lines(&self, part: &str, count: usize) -> Vec<String> {
        wait_for(&format!("{count} lines with {part:?}"), || {
            let lines = self.log().into_iter().filter(|line| line.contains(part));
            let lines: Vec<String> = lines.collect();
            (lines.len() >= count).then_some(lines)
        })
    }

    /// Sends a signal by its name: TERM, INT, STOP, CONT.
    pub fn signal(&self, name: &str) {
        crate::support::signal(self.pid(), name);
    }

    /// Asks it to end, and waits until it has: its exit code.
    #[track_caller]
    pub fn terminate(&mut self) -> i32 {
        self.signal("TERM");
        self.wait()
    }

    /// Waits for its end: its exit code, or 128 + the signal that ended it.
    #[track_caller]
    pub fn wait(&mut self) -> i32 {
        let status = wait_for("the forwarder's end", || self.child.try_wait().unwrap());
        self.join_readers();
        let signal = std::os::unix::process::ExitStatusExt::signal(&status);
        status.code().unwrap_or_else(|| 128 + signal.unwrap())
    }

    /// Whether it runs; it must never go by itself.
    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn join_readers(&mut self) {
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
    }

    pub fn memory(&self) -> Memory {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let of = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let number = line.unwrap().trim().trim_end_matches(" kB");
            number.parse().unwrap()
        };
        Memory {
            now: of("VmRSS:"),
            peak: of("VmHWM:"),
        }
    }

    /// Lets [`Memory::peak`] begin again at what is in use now.
    pub fn forget_peak(&self) {
        fs::write(format!("/proc/{}/clear_refs", self.pid()), "5").unwrap();
    }

    /// Processor time used so far, in user space and in the kernel.
    pub fn cpu_time(&self) -> Duration {
        crate::support::cpu_time(self.pid())
    }

    /// How many file descriptors it has open.
    pub fn descriptors(&self) -> usize {
        let folder = fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap();
        folder.count()
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.kill();
        self.join_readers();
        if std::thread::panicking() {
            let of = |lines: &Lines| lines.get().join("\n");
            eprintln!(
                "--- stdout of the forwarder on port {} ---\n{}\n--- its stderr ---\n{}",
                self.port,
                of(&self.log),
                of(&self.errors)
            );
        } else {
            let lines = [self.log(), self.errors()].concat().join("\n");
            assert_eq!(crate::support::leak(lines.as_bytes(), true), None);
        }
    }
}

impl Target for Server {
    fn url(&self) -> String {
        // Not by name: the inherent one is of the same name.
        Self::url(self)
    }
}

/// A whole round: a Redis with the account `one` (token `token-of-one`) and a
/// key, an upstream, and the forwarder between them.
#[derive(Debug)]
pub struct Stage<U> {
    // Dropped in this order: the forwarder goes first.
    pub forwarder: Forwarder,
    pub upstream: U,
    pub server: Server,
    pub key: String,
}

impl<U: Target> Stage<U> {
    pub fn new(upstream: U) -> Self {
        Self::with(upstream, &[])
    }

    /// With more arguments for the forwarder.
    pub fn with(upstream: U, arguments: &[&str]) -> Self {
        let server = Options::default().accounts(&["one"]).start();
        Self::on(server, upstream, arguments)
    }

    /// With a Redis of the test's own making.
    pub fn on(server: Server, upstream: U, arguments: &[&str]) -> Self {
        let key = server.connect().pool_key();
        let setup = Forwarder::between(&server, &upstream).args(arguments);
        Self {
            forwarder: setup.start(),
            upstream,
            server,
            key,
        }
    }

    pub fn client(&self) -> Client {
        self.forwarder.client()
    }

    /// A GET with the key, on a connection of its own.
    #[track_caller]
    pub fn get(&self, target: &str) -> Answer {
        self.client().round("GET", target, &self.key, &[], b"")
    }
}
