//! Lets other processes of this host read what a peer offers, by a socket: they speak the protocol too, and are passed on.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::ask::{Asker, RemoteFile};
use super::frame::FrameType;
use super::{Giver, Peer, RemoteError};
use crate::bytes::ReadAt;

/// A socket behind which an offered file can be read. Dropped, it is removed, unless another one has its name by now; who is
/// connected stays so.
#[derive(Debug)]
pub struct Relay {
    path: PathBuf,
    inode: u64,
}

impl Relay {
    /// Listens at `path`, whatever is there, for who wants to read `file`.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn listen(path: &Path, file: RemoteFile) -> io::Result<Self> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        let inode = fs::symlink_metadata(path)?.ino();
        let path = path.to_owned();
        let accept = move || {
            for stream in listener.incoming().flatten() {
                let file = file.clone();
                // Whoever cannot be served finds the connection closed.
                let _ = std::thread::Builder::new().spawn(move || serve(stream, &file));
            }
        };
        std::thread::Builder::new().spawn(accept)?;
        Ok(Relay { path, inode })
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|it| it.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn serve(stream: UnixStream, file: &RemoteFile) -> Result<(), RemoteError> {
    let name = "a reader".to_owned();
    let Ok(input) = stream.try_clone() else {
        return Ok(());
    };
    let reader = Peer::greet(name, input, stream, None)?;
    let mut giver = Giver::default();
    loop {
        let frame = reader.read()?;
        if frame.frame_type == FrameType::Open {
            let len = file.len().to_le_bytes();
            reader.write(FrameType::Opened, frame.number, &len)?;
        } else if !giver.answer(&reader, &frame, Some(file))? {
            return Err(reader.broke("a frame that does not belong here"));
        }
    }
}

impl RemoteFile {
    /// Opens what a [`Relay`] passes on.
    ///
    /// # Errors
    /// [`RemoteError::NoGreeting`] if nobody listens there.
    pub fn relayed(path: &Path) -> Result<Self, RemoteError> {
        let peer = "the host that the guest comes from".to_owned();
        let connected = UnixStream::connect(path).and_then(|it| Ok((it.try_clone()?, it)));
        let (input, output) = connected.map_err(|error| RemoteError::NoGreeting {
            peer: peer.clone(),
            why: vec![error.to_string()],
        })?;
        let peer = Peer::greet(peer, input, output, None)?;
        RemoteFile::open(Arc::new(Asker::new(Arc::new(peer))), Path::new("/"))
    }
}
