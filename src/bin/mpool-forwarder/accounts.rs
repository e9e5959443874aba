//! What this process has learned of each account from the upstream, and the
//! rules by which an account in trouble is taken out of the pool. Time comes in
//! as ms since some beginning; nothing here asks a clock or does anything.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Failures of the connection in a row after which an account is suspected.
const FAILURES: u32 = 3;
/// A refusal this soon after a good answer may be the request's fault, in ms.
const WELL_FOR: u64 = 10 * 60 * 1000;
/// Refusals in a row after which it is the account's fault in any case.
const REFUSALS: u32 = 3;
/// How often the cooldown doubles, and the most it grows to, in first cooldowns.
const LONGEST: u32 = 10;

/// One account, as far as requests have told.
#[derive(Debug)]
pub struct Account {
    pub name: Box<str>,
    /// When the upstream last answered with anything but a refusal; 0: never.
    well_at: AtomicU64,
    trouble: Mutex<Trouble>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Trouble {
    /// Refusals in a row.
    refused: u32,
    /// Broken connections in a row, and when the first was.
    failed: u32,
    failing_since: u64,
    /// Cooldowns without a good answer since.
    cooldowns: u32,
}

impl Account {
    fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            well_at: AtomicU64::new(0),
            trouble: Mutex::default(),
        }
    }

    fn trouble(&self) -> MutexGuard<'_, Trouble> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The upstream has answered, and not refused the account.
    pub fn well(&self, now: u64) {
        self.well_at.store(now.max(1), Ordering::Relaxed);
        let mut trouble = self.trouble();
        if *trouble != Trouble::default() {
            *trouble = Trouble::default();
        }
    }

    fn well_since(&self, then: u64) -> bool {
        let at = self.well_at.load(Ordering::Relaxed);
        at != 0 && at >= then
    }

    /// The upstream has refused the account: for how long to cool it down, in
    /// units of the first cooldown.
    pub fn refused(&self) -> u32 {
        let mut trouble = self.trouble();
        trouble.refused += 1;
        trouble.cool()
    }

    /// Whether the request rather than the account may be at fault, when no
    /// other account could take the request or the next one refused it too: the
    /// account was well a moment ago. So one client's bad requests can't empty
    /// the pool.
    pub fn may_be_innocent(&self, now: u64) -> bool {
        self.well_since(now.saturating_sub(WELL_FOR)) && self.trouble().refused < REFUSALS
    }

    /// The account was put back.
    pub fn put_back(&self) {
        let mut trouble = self.trouble();
        trouble.cooldowns = trouble.cooldowns.saturating_sub(1);
    }
}

impl Trouble {
    fn cool(&mut self) -> u32 {
        let units = 1_u32
            .checked_shl(self.cooldowns)
            .unwrap_or(LONGEST)
            .min(LONGEST);
        self.cooldowns = self.cooldowns.saturating_add(1).min(31);
        units
    }
}

/// All accounts that requests have met.
#[derive(Debug, Default)]
pub struct Accounts {
    by_name: Mutex<HashMap<Box<str>, Arc<Account>>>,
}

impl Accounts {
    fn all(&self) -> MutexGuard<'_, HashMap<Box<str>, Arc<Account>>> {
        self.by_name.lock().unwrap_or_else(PoisonError::into_inner)
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
        Some(trouble.cool())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_in_a_row_cool_longer_and_a_good_answer_forgives() {
        let accounts = Accounts::default();
        let account = accounts.named("a");
        let units: Vec<u32> = (0..6).map(|_| account.refused()).collect();
        assert_eq!(units, [1, 2, 4, 8, 10, 10]);
        account.well(5);
        assert_eq!(account.refused(), 1);
    }

    #[test]
    fn one_bad_request_is_not_held_against_an_account_that_is_well() {
        let account = Account::new("a");
        assert!(!account.may_be_innocent(WELL_FOR), "it has never been well");
        account.well(1000);
        account.refused();
        assert!(account.may_be_innocent(2000));
        account.refused();
        assert!(account.may_be_innocent(2000));
        account.refused();
        assert!(!account.may_be_innocent(2000), "three in a row");
        account.well(3000);
        account.refused();
        assert!(
            !account.may_be_innocent(3001 + WELL_FOR),
            "that was long ago"
        );
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
