//! Commands as a person types them: bash in a folder laid out like the
//! repository, with a `redis-cli` that takes port 6380 for the test's own, the
//! `redis-server` that is to be tested with, and in a copy a `curl` that does so with 8080 and 8081. What is typed reaches the
//! test's servers alone.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test binary uses its own part of this"
)]

use crate::support::{Server, repository, search_path, server_binary};
use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use tempfile::TempDir;

/// The port that the guide and the README type.
pub const TYPED_PORT: u16 = 6380;
/// The port of the forwarder that the README types; its admin port is the next.
pub const TYPED_FORWARDER: u16 = 8080;
/// Seconds after which a command that is still running has failed.
const LIMIT: &str = "60";

/// A shell to type into.
pub struct Terminal {
    folder: TempDir,
    environment: BTreeMap<String, String>,
}

/// What a command printed and how it ended.
#[derive(Debug)]
pub struct Outcome {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    /// The output of a command that must have ended well.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "{}\n{}", self.stdout, self.stderr);
        self.stdout
    }

    /// What a command said that must have ended with `code` and printed nothing else.
    #[track_caller]
    pub fn fails(self, code: i32) -> String {
        assert_eq!(self.code, code, "{}\n{}", self.stdout, self.stderr);
        assert_eq!(self.stdout, "");
        assert!(!self.stderr.is_empty(), "it says nothing");
        self.stderr
    }
}

impl Terminal {
    /// A shell whose `redis-cli -p 6380` and scripts reach the server, and
    /// whose folder `account` is the server's.
    pub fn of(server: &Server) -> Self {
        let terminal = Self::at(server.port);
        fs::remove_dir(terminal.folder().join("account")).unwrap();
        symlink(server.account_dir(), terminal.folder().join("account")).unwrap();
        terminal
    }

    /// A shell for whatever listens on a port of this machine.
    pub fn at(port: u16) -> Self {
        let terminal = Self {
            folder: tempfile::tempdir().unwrap(),
            environment: BTreeMap::new(),
        };
        let root = terminal.folder();
        fs::create_dir_all(root.join("account")).unwrap();
        for folder in ["shell", "examples"] {
            symlink(repository().join(folder), root.join(folder)).unwrap();
        }
        let wrapper = format!(
            r#"#!/bin/bash
{{ tr '\0' ' ' </proc/$PPID/cmdline; printf '%s ' "$@"; echo; }} >>'{log}'
for ((i = 1; i < $#; i++)); do
  if [[ ${{!i}} == -p ]]; then
    j=$((i + 1))
    if [[ ${{!j}} == {TYPED_PORT} ]]; then set -- "${{@:1:i}}" {port} "${{@:j+1}}"; fi
    break
  fi
done
if [[ -n ${{MPOOL_TEST_STRICT:-}} ]]; then set -- -e "$@"; fi
exec '{real}' "$@"
"#,
            log = terminal.log_path().display(),
            real = program("redis-cli").display(),
        );
        terminal.install("redis-cli", &wrapper);
        if std::env::var_os("MPOOL_TEST_SERVER").is_some() {
            let server = format!("#!/bin/bash\nexec '{}' \"$@\"\n", server_binary().display());
            terminal.install("redis-server", &server);
        }
        terminal.env("MPOOL_REDIS_PORT", &port.to_string())
    }

    /// A shell in a copy of the repository, for commands that start a server on
    /// the port, and a forwarder on a port of the test's choice. An error reply
    /// ends `redis-cli` and `curl` with an error. In the place of a build stands
    /// what is built already, and `make test` is not run within itself: it has to
    /// be a target.
    pub fn in_a_copy(port: u16, forwarder: u16) -> Self {
        let terminal = Self::at(port);
        let root = terminal.folder();
        for folder in ["shell", "examples"] {
            fs::remove_file(root.join(folder)).unwrap();
        }
        for folder in ["shell", "examples", "scripts"] {
            copy_folder(&repository().join(folder), &root.join(folder));
        }
        fs::copy(repository().join("Makefile"), root.join("Makefile")).unwrap();
        for tier in ["medium", "high", "supreme"] {
            fs::create_dir_all(root.join("account").join(tier)).unwrap();
        }
        let cargo = format!(
            r#"#!/bin/bash
[[ $1 == build ]] || exit 1
release=$CARGO_TARGET_DIR/release
mkdir -p "$release/examples"
install '{module}' "$release/libmpool.so"
ln -sf '{forwarder}' "$release/mpool-forwarder"
ln -sf '{demo}' "$release/examples/demo-upstream"
"#,
            module = crate::support::module().display(),
            forwarder = env!("CARGO_BIN_EXE_mpool-forwarder"),
            demo = demo_upstream().display(),
        );
        terminal.install("cargo", &cargo);
        let make = format!(
            "#!/bin/bash\nif [[ $1 == test ]]; then set -- -n test; fi\nexec '{}' \"$@\"\n",
            program("make").display()
        );
        terminal.install("make", &make);
        let curl = format!(
            r#"#!/bin/bash
arguments=()
for argument; do
  argument=${{argument/#http:\/\/127.0.0.1:{TYPED_FORWARDER}/http://127.0.0.1:{forwarder}}}
  argument=${{argument/#http:\/\/127.0.0.1:{typed_admin}/http://127.0.0.1:{admin}}}
  arguments+=("$argument")
done
if [[ -n ${{MPOOL_TEST_STRICT:-}} ]]; then set -- --fail; else set --; fi
exec '{real}' "$@" "${{arguments[@]}}"
"#,
            typed_admin = TYPED_FORWARDER + 1,
            admin = forwarder + 1,
            real = program("curl").display(),
        );
        terminal.install("curl", &curl);
        let target = root.join("target");
        let terminal = terminal.env("CARGO_TARGET_DIR", target.to_str().unwrap());
        terminal
            .env("PORT", &port.to_string())
            .env("FORWARDER_PORT", &forwarder.to_string())
            .env("DEMO_PORT", "0")
            .env("MPOOL_TEST_STRICT", "1")
    }

    /// The folder in which commands run.
    pub fn folder(&self) -> PathBuf {
        // Where the temporary folder is a link, scripts name what it leads to.
        let folder = self.folder.path().canonicalize().unwrap().join("clone");
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    /// Puts a program before all others of its name.
    pub fn install(&self, name: &str, script: &str) {
        let bin = self.folder.path().join("bin");
        fs::create_dir_all(&bin).unwrap();
        fs::write(bin.join(name), script).unwrap();
        fs::set_permissions(bin.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn log_path(&self) -> PathBuf {
        self.folder.path().join("command-lines")
    }

    /// Every command line that redis-cli, and the program that started it, had.
    pub fn command_lines(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Runs what was typed.
    pub fn run(&self, typed: &str) -> Outcome {
        let mut command = Command::new("timeout");
        command.args(["--kill-after", "1", LIMIT, "bash", "-c", typed]);
        let path = search_path().into_string().unwrap();
        command
            .current_dir(self.folder())
            .stdin(Stdio::null())
            .env_clear();
        for kept in [
            "HOME",
            "LD_LIBRARY_PATH",
            "CARGO_HOME",
            "RUSTUP_HOME",
            "TMPDIR",
        ] {
            command.envs(std::env::var_os(kept).map(|value| (kept, value)));
        }
        command.env(
            "PATH",
            format!("{}:{path}", self.folder.path().join("bin").display()),
        );
        command
            .env("LC_ALL", "C.UTF-8")
            .env("NO_PROXY", "*")
            .envs(&self.environment);
        let output = command.output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Outcome {
            code: output.status.code().unwrap_or(-1),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        }
    }
}

/// Ends what `make run` started, should a test stop before `make stop`.
pub struct Started<'a>(&'a Terminal);

impl<'a> Started<'a> {
    pub fn by(terminal: &'a Terminal) -> Self {
        Self(terminal)
    }
}

impl Drop for Started<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.0.run("tail -n 30 data/*.log").stdout);
        }
        self.0.run(
            "for file in data/*.pid; do if [[ -f $file ]]; then kill -KILL \"$(<\"$file\")\"; fi; done",
        );
        if !std::thread::panicking() {
            crate::support::check_no_leak(&self.0.folder().join("data"));
        }
    }
}

/// A port that nothing listens on, nor on the one after it, below those that the
/// system gives to outgoing connections.
pub fn free_pair() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = (std::process::id() % 6000) as u16;
    loop {
        let port = 20_000 + 2 * ((start + NEXT.fetch_add(1, Ordering::Relaxed)) % 6000);
        let is_free = |port: u16| TcpListener::bind(("127.0.0.1", port)).is_ok();
        if is_free(port) && is_free(port + 1) {
            return port;
        }
    }
}

/// The demo upstream, which `make build` builds before the tests run.
#[track_caller]
fn demo_upstream() -> PathBuf {
    let forwarder = Path::new(env!("CARGO_BIN_EXE_mpool-forwarder"));
    let demo = forwarder.with_file_name("examples").join("demo-upstream");
    assert!(
        demo.exists(),
        "the demo upstream is not built: run `make build` first"
    );
    demo
}

/// Where a program is that these tests can't do without.
#[track_caller]
pub fn program(name: &str) -> PathBuf {
    let found = std::env::split_paths(&search_path())
        .map(|folder| folder.join(name))
        .find(|file| file.is_file());
    found
        .unwrap_or_else(|| panic!("{name} is not installed: run `scripts/install-deps test` first"))
}

/// The text of a file of the repository.
#[track_caller]
pub fn text_of(path: &str) -> String {
    let full = repository().join(path);
    fs::read_to_string(&full).unwrap_or_else(|error| panic!("{}: {error}", full.display()))
}

/// The client key in what a script printed.
#[track_caller]
pub fn key_in(printed: &str) -> String {
    let start = printed
        .find("sk-cli-v1-")
        .unwrap_or_else(|| panic!("no key in {printed:?}"));
    let rest = &printed[start..];
    let end = rest
        .find(|c: char| !c.is_ascii_alphanumeric() && c != '-')
        .unwrap_or(rest.len());
    let key = &rest[..end];
    assert_eq!(key.len(), "sk-cli-v1-".len() + 64, "{printed:?}");
    key.to_owned()
}

/// Copies a folder with all that is in it.
pub fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Where `scripts/install-deps test` installs what the examples need.
pub fn installed_packages() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    repository().join(target).join("examples")
}
