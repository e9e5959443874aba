//! The orders over accounts and leases that keep every decision cheap:
//! lendable accounts by slots in use, accounts by the instant at which they
//! change class, held slots by the instant at which they fall due.

use super::account::Class;
use super::{Account, AccountId, File, Item, KeyId, MAX_CAPACITY, Pool, Tier};
use std::collections::BTreeSet;
use std::ops::{Bound, RangeBounds};

/// What one tier's accounts amount to, at the pool's horizon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Accounts in the pool: their files are there and good.
    pub(crate) accounts: u64,
    pub(crate) lendable: u64,
    pub(crate) cooling: u64,
    pub(crate) expired: u64,
    pub(crate) invalid: u64,
    /// Accounts that the keyspace names and this node has no file of.
    pub(crate) missing: u64,
    /// Slots in use, of the accounts in the pool.
    pub(crate) used: u64,
    /// Slots that could be lent.
    pub(crate) free: u64,
}

impl Tally {
    /// Adds or takes away one account's part.
    pub(super) fn count(&mut self, account: &Account, capacity: u32, add: bool) {
        let step = |field: &mut u64, amount: u64| {
            *field = if add {
                *field + amount
            } else {
                field.saturating_sub(amount)
            };
        };
        let used = account.used();
        if account.class.in_pool() {
            step(&mut self.accounts, 1);
            step(&mut self.used, used);
        }
        match account.class {
            Class::Lendable => {
                step(&mut self.lendable, 1);
                step(&mut self.free, u64::from(capacity).saturating_sub(used));
            }
            Class::Cooling => step(&mut self.cooling, 1),
            Class::Expired => step(&mut self.expired, 1),
            Class::Invalid => step(&mut self.invalid, 1),
            Class::Unknown if account.is_recorded() => {
                step(&mut self.missing, 1);
            }
            Class::Unknown | Class::Absent => {}
        }
    }
}

/// The orders over one tier's accounts.
#[derive(Debug)]
pub(super) struct TierIndex {
    /// Lendable accounts with a free slot, by slots in use.
    pub(super) buckets: Vec<Vec<AccountId>>,
    /// A bit for each bucket that isn't empty: the first one is found by looking
    /// at a few words, however full the accounts are.
    occupied: [u64; MAX_CAPACITY as usize / 64],
    pub(super) tally: Tally,
    /// Ends of cooldowns of accounts with a good file.
    pub(super) cooldowns: BTreeSet<(i64, AccountId)>,
    /// Ends of tokens.
    pub(super) expiries: BTreeSet<(i64, AccountId)>,
    /// Accounts that are cooling or whose token has expired, and that keys
    /// still hold slots of.
    pub(super) stale: BTreeSet<AccountId>,
}

impl TierIndex {
    pub(super) fn new(capacity: u32) -> Self {
        Self {
            buckets: vec![Vec::new(); capacity as usize],
            occupied: [0; MAX_CAPACITY as usize / 64],
            tally: Tally::default(),
            cooldowns: BTreeSet::new(),
            expiries: BTreeSet::new(),
            stale: BTreeSet::new(),
        }
    }

    pub(super) fn resize(&mut self, capacity: u32) {
        self.buckets = vec![Vec::new(); capacity as usize];
        self.occupied = [0; MAX_CAPACITY as usize / 64];
    }

    /// The accounts to choose from: those with the fewest slots in use.
    pub(super) fn least_used(&self) -> Option<&[AccountId]> {
        let (word, bits) = self
            .occupied
            .iter()
            .enumerate()
            .find(|(_, bits)| **bits != 0)?;
        let bucket = self
            .buckets
            .get(word * 64 + bits.trailing_zeros() as usize)?;
        Some(bucket.as_slice())
    }

    /// Notes whether a bucket has accounts in it now.
    fn mark(&mut self, bucket: usize) {
        let empty = self.buckets.get(bucket).is_none_or(Vec::is_empty);
        if let Some(bits) = self.occupied.get_mut(bucket / 64) {
            let bit = 1 << (bucket % 64);
            *bits = if empty { *bits & !bit } else { *bits | bit };
        }
    }

    /// The accounts whose class may differ between two instants.
    fn crossed(&self, from: i64, to: i64) -> Vec<AccountId> {
        let range = after_until(from.min(to), from.max(to));
        let ends = self.cooldowns.range(range);
        ends.chain(self.expiries.range(range))
            .map(|&(_, id)| id)
            .collect()
    }
}

/// All that ends after the one instant and until the other.
fn after_until(from: i64, to: i64) -> impl RangeBounds<(i64, AccountId)> + Copy {
    let until = (to.max(from), AccountId::LAST);
    (
        Bound::Excluded((from, AccountId::LAST)),
        Bound::Included(until),
    )
}

impl Pool {
    /// The accounts whose tokens end after the one instant and until the other.
    pub(crate) fn ended(&self, from: i64, to: i64) -> impl Iterator<Item = AccountId> {
        let range = after_until(from, to);
        let ends = self
            .tiers
            .iter()
            .flat_map(move |tier| tier.expiries.range(range));
        ends.map(|&(_, id)| id)
    }

    /// Sorts accounts into lendable and not as of `now`. Costs as much as there
    /// are accounts whose class changes between the last such instant and this.
    pub(super) fn advance(&mut self, now: i64) {
        if now == self.horizon {
            return;
        }
        let from = std::mem::replace(&mut self.horizon, now);
        for tier in Tier::ALL {
            for id in self.tier(tier).crossed(from, now) {
                self.detach(id);
                self.attach(id);
            }
        }
    }

    /// Takes an account out of its tier's orders before it changes.
    pub(super) fn detach(&mut self, id: AccountId) {
        let capacity = self.capacity;
        let Some(account) = self.accounts.get_mut(id.slot()) else {
            return;
        };
        let Some(index) = self.tiers.get_mut(account.tier.index()) else {
            return;
        };
        index.tally.count(account, capacity, false);
        if !index.stale.is_empty() {
            index.stale.remove(&id);
        }
        if !std::mem::take(&mut account.in_bucket) {
            return;
        }
        let Some(bucket) = index.buckets.get_mut(account.holders.len()) else {
            return;
        };
        let place = self.places.get(id.slot()) as usize;
        if place < bucket.len() {
            bucket.swap_remove(place);
        }
        if let Some(moved) = bucket.get(place) {
            self.places.set(moved.slot(), place);
        }
        index.mark(account.holders.len());
    }

    /// Puts an account into its tier's orders after it has changed, and notes
    /// whether something about it needs putting right.
    pub(super) fn attach(&mut self, id: AccountId) {
        let (capacity, horizon) = (self.capacity, self.horizon);
        let Some(account) = self.accounts.get_mut(id.slot()) else {
            return;
        };
        let Some(index) = self.tiers.get_mut(account.tier.index()) else {
            return;
        };
        account.class = account.class_at(horizon);
        index.tally.count(account, capacity, true);
        let stale = matches!(account.class, Class::Cooling | Class::Expired);
        if stale && !account.holders.is_empty() {
            index.stale.insert(id);
        }
        if account.class == Class::Lendable
            && let Some(bucket) = index.buckets.get_mut(account.holders.len())
        {
            self.places.set(id.slot(), bucket.len());
            bucket.push(id);
            account.in_bucket = true;
            index.mark(account.holders.len());
        }
        if !self.supposing && self.account_is_off(id) {
            self.queue(Item::Account(id));
        }
    }

    /// Keeps the ends of an account's cooldown and token in order; `present`
    /// says whether to enter or to remove them.
    pub(super) fn index_ends(&mut self, id: AccountId, present: bool) {
        let Self {
            accounts, tiers, ..
        } = self;
        let Some(account) = accounts.get(id.slot()) else {
            return;
        };
        let Some(index) = tiers.get_mut(account.tier.index()) else {
            return;
        };
        let File::Valid(credential) = &account.file else {
            return;
        };
        let keep = |ends: &mut BTreeSet<(i64, AccountId)>, end: i64| {
            if present {
                ends.insert((end, id));
            } else {
                ends.remove(&(end, id));
            }
        };
        if account.is_cooled() {
            keep(&mut index.cooldowns, account.cools_until);
        }
        if let Some(end) = credential.expires_at {
            keep(&mut index.expiries, end);
        }
    }

    /// Gives the key a slot of the account.
    pub(super) fn seat(&mut self, key: KeyId, account: AccountId) {
        self.detach(account);
        if let Some(account) = self.accounts.get_mut(account.slot()) {
            self.seats.set(key.slot(), account.holders.len());
            account.holders.push(key);
        }
        if let Some(entry) = self.keys.get_mut(key.slot()) {
            entry.holds = Some(account);
            self.due.insert((entry.due(), key));
        }
        self.attach(account);
    }

    /// Takes the key's slot away; answers whose it was.
    pub(super) fn unseat(&mut self, key: KeyId) -> Option<AccountId> {
        let entry = self.keys.get_mut(key.slot())?;
        let account = entry.holds.take()?;
        self.due.remove(&(entry.due(), key));
        self.detach(account);
        let seat = self.seats.get(key.slot()) as usize;
        if let Some(account) = self.accounts.get_mut(account.slot()) {
            if account.holders.get(seat) == Some(&key) {
                account.holders.swap_remove(seat);
            }
            if let Some(moved) = account.holders.get(seat) {
                self.seats.set(moved.slot(), seat);
            }
        }
        self.attach(account);
        Some(account)
    }
}
