//! Chunks out of an image of an earlier save, or mostly so.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Worker;
use crate::bytes::ReadAt;
use crate::codec::Decompressor;
use crate::container::{ChunkEntry, ChunkKind, ContainerError, Image, Layout, PageMap};
use crate::digest::Digest;
use crate::pipeline::PipelineError;
use crate::pipeline::fetch::MOST_AT_ONCE;
use crate::pipeline::load::grow;
use crate::pipeline::patch::{
    Earlier, Expected, Guess, Guesser, MAX_RAW_LEN, MAX_REST_LEN, Question, Recipe, Reply,
    Restorer, State,
};
use crate::store::FileSource;

/// Sends a question and gives the reply; `None` if the other side has none.
pub type Compare<'a> = dyn Fn(&[u8]) -> io::Result<Option<Vec<u8>>> + Sync + 'a;

/// What makes it possible to get chunks of less than their bytes.
pub struct Help<'a> {
    /// An image of an earlier save.
    pub earlier: &'a Earlier<'a, FileSource>,
    /// The page map of the image that arrives.
    pub map: Option<&'a PageMap>,
    /// Who compares guesses; `None` if nobody does, for the source is near.
    pub compare: Option<&'a Compare<'a>>,
}

/// How one chunk is got.
pub enum Way {
    /// Its stored bytes are read.
    Read,
    /// The earlier image has it: its entry there.
    Same(ChunkEntry),
    /// It is guessed, and compared.
    Guess,
}

/// By what it is decided how chunks are got.
pub struct Ways<'a> {
    earlier: Option<&'a Earlier<'a, FileSource>>,
    guessing: Option<(Expected<'a>, &'a Compare<'a>)>,
    recipe: Recipe,
    /// The other side does not reply.
    is_mute: AtomicBool,
}

impl<'a> Ways<'a> {
    pub fn of<R: ReadAt>(help: Option<&Help<'a>>, image: &Image<R>) -> Result<Self, PipelineError> {
        let layout: Layout = image.layout();
        let guessing = help.and_then(|help| {
            let expected = Expected::of(help.map?, layout, help.earlier)?;
            Some((expected, help.compare?))
        });
        Ok(Ways {
            earlier: help.map(|help| help.earlier),
            guessing,
            recipe: Recipe::default(),
            is_mute: AtomicBool::new(false),
        })
    }

    /// How this chunk is got.
    pub fn of_chunk(&self, entry: &ChunkEntry) -> Way {
        let is_storable = || self.recipe.is_of_use(entry.kind);
        let same = self.earlier.and_then(|it| it.same(&entry.raw_digest));
        if let Some(before) = same
            && (is_stored_so(&before, entry) || is_storable())
        {
            return Way::Same(before);
        }
        match &self.guessing {
            Some((expected, _))
                if !self.is_mute.load(Ordering::Relaxed)
                    && entry.raw_len as usize <= MAX_RAW_LEN / 2
                    && is_storable()
                    && (entry.kind == ChunkKind::Plain || expected.has_pages(entry.index)) =>
            {
                Way::Guess
            }
            _ => Way::Read,
        }
    }
}

/// Whether the stored bytes are the same, as far as the tables say.
fn is_stored_so(before: &ChunkEntry, entry: &ChunkEntry) -> bool {
    (before.kind, before.stored_len, before.stored_crc)
        == (entry.kind, entry.stored_len, entry.stored_crc)
}

/// One thread's buffers for all that.
#[derive(Default)]
pub struct Patcher {
    guesser: Guesser,
    restorer: Restorer,
    decompressor: Option<Decompressor>,
    spare: Vec<Vec<u8>>,
    rest: Vec<u8>,
}

/// Chunks whose raw bytes are right, and those that have to be read after all.
type Sorted = (Vec<Guess>, Vec<ChunkEntry>);

impl<S: ReadAt, R: ReadAt> Worker<'_, S, R> {
    /// Copies chunks that the earlier image has. What is not as its table says is read from the source.
    pub fn copy(&mut self, pairs: &[(ChunkEntry, ChunkEntry)]) -> Result<(), PipelineError> {
        let (mut at_hand, mut others) = (Vec::new(), Vec::new());
        for (entry, before) in pairs {
            match is_stored_so(before, entry) && self.load_stored(at_hand.as_slice(), before) {
                true => at_hand.push(*entry),
                false => others.push((entry, before)),
            }
        }
        let is_right = self.bench.check(self.table.image(), &at_hand).is_ok();
        let mut begin = 0;
        for entry in &at_hand {
            let end = begin + entry.stored_len as usize;
            if is_right {
                self.write_made(entry, &self.bench.stored[begin..end])?;
            }
            begin = end;
        }
        if !is_right {
            let mut at_hand = at_hand.iter();
            at_hand.try_for_each(|entry| self.read(&[*entry]))?;
        }
        // These use the buffers of what was at hand.
        let mut others = others.into_iter();
        others.try_for_each(|(entry, before)| self.store_again(entry, before))
    }

    /// Puts the stored bytes of a chunk of the earlier image behind those of `at_hand`.
    fn load_stored(&mut self, at_hand: &[ChunkEntry], before: &ChunkEntry) -> bool {
        let Some(earlier) = self.queue.ways.earlier else {
            return false;
        };
        let begin: usize = at_hand.iter().map(|it| it.stored_len as usize).sum();
        let end = begin + before.stored_len as usize;
        grow(&mut self.bench.stored, end);
        let place = &mut self.bench.stored[begin..end];
        earlier.image().read_stored_into(before, place).is_ok()
    }

    /// Stores the raw bytes of a chunk of the earlier image as the one that arrives has them.
    fn store_again(
        &mut self,
        entry: &ChunkEntry,
        before: &ChunkEntry,
    ) -> Result<(), PipelineError> {
        let len = entry.raw_len as usize;
        let mut raw = std::mem::take(&mut self.bench.raw[0]);
        grow(&mut raw, len);
        let is_right = self.queue.ways.earlier.is_some_and(|earlier| {
            let image = earlier.image();
            let loaded = self.bench.loader.load(image, before, &mut raw[..len]);
            before.raw_len == entry.raw_len
                && loaded.is_ok()
                && entry.check_raw(&raw[..len]).is_ok()
        });
        let outcome = match is_right {
            true => self.store(entry, &raw[..len]),
            false => self.read(&[*entry]),
        };
        self.bench.raw[0] = raw;
        outcome
    }

    /// Writes a chunk whose raw bytes are right; if its stored bytes cannot be made of them they are read.
    fn store(&mut self, entry: &ChunkEntry, raw: &[u8]) -> Result<(), PipelineError> {
        let mut restorer = std::mem::take(&mut self.bench.patcher.restorer);
        let stored = restorer.store(&self.queue.ways.recipe, entry, raw)?;
        let outcome = match stored {
            Some(stored) => self.write_made(entry, stored),
            None => self.read(&[*entry]),
        };
        self.bench.patcher.restorer = restorer;
        outcome
    }

    /// Guesses chunks, has them compared, corrects them, and reads those with which that did not do.
    pub fn compare(&mut self, entries: Vec<ChunkEntry>) -> Result<(), PipelineError> {
        let (guesses, mut unknown) = self.guess(entries);
        let (right, wrong) = self.correct(guesses)?;
        unknown.extend(wrong);
        for group in right.chunks(MOST_AT_ONCE) {
            let raw: Vec<&[u8]> = group.iter().map(|guess| guess.raw.as_slice()).collect();
            for (guess, digest) in group.iter().zip(Digest::of_each(&raw)) {
                match digest == guess.entry.raw_digest {
                    true => self.store(&guess.entry, &guess.raw)?,
                    // Two pages with the same short hash.
                    false => unknown.push(guess.entry),
                }
            }
        }
        let spare = &mut self.bench.patcher.spare;
        spare.extend(right.into_iter().map(|guess| guess.raw));
        unknown.iter().try_for_each(|entry| self.read(&[*entry]))
    }

    fn guess(&mut self, entries: Vec<ChunkEntry>) -> Sorted {
        let (mut guesses, mut unknown) = (Vec::new(), Vec::new());
        let ways = self.queue.ways;
        let patcher = &mut self.bench.patcher;
        for entry in entries {
            let known = ways.earlier.zip(ways.guessing.as_ref());
            let buffer = patcher.spare.pop().unwrap_or_default();
            let guess = match known {
                Some((earlier, (expected, _))) => {
                    patcher.guesser.guess(expected, earlier, &entry, buffer)
                }
                None => Err(buffer),
            };
            match guess {
                Ok(guess) => guesses.push(guess),
                Err(buffer) => {
                    patcher.spare.push(buffer);
                    unknown.push(entry);
                }
            }
        }
        (guesses, unknown)
    }

    /// Asks, as often as needed, until each guess is corrected or given up.
    fn correct(&mut self, mut left: Vec<Guess>) -> Result<Sorted, PipelineError> {
        let (mut right, mut wrong) = (Vec::new(), Vec::new());
        while !left.is_empty() {
            let asked: Vec<_> = left
                .iter()
                .map(|guess| self.bench.patcher.guesser.ask(guess))
                .collect();
            let reply = self.ask(&left, &Question::write(&asked))?;
            let states = self.bench.patcher.read_reply(reply.as_deref(), &left);
            let mut rest = std::mem::take(&mut self.bench.patcher.rest);
            let mut at = 0;
            let mut later = Vec::new();
            for (mut guess, state) in left.into_iter().zip(states) {
                match state {
                    State::Wrong(bits) => {
                        let len = guess.wrong_len(&bits);
                        guess.correct(&bits, &rest[at..at + len]);
                        at += len;
                        right.push(guess);
                    }
                    State::Later => later.push(guess),
                    State::Whole => {
                        wrong.push(guess.entry);
                        self.bench.patcher.spare.push(guess.raw);
                    }
                }
            }
            rest.clear();
            self.bench.patcher.rest = rest;
            left = later;
        }
        Ok((right, wrong))
    }

    fn ask(&mut self, left: &[Guess], question: &[u8]) -> Result<Option<Vec<u8>>, PipelineError> {
        let Some((_, compare)) = &self.queue.ways.guessing else {
            return Ok(None);
        };
        self.queue.keep_to_rate(0)?;
        let at = left
            .first()
            .map_or_else(Default::default, |it| it.entry.stored_offset);
        let reply = compare(question).map_err(|source| ContainerError::Read { at, source })?;
        match &reply {
            Some(reply) => self.queue.came(reply.len()),
            None => self.queue.ways.is_mute.store(true, Ordering::Relaxed),
        }
        Ok(reply)
    }
}

impl Patcher {
    /// What a reply says of each guess, with the bytes it adds in `rest`. A reply that makes no sense says that all of them
    /// have to be read.
    fn read_reply(&mut self, reply: Option<&[u8]>, guesses: &[Guess]) -> Vec<State> {
        let understood = reply.and_then(|reply| self.parse_reply(reply, guesses));
        understood.unwrap_or_else(|| guesses.iter().map(|_| State::Whole).collect())
    }

    fn parse_reply(&mut self, reply: &[u8], guesses: &[Guess]) -> Option<Vec<State>> {
        let counts: Vec<usize> = guesses.iter().map(Guess::piece_count).collect();
        let Reply { states, frame } = Reply::parse(reply, &counts)?;
        let lens = guesses
            .iter()
            .zip(&states)
            .map(|(guess, state)| match state {
                State::Wrong(bits) => guess.wrong_len(bits),
                State::Whole | State::Later => 0,
            });
        let len: usize = lens.sum();
        // Each reply has to bring something, or the asking would not end.
        if len > MAX_REST_LEN || states.first() == Some(&State::Later) {
            return None;
        }
        self.rest.clear();
        if len > 0 {
            let decompressor = match &mut self.decompressor {
                Some(decompressor) => decompressor,
                none => none.insert(Decompressor::new().ok()?),
            };
            decompressor.decompress(frame, len, &mut self.rest).ok()?;
        } else if !frame.is_empty() {
            return None;
        }
        Some(states)
    }
}
