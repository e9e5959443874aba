//! Finds the numbers of things by the hashes of their names.
//!
//! Each entry has a part of the hash beside the number: hardly a wrong name is
//! ever compared, and growth looks at no name. It grows shard by shard, so that
//! no growth is felt, however many names there are.
//!
//! A shard is one list, where an entry stands at the place that its part of the
//! hash gives it or soon after: mostly within one cache line, which is what a look
//! costs when there are a million.

use std::mem;

/// Entries are spread over so many shards.
const SHARDS: usize = 64;

#[derive(Debug)]
pub(super) struct Directory {
    shards: Vec<Shard>,
}

#[derive(Clone, Debug, Default)]
struct Shard {
    places: Vec<Entry>,
    /// How many of them are taken; four fifths at most.
    taken: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    /// The upper half of the hash; the lower one has chosen the shard.
    part: u32,
    number: u32,
}

/// No thing has its number.
const VACANT: Entry = Entry {
    part: 0,
    number: u32::MAX,
};

impl Entry {
    fn new(hash: u64, number: u32) -> Self {
        let part = (hash >> 32) as u32;
        Self { part, number }
    }

    fn is_vacant(self) -> bool {
        self.number == VACANT.number
    }

    /// Where it belongs in a list of that length.
    fn home(self, length: usize) -> usize {
        ((u64::from(self.part) * length as u64) >> 32) as usize
    }
}

impl Directory {
    pub(super) fn new() -> Self {
        Self {
            shards: vec![Shard::default(); SHARDS],
        }
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.taken).sum()
    }

    /// The number under that hash of which `is` says that it is meant.
    pub(super) fn find(&self, hash: u64, mut is: impl FnMut(u32) -> bool) -> Option<u32> {
        let wanted = Entry::new(hash, 0);
        let shard = self.shards.get(Self::shard(hash))?;
        let home = wanted.home(shard.places.len());
        let (before, from) = shard.places.split_at_checked(home)?;
        // As `Shard::around` goes; a loop is half of what its iterators take.
        for entries in [from, before] {
            for entry in entries {
                if entry.is_vacant() {
                    return None;
                }
                if entry.part == wanted.part && is(entry.number) {
                    return Some(entry.number);
                }
            }
        }
        None
    }

    /// Enters a number that isn't there.
    pub(super) fn insert(&mut self, hash: u64, number: u32) {
        if let Some(shard) = self.shards.get_mut(Self::shard(hash)) {
            shard.insert(Entry::new(hash, number));
        }
    }

    pub(super) fn remove(&mut self, hash: u64, number: u32) {
        if let Some(shard) = self.shards.get_mut(Self::shard(hash)) {
            shard.remove(Entry::new(hash, number));
        }
    }

    fn shard(hash: u64) -> usize {
        hash as usize % SHARDS
    }
}

impl Shard {
    /// The entries from where that one belongs to the next vacant place; the list
    /// goes on from its end at its start.
    fn around(&self, entry: Entry) -> impl Iterator<Item = &Entry> {
        let home = entry.home(self.places.len());
        let (before, from) = self.places.split_at_checked(home).unwrap_or_default();
        let entries = from.iter().chain(before);
        entries.take_while(|entry| !entry.is_vacant())
    }

    fn insert(&mut self, entry: Entry) {
        if (self.taken + 1) * 5 > self.places.len() * 4 {
            let length = self.places.len() * 5 / 4 + 8;
            let places = mem::replace(&mut self.places, vec![VACANT; length]);
            let entries = places.into_iter().filter(|entry| !entry.is_vacant());
            entries.for_each(|entry| self.place(entry));
        }
        self.place(entry);
        self.taken += 1;
    }

    fn place(&mut self, entry: Entry) {
        let length = self.places.len();
        let place = (entry.home(length) + self.around(entry).count()) % length.max(1);
        if let Some(vacant) = self.places.get_mut(place) {
            *vacant = entry;
        }
    }

    fn remove(&mut self, entry: Entry) {
        let Some(ahead) = self.around(entry).position(|found| *found == entry) else {
            return;
        };
        let length = self.places.len();
        let mut place = (entry.home(length) + ahead) % length.max(1);
        if let Some(found) = self.places.get_mut(place) {
            *found = VACANT;
        }
        self.taken -= 1;
        // Those behind may stand there only because it was taken: each goes in anew.
        loop {
            place = (place + 1) % length.max(1);
            match self
                .places
                .get_mut(place)
                .map(|found| mem::replace(found, VACANT))
            {
                Some(moved) if !moved.is_vacant() => self.place(moved),
                _ => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// Many are alike in part; the third pushes others on past a table's end.
    const HASHES: [u64; 6] = [
        0,
        1,
        u64::MAX,
        1 << 32,
        0xffff_fff0_0000_0000,
        0x8000_0000_0000_0001,
    ];

    proptest! {
        #[test]
        fn it_finds_what_a_map_finds(steps in prop::collection::vec((0..HASHES.len(), 0..40_u32, any::<bool>()), 1..400)) {
            let mut directory = Directory::new();
            let mut map = BTreeMap::new();
            for (kind, number, keep) in steps {
                if let Some(hash) = map.remove(&number) {
                    directory.remove(hash, number);
                }
                if keep {
                    directory.insert(HASHES[kind], number);
                    map.insert(number, HASHES[kind]);
                }
                prop_assert_eq!(directory.len(), map.len());
                for number in 0..40 {
                    for hash in HASHES {
                        let expected = (map.get(&number) == Some(&hash)).then_some(number);
                        prop_assert_eq!(directory.find(hash, |found| found == number), expected);
                    }
                }
            }
        }
    }
}
