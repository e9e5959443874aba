//! mpool lends upstream accounts to client keys, inside Redis.
//!
//! The module's face: every command, setting and event, on one page.
//!
//! - [`commands`]: one file a command: parse, ask the pool, reply
//! - [`pool`]: the rules; pure, tested without Redis
//! - [`store`]: every key name, every read and every write
//! - [`accounts`]: account files: parse, scan, watch
//! - [`events`]: what Redis tells: changed keys, flushes, roles
//! - [`node`]: the one pool of this server
//! - [`background`]: the watcher's way into the pool
//! - [`rebuild`]: a view made anew beside the one there is
//! - [`portions`]: smaller portions while Redis loads its data
//! - [`farewell`]: connections that the server can't keep without the module
//! - [`settings`], [`info`], [`errors`]: what operators set, watch and meet
//! - [`ffi`]: the only unsafe code

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::todo,
    clippy::unimplemented
)]
// Tests may stop at the first surprise; code that runs inside Redis may not.
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic
    )
)]

mod accounts;
mod background;
mod commands;
mod errors;
mod events;
mod farewell;
mod ffi;
mod info;
mod node;
mod pool;
mod portions;
mod rebuild;
mod settings;
mod store;

use ffi::register;
use redis_module::logging::RedisLogLevel;
use redis_module::{Context, ContextFlags, RedisString, Status, redis_module};

/// The commands: a new one is a file in `commands` and a line here.
fn register_commands(ctx: &Context) -> Result<(), &'static str> {
    register::<commands::Acquire>(ctx)?;
    register::<commands::Release>(ctx)?;
    register::<commands::Status>(ctx)?;
    register::<commands::Keygen>(ctx)?;
    register::<commands::Revoke>(ctx)?;
    register::<commands::Cooldown>(ctx)?;
    register::<commands::Reload>(ctx)?;
    register::<commands::Repair>(ctx)?;
    #[cfg(debug_assertions)]
    {
        register::<commands::Panic>(ctx)?;
        register::<commands::Leak>(ctx)?;
    }
    #[cfg(feature = "ceiling")]
    register::<commands::Ceiling>(ctx)?;
    Ok(())
}

fn load(ctx: &Context, args: &[RedisString]) -> Status {
    match ffi::guarded("the module's load", || start(ctx, args)) {
        Some(Ok(())) => Status::Ok,
        Some(Err(why)) => {
            ffi::log(RedisLogLevel::Warning, &format!("not loaded: {why}"));
            unload(ctx);
            Status::Err
        }
        None => {
            unload(ctx);
            Status::Err
        }
    }
}

/// Account files that are read at once when the module is loaded into a running
/// server: well within the 2 ms that no stall may exceed (benches/stalls.rs).
/// More of them are the watcher's.
const FILES_AT_ONCE: usize = 64;

fn start(ctx: &Context, args: &[RedisString]) -> Result<(), &'static str> {
    ffi::open_detached(ctx);
    ffi::log_panics();
    let flags = ctx.get_flags();
    if flags.contains(ContextFlags::CLUSTER) {
        return Err(
            "the keys of a pool belong together, which cluster mode would spread over nodes; use Sentinel",
        );
    }
    settings::register(ctx, args).map_err(|()| "a setting is not accepted, see above")?;
    register_commands(ctx)?;
    ffi::subscribe(ctx)?;

    let mut scanner = accounts::Scanner::new(settings::account_dir());
    // While the server starts, nobody is kept waiting, and its first command is
    // to find the accounts.
    let later = ffi::has_clients(ctx) && scanner.is_larger_than(FILES_AT_ONCE);
    let found = (!later).then(|| scanner.full(std::time::Instant::now()));
    let pool = pool::Pool::new(settings::slots_per_account(), settings::rotation_ms());
    let mut node = node::Node::new(
        pool,
        settings::choice(),
        flags.contains(ContextFlags::MASTER),
    );
    let readable = found.map(|found| {
        for change in found.changes {
            background::enter(&mut node, change);
        }
        found.readable
    });
    if readable.is_some_and(|readable| !readable.contains(&true)) {
        ffi::log(
            RedisLogLevel::Warning,
            "account-dir has no readable folder medium, high or supreme yet",
        );
    }
    for warning in accounts::warnings_of_exposed(&scanner.take_exposed()) {
        ffi::log(RedisLogLevel::Warning, &warning);
    }
    node::install(Some(node));
    node::await_files(later);
    ffi::open_bell()?;
    // Loaded into a running server, the keyspace is there already.
    node::suspect();
    rebuild::renew(ctx, rebuild::Files::AtOnce).map_err(|_| "the keyspace can't be read")?;
    if let Some(readable) = readable {
        let _ = node::with(|node| background::trust(node, readable));
    } else {
        let message = "reading the account files; until that is done, commands answer LOADING";
        ffi::log(RedisLogLevel::Notice, message);
    }
    events::warn_of_eviction(ctx);

    let watcher = accounts::Watcher::start(scanner, background::open())
        .map_err(|_| "the watcher's thread can't be started")?;
    watcher.wake();
    node::install_watcher(Some(watcher));
    Ok(())
}

fn unload(ctx: &Context) -> Status {
    ffi::guarded("the module's unload", || {
        background::close();
        let stopped = node::install_watcher(None).map_or(Ok(()), accounts::Watcher::stop);
        if let Err(watcher) = stopped {
            node::install_watcher(Some(watcher));
            ffi::log(
                RedisLogLevel::Warning,
                "not unloaded: the watcher's thread waits for a file. Account files are not followed until \
                 the module has been unloaded and loaded again",
            );
            return Status::Err;
        }
        // Without the module nobody learns of changes to account files.
        store::signal_all(ctx);
        node::install(None);
        node::await_files(false);
        node::forget_arrivals();
        store::forget();
        farewell::close_connections(ctx);
        ffi::close_bell();
        ffi::close_detached();
        Status::Ok
    })
    .unwrap_or(Status::Err)
}

// Under test there is no server whose allocator could be used.
#[cfg(test)]
use std::alloc::System as Allocator;
#[cfg(test)]
const ALLOCATOR: Allocator = std::alloc::System;
#[cfg(not(test))]
use redis_module::alloc::RedisAlloc as Allocator;
#[cfg(not(test))]
const ALLOCATOR: Allocator = redis_module::alloc::RedisAlloc;

redis_module! {
    name: "mpool",
    version: 1,
    allocator: (Allocator, ALLOCATOR),
    data_types: [],
    init: load,
    deinit: unload,
    event_handlers: [
        [@GENERIC @STRING @HASH @LIST @SET @ZSET @STREAM @EXPIRED @EVICTED @LOADED: events::key_changed]
    ],
}
