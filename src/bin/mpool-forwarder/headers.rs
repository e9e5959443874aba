//! Which headers pass: the client's key comes out, the account's credential goes
//! in, hop-by-hop headers stay behind (RFC 9110 section 7.6.1), all else passes
//! as it is. It touches nothing else.

use crate::answers::CODE_HEADER;
use futures_util::FutureExt;
use hyper::body::Incoming;
use hyper::header::{
    AUTHORIZATION, CONNECTION, CONTENT_LENGTH, COOKIE, HOST, HeaderMap, HeaderName, HeaderValue,
    PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING,
};
use hyper::http::Extensions;
use hyper::http::header::GetAll;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use std::future::pending;
use std::sync::{Mutex, PoisonError};

pub const API_KEY: HeaderName = HeaderName::from_static("x-api-key");
const HOP_BY_HOP: [&str; 6] = [
    "connection",
    "proxy-connection",
    "keep-alive",
    "te",
    "transfer-encoding",
    "upgrade",
];

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
    const HOP_BY_HOP: Self =
        Self(Self::CONNECTION.0 | Self::TRANSFER_ENCODING.0 | Self::OTHER_HOP_BY_HOP.0);

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
        self.seen.0 & names.0 != 0
    }

    const fn repeats(&self, names: Names) -> bool {
        self.repeated.0 & names.0 != 0
    }
}

/// A request's headers, for one try after another.
pub struct Tries {
    /// The client's own, for the first one: to change them costs less than to copy them.
    first: Option<(HeaderMap, Extensions)>,
    /// What any other is made of.
    fields: Vec<(HeaderName, HeaderValue)>,
    case: Case,
}

/// Where the case of the names is known from.
enum Case {
    /// From the head as it came. Nothing else is taken from there: where requests come
    /// together, it may be of another one.
    Head(Vec<u8>),
    /// It is in here.
    Known(Extensions),
}

impl Tries {
    /// With the head as it came, where that is known.
    pub fn new(headers: HeaderMap, extensions: Extensions, head: Option<Vec<u8>>) -> Self {
        Self {
            case: head.map_or_else(|| Case::Known(extensions.clone()), Case::Head),
            first: Some((headers, extensions)),
            fields: Vec::new(),
        }
    }

    /// The headers for the next try, the same each time.
    pub fn next(&mut self) -> (HeaderMap, Extensions) {
        if let Some((headers, extensions)) = self.first.take() {
            let fields = headers.iter();
            self.fields = fields
                .map(|(name, value)| (name.clone(), value.clone()))
                .collect();
            return (headers, extensions);
        }
        let mut headers = HeaderMap::with_capacity(self.fields.len());
        for (name, value) in &self.fields {
            headers.append(name.clone(), value.clone());
        }
        let extensions = match &self.case {
            Case::Head(head) => read_case(head),
            Case::Known(extensions) => extensions.clone(),
        };
        (headers, extensions)
    }
}

/// The case of a head's names, in the form that the library has for it. As that can't
/// be made by others, the library has to read the head once more.
fn read_case(head: &[u8]) -> Extensions {
    let found = Mutex::default();
    let service = service_fn(|request: Request<Incoming>| {
        *found.lock().unwrap_or_else(PoisonError::into_inner) = request.into_parts().0.extensions;
        pending::<Result<Response<String>, Infallible>>()
    });
    let io = TokioIo::new(tokio::io::join(head, tokio::io::sink()));
    let mut http = http1::Builder::new();
    let reading = http
        .preserve_header_case(true)
        .serve_connection(io, service);
    // It never comes to an end, but the head is there at once.
    let _ = reading.now_or_never();
    let mut extensions = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    extensions.remove::<OnUpgrade>();
    extensions
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
    let others = Names(Names::HOP_BY_HOP.0 & !Names::CONNECTION.0);
    // What most servers say of most answers.
    if !overview.has(others) && is_keep_alive(headers) {
        headers.remove(CONNECTION);
        return false;
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
mod tests {
    use super::*;
    use hyper::header::EXPECT;

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
    fn each_try_has_the_same_headers() {
        let headers = map(&[("x-one", "1"), ("cookie", "a"), ("x-one", "2"), ("te", "x")]);
        let mut extensions = Extensions::new();
        extensions.insert("the case of names");
        let mut tries = Tries::new(headers.clone(), extensions, None);
        for _ in 0..3 {
            let (next, extensions) = tries.next();
            assert_eq!(next, headers);
            assert!(next.iter().eq(headers.iter()), "the order");
            assert_eq!(extensions.get(), Some(&"the case of names"));
        }
    }

    #[test]
    fn a_head_says_nothing_but_the_case_of_names() {
        let headers = map(&[("host", "h"), ("x-one", "1"), ("content-length", "0")]);
        let other = "POST / HTTP/1.1\r\nHost: x\r\nX-ONE: 2\r\nContent-Length: 9\r\n\r\nbody";
        let cut = "-One: 2\r\nContent-Length: 9\r\n\r\n";
        for (head, is_read) in [(other, true), (cut, false)] {
            let mut tries = Tries::new(headers.clone(), Extensions::new(), Some(head.into()));
            for number in 0..3 {
                let (next, extensions) = tries.next();
                assert_eq!(next, headers);
                assert_eq!(extensions.is_empty(), number == 0 || !is_read, "{number}");
            }
        }
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
