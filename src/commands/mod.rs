//! The commands, a file each: parse the arguments, ask the pool, have the
//! store write, reply. What several of them share is here.

mod acquire;
#[cfg(feature = "ceiling")]
mod ceiling;
mod cooldown;
mod keygen;
#[cfg(debug_assertions)]
mod leak;
#[cfg(debug_assertions)]
mod panic;
mod release;
mod reload;
mod repair;
mod revoke;
mod status;

pub(crate) use acquire::Acquire;
#[cfg(feature = "ceiling")]
pub(crate) use ceiling::Ceiling;
pub(crate) use cooldown::Cooldown;
pub(crate) use keygen::Keygen;
#[cfg(debug_assertions)]
pub(crate) use leak::Leak;
#[cfg(debug_assertions)]
pub(crate) use panic::Panic;
pub(crate) use release::Release;
pub(crate) use reload::Reload;
pub(crate) use repair::Repair;
pub(crate) use revoke::Revoke;
pub(crate) use status::Status;

use crate::errors::Failure;
use crate::ffi::{Arg, ArgKind, Call, Reply};
use crate::node;
use crate::pool::{MAX_INSTANT, Tier, names};
use crate::settings;

const KEY: Arg = Arg::new(c"key", ArgKind::Text);
const NOW: Arg = Arg::new(c"now", ArgKind::Instant);
const NOW_OPTION: Arg = Arg::new(c"now", ArgKind::Instant).token(c"NOW").optional();
const TIER: Arg = Arg::new(c"tier", ArgKind::Text);
const ACCOUNT: Arg = Arg::new(c"account", ArgKind::Text);

const SYNTAX: Failure = Failure::Syntax("syntax error; COMMAND DOCS shows what this command takes");

/// A client key. It is kept out of the server's logs from here on.
fn key<'a>(call: &Call<'a>, place: usize) -> Result<&'a str, Failure> {
    client_key(unchecked_key(call, place))
}

/// The same, whatever it is: where the pool is asked for it at once, it need
/// be looked at only when the pool doesn't know it.
fn unchecked_key<'a>(call: &Call<'a>, place: usize) -> &'a [u8] {
    call.keep_secret(place);
    call.arg(place).unwrap_or_default()
}

fn client_key(bytes: &[u8]) -> Result<&str, Failure> {
    names::client_key(bytes).ok_or(Failure::Syntax(
        "a client key is 1 to 256 visible ASCII characters",
    ))
}

/// The caller's clock in unix ms, no further from this server's than the setting
/// `max-clock-skew-ms` allows; `*` is this server's clock.
fn now(bytes: Option<&[u8]>) -> Result<i64, Failure> {
    let now = instant(bytes)?;
    match settings::max_clock_skew_ms() {
        // Not read twice: `*` is never off.
        Some(skew) if bytes != Some(b"*") => within(skew, node::clock(), now),
        _ => Ok(now),
    }
}

/// `now`, if it is at most `skew` ms away from `clock` in either direction.
fn within(skew: i64, clock: i64, now: i64) -> Result<i64, Failure> {
    let from = clock.saturating_sub(skew).max(0);
    let to = clock.saturating_add(skew).min(MAX_INSTANT);
    if (from..=to).contains(&now) {
        Ok(now)
    } else {
        Err(Failure::ClockSkew { from, to })
    }
}

/// An instant in unix ms, whichever; `*` is this server's clock.
fn instant(bytes: Option<&[u8]>) -> Result<i64, Failure> {
    if bytes == Some(b"*") {
        return Ok(node::clock());
    }
    let expected = "now must be unix time in milliseconds, from 0 to 253402300799999, or * for the server's clock";
    number(bytes, 0, MAX_INSTANT).ok_or(Failure::Syntax(expected))
}

/// A decimal number within bounds, without sign or blanks.
fn number(bytes: Option<&[u8]>, min: i64, max: i64) -> Option<i64> {
    // So many always fit.
    let digits = bytes.filter(|digits| (1..=17).contains(&digits.len()))?;
    let number = match (digits.first_chunk(), digits.last_chunk()) {
        // So many has an instant. What the two chunks share counts in the last.
        (Some(first), Some(last)) if (9..=16).contains(&digits.len()) => {
            let shared = 16 - digits.len();
            let first = (u64::from_le_bytes(*first) ^ ZEROS) << (8 * shared);
            let last = u64::from_le_bytes(*last) ^ ZEROS;
            eight_digits(first)? * 100_000_000 + eight_digits(last)?
        }
        _ => digits.iter().try_fold(0, |number, digit| {
            let digit = digit.wrapping_sub(b'0');
            (digit <= 9).then_some(number * 10 + i64::from(digit))
        })?,
    };
    (min..=max).contains(&number).then_some(number)
}

const ZEROS: u64 = u64::from_le_bytes(*b"00000000");

/// The number of eight decimal digits, a byte each, the first one lowest. Added
/// up in pairs: a loop over an instant's digits took as long as all the rest of
/// looking at a command's arguments.
fn eight_digits(digits: u64) -> Option<i64> {
    const TOPS: u64 = 0x8080_8080_8080_8080;
    // Adding this sets the top bit of a byte above 9.
    const ABOVE_9: u64 = 0x7676_7676_7676_7676;
    if (digits | digits.wrapping_add(ABOVE_9)) & TOPS != 0 {
        return None;
    }
    let pairs = (digits * 10 + (digits >> 8)) & 0x00ff_00ff_00ff_00ff;
    let fours = (pairs * 100 + (pairs >> 16)) & 0x0000_ffff_0000_ffff;
    let eight = (fours * 10_000 + (fours >> 32)) & 0xffff_ffff;
    i64::try_from(eight).ok()
}

fn tier(bytes: Option<&[u8]>) -> Result<Tier, Failure> {
    let tier = bytes.and_then(Tier::parse);
    tier.ok_or(Failure::Syntax("tier must be medium, high or supreme"))
}

fn account(bytes: Option<&[u8]>) -> Result<&str, Failure> {
    let account = bytes.and_then(names::account_name);
    account.ok_or(Failure::Syntax(
        "an account's name is 1 to 128 of A-Z a-z 0-9 . _ @ + -",
    ))
}

fn text<'a>(bytes: Option<&'a [u8]>, expected: &'static str) -> Result<&'a str, Failure> {
    bytes.and_then(names::text).ok_or(Failure::Syntax(expected))
}

/// The named options at the end of a command, each with a value. Answers them
/// in the order of `words`; a word that is unknown or there twice is an error.
fn options<'a, const N: usize>(
    call: &Call<'a>,
    from: usize,
    words: [&str; N],
) -> Result<[Option<&'a [u8]>; N], Failure> {
    let mut found = [None; N];
    let mut place = from;
    while let Some(word) = call.arg(place) {
        let known = words
            .iter()
            .position(|known| word.eq_ignore_ascii_case(known.as_bytes()));
        let slot = known
            .and_then(|known| found.get_mut(known))
            .filter(|slot| slot.is_none());
        let (Some(slot), Some(value)) = (slot, call.arg(place + 1)) else {
            return Err(SYNTAX);
        };
        *slot = Some(value);
        place += 2;
    }
    Ok(found)
}

/// Values as replies have them: a missing one is null.
trait ReplyExt {
    fn text_or_null(&self, text: Option<&str>);
    fn integer_or_null(&self, number: Option<i64>);
    fn field_text(&self, name: &str, text: Option<&str>);
    fn field_bytes(&self, name: &str, bytes: Option<&[u8]>);
    fn field_integer(&self, name: &str, number: Option<i64>);
    fn field_count(&self, name: &str, count: u64);
}

impl ReplyExt for Reply {
    fn text_or_null(&self, text: Option<&str>) {
        match text {
            Some(text) => self.text(text),
            None => self.null(),
        }
    }

    fn integer_or_null(&self, number: Option<i64>) {
        match number {
            Some(number) => self.integer(number),
            None => self.null(),
        }
    }

    fn field_text(&self, name: &str, text: Option<&str>) {
        self.text(name);
        self.text_or_null(text);
    }

    fn field_bytes(&self, name: &str, bytes: Option<&[u8]>) {
        self.text(name);
        match bytes {
            Some(bytes) => self.bytes(bytes),
            None => self.null(),
        }
    }

    fn field_integer(&self, name: &str, number: Option<i64>) {
        self.text(name);
        self.integer_or_null(number);
    }

    fn field_count(&self, name: &str, count: u64) {
        self.text(name);
        self.integer(i64::try_from(count).unwrap_or(i64::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_now_is_refused_from_the_first_millisecond_beyond_the_skew() {
        let clock = 1_755_266_400_000;
        let refused = Err(Failure::ClockSkew {
            from: clock - 5000,
            to: clock + 5000,
        });
        for (now, expected) in [
            (clock, Ok(clock)),
            (clock - 5000, Ok(clock - 5000)),
            (clock + 5000, Ok(clock + 5000)),
            (clock - 5001, refused.clone()),
            (clock + 5001, refused.clone()),
            (0, refused.clone()),
            (MAX_INSTANT, refused),
        ] {
            assert_eq!(within(5000, clock, now), expected, "{now}");
        }
    }

    #[test]
    fn a_number_is_read_as_the_standard_library_reads_it() {
        let digits = "98765432109876543";
        for length in 0..=20 {
            for number in [&digits[..length.min(17)], &"0".repeat(length)] {
                let expected = number.parse().ok().filter(|_| number.len() <= 17);
                assert_eq!(
                    super::number(Some(number.as_bytes()), 0, i64::MAX),
                    expected
                );
                for place in 0..number.len() {
                    for byte in (0..=255_u8).filter(|byte| !byte.is_ascii_digit()) {
                        let mut bytes = number.as_bytes().to_vec();
                        bytes[place] = byte;
                        assert_eq!(super::number(Some(&bytes), 0, i64::MAX), None, "{bytes:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_number_is_within_its_bounds() {
        for (number, expected) in [
            ("6", None),
            ("7", Some(7)),
            ("1234567890", Some(1_234_567_890)),
            ("1234567891", None),
        ] {
            assert_eq!(
                super::number(Some(number.as_bytes()), 7, 1_234_567_890),
                expected,
                "{number}"
            );
        }
        assert_eq!(super::number(None, 0, 1), None);
    }

    #[test]
    fn what_would_be_accepted_is_never_an_instant_that_is_not() {
        assert_eq!(
            within(5000, 1000, 6001),
            Err(Failure::ClockSkew { from: 0, to: 6000 })
        );
        assert_eq!(
            within(5000, MAX_INSTANT, 0),
            Err(Failure::ClockSkew {
                from: MAX_INSTANT - 5000,
                to: MAX_INSTANT
            })
        );
        assert_eq!(within(i64::MAX, i64::MAX, 0), Ok(0));
    }
}
