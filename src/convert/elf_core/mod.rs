//! Makes an ELF core of an image: the guest's physical memory and its processors' registers, as debuggers want them.
//!
//! ```text
//! open → address space → lay out → pages at their places (each chunk verified) → headers, notes → sync → publish
//! ```
//!
//! The file is what QEMU's `dump-guest-memory` writes: a `PT_LOAD` for each range of guest-physical addresses with its
//! address in `p_paddr`, and notes with the registers. Zero pages are holes. Where the guest keeps a `VMCOREINFO` note
//! (Linux does, if it was built for crash dumps) that is added, whether or not the guest told its `vmcoreinfo` device
//! about it.

mod layout;
mod notes;

use std::path::PathBuf;
use std::sync::Mutex;

use serde::Serialize;

use super::error::ConvertError;
use crate::bytes::{PublishError, ReadAt, Sink, WriteAt};
use crate::container::Image;
use crate::error::Result;
use crate::image::OpenedImage;
use crate::pipeline::{self, AddressSpace, GuestMemory, PipelineError, Scan, Seen};
use crate::progress::Progress;
use crate::store::FileSink;
use crate::units::PAGE_LEN;

use layout::{CoreLayout, CoreSegment};

/// What is to be made.
#[derive(Debug, Clone)]
pub struct CoreRequest {
    /// The core.
    pub target: PathBuf,
    /// Whether a file of that name may be replaced.
    pub may_replace: bool,
    /// Workers.
    pub threads: usize,
}

/// What was made.
#[derive(Debug, Clone, Serialize)]
pub struct CoreReport {
    /// The core.
    pub core: String,
    /// Bytes of the file, holes included.
    pub file_bytes: u64,
    /// Its ranges of guest-physical memory: first address and length.
    pub memory: Vec<(u64, u64)>,
    /// The instruction pointers of the processors whose registers are in it, in the order of their notes.
    pub instruction_pointers: Vec<u64>,
    /// Whether the guest's `VMCOREINFO` note was found.
    pub has_vmcoreinfo: bool,
}

/// Makes an ELF core of an image.
///
/// # Errors
/// [`ConvertError`], or what a module below it met. No file of the new name exists then.
pub fn elf_core(
    opened: &OpenedImage,
    request: &CoreRequest,
    progress: &dyn Progress,
) -> Result<CoreReport> {
    let image = opened.image();
    image.verify_sections()?;
    let mut sink = FileSink::create(&request.target, request.may_replace)?;
    let report = write(image, request, &mut sink, progress)?;
    sink.sync().map_err(ConvertError::Write)?;
    if progress.is_cancelled() {
        return Err(PipelineError::Cancelled.into());
    }
    sink.publish().map_err(|error| match error {
        PublishError::NotPublished(source) => ConvertError::Publish(source),
        PublishError::Unknown(source) => ConvertError::PublishUnknown(source),
    })?;
    Ok(report)
}

fn write<R: ReadAt>(
    image: &Image<R>,
    request: &CoreRequest,
    sink: &mut FileSink,
    progress: &dyn Progress,
) -> Result<CoreReport> {
    let memory = GuestMemory::open(image)?;
    let space = AddressSpace::of(image, &memory)?;
    let layout = CoreLayout::of(space.physical.ranges(), &space.cpus);
    let places: &dyn WriteAt = sink;
    // The last page may be zero, and the file has to reach there all the same.
    let last = layout.file_len().saturating_sub(1);
    places
        .write_all_at(&[0], last)
        .map_err(ConvertError::Write)?;
    let noted = write_memory(&memory, &layout, places, request.threads, progress)?;
    let note = vmcoreinfo(&memory, &space, noted)?;
    let head = layout.head(note.as_deref());
    places.write_all_at(&head, 0).map_err(ConvertError::Write)?;
    let segments = layout.segments().iter();
    Ok(CoreReport {
        core: request.target.display().to_string(),
        file_bytes: layout.file_len(),
        memory: segments.map(|it| (it.range.start, it.range.len)).collect(),
        instruction_pointers: space.cpus.iter().map(|cpu| cpu.rip).collect(),
        has_vmcoreinfo: note.is_some(),
    })
}

/// Puts every page with bytes where it belongs. Gives the guest-physical address of the first page that begins with a
/// `VMCOREINFO` note.
fn write_memory<R: ReadAt>(
    memory: &GuestMemory<'_, R>,
    layout: &CoreLayout<'_>,
    places: &dyn WriteAt,
    threads: usize,
    progress: &dyn Progress,
) -> Result<Option<u64>> {
    let mut blocks: Vec<usize> = layout.segments().iter().map(|it| it.range.block).collect();
    blocks.sort_unstable();
    blocks.dedup();
    let lens = blocks.iter().map(|it| memory.blocks()[*it].used_length);
    let total = lens.fold(0, u64::saturating_add);
    progress.begin("writing the core", Some(total));
    let scan = Scan {
        blocks,
        wants_zeros: false,
        threads,
    };
    let noted: Mutex<Option<u64>> = Mutex::new(None);
    let work = |seen: &Seen<'_>| {
        let segments = layout.segments().iter();
        let mut of_block = segments.filter(|segment| segment.range.block == seen.block);
        of_block.try_for_each(|segment| {
            write_part(seen, segment, places, &|address| {
                if let Ok(mut noted) = noted.lock() {
                    *noted = Some(noted.map_or(address, |first| first.min(address)));
                }
            })
        })
    };
    let mut failed = None;
    let done = pipeline::scan(memory, &scan, progress, &work, &mut |written| {
        failed = written.err();
        Ok::<bool, PipelineError>(failed.is_none())
    });
    progress.end();
    done?;
    if let Some(error) = failed {
        return Err(ConvertError::Write(error).into());
    }
    Ok(noted.into_inner().unwrap_or(None))
}

/// Writes what a segment shows of a part of its block, but for zero pages.
fn write_part(
    seen: &Seen<'_>,
    segment: &CoreSegment,
    places: &dyn WriteAt,
    noted: &dyn Fn(u64),
) -> std::io::Result<()> {
    let range = &segment.range;
    let own = seen.offset + seen.own.start as u64..seen.offset + seen.own.end as u64;
    let shown = own.start.max(range.offset)..own.end.min(range.offset + range.len);
    if shown.is_empty() {
        return Ok(());
    }
    let in_bytes = |offset: u64| usize::try_from(offset - seen.offset).unwrap_or(usize::MAX);
    let bytes = &seen.bytes[in_bytes(shown.start)..in_bytes(shown.end)];
    let file_offset = segment.file_offset + (shown.start - range.offset);
    let address = range.start + (shown.start - range.offset);
    let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
    // Pages that follow each other go into one write.
    let mut first = None;
    let pages = bytes.chunks(PAGE_LEN).map(Some).chain([None]);
    for (number, page) in pages.enumerate() {
        let at = (number * PAGE_LEN).min(bytes.len());
        match (page.filter(|page| !is_zero(page)), first) {
            (Some(page), started) => {
                if notes::is_vmcoreinfo(page) {
                    noted(address + at as u64);
                }
                first = started.or(Some(at));
            }
            (None, Some(start)) => {
                places.write_all_at(&bytes[start..at], file_offset + start as u64)?;
                first = None;
            }
            (None, None) => {}
        }
    }
    Ok(())
}

/// The guest's note: where its device says, or else where one was seen.
fn vmcoreinfo<R: ReadAt>(
    memory: &GuestMemory<'_, R>,
    space: &AddressSpace,
    noted: Option<u64>,
) -> Result<Option<Vec<u8>>> {
    let told = space.vmcoreinfo.map(|(address, _)| address);
    let mut reader = space.reader(memory);
    for address in [told, noted].into_iter().flatten() {
        let mut note = vec![0; notes::LONGEST_VMCOREINFO];
        match reader.read(address, &mut note) {
            Ok(()) => {
                if let Some(note) = notes::vmcoreinfo_in(&note) {
                    return Ok(Some(note.to_vec()));
                }
            }
            // A guest may say what it likes.
            Err(PipelineError::NoMemory { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}
