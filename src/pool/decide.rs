//! What commands do: each decision answers with a reply and the writes that
//! make it true, and leaves the view as it was.

use super::account::{Account, Class};
use super::key::{Key, NEVER, Standing};
use super::{AccountId, Choice, Effect, File, KeyId, Pool, SWEEP_LIMIT, Tier, key::Flaw};
use crate::accounts::Credential;
use std::hint::black_box;

/// How a key came by its account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// The key held no slot and had no running period.
    Assigned,
    /// The key's lease goes on.
    Current,
    /// The key's period was over.
    Rotated,
    /// The key's account was lost within its period.
    Failover,
    /// The key is bound to the account; no slot is counted.
    Bound,
}

impl State {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Assigned => "assigned",
            Self::Current => "current",
            Self::Rotated => "rotated",
            Self::Failover => "failover",
            Self::Bound => "bound",
        }
    }
}

/// Why a key gets no account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    NoKey,
    Malformed(Flaw),
    Revoked,
    Expired,
    /// Every lendable account is full; `next` is the unix ms at which the next
    /// slot falls due, when that is known.
    PoolFull {
        next: Option<i64>,
    },
    /// No account of the tier can be lent; `next` is the unix ms at which the
    /// first cooldown ends, when one does.
    NoAccount {
        next: Option<i64>,
    },
    /// The account that the key is bound to can't be used.
    BoundAccount,
    /// There is no account of that name.
    NoSuchAccount,
}

/// The answer to an acquire.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Decision {
    pub(crate) account: AccountId,
    pub(crate) state: State,
    pub(crate) previous: Option<AccountId>,
    /// Unix ms; none for a bound key.
    pub(crate) last: Option<i64>,
    /// Unix ms; none for a bound key.
    pub(crate) next: Option<i64>,
}

/// The answer to a release, a revoke or a cooldown.
#[derive(Debug, Default)]
pub(crate) struct Freed {
    /// The account whose slot the key held.
    pub(crate) account: Option<Box<str>>,
    /// Slots given up by name: 1 at most for a key, more for an account.
    pub(crate) slots: usize,
    pub(crate) effects: Vec<Effect>,
}

/// A lease taken away to see what would follow.
struct Supposed {
    key: KeyId,
    account: AccountId,
}

const fn without_effects(decision: Decision) -> (Decision, Vec<Effect>) {
    (decision, Vec::new())
}

impl Pool {
    /// What [`Pool::acquire`] answers for a key whose lease goes on at `now` (unix ms): all
    /// that most calls take.
    pub(crate) fn current(&self, name: &[u8], now: i64) -> Option<Decision> {
        let key = self.key(self.find_key(name)?)?;
        if key.standing == Standing::Pooled && now < key.expires_at {
            self.kept(key, now)
        } else {
            None
        }
    }

    /// The same for a pooled key.
    fn kept(&self, key: &Key, now: i64) -> Option<Decision> {
        let account = key.holds?;
        let goes_on = now < key.next && self.account(account)?.class_at(now).keeps_leases();
        goes_on.then(|| Decision {
            account,
            state: State::Current,
            previous: key.previous,
            last: (key.last != NEVER).then_some(key.last),
            next: Some(key.next),
        })
    }

    /// The account for a key at `now` (unix ms), and the writes that make it true.
    ///
    /// A current lease is answered as it is. Otherwise the key's own slot, the
    /// slots of overdue leases and those of accounts that may no longer be lent
    /// count as free, and the lendable account with the fewest slots in use is
    /// chosen, ties by `choice`, not the key's last account while another ties.
    pub(crate) fn acquire(
        &mut self,
        name: &[u8],
        now: i64,
        choice: &mut Choice,
    ) -> Result<(Decision, Vec<Effect>), Refusal> {
        let id = self.find_key(name).ok_or(Refusal::NoKey)?;
        let key = self.key(id).ok_or(Refusal::NoKey)?;
        match key.standing {
            Standing::Unregistered => return Err(Refusal::NoKey),
            Standing::Malformed(flaw) => return Err(Refusal::Malformed(flaw)),
            Standing::Revoked => return Err(Refusal::Revoked),
            Standing::Pooled | Standing::Bound if now >= key.expires_at => {
                return Err(Refusal::Expired);
            }
            Standing::Bound => return self.bound(key.bound, now).map(without_effects),
            Standing::Pooled => {}
        }
        if let Some(decision) = self.kept(key, now) {
            return Ok(without_effects(decision));
        }
        let over = now >= key.next;
        let state = match key.holds {
            None if key.next == NEVER || key.previous.is_none() => State::Assigned,
            _ if over => State::Rotated,
            _ => State::Failover,
        };
        self.choose(id, state, now, choice)
    }

    fn bound(&self, account: Option<AccountId>, now: i64) -> Result<Decision, Refusal> {
        let id = account.ok_or(Refusal::BoundAccount)?;
        let account = self.account(id).ok_or(Refusal::BoundAccount)?;
        if !account.class_at(now).keeps_leases() || !Self::is_listed(account) {
            return Err(Refusal::BoundAccount);
        }
        Ok(Decision {
            account: id,
            state: State::Bound,
            previous: None,
            last: None,
            next: None,
        })
    }

    fn choose(
        &mut self,
        id: KeyId,
        state: State,
        now: i64,
        choice: &mut Choice,
    ) -> Result<(Decision, Vec<Effect>), Refusal> {
        if let Some(key) = self.key(id).filter(|key| key.holds.is_some()) {
            self.touch(id, [key.holds, key.previous]);
        }
        self.advance(now);
        let mut supposed = Vec::new();
        self.supposing = true;
        let own = self.suppose_free(id, &mut supposed);
        let avoided = own.or_else(|| self.key(id).and_then(|key| key.previous));
        // Freed slots help only on accounts that can be lent.
        if self.tier(Tier::Medium).tally.lendable > 0 {
            self.suppose_swept(now, SWEEP_LIMIT, &mut supposed);
            if self.tier(Tier::Medium).least_used().is_none() {
                self.suppose_one_free(now, &mut supposed);
            }
        }
        let chosen = self.pick(id, avoided, now, choice).or_else(|| {
            // An account that this node has no file of can't be lent anew, but
            // a key that holds a slot of it is never refused for that.
            own.filter(|&own| {
                self.account(own)
                    .is_some_and(|own| own.class == Class::Unknown)
            })
        });
        self.recent = [chosen, avoided];
        self.touch(id, self.recent);
        let outcome = match chosen {
            Some(account) => Ok(self.grant(id, account, avoided, state, now, &supposed)),
            None => Err(self.refusal(now)),
        };
        self.bring_back(supposed);
        outcome
    }

    fn grant(
        &self,
        id: KeyId,
        account: AccountId,
        previous: Option<AccountId>,
        state: State,
        now: i64,
        supposed: &[Supposed],
    ) -> (Decision, Vec<Effect>) {
        let next = now.saturating_add(self.rotation_ms);
        let others = supposed.iter().filter(|freed| freed.key != id);
        let mut effects: Vec<Effect> = others
            .filter_map(|freed| self.free(freed.key, freed.account))
            .collect();
        if let (Some(key), Some(chosen)) = (self.key(id), self.account_name(account)) {
            effects.push(Effect::Lend {
                key: key.name.boxed(),
                account: chosen.into(),
                previous: previous
                    .and_then(|previous| self.account_name(previous))
                    .map(Into::into),
                last: now,
                next,
            });
        }
        let decision = Decision {
            account,
            state,
            previous,
            last: Some(now),
            next: Some(next),
        };
        (decision, effects)
    }

    /// Reads at once what a change of the key's lease looks at piece by piece, on the
    /// account that it is given up or made on, and of the one that it leaves behind: then
    /// memory is waited for once. With many accounts or keys little of it is in the
    /// processor's cache.
    fn touch(&self, key: KeyId, accounts: [Option<AccountId>; 2]) {
        let [first, _] = accounts.map(|id| {
            let id = id?;
            let account = self.account(id)?;
            black_box((
                account.is_cooled(),
                account.refs,
                self.places.get(id.slot()),
            ));
            Some(account)
        });
        black_box(self.seats.get(key.slot()));
        if let Some(account) = first {
            let bucket = self.tier(account.tier).buckets.get(account.holders.len());
            self.touch_last(bucket.map_or(&[], Vec::as_slice));
        }
    }

    /// Whoever stands last in a bucket takes the place of an account that leaves it.
    fn touch_last(&self, bucket: &[AccountId]) {
        black_box(bucket.last().map(|last| self.places.get(last.slot())));
    }

    fn refusal(&self, now: i64) -> Refusal {
        let index = self.tier(Tier::Medium);
        let warm = index
            .cooldowns
            .iter()
            .map(|&(until, _)| until)
            .find(|&until| until > now);
        if index.tally.lendable == 0 {
            return Refusal::NoAccount { next: warm };
        }
        let due = self.due.iter().map(|&(due, _)| due).find(|&due| due > now);
        let next = [warm, due].into_iter().flatten().min();
        Refusal::PoolFull { next }
    }

    /// One of the least used lendable accounts, for the key.
    fn pick(
        &self,
        key: KeyId,
        avoided: Option<AccountId>,
        now: i64,
        choice: &mut Choice,
    ) -> Option<AccountId> {
        let ties = self.tier(Tier::Medium).least_used()?;
        let avoided = avoided.filter(|_| ties.len() > 1);
        let is_avoided =
            |position: usize| avoided.is_some_and(|avoided| ties.get(position) == Some(&avoided));
        let key = self.key(key).map_or("", |key| &*key.name);
        let name = |position: usize| {
            let id = ties.get(position).copied();
            id.and_then(|id| self.account_name(id)).unwrap_or_default()
        };
        self.touch_last(ties);
        let position = choice.position(ties.len(), is_avoided, (key, now), name)?;
        ties.get(position).copied()
    }

    /// Supposes that up to `limit` slots are free that should be: those of
    /// accounts that may no longer be lent, then the longest overdue. Answers
    /// whether there was any.
    fn suppose_swept(&mut self, now: i64, limit: usize, supposed: &mut Vec<Supposed>) -> bool {
        for done in 0..limit {
            let stale = self.tier(Tier::Medium).stale.first().copied();
            let stale = stale
                .and_then(|id| self.account(id))
                .and_then(|account| account.holders.last());
            let overdue = || {
                self.due
                    .first()
                    .filter(|&&(due, _)| due <= now)
                    .map(|&(_, key)| key)
            };
            let Some(key) = stale.copied().or_else(overdue) else {
                return done > 0;
            };
            if self.suppose_free(key, supposed).is_none() {
                return done > 0;
            }
        }
        limit > 0
    }

    /// Supposes that an overdue lease of a lendable account is free, if there is
    /// one: then nobody is refused for the sweep's limit.
    fn suppose_one_free(&mut self, now: i64, supposed: &mut Vec<Supposed>) {
        let lendable = |key: &Key| {
            let account = key.holds.and_then(|id| self.account(id));
            account.is_some_and(|account| account.class == Class::Lendable)
        };
        let mut overdue = self
            .due
            .iter()
            .take_while(|&&(due, _)| due <= now)
            .map(|&(_, id)| id);
        if let Some(key) = overdue.find(|&id| self.key(id).is_some_and(lendable)) {
            self.suppose_free(key, supposed);
        }
    }

    fn suppose_free(&mut self, key: KeyId, supposed: &mut Vec<Supposed>) -> Option<AccountId> {
        let account = self.unseat(key)?;
        supposed.push(Supposed { key, account });
        Some(account)
    }

    /// The effects of freeing what is overdue at `now`, within the limit.
    fn sweep(&mut self, now: i64, effects: &mut Vec<Effect>) {
        self.advance(now);
        let mut supposed = Vec::new();
        self.supposing = true;
        self.suppose_swept(now, SWEEP_LIMIT, &mut supposed);
        effects.extend(
            supposed
                .iter()
                .filter_map(|freed| self.free(freed.key, freed.account)),
        );
        self.bring_back(supposed);
    }

    fn bring_back(&mut self, supposed: Vec<Supposed>) {
        for Supposed { key, account } in supposed {
            self.seat(key, account);
        }
        self.supposing = false;
    }

    pub(super) fn free(&self, key: KeyId, account: AccountId) -> Option<Effect> {
        Some(Effect::Free {
            key: self.key(key)?.name.boxed(),
            account: self.account_name(account).map(Into::into),
        })
    }

    /// Gives up the key's slot, if it holds one. With `now`, what is overdue
    /// then is freed too.
    pub(crate) fn release(&mut self, name: &str, now: Option<i64>) -> Result<Freed, Refusal> {
        let id = self.find_key(name.as_bytes()).ok_or(Refusal::NoKey)?;
        let key = self
            .key(id)
            .filter(|key| key.standing != Standing::Unregistered);
        let key = key.ok_or(Refusal::NoKey)?;
        let mut freed = Freed::default();
        let accounts = [key.holds, key.previous];
        self.touch(id, accounts);
        self.let_go(key.name.boxed(), key.holds, &mut freed);
        self.recent = accounts;
        if let Some(now) = now {
            self.sweep(now, &mut freed.effects);
            let own =
                |effect: &Effect| matches!(effect, Effect::Free { key, .. } if **key == *name);
            freed.effects.retain(|effect| !own(effect));
        }
        Ok(freed)
    }

    /// Deactivates the key and gives up its slot.
    pub(crate) fn revoke(&self, name: &str) -> Result<Freed, Refusal> {
        let id = self.find_key(name.as_bytes()).ok_or(Refusal::NoKey)?;
        let key = self.key(id).ok_or(Refusal::NoKey)?;
        let mut freed = Freed::default();
        match key.standing {
            Standing::Unregistered => return Err(Refusal::NoKey),
            Standing::Malformed(Flaw::Type) => return Err(Refusal::Malformed(Flaw::Type)),
            Standing::Revoked => {}
            Standing::Malformed(_) | Standing::Pooled | Standing::Bound => {
                freed.effects.push(Effect::Deactivate {
                    key: key.name.boxed(),
                });
            }
        }
        self.let_go(key.name.boxed(), key.holds, &mut freed);
        Ok(freed)
    }

    fn let_go(&self, key: Box<str>, holds: Option<AccountId>, freed: &mut Freed) {
        let Some(account) = holds else { return };
        let account: Option<Box<str>> = self.account_name(account).map(Into::into);
        freed.account.clone_from(&account);
        freed.slots += 1;
        freed.effects.push(Effect::Release { key, account });
    }

    /// Takes an account out of the pool until `until` (unix ms), or with none
    /// puts it back. Its holders give up their slots.
    pub(crate) fn cool(
        &mut self,
        tier: Tier,
        name: &str,
        now: i64,
        until: Option<i64>,
        reason: Option<&str>,
    ) -> Result<Freed, Refusal> {
        let id = self
            .find_account(tier, name)
            .ok_or(Refusal::NoSuchAccount)?;
        let account = self.account(id).filter(|account| Self::is_listed(account));
        let account = account.ok_or(Refusal::NoSuchAccount)?;
        let name = account.name.boxed();
        let mut freed = Freed {
            account: Some(name.clone()),
            ..Freed::default()
        };
        match until {
            None => freed.effects.push(Effect::Warm {
                tier,
                account: name,
            }),
            Some(until) => {
                let reason = reason.filter(|reason| !reason.is_empty()).map(Into::into);
                freed.slots = account.holders.len();
                freed.effects.push(Effect::Cool {
                    tier,
                    account: name,
                    until,
                    reason,
                });
                freed
                    .effects
                    .extend(account.holders.iter().filter_map(|&key| self.free(key, id)));
            }
        }
        let mut swept = Vec::new();
        self.sweep(now, &mut swept);
        swept.retain(|effect| !freed.effects.contains(effect));
        freed.effects.append(&mut swept);
        Ok(freed)
    }

    /// Whether a key of the tier may be bound to an account of that name: its
    /// file is there, be it usable at the moment or not.
    pub(crate) fn has_account(&self, tier: Tier, name: &str) -> bool {
        let account = self
            .find_account(tier, name)
            .and_then(|id| self.account(id));
        account.is_some_and(Self::is_listed)
    }

    /// Whether an operator would call it an account: there is a file, or the
    /// keyspace says so and this node can't tell.
    pub(super) fn is_listed(account: &Account) -> bool {
        match account.file {
            File::Valid(_) | File::Invalid(_) => true,
            File::Absent => false,
            File::Unknown => account.is_recorded(),
        }
    }

    /// The credential to use for an account, if its file is on this node.
    pub(crate) fn credential(&self, id: AccountId) -> Option<&Credential> {
        match &self.account(id)?.file {
            File::Valid(credential) => Some(credential),
            File::Invalid(_) | File::Absent | File::Unknown => None,
        }
    }
}
