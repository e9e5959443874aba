//! Things by number; the number of one that is gone is given out again. Memory
//! comes a page at a time: nothing is moved for growth, which with a million
//! things would stall the server, and none is kept in advance.

/// Things of a page.
const PAGE: usize = 4096;

#[derive(Debug)]
pub(super) struct Slab<T> {
    /// All but the last are full.
    pages: Vec<Vec<Option<T>>>,
    /// Numbers to be given out again.
    vacant: Vec<usize>,
}

impl<T> Slab<T> {
    pub(super) const fn new() -> Self {
        Self {
            pages: Vec::new(),
            vacant: Vec::new(),
        }
    }

    /// After every number in use.
    pub(super) fn end(&self) -> usize {
        let last = self.pages.last().map_or(0, Vec::len);
        self.pages.len().saturating_sub(1) * PAGE + last
    }

    pub(super) fn len(&self) -> usize {
        self.end() - self.vacant.len()
    }

    pub(super) fn get(&self, number: usize) -> Option<&T> {
        self.pages.get(number / PAGE)?.get(number % PAGE)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, number: usize) -> Option<&mut T> {
        let page = self.pages.get_mut(number / PAGE)?;
        page.get_mut(number % PAGE)?.as_mut()
    }

    /// The number that [`Slab::insert`] gives out next.
    pub(super) fn next(&self) -> usize {
        self.vacant.last().copied().unwrap_or_else(|| self.end())
    }

    pub(super) fn insert(&mut self, thing: T) {
        if let Some(number) = self.vacant.pop() {
            let page = self.pages.get_mut(number / PAGE);
            if let Some(entry) = page.and_then(|page| page.get_mut(number % PAGE)) {
                *entry = Some(thing);
            }
            return;
        }
        if self.pages.last().is_none_or(|page| page.len() == PAGE) {
            // The first page grows: most pools are small.
            let size = if self.pages.is_empty() { 0 } else { PAGE };
            self.pages.push(Vec::with_capacity(size));
        }
        if let Some(page) = self.pages.last_mut() {
            page.push(Some(thing));
        }
    }

    pub(super) fn remove(&mut self, number: usize) -> Option<T> {
        let page = self.pages.get_mut(number / PAGE)?;
        let thing = page.get_mut(number % PAGE)?.take()?;
        self.vacant.push(number);
        Some(thing)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, &T)> {
        let entries = self.pages.iter().flatten().enumerate();
        entries.filter_map(|(number, entry)| Some((number, entry.as_ref()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
