//! One client key as the pool sees it, and how its two hashes are read.

use super::text::Text;
use super::{AccountId, Tier, names};

/// A number for a client key of the view; good until the key is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct KeyId(u32);

impl KeyId {
    pub(super) fn new(slot: usize) -> Option<Self> {
        let number = u32::try_from(slot).ok()?;
        (number != u32::MAX).then_some(Self(number))
    }

    pub(super) const fn slot(self) -> usize {
        self.0 as usize
    }

    pub(super) const fn number(self) -> u32 {
        self.0
    }

    pub(super) const fn from_number(number: u32) -> Self {
        Self(number)
    }
}

/// Why a client key's record can't be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    Type,
    Tier,
    UsePool,
    Active,
    ExpiresAt,
    AccountName,
}

impl Flaw {
    /// What would be accepted.
    pub(crate) const fn text(self) -> &'static str {
        match self {
            Self::Type => "the key's record must be a hash",
            Self::Tier => "tier in the key's record must be medium, high or supreme",
            Self::UsePool => "use_pool in the key's record must be true or false",
            Self::Active => "active in the key's record must be true or false",
            Self::ExpiresAt => "expires_at in the key's record must be unix milliseconds",
            Self::AccountName => {
                "account_name in the key's record must name the account it is bound to"
            }
        }
    }
}

/// What a key is entitled to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// There is no record of the key.
    Unregistered,
    /// The record can't be used.
    Malformed(Flaw),
    /// `active` is false.
    Revoked,
    /// A slot of any account of its tier.
    Pooled,
    /// The account in `Key::bound`.
    Bound,
}

/// The absence of an instant in [`Key`]; half the size of an `Option`.
pub(super) const NEVER: i64 = i64::MIN;

/// Two cache lines, which is what a look at a key costs.
#[derive(Debug)]
pub(super) struct Key {
    pub(super) name: Text<76>,
    /// Unix ms from which on the key is refused; `i64::MAX`: it does not end.
    pub(super) expires_at: i64,
    /// When the running period began, or `NEVER`.
    pub(super) last: i64,
    /// When the running period ends, or `NEVER`.
    pub(super) next: i64,
    pub(super) holds: Option<AccountId>,
    pub(super) previous: Option<AccountId>,
    pub(super) bound: Option<AccountId>,
    pub(super) standing: Standing,
    pub(super) tier: Tier,
    /// Its lease names something that can't be an account.
    pub(super) holds_garbage: bool,
    /// Whether it is in the pool's backlog.
    pub(super) queued: bool,
}

const _: () = assert!(size_of::<Option<Key>>() == 128);

impl Key {
    pub(super) fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            expires_at: i64::MAX,
            last: NEVER,
            next: NEVER,
            holds: None,
            previous: None,
            bound: None,
            standing: Standing::Unregistered,
            tier: Tier::Medium,
            holds_garbage: false,
            queued: false,
        }
    }

    /// The instant at which its slot falls due, should it hold one. A lease
    /// without a readable end is due at once.
    pub(super) fn due(&self) -> i64 {
        self.next.min(self.expires_at).max(0)
    }

    /// Whether nothing is known of the key that would be lost with it.
    pub(super) fn is_idle(&self) -> bool {
        self.standing == Standing::Unregistered
            && self.holds.is_none()
            && self.previous.is_none()
            && self.last == NEVER
            && self.next == NEVER
            && !self.holds_garbage
    }
}

/// The fields of a `client_keys:` hash, as stored.
#[derive(Debug, Default)]
pub(crate) struct KeyFields<'a> {
    pub(crate) tier: Option<&'a [u8]>,
    pub(crate) use_pool: Option<&'a [u8]>,
    pub(crate) account_name: Option<&'a [u8]>,
    pub(crate) expires_at: Option<&'a [u8]>,
    pub(crate) active: Option<&'a [u8]>,
}

/// A client key's record, as far as the rules need it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum KeyRecord<'a> {
    Good {
        tier: Tier,
        /// The account that the key is bound to; none: it uses the pool.
        bound: Option<&'a str>,
        /// Unix ms; none: the key does not end.
        expires_at: Option<i64>,
        active: bool,
    },
    /// The record can't be used.
    Malformed(Flaw),
}

impl<'a> KeyRecord<'a> {
    /// Reads a record. Fields that are missing have the meaning that a person
    /// who writes a hash by hand would expect: active, not pooled, without end.
    pub(crate) fn parse(fields: &KeyFields<'a>) -> Self {
        let Some(tier) = fields.tier.and_then(Tier::parse) else {
            return Self::Malformed(Flaw::Tier);
        };
        let Some(use_pool) = fields.use_pool.map_or(Some(false), truth) else {
            return Self::Malformed(Flaw::UsePool);
        };
        let Some(active) = fields.active.map_or(Some(true), truth) else {
            return Self::Malformed(Flaw::Active);
        };
        let expires_at = match fields.expires_at {
            None | Some(b"") => None,
            Some(text) => match instant(text) {
                Some(end) => Some(end),
                None => return Self::Malformed(Flaw::ExpiresAt),
            },
        };
        let bound = if use_pool && tier.is_pooled() {
            None
        } else {
            match fields.account_name.and_then(names::account_name) {
                Some(name) => Some(name),
                None => return Self::Malformed(Flaw::AccountName),
            }
        };
        Self::Good {
            tier,
            bound,
            expires_at,
            active,
        }
    }
}

/// The fields of a `key_rotation:` hash, as stored.
#[derive(Debug, Default)]
pub(crate) struct RotationFields<'a> {
    pub(crate) account: Option<&'a [u8]>,
    pub(crate) next_rotation: Option<&'a [u8]>,
    pub(crate) last_rotation: Option<&'a [u8]>,
    pub(crate) previous_account: Option<&'a [u8]>,
}

/// A key's lease, as far as the rules need it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rotation<'a> {
    pub(crate) account: Option<&'a str>,
    /// There is an `account`, but it can't be one.
    pub(crate) account_is_garbage: bool,
    pub(crate) previous: Option<&'a str>,
    pub(crate) last: Option<i64>,
    pub(crate) next: Option<i64>,
}

impl<'a> Rotation<'a> {
    /// Reads a lease. What can't be read counts as missing, so that a lease
    /// spoilt by hand is due at once and mends itself.
    pub(crate) fn parse(fields: &RotationFields<'a>) -> Self {
        let account = fields.account.and_then(names::account_name);
        Self {
            account,
            account_is_garbage: fields.account.is_some() && account.is_none(),
            previous: fields.previous_account.and_then(names::account_name),
            last: fields.last_rotation.and_then(instant),
            next: fields.next_rotation.and_then(instant),
        }
    }
}

fn truth(text: &[u8]) -> Option<bool> {
    match text {
        b"true" | b"1" => Some(true),
        b"false" | b"0" => Some(false),
        _ => None,
    }
}

/// Unix ms in decimal. Negative instants are none.
pub(crate) fn instant(text: &[u8]) -> Option<i64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0_i64, |number, byte| {
        let digit = byte.is_ascii_digit().then(|| i64::from(byte - b'0'))?;
        number.checked_mul(10)?.checked_add(digit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields<'a>(tier: &'a str, use_pool: &'a str, account: Option<&'a str>) -> KeyFields<'a> {
        KeyFields {
            tier: Some(tier.as_bytes()),
            use_pool: Some(use_pool.as_bytes()),
            account_name: account.map(str::as_bytes),
            ..KeyFields::default()
        }
    }

    #[test]
    fn records() {
        let good = |tier, bound| KeyRecord::Good {
            tier,
            bound,
            expires_at: None,
            active: true,
        };
        let cases = [
            (fields("medium", "true", None), good(Tier::Medium, None)),
            (
                fields("medium", "false", Some("a")),
                good(Tier::Medium, Some("a")),
            ),
            // High and supreme keys are bound whatever use_pool says.
            (
                fields("high", "true", Some("a")),
                good(Tier::High, Some("a")),
            ),
            (
                fields("supreme", "false", Some("a")),
                good(Tier::Supreme, Some("a")),
            ),
        ];
        for (fields, expected) in cases {
            assert_eq!(KeyRecord::parse(&fields), expected);
        }
        let bad = [
            fields("gold", "true", None),
            fields("medium", "maybe", None),
            fields("medium", "false", None),
            fields("medium", "false", Some("not a name")),
            fields("high", "true", None),
            KeyFields::default(),
        ];
        for fields in bad {
            assert!(matches!(KeyRecord::parse(&fields), KeyRecord::Malformed(_)));
        }
    }

    #[test]
    fn instants() {
        let good = [
            ("0", 0),
            ("007", 7),
            ("1755266400000", 1_755_266_400_000),
            ("9223372036854775807", i64::MAX),
            ("00000000000000000000000001", 1),
        ];
        for (text, expected) in good {
            assert_eq!(instant(text.as_bytes()), Some(expected), "{text}");
        }
        let bad = [
            "",
            "-1",
            "+1",
            " 1",
            "1 ",
            "1.5",
            "1e3",
            "0x1",
            "9223372036854775808",
            "99999999999999999999",
            "\u{661}",
        ];
        for text in bad {
            assert_eq!(instant(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn record_times() {
        let with = |text: &'static str| {
            let mut fields = fields("medium", "true", None);
            fields.expires_at = Some(text.as_bytes());
            KeyRecord::parse(&fields)
        };
        assert!(matches!(
            with("1000"),
            KeyRecord::Good {
                expires_at: Some(1000),
                ..
            }
        ));
        assert!(matches!(
            with(""),
            KeyRecord::Good {
                expires_at: None,
                ..
            }
        ));
        for text in ["-1", "+1", "soon", "1e3", "99999999999999999999"] {
            assert!(matches!(with(text), KeyRecord::Malformed(_)), "{text}");
        }
    }

    #[test]
    fn rotations() {
        let spoilt = Rotation::parse(&RotationFields {
            account: Some(b"not a name"),
            next_rotation: Some(b"soon"),
            last_rotation: Some(b"-5"),
            previous_account: Some(b"\xff"),
        });
        assert!(spoilt.account_is_garbage);
        assert_eq!(
            (spoilt.account, spoilt.previous, spoilt.last, spoilt.next),
            (None, None, None, None)
        );
    }
}
