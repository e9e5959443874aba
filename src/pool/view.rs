//! Bringing what the keyspace and the account files say into the view. Every
//! way in is idempotent: being told twice is being told once.

use super::account::Account;
use super::key::{Key, NEVER, Standing};
use super::{AccountId, File, Item, KeyId, KeyRecord, Pool, Rotation, Stored, Tier};
use std::hash::{BuildHasher, Hasher};

/// How far a walk over a view has come.
#[derive(Debug, Default)]
pub(crate) struct Walk {
    key: usize,
    account: usize,
}

impl Walk {
    /// Whether nothing is left of the view.
    pub(crate) fn is_over(&self, view: &Pool) -> bool {
        self.key >= view.keys.end() && self.account >= view.accounts.end()
    }
}

/// What counts as a difference of a view from another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Difference {
    /// That the other says something else, or nothing.
    Any,
    /// That the other has nothing at all of a key or an account.
    Absence,
}

/// What a key's lease consists of, as [`Key`] has it.
struct Lease {
    holds: Option<AccountId>,
    holds_garbage: bool,
    previous: Option<AccountId>,
    last: i64,
    next: i64,
}

/// What a view says of a key, but for numbers that another view has otherwise.
type KeyFacts<'a> = ((Standing, Tier, i64, i64, i64, bool), [Option<&'a str>; 3]);
/// The same of an account.
type AccountFacts<'a> = (Stored, i64, Option<&'a str>, u32, usize);

impl Pool {
    /// A client key's record is now this, or gone.
    pub(crate) fn observe_key(&mut self, name: &str, record: Option<KeyRecord<'_>>) {
        if record.is_none() && self.find_key(name.as_bytes()).is_none() {
            return;
        }
        let Some(id) = self.intern_key(name) else {
            return;
        };
        let (standing, tier, bound, expires_at) = match record {
            None => (Standing::Unregistered, Tier::Medium, None, i64::MAX),
            Some(KeyRecord::Malformed(flaw)) => {
                (Standing::Malformed(flaw), Tier::Medium, None, i64::MAX)
            }
            Some(KeyRecord::Good {
                tier,
                bound,
                expires_at,
                active,
            }) => {
                let standing = match (active, bound) {
                    (false, _) => Standing::Revoked,
                    (true, Some(_)) => Standing::Bound,
                    (true, None) => Standing::Pooled,
                };
                (standing, tier, bound, expires_at.unwrap_or(i64::MAX))
            }
        };
        let bound = bound.and_then(|account| self.intern_account(tier, account));
        self.add_ref(bound);
        let mut former = None;
        if let Some(key) = self.keys.get_mut(id.slot()) {
            former = std::mem::replace(&mut key.bound, bound);
            let before = key.due();
            key.standing = standing;
            key.tier = tier;
            key.expires_at = expires_at;
            if key.holds.is_some() && key.due() != before {
                self.due.remove(&(before, id));
                self.due.insert((key.due(), id));
            }
        }
        self.drop_ref(former);
        self.finish_key(id);
    }

    /// A client key's lease is now this, or gone.
    pub(crate) fn observe_rotation(&mut self, name: &str, rotation: Option<Rotation<'_>>) {
        if rotation.is_none() && self.find_key(name.as_bytes()).is_none() {
            return;
        }
        let Some(id) = self.intern_key(name) else {
            return;
        };
        let rotation = rotation.unwrap_or_default();
        // Leases are of the pooled tier; a name of another tier's account is
        // a name without an account there.
        let holds = rotation
            .account
            .and_then(|name| self.intern_account(Tier::Medium, name));
        let previous = rotation
            .previous
            .and_then(|name| self.intern_account(Tier::Medium, name));
        let lease = Lease {
            holds,
            holds_garbage: rotation.account_is_garbage,
            previous,
            last: rotation.last.unwrap_or(NEVER),
            next: rotation.next.unwrap_or(NEVER),
        };
        self.set_lease(id, lease);
    }

    /// A client key's lease has lost its account and, if it is `over`, its end as
    /// well. What the view doesn't know is not changed: it is still to be told.
    pub(crate) fn observe_given_up(&mut self, name: &str, over: bool) {
        let Some(id) = self.find_key(name.as_bytes()) else {
            return;
        };
        if let Some(key) = self.key(id) {
            let lease = Lease {
                holds: None,
                holds_garbage: false,
                previous: key.previous,
                last: key.last,
                next: if over { NEVER } else { key.next },
            };
            self.set_lease(id, lease);
        }
    }

    /// A client key's lease now names this account as its previous one.
    pub(crate) fn observe_previous(&mut self, name: &str, account: &str) {
        let Some(id) = self.intern_key(name) else {
            return;
        };
        let previous = self.intern_account(Tier::Medium, account);
        self.add_ref(previous);
        let key = self.keys.get_mut(id.slot());
        let former = key.and_then(|key| std::mem::replace(&mut key.previous, previous));
        self.drop_ref(former);
        self.finish_key(id);
    }

    fn set_lease(&mut self, id: KeyId, lease: Lease) {
        let Lease {
            holds, previous, ..
        } = lease;
        // The new account must outlive the removal of the old lease.
        self.add_ref(holds);
        self.add_ref(previous);
        let same = self.key(id).is_some_and(|key| key.holds == holds);
        let left = if same { None } else { self.unseat(id) };
        let mut former = None;
        if let Some(key) = self.keys.get_mut(id.slot()) {
            if same && holds.is_some() {
                self.due.remove(&(key.due(), id));
            }
            key.last = lease.last;
            key.next = lease.next;
            key.holds_garbage = lease.holds_garbage;
            former = std::mem::replace(&mut key.previous, previous);
            if same && holds.is_some() {
                self.due.insert((key.due(), id));
            }
        }
        if let (false, Some(account)) = (same, holds) {
            self.seat(id, account);
        }
        self.drop_ref(former);
        self.drop_ref(holds);
        if let Some(account) = left {
            self.drop_idle_account(account);
        }
        self.finish_key(id);
    }

    /// An account's slots in use are now recorded as this.
    pub(crate) fn observe_slots(&mut self, tier: Tier, name: &str, stored: Stored) {
        if stored == Stored::Absent && self.find_account(tier, name).is_none() {
            return;
        }
        let Some(id) = self.intern_account(tier, name) else {
            return;
        };
        // No end of anything changes with it.
        self.reorder(id, |account| account.stored = stored);
        self.drop_idle_account(id);
    }

    /// An account is now recorded as cooling down until `until` (unix ms);
    /// 0: it is not.
    pub(crate) fn observe_cooldown(&mut self, tier: Tier, name: &str, until: i64) {
        if until == 0 && self.find_account(tier, name).is_none() {
            return;
        }
        self.change_account(tier, name, |account| account.cools_until = until);
    }

    /// The reason of an account's cooldown is now recorded as this.
    pub(crate) fn observe_reason(&mut self, tier: Tier, name: &str, reason: Option<&str>) {
        if reason.is_none() && self.find_account(tier, name).is_none() {
            return;
        }
        let reason = reason.map(|reason| Box::new(reason.into()));
        self.change_account(tier, name, |account| account.reason = reason);
    }

    /// This node's account folder now says this of an account.
    pub(crate) fn set_file(&mut self, tier: Tier, name: &str, file: File) {
        if matches!(file, File::Absent | File::Unknown) && self.find_account(tier, name).is_none() {
            return;
        }
        self.change_account(tier, name, |account| account.set_file(file));
    }

    /// Whether a tier's folder on this node is the whole truth: then a name
    /// without a file is no account, and its leases are given up. Otherwise
    /// such a name is left as the keyspace has it.
    pub(crate) fn set_trusts_folder(&mut self, tier: Tier, trusts: bool) {
        let Some(flag) = self.trusts_folder.get_mut(tier.index()) else {
            return;
        };
        if std::mem::replace(flag, trusts) == trusts || !trusts {
            return;
        }
        let unknown: Vec<AccountId> = self
            .accounts
            .iter()
            .filter(|(_, account)| account.tier == tier && matches!(account.file, File::Unknown))
            .filter_map(|(slot, _)| AccountId::new(slot))
            .collect();
        for id in unknown {
            self.change(id, |account| account.set_file(File::Absent));
        }
    }

    /// This node follows another now: it no longer knows which accounts there
    /// are, only which files it has.
    pub(crate) fn follow(&mut self) {
        self.trusts_folder = [false; 3];
        let absent: Vec<AccountId> = self
            .accounts
            .iter()
            .filter(|(_, account)| matches!(account.file, File::Absent))
            .filter_map(|(slot, _)| AccountId::new(slot))
            .collect();
        for id in absent {
            self.change(id, |account| account.set_file(File::Unknown));
        }
    }

    /// A pool with this one's settings that knows nothing.
    pub(crate) fn with_nothing(&self) -> Self {
        let mut fresh = Self::new(self.capacity, self.rotation_ms);
        fresh.horizon = self.horizon;
        fresh.trusts_folder = self.trusts_folder;
        fresh
    }

    /// Tells another pool of this one's account files: `limit` of them at most, from a
    /// place on. Answers the place after them, or none at the end.
    pub(crate) fn copy_files(&self, to: &mut Self, from: usize, limit: usize) -> Option<usize> {
        let end = self.accounts.end();
        let next = from.saturating_add(limit).min(end);
        for account in (from..next).filter_map(|slot| self.accounts.get(slot)) {
            to.set_file(account.tier, &account.name, account.file.clone());
        }
        (next < end).then_some(next)
    }

    /// A pool that knows this one's files and settings, and nothing of any
    /// keyspace: where a rebuild begins, and what is left after a flush.
    pub(crate) fn without_keyspace(&self) -> Self {
        let mut fresh = self.with_nothing();
        self.copy_files(&mut fresh, 0, usize::MAX);
        fresh
    }

    /// In how many keys and accounts this view differs from another one.
    pub(crate) fn differences(&self, other: &Self) -> u64 {
        self.compare(other, &mut Walk::default(), usize::MAX, Difference::Any)
            + other.compare(self, &mut Walk::default(), usize::MAX, Difference::Absence)
    }

    /// Goes on with a walk over this view's keys, then its accounts, for about
    /// `limit` of them. Answers of how many of these another view says something else.
    pub(crate) fn compare(
        &self,
        other: &Self,
        walk: &mut Walk,
        limit: usize,
        what: Difference,
    ) -> u64 {
        let (mut differences, mut left) = (0, limit);
        while left > 0 && !walk.is_over(self) {
            left -= 1;
            let differs = if walk.key < self.keys.end() {
                let key = self.keys.get(walk.key);
                walk.key += 1;
                key.is_some_and(|key| match what {
                    Difference::Any => {
                        self.facts_of_key(&key.name) != other.facts_of_key(&key.name)
                    }
                    Difference::Absence => other.find_key(key.name.bytes()).is_none(),
                })
            } else {
                let account = self.accounts.get(walk.account);
                walk.account += 1;
                account.is_some_and(|account| {
                    let (tier, name) = (account.tier, &*account.name);
                    match what {
                        Difference::Any => {
                            self.facts_of_account(tier, name) != other.facts_of_account(tier, name)
                        }
                        Difference::Absence => other.find_account(tier, name).is_none(),
                    }
                })
            };
            differences += u64::from(differs);
        }
        differences
    }

    fn facts_of_key(&self, name: &str) -> Option<KeyFacts<'_>> {
        let key = self.key(self.find_key(name.as_bytes())?)?;
        let account = |id: Option<AccountId>| id.and_then(|id| self.account_name(id));
        Some((
            (
                key.standing,
                key.tier,
                key.expires_at,
                key.last,
                key.next,
                key.holds_garbage,
            ),
            [
                account(key.holds),
                account(key.previous),
                account(key.bound),
            ],
        ))
    }

    fn facts_of_account(&self, tier: Tier, name: &str) -> Option<AccountFacts<'_>> {
        let account = self.account(self.find_account(tier, name)?)?;
        Some((
            account.stored,
            account.cools_until,
            account.reason(),
            account.refs,
            // Who they are is told of the keys.
            account.holders.len(),
        ))
    }

    pub(super) fn find_key(&self, name: &[u8]) -> Option<KeyId> {
        let bears = |number| {
            let key = self.key(KeyId::from_number(number));
            key.is_some_and(|key| key.name.is(name))
        };
        let found = self.key_names.find(self.key_hash(name), bears);
        found.map(KeyId::from_number)
    }

    fn key_hash(&self, name: &[u8]) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        hasher.write(name);
        hasher.finish()
    }

    fn account_hash(&self, tier: Tier, name: &str) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        hasher.write_usize(tier.index());
        hasher.write(name.as_bytes());
        hasher.finish()
    }

    fn intern_key(&mut self, name: &str) -> Option<KeyId> {
        if let Some(id) = self.find_key(name.as_bytes()) {
            return Some(id);
        }
        let id = KeyId::new(self.keys.next())?;
        self.keys.insert(Key::new(name));
        let hash = self.key_hash(name.as_bytes());
        self.key_names.insert(hash, id.number());
        Some(id)
    }

    /// The account of that name, if the pool knows it.
    pub(crate) fn find_account(&self, tier: Tier, name: &str) -> Option<AccountId> {
        let bears = |&id: &AccountId| {
            let account = self.account(id);
            account.is_some_and(|account| account.tier == tier && account.name.is(name.as_bytes()))
        };
        let recent = self.recent.iter().flatten().find(|id| bears(id));
        recent.copied().or_else(|| {
            let is = |number| AccountId::from_number(number).is_some_and(|id| bears(&id));
            let found = self.account_names.find(self.account_hash(tier, name), is);
            found.and_then(AccountId::from_number)
        })
    }

    fn intern_account(&mut self, tier: Tier, name: &str) -> Option<AccountId> {
        if let Some(id) = self.find_account(tier, name) {
            return Some(id);
        }
        let file = if self.trusts_folder.get(tier.index()) == Some(&true) {
            File::Absent
        } else {
            File::Unknown
        };
        let id = AccountId::new(self.accounts.next())?;
        self.accounts.insert(Account::new(tier, name, file));
        let hash = self.account_hash(tier, name);
        self.account_names.insert(hash, id.number());
        self.attach(id);
        Some(id)
    }

    fn change_account(&mut self, tier: Tier, name: &str, change: impl FnOnce(&mut Account)) {
        if let Some(id) = self.intern_account(tier, name) {
            self.change(id, change);
        }
    }

    fn change(&mut self, id: AccountId, change: impl FnOnce(&mut Account)) {
        self.index_ends(id, false);
        self.reorder(id, change);
        self.index_ends(id, true);
        self.drop_idle_account(id);
    }

    /// Changes an account, and its place in all orders but those of ends.
    fn reorder(&mut self, id: AccountId, change: impl FnOnce(&mut Account)) {
        self.detach(id);
        if let Some(account) = self.accounts.get_mut(id.slot()) {
            change(account);
        }
        self.attach(id);
    }

    fn add_ref(&mut self, id: Option<AccountId>) {
        if let Some(account) = id.and_then(|id| self.accounts.get_mut(id.slot())) {
            account.refs += 1;
        }
    }

    fn drop_ref(&mut self, id: Option<AccountId>) {
        let Some(id) = id else { return };
        if let Some(account) = self.accounts.get_mut(id.slot()) {
            account.refs = account.refs.saturating_sub(1);
        }
        self.drop_idle_account(id);
    }

    fn drop_idle_account(&mut self, id: AccountId) {
        if !self.account(id).is_some_and(Account::is_idle) {
            return;
        }
        self.detach(id);
        if let Some(account) = self.accounts.remove(id.slot()) {
            let hash = self.account_hash(account.tier, &account.name);
            self.account_names.remove(hash, id.number());
        }
    }

    /// After a key has changed: note what needs putting right, or drop the key
    /// when nothing is left of it.
    fn finish_key(&mut self, id: KeyId) {
        if self.key_is_off(id) {
            self.queue(Item::Key(id));
        }
        if !self.key(id).is_some_and(Key::is_idle) {
            return;
        }
        if let Some(key) = self.keys.remove(id.slot()) {
            let hash = self.key_hash(key.name.bytes());
            self.key_names.remove(hash, id.number());
            self.drop_ref(key.bound);
        }
    }
}
