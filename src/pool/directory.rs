//! Finds the numbers of things by the hashes of their names.
//!
//! A look-up is for the most part one look at memory: each entry has a part of
//! the hash beside the number, so that hardly a wrong name is ever compared. It
//! grows shard by shard, and by a quarter, without looking at any name: no
//! growth is felt, however many names there are.

/// Entries are spread over so many tables.
const SHARDS: usize = 64;
/// No entry: the number in it is never given out.
const EMPTY: u64 = u64::MAX;

#[derive(Debug)]
pub(super) struct Directory {
    shards: Vec<Shard>,
}

/// A table with linear probing. An entry is the upper half of the hash, then
/// the number; in the order of the hashes, but for what collisions push on.
#[derive(Clone, Debug, Default)]
struct Shard {
    entries: Vec<u64>,
    used: usize,
}

impl Directory {
    pub(super) fn new() -> Self {
        Self {
            shards: vec![Shard::default(); SHARDS],
        }
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.used).sum()
    }

    /// The number under that hash of which `is` says that it is meant.
    pub(super) fn find(&self, hash: u64, is: impl FnMut(u32) -> bool) -> Option<u32> {
        let shard = self.shards.get(Self::shard(hash))?;
        shard.place(hash, is).map(|place| number(shard.at(place)))
    }

    /// Enters a number other than `u32::MAX` that isn't there.
    pub(super) fn insert(&mut self, hash: u64, number: u32) {
        if let Some(shard) = self.shards.get_mut(Self::shard(hash)) {
            shard.make_room();
            shard.insert(upper(hash) | u64::from(number));
            shard.used += 1;
        }
    }

    pub(super) fn remove(&mut self, hash: u64, number: u32) {
        if let Some(shard) = self.shards.get_mut(Self::shard(hash))
            && let Some(place) = shard.place(hash, |found| found == number)
        {
            shard.remove(place);
            shard.used -= 1;
        }
    }

    fn shard(hash: u64) -> usize {
        hash as usize % SHARDS
    }
}

const fn upper(hash: u64) -> u64 {
    hash & !(u32::MAX as u64)
}

const fn number(entry: u64) -> u32 {
    entry as u32
}

impl Shard {
    fn at(&self, place: usize) -> u64 {
        self.entries.get(place).copied().unwrap_or(EMPTY)
    }

    fn put(&mut self, place: usize, entry: u64) {
        if let Some(old) = self.entries.get_mut(place) {
            *old = entry;
        }
    }

    /// Where an entry belongs if nothing stands there.
    fn home(&self, hash: u64) -> usize {
        (((hash >> 32) * self.entries.len() as u64) >> 32) as usize
    }

    fn after(&self, place: usize) -> usize {
        if place + 1 < self.entries.len() {
            place + 1
        } else {
            0
        }
    }

    fn place(&self, hash: u64, mut is: impl FnMut(u32) -> bool) -> Option<usize> {
        let mut place = self.home(hash);
        loop {
            let entry = self.at(place);
            if entry == EMPTY {
                return None;
            }
            if upper(entry) == upper(hash) && is(number(entry)) {
                return Some(place);
            }
            place = self.after(place);
        }
    }

    /// Keeps a fifth of the table empty, lest a look-up become a search.
    fn make_room(&mut self) {
        let size = self.entries.len();
        if (self.used + 1) * 5 <= size * 4 {
            return;
        }
        let larger = vec![EMPTY; size + size / 4 + 4];
        for entry in std::mem::replace(&mut self.entries, larger) {
            if entry != EMPTY {
                self.insert(entry);
            }
        }
    }

    fn insert(&mut self, entry: u64) {
        let mut place = self.home(entry);
        while self.at(place) != EMPTY {
            place = self.after(place);
        }
        self.put(place, entry);
    }

    /// Empties a place; what collisions have pushed beyond it moves up.
    fn remove(&mut self, place: usize) {
        let mut gap = place;
        let mut place = self.after(gap);
        while self.at(place) != EMPTY {
            let entry = self.at(place);
            let distance = |from: usize| {
                let size = self.entries.len();
                (place + size - from) % size
            };
            if distance(self.home(entry)) >= distance(gap) {
                self.put(gap, entry);
                gap = place;
            }
            place = self.after(place);
        }
        self.put(gap, EMPTY);
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
