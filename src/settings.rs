//! The module's settings, in one table: names, defaults, what is accepted, and
//! what a change of one does; and how the server's own are looked up.

use crate::accounts::Watcher;
use crate::ffi;
use crate::node;
use crate::pool::{Choice, DEFAULT_CAPACITY, DEFAULT_ROTATION_MS, MAX_CAPACITY, MAX_ROTATION_MS};
use redis_module::configuration::{
    ConfigurationContext, ConfigurationFlags, register_i64_configuration,
    register_string_configuration,
};
use redis_module::logging::RedisLogLevel;
use redis_module::{
    CallOptionsBuilder, CallReply, CallResult, ConfigurationValue, Context, RedisError,
    RedisString, raw,
};
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::atomic::{AtomicI64, AtomicPtr, Ordering};
use std::sync::{Mutex, PoisonError};

const ACCEPTED: &str = "accepted module arguments are: account-dir FOLDER, \
     slots-per-account 1..1024, rotation-ms 1..31536000000, max-clock-skew-ms 0..31536000000, \
     choice-seed 0..9223372036854775807";

/// The most that callers' clocks may be allowed to be off: 365 days, in ms.
const MAX_SKEW_MS: i64 = 31_536_000_000;

static SLOTS_PER_ACCOUNT: AtomicI64 = AtomicI64::new(DEFAULT_CAPACITY as i64);
static ROTATION_MS: AtomicI64 = AtomicI64::new(DEFAULT_ROTATION_MS);
static MAX_CLOCK_SKEW_MS: AtomicI64 = AtomicI64::new(0);
static CHOICE_SEED: AtomicI64 = AtomicI64::new(0);
static ACCOUNT_DIR: AccountDir = AccountDir(Mutex::new(String::new()));

/// The account folder as `CONFIG GET` shows it.
static SHOWN: AtomicPtr<raw::RedisModuleString> = AtomicPtr::new(ptr::null_mut());

/// The folder with the account files. A folder that isn't there yet is all
/// right: it may be mounted later.
struct AccountDir(Mutex<String>);

impl AccountDir {
    fn store(&self, folder: String) {
        let shown = ManuallyDrop::new(RedisString::create_from_slice(
            ptr::null_mut(),
            folder.as_bytes(),
        ));
        let former = SHOWN.swap(shown.inner, Ordering::AcqRel);
        if !former.is_null() {
            drop(RedisString::from_redis_module_string(
                ptr::null_mut(),
                former,
            ));
        }
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = folder;
    }

    fn text(&self) -> String {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl ConfigurationValue<RedisString> for AccountDir {
    fn get(&self, _ctx: &ConfigurationContext) -> RedisString {
        // Redis copies what it is shown and never frees it: this is the one
        // string kept for that, shown without a reference of its own.
        RedisString::from_redis_module_string(ptr::null_mut(), SHOWN.load(Ordering::Acquire))
    }

    fn set(&self, _ctx: &ConfigurationContext, value: RedisString) -> Result<(), RedisError> {
        let folder = folder(value.as_slice()).map_err(RedisError::Str)?;
        self.store(folder);
        Ok(())
    }
}

const FOLDER: &str = "account-dir must be the path of a folder, in UTF-8";

fn folder(bytes: &[u8]) -> Result<String, &'static str> {
    let text = std::str::from_utf8(bytes).map_err(|_| FOLDER)?;
    if text.is_empty() || text.chars().any(char::is_control) {
        return Err(FOLDER);
    }
    // Redis may be told to change its own folder later; this path is to stay.
    let path = std::path::absolute(Path::new(text)).map_err(|_| FOLDER)?;
    if path.metadata().is_ok_and(|found| !found.is_dir()) {
        return Err("account-dir must be a folder, not a file");
    }
    path.into_os_string().into_string().map_err(|_| FOLDER)
}

/// Slots of each account.
pub(crate) fn slots_per_account() -> u32 {
    u32::try_from(SLOTS_PER_ACCOUNT.load(Ordering::Relaxed)).unwrap_or(DEFAULT_CAPACITY)
}

/// How long a lease lasts, in ms.
pub(crate) fn rotation_ms() -> i64 {
    ROTATION_MS.load(Ordering::Relaxed)
}

/// How far a caller's `now` may be from this server's clock, in ms; none: any
/// distance will do.
pub(crate) fn max_clock_skew_ms() -> Option<i64> {
    Some(MAX_CLOCK_SKEW_MS.load(Ordering::Relaxed)).filter(|&skew| skew > 0)
}

/// How ties between accounts are to be broken.
pub(crate) fn choice() -> Choice {
    match u64::try_from(CHOICE_SEED.load(Ordering::Relaxed)) {
        Err(_) | Ok(0) => Choice::Random(rand::make_rng()),
        Ok(seed) => Choice::Seeded(seed),
    }
}

/// The folder with the account files, as an absolute path.
pub(crate) fn account_dir() -> PathBuf {
    PathBuf::from(ACCOUNT_DIR.text())
}

struct Arguments {
    slots_per_account: i64,
    rotation_ms: i64,
    max_clock_skew_ms: i64,
    choice_seed: i64,
    account_dir: String,
}

fn parse(args: &[RedisString]) -> Result<Arguments, &'static str> {
    let mut parsed = Arguments {
        slots_per_account: i64::from(DEFAULT_CAPACITY),
        rotation_ms: DEFAULT_ROTATION_MS,
        max_clock_skew_ms: 0,
        choice_seed: 0,
        account_dir: folder(b"account")?,
    };
    let number = |value: &RedisString, min: i64, max: i64| {
        let number = std::str::from_utf8(value.as_slice())
            .ok()
            .and_then(|text| text.parse::<i64>().ok());
        number.filter(|number| (min..=max).contains(number))
    };
    let mut args = args.iter();
    while let Some(name) = args.next() {
        let value = args.next().ok_or("a module argument has no value")?;
        match name.as_slice() {
            b"account-dir" => parsed.account_dir = folder(value.as_slice())?,
            b"slots-per-account" => {
                parsed.slots_per_account = number(value, 1, i64::from(MAX_CAPACITY))
                    .ok_or("slots-per-account must be a number from 1 to 1024")?;
            }
            b"rotation-ms" => {
                parsed.rotation_ms = number(value, 1, MAX_ROTATION_MS)
                    .ok_or("rotation-ms must be a number of milliseconds from 1 to 31536000000")?;
            }
            b"max-clock-skew-ms" => {
                parsed.max_clock_skew_ms = number(value, 0, MAX_SKEW_MS).ok_or(
                    "max-clock-skew-ms must be a number of milliseconds from 0 (off) to 31536000000",
                )?;
            }
            b"choice-seed" => {
                parsed.choice_seed = number(value, 0, i64::MAX).ok_or(
                    "choice-seed must be a number from 0 (at random) to 9223372036854775807",
                )?;
            }
            _ => return Err("there is a module argument that mpool does not know"),
        }
    }
    Ok(parsed)
}

/// A setting of the server's own. None where CONFIG has another name, or none.
pub(crate) fn of_server(ctx: &Context, name: &str) -> Option<String> {
    let options = CallOptionsBuilder::new().errors_as_replies().build();
    let told: CallResult<'_> = ctx.call_ext("CONFIG", &options, &["GET", name]);
    let Ok(CallReply::Array(told)) = told else {
        return None;
    };
    match told.get(1)? {
        Ok(CallReply::String(value)) => value.to_string(),
        _ => None,
    }
}

/// Makes the settings known to Redis, with the module's arguments as defaults,
/// and takes over what the configuration file says.
pub(crate) fn register(ctx: &Context, args: &[RedisString]) -> Result<(), ()> {
    let refuse = |why: &str| ffi::log(RedisLogLevel::Warning, &format!("{why}; {ACCEPTED}"));
    let args = parse(args).map_err(refuse)?;
    // The server applies the defaults too; this is for one that does not.
    SLOTS_PER_ACCOUNT.store(args.slots_per_account, Ordering::Relaxed);
    ROTATION_MS.store(args.rotation_ms, Ordering::Relaxed);
    MAX_CLOCK_SKEW_MS.store(args.max_clock_skew_ms, Ordering::Relaxed);
    CHOICE_SEED.store(args.choice_seed, Ordering::Relaxed);
    ACCOUNT_DIR.store(args.account_dir.clone());
    register_i64_configuration(
        ctx,
        "slots-per-account",
        &SLOTS_PER_ACCOUNT,
        args.slots_per_account,
        1,
        i64::from(MAX_CAPACITY),
        ConfigurationFlags::DEFAULT,
        Some(Box::new(|_, _, _| {
            if node::with(|node| node.tell(|pool| pool.set_capacity(slots_per_account()))).is_ok() {
                node::with_watcher(Watcher::wake);
            }
        })),
    );
    register_i64_configuration(
        ctx,
        "rotation-ms",
        &ROTATION_MS,
        args.rotation_ms,
        1,
        MAX_ROTATION_MS,
        ConfigurationFlags::DEFAULT,
        Some(Box::new(|_, _, _| {
            let _ = node::with(|node| node.tell(|pool| pool.set_rotation_ms(rotation_ms())));
        })),
    );
    register_i64_configuration(
        ctx,
        "max-clock-skew-ms",
        &MAX_CLOCK_SKEW_MS,
        args.max_clock_skew_ms,
        0,
        MAX_SKEW_MS,
        ConfigurationFlags::DEFAULT,
        None,
    );
    register_i64_configuration(
        ctx,
        "choice-seed",
        &CHOICE_SEED,
        args.choice_seed,
        0,
        i64::MAX,
        ConfigurationFlags::DEFAULT,
        Some(Box::new(|_, _, _| {
            let _ = node::with(|node| node.choice = choice());
        })),
    );
    register_string_configuration(
        ctx,
        "account-dir",
        &ACCOUNT_DIR,
        &args.account_dir,
        ConfigurationFlags::DEFAULT,
        Some(Box::new(|_, _, _| {
            node::with_watcher(|watcher| watcher.set_root(account_dir()));
        })),
    );
    if !ffi::load_configs(ctx) {
        refuse("the configuration file has a bad value for a setting of mpool");
        return Err(());
    }
    Ok(())
}
