//! Asks mpool which account a key has, and tells it of accounts in trouble.
//! Knows the leases it has seen, to go on for a while without Redis.

use crate::accounts::{Account, Accounts};
use crate::answers::Code;
use crate::headers::Scheme;
use crate::link::{Failure, Link};
use hyper::header::HeaderValue;
use redis::{RedisError, Value};
use std::collections::HashMap;
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
#[derive(Debug)]
pub struct Grant {
    pub lease: Arc<Lease>,
    pub state: State,
    pub previous_account: Option<String>,
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

/// What all threads know of the leases.
pub struct Seen {
    leases: Mutex<HashMap<Box<str>, Arc<Lease>>>,
    outage: Mutex<Option<Instant>>,
    grace: Duration,
}

impl Seen {
    pub fn new(grace: Duration) -> Self {
        Self {
            leases: Mutex::new(HashMap::new()),
            outage: Mutex::new(None),
            grace,
        }
    }

    fn leases(&self) -> MutexGuard<'_, HashMap<Box<str>, Arc<Lease>>> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn outage(&self) -> MutexGuard<'_, Option<Instant>> {
        self.outage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lease to go on with while Redis can't be asked.
    fn in_grace(&self, key: &str, now: i64) -> Option<Arc<Lease>> {
        let since = *self.outage().get_or_insert_with(Instant::now);
        if since.elapsed() >= self.grace {
            return None;
        }
        let lease = self.leases().get(key).cloned()?;
        lease
            .next_rotation
            .is_none_or(|next| now < next)
            .then_some(lease)
    }

    /// Keeps a lease, or answers the equal one that is kept already.
    fn keep(&self, key: &str, fresh: Lease, now: i64) -> Arc<Lease> {
        let mut leases = self.leases();
        if let Some(kept) = leases.get(key) {
            let same = kept.account.name == fresh.account.name
                && kept.next_rotation == fresh.next_rotation
                && kept.credential == fresh.credential
                && kept.scheme == fresh.scheme;
            if same {
                return Arc::clone(kept);
            }
        } else if leases.len() >= SEEN_MAX {
            leases.retain(|_, lease| lease.next_rotation.is_none_or(|next| now < next));
            if leases.len() >= SEEN_MAX {
                return Arc::new(fresh);
            }
        }
        let fresh = Arc::new(fresh);
        leases.insert(key.into(), Arc::clone(&fresh));
        fresh
    }

    fn forget(&self, key: &str) {
        self.leases().remove(key);
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
    /// The account for a key.
    ///
    /// # Errors
    /// [`Denied`] when the key is refused, no account is free, or Redis can't be
    /// asked and no lease may be used without it.
    pub async fn acquire(&self, key: &[u8]) -> Result<Grant, Denied> {
        let key = client_key(key).ok_or(Denied::of(Code::NoKey, "the key can't be one"))?;
        let mut command = redis::Cmd::with_capacity(4, key.len() + 32);
        command
            .arg("MPOOL.ACQUIRE")
            .arg(key)
            .arg("*")
            .arg("WITHTOKEN");
        let denied = match self.link.ask(command).await {
            Ok(reply) => {
                self.heard();
                return self.granted(key, reply);
            }
            Err(Failure::Unreachable(why)) => Denied {
                code: Code::Redis,
                retry_after: Some(1),
                why,
            },
            Err(Failure::Refused(error)) => refused(&error),
        };
        if denied.code == Code::Redis {
            let lease = self.seen.in_grace(key, clock()).ok_or(denied)?;
            return Ok(Grant {
                lease,
                state: State::Grace,
                previous_account: None,
            });
        }
        self.heard();
        if matches!(denied.code, Code::NoKey | Code::Revoked | Code::Expired) {
            self.seen.forget(key);
        }
        Err(denied)
    }

    /// Redis has given a verdict: whatever outage there was is over.
    fn heard(&self) {
        let mut outage = self.seen.outage();
        if outage.is_some() {
            *outage = None;
        }
    }

    fn granted(&self, key: &str, reply: Value) -> Result<Grant, Denied> {
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
            account: self.accounts.named(&account),
            scheme,
            credential,
            last_rotation: fields.last_rotation,
            next_rotation: fields.next_rotation,
            bound: state == State::Bound,
        };
        let lease = self.seen.keep(key, lease, clock());
        Ok(Grant {
            lease,
            state,
            previous_account: fields.previous_account,
        })
    }

    /// Takes an account out of the pool for `ms`; 0 puts it back. Answers
    /// whether Redis did it. Only accounts of the pool (tier medium) are told of.
    pub async fn cooldown(&self, account: &str, ms: u128, reason: &str) -> bool {
        let mut command = redis::cmd("MPOOL.COOLDOWN");
        command
            .arg("medium")
            .arg(account)
            .arg("*")
            .arg(ms.to_string());
        if ms > 0 {
            command.arg("REASON").arg(reason);
        }
        match self.link.ask(command).await {
            Ok(_) => true,
            Err(Failure::Refused(error)) => {
                let code = error.code().unwrap_or("an error");
                tracing::warn!(account, code, "MPOOL.COOLDOWN was refused: {code}");
                false
            }
            Err(Failure::Unreachable(_)) => false,
        }
    }

    /// Whether Redis and the module answer and an account can be lent.
    ///
    /// # Errors
    /// What is missing, for an operator.
    pub async fn ready(&self) -> Result<(), String> {
        let command = redis::cmd("MPOOL.STATUS");
        match self.link.ask(command).await {
            Ok(reply) if usable_accounts(&reply) > 0 => Ok(()),
            Ok(_) => Err("no account can be used now".into()),
            Err(Failure::Unreachable(why)) => Err(format!("Redis can't be asked: {why}")),
            Err(Failure::Refused(error)) => Err(format!(
                "Redis refuses MPOOL.STATUS: {}",
                refused(&error).why
            )),
        }
    }
}

/// The key as the module takes it: 1 to 256 visible ASCII characters.
fn client_key(key: &[u8]) -> Option<&str> {
    let fits = (1..=KEY_MAX).contains(&key.len()) && key.iter().all(u8::is_ascii_graphic);
    fits.then(|| std::str::from_utf8(key).ok()).flatten()
}

/// The fields of a reply, flat (RESP2) or a map (RESP3).
#[derive(Default)]
struct Fields {
    account: Option<String>,
    state: Option<State>,
    previous_account: Option<String>,
    last_rotation: Option<i64>,
    next_rotation: Option<i64>,
    token: Option<Vec<u8>>,
    auth: Option<Vec<u8>>,
}

impl Fields {
    fn of(reply: Value) -> Option<Self> {
        let mut fields = Self::default();
        match reply {
            Value::Map(pairs) => pairs
                .into_iter()
                .for_each(|(name, value)| fields.set(&name, value)),
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
        let Some(name) = bytes_of(name) else { return };
        match (name, value) {
            (b"last_rotation", Value::Int(at)) => self.last_rotation = Some(at),
            (b"next_rotation", Value::Int(at)) => self.next_rotation = Some(at),
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

fn bytes_of(value: &Value) -> Option<&[u8]> {
    match value {
        Value::BulkString(bytes) => Some(bytes),
        Value::SimpleString(text) => Some(text.as_bytes()),
        _ => None,
    }
}

/// An error of Redis or the module as an answer. Its text is never passed on:
/// Redis repeats arguments in some.
fn refused(error: &RedisError) -> Denied {
    let detail = error.detail().unwrap_or_default();
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
    let cannot_ask = |why| Denied {
        code: Code::Redis,
        retry_after: Some(1),
        why,
    };
    match error.code().unwrap_or_default() {
        "NOKEY" => Denied::of(Code::NoKey, "no such key"),
        "REVOKED" => Denied::of(Code::Revoked, "the key is revoked"),
        "EXPIRED" => Denied::of(Code::Expired, "the key has expired"),
        "POOLFULL" => Denied {
            code: Code::PoolFull,
            retry_after: Some(wait.unwrap_or(60)),
            why: "every slot is in use",
        },
        "NOACCOUNT" => Denied {
            code: Code::NoAccount,
            retry_after: Some(wait.unwrap_or(30)),
            why: "no account can be used",
        },
        "NOTOKEN" => Denied {
            code: Code::NoToken,
            retry_after: Some(30),
            why: "the account's file is not on this Redis",
        },
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

/// Out of MPOOL.STATUS: accounts that are neither invalid, expired nor cooling down.
fn usable_accounts(reply: &Value) -> i64 {
    // now and its value, then each tier's name and numbers.
    let tiers: Vec<&Value> = match reply {
        Value::Array(items) => items
            .chunks_exact(2)
            .filter_map(|pair| pair.get(1))
            .take(4)
            .collect(),
        Value::Map(pairs) => pairs.iter().map(|(_, value)| value).take(4).collect(),
        _ => return 0,
    };
    tiers
        .into_iter()
        .map(|tier| {
            let number = |wanted: &[u8]| field(tier, wanted).unwrap_or(0);
            let out = number(b"cooling_down")
                + number(b"invalid")
                + number(b"expired")
                + number(b"missing");
            (number(b"accounts") - out).max(0)
        })
        .sum()
}

fn field(fields: &Value, wanted: &[u8]) -> Option<i64> {
    let is = |name: &Value| bytes_of(name) == Some(wanted);
    let value = match fields {
        Value::Array(items) => items
            .chunks_exact(2)
            .find(|pair| pair.first().is_some_and(is))?
            .get(1)?,
        Value::Map(pairs) => &pairs.iter().find(|(name, _)| is(name))?.1,
        _ => return None,
    };
    match value {
        Value::Int(number) => Some(*number),
        _ => None,
    }
}
