//! The giving side: which pages of a guess are right, and the bytes of the others.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use super::wire::{Asked, MAX_RAW_LEN, MAX_REST_LEN, Question, Reply, State};
use super::{PIECE_LEN, around, hash_around, short_hash};
use crate::bytes::ReadAt;
use crate::codec::Compressor;
use crate::container::layout::ENTRIES_PER_PAGE;
use crate::container::{ChunkEntry, ChunkKind, ContainerError, Image};
use crate::pipeline::PipelineError;
use crate::pipeline::load::{Loader, grow};
use crate::units::ChunkIndex;

/// More threads than that find no work in one question.
const MOST_THREADS: usize = 8;

/// zstd's level for the bytes that a reply adds.
const LEVEL: i32 = 3;

/// A guess of which more than this part is wrong, in eighths, saves nothing where chunks are compressed.
const WORTH: usize = 6;

/// Why a question has no reply.
#[derive(Debug, thiserror::Error)]
pub enum NoReply {
    /// The bytes are no question.
    #[error("the question is not clear")]
    Unclear,
    /// The chunks are too many, or too large.
    #[error("that many chunks are not compared at once")]
    TooMuch,
    /// There is no such chunk, or the chunk table cannot be read.
    #[error("the chunk table cannot be read")]
    Table(#[from] ContainerError),
    /// The reply could not be made.
    #[error("the reply could not be made")]
    Failed(#[from] PipelineError),
}

/// Answers questions about the chunks of one image.
pub struct Replier<R: ReadAt> {
    image: Image<R>,
    /// The page of the chunk table that was needed last.
    page: Option<(u32, Vec<ChunkEntry>)>,
    workers: Vec<Worker>,
    compressor: Option<Compressor>,
}

/// One thread's buffers.
#[derive(Default)]
struct Worker {
    loader: Loader,
    raw: Vec<u8>,
    around: Vec<u8>,
}

/// What is answered of a chunk, and its bytes that were guessed wrong.
type Judged = (State, Vec<u8>);

impl<R: ReadAt> Replier<R> {
    /// For the image in `source`, with as many workers as there are cores.
    ///
    /// # Errors
    /// What is wrong with the image.
    pub fn open(source: R) -> Result<Self, ContainerError> {
        let threads = crate::pipeline::default_threads().min(MOST_THREADS);
        Ok(Replier {
            image: Image::open(source)?,
            page: None,
            workers: (0..threads).map(|_| Worker::default()).collect(),
            compressor: None,
        })
    }

    /// The reply to a question.
    ///
    /// # Errors
    /// [`NoReply`]. A chunk that cannot be read has one: its bytes will show what is wrong with it.
    pub fn reply(&mut self, question: &[u8]) -> Result<Vec<u8>, NoReply> {
        let Question(asked) = Question::parse(question).ok_or(NoReply::Unclear)?;
        let mut entries = Vec::with_capacity(asked.len());
        let mut raw_len = 0;
        for asked in &asked {
            let entry = self.entry(asked.chunk)?;
            raw_len += entry.raw_len as usize;
            if raw_len > MAX_RAW_LEN && !entries.is_empty() {
                return Err(NoReply::TooMuch);
            }
            entries.push(entry);
        }
        let judged = self.judge_all(&asked, &entries)?;
        let mut states = Vec::with_capacity(asked.len());
        let mut rest: Vec<u8> = Vec::new();
        let mut judged = judged.into_iter();
        for (state, bytes) in judged.by_ref().map_while(|it| it) {
            if rest.len() + bytes.len() > MAX_REST_LEN {
                break;
            }
            states.push(state);
            rest.extend_from_slice(&bytes);
        }
        states.resize(asked.len(), State::Later);
        let mut reply = Reply::write_states(&states);
        if !rest.is_empty() {
            let compressor = match &mut self.compressor {
                Some(compressor) => compressor,
                none => none.insert(Compressor::new(LEVEL).map_err(PipelineError::Codec)?),
            };
            let mut frame = Vec::new();
            let made = compressor.compress(&rest, &mut frame);
            made.map_err(PipelineError::Codec)?;
            reply.extend_from_slice(&frame);
        }
        Ok(reply)
    }

    fn entry(&mut self, chunk: ChunkIndex) -> Result<ChunkEntry, ContainerError> {
        let missing = ContainerError::NoSuchChunk {
            chunk,
            chunk_count: self.image.chunk_count(),
        };
        if chunk.0 >= self.image.chunk_count() {
            return Err(missing);
        }
        let per_page = u64::from(ENTRIES_PER_PAGE);
        let number = u32::try_from(chunk.0 / per_page).unwrap_or(u32::MAX);
        let entries = match &mut self.page {
            Some((kept, entries)) if *kept == number => entries,
            page => &mut page.insert((number, self.image.table_page(number)?)).1,
        };
        let index = usize::try_from(chunk.0 % per_page).unwrap_or(usize::MAX);
        entries.get(index).copied().ok_or(missing)
    }

    /// What is to be answered of each chunk; `None` of those behind the one with which a reply is full.
    fn judge_all(
        &mut self,
        asked: &[Asked],
        entries: &[ChunkEntry],
    ) -> Result<Vec<Option<Judged>>, PipelineError> {
        let next = AtomicUsize::new(0);
        let rest_len = AtomicUsize::new(0);
        let judged: Vec<Mutex<Option<Judged>>> = asked.iter().map(|_| Mutex::default()).collect();
        let image = &self.image;
        let work = |worker: &mut Worker| {
            while rest_len.load(Ordering::Relaxed) <= MAX_REST_LEN {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some((asked, entry)) = asked.get(index).zip(entries.get(index)) else {
                    return;
                };
                let found = worker.judge(image, asked, entry);
                rest_len.fetch_add(found.1.len(), Ordering::Relaxed);
                *judged[index].lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
            }
        };
        let count = self.workers.len().min(asked.len());
        let (first, others) = self.workers[..count].split_at_mut(1);
        thread::scope(|scope| {
            let others: Vec<_> = others
                .iter_mut()
                .map(|worker| scope.spawn(|| work(worker)))
                .collect();
            first.iter_mut().for_each(work);
            let ended = others.into_iter().map(thread::ScopedJoinHandle::join);
            ended.collect::<Result<Vec<()>, _>>()
        })
        .map_err(|_| PipelineError::Worker)?;
        let judged = judged.into_iter();
        Ok(judged
            .map(|it| it.into_inner().unwrap_or_else(PoisonError::into_inner))
            .collect())
    }
}

impl Worker {
    fn judge<R: ReadAt>(&mut self, image: &Image<R>, asked: &Asked, entry: &ChunkEntry) -> Judged {
        let whole = (State::Whole, Vec::new());
        let raw_len = entry.raw_len as usize;
        let end = asked
            .pieces
            .last()
            .map_or(0, |last| *last as usize + PIECE_LEN);
        grow(&mut self.raw, raw_len);
        let raw = &mut self.raw[..raw_len];
        if end > raw_len || self.loader.load(image, entry, raw).is_err() {
            return whole;
        }
        let digest = &entry.raw_digest;
        let mut bits = vec![0u8; (asked.pieces.len() + 1).div_ceil(8)];
        let mut rest = Vec::new();
        if hash_around(digest, raw, &asked.pieces, &mut self.around) != asked.around {
            bits[0] |= 1;
            around(raw, &asked.pieces).for_each(|bytes| rest.extend_from_slice(bytes));
        }
        for (index, (piece, hash)) in (1..).zip(asked.pieces.iter().zip(&asked.hashes)) {
            let bytes = &raw[*piece as usize..*piece as usize + PIECE_LEN];
            if short_hash(digest, bytes) != *hash {
                bits[index / 8] |= 1 << (index % 8);
                rest.extend_from_slice(bytes);
            }
        }
        let saves = entry.kind == ChunkKind::Plain || rest.len() / WORTH <= raw_len / 8;
        match saves && rest.len() <= MAX_REST_LEN {
            true => (State::Wrong(bits), rest),
            false => whole,
        }
    }
}
