//! What may stand where: account names, client keys and free text, and how a
//! client key is shown to people who should not learn it.

/// The longest account name, in bytes.
pub(crate) const ACCOUNT_NAME_MAX: usize = 128;
/// The longest client key, in bytes.
pub(crate) const CLIENT_KEY_MAX: usize = 256;
/// The longest label or reason, in bytes.
pub(crate) const TEXT_MAX: usize = 256;
/// What every generated client key begins with.
pub(crate) const CLIENT_KEY_PREFIX: &str = "sk-cli-v1-";

/// The account name in `bytes`, if they are one: `[A-Za-z0-9._@+-]{1,128}`.
pub(crate) fn account_name(bytes: &[u8]) -> Option<&str> {
    let fits = (1..=ACCOUNT_NAME_MAX).contains(&bytes.len())
        && bytes
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || b"._@+-".contains(b));
    fits.then(|| std::str::from_utf8(bytes).ok()).flatten()
}

/// The client key in `bytes`, if they can be one: 1 to 256 visible ASCII
/// characters, which is what fits into an HTTP header unescaped.
pub(crate) fn client_key(bytes: &[u8]) -> Option<&str> {
    // Without an early end many bytes are looked at together.
    let visible = |bytes: &[u8]| bytes.iter().fold(true, |all, b| all & b.is_ascii_graphic());
    let fits = (1..=CLIENT_KEY_MAX).contains(&bytes.len()) && visible(bytes);
    fits.then(|| std::str::from_utf8(bytes).ok()).flatten()
}

/// The label or reason in `bytes`, if they are one: UTF-8 of at most 256
/// bytes without control characters.
pub(crate) fn text(bytes: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(bytes).ok()?;
    let fits = text.len() <= TEXT_MAX && !text.chars().any(char::is_control);
    fits.then_some(text)
}

/// A client key with its middle left out: enough to tell two keys apart, not
/// enough to use one.
pub(crate) fn mask(key: &str) -> String {
    let (head, body) = key
        .strip_prefix(CLIENT_KEY_PREFIX)
        .map_or(("", key), |body| (CLIENT_KEY_PREFIX, body));
    let shown = if body.len() >= 16 { 4 } else { 0 };
    let first = body.get(..shown).unwrap_or_default();
    let last = body.get(body.len() - shown..).unwrap_or_default();
    format!("{head}{first}...{last}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn account_names() {
        for good in [
            "a",
            "jasonlucy8160-outlook",
            "A.b_c@d+e-9",
            &"x".repeat(128),
        ] {
            assert_eq!(account_name(good.as_bytes()), Some(good));
        }
        for bad in [
            "",
            "a b",
            "a/b",
            "a:b",
            "一",
            "a\0",
            "%s%n",
            &"x".repeat(129),
        ] {
            assert_eq!(account_name(bad.as_bytes()), None, "{bad:?}");
        }
        assert_eq!(account_name(b"\xff\xfe"), None);
    }

    #[test]
    fn client_keys() {
        for good in ["k", "sk-cli-v1-xxxxx", "%s%n", &"x".repeat(256)] {
            assert_eq!(client_key(good.as_bytes()), Some(good));
        }
        for bad in ["", "a b", "一", "a\0b", "a\n", &"x".repeat(257)] {
            assert_eq!(client_key(bad.as_bytes()), None, "{bad:?}");
        }
    }

    #[test]
    fn texts() {
        assert_eq!(text("一 label %s%n".as_bytes()), Some("一 label %s%n"));
        assert_eq!(text(b""), Some(""));
        assert_eq!(text(b"two\nlines"), None);
        assert_eq!(text(b"\xff"), None);
        assert_eq!(text("x".repeat(257).as_bytes()), None);
    }

    #[test]
    fn a_mask_never_shows_a_whole_key() {
        let key = format!("{CLIENT_KEY_PREFIX}{}", "0123456789abcdef".repeat(4));
        assert_eq!(mask(&key), "sk-cli-v1-0123...cdef");
        for short in ["k", "secret", "sk-cli-v1-secret"] {
            assert!(!mask(short).contains("secret"));
            assert_ne!(mask(short), short);
        }
    }
}
