//! The giving side: answers what is asked of one file.

use super::ask::refusal;
use super::frame::{Frame, FrameType, MAX_BODY_LEN, MAX_TEXT_LEN};
use super::{Peer, RemoteError};
use crate::bytes::ReadAt;
use crate::error::Error;

/// What became of an order that the peer was given.
pub enum Answer {
    /// It tells how far it is: bytes that are there, bytes in all.
    Progress(u64, u64),
    /// It is done; its report.
    Received(Vec<u8>),
}

/// Understands the file that is given: the reply to the question in a frame of type [`FrameType::Compare`], or why there is
/// none.
pub type Comparer<'a> = dyn FnMut(&[u8]) -> Result<Vec<u8>, String> + 'a;

/// Answers [`FrameType::Read`] and [`FrameType::NextData`]; its buffer is used again and again.
#[derive(Debug, Default)]
pub struct Giver {
    buffer: Vec<u8>,
}

impl Giver {
    /// Answers `frame`, which speaks of `file`; `false` if it asks for something else.
    ///
    /// # Errors
    /// The connection's.
    pub fn answer(
        &mut self,
        peer: &Peer,
        frame: &Frame,
        file: Option<&dyn ReadAt>,
    ) -> Result<bool, RemoteError> {
        let number = frame.number;
        let outcome = match frame.frame_type {
            FrameType::Read => self.read(&frame.body, file),
            FrameType::NextData => self.next_data(&frame.body, file),
            _ => return Ok(false),
        };
        match outcome {
            Ok(frame_type) => peer.write(frame_type, number, &self.buffer)?,
            Err(text) => peer.write(FrameType::Failed, number, &failure(1, &text))?,
        }
        Ok(true)
    }

    fn read(&mut self, body: &[u8], file: Option<&dyn ReadAt>) -> Result<FrameType, String> {
        let file = file.ok_or("no file is open")?;
        let (offset, len) = body.split_first_chunk().ok_or("no offset")?;
        let len: [u8; 4] = len.try_into().map_err(|_| "no length")?;
        let (offset, len) = (u64::from_le_bytes(*offset), u32::from_le_bytes(len));
        if len == 0 || len > MAX_BODY_LEN {
            return Err("that many bytes are not given at once".to_owned());
        }
        self.buffer.resize(len as usize, 0);
        let outcome = file.read_exact_at(&mut self.buffer, offset);
        outcome
            .map_err(|error| format!("the file cannot be read at offset {offset:#x}\n{error}"))?;
        Ok(FrameType::Data)
    }

    fn next_data(&mut self, body: &[u8], file: Option<&dyn ReadAt>) -> Result<FrameType, String> {
        let file = file.ok_or("no file is open")?;
        let offset: [u8; 8] = body.try_into().map_err(|_| "no offset")?;
        let offset = u64::from_le_bytes(offset).min(file.len());
        let place = file.next_data(offset).map_err(|error| error.to_string())?;
        self.buffer.clear();
        self.buffer.extend_from_slice(&place.to_le_bytes());
        Ok(FrameType::Place)
    }
}

/// Answers a frame of type [`FrameType::Compare`].
///
/// # Errors
/// The connection's.
pub fn answer_compare(
    peer: &Peer,
    frame: &Frame,
    comparer: &mut Comparer<'_>,
) -> Result<(), RemoteError> {
    match comparer(&frame.body) {
        Ok(reply) if reply.len() <= MAX_BODY_LEN as usize => {
            peer.write(FrameType::Compared, frame.number, &reply)
        }
        Ok(_) => peer.write(FrameType::Failed, frame.number, &failure(1, "too long")),
        Err(text) => peer.write(FrameType::Failed, frame.number, &failure(1, &text)),
    }
}

/// The body of a frame of type [`FrameType::Failed`].
fn failure(kind: u8, text: &str) -> Vec<u8> {
    let mut end = text.len().min(MAX_TEXT_LEN);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let mut body = vec![kind];
    body.extend_from_slice(&text.as_bytes()[..end]);
    body
}

/// The number of an order.
const NUMBER: u64 = u64::MAX;

/// What an order of this type is answered with.
fn report_of(order: FrameType) -> FrameType {
    match order {
        FrameType::Check => FrameType::Checked,
        FrameType::Restore => FrameType::Restored,
        FrameType::Go => FrameType::Runs,
        FrameType::Settle => FrameType::Settled,
        FrameType::Prepare => FrameType::Prepared,
        FrameType::End => FrameType::Ended,
        _ => FrameType::Received,
    }
}

impl Peer {
    /// Tells the peer that what it asked for with `number` failed, and why.
    ///
    /// # Errors
    /// The connection's.
    pub fn refuse(&self, number: u64, error: &Error) -> Result<(), RemoteError> {
        let mut lines = vec![error.to_string()];
        lines.extend(error.at().map(|at| format!("at {at}")));
        lines.extend(error.causes().map(ToString::to_string));
        lines.extend(error.facts());
        let body = failure(error.kind().exit_code(), &lines.join("\n"));
        self.write(FrameType::Failed, number, &body)
    }

    /// Orders the peer to do something with `file`: to make a file of it ([`FrameType::Receive`]) or to check it
    /// ([`FrameType::Check`]). Lets it read that until it is done, and gives its report. `tell` hears how far it is, and says whether
    /// to go on.
    ///
    /// # Errors
    /// [`RemoteError::Refused`] with the peer's reason; the connection's. `None` if `tell` ended it.
    pub fn give(
        &self,
        file: &dyn ReadAt,
        what: FrameType,
        order: &[u8],
        tell: &mut dyn FnMut(Option<(u64, u64)>) -> bool,
    ) -> Result<Option<Vec<u8>>, RemoteError> {
        let mut no_comparer = |_: &[u8]| Err("nothing is compared here".to_owned());
        self.give_compared(file, &mut no_comparer, what, order, tell)
    }

    /// As [`Peer::give`]; `comparer` understands the file.
    ///
    /// # Errors
    /// As [`Peer::give`].
    pub fn give_compared(
        &self,
        file: &dyn ReadAt,
        comparer: &mut Comparer<'_>,
        what: FrameType,
        order: &[u8],
        tell: &mut dyn FnMut(Option<(u64, u64)>) -> bool,
    ) -> Result<Option<Vec<u8>>, RemoteError> {
        self.write(what, NUMBER, order)?;
        self.answered_compared(file, comparer, what, tell)
    }

    /// Lets the peer read `file` until the order of type `what` that it was given is done, as [`Peer::give`].
    ///
    /// # Errors
    /// As [`Peer::give`].
    pub fn answered(
        &self,
        file: &dyn ReadAt,
        what: FrameType,
        tell: &mut dyn FnMut(Option<(u64, u64)>) -> bool,
    ) -> Result<Option<Vec<u8>>, RemoteError> {
        let mut no_comparer = |_: &[u8]| Err("nothing is compared here".to_owned());
        self.answered_compared(file, &mut no_comparer, what, tell)
    }

    fn answered_compared(
        &self,
        file: &dyn ReadAt,
        comparer: &mut Comparer<'_>,
        what: FrameType,
        tell: &mut dyn FnMut(Option<(u64, u64)>) -> bool,
    ) -> Result<Option<Vec<u8>>, RemoteError> {
        let report = report_of(what);
        let mut giver = Giver::default();
        loop {
            let frame = self.read()?;
            let progress = match frame.frame_type {
                found if found == report && frame.number == NUMBER => return Ok(Some(frame.body)),
                FrameType::Failed if frame.number == NUMBER => {
                    return Err(refusal(self, &frame.body));
                }
                FrameType::Progress => {
                    Some(progress(&frame.body).ok_or_else(|| self.broke("progress that is none"))?)
                }
                FrameType::Compare => {
                    answer_compare(self, &frame, comparer)?;
                    None
                }
                _ if giver.answer(self, &frame, Some(file))? => None,
                _ => return Err(self.broke("a frame that does not belong here")),
            };
            if !tell(progress) {
                return Ok(None);
            }
        }
    }
}

fn progress(body: &[u8]) -> Option<(u64, u64)> {
    let (done, all) = body.split_first_chunk()?;
    let all: [u8; 8] = all.try_into().ok()?;
    Some((u64::from_le_bytes(*done), u64::from_le_bytes(all)))
}
