//! The operator's side door: /healthz, /readyz and /metrics, on an address of
//! its own. Nothing here shows a key or a token.

use crate::lender::Lender;
use crate::metrics::Metrics;
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::timeout;

const TEXT: &str = "text/plain; charset=utf-8";
const METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Connections at once.
const MAX_CONNECTIONS: usize = 64;
/// How long a connection takes requests, and how long it has for the last one:
/// clients that stay or read nothing are not to keep others out.
const SPAN: Duration = Duration::from_secs(5);

/// What the side door shows.
pub struct Admin {
    pub lender: Lender,
    pub metrics: Arc<Metrics>,
    /// Set once the process is about to stop.
    pub draining: AtomicBool,
}

impl Admin {
    async fn page(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return page(
                StatusCode::METHOD_NOT_ALLOWED,
                TEXT,
                "GET is what is accepted here\n".into(),
            );
        }
        match request.uri().path() {
            "/healthz" => page(StatusCode::OK, TEXT, "ok\n".into()),
            "/readyz" => match self.ready().await {
                Ok(()) => page(StatusCode::OK, TEXT, "ready\n".into()),
                Err(why) => page(StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("{why}\n")),
            },
            "/metrics" => page(StatusCode::OK, METRICS, self.metrics.page()),
            _ => page(
                StatusCode::NOT_FOUND,
                TEXT,
                "/healthz, /readyz and /metrics are what is here\n".into(),
            ),
        }
    }

    async fn ready(&self) -> Result<(), String> {
        if self.draining.load(Ordering::Relaxed) {
            return Err("about to stop".into());
        }
        self.lender.ready().await
    }

    /// Answers, for ever.
    pub async fn serve(self: Arc<Self>, listener: TcpListener) {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                return;
            };
            let Ok((stream, _)) = listener.accept().await else {
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            };
            let admin = Arc::clone(&self);
            tokio::spawn(async move {
                let service = service_fn(move |request| {
                    let admin = Arc::clone(&admin);
                    async move { Ok::<_, Infallible>(admin.page(&request).await) }
                });
                let mut http = http1::Builder::new();
                http.timer(TokioTimer::new()).header_read_timeout(SPAN);
                let mut serving = pin!(http.serve_connection(TokioIo::new(stream), service));
                if timeout(SPAN, serving.as_mut()).await.is_err() {
                    serving.as_mut().graceful_shutdown();
                    let _ = timeout(SPAN, serving).await;
                }
                drop(place);
            });
        }
    }
}

fn page(status: StatusCode, kind: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
