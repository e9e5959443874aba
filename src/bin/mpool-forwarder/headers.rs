//! Which headers pass: the client's key comes out, the account's credential goes
//! in, hop-by-hop headers stay behind (RFC 9110 section 7.6.1), all else passes
//! as it is. Pure.

use hyper::header::{
    AUTHORIZATION, CONNECTION, CONTENT_LENGTH, COOKIE, HOST, HeaderMap, HeaderName, HeaderValue,
    PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING,
};
use hyper::http::header::GetAll;

pub const API_KEY: HeaderName = HeaderName::from_static("x-api-key");
/// As texts: most names are of other lengths, which is soon seen.
const HOP_BY_HOP: [&str; 6] = [
    "connection",
    "proxy-connection",
    "keep-alive",
    "te",
    "transfer-encoding",
    "upgrade",
];

/// What the client sent to say who it is.
#[derive(Debug, PartialEq, Eq)]
pub enum GivenKey<'a> {
    One(&'a [u8]),
    None,
    /// `x-api-key` and `Authorization` say different things.
    Two,
}

/// The client's key, out of `x-api-key` or `Authorization: Bearer`.
pub fn client_key(headers: &HeaderMap) -> GivenKey<'_> {
    let api_keys = headers
        .get_all(API_KEY)
        .iter()
        .map(|value| value.as_bytes().trim_ascii());
    let bearers = headers.get_all(AUTHORIZATION).iter().filter_map(bearer);
    let mut given = api_keys.chain(bearers).filter(|key| !key.is_empty());
    let Some(first) = given.next() else {
        return GivenKey::None;
    };
    if given.all(|other| other == first) {
        GivenKey::One(first)
    } else {
        GivenKey::Two
    }
}

/// The token of `Bearer token`; the scheme's case doesn't matter (RFC 9110 section 11.1).
fn bearer(value: &HeaderValue) -> Option<&[u8]> {
    let (scheme, token) = value.as_bytes().trim_ascii().split_at_checked(6)?;
    let separated = token.first().is_some_and(u8::is_ascii_whitespace);
    (separated && scheme.eq_ignore_ascii_case(b"bearer")).then(|| token.trim_ascii())
}

/// Removes what is meant for this connection alone, in either direction.
/// Answers whether the sender takes trailers (`TE: trailers`).
pub fn strip_hop_by_hop(headers: &mut HeaderMap) -> bool {
    let mut found = headers.keys().filter(|name| is_hop_by_hop(name));
    match (found.next(), found.next()) {
        (None, _) => return false,
        // What most servers say of most answers.
        (Some(name), None) if *name == CONNECTION && is_keep_alive(headers) => {
            headers.remove(CONNECTION);
            return false;
        }
        _ => {}
    }
    let takes_trailers = lists(headers.get_all(TE), b"trailers");
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
        .filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok())
        .collect();
    if headers.contains_key(TRANSFER_ENCODING) {
        // RFC 9112 section 6.3: it overrides a length, which must not go on.
        headers.remove(CONTENT_LENGTH);
    }
    for name in &named {
        headers.remove(name);
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
    takes_trailers
}

fn is_hop_by_hop(name: &HeaderName) -> bool {
    HOP_BY_HOP.contains(&name.as_str())
}

fn is_keep_alive(headers: &HeaderMap) -> bool {
    let values = headers.get_all(CONNECTION);
    let is_it = |value: &HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"keep-alive");
    values.iter().all(is_it)
}

fn lists(values: GetAll<'_, HeaderValue>, word: &[u8]) -> bool {
    values
        .iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
        .any(|item| {
            let name = item.split(|byte| *byte == b';').next().unwrap_or_default();
            name.trim_ascii().eq_ignore_ascii_case(word)
        })
}

/// Makes a client's headers into those for the upstream: everything but the
/// credential, which [`put_credential`] adds, and `Host`. Answers whether the
/// client takes trailers, which [`for_http1`] and [`for_http2`] pass on.
pub fn prepare(headers: &mut HeaderMap) -> bool {
    let takes_trailers = strip_hop_by_hop(headers);
    for name in [API_KEY, AUTHORIZATION, PROXY_AUTHORIZATION, HOST] {
        headers.remove(name);
    }
    takes_trailers
}

/// What HTTP/1 needs besides. HTTP/2 may repeat a length.
pub fn for_http1(headers: &mut HeaderMap, host: &HeaderValue, takes_trailers: bool) {
    headers.insert(HOST, host.clone());
    if let Some(length) = headers.get(CONTENT_LENGTH).cloned() {
        headers.insert(CONTENT_LENGTH, length);
    }
    if takes_trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
        headers.insert(CONNECTION, HeaderValue::from_static("TE"));
    }
    join_cookies(headers);
}

/// What HTTP/2 needs besides; the host is in `:authority`.
pub fn for_http2(headers: &mut HeaderMap, takes_trailers: bool) {
    if takes_trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
}

/// What may not come as a trailer: a receiver might take it for a header.
pub fn strip_trailers(trailers: &mut HeaderMap) {
    strip_hop_by_hop(trailers);
    for name in [
        API_KEY,
        AUTHORIZATION,
        PROXY_AUTHORIZATION,
        HOST,
        CONTENT_LENGTH,
        COOKIE,
    ] {
        trailers.remove(name);
    }
}

/// Whether a message's framing is one that everybody reads the same way: no
/// transfer coding, or `chunked` alone, and one length.
pub fn framing_is_plain(headers: &HeaderMap) -> bool {
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    let first = codings
        .next()
        .is_none_or(|coding| coding.as_bytes().eq_ignore_ascii_case(b"chunked"));
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
    let length = lengths.next();
    first && codings.next().is_none() && lengths.all(|other| Some(other) == length)
}

/// HTTP/2 may split a cookie header, HTTP/1 may not (RFC 9113 section 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    if headers.get_all(COOKIE).iter().nth(1).is_none() {
        return;
    }
    let joined = headers
        .get_all(COOKIE)
        .iter()
        .map(HeaderValue::as_bytes)
        .collect::<Vec<_>>()
        .join(&b"; "[..]);
    if let Ok(joined) = HeaderValue::from_bytes(&joined) {
        headers.insert(COOKIE, joined);
    }
}

/// How an account's token is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    Bearer,
    ApiKey,
}

/// Puts the account's credential in.
pub fn put_credential(headers: &mut HeaderMap, scheme: Scheme, value: HeaderValue) {
    match scheme {
        Scheme::Bearer => headers.insert(AUTHORIZATION, value),
        Scheme::ApiKey => headers.insert(API_KEY, value),
    };
}

/// What a head takes on the wire, near enough for a limit, in bytes.
pub fn size(target: usize, headers: &HeaderMap) -> usize {
    let fields = headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len() + 4);
    target + 16 + fields.sum::<usize>()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(
                HeaderName::from_static(name),
                HeaderValue::from_static(value),
            );
        }
        headers
    }

    #[test]
    fn a_key_is_read_from_either_header() {
        let cases: [(&[(&str, &str)], GivenKey<'_>); 13] = [
            (&[("x-api-key", "k")], GivenKey::One(b"k")),
            (&[("authorization", "Bearer k")], GivenKey::One(b"k")),
            (&[("authorization", "bEARER   k ")], GivenKey::One(b"k")),
            (
                &[("x-api-key", "k"), ("authorization", "Bearer k")],
                GivenKey::One(b"k"),
            ),
            (
                &[("x-api-key", "k"), ("x-api-key", "k")],
                GivenKey::One(b"k"),
            ),
            (
                &[("x-api-key", ""), ("authorization", "Bearer k")],
                GivenKey::One(b"k"),
            ),
            (
                &[("x-api-key", "k"), ("authorization", "Basic abc")],
                GivenKey::One(b"k"),
            ),
            (
                &[("x-api-key", "k"), ("authorization", "Bearer other")],
                GivenKey::Two,
            ),
            (&[("x-api-key", "k"), ("x-api-key", "other")], GivenKey::Two),
            (&[], GivenKey::None),
            (&[("authorization", "Basic abc")], GivenKey::None),
            (&[("authorization", "Bearerk")], GivenKey::None),
            (&[("authorization", "Bearer ")], GivenKey::None),
        ];
        for (fields, expected) in cases {
            assert_eq!(client_key(&map(fields)), expected, "{fields:?}");
        }
    }

    #[test]
    fn hop_by_hop_headers_stay_behind_and_others_pass_in_order() {
        let mut headers = map(&[
            ("connection", "close, X-One ,te"),
            ("connection", "x-two"),
            ("x-one", "1"),
            ("x-two", "2"),
            ("x-three", "3"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("te", "gzip;q=0.5"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "websocket"),
            ("trailer", "x-sum"),
            ("x-three", "again"),
        ]);
        assert!(!strip_hop_by_hop(&mut headers));
        assert_eq!(
            headers,
            map(&[("x-three", "3"), ("x-three", "again"), ("trailer", "x-sum")])
        );
    }

    #[test]
    fn whatever_is_hop_by_hop_is_seen_alone_too() {
        for name in HOP_BY_HOP {
            let name = &HeaderName::from_static(name);
            assert!(is_hop_by_hop(name), "{name}");
            for value in ["keep-alive", "Keep-Alive", "close", "x-one, keep-alive"] {
                let mut headers = map(&[("x-one", "1"), ("x-two", "2")]);
                headers.insert(name, HeaderValue::from_static(value));
                strip_hop_by_hop(&mut headers);
                let named = *name == CONNECTION && value.contains("x-one");
                assert_eq!(headers.contains_key("x-one"), !named, "{name}: {value}");
                assert_eq!(headers.len(), 2 - usize::from(named), "{name}: {value}");
            }
        }
    }

    #[test]
    fn only_plain_framings_pass() {
        for (codings, plain) in [
            (&[][..], true),
            (&["chunked"][..], true),
            (&["Chunked"][..], true),
            (&["gzip, chunked"][..], false),
            (&["chunked, chunked"][..], false),
            (&["identity", "chunked"][..], false),
            (&["xchunked"][..], false),
        ] {
            let fields: Vec<_> = codings
                .iter()
                .map(|coding| ("transfer-encoding", *coding))
                .collect();
            assert_eq!(framing_is_plain(&map(&fields)), plain, "{codings:?}");
        }
    }

    #[test]
    fn nothing_of_the_clients_credentials_is_left() {
        let mut headers = map(&[
            ("x-api-key", "k"),
            ("authorization", "Bearer k"),
            ("proxy-authorization", "Basic k"),
            ("host", "here"),
            ("te", "trailers, deflate;q=0.5"),
            ("cookie", "a=1"),
            ("cookie", "b=2"),
        ]);
        assert!(prepare(&mut headers));
        assert_eq!(headers, map(&[("cookie", "a=1"), ("cookie", "b=2")]));
        let mut over_http2 = headers.clone();
        for_http2(&mut over_http2, true);
        let expected = [("te", "trailers"), ("cookie", "a=1"), ("cookie", "b=2")];
        assert_eq!(over_http2, map(&expected));
        for_http1(&mut headers, &HeaderValue::from_static("h"), true);
        let expected = [
            ("host", "h"),
            ("te", "trailers"),
            ("connection", "TE"),
            ("cookie", "a=1; b=2"),
        ];
        assert_eq!(headers, map(&expected));
        put_credential(
            &mut headers,
            Scheme::ApiKey,
            HeaderValue::from_static("token"),
        );
        assert_eq!(headers[API_KEY], "token");
    }

    #[test]
    fn a_connection_header_can_not_take_the_new_credential_away() {
        let mut headers = map(&[
            (
                "connection",
                "authorization, x-api-key, host, content-length",
            ),
            ("content-length", "5"),
        ]);
        assert!(!prepare(&mut headers));
        put_credential(
            &mut headers,
            Scheme::Bearer,
            HeaderValue::from_static("Bearer t"),
        );
        assert_eq!(headers, map(&[("authorization", "Bearer t")]));
    }
}
