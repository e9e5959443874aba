//! As much of Redis's protocol (RESP2, and RESP3's other kinds of values) as it takes to keep questions and answers
//! apart on one connection: packing a command, and finding where a reply ends.
//! What is in a reply is read elsewhere. Pure.
//!
//! The `redis` crate's own connection reads every reply into values before
//! anyone looks at it, which costs more than the rest of a look-up together.

/// The longest reply that is waited for, in bytes.
const LONGEST: usize = 64 << 20;

/// No length has more digits, leading zeros included.
const MOST_DIGITS: usize = 20;

/// What came is not Redis's protocol, or too long.
#[derive(Debug, PartialEq, Eq)]
pub struct Malformed;

/// A command as it goes over the wire.
pub fn command(words: &[&[u8]]) -> Vec<u8> {
    let length: usize = words.iter().map(|word| word.len() + 16).sum();
    let mut packed = Vec::with_capacity(length + 16);
    head(&mut packed, b'*', words.len());
    for word in words {
        head(&mut packed, b'$', word.len());
        packed.extend_from_slice(word);
        packed.extend_from_slice(b"\r\n");
    }
    packed
}

fn head(packed: &mut Vec<u8>, kind: u8, number: usize) {
    if let Ok(digit @ 0..=9) = u8::try_from(number) {
        packed.extend_from_slice(&[kind, b'0' + digit, b'\r', b'\n']);
        return;
    }
    packed.push(kind);
    let start = packed.len();
    let mut rest = number;
    loop {
        packed.push(b'0' + u8::try_from(rest % 10).unwrap_or_default());
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    packed.get_mut(start..).unwrap_or_default().reverse();
    packed.extend_from_slice(b"\r\n");
}

/// The length of the reply that `bytes` begin with; nothing while it is not
/// all there.
///
/// # Errors
/// [`Malformed`].
pub fn reply_length(bytes: &[u8]) -> Result<Option<usize>, Malformed> {
    let mut at = 0;
    // Values that are still to come, those within arrays included.
    let mut left = 1_usize;
    while left > 0 {
        if at > LONGEST || left > LONGEST {
            return Err(Malformed);
        }
        let Some((kind, rest)) = bytes.get(at..).and_then(<[u8]>::split_first) else {
            return Ok(None);
        };
        let line = match kind {
            b'$' | b'=' | b'!' | b'*' | b'~' | b'>' | b'%' => count(rest)?,
            b'+' | b'-' | b':' | b'_' | b'#' | b',' | b'(' => text(rest)?,
            _ => return Err(Malformed),
        };
        let Some(Line { length, count }) = line else {
            return Ok(None);
        };
        at += 1 + length;
        left -= 1;
        match kind {
            b'$' | b'=' | b'!' => at += count.map_or(0, |bytes| bytes + 2),
            b'%' => left += count.unwrap_or(0) * 2,
            _ => left += count.unwrap_or(0),
        }
    }
    if at > LONGEST {
        return Err(Malformed);
    }
    Ok((at <= bytes.len()).then_some(at))
}

/// What follows a value's kind: a line.
struct Line {
    /// Its end included, in bytes.
    length: usize,
    /// How much belongs to the value besides; nothing for null.
    count: Option<usize>,
}

/// A line that is a length, or -1, which stands for null; nothing while it is
/// not all there.
fn count(bytes: &[u8]) -> Result<Option<Line>, Malformed> {
    if bytes == b"-" {
        return Ok(None);
    }
    let is_null = bytes.starts_with(b"-1");
    let start = if is_null { 2 } else { 0 };
    let mut number = 0_usize;
    for (place, byte) in bytes.iter().enumerate().skip(start) {
        let digit = byte.wrapping_sub(b'0');
        if digit <= 9 && !is_null && number <= LONGEST && place < MOST_DIGITS {
            number = number * 10 + usize::from(digit);
            continue;
        }
        if *byte != b'\r' || place == 0 || number > LONGEST {
            return Err(Malformed);
        }
        return match bytes.get(place + 1) {
            None => Ok(None),
            Some(b'\n') => Ok(Some(Line {
                length: place + 2,
                count: (!is_null).then_some(number),
            })),
            Some(_) => Err(Malformed),
        };
    }
    Ok(None)
}

/// Any other line.
fn text(bytes: &[u8]) -> Result<Option<Line>, Malformed> {
    let Some(end) = memchr::memchr(b'\n', bytes) else {
        // No line of the protocol's own is longer than an error's text.
        return if bytes.len() > 64 << 10 {
            Err(Malformed)
        } else {
            Ok(None)
        };
    };
    let line = bytes.get(..end).unwrap_or_default();
    if !line.ends_with(b"\r") {
        return Err(Malformed);
    }
    Ok(Some(Line {
        length: end + 1,
        count: None,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_command_is_packed() {
        assert_eq!(
            command(&[b"GET", b"", b"a\r\nb"]),
            b"*3\r\n$3\r\nGET\r\n$0\r\n\r\n$4\r\na\r\nb\r\n"
        );
    }

    #[test]
    fn a_reply_ends_where_it_ends_and_not_before() {
        let replies: [&[u8]; 14] = [
            b"+OK\r\n",
            b"-ERR no\r\n",
            b":-5\r\n",
            b"$-1\r\n",
            b"$0\r\n\r\n",
            b"$5\r\na\r\nbc\r\n",
            b"*-1\r\n",
            b"*0\r\n",
            b"*3\r\n$1\r\na\r\n*2\r\n:1\r\n$-1\r\n+x\r\n",
            b"_\r\n",
            b"%2\r\n+a\r\n:1\r\n$1\r\nb\r\n_\r\n",
            b"%0\r\n",
            b">2\r\n+invalidate\r\n*1\r\n$1\r\na\r\n",
            b"~2\r\n#t\r\n,1.5\r\n",
        ];
        for reply in replies {
            assert_eq!(reply_length(reply), Ok(Some(reply.len())));
            assert_eq!(
                reply_length(&[reply, b"+more"].concat()),
                Ok(Some(reply.len()))
            );
            for cut in 0..reply.len() {
                assert_eq!(reply_length(&reply[..cut]), Ok(None), "{cut} of {reply:?}");
            }
        }
    }

    #[test]
    fn what_is_no_reply_is_told() {
        for bytes in [
            &b"HTTP/1.1 200 OK\r\n"[..],
            b"\r\n",
            b"$x\r\n",
            b"$-2\r\n",
            b"*99999999999999999999\r\n",
            b"+a\n",
            b"$99999999999\r\n",
            b"$000000000000000000000",
        ] {
            assert_eq!(reply_length(bytes), Err(Malformed), "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_borne(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(Some(length)) = reply_length(&bytes) {
                prop_assert!(length <= bytes.len());
            }
        }

        #[test]
        fn it_agrees_with_the_redis_crate(words in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..20)) {
            let words: Vec<&[u8]> = words.iter().map(Vec::as_slice).collect();
            // A command is an array of bulk strings, as a reply can be.
            let packed = command(&words);
            prop_assert_eq!(reply_length(&packed), Ok(Some(packed.len())));
            let parsed = redis::parse_redis_value(&packed).unwrap();
            let expected = words.iter().map(|word| redis::Value::BulkString(word.to_vec())).collect();
            prop_assert_eq!(parsed, redis::Value::Array(expected));
        }
    }
}
