//! What this process has learned of each account from the upstream, and the
//! rules by which an account in trouble is taken out of the pool, while neither
//! one client's bad requests nor trouble of the upstream as a whole empty it.
//! Time comes in as ms since some beginning; nothing here asks a clock.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Failures of the connection in a row after which an account is suspected.
const FAILURES: u32 = 3;
/// How often the cooldown doubles, and the most it grows to, in first cooldowns.
const LONGEST: u32 = 10;
/// For how long a key that had an account taken out of the pool is not believed,
/// in ms, until another account has answered the same request well: long enough
/// that it can do no harm, short enough for one that met two dead accounts.
pub const DOUBT: u64 = 5000;
/// The most that grows to, doubling from one offence to the next.
const LONGEST_DOUBT: u64 = 640_000;
/// Of so many accounts one may be out for broken connections at a time.
const ONE_OUT_OF: usize = 5;
/// Keys that are kept in mind at once.
const MOST_SUSPECTS: usize = 10_000;

/// One account of the pool, as far as requests have told.
#[derive(Debug)]
pub struct Account {
    pub name: Box<str>,
    /// When the upstream last answered with anything but a refusal; 0: never.
    well_at: AtomicU64,
    /// When a connection last broke for it; 0: never.
    failed_at: AtomicU64,
    trouble: Mutex<Trouble>,
    /// Whether a good answer may have something to forgive: all threads look at this at
    /// each of them, and write it only when there is.
    is_troubled: AtomicBool,
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
    /// When the last one for broken connections ends.
    broken_until: u64,
}

impl Account {
    pub fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            well_at: AtomicU64::new(0),
            failed_at: AtomicU64::new(0),
            trouble: Mutex::default(),
            is_troubled: AtomicBool::new(false),
            turn: tokio::sync::Mutex::new(()),
        }
    }

    fn trouble(&self) -> MutexGuard<'_, Trouble> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The upstream has answered, and not refused the account.
    pub fn well(&self, now: u64) {
        let now = now.max(1);
        if self.well_at.load(Ordering::Relaxed) != now {
            self.well_at.store(now, Ordering::Relaxed);
        }
        if self.is_troubled.load(Ordering::Relaxed) {
            let mut trouble = self.trouble();
            *trouble = Trouble {
                cooled_at: trouble.cooled_at,
                broken_until: trouble.broken_until,
                ..Trouble::default()
            };
            self.is_troubled.store(false, Ordering::Relaxed);
        }
    }

    /// To hold something against the account.
    fn new_trouble(&self) -> MutexGuard<'_, Trouble> {
        let trouble = self.trouble();
        self.is_troubled.store(true, Ordering::Relaxed);
        trouble
    }

    fn well_since(&self, then: u64) -> bool {
        let at = self.well_at.load(Ordering::Relaxed);
        at != 0 && at >= then
    }

    fn failed_since(&self, then: u64) -> bool {
        let at = self.failed_at.load(Ordering::Relaxed);
        at != 0 && at >= then
    }

    /// The upstream has refused the account for a request of this key: for how
    /// long to cool it down, in units of the first cooldown.
    pub fn refused(&self, key: u64, now: u64) -> u32 {
        let mut trouble = self.new_trouble();
        trouble.blame(key);
        trouble.cool(now)
    }

    /// It has, but another account did so too: only noted.
    pub fn refused_too(&self, key: u64) {
        self.new_trouble().blame(key);
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

    /// The account was put back: nothing is held against it.
    pub fn put_back(&self) {
        let mut trouble = self.trouble();
        trouble.cooldowns = trouble.cooldowns.saturating_sub(1);
        trouble.refused = 0;
        trouble.by_several = false;
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

/// For how long a key is not believed, in ms.
#[derive(Debug, Clone, Copy)]
struct Doubt {
    until: u64,
    span: u64,
}

/// All accounts that requests have met, and keys that are not believed.
#[derive(Debug, Default)]
pub struct Accounts {
    by_name: Mutex<HashMap<Box<str>, Arc<Account>>>,
    /// By the keys' hashes.
    suspects: Mutex<HashMap<u64, Doubt>>,
    hasher: RandomState,
}

impl Accounts {
    fn all(&self) -> MutexGuard<'_, HashMap<Box<str>, Arc<Account>>> {
        self.by_name.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn suspects(&self) -> MutexGuard<'_, HashMap<u64, Doubt>> {
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

    /// What speaks against accounts is not believed of this key for a while: at
    /// least `least` ms, twice as long as the last time if that is not long ago.
    pub fn doubt(&self, key: u64, least: u64, now: u64) {
        let mut suspects = self.suspects();
        if suspects.len() >= MOST_SUSPECTS {
            suspects.retain(|_, doubt| doubt.until > now);
        }
        let recent = suspects
            .get(&key)
            .filter(|doubt| now < doubt.until.saturating_add(doubt.span));
        let span = recent
            .map_or(0, |doubt| doubt.span.saturating_mul(2).min(LONGEST_DOUBT))
            .max(least);
        let until = now.saturating_add(span);
        if suspects.len() < MOST_SUSPECTS || suspects.contains_key(&key) {
            suspects.insert(key, Doubt { until, span });
        }
    }

    pub fn is_suspect(&self, key: u64, now: u64) -> bool {
        self.suspects()
            .get(&key)
            .is_some_and(|doubt| doubt.until > now)
    }

    /// What the key said of an account has proved true.
    pub fn believe(&self, key: u64) {
        self.suspects().remove(&key);
    }

    /// A connection to the upstream broke on a request of this account. Answers
    /// for how long to cool it down, in units of the first cooldown of `unit` ms:
    /// when it has happened some times in a row, while at least as many other
    /// accounts were answered well and met no such thing as did, and few are out
    /// for it already. Else it is the upstream as a whole, and the pool must not
    /// be drained for that.
    pub fn failed(&self, account: &Account, unit: u64, now: u64) -> Option<u32> {
        account.failed_at.store(now.max(1), Ordering::Relaxed);
        let since = {
            let mut trouble = account.new_trouble();
            if trouble.failed == 0 {
                trouble.failing_since = now.max(1);
            }
            trouble.failed += 1;
            if trouble.failed < FAILURES {
                return None;
            }
            trouble.failing_since
        };
        let all = self.all();
        let (mut sound, mut failing, mut out) = (0, 0, 0);
        for other in all.values().filter(|other| other.name != account.name) {
            let is_out = other.trouble().broken_until > now;
            out += usize::from(is_out);
            // What is out has no say.
            failing += usize::from(!is_out && other.failed_since(since));
            // In the same ms it may have been well before.
            sound += usize::from(other.well_since(since + 1) && !other.failed_since(since));
        }
        let most_out = (all.len() / ONE_OUT_OF).max(1);
        drop(all);
        if sound == 0 || sound < failing || out >= most_out {
            return None;
        }
        let mut trouble = account.new_trouble();
        trouble.failed = 0;
        let units = trouble.cool(now);
        trouble.broken_until = now.saturating_add(unit.saturating_mul(units.into()));
        Some(units)
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
    fn a_suspect_is_believed_again_after_a_while_or_when_it_proves_right() {
        let accounts = Accounts::default();
        let (one, two) = (accounts.key(b"one"), accounts.key(b"two"));
        let spans = |times: &[u64]| -> Vec<u64> {
            let ends = |now: &u64| {
                accounts.doubt(one, 10, *now);
                (*now..).find(|at| !accounts.is_suspect(one, *at)).unwrap() - now
            };
            times.iter().map(ends).collect()
        };
        assert_eq!(spans(&[100, 105, 200]), [10, 20, 10]);
        assert!(!accounts.is_suspect(two, 205));
        accounts.believe(one);
        assert!(!accounts.is_suspect(one, 205));
        assert_eq!(spans(&[206]), [10]);
        for key in 0..MOST_SUSPECTS as u64 + 5 {
            accounts.doubt(key, 50, 250);
        }
        assert_eq!(accounts.suspects().len(), MOST_SUSPECTS);
        accounts.doubt(one, 100, 300);
        assert_eq!(accounts.suspects().len(), 1);
        for _ in 0..100 {
            accounts.doubt(one, 100, 300);
        }
        assert!(!accounts.is_suspect(one, 300 + LONGEST_DOUBT));
    }

    #[test]
    fn an_account_that_was_put_back_begins_anew() {
        let account = Account::new("a");
        account.refused(1, 9);
        account.put_back();
        assert_eq!(account.refused(2, 10), 1);
        assert!(account.is_innocent_beside_another());
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
                assert_eq!(accounts.failed(&accounts.named(name), 1000, now), None);
            }
        }
    }

    /// All is well with b, and a breaks within the ms in which the upstream goes.
    #[test]
    fn a_good_answer_of_the_same_moment_speaks_for_nobody() {
        let accounts = Accounts::default();
        let (a, b) = (accounts.named("a"), accounts.named("b"));
        b.well(10);
        let failures = [10, 11, 12].map(|now| accounts.failed(&a, 1000, now));
        assert_eq!(failures, [None; 3]);
        b.well(13);
        assert_eq!(accounts.failed(&a, 1000, 14), Some(1));
    }

    #[test]
    fn an_upstream_that_breaks_most_connections_does_not_drain_the_pool() {
        let accounts = Accounts::default();
        let all: Vec<_> = (0..10).map(|n| accounts.named(&n.to_string())).collect();
        // Of ten requests six break, spread over the accounts alike.
        let mut out = 0;
        for now in 1..10_000_u64 {
            let account = &all[(now % 10) as usize];
            if (now / 10 * 7 + now * 3) % 10 < 6 {
                out += u32::from(accounts.failed(account, 1_000_000, now).is_some());
            } else {
                account.well(now);
            }
        }
        assert!(out <= 2, "{out}");
    }

    #[test]
    fn an_account_that_alone_keeps_failing_is_cooled() {
        let accounts = Accounts::default();
        let (a, b) = (accounts.named("a"), accounts.named("b"));
        let failed = |account: &Account, now| accounts.failed(account, 5, now);
        assert_eq!(failed(&a, 20), None);
        b.well(21);
        assert_eq!(failed(&a, 22), None);
        assert_eq!(failed(&a, 23), Some(1));
        // An answer in between begins the row anew.
        failed(&a, 30);
        a.well(31);
        b.well(32);
        assert_eq!(failed(&a, 33), None);
        assert_eq!(failed(&a, 34), None);
        assert_eq!(failed(&a, 35), None, "b has not been well since");
        b.well(36);
        assert_eq!(failed(&a, 37), Some(1));
        // Not both at a time.
        a.well(38);
        assert_eq!([38, 39, 40].map(|now| failed(&b, now)), [None; 3]);
        a.well(42);
        assert_eq!(failed(&b, 42), Some(1), "a is back");
    }

    #[test]
    fn two_accounts_of_many_may_fail() {
        let accounts = Accounts::default();
        let all: Vec<_> = (0..10).map(|n| accounts.named(&n.to_string())).collect();
        let mut out = Vec::new();
        for now in 1..10 {
            for account in &all[2..] {
                account.well(now);
            }
            for account in &all[..2] {
                if accounts.failed(account, 1000, now).is_some() {
                    out.push(&*account.name);
                }
            }
        }
        out.sort_unstable();
        out.dedup();
        assert_eq!(out, ["0", "1"]);
    }
}
