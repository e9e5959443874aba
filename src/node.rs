//! The one pool of this server, with what belongs to it: counters, how ties are
//! broken, the account files that can't be used, the watcher. Commands and
//! events reach it here, and nobody holds on to it while Redis is written to.

use crate::accounts::{Change, Watcher};
use crate::background;
use crate::errors::{CODES, Failure};
use crate::ffi;
use crate::pool::{AccountId, Choice, Effect, File, Pool, State, Tier};
use crate::rebuild::{self, Files, Rebuild};
use crate::store::{self, Observation, PoolKey};
use redis_module::{Context, ContextFlags};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, Ordering};
use std::sync::{Mutex, PoisonError, TryLockError};
use std::time::{SystemTime, UNIX_EPOCH};

/// Things put right by one command before its own work, and by the watcher at
/// a time: few enough that nobody waits for them.
pub(crate) const SETTLE_LIMIT: usize = 64;

/// Rounds of writes that may follow from one another.
const ROUNDS: usize = 8;

/// What `INFO mpool` counts, since the module was loaded.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) acquires: u64,
    pub(crate) current: u64,
    pub(crate) bound: u64,
    pub(crate) assignments: u64,
    pub(crate) rotations: u64,
    pub(crate) failovers: u64,
    /// By code, in the order of [`CODES`].
    pub(crate) refusals: [u64; CODES.len()],
}

impl Counters {
    /// Counts an acquire that was answered with an account.
    pub(crate) fn granted(&mut self, state: State) {
        self.acquires += 1;
        match state {
            State::Current => self.current += 1,
            State::Bound => self.bound += 1,
            State::Assigned => self.assignments += 1,
            State::Rotated => self.rotations += 1,
            State::Failover => self.failovers += 1,
        }
    }

    /// Counts an acquire that was refused.
    pub(crate) fn refused(&mut self, failure: &Failure) {
        self.acquires += 1;
        if let Some(count) = self.refusals.get_mut(failure.code()) {
            *count += 1;
        }
    }
}

/// Everything that the module knows.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) pool: Pool,
    /// A rebuild of it that is under way.
    pub(crate) rebuild: Option<Rebuild>,
    pub(crate) counters: Counters,
    pub(crate) choice: Choice,
    /// Account files that can't be used because of their names: tier and file,
    /// made printable.
    pub(crate) bad_names: BTreeMap<(Tier, String), &'static str>,
    /// Lines logged of files that can't be used since all were last looked at.
    pub(crate) complaints: usize,
    /// Whether this server is a primary, which puts things right.
    pub(crate) is_primary: bool,
    /// Whether this server has been a primary ever since the module was loaded:
    /// only then does its account folder say which accounts there are not.
    pub(crate) always_primary: bool,
}

impl Node {
    pub(crate) fn new(pool: Pool, choice: Choice, is_primary: bool) -> Self {
        Self {
            pool,
            rebuild: None,
            counters: Counters::default(),
            choice,
            bad_names: BTreeMap::new(),
            complaints: 0,
            is_primary,
            always_primary: is_primary,
        }
    }

    /// Tells the pool what has come or changed but for the keyspace, and the one
    /// that is being made.
    pub(crate) fn tell(&mut self, news: impl Fn(&mut Pool)) {
        news(&mut self.pool);
        if let Some(pool) = self.rebuild.as_mut().and_then(Rebuild::pool) {
            news(pool);
        }
    }

    /// Tells both what the keyspace says; but a pool that is to be replaced may be
    /// of another keyspace, or broken: of that one, the account files alone count.
    pub(crate) fn observe(&mut self, observation: &Observation<'_>) {
        if is_current() {
            observation.enter(&mut self.pool);
        }
        if let Some(pool) = self.rebuild.as_mut().and_then(Rebuild::pool) {
            observation.enter(pool);
        }
    }

    /// Tells both of an account's file.
    pub(crate) fn set_file(&mut self, tier: Tier, name: &str, file: File) {
        if let Some(pool) = self.rebuild.as_mut().and_then(Rebuild::pool) {
            pool.set_file(tier, name, file.clone());
        }
        self.pool.set_file(tier, name, file);
    }

    /// The keyspace is empty now.
    pub(crate) fn flush(&mut self) {
        self.replace(self.pool.without_keyspace());
        if let Some(rebuild) = &mut self.rebuild {
            rebuild.flushed(&self.pool);
        }
    }

    /// Puts a view of the same files in its place, made anew from the keyspace.
    pub(crate) fn adopt(&mut self, pool: Pool) {
        let was_suspect = is_suspect();
        self.replace(pool);
        match &mut self.rebuild {
            // What cut a change of the one short may have done so to the other.
            Some(rebuild) if was_suspect => rebuild.restart(&self.pool),
            Some(rebuild) => rebuild.renumbered(),
            None => {}
        }
    }

    /// The leases of the accounts' holders, by the names of their keys, unless there are too many
    /// or not all are sure to be known.
    fn names_of_holders(&self, accounts: &[AccountId]) -> Option<Vec<String>> {
        let holders = accounts.iter().flat_map(|&id| self.pool.holders(id));
        let names: Vec<String> = holders
            .take(TOLD_LIMIT + 1)
            .map(|key| PoolKey::Rotation(key).name())
            .collect();
        // A view that is made anew may know too few.
        let is_sure = is_ready() && self.rebuild.is_none();
        let few = accounts.len().max(names.len()) <= TOLD_LIMIT;
        (is_sure && few).then_some(names)
    }

    /// Answers are given from that view from here on.
    fn replace(&mut self, pool: Pool) {
        rebuild::discard(std::mem::replace(&mut self.pool, pool));
        set_ready();
        let unasked = self.rebuild.take_if(|rebuild| !rebuild.is_asked_for());
        unasked.into_iter().for_each(Rebuild::discard);
    }
}

/// Never contended: whoever comes here is on the main thread. What a lock
/// adds is that coming back in by mistake fails instead of corrupting.
static NODE: Mutex<Option<Node>> = Mutex::new(None);
static WATCHER: Mutex<Option<Watcher>> = Mutex::new(None);

/// What the view says of the keyspace; the next three.
static STATE: AtomicU8 = AtomicU8::new(READY);
/// The same.
const READY: u8 = 0;
/// It is being made anew, a portion at a time. Until that is done nobody answers
/// from it or acts on it.
const READING: u8 = 1;
/// It has to be made anew: another keyspace is there, or a panic cut a change of
/// it short.
const SUSPECT: u8 = 2;
/// Account files have yet to come in, as at a load into a running server: until
/// they have, nobody answers from the view or acts on it either.
static AWAITS_FILES: AtomicBool = AtomicBool::new(false);

/// Does something with the node. It must not call Redis meanwhile.
pub(crate) fn with<R>(run: impl FnOnce(&mut Node) -> R) -> Result<R, Failure> {
    let mut guard = match NODE.try_lock() {
        Ok(guard) => guard,
        // A panic is answered by a rebuild, see `suspect`.
        Err(TryLockError::Poisoned(poisoned)) => {
            NODE.clear_poison();
            poisoned.into_inner()
        }
        Err(TryLockError::WouldBlock) => return Err(Failure::Internal),
    };
    guard.as_mut().map(run).ok_or(Failure::Internal)
}

/// Puts a node in place, or none at the module's end.
pub(crate) fn install(node: Option<Node>) {
    *NODE.lock().unwrap_or_else(PoisonError::into_inner) = node;
    set_ready();
}

/// Puts the watcher in place; answers the one before.
pub(crate) fn install_watcher(watcher: Option<Watcher>) -> Option<Watcher> {
    std::mem::replace(
        &mut *WATCHER.lock().unwrap_or_else(PoisonError::into_inner),
        watcher,
    )
}

/// Does something with the watcher, if there is one.
pub(crate) fn with_watcher<R>(run: impl FnOnce(&Watcher) -> R) -> Option<R> {
    WATCHER
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .as_ref()
        .map(run)
}

/// Have the view made anew before it is used again.
pub(crate) fn suspect() {
    STATE.store(SUSPECT, Ordering::Relaxed);
}

pub(crate) fn is_suspect() -> bool {
    STATE.load(Ordering::Relaxed) == SUSPECT
}

/// The view is being made anew: see [`rebuild::renew`].
pub(crate) fn set_reading() {
    STATE.store(READING, Ordering::Relaxed);
}

pub(crate) fn is_reading() -> bool {
    STATE.load(Ordering::Relaxed) == READING
}

/// The view says what the keyspace says.
pub(crate) fn set_ready() {
    STATE.store(READY, Ordering::Relaxed);
}

/// Whether the view says what the keyspace says, whatever it knows of the files.
pub(crate) fn is_current() -> bool {
    STATE.load(Ordering::Relaxed) == READY
}

/// Have nothing answered before all account files have been looked at.
pub(crate) fn await_files(wait: bool) {
    AWAITS_FILES.store(wait, Ordering::Relaxed);
}

pub(crate) fn awaits_files() -> bool {
    AWAITS_FILES.load(Ordering::Relaxed)
}

/// Whether the view may be answered from and acted on.
pub(crate) fn is_ready() -> bool {
    is_current() && !awaits_files()
}

/// This server's clock, in unix ms.
#[inline(never)]
pub(crate) fn clock() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// A view made from the keyspace anew, in one go.
pub(crate) fn rebuilt(ctx: &Context) -> Result<Pool, Failure> {
    let mut pool = with(|node| node.pool.without_keyspace())?;
    let mut cursor = ffi::Cursor::new();
    while store::scan(ctx, &mut cursor, |observation| observation.enter(&mut pool)) {}
    Ok(pool)
}

/// News of the account files on their way into the pool.
#[derive(Debug)]
pub(crate) enum Arrival {
    Change(Change),
    /// All folders have been looked at; by tier, whether it could be read.
    Looked([bool; 3]),
}

/// News that the watcher has and the pool hasn't. Whoever comes first brings it
/// in: the watcher in its next turn, or a command.
static ARRIVALS: Mutex<VecDeque<Arrival>> = Mutex::new(VecDeque::new());
static HAS_ARRIVALS: AtomicBool = AtomicBool::new(false);

/// Hands over news; from any thread.
pub(crate) fn arrive(news: impl IntoIterator<Item = Arrival>) {
    let mut arrivals = ARRIVALS.lock().unwrap_or_else(PoisonError::into_inner);
    arrivals.extend(news);
    HAS_ARRIVALS.store(!arrivals.is_empty(), Ordering::Release);
}

/// Drops what has arrived, at the module's end.
pub(crate) fn forget_arrivals() {
    ARRIVALS
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clear();
    HAS_ARRIVALS.store(false, Ordering::Release);
}

/// Before anything is answered from the view, or done by what it says: brings in
/// news of account files, and makes it anew if it has to be. Fails for as long
/// as that takes.
pub(crate) fn refresh(ctx: &Context) -> Result<(), Failure> {
    take_in(ctx)?;
    if is_ready() { Ok(()) } else { make_ready(ctx) }
}

#[cold]
fn make_ready(ctx: &Context) -> Result<(), Failure> {
    if is_suspect() {
        rebuild::renew(ctx, Files::InPortions)?;
    }
    if is_ready() {
        Ok(())
    } else {
        Err(Failure::Loading)
    }
}

/// Brings in a portion of the news; answers whether there is more.
pub(crate) fn take_in(ctx: &Context) -> Result<bool, Failure> {
    if HAS_ARRIVALS.load(Ordering::Acquire) {
        take_in_news(ctx)
    } else {
        Ok(false)
    }
}

#[cold]
fn take_in_news(ctx: &Context) -> Result<bool, Failure> {
    let (news, more) = {
        let mut arrivals = ARRIVALS.lock().unwrap_or_else(PoisonError::into_inner);
        let count = arrivals.len().min(SETTLE_LIMIT);
        let news: Vec<Arrival> = arrivals.drain(..count).collect();
        HAS_ARRIVALS.store(!arrivals.is_empty(), Ordering::Release);
        (news, !arrivals.is_empty())
    };
    // First of all: nothing that goes wrong here may have them awaited for ever.
    if news.iter().any(|news| matches!(news, Arrival::Looked(_))) {
        await_files(false);
    }
    tell_of(ctx, &news);
    with(|node| {
        for arrival in news {
            match arrival {
                Arrival::Change(change) => background::enter(node, change),
                Arrival::Looked(readable) => background::trust(node, readable),
            }
        }
    })?;
    Ok(more)
}

/// Accounts, and holders of theirs, told of one by one at once; it is quicker to tell of all
/// than of more. More than a portion of news is of, where accounts have two slots.
const TOLD_LIMIT: usize = 256;
/// Until when those whose tokens have ended have been told of, by this server's clock, in
/// unix ms.
static TOLD_UNTIL: AtomicI64 = AtomicI64::new(i64::MAX);

/// Has whoever remembers leases of accounts ask for them again when their files say
/// something else: a token is in no key of Redis's.
fn tell_of(ctx: &Context, news: &[Arrival]) {
    let changes = news.iter().filter_map(|news| match news {
        Arrival::Change(change) => Some(change.key()),
        Arrival::Looked(_) => None,
    });
    let mut changes = changes.peekable();
    if changes.peek().is_some() {
        let names = with(|node| {
            let ids = changes.filter_map(|(tier, name)| node.pool.find_account(tier, name));
            node.names_of_holders(&ids.collect::<Vec<_>>())
        });
        signal(ctx, names.ok().flatten());
    }
}

/// The same where tokens have ended since the last time.
pub(crate) fn tell_of_ends(ctx: &Context) {
    if !is_ready() {
        return;
    }
    let now = clock();
    let from = TOLD_UNTIL.swap(now, Ordering::Relaxed);
    let names = with(|node| {
        let ended: Vec<_> = node.pool.ended(from, now).take(TOLD_LIMIT + 1).collect();
        // Mostly there are none.
        (!ended.is_empty()).then(|| node.names_of_holders(&ended))
    });
    if let Ok(Some(names)) = names {
        signal(ctx, names);
    }
}

/// Has Redis tell those who track these leases that they have changed; all leases if there
/// are no names.
fn signal(ctx: &Context, names: Option<Vec<String>>) {
    match names {
        Some(names) => names.iter().for_each(|name| store::signal(ctx, name)),
        None => store::signal_all(ctx),
    }
}

/// Before a command that may write: puts right what changes by hand have left,
/// as far as one command should.
pub(crate) fn prepare(ctx: &Context) -> Result<(), Failure> {
    refresh(ctx)?;
    settle(ctx, SETTLE_LIMIT).map(drop)
}

/// Puts right up to `limit` things; answers whether more may be left.
pub(crate) fn settle(ctx: &Context, limit: usize) -> Result<bool, Failure> {
    let (effects, more) = with(|node| {
        if !node.pool.has_backlog() {
            return (Vec::new(), false);
        }
        let effects = node.pool.settle(limit);
        if let Some(rebuild) = &mut node.rebuild {
            rebuild.count(&effects);
        }
        (effects, node.pool.has_backlog())
    })?;
    apply(ctx, &effects)?;
    Ok(more)
}

/// Carries effects out, and the counters that follow from them. All of it
/// reaches replicas and the append-only file as one transaction.
pub(crate) fn apply(ctx: &Context, effects: &[Effect]) -> Result<(), Failure> {
    if effects.is_empty() {
        return Ok(());
    }
    with(|node| node.pool.begin())?;
    let mut outcome = store::apply(ctx, effects);
    // Leases, then counters, then nothing: more rounds than a few would mean
    // that writes don't come back as notifications.
    for _ in 0..ROUNDS {
        let following = with(|node| node.pool.settle_touched())?;
        if outcome.is_err() || following.is_empty() {
            break;
        }
        outcome = store::apply(ctx, &following);
    }
    with(|node| node.pool.end())?;
    outcome
}

/// The same for a command that the server would refuse when it is out of
/// memory: then nothing is written.
pub(crate) fn apply_unless_full(ctx: &Context, effects: &[Effect]) -> Result<(), Failure> {
    // Over its limit, the server may still find room by evicting; only it knows.
    if !effects.is_empty() && ctx.get_flags().contains(ContextFlags::OOM) && !store::has_room(ctx) {
        return Err(Failure::OutOfMemory);
    }
    apply(ctx, effects)
}
