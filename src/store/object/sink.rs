//! An object that is written as it comes, and appears when it is whole.
//!
//! What is appended goes out in parts; who appends waits for each. Parts grow with what was written, since there may be ten
//! thousand.

use std::io;

use super::bucket::Bucket;
use super::upload::{PartDigest, Upload};
use crate::bytes::{PublishError, Sink};
use crate::store::ObjectLocation;
use crate::store::web::WebError;

/// Numbers of parts up to which they have a length.
const PART_LENS: [(usize, usize); 3] = [(1000, 8 << 20), (3000, 32 << 20), (10_000, 64 << 20)];

/// Appends to an upload. One that is not published ends with it, and nothing is left in the store.
#[derive(Debug)]
pub struct ObjectSink {
    bucket: Bucket,
    id: String,
    may_replace: bool,
    pending: Vec<u8>,
    written: u64,
    parts: Vec<(u32, String)>,
    /// Nothing is to be ended any more.
    is_settled: bool,
}

impl ObjectSink {
    /// Sees that nothing is there, and begins.
    ///
    /// # Errors
    /// [`WebError`].
    pub fn create(there: &ObjectLocation, may_replace: bool) -> Result<Self, WebError> {
        let bucket = Bucket::of(there)?;
        if !may_replace && bucket.object()?.is_some() {
            let there = bucket.there().to_owned();
            return Err(WebError::Exists { there });
        }
        let id = bucket.begin()?;
        Ok(ObjectSink {
            bucket,
            id,
            may_replace,
            pending: Vec::new(),
            written: 0,
            parts: Vec::new(),
            is_settled: false,
        })
    }

    fn upload(&self) -> Upload<'_> {
        Upload::new(&self.bucket, &self.id)
    }

    /// The length of the next part; `None` if there may be no more.
    fn part_len(&self) -> Option<usize> {
        let count = self.parts.len();
        let fits = PART_LENS.iter().find(|(most, _)| count < *most);
        fits.map(|(_, len)| *len)
    }

    fn send(&mut self, len: usize) -> io::Result<()> {
        let number = u32::try_from(self.parts.len() + 1).unwrap_or(u32::MAX);
        let bytes = &self.pending[..len];
        let digest = PartDigest::of(bytes);
        let body = || Box::new(bytes) as Box<dyn io::Read>;
        let sent = self
            .upload()
            .put(number, len as u64, &digest, &|| false, &body);
        let etag = sent.map_err(io::Error::other)?;
        self.parts.push((number, etag));
        self.pending.drain(..len);
        self.written += len as u64;
        Ok(())
    }
}

impl Sink for ObjectSink {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let Some(part_len) = self.part_len() else {
                let limit = self.written;
                let len = limit.saturating_add(rest.len() as u64);
                return Err(io::Error::other(WebError::TooLarge { len, limit }));
            };
            let room = part_len.saturating_sub(self.pending.len());
            let (fits, behind) = rest.split_at(room.min(rest.len()));
            self.pending.extend_from_slice(fits);
            rest = behind;
            if self.pending.len() >= part_len {
                self.send(part_len)?;
            }
        }
        Ok(())
    }

    /// A part that a store acknowledged is as durable as its objects are.
    fn sync(&mut self) -> io::Result<()> {
        match self.pending.len() {
            0 => Ok(()),
            len => self.send(len),
        }
    }

    fn publish(&mut self) -> Result<(), PublishError> {
        let completed = self.upload().complete(&self.parts, self.may_replace);
        let Err(error) = completed else {
            self.is_settled = true;
            return Ok(());
        };
        let may_be_there = match &error {
            // It may have been completed by a try whose answer was lost.
            WebError::UploadEnded { .. } | WebError::Missing { .. } => true,
            WebError::Broken { .. }
            | WebError::Unreachable { .. }
            | WebError::Status { status: 500.., .. } => {
                !matches!(self.upload().parts(), Ok(Some(_)))
            }
            _ => false,
        };
        self.is_settled = may_be_there;
        match may_be_there {
            true => Err(PublishError::Unknown(io::Error::other(error))),
            false => Err(PublishError::NotPublished(io::Error::other(error))),
        }
    }
}

impl Drop for ObjectSink {
    fn drop(&mut self) {
        if !self.is_settled {
            // If that fails too, it is left to the store's own rules.
            let _ = self.upload().abort();
        }
    }
}
