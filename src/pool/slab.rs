//! Things by number; the number of one that is gone is given out again.

use super::pages::Pages;

#[derive(Debug)]
pub(super) struct Slab<T> {
    things: Pages<Option<T>>,
    /// Numbers to be given out again.
    vacant: Pages<usize>,
}

impl<T> Slab<T> {
    pub(super) const fn new() -> Self {
        Self {
            things: Pages::new(),
            vacant: Pages::new(),
        }
    }

    /// After every number in use.
    pub(super) fn end(&self) -> usize {
        self.things.len()
    }

    pub(super) fn len(&self) -> usize {
        self.end() - self.vacant.len()
    }

    pub(super) fn get(&self, number: usize) -> Option<&T> {
        self.things.get(number)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, number: usize) -> Option<&mut T> {
        self.things.get_mut(number)?.as_mut()
    }

    /// The number that [`Slab::insert`] gives out next.
    pub(super) fn next(&self) -> usize {
        self.vacant.last().copied().unwrap_or_else(|| self.end())
    }

    pub(super) fn insert(&mut self, thing: T) {
        match self.vacant.pop() {
            None => self.things.push(Some(thing)),
            Some(number) => {
                if let Some(entry) = self.things.get_mut(number) {
                    *entry = Some(thing);
                }
            }
        }
    }

    pub(super) fn remove(&mut self, number: usize) -> Option<T> {
        let thing = self.things.get_mut(number)?.take()?;
        self.vacant.push(number);
        Some(thing)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, &T)> {
        let entries = self.things.iter().enumerate();
        entries.filter_map(|(number, entry)| Some((number, entry.as_ref()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// More than any page holds.
    const PAGE: usize = 5000;

    #[test]
    fn numbers_are_kept_and_given_out_again() {
        let mut slab = Slab::new();
        let count = 2 * PAGE + 1;
        for number in 0..count {
            assert_eq!(slab.next(), number);
            slab.insert(number);
        }
        assert_eq!(slab.remove(PAGE), Some(PAGE));
        assert_eq!(slab.remove(PAGE), None);
        assert_eq!(slab.remove(count), None);
        assert_eq!(slab.remove(1), Some(1));
        assert_eq!((slab.len(), slab.end()), (count - 2, count));
        assert_eq!(slab.get(PAGE), None);
        assert_eq!(slab.get_mut(1), None);
        assert_eq!(slab.iter().count(), count - 2);
        assert!(slab.iter().all(|(number, thing)| number == *thing));
        assert_eq!(slab.next(), 1);
        slab.insert(7);
        assert_eq!((slab.get(1), slab.next()), (Some(&7), PAGE));
    }
}
