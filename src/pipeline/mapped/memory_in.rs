//! The memory of a stopped guest → pages in their places: each worker takes the next region, reads it where it lies and
//! writes it where it belongs.

use std::sync::Mutex;
use std::thread;

use super::places::Places;
use crate::container::ImageWriter;
use crate::error::Error;
use crate::pipeline::capture::StoppedGuestMemory;
use crate::pipeline::cursor::{Cursor, Next};
use crate::pipeline::{Encoded, Encoding, PipelineError};
use crate::progress::Progress;
use crate::stream::writer::is_unused_section;
use crate::stream::writer::unused_section;
use crate::units::PAGE_LEN;

/// Captures `guest` into an image of layout `mapped`; as [`capture()`](crate::pipeline::capture()).
///
/// # Errors
/// [`PipelineError::NoPlaces`] if the image goes to a pipe; the first that a worker met; what `device_sections` says.
pub fn capture(
    guest: &StoppedGuestMemory,
    device_sections: &mut dyn FnMut() -> Result<Vec<u8>, Error>,
    image: &mut ImageWriter<'_>,
    encoding: &Encoding,
    progress: &dyn Progress,
) -> Result<Encoded, Error> {
    let target = image.places().ok_or(PipelineError::NoPlaces)?;
    let places = Places::new(target, 0, &guest.machine_type, guest.ram_blocks());
    let cursor = Mutex::new(Cursor::new(guest, encoding.chunk_len));
    let copier = Copier {
        guest,
        places: &places,
        cursor: &cursor,
        region_len: encoding.chunk_len,
        progress,
    };
    let copied = thread::scope(|scope| {
        let workers: Vec<_> = (0..encoding.threads.max(1))
            .map(|_| scope.spawn(|| copier.run()))
            .collect();
        let done = workers.into_iter().map(|worker| {
            let joined = worker.join();
            joined.map_err(|_| PipelineError::Worker).flatten()
        });
        done.fold(Ok(()), Result::and)
    });
    copied?;
    let device_sections = device_sections()?;
    let ram_section = match is_unused_section(guest.ram_section, &device_sections) {
        true => guest.ram_section,
        false => unused_section(&device_sections),
    };
    let placed = places.finish(ram_section);
    let sealed = placed.seal(&device_sections, encoding, progress)?;
    Ok(sealed.place(image)?)
}

struct Copier<'a, 'p> {
    guest: &'a StoppedGuestMemory,
    places: &'a Places<'p>,
    cursor: &'a Mutex<Cursor<'a>>,
    region_len: usize,
    progress: &'a dyn Progress,
}

impl Copier<'_, '_> {
    /// Copies regions until none is left.
    fn run(&self) -> Result<(), PipelineError> {
        let mut bytes = vec![0; self.region_len];
        while let Some(next) = self.next()? {
            let page_count = match next {
                Next::Zeros(_, _, page_count) => page_count,
                Next::Region(region) => {
                    let block = &self.guest.blocks[region.block];
                    let page_count = region.touched.len();
                    let bytes = &mut bytes[..page_count * PAGE_LEN];
                    region.read_pages(&self.guest.memory, block, bytes)?;
                    let (block, first_page) = (region.block, region.first_page);
                    self.places.put(block, first_page, bytes, &region.touched)?;
                    page_count as u64
                }
            };
            self.progress.advance(page_count * PAGE_LEN as u64);
        }
        Ok(())
    }

    fn next(&self) -> Result<Option<Next>, PipelineError> {
        if self.progress.is_cancelled() {
            return Err(PipelineError::Cancelled);
        }
        let mut cursor = self.cursor.lock().map_err(|_| PipelineError::Worker)?;
        Ok(cursor.next()?.map(|(_, next)| next))
    }
}
