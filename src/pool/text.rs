//! Names kept where the thing that bears them is: no allocation of its own, so
//! one look at memory finds both. With a million keys that is what counts.

use smallvec::SmallVec;
use std::fmt;
use std::ops::Deref;

/// A text that lies inline up to `N` bytes.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Text<const N: usize>(SmallVec<[u8; N]>);

impl<const N: usize> Text<N> {
    pub(super) fn boxed(&self) -> Box<str> {
        (**self).into()
    }

    /// The text's bytes; cheaper than the text.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether this is that text; cheaper than to look at it as one.
    pub(super) fn is(&self, text: &[u8]) -> bool {
        *self.0 == *text
    }
}

impl<const N: usize> From<&str> for Text<N> {
    fn from(text: &str) -> Self {
        Self(SmallVec::from_slice(text.as_bytes()))
    }
}

impl<const N: usize> Deref for Text<N> {
    type Target = str;

    fn deref(&self) -> &str {
        // It was a text when it came in.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

impl<const N: usize> fmt::Debug for Text<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}
