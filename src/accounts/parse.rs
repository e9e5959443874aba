//! What an account file says: its credential, or why it can't be used.
//!
//! Pure: bytes in, a credential or a fixed reason out. A reason never repeats
//! any of the file's bytes.

use secrecy::{ExposeSecret, SecretString};
use serde_json::{Map, Value};

/// The longest token, in bytes: it has to fit into an HTTP header.
pub(crate) const TOKEN_MAX: usize = 16 * 1024;
/// The smallest `expires_at`, in unix ms (March 1973); what is below it was
/// most likely written in seconds.
const EXPIRES_MIN: i64 = 100_000_000_000;
/// The largest `expires_at`, in unix ms: the end of the year 9999.
const EXPIRES_MAX: i64 = 253_402_300_799_999;

const ACCESS_TOKEN: [&str; 2] = ["access_token", "accessToken"];
const API_KEY: [&str; 2] = ["api_key", "apiKey"];
const EXPIRES_AT: [&str; 2] = ["expires_at", "expiresAt"];

/// Why a file holds no usable credential, and what would be accepted.
pub(crate) mod reason {
    /// Nothing but blanks.
    pub(crate) const EMPTY: &str = "the file is empty; \
        it must hold a JSON object with access_token or api_key";
    /// No JSON, or not an object.
    pub(crate) const NOT_AN_OBJECT: &str = "not a JSON object; \
        it must hold a JSON object with access_token or api_key";
    /// No credential field, neither at the top nor one object down.
    pub(crate) const NO_CREDENTIAL: &str = "no credential; \
        access_token or api_key must be there, at the top or inside one object";
    /// Credential fields in several objects.
    pub(crate) const AMBIGUOUS: &str = "credentials in more than one object; \
        exactly one object with access_token or api_key is accepted";
    /// An access token and an API key.
    pub(crate) const NOT_BOTH: &str = "access_token and api_key; \
        one of them is accepted, not both";
    /// Two spellings of a field with different values.
    pub(crate) const DISAGREE: &str = "two spellings of a field disagree; \
        write access_token, api_key and expires_at once";
    /// A token that fits into no HTTP header.
    pub(crate) const BAD_TOKEN: &str = "access_token or api_key is not a token; \
        a string of 1 to 16384 visible ASCII characters is accepted";
    /// `expires_at` is no whole number.
    pub(crate) const BAD_EXPIRY: &str = "expires_at is not a time; \
        a whole number of unix milliseconds is accepted";
    /// `expires_at` looks like seconds.
    pub(crate) const SECONDS: &str = "expires_at is too small, perhaps in seconds; \
        unix milliseconds from 100000000000 on are accepted";
    /// `expires_at` is after the year 9999.
    pub(crate) const TOO_LATE: &str = "expires_at is too large; \
        unix milliseconds up to 253402300799999 are accepted";
}

/// How a token is sent to the upstream API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Auth {
    /// `Authorization: Bearer <token>`
    Bearer,
    /// `x-api-key: <token>`
    XApiKey,
}

impl Auth {
    /// The name that replies use.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Bearer => "bearer",
            Self::XApiKey => "x-api-key",
        }
    }
}

/// An account's credential. Its `Debug` shows no token.
#[derive(Clone, Debug)]
pub(crate) struct Credential {
    /// How the token is sent.
    pub(crate) auth: Auth,
    /// 1 to [`TOKEN_MAX`] visible ASCII characters.
    pub(crate) token: SecretString,
    /// Unix ms from which on the token is of no use, if the file says so.
    pub(crate) expires_at: Option<i64>,
}

impl Credential {
    /// Whether both say the same.
    pub(crate) fn same_as(&self, other: &Self) -> bool {
        self.auth == other.auth
            && self.expires_at == other.expires_at
            && self.token.expose_secret() == other.token.expose_secret()
    }
}

/// The credential in an account file's content.
///
/// # Errors
/// A fixed text that says what is wrong and what would be accepted.
pub(crate) fn parse(bytes: &[u8]) -> Result<Credential, &'static str> {
    let text = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
    if text.trim_ascii().is_empty() {
        return Err(reason::EMPTY);
    }
    let Ok(Value::Object(top)) = serde_json::from_slice(text) else {
        return Err(reason::NOT_AN_OBJECT);
    };
    let mut fields = if has_credential(&top) {
        top
    } else {
        wrapped(top)?
    };

    let access_token = take(&mut fields, ACCESS_TOKEN)?;
    let api_key = take(&mut fields, API_KEY)?;
    let (auth, token) = match (access_token, api_key) {
        (Some(token), None) => (Auth::Bearer, token),
        (None, Some(token)) => (Auth::XApiKey, token),
        (Some(_), Some(_)) => return Err(reason::NOT_BOTH),
        (None, None) => return Err(reason::NO_CREDENTIAL),
    };
    Ok(Credential {
        auth,
        token: as_token(token)?,
        expires_at: take(&mut fields, EXPIRES_AT)?
            .map(|value| as_time(&value))
            .transpose()?,
    })
}

/// Whether one of the credential fields is there and not null.
fn has_credential(fields: &Map<String, Value>) -> bool {
    ACCESS_TOKEN
        .iter()
        .chain(&API_KEY)
        .any(|name| fields.get(*name).is_some_and(|value| !value.is_null()))
}

/// The only object in `top` that has a credential field.
fn wrapped(top: Map<String, Value>) -> Result<Map<String, Value>, &'static str> {
    let mut found = top.into_iter().filter_map(|(_, value)| match value {
        Value::Object(fields) if has_credential(&fields) => Some(fields),
        _ => None,
    });
    match (found.next(), found.next()) {
        (Some(fields), None) => Ok(fields),
        (Some(_), Some(_)) => Err(reason::AMBIGUOUS),
        (None, _) => Err(reason::NO_CREDENTIAL),
    }
}

/// Takes a field out of `fields`, whichever way it is spelt; null is absent.
fn take(
    fields: &mut Map<String, Value>,
    spellings: [&str; 2],
) -> Result<Option<Value>, &'static str> {
    let [one, other] = spellings.map(|name| fields.remove(name).filter(|value| !value.is_null()));
    match (one, other) {
        (Some(one), Some(other)) if one != other => Err(reason::DISAGREE),
        (one, other) => Ok(one.or(other)),
    }
}

fn as_token(value: Value) -> Result<SecretString, &'static str> {
    match value {
        Value::String(text)
            if (1..=TOKEN_MAX).contains(&text.len())
                && text.bytes().all(|byte| byte.is_ascii_graphic()) =>
        {
            Ok(SecretString::from(text))
        }
        _ => Err(reason::BAD_TOKEN),
    }
}

/// Unix ms out of a whole number; `1.7e12` is one too.
fn as_time(value: &Value) -> Result<i64, &'static str> {
    let whole = value.as_i64().or_else(|| {
        let number = value.as_f64().filter(|number| number.fract() == 0.0)?;
        // A cast saturates, so what is out of range stays out of range.
        Some(number as i64)
    });
    match whole {
        None => Err(reason::BAD_EXPIRY),
        Some(ms) if ms < EXPIRES_MIN => Err(reason::SECONDS),
        Some(ms) if ms > EXPIRES_MAX => Err(reason::TOO_LATE),
        Some(ms) => Ok(ms),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn good_contents() {
        let long = format!(r#"{{"api_key":"{}"}}"#, "x".repeat(TOKEN_MAX));
        let table: &[(&str, Auth, &str, Option<i64>)] = &[
            (r#"{"access_token":"t"}"#, Auth::Bearer, "t", None),
            (
                r#"{"access_token":"t-1","expires_at":1755266400000}"#,
                Auth::Bearer,
                "t-1",
                Some(1_755_266_400_000),
            ),
            (
                r#"{"accessToken":"t","expiresAt":1755266400000.0,"refreshToken":"r","scopes":["a"]}"#,
                Auth::Bearer,
                "t",
                Some(1_755_266_400_000),
            ),
            (
                r#"{"access_token":"t","expires_at":1.7e12}"#,
                Auth::Bearer,
                "t",
                Some(1_700_000_000_000),
            ),
            (r#"{"api_key":"k"}"#, Auth::XApiKey, "k", None),
            (
                r#"{"apiKey":"k","expires_at":100000000000}"#,
                Auth::XApiKey,
                "k",
                Some(100_000_000_000),
            ),
            (
                r#"{"apiKey":"k","expiresAt":253402300799999}"#,
                Auth::XApiKey,
                "k",
                Some(253_402_300_799_999),
            ),
            (
                r#"{"claudeAiOauth":{"accessToken":"t","expiresAt":1755266400000},"other":{"x":1},"n":5}"#,
                Auth::Bearer,
                "t",
                Some(1_755_266_400_000),
            ),
            (
                r#"{"access_token":null,"w":{"api_key":"k"},"v":{"api_key":null}}"#,
                Auth::XApiKey,
                "k",
                None,
            ),
            (
                r#"{"access_token":"t","api_key":null,"expires_at":null}"#,
                Auth::Bearer,
                "t",
                None,
            ),
            (
                r#"{"access_token":"t","w":{"api_key":"k"}}"#,
                Auth::Bearer,
                "t",
                None,
            ),
            (
                r#"{"access_token":"t","accessToken":"t"}"#,
                Auth::Bearer,
                "t",
                None,
            ),
            ("\u{feff} {\"api_key\":\"k\"}\n", Auth::XApiKey, "k", None),
            (r#"{"api_key":"!~\u0041"}"#, Auth::XApiKey, "!~A", None),
            (&long, Auth::XApiKey, &"x".repeat(TOKEN_MAX), None),
        ];
        for (content, auth, token, expires_at) in table {
            let found = parse(content.as_bytes()).expect(content);
            let wanted = Credential {
                auth: *auth,
                token: SecretString::from(*token),
                expires_at: *expires_at,
            };
            assert!(found.same_as(&wanted), "{content}");
        }
    }

    #[test]
    fn bad_contents() {
        let long = format!(r#"{{"api_key":"{}"}}"#, "x".repeat(TOKEN_MAX + 1));
        let deep = format!("{}1{}", r#"{"a":"#.repeat(100_000), "}".repeat(100_000));
        let table: &[(&str, &str)] = &[
            ("", reason::EMPTY),
            (" \n\t", reason::EMPTY),
            ("\u{feff}", reason::EMPTY),
            ("{", reason::NOT_AN_OBJECT),
            (r#"{"access_token":"t"#, reason::NOT_AN_OBJECT),
            (r#"{"access_token":"t"} x"#, reason::NOT_AN_OBJECT),
            ("null", reason::NOT_AN_OBJECT),
            (r#""access_token""#, reason::NOT_AN_OBJECT),
            (r#"[{"access_token":"t"}]"#, reason::NOT_AN_OBJECT),
            (&deep, reason::NOT_AN_OBJECT),
            ("{}", reason::NO_CREDENTIAL),
            (r#"{"access_token":null}"#, reason::NO_CREDENTIAL),
            (r#"{"expires_at":1755266400000}"#, reason::NO_CREDENTIAL),
            (r#"{"a":{"b":{"api_key":"k"}}}"#, reason::NO_CREDENTIAL),
            (r#"{"a":[{"api_key":"k"}]}"#, reason::NO_CREDENTIAL),
            (r#"{"Access_Token":"t"}"#, reason::NO_CREDENTIAL),
            (
                r#"{"a":{"api_key":"k"},"b":{"accessToken":"t"}}"#,
                reason::AMBIGUOUS,
            ),
            (r#"{"access_token":"t","api_key":"k"}"#, reason::NOT_BOTH),
            (
                r#"{"w":{"accessToken":"t","apiKey":"k"}}"#,
                reason::NOT_BOTH,
            ),
            (
                r#"{"access_token":"t","accessToken":"u"}"#,
                reason::DISAGREE,
            ),
            (r#"{"api_key":"t","apiKey":"u"}"#, reason::DISAGREE),
            (
                r#"{"api_key":"t","expires_at":1755266400000,"expiresAt":1755266400001}"#,
                reason::DISAGREE,
            ),
            (r#"{"access_token":""}"#, reason::BAD_TOKEN),
            (r#"{"access_token":5}"#, reason::BAD_TOKEN),
            (r#"{"access_token":{"x":"y"}}"#, reason::BAD_TOKEN),
            (r#"{"access_token":"a b"}"#, reason::BAD_TOKEN),
            (r#"{"access_token":"a\n"}"#, reason::BAD_TOKEN),
            (r#"{"access_token":"a\u0000"}"#, reason::BAD_TOKEN),
            (r#"{"access_token":"a\u007f"}"#, reason::BAD_TOKEN),
            (r#"{"access_token":"一"}"#, reason::BAD_TOKEN),
            (&long, reason::BAD_TOKEN),
            (r#"{"api_key":"k","expires_at":"x"}"#, reason::BAD_EXPIRY),
            (r#"{"api_key":"k","expires_at":true}"#, reason::BAD_EXPIRY),
            (
                r#"{"api_key":"k","expires_at":1755266400000.5}"#,
                reason::BAD_EXPIRY,
            ),
            (r#"{"api_key":"k","expires_at":0}"#, reason::SECONDS),
            (r#"{"api_key":"k","expires_at":-1}"#, reason::SECONDS),
            (
                r#"{"api_key":"k","expires_at":1755266400}"#,
                reason::SECONDS,
            ),
            (
                r#"{"api_key":"k","expires_at":99999999999}"#,
                reason::SECONDS,
            ),
            (
                r#"{"api_key":"k","expires_at":253402300800000}"#,
                reason::TOO_LATE,
            ),
            (r#"{"api_key":"k","expires_at":1e300}"#, reason::TOO_LATE),
            (
                r#"{"api_key":"k","expires_at":18446744073709551615}"#,
                reason::TOO_LATE,
            ),
        ];
        for (content, wanted) in table {
            let shown = content.get(..80).unwrap_or(content);
            assert_eq!(parse(content.as_bytes()).err(), Some(*wanted), "{shown}");
        }
        assert_eq!(parse(b"\xff\xfe{").err(), Some(reason::NOT_AN_OBJECT));
        assert_eq!(
            parse(b"{\"api_key\":\"\xff\"}").err(),
            Some(reason::NOT_AN_OBJECT)
        );
    }

    #[test]
    fn same_as_looks_at_every_field() {
        let one = parse(br#"{"access_token":"t","expires_at":1755266400000}"#).unwrap();
        assert!(one.same_as(&one.clone()));
        for other in [
            r#"{"access_token":"u","expires_at":1755266400000}"#,
            r#"{"access_token":"t","expires_at":1755266400001}"#,
            r#"{"access_token":"t"}"#,
            r#"{"api_key":"t","expires_at":1755266400000}"#,
        ] {
            assert!(!one.same_as(&parse(other.as_bytes()).unwrap()), "{other}");
        }
        assert_eq!(
            [Auth::Bearer.name(), Auth::XApiKey.name()],
            ["bearer", "x-api-key"]
        );
    }

    #[test]
    fn debug_hides_the_token() {
        let credential = parse(br#"{"access_token":"sesame-open"}"#);
        assert!(!format!("{credential:?}").contains("sesame"));
        assert!(!format!("{credential:#?}").contains("sesame"));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn no_content_shows_in_a_reason(
            token in "[a-zA-Z0-9 \u{1}-\u{7f}]{12,40}",
            name in "access_token|accessToken|api_key|apiKey|other",
            other in "access_token|accessToken|api_key|apiKey|w",
            expires in "[-0-9.eE]{1,20}|null|true",
            cut in 0_usize..200,
        ) {
            let token_json = serde_json::to_string(&token).unwrap();
            let mut text = format!(
                r#"{{"{name}":{token_json},"expires_at":{expires},"{other}":{{"{name}":{token_json}}}}}"#
            );
            while !text.is_char_boundary(cut.min(text.len())) {
                text.pop();
            }
            if cut % 3 == 0 {
                text.truncate(cut);
            }
            match parse(text.as_bytes()) {
                Ok(found) => {
                    let debug = format!("{found:?}");
                    prop_assert!(!debug.contains(&token));
                }
                Err(reason) => prop_assert!(!reason.contains(&token)),
            }
        }

        #[test]
        fn what_fits_a_header_is_taken_as_it_is(
            token in "[!-~]{1,300}",
            ms in EXPIRES_MIN..=EXPIRES_MAX,
        ) {
            let text = serde_json::json!({"w": {"accessToken": token, "expiresAt": ms}});
            let found = parse(text.to_string().as_bytes()).unwrap();
            prop_assert_eq!(found.token.expose_secret(), token.as_str());
            prop_assert_eq!(found.expires_at, Some(ms));
        }
    }
}
