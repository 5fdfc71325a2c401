//! Why a guest was not given its memory.

use std::io;
use std::path::PathBuf;

use crate::error::{Blame, ErrorKind};
use crate::stream::postcopy::UnknownMessage;

/// What can end the giving before its end.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The guest was not restored lazily, or its directory is gone.
    #[error("nothing is noted of how this guest gets its memory")]
    NoTask,
    /// The image's file is another one by now.
    #[error("{} is not the image any more that the guest was restored from", path.display())]
    OtherImage {
        /// The file.
        path: PathBuf,
    },
    /// Without a page map no page is found.
    #[error("the image has no page map, without which no page of it can be found")]
    NoPageMap,
    /// The devices cannot be sent as a package.
    #[error("the device state in the image cannot be given to a guest before its memory")]
    DeviceState,
    /// QEMU could not be talked to.
    #[error("QEMU cannot be given pages")]
    Socket(#[source] io::Error),
    /// QEMU said something that makes no sense.
    #[error(transparent)]
    Message(#[from] UnknownMessage),
    /// QEMU asks for memory that the image does not have.
    #[error("QEMU asks for memory that is not in the image")]
    UnknownBlock,
    /// QEMU hung up before it had everything.
    #[error("QEMU has ended, or does not take its memory any more")]
    HungUp,
    /// QEMU says that it failed.
    #[error("QEMU gave up its migration, code {code}")]
    Refused {
        /// What it says.
        code: u32,
    },
    /// QEMU does not go on where it was.
    #[error("QEMU does not take up again what broke off: {what}")]
    NotResumed {
        /// What it did instead.
        what: &'static str,
    },
}

impl Blame for ServeError {
    fn kind(&self) -> ErrorKind {
        match self {
            ServeError::NoTask => ErrorKind::Usage,
            ServeError::NoPageMap | ServeError::DeviceState => ErrorKind::Image,
            _ => ErrorKind::Host,
        }
    }
}
