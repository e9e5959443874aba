//! The thread that follows the account files and brings changes into the pool.
//!
//! It owns the `Scanner`. The system's file notifications say when to look and
//! where; a slow rescan finds what they don't tell (network and Kubernetes
//! volumes), and a look at the folders themselves every half second finds that
//! one came, went or was replaced. A panic in here never ends the process.

use super::scan::{Flips, Scan, Scanner};
use crate::pool::Tier;
use notify::event::{AccessKind, AccessMode};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use std::collections::HashSet;
use std::fs;
use std::io;
use std::mem;
use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

/// Events are acted upon when there were none for this long,
const QUIET: Duration = Duration::from_millis(50);
/// and at the latest this long after the first.
const IMPATIENCE: Duration = Duration::from_millis(250);
/// Between two looks at whether the folders are the same.
const PULSE: Duration = Duration::from_millis(500);
/// Between two full scans that nothing asked for.
const RESCAN: Duration = Duration::from_secs(10);
/// The same while some folder can't be watched.
const RESCAN_BLIND: Duration = Duration::from_secs(1);
/// A rescan waits this many times the last one's duration, so that a large or
/// slow directory costs 2 % of one core at most.
const RESCAN_REST: u32 = 50;
/// The same after a flood of events.
const FLOOD_REST: u32 = 2;
/// Until the sink is asked again to settle what it could not.
const RETRY: Duration = Duration::from_millis(100);
/// The most paths, and the most events, kept; what exceeds them is one full scan.
const PENDING_MAX: usize = 1000;
/// How long `stop` waits for the thread.
const STOP_PATIENCE: Duration = Duration::from_secs(3);
/// After a panic, so that one which comes again and again costs little.
const PANIC_REST: Duration = Duration::from_millis(500);

/// Where the watcher's findings go. All of it is called on the watcher's
/// thread only. A panic in here is caught and warned of.
pub(crate) trait Sink: Send + 'static {
    /// Brings a scan's changes into the pool. Scans that found nothing new are
    /// left out, except those that [`Watcher::rescan`] and
    /// [`Watcher::set_root`] ask for.
    fn apply(&mut self, scan: Scan);
    /// Does pending work; called after [`Watcher::wake`] and `apply`, and again every
    /// 100 ms for as long as it returns true.
    fn settle(&mut self) -> bool;
    /// Tells the operator. The message holds nothing of a file's content.
    fn warn(&mut self, message: String);
}

/// What a rescan that was asked for found; lists in the order of tiers, then names.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    /// Accounts that became valid.
    pub(crate) added: Vec<(Tier, String)>,
    /// Accounts that were valid and are gone or invalid.
    pub(crate) removed: Vec<(Tier, String)>,
    /// Files that can't be used right now, judged or not yet, and why.
    pub(crate) broken: Vec<(Tier, String, &'static str)>,
    /// By [`Tier::index`]: whether the folder could be listed.
    pub(crate) readable: [bool; 3],
    /// Account files that every user of the machine may read.
    pub(crate) exposed: Vec<(Tier, String)>,
}

/// What a rescan calls when it is done.
type Done = Box<dyn FnOnce(Outcome) + Send>;

/// A handle to the thread.
pub(crate) struct Watcher {
    sender: Sender<Message>,
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

impl Watcher {
    /// Starts the thread, which begins with a full scan, be it the first or not.
    ///
    /// # Errors
    /// The system gives no thread.
    pub(crate) fn start(scanner: Scanner, sink: impl Sink) -> io::Result<Self> {
        let (sender, receiver) = mpsc::channel();
        let shared = Arc::new(Shared::default());
        let feed = Feed {
            sender: sender.clone(),
            shared: Arc::clone(&shared),
        };
        let mut worker = Worker::new(scanner, sink, receiver, feed);
        let thread = thread::Builder::new()
            .name("mpool-accounts".to_owned())
            .spawn(move || worker.run())?;
        Ok(Self {
            sender,
            shared,
            thread,
        })
    }

    /// Scans everything now, brings the changes to the sink and then calls
    /// `done` on the watcher's thread. When the watcher is stopping, `done` is
    /// dropped without a call.
    pub(crate) fn rescan(&self, done: Box<dyn FnOnce(Outcome) + Send>) {
        self.send(Message::Rescan(done));
    }

    /// Turns to another folder: its files are compared with the old one's.
    pub(crate) fn set_root(&self, root: PathBuf) {
        self.send(Message::Root(root));
    }

    /// Has the sink settle soon. Never waits; many calls become one.
    pub(crate) fn wake(&self) {
        if !self.shared.woken.swap(true, Ordering::AcqRel) {
            self.send(Message::Wake);
        }
    }

    /// Has the thread drop what would take the caller too long.
    pub(crate) fn discard(&self, waste: Box<dyn Send>) {
        self.send(Message::Discard(waste));
    }

    /// Asks the thread to end and waits for that, 3 s at most. The caller must
    /// hold no lock that the sink may be waiting for.
    ///
    /// # Errors
    /// The thread is still busy (with a sink or a file system that doesn't
    /// return) and will end later; its code must stay loaded until another try
    /// has succeeded.
    pub(crate) fn stop(self) -> Result<(), Self> {
        self.shared.stop.store(true, Ordering::Release);
        self.send(Message::Stop);
        let deadline = Instant::now() + STOP_PATIENCE;
        while !self.thread.is_finished() {
            if Instant::now() >= deadline {
                return Err(self);
            }
            thread::sleep(Duration::from_millis(1));
        }
        // It ended: what is left of a panic in it is of no interest.
        let _ = self.thread.join();
        Ok(())
    }

    fn send(&self, message: Message) {
        // An error means that the thread has ended.
        let _ = self.sender.send(message);
    }
}

enum Message {
    /// Something happened to these files.
    Paths(Vec<PathBuf>),
    /// Something happened somewhere.
    Everything,
    Wake,
    Rescan(Done),
    Root(PathBuf),
    Discard(Box<dyn Send>),
    Stop,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// A `Message::Wake` is under way.
    woken: AtomicBool,
    /// A `Message::Everything` is under way.
    everything: AtomicBool,
    /// How many `Message::Paths` are under way.
    events: AtomicUsize,
}

/// Brings the system's notifications to the thread, in bounded memory.
#[derive(Clone)]
struct Feed {
    sender: Sender<Message>,
    shared: Arc<Shared>,
}

impl Feed {
    fn event(&self, event: notify::Result<Event>) {
        match event {
            Ok(event) if event.need_rescan() => self.everything(),
            // The thread's own reading must not wake it again.
            Ok(event) if !is_change(event.kind) => {}
            Ok(event) => {
                if self.shared.events.fetch_add(1, Ordering::AcqRel) < PENDING_MAX {
                    let _ = self.sender.send(Message::Paths(event.paths));
                } else {
                    self.shared.events.fetch_sub(1, Ordering::AcqRel);
                    self.everything();
                }
            }
            Err(_) => self.everything(),
        }
    }

    fn everything(&self) {
        if !self.shared.everything.swap(true, Ordering::AcqRel) {
            let _ = self.sender.send(Message::Everything);
        }
    }
}

fn is_change(kind: EventKind) -> bool {
    match kind {
        EventKind::Access(kind) => kind == AccessKind::Close(AccessMode::Write),
        _ => true,
    }
}

/// What the thread works with.
struct Worker<S> {
    scanner: Scanner,
    sink: S,
    receiver: Receiver<Message>,
    shared: Arc<Shared>,
    eyes: Eyes,
    pending: Pending,
    next_pulse: Instant,
    next_rescan: Instant,
    /// No full scan because of events before this.
    rested: Instant,
    settle_at: Option<Instant>,
    /// What the sink knows of the folders.
    readable: Option<[bool; 3]>,
    warned_blind: bool,
}

/// Events that wait for being acted upon.
#[derive(Default)]
struct Pending {
    paths: HashSet<PathBuf>,
    everything: bool,
    /// When the first and the last of them came.
    since: Option<(Instant, Instant)>,
}

impl Pending {
    fn note(&mut self, now: Instant) {
        let first = self.since.map_or(now, |(first, _)| first);
        self.since = Some((first, now));
    }

    fn add(&mut self, path: PathBuf) {
        if !self.everything {
            self.paths.insert(path);
            if self.paths.len() > PENDING_MAX {
                self.add_everything();
            }
        }
    }

    fn add_everything(&mut self) {
        self.everything = true;
        self.paths = HashSet::new();
    }

    /// When to act; `rested` is the earliest for a full scan.
    fn due(&self, rested: Instant) -> Option<Instant> {
        let (first, last) = self.since?;
        let due = (last + QUIET).min(first + IMPATIENCE);
        Some(if self.everything {
            due.max(rested)
        } else {
            due
        })
    }
}

impl<S: Sink> Worker<S> {
    fn new(scanner: Scanner, sink: S, receiver: Receiver<Message>, feed: Feed) -> Self {
        let now = Instant::now();
        Self {
            eyes: Eyes::new(scanner.root(), feed.clone()),
            scanner,
            sink,
            receiver,
            shared: feed.shared,
            pending: Pending::default(),
            next_pulse: now,
            // At once: what happened between the first scan and now was not seen.
            next_rescan: now,
            rested: now,
            settle_at: None,
            readable: None,
            warned_blind: false,
        }
    }

    fn run(&mut self) {
        while !self.shared.stop.load(Ordering::Acquire) {
            match catch_unwind(AssertUnwindSafe(|| self.turn())) {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => break,
                Err(_) => self.recover(),
            }
        }
        guarded(|| self.eyes.close());
    }

    /// After a panic: nothing that is half done is relied upon.
    fn recover(&mut self) {
        self.warn("the account watcher had an internal error and starts over");
        guarded(|| self.eyes.close());
        self.pending = Pending::default();
        let later = Instant::now() + PANIC_REST;
        self.next_pulse = later;
        self.next_rescan = later;
    }

    /// Waits for something to do, and does it.
    fn turn(&mut self) -> ControlFlow<()> {
        let wait = self.wake_up_at().saturating_duration_since(Instant::now());
        match self.receiver.recv_timeout(wait) {
            Ok(message) => self.receive(message)?,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return ControlFlow::Break(()),
        }
        // Bounded, or a flood of events would keep it from acting.
        for _ in 0..PENDING_MAX {
            let Ok(message) = self.receiver.try_recv() else {
                break;
            };
            self.receive(message)?;
        }
        self.act();
        ControlFlow::Continue(())
    }

    fn wake_up_at(&self) -> Instant {
        let first = self.next_pulse.min(self.next_rescan);
        [
            self.pending.due(self.rested),
            self.scanner.deadline(),
            self.settle_at,
        ]
        .into_iter()
        .flatten()
        .fold(first, Instant::min)
    }

    fn receive(&mut self, message: Message) -> ControlFlow<()> {
        if self.shared.stop.load(Ordering::Acquire) {
            return ControlFlow::Break(());
        }
        match message {
            Message::Paths(paths) => {
                self.shared.events.fetch_sub(1, Ordering::AcqRel);
                self.pending.note(Instant::now());
                for path in paths {
                    if self.eyes.is_folder(&path) {
                        self.eyes.stale = true;
                        self.pending.add_everything();
                    }
                    for twin in self.eyes.twins(&path) {
                        self.pending.add(twin);
                    }
                    self.pending.add(path);
                }
            }
            Message::Everything => {
                self.shared.everything.store(false, Ordering::Release);
                self.pending.note(Instant::now());
                self.pending.add_everything();
                self.eyes.stale = true;
            }
            Message::Wake => {
                // Before it settles: a later wake must not get lost.
                self.shared.woken.store(false, Ordering::Release);
                self.settle_at = Some(Instant::now());
            }
            Message::Rescan(done) => {
                self.eyes.check();
                let scan = self.full_scan();
                let Flips { added, removed } = self.scanner.take_flips();
                let outcome = Outcome {
                    added,
                    removed,
                    broken: self.scanner.broken(),
                    readable: scan.readable,
                    exposed: self.scanner.exposed(),
                };
                self.apply(scan);
                if !guarded(|| done(outcome)) {
                    self.warn("answering a reload had an internal error");
                }
            }
            Message::Root(root) => {
                self.scanner.set_root(root);
                self.eyes.turn_to(self.scanner.root());
                let scan = self.full_scan();
                self.apply(scan);
            }
            Message::Discard(waste) => drop(waste),
            Message::Stop => return ControlFlow::Break(()),
        }
        ControlFlow::Continue(())
    }

    /// Does what is due.
    fn act(&mut self) {
        let now = Instant::now();
        if now >= self.next_pulse {
            self.next_pulse = now + PULSE;
            if self.eyes.check() {
                self.next_rescan = now;
            }
        }
        let events_due = self.pending.due(self.rested).is_some_and(|due| due <= now);
        let scan = if now >= self.next_rescan || (events_due && self.pending.everything) {
            Some(self.full_scan())
        } else if events_due {
            let paths: Vec<_> = mem::take(&mut self.pending).paths.into_iter().collect();
            Some(self.scanner.paths(&paths, now))
        } else if self.scanner.deadline().is_some_and(|due| due <= now) {
            Some(self.scanner.due(now))
        } else {
            None
        };
        if let Some(scan) = scan
            && (!scan.changes.is_empty() || self.readable != Some(scan.readable))
        {
            self.apply(scan);
        }
        for warning in warnings_of_exposed(&self.scanner.take_exposed()) {
            self.warn(&warning);
        }
        if self.settle_at.is_some_and(|due| due <= Instant::now()) {
            self.settle_at = None;
            let mut again = false;
            if !guarded(|| again = self.sink.settle()) {
                self.warn("an internal error while settling account changes");
            }
            if again {
                self.settle_at = Some(Instant::now() + RETRY);
            }
        }
    }

    /// Looks at everything. Whatever is pending is dealt with by that.
    fn full_scan(&mut self) -> Scan {
        // Watch first, then look, or a change between the two gets lost.
        if let Err(why) = self.eyes.open()
            && !mem::replace(&mut self.warned_blind, true)
        {
            self.warn(&format!(
                "changes of account files can't be watched ({why}); \
                 the files are looked at every {} s instead",
                RESCAN_BLIND.as_secs()
            ));
        }
        self.pending = Pending::default();
        let start = Instant::now();
        let scan = self.scanner.full(start);
        let end = Instant::now();
        let took = end - start;
        let period = if self.eyes.blind {
            RESCAN_BLIND
        } else {
            RESCAN
        };
        self.next_rescan = end + period.max(took.saturating_mul(RESCAN_REST));
        self.rested = end + took.saturating_mul(FLOOD_REST);
        scan
    }

    fn apply(&mut self, scan: Scan) {
        self.readable = Some(scan.readable);
        if !guarded(|| self.sink.apply(scan)) {
            self.warn("an internal error while applying account changes");
        }
        // What could not be put right at once is tried again.
        self.settle_at = Some(Instant::now());
    }

    fn warn(&mut self, message: &str) {
        guarded(|| self.sink.warn(message.to_owned()));
    }
}

/// Files that everybody may read of which one look logs the names: a folder
/// with 100,000 of them must not fill the disk.
const EXPOSED_MAX: usize = 100;

/// What to tell the operator of files that every user of the machine may read.
pub(crate) fn warnings_of_exposed(files: &[(Tier, String)]) -> Vec<String> {
    let named = files.iter().take(EXPOSED_MAX).map(|(tier, name)| {
        format!(
            "account file {tier}/{name}.json can be read by every user of this machine; \
             take that right away: chmod o-r"
        )
    });
    let more = (files.len() > EXPOSED_MAX)
        .then_some("more account files can be read by every user; MPOOL.RELOAD names them all");
    named.chain(more.map(str::to_owned)).collect()
}

/// Calls `f`; false: it panicked.
fn guarded(f: impl FnOnce()) -> bool {
    catch_unwind(AssertUnwindSafe(f)).is_ok()
}

/// The system's file notifications for the root and the tiers' folders. All of
/// them are set up anew when one of them changes: that is rare, and a folder
/// that two tiers share through a link has but one watch.
struct Eyes {
    feed: Feed,
    watcher: Option<RecommendedWatcher>,
    folders: Vec<Watched>,
    /// Something happened to the folders themselves.
    stale: bool,
    /// Some folder that is there isn't watched.
    blind: bool,
}

struct Watched {
    path: PathBuf,
    identity: Option<Identity>,
}

/// Tells a folder from another at the same path. A new one often gets the old
/// one's inode number, but not its birth time.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    born: Option<SystemTime>,
}

fn identity(path: &Path) -> Option<Identity> {
    let folder = fs::metadata(path).ok().filter(fs::Metadata::is_dir)?;
    Some(Identity {
        device: folder.dev(),
        inode: folder.ino(),
        born: folder.created().ok(),
    })
}

impl Eyes {
    fn new(root: &Path, feed: Feed) -> Self {
        let mut eyes = Self {
            feed,
            watcher: None,
            folders: Vec::new(),
            stale: true,
            blind: false,
        };
        eyes.turn_to(root);
        eyes
    }

    /// Watches another root from the next `open` on.
    fn turn_to(&mut self, root: &Path) {
        self.close();
        let tiers = Tier::ALL.map(|tier| root.join(tier.name()));
        self.folders = [root.to_owned()]
            .into_iter()
            .chain(tiers)
            .map(|path| Watched {
                path,
                identity: None,
            })
            .collect();
    }

    fn close(&mut self) {
        self.stale = true;
        self.watcher = None;
    }

    fn is_folder(&self, path: &Path) -> bool {
        self.folders.iter().any(|folder| folder.path == path)
    }

    /// The same file's paths through the other tiers that share its folder: the
    /// system names one of them.
    fn twins(&self, path: &Path) -> Vec<PathBuf> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Vec::new();
        };
        let Some(own) = self.folders.iter().find(|folder| folder.path == parent) else {
            return Vec::new();
        };
        self.folders
            .iter()
            .filter(|folder| folder.path != own.path && folder.identity.is_some())
            .filter(|folder| folder.identity == own.identity)
            .map(|folder| folder.path.join(name))
            .collect()
    }

    /// Whether a folder came, went or was replaced; the next `open` sees to it.
    fn check(&mut self) -> bool {
        let changed = |folder: &Watched| identity(&folder.path) != folder.identity;
        let changed = self.folders.iter().any(changed);
        self.stale |= changed;
        changed
    }

    /// Watches the folders that are there, if that isn't done yet.
    ///
    /// # Errors
    /// Some folder can't be watched, and why.
    fn open(&mut self) -> Result<(), &'static str> {
        if !self.stale && !self.blind {
            return Ok(());
        }
        self.stale = false;
        // Until all is done, should the following panic.
        self.blind = true;
        // Before they are watched: what comes in between shows at the next check.
        for folder in &mut self.folders {
            folder.identity = identity(&folder.path);
        }
        let watcher = match &mut self.watcher {
            Some(watcher) => watcher,
            empty => {
                let feed = self.feed.clone();
                let made = notify::recommended_watcher(move |event| feed.event(event));
                empty.insert(made.map_err(|error| cause(&error))?)
            }
        };
        for folder in &self.folders {
            // An error: it wasn't watched.
            let _ = watcher.unwatch(&folder.path);
        }
        let mut result = Ok(());
        for folder in self
            .folders
            .iter()
            .filter(|folder| folder.identity.is_some())
        {
            if let Err(error) = watcher.watch(&folder.path, RecursiveMode::NonRecursive)
                && identity(&folder.path).is_some()
            {
                result = Err(cause(&error));
            }
        }
        self.blind = result.is_err();
        result
    }
}

/// Why something can't be watched; `notify`'s own texts hold paths.
fn cause(error: &notify::Error) -> &'static str {
    match &error.kind {
        notify::ErrorKind::MaxFilesWatch => "the limit fs.inotify.max_user_watches is reached",
        notify::ErrorKind::Io(error) => match error.raw_os_error() {
            Some(libc::EMFILE) => {
                "the limit fs.inotify.max_user_instances or that of open files is reached"
            }
            Some(libc::EACCES) => "permission denied",
            _ => "the system reports an error",
        },
        _ => "the system has no file notifications",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::accounts::parse::reason;
    use crate::accounts::scan::Change;
    use std::io::Write;
    use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
    use std::sync::Mutex;
    use tempfile::TempDir;

    /// What a sink was told.
    #[derive(Default)]
    struct Record {
        changes: Vec<String>,
        applies: usize,
        readable: [bool; 3],
        settles: usize,
        warnings: Vec<String>,
        threads: HashSet<thread::ThreadId>,
    }

    #[derive(Clone, Default)]
    struct Recorder {
        record: Arc<Mutex<Record>>,
        /// How often `settle` asks to be called again.
        again: Arc<AtomicUsize>,
        panics: Arc<AtomicBool>,
        blocked: Arc<AtomicBool>,
        stuck: Arc<AtomicBool>,
    }

    impl Sink for Recorder {
        fn apply(&mut self, scan: Scan) {
            assert!(!format!("{scan:?}").contains("token-"));
            while self.blocked.load(Ordering::Acquire) {
                self.stuck.store(true, Ordering::Release);
                thread::sleep(Duration::from_millis(1));
            }
            let mut record = self.record.lock().unwrap();
            record.threads.insert(thread::current().id());
            record.applies += 1;
            record.readable = scan.readable;
            for change in scan.changes {
                record.changes.push(match change {
                    Change::Valid { tier, name, .. } => format!("valid {tier} {name}"),
                    Change::Invalid { tier, name, .. } => format!("invalid {tier} {name}"),
                    Change::BadName { tier, file } => format!("bad {tier} {file}"),
                    Change::Gone { tier, file } => format!("gone {tier} {file}"),
                });
            }
            drop(record);
            assert!(!self.panics.swap(false, Ordering::AcqRel), "on purpose");
        }

        fn settle(&mut self) -> bool {
            self.record.lock().unwrap().settles += 1;
            assert!(!self.panics.swap(false, Ordering::AcqRel), "on purpose");
            let less = |n: usize| n.checked_sub(1);
            self.again
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, less)
                .is_ok()
        }

        fn warn(&mut self, message: String) {
            self.record.lock().unwrap().warnings.push(message);
        }
    }

    /// Opens files as the operator should: nobody else may read them.
    fn private() -> fs::OpenOptions {
        let mut options = fs::OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        options
    }

    fn write_private(path: impl AsRef<Path>, content: impl AsRef<[u8]>) -> io::Result<()> {
        private().open(path)?.write_all(content.as_ref())
    }

    struct Bench {
        dir: TempDir,
        sink: Recorder,
        watcher: Watcher,
    }

    impl Bench {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            for tier in Tier::ALL {
                fs::create_dir(dir.path().join(tier.name())).unwrap();
            }
            Self::over(dir)
        }

        /// Watches `dir` as it is; the first scan's changes aren't recorded.
        fn over(dir: TempDir) -> Self {
            let mut scanner = Scanner::new(dir.path().to_owned());
            scanner.full(Instant::now());
            let sink = Recorder::default();
            let watcher = Watcher::start(scanner, sink.clone()).unwrap();
            let bench = Self { dir, sink, watcher };
            until("the start", || {
                bench.sink.record.lock().unwrap().applies > 0
            });
            bench
        }

        fn path(&self, file: &str) -> PathBuf {
            self.dir.path().join(file)
        }

        fn token(&self, file: &str, token: &str) {
            write_private(
                self.path(file),
                format!(r#"{{"access_token":"token-{token}"}}"#),
            )
            .unwrap();
        }

        /// Waits until the changes told since the last call are these.
        fn expect(&self, wanted: &[&str]) {
            let what = format!("{wanted:?}");
            until(&what, || {
                self.sink.record.lock().unwrap().changes.len() >= wanted.len()
            });
            let told = mem::take(&mut self.sink.record.lock().unwrap().changes);
            assert_eq!(told, wanted);
        }

        fn rescan(&self) -> Outcome {
            let (sender, receiver) = mpsc::channel();
            self.watcher.rescan(Box::new(move |outcome| {
                sender.send(outcome).unwrap();
            }));
            receiver.recv_timeout(Duration::from_secs(5)).unwrap()
        }
    }

    /// Waits 5 s at most, which is less than the slow rescan's period.
    fn until(what: &str, mut is_so: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while !is_so() {
            assert!(Instant::now() < deadline, "in vain: {what}");
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn medium(name: &str) -> (Tier, String) {
        (Tier::Medium, name.to_owned())
    }

    #[test]
    fn every_kind_of_change_arrives() {
        let bench = Bench::new();
        let started = Instant::now();
        bench.token("medium/a.json", "1");
        bench.expect(&["valid medium a"]);
        bench.token("medium/a.json", "2");
        bench.expect(&["valid medium a"]);
        bench.token("x", "3");
        fs::rename(bench.path("x"), bench.path("medium/a.json")).unwrap();
        bench.expect(&["valid medium a"]);
        fs::hard_link(bench.path("medium/a.json"), bench.path("high/h.json")).unwrap();
        bench.expect(&["valid high h"]);
        fs::rename(bench.path("medium/a.json"), bench.path("x")).unwrap();
        bench.expect(&["gone medium a"]);
        fs::rename(bench.path("high/h.json"), bench.path("supreme/s.json")).unwrap();
        bench.expect(&["gone high h", "valid supreme s"]);
        fs::remove_file(bench.path("supreme/s.json")).unwrap();
        bench.expect(&["gone supreme s"]);
        symlink("../x", bench.path("medium/l.json")).unwrap();
        bench.expect(&["valid medium l"]);
        bench.token("medium/no name.json", "4");
        bench.expect(&["bad medium no?name.json"]);
        // Nine changes, half a second each at most.
        assert!(started.elapsed() < Duration::from_millis(4500));
        let record = bench.sink.record.lock().unwrap();
        assert_eq!(record.warnings, Vec::<String>::new());
        assert_eq!((record.readable, record.threads.len()), ([true; 3], 1));
        drop(record);
        assert!(bench.watcher.stop().is_ok());
    }

    #[test]
    fn permissions_are_noticed() {
        let bench = Bench::new();
        bench.token("medium/a.json", "1");
        bench.expect(&["valid medium a"]);
        let file = bench.path("medium/a.json");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o000)).unwrap();
        if fs::read(&file).is_err() {
            bench.expect(&["invalid medium a"]);
            fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
            bench.expect(&["valid medium a"]);
        }
    }

    #[test]
    fn reading_files_wakes_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, other) = (dir.path().join("medium"), dir.path().join("x"));
        fs::create_dir(&folder).unwrap();
        write_private(folder.join("a.json"), "{}").unwrap();
        let (sender, receiver) = mpsc::channel();
        let feed = Feed {
            sender,
            shared: Arc::default(),
        };
        let mut eyes = Eyes::new(dir.path(), feed);
        assert_eq!((eyes.open(), eyes.blind), (Ok(()), false));
        Scanner::new(dir.path().to_owned()).full(Instant::now());
        fs::read_dir(&folder).unwrap().for_each(drop);
        // Events come in order, so this one shows that there was none before.
        write_private(&other, "").unwrap();
        match receiver.recv_timeout(Duration::from_secs(5)).unwrap() {
            Message::Paths(paths) => assert_eq!(paths, [other]),
            _ => panic!("something else"),
        }
        assert!(!eyes.check());
    }

    #[test]
    fn a_half_written_file_keeps_its_account() {
        let bench = Bench::new();
        bench.token("medium/a.json", "1");
        bench.token("medium/b.json", "1");
        until("both", || {
            bench.sink.record.lock().unwrap().changes.len() == 2
        });
        bench.sink.record.lock().unwrap().changes.clear();
        let mut half = private().open(bench.path("medium/a.json")).unwrap();
        half.write_all(br#"{"access_token":"tok"#).unwrap();
        let broke = Instant::now();
        write_private(bench.path("medium/b.json"), "{}").unwrap();
        until("seen", || bench.rescan().broken.len() == 2);
        assert_eq!(
            bench.rescan().broken,
            [
                (Tier::Medium, "a".to_owned(), reason::NOT_AN_OBJECT),
                (Tier::Medium, "b".to_owned(), reason::NO_CREDENTIAL)
            ]
        );
        half.write_all(br#"en-2"}"#).unwrap();
        drop(half);
        bench.expect(&["valid medium a"]);
        // The other one stays broken, and is judged.
        bench.expect(&["invalid medium b"]);
        assert!(broke.elapsed() >= Duration::from_secs(2));
        bench.token("medium/b.json", "1");
        bench.expect(&["valid medium b"]);
    }

    #[test]
    fn a_folder_goes_and_comes_back() {
        let bench = Bench::new();
        bench.token("medium/a.json", "1");
        bench.expect(&["valid medium a"]);
        let (folder, away) = (bench.path("medium"), bench.path("away"));
        fs::rename(&folder, &away).unwrap();
        let unreadable = || !bench.sink.record.lock().unwrap().readable[0];
        until("unreadable", unreadable);
        // What happens to it elsewhere is of no concern.
        bench.token("away/c.json", "1");
        fs::create_dir(&folder).unwrap();
        until("readable", || !unreadable());
        bench.expect(&["gone medium a"]);
        bench.token("medium/d.json", "1");
        bench.expect(&["valid medium d"]);
        fs::remove_dir_all(&folder).unwrap();
        fs::rename(&away, &folder).unwrap();
        until("both", || {
            bench.sink.record.lock().unwrap().changes.len() >= 3
        });
        // If the thread is quick, the removal of d shows first.
        bench.sink.record.lock().unwrap().changes.sort();
        bench.expect(&["gone medium d", "valid medium a", "valid medium c"]);
        fs::remove_file(folder.join("c.json")).unwrap();
        bench.expect(&["gone medium c"]);
    }

    #[test]
    fn a_replaced_folder_is_watched() {
        let bench = Bench::new();
        for round in 0..20 {
            let folder = bench.path("medium");
            fs::remove_dir_all(&folder).unwrap();
            fs::create_dir(&folder).unwrap();
            bench.token("medium/a.json", &format!("{round}"));
            until("told", || {
                let record = bench.sink.record.lock().unwrap();
                record
                    .changes
                    .last()
                    .is_some_and(|line| line == "valid medium a")
            });
            bench.sink.record.lock().unwrap().changes.clear();
        }
        // A link to a folder is swapped, too.
        fs::remove_dir_all(bench.path("medium")).unwrap();
        for (version, name) in [("v1", "b"), ("v2", "c")] {
            fs::create_dir(bench.path(version)).unwrap();
            bench.token(&format!("{version}/{name}.json"), "1");
            symlink(version, bench.path("link")).unwrap();
            fs::rename(bench.path("link"), bench.path("medium")).unwrap();
            let valid = format!("valid medium {name}");
            until(&valid, || {
                bench.sink.record.lock().unwrap().changes.contains(&valid)
            });
        }
        bench.sink.record.lock().unwrap().changes.clear();
        bench.token("v2/d.json", "1");
        bench.expect(&["valid medium d"]);
    }

    #[test]
    fn the_root_comes_goes_and_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("account");
        let mut scanner = Scanner::new(root.clone());
        scanner.full(Instant::now());
        let sink = Recorder::default();
        let watcher = Watcher::start(scanner, sink.clone()).unwrap();
        let bench = Bench { dir, sink, watcher };
        fs::create_dir(&root).unwrap();
        fs::create_dir(root.join("medium")).unwrap();
        bench.token("account/medium/a.json", "1");
        bench.expect(&["valid medium a"]);
        bench.token("account/medium/b.json", "1");
        bench.expect(&["valid medium b"]);
        let away = bench.path("away");
        fs::rename(&root, &away).unwrap();
        until("unreadable", || {
            !bench.sink.record.lock().unwrap().readable[0]
        });
        fs::create_dir_all(root.join("medium")).unwrap();
        bench.expect(&["gone medium a", "gone medium b"]);
        bench.token("account/medium/c.json", "1");
        bench.expect(&["valid medium c"]);
        assert!(bench.sink.record.lock().unwrap().warnings.is_empty());
    }

    #[test]
    fn two_tiers_may_share_a_folder() {
        let bench = Bench::new();
        fs::remove_dir(bench.path("high")).unwrap();
        symlink("medium", bench.path("high")).unwrap();
        bench.rescan();
        bench.token("medium/a.json", "1");
        bench.expect(&["valid medium a", "valid high a"]);
        fs::remove_file(bench.path("high/a.json")).unwrap();
        bench.expect(&["gone medium a", "gone high a"]);
    }

    #[test]
    fn a_rescan_answers_with_what_it_did() {
        let bench = Bench::new();
        bench.token("medium/a.json", "1");
        write_private(bench.path("medium/bad.json"), "").unwrap();
        let first = bench.rescan();
        // The events may have been quicker, but the sink knows by now.
        assert!(first.added.is_empty() || first.added == [medium("a")]);
        assert!(
            bench
                .sink
                .record
                .lock()
                .unwrap()
                .changes
                .contains(&"valid medium a".to_owned())
        );
        assert_eq!(
            first.broken,
            [(Tier::Medium, "bad".to_owned(), reason::EMPTY)]
        );
        assert_eq!((first.removed, first.readable), (vec![], [true; 3]));
        assert!(!format!("{:?}", bench.rescan()).contains("token-"));
        // As nothing but a rescan sees it.
        let outside = tempfile::tempdir().unwrap();
        let file = outside.path().join("x");
        let content = r#"{"access_token":"token-1"}"#;
        write_private(&file, content).unwrap();
        symlink(&file, bench.path("medium/l.json")).unwrap();
        until("linked", || {
            let record = bench.sink.record.lock().unwrap();
            record.changes.contains(&"valid medium l".to_owned())
        });
        fs::remove_file(&file).unwrap();
        assert!(bench.rescan().removed.is_empty());
        until("judged", || bench.rescan().broken.len() == 2);
        until("told", || {
            let record = bench.sink.record.lock().unwrap();
            record.changes.contains(&"invalid medium l".to_owned())
        });
        write_private(&file, content).unwrap();
        assert_eq!(bench.rescan().added, [medium("l")]);
        // A callback that panics does no harm.
        bench.watcher.rescan(Box::new(|_| panic!("on purpose")));
        assert!(bench.rescan().added.is_empty());
        assert_eq!(bench.sink.record.lock().unwrap().warnings.len(), 1);
    }

    #[test]
    fn another_root_is_compared_and_watched() {
        let bench = Bench::new();
        bench.token("medium/a.json", "1");
        bench.token("medium/b.json", "1");
        until("both", || {
            bench.sink.record.lock().unwrap().changes.len() == 2
        });
        bench.sink.record.lock().unwrap().changes.clear();
        fs::create_dir_all(bench.path("other/medium")).unwrap();
        bench.token("other/medium/b.json", "1");
        bench.token("other/medium/c.json", "1");
        bench.watcher.set_root(bench.path("other"));
        bench.expect(&["gone medium a", "valid medium c"]);
        assert_eq!(
            bench.sink.record.lock().unwrap().readable,
            [true, false, false]
        );
        bench.token("medium/z.json", "1");
        bench.token("other/medium/d.json", "1");
        bench.expect(&["valid medium d"]);
        bench.watcher.set_root(bench.path("nowhere"));
        until("unreadable", || {
            !bench.sink.record.lock().unwrap().readable[0]
        });
        assert!(bench.sink.record.lock().unwrap().changes.is_empty());
    }

    #[test]
    fn wakes_settle_and_settle_again() {
        let bench = Bench::new();
        bench.sink.again.store(2, Ordering::Release);
        bench.watcher.wake();
        until("three", || bench.sink.record.lock().unwrap().settles == 3);
        // While the thread is busy, many wakes become one.
        bench.sink.blocked.store(true, Ordering::Release);
        bench.watcher.rescan(Box::new(|_| ()));
        until("stuck", || bench.sink.stuck.load(Ordering::Acquire));
        for _ in 0..1000 {
            bench.watcher.wake();
        }
        bench.sink.blocked.store(false, Ordering::Release);
        until("more", || bench.sink.record.lock().unwrap().settles > 3);
        assert_eq!(bench.sink.record.lock().unwrap().settles, 4);
        bench.sink.panics.store(true, Ordering::Release);
        bench.watcher.wake();
        until("warned", || {
            bench.sink.record.lock().unwrap().warnings.len() == 1
        });
        let settles = bench.sink.record.lock().unwrap().settles;
        bench.watcher.wake();
        until("alive", || {
            bench.sink.record.lock().unwrap().settles == settles + 1
        });
    }

    #[test]
    fn a_file_that_everybody_may_read_is_warned_of_once() {
        let bench = Bench::new();
        let warnings = || bench.sink.record.lock().unwrap().warnings.clone();
        let file = bench.path("medium/a.json");
        bench.token("medium/a.json", "1");
        bench.expect(&["valid medium a"]);
        assert!(bench.rescan().exposed.is_empty() && warnings().is_empty());
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        until("warned", || !warnings().is_empty());
        assert_eq!(bench.rescan().exposed, [medium("a")]);
        // Other content and another look are no news of it.
        bench.token("medium/a.json", "2");
        bench.expect(&["valid medium a"]);
        bench.rescan();
        let told = warnings();
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(told[0].contains("medium/a.json") && !told[0].contains("token-"));
    }

    #[test]
    fn warnings_of_many_files_are_few() {
        let many: Vec<_> = (0..1000).map(|n| medium(&n.to_string())).collect();
        let told = warnings_of_exposed(&many);
        assert_eq!(told.len(), EXPOSED_MAX + 1);
        assert!(told[0].contains("medium/0.json") && told[EXPOSED_MAX].contains("MPOOL.RELOAD"));
        assert_eq!(warnings_of_exposed(&many[..EXPOSED_MAX]).len(), EXPOSED_MAX);
    }

    #[test]
    fn a_panic_of_the_sink_is_survived() {
        let bench = Bench::new();
        bench.sink.panics.store(true, Ordering::Release);
        bench.token("medium/a.json", "1");
        bench.expect(&["valid medium a"]);
        until("warned", || {
            bench.sink.record.lock().unwrap().warnings.len() == 1
        });
        bench.token("medium/b.json", "1");
        bench.expect(&["valid medium b"]);
        assert!(bench.watcher.stop().is_ok());
    }

    #[test]
    fn a_panic_of_the_thread_is_survived() {
        let (sender, receiver) = mpsc::channel();
        let feed = Feed {
            sender,
            shared: Arc::default(),
        };
        let dir = tempfile::tempdir().unwrap();
        let sink = Recorder::default();
        let scanner = Scanner::new(dir.path().to_owned());
        let mut worker = Worker::new(scanner, sink.clone(), receiver, feed);
        worker.act();
        assert!(worker.eyes.watcher.is_some());
        worker.recover();
        assert!(worker.eyes.watcher.is_none());
        assert_eq!(sink.record.lock().unwrap().warnings.len(), 1);
        assert!(worker.wake_up_at() > Instant::now());
        worker.next_rescan = Instant::now();
        worker.act();
        assert!(worker.eyes.watcher.is_some());
    }

    #[test]
    fn a_storm_of_events_stays_small() {
        let bench = Bench::new();
        bench.sink.blocked.store(true, Ordering::Release);
        bench.watcher.rescan(Box::new(|_| ()));
        for n in 0..3000 {
            bench.token(&format!("medium/a{n}.json"), "1");
        }
        let events = || bench.watcher.shared.events.load(Ordering::Acquire);
        until("a flood", || events() >= PENDING_MAX);
        assert!(events() <= PENDING_MAX + 1);
        bench.sink.blocked.store(false, Ordering::Release);
        until("all of them", || {
            bench.sink.record.lock().unwrap().changes.len() >= 3000
        });
        assert_eq!(bench.sink.record.lock().unwrap().changes.len(), 3000);
        until("drained", || events() == 0);
    }

    #[test]
    fn pending_paths_become_a_full_scan() {
        let mut pending = Pending::default();
        let now = Instant::now();
        assert_eq!(pending.due(now), None);
        for n in 0..PENDING_MAX {
            pending.note(now);
            pending.add(PathBuf::from(n.to_string()));
        }
        assert!(!pending.everything);
        assert_eq!(pending.due(now + PULSE), Some(now + QUIET));
        pending.note(now + IMPATIENCE);
        pending.add(PathBuf::from("x"));
        assert!(pending.everything && pending.paths.is_empty());
        assert_eq!(pending.due(now), Some(now + IMPATIENCE));
        assert_eq!(pending.due(now + PULSE), Some(now + PULSE));
    }

    #[test]
    fn stopping_is_quick_and_gives_up_on_a_stuck_sink() {
        let bench = Bench::new();
        let start = Instant::now();
        assert!(bench.watcher.stop().is_ok());
        assert!(start.elapsed() < Duration::from_secs(1));

        let bench = Bench::new();
        bench.sink.blocked.store(true, Ordering::Release);
        let sink = bench.sink.clone();
        bench.watcher.rescan(Box::new(|_| ()));
        until("stuck", || sink.stuck.load(Ordering::Acquire));
        let watcher = bench.watcher.stop().err().unwrap();
        // It is as stuck when it is asked again.
        let watcher = watcher.stop().err().unwrap();
        sink.blocked.store(false, Ordering::Release);
        assert!(watcher.stop().is_ok());
    }

    #[test]
    fn a_cause_names_the_limit_and_no_path() {
        let io = |code| notify::Error::io(io::Error::from_raw_os_error(code));
        let table = [
            (
                notify::Error::new(notify::ErrorKind::MaxFilesWatch),
                "max_user_watches",
            ),
            (io(libc::EMFILE), "max_user_instances"),
            (io(libc::EACCES), "permission"),
            (io(libc::EIO), "error"),
            (notify::Error::generic("x"), "no file notifications"),
        ];
        for (error, part) in table {
            let cause = cause(&error.add_path(PathBuf::from("/secret")));
            assert!(cause.contains(part) && !cause.contains('/'), "{cause}");
        }
    }

    #[test]
    fn only_changes_count() {
        use notify::event::{CreateKind, ModifyKind, RemoveKind};
        for kind in [
            AccessKind::Any,
            AccessKind::Read,
            AccessKind::Open(AccessMode::Any),
            AccessKind::Close(AccessMode::Read),
        ] {
            assert!(!is_change(EventKind::Access(kind)));
        }
        for kind in [
            EventKind::Access(AccessKind::Close(AccessMode::Write)),
            EventKind::Create(CreateKind::File),
            EventKind::Modify(ModifyKind::Any),
            EventKind::Remove(RemoveKind::File),
            EventKind::Any,
            EventKind::Other,
        ] {
            assert!(is_change(kind));
        }
    }
}
