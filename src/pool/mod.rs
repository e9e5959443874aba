//! The pool: which account a client key gets, and when.
//!
//! Pure rules over a view of the keyspace. Nothing here knows Redis, reads a
//! clock or does I/O: time is an argument (unix milliseconds), and what must be
//! written comes back as [`Effect`]s. The view changes in one way alone: by
//! being told what the keyspace ([`Pool::observe_key`], [`Pool::observe_rotation`],
//! [`Pool::observe_given_up`], [`Pool::observe_previous`], [`Pool::observe_slots`],
//! [`Pool::observe_cooldown`], [`Pool::observe_reason`]) and the account files ([`Pool::set_file`]) now say.
//!
//! - `view`: bringing observations in
//! - `directory`, `slab`, `pages`: things by name, by number and in a list
//! - `index`: the orders that keep every decision cheap
//! - `decide`: what commands do
//! - `choice`: how ties are broken
//! - `settle`: putting right what the keyspace and the view disagree about
//! - `status`: what an operator is shown

mod account;
mod choice;
mod decide;
mod directory;
mod index;
mod key;
pub(crate) mod names;
mod pages;
mod settle;
mod slab;
mod status;
mod text;
mod tier;
mod view;

#[cfg(any(test, fuzzing))]
mod audit;
#[cfg(test)]
mod model;
#[cfg(test)]
mod states;
#[cfg(test)]
mod tests;

pub(crate) use account::{AccountId, File, Stored};
pub(crate) use choice::Choice;
pub(crate) use decide::{Decision, Refusal, State};
pub(crate) use index::Tally;
pub(crate) use key::{Flaw, KeyFields, KeyId, KeyRecord, Rotation, RotationFields};
pub(crate) use status::{AccountStatus, LeaseCursor, LeaseStatus, Summary};
pub(crate) use tier::Tier;
pub(crate) use view::{Difference, Walk};

use account::Account;
use directory::Directory;
use hashbrown::DefaultHashBuilder;
use index::TierIndex;
use key::Key;
use pages::{Pages, Table};
use slab::Slab;
use std::collections::BTreeSet;

/// Slots of each account unless configured otherwise.
pub(crate) const DEFAULT_CAPACITY: u32 = 2;
/// The most slots an account may be given.
pub(crate) const MAX_CAPACITY: u32 = 1024;
/// 24 hours: how long a lease lasts unless configured otherwise, in ms.
pub(crate) const DEFAULT_ROTATION_MS: i64 = 86_400_000;
/// The longest lease that can be configured: 365 days, in ms.
pub(crate) const MAX_ROTATION_MS: i64 = 31_536_000_000;
/// The latest instant that commands accept: the end of the year 9999, in unix
/// ms. Sums of an instant and a duration stay far from overflow below it.
pub(crate) const MAX_INSTANT: i64 = 253_402_300_799_999;
/// Overdue leases that one command frees. Each costs a few replicated writes,
/// so an unbounded number would stall the server after a quiet night; the
/// longest overdue go first, and the rest with the commands that follow.
pub(crate) const SWEEP_LIMIT: usize = 64;

/// A write that the keyspace needs. The store carries it out; the view learns
/// of it from the keyspace, like of any other change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// The key now holds a slot of the account, from `last` until `next`.
    Lend {
        key: Box<str>,
        account: Box<str>,
        previous: Option<Box<str>>,
        last: i64,
        next: i64,
    },
    /// The key gives up its slot; its running period stays on record, so that
    /// its next lease is known to be a rotation or a failover.
    Free {
        key: Box<str>,
        account: Option<Box<str>>,
    },
    /// The key gives up its slot and starts afresh with its next lease.
    Release {
        key: Box<str>,
        account: Option<Box<str>>,
    },
    /// The key is gone: nothing of its lease remains.
    Forget { key: Box<str> },
    /// The account's slots in use.
    Slots {
        tier: Tier,
        account: Box<str>,
        used: u64,
    },
    /// The account's file can't be used: its counter goes. A cooldown stays, as
    /// the file may be put right before that is over.
    Uncount { tier: Tier, account: Box<str> },
    /// The account has left the pool: its counter and its cooldown go.
    Leave { tier: Tier, account: Box<str> },
    /// The account isn't lent until the instant.
    Cool {
        tier: Tier,
        account: Box<str>,
        until: i64,
        reason: Option<Box<str>>,
    },
    /// The account's cooldown ends now.
    Warm { tier: Tier, account: Box<str> },
    /// The key may no longer acquire.
    Deactivate { key: Box<str> },
}

/// The view of one keyspace, and the rules over it.
#[derive(Debug)]
pub(crate) struct Pool {
    capacity: u32,
    rotation_ms: i64,
    keys: Slab<Key>,
    key_names: Directory,
    accounts: Slab<Account>,
    account_names: Directory,
    hasher: DefaultHashBuilder,
    /// The accounts of the latest decision, which the keyspace will name next.
    recent: [Option<AccountId>; 2],
    /// By account: where it stands in its bucket. Apart from the accounts, as a
    /// place is often written without anything else of its account being read.
    places: Table,
    /// By key: where it sits among its account's holders; apart likewise.
    seats: Table,
    /// Held slots by the instant at which they fall due.
    due: BTreeSet<(i64, KeyId)>,
    tiers: [TierIndex; 3],
    /// The instant for which accounts are sorted into lendable and not.
    horizon: i64,
    /// By tier: a name without a file is a name without an account, because
    /// this node's folder is known to be the whole truth.
    trusts_folder: [bool; 3],
    /// Whether leases are being taken away only to see what would follow.
    supposing: bool,
    /// What may need putting right, each item once.
    backlog: Pages<Item>,
    /// The same for the command under way, which must leave nothing behind.
    touched: Option<Vec<Item>>,
}

/// Something that may need putting right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Item {
    Account(AccountId),
    Key(KeyId),
}

impl Pool {
    /// An empty pool whose accounts have `capacity` slots and whose leases last
    /// `rotation_ms` milliseconds.
    pub(crate) fn new(capacity: u32, rotation_ms: i64) -> Self {
        Self {
            capacity,
            rotation_ms,
            keys: Slab::new(),
            key_names: Directory::new(),
            accounts: Slab::new(),
            account_names: Directory::new(),
            hasher: DefaultHashBuilder::default(),
            recent: [None; 2],
            places: Table::new(),
            seats: Table::new(),
            due: BTreeSet::new(),
            tiers: std::array::from_fn(|_| TierIndex::new(capacity)),
            horizon: i64::MIN,
            trusts_folder: [false; 3],
            supposing: false,
            backlog: Pages::new(),
            touched: None,
        }
    }

    /// Leases granted from now on last `rotation_ms` milliseconds.
    pub(crate) fn set_rotation_ms(&mut self, rotation_ms: i64) {
        self.rotation_ms = rotation_ms;
    }

    /// Every account has `capacity` slots from now on. Holders beyond it are
    /// given up when the pool is next settled.
    pub(crate) fn set_capacity(&mut self, capacity: u32) {
        let ids: Vec<AccountId> = self.account_ids().collect();
        for &id in &ids {
            self.detach(id);
        }
        self.capacity = capacity;
        for tier in &mut self.tiers {
            tier.resize(capacity);
        }
        for id in ids {
            self.attach(id);
        }
    }

    fn tier(&self, tier: Tier) -> &TierIndex {
        let [medium, high, supreme] = &self.tiers;
        match tier {
            Tier::Medium => medium,
            Tier::High => high,
            Tier::Supreme => supreme,
        }
    }

    fn key(&self, id: KeyId) -> Option<&Key> {
        self.keys.get(id.slot())
    }

    fn account(&self, id: AccountId) -> Option<&Account> {
        self.accounts.get(id.slot())
    }

    fn account_ids(&self) -> impl Iterator<Item = AccountId> + '_ {
        self.accounts
            .iter()
            .filter_map(|(slot, _)| AccountId::new(slot))
    }

    /// The client keys that hold a slot of an account, in no order.
    pub(crate) fn holders(&self, id: AccountId) -> impl Iterator<Item = &str> {
        let account = self.account(id).into_iter();
        let holders = account.flat_map(|account| &account.holders);
        holders.filter_map(|&id| self.key(id).map(|key| &*key.name))
    }

    /// The name of an account that the pool knows, as its bytes.
    pub(crate) fn account_bytes(&self, id: AccountId) -> Option<&[u8]> {
        self.account(id).map(|account| account.name.bytes())
    }

    /// The name of an account that the pool knows.
    pub(crate) fn account_name(&self, id: AccountId) -> Option<&str> {
        self.account(id).map(|account| &*account.name)
    }
}
