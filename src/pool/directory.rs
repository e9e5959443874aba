//! Finds the numbers of things by the hashes of their names.
//!
//! Each entry has a part of the hash beside the number: hardly a wrong name is
//! ever compared, and growth looks at no name. It grows shard by shard, so that
//! no growth is felt, however many names there are.

use hashbrown::HashTable;

/// Entries are spread over so many tables.
const SHARDS: usize = 64;

#[derive(Debug)]
pub(super) struct Directory {
    shards: Vec<HashTable<Entry>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    /// The upper half of the hash; the lower one has chosen the shard.
    part: u32,
    number: u32,
}

impl Entry {
    fn new(hash: u64, number: u32) -> Self {
        let part = (hash >> 32) as u32;
        Self { part, number }
    }

    /// A hash as the table wants it, of which both ends count.
    fn spread(&self) -> u64 {
        u64::from(self.part) << 32 | u64::from(self.part)
    }
}

impl Directory {
    pub(super) fn new() -> Self {
        Self {
            shards: vec![HashTable::new(); SHARDS],
        }
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn len(&self) -> usize {
        self.shards.iter().map(HashTable::len).sum()
    }

    /// The number under that hash of which `is` says that it is meant.
    pub(super) fn find(&self, hash: u64, mut is: impl FnMut(u32) -> bool) -> Option<u32> {
        let wanted = Entry::new(hash, 0);
        let found = self
            .shards
            .get(Self::shard(hash))?
            .find(wanted.spread(), |entry| {
                entry.part == wanted.part && is(entry.number)
            });
        found.map(|entry| entry.number)
    }

    /// Enters a number that isn't there.
    pub(super) fn insert(&mut self, hash: u64, number: u32) {
        let entry = Entry::new(hash, number);
        if let Some(shard) = self.shards.get_mut(Self::shard(hash)) {
            shard.insert_unique(entry.spread(), entry, Entry::spread);
        }
    }

    pub(super) fn remove(&mut self, hash: u64, number: u32) {
        let entry = Entry::new(hash, number);
        if let Some(shard) = self.shards.get_mut(Self::shard(hash))
            && let Ok(found) = shard.find_entry(entry.spread(), |found| *found == entry)
        {
            found.remove();
        }
    }

    fn shard(hash: u64) -> usize {
        hash as usize % SHARDS
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
