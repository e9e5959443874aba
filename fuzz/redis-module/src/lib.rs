//! The crate `redis-module` as the module's files see it, over a keyspace in
//! memory that one thread has: the commands by which the module writes, and a
//! notification after each.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

/// What a key holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    Text(Vec<u8>),
    Hash(BTreeMap<Vec<u8>, Vec<u8>>),
    List,
}

pub type Keyspace = BTreeMap<Vec<u8>, Value>;
pub type Listener = fn(&Context, NotifyEvent, &str, &[u8]);

thread_local! {
    static KEYS: RefCell<Keyspace> = const { RefCell::new(BTreeMap::new()) };
    static FULL: Cell<bool> = const { Cell::new(false) };
    static LISTENER: Cell<Option<Listener>> = const { Cell::new(None) };
    static WRITES: Cell<u64> = const { Cell::new(0) };
}

/// The server: what a test does to it besides running the module.
pub mod server {
    use super::*;

    /// Empty, with somebody who hears of each change.
    pub fn start(listener: Listener) {
        KEYS.with_borrow_mut(BTreeMap::clear);
        FULL.set(false);
        LISTENER.set(Some(listener));
    }

    pub fn keys() -> Keyspace {
        KEYS.with_borrow(Clone::clone)
    }

    pub fn get(name: &[u8]) -> Option<Value> {
        KEYS.with_borrow(|keys| keys.get(name).cloned())
    }

    /// Changes a key behind the module's back.
    pub fn set(name: &[u8], value: Option<Value>) {
        put("changed", name, value);
    }

    /// Changes a key, of which that event is told.
    pub(super) fn put(event: &str, name: &[u8], value: Option<Value>) {
        KEYS.with_borrow_mut(|keys| match value {
            Some(value) => keys.insert(name.to_vec(), value),
            None => keys.remove(name),
        });
        changed(event, name);
    }

    /// Empties the database; the one that calls tells the module.
    pub fn flush() {
        KEYS.with_borrow_mut(BTreeMap::clear);
    }

    /// Over its maxmemory, or no longer.
    pub fn set_full(full: bool) {
        FULL.set(full);
    }

    /// Writes of the module so far.
    pub fn writes() -> u64 {
        WRITES.get()
    }

    pub(super) fn changed(event: &str, name: &[u8]) {
        if let Some(listener) = LISTENER.get() {
            listener(&Context, NotifyEvent, event, name);
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Context;

#[derive(Clone, Copy, Debug)]
pub struct NotifyEvent;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContextFlags(u32);

impl ContextFlags {
    pub const MASTER: Self = Self(1);
    pub const OOM: Self = Self(2);
    pub const LOADING: Self = Self(4);
    pub const MULTI: Self = Self(8);
    pub const LUA: Self = Self(16);
    pub const DENY_BLOCKING: Self = Self(32);

    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    pub fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}

impl std::ops::BitOr for ContextFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

#[derive(Clone, Debug)]
pub struct RedisString(Vec<u8>);

impl RedisString {
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    pub fn as_slice(&self) -> &[u8] {
        &self.0
    }
}

#[derive(Debug, Default)]
pub struct CallOptions {
    verify_oom: bool,
}

#[derive(Debug, Default)]
pub struct CallOptionsBuilder(CallOptions);

impl CallOptionsBuilder {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn replicate(self) -> Self {
        self
    }

    pub fn errors_as_replies(self) -> Self {
        self
    }

    pub fn verify_oom(self) -> Self {
        Self(CallOptions { verify_oom: true })
    }

    pub fn build(self) -> CallOptions {
        self.0
    }
}

#[derive(Debug)]
pub struct Text(Vec<u8>);

impl Text {
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// The lifetime is the real crate's.
#[derive(Debug)]
pub enum CallReply<'a> {
    String(Text),
    Other(std::marker::PhantomData<&'a ()>),
}

#[derive(Debug)]
pub struct ErrorReply(&'static str);

impl ErrorReply {
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

pub type CallResult<'a> = Result<CallReply<'a>, ErrorReply>;
pub type RedisResult<T> = Result<T, ErrorReply>;

const WRONG_TYPE: ErrorReply =
    ErrorReply("WRONGTYPE Operation against a key holding the wrong kind of value");

impl Context {
    pub fn get_flags(&self) -> ContextFlags {
        if FULL.get() {
            ContextFlags::MASTER | ContextFlags::OOM
        } else {
            ContextFlags::MASTER
        }
    }

    /// A timer whose time has come at once.
    pub fn create_timer<F, T: 'static>(
        &self,
        _after: std::time::Duration,
        callback: F,
        data: T,
    ) -> u64
    where
        F: FnOnce(&Self, T),
    {
        callback(self, data);
        0
    }

    pub fn call(&self, _command: &str, _args: &[&str]) -> RedisResult<CallReply<'static>> {
        Err(ErrorReply("ERR not here"))
    }

    /// One of the commands that the module calls. Another one is a mistake.
    pub fn call_ext(
        &self,
        command: &str,
        options: &CallOptions,
        args: &[impl AsRef<[u8]>],
    ) -> CallResult<'static> {
        let done = CallReply::Other(std::marker::PhantomData);
        let args: Vec<&[u8]> = args.iter().map(AsRef::as_ref).collect();
        let name = args[0];
        let rest = || args[1..].iter().map(|arg| arg.to_vec());
        match command {
            "GET" => {
                return match server::get(name) {
                    Some(Value::Text(text)) => Ok(CallReply::String(Text(text))),
                    Some(_) => Err(WRONG_TYPE),
                    None => Ok(done),
                };
            }
            "LPUSHX" if options.verify_oom && FULL.get() => {
                return Err(ErrorReply("OOM command not allowed"));
            }
            "LPUSHX" => return Ok(done),
            "SET" => {
                WRITES.set(WRITES.get() + 1);
                let value = rest().next().expect("a value");
                server::put("set", name, Some(Value::Text(value)));
            }
            "DEL" => {
                WRITES.set(WRITES.get() + 1);
                for name in args {
                    if server::get(name).is_some() {
                        server::put("del", name, None);
                    }
                }
            }
            "HSET" => {
                WRITES.set(WRITES.get() + 1);
                let mut fields = hash(name)?;
                let words: Vec<Vec<u8>> = rest().collect();
                assert!(!words.is_empty() && words.len() % 2 == 0, "HSET {args:?}");
                fields.extend(
                    words
                        .chunks(2)
                        .map(|pair| (pair[0].clone(), pair[1].clone())),
                );
                server::put("hset", name, Some(Value::Hash(fields)));
            }
            "HDEL" => {
                WRITES.set(WRITES.get() + 1);
                let mut fields = hash(name)?;
                let before = fields.len();
                rest().for_each(|field| drop(fields.remove(&field)));
                if fields.len() != before {
                    let is_empty = fields.is_empty();
                    server::put("hdel", name, (!is_empty).then_some(Value::Hash(fields)));
                    if is_empty {
                        server::changed("del", name);
                    }
                }
            }
            other => panic!("the module calls {other}, which this server does not have"),
        }
        Ok(done)
    }
}

/// The fields of a hash; none where there is no key.
fn hash(name: &[u8]) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, ErrorReply> {
    match server::get(name) {
        None => Ok(BTreeMap::new()),
        Some(Value::Hash(fields)) => Ok(fields),
        Some(_) => Err(WRONG_TYPE),
    }
}

pub mod logging {
    #[derive(Clone, Copy, Debug)]
    pub enum RedisLogLevel {
        Notice,
        Warning,
    }
}

pub mod server_events {
    use super::Context;

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum ServerRole {
        Primary,
        Replica,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum LoadingSubevent {
        RdbStarted,
        Ended,
        Failed,
    }

    #[linkme::distributed_slice]
    pub static ROLE_CHANGED_SERVER_EVENTS_LIST: [fn(&Context, ServerRole)];

    #[linkme::distributed_slice]
    pub static LOADING_SERVER_EVENTS_LIST: [fn(&Context, LoadingSubevent)];
}
