//! Which chunk is given next, and that each is given once.
//!
//! Chunks that are asked for come first; they have workers of their own. Given unasked are, in this order: the neighbours of
//! what was asked for, what an earlier restore of the image recorded, and all others as they lie in the image.

use std::collections::{HashMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How many chunks behind one that was asked for are given before others.
const NEIGHBOURS: usize = 4;

/// A chunk by its place in the list of chunks that hold pages.
pub type Slot = usize;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Waiting,
    InWork,
    Given,
}

/// Where workers get their work.
pub struct Desk {
    book: Mutex<Book>,
    changed: Condvar,
}

struct Book {
    states: Vec<State>,
    asked: VecDeque<Slot>,
    /// To be given unasked, before the others.
    near: VecDeque<Slot>,
    recorded: VecDeque<Slot>,
    /// All before it are in work or given.
    next: Slot,
    left: usize,
    may_push: bool,
    is_closed: bool,
    /// Since when somebody waits for it.
    waited_for: HashMap<Slot, Instant>,
    worst_stall: Duration,
    /// In the order in which they were asked for first.
    order: Vec<Slot>,
    was_asked: Vec<bool>,
}

impl Desk {
    /// For `count` chunks, of which those of `given` are there already; `recorded` are to be given first.
    pub fn new(count: usize, given: &[Slot], recorded: Vec<Slot>) -> Self {
        let mut states = vec![State::Waiting; count];
        for slot in given {
            states[*slot] = State::Given;
        }
        let left = states.iter().filter(|it| **it == State::Waiting).count();
        let recorded = recorded.into_iter().filter(|slot| *slot < count);
        Desk {
            book: Mutex::new(Book {
                states,
                asked: VecDeque::new(),
                near: VecDeque::new(),
                recorded: recorded.collect(),
                next: 0,
                left,
                may_push: false,
                is_closed: false,
                waited_for: HashMap::new(),
                worst_stall: Duration::ZERO,
                order: Vec::new(),
                was_asked: vec![false; count],
            }),
            changed: Condvar::new(),
        }
    }

    /// Somebody waits for a page of this chunk since now.
    pub fn ask(&self, slot: Slot) {
        let mut book = self.book();
        if !std::mem::replace(&mut book.was_asked[slot], true) {
            book.order.push(slot);
        }
        if book.states[slot] == State::Given {
            return; // it came while the request was on its way
        }
        book.waited_for.entry(slot).or_insert_with(Instant::now);
        if book.states[slot] == State::Waiting && !book.asked.contains(&slot) {
            book.asked.push_back(slot);
            drop(book);
            self.changed.notify_all();
        }
    }

    /// From now on chunks are given unasked.
    pub fn allow_push(&self) {
        self.book().may_push = true;
        self.changed.notify_all();
    }

    /// No more work.
    pub fn close(&self) {
        self.book().is_closed = true;
        self.changed.notify_all();
    }

    /// The next chunk that was asked for; waits for one. `None` when there is no more work.
    pub fn take_asked(&self) -> Option<Slot> {
        let mut book = self.book();
        loop {
            if book.is_closed || book.left == 0 {
                return None;
            }
            if let Some(slot) = book.next_asked() {
                for near in slot + 1..=slot + NEIGHBOURS {
                    if book.states.get(near) == Some(&State::Waiting) {
                        book.near.push_back(near);
                    }
                }
                return Some(slot);
            }
            book = self.wait(book);
        }
    }

    /// Up to `most` chunks to be given unasked; waits until there are some. `None` when there is no more work.
    pub fn take_unasked(&self, most: usize) -> Option<Vec<Slot>> {
        let mut book = self.book();
        loop {
            if book.is_closed {
                return None;
            }
            if book.may_push {
                let slots: Vec<Slot> = std::iter::from_fn(|| book.next_unasked())
                    .take(most)
                    .collect();
                return (!slots.is_empty()).then_some(slots);
            }
            book = self.wait(book);
        }
    }

    /// A chunk's pages are all there. Gives the number of chunks that are left.
    pub fn given(&self, slot: Slot) -> usize {
        let mut book = self.book();
        book.states[slot] = State::Given;
        book.left -= 1;
        if let Some(since) = book.waited_for.remove(&slot) {
            book.worst_stall = book.worst_stall.max(since.elapsed());
        }
        let left = book.left;
        drop(book);
        if left == 0 {
            self.changed.notify_all();
        }
        left
    }

    /// Chunks that are not given yet.
    pub fn left(&self) -> usize {
        self.book().left
    }

    /// Whether there is no more work.
    pub fn is_over(&self) -> bool {
        let book = self.book();
        book.is_closed || book.left == 0
    }

    /// The longest that somebody waited for a chunk.
    pub fn worst_stall(&self) -> Duration {
        self.book().worst_stall
    }

    /// What was asked for, in order.
    pub fn order(&self) -> Vec<Slot> {
        self.book().order.clone()
    }

    fn wait<'a>(&self, book: MutexGuard<'a, Book>) -> MutexGuard<'a, Book> {
        let waited = self.changed.wait(book);
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    /// A worker that panicked leaves a book that is still right: it is written in whole steps.
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Book {
    fn next_asked(&mut self) -> Option<Slot> {
        while let Some(slot) = self.asked.pop_front() {
            if self.begin(slot) {
                return Some(slot);
            }
        }
        None
    }

    fn next_unasked(&mut self) -> Option<Slot> {
        loop {
            let first = self.near.pop_front().or_else(|| self.recorded.pop_front());
            let slot = match first {
                Some(slot) => slot,
                None if self.next < self.states.len() => {
                    self.next += 1;
                    self.next - 1
                }
                None => return None,
            };
            if self.begin(slot) {
                return Some(slot);
            }
        }
    }

    /// Whether nobody else has it.
    fn begin(&mut self, slot: Slot) -> bool {
        let is_free = self.states[slot] == State::Waiting;
        if is_free {
            self.states[slot] = State::InWork;
        }
        is_free
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_comes_first_then_its_neighbours_then_the_record_then_the_rest() {
        let desk = Desk::new(12, &[1], vec![9, 2, 99]);
        desk.ask(5);
        desk.ask(5);
        assert_eq!(desk.take_asked(), Some(5));
        desk.allow_push();
        let rest = desk.take_unasked(100).unwrap();
        assert_eq!(rest, [6, 7, 8, 9, 2, 0, 3, 4, 10, 11]);
        assert_eq!(desk.take_unasked(1), None);
        assert_eq!(desk.left(), 11);
    }

    #[test]
    fn a_chunk_that_is_in_work_or_given_is_not_given_again() {
        let desk = Desk::new(2, &[], Vec::new());
        desk.allow_push();
        assert_eq!(desk.take_unasked(1), Some(vec![0]));
        desk.ask(0);
        desk.ask(1);
        assert_eq!(desk.take_asked(), Some(1));
        assert_eq!(desk.given(0), 1);
        desk.ask(0);
        assert_eq!(desk.given(1), 0);
        assert_eq!(desk.take_asked(), None);
        assert_eq!(desk.order(), [0, 1]);
    }

    #[test]
    fn nothing_is_given_unasked_before_it_may_be() {
        let desk = Desk::new(1, &[], Vec::new());
        std::thread::scope(|scope| {
            let pusher = scope.spawn(|| desk.take_unasked(1));
            std::thread::sleep(Duration::from_millis(30));
            assert!(!pusher.is_finished());
            desk.close();
            assert_eq!(pusher.join().unwrap(), None);
        });
    }
}
