//! Which account files are there, and what changed since the last look.
//!
//! A `Scanner` remembers what it has reported of each file, so a scan answers
//! with changes alone. It never waits, starts no thread and knows no clock but
//! the `now` it is given (and, to tell which time stamps can be trusted, the
//! system's). What it can't see for certain it leaves as it was: only a file
//! that is missing from a folder that can be listed is gone.

use super::parse::{Credential, parse};
use crate::pool::{Tier, names};
use secrecy::zeroize::Zeroizing;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs::{self, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::mem;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The largest account file, in bytes.
pub(crate) const FILE_MAX: u64 = 1024 * 1024;
/// How long a file may be broken before it costs the account its place: a
/// writer that takes longer between its first and its last byte is rare.
pub(crate) const GRACE: Duration = Duration::from_secs(2);
/// How many seconds before it was read a file must have been touched for its
/// time stamps to prove that nothing happened since; coarser clocks than that
/// are not in use.
const RACY_SECS: i64 = 2;
/// The longest file name shown to people, in bytes.
const SHOWN_MAX: usize = 128;
const SUFFIX: &str = ".json";

/// Why a file is of no use, besides what `parse` says of its content.
pub(crate) mod reason {
    /// The stem is no account name.
    pub(crate) const BAD_NAME: &str = "not an account name; \
        1 to 128 of A-Z a-z 0-9 . _ @ + - are accepted before .json";
    /// Over [`super::FILE_MAX`].
    pub(crate) const TOO_LARGE: &str = "the file is too large; \
        up to 1 MiB is accepted";
    /// A folder, pipe, socket or device.
    pub(crate) const NOT_A_FILE: &str = "not a regular file";
    /// A symbolic link without a target.
    pub(crate) const DANGLING: &str = "a symbolic link that leads nowhere";
    /// The operating system said EACCES or EPERM.
    pub(crate) const NO_PERMISSION: &str = "the file can't be read: \
        permission denied";
    /// Any other error of the operating system.
    pub(crate) const UNREADABLE: &str = "the file can't be read: \
        the system reports an error";
}

/// What is different since the last scan.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    /// A new account, other content, or a file that is right again.
    Valid {
        /// The folder.
        tier: Tier,
        /// The account's name.
        name: String,
        /// What the file says.
        credential: Credential,
    },
    /// A well-named file that can't be used and has had its time to recover.
    Invalid {
        /// The folder.
        tier: Tier,
        /// The account's name.
        name: String,
        /// A fixed text.
        reason: &'static str,
    },
    /// A `*.json` whose stem is no account name.
    BadName {
        /// The folder.
        tier: Tier,
        /// The file's name, made safe to show; it always has a `?` in it, so
        /// it is never an account's name.
        file: String,
    },
    /// A file reported earlier is gone.
    Gone {
        /// The folder.
        tier: Tier,
        /// The name under which it was reported.
        file: String,
    },
}

impl Change {
    /// The folder and the name under which it is reported.
    pub(crate) fn key(&self) -> (Tier, &str) {
        match self {
            Self::Valid { tier, name, .. } | Self::Invalid { tier, name, .. } => (*tier, name),
            Self::BadName { tier, file } | Self::Gone { tier, file } => (*tier, file),
        }
    }
}

/// What a look at the files found.
#[derive(Clone, Debug)]
pub(crate) struct Scan {
    /// In the order of tiers, then names.
    pub(crate) changes: Vec<Change>,
    /// By [`Tier::index`]: whether the folder could be listed when it was last
    /// looked at.
    pub(crate) readable: [bool; 3],
    /// Whether every file was looked at rather than some.
    pub(crate) complete: bool,
}

/// Accounts that became usable or stopped being it; each list in the order of
/// tiers, then names.
#[derive(Clone, Debug, Default)]
pub(crate) struct Flips {
    /// Were not valid and are now.
    pub(crate) added: Vec<(Tier, String)>,
    /// Were valid and are invalid or gone.
    pub(crate) removed: Vec<(Tier, String)>,
}

/// Remembers the account files of a folder with the folders of the tiers.
pub(crate) struct Scanner {
    root: PathBuf,
    folders: [Folder; 3],
    started: bool,
    flips: Flips,
    exposed: Vec<(Tier, String)>,
}

impl Scanner {
    /// A scanner of `root` that hasn't looked yet; a relative path is taken
    /// from the current directory as it is now.
    pub(crate) fn new(root: PathBuf) -> Self {
        let root = absolute(root);
        Self {
            folders: Tier::ALL.map(|tier| Folder::new(tier, &root)),
            root,
            started: false,
            flips: Flips::default(),
            exposed: Vec::new(),
        }
    }

    /// The folder that holds the tiers' folders.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Whether there are more than so many entries in the tiers' folders.
    pub(crate) fn is_larger_than(&self, limit: usize) -> bool {
        let folders = self.folders.iter();
        let entries = folders.filter_map(|folder| fs::read_dir(&folder.path).ok());
        entries.flatten().nth(limit).is_some()
    }

    /// Turns to another folder. The next full scan reports the differences.
    pub(crate) fn set_root(&mut self, root: PathBuf) {
        self.root = absolute(root);
        for folder in &mut self.folders {
            folder.path = self.root.join(folder.tier.name());
            for known in folder.known.values_mut() {
                known.seen = None;
                known.exposed = false;
            }
        }
    }

    /// Looks at every file; reads those that may have changed. The very first
    /// scan reports broken files at once, later ones give them [`GRACE`].
    pub(crate) fn full(&mut self, now: Instant) -> Scan {
        let grace = if self.started { GRACE } else { Duration::ZERO };
        self.started = true;
        let mut found = Findings::default();
        for folder in &mut self.folders {
            folder.look_at_all(now, grace, &mut found);
        }
        self.finish(found, true)
    }

    /// Looks at these files alone. A path that stands for more than a file (a
    /// tier's folder, a swapped link of a Kubernetes volume) means a full scan;
    /// other paths are ignored.
    pub(crate) fn paths(&mut self, paths: &[PathBuf], now: Instant) -> Scan {
        let mut files = BTreeSet::new();
        for path in paths {
            match self.place(path) {
                Place::Everything => return self.full(now),
                Place::File(tier, name) => {
                    files.insert((tier, name));
                }
                Place::Elsewhere => {}
            }
        }
        self.look_at(files, now)
    }

    /// When the next broken file is to be judged, by [`Self::due`].
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.folders
            .iter()
            .flat_map(|folder| folder.pending.values())
            .min()
            .copied()
    }

    /// Takes a last look at the files whose time to recover is over.
    pub(crate) fn due(&mut self, now: Instant) -> Scan {
        let mut files = BTreeSet::new();
        for folder in &self.folders {
            for (name, due) in &folder.pending {
                if *due <= now {
                    files.insert((folder.tier, name.clone()));
                }
            }
        }
        self.look_at(files, now)
    }

    /// Every file that is not usable right now, judged or not yet, with its
    /// name as reported and the reason; sorted.
    pub(crate) fn broken(&self) -> Vec<(Tier, String, &'static str)> {
        let mut list = Vec::new();
        for folder in &self.folders {
            for (name, known) in &folder.known {
                if let (Some(name), Some(broken)) = (account(name), &known.broken) {
                    list.push((folder.tier, name.to_owned(), broken.reason));
                }
            }
            for file in folder.bad_names.keys() {
                list.push((folder.tier, file.clone(), reason::BAD_NAME));
            }
        }
        list.sort_unstable();
        list
    }

    /// The account files that every user of the machine may read; sorted.
    pub(crate) fn exposed(&self) -> Vec<(Tier, String)> {
        let mut list = Vec::new();
        for folder in &self.folders {
            for (name, known) in &folder.known {
                if let Some(name) = account(name).filter(|_| known.exposed) {
                    list.push((folder.tier, name.to_owned()));
                }
            }
        }
        list.sort_unstable();
        list
    }

    /// Those of them that came to be so since this was last asked; each is told
    /// once, for as long as it stays so.
    pub(crate) fn take_exposed(&mut self) -> Vec<(Tier, String)> {
        mem::take(&mut self.exposed)
    }

    /// The accounts that the last scan added and removed; empty when asked again.
    pub(crate) fn take_flips(&mut self) -> Flips {
        mem::take(&mut self.flips)
    }

    fn look_at(&mut self, files: BTreeSet<(Tier, OsString)>, now: Instant) -> Scan {
        // A folder that came (back) may hold anything.
        let came = |folder: &Folder| {
            let touched = files.iter().any(|(tier, _)| *tier == folder.tier);
            touched && !folder.readable && folder.identity().is_some()
        };
        if !self.started || self.folders.iter().any(came) {
            return self.full(now);
        }
        let mut found = Findings::default();
        for (tier, name) in files {
            for folder in self.folders.iter_mut().filter(|folder| folder.tier == tier) {
                folder.look_at_one(&name, now, &mut found);
            }
        }
        self.finish(found, false)
    }

    fn finish(&mut self, found: Findings, complete: bool) -> Scan {
        let Findings {
            mut changes,
            mut flips,
            mut exposed,
        } = found;
        changes.sort_by(|one, other| one.key().cmp(&other.key()));
        flips.added.sort_unstable();
        flips.removed.sort_unstable();
        self.flips = flips;
        exposed.sort_unstable();
        self.exposed.append(&mut exposed);
        Scan {
            changes,
            readable: self.folders.each_ref().map(|folder| folder.readable),
            complete,
        }
    }

    fn place(&self, path: &Path) -> Place {
        let Ok(below) = path.strip_prefix(&self.root) else {
            return Place::Elsewhere;
        };
        let mut parts = below.components().map(|part| match part {
            Component::Normal(name) => Some(name),
            _ => None,
        });
        let names = (parts.next(), parts.next(), parts.next());
        let tier = |name: &OsStr| Tier::ALL.into_iter().find(|tier| name == tier.name());
        match names {
            (None, ..) => Place::Everything,
            (Some(Some(name)), None, _) if tier(name).is_some() => Place::Everything,
            (Some(Some(name)), None, _) if is_switch(path, name) => Place::Everything,
            (Some(Some(folder)), Some(Some(name)), None) => match tier(folder) {
                Some(_) if is_switch(path, name) => Place::Everything,
                Some(tier) if is_candidate(name) => Place::File(tier, name.to_owned()),
                _ => Place::Elsewhere,
            },
            _ => Place::Elsewhere,
        }
    }
}

/// What a path stands for.
enum Place {
    Everything,
    File(Tier, OsString),
    Elsewhere,
}

#[derive(Default)]
struct Findings {
    changes: Vec<Change>,
    flips: Flips,
    exposed: Vec<(Tier, String)>,
}

/// A tier's folder and what is known of its files.
struct Folder {
    tier: Tier,
    path: PathBuf,
    readable: bool,
    /// Well-named files by file name.
    known: HashMap<OsString, Known>,
    /// When each broken file that isn't judged yet is to be.
    pending: BTreeMap<OsString, Instant>,
    /// Files that aren't named after an account.
    misnamed: BTreeSet<OsString>,
    /// The same as reported, with how many files share that name.
    bad_names: BTreeMap<String, usize>,
}

/// What is known of a file.
#[derive(Default)]
struct Known {
    /// None: it has to be read at the next look, whatever it looks like.
    seen: Option<Seen>,
    told: Told,
    broken: Option<Broken>,
    /// Every user of the machine may read it.
    exposed: bool,
}

/// What was last reported of a file.
#[derive(Default)]
enum Told {
    #[default]
    Nothing,
    Valid(Credential),
    Invalid(&'static str),
}

struct Broken {
    due: Instant,
    reason: &'static str,
}

impl Folder {
    fn new(tier: Tier, root: &Path) -> Self {
        Self {
            tier,
            path: root.join(tier.name()),
            readable: false,
            known: HashMap::new(),
            pending: BTreeMap::new(),
            misnamed: BTreeSet::new(),
            bad_names: BTreeMap::new(),
        }
    }

    fn look_at_all(&mut self, now: Instant, grace: Duration, found: &mut Findings) {
        let Ok(listed) = list(&self.path) else {
            self.readable = false;
            return;
        };
        self.readable = true;
        for name in &listed {
            if account(name).is_none() {
                self.note_misnamed(name, found);
                continue;
            }
            let seen = self.known.get(name).and_then(|known| known.seen.as_ref());
            let look = look(&self.path.join(name), seen);
            self.note(name, look, now, grace, found);
        }
        // Some file systems leave a file out of a listing when another is
        // renamed over it meanwhile, so each missing one is asked for.
        let known = self.known.keys().chain(&self.misnamed);
        let missing: Vec<_> = known
            .filter(|name| listed.binary_search(name).is_err())
            .cloned()
            .collect();
        for name in missing {
            if self.is_absent(&name) {
                self.forget(&name, found);
            } else if account(&name).is_some() {
                let look = look(&self.path.join(&name), None);
                self.note(&name, look, now, grace, found);
            }
        }
    }

    fn look_at_one(&mut self, name: &OsStr, now: Instant, found: &mut Findings) {
        let before = self.identity();
        self.readable = before.is_some();
        if self.readable {
            // The folder may be moved away at any moment, and then every file
            // seems to be gone: it has to be the same before and after.
            if self.is_absent(name) {
                if self.identity() == before {
                    self.forget(name, found);
                }
            } else if account(name).is_some() {
                let look = look(&self.path.join(name), None);
                self.note(name, look, now, GRACE, found);
            } else {
                self.note_misnamed(name, found);
            }
        }
        // What could not be seen now can't be judged now.
        if let Some(due) = self.pending.get_mut(name)
            && *due <= now
        {
            *due = now + GRACE;
        }
    }

    /// Brings what a look at a well-named file showed into `found`.
    fn note(
        &mut self,
        name: &OsStr,
        look: Look,
        now: Instant,
        grace: Duration,
        found: &mut Findings,
    ) {
        self.note_exposed(name, &look, found);
        match look {
            Look::Later => {}
            Look::Same => self.judge(name, now, found),
            Look::Good(seen, credential) => {
                self.pending.remove(name);
                let known = self.known.entry(name.to_owned()).or_default();
                known.seen = Some(seen);
                known.broken = None;
                let Some(account) = account(name) else { return };
                match &known.told {
                    Told::Valid(told) if told.same_as(&credential) => return,
                    Told::Valid(_) => {}
                    Told::Nothing | Told::Invalid(_) => {
                        found.flips.added.push((self.tier, account.to_owned()));
                    }
                }
                known.told = Told::Valid(credential.clone());
                found.changes.push(Change::Valid {
                    tier: self.tier,
                    name: account.to_owned(),
                    credential,
                });
            }
            Look::Broken(seen, reason) => {
                let known = self.known.entry(name.to_owned()).or_default();
                known.seen = seen;
                let due = known
                    .broken
                    .as_ref()
                    .map_or(now + grace, |broken| broken.due);
                known.broken = Some(Broken { due, reason });
                self.judge(name, now, found);
            }
        }
    }

    /// A broken file counts too: there may be a token in it.
    fn note_exposed(&mut self, name: &OsStr, look: &Look, found: &mut Findings) {
        let (Look::Good(seen, _) | Look::Broken(Some(seen), _)) = look else {
            return;
        };
        let known = self.known.entry(name.to_owned()).or_default();
        let before = mem::replace(&mut known.exposed, seen.world_readable);
        if let Some(account) = account(name).filter(|_| known.exposed && !before) {
            found.exposed.push((self.tier, account.to_owned()));
        }
    }

    /// Reports a broken file if its time is over, or remembers when it will be.
    fn judge(&mut self, name: &OsStr, now: Instant, found: &mut Findings) {
        let (Some(known), Some(account)) = (self.known.get_mut(name), account(name)) else {
            return;
        };
        let Some(Broken { due, reason }) = known.broken else {
            return;
        };
        if now < due {
            self.pending.insert(name.to_owned(), due);
            return;
        }
        self.pending.remove(name);
        match known.told {
            Told::Invalid(told) if told == reason => return,
            Told::Valid(_) => found.flips.removed.push((self.tier, account.to_owned())),
            Told::Nothing | Told::Invalid(_) => {}
        }
        known.told = Told::Invalid(reason);
        found.changes.push(Change::Invalid {
            tier: self.tier,
            name: account.to_owned(),
            reason,
        });
    }

    fn note_misnamed(&mut self, name: &OsStr, found: &mut Findings) {
        if !self.misnamed.insert(name.to_owned()) {
            return;
        }
        let file = shown(name);
        let count = self.bad_names.entry(file.clone()).or_default();
        *count += 1;
        if *count == 1 {
            let tier = self.tier;
            found.changes.push(Change::BadName { tier, file });
        }
    }

    /// Drops a file that is gone, and reports that if it was reported.
    fn forget(&mut self, name: &OsStr, found: &mut Findings) {
        let tier = self.tier;
        self.pending.remove(name);
        if self.misnamed.remove(name) {
            let file = shown(name);
            if let Some(count) = self.bad_names.get_mut(&file) {
                *count -= 1;
                if *count == 0 {
                    self.bad_names.remove(&file);
                    found.changes.push(Change::Gone { tier, file });
                }
            }
        }
        let (Some(known), Some(account)) = (self.known.remove(name), account(name)) else {
            return;
        };
        let file = account.to_owned();
        match known.told {
            Told::Nothing => return,
            Told::Valid(_) => found.flips.removed.push((tier, file.clone())),
            Told::Invalid(_) => {}
        }
        found.changes.push(Change::Gone { tier, file });
    }

    fn is_absent(&self, name: &OsStr) -> bool {
        fs::symlink_metadata(self.path.join(name)).is_err_and(|error| means_absent(&error))
    }

    /// Which folder it is, if it can be listed.
    fn identity(&self) -> Option<(u64, u64)> {
        fs::read_dir(&self.path).ok()?;
        let folder = fs::metadata(self.path.join(".")).ok()?;
        Some((folder.dev(), folder.ino()))
    }
}

/// The names of the files of interest in `folder`, sorted.
///
/// # Errors
/// The folder can't be listed to its end, or its files can't be asked for.
fn list(folder: &Path) -> io::Result<Vec<OsString>> {
    let entries = fs::read_dir(folder)?;
    // A folder may be listed and yet not searched (r without x).
    fs::metadata(folder.join("."))?;
    let mut names = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        if is_candidate(&name) {
            names.push(name);
        }
    }
    names.sort_unstable();
    names.dedup();
    Ok(names)
}

/// What a look at a file showed.
enum Look {
    /// Nothing to go by; the next look will tell.
    Later,
    /// As it was.
    Same,
    Good(Seen, Credential),
    /// Without `Seen` the next look has to read it again.
    Broken(Option<Seen>, &'static str),
}

/// By what a change of a file is noticed without reading it.
struct Seen {
    stamp: Stamp,
    /// It was touched so shortly before it was read that a later change may
    /// have left the same stamp.
    racy: bool,
    world_readable: bool,
}

#[derive(PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    /// Seconds and nanoseconds; unlike `modified` nobody can set it.
    changed: (i64, i64),
}

impl Stamp {
    fn of(file: &Metadata) -> Self {
        Self {
            device: file.dev(),
            inode: file.ino(),
            size: file.size(),
            modified: (file.mtime(), file.mtime_nsec()),
            changed: (file.ctime(), file.ctime_nsec()),
        }
    }
}

impl Seen {
    /// `read_at`: unix seconds before the file was read.
    fn of(file: &Metadata, read_at: i64) -> Self {
        let touched = file.mtime().max(file.ctime());
        Self {
            stamp: Stamp::of(file),
            racy: touched.saturating_add(RACY_SECS) >= read_at,
            world_readable: file.is_file() && file.mode() & 0o004 != 0,
        }
    }
}

/// Looks at a well-named file. It is read unless it is as `previous` tells.
/// Never waits for anything but the disk.
fn look(path: &Path, previous: Option<&Seen>) -> Look {
    let read_at = unix_seconds();
    let file = match fs::metadata(path) {
        Ok(file) => file,
        Err(error) => {
            return match fs::symlink_metadata(path) {
                Ok(_) if means_absent(&error) => Look::Broken(None, reason::DANGLING),
                Ok(_) => unreadable(&error),
                Err(error) if means_absent(&error) => Look::Later,
                Err(error) => unreadable(&error),
            };
        }
    };
    // Before it is opened: to open a device may have effects.
    if !file.is_file() {
        return Look::Broken(Some(Seen::of(&file, read_at)), reason::NOT_A_FILE);
    }
    if previous.is_some_and(|seen| !seen.racy && seen.stamp == Stamp::of(&file)) {
        return Look::Same;
    }
    // Should it have become a pipe meanwhile: don't wait for its writer.
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path);
    match opened.and_then(|file| read(file, read_at)) {
        Ok(look) => look,
        Err(error) if means_absent(&error) => Look::Later,
        Err(error) => unreadable(&error),
    }
}

fn read(file: fs::File, read_at: i64) -> io::Result<Look> {
    let metadata = file.metadata()?;
    let seen = Seen::of(&metadata, read_at);
    if !metadata.is_file() {
        return Ok(Look::Broken(Some(seen), reason::NOT_A_FILE));
    }
    let too_large = |size: u64| size > FILE_MAX;
    if too_large(metadata.len()) {
        return Ok(Look::Broken(Some(seen), reason::TOO_LARGE));
    }
    // As large as it will get, so that no copy of a token is left behind by growing.
    let size = usize::try_from(metadata.len()).unwrap_or(0);
    let mut content = Zeroizing::new(Vec::with_capacity(size.saturating_add(64)));
    file.take(FILE_MAX + 1).read_to_end(&mut content)?;
    if too_large(u64::try_from(content.len()).unwrap_or(u64::MAX)) {
        return Ok(Look::Broken(Some(seen), reason::TOO_LARGE));
    }
    Ok(match parse(&content) {
        Ok(credential) => Look::Good(seen, credential),
        Err(reason) => Look::Broken(Some(seen), reason),
    })
}

/// What an error says of a file. That the process is out of descriptors or
/// memory says nothing.
fn unreadable(error: &io::Error) -> Look {
    match error.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EINTR) => Look::Later,
        _ if error.kind() == ErrorKind::PermissionDenied => {
            Look::Broken(None, reason::NO_PERMISSION)
        }
        _ => Look::Broken(None, reason::UNREADABLE),
    }
}

fn means_absent(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

fn is_hidden(name: &OsStr) -> bool {
    name.as_bytes().starts_with(b".")
}

fn is_candidate(name: &OsStr) -> bool {
    !is_hidden(name) && name.as_bytes().ends_with(SUFFIX.as_bytes())
}

/// Whether a hidden entry may be what visible links lead through, as `..data`
/// in a Kubernetes volume. A plain file, like those that rsync and editors
/// write before they rename them, is not.
fn is_switch(path: &Path, name: &OsStr) -> bool {
    name.as_bytes().starts_with(b"..")
        || is_hidden(name) && fs::symlink_metadata(path).is_ok_and(|entry| !entry.is_file())
}

/// The account that a file of this name is for.
fn account(file: &OsStr) -> Option<&str> {
    names::account_name(file.as_bytes().strip_suffix(SUFFIX.as_bytes())?)
}

/// A misnamed file's name, safe to show. Something is wrong with it, so a `?`
/// always takes some byte's place: that of the odd byte, or of the first one
/// too many.
fn shown(file: &OsStr) -> String {
    let mut name: String = file
        .as_bytes()
        .iter()
        .take(SHOWN_MAX)
        .map(|byte| match byte {
            b'.' | b'_' | b'@' | b'+' | b'-' => char::from(*byte),
            _ if byte.is_ascii_alphanumeric() => char::from(*byte),
            _ => '?',
        })
        .collect();
    if !name.contains('?') {
        name.truncate(SHOWN_MAX - 1);
        name.push('?');
    }
    name
}

fn absolute(path: PathBuf) -> PathBuf {
    std::path::absolute(&path).unwrap_or(path)
}

fn unix_seconds() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|time| i64::try_from(time.as_secs()).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::accounts::parse::reason as content;
    use secrecy::ExposeSecret;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;
    use std::process::Command;
    use tempfile::TempDir;

    const MEDIUM: Tier = Tier::Medium;
    const HIGH: Tier = Tier::High;

    struct Bench {
        dir: TempDir,
        scanner: Scanner,
        start: Instant,
    }

    impl Bench {
        /// The folders, empty and not scanned yet.
        fn unscanned() -> Self {
            let dir = tempfile::tempdir().unwrap();
            for tier in Tier::ALL {
                fs::create_dir(dir.path().join(tier.name())).unwrap();
            }
            let scanner = Scanner::new(dir.path().to_owned());
            let start = Instant::now();
            Self {
                dir,
                scanner,
                start,
            }
        }

        /// The folders, empty and scanned.
        fn new() -> Self {
            let mut bench = Self::unscanned();
            assert_eq!(bench.full(0), NONE);
            bench
        }

        fn path(&self, file: &str) -> PathBuf {
            self.dir.path().join(file)
        }

        fn write(&self, file: &str, content: &str) {
            fs::write(self.path(file), content).unwrap();
        }

        fn token(&self, file: &str, token: &str) {
            self.write(file, &format!(r#"{{"access_token":"{token}"}}"#));
        }

        fn at(&self, ms: u64) -> Instant {
            self.start + Duration::from_millis(ms)
        }

        fn full(&mut self, ms: u64) -> Vec<String> {
            let scan = self.scanner.full(self.at(ms));
            assert!(scan.complete);
            told(&scan)
        }

        fn look(&mut self, file: &str, ms: u64) -> Vec<String> {
            told(&self.scanner.paths(&[self.path(file)], self.at(ms)))
        }

        fn due(&mut self, ms: u64) -> Vec<String> {
            let scan = self.scanner.due(self.at(ms));
            assert!(!format!("{scan:?}").contains("token-"));
            told(&scan)
        }
    }

    const NONE: [&str; 0] = [];

    fn told(scan: &Scan) -> Vec<String> {
        let line = |change: &Change| match change {
            Change::Valid {
                tier,
                name,
                credential,
            } => format!("valid {tier} {name} {}", credential.token.expose_secret()),
            Change::Invalid { tier, name, reason } => format!("invalid {tier} {name}: {reason}"),
            Change::BadName { tier, file } => format!("bad {tier} {file}"),
            Change::Gone { tier, file } => format!("gone {tier} {file}"),
        };
        scan.changes.iter().map(line).collect()
    }

    fn invalid(name: &str, reason: &str) -> String {
        format!("invalid medium {name}: {reason}")
    }

    #[test]
    fn the_first_scan_tells_all_in_order() {
        let mut bench = Bench::unscanned();
        for name in ["c", "a", "b"] {
            bench.token(&format!("medium/{name}.json"), &format!("token-{name}"));
        }
        bench.token("supreme/s.json", "token-s");
        bench.token("high/h.json", "token-h");
        bench.write("medium/bb.json", "{");
        bench.token("medium/.hidden.json", "token-x");
        bench.token("medium/notes.txt", "token-x");
        bench.token("medium/x.JSON", "token-x");
        bench.token("medium/x.json~", "token-x");
        bench.token("x.json", "token-x");
        bench.token("medium/a b.json", "token-x");
        let scan = bench.scanner.full(bench.start);
        assert_eq!(
            told(&scan),
            [
                "valid medium a token-a".to_owned(),
                "bad medium a?b.json".to_owned(),
                "valid medium b token-b".to_owned(),
                invalid("bb", content::NOT_AN_OBJECT),
                "valid medium c token-c".to_owned(),
                "valid high h token-h".to_owned(),
                "valid supreme s token-s".to_owned(),
            ]
        );
        assert_eq!((scan.readable, scan.complete), ([true; 3], true));
        assert!(!format!("{scan:?}").contains("token-"));
        assert_eq!(bench.scanner.deadline(), None);
        assert_eq!(
            bench.scanner.broken(),
            [
                (MEDIUM, "a?b.json".to_owned(), reason::BAD_NAME),
                (MEDIUM, "bb".to_owned(), content::NOT_AN_OBJECT),
            ]
        );
        let flips = bench.scanner.take_flips();
        assert_eq!((flips.added.len(), flips.removed.len()), (5, 0));
        assert_eq!(bench.full(1), NONE);
    }

    #[test]
    fn changed_same_and_gone() {
        let mut bench = Bench::new();
        bench.token("medium/a.json", "t1");
        assert_eq!(bench.full(1), ["valid medium a t1"]);
        assert_eq!(bench.scanner.take_flips().added, [(MEDIUM, "a".to_owned())]);
        bench.write("medium/a.json", " {\"access_token\" : \"t1\"}");
        assert_eq!(bench.full(2), NONE);
        bench.token("medium/a.json", "t2");
        assert_eq!(bench.full(3), ["valid medium a t2"]);
        assert!(bench.scanner.take_flips().added.is_empty());
        // Removed and made anew between two looks.
        fs::remove_file(bench.path("medium/a.json")).unwrap();
        bench.token("medium/a.json", "t3");
        assert_eq!(bench.full(4), ["valid medium a t3"]);
        // Renamed over.
        bench.token("medium/.tmp", "t4");
        fs::rename(bench.path("medium/.tmp"), bench.path("medium/a.json")).unwrap();
        assert_eq!(bench.look("medium/a.json", 5), ["valid medium a t4"]);
        fs::remove_file(bench.path("medium/a.json")).unwrap();
        assert_eq!(bench.full(6), ["gone medium a"]);
        assert_eq!(
            bench.scanner.take_flips().removed,
            [(MEDIUM, "a".to_owned())]
        );
        assert_eq!(bench.full(7), NONE);
        bench.token("medium/a.json", "t4");
        assert_eq!(bench.look("medium/a.json", 8), ["valid medium a t4"]);
        fs::rename(bench.path("medium/a.json"), bench.path("high/a.json")).unwrap();
        assert_eq!(bench.full(9), ["gone medium a", "valid high a t4"]);
    }

    #[test]
    fn a_rewrite_within_the_clocks_granularity_is_seen() {
        let mut bench = Bench::new();
        for round in 100..200 {
            bench.token("medium/a.json", &format!("t{round}"));
            assert_eq!(bench.full(round), [format!("valid medium a t{round}")]);
        }
        // The same with a time stamp from the past, as `cp -p` leaves it.
        for round in 200..300 {
            bench.token("medium/a.json", &format!("t{round}"));
            let file = fs::File::options()
                .write(true)
                .open(bench.path("medium/a.json"));
            let past = UNIX_EPOCH + Duration::from_secs(1_000_000_000);
            file.unwrap().set_modified(past).unwrap();
            assert_eq!(bench.full(round), [format!("valid medium a t{round}")]);
        }
    }

    #[test]
    fn a_file_that_rests_is_not_read_again() {
        let mut bench = Bench::new();
        bench.token("medium/a.json", "t1");
        bench.full(1);
        let file = bench.path("medium/a.json");
        let known = &mut bench.scanner.folders[0].known;
        let seen = known
            .get_mut(OsStr::new("a.json"))
            .unwrap()
            .seen
            .as_mut()
            .unwrap();
        assert!(seen.racy);
        assert!(!matches!(look(&file, Some(seen)), Look::Same));
        seen.racy = false;
        assert!(matches!(look(&file, Some(seen)), Look::Same));
        // Every part of the stamp counts.
        seen.stamp.changed.1 += 1;
        assert!(!matches!(look(&file, Some(seen)), Look::Same));

        let metadata = fs::metadata(&file).unwrap();
        let touched = metadata.mtime().max(metadata.ctime());
        assert!(Seen::of(&metadata, touched + 2).racy);
        assert!(!Seen::of(&metadata, touched + 3).racy);
        assert!(Seen::of(&metadata, touched - 1000).racy);
    }

    #[test]
    fn a_half_written_file_keeps_its_last_good_version() {
        let mut bench = Bench::new();
        bench.token("medium/a.json", "t1");
        bench.full(0);
        bench.write("medium/a.json", "{\"access_tok");
        assert_eq!(bench.look("medium/a.json", 100), NONE);
        assert_eq!(bench.scanner.deadline(), Some(bench.at(2100)));
        assert_eq!(
            bench.scanner.broken(),
            [(MEDIUM, "a".to_owned(), content::NOT_AN_OBJECT)]
        );
        assert_eq!(bench.due(2099), NONE);
        bench.token("medium/a.json", "t2");
        assert_eq!(bench.look("medium/a.json", 2099), ["valid medium a t2"]);
        assert_eq!(bench.scanner.deadline(), None);
        assert!(bench.scanner.broken().is_empty());
        assert_eq!(bench.due(5000), NONE);
        // As it was before: nothing to tell.
        bench.write("medium/a.json", "");
        assert_eq!(bench.full(6000), NONE);
        bench.token("medium/a.json", "t2");
        assert_eq!(bench.full(6001), NONE);
        assert_eq!(bench.scanner.deadline(), None);
    }

    #[test]
    fn a_broken_file_is_judged_two_seconds_after_it_broke() {
        let mut bench = Bench::new();
        bench.token("medium/a.json", "t1");
        bench.full(0);
        bench.write("medium/a.json", "{");
        bench.write("medium/new.json", "{");
        assert_eq!(bench.full(0), NONE);
        // Other content, still broken: the judgement is not put off.
        bench.write("medium/a.json", "{}");
        assert_eq!(bench.look("medium/a.json", 1900), NONE);
        assert_eq!(bench.full(1999), NONE);
        assert_eq!(bench.scanner.deadline(), Some(bench.at(2000)));
        assert_eq!(
            bench.due(2000),
            [
                invalid("a", content::NO_CREDENTIAL),
                invalid("new", content::NOT_AN_OBJECT)
            ]
        );
        assert_eq!(
            bench.scanner.take_flips().removed,
            [(MEDIUM, "a".to_owned())]
        );
        assert_eq!(bench.scanner.deadline(), None);
        assert_eq!(bench.full(3000), NONE);
        // Another reason is told at once.
        bench.write("medium/a.json", "");
        assert_eq!(bench.full(3001), [invalid("a", content::EMPTY)]);
        assert_eq!(bench.full(3002), NONE);
        // Right again, and the grace begins anew.
        bench.token("medium/a.json", "t1");
        assert_eq!(bench.look("medium/a.json", 4000), ["valid medium a t1"]);
        assert_eq!(bench.scanner.take_flips().added, [(MEDIUM, "a".to_owned())]);
        bench.write("medium/a.json", "");
        assert_eq!(bench.full(5000), NONE);
        assert_eq!(bench.full(7000), [invalid("a", content::EMPTY)]);
        fs::remove_file(bench.path("medium/a.json")).unwrap();
        assert_eq!(bench.full(7001), ["gone medium a"]);
    }

    #[test]
    fn the_last_look_may_show_a_file_right_or_gone() {
        let mut bench = Bench::new();
        for name in ["a", "b", "c"] {
            bench.token(&format!("medium/{name}.json"), "t1");
        }
        bench.full(0);
        for name in ["a", "b", "c", "d"] {
            bench.write(&format!("medium/{name}.json"), "");
        }
        assert_eq!(bench.full(0), NONE);
        bench.token("medium/a.json", "t1");
        bench.token("medium/b.json", "t2");
        fs::remove_file(bench.path("medium/c.json")).unwrap();
        // Broken and gone before anything was told of it.
        fs::remove_file(bench.path("medium/d.json")).unwrap();
        assert_eq!(bench.due(2000), ["valid medium b t2", "gone medium c"]);
        assert_eq!(bench.scanner.deadline(), None);
    }

    #[test]
    fn every_way_to_be_broken() {
        let mut bench = Bench::unscanned();
        bench.write("medium/empty.json", "");
        bench.write("medium/blank.json", " \n");
        let limit = usize::try_from(FILE_MAX).unwrap();
        let json = r#"{"access_token":"t"}"#;
        bench.write(
            "medium/full.json",
            &format!("{json}{}", " ".repeat(limit - json.len())),
        );
        bench.write(
            "medium/over.json",
            &format!("{json}{}", " ".repeat(limit + 1 - json.len())),
        );
        let huge = fs::File::create(bench.path("medium/huge.json")).unwrap();
        huge.set_len(5 * 1024 * 1024 * 1024).unwrap();
        fs::create_dir(bench.path("medium/folder.json")).unwrap();
        let _socket = UnixListener::bind(bench.path("medium/socket.json")).unwrap();
        let fifo = Command::new("mkfifo")
            .arg(bench.path("medium/fifo.json"))
            .status();
        assert!(fifo.unwrap().success());
        symlink("fifo.json", bench.path("medium/to-fifo.json")).unwrap();
        symlink("/dev/zero", bench.path("medium/zero.json")).unwrap();
        symlink("nowhere", bench.path("medium/dangling.json")).unwrap();
        symlink("loop.json", bench.path("medium/loop.json")).unwrap();
        bench.token("elsewhere", "linked");
        symlink("../elsewhere", bench.path("medium/link.json")).unwrap();
        bench.write("medium/deep.json", &"[".repeat(1_000_000));
        let not_a_file = reason::NOT_A_FILE;
        assert_eq!(
            bench.full(0),
            [
                invalid("blank", content::EMPTY),
                invalid("dangling", reason::DANGLING),
                invalid("deep", content::NOT_AN_OBJECT),
                invalid("empty", content::EMPTY),
                invalid("fifo", not_a_file),
                invalid("folder", not_a_file),
                "valid medium full t".to_owned(),
                invalid("huge", reason::TOO_LARGE),
                "valid medium link linked".to_owned(),
                invalid("loop", reason::UNREADABLE),
                invalid("over", reason::TOO_LARGE),
                invalid("socket", not_a_file),
                invalid("to-fifo", not_a_file),
                invalid("zero", not_a_file),
            ]
        );
        assert_eq!(bench.full(1), NONE);
        assert_eq!(bench.scanner.broken().len(), 12);
        // The other end of a link changes.
        bench.token("elsewhere", "other");
        assert_eq!(bench.full(2), ["valid medium link other"]);
        fs::remove_file(bench.path("elsewhere")).unwrap();
        assert_eq!(bench.full(3), NONE);
        assert_eq!(bench.full(2003), [invalid("link", reason::DANGLING)]);
        assert_eq!(bench.look("medium/fifo.json", 2004), NONE);
    }

    #[test]
    fn a_file_without_permission_is_broken() {
        let mut bench = Bench::unscanned();
        bench.token("medium/a.json", "t1");
        let file = bench.path("medium/a.json");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o000)).unwrap();
        if fs::read(&file).is_ok() {
            return; // Nothing is forbidden to root.
        }
        assert_eq!(bench.full(0), [invalid("a", reason::NO_PERMISSION)]);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(bench.full(1), ["valid medium a t1"]);
        // A folder that can be listed, but not searched, removes nothing.
        let folder = bench.path("medium");
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o400)).unwrap();
        assert_eq!(bench.full(2), NONE);
        assert_eq!(bench.full(9000), NONE);
        assert_eq!(bench.look("medium/a.json", 9001), NONE);
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
    }

    #[test]
    fn errors_of_the_system() {
        let look = |code| unreadable(&io::Error::from_raw_os_error(code));
        for code in [libc::EMFILE, libc::ENFILE, libc::ENOMEM] {
            assert!(matches!(look(code), Look::Later));
        }
        for code in [libc::EACCES, libc::EPERM] {
            assert!(matches!(
                look(code),
                Look::Broken(None, reason::NO_PERMISSION)
            ));
        }
        for code in [libc::EIO, libc::ESTALE, libc::ELOOP] {
            assert!(matches!(look(code), Look::Broken(None, reason::UNREADABLE)));
        }
    }

    #[test]
    fn odd_names_are_shown_safely() {
        let mut bench = Bench::new();
        let long = "x".repeat(200);
        let folder = bench.path("medium");
        let names: [&[u8]; 6] = [
            b"\xff\xfe.json",
            b"%s%n.json",
            "一.json".as_bytes(),
            b"a\nb.json",
            b"a\tb.json",
            format!("{long}.json").leak().as_bytes(),
        ];
        for name in names {
            fs::write(folder.join(OsStr::from_bytes(name)), "{}").unwrap();
        }
        let cut = format!("{}?", "x".repeat(127));
        assert_eq!(
            bench.full(0),
            [
                "bad medium ??.json".to_owned(),
                "bad medium ???.json".to_owned(),
                "bad medium ?s?n.json".to_owned(),
                "bad medium a?b.json".to_owned(),
                format!("bad medium {cut}"),
            ]
        );
        assert_eq!(bench.scanner.deadline(), None);
        assert_eq!(bench.scanner.broken().len(), 5);
        // Two files are shown alike: gone when both are.
        fs::remove_file(folder.join("a\nb.json")).unwrap();
        assert_eq!(bench.look("medium/a\nb.json", 1), NONE);
        fs::remove_file(folder.join("a\tb.json")).unwrap();
        assert_eq!(bench.look("medium/a\tb.json", 2), ["gone medium a?b.json"]);
        fs::remove_file(folder.join("%s%n.json")).unwrap();
        assert_eq!(bench.full(3), ["gone medium ?s?n.json"]);
        assert_eq!(shown(OsStr::new("a b")), "a?b");
        assert_eq!(shown(OsStr::new("")), "?");
    }

    #[test]
    fn a_folder_that_cannot_be_read_removes_nothing() {
        let mut bench = Bench::new();
        bench.token("medium/a.json", "t1");
        bench.token("medium/b c.json", "t1");
        bench.token("high/h.json", "t1");
        bench.write("medium/bad.json", "{");
        bench.full(0);
        let (folder, away) = (bench.path("medium"), bench.path("away"));
        fs::rename(&folder, &away).unwrap();
        let scan = bench.scanner.full(bench.at(1));
        assert_eq!((told(&scan), scan.readable), (vec![], [false, true, true]));
        let scan = bench.scanner.paths(&[folder.join("a.json")], bench.at(2));
        assert!(!scan.complete);
        assert_eq!((told(&scan), scan.readable), (vec![], [false, true, true]));
        // A broken file out of sight is not judged, and the deadline moves on.
        assert_eq!(bench.due(2000), NONE);
        assert_eq!(bench.scanner.deadline(), Some(bench.at(4000)));
        // A file in the folder's place is no folder.
        fs::write(&folder, "").unwrap();
        assert_eq!(bench.full(2001), NONE);
        assert_eq!(bench.look("medium/a.json", 2002), NONE);
        fs::remove_file(&folder).unwrap();
        symlink("medium", &folder).unwrap();
        assert_eq!(bench.full(2003), NONE);
        fs::remove_file(&folder).unwrap();
        // It comes back, a file short: an event for any file tells all.
        fs::remove_file(away.join("a.json")).unwrap();
        fs::rename(&away, &folder).unwrap();
        let scan = bench
            .scanner
            .paths(&[folder.join("other.json")], bench.at(5000));
        assert_eq!(
            told(&scan),
            [
                "gone medium a".to_owned(),
                invalid("bad", content::NOT_AN_OBJECT)
            ]
        );
        assert_eq!((scan.readable, scan.complete), ([true; 3], true));
        // The root as well.
        let root = bench.path("");
        let moved = root.with_extension("moved");
        fs::rename(&root, &moved).unwrap();
        let scan = bench.scanner.full(bench.at(6000));
        fs::rename(&moved, &root).unwrap();
        assert_eq!((told(&scan), scan.readable), (vec![], [false; 3]));
        assert_eq!(bench.full(6001), NONE);
    }

    #[test]
    fn paths_may_be_anything() {
        let mut bench = Bench::new();
        bench.token("medium/a.json", "t1");
        bench.token("medium/b.json", "t1");
        bench.write("medium/.a.json.swp", "");
        symlink("v1", bench.path("medium/.current")).unwrap();
        for ignored in [
            "medium/.a.json.swp",
            "medium/.not-there",
            "medium/x.txt",
            "medium/deeper/a.json",
            "medium/../medium/a.json",
            "other/a.json",
            "../x",
            "a.json",
            "/",
            "",
            "/medium/a.json",
            "medium\0/a.json",
        ] {
            let path = if ignored.is_empty() {
                PathBuf::new()
            } else {
                bench.path(ignored)
            };
            let scan = bench.scanner.paths(&[path], bench.at(1));
            assert!(!scan.complete, "{ignored}");
            assert_eq!(told(&scan), NONE, "{ignored}");
        }
        let file = bench.path("medium/b.json");
        let found = bench.scanner.paths(&[file.clone(), file], bench.at(1));
        assert_eq!(told(&found), ["valid medium b t1"]);
        for whole in [
            "",
            "medium",
            "high",
            "..data",
            "medium/..data",
            "medium/.current",
        ] {
            let scan = bench.scanner.paths(&[bench.path(whole)], bench.at(1));
            assert!(scan.complete, "{whole}");
        }
        assert!(!bench.scanner.paths(&[], bench.at(1)).complete);
        assert_eq!(bench.look("medium/never.json", 2), NONE);
        // Before the first full scan there is nothing to compare with.
        let mut fresh = Scanner::new(bench.path(""));
        let scan = fresh.paths(&[bench.path("medium/a.json")], bench.at(1));
        assert_eq!((scan.complete, scan.changes.len()), (true, 2));
    }

    #[test]
    fn a_kubernetes_volume_is_swapped() {
        let mut bench = Bench::unscanned();
        let volume = bench.path("medium");
        for (version, token) in [("..1", "t1"), ("..2", "t2")] {
            fs::create_dir(volume.join(version)).unwrap();
            for name in ["a", "b"] {
                bench.token(&format!("medium/{version}/{name}.json"), token);
            }
        }
        symlink("..1", volume.join("..data")).unwrap();
        symlink("..data/a.json", volume.join("a.json")).unwrap();
        symlink("..data/b.json", volume.join("b.json")).unwrap();
        assert_eq!(bench.full(0), ["valid medium a t1", "valid medium b t1"]);
        symlink("..2", volume.join("..data_tmp")).unwrap();
        fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
        assert_eq!(
            bench.look("medium/..data", 1),
            ["valid medium a t2", "valid medium b t2"]
        );
    }

    #[test]
    fn another_root() {
        let mut bench = Bench::new();
        for name in ["a", "b", "c"] {
            bench.token(&format!("medium/{name}.json"), "t1");
        }
        bench.token("high/h.json", "t1");
        bench.full(0);
        let other = tempfile::tempdir().unwrap();
        fs::create_dir(other.path().join("medium")).unwrap();
        for (name, token) in [("b", "t1"), ("c", "t2"), ("d", "t1")] {
            let content = format!(r#"{{"access_token":"{token}"}}"#);
            fs::write(other.path().join(format!("medium/{name}.json")), content).unwrap();
        }
        bench.scanner.set_root(other.path().to_owned());
        assert_eq!(bench.scanner.root(), other.path());
        let scan = bench.scanner.full(bench.at(1));
        assert_eq!(
            told(&scan),
            ["gone medium a", "valid medium c t2", "valid medium d t1"]
        );
        // The old one's high accounts stay: the new one has no such folder.
        assert_eq!(scan.readable, [true, false, false]);
        fs::create_dir(other.path().join("high")).unwrap();
        let scan = bench.scanner.full(bench.at(2));
        assert_eq!(told(&scan), ["gone high h"]);
        assert_eq!(bench.scanner.take_flips().removed, [(HIGH, "h".to_owned())]);
    }

    #[test]
    fn a_file_that_everybody_may_read_is_told_once() {
        let mut bench = Bench::new();
        for (name, mode) in [("a", 0o600), ("b", 0o644), ("c", 0o604), ("d", 0o640)] {
            let file = format!("medium/{name}.json");
            bench.token(&file, "t");
            fs::set_permissions(bench.path(&file), fs::Permissions::from_mode(mode)).unwrap();
        }
        let names = |list: Vec<(Tier, String)>| -> Vec<String> {
            list.into_iter().map(|(_, name)| name).collect()
        };
        let mode = |bench: &Bench, file: &str, mode: u32| {
            fs::set_permissions(bench.path(file), fs::Permissions::from_mode(mode)).unwrap();
        };
        bench.write("medium/e.json", "{");
        mode(&bench, "medium/e.json", 0o644);
        fs::create_dir(bench.path("medium/f.json")).unwrap();
        bench.full(0);
        assert_eq!(names(bench.scanner.take_exposed()), ["b", "c", "e"]);
        bench.full(1);
        bench.look("medium/b.json", 2);
        assert_eq!(names(bench.scanner.take_exposed()), NONE);
        mode(&bench, "medium/b.json", 0o600);
        mode(&bench, "medium/a.json", 0o644);
        assert_eq!(bench.full(3), NONE);
        assert_eq!(names(bench.scanner.take_exposed()), ["a"]);
        assert_eq!(names(bench.scanner.exposed()), ["a", "c", "e"]);
        // Put right and spoilt again, it is worth another word.
        mode(&bench, "medium/b.json", 0o644);
        bench.look("medium/b.json", 4);
        assert_eq!(names(bench.scanner.take_exposed()), ["b"]);
        fs::remove_file(bench.path("medium/c.json")).unwrap();
        bench.full(5);
        assert_eq!(names(bench.scanner.exposed()), ["a", "b", "e"]);
    }
}
