//! HTTP/1.1 read a second time, by nobody's library: requests as a client has
//! sent them, requests as an upstream must get them, and answers.

/// A request or an answer.
#[derive(Clone, Debug, Default)]
pub struct Message {
    /// Method and target, or nothing and the status.
    pub method: Vec<u8>,
    pub target: Vec<u8>,
    pub status: u16,
    pub minor: u8,
    /// Names in lower case, values trimmed.
    pub headers: Vec<(String, Vec<u8>)>,
    pub body: Vec<u8>,
    /// Whether the body is all there.
    pub whole: bool,
    /// Both a length and a coding: what follows on the connection is nothing.
    pub last: bool,
}

impl Message {
    pub fn values(&self, name: &str) -> impl Iterator<Item = &[u8]> {
        let headers = self.headers.iter();
        headers
            .filter(move |(other, _)| other == name)
            .map(|(_, value)| value.as_slice())
    }
}

pub enum Parsed {
    /// A message and its length on the wire.
    Whole(Message, usize),
    /// The begin of one; its head, if that is all there.
    Part(Option<Message>),
    Bad(&'static str),
}

/// How much is borne.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// As RFC 9112 wants senders to be.
    Strict,
    /// What a recipient may bear as well.
    Lenient,
}

pub fn request(bytes: &[u8], manner: Manner) -> Parsed {
    let mut at = 0;
    if manner == Manner::Lenient {
        loop {
            let rest = &bytes[at..];
            at += match rest {
                [b'\n', ..] => 1,
                [b'\r', b'\n', ..] => 2,
                _ => break,
            };
        }
    }
    let Some((line, next)) = line(bytes, at, manner) else {
        return Parsed::Part(None);
    };
    let words: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let [method, target, version] = words[..] else {
        return Parsed::Bad("the request line");
    };
    let minor = match version {
        b"HTTP/1.1" => 1,
        b"HTTP/1.0" => 0,
        _ => return Parsed::Bad("the version"),
    };
    if !is_token(method)
        || target.is_empty()
        || target.iter().any(|byte| *byte <= b' ' || *byte == 127)
    {
        return Parsed::Bad("the method or target");
    }
    let mut message = Message {
        method: method.to_vec(),
        target: target.to_vec(),
        minor,
        ..Message::default()
    };
    let at = match headers(bytes, next, manner, &mut message) {
        Ok(Some(at)) => at,
        Ok(None) => return Parsed::Part(None),
        Err(why) => return Parsed::Bad(why),
    };
    let codings: Vec<&[u8]> = message.values("transfer-encoding").collect();
    let lengths: Vec<&[u8]> = message.values("content-length").collect();
    let framing = match (&codings[..], &lengths[..]) {
        ([], []) => Framing::Length(0),
        ([], [first, rest @ ..]) => {
            if manner == Manner::Strict && !rest.is_empty()
                || rest.iter().any(|other| other != first)
            {
                return Parsed::Bad("two lengths");
            }
            match decimal(first) {
                Some(length) => Framing::Length(length),
                None => return Parsed::Bad("the length"),
            }
        }
        ([coding], lengths) => {
            let known = coding.eq_ignore_ascii_case(b"chunked");
            if !known || minor == 0 || manner == Manner::Strict && !lengths.is_empty() {
                return Parsed::Bad("the transfer coding");
            }
            message.last = !lengths.is_empty();
            Framing::Chunked
        }
        _ => return Parsed::Bad("two transfer codings"),
    };
    if manner == Manner::Strict && message.values("host").count() != 1 {
        return Parsed::Bad("not one host");
    }
    finish(bytes, at, framing, manner, message)
}

/// An answer to a request of that method. `over`: nothing more comes.
pub fn response(bytes: &[u8], method: &[u8], over: bool) -> Parsed {
    let Some((line, next)) = line(bytes, 0, Manner::Strict) else {
        return Parsed::Part(None);
    };
    let (Some(version), Some(status)) = (line.get(..9), line.get(9..12)) else {
        return Parsed::Bad("the status line");
    };
    let status = std::str::from_utf8(status)
        .ok()
        .and_then(|text| text.parse().ok());
    let (b"HTTP/1.1 " | b"HTTP/1.0 ", Some(status @ 100..=999), Some(b' ') | None) =
        (version, status, line.get(12))
    else {
        return Parsed::Bad("the status line");
    };
    let mut message = Message {
        status,
        minor: version[7] - b'0',
        ..Message::default()
    };
    let at = match headers(bytes, next, Manner::Strict, &mut message) {
        Ok(Some(at)) => at,
        Ok(None) => return Parsed::Part(None),
        Err(why) => return Parsed::Bad(why),
    };
    let codings: Vec<&[u8]> = message.values("transfer-encoding").collect();
    let lengths: Vec<&[u8]> = message.values("content-length").collect();
    let framing = match (&codings[..], &lengths[..]) {
        _ if status < 200 || matches!(status, 204 | 304) || method == b"HEAD" => Framing::Length(0),
        ([], [length]) => match decimal(length) {
            Some(length) => Framing::Length(length),
            None => return Parsed::Bad("the length"),
        },
        ([coding], []) if *coding == b"chunked" => Framing::Chunked,
        ([], []) => {
            message.body = bytes[at..].to_vec();
            message.whole = over;
            return if over {
                Parsed::Whole(message, bytes.len())
            } else {
                Parsed::Part(Some(message))
            };
        }
        _ => return Parsed::Bad("the framing of an answer"),
    };
    finish(bytes, at, framing, Manner::Strict, message)
}

enum Framing {
    Length(usize),
    Chunked,
}

fn finish(
    bytes: &[u8],
    at: usize,
    framing: Framing,
    manner: Manner,
    mut message: Message,
) -> Parsed {
    let end = match framing {
        Framing::Length(length) => {
            let rest = &bytes[at..];
            message.body = rest[..length.min(rest.len())].to_vec();
            (rest.len() >= length).then(|| at + length)
        }
        Framing::Chunked => match chunks(bytes, at, manner, &mut message.body) {
            Ok(end) => end,
            // The head stands, and what came until then.
            Err(why) if manner == Manner::Strict => return Parsed::Bad(why),
            Err(_) => None,
        },
    };
    message.whole = end.is_some();
    match end {
        Some(end) => Parsed::Whole(message, end),
        None => Parsed::Part(Some(message)),
    }
}

fn chunks(
    bytes: &[u8],
    mut at: usize,
    manner: Manner,
    body: &mut Vec<u8>,
) -> Result<Option<usize>, &'static str> {
    loop {
        let Some((line, next)) = line(bytes, at, Manner::Strict) else {
            return Ok(None);
        };
        let digits = line
            .iter()
            .take_while(|byte| byte.is_ascii_hexdigit())
            .count();
        let (size, rest) = line.split_at(digits);
        let rest = rest.trim_ascii_start();
        let plain = rest.is_empty() && line.len() == digits;
        if manner == Manner::Strict && !plain || !(rest.is_empty() || rest.starts_with(b";")) {
            return Err("a chunk's size");
        }
        let size = std::str::from_utf8(size)
            .ok()
            .and_then(|size| usize::from_str_radix(size, 16).ok());
        let size = size.ok_or("a chunk's size")?;
        at = next;
        if size == 0 {
            break;
        }
        let rest = &bytes[at..];
        body.extend_from_slice(&rest[..size.min(rest.len())]);
        match rest.get(size..) {
            Some([b'\r', b'\n', ..]) => at += size + 2,
            None | Some([] | [b'\r']) => return Ok(None),
            Some(_) => return Err("a chunk's end"),
        }
    }
    // Trailers.
    loop {
        let Some((line, next)) = line(bytes, at, Manner::Strict) else {
            return Ok(None);
        };
        at = next;
        if line.is_empty() {
            return Ok(Some(at));
        }
        if manner == Manner::Strict {
            header(line)?;
        }
    }
}

/// The line that begins there, and where the next one does.
fn line(bytes: &[u8], at: usize, manner: Manner) -> Option<(&[u8], usize)> {
    let rest = &bytes[at..];
    let end = rest.iter().position(|byte| *byte == b'\n')?;
    let line = &rest[..end];
    let line = match line.strip_suffix(b"\r") {
        Some(line) => line,
        None if manner == Manner::Lenient => line,
        // A byte that no line may hold.
        None => &rest[..=end],
    };
    Some((line, at + end + 1))
}

fn headers(
    bytes: &[u8],
    mut at: usize,
    manner: Manner,
    message: &mut Message,
) -> Result<Option<usize>, &'static str> {
    loop {
        let Some((line, next)) = line(bytes, at, manner) else {
            return Ok(None);
        };
        at = next;
        if line.is_empty() {
            return Ok(Some(at));
        }
        message.headers.push(header(line)?);
    }
}

fn header(line: &[u8]) -> Result<(String, Vec<u8>), &'static str> {
    let colon = line
        .iter()
        .position(|byte| *byte == b':')
        .ok_or("a header without a colon")?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    if !is_token(name) {
        return Err("a header's name");
    }
    if value
        .iter()
        .any(|byte| *byte < b' ' && *byte != b'\t' || *byte == 127)
    {
        return Err("a header's value");
    }
    let name = String::from_utf8_lossy(name).to_ascii_lowercase();
    Ok((name, trim(value).to_vec()))
}

/// Without blanks and tabs around it.
pub fn trim(mut value: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = value {
        value = rest;
    }
    value
}

fn is_token(bytes: &[u8]) -> bool {
    !bytes.is_empty()
        && bytes
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte))
}

fn decimal(text: &[u8]) -> Option<usize> {
    let text = Some(text).filter(|text| !text.is_empty() && text.iter().all(u8::is_ascii_digit))?;
    std::str::from_utf8(text).ok()?.parse().ok()
}
