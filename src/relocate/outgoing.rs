//! The image of a guest that moves, on its way out.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use super::MoveError;
use crate::bytes::Sink;
use crate::error::Result;
use crate::store::remote::{FrameType, Peer, RemoteError, StreamOut};
use crate::store::{AnyFile, FileSink, FileSource};

/// Bytes that are collected before they are written to the file.
const WRITE_LEN: usize = 1 << 20;

/// Where an image goes while the guest is saved.
pub enum Outgoing {
    /// Into a file without a name, which is gone with this process.
    File(BufWriter<File>),
    /// Into a file that stays until the guest needs it no more.
    Kept(Box<FileSink>, PathBuf),
    /// To the other side, which makes a guest of it at once.
    Stream(Streaming),
}

/// An image that the other side takes as it comes.
pub struct Streaming {
    out: StreamOut,
    peer: Arc<Peer>,
    answer: Option<JoinHandle<Result<Option<Vec<u8>>, RemoteError>>>,
}

impl Outgoing {
    /// A file in `directory`.
    ///
    /// # Errors
    /// [`MoveError::Spool`].
    pub fn file(directory: &Path) -> Result<Self> {
        let failed = |act| move |source| MoveError::Spool { act, source };
        fs::create_dir_all(directory).map_err(failed("keep"))?;
        let file = tempfile::tempfile_in(directory).map_err(failed("keep"))?;
        Ok(Outgoing::File(BufWriter::with_capacity(WRITE_LEN, file)))
    }

    /// A file with this name, mode 0600.
    ///
    /// # Errors
    /// What the file system says.
    pub fn kept(path: &Path) -> Result<Self> {
        let sink = FileSink::create(path, false)?;
        Ok(Outgoing::Kept(Box::new(sink), path.to_owned()))
    }

    /// Orders the peer to restore what is going to be streamed.
    ///
    /// # Errors
    /// The connection's.
    pub fn stream(peer: &Arc<Peer>, order: &[u8]) -> Result<Self, RemoteError> {
        peer.write(FrameType::Restore, u64::MAX, order)?;
        let listener = Arc::clone(peer);
        // It may say at any time that it cannot go on.
        let listen = move || {
            let nothing: &[u8] = &[];
            listener.answered(&nothing, FrameType::Restore, &mut |_| true)
        };
        Ok(Outgoing::Stream(Streaming {
            out: StreamOut::new(Arc::clone(peer)),
            peer: Arc::clone(peer),
            answer: Some(std::thread::spawn(listen)),
        }))
    }

    /// Takes the next bytes.
    pub fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Outgoing::File(file) => file.write_all(bytes),
            Outgoing::Kept(sink, _) => sink.append(bytes),
            Outgoing::Stream(streaming) => streaming.send(bytes),
        }
    }

    /// The image, to be read; `None` if it is streamed.
    ///
    /// # Errors
    /// [`MoveError::Spool`].
    pub fn as_file(&mut self) -> Result<Option<AnyFile>> {
        let failed = |source| MoveError::Spool {
            act: "write",
            source,
        };
        let file = match self {
            Outgoing::File(file) => file,
            Outgoing::Kept(sink, path) => {
                sink.sync().map_err(failed)?;
                sink.publish()
                    .map_err(|error| failed(io::Error::other(error)))?;
                return Ok(Some(AnyFile::File(FileSource::open(path)?)));
            }
            Outgoing::Stream(_) => return Ok(None),
        };
        file.flush().map_err(failed)?;
        let copy = file.get_ref().try_clone().map_err(failed)?;
        Ok(Some(AnyFile::File(FileSource::from(copy))))
    }

    /// Ends the stream, and waits for what the peer makes of it.
    ///
    /// # Errors
    /// The peer's reason, or the connection's.
    pub fn finish_stream(&mut self) -> Result<Option<Vec<u8>>, RemoteError> {
        match self {
            Outgoing::File(_) | Outgoing::Kept(..) => Ok(None),
            Outgoing::Stream(streaming) => {
                let sent = streaming.out.end();
                let answer = streaming.answer();
                // What the other side says tells more than that it does not listen any more.
                answer.and_then(|answer| sent.map(|()| answer))
            }
        }
    }
}

impl Streaming {
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let has_answer = self.answer.as_ref().is_some_and(JoinHandle::is_finished);
        match has_answer {
            true => Err(io::ErrorKind::BrokenPipe.into()),
            false => self.out.send(bytes).map_err(io::Error::other),
        }
    }

    fn answer(&mut self) -> Result<Option<Vec<u8>>, RemoteError> {
        let answer = self.answer.take().map(JoinHandle::join);
        match answer {
            Some(Ok(answer)) => answer,
            _ => Err(self.peer.broke("no answer to a stream")),
        }
    }

    /// What the other side said before all was sent, if it did.
    pub fn early_answer(&mut self) -> Option<RemoteError> {
        let has_answer = self.answer.as_ref().is_some_and(JoinHandle::is_finished);
        has_answer.then(|| self.answer().err()).flatten()
    }
}

impl Drop for Streaming {
    fn drop(&mut self) {
        if self.answer.is_some() {
            self.peer.hang_up();
            // It ends with the connection.
            let _ = self.answer();
        }
    }
}
