//! Bytes that follow each other over a connection: an image that nobody keeps.
//!
//! [`StreamOut`] sends what it is given; [`StreamIn`] is the other end, to be read like a pipe.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::frame::{FrameType, MAX_BODY_LEN};
use super::{Asker, Peer, RemoteError};

/// The sending end.
#[derive(Debug)]
pub struct StreamOut {
    peer: Arc<Peer>,
    piece: Vec<u8>,
}

impl StreamOut {
    /// Nothing is sent yet.
    pub fn new(peer: Arc<Peer>) -> Self {
        StreamOut {
            peer,
            piece: Vec::with_capacity(MAX_BODY_LEN as usize),
        }
    }

    /// Sends `bytes`, when enough have come together.
    ///
    /// # Errors
    /// The connection's.
    pub fn send(&mut self, mut bytes: &[u8]) -> Result<(), RemoteError> {
        while !bytes.is_empty() {
            let room = MAX_BODY_LEN as usize - self.piece.len();
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.piece.extend_from_slice(now);
            bytes = later;
            if self.piece.len() == MAX_BODY_LEN as usize {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Sends what is left, and says that it is all.
    ///
    /// # Errors
    /// The connection's.
    pub fn end(&mut self) -> Result<(), RemoteError> {
        self.flush()?;
        self.peer.write(FrameType::Stream, 0, &[])
    }

    fn flush(&mut self) -> Result<(), RemoteError> {
        if !self.piece.is_empty() {
            self.peer.write(FrameType::Stream, 0, &self.piece)?;
            self.piece.clear();
        }
        Ok(())
    }
}

/// The receiving end.
#[derive(Debug)]
pub struct StreamIn {
    asker: Arc<Asker>,
    piece: Vec<u8>,
    read: usize,
    is_over: Arc<AtomicBool>,
}

impl StreamIn {
    /// What comes next as [`FrameType::Stream`].
    pub fn new(asker: Arc<Asker>) -> Self {
        StreamIn {
            asker,
            piece: Vec::new(),
            read: 0,
            is_over: Arc::default(),
        }
    }

    /// The same stream for who may have to pass over its rest.
    pub fn rest(&self) -> Self {
        StreamIn {
            asker: Arc::clone(&self.asker),
            piece: Vec::new(),
            read: 0,
            is_over: Arc::clone(&self.is_over),
        }
    }

    /// Passes over all that still comes.
    ///
    /// # Errors
    /// The connection's.
    pub fn pass_over(mut self) -> Result<(), RemoteError> {
        while self.next()? {}
        Ok(())
    }

    /// The next piece; whether there is one.
    fn next(&mut self) -> Result<bool, RemoteError> {
        if self.is_over.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let frame = self.asker.next_order()?;
        if frame.frame_type != FrameType::Stream {
            return Err(self.asker.peer().broke("an order within a stream"));
        }
        self.is_over.store(frame.body.is_empty(), Ordering::Relaxed);
        self.piece = frame.body;
        self.read = 0;
        Ok(!self.piece.is_empty())
    }
}

impl Read for StreamIn {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.read == self.piece.len() && !self.next().map_err(io::Error::other)? {
            return Ok(0);
        }
        let len = buf.len().min(self.piece.len() - self.read);
        buf[..len].copy_from_slice(&self.piece[self.read..self.read + len]);
        self.read += len;
        Ok(len)
    }
}
