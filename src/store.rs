//! The pool's keys in Redis: every name, every read, every write. It decides
//! nothing.

use crate::errors::Failure;
use crate::ffi::{self, Cursor, Fields, WrongType};
use crate::pool::{
    Effect, Flaw, KeyFields, KeyRecord, Pool, Rotation, RotationFields, Stored, Tier, names,
};
use redis_module::{CallOptionsBuilder, CallReply, CallResult, Context, RedisString};
use std::cell::RefCell;
use std::ffi::CStr;

const CLIENT_KEYS: &str = "client_keys:";
const KEY_ROTATION: &str = "key_rotation:";
const SLOTS: &str = "_pool:slots:";
const COOLDOWN: &str = "_pool:cooldown:";
const REASON: &str = "_pool:cooldown_reason:";

/// What the rules need of a client key's record.
static RECORD: Fields<5> =
    Fields::new(["tier", "use_pool", "account_name", "expires_at", "active"]);
/// The rest of it.
static LABEL: Fields<2> = Fields::new(["created_at", "name"]);
static LEASE: Fields<4> = Fields::new([
    "account",
    "next_rotation",
    "last_rotation",
    "previous_account",
]);

/// Lets go of what was kept of the server's.
pub(crate) fn forget() {
    RECORD.free();
    LABEL.free();
    LEASE.free();
}

/// A key of the pool, by its parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PoolKey<'a> {
    /// `client_keys:{key}`, a hash: the key's record.
    ClientKey(&'a str),
    /// `key_rotation:{key}`, a hash: the key's lease.
    Rotation(&'a str),
    /// `{tier}_pool:slots:{account}`, a string: slots in use.
    Slots(Tier, &'a str),
    /// `{tier}_pool:cooldown:{account}`, a string: unix ms of its end.
    Cooldown(Tier, &'a str),
    /// `{tier}_pool:cooldown_reason:{account}`, a string: why it cools down.
    Reason(Tier, &'a str),
}

impl<'a> PoolKey<'a> {
    /// The key of that name, if it is one of the pool's.
    pub(crate) fn parse(name: &'a [u8]) -> Option<Self> {
        let after = |prefix: &str| name.strip_prefix(prefix.as_bytes());
        if let Some(key) = after(CLIENT_KEYS) {
            return names::client_key(key).map(Self::ClientKey);
        }
        if let Some(key) = after(KEY_ROTATION) {
            return names::client_key(key).map(Self::Rotation);
        }
        let (tier, rest) = Tier::ALL.into_iter().find_map(|tier| {
            let rest = name.strip_prefix(tier.name().as_bytes())?;
            Some((tier, rest))
        })?;
        let account = |prefix: &str| {
            rest.strip_prefix(prefix.as_bytes())
                .and_then(names::account_name)
        };
        if let Some(account) = account(SLOTS) {
            return Some(Self::Slots(tier, account));
        }
        if let Some(account) = account(COOLDOWN) {
            return Some(Self::Cooldown(tier, account));
        }
        account(REASON).map(|account| Self::Reason(tier, account))
    }

    /// The key's name.
    pub(crate) fn name(self) -> String {
        match self {
            Self::ClientKey(key) => [CLIENT_KEYS, key].concat(),
            Self::Rotation(key) => [KEY_ROTATION, key].concat(),
            Self::Slots(tier, account) => [tier.name(), SLOTS, account].concat(),
            Self::Cooldown(tier, account) => [tier.name(), COOLDOWN, account].concat(),
            Self::Reason(tier, account) => [tier.name(), REASON, account].concat(),
        }
    }

    /// Reads the key, which has that name, and answers what brings it into a
    /// view. The two are apart because reading may make Redis expire keys, which
    /// comes back in here.
    pub(crate) fn read(self, ctx: &Context, name: &[u8]) -> Observation<'a> {
        match self {
            Self::ClientKey(key) => Observation::ClientKey(key, ffi::read_hash(ctx, name, &RECORD)),
            Self::Rotation(key) => Observation::Rotation(key, ffi::read_hash(ctx, name, &LEASE)),
            Self::Slots(tier, account) => {
                let stored = match read_string(ctx, name) {
                    Ok(None) => Stored::Absent,
                    Ok(Some(text)) => decimal(&text)
                        // Redis would not take 01 or +1 for a number.
                        .filter(|count| count.to_string().as_bytes() == text)
                        .map_or(Stored::Garbage, Stored::Count),
                    Err(WrongType) => Stored::Garbage,
                };
                Observation::Slots(tier, account, stored)
            }
            Self::Cooldown(tier, account) => {
                let text = read_string(ctx, name).ok().flatten();
                let until = text
                    .and_then(|text| decimal(&text))
                    .and_then(|until| i64::try_from(until).ok());
                Observation::Cooldown(tier, account, until.unwrap_or(0))
            }
            Self::Reason(tier, account) => {
                let text = read_string(ctx, name).ok().flatten();
                let reason = text.and_then(|text| names::text(&text).map(str::to_owned));
                Observation::Reason(tier, account, reason)
            }
        }
    }
}

/// Goes on with a walk over the keyspace: tells what a few of the pool's keys
/// hold, and answers whether there are more keys.
pub(crate) fn scan(
    ctx: &Context,
    cursor: &mut Cursor,
    mut tell: impl FnMut(&Observation<'_>),
) -> bool {
    let mut names = Vec::new();
    let more = cursor.step(ctx, |name| {
        if PoolKey::parse(name).is_some() {
            names.push(name.to_vec());
        }
    });
    for name in &names {
        if let Some(key) = PoolKey::parse(name) {
            tell(&key.read(ctx, name));
        }
    }
    more
}

/// Has Redis tell those who track the pool's keys (CLIENT TRACKING) that all of them, or
/// what belongs to them, may have changed, where no key does: by a name that bears no
/// client key.
pub(crate) fn signal_all(ctx: &Context) {
    signal(ctx, CLIENT_KEYS);
}

/// The same of one key, by its name.
pub(crate) fn signal(ctx: &Context, name: &str) {
    ffi::signal_change(ctx, name.as_bytes());
}

type Hash<const N: usize> = Result<Option<[Option<RedisString>; N]>, WrongType>;

/// What a key of the pool holds.
pub(crate) enum Observation<'a> {
    ClientKey(&'a str, Hash<5>),
    Rotation(&'a str, Hash<4>),
    Slots(Tier, &'a str, Stored),
    Cooldown(Tier, &'a str, i64),
    Reason(Tier, &'a str, Option<String>),
    /// What the module has just written there itself.
    Own(Own),
}

/// What a write of the module's own makes of its key.
#[derive(Clone, Debug)]
pub(crate) enum Own {
    /// A whole lease or counter.
    Whole(Effect),
    /// A lease without an account and, if it is `over`, without an end.
    GivenUp { key: Box<str>, over: bool },
    /// A lease with this previous account.
    Previous { key: Box<str>, account: Box<str> },
}

impl Own {
    /// Whether this event is that of the write. Another one may come before it:
    /// a key that has expired is gone first.
    fn is_of(&self, key: PoolKey<'_>, event: &str) -> bool {
        let own = match self {
            Self::Whole(Effect::Slots { .. }) => "set",
            Self::GivenUp { .. } => "hdel",
            Self::Whole(_) | Self::Previous { .. } => "hset",
        };
        if event != own {
            return false;
        }
        match (self, key) {
            (
                Self::Whole(Effect::Lend { key: own, .. })
                | Self::GivenUp { key: own, .. }
                | Self::Previous { key: own, .. },
                PoolKey::Rotation(key),
            ) => **own == *key,
            (Self::Whole(Effect::Slots { tier, account, .. }), PoolKey::Slots(of, name)) => {
                *tier == of && **account == *name
            }
            _ => false,
        }
    }
}

thread_local! {
    /// The write under way, whose notification need not read what it made of
    /// its key: reading costs as much as writing.
    static UNDER_WAY: RefCell<Option<Own>> = const { RefCell::new(None) };
}

/// What the write under way, if there is one, has made of this key; once.
pub(crate) fn own_write(key: PoolKey<'_>, event: &str) -> Option<Observation<'static>> {
    UNDER_WAY.with_borrow_mut(|own| {
        own.take_if(|own| own.is_of(key, event))
            .map(Observation::Own)
    })
}

impl Observation<'_> {
    /// Brings what was read into the view.
    pub(crate) fn enter(&self, pool: &mut Pool) {
        match self {
            Self::ClientKey(key, Ok(None)) => pool.observe_key(key, None),
            Self::ClientKey(key, Err(WrongType)) => {
                pool.observe_key(key, Some(KeyRecord::Malformed(Flaw::Type)))
            }
            Self::ClientKey(key, Ok(Some(fields))) => {
                let [tier, use_pool, account_name, expires_at, active] = fields
                    .each_ref()
                    .map(|field| field.as_ref().map(RedisString::as_slice));
                let fields = KeyFields {
                    tier,
                    use_pool,
                    account_name,
                    expires_at,
                    active,
                };
                pool.observe_key(key, Some(KeyRecord::parse(&fields)));
            }
            Self::Rotation(key, Ok(None) | Err(WrongType)) => pool.observe_rotation(key, None),
            Self::Rotation(key, Ok(Some(fields))) => {
                let [account, next_rotation, last_rotation, previous_account] = fields
                    .each_ref()
                    .map(|field| field.as_ref().map(RedisString::as_slice));
                let fields = RotationFields {
                    account,
                    next_rotation,
                    last_rotation,
                    previous_account,
                };
                pool.observe_rotation(key, Some(Rotation::parse(&fields)));
            }
            // No field of a lease stays as it was, save a previous account where
            // the decision has none, and then there was none that could be read.
            Self::Own(Own::Whole(Effect::Lend {
                key,
                account,
                previous,
                last,
                next,
            })) => {
                let rotation = Rotation {
                    account: Some(account),
                    account_is_garbage: false,
                    previous: previous.as_deref(),
                    last: Some(*last),
                    next: Some(*next),
                };
                pool.observe_rotation(key, Some(rotation));
            }
            Self::Own(Own::Whole(Effect::Slots {
                tier,
                account,
                used,
            })) => pool.observe_slots(*tier, account, Stored::Count(*used)),
            Self::Own(Own::Whole(_)) => {}
            Self::Own(Own::GivenUp { key, over }) => pool.observe_given_up(key, *over),
            Self::Own(Own::Previous { key, account }) => pool.observe_previous(key, account),
            Self::Slots(tier, account, stored) => pool.observe_slots(*tier, account, *stored),
            Self::Cooldown(tier, account, until) => pool.observe_cooldown(*tier, account, *until),
            Self::Reason(tier, account, reason) => {
                pool.observe_reason(*tier, account, reason.as_deref())
            }
        }
    }
}

/// A new client key's record.
#[derive(Debug)]
pub(crate) struct Registration<'a> {
    pub(crate) key: &'a str,
    pub(crate) tier: Tier,
    /// The account that the key is bound to; none: it uses the pool.
    pub(crate) account: Option<&'a str>,
    /// Unix ms.
    pub(crate) created_at: i64,
    /// Unix ms.
    pub(crate) expires_at: i64,
    pub(crate) name: &'a str,
}

/// Writes a new client key's record.
pub(crate) fn register(ctx: &Context, new: &Registration<'_>) -> Result<(), Failure> {
    let (created_at, expires_at) = (new.created_at.to_string(), new.expires_at.to_string());
    let use_pool = if new.account.is_none() {
        "true"
    } else {
        "false"
    };
    let name = PoolKey::ClientKey(new.key).name();
    let mut args = vec![name.as_str(), "tier", new.tier.name(), "use_pool", use_pool];
    if let Some(account) = new.account {
        args.extend(["account_name", account]);
    }
    args.extend([
        "created_at",
        &created_at,
        "expires_at",
        &expires_at,
        "active",
        "true",
    ]);
    if !new.name.is_empty() {
        args.extend(["name", new.name]);
    }
    // More arguments than other writes have, and seldom.
    let options = CallOptionsBuilder::new()
        .replicate()
        .errors_as_replies()
        .build();
    let result: CallResult<'_> = ctx.call_ext("HSET", &options, &args[..]);
    result
        .map(drop)
        .map_err(|error| refused(c"HSET", &String::from_utf8_lossy(error.as_bytes())))
}

/// The fields of a client key's record that the rules don't need:
/// `created_at` and `name`, as stored.
pub(crate) fn read_label(ctx: &Context, key: &str) -> [Option<Vec<u8>>; 2] {
    let name = PoolKey::ClientKey(key).name();
    let fields = ffi::read_hash(ctx, name.as_bytes(), &LABEL);
    let fields = fields.ok().flatten().unwrap_or_default();
    fields.map(|field| field.map(|text| text.as_slice().to_vec()))
}

/// Carries effects out, each as replicated commands. Nothing is written when
/// one of them can't be.
pub(crate) fn apply(ctx: &Context, effects: &[Effect]) -> Result<(), Failure> {
    for effect in effects {
        let hash = match effect {
            // A previous account is on record, and what is given up is: in a hash.
            Effect::Lend {
                key,
                previous: None,
                ..
            } => PoolKey::Rotation(key).name(),
            Effect::Deactivate { key } => PoolKey::ClientKey(key).name(),
            _ => continue,
        };
        if !ffi::can_hold_hash(ctx, hash.as_bytes()) {
            return Err(Failure::WrongType);
        }
    }
    effects.iter().try_for_each(|effect| carry_out(ctx, effect))
}

/// Whether the server would take a write that needs memory now. Asks it by one
/// that does nothing: a push onto a list that isn't there.
pub(crate) fn has_room(ctx: &Context) -> bool {
    let options = CallOptionsBuilder::new()
        .verify_oom()
        .errors_as_replies()
        .build();
    let result: CallResult<'_> = ctx.call_ext("LPUSHX", &options, &["mpool:no-such-list", ""]);
    result.is_ok()
}

fn write(ctx: &Context, command: &CStr, args: &[&str]) -> Result<(), Failure> {
    ffi::write(ctx, command, args).map_err(|error| refused(command, &error.0))
}

/// A write whose notification is told what it makes of its key.
fn write_own(own: Own, write: impl FnOnce() -> Result<(), Failure>) -> Result<(), Failure> {
    UNDER_WAY.set(Some(own));
    let outcome = write();
    UNDER_WAY.set(None);
    outcome
}

fn carry_out(ctx: &Context, effect: &Effect) -> Result<(), Failure> {
    match effect {
        Effect::Lend {
            key,
            account,
            previous,
            last,
            next,
        } => {
            let (name, last, next) = (
                PoolKey::Rotation(key).name(),
                last.to_string(),
                next.to_string(),
            );
            let mut args = vec![
                &*name,
                "account",
                account,
                "next_rotation",
                &next,
                "last_rotation",
                &last,
            ];
            if let Some(previous) = previous {
                args.extend(["previous_account", previous]);
            }
            write_own(Own::Whole(effect.clone()), || write(ctx, c"HSET", &args))
        }
        Effect::Free { key, account } => give_up(ctx, key, account.as_deref(), false),
        Effect::Release { key, account } => give_up(ctx, key, account.as_deref(), true),
        Effect::Forget { key } => write(ctx, c"DEL", &[&PoolKey::Rotation(key).name()]),
        Effect::Slots {
            tier,
            account,
            used,
        } => {
            let name = PoolKey::Slots(*tier, account).name();
            let set = || ffi::set_number(ctx, &name, *used);
            write_own(Own::Whole(effect.clone()), || {
                set().map_err(|error| refused(c"SET", &error.0))
            })
        }
        Effect::Uncount { tier, account } => {
            write(ctx, c"DEL", &[&PoolKey::Slots(*tier, account).name()])
        }
        Effect::Leave { tier, account } => {
            let names = [
                PoolKey::Slots(*tier, account).name(),
                PoolKey::Cooldown(*tier, account).name(),
                PoolKey::Reason(*tier, account).name(),
            ];
            write(ctx, c"DEL", &names.each_ref().map(String::as_str))
        }
        Effect::Cool {
            tier,
            account,
            until,
            reason,
        } => {
            let name = PoolKey::Cooldown(*tier, account).name();
            let why = PoolKey::Reason(*tier, account).name();
            write(ctx, c"SET", &[&name, &until.to_string()])?;
            match reason {
                Some(reason) => write(ctx, c"SET", &[&why, reason]),
                None => write(ctx, c"DEL", &[&why]),
            }
        }
        Effect::Warm { tier, account } => {
            let names = [
                PoolKey::Cooldown(*tier, account).name(),
                PoolKey::Reason(*tier, account).name(),
            ];
            write(ctx, c"DEL", &names.each_ref().map(String::as_str))
        }
        Effect::Deactivate { key } => write(
            ctx,
            c"HSET",
            &[&PoolKey::ClientKey(key).name(), "active", "false"],
        ),
    }
}

/// Takes a lease's account off and, if it is `over`, its end as well.
fn give_up(ctx: &Context, key: &str, account: Option<&str>, over: bool) -> Result<(), Failure> {
    let name = PoolKey::Rotation(key).name();
    let fields = [&*name, "account", "next_rotation"];
    let fields = if over { &fields[..] } else { &fields[..2] };
    let own = Own::GivenUp {
        key: key.into(),
        over,
    };
    write_own(own, || write(ctx, c"HDEL", fields))?;
    let Some(account) = account else {
        return Ok(());
    };
    let own = Own::Previous {
        key: key.into(),
        account: account.into(),
    };
    write_own(own, || {
        write(ctx, c"HSET", &[&name, "previous_account", account])
    })
}

/// A write that the server refused: the log gets its code word.
fn refused(command: &CStr, error: &str) -> Failure {
    let command = command.to_string_lossy();
    let word = error.split(' ').next().unwrap_or_default();
    let message = format!("a write of the module was refused: {command}: {word}");
    ffi::log(redis_module::logging::RedisLogLevel::Warning, &message);
    Failure::Write
}

/// The string at a key. Read through the command: the direct way would rewrite
/// the value in place when it is stored as a number.
fn read_string(ctx: &Context, name: &[u8]) -> Result<Option<Vec<u8>>, WrongType> {
    let options = CallOptionsBuilder::new().errors_as_replies().build();
    let result: CallResult<'_> = ctx.call_ext("GET", &options, &[name]);
    match result {
        Ok(CallReply::String(text)) => Ok(Some(text.as_bytes().to_vec())),
        Ok(_) => Ok(None),
        Err(_) => Err(WrongType),
    }
}

fn decimal(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        let keys = [
            PoolKey::ClientKey("sk-cli-v1-xxxxx"),
            PoolKey::Rotation("sk-cli-v1-xxxxx"),
            PoolKey::Slots(Tier::Medium, "account_name"),
            PoolKey::Cooldown(Tier::High, "account_name"),
            PoolKey::Reason(Tier::Supreme, "account_name"),
        ];
        for key in keys {
            assert_eq!(PoolKey::parse(key.name().as_bytes()), Some(key));
        }
        assert_eq!(keys[1].name(), "key_rotation:sk-cli-v1-xxxxx");
        assert_eq!(keys[2].name(), "medium_pool:slots:account_name");
    }

    #[test]
    fn other_names_are_not_the_pools() {
        let others = [
            "",
            "client_keys:",
            "client_keys:with blank",
            "client_keys",
            "medium_pool:slots:",
            "medium_pool:slots:a/b",
            "gold_pool:slots:a",
            "mediumpool:slots:a",
            "xmedium_pool:slots:a",
        ];
        for name in others {
            assert_eq!(PoolKey::parse(name.as_bytes()), None, "{name}");
        }
        assert_eq!(PoolKey::parse(b"client_keys:\xff\0"), None);
    }
}
