//! The way to the upstream: its base URL, connections kept open, timeouts, and
//! what can go wrong.

use crate::config::{Limits, Timeouts};
use crate::patience::Patience;
use crate::upload::{Fault, Upload, UploadBody};
use clap::ValueEnum;
use hyper::body::Incoming;
use hyper::http::uri::{Authority, PathAndQuery, Scheme};
use hyper::{Request, Response, Uri, Version};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder, MaybeHttpsStream};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use std::error::Error;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::Instant;

/// How long an unused connection is kept, shorter than servers usually do:
/// a request on one that the server is just closing would be lost.
const IDLE: Duration = Duration::from_secs(30);
/// Unused connections kept by each thread.
const MAX_IDLE: usize = 1024;

/// The HTTP version spoken to the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Protocol {
    /// What TLS negotiates; HTTP/1.1 without TLS.
    Auto,
    Http1,
    /// Without TLS and without asking first.
    Http2,
}

/// The upstream's base URL.
#[derive(Clone, Debug)]
pub struct Base {
    scheme: Scheme,
    authority: Authority,
    /// Comes before each request's path; empty or without a slash at its end.
    prefix: String,
}

impl FromStr for Base {
    type Err = String;

    fn from_str(url: &str) -> Result<Self, String> {
        let form = "--upstream must be http://host[:port][/path] or https://host[:port][/path]";
        let parts = url.parse::<Uri>().map_err(|_| form)?.into_parts();
        let scheme = parts
            .scheme
            .filter(|s| *s == Scheme::HTTP || *s == Scheme::HTTPS)
            .ok_or(form)?;
        let authority = parts
            .authority
            .filter(|authority| !authority.host().is_empty())
            .ok_or(form)?;
        if authority.as_str().contains('@') {
            return Err(
                "--upstream must not hold a user or password: credentials are the accounts'".into(),
            );
        }
        let path = parts
            .path_and_query
            .unwrap_or_else(|| PathAndQuery::from_static("/"));
        if path.query().is_some() || url.contains('#') {
            return Err(format!("{form}, without a query"));
        }
        let prefix = path.path().trim_end_matches('/').to_owned();
        Ok(Self {
            scheme,
            authority,
            prefix,
        })
    }
}

impl std::fmt::Display for Base {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}://{}{}", self.scheme, self.authority, self.prefix)
    }
}

impl Base {
    pub fn is_tls(&self) -> bool {
        self.scheme == Scheme::HTTPS
    }

    /// The upstream's URL of what a client asked for. Nothing for a target that
    /// can't be forwarded.
    pub fn join(&self, asked: &Uri) -> Option<Uri> {
        let path = asked
            .path_and_query()
            .cloned()
            .unwrap_or_else(|| PathAndQuery::from_static("/"));
        let path = if self.prefix.is_empty() {
            path
        } else if path.as_str() == "*" {
            PathAndQuery::try_from(self.prefix.as_str()).ok()?
        } else {
            PathAndQuery::try_from(format!("{}{path}", self.prefix)).ok()?
        };
        let mut parts = hyper::http::uri::Parts::default();
        parts.scheme = Some(self.scheme.clone());
        parts.authority = Some(self.authority.clone());
        parts.path_and_query = Some(path);
        Uri::from_parts(parts).ok()
    }
}

/// Why there is no answer of the upstream's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendError {
    /// No connection; nothing was sent.
    Connect,
    /// No connection in time; nothing was sent.
    ConnectTimeout,
    /// The connection broke before the answer began.
    Broke,
    /// The answer did not begin in time.
    Timeout,
    /// What came is no HTTP.
    Garbage,
    /// The client's body could not be passed on.
    Upload(Fault),
}

impl SendError {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::ConnectTimeout => "connect-timeout",
            Self::Broke => "broke-off",
            Self::Timeout => "timeout",
            Self::Garbage => "not-http",
            Self::Upload(_) => "upload",
        }
    }
}

/// One thread's connections to the upstream.
#[derive(Clone)]
pub struct Upstream {
    client: Client<Bounded, UploadBody>,
    response_timeout: Duration,
    /// Whether HTTP/2 is spoken, as far as is known: what the last answer came by.
    over_http2: Arc<AtomicBool>,
}

impl Upstream {
    pub fn new(
        tls: Option<rustls::ClientConfig>,
        protocol: Protocol,
        timeouts: &Timeouts,
        limits: &Limits,
    ) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.set_nodelay(true);
        tcp.enforce_http(false);
        tcp.set_connect_timeout(Some(timeouts.connect));
        tcp.set_keepalive(Some(Duration::from_secs(60)));
        let may_negotiate = tls.is_some() && protocol == Protocol::Auto;
        let over_http2 = Arc::new(AtomicBool::new(
            may_negotiate || protocol == Protocol::Http2,
        ));
        let tls = tls.unwrap_or_else(|| {
            // Never used: the base URL is http.
            rustls::ClientConfig::builder()
                .with_root_certificates(rustls::RootCertStore::empty())
                .with_no_client_auth()
        });
        let https = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http();
        let https = match protocol {
            Protocol::Http1 => https.enable_http1().wrap_connector(tcp),
            Protocol::Auto | Protocol::Http2 => https.enable_all_versions().wrap_connector(tcp),
        };
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(MAX_IDLE)
            .set_host(true)
            .http1_preserve_header_case(true)
            .http1_max_headers(256)
            .http1_max_buf_size(limits.header.max(256 << 10))
            .http2_only(protocol == Protocol::Http2)
            // One client that reads slowly is not to hold up those that share the connection.
            .http2_initial_stream_window_size(256 << 10)
            .http2_initial_connection_window_size(64 << 20)
            .http2_keep_alive_interval(Duration::from_secs(20))
            .http2_keep_alive_while_idle(false)
            .build(Bounded {
                inner: https,
                patience: timeouts.connect,
            });
        Self {
            client,
            response_timeout: timeouts.response,
            over_http2,
        }
    }

    /// Whether the next request is likely to go by HTTP/2.
    pub fn over_http2(&self) -> bool {
        self.over_http2.load(Ordering::Relaxed)
    }

    fn note(&self, version: Version) {
        let http2 = version == Version::HTTP_2;
        if self.over_http2() != http2 {
            self.over_http2.store(http2, Ordering::Relaxed);
        }
    }

    /// Sends a request and waits for the answer's head.
    ///
    /// # Errors
    /// [`SendError`]. Dropping the future drops the request.
    pub async fn send(
        &self,
        request: Request<UploadBody>,
        upload: &Upload,
    ) -> Result<Response<Incoming>, SendError> {
        let sending = self.client.request(request);
        let mut sending = std::pin::pin!(sending);
        let mut deadline = Instant::now() + self.response_timeout;
        let mut patience = Patience::shared();
        poll_fn(|cx| {
            if let Poll::Ready(outcome) = sending.as_mut().poll(cx) {
                if let Ok(response) = &outcome {
                    self.note(response.version());
                }
                return Poll::Ready(outcome.map_err(|error| classify(&error, upload)));
            }
            loop {
                ready!(patience.poll(deadline, cx));
                // The upstream's time begins when it has the whole request, as
                // long as it takes it.
                let now = Instant::now();
                let moved = upload.last_heard().map(|last| last + self.response_timeout);
                match moved.filter(|later| *later > now) {
                    Some(later) => deadline = later,
                    None => return Poll::Ready(Err(SendError::Timeout)),
                }
            }
        })
        .await
    }
}

fn classify(error: &hyper_util::client::legacy::Error, upload: &Upload) -> SendError {
    if let Some(fault) = upload.fault() {
        return SendError::Upload(fault);
    }
    let mut source = error.source();
    while let Some(inner) = source {
        if let Some(io) = inner.downcast_ref::<std::io::Error>()
            && io.kind() == std::io::ErrorKind::TimedOut
            && error.is_connect()
        {
            return SendError::ConnectTimeout;
        }
        if let Some(http) = inner.downcast_ref::<hyper::Error>()
            && http.is_parse()
        {
            return SendError::Garbage;
        }
        source = inner.source();
    }
    if error.is_connect() {
        SendError::Connect
    } else {
        SendError::Broke
    }
}

/// A connector whose every step together, name, TCP and TLS, has one bound.
#[derive(Clone)]
struct Bounded {
    inner: HttpsConnector<HttpConnector>,
    patience: Duration,
}

type Stream = MaybeHttpsStream<TokioIo<TcpStream>>;
type BoxError = Box<dyn Error + Send + Sync>;

impl tower_service::Service<Uri> for Bounded {
    type Response = Stream;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Stream, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connecting = self.inner.call(uri);
        let patience = self.patience;
        Box::pin(async move {
            let late =
                |_| std::io::Error::new(std::io::ErrorKind::TimedOut, "connecting took too long");
            tokio::time::timeout(patience, connecting)
                .await
                .map_err(late)?
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_keeps_every_byte_behind_the_base() {
        let cases = [
            (
                "http://h",
                "/a//b/../c%2F%zz?x=%20&y=[]{}|",
                "http://h/a//b/../c%2F%zz?x=%20&y=[]{}|",
            ),
            ("https://h:8443/", "/v1/m", "https://h:8443/v1/m"),
            ("http://h/api/", "/v1?q", "http://h/api/v1?q"),
            ("http://h/api", "http://elsewhere/v1", "http://h/api/v1"),
            ("http://[::1]:80", "/", "http://[::1]:80/"),
        ];
        for (base, asked, expected) in cases {
            let base: Base = base.parse().unwrap();
            let joined = base.join(&asked.parse().unwrap()).unwrap();
            assert_eq!(joined.to_string(), expected);
        }
        let base: Base = "http://h".parse().unwrap();
        assert_eq!(base.join(&"*".parse().unwrap()).unwrap().path(), "*");
    }

    #[test]
    fn a_base_that_can_not_be_meant_is_refused() {
        for bad in [
            "",
            "h",
            "h:80",
            "/v1",
            "ftp://h",
            "http://",
            "http://u:p@h",
            "http://h/?q=1",
            "http://h/#f",
        ] {
            assert!(bad.parse::<Base>().is_err(), "{bad}");
        }
    }
}
