//! What the operator sets: flags, their environment variables, and what they
//! must be. All of it is checked before anything is bound or connected.

mod redis;
mod tls;

pub use redis::{RedisSettings, RedisTarget};

use crate::base::Base;
use crate::upstream::Protocol;
use bytesize::ByteSize;
use clap::builder::Resettable;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, FromArgMatches, Parser, ValueEnum};
use jiff::SignedDuration;
use redis::Beside;
use std::error::Error;
use std::ffi::OsString;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How each log line is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

/// The least that is logged: `warn` leaves out the lines of each request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogLevel {
    Error,
    Warn,
    Info,
}

/// Forwards HTTP requests to an API with the credentials of the accounts that mpool lends.
///
/// A client sends its key as `x-api-key` or `Authorization: Bearer`; the forwarder asks Redis which
/// account the key has, puts that account's credential in its place, and streams the answer back.
/// Every flag can be set in the environment as MPOOL_ and its name, such as MPOOL_UPSTREAM; the
/// password of Redis is taken from MPOOL_REDIS_PASSWORD alone (and the Sentinels' from
/// MPOOL_SENTINEL_PASSWORD), as flags are seen by everyone on the machine. Durations are written
/// like 500ms, 10s or 2m, sizes like 64KiB or 8MiB.
#[derive(Parser, Debug)]
#[command(name = "mpool-forwarder", version, max_term_width = 100)]
struct Flags {
    /// Where clients connect
    #[arg(
        long,
        env = "MPOOL_LISTEN",
        default_value = "127.0.0.1:8080",
        value_name = "IP:PORT"
    )]
    listen: SocketAddr,
    /// Where /healthz, /readyz and /metrics are; `off` for nowhere
    #[arg(
        long,
        env = "MPOOL_ADMIN",
        default_value = "127.0.0.1:8081",
        value_name = "IP:PORT"
    )]
    admin: String,
    /// The API's base URL: https://host, or with a path that comes before each request's
    #[arg(long, env = "MPOOL_UPSTREAM", value_name = "URL")]
    upstream: Option<String>,
    /// The Redis with mpool: redis://, rediss:// (TLS), or through Sentinel
    /// redis+sentinel://host:26379,host:26379/master-name, rediss+sentinel://…
    #[arg(
        long,
        env = "MPOOL_REDIS",
        default_value = "redis://127.0.0.1:6380",
        value_name = "URL"
    )]
    redis: String,
    /// ACL user of Redis, unless the URL names one
    #[arg(long, env = "MPOOL_REDIS_USER", value_name = "NAME")]
    redis_user: Option<String>,
    /// ACL user of the Sentinels
    #[arg(long, env = "MPOOL_SENTINEL_USER", value_name = "NAME")]
    sentinel_user: Option<String>,
    /// CA certificates of Redis (PEM), instead of the system's
    #[arg(long, env = "MPOOL_REDIS_CACERT", value_name = "FILE")]
    redis_cacert: Option<PathBuf>,
    /// Client certificate for Redis (PEM), with --redis-key
    #[arg(
        long,
        env = "MPOOL_REDIS_CERT",
        value_name = "FILE",
        requires = "redis_key"
    )]
    redis_cert: Option<PathBuf>,
    /// Key of the client certificate (PEM)
    #[arg(
        long,
        env = "MPOOL_REDIS_KEY",
        value_name = "FILE",
        requires = "redis_cert"
    )]
    redis_key: Option<PathBuf>,
    /// CA certificates of the upstream (PEM), instead of the system's
    #[arg(long, env = "MPOOL_UPSTREAM_CACERT", value_name = "FILE")]
    upstream_cacert: Option<PathBuf>,
    /// HTTP version towards the upstream. auto: what TLS negotiates, HTTP/1.1 without TLS
    #[arg(
        long,
        env = "MPOOL_UPSTREAM_PROTOCOL",
        default_value = "auto",
        value_enum
    )]
    upstream_protocol: Protocol,
    /// Certificate chain (PEM) for TLS on --listen, with --tls-key
    #[arg(
        long,
        env = "MPOOL_TLS_CERT",
        value_name = "FILE",
        requires = "tls_key"
    )]
    tls_cert: Option<PathBuf>,
    /// Key of the certificate (PEM)
    #[arg(
        long,
        env = "MPOOL_TLS_KEY",
        value_name = "FILE",
        requires = "tls_cert"
    )]
    tls_key: Option<PathBuf>,
    /// Threads that serve requests [default: one for each core]
    #[arg(long, env = "MPOOL_THREADS", value_name = "N")]
    threads: Option<usize>,

    /// How long Redis may take to answer
    #[arg(long, env = "MPOOL_REDIS_TIMEOUT", default_value = "1s", value_parser = duration)]
    redis_timeout: Duration,
    /// How long connecting to the upstream may take
    #[arg(long, env = "MPOOL_CONNECT_TIMEOUT", default_value = "5s", value_parser = duration)]
    connect_timeout: Duration,
    /// How long the upstream may take from the request's last byte to its answer's head
    #[arg(long, env = "MPOOL_RESPONSE_TIMEOUT", default_value = "10m", value_parser = duration)]
    response_timeout: Duration,
    /// How long an answer may be silent between two chunks
    #[arg(long, env = "MPOOL_STREAM_TIMEOUT", default_value = "10m", value_parser = duration)]
    stream_timeout: Duration,
    /// How long a client may take for a request's head
    #[arg(long, env = "MPOOL_HEADER_TIMEOUT", default_value = "15s", value_parser = duration)]
    header_timeout: Duration,
    /// How long a client's connection may be idle between requests
    #[arg(long, env = "MPOOL_KEEPALIVE_TIMEOUT", default_value = "75s", value_parser = duration)]
    keepalive_timeout: Duration,
    /// How long a client may be silent in the middle of a request's body
    #[arg(long, env = "MPOOL_BODY_TIMEOUT", default_value = "60s", value_parser = duration)]
    body_timeout: Duration,
    /// How long a client may leave what is sent to it unread
    #[arg(long, env = "MPOOL_SEND_TIMEOUT", default_value = "60s", value_parser = duration)]
    send_timeout: Duration,
    /// How long requests under way may go on after SIGTERM
    #[arg(long, env = "MPOOL_DRAIN_TIMEOUT", default_value = "30s", value_parser = duration)]
    drain_timeout: Duration,
    /// How long leases seen before are used while Redis can't be asked; 0s for not at all
    #[arg(long, env = "MPOOL_GRACE", default_value = "60s", value_parser = duration)]
    grace: Duration,
    /// How long a lease is used without asking again while Redis tells of no change to it; 0s asks for every request
    #[arg(long, env = "MPOOL_LEASE_CACHE", default_value = "60s", value_parser = duration)]
    lease_cache: Duration,
    /// The first cooldown of an account that the upstream refuses; it doubles up to ten times that
    #[arg(long, env = "MPOOL_COOLDOWN", default_value = "60s", value_parser = duration)]
    cooldown: Duration,

    /// Most client connections at once
    #[arg(
        long,
        env = "MPOOL_MAX_CONNECTIONS",
        default_value = "8192",
        value_name = "N"
    )]
    max_connections: usize,
    /// Longest head of a request
    #[arg(
        long,
        env = "MPOOL_MAX_HEADER_BYTES",
        default_value = "64KiB",
        value_name = "SIZE",
        value_parser = bytes
    )]
    max_header_bytes: ByteSize,
    /// Longest body of a request
    #[arg(
        long,
        env = "MPOOL_MAX_BODY",
        default_value = "1GiB",
        value_name = "SIZE",
        value_parser = bytes
    )]
    max_body: ByteSize,
    /// How much of a request's body is kept, so that it can be sent again on another account
    #[arg(
        long,
        env = "MPOOL_REPLAY_BODY",
        default_value = "8MiB",
        value_name = "SIZE",
        value_parser = bytes
    )]
    replay_body: ByteSize,
    /// How much of all bodies together is kept
    #[arg(
        long,
        env = "MPOOL_REPLAY_MEMORY",
        default_value = "256MiB",
        value_name = "SIZE",
        value_parser = bytes
    )]
    replay_memory: ByteSize,

    /// How log lines are written, on stdout
    #[arg(long, env = "MPOOL_LOG", default_value = "text", value_enum)]
    log: LogFormat,
    /// The least that is logged; warn leaves out the lines of each request
    #[arg(long, env = "MPOOL_LOG_LEVEL", default_value = "info", value_enum)]
    log_level: LogLevel,
}

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    pub redis: Duration,
    pub connect: Duration,
    pub response: Duration,
    pub stream: Duration,
    pub header: Duration,
    pub keepalive: Duration,
    pub body: Duration,
    pub send: Duration,
    pub drain: Duration,
}

/// How much is let in. Sizes in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub connections: usize,
    pub header: usize,
    pub body: u64,
    pub replay_body: usize,
    pub replay_memory: usize,
}

/// A configuration that holds together.
pub struct Config {
    pub listen: SocketAddr,
    pub admin: Option<SocketAddr>,
    pub tls: Option<rustls::ServerConfig>,
    pub upstream: Base,
    pub upstream_protocol: Protocol,
    /// What the upstream's certificate is checked against; nothing for http.
    pub upstream_tls: Option<rustls::ClientConfig>,
    pub redis: RedisSettings,
    pub threads: usize,
    pub timeouts: Timeouts,
    pub limits: Limits,
    pub grace: Duration,
    pub lease_cache: Duration,
    pub cooldown: Duration,
    pub log: LogFormat,
    pub log_level: LogLevel,
}

/// What ends the program before it has begun: help and version included.
pub enum Stop {
    /// Help or version, to be shown.
    Shown(String),
    Mistake(String),
}

impl Config {
    /// Reads the command line and the environment.
    ///
    /// # Errors
    /// What is wrong, in words for the operator. Secrets are never repeated.
    pub fn read(args: impl IntoIterator<Item = OsString>) -> Result<Self, Stop> {
        let command = Flags::command().mut_args(|arg| {
            // An empty variable is one that is not set.
            let value = arg.get_env().and_then(std::env::var_os);
            let empty = value.is_some_and(|value| value.is_empty());
            let arg = arg.hide_env_values(true);
            if empty {
                arg.env(Resettable::Reset)
            } else {
                arg
            }
        });
        let flags = command
            .try_get_matches_from(args)
            .and_then(|matches| Flags::from_arg_matches(&matches))
            .map_err(|error| usage(&error))?;
        check(flags).map_err(Stop::Mistake)
    }
}

/// What clap has to say, without the value that was wrong: it may be a secret in
/// the wrong place.
fn usage(error: &clap::Error) -> Stop {
    if !error.use_stderr() {
        return Stop::Shown(error.to_string());
    }
    let flag = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(flag)) => Some(flag.clone()),
        Some(ContextValue::Strings(flags)) => Some(flags.join(", ")),
        _ => None,
    };
    // clap has it as `--flag <VALUE>`.
    let name = flag
        .as_deref()
        .and_then(|flag| flag.split_whitespace().next());
    let is_name =
        |name: &&str| name.len() <= 40 && name.starts_with("--") && !name.contains([':', '@', '=']);
    let flag = name.filter(is_name).unwrap_or("an argument");
    let valid = match error.get(ContextKind::ValidValue) {
        Some(ContextValue::Strings(values)) => format!(": one of {}", values.join(", ")),
        _ => error
            .source()
            .map_or_else(String::new, |why| format!(": {why}")),
    };
    Stop::Mistake(match error.kind() {
        ErrorKind::UnknownArgument => format!("{flag} is not known here"),
        ErrorKind::MissingRequiredArgument => format!("{flag} is missing"),
        ErrorKind::ArgumentConflict => format!("{flag} is given twice"),
        _ => format!("{flag} has a value that can't be used{valid}"),
    })
}

fn check(flags: Flags) -> Result<Config, String> {
    let admin =
        match flags.admin.as_str() {
            "off" => None,
            address => Some(address.parse().map_err(|_| {
                "--admin must be an address such as 127.0.0.1:8081, or off".to_owned()
            })?),
        };
    let collide = |one: SocketAddr, other: SocketAddr| {
        let any = one.ip().is_unspecified() || other.ip().is_unspecified();
        one.port() != 0 && one.port() == other.port() && (any || one.ip() == other.ip())
    };
    if admin.is_some_and(|admin| collide(admin, flags.listen)) {
        return Err("--listen and --admin are the same address; each needs its own".into());
    }
    let upstream = flags.upstream.filter(|url| !url.is_empty());
    let upstream = upstream.ok_or("--upstream (MPOOL_UPSTREAM) is missing: the API's base URL, such as https://api.example.com")?;
    let upstream: Base = upstream.parse()?;
    if [Some(flags.listen), admin]
        .into_iter()
        .flatten()
        .any(|own| upstream.is_at(own))
    {
        return Err("--upstream is this forwarder itself: it must be the API's base URL".into());
    }
    if upstream.is_tls() && flags.upstream_protocol == Protocol::Http2 {
        return Err(
            "--upstream-protocol http2 is for http:// alone; over TLS, auto negotiates it".into(),
        );
    }
    let upstream_tls = upstream
        .is_tls()
        .then(|| tls::trust("--upstream-cacert", flags.upstream_cacert.as_deref()))
        .transpose()?;
    if !upstream.is_tls() && flags.upstream_cacert.is_some() {
        return Err("--upstream-cacert needs an --upstream with https://".into());
    }
    let tls = match (&flags.tls_cert, &flags.tls_key) {
        (Some(cert), Some(key)) => Some(tls::identity(cert, key)?),
        _ => None,
    };
    let redis = RedisSettings::read(
        &flags.redis,
        Beside {
            user: flags.redis_user,
            password: secret("MPOOL_REDIS_PASSWORD")?,
            sentinel_user: flags.sentinel_user,
            sentinel_password: secret("MPOOL_SENTINEL_PASSWORD")?,
            cacert: flags.redis_cacert.as_deref(),
            identity: flags.redis_cert.as_deref().zip(flags.redis_key.as_deref()),
        },
    )?;

    let threads = match flags.threads {
        None => std::thread::available_parallelism().map_or(1, usize::from),
        Some(threads @ 1..=256) => threads,
        Some(_) => return Err("--threads must be from 1 to 256".into()),
    };
    if !(1..=1_000_000).contains(&flags.max_connections) {
        return Err("--max-connections must be from 1 to 1000000".into());
    }
    let header = size(
        "--max-header-bytes",
        flags.max_header_bytes,
        8 << 10,
        16 << 20,
    )?;
    let nonzero = [
        ("--redis-timeout", flags.redis_timeout),
        ("--connect-timeout", flags.connect_timeout),
        ("--response-timeout", flags.response_timeout),
        ("--stream-timeout", flags.stream_timeout),
        ("--header-timeout", flags.header_timeout),
        ("--keepalive-timeout", flags.keepalive_timeout),
        ("--body-timeout", flags.body_timeout),
        ("--send-timeout", flags.send_timeout),
        ("--cooldown", flags.cooldown),
    ];
    if let Some((name, _)) = nonzero.iter().find(|(_, value)| value.is_zero()) {
        return Err(format!("{name} must be more than nothing"));
    }
    if flags.cooldown < Duration::from_millis(1) {
        return Err("--cooldown must be 1ms or longer".into());
    }
    Ok(Config {
        listen: flags.listen,
        admin,
        tls,
        upstream,
        upstream_protocol: flags.upstream_protocol,
        upstream_tls,
        redis,
        threads,
        timeouts: Timeouts {
            redis: flags.redis_timeout,
            connect: flags.connect_timeout,
            response: flags.response_timeout,
            stream: flags.stream_timeout,
            header: flags.header_timeout,
            keepalive: flags.keepalive_timeout,
            body: flags.body_timeout,
            send: flags.send_timeout,
            drain: flags.drain_timeout,
        },
        limits: Limits {
            connections: flags.max_connections,
            header,
            body: flags.max_body.as_u64(),
            replay_body: size("--replay-body", flags.replay_body, 0, 1 << 30)?,
            replay_memory: size("--replay-memory", flags.replay_memory, 0, 1 << 40)?,
        },
        grace: flags.grace,
        lease_cache: flags.lease_cache,
        cooldown: flags.cooldown,
        log: flags.log,
        log_level: flags.log_level,
    })
}

/// The longest time that can be set: a week, so that sums stay far from any end.
const LONGEST: Duration = Duration::from_secs(7 * 24 * 3600);

fn duration(text: &str) -> Result<Duration, String> {
    let parsed: Option<SignedDuration> = text.parse().ok();
    parsed
        .and_then(|duration| Duration::try_from(duration).ok())
        .filter(|duration| *duration <= LONGEST)
        .ok_or_else(|| "a duration such as 500ms, 10s or 2m, of a week at most".into())
}

/// What the library has to say repeats the value.
fn bytes(text: &str) -> Result<ByteSize, &'static str> {
    text.parse().map_err(|_| "a size such as 64KiB or 8MiB")
}

fn size(name: &str, value: ByteSize, least: u64, most: u64) -> Result<usize, String> {
    let bytes = value.as_u64();
    let fits = (least..=most).contains(&bytes);
    usize::try_from(bytes).ok().filter(|_| fits).ok_or_else(|| {
        format!(
            "{name} must be from {} to {}",
            ByteSize(least),
            ByteSize(most)
        )
    })
}

fn secret(name: &str) -> Result<Option<String>, String> {
    match std::env::var(name) {
        Ok(value) => Ok(Some(value).filter(|value| !value.is_empty())),
        Err(std::env::VarError::NotPresent) => Ok(None),
        Err(std::env::VarError::NotUnicode(_)) => Err(format!("{name} must be UTF-8")),
    }
}

fn read(flag: &str, path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| format!("{flag} {}: {error}", path.display()))
}
