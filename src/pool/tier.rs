//! The three tiers of accounts and client keys.

use std::fmt;

/// A tier: its accounts, and the keys that may use them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Tier {
    /// Keys may share the pool of accounts or be bound to one of them.
    Medium,
    /// Keys are always bound to one account.
    High,
    /// Keys are always bound to one account.
    Supreme,
}

impl Tier {
    /// Every tier, in the order in which replies name them.
    pub(crate) const ALL: [Self; 3] = [Self::Medium, Self::High, Self::Supreme];

    /// The tier's name, as in key names, folders and arguments.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Medium => "medium",
            Self::High => "high",
            Self::Supreme => "supreme",
        }
    }

    /// The tier of that name; capital letters don't matter.
    pub(crate) fn parse(text: &[u8]) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|tier| text.eq_ignore_ascii_case(tier.name().as_bytes()))
    }

    /// Whether keys of this tier may take a slot in the pool. The other tiers
    /// have request limits of their own, so their keys stay on one account.
    pub(crate) const fn is_pooled(self) -> bool {
        matches!(self, Self::Medium)
    }

    /// A dense number, 0 to 2, for tables with a row a tier.
    pub(crate) const fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
