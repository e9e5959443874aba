//! Leases that are known to be unchanged: Redis was asked to tell this very
//! connection of any change to a key that a lease rests on
//! (client-side caching in its broadcasting mode, <https://redis.io/docs/latest/develop/reference/client-side-caching/>),
//! and has told of none. The module has Redis tell of what is no change of keys: another
//! database, a new token in a file. A lease is used so for a bounded time all the same,
//! as time goes by untold: an account's token ends.

use crate::lender::{Grant, State};
use hashbrown::HashMap;
use redis::Value;
use std::io::ErrorKind;
use std::net::TcpStream;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The names that Redis tells of begin so; a client key follows. Where none does, all
/// leases may have changed, by the module's word.
pub const NAMES: [&str; 2] = ["client_keys:", "key_rotation:"];
/// Keys that are kept in mind at once.
const MOST: usize = 100_000;

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
    line: Option<TcpStream>,
    /// A message of Redis's has come in part.
    in_part: bool,
    tickets: u64,
}

#[derive(Debug)]
enum Entry {
    /// Used once, then.
    Met(Instant),
    /// Redis is being asked; nothing has changed since.
    Asked(u64),
    Lease {
        grant: Grant,
        /// When it was asked for.
        since: Instant,
        /// When it ends by the clock, or its key does, in unix ms.
        end: i64,
    },
}

/// What to do about a key's lease.
#[derive(Debug)]
pub enum Look {
    /// It is this one.
    Lease(Grant),
    /// Redis is to be asked, and to tell of changes from then on.
    Track(Ticket),
    /// Redis is to be asked.
    Ask,
}

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
    pub fn begin(&self, line: Option<TcpStream>) {
        self.inner().restart(line);
    }

    /// It tells of none any more, or is gone, and with it all that was known.
    pub fn end(&self) {
        self.inner().restart(None);
    }

    /// Whether a message has come in part.
    pub fn in_part(&self, in_part: bool) {
        if self.is_wanted() {
            self.inner().in_part = in_part;
        }
    }

    /// The lease of a key at `now`, which is `clock` in unix ms.
    pub fn look(&self, key: &str, now: Instant, clock: i64) -> Look {
        let span = self.span;
        let mut inner = self.inner();
        if inner.line.is_none() {
            return Look::Ask;
        }
        let track = match inner.keys.get(key) {
            None => false,
            Some(Entry::Met(at)) => now.saturating_duration_since(*at) < span,
            Some(Entry::Asked(_)) => true,
            Some(Entry::Lease { grant, since, end }) => {
                let age = now.saturating_duration_since(*since);
                if age < span && clock < *end {
                    // What Redis tells of may be another key's.
                    return if inner.is_silent() {
                        Look::Lease(grant.clone())
                    } else {
                        Look::Ask
                    };
                }
                age < span * 2
            }
        };
        if !inner.make_room(key, now, span) {
            return Look::Ask;
        }
        if !track {
            inner.keys.insert(key.into(), Entry::Met(now));
            return Look::Ask;
        }
        inner.tickets += 1;
        let ticket = inner.tickets;
        inner.keys.insert(key.into(), Entry::Asked(ticket));
        Look::Track(Ticket(ticket, now))
    }

    /// What Redis answered to that question, about a key that ends at `key_end` (unix
    /// ms). It counts if no change has been told of since it was asked.
    pub fn learn(&self, key: &str, Ticket(ticket, since): Ticket, grant: &Grant, key_end: i64) {
        // The others' changes are not all changes of the key's own.
        let next = grant.lease.next_rotation;
        let Some(next) = next.filter(|_| grant.state == State::Current) else {
            return;
        };
        let mut inner = self.inner();
        if let Some(entry) = inner.keys.get_mut(key)
            && matches!(entry, Entry::Asked(own) if *own == ticket)
        {
            *entry = Entry::Lease {
                grant: grant.clone(),
                since,
                end: next.min(key_end),
            };
        }
    }

    /// What is known of the key may no longer be so.
    pub fn forget(&self, key: &str) {
        self.inner().forget(key);
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
                        Some("") => inner.keys.clear(),
                        Some(key) => inner.forget(key),
                        None => {}
                    }
                }
            }
            // All keys, or something not understood.
            _ => inner.keys.clear(),
        }
    }
}

impl Inner {
    fn restart(&mut self, line: Option<TcpStream>) {
        *self = Self {
            line,
            // No question of a former connection's is to be taken for one of this one's.
            tickets: self.tickets,
            ..Self::default()
        };
    }

    /// That the key has been used remains, whatever has become of it.
    fn forget(&mut self, key: &str) {
        if let Some(Entry::Asked(_) | Entry::Lease { .. }) = self.keys.get(key) {
            self.keys.remove(key);
        }
    }

    /// Whether nothing has come on the connection that has not been read: what
    /// Redis has told counts from when it has been sent.
    fn is_silent(&self) -> bool {
        let silence = |line: &TcpStream| {
            let peeked = line.peek(&mut [0]);
            peeked.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
        };
        !self.in_part && self.line.as_ref().is_some_and(silence)
    }

    fn make_room(&mut self, key: &str, now: Instant, span: Duration) -> bool {
        if self.keys.len() < MOST || self.keys.contains_key(key) {
            return true;
        }
        let recent = |at: &Instant| now.saturating_duration_since(*at) < span;
        self.keys.retain(|_, entry| match entry {
            Entry::Met(at) => recent(at),
            Entry::Asked(_) => true,
            Entry::Lease { since, .. } => recent(since),
        });
        self.keys.len() < MOST
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::accounts::Account;
    use crate::headers::Scheme;
    use crate::lender::Lease;
    use hyper::header::HeaderValue;
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::sync::Arc;

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

    /// A line on which nothing has come, and the other end of it.
    fn line() -> (Known, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        here.set_nonblocking(true).unwrap();
        let known = Known::new(SPAN);
        known.begin(Some(here));
        (known, listener.accept().unwrap().0)
    }

    fn track(known: &Known, key: &str, now: Instant) -> Ticket {
        match known.look(key, now, 5) {
            Look::Track(ticket) => ticket,
            other => panic!("not tracked: {other:?}"),
        }
    }

    /// Asks twice, unless that has been done, so that the answer may be learned.
    fn meet(known: &Known, key: &str, now: Instant) -> Ticket {
        match known.look(key, now, 5) {
            Look::Track(ticket) => ticket,
            look => {
                assert!(matches!(look, Look::Ask));
                track(known, key, now)
            }
        }
    }

    fn learn(known: &Known, key: &str, now: Instant) {
        let ticket = meet(known, key, now);
        known.learn(key, ticket, &grant(State::Current), i64::MAX);
        assert!(matches!(known.look(key, now, 5), Look::Lease(_)));
    }

    fn is_known(known: &Known, key: &str, now: Instant) -> bool {
        matches!(known.look(key, now, 5), Look::Lease(_))
    }

    #[test]
    fn a_lease_is_known_until_something_speaks_against_it() {
        let now = Instant::now();
        let (known, mut far) = line();
        let told = |names: &str| known.told(names.as_bytes());
        learn(&known, "k", now);
        assert!(is_known(&known, "k", now + SPAN - Duration::from_millis(1)));
        assert!(!is_known(&known, "k", now + SPAN), "its time is over");
        learn_again(&known, "k", now + SPAN);
        assert!(
            matches!(known.look("k", now + SPAN, 1000), Look::Track(_)),
            "it has rotated"
        );
        let ticket = meet(&known, "e", now);
        known.learn("e", ticket, &grant(State::Current), 6);
        assert!(is_known(&known, "e", now));
        assert!(
            matches!(known.look("e", now, 6), Look::Track(_)),
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
        while is_known(&known, "y", now) {}
        assert!(matches!(known.look("y", now, 5), Look::Ask));
        let read = known.inner().line.as_mut().unwrap().read(&mut [0; 9]);
        assert_eq!(read.unwrap(), 1);
        assert!(is_known(&known, "y", now), "it was nothing of its own");
        known.end();
        assert!(matches!(known.look("y", now, 5), Look::Ask));
    }

    fn learn_again(known: &Known, key: &str, now: Instant) {
        let ticket = track(known, key, now);
        known.learn(key, ticket, &grant(State::Current), i64::MAX);
        assert!(is_known(known, key, now));
    }

    #[test]
    fn a_keys_own_first_lease_does_not_have_it_forgotten() {
        let now = Instant::now();
        let (known, _far) = line();
        assert!(matches!(known.look("k", now, 5), Look::Ask));
        known.told(b">2\r\n$10\r\ninvalidate\r\n*1\r\n$14\r\nkey_rotation:k\r\n");
        assert!(matches!(known.look("k", now, 5), Look::Track(_)));
    }

    #[test]
    fn an_answer_that_was_overtaken_is_not_learned() {
        let now = Instant::now();
        let (known, _far) = line();
        let ticket = || {
            known.forget("k");
            meet(&known, "k", now)
        };
        let first = ticket();
        known.told(b">2\r\n$10\r\ninvalidate\r\n*1\r\n$13\r\nclient_keys:k\r\n");
        known.learn("k", first, &grant(State::Current), i64::MAX);
        assert!(!is_known(&known, "k", now));
        let older = ticket();
        let _newer = ticket();
        known.learn("k", older, &grant(State::Current), i64::MAX);
        assert!(!is_known(&known, "k", now));
        for state in [State::Assigned, State::Bound, State::Grace] {
            let ticket = ticket();
            known.learn("k", ticket, &grant(state), i64::MAX);
            assert!(!is_known(&known, "k", now), "{state:?}");
        }
    }

    #[test]
    fn an_answer_by_a_former_connection_is_not_learned() {
        let now = Instant::now();
        let (known, far) = line();
        let former = meet(&known, "k", now);
        known.end();
        known.begin(Some(far));
        let _own = meet(&known, "k", now);
        known.learn("k", former, &grant(State::Current), i64::MAX);
        assert!(!is_known(&known, "k", now));
    }

    #[test]
    fn a_crowd_of_keys_has_its_bound() {
        let now = Instant::now();
        let (known, _far) = line();
        for number in 0..MOST + 10 {
            let _ = known.look(&number.to_string(), now, 5);
        }
        assert_eq!(known.inner().keys.len(), MOST);
        let _ = known.look("late", now + SPAN, 5);
        assert_eq!(known.inner().keys.len(), 1);
    }

    #[test]
    fn without_a_span_or_a_line_redis_is_asked() {
        let now = Instant::now();
        let never = Known::new(Duration::ZERO);
        never.begin(None);
        let silent = Known::new(SPAN);
        for _ in 0..3 {
            assert!(matches!(never.look("k", now, 5), Look::Ask));
            assert!(matches!(silent.look("k", now, 5), Look::Ask));
        }
    }
}
