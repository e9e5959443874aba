//! The watcher's way into the pool: what the account files say now, and what
//! was left to be put right. Runs on the watcher's thread, takes the server's
//! lock for a moment at a time.

use crate::accounts::{Change, Scan, Sink};
use crate::ffi::{self, Gil};
use crate::node::{self, Arrival, Node, SETTLE_LIMIT};
use crate::pool::{File, Tier};
use redis_module::ContextFlags;
use redis_module::logging::RedisLogLevel;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Takes changes of account files into the pool.
#[derive(Debug)]
pub(crate) struct Background {
    pub(crate) stopping: Arc<AtomicBool>,
}

impl Background {
    fn lock(&self) -> Option<Gil> {
        Gil::take(|| self.stopping.load(Ordering::Relaxed))
    }
}

impl Sink for Background {
    fn apply(&mut self, scan: Scan) {
        let looked = scan.complete.then_some(Arrival::Looked(scan.readable));
        node::arrive(scan.changes.into_iter().map(Arrival::Change).chain(looked));
        loop {
            let Some(gil) = self.lock() else { return };
            let more = node::take_in();
            // A holder whose account is gone must find another at its very next
            // acquire, and everyone else its slots: so with the change itself.
            put_right(&gil);
            if more != Ok(true) {
                break;
            }
        }
        self.settle();
    }

    fn settle(&mut self) -> bool {
        loop {
            let Some(gil) = self.lock() else { return false };
            match put_right(&gil) {
                Progress::Done => return false,
                Progress::More => {}
                Progress::NotNow => return true,
            }
        }
    }

    fn warn(&mut self, message: String) {
        ffi::log(RedisLogLevel::Warning, &message);
    }
}

enum Progress {
    Done,
    More,
    /// This server may not be written to at the moment.
    NotNow,
}

fn put_right(gil: &Gil) -> Progress {
    let flags = gil.ctx.get_flags();
    if !flags.contains(ContextFlags::MASTER) {
        // The primary puts things right; they come from there.
        return Progress::Done;
    }
    if flags.contains(ContextFlags::LOADING) || ffi::must_not_write() {
        return Progress::NotNow;
    }
    let outcome = ffi::guarded("putting things right", || {
        node::refresh(&gil.ctx)?;
        node::settle(&gil.ctx, SETTLE_LIMIT)
    });
    match outcome {
        Some(Ok(true)) => Progress::More,
        Some(Ok(false) | Err(_)) | None => Progress::Done,
    }
}

/// Brings one change of a file into the node.
pub(crate) fn enter(node: &mut Node, change: Change) {
    match change {
        Change::Valid {
            tier,
            name,
            credential,
        } => node
            .pool
            .set_file(tier, &name, File::Valid(Box::new(credential))),
        Change::Invalid { tier, name, reason } => {
            complain(node, tier, &format!("{name}.json"), reason);
            node.pool.set_file(tier, &name, File::Invalid(reason));
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
                node.pool.set_file(tier, &file, file_now);
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
            node.pool.set_trusts_folder(tier, true);
        }
    }
}

/// Why a file whose name can't be an account's isn't used.
pub(crate) const BAD_NAME: &str = "its name must be 1 to 128 of A-Z a-z 0-9 . _ @ + - before .json";
