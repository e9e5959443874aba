//! Asks mpool which account a key has, and tells it of accounts in trouble.
//! Knows the leases it has seen, to go on for a while without Redis.

use crate::accounts::{Account, Accounts};
use crate::answers::Code;
use crate::headers::Scheme;
use crate::known::{Asking, Behind, Look};
use crate::link::{Link, Unreachable};
use bytes::Bytes;
use hashbrown::HashMap;
use hyper::header::HeaderValue;
use redis::Value;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The longest client key, in bytes, as the module has it.
const KEY_MAX: usize = 256;
/// Leases remembered for times without Redis.
const SEEN_MAX: usize = 200_000;

/// What a key is lent.
#[derive(Debug)]
pub struct Lease {
    pub account: Arc<Account>,
    pub scheme: Scheme,
    /// The header's value, whole. Never shown.
    pub credential: HeaderValue,
    /// Unix ms; nothing for a bound key.
    pub last_rotation: Option<i64>,
    pub next_rotation: Option<i64>,
    pub bound: bool,
}

/// How the lease came to be: the pool's word, or `grace`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Assigned,
    Current,
    Rotated,
    Failover,
    Bound,
    /// Redis could not be asked; this is the lease that was seen last.
    Grace,
}

impl State {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Assigned => "assigned",
            Self::Current => "current",
            Self::Rotated => "rotated",
            Self::Failover => "failover",
            Self::Bound => "bound",
            Self::Grace => "grace",
        }
    }

    fn parse(name: &[u8]) -> Option<Self> {
        Some(match name {
            b"assigned" => Self::Assigned,
            b"current" => Self::Current,
            b"rotated" => Self::Rotated,
            b"failover" => Self::Failover,
            b"bound" => Self::Bound,
            _ => return None,
        })
    }
}

/// A lease as it was granted to one request.
#[derive(Clone, Debug)]
pub struct Grant {
    pub lease: Arc<Lease>,
    pub state: State,
    pub previous_account: Option<Arc<str>>,
}

impl Grant {
    /// The same in memory of its own, for one thread ([`crate::metrics`] says why): each request
    /// counts itself among those who use it.
    pub fn apart(&self) -> Self {
        let lease = &self.lease;
        let credential = HeaderValue::from_bytes(lease.credential.as_bytes());
        let mut credential = credential.unwrap_or_else(|_| lease.credential.clone());
        credential.set_sensitive(true);
        Self {
            lease: Arc::new(Lease {
                account: Arc::clone(&lease.account),
                credential,
                ..**lease
            }),
            state: self.state,
            previous_account: self.previous_account.as_deref().map(Arc::from),
        }
    }
}

/// Why there is no lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Denied {
    pub code: Code,
    /// When to come back, in seconds.
    pub retry_after: Option<u64>,
    /// For the operator; holds nothing that a client sent.
    pub why: &'static str,
}

impl Denied {
    const fn of(code: Code, why: &'static str) -> Self {
        Self {
            code,
            retry_after: None,
            why,
        }
    }
}

/// The last reply for a key, and what was read from it.
struct Known {
    reply: Bytes,
    grant: Grant,
}

/// What all threads know of the leases.
pub struct Seen {
    by_key: Mutex<HashMap<Box<str>, Known>>,
    grace: Duration,
}

impl Seen {
    pub fn new(grace: Duration) -> Self {
        Self {
            by_key: Mutex::new(HashMap::new()),
            grace,
        }
    }

    fn by_key(&self) -> MutexGuard<'_, HashMap<Box<str>, Known>> {
        self.by_key.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lease to go on with while Redis can't be asked.
    fn in_grace(&self, key: &str, outage: Duration, now: i64) -> Option<Grant> {
        if outage >= self.grace {
            return None;
        }
        let lease = self
            .by_key()
            .get(key)
            .map(|known| Arc::clone(&known.grant.lease))?;
        let runs = lease.next_rotation.is_none_or(|next| now < next);
        runs.then_some(Grant {
            lease,
            state: State::Grace,
            previous_account: None,
        })
    }

    /// The last reply for a key, and what it meant.
    fn last(&self, key: &str) -> Option<(Bytes, Grant)> {
        let by_key = self.by_key();
        let Known { reply, grant } = by_key.get(key)?;
        Some((reply.clone(), grant.clone()))
    }

    fn keep(&self, key: &str, reply: &[u8], grant: &Grant, now: i64) {
        let mut by_key = self.by_key();
        if by_key.len() >= SEEN_MAX && !by_key.contains_key(key) {
            by_key.retain(|_, known| {
                known
                    .grant
                    .lease
                    .next_rotation
                    .is_none_or(|next| now < next)
            });
            if by_key.len() >= SEEN_MAX {
                return;
            }
        }
        by_key.insert(
            key.into(),
            Known {
                reply: Bytes::copy_from_slice(reply),
                grant: grant.clone(),
            },
        );
    }

    fn forget(&self, key: &str) {
        self.by_key().remove(key);
    }
}

/// Asks on one thread's connection.
#[derive(Clone)]
pub struct Lender {
    pub link: Link,
    pub seen: Arc<Seen>,
    pub accounts: Arc<Accounts>,
}

/// Unix time in ms.
pub fn clock() -> i64 {
    let elapsed = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(elapsed.as_millis()).unwrap_or(i64::MAX)
}

impl Lender {
    /// The account for a key at `now`, if it need not be asked for.
    pub fn look(&self, key: &str, now: Instant) -> Look {
        let known = &self.link.known;
        if !known.is_wanted() {
            return Look::Ask(Asking::Once);
        }
        known.look(key, now, clock())
    }

    /// The same, once what has come from Redis has been read, or what to ask.
    pub async fn look_again(&self, key: &str, behind: Behind) -> Result<Grant, Asking> {
        let known = &self.link.known;
        known.catch_up(behind).await;
        known.look_again(key, Instant::now(), clock())
    }

    /// Have Redis asked for this key the next time.
    pub fn forget(&self, key: &str) {
        self.link.known.forget(key);
    }

    /// The account for a key, from Redis, which may tell of changes to it
    /// from then on.
    ///
    /// # Errors
    /// [`Denied`] when the key is refused, no account is free, or Redis can't be
    /// asked and no lease may be used without it.
    pub async fn acquire(&self, key: &str, asking: Asking) -> Result<Grant, Denied> {
        let known = &self.link.known;
        let ticket = match asking {
            Asking::Track(ticket) => ticket,
            Asking::Once => {
                let grant = self.ask(key).await?;
                if known.is_wanted() {
                    known.meet(key, Instant::now(), &grant);
                }
                return Ok(grant);
            }
        };
        // Whatever changes from here on, Redis tells of.
        let words: [&[u8]; 3] = [b"MPOOL.STATUS", b"KEY", key.as_bytes()];
        let reading = self.link.send(&words, None);
        let asked = self.ask(key).await;
        let status = reading.await.unwrap_or_default();
        if status.starts_with(b"-NOPERM") {
            // Not to be tried each time.
            self.link.denied(key, ticket);
            return asked;
        }
        let end = Fields::of(&status).and_then(|status| status.expires_at);
        match (&asked, end) {
            (Ok(grant), Some(end)) => known.learn(key, ticket, grant, end, clock()),
            _ => known.refused(key, ticket),
        }
        asked
    }

    /// The account for a key, from Redis.
    ///
    /// # Errors
    /// As [`Self::acquire`].
    pub async fn ask(&self, key: &str) -> Result<Grant, Denied> {
        let words: [&[u8]; 4] = [b"MPOOL.ACQUIRE", key.as_bytes(), b"*", b"WITHTOKEN"];
        let last = self.seen.last(key);
        let expected = last.as_ref().map(|(reply, _)| reply.clone());
        let denied = match self.link.send(&words, expected).await {
            Ok(reply) => match error_in(&reply) {
                None => {
                    self.link.heard();
                    return self.granted(key, &reply, last);
                }
                Some(error) => refused(error),
            },
            Err(Unreachable(why)) => Denied {
                code: Code::Redis,
                retry_after: Some(1),
                why,
            },
        };
        if denied.code == Code::Redis {
            let outage = self.link.outage();
            return self.seen.in_grace(key, outage, clock()).ok_or(denied);
        }
        self.link.heard();
        if matches!(denied.code, Code::NoKey | Code::Revoked | Code::Expired) {
            self.seen.forget(key);
        }
        Err(denied)
    }

    fn granted(
        &self,
        key: &str,
        reply: &Bytes,
        last: Option<(Bytes, Grant)>,
    ) -> Result<Grant, Denied> {
        // Mostly it is what was said the last time.
        if let Some((_, grant)) = last.filter(|(last, _)| last == reply) {
            return Ok(grant);
        }
        let grant = self.read(reply)?;
        self.seen.keep(key, reply, &grant, clock());
        Ok(grant)
    }

    fn read(&self, reply: &[u8]) -> Result<Grant, Denied> {
        let unknown = Denied::of(Code::Redis, "the module's answer has an unknown form");
        let fields = Fields::of(reply).ok_or(unknown)?;
        let account = fields.account.ok_or(unknown)?;
        let state = fields.state.ok_or(unknown)?;
        let no_token = Denied::of(
            Code::NoToken,
            "the account's token can't be sent in a header",
        );
        let token = fields.token.ok_or(no_token)?;
        let (scheme, value) = match fields.auth.as_deref() {
            Some(b"bearer") => (Scheme::Bearer, [b"Bearer ", &token[..]].concat()),
            Some(b"x-api-key") => (Scheme::ApiKey, token),
            _ => return Err(unknown),
        };
        let mut credential = HeaderValue::try_from(value).map_err(|_| no_token)?;
        credential.set_sensitive(true);
        let lease = Lease {
            // Bound keys' accounts are not the pool's, and may bear the same names.
            account: match state {
                State::Bound => Arc::new(Account::new(&account)),
                _ => self.accounts.named(&account),
            },
            scheme,
            credential,
            last_rotation: fields.last_rotation,
            next_rotation: fields.next_rotation,
            bound: state == State::Bound,
        };
        Ok(Grant {
            lease: Arc::new(lease),
            state,
            previous_account: fields.previous_account.map(Arc::from),
        })
    }

    /// Takes an account out of the pool for `ms`; 0 puts it back. Answers
    /// whether Redis did it. Only accounts of the pool (tier medium) are told of.
    pub async fn cooldown(&self, account: &str, ms: u128, reason: &str) -> bool {
        let ms = ms.to_string();
        let words: [&[u8]; 7] = [
            b"MPOOL.COOLDOWN",
            b"medium",
            account.as_bytes(),
            b"*",
            ms.as_bytes(),
            b"REASON",
            reason.as_bytes(),
        ];
        // Putting back needs no reason.
        let words = if reason.is_empty() {
            words.get(..5).unwrap_or_default()
        } else {
            &words[..]
        };
        let Ok(reply) = self.link.ask(words).await else {
            return false;
        };
        match error_in(&reply) {
            None => true,
            Some(error) => {
                let why = refused(error).why;
                tracing::warn!(
                    event = "cooldown",
                    account,
                    why,
                    "MPOOL.COOLDOWN was refused: {why}"
                );
                false
            }
        }
    }

    /// Whether Redis and the module answer and an account can be lent.
    ///
    /// # Errors
    /// What is missing, for an operator.
    pub async fn ready(&self) -> Result<(), String> {
        let reply = self.link.ask(&[b"MPOOL.STATUS"]).await;
        let reply = reply.map_err(|Unreachable(why)| format!("Redis can't be asked: {why}"))?;
        if let Some(error) = error_in(&reply) {
            return Err(format!("MPOOL.STATUS was refused: {}", refused(error).why));
        }
        if usable_accounts(&reply) > 0 {
            Ok(())
        } else {
            Err("no account can be used now".into())
        }
    }
}

/// A key as the module takes it: 1 to 256 visible ASCII characters.
pub fn client_key(key: &[u8]) -> Option<&str> {
    // Without a branch for each byte, many bytes are looked at in one go.
    let is_visible = |key: &[u8]| {
        key.iter()
            .fold(true, |all, byte| all & byte.is_ascii_graphic())
    };
    let fits = (1..=KEY_MAX).contains(&key.len()) && is_visible(key);
    fits.then(|| std::str::from_utf8(key).ok()).flatten()
}

/// The fields of an ACQUIRE's reply, or of a key's STATUS: names and values in turn.
#[derive(Default)]
struct Fields {
    account: Option<String>,
    state: Option<State>,
    previous_account: Option<String>,
    last_rotation: Option<i64>,
    next_rotation: Option<i64>,
    token: Option<Vec<u8>>,
    auth: Option<Vec<u8>>,
    /// The last instant there is, where the key has no end.
    expires_at: Option<i64>,
}

impl Fields {
    fn of(reply: &[u8]) -> Option<Self> {
        let mut fields = Self::default();
        match redis::parse_redis_value(reply).ok()? {
            Value::Map(pairs) => {
                for (name, value) in pairs {
                    fields.set(&name, value);
                }
            }
            Value::Array(items) => {
                let mut items = items.into_iter();
                while let (Some(name), Some(value)) = (items.next(), items.next()) {
                    fields.set(&name, value);
                }
            }
            _ => return None,
        }
        Some(fields)
    }

    fn set(&mut self, name: &Value, value: Value) {
        match (bytes_of(name).unwrap_or_default(), value) {
            (b"last_rotation", Value::Int(at)) => self.last_rotation = Some(at),
            (b"next_rotation", Value::Int(at)) => self.next_rotation = Some(at),
            (b"expires_at", Value::Int(at)) => self.expires_at = Some(at),
            (b"expires_at", Value::Nil) => self.expires_at = Some(i64::MAX),
            (b"account", Value::BulkString(text)) => self.account = String::from_utf8(text).ok(),
            (b"previous_account", Value::BulkString(text)) => {
                self.previous_account = String::from_utf8(text).ok()
            }
            (b"state", value) => self.state = bytes_of(&value).and_then(State::parse),
            (b"token", Value::BulkString(token)) => self.token = Some(token),
            (b"auth", value) => self.auth = bytes_of(&value).map(<[u8]>::to_vec),
            _ => {}
        }
    }
}

/// The text of a reply's value, whichever way it is sent.
pub fn bytes_of(value: &Value) -> Option<&[u8]> {
    match value {
        Value::BulkString(bytes) => Some(bytes),
        Value::SimpleString(text) => Some(text.as_bytes()),
        _ => None,
    }
}

/// The text of an error reply.
fn error_in(reply: &Bytes) -> Option<&[u8]> {
    reply.strip_prefix(b"-").map(<[u8]>::trim_ascii_end)
}

/// An error of Redis or the module as an answer. Its text is never passed on:
/// Redis repeats arguments in some.
fn refused(error: &[u8]) -> Denied {
    let text = String::from_utf8_lossy(error);
    let (code, detail) = text.split_once(' ').unwrap_or((&text, ""));
    let at = detail
        .rsplit(' ')
        .next()
        .and_then(|word| word.parse::<i64>().ok());
    let wait = at.map(|at| {
        u64::try_from(at.saturating_sub(clock()))
            .unwrap_or(0)
            .div_ceil(1000)
            .max(1)
    });
    let later = |code, seconds: u64, why| Denied {
        code,
        retry_after: Some(wait.unwrap_or(seconds)),
        why,
    };
    let cannot_ask = |why| Denied {
        code: Code::Redis,
        retry_after: Some(1),
        why,
    };
    match code {
        "NOKEY" => Denied::of(Code::NoKey, "no such key"),
        "REVOKED" => Denied::of(Code::Revoked, "the key is revoked"),
        "EXPIRED" => Denied::of(Code::Expired, "the key has expired"),
        "POOLFULL" => later(Code::PoolFull, 60, "every slot is in use"),
        "NOACCOUNT" => later(Code::NoAccount, 30, "no account can be used"),
        "NOTOKEN" => later(Code::NoToken, 30, "the account's file is not on this Redis"),
        "LOADING" if detail.starts_with("mpool ") => {
            cannot_ask("the module is reading the keyspace or the account files")
        }
        "LOADING" => cannot_ask("Redis is loading its data"),
        "READONLY" => cannot_ask("this Redis is a replica"),
        "MASTERDOWN" => cannot_ask("this Redis has lost its primary"),
        "BUSY" => cannot_ask("Redis is busy with a script"),
        "MISCONF" => cannot_ask("Redis can't save to disk and takes no writes"),
        "OOM" => cannot_ask("Redis is at its maxmemory and takes no writes"),
        "NOPERM" => cannot_ask("the ACL user may not run this command"),
        "NOAUTH" | "WRONGPASS" => cannot_ask("Redis refuses the login"),
        _ if detail.starts_with("unknown command") => cannot_ask("this Redis has no mpool module"),
        _ => cannot_ask("Redis answers with an error"),
    }
}

/// Out of MPOOL.STATUS: accounts that are neither invalid, expired, missing nor
/// cooling down.
fn usable_accounts(reply: &[u8]) -> i64 {
    let Ok(Value::Array(items)) = redis::parse_redis_value(reply) else {
        return 0;
    };
    // now and its value, then each tier's name and numbers.
    let tiers = items
        .chunks_exact(2)
        .skip(1)
        .take(3)
        .filter_map(|pair| pair.get(1));
    tiers
        .map(|tier| {
            let number = |wanted| number(tier, wanted).unwrap_or(0);
            let out = number(b"cooling_down")
                + number(b"invalid")
                + number(b"expired")
                + number(b"missing");
            (number(b"accounts") - out).max(0)
        })
        .sum()
}

fn number(fields: &Value, wanted: &[u8]) -> Option<i64> {
    let Value::Array(items) = fields else {
        return None;
    };
    let pair = items
        .chunks_exact(2)
        .find(|pair| pair.first().and_then(bytes_of) == Some(wanted))?;
    match pair.get(1) {
        Some(Value::Int(number)) => Some(*number),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_become_answers_and_times_become_waits() {
        let due = clock() + 90_500;
        let full = refused(
            format!("POOLFULL every account is full; the next slot falls due at {due}").as_bytes(),
        );
        assert_eq!((full.code, full.code.status()), (Code::PoolFull, 503));
        assert!(matches!(full.retry_after, Some(90 | 91)), "{full:?}");
        let past = refused(b"POOLFULL every account is full; the next slot falls due at 5");
        assert_eq!(past.retry_after, Some(1));
        for (text, code, wait) in [
            ("NOKEY this key is not registered", Code::NoKey, None),
            ("REVOKED x", Code::Revoked, None),
            ("EXPIRED x", Code::Expired, None),
            (
                "NOACCOUNT no account of this tier can be used",
                Code::NoAccount,
                Some(30),
            ),
            ("NOTOKEN x", Code::NoToken, Some(30)),
            (
                "LOADING Redis is loading the dataset in memory",
                Code::Redis,
                Some(1),
            ),
            (
                "LOADING mpool is reading the keyspace or the account files; try again shortly",
                Code::Redis,
                Some(1),
            ),
            (
                "ERR unknown command 'MPOOL.ACQUIRE', with args beginning with: 'sk-secret'",
                Code::Redis,
                Some(1),
            ),
            ("", Code::Redis, Some(1)),
        ] {
            let denied = refused(text.as_bytes());
            assert_eq!((denied.code, denied.retry_after), (code, wait), "{text}");
            assert!(!denied.why.contains("secret"));
        }
    }
}
