//! Account files: any bytes, to the module's own parser. What it takes must be a
//! credential by the rules, which are written down here a second time; what it
//! refuses must be refused with one of its fixed texts.

#![no_main]
#![allow(dead_code, reason = "a part of the module stands alone here")]

#[path = "../../src/accounts/parse.rs"]
mod parse;

use libfuzzer_sys::fuzz_target;
use parse::{Auth, reason};
use secrecy::ExposeSecret;
use serde_json::{Map, Value};

const REASONS: [&str; 10] = [
    reason::EMPTY,
    reason::NOT_AN_OBJECT,
    reason::NO_CREDENTIAL,
    reason::AMBIGUOUS,
    reason::NOT_BOTH,
    reason::DISAGREE,
    reason::BAD_TOKEN,
    reason::BAD_EXPIRY,
    reason::SECONDS,
    reason::TOO_LATE,
];

type Found = Option<(Auth, String, Option<i64>)>;

fuzz_target!(|bytes: &[u8]| {
    let found = found(bytes);
    assert_eq!(found, meant(bytes), "not what the file means");

    // A file that is cut short while it is written must not look like another.
    let text = bytes.trim_ascii_end();
    if let (Some(_), Some((_, cut))) = (&found, text.split_last()) {
        assert_eq!(self::found(cut), None, "half a file was taken");
    }
    // One object around the fields changes nothing, and neither does a mark.
    if let (Some(_), Ok(Value::Object(fields))) = (&found, serde_json::from_slice(bytes)) {
        if holds_credential(&fields) {
            let wrapped = serde_json::json!({ "any name": fields }).to_string();
            assert_eq!(self::found(wrapped.as_bytes()), found, "wrapped");
        }
        assert_eq!(
            self::found(&[b"\xEF\xBB\xBF", bytes].concat()),
            found,
            "marked"
        );
    }
});

/// What the module makes of the file.
fn found(bytes: &[u8]) -> Found {
    match parse::parse(bytes) {
        Ok(credential) => {
            let token = credential.token.expose_secret();
            for shown in [format!("{credential:?}"), format!("{credential:#?}")] {
                // What every Debug output has in it is no leak.
                let known = "Credential { auth: Bearer XApiKey token: SecretBox<str>([REDACTED]) expires_at: Some(\n None, }";
                let end = format!("{0:?} {0:#?}", credential.expires_at);
                let is_known = known.contains(token) || end.contains(token);
                assert!(
                    token.len() < 8 || is_known || !shown.contains(token),
                    "shows its token"
                );
            }
            assert!(credential.same_as(&credential.clone()));
            Some((credential.auth, token.to_owned(), credential.expires_at))
        }
        Err(text) => {
            assert!(REASONS.contains(&text), "an unknown reason");
            None
        }
    }
}

/// The rules once more, from the guide, as plainly as can be.
fn meant(bytes: &[u8]) -> Found {
    let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
    let Ok(Value::Object(top)) = serde_json::from_slice(bytes) else {
        return None;
    };
    let fields = if holds_credential(&top) {
        top
    } else {
        let inner = top.into_iter().filter_map(|(_, value)| match value {
            Value::Object(fields) => Some(fields),
            _ => None,
        });
        let mut inner: Vec<_> = inner.filter(holds_credential).collect();
        if inner.len() != 1 {
            return None;
        }
        inner.remove(0)
    };
    let (auth, token) = match [
        one(&fields, "access_token", "accessToken")?,
        one(&fields, "api_key", "apiKey")?,
    ] {
        [Some(token), None] => (Auth::Bearer, token),
        [None, Some(token)] => (Auth::XApiKey, token),
        _ => return None,
    };
    let token = token.as_str()?;
    if token.is_empty() || token.len() > 16_384 || token.chars().any(|c| !('!'..='~').contains(&c))
    {
        return None;
    }
    let end = match one(&fields, "expires_at", "expiresAt")? {
        None => None,
        Some(Value::Number(number)) => {
            let ms = match (number.as_i64(), number.as_f64()) {
                (Some(ms), _) => i128::from(ms),
                (None, Some(ms)) if ms.trunc() == ms => ms as i128,
                _ => return None,
            };
            // March 1973 to the end of 9999.
            if !(100_000_000_000..=253_402_300_799_999).contains(&ms) {
                return None;
            }
            Some(i64::try_from(ms).ok()?)
        }
        Some(_) => return None,
    };
    Some((auth, token.to_owned(), end))
}

fn holds_credential(fields: &Map<String, Value>) -> bool {
    let names = ["access_token", "accessToken", "api_key", "apiKey"];
    names
        .iter()
        .any(|name| !fields.get(*name).unwrap_or(&Value::Null).is_null())
}

/// A field by its two names, null as good as absent; none when they disagree.
fn one<'a>(fields: &'a Map<String, Value>, snake: &str, camel: &str) -> Option<Option<&'a Value>> {
    let values: Vec<&Value> = [snake, camel]
        .iter()
        .filter_map(|name| fields.get(*name))
        .filter(|value| !value.is_null())
        .collect();
    match values[..] {
        [] => Some(None),
        [one] => Some(Some(one)),
        [one, other] => (one == other).then_some(Some(one)),
        _ => unreachable!(),
    }
}
