//! What the operator sets: flags, their environment variables, and what they
//! must be. All of it is checked before anything is bound or connected.

use crate::upstream::{Base, Protocol};
use bytesize::ByteSize;
use clap::{Parser, ValueEnum};
use jiff::SignedDuration;
use redis::sentinel::{SentinelClientBuilder, SentinelServerType};
use redis::{
    ClientTlsConfig, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, TlsCertificates, TlsMode,
};
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
        hide_env_values = true,
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
        value_name = "SIZE"
    )]
    max_header_bytes: ByteSize,
    /// Longest body of a request
    #[arg(
        long,
        env = "MPOOL_MAX_BODY",
        default_value = "1GiB",
        value_name = "SIZE"
    )]
    max_body: ByteSize,
    /// How much of a request's body is kept, so that it can be sent again on another account
    #[arg(
        long,
        env = "MPOOL_REPLAY_BODY",
        default_value = "8MiB",
        value_name = "SIZE"
    )]
    replay_body: ByteSize,
    /// How much of all bodies together is kept
    #[arg(
        long,
        env = "MPOOL_REPLAY_MEMORY",
        default_value = "256MiB",
        value_name = "SIZE"
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

/// How to reach the Redis that has the pool.
pub enum RedisTarget {
    Direct(Box<redis::Client>),
    Sentinel(Box<redis::sentinel::SentinelClient>),
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
    pub cooldown: Duration,
    pub log: LogFormat,
    pub log_level: LogLevel,
}

/// Where Redis is, ready to make a client from.
#[derive(Clone)]
pub struct RedisSettings {
    infos: Vec<ConnectionInfo>,
    sentinel: Option<SentinelSettings>,
    certificates: Option<TlsCertificates>,
    user: Option<String>,
    password: Option<String>,
}

#[derive(Clone)]
struct SentinelSettings {
    master: String,
    tls: bool,
    user: Option<String>,
    password: Option<String>,
}

/// What ends the program before it has begun: help and version included.
pub enum Stop {
    Usage(Box<clap::Error>),
    Mistake(String),
}

impl Config {
    /// Reads the command line and the environment.
    ///
    /// # Errors
    /// What is wrong, in words for the operator. Secrets are never repeated.
    pub fn read(args: impl IntoIterator<Item = OsString>) -> Result<Self, Stop> {
        let flags = Flags::try_parse_from(args).map_err(|error| Stop::Usage(Box::new(error)))?;
        check(flags).map_err(Stop::Mistake)
    }
}

fn check(flags: Flags) -> Result<Config, String> {
    let admin =
        match flags.admin.as_str() {
            "off" => None,
            address => Some(address.parse().map_err(|_| {
                "--admin must be an address such as 127.0.0.1:8081, or off".to_owned()
            })?),
        };
    if admin == Some(flags.listen) && flags.listen.port() != 0 {
        return Err("--listen and --admin are the same address; each needs its own".into());
    }
    let upstream = flags.upstream.filter(|url| !url.is_empty());
    let upstream = upstream.ok_or("--upstream (MPOOL_UPSTREAM) is missing: the API's base URL, such as https://api.example.com")?;
    let upstream: Base = upstream.parse()?;
    if upstream.is_tls() && flags.upstream_protocol == Protocol::Http2 {
        return Err(
            "--upstream-protocol http2 is for http:// alone; over TLS, auto negotiates it".into(),
        );
    }
    let upstream_tls = upstream
        .is_tls()
        .then(|| trust(flags.upstream_cacert.as_deref()))
        .transpose()?;
    if !upstream.is_tls() && flags.upstream_cacert.is_some() {
        return Err("--upstream-cacert needs an --upstream with https://".into());
    }
    let tls = match (&flags.tls_cert, &flags.tls_key) {
        (Some(cert), Some(key)) => Some(identity(cert, key)?),
        _ => None,
    };
    let redis = redis_settings(
        &flags.redis,
        Credentials {
            user: flags.redis_user,
            password: secret("MPOOL_REDIS_PASSWORD")?,
            sentinel_user: flags.sentinel_user,
            sentinel_password: secret("MPOOL_SENTINEL_PASSWORD")?,
        },
        certificates(
            flags.redis_cacert.as_deref(),
            flags.redis_cert.as_deref(),
            flags.redis_key.as_deref(),
        )?,
    )?;
    redis.client()?;

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

// --- TLS --------------------------------------------------------------------

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

fn certificate_list(flag: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let pem = read(flag, path)?;
    let list: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let list = list.unwrap_or_default();
    if list.is_empty() {
        return Err(format!(
            "{flag} {} holds no PEM certificate",
            path.display()
        ));
    }
    Ok(list)
}

/// What the upstream is checked against: the given CA, or the system's.
fn trust(cacert: Option<&Path>) -> Result<rustls::ClientConfig, String> {
    let mut roots = rustls::RootCertStore::empty();
    if let Some(path) = cacert {
        for certificate in certificate_list("--upstream-cacert", path)? {
            roots
                .add(certificate)
                .map_err(|error| format!("--upstream-cacert {}: {error}", path.display()))?;
        }
    } else {
        let found = rustls_native_certs::load_native_certs();
        roots.add_parsable_certificates(found.certs);
        if roots.is_empty() {
            return Err("this system has no CA certificates (Debian: ca-certificates); or give --upstream-cacert".into());
        }
    }
    Ok(rustls::ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth())
}

fn identity(cert: &Path, key: &Path) -> Result<rustls::ServerConfig, String> {
    let chain = certificate_list("--tls-cert", cert)?;
    let pem = read("--tls-key", key)?;
    let private = PrivateKeyDer::from_pem_slice(&pem)
        .map_err(|_| format!("--tls-key {} holds no PEM private key", key.display()))?;
    let mut config = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .map_err(|error| format!("--tls-cert and --tls-key don't go together: {error}"))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

fn certificates(
    ca: Option<&Path>,
    cert: Option<&Path>,
    key: Option<&Path>,
) -> Result<Option<TlsCertificates>, String> {
    let client_tls = match (cert, key) {
        (Some(cert), Some(key)) => Some(ClientTlsConfig {
            client_cert: read("--redis-cert", cert)?,
            client_key: read("--redis-key", key)?,
        }),
        _ => None,
    };
    let root_cert = ca.map(|path| read("--redis-cacert", path)).transpose()?;
    let any = client_tls.is_some() || root_cert.is_some();
    Ok(any.then_some(TlsCertificates {
        client_tls,
        root_cert,
    }))
}

// --- Redis ------------------------------------------------------------------

struct Credentials {
    user: Option<String>,
    password: Option<String>,
    sentinel_user: Option<String>,
    sentinel_password: Option<String>,
}

const REDIS_FORMS: &str = "--redis must be redis://[user:password@]host:port, rediss:// for TLS, \
                           or redis+sentinel://host:26379,host:26379/master-name";

fn redis_settings(
    url: &str,
    credentials: Credentials,
    certificates: Option<TlsCertificates>,
) -> Result<RedisSettings, String> {
    // A URL may hold a password, so no error repeats any of it.
    let (scheme, rest) = url.split_once("://").ok_or(REDIS_FORMS)?;
    let (tls, through_sentinel) = match scheme {
        "redis" => (false, false),
        "rediss" => (true, false),
        "redis+sentinel" => (false, true),
        "rediss+sentinel" => (true, true),
        _ => return Err(REDIS_FORMS.into()),
    };
    if certificates.is_some() && !tls {
        return Err(
            "--redis-cacert, --redis-cert and --redis-key need a --redis with rediss://".into(),
        );
    }
    let parse = |url: &str| {
        url.into_connection_info()
            .map_err(|_| REDIS_FORMS.to_owned())
    };
    let scheme = if tls { "rediss" } else { "redis" };
    let (infos, sentinel) = if through_sentinel {
        let (user_part, rest) = rest
            .rsplit_once('@')
            .map_or(("", rest), |(user, rest)| (user, rest));
        let (hosts, master) = rest.split_once('/').ok_or(REDIS_FORMS)?;
        if master.is_empty() || master.contains('/') {
            return Err(REDIS_FORMS.into());
        }
        let at = if user_part.is_empty() { "" } else { "@" };
        let infos: Result<Vec<_>, _> = hosts
            .split(',')
            .map(|host| {
                if host.contains(':') {
                    host.to_owned()
                } else {
                    format!("{host}:26379")
                }
            })
            .map(|host| parse(&format!("{scheme}://{user_part}{at}{host}")))
            .collect();
        let sentinel = SentinelSettings {
            master: master.to_owned(),
            tls,
            user: credentials.sentinel_user,
            password: credentials.sentinel_password,
        };
        (infos?, Some(sentinel))
    } else {
        (vec![parse(url)?], None)
    };
    let first = infos.first().ok_or(REDIS_FORMS)?;
    if first.redis_settings().db() != 0 {
        return Err("--redis must not name a database: the pool is in database 0".into());
    }
    let own = |text: &str| Some(text.to_owned());
    let user = first
        .redis_settings()
        .username()
        .and_then(own)
        .or(credentials.user);
    let password = first
        .redis_settings()
        .password()
        .and_then(own)
        .or(credentials.password);
    if user.is_some() && password.is_none() {
        return Err("a user of Redis needs a password: set MPOOL_REDIS_PASSWORD".into());
    }
    Ok(RedisSettings {
        infos,
        sentinel,
        certificates,
        user,
        password,
    })
}

impl RedisSettings {
    /// A client; it connects to nothing yet.
    ///
    /// # Errors
    /// When certificates can't be used.
    pub fn client(&self) -> Result<RedisTarget, String> {
        match &self.sentinel {
            None => self
                .direct()
                .map(|client| RedisTarget::Direct(Box::new(client))),
            Some(sentinel) => self
                .through(sentinel)
                .map(|client| RedisTarget::Sentinel(Box::new(client))),
        }
    }

    fn direct(&self) -> Result<redis::Client, String> {
        let info = self.infos.first().cloned().ok_or(REDIS_FORMS)?;
        let mut settings = info.redis_settings().clone();
        if let Some(user) = &self.user {
            settings = settings.set_username(user);
        }
        if let Some(password) = &self.password {
            settings = settings.set_password(password);
        }
        let info = info.set_redis_settings(settings);
        match self.certificates.clone() {
            None => redis::Client::open(info),
            Some(certificates) => redis::Client::build_with_tls(info, certificates),
        }
        .map_err(|error| format!("--redis: {error}"))
    }

    fn through(
        &self,
        sentinel: &SentinelSettings,
    ) -> Result<redis::sentinel::SentinelClient, String> {
        let addresses: Vec<ConnectionAddr> =
            self.infos.iter().map(|info| info.addr().clone()).collect();
        let mut builder =
            SentinelClientBuilder::new(addresses, &sentinel.master, SentinelServerType::Master)
                .map_err(|error| format!("--redis: {error}"))?;
        if sentinel.tls {
            builder = builder
                .set_client_to_redis_tls_mode(TlsMode::Secure)
                .set_client_to_sentinel_tls_mode(TlsMode::Secure);
        }
        if let Some(certificates) = &self.certificates {
            builder = builder
                .set_client_to_redis_certificates(certificates.clone())
                .set_client_to_sentinel_certificates(certificates.clone());
        }
        if let Some(user) = &self.user {
            builder = builder.set_client_to_redis_username(user);
        }
        if let Some(password) = &self.password {
            builder = builder.set_client_to_redis_password(password);
        }
        if let Some(user) = &sentinel.user {
            builder = builder.set_client_to_sentinel_username(user);
        }
        if let Some(password) = &sentinel.password {
            builder = builder.set_client_to_sentinel_password(password);
        }
        builder.build().map_err(|error| format!("--redis: {error}"))
    }

    /// Where it is, for a person, without user or password.
    pub fn shown(&self) -> String {
        let hosts: Vec<String> = self
            .infos
            .iter()
            .map(|info| info.addr().to_string())
            .collect();
        match &self.sentinel {
            None => hosts.join(","),
            Some(sentinel) => format!("{} (Sentinels of {})", hosts.join(","), sentinel.master),
        }
    }
}
