//! Account files: what they say, which of them changed, and a thread that
//! follows them. Nothing in here knows Redis, and no token ever reaches a
//! message, a reason or a `Debug` output.

pub(crate) mod parse;
pub(crate) mod scan;
pub(crate) mod watch;

pub(crate) use parse::Credential;
pub(crate) use scan::{Change, Scan, Scanner};
pub(crate) use watch::{Outcome, Sink, Watcher, warnings_of_exposed};
