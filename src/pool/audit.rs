//! The view against itself, from scratch: every index must be exactly what the
//! keys and accounts say. For tests and fuzz targets, after every step.

use super::account::Class;
use super::index::TierIndex;
use super::{AccountId, File, KeyId, Pool, Tier};
use std::collections::{BTreeMap, BTreeSet};

impl Pool {
    /// Panics with what is wrong, if anything is.
    pub(crate) fn audit(&self) {
        assert!(!self.supposing, "leases are still taken away on trial");
        let mut due = BTreeSet::new();
        let mut holders: BTreeMap<AccountId, BTreeSet<KeyId>> = BTreeMap::new();
        let mut refs: BTreeMap<AccountId, u32> = BTreeMap::new();
        for (slot, key) in self.keys.iter() {
            let id = KeyId::new(slot).unwrap();
            assert_eq!(
                self.find_key(key.name.bytes()),
                Some(id),
                "a key can't be found"
            );
            if let Some(account) = key.holds {
                due.insert((key.due(), id));
                holders.entry(account).or_default().insert(id);
            }
            for account in [key.previous, key.bound].into_iter().flatten() {
                *refs.entry(account).or_default() += 1;
            }
            assert!(!key.is_idle(), "a key of which nothing is known was kept");
        }
        assert_eq!(self.due, due, "due");
        assert_eq!(self.key_names.len(), self.keys.len());
        assert_eq!(self.account_names.len(), self.accounts.len());

        let mut tiers: [TierIndex; 3] = std::array::from_fn(|_| TierIndex::new(self.capacity));
        for (slot, account) in self.accounts.iter() {
            let id = AccountId::new(slot).unwrap();
            let name: &str = &account.name;
            assert_eq!(
                self.find_account(account.tier, &account.name),
                Some(id),
                "an account can't be found"
            );
            let held: BTreeSet<KeyId> = account.holders.iter().copied().collect();
            assert_eq!(
                held.len(),
                account.holders.len(),
                "a key holds two slots of one account"
            );
            assert_eq!(
                held,
                holders.remove(&id).unwrap_or_default(),
                "holders of {name}"
            );
            assert_eq!(
                account.refs,
                refs.remove(&id).unwrap_or(0),
                "refs of {name}"
            );
            assert_eq!(
                account.class,
                account.class_at(self.horizon),
                "class of {name}"
            );
            assert!(
                !account.is_idle(),
                "an account of which nothing is known was kept"
            );
            let index = &mut tiers[account.tier.index()];
            index.tally.count(account, self.capacity, true);
            let stale = matches!(account.class, Class::Cooling | Class::Expired);
            if stale && !account.holders.is_empty() {
                index.stale.insert(id);
            }
            if let File::Valid(credential) = &account.file {
                if account.is_cooled() {
                    index.cooldowns.insert((account.cools_until, id));
                }
                index
                    .expiries
                    .extend(credential.expires_at.map(|end| (end, id)));
            }
            let used = account.holders.len();
            let lendable = account.class == Class::Lendable && used < self.capacity as usize;
            assert_eq!(account.in_bucket, lendable, "bucket of {name}");
            if lendable {
                let place = self.places.get(id.slot()) as usize;
                let found = self.tier(account.tier).buckets[used].get(place);
                assert_eq!(found, Some(&id), "place of {name}");
                index.buckets[used].push(id);
            }
            for (seat, key) in account.holders.iter().enumerate() {
                assert_eq!(
                    self.seats.get(key.slot()) as usize,
                    seat,
                    "a seat at {name}"
                );
            }
            let off = self.account_is_off(id);
            assert!(!off || account.queued, "{name} is off and nobody knows");
        }
        assert!(
            holders.is_empty() && refs.is_empty(),
            "keys name accounts that are gone"
        );
        for tier in Tier::ALL {
            let (kept, counted) = (self.tier(tier), &mut tiers[tier.index()]);
            assert_eq!(kept.tally, counted.tally, "tally of {tier}");
            assert_eq!(kept.stale, counted.stale, "stale of {tier}");
            let first = kept.buckets.iter().find(|bucket| !bucket.is_empty());
            assert_eq!(
                kept.least_used(),
                first.map(Vec::as_slice),
                "the least used of {tier}"
            );
            assert_eq!(kept.cooldowns, counted.cooldowns, "cooldowns of {tier}");
            assert_eq!(kept.expiries, counted.expiries, "expiries of {tier}");
            for (kept, counted) in kept.buckets.iter().zip(&counted.buckets) {
                assert_eq!(kept.len(), counted.len(), "a bucket holds leftovers");
            }
        }
        for (slot, key) in self.keys.iter() {
            let off = self.key_is_off(KeyId::new(slot).unwrap());
            assert!(!off || key.queued, "a key is off and nobody knows");
        }
    }
}
