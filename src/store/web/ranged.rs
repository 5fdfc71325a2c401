//! A file behind a server, read by ranges: the same version of it as when it was opened, or none.
//!
//! Its last [`TAIL_LEN`] bytes come when it is opened, for that is where an image says what it holds. Everything else comes in
//! blocks, which are kept for a while; whoever reads on where blocks are already gets more of them at once. So
//! small reads cost no request each, and a reader from front to end takes few.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use ureq::http::Method;

use super::client::{Answer, Ask, Client, Fault, may_pass, persist, server_of};
use super::error::WebError;
use crate::bytes::ReadAt;
use crate::error::Error;
use crate::store::FarFile;

/// Bytes at the end that are read at once and kept.
const TAIL_LEN: u64 = 256 << 10;

/// Small, for who jumps about wants little: `inspect` of an image of layout `mapped` reads ten times some bytes.
const BLOCK_LEN: u64 = 32 << 10;

/// The most blocks that one request is for, unless one reader wants more.
const MAX_RUN: u64 = 64;

/// Blocks that are kept.
const MAX_KEPT: usize = 768;

/// Where a file is, and how it is asked for.
pub trait Origin: fmt::Debug + Send + Sync {
    /// The location, as a person writes it.
    fn there(&self) -> &str;

    /// An address that serves for one request from now.
    fn url(&self, method: &Method) -> String;

    /// The header that makes the server refuse, or send all, if it is not this version any more.
    fn condition(&self, version: &Version) -> Option<(&'static str, String)>;

    /// What an answer means that is no success.
    fn refusal(&self, status: u16, text: &str) -> WebError;

    /// Through which it is asked.
    fn client(&self) -> &Client;
}

/// Which version of a file it is, as far as the server tells.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Version {
    /// `ETag`, with its quotes.
    pub etag: Option<String>,
    /// `Last-Modified`.
    pub modified: Option<String>,
}

impl Version {
    fn of(answer: &Answer) -> Self {
        let header = |name| answer.header(name).map(str::to_owned);
        Version {
            // An empty one says nothing.
            etag: header("etag").filter(|etag| !etag.trim_matches('"').is_empty()),
            modified: header("last-modified"),
        }
    }

    /// The ETag, if it is one that vouches for every byte.
    pub fn strong_etag(&self) -> Option<&str> {
        let etag = self.etag.as_deref();
        etag.filter(|etag| etag.starts_with('"'))
    }

    /// In what `now` differs; `None` if it does not, as far as can be told.
    fn changed(&self, now: &Version) -> Option<String> {
        let differ = |name: &str, before: &Option<String>, now: &Option<String>| {
            let (before, now) = before.as_ref().zip(now.as_ref())?;
            Some((before != now).then(|| {
                let [before, now] = [before, now].map(|it| it.trim_matches('"'));
                format!("its {name} was \"{before}\" when opened and is \"{now}\" now")
            }))
        };
        differ("ETag", &self.etag, &now.etag)
            .or_else(|| differ("Last-Modified", &self.modified, &now.modified))
            .flatten()
    }
}

/// A file of a server.
#[derive(Debug)]
pub struct RangedFile {
    origin: Box<dyn Origin>,
    len: u64,
    version: Version,
    tail: Vec<u8>,
    kept: Mutex<Kept>,
    arrived: Condvar,
    failed: Mutex<Option<WebError>>,
}

/// Blocks that are here or on their way.
#[derive(Default)]
struct Kept {
    blocks: HashMap<u64, Block>,
    clock: u64,
    /// How many blocks the next request is for that goes on where others are.
    run: u64,
}

enum Block {
    Coming,
    Here { bytes: Arc<[u8]>, used: u64 },
}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kept({} blocks)", self.blocks.len())
    }
}

impl RangedFile {
    /// Asks for its length and version, and reads its end.
    ///
    /// # Errors
    /// [`WebError`]: it is not there, the server does not let us or cannot be reached, or gives no ranges.
    pub fn open(origin: Box<dyn Origin>) -> Result<Self, WebError> {
        let (len, version) = persist(false, &|| false, || head(&*origin))?;
        let mut file = RangedFile {
            origin,
            len,
            version,
            tail: Vec::new(),
            kept: Mutex::default(),
            arrived: Condvar::new(),
            failed: Mutex::new(None),
        };
        let mut tail = vec![0; usize::try_from(len.min(TAIL_LEN)).unwrap_or(0)];
        if len > 0 {
            let range = len - tail.len() as u64..len;
            let version = file.fetch(&range, &mut tail, false)?;
            file.version.etag = file.version.etag.or(version.etag);
            file.version.modified = file.version.modified.or(version.modified);
        }
        file.tail = tail;
        Ok(file)
    }

    /// Reads one range; gives the version that the server names with it.
    fn fetch(
        &self,
        range: &Range<u64>,
        buf: &mut [u8],
        was_heard: bool,
    ) -> Result<Version, WebError> {
        let outcome = persist(was_heard, &|| self.failure_here().is_some(), || {
            self.fetch_once(range, buf)
        });
        if let (Err(error), true) = (&outcome, was_heard) {
            self.failed_here().get_or_insert_with(|| error.clone());
        }
        outcome
    }

    fn fetch_once(&self, range: &Range<u64>, buf: &mut [u8]) -> Result<Version, Fault> {
        let origin = &*self.origin;
        let mut headers = vec![("range", format!("bytes={}-{}", range.start, range.end - 1))];
        headers.extend(origin.condition(&self.version));
        let url = origin.url(&Method::GET);
        let answer = origin.client().ask(get(&url, &headers))?;
        let now = Version::of(&answer);
        let content_range = answer.header("content-range").and_then(parse_range);
        match (answer.status, content_range) {
            (200 | 206, Some((found, total))) => {
                self.check_version(&now)?;
                if total.is_some_and(|total| total != self.len) {
                    return Err(self.changed_len(total.unwrap_or(0)).into());
                }
                if found != *range {
                    return Err(self.nonsense("another range than the one asked for").into());
                }
            }
            (200, None) => {
                self.check_version(&now)?;
                if *range != (0..self.len) {
                    let there = origin.there().to_owned();
                    return Err(WebError::NoRanges { there }.into());
                }
            }
            (206, None) => return Err(self.nonsense("a part that does not say which").into()),
            _ => return Err(self.refused(answer)),
        }
        if answer
            .header("content-encoding")
            .is_some_and(|it| it != "identity")
        {
            return Err(self.nonsense("bytes in another encoding").into());
        }
        let broken = |error: io::Error| {
            Fault::Passing(WebError::Broken {
                server: server_of(&url),
                why: error.to_string(),
            })
        };
        answer.read_into(buf).map_err(broken)?;
        Ok(now)
    }

    /// An answer that brings nothing. What was there when it was opened is gone, or is another one.
    fn refused(&self, answer: Answer) -> Fault {
        let status = answer.status;
        let there = || self.origin.there().to_owned();
        let was_open = !self.tail.is_empty();
        let text = answer.text().unwrap_or_default();
        let error = self.origin.refusal(status, &text);
        match (status, &error) {
            (412 | 416, _) => Fault::Final(self.what_changed()),
            (_, WebError::Missing { .. } | WebError::NoBucket { .. }) if was_open => {
                Fault::Final(WebError::Vanished { there: there() })
            }
            _ if may_pass(status) => Fault::Passing(error),
            _ => Fault::Final(error),
        }
    }

    /// What became of it: asks once more.
    fn what_changed(&self) -> WebError {
        match head(&*self.origin) {
            Ok((len, now)) => match self.version.changed(&now) {
                Some(how) => self.changed(how),
                None if len != self.len => self.changed_len(len),
                None => self.changed("the server says so".to_owned()),
            },
            Err(Fault::Final(WebError::Missing { .. })) => WebError::Vanished {
                there: self.origin.there().to_owned(),
            },
            Err(_) => self.changed("the server says so".to_owned()),
        }
    }

    fn check_version(&self, now: &Version) -> Result<(), WebError> {
        match self.version.changed(now) {
            Some(how) => Err(self.changed(how)),
            None => Ok(()),
        }
    }

    fn changed(&self, how: String) -> WebError {
        let there = self.origin.there().to_owned();
        WebError::Changed { there, how }
    }

    fn changed_len(&self, now: u64) -> WebError {
        self.changed(format!("it was {} bytes long and has {now} now", self.len))
    }

    fn nonsense(&self, what: &str) -> WebError {
        nonsense(&*self.origin, what)
    }

    fn failed_here(&self) -> MutexGuard<'_, Option<WebError>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failure_here(&self) -> Option<WebError> {
        self.failed_here().clone()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tail_start(&self) -> u64 {
        self.len - self.tail.len() as u64
    }

    /// The bytes of one block. Who asks wants all up to the block `until`.
    fn block(&self, block: u64, until: u64) -> Result<Arc<[u8]>, WebError> {
        let mut kept = self.kept();
        let run = loop {
            if let Some(error) = self.failure_here() {
                return Err(error);
            }
            match kept.take(block) {
                Some(Some(bytes)) => return Ok(bytes),
                // Somebody else asked for it.
                Some(None) => {
                    kept = self
                        .arrived
                        .wait(kept)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                None => break kept.begin(block, until, self.tail_start().div_ceil(BLOCK_LEN)),
            }
        };
        drop(kept);
        let range = block * BLOCK_LEN..(run * BLOCK_LEN).min(self.len);
        let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap_or(0)];
        let fetched = self.fetch(&range, &mut bytes, true);
        let mut kept = self.kept();
        let outcome = match fetched {
            Ok(_) => Ok(kept.put(block, &bytes)),
            Err(error) => {
                (block..run).for_each(|block| drop(kept.blocks.remove(&block)));
                Err(error)
            }
        };
        self.arrived.notify_all();
        outcome
    }
}

impl Kept {
    /// A block; `Some(None)` if it is on its way.
    fn take(&mut self, block: u64) -> Option<Option<Arc<[u8]>>> {
        self.clock += 1;
        match self.blocks.get_mut(&block)? {
            Block::Coming => Some(None),
            Block::Here { bytes, used } => {
                *used = self.clock;
                Some(Some(Arc::clone(bytes)))
            }
        }
    }

    /// Notes that blocks from `block` on are on their way; gives the first that is not. `wanted` blocks have to be, and there
    /// are `all`.
    fn begin(&mut self, block: u64, wanted: u64, all: u64) -> u64 {
        let goes_on = block
            .checked_sub(1)
            .is_some_and(|before| self.blocks.contains_key(&before));
        self.run = match goes_on {
            true => (self.run * 4).clamp(1, MAX_RUN),
            false => 1,
        };
        let most = (wanted.min(block + MAX_RUN))
            .max(block + self.run)
            .min(all.max(block + 1));
        let end = (block + 1..most)
            .find(|next| self.blocks.contains_key(next))
            .unwrap_or(most);
        for coming in block..end {
            self.blocks.insert(coming, Block::Coming);
        }
        end
    }

    /// Keeps the blocks that came, and gives the first; those that were not used for longest go.
    fn put(&mut self, first: u64, bytes: &[u8]) -> Arc<[u8]> {
        self.clock += 1;
        let pieces = bytes.chunks(usize::try_from(BLOCK_LEN).unwrap_or(usize::MAX));
        let mut given = None;
        for (block, piece) in (first..).zip(pieces) {
            let bytes: Arc<[u8]> = Arc::from(piece);
            given.get_or_insert_with(|| Arc::clone(&bytes));
            let used = self.clock;
            self.blocks.insert(block, Block::Here { bytes, used });
        }
        while self.blocks.len() > MAX_KEPT {
            let here = self.blocks.iter().filter_map(|(block, state)| match state {
                Block::Here { used, .. } => Some((*used, *block)),
                Block::Coming => None,
            });
            match here.min() {
                Some((_, oldest)) => self.blocks.remove(&oldest),
                None => break,
            };
        }
        given.unwrap_or_default()
    }
}

impl ReadAt for RangedFile {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        let Some(end) = end.filter(|end| *end <= self.len) else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        let tail_start = self.tail_start();
        let (mut at, mut rest) = (offset, buf);
        let blocks_end = end.min(tail_start);
        while at < blocks_end {
            let block = at / BLOCK_LEN;
            let bytes = self
                .block(block, blocks_end.div_ceil(BLOCK_LEN))
                .map_err(io::Error::other)?;
            let start = usize::try_from(at % BLOCK_LEN).unwrap_or(0);
            let len = usize::try_from(blocks_end - at).unwrap_or(usize::MAX);
            let piece = bytes.get(start..).unwrap_or_default();
            let piece = &piece[..piece.len().min(len)];
            if piece.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let (filled, behind) = rest.split_at_mut(piece.len());
            filled.copy_from_slice(piece);
            at += piece.len() as u64;
            rest = behind;
        }
        if !rest.is_empty() {
            let start = usize::try_from(at - tail_start).unwrap_or(usize::MAX);
            rest.copy_from_slice(&self.tail[start..start + rest.len()]);
        }
        Ok(())
    }
}

impl FarFile for RangedFile {
    fn failure(&self) -> Option<Error> {
        self.failure_here().map(Error::from)
    }
}

/// Length and version.
fn head(origin: &dyn Origin) -> Result<(u64, Version), Fault> {
    let url = origin.url(&Method::HEAD);
    let ask = Ask {
        method: Method::HEAD,
        ..get(&url, &[])
    };
    let answer = origin.client().ask(ask)?;
    let len = answer.number("content-length");
    if let (200, Some(len)) = (answer.status, len) {
        return Ok((len, Version::of(&answer)));
    }
    if may_pass(answer.status) {
        return Err(Fault::Passing(origin.refusal(answer.status, "")));
    }
    // An answer to HEAD has no words, and some servers know only GET.
    let url = origin.url(&Method::GET);
    let headers = [("range", "bytes=0-0".to_owned())];
    let answer = origin.client().ask(get(&url, &headers))?;
    let content_range = answer.header("content-range").and_then(parse_range);
    match (answer.status, content_range) {
        (200 | 206, Some((_, Some(total)))) => Ok((total, Version::of(&answer))),
        (416, _) => Ok((0, Version::of(&answer))),
        (200, _) => {
            let there = origin.there().to_owned();
            Err(WebError::NoRanges { there }.into())
        }
        (206, _) => Err(nonsense(origin, "a length that is none").into()),
        (status, _) => {
            let text = answer.text().unwrap_or_default();
            let error = origin.refusal(status, &text);
            Err(match may_pass(status) {
                true => Fault::Passing(error),
                false => Fault::Final(error),
            })
        }
    }
}

fn nonsense(origin: &dyn Origin, what: &str) -> WebError {
    WebError::Nonsense {
        server: server_of(&origin.url(&Method::GET)),
        what: what.to_owned(),
    }
}

fn get<'a>(url: &'a str, headers: &'a [(&'static str, String)]) -> Ask<'a, 'static> {
    Ask {
        method: Method::GET,
        url,
        headers,
        body: None,
        patience: None,
    }
}

/// `bytes FIRST-LAST/TOTAL`; the total may be `*`.
fn parse_range(text: &str) -> Option<(Range<u64>, Option<u64>)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    let end = last.checked_add(1).filter(|end| *end > first)?;
    Some((first..end, total.parse().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_understood_or_not_believed() {
        assert_eq!(parse_range("bytes 0-9/10"), Some((0..10, Some(10))));
        assert_eq!(parse_range("bytes 5-5/*"), Some((5..6, None)));
        for text in [
            "",
            "bytes */10",
            "bytes 5-4/10",
            "bytes 0-18446744073709551615/1",
            "0-9/10",
        ] {
            assert_eq!(parse_range(text), None, "{text}");
        }
    }

    #[test]
    fn who_reads_on_gets_more_at_once_and_who_jumps_does_not() {
        let mut kept = Kept::default();
        assert_eq!(kept.begin(0, 1, 1000), 1);
        assert_eq!(kept.begin(1, 2, 1000), 5);
        assert_eq!(kept.begin(5, 6, 1000), 21);
        assert_eq!(kept.begin(21, 22, 1000), 85);
        assert_eq!(kept.begin(85, 86, 1000), 149);
        assert_eq!(kept.begin(500, 501, 1000), 501);
        // As much as is wanted, no more than there are, and nothing twice.
        assert_eq!(kept.begin(700, 720, 1000), 720);
        assert_eq!(kept.begin(999, 1000, 1000), 1000);
        assert_eq!(kept.begin(499, 520, 1000), 500);
    }

    #[test]
    fn what_was_not_used_for_longest_goes() {
        let mut kept = Kept::default();
        let most = MAX_KEPT as u64;
        for block in 0..most + 8 {
            assert_eq!(kept.begin(block * 2, 0, u64::MAX), block * 2 + 1);
            let _ = kept.put(block * 2, &[1; 3]);
            assert!(kept.take(0).is_some());
        }
        assert_eq!(kept.blocks.len(), MAX_KEPT);
        assert!(kept.take(2).is_none());
    }

    #[test]
    fn versions_differ_by_what_both_have() {
        let version = |etag: Option<&str>, modified: Option<&str>| Version {
            etag: etag.map(str::to_owned),
            modified: modified.map(str::to_owned),
        };
        let before = version(Some("\"a\""), Some("Monday"));
        assert_eq!(
            before.changed(&version(Some("\"a\""), Some("Tuesday"))),
            None
        );
        assert_eq!(before.changed(&Version::default()), None);
        let how = before.changed(&version(Some("\"b\""), None)).unwrap();
        assert_eq!(how, "its ETag was \"a\" when opened and is \"b\" now");
        let how = before.changed(&version(None, Some("Tuesday"))).unwrap();
        assert!(how.contains("Last-Modified"), "{how}");
    }
}
