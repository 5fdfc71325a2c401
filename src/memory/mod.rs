//! A saved guest's memory, looked at: where it lies, what is in it, where something is.
//!
//! ```text
//! open → page map, device state → read | search | strings | count, each chunk verified before a byte of it is used
//! ```
//!
//! Nothing is unpacked: single reads fetch the chunks of their pages, and what goes through all of memory skips pages
//! that are zero.

mod error;
mod map;
mod pattern;
mod search;
mod stats;
mod strings;

pub use error::MemoryError;
pub use map::{Stretch, map};
pub use pattern::{Pattern, PatternKind};
pub use search::{Match, Place, SearchRequest, Searched, search};
pub use stats::{BlockStats, Stats, stats};
pub use strings::{Found, StringsRequest, TextKind, strings};

use crate::bytes::ReadAt;
use crate::container::Image;
use crate::error::Result;
use crate::pipeline::{AddressReader, AddressSpace, GuestMemory, MemoryReader};
use crate::stream::x86_paging::{Paging, PagingMode};

/// The memory of the guest in an image, by block and by address.
#[derive(Debug)]
pub struct MemoryView<'a, R: ReadAt> {
    memory: GuestMemory<'a, R>,
    space: AddressSpace,
}

impl<'a, R: ReadAt> MemoryView<'a, R> {
    /// The memory in `image`: page map and device state are read, no page.
    ///
    /// # Errors
    /// An image without a page map; whatever is wrong with it or with the device state.
    pub fn open(image: &'a Image<R>) -> Result<Self> {
        let memory = GuestMemory::open(image)?;
        let space = AddressSpace::of(image, &memory)?;
        Ok(MemoryView { memory, space })
    }

    /// The memory as named blocks.
    pub fn memory(&self) -> &GuestMemory<'a, R> {
        &self.memory
    }

    /// The memory as addresses.
    pub fn space(&self) -> &AddressSpace {
        &self.space
    }

    /// The index of the RAMBlock of that name.
    ///
    /// # Errors
    /// [`MemoryError::NoBlock`].
    pub fn block(&self, idstr: &str) -> Result<usize, MemoryError> {
        let mut names = self.memory.blocks().iter().map(|block| &block.idstr);
        let found = names.position(|name| name == idstr);
        found.ok_or_else(|| MemoryError::NoBlock {
            idstr: idstr.to_owned(),
            known: names_of(&self.memory),
        })
    }

    /// How the processor of that number translates addresses.
    ///
    /// # Errors
    /// [`MemoryError::NoCpu`], [`MemoryError::NoRegisters`].
    pub fn paging(&self, cpu: u32) -> Result<Paging, MemoryError> {
        if self.space.cpus.is_empty() {
            return Err(MemoryError::NoRegisters);
        }
        let found = self.space.cpu(cpu).map(Paging::of);
        found.ok_or_else(|| MemoryError::NoCpu {
            cpu,
            known: self.space.cpus.iter().map(|cpu| cpu.index).collect(),
        })
    }

    /// As [`MemoryView::paging`], with another root for its page tables: that of another process. Without registers long mode
    /// with four levels is assumed.
    pub fn paging_from(&self, cpu: u32, cr3: u64) -> Paging {
        let mode = self.space.cpu(cpu).map(|cpu| Paging::of(cpu).mode);
        let mode = mode.unwrap_or(PagingMode::FourLevel);
        Paging { cr3, mode }
    }

    /// A reader by block, for one thread.
    pub fn reader(&self) -> MemoryReader<'_, 'a, R> {
        self.memory.reader()
    }

    /// A reader by address, for one thread.
    pub fn address_reader(&self) -> AddressReader<'_, 'a, R> {
        self.space.reader(&self.memory)
    }

    /// The blocks to look at: the one of that name, or all.
    fn chosen(&self, block: Option<&str>) -> Result<Vec<usize>, MemoryError> {
        match block {
            Some(idstr) => Ok(vec![self.block(idstr)?]),
            None => Ok((0..self.memory.blocks().len()).collect()),
        }
    }
}

/// Bytes of these blocks together.
fn len_of<R: ReadAt>(memory: &GuestMemory<'_, R>, blocks: &[usize]) -> u64 {
    let lens = blocks.iter().map(|it| memory.blocks()[*it].used_length);
    lens.fold(0, u64::saturating_add)
}

fn names_of<R: ReadAt>(memory: &GuestMemory<'_, R>) -> Vec<String> {
    let blocks = memory.blocks().iter();
    blocks.map(|block| block.idstr.clone()).collect()
}
