//! One account as the pool sees it.

use super::text::Text;
use super::{KeyId, Tier};
use crate::accounts::Credential;
use smallvec::SmallVec;
use std::num::NonZeroU32;

/// A number for an account of the view; good until the account is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct AccountId(NonZeroU32);

impl AccountId {
    /// After every other.
    pub(super) const LAST: Self = Self(NonZeroU32::MAX);

    pub(super) fn new(slot: usize) -> Option<Self> {
        u32::try_from(slot).ok().and_then(Self::from_number)
    }

    pub(super) fn from_number(number: u32) -> Option<Self> {
        number.checked_add(1).and_then(NonZeroU32::new).map(Self)
    }

    pub(super) fn slot(self) -> usize {
        self.0.get() as usize - 1
    }

    pub(super) fn number(self) -> u32 {
        self.0.get() - 1
    }

    /// The number that follows this one, as a cursor over accounts.
    pub(super) fn after(self) -> u64 {
        u64::from(self.0.get())
    }
}

/// What this node's account folder says of an account.
#[derive(Clone, Debug)]
pub(crate) enum File {
    /// Nothing yet: the name is known from the keyspace alone. Its leases go
    /// on, but it isn't lent anew.
    Unknown,
    /// The file is there and good.
    Valid(Box<Credential>),
    /// The file is there and can't be used, for this reason.
    Invalid(&'static str),
    /// There is no such file: the account isn't in the pool.
    Absent,
}

/// What the keyspace says of an account's slots in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stored {
    Absent,
    Count(u64),
    /// A value that isn't a count.
    Garbage,
}

/// Why an account is or isn't lent at an instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    Lendable,
    Cooling,
    Expired,
    Invalid,
    Unknown,
    Absent,
}

impl Class {
    /// Whether the account counts as one of the pool's.
    pub(crate) const fn in_pool(self) -> bool {
        matches!(self, Self::Lendable | Self::Cooling | Self::Expired)
    }

    /// Whether a lease on such an account goes on.
    pub(crate) const fn keeps_leases(self) -> bool {
        matches!(self, Self::Lendable | Self::Unknown)
    }
}

/// Two cache lines, the first of which is all that a current lease looks at: with
/// many accounts, memory that isn't at hand is most of what a look costs. No
/// alignment is asked for: the server's allocator may not know of any beyond its own.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Account {
    pub(super) name: Text<24>,
    /// Unix ms from which on a good file's token is worth nothing; `i64::MAX`:
    /// it has no end. `i64::MIN`: there is no good file.
    token_end: i64,
    /// Unix ms from which on the account is lent again; 0: it is not cooling.
    pub(super) cools_until: i64,
    pub(super) stored: Stored,
    pub(super) file: File,
    /// Why it is cooling, on record as long as the cooldown, past or not. Apart,
    /// as few are.
    pub(super) reason: Option<Box<Text<24>>>,
    /// The keys that hold a slot, in no order.
    pub(super) holders: SmallVec<[KeyId; 4]>,
    /// Keys that name the account without holding a slot of it: as the one
    /// they are bound to or had before. The account stays while there are any.
    pub(super) refs: u32,
    pub(super) tier: Tier,
    /// The class at the pool's horizon, as the indexes have it.
    pub(super) class: Class,
    /// Whether it stands among the lendable accounts with a free slot, in the
    /// bucket of as many slots in use as it has holders.
    pub(super) in_bucket: bool,
    /// Whether it is in the pool's backlog.
    pub(super) queued: bool,
}

const _: () = assert!(size_of::<Option<Account>>() == 128);

impl Account {
    pub(super) fn new(tier: Tier, name: &str, file: File) -> Self {
        let mut account = Self {
            name: name.into(),
            token_end: i64::MIN,
            cools_until: 0,
            stored: Stored::Absent,
            file: File::Unknown,
            reason: None,
            holders: SmallVec::new(),
            refs: 0,
            tier,
            class: Class::Absent,
            in_bucket: false,
            queued: false,
        };
        account.set_file(file);
        account
    }

    pub(super) fn set_file(&mut self, file: File) {
        self.token_end = match &file {
            File::Valid(credential) => credential.expires_at.unwrap_or(i64::MAX),
            File::Unknown | File::Invalid(_) | File::Absent => i64::MIN,
        };
        self.file = file;
    }

    /// Slots in use.
    pub(super) fn used(&self) -> u64 {
        self.holders.len() as u64
    }

    /// Why it is cooling, as far as that is on record.
    pub(super) fn reason(&self) -> Option<&str> {
        self.reason.as_deref().map(|reason| &**reason)
    }

    /// Whether there is an end of a cooldown on record, past or not.
    pub(super) fn is_cooled(&self) -> bool {
        self.cools_until > 0
    }

    /// Whether there is anything of a cooldown on record.
    pub(super) fn has_cooldown(&self) -> bool {
        self.cools_until != 0 || self.reason.is_some()
    }

    pub(super) fn class_at(&self, now: i64) -> Class {
        if now < self.token_end {
            return if self.is_cooled() && self.cools_until > now {
                Class::Cooling
            } else {
                Class::Lendable
            };
        }
        match &self.file {
            File::Unknown => Class::Unknown,
            File::Absent => Class::Absent,
            File::Invalid(_) => Class::Invalid,
            File::Valid(_) => Class::Expired,
        }
    }

    /// Whether the keyspace says anything of the account itself.
    pub(super) fn is_recorded(&self) -> bool {
        !self.holders.is_empty() || self.stored != Stored::Absent || self.has_cooldown()
    }

    /// Whether nothing is known of the account that would be lost with it.
    pub(super) fn is_idle(&self) -> bool {
        matches!(self.file, File::Unknown | File::Absent) && self.refs == 0 && !self.is_recorded()
    }
}
