//! What this process has learned of each account from the upstream, and the
//! rules by which an account in trouble is taken out of the pool, while neither
//! one client's bad requests nor trouble of the upstream as a whole empty it.
//! Time comes in as ms since some beginning; nothing here asks a clock.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Failures of the connection in a row after which an account is suspected.
const FAILURES: u32 = 3;
/// How often the cooldown doubles, and the most it grows to, in first cooldowns.
const LONGEST: u32 = 10;
/// For how long a key whose request two accounts refused is not believed, in ms:
/// long enough that it can do no harm, short enough for one that met two dead accounts.
pub const DOUBT: u64 = 5000;
/// Keys that are kept in mind at once.
const MOST_SUSPECTS: usize = 10_000;

/// One account of the pool, as far as requests have told.
#[derive(Debug)]
pub struct Account {
    pub name: Box<str>,
    /// When the upstream last answered with anything but a refusal; 0: never.
    well_at: AtomicU64,
    trouble: Mutex<Trouble>,
    /// Held by the request that looks for another account, so that the others
    /// that were refused with it follow instead of doing the same again.
    pub turn: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Trouble {
    /// Refusals in a row, whose request the first was, and whether others had the same.
    refused: u32,
    first: u64,
    by_several: bool,
    /// Broken connections in a row, and when the first was.
    failed: u32,
    failing_since: u64,
    /// Cooldowns without a good answer since.
    cooldowns: u32,
    /// When the last one began.
    cooled_at: u64,
}

impl Account {
    pub fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            well_at: AtomicU64::new(0),
            trouble: Mutex::default(),
            turn: tokio::sync::Mutex::new(()),
        }
    }

    fn trouble(&self) -> MutexGuard<'_, Trouble> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The upstream has answered, and not refused the account.
    pub fn well(&self, now: u64) {
        self.well_at.store(now.max(1), Ordering::Relaxed);
        let mut trouble = self.trouble();
        if trouble.refused + trouble.failed + trouble.cooldowns > 0 {
            *trouble = Trouble {
                cooled_at: trouble.cooled_at,
                ..Trouble::default()
            };
        }
    }

    fn well_since(&self, then: u64) -> bool {
        let at = self.well_at.load(Ordering::Relaxed);
        at != 0 && at >= then
    }

    /// The upstream has refused the account for a request of this key: for how
    /// long to cool it down, in units of the first cooldown.
    pub fn refused(&self, key: u64, now: u64) -> u32 {
        let mut trouble = self.trouble();
        trouble.blame(key);
        trouble.cool(now)
    }

    /// It has, but another account did so too: only noted.
    pub fn refused_too(&self, key: u64) {
        self.trouble().blame(key);
    }

    /// Whether the account has been cooled down at or after `then`.
    pub fn cooled_since(&self, then: u64) -> bool {
        let trouble = self.trouble();
        trouble.cooled_at != 0 && trouble.cooled_at >= then
    }

    /// Whether the request rather than the account may be at fault, when no
    /// other account could take it: the account has been well before, and only
    /// one key met refusals since.
    pub fn may_be_innocent(&self) -> bool {
        self.well_since(1) && !self.trouble().by_several
    }

    /// Whether the request rather than the account is at fault, when another
    /// account refused it too: unless several keys met refusals and none a good
    /// answer.
    pub fn is_innocent_beside_another(&self) -> bool {
        !self.trouble().by_several
    }

    /// The account was put back.
    pub fn put_back(&self) {
        let mut trouble = self.trouble();
        trouble.cooldowns = trouble.cooldowns.saturating_sub(1);
    }
}

impl Trouble {
    fn blame(&mut self, key: u64) {
        if self.refused == 0 {
            self.first = key;
        }
        self.by_several |= self.first != key;
        self.refused = self.refused.saturating_add(1);
    }

    fn cool(&mut self, now: u64) -> u32 {
        let units = 1_u32
            .checked_shl(self.cooldowns)
            .unwrap_or(LONGEST)
            .min(LONGEST);
        self.cooldowns = self.cooldowns.saturating_add(1).min(31);
        self.cooled_at = now.max(1);
        units
    }
}

/// All accounts that requests have met, and keys that are not believed.
#[derive(Debug, Default)]
pub struct Accounts {
    by_name: Mutex<HashMap<Box<str>, Arc<Account>>>,
    /// Until when, by the keys' hashes.
    suspects: Mutex<HashMap<u64, u64>>,
    hasher: RandomState,
}

impl Accounts {
    fn all(&self) -> MutexGuard<'_, HashMap<Box<str>, Arc<Account>>> {
        self.by_name.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn suspects(&self) -> MutexGuard<'_, HashMap<u64, u64>> {
        self.suspects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn named(&self, name: &str) -> Arc<Account> {
        let mut all = self.all();
        if let Some(account) = all.get(name) {
            return Arc::clone(account);
        }
        let account = Arc::new(Account::new(name));
        all.insert(name.into(), Arc::clone(&account));
        account
    }

    /// A key, as the rules tell keys apart.
    pub fn key(&self, key: &[u8]) -> u64 {
        self.hasher.hash_one(key)
    }

    /// What speaks against accounts is not believed of this key until `until`.
    pub fn suspect(&self, key: u64, until: u64, now: u64) {
        let mut suspects = self.suspects();
        if suspects.len() >= MOST_SUSPECTS {
            suspects.retain(|_, until| *until > now);
        }
        if suspects.len() < MOST_SUSPECTS {
            suspects.insert(key, until);
        }
    }

    pub fn is_suspect(&self, key: u64, now: u64) -> bool {
        self.suspects().get(&key).is_some_and(|until| *until > now)
    }

    /// The key has got a good answer.
    pub fn believe(&self, key: u64) {
        let mut suspects = self.suspects();
        if !suspects.is_empty() {
            suspects.remove(&key);
        }
    }

    /// A connection to the upstream broke, or could not be made, for a request
    /// of this account. Answers for how long to cool it down, in units of the
    /// first cooldown: when it has happened some times in a row, and another
    /// account has been answered well meanwhile. Without the latter it is the
    /// upstream as a whole, and the pool must not be drained for that.
    pub fn failed(&self, account: &Account, now: u64) -> Option<u32> {
        let since = {
            let mut trouble = account.trouble();
            if trouble.failed == 0 {
                trouble.failing_since = now;
            }
            trouble.failed += 1;
            if trouble.failed < FAILURES {
                return None;
            }
            trouble.failing_since
        };
        let others_are_well = self
            .all()
            .values()
            .any(|other| other.name != account.name && other.well_since(since.max(1)));
        if !others_are_well {
            return None;
        }
        let mut trouble = account.trouble();
        trouble.failed = 0;
        Some(trouble.cool(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_in_a_row_cool_longer_and_a_good_answer_forgives() {
        let accounts = Accounts::default();
        let account = accounts.named("a");
        let units: Vec<u32> = (0..6).map(|_| account.refused(1, 9)).collect();
        assert_eq!(units, [1, 2, 4, 8, 10, 10]);
        account.well(5);
        assert_eq!(account.refused(1, 9), 1);
    }

    #[test]
    fn one_keys_bad_requests_are_not_held_against_an_account_that_was_well() {
        let account = Account::new("a");
        account.refused(1, 9);
        assert!(!account.may_be_innocent(), "it has never been well");
        account.well(1000);
        for now in 1001..1010 {
            account.refused(1, now);
            assert!(account.may_be_innocent());
        }
        account.refused(2, 1011);
        assert!(!account.may_be_innocent(), "two keys say so");
    }

    #[test]
    fn what_two_accounts_refuse_is_the_requests_fault_unless_several_keys_say_so() {
        let account = Account::new("a");
        for _ in 0..10 {
            account.refused(1, 9);
            assert!(account.is_innocent_beside_another());
        }
        account.refused_too(2);
        assert!(!account.is_innocent_beside_another());
        account.well(10);
        account.refused(2, 11);
        assert!(account.is_innocent_beside_another());
        assert!(account.cooled_since(11) && !account.cooled_since(12));
    }

    #[test]
    fn a_suspect_is_believed_again_after_a_while_or_a_good_answer() {
        let accounts = Accounts::default();
        let (one, two) = (accounts.key(b"one"), accounts.key(b"two"));
        accounts.suspect(one, 10, 5);
        assert!(
            accounts.is_suspect(one, 9)
                && !accounts.is_suspect(one, 10)
                && !accounts.is_suspect(two, 9)
        );
        accounts.believe(one);
        assert!(!accounts.is_suspect(one, 9));
        for key in 0..MOST_SUSPECTS as u64 + 5 {
            accounts.suspect(key, 100, 50);
        }
        assert_eq!(accounts.suspects().len(), MOST_SUSPECTS);
        accounts.suspect(one, 300, 200);
        assert_eq!(accounts.suspects().len(), 1);
    }

    #[test]
    fn the_upstream_as_a_whole_does_not_drain_the_pool() {
        let accounts = Accounts::default();
        let names = ["a", "b", "c"];
        for name in names {
            accounts.named(name).well(10);
        }
        for now in 20..100 {
            for name in names {
                assert_eq!(accounts.failed(&accounts.named(name), now), None);
            }
        }
    }

    #[test]
    fn an_account_that_alone_keeps_failing_is_cooled() {
        let accounts = Accounts::default();
        let (a, b) = (accounts.named("a"), accounts.named("b"));
        assert_eq!(accounts.failed(&a, 20), None);
        b.well(21);
        assert_eq!(accounts.failed(&a, 22), None);
        assert_eq!(accounts.failed(&a, 23), Some(1));
        // An answer in between begins the row anew.
        accounts.failed(&a, 30);
        a.well(31);
        b.well(32);
        assert_eq!(accounts.failed(&a, 33), None);
        assert_eq!(accounts.failed(&a, 34), None);
        assert_eq!(accounts.failed(&a, 35), None, "b has not been well since");
        b.well(36);
        assert_eq!(accounts.failed(&a, 37), Some(1));
    }
}
