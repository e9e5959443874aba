//! A list and a table whose memory comes a page at a time: nothing is moved for
//! growth, which with a million entries would stall the server.

use std::mem;

/// Entries of a page.
const PAGE: usize = 4096;

/// A list.
#[derive(Debug)]
pub(super) struct Pages<T> {
    /// All but the last are full, and none but the first is ever empty: what comes
    /// and goes with each command takes no memory anew.
    pages: Vec<Vec<T>>,
}

impl<T> Pages<T> {
    pub(super) const fn new() -> Self {
        Self { pages: Vec::new() }
    }

    pub(super) fn len(&self) -> usize {
        let last = self.pages.last().map_or(0, Vec::len);
        self.pages.len().saturating_sub(1) * PAGE + last
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn get(&self, place: usize) -> Option<&T> {
        self.pages.get(place / PAGE)?.get(place % PAGE)
    }

    pub(super) fn get_mut(&mut self, place: usize) -> Option<&mut T> {
        self.pages.get_mut(place / PAGE)?.get_mut(place % PAGE)
    }

    pub(super) fn last(&self) -> Option<&T> {
        self.pages.last()?.last()
    }

    pub(super) fn push(&mut self, thing: T) {
        if self.pages.last().is_none_or(|page| page.len() == PAGE) {
            // The first page grows: most pools are small.
            let size = if self.pages.is_empty() { 0 } else { PAGE };
            self.pages.push(Vec::with_capacity(size));
        }
        if let Some(page) = self.pages.last_mut() {
            page.push(thing);
        }
    }

    pub(super) fn pop(&mut self) -> Option<T> {
        let page = self.pages.last_mut()?;
        let thing = page.pop();
        if page.is_empty() && self.pages.len() > 1 {
            self.pages.pop();
        }
        thing
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.pages.iter().flatten()
    }

    /// Takes all of them out, the earliest first.
    pub(super) fn take(&mut self) -> impl Iterator<Item = T> + use<T> {
        mem::take(&mut self.pages).into_iter().flatten()
    }
}

/// A number for each of many places; unset ones are `u32::MAX`.
#[derive(Debug)]
pub(super) struct Table {
    pages: Vec<Vec<u32>>,
}

impl Table {
    pub(super) const fn new() -> Self {
        Self { pages: Vec::new() }
    }

    pub(super) fn get(&self, place: usize) -> u32 {
        let page = self.pages.get(place / PAGE);
        let entry = page.and_then(|page| page.get(place % PAGE));
        entry.copied().unwrap_or(u32::MAX)
    }

    /// Sets a number; one that is none of 32 bits counts as unset.
    pub(super) fn set(&mut self, place: usize, number: usize) {
        let (page, place) = (place / PAGE, place % PAGE);
        while self.pages.len() <= page {
            self.pages.push(Vec::new());
        }
        let Some(page) = self.pages.get_mut(page) else {
            return;
        };
        if page.len() <= place {
            page.resize(place + 1, u32::MAX);
        }
        if let Some(entry) = page.get_mut(place) {
            *entry = u32::try_from(number).unwrap_or(u32::MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_gives_back_the_latest_and_keeps_one_page_at_most() {
        let mut list = Pages::new();
        let count = 2 * PAGE + 1;
        for number in 0..count {
            list.push(number);
            assert_eq!((list.len(), list.last()), (number + 1, Some(&number)));
            assert_eq!(
                (list.get(number), list.get(number + 1)),
                (Some(&number), None)
            );
        }
        for number in (1..count).rev() {
            assert_eq!(list.pop(), Some(number));
            assert_eq!(list.len(), number);
        }
        assert_eq!(list.pages.len(), 1);
        assert_eq!(
            (list.pop(), list.pop(), list.is_empty()),
            (Some(0), None, true)
        );
        for number in 0..count {
            list.push(number);
        }
        assert!(list.take().eq(0..count));
        assert_eq!((list.len(), list.last()), (0, None));
    }

    #[test]
    fn a_table_knows_what_was_set() {
        let mut table = Table::new();
        for place in [0, 7, PAGE - 1, PAGE, 3 * PAGE + 5] {
            assert_eq!(table.get(place), u32::MAX);
            table.set(place, place + 1);
            table.set(place, place);
            assert_eq!(table.get(place) as usize, place);
        }
        for place in [1, 2 * PAGE, 3 * PAGE + 6, 9 * PAGE] {
            assert_eq!(table.get(place), u32::MAX);
        }
        table.set(7, usize::MAX);
        assert_eq!((table.get(7), table.get(8)), (u32::MAX, u32::MAX));
    }
}
