//! How ties between accounts are broken: at random, or by a seed, so that a
//! recorded run of commands does the same when it is run again.

use rand::RngExt;
use rand::rngs::SmallRng;

/// How to choose among accounts that are as good as one another.
#[derive(Debug)]
pub(crate) enum Choice {
    /// At random, at the same cost however many there are.
    Random(SmallRng),
    /// By what is being decided and this seed alone: neither what has been
    /// chosen before nor the order in which accounts came into the view counts,
    /// so that a rebuilt view or a restarted server goes on as the one before.
    /// Looks at each of the accounts.
    Seeded(u64),
}

impl Choice {
    /// The position to take in a list of `length`, leaving out those `avoided`, one at
    /// most; none when nothing is left. `occasion` is what is decided: the client key
    /// and `now` (unix ms). `name` gives the name at a position.
    pub(super) fn position<'a>(
        &mut self,
        length: usize,
        avoided: impl Fn(usize) -> bool,
        occasion: (&str, i64),
        name: impl Fn(usize) -> &'a str,
    ) -> Option<usize> {
        match self {
            Self::Random(rng) => {
                let position = (length > 0).then(|| rng.random_range(0..length))?;
                if !avoided(position) {
                    return Some(position);
                }
                // Any of the others, each as likely.
                let other = (length > 1).then(|| rng.random_range(0..length - 1))?;
                Some(other + usize::from(other >= position))
            }
            Self::Seeded(seed) => {
                let (key, now) = occasion;
                // No client key or account has a NUL in its name.
                let parts = [
                    &seed.to_le_bytes(),
                    &now.to_le_bytes(),
                    key.as_bytes(),
                    &[0],
                ];
                let start = parts.into_iter().fold(START, absorb);
                (0..length)
                    .filter(|&position| !avoided(position))
                    .min_by_key(|&position| {
                        let name = name(position);
                        (mix(absorb(start, name.as_bytes())), name)
                    })
            }
        }
    }
}

// FNV-1a with a last stirring. Written out because the same seed must mean the
// same in every build, which the standard library's hashers don't promise.
const START: u64 = 0xcbf2_9ce4_8422_2325;

fn absorb(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn mix(mut hash: u64) -> u64 {
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

    fn seeded(seed: u64, avoided: Option<usize>, key: &str, now: i64) -> Option<usize> {
        let avoided = |at| Some(at) == avoided;
        Choice::Seeded(seed).position(NAMES.len(), avoided, (key, now), |at| NAMES[at])
    }

    #[test]
    fn a_seed_chooses_the_same_whatever_the_order_and_whatever_came_before() {
        let mut backwards = Choice::Seeded(7);
        for now in 0..200 {
            let chosen = seeded(7, None, "key", now).map(|at| NAMES[at]);
            let name = |at| NAMES[NAMES.len() - 1 - at];
            let other = backwards.position(NAMES.len(), |_| false, ("key", now), name);
            assert_eq!(other.map(|at| NAMES[NAMES.len() - 1 - at]), chosen);
        }
    }

    /// A record of a run is worth nothing if the next build reads it otherwise.
    #[test]
    fn a_seed_means_the_same_in_every_build() {
        let chosen = (0..20).filter_map(|now| seeded(42, None, "key", 1_755_266_400_000 + now));
        let chosen: Vec<usize> = chosen.collect();
        let first = [1, 1, 1, 2, 1, 4, 0, 2, 0, 3, 2, 1, 3, 3, 2, 0, 4, 3, 0, 1];
        assert_eq!(chosen, first);
    }

    #[test]
    fn a_seed_shares_out_as_chance_does() {
        let avoided = 2;
        for vary in ["seed", "key", "now"] {
            let mut counts = [0_u32; NAMES.len()];
            for step in 0..4000 {
                let position = match vary {
                    "seed" => seeded(step, Some(avoided), "key", 0),
                    "key" => seeded(1, Some(avoided), &format!("sk-cli-v1-{step}"), 0),
                    _ => seeded(1, Some(avoided), "key", step as i64),
                };
                counts[position.unwrap()] += 1;
            }
            assert_eq!(counts[avoided], 0);
            // A fair share is 1000; six standard deviations are 164.
            let fair = |&(at, count): &(usize, &u32)| at == avoided || (836..1164).contains(count);
            assert!(
                counts.iter().enumerate().all(|entry| fair(&entry)),
                "{vary}: {counts:?}"
            );
        }
    }

    #[test]
    fn chance_shares_out_evenly_whatever_is_avoided() {
        for avoided in (0..NAMES.len()).map(Some).chain([None]) {
            let mut choice = Choice::Random(SmallRng::seed_from_u64(11));
            let mut counts = [0_u32; NAMES.len()];
            for _ in 0..4000 {
                let position = choice.position(
                    NAMES.len(),
                    |at| Some(at) == avoided,
                    ("key", 0),
                    |at| NAMES[at],
                );
                counts[position.unwrap()] += 1;
            }
            // A fair share is 1000 of four and 800 of five; six standard deviations are 164.
            let fair = if avoided.is_some() { 1000 } else { 800 };
            for (at, count) in counts.iter().enumerate() {
                let share = if Some(at) == avoided { 0 } else { fair };
                assert!(
                    count.abs_diff(share) <= 164,
                    "{counts:?} without {avoided:?}"
                );
            }
        }
    }

    #[test]
    fn what_is_avoided_is_never_chosen() {
        for mut choice in [
            Choice::Random(SmallRng::seed_from_u64(3)),
            Choice::Seeded(3),
        ] {
            for now in 0..100 {
                let mut position = |length, avoided| {
                    let avoided = |at| Some(at) == avoided;
                    choice.position(length, avoided, ("key", now), |at| NAMES[at])
                };
                assert_ne!(position(5, Some(4)), Some(4));
                assert_eq!(position(2, Some(0)), Some(1));
                assert_eq!(position(1, None), Some(0));
                assert_eq!((position(1, Some(0)), position(0, None)), (None, None));
            }
        }
    }
}
