//! A view that is made anew beside the one there is, a portion at a time, so that
//! the server stands still at no size. What happens meanwhile is told to both
//! ([`Node::tell`], [`Node::observe`]), so each portion finds both as the keyspace is.
//!
//! For `MPOOL.REPAIR` the one there is stays in use; at the end the two are
//! compared, and the new one takes its place. For a keyspace that is new to the
//! module, or after a panic, no view is in use until the new one is
//! ([`node::is_ready`]).

use crate::accounts::Watcher;
use crate::background::Turn;
use crate::errors::Failure;
use crate::ffi;
use crate::node::{self, Node};
use crate::pool::{Difference, Effect, Pool, Walk};
use crate::store;
use redis_module::Context;
use redis_module::logging::RedisLogLevel;
use std::fmt;
use std::time::{Duration, Instant};

/// How long a portion takes at most, give or take its last step.
const PORTION: Duration = Duration::from_micros(500);
/// What may be done at once of a view without which nothing can be answered:
/// enough for hundreds of keys, and with a portion right after it less than the
/// 2 ms that no stall may exceed (benches/stalls.rs). In processor time: a small
/// pool is read at once though its server has to wait for a processor; and though
/// the build is one for debugging, which takes five times as long for the same.
const BUDGET: Duration = Duration::from_millis(if cfg!(debug_assertions) { 5 } else { 1 });
/// Accounts, or keys, that a step deals with: a few microseconds' work.
const STEP: usize = 16;

/// What had to be changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Repaired {
    pub(crate) counters: u64,
    pub(crate) leases: u64,
    /// Keys and accounts of which the view in use said something else.
    pub(crate) view: u64,
}

impl Repaired {
    /// Counts what is put right with the keyspace.
    pub(crate) fn count(&mut self, effects: &[Effect]) {
        for effect in effects {
            match effect {
                Effect::Slots { .. } | Effect::Uncount { .. } | Effect::Leave { .. } => {
                    self.counters += 1;
                }
                _ => self.leases += 1,
            }
        }
    }
}

/// Whoever waits for a repair's end.
pub(crate) type Waiter = Box<dyn FnOnce(Result<Repaired, Failure>) + Send>;

/// A rebuild under way.
pub(crate) struct Rebuild {
    /// The view that is being made; once it is in use, the one before.
    pool: Pool,
    phase: Phase,
    repaired: Repaired,
    waiting: Vec<Waiter>,
    /// Those who came too late for this one: the next is theirs.
    late: Vec<Waiter>,
}

enum Phase {
    /// The account files, as the view there is has them.
    Files(usize),
    Keyspace(ffi::Cursor),
    /// What the view in use says, against the new one.
    Compare(Walk),
    /// What the new one says of which the view in use has nothing.
    Absent(Walk),
    /// The new view is in use; what it has found at odds is put right.
    Settle,
}

/// How account files come into a view that is made anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Files {
    /// Before anything else; for who has just read them all from the disk.
    AtOnce,
    InPortions,
}

impl fmt::Debug for Rebuild {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rebuild").finish_non_exhaustive()
    }
}

impl Rebuild {
    fn new(view: &Pool, waiting: Vec<Waiter>) -> Self {
        Self {
            pool: view.with_nothing(),
            phase: Phase::Files(0),
            repaired: Repaired::default(),
            waiting,
            late: Vec::new(),
        }
    }

    /// The view that is being made, unless it is in use already.
    pub(crate) fn pool(&mut self) -> Option<&mut Pool> {
        (!self.is_settling()).then_some(&mut self.pool)
    }

    fn is_settling(&self) -> bool {
        matches!(self.phase, Phase::Settle)
    }

    /// Counts what was put right, if that follows from the rebuild.
    pub(crate) fn count(&mut self, effects: &[Effect]) {
        if self.is_settling() {
            self.repaired.count(effects);
        }
    }

    /// The view in use has its accounts in another order, and nothing else has
    /// changed: files are copied from the first on, lest one be left out.
    pub(crate) fn renumbered(&mut self) {
        if let Phase::Files(from) = &mut self.phase {
            *from = 0;
        }
    }

    /// The keyspace is empty, as the view in use has it.
    pub(crate) fn flushed(&mut self, view: &Pool) {
        if !self.is_settling() {
            self.restart(view);
        }
    }

    /// What was made so far is of another keyspace, or may be broken.
    pub(crate) fn restart(&mut self, view: &Pool) {
        discard(std::mem::replace(&mut self.pool, view.with_nothing()));
        self.phase = Phase::Files(0);
        self.repaired = Repaired::default();
    }

    /// Whether anybody waits for its end.
    pub(crate) fn is_asked_for(&self) -> bool {
        !(self.waiting.is_empty() && self.late.is_empty())
    }

    pub(crate) fn discard(self) {
        discard(self.pool);
    }
}

/// Drops a view on the watcher's thread: with a million keys, that takes a while.
pub(crate) fn discard(pool: Pool) {
    node::with_watcher(|watcher| watcher.discard(Box::new(pool)));
}

/// Makes the view anew before it is used again: as far as the budget goes at
/// once, and then in portions. Whatever was under way begins again with it.
pub(crate) fn renew(ctx: &Context, files: Files) -> Result<(), Failure> {
    node::with(|node| {
        let Node { pool, rebuild, .. } = node;
        let rebuild = rebuild.get_or_insert_with(|| Rebuild::new(pool, Vec::new()));
        rebuild.restart(pool);
        if files == Files::AtOnce {
            pool.copy_files(&mut rebuild.pool, 0, usize::MAX);
            rebuild.phase = Phase::Keyspace(ffi::Cursor::new());
        }
        node::set_reading();
    })?;
    let end = ffi::processor_time() + BUDGET;
    while matches!(step(ctx), Ok(true)) && ffi::processor_time() < end {}
    if !node::is_current() {
        let message = "reading the keyspace; until that is done, commands answer LOADING";
        ffi::log(RedisLogLevel::Notice, message);
    }
    if node::with(|node| node.rebuild.is_some())? {
        ffi::ring();
    }
    Ok(())
}

/// Begins a rebuild, or has one follow that which is under way.
pub(crate) fn begin(waiter: Waiter) -> Result<(), Failure> {
    node::with(|node| match &mut node.rebuild {
        Some(rebuild) => rebuild.late.push(waiter),
        None => node.rebuild = Some(Rebuild::new(&node.pool, vec![waiter])),
    })?;
    ffi::ring();
    Ok(())
}

/// Goes on with the rebuild under way, if there is one, for a portion; `settled`
/// is how putting things right has gone in this turn, `asked` whether the watcher
/// waits for it.
pub(crate) fn go_on(ctx: &Context, settled: &Result<Turn, Failure>, asked: bool) {
    let settling = node::with(|node| node.rebuild.as_ref().map(Rebuild::is_settling));
    match (settling, settled) {
        (Ok(None) | Err(_), _) => return,
        (Ok(Some(false)), _) => {
            let end = Instant::now() + PORTION;
            while matches!(step(ctx), Ok(true)) && Instant::now() < end {}
        }
        (Ok(Some(true)), Ok(Turn::More)) => {}
        (Ok(Some(true)), Ok(Turn::NotNow)) => {
            // The watcher asks again in a while, once it has asked; to wake it
            // then would be to have it ask at once, for ever.
            if !asked {
                node::with_watcher(Watcher::wake);
            }
            return;
        }
        (Ok(Some(true)), Ok(Turn::Done)) => {
            // What a view doesn't know it has told nobody of.
            let was_wrong = |rebuild: &Rebuild| rebuild.repaired.view > 0;
            if let Ok(true) = node::with(|node| node.rebuild.as_ref().is_some_and(was_wrong)) {
                store::signal_all(ctx);
            }
            return finish(Ok(()));
        }
        (Ok(Some(true)), Err(failure)) => return finish(Err(failure.clone())),
    }
    ffi::ring();
}

/// Ends the rebuild under way, if there is one, with nothing changed.
pub(crate) fn give_up() {
    finish(Err(Failure::Internal));
}

/// Tells everybody who waits; those who came late have the next begun.
fn finish(outcome: Result<(), Failure>) {
    let done = node::with(|node| {
        let mut done = node.rebuild.take()?;
        let late = std::mem::take(&mut done.late);
        if !late.is_empty() {
            node.rebuild = Some(Rebuild::new(&node.pool, late));
            ffi::ring();
        }
        Some(done)
    });
    let Ok(Some(done)) = done else { return };
    for waiter in done.waiting {
        waiter(outcome.clone().map(|()| done.repaired));
    }
    discard(done.pool);
}

/// One step of a portion; answers whether there is more to do before settling.
fn step(ctx: &Context) -> Result<bool, Failure> {
    let more = node::with(|node| {
        let Node { pool, rebuild, .. } = node;
        let Some(rebuild) = rebuild else {
            return Some(false);
        };
        if node::is_suspect() {
            rebuild.restart(pool);
            node::set_reading();
        }
        match &mut rebuild.phase {
            Phase::Files(from) => match pool.copy_files(&mut rebuild.pool, *from, STEP) {
                Some(next) => *from = next,
                None => rebuild.phase = Phase::Keyspace(ffi::Cursor::new()),
            },
            // Reading a key may make Redis expire it, which comes in here.
            Phase::Keyspace(_) => return None,
            Phase::Compare(walk) => {
                let other = &rebuild.pool;
                rebuild.repaired.view += pool.compare(other, walk, STEP, Difference::Any);
                if walk.is_over(pool) {
                    rebuild.phase = Phase::Absent(Walk::default());
                }
            }
            Phase::Absent(walk) => {
                let made = &rebuild.pool;
                rebuild.repaired.view += made.compare(pool, walk, STEP, Difference::Absence);
                if walk.is_over(made) {
                    rebuild.phase = Phase::Settle;
                    std::mem::swap(pool, &mut rebuild.pool);
                }
            }
            Phase::Settle => return Some(false),
        }
        Some(true)
    })?;
    match more {
        Some(more) => Ok(more),
        None => scan(ctx).map(|()| true),
    }
}

/// Reads some of the keyspace into the view that is being made.
fn scan(ctx: &Context) -> Result<(), Failure> {
    let cursor = node::with(|node| {
        let rebuild = node.rebuild.as_mut()?;
        match std::mem::replace(&mut rebuild.phase, Phase::Compare(Walk::default())) {
            Phase::Keyspace(cursor) => Some(cursor),
            other => {
                rebuild.phase = other;
                None
            }
        }
    })?;
    let Some(mut cursor) = cursor else {
        return Ok(());
    };
    let (mut found, mut more) = (0, true);
    // Most keys may be of something else than the pool.
    for _ in 0..STEP {
        if !more || found >= STEP {
            break;
        }
        more = store::scan(ctx, &mut cursor, |observation| {
            found += 1;
            // Nobody else has the node: this is the main thread.
            let _ = node::with(|node| {
                if let Some(pool) = node.rebuild.as_mut().and_then(Rebuild::pool) {
                    observation.enter(pool);
                }
            });
        });
    }
    if more {
        node::with(|node| {
            if let Some(rebuild) = &mut node.rebuild {
                rebuild.phase = Phase::Keyspace(cursor);
            }
        })?;
    } else if node::is_reading() {
        // There is no view in use to compare it with.
        take_over()?;
    }
    Ok(())
}

/// The view that was made is the one in use from here on, and the first.
fn take_over() -> Result<(), Failure> {
    let asked_for = node::with(|node| {
        let Node { pool, rebuild, .. } = node;
        let rebuild = rebuild.as_mut()?;
        rebuild.phase = Phase::Settle;
        std::mem::swap(pool, &mut rebuild.pool);
        node::set_ready();
        Some(rebuild.is_asked_for())
    })?;
    // Nothing has been put right for as long as there was none.
    node::with_watcher(Watcher::wake);
    if asked_for == Some(false) {
        finish(Ok(()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::{Choice, Stored, Tier};

    #[test]
    fn a_repair_in_multi_after_a_panic_has_one_under_way_begin_anew() {
        let mut node = Node::new(Pool::new(2, 1000), Choice::Seeded(1), true);
        let mut rebuild = Rebuild::new(&node.pool, vec![Box::new(|_| {})]);
        rebuild.phase = Phase::Compare(Walk::default());
        // It was not told that this has changed since.
        let stale = Stored::Count(1);
        rebuild.pool.observe_slots(Tier::Medium, "a", stale);
        node.rebuild = Some(rebuild);
        node::suspect();
        node.adopt(node.pool.without_keyspace());
        assert!(node::is_ready());
        let rebuild = node.rebuild.as_ref().expect("somebody waits for it");
        assert_eq!(rebuild.pool.differences(&node.pool), 0);
        assert!(matches!(rebuild.phase, Phase::Files(0)));
    }
}
