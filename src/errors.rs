//! Every error a client can get, in one place. Texts begin with a code word and
//! hold nothing that a caller sent.

use crate::pool::Refusal;
use std::fmt;

/// Why a command failed. It has then changed nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The rules say no.
    Refused(Refusal),
    /// The account's file isn't on this node, so there is no token to give.
    NoToken,
    /// The caller's `now` is too far from this server's clock. What would be
    /// accepted at this moment, in unix ms, both ends included.
    ClockSkew { from: i64, to: i64 },
    /// The view is being made from the keyspace, or account files have yet to come
    /// in; nothing can be answered until then.
    Loading,
    /// An argument isn't what the command takes; the text says what is.
    Syntax(&'static str),
    /// A key of the pool holds another type than it should.
    WrongType,
    /// The server is out of memory.
    OutOfMemory,
    /// The server refused a write.
    Write,
    /// The account folder can't be looked at now.
    NoWatcher,
    /// The command waits for a thread, which a transaction or script can't.
    CannotWait,
    /// The operating system gave no random bytes.
    NoRandom,
    /// A bug.
    Internal,
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// What counts refusals in `INFO`: the code words that clients meet.
pub(crate) const CODES: [&str; 9] = [
    "nokey",
    "revoked",
    "expired",
    "poolfull",
    "noaccount",
    "notoken",
    "clockskew",
    "loading",
    "err",
];

impl Failure {
    /// The place of the failure's code among [`CODES`].
    pub(crate) const fn code(&self) -> usize {
        match self {
            Self::Refused(Refusal::NoKey) => 0,
            Self::Refused(Refusal::Revoked) => 1,
            Self::Refused(Refusal::Expired) => 2,
            Self::Refused(Refusal::PoolFull { .. }) => 3,
            Self::Refused(
                Refusal::NoAccount { .. } | Refusal::BoundAccount | Refusal::NoSuchAccount,
            ) => 4,
            Self::NoToken => 5,
            Self::ClockSkew { .. } => 6,
            Self::Loading => 7,
            _ => 8,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Refused(refusal) => return refused(refusal, f),
            Self::NoToken => "NOTOKEN the account's file is not on this node, so its token is not known here",
            Self::ClockSkew { from, to } => {
                return write!(
                    f,
                    "CLOCKSKEW now is too far from this server's clock; accepted is {from} to {to}, or * for that clock"
                );
            }
            Self::Loading => "LOADING mpool is reading the keyspace or the account files; try again shortly",
            Self::Syntax(expected) => return write!(f, "ERR {expected}"),
            Self::WrongType => "WRONGTYPE a key of the pool holds another type of value than it should",
            Self::OutOfMemory => "OOM command not allowed when used memory > 'maxmemory'.",
            Self::Write => "ERR the server refused a write; its log says why",
            Self::NoWatcher => "ERR the account folder can't be read now; the server's log says why",
            Self::CannotWait => "ERR this command waits for the account folder, which it can't within MULTI or a script",
            Self::NoRandom => "ERR the operating system gave no random bytes; try again",
            Self::Internal => "ERR internal error; the server's log says more",
        })
    }
}

fn refused(refusal: &Refusal, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    f.write_str(match refusal {
        Refusal::NoKey => "NOKEY this key is not registered",
        Refusal::Malformed(flaw) => return write!(f, "ERR {}", flaw.text()),
        Refusal::Revoked => "REVOKED this key has been revoked",
        Refusal::Expired => "EXPIRED this key has expired",
        Refusal::PoolFull { next: Some(next) } => {
            return write!(
                f,
                "POOLFULL every account is full; the next slot falls due at {next}"
            );
        }
        Refusal::PoolFull { next: None } => "POOLFULL every account is full",
        Refusal::NoAccount { next: Some(next) } => {
            return write!(
                f,
                "NOACCOUNT no account of this tier can be used; the first cooldown ends at {next}"
            );
        }
        Refusal::NoAccount { next: None } => "NOACCOUNT no account of this tier can be used",
        Refusal::BoundAccount => "NOACCOUNT the account that this key is bound to can't be used",
        Refusal::NoSuchAccount => "NOACCOUNT there is no account of this name in this tier",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_of_poolfull_is_the_next_due_time() {
        let text = Failure::from(Refusal::PoolFull {
            next: Some(1_755_266_400_000),
        })
        .to_string();
        assert_eq!(text.split(' ').next(), Some("POOLFULL"));
        assert_eq!(text.split(' ').next_back(), Some("1755266400000"));
    }

    #[test]
    fn every_refusal_is_counted_under_the_word_it_begins_with() {
        let refusals = [
            Refusal::NoKey,
            Refusal::Revoked,
            Refusal::Expired,
            Refusal::PoolFull { next: None },
            Refusal::NoAccount { next: Some(1) },
            Refusal::BoundAccount,
            Refusal::NoSuchAccount,
        ];
        let others = [
            Failure::NoToken,
            Failure::ClockSkew { from: 0, to: 1 },
            Failure::Loading,
            Failure::Syntax("now must be a number"),
        ];
        for failure in refusals.map(Failure::from).into_iter().chain(others) {
            let text = failure.to_string();
            let word = text.split(' ').next().unwrap().to_lowercase();
            assert_eq!(CODES[failure.code()], word, "{text}");
        }
    }
}
