//! The threads that give chunks: some what is asked for, some, with less of a claim to the processor, all the rest.

use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use super::desk::{Desk, Slot};
use super::error::ServeError;
use super::give::{Giver, Pages, is_gone};
use super::received::Received;
use crate::container::{ChunkPages, PlacedPage};
use crate::error::Error;
use crate::pipeline::{ChunkTable, Fetcher, MOST_AT_ONCE, PipelineError};
use crate::store::AnyFile;
use crate::units::PAGE_LEN;

/// How much less of a claim to the processor: the guest's own threads come first.
const NICE: i32 = 10;

/// The longest sleep of a worker that must not give too fast.
const NAP: Duration = Duration::from_millis(50);

/// What all workers share.
#[derive(Clone, Copy)]
pub struct Worker<'a> {
    pub table: &'a ChunkTable<'a, AnyFile>,
    pub pages: &'a ChunkPages<'a>,
    pub desk: &'a Desk,
    pub giver: &'a Giver<'a>,
    /// Pages that are there since before.
    pub received: &'a Received,
    /// Why the first of them gave up.
    pub failure: &'a Mutex<Option<Error>>,
    /// Whoever listens to QEMU looks at `failure`, and at what is left, when this is written to.
    pub wake: &'a OwnedFd,
    /// Bytes a second, all workers together.
    pub fill_rate: Option<u64>,
}

/// Starts the workers: as many for what is asked for as for all the rest.
pub fn begin<'s, 'a: 's>(scope: &'s Scope<'s, 'a>, worker: &'s Worker<'s>, threads: usize) {
    let threads = threads.max(1);
    for _ in 0..threads {
        scope.spawn(move || worker.run(false, threads));
        scope.spawn(move || worker.run(true, threads));
    }
}

impl Worker<'_> {
    fn run(&self, is_unasked: bool, threads: usize) {
        if is_unasked {
            // Without it the guest waits longer, and nothing else.
            let _ = rustix::process::setpriority_process(None, NICE);
        }
        let done = match is_unasked {
            false => self.give_asked(),
            true => self.give_unasked(threads),
        };
        if let Err(error) = done {
            let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
            failure.get_or_insert(error);
            self.desk.close();
        }
        // One that is full was written to.
        let _ = rustix::io::write(self.wake, &1_u64.to_ne_bytes());
    }

    fn give_asked(&self) -> Result<(), Error> {
        let mut fetcher = Fetcher::default();
        while let Some(slot) = self.desk.take_asked() {
            self.give(&mut fetcher, &[slot])?;
        }
        Ok(())
    }

    fn give_unasked(&self, threads: usize) -> Result<(), Error> {
        let mut fetcher = Fetcher::default();
        let share = self.fill_rate.map(|rate| rate / threads as u64);
        // With a limit no more than one chunk is late.
        let most = share.map_or(MOST_AT_ONCE, |_| 1);
        let began = Instant::now();
        let mut given = 0;
        while let Some(slots) = self.desk.take_unasked(most) {
            given += self.give(&mut fetcher, &slots)?;
            if let Some(rate) = share {
                self.wait_for(began, given, rate);
            }
        }
        Ok(())
    }

    /// Waits until `given` bytes since `began` are no more than `rate` bytes a second.
    fn wait_for(&self, began: Instant, given: u64, rate: u64) {
        let micros = given.saturating_mul(1_000_000) / rate.max(1);
        let due = Duration::from_micros(micros);
        while let Some(early) = due.checked_sub(began.elapsed()).filter(|it| !it.is_zero()) {
            if self.desk.is_over() {
                return;
            }
            thread::sleep(early.min(NAP));
        }
    }

    /// Fetches chunks and gives their pages; the number of bytes.
    fn give(&self, fetcher: &mut Fetcher, slots: &[Slot]) -> Result<u64, Error> {
        let chunks: Vec<_> = slots
            .iter()
            .filter_map(|slot| self.pages.chunks().get(*slot).copied())
            .collect();
        let fetched = fetcher.fetch(self.table, &chunks).map_err(Error::from)?;
        let mut bytes = 0;
        for ((slot, chunk), raw) in slots.iter().zip(&chunks).zip(fetched) {
            let pages: Vec<PlacedPage> = self.pages.in_chunk(*chunk).collect();
            if pages
                .iter()
                .any(|page| page.body as usize + PAGE_LEN > raw.len())
            {
                return Err(PipelineError::PageMap {
                    at: self.table.entry(*chunk)?.stream_offset,
                }
                .into());
            }
            let given = self.give_pages(raw, &pages);
            given.map_err(|error| match is_gone(&error) {
                true => ServeError::HungUp,
                false => ServeError::Socket(error),
            })?;
            bytes += (pages.len() * PAGE_LEN) as u64;
            if self.desk.given(*slot) == 0 {
                let _ = rustix::io::write(self.wake, &1_u64.to_ne_bytes());
            }
        }
        Ok(bytes)
    }

    /// Gives the pages of a chunk, those that follow each other at once.
    fn give_pages(&self, raw: &mut [u8], pages: &[PlacedPage]) -> std::io::Result<()> {
        let is_new = |page: &&PlacedPage| !self.received.has(page.block, page.page);
        let mut rest = pages.iter().filter(is_new).peekable();
        while let Some(first) = rest.next() {
            // Between two pages stands the header of a record: move them together, to the front of what is done with.
            let begin = first.body as usize;
            let mut end = begin + PAGE_LEN;
            let mut count = 1;
            // No other page's bytes have room in a gap that is shorter than a page.
            while let Some(next) = rest.next_if(|next| {
                let gap = (next.body as usize).checked_sub(end);
                let follows = next.block == first.block && next.page.0 == first.page.0 + count;
                follows && gap.is_some_and(|gap| gap < PAGE_LEN)
            }) {
                let body = next.body as usize;
                raw.copy_within(body..body + PAGE_LEN, end);
                end += PAGE_LEN;
                count += 1;
            }
            self.giver
                .give(first.block, first.page, Pages::Bytes(&raw[begin..end]))?;
        }
        Ok(())
    }
}
