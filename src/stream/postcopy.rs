//! What the source of a postcopy migration sends, and what the destination sends back.
//!
//! A postcopy source lets the guest run at its destination before its memory is there, and sends each page when it is asked
//! for it. [`opening`] is all that the destination needs before the guest runs, [`PageRecords`] carries pages, [`closing`]
//! ends it; [`ReturnPath`] reads requests and acknowledgements. A connection that broke is taken up again with
//! [`ask_received`] and [`resume`].
//!
//! Source: QEMU `migration/savevm.c`, `migration/migration.c`, `migration/postcopy-ram.c`; spec/qemu-stream.md §15.

use super::ram::RamBlock;
use super::wire;
use super::writer::{block_list, configuration, push_str8, record_word};
use crate::units::{PAGE_LEN, PageIndex};

/// The value of the PING that stands in the package: its PONG says that the destination has loaded all devices.
pub const LOADED: u32 = 3;

/// Bytes of a message on the return path before its payload.
const MESSAGE_HEADER_LEN: usize = 4;

/// What a received bitmap ends with.
const BITMAP_END: u64 = 0x0123_4567_89ab_cdef;

/// Everything up to the moment when the guest can run: header, configuration, the `ram` section's list of `blocks`, the
/// order to forget what is in memory, and the devices in one package.
///
/// `ram_section` is a number that none of `device_sections`, which are FULL sections and nothing behind them, has.
/// `None` if the package is longer than its format takes.
pub fn opening(
    machine_type: &str,
    ram_section: u32,
    blocks: &[RamBlock],
    device_sections: &[u8],
) -> Option<Vec<u8>> {
    let page_len = PAGE_LEN as u64;
    let mut bytes = configuration(machine_type, None);
    push_command(&mut bytes, wire::MIG_CMD_OPEN_RETURN_PATH, &[]);
    let page_lens = [page_len.to_be_bytes(), page_len.to_be_bytes()].concat();
    push_command(&mut bytes, wire::MIG_CMD_POSTCOPY_ADVISE, &page_lens);
    bytes.extend(block_list(ram_section, blocks));
    for block in blocks {
        // One for each block, and one at least: without any, QEMU takes what follows for precopy and waits for ever.
        let mut range = vec![0];
        push_str8(&mut range, &block.idstr);
        range.push(0);
        range.extend(0_u64.to_be_bytes());
        range.extend(block.used_length.to_be_bytes());
        push_command(&mut bytes, wire::MIG_CMD_POSTCOPY_RAM_DISCARD, &range);
    }
    let mut package = Vec::with_capacity(device_sections.len() + 32);
    push_command(&mut package, wire::MIG_CMD_POSTCOPY_LISTEN, &[]);
    package.extend(device_sections);
    push_command(&mut package, wire::MIG_CMD_PING, &LOADED.to_be_bytes());
    push_command(&mut package, wire::MIG_CMD_POSTCOPY_RUN, &[]);
    let package_len = u32::try_from(package.len()).ok()?;
    push_command(
        &mut bytes,
        wire::MIG_CMD_PACKAGED,
        &package_len.to_be_bytes(),
    );
    bytes.extend(package);
    Some(bytes)
}

/// What ends the migration. Pages that were never sent are zero from then on.
pub fn closing(ram_section: u32) -> Vec<u8> {
    let mut bytes = vec![wire::QEMU_VM_SECTION_END];
    bytes.extend(ram_section.to_be_bytes());
    bytes.extend(super::writer::behind_pages(ram_section));
    bytes.push(wire::QEMU_VM_EOF);
    bytes
}

/// Asks, on a new connection, which pages of a block have come.
pub fn ask_received(idstr: &str) -> Vec<u8> {
    let mut name = Vec::new();
    push_str8(&mut name, idstr);
    let mut bytes = Vec::new();
    push_command(&mut bytes, wire::MIG_CMD_RECV_BITMAP, &name);
    bytes
}

/// Says that the answers to [`ask_received`] are known and pages follow; answered by [`Message::ResumeAck`].
pub fn resume() -> Vec<u8> {
    let mut bytes = Vec::new();
    push_command(&mut bytes, wire::MIG_CMD_POSTCOPY_RESUME, &[]);
    bytes
}

fn push_command(bytes: &mut Vec<u8>, command: u16, payload: &[u8]) {
    bytes.push(wire::QEMU_VM_COMMAND);
    bytes.extend(command.to_be_bytes());
    // The longest payload is a name and some numbers.
    let len = u16::try_from(payload.len()).unwrap_or(u16::MAX);
    bytes.extend(len.to_be_bytes());
    bytes.extend(payload);
}

/// One PART of the `ram` section with pages, made page by page; its buffer is used again.
#[derive(Debug)]
pub struct PageRecords {
    ram_section: u32,
    bytes: Vec<u8>,
}

impl PageRecords {
    /// Without a page.
    pub fn new(ram_section: u32) -> Self {
        PageRecords {
            ram_section,
            bytes: Vec::new(),
        }
    }

    /// Adds a page of the block `idstr`: 4096 bytes, or zero.
    pub fn push(&mut self, idstr: &str, page: PageIndex, bytes: Option<&[u8]>) {
        if self.bytes.is_empty() {
            self.bytes.push(wire::QEMU_VM_SECTION_PART);
            self.bytes.extend(self.ram_section.to_be_bytes());
        }
        self.bytes.extend(record_word(page, bytes.is_none(), true));
        push_str8(&mut self.bytes, idstr);
        match bytes {
            Some(bytes) => self.bytes.extend(bytes),
            None => self.bytes.push(0),
        }
    }

    /// The whole PART, to be sent; call [`PageRecords::clear`] before the next page.
    pub fn finish(&mut self) -> &[u8] {
        if !self.bytes.is_empty() {
            let end = super::writer::behind_pages(self.ram_section);
            self.bytes.extend(end);
        }
        &self.bytes
    }

    /// Forgets all pages.
    pub fn clear(&mut self) {
        self.bytes.clear();
    }
}

/// What the destination says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// It is over: 0 if all went well there.
    Shut(u32),
    /// The answer to a PING.
    Pong(u32),
    /// Pages are wanted: the block, `None` for the one of the request before; the first byte and the number of bytes.
    Request {
        /// The block's idstr.
        block: Option<String>,
        /// First byte in the block.
        start: u64,
        /// Bytes.
        len: u32,
    },
    /// Which pages of a block have come, bit n of the little-endian bits for page n.
    Received {
        /// The block's idstr.
        block: String,
        /// The bits.
        bitmap: Vec<u8>,
    },
    /// It goes on from where it was: 1.
    ResumeAck(u32),
    /// Something that needs no answer.
    Other(u16),
}

/// What came on the return path is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("QEMU sent a message that is not known: type {kind}, {len} bytes")]
pub struct UnknownMessage {
    /// Its type.
    pub kind: u16,
    /// Bytes of its payload.
    pub len: u64,
}

/// Takes the bytes of the return path apart.
#[derive(Debug, Default)]
pub struct ReturnPath {
    bytes: Vec<u8>,
}

/// Bytes of a bitmap that a block of 16 TiB has.
const MAX_BITMAP_LEN: u64 = 1 << 29;

impl ReturnPath {
    /// Takes in bytes as they came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole message; `None` if more bytes are needed.
    ///
    /// # Errors
    /// [`UnknownMessage`] if a length does not fit its type: what follows cannot be read then.
    pub fn next_message(&mut self) -> Result<Option<Message>, UnknownMessage> {
        match parse(&self.bytes)? {
            Some((message, len)) => {
                self.bytes.drain(..len);
                Ok(Some(message))
            }
            None => Ok(None),
        }
    }
}

/// The message at the beginning and its length; `None` if it is not all there.
fn parse(bytes: &[u8]) -> Result<Option<(Message, usize)>, UnknownMessage> {
    let Some((header, rest)) = bytes.split_first_chunk::<MESSAGE_HEADER_LEN>() else {
        return Ok(None);
    };
    let kind = u16::from_be_bytes([header[0], header[1]]);
    let len = u16::from_be_bytes([header[2], header[3]]);
    let Some(payload) = rest.get(..usize::from(len)) else {
        return Ok(None);
    };
    let end = MESSAGE_HEADER_LEN + payload.len();
    let unknown = UnknownMessage {
        kind,
        len: len.into(),
    };
    let message = match (kind, payload) {
        (1, &[a, b, c, d]) => Message::Shut(u32::from_be_bytes([a, b, c, d])),
        (2, &[a, b, c, d]) => Message::Pong(u32::from_be_bytes([a, b, c, d])),
        (6, &[a, b, c, d]) => Message::ResumeAck(u32::from_be_bytes([a, b, c, d])),
        (3 | 4, _) => request(payload, kind == 3).ok_or(unknown)?,
        (5, _) => {
            let block = name(payload).ok_or(unknown)?;
            let Some((bitmap, bitmap_len)) = bitmap(&rest[payload.len()..], unknown)? else {
                return Ok(None);
            };
            let message = Message::Received {
                block,
                bitmap: bitmap.to_vec(),
            };
            return Ok(Some((message, end + bitmap_len)));
        }
        (1 | 2 | 6, _) => return Err(unknown),
        (other, _) => Message::Other(other),
    };
    Ok(Some((message, end)))
}

/// REQ_PAGES_ID names its block, REQ_PAGES means the one of the request before.
fn request(payload: &[u8], is_named: bool) -> Option<Message> {
    let (start, rest) = payload.split_first_chunk::<8>()?;
    let (len, rest) = rest.split_first_chunk::<4>()?;
    let block = match is_named {
        true => Some(name(rest)?),
        false => rest.is_empty().then_some(None)?,
    };
    Some(Message::Request {
        block,
        start: u64::from_be_bytes(*start),
        len: u32::from_be_bytes(*len),
    })
}

/// A length byte and as many bytes, and nothing else.
fn name(payload: &[u8]) -> Option<String> {
    let (len, name) = payload.split_first()?;
    let is_all = usize::from(*len) == name.len();
    let name = std::str::from_utf8(name).ok()?;
    is_all.then(|| name.to_owned())
}

/// be64 length, so many bytes, be64 end mark: the bytes, and the length of all; `None` if they are not all there.
fn bitmap(bytes: &[u8], unknown: UnknownMessage) -> Result<Option<(&[u8], usize)>, UnknownMessage> {
    let Some((len, rest)) = bytes.split_first_chunk::<8>() else {
        return Ok(None);
    };
    let len = u64::from_be_bytes(*len);
    let too_long = UnknownMessage { len, ..unknown };
    let len = usize::try_from(len).map_err(|_| too_long)?;
    if len as u64 > MAX_BITMAP_LEN {
        return Err(too_long);
    }
    let Some((bitmap, end)) = rest.split_at_checked(len) else {
        return Ok(None);
    };
    match end.first_chunk::<8>() {
        None => Ok(None),
        Some(end) if u64::from_be_bytes(*end) == BITMAP_END => Ok(Some((bitmap, len + 16))),
        Some(_) => Err(too_long),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn messages(bytes: &[u8], step: usize) -> Result<Vec<Message>, UnknownMessage> {
        let mut path = ReturnPath::default();
        let mut found = Vec::new();
        for piece in bytes.chunks(step) {
            path.push(piece);
            while let Some(message) = path.next_message()? {
                found.push(message);
            }
        }
        Ok(found)
    }

    /// What a 10.0 sent, type by type.
    fn sample() -> (Vec<u8>, Vec<Message>) {
        let mut bytes = vec![0, 2, 0, 4, 0, 0, 0, 3];
        bytes.extend([0, 3, 0, 19, 0, 0, 0, 0, 0, 0x0f, 0xf0, 0, 0, 0, 0x10, 0, 6]);
        bytes.extend(b"pc.ram");
        bytes.extend([0, 4, 0, 12, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0x10, 0]);
        bytes.extend([0, 5, 0, 3, 2, b'x', b'y', 0, 0, 0, 0, 0, 0, 0, 8]);
        bytes.extend([0b101, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend(BITMAP_END.to_be_bytes());
        bytes.extend([0, 6, 0, 4, 0, 0, 0, 1, 0, 7, 0, 0, 0, 1, 0, 4, 0, 0, 0, 0]);
        let request = |block: Option<&str>, start| Message::Request {
            block: block.map(str::to_owned),
            start,
            len: 4096,
        };
        let received = Message::Received {
            block: "xy".to_owned(),
            bitmap: vec![0b101, 0, 0, 0, 0, 0, 0, 0],
        };
        let expected = vec![
            Message::Pong(3),
            request(Some("pc.ram"), 0xff000),
            request(None, 0x2000),
            received,
            Message::ResumeAck(1),
            Message::Other(7),
            Message::Shut(0),
        ];
        (bytes, expected)
    }

    #[test]
    fn messages_are_the_same_wherever_they_are_split() {
        let (bytes, expected) = sample();
        for step in 1..bytes.len() {
            assert_eq!(messages(&bytes, step).as_ref(), Ok(&expected));
        }
    }

    #[test]
    fn a_message_whose_length_does_not_fit_is_refused() {
        for bytes in [
            &[0, 2, 0, 1, 9][..],
            &[0, 4, 0, 1, 9],
            &[0, 3, 0, 14, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, b'x'],
            &[0, 5, 0, 2, 1, b'x', 0xff, 0, 0, 0, 0, 0, 0, 0],
        ] {
            messages(bytes, 64).unwrap_err();
        }
    }

    #[test]
    fn pages_of_one_part_are_records_that_name_their_block() {
        let mut records = PageRecords::new(7);
        assert!(records.finish().is_empty());
        records.push("ab", PageIndex(2), Some(&[5; PAGE_LEN]));
        records.push("c", PageIndex(1), None);
        let bytes = records.finish();
        assert_eq!(bytes[..5], [2, 0, 0, 0, 7]);
        assert_eq!(bytes[5..16], [0, 0, 0, 0, 0, 0, 0x20, 8, 2, b'a', b'b']);
        assert_eq!(bytes[16..16 + PAGE_LEN], [5; PAGE_LEN]);
        let zero = &bytes[16 + PAGE_LEN..];
        assert_eq!(zero[..11], [0, 0, 0, 0, 0, 0, 0x10, 2, 1, b'c', 0]);
        assert_eq!(zero[11..], [0, 0, 0, 0, 0, 0, 0, 0x10, 0x7e, 0, 0, 0, 7]);
        records.clear();
        assert!(records.finish().is_empty());
    }

    #[test]
    fn the_opening_is_what_was_seen_to_work() {
        let block = RamBlock {
            idstr: "pc.ram".to_owned(),
            used_length: 0x8000,
            page_size: PAGE_LEN as u64,
        };
        let bytes = opening("pc-q35-10.0", 1, &[block], b"devices").unwrap();
        let text = b"\x08\x00\x01\x00\x00\x08\x00\x03\x00\x10";
        assert_eq!(bytes[24..34], text[..]);
        let discard = b"\x08\x00\x06\x00\x19\x00\x06pc.ram\x00\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x80\x00";
        assert!(bytes.windows(discard.len()).any(|it| it == discard));
        let package = b"\x08\x00\x07\x00\x04\x00\x00\x00\x1a\x08\x00\x04\x00\x00devices\x08\x00\x02\x00\x04\0\0\0\x03\x08\x00\x05\x00\x00";
        assert!(bytes.ends_with(package));
    }

    proptest! {
        #[test]
        fn any_bytes_are_messages_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = messages(&bytes, 7);
        }
    }
}
