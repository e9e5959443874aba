//! What one request leaves behind: its log line and its part in the metrics,
//! whatever way it ends.

use crate::accounts::Account;
use crate::answers::Code;
use crate::lender::{Grant, Lease, State, clock};
use crate::metrics::Tally;
use crate::upload::Upload;
use hyper::{Method, Uri};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The status in the log when the client went before there was one, as nginx has it.
const CLIENT_WENT: u16 = 499;
const HOUR_MS: i64 = 3_600_000;

/// How an exchange ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Whole,
    ClientGone,
    UpstreamBroke,
    UpstreamSilent,
}

impl End {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::ClientGone => "client-gone",
            Self::UpstreamBroke => "upstream-broke",
            Self::UpstreamSilent => "upstream-silent",
        }
    }
}

/// The account of one request; it is closed when it is dropped.
pub struct Report {
    tally: Arc<Tally>,
    upload: Option<Upload>,
    /// What the log line says beyond the rest; nothing where no line is wanted.
    line: Option<Box<Line>>,
    started: Instant,
    status: u16,
    code: Option<Code>,
    sent: u64,
    end: End,
}

struct Line {
    method: Method,
    /// Copied, as a piece of the head would keep the whole head in memory.
    path: Box<str>,
    /// In full; only ever shown masked.
    key: Option<Box<str>>,
    first_byte: Option<Duration>,
    account: Option<(Arc<Account>, State)>,
}

impl Report {
    pub fn begin(tally: &Arc<Tally>, method: &Method, uri: &Uri) -> Self {
        tally.begun();
        let line = || {
            Box::new(Line {
                method: method.clone(),
                path: uri.path().into(),
                key: None,
                first_byte: None,
                account: None,
            })
        };
        Self {
            tally: Arc::clone(tally),
            upload: None,
            line: lines_are_wanted().then(line),
            started: Instant::now(),
            status: CLIENT_WENT,
            code: None,
            sent: 0,
            end: End::ClientGone,
        }
    }

    /// When its head had come.
    pub const fn started(&self) -> Instant {
        self.started
    }

    /// Whose request it is.
    pub fn key(&mut self, key: &[u8]) {
        if let Some(line) = &mut self.line {
            line.key = Some(String::from_utf8_lossy(key).into());
        }
    }

    pub fn upload(&mut self, upload: &Upload) {
        self.upload = Some(upload.clone());
    }

    pub fn granted(&mut self, grant: &Grant) {
        if let Some(line) = &mut self.line {
            line.account = Some((Arc::clone(&grant.lease.account), grant.state));
        }
    }

    /// The upstream's head, which came at that time, is on its way to the client.
    pub fn answered(&mut self, status: u16, at: Instant) {
        let elapsed = at.saturating_duration_since(self.started);
        self.status = status;
        self.tally.first_byte(elapsed);
        if let Some(line) = &mut self.line {
            line.first_byte = Some(elapsed);
        }
    }

    /// The answer is one of the forwarder's own.
    pub fn own(&mut self, code: Code, bytes: u64) {
        self.status = code.status();
        self.code = Some(code);
        self.sent = bytes;
        self.end = End::Whole;
    }

    pub fn sent(&mut self, bytes: usize) {
        self.sent += bytes as u64;
    }

    pub fn ended(&mut self, end: End) {
        if self.end == End::ClientGone {
            self.end = end;
        }
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        if let Some(upload) = &self.upload {
            upload.close();
        }
        self.tally.finished(self.status, self.code, self.end);
        if let Some(line) = &self.line {
            self.log(line);
        }
    }
}

impl Report {
    fn log(&self, line: &Line) {
        // None is longer; what is may be anything.
        let method = Some(line.method.as_str())
            .filter(|name| name.len() <= 16)
            .unwrap_or("?");
        let path = Path {
            path: &line.path,
            key: line.key.as_deref(),
        };
        let received = self.upload.as_ref().map_or(0, Upload::received);
        let total = self.started.elapsed();
        let first_byte = line.first_byte.unwrap_or(total);
        let account = line
            .account
            .as_ref()
            .map_or("-", |(account, _)| &account.name);
        let state = line.account.as_ref().map_or("-", |(_, state)| state.name());
        let key = line.key.as_deref().map_or_else(|| "-".into(), mask);
        let (ttfb_ms, total_ms) = (ms(first_byte), ms(total));
        let error = self.code.map(Code::name);
        let end = (self.end != End::Whole).then(|| self.end.name());
        let mark = |name: &'static str, value: Option<&'static str>| Mark(name, value);
        tracing::info!(
            event = "request",
            method,
            path = %path,
            status = self.status,
            bytes_in = received,
            bytes_out = self.sent,
            ttfb_ms,
            total_ms,
            account,
            state,
            key = &*key,
            error,
            end = self.end.name(),
            "{method} {path} {} in={received} out={} ttfb={ttfb_ms}ms total={total_ms}ms account={account} \
             state={state} key={key}{}{}",
            self.status,
            self.sent,
            mark("error", error),
            mark("end", end),
        );
    }
}

struct Mark(&'static str, Option<&'static str>);

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.1 {
            Some(value) => write!(f, " {}={value}", self.0),
            None => Ok(()),
        }
    }
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

pub fn lines_are_wanted() -> bool {
    tracing::enabled!(tracing::Level::INFO)
}

/// The lines of the pool: which account a request got, and why.
pub fn log_lease(grant: &Grant) {
    let lease: &Lease = &grant.lease;
    let account: &str = &lease.account.name;
    if grant.state == State::Grace {
        tracing::warn!(
            event = "grace",
            account,
            "Redis can't be asked: going on with the lease seen last, account: {account}"
        );
    }
    if !lines_are_wanted() {
        return;
    }
    match grant.state {
        State::Assigned | State::Rotated | State::Failover => {
            let span = lease.next_rotation.unwrap_or(0) - lease.last_rotation.unwrap_or(0);
            let (hours, state) = (span / HOUR_MS, grant.state.name());
            tracing::info!(
                event = "rotated",
                account,
                hours,
                state,
                "🔄 Pool: Rotated to account: {account} (will rotate in {hours} hours)"
            );
            if let Some(previous) = &grant.previous_account {
                tracing::info!(event = "previous", account = %previous, "📝 Previous account was: {previous}");
            }
        }
        State::Current => {
            let hours = (lease.next_rotation.unwrap_or(0) - clock()).max(0) / HOUR_MS;
            tracing::info!(
                event = "current",
                account,
                hours,
                "📌 Pool: Using current account: {account} ({hours} hours until rotation)"
            );
        }
        State::Bound | State::Grace => return,
    }
    tracing::info!(
        event = "token",
        account,
        "✅ Successfully obtained token from pool account: {account}"
    );
}

/// Enough of a key to tell it from others, not enough to use it; in the form
/// that MPOOL.STATUS has.
fn mask(key: &str) -> String {
    const PREFIX: &str = "sk-cli-v1-";
    if !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        return "...".into();
    }
    let (head, body) = key
        .strip_prefix(PREFIX)
        .map_or(("", key), |body| (PREFIX, body));
    let shown = if body.len() >= 16 { 4 } else { 0 };
    let first = body.get(..shown).unwrap_or_default();
    let last = body.get(body.len() - shown..).unwrap_or_default();
    format!("{head}{first}...{last}")
}

/// A path as it is logged: without control characters, and without a key that
/// someone put into it.
struct Path<'a> {
    path: &'a str,
    key: Option<&'a str>,
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const LONGEST: usize = 512;
        let own = self.key.filter(|key| key.len() >= 4);
        let mut rest = self.path;
        let mut written = 0;
        while let Some(next) = rest.chars().next() {
            if written >= LONGEST {
                return f.write_str("...");
            }
            if let Some(after) = own.and_then(|key| rest.strip_prefix(key)) {
                f.write_str("...")?;
                rest = after;
                continue;
            }
            // Whatever looks like a key is one.
            if let Some(key) = rest.strip_prefix("sk-") {
                let length = key
                    .find(|c: char| !c.is_ascii_alphanumeric() && c != '-' && c != '_')
                    .unwrap_or(key.len());
                f.write_str("sk-...")?;
                rest = key.get(length..).unwrap_or_default();
                written += 6;
                continue;
            }
            // So is whatever is as long as one.
            let long = token_length(rest);
            if long >= KEY_LIKE {
                f.write_str(rest.get(..4).unwrap_or_default())?;
                f.write_str("...")?;
                rest = rest.get(long..).unwrap_or_default();
                written += 7;
                continue;
            }
            write!(f, "{}", next.escape_default())?;
            written += 1;
            rest = rest.get(next.len_utf8()..).unwrap_or_default();
        }
        Ok(())
    }
}

/// As long as nothing but a key or a digest is.
const KEY_LIKE: usize = 40;

/// How many bytes the text begins with that may be part of a key, escaped or not.
fn token_length(text: &str) -> usize {
    let bytes = text.as_bytes();
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        at += match byte {
            b'%' if escaped(bytes.get(at + 1..at + 3)).is_some_and(may_be_in_a_key) => 3,
            byte if may_be_in_a_key(*byte) => 1,
            _ => break,
        };
    }
    at
}

fn may_be_in_a_key(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')
}

/// The byte that two hexadecimal digits stand for.
fn escaped(digits: Option<&[u8]>) -> Option<u8> {
    u8::from_str_radix(std::str::from_utf8(digits?).ok()?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_masked_as_the_module_does_it() {
        let key = format!("sk-cli-v1-{}", "0123456789abcdef".repeat(4));
        assert_eq!(mask(&key), "sk-cli-v1-0123...cdef");
        assert_eq!(mask("short-secret"), "...");
        assert_eq!(mask("schlüssel-schlüssel"), "...");
    }

    #[test]
    fn a_key_in_a_path_is_not_shown() {
        let shown = |path: &str| {
            Path {
                path,
                key: Some("hand-made"),
            }
            .to_string()
        };
        assert_eq!(shown("/hand-made/x/hand-made"), "/.../x/...");
        assert_eq!(shown("/v1/messages"), "/v1/messages");
        assert_eq!(
            shown("/k/sk-cli-v1-0123/more/sk-ant-x_y"),
            "/k/sk-.../more/sk-..."
        );
        assert_eq!(shown("/a\u{9}b"), "/a\\tb");
        assert_eq!(shown("/ü"), "/\\u{fc}");
        assert!(shown(&"/x".repeat(5000)).len() < 600);
        let digits = "0123456789abcdef".repeat(4);
        assert_eq!(shown(&format!("/a/{digits}/b")), "/a/0123.../b");
        assert_eq!(shown(&format!("/a/sk%2Dcli%2Dv1%2D{digits}")), "/a/sk%2...");
        let escaped: String = format!("sk-cli-v1-{digits}")
            .bytes()
            .map(|byte| format!("%{byte:02x}"))
            .collect();
        assert_eq!(shown(&format!("/{escaped}/b")), "/%73%.../b");
        assert_eq!(
            shown("/v1/files/0b1f1c5e-7c1d-4c7e-9a57-3f6d3c1f2a11"),
            "/v1/files/0b1f1c5e-7c1d-4c7e-9a57-3f6d3c1f2a11"
        );
    }
}
