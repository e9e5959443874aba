//! Which headers pass: the client's key comes out, the account's credential goes
//! in, hop-by-hop headers stay behind (RFC 9110 section 7.6.1), all else passes
//! as it is. Pure.

use crate::answers::CODE_HEADER;
use hyper::header::{
    AUTHORIZATION, CONNECTION, CONTENT_LENGTH, COOKIE, HOST, HeaderMap, HeaderName, HeaderValue,
    PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING,
};
use hyper::http::header::GetAll;

pub const API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Which of the names that matter here a message's headers have, by one walk over
/// them: looking a name up costs as much as walking over several.
#[derive(Clone, Copy, Debug)]
pub struct Overview {
    /// What the headers take on the wire, near enough for a limit, in bytes.
    pub size: usize,
    seen: Names,
    /// Those seen more than once.
    repeated: Names,
}

/// A set of names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Names(u16);

impl Names {
    const NONE: Self = Self(0);
    const API_KEY: Self = Self(1);
    const AUTHORIZATION: Self = Self(1 << 1);
    const CODE: Self = Self(1 << 2);
    const CONNECTION: Self = Self(1 << 3);
    const COOKIE: Self = Self(1 << 4);
    pub const EXPECT: Self = Self(1 << 5);
    const HOST: Self = Self(1 << 6);
    const LENGTH: Self = Self(1 << 7);
    const PROXY_AUTHORIZATION: Self = Self(1 << 8);
    pub const TRANSFER_ENCODING: Self = Self(1 << 9);
    /// Any other hop-by-hop name.
    pub const OTHER_HOP_BY_HOP: Self = Self(1 << 10);
    const BESIDE_CONNECTION: Self = Self(Self::TRANSFER_ENCODING.0 | Self::OTHER_HOP_BY_HOP.0);
    const HOP_BY_HOP: Self = Self(Self::CONNECTION.0 | Self::BESIDE_CONNECTION.0);

    const fn meets(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    fn of(name: &HeaderName) -> Self {
        match name.as_str() {
            "x-api-key" => Self::API_KEY,
            "authorization" => Self::AUTHORIZATION,
            "x-mpool-error" => Self::CODE,
            "connection" => Self::CONNECTION,
            "cookie" => Self::COOKIE,
            "expect" => Self::EXPECT,
            "host" => Self::HOST,
            "content-length" => Self::LENGTH,
            "proxy-authorization" => Self::PROXY_AUTHORIZATION,
            "transfer-encoding" => Self::TRANSFER_ENCODING,
            "proxy-connection" | "keep-alive" | "te" | "upgrade" => Self::OTHER_HOP_BY_HOP,
            _ => Self::NONE,
        }
    }
}

impl Overview {
    pub fn of(headers: &HeaderMap) -> Self {
        let mut size = 0;
        let (mut seen, mut repeated) = (0, 0);
        for (name, value) in headers {
            size += name.as_str().len() + value.len() + 4;
            let names = Names::of(name).0;
            repeated |= seen & names;
            seen |= names;
        }
        Self {
            size,
            seen: Names(seen),
            repeated: Names(repeated),
        }
    }

    /// Whether there is any of these.
    pub const fn has(&self, names: Names) -> bool {
        self.seen.meets(names)
    }

    const fn repeats(&self, names: Names) -> bool {
        self.repeated.meets(names)
    }
}

/// What the client sent to say who it is.
#[derive(Debug, PartialEq, Eq)]
pub enum GivenKey<'a> {
    One(&'a [u8]),
    None,
    /// `x-api-key` and `Authorization` say different things.
    Two,
}

/// The client's key, out of `x-api-key` or `Authorization: Bearer`.
pub fn client_key<'a>(headers: &'a HeaderMap, overview: &Overview) -> GivenKey<'a> {
    let all = |name, of| overview.has(of).then(|| headers.get_all(name));
    let api_keys = all(API_KEY, Names::API_KEY)
        .into_iter()
        .flatten()
        .map(|value| value.as_bytes().trim_ascii());
    let bearers = all(AUTHORIZATION, Names::AUTHORIZATION)
        .into_iter()
        .flatten()
        .filter_map(bearer);
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
pub fn strip_hop_by_hop(headers: &mut HeaderMap, overview: &Overview) -> bool {
    if !overview.has(Names::HOP_BY_HOP) {
        return false;
    }
    // What most servers say of most answers.
    if !overview.has(Names::BESIDE_CONNECTION) && is_keep_alive(headers) {
        headers.remove(CONNECTION);
        return false;
    }
    let takes_trailers = lists(headers.get_all(TE), b"trailers");
    let named = headers
        .get_all(CONNECTION)
        .iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
        .filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok());
    let known = headers
        .keys()
        .filter(|name| Names::of(name).meets(Names::HOP_BY_HOP));
    let names: Vec<HeaderName> = named.chain(known.cloned()).collect();
    if overview.has(Names::TRANSFER_ENCODING) {
        // RFC 9112 section 6.3: it overrides a length, which must not go on.
        headers.remove(CONTENT_LENGTH);
    }
    for name in &names {
        headers.remove(name);
    }
    takes_trailers
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
pub fn prepare(headers: &mut HeaderMap, overview: &Overview) -> bool {
    let takes_trailers = strip_hop_by_hop(headers, overview);
    for (name, of) in [
        (API_KEY, Names::API_KEY),
        (AUTHORIZATION, Names::AUTHORIZATION),
        (PROXY_AUTHORIZATION, Names::PROXY_AUTHORIZATION),
    ] {
        if overview.has(of) {
            headers.remove(name);
        }
    }
    takes_trailers
}

/// What HTTP/1 needs besides. HTTP/2 may repeat a length.
pub fn for_http1(
    headers: &mut HeaderMap,
    overview: &Overview,
    host: &HeaderValue,
    takes_trailers: bool,
) {
    headers.insert(HOST, host.clone());
    if overview.repeats(Names::LENGTH)
        && let Some(length) = headers.get(CONTENT_LENGTH).cloned()
    {
        headers.insert(CONTENT_LENGTH, length);
    }
    if takes_trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
        headers.insert(CONNECTION, HeaderValue::from_static("TE"));
    }
    if overview.repeats(Names::COOKIE) {
        join_cookies(headers);
    }
}

/// What HTTP/2 needs besides; the host is in `:authority`.
pub fn for_http2(headers: &mut HeaderMap, overview: &Overview, takes_trailers: bool) {
    if overview.has(Names::HOST) {
        headers.remove(HOST);
    }
    if takes_trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
}

/// Makes an upstream's headers into those for the client. Answers whether the
/// framing was plain: see [`framing_is_plain`].
pub fn prepare_answer(headers: &mut HeaderMap) -> bool {
    let overview = Overview::of(headers);
    let plain = framing_is_plain(headers, &overview);
    strip_hop_by_hop(headers, &overview);
    // It says that an answer is the forwarder's own.
    if overview.has(Names::CODE) {
        headers.remove(CODE_HEADER);
    }
    plain
}

/// What may not come as a trailer: a receiver might take it for a header.
pub fn strip_trailers(trailers: &mut HeaderMap) {
    let overview = Overview::of(trailers);
    strip_hop_by_hop(trailers, &overview);
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
pub fn framing_is_plain(headers: &HeaderMap, overview: &Overview) -> bool {
    if !overview.has(Names::TRANSFER_ENCODING) && !overview.repeats(Names::LENGTH) {
        return true;
    }
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

#[cfg(test)]
pub mod tests {
    use super::*;
    use hyper::header::EXPECT;

    const HOP_BY_HOP: [&str; 6] = [
        "connection",
        "proxy-connection",
        "keep-alive",
        "te",
        "transfer-encoding",
        "upgrade",
    ];

    pub fn map(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(
                HeaderName::from_static(name),
                HeaderValue::from_static(value),
            );
        }
        headers
    }

    fn prepared(mut headers: HeaderMap) -> (HeaderMap, Overview, bool) {
        let overview = Overview::of(&headers);
        let takes_trailers = prepare(&mut headers, &overview);
        (headers, overview, takes_trailers)
    }

    fn strip(headers: &mut HeaderMap) -> bool {
        let overview = Overview::of(headers);
        strip_hop_by_hop(headers, &overview)
    }

    #[test]
    fn an_overview_knows_every_name_that_is_looked_for() {
        let named = [
            (API_KEY, Names::API_KEY),
            (AUTHORIZATION, Names::AUTHORIZATION),
            (CODE_HEADER, Names::CODE),
            (CONNECTION, Names::CONNECTION),
            (COOKIE, Names::COOKIE),
            (EXPECT, Names::EXPECT),
            (HOST, Names::HOST),
            (CONTENT_LENGTH, Names::LENGTH),
            (PROXY_AUTHORIZATION, Names::PROXY_AUTHORIZATION),
            (TRANSFER_ENCODING, Names::TRANSFER_ENCODING),
            (HeaderName::from_static("x-other"), Names::NONE),
        ];
        for (name, names) in &named {
            assert_eq!(Names::of(name), *names, "{name}");
        }
        for name in HOP_BY_HOP {
            let names = Names::of(&HeaderName::from_static(name));
            assert_ne!(names.0 & Names::HOP_BY_HOP.0, 0, "{name}");
        }
        let headers = map(&[("cookie", "a"), ("host", "h"), ("cookie", "b")]);
        let overview = Overview::of(&headers);
        assert!(overview.has(Names::COOKIE) && overview.repeats(Names::COOKIE));
        assert!(overview.has(Names::HOST) && !overview.repeats(Names::HOST));
        assert!(!overview.has(Names::EXPECT));
        assert_eq!(overview.size, 2 * (6 + 1 + 4) + 4 + 1 + 4);
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
            let headers = map(fields);
            let given = client_key(&headers, &Overview::of(&headers));
            assert_eq!(given, expected, "{fields:?}");
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
        assert!(!strip(&mut headers));
        assert_eq!(
            headers,
            map(&[("x-three", "3"), ("x-three", "again"), ("trailer", "x-sum")])
        );
    }

    #[test]
    fn whatever_is_hop_by_hop_is_seen_alone_too() {
        for name in HOP_BY_HOP {
            let name = &HeaderName::from_static(name);
            for value in ["keep-alive", "Keep-Alive", "close", "x-one, keep-alive"] {
                let mut headers = map(&[("x-one", "1"), ("x-two", "2")]);
                headers.insert(name, HeaderValue::from_static(value));
                strip(&mut headers);
                let named = *name == CONNECTION && value.contains("x-one");
                assert_eq!(headers.contains_key("x-one"), !named, "{name}: {value}");
                assert_eq!(headers.len(), 2 - usize::from(named), "{name}: {value}");
            }
        }
    }

    #[test]
    fn cookies_that_stay_behind_leave_none() {
        let (mut headers, overview, takes_trailers) = prepared(map(&[
            ("connection", "cookie"),
            ("cookie", "a=1"),
            ("cookie", "b=2"),
        ]));
        let host = HeaderValue::from_static("h");
        for_http1(&mut headers, &overview, &host, takes_trailers);
        assert_eq!(headers, map(&[("host", "h")]));
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
            let headers = map(&fields);
            let found = framing_is_plain(&headers, &Overview::of(&headers));
            assert_eq!(found, plain, "{codings:?}");
        }
    }

    #[test]
    fn nothing_of_the_clients_credentials_is_left() {
        let (mut headers, overview, takes_trailers) = prepared(map(&[
            ("x-api-key", "k"),
            ("authorization", "Bearer k"),
            ("proxy-authorization", "Basic k"),
            ("host", "here"),
            ("te", "trailers, deflate;q=0.5"),
            ("cookie", "a=1"),
            ("cookie", "b=2"),
        ]));
        assert!(takes_trailers);
        let left = [("host", "here"), ("cookie", "a=1"), ("cookie", "b=2")];
        assert_eq!(headers, map(&left));
        let mut over_http2 = headers.clone();
        for_http2(&mut over_http2, &overview, true);
        let expected = [("te", "trailers"), ("cookie", "a=1"), ("cookie", "b=2")];
        assert_eq!(over_http2, map(&expected));
        for_http1(
            &mut headers,
            &overview,
            &HeaderValue::from_static("h"),
            true,
        );
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
        let (mut headers, _, takes_trailers) = prepared(map(&[
            (
                "connection",
                "authorization, x-api-key, host, content-length",
            ),
            ("content-length", "5"),
        ]));
        assert!(!takes_trailers);
        put_credential(
            &mut headers,
            Scheme::Bearer,
            HeaderValue::from_static("Bearer t"),
        );
        assert_eq!(headers, map(&[("authorization", "Bearer t")]));
    }
}
