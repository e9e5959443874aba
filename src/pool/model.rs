//! A keyspace made of plain maps, and the rules written down a second time over
//! it, as naively as possible: no index, everything counted anew.

use super::{
    Choice, Decision, Effect, File, KeyRecord, Pool, Refusal, Rotation, State, Stored, Tier,
};
use crate::accounts::Credential;
use std::collections::{BTreeMap, BTreeSet};

pub(super) fn credential(expires_at: Option<i64>) -> Credential {
    let mut credential = crate::accounts::parse::parse(br#"{"access_token":"t"}"#).unwrap();
    credential.expires_at = expires_at;
    credential
}

/// The two keys of an account's cooldown.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(super) struct Cooldown {
    pub(super) until: i64,
    pub(super) reason: Option<Box<str>>,
}

/// A `client_keys:` hash.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Record {
    pub(super) tier: Tier,
    pub(super) bound: Option<String>,
    pub(super) expires_at: Option<i64>,
    pub(super) active: bool,
}

/// A `key_rotation:` hash.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Lease {
    pub(super) account: Option<String>,
    pub(super) garbage: bool,
    pub(super) previous: Option<String>,
    pub(super) last: Option<i64>,
    pub(super) next: Option<i64>,
}

/// A server: its keyspace, its account files, and a pool that follows them.
pub(super) struct World {
    pub(super) pool: Pool,
    pub(super) capacity: u32,
    pub(super) rotation_ms: i64,
    pub(super) trusts_folder: bool,
    pub(super) records: BTreeMap<String, Record>,
    pub(super) leases: BTreeMap<String, Lease>,
    pub(super) slots: BTreeMap<(Tier, String), Stored>,
    pub(super) cooldowns: BTreeMap<(Tier, String), Cooldown>,
    /// Account files; none: invalid.
    pub(super) files: BTreeMap<(Tier, String), Option<Credential>>,
}

/// What an acquire must answer.
#[derive(Debug, PartialEq)]
pub(super) enum Expected {
    Refused(Refusal),
    Kept {
        account: String,
        state: State,
    },
    /// One of these, as a new lease.
    OneOf {
        accounts: BTreeSet<String>,
        state: State,
    },
}

impl World {
    pub(super) fn new(capacity: u32, rotation_ms: i64) -> Self {
        let mut pool = Pool::new(capacity, rotation_ms);
        for tier in Tier::ALL {
            pool.set_trusts_folder(tier, true);
        }
        Self {
            pool,
            capacity,
            rotation_ms,
            trusts_folder: true,
            records: BTreeMap::new(),
            leases: BTreeMap::new(),
            slots: BTreeMap::new(),
            cooldowns: BTreeMap::new(),
            files: BTreeMap::new(),
        }
    }

    // --- what is written, and how the pool hears of it ---

    pub(super) fn set_record(&mut self, key: &str, record: Option<Record>) {
        let parsed = record.as_ref().map(|record| KeyRecord::Good {
            tier: record.tier,
            bound: record.bound.as_deref(),
            expires_at: record.expires_at,
            active: record.active,
        });
        self.pool.observe_key(key, parsed);
        match record {
            Some(record) => self.records.insert(key.to_owned(), record),
            None => self.records.remove(key),
        };
    }

    pub(super) fn set_lease(&mut self, key: &str, lease: Option<Lease>) {
        // Redis has no empty hashes.
        let lease = lease.filter(|lease| *lease != Lease::default());
        let parsed = lease.as_ref().map(|lease| Rotation {
            account: lease.account.as_deref(),
            account_is_garbage: lease.garbage,
            previous: lease.previous.as_deref(),
            last: lease.last,
            next: lease.next,
        });
        self.pool.observe_rotation(key, parsed);
        self.record_lease(key, lease);
    }

    fn record_lease(&mut self, key: &str, lease: Option<Lease>) {
        match lease {
            Some(lease) => self.leases.insert(key.to_owned(), lease),
            None => self.leases.remove(key),
        };
    }

    pub(super) fn set_slots(&mut self, tier: Tier, account: &str, stored: Stored) {
        self.pool.observe_slots(tier, account, stored);
        self.slots.insert((tier, account.to_owned()), stored);
        self.slots.retain(|_, stored| *stored != Stored::Absent);
    }

    pub(super) fn set_cooldown(&mut self, tier: Tier, account: &str, cooldown: Cooldown) {
        self.pool.observe_cooldown(tier, account, cooldown.until);
        self.pool
            .observe_reason(tier, account, cooldown.reason.as_deref());
        self.cooldowns.insert((tier, account.to_owned()), cooldown);
        self.cooldowns
            .retain(|_, cooldown| *cooldown != Cooldown::default());
    }

    /// A file comes (none: one that can't be used) or goes.
    pub(super) fn set_file(&mut self, tier: Tier, account: &str, file: Option<Option<Credential>>) {
        let known = match &file {
            Some(Some(credential)) => File::Valid(Box::new(credential.clone())),
            Some(None) => File::Invalid("broken"),
            None => File::Absent,
        };
        self.pool.set_file(tier, account, known);
        match file {
            Some(file) => self.files.insert((tier, account.to_owned()), file),
            None => self.files.remove(&(tier, account.to_owned())),
        };
    }

    pub(super) fn set_capacity(&mut self, capacity: u32) {
        self.capacity = capacity;
        self.pool.set_capacity(capacity);
    }

    fn write(&mut self, effect: &Effect) {
        match effect {
            Effect::Lend {
                key,
                account,
                previous,
                last,
                next,
            } => {
                let mut lease = self.leases.get(&**key).cloned().unwrap_or_default();
                lease.account = Some(account.to_string());
                lease.garbage = false;
                lease.last = Some(*last);
                lease.next = Some(*next);
                if let Some(previous) = previous {
                    lease.previous = Some(previous.to_string());
                }
                self.set_lease(key, Some(lease));
            }
            Effect::Free { key, account } | Effect::Release { key, account } => {
                let mut lease = self.leases.get(&**key).cloned().unwrap_or_default();
                lease.account = None;
                lease.garbage = false;
                if matches!(effect, Effect::Release { .. }) {
                    lease.next = None;
                }
                // Two commands, as in the store: the view is told of each, and
                // reads what a hash without a field is gone for.
                let over = matches!(effect, Effect::Release { .. });
                self.pool.observe_given_up(key, over);
                if lease == Lease::default() {
                    self.set_lease(key, None);
                }
                if let Some(account) = account {
                    lease.previous = Some(account.to_string());
                    self.pool.observe_previous(key, account);
                }
                if lease != Lease::default() {
                    self.record_lease(key, Some(lease));
                }
            }
            Effect::Forget { key } => self.set_lease(key, None),
            Effect::Slots {
                tier,
                account,
                used,
            } => self.set_slots(*tier, account, Stored::Count(*used)),
            Effect::Uncount { tier, account } => self.set_slots(*tier, account, Stored::Absent),
            Effect::Leave { tier, account } => {
                self.set_slots(*tier, account, Stored::Absent);
                self.set_cooldown(*tier, account, Cooldown::default());
            }
            Effect::Cool {
                tier,
                account,
                until,
                reason,
            } => {
                self.set_cooldown(
                    *tier,
                    account,
                    Cooldown {
                        until: *until,
                        reason: reason.clone(),
                    },
                );
            }
            Effect::Warm { tier, account } => {
                self.set_cooldown(*tier, account, Cooldown::default())
            }
            Effect::Deactivate { key } => {
                let mut record = self.records[&**key].clone();
                record.active = false;
                self.set_record(key, Some(record));
            }
        }
    }

    pub(super) fn carry_out(&mut self, effects: &[Effect]) {
        self.pool.begin();
        effects.iter().for_each(|effect| self.write(effect));
        for round in 0.. {
            let following = self.pool.settle_touched();
            if following.is_empty() {
                break;
            }
            assert!(round < 8, "settling does not come to an end: {following:?}");
            following.iter().for_each(|effect| self.write(effect));
        }
        self.pool.end();
    }

    pub(super) fn settle(&mut self) {
        for round in 0.. {
            let effects = self.pool.settle(usize::MAX);
            self.carry_out(&effects);
            if effects.is_empty() && !self.pool.has_backlog() {
                break;
            }
            assert!(round < 100, "settling does not come to an end: {effects:?}");
        }
    }

    // --- commands, as the module runs them ---

    pub(super) fn acquire(
        &mut self,
        key: &str,
        now: i64,
        choice: &mut Choice,
    ) -> Result<Decision, Refusal> {
        self.settle();
        let (decision, effects) = self.pool.acquire(key.as_bytes(), now, choice)?;
        self.carry_out(&effects);
        Ok(decision)
    }

    pub(super) fn release(
        &mut self,
        key: &str,
        now: Option<i64>,
    ) -> Result<Option<Box<str>>, Refusal> {
        self.settle();
        let freed = self.pool.release(key, now)?;
        self.carry_out(&freed.effects);
        Ok(freed.account)
    }

    pub(super) fn revoke(&mut self, key: &str) -> Result<Option<Box<str>>, Refusal> {
        self.settle();
        let freed = self.pool.revoke(key)?;
        self.carry_out(&freed.effects);
        Ok(freed.account)
    }

    pub(super) fn cool(
        &mut self,
        account: &str,
        now: i64,
        until: Option<i64>,
    ) -> Result<usize, Refusal> {
        self.settle();
        let freed = self
            .pool
            .cool(Tier::Medium, account, now, until, Some("why"))?;
        self.carry_out(&freed.effects);
        Ok(freed.slots)
    }

    // --- the rules, naively ---

    fn valid(&self, tier: Tier, account: &str) -> Option<&Credential> {
        self.files.get(&(tier, account.to_owned()))?.as_ref()
    }

    /// The file is there and good, its token has not expired, no cooldown.
    pub(super) fn usable(&self, tier: Tier, account: &str, now: i64) -> bool {
        let expired = |credential: &Credential| credential.expires_at.is_some_and(|end| now >= end);
        let cooling = self
            .cooldowns
            .get(&(tier, account.to_owned()))
            .is_some_and(|cooldown| now < cooldown.until);
        self.valid(tier, account)
            .is_some_and(|credential| !expired(credential))
            && !cooling
    }

    /// Nothing is known of the account's file, and that decides nothing.
    fn unknown(&self, account: &str) -> bool {
        !self.trusts_folder && !self.files.contains_key(&(Tier::Medium, account.to_owned()))
    }

    /// When a lease's slot falls due.
    fn due(&self, key: &str, lease: &Lease) -> i64 {
        let end = self
            .records
            .get(key)
            .and_then(|record| record.expires_at)
            .unwrap_or(i64::MAX);
        lease.next.unwrap_or(0).min(end)
    }

    /// Leases of other keys than `key` that are still good at `now`.
    fn others(&self, key: &str, now: i64) -> Vec<(&str, &Lease)> {
        let mut others = Vec::new();
        for (other, lease) in &self.leases {
            let Some(account) = &lease.account else {
                continue;
            };
            let kept = self.usable(Tier::Medium, account, now) || self.unknown(account);
            if other != key && kept && self.due(other, lease) > now {
                others.push((other.as_str(), lease));
            }
        }
        others
    }

    /// What an acquire must answer, once the keyspace is settled.
    pub(super) fn expected(&self, key: &str, now: i64) -> Expected {
        let Some(record) = self.records.get(key) else {
            return Expected::Refused(Refusal::NoKey);
        };
        if !record.active {
            return Expected::Refused(Refusal::Revoked);
        }
        if record.expires_at.is_some_and(|end| now >= end) {
            return Expected::Refused(Refusal::Expired);
        }
        if let Some(account) = &record.bound {
            return if self.usable(record.tier, account, now) {
                Expected::Kept {
                    account: account.clone(),
                    state: State::Bound,
                }
            } else {
                Expected::Refused(Refusal::BoundAccount)
            };
        }
        let lease = self.leases.get(key).cloned().unwrap_or_default();
        let over = lease.next.is_none_or(|next| now >= next);
        let state = match &lease.account {
            Some(account)
                if !over && (self.usable(Tier::Medium, account, now) || self.unknown(account)) =>
            {
                return Expected::Kept {
                    account: account.clone(),
                    state: State::Current,
                };
            }
            Some(_) if over => State::Rotated,
            Some(_) => State::Failover,
            None if lease.next.is_none() || lease.previous.is_none() => State::Assigned,
            None if over => State::Rotated,
            None => State::Failover,
        };
        let others = self.others(key, now);
        let medium = self
            .files
            .keys()
            .filter(|(tier, _)| *tier == Tier::Medium)
            .map(|(_, account)| account);
        let usable: Vec<&String> = medium
            .filter(|account| self.usable(Tier::Medium, account, now))
            .collect();
        let used = |account: &str| {
            others
                .iter()
                .filter(|(_, lease)| lease.account.as_deref() == Some(account))
                .count()
        };
        let free: Vec<&&String> = usable
            .iter()
            .filter(|account| used(account) < self.capacity as usize)
            .collect();
        let Some(least) = free.iter().map(|account| used(account)).min() else {
            if let Some(own) = lease.account.filter(|own| self.unknown(own)) {
                return Expected::OneOf {
                    accounts: BTreeSet::from([own]),
                    state,
                };
            }
            let warm = self.cooldowns.iter().filter(|((tier, account), cooldown)| {
                *tier == Tier::Medium
                    && cooldown.until > now
                    && self.valid(*tier, account).is_some()
            });
            let warm = warm.map(|(_, cooldown)| cooldown.until).min();
            return Expected::Refused(if usable.is_empty() {
                Refusal::NoAccount { next: warm }
            } else {
                let due = others
                    .iter()
                    .map(|(other, lease)| self.due(other, lease))
                    .min();
                Refusal::PoolFull {
                    next: [warm, due].into_iter().flatten().min(),
                }
            });
        };
        let ties = free.into_iter().filter(|account| used(account) == least);
        let mut accounts: BTreeSet<String> = ties.map(ToString::to_string).collect();
        let last = lease.account.or(lease.previous);
        if accounts.len() > 1
            && let Some(last) = last
        {
            accounts.remove(&last);
        }
        Expected::OneOf { accounts, state }
    }

    /// The invariants, over the keyspace alone; it must be settled.
    pub(super) fn check(&self) {
        let mut counted: BTreeMap<&str, u64> = BTreeMap::new();
        for (key, lease) in &self.leases {
            assert!(!lease.garbage, "{key} holds garbage");
            if let Some(account) = &lease.account {
                *counted.entry(account).or_default() += 1;
                let record = self
                    .records
                    .get(key)
                    .expect("a key that isn't registered holds a slot");
                assert!(
                    record.active && record.bound.is_none(),
                    "{key} may hold no slot"
                );
            }
        }
        for ((tier, account), stored) in &self.slots {
            let used = if *tier == Tier::Medium {
                counted.remove(&**account).unwrap_or(0)
            } else {
                0
            };
            assert_eq!(*stored, Stored::Count(used), "slots of {account}");
            assert!(
                used <= u64::from(self.capacity),
                "{account} is over its slots"
            );
            if self.trusts_folder {
                assert!(
                    self.valid(*tier, account).is_some(),
                    "{account} is gone and its counter isn't"
                );
            }
        }
        assert!(counted.is_empty(), "leases without counters: {counted:?}");
        for ((tier, account), file) in &self.files {
            let there = self.slots.contains_key(&(*tier, account.clone()));
            assert_eq!(there, file.is_some(), "the counter of {account}");
        }
    }

    /// The view must be what a rebuild from the keyspace gives.
    pub(super) fn check_rebuild(&self) {
        let mut fresh = Self {
            pool: self.pool.without_keyspace(),
            capacity: self.capacity,
            rotation_ms: self.rotation_ms,
            trusts_folder: self.trusts_folder,
            records: BTreeMap::new(),
            leases: BTreeMap::new(),
            slots: BTreeMap::new(),
            cooldowns: BTreeMap::new(),
            files: BTreeMap::new(),
        };
        // Another order than things happened in.
        for ((tier, account), stored) in self.slots.iter().rev() {
            fresh.set_slots(*tier, account, *stored);
        }
        for (key, lease) in self.leases.iter().rev() {
            fresh.set_lease(key, Some(lease.clone()));
        }
        for ((tier, account), cooldown) in &self.cooldowns {
            fresh.set_cooldown(*tier, account, cooldown.clone());
        }
        for (key, record) in &self.records {
            fresh.set_record(key, Some(record.clone()));
        }
        fresh.pool.audit();
        assert_eq!(
            self.pool.differences(&fresh.pool),
            0,
            "the view has drifted from the keyspace"
        );
    }
}
