//! What `src/ffi.rs` is to the module's other files, over a server in memory:
//! a command's call, its reply written down, reads of the keyspace.

use crate::errors::Failure;
use redis_module::logging::RedisLogLevel;
use redis_module::{Context, RedisString, Value, server};
use std::cell::{Cell, RefCell};
use std::ffi::{CStr, c_int};

#[allow(unused, reason = "the real one gives it to Redis")]
pub(crate) struct Spec {
    pub(crate) name: &'static CStr,
    pub(crate) flags: &'static CStr,
    pub(crate) acl: &'static CStr,
    pub(crate) arity: c_int,
    pub(crate) summary: &'static CStr,
    pub(crate) complexity: &'static CStr,
    pub(crate) since: &'static CStr,
    pub(crate) args: &'static [Arg],
}

#[derive(Clone, Copy)]
pub(crate) struct Arg;

pub(crate) enum ArgKind {
    Text,
    Integer,
    Instant,
    Word,
    OneOf(#[allow(unused)] &'static [Arg]),
    Block(#[allow(unused)] &'static [Arg]),
}

impl Arg {
    pub(crate) const fn new(_: &'static CStr, _: ArgKind) -> Self {
        Self
    }

    pub(crate) const fn token(self, _: &'static CStr) -> Self {
        self
    }

    pub(crate) const fn optional(self) -> Self {
        self
    }
}

pub(crate) trait Command {
    const SPEC: Spec;

    fn run(call: &Call<'_>) -> Result<(), Failure>;
}

/// One value that a command replied with, a collection's contents following.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Item {
    Map(usize),
    Array(usize),
    Text(Vec<u8>),
    Integer(i64),
    Null,
    Error(String),
}

thread_local! {
    static REPLY: RefCell<Vec<Item>> = const { RefCell::new(Vec::new()) };
    static LOG: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// What came of a call.
pub(crate) struct Outcome {
    pub(crate) reply: Vec<Item>,
    /// The argument that is kept out of the server's logs.
    pub(crate) secret: Option<usize>,
}

pub(crate) fn call<C: Command>(words: &[Vec<u8>]) -> Outcome {
    let call = Call {
        ctx: Context,
        argv: words,
        replied: Cell::new(false),
        secret: Cell::new(None),
    };
    REPLY.take();
    let count = c_int::try_from(words.len()).expect("few words");
    let fits = match C::SPEC.arity {
        least if least < 0 => count >= -least,
        exact => count == exact,
    };
    let outcome = if fits {
        C::run(&call)
    } else {
        Err(Failure::Syntax("wrong number of arguments"))
    };
    if let Err(failure) = outcome {
        assert!(!call.replied.get(), "replied and failed: {failure}");
        Reply.error(&failure);
    }
    Outcome {
        reply: REPLY.take(),
        secret: call.secret.get(),
    }
}

pub(crate) struct Call<'a> {
    pub(crate) ctx: Context,
    argv: &'a [Vec<u8>],
    replied: Cell<bool>,
    secret: Cell<Option<usize>>,
}

impl<'a> Call<'a> {
    pub(crate) fn arg(&self, place: usize) -> Option<&'a [u8]> {
        self.argv.get(place).map(Vec::as_slice)
    }

    pub(crate) fn len(&self) -> usize {
        self.argv.len()
    }

    pub(crate) fn keep_secret(&self, place: usize) {
        self.secret.set(Some(place));
    }

    pub(crate) fn reply(&self) -> Reply {
        assert!(!self.replied.replace(true), "replied twice");
        Reply
    }

    pub(crate) fn may_block(&self) -> bool {
        true
    }

    pub(crate) fn block(&self) -> Blocked {
        Blocked
    }
}

pub(crate) struct Blocked;

impl Blocked {
    pub(crate) fn reply(self, write: impl FnOnce(&Reply)) {
        write(&Reply);
    }
}

pub(crate) struct Reply;

impl Reply {
    fn push(item: Item) {
        REPLY.with_borrow_mut(|reply| reply.push(item));
    }

    pub(crate) fn map(&self, pairs: usize) {
        Self::push(Item::Map(pairs));
    }

    pub(crate) fn array(&self, length: usize) {
        Self::push(Item::Array(length));
    }

    pub(crate) fn text(&self, text: &str) {
        Self::push(Item::Text(text.into()));
    }

    pub(crate) fn bytes(&self, bytes: &[u8]) {
        Self::push(Item::Text(bytes.into()));
    }

    pub(crate) fn integer(&self, number: i64) {
        Self::push(Item::Integer(number));
    }

    pub(crate) fn null(&self) {
        Self::push(Item::Null);
    }

    pub(crate) fn error(&self, failure: &Failure) {
        Self::push(Item::Error(failure.to_string()));
    }
}

/// A panic is what is looked for: nothing holds it up.
pub(crate) fn guarded<R>(_what: &str, run: impl FnOnce() -> R) -> Option<R> {
    Some(run())
}

pub(crate) fn log(_level: RedisLogLevel, message: &str) {
    LOG.with_borrow_mut(|log| log.push(message.to_owned()));
}

/// What has been logged since the last look.
pub(crate) fn logged() -> Vec<String> {
    LOG.take()
}

pub(crate) fn is_pool_database(_ctx: &Context) -> bool {
    true
}

/// Nobody tracks keys here.
pub(crate) fn signal_change(_ctx: &Context, _name: &[u8]) {}

pub(crate) fn must_not_write() -> bool {
    false
}

/// There is time for everything here.
pub(crate) fn processor_time() -> std::time::Duration {
    std::time::Duration::ZERO
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WrongType;

pub(crate) struct Fields<const N: usize>([&'static str; N]);

impl<const N: usize> Fields<N> {
    pub(crate) const fn new(names: [&'static str; N]) -> Self {
        Self(names)
    }

    pub(crate) fn free(&self) {}
}

pub(crate) fn read_hash<const N: usize>(
    _ctx: &Context,
    name: &[u8],
    fields: &Fields<N>,
) -> Result<Option<[Option<RedisString>; N]>, WrongType> {
    match server::get(name) {
        None => Ok(None),
        Some(Value::Hash(hash)) => {
            Ok(Some(fields.0.map(|field| {
                hash.get(field.as_bytes()).cloned().map(RedisString::new)
            })))
        }
        Some(_) => Err(WrongType),
    }
}

pub(crate) struct Cursor;

impl Cursor {
    pub(crate) fn new() -> Self {
        Self
    }

    pub(crate) fn step<F: FnMut(&[u8])>(&mut self, _ctx: &Context, mut found: F) -> bool {
        server::keys().keys().for_each(|name| found(name));
        false
    }
}

pub(crate) fn can_hold_hash(_ctx: &Context, name: &[u8]) -> bool {
    matches!(server::get(name), None | Some(Value::Hash(_)))
}

pub(crate) struct Refused(pub(crate) String);

pub(crate) fn set_number(ctx: &Context, name: &str, number: u64) -> Result<(), Refused> {
    write(ctx, c"SET", &[name, &number.to_string()])
}

pub(crate) fn write(ctx: &Context, command: &CStr, args: &[&str]) -> Result<(), Refused> {
    assert!(
        args.len() <= 9,
        "more arguments than the module's own can pass on"
    );
    let options = redis_module::CallOptionsBuilder::new().build();
    let command = command.to_str().expect("a command's name");
    let written = ctx.call_ext(command, &options, args);
    written
        .map(drop)
        .map_err(|error| Refused(String::from_utf8_lossy(error.as_bytes()).into()))
}

/// There is one thread here.
pub(crate) fn ring() {
    crate::background::turn(&Context);
}
