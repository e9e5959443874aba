//! mpool-forwarder: a client's key in, an account's credential out, bytes
//! untouched. It knows the pool through the module's commands alone.
//!
//! - [`config`]: flags and environment, checked before anything is bound
//! - [`server`]: connections and threads; [`client_io`], [`patience`]: bounds on them
//! - [`proxy`]: the way of a request; [`headers`], [`upload`], [`relay`]: its parts
//! - [`lender`]: what the pool says; [`known`]: what it need not be asked again;
//!   [`link`], [`resp`], [`socket_watch`]: the connection to Redis
//! - [`accounts`]: rules for accounts in trouble
//! - [`upstream`]: connections and timeouts towards the API; [`base`]: its URL
//! - [`answers`]: every answer of its own
//! - [`report`], [`log`], [`metrics`], [`admin`]: what operators see

#![forbid(unsafe_code)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::todo,
    clippy::unimplemented
)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic
    )
)]
#![allow(unreachable_pub, reason = "a program has no public items")]

mod accounts;
mod admin;
mod answers;
mod base;
mod client_io;
mod config;
mod gate;
mod headers;
mod known;
mod lender;
mod link;
mod log;
mod metrics;
mod patience;
mod proxy;
mod relay;
mod report;
mod resp;
mod rooms;
mod server;
mod socket_watch;
mod tries;
mod upload;
mod upstream;

use admin::Admin;
use config::{Config, Stop};
use server::{Shared, Workers};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

/// The exit code of a configuration that can't be used.
const MISTAKE: u8 = 2;

fn main() -> ExitCode {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let config = match Config::read(std::env::args_os()) {
        Ok(config) => config,
        Err(Stop::Shown(text)) => {
            print!("{text}");
            return ExitCode::SUCCESS;
        }
        Err(Stop::Mistake(what)) => {
            eprintln!("mpool-forwarder: {what}\nSee mpool-forwarder --help.");
            return ExitCode::from(MISTAKE);
        }
    };
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(what) => {
            eprintln!("mpool-forwarder: {what}");
            ExitCode::FAILURE
        }
    }
}

fn run(config: Config) -> Result<(), String> {
    let log = log::Log::start(config.log, config.log_level)
        .map_err(|error| format!("no thread for the log: {error}"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(|error| format!("no runtime: {error}"))?;
    let outcome = runtime.block_on(serve(config));
    // What has not ended in its time ends now.
    runtime.shutdown_background();
    drop(log);
    outcome
}

async fn serve(config: Config) -> Result<(), String> {
    allow_files(config.limits.connections, config.threads);
    let listener = bind("--listen", config.listen).await?;
    let door = match config.admin {
        Some(address) => Some(bind("--admin", address).await?),
        None => None,
    };
    let (base, drain) = (config.upstream.to_string(), config.timeouts.drain);
    let tls = if config.tls.is_some() {
        "https"
    } else {
        "http"
    };
    let shared = Arc::new(Shared {
        metrics: Arc::new(metrics::Metrics::new(config.threads)),
        seen: Arc::new(lender::Seen::new(config.grace)),
        accounts: Arc::default(),
        began: Instant::now(),
        told: Arc::default(),
        config,
    });
    let admin = Arc::new(Admin {
        lender: shared.lender(Duration::ZERO)?,
        metrics: Arc::clone(&shared.metrics),
        draining: AtomicBool::new(false),
    });
    let workers = Workers::start(&shared).map_err(|error| format!("no threads: {error}"))?;
    let mut signals = Signals::catch()?;

    tracing::info!(
        event = "listening",
        "listening on {} ({tls}), forwarding to {base}",
        local(&listener)
    );
    if let Some(door) = door {
        tracing::info!(event = "listening", "admin on {}", local(&door));
        tokio::spawn(Arc::clone(&admin).serve(door));
    }
    tokio::select! {
        () = workers.accept(listener) => {}
        () = signals.next() => {}
    }
    admin.draining.store(true, Ordering::Relaxed);
    tracing::info!(
        event = "stopping",
        "stopping: no new connections; requests under way have {} s",
        drain.as_secs_f64()
    );
    tokio::select! {
        () = workers.drain() => {}
        () = tokio::time::sleep(drain) => {
            tracing::warn!(event = "stopping", "{} requests are cut off", shared.metrics.in_flight());
        }
        () = signals.next() => {
            tracing::warn!(event = "stopping", "told again: {} requests are cut off", shared.metrics.in_flight());
        }
    }
    tracing::info!(event = "stopped", "stopped");
    Ok(())
}

async fn bind(flag: &str, address: SocketAddr) -> Result<TcpListener, String> {
    TcpListener::bind(address)
        .await
        .map_err(|error| format!("{flag} {address}: {error}"))
}

fn local(listener: &TcpListener) -> String {
    listener
        .local_addr()
        .map_or_else(|error| error.to_string(), |address| address.to_string())
}

/// A connection takes two files, one to each side, and now and then a third; a thread
/// takes six, half of them for Redis.
fn allow_files(connections: usize, threads: usize) {
    let wanted = connections
        .saturating_mul(3)
        .saturating_add(threads.saturating_mul(6))
        .saturating_add(256);
    let wanted = u64::try_from(wanted).unwrap_or(u64::MAX);
    match rlimit::increase_nofile_limit(wanted) {
        Ok(got) if got < wanted => tracing::warn!(
            event = "limits",
            "this process may have {got} open files, too few for --max-connections {connections} (see ulimit -n)"
        ),
        Ok(_) => {}
        Err(error) => tracing::warn!(
            event = "limits",
            "the limit of open files can't be read: {error}"
        ),
    }
}

/// What asks the process to stop.
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn catch() -> Result<Self, String> {
        let catch =
            |kind| signal(kind).map_err(|error| format!("signals can't be caught: {error}"));
        Ok(Self {
            terminate: catch(SignalKind::terminate())?,
            interrupt: catch(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
