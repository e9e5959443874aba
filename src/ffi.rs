//! Every call into Redis that the crate `redis-module` has no safe form of, and
//! the entry points that Redis calls. The only file with `unsafe` in it: each
//! block says what makes it sound. It decides nothing.
//!
//! Nothing that happens behind an entry point may unwind into Redis: a panic
//! becomes an error reply and a line in the log.
#![allow(unsafe_code)]

use crate::errors::Failure;
use redis_module::logging::RedisLogLevel;
use redis_module::{Context, ContextFlags, RedisString, Status, raw};
use std::any::Any;
use std::cell::Cell;
use std::ffi::{CStr, CString, c_char, c_int, c_long, c_longlong, c_void};
use std::io::{Read, Write};
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What Redis is told of a command.
pub(crate) struct Spec {
    pub(crate) name: &'static CStr,
    /// Command flags as `RedisModule_CreateCommand` takes them.
    pub(crate) flags: &'static CStr,
    /// ACL categories, for servers that let modules name theirs.
    pub(crate) acl: &'static CStr,
    /// The number of arguments, the command's name included; negative: at least.
    pub(crate) arity: c_int,
    pub(crate) summary: &'static CStr,
    pub(crate) complexity: &'static CStr,
    pub(crate) since: &'static CStr,
    pub(crate) args: &'static [Arg],
}

/// One argument in a command's documentation.
#[derive(Clone, Copy)]
pub(crate) struct Arg {
    pub(crate) name: &'static CStr,
    pub(crate) kind: ArgKind,
    /// The word that introduces the argument.
    pub(crate) token: Option<&'static CStr>,
    pub(crate) optional: bool,
}

#[derive(Clone, Copy)]
pub(crate) enum ArgKind {
    Text,
    Integer,
    Instant,
    /// A word that stands for itself.
    Word,
    /// One of these.
    OneOf(&'static [Arg]),
    /// All of these, in order.
    Block(&'static [Arg]),
}

impl Arg {
    pub(crate) const fn new(name: &'static CStr, kind: ArgKind) -> Self {
        Self {
            name,
            kind,
            token: None,
            optional: false,
        }
    }

    pub(crate) const fn token(self, token: &'static CStr) -> Self {
        Self {
            token: Some(token),
            ..self
        }
    }

    pub(crate) const fn optional(self) -> Self {
        Self {
            optional: true,
            ..self
        }
    }
}

/// A command of the module.
pub(crate) trait Command {
    const SPEC: Spec;

    /// Carries the command out and replies, or fails with nothing replied.
    fn run(call: &Call<'_>) -> Result<(), Failure>;
}

/// One call of a command: its arguments, its context, its reply.
pub(crate) struct Call<'a> {
    pub(crate) ctx: Context,
    /// The server's own list, which [`Self::redact`] may have it write to.
    argv: *const *mut raw::RedisModuleString,
    argc: usize,
    lifetime: PhantomData<&'a ()>,
    /// The argument to be redacted, if there is one.
    secret: Cell<Option<usize>>,
    replied: Cell<bool>,
}

impl<'a> Call<'a> {
    /// The argument at that place; 0 is the command's name.
    pub(crate) fn arg(&self, place: usize) -> Option<&'a [u8]> {
        if place >= self.argc {
            return None;
        }
        // SAFETY: Redis passes `argc` arguments in a list that lives as long as
        // the call.
        let argument = unsafe { *self.argv.add(place) };
        // Redis keeps each argument until the command returns, and 'a ends
        // before that.
        (!argument.is_null()).then(|| RedisString::string_as_slice(argument))
    }

    /// The number of arguments, the command's name included.
    pub(crate) fn len(&self) -> usize {
        self.argc
    }

    /// Keeps an argument out of SLOWLOG and MONITOR, which are told of a command
    /// when it is over; all of them, should the command fail.
    pub(crate) fn keep_secret(&self, place: usize) {
        self.secret.set(Some(place));
    }

    /// Redacts an argument where the server can. To be done last: Valkey puts
    /// something else into the list of arguments.
    fn redact(&self, place: usize) {
        // SAFETY: a plain call with this command's own context. The symbol is
        // absent on servers before 7.0 and then not called.
        unsafe {
            if let (Some(redact), Ok(place)) = (
                raw::RedisModule_RedactClientCommandArgument,
                c_int::try_from(place),
            ) {
                redact(self.ctx.ctx, place);
            }
        }
    }

    /// The reply to this call. To be asked for once everything that can fail
    /// is over.
    pub(crate) fn reply(&self) -> Reply {
        self.replied.set(true);
        Reply { ctx: self.ctx.ctx }
    }

    /// Whether the client may be put on hold: not within MULTI or a script.
    pub(crate) fn may_block(&self) -> bool {
        let forbidden = ContextFlags::DENY_BLOCKING | ContextFlags::MULTI | ContextFlags::LUA;
        !self.ctx.get_flags().intersects(forbidden)
    }

    /// Puts the client on hold; the reply is given later, from any thread.
    pub(crate) fn block(&self) -> Blocked {
        self.replied.set(true);
        // SAFETY: called from within a command, with its context; no callbacks
        // are given, so none can outlive what they use.
        let client = unsafe {
            raw::RedisModule_BlockClient
                .and_then(|block| NonNull::new(block(self.ctx.ctx, None, None, None, 0)))
        };
        Blocked {
            client,
            replied: false,
        }
    }
}

/// A client on hold. Dropping it lets the client go on, with an error if it has
/// had no reply.
pub(crate) struct Blocked {
    client: Option<NonNull<raw::RedisModuleBlockedClient>>,
    replied: bool,
}

// SAFETY: Redis allows a blocked client's handle to be used from any thread.
unsafe impl Send for Blocked {}

impl Blocked {
    /// Gives the client its reply.
    pub(crate) fn reply(mut self, write: impl FnOnce(&Reply)) {
        self.write(write);
    }

    fn write(&mut self, write: impl FnOnce(&Reply)) {
        self.replied = true;
        let Some(client) = self.client else { return };
        // SAFETY: a thread-safe context of a live handle, used only for replies
        // (which need no lock) and freed here.
        unsafe {
            if let (Some(open), Some(close)) = (
                raw::RedisModule_GetThreadSafeContext,
                raw::RedisModule_FreeThreadSafeContext,
            ) {
                let ctx = open(client.as_ptr());
                let written = catch_unwind(AssertUnwindSafe(|| write(&Reply { ctx })));
                close(ctx);
                if let Err(panic) = written {
                    log_panic("a delayed reply", &*panic);
                }
            }
        }
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        if !self.replied {
            self.write(|reply| reply.error(&Failure::NoWatcher));
        }
        // SAFETY: the handle is live until this very call, which happens once.
        unsafe {
            if let (Some(client), Some(unblock)) =
                (self.client.take(), raw::RedisModule_UnblockClient)
            {
                unblock(client.as_ptr(), ptr::null_mut());
            }
        }
    }
}

/// Writes a reply, value after value: a map of n pairs is followed by 2 n values.
pub(crate) struct Reply {
    ctx: *mut raw::RedisModuleCtx,
}

impl Reply {
    pub(crate) fn map(&self, pairs: usize) {
        raw::reply_with_map(self.ctx, pairs as c_long);
    }

    pub(crate) fn array(&self, length: usize) {
        raw::reply_with_array(self.ctx, length as c_long);
    }

    pub(crate) fn text(&self, text: &str) {
        raw::reply_with_string_buffer(self.ctx, text.as_ptr().cast::<c_char>(), text.len());
    }

    pub(crate) fn bytes(&self, bytes: &[u8]) {
        raw::reply_with_string_buffer(self.ctx, bytes.as_ptr().cast::<c_char>(), bytes.len());
    }

    pub(crate) fn integer(&self, number: i64) {
        raw::reply_with_long_long(self.ctx, number);
    }

    pub(crate) fn null(&self) {
        raw::reply_with_null(self.ctx);
    }

    pub(crate) fn error(&self, failure: &Failure) {
        let text = CString::new(failure.to_string()).unwrap_or_default();
        // SAFETY: a live context and a string that outlives the call.
        unsafe {
            if let Some(reply) = raw::RedisModule_ReplyWithError {
                reply(self.ctx, text.as_ptr());
            }
        }
    }
}

/// Runs something that Redis called for; a panic ends there.
pub(crate) fn guarded<R>(what: &str, run: impl FnOnce() -> R) -> Option<R> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => Some(result),
        Err(panic) => {
            log_panic(what, &*panic);
            crate::node::suspect();
            None
        }
    }
}

/// Has panics logged where they happen, and no stack printed: for that, libc's
/// memory would be freed by the module, and Valkey, which gives modules symbols
/// of their own (RTLD_DEEPBIND), has the two use different allocators.
pub(crate) fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        if let Some(place) = panic.location() {
            log(RedisLogLevel::Warning, &format!("panic at {place}"));
        }
    }));
}

fn log_panic(what: &str, panic: &(dyn Any + Send)) {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    let text = text.unwrap_or("no message");
    log(
        RedisLogLevel::Warning,
        &format!("panic in {what}, which is a bug: {text}"),
    );
}

/// A line in Redis's log. The server takes the text as a C format, so what
/// would be special there is made plain.
pub(crate) fn log(level: RedisLogLevel, message: &str) {
    let plain: String = message
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    let ctx = Context::new(DETACHED.load(Ordering::Acquire));
    ctx.log(level, &plain.replace('%', "%%"));
}

extern "C" fn run_command<C: Command>(
    ctx: *mut raw::RedisModuleCtx,
    argv: *mut *mut raw::RedisModuleString,
    argc: c_int,
) -> c_int {
    let arguments = usize::try_from(argc).unwrap_or(0);
    let call = Call {
        ctx: Context::new(ctx),
        argv,
        argc: if argv.is_null() { 0 } else { arguments },
        lifetime: PhantomData,
        secret: Cell::new(None),
        replied: Cell::new(false),
    };
    let arity = C::SPEC.arity;
    let fits = if arity < 0 {
        argc >= -arity
    } else {
        argc == arity
    };
    if !fits {
        // SAFETY: a plain call with this command's own context.
        unsafe {
            if let Some(wrong_arity) = raw::RedisModule_WrongArity {
                wrong_arity(ctx);
            }
        }
        return Status::Ok as c_int;
    }
    let database = Database::zero(ctx);
    let name = const {
        match C::SPEC.name.to_str() {
            Ok(name) => name,
            Err(_) => "a command",
        }
    };
    let outcome = guarded(name, || C::run(&call));
    drop(database);
    let failure = match outcome {
        Some(Ok(())) => {
            if let Some(place) = call.secret.get() {
                call.redact(place);
            }
            return Status::Ok as c_int;
        }
        Some(Err(failure)) => failure,
        None => Failure::Internal,
    };
    // A key at the wrong place is still a key.
    (1..call.len()).for_each(|place| call.redact(place));
    if !call.replied.get() {
        call.reply().error(&failure);
    }
    Status::Ok as c_int
}

/// The pool lives in database 0 whichever one the client has selected, which
/// is given back to it at the end.
struct Database {
    ctx: *mut raw::RedisModuleCtx,
    selected: c_int,
}

impl Database {
    fn zero(ctx: *mut raw::RedisModuleCtx) -> Self {
        let selected = selected_database(ctx);
        let database = Self { ctx, selected };
        if selected != 0 {
            database.select(0);
        }
        database
    }

    fn select(&self, number: c_int) {
        // SAFETY: a plain call with a live context.
        unsafe {
            if let Some(select) = raw::RedisModule_SelectDb {
                select(self.ctx, number);
            }
        }
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        if self.selected != 0 {
            self.select(self.selected);
        }
    }
}

fn selected_database(ctx: *mut raw::RedisModuleCtx) -> c_int {
    // SAFETY: a plain call with a live context.
    unsafe { raw::RedisModule_GetSelectedDb.map_or(0, |selected| selected(ctx)) }
}

/// Whether a notification is about the database that the pool lives in.
pub(crate) fn is_pool_database(ctx: &Context) -> bool {
    selected_database(ctx.ctx) == 0
}

/// Makes the command known to Redis, with its documentation and ACL categories.
pub(crate) fn register<C: Command>(ctx: &Context) -> Result<(), &'static str> {
    let spec = C::SPEC;
    // SAFETY: every pointer is to something that lives until the call returns
    // (Redis copies what it keeps), and the callback is a plain function.
    unsafe {
        let create = raw::RedisModule_CreateCommand.ok_or("this server can't create commands")?;
        let (name, flags) = (spec.name.as_ptr(), spec.flags.as_ptr());
        if create(ctx.ctx, name, Some(run_command::<C>), flags, 0, 0, 0) != Status::Ok as c_int {
            return Err("the server refuses a command: its name is taken or its flags are unknown");
        }
        let command = raw::RedisModule_GetCommand.map_or(ptr::null_mut(), |get| get(ctx.ctx, name));
        if command.is_null() {
            return Err("a command just created can't be found");
        }
        if let Some(set_categories) = raw::RedisModule_SetCommandACLCategories {
            set_categories(command, spec.acl.as_ptr());
        }
        let Some(set_info) = raw::RedisModule_SetCommandInfo else {
            return Ok(());
        };
        let mut lists = Vec::new();
        let args = argument_list(spec.args, spec.since, &mut lists);
        let version = raw::RedisModuleCommandInfoVersion {
            version: 1,
            sizeof_historyentry: size_of::<raw::RedisModuleCommandHistoryEntry>(),
            sizeof_keyspec: size_of::<raw::RedisModuleCommandKeySpec>(),
            sizeof_arg: size_of::<raw::RedisModuleCommandArg>(),
        };
        let mut info: raw::RedisModuleCommandInfo = std::mem::zeroed();
        info.version = &raw const version;
        info.summary = spec.summary.as_ptr();
        info.complexity = spec.complexity.as_ptr();
        info.since = spec.since.as_ptr();
        info.arity = spec.arity;
        info.args = args;
        if set_info(command, &raw const info) != Status::Ok as c_int {
            return Err("the server refuses a command's documentation");
        }
    }
    Ok(())
}

/// The list as Redis takes it: one entry an argument and an empty one at the
/// end. `lists` keeps every list alive for as long as the caller needs them.
fn argument_list(
    args: &[Arg],
    since: &'static CStr,
    lists: &mut Vec<Box<[raw::RedisModuleCommandArg]>>,
) -> *mut raw::RedisModuleCommandArg {
    if args.is_empty() {
        return ptr::null_mut();
    }
    let mut entries = Vec::with_capacity(args.len() + 1);
    for arg in args {
        // SAFETY: a struct of pointers, numbers and an enum whose first value
        // is 0: all zeros is a valid, empty one.
        let mut entry: raw::RedisModuleCommandArg = unsafe { std::mem::zeroed() };
        entry.name = arg.name.as_ptr();
        entry.key_spec_index = -1;
        entry.token = arg.token.map_or(ptr::null(), CStr::as_ptr);
        entry.since = since.as_ptr();
        if arg.optional {
            entry.flags = raw::REDISMODULE_CMD_ARG_OPTIONAL as c_int;
        }
        let (kind, parts): (_, &[Arg]) = match arg.kind {
            ArgKind::Text => (
                raw::RedisModuleCommandArgType_REDISMODULE_ARG_TYPE_STRING,
                &[],
            ),
            ArgKind::Integer => (
                raw::RedisModuleCommandArgType_REDISMODULE_ARG_TYPE_INTEGER,
                &[],
            ),
            ArgKind::Instant => (
                raw::RedisModuleCommandArgType_REDISMODULE_ARG_TYPE_UNIX_TIME,
                &[],
            ),
            ArgKind::Word => (
                raw::RedisModuleCommandArgType_REDISMODULE_ARG_TYPE_PURE_TOKEN,
                &[],
            ),
            ArgKind::OneOf(parts) => (
                raw::RedisModuleCommandArgType_REDISMODULE_ARG_TYPE_ONEOF,
                parts,
            ),
            ArgKind::Block(parts) => (
                raw::RedisModuleCommandArgType_REDISMODULE_ARG_TYPE_BLOCK,
                parts,
            ),
        };
        entry.type_ = kind;
        entry.subargs = argument_list(parts, since, lists);
        entries.push(entry);
    }
    // SAFETY: as above; an empty entry ends the list.
    entries.push(unsafe { std::mem::zeroed() });
    let mut list = entries.into_boxed_slice();
    let first = list.as_mut_ptr();
    lists.push(list);
    first
}

/// Lets Redis apply what its configuration file says of the module's settings.
/// False: it says something that is refused.
pub(crate) fn load_configs(ctx: &Context) -> bool {
    // SAFETY: a plain call with the context of the module's load.
    unsafe { raw::RedisModule_LoadConfigs.is_none_or(|load| load(ctx.ctx) == Status::Ok as c_int) }
}

/// A key of the keyspace, open for reading.
struct OpenKey(NonNull<raw::RedisModuleKey>);

impl OpenKey {
    /// The key, if it is there. Looking does not count as use.
    fn open(ctx: &Context, name: &[u8]) -> Option<Self> {
        let name = RedisString::create_from_slice(ptr::null_mut(), name);
        let mode = (raw::REDISMODULE_READ | raw::REDISMODULE_OPEN_KEY_NOTOUCH) as c_int;
        // SAFETY: a live context and a live string; Redis keeps the name itself.
        let key = unsafe { raw::RedisModule_OpenKey?(ctx.ctx, name.inner, mode) };
        NonNull::new(key.cast()).map(Self)
    }

    fn kind(&self) -> c_int {
        // SAFETY: the key is open.
        unsafe { raw::RedisModule_KeyType.map_or(0, |kind| kind(self.0.as_ptr())) }
    }

    /// Whether nothing is left of what it holds.
    fn is_empty(&self) -> bool {
        // SAFETY: the key is open.
        unsafe { raw::RedisModule_ValueLength.is_some_and(|length| length(self.0.as_ptr()) == 0) }
    }
}

impl Drop for OpenKey {
    fn drop(&mut self) {
        raw::close_key(self.0.as_ptr());
    }
}

/// Names of a hash's fields, as strings of the server's. They are made once: to
/// make one anew for each look costs more than the look.
pub(crate) struct Fields<const N: usize> {
    names: [&'static str; N],
    made: [AtomicPtr<raw::RedisModuleString>; N],
}

impl<const N: usize> Fields<N> {
    pub(crate) const fn new(names: [&'static str; N]) -> Self {
        Self {
            names,
            made: [const { AtomicPtr::new(ptr::null_mut()) }; N],
        }
    }

    /// The name at that place; null beyond the last.
    fn get(&self, place: usize) -> *mut raw::RedisModuleString {
        let (Some(name), Some(made)) = (self.names.get(place), self.made.get(place)) else {
            return ptr::null_mut();
        };
        let kept = made.load(Ordering::Acquire);
        if !kept.is_null() {
            return kept;
        }
        let new = RedisString::create_from_slice(ptr::null_mut(), name.as_bytes());
        // Its place keeps it: it is not freed with this function's end.
        let new = ManuallyDrop::new(new).inner;
        made.store(new, Ordering::Release);
        new
    }

    /// Frees the strings. They are made again when they are asked for.
    pub(crate) fn free(&self) {
        for made in &self.made {
            let kept = made.swap(ptr::null_mut(), Ordering::AcqRel);
            if !kept.is_null() {
                drop(RedisString::from_redis_module_string(ptr::null_mut(), kept));
            }
        }
    }
}

/// Fields of the hash at a key; none where the key isn't there.
pub(crate) fn read_hash<const N: usize>(
    ctx: &Context,
    name: &[u8],
    fields: &Fields<N>,
) -> Result<Option<[Option<RedisString>; N]>, WrongType> {
    const { assert!(N <= 5, "the call below asks for five fields at most") };
    let Some(key) = OpenKey::open(ctx, name) else {
        return Ok(None);
    };
    match key.kind() {
        kind if kind == raw::REDISMODULE_KEYTYPE_EMPTY as c_int => return Ok(None),
        kind if kind == raw::REDISMODULE_KEYTYPE_HASH as c_int => {}
        _ => return Err(WrongType),
    }
    let mut values = [ptr::null_mut::<raw::RedisModuleString>(); 5];
    let [first, second, third, fourth, fifth] = values.each_mut().map(|value| &raw mut *value);
    // SAFETY: an open key that holds a hash; the list of names and places ends
    // with a null, which for fewer fields is the first name that isn't there; the
    // strings written, if any, are ours to free.
    unsafe {
        if let Some(get) = raw::RedisModule_HashGet {
            get(
                key.0.as_ptr(),
                raw::REDISMODULE_HASH_NONE as c_int,
                fields.get(0),
                first,
                fields.get(1),
                second,
                fields.get(2),
                third,
                fields.get(3),
                fourth,
                fields.get(4),
                fifth,
                ptr::null_mut::<raw::RedisModuleString>(),
            );
        }
    }
    // Redis 8.2 tells of a hash whose last field has expired, and only then drops it.
    if values.iter().all(|value| value.is_null()) && key.is_empty() {
        return Ok(None);
    }
    let mut values = values.into_iter().map(|value| {
        (!value.is_null()).then(|| RedisString::from_redis_module_string(ptr::null_mut(), value))
    });
    Ok(Some([(); N].map(|()| values.next().flatten())))
}

/// A walk over the keys of the pool's database, on the main thread. The crate's
/// own cursor keeps a reference to every name for ever.
pub(crate) struct Cursor(Option<NonNull<raw::RedisModuleScanCursor>>);

// SAFETY: it is kept where any thread could reach it, and used and dropped on
// the main thread alone, where everything is that calls for it.
unsafe impl Send for Cursor {}

impl Cursor {
    pub(crate) fn new() -> Self {
        // SAFETY: a plain call; what it gives is destroyed with this.
        let cursor = unsafe { raw::RedisModule_ScanCursorCreate.map(|create| create()) };
        Self(cursor.and_then(NonNull::new))
    }

    /// Calls `found` with the names of a few keys; it must not touch the
    /// keyspace. Answers whether there are more. A key that is there from the
    /// first step to the last comes up; it may do so twice.
    pub(crate) fn step<F: FnMut(&[u8])>(&mut self, ctx: &Context, mut found: F) -> bool {
        let Some(cursor) = self.0 else { return false };
        // SAFETY: a live cursor; the callback gets the pointer to `found` back as
        // what it is, and only during the call.
        let more = unsafe {
            let found = (&raw mut found).cast::<c_void>();
            raw::RedisModule_Scan
                .map(|scan| scan(ctx.ctx, cursor.as_ptr(), Some(on_scanned::<F>), found))
        };
        more.is_some_and(|more| more != 0)
    }
}

impl Drop for Cursor {
    fn drop(&mut self) {
        // SAFETY: the cursor came from Redis, and nothing else has it.
        unsafe {
            if let (Some(cursor), Some(destroy)) = (self.0, raw::RedisModule_ScanCursorDestroy) {
                destroy(cursor.as_ptr());
            }
        }
    }
}

unsafe extern "C" fn on_scanned<F: FnMut(&[u8])>(
    _ctx: *mut raw::RedisModuleCtx,
    name: *mut raw::RedisModuleString,
    _key: *mut raw::RedisModuleKey,
    found: *mut c_void,
) {
    // SAFETY: `step` passes a pointer to its closure, which nobody else uses
    // until it returns.
    if let Some(found) = unsafe { found.cast::<F>().as_mut() } {
        guarded("a scan", || found(RedisString::string_as_slice(name)));
    }
}

/// Whether a key is free for a hash: not there, or holding one.
pub(crate) fn can_hold_hash(ctx: &Context, name: &[u8]) -> bool {
    let kind =
        OpenKey::open(ctx, name).map_or(raw::REDISMODULE_KEYTYPE_EMPTY as c_int, |key| key.kind());
    kind == raw::REDISMODULE_KEYTYPE_EMPTY as c_int
        || kind == raw::REDISMODULE_KEYTYPE_HASH as c_int
}

/// Sets a key to a number, replicated. Given as a number, Redis keeps a shared
/// object for it; given as text, it would allocate one and free the old one,
/// which with many accounts is most of what choosing one costs.
pub(crate) fn set_number(ctx: &Context, name: &str, number: u64) -> Result<(), Refused> {
    let number = c_longlong::try_from(number).unwrap_or(c_longlong::MAX);
    // SAFETY: the format names what follows: a buffer with its length, and a
    // number; errors come as replies; the reply is ours to free.
    unsafe {
        let call = raw::RedisModule_Call.ok_or(Refused(String::new()))?;
        let reply = call(
            ctx.ctx,
            c"SET".as_ptr(),
            c"!Ebl".as_ptr(),
            name.as_ptr(),
            name.len(),
            number,
        );
        accepted(reply)
    }
}

/// A call's format: as many buffers as are left of it, replicated, errors as
/// replies.
const BUFFERS: &CStr = c"bbbbbbbbb!E";
/// The most arguments of [`write`].
const MOST: usize = 9;

/// Carries a command with up to nine arguments out, replicated. Redis makes its
/// strings of them itself; the crate's way makes them first, in a list, and costs
/// a good part of the call again.
pub(crate) fn write(ctx: &Context, command: &CStr, args: &[&str]) -> Result<(), Refused> {
    let skipped = MOST.checked_sub(args.len());
    let format = skipped.and_then(|skipped| BUFFERS.to_bytes_with_nul().get(skipped..));
    let format = format.ok_or(Refused(String::new()))?;
    let mut args = args.iter().copied();
    let args: [&str; MOST] = std::array::from_fn(|_| args.next().unwrap_or_default());
    let [a, b, c, d, e, f, g, h, i] = args.map(|arg| (arg.as_ptr(), arg.len()));
    // SAFETY: the format names the arguments, buffers with their lengths, and ends
    // with a NUL; what follows those is not looked at; the reply is ours to free.
    unsafe {
        let call = raw::RedisModule_Call.ok_or(Refused(String::new()))?;
        let reply = call(
            ctx.ctx,
            command.as_ptr(),
            format.as_ptr().cast::<c_char>(),
            a.0,
            a.1,
            b.0,
            b.1,
            c.0,
            c.1,
            d.0,
            d.1,
            e.0,
            e.1,
            f.0,
            f.1,
            g.0,
            g.1,
            h.0,
            h.1,
            i.0,
            i.1,
        );
        accepted(reply)
    }
}

/// What came of a write; frees the reply to it.
///
/// # Safety
/// The reply is the server's, or null, and nobody uses it any more.
unsafe fn accepted(reply: *mut raw::RedisModuleCallReply) -> Result<(), Refused> {
    if reply.is_null() {
        return Err(Refused(String::new()));
    }
    let refused = raw::call_reply_type(reply) == raw::ReplyType::Error;
    let text = if refused {
        raw::call_reply_string(reply)
    } else {
        None
    };
    raw::free_call_reply(reply);
    if refused {
        Err(Refused(text.unwrap_or_default()))
    } else {
        Ok(())
    }
}

/// The server's own error to a write.
pub(crate) struct Refused(pub(crate) String);

/// The key holds another type than it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WrongType;

/// The module's own context, for what no call of the server's gives one for.
static DETACHED: AtomicPtr<raw::RedisModuleCtx> = AtomicPtr::new(ptr::null_mut());

/// Makes that context; once a load.
pub(crate) fn open_detached(ctx: &Context) {
    // SAFETY: a plain call with the context of the module's load.
    let detached = unsafe {
        raw::RedisModule_GetDetachedThreadSafeContext.map_or(ptr::null_mut(), |open| open(ctx.ctx))
    };
    DETACHED.store(detached, Ordering::Release);
}

/// The end of what [`open_detached`] began; no thread may use it any more.
pub(crate) fn close_detached() {
    let detached = DETACHED.swap(ptr::null_mut(), Ordering::AcqRel);
    // SAFETY: the context came from Redis, and nothing else has it any more.
    unsafe {
        if let (false, Some(close)) = (detached.is_null(), raw::RedisModule_FreeThreadSafeContext) {
            close(detached);
        }
    }
}

/// How a thread of the module calls the main thread: a byte written to the one
/// end wakes the event loop, which watches the other.
static BELL: Mutex<Option<(UnixStream, UnixStream)>> = Mutex::new(None);
/// The timer of the turn to come; 0 while there is none.
static TURN_AHEAD: AtomicU64 = AtomicU64::new(0);

fn bell() -> MutexGuard<'static, Option<(UnixStream, UnixStream)>> {
    BELL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has the event loop listen for [`ring`]; once a load.
pub(crate) fn open_bell() -> Result<(), &'static str> {
    let open = || {
        let (rope, clapper) = UnixStream::pair().ok()?;
        rope.set_nonblocking(true).ok()?;
        clapper.set_nonblocking(true).ok()?;
        // SAFETY: a plain call on the main thread; `close_bell` takes the
        // descriptor back before it is closed or the callback's code goes.
        let added = unsafe {
            raw::RedisModule_EventLoopAdd.map(|add| {
                let readable = raw::REDISMODULE_EVENTLOOP_READABLE as c_int;
                add(
                    clapper.as_raw_fd(),
                    readable,
                    Some(on_bell),
                    ptr::null_mut(),
                )
            })
        };
        (added == Some(Status::Ok as c_int)).then_some((rope, clapper))
    };
    let pair = open().ok_or("the server's event loop takes no further descriptor")?;
    *bell() = Some(pair);
    TURN_AHEAD.store(0, Ordering::Relaxed);
    Ok(())
}

/// The end of what [`open_bell`] began; on the main thread.
pub(crate) fn close_bell() {
    let Some((_, clapper)) = bell().take() else {
        return;
    };
    // SAFETY: a plain call on the main thread, the descriptor still open.
    unsafe {
        if let Some(remove) = raw::RedisModule_EventLoopDel {
            remove(
                clapper.as_raw_fd(),
                raw::REDISMODULE_EVENTLOOP_READABLE as c_int,
            );
        }
    }
}

/// Has the main thread take a turn ([`crate::background::turn`]) soon: not
/// while it runs a script or loads. From any thread; never waits.
pub(crate) fn ring() {
    if let Some((rope, _)) = &*bell() {
        // Full, it has been rung before.
        let _ = (&*rope).write(&[0]);
    }
}

/// The event loop hears the bell. It does so in the midst of a script or a
/// load as well, and gives no context for writes that belong together; a timer
/// comes between commands alone, and has one.
unsafe extern "C" fn on_bell(_fd: c_int, _data: *mut c_void, _mask: c_int) {
    if let Some((_, clapper)) = &*bell() {
        while (&*clapper).read(&mut [0; 64]).is_ok_and(|count| count > 0) {}
    }
    let ctx = DETACHED.load(Ordering::Acquire);
    if ctx.is_null() || TURN_AHEAD.load(Ordering::Relaxed) != 0 {
        return;
    }
    // SAFETY: a live context of the module, used on the main thread. The server
    // unloads no module that has a timer, so the callback's code is there.
    let timer = unsafe {
        raw::RedisModule_CreateTimer
            .map_or(0, |create| create(ctx, 0, Some(on_turn), ptr::null_mut()))
    };
    TURN_AHEAD.store(timer, Ordering::Relaxed);
}

/// The server's cron, between commands as well. A timer waits for the time of
/// day that it was set at: were the clock put back meanwhile, by an hour say,
/// the turn would come an hour late.
unsafe extern "C" fn on_cron(
    ctx: *mut raw::RedisModuleCtx,
    _event: raw::RedisModuleEvent,
    _subevent: u64,
    _data: *mut c_void,
) {
    guarded("the cron event", || {
        crate::events::time_has_passed(&Context::new(ctx))
    });
    let timer = TURN_AHEAD.load(Ordering::Relaxed);
    if timer == 0 {
        return;
    }
    // SAFETY: a plain call on the main thread with a context of the module's.
    let stopped =
        unsafe { raw::RedisModule_StopTimer.map(|stop| stop(ctx, timer, ptr::null_mut())) };
    if stopped == Some(Status::Ok as c_int) {
        // SAFETY: what the timer would have called, with a live context.
        unsafe { on_turn(ctx, ptr::null_mut()) };
    }
}

unsafe extern "C" fn on_turn(ctx: *mut raw::RedisModuleCtx, _data: *mut c_void) {
    TURN_AHEAD.store(0, Ordering::Relaxed);
    guarded("a turn", || crate::background::turn(&Context::new(ctx)));
}

/// Processor time that this thread has used so far.
pub(crate) fn processor_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the call writes to the struct, which is of this very function.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or_default())
}

/// Whether anybody is connected: while the server starts nobody is, and whoever
/// loads the module later is.
pub(crate) fn has_clients(ctx: &Context) -> bool {
    // SAFETY: plain calls with a live context; what the first gives is freed by
    // the last, and the names are strings that outlive the calls.
    unsafe {
        let (Some(ask), Some(field), Some(free)) = (
            raw::RedisModule_GetServerInfo,
            raw::RedisModule_ServerInfoGetFieldUnsigned,
            raw::RedisModule_FreeServerInfo,
        ) else {
            return false;
        };
        let info = ask(ctx.ctx, c"clients".as_ptr());
        let mut missing = 0;
        let count = field(info, c"connected_clients".as_ptr(), &raw mut missing);
        free(ctx.ctx, info);
        missing == 0 && count > 0
    }
}

/// Has Redis tell those who track that key (CLIENT TRACKING) that it has changed.
pub(crate) fn signal_change(ctx: &Context, name: &[u8]) {
    let name = ctx.create_string(name);
    // SAFETY: a live context and string.
    unsafe {
        if let Some(signal) = raw::RedisModule_SignalModifiedKey {
            signal(ctx.ctx, name.inner);
        }
    }
}

/// Whether Redis asks that nothing be written without a client's wish: clients
/// are paused, for a failover say, and a write would abort the server.
pub(crate) fn must_not_write() -> bool {
    // SAFETY: a plain call without arguments.
    unsafe { raw::RedisModule_AvoidReplicaTraffic.is_some_and(|avoid| avoid() != 0) }
}

/// Asks to be told when databases are flushed or swapped, and of the server's cron.
pub(crate) fn subscribe(ctx: &Context) -> Result<(), &'static str> {
    let events = [
        (
            raw::REDISMODULE_EVENT_FLUSHDB,
            on_flush as unsafe extern "C" fn(_, _, _, _),
        ),
        (raw::REDISMODULE_EVENT_SWAPDB, on_swap),
        (raw::REDISMODULE_EVENT_CRON_LOOP, on_cron),
    ];
    for (id, callback) in events {
        let event = raw::RedisModuleEvent { id, dataver: 1 };
        if raw::subscribe_to_server_event(ctx.ctx, event, Some(callback)) != Status::Ok {
            return Err(
                "the server refuses to tell of flushes and swaps of databases, or of its cron",
            );
        }
    }
    Ok(())
}

unsafe extern "C" fn on_flush(
    _ctx: *mut raw::RedisModuleCtx,
    _event: raw::RedisModuleEvent,
    subevent: u64,
    data: *mut c_void,
) {
    // SAFETY: Redis passes this struct with this event.
    let Some(flush) = (unsafe { data.cast::<raw::RedisModuleFlushInfo>().as_ref() }) else {
        return;
    };
    if subevent == raw::REDISMODULE_SUBEVENT_FLUSHDB_END && flush.dbnum <= 0 {
        guarded("the flush event", crate::events::flushed);
    }
}

unsafe extern "C" fn on_swap(
    ctx: *mut raw::RedisModuleCtx,
    _event: raw::RedisModuleEvent,
    _subevent: u64,
    data: *mut c_void,
) {
    // SAFETY: Redis passes this struct with this event.
    let Some(swap) = (unsafe { data.cast::<raw::RedisModuleSwapDbInfo>().as_ref() }) else {
        return;
    };
    if swap.dbnum_first == 0 || swap.dbnum_second == 0 {
        guarded("the swap event", || {
            crate::events::swapped(&Context::new(ctx))
        });
    }
}
