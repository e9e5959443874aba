//! The watcher's way into the pool: what the account files say now, and what
//! was left to be put right. The watcher's thread asks for a turn and waits for
//! its end; the server's main thread carries it out, a portion at a time, as it
//! would a command. (Redis 8.0 ends with an assertion when another thread
//! changes a key that a client with CLIENT TRACKING is to be told of.)

use crate::accounts::{Change, Scan, Sink};
use crate::errors::Failure;
use crate::ffi;
use crate::node::{self, Arrival, Node, SETTLE_LIMIT};
use crate::pool::{File, Tier};
use crate::rebuild;
use redis_module::logging::RedisLogLevel;
use redis_module::{Context, ContextFlags};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Takes changes of account files into the pool.
#[derive(Debug)]
pub(crate) struct Background {
    turns: Receiver<Turn>,
}

/// Where the main thread says how a turn went. Without it, nobody waits.
static TURNS: Mutex<Option<SyncSender<Turn>>> = Mutex::new(None);
/// The watcher waits for a turn that has yet to begin: what it has brought is
/// not for one that had begun before.
static ASKED: AtomicBool = AtomicBool::new(false);

fn turns() -> MutexGuard<'static, Option<SyncSender<Turn>>> {
    TURNS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes ready for a watcher; one at a time.
pub(crate) fn open() -> Background {
    let (sender, receiver) = mpsc::sync_channel(1);
    *turns() = Some(sender);
    Background { turns: receiver }
}

/// No more turns: the watcher, if it waits for one, waits no longer.
pub(crate) fn close() {
    *turns() = None;
}

/// How a turn went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    Done,
    More,
    /// This server may not be written to at the moment.
    NotNow,
}

/// One turn, on the main thread.
pub(crate) fn turn(ctx: &Context) {
    let asked = ASKED.swap(false, Ordering::AcqRel);
    let turn = ffi::guarded("a turn", || carry_out(ctx, asked)).unwrap_or_else(|| {
        // Nobody would go on with it.
        ffi::guarded("the end of a repair", rebuild::give_up);
        Turn::Done
    });
    if asked && let Some(sender) = &*turns() {
        // Nobody has asked since for another.
        let _ = sender.try_send(turn);
    }
}

fn carry_out(ctx: &Context, asked: bool) -> Turn {
    let more_news = node::take_in(ctx).unwrap_or(false);
    // A holder whose account is gone must find another at its very next
    // acquire, and everyone else its slots: so with the change itself.
    let settled = put_right(ctx);
    rebuild::go_on(ctx, &settled, asked);
    match settled {
        _ if more_news => Turn::More,
        Ok(turn) => turn,
        Err(_) => Turn::Done,
    }
}

fn put_right(ctx: &Context) -> Result<Turn, Failure> {
    let flags = ctx.get_flags();
    if !flags.contains(ContextFlags::MASTER) {
        // The primary puts things right; they come from there.
        return node::refresh(ctx).map(|()| Turn::Done);
    }
    if flags.contains(ContextFlags::LOADING) || ffi::must_not_write() {
        return Ok(Turn::NotNow);
    }
    node::refresh(ctx)?;
    let more = node::settle(ctx, SETTLE_LIMIT)?;
    Ok(if more { Turn::More } else { Turn::Done })
}

impl Background {
    /// Asks for turns until nothing is left to do; answers how the last went,
    /// or nothing at the module's end.
    fn take_turns(&self) -> Option<Turn> {
        loop {
            ASKED.store(true, Ordering::Release);
            ffi::ring();
            match self.turns.recv().ok()? {
                Turn::More => {}
                last => return Some(last),
            }
        }
    }
}

impl Sink for Background {
    fn apply(&mut self, scan: Scan) {
        let looked = scan.complete.then_some(Arrival::Looked(scan.readable));
        node::arrive(scan.changes.into_iter().map(Arrival::Change).chain(looked));
        self.take_turns();
    }

    fn settle(&mut self) -> bool {
        self.take_turns() == Some(Turn::NotNow)
    }

    fn warn(&mut self, message: String) {
        ffi::log(RedisLogLevel::Warning, &message);
    }
}

/// Brings one change of a file into the node.
pub(crate) fn enter(node: &mut Node, change: Change) {
    match change {
        Change::Valid {
            tier,
            name,
            credential,
        } => {
            node.set_file(tier, &name, File::Valid(Box::new(credential)));
        }
        Change::Invalid { tier, name, reason } => {
            complain(node, tier, &format!("{name}.json"), reason);
            node.set_file(tier, &name, File::Invalid(reason));
        }
        Change::BadName { tier, file } => {
            complain(node, tier, &file, BAD_NAME);
            node.bad_names.insert((tier, file), BAD_NAME);
        }
        Change::Gone { tier, file } => {
            if node.bad_names.remove(&(tier, file.clone())).is_none() {
                // What a replica has no file of may still be the primary's account.
                let file_now = if node.is_primary {
                    File::Absent
                } else {
                    File::Unknown
                };
                node.set_file(tier, &file, file_now);
            }
        }
    }
}

/// Files that can't be used of which one look at all of them logs: a folder of
/// something else entirely must not fill the disk.
const MAX_COMPLAINTS: usize = 100;

fn complain(node: &mut Node, tier: Tier, file: &str, reason: &str) {
    node.complaints += 1;
    let message = match node.complaints {
        ..MAX_COMPLAINTS => format!("account file {tier}/{file} can't be used: {reason}"),
        MAX_COMPLAINTS => {
            "more account files can't be used; MPOOL.RELOAD names them all".to_owned()
        }
        _ => return,
    };
    ffi::log(RedisLogLevel::Warning, &message);
}

/// After a look at all folders: those that could be read say which accounts
/// there are not, unless this server has followed another.
pub(crate) fn trust(node: &mut Node, readable: [bool; 3]) {
    node.complaints = 0;
    if !node.always_primary {
        return;
    }
    for (tier, readable) in Tier::ALL.into_iter().zip(readable) {
        if readable {
            node.tell(|pool| pool.set_trusts_folder(tier, true));
        }
    }
}

/// Why a file whose name can't be an account's isn't used.
pub(crate) const BAD_NAME: &str = "its name must be 1 to 128 of A-Z a-z 0-9 . _ @ + - before .json";
