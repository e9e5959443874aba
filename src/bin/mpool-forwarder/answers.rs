//! Every answer that is the forwarder's own, in one table. All of them are
//! `{"type":"error","error":{"type":…,"message":…}}`, the form that the SDKs of
//! the big providers read, and carry their code in `x-mpool-error`, so that a
//! client can tell them from the upstream's. No text holds what a client sent.

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE, DATE, HeaderName, HeaderValue, RETRY_AFTER};
use hyper::{Response, StatusCode};
use std::time::SystemTime;

/// The header with the code.
pub const CODE_HEADER: HeaderName = HeaderName::from_static("x-mpool-error");

/// Why a request is answered here and not by the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    NoKeyGiven,
    TwoKeys,
    NoKey,
    Revoked,
    Expired,
    PoolFull,
    NoAccount,
    NoToken,
    Redis,
    Account,
    Connections,
    Upstream,
    UpstreamTimeout,
    BodyTooLarge,
    HeadersTooLarge,
    RequestTimeout,
    BadRequest,
    Unsupported,
}

/// One row: the code's name, status, the error's type and its message.
struct Row(&'static str, u16, &'static str, &'static str);

const AUTHENTICATION: &str = "authentication_error";
const OVERLOADED: &str = "overloaded_error";
const INVALID: &str = "invalid_request_error";
const TIMEOUT: &str = "timeout_error";

impl Code {
    const fn row(self) -> Row {
        match self {
            Self::NoKeyGiven => Row(
                "NOKEYGIVEN",
                401,
                AUTHENTICATION,
                "No key was given. Send it as x-api-key, or as Authorization: Bearer.",
            ),
            Self::TwoKeys => Row(
                "TWOKEYS",
                401,
                AUTHENTICATION,
                "Two different keys were given, in x-api-key and in Authorization. Send one of them.",
            ),
            Self::NoKey => Row("NOKEY", 401, AUTHENTICATION, "This key is not known."),
            Self::Revoked => Row("REVOKED", 401, AUTHENTICATION, "This key has been revoked."),
            Self::Expired => Row("EXPIRED", 401, AUTHENTICATION, "This key has expired."),
            Self::PoolFull => Row(
                "POOLFULL",
                503,
                OVERLOADED,
                "Every account of the pool is in use. Retry-After says when the next slot falls due.",
            ),
            Self::NoAccount => Row("NOACCOUNT", 503, OVERLOADED, "No account can be used now."),
            Self::NoToken => Row(
                "NOTOKEN",
                503,
                OVERLOADED,
                "The account's credential is not available now.",
            ),
            Self::Redis => Row(
                "REDIS",
                503,
                OVERLOADED,
                "The pool can't be asked now. Try again in a moment.",
            ),
            Self::Account => Row(
                "ACCOUNT",
                503,
                OVERLOADED,
                "The upstream refused the account, which has been taken out of the pool. Send the request again.",
            ),
            Self::Connections => Row(
                "CONNECTIONS",
                503,
                OVERLOADED,
                "There are too many connections. Try again in a moment.",
            ),
            Self::Upstream => Row(
                "UPSTREAM",
                502,
                "api_error",
                "The upstream could not be reached, or broke off before its answer began.",
            ),
            Self::UpstreamTimeout => Row(
                "UPSTREAM_TIMEOUT",
                504,
                TIMEOUT,
                "The upstream took too long to answer.",
            ),
            Self::BodyTooLarge => Row(
                "BODY_TOO_LARGE",
                413,
                "request_too_large",
                "The request's body is longer than is allowed here.",
            ),
            Self::HeadersTooLarge => Row(
                "HEADERS_TOO_LARGE",
                431,
                INVALID,
                "The request's headers are longer, or more, than is allowed here.",
            ),
            Self::RequestTimeout => Row(
                "REQUEST_TIMEOUT",
                408,
                TIMEOUT,
                "The request took too long to arrive.",
            ),
            Self::BadRequest => Row(
                "BAD_REQUEST",
                400,
                INVALID,
                "The request is not valid HTTP.",
            ),
            Self::Unsupported => Row("UNSUPPORTED", 501, INVALID, "This method is not forwarded."),
        }
    }

    /// The word in `x-mpool-error`, logs and metrics.
    pub const fn name(self) -> &'static str {
        self.row().0
    }

    pub const fn status(self) -> u16 {
        self.row().1
    }

    fn json(self) -> String {
        let Row(_, _, kind, message) = self.row();
        // Both are texts of this file, which need no escapes (a test looks).
        format!(r#"{{"type":"error","error":{{"type":"{kind}","message":"{message}"}}}}"#)
    }

    /// When to come back, in seconds, where nothing tells better: what is short of
    /// something now may have it in a moment.
    pub const fn retry_after(self) -> Option<u64> {
        if self.status() == 503 { Some(1) } else { None }
    }

    /// The whole answer, for a service to give. `retry_after` is in seconds.
    pub fn response(self, retry_after: Option<u64>) -> Response<Full<Bytes>> {
        let body = self.json();
        let length = HeaderValue::from(body.len());
        let mut response = Response::new(Full::new(Bytes::from(body)));
        *response.status_mut() =
            StatusCode::from_u16(self.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(CONTENT_LENGTH, length);
        headers.insert(CODE_HEADER, HeaderValue::from_static(self.name()));
        if let Ok(date) = HeaderValue::try_from(httpdate::fmt_http_date(SystemTime::now())) {
            headers.insert(DATE, date);
        }
        if let Some(seconds) = retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }

    /// The whole answer as HTTP/1.1 bytes that end the connection, for what
    /// goes wrong before there is a request.
    pub fn bytes(self) -> Bytes {
        let body = self.json();
        let reason = StatusCode::from_u16(self.status())
            .ok()
            .and_then(|status| status.canonical_reason())
            .unwrap_or_default();
        let retry = self
            .retry_after()
            .map_or_else(String::new, |seconds| format!("retry-after: {seconds}\r\n"));
        Bytes::from(format!(
            "HTTP/1.1 {} {reason}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n{CODE_HEADER}: {}\r\n\
             {retry}date: {}\r\nconnection: close\r\n\r\n{body}",
            self.status(),
            body.len(),
            self.name(),
            httpdate::fmt_http_date(SystemTime::now()),
        ))
    }

    /// The code for an answer that the HTTP library wants to give by itself.
    pub const fn of_status(status: u16) -> Self {
        match status {
            414 | 431 => Self::HeadersTooLarge,
            408 => Self::RequestTimeout,
            _ => Self::BadRequest,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;

    const ALL: [Code; 18] = [
        Code::NoKeyGiven,
        Code::TwoKeys,
        Code::NoKey,
        Code::Revoked,
        Code::Expired,
        Code::PoolFull,
        Code::NoAccount,
        Code::NoToken,
        Code::Redis,
        Code::Account,
        Code::Connections,
        Code::Upstream,
        Code::UpstreamTimeout,
        Code::BodyTooLarge,
        Code::HeadersTooLarge,
        Code::RequestTimeout,
        Code::BadRequest,
        Code::Unsupported,
    ];

    #[tokio::test]
    async fn every_answer_is_json_with_its_code() {
        for code in ALL {
            let response = code.response(Some(7));
            assert_eq!(response.headers()[CODE_HEADER], code.name());
            assert_eq!(response.headers()[RETRY_AFTER], "7");
            let body = response.into_body().collect().await.unwrap().to_bytes();
            let json: serde_json::Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(json["type"], "error");
            assert!(!json["error"]["type"].as_str().unwrap().is_empty());
            assert!(json["error"]["message"].as_str().unwrap().ends_with('.'));

            let bytes = String::from_utf8(code.bytes().to_vec()).unwrap();
            let (head, raw) = bytes.split_once("\r\n\r\n").unwrap();
            assert_eq!(raw.as_bytes(), body);
            assert!(
                head.starts_with(&format!("HTTP/1.1 {} ", code.status())),
                "{head}"
            );
            assert!(head.contains(&format!("\r\nx-mpool-error: {}\r\n", code.name())));
        }
    }
}
