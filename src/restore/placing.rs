//! Finds where a QEMU that waits for its stream keeps guest memory, and whether it can be written there directly.
//!
//! Nobody else may touch the guest: it has not run yet, and we hold its only monitor.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;

use crate::container::PageMap;
use crate::host::{Backing, HostError, ProcessMemory};
use crate::pipeline::{Destination, Placement};
use crate::qmp::{QmpClient, QmpError};
use crate::units::PAGE_LEN;

/// Smaller RAMBlocks are not worth the questions: ROMs, and what devices keep for themselves.
const LEAST_LEN: u64 = 16 << 20;

/// Pages looked at in one go.
const LOOK_PAGES: usize = 1 << 16;

/// How pages of an image can be written where QEMU keeps them; `None` if all has to go through the stream.
///
/// A RAMBlock is written if QEMU tells its address and gives it the image's length, if it is private anonymous memory
/// that we may write, and if the image names each of its pages once.
///
/// # Errors
/// [`QmpError`] if the monitor is gone. What cannot be asked or written otherwise goes through the stream.
pub fn placement<'a>(
    qmp: &mut QmpClient,
    memory: &'a ProcessMemory,
    page_map: &PageMap,
) -> Result<Option<Placement<'a>>, QmpError> {
    let blocks = match qmp.ram_blocks() {
        Ok(blocks) => blocks.unwrap_or_default(),
        Err(error) if error.is_gone() => return Err(error),
        Err(_) => Vec::new(),
    };
    let destinations = (0..).zip(page_map.blocks()).filter_map(|(index, ours)| {
        let theirs = blocks.iter().find(|theirs| {
            (&theirs.idstr, theirs.used_length) == (&ours.idstr, ours.used_length)
        })?;
        let is_large = ours.used_length >= LEAST_LEN;
        let is_whole = ours.used_length.is_multiple_of(PAGE_LEN as u64);
        let address = theirs.host_address?;
        let fits = is_large && is_whole && page_map.names_once(index);
        let can_be_written = fits && can_be_written(memory, address, ours.used_length);
        Some(Destination {
            idstr: ours.idstr.clone(),
            used_length: ours.used_length,
            address: can_be_written.then_some(address)?,
            touched: touched(memory, address, ours.used_length).ok()?,
        })
    });
    let destinations: Vec<Destination> = destinations.collect();
    let is_worth_it = !destinations.is_empty();
    Ok(is_worth_it.then(|| Placement::new(memory, destinations, page_map)))
}

/// Whether it is private anonymous memory that we may write: its first byte is written as it is.
fn can_be_written(memory: &ProcessMemory, address: u64, len: u64) -> bool {
    let mut byte = [0];
    matches!(memory.backing(address, len), Ok(Some(Backing::Anonymous)))
        && memory
            .read(address, &mut [IoSliceMut::new(&mut byte)])
            .and_then(|()| memory.write(address, &[IoSlice::new(&byte)]))
            .is_ok()
}

/// The pages that QEMU touched, in ascending order.
fn touched(memory: &ProcessMemory, address: u64, len: u64) -> Result<Vec<Range<u64>>, HostError> {
    let page_len = PAGE_LEN as u64;
    let page_count = len / page_len;
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let mut pages = vec![false; LOOK_PAGES];
    let mut first = 0;
    while first < page_count {
        let left = usize::try_from(page_count - first).unwrap_or(usize::MAX);
        let looked = &mut pages[..left.min(LOOK_PAGES)];
        memory.touched(address + first * page_len, looked)?;
        for (page, is_touched) in (first..).zip(&*looked) {
            match ranges.last_mut() {
                _ if !is_touched => {}
                Some(last) if last.end == page => last.end += 1,
                _ => ranges.push(page..page + 1),
            }
        }
        first += looked.len() as u64;
    }
    Ok(ranges)
}
