//! What Redis tells the module: keys that changed, databases emptied or
//! swapped, a new role. All of it goes into the view, from which commands
//! answer; nothing is written here.

use crate::ffi;
use crate::node::{self, Node};
use crate::pool::Pool;
use crate::portions;
use crate::rebuild::{self, Files};
use crate::settings;
use crate::store::{self, PoolKey};
use redis_module::logging::RedisLogLevel;
use redis_module::server_events::{
    LOADING_SERVER_EVENTS_LIST, LoadingSubevent, ROLE_CHANGED_SERVER_EVENTS_LIST, ServerRole,
};
use redis_module::{Context, NotifyEvent};

/// A key has changed, in whatever way: it is read anew.
pub(crate) fn key_changed(ctx: &Context, _kind: NotifyEvent, event: &str, name: &[u8]) {
    let Some(key) = PoolKey::parse(name) else {
        return;
    };
    if !ffi::is_pool_database(ctx) {
        return;
    }
    ffi::guarded("a notification", || {
        let observation = store::own_write(key, event).unwrap_or_else(|| key.read(ctx, name));
        let off = node::with(|node| {
            node.observe(&observation);
            node::is_ready() && node.is_primary && node.pool.has_stray_backlog()
        });
        match off {
            Ok(true) => drop(node::with_watcher(crate::accounts::Watcher::wake)),
            Ok(false) => {}
            // The view has missed this one.
            Err(_) => node::suspect(),
        }
    });
}

/// The pool's database is empty now.
pub(crate) fn flushed() {
    let emptied = node::with(Node::flush);
    if emptied.is_ok() {
        node::with_watcher(crate::accounts::Watcher::wake);
    }
}

/// Another database is the pool's now.
pub(crate) fn swapped(ctx: &Context) {
    store::signal_all(ctx);
    node::suspect();
    // Failing that, whoever comes next does it.
    let _ = rebuild::renew(ctx, Files::InPortions);
}

/// The server's cron has come round, ten times a second unless it is told otherwise (`hz`).
pub(crate) fn time_has_passed(ctx: &Context) {
    node::tell_of_ends(ctx);
}

fn role_changed(ctx: &Context, role: ServerRole) {
    ffi::guarded("the role event", || {
        // Those who remember leases are to find out who the primary is.
        store::signal_all(ctx);
        let done = node::with(|node| {
            node.is_primary = role == ServerRole::Primary;
            if !node.is_primary {
                node.always_primary = false;
                node.tell(Pool::follow);
            }
        });
        if done.is_ok() {
            node::with_watcher(crate::accounts::Watcher::wake);
        }
    });
}

fn loading(ctx: &Context, event: LoadingSubevent) {
    ffi::guarded("the loading event", || match event {
        LoadingSubevent::Ended | LoadingSubevent::Failed => {
            portions::give_back(ctx);
            node::with_watcher(crate::accounts::Watcher::wake);
        }
        _ => portions::shrink(ctx),
    });
}

#[linkme::distributed_slice(ROLE_CHANGED_SERVER_EVENTS_LIST)]
static ON_ROLE_CHANGED: fn(&Context, ServerRole) = role_changed;

#[linkme::distributed_slice(LOADING_SERVER_EVENTS_LIST)]
static ON_LOADING: fn(&Context, LoadingSubevent) = loading;

/// Warns when the server may throw the pool's keys away to make room.
pub(crate) fn warn_of_eviction(ctx: &Context) {
    let policy = settings::of_server(ctx, "maxmemory-policy").unwrap_or_default();
    if policy.contains("allkeys-") {
        ffi::log(
            RedisLogLevel::Warning,
            "maxmemory-policy may evict the pool's keys, and leases with them; \
             set it to noeviction or a volatile-* policy",
        );
    }
}
