//! An image on its way to a place that keeps pieces by their digests: read, verified, and only then sent.
//!
//! Every worker takes the next [`Load`]: a piece of the file that travels as one. It reads it once, holds each chunk in it against
//! checksum and digest, and hands it on as a [`Parcel`] with the digest of its bytes. What is not longer than [`KEEP_LEN`] is kept
//! meanwhile, what is longer is read again when it is sent. So each worker has one such buffer and those of some chunks.

use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;

use super::PipelineError;
use super::fetch::{ChunkTable, MOST_AT_ONCE};
use super::groups::Group;
use super::load::{Loader, grow};
use crate::bytes::ReadAt;
use crate::container::{ChunkEntry, ContainerError, Image};
use crate::digest::{Digest, Hasher};
use crate::progress::Progress;
use crate::rate::RateLimit;
use crate::units::FileOffset;

/// Bytes of a load that are kept until it is sent.
pub const KEEP_LEN: u64 = 16 << 20;

/// Bytes that are read at once.
const PIECE: u64 = 1 << 20;

/// Bytes of a parcel that are given out at once.
const SENT_PIECE: usize = 64 << 10;

/// A piece of the file that travels as one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Load {
    /// What its chunks are; `None`: no chunks, and verified already.
    pub group: Option<Group>,
    /// What comes before the file's bytes.
    pub header: Vec<u8>,
    /// Where those lie in the file, offset and length each, in order.
    pub extents: Vec<(u64, u64)>,
}

impl Load {
    /// Bytes that travel.
    pub fn len(&self) -> u64 {
        self.header.len() as u64 + self.stored_len()
    }

    /// Whether nothing travels.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of the file.
    fn stored_len(&self) -> u64 {
        self.extents.iter().map(|(_, len)| len).sum()
    }
}

/// Where bytes come from, and how they go.
pub struct Sending<'a, S: ReadAt> {
    /// The image's file.
    pub source: &'a S,
    /// Workers.
    pub threads: usize,
    /// Bytes a second that are sent, at most.
    pub bytes_per_second: Option<u64>,
}

/// What became of a load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sent {
    /// Of its bytes.
    pub digest: Digest,
    /// Whether they were sent: they may have been there.
    pub was_sent: bool,
}

/// Verifies all loads and has `send` send them, several at a time; it says whether it did. `progress` is told their bytes.
///
/// # Errors
/// The first error, as it came from `send` or a [`PipelineError`].
pub fn send_parcels<S: ReadAt, R: ReadAt, E: From<PipelineError> + Send>(
    sending: &Sending<'_, S>,
    table: &ChunkTable<'_, R>,
    loads: &[Load],
    send: &(dyn Fn(&Parcel<'_>) -> Result<bool, E> + Sync),
    progress: &dyn Progress,
) -> Result<Vec<Sent>, E> {
    let next = AtomicUsize::new(0);
    let is_over = AtomicBool::new(false);
    let rate = RateLimit::new(sending.bytes_per_second);
    let work = || {
        let mut worker = Worker {
            source: sending.source,
            buffers: Buffers::default(),
        };
        let mut done = Vec::new();
        while !is_over.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(load) = loads.get(index) else {
                break;
            };
            let outcome = match progress.is_cancelled() {
                true => Err(PipelineError::Cancelled.into()),
                false => worker.handle(load, table, send, &rate, progress),
            };
            match outcome {
                Ok(sent) => done.push((index, sent)),
                Err(error) => {
                    is_over.store(true, Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
        Ok(done)
    };
    let outcomes = thread::scope(|scope| {
        let workers = (0..sending.threads.max(1)).map(|_| scope.spawn(work));
        let workers: Vec<_> = workers.collect();
        let outcomes = workers.into_iter().map(thread::ScopedJoinHandle::join);
        outcomes.collect::<Result<Vec<_>, _>>()
    });
    let outcomes: Result<Vec<_>, E> = outcomes
        .map_err(|_| E::from(PipelineError::Worker))?
        .into_iter()
        .collect();
    let mut done: Vec<(usize, Sent)> = outcomes?.concat();
    done.sort_by_key(|(index, _)| *index);
    Ok(done.into_iter().map(|(_, sent)| sent).collect())
}

/// One thread's.
struct Worker<'a, S: ReadAt> {
    source: &'a S,
    buffers: Buffers,
}

#[derive(Default)]
struct Buffers {
    kept: Vec<u8>,
    verifier: Verifier,
}

impl<S: ReadAt> Worker<'_, S> {
    fn handle<R: ReadAt, E: From<PipelineError>>(
        &mut self,
        load: &Load,
        table: &ChunkTable<'_, R>,
        send: &(dyn Fn(&Parcel<'_>) -> Result<bool, E> + Sync),
        rate: &RateLimit,
        progress: &dyn Progress,
    ) -> Result<Sent, E> {
        let digest = self.read(load, table, progress)?;
        let is_kept = load.stored_len() <= KEEP_LEN;
        let parcel = Parcel {
            digest,
            load,
            kept: is_kept.then_some(self.buffers.kept.as_slice()),
            source: self.source,
            rate,
            progress,
            told: AtomicU64::new(0),
        };
        let was_sent = send(&parcel)?;
        progress.advance(load.len() - parcel.told.load(Ordering::Relaxed).min(load.len()));
        Ok(Sent { digest, was_sent })
    }

    /// Reads and verifies a load, and keeps it if it is small enough; gives the digest of all its bytes.
    fn read<R: ReadAt>(
        &mut self,
        load: &Load,
        table: &ChunkTable<'_, R>,
        progress: &dyn Progress,
    ) -> Result<Digest, PipelineError> {
        let mut hasher = Hasher::new();
        hasher.update(&load.header);
        let mut entries = Vec::new();
        for chunk in load.group.iter().flat_map(Group::chunks) {
            entries.push(table.entry(chunk)?);
        }
        let is_kept = load.stored_len() <= KEEP_LEN;
        let Buffers { kept, verifier } = &mut self.buffers;
        kept.clear();
        for piece in pieces(load, &entries) {
            if progress.is_cancelled() {
                return Err(PipelineError::Cancelled);
            }
            let start = kept.len();
            let (at, source) = (FileOffset(piece.at), self.source);
            kept.resize(start + piece.len, 0);
            source
                .read_exact_at(&mut kept[start..], piece.at)
                .map_err(|source| ContainerError::Read { at, source })?;
            verifier.verify(table.image(), piece.entries, &kept[start..])?;
            hasher.update(&kept[start..]);
            if !is_kept {
                kept.clear();
            }
        }
        Ok(hasher.finish())
    }
}

/// Bytes that are read at once, and the chunks that they are.
struct Piece<'a> {
    at: u64,
    len: usize,
    entries: &'a [ChunkEntry],
}

fn pieces<'a>(load: &Load, entries: &'a [ChunkEntry]) -> Vec<Piece<'a>> {
    if load.group.is_none() {
        let cut = |(at, len): &(u64, u64)| {
            let (at, end) = (*at, at + len);
            let step = usize::try_from(PIECE).unwrap_or(usize::MAX);
            (at..end).step_by(step).map(move |at| Piece {
                at,
                len: usize::try_from((end - at).min(PIECE)).unwrap_or(0),
                entries: &[],
            })
        };
        return load.extents.iter().flat_map(cut).collect();
    }
    let mut pieces = Vec::new();
    let mut rest = entries;
    while let Some(first) = rest.first() {
        let (at, mut end, mut count) = (first.stored_offset.0, end_of(first), 1);
        while let Some(entry) = rest.get(count).filter(|_| count < MOST_AT_ONCE) {
            if entry.stored_offset.0 != end || end_of(entry) - at > PIECE {
                break;
            }
            end = end_of(entry);
            count += 1;
        }
        let (entries, behind) = rest.split_at(count);
        let len = usize::try_from(end - at).unwrap_or(usize::MAX);
        pieces.push(Piece { at, len, entries });
        rest = behind;
    }
    pieces
}

fn end_of(entry: &ChunkEntry) -> u64 {
    let len = u64::from(entry.stored_len);
    entry.stored_offset.0.saturating_add(len)
}

/// Holds stored bytes of some chunks against checksums and digests.
#[derive(Default)]
struct Verifier {
    loader: Loader,
    raw: [Vec<u8>; MOST_AT_ONCE],
}

impl Verifier {
    fn verify<R: ReadAt>(
        &mut self,
        image: &Image<R>,
        entries: &[ChunkEntry],
        stored: &[u8],
    ) -> Result<(), ContainerError> {
        let mut rest = stored;
        for (entry, raw) in entries.iter().zip(&mut self.raw) {
            let (stored, behind) = rest.split_at(entry.stored_len as usize);
            rest = behind;
            let len = entry.raw_len as usize;
            grow(raw, len);
            self.loader.unpack(image, entry, stored, &mut raw[..len])?;
        }
        let filled = entries.iter().zip(&self.raw);
        let raw: Vec<&[u8]> = filled
            .map(|(entry, raw)| &raw[..entry.raw_len as usize])
            .collect();
        for (entry, digest) in entries.iter().zip(Digest::of_each(&raw)) {
            entry.check_digest(digest)?;
        }
        Ok(())
    }
}

/// Verified bytes, ready to be sent.
pub struct Parcel<'a> {
    /// Of all of them.
    pub digest: Digest,
    load: &'a Load,
    kept: Option<&'a [u8]>,
    source: &'a dyn ReadAt,
    rate: &'a RateLimit,
    progress: &'a dyn Progress,
    /// Bytes that progress was told of.
    told: AtomicU64,
}

impl Parcel<'_> {
    /// How many they are.
    pub fn len(&self) -> u64 {
        self.load.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.load.is_empty()
    }

    /// All of them from the beginning, as quickly as they may be sent. It fails once the user asked to stop.
    pub fn body(&self) -> ParcelBody<'_> {
        ParcelBody {
            parcel: self,
            at: 0,
        }
    }

    /// Fills `buf` with what lies at `at`, as much as lies beside each other; gives how much.
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<usize> {
        let header = &self.load.header;
        let from = usize::try_from(at).unwrap_or(usize::MAX);
        let Some(mut at) = at.checked_sub(header.len() as u64) else {
            return (&header[from..]).read(buf);
        };
        if let Some(kept) = self.kept {
            return kept
                .get(from - header.len()..)
                .unwrap_or_default()
                .read(buf);
        }
        for (offset, len) in &self.load.extents {
            if at < *len {
                let left = usize::try_from(len - at).map_or(buf.len(), |left| left.min(buf.len()));
                self.source.read_exact_at(&mut buf[..left], offset + at)?;
                return Ok(left);
            }
            at -= len;
        }
        Ok(0)
    }
}

/// The bytes of a [`Parcel`].
pub struct ParcelBody<'a> {
    parcel: &'a Parcel<'a>,
    at: u64,
}

impl Read for ParcelBody<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let parcel = self.parcel;
        let most = buf.len().min(SENT_PIECE);
        let read = parcel.read_at(&mut buf[..most], self.at)?;
        let is_over = || parcel.progress.is_cancelled();
        parcel.rate.wait_for(read, &is_over);
        if is_over() {
            return Err(io::Error::other(PipelineError::Cancelled));
        }
        self.at += read as u64;
        let told = parcel.told.fetch_max(self.at, Ordering::Relaxed);
        parcel.progress.advance(self.at.saturating_sub(told));
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Silent;

    fn body(load: &Load, kept: Option<&[u8]>, source: &Vec<u8>) -> Vec<u8> {
        let parcel = Parcel {
            digest: Digest::default(),
            load,
            kept,
            source,
            rate: &RateLimit::new(None),
            progress: &Silent,
            told: AtomicU64::new(0),
        };
        let mut bytes = Vec::new();
        parcel.body().read_to_end(&mut bytes).unwrap();
        assert_eq!(parcel.told.load(Ordering::Relaxed), parcel.len());
        bytes
    }

    #[test]
    fn a_parcel_gives_the_same_bytes_whether_they_were_kept_or_not() {
        let source: Vec<u8> = (0..200).collect();
        let load = Load {
            group: None,
            header: b"head".to_vec(),
            extents: vec![(10, 3), (50, 1), (100, 100)],
        };
        let stored = [&source[10..13], &source[50..51], &source[100..200]].concat();
        let expected = [b"head", stored.as_slice()].concat();
        assert_eq!(body(&load, Some(&stored), &source), expected);
        assert_eq!(body(&load, None, &source), expected);
    }
}
