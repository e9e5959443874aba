//! Smaller portions while Redis loads its data. It answers its clients between
//! portions of so many bytes, and with the module these take longer, as each key is
//! read once more: so they are made smaller by the server's own setting, which is
//! given back at the load's end. The keyspace is left alone.

use crate::settings;
use redis_module::{CallOptionsBuilder, CallResult, Context};
use std::sync::{Mutex, PoisonError};

const SETTING: &str = "loading-process-events-interval-bytes";
/// What the setting is while Redis loads, in bytes, unless it is less: a
/// millisecond's work or so.
const PORTION: u64 = 32 * 1024;

/// What it was before the load that is under way.
static BEFORE: Mutex<Option<u64>> = Mutex::new(None);

/// At a load's beginning.
pub(crate) fn shrink(ctx: &Context) {
    let Some(size) = size(ctx).filter(|size| *size > PORTION) else {
        return;
    };
    if set(ctx, PORTION) {
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(size);
    }
}

/// At its end, whatever that was.
pub(crate) fn give_back(ctx: &Context) {
    let before = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take();
    // Another size is somebody else's doing meanwhile, and stays.
    if let Some(before) = before
        && size(ctx) == Some(PORTION)
    {
        set(ctx, before);
    }
}

fn size(ctx: &Context) -> Option<u64> {
    settings::of_server(ctx, SETTING)?.parse().ok()
}

fn set(ctx: &Context, size: u64) -> bool {
    let options = CallOptionsBuilder::new().errors_as_replies().build();
    let size = size.to_string();
    let done: CallResult<'_> = ctx.call_ext("CONFIG", &options, &["SET", SETTING, &size]);
    done.is_ok()
}
