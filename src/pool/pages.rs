//! A list and a table whose memory comes a page at a time: nothing is moved for
//! growth, which with a million entries would stall the server.

use std::mem;

/// Entries of a page.
const PAGE: usize = 4096;

/// Things of which the latest is taken first.
#[derive(Debug)]
pub(super) struct Stack<T> {
    /// None is empty, and all but the last are full.
    pages: Vec<Vec<T>>,
}

impl<T> Stack<T> {
    pub(super) const fn new() -> Self {
        Self { pages: Vec::new() }
    }

    pub(super) fn len(&self) -> usize {
        let last = self.pages.last().map_or(0, Vec::len);
        self.pages.len().saturating_sub(1) * PAGE + last
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    pub(super) fn last(&self) -> Option<&T> {
        self.pages.last()?.last()
    }

    pub(super) fn push(&mut self, thing: T) {
        match self.pages.last_mut() {
            Some(page) if page.len() < PAGE => page.push(thing),
            _ => self.pages.push(vec![thing]),
        }
    }

    pub(super) fn pop(&mut self) -> Option<T> {
        let page = self.pages.last_mut()?;
        let thing = page.pop();
        if page.is_empty() {
            self.pages.pop();
        }
        thing
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
    fn a_stack_gives_back_the_latest_and_keeps_no_page() {
        let mut stack = Stack::new();
        let count = 2 * PAGE + 1;
        for number in 0..count {
            stack.push(number);
            assert_eq!((stack.len(), stack.last()), (number + 1, Some(&number)));
        }
        for number in (1..count).rev() {
            assert_eq!(stack.pop(), Some(number));
            assert_eq!(stack.len(), number);
        }
        assert_eq!(stack.pages.len(), 1);
        assert_eq!(
            (stack.pop(), stack.pop(), stack.is_empty()),
            (Some(0), None, true)
        );
        for number in 0..count {
            stack.push(number);
        }
        assert!(stack.take().eq(0..count));
        assert_eq!((stack.len(), stack.last()), (0, None));
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
