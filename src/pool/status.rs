//! What an operator is shown: sums by tier, pages of accounts and leases, one
//! key in full. Nothing here changes a lease.

use super::account::{Account, Class};
use super::key::{NEVER, Standing};
use super::{AccountId, File, KeyId, Pool, Tally, Tier, names};

/// One tier in numbers, at an instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Summary {
    pub(crate) tally: Tally,
    /// All slots of the accounts in the pool, lendable or not.
    pub(crate) slots: u64,
    /// Keys that hold a slot, of an account in the pool or of one whose file
    /// isn't on this node.
    pub(crate) leases: u64,
    /// Unix ms at which the next slot falls due.
    pub(crate) next_due: Option<i64>,
}

/// One account, at an instant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AccountStatus<'a> {
    pub(crate) tier: Tier,
    pub(crate) name: &'a str,
    pub(crate) used: u64,
    pub(crate) slots: u64,
    /// available, partial, full, cooldown, expired, invalid or missing.
    pub(crate) state: &'static str,
    pub(crate) reason: Option<&'a str>,
    /// Unix ms: when the cooldown ends, or when the token expired.
    pub(crate) until: Option<i64>,
}

/// One lease. The key is masked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LeaseStatus<'a> {
    pub(crate) key: String,
    pub(crate) tier: Tier,
    pub(crate) account: &'a str,
    pub(crate) next: Option<i64>,
    pub(crate) last: Option<i64>,
    pub(crate) previous: Option<&'a str>,
}

/// Where a page of leases ended: after the slot due at this instant, of this key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LeaseCursor {
    due: i64,
    key: u32,
}

impl LeaseCursor {
    /// The cursor in `text`, as [`ToString`] writes it.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (due, key) = text.split_once('-')?;
        Some(Self {
            due: due.parse().ok().filter(|due| *due >= 0)?,
            key: key.parse().ok()?,
        })
    }
}

impl std::fmt::Display for LeaseCursor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.due, self.key)
    }
}

/// A page of rows, and where the next one begins.
#[derive(Debug)]
pub(crate) struct Page<Row, Cursor> {
    pub(crate) rows: Vec<Row>,
    pub(crate) next: Option<Cursor>,
}

/// What a key is doing at an instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KeyState {
    Malformed,
    Revoked,
    Expired,
    Bound,
    /// Holds a slot.
    Leased,
    /// Holds a slot past its period.
    Due,
    /// Holds no slot.
    Idle,
}

impl KeyState {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Revoked => "revoked",
            Self::Expired => "expired",
            Self::Bound => "bound",
            Self::Leased => "leased",
            Self::Due => "due",
            Self::Idle => "idle",
        }
    }
}

/// One key in full, at an instant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeyStatus<'a> {
    pub(crate) tier: Tier,
    pub(crate) state: KeyState,
    /// What is wrong with a malformed record.
    pub(crate) flaw: Option<&'static str>,
    pub(crate) account: Option<&'a str>,
    pub(crate) previous: Option<&'a str>,
    pub(crate) last: Option<i64>,
    pub(crate) next: Option<i64>,
    pub(crate) expires_at: Option<i64>,
}

impl Pool {
    /// A tier in numbers, at `now` (unix ms).
    pub(crate) fn summary(&mut self, tier: Tier, now: i64) -> Summary {
        self.advance(now);
        let tally = self.tier(tier).tally;
        let pooled = tier.is_pooled();
        Summary {
            tally,
            slots: tally.accounts * u64::from(self.capacity),
            leases: if pooled { self.due.len() as u64 } else { 0 },
            next_due: self
                .due
                .first()
                .filter(|_| pooled)
                .map(|&(due, _)| due.max(0)),
        }
    }

    /// Up to `count` accounts of a tier from the cursor on (0: from the first),
    /// in the order in which the pool got to know them.
    pub(crate) fn account_page(
        &self,
        tier: Tier,
        now: i64,
        cursor: u64,
        count: usize,
    ) -> Page<AccountStatus<'_>, u64> {
        let start = usize::try_from(cursor).unwrap_or(usize::MAX);
        let mut rows = Vec::new();
        let mut last = None;
        for slot in start..self.accounts.end() {
            let Some(account) = self.accounts.get(slot) else {
                continue;
            };
            if account.tier != tier || !Self::is_listed(account) {
                continue;
            }
            if rows.len() == count {
                return Page { rows, next: last };
            }
            last = AccountId::new(slot).map(AccountId::after);
            rows.push(self.account_status(account, now));
        }
        Page { rows, next: None }
    }

    fn account_status<'a>(&self, account: &'a Account, now: i64) -> AccountStatus<'a> {
        let (used, slots) = (account.used(), u64::from(self.capacity));
        let class = account.class_at(now);
        let (state, reason, until) = match (&account.file, class) {
            (File::Invalid(reason), _) => ("invalid", Some(*reason), None),
            (File::Valid(credential), Class::Expired) => ("expired", None, credential.expires_at),
            (_, Class::Cooling) => ("cooldown", account.reason(), Some(account.cools_until)),
            (_, Class::Lendable) if used == 0 => ("available", None, None),
            (_, Class::Lendable) if used < slots => ("partial", None, None),
            (_, Class::Lendable) => ("full", None, None),
            _ => ("missing", None, None),
        };
        AccountStatus {
            tier: account.tier,
            name: &account.name,
            used,
            slots,
            state,
            reason,
            until,
        }
    }

    /// Up to `count` accounts whose files can't be used, with the reason.
    pub(crate) fn invalid_files(&self, count: usize) -> Vec<(Tier, &str, &'static str)> {
        let invalid = self
            .accounts
            .iter()
            .filter_map(|(_, account)| match account.file {
                File::Invalid(reason) => Some((account.tier, &*account.name, reason)),
                _ => None,
            });
        invalid.take(count).collect()
    }

    /// Up to `count` leases after the cursor, those due next first.
    pub(crate) fn lease_page(
        &self,
        after: Option<LeaseCursor>,
        count: usize,
    ) -> Page<LeaseStatus<'_>, LeaseCursor> {
        use std::ops::Bound;
        let start = after.map_or(Bound::Unbounded, |LeaseCursor { due, key }| {
            Bound::Excluded((due, KeyId::from_number(key)))
        });
        let mut rows = Vec::new();
        let mut last = None;
        for &(due, id) in self.due.range((start, Bound::Unbounded)) {
            if rows.len() == count {
                return Page { rows, next: last };
            }
            let Some(lease) = self.lease_status(id) else {
                continue;
            };
            last = Some(LeaseCursor {
                due,
                key: id.number(),
            });
            rows.push(lease);
        }
        Page { rows, next: None }
    }

    fn lease_status(&self, id: KeyId) -> Option<LeaseStatus<'_>> {
        let key = self.key(id)?;
        Some(LeaseStatus {
            key: names::mask(&key.name),
            tier: key.tier,
            account: self.account_name(key.holds?)?,
            next: known(key.next),
            last: known(key.last),
            previous: key.previous.and_then(|id| self.account_name(id)),
        })
    }

    /// One registered key in full, at `now` (unix ms).
    pub(crate) fn key_status(&self, name: &str, now: i64) -> Option<KeyStatus<'_>> {
        let key = self.key(self.find_key(name.as_bytes())?)?;
        let mut flaw = None;
        let state = match key.standing {
            Standing::Unregistered => return None,
            Standing::Malformed(what) => {
                flaw = Some(what.text());
                KeyState::Malformed
            }
            Standing::Revoked => KeyState::Revoked,
            _ if now >= key.expires_at => KeyState::Expired,
            Standing::Bound => KeyState::Bound,
            Standing::Pooled if key.holds.is_none() => KeyState::Idle,
            Standing::Pooled if now >= key.next => KeyState::Due,
            Standing::Pooled => KeyState::Leased,
        };
        Some(KeyStatus {
            tier: key.tier,
            state,
            flaw,
            account: key.holds.or(key.bound).and_then(|id| self.account_name(id)),
            previous: key.previous.and_then(|id| self.account_name(id)),
            last: known(key.last),
            next: known(key.next),
            expires_at: (key.expires_at != i64::MAX).then_some(key.expires_at),
        })
    }
}

fn known(instant: i64) -> Option<i64> {
    (instant != NEVER).then_some(instant)
}
