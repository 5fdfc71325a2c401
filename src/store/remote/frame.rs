//! The greeting and the frames: bytes ⇄ values.
//!
//! Source: spec/transfer.md §1 and §2.

use std::io::{self, IoSlice, Read, Write};

/// What both sides send first.
pub const GREETING: [u8; 8] = *b"\x89VMSTOW\n";

/// The one version of the protocol.
pub const VERSION: u32 = 1;

/// The largest body, and the most bytes that one [`FrameType::Read`] asks for.
pub const MAX_BODY_LEN: u32 = 4 << 20;

/// The longest order, report, or text of a failure.
pub const MAX_TEXT_LEN: usize = 64 << 10;

/// The most requests that wait for an answer.
pub const MAX_REQUESTS: usize = 64;

/// Bytes of a frame before its body.
pub const HEADER_LEN: usize = 16;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameType {
    /// Asks for a file to be opened.
    Open = 1,
    /// Asks for bytes.
    Read = 2,
    /// Asks where the next data are.
    NextData = 3,
    /// Asks the peer to make a file of the one that is offered.
    Receive = 4,
    /// Tells how much is there.
    Progress = 5,
    /// Asks whether the guest in the image that is offered would run there.
    Check = 6,
    /// Asks the peer to start a guest.
    Restore = 7,
    /// The next bytes of an image.
    Stream = 8,
    /// The guest may run.
    Go = 9,
    /// Asks what became of a move.
    Settle = 10,
    /// Asks whether a guest that is not saved yet would run there.
    Prepare = 11,
    /// The move is over.
    End = 12,
    /// Asks how far a guess is right.
    Compare = 13,
    /// The file is open.
    Opened = 16,
    /// Bytes.
    Data = 17,
    /// Where the next data are.
    Place = 18,
    /// The file is made.
    Received = 19,
    /// It failed.
    Failed = 20,
    /// What the check found.
    Checked = 21,
    /// The guest is started.
    Restored = 22,
    /// The guest runs.
    Runs = 23,
    /// What became of the move.
    Settled = 24,
    /// It would run.
    Prepared = 25,
    /// The move is forgotten.
    Ended = 26,
    /// The sender is there.
    Alive = 32,
    /// How far it is, and what is right.
    Compared = 28,
}

impl FrameType {
    /// All of them.
    pub const ALL: [FrameType; 26] = [
        FrameType::Open,
        FrameType::Read,
        FrameType::NextData,
        FrameType::Receive,
        FrameType::Progress,
        FrameType::Check,
        FrameType::Restore,
        FrameType::Stream,
        FrameType::Go,
        FrameType::Settle,
        FrameType::Prepare,
        FrameType::End,
        FrameType::Compare,
        FrameType::Opened,
        FrameType::Data,
        FrameType::Place,
        FrameType::Received,
        FrameType::Failed,
        FrameType::Checked,
        FrameType::Restored,
        FrameType::Runs,
        FrameType::Settled,
        FrameType::Prepared,
        FrameType::Ended,
        FrameType::Alive,
        FrameType::Compared,
    ];

    /// Whether the client says it on its own account: it is no answer.
    pub fn is_order(self) -> bool {
        matches!(
            self,
            FrameType::Open
                | FrameType::Receive
                | FrameType::Check
                | FrameType::Restore
                | FrameType::Stream
                | FrameType::Go
                | FrameType::Settle
                | FrameType::Prepare
                | FrameType::End
        )
    }

    /// The number that stands for it in a frame.
    pub fn number(self) -> u8 {
        self as u8
    }
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub frame_type: FrameType,
    /// Whose answer it is, or which request.
    pub number: u64,
    /// At most [`MAX_BODY_LEN`] bytes.
    pub body: Vec<u8>,
}

/// Why no frame could be read.
#[derive(Debug)]
pub enum FrameError {
    /// The pipe ended or broke.
    Io(io::Error),
    /// What came is no frame.
    Rule(&'static str),
}

impl From<io::Error> for FrameError {
    fn from(error: io::Error) -> Self {
        FrameError::Io(error)
    }
}

/// Reads the next frame. Its body is a buffer that `buffer` gives, made as long as it has to be; nothing is allocated beyond what
/// is allowed, nor before the header arrives.
///
/// # Errors
/// [`FrameError`]; `UnexpectedEof` where the pipe ends.
pub fn read_frame(
    input: &mut dyn Read,
    buffer: &mut dyn FnMut() -> Vec<u8>,
) -> Result<Frame, FrameError> {
    let mut header = [0; HEADER_LEN];
    input.read_exact(&mut header)?;
    let len = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    if len > MAX_BODY_LEN {
        return Err(FrameError::Rule("a frame that is too long"));
    }
    let frame_type = FrameType::ALL
        .into_iter()
        .find(|it| it.number() == header[4]);
    let frame_type = frame_type.ok_or(FrameError::Rule("a frame of an unknown type"))?;
    if header[5..8] != [0; 3] {
        return Err(FrameError::Rule("a frame whose zeros are not"));
    }
    let mut body = buffer();
    body.resize(len as usize, 0);
    input.read_exact(&mut body)?;
    let mut number = [0; 8];
    number.copy_from_slice(&header[8..]);
    Ok(Frame {
        frame_type,
        number: u64::from_le_bytes(number),
        body,
    })
}

/// Writes one frame, whose body must not be longer than [`MAX_BODY_LEN`], and sends it off.
///
/// # Errors
/// What the pipe says.
pub fn write_frame(
    output: &mut dyn Write,
    frame_type: FrameType,
    number: u64,
    body: &[u8],
) -> io::Result<()> {
    let len = u32::try_from(body.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut header = [0; HEADER_LEN];
    header[..4].copy_from_slice(&len.to_le_bytes());
    header[4] = frame_type.number();
    header[8..].copy_from_slice(&number.to_le_bytes());
    write_both(output, &header, body)?;
    output.flush()
}

/// Writes two pieces with one call where that is possible: whoever reads them is woken once.
fn write_both(output: &mut dyn Write, first: &[u8], second: &[u8]) -> io::Result<()> {
    let both = [IoSlice::new(first), IoSlice::new(second)];
    let written = match output.write_vectored(&both) {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
        other => other?,
    };
    match written.checked_sub(first.len()) {
        Some(of_second) => output.write_all(&second[of_second..]),
        None => {
            output.write_all(&first[written..])?;
            output.write_all(second)
        }
    }
}

/// Our greeting.
pub fn greeting() -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&GREETING);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..].copy_from_slice(&VERSION.to_le_bytes());
    bytes
}

/// The lowest and the highest version of a greeting; `None` if it is none.
pub fn parse_greeting(bytes: &[u8; 16]) -> Option<(u32, u32)> {
    let version = |at: usize| {
        let bytes = [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
        u32::from_le_bytes(bytes)
    };
    (bytes[..8] == GREETING).then(|| (version(8), version(12)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_frame_is_read_as_it_was_written(
            which in 0..FrameType::ALL.len(),
            number: u64,
            body in proptest::collection::vec(any::<u8>(), 0..5000),
        ) {
            let mut bytes = Vec::new();
            let frame_type = FrameType::ALL[which];
            write_frame(&mut bytes, frame_type, number, &body).unwrap();
            let frame = read_frame(&mut bytes.as_slice(), &mut Vec::new).unwrap();
            prop_assert_eq!(frame, Frame { frame_type, number, body });
        }

        #[test]
        fn any_bytes_are_a_frame_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = read_frame(&mut bytes.as_slice(), &mut Vec::new);
        }
    }

    #[test]
    fn a_frame_that_is_too_long_is_refused_before_it_is_read() {
        let mut header = [0; HEADER_LEN];
        header[..4].copy_from_slice(&(MAX_BODY_LEN + 1).to_le_bytes());
        header[4] = FrameType::Data.number();
        assert!(matches!(
            read_frame(&mut header.as_slice(), &mut Vec::new),
            Err(FrameError::Rule("a frame that is too long"))
        ));
    }
}
