//! Leases that are known to be unchanged: Redis was asked to tell this very
//! connection of any change to a key that a lease rests on
//! (client-side caching in its broadcasting mode, <https://redis.io/docs/latest/develop/reference/client-side-caching/>),
//! and has told of none. The module has Redis tell of what is no change of keys: another
//! database, a new token in a file, a token's end. A lease is used so for a bounded time all
//! the same: what nobody has thought of ends with that.

use crate::lender::{Grant, State};
use crate::socket_watch::SocketWatch;
use hashbrown::HashMap;
use redis::Value;
use std::future::poll_fn;
use std::mem;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

/// The names that Redis tells of begin so; a client key follows. Where none does, all
/// leases may have changed, by the module's word.
pub const NAMES: [&str; 2] = ["client_keys:", "key_rotation:"];
/// Keys that are kept in mind at once.
const MOST: usize = 100_000;
/// How often room is made among them: each of them is looked at for that.
const SWEEP: Duration = Duration::from_secs(1);
/// What Redis tells may be held up by as much as this, in bytes, that has not been read: then
/// not all that it has told has come.
const HELD_UP: usize = 32 << 10;
/// How long a question keeps others from being asked for the same: it may be given up.
const QUESTION: Duration = Duration::from_secs(1);

/// What one connection knows.
#[derive(Debug)]
pub struct Known {
    /// How long a lease is used without asking.
    span: Duration,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    keys: HashMap<Box<str>, Entry>,
    /// The connection's socket, to see whether something has come on it. None
    /// while Redis tells nothing.
    line: Option<SocketWatch>,
    /// A message of Redis's has come in part.
    in_part: bool,
    /// How often all that had come has been read.
    readings: u64,
    /// The last time it was so much that more may have been held up by it.
    held_up: bool,
    /// Those who wait for the next time.
    waiting: Vec<Waker>,
    tickets: u64,
    /// When room was made last.
    swept: Option<Instant>,
}

#[derive(Debug)]
struct Entry {
    /// When it was used for the first time, or asked for.
    since: Instant,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// It has been used, and nothing more is known.
    Met,
    /// Redis is being asked, by this ticket; nothing has changed since.
    Asked(u64),
    Lease {
        grant: Grant,
        /// When it ends by the clock, or its key does, in unix ms.
        end: i64,
    },
}

/// What to do about a key's lease.
#[derive(Debug)]
pub enum Look {
    /// It is this one.
    Lease(Grant),
    /// It may be known, once what has come from Redis has been read.
    Behind(Behind),
    /// Redis is to be asked.
    Ask(Asking),
}

/// How Redis is to be asked for a lease.
#[derive(Debug)]
pub enum Asking {
    /// For this once.
    Once,
    /// And for the key's end: from then on it tells of changes.
    Track(Ticket),
}

/// How often all had been read when something had come that had not.
#[derive(Clone, Copy, Debug)]
pub struct Behind(u64);

/// A question's number, and when it was asked.
#[derive(Debug)]
pub struct Ticket(u64, Instant);

impl Known {
    pub fn new(span: Duration) -> Self {
        Self {
            span,
            inner: Mutex::default(),
        }
    }

    pub fn is_wanted(&self) -> bool {
        !self.span.is_zero()
    }

    /// Whether Redis tells of changes.
    pub fn is_told(&self) -> bool {
        self.is_wanted() && self.inner().line.is_some()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Redis tells of changes from now on, over a connection with this socket.
    pub fn begin(&self, line: SocketWatch) {
        Self::restart(self.inner(), Some(line));
    }

    /// It tells of none any more, or is gone, and with it all that was known.
    pub fn end(&self) {
        Self::restart(self.inner(), None);
    }

    fn restart(mut inner: MutexGuard<'_, Inner>, line: Option<SocketWatch>) {
        let waiting = inner.restart(line);
        drop(inner);
        waiting.into_iter().for_each(Waker::wake);
    }

    /// All that had come on the connection has been read, so many bytes, and what it told
    /// taken in. Nobody may have looked since the last of it was read: this is for one thread.
    pub fn caught_up(&self, bytes: usize) {
        if !self.is_wanted() {
            return;
        }
        let mut inner = self.inner();
        // What has come may be of TLS alone, in which there is nothing to read.
        if bytes > 0 || !inner.waiting.is_empty() && inner.is_silent() {
            inner.readings += 1;
            inner.held_up = bytes >= HELD_UP;
            let waiting = mem::take(&mut inner.waiting);
            drop(inner);
            waiting.into_iter().for_each(Waker::wake);
        }
    }

    /// Waits until all has been read that had come by then.
    pub async fn catch_up(&self, Behind(readings): Behind) {
        poll_fn(|cx| {
            let mut inner = self.inner();
            if inner.readings != readings {
                return Poll::Ready(());
            }
            inner.waiting.push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Whether a message has come in part.
    pub fn in_part(&self, in_part: bool) {
        if self.is_wanted() {
            self.inner().in_part = in_part;
        }
    }

    /// The lease of a key at `now`, which is `clock` in unix ms.
    pub fn look(&self, key: &str, now: Instant, clock: i64) -> Look {
        let mut inner = self.inner();
        match inner.find(key, now, clock, self.span) {
            Err(asking) => Look::Ask(asking),
            // Nobody knows when the rest comes.
            Ok(_) if inner.in_part => Look::Ask(Asking::Once),
            Ok(grant) if inner.is_silent() => Look::Lease(grant),
            // Were Redis asked instead, its answer would have the next one ask, too.
            Ok(_) => Look::Behind(Behind(inner.readings)),
        }
    }

    /// The same for one who has caught up just now, or what to ask.
    pub fn look_again(&self, key: &str, now: Instant, clock: i64) -> Result<Grant, Asking> {
        let mut inner = self.inner();
        let found = inner.find(key, now, clock, self.span);
        if inner.in_part || inner.held_up {
            found.and(Err(Asking::Once))
        } else {
            found
        }
    }

    /// Redis, asked at `now`, has granted that to a key which it was not asked to tell of.
    pub fn meet(&self, key: &str, now: Instant, grant: &Grant) {
        let mut inner = self.inner();
        // Nobody tells of what a bound key rests on, nor of anything without Redis.
        let may_be_known = !matches!(grant.state, State::Bound | State::Grace);
        if may_be_known
            && inner.line.is_some()
            && !inner.keys.contains_key(key)
            && inner.has_room(now, self.span)
        {
            inner.enter(key, now, Kind::Met);
        }
    }

    /// What Redis answered to that question, about a key that ends at `key_end` (unix
    /// ms), when it was `clock`. It counts if no change has been told of since it was asked.
    pub fn learn(
        &self,
        key: &str,
        Ticket(ticket, since): Ticket,
        grant: &Grant,
        key_end: i64,
        clock: i64,
    ) {
        let end = grant.lease.next_rotation.unwrap_or(0).min(key_end);
        let mut inner = self.inner();
        if !inner.is_asked(key, ticket) {
            return;
        }
        match grant.state {
            State::Current if clock < end => {
                let grant = grant.apart();
                inner.enter(key, since, Kind::Lease { grant, end });
            }
            // They come with changes that are still to be told of.
            State::Assigned | State::Rotated | State::Failover => inner.forget(key),
            State::Current | State::Bound | State::Grace => drop(inner.keys.remove(key)),
        }
    }

    /// Redis has refused the key or could not be asked, or its end is not known.
    pub fn refused(&self, key: &str, Ticket(ticket, _): Ticket) {
        let mut inner = self.inner();
        if inner.is_asked(key, ticket) {
            inner.keys.remove(key);
        }
    }

    /// It has refused to say when the key ends, as it would for every key: nothing is known
    /// any more. Answers false where that was said on a former connection.
    pub fn denied(&self, key: &str, Ticket(ticket, _): Ticket) -> bool {
        let inner = self.inner();
        let is_asked = inner.is_asked(key, ticket);
        if is_asked {
            Self::restart(inner, None);
        }
        is_asked
    }

    /// What is known of the key may no longer be so.
    pub fn forget(&self, key: &str) {
        self.inner().forget(key);
    }

    /// What is known of any key may no longer be so.
    pub fn forget_all(&self) {
        self.inner().forget_all();
    }

    /// A message that Redis sent unasked.
    pub fn told(&self, message: &[u8]) {
        let names = match redis::parse_redis_value(message) {
            Ok(Value::Push { data, .. }) => data.into_iter().next(),
            _ => None,
        };
        let mut inner = self.inner();
        match names {
            Some(Value::Array(names)) => {
                for name in names {
                    let Value::BulkString(name) = name else {
                        continue;
                    };
                    let name = std::str::from_utf8(&name).unwrap_or_default();
                    match NAMES.iter().find_map(|kind| name.strip_prefix(kind)) {
                        Some("") => inner.forget_all(),
                        Some(key) => inner.forget(key),
                        None => {}
                    }
                }
            }
            // All keys, or something not understood.
            _ => inner.forget_all(),
        }
    }
}

impl Inner {
    /// Answers who has waited.
    fn restart(&mut self, line: Option<SocketWatch>) -> Vec<Waker> {
        let former = mem::take(self);
        *self = Self {
            line,
            // No question of a former connection's is to be taken for one of this one's.
            tickets: former.tickets,
            readings: former.readings + 1,
            ..Self::default()
        };
        former.waiting
    }

    /// The lease of a key, if what Redis has told of, as far as it has been read, lets it be.
    fn find(
        &mut self,
        key: &str,
        now: Instant,
        clock: i64,
        span: Duration,
    ) -> Result<Grant, Asking> {
        if self.line.is_none() {
            return Err(Asking::Once);
        }
        let Some(entry) = self.keys.get(key) else {
            return Err(Asking::Once);
        };
        let age = now.saturating_duration_since(entry.since);
        let of_use = match &entry.kind {
            Kind::Lease { grant, end } if age < span && clock < *end => return Ok(grant.clone()),
            // Its answer would count no more.
            Kind::Asked(_) if age < QUESTION => return Err(Asking::Once),
            Kind::Met => span,
            Kind::Asked(_) | Kind::Lease { .. } => span * 2,
        };
        if age >= of_use {
            self.keys.remove(key);
            return Err(Asking::Once);
        }
        self.tickets += 1;
        let ticket = self.tickets;
        self.enter(key, now, Kind::Asked(ticket));
        Err(Asking::Track(Ticket(ticket, now)))
    }

    fn enter(&mut self, key: &str, since: Instant, kind: Kind) {
        self.keys.insert(key.into(), Entry { since, kind });
    }

    fn is_asked(&self, key: &str, ticket: u64) -> bool {
        let entry = self.keys.get(key);
        entry.is_some_and(|entry| matches!(entry.kind, Kind::Asked(own) if own == ticket))
    }

    /// That the key has been used remains, whatever has become of it.
    fn forget(&mut self, key: &str) {
        if let Some(entry) = self.keys.get_mut(key) {
            entry.kind = Kind::Met;
        }
    }

    fn forget_all(&mut self) {
        for entry in self.keys.values_mut() {
            entry.kind = Kind::Met;
        }
    }

    /// Whether nothing has come on the connection that has not been read: what
    /// Redis has told counts from when it has been sent.
    fn is_silent(&mut self) -> bool {
        self.line.as_mut().is_some_and(SocketWatch::is_silent)
    }

    /// Whether there is room for another key, if need be in the place of what is too old.
    fn has_room(&mut self, now: Instant, span: Duration) -> bool {
        let age = |since: Instant| now.saturating_duration_since(since);
        if self.keys.len() >= MOST && self.swept.is_none_or(|swept| age(swept) >= SWEEP) {
            self.swept = Some(now);
            self.keys.retain(|_, entry| age(entry.since) < span);
        }
        self.keys.len() < MOST
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::accounts::Account;
    use crate::headers::Scheme;
    use crate::lender::Lease;
    use hyper::header::HeaderValue;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::pin::pin;
    use std::sync::Arc;
    use std::task::Context;

    const SPAN: Duration = Duration::from_secs(1);

    fn grant(state: State) -> Grant {
        Grant {
            lease: Arc::new(Lease {
                account: Arc::new(Account::new("a")),
                scheme: Scheme::Bearer,
                credential: HeaderValue::from_static("Bearer t"),
                last_rotation: Some(0),
                next_rotation: Some(1000),
                bound: false,
            }),
            state,
            previous_account: None,
        }
    }

    /// What is known over a connection on which nothing has come, its end here, and the other.
    fn line() -> (Known, TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        here.set_nonblocking(true).unwrap();
        let known = Known::new(SPAN);
        let watch = SocketWatch::new(here.try_clone().unwrap().into());
        known.begin(watch.unwrap());
        (known, here, listener.accept().unwrap().0)
    }

    fn track(known: &Known, key: &str, now: Instant) -> Ticket {
        match known.look(key, now, 5) {
            Look::Ask(Asking::Track(ticket)) => ticket,
            other => panic!("not tracked: {other:?}"),
        }
    }

    /// Has it used once, and asked for a second time.
    fn meet(known: &Known, key: &str, now: Instant) -> Ticket {
        known.forget(key);
        known.meet(key, now, &grant(State::Current));
        track(known, key, now)
    }

    pub fn learn(known: &Known, key: &str, now: Instant) {
        let ticket = meet(known, key, now);
        known.learn(key, ticket, &grant(State::Current), i64::MAX, 5);
        assert!(matches!(known.look(key, now, 5), Look::Lease(_)));
    }

    fn is_known(known: &Known, key: &str, now: Instant) -> bool {
        matches!(known.look(key, now, 5), Look::Lease(_))
    }

    #[test]
    fn a_lease_is_known_until_something_speaks_against_it() {
        let now = Instant::now();
        let (known, mut here, mut far) = line();
        let told = |names: &str| known.told(names.as_bytes());
        learn(&known, "k", now);
        assert!(is_known(&known, "k", now + SPAN - Duration::from_millis(1)));
        assert!(!is_known(&known, "k", now + SPAN), "its time is over");
        learn_again(&known, "k", now + SPAN);
        assert!(
            matches!(
                known.look("k", now + SPAN, 1000),
                Look::Ask(Asking::Track(_))
            ),
            "it has rotated"
        );
        let ticket = meet(&known, "e", now);
        known.learn("e", ticket, &grant(State::Current), 6, 5);
        assert!(is_known(&known, "e", now));
        assert!(
            matches!(known.look("e", now, 6), Look::Ask(Asking::Track(_))),
            "its key has ended"
        );
        for name in ["client_keys:other", "medium_pool:slots:k", "k"] {
            learn(&known, "x", now);
            told(&format!(
                ">2\r\n$10\r\ninvalidate\r\n*1\r\n${}\r\n{name}\r\n",
                name.len()
            ));
            assert!(is_known(&known, "x", now), "{name}");
            known.forget("x");
        }
        for message in [
            ">2\r\n$10\r\ninvalidate\r\n*2\r\n$1\r\nk\r\n$13\r\nclient_keys:x\r\n",
            ">2\r\n$10\r\ninvalidate\r\n*1\r\n$14\r\nkey_rotation:x\r\n",
            ">2\r\n$10\r\ninvalidate\r\n*1\r\n$12\r\nclient_keys:\r\n",
            ">2\r\n$10\r\ninvalidate\r\n_\r\n",
            ">1\r\n$7\r\nunknown\r\n",
        ] {
            learn(&known, "x", now);
            told(message);
            assert!(!is_known(&known, "x", now), "{message}");
            known.forget("x");
        }
        learn(&known, "y", now);
        known.in_part(true);
        assert!(!is_known(&known, "y", now), "a message has come in part");
        known.in_part(false);
        known.forget("y");
        learn(&known, "y", now);
        far.write_all(b">").unwrap();
        let behind = behind(&known, "y", now);
        assert_eq!(here.read(&mut [0; 9]).unwrap(), 1);
        known.caught_up(1);
        assert!(is_over(known.catch_up(behind)));
        assert!(is_known(&known, "y", now), "it was nothing of its own");
        known.end();
        assert!(matches!(known.look("y", now, 5), Look::Ask(Asking::Once)));
    }

    #[test]
    fn a_refusal_counts_on_its_own_connection_alone() {
        let now = Instant::now();
        let (known, _here, _far) = line();
        let ticket = meet(&known, "k", now);
        let (other, _here, far) = line();
        drop(other);
        known.begin(SocketWatch::new(far.into()).unwrap());
        learn(&known, "x", now);
        assert!(!known.denied("k", ticket));
        assert!(is_known(&known, "x", now));
        let ticket = meet(&known, "k", now);
        assert!(known.denied("k", ticket));
        assert!(!known.is_told());
        assert!(matches!(known.look("x", now, 5), Look::Ask(Asking::Once)));
    }

    /// What there is to catch up with, once something has come.
    fn behind(known: &Known, key: &str, now: Instant) -> Behind {
        loop {
            match known.look(key, now, 5) {
                Look::Lease(_) => {}
                Look::Behind(behind) => return behind,
                other => panic!("not known: {other:?}"),
            }
        }
    }

    fn is_over(wait: impl Future<Output = ()>) -> bool {
        let mut context = Context::from_waker(Waker::noop());
        pin!(wait).poll(&mut context).is_ready()
    }

    #[test]
    fn a_lease_waits_for_what_has_come_to_be_read() {
        let now = Instant::now();
        let (known, mut here, mut far) = line();
        learn(&known, "k", now);
        far.write_all(b">").unwrap();
        let before = behind(&known, "k", now);
        let mut wait = pin!(known.catch_up(before));
        assert!(!is_over(wait.as_mut()));
        known.caught_up(0);
        assert!(!is_over(wait.as_mut()), "it has not been read");
        known.caught_up(1);
        assert!(is_over(wait));
        // What has come since is none of those who have waited.
        assert!(known.look_again("k", now, 5).is_ok());
        known.in_part(true);
        assert!(matches!(known.look_again("k", now, 5), Err(Asking::Once)));
        known.in_part(false);
        known.caught_up(HELD_UP);
        assert!(matches!(known.look_again("k", now, 5), Err(Asking::Once)));
        let before = behind(&known, "k", now);
        let mut wait = pin!(known.catch_up(before));
        assert!(!is_over(wait.as_mut()));
        assert_eq!(here.read(&mut [0; 9]).unwrap(), 1);
        known.caught_up(0);
        assert!(is_over(wait), "there was nothing in it to be told of");
        far.write_all(b">").unwrap();
        let before = behind(&known, "k", now);
        let mut wait = pin!(known.catch_up(before));
        assert!(!is_over(wait.as_mut()));
        known.end();
        assert!(is_over(wait), "nobody reads any more");
        assert!(matches!(known.look_again("k", now, 5), Err(Asking::Once)));
    }

    fn learn_again(known: &Known, key: &str, now: Instant) {
        known.forget(key);
        let ticket = track(known, key, now);
        known.learn(key, ticket, &grant(State::Current), i64::MAX, 5);
        assert!(is_known(known, key, now));
    }

    #[test]
    fn a_key_is_met_by_what_it_is_granted() {
        let now = Instant::now();
        let (known, _here, _far) = line();
        let asks = |key: &str| matches!(known.look(key, now, 5), Look::Ask(Asking::Once));
        // Nobody can fill the memory with keys that there are not.
        for state in [State::Bound, State::Grace] {
            assert!(asks("k"));
            known.meet("k", now, &grant(state));
        }
        assert!(asks("k") && known.inner().keys.is_empty());
        known.meet("k", now, &grant(State::Assigned));
        // Of its own first lease.
        known.told(b">2\r\n$10\r\ninvalidate\r\n*1\r\n$14\r\nkey_rotation:k\r\n");
        let ticket = track(&known, "k", now);
        assert!(asks("k"), "the question is out already");
        known.refused("k", ticket);
        assert!(asks("k") && known.inner().keys.is_empty());
        known.meet("k", now - SPAN, &grant(State::Current));
        assert!(asks("k"), "that was long ago");
    }

    #[test]
    fn an_answer_that_was_overtaken_is_not_learned() {
        let now = Instant::now();
        let (known, _here, _far) = line();
        let ticket = || {
            known.forget("k");
            meet(&known, "k", now)
        };
        let first = ticket();
        known.told(b">2\r\n$10\r\ninvalidate\r\n*1\r\n$13\r\nclient_keys:k\r\n");
        known.learn("k", first, &grant(State::Current), i64::MAX, 5);
        assert!(!is_known(&known, "k", now));
        let older = ticket();
        let _newer = ticket();
        known.learn("k", older, &grant(State::Current), i64::MAX, 5);
        assert!(!is_known(&known, "k", now));
        for state in [State::Assigned, State::Bound, State::Grace] {
            let ticket = ticket();
            known.learn("k", ticket, &grant(state), i64::MAX, 5);
            assert!(!is_known(&known, "k", now), "{state:?}");
        }
    }

    #[test]
    fn an_answer_by_a_former_connection_is_not_learned() {
        let now = Instant::now();
        let (known, _here, far) = line();
        let former = meet(&known, "k", now);
        known.end();
        known.begin(SocketWatch::new(far.into()).unwrap());
        let _own = meet(&known, "k", now);
        known.learn("k", former, &grant(State::Current), i64::MAX, 5);
        assert!(!is_known(&known, "k", now));
    }

    #[test]
    fn a_crowd_of_keys_has_its_bound() {
        let now = Instant::now();
        let (known, _here, _far) = line();
        for number in 0..MOST + 10 {
            known.meet(&number.to_string(), now, &grant(State::Current));
        }
        assert_eq!(known.inner().keys.len(), MOST);
        known.meet("soon", now + SWEEP / 2, &grant(State::Current));
        assert_eq!(known.inner().keys.len(), MOST);
        known.meet("late", now + SWEEP.max(SPAN), &grant(State::Current));
        assert_eq!(known.inner().keys.len(), 1);
    }

    #[test]
    fn without_a_span_or_a_line_redis_is_asked() {
        let now = Instant::now();
        let never = Known::new(Duration::ZERO);
        never.end();
        let silent = Known::new(SPAN);
        for _ in 0..3 {
            assert!(matches!(never.look("k", now, 5), Look::Ask(Asking::Once)));
            assert!(matches!(silent.look("k", now, 5), Look::Ask(Asking::Once)));
        }
    }
}
