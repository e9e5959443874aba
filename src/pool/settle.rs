//! Putting right what the keyspace and the rules disagree about: counters that
//! don't match the leases, leases of keys or accounts that are gone, more
//! leases than an account has slots.

use super::account::{Account, Class};
use super::key::{NEVER, Standing};
use super::{AccountId, Effect, Item, KeyId, Pool, Stored};
use hashbrown::HashSet;

/// Beyond this many entries more than there are things, the backlog holds
/// leftovers of things that are gone and is cleared of them.
const BACKLOG_SLACK: usize = 1024;

/// Things looked at for each one that may be put right: most of a backlog has
/// come right by itself, after a load say.
const LOOKS: usize = 8;

impl Pool {
    /// The writes that put right up to `limit` things, most recent first.
    /// Nothing left to look at: empty, and [`Pool::has_backlog`] is false.
    pub(crate) fn settle(&mut self, limit: usize) -> Vec<Effect> {
        let mut effects = Vec::new();
        for _ in 0..limit.saturating_mul(LOOKS) {
            if effects.len() >= limit {
                break;
            }
            let Some(item) = self.backlog.pop() else {
                break;
            };
            // Not queued any more: it stood there twice, or what had this number
            // is gone.
            if self.set_queued(item, false) {
                self.mend(item, &mut effects);
            }
        }
        effects
    }

    /// Whether anything may need putting right.
    pub(crate) fn has_backlog(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// The same, leaving aside what the command under way is about to settle.
    pub(crate) fn has_stray_backlog(&self) -> bool {
        self.touched.is_none() && self.has_backlog()
    }

    /// From here on, what a command's writes touch is noted apart, so that
    /// [`Pool::settle_touched`] finds it before older matters.
    pub(crate) fn begin(&mut self) {
        self.touched = Some(Vec::new());
    }

    /// The writes that put right what has been touched since [`Pool::begin`];
    /// empty when nothing is left. Call until then, applying in between.
    pub(crate) fn settle_touched(&mut self) -> Vec<Effect> {
        let mut effects = Vec::new();
        let items = self
            .touched
            .as_mut()
            .map(std::mem::take)
            .unwrap_or_default();
        let mut done = HashSet::with_capacity(items.len());
        for item in items {
            if done.insert(item) {
                self.mend(item, &mut effects);
            }
        }
        effects
    }

    /// The command is over.
    pub(crate) fn end(&mut self) {
        self.touched = None;
    }

    /// Looks at everything anew when next settled.
    pub(crate) fn suspect_all(&mut self) {
        let accounts: Vec<AccountId> = self.account_ids().collect();
        for id in accounts
            .into_iter()
            .filter(|&id| self.account_is_off(id))
            .collect::<Vec<_>>()
        {
            self.queue(Item::Account(id));
        }
        let keys: Vec<KeyId> = self
            .keys
            .iter()
            .filter_map(|(slot, _)| KeyId::new(slot))
            .collect();
        for id in keys {
            if self.key_is_off(id) {
                self.queue(Item::Key(id));
            }
        }
    }

    pub(super) fn queue(&mut self, item: Item) {
        if let Some(touched) = &mut self.touched {
            touched.push(item);
        }
        // Once more, if it is there already: the latest comes first.
        self.set_queued(item, true);
        if self.backlog.last() != Some(&item) {
            self.backlog.push(item);
        }
        if self.backlog.len() > 2 * (self.keys.len() + self.accounts.len()) + BACKLOG_SLACK {
            for item in self.backlog.take() {
                self.set_queued(item, false);
            }
            self.suspect_all();
        }
    }

    /// Marks an item as queued or not; answers whether it was.
    fn set_queued(&mut self, item: Item, queued: bool) -> bool {
        let flag = match item {
            Item::Account(id) => self
                .accounts
                .get_mut(id.slot())
                .map(|account| &mut account.queued),
            Item::Key(id) => self.keys.get_mut(id.slot()).map(|key| &mut key.queued),
        };
        flag.is_some_and(|flag| std::mem::replace(flag, queued))
    }

    fn mend(&self, item: Item, effects: &mut Vec<Effect>) {
        match item {
            Item::Account(id) if self.account_is_off(id) => self.mend_account(id, effects),
            Item::Key(id) if self.key_is_off(id) => self.mend_key(id, effects),
            Item::Account(_) | Item::Key(_) => {}
        }
    }

    /// What an account's counter should be.
    fn due_count(&self, id: AccountId) -> Option<Stored> {
        let account = self.account(id)?;
        Some(match account.class {
            Class::Absent | Class::Invalid => Stored::Absent,
            Class::Unknown if account.stored == Stored::Absent && account.holders.is_empty() => {
                Stored::Absent
            }
            Class::Unknown | Class::Lendable | Class::Cooling | Class::Expired => {
                Stored::Count(account.used())
            }
        })
    }

    /// How many holders an account must give up.
    fn excess(&self, account: &Account) -> usize {
        let kept = match account.class {
            Class::Absent | Class::Invalid => 0,
            _ => self.capacity as usize,
        };
        account.holders.len().saturating_sub(kept)
    }

    /// Whether an account's counter or leases need putting right.
    pub(super) fn account_is_off(&self, id: AccountId) -> bool {
        let Some(account) = self.account(id) else {
            return false;
        };
        let leftover = account.class == Class::Absent && account.has_cooldown();
        leftover || self.excess(account) > 0 || self.due_count(id) != Some(account.stored)
    }

    fn mend_account(&self, id: AccountId, effects: &mut Vec<Effect>) {
        let Some(account) = self.account(id) else {
            return;
        };
        let excess = self.excess(account);
        if excess > 0 {
            // Those who came last go first.
            let mut holders = account.holders.to_vec();
            // Names decide between equals: the keyspace knows nothing else.
            let order = |&id: &KeyId| self.key(id).map(|key| (key.last, &*key.name));
            holders.sort_by(|one, other| order(other).cmp(&order(one)));
            effects.extend(
                holders
                    .iter()
                    .take(excess)
                    .filter_map(|&key| self.free(key, id)),
            );
        }
        if excess > 0 && !matches!(account.class, Class::Absent | Class::Invalid) {
            // The counter follows once the leases are gone.
            return;
        }
        let (tier, name) = (account.tier, account.name.boxed());
        match self.due_count(id) {
            Some(Stored::Count(used)) if account.stored != Stored::Count(used) => {
                effects.push(Effect::Slots {
                    tier,
                    account: name,
                    used,
                });
            }
            Some(Stored::Absent) => effects.push(if account.class == Class::Invalid {
                Effect::Uncount {
                    tier,
                    account: name,
                }
            } else {
                Effect::Leave {
                    tier,
                    account: name,
                }
            }),
            _ => {}
        }
    }

    /// Whether a key has a lease that it may not have. Time alone makes no
    /// lease wrong here: what is overdue waits for a command that carries a now.
    pub(super) fn key_is_off(&self, id: KeyId) -> bool {
        let Some(key) = self.key(id) else {
            return false;
        };
        let leases = key.holds.is_some() || key.holds_garbage;
        match key.standing {
            Standing::Pooled => key.holds_garbage,
            Standing::Unregistered => {
                leases || key.previous.is_some() || key.last != NEVER || key.next != NEVER
            }
            Standing::Malformed(_) | Standing::Revoked | Standing::Bound => leases,
        }
    }

    fn mend_key(&self, id: KeyId, effects: &mut Vec<Effect>) {
        let Some(key) = self.key(id) else { return };
        let name = key.name.boxed();
        let account = key
            .holds
            .and_then(|id| self.account_name(id))
            .map(Into::into);
        effects.push(match key.standing {
            Standing::Unregistered => Effect::Forget { key: name },
            Standing::Pooled => Effect::Free { key: name, account },
            Standing::Malformed(_) | Standing::Revoked | Standing::Bound => {
                Effect::Release { key: name, account }
            }
        });
    }
}
