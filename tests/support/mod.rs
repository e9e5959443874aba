//! What the tests against real servers share: a redis-server with the module,
//! started on a free port in a folder of its own and gone with its guard.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test binary uses its own part of this"
)]

pub mod load;
pub mod network;
pub mod sentinels;

use network::Place;
use redis::{Connection, FromRedisValue, RedisResult, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::OpenOptionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// 24 hours, in ms.
pub const DAY: i64 = 86_400_000;
/// How long anything may take that should happen at once on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The module, built by `cargo build` before the tests run, or the build of it
/// that `MPOOL_TEST_MODULE` names.
pub fn module() -> PathBuf {
    if let Some(path) = std::env::var_os("MPOOL_TEST_MODULE") {
        return std::path::absolute(path).unwrap();
    }
    let test = std::env::current_exe().unwrap();
    let profile = test
        .ancestors()
        .find(|folder| folder.join("libmpool.so").exists());
    profile
        .expect("libmpool.so is not built: run `cargo build` first")
        .join("libmpool.so")
}

/// The server to test with: `MPOOL_TEST_SERVER`, or the installed one.
pub fn server_binary() -> PathBuf {
    match std::env::var_os("MPOOL_TEST_SERVER") {
        // Servers are started in folders of their own.
        Some(path) => std::path::absolute(path).unwrap(),
        None => "redis-server".into(),
    }
}

/// Whether the server is built with TLS: then a certificate is what it misses.
pub fn server_has_tls() -> bool {
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new("timeout")
        .arg("20")
        .arg(server_binary())
        .args(["--port", "0", "--tls-port", &free_port().to_string()])
        .current_dir(folder.path())
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).contains("No tls-cert-file configured")
}

/// Where programs are looked for: `redis-cli` is the one beside the server to
/// test with, if it has one.
pub fn search_path() -> OsString {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let server = server_binary();
    let beside = server.parent().filter(|folder| folder.is_absolute());
    let folders = beside.map(PathBuf::from).into_iter();
    std::env::join_paths(folders.chain(std::env::split_paths(&path))).unwrap()
}

/// The folder of the repository.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A port that nothing listens on, and that nothing else here was given: what
/// listens in another network can't be seen from this one.
pub fn free_port() -> u16 {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    loop {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        if GIVEN.lock().unwrap().insert(port) {
            return port;
        }
    }
}

/// Waits until `done` answers something, and fails after [`PATIENCE`].
#[track_caller]
pub fn wait_for<T>(what: &str, done: impl FnMut() -> Option<T>) -> T {
    wait_long(what, PATIENCE, done)
}

/// The same for what takes longer by its nature.
#[track_caller]
pub fn wait_long<T>(what: &str, patience: Duration, mut done: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(result) = done() {
            return result;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What the tokens of the tests' accounts have in them. Nothing that a server or
/// a forwarder leaves behind may have it, whatever the test was about.
pub const TOKENS: [&str; 4] = [
    "token-of-",
    "fresh-token",
    "new-token",
    "sample-token-not-real",
];

/// A line of `bytes` with a token in it, or where `keys` says so with a whole
/// client key of the module's making.
pub fn leak(bytes: &[u8], keys: bool) -> Option<String> {
    const PREFIX: &str = "sk-cli-v1-";
    let is_whole = |start: usize| {
        let digits = bytes[start + PREFIX.len()..].iter().take(64);
        digits.filter(|byte| byte.is_ascii_hexdigit()).count() == 64
    };
    let mut tokens = TOKENS
        .iter()
        .filter_map(|token| memchr::memmem::find(bytes, token.as_bytes()));
    let key = || memchr::memmem::find_iter(bytes, PREFIX).find(|start| is_whole(*start));
    let start = tokens.next().or_else(|| key().filter(|_| keys))?;
    let begin = bytes[..start].iter().rposition(|byte| *byte == b'\n');
    let line = &bytes[begin.map_or(0, |at| at + 1)..];
    let end = line.iter().position(|byte| *byte == b'\n');
    let line = &line[..end.unwrap_or(line.len()).min(1000)];
    Some(String::from_utf8_lossy(line).into_owned())
}

/// A log without the lines in which Redis 8 names keys that expire or are
/// evicted, at this level, as README says.
fn without_servers_own(log: &[u8]) -> Vec<u8> {
    let ends = [&b" expired: deleting it"[..], b" evicted: deleting it"];
    let is_own = |line: &[u8]| ends.iter().any(|end| line.trim_ascii_end().ends_with(end));
    let lines = log.split_inclusive(|byte| *byte == b'\n');
    let kept = lines.filter(|line| {
        !is_own(line)
            || TOKENS
                .iter()
                .any(|token| memchr::memmem::find(line, token.as_bytes()).is_some())
    });
    kept.flatten().copied().collect()
}

/// Fails if a file below the folder holds a token, or a log a whole client key.
#[track_caller]
pub fn check_no_leak(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            check_no_leak(&path);
        } else if entry.file_type().is_ok_and(|kind| kind.is_file()) {
            let name = entry.file_name();
            let is_log = name.to_str().is_some_and(|name| name.ends_with("log"));
            let mut bytes = fs::read(&path).unwrap_or_default();
            if is_log {
                bytes = without_servers_own(&bytes);
            }
            let found = leak(&bytes, is_log);
            assert_eq!(found, None, "a secret is in {}", path.display());
        }
    }
}

/// How a server is to be started.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Arguments of redis-server.
    pub server: Vec<String>,
    /// Arguments of the module besides account-dir.
    pub module: Vec<String>,
    /// Start without the module.
    pub bare: bool,
    /// Account files that are there before the start: tier/name and content.
    pub accounts: Vec<(String, String)>,
    /// On this machine's loopback unless told.
    pub place: Place,
    /// The environment besides what it has anyway.
    pub env: Vec<(String, OsString)>,
    /// How long starting may take, loading included; [`PATIENCE`] unless told.
    pub patience: Option<Duration>,
}

impl Options {
    pub fn server(mut self, args: &[&str]) -> Self {
        self.server.extend(args.iter().map(ToString::to_string));
        self
    }

    pub fn module(mut self, args: &[&str]) -> Self {
        self.module.extend(args.iter().map(ToString::to_string));
        self
    }

    /// Accounts of the tier medium with a token `token-of-NAME`.
    pub fn accounts(mut self, names: &[&str]) -> Self {
        self.accounts.extend(
            names
                .iter()
                .map(|name| (format!("medium/{name}"), bearer(name))),
        );
        self
    }

    /// A replica of that server.
    pub fn replica_of(self, primary: &Server) -> Self {
        self.server(&["--replicaof", primary.host(), &primary.port.to_string()])
    }

    pub fn file(mut self, account: &str, content: &str) -> Self {
        self.accounts.push((account.to_owned(), content.to_owned()));
        self
    }

    pub fn start(self) -> Server {
        Server::start(self)
    }
}

/// An account file with the token `token-of-NAME` and no end.
pub fn bearer(name: &str) -> String {
    format!(r#"{{"access_token": "token-of-{name}"}}"#)
}

/// A redis-server that lives as long as this value.
#[derive(Debug)]
pub struct Server {
    child: Option<Child>,
    pub port: u16,
    pub folder: TempDir,
    options: Options,
    /// What it leaves behind holds secrets by the test's own doing.
    pub is_excused: bool,
}

impl Server {
    /// A server with the module, its account folder in `folder/account`.
    pub fn start(options: Options) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for tier in ["medium", "high", "supreme"] {
            fs::create_dir_all(folder.path().join("account").join(tier)).unwrap();
        }
        fs::create_dir(folder.path().join("data")).unwrap();
        let mut server = Self {
            child: None,
            port: 0,
            folder,
            options,
            is_excused: false,
        };
        for (account, content) in server.options.accounts.clone() {
            server.write_account(&account, &content);
        }
        server.launch();
        server
    }

    /// With the module from the next start on, or without.
    pub fn set_bare(&mut self, bare: bool) {
        self.options.bare = bare;
    }

    /// Starts the process, on a port that stays the same from then on.
    pub fn launch(&mut self) {
        let chosen = self.port != 0;
        for _ in 0..10 {
            if !chosen {
                self.port = free_port();
            }
            if self.try_launch() {
                return;
            }
        }
        panic!("redis-server does not start:\n{}", self.log());
    }

    fn try_launch(&mut self) -> bool {
        // One that came up too late, or on a port of another's.
        self.kill();
        let data = self.folder.path().join("data");
        let mut command = self.options.place.command(server_binary());
        command.args(["--port", &self.port.to_string(), "--bind", self.host()]);
        let defaults = [
            ("--save", ""),
            ("--logfile", "log"),
            ("--protected-mode", "no"),
            // All that it can be made to say is searched for secrets at the end.
            ("--loglevel", "debug"),
            ("--enable-debug-command", "yes"),
            ("--enable-module-command", "yes"),
            ("--enable-protected-configs", "yes"),
            // A replica would wait 5 s for others to join it.
            ("--repl-diskless-sync-delay", "0"),
            // And a primary 10 s for a replica that is gone.
            ("--shutdown-timeout", "0"),
        ];
        command.args(defaults.iter().flat_map(|(name, value)| [name, value]));
        command.arg("--dir").arg(&data).args(&self.options.server);
        if !self.options.bare {
            command
                .arg("--loadmodule")
                .arg(module())
                .arg("account-dir")
                .arg(self.account_dir());
            command.args(&self.options.module);
        }
        command
            .current_dir(&data)
            // Where a panic in the module is worst.
            .env("RUST_BACKTRACE", "1")
            .envs(self.options.env.clone())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = self
            .child
            .insert(command.spawn().expect("redis-server is not installed"));
        let deadline = Instant::now() + self.options.patience.unwrap_or(PATIENCE);
        let client = redis::Client::open((self.options.place.host.as_str(), self.port)).unwrap();
        while Instant::now() < deadline {
            if child.try_wait().unwrap().is_some() {
                self.child = None;
                return false;
            }
            let ready = client.get_connection().and_then(|mut connection| {
                redis::cmd("INFO").query::<redis::InfoDict>(&mut connection)
            });
            match ready {
                Ok(info) if info.get("loading") == Some(1) => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                // Another test's server may have taken the port meanwhile.
                Ok(info) => return info.get::<u32>("process_id") == Some(child.id()),
                // A password is asked for: the server is up.
                Err(error) if error.code() == Some("NOAUTH") => return true,
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
        false
    }

    /// Other arguments of the server, from the next launch on.
    pub fn set_server_args(&mut self, args: &[&str]) {
        self.options.server = args.iter().map(ToString::to_string).collect();
    }

    /// Further arguments of the module, from the next launch on.
    pub fn add_module_args(&mut self, args: &[&str]) {
        self.options
            .module
            .extend(args.iter().map(ToString::to_string));
    }

    pub fn account_dir(&self) -> PathBuf {
        self.folder.path().join("account")
    }

    /// What loads the module into the server as it is started with it.
    pub fn load_words(&self) -> Vec<String> {
        let (path, folder) = (module(), self.account_dir());
        let words = ["MODULE", "LOAD", path.to_str().unwrap()];
        let folder = ["account-dir", folder.to_str().unwrap()];
        let words = words.iter().chain(&folder).map(ToString::to_string);
        words.chain(self.options.module.iter().cloned()).collect()
    }

    pub fn account_file(&self, account: &str) -> PathBuf {
        self.account_dir().join(format!("{account}.json"))
    }

    /// Writes an account file at once, as `tier/name`.
    pub fn write_account(&self, account: &str, content: &str) {
        let path = self.account_file(account);
        let new = path.with_extension("new");
        // As an operator should: nobody else may read it.
        let mut file = OpenOptions::new();
        let file = file.write(true).create(true).truncate(true).mode(0o600);
        let mut file = file.open(&new).unwrap();
        file.write_all(content.as_bytes()).unwrap();
        drop(file);
        fs::rename(new, path).unwrap();
    }

    pub fn remove_account(&self, account: &str) {
        fs::remove_file(self.account_file(account)).unwrap();
    }

    /// The address that it listens on.
    pub fn host(&self) -> &str {
        &self.options.place.host
    }

    pub fn url(&self) -> String {
        format!("redis://{}:{}/", self.host(), self.port)
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the server runs").id()
    }

    /// A RESP2 connection.
    pub fn connect(&self) -> Client {
        Client::open(&self.url())
    }

    /// A RESP3 connection.
    pub fn connect3(&self) -> Client {
        Client::open(&format!("{}?protocol=resp3", self.url()))
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("data/log")).unwrap_or_default()
    }

    /// Ends the process without a chance to tidy up.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Ends the process in order, what is to persist written.
    pub fn shutdown(&mut self) {
        let _ = self.connect().try_run::<Value>(&["SHUTDOWN"]);
        if let Some(mut child) = self.child.take() {
            wait_for("the server's end", || child.try_wait().unwrap());
        }
    }

    /// Sends the process a signal by its name.
    pub fn signal(&self, name: &str) {
        signal(self.pid(), name);
    }

    /// Asks the process to end, with whatever it does before that.
    fn end_in_order(&mut self) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        let asked = Command::new("bash")
            .args(["-c", "kill \"$0\"", &child.id().to_string()])
            .status();
        let deadline = Instant::now() + PATIENCE;
        let ended = loop {
            match child.try_wait().unwrap() {
                None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                status => break status,
            }
        };
        let _ = child.kill();
        let _ = child.wait();
        assert!(
            ended.is_some_and(|status| status.success()),
            "the server was asked to end ({asked:?}) and ended with {ended:?}: {}",
            self.log()
        );
    }

    /// Whether the process is there; it must never go by itself.
    pub fn is_alive(&mut self) -> bool {
        self.child
            .as_mut()
            .is_some_and(|child| child.try_wait().unwrap().is_none())
    }
}

impl Server {
    /// What it tells those who may ask, if it can be asked.
    fn told(&self) -> Option<String> {
        let soon = Duration::from_millis(500);
        let client = redis::Client::open(self.url()).ok()?;
        let mut connection = client.get_connection_with_timeout(soon).ok()?;
        connection.set_read_timeout(Some(soon)).ok()?;
        let mut told = String::new();
        for words in [
            &["INFO", "everything"][..],
            &["SLOWLOG", "GET", "-1"],
            &["CLIENT", "LIST"],
            &["ACL", "LOG"],
            &["LATENCY", "LATEST"],
        ] {
            let answer = redis::cmd(words[0])
                .arg(&words[1..])
                .query::<Value>(&mut connection);
            told += &format!("{answer:?}\n");
        }
        Some(told)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let swept = !std::thread::panicking() && !self.is_excused;
        let told = self
            .child
            .as_ref()
            .filter(|_| swept)
            .and_then(|_| self.told());
        // A leak is looked for when a process ends by itself.
        if std::env::var_os("MPOOL_TEST_ORDERLY").is_some() && !std::thread::panicking() {
            self.end_in_order();
        }
        self.kill();
        if swept {
            check_no_leak(&self.folder.path().join("data"));
            assert_eq!(leak(told.unwrap_or_default().as_bytes(), false), None);
        }
        if std::thread::panicking() {
            eprintln!(
                "--- log of the server on port {} ---\n{}",
                self.port,
                self.log()
            );
        }
    }
}

/// Sends a process a signal by its name: TERM, INT, STOP, CONT.
pub fn signal(pid: u32, name: &str) {
    // The shell's own kill: there need not be a program of that name.
    let sent = Command::new("bash")
        .args(["-c", "kill -s \"$0\" \"$1\"", name, &pid.to_string()])
        .status()
        .unwrap();
    assert!(sent.success());
}

/// A connection with the commands that tests use most.
pub struct Client {
    pub connection: Connection,
}

impl Client {
    #[track_caller]
    pub fn open(url: &str) -> Self {
        let connection = redis::Client::open(url)
            .unwrap()
            .get_connection_with_timeout(PATIENCE)
            .unwrap();
        connection.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { connection }
    }

    pub fn try_run<T: FromRedisValue>(&mut self, words: &[&str]) -> RedisResult<T> {
        self.try_bytes(&words.iter().map(|word| word.as_bytes()).collect::<Vec<_>>())
    }

    pub fn try_bytes<T: FromRedisValue>(&mut self, words: &[&[u8]]) -> RedisResult<T> {
        let mut command = redis::Cmd::new();
        for word in words {
            command.arg(*word);
        }
        command.query(&mut self.connection)
    }

    #[track_caller]
    pub fn run<T: FromRedisValue>(&mut self, words: &[&str]) -> T {
        self.try_run(words)
            .unwrap_or_else(|error| panic!("{words:?}: {error}"))
    }

    /// A command whose answer doesn't matter, as long as it is none an error.
    #[track_caller]
    pub fn ok(&mut self, words: &[&str]) {
        self.run::<Value>(words);
    }

    /// A reply of names and values, by name.
    #[track_caller]
    pub fn map(&mut self, words: &[&str]) -> BTreeMap<String, Value> {
        self.run(words)
    }

    /// Unloads the module. The server does so once no timer of the module's is
    /// set and no client waits for it, and refuses until then.
    pub fn unload(&mut self) {
        wait_for("the module to go", || {
            match self.try_run::<Value>(&["MODULE", "UNLOAD", "mpool"]) {
                Ok(_) => Some(()),
                Err(error) => {
                    let error = error.to_string();
                    let later = error.contains("timer") || error.contains("blocked");
                    assert!(later, "{error}");
                    None
                }
            }
        });
    }

    /// Loads the module again, as that server was started with it.
    #[track_caller]
    pub fn load(&mut self, server: &Server) {
        let load = server.load_words();
        self.ok(&load.iter().map(String::as_str).collect::<Vec<_>>());
    }

    /// Sends a command whose answer is to be waited for later, or never.
    pub fn send(&mut self, words: &[&str]) {
        let mut command = redis::Cmd::new();
        command.arg(words);
        let packed = command.get_packed_command();
        self.connection.send_packed_command(&packed).unwrap();
    }

    /// The whole text of the error that the command must give.
    #[track_caller]
    pub fn error(&mut self, words: &[&str]) -> String {
        self.error_bytes(&words.iter().map(|word| word.as_bytes()).collect::<Vec<_>>())
    }

    #[track_caller]
    pub fn error_bytes(&mut self, words: &[&[u8]]) -> String {
        match self.try_bytes::<Value>(words) {
            Err(error) => format!(
                "{} {}",
                error.code().unwrap_or_default(),
                error.detail().unwrap_or_default()
            ),
            Ok(value) => panic!("{words:?} was not refused: {value:?}"),
        }
    }

    /// Registers so many client keys by hand, [`numbered_key`] 0 and on.
    pub fn register(&mut self, keys: usize) {
        for portion in (0..keys).collect::<Vec<_>>().chunks(1_000) {
            let mut pipe = redis::pipe();
            for &number in portion {
                let name = format!("client_keys:{}", numbered_key(number));
                let record = ["tier", "medium", "use_pool", "true", "active", "true"];
                pipe.cmd("HSET").arg(name).arg(&record).ignore();
            }
            pipe.query::<()>(&mut self.connection).unwrap();
        }
    }

    /// Waits until the module has read the keyspace.
    #[track_caller]
    pub fn wait_until_ready(&mut self) {
        wait_long("the keyspace to be read", 10 * PATIENCE, || {
            (self.info("mpool", "mpool_ready") == "1").then_some(())
        });
    }

    /// A new key of the pool.
    #[track_caller]
    pub fn pool_key(&mut self) -> String {
        text(
            &self.map(&[
                "MPOOL.KEYGEN",
                "medium",
                "POOL",
                "DAYS",
                "36500",
                "NOW",
                "0",
            ])["key"],
        )
    }

    #[track_caller]
    pub fn acquire(&mut self, key: &str, now: i64) -> Lease {
        self.try_acquire(key, now)
            .unwrap_or_else(|error| panic!("{error}"))
    }

    /// The lease, or the text of the error.
    pub fn try_acquire(&mut self, key: &str, now: i64) -> Result<Lease, String> {
        let reply: RedisResult<BTreeMap<String, Value>> =
            self.try_run(&["MPOOL.ACQUIRE", key, &now.to_string()]);
        match reply {
            Ok(reply) => Ok(Lease::of(&reply)),
            Err(error) => Err(format!(
                "{} {}",
                error.code().unwrap_or_default(),
                error.detail().unwrap_or_default()
            )),
        }
    }

    /// What the keyspace says of an account's slots in use.
    pub fn slots(&mut self, account: &str) -> Option<u64> {
        self.run(&["GET", &format!("medium_pool:slots:{account}")])
    }

    /// Counts what the keyspace says against itself: each account's slots key
    /// against the leases that name it, each within `capacity`.
    #[track_caller]
    pub fn check_invariants(&mut self, capacity: u64) {
        assert_eq!(self.broken_invariant(capacity), None);
    }

    /// What the keyspace says that can't be.
    #[track_caller]
    pub fn broken_invariant(&mut self, capacity: u64) -> Option<String> {
        self.try_broken_invariant(capacity).unwrap()
    }

    /// The same of a server that may go meanwhile.
    pub fn try_broken_invariant(&mut self, capacity: u64) -> RedisResult<Option<String>> {
        let script = r"
            local counts, leases = {}, {}
            for _, key in ipairs(redis.call('KEYS', 'medium_pool:slots:*')) do
                local text = redis.call('GET', key)
                if text ~= tostring(tonumber(text)) then return key .. ' holds ' .. text end
                counts[string.sub(key, 19)] = tonumber(text)
                if not counts[string.sub(key, 19)] then return key .. ' is no number' end
            end
            for _, key in ipairs(redis.call('KEYS', 'key_rotation:*')) do
                local hash = redis.call('TYPE', key).ok == 'hash'
                local account = hash and redis.call('HGET', key, 'account')
                if account then leases[account] = (leases[account] or 0) + 1 end
            end
            for account, count in pairs(counts) do
                if count ~= (leases[account] or 0) then return account .. ' has ' .. count .. ' for ' .. (leases[account] or 0) end
                if count > tonumber(ARGV[1]) then return account .. ' is over capacity with ' .. count end
            end
            for account, count in pairs(leases) do
                if not counts[account] then return account .. ' has leases and no counter' end
            end
            return 'right'";
        let verdict: String = self.try_run(&["EVAL", script, "0", &capacity.to_string()])?;
        Ok((verdict != "right").then_some(verdict))
    }

    /// What the keyspace holds, and how many writes there have been.
    pub fn traces(&mut self) -> (String, i64) {
        let digest = self.run(&["DEBUG", "DIGEST"]);
        let info: redis::InfoDict = self.run(&["INFO", "persistence"]);
        (digest, info.get("rdb_changes_since_last_save").unwrap())
    }

    /// What `INFO` says under that name.
    #[track_caller]
    pub fn info(&mut self, section: &str, name: &str) -> String {
        let info: redis::InfoDict = self.run(&["INFO", section]);
        info.get(name)
            .unwrap_or_else(|| panic!("INFO {section} has no {name}"))
    }

    /// How often that command has been sent, by whomever.
    pub fn calls(&mut self, command: &str) -> u64 {
        let stats: redis::InfoDict = self.run(&["INFO", "commandstats"]);
        let stat: Option<String> = stats.get(&format!("cmdstat_{command}"));
        let stat = stat.unwrap_or_else(|| "calls=0,".to_owned());
        let calls = stat.strip_prefix("calls=").unwrap().split(',').next();
        calls.unwrap().parse().unwrap()
    }

    /// The command must be refused with an error that begins with `code`, and
    /// nothing may have been written. Answers the error's text.
    #[track_caller]
    pub fn refused(&mut self, code: &str, words: &[&str]) -> String {
        let before = self.traces();
        let error = self.error(words);
        assert_eq!(error.split(' ').next(), Some(code), "{words:?}: {error}");
        assert_eq!(self.traces(), before, "{words:?} was refused and yet wrote");
        error
    }

    /// A new key bound to an account, as `tier/name`.
    #[track_caller]
    pub fn bound_key(&mut self, account: &str) -> String {
        let (tier, name) = account.split_once('/').unwrap();
        text(&self.map(&["MPOOL.KEYGEN", tier, name, "DAYS", "36500", "NOW", "0"])["key"])
    }

    /// The account that the key's hash names.
    pub fn holds(&mut self, key: &str) -> Option<String> {
        self.run(&["HGET", &format!("key_rotation:{key}"), "account"])
    }

    /// Waits until the pool knows the account, of the tier medium, or no longer.
    #[track_caller]
    pub fn wait_for_account(&mut self, account: &str, there: bool) {
        let slots = format!("medium_pool:slots:{account}");
        wait_for(&format!("{account} to be there: {there}"), || {
            (self.run::<bool>(&["EXISTS", &slots]) == there).then_some(())
        });
    }

    /// Every account and lease that STATUS shows of the tier, page by page.
    #[track_caller]
    pub fn pages(&mut self, list: &str, tier: &str, count: &str) -> Vec<BTreeMap<String, Value>> {
        let (mut rows, mut cursor) = (Vec::new(), "0".to_owned());
        loop {
            let page = self.map(&[
                "MPOOL.STATUS",
                list,
                tier,
                "CURSOR",
                &cursor,
                "COUNT",
                count,
            ]);
            rows.extend(maps(&page[&list.to_lowercase()]));
            cursor = text(&page["cursor"]);
            if cursor == "0" {
                return rows;
            }
        }
    }

    /// What STATUS says of one account of the tier medium.
    #[track_caller]
    pub fn account_status(&mut self, account: &str, now: i64) -> Option<BTreeMap<String, Value>> {
        let page = self.map(&[
            "MPOOL.STATUS",
            "ACCOUNTS",
            "medium",
            "NOW",
            &now.to_string(),
            "COUNT",
            "1000",
        ]);
        maps(&page["accounts"])
            .into_iter()
            .find(|row| text(&row["account"]) == account)
    }

    /// The state of an account of the tier medium: available, partial, full …
    #[track_caller]
    pub fn state(&mut self, account: &str, now: i64) -> Option<String> {
        self.account_status(account, now)
            .map(|row| text(&row["state"]))
    }

    /// The files that STATUS calls invalid, as `tier/file`, with the reasons.
    #[track_caller]
    pub fn invalid_files(&mut self) -> BTreeMap<String, String> {
        named_reasons(&self.map(&["MPOOL.STATUS"])["invalid_files"])
    }

    /// REPAIR must find nothing to change.
    #[track_caller]
    pub fn check_repair(&mut self) {
        let repair: BTreeMap<String, i64> = self.run(&["MPOOL.REPAIR"]);
        assert_eq!(repair["changed"], 0, "{repair:?}");
    }
}

/// A client key of [`Client::register`].
pub fn numbered_key(number: usize) -> String {
    format!("key-{number:06}")
}

/// Does something while the module of a server with many keys reads its keyspace: that
/// is another one again and again. Nothing of it is changed.
pub fn while_reading<T>(server: &Server, work: impl FnOnce() -> T) -> T {
    let over = AtomicBool::new(false);
    let mut client = server.connect();
    let mut swap_twice = move || {
        let mut multi = redis::pipe();
        multi.atomic().cmd("SWAPDB").arg(0).arg(1);
        multi.cmd("SWAPDB").arg(0).arg(1).cmd("INFO").arg("mpool");
        let (_, _, info): (Value, Value, redis::InfoDict) =
            multi.query(&mut client.connection).unwrap();
        assert_eq!(info.get("mpool_ready"), Some(0), "it was read at once");
    };
    swap_twice();
    let outcome = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(5));
                swap_twice();
            }
        });
        let outcome = catch_unwind(AssertUnwindSafe(work));
        // First, or a failure would leave the other at work for ever.
        over.store(true, Ordering::Relaxed);
        outcome
    });
    outcome.unwrap_or_else(|panic| resume_unwind(panic))
}

/// Processor time that a process has used so far, in user space and in the kernel.
pub fn cpu_time(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // The name, in brackets, may hold anything.
    let (_, rest) = stat.rsplit_once(") ").unwrap();
    let ticks = rest.split(' ').skip(11).take(2);
    let ticks: u64 = ticks.map(|number| number.parse::<u64>().unwrap()).sum();
    // /proc counts in hundredths of a second on every machine.
    Duration::from_millis(ticks * 10)
}

/// The reply to an acquire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    pub account: String,
    pub state: String,
    pub previous: Option<String>,
    pub last: Option<i64>,
    pub next: Option<i64>,
}

impl Lease {
    pub fn of(reply: &BTreeMap<String, Value>) -> Self {
        Self {
            account: text(&reply["account"]),
            state: text(&reply["state"]),
            previous: optional_text(&reply["previous_account"]),
            last: optional_number(&reply["last_rotation"]),
            next: optional_number(&reply["next_rotation"]),
        }
    }
}

/// A list of invalid files as RELOAD and STATUS give it, as `tier/file`.
pub fn named_reasons(list: &Value) -> BTreeMap<String, String> {
    let files = maps(list).into_iter();
    files
        .map(|file| {
            (
                format!("{}/{}", text(&file["tier"]), text(&file["file"])),
                text(&file["reason"]),
            )
        })
        .collect()
}

/// A list of maps, in either protocol.
#[track_caller]
pub fn maps(list: &Value) -> Vec<BTreeMap<String, Value>> {
    redis::from_redis_value_ref(list).unwrap()
}

/// The names in a reply of names and values, in the order given.
#[track_caller]
pub fn names(reply: &Value) -> Vec<String> {
    match reply {
        Value::Map(pairs) => pairs.iter().map(|(name, _)| text(name)).collect(),
        Value::Array(items) => items.iter().step_by(2).map(text).collect(),
        other => panic!("not a map: {other:?}"),
    }
}

/// Waits until both servers hold the same, the second one following the first.
#[track_caller]
pub fn wait_for_same(primary: &mut Client, replica: &mut Client) {
    wait_for("the replica to catch up", || {
        let up = replica.info("replication", "master_link_status") == "up";
        let same = up && primary.traces().0 == replica.traces().0;
        same.then_some(())
    });
}

/// The seed of what a test does at random: `MPOOL_TEST_SEED`, or the clock. It is
/// printed, so that a failure can be had again.
pub fn seed() -> u64 {
    let clock = || {
        std::time::SystemTime::UNIX_EPOCH
            .elapsed()
            .unwrap()
            .as_nanos() as u64
    };
    let seed = std::env::var("MPOOL_TEST_SEED")
        .ok()
        .map_or_else(clock, |seed| seed.parse().unwrap());
    println!("MPOOL_TEST_SEED={seed}");
    seed
}

/// A random source from [`seed`].
pub fn seeded() -> rand::rngs::SmallRng {
    rand::SeedableRng::seed_from_u64(seed())
}

#[track_caller]
pub fn text(value: &Value) -> String {
    optional_text(value).unwrap_or_else(|| panic!("a text is missing"))
}

pub fn optional_text(value: &Value) -> Option<String> {
    redis::from_redis_value_ref(value).unwrap()
}

pub fn optional_number(value: &Value) -> Option<i64> {
    redis::from_redis_value_ref(value).unwrap()
}
