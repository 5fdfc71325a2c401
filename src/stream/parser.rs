//! Bytes of a migration stream → elements, one after the other.
//!
//! A [`Parser`] is given the bytes that it has not consumed yet and says what the first of them are. It copies no
//! page and allocates for none; it keeps one bit for each page of guest memory at most, and a copy of the device
//! state, which it takes apart at the end. What the guest's memory or a device holds is not its business.
//!
//! Source: QEMU `migration/savevm.c`, `qemu_loadvm_state_main`; spec/qemu-stream.md §2.

use uuid::Uuid;

use super::cursor::{Cursor, Stop};
use super::device_state::{self, DeviceSection, VmDescription};
use super::error::{Place, SectionName, StreamError};
use super::mapped_ram;
use super::ram::{Ram, RamBlock, Record};
use super::section::{SectionHeader, read_footer};
use super::wire;
use crate::units::{PageIndex, StreamOffset};

/// The most bytes that one element has, apart from device state, which is taken as it comes.
///
/// A caller that offers this many bytes always gets an element: a page record with its RAMBlock's name is the longest.
pub const MAX_ELEMENT_LEN: usize = 8 + 1 + 255 + 4096;

/// The most bytes of device state that a stream may have.
pub const MAX_DEVICE_STATE_LEN: usize = 64 << 20;

const MAX_CAPABILITIES: u32 = 15;

/// Whether `bytes` begin as every migration stream does: the magic "QEVM" and version 3.
pub fn is_stream_start(bytes: &[u8]) -> bool {
    let mut cursor = Cursor::new(bytes, StreamOffset(0));
    matches!(cursor.be32(), Ok(wire::QEMU_VM_FILE_MAGIC))
        && matches!(cursor.be32(), Ok(wire::QEMU_VM_FILE_VERSION))
}

/// A piece of the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Element {
    /// How many bytes it has.
    pub len: usize,
    /// What they are.
    pub event: Event,
}

/// What a piece of the stream is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Framing: header, configuration, commands, section headers, block list, EOS, footers.
    Framing,
    /// One page record.
    Page {
        /// The RAMBlock's place in [`Parser::blocks`].
        block: usize,
        /// The page's number in its RAMBlock.
        page: PageIndex,
        /// Whether the record carries one fill byte, 0, instead of the page's bytes.
        is_zero: bool,
        /// Where in the element the page's 4096 bytes or the fill byte begin.
        body: usize,
    },
    /// An entry of the block list whose pages lie at places of their own. The next element begins behind the last of
    /// them, at [`Parser::position`]; what lies before is not shown to the parser.
    MappedBlock {
        /// The RAMBlock's place in [`Parser::blocks`].
        block: usize,
        /// Where its bitmap lies in the stream.
        bitmap: u64,
        /// Where its pages lie in the stream.
        pages: u64,
    },
    /// Bytes of the device state region: everything behind the RAM's end. Its pieces are cut as the input was.
    DeviceState,
}

/// What a whole stream held.
#[derive(Debug)]
pub struct StreamSummary {
    /// The resolved machine type, such as `pc-q35-10.0`; `None` for machine types up to 2.3, which do not write it.
    pub machine_type: Option<String>,
    /// The capabilities that both sides must have: `mapped-ram`, or none.
    pub capabilities: Vec<String>,
    /// The guest's UUID; only with the capability `validate-uuid`.
    pub uuid: Option<Uuid>,
    /// The RAMBlocks in the order of the list.
    pub blocks: Vec<RamBlock>,
    /// The device sections in the order of the stream. Without a vmdescription those that are certain.
    pub sections: Vec<DeviceSection>,
    /// The run state that section `globalstate` keeps, such as `paused`; `None` if it is not found.
    pub run_state: Option<String>,
    /// The JSON about the device sections; `None` with `suppress-vmdesc=on` or if it is empty.
    pub vmdescription: Option<VmDescription>,
    /// Where the device state begins, behind the end of the RAM.
    pub device_state: StreamOffset,
    /// The length of the stream in bytes.
    pub len: u64,
    /// Page records that carry 4096 bytes.
    pub data_pages: u64,
    /// Page records of zero pages.
    pub zero_pages: u64,
    /// Page records for a page that had come before; the last one counts.
    pub repeated_pages: u64,
    /// Pages that never came: 0, since such a stream is refused.
    pub missing_pages: u64,
}

/// Takes a migration stream apart, element by element.
pub struct Parser {
    position: u64,
    state: State,
    configuration: Configuration,
    ram: Option<Ram>,
    has_ram_ended: bool,
    last: Option<SectionName>,
    device_state: Vec<u8>,
}

#[derive(Default)]
struct Configuration {
    /// Whether the stream has to be of the mapped-ram layout; otherwise it must not be.
    is_mapped: bool,
    machine_type: Option<String>,
    capabilities: Vec<String>,
    uuid: Option<Uuid>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Header,
    Configuration,
    ConfigurationSubsections,
    Sections,
    Ram { is_last: bool },
    RamFooter { is_last: bool },
    Devices,
}

impl Default for Parser {
    fn default() -> Self {
        Self::new()
    }
}

impl Parser {
    /// At stream offset 0.
    pub fn new() -> Self {
        Parser {
            position: 0,
            state: State::Header,
            configuration: Configuration::default(),
            ram: None,
            has_ram_ended: false,
            last: None,
            device_state: Vec::new(),
        }
    }

    /// At the beginning of a stream of the mapped-ram layout.
    pub fn mapped_ram() -> Self {
        Parser::mapped_ram_from(StreamOffset(0))
    }

    /// As [`Parser::mapped_ram`], in a file in which the stream begins at `start`. All positions are the file's then, as
    /// those in the stream are.
    pub fn mapped_ram_from(start: StreamOffset) -> Self {
        let mut parser = Parser::new();
        parser.position = start.0;
        parser.configuration.is_mapped = true;
        parser
    }

    /// Parses the next element, which starts at `input[0]`.
    ///
    /// `input` are bytes that are not consumed yet, from [`position`](Self::position) on. `Ok(None)`: more are
    /// needed; [`MAX_ELEMENT_LEN`] always suffice. Otherwise the element's `len` bytes are consumed: the caller drops them.
    ///
    /// # Errors
    /// [`StreamError`] for anything that QEMU would not have written; the parser stays where it is.
    #[inline]
    pub fn next(&mut self, input: &[u8]) -> Result<Option<Element>, StreamError> {
        match self.step(input) {
            Ok(element) => {
                self.position += element.len as u64;
                if let Event::MappedBlock { block, pages, .. } = element.event {
                    self.position = pages + self.blocks()[block].used_length;
                }
                Ok(Some(element))
            }
            Err(Stop::NeedMore) => Ok(None),
            Err(Stop::Bad(error)) => Err(error),
        }
    }

    /// Where the next element starts.
    pub fn position(&self) -> StreamOffset {
        StreamOffset(self.position)
    }

    /// The RAMBlocks, known after the list at the start of the RAM.
    pub fn blocks(&self) -> &[RamBlock] {
        self.ram.as_ref().map_or(&[], Ram::blocks)
    }

    /// The number of the `ram` section, known after its header.
    pub fn ram_section(&self) -> Option<u32> {
        self.ram.as_ref().map(Ram::section_id)
    }

    /// The machine type, known after the configuration.
    pub fn machine_type(&self) -> Option<&str> {
        self.configuration.machine_type.as_deref()
    }

    /// Steps over the page records of the whole guest, which the caller made himself and does not show: `len` bytes in
    /// all, `data` pages with bytes and `zero` without. Only where page records may stand, behind the block list.
    pub fn skip_all_pages(&mut self, len: u64, data: u64, zero: u64) {
        if let Some(ram) = &mut self.ram {
            ram.take_all(data, zero);
        }
        self.position += len;
    }

    /// No more bytes will come: checks that the stream is whole.
    ///
    /// # Errors
    /// [`StreamError::Truncated`] in the middle of anything, [`StreamError::NotAStream`] at its beginning,
    /// [`StreamError::MissingPages`]; whatever is wrong with the device state.
    pub fn finish(self) -> Result<StreamSummary, StreamError> {
        let start = self.position - self.device_state.len() as u64;
        let device = match self.state {
            State::Devices => {
                device_state::read(&self.device_state, StreamOffset(start), self.last.clone())?
            }
            State::Header => return Err(StreamError::NotAStream),
            _ => return Err(self.truncated()),
        };
        let at = self.place(StreamOffset(start));
        let ram = self.ram.ok_or(StreamError::NoBlockList { at })?;
        ram.check_complete()?;
        let counts = ram.counts();
        Ok(StreamSummary {
            machine_type: self.configuration.machine_type,
            capabilities: self.configuration.capabilities,
            uuid: self.configuration.uuid,
            blocks: ram.into_blocks(),
            sections: device.sections,
            run_state: device.run_state,
            vmdescription: device.vmdescription,
            device_state: StreamOffset(start),
            len: self.position,
            data_pages: counts.data,
            zero_pages: counts.zero,
            repeated_pages: counts.repeated,
            missing_pages: 0,
        })
    }

    fn truncated(&self) -> StreamError {
        let what = match self.state {
            State::Header => "the header",
            State::Configuration | State::ConfigurationSubsections => "the configuration",
            State::Sections => "the header of a section",
            State::Ram { .. } => self.ram.as_ref().map_or("the RAM", Ram::reading),
            State::RamFooter { .. } => "the footer of a section",
            State::Devices => "the device state",
        };
        let at = self.place(self.position());
        StreamError::Truncated { at, what }
    }

    /// Where `offset` lies, which is at or behind the position.
    fn place(&self, offset: StreamOffset) -> Place {
        match (&self.ram, self.state) {
            (Some(ram), State::Ram { .. } | State::RamFooter { .. }) => ram.place(offset),
            _ => Place::after(offset, self.last.clone()),
        }
    }

    #[inline]
    fn step(&mut self, input: &[u8]) -> Result<Element, Stop> {
        if let (State::Ram { is_last }, Some(ram)) = (self.state, &mut self.ram) {
            return match ram.read_record(input, StreamOffset(self.position))? {
                Record::Element(element) => Ok(element),
                Record::EndOfPayload(element) => {
                    self.state = State::RamFooter { is_last };
                    Ok(element)
                }
            };
        }
        self.step_outside_of_ram(input)
    }

    fn step_outside_of_ram(&mut self, input: &[u8]) -> Result<Element, Stop> {
        if self.state == State::Devices {
            return self.keep_device_state(input);
        }
        let mut cursor = Cursor::new(input, self.position());
        match self.state {
            State::Header => self.read_header(&mut cursor)?,
            State::Configuration => self.read_configuration(&mut cursor)?,
            State::ConfigurationSubsections => self.read_configuration_subsection(&mut cursor)?,
            State::RamFooter { is_last } => self.read_ram_footer(&mut cursor, is_last)?,
            State::Sections | State::Ram { .. } | State::Devices => {
                self.read_section(&mut cursor)?;
                if self.state == State::Devices {
                    return self.keep_device_state(input);
                }
            }
        }
        Ok(Element {
            len: cursor.len(),
            event: Event::Framing,
        })
    }

    /// be32 "QEVM" · be32 version.
    fn read_header(&mut self, cursor: &mut Cursor<'_>) -> Result<(), Stop> {
        for expected in wire::QEMU_VM_FILE_MAGIC.to_be_bytes() {
            if cursor.u8()? != expected {
                return Err(StreamError::NotAStream.into());
            }
        }
        let at = self.place(cursor.offset());
        let version = cursor.be32()?;
        if version != wire::QEMU_VM_FILE_VERSION {
            return Err(StreamError::UnsupportedVersion { at, version }.into());
        }
        self.state = State::Configuration;
        Ok(())
    }

    /// 0x07 · be32 length · the machine type. Old machine types begin with a section instead.
    fn read_configuration(&mut self, cursor: &mut Cursor<'_>) -> Result<(), Stop> {
        if cursor.peek()? != wire::QEMU_VM_CONFIGURATION {
            return self.read_section(cursor);
        }
        cursor.u8()?;
        let at = self.place(cursor.offset());
        let what = "the machine type";
        let len = cursor.be32()?;
        if len > 255 {
            let (len, limit) = (u64::from(len), 255);
            return Err(StreamError::TooLong {
                at,
                what,
                len,
                limit,
            }
            .into());
        }
        let bytes = cursor.take(usize::try_from(len).unwrap_or(usize::MAX))?;
        let machine_type = text(at, what, std::str::from_utf8(bytes).map_err(|_| bytes))?;
        self.configuration.machine_type = Some(machine_type);
        self.state = State::ConfigurationSubsections;
        Ok(())
    }

    /// 0x05 · str8 name · be32 version 1 · what the name says.
    fn read_configuration_subsection(&mut self, cursor: &mut Cursor<'_>) -> Result<(), Stop> {
        if cursor.peek()? != wire::QEMU_VM_SUBSECTION {
            return self.read_section(cursor);
        }
        let at = self.place(cursor.offset());
        cursor.u8()?;
        let name = text(at.clone(), "a subsection's name", cursor.str8()?)?;
        let version = cursor.be32()?;
        match name.as_str() {
            "configuration/target-page-bits" | wire::CAPABILITIES | "configuration/uuid" => {}
            _ => return Err(StreamError::UnknownConfiguration { at, name }.into()),
        }
        if version != 1 {
            return Err(StreamError::ConfigurationVersion { at, name, version }.into());
        }
        match name.as_str() {
            "configuration/target-page-bits" => match cursor.be32()? {
                12 => {}
                bits => return Err(StreamError::PageBits { at, bits }.into()),
            },
            "configuration/uuid" => self.configuration.uuid = Some(cursor.uuid()?),
            _ => self.read_capabilities(cursor)?,
        }
        Ok(())
    }

    /// be32 count · that many str8 names, of which each changes the stream in a way of its own.
    fn read_capabilities(&mut self, cursor: &mut Cursor<'_>) -> Result<(), Stop> {
        let at = self.place(cursor.offset());
        let count = cursor.be32()?;
        if count > MAX_CAPABILITIES {
            return Err(StreamError::TooLong {
                at,
                what: "the list of capabilities",
                len: u64::from(count),
                limit: u64::from(MAX_CAPABILITIES),
            }
            .into());
        }
        let mut names = Vec::new();
        for _ in 0..count {
            let at = self.place(cursor.offset());
            names.push(text(at, "a capability", cursor.str8()?)?);
        }
        let is_mapped = self.configuration.is_mapped;
        if is_mapped && names == [mapped_ram::CAPABILITY] {
            self.configuration.capabilities = names;
            return Ok(());
        }
        if !is_mapped && names.iter().any(|name| name == mapped_ram::CAPABILITY) {
            let machine_type = self.configuration.machine_type.clone();
            return Err(StreamError::MappedRam { at, machine_type }.into());
        }
        let mut others = names
            .into_iter()
            .filter(|name| name != mapped_ram::CAPABILITY);
        if let Some(name) = others.next() {
            return Err(StreamError::Capability { at, name }.into());
        }
        Ok(())
    }

    /// What stands between sections: a type byte and what it says.
    fn read_section(&mut self, cursor: &mut Cursor<'_>) -> Result<(), Stop> {
        let at = self.place(cursor.offset());
        let misplaced = |name| {
            Err(StreamError::MisplacedSection {
                at: at.clone(),
                name,
            }
            .into())
        };
        match cursor.u8()? {
            wire::QEMU_VM_EOF => self.begin_device_state(at),
            wire::QEMU_VM_SECTION_START => self.begin_live_section(cursor, at),
            wire::QEMU_VM_SECTION_PART => self.continue_ram(cursor, at, false),
            wire::QEMU_VM_SECTION_END => self.continue_ram(cursor, at, true),
            wire::QEMU_VM_SECTION_FULL => self.begin_full_section(cursor, at),
            wire::QEMU_VM_SUBSECTION => misplaced("SUBSECTION"),
            wire::QEMU_VM_VMDESCRIPTION => misplaced("VMDESCRIPTION"),
            wire::QEMU_VM_CONFIGURATION => misplaced("CONFIGURATION"),
            wire::QEMU_VM_COMMAND => self.read_command(cursor, at),
            wire::QEMU_VM_SECTION_FOOTER => misplaced("FOOTER"),
            found => Err(StreamError::UnknownSectionType { at, found }.into()),
        }
    }

    /// A START: only `ram` has a payload whose end can be found.
    fn begin_live_section(&mut self, cursor: &mut Cursor<'_>, at: Place) -> Result<(), Stop> {
        let header = self.read_section_header(cursor)?;
        if header.idstr != wire::RAM_IDSTR {
            let idstr = header.idstr;
            return Err(StreamError::LiveSection { at, idstr }.into());
        }
        if self.ram.is_some() {
            return Err(StreamError::RepeatedRam { at }.into());
        }
        if (header.version_id, header.instance_id) != (wire::RAM_SAVE_VERSION, 0) {
            return Err(StreamError::RamVersion {
                at,
                version: header.version_id,
                instance_id: header.instance_id,
            }
            .into());
        }
        let is_mapped = self.configuration.is_mapped;
        if is_mapped && self.configuration.capabilities.is_empty() {
            return Err(StreamError::NotMappedRam { at }.into());
        }
        self.ram = Some(Ram::new(header.section_id, is_mapped));
        self.last = Some(header.name());
        self.state = State::Ram { is_last: false };
        Ok(())
    }

    fn read_section_header(&self, cursor: &mut Cursor<'_>) -> Result<SectionHeader, Stop> {
        SectionHeader::read(cursor, |offset| self.place(offset))
    }

    /// A PART or an END: be32 section number.
    fn continue_ram(
        &mut self,
        cursor: &mut Cursor<'_>,
        at: Place,
        is_last: bool,
    ) -> Result<(), Stop> {
        let section_id = cursor.be32()?;
        if self.ram.as_ref().map(Ram::section_id) != Some(section_id) {
            return Err(StreamError::UnknownSectionId { at, section_id }.into());
        }
        if self.has_ram_ended {
            return Err(StreamError::RamEnded { at }.into());
        }
        self.state = State::Ram { is_last };
        Ok(())
    }

    fn read_ram_footer(&mut self, cursor: &mut Cursor<'_>, is_last: bool) -> Result<(), Stop> {
        let section_id = self.ram.as_ref().map_or(0, Ram::section_id);
        read_footer(cursor, section_id, wire::RAM_IDSTR)?;
        self.has_ram_ended = is_last;
        self.state = State::Sections;
        Ok(())
    }

    /// A FULL: the device state begins, unless pages are still to come (virtio-mem writes one early).
    fn begin_full_section(&mut self, cursor: &mut Cursor<'_>, at: Place) -> Result<(), Stop> {
        let header = self.read_section_header(cursor)?;
        let may_begin = self.has_ram_ended || self.ram.as_ref().is_some_and(Ram::is_complete);
        if !may_begin || header.idstr == wire::RAM_IDSTR {
            let idstr = header.idstr;
            return Err(StreamError::EarlySection { at, idstr }.into());
        }
        self.begin_device_state(at)
    }

    fn begin_device_state(&mut self, at: Place) -> Result<(), Stop> {
        if self.blocks().is_empty() {
            return Err(StreamError::NoBlockList { at }.into());
        }
        self.state = State::Devices;
        Ok(())
    }

    fn keep_device_state(&mut self, input: &[u8]) -> Result<Element, Stop> {
        if input.is_empty() {
            return Err(Stop::NeedMore);
        }
        let limit = MAX_DEVICE_STATE_LEN;
        if input.len() > limit - self.device_state.len() {
            let at = self.place(self.position());
            return Err(StreamError::DeviceStateTooLong { at, limit }.into());
        }
        self.device_state.extend_from_slice(input);
        Ok(Element {
            len: input.len(),
            event: Event::DeviceState,
        })
    }

    /// be16 command · be16 length · that many bytes.
    fn read_command(&mut self, cursor: &mut Cursor<'_>, at: Place) -> Result<(), Stop> {
        let command = cursor.be16()?;
        let (name, lens): (_, &[u16]) = match command {
            wire::MIG_CMD_OPEN_RETURN_PATH => ("OPEN_RETURN_PATH", &[0]),
            wire::MIG_CMD_PING => ("PING", &[4]),
            wire::MIG_CMD_POSTCOPY_ADVISE => ("POSTCOPY_ADVISE", &[0, 16]),
            wire::MIG_CMD_SWITCHOVER_START => ("SWITCHOVER_START", &[0]),
            _ => return Err(refused_command(at, command).into()),
        };
        let len = cursor.be16()?;
        if !lens.contains(&len) {
            return Err(StreamError::CommandLength { at, name, len }.into());
        }
        if len == 16 {
            return check_advise(cursor, at);
        }
        cursor.take(usize::from(len))?;
        Ok(())
    }
}

/// be64 all page sizes of RAM, ored · be64 target page size. Huge pages would change the block list.
fn check_advise(cursor: &mut Cursor<'_>, at: Place) -> Result<(), Stop> {
    let summary = cursor.be64()?;
    let target = cursor.be64()?;
    match (summary, target) {
        (4096, 4096) => Ok(()),
        _ => Err(StreamError::HugePages { at, summary }.into()),
    }
}

fn refused_command(at: Place, command: u16) -> StreamError {
    let name = match command {
        wire::MIG_CMD_POSTCOPY_LISTEN => "POSTCOPY_LISTEN",
        wire::MIG_CMD_POSTCOPY_RUN => "POSTCOPY_RUN",
        wire::MIG_CMD_POSTCOPY_RAM_DISCARD => "POSTCOPY_RAM_DISCARD",
        wire::MIG_CMD_PACKAGED => "PACKAGED",
        wire::MIG_CMD_ENABLE_COLO => "ENABLE_COLO",
        wire::MIG_CMD_POSTCOPY_RESUME => "POSTCOPY_RESUME",
        wire::MIG_CMD_RECV_BITMAP => "RECV_BITMAP",
        _ => return StreamError::UnknownCommand { at, command },
    };
    StreamError::RefusedCommand { at, name }
}

fn text(at: Place, what: &'static str, text: Result<&str, &[u8]>) -> Result<String, StreamError> {
    text.map(str::to_owned).map_err(|found| {
        let found = String::from_utf8_lossy(found).into_owned();
        StreamError::NotText { at, what, found }
    })
}

#[cfg(test)]
mod tests;
